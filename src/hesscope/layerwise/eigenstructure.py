"""Top eigenpairs of a layer's Hessian beside those of its Kronecker approximation ([W]; MATH.md, section 5)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hesscope.core.checks import require_choice, require_positive_int
from hesscope.core.errors import InputError
from hesscope.core.records import Provenance, require_xarray_kind
from hesscope.core.rng import rademacher, stream
from hesscope.estimate.eigenpairs import Eigenpairs, top_eigenpairs
from hesscope.estimate.lanczos import finite_products, power_of_two
from hesscope.layerwise.factors import KroneckerFactors, kronecker_factors, layer_gauss_newton, layer_hessian
from hesscope.layerwise.kronecker_pairs import (
    KroneckerPairs,
    factor_eigenpairs,
    input_shares,
    leading_pairs,
    output_shares,
)
from hesscope.layerwise.layers import Layer, find_layer
from hesscope.layerwise.outlier_counts import EdgeOutliers, GapOutliers, beyond_edge, largest_gap
from hesscope.layerwise.overlap import leading_overlaps
from hesscope.objective import Objective
from hesscope.operators import Operator, as_operator

if TYPE_CHECKING:
    import xarray as xr

Array = npt.NDArray[np.float64]
Vectors = npt.NDArray[np.floating[Any]]
Progress = Callable[[int, int], None]

CURVATURES: dict[str, Callable[[Objective, str], Operator]] = {
    "hessian": layer_hessian,
    "gauss_newton": layer_gauss_newton,
}

# [W] sees the overlap between models peak near k = width, and outliers near C - 1: twice the one and three times the
# other show what comes after. No more than MOST_PAIRS unless told, since products and memory grow with k; where there
# are more classes than that (language models), so that C - 1 is out of reach anyway, FEW_PAIRS.
WIDTHS, CLASSES, MOST_PAIRS, FEW_PAIRS = 2, 3, 256, 32

# Up to this size the whole matrix is less work than its leading pairs; beyond, sums over the bulk are had from probes.
DENSE_SIZE, PROBES = 512, 32

# Eigenvalues below this many roundings of the largest are rounding.
ROUNDINGS = 20


@dataclass(frozen=True, eq=False)
class Eigenstructure:
    """The k leading eigenpairs (lambda_i, h_i) of a layer's Hessian H, and of K = E[M] (x) E[x x^T] beside them.

    Eigenvectors are matricized: [outputs, inputs], with the bias as the last column. Where eigenvalues (nearly)
    coincide, eigenvectors are defined up to a rotation among them only, and so are the rows of `correspondence` and
    whatever is matched: look at `overlap` then, at a k where the group is complete.

    Attributes:
        layer: its name; kind: "linear", "convolution" or "embedding"; bias: whether the last column is one.
        curvature: "hessian" or "gauss_newton"; classes: C, None if the outputs are no classes.
        values: [k] eigenvalues of H, descending; residuals: [k] norms ||H h - lambda h||; converged: [k].
        vectors: [k, outputs, inputs] eigenvectors of H, in the dtype they were computed in.
        pairs: the k leading eigenpairs of K: eigenvectors u_a (x) v_b.
        correspondence: [k, k] squared inner products of h_i with the eigenvectors of K.
        output_correspondence: [k, outputs] share of h_i along u_a (x) anything, for every a; input_correspondence:
            [k, inputs] along anything (x) v_b. Rows sum to 1.
        partner: [k] eigenvector of K that h_i is matched with, one to one, the sum of squared inner products being
            as large as possible.
        overlap: [k] of the subspaces of the first 1 ... k eigenvectors of H and of K.
        trace, energy: trace and squared Frobenius norm of H; trace_stderr, energy_stderr: their standard errors, 0 if
            exact.
        gap, edge: the number of outliers by two criteria; see largest_gap and beyond_edge.
    """

    layer: str
    kind: str
    bias: bool
    curvature: str
    classes: int | None
    values: Array
    residuals: Array
    converged: npt.NDArray[np.bool_]
    vectors: Vectors = field(repr=False)
    pairs: KroneckerPairs
    correspondence: Array = field(repr=False)
    output_correspondence: Array = field(repr=False)
    input_correspondence: Array = field(repr=False)
    partner: npt.NDArray[np.int64]
    overlap: Array
    trace: float
    trace_stderr: float
    energy: float
    energy_stderr: float
    gap: GapOutliers
    edge: EdgeOutliers
    provenance: Provenance

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)."""
        return self.vectors.shape[1], self.vectors.shape[2]

    @property
    def k(self) -> int:
        """Number of eigenpairs."""
        return len(self.values)

    @property
    def basis(self) -> Vectors:
        """The eigenvectors as columns [P, k], row by row of the matrix (not in the order of the parameters)."""
        return self.vectors.reshape(self.k, -1).T

    @property
    def expected_outliers(self) -> int | None:
        """C - 1 ([W]); None if the outputs are no classes."""
        return None if self.classes is None else self.classes - 1

    @property
    def matched(self) -> Array:
        """Squared inner products [k] of eigenvectors with their partners."""
        found: Array = self.correspondence[np.arange(self.k), self.partner]
        return found

    @property
    def sorted_errors(self) -> Array:
        """Relative errors [k] of K's eigenvalues in order, (nu_i - lambda_i) / lambda_i."""
        return _relative(self.pairs.values, self.values)

    @property
    def matched_errors(self) -> Array:
        """Relative errors [k] of the partners' eigenvalues."""
        return _relative(self.pairs.values[self.partner], self.values)

    @property
    def predicted_gap(self) -> GapOutliers:
        """Outliers of K by the largest gap among its k leading eigenvalues."""
        return largest_gap(self.pairs.values, _rounding(self.pairs.values, float(np.finfo(self.vectors.dtype).eps)))

    @property
    def predicted_edge(self) -> EdgeOutliers:
        """Outliers of K beyond the edge of its own bulk."""
        return beyond_edge(self.pairs.values, self.pairs.rest())

    @property
    def trace_share(self) -> float:
        """Share of the trace in the k leading eigenvalues."""
        return float(self.values.sum() / self.trace) if self.trace else float("nan")

    @property
    def energy_share(self) -> float:
        """Share of the squared Frobenius norm in the k leading eigenvalues."""
        scale = power_of_two(float(np.abs(self.values).max()))
        return float(((self.values / scale) ** 2).sum() / (self.energy / scale**2)) if self.energy else float("nan")

    def to_xarray(self) -> xr.Dataset:
        """Labelled data set with dimensions pair, output, input, eigenvectors included; `from_xarray` reads it back."""
        import xarray as xr

        pairs = self.pairs
        attributes = {name: getattr(self, name) for name in ("layer", "kind", "curvature")}
        attributes |= {name: getattr(self, name) for name in ("trace", "trace_stderr", "energy", "energy_stderr")}
        attributes |= {"bias": int(self.bias), "classes": -1 if self.classes is None else self.classes}
        attributes |= {"gap_count": self.gap.count, "gap_ratio": self.gap.ratio, "gap_searched": self.gap.searched}
        attributes |= {"edge_count": -1 if self.edge.count is None else self.edge.count}
        attributes |= {"edge": self.edge.edge, "edge_threshold": self.edge.threshold}
        return xr.Dataset(
            {
                "eigenvalue": ("pair", self.values),
                "residual": ("pair", self.residuals),
                "converged": ("pair", self.converged),
                "eigenvector": (("pair", "output", "input"), self.vectors),
                "kronecker_eigenvalue": ("pair", pairs.values),
                "output_index": ("pair", pairs.output_index),
                "input_index": ("pair", pairs.input_index),
                "output_eigenvalue": ("output", pairs.output_values),
                "input_eigenvalue": ("input", pairs.input_values),
                "output_eigenvector": (("output", "output_eigenvectors"), pairs.output_vectors),
                "input_eigenvector": (("input", "input_eigenvectors"), pairs.input_vectors),
                "correspondence": (("pair", "kronecker_pair"), self.correspondence),
                "output_correspondence": (("pair", "output"), self.output_correspondence),
                "input_correspondence": (("pair", "input"), self.input_correspondence),
                "partner": ("pair", self.partner),
                "overlap": ("pair", self.overlap),
            },
            attrs={"record": "Eigenstructure", **attributes, **self.provenance.attributes()},
        )

    @classmethod
    def from_xarray(cls, dataset: xr.Dataset) -> Eigenstructure:
        """Inverse of `to_xarray`.

        Raises:
            InputError: the data set was not made by `to_xarray`.
        """
        require_xarray_kind(dataset, "Eigenstructure")
        arrays = {str(name): variable.to_numpy() for name, variable in dataset.data_vars.items()}
        given = dataset.attrs
        return cls(
            layer=str(given["layer"]),
            kind=str(given["kind"]),
            bias=bool(given["bias"]),
            curvature=str(given["curvature"]),
            classes=int(given["classes"]) if given["classes"] >= 0 else None,
            values=arrays["eigenvalue"],
            residuals=arrays["residual"],
            converged=arrays["converged"].astype(bool),
            vectors=arrays["eigenvector"],
            pairs=KroneckerPairs(
                values=arrays["kronecker_eigenvalue"],
                output_index=arrays["output_index"],
                input_index=arrays["input_index"],
                output_values=arrays["output_eigenvalue"],
                input_values=arrays["input_eigenvalue"],
                output_vectors=arrays["output_eigenvector"],
                input_vectors=arrays["input_eigenvector"],
            ),
            correspondence=arrays["correspondence"],
            output_correspondence=arrays["output_correspondence"],
            input_correspondence=arrays["input_correspondence"],
            partner=arrays["partner"],
            overlap=arrays["overlap"],
            trace=float(given["trace"]),
            trace_stderr=float(given["trace_stderr"]),
            energy=float(given["energy"]),
            energy_stderr=float(given["energy_stderr"]),
            gap=GapOutliers(int(given["gap_count"]), float(given["gap_ratio"]), int(given["gap_searched"])),
            edge=EdgeOutliers(
                int(given["edge_count"]) if given["edge_count"] >= 0 else None,
                float(given["edge"]),
                float(given["edge_threshold"]),
            ),
            provenance=Provenance.from_attributes(given),
        )


