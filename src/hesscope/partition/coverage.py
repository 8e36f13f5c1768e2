"""Coverage: what a partition did with every type of module, as a record and a printed table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hesscope.partition.hierarchy import TensorPlace

HEADERS = ("module", "tensors", "parameters", "blocks", "split", "how, or why not")


@dataclass(frozen=True)
class CoverageRow:
    """Tensors of one type of module that met the same fate.

    Attributes:
        module: type of the module that owns them.
        tensors, parameters: how many there are; blocks: that hold some of these parameters.
        matched: whether the scheme could split them; outcome: how, or why not.
    """

    module: str
    tensors: int
    parameters: int
    blocks: int
    matched: bool
    outcome: str


@dataclass(frozen=True)
class Coverage:
    """What a partition did with every type of module; `print` shows a table.

    Attributes:
        scheme: of the partition.
        rows: in the order of the model's parameters.
        parameters, blocks: of the whole partition (a block can be counted in several rows).
    """

    scheme: str
    rows: tuple[CoverageRow, ...]
    parameters: int
    blocks: int

    @property
    def matched(self) -> float:
        """Share of the parameters that the scheme could split, in [0, 1]."""
        return sum(row.parameters for row in self.rows if row.matched) / self.parameters

    def __str__(self) -> str:
        cells = [HEADERS, *(_cells(row) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(map(_aligned, HEADERS, row, widths)) for row in cells]
        title = (
            f"{self.scheme}: {self.parameters:,} parameters in {self.blocks:,} blocks, "
            f"{self.matched:.1%} of the parameters split as asked"
        )
        return "\n".join([title, *(line.rstrip() for line in lines)])


def coverage_of(
    scheme: str, tensors: Sequence[TensorPlace], assignment: npt.NDArray[np.int32], blocks: int
) -> Coverage:
    """Count tensors, parameters and blocks by type of module and outcome."""
    together: dict[tuple[str, bool, str], list[TensorPlace]] = {}
    for tensor in tensors:
        together.setdefault((tensor.kind, tensor.matched, tensor.outcome), []).append(tensor)
    rows = []
    for (kind, matched, outcome), own in together.items():
        seen = np.zeros(blocks, dtype=bool)
        for tensor in own:
            seen[tensor.of(assignment).reshape(-1)] = True
        size = sum(tensor.size for tensor in own)
        rows.append(CoverageRow(kind, len(own), size, int(np.count_nonzero(seen)), matched, outcome))
    return Coverage(scheme, tuple(rows), int(assignment.size), blocks)


def contents(tensors: Sequence[TensorPlace]) -> str:
    """What a model has, in words: 'Linear (4 tensors, 1,024 parameters), LayerNorm (...)', the largest first."""
    sizes: dict[str, list[int]] = {}
    for tensor in tensors:
        sizes.setdefault(tensor.kind, []).append(tensor.size)
    ordered = sorted(sizes.items(), key=lambda item: -sum(item[1]))
    return ", ".join(f"{kind} ({_count(len(own), 'tensor')}, {_count(sum(own), 'parameter')})" for kind, own in ordered)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _cells(row: CoverageRow) -> tuple[str, ...]:
    numbers = (f"{row.tensors:,}", f"{row.parameters:,}", f"{row.blocks:,}")
    return (row.module, *numbers, "yes" if row.matched else "no", row.outcome)


def _aligned(header: str, text: str, width: int) -> str:
    """Numbers to the right, words to the left."""
    return text.rjust(width) if header in ("tensors", "parameters", "blocks") else text.ljust(width)
