"""All C^2 class blocks of a softmax output layer at once, for any C: energies without forming a block.

The Hessian of the mean cross-entropy of logits V h_n with respect to V has the blocks
H_ij = (1/N) sum_n (delta_ij p_ni - p_ni p_nj) h_n h_n^T. With K2_nm = (h_n . h_m)^2 and q = p (1 - p), by MATH.md,
section 3:

    ||H_ii||^2             = (1/N^2) q_i^T K2 q_i
    sum_{i != j} ||H_ij||^2 = (1/N^2) sum_nm K2_nm [ (p_n . p_m)^2 - sum_i p_ni^2 p_mi^2 ]

The second is used as it stands, but for the largest probabilities (see `_energies`): total minus diagonal would cancel
at large C. Work O(N^2 (C + d)), with classes and samples in tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hesscope.core.errors import InputError
from hesscope.core.records import Provenance, require_xarray_kind
from hesscope.operators.closed_form.class_tiles import ClassTiles, Softmax

if TYPE_CHECKING:
    import xarray as xr

DEFAULT_MEMORY = 2**30
# A symmetric product is made in so many strips, each from its diagonal on: 5/8 of the work.
STRIPS = 4

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
        progress: called with (tiles done, tiles in all) after every tile.

    Matrix products run in the inputs' dtype, sums of them in float64; certain predictions cost no digits.

    Raises:
        InputError: shapes, dtypes or devices that do not fit, values that are not finite, neither or both of logits and
            weight.
        TooLargeError: `memory` is too small for one tile.
    """
    tiles = ClassTiles.of(features, logits, weight, bias, memory)
    tell = progress or (lambda done, whole: None)
    whole = tiles.count
    diagonal, off = _energies(tiles, features.dtype, lambda done: tell(done, whole))
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
    tiles = ClassTiles.of(features, logits, weight, bias, memory)
    chosen = torch.as_tensor(list(classes), dtype=torch.long, device=features.device)
    if chosen.numel() == 0 or int(chosen.min()) < 0 or int(chosen.max()) >= tiles.classes:
        raise InputError(
            f"classes must be a non-empty list of numbers in [0, {tiles.classes}), got {list(classes)[:5]}"
        )
    p, other = Softmax.of(tiles, torch.float64).of_classes(slice(0, features.shape[0]), chosen)
    gram = (features.double() @ features.double().T).square_()
    energies = torch.empty(len(chosen), len(chosen), dtype=torch.float64, device=features.device)
    for number in range(len(chosen)):
        weights = p * p[:, number : number + 1]
        weights[:, number] = p[:, number] * other[:, number]
        energies[number] = ((gram @ weights) * weights).sum(dim=0)
    result: Array = (energies / features.shape[0] ** 2).cpu().numpy()
    return result


def _energies(tiles: ClassTiles, dtype: torch.dtype, progress: Callable[[int], None]) -> tuple[Tensor, float]:
    """Diagonal energies [C] and the off-diagonal energy.

    Of (p . p')^2 - sum_i p_i^2 p'_i^2 the terms with the top classes t of p and t' of p' are written out: with
    a = p_t p'_t, b = p_t' p'_t' (0 if t = t') and the rest s = sum_{i != t, t'} p_i p'_i it is
    2 (a b + (a + b) s) + s^2 - sum_{i != t, t'} p_i^2 p'_i^2, in which no certain prediction cancels.
    """
    features, device = tiles.features, tiles.features.device
    N = features.shape[0]
    softmax = Softmax.of(tiles, dtype)
    diagonal = torch.zeros(tiles.classes, dtype=torch.float64, device=device)
    off, done = 0.0, 0
    row_slices = list(tiles.rows())
    for number, upper in enumerate(row_slices):
        for lower in row_slices[number:]:
            twice = 1.0 if upper == lower else 2.0  # the pair (lower, upper) gives the same
            gram = (features[upper].double() @ features[lower].double().T).square_()
            rest = torch.zeros_like(gram)
            squares = torch.zeros_like(gram)
            narrow = gram.to(dtype)
            for columns in tiles.class_slices():
                p, q = softmax.probabilities(upper, columns)
                p_, q_ = (p, q) if upper == lower else softmax.probabilities(lower, columns)
                diagonal[columns] += twice * ((narrow @ q_) * q).sum(dim=0, dtype=torch.float64)
                _add_product(rest, p, p_)
                _add_product(squares, p.square_(), p_ if p_ is p else p_.square_())
                done += 1
                progress(done)
            if upper == lower:
                # Only the upper triangle has been summed: the rest would be the same.
                gram = gram.triu(1).mul_(2).diagonal_scatter(gram.diagonal())
            tops = _top_products(softmax, upper, lower)
            off += twice * float((gram * (tops[0] * rest).mul_(2).add_(tops[1], alpha=2)).sum())
            off += twice * float((gram * (rest.square_() - squares)).sum())
    return diagonal / N**2, off / N**2


def _top_products(softmax: Softmax, upper: slice, lower: slice) -> tuple[Tensor, Tensor]:
    """A + b and a b of `_energies` for all pairs of rows, [upper, lower]."""
    same = softmax.top[upper, None] == softmax.top[lower]
    a = softmax.of_classes(lower, softmax.top[upper])[0].T * softmax.certainty(upper)[:, None]
    b = softmax.of_classes(upper, softmax.top[lower])[0] * softmax.certainty(lower)
    b.masked_fill_(same, 0.0)
    return a + b, a.mul_(b)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b.T to `total` [n, m]; the upper triangle at least if a is b."""
    if a is not b:
        total += a @ b.T
        return
    step = -(-len(a) // STRIPS)
    for start in range(0, len(a), step):
        stop = start + step
        total[start:stop, start:] += a[start:stop] @ a[start:].T
