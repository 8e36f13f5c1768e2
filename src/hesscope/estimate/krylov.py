"""A growing Krylov space with its projected matrix: expansion, restart, and the search for what it cannot see.

The state obeys A Q = Q T + W C^T (up to rounding): Q [P, m] orthonormal is the basis, T [m, m] = Q^T A Q, and the
frontier W [P, b], orthonormal to Q, holds the directions that products have led to but that have not been multiplied
themselves; C [m, b] couples the two. Everything a Krylov method does is a change of this state:

* expanding takes some directions from the frontier into the basis (block Lanczos, if it takes b at a time);
* a restart replaces Q by its best Ritz vectors Q Y, T by the Ritz values, C by Y^T C (thick restart, Wu & Simon 2000;
  Krylov-Schur, Stewart 2001);
* a Ritz pair (theta, Q y) has the residual W C^T y, whose norm is that of C^T y: no product needed;
* a new random direction, orthogonal to Q and W, may join the frontier at any time, with zero coupling. The directions
  that follow it see the operator's compression to the complement of Q and W, so also what the former could not.

Vectors are rows, which is how the engines take columns. The operator is scaled by a power of two, so that no square
vanishes or bursts, and nothing here depends on the operator's scale.
"""

from __future__ import annotations

from math import pi, sqrt

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hesscope.core.rng import normal, rademacher, stream
from hesscope.estimate.lanczos import NOTHING, SHORTENED, finite_products, norms, power_of_two
from hesscope.operators import Operator

Array = npt.NDArray[np.float64]

# Rows that the basis grows by, and entries of it that a restart mixes at once.
ROWS_PER_CHUNK, MIXED_AT_ONCE = 32, 2**22

# Passes of Gram-Schmidt: two suffice unless the direction was nothing but rounding to begin with.
MOST_PASSES = 4

# Length of what is random in a direction that leans towards given ones, whose part has length 1: not so little that a
# direction which leans the wrong way takes many more products, not so much that a right one is drowned.
RANDOM_PART = 0.1

# Vectors, for each that is multiplied, that a three-term recurrence relates its product to, itself included.
NEAR = 2

# A polynomial this large leaves no room for doubt, and its square does not burst.
LARGE = 1e100


