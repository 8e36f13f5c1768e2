"""How the top eigenspace of the whole Hessian, seen in one layer, relates to that layer's own ([W]; MATH.md, 5)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hesscope.core.checks import require_choice, require_positive_int
from hesscope.core.errors import InputError
from hesscope.core.records import Provenance, require_xarray_kind
from hesscope.estimate.eigenpairs import top_eigenpairs
from hesscope.layerwise.eigenstructure import CURVATURES
from hesscope.layerwise.layers import find_layer, layers_of
from hesscope.layerwise.overlap import overlap
from hesscope.objective import Objective
from hesscope.operators import GaussNewton, Hessian

if TYPE_CHECKING:
    import xarray as xr

Array = npt.NDArray[np.float64]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class FullHessianOverlap:
    """The k leading eigenvectors of the whole matrix, restricted to each of L layers and compared with its own.

    Attributes:
        layers: their names; sizes: [L] numbers of parameters; curvature: "hessian" or "gauss_newton".
        values: [k] leading eigenvalues of the whole matrix; own_values: [L, k] of the layers' (nan beyond a size).
        converged: whether all eigenpairs have.
        shares: [L, k] squared norm of each eigenvector inside the layer.
        dimensions: [L] k', the numerical rank of the restricted eigenvectors, at most k.
        overlap: [L] of their span with the layer's own k' leading eigenvectors; nan for k' = 0.
        captured: [L] share of the restricted eigenvectors' squared norm inside that own eigenspace. Unlike `overlap`,
            it counts each direction by how much of it is there.
        chance: [L] k' / P, of `overlap` and `captured`.
    """

    layers: tuple[str, ...]
    sizes: npt.NDArray[np.int64]
    curvature: str
    values: Array
    own_values: Array
    converged: bool
    shares: Array
    dimensions: npt.NDArray[np.int64]
    overlap: Array
    captured: Array
    provenance: Provenance

    @property
    def chance(self) -> Array:
        """Chance k' / P of every layer, [L]."""
        return np.asarray(self.dimensions / self.sizes)

    def to_xarray(self) -> xr.Dataset:
        """Labelled data set with dimensions layer and pair; `from_xarray` reads it back."""
        import xarray as xr

        return xr.Dataset(
            {
                "eigenvalue": ("pair", self.values),
                "own_eigenvalue": (("layer", "pair"), self.own_values),
                "share": (("layer", "pair"), self.shares),
                "size": ("layer", self.sizes),
                "dimension": ("layer", self.dimensions),
                "overlap": ("layer", self.overlap),
                "captured": ("layer", self.captured),
            },
            coords={"layer": np.asarray(self.layers, dtype=object)},
            attrs={
                "record": "FullHessianOverlap",
                "curvature": self.curvature,
                "converged": int(self.converged),
                **self.provenance.attributes(),
            },
        )

    @classmethod
    def from_xarray(cls, dataset: xr.Dataset) -> FullHessianOverlap:
        """Inverse of `to_xarray`.

        Raises:
            InputError: the data set was not made by `to_xarray`.
        """
        require_xarray_kind(dataset, "FullHessianOverlap")
        return cls(
            layers=tuple(str(name) for name in dataset["layer"].to_numpy()),
            sizes=dataset["size"].to_numpy(),
            curvature=str(dataset.attrs["curvature"]),
            values=dataset["eigenvalue"].to_numpy(),
            own_values=dataset["own_eigenvalue"].to_numpy(),
            converged=bool(dataset.attrs["converged"]),
            shares=dataset["share"].to_numpy(),
            dimensions=dataset["dimension"].to_numpy(),
            overlap=dataset["overlap"].to_numpy(),
            captured=dataset["captured"].to_numpy(),
            provenance=Provenance.from_attributes(dataset.attrs),
        )


@dataclass(frozen=True)
class RestrictedOverlap:
    """Of one layer: rank k' of the restricted vectors, overlap, and captured share; see restricted_overlap."""

    dimension: int
    overlap: float
    captured: float


