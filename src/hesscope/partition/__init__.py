"""Partitions of a model's parameters into named blocks."""

from hesscope.partition.partition import Partition

__all__ = ["Partition"]
