"""Snapshot: what was measured of the Hessian at one step of training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hesscope.core.errors import InputError
from hesscope.core.records import Provenance, require_xarray_kind
from hesscope.estimate.density import SpectralDensity
from hesscope.estimate.energies import BlockEnergies, SplitEnergies
from hesscope.estimate.estimate import Estimate

if TYPE_CHECKING:
    import xarray as xr

Array = npt.NDArray[np.float64]
UNKNOWN = float("nan")


@dataclass(frozen=True, eq=False)
class EndEigenvalues:
    """Eigenvalues at both ends of the Hessian's spectrum, and how gradient and training go with the top eigenspace.

    Attributes:
        largest, largest_residuals: [k], descending, and the norms ||H v - lambda v||.
        smallest, smallest_residuals: [j], descending: the last one is the most negative.
        gradient_share: ||V^T g||^2 / ||g||^2 of the gradient g and the k top eigenvectors V, in [0, 1]; nan if g = 0.
        alignment: ||V^T V'||_F^2 / k with the top eigenvectors V' at the step `aligned_with`, in [0, 1]; nan and -1 if
            there are none.
        products: with the Hessian; converged: whether all residuals are within the tolerance.
        overlooked: bound on the probability that a further copy of an eigenvalue belongs among these.
    """

    largest: Array
    largest_residuals: Array
    smallest: Array
    smallest_residuals: Array
    gradient_share: float
    alignment: float
    aligned_with: int
    products: int
    converged: bool
    overlooked: float = 0.0

    def to_xarray(self) -> xr.Dataset:
        """Data set with dimensions top and bottom; `from_xarray` reads it back."""
        import xarray as xr

        return xr.Dataset(
            {
                "largest": ("top", self.largest),
                "largest_residual": ("top", self.largest_residuals),
                "smallest": ("bottom", self.smallest),
                "smallest_residual": ("bottom", self.smallest_residuals),
                "gradient_share": ((), self.gradient_share),
                "alignment": ((), self.alignment),
            },
            attrs={
                "record": "EndEigenvalues",
                "aligned_with": self.aligned_with,
                "products": self.products,
                "converged": int(self.converged),
                "overlooked": self.overlooked,
            },
        )

    @classmethod
    def from_xarray(cls, dataset: xr.Dataset) -> EndEigenvalues:
        """Inverse of `to_xarray`."""
        require_xarray_kind(dataset, "EndEigenvalues")
        return cls(
            largest=dataset["largest"].to_numpy(),
            largest_residuals=dataset["largest_residual"].to_numpy(),
            smallest=dataset["smallest"].to_numpy(),
            smallest_residuals=dataset["smallest_residual"].to_numpy(),
            gradient_share=float(dataset["gradient_share"]),
            alignment=float(dataset["alignment"]),
            aligned_with=int(dataset.attrs["aligned_with"]),
            products=int(dataset.attrs["products"]),
            converged=bool(dataset.attrs["converged"]),
            overlooked=float(dataset.attrs["overlooked"]),
        )


@dataclass(frozen=True, eq=False)
class HeatMap:
    """A picture of |H|: the root mean square over squares of entries, parameters in their flat order.

    Attributes:
        values: [n, n] float32, in the units of H.
        parameters: P; tensors, sizes: names and numbers of entries of the parameter tensors, in their order.
    """

    values: npt.NDArray[np.float32] = field(repr=False)
    parameters: int
    tensors: tuple[str, ...]
    sizes: tuple[int, ...]

    def to_xarray(self) -> xr.Dataset:
        """Data set with dimensions row, column and tensor; `from_xarray` reads it back."""
        import xarray as xr

        return xr.Dataset(
            {"magnitude": (("row", "column"), self.values), "tensor_size": ("tensor", np.asarray(self.sizes))},
            coords={"tensor": np.asarray(self.tensors, dtype=object)},
            attrs={"record": "HeatMap", "parameters": self.parameters},
        )

    @classmethod
    def from_xarray(cls, dataset: xr.Dataset) -> HeatMap:
        """Inverse of `to_xarray`."""
        require_xarray_kind(dataset, "HeatMap")
        return cls(
            values=dataset["magnitude"].to_numpy(),
            parameters=int(dataset.attrs["parameters"]),
            tensors=tuple(str(name) for name in dataset["tensor"].to_numpy()),
            sizes=tuple(int(size) for size in dataset["tensor_size"].to_numpy()),
        )


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The structure of the Hessian at one step of training. What was not asked for is None.

    Attributes:
        step: number of updates done before, 0 for initialization.
        value: L; gradient_norm: ||grad L||, both on the objective's data.
        mean_squared_residual: (1/N) sum_n ||e_n||^2, e_n = dl_n/do (MATH.md, section 1); nan for a loss callable.
        accuracy: share of the class labels that the largest output hits; nan where there are none.
        learning_rate: of the step to come; nan if not told.
        stability_limit: largest sharpness at which gradient descent with this optimizer is stable on a quadratic; nan
            if not known (see hesscope.dynamics.optimizers).
        layers: [B] the layer that each block lies in; empty without energies.
        energies: of H and, where the loss has them, of its parts G and R.
        eigenvalues, trace, density, heterogeneity: of H; the last one is the mean Jensen-Shannon distance between the
            spectra of its diagonal blocks.
        heatmap: a picture of |H|.
        seconds: what each measure took; training_seconds: time outside of the tracker since its first call.
        provenance: dtype, device, data and seed.
    """

    step: int
    value: float
    gradient_norm: float
    mean_squared_residual: float
    accuracy: float
    learning_rate: float
    stability_limit: float
    layers: tuple[str, ...]
    energies: SplitEnergies | None = field(repr=False)
    eigenvalues: EndEigenvalues | None = field(repr=False)
    trace: Estimate | None = field(repr=False)
    density: SpectralDensity | None = field(repr=False)
    heterogeneity: Estimate | None = field(repr=False)
    heatmap: HeatMap | None = field(repr=False)
    seconds: Mapping[str, float] = field(repr=False)
    training_seconds: float
    provenance: Provenance

    @property
    def sharpness(self) -> float:
        """Largest eigenvalue of H; nan if not measured."""
        return UNKNOWN if self.eigenvalues is None else float(self.eigenvalues.largest[0])

    @property
    def sharpness_times_learning_rate(self) -> float:
        """Gradient descent on a quadratic is stable up to 2; nan if either is unknown."""
        return self.sharpness * self.learning_rate

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the matrices whose energies there are: H, and G and R unless the loss is a callable."""
        return () if self.energies is None else tuple(self.energies.parts)

    def block_energies(self, part: str = "H") -> BlockEnergies:
        """Energies of one of the matrices H, G, R.

        Raises:
            InputError: they were not measured.
        """
        if self.energies is None or part not in self.energies.parts:
            raise InputError(f"step {self.step} has no energies of {part!r}; it has {', '.join(self.parts) or 'none'}")
        return self.energies.parts[part]

    def layer_energies(self, part: str = "H") -> BlockEnergies:
        """Energies between whole layers: the blocks of each layer added up; raises as `block_energies`."""
        energies = self.block_energies(part)
        groups: dict[str, list[str]] = {}
        for label, layer in zip(energies.labels, self.layers, strict=True):
            groups.setdefault(layer, []).append(label)
        return energies.aggregate(groups)

    def diagonality(self, part: str = "H") -> float:
        """Share of the energy in the diagonal blocks, in [0, 1]; nan for a zero matrix."""
        return self.block_energies(part).diagonality

    def cross_layer_share(self, part: str = "H") -> float:
        """Share of the energy that lies between different layers, in [0, 1]; nan for a zero matrix."""
        energies = self.layer_energies(part)
        off = float(np.where(np.eye(len(energies.labels), dtype=bool), 0.0, energies.values).sum())
        return off / energies.total if energies.total > 0 else UNKNOWN

    def residual_share(self, first: str, second: str) -> float:
        """||R||^2 / (||G||^2 + ||R||^2) of the block of two layers (or of one with itself), in [0, 1]; nan for 0 / 0.

        Raises:
            InputError: no energies of G and R, or an unknown layer.
        """
        gauss_newton, residual = (pair_energy(self.layer_energies(part), first, second) for part in ("G", "R"))
        whole = gauss_newton + residual
        return residual / whole if whole > 0 else UNKNOWN

    def within_layer(self, layer: str, part: str = "H") -> tuple[str, ...]:
        """Labels of the blocks of a layer; raises InputError for an unknown one."""
        energies = self.block_energies(part)
        labels = tuple(label for label, own in zip(energies.labels, self.layers, strict=True) if own == layer)
        if not labels:
            raise InputError(f"no layer is named {layer!r}; the layers are {', '.join(dict.fromkeys(self.layers))}")
        return labels

    def off_diagonal_ratio(self, layer: str, part: str = "H") -> float:
        """The ratio r (MATH.md, section 1) of a layer's blocks; nan for less than two blocks, or of unequal sizes."""
        energies, labels = self.block_energies(part), self.within_layer(layer, part)
        sizes = {energies.sizes[energies.labels.index(label)] for label in labels}
        return energies.off_diagonal_ratio(labels) if len(labels) > 1 and len(sizes) == 1 else UNKNOWN

    def layer_diagonality(self, layer: str, part: str = "H") -> float:
        """Share of the energy within a layer that lies in its diagonal blocks; nan if that is zero."""
        energies, labels = self.block_energies(part), self.within_layer(layer, part)
        chosen = [energies.labels.index(label) for label in labels]
        values = energies.values[np.ix_(chosen, chosen)]
        return float(np.trace(values) / values.sum()) if values.sum() > 0 else UNKNOWN

    def to_xarray(self) -> xr.DataTree:
        """Tree of data sets: scalars in the root, one branch a measure; `from_xarray` reads it back."""
        import xarray as xr

        scalars = {name: getattr(self, name) for name in SCALARS}
        root = xr.Dataset(
            {name: ((), value) for name, value in scalars.items()},
            attrs={"record": "Snapshot", "step": self.step, **self.provenance.attributes()},
        )
        root["seconds"] = ("measure", np.asarray(list(self.seconds.values()), dtype=np.float64))
        root = root.assign_coords(measure=np.asarray(list(self.seconds), dtype=object))
        branches = {name: record.to_xarray() for name in BRANCHES if (record := getattr(self, name)) is not None}
        if "energies" in branches:
            branches["energies"]["layer"] = ("row_block", np.asarray(self.layers, dtype=object))
        return xr.DataTree.from_dict({"/": root, **branches})

    @classmethod
    def from_xarray(cls, tree: xr.DataTree) -> Snapshot:
        """Inverse of `to_xarray`."""
        root = tree.to_dataset()
        require_xarray_kind(root, "Snapshot")
        seconds = zip(map(str, root["measure"].to_numpy()), map(float, root["seconds"].to_numpy()), strict=True)
        fields: dict[str, Any] = {name: float(root[name]) for name in SCALARS}
        for name, kind in BRANCHES.items():
            fields[name] = kind.from_xarray(tree[name].to_dataset()) if name in tree else None
        layers = tree["energies"]["layer"].to_numpy() if "energies" in tree else ()
        return cls(
            step=int(root.attrs["step"]),
            layers=tuple(str(layer) for layer in layers),
            seconds=dict(seconds),
            provenance=Provenance.from_attributes(root.attrs),
            **fields,
        )


# Numbers in the root of a file; and measures with the record each is.
SCALARS = (
    "value",
    "gradient_norm",
    "mean_squared_residual",
    "accuracy",
    "learning_rate",
    "stability_limit",
    "training_seconds",
)
BRANCHES: dict[str, Any] = {
    "energies": SplitEnergies,
    "eigenvalues": EndEigenvalues,
    "trace": Estimate,
    "density": SpectralDensity,
    "heterogeneity": Estimate,
    "heatmap": HeatMap,
}


def pair_energy(layers: BlockEnergies, first: str, second: str) -> float:
    """Energy of the block of two layers, one triangle only."""
    for name in (first, second):
        if name not in layers.labels:
            raise InputError(f"no layer is named {name!r}; the layers are {', '.join(layers.labels)}")
    return float(layers.values[layers.labels.index(first), layers.labels.index(second)])
