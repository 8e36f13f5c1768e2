"""Posteriors in closed form: the minimizer of a quadratic model of the loss plus the divergence (MATH.md, section 6).

Along an axis with curvature h, on which training has moved the network by d, minimize over the mean and the variance of
a normal distribution strength * h/2 * E(w - d)^2 + KL( . || N(0, prior)). With a = strength * h the minimum is at the
variance 1 / (a + 1/prior) ([W]) and the mean d a prior / (1 + a prior): what flat directions have gained by training is
given up, since it is not worth its divergence. At strength n this is Laplace's approximation of the Bayesian posterior;
other strengths are tried, too, and the curvature that the posterior's own networks feel (`best_posterior`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hesscope.bounds import VarianceGrid
from hesscope.core.vectors import ParameterSpace
from hesscope.layerwise.gaussians import Axes, Group, GroupPosterior, Posterior

# Strengths in units of the number of samples: first these, a factor of 4 apart, then finer about the best.
STRENGTHS = tuple(4.0**power for power in range(-3, 7))
FINER = (2.0**-1.5, 2.0**-1, 2.0**-0.5, 2.0**0.5, 2.0**1, 2.0**1.5)

# Times that the curvature is found again at networks drawn from the posterior; posteriors looked at in all.
SOUNDINGS = 3
LOOKS = (SOUNDINGS + 1) * (len(STRENGTHS) + len(FINER))

# The grid's variances are tried so many apart, the last time one by one.
APART = (81, 27, 9, 3, 1)


def isotropic(curvature: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each group's mean curvature, along all of its axes."""
    return {name: torch.full_like(values, float(values.mean())) for name, values in curvature.items()}


def laplace_posterior(
    kind: str,
    space: ParameterSpace,
    groups: Sequence[Group],
    axes: Mapping[str, Axes],
    means: tuple[Tensor, Tensor],
    curvature: Mapping[str, Tensor],
    strength: float,
    grid: VarianceGrid,
) -> Posterior:
    """The minimizer at one strength, with the best prior variance of each group.

    Args:
        kind: name of the posterior; groups, axes, curvature: as of `curvature_along`.
        means: vectors [P] of the prior's mean and of the trained network.
        strength: weight of the loss beside the divergence, number of samples times a factor.
    """
    prior, trained = (space.unflatten(vector.to(space.dtype)) for vector in means)
    found = []
    for group in groups:
        own, start = axes[group.name], group.matrix(prior)
        moved = own.coordinates((group.matrix(trained) - start).double()).cpu()
        stiffness = strength * curvature[group.name]
        variance = _best_prior(stiffness, moved, grid)
        kept = stiffness * variance / (1 + stiffness * variance)
        found.append(
            GroupPosterior(
                group,
                own,
                start,
                (moved * kept).to(start),
                (variance / (1 + stiffness * variance)).to(start),
                variance,
            )
        )
    return Posterior(kind, space, tuple(found)).with_best_priors(grid)


@dataclass(frozen=True, eq=False)
class Found:
    """A posterior, the curvature and the strength that it was made of, and its bound (from few draws)."""

    posterior: Posterior
    curvature: Mapping[str, Tensor]
    strength: float
    bound: float


def best_posterior(
    make: Callable[[Mapping[str, Tensor], float], Posterior],
    bound_of: Callable[[Posterior], float],
    curvature: Mapping[str, Tensor],
    felt: Callable[[Posterior, int], Mapping[str, Tensor]],
    progress: Callable[[int], None],
) -> Found:
    """The posterior of the smallest bound, over strengths and over curvatures.

    A network that fits its samples has next to no curvature left, while the posterior of a smallest bound has the
    precision n E[curvature] + 1/prior, the mean being over its own networks. So the curvature is found again at
    networks drawn from the best posterior so far, SOUNDINGS times.

    Args:
        make: (curvature, strength in units of the number of samples) -> posterior; bound_of: its bound.
        curvature: of the trained network; felt: (posterior, number of the time) -> mean over networks drawn from it.
        progress: called with the number of posteriors looked at, of LOOKS.
    """
    looked: list[Found] = []

    def least(curvature: Mapping[str, Tensor], strengths: Sequence[float]) -> Found:
        for strength in strengths:
            posterior = make(curvature, strength)
            looked.append(Found(posterior, curvature, strength, bound_of(posterior)))
            progress(len(looked))
        return min((each for each in looked if each.curvature is curvature), key=lambda each: each.bound)

    for number in range(SOUNDINGS + 1):
        coarse = least(curvature, STRENGTHS)
        fine = least(curvature, [coarse.strength * factor for factor in FINER])
        if number < SOUNDINGS:
            curvature = felt(fine.posterior, number)
    return min(looked, key=lambda each: each.bound)


def _best_prior(stiffness: Tensor, moved: Tensor, grid: VarianceGrid) -> float:
    """The prior variance with the least minimum, 1/2 sum ln(1 + a v) + a d^2 / (1 + a v)."""

    def cost(index: int) -> float:
        ratio = 1 + stiffness * grid.values[index]
        return float((ratio.log() + stiffness * moved.square() / ratio).sum())

    tried: dict[int, float] = {}
    candidates = range(0, len(grid), APART[0])
    for step, finer in zip(APART, (*APART[1:], 0), strict=True):
        tried |= {index: cost(index) for index in candidates if index not in tried}
        best = min(tried, key=lambda index: tried[index])
        candidates = range(max(0, best - step + finer), min(len(grid), best + step), max(finer, 1))
    return grid.values[best]
