"""Partition: named, disjoint blocks that together hold every parameter exactly once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from hesscope.core.checks import nearest
from hesscope.core.errors import InputError, PartitionError
from hesscope.core.vectors import ParameterSpace
from hesscope.partition import schemes
from hesscope.partition.attention import Descriptions, FoundHeads, find_heads
from hesscope.partition.coverage import Coverage, contents, coverage_of
from hesscope.partition.cuts import Cut, cut_of
from hesscope.partition.hierarchy import BLOCK, Level, TensorPlace, levels_of, places
from hesscope.partition.positions import positions as positions_of
from hesscope.partition.split import SplitTensor, whole

Numbers = npt.NDArray[np.int32]

# numpy counts in 64 bits: parameters that are counted at once take eight bytes each.
COUNTED_AT_ONCE = 2**24


@dataclass(frozen=True, eq=False)
class Partition:
    """B disjoint blocks of the flat parameter vector.

    Stored as one block number per parameter, so a partition is as large as one vector and cannot overlap.

    Attributes:
        labels: names of the blocks; a row is `fc1.weight[3]`, a column `fc1.weight[:, 3]`.
        assignment: [P] int32, the block of each parameter.
        unmatched: labels of single blocks that hold parameters the scheme could not split.
        tensors: where each tensor stands in the model; empty if the blocks were made of positions alone.
        scheme: what made it, in words.
    """

    labels: tuple[str, ...]
    assignment: Numbers = field(repr=False)
    unmatched: tuple[str, ...] = ()
    tensors: tuple[TensorPlace, ...] = field(default=(), repr=False)
    scheme: str = "by hand"

    def __post_init__(self) -> None:
        own = np.array(self.assignment, dtype=np.int32)
        own.setflags(write=False)
        object.__setattr__(self, "assignment", own)
        if own.ndim != 1 or own.size == 0 or own.min() < 0 or own.max() >= len(self.labels) or 0 in self.sizes:
            raise PartitionError(
                f"assignment must be a vector that uses each of the {len(self.labels)} blocks' numbers"
            )
        if len(set(self.labels)) != len(self.labels):
            raise PartitionError("labels must differ from each other")

    @property
    def size(self) -> int:
        """Number of parameters P."""
        return int(self.assignment.shape[0])

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Number of parameters of each block."""
        counts = np.zeros(len(self.labels), dtype=np.int64)
        for start in range(0, self.size, COUNTED_AT_ONCE):
            counts += np.bincount(self.assignment[start : start + COUNTED_AT_ONCE], minlength=len(self.labels))
        return tuple(counts.tolist())

    def __len__(self) -> int:
        return len(self.labels)

    def indices(self, label: str) -> npt.NDArray[np.int64]:
        """Positions of a block's parameters in the flat vector, ascending."""
        return np.flatnonzero(self.assignment == self._number(label))

    def _number(self, label: str) -> int:
        if label not in self._number_of:
            raise InputError(f"no block is named {label!r}{nearest(label, self.labels)}")
        return self._number_of[label]

    @cached_property
    def _number_of(self) -> dict[str, int]:
        return {label: number for number, label in enumerate(self.labels)}

    def members(self) -> list[npt.NDArray[np.int64]]:
        """Positions of every block's parameters, block by block."""
        order = np.argsort(self.assignment, kind="stable")
        return np.split(order, np.cumsum(self.sizes)[:-1])

    def require_fits(self, size: int) -> None:
        """Raise PartitionError unless the partition covers exactly `size` parameters."""
        if self.size != size:
            raise PartitionError(f"the partition covers {self.size} parameters, but the operator has {size}")

    # --- hierarchy ----------------------------------------------------------------------------------------------------

    @property
    def levels(self) -> tuple[str, ...]:
        """Levels of the hierarchy above the blocks that are coarser than the blocks, coarse to fine, and "block".

        "module" (a layer of the network, as in `by_module`), "layer" (the module that owns the tensors, as in
        `by_layer`), "tensor", "part" (a head of an attention, an expert, a group of a convolution; a tensor that has
        none, or is not cut along them, is one part), "block". A level that some block does not lie in one group of is
        left out: a block that spans two tensors belongs to no tensor.
        """
        coarser = [name for name, level in self._levels.items() if len(level.labels) < len(self.labels)]
        return (*coarser, BLOCK)

    def groups(self, level: str) -> dict[str, tuple[str, ...]]:
        """Label of every group at a level -> labels of its blocks: what `BlockEnergies.aggregate` takes.

        Raises:
            InputError: the partition does not have this level.
        """
        if level == BLOCK:
            return {label: (label,) for label in self.labels}
        found = self._level(level)
        blocks: list[list[str]] = [[] for _ in found.labels]
        for label, group in zip(self.labels, found.group_of_block.tolist(), strict=True):
            blocks[group].append(label)
        return {label: tuple(own) for label, own in zip(found.labels, blocks, strict=True)}

    def path(self, label: str) -> dict[str, str]:
        """Level -> label of the group that a block lies in, coarse to fine, ending with the block."""
        number = self._number(label)
        above = {name: self._levels[name] for name in self.levels if name != BLOCK}
        return {**{name: level.labels[level.group_of_block[number]] for name, level in above.items()}, BLOCK: label}

    def coarsened(self, level: str) -> Partition:
        """The partition into the groups of a level; nothing in it is unmatched.

        Raises:
            InputError: the partition does not have this level.
        """
        if level == BLOCK:
            return self
        found = self._level(level)
        tensors = tuple(replace(tensor, outcome=f"in one block a {level}", matched=True) for tensor in self.tensors)
        return Partition(
            found.labels, found.group_of_block[self.assignment], (), tensors, f"{self.scheme}, coarsened to {level}"
        )

    @cached_property
    def _levels(self) -> dict[str, Level]:
        return levels_of(self.tensors, self.assignment, len(self.labels))

    def _level(self, level: str) -> Level:
        if level not in self._levels:
            why = "" if self.tensors else " (it was made of positions alone: pass model=... to from_blocks)"
            known = ", ".join(repr(name) for name in (*self._levels, BLOCK))
            raise InputError(f"level must be one that this partition has, {known}, got {level!r}{why}")
        return self._levels[level]

    # --- what became of the tensors -----------------------------------------------------------------------------------

    def coverage(self) -> Coverage:
        """What the scheme did with every type of module; `print` shows a table.

        Raises:
            PartitionError: the blocks were made of positions alone.
        """
        self._require_tensors("coverage")
        return coverage_of(self.scheme, self.tensors, self.assignment, len(self.labels))

    def cuts(self) -> dict[str, Cut | None]:
        """Parameter name -> how its tensor is cut, as equal slices along one axis; None where it is not.

        A tensor that lies in one block, alone or with others, has one slice (`count` 1). Experts cut by row have rows
        along two axes, and columns of grouped convolutions are no slices: None.

        Raises:
            PartitionError: the blocks were made of positions alone.
        """
        self._require_tensors("cuts")
        return {tensor.name: cut_of(tensor.of(self.assignment)) for tensor in self.tensors}

    def _require_tensors(self, what: str) -> None:
        if not self.tensors:
            raise PartitionError(f"{what}() needs the tensors' names: pass model=... to from_blocks")

    # --- schemes ------------------------------------------------------------------------------------------------------

    @classmethod
    def by_tensor(cls, model: nn.Module) -> Partition:
        """One block per parameter tensor, labelled with its name."""
        space = ParameterSpace.of(model)
        return cls._from_splits(model, space, schemes.tensors(space), "by tensor")

    @classmethod
    def by_layer(cls, model: nn.Module) -> Partition:
        """One block per module that owns parameters (weight and bias together), labelled with the module's name.

        Parameters of the model itself, which no submodule owns, are single blocks and listed as unmatched.
        """
        space = ParameterSpace.of(model)
        return cls._from_splits(model, space, schemes.layers(space), "by layer")

    @classmethod
    def by_module(cls, model: nn.Module) -> Partition:
        """One block per layer of the network as a reader would name it, such as `transformer.h.0`.

        That is the outermost element of an nn.ModuleList or nn.Sequential; a list that is the only one of its type
        among the elements of another is opened. Modules outside of lists, and parameters of the model itself, are as
        in `by_layer`.
        """
        space = ParameterSpace.of(model)
        return cls._from_splits(model, space, schemes.modules(model, space), "by module")

    @classmethod
    def by_row(cls, model: nn.Module) -> Partition:
        """One block per output neuron: rows of matrices, output channels of convolutions, tokens of embeddings.

        Of experts stacked in one tensor, one per expert and output. Vectors (biases, norms) have no rows; each is a
        single block and listed as unmatched.

        Raises:
            PartitionError: the model has nothing but vectors.
        """
        space = ParameterSpace.of(model)
        return cls._from_splits(model, space, schemes.rows(model, space), "by row", must_match="rows")

    @classmethod
    def by_column(cls, model: nn.Module) -> Partition:
        """One block per input: columns of matrices, input channels of convolutions; all else as in `by_row`."""
        space = ParameterSpace.of(model)
        return cls._from_splits(model, space, schemes.columns(model, space), "by column", must_match="columns")

    @classmethod
    def by_head(cls, model: nn.Module, heads: Descriptions | None = None) -> Partition:
        """One block per attention head and role (query, key, value, output), for every tensor that holds heads.

        Known are `nn.MultiheadAttention` and the types of transformers in `partition.attention.KNOWN`. All other
        parameters are single blocks, one per tensor, and listed as unmatched.

        Args:
            model: the model.
            heads: attention of your own. A key is the name of a module or parameter, or a class of modules (all of
                them are meant); a value is Heads(count, roles, axis), or a dict from names relative to the module to
                Heads, or a function from the module to such a dict:
                `{Block: {"qkv": Heads(4, ("query", "key", "value")), "project": Heads(4, "output", axis=1)}}`.

        Raises:
            InputError: `heads` names what is not there.
            PartitionError: heads do not divide a width, or the model has no attention that is known or described.
        """
        space = ParameterSpace.of(model)
        found = find_heads(model, space, heads)
        return cls._from_splits(model, space, schemes.heads(space, found), "by head", "attention heads", found)

    @classmethod
    def from_blocks(cls, blocks: Mapping[str, Any], model: nn.Module | None = None) -> Partition:
        """Blocks chosen by hand.

        Args:
            blocks: label -> what the block holds: positions in the flat vector (integers, a range, an array or
                tensor, a boolean mask), or, when `model` is given, a parameter name, (name, index) with any NumPy
                index into that tensor, or a list of these.
            model: needed when blocks are given by parameter names; also fixes the number of parameters.

        Raises:
            PartitionError: blocks overlap, are empty or miss parameters (without a model: leave gaps).
        """
        if not isinstance(blocks, Mapping) or not blocks:
            raise InputError("from_blocks needs a non-empty dict of label -> positions or parameter names")
        space = None if model is None else ParameterSpace.of(model)
        positions = {str(label): positions_of(label, block, space) for label, block in blocks.items()}
        partition = cls._from_positions(positions, space)
        if model is None or space is None:
            return partition
        by_hand = [whole(name, shape, name, "by hand") for name, shape in zip(space.names, space.shapes, strict=True)]
        return replace(partition, tensors=places(model, space, _parts(model, space), by_hand))

    @classmethod
    def _from_splits(
        cls,
        model: nn.Module,
        space: ParameterSpace,
        splits: Iterable[SplitTensor],
        scheme: str,
        must_match: str = "",
        heads: FoundHeads | None = None,
    ) -> Partition:
        """The partition made of every tensor's blocks; blocks of one label are one block.

        must_match: what the scheme cuts into, if it makes no sense without any.
        """
        splits = list(splits)
        tensors = places(model, space, _parts(model, space, heads), splits)
        if must_match and not any(split.matched for split in splits):
            described = "; describe an attention of your own with heads={...}" if scheme == "by head" else ""
            raise PartitionError(
                f"{scheme}: this model has no {must_match} that can be told, it has {contents(tensors)}{described}, "
                "or take another scheme, such as by_tensor"
            )
        number_of: dict[str, int] = {}
        assignment = np.empty(space.size, dtype=np.int32)
        for split, tensor in zip(splits, tensors, strict=True):
            numbers = np.array([number_of.setdefault(label, len(number_of)) for label in split.labels], dtype=np.int32)
            tensor.of(assignment)[...] = numbers[split.numbers]
        unmatched = tuple(label for split in splits if not split.matched for label in split.labels)
        return cls(tuple(number_of), assignment, unmatched, tensors, scheme)

    @classmethod
    def _from_positions(cls, positions: Mapping[str, npt.NDArray[np.int64]], space: ParameterSpace | None) -> Partition:
        size = space.size if space is not None else 1 + max(int(block.max(initial=-1)) for block in positions.values())
        assignment = np.full(size, -1, dtype=np.int32)
        labels = tuple(positions)
        for number, (label, block) in enumerate(positions.items()):
            if block.size == 0:
                raise PartitionError(f"block {label!r} is empty")
            if int(block.min()) < 0 or int(block.max()) >= size:
                raise PartitionError(f"block {label!r} has positions outside [0, {size})")
            taken = assignment[block]
            if (taken >= 0).any():
                first = int(np.flatnonzero(taken >= 0)[0])
                raise PartitionError(
                    f"blocks overlap: parameter {_where(int(block[first]), space)} is in "
                    f"{labels[int(taken[first])]!r} and in {label!r}"
                )
            if np.unique(block).size != block.size:
                raise PartitionError(f"block {label!r} names a parameter twice")
            assignment[block] = number
        missed = np.flatnonzero(assignment < 0)
        if missed.size:
            raise PartitionError(
                f"the blocks miss {missed.size} of {size} parameters, the first being {_where(int(missed[0]), space)}"
            )
        return cls(labels, assignment)


