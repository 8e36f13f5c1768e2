"""Squared Frobenius norm of any matrix, exactly or from random probes."""

from __future__ import annotations

from typing import Any

from hesscope.estimate.estimate import Estimate
from hesscope.estimate.products import Progress
from hesscope.estimate.quantities import NORM_SQUARED
from hesscope.estimate.sampling import METHODS, checked_request, estimate
from hesscope.operators import as_operator


def frobenius_norm_squared(
    matrix: Any,
    method: str = "auto",
    probes: int | None = None,
    rtol: float = 0.02,
    max_products: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Estimate:
    """Sum of the squared entries, ||A||_F^2; for a symmetric matrix the sum of the squared eigenvalues.

    Args:
        matrix: an operator or dense matrix [P, P] (see as_operator); it need not be symmetric.
        method: "exact" takes the P columns; "hutchinson" averages ||A v||^2 over random signs v; "hutch++" adds up
            ||A Q||^2 over a basis Q that a sketch finds and samples ||A (I - Q Q^T) v||^2, the counterpart of Hutch++
            for A^T A. Squares make large eigenvalues larger yet: it pays sooner than for the trace, but only where
            the ranges of A and of A^T are alike, as in a symmetric matrix: 64 products for 2 % where ten outliers lie
            over a bulk, instead of 1192. "auto" chooses as in `hesscope.trace`.
        probes, rtol, max_products, seed, progress: as in `hesscope.trace`.

    Raises:
        InputError: an unknown method, numbers out of range, probes given with max_products or to "exact".
        TooLargeError: a sketch would not fit in memory.
        DataError: a product is not finite.
    """
    operator = as_operator(matrix)
    request = checked_request(operator, method, METHODS, probes, rtol, max_products, seed)
    return estimate(operator, NORM_SQUARED, request, progress)
