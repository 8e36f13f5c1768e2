"""What the diagonal blocks of a symmetric matrix keep of it, from random signs: for 10^5 blocks as for ten.

The block-diagonal part of H is its mean over random signs S, one for each block: bd(H) = E[S H S] (a pinching; Bhatia,
Matrix Analysis, 1997, section IV.2). So for one random vector v and independent signs S_a, S_b,

    E (S_a H S_a v) . (S_b H S_b v) = ||bd(H) v||^2,   and over v   E ||bd(H) v||^2 = sum_j ||H_jj||^2,

where a product for every block would take B of them. What a few eigenvectors carry (LowRank) is known exactly, and
taken out first: H = A + R, with

    ||bd H||^2 = ||bd A||^2 + E [2 (bd(A) v) . (S_b R S_b v) + (S_a R S_a v) . (S_b R S_b v)].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hesscope.core.rng import rademacher, stream
from hesscope.estimate.low_rank import LowRank
from hesscope.estimate.products import CountedProducts, signs
from hesscope.operators.operator import Operator
from hesscope.partition.partition import Partition

Array = npt.NDArray[np.float64]

# Rows that are taken to float64 at once.
ROWS_AT_ONCE = 2**20

# From this share of the energy on the diagonal on, what lies off it is estimated directly.
MOSTLY_DIAGONAL = 0.9
# The first group tells whether it may come to that.
NEARLY = 0.5

# Groups of probes, signs for each group, and the seed.
Plan = tuple[int, int, int]


@dataclass(frozen=True)
class Scaled:
    """A matrix times `factor`, by counted products, and its part of low rank (times the factor already)."""

    products: CountedProducts
    low_rank: LowRank
    factor: float

    @property
    def operator(self) -> Operator:
        """The matrix itself."""
        return self.products.operator

    def __call__(self, V: Tensor) -> Tensor:
        """Products with V [P, K]."""
        return self.products(V) * self.factor

    def form(self, v: Tensor) -> float:
        """v.H v, times the factor."""
        return float(v.double() @ self(v[:, None])[:, 0].double())


@dataclass(frozen=True)
class Pinched:
    """Independent samples, a row for each of G groups; the mean over rows is unbiased.

    Attributes:
        kept: [G, T] energy in the diagonal blocks, for each of T consecutive pieces of the parameter vector.
        rows: [G, B] energy ||H_j||^2 in the rows of each block.
        forms: [G] sum_j g_j.H_jj g_j for each of some vectors g.
        entries: for each group [P], float64: energy of every single row within its block; None unless asked for.
    """

    kept: Array
    rows: Array
    forms: tuple[Array, ...]
    entries: tuple[Tensor, ...] | None


def pinched_samples(
    matrix: Scaled,
    partition: Partition,
    pieces: tuple[int, ...],
    plan: Plan,
    name: str,
    vectors: tuple[Tensor, ...],
    entries: bool = False,
) -> Pinched:
    """Samples for one partition; takes groups * (signs per group + len(vectors)) products.

    Args:
        pieces: sizes of the T pieces of the parameter vector; no block may reach into two of them, unless T = 1.
        name: of the partition's stream of signs; the vectors v are the same for all partitions, so that these can be
            compared with less error than each has.
        vectors: [P] each, whose quadratic forms with the block-diagonal part are wanted.
        entries: whether the energies of single rows are kept.
    """
    (groups, each, seed), low_rank, operator = plan, matrix.low_rank, matrix.operator
    blocks = len(partition)
    assignment = torch.from_numpy(partition.assignment.astype(np.int64)).to(operator.device)
    exact = _summed(low_rank.block_energies(partition), piece_of_block(partition, pieces), len(pieces))
    base = low_rank.row_energies()
    held = [float(v.double() @ low_rank.pinched(assignment, blocks, v).double()) for v in vectors]
    kept, off, rows = np.empty((groups, len(pieces))), np.empty((groups, len(pieces))), np.empty((groups, blocks))
    forms = tuple(np.empty(groups) for _ in vectors)
    single: list[Tensor] = []
    near = False
    for group in range(groups):
        (v,) = signs(operator, seed, "pinching", "vectors", range(group, group + 1)).T
        drawn = _block_signs(operator, assignment, blocks, seed, name, group, each)
        W = drawn * v[:, None]
        captured = low_rank @ W
        rest = matrix(W) - captured
        # Rows: ||H_j||^2 = ||A_j||^2 + E[2 (A w)_j . (R w)_j + ||(R w)_j||^2].
        of_rows = base + (rest * (rest + 2 * captured)).mean(dim=1, dtype=torch.float64)
        rows[group] = by_block(of_rows, assignment, blocks).cpu().numpy()
        Y = rest * drawn
        across = low_rank.pinched(assignment, blocks, v)
        start = 0
        for piece, size in enumerate(pieces):
            place = slice(start, start + size)
            cross = float(across[place].double() @ Y[place].mean(dim=1, dtype=torch.float64))
            kept[group, piece] = exact[piece] + 2 * cross + _pairs_in_all(Y[place])
            start += size
        if group == 0:
            near = bool(kept[0].sum() > NEARLY * rows[0].sum())
        if near:
            # E ||S_a H S_a v - S_b H S_b v||^2 / 2 = ||H - bd H||^2, 0 to the last digit for a block-diagonal H.
            spread = (Y + captured * drawn).double().var(dim=1)
            off[group] = [
                float((a - b).sum()) for a, b in zip(of_rows.split(pieces), spread.split(pieces), strict=True)
            ]
        if entries:
            whole = Y + across[:, None]  # bd(A) + S R S, times v
            single.append(torch.cat([_pairs(part.double()) for part in torch.split(whole, ROWS_AT_ONCE)]))
        for number, vector in enumerate(vectors):
            X = drawn[:, :1] * vector[:, None]
            remainder = (X * (matrix(X) - low_rank @ X)).sum(dtype=torch.float64)
            forms[number][group] = held[number] + float(remainder)
    if near and kept.sum() > MOSTLY_DIAGONAL * rows.sum():
        kept = off
    return Pinched(kept, rows, forms, tuple(single) if entries else None)


def _pairs_in_all(images: Tensor) -> float:
    """Sum over entries of the mean of y_a y_b over pairs a != b of the columns of images [n, m]."""
    gram = torch.zeros(images.shape[1], images.shape[1], dtype=torch.float64, device=images.device)
    for part in torch.split(images, ROWS_AT_ONCE // 8):
        gram += (part.T @ part).double()
    return float(gram.sum() - gram.trace()) / (len(gram) * (len(gram) - 1))


def _pairs(images: Tensor) -> Tensor:
    """Mean of y_a y_b over pairs a != b of the columns of images [n, m], entry by entry, [n]."""
    count = images.shape[1]
    found: Tensor = (images.sum(dim=1).square() - images.square().sum(dim=1)) / (count * (count - 1))
    return found


def _block_signs(
    operator: Operator, assignment: Tensor, blocks: int, seed: int, name: str, group: int, count: int
) -> Tensor:
    """`count` random signs for every block, spread over its parameters, [P, count]."""
    drawn = rademacher(blocks * count, stream(seed, "pinching", name, group)).reshape(blocks, count)
    return drawn.to(operator.device).to(operator.dtype)[assignment]


def by_block(entries: Tensor, assignment: Tensor, blocks: int) -> Tensor:
    """Sums of entries [P] over each block, [B] float64."""
    return torch.zeros(blocks, dtype=torch.float64, device=entries.device).index_add_(0, assignment, entries)


def piece_of_block(partition: Partition, pieces: tuple[int, ...]) -> npt.NDArray[np.int64]:
    """Which piece of the parameter vector each block lies in."""
    if len(pieces) == 1:
        return np.zeros(len(partition), dtype=np.int64)
    first = np.empty(len(partition), dtype=np.int64)
    first[partition.assignment[::-1]] = np.arange(partition.size)[::-1]
    return np.searchsorted(np.cumsum(pieces), first, side="right")


def _summed(energies: Tensor, groups: npt.NDArray[np.int64], count: int) -> Array:
    found: Array = np.bincount(groups, energies.cpu().numpy(), count).astype(np.float64)
    return found
