"""Operator: a matrix known by its products, with the algebra and the conversions that every matrix has."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hesscope.core.errors import InputError
from hesscope.core.memory import require_memory

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

SYMMETRIZE_TILE = 1024

# Bytes that the strips of a closed form may take with everything they are made of, unless told.
STRIP_MEMORY = 2**30


@dataclass(frozen=True)
class MatrixStrip:
    """Some rows of a symmetric P x P matrix, from its diagonal on.

    Attributes:
        rows: [R], columns: [K] positions in the flat parameter vector.
        own: number of first columns that stand for themselves; all others stand for their mirror image, too, which no
            strip holds.
        values: [R, K], valid until the next strip is made.
    """

    rows: Tensor
    columns: Tensor
    own: int
    values: Tensor


class Operator(ABC):
    """A real P x P matrix that is known through its products with vectors.

    Attributes:
        shape: (P, P); dtype, device: of the vectors it takes and gives.
        symmetric: whether it equals its transpose by construction.
        engine: how products are computed; data_fingerprint: hash of the data behind it ("" if there is none).
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    symmetric: bool
    engine: str
    data_fingerprint: str

    @abstractmethod
    def products(self, V: Tensor) -> Tensor:
        """The operator times each column of V [P, K], which is of the right dtype and device; returns [P, K]."""

    @property
    def layout(self) -> Hashable | None:
        """What the strips of its closed form are cut by: equal layouts, equal strips; None without a closed form."""
        return None

    @property
    def has_closed_form(self) -> bool:
        """Whether `dense` and `strips` are formulas, much faster than products with all columns."""
        return self.layout is not None

    @property
    def dense_engine(self) -> str:
        """How `dense` is computed."""
        return self.engine

    @property
    def columns_per_pass(self) -> int:
        """How many columns `products` should be given at once: more need more memory, fewer repeat set-up work."""
        return 256

    def __matmul__(self, V: Tensor) -> Tensor:
        """Product with a vector [P] or with the columns of a matrix [P, K].

        Raises:
            InputError: another shape, dtype or device.
        """
        if not isinstance(V, Tensor):
            raise InputError(f"the right-hand side must be a torch.Tensor, got {type(V).__name__}")
        if V.ndim not in (1, 2) or V.shape[0] != self.shape[1]:
            raise InputError(
                f"the right-hand side must have shape [{self.shape[1]}] or [{self.shape[1]}, K], got {list(V.shape)}"
            )
        if V.dtype != self.dtype or V.device != self.device:
            raise InputError(
                f"the right-hand side must be {self.dtype} on {self.device} like the operator, "
                f"got {V.dtype} on {V.device}"
            )
        if V.ndim == 1:
            return self.products(V.detach().unsqueeze(1)).squeeze(1)
        return self.products(V.detach())

    def __add__(self, other: Operator) -> Operator:
        return _combined([(1.0, self), (1.0, other)])

    def __sub__(self, other: Operator) -> Combination:
        return _combined([(1.0, self), (-1.0, other)])

    def __mul__(self, factor: float) -> Operator:
        return _combined([(_number(factor), self)])

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Operator:
        if _number(divisor) == 0:
            raise InputError("an operator cannot be divided by zero")
        return self * (1.0 / _number(divisor))

    def __neg__(self) -> Operator:
        return _combined([(-1.0, self)])

    def column_chunks(self) -> Iterator[slice]:
        """All P columns, in chunks of `columns_per_pass`."""
        size, step = self.shape[1], self.columns_per_pass
        return (slice(start, min(start + step, size)) for start in range(0, size, step))

    def columns(self, chunk: slice) -> Tensor:
        """The columns `chunk` of the matrix, [P, chunk length]."""
        width = chunk.stop - chunk.start
        identity = torch.zeros(self.shape[1], width, dtype=self.dtype, device=self.device)
        identity[chunk].fill_diagonal_(1.0)
        return self.products(identity)

    def dense(self) -> Tensor:
        """The whole matrix, [P, P]; exactly symmetric if the operator is.

        Raises:
            TooLargeError: it would not fit in memory (the message says how much it needs and what to use instead).
        """
        rows, cols = self.shape
        self.require_memory_for_dense(extra_columns=3 * min(self.columns_per_pass, cols))
        matrix = torch.empty(rows, cols, dtype=self.dtype, device=self.device)
        for chunk in self.column_chunks():
            matrix[:, chunk] = self.columns(chunk)
        return symmetrize_(matrix) if self.symmetric else matrix

    def strips(self, memory: int = STRIP_MEMORY) -> Iterator[MatrixStrip]:
        """The matrix in closed form, strip by strip: every entry or its mirror image once, never the whole.

        Args:
            memory: bytes for everything, the strip included.

        Raises:
            InputError: there is no closed form.
            TooLargeError: `memory` is too small for one row and one sample.
            DataError: the matrix is not finite.
        """
        raise InputError(f"strips need a closed form, which {self.engine} has not")

    def strip_bytes(self, memory: int = STRIP_MEMORY) -> int:
        """Bytes that `strips(memory)` takes; raises what it raises."""
        raise InputError(f"strips need a closed form, which {self.engine} has not")

    def require_memory_for_dense(self, extra_columns: int) -> None:
        """Raise TooLargeError unless the whole matrix and some columns more fit in memory."""
        rows, cols = self.shape
        needed = rows * (cols + extra_columns) * torch.empty(0, dtype=self.dtype).element_size()
        instead = "products (operator @ vectors) or block_energies(..., method='probes')"
        require_memory(needed, self.device, f"the dense {rows} x {cols} matrix", instead)

    def restrict(self, block: Any) -> Operator:
        """The diagonal block of some parameters, [B, B], as an operator.

        Args:
            block: positions in the flat parameter vector: integers, a range, a slice, an array or tensor, or a boolean
                mask; in this order.

        Raises:
            InputError: positions that are not there, given twice, or none.
        """
        return Restricted(self, as_positions(block, self.shape[0]).to(self.device))

    def to_scipy(self) -> LinearOperator:
        """A `scipy.sparse.linalg.LinearOperator` of NumPy arrays on the CPU, for SciPy's solvers."""
        import numpy as np
        from scipy.sparse.linalg import LinearOperator

        if self.dtype not in (torch.float32, torch.float64):
            raise InputError(f"SciPy needs float32 or float64, the operator is {self.dtype}; convert the model first")

        def product(V: Any) -> Any:
            column = torch.from_numpy(np.ascontiguousarray(V)).to(self.dtype).to(self.device)
            return (self @ column).cpu().numpy()

        transposed = product if self.symmetric else None
        dtype = torch.empty(0, dtype=self.dtype).numpy().dtype
        return LinearOperator(
            self.shape, matvec=product, matmat=product, rmatvec=transposed, rmatmat=transposed, dtype=dtype
        )


