"""How far a layer's Hessian is from a Kronecker product: from E[M] (x) E[x x^T], and from the nearest one of all.

Where every sample has one position, both errors are exact sums over pairs of samples (MATH.md, section 5). Where it has
several, H is the sum of g g^T over samples and columns of the loss's root: exact where that is not too much work, else
from random combinations of these g, with standard errors. Nothing but a small H is ever formed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from math import isfinite, sqrt
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hesscope.core.errors import DataError
from hesscope.core.memory import available_bytes, require_memory
from hesscope.core.rng import normal, rademacher, stream
from hesscope.layerwise.kronecker_sums import (
    DenseMatrix,
    KroneckerSum,
    RowSum,
    SampleSum,
    nearest_product,
    relative,
)
from hesscope.layerwise.layers import Layer
from hesscope.layerwise.taps import Piece, pieces
from hesscope.objective import Objective
from hesscope.operators import GaussNewton, Hessian

Array = npt.NDArray[Any]
Progress = Callable[[int, int], None]

# The exact form is taken up to so many multiply-adds (seconds on a CPU), and so many parameters for a dense H.
EXACT_WORK = 10**12
DENSE_SIZE = 2048

# Beyond that: so many random combinations in all, in independent groups of at least so many each; more groups where
# samples are few, since one group has one combination of a sample.
MOST_ROWS, FEWEST_ROWS = 4096, 16
FEWEST_GROUPS, MOST_GROUPS = 8, 64

# Products with the true Hessian, where it is not the Gauss-Newton matrix and too large to be formed.
HESSIAN_PROBES = 32

# What is left of H - G in a product is rounding below this part of H's, in units of the dtype's epsilon.
ROUNDINGS = 1000


@dataclass(frozen=True)
class Decoupling:
    """Distances of a layer's matrix from Kronecker products, relative to its norm.

    Attributes:
        relative_error, relative_stderr: |H - E[M] (x) E[x x^T]| / |H| for the true Hessian H; stderr 0 if exact.
        best_relative_error, best_stderr: of the nearest Kronecker product; an upper bound of it where it is sampled;
            nan where it is out of reach.
        gauss_newton_error, gauss_newton_stderr, gauss_newton_best: the same for the Gauss-Newton matrix.
        residual_share: |(H - G) v| / |H v| for a random v: what of the Hessian is not Gauss-Newton; 0 if nothing.
        norm: |H|_F.
        note: how it was measured.
    """

    relative_error: float
    relative_stderr: float
    best_relative_error: float
    best_stderr: float
    gauss_newton_error: float
    gauss_newton_stderr: float
    gauss_newton_best: float
    residual_share: float
    norm: float
    note: str

    def attributes(self) -> dict[str, Any]:
        """As attributes of an xarray object."""
        return {f"decoupling_{name}": value for name, value in asdict(self).items()}

    @classmethod
    def from_attributes(cls, attributes: Mapping[Any, Any]) -> Decoupling | None:
        """Inverse of `attributes`; None if there is nothing of it."""
        if "decoupling_note" not in attributes:
            return None
        values: dict[str, Any] = {entry.name: attributes[f"decoupling_{entry.name}"] for entry in fields(cls)}
        numbers = {name: float(value) for name, value in values.items() if name != "note"}
        return cls(**numbers, note=str(values["note"]))


@dataclass(frozen=True)
class Errors:
    """Errors against one matrix; see Decoupling."""

    error: float
    stderr: float
    best: float
    best_stderr: float
    norm: float
    note: str


def decoupling(
    objective: Objective,
    layer: Layer,
    K: tuple[Tensor, Tensor],
    positions: int,
    exact: bool,
    seed: int,
    progress: Progress | None,
) -> Decoupling:
    """Measure the distances of a layer's Hessian from K = (E[M], E[x x^T]) and from the nearest product.

    Args:
        positions: of each sample; exact: whether to take all columns of the loss's root where that is not too much.
    """
    K = (K[0].to(objective.parameters.device), K[1].to(objective.parameters.device))
    share = _residual_share(objective, layer, seed)
    gauss_newton = _gauss_newton_errors(objective, layer, K, positions, exact, seed, progress)
    true = gauss_newton if share == 0 else _hessian_errors(objective, layer, K, positions, seed, progress)
    return Decoupling(
        relative_error=true.error,
        relative_stderr=true.stderr,
        best_relative_error=true.best,
        best_stderr=true.best_stderr,
        gauss_newton_error=gauss_newton.error,
        gauss_newton_stderr=gauss_newton.stderr,
        gauss_newton_best=gauss_newton.best,
        residual_share=share,
        norm=true.norm,
        note=true.note,
    )


def _residual_share(objective: Objective, layer: Layer, seed: int) -> float:
    """|(H - G) v| / |H v| for a random v, 0 if that is rounding."""
    own = objective.restricted(layer.parameters)
    v = normal((layer.size,), stream(seed, "residual share")).to(own.parameters.device, own.parameters.dtype)
    Hv = Hessian(own, engine="double_backward", memory=0) @ v
    Gv = GaussNewton(own, engine="double_backward", memory=0) @ v
    largest = max(float(Hv.norm()), float(Gv.norm()))
    rest = float((Hv - Gv).norm())
    return 0.0 if rest <= ROUNDINGS * torch.finfo(v.dtype).eps * largest else rest / float(Hv.norm())


# --- the Gauss-Newton matrix ------------------------------------------------------------------------------------------


def _gauss_newton_errors(
    objective: Objective,
    layer: Layer,
    K: tuple[Tensor, Tensor],
    positions: int,
    exact: bool,
    seed: int,
    progress: Progress | None,
) -> Errors:
    if positions == 1 and exact:
        return _measured(_sample_sum(objective, layer, False, progress), K, "exact, over pairs of samples")
    rows = _count_rows(objective, layer) if exact else 0
    small = layer.size <= DENSE_SIZE  # then exact to rounding also where the error is none
    work = rows * layer.size * (layer.size if small else rows // 2)
    if rows and work <= EXACT_WORK and (small or _fit(layer, rows, objective)):
        if small:
            return _measured(_dense_sum(objective, layer, progress), K, "exact, from the dense matrix")
        g = torch.cat(list(_rows(objective, layer, progress)))
        return _measured(RowSum(g, objective.num_terms), K, "exact, over pairs of samples and classes")
    return _sampled(objective, layer, K, seed, progress)


def _measured(H: KroneckerSum, K: tuple[Tensor, Tensor], note: str) -> Errors:
    norm = H.norm_squared()
    if not isfinite(norm):
        raise DataError("the layer's matrix is not finite, or its entries are too large to be squared")
    if norm == 0:
        return Errors(0.0, 0.0, 0.0, 0.0, 0.0, f"{note}; the matrix is zero")
    error = relative(H.distance_squared(*K), norm)
    nearest = nearest_product(H, K[1])
    best = relative(H.distance_squared(nearest.scale * nearest.A, nearest.B), norm)
    return Errors(error, 0.0, min(best, error), 0.0, sqrt(norm), note)


def _sample_sum(objective: Objective, layer: Layer, true: bool, progress: Progress | None) -> SampleSum:
    """All M_n and x_n of a layer with one position: of the Hessian, or of the Gauss-Newton matrix."""
    M, x, columns = [], [], False
    for piece in pieces(objective, [layer]):
        own = piece.inputs(layer)[:, 0]
        x.append(torch.cat([own, torch.ones_like(own[:, :1])], 1) if layer.bias else own)
        C = piece.columns_per_sample()
        # Whichever makes fewer products of pairs; the M_n need more memory, too.
        columns = not true and layer.outputs > C * C
        if true:
            M.append(piece.output_hessians(layer))
        else:
            w = torch.stack([pulled[layer.name][:, 0] for pulled in piece.pulled_columns()], dim=2)
            M.append(w if columns else w @ w.mT)
        if len(M) == 1:
            held = M[0].numel() // len(M[0]) * M[0].element_size() * 2 * round(objective.num_terms)
            require_memory(held, M[0].device, f"output Hessians of layer {layer.name!r}", "fewer samples")
        _report(progress, piece)
    return SampleSum(torch.cat(M), torch.cat(x), objective.num_terms, columns)


def _count_rows(objective: Objective, layer: Layer) -> int:
    """Number of samples times columns of the root, from a look at the first piece."""
    for piece in pieces(objective, [layer]):
        return round(piece.columns_per_sample() * piece.samples / piece.done)
    return 0


def _fit(layer: Layer, rows: int, objective: Objective) -> bool:
    """Whether all rows, and what is made of them, fit in memory."""
    item = torch.finfo(objective.parameters.dtype).bits // 8
    return 4 * item * rows * layer.size <= available_bytes(objective.parameters.device)


def _rows(objective: Objective, layer: Layer, progress: Progress | None) -> Iterator[Tensor]:
    """G [rows, outputs, inputs] of one piece and column after the other."""
    for piece in pieces(objective, [layer]):
        x = _with_bias(piece.inputs(layer), layer)
        for pulled in piece.pulled_columns():
            yield pulled[layer.name].mT @ x
        _report(progress, piece)


def _with_bias(x: Tensor, layer: Layer) -> Tensor:
    return torch.cat([x, torch.ones_like(x[..., :1])], 2) if layer.bias else x


def _dense_sum(objective: Objective, layer: Layer, progress: Progress | None) -> DenseMatrix:
    space = objective.parameters
    total = torch.zeros(layer.size, layer.size, dtype=space.dtype, device=space.device)
    for g in _rows(objective, layer, progress):
        flat = g.flatten(1)
        total.addmm_(flat.T, flat)
    return DenseMatrix(total.view(*layer.shape, *layer.shape) / objective.num_terms)


def _sampled(
    objective: Objective, layer: Layer, K: tuple[Tensor, Tensor], seed: int, progress: Progress | None
) -> Errors:
    """From random combinations of the g of every sample, in independent groups.

    Each group's sum is unbiased for G, so that products of two different groups are for its square. The nearest product
    is found from one half of the groups and judged by the other: no product found so does better than the nearest.
    """
    samples = sum(piece.samples for piece in pieces(objective, [layer]))
    most = int(min(MOST_ROWS, (2 * EXACT_WORK / layer.size) ** 0.5))
    groups = max(FEWEST_GROUPS, min(MOST_GROUPS, most // samples)) // 2 * 2
    # Combinations over several samples where there are too many of these.
    merged = max(1, -(-samples // max(FEWEST_ROWS, most // groups)))
    held: list[list[Tensor]] = [[] for _ in range(groups)]
    for piece in pieces(objective, [layer]):
        x = _with_bias(piece.inputs(layer), layer)
        for group, pulled in enumerate(piece.pulled_signs(groups, seed, "decoupling", layer.name)):
            g = pulled[layer.name].mT @ x
            held[group].append(torch.stack([part.sum(0) for part in torch.split(g, merged)]))
        _report(progress, piece)
    terms = objective.num_terms
    g = torch.cat([torch.cat(rows) for rows in held])
    pairs = RowSum(g, terms).pair_sums(groups).cpu().numpy()
    inner = _group_products(g, terms, groups, *K)
    square = float(K[0].square().sum() * K[1].square().sum())
    half = groups // 2
    each = len(g) // groups
    near = [nearest_product(RowSum(part, terms), K[1]) for part in (g[half * each :], g[: half * each])]
    judged = np.concatenate(
        [
            _group_products(g, terms, groups, near[0].A, near[0].B)[:half],
            _group_products(g, terms, groups, near[1].A, near[1].B)[half:],
        ]
    )

    def errors(kept: Array) -> tuple[float, float, float]:
        count = len(kept)
        among = pairs[np.ix_(kept, kept)]
        norm = (among.sum() - among.trace()) / (count * (count - 1))
        found = norm - 2 * inner[kept].mean() + square
        return relative(found, norm), relative(norm - judged[kept].mean() ** 2, norm), norm

    everything = np.arange(groups)
    error, best, norm = errors(everything)
    without = np.array([errors(np.delete(everything, left))[:2] for left in range(groups)])
    spread = np.sqrt((groups - 1) / groups * ((without - without.mean(0)) ** 2).sum(0))
    note = f"from {len(g)} random combinations in {groups} groups; the best is an upper bound"
    return Errors(error, float(spread[0]), min(best, error), float(spread[1]), sqrt(max(norm, 0.0)), note)


def _group_products(g: Tensor, terms: float, groups: int, A: Tensor, B: Tensor) -> Array:
    """<H_a, A (x) B> of every group's own estimate H_a, [groups]."""
    found: Array = RowSum(g, terms).inner(A, B).view(groups, -1).sum(1).double().cpu().numpy() / terms
    return found


