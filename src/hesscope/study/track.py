"""The Hessian along the checkpoints of a training run: one snapshot each, in one process or several; resumable.

Results are the files of a Tracker (see hesscope.dynamics.trajectory): one for each step, and what they are of.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from hesscope.core.errors import HesscopeError, InputError
from hesscope.core.files import TEMPORARY_SUFFIX, atomic_path
from hesscope.core.result_files import open_tree, save_tree
from hesscope.dynamics.dynamic_force import DynamicForce, dynamic_force
from hesscope.dynamics.measures import (
    BLOCKS_COMPARED,
    MEASURES,
    Before,
    Density,
    Eigenvalues,
    Energies,
    Heatmap,
    Heterogeneity,
    Measure,
    Moment,
    checked_measures,
    measure,
    require_measurable,
)
from hesscope.dynamics.optimizers import learning_rate, stability_limit
from hesscope.dynamics.snapshot import UNKNOWN, Snapshot
from hesscope.dynamics.tracker import SAME_LOSS
from hesscope.dynamics.trajectory import (
    Trajectory,
    open_trajectory,
    require_same_identity,
    snapshot_path,
    steps_in,
    write_identity,
)
from hesscope.dynamics.whole import DENSE_SIZE
from hesscope.estimate.block_energies import DUAL, settle_method
from hesscope.objective import Objective
from hesscope.objective.batches import fingerprint
from hesscope.objective.losses import OutputLoss
from hesscope.operators import Hessian
from hesscope.partition import Partition
from hesscope.study import loading
from hesscope.study.analyze import human_seconds
from hesscope.study.checkpoints import Checkpoint, find_checkpoints
from hesscope.study.config import StudyConfig, TrackConfig
from hesscope.study.processes import run_in_processes
from hesscope.study.spectrum import TYPICAL_END, TYPICAL_ESTIMATE, TYPICAL_PAIR
from hesscope.study.steps import Reporter

# Attributes of a step's file: fingerprints of its checkpoint, and of the one whose eigenvectors it began with.
OWN, BEFORE = "checkpoint", "checkpoint_before"
# Files with the top eigenvectors at the last steps measured, from which a run that was killed goes on.
VECTORS = "eigenvectors-"
# Seconds of measuring in all below which several processes do not pay.
TOO_SHORT = 60.0
# Losses that are never negative.
NEVER_NEGATIVE = ("cross_entropy", "mse")
# What the state of SGD has and, beside these and its defaults, nothing else.
SGD_KEYS, USUAL_KEYS = ("momentum", "dampening", "nesterov"), ("params", "initial_lr")


@dataclass(frozen=True)
class Rate:
    """Learning rate at a checkpoint, and the largest sharpness that is stable with it; nan if not known."""

    learning_rate: float = UNKNOWN
    stability_limit: float = UNKNOWN


@dataclass(frozen=True)
class TrackStudy:
    """Everything that `track` needs, loaded and checked.

    Attributes:
        checkpoints: by their steps, ascending; rates: of each, by its step.
        objective: on a model whose parameters and buffers are replaced by those of a checkpoint.
    """

    config: StudyConfig
    base: Path
    folder: Path
    checkpoints: tuple[Checkpoint, ...]
    rates: Mapping[int, Rate]
    objective: Objective
    partition: Partition
    measures: Mapping[str, Measure]

    @property
    def settings(self) -> TrackConfig:
        """The section [track] of the STUDY.toml."""
        return self.config.track

    @cached_property
    def identity(self) -> dict[str, str]:
        """What is measured, as words; what the single checkpoints hold is told by their steps' files."""
        objective, config, space = self.objective, self.config, self.objective.parameters
        loss = objective.loss
        module = loss.module if isinstance(loss, OutputLoss) else torch.nn.Module()  # a callable's code has no content
        settings = {name: repr(value) for name, value in vars(module).items() if name[0] != "_"}
        arguments = f" ({_words(config.model_arguments)})" if config.model_arguments else ""
        return {
            "model": f"{config.model}{arguments}, {space.size:,} parameters",
            "tensors": fingerprint([*space.names, *(list(shape) for shape in space.shapes)]),
            "checkpoints": str(self.settings.checkpoints),
            "loss": f"{config.loss}, {fingerprint([settings, dict(module.named_buffers())])}",
            "data": f"{config.data}, {objective.num_terms:,} loss terms, {objective.data_fingerprint}",
            "partition": f"{config.partition}, {len(self.partition):,} blocks, "
            f"{fingerprint([*self.partition.labels, self.partition.assignment])}",
            "measures": ", ".join(repr(asked) for asked in self.measures.values()),
            "dtype": str(space.dtype).removeprefix("torch."),
            "seed": str(config.seed),
        }

    @cached_property
    def waiting(self) -> tuple[Checkpoint, ...]:
        """Checkpoints that have not been measured, or have changed since; or the one before, where that matters."""
        return tuple(checkpoint for checkpoint in self.checkpoints if not self._measured(checkpoint))

    def before(self, checkpoint: Checkpoint) -> Checkpoint | None:
        """The checkpoint before this one, if its eigenvectors are to begin with."""
        position = [each.step for each in self.checkpoints].index(checkpoint.step)
        return self.checkpoints[position - 1] if position and "eigenvalues" in self.measures else None

    def origin(self, checkpoint: Checkpoint) -> dict[str, str]:
        """Attributes of a step's file that tell whether it is of these checkpoints."""
        before = self.before(checkpoint)
        return {OWN: checkpoint.fingerprint, BEFORE: "" if before is None else before.fingerprint}

    def save(self, checkpoint: Checkpoint, snapshot: Snapshot) -> None:
        """Write a step's file; a kill at any moment leaves none or all of it."""
        tree = snapshot.to_xarray()
        tree.attrs.update(self.origin(checkpoint))
        save_tree(snapshot_path(self.folder, checkpoint.step), tree)

    def _measured(self, checkpoint: Checkpoint) -> bool:
        path = snapshot_path(self.folder, checkpoint.step)
        if not path.exists():
            return False
        try:
            found = open_tree(path).attrs
        except InputError:
            return False
        return {key: found.get(key) for key in (OWN, BEFORE)} == self.origin(checkpoint)


