"""Spectra of the diagonal blocks of a matrix, and how much they differ: Jensen-Shannon distances between blocks.

Zhang et al. (arXiv:2402.16788) call a Hessian heterogeneous whose blocks have different spectra, and find that the
mean of these distances tells where Adam is needed. Blocks of a Gauss-Newton matrix have exact spectra through the dual
form (MATH.md, section 3): with W_i the columns of its root that belong to block i, the non-zero eigenvalues of
G_ii = W_i^T W_i are those of the Gram matrix W_i W_i^T. All others are known exactly if small, else by stochastic
Lanczos quadrature, each block having probes of its own: equal ones would make the errors of equal blocks cancel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hesscope.core.checks import require_choice, require_positive_int
from hesscope.core.errors import DataError, InputError
from hesscope.core.memory import available_bytes, require_memory
from hesscope.core.records import Provenance, require_xarray_kind
from hesscope.core.rng import stream
from hesscope.estimate.block_grams import BlockColumns, BlockRows
from hesscope.estimate.density import SpectralDensity
from hesscope.estimate.dual import EXACT_PARTS, all_rows, strata_root
from hesscope.estimate.lanczos import power_of_two
from hesscope.estimate.spectral_density import spectral_density
from hesscope.estimate.spectrum_distance import jensen_shannon_distance
from hesscope.estimate.symmetry import require_symmetric
from hesscope.operators import EmpiricalFisher, GaussNewton, Operator, as_operator
from hesscope.operators.operator import Combination
from hesscope.operators.root import Root, root_of
from hesscope.partition.partition import Partition

if TYPE_CHECKING:
    import xarray as xr

METHODS = ("auto", "exact", "dual", "quadrature")
DEFAULT_PROBES, DEFAULT_STEPS = 8, 30

# Up to this many multiply-adds, about ten seconds, "auto" takes all rows of the root and decomposes all Gram matrices.
DUAL_WORK = 2**38

# An eigendecomposition takes so many multiply-adds for the third power of the size.
EIGENVALUES = 4

# Gram matrices of blocks of one size are made and decomposed together up to so many bytes.
GRAM_BYTES = 2**27

Array = npt.NDArray[np.float64]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class BlockSpectra:
    """Spectra of the B diagonal blocks of a matrix, and the Jensen-Shannon distances between them.

    Distances lie between 0 (equal spectra) and 1 (nowhere in common); see jensen_shannon_distance.

    Attributes:
        labels, sizes: of the blocks.
        densities: B spectra; exact ones hold all eigenvalues of their block, others the nodes and weights of a
            quadrature.
        distances: [B, B], 0 on the diagonal; distances_stderr: [B, B] their standard errors, 0 between exact spectra.
        heterogeneity: mean distance over all pairs of blocks; heterogeneity_stderr: its standard error. nan for a
            single block.
        products: of the matrix or its blocks with vectors (0 in the dual form); provenance: how it was made; message:
            what happened, one line.
    """

    labels: tuple[str, ...]
    sizes: tuple[int, ...]
    densities: tuple[SpectralDensity, ...] = field(repr=False)
    distances: Array = field(repr=False)
    distances_stderr: Array = field(repr=False)
    heterogeneity: float
    heterogeneity_stderr: float
    products: int
    provenance: Provenance
    message: str

    def eigenvalues(self, label: str) -> Array:
        """All eigenvalues [size] of a block, ascending.

        Raises:
            InputError: no such block, or only a quadrature of it is known.
        """
        if label not in self.labels:
            raise InputError(f"no block is named {label!r}; the blocks are {', '.join(self.labels[:10])}")
        density = self.densities[self.labels.index(label)]
        if not density.exact:
            raise InputError(f"block {label!r} is known by a quadrature only; use method='exact'")
        return np.sort(density.nodes[0][density.weights[0] > 0])

    def to_xarray(self) -> xr.Dataset:
        """Data set with dimensions block, other, probe and step (padded with weight 0); `from_xarray` reads it."""
        import xarray as xr

        probes = max(density.nodes.shape[0] for density in self.densities)
        steps = max(density.nodes.shape[1] for density in self.densities)
        nodes, weights = np.zeros((2, len(self.labels), probes, steps))
        for row, density in enumerate(self.densities):
            shape = density.nodes.shape
            nodes[row, : shape[0], : shape[1]], weights[row, : shape[0], : shape[1]] = density.nodes, density.weights
        pair, node = ("block", "other"), ("block", "probe", "step")
        variables: dict[str, tuple[tuple[str, ...], npt.NDArray[np.generic]]] = {
            "node": (node, nodes),
            "weight": (node, weights),
            "distance": (pair, self.distances),
            "distance_stderr": (pair, self.distances_stderr),
            "block_size": (("block",), np.asarray(self.sizes)),
            "block_probes": (("block",), np.array([density.nodes.shape[0] for density in self.densities])),
            "block_steps": (("block",), np.array([density.nodes.shape[1] for density in self.densities])),
            "block_exact": (("block",), np.array([int(density.exact) for density in self.densities])),
            "block_products": (("block",), np.array([density.products for density in self.densities])),
            "block_engine": (("block",), _texts(density.provenance.engine for density in self.densities)),
            "block_message": (("block",), _texts(density.message for density in self.densities)),
        }
        labels = np.asarray(self.labels, dtype=object)
        return xr.Dataset(
            variables,
            coords={"block": labels, "other": labels},
            attrs={
                "record": "BlockSpectra",
                "heterogeneity": self.heterogeneity,
                "heterogeneity_stderr": self.heterogeneity_stderr,
                "products": self.products,
                "message": self.message,
                **self.provenance.attributes(),
            },
        )

    @classmethod
    def from_xarray(cls, dataset: xr.Dataset) -> BlockSpectra:
        """Inverse of `to_xarray`."""
        require_xarray_kind(dataset, "BlockSpectra")
        provenance = Provenance.from_attributes(dataset.attrs)
        columns = {name: dataset[name].to_numpy() for name in dataset.data_vars}
        densities = []
        for row, size in enumerate(columns["block_size"]):
            probes, steps = int(columns["block_probes"][row]), int(columns["block_steps"][row])
            exact = bool(columns["block_exact"][row])
            densities.append(
                SpectralDensity(
                    nodes=columns["node"][row, :probes, :steps],
                    weights=columns["weight"][row, :probes, :steps],
                    dimension=int(size),
                    exact=exact,
                    products=int(columns["block_products"][row]),
                    provenance=replace(provenance, engine=str(columns["block_engine"][row])),
                    message=str(columns["block_message"][row]),
                )
            )
        return cls(
            labels=tuple(str(label) for label in dataset["block"].to_numpy()),
            sizes=tuple(int(size) for size in columns["block_size"]),
            densities=tuple(densities),
            distances=columns["distance"],
            distances_stderr=columns["distance_stderr"],
            heterogeneity=float(dataset.attrs["heterogeneity"]),
            heterogeneity_stderr=float(dataset.attrs["heterogeneity_stderr"]),
            products=int(dataset.attrs["products"]),
            provenance=provenance,
            message=str(dataset.attrs["message"]),
        )


@dataclass(frozen=True, eq=False)
class Distances:
    """Distances [B, B] between spectra with standard errors, and their mean over pairs with its own."""

    values: Array
    stderr: Array
    mean: float
    mean_stderr: float


def block_spectra(
    matrix: Any,
    partition: Partition,
    method: str = "auto",
    probes: int | None = None,
    steps: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> BlockSpectra:
    """Spectrum of every diagonal block of a symmetric matrix, and how heterogeneous they are.

    Args:
        matrix: a symmetric operator or dense matrix [P, P] (see as_operator).
        partition: B blocks of the P parameters.
        method: "exact" makes every block by products with all of its columns; "dual" takes the rows of a Gauss-Newton
            matrix's root, exact, too; "quadrature" takes stochastic Lanczos quadrature, exact for blocks of no more
            than `steps` parameters. "auto" is "dual" where that is a matter of seconds, else "exact" for blocks of no
            more than probes * steps parameters and "quadrature" for the others.
        probes, steps: of the quadratures, 8 and 30 unless told; see spectral_density.
        seed: root of the random streams, one for every block's label; equal seeds give equal numbers.
        progress: called with (parameters of the blocks done, P).

    Raises:
        InputError: a value that does not fit, a matrix that is not symmetric or, for "dual", without a known root.
        PartitionError: the partition does not fit the matrix.
        TooLargeError: a block or the rows of the root would not fit in memory.
        DataError: a product is not finite.
    """
    operator = as_operator(matrix)
    partition.require_fits(operator.shape[0])
    require_choice("method", method, METHODS)
    for name, value in (("probes", probes), ("steps", steps)):
        if value is not None:
            require_positive_int(name, value)
            if method in ("exact", "dual"):
                raise InputError(f"method {method!r} takes no {name}; leave {name} out or use method='quadrature'")
    if probes == 1:
        raise InputError("probes must be at least 2, so that there is a standard error")
    count, length = probes or DEFAULT_PROBES, steps or DEFAULT_STEPS
    asked = require_symmetric(operator)
    root = _dual_root(operator, partition, method)
    if root is not None:
        densities = _dual_spectra(root, operator, partition, progress)
    else:
        limit = {"exact": operator.shape[0], "quadrature": length}.get(method, count * length)
        densities = _spectra_by_products(operator, partition, limit, count, length, seed, progress)
    random = any(not density.exact for density in densities)
    exact = sum(density.exact for density in densities)
    distances = spectra_distances(densities)
    how = "dual" if root is not None else "exact" if not random else f"quadrature, {count} probes of {length} steps"
    return BlockSpectra(
        labels=partition.labels,
        sizes=partition.sizes,
        densities=tuple(densities),
        distances=distances.values,
        distances_stderr=distances.stderr,
        heterogeneity=distances.mean,
        heterogeneity_stderr=distances.mean_stderr,
        products=asked + sum(density.products for density in densities),
        provenance=_provenance(operator, f"block spectra: {how}", seed if random else None),
        message=f"{exact} of {len(densities)} blocks exact" + (f", the others by {how}" if random else ""),
    )


def spectra_distances(densities: Sequence[SpectralDensity]) -> Distances:
    """Jensen-Shannon distances between all pairs of spectra, and their mean over pairs.

    Standard errors are the jackknife's: probe k of every estimated spectrum is left out in turn. Bandwidths stay those
    of the whole. Two estimates of one spectrum have a distance, too, that falls with the root of the number of probes:
    small distances are biased upwards by noise.

    Raises:
        InputError: estimated spectra with different numbers of probes.
    """
    probes = {density.probes for density in densities if not density.exact}
    if len(probes) > 1:
        raise InputError(
            f"estimated spectra must share one number of probes, got {', '.join(map(str, sorted(probes)))}"
        )
    left_out = probes.pop() if probes else 0
    count = len(densities)
    widths = [density.default_bandwidth for density in densities]
    replicas = [[without_probe(density, left) for density in densities] for left in range(left_out)]
    values, without = np.zeros((count, count)), np.zeros((left_out, count, count))
    for i, j in combinations(range(count), 2):
        width = max(widths[i], widths[j])
        if width == 0:
            continue  # two zero matrices
        values[i, j] = values[j, i] = jensen_shannon_distance(densities[i], densities[j], width)
        if densities[i].exact and densities[j].exact:
            without[:, i, j] = without[:, j, i] = values[i, j]
            continue
        for left, others in enumerate(replicas):
            without[left, i, j] = without[left, j, i] = jensen_shannon_distance(others[i], others[j], width)
    pairs = count * (count - 1)
    scale = left_out - 1
    stderr = np.sqrt(scale * without.var(axis=0)) if left_out else np.zeros((count, count))
    means = without.sum(axis=(1, 2)) / pairs if pairs else np.zeros(left_out)
    return Distances(
        values=values,
        stderr=stderr,
        mean=float(values.sum() / pairs) if pairs else float("nan"),
        mean_stderr=(float(np.sqrt(scale * means.var())) if left_out else 0.0) if pairs else float("nan"),
    )


def without_probe(density: SpectralDensity, left: int) -> SpectralDensity:
    """The estimate of all probes but one; an exact spectrum has no probes to leave out."""
    if density.exact:
        return density
    chosen = np.arange(density.probes) != left
    return replace(density, nodes=density.nodes[chosen], weights=density.weights[chosen])


# --- dual -------------------------------------------------------------------------------------------------------------


def _dual_root(operator: Operator, partition: Partition, method: str) -> Root | None:
    """The root, if the spectra are to be made from it."""
    if method not in ("auto", "dual"):
        return None
    inner = operator.terms[0][1] if isinstance(operator, Combination) and len(operator.terms) == 1 else operator
    if method == "auto" and not isinstance(inner, (GaussNewton, EmpiricalFisher)):
        return None
    root = strata_root(root_of(operator))
    if method == "dual":
        return root
    try:
        rows = sum(part.live for part in root.survey())
    except InputError:  # no real root: products do as well
        return None
    sizes = np.minimum(np.asarray(partition.sizes, dtype=np.float64), rows)
    work = rows * sizes @ np.asarray(partition.sizes) + EIGENVALUES * (sizes**3).sum()
    fits = _dual_bytes(rows, operator.shape[0]) < available_bytes(operator.device) / 2
    return root if work <= DUAL_WORK and fits else None


def _dual_bytes(rows: int, parameters: int) -> int:
    """Memory for the rows, a copy of them for blocks that are scattered, and Gram matrices."""
    return 16 * rows * parameters + 4 * GRAM_BYTES


def _dual_spectra(
    root: Root, operator: Operator, partition: Partition, progress: Progress | None
) -> list[SpectralDensity]:
    root = replace(root, pieces=EXACT_PARTS)
    counts = [part.live for part in root.survey()]
    rows, parameters = sum(counts), operator.shape[0]
    needed = _dual_bytes(rows, parameters)
    require_memory(needed, operator.device, f"the {rows} rows of the root", "method='quadrature'")
    W = all_rows(root, counts, range(rows))
    scale = power_of_two(float(W.abs().max())) if rows else 1.0
    blocks = BlockColumns.of(partition, operator.device).split(W.div_(scale))
    factor = root.factor * scale**2
    provenance = _provenance(operator, "spectral density: dual", None)
    found: dict[int, SpectralDensity] = {}
    done = 0
    for numbers, values in _eigenvalues(blocks):
        for number, own in zip(numbers, values * factor, strict=True):
            found[number] = _exact_density(own, 0, provenance, f"all {len(own)} eigenvalues, from {rows} rows")
            done += len(own)
        if progress is not None:
            progress(done, parameters)
    return [found[number] for number in range(len(partition))]


def _eigenvalues(blocks: BlockRows) -> list[tuple[list[int], Array]]:
    """Eigenvalues [n, size] of W_i^T W_i for some blocks at a time, from the smaller of the two Gram matrices."""
    results = []
    for group, part in zip(blocks.columns.groups, blocks.parts, strict=True):
        small = min(group.size, blocks.count)
        step = max(1, GRAM_BYTES // (8 * max(small, 1) ** 2))
        for some, numbers in zip(torch.split(part, step), torch.split(group.numbers, step), strict=True):
            gram = some.mT @ some if group.size <= blocks.count else some @ some.mT
            # A Gram matrix has no negative eigenvalue: what is left of rounding below zero is zero.
            values = torch.linalg.eigvalsh(gram.cpu()).clamp(min=0).numpy()
            padded = np.concatenate([np.zeros((len(some), group.size - small)), values], axis=1)
            results.append((numbers.tolist(), padded))
    return results


# --- by products ------------------------------------------------------------------------------------------------------


def _spectra_by_products(
    operator: Operator,
    partition: Partition,
    limit: int,
    probes: int,
    steps: int,
    seed: int,
    progress: Progress | None,
) -> list[SpectralDensity]:
    """Dense blocks of up to `limit` parameters, quadratures of the others."""
    densities, done = [], 0
    for label, members in zip(partition.labels, partition.members(), strict=True):
        block = operator.restrict(members)
        if len(members) <= limit:
            densities.append(_dense_spectrum(block))
        else:
            own = int(stream(seed, "block_spectra", label).integers(2**62))
            densities.append(spectral_density(block, probes, steps, own))
        done += len(members)
        if progress is not None:
            progress(done, operator.shape[0])
    return densities


def _dense_spectrum(block: Operator) -> SpectralDensity:
    matrix: Tensor = block.dense().cpu().double()
    if not bool(torch.isfinite(matrix).all()):
        raise DataError("a product of the operator is not finite: look for nan or overflow in the loss or the matrix")
    scale = power_of_two(float(matrix.abs().max()))
    values = torch.linalg.eigvalsh((matrix + matrix.T) / (2 * scale)).numpy() * scale
    size = len(values)
    return _exact_density(values, size, _provenance(block, "spectral density: dense", None), f"all {size} eigenvalues")


# --- both -------------------------------------------------------------------------------------------------------------


def _exact_density(values: Array, products: int, provenance: Provenance, message: str) -> SpectralDensity:
    return replace(SpectralDensity.from_eigenvalues(values, provenance), products=products, message=message)


def _provenance(operator: Operator, how: str, seed: int | None) -> Provenance:
    return Provenance(
        engine=f"{how}; {operator.engine}",
        dtype=str(operator.dtype).removeprefix("torch."),
        device=str(operator.device),
        data_fingerprint=operator.data_fingerprint,
        seed=seed,
    )


def _texts(values: Any) -> npt.NDArray[np.object_]:
    return np.asarray(list(values), dtype=object)
