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
from hesscope.estimate.lanczos import power_of_two
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

# The exact form is taken up to so many multiply-adds (tens of seconds on a CPU), and so many parameters for a dense H.
EXACT_WORK = 10**12
DENSE_SIZE = 2048

# Products of a step of the search for the nearest product, and steps that it takes where nothing is hard.
STEPS = 8

# Output Hessians of all samples are held whole up to so many bytes, then as columns.
WHOLE_BYTES = 2**30

# Beyond the exact form: so many random combinations in all, and of so many bytes, in independent groups of at least so
# many each; more groups where samples are few, since one group has one combination of a sample.
MOST_ROWS, FEWEST_ROWS, ROWS_BYTES = 4096, 16, 2**30
FEWEST_GROUPS, MOST_GROUPS = 8, 64

# What is made of rows takes so many times their memory.
COPIES = 6

# Products with the true Hessian, where it is not the Gauss-Newton matrix and too large to be formed.
HESSIAN_PROBES = 32

# What is left of H - G in a product is rounding below this part of H's, in units of the dtype's epsilon.
ROUNDINGS = 1000


@dataclass(frozen=True)
class Decoupling:
    """Distances of a layer's matrix from Kronecker products, relative to its norm.

    Attributes:
        relative_error, relative_stderr: |H - E[M] (x) E[x x^T]| / |H| for the true Hessian H, and the very factors that
            were made: where E[M] was sampled its noise is part of the error, and not of the standard error, which is
            that of H's sampling, 0 if exact.
        best_relative_error, best_stderr: of the nearest Kronecker product; where it is sampled an upper bound in
            expectation, with the standard error of judging the product that was found; nan where it is out of reach.
        gauss_newton_error, gauss_newton_stderr, gauss_newton_best: the same for the Gauss-Newton matrix.
        residual_share: |(H - G) v| / |H v| for a random v: how large what is not Gauss-Newton is beside the Hessian
            (more than 1 where the two cancel in part); 0 if there is nothing.
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
class Seen:
    """What is known of a layer's data: samples, positions of each (at most), columns of the loss's root over them all.

    exact: whether to take all these columns where that is not too much work.
    """

    samples: int
    positions: int
    columns: int
    exact: bool


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
    objective: Objective, layer: Layer, K: tuple[Tensor, Tensor], seen: Seen, seed: int, progress: Progress | None
) -> Decoupling:
    """Measure the distances of a layer's Hessian from K = (E[M], E[x x^T]) and from the nearest product.

    Args:
        K: [outputs, outputs] and [inputs, inputs], where the objective's parameters are.
        seed: of random combinations and vectors; progress: called with (done, planned) in thousandths.

    Raises:
        DataError: something is not finite. TooLargeError: what it takes does not fit in memory.
    """
    share = _residual_share(objective, layer, seed)
    halves = [None, None] if progress is None else [_half(progress, number) for number in (0, 1)]
    gauss_newton = _gauss_newton_errors(objective, layer, K, seen, seed, progress if share == 0 else halves[0])
    true = gauss_newton if share == 0 else _hessian_errors(objective, layer, K, seen, seed, halves[1])
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
        note=true.note if seen.exact else f"{true.note}; of the sampled E[M], its noise included",
    )


def _half(progress: Progress, number: int) -> Progress:
    return lambda done, planned: progress(number * planned // 2 + done // 2, planned)


def _residual_share(objective: Objective, layer: Layer, seed: int) -> float:
    """|(H - G) v| / |H v| for a random v, 0 if that is rounding."""
    own = objective.restricted(layer.parameters)
    v = normal((layer.size,), stream(seed, "residual share")).to(own.parameters.device, own.parameters.dtype)
    Hv = Hessian(own, engine="double_backward", memory=0) @ v
    Gv = GaussNewton(own, engine="double_backward", memory=0) @ v
    Hv, Gv = Hv.double(), Gv.double()  # squares of small numbers vanish in single precision
    rest, largest = float((Hv - Gv).norm()), max(float(Hv.norm()), float(Gv.norm()))
    return 0.0 if rest <= ROUNDINGS * torch.finfo(v.dtype).eps * largest else rest / float(Hv.norm())


# --- the Gauss-Newton matrix ------------------------------------------------------------------------------------------


def _gauss_newton_errors(
    objective: Objective, layer: Layer, K: tuple[Tensor, Tensor], seen: Seen, seed: int, progress: Progress | None
) -> Errors:
    if not seen.exact:
        return _sampled(objective, layer, K, seed, progress)
    if seen.positions == 1 and _pair_work(layer, seen, False) <= EXACT_WORK:
        return _measured(_sample_sum(objective, layer, seen, False, progress), K, "exact, over pairs of samples")
    rows, space = seen.columns, objective.parameters
    small = layer.size <= DENSE_SIZE  # then exact to rounding also where the error is none
    work = rows * layer.size * (layer.size if small else rows // 2 + 4 * STEPS * sum(layer.shape))
    item = torch.finfo(space.dtype).bits // 8
    if work <= EXACT_WORK and (small or COPIES * item * rows * layer.size <= available_bytes(space.device)):
        if small:
            return _measured(_dense_sum(objective, layer, progress), K, "exact, from the dense matrix")
        g = list(_rows(objective, layer, progress))
        empty = torch.zeros(1, *layer.shape, dtype=space.dtype, device=space.device)
        H = RowSum(torch.cat(g) if g else empty, objective.num_terms)
        return _measured(H, K, "exact, over pairs of samples and classes")
    return _sampled(objective, layer, K, seed, progress)


def _pair_work(layer: Layer, seen: Seen, true: bool) -> int:
    """Multiply-adds over all pairs of samples, each with one position."""
    each = seen.columns // seen.samples
    pair = layer.outputs**2 if true else min(layer.outputs**2, layer.outputs * each**2)
    return seen.samples**2 * (pair + layer.inputs) // 2


def _measured(H: KroneckerSum, K: tuple[Tensor, Tensor], note: str) -> Errors:
    size = H.scale()
    H, A, B = H.divided(*size), K[0] / size[0], K[1] / size[1]
    norm = H.norm_squared()
    if not isfinite(norm):
        raise DataError("the layer's matrix is not finite, or its entries are too large to be squared")
    if norm == 0:
        return Errors(0.0, 0.0, 0.0, 0.0, 0.0, f"{note}; the matrix is zero")
    error = relative(H.distance_squared(A, B), norm)
    nearest = nearest_product(H, B)
    best = relative(H.distance_squared(nearest.scale * nearest.A, nearest.B), norm)
    return Errors(error, 0.0, min(best, error), 0.0, sqrt(norm) * size[0] * size[1], note)


def _sample_sum(objective: Objective, layer: Layer, seen: Seen, true: bool, progress: Progress | None) -> SampleSum:
    """All M_n and x_n of a layer with one position: of the Hessian, or of the Gauss-Newton matrix."""
    M: list[Tensor] = []
    x: list[Tensor] = []
    columns = False
    for piece in pieces(objective, [layer]):
        own = piece.inputs(layer)[:, 0]
        x.append(torch.cat([own, torch.ones_like(own[:, :1])], 1) if layer.bias else own)
        if not M:
            C = piece.columns_per_sample()
            whole = seen.samples * layer.outputs**2 * own.element_size()
            # Whichever makes fewer products of pairs, unless the M_n need too much memory.
            columns = not true and (layer.outputs > C * C or (whole > WHOLE_BYTES and layer.outputs > C))
            held = 3 * (seen.columns * layer.outputs * own.element_size() if columns else whole)
            require_memory(held, own.device, f"output Hessians of layer {layer.name!r}", "fewer samples")
        if true:
            M.append(piece.output_hessians(layer))
        else:
            w = [pulled[layer.name][:, 0] for pulled in piece.pulled_columns(also_zero=True)]
            M.append(torch.stack(w, dim=2) if columns else torch.stack(w, dim=2) @ torch.stack(w, dim=1))
        _report(progress, piece)
    return SampleSum(torch.cat(M), torch.cat(x), objective.num_terms, columns)


def _rows(objective: Objective, layer: Layer, progress: Progress | None) -> Iterator[Tensor]:
    """Matrices g [rows, outputs, inputs] of one piece and column after the other."""
    for piece in pieces(objective, [layer]):
        x = _with_bias(piece.inputs(layer), layer)
        for pulled in piece.pulled_columns():
            yield pulled[layer.name].mT @ x
        _report(progress, piece)


def _merged(w: Tensor, x: Tensor, count: int) -> Tensor:
    """Sums of w^T x over `count` samples each, [n / count, outputs, inputs]; w [n, T, outputs], x [n, T, inputs]."""
    if count == 1:
        return w.mT @ x
    pairs = zip(torch.split(w, count), torch.split(x, count), strict=True)
    return torch.stack([some.flatten(0, 1).T @ own.flatten(0, 1) for some, own in pairs])


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
    sizes = [piece.samples for piece in pieces(objective, [layer])]
    space = objective.parameters
    item = torch.finfo(space.dtype).bits // 8
    most = int(
        min(
            MOST_ROWS,
            (2 * EXACT_WORK / layer.size) ** 0.5,
            EXACT_WORK / (4 * STEPS * layer.size * sum(layer.shape)),
            ROWS_BYTES / (item * layer.size),
        )
    )
    groups = max(FEWEST_GROUPS, min(MOST_GROUPS, most // sum(sizes))) // 2 * 2
    # Combinations over several samples where there are too many of these.
    merged = max(1, -(-sum(sizes) // max(FEWEST_ROWS, most // groups)))
    rows = groups * sum(-(-size // merged) for size in sizes)
    needed = COPIES * item * rows * layer.size
    require_memory(needed, space.device, f"{rows} combinations for layer {layer.name!r}", "errors=False")
    held: list[list[Tensor]] = [[] for _ in range(groups)]
    for piece in pieces(objective, [layer]):
        x = _with_bias(piece.inputs(layer), layer)
        for group, pulled in enumerate(piece.pulled_signs(groups, seed, "decoupling", layer.name)):
            held[group].append(_merged(pulled[layer.name], x, merged))
        _report(progress, piece)
    terms = objective.num_terms
    g = torch.cat([torch.cat(part) for part in held])
    largest = power_of_two(float(g.abs().max()))  # so that squares of squares neither vanish nor burst
    if not isfinite(largest):
        raise DataError("the layer's matrix is not finite")
    g, K = g / largest, (K[0] / largest**2, K[1])
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

    def squares(kept: Array) -> tuple[float, float, float]:
        """Squared errors, of K and of the product that was found, and the squared norm, from some of the groups."""
        count = len(kept)
        among = pairs[np.ix_(kept, kept)]
        norm = (among.sum() - among.trace()) / (count * (count - 1))
        return 1 + (square - 2 * inner[kept].mean()) / norm, 1 - judged[kept].mean() ** 2 / norm, norm

    everything = np.arange(groups)
    *found, norm = squares(everything)
    without = np.array([squares(np.delete(everything, left))[:2] for left in range(groups)])
    spread = np.sqrt((groups - 1) / groups * ((without - without.mean(0)) ** 2).sum(0))
    (error, stderr), (best, best_stderr) = (_root(value, wide) for value, wide in zip(found, spread, strict=True))
    note = f"from {len(g)} random combinations in {groups} groups; the best is an upper bound in expectation"
    return Errors(error, stderr, best, best_stderr, sqrt(max(norm, 0.0)) * largest**2, note)


def _root(square: float, stderr: float) -> tuple[float, float]:
    """Root of an estimate with its standard error; near zero the error of the root is the root of the error."""
    root = sqrt(max(square, 0.0))
    return root, float(min(stderr / (2 * root), sqrt(stderr))) if root > 0 else sqrt(stderr)


def _group_products(g: Tensor, terms: float, groups: int, A: Tensor, B: Tensor) -> Array:
    """<H_a, A (x) B> of every group's own estimate H_a, [groups]."""
    found: Array = RowSum(g, terms).inner(A, B).view(groups, -1).sum(1).double().cpu().numpy() / terms
    return found


# --- the true Hessian -------------------------------------------------------------------------------------------------


def _hessian_errors(
    objective: Objective, layer: Layer, K: tuple[Tensor, Tensor], seen: Seen, seed: int, progress: Progress | None
) -> Errors:
    if seen.positions == 1 and _pair_work(layer, seen, True) <= EXACT_WORK:
        return _measured(_sample_sum(objective, layer, seen, True, progress), K, "exact, over pairs of samples")
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
