"""Generalization bounds of a trained network by PAC-Bayes, with every posterior side by side; resumable.

The network is one of a preset, trained here with true and with random labels, or the user's own. Results of steps are
records of `hesscope.layerwise.bound_record`, one file each; what an optimization has reached so far is one, too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from math import hypot, inf, nan, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hesscope._version import __version__
from hesscope.bounds import DEFAULT_GRID, require_enough_samples
from hesscope.bounds.arguments import require_delta
from hesscope.core.checks import nearest, require_positive_int
from hesscope.core.errors import InputError
from hesscope.core.files import TEMPORARY_SUFFIX
from hesscope.core.real_numbers import require_positive
from hesscope.data import LabelledData
from hesscope.layerwise.axes import groups_of
from hesscope.layerwise.bound_record import PacBayesBound
from hesscope.layerwise.gibbs import stochastic_risk
from hesscope.layerwise.pac_bayes import MONTE_CARLO_SHARE, OPTIMIZED, POSTERIORS, first_outputs, pac_bayes_bound
from hesscope.layerwise.prior import prior_vector
from hesscope.layerwise.risk import Risk, network_risk, require_risk, risks_of_network
from hesscope.objective import Objective
from hesscope.objective.batches import fingerprint
from hesscope.objective.objective import require_output_loss
from hesscope.partition import Partition
from hesscope.study import loading
from hesscope.study.analyze import Point, load_objective, settings_fingerprint
from hesscope.study.bound_presets import (
    BOUND_PRESETS,
    OF_ALL,
    TRUE,
    HeldOut,
    find_bound_preset,
    initial_network,
    labels_from,
    network_in_words,
    train_network,
)
from hesscope.study.config import StudyConfig
from hesscope.study.preset_runs import preset_rows, require_same_run, write_run
from hesscope.study.steps import Progress, Reporter, Step, run_steps
from hesscope.study.store import Store

if TYPE_CHECKING:
    import xarray as xr

FOLDER = Path("out", "bound")
SETTINGS = "bound.json"
# Names of steps: those of a kind of labels, and of a posterior; what an optimization has reached so far.
TRAIN, NETWORK, BOUND, CURRENT = "train", "network", "bound", "current"
# Files with the states of trainings and optimizations.
STATE = "state-"
# Expected seconds, for the progress bar: of a closed form in either basis, of a step of optimization, and of all else.
CLOSED_COST, KRONECKER_COST, STEP_COST, TRAINING_COST, NETWORK_COST = 10.0, 40.0, 0.03, 10.0, 2.0


@dataclass(frozen=True)
class BoundSettings:
    """What is computed of a trained network.

    Attributes:
        posteriors: in the order of POSTERIORS; delta: probability with which each bound may fail.
        steps: of each optimization; minutes: after which it ends in any case.
        loss_bound: None for the classification error; seed: root of all random streams.
    """

    posteriors: tuple[str, ...]
    delta: float
    steps: int
    minutes: float | None
    loss_bound: float | None
    seed: int


@dataclass(frozen=True, eq=False)
class Case:
    """A network with samples whose labels are of one kind.

    Attributes:
        labels: "true" or "random".
        objective: the network on the samples; at initialization if it is yet to be trained.
        prior: its parameters at initialization, a vector [P] or a state dict.
        held_out: where the true risk comes from, None if it is not known.
        train: trains the network in place, called with the file for its state and with `progress`; None if it is.
    """

    labels: str
    objective: Objective
    prior: Tensor | Mapping[str, Tensor]
    held_out: HeldOut | None
    train: Callable[[Path, Progress], None] | None = None

    @cached_property
    def unseen(self) -> Objective | None:
        """The network on what is held out; None where there is nothing to be computed on."""
        if self.held_out is None or self.held_out.known is not None:
            return None
        own = self.objective
        module = require_output_loss(own, "a risk").module
        return Objective(own.model, module, self.held_out.batches(), own.parameters.dtype)


@dataclass(frozen=True, eq=False)
class BoundStudy:
    """Everything that `bound` needs, loaded and checked.

    Attributes:
        title: of the page; network, data: what they are, in words; plan: (what, how much) lines.
        cases: one for each kind of labels.
        store: where the results go, under a fingerprint of all that they depend on.
        identity: what a folder may not have otherwise, in words; empty where a folder is taken over.
    """

    title: str
    network: str
    data: str
    plan: tuple[tuple[str, str], ...]
    cases: tuple[Case, ...]
    settings: BoundSettings
    store: Store
    identity: Mapping[str, str]

    @property
    def folder(self) -> Path:
        """Of the page, the figures and the results."""
        return self.store.folder


def bound_preset_table() -> list[tuple[str, ...]]:
    """Every preset, what it is and what it takes; the first row names the columns."""
    texts = {preset.name: (preset.description, preset.taken) for preset in BOUND_PRESETS.values()}
    for_all = " ".join(f"--{name}" for name in OF_ALL) + " (see --help)"
    return preset_rows("the network and its samples, and the options with their defaults", texts, for_all)


# --- preparing --------------------------------------------------------------------------------------------------------


def choose_bound(
    name: str,
    *,
    labels: str = "both",
    posteriors: Sequence[str] | None = None,
    delta: float = 0.05,
    steps: int = 4000,
    minutes: float | None = None,
    seed: int = 0,
    out: Path | None = None,
    **given: Any,
) -> BoundStudy:
    """The run of a preset; what cannot be done is refused before any work.

    Args:
        name: of the preset.
        labels: "true", "random" or "both".
        posteriors, delta, steps, minutes, seed: see BoundSettings; all posteriors unless told.
        out: the folder; out/bound/LABEL unless told, the label being that of the preset with its choices.
        given: options of the preset that differ from its defaults; those that are None do not.

    Raises:
        InputError: an unknown preset, an option that it does not take or a value that does not fit, too few samples, or
            a folder that holds another run (both are named).
    """
    preset = find_bound_preset(name)
    options = preset.options(**given, seed=seed)
    kinds = labels_from(labels)
    settings = BoundSettings(_chosen("--posteriors", posteriors), delta, steps, minutes, None, seed)
    _require_settings(settings)
    folder = FOLDER / preset.label(options) if out is None else out
    identity = {"preset": name, **options.in_words, "delta": f"{delta:g}", "steps": str(steps)}
    require_same_run(folder / SETTINGS, identity)
    sample = preset.sample(options)
    network = initial_network(options, sample.data)
    held = sample.held_out
    content = {
        "versions": (__version__, torch.__version__),
        "settings": identity,
        "network": network.state_dict(),
        "data": sample.data,
        "held_out": (held.what, held.data),
    }
    store = Store(folder, fingerprint(content))
    cases = []
    for kind in kinds:
        data, held = sample.labelled(kind, seed)
        model = initial_network(options, data)
        objective = Objective(model, "cross_entropy", data.batch("cross_entropy"))
        train = partial(train_network, model, data, options.epochs_on(kind), seed, kind, store.settings)
        cases.append(Case(kind, objective, _flat(objective, model), held, train))
    _require_enough(cases[0], settings, sample.data.classes)
    plan = (
        ("preset", f"{name}: {preset.description}"),
        ("network", network_in_words(network)),
        ("data", sample.words),
        ("held out", sample.held_out.what),
        ("labels", " and ".join(kinds)),
        ("training", f"{' and '.join(f'{options.epochs_on(kind):,}' for kind in kinds)} epochs of SGD"),
    )
    return BoundStudy(
        f"{network_in_words(network)}, on {sample.words}",
        network_in_words(network),
        sample.words,
        plan,
        tuple(cases),
        settings,
        store,
        identity,
    )


def prepare_bound(config: StudyConfig, base: Path) -> BoundStudy:
    """Load and check a network of the user's own; relative paths are relative to `base`.

    Raises:
        HesscopeError: whatever does not fit, in one line; nothing has been written then.
    """
    section = config.bound
    settings = BoundSettings(
        _chosen("bound.posteriors", section.posteriors),
        section.delta,
        section.steps,
        section.minutes,
        section.loss_bound,
        config.seed,
    )
    if config.model.startswith(loading.FOLDER):
        raise InputError(
            f"bound does not take model = {config.model!r}: no initialization of it is known, which the prior must be "
            "at, and the tokens of a text are no independent samples"
        )
    if config.checkpoint is None:
        raise InputError("bound needs a checkpoint, the trained parameters: a bound is of a network that was trained")
    objective = load_objective(config, base)
    # Refuses a loss that is not bounded, and data without one label for each sample.
    _, n = risks_of_network(objective, require_risk(objective, settings.loss_bound))
    prior = _initial_tensors(config, base, objective)
    case = Case(TRUE, objective, prior, _held_out(config, base, objective))
    _require_enough(case, settings, _classes(objective))
    unseen = "" if case.unseen is None else case.unseen.data_fingerprint
    if unseen == objective.data_fingerprint:
        raise InputError(f"bound.held_out = {section.held_out!r} gives the samples of data themselves")
    content = ("bound", fingerprint(prior), unseen, settings.delta, settings.steps, settings.loss_bound, settings.seed)
    whole = Partition.by_tensor(objective.model)
    known = settings_fingerprint(objective, whole, (*content, config.model), Point.of(objective))
    network = f"{type(objective.model).__name__}, {objective.parameters.size:,} parameters"
    data = f"{n:,} samples of {config.data}"
    lines = (
        ("model", network),
        ("data", f"{data}, loss {objective.loss.name}"),
        ("held out", "nothing" if case.held_out is None else case.held_out.what),
        ("prior", f"at {section.prior or f'the initialization by {config.model}'}"),
    )
    store = Store(base / config.output, known)
    return BoundStudy(f"{network}: {config.model}", network, data, lines, (case,), settings, store, {})


def _chosen(argument: str, posteriors: Sequence[str] | None) -> tuple[str, ...]:
    """Those asked for in the order of POSTERIORS; all unless told."""
    if posteriors is None:
        return tuple(POSTERIORS)
    if not posteriors:
        raise InputError(f"{argument} must name at least one of {', '.join(POSTERIORS)}")
    for name in posteriors:
        if name not in POSTERIORS:
            raise InputError(
                f"{argument} must be some of {', '.join(POSTERIORS)}, got {name!r}{nearest(name, POSTERIORS)}"
            )
    if len(set(posteriors)) < len(posteriors):
        raise InputError(f"{argument} must name each posterior once, got {', '.join(posteriors)}")
    return tuple(name for name in POSTERIORS if name in posteriors)


def _require_settings(settings: BoundSettings) -> None:
    """Refuse options of the command that do not fit; those of a STUDY.toml have been checked."""
    require_delta("--delta", settings.delta)
    require_positive_int("--steps", settings.steps)
    if settings.minutes is not None:
        require_positive("--minutes", settings.minutes)


def _require_enough(case: Case, settings: BoundSettings, classes: int | None) -> None:
    """Refuse samples so few that no bound could say more than guessing does."""
    groups, _ = groups_of(case.objective)
    guessing = 0.5 if settings.loss_bound is not None or classes is None else 1 - 1 / classes
    delta = (1 - MONTE_CARLO_SHARE) * settings.delta
    _, n = risks_of_network(case.objective, Risk(settings.loss_bound))
    require_enough_samples(n, delta, len(groups), DEFAULT_GRID, guessing)


def _initial_tensors(config: StudyConfig, base: Path, objective: Objective) -> Mapping[str, Tensor]:
    """State dict of the network as training began with it.

    Raises:
        InputError: it is not known, or it depends on the samples, such as that of the trained network.
    """
    section = config.bound
    with loading.importable_from(base):
        initial = loading.load_model(config.model, config.model_arguments, None, base)
        if section.prior is not None:
            loading.load_checkpoint(initial, base / section.prior)
        else:
            again = loading.load_model(config.model, config.model_arguments, None, base).state_dict()
            if any(not torch.equal(tensor, again[name]) for name, tensor in initial.state_dict().items()):
                raise InputError(
                    f"model = {config.model!r} makes another network each time, so that the one that training began "
                    "with is not known: seed its initialization, or pass the initial parameters as bound.prior"
                )
    try:
        prior_vector(objective, initial)
    except InputError as error:
        where = f"bound.prior = {section.prior!r}" if section.prior else f"checkpoint = {config.checkpoint!r}"
        raise InputError(f"{where}: {error}") from error
    return initial.state_dict()


def _held_out(config: StudyConfig, base: Path, objective: Objective) -> HeldOut | None:
    path, given = config.bound.held_out, config.bound.held_out_arguments
    if path is None:
        if given:
            raise InputError("bound.held_out_arguments has no function bound.held_out to be passed to")
        return None
    with loading.importable_from(base):
        data = loading.call_factory("bound.held_out", path, given)
    if isinstance(data, LabelledData):
        data = data.batch(config.loss)
    terms = Objective(objective.model, require_output_loss(objective, "a risk").module, data).num_terms
    return HeldOut(f"{terms:,} held-out samples", data)


def _classes(objective: Objective) -> int | None:
    """Number of outputs of the network, for losses with one class label each."""
    outputs = first_outputs(objective)
    return None if outputs.ndim < 2 else int(outputs.shape[1])


def _flat(objective: Objective, model: nn.Module) -> Tensor:
    """[P] a copy of the model's parameters, in the order and the dtype of the objective's."""
    space, own = objective.parameters, dict(model.named_parameters())
    return space.flatten({name: own[name].detach().to(space.dtype) for name in space.names})


# --- running ----------------------------------------------------------------------------------------------------------


def describe_bound(study: BoundStudy) -> list[tuple[str, str]]:
    """What is about to be done: (what, how much) lines."""
    settings = study.settings
    limit = "" if settings.minutes is None else f", at most {settings.minutes:g} minutes each"
    optimized = any(name in OPTIMIZED for name in settings.posteriors)
    return [
        *study.plan,
        ("posterior", ", ".join(settings.posteriors)),
        ("bound", f"each fails with probability {settings.delta:g} at most"),
        *([("steps", f"{settings.steps:,} of each optimization{limit}")] if optimized else []),
        ("results", str(study.folder)),
    ]


def run_bound(study: BoundStudy, report: Reporter) -> int:
    """Train and bound; returns how many steps were found done from an earlier run under the same settings.

    An optimization that `minutes` had ended goes on if it has more now.
    """
    study.folder.mkdir(parents=True, exist_ok=True)
    if study.identity:
        write_run(study.folder / SETTINGS, study.identity)
    _reopen(study)
    now: list[str] = []  # the bound that the step at work has reached
    try:
        found = run_steps(
            bound_steps(study, now), study.store, lambda title, share: report(", ".join((title, *now)), share)
        )
    finally:
        _tidy(study)
    return found


def bound_results(study: BoundStudy) -> list[xr.Dataset]:
    """The stored bounds in their order: finished ones, and what other optimizations have reached so far."""
    names = [(case.labels, posterior) for case in study.cases for posterior in study.settings.posteriors]
    found = (study.store.load(step_name(BOUND, *each)) or study.store.load(step_name(CURRENT, *each)) for each in names)
    return [each for each in found if each is not None]


def step_name(kind: str, labels: str, posterior: str | None = None) -> str:
    """Name of the step TRAIN or NETWORK of a kind of labels, or BOUND or CURRENT of a posterior."""
    return "-".join(part for part in (kind, labels, posterior) if part is not None)


def bound_steps(study: BoundStudy, now: list[str]) -> list[Step]:
    """For each kind of labels the training, the network's own risk and every posterior; `now`: filled by the latter."""
    steps = []
    for case in study.cases:
        title = f"{case.labels} labels: "
        if case.train is not None:
            train = partial(_train, study, case)
            steps.append(Step(step_name(TRAIN, case.labels), f"{title}training the network", TRAINING_COST, train))
        network = partial(_network, study, case)
        steps.append(Step(step_name(NETWORK, case.labels), f"{title}risk of the network", NETWORK_COST, network))
        for posterior in study.settings.posteriors:
            cost = _expected_seconds(study.settings, posterior)
            compute = partial(_bound, study, case, posterior, now)
            steps.append(Step(step_name(BOUND, case.labels, posterior), f"{title}{posterior}", cost, compute))
    return steps


