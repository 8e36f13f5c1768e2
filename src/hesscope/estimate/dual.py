"""Block energies of a Gauss-Newton matrix from its dual (tangent-kernel) form: all B^2 of them from B Gram matrices.

With G = W^T W (see operators/root) and K^i = W_i W_i^T, the Gram matrix of the rows' parts in block i,
||G_ij||_F^2 = <K^i, K^j>_F (MATH.md, section 3).

Exact: W has a row for every loss term and output. Where these are few, all of them are made.

Sampled: W is cut into strata W_n, each of some samples. Rows g = W_n^T u, u random signs, have E[g g^T] = W_n^T W_n,
so that for independent rows a, b of strata n, m the product (g_a^i . g_b^i)(g_a^j . g_b^j) has the mean
<W_n^T W_n, W_m^T W_m> of block (i, j). All pairs of strata together give ||G_ij||^2; where n = m, two rows of one
stratum make the pair. Two things lower the variance:

- Leading rows. A few directions hold most of the energy. Those that one power iteration finds, an orthonormal Q, are
  taken exactly (rows W^T Q); random rows stand for the rest, u - Q Q^T u. Their Gram matrices follow from those with
  W_n^T u by linearity, so that this costs nothing but the leading rows themselves.
- Strata. The variance is that of u^T K^2 u, which random signs have from the off-diagonal entries of K^2 alone. Were
  one vector of signs drawn for all samples, these would be all pairs of samples; now they are those of one stratum,
  while a row costs its share of a backward pass only.

Rows come in groups that share nothing, each giving one unbiased sample of all energies at once: standard errors are
honest by construction, while a jackknife over all pairs would count their share in the variance twice. Pairs across
groups would add little: with M rows a group and R in all, a block of effective rank r has the relative variance
8 / (r R) from single rows and 4 / (M R) from pairs, so that pairs rule only where both are small.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hesscope.core.checks import require_positive_int
from hesscope.core.errors import DataError, InputError
from hesscope.core.memory import require_memory
from hesscope.core.records import Provenance
from hesscope.core.rng import rademacher, stream
from hesscope.estimate.block_grams import BlockColumns, BlockRows
from hesscope.estimate.energies import BlockEnergies
from hesscope.operators import as_operator
from hesscope.operators.root import PartRows, Root, root_of
from hesscope.partition.partition import Partition

# Up to this many multiply-adds the exact form is taken: about ten seconds on two cores.
EXACT_WORK = 2**38

# Parts that a batch is cut into for exact rows: a row is a backward pass through its part.
EXACT_PARTS = 64

DEFAULT_ROWS = 256
FEWEST_ROWS = 4
STRATA, GROUP_ROWS, LEADING_ROWS, PILOT_ROWS = 8, 16, 32, 64

# Bytes for random rows at a time, for leading rows, for their directions in output space, and for Gram matrices.
# Constants, not shares of what is free: the numbers must not depend on the machine.
ROWS_BYTES, LEADING_BYTES, DIRECTIONS_BYTES, GRAM_BYTES = 2**29, 2**30, 2**29, 2**27

# More samples than this are averaged by neighbours when they would take more than SAMPLES_BYTES.
FEW_SAMPLES, SAMPLES_BYTES = 16, 2**28

Array = npt.NDArray[np.float64]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class RowPlan:
    """How rows are sampled: `groups` of `draws` rows from each of `strata`; `leading` exact ones, found by `pilots`."""

    strata: int
    draws: int
    groups: int
    leading: int
    pilots: int

    @property
    def group_rows(self) -> int:
        """Random rows of a group."""
        return self.strata * self.draws


def dual_energies(
    matrix: Any, partition: Partition, probes: int | None = None, seed: int = 0, progress: Progress | None = None
) -> BlockEnergies:
    """Squared Frobenius norms of all B x B blocks of a Gauss-Newton matrix, from rows of its root.

    Args:
        matrix: a hesscope.GaussNewton or EmpiricalFisher, or one times a number.
        partition: B blocks of the P parameters.
        probes: random rows, 256 unless told; each is a backward pass of an 8th of the data, if it can be cut into so
            many parts. Not given, nothing is random where rows for all loss terms and outputs are little work.
        seed: root of the random streams; equal seeds give equal numbers, more rows begin with the same ones.
        progress: called with (rows done, rows in all).

    Returns:
        Energies with independent, unbiased samples; off-diagonal ones of weakly coupled blocks may come out negative.

    Raises:
        InputError: no root is known of the matrix, or fewer than 4 probes.
        PartitionError: the partition does not fit the matrix.
        TooLargeError: rows, or the samples of all block pairs, would not fit in memory.
        DataError: a row is not finite.
    """
    operator = as_operator(matrix)
    partition.require_fits(operator.shape[0])
    if probes is not None:
        require_positive_int("probes", probes)
        if probes < FEWEST_ROWS:
            raise InputError(f"probes must be at least {FEWEST_ROWS} rows for method 'dual', got {probes}")
    root = strata_root(root_of(operator))
    parts = root.survey()
    columns = BlockColumns.of(partition, operator.device)
    if probes is None and exact_work(root, parts, len(partition)) <= EXACT_WORK:
        values = _exact(replace(root, pieces=EXACT_PARTS), columns, progress)
        how = f"dual, all {sum(part.live for part in parts)} rows"
        found = BlockEnergies.exact(
            partition.labels, partition.sizes, _finite(values), _provenance(operator, how, None)
        )
        return replace(found, message="exact")
    plan = row_plan(root, parts, DEFAULT_ROWS if probes is None else probes)
    samples = _samples(root, parts, columns, plan, seed, progress)
    how = f"{plan.groups * plan.group_rows} random and {plan.leading} leading rows"
    provenance = _provenance(operator, f"dual, {how} of {plan.strata} strata", seed)
    found = BlockEnergies.from_samples(partition.labels, partition.sizes, _finite(samples), provenance)
    return replace(found, message=f"{how} in {plan.groups} independent groups")


def strata_root(root: Root) -> Root:
    """The root with batches cut so that there are at least STRATA parts, where samples are independent."""
    return replace(root, pieces=ceil(STRATA / root.objective.num_batches))


def exact_work(root: Root, parts: list[PartRows], blocks: int) -> int:
    """Multiply-adds of the exact form: all pairs of rows, in all parameters and in all pairs of blocks, by halves."""
    rows = sum(part.live for part in parts)
    return rows * rows * (root.operator.shape[0] + blocks * blocks) // 2


def row_plan(root: Root, parts: list[PartRows], rows: int) -> RowPlan:
    """Strata, draws and groups for about so many random rows; depends on the data, not on the machine."""
    bytes_each = root.operator.shape[0] * torch.finfo(root.operator.dtype).bits // 8
    group = max(FEWEST_ROWS // 2, min(GROUP_ROWS, ROWS_BYTES // bytes_each, rows // 2))
    strata = min(STRATA, len(parts), group // 2)
    draws = group // strata
    pilots = min(PILOT_ROWS, LEADING_BYTES // bytes_each)
    outputs = sum(part.size for part in parts)
    directions = DIRECTIONS_BYTES * root.operator.shape[0] // (bytes_each * outputs)
    leading = min(LEADING_ROWS, pilots // 2, directions, outputs)
    return RowPlan(strata, draws, max(2, rows // (strata * draws)), leading, pilots)


# --- exact ------------------------------------------------------------------------------------------------------------


def _exact(root: Root, columns: BlockColumns, progress: Progress | None) -> Array:
    """All energies [B, B] from all rows."""
    counts = [part.live for part in root.survey()]
    rows, width = sum(counts), root.operator.shape[0] * 8
    held = max(1, ROWS_BYTES // width)
    tiles = [range(start, min(start + held, rows)) for start in range(0, rows, held)]
    require_memory(4 * min(held, rows) * width, root.operator.device, "rows of the root", "a smaller model")
    total = torch.zeros(columns.blocks, columns.blocks, dtype=torch.float64, device=root.operator.device)
    for number, tile in enumerate(tiles):
        mine = columns.split(all_rows(root, counts, tile))
        total += _pair_energies(mine, mine)
        for other in tiles[number + 1 :]:
            total += 2 * _pair_energies(mine, columns.split(all_rows(root, counts, other)))
        if progress is not None:
            progress(tile.stop, rows)
    return total.cpu().numpy() * root.factor**2


def all_rows(root: Root, counts: list[int], wanted: range) -> Tensor:
    """The rows of W of these numbers, [len(wanted), P] in float64; rows that are exactly zero are not counted."""
    rows = torch.empty(len(wanted), root.operator.shape[0], dtype=torch.float64, device=root.operator.device)
    starts = np.concatenate([[0], np.cumsum(counts)])
    numbers = [n for n in range(len(counts)) if starts[n] < wanted.stop and starts[n + 1] > wanted.start and counts[n]]
    for number, part in root.parts(numbers):
        begin, end = max(wanted.start, int(starts[number])), min(wanted.stop, int(starts[number + 1]))
        live = part.live[begin - int(starts[number]) : end - int(starts[number])]
        done = begin - wanted.start
        for some in torch.split(live, root.vectors_per_pass):
            units = torch.zeros(len(some), part.rows.size, dtype=root.operator.dtype, device=rows.device)
            units[torch.arange(len(some), device=some.device), some] = 1.0
            rows[done : done + len(some)] = part.pull(units).double()
            done += len(some)
    return rows


def _pair_energies(first: BlockRows, second: BlockRows) -> Tensor:
    """Sum over all pairs of a row of each, [B, B]; of one and the same rows by halves."""
    blocks = first.columns.blocks
    step = max(1, int((GRAM_BYTES / 8 / blocks) ** 0.5))
    total: Tensor | None = None
    for start in range(0, first.count, step):
        mine = first.some(slice(start, start + step))
        for place in range(start if second is first else 0, second.count, step):
            pairs = mine.grams(second.some(slice(place, place + step))).flatten(1)
            energies = pairs @ pairs.T
            if second is first and place > start:
                energies *= 2
            total = energies if total is None else total.add_(energies)
    assert total is not None
    return total


# --- sampled ----------------------------------------------------------------------------------------------------------


def _samples(
    root: Root, parts: list[PartRows], columns: BlockColumns, plan: RowPlan, seed: int, progress: Progress | None
) -> Array:
    """Independent, unbiased samples [K, B, B] of all energies: one a group, or fewer if there are many blocks."""
    device, blocks = root.operator.device, columns.blocks
    stored = _stored_samples(plan.groups, blocks)
    needed = 3 * stored * blocks * blocks * 8
    require_memory(needed, "cpu", f"{stored} samples of {blocks} x {blocks} blocks", "a coarser partition")
    bytes_each = root.operator.shape[0] * torch.finfo(root.operator.dtype).bits // 8
    held = 2 * (max(ROWS_BYTES // bytes_each, plan.group_rows) + plan.pilots + plan.leading)
    require_memory(held * bytes_each, device, f"{held} rows of {root.operator.shape[0]} parameters", "method='probes'")
    directions, leading = _leading(root, parts, columns, plan, seed)
    among = None if leading is None else leading.grams(leading)
    exact = torch.zeros(blocks, blocks, dtype=torch.float64, device=device)
    if among is not None:
        flat = among.flatten(1)
        exact = flat @ flat.T
    weights = _pair_weights(plan).to(device)
    samples = np.zeros((stored, blocks, blocks))
    share = np.bincount(np.arange(plan.groups) * stored // plan.groups)
    at_once = min(plan.groups, max(1, ROWS_BYTES // (bytes_each * plan.group_rows)))
    buffer = torch.empty(
        at_once * plan.group_rows, root.operator.shape[0], dtype=root.operator.dtype, device=root.operator.device
    )
    for start in range(0, plan.groups, at_once):
        groups = range(start, min(start + at_once, plan.groups))
        rows = buffer[: len(groups) * plan.group_rows].view(plan.strata, len(groups), plan.draws, -1)
        shares = _fill_with_random_rows(rows, root, parts, plan, directions, seed, groups)
        for number, group in enumerate(groups):
            mine = columns.split(rows[:, number].reshape(plan.group_rows, -1))  # a copy, unless there is one group only
            place = group * stored // plan.groups
            energies = exact + _group_energies(mine, leading, among, shares[:, number].flatten(0, 1), plan, weights)
            samples[place] += energies.cpu().numpy() / share[place]
        if progress is not None:
            progress(groups.stop * plan.group_rows, plan.groups * plan.group_rows)
    return samples * root.factor**2


def _stored_samples(groups: int, blocks: int) -> int:
    """How many samples are kept: all that fit, but not fewer than FEW_SAMPLES averages of neighbours."""
    return min(groups, max(FEW_SAMPLES, SAMPLES_BYTES // (8 * blocks * blocks)))


def _pair_weights(plan: RowPlan) -> Tensor:
    """Weights [M, M] of the pairs of a group's rows, so that their sum is unbiased; each pair counts once."""
    stratum = torch.arange(plan.group_rows) // plan.draws
    same = stratum[:, None] == stratum[None, :]
    weights = torch.full(same.shape, 1 / plan.draws**2, dtype=torch.float64)
    weights[same] = 1 / (plan.draws * (plan.draws - 1))
    return 2 * weights.triu(1)


