"""How near a layer's top eigenvectors, as matrices, are to rank one, and to u E[x]^T ([W]; MATH.md, section 5)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from hesscope.core.errors import DataError, InputError
from hesscope.core.records import Provenance, require_xarray_kind
from hesscope.estimate.lanczos import power_of_two
from hesscope.layerwise.eigenstructure import Eigenstructure
from hesscope.layerwise.factors import KroneckerFactors
from hesscope.layerwise.kronecker_pairs import factor_eigenpairs

if TYPE_CHECKING:
    import xarray as xr

Array = npt.NDArray[np.float64]

# Singular-value shares that are kept of every eigenvector: the figures show the first few.
MOST_SHARES = 16


@dataclass(frozen=True, eq=False)
class LayerLowRank:
    """The k leading eigenvectors of a layer's Hessian as matrices, and what explains that they are nearly u E[x]^T.

    Of unit vectors in n dimensions, a random one has a squared cosine of 1 / n with E[x] on average. With a bias, the
    input has a last entry of 1, so that E[x] is not zero even where the features are centered.

    Attributes:
        layer: its name; shape: (outputs, inputs).
        values: [k] eigenvalues of the Hessian.
        shares: [k, r] squared singular values of the matricized eigenvectors, divided by their sum, descending; r is
            the smaller dimension, at most 16.
        right_alignment: [k] squared cosine of the leading right singular vector with E[x]; nan where E[x] = 0.
        input_alignment: squared cosine of the top eigenvector of E[xx^T] with E[x].
        input_ratio: lambda_1 / lambda_2 of E[xx^T]; inf where there is no second one.
        mean_share: |E[x]|^2 / E|x|^2, the share of E[xx^T]'s trace that centering would remove.
    """

    layer: str
    shape: tuple[int, int]
    values: Array
    shares: Array = field(repr=False)
    right_alignment: Array
    input_alignment: float
    input_ratio: float
    mean_share: float
    provenance: Provenance

    def to_xarray(self) -> xr.Dataset:
        """Labelled data set with dimensions pair and singular_value; `from_xarray` reads it back."""
        import xarray as xr

        attributes = {name: getattr(self, name) for name in ("layer", *OF_INPUT)}
        attributes |= {"outputs": self.shape[0], "inputs": self.shape[1]}
        return xr.Dataset(
            {
                "eigenvalue": ("pair", self.values),
                "share": (("pair", "singular_value"), self.shares),
                "right_alignment": ("pair", self.right_alignment),
            },
            attrs={"record": "LayerLowRank", **attributes, **self.provenance.attributes()},
        )

    @classmethod
    def from_xarray(cls, dataset: xr.Dataset) -> LayerLowRank:
        """Inverse of `to_xarray`.

        Raises:
            InputError: the data set was not made by `to_xarray`.
        """
        require_xarray_kind(dataset, "LayerLowRank")
        given = dataset.attrs
        return cls(
            layer=str(given["layer"]),
            shape=(int(given["outputs"]), int(given["inputs"])),
            values=dataset["eigenvalue"].to_numpy(),
            shares=dataset["share"].to_numpy(),
            right_alignment=dataset["right_alignment"].to_numpy(),
            **{name: float(given[name]) for name in OF_INPUT},
            provenance=Provenance.from_attributes(given),
        )


OF_INPUT = ("input_alignment", "input_ratio", "mean_share")


def rank_one_energy(v: Any, shape: tuple[int, int]) -> float:
    """sigma_1^2 / sum_i sigma_i^2 of a vector that is matricized to `shape`: 1 for rank one, at least 1 / min(shape).

    Args:
        v: tensor or array of out * in entries, row by row; its scale does not matter.
        shape: (out, in).

    Raises:
        InputError: the entries do not fill the shape, or are all zero. DataError: one is not finite.

    Source: [W], arXiv:2010.04261; MATH.md, section 5.
    """
    array = np.asarray(v.detach().cpu().numpy() if isinstance(v, Tensor) else v, dtype=np.float64)
    if len(shape) != 2 or min(shape) < 1 or array.size != shape[0] * shape[1]:
        raise InputError(f"v has {array.size} entries, which do not fill the shape {tuple(shape)}")
    if not np.isfinite(array).all():
        raise DataError("v is not finite: look for nan or overflow where it was made")
    if not array.any():
        raise InputError("v is zero: it has no singular value to compare")
    return float(_singular(array.reshape(1, *shape))[0][0, 0])


def layer_low_rank(structure: Eigenstructure, factors: KroneckerFactors) -> LayerLowRank:
    """Singular-value shares of a layer's top eigenvectors, and their alignment with the mean input.

    Args:
        structure: eigenpairs of the layer's Hessian; factors: of the same layer.

    Raises:
        InputError: factors of a layer with another name or shape.
    """
    if (factors.layer, factors.shape) != (structure.layer, structure.shape):
        raise InputError(
            f"factors must be those of layer {structure.layer!r} with shape {structure.shape}, got {factors.layer!r} "
            f"with shape {factors.shape}"
        )
    shares, right = _singular(structure.vectors.astype(np.float64))
    values, vectors = factor_eigenpairs("input", factors.input)
    mean = np.asarray(factors.input_mean, dtype=np.float64)
    mean = mean / power_of_two(float(np.abs(mean).max()))
    trace, squared = float(values.sum()), float((factors.input_mean.astype(np.float64) ** 2).sum())
    return LayerLowRank(
        layer=structure.layer,
        shape=structure.shape,
        values=structure.values,
        shares=shares[:, :MOST_SHARES],
        right_alignment=_cos_squared(right, mean),
        input_alignment=float(_cos_squared(vectors[:, 0], mean)),
        input_ratio=float(values[0] / values[1]) if len(values) > 1 and values[1] > 0 else float("inf"),
        mean_share=squared / trace if trace > 0 else float("nan"),
        provenance=structure.provenance,
    )


def _singular(matrices: Array) -> tuple[Array, Array]:
    """Shares [k, r] of the squared singular values, descending, and leading right singular vectors [k, in].

    From the smaller Gram matrices: shares are squares, so that nothing above rounding is lost.
    """
    unit = matrices / np.abs(matrices).max(axis=(1, 2), keepdims=True)
    unit /= np.linalg.norm(unit, axis=(1, 2), keepdims=True)
    is_wide = unit.shape[1] <= unit.shape[2]
    squares, vectors = np.linalg.eigh(unit @ unit.swapaxes(1, 2) if is_wide else unit.swapaxes(1, 2) @ unit)
    leading = vectors[:, :, -1:]
    right = (unit.swapaxes(1, 2) @ leading if is_wide else leading)[:, :, 0]
    squares = np.maximum(squares[:, ::-1], 0.0)
    return squares / squares.sum(axis=1, keepdims=True), right / np.linalg.norm(right, axis=1, keepdims=True)


def _cos_squared(unit: Array, other: Array) -> Array:
    """Squared cosines of unit vectors [..., n] with another vector [n]; nan if that is zero."""
    length = float(other @ other)
    return np.asarray((unit @ other) ** 2 / length if length > 0 else np.full(unit.shape[:-1], np.nan))
