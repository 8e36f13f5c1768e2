"""Partitions of a model's parameters into named blocks."""

from hesscope.partition.attention import Heads
from hesscope.partition.coverage import Coverage, CoverageRow
from hesscope.partition.cuts import Cut
from hesscope.partition.partition import Partition

__all__ = ["Coverage", "CoverageRow", "Cut", "Heads", "Partition"]
