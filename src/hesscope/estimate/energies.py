"""BlockEnergies: the squared Frobenius norms of all blocks of a matrix, with standard errors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from hesscope.core.errors import InputError
from hesscope.core.records import Provenance, require_xarray_kind
from hesscope.partition.partition import select_labels

if TYPE_CHECKING:
    import xarray as xr

Array = npt.NDArray[np.float64]


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
        samples: [K, B, B] the K independent, unbiased samples whose mean is `values`; None if exact.
        provenance: how it was made.
    """

    labels: tuple[str, ...]
    sizes: tuple[int, ...]
    values: Array = field(repr=False)
    stderr: Array = field(repr=False)
    samples: Array | None = field(repr=False)
    provenance: Provenance

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
        if self.samples is None:
            return 0.0
        return _ratio_stderr(np.trace(self.samples, axis1=1, axis2=2), self.samples.sum(axis=(1, 2)))

    def off_diagonal_ratio(self, labels: Iterable[str] | None = None) -> float:
        """Ratio r = mean_{i != j} ||H_ij||^2 / mean_i ||H_ii||^2 over the chosen blocks; nan if they are zero.

        Raises:
            InputError: the blocks differ in size (r compares blocks of one shape), fewer than two, or unknown ones.
        """
        off, on = self._off_and_on(self.values[None], labels)
        return _ratio(off[0], on[0])

    def off_diagonal_ratio_stderr(self, labels: Iterable[str] | None = None) -> float:
        """Standard error of `off_diagonal_ratio` (delta method over the samples); 0 if exact."""
        if self.samples is None:
            return 0.0
        return _ratio_stderr(*self._off_and_on(self.samples, labels))

    def confidence_interval(self, level: float = 0.95) -> Interval:
        """Intervals [B, B] that cover each exact energy with probability `level`; points if exact.

        Energies are positive and right-skewed, so the Student interval is taken of their logarithm.
        """
        if not 0 < level < 1:
            raise InputError(f"level must lie between 0 and 1, got {level}")
        if self.samples is None:
            return Interval(self.values, self.values)
        from scipy.special import stdtrit

        quantile = float(stdtrit(len(self.samples) - 1, (1 + level) / 2))
        relative = np.divide(self.stderr, self.values, out=np.zeros_like(self.values), where=self.values > 0)
        return Interval(self.values * np.exp(-quantile * relative), self.values * np.exp(quantile * relative))

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
        if self.samples is None:
            return BlockEnergies.exact(tuple(groups), sizes, indicator @ self.values @ indicator.T, self.provenance)
        return BlockEnergies.from_samples(tuple(groups), sizes, indicator @ self.samples @ indicator.T, self.provenance)

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
        return xr.Dataset(
            variables,
            coords={"row_block": labels, "column_block": labels},
            attrs={"record": "BlockEnergies", **self.provenance.attributes()},
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
        )

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
        # Not total minus diagonal: that cancels when r is tiny.
        off = np.where(np.eye(count, dtype=bool), 0.0, part).sum(axis=(1, 2))
        return off / (count * (count - 1)), diagonal / count


@dataclass(frozen=True, eq=False)
class SplitEnergies:
    """Block energies of the Hessian H and of its parts G (Gauss-Newton) and R = H - G, side by side.

    The parts' energies do not add up to those of H: H_ij = G_ij + R_ij has a cross term. A loss callable has H alone.
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
        joined = xr.concat(sets, dim=xr.DataArray(np.asarray(list(self.parts), dtype=object), dims="part", name="part"))
        joined["block_size"] = ("row_block", np.asarray(self.hessian.sizes))
        return joined.assign_attrs(self.hessian.to_xarray().attrs, record="SplitEnergies")

    @classmethod
    def from_xarray(cls, dataset: xr.Dataset) -> SplitEnergies:
        """Inverse of `to_xarray`; other variables of the data set are ignored."""
        require_xarray_kind(dataset, "SplitEnergies")
        names = [str(name) for name in dataset["part"].to_numpy()]
        single = dataset.assign_attrs(record="BlockEnergies")
        return cls({name: BlockEnergies.from_xarray(single.sel(part=name)) for name in names})


def _ratio(numerator: float, denominator: float) -> float:
    return float(numerator / denominator) if denominator > 0 else float("nan")


def _ratio_stderr(numerators: Array, denominators: Array) -> float:
    """Delta-method standard error of mean(numerators) / mean(denominators) from paired samples [K]."""
    mean = denominators.mean()
    ratio = _ratio(numerators.mean(), mean)
    residuals = numerators - ratio * denominators
    return float(residuals.std(ddof=1) / np.sqrt(len(residuals)) / mean) if mean > 0 else float("nan")
