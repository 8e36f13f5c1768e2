"""Softmax probabilities of an output layer tile by tile: samples and classes are cut, logits never held whole.

With t the class of the largest logit and R = sum_{c != t} e^{x_c - x_t}, p_t = 1 / (1 + R) and 1 - p_t = R / (1 + R):
nothing cancels however certain a prediction is, and no logit scale overflows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hesscope.core.errors import InputError, TooLargeError
from hesscope.core.memory import human_bytes

MAX_CLASS_TILE = 8192
# Float64 matrices of rows x rows and of rows x classes that work on a pair of tiles takes.
SQUARE, WIDE = 10, 8


@dataclass(frozen=True, eq=False)
class ClassTiles:
    """The layer's inputs and how its samples and classes are cut."""

    features: Tensor
    logits: Callable[[slice, slice | Tensor], Tensor]
    classes: int
    row_tile: int
    class_tile: int

    @classmethod
    def of(
        cls, features: Tensor, logits: Tensor | None, weight: Tensor | None, bias: Tensor | None, memory: int
    ) -> ClassTiles:
        """Check that the tensors fit each other, and cut them; raises what `output_layer_energies` raises."""
        if (logits is None) == (weight is None):
            raise InputError("give either logits [N, C] or weight [C, d], not both and not neither")
        named = {"features": features, "logits": logits, "weight": weight, "bias": bias}
        given = {name: tensor for name, tensor in named.items() if tensor is not None}
        _require_fit(given)
        N = features.shape[0]
        if weight is None:
            assert logits is not None
            table = logits.detach()
            C = table.shape[1]

            def tile(rows: slice, columns: slice | Tensor) -> Tensor:
                return table[rows, columns]

        else:
            C = weight.shape[0]
            V, shift = weight.detach(), None if bias is None else bias.detach()

            def tile(rows: slice, columns: slice | Tensor) -> Tensor:
                product = features.detach()[rows] @ V[columns].T
                return product if shift is None else product + shift[columns]

        row_tile, class_tile = _tile_sizes(N, C, memory)
        return cls(features.detach(), tile, C, row_tile, class_tile)

    @property
    def count(self) -> int:
        """Tiles that `_energies` goes through: pairs of row tiles, times class tiles."""
        rows, columns = len(list(self.rows())), len(list(self.class_slices()))
        return rows * (rows + 1) // 2 * columns

    def rows(self) -> Iterator[slice]:
        """Tiles of samples."""
        N = self.features.shape[0]
        return (slice(start, min(start + self.row_tile, N)) for start in range(0, N, self.row_tile))

    def class_slices(self) -> Iterator[slice]:
        """Tiles of classes."""
        return (
            slice(start, min(start + self.class_tile, self.classes))
            for start in range(0, self.classes, self.class_tile)
        )


def _require_fit(given: dict[str, Tensor]) -> None:
    """Refuse tensors that do not fit each other."""
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor):
            raise InputError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        dims = 1 if name == "bias" else 2
        if tensor.ndim != dims or 0 in tensor.shape:
            raise InputError(
                f"{name} must be a non-empty tensor with {dims} dimensions, got shape {list(tensor.shape)}"
            )
        if not tensor.dtype.is_floating_point:
            raise InputError(f"{name} must hold real numbers, got {tensor.dtype}")
    features = given["features"]
    for name, tensor in given.items():
        if tensor.dtype != features.dtype or tensor.device != features.device:
            raise InputError(f"{name} must be {features.dtype} on {features.device} like features")
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(f"{name} holds values that are not finite")
    if "logits" in given and given["logits"].shape[0] != features.shape[0]:
        raise InputError(f"features have N = {features.shape[0]} rows, but logits have {given['logits'].shape[0]}")
    if "weight" in given and given["weight"].shape[1] != features.shape[1]:
        raise InputError(f"features have d = {features.shape[1]} columns, but weight has {given['weight'].shape[1]}")
    if "bias" in given and ("weight" not in given or given["bias"].shape[0] != given["weight"].shape[0]):
        raise InputError("bias must have one entry per row of weight")
    classes = given["logits"].shape[1] if "logits" in given else given["weight"].shape[0]
    if classes < 2:
        raise InputError(f"there must be at least 2 classes, got {classes}")


