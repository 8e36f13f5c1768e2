"""Blocks chosen by hand: what a user writes, as positions in the flat vector."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from hesscope.core.checks import nearest
from hesscope.core.errors import InputError
from hesscope.core.vectors import ParameterSpace


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
