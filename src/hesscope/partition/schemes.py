"""How each scheme splits a tensor: by the type of the module that owns it, an axis and a slice, never by its name."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch import nn

from hesscope.core.vectors import ParameterSpace
from hesscope.partition.attention import FoundHeads, split_by_head
from hesscope.partition.hierarchy import unit_of
from hesscope.partition.layouts import NORMS, expert_output_axis, groups_of, output_axis
from hesscope.partition.split import SplitTensor, along_axis, whole


def tensors(space: ParameterSpace) -> Iterator[SplitTensor]:
    """Every tensor is a block."""
    for name, shape in zip(space.names, space.shapes, strict=True):
        yield whole(name, shape, name, "whole")


def layers(space: ParameterSpace) -> Iterator[SplitTensor]:
    """Tensors of one module share a block."""
    for name, shape in zip(space.names, space.shapes, strict=True):
        yield _with_others(name, shape, name.rpartition(".")[0], "with its module")


def modules(model: nn.Module, space: ParameterSpace) -> Iterator[SplitTensor]:
    """Tensors of one layer of the network share a block."""
    for name, shape in zip(space.names, space.shapes, strict=True):
        yield _with_others(name, shape, unit_of(model, name.rpartition(".")[0]), "with its layer of the network")


def rows(model: nn.Module, space: ParameterSpace) -> Iterator[SplitTensor]:
    """Matrices are cut along their output axis."""
    for name, shape in zip(space.names, space.shapes, strict=True):
        owner = _owner(model, name)
        yield _matrix(name, shape, owner, output_axis(owner), expert_output_axis(owner))


def columns(model: nn.Module, space: ParameterSpace) -> Iterator[SplitTensor]:
    """Matrices are cut along their input axis."""
    for name, shape in zip(space.names, space.shapes, strict=True):
        owner = _owner(model, name)
        of_experts = expert_output_axis(owner)
        yield _matrix(name, shape, owner, 1 - output_axis(owner), None if of_experts is None else 3 - of_experts)


def heads(space: ParameterSpace, found: FoundHeads) -> Iterator[SplitTensor]:
    """The projections of attention are cut by head."""
    for name, shape in zip(space.names, space.shapes, strict=True):
        if name in found.cuts:
            yield split_by_head(name, shape, found.cuts[name])
        else:
            why = "shared by all heads" if name in found.shared else "in no attention that by_head knows"
            yield whole(name, shape, name, why, matched=False)


def parts(model: nn.Module, space: ParameterSpace, found: FoundHeads) -> Iterator[SplitTensor]:
    """What a tensor is stacked from: heads of an attention, experts, groups of a convolution; else the whole tensor.

    No partition of its own, but the level of the hierarchy between tensors and rows.
    """
    for name, shape in zip(space.names, space.shapes, strict=True):
        owner = _owner(model, name)
        if name in found.cuts:
            yield split_by_head(name, shape, found.cuts[name])
        elif len(shape) == 3 and expert_output_axis(owner) is not None:
            labels = tuple(f"{name}[{expert}]" for expert in range(shape[0]))
            yield along_axis(name, shape, 0, labels, np.arange(shape[0], dtype=np.int32), "experts along axis 0")
        elif len(shape) > 1 and (groups := groups_of(owner)) > 1:
            labels = tuple(f"{name}[group {group}]" for group in range(groups))
            runs = np.repeat(np.arange(groups, dtype=np.int32), shape[0] // groups)
            yield along_axis(name, shape, 0, labels, runs, "groups along axis 0")
        else:
            yield whole(name, shape, name, "whole")


def _with_others(name: str, shape: tuple[int, ...], label: str, outcome: str) -> SplitTensor:
    if label:
        return whole(name, shape, label, outcome)
    return whole(name, shape, name, "owned by no submodule", matched=False)


# Modules whose axes are known to be outputs and inputs: a single one is a row, too.
KNOWN = (nn.Linear, nn.Bilinear, nn.Embedding, nn.modules.conv._ConvNd)


def _matrix(name: str, shape: tuple[int, ...], owner: nn.Module, axis: int, axis_of_experts: int | None) -> SplitTensor:
    """Cut along axis 0 or 1, or along that axis of every expert; norms and vectors stay whole."""
    if isinstance(owner, NORMS):
        return whole(name, shape, name, "a norm", matched=False)
    if len(shape) < 2:
        return whole(name, shape, name, "a vector", matched=False)
    if axis_of_experts is not None:
        if len(shape) != 3:
            return whole(name, shape, name, "vectors of experts", matched=False)
        return _experts(name, shape, axis_of_experts)
    if axis == 1 and (groups := groups_of(owner)) > 1:
        return _grouped(name, shape, groups)
    if shape[axis] == 1 and not isinstance(owner, KNOWN):
        return whole(name, shape, name, f"of length 1 along axis {axis}", matched=False)
    labels = tuple(f"{name}[{':, ' * axis}{index}]" for index in range(shape[axis]))
    return along_axis(name, shape, axis, labels, np.arange(shape[axis], dtype=np.int32), f"along axis {axis}")


def _experts(name: str, shape: tuple[int, ...], axis: int) -> SplitTensor:
    """Every expert is a matrix of its own, stacked along axis 0."""
    count, width = shape[0], shape[axis]
    between = ":, " * (axis - 1)
    labels = tuple(f"{name}[{expert}, {between}{index}]" for expert in range(count) for index in range(width))
    numbers = np.arange(count * width, dtype=np.int32).reshape((count, width, 1) if axis == 1 else (count, 1, width))
    return SplitTensor(name, labels, numbers, f"along axis {axis} of every expert")


def _grouped(name: str, shape: tuple[int, ...], groups: int) -> SplitTensor:
    """Along axis 1 every group of a grouped convolution has channels of its own."""
    labels = tuple(f"{name}[group {group}, :, {index}]" for group in range(groups) for index in range(shape[1]))
    first, second = np.arange(shape[0], dtype=np.int32)[:, None], np.arange(shape[1], dtype=np.int32)[None, :]
    numbers = first // (shape[0] // groups) * shape[1] + second
    view = numbers.reshape(numbers.shape + (1,) * (len(shape) - 2))
    return SplitTensor(name, labels, view, "along axis 1 of every group")


def _owner(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])
