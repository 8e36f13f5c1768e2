"""Groups of parameters, the Kronecker eigenbasis of each ([W]; MATH.md, section 5), and the curvature along its axes.

The curvature along an axis u v^T is that of the Gauss-Newton matrix itself, (1/N) sum_nc (u . g_nc v)^2, not the
product of the factors' eigenvalues: the best diagonal there is in this basis (George et al., arXiv:1806.03884).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from hesscope.core.errors import DataError
from hesscope.estimate.diagonal import diagonal
from hesscope.layerwise.factors import DEFAULT_PROBES, MOST_COLUMNS, all_kronecker_factors
from hesscope.layerwise.gaussians import Axes, Group
from hesscope.layerwise.layers import Layer, layers_of, left_out
from hesscope.layerwise.taps import calls_of, pieces, unusable
from hesscope.objective import Objective
from hesscope.operators import GaussNewton

# Sides of Kronecker factors beyond this are not decomposed.
MOST_SIDE = 4096

# Squares of single samples' gradients, where a sample has several positions, are made so many entries at a time.
GRADIENT_ENTRIES = 2**24

# Random vectors for the curvature of what has no Kronecker factors.
TENSOR_PROBES = 32


def groups_of(objective: Objective) -> tuple[list[Group], dict[str, str]]:
    """Layers with Kronecker factors, then each tensor that belongs to none; and why they do not: name -> reason."""
    reasons = left_out(objective)
    found = layers_of(objective)
    groups = []
    for name, calls in calls_of(objective, found).items():
        layer = next(each for each in found if each.name == name)
        reason = unusable(*calls, None) or _too_large(layer)
        if reason:
            reasons[name] = reason
        else:
            groups.append(Group(name, layer.parameters, layer.shape, layer))
    covered = {name for group in groups for name in group.parameters}
    fallback = {}
    for name, shape in zip(objective.parameters.names, objective.parameters.shapes, strict=True):
        if name not in covered:
            groups.append(Group(name, (name,), (1, int(np.prod(shape)))))
            owner = name.rpartition(".")[0]
            fallback[name] = f"its module {reasons[owner]}" if owner in reasons else "it belongs to no layer"
    return groups, fallback


def kronecker_axes(objective: Objective, groups: Sequence[Group]) -> dict[str, Axes]:
    """Eigenvectors of E[M] and E[x x^T] of every layer; the parameters themselves for other tensors."""
    axes = {group.name: Axes() for group in groups}
    layers = [group.name for group in groups if group.layer is not None]
    if layers:
        space = objective.parameters
        for name, factors in all_kronecker_factors(objective, layers).items():
            sides = (torch.from_numpy(side).double() for side in (factors.output, factors.input))
            left, right = (torch.linalg.eigh(side)[1].to(space.device, space.dtype) for side in sides)
            axes[name] = Axes(left, right)
    return axes


def curvature_along(
    objective: Objective, groups: Sequence[Group], axes: Mapping[str, Axes], seed: int = 0
) -> dict[str, Tensor]:
    """Second derivatives of the loss's Gauss-Newton form along the axes of each group, [outputs, inputs] float64."""
    found = _along_layers(objective, [group.layer for group in groups if group.layer is not None], axes, seed)
    rest = [group for group in groups if group.layer is None]
    if rest:
        names = [name for group in rest for name in group.parameters]
        view = objective.restricted(names)
        probes = TENSOR_PROBES if view.parameters.size > TENSOR_PROBES else None
        method = "hutchinson" if probes else "exact"
        entries = torch.from_numpy(np.asarray(diagonal(GaussNewton(view), method, probes, seed=seed).value)).double()
        tensors = view.parameters.unflatten(entries.clamp(min=0))
        found |= {group.name: group.matrix(tensors) for group in rest}
    for name, values in found.items():
        if not bool(values.isfinite().all()):
            raise DataError(f"the curvature of {name!r} is not finite")
    return found


def _along_layers(
    objective: Objective, layers: Sequence[Layer], axes: Mapping[str, Axes], seed: int
) -> dict[str, Tensor]:
    """The same for layers, from one pass over the data."""
    device = objective.parameters.device
    totals = {layer.name: torch.zeros(layer.shape, dtype=torch.float64, device=device) for layer in layers}
    if not layers:
        return totals
    for piece in pieces(objective, layers):
        turned = {each.name: _times(_with_one(each, piece.inputs(each)), axes[each.name].right) for each in layers}
        sampled = piece.columns_per_sample() > MOST_COLUMNS
        columns = piece.pulled_signs(DEFAULT_PROBES, seed, "curvature") if sampled else piece.pulled_columns()
        weight = 1 / DEFAULT_PROBES if sampled else 1.0
        squares: dict[str, Tensor] = {}
        for pulled in columns:
            for name, x in turned.items():
                w = _times(pulled[name], axes[name].left)
                if w.shape[1] > 1:
                    totals[name] += weight * _squared_gradients(w, x)
                else:  # all columns of a sample meet the same x: their squares are added up first
                    squares[name] = squares.get(name, 0.0) + w.squeeze(1).square()
        for name, each in squares.items():
            totals[name] += weight * (each.T @ turned[name].squeeze(1).square()).double()
    return {name: total.cpu() / objective.num_terms for name, total in totals.items()}


def _squared_gradients(w: Tensor, x: Tensor) -> Tensor:
    """Sum over samples of (sum_t w_t x_t^T)^2, entry by entry; w [n, T, outputs], x [n, T, inputs]."""
    total = torch.zeros(w.shape[2], x.shape[2], dtype=torch.float64, device=w.device)
    size = max(1, GRADIENT_ENTRIES // total.numel())
    for some, those in zip(torch.split(w, size), torch.split(x, size), strict=True):
        total += (some.mT @ those).square().sum(0).double()
    return total


def _with_one(layer: Layer, x: Tensor) -> Tensor:
    """Inputs [n, T, features] with the 1 that multiplies a bias, [n, T, inputs]."""
    return torch.cat([x, torch.ones_like(x[..., :1])], dim=-1) if layer.bias else x


def _times(vectors: Tensor, basis: Tensor | None) -> Tensor:
    """Coordinates of vectors [n, T, f] in an orthonormal basis [f, f]."""
    return vectors if basis is None else vectors @ basis


def _too_large(layer: Layer) -> str:
    side = max(layer.shape)
    return f"has a side of {side}, and factors beyond {MOST_SIDE} are not decomposed" if side > MOST_SIDE else ""
