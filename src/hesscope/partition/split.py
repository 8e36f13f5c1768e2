"""SplitTensor: one parameter tensor cut into blocks, the currency between schemes, hierarchy and Partition."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, eq=False)
class SplitTensor:
    """One parameter tensor cut into blocks.

    Attributes:
        name: of the tensor.
        labels: of its blocks.
        numbers: int32, the position in `labels` of every entry's block; of a shape that broadcasts to the tensor's, so
            that a cut of 10^8 entries along one axis is as small as that axis.
        outcome: how it was cut, or why it was not, in words.
        matched: False if the scheme could not split it.
    """

    name: str
    labels: tuple[str, ...]
    numbers: npt.NDArray[np.int32]
    outcome: str
    matched: bool = True


def whole(name: str, shape: tuple[int, ...], label: str, outcome: str, matched: bool = True) -> SplitTensor:
    """The tensor as a single block, or as a part of one."""
    return SplitTensor(name, (label,), np.zeros((1,) * len(shape), dtype=np.int32), outcome, matched)


def along_axis(
    name: str, shape: tuple[int, ...], axis: int, labels: tuple[str, ...], runs: npt.NDArray[np.int32], outcome: str
) -> SplitTensor:
    """Blocks that are slices along one axis; `runs` holds the block of every index of that axis."""
    return SplitTensor(name, labels, runs.reshape([-1 if a == axis else 1 for a in range(len(shape))]), outcome)
