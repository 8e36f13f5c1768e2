"""How block-diagonal a symmetric matrix is in each of several partitions, however fine, and compared with chance."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hesscope.core.checks import require_choice, require_positive_int
from hesscope.core.errors import InputError
from hesscope.core.memory import available_bytes, require_memory
from hesscope.core.records import Provenance, require_xarray_kind
from hesscope.estimate.eigenpairs import top_eigenpairs
from hesscope.estimate.energies import Interval
from hesscope.estimate.lanczos import power_of_two
from hesscope.estimate.low_rank import LowRank
from hesscope.estimate.pinching import Pinched, Scaled, by_block, piece_of_block, pinched_samples
from hesscope.estimate.products import CountedProducts, Progress
from hesscope.estimate.symmetry import require_symmetric
from hesscope.operators import Operator, as_operator
from hesscope.partition.partition import Partition

if TYPE_CHECKING:
    import xarray as xr

Array = npt.NDArray[np.float64]

METHODS = ("auto", "exact", "probes")
# Up to this many parameters the whole matrix takes seconds.
EXACT_SIZE = 2048
# Independent groups of probes, from whose spread the errors are had: Student's distribution with seven degrees.
GROUPS, DEFAULT_PROBES = 8, 64
# Columns of the sketch where they fit into a share of the memory that is left, with the vectors each takes while it is
# made, in float64; and the eigenvectors of it that a spectral norm is measured with.
SKETCH, LEADING, MEMORY_SHARE, VECTORS_PER_COLUMN = 16, 8, 0.25, 8
# Accuracy of the eigenvector that a spectral norm is measured along; the norm's own error is its square.
SPECTRAL_RTOL = 0.03
# Products that the norm of the matrix may take, and mostly does.
MOST_NORM, TYPICAL_NORM = 60, 20


@dataclass(frozen=True)
class Figure:
    """A number and its standard error, 0 where exact; degrees of freedom of the error."""

    value: float
    stderr: float = 0.0
    degrees: int = 0

    def interval(self, level: float = 0.95) -> Interval:
        """Student's interval; a point if exact."""
        from scipy.special import stdtrit

        half = float(stdtrit(self.degrees, (1 + level) / 2)) * self.stderr if self.degrees else 0.0
        return Interval(np.asarray(self.value - half), np.asarray(self.value + half))

    def __str__(self) -> str:
        return f"{self.value:.3g}" + (f" ± {self.stderr:.1g}" if self.degrees else "")


@dataclass(frozen=True, eq=False)
class Diagonality:
    """What the diagonal blocks of one partition keep of a symmetric matrix H [P, P].

    Attributes:
        blocks: how many; largest: parameters in the largest.
        freedom: entries that a block-diagonal matrix has to store, sum_j P_j (P_j + 1) / 2.
        share_of_entries: s = sum_j P_j^2 / P^2, what the blocks keep of a matrix with equal entries.
        energy: D = sum_j ||H_jj||^2 / ||H||^2 (MATH.md, section 1).
        chance: sum_j r_j^2, where r_j is the share of the energy in the rows of block j: what the blocks keep of a
            dense matrix whose energy is spread over rows and columns as H's is (of any matrix of rank one, exactly).
        beyond_chance: (D - chance) / (1 - chance): 1 for a block-diagonal matrix, about 0 for a dense one (Cohen's
            kappa, Educational and Psychological Measurement 20, 1960). nan for a single block.
        bits: D log2(D / s) + (1 - D) log2((1 - D) / (1 - s)), negative where D < s: how much more the partition tells
            about where the energy is than that it is everywhere. It grows with the energy kept, and with every degree
            of freedom spared.
        frobenius_error: ||H - bd(H)|| / ||H|| in the Frobenius norm, sqrt(1 - D).
        spectral_error: the same in the spectral norm; where estimated, |x.(H - bd(H)) x| / ||H|| for the leading
            eigenvector x of what a sketch of H has of H - bd(H): but for its standard error, a lower bound. (||H|| is
            the leading eigenvalue, good to a part in a thousand.)
        curvature_kept: g.bd(H) g / g.H g for the vector g that was given; nan without one.
        tensor_energy: [T] energy in the blocks within each tensor; tensor_chance, tensor_entries: [T] chance and share
            of entries among the tensor's own rows and columns. nan where blocks reach into two tensors.
        replicates: leave-one-group-out values [G] of `bits`, and [G, T] of tensor_energy; empty if exact.
    """

    blocks: int
    largest: int
    freedom: float
    share_of_entries: float
    energy: Figure
    chance: Figure
    beyond_chance: Figure
    bits: Figure
    frobenius_error: Figure
    spectral_error: Figure
    curvature_kept: Figure
    tensor_energy: Array = field(repr=False)
    tensor_chance: Array = field(repr=False)
    tensor_entries: Array = field(repr=False)
    replicates: tuple[Array, Array] = field(repr=False)