def as_positions(block: Any, size: int) -> Tensor:
    """Positions in a vector of `size` entries, int64 on the CPU.

    Raises:
        InputError: they are not there, given twice, or none.
    """
    try:
        if isinstance(block, slice):
            positions = torch.tensor(list(range(size))[block], dtype=torch.long)
        else:
            entries = torch.as_tensor(list(block) if isinstance(block, range) else block)
            if entries.dtype == torch.bool and entries.shape == (size,):
                entries = entries.nonzero().squeeze(1)
            positions = entries.cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"block must be positions in the parameter vector, got {repr(block)[:60]}") from error
    if positions.numel() == 0:
        raise InputError("block is empty: choose at least one parameter")
    if positions.ndim != 1 or positions.is_floating_point() or positions.dtype == torch.bool:
        raise InputError(
            f"block must be a list of whole numbers or a mask of {size} entries, got {positions.dtype} of shape "
            f"{list(positions.shape)}"
        )
    positions = positions.long()
    if int(positions.min()) < 0 or int(positions.max()) >= size:
        raise InputError(f"block has positions outside [0, {size})")
    if len(set(positions.tolist())) != positions.numel():
        raise InputError("block names a parameter twice")
    return positions


def symmetrize_(matrix: Tensor) -> Tensor:
    """Replace a square matrix by the mean of itself and its transpose, tile by tile, in place."""
    size = matrix.shape[0]
    for start in range(0, size, SYMMETRIZE_TILE):
        stop = min(start + SYMMETRIZE_TILE, size)
        right, below = matrix[start:stop, start:], matrix[start:, start:stop]
        mean = (right + below.T) / 2
        right.copy_(mean)
        below.copy_(mean.T)
        corner = matrix[start:stop, start:stop]  # written twice above, once transposed: both agree up to rounding
        corner.copy_((corner + corner.T) / 2)
    return matrix


