"""BlockEnergies: the squared Frobenius norms of all blocks of a matrix, with standard errors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from hesscope.core.errors import InputError
from hesscope.core.records import Provenance, require_xarray_kind
from hesscope.estimate.column_samples import ColumnSamples
from hesscope.partition.partition import select_labels

if TYPE_CHECKING:
    import xarray as xr

Array = npt.NDArray[np.float64]

# Attributes that differ between the parts H, G and R.
APART = ("engine", "products", "converged", "message")


@dataclass(frozen=True, eq=False)
class Interval:
    """Lower and upper ends of confidence intervals, arrays of one shape."""

    lower: Array
    upper: Array


@dataclass(frozen=True, eq=False)
class BlockEnergies:
    """Energies ||H_ij||_F^2 of the B x B blocks of a matrix (MATH.md, section 1), in squared units of its entries.

    Attributes:
        labels, sizes: of the B blocks.
        values: [B, B] energies; stderr: [B, B] their standard errors, 0 where exact.
        samples: [K, B, B] the K independent, unbiased samples whose mean is `values`; None if exact or `columns`.
        provenance: how it was made.
        columns: samples of single block columns, of unequal numbers, where a tolerance decided on them; else None.
        products: with the operator, those that only planned the sampling included; 0 if not counted.
        converged: whether the requested tolerance was met; message: what happened, one line ("" if nothing was asked).
    """

    labels: tuple[str, ...]
    sizes: tuple[int, ...]
    values: Array = field(repr=False)
    stderr: Array = field(repr=False)
    samples: Array | None = field(repr=False)
    provenance: Provenance
    columns: ColumnSamples | None = field(default=None, repr=False)
    products: int = 0
    converged: bool = True
    message: str = ""

    @classmethod
    def exact(cls, labels: Sequence[str], sizes: Sequence[int], values: Array, provenance: Provenance) -> BlockEnergies:
        """Energies known without error."""
        return cls(tuple(labels), tuple(sizes), values, np.zeros_like(values), None, provenance)

    @classmethod
    def from_samples(
        cls, labels: Sequence[str], sizes: Sequence[int], samples: Array, provenance: Provenance
    ) -> BlockEnergies:
        """Mean and standard error of K >= 2 independent samples [K, B, B]."""
        stderr = samples.std(axis=0, ddof=1) / np.sqrt(len(samples))
        return cls(tuple(labels), tuple(sizes), samples.mean(axis=0), stderr, samples, provenance)

    @classmethod
    def from_columns(
        cls, labels: Sequence[str], sizes: Sequence[int], columns: ColumnSamples, provenance: Provenance
    ) -> BlockEnergies:
        """Means and standard errors of samples of single block columns."""
        stderr = np.sqrt(columns.spread().variance)
        return cls(tuple(labels), tuple(sizes), columns.matrix(), stderr, None, provenance, columns)

    @property
    def total(self) -> float:
        """Energy of the whole matrix, ||H||_F^2."""
        return float(self.values.sum())

    @property
    def diagonality(self) -> float:
        """Share of the energy in the diagonal blocks, sum_i ||H_ii||^2 / ||H||^2, in [0, 1]; nan for a zero matrix."""
        return _ratio(np.trace(self.values), self.values.sum())

    @property
    def diagonality_stderr(self) -> float:
        """Standard error of `diagonality` (delta method over the samples); 0 if exact."""
        return self._diagonality_error()[0]

    def diagonality_interval(self, level: float = 0.95) -> Interval:
        """Interval that covers the exact diagonality with probability `level`; a point if exact, nan for a zero matrix.

        Student's, of the logarithm of the odds: a share lies between 0 and 1, and its sampling is skewed near both.
        """
        value = self.diagonality
        stderr, degrees = self._diagonality_error()
        if not 0 < level < 1:
            raise InputError(f"level must lie between 0 and 1, got {level}")
        if not stderr > 0:
            return Interval(np.asarray(value), np.asarray(value))
        from scipy.special import expit, logit, stdtrit

        off = 1 - value if value < 0.5 else _off_diagonal(self.values).sum() / self.values.sum()
        reach = float(stdtrit(degrees, (1 + level) / 2)) * stderr / (value * off)
        center = logit(value) if value < 0.5 else -logit(off)
        return Interval(np.asarray(expit(center - reach)), np.asarray(expit(center + reach)))

    def off_diagonal_ratio(self, labels: Iterable[str] | None = None) -> float:
        """Ratio r = mean_{i != j} ||H_ij||^2 / mean_i ||H_ii||^2 over the chosen blocks; nan if they are zero.

        Raises:
            InputError: the blocks differ in size (r compares blocks of one shape), fewer than two, or unknown ones.
        """
        off, on = self._off_and_on(self.values[None], labels)
        return _ratio(off[0], on[0])

    def off_diagonal_ratio_stderr(self, labels: Iterable[str] | None = None) -> float:
        """Standard error of `off_diagonal_ratio` (delta method over the samples); 0 if exact."""
        if self.samples is not None:
            return _ratio_stderr(*self._off_and_on(self.samples, labels))
        chosen = select_labels(self.labels, labels)
        (off,), (on,) = self._off_and_on(self.values[None], labels)
        if self.columns is None:
            return 0.0
        if not on > 0:
            return float("nan")
        count = len(chosen)
        coefficients = np.zeros_like(self.values)
        coefficients[np.ix_(chosen, chosen)] = 1 / (count * (count - 1))
        coefficients[chosen, chosen] = -off / on / count
        return float(np.sqrt(self.columns.spread_of_sum(coefficients).variance) / on)

    def confidence_interval(self, level: float = 0.95) -> Interval:
        """Intervals [B, B] that cover each exact energy with probability `level`; points if exact.

        Energies are positive and right-skewed, so the Student interval is taken of their logarithm; of the energies
        themselves where these are estimated as negative or next to nothing.
        """
        if not 0 < level < 1:
            raise InputError(f"level must lie between 0 and 1, got {level}")
        if self.columns is not None:
            found = self.columns.spread().degrees
            degrees = np.where(np.isfinite(found), found, 1.0)  # infinite where exact
        elif self.samples is not None:
            degrees = np.asarray(len(self.samples) - 1.0)
        else:
            return Interval(self.values, self.values)
        from scipy.special import stdtrit

        reach = stdtrit(degrees, (1 + level) / 2) * self.stderr
        # Estimates that may come out negative (of method "dual") tell no scale where they are within their error.
        clear = self.values > self.stderr if self.values.min() < 0 else self.values > 0
        relative = np.divide(reach, self.values, out=np.zeros_like(reach), where=clear)
        lower = np.where(clear, self.values * np.exp(-relative), self.values - reach)
        return Interval(lower, np.where(clear, self.values * np.exp(relative), self.values + reach))

    def aggregate(self, groups: Mapping[str, Iterable[str]]) -> BlockEnergies:
        """Energies between groups of blocks: group label -> labels of its blocks (energies add up over sub-blocks).

        Raises:
            InputError: a label is unknown, or in more than one group.
        """
        members = [select_labels(self.labels, labels) for labels in groups.values()]
        together = [number for group in members for number in group]
        if len(set(together)) != len(together):
            raise InputError("aggregate needs disjoint groups, but a block is in more than one")
        indicator = np.zeros((len(groups), len(self.labels)))
        for row, group in enumerate(members):
            indicator[row, group] = 1.0
        sizes = tuple(int(size) for size in indicator @ np.asarray(self.sizes))
        named = (tuple(groups), sizes)
        if self.columns is not None:
            merged = BlockEnergies.from_columns(*named, self.columns.grouped(indicator), self.provenance)
        elif self.samples is not None:
            merged = BlockEnergies.from_samples(*named, indicator @ self.samples @ indicator.T, self.provenance)
        else:
            merged = BlockEnergies.exact(*named, indicator @ self.values @ indicator.T, self.provenance)
        return replace(merged, products=self.products, converged=self.converged, message=self.message)

    def to_xarray(self) -> xr.Dataset:
        """Labelled data set with dimensions row_block, column_block (and sample); `from_xarray` reads it back."""
        import xarray as xr

        pair = ("row_block", "column_block")
        variables: dict[str, tuple[tuple[str, ...], npt.NDArray[np.generic]]] = {
            "energy": (pair, self.values),
            "energy_stderr": (pair, self.stderr),
            "block_size": (("row_block",), np.asarray(self.sizes)),
        }
        if self.samples is not None:
            variables["energy_samples"] = (("sample", *pair), self.samples)
        labels = np.asarray(self.labels, dtype=object)
        coordinates: dict[str, npt.NDArray[np.generic]] = {"row_block": labels, "column_block": labels}
        if self.columns is not None:
            drawn = self.columns
            variables["column_samples"] = (("draw", "row_block"), drawn.values)
            variables["draw_weight"] = (("draw",), drawn.weights)
            variables["draw_source"] = (("draw",), drawn.source)
            variables["draw_column"] = (("draw",), drawn.column)
            variables["mirrored"] = ((), np.asarray(drawn.mirrored))
            coordinates["draw"] = np.arange(len(drawn.weights))
        happened = {"products": self.products, "converged": int(self.converged), "message": self.message}
        return xr.Dataset(
            variables,
            coords=coordinates,
            attrs={"record": "BlockEnergies", **happened, **self.provenance.attributes()},
        )

    @classmethod
    def from_xarray(cls, dataset: xr.Dataset) -> BlockEnergies:
        """Inverse of `to_xarray`."""
        require_xarray_kind(dataset, "BlockEnergies")
        samples = dataset["energy_samples"].to_numpy() if "energy_samples" in dataset else None
        return cls(
            labels=tuple(str(label) for label in dataset["row_block"].to_numpy()),
            sizes=tuple(int(size) for size in dataset["block_size"].to_numpy()),
            values=dataset["energy"].to_numpy(),
            stderr=dataset["energy_stderr"].to_numpy(),
            samples=samples,
            provenance=Provenance.from_attributes(dataset.attrs),
            columns=_columns_of(dataset),
            products=int(dataset.attrs.get("products", 0)),
            converged=bool(dataset.attrs.get("converged", True)),
            message=str(dataset.attrs.get("message", "")),
        )

    def _diagonality_error(self) -> tuple[float, float]:
        """Standard error of the diagonality, and its degrees of freedom."""
        if self.samples is not None:
            sums = np.trace(self.samples, axis1=1, axis2=2), self.samples.sum(axis=(1, 2))
            return _ratio_stderr(*sums), len(self.samples) - 1
        if self.columns is None:
            return 0.0, np.inf
        if not self.total > 0:
            return float("nan"), np.inf
        spread = self.columns.spread_of_sum(np.eye(len(self.labels)) - self.diagonality)
        return float(np.sqrt(spread.variance)) / self.total, float(spread.degrees)

    def _off_and_on(self, stack: Array, labels: Iterable[str] | None) -> tuple[Array, Array]:
        """Mean off-diagonal and mean diagonal energy of the chosen blocks, for each matrix of stack [K, B, B]."""
        chosen = select_labels(self.labels, labels)
        if len(chosen) < 2 or len(set(chosen)) != len(chosen):
            raise InputError("off_diagonal_ratio needs at least two blocks, each named once")
        sizes = sorted({self.sizes[number] for number in chosen})
        if len(sizes) > 1:
            raise InputError(
                "off_diagonal_ratio compares blocks of one shape, but the chosen blocks have sizes "
                f"{', '.join(map(str, sizes[:5]))}{', ...' if len(sizes) > 5 else ''}; choose some with labels=[...]"
            )
        part = stack[:, chosen][:, :, chosen]
        count = len(chosen)
        diagonal = np.trace(part, axis1=1, axis2=2)
        off = _off_diagonal(part).sum(axis=(1, 2))
        return off / (count * (count - 1)), diagonal / count


@dataclass(frozen=True, eq=False)
class SplitEnergies:
    """Block energies of the Hessian H and of its parts G (Gauss-Newton) and R = H - G, side by side.

    The parts' energies do not add up to those of H: H_ij = G_ij + R_ij has a cross term. A loss callable has H alone;
    where only G can be afforded, there is G alone.
    """

    parts: Mapping[str, BlockEnergies]

    @property
    def hessian(self) -> BlockEnergies:
        """Energies of H itself."""
        return self.parts["H"]

    def to_xarray(self) -> xr.Dataset:
        """The data set of BlockEnergies with one more dimension, part (H, G, R); `from_xarray` reads it back."""
        import xarray as xr

        sets = [energies.to_xarray().drop_vars("block_size") for energies in self.parts.values()]
        part = xr.DataArray(np.asarray(list(self.parts), dtype=object), dims="part", name="part")
        joined = xr.concat(sets, dim=part, join="outer")  # samples of unequal numbers are filled up with nan
        first = next(iter(self.parts.values()))
        joined["block_size"] = ("row_block", np.asarray(first.sizes))
        # What happened is told part by part; all else that attributes say is common to the parts.
        for name in APART:
            joined[f"part_{name}"] = ("part", [single.attrs[name] for single in sets])
        return joined.assign_attrs(first.to_xarray().attrs, record="SplitEnergies")

    @classmethod
    def from_xarray(cls, dataset: xr.Dataset) -> SplitEnergies:
        """Inverse of `to_xarray`; other variables of the data set are ignored."""
        require_xarray_kind(dataset, "SplitEnergies")
        names = [str(name) for name in dataset["part"].to_numpy()]
        parts = {}
        for name in names:
            single = dataset.sel(part=name)
            own = {key: single[f"part_{key}"].item() for key in APART if f"part_{key}" in single}
            parts[name] = BlockEnergies.from_xarray(single.assign_attrs(own, record="BlockEnergies"))
        return cls(parts)


def _columns_of(dataset: xr.Dataset) -> ColumnSamples | None:
    if "column_samples" not in dataset:
        return None
    weights = dataset["draw_weight"].to_numpy()
    kept = np.isfinite(weights)  # side by side with a larger sample, one is filled up with nan
    source, column = (dataset[f"draw_{name}"].to_numpy()[kept].astype(np.int64) for name in ("source", "column"))
    values = dataset["column_samples"].transpose("draw", "row_block").to_numpy()[kept]
    return ColumnSamples(values, weights[kept], source, column, bool(dataset["mirrored"]))


def _off_diagonal(stack: Array) -> Array:
    """The matrices [..., B, B] with zeros on the diagonal: total minus diagonal would cancel where little is left."""
    return np.where(np.eye(stack.shape[-1], dtype=bool), 0.0, stack)


def _ratio(numerator: float, denominator: float) -> float:
    return float(numerator / denominator) if denominator > 0 else float("nan")


def _ratio_stderr(numerators: Array, denominators: Array) -> float:
    """Delta-method standard error of mean(numerators) / mean(denominators) from paired samples [K]."""
    mean = denominators.mean()
    ratio = _ratio(numerators.mean(), mean)
    residuals = numerators - ratio * denominators
    return float(residuals.std(ddof=1) / np.sqrt(len(residuals)) / mean) if mean > 0 else float("nan")