def prepare_track(config: StudyConfig, base: Path) -> TrackStudy:
    """Load and check everything; relative paths are relative to `base`.

    Raises:
        HesscopeError: whatever does not fit, in one line; nothing has been written then.
    """
    settings = config.track
    if settings.checkpoints is None:
        raise InputError('track needs a folder of checkpoints: checkpoints = "DIR" in the section [track]')
    measures = _measures(config)
    checkpoints = find_checkpoints(base / settings.checkpoints, settings.gaps)
    with loading.importable_from(base):
        model = loading.load_model(config.model, config.model_arguments, None, base)
        for checkpoint in checkpoints:
            loading.require_fits(model, checkpoint.path, loading.tensor_shapes(checkpoint.path))
        rates = {checkpoint.step: _rate(checkpoint, settings) for checkpoint in checkpoints}
        loading.load_checkpoint(model, checkpoints[0].path)
        data = loading.load_data(config.data, config.data_arguments, config.loss, base, (config.model, model))
        objective = Objective(model, loading.load_loss(config.loss), data)
        partition = loading.load_partition(config.partition, model)
    size = objective.parameters.size
    partition.require_fits(size)
    require_measurable(measures, objective)
    if "energies" in measures and config.method != DUAL:
        settle_method(Hessian(objective), len(partition), config.method, config.probes)
    if settings.eigenpairs > size and "eigenpairs" in settings.model_fields_set:
        raise InputError(
            f"track.eigenpairs must be at most the number of parameters, {size:,}, got {settings.eigenpairs:,}"
        )
    study = TrackStudy(config, base, base / config.output, checkpoints, rates, objective, partition, measures)
    require_same_identity(study.folder, study.identity)
    gone = sorted(set(steps_in(study.folder)) - {checkpoint.step for checkpoint in checkpoints})
    if gone:
        raise InputError(
            f"{study.folder} has step {gone[0]}, whose checkpoint is not in {base / settings.checkpoints}: put it back "
            "there, or use another folder"
        )
    return study