class Basis:
    """Orthonormal rows [m, P] in chunks of memory that are taken as they are needed."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.size, self.dtype, self.device = size, dtype, device
        self.length = 0
        self._chunks: list[Tensor] = []

    def parts(self) -> list[Tensor]:
        """The rows, chunk by chunk."""
        counts = (self.length - ROWS_PER_CHUNK * number for number in range(len(self._chunks)))
        return [chunk[:count] for chunk, count in zip(self._chunks, counts, strict=True) if count > 0]

    def append(self, rows: Tensor) -> None:
        """Add rows [K, P] at the end."""
        for row in rows:
            number, place = divmod(self.length, ROWS_PER_CHUNK)
            if number == len(self._chunks):
                self._chunks.append(torch.empty(ROWS_PER_CHUNK, self.size, dtype=self.dtype, device=self.device))
            self._chunks[number][place] = row
            self.length += 1

    def remove_from_(self, rows: Tensor, first: int = 0) -> Array:
        """Subtract from rows [K, P] their projection on the basis, in place; returns the overlaps [m, K].

        `first`: only the basis' rows from this one on; the overlaps with those before count as 0.
        """
        number, place = divmod(first, ROWS_PER_CHUNK)
        parts = self.parts()[number:]
        if parts:
            parts[0] = parts[0][place:]
        overlaps = [part @ rows.T for part in parts]
        for part, overlap in zip(parts, overlaps, strict=True):
            rows.addmm_(overlap.T, part, alpha=-1)
        found = np.zeros((self.length, len(rows)))
        if overlaps:
            found[first:] = torch.cat(overlaps).double().cpu().numpy()
        return found

    def combine(self, Y: Array) -> Tensor:
        """Linear combinations [K, P] of the rows with coefficients Y [m, K]."""
        coefficients = torch.from_numpy(np.ascontiguousarray(Y.T)).to(self.device, self.dtype)
        total = torch.zeros(Y.shape[1], self.size, dtype=self.dtype, device=self.device)
        for number, part in enumerate(self.parts()):
            start = number * ROWS_PER_CHUNK
            total.addmm_(coefficients[:, start : start + len(part)], part)
        return total

    def replace(self, Y: Array) -> None:
        """Become the combinations Y [m, K <= m], a tile of columns after the other, in the memory that is there."""
        coefficients = torch.from_numpy(np.ascontiguousarray(Y.T)).to(self.device, self.dtype)
        parts, kept = self.parts(), Y.shape[1]
        width = max(1, MIXED_AT_ONCE // self.length)
        for start in range(0, self.size, width):
            tile = slice(start, start + width)
            mixed = coefficients @ torch.cat([part[:, tile] for part in parts])
            for part, rows in zip(self._chunks, torch.split(mixed, ROWS_PER_CHUNK), strict=False):
                part[: len(rows), tile] = rows
        self.length = kept
        del self._chunks[-(-kept // ROWS_PER_CHUNK) :]


class KrylovSpace:
    """The state A Q = Q T + W C^T of the module's docstring, for `sign` times the operator over `scale`."""

    def __init__(self, operator: Operator, device: torch.device, seed: int, sign: float = 1.0) -> None:
        self.operator, self.sign, self.seed = operator, sign, seed
        self.size = operator.shape[0]
        self.basis = Basis(self.size, operator.dtype, device)
        self.frontier = torch.empty(0, self.size, dtype=operator.dtype, device=device)
        self.T = np.zeros((0, 0))
        self.C = np.zeros((0, 0))
        self.eps = float(torch.finfo(operator.dtype).eps)
        self.scale, self.norm = 0.0, 0.0
        self.products, self.drawn = 0, 0

    @property
    def length(self) -> int:
        """Vectors in the basis."""
        return self.basis.length

    def multiply(self, rows: Tensor) -> Tensor:
        """`sign` times the operator times rows [K, P], over `scale`; both on the basis' device."""
        images = finite_products(self.operator, rows.to(self.operator.device)).to(self.basis.device)
        self.products += len(rows)
        if self.scale == 0:
            self.scale = power_of_two(float(images.abs().max()))
        images.mul_(self.sign / self.scale)
        self.norm = max(self.norm, float(norms(images).max()))
        return images

    def draw(self, count: int, towards: Tensor | None = None) -> int:
        """Put up to `count` random directions in front of the frontier; fewer if the space is full. Returns how many.

        They are isotropic in the complement of basis and frontier, whatever these have become; or lean towards random
        combinations of unit rows [j, P], with RANDOM_PART of their length isotropic.
        """
        count = min(count, self.size - self.length - len(self.frontier))
        for _ in range(count):
            generator = stream(self.seed, "top_eigenpairs", self.drawn)
            row = normal((1, self.size), generator)
            self.drawn += 1
            row = row.to(self.basis.device, self.basis.dtype)
            if towards is not None:
                mixed = mixing_weights(len(towards), generator).to(towards)[None] @ towards
                row = RANDOM_PART * unit_rows(row) + unit_rows(mixed).sum(0, keepdim=True)  # no rows: they cancel
            rows, _, _ = self._orthonormalized(row, self.frontier, floor=0.0)
            self.frontier = torch.cat([rows, self.frontier])
            self.C = np.concatenate([np.zeros((self.length, len(rows))), self.C], axis=1)
        return count

    def focus(self, Y: Array) -> None:
        """Turn the frontier so that its first directions carry most of the residuals of the Ritz vectors Y [m, K]."""
        if len(self.frontier) < 2:
            return
        U = np.linalg.svd(self.C.T @ Y, full_matrices=True)[0]
        self.frontier = torch.from_numpy(U.T.copy()).to(self.frontier) @ self.frontier
        self.C = self.C @ U

    def expand(self, count: int) -> None:
        """Multiply the first `count` directions of the frontier and take them into the basis.

        The new directions they lead to come first in the frontier; none where the operator leads nowhere new.
        """
        taken, rest = self.frontier[:count], self.frontier[count:]
        count, old = len(taken), self.length
        images = self.multiply(taken)
        self.basis.append(taken)
        rows, overlaps, lengths = self._orthonormalized(images, rest, NOTHING * self.eps * self.norm)
        here, ahead = overlaps[: self.length], overlaps[self.length :]
        T = np.empty((self.length, self.length))
        T[:old, :old] = self.T
        T[:, old:] = here
        T[old:, :] = here.T
        T[old:, old:] = (here[old:] + here[old:].T) / 2
        self.T = T
        behind = np.concatenate([np.zeros((old, len(rows))), self.C[:, count:]], axis=1)
        self.C = np.concatenate([behind, np.concatenate([lengths, ahead.T], axis=1)])
        self.frontier = torch.cat([rows, rest])

    def ritz(self) -> tuple[Array, Array]:
        """Ritz values [m], ascending, and their vectors' coefficients [m, m]."""
        values, Y = np.linalg.eigh(self.T)
        return values, Y

    def residuals(self, Y: Array) -> Array:
        """Norms [K] of the residuals of the Ritz vectors Y [m, K], as far as rounding lets C tell."""
        result: Array = np.linalg.norm(self.C.T @ Y, axis=0)
        return result

    def restart(self, values: Array, Y: Array) -> None:
        """Keep only the Ritz vectors Y [m, K] with their `values`."""
        self.basis.replace(Y)
        self.T, self.C = np.diag(values), Y.T @ self.C

    def _orthonormalized(self, rows: Tensor, beside: Tensor, floor: float) -> tuple[Tensor, Array, Array]:
        """What of rows [K, P] is orthogonal to basis and `beside`, as orthonormal rows [r <= K, P].

        A first pass takes away what the recurrence is made of, the overlaps with the last few vectors; those with all
        others are then mostly rounding. Passes over the whole basis go on until one leaves the lengths as they are
        (Daniel, Gragg, Kaufman and Stewart 1976), and are half of the work where vectors are long. Directions shorter
        than `floor` are nothing.

        Returns:
            The rows; overlaps [m + len(beside), K] of the given rows; lengths [K, r], so that the given rows are
            overlaps^T (basis, beside) + lengths (rows).
        """
        rows = rows.clone()
        overlaps, lengths = np.zeros((self.length + len(beside), len(rows))), np.eye(len(rows))
        overlaps[: self.length] = self.basis.remove_from_(rows, max(0, self.length - NEAR * len(rows)))
        for _ in range(MOST_PASSES):
            whole = norms(rows).max()
            removed = [self.basis.remove_from_(rows)]
            shadow = beside @ rows.T
            rows.addmm_(shadow.T, beside, alpha=-1)
            removed.append(shadow.double().cpu().numpy())
            overlaps += np.concatenate(removed) @ lengths.T
            Z, B = _normalized(rows.T) if len(rows) == 1 else torch.linalg.qr(rows.T)
            U, kept_lengths, V = np.linalg.svd(B.double().cpu().numpy())
            mixed = lengths @ V.T * kept_lengths
            kept = np.linalg.norm(mixed, axis=0) > floor
            rows = (Z @ torch.from_numpy(U[:, kept]).to(rows)).T
            lengths = mixed[:, kept]
            if not kept.any() or kept_lengths[kept].min() >= SHORTENED * whole:
                break
        return rows, overlaps, lengths