def _group_energies(
    rows: BlockRows, leading: BlockRows | None, among: Tensor | None, shares: Tensor, plan: RowPlan, weights: Tensor
) -> Tensor:
    """One sample [B, B] from random rows, without what the leading rows have among themselves.

    The rows' parts along the leading directions, `shares` [M, E] of the leading rows, are taken out of the Gram
    matrices here: in the rows themselves it would be more work.
    """
    own = rows.grams(rows)
    chosen = weights > 0
    flat = []
    if leading is not None and among is not None:
        raw = rows.grams(leading)
        across = raw - shares @ among
        own = own - shares @ raw.mT - across @ shares.T
        flat.append(across.flatten(1) * (2 / plan.draws) ** 0.5)
    flat.append(own[:, chosen] * weights[chosen].sqrt())
    pairs = torch.cat(flat, dim=1)
    return pairs @ pairs.T


def _signs(count: int, part: PartRows, root: Root, seed: int, *path: str | int) -> Tensor:
    signs = rademacher(count * part.size, stream(seed, "dual_energies", *path)).view(count, part.size)
    return signs.to(root.operator.device, root.operator.dtype)


def _fill_with_random_rows(
    rows: Tensor,
    root: Root,
    parts: list[PartRows],
    plan: RowPlan,
    directions: list[Tensor] | None,
    seed: int,
    groups: range,
) -> Tensor:
    """Fill [strata, groups, draws, P]; returns the shares [strata, groups, draws, E] of the leading rows in them."""
    shares = torch.zeros(*rows.shape[:3], plan.leading, dtype=torch.float64, device=rows.device)
    rows.zero_()
    for number, part in root.parts():
        stratum = number % plan.strata
        u = torch.cat([_signs(plan.draws, parts[number], root, seed, group, number) for group in groups])
        part.pull_into(rows[stratum].flatten(0, 1), u)
        if directions is not None:
            shares[stratum] += (u @ directions[number].T).double().view(len(groups), plan.draws, -1)
    return shares


