"""Diagonal of any matrix, exactly or from random probes."""

from __future__ import annotations

from typing import Any

from hesscope.estimate.estimate import Estimate
from hesscope.estimate.products import Progress
from hesscope.estimate.quantities import DIAGONAL
from hesscope.estimate.sampling import METHODS, checked_request, estimate
from hesscope.operators import as_operator


def diagonal(
    matrix: Any,
    method: str = "auto",
    probes: int | None = None,
    rtol: float = 0.02,
    max_products: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Estimate:
    """The P diagonal entries, with a standard error each; the samples are not kept, only their running sums.

    An entry's variance is the squared norm of the rest of its row: only where the diagonal dominates do few probes
    tell much. Many a Hessian needs more than P probes for 2 %.

    Args:
        matrix: an operator or dense matrix [P, P] (see as_operator); it need not be symmetric.
        method: "exact" takes the P columns; "hutchinson" averages v * (A v) over random signs v (Bekas, Kokiopoulou and
            Saad, Applied Numerical Mathematics 57, 2007); "hutch++" takes the diagonal of A Q Q^T exactly and samples
            that of A (I - Q Q^T) (Diag++: Baston and Nakatsukasa, 2022, arXiv:2201.10684), which helps where the ranges
            of A and of A^T are alike, and holds some vectors more; "auto" chooses as in `hesscope.trace`.
        probes, max_products, seed, progress: as in `hesscope.trace`.
        rtol: norm of the standard errors relative to that of the diagonal.

    Raises:
        InputError: an unknown method, numbers out of range, probes given with max_products or to "exact".
        TooLargeError: a sketch would not fit in memory.
        DataError: a product is not finite.
    """
    operator = as_operator(matrix)
    request = checked_request(operator, method, METHODS, probes, rtol, max_products, seed)
    return estimate(operator, DIAGONAL, request, progress)
