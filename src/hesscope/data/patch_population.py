"""Every patch of scikit-learn's two photographs: a population to draw independently from, and to enumerate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hesscope.core.checks import require_positive_int
from hesscope.core.errors import InputError
from hesscope.core.rng import stream
from hesscope.data.labelled import LabelledData
from hesscope.data.photographs import load_pictures, require_size_fits, standardized


@dataclass(frozen=True, eq=False)
class PatchPopulation:
    """All squares of `size` x `size` pixels of some pictures, at every position; the label is the picture.

    Patches are numbered row by row, picture after picture: (picture * rows + top) * columns + left, where
    rows = height - size + 1 and columns = width - size + 1. Only the pictures are kept; patches are copied when asked
    for.

    Attributes:
        name: what it is.
        pictures: [C, channels, height, width], scaled as the patches shall be.
        size: of the patches in pixels.
        flat: patches as vectors [n, channels * size * size] rather than images [n, channels, size, size].
    """

    name: str
    pictures: Tensor
    size: int
    flat: bool

    def __len__(self) -> int:
        return int(np.prod(self._grid))

    @property
    def classes(self) -> int:
        """C, one class a picture."""
        return int(self.pictures.shape[0])

    def take(self, indices: Tensor | np.ndarray | Sequence[int]) -> LabelledData:
        """The patches with some numbers, in their order; a number that is there twice gives its patch twice.

        Raises:
            InputError: `indices` is no list of integers, or not within [0, len(self)).
        """
        inputs, labels = self._patches(self._checked(indices))
        return LabelledData(self.name, inputs, labels, self.classes)

    def draw(self, n: int, seed: int) -> LabelledData:
        """`n` patches drawn independently and uniformly, with replacement.

        They are independent and identically distributed, exactly: what a generalization bound assumes of its sample.
        Equal seeds give equal draws; draws of different seeds are independent, for example one to learn from and one
        held out, although they may have patches in common.

        Raises:
            InputError: `n` is no positive integer.
        """
        require_positive_int("n", n)
        return self.take(stream(seed, "patch_population", "draw").integers(0, len(self), n))

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(inputs, labels) of every patch once, in order, for exact risks; the last batch may be smaller.

        Never more than a batch is in memory.

        Raises:
            InputError: `batch_size` is no positive integer.
        """
        require_positive_int("batch_size", batch_size)  # at once, not when the first batch is asked for
        starts = range(0, len(self), batch_size)
        return (self._patches(torch.arange(start, min(start + batch_size, len(self)))) for start in starts)

    @property
    def _grid(self) -> tuple[int, int, int]:
        """(pictures, rows, columns) of positions."""
        pictures, _, height, width = self.pictures.shape
        return pictures, height - self.size + 1, width - self.size + 1

    def _patches(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """(inputs, labels) of patches with valid numbers."""
        picture, top, left = (torch.from_numpy(part) for part in np.unravel_index(indices.numpy(), self._grid))
        # A view: [pictures, rows, columns, channels, size, size]. Only patches that are asked for are copied.
        everything = self.pictures.unfold(2, self.size, 1).unfold(3, self.size, 1).permute(0, 2, 3, 1, 4, 5)
        inputs = everything[picture, top, left]
        return inputs.flatten(1) if self.flat else inputs, picture

    def _checked(self, indices: Tensor | np.ndarray | Sequence[int]) -> Tensor:
        try:
            found = torch.as_tensor(indices).cpu()
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"indices must be a list of integers, got {repr(indices)[:60]}") from error
        if found.ndim != 1 or found.is_floating_point() or found.dtype == torch.bool:
            raise InputError(f"indices must be a list of integers, got {found.dtype} of shape {list(found.shape)}")
        found = found.long()
        outside = found[(found < 0) | (found >= len(self))]
        if outside.numel():
            raise InputError(f"indices must lie in [0, {len(self)}), got {int(outside[0])}")
        return found


def patch_population(size: int = 8, dtype: torch.dtype | None = None, flat: bool = True) -> PatchPopulation:
    """Which photograph (a temple, a flower; 427 x 640 pixels each) is a patch from? At every position: C = 2.

    There are 531,720 patches of 8 x 8 pixels. Neighbours share pixels, which does not matter: a sample of a bound is
    drawn from them independently (`PatchPopulation.draw`), and the risk over all of them can be computed exactly
    (`PatchPopulation.batches`) and set beside the bound.

    Every colour has mean 0 and variance 1 over both photographs. These moments are constants of the population, known
    before anything is drawn. With moments of the sample every scaled patch would depend on all patches drawn, so that
    they were no longer independent; and a network of the prior, as a function of the pixels, would change with the
    sample, though a prior must be fixed before it. The bound would not hold.

    Args:
        size: of the patches in pixels.
        dtype: of the inputs.
        flat: as vectors [n, 3 * size * size] rather than images [n, 3, size, size].

    Raises:
        InputError: an argument does not fit.
    """
    require_positive_int("size", size)
    dtype = dtype or torch.get_default_dtype()
    if not dtype.is_floating_point:
        raise InputError(f"dtype must be floating-point, got {dtype}")
    pictures = load_pictures()
    require_size_fits(size, pictures)
    name = f"{size} x {size} patches of scikit-learn's photographs, at every position"
    return PatchPopulation(name, standardized(pictures.to(dtype) / 255, pictures), size, flat)
