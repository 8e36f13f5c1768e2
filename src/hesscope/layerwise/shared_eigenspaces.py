"""Do models share the top eigenspaces of a layer, and does the decoupling explain it ([W]; MATH.md, section 5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from hesscope.core.checks import require_positive_int
from hesscope.core.errors import InputError
from hesscope.core.records import Provenance, require_xarray_kind
from hesscope.estimate.diagonality import jackknife_stderr
from hesscope.layerwise.eigenstructure import Eigenstructure
from hesscope.layerwise.overlap import leading_overlaps

if TYPE_CHECKING:
    import xarray as xr

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class SharedAt:
    """What SharedEigenspaces say at one dimension k.

    Attributes:
        mean, stderr: overlap over pairs of models; predicted: mean overlap of the Kronecker approximations.
        chance: k / P; ratio: mean / chance.
    """

    k: int
    mean: float
    stderr: float
    predicted: float
    chance: float

    @property
    def ratio(self) -> float:
        """Mean / chance."""
        return self.mean / self.chance


@dataclass(frozen=True, eq=False)
class SharedEigenspaces:
    """Overlaps of the top eigenspaces of one layer between models, or between times of one model's training.

    Attributes:
        labels: of the M models; layers: names of their layers, which have one shape = (outputs, inputs).
        first, second: [pairs] positions of the models that are compared, every pair once.
        curves: [pairs, k] overlaps of the Hessians' leading eigenspaces of dimension 1 ... k.
        predicted: [pairs, k] the same of the Kronecker approximations: what the decoupling explains.
        mean, std: [k] of the curves over pairs (std: nan for a single pair); predicted_mean: [k].
        stderr: [k] of the mean over models drawn at random: a jackknife that leaves out one model, since pairs that
            share a model are not independent. It is on the large side: twice the true one for three independent models,
            1.5 times for ten. nan for fewer than three models, and meaningless for times of one.
        chance: [k] k / P, the mean overlap of random subspaces.
    """

    labels: tuple[str, ...]
    layers: tuple[str, ...]
    shape: tuple[int, int]
    first: npt.NDArray[np.int64] = field(repr=False)
    second: npt.NDArray[np.int64] = field(repr=False)
    curves: Array = field(repr=False)
    predicted: Array = field(repr=False)
    stderr: Array = field(repr=False)
    provenance: Provenance

    @property
    def mean(self) -> Array:
        """Mean overlap [k] over pairs."""
        return np.asarray(self.curves.mean(axis=0))

    @property
    def std(self) -> Array:
        """Standard deviation [k] over pairs."""
        pairs, k = self.curves.shape
        return np.asarray(self.curves.std(axis=0, ddof=1)) if pairs > 1 else np.full(k, np.nan)

    @property
    def predicted_mean(self) -> Array:
        """Mean predicted overlap [k]."""
        return np.asarray(self.predicted.mean(axis=0))

    @property
    def chance(self) -> Array:
        """Chance k / P, [k]."""
        return np.arange(1, self.curves.shape[1] + 1) / (self.shape[0] * self.shape[1])

    @property
    def width(self) -> int:
        """Outputs of the layer: [W] sees the curve peak near k = width."""
        return self.shape[0]

    @property
    def peak(self) -> SharedAt:
        """At the k of the largest mean overlap."""
        return self.at(int(np.argmax(self.mean)) + 1)

    @property
    def at_width(self) -> SharedAt | None:
        """At k = width; None where fewer eigenpairs were compared."""
        return self.at(self.width) if self.width <= self.curves.shape[1] else None

    def at(self, k: int) -> SharedAt:
        """At the dimension k.

        Raises:
            InputError: a k that was not compared.
        """
        place = self._place(k)
        return SharedAt(
            k=k,
            mean=float(self.mean[place]),
            stderr=float(self.stderr[place]),
            predicted=float(self.predicted_mean[place]),
            chance=float(self.chance[place]),
        )

    def matrix(self, k: int, predicted: bool = False) -> Array:
        """Overlaps [M, M] of all pairs at the dimension k, 1 on the diagonal; or those predicted.

        Raises:
            InputError: a k that was not compared.
        """
        place = self._place(k)
        found = np.eye(len(self.labels))
        values = (self.predicted if predicted else self.curves)[:, place]
        found[self.first, self.second] = found[self.second, self.first] = values
        return found

    def _place(self, k: int) -> int:
        require_positive_int("k", k)
        if k > self.curves.shape[1]:
            raise InputError(f"k must be at most the {self.curves.shape[1]} dimensions that were compared, got {k}")
        return k - 1

    def to_xarray(self) -> xr.Dataset:
        """Labelled data set with dimensions comparison, dimension and model; `from_xarray` reads it back."""
        import xarray as xr

        return xr.Dataset(
            {
                "overlap": (("comparison", "dimension"), self.curves),
                "predicted": (("comparison", "dimension"), self.predicted),
                "stderr": ("dimension", self.stderr),
                "first": ("comparison", self.first),
                "second": ("comparison", self.second),
                "layer": ("model", np.asarray(self.layers, dtype=object)),
            },
            coords={
                "model": np.asarray(self.labels, dtype=object),
                "dimension": np.arange(1, self.curves.shape[1] + 1),
            },
            attrs={
                "record": "SharedEigenspaces",
                "outputs": self.shape[0],
                "inputs": self.shape[1],
                **self.provenance.attributes(),
            },
        )

    @classmethod
    def from_xarray(cls, dataset: xr.Dataset) -> SharedEigenspaces:
        """Inverse of `to_xarray`.

        Raises:
            InputError: the data set was not made by `to_xarray`.
        """
        require_xarray_kind(dataset, "SharedEigenspaces")
        return cls(
            labels=tuple(str(label) for label in dataset["model"].to_numpy()),
            layers=tuple(str(name) for name in dataset["layer"].to_numpy()),
            shape=(int(dataset.attrs["outputs"]), int(dataset.attrs["inputs"])),
            first=dataset["first"].to_numpy(),
            second=dataset["second"].to_numpy(),
            curves=dataset["overlap"].to_numpy(),
            predicted=dataset["predicted"].to_numpy(),
            stderr=dataset["stderr"].to_numpy(),
            provenance=Provenance.from_attributes(dataset.attrs),
        )


def shared_eigenspaces(
    structures: Sequence[Eigenstructure], labels: Sequence[str] | None = None, k: int | None = None
) -> SharedEigenspaces:
    """Overlaps of a layer's top eigenspaces between every two of several models, beside prediction and chance.

    The models may be independently trained ones, checkpoints of one in their order, or different architectures: only
    the layers' shapes must agree, not their names. The prediction is the overlap of the top eigenspaces of the two
    Kronecker approximations, sum (u_a . u'_c)^2 (v_b . v'_d)^2 / k, from the factors alone.

    Args:
        structures: of two or more models.
        labels: of the models, "0", "1", ... unless told.
        k: largest dimension, all that every structure has unless told.

    Raises:
        InputError: fewer than two, layers of different shapes, k beyond what a structure has or beyond P, labels that
            do not fit or are not different.

    Source: [W], arXiv:2010.04261; MATH.md, section 5.
    """
    if len(structures) < 2:
        raise InputError(f"shared eigenspaces need at least two models, got {len(structures)}")
    names = [str(number) for number in range(len(structures))] if labels is None else [str(label) for label in labels]
    if len(names) != len(structures) or len(set(names)) < len(names):
        raise InputError(f"labels must be {len(structures)} different names, got {', '.join(map(repr, names))}")
    shape = structures[0].shape
    for label, structure in zip(names, structures, strict=True):
        if structure.shape != shape:
            raise InputError(
                f"only layers of one shape can be compared: {structures[0].layer!r} of {names[0]!r} has shape {shape}, "
                f"{structure.layer!r} of {label!r} has {structure.shape}"
            )
    fewest = min(range(len(structures)), key=lambda number: structures[number].k)
    known = structures[fewest].k
    k = known if k is None else k
    require_positive_int("k", k)
    if k > known:
        size = shape[0] * shape[1]
        reason = f"the layer has {size} parameters" if known == size else f"{names[fewest]!r} has {known} eigenpairs"
        raise InputError(f"k must be at most {known}, since {reason}, got {k}")
    first, second = np.array(list(combinations(range(len(structures)), 2)), dtype=np.int64).T
    bases = [structure.basis[:, :k] for structure in structures]
    curves, predicted = np.empty((len(first), k)), np.empty((len(first), k))
    for row, (i, j) in enumerate(zip(first, second, strict=True)):
        inner = bases[i].T.astype(np.float64) @ bases[j].astype(np.float64)
        curves[row] = leading_overlaps(inner**2)
        predicted[row] = leading_overlaps(structures[i].pairs.squared_products_with(structures[j].pairs, k))
    prints = sorted({s.provenance.data_fingerprint for s in structures} - {""})
    dtypes = sorted({s.provenance.dtype for s in structures})
    return SharedEigenspaces(
        labels=tuple(names),
        layers=tuple(structure.layer for structure in structures),
        shape=shape,
        first=first,
        second=second,
        curves=curves,
        predicted=predicted,
        stderr=_stderr_over_models(curves, first, second, len(structures)),
        provenance=Provenance(
            engine="shared eigenspaces", dtype=" ".join(dtypes), device="cpu", data_fingerprint="+".join(prints)
        ),
    )


def _stderr_over_models(
    curves: Array, first: npt.NDArray[np.int64], second: npt.NDArray[np.int64], models: int
) -> Array:
    if models < 3:
        return np.full(curves.shape[1], np.nan)
    without = [curves[(first != model) & (second != model)].mean(axis=0) for model in range(models)]
    return jackknife_stderr(np.array(without))
