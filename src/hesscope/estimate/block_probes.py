"""Block energies to a tolerance: probes where they are needed, dominant directions of a block taken exactly.

A probe of block column j, random signs w on the block, gives ||H_ij w||^2 for all i, with a relative variance of 2 / r
where r is the effective rank of H_ij: blocks of low rank, most of a neural network's, would take hundreds. So

1. s products with full random vectors W give, block row by block row, bases of what all columns of a symmetric matrix
   do most (block_sketch): one sketch for all blocks.
2. In column j the q_j most important directions Q_j are taken exactly (q_j products), the rest by probes that are
   projected off them: ||H_ij||^2 = ||H_ij Q_j||^2 + E ||H_ij (1 - Q_j Q_j^T) w||^2. A block of no more parameters than
   it would take products is taken exactly as a whole.
3. The sketch also tells the columns' energies and variances: from them the q_j and the numbers of samples are planned
   (block_plan), and the weights with which (i, j) and (j, i) are averaged. That many probes are drawn; neither number
   nor weights depend on them, so that they are unbiased.
4. If they miss the tolerance, as the sketch cannot tell how much of a column is in its diagonal block, more are drawn,
   once, with the cross-fitting of `stopping`: half of the samples decides on the weight of the other half.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from math import inf

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hesscope.core.errors import InputError
from hesscope.core.memory import available_bytes, require_memory
from hesscope.core.rng import rademacher, stream
from hesscope.estimate.block_plan import planned, within_budget
from hesscope.estimate.block_sketch import BlockSketch, block_sketch
from hesscope.estimate.column_samples import ColumnSamples
from hesscope.estimate.energies import BlockEnergies
from hesscope.estimate.products import CountedProducts, signs
from hesscope.estimate.sketch import SKETCH_BYTES
from hesscope.estimate.stopping import DEFAULT_MAX_PRODUCTS
from hesscope.estimate.symmetry import require_symmetric
from hesscope.operators import Operator
from hesscope.partition.partition import Partition

# The tolerance: rtol for the diagonality, BLOCK_RTOL times rtol for diagonal blocks of at least RELEVANT of the energy.
RELEVANT, BLOCK_RTOL = 0.01, 2.0

# A column that holds less than NOTED of the energy gets FEW samples, any other at least LEAST; BLIND if there is no
# sketch. Where few directions dominate what is left to chance, samples are skewed, and Student's intervals of very few
# of them cover too rarely: columns that may hold a relevant block get SKEWED samples times the relative variance of
# one, up to ENOUGH.
NOTED, FEW, LEAST, BLIND, SKEWED, ENOUGH = 0.0025, 2, 4, 8, 64, 16

# Vectors of the sketch, at first and at most; full vectors that it takes in memory each (W, H W, bases).
FIRST_SKETCH, SKETCH, SKETCH_COPIES = 16, 32, 4

# Blocks of so many parameters, where they are intervals, are summed up one by one, which is faster.
FEW_BLOCKS = 4096

# Margins of the plan: of the diagonality's error, for what the sketch does not know, and of every block's own, so that
# all of them are likely to meet the tolerance at once.
MARGIN, BLOCK_MARGIN = 1.5, 2.25

# The second look: margin of the new samples' number; how much more than it needs a half of the samples asks for; the
# largest number of new samples in units of the old ones'; the share of RELEVANT that a half takes for relevant; and the
# number of samples that the sketch stands for beside those of a half.
MORE_MARGIN, SHARE_MARGIN, MORE_AT_MOST, NEARLY, PRIOR = 1.3, 1.5, 16, 0.8, 6

Array = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
# Vectors [P_j, K] confined to block j, with the given numbers.
Vectors = Callable[[int, Sequence[int]], Tensor]


@dataclass(frozen=True)
class Reached:
    """What the tolerance is about.

    Attributes:
        total: energy; diagonality: its share on the diagonal; error: relative standard error of the diagonality.
        relevant: [B] whether a diagonal block holds a relevant share; errors: [B] their relative standard errors.
    """

    total: float
    diagonality: float
    error: float
    relevant: Flags
    errors: Array

    @classmethod
    def of(cls, energies: BlockEnergies) -> Reached:
        """From estimated energies."""
        total, diagonal = energies.total, np.diag(energies.values)
        diagonality = energies.diagonality if total > 0 else 0.0
        error = energies.diagonality_stderr if total > 0 else 0.0
        return cls(
            total=total,
            diagonality=diagonality,
            error=float(_relative(np.asarray(error), np.asarray(diagonality))),
            relevant=diagonal >= RELEVANT * total if total > 0 else np.zeros(len(diagonal), dtype=bool),
            errors=_relative(np.diag(energies.stderr), diagonal),
        )

    def missed(self, rtol: float) -> Integers:
        """The relevant blocks that miss the tolerance."""
        return np.flatnonzero(self.relevant & (self.errors > BLOCK_RTOL * rtol))

    def met(self, rtol: float) -> bool:
        """Whether the tolerance is met."""
        return self.error <= rtol and len(self.missed(rtol)) == 0

    def message(self, rtol: float, products: int, max_products: int) -> str:
        """One line: met or not, and if not, by how much and what to do."""
        short = 2 * products > max_products
        count = int(self.relevant.sum())
        if self.met(rtol):
            return f"rtol {rtol:g} met for the diagonality, {BLOCK_RTOL * rtol:g} for {count} relevant diagonal blocks"
        return (
            f"rtol {rtol:g} not met with {products} products: {self.error:.2g} was reached for the diagonality, and "
            f"{len(self.missed(rtol))} of {count} diagonal blocks with at least {RELEVANT:.0%} of the energy missed "
            f"{BLOCK_RTOL * rtol:g}; {'raise max_products or rtol' if short else 'take a smaller rtol'}"
        )


def default_max_products(blocks: int, probes: int) -> int:
    """The budget unless told: as much as so many probes of every block, and no less than for other estimates."""
    return max(DEFAULT_MAX_PRODUCTS, probes * blocks)


def least_budget(blocks: int) -> int:
    """Products without which there is nothing to plan."""
    return SKETCH + 2 + blocks * ENOUGH


def columns_to_tolerance(
    operator: Operator, partition: Partition, rtol: float, max_products: int, seed: int, products: CountedProducts
) -> ColumnSamples:
    """Samples of all block columns that meet the tolerance, or use up the budget of at least `least_budget`.

    Raises:
        TooLargeError: the samples would not fit in memory.
        DataError: a product is not finite.
    """
    probes = BlockProbes.of(operator, partition, seed, products)
    plan = _settled(probes, rtol, max_products)
    return _sampled(plan, _exact_part(plan), rtol, max_products)


@dataclass(frozen=True)
class BlockProbes:
    """Products with vectors that are confined to blocks, and their energies in all blocks of rows.

    Attributes:
        rows: B blocks of parameters, slices where they are intervals; sizes: [B].
        bases: B orthonormal bases [P_j, q_j], off which random probes are projected; None for q_j = 0.
        symmetric: whether the matrix is.
    """

    operator: Operator
    products: CountedProducts
    rows: list[slice | Tensor]
    assignment: Tensor
    sizes: Integers
    bases: list[Tensor | None]
    symmetric: bool
    seed: int

    @classmethod
    def of(cls, operator: Operator, partition: Partition, seed: int, products: CountedProducts) -> BlockProbes:
        """For a partition that fits the operator."""
        rows: list[slice | Tensor] = []
        for block in partition.members():
            start, stop = int(block[0]), int(block[-1]) + 1
            interval = stop - start == len(block)
            rows.append(slice(start, stop) if interval else torch.from_numpy(block).to(operator.device))
        assignment = torch.from_numpy(partition.assignment.astype(np.int64)).to(operator.device)
        nothing: list[Tensor | None] = [None] * len(rows)
        symmetric = _is_symmetric(operator, products)
        return cls(operator, products, rows, assignment, np.asarray(partition.sizes), nothing, symmetric, seed)

    @property
    def blocks(self) -> int:
        """Number of blocks B."""
        return len(self.rows)

    def random(self, stage: str) -> Vectors:
        """Random signs, each from its own stream, projected off the block's basis."""

        def vectors(block: int, numbers: Sequence[int]) -> Tensor:
            size = int(self.sizes[block])
            drawn = [rademacher(size, stream(self.seed, "block_energies", stage, block, n)) for n in numbers]
            W = torch.stack(drawn, dim=1).to(self.operator.device).to(self.operator.dtype)
            Q = self.bases[block]
            return W if Q is None else W - Q @ (Q.T @ W)

        return vectors

    def directions(self, block: int, numbers: Sequence[int]) -> Tensor:
        """Columns of the block's basis."""
        Q = self.bases[block]
        assert Q is not None, "a block without a basis has no directions"
        return Q[:, list(numbers)]

    def units(self, block: int, numbers: Sequence[int]) -> Tensor:
        """Columns of the identity."""
        identity = torch.zeros(int(self.sizes[block]), len(numbers), dtype=self.operator.dtype)
        identity[list(numbers), range(len(numbers))] = 1.0
        return identity.to(self.operator.device)

    def energies(self, counts: Integers, vectors: Vectors, first: Integers | None = None) -> Array:
        """Energies [S, B] of products with counts[j] vectors of every block j, block by block.

        Args:
            counts: [B]; first: [B] number of each block's first vector, 0 unless told.
        """
        start = np.zeros_like(counts) if first is None else first
        wanted = [(block, int(start[block]) + n) for block in range(self.blocks) for n in range(counts[block])]
        result = np.empty((len(wanted), self.blocks))
        step = self.operator.columns_per_pass
        for begin in range(0, len(wanted), step):
            chunk = wanted[begin : begin + step]
            product = self.products(self._confined(chunk, vectors))
            result[begin : begin + len(chunk)] = self._row_sums(product).T.cpu().numpy()
        return result

    def sums(self, counts: Integers, vectors: Vectors) -> Array:
        """Energies as above, added up for each block of columns: [B rows, B columns]."""
        each = self.energies(counts, vectors)
        total = np.zeros((self.blocks, self.blocks))
        np.add.at(total, np.repeat(np.arange(self.blocks), counts), each)
        return total.T

    def _confined(self, chunk: Sequence[tuple[int, int]], vectors: Vectors) -> Tensor:
        V = torch.zeros(self.operator.shape[0], len(chunk), dtype=self.operator.dtype, device=self.operator.device)
        start = 0
        for block, group in groupby(chunk, key=lambda pair: pair[0]):
            numbers = [number for _, number in group]
            V[self.rows[block], start : start + len(numbers)] = vectors(block, numbers)
            start += len(numbers)
        return V

    def _row_sums(self, product: Tensor) -> Tensor:
        """Sums of squares [B, K] of the columns [P, K] over each block of rows, in float64."""
        if len(product) >= FEW_BLOCKS * self.blocks and all(isinstance(rows, slice) for rows in self.rows):
            return torch.stack([product[rows].double().square().sum(dim=0) for rows in self.rows])
        sums = torch.zeros(self.blocks, product.shape[1], dtype=torch.float64, device=product.device)
        return sums.index_add_(0, self.assignment, product.double().square())