def _leading(
    root: Root, parts: list[PartRows], columns: BlockColumns, plan: RowPlan, seed: int
) -> tuple[list[Tensor] | None, BlockRows | None]:
    """Orthonormal directions Q, [E, size] for every part, and the rows W^T Q.

    Pilot rows, each of one stratum, tell where the leading eigenvectors of G lie; W times these are the directions.
    """
    if plan.leading == 0:
        return None, None
    operator = root.operator
    pilots = torch.zeros(plan.pilots, operator.shape[0], dtype=operator.dtype, device=operator.device)
    for number, part in root.parts():
        own = pilots[number % plan.strata :: plan.strata]
        part.pull_into(own, _signs(len(own), parts[number], root, seed, "pilot", number))
    combinations = torch.linalg.eigh((pilots @ pilots.T).double().cpu()).eigenvectors[:, -plan.leading :]
    rows = combinations.T.to(pilots) @ pilots
    del pilots
    directions = orthonormal([part.push(rows) for _, part in root.parts()])
    rows.zero_()
    for number, part in root.parts():
        part.pull_into(rows, directions[number])
    return directions, columns.split(rows)


def orthonormal(pieces: list[Tensor]) -> list[Tensor]:
    """The rows [q, sum of sizes], given in pieces [q, size], made orthonormal; those that depend on others become zero.

    By the eigenvectors of their Gram matrix, twice, so that they are orthonormal to rounding.
    """
    for _ in range(2):
        gram = torch.zeros(len(pieces[0]), len(pieces[0]), dtype=torch.float64, device=pieces[0].device)
        for piece in pieces:
            wide = piece.double()
            gram += wide @ wide.T
        values, vectors = torch.linalg.eigh(gram.cpu())
        kept = values > len(values) * torch.finfo(pieces[0].dtype).eps * values[-1]
        scale = torch.where(kept, values.clamp(min=torch.finfo(values.dtype).tiny).rsqrt(), 0.0)
        turn = (vectors * scale).T.to(pieces[0])
        pieces = [turn @ piece for piece in pieces]
    return pieces


# --- both -------------------------------------------------------------------------------------------------------------


def _finite(energies: Array) -> Array:
    if not np.isfinite(energies).all():
        raise DataError("the block energies are not finite: the matrix's entries are too large to be squared")
    return energies


def _provenance(operator: Any, how: str, seed: int | None) -> Provenance:
    return Provenance(
        engine=f"block energies: {how}; {operator.engine}",
        dtype=str(operator.dtype).removeprefix("torch."),
        device=str(operator.device),
        data_fingerprint=operator.data_fingerprint,
        seed=seed,
    )
