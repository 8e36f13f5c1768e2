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


@dataclass(frozen=True)
class Pinched:
    """Independent samples, a row for each of G groups; the mean over rows is unbiased.

    Attributes:
        kept: [G, T] energy in the diagonal blocks, for each of T consecutive pieces of the parameter vector.
        rows: [G, B] energy ||H_j||^2 in the rows of each block.
        forms: [G] sum_j g_j.H_jj g_j for each of some vectors g.
    """

    kept: Array
    rows: Array
    forms: tuple[Array, ...]


def pinched_samples(
    operator: Operator,
    low_rank: LowRank,
    partition: Partition,
    pieces: tuple[int, ...],
    groups: int,
    signs_per_group: int,
    seed: int,
    name: str,
    vectors: tuple[Tensor, ...],
    products: CountedProducts,
) -> Pinched:
    """Samples for one partition; takes groups * (signs_per_group + 2 len(vectors)) products.

    Args:
        pieces: sizes of the T pieces of the parameter vector; no block may reach into two of them, unless T = 1.
        name: of the partition's stream of signs; the vectors v are the same for all partitions, so that these can be
            compared with less error than each has.
        vectors: [P] each, whose quadratic forms with the block-diagonal part are wanted.
    """
    device, blocks = operator.device, len(partition)
    assignment = torch.from_numpy(partition.assignment.astype(np.int64)).to(device)
    exact = _summed(low_rank.block_energies(partition), piece_of_block(partition, pieces), len(pieces))
    base = _by_block(low_rank.row_energies(), assignment, blocks)
    held = [float(v.double() @ low_rank.pinched(assignment, blocks, v).double()) for v in vectors]
    kept, rows = np.empty((groups, len(pieces))), np.empty((groups, blocks))
    forms = tuple(np.empty(groups) for _ in vectors)
    for group in range(groups):
        (v,) = signs(operator, seed, "pinching", "vectors", range(group, group + 1)).T
        drawn = _block_signs(operator, assignment, blocks, seed, name, group, signs_per_group)
        W = drawn * v[:, None]
        image = products(W)
        captured = low_rank @ W
        # Rows: ||H_j||^2 = ||A_j||^2 + E[2 (A w)_j . (R w)_j + ||(R w)_j||^2].
        rest = image - captured
        sampled = (rest * (rest + 2 * captured)).double().mean(dim=1)
        rows[group] = (base + _by_block(sampled, assignment, blocks)).cpu().numpy()
        Y = rest * drawn
        across = low_rank.pinched(assignment, blocks, v)
        start = 0
        for piece, size in enumerate(pieces):
            part = Y[start : start + size].double()
            pairs = part.sum(dim=1).square().sum() - part.square().sum()
            cross = across[start : start + size].double() @ part.mean(dim=1)
            count = signs_per_group * (signs_per_group - 1)
            kept[group, piece] = exact[piece] + 2 * float(cross) + float(pairs) / count
            start += size
        for number, vector in enumerate(vectors):
            X = drawn[:, :2] * vector[:, None]
            remainder = (X * (products(X) - low_rank @ X)).sum(dtype=torch.float64) / 2
            forms[number][group] = held[number] + float(remainder)
    return Pinched(kept, rows, forms)


def _block_signs(
    operator: Operator, assignment: Tensor, blocks: int, seed: int, name: str, group: int, count: int
) -> Tensor:
    """`count` random signs for every block, spread over its parameters, [P, count]."""
    drawn = rademacher(blocks * count, stream(seed, "pinching", name, group)).reshape(blocks, count)
    return drawn.to(operator.device).to(operator.dtype)[assignment]


def _by_block(entries: Tensor, assignment: Tensor, blocks: int) -> Tensor:
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
