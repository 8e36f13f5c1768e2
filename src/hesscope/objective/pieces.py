"""Cutting one batch into pieces by its samples, for models that treat samples independently."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from torch import Tensor

from hesscope.objective.batches import mapped, tensors_in


def cut(batch: Any, count: int) -> list[Any]:
    """The batch as at most `count` batches of about equally many samples.

    The shortest tensor's first axis counts samples (one entry alone is shared by all); longer ones that hold a multiple
    of it are cut with it, as labels of flattened sequences. Whether samples are independent, or this is what the first
    axis means, is not looked at.
    """
    samples = count_samples(batch)

    def part(begin: int, end: int) -> Any:
        def rows(tensor: Tensor) -> Tensor:
            if tensor.ndim == 0 or tensor.shape[0] % samples or tensor.shape[0] == 0:
                return tensor
            each = tensor.shape[0] // samples
            return tensor[begin * each : end * each]

        return mapped(batch, rows)

    pieces = min(count, samples)
    edges = [round(samples * number / pieces) for number in range(pieces + 1)]
    return [part(begin, end) for begin, end in pairwise(edges)] if pieces > 1 else [batch]


def chosen(batch: Any, samples: Tensor) -> Any:
    """Some samples of a batch, by their numbers [k]; what counts samples is as for `cut`."""
    count = count_samples(batch)

    def rows(tensor: Tensor) -> Tensor:
        if tensor.ndim == 0 or tensor.shape[0] % count or tensor.shape[0] == 0:
            return tensor
        each = tensor.shape[0] // count
        return tensor.reshape(count, each, *tensor.shape[1:])[samples.to(tensor.device)].flatten(0, 1)

    return mapped(batch, rows)


def count_samples(batch: Any) -> int:
    """Number of samples in a batch, as `cut` takes it: the shortest first axis of more than one entry, or 1."""
    return min((tensor.shape[0] for tensor in tensors_in(batch) if tensor.ndim and tensor.shape[0] > 1), default=1)