@dataclass(frozen=True)
class Combination(Operator):
    """Sum of operators, each times a number."""

    terms: tuple[tuple[float, Operator], ...]

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        """(P, P)."""
        return self.terms[0][1].shape

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """Of the vectors it takes and gives."""
        return self.terms[0][1].dtype

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Of the vectors it takes and gives."""
        return self.terms[0][1].device

    @property
    def symmetric(self) -> bool:  # type: ignore[override]
        """Whether all terms are."""
        return all(term.symmetric for _, term in self.terms)

    @property
    def engine(self) -> str:  # type: ignore[override]
        """The terms' engines."""
        return " ; ".join(f"{factor:+g} {term.engine}" for factor, term in self.terms)

    @property
    def dense_engine(self) -> str:
        """The terms' engines."""
        return " ; ".join(f"{factor:+g} {term.dense_engine}" for factor, term in self.terms)

    @property
    def data_fingerprint(self) -> str:  # type: ignore[override]
        """The terms' fingerprints, each once."""
        return "+".join(dict.fromkeys(term.data_fingerprint for _, term in self.terms if term.data_fingerprint))

    def restrict(self, block: Any) -> Operator:
        """Sum of the terms' blocks."""
        return _combined([(factor, term.restrict(block)) for factor, term in self.terms])

    @property
    def columns_per_pass(self) -> int:
        """The smallest of the terms'."""
        return min(term.columns_per_pass for _, term in self.terms)

    @property
    def layout(self) -> Hashable | None:
        """The terms', if all have closed forms that are cut alike."""
        layouts = {term.layout for _, term in self.terms}
        return layouts.pop() if len(layouts) == 1 else None

    def strips(self, memory: int = STRIP_MEMORY) -> Iterator[MatrixStrip]:
        """Sums of the terms' strips, each made with its share of the memory."""
        if not self.has_closed_form:
            yield from super().strips(memory)
        for parts in zip(*(term.strips(memory // len(self.terms)) for _, term in self.terms), strict=True):
            total = parts[0].values.mul_(self.terms[0][0])
            for (factor, _), part in zip(self.terms[1:], parts[1:], strict=True):
                total.add_(part.values, alpha=factor)
            yield parts[0]

    def strip_bytes(self, memory: int = STRIP_MEMORY) -> int:
        """Sum of the terms'."""
        return sum(term.strip_bytes(memory // len(self.terms)) for _, term in self.terms)

    def dense(self) -> Tensor:
        """Sum of the terms' dense matrices, where they have closed forms; else as for any operator."""
        if not self.has_closed_form:
            return super().dense()
        self.require_memory_for_dense(extra_columns=self.shape[1])
        (factor, first), *rest = self.terms
        total = first.dense() * factor
        for factor, term in rest:
            total.add_(term.dense(), alpha=factor)
        return total

    def products(self, V: Tensor) -> Tensor:
        """Sum of the terms' products."""
        (factor, first), *rest = self.terms
        total = first.products(V) * factor
        for factor, term in rest:
            total.add_(term.products(V), alpha=factor)
        return total


@dataclass(frozen=True)
class Restricted(Operator):
    """A diagonal block of an operator: the rows and columns `positions` [B] of it."""

    whole: Operator
    positions: Tensor

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        """(B, B)."""
        return len(self.positions), len(self.positions)

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """Of the vectors it takes and gives."""
        return self.whole.dtype

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Of the vectors it takes and gives."""
        return self.whole.device

    @property
    def symmetric(self) -> bool:  # type: ignore[override]
        """Whether the whole is."""
        return self.whole.symmetric

    @property
    def engine(self) -> str:  # type: ignore[override]
        """The whole's."""
        return f"{self.whole.engine}, a block of it"

    @property
    def data_fingerprint(self) -> str:  # type: ignore[override]
        """The whole's."""
        return self.whole.data_fingerprint

    @property
    def columns_per_pass(self) -> int:
        """The whole's."""
        return self.whole.columns_per_pass

    def products(self, V: Tensor) -> Tensor:
        """Products of the whole with vectors that are zero elsewhere."""
        wide = torch.zeros(self.whole.shape[0], V.shape[1], dtype=V.dtype, device=V.device)
        wide[self.positions] = V
        return self.whole.products(wide)[self.positions]


def _combined(terms: list[tuple[float, Any]]) -> Combination:
    flat: list[tuple[float, Operator]] = []
    for factor, term in terms:
        if not isinstance(term, Operator):
            raise InputError(f"operators combine with operators, got {type(term).__name__}; see hesscope.as_operator")
        inner = term.terms if isinstance(term, Combination) else ((1.0, term),)
        flat.extend((factor * scale, operator) for scale, operator in inner)
    for what in ("shape", "dtype", "device"):
        kinds = {str(getattr(operator, what)) for _, operator in flat}
        if len(kinds) > 1:
            raise InputError(f"operators to be combined must share one {what}, found {', '.join(sorted(kinds))}")
    return Combination(tuple(flat))


def _number(factor: Any) -> float:
    if isinstance(factor, Real):
        return float(factor)
    raise InputError(f"an operator can be multiplied by a number, got {type(factor).__name__}; use @ for products")
