"""Anything with a shape and a product as an Operator: tensors, NumPy arrays, SciPy's and curvlinops' operators."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hesscope.core.errors import InputError
from hesscope.operators.operator import Operator


@dataclass(frozen=True)
class Dense(Operator):
    """A matrix held as a tensor [P, P]."""

    matrix: Tensor
    symmetric: bool
    engine = "dense"
    data_fingerprint = ""

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        """(P, P)."""
        return self.matrix.shape[0], self.matrix.shape[1]

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """The matrix's."""
        return self.matrix.dtype

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """The matrix's."""
        return self.matrix.device

    def products(self, V: Tensor) -> Tensor:
        """A matrix product."""
        return self.matrix @ V

    def columns(self, chunk: slice) -> Tensor:
        """A view, no product needed."""
        return self.matrix[:, chunk]

    def dense(self) -> Tensor:
        """The matrix itself, copied."""
        return self.matrix.clone()


@dataclass(frozen=True)
class Foreign(Operator):
    """Another library's operator; takes_numpy says whether its product wants NumPy arrays (SciPy) or tensors."""

    operator: Any
    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    takes_numpy: bool
    symmetric: bool = False
    data_fingerprint = ""

    @property
    def engine(self) -> str:  # type: ignore[override]
        """The operator's type."""
        return f"{type(self.operator).__module__}.{type(self.operator).__qualname__}"

    def products(self, V: Tensor) -> Tensor:
        """The other library's product."""
        if self.takes_numpy:
            return torch.from_numpy(np.asarray(self.operator @ V.cpu().numpy())).to(V)
        result: Tensor = self.operator @ V
        return result.detach()


def as_operator(matrix: Any) -> Operator:
    """Interpret a square matrix in any form as an Operator; one of ours is returned as it is.

    Args:
        matrix: an Operator; a dense tensor or NumPy array; anything with `shape`, `dtype` and `@`, taking tensors if
            its dtype is torch's (curvlinops, lineax-like wrappers) and NumPy arrays if it is NumPy's (SciPy).

    Raises:
        InputError: it has no such form, is not square, or is not real floating-point.
    """
    if isinstance(matrix, Operator):
        return matrix
    if isinstance(matrix, np.ndarray):
        shareable = np.ascontiguousarray(matrix)  # torch shares the memory only of arrays that it could write to
        matrix = _tensor(shareable if shareable.flags.writeable else shareable.copy())
    shape, dtype = getattr(matrix, "shape", None), getattr(matrix, "dtype", None)
    if shape is None or dtype is None or not hasattr(matrix, "__matmul__"):
        raise InputError(f"expected a matrix or an operator with shape, dtype and @, got {type(matrix).__name__}")
    if len(shape) != 2 or shape[0] != shape[1]:
        raise InputError(f"the matrix must be square, got shape {tuple(shape)}")
    if shape[0] == 0:
        raise InputError("the matrix is empty: it has no rows")
    takes_numpy = not isinstance(dtype, torch.dtype)
    torch_dtype = _tensor(np.empty(0, dtype=dtype)).dtype if takes_numpy else dtype
    if not torch_dtype.is_floating_point:
        raise InputError(f"the matrix must be real floating-point, got {dtype}")
    if isinstance(matrix, Tensor):
        return Dense(matrix.detach(), symmetric=bool(torch.equal(matrix, matrix.T)))
    device = torch.device(getattr(matrix, "device", "cpu"))
    return Foreign(matrix, (int(shape[0]), int(shape[1])), torch_dtype, device, takes_numpy)


def _tensor(array: np.ndarray[Any, Any]) -> Tensor:
    try:
        return torch.from_numpy(array)
    except TypeError as error:
        raise InputError(f"the matrix must be real floating-point, got {array.dtype}") from error
