"""Patches of scikit-learn's two embedded photographs: real colour images by the ten thousand, no download."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hesscope.core.checks import require_choice, require_positive_int
from hesscope.core.errors import InputError
from hesscope.core.rng import stream
from hesscope.data.labelled import LabelledData, draw

KINDS = ("photograph", "region")


def photographs(
    kind: str = "photograph",
    size: int = 8,
    stride: int | None = None,
    regions: Sequence[int] = (2, 4),
    samples: int | None = None,
    seed: int = 0,
    standardize: bool = True,
    flat: bool = False,
    dtype: torch.dtype | None = None,
) -> LabelledData:
    """Which photograph (a temple, a flower; 427 x 640 pixels each), or which region of one, is a patch from?

    Patches lie on a grid of squares that do not overlap: 8480 of 8 x 8 pixels. A smaller `stride` makes more, 33,390
    with stride=4, which share pixels with their neighbours; then a random `LabelledData.split` has pixels of the
    training part in the test part. Without overlap it has none, but neighbours still resemble each other.

    Args:
        kind: what the label is: "photograph" (C = 2), or "region" (C = 2 * rows * columns).
        size: of the patches in pixels.
        stride: from one patch to the next, down and to the right; `size` unless told.
        regions: (rows, columns) into which every photograph's grid of patches is cut, as evenly as can be; for
            kind="region" only.
        samples: how many patches, drawn at random without repetition; all unless told.
        seed: of the draw; also all patches come in random order.
        standardize: give every colour mean 0 and variance 1 over both photographs; otherwise values in [0, 1].
        flat: as vectors [N, 3 * size * size] rather than images [N, 3, size, size].
        dtype: of the inputs.

    Raises:
        InputError: an argument does not fit.
    """
    require_choice("kind", kind, KINDS)
    require_positive_int("size", size)
    stride = size if stride is None else stride
    require_positive_int("stride", stride)
    pictures = load_pictures()
    require_size_fits(size, pictures)

    # A view: [2, grid rows, grid columns, 3, size, size]. Only patches that are drawn are copied.
    grid = pictures.unfold(2, size, stride).unfold(3, size, stride).permute(0, 2, 3, 1, 4, 5)
    shape = tuple(grid.shape[:3])
    order = draw(grid.shape[:3].numel(), samples, stream(seed, "photographs", "order"))
    photograph, row, column = (torch.from_numpy(part) for part in np.unravel_index(order.numpy(), shape))
    inputs = grid[photograph, row, column].to(dtype or torch.get_default_dtype()) / 255
    if standardize:
        inputs = standardized(inputs, pictures)

    labels, classes = photograph, 2
    if kind == "region":
        rows, columns = _regions(regions, shape[1:])
        labels = (photograph * rows + row * rows // shape[1]) * columns + column * columns // shape[2]
        classes = 2 * rows * columns
    name = f"{size} x {size} patches of scikit-learn's photographs, by {kind}"
    return LabelledData(name, inputs.flatten(1) if flat else inputs, labels, classes)


def load_pictures() -> Tensor:
    """[2, 3, 427, 640] bytes."""
    from sklearn.datasets import load_sample_images  # here, so that hesscope's core needs no scikit-learn

    return torch.from_numpy(np.stack(load_sample_images().images)).permute(0, 3, 1, 2)


def require_size_fits(size: int, pictures: Tensor) -> None:
    """Raise unless a square of `size` pixels lies within every picture."""
    smallest = min(pictures.shape[2:])
    if size > smallest:
        raise InputError(f"size must be at most {smallest}, the height of the photographs, got {size}")


def standardized(inputs: Tensor, pictures: Tensor) -> Tensor:
    """Inputs [..., 3, height, width] in [0, 1], scaled as gives every colour of all pictures mean 0 and variance 1."""
    deviation, mean = torch.std_mean(pictures.double() / 255, dim=(0, 2, 3), correction=0)
    return (inputs - _by_colour(mean, inputs)) / _by_colour(deviation, inputs)


def _by_colour(values: Tensor, inputs: Tensor) -> Tensor:
    return values.to(inputs.dtype).view(-1, 1, 1)


def _regions(regions: Sequence[int], patches: tuple[int, ...]) -> tuple[int, int]:
    """The checked (rows, columns) of the regions; patches: those of the grid of patches."""
    if len(regions) != 2:
        raise InputError(f"regions must be (rows, columns), got {regions!r}")
    for name, cuts, available in zip(("rows", "columns"), regions, patches, strict=True):
        require_positive_int(f"{name} of regions", cuts)
        if cuts > available:
            raise InputError(f"{name} of regions must be at most {available}, those of the patches, got {cuts}")
    return regions[0], regions[1]
