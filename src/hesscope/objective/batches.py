"""Batches of data: reading them twice the same, moving them, splitting them into inputs and targets, fingerprints."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hesscope.core.errors import DataError, InputError

TARGET_KEYS = ("labels", "label", "targets", "target", "y")


@dataclass(frozen=True)
class Batches:
    """A source of batches that can be read any number of times; `in_memory` ones cannot change between passes."""

    source: Iterable[Any]
    in_memory: bool

    def __iter__(self) -> Iterator[Any]:
        return iter(self.source)


@dataclass(frozen=True)
class SplitBatch:
    """Arguments of the model's forward, and the targets (None if the batch has none)."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    targets: Tensor | None


def as_batches(data: Any) -> Batches:
    """Interpret the `data` argument of Objective: one batch (tuple or dict), a list of batches, or a DataLoader.

    Raises:
        InputError: it is none of these, or can be read only once.
    """
    if isinstance(data, (tuple, Mapping)):
        return Batches([data], in_memory=True)
    if isinstance(data, list):
        for index, batch in enumerate(data):
            if not isinstance(batch, (tuple, list, Mapping)):
                raise InputError(
                    f"data is a list, so each entry must be a batch (a tuple or a dict); entry {index} is a "
                    f"{type(batch).__name__}; one batch of inputs and targets is a tuple (x, y)"
                )
        return Batches(data, in_memory=True)
    if isinstance(data, Tensor) or not isinstance(data, Iterable):
        raise InputError(
            f"data must be (x, y) tensors, a list of batches or a DataLoader, got {type(data).__name__}"
            + ("; wrap the data set in a DataLoader" if isinstance(data, torch.utils.data.Dataset) else "")
        )
    if isinstance(data, Iterator):
        raise InputError("data is an iterator that can be read only once; pass list(...) of it, or a DataLoader")
    return Batches(data, in_memory=False)


def split_batch(batch: Any, index: int) -> SplitBatch:
    """Split (x, y), (x1, x2, ..., y) or a dict with one of the keys TARGET_KEYS into inputs and targets."""
    if isinstance(batch, Mapping):
        found = [key for key in TARGET_KEYS if key in batch]
        if len(found) != 1:
            raise DataError(
                f"batch {index} is a dict that must have one of the keys {', '.join(TARGET_KEYS)} for the targets; "
                f"its keys are {', '.join(map(str, batch))}"
            )
        keywords = {str(key): value for key, value in batch.items() if key != found[0]}
        return SplitBatch((), keywords, batch[found[0]])
    if not isinstance(batch, (tuple, list)) or len(batch) < 2:
        raise DataError(f"batch {index} must be (inputs, targets) or a dict, got {_describe(batch)}")
    *inputs, targets = batch
    if not isinstance(targets, Tensor):
        raise DataError(f"the targets of batch {index} must be a tensor, got {type(targets).__name__}")
    if len(inputs) == 1 and isinstance(inputs[0], Mapping):
        return SplitBatch((), dict(inputs[0]), targets)
    return SplitBatch(tuple(inputs), {}, targets)


def to_device(batch: Any, device: torch.device) -> Any:
    """The same nested batch with its tensors on `device`."""
    return mapped(batch, lambda tensor: tensor.to(device))


def cast(batch: Any, own: torch.dtype, dtype: torch.dtype) -> Any:
    """The same nested batch with its tensors of dtype `own` in `dtype`."""
    return mapped(batch, lambda tensor: tensor.to(dtype) if tensor.dtype == own else tensor)


def cloned(batch: Any) -> Any:
    """The same nested batch with copies of its tensors."""
    return mapped(batch, lambda tensor: tensor.clone())


def tensors_in(batch: Any) -> list[Tensor]:
    """All tensors of a nested batch."""
    found: list[Tensor] = []

    def collect(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    mapped(batch, collect)
    return found


def mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The same nested batch with `function` of its tensors."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: mapped(entry, function) for key, entry in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(entry, function) for entry in value))
    if type(value) in (tuple, list):
        return type(value)(mapped(entry, function) for entry in value)
    return value


def fingerprint(batch: Any) -> str:
    """Hash of a batch's contents: equal data, equal fingerprint."""
    digest = hashlib.blake2b(digest_size=8)
    _feed(digest, batch)
    return digest.hexdigest()


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        dense = value.detach() if value.layout == torch.strided else value.detach().to_dense()
        flat = dense.cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    elif isinstance(value, np.ndarray):
        digest.update(f"{value.dtype}{value.shape}".encode())
        digest.update(np.ascontiguousarray(value).data)
    elif isinstance(value, Mapping):
        for key in value:
            digest.update(str(key).encode())
            _feed(digest, value[key])
    elif isinstance(value, (tuple, list)):
        digest.update(f"{len(value)}".encode())
        for entry in value:
            _feed(digest, entry)
    elif isinstance(value, (str, bytes, int, float, bool, type(None))):
        digest.update(repr(value).encode())
    elif hasattr(value, "__dict__"):
        _feed(digest, vars(value))
    else:
        digest.update(pickle.dumps(value))


def _describe(batch: Any) -> str:
    length = f" of length {len(batch)}" if isinstance(batch, (tuple, list)) else ""
    return type(batch).__name__ + length
