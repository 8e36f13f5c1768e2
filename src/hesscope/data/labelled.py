"""LabelledData: inputs with class labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor
from torch.nn import functional

from hesscope.core.checks import require_positive_int
from hesscope.core.errors import DataError, InputError
from hesscope.core.rng import permutation


@dataclass(frozen=True, eq=False)
class LabelledData:
    """N inputs with class labels in [0, classes).

    Attributes:
        name: what it is.
        inputs: [N, d], or images [N, channels, height, width]; labels: [N] int64.
        classes: C.
    """

    name: str
    inputs: Tensor
    labels: Tensor
    classes: int

    def __post_init__(self) -> None:
        if self.inputs.shape[0] != self.labels.shape[0]:
            raise DataError(f"{self.name}: {self.inputs.shape[0]} inputs but {self.labels.shape[0]} labels")
        if self.labels.numel() and (int(self.labels.min()) < 0 or int(self.labels.max()) >= self.classes):
            raise DataError(f"{self.name}: labels must lie in [0, {self.classes})")

    def __len__(self) -> int:
        return int(self.inputs.shape[0])

    @property
    def one_hot(self) -> Tensor:
        """[N, C] targets for squared error, of the inputs' dtype."""
        return functional.one_hot(self.labels, self.classes).to(self.inputs.dtype)

    def batch(self, loss: str) -> tuple[Tensor, Tensor]:
        """(inputs, targets) as the loss "cross_entropy" or "mse" wants them."""
        return self.inputs, self.one_hot if loss == "mse" else self.labels

    def split(self, first: int, generator: np.random.Generator) -> tuple[LabelledData, LabelledData]:
        """Two disjoint random parts, the first with `first` samples.

        Samples are kept apart, not what they show: patches that overlap have pixels in both parts.
        """
        order = permutation(len(self), generator)
        parts = order[:first], order[first:]
        a, b = (LabelledData(self.name, self.inputs[part], self.labels[part], self.classes) for part in parts)
        return a, b


def draw(available: int, samples: int | None, generator: np.random.Generator) -> Tensor:
    """[samples] different numbers below `available` in random order; all of them if samples is None.

    Raises:
        InputError: `samples` is no positive integer, or more than there are.
    """
    if samples is not None:
        require_positive_int("samples", samples)
        if samples > available:
            raise InputError(f"samples must be at most {available}, all there are, got {samples}")
    return permutation(available, generator)[:samples]