def restricted_overlap(restricted: Any, own: Any, rounding: float) -> RestrictedOverlap:
    """Overlap of the span of restricted eigenvectors with the equally many leading eigenvectors of the layer itself.

    Restricted unit vectors are neither orthogonal nor of any length. Their span is taken from the singular value
    decomposition without the directions whose singular value is at most `rounding`, the error of the eigenvectors: what
    is smaller is noise. The k' directions that are left are compared with the first k' columns of `own`.

    Args:
        restricted: [P, k] rows of orthonormal eigenvectors; own: [P, at least min(k, P)] orthonormal columns.
        rounding: in units of a unit vector.
    """
    rows, basis = (torch.as_tensor(matrix).detach().cpu().double() for matrix in (restricted, own))
    U, sigma, _ = torch.linalg.svd(rows, full_matrices=False)
    dimension = int((sigma > rounding).sum())
    if dimension == 0:
        return RestrictedOverlap(0, float("nan"), float("nan"))
    leading = torch.linalg.qr(basis[:, :dimension]).Q  # orthonormal also if they were so in single precision only
    kept = (leading.T @ rows).square().sum() / rows.square().sum()
    return RestrictedOverlap(dimension, overlap(U[:, :dimension], leading), float(kept))


def full_hessian_overlap(
    objective: Objective,
    k: int,
    layers: Sequence[str] | None = None,
    curvature: str = "hessian",
    seed: int = 0,
    progress: Progress | None = None,
) -> FullHessianOverlap:
    """Overlap of the whole Hessian's top eigenspace with each layer's own.

    Args:
        objective: the function of the parameters.
        k: number of eigenpairs of the whole matrix, and of each layer's that has so many.
        layers: names of modules (see find_layer), all layers unless told.
        curvature: "hessian" or "gauss_newton".
        seed: root of the random streams.
        progress: called with (done, planned) in thousandths, the whole matrix counting as much as all layers.

    Raises:
        InputError: no such layer, none, one twice, or a k beyond the number of parameters. As top_eigenpairs.

    Source: [W], arXiv:2010.04261; MATH.md, section 5. How directions are dropped: see restricted_overlap, with the
    relative residual that eigenpairs were asked for as the rounding.
    """
    require_choice("curvature", curvature, CURVATURES)
    space = objective.parameters
    require_positive_int("k", k)
    if k > space.size:
        raise InputError(f"k must be at most the number of parameters P = {space.size}, got {k}")
    chosen = layers_of(objective) if layers is None else [find_layer(objective, name) for name in layers]
    if not chosen or len({layer.name for layer in chosen}) < len(chosen):
        raise InputError(f"layers must be different names, at least one, got {[layer.name for layer in chosen]}")
    whole = Hessian(objective) if curvature == "hessian" else GaussNewton(objective)
    found = top_eigenpairs(whole, k, seed=seed, progress=_part(progress, 0.0, 0.5))
    own_values = np.full((len(chosen), k), np.nan)
    shares, results, converged = np.empty((len(chosen), k)), [], bool(found.converged.all())
    for number, layer in enumerate(chosen):
        positions = torch.cat([_positions(space.slice(name)) for name in layer.parameters])
        restricted = found.vectors[positions.to(found.vectors.device)]
        start = 0.5 + 0.5 * number / len(chosen)
        own = top_eigenpairs(
            CURVATURES[curvature](objective, layer.name),
            min(k, layer.size),
            seed=seed,
            progress=_part(progress, start, 0.5 / len(chosen)),
        )
        if progress is not None:
            progress(500 + 500 * (number + 1) // len(chosen), 1000)
        own_values[number, : len(own.values)] = own.values
        shares[number] = restricted.double().square().sum(dim=0).cpu().numpy()
        results.append(restricted_overlap(restricted, own.vectors, found.tolerance))
        converged = converged and bool(own.converged.all())
    return FullHessianOverlap(
        layers=tuple(layer.name for layer in chosen),
        sizes=np.array([layer.size for layer in chosen], dtype=np.int64),
        curvature=curvature,
        values=found.values,
        own_values=own_values,
        converged=converged,
        shares=shares,
        dimensions=np.array([result.dimension for result in results], dtype=np.int64),
        overlap=np.array([result.overlap for result in results]),
        captured=np.array([result.captured for result in results]),
        provenance=Provenance(
            engine=f"full Hessian overlap: {found.provenance.engine}",
            dtype=found.provenance.dtype,
            device=found.provenance.device,
            data_fingerprint=objective.data_fingerprint,
            seed=seed,
        ),
    )


def _positions(where: slice) -> Tensor:
    return torch.arange(where.start, where.stop)


def _part(progress: Progress | None, start: float, length: float) -> Progress | None:
    if progress is None:
        return None
    return lambda done, planned: progress(round(1000 * (start + length * min(1.0, done / max(planned, 1)))), 1000)
