"""Overlap of two subspaces, given orthonormal bases (MATH.md, section 5; [W])."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from hesscope.core.errors import DataError, InputError

Array = npt.NDArray[np.float64]


def overlap(U: Any, V: Any) -> float:
    """||U^T V||_F^2 / k of the subspaces that two orthonormal bases [P, k] span: 1 for equal ones, 0 for orthogonal.

    It does not depend on the bases. For independent random subspaces its mean is k / P ("chance").

    Args:
        U, V: tensors or arrays of one shape [P, k], with orthonormal columns.

    Raises:
        InputError: different shapes, k beyond P, columns that are not orthonormal (the message says how far off).
        DataError: a basis is not finite.

    Source: [W], arXiv:2010.04261; MATH.md, section 5.
    """
    return float(squared_products(U, V).sum() / np.shape(U)[1])


def overlap_curve(U: Any, V: Any) -> Array:
    """Overlaps [k] of the subspaces of the first 1, 2, ..., k columns, from one product U^T V.

    The last one is `overlap(U, V)`. Where columns are eigenvectors of an eigenvalue with copies, only the subspaces
    that hold all or none of the copies mean something: between, any rotation of the copies is as good.

    Args and Raises: as in `overlap`.
    """
    return leading_overlaps(squared_products(U, V))


def squared_products(U: Any, V: Any) -> Array:
    """Squared inner products [k, k] of the columns of two orthonormal bases; raises as `overlap` does."""
    first, second = orthonormal("U", U), orthonormal("V", V)
    if first.shape != second.shape:
        raise InputError(f"U and V must have one shape [P, k], got {list(first.shape)} and {list(second.shape)}")
    squares: Array = (first.T @ second) ** 2
    return squares


def leading_overlaps(squares: Array) -> Array:
    """Overlaps [k] of the nested leading subspaces, from the squared inner products [k, k] of their basis vectors."""
    summed = squares.cumsum(axis=0).cumsum(axis=1)
    curve: Array = summed.diagonal() / np.arange(1, len(squares) + 1)
    return curve


def orthonormal(argument: str, basis: Any) -> Array:
    """The basis [P, k] in float64; raises unless it is one, up to the square root of its own dtype's rounding."""
    array = basis.detach().cpu().numpy() if isinstance(basis, Tensor) else np.asarray(basis)
    if array.ndim != 2 or not array.size or not np.issubdtype(array.dtype, np.floating):
        raise InputError(
            f"{argument} must be a matrix [P, k] of real floating-point numbers, got {array.dtype} of shape "
            f"{list(array.shape)}"
        )
    size, k = array.shape
    if k > size:
        raise InputError(f"{argument} has k = {k} columns of P = {size} entries; k must be at most P")
    if not np.isfinite(array).all():
        raise DataError(f"{argument} is not finite: look for nan or overflow where it was made")
    allowed = float(np.finfo(array.dtype).eps) ** 0.5
    array = array.astype(np.float64)
    error = float(np.abs(array.T @ array - np.eye(k)).max())
    if error > allowed:
        raise InputError(
            f"the columns of {argument} must be orthonormal, but {argument}^T {argument} differs from the identity by "
            f"up to {error:.1g} (take torch.linalg.qr({argument}).Q if only their span matters)"
        )
    return array
