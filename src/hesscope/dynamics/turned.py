"""The matrix sigma I - H, whose largest eigenvalues are the smallest ones of H, on the scale of the largest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hesscope.operators import Operator


@dataclass(frozen=True)
class Turned(Operator):
    """sigma I - H for a symmetric operator H.

    A tolerance relative to an eigenvalue of this one is relative to sigma, where one relative to the smallest of H asks
    for ever more as training makes it vanish: thousands of products for a number that means nothing beside the largest.
    """

    operator: Operator
    sigma: float
    symmetric = True

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        """(P, P)."""
        return self.operator.shape

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """That of H."""
        return self.operator.dtype

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """That of H."""
        return self.operator.device

    @property
    def engine(self) -> str:  # type: ignore[override]
        """That of H."""
        return self.operator.engine

    @property
    def data_fingerprint(self) -> str:  # type: ignore[override]
        """That of H."""
        return self.operator.data_fingerprint

    @property
    def columns_per_pass(self) -> int:
        """That of H."""
        return self.operator.columns_per_pass

    def products(self, V: Tensor) -> Tensor:
        """One product with H for each column."""
        return self.sigma * V - self.operator.products(V)
