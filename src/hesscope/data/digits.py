"""scikit-learn's digits: 1797 real 8 x 8 images of handwritten digits, embedded in the package, no download."""

from __future__ import annotations

import torch

from hesscope.data.labelled import LabelledData


def digits(standardize: bool = True, dtype: torch.dtype | None = None, image: bool = False) -> LabelledData:
    """The 1797 images as vectors [1797, 64] with labels 0-9.

    Args:
        standardize: give every pixel mean 0 and variance 1 over the data set (pixels that never change become 0), the
            scaling that MATH.md's predictions assume; otherwise grey values in [0, 1].
        dtype: of the inputs.
        image: as images [1797, 1, 8, 8], for convolutional networks.
    """
    from sklearn.datasets import load_digits  # here, so that hesscope's core needs no scikit-learn

    bunch = load_digits()
    inputs = torch.from_numpy(bunch.data) / 16.0
    if standardize:
        deviation = inputs.std(dim=0, correction=0)
        inputs = (inputs - inputs.mean(dim=0)) / torch.where(deviation > 0, deviation, torch.ones_like(deviation))
    if image:
        inputs = inputs.view(-1, 1, 8, 8)
    labels = torch.from_numpy(bunch.target).long()
    return LabelledData("scikit-learn digits", inputs.to(dtype or torch.get_default_dtype()), labels, 10)