FIGURES = ("energy", "chance", "beyond_chance", "bits", "frobenius_error", "spectral_error", "curvature_kept")
OF_TENSORS = ("tensor_energy", "tensor_chance", "tensor_entries")
COUNTS = ("blocks", "largest", "freedom", "share_of_entries")


@dataclass(frozen=True, eq=False)
class PartitionComparison:
    """Several partitions of one matrix, by the energy that their diagonal blocks keep.

    Attributes:
        rows: name -> what the partition keeps; tensors: names of the parameter tensors, where they were given.
        products: of the matrix with a vector; provenance: how it was made.
    """

    rows: Mapping[str, Diagonality]
    tensors: tuple[str, ...]
    products: int
    provenance: Provenance

    def to_xarray(self) -> xr.Dataset:
        """Data set with the dimensions partition, tensor and replicate; `from_xarray` reads it back."""
        import xarray as xr

        each = list(self.rows.values())
        variables: dict[str, Any] = {}
        for name in COUNTS:
            variables[name] = ("partition", [getattr(row, name) for row in each])
        for name in FIGURES:
            variables[name] = ("partition", [getattr(row, name).value for row in each])
            variables[f"{name}_stderr"] = ("partition", [getattr(row, name).stderr for row in each])
        for name in OF_TENSORS:
            variables[name] = (("partition", "tensor"), np.array([getattr(row, name) for row in each]))
        variables["bits_replicates"] = (("partition", "replicate"), np.array([row.replicates[0] for row in each]))
        variables["tensor_energy_replicates"] = (
            ("partition", "replicate", "tensor"),
            np.array([row.replicates[1] for row in each]),
        )
        coordinates = {
            "partition": np.asarray(list(self.rows), dtype=object),
            "tensor": np.asarray(self.tensors, dtype=object),
        }
        degrees = each[0].energy.degrees
        attributes = {"record": "PartitionComparison", "products": self.products, "degrees": degrees}
        return xr.Dataset(variables, coordinates, {**attributes, **self.provenance.attributes()})

    @classmethod
    def from_xarray(cls, dataset: xr.Dataset) -> PartitionComparison:
        """Inverse of `to_xarray`."""
        require_xarray_kind(dataset, "PartitionComparison")
        degrees, rows = int(dataset.attrs["degrees"]), {}
        for number, name in enumerate(dataset["partition"].to_numpy()):
            one = dataset.isel(partition=number)
            fields: dict[str, Any] = {
                key: Figure(float(one[key]), float(one[f"{key}_stderr"]), degrees) for key in FIGURES
            }
            fields |= {key: one[key].to_numpy() for key in OF_TENSORS}
            rows[str(name)] = Diagonality(
                blocks=int(one["blocks"]),
                largest=int(one["largest"]),
                freedom=float(one["freedom"]),
                share_of_entries=float(one["share_of_entries"]),
                **fields,
                replicates=(one["bits_replicates"].to_numpy(), one["tensor_energy_replicates"].to_numpy()),
            )
        return cls(
            rows=rows,
            tensors=tuple(str(name) for name in dataset["tensor"].to_numpy()),
            products=int(dataset.attrs["products"]),
            provenance=Provenance.from_attributes(dataset.attrs),
        )