def layer_eigenstructure(
    objective: Objective,
    layer: str,
    k: int | None = None,
    curvature: str = "hessian",
    factors: KroneckerFactors | None = None,
    seed: int = 0,
    rtol: float | None = None,
    progress: Progress | None = None,
) -> Eigenstructure:
    """The k leading eigenpairs of a layer's Hessian, matched with those of its Kronecker approximation.

    Up to 512 parameters from the whole matrix; else by products, which do not pay for other layers, and with the
    sums over the bulk (trace, energy, edge) from 32 probes in the complement of the eigenvectors.

    Args:
        objective: the function of the parameters; layer: name of a module (see find_layer).
        k: number of pairs; unless told max(2 * outputs, 3 * C), so that what happens at k = width and at C - 1 lies in
            the middle of the curves, but at most 256 and P, and 32 if there are more than 256 classes.
        curvature: "hessian" or "gauss_newton".
        factors: of this layer, unless they are to be made here.
        seed: root of the random streams; rtol: of the residuals, see top_eigenpairs.
        progress: called with (products done, products expected).

    Raises:
        InputError: no such layer, a k beyond P, factors of another layer. As top_eigenpairs and kronecker_factors.

    Source: [W], arXiv:2010.04261; MATH.md, section 5.
    """
    require_choice("curvature", curvature, CURVATURES)
    found = find_layer(objective, layer)
    if k is not None:
        _require_k(k, found.size)
    if factors is None:
        factors = kronecker_factors(objective, layer, errors=False, seed=seed)
    if (factors.layer, factors.shape) != (layer, found.shape):
        raise InputError(
            f"factors must be those of layer {layer!r} with shape {found.shape}, got {factors.layer!r} with shape "
            f"{factors.shape}"
        )
    operator = CURVATURES[curvature](objective, layer)
    if k is None:
        k = usual_pairs(found, factors.classes)
    output, input = np.asarray(factors.output, dtype=np.float64), np.asarray(factors.input, dtype=np.float64)
    return _structure(operator, output, input, k, found, curvature, factors.classes, seed, rtol, progress)


