"""Cut: how a partition cuts one tensor, in the words of an optimizer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Cut:
    """`count` blocks of `block_size` consecutive indices along `axis`; a count of 1 leaves the tensor whole.

    Attributes:
        axis: of the tensor.
        block_size: indices along the axis in one block, not parameters.
        count: blocks.
    """

    axis: int
    block_size: int
    count: int


def cut_of(numbers: npt.NDArray[np.int32]) -> Cut | None:
    """The cut that gives a tensor's entries these block numbers; None if no equal slices along one axis do.

    numbers: of the tensor's shape.
    """
    if numbers.ndim == 0:
        return Cut(0, 1, 1)
    for axis in range(numbers.ndim):
        line = numbers[tuple(slice(None) if a == axis else 0 for a in range(numbers.ndim))]
        along = line.reshape([-1 if a == axis else 1 for a in range(numbers.ndim)])
        if (numbers == along).all():
            return _equal_runs(axis, line)
    return None


def _equal_runs(axis: int, line: npt.NDArray[np.int32]) -> Cut | None:
    starts = np.flatnonzero(np.concatenate([[True], line[1:] != line[:-1]]))
    sizes = np.diff(np.append(starts, line.size))
    if (sizes != sizes[0]).any() or np.unique(line[starts]).size != starts.size:
        return None
    return Cut(axis, int(sizes[0]), int(starts.size))