def mixing_weights(count: int, generator: np.random.Generator) -> Tensor:
    """Random weights [count] of mean 0 and mean square 1 for a combination of vectors, float64.

    Neither does a small one hide a vector, nor do equal ones cancel, as they may with signs.
    """
    return rademacher(count, generator) * torch.from_numpy(generator.uniform(0.5, 1.5, count)).sqrt()


def unit_rows(rows: Tensor) -> Tensor:
    """Rows [K, P], divided by their lengths; without those that are zero."""
    largest = rows.abs().amax(1, keepdim=True)
    rows = rows / largest  # so that no square vanishes or bursts
    rows = rows[(largest > 0)[:, 0]]
    units: Tensor = rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return units


def _normalized(column: Tensor) -> tuple[Tensor, Tensor]:
    """QR of a single column [P, 1], several times faster than by reflections."""
    length = torch.from_numpy(norms(column.T))
    return column / length.to(column) if length > 0 else column, length[None]


def overlooked(dimension: int, diagonal: list[float], off_diagonal: list[float], level: float) -> float:
    """Bound on the probability that an eigenvalue beyond `level` hides from a Lanczos run that shows none.

    The run starts from a random direction w and has the recurrence p_0 = 1, b_j p_j+1 = (x - a_j) p_j - b_j-1 p_j-1. An
    eigenvector v with eigenvalue x has the overlaps <q_j, v> = p_j(x) <w, v> with its orthonormal vectors, and their
    squares sum to at most 1 (Bessel): <w, v>^2 <= 1 / S, S = sum_j p_j(x)^2, which grows with x beyond the run's own
    Ritz values. In n = `dimension` dimensions an isotropic w is that nearly orthogonal to v with probability
    sqrt(2 n / (pi S)) at most. Sharper than the a priori bound of Kuczynski & Wozniakowski (1992), since it uses what
    the run has seen.
    """
    total, before, now = 0.0, 0.0, 1.0
    beside = [0.0, *off_diagonal]
    for number, (a, b) in enumerate(zip(diagonal, off_diagonal, strict=True)):
        total += now * now
        if b == 0:
            return 0.0  # the run has seen every eigenvalue that w has to show, and w shows all
        before, now = now, ((level - a) * now - beside[number] * before) / b
        if abs(now) > LARGE:
            return 0.0
    return min(1.0, sqrt(2 * dimension / (pi * (total + now * now))))
