"""A layer's matrix H as a sum of Kronecker products, and how near one product A (x) B comes to it (MATH.md, section 5).

Three forms of H, none of which is the P x P matrix unless that is the smallest: `SampleSum` where every sample has one
position, H = (1/N) sum_n M_n (x) x_n x_n^T; `RowSum` where H = (1/N) sum_r g_r g_r^T with matrices g_r; `DenseMatrix`.
Each knows its norm and its rearrangement R (Van Loan, Pitsianis 1993): R is the [outputs^2, inputs^2] matrix with
<H, A (x) B> = <A, R B>. Its largest singular value s gives the best that any A (x) B can do: |H|^2 - s^2.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite, sqrt
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from hesscope.estimate.lanczos import power_of_two

# Matrices of pairs are made in tiles of so many entries.
TILE_ENTRIES = 2**24

# The largest singular value is known when its residual is below this part of it; the squared distance from the nearest
# product is then off by the square of that.
SINGULAR_TOLERANCE = 1e-11
MOST_STEPS = 200


class KroneckerSum(Protocol):
    """What the forms have in common; A is [outputs, outputs], B is [inputs, inputs]."""

    def scale(self) -> tuple[float, float]:
        """Powers of two near the sizes of the outputs' and of the inputs' side, 1 for 0."""

    def divided(self, a: float, b: float) -> KroneckerSum:
        """H / (a b), so that squares neither vanish nor burst: the outputs' side / a, the inputs' side / b."""

    def norm_squared(self) -> float:
        """|H|_F^2."""

    def left(self, B: Tensor) -> Tensor:
        """R B: the A for which <A, R B> = <H, A (x) B>; [outputs, outputs]."""

    def right(self, A: Tensor) -> Tensor:
        """R^T A; [inputs, inputs]."""

    def distance_squared(self, A: Tensor, B: Tensor) -> float:
        """|H - A (x) B|_F^2."""


@dataclass(frozen=True, eq=False)
class SampleSum:
    """(1/terms) sum_n M_n (x) x_n x_n^T.

    Attributes:
        M: [N, outputs, outputs], symmetric; or columns [N, outputs, C] with M_n = their product with their transpose.
        x: [N, inputs].
    """

    M: Tensor
    x: Tensor
    terms: float
    columns: bool

    def scale(self) -> tuple[float, float]:
        """Of the M_n, and of the x_n x_n^T."""
        size = _size(self.M)
        return size**2 if self.columns else size, _size(self.x) ** 2

    def divided(self, a: float, b: float) -> SampleSum:
        """M_n / a and x_n x_n^T / b."""
        return SampleSum(self.M / (sqrt(a) if self.columns else a), self.x / sqrt(b), self.terms, self.columns)

    def norm_squared(self) -> float:
        """Sum over pairs of samples of <M_n, M_m> (x_n . x_m)^2."""
        return self._pairs(self.M, None)

    def left(self, B: Tensor) -> Tensor:
        """Sum of M_n x_n^T B x_n."""
        q = ((self.x @ B) * self.x).sum(1) / self.terms
        if self.columns:
            wide = self.M.transpose(0, 1).flatten(1)
            total: Tensor = (wide * q.repeat_interleave(self.M.shape[2])) @ wide.T
            return total
        return (q @ self.M.flatten(1)).view(self.M.shape[1:])

    def right(self, A: Tensor) -> Tensor:
        """Sum of x_n x_n^T <M_n, A>."""
        a = ((A @ self.M) * self.M).sum((1, 2)) if self.columns else self.M.flatten(1) @ A.flatten()
        return (self.x * (a / self.terms)[:, None]).T @ self.x

    def distance_squared(self, A: Tensor, B: Tensor) -> float:
        """|H - A (x) B|^2; if the M_n are held whole without cancellation, so that none is found where there is none.

        With the means M and X, H = M (x) X + C: C is the covariance of M_n and x_n x_n^T, both taken from their means.
        What A (x) B differs from M (x) X by is E = (A - M) (x) X + A (x) (B - X).
        """
        if self.columns:
            inner = float((A * self.left(B)).sum())
            return max(self.norm_squared() - 2 * inner + float(A.square().sum() * B.square().sum()), 0.0)
        X, M = self.x.T @ self.x / len(self.x), self.M.sum(0) / self.terms
        share = float((B * X).sum() / X.square().sum())
        if share > 0:  # only the product of A and B matters: with B as large as X, small differences are small
            A, B = A * share, B / share
        dA, dB = A - M, B - X
        deviations = SampleSum(self.M - self.M.mean(0), self.x, self.terms, False)
        covariance = deviations._pairs(deviations.M, X)
        across = float((dA * deviations.left(X)).sum() + (A * deviations.left(dB)).sum())
        square = float(
            dA.square().sum() * X.square().sum()
            + 2 * (dA * A).sum() * (X * dB).sum()
            + A.square().sum() * dB.square().sum()
        )
        return max(covariance - 2 * across + square, 0.0)

    def _pairs(self, M: Tensor, mean: Tensor | None) -> float:
        """Sum over pairs of <M_n, M_m> <X_n - mean, X_m - mean>, X_n = x_n x_n^T."""
        count, total = len(self.x), 0.0
        shift = None if mean is None else ((self.x @ mean) * self.x).sum(1)
        constant = 0.0 if mean is None else float(mean.square().sum())
        each = M.shape[2] if self.columns else 1
        flat = M.mT.flatten(0, 1) if self.columns else M.flatten(1)  # a row for every column, or for every sample
        step = max(1, TILE_ENTRIES // (count * each * each))
        for start in range(0, count, step):
            here, rest = slice(start, start + step), slice(start, None)
            grams = flat[start * each : (start + step) * each] @ flat[start * each :].T
            if self.columns:
                grams = grams.square_().view(-1, each, count - start, each).sum((1, 3))
            inputs = (self.x[here] @ self.x[rest].T).square_()
            if shift is not None:
                inputs += constant - shift[here, None] - shift[None, rest]
            product = grams.mul_(inputs)
            square = product[:, : len(product)]  # every other pair stands for its mirror image, too
            total += float(2 * product.double().sum() - square.double().sum())
        return total / self.terms**2


@dataclass(frozen=True, eq=False)
class RowSum:
    """(1/terms) sum_r g_r g_r^T, with g [R, outputs, inputs]."""

    g: Tensor
    terms: float

    def scale(self) -> tuple[float, float]:
        """Of the g g^T, and 1."""
        return _size(self.g) ** 2, 1.0

    def divided(self, a: float, b: float) -> RowSum:
        """G g^T / (a b)."""
        return RowSum(self.g / sqrt(a * b), self.terms)

    def norm_squared(self) -> float:
        """Sum over pairs of (g_r . g_s)^2."""
        return float(self.pair_sums(1)[0, 0])

    def pair_sums(self, groups: int) -> Tensor:
        """<H_a, H_b> of equal groups of consecutive rows, [groups, groups] in float64: H is the sum of the H_a."""
        flat, count = self.g.flatten(1), len(self.g)
        total = torch.zeros(groups, groups, dtype=torch.float64, device=flat.device)
        if count == 0:
            return total
        group = torch.arange(count, device=flat.device) * groups // count
        member = torch.nn.functional.one_hot(group, groups).to(flat.dtype)
        step = max(1, TILE_ENTRIES // count)
        for start in range(0, count, step):
            squares = (flat[start : start + step] @ flat[start:].T).square_()
            squares[:, : len(squares)] /= 2  # both halves of a symmetric tile are there, of all others only one
            total += (member[start : start + step].T @ (squares @ member[start:])).double()
        return (total + total.T) / self.terms**2

    def left(self, B: Tensor) -> Tensor:
        """Sum of g B g^T."""
        return (self.g @ B).transpose(0, 1).flatten(1) @ self.g.transpose(0, 1).flatten(1).T / self.terms

    def right(self, A: Tensor) -> Tensor:
        """Sum of g^T A g."""
        return (A @ self.g).flatten(0, 1).T @ self.g.flatten(0, 1) / self.terms

    def inner(self, A: Tensor, B: Tensor) -> Tensor:
        """<g_r g_r^T, A (x) B> of every row, [R]."""
        return ((A @ self.g @ B) * self.g).sum((1, 2))

    def distance_squared(self, A: Tensor, B: Tensor) -> float:
        """|H - A (x) B|^2."""
        inner = float((A * self.left(B)).sum())
        return max(self.norm_squared() - 2 * inner + float(A.square().sum() * B.square().sum()), 0.0)


@dataclass(frozen=True, eq=False)
class DenseMatrix:
    """H itself, [outputs, inputs, outputs, inputs]; the twin of the other two, and the smallest for small layers."""

    H: Tensor

    def scale(self) -> tuple[float, float]:
        """Of H, and 1."""
        return _size(self.H), 1.0

    def divided(self, a: float, b: float) -> DenseMatrix:
        """H / (a b)."""
        return DenseMatrix(self.H / (a * b))

    def norm_squared(self) -> float:
        """Sum of squares."""
        return float(self.H.square().sum())

    def left(self, B: Tensor) -> Tensor:
        """Sum over the inputs."""
        return torch.einsum("aibj,ij->ab", self.H, B)

    def right(self, A: Tensor) -> Tensor:
        """Sum over the outputs."""
        return torch.einsum("aibj,ab->ij", self.H, A)

    def distance_squared(self, A: Tensor, B: Tensor) -> float:
        """Sum of squared differences."""
        return float((self.H - torch.einsum("ab,ij->aibj", A, B)).square().sum())


@dataclass(frozen=True, eq=False)
class NearestProduct:
    """The Kronecker product scale * A (x) B nearest to H, |A| = |B| = 1: scale is the largest singular value of R."""

    scale: float
    A: Tensor
    B: Tensor


def nearest_product(H: KroneckerSum, start: Tensor) -> NearestProduct:
    """The best Kronecker product, by the Lanczos recurrence for R^T R with all vectors kept.

    Args:
        start: a symmetric B [inputs, inputs] to start from, such as E[x x^T]; the identity is taken for zero.
    """
    size = start.norm()
    basis = [start / size if float(size) > 0 else torch.eye(len(start)).to(start) / len(start) ** 0.5]
    tolerance = max(SINGULAR_TOLERANCE, 10 * torch.finfo(start.dtype).eps)
    images: list[Tensor] = []
    while True:
        images.append(H.left(basis[-1]))
        Y = torch.stack(images).flatten(1)
        values, vectors = torch.linalg.eigh((Y @ Y.T).double().cpu())
        turn = vectors[:, -1].to(Y)
        value = sqrt(max(float(values[-1]), 0.0))
        B = torch.tensordot(turn, torch.stack(basis), dims=1)
        A = (turn @ Y).view_as(images[0])
        if value == 0.0:
            return NearestProduct(0.0, A, B)
        new = H.right(A / value)
        residual = new - value * B
        done = float(residual.norm()) <= tolerance * value
        Q = torch.stack(basis).flatten(1)
        fresh = new.flatten()
        for _ in range(2):  # twice is enough (Giraud et al. 2005)
            fresh = fresh - Q.T @ (Q @ fresh)
        size = float(fresh.norm())
        rounding = 10 * torch.finfo(B.dtype).eps * value
        if done or size <= rounding or len(basis) >= min(MOST_STEPS, B.numel()):
            return NearestProduct(value, A / value, B)
        basis.append((fresh / size).view_as(start))


def _size(entries: Tensor) -> float:
    largest = float(entries.abs().max()) if entries.numel() else 0.0
    return power_of_two(largest) if isfinite(largest) else 1.0


def relative(distance_squared: float, norm_squared: float) -> float:
    """Root of the ratio; 0 for the zero matrix, which every method meets exactly."""
    return float(np.sqrt(max(distance_squared, 0.0) / norm_squared)) if norm_squared > 0 else 0.0