def compare_partitions(
    matrix: Any,
    partitions: Mapping[str, Partition],
    vector: Tensor | None = None,
    tensors: Mapping[str, int] | None = None,
    method: str = "auto",
    probes: int = DEFAULT_PROBES,
    seed: int = 0,
    progress: Progress | None = None,
) -> PartitionComparison:
    """What the diagonal blocks of each partition keep of a symmetric matrix.

    Args:
        matrix: an operator or dense matrix [P, P] (see as_operator).
        partitions: name -> partition of the P parameters; the number of blocks costs next to nothing.
        vector: [P], such as the gradient: how much of its curvature is kept.
        tensors: name -> size of consecutive pieces of the parameter vector, such as the parameter tensors; energies
            are then split by them, where no block reaches into two.
        method: "exact" makes the whole matrix; "probes" takes, for every partition, `probes` products (and some for
            the vector and the spectral norm), after 32 for a sketch; "auto" is exact up to 2048 parameters.
        probes: a multiple of 8, at least 16: eight independent groups, whose spread gives the errors.
        seed: root of the random streams; progress: called with (products done, products in all).

    Raises:
        InputError: an unknown method, no partition, numbers out of range, a vector or tensors that do not fit.
        PartitionError: a partition does not fit the matrix. ModelError: the matrix is not symmetric.
        TooLargeError: the matrix, or the probes of a group, would not fit in memory. DataError: a product is not
            finite.
    """
    operator = as_operator(matrix)
    require_choice("method", method, METHODS)
    require_positive_int("probes", probes)
    if probes % GROUPS or probes < 2 * GROUPS:
        raise InputError(f"probes must be a multiple of {GROUPS}, at least {2 * GROUPS}, got {probes}")
    size = operator.shape[0]
    if not isinstance(partitions, Mapping) or not partitions:
        raise InputError("partitions must be a non-empty dict of name -> hesscope.Partition")
    for name, partition in partitions.items():
        if not isinstance(partition, Partition):
            raise InputError(f"partitions[{name!r}] must be a hesscope.Partition, got {type(partition).__name__}")
        partition.require_fits(size)
    _require_vector(vector, operator)
    pieces = {"": size} if tensors is None else _checked_tensors(tensors, size)
    require_symmetric(operator)
    names = tuple(pieces) if tensors is not None else ()
    counted = CountedProducts(operator, progress)
    exact = method == "exact" or (method == "auto" and size <= EXACT_SIZE)
    given = (operator, partitions, vector, tuple(pieces.values()))
    rows = dict(_exact(*given, counted) if exact else _estimated(*given, probes, seed, counted))
    rows = {name: rows[name] for name in partitions}
    if tensors is None:
        rows = {name: _without_tensors(row) for name, row in rows.items()}
    return PartitionComparison(
        rows=rows,
        tensors=names,
        products=counted.done,
        provenance=Provenance(
            engine=f"partitions compared: {'exact' if exact else 'signs by block'}; {operator.engine}",
            dtype=str(operator.dtype).removeprefix("torch."),
            device=str(operator.device),
            data_fingerprint=operator.data_fingerprint,
            seed=None if exact else seed,
        ),
    )


def _require_vector(vector: object, operator: Operator) -> None:
    size = operator.shape[0]
    if vector is None:
        return
    if not isinstance(vector, Tensor) or vector.shape != (size,) or vector.dtype != operator.dtype:
        given = f"{vector.dtype} {list(vector.shape)}" if isinstance(vector, Tensor) else type(vector).__name__
        raise InputError(f"vector must be {operator.dtype} of shape [{size}], got {given}")
    if not bool(vector.isfinite().all()):
        raise InputError("vector has entries that are not finite")


def _checked_tensors(tensors: object, size: int) -> dict[str, int]:
    if not isinstance(tensors, Mapping) or not all(isinstance(n, int) and n > 0 for n in tensors.values()):
        raise InputError("tensors must be a dict of name -> number of parameters, each at least 1")
    if sum(tensors.values()) != size:
        raise InputError(f"tensors must cover the {size} parameters, got {sum(tensors.values())}")
    return {str(name): count for name, count in tensors.items()}