def describe_track(study: TrackStudy) -> list[tuple[str, str]]:
    """What is about to be done: (what, how much) lines."""
    objective, settings, waiting = study.objective, study.settings, len(study.waiting)
    space, steps = objective.parameters, [checkpoint.step for checkpoint in study.checkpoints]
    rates = sorted({rate.learning_rate for rate in study.rates.values() if not np.isnan(rate.learning_rate)})
    shown = " to ".join(f"{rate:g}" for rate in dict.fromkeys((rates[0], rates[-1]))) if rates else ""
    lines = [
        ("model", f"{type(objective.model).__name__}, {space.size:,} parameters in {len(space.names)} tensors"),
        (
            "data",
            f"{objective.num_terms:,} loss terms in {objective.num_batches:,} batches, loss {objective.loss.name}",
        ),
        (
            "steps",
            f"{' to '.join(str(step) for step in dict.fromkeys((steps[0], steps[-1])))}, {_counted(len(steps))} in "
            f"{study.base / str(settings.checkpoints)}"
            f"{f'; {waiting} of them to be measured' if 0 < waiting < len(steps) else ''}",
        ),
        ("partition", f"{study.config.partition}: {len(study.partition):,} blocks" if _uses_blocks(study) else ""),
        ("measures", ", ".join(study.measures)),
        ("rate", f"learning rate {shown}" if shown else ""),
        ("notes", "; ".join(objective.notes)),
        *_time(study),
        ("results", str(study.folder)),
    ]
    return [line for line in lines if line[1]]