def _expected_seconds(settings: BoundSettings, posterior: str) -> float:
    closed = KRONECKER_COST if posterior.startswith("kronecker") else CLOSED_COST
    limit = inf if settings.minutes is None else 60 * settings.minutes
    return closed + (min(STEP_COST * settings.steps, limit) if posterior in OPTIMIZED else 0.0)


def _train(study: BoundStudy, case: Case, progress: Progress) -> xr.Dataset:
    """The trained parameters."""
    import xarray as xr

    assert case.train is not None
    began = time.perf_counter()
    case.train(_state_path(study, case.labels), progress)
    objective = case.objective
    attributes = {"labels": case.labels, "risk": network_risk(objective), "seconds": time.perf_counter() - began}
    return xr.Dataset({"parameters": ("parameter", _flat(objective, objective.model).cpu().numpy())}, attrs=attributes)


def _network(study: BoundStudy, case: Case, _: Progress) -> xr.Dataset:
    """The risk of the trained network itself on what is held out; nan if nothing is."""
    import xarray as xr

    _put_trained(study, case)
    if case.unseen is not None:
        risk = network_risk(case.unseen, study.settings.loss_bound)
    else:
        risk = nan if case.held_out is None or case.held_out.known is None else case.held_out.known
    return xr.Dataset(attrs={"labels": case.labels, "held_out_risk": risk})


