"""Lanczos recurrences of several starting vectors in lockstep, and the products that every Krylov method takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import frexp

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hesscope.core.errors import DataError
from hesscope.operators import Operator

Array = npt.NDArray[np.float64]
Progress = Callable[[int, int], None]

# A direction this many roundings (times the size of the operator) long is what rounding has left of nothing.
NOTHING = 10


@dataclass(frozen=True, eq=False)
class Recurrences:
    """Tridiagonal matrices of n starting vectors.

    Attributes:
        diagonals: [n, steps]; off_diagonals: [n, steps], the last of a row is the norm of what was left at the end.
        lengths: [n] rows that each matrix has; fewer than `steps` where the Krylov space was exhausted.
        products: of the operator with a vector.
    """

    diagonals: Array
    off_diagonals: Array
    lengths: npt.NDArray[np.int64]
    products: int

    def quadratures(self) -> tuple[Array, Array]:
        """Nodes and weights [n, steps] of the Gauss quadratures; a row's unused end is zero.

        Golub & Welsch (1969): eigenvalues, and squared first components of the eigenvectors.
        """
        nodes, weights = np.zeros_like(self.diagonals), np.zeros_like(self.diagonals)
        scale = power_of_two(float(np.abs([self.diagonals, self.off_diagonals]).max()))
        for row, length in enumerate(self.lengths):
            beside = self.off_diagonals[row, : length - 1]
            T = np.diag(self.diagonals[row, :length]) + np.diag(beside, 1) + np.diag(beside, -1)
            values, vectors = np.linalg.eigh(T / scale)
            nodes[row, :length], weights[row, :length] = values * scale, vectors[0] ** 2
        return nodes, weights


def finite_products(operator: Operator, rows: Tensor) -> Tensor:
    """The operator times each of `rows` [K, P], `columns_per_pass` at a time; returns rows [K, P] of our own.

    Raises:
        DataError: a product is not finite.
    """
    results = torch.empty_like(rows)
    parts = (torch.split(tensor, operator.columns_per_pass) for tensor in (rows, results))
    for given, result in zip(*parts, strict=True):
        result.copy_((operator @ given.T).T)
    if not bool(torch.isfinite(results).all()):
        raise DataError("a product of the operator is not finite: look for nan or overflow in the loss or the matrix")
    return results


def power_of_two(size: float) -> float:
    """The power of two next to `size`, 1 for 0: dividing by it rounds nothing, and squares neither vanish nor burst."""
    return 2.0 ** frexp(size)[1] if size > 0 else 1.0


def norms(rows: Tensor) -> Array:
    """Euclidean norms [K] of rows [K, P], added up in float64."""
    result: Array = torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float64).cpu().numpy()
    return result


def lanczos(
    operator: Operator, starts: Tensor, steps: int, progress: Callable[[int], None] | None = None
) -> Recurrences:
    """Recurrences of all starting vectors at once, each orthogonalized twice against its whole basis.

    Two passes of classical Gram-Schmidt keep the basis orthogonal to working precision (Giraud, Langou & Rozloznik
    2005), so that there are no copies of converged eigenvalues; both are batched matrix products. The operator sees
    all vectors that still go on as one block of columns.

    Args:
        operator: symmetric.
        starts: [n, P] of unit norm, in the operator's dtype and on its device.
        steps: at most P.
        progress: called with the number of products done.

    Raises:
        DataError: a product is not finite.
    """
    count, size = starts.shape
    basis = starts.new_zeros(count, steps, size)
    diagonals, off_diagonals = np.zeros((count, steps)), np.zeros((count, steps))
    lengths, going = np.zeros(count, dtype=np.int64), np.arange(count)
    largest, scale, products = np.zeros(count), 1.0, 0
    current = starts
    for step in range(steps):
        # Vectors that have come to their end are zero, and so is everything that is computed from them.
        basis[:, step] = current
        index = torch.from_numpy(going).to(starts.device)
        images = torch.zeros_like(current)
        images[index] = finite_products(operator, current[index])
        products += len(going)
        if step == 0:
            scale = power_of_two(float(images.abs().max()))
        images.div_(scale)
        before = norms(images)
        known = basis[:, : step + 1]
        for _ in range(2):
            overlaps = torch.bmm(known, images.unsqueeze(2))
            images -= torch.bmm(overlaps.transpose(1, 2), known).squeeze(1)
            diagonals[:, step] += overlaps[:, -1, 0].double().cpu().numpy()
        left = norms(images)
        largest = np.maximum(largest, before)
        lengths[going] = step + 1
        goes_on = left > NOTHING * torch.finfo(starts.dtype).eps * largest
        going = going[goes_on[going]]
        left[~goes_on] = 0.0
        off_diagonals[:, step] = left
        if progress is not None:
            progress(products)
        if not len(going):
            break
        factors = torch.from_numpy(np.divide(1.0, left, out=np.zeros(count), where=goes_on))
        current = images * factors.to(images).unsqueeze(1)
    return Recurrences(diagonals * scale, off_diagonals * scale, lengths, products)
