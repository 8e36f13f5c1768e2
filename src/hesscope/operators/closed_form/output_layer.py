"""All C^2 class blocks of a softmax output layer at once, for any C: energies without forming a block.

The Hessian of the mean cross-entropy of logits V h_n with respect to V has the blocks
H_ij = (1/N) sum_n (delta_ij p_ni - p_ni p_nj) h_n h_n^T. With K2_nm = (h_n . h_m)^2 and q = p (1 - p), by MATH.md,
section 3:

    ||H_ii||^2             = (1/N^2) q_i^T K2 q_i
    sum_{i != j} ||H_ij||^2 = (1/N^2) sum_nm K2_nm [ (p_n . p_m)^2 - sum_i p_ni^2 p_mi^2 ]

The second is used as it stands: total minus diagonal would cancel at large C. Work O(N^2 (C + d)), with classes and
samples in tiles; softmax through log-sum-exp, so that no logit scale overflows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hesscope.core.errors import InputError, TooLargeError
from hesscope.core.memory import human_bytes
from hesscope.core.records import Provenance, require_xarray_kind

if TYPE_CHECKING:
    import xarray as xr

DEFAULT_MEMORY = 2**30
MAX_CLASS_TILE = 8192
# A symmetric product is made in so many strips, each from its diagonal on: 5/8 of the work.
STRIPS = 4

# Below this share of its first term the off-diagonal difference has lost too many digits of float32 (peaked softmax).
CANCELLATION = 1e-2

Array = npt.NDArray[np.float64]

# Called with (tiles done, tiles in all).
Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class OutputLayerEnergies:
    """Energies of the C x C class blocks of an output layer's Hessian, each block d x d.

    Attributes:
        diagonal: sum_i ||H_ii||_F^2; off_diagonal: sum_{i != j} ||H_ij||_F^2.
        per_class: [C] the diagonal energies ||H_ii||_F^2.
        samples: N; classes: C.
        provenance: how it was made.
    """

    diagonal: float
    off_diagonal: float
    per_class: Array = field(repr=False)
    samples: int
    classes: int
    provenance: Provenance

    @property
    def ratio(self) -> float:
        """Off-diagonal ratio r: mean energy of the off-diagonal blocks over that of the diagonal ones."""
        return self.off_diagonal / self.diagonal / (self.classes - 1) if self.diagonal > 0 else float("nan")

    @property
    def diagonality(self) -> float:
        """Share of the energy in the diagonal blocks."""
        whole = self.diagonal + self.off_diagonal
        return self.diagonal / whole if whole > 0 else float("nan")

    def to_xarray(self) -> xr.Dataset:
        """Data set of the diagonal energies with dimension class, the rest as attributes; `from_xarray` reads it."""
        import xarray as xr

        return xr.Dataset(
            {"class_energy": ("class", self.per_class)},
            attrs={
                "record": "OutputLayerEnergies",
                "diagonal": self.diagonal,
                "off_diagonal": self.off_diagonal,
                "ratio": self.ratio,
                "diagonality": self.diagonality,
                "samples": self.samples,
                "classes": self.classes,
                **self.provenance.attributes(),
            },
        )

    @classmethod
    def from_xarray(cls, dataset: xr.Dataset) -> OutputLayerEnergies:
        """Inverse of `to_xarray`; other variables of the data set are ignored."""
        require_xarray_kind(dataset, "OutputLayerEnergies")
        return cls(
            diagonal=float(dataset.attrs["diagonal"]),
            off_diagonal=float(dataset.attrs["off_diagonal"]),
            per_class=dataset["class_energy"].to_numpy(),
            samples=int(dataset.attrs["samples"]),
            classes=int(dataset.attrs["classes"]),
            provenance=Provenance.from_attributes(dataset.attrs),
        )


def output_layer_energies(
    features: Tensor,
    logits: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    memory: int = DEFAULT_MEMORY,
    progress: Progress | None = None,
) -> OutputLayerEnergies:
    """Exact diagonal and off-diagonal energies over all class blocks of a softmax output layer, at any C.

    Args:
        features: [N, d] inputs h_n of the layer.
        logits: [N, C]; or instead
        weight: [C, d], with an optional bias [C]: logits are then computed tile by tile, and never held whole.
        memory: bytes to use beside the inputs.
        progress: called with (tiles done, tiles in all) after every tile; in all grows where the products are repeated
            in float64.

    Sums run in float64; matrix products in the inputs' dtype, and in float64 where float32 would cancel.

    Raises:
        InputError: shapes, dtypes or devices that do not fit, values that are not finite, neither or both of logits and
            weight.
        TooLargeError: `memory` is too small for one tile.
    """
    tiles = _Tiles.of(features, logits, weight, bias, memory)
    tell = progress or (lambda done, whole: None)
    whole = tiles.count
    diagonal, first, off = _energies(tiles, features.dtype, lambda done: tell(done, whole))
    if features.dtype != torch.float64 and off < CANCELLATION * first:
        diagonal, _, off = _energies(tiles, torch.float64, lambda done: tell(whole + done, 2 * whole))
    per_class = diagonal.cpu().numpy()
    return OutputLayerEnergies(
        diagonal=float(per_class.sum()),
        off_diagonal=off,
        per_class=per_class,
        samples=features.shape[0],
        classes=tiles.classes,
        provenance=Provenance(
            engine="closed form: output layer, all class blocks",
            dtype=str(features.dtype).removeprefix("torch."),
            device=str(features.device),
        ),
    )


def output_layer_blocks(
    features: Tensor,
    classes: Sequence[int],
    logits: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    memory: int = DEFAULT_MEMORY,
) -> Array:
    """Energies [k, k] of the blocks between the chosen classes; arguments and errors as in `output_layer_energies`.

    ||H_ij||^2 = (1/N^2) a^T K2 a with a_n = p_ni p_nj for i != j and a_n = p_ni (1 - p_ni) for i = j.
    """
    tiles = _Tiles.of(features, logits, weight, bias, memory)
    chosen = torch.as_tensor(list(classes), dtype=torch.long, device=features.device)
    if chosen.numel() == 0 or int(chosen.min()) < 0 or int(chosen.max()) >= tiles.classes:
        raise InputError(
            f"classes must be a non-empty list of numbers in [0, {tiles.classes}), got {list(classes)[:5]}"
        )
    normalizer = torch.cat([_log_sum_exp(tiles, rows) for rows in tiles.rows()])
    logp = tiles.logits(slice(0, features.shape[0]), chosen).double() - normalizer[:, None]
    p = logp.exp()
    gram = (features.double() @ features.double().T).square_()
    energies = torch.empty(len(chosen), len(chosen), dtype=torch.float64, device=features.device)
    for number in range(len(chosen)):
        weights = p * p[:, number : number + 1]
        weights[:, number] = p[:, number] * -torch.expm1(logp[:, number])
        energies[number] = ((gram @ weights) * weights).sum(dim=0)
    result: Array = (energies / features.shape[0] ** 2).cpu().numpy()
    return result


@dataclass(frozen=True, eq=False)
class _Tiles:
    """The layer's inputs and how its samples and classes are cut."""

    features: Tensor
    logits: Callable[[slice, slice | Tensor], Tensor]
    classes: int
    row_tile: int
    class_tile: int

    @classmethod
    def of(
        cls, features: Tensor, logits: Tensor | None, weight: Tensor | None, bias: Tensor | None, memory: int
    ) -> _Tiles:
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
        N = self.features.shape[0]
        return (slice(start, min(start + self.row_tile, N)) for start in range(0, N, self.row_tile))

    def class_slices(self) -> Iterator[slice]:
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
    """Rows and classes of a tile: 5 float64 matrices of rows x rows and 8 of rows x classes fit into `memory`."""
    rows, columns = N, min(C, MAX_CLASS_TILE)
    while 8 * (5 * rows * rows + 8 * rows * columns) > memory:
        if rows > 256 or (rows > 1 and columns <= 64):
            rows = -(-rows // 2)
        elif columns > 1:
            columns = -(-columns // 2)
        else:
            raise TooLargeError(
                f"memory = {human_bytes(memory)} is too small for one tile: it takes at least {human_bytes(8 * 13)}"
            )
    return rows, columns


def _log_sum_exp(tiles: _Tiles, rows: slice) -> Tensor:
    """Log-sum-exp [rows] of the logits, tile by tile; tiles are put together in float64."""
    total: Tensor | None = None
    for columns in tiles.class_slices():
        part = torch.logsumexp(tiles.logits(rows, columns), dim=1).double()
        total = part if total is None else torch.logaddexp(total, part)
    assert total is not None
    return total


def _energies(tiles: _Tiles, dtype: torch.dtype, progress: Callable[[int], None]) -> tuple[Tensor, float, float]:
    """Diagonal energies [C], the off-diagonal energy's first term, and the off-diagonal energy."""
    features, device = tiles.features, tiles.features.device
    N = features.shape[0]
    normalizer = torch.cat([_log_sum_exp(tiles, rows) for rows in tiles.rows()])
    diagonal = torch.zeros(tiles.classes, dtype=torch.float64, device=device)
    first, off, done = 0.0, 0.0, 0
    row_slices = list(tiles.rows())
    for number, upper in enumerate(row_slices):
        for lower in row_slices[number:]:
            twice = 1.0 if upper == lower else 2.0  # the pair (lower, upper) gives the same
            gram = (features[upper].double() @ features[lower].double().T).square_()
            same = torch.zeros_like(gram)
            squares = torch.zeros_like(gram)
            narrow = gram.to(dtype)
            for columns in tiles.class_slices():
                p, q = _probabilities(tiles, upper, columns, normalizer, dtype)
                p_, q_ = (p, q) if upper == lower else _probabilities(tiles, lower, columns, normalizer, dtype)
                diagonal[columns] += twice * ((narrow @ q_) * q).sum(dim=0, dtype=torch.float64)
                _add_product(same, p, p_)
                _add_product(squares, p.square_(), p_ if p_ is p else p_.square_())
                done += 1
                progress(done)
            if upper == lower:
                # Only the upper triangle has been summed: the rest would be the same.
                gram = gram.triu(1).mul_(2).diagonal_scatter(gram.diagonal())
            product = same.square_()
            first += twice * float((gram * product).sum())
            off += twice * float((gram * (product - squares)).sum())
    return diagonal / N**2, first / N**2, off / N**2


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b.T to `total` [n, m]; the upper triangle at least if a is b."""
    if a is not b:
        total += a @ b.T
        return
    step = -(-len(a) // STRIPS)
    for start in range(0, len(a), step):
        stop = start + step
        total[start:stop, start:] += a[start:stop] @ a[start:].T


def _probabilities(
    tiles: _Tiles, rows: slice, columns: slice, normalizer: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Softmax probabilities p and p (1 - p) of a tile."""
    logp = tiles.logits(rows, columns).to(dtype) - normalizer[rows, None].to(dtype)
    p = logp.exp()
    return p, p * -torch.expm1(logp)
