"""Partition: named, disjoint blocks that together hold every parameter exactly once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from hesscope.core.checks import nearest
from hesscope.core.errors import InputError, PartitionError
from hesscope.core.vectors import ParameterSpace
from hesscope.partition import schemes


@dataclass(frozen=True, eq=False)
class Partition:
    """B disjoint blocks of the flat parameter vector.

    Stored as one block number per parameter, so a partition is as large as one vector and cannot overlap.

    Attributes:
        labels: names of the blocks; a row is `fc1.weight[3]`, a column `fc1.weight[:, 3]`.
        assignment: [P] int32, the block of each parameter.
        unmatched: labels of single blocks that hold parameters the scheme could not split.
    """

    labels: tuple[str, ...]
    assignment: npt.NDArray[np.int32] = field(repr=False)
    unmatched: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        own = np.array(self.assignment, dtype=np.int32)
        if own.ndim != 1 or own.size == 0 or set(np.unique(own).tolist()) != set(range(len(self.labels))):
            raise PartitionError(
                f"assignment must be a vector that uses each of the {len(self.labels)} blocks' numbers"
            )
        if len(set(self.labels)) != len(self.labels):
            raise PartitionError("labels must differ from each other")
        own.setflags(write=False)
        object.__setattr__(self, "assignment", own)

    @property
    def size(self) -> int:
        """Number of parameters P."""
        return int(self.assignment.shape[0])

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Number of parameters of each block."""
        return tuple(np.bincount(self.assignment, minlength=len(self.labels)).tolist())

    def __len__(self) -> int:
        return len(self.labels)

    def indices(self, label: str) -> npt.NDArray[np.int64]:
        """Positions of a block's parameters in the flat vector, ascending."""
        if label not in self.labels:
            raise InputError(f"no block is named {label!r}{nearest(label, self.labels)}")
        return np.flatnonzero(self.assignment == self.labels.index(label))

    def members(self) -> list[npt.NDArray[np.int64]]:
        """Positions of every block's parameters, block by block."""
        order = np.argsort(self.assignment, kind="stable")
        return np.split(order, np.cumsum(self.sizes)[:-1])

    def require_fits(self, size: int) -> None:
        """Raise PartitionError unless the partition covers exactly `size` parameters."""
        if self.size != size:
            raise PartitionError(f"the partition covers {self.size} parameters, but the operator has {size}")

    @classmethod
    def by_tensor(cls, model: nn.Module) -> Partition:
        """One block per parameter tensor, labelled with its name."""
        return cls._from_scheme(model, schemes.tensors)

    @classmethod
    def by_layer(cls, model: nn.Module) -> Partition:
        """One block per module that owns parameters (weight and bias together), labelled with the module's name.

        Parameters of the model itself, which no submodule owns, are single blocks and listed as unmatched.
        """
        return cls._from_scheme(model, schemes.layers)

    @classmethod
    def by_row(cls, model: nn.Module) -> Partition:
        """One block per output neuron: rows of matrices, output channels of convolutions, tokens of embeddings.

        Vectors (biases, norms) have no rows; each is a single block and listed as unmatched.
        """
        return cls._from_scheme(model, schemes.rows)

    @classmethod
    def by_column(cls, model: nn.Module) -> Partition:
        """One block per input: columns of matrices, input channels of convolutions; vectors as in `by_row`."""
        return cls._from_scheme(model, schemes.columns)

    @classmethod
    def by_head(cls, model: nn.Module) -> Partition:
        """One block per attention head and role (query, key, value, output) of every `nn.MultiheadAttention`.

        All other parameters are single blocks, one per tensor, and listed as unmatched.
        """
        return cls._from_scheme(model, schemes.heads)

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
        positions = {str(label): schemes.positions(label, block, space) for label, block in blocks.items()}
        return cls._from_positions(positions, space)

    @classmethod
    def _from_scheme(cls, model: nn.Module, scheme: schemes.Scheme) -> Partition:
        space = ParameterSpace.of(model)
        labels: list[str] = []
        unmatched: list[str] = []
        assignment = np.empty(space.size, dtype=np.int32)
        number_of: dict[str, int] = {}
        for tensor in scheme(model, space):
            numbers = np.empty(len(tensor.labels), dtype=np.int32)
            for local, label in enumerate(tensor.labels):
                if label not in number_of:
                    number_of[label] = len(labels)
                    labels.append(label)
                numbers[local] = number_of[label]
            assignment[space.slice(tensor.name)] = numbers[tensor.assignment.reshape(-1)]
            if not tensor.matched:
                unmatched.extend(tensor.labels)
        return cls(tuple(labels), assignment, tuple(unmatched))

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
