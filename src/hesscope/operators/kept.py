"""What operators keep between products: linear maps of batches, within a memory budget, while nothing changes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hesscope.operators.engines import LinearMap


@dataclass
class Kept:
    """Linear maps by the number of their batch (None for a batch whose matrix is zero), and the state they hold for."""

    maps: dict[int, LinearMap | None] = field(default_factory=dict)
    state: tuple[Tensor, ...] = ()
    _storages: dict[int, int] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Memory held, each storage once."""
        return sum(self._storages.values())

    def renew(self, state: Sequence[Tensor]) -> None:
        """Forget everything if the state (parameters, buffers) is not what it was.

        Values are compared, which is exact and takes no time beside a product; a version counter would miss writes
        through `.data`.
        """
        same = len(state) == len(self.state) and all(
            old.shape == new.shape and torch.equal(old, new) for old, new in zip(self.state, state, strict=True)
        )
        if not same:
            self.clear()
            self.state = tuple(tensor.detach().clone() for tensor in state)

    def clear(self) -> None:
        """Forget everything."""
        self.maps.clear()
        self._storages.clear()

    def add(self, index: int, linear: LinearMap | None) -> None:
        """Keep the linear map of batch `index`."""
        self.maps[index] = linear
        if linear is not None:
            self._storages.update(linear.storages)

    def items(self) -> Iterator[tuple[int, LinearMap]]:
        """The maps that are not zero, in the order of the batches."""
        return ((index, linear) for index, linear in sorted(self.maps.items()) if linear is not None)
