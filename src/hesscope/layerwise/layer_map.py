"""The decoupling errors of all layers of a network side by side."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from hesscope.core.errors import InputError
from hesscope.core.records import Provenance, require_xarray_kind
from hesscope.layerwise.decoupling import Decoupling
from hesscope.layerwise.factors import KroneckerFactors, all_kronecker_factors, with_errors
from hesscope.layerwise.layers import Layer, find_layer, layers_of, left_out
from hesscope.layerwise.taps import calls_of, unusable
from hesscope.objective import Objective

if TYPE_CHECKING:
    import xarray as xr

Array = npt.NDArray[np.float64]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class LayerMap:
    """Decoupling of L layers; see Decoupling.

    Attributes:
        layers: names, in the order of the network; sizes: numbers of parameters [L].
        sharing: convention of each ("none", "expand" or "reduce").
        decouplings: errors of each.
        left_out: module -> why it is no layer, or cannot be measured.
        provenance: of the factors.
    """

    layers: tuple[str, ...]
    sizes: npt.NDArray[np.int64]
    sharing: tuple[str, ...]
    decouplings: tuple[Decoupling, ...]
    left_out: Mapping[str, str]
    provenance: Provenance

    def __repr__(self) -> str:
        errors = ", ".join(
            f"{layer}: {error:.3g}" for layer, error in zip(self.layers, self.relative_error, strict=True)
        )
        return f"LayerMap(relative errors: {errors}; {len(self.left_out)} modules left out)"

    @property
    def relative_error(self) -> Array:
        """[L]; see Decoupling."""
        return self.values("relative_error")

    @property
    def best_relative_error(self) -> Array:
        """[L]; see Decoupling."""
        return self.values("best_relative_error")

    def values(self, name: str) -> Array:
        """An attribute of Decoupling, such as "gauss_newton_error", of all layers [L]."""
        return np.array([getattr(each, name) for each in self.decouplings], dtype=np.float64)

    def to_xarray(self) -> xr.Dataset:
        """All of it, by layer; `from_xarray` is the inverse."""
        import xarray as xr

        names = [entry.name for entry in fields(Decoupling) if entry.name != "note"]
        return xr.Dataset(
            {
                "size": ("layer", self.sizes),
                "sharing": ("layer", np.asarray(self.sharing, dtype=object)),
                "note": ("layer", np.asarray([each.note for each in self.decouplings], dtype=object)),
                **{name: ("layer", self.values(name)) for name in names},
            },
            coords={"layer": np.asarray(self.layers, dtype=object)},
            attrs={"record": "LayerMap", "left_out": json.dumps(dict(self.left_out)), **self.provenance.attributes()},
        )

    @classmethod
    def from_xarray(cls, dataset: xr.Dataset) -> LayerMap:
        """Inverse of `to_xarray`.

        Raises:
            InputError: the data set was not made by `to_xarray`.
        """
        require_xarray_kind(dataset, "LayerMap")
        names = [entry.name for entry in fields(Decoupling) if entry.name != "note"]
        return cls(
            layers=tuple(str(name) for name in dataset["layer"].values),
            sizes=dataset["size"].values.astype(np.int64),
            sharing=tuple(str(each) for each in dataset["sharing"].values),
            decouplings=tuple(
                Decoupling(**{name: float(row[name]) for name in names}, note=str(row["note"].item()))
                for row in (dataset.isel(layer=place) for place in range(dataset.sizes["layer"]))
            ),
            left_out=json.loads(dataset.attrs["left_out"]),
            provenance=Provenance.from_attributes(dataset.attrs),
        )


def usable_layers(objective: Objective, sharing: str | None = None) -> tuple[list[Layer], dict[str, str]]:
    """Layers whose factors can be had, in the order of the network, and all other modules with the reasons."""
    found, reasons = layers_of(objective), left_out(objective)
    calls, usable = calls_of(objective, found), []
    for layer in found:
        reason = unusable(*calls[layer.name], sharing)
        if getattr(objective.model.get_submodule(layer.name), "padding_idx", None) is not None:
            reason = reason or "has a padding_idx, of which PyTorch's second derivative is wrong"
        if reason:
            reasons[layer.name] = reason
        else:
            usable.append(layer)
    return usable, reasons


def layer_map(
    objective: Objective,
    layers: Sequence[str] | None = None,
    sharing: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> LayerMap:
    """Decoupling errors of several layers (all that can be measured unless told), each by `kronecker_factors`.

    Args:
        sharing, seed: as there; progress: called with (layers done, layers planned).

    Raises:
        InputError, DataError, TooLargeError: as there, or if the network has no layer that can be measured.
    """
    if layers is None:
        usable, reasons = usable_layers(objective, sharing)
    else:
        usable, reasons = [find_layer(objective, name) for name in dict.fromkeys(layers)], {}
    if layers is not None and not usable:
        raise InputError("layers is empty: name at least one, or leave it out for all")
    if not usable:
        why = "; ".join(f"{name!r} {reason}" for name, reason in reasons.items()) or "it has no layers"
        raise InputError(f"the network has no layer that can be measured: {why}")
    factors = all_kronecker_factors(objective, [layer.name for layer in usable], sharing, seed=seed)
    found: list[KroneckerFactors] = []
    for layer in usable:
        found.append(with_errors(objective, layer, factors[layer.name], seed))
        if progress is not None:
            progress(len(found), len(usable))
    return LayerMap(
        layers=tuple(layer.name for layer in usable),
        sizes=np.array([layer.size for layer in usable], dtype=np.int64),
        sharing=tuple(each.sharing for each in found),
        decouplings=tuple(each.decoupling for each in found if each.decoupling is not None),
        left_out=reasons,
        provenance=found[0].provenance,
    )