def usual_pairs(layer: Layer, classes: int | None) -> int:
    """Number of eigenpairs of a layer unless told; see layer_eigenstructure."""
    if (classes or 0) > MOST_PAIRS:
        return min(layer.size, FEW_PAIRS)
    return min(layer.size, MOST_PAIRS, max(WIDTHS * layer.outputs, CLASSES * (classes or 0)))


def eigenstructure(
    matrix: Any,
    output: npt.ArrayLike,
    input: npt.ArrayLike,
    k: int,
    name: str = "matrix",
    classes: int | None = None,
    seed: int = 0,
    rtol: float | None = None,
    progress: Progress | None = None,
) -> Eigenstructure:
    """The same of any symmetric matrix beside output (x) input, such as a planted one: no network is needed.

    Args:
        matrix: operator or dense matrix [P, P], P = out * in, of row-major flattened matrices [out, in].
        output: [out, out], input: [in, in], symmetric.
        k: at most P; name: stands for the layer's; classes: if outliers are to be compared with C - 1.
        seed, rtol, progress: as in layer_eigenstructure.

    Raises:
        InputError: shapes that do not fit. As top_eigenpairs and kronecker_pairs.
    """
    A, B = np.asarray(output, dtype=np.float64), np.asarray(input, dtype=np.float64)
    operator = as_operator(matrix)
    rows, columns = (len(factor) if factor.ndim else 0 for factor in (A, B))
    if rows * columns != operator.shape[0]:
        raise InputError(
            f"the matrix has {operator.shape[0]} rows, but the factors are of {rows} and {columns}: their product must "
            "be the same"
        )
    _require_k(k, operator.shape[0])
    whole = Layer(name, "linear", rows, columns, bias=False, transposed=False, parameters=(name,))
    return _structure(operator, A, B, k, whole, "hessian", classes, seed, rtol, progress)