def _without_tensors(row: Diagonality) -> Diagonality:
    bits, energies = row.replicates
    none = np.empty(0)
    return replace(row, tensor_energy=none, tensor_chance=none, tensor_entries=none, replicates=(bits, energies[:, :0]))


# --- exactly ----------------------------------------------------------------------------------------------------------


def _exact(
    operator: Operator,
    partitions: Mapping[str, Partition],
    vector: Tensor | None,
    pieces: tuple[int, ...],
    products: CountedProducts,
) -> Iterator[tuple[str, Diagonality]]:
    products.expect(operator.shape[0])
    H = operator.dense().double()
    scale = float(H.abs().max())
    H = H / scale if scale > 0 else H
    products.done = operator.shape[0]
    norm = float(torch.linalg.matrix_norm(H, 2))
    tensor = torch.repeat_interleave(torch.arange(len(pieces)), torch.tensor(pieces)).to(H.device)
    within = (H * (tensor[:, None] == tensor)).square().sum(dim=1)
    for name, partition in partitions.items():
        assignment = torch.from_numpy(partition.assignment.astype(np.int64)).to(H.device)
        kept = H * (assignment[:, None] == assignment)
        energies = kept.square().sum(dim=1)
        tensor_energy = np.array([float(part.sum()) * scale * scale for part in torch.split(energies, list(pieces))])
        rows, own_rows = (
            by_block(each, assignment, len(partition)).cpu().numpy()[None] for each in (H.square().sum(dim=1), within)
        )
        spectral = _over(float(torch.linalg.matrix_norm(H - kept, 2)), norm)
        curvature = float("nan")
        if vector is not None:
            g = vector.double()
            curvature = _over(float(g @ kept @ g), float(g @ H @ g))
        D, chance, beyond, bits = _figures(np.array([float(energies.sum())]), rows, partition)
        yield (
            name,
            _record(
                partition,
                {
                    "energy": Figure(D),
                    "chance": Figure(chance),
                    "beyond_chance": Figure(beyond),
                    "bits": Figure(bits),
                    "frobenius_error": Figure(float(np.sqrt(max(1 - D, 0.0)))),
                    "spectral_error": Figure(spectral),
                    "curvature_kept": Figure(curvature),
                },
                tensor_energy if _own_pieces(partition, pieces) == pieces else np.full(len(pieces), np.nan),
                own_rows,
                pieces,
                (np.empty(0), np.empty((0, len(pieces)))),
            ),
        )


# --- from random signs ------------------------------------------------------------------------------------------------


