"""Gram matrices of rows block by block: blocks of one size go through one batched product."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hesscope.partition.partition import Partition


@dataclass(frozen=True)
class BlockGroup:
    """The n blocks `numbers` [n] of one size, and their columns, block after block: [n * size], or a range of them."""

    size: int
    numbers: Tensor
    columns: Tensor | slice


@dataclass(frozen=True)
class BlockColumns:
    """Columns of a matrix with P columns, cut into the B blocks of a partition."""

    groups: tuple[BlockGroup, ...]
    blocks: int

    @classmethod
    def of(cls, partition: Partition, device: torch.device) -> BlockColumns:
        """The columns of a partition's blocks.

        Blocks of one size that lie side by side are one group, of which rows need not be copied; all others of one size
        are another.
        """
        members, sizes = partition.members(), np.asarray(partition.sizes)
        begins = np.array([block[0] for block in members])
        whole = np.array([block[-1] - block[0] + 1 == len(block) for block in members])
        groups, scattered = [], np.flatnonzero(~whole)
        for size in np.unique(sizes[scattered]):
            numbers = scattered[sizes[scattered] == size]
            columns = torch.from_numpy(np.concatenate([members[number] for number in numbers])).to(device)
            groups.append(BlockGroup(int(size), torch.from_numpy(numbers).to(device), columns))
        order = np.flatnonzero(whole)
        order = order[np.argsort(begins[order])]
        ends = begins[order] + sizes[order]
        apart = (sizes[order][1:] != sizes[order][:-1]) | (begins[order][1:] != ends[:-1])
        for run in np.split(order, np.flatnonzero(apart) + 1) if len(order) else ():
            size, start = int(sizes[run[0]]), int(begins[run[0]])
            groups.append(BlockGroup(size, torch.from_numpy(run).to(device), slice(start, start + size * len(run))))
        return cls(tuple(groups), len(partition))

    def split(self, rows: Tensor) -> BlockRows:
        """Rows [R, P] cut into blocks, as views where these lie side by side."""
        count = len(rows)
        parts = (rows[:, each.columns].view(count, len(each.numbers), each.size) for each in self.groups)
        return BlockRows(self, tuple(part.transpose(0, 1) for part in parts), count)


@dataclass(frozen=True)
class BlockRows:
    """R rows cut into blocks: for every group of blocks [n, R, size]."""

    columns: BlockColumns
    parts: tuple[Tensor, ...]
    count: int

    def some(self, chosen: slice) -> BlockRows:
        """Some of the rows, as a view."""
        parts = tuple(part[:, chosen] for part in self.parts)
        return BlockRows(self.columns, parts, parts[0].shape[1])

    def grams(self, others: BlockRows) -> Tensor:
        """Products of these R rows with S others within each block, [B, R, S] in float64."""
        first = self.parts[0]
        result = torch.empty(self.columns.blocks, self.count, others.count, dtype=torch.float64, device=first.device)
        for group, mine, theirs in zip(self.columns.groups, self.parts, others.parts, strict=True):
            result[group.numbers] = torch.bmm(mine, theirs.mT).double()
        return result