def run_track(study: TrackStudy, report: Reporter) -> int:
    """Measure; returns how many checkpoints were found measured by an earlier run under the same settings.

    Raises:
        HesscopeError: the loss of a checkpoint is below `optimum` (nothing is written then), or one cannot be measured.
    """
    waiting, total = study.waiting, len(study.checkpoints)
    found = total - len(waiting)
    _require_optimum(study, report)
    _take_up(study)

    def tell() -> None:
        done = found + sum(snapshot_path(study.folder, checkpoint.step).exists() for checkpoint in waiting)
        report(f"{done} of {_counted(total)}", done / total)

    tell()
    processes = min(study.settings.processes, len(waiting))
    if processes > 1:
        threads = max(1, torch.get_num_threads() // processes)
        chunks = [[waiting[k].step for k in chunk] for chunk in np.array_split(np.arange(len(waiting)), processes)]
        run_in_processes(_measure_in_process, [(study.config, study.base, chunk, threads) for chunk in chunks], tell)
    else:
        measure_checkpoints(study, waiting, tell)
    for path in study.folder.glob(f"{VECTORS}*.pt"):  # the last ones are for checkpoints to come
        if path != _kept_path(study, study.checkpoints[-1].step):
            path.unlink()
    report("done", 1.0)
    return found


def track_results(study: TrackStudy) -> Trajectory:
    """What has been measured, in the order of the steps."""
    return open_trajectory(study.folder)


def track_force(study: TrackStudy, trajectory: Trajectory) -> DynamicForce | None:
    """What of the final structure training brought; None without energies at two steps at least."""
    if "energies" not in study.measures or len(trajectory) < 2:
        return None
    return dynamic_force(trajectory, optimum=study.settings.optimum, threshold=study.settings.threshold)


def measure_checkpoints(study: TrackStudy, checkpoints: Sequence[Checkpoint], tell: Callable[[], None]) -> None:
    """Measure some checkpoints in their order, each with its file; `tell` is called after each."""
    last = Before()
    for checkpoint in checkpoints:
        try:
            previous = study.before(checkpoint)
            if previous is not None and last.step != previous.step:
                last = _vectors_at(study, previous)
            loading.load_checkpoint(study.objective.model, checkpoint.path)
            rate = study.rates[checkpoint.step]
            moment = Moment(checkpoint.step, rate.learning_rate, rate.stability_limit)
            snapshot, vectors = measure(
                study.objective, study.partition, study.measures, moment, last, study.config.seed
            )
        except HesscopeError as error:
            raise type(error)(f"step {checkpoint.step} ({checkpoint.path}): {error}") from error
        # In this order, so that a kill between any two leaves what a resumed run needs.
        _keep_vectors(study, checkpoint.step, vectors)
        study.save(checkpoint, snapshot)
        if last.vectors is not None:
            _kept_path(study, last.step).unlink(missing_ok=True)
        last = Before(checkpoint.step, vectors)
        tell()


def _measure_in_process(config: StudyConfig, base: Path, steps: Sequence[int], threads: int) -> None:
    """The part of one of several processes: it loads the study for itself."""
    torch.set_num_threads(threads)
    study = prepare_track(config, base)
    measure_checkpoints(study, [each for each in study.checkpoints if each.step in steps], lambda: None)


def _vectors_at(study: TrackStudy, checkpoint: Checkpoint) -> Before:
    """Top eigenvectors of a checkpoint that was measured before, or will be in another process."""
    path = _kept_path(study, checkpoint.step)
    if path.exists():
        vectors = torch.load(path, map_location=study.objective.parameters.device, weights_only=True)
        return Before(checkpoint.step, vectors)
    loading.load_checkpoint(study.objective.model, checkpoint.path)
    asked = {"eigenvalues": study.measures["eigenvalues"]}
    moment = Moment(checkpoint.step)
    _, vectors = measure(study.objective, study.partition, asked, moment, Before(), study.config.seed)
    return Before(checkpoint.step, vectors)


def _require_optimum(study: TrackStudy, report: Reporter) -> None:
    """Refuse an optimum above the loss of a checkpoint, of which there would be no static and dynamic part.

    The losses are those that are stored, and else take one pass over the data for each checkpoint.
    """
    optimum, waiting = study.settings.optimum, {checkpoint.step for checkpoint in study.waiting}
    safe = optimum <= 0 and study.config.loss in NEVER_NEGATIVE
    if safe or "energies" not in study.measures or len(study.checkpoints) < 2:
        return
    for number, checkpoint in enumerate(study.checkpoints):
        if checkpoint.step in waiting:
            report(f"loss of checkpoint {number + 1} of {len(study.checkpoints)}", 0.0)
            loading.load_checkpoint(study.objective.model, checkpoint.path)
            loss = study.objective.value()
        else:
            loss = Snapshot.from_xarray(open_tree(snapshot_path(study.folder, checkpoint.step))).value
        if loss < optimum:
            found = len(study.checkpoints) - len(waiting)
            raise InputError(
                f"track.optimum must be a number that no loss is below, got {optimum:g}; the loss at step "
                f"{checkpoint.step} is {loss:.6g}"
                f"{f'; what was measured before is kept in {study.folder}' if found else ''}"
            )


# --- a folder with results --------------------------------------------------------------------------------------------


def _take_up(study: TrackStudy) -> None:
    """Make the folder one of this study: what it says of other checkpoints is deleted, learning rates are as told now.

    Raises:
        InputError: a loss is not what it was: the code of the model or the loss has changed.
    """
    study.folder.mkdir(parents=True, exist_ok=True)
    waiting = {checkpoint.step for checkpoint in study.waiting}
    measured = [checkpoint for checkpoint in study.checkpoints if checkpoint.step not in waiting]
    for number, checkpoint in enumerate(measured):
        snapshot = Snapshot.from_xarray(open_tree(snapshot_path(study.folder, checkpoint.step)))
        if number == 0:
            _require_same_loss(study, checkpoint, snapshot)
        rate = study.rates[checkpoint.step]
        stored = Rate(snapshot.learning_rate, snapshot.stability_limit)
        if repr(stored) != repr(rate):  # nan is not equal to itself
            study.save(checkpoint, replace(snapshot, **vars(rate)))
    write_identity(study.folder, study.identity, [])
    for step in waiting:
        snapshot_path(study.folder, step).unlink(missing_ok=True)
        _kept_path(study, step).unlink(missing_ok=True)
    _clear_litter(study)


def _require_same_loss(study: TrackStudy, checkpoint: Checkpoint, snapshot: Snapshot) -> None:
    """The loss stands for what has no content to compare: the code of the model and of a loss callable."""
    loading.load_checkpoint(study.objective.model, checkpoint.path)
    there, here = snapshot.value, study.objective.value()
    if abs(there - here) > SAME_LOSS * abs(there):
        raise InputError(
            f"step {checkpoint.step} was measured in {study.folder} at a loss of {there:.6g}, here it is {here:.6g}: "
            "the model's or the loss's code has changed; use another folder"
        )


def _kept_path(study: TrackStudy, step: int) -> Path:
    return study.folder / f"{VECTORS}{step}.pt"


def _keep_vectors(study: TrackStudy, step: int, vectors: Tensor | None) -> None:
    if vectors is not None:
        with atomic_path(_kept_path(study, step)) as temporary:
            torch.save(vectors.cpu(), temporary)


def _clear_litter(study: TrackStudy) -> None:
    """Delete what killed runs have left half-written."""
    for path in study.folder.glob(f".*{TEMPORARY_SUFFIX}"):
        path.unlink(missing_ok=True)


# --- settings ---------------------------------------------------------------------------------------------------------


def _measures(config: StudyConfig) -> dict[str, Measure]:
    """The measures that are asked for, as the study's other keys say how."""
    told: dict[str, Measure] = {
        "energies": Energies(method=config.method, probes=config.probes),
        "eigenvalues": Eigenvalues(k=config.track.eigenpairs),
    }
    names = config.track.measures
    try:
        checked_measures(names)
    except InputError as error:
        raise InputError(f"track.measures: {error}") from error
    return {name: told.get(name) or MEASURES[name]() for name in MEASURES if name in names}


def _rate(checkpoint: Checkpoint, settings: TrackConfig) -> Rate:
    """The learning rate that was told, or what the optimizer's state says."""
    if settings.learning_rate is not None:
        return Rate(settings.learning_rate, 2 / settings.learning_rate)
    groups = [] if checkpoint.optimizer is None else loading.optimizer_groups(checkpoint.optimizer)
    if not groups:
        return Rate()
    rate = learning_rate(SimpleNamespace(param_groups=groups))
    sgd = torch.optim.SGD([torch.zeros(1)], lr=rate if rate > 0 else 0.0)
    if any(set(SGD_KEYS) - set(group) or set(group) - {*sgd.defaults, *USUAL_KEYS} for group in groups):
        return Rate(rate)
    sgd.param_groups = [sgd.defaults | group for group in groups]
    return Rate(rate, stability_limit(sgd, rate))


def _words(arguments: Mapping[str, object]) -> str:
    return ", ".join(f"{name} = {value!r}" for name, value in arguments.items())


def _uses_blocks(study: TrackStudy) -> bool:
    return bool({"energies", "heterogeneity"} & set(study.measures))


# --- the plan ---------------------------------------------------------------------------------------------------------


def _time(study: TrackStudy) -> list[tuple[str, str]]:
    """Lines on how long measuring will take, and on processes that it is too short for."""
    waiting = len(study.waiting)
    if not waiting:
        return [("time", "everything is measured; only the page is written again")]
    processes = min(study.settings.processes, waiting)
    seconds, words = _cost(study)
    many = f" in {processes} processes" if processes > 1 else ""
    about = f"about {human_seconds(seconds * waiting / processes)} to measure {_counted(waiting)}{many}"
    lines = [("time", f"{about}, start-up and page apart ({words})")]
    if processes > 1 and seconds * waiting < TOO_SHORT:
        lines.append(("processes", "more than 1 may not pay: each takes seconds to load PyTorch and the study"))
    return lines


def _counted(number: int) -> str:
    return f"{number} checkpoint{'s' if number != 1 else ''}"


def _cost(study: TrackStudy) -> tuple[float, str]:
    """Seconds that a checkpoint takes where nothing is hard, from a timed product, and how they come about."""
    hessian = Hessian(study.objective)
    size, others = hessian.shape[0], set(study.measures) - {"energies"}
    made = hessian.has_closed_form and size <= DENSE_SIZE and bool(others)
    seconds, words, products, formula = 0.0, [], 0, False
    for name, asked in study.measures.items():
        if isinstance(asked, Energies):
            own = _energy_products(study, hessian, asked)
            products, formula = products + own, own == 0
        elif not made:
            products += _products(name, asked, size, len(study.partition))
    if made:
        start = time.perf_counter()
        _ = hessian.dense().sum().item()
        seconds += time.perf_counter() - start
        words.append(f"the Hessian made once for each, {1000 * seconds:.3g} ms")
    if products:
        V = torch.zeros(size, min(hessian.columns_per_pass, 8), dtype=hessian.dtype, device=hessian.device)
        _ = hessian @ V  # the first one is slower
        start = time.perf_counter()
        _ = (hessian @ V).sum().item()
        product = (time.perf_counter() - start) / V.shape[1]
        seconds += product * products
        words.append(f"{products:,} products of {1000 * product:.3g} ms for each")
    if formula:
        words.append("not counted: energies without products")
    return seconds, "; ".join(words)


def _energy_products(study: TrackStudy, hessian: Hessian, asked: Energies) -> int:
    """Products that energies of H, G and R take; to a tolerance, each of them on its own. 0 for other ways."""
    if asked.method == DUAL:
        return 0
    method = settle_method(hessian, len(study.partition), asked.method, asked.probes)
    if not isinstance(study.objective.loss, OutputLoss):
        return method.products
    return method.products * (3 if method.name == "probes" and asked.probes is None else 2)


def _products(name: str, asked: Measure, size: int, blocks: int) -> int:
    if isinstance(asked, Eigenvalues):
        return min(2 * size, 2 * TYPICAL_END + TYPICAL_PAIR * (asked.k + asked.smallest))
    if isinstance(asked, Density):
        return asked.probes * asked.steps
    if isinstance(asked, Heterogeneity):
        return asked.probes * asked.steps * min(blocks, BLOCKS_COMPARED)
    return size if isinstance(asked, Heatmap) else TYPICAL_ESTIMATE