def _structure(
    operator: Operator,
    output: Array,
    input: Array,
    k: int,
    layer: Layer,
    curvature: str,
    classes: int | None,
    seed: int,
    rtol: float | None,
    progress: Progress | None,
) -> Eigenstructure:
    from scipy.optimize import linear_sum_assignment

    mu_U, nu_V = factor_eigenpairs("output", output), factor_eigenpairs("input", input)
    pairs = leading_pairs(mu_U, nu_V, k)
    matrix = as_operator(operator.dense()) if operator.shape[0] <= DENSE_SIZE else operator
    more = 0 if matrix is not operator else 2 * PROBES
    reported = None if progress is None else lambda done, planned: progress(done, planned + more)
    found = top_eigenpairs(matrix, k, rtol=rtol, seed=seed, progress=reported)
    rest, errors = _rest(matrix, found, exact=matrix is not operator, seed=seed)
    if progress is not None:
        progress(found.products + more, found.products + more)
    vectors = layer.matricized(found.vectors).contiguous().cpu().numpy()
    wide = vectors.astype(np.float64)
    correspondence = pairs.squared_products(wide)
    scale = power_of_two(float(np.abs(found.values).max()))
    energy = float(((found.values / scale) ** 2).sum()) * scale**2 + float(rest[1])
    return Eigenstructure(
        layer=layer.name,
        kind=layer.kind,
        bias=layer.bias,
        curvature=curvature,
        classes=classes,
        values=found.values,
        residuals=found.residuals,
        converged=found.converged,
        vectors=vectors,
        pairs=pairs,
        correspondence=correspondence,
        output_correspondence=output_shares(wide, mu_U[1]),
        input_correspondence=input_shares(wide, nu_V[1]),
        partner=linear_sum_assignment(-correspondence)[1].astype(np.int64),
        overlap=leading_overlaps(correspondence),
        trace=float(found.values.sum() + rest[0]),
        trace_stderr=float(errors[0]),
        energy=energy,
        energy_stderr=float(errors[1]),
        gap=largest_gap(
            found.values,
            _rounding(found.values, torch.finfo(operator.dtype).eps),
            len(found.values) == operator.shape[0],
        ),
        edge=beyond_edge(found.values, rest),
        provenance=Provenance(
            engine=f"eigenstructure: {found.provenance.engine}",
            dtype=found.provenance.dtype,
            device=found.provenance.device,
            data_fingerprint=operator.data_fingerprint,
            seed=seed,
        ),
    )


def _rest(operator: Operator, found: Eigenpairs, exact: bool, seed: int) -> tuple[Array, Array]:
    """Sums of lambda, lambda^2, lambda^3 over all but the eigenvalues found, and the standard errors of these sums.

    Traces of (Q H)^j, where Q projects on the complement of the eigenvectors: over all unit vectors or random signs.
    """
    size = operator.shape[0]
    if exact:
        rows = torch.eye(size, dtype=operator.dtype, device=operator.device)
    else:
        signs = [rademacher(size, stream(seed, "eigenstructure: bulk", probe)) for probe in range(PROBES)]
        rows = torch.stack(signs).to(operator.device, operator.dtype)
    V = found.vectors
    scale = power_of_two(float(np.abs(found.values).max()))
    images = _projected(finite_products(operator, rows) / scale, V)
    twice = _projected(finite_products(operator, images) / scale, V)
    terms = torch.stack([_inner(rows, images), _inner(images, images), _inner(images, twice)]).cpu().numpy()
    units = scale ** np.arange(1, 4)
    if exact:
        return terms.sum(axis=1) * units, np.zeros(3)
    return terms.mean(axis=1) * units, terms.std(axis=1, ddof=1) / PROBES**0.5 * units


def _projected(rows: Tensor, V: Tensor) -> Tensor:
    return rows - (rows @ V) @ V.T


def _inner(first: Tensor, second: Tensor) -> Tensor:
    return (first.double() * second.double()).sum(dim=1)


def _rounding(values: Array, eps: float) -> float:
    return ROUNDINGS * eps * float(np.abs(values).max())


def _relative(predicted: Array, truth: Array) -> Array:
    found: Array = (predicted - truth) / np.where(truth == 0, np.nan, truth)
    return found


def _require_k(k: object, size: int) -> None:
    require_positive_int("k", k)
    assert isinstance(k, int | np.integer)
    if k > size:
        raise InputError(f"k must be at most the number of parameters P = {size}, got {k}")
