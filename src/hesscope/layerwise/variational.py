"""Posteriors by optimization: shifts and variances along fixed or refreshed axes, by the bound's gradient ([DR], [W]).

Each step takes the bound's own derivatives by the risk and by the divergence at their current values, and follows them
on one batch. The risk's surrogate integrates the last layer's draws out where outputs can be drawn
(`error_probability`), else it is the cross-entropy in bits ([DR]). Prior variances need no gradient: the best is known.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, replace
from math import ceil, cos, log, pi, sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hesscope.bounds import VarianceGrid, kl_inverse
from hesscope.core.errors import InputError
from hesscope.core.files import atomic_path
from hesscope.core.rng import permutation, stream
from hesscope.layerwise.gaussians import Axes, GroupPosterior, Posterior, generator_of
from hesscope.layerwise.reparametrized import error_probability, reparametrized
from hesscope.layerwise.risk import Risk
from hesscope.objective import Objective
from hesscope.objective.pieces import chosen, count_samples

# Step length of Adam: of logarithms of deviations, and of shifts in units of the prior's deviation; falls to 0.
RATE = 0.01
# A batch is this share of the samples, within these limits.
BATCH_SHARE, LEAST_BATCH, MOST_BATCH = 1 / 64, 64, 512
# A bound is made after each of so many rounds.
ROUNDS = 10
# Rounds after which the axes are refreshed, if they are.
REFRESHED = (2, 4, 6)
# Weight of a batch in the running mean of the risk.
MEMORY = 0.02


@dataclass(frozen=True, eq=False)
class Optimization:
    """What is to be optimized.

    Attributes:
        objective, risk: what is bounded, n: on so many samples; local: whether outputs can be drawn (`is_local`).
        nats: cost of confidence and grid, beside the divergence; steps: planned; seed: of batches and draws.
        refresh: posterior -> its new axes by group, None to keep them.
        settings: all that the steps depend on, as words; a state of other settings is not taken up.
    """

    objective: Objective
    risk: Risk
    n: int
    local: bool
    grid: VarianceGrid
    nats: float
    steps: int
    seed: int
    refresh: Callable[[Posterior], dict[str, Axes]] | None
    settings: str


@dataclass(frozen=True, eq=False)
class Round:
    """Where an optimization stands: a posterior with prior variances of the grid, and the steps behind it."""

    posterior: Posterior
    steps: int


def optimized(
    asked: Optimization,
    start: Posterior,
    risk: float,
    seconds: float | None,
    state: Path | None,
    on_step: Callable[[int], None],
    on_round: Callable[[Round], None],
) -> Round:
    """Optimize from `start`, whose risk on the samples is `risk`, until the steps or the seconds are over.

    A state file is written after every round; from it a call with equal settings goes on, to the same numbers. Where
    something is no longer finite, the last round is what there is.
    """
    began = time.perf_counter()
    run = _Run(asked, start, risk)
    if state is not None and state.exists():
        run.load(state)
    length = ceil(asked.steps / ROUNDS)
    late, last = False, Round(run.posterior(), run.step)
    while run.step < asked.steps and not late:
        with closing(run.batches()) as batches:
            for index, batch in batches:
                if not run.advance(index, batch):
                    return last
                on_step(run.step)
                late = seconds is not None and time.perf_counter() - began > seconds
                if late or run.step % length == 0 or run.step == asked.steps:
                    break
        if run.step % length == 0 and run.step < asked.steps:
            if asked.refresh is not None and run.step // length in REFRESHED:
                run.turn(asked.refresh(run.posterior()))
            if state is not None:
                run.save(state)
            last = Round(run.posterior(), run.step)
            on_round(last)
    if state is not None:
        run.save(state)
    return Round(run.posterior(), run.step)


class _Run:
    """Variables of an optimization: shifts and logarithms of deviations, those of Adam, and the running risk."""

    def __init__(self, asked: Optimization, start: Posterior, risk: float) -> None:
        self.asked, self.start = asked, start
        self.prior = start.prior_mean()
        self.step, self.risk = 0, risk
        self.axes = [each.axes for each in start.groups]
        self.shifts = [each.shift.clone().requires_grad_() for each in start.groups]
        self.logs = [(each.variance.log() / 2).requires_grad_() for each in start.groups]
        self.adam = self._new_adam()
        size = min(max(round(asked.n * BATCH_SHARE), LEAST_BATCH), MOST_BATCH)
        with asked.objective.evaluating() as (_, batches):
            self.parts = [ceil(count_samples(batch) / size) for _, batch in batches]

    def batches(self) -> Generator[tuple[int, Any]]:
        """The rest of this pass over the data: every batch in a random order of its samples, cut into nearly equal."""
        epoch, behind = divmod(self.step, sum(self.parts))
        with self.asked.objective.evaluating() as (_, batches):
            for (index, batch), parts in zip(batches, self.parts, strict=True):
                order = permutation(count_samples(batch), stream(self.asked.seed, "bound", "order", epoch, index))
                for part in order.tensor_split(parts)[behind:]:
                    yield index, chosen(batch, part)
                behind = max(0, behind - parts)

    def advance(self, index: int, batch: Any) -> bool:
        """One step of Adam on a batch; False, and no step, if something is no longer finite."""
        asked = self.asked
        generator = generator_of(stream(asked.seed, "bound", "step", self.step), self.prior.device)
        for options, scale in zip(self.adam.param_groups, self._scales, strict=True):
            options["lr"] = RATE * scale * (1 + cos(pi * self.step / asked.steps)) / 2
        self.adam.zero_grad()
        loss, divergence = self._loss(index, batch, generator), self._divergence()
        if not bool((loss + divergence).isfinite()):
            return False
        self.risk += MEMORY * (float(loss.detach()) - self.risk)
        by_risk, by_cost = bound_slopes(self.risk, (float(divergence.detach()) + asked.nats) / asked.n, asked.n)
        # In units of the divergence: near a bound of 1 both slopes are too small for Adam.
        (by_risk / by_cost * asked.n * loss + divergence).backward()  # type: ignore[no-untyped-call]
        self.adam.step()
        self.step += 1
        return True

    def posterior(self) -> Posterior:
        """The present one, with the best prior variances of the grid."""
        groups = tuple(
            replace(each, shift=each.shift.detach().clone(), variance=each.variance.detach().clone())
            for each in self._groups()
        )
        return replace(self.start, groups=groups).with_best_priors(self.asked.grid)

    def turn(self, axes: dict[str, Axes]) -> None:
        """Go on in other axes; Adam begins anew."""
        turned = [each.turned(axes[each.group.name]) for each in self.posterior().groups]
        logs = [each.variance.log() / 2 for each in turned]
        self._set([each.axes for each in turned], [each.shift for each in turned], logs)

    def save(self, path: Path) -> None:
        """Write everything to a file."""
        state = {
            "settings": self.asked.settings,
            "step": self.step,
            "risk": self.risk,
            "axes": [(each.left, each.right) for each in self.axes],
            "shifts": [each.detach() for each in self.shifts],
            "logs": [each.detach() for each in self.logs],
            "adam": self.adam.state_dict(),
        }
        with atomic_path(path) as temporary:
            torch.save(state, temporary)

    def load(self, path: Path) -> None:
        """Go on from a file, unless it is of other settings.

        Raises:
            InputError: it is no such file.
        """
        try:
            state = torch.load(path, map_location=self.prior.device, weights_only=True)
            others = state["settings"] != self.asked.settings
            axes = [Axes(left, right) for left, right in state["axes"]]
            shifts, logs, adam = state["shifts"], state["logs"], state["adam"]
            step, risk = int(state["step"]), float(state["risk"])
        except Exception as error:  # it would be overwritten
            raise InputError(
                f"state = {path} is not the state of an optimization: delete it or name another file"
            ) from error
        if others:
            return
        self._set(axes, shifts, logs)
        self.adam.load_state_dict(adam)
        self.step, self.risk = step, risk

    def _set(self, axes: list[Axes], shifts: list[Tensor], logs: list[Tensor]) -> None:
        self.axes = axes
        self.shifts, self.logs = ([each.clone().requires_grad_() for each in some] for some in (shifts, logs))
        self.adam = self._new_adam()

    @property
    def _scales(self) -> list[float]:
        """Step lengths relative to RATE: the prior's deviations for shifts, 1 for logarithms."""
        return [*(sqrt(each.prior_variance) for each in self.start.groups), *[1.0] * len(self.logs)]

    def _new_adam(self) -> torch.optim.Adam:
        return torch.optim.Adam([{"params": [each]} for each in (*self.shifts, *self.logs)])

    def _groups(self) -> tuple[GroupPosterior, ...]:
        """With graphs back to the variables."""
        found = zip(self.start.groups, self.axes, self.shifts, self.logs, strict=True)
        return tuple(replace(each, axes=axes, shift=s, variance=(2 * log).exp()) for each, axes, s, log in found)

    def _loss(self, index: int, batch: Any, generator: torch.Generator) -> Tensor:
        objective, risk, groups = self.asked.objective, self.asked.risk, self._groups()
        if not self.asked.local:
            theta = replace(self.start, groups=groups).draw(generator)
            return risk.surrogate(objective, *objective.outputs_and_targets(theta, batch, index))
        with reparametrized(objective, groups, generator) as drawn:
            outputs, targets = objective.outputs_and_targets(self.prior, batch, index)
        last = next((each for each in drawn if each.made is outputs), None)
        if last is not None and risk.loss_bound is None:
            return error_probability(last, targets)
        return risk.surrogate(objective, outputs, targets)

    def _divergence(self) -> Tensor:
        """KL with the best prior variances of all positive numbers: that of each group is its mean second moment."""
        parts = [
            shift.numel() * (shift.square() + (2 * log).exp()).mean().log() / 2 - log.sum()
            for shift, log in zip(self.shifts, self.logs, strict=True)
        ]
        return torch.stack(parts).sum()


def bound_slopes(risk: float, cost: float, n: int) -> tuple[float, float]:
    """Derivatives of p = kl_inverse(risk, cost) by the risk and by the cost; n: keeps both finite at no risk."""
    risk = min(max(risk, 0.1 / n), 0.9)
    p = kl_inverse(risk, cost)
    wrong, right = risk / p, (1 - risk) / max(1 - p, 1e-12)
    return (log(right) - log(wrong)) / (right - wrong), 1 / (right - wrong)
