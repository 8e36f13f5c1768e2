"""PAC-Bayes bounds of trained networks, with posteriors along the axes of the layer-wise Hessians ([W]; MATH.md, 6)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hesscope._version import __version__
from hesscope.bounds import (
    DEFAULT_GRID,
    Certificate,
    VarianceGrid,
    confidence_cost,
    maurer_bound,
    require_enough_samples,
)
from hesscope.core.checks import require_choice, require_positive_int
from hesscope.core.errors import InputError
from hesscope.core.records import Provenance
from hesscope.core.rng import stream
from hesscope.layerwise import laplace
from hesscope.layerwise.axes import curvature_along, groups_of, kronecker_axes
from hesscope.layerwise.bound_record import PacBayesBound, Spread
from hesscope.layerwise.gaussians import Axes, Group, GroupPosterior, Posterior, generator_of
from hesscope.layerwise.gibbs import DrawnRisk, default_draws, draw_risk, engine
from hesscope.layerwise.prior import prior_vector
from hesscope.layerwise.reparametrized import is_local
from hesscope.layerwise.risk import Risk, require_risk, risks_of_network
from hesscope.layerwise.variational import Optimization, Round, optimized
from hesscope.objective import Objective
from hesscope.objective.batches import fingerprint
from hesscope.objective.objective import require_output_loss

POSTERIORS = (
    "isotropic",
    "diagonal",
    "diagonal_optimized",
    "kronecker",
    "kronecker_optimized",
    "kronecker_refreshed",
)
OPTIMIZED = ("diagonal_optimized", "kronecker_optimized", "kronecker_refreshed")

# Share of delta for the Monte Carlo error of the risk.
MONTE_CARLO_SHARE = 0.2
# Draws that only choose among posteriors, and those of bounds on the way: of samples' own networks, of whole networks.
CHOOSING_DRAWS = {True: 5_000, False: 16}
# Samples that are looked at to choose, and networks at which curvature is found again, for so many samples together.
CHOOSING_SAMPLES, MOST_NETWORKS = 5_000, 4
# Samples that take about as long to pass through the network as a step of optimization, for the progress.
SAMPLES_A_STEP = 1500
# Axes of a group that are kept for the record.
AXES_KEPT = 1000

# Called with (done, planned, bound): the present bound is valid, but None before the first.
Progress = Callable[[int, int, float | None], None]


def pac_bayes_bound(
    objective: Objective,
    prior: Any,
    posterior: str = "kronecker",
    delta: float = 0.05,
    *,
    loss_bound: float | None = None,
    grid: VarianceGrid = DEFAULT_GRID,
    draws: int | None = None,
    steps: int = 4000,
    seconds: float | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    on_round: Callable[[PacBayesBound], None] | None = None,
    state: str | Path | None = None,
) -> PacBayesBound:
    """Upper bound, with probability 1 - delta, of the risk on new data of networks drawn around a trained one.

    The bound is about the Gibbs classifier, which draws a network from the posterior for every input, not about the
    trained network itself. It holds if the objective's samples are independent draws from the distribution that new
    data comes from, and if nothing but the network's trained parameters has seen them: not the prior, and not a
    preprocessing of the inputs.

    Args:
        objective: the trained network with its loss and the n samples it was trained on.
        prior: mean of the prior N(prior, variance I): the network before training (a module, a state dict, or a
            vector [P]). The variance of each layer is chosen from the grid, which is paid for.
        posterior: a normal distribution, by layer:
            "isotropic": one variance for each layer;
            "diagonal": independent parameters, variances in closed form from the loss's curvature (see `laplace`);
            "diagonal_optimized": the same, mean and variances optimized for the bound ([DR]);
            "kronecker": diagonal in the Kronecker eigenbasis of the layer's Hessian, in closed form ([W]);
            "kronecker_optimized": the same, optimized;
            "kronecker_refreshed": the same, and the basis is made anew three times on the way.
            Tensors without Kronecker factors are diagonal in any case; `fallback` names them.
        delta: probability with which the bound may fail; a fifth of it pays for the Monte Carlo error.
        loss_bound: B, for a bound of min(loss, B) / B in place of the classification error; needed for other losses.
        grid: prior variances to choose from.
        draws: independent draws for the risk of the posterior on the samples; 100,000 where each sample can have a
            network of its own (fully connected networks), else 300 networks, unless told.
        steps: of optimization; seconds: after which it ends, however far it is.
        seed: of all draws and of the order of samples.
        progress: called with (done, planned, bound): the present bound, valid, or None before the first.
        on_round: called with a PacBayesBound after each tenth of an optimization; each holds by itself.
        state: file in which an optimization is kept, and from which a call with equal arguments goes on; one of other
            arguments begins anew in it.

    Raises:
        InputError: a prior that depends on the data or does not fit, a delta outside (0, 1), too few samples for the
            grid, a loss that is not in [0, 1] without `loss_bound`, an unknown posterior.
        DataError: samples without exactly one label each, or that depend on each other.
    """
    began = time.perf_counter()
    asked = _asked(objective, prior, posterior, delta, loss_bound, grid, draws, steps, seconds, seed, state)
    report = _Reports(asked, progress)
    axes = kronecker_axes(objective, asked.groups) if posterior.startswith("kronecker") else _parameter_axes(asked)
    curvature = _curvature(asked, objective, axes)
    local = is_local(objective, _at_strength(asked, axes, curvature, 1.0))

    def roughly(found: Posterior) -> float:
        """Its risk, with equal draws for all, so that differences are of the posteriors."""
        few, share = CHOOSING_DRAWS[local], min(1.0, CHOOSING_SAMPLES / asked.n)
        return draw_risk(objective, found, asked.risk, few, local, seed, "choosing", share=share).mean

    best = laplace.best_posterior(
        lambda along, strength: _at_strength(asked, axes, along, strength),
        lambda found: _maurer(asked, found, roughly(found)),
        curvature,
        lambda found, number: _felt(asked, axes, found, number),
        report.looked,
    )

    def finished(now: Round, count: int) -> PacBayesBound:
        drawn = draw_risk(objective, now.posterior, asked.risk, count, local, seed, "certificate", posterior, now.steps)
        along = best.curvature
        if posterior == "kronecker_refreshed" and now.steps:
            along = _felt(asked, now.posterior.axes(), now.posterior, laplace.SOUNDINGS)
        return _record(asked, now, drawn, along, local, time.perf_counter() - began)

    final = Round(best.posterior, 0)
    if posterior in OPTIMIZED:

        def after_round(now: Round) -> None:
            found = finished(now, CHOOSING_DRAWS[local])
            report.bound = found.bound
            if on_round is not None:
                on_round(found)

        final = optimized(
            Optimization(
                objective,
                asked.risk,
                asked.n,
                local,
                grid,
                grid.cost(len(asked.groups)) + confidence_cost(asked.n, asked.delta_pac_bayes),
                steps,
                seed,
                _refresher(asked) if posterior == "kronecker_refreshed" else None,
                asked.settings,
            ),
            best.posterior,
            roughly(best.posterior),
            seconds,
            None if state is None else Path(state),
            report.stepped,
            after_round,
        )
    result = finished(final, draws or default_draws(local))
    report.done(result.bound)
    return result


@dataclass(frozen=True, eq=False)
class _Asked:
    """The checked arguments, and what is known of the network before any posterior."""

    objective: Objective
    risk: Risk
    network_risk: float
    prior_risk: float
    n: int
    classes: int | None
    means: tuple[Tensor, Tensor]
    groups: list[Group]
    fallback: Mapping[str, str]
    posterior: str
    delta: float
    grid: VarianceGrid
    steps: int
    seed: int
    settings: str

    @property
    def delta_monte_carlo(self) -> float:
        return MONTE_CARLO_SHARE * self.delta

    @property
    def delta_pac_bayes(self) -> float:
        return self.delta - self.delta_monte_carlo


def _asked(
    objective: Objective,
    prior: Any,
    posterior: str,
    delta: float,
    loss_bound: float | None,
    grid: VarianceGrid,
    draws: int | None,
    steps: int,
    seconds: float | None,
    seed: Any,
    state: Any,
) -> _Asked:
    if not isinstance(objective, Objective):
        raise InputError(f"objective must be a hesscope.Objective, got {type(objective).__name__}")
    require_choice("posterior", posterior, POSTERIORS)
    if isinstance(delta, bool) or not isinstance(delta, (int, float, np.floating)) or not 0 < delta < 1:
        raise InputError(f"delta must lie in (0, 1), the probability with which the bound may fail, got {delta!r}")
    if not isinstance(grid, VarianceGrid):
        raise InputError(f"grid must be a hesscope.bounds.VarianceGrid, got {type(grid).__name__}")
    require_positive_int("steps", steps)
    if draws is not None:
        require_positive_int("draws", draws)
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise InputError(f"seed must be an integer, got {seed!r}")
    if state is not None and (not isinstance(state, (str, Path)) or Path(state).is_dir()):
        raise InputError(f"state must be the path of a file, got {state!r}")
    if seconds is not None and (not isinstance(seconds, (int, float)) or isinstance(seconds, bool) or not seconds > 0):
        raise InputError(f"seconds must be a positive number, got {seconds!r}")
    risk = require_risk(objective, loss_bound)
    if isinstance(require_output_loss(objective, "a bound").module, nn.NLLLoss):
        raise InputError(
            "the loss NLLLoss is linear in the outputs, so that it shows no curvature: pass 'cross_entropy' for the "
            "same network, which is the same loss, as log-probabilities are logits, too"
        )
    start = prior_vector(objective, prior)
    trained = _trained(objective)
    network_risk, n = risks_of_network(objective, risk)
    groups, fallback = groups_of(objective)
    outputs = first_outputs(objective)
    classes = int(outputs.shape[1]) if loss_bound is None else None
    if classes == 1:
        raise InputError("a network with one output classifies nothing: its classification error is always 0")
    share = 1 - MONTE_CARLO_SHARE
    require_enough_samples(n, share * delta, len(groups), grid, 0.5 if classes is None else 1 - 1 / classes)
    settings = (__version__, posterior, objective.data_fingerprint, objective.loss.name, loss_bound, grid.values)
    return _Asked(
        objective,
        risk,
        network_risk,
        risks_of_network(objective, risk, start)[0],
        n,
        classes,
        (start, trained),
        groups,
        fallback if posterior.startswith("kronecker") else {},
        posterior,
        delta,
        grid,
        steps,
        int(seed),
        fingerprint((*map(str, settings), delta, steps, seed, start, trained, _weights(objective), outputs)),
    )


def _weights(objective: Objective) -> Tensor | None:
    """Class weights: the curvature along the axes depends on them."""
    return getattr(require_output_loss(objective, "the bound").module, "weight", None)


def _trained(objective: Objective) -> Tensor:
    with objective.evaluating() as (theta, _):
        return theta.detach().clone()


def first_outputs(objective: Objective) -> Tensor:
    """Outputs of the trained network on the first batch."""
    with objective.evaluating() as (theta, batches), torch.no_grad():
        index, batch = next(iter(batches))
        return objective.outputs_and_targets(theta, batch, index)[0]


def _parameter_axes(asked: _Asked) -> dict[str, Axes]:
    return {group.name: Axes() for group in asked.groups}


def _curvature(asked: _Asked, objective: Objective, axes: Mapping[str, Axes]) -> dict[str, Tensor]:
    """Along the axes, at a network; of isotropic posteriors the mean over each group."""
    found = curvature_along(objective, asked.groups, axes, asked.seed)
    return laplace.isotropic(found) if asked.posterior == "isotropic" else found


def _felt(asked: _Asked, axes: Mapping[str, Axes], posterior: Posterior, number: int) -> dict[str, Tensor]:
    """Mean curvature along the axes at networks drawn from the posterior: of few samples at several."""
    objective = asked.objective
    generator = generator_of(stream(asked.seed, "felt", number), objective.parameters.device)
    count = min(MOST_NETWORKS, ceil(CHOOSING_SAMPLES / asked.n))
    networks = [objective.at(posterior.draw(generator)) for _ in range(count)]
    found = [_curvature(asked, network, axes) for network in networks]
    return {group.name: torch.stack([each[group.name] for each in found]).mean(0) for group in asked.groups}


def _refresher(asked: _Asked) -> Callable[[Posterior], dict[str, Axes]]:
    """Posterior -> Kronecker eigenbasis at its mean."""
    return lambda posterior: kronecker_axes(asked.objective.at(posterior.mean()), asked.groups)


def _at_strength(
    asked: _Asked, axes: Mapping[str, Axes], curvature: Mapping[str, Tensor], strength: float
) -> Posterior:
    space, n = asked.objective.parameters, asked.n
    return laplace.laplace_posterior(
        asked.posterior, space, asked.groups, axes, asked.means, curvature, strength * n, asked.grid
    )


def _maurer(asked: _Asked, posterior: Posterior, risk: float) -> float:
    kl = sum(each.total for each in posterior.divergences().values())
    return maurer_bound(risk, kl + asked.grid.cost(len(asked.groups)), asked.n, asked.delta_pac_bayes)


def _record(
    asked: _Asked, now: Round, drawn: DrawnRisk, curvature: Mapping[str, Tensor], local: bool, seconds: float
) -> PacBayesBound:
    space = asked.objective.parameters
    made = Provenance(
        engine=f"PAC-Bayes, {asked.posterior}, {engine(local)}",
        dtype=str(space.dtype).removeprefix("torch."),
        device=str(space.device),
        data_fingerprint=asked.objective.data_fingerprint,
        seed=asked.seed,
    )
    certificate = Certificate(
        empirical_risk=drawn.mean,
        draws=drawn.draws,
        risk_stderr=drawn.stderr,
        n=asked.n,
        kl_by_group=now.posterior.divergences(),
        prior_variances={each.group.name: each.prior_variance for each in now.posterior.groups},
        grid_size=len(asked.grid),
        delta=asked.delta,
        delta_monte_carlo=asked.delta_monte_carlo,
        classes=asked.classes,
        provenance=made,
    )
    return PacBayesBound(
        certificate=certificate,
        posterior=asked.posterior,
        risk=asked.risk.words,
        network_risk=asked.network_risk,
        prior_risk=asked.prior_risk,
        fallback=asked.fallback,
        spreads=tuple(_spread(each, curvature[each.group.name]) for each in now.posterior.groups),
        steps=now.steps,
        planned_steps=asked.steps if asked.posterior in OPTIMIZED else 0,
        seconds=seconds,
        provenance=made,
        distribution=now.posterior,
    )


def _spread(each: GroupPosterior, curvature: Tensor) -> Spread:
    values = curvature.flatten().cpu().numpy()
    order = np.argsort(values, kind="stable")
    if len(order) > AXES_KEPT:
        order = order[np.linspace(0, len(order) - 1, AXES_KEPT).round().astype(int)]
    deviation = each.variance.double().sqrt().flatten().cpu().numpy()
    return Spread(
        each.group.name,
        each.axes.name,
        values[order],
        deviation[order],
        each.variance.numel(),
        each.prior_variance**0.5,
    )


class _Reports:
    """Counts what is done, in steps of optimization, and knows the present bound."""

    def __init__(self, asked: _Asked, progress: Progress | None) -> None:
        self._progress = progress
        self._look = ceil(min(asked.n, CHOOSING_SAMPLES) / SAMPLES_A_STEP)
        self._looks = self._look * laplace.LOOKS
        self._planned = self._looks + (asked.steps if asked.posterior in OPTIMIZED else 0)
        self.bound: float | None = None

    def looked(self, done: int) -> None:
        self._tell(done * self._look)

    def stepped(self, step: int) -> None:
        self._tell(self._looks + step)

    def done(self, bound: float) -> None:
        self.bound = bound
        self._tell(self._planned)

    def _tell(self, done: int) -> None:
        if self._progress is not None:
            self._progress(done, self._planned, self.bound)