def _bound(study: BoundStudy, case: Case, posterior: str, now: list[str], progress: Progress) -> xr.Dataset:
    """The bound by a posterior, with the risk of its networks on what is held out."""
    settings, store = study.settings, study.store
    _put_trained(study, case)

    def tell(done: int, planned: int, bound: float | None) -> None:
        if bound is not None:
            now[:] = [f"bound {bound:.3f} now"]
        progress(done / max(planned, 1))

    def keep(reached: PacBayesBound) -> None:
        store.save(step_name(CURRENT, case.labels, posterior), _dataset(study, case, reached, (nan, nan)))

    try:
        found = pac_bayes_bound(
            case.objective,
            case.prior,
            posterior,
            settings.delta,
            loss_bound=settings.loss_bound,
            steps=settings.steps,
            seconds=None if settings.minutes is None else 60 * settings.minutes,
            seed=settings.seed,
            progress=tell,
            on_round=keep,
            state=_state_path(study, case.labels, posterior),
        )
        return _dataset(study, case, found, _held_out_risk(study, case, found))
    finally:
        now.clear()


def _put_trained(study: BoundStudy, case: Case) -> None:
    """Put the parameters of the finished training into the network."""
    if case.train is None:
        return
    stored = study.store.require(step_name(TRAIN, case.labels))["parameters"].to_numpy()
    space, own = case.objective.parameters, dict(case.objective.model.named_parameters())
    with torch.no_grad():
        for name, tensor in space.unflatten(torch.from_numpy(stored).to(space.device, space.dtype)).items():
            own[name].copy_(tensor)
    case.objective.model.eval()


