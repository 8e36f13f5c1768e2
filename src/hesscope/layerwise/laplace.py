"""Posteriors in closed form: the minimizer of a quadratic model of the loss plus the divergence (MATH.md, section 6).

Along an axis with curvature h, on which training has moved the network by d, minimize over the mean and the variance of
a normal distribution strength * h/2 * E(w - d)^2 + KL( . || N(0, prior)). With a = strength * h the minimum is at the
variance 1 / (a + 1/prior) ([W]) and the mean d a prior / (1 + a prior): what flat directions have gained by training is
given up, since it is not worth its divergence. At strength n this is Laplace's approximation of the Bayesian posterior;
a network that fits its samples has less curvature than its neighbours, and a larger strength makes up for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from hesscope.bounds import VarianceGrid
from hesscope.core.vectors import ParameterSpace
from hesscope.layerwise.gaussians import Axes, Group, GroupPosterior, Posterior

# Strengths in units of the number of samples: first these, a factor of 4 apart, then finer about the best.
STRENGTHS = tuple(4.0**power for power in range(-3, 7))
FINER = (2.0**-1.5, 2.0**-1, 2.0**-0.5, 2.0**0.5, 2.0**1, 2.0**1.5)

# The grid's variances are tried so many apart at first, then one by one about the best.
COARSE = 32


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


def best_strength(bound_at: Callable[[float], float], progress: Callable[[int, int], None] | None = None) -> float:
    """The strength, in units of the number of samples, of the smallest bound."""
    bounds: dict[float, float] = {}

    def look(strengths: Sequence[float]) -> float:
        for strength in strengths:
            bounds[strength] = bound_at(strength)
            if progress is not None:
                progress(len(bounds), len(STRENGTHS) + len(FINER))
        return min(bounds, key=lambda strength: bounds[strength])

    best = look(STRENGTHS)
    return look([best * factor for factor in FINER])


def _best_prior(stiffness: Tensor, moved: Tensor, grid: VarianceGrid) -> float:
    """The prior variance with the least minimum, 1/2 sum ln(1 + a v) + a d^2 / (1 + a v)."""

    def cost(index: int) -> float:
        ratio = 1 + stiffness * grid.values[index]
        return float((ratio.log() + stiffness * moved.square() / ratio).sum())

    def least(indices: Sequence[int]) -> int:
        return indices[int(np.argmin([cost(index) for index in indices]))]

    best = least(range(0, len(grid), COARSE))
    return grid.values[least(range(max(0, best - COARSE), min(len(grid), best + COARSE + 1)))]
