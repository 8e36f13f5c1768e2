"""LowRank: the part of a symmetric matrix that a few eigenvectors carry, and what a partition's blocks keep of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hesscope.estimate.products import CountedProducts, signs
from hesscope.estimate.sketch import Sketch
from hesscope.operators.operator import Operator
from hesscope.partition.partition import Partition

# Entries of gathered rows at once.
AT_ONCE = 2**24


@dataclass(frozen=True)
class LowRank:
    """U diag(values) U^T with orthonormal columns.

    Attributes:
        U: [P, r], in the matrix's dtype; values: [r] float64 on the CPU, the largest in magnitude first.
    """

    U: Tensor
    values: Tensor

    @classmethod
    def of(cls, operator: Operator, width: int, seed: int, products: CountedProducts) -> LowRank:
        """The matrix on the span of Q and A Q, where Q has `width` columns; takes 2 width products.

        That is two steps of a block Krylov method from random signs W: with Q from A W and Z = A Q, the matrix
        A_hat = Q Z^T + Z Q^T - Q (Q^T Z) Q^T has A's products with Q, and rank 2 width (Halko, Martinsson and Tropp,
        SIAM Review 53, 2011, section 5).
        """
        W = signs(operator, seed, "low rank", "sketch", range(width))
        sketch = Sketch.of(W, products(W), products)
        Q, Z = sketch.Q.double(), sketch.Z.double()
        basis, R = torch.linalg.qr(torch.cat([Q, Z], dim=1))
        unit = torch.eye(width, dtype=R.dtype, device=R.device)
        core = torch.zeros(2 * width, 2 * width, dtype=R.dtype, device=R.device)
        core[:width, :width] = -(Q.T @ Z + Z.T @ Q) / 2
        core[:width, width:] = core[width:, :width] = unit
        values, vectors = torch.linalg.eigh(R @ core @ R.T)
        order = values.abs().argsort(descending=True)
        return cls((basis @ vectors[:, order]).to(operator.dtype), values[order].cpu())

    def scaled(self, factor: float) -> LowRank:
        """The matrix times a number."""
        return LowRank(self.U, self.values * factor)

    def truncated(self, rank: int) -> LowRank:
        """The `rank` largest in magnitude."""
        return LowRank(self.U[:, :rank].contiguous(), self.values[:rank])

    def __matmul__(self, V: Tensor) -> Tensor:
        """Product with V [P] or [P, K]."""
        inner = self.U.T @ V
        weights = self.values.to(self.U)
        product: Tensor = self.U @ (inner * (weights if V.ndim == 1 else weights[:, None]))
        return product

    def row_energies(self) -> Tensor:
        """Squared norm of every row, [P] float64."""
        energies: Tensor = self.U.double().square() @ self.values.to(self.U.device).square()
        return energies

    def block_energies(self, partition: Partition) -> Tensor:
        """Squared Frobenius norms of the diagonal blocks, [B] float64: sum_kl lambda_k lambda_l (U_j^T U_j)_kl^2."""
        found = torch.zeros(len(partition), dtype=torch.float64, device=self.U.device)
        weights = torch.outer(self.values, self.values).to(found)
        for blocks, positions in _alike(partition, AT_ONCE // self.U.shape[1]):
            part = self.U[positions.to(self.U.device)].double()  # [blocks, size, r]
            gram = part.transpose(1, 2) @ part
            found[blocks.to(self.U.device)] = (gram.square() * weights).sum(dim=(1, 2))
        return found

    def pinched(self, assignment: Tensor, blocks: int, v: Tensor) -> Tensor:
        """Product of the block-diagonal part with v [P]; `assignment` [P] are the blocks' numbers."""
        inner = torch.zeros(blocks, self.U.shape[1], dtype=self.U.dtype, device=self.U.device)
        step = max(1, AT_ONCE // self.U.shape[1])
        parts = list(zip(*(torch.split(each, step) for each in (self.U, v, assignment)), strict=True))
        for rows, entries, numbers in parts:
            inner.index_add_(0, numbers, rows * entries[:, None])
        inner *= self.values.to(inner)
        return torch.cat([torch.linalg.vecdot(rows, inner[numbers]) for rows, _, numbers in parts])


def _alike(partition: Partition, entries: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Blocks of one size together: their numbers [b], and their positions [b, size] with at most `entries` in all."""
    members = partition.members()
    sizes = torch.tensor(partition.sizes)
    for size in sorted(set(partition.sizes)):
        for blocks in torch.split((sizes == size).nonzero().squeeze(1), max(1, entries // size)):
            yield blocks, torch.stack([torch.from_numpy(members[int(block)]) for block in blocks])
