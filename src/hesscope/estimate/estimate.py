"""Estimate: a number or a vector of numbers that was estimated from random samples, with its standard error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from hesscope.core.errors import InputError
from hesscope.core.records import Provenance, require_xarray_kind
from hesscope.estimate.energies import Interval

if TYPE_CHECKING:
    import xarray as xr

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Estimate:
    """Mean of independent, unbiased samples (weighted, after an enlargement), or an exact result.

    The standard error is that of sampling; rounding is not in it.

    Attributes:
        value: float, or [B] float64; stderr: the same shape, 0 where exact.
        samples: [K] or [K, B], the K independent samples whose mean is `value`; None if exact or not kept. Where the
            sample was enlarged, because it missed the tolerance, `value` is a weighted mean of them (its weights:
            hesscope.estimate.stopping), and `stderr` that of the weighted mean.
        labels: of the B entries, where they have names; else None.
        degrees: degrees of freedom K - 1 of `stderr`; 0 if exact.
        probes: random vectors behind the value; 0 if exact.
        products: products with the operator in all, with those that only planned the sampling.
        converged: whether the requested tolerance was met; message: what happened, one line.
        provenance: how it was made.
    """

    value: float | Array
    stderr: float | Array
    samples: Array | None = field(repr=False)
    labels: tuple[str, ...] | None
    degrees: int
    probes: int
    products: int
    converged: bool
    message: str
    provenance: Provenance

    @classmethod
    def exact(
        cls, value: float | Array, products: int, provenance: Provenance, labels: Sequence[str] | None = None
    ) -> Estimate:
        """A result without sampling error."""
        stderr = 0.0 if isinstance(value, float) else np.zeros_like(value)
        names = None if labels is None else tuple(labels)
        return cls(value, stderr, None, names, 0, 0, products, True, "exact", provenance)

    @property
    def relative_error(self) -> float | Array:
        """Standard error over |value|, the same shape; 0 where exact, inf where only the value is 0."""
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.where(np.equal(self.stderr, 0), 0.0, np.divide(self.stderr, np.abs(self.value)))
        return float(ratio) if ratio.ndim == 0 else ratio

    def confidence_interval(self, level: float = 0.95) -> Interval:
        """Student interval that covers each exact value with probability `level`, entry by entry; a point if exact.

        Raises:
            InputError: a level outside (0, 1).
        """
        if not 0 < level < 1:
            raise InputError(f"level must lie between 0 and 1, got {level}")
        value, stderr = np.asarray(self.value), np.asarray(self.stderr)
        if self.degrees == 0:
            return Interval(value, value)
        from scipy.special import stdtrit

        half = float(stdtrit(self.degrees, (1 + level) / 2)) * stderr
        return Interval(value - half, value + half)

    def to_xarray(self) -> xr.Dataset:
        """Data set with the dimensions entry (unless the value is one number) and sample; `from_xarray` reads it."""
        import xarray as xr

        entry = () if np.ndim(self.value) == 0 else ("entry",)
        variables: dict[str, tuple[tuple[str, ...], npt.NDArray[np.generic]]] = {
            "value": (entry, np.asarray(self.value)),
            "stderr": (entry, np.asarray(self.stderr)),
        }
        if self.samples is not None:
            variables["samples"] = (("sample", *entry), self.samples)
        coords = {} if self.labels is None else {"entry": np.asarray(self.labels, dtype=object)}
        counts = {key: int(getattr(self, key)) for key in ("degrees", "probes", "products", "converged")}
        attributes = {"record": "Estimate", "message": self.message, **counts, **self.provenance.attributes()}
        return xr.Dataset(variables, coords=coords, attrs=attributes)

    @classmethod
    def from_xarray(cls, dataset: xr.Dataset) -> Estimate:
        """Inverse of `to_xarray`."""
        require_xarray_kind(dataset, "Estimate")
        scalar = dataset["value"].ndim == 0
        value, stderr = dataset["value"].to_numpy(), dataset["stderr"].to_numpy()
        return cls(
            value=float(value) if scalar else value,
            stderr=float(stderr) if scalar else stderr,
            samples=dataset["samples"].to_numpy() if "samples" in dataset else None,
            labels=tuple(str(label) for label in dataset["entry"].to_numpy()) if "entry" in dataset.coords else None,
            degrees=int(dataset.attrs["degrees"]),
            probes=int(dataset.attrs["probes"]),
            products=int(dataset.attrs["products"]),
            converged=bool(dataset.attrs["converged"]),
            message=str(dataset.attrs["message"]),
            provenance=Provenance.from_attributes(dataset.attrs),
        )

    def __str__(self) -> str:
        if np.ndim(self.value) == 0:
            what = f"{self.value:.6g}" if self.degrees == 0 else self._with_error()
        else:
            spread = float(np.linalg.norm(self.stderr)), float(np.linalg.norm(self.value))
            share = f", error {_percent(*spread)} of the norm" if self.degrees else ""
            what = f"{np.size(self.value)} values{share}"
        return f"{what}, {self.products} products, {self.message}"

    def __repr__(self) -> str:
        return f"Estimate({self})"

    def _with_error(self) -> str:
        """'12.3 ± 0.2 (1.6 %)': the error to two digits, the value as far as the error reaches."""
        value, stderr = float(self.value), float(self.stderr)
        digits = 6
        if stderr > 0 and value != 0:
            reach = int(np.floor(np.log10(abs(value)))) - int(np.floor(np.log10(stderr)))
            digits = min(max(reach + 2, 2), 12)
        return f"{value:.{digits}g} ± {stderr:.2g} ({_percent(stderr, abs(value))})"


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.2g} %" if whole > 0 else "inf %" if part > 0 else "0 %"
