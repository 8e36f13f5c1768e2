"""How each scheme splits a tensor: by the type of the module that owns it, an axis and a slice, never by its name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from hesscope.core.checks import nearest
from hesscope.core.errors import InputError
from hesscope.core.vectors import ParameterSpace


@dataclass(frozen=True)
class SplitTensor:
    """One parameter tensor cut into blocks: local block number of every entry, and the blocks' labels."""

    name: str
    labels: tuple[str, ...]
    assignment: npt.NDArray[np.int32]
    matched: bool


Scheme = Callable[[nn.Module, ParameterSpace], Iterator[SplitTensor]]

# Norms scale entry by entry, whatever the shape of their weight: it has no rows.
NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
# Modules whose weight has the input axis first; everywhere else in PyTorch axis 0 is the output (or token) axis.
INPUT_AXIS_FIRST = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def tensors(model: nn.Module, space: ParameterSpace) -> Iterator[SplitTensor]:
    """Every tensor is a block."""
    for name, shape in zip(space.names, space.shapes, strict=True):
        yield _whole(name, shape, name, matched=True)


def layers(model: nn.Module, space: ParameterSpace) -> Iterator[SplitTensor]:
    """Tensors of one module share a block."""
    for name, shape in zip(space.names, space.shapes, strict=True):
        owner, _, _ = name.rpartition(".")
        yield _whole(name, shape, owner or name, matched=bool(owner))


def rows(model: nn.Module, space: ParameterSpace) -> Iterator[SplitTensor]:
    """Matrices are cut along their output axis."""
    for name, shape in zip(space.names, space.shapes, strict=True):
        owner = _owner(model, name)
        yield _along_axis(name, shape, owner, axis=1 if isinstance(owner, INPUT_AXIS_FIRST) else 0)


def columns(model: nn.Module, space: ParameterSpace) -> Iterator[SplitTensor]:
    """Matrices are cut along their input axis."""
    for name, shape in zip(space.names, space.shapes, strict=True):
        owner = _owner(model, name)
        yield _along_axis(name, shape, owner, axis=0 if isinstance(owner, INPUT_AXIS_FIRST) else 1)


def heads(model: nn.Module, space: ParameterSpace) -> Iterator[SplitTensor]:
    """The projections of nn.MultiheadAttention are cut by head; PyTorch stacks query, key and value, head by head."""
    owners = {name: _attention(model, name) for name in space.names}
    for name, shape in zip(space.names, space.shapes, strict=True):
        found = owners[name]
        yield _whole(name, shape, name, matched=False) if found is None else _by_head(name, shape, *found)


def positions(label: str, block: Any, space: ParameterSpace | None) -> npt.NDArray[np.int64]:
    """Positions in the flat vector of one hand-made block (see Partition.from_blocks)."""
    if isinstance(block, Tensor):
        block = block.detach().cpu().numpy()
    if isinstance(block, str):
        return _named_positions(label, block, None, space)
    if isinstance(block, tuple) and len(block) == 2 and isinstance(block[0], str) and not isinstance(block[1], str):
        return _named_positions(label, block[0], block[1], space)
    if isinstance(block, (list, tuple)) and not all(isinstance(part, Integral) for part in block):
        return np.concatenate([positions(label, part, space) for part in block])
    array = np.asarray(block)
    if array.dtype == bool and array.ndim == 1:
        if space is not None and array.size != space.size:
            raise InputError(f"block {label!r}: the mask has {array.size} entries for {space.size} parameters")
        return np.flatnonzero(array)
    if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
        raise InputError(
            f"block {label!r} must be positions in the flat vector, a parameter name, (name, index) or a list of "
            f"these, got {type(block).__name__}"
        )
    return array.astype(np.int64)


def _named_positions(label: str, name: str, index: Any, space: ParameterSpace | None) -> npt.NDArray[np.int64]:
    if space is None:
        raise InputError(f"block {label!r} names the parameter {name!r}: pass model=... so that names are known")
    if name not in space.names:
        raise InputError(f"block {label!r}: no trainable parameter is named {name!r}{nearest(name, space.names)}")
    place = space.slice(name)
    grid = np.arange(place.start, place.stop).reshape(space.shapes[space.names.index(name)])
    if isinstance(index, Tensor):
        index = index.detach().cpu().numpy()
    try:
        chosen = grid if index is None else grid[index]
    except IndexError as error:
        raise InputError(f"block {label!r}: {error} in {name} of shape {grid.shape}") from error
    return np.asarray(chosen).reshape(-1)


def _whole(name: str, shape: tuple[int, ...], label: str, matched: bool) -> SplitTensor:
    return SplitTensor(name, (label,), np.zeros(shape, dtype=np.int32), matched)


def _along_axis(name: str, shape: tuple[int, ...], owner: nn.Module, axis: int) -> SplitTensor:
    """Cut along axis 0 or 1; along axis 1 every group of a grouped convolution has channels of its own."""
    if len(shape) < 2 or isinstance(owner, NORMS):
        return _whole(name, shape, name, matched=False)
    groups = int(getattr(owner, "groups", 1)) if axis == 1 else 1
    first, second = np.indices(shape[:2], dtype=np.int32)
    numbers = first if axis == 0 else first // (shape[0] // groups) * shape[1] + second
    if groups > 1:
        labels = tuple(f"{name}[group {g}, :, {index}]" for g in range(groups) for index in range(shape[1]))
    else:
        labels = tuple(f"{name}[{':, ' * axis}{index}]" for index in range(shape[axis]))
    view = numbers.reshape(shape[:2] + (1,) * (len(shape) - 2))
    return SplitTensor(name, labels, np.broadcast_to(view, shape), matched=True)


def _owner(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def _attention(model: nn.Module, name: str) -> tuple[nn.MultiheadAttention, str] | None:
    """The attention module a parameter belongs to and its name there; None if it belongs to none."""
    path, _, leaf = name.rpartition(".")
    if isinstance(owner := model.get_submodule(path), nn.MultiheadAttention):
        return (owner, leaf) if leaf != "bias_k" and leaf != "bias_v" else None
    outer, _, child = path.rpartition(".")
    if path and isinstance(owner := model.get_submodule(outer), nn.MultiheadAttention):
        return (owner, f"{child}.{leaf}") if leaf == "weight" else None
    return None


def _by_head(name: str, shape: tuple[int, ...], attention: nn.MultiheadAttention, leaf: str) -> SplitTensor:
    count = attention.num_heads
    if leaf == "out_proj.weight":  # head h writes to the columns h of the output projection
        per_axis = np.repeat(np.arange(count, dtype=np.int32), shape[1] // count)
        labels = tuple(f"{name}[output, head {head}]" for head in range(count))
        return SplitTensor(name, labels, np.broadcast_to(per_axis, shape), matched=True)
    roles = {"q_proj_weight": ("query",), "k_proj_weight": ("key",), "v_proj_weight": ("value",)}.get(
        leaf, ("query", "key", "value")
    )
    labels = tuple(f"{name}[{role}, head {head}]" for role in roles for head in range(count))
    per_axis = np.repeat(np.arange(len(labels), dtype=np.int32), shape[0] // len(labels))
    view = per_axis.reshape([-1] + [1] * (len(shape) - 1))
    return SplitTensor(name, labels, np.broadcast_to(view, shape), matched=True)
