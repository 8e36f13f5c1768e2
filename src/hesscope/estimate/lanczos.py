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
# A pass of Gram-Schmidt that leaves so much of a vector has left no more than rounding of what it took away.
SHORTENED = 0.7
# Entries whose squares are added up in the dtype of the vectors; sums of pieces are added in float64.
PIECE = 1024


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
    parts = [(operator @ given.T).T for given in torch.split(rows, operator.columns_per_pass)]
    # Copied, since a product may be held by the operator; contiguous, since it may be a transposed matrix.
    results = torch.cat(parts) if len(parts) > 1 else parts[0].clone(memory_format=torch.contiguous_format)
    # A sum shows most of what is not finite, in one pass; it may burst where all entries are finite.
    if not bool(results.sum().isfinite()) and not bool(results.isfinite().all()):
        raise DataError("a product of the operator is not finite: look for nan or overflow in the loss or the matrix")
    return results


def power_of_two(size: float) -> float:
    """The power of two next to `size`, 1 for 0: dividing by it rounds nothing, and squares neither vanish nor burst."""
    return 2.0 ** frexp(size)[1] if size > 0 else 1.0


def norms(rows: Tensor) -> Array:
    """Euclidean norms [K] of rows [K, P], added up in float64."""
    # Short pieces in the rows' own dtype, which is exact enough, so that nothing is converted at full length.
    whole = rows.shape[-1] - rows.shape[-1] % PIECE
    pieces = rows[:, :whole].reshape(len(rows), -1, PIECE)
    squares = [torch.linalg.vector_norm(part, dim=-1).double().square() for part in (pieces, rows[:, whole:])]
    result: Array = (squares[0].sum(1) + squares[1]).sqrt().cpu().numpy()
    return result


class _Loss:
    """Estimated overlaps of the next basis vectors with all before them, by Simon's recurrence."""

    def __init__(self, count: int, steps: int, eps: float) -> None:
        self._eps = eps
        # Overlaps of the last vector and of the one before with all vectors, [count, steps].
        self._last, self._before = np.zeros((count, steps + 1)), np.zeros((count, steps + 1))
        self._last[:, 0] = 1.0

    def grows(self, step: int, diagonals: Array, off_diagonals: Array, left: Array) -> bool:
        """Follow the overlaps of vector step + 1, whose norm is `left`; whether they are too large for any of them."""
        a, b = diagonals, off_diagonals
        following = np.zeros_like(self._last)
        k = np.arange(step)
        if step:
            above = b[:, k] * self._last[:, k + 1] + (a[:, k] - a[:, [step]]) * self._last[:, k]
            below = np.where(k > 0, b[:, np.maximum(k - 1, 0)] * self._last[:, np.maximum(k - 1, 0)], 0.0)
            total = above + below - b[:, [step - 1]] * self._before[:, k]
            rounding = self._eps * (b[:, k] + left[:, None])
            with np.errstate(divide="ignore", invalid="ignore"):
                following[:, k] = (total + np.copysign(rounding, total)) / left[:, None]
        following[:, step] = self._eps
        following[:, step + 1] = 1.0
        # A vector that has come to its end (norm 0) has nothing to lose.
        following = np.where(np.isfinite(following), following, 0.0)
        self._before, self._last = self._last, following
        return bool(np.abs(following[:, : step + 1]).max() > self._eps**0.5)

    def reset(self, step: int) -> None:
        """The next vector has been orthogonalized."""
        self._last[:, : step + 1] = self._eps


def lanczos(
    operator: Operator, starts: Tensor, steps: int, progress: Callable[[int], None] | None = None
) -> Recurrences:
    """Recurrences of all starting vectors at once, each kept orthogonal to its whole basis as far as that matters.

    Orthogonality is lost only where a Ritz value converges. Simon's recurrence (1984, "The Lanczos algorithm with
    partial reorthogonalization") follows the loss in numbers; when it reaches the square root of the rounding unit, and
    in the step after, vectors are orthogonalized against the whole basis, by a pass of classical Gram-Schmidt as
    batched matrix products, and by a second one if the first has shortened a vector (Daniel, Gragg, Kaufman & Stewart
    1976). Up to that square root the tridiagonal matrix is that of exact orthogonality to rounding (Simon's theorem
    4), without copies of converged eigenvalues; and most of the traffic with the basis, which for millions of
    parameters costs as much as the products, falls away. The operator sees all vectors that still go on as one block.

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
    current, again = starts, False
    loss = _Loss(count, steps, torch.finfo(starts.dtype).eps)
    for step in range(steps):
        # Vectors that have come to their end are zero, and so is everything that is computed from them.
        basis[:, step] = current
        index = torch.from_numpy(going).to(starts.device)
        if len(going) == count:
            images = finite_products(operator, current)
        else:
            images = torch.zeros_like(current)
            images[index] = finite_products(operator, current[index])
        products += len(going)
        if step == 0:
            scale = power_of_two(float(images.abs().max()))
        images.div_(scale)
        before = norms(images)
        for _ in range(2):
            along = (images * current).sum(1)
            images.addcmul_(current, along.unsqueeze(1), value=-1)
            diagonals[:, step] += along.double().cpu().numpy()
            if step:
                # The second time the overlap itself: what the first has left of it by rounding.
                last = basis[:, step - 1]
                beside = (images * last).sum(1)
                images.addcmul_(last, beside.unsqueeze(1), value=-1)
        left = norms(images)
        if loss.grows(step, diagonals, off_diagonals, left) or again:
            again = not again
            known = basis[:, : step + 1]
            for _ in range(2):
                overlaps = torch.bmm(known, images.unsqueeze(2))
                images -= torch.bmm(overlaps.transpose(1, 2), known).squeeze(1)
                diagonals[:, step] += overlaps[:, -1, 0].double().cpu().numpy()
                whole, left = left, norms(images)
                if bool((left >= SHORTENED * whole).all()):
                    break
            loss.reset(step)
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