# --- the true Hessian -------------------------------------------------------------------------------------------------


def _hessian_errors(
    objective: Objective,
    layer: Layer,
    K: tuple[Tensor, Tensor],
    positions: int,
    seed: int,
    progress: Progress | None,
) -> Errors:
    if positions == 1:
        return _measured(_sample_sum(objective, layer, True, progress), K, "exact, over pairs of samples")
    H = Hessian(objective.restricted(layer.parameters))
    if layer.size <= DENSE_SIZE:
        matrices = layer.matricized(H.dense()).reshape(layer.size, -1)  # every column as a matrix, and then every row
        dense = layer.matricized(matrices).view(*layer.shape, *layer.shape)
        return _measured(DenseMatrix(dense), K, "exact, from the dense matrix")
    signs = [rademacher(layer.size, stream(seed, "decoupling", layer.name, n)) for n in range(HESSIAN_PROBES)]
    V = torch.stack(signs, 1).to(H.device, H.dtype)
    HV = torch.cat([H @ part for part in torch.split(V, H.columns_per_pass, dim=1)], 1)
    KV = layer.flattened(K[0] @ layer.matricized(V) @ K[1])
    norms = HV.double().square().sum(0).cpu().numpy()
    distances = (HV - KV).double().square().sum(0).cpu().numpy()
    error = sqrt(distances.mean() / norms.mean())
    left = np.arange(HESSIAN_PROBES)
    without = np.array([sqrt(np.delete(distances, n).mean() / np.delete(norms, n).mean()) for n in left])
    stderr = float(np.sqrt((HESSIAN_PROBES - 1) * without.var()))
    note = f"from {HESSIAN_PROBES} products with random vectors; the nearest product is known for Gauss-Newton only"
    return Errors(error, stderr, float("nan"), float("nan"), sqrt(norms.mean()), note)


def _report(progress: Progress | None, piece: Piece) -> None:
    if progress is not None:
        progress(round(1000 * piece.done), 1000)
