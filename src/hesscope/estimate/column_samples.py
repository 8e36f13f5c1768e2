"""ColumnSamples: independent samples of a block matrix's columns, of unequal numbers, and what follows from them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Spread:
    """Variance of an estimate, and its degrees of freedom (infinite where the variance is 0); arrays of one shape.

    Where variances of several sources add up, the degrees are Satterthwaite's (Biometrics Bulletin 2, 1946).
    """

    variance: Array
    degrees: Array

    @classmethod
    def of_sums(cls, variance: Array, squares: Array) -> Spread:
        """From the sum of the sources' variances v, and that of v^2 / degrees."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return cls(variance, np.where(squares > 0, np.square(variance) / squares, np.inf))


@dataclass(frozen=True, eq=False)
class ColumnSamples:
    """Samples of single columns of a B x B matrix of energies, each column from a source of its own.

    Source c brings n_c samples of a vector X_c [B] that adds to column j(c). With weights w, the matrix is

        E = T + T^T (mirrored) or T,    T[:, j] = sum over sources c of column j of sum_k w_ck X_ck.

    Mirrored, the pair (i, j) is estimated from both columns, with shares that are already in X (so that T[j, j] is half
    of E[j, j]). Sources are independent of each other; the B entries of a sample are not. A source of one sample is
    known without error.

    Attributes:
        values: [S, B] all samples X, source by source; weights: [S], adding up to 1 in each source.
        source: [S] numbers of the sources, ascending; column: [S] the column j that each sample adds to.
        mirrored: whether the matrix is T + T^T.
    """

    values: Array
    weights: Array
    source: Integers
    column: Integers
    mirrored: bool

    @property
    def starts(self) -> Integers:
        """Position of each source's first sample, [C]."""
        return np.flatnonzero(np.diff(self.source, prepend=self.source[0] - 1))

    @property
    def counts(self) -> Integers:
        """Number of samples of each source, [C]."""
        return np.diff(self.starts, append=len(self.weights))

    def matrix(self) -> Array:
        """The estimate E, [B, B]."""
        means = np.add.reduceat(self.values * self.weights[:, None], self.starts)
        half = self._in_columns(means)
        return half + half.T if self.mirrored else half

    def spread(self) -> Spread:
        """Variance and degrees of freedom of every entry, [B, B]."""
        variance, degrees = self._of_sources(self.values)
        squares = np.square(variance) / degrees[:, None]
        variance, squares = self._in_columns(variance), self._in_columns(squares)
        if self.mirrored:
            # A diagonal entry is twice its half: 4 times the variance, 16 times its square.
            variance = variance + variance.T + 2 * np.diag(np.diag(variance))
            squares = squares + squares.T + 14 * np.diag(np.diag(squares))
        return Spread.of_sums(variance, squares)

    def spread_of_sum(self, coefficients: Array) -> Spread:
        """Variance and degrees of freedom of sum_ij coefficients_ij E_ij; coefficients: [B, B]."""
        seen = coefficients + coefficients.T if self.mirrored else coefficients
        sums = np.einsum("sb,bs->s", self.values, seen[:, self.column])
        variance, degrees = self._of_sources(sums[:, None])
        return Spread.of_sums(variance.sum(), (np.square(variance[:, 0]) / degrees).sum())

    def single_variances(self, coefficients: Array) -> tuple[Array, Array]:
        """Variances of single samples: of their part in such a sum, [C], and of their column's diagonal entry, [C]."""
        seen = coefficients + coefficients.T if self.mirrored else coefficients
        sums = np.einsum("sb,bs->s", self.values, seen[:, self.column])
        own = self.values[np.arange(len(self.column)), self.column] * (2 if self.mirrored else 1)
        variance, _ = self._of_sources(np.stack([sums, own], axis=1))
        each = variance / np.add.reduceat(np.square(self.weights), self.starts)[:, None]
        return each[:, 0], each[:, 1]

    def grouped(self, indicator: Array) -> ColumnSamples:
        """Samples for groups of blocks; indicator: [G, B], 1 where a block belongs to a group, at most one."""
        kept = (indicator.sum(axis=0) > 0)[self.column]
        group = indicator.argmax(axis=0)
        values = self.values[kept] @ indicator.T
        column = group[self.column[kept]]
        return ColumnSamples(values, self.weights[kept], self.source[kept], column, self.mirrored)

    def _of_sources(self, values: Array) -> tuple[Array, Array]:
        """Variances [C, M] of the sources' weighted means of values [S, M], and their degrees of freedom [C]."""
        starts = self.starts
        counts = self.counts
        # Deviations from the first sample of each source: equal samples have variance zero, not rounding's.
        which = np.repeat(np.arange(len(starts)), counts)
        values = values - values[starts][which]
        deviations = values - (np.add.reduceat(values, starts) / counts[:, None])[which]
        degrees = np.maximum(counts - 1, 1)
        factor = np.add.reduceat(np.square(self.weights), starts) / degrees
        return np.add.reduceat(np.square(deviations), starts) * factor[:, None], degrees.astype(np.float64)

    def _in_columns(self, per_source: Array) -> Array:
        """Sum [B, B] of one vector per source [C, B], each in its column."""
        blocks = per_source.shape[1]
        total = np.zeros((blocks, blocks))
        np.add.at(total.T, self.column[self.starts], per_source)
        return total