def _held_out_risk(study: BoundStudy, case: Case, found: PacBayesBound) -> tuple[float, float]:
    """Risk, where it is held out or known, of networks drawn from the posterior, and its standard error; nan if not.

    That of a held-out sample also has the error of the sample, which is at most that of so many coin tosses.
    """
    if case.held_out is None:
        return nan, nan
    if case.unseen is None:
        return (nan, nan) if case.held_out.known is None else (case.held_out.known, 0.0)
    assert found.distribution is not None
    estimate = stochastic_risk(
        case.unseen, found.distribution, seed=study.settings.seed, loss_bound=study.settings.loss_bound
    )
    risk, stderr = float(estimate.value), float(estimate.stderr)
    if case.held_out.exact:
        return risk, stderr
    return risk, hypot(stderr, sqrt(risk * (1 - risk) / case.unseen.num_terms))


def _dataset(study: BoundStudy, case: Case, found: PacBayesBound, held_out: tuple[float, float]) -> xr.Dataset:
    """The record, with what it is of and the true risk beside it."""
    network = study.store.require(step_name(NETWORK, case.labels))
    minutes = study.settings.minutes
    return found.to_xarray().assign_attrs(
        labels=case.labels,
        held_out_risk=held_out[0],
        held_out_stderr=held_out[1],
        held_out_what="" if case.held_out is None else case.held_out.what,
        held_out_exact=int(case.held_out is not None and case.held_out.exact),
        network_held_out=float(network.attrs["held_out_risk"]),
        network=study.network,
        data=study.data,
        minutes=inf if minutes is None else minutes,
    )


