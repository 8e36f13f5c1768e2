"""The hierarchy above the blocks: layer of the network, module, tensor, part of a tensor; which block lies in which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from torch import nn

from hesscope.core.vectors import ParameterSpace
from hesscope.partition.split import SplitTensor

# Coarse to fine; the blocks themselves come last.
LEVELS = ("module", "layer", "tensor", "part")
BLOCK = "block"
CONTAINERS = (nn.ModuleList, nn.Sequential)

Numbers = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class TensorPlace:
    """Where a tensor stands in the model and in the flat vector, and what a scheme made of it.

    Attributes:
        name, shape: of the tensor; start: position of its first entry in the flat vector.
        module, layer: labels of its layer of the network and of the module that owns it.
        kind: type of that module.
        parts: what it is stacked from.
        outcome, matched: how the scheme cut it, or why not.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    module: str
    layer: str
    kind: str
    parts: SplitTensor = field(repr=False)
    outcome: str
    matched: bool

    @property
    def size(self) -> int:
        """Number of entries."""
        return int(np.prod(self.shape, dtype=np.int64))

    def of(self, vector: Numbers) -> Numbers:
        """Entries of a flat vector that are this tensor's, in its shape (a view)."""
        return vector[self.start : self.start + self.size].reshape(self.shape)


def unit_of(model: nn.Module, path: str) -> str:
    """The layer of the network, as a reader would name it, that the module `path` is in.

    The outermost element of a list (nn.ModuleList, nn.Sequential); an element that is a list itself, the only one of
    its type among its neighbours, is a stage and opened. Outside of lists, the module itself.
    """
    names = path.split(".") if path else []
    module = model
    for depth, name in enumerate(names, start=1):
        parent, module = module, module.get_submodule(name)
        if not isinstance(parent, CONTAINERS):
            continue
        alike = sum(type(sibling) is type(module) for sibling in parent)
        if not isinstance(module, CONTAINERS) or alike > 1 or depth == len(names):
            return ".".join(names[:depth])
    return path


def places(
    model: nn.Module, space: ParameterSpace, parts: Sequence[SplitTensor], splits: Sequence[SplitTensor]
) -> tuple[TensorPlace, ...]:
    """Places of all tensors; `parts` and `splits` come in the order of the space."""
    starts = np.concatenate([[0], np.cumsum(space.sizes)]).tolist()
    found = []
    for name, shape, start, part, split in zip(space.names, space.shapes, starts[:-1], parts, splits, strict=True):
        owner, _, _ = name.rpartition(".")
        kind = type(model.get_submodule(owner)).__name__
        module = unit_of(model, owner) or name
        found.append(TensorPlace(name, shape, start, module, owner or name, kind, part, split.outcome, split.matched))
    return tuple(found)


@dataclass(frozen=True, eq=False)
class Level:
    """Groups of blocks: labels of the groups, and the group of every block."""

    labels: tuple[str, ...]
    group_of_block: Numbers


def levels_of(tensors: Sequence[TensorPlace], assignment: Numbers, blocks: int) -> dict[str, Level]:
    """The levels at which every block lies in one group, coarse to fine (a block of two tensors is in no tensor)."""
    if not tensors:
        return {}
    present = [_present(tensor.of(assignment), blocks) for tensor in tensors]
    alone = np.zeros(1, dtype=np.int32)
    pieces: dict[str, list[Piece]] = {
        "module": [(there, alone, (tensor.module,)) for there, tensor in zip(present, tensors, strict=True)],
        "layer": [(there, alone, (tensor.layer,)) for there, tensor in zip(present, tensors, strict=True)],
        "tensor": [(there, alone, (tensor.name,)) for there, tensor in zip(present, tensors, strict=True)],
    }
    found = {name: level for name, own in pieces.items() if (level := _level(own, blocks)) is not None}
    if "tensor" in found:
        parts = [_parts(tensor, there, assignment, blocks) for there, tensor in zip(present, tensors, strict=True)]
        level = _level(parts, blocks)
        if level is not None and len(level.labels) > len(found["tensor"].labels):
            found["part"] = level
    return found


Piece = tuple[npt.NDArray[np.int64], Numbers, tuple[str, ...]]


def _present(numbers: Numbers, blocks: int) -> npt.NDArray[np.int64]:
    """Blocks that hold entries of a tensor, ascending."""
    seen = np.zeros(blocks, dtype=bool)
    seen[numbers.reshape(-1)] = True
    return np.flatnonzero(seen)


def _parts(tensor: TensorPlace, present: npt.NDArray[np.int64], assignment: Numbers, blocks: int) -> Piece:
    """The blocks of one tensor, the part each lies in, and the parts' labels; one part if a block lies in several."""
    if len(tensor.parts.labels) > 1:
        own = tensor.of(assignment)
        part_of_block = np.zeros(blocks, dtype=np.int32)
        part_of_block[own] = np.broadcast_to(tensor.parts.numbers, tensor.shape)
        if np.array_equal(part_of_block[own], np.broadcast_to(tensor.parts.numbers, tensor.shape)):
            return present, part_of_block[present], tensor.parts.labels
    return present, np.zeros(1, np.int32), (tensor.name,)


def _level(pieces: Sequence[Piece], blocks: int) -> Level | None:
    """The level made of tensors' pieces; None if a block lies in two of its groups."""
    group_of_block = np.full(blocks, -1, dtype=np.int32)
    number_of: dict[str, int] = {}
    for present, local, labels in pieces:
        numbers = np.array([number_of.setdefault(label, len(number_of)) for label in labels], dtype=np.int32)[local]
        before = group_of_block[present]
        if ((before >= 0) & (before != numbers)).any():
            return None
        group_of_block[present] = numbers
    return Level(tuple(number_of), group_of_block)