def _tile_sizes(N: int, C: int, memory: int) -> tuple[int, int]:
    """Rows and classes of a tile: SQUARE float64 matrices of rows x rows, WIDE of rows x classes fit in `memory`."""
    rows, columns = N, min(C, MAX_CLASS_TILE)
    while 8 * (SQUARE * rows * rows + WIDE * rows * columns) > memory:
        if rows > 256 or (rows > 1 and columns <= 64):
            rows = -(-rows // 2)
        elif columns > 1:
            columns = -(-columns // 2)
        else:
            least = human_bytes(8 * (SQUARE + WIDE))
            raise TooLargeError(f"memory = {human_bytes(memory)} is too small for one tile: it takes at least {least}")
    return rows, columns


@dataclass(frozen=True, eq=False)
class Softmax:
    """What normalizes the probabilities of N samples, float64 but for `top`.

    Attributes:
        top: [N] class of the largest logit; peak: [N] that logit.
        rest: [N] R, the sum of e^{x_c - peak} over all other classes.
    """

    tiles: ClassTiles
    dtype: torch.dtype
    top: Tensor
    peak: Tensor
    rest: Tensor

    @classmethod
    def of(cls, tiles: ClassTiles, dtype: torch.dtype) -> Softmax:
        """One pass over all classes; probabilities will be given in `dtype`."""
        found = [_normalize(tiles, rows, dtype) for rows in tiles.rows()]
        return cls(tiles, dtype, *(torch.cat(parts) for parts in zip(*found, strict=True)))

    def certainty(self, rows: slice) -> Tensor:
        """The probability of the top class, [rows], float64."""
        return 1 / (1 + self.rest[rows])

    def probabilities(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
        """Of a tile: p with zero in place of every top class, and q = p (1 - p) with it, [rows, columns] each."""
        x = self.tiles.logits(rows, columns).to(self.dtype)
        p = torch.sub(x, self.peak[rows, None].to(self.dtype)).exp_()
        p /= (1 + self.rest[rows, None]).to(self.dtype)
        inside = ((self.top[rows] >= columns.start) & (self.top[rows] < columns.stop)).nonzero()[:, 0]
        where = inside, self.top[rows][inside] - columns.start
        p[where] = 0
        q = p - p.square()
        rest = self.rest[rows][inside]
        q[where] = (rest / (1 + rest) ** 2).to(self.dtype)
        return p, q

    def of_classes(self, rows: slice, classes: Tensor) -> tuple[Tensor, Tensor]:
        """P and 1 - p of chosen classes, [rows, k] each, float64."""
        x = self.tiles.logits(rows, classes).to(self.dtype).double()
        p = (x - self.peak[rows, None]).exp() / (1 + self.rest[rows, None])
        is_top = self.top[rows, None] == classes
        p = torch.where(is_top, self.certainty(rows)[:, None], p)
        return p, torch.where(is_top, (self.rest[rows] * self.certainty(rows))[:, None], 1 - p)


def _normalize(tiles: ClassTiles, rows: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Class and value of the largest logit, and the sum over the others relative to it; [rows] each."""
    tops, peaks, others = [], [], []
    for columns in tiles.class_slices():
        x = tiles.logits(rows, columns).to(dtype)
        peak, top = x.max(dim=1)
        others.append(torch.logsumexp(x.scatter(1, top[:, None], -torch.inf), dim=1).double())
        tops.append(top + columns.start)
        peaks.append(peak.double())
    peak, tile = torch.stack(peaks).max(dim=0)
    top = torch.stack(tops).gather(0, tile[None])[0]
    runners_up = torch.stack(peaks).scatter(0, tile[None], -torch.inf)
    rest = torch.logsumexp(torch.cat([torch.stack(others), runners_up]), dim=0)
    return top, peak, (rest - peak).exp()
