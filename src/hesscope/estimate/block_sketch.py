"""Bases of what the block columns of a symmetric matrix do most, all from one set of products with full vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[np.float64]

# Numbers of directions of a block that may be taken exactly; sketch vectors that must be left to judge what remains.
WIDTHS = (0, 1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 20, 26)
JUDGES = 6


@dataclass(frozen=True)
class BlockSketch:
    """What products Y = H W with s random sign vectors tell of the B block columns of a symmetric matrix.

    The rows Y_j of block j are a sketch of the range of H[j, :], that is, of the row space of the block column H[:, j]:
    its singular vectors Q_j are the directions of the block that the column stretches most.

    Attributes:
        products: Y, [P, s]; rows: those of each block.
        energies: [B] estimates of the columns' energies ||H[:, j]||^2.
        widths: numbers of directions q taken exactly; variance: [B, len(widths)] estimates, of the column's sampled
            energy ||H[:, j] (1 - Q Q^T) w||^2 with q directions taken out; nan where the block has not so many.
        residual: [B, len(widths)] estimates of the mean of the same.
    """

    products: Tensor
    rows: Sequence[slice | Tensor]
    energies: Array
    widths: tuple[int, ...]
    variance: Array
    residual: Array

    def directions(self, block: int, width: int) -> Tensor:
        """Orthonormal basis [P_j, width] of what the block's column does most, the most important first."""
        Q, R, _ = _factors(self.products[self.rows[block]], "reduced")
        U: Tensor = torch.linalg.svd(R)[0]
        return Q @ U[:, :width].to(Q)


def block_sketch(products: Tensor, rows: Sequence[slice | Tensor]) -> BlockSketch:
    """The sketch from products [P, s] and the rows that belong to each block.

    How much q directions leave is judged by the sketch vectors that are not among the first q, so that no direction is
    judged by the vector that found it; in the end the q best of all s are taken, which leave less.
    """
    count = products.shape[1]
    widths = tuple(width for width in WIDTHS if width == 0 or width <= count - JUDGES)
    energies = np.zeros(len(rows))
    variance, residual = (np.full((len(rows), len(widths)), np.nan) for _ in range(2))
    for block, members in enumerate(rows):
        part = products[members]
        _, small, scale = _factors(part, "r")
        energies[block] = float(small.square().sum()) * scale**2 / count
        for number, width in enumerate(widths):
            if width < len(part):
                left = small[width:, width:]
                gram = left.T @ left
                diagonal = gram.diagonal()
                pairs = len(gram) * (len(gram) - 1)
                # E (y_k . y_l)^2 of independent probes is the sum of the singular values' fourth powers.
                fourth = max(float(gram.square().sum() - diagonal.square().sum()), 0.0) / pairs
                variance[block, number] = 2 * fourth * scale**4
                residual[block, number] = float(diagonal.mean()) * scale**2
    return BlockSketch(products, rows, energies, widths, variance, residual)


def _factors(part: Tensor, mode: str) -> tuple[Tensor, Tensor, float]:
    """Q, R and a scale with part [P_j, s] = scale Q R; R float64 on the CPU, Q empty in mode "r"."""
    scale = float(part.abs().max()) or 1.0  # squares of tiny numbers would vanish
    Q, R = torch.linalg.qr(part / scale, mode=mode)
    return Q, R.double().cpu(), scale
