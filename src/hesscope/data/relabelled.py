"""The same inputs with other labels: two classes made of many, and labels that mean nothing."""

from __future__ import annotations

import torch

from hesscope.core.errors import InputError
from hesscope.core.rng import stream
from hesscope.data.labelled import LabelledData


def binary(data: LabelledData) -> LabelledData:
    """The first half of the classes against the others; of digits 0-4 against 5-9, the split of [DR], arXiv:1703.11008.

    Class c becomes 0 where c < C // 2 and 1 elsewhere, so that of an odd number the second half is the larger.

    Raises:
        InputError: `data` is no LabelledData, or has fewer than 2 classes.
    """
    _require_classes(data)
    half = data.classes // 2
    name = f"{data.name}, {_span(0, half)} against {_span(half, data.classes)}"
    return LabelledData(name, data.inputs, (data.labels >= half).long(), 2)


def randomly_labelled(data: LabelledData, seed: int) -> LabelledData:
    """Labels drawn anew: uniform on the C classes, independent of the inputs, of each other and of the old labels.

    On a fresh draw, an input with a label of its own, the risk of every classifier is then 1 - 1/C exactly: a bound
    below that would be wrong. Labels belong to draws, not to a population: an input that was drawn twice has two
    labels, independent of each other, as independent samples must.

    Raises:
        InputError: `data` is no LabelledData, or has fewer than 2 classes.
    """
    _require_classes(data)
    labels = stream(seed, "randomly_labelled", "labels").integers(0, data.classes, len(data))
    return LabelledData(f"{data.name}, random labels", data.inputs, torch.from_numpy(labels), data.classes)


def _require_classes(data: object) -> None:
    if not isinstance(data, LabelledData):
        raise InputError(f"data must be LabelledData (of a population: a draw), got {type(data).__name__}")
    if data.classes < 2:
        raise InputError(f"data must have at least 2 classes, got {data.classes}")


def _span(first: int, end: int) -> str:
    return f"{first}" if end - first == 1 else f"{first}-{end - 1}"
