"""The decoupling errors of all layers of a network side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from hesscope.core.errors import InputError
from hesscope.core.records import Provenance
from hesscope.layerwise.factors import KroneckerFactors, kronecker_factors
from hesscope.layerwise.layers import Layer, find_layer, layers_of, left_out
from hesscope.layerwise.taps import calls_of, unusable
from hesscope.objective import Objective

if TYPE_CHECKING:
    import xarray as xr

Array = npt.NDArray[np.float64]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class LayerMap:
    """Decoupling of L layers; see Decoupling for the errors.

    Attributes:
        layers: names, in the order of the network; sizes: numbers of parameters [L].
        relative_error, relative_stderr, best_relative_error, gauss_newton_error, residual_share: [L].
        norm: |H|_F of every layer [L].
        left_out: module -> why it is no layer, or cannot be measured.
    """

    layers: tuple[str, ...]
    sizes: npt.NDArray[np.int64]
    relative_error: Array
    relative_stderr: Array
    best_relative_error: Array
    gauss_newton_error: Array
    residual_share: Array
    norm: Array
    left_out: Mapping[str, str]
    provenance: Provenance

    def to_xarray(self) -> xr.Dataset:
        """All of it, by layer; `left_out` as two attributes."""
        import xarray as xr

        names = (
            "relative_error",
            "relative_stderr",
            "best_relative_error",
            "gauss_newton_error",
            "residual_share",
            "norm",
        )
        return xr.Dataset(
            {"size": ("layer", self.sizes), **{name: ("layer", getattr(self, name)) for name in names}},
            coords={"layer": np.asarray(self.layers, dtype=object)},
            attrs={
                "record": "LayerMap",
                "left_out": list(self.left_out),
                "left_out_because": list(self.left_out.values()),
                **self.provenance.attributes(),
            },
        )


def usable_layers(objective: Objective, sharing: str | None = None) -> tuple[list[Layer], dict[str, str]]:
    """Layers whose factors can be had, in the order of the network, and all other modules with the reasons."""
    found, reasons = layers_of(objective), left_out(objective)
    calls, usable = calls_of(objective, found), []
    for layer in found:
        reason = unusable(*calls[layer.name], sharing)
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
        usable, reasons = [find_layer(objective, name) for name in layers], {}
    if not usable:
        why = "; ".join(f"{name!r} {reason}" for name, reason in reasons.items()) or "it has no layers"
        raise InputError(f"the network has no layer that can be measured: {why}")
    found: list[KroneckerFactors] = []
    for layer in usable:
        found.append(kronecker_factors(objective, layer.name, sharing, seed=seed))
        if progress is not None:
            progress(len(found), len(usable))
    decouplings = [factors.decoupling for factors in found]

    def values(name: str) -> Array:
        return np.array([getattr(each, name) for each in decouplings], dtype=np.float64)

    return LayerMap(
        layers=tuple(layer.name for layer in usable),
        sizes=np.array([layer.size for layer in usable], dtype=np.int64),
        relative_error=values("relative_error"),
        relative_stderr=values("relative_stderr"),
        best_relative_error=values("best_relative_error"),
        gauss_newton_error=values("gauss_newton_error"),
        residual_share=values("residual_share"),
        norm=values("norm"),
        left_out=reasons,
        provenance=found[0].provenance,
    )