@dataclass(frozen=True)
class SamplingPlan:
    """What is settled before the samples are drawn.

    Attributes:
        probes: with the bases of what is taken exactly; whole: [B] columns that are taken exactly altogether.
        counts: [B] numbers of samples (0 for exact columns); shares: [B, B] of (i, j) that come from column j.
        relative: [B] relative variance of a sample of what is left to chance, 0 if not known.
    """

    probes: BlockProbes
    whole: Flags
    counts: Integers
    shares: Array
    relative: Array

    @property
    def products(self) -> int:
        """Products that it takes."""
        widths = sum(Q.shape[1] for Q in self.probes.bases if Q is not None)
        return int(self.counts.sum() + self.probes.sizes[self.whole].sum()) + widths


def _is_symmetric(operator: Operator, products: CountedProducts) -> bool:
    """Whether the matrix is symmetric, by construction or up to rounding."""
    if operator.symmetric:
        return True
    products.done += 2
    try:
        require_symmetric(operator)
    except InputError:
        return False
    return True


def _settled(probes: BlockProbes, rtol: float, max_products: int) -> SamplingPlan:
    """The plan, from a sketch if the matrix is symmetric and some vectors of its length fit in memory."""
    operator = probes.operator
    each = SKETCH_COPIES * operator.shape[0] * torch.finfo(operator.dtype).bits // 8
    widest = int(min(SKETCH_BYTES, available_bytes(operator.device) / 2)) // each
    # Half of the budget is left for a second look.
    budget = max(least_budget(probes.blocks), max_products // 2) - probes.products.done
    if not probes.symmetric or widest < FIRST_SKETCH:
        return _plan_without_sketch(probes, rtol, budget)
    probes.products.expect(FIRST_SKETCH + LEAST * probes.blocks)
    Y = probes.products(signs(operator, probes.seed, "block_energies", "sketch", range(FIRST_SKETCH)))
    plan = _plan_from_sketch(probes, block_sketch(Y, probes.rows), rtol, budget - FIRST_SKETCH)
    least = int(np.where(plan.whole, 0, LEAST).sum())
    fits = budget >= SKETCH + ENOUGH * probes.blocks
    if widest < SKETCH or plan.products < least + 2 * SKETCH or not fits:
        return plan
    probes.products.expect(SKETCH - FIRST_SKETCH + plan.products)
    W = signs(operator, probes.seed, "block_energies", "sketch", range(FIRST_SKETCH, SKETCH))
    sketch = block_sketch(torch.cat([Y, probes.products(W)], dim=1), probes.rows)
    return _plan_from_sketch(probes, sketch, rtol, budget - SKETCH)


def _plan_without_sketch(probes: BlockProbes, rtol: float, budget: int) -> SamplingPlan:
    """From pilot probes, which are not counted among the samples."""
    nothing = np.zeros((probes.blocks, probes.blocks))
    whole = probes.sizes <= BLIND
    pilots, least = np.where(whole, 0, BLIND), np.where(whole, 0, LEAST)
    shares = _shares(np.ones(probes.blocks), pilots, probes.symmetric)
    blind = SamplingPlan(probes, whole, least, shares, np.zeros(probes.blocks))
    probes.products.expect(int(pilots.sum() + least.sum()))
    columns = _column_samples(blind, nothing, pilots, probes.energies(pilots, probes.random("pilot")))
    _, own = columns.single_variances(nothing)
    relative = _relative(own, np.square(np.diag(columns.matrix())))
    wanted = MARGIN * _wanted(columns, blind, nothing, rtol)
    budget -= int(pilots.sum())
    more = whole | (wanted >= probes.sizes)
    if int(probes.sizes[more].sum()) + LEAST * int((~more).sum()) <= budget:
        whole = more
    counts = np.where(whole, 0.0, wanted)
    counts = within_budget(counts, np.where(whole, 0, LEAST), budget - int(probes.sizes[whole].sum()))
    shares = _shares(np.ones(probes.blocks), counts, probes.symmetric)
    return SamplingPlan(probes, whole, counts, shares, np.where(whole, 0.0, relative))


def _plan_from_sketch(probes: BlockProbes, sketch: BlockSketch, rtol: float, budget: int) -> SamplingPlan:
    """The form of every column, and the number of its samples, that promise the fewest products.

    The diagonal's share of every column's energy, and of its variance, is not known yet, and taken to be the same for
    all: then the diagonality is as well known as the whole energy, a diagonal block as well as its column.
    """
    blocks, rows = probes.blocks, np.arange(probes.blocks)
    total = float(sketch.energies.sum())
    relevant = sketch.energies >= RELEVANT * total if total > 0 else np.zeros(blocks, dtype=bool)
    noted = sketch.energies >= NOTED * total if total > 0 else np.zeros(blocks, dtype=bool)
    known = np.isfinite(sketch.variance)
    # The first form is exact.
    variance = np.concatenate([np.zeros((blocks, 1)), np.where(known, sketch.variance, 0.0)], axis=1)
    fixed = np.where(known, np.asarray(sketch.widths, dtype=np.float64), inf)
    fixed = np.concatenate([probes.sizes[:, None].astype(np.float64), fixed], axis=1)
    skewed = np.clip(SKEWED * _relative(sketch.variance, np.square(sketch.residual)), LEAST, ENOUGH)
    least = np.where(relevant[:, None], skewed, np.where(noted, LEAST, FEW)[:, None])
    least = np.where(known, least, 0.0)
    while True:
        own = _counts_for(variance, relevant[:, None], BLOCK_RTOL * rtol * sketch.energies[:, None], BLOCK_MARGIN)
        needed = np.concatenate([np.zeros((blocks, 1)), np.maximum(least, own[:, 1:])], axis=1)
        plan = planned(fixed, variance, needed, (rtol * total) ** 2 / MARGIN)
        counts = np.ceil(plan.counts)
        if fixed[rows, plan.choice].sum() + counts.sum() <= budget:
            break
        rtol *= 1.2  # what the budget allows
    whole = plan.choice == 0
    form = np.maximum(plan.choice - 1, 0)
    widths = np.where(whole, 0, np.asarray(sketch.widths)[form])
    bases = [sketch.directions(block, width) if width else None for block, width in enumerate(widths.tolist())]
    relative = np.where(whole, 0.0, _relative(sketch.variance[rows, form], np.square(sketch.residual[rows, form])))
    # How much the directions taken exactly reduce a sample's variance.
    left = np.where(whole, 0.0, _relative(sketch.variance[rows, form], sketch.variance[:, 0]))
    whole_numbers = np.where(whole, 0, counts).astype(np.int64)
    shares = _shares(left, whole_numbers, probes.symmetric)
    return SamplingPlan(replace(probes, bases=bases), whole, whole_numbers, shares, relative)


def _exact_part(plan: SamplingPlan) -> Array:
    """The columns' exact parts, [B, B]."""
    probes = plan.probes
    widths = np.asarray([0 if Q is None else Q.shape[1] for Q in probes.bases])
    probes.products.expect(plan.products)
    exact = probes.sums(np.where(plan.whole, probes.sizes, 0), probes.units)
    return exact + probes.sums(widths, probes.directions)


def _sampled(plan: SamplingPlan, exact: Array, rtol: float, max_products: int) -> ColumnSamples:
    """The samples as planned, and more if they miss the tolerance, once."""
    probes, counts = plan.probes, plan.counts
    vectors = probes.random("samples")
    require_memory(
        3 * int(counts.sum() + probes.blocks) * probes.blocks * 8,
        "cpu",
        f"{int(counts.sum())} samples of {probes.blocks} blocks",
        "a coarser partition",
    )
    probes.products.expect(int(counts.sum()))
    drawn = probes.energies(counts, vectors)
    columns = _column_samples(plan, exact, counts, drawn)
    room = max_products - probes.products.done
    if room < 2 * int((counts > 0).sum()):
        return columns
    halves = [_half(plan, exact, counts, drawn, part) for part in (0, 1)]
    a, b = (_asked(half, plan, exact, rtol) for half in halves)
    if not (a.any() or b.any()):
        return columns
    first, second = counts // 2, counts - counts // 2
    with np.errstate(divide="ignore", invalid="ignore"):
        # Weight of each sample of the first half, of the second, and of all new ones together.
        of_a, of_b = (1 - b) / counts, (1 - a) / counts
        of_new = (first * b + second * a) / counts
        old = first * of_a**2 + second * of_b**2
        free = 1 / (MORE_MARGIN * _wanted(columns, plan, exact, rtol)) - old
        more = np.where(free > 0, of_new**2 / free, inf)
    more = np.where(of_new > 0, np.clip(np.maximum(more, of_new**2 * counts), 2, MORE_AT_MOST * counts), 0.0)
    extra = within_budget(np.nan_to_num(more), np.where(of_new > 0, 2, 0), room)
    probes.products.expect(int(extra.sum()))
    added = probes.energies(extra, vectors, first=counts)
    weights = np.concatenate([[of_a[j]] * first[j] + [of_b[j]] * second[j] for j in range(probes.blocks)])
    late = np.repeat(np.where(extra > 0, of_new / np.maximum(extra, 1), 0.0), extra)
    return _column_samples(plan, exact, counts, drawn, weights, (extra, added, late))


def _column_samples(
    plan: SamplingPlan,
    exact: Array,
    counts: Integers,
    drawn: Array,
    weights: Array | None = None,
    added: tuple[Integers, Array, Array] | None = None,
) -> ColumnSamples:
    """The record from samples [S, B], block by block, of equal weights unless told, and some more with theirs."""
    blocks = plan.probes.blocks
    column = np.repeat(np.arange(blocks), counts)
    if weights is None:
        weights = 1 / counts[column]
    if added is not None:
        extra, more, late = added
        column = np.concatenate([column, np.repeat(np.arange(blocks), extra)])
        drawn, weights = np.concatenate([drawn, more]), np.concatenate([weights, late])
    certain = np.flatnonzero(counts == 0)  # one sample, that of the exact column
    column = np.concatenate([column, certain])
    drawn = np.concatenate([drawn, np.zeros((len(certain), blocks))])
    weights = np.concatenate([weights, np.ones(len(certain))])
    order = np.argsort(column, kind="stable")
    column = column[order]
    values = (drawn[order] + exact.T[column]) * plan.shares.T[column]
    return ColumnSamples(values, weights[order], column, column, plan.probes.symmetric)


def _half(plan: SamplingPlan, exact: Array, counts: Integers, drawn: Array, part: int) -> ColumnSamples:
    """The first or the second half of every column's samples alone."""
    column = np.repeat(np.arange(len(counts)), counts)
    rank = np.arange(len(column)) - np.repeat(np.cumsum(counts) - counts, counts)
    kept = (rank >= counts[column] // 2) == bool(part)
    number = counts - counts // 2 if part else counts // 2
    return _column_samples(plan, exact, number, drawn[kept])


def _wanted(columns: ColumnSamples, plan: SamplingPlan, exact: Array, rtol: float) -> Array:
    """Numbers of samples [B], at least those planned, that would meet the tolerance, judged from these samples."""
    values, counts = columns.matrix(), plan.counts
    total, diagonal = float(values.sum()), np.diag(values)
    diagonality = float(diagonal.sum()) / total if total > 0 else 0.0
    relevant = diagonal >= NEARLY * RELEVANT * total if total > 0 else np.zeros(len(counts), dtype=bool)
    coefficients = np.eye(len(counts)) - diagonality
    influence, own = columns.single_variances(coefficients)
    # To stop where few samples happen to vary little would make standard errors too small: the sketch, which knows
    # nothing of these samples, has as much of a say as PRIOR of them.
    rest = np.maximum(diagonal - np.diag(exact), 0.0)
    others = diagonality * (values - exact).clip(min=0.0).sum(axis=0)
    prior = np.where(plan.relative > 0, PRIOR, 0.0)
    degrees = columns.counts - 1.0
    all_degrees = np.maximum(prior + degrees, 1.0)
    own = (prior * plan.relative * np.square(rest) + degrees * own) / all_degrees
    expected = plan.relative * (np.square(rest) + np.square(others))
    influence = (prior * expected + degrees * influence) / all_degrees
    least = np.maximum(counts, _counts_for(own, relevant, BLOCK_RTOL * rtol * diagonal, BLOCK_MARGIN / MARGIN))[:, None]
    allowed = (rtol * diagonality * total) ** 2
    return planned(np.zeros_like(least), np.where(counts > 0, influence, 0.0)[:, None], least, allowed).counts


def _asked(half: ColumnSamples, plan: SamplingPlan, exact: Array, rtol: float) -> Array:
    """Shares [B] of new samples that a half of the samples asks for."""
    wanted, counts = _wanted(half, plan, exact, rtol), plan.counts
    shares: Array = np.where(wanted > counts, 1 - counts / (SHARE_MARGIN * np.maximum(wanted, 1.0)), 0.0)
    return shares


def _shares(left: Array, counts: Integers, symmetric: bool) -> Array:
    """Weights of the entries (i, j) from column j, [B, B]; halves on the diagonal, as both halves are one.

    With A = H_ij, samples of (i, j) have the variance 2 ||A^T A||^2, those of (j, i) 2 ||A A^T||^2: the same (but for
    what signs do not see of their diagonals). What differs is the number of samples, and what is taken exactly.

    Args:
        left: [B] share of the variance that is left to chance; counts: [B] numbers of samples, 0 for exact columns.
    """
    blocks = len(counts)
    if not symmetric:
        return np.ones((blocks, blocks))
    variance = np.where(counts > 0, left / np.maximum(counts, 1), 0.0)
    both = variance[:, None] + variance[None, :]
    shares: Array = np.divide(variance[:, None], both, out=np.full((blocks, blocks), 0.5), where=both > 0)
    np.fill_diagonal(shares, 0.5)
    return shares


def _counts_for(variance: Array, needed: Flags, deviation: Array, margin: float) -> Array:
    """Samples of this variance whose mean has the tolerated standard deviation, where that is needed; else 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        counts: Array = np.where(needed & (variance > 0), margin * variance / np.square(deviation), 0.0)
    return counts


def _relative(deviation: Array, value: Array) -> Array:
    """Their ratio; 0 / 0 = 0, known without error."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio: Array = np.where(deviation == 0, 0.0, np.divide(deviation, value))
    return ratio
