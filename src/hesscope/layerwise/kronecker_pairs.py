"""The leading eigenpairs of a Kronecker product of two symmetric matrices, which is never formed."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from hesscope.core.checks import require_positive_int
from hesscope.core.errors import DataError, InputError

Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]
FactorPairs = tuple[Array, Array]


@dataclass(frozen=True, eq=False)
class KroneckerPairs:
    """The k largest eigenvalues of A (x) B, A [out, out] and B [in, in], and which eigenvectors u_a (x) v_b are theirs.

    Attributes:
        values: [k] descending, output_values[output_index] * input_values[input_index].
        output_index, input_index: [k] positions a and b.
        output_values: [out], input_values: [in] eigenvalues of A and of B, descending.
        output_vectors: [out, .], input_vectors: [in, .] their leading eigenvectors, as many as the k pairs use.
    """

    values: Array
    output_index: Indices
    input_index: Indices
    output_values: Array
    input_values: Array
    output_vectors: Array = field(repr=False)
    input_vectors: Array = field(repr=False)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in), the shape of a matricized eigenvector."""
        return len(self.output_values), len(self.input_values)

    def matrices(self) -> Array:
        """The eigenvectors as matrices u_a v_b^T, [k, out, in]."""
        u, v = self.output_vectors[:, self.output_index], self.input_vectors[:, self.input_index]
        found: Array = u.T[:, :, None] * v.T[:, None, :]
        return found

    def rest(self) -> Array:
        """Sums of lambda, lambda^2, lambda^3 over all eigenvalues but the k leading ones, [3]."""
        products = np.outer(self.output_values, self.input_values)
        products[self.output_index, self.input_index] = 0.0
        return np.array([(products**order).sum() for order in (1, 2, 3)])

    def squared_products(self, matrices: Array) -> Array:
        """Squared inner products of matricized vectors [K, out, in] with the k eigenvectors, [K, k]."""
        inner = (matrices @ self.input_vectors).swapaxes(1, 2) @ self.output_vectors  # [K, b, a]
        squares: Array = inner[:, self.input_index, self.output_index] ** 2
        return squares

    def squared_products_with(self, other: KroneckerPairs, k: int) -> Array:
        """The same with the first k eigenvectors of another product, [k, k], without any vector of out * in entries.

        (u_a (x) v_b) . (u'_c (x) v'_d) = (u_a . u'_c) (v_b . v'_d).
        """
        u = (self.output_vectors.T @ other.output_vectors) ** 2
        v = (self.input_vectors.T @ other.input_vectors) ** 2
        squares: Array = (
            u[np.ix_(self.output_index[:k], other.output_index[:k])]
            * v[np.ix_(self.input_index[:k], other.input_index[:k])]
        )
        return squares


def kronecker_pairs(output: npt.ArrayLike, input: npt.ArrayLike, k: int) -> KroneckerPairs:
    """The k leading eigenpairs of `output` (x) `input`.

    Eigenvalues are the products of the factors'; where several products are equal, their order is arbitrary.

    Args:
        output: symmetric [out, out]; input: symmetric [in, in].
        k: at most out * in.

    Raises:
        InputError: a matrix that is not square or not symmetric, k beyond out * in. DataError: one is not finite.
    """
    return leading_pairs(factor_eigenpairs("output", output), factor_eigenpairs("input", input), k)


def leading_pairs(output: FactorPairs, input: FactorPairs, k: int) -> KroneckerPairs:
    """As `kronecker_pairs`, from the eigenvalues and eigenvectors of the two factors."""
    (mu, U), (nu, V) = output, input
    require_positive_int("k", k)
    if k > len(mu) * len(nu):
        raise InputError(f"k must be at most out * in = {len(mu)} * {len(nu)} = {len(mu) * len(nu)}, got {k}")
    products = np.outer(mu, nu).ravel()
    chosen = np.argsort(-products, kind="stable")[:k]
    a, b = np.divmod(chosen, len(nu))
    return KroneckerPairs(
        values=products[chosen],
        output_index=a.astype(np.int64),
        input_index=b.astype(np.int64),
        output_values=mu,
        input_values=nu,
        output_vectors=U[:, : a.max() + 1].copy(),
        input_vectors=V[:, : b.max() + 1].copy(),
    )


def output_shares(matrices: Array, output: Array) -> Array:
    """Share of each matricized unit vector [K, out, in] along u_a (x) anything, for orthonormal columns u_a: [K, .]."""
    shares: Array = ((output.T @ matrices) ** 2).sum(axis=2)
    return shares


def input_shares(matrices: Array, input: Array) -> Array:
    """Share of each matricized unit vector [K, out, in] along anything (x) v_b, for orthonormal columns v_b: [K, .]."""
    shares: Array = ((matrices @ input) ** 2).sum(axis=1)
    return shares


def factor_eigenpairs(argument: str, matrix: npt.ArrayLike) -> FactorPairs:
    """Eigenvalues, descending, and eigenvectors of a symmetric matrix; raises as `kronecker_pairs` does."""
    array = np.asarray(matrix, dtype=np.float64)
    if array.ndim != 2 or array.shape[0] != array.shape[1] or not array.size:
        raise InputError(f"{argument} must be a square matrix, got shape {list(array.shape)}")
    if not np.isfinite(array).all():
        raise DataError(f"the factor {argument} is not finite: look for nan or overflow in the data or the model")
    gap, size = float(np.abs(array - array.T).max()), float(np.abs(array).max())
    if gap > float(np.finfo(np.float32).eps) ** 0.5 * size:
        raise InputError(f"{argument} must be symmetric, but it differs from its transpose by {gap / size:.1g}")
    values, vectors = np.linalg.eigh((array + array.T) / 2)
    return values[::-1].copy(), vectors[:, ::-1].copy()
