"""Counted, checked products, in passes of as many vectors as the operator takes at once; and the signs they are of."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from hesscope.core.errors import DataError
from hesscope.core.rng import normal, rademacher, stream
from hesscope.operators.operator import Operator

Progress = Callable[[int, int], None]


class CountedProducts:
    """Products with an operator; counts them, reports progress, and refuses results that are not finite.

    Attributes:
        done: products so far; whole: as many as are planned.
    """

    def __init__(self, operator: Operator, progress: Progress | None) -> None:
        self.operator, self.progress = operator, progress
        self.done = self.whole = 0

    def expect(self, more: int) -> None:
        """Plan that many products from here on."""
        self.whole = self.done + more

    def __call__(self, V: Tensor) -> Tensor:
        """The operator times V [P, K], pass by pass; [P, K].

        Raises:
            DataError: a product is not finite.
        """
        passes = torch.split(V, self.operator.columns_per_pass, dim=1)
        return self._checked(passes[0]) if len(passes) == 1 else torch.cat([self._checked(part) for part in passes], 1)

    def columns(self, chunk: slice) -> Tensor:
        """Columns of the matrix itself, [P, chunk length]."""
        return self._counted(self.operator.columns(chunk))

    def _checked(self, V: Tensor) -> Tensor:
        return self._counted(self.operator @ V)

    def _counted(self, product: Tensor) -> Tensor:
        if not torch.isfinite(product).all():
            raise DataError("a product with the operator is not finite: the matrix has infinite or undefined entries")
        self.done += product.shape[1]
        self.whole = max(self.whole, self.done)
        if self.progress is not None:
            self.progress(self.done, self.whole)
        return product


def passes(numbers: range, width: int) -> Iterator[range]:
    """A range in pieces of at most `width`."""
    return (numbers[start : start + width] for start in range(0, len(numbers), width))


def signs(operator: Operator, seed: int, name: str, stage: str, numbers: range) -> Tensor:
    """Random signs [P, K]; column k is drawn from its own stream, so that a run can be cut anywhere."""
    rows = torch.empty(len(numbers), operator.shape[0], dtype=torch.int8)
    for row, number in enumerate(numbers):
        rows[row] = rademacher(operator.shape[0], stream(seed, name, stage, number))
    return rows.T.to(operator.device).to(operator.dtype).contiguous()


def normals(operator: Operator, seed: int, name: str, stage: str, group: int, count: int) -> Tensor:
    """Standard normal vectors [P, count] of one group."""
    rows = [normal((operator.shape[0],), stream(seed, name, stage, group, number)) for number in range(count)]
    return torch.stack(rows, dim=1).to(operator.dtype).to(operator.device)
