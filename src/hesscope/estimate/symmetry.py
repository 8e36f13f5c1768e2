"""Whether a matrix is symmetric, asked before a method relies on it."""

from __future__ import annotations

import torch

from hesscope.core.errors import InputError
from hesscope.core.rng import normal, stream
from hesscope.estimate.lanczos import finite_products, norms, power_of_two
from hesscope.operators import Operator


def require_symmetric(operator: Operator) -> int:
    """Raise unless the operator equals its transpose, up to the rounding of its dtype.

    Nothing to do where it is symmetric by construction; else u.Av = v.Au is asked for two random vectors. Their
    difference has the size of ||A - A^T||_F, rounding that of eps ||A||_F; what counts is more than sqrt(eps) ||A||_F
    (1.5e-8 in float64, 3.5e-4 in float32), whatever the scale of A.

    Returns:
        The number of products it took, 0 or 2.

    Raises:
        InputError: it is not symmetric.
        DataError: a product is not finite.
    """
    if operator.symmetric:
        return 0
    vectors = normal((2, operator.shape[0]), stream(0, "require_symmetric"))
    images = finite_products(operator, vectors.to(operator.device, operator.dtype)).double()
    images /= power_of_two(float(images.abs().max()))
    u, v = vectors.to(operator.device, operator.dtype).double()
    gap, size = abs(float(u @ images[1] - v @ images[0])), float(norms(images).sum())
    if gap > torch.finfo(operator.dtype).eps ** 0.5 * size:
        raise InputError(
            f"the matrix must be symmetric, but u.Av and v.Au of two random vectors differ by {gap / size:.1g} of "
            "||Au|| + ||Av||; symmetrize it as (A + A.T) / 2 if that is what you mean"
        )
    return 2
