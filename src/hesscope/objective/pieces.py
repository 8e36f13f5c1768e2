"""Cutting one batch into pieces by its samples, for models that treat samples independently."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch

from hesscope.objective.batches import mapped, split_batch


def cut(batch: Any, index: int, count: int) -> list[Any]:
    """The batch as at most `count` batches of about equally many samples; tensors of another length are shared.

    Whether samples are independent is not looked at.
    """
    targets = split_batch(batch, index).targets
    samples = 1 if targets is None or targets.ndim == 0 else targets.shape[0]
    edges = torch.linspace(0, samples, min(count, samples) + 1).round().long().tolist() if samples > 1 else []
    if not edges:
        return [batch]

    def part(begin: int, end: int) -> Any:
        return mapped(batch, lambda tensor: tensor[begin:end] if tensor.shape[:1] == (samples,) else tensor)

    return [part(begin, end) for begin, end in pairwise(edges)]