def _estimated(
    operator: Operator,
    partitions: Mapping[str, Partition],
    vector: Tensor | None,
    pieces: tuple[int, ...],
    probes: int,
    seed: int,
    products: CountedProducts,
) -> Iterator[tuple[str, Diagonality]]:
    size, each = operator.shape[0], probes // GROUPS
    item = torch.empty(0, dtype=operator.dtype).element_size()
    require_memory(5 * each * size * item, operator.device, f"{each} probes of {size} parameters", "fewer probes")
    width = int(MEMORY_SHARE * available_bytes(operator.device)) // (VECTORS_PER_COLUMN * 8 * size)
    width = max(1, min(SKETCH, size // 4, width))
    vectors = 1 if vector is None else 2
    whole = Partition(tuple(map(str, range(len(pieces)))), np.repeat(np.arange(len(pieces)), pieces).astype(np.int32))
    twin = next((name for name, own in partitions.items() if np.array_equal(own.assignment, whole.assignment)), None)
    own = len(pieces) > 1 and twin is None
    products.expect(2 * width + (len(partitions) + own) * (GROUPS * (each + vectors) + 1) + TYPICAL_NORM)
    low_rank = LowRank.of(operator, width, seed, products)
    # Nothing below depends on the matrix's scale, so that squares neither vanish nor burst.
    scale = power_of_two(float(low_rank.values.abs().max()))
    low_rank = low_rank.scaled(1 / scale)
    matrix = Scaled(products, low_rank, 1 / scale)
    leading = top_eigenpairs(operator, 1, which="LM", rtol=SPECTRAL_RTOL, seed=seed, max_products=MOST_NORM)
    norm = abs(float(leading.values[0])) / scale
    products.done += leading.products
    gHg = None if vector is None else matrix.form(vector)
    plan = (GROUPS, each, seed)
    # Energies of rows within the tensors: what chance within a tensor goes by.
    inner = pinched_samples(matrix, whole, pieces, plan, "tensors", (), entries=True).entries if own else None
    for name in sorted(partitions, key=lambda name: name != twin):
        partition = partitions[name]
        x = _leading(low_rank.truncated(LEADING), partition, seed)
        given = (x,) if vector is None else (x, vector)
        entries = name == twin and len(pieces) > 1
        samples = pinched_samples(matrix, partition, _own_pieces(partition, pieces), plan, name, given, entries)
        inner = samples.entries if entries else inner
        yield name, _from_samples(samples, partition, pieces, inner, (matrix.form(x), norm, gHg), scale)


def _own_pieces(partition: Partition, pieces: tuple[int, ...]) -> tuple[int, ...]:
    """The pieces, if each block lies in one of them; else all together."""
    tensor = np.repeat(np.arange(len(pieces)), pieces)
    least = np.full(len(partition), len(pieces))
    most = np.full(len(partition), -1)
    np.minimum.at(least, partition.assignment, tensor)
    np.maximum.at(most, partition.assignment, tensor)
    return pieces if (least == most).all() else (sum(pieces),)


def _leading(low_rank: LowRank, partition: Partition, seed: int) -> Tensor:
    """Leading eigenvector [P] of A - bd(A), A of low rank; any vector if that is zero."""
    assignment = torch.from_numpy(partition.assignment.astype(np.int64)).to(low_rank.U.device)
    rest = _OffDiagonal(low_rank, assignment, len(partition))
    if len(partition) == 1:
        return low_rank.U[:, 0]
    pairs = top_eigenpairs(rest, 1, which="LM", rtol=SPECTRAL_RTOL, seed=seed, max_products=40)
    return pairs.vectors[:, 0]


class _OffDiagonal(Operator):
    """A - bd(A) for A of low rank."""

    symmetric, engine, data_fingerprint = True, "a low-rank matrix without its diagonal blocks", ""

    def __init__(self, low_rank: LowRank, assignment: Tensor, blocks: int) -> None:
        self._low_rank, self._assignment, self._blocks = low_rank, assignment, blocks
        self.shape = (len(assignment), len(assignment))
        self.dtype, self.device = low_rank.U.dtype, low_rank.U.device

    def products(self, V: Tensor) -> Tensor:
        inside = [self._low_rank.pinched(self._assignment, self._blocks, v) for v in V.T]
        return self._low_rank @ V - torch.stack(inside, dim=1)


def _from_samples(
    samples: Pinched,
    partition: Partition,
    pieces: tuple[int, ...],
    inner: tuple[Tensor, ...] | None,
    forms: tuple[float, float, float | None],
    scale: float,
) -> Diagonality:
    """The record; inner: energies of single rows within the tensors, a vector [P] for each group; forms: x.H x, ||H||
    and g.H g.
    """
    xHx, norm, gHg = forms
    total = samples.kept.sum(axis=1)
    degrees = len(total) - 1
    whole = np.array(_figures(total, samples.rows, partition))
    without = np.array(
        [
            _figures(np.delete(total, group), np.delete(samples.rows, group, axis=0), partition)
            for group in range(len(total))
        ]
    )
    stderr = jackknife_stderr(without)
    D = float(whole[0])
    frobenius = float(np.sqrt(max(1 - D, 0.0)))
    along = abs(xHx - samples.forms[0].mean()) / norm if norm > 0 else 0.0
    spectral = Figure(float(along), _stderr(samples.forms[0]) / norm if norm > 0 else 0.0, degrees)
    curvature = Figure(float("nan"), 0.0, degrees)
    if gHg:
        curvature = Figure(float(samples.forms[1].mean()) / gHg, _stderr(samples.forms[1]) / abs(gHg), degrees)
    split = samples.kept.shape[1] == len(pieces)
    count = len(total)
    kept = samples.kept * scale * scale if split else np.full((count, len(pieces)), np.nan)
    own_rows = samples.rows
    if inner is not None:
        assignment = torch.from_numpy(partition.assignment.astype(np.int64)).to(inner[0].device)
        own_rows = np.array([by_block(each, assignment, len(partition)).cpu().numpy() for each in inner])
    return _record(
        partition,
        {
            **{
                name: Figure(float(value), float(error), degrees)
                for name, value, error in zip(("energy", "chance", "beyond_chance", "bits"), whole, stderr, strict=True)
            },
            "frobenius_error": Figure(frobenius, float(stderr[0]) / (2 * frobenius) if frobenius else 0.0, degrees),
            "spectral_error": spectral,
            "curvature_kept": curvature,
        },
        kept.mean(axis=0),
        own_rows,
        pieces,
        (without[:, 3], (kept.sum(axis=0) - kept) / (count - 1)),
    )


# --- both -------------------------------------------------------------------------------------------------------------


def _record(
    partition: Partition,
    figures: dict[str, Figure],
    tensor_energy: Array,
    rows: Array,
    pieces: tuple[int, ...],
    replicates: tuple[Array, Array],
) -> Diagonality:
    """The record, given the energies of rows of blocks within their tensors, rows [G, B]."""
    sizes = np.asarray(partition.sizes, dtype=float)
    chance, entries = (np.full(len(pieces), np.nan) for _ in range(2))
    if _own_pieces(partition, pieces) == pieces:
        tensor = piece_of_block(partition, pieces)
        chance = np.array([_chance(rows[:, tensor == number]) for number in range(len(pieces))])
        entries = np.bincount(tensor, weights=sizes**2, minlength=len(pieces)) / np.asarray(pieces, dtype=float) ** 2
    return Diagonality(
        blocks=len(partition),
        largest=max(partition.sizes),
        freedom=float((sizes * (sizes + 1) / 2).sum()),
        share_of_entries=float((sizes**2).sum() / partition.size**2),
        **figures,
        tensor_energy=tensor_energy,
        tensor_chance=chance,
        tensor_entries=entries,
        replicates=replicates,
    )


def _figures(kept: Array, rows: Array, partition: Partition) -> tuple[float, float, float, float]:
    """Energy kept, chance, what is beyond it, and bits, from kept energies [G] and those of rows [G, B]."""
    sizes = np.asarray(partition.sizes, dtype=float)
    share = float((sizes**2).sum() / partition.size**2)
    D = _over(float(kept.mean()), float(rows.sum(axis=1).mean()))
    chance = _chance(rows)
    beyond = (D - chance) / (1 - chance) if len(partition) > 1 and chance < 1 else float("nan")
    return D, chance, beyond, relative_bits(D, share)


def _chance(rows: Array) -> float:
    """Sum of squared shares; from products of different groups, since a square of one has the square of its noise."""
    if len(rows) == 1:
        return _over(float((rows[0] ** 2).sum()), float(rows[0].sum() ** 2))
    sums, totals = rows.sum(axis=0), rows.sum(axis=1)
    pairs = float((sums**2).sum() - (rows**2).sum())
    return _over(pairs, float(totals.sum() ** 2 - (totals**2).sum()))


def relative_bits(kept: float, share: float) -> float:
    """Kullback-Leibler divergence in bits of (kept, 1 - kept) from (share, 1 - share), negative if kept < share.

    `kept` is cut to [0, 1].
    """
    if not np.isfinite(kept):
        return float("nan")
    kept = min(max(kept, 0.0), 1.0)
    terms = [(kept, share), (1 - kept, 1 - share)]
    divergence = float(sum(p * np.log2(p / q) for p, q in terms if p > 0 and q > 0))
    return divergence if kept >= share else -divergence


def jackknife_stderr(replicates: Array) -> Array:
    """Standard errors from leave-one-out values [G, ...] (Efron, The Jackknife, 1982)."""
    count = len(replicates)
    centered = replicates - replicates.mean(axis=0)
    found: Array = np.sqrt((count - 1) / count * (centered**2).sum(axis=0))
    return found


def _stderr(samples: Array) -> float:
    return float(samples.std(ddof=1) / np.sqrt(len(samples)))


def _over(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator != 0 else float("nan")