def _parts(model: nn.Module, space: ParameterSpace, heads: FoundHeads | None = None) -> list[SplitTensor]:
    """What every tensor is stacked from; an attention whose heads do not fit is not taken apart."""
    try:
        return list(schemes.parts(model, space, find_heads(model, space) if heads is None else heads))
    except PartitionError:
        return list(schemes.parts(model, space, FoundHeads({}, frozenset())))


def _where(position: int, space: ParameterSpace | None) -> str:
    """'fc1.weight[12]' if the space is known, else the position itself."""
    if space is None:
        return str(position)
    for name in space.names:
        place = space.slice(name)
        if place.start <= position < place.stop:
            return f"{name}[{position - place.start}] (flat)"
    return str(position)


def select_labels(labels: Sequence[str], chosen: Iterable[str] | None) -> list[int]:
    """Numbers of the chosen labels (all of them for None), in the order given.

    Raises:
        InputError: a label does not exist (with the nearest one that does), or fewer than one is chosen.
    """
    if chosen is None:
        return list(range(len(labels)))
    number_of = {label: number for number, label in enumerate(labels)}
    if isinstance(chosen, (str, Tensor)):
        raise InputError("labels must be a list of block labels")
    selected = []
    for label in chosen:
        if label not in number_of:
            raise InputError(f"no block is named {label!r}{nearest(str(label), labels)}")
        selected.append(number_of[label])
    if not selected:
        raise InputError("labels is empty: choose at least one block")
    return selected