# --- the folder -------------------------------------------------------------------------------------------------------


def _state_path(study: BoundStudy, labels: str, posterior: str | None = None) -> Path:
    return study.folder / f"{STATE}{step_name(TRAIN if posterior is None else BOUND, labels, posterior)}.pt"


def _asked(study: BoundStudy) -> Iterator[tuple[str, str]]:
    return ((case.labels, posterior) for case in study.cases for posterior in study.settings.posteriors)


def _finished(result: xr.Dataset) -> bool:
    return int(result.attrs["steps"]) >= int(result.attrs["planned_steps"])


def _reopen(study: BoundStudy) -> None:
    """Delete results of optimizations that `minutes` had ended, if they have more now: their states go on."""
    minutes = study.settings.minutes
    for labels, posterior in _asked(study):
        name = step_name(BOUND, labels, posterior)
        result = study.store.load(name)
        if result is None or _finished(result):
            continue
        if (inf if minutes is None else minutes) > float(result.attrs["minutes"]):
            study.store.save(step_name(CURRENT, labels, posterior), result)  # it is valid until there is more
            study.store.path(name).unlink()


def _tidy(study: BoundStudy) -> None:
    """Delete what finished steps no longer need, and what killed runs have left half-written."""
    for labels, posterior in _asked(study):
        result = study.store.load(step_name(BOUND, labels, posterior))
        if result is not None:
            study.store.path(step_name(CURRENT, labels, posterior)).unlink(missing_ok=True)
            if _finished(result):
                _state_path(study, labels, posterior).unlink(missing_ok=True)
    for path in study.folder.glob(f".*{TEMPORARY_SUFFIX}"):
        path.unlink(missing_ok=True)
