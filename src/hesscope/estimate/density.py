"""The distribution of a matrix's eigenvalues as nodes and weights, and what can be read from it.

How it is estimated: hesscope.estimate.spectral_density.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from hesscope.core.checks import require_choice, require_positive_int
from hesscope.core.errors import InputError
from hesscope.core.records import Provenance, require_xarray_kind
from hesscope.estimate.bands import positive_interval, share_interval
from hesscope.estimate.energies import Interval
from hesscope.estimate.nodes import Quadrature, few_quantiles, merged, standard_error, used, weighted_quantile
from hesscope.estimate.outliers import Outliers, find_outliers
from hesscope.estimate.smoothing import smoothed
from hesscope.estimate.symlog import SYMLOG_BANDWIDTH, from_symlog, to_symlog

if TYPE_CHECKING:
    import xarray as xr

Array = npt.NDArray[np.float64]

# Default smoothing, in units of the typical distance between neighbouring nodes: below 0.5 single nodes show.
SMOOTHING = 0.6

# Distances of so many roundings of the largest eigenvalue are none.
ROUNDINGS = 1000

QUANTITIES = ("density", "cumulative")


@dataclass(frozen=True, eq=False)
class SpectralDensity:
    """The distribution of the eigenvalues of a symmetric P x P matrix, as one quadrature per probe.

    Densities integrate to 1; places x are in the units of the matrix, densities in their inverse. The default
    `bandwidth` (standard deviation of the Gaussian that stands for every node) is 0.6 times the typical distance
    between neighbouring nodes of a probe (weighted median), the finest at which nodes merge where most eigenvalues
    are; exact eigenvalues are smoothed like their 30 quantiles. Nodes and weights are stored, so that everything can
    be smoothed again.

    Attributes:
        nodes, weights: [probes, steps]; weights of a probe sum to 1; a probe whose Krylov space was exhausted early
            has zero weights (and nodes) at its end.
        dimension: P.
        exact: whether nodes are all eigenvalues with equal weights; then nothing has an error.
        products: of the matrix with a vector.
        provenance: how it was made; message: what happened.
    """

    nodes: Array = field(repr=False)
    weights: Array = field(repr=False)
    dimension: int
    exact: bool
    products: int
    provenance: Provenance
    message: str

    @classmethod
    def from_eigenvalues(cls, values: npt.ArrayLike, provenance: Provenance | None = None) -> SpectralDensity:
        """The exact density of a matrix whose P eigenvalues are known.

        Raises:
            InputError: no eigenvalues, or values that are not finite.
        """
        eigenvalues = np.sort(np.asarray(values, dtype=np.float64).ravel())
        if not eigenvalues.size or not np.isfinite(eigenvalues).all():
            raise InputError("eigenvalues must be a non-empty array of finite numbers")
        given = np.asarray(values).dtype
        dtype = str(given) if given in (np.float32, np.float64) else "float64"
        origin = provenance or Provenance(engine="spectral density: given eigenvalues", dtype=dtype, device="cpu")
        size = len(eigenvalues)
        return cls(eigenvalues[None], np.full((1, size), 1 / size), size, True, 0, origin, "from all eigenvalues")

    @property
    def probes(self) -> int:
        """Number of probes."""
        return len(self.nodes)

    @property
    def eigenvalue_range(self) -> tuple[float, float]:
        """Smallest and largest node; the outermost eigenvalues are there or farther out."""
        seen = self.nodes[self.weights > 0]
        return float(seen.min()), float(seen.max())

    @property
    def default_bandwidth(self) -> float:
        """Standard deviation of the Gaussians unless told, in the matrix's units; see SpectralDensity.

        A spectrum that is one value up to rounding has sqrt(eps) of that value: 0 for a zero matrix.
        """
        distances, shares = [], []
        for nodes, weights in self._resolved():
            if len(nodes) > 1:
                gaps = np.diff(nodes)
                distances.append((np.append(gaps, gaps[-1]) + np.insert(gaps, 0, gaps[0])) / 2)
                shares.append(weights)
        smallest = float(np.sqrt(self._eps)) * max(abs(end) for end in self.eigenvalue_range)
        if not distances:
            return smallest
        typical = weighted_quantile(np.concatenate(distances), np.concatenate(shares), 0.5)
        return max(smallest, SMOOTHING * typical)

    # --- density and distribution function ----------------------------------------------------------------------------

    def density(self, x: npt.ArrayLike, bandwidth: float | None = None) -> Array:
        """Density at places x [...]: a Gaussian of standard deviation `bandwidth` around every node.

        Raises:
            InputError: a bandwidth that is not positive, places that are not finite.
        """
        result: Array = self._per_probe(x, bandwidth, "density").mean(axis=0)
        return result

    def cumulative(self, x: npt.ArrayLike, bandwidth: float | None = None) -> Array:
        """Share of the eigenvalues below x [...], of the same smoothed density; bandwidth 0: of the nodes themselves.

        Raises:
            InputError: a negative bandwidth, places that are not finite.
        """
        result: Array = self._per_probe(x, bandwidth, "cumulative").mean(axis=0)
        return result

    def confidence_band(
        self, x: npt.ArrayLike, bandwidth: float | None = None, level: float = 0.95, quantity: str = "density"
    ) -> Interval:
        """Ends of intervals that cover the smoothed exact "density" or "cumulative" at each x with probability `level`.

        From the probes' spread: Student intervals of the inverse cube root, since what one probe sees of few
        eigenvalues is chi-square, whose mean they cover in 92 to 96 % of all cases at level 95 % (1 to 100 degrees of
        freedom, 3 to 32 probes), those of the mean itself in 82 % at worst; for the distribution function, of the odds.
        What is covered is the density at the same bandwidth; the error of the quadrature itself is not in it. That is
        small in a bulk where `bandwidth` is not below the default; beside a pile of equal eigenvalues (the null space
        of a Gauss-Newton matrix) and in gaps between outliers it is not, and bands miss there: smooth wider, or take
        more steps. With two or three probes an upper end may be infinite.

        Raises:
            InputError: a value that does not fit, or fewer than two probes.
        """
        require_choice("quantity", quantity, QUANTITIES)
        if not 0 < level < 1:
            raise InputError(f"level must lie between 0 and 1, got {level}")
        samples = self._per_probe(x, bandwidth, quantity)
        mean, stderr = samples.mean(axis=0), standard_error(samples, self.exact)
        if self.exact:
            return Interval(mean, mean)
        if self.probes < 2:
            raise InputError("a confidence band needs at least two probes, this density has one")
        from scipy.special import stdtrit

        quantile = float(stdtrit(self.probes - 1, (1 + level) / 2))
        interval = positive_interval if quantity == "density" else share_interval
        return interval(mean, stderr, quantile)

    def symlog_density(self, x: npt.ArrayLike, threshold: float | None = None, bandwidth: float | None = None) -> Array:
        """Density per unit of u(x) = sign(x) log10(1 + |x| / threshold) at places x [...], smoothed in u.

        Linear within the threshold, a decade per unit beyond (Webber 2013). Its integral over u is 1.

        Args:
            x: eigenvalues (not u).
            threshold: in the matrix's units; `default_bandwidth` unless told, below which nothing is resolved.
            bandwidth: standard deviation of the Gaussians in u; 0.05 unless told.

        Raises:
            InputError: a threshold or a bandwidth that is not positive.
        """
        t = self._threshold(threshold)
        width = SYMLOG_BANDWIDTH if bandwidth is None else bandwidth
        return replace(self, nodes=to_symlog(self.nodes, t)).density(to_symlog(x, t), width)

    def grid(self, points: int = 1000, bandwidth: float | None = None) -> Array:
        """`points` places [points], evenly spaced over the range of eigenvalues and four bandwidths more.

        Peaks narrower than its spacing fall through it (the zeros of a Gauss-Newton matrix): see `symlog_grid`.
        """
        require_positive_int("points", points)
        width = self._bandwidth(bandwidth)
        low, high = self.eigenvalue_range
        places: Array = np.linspace(low - 4 * width, high + 4 * width, points)
        return places

    def symlog_grid(self, points: int = 1000, threshold: float | None = None, bandwidth: float | None = None) -> Array:
        """`points` eigenvalues [points], evenly spaced in u of `symlog_density` (see `to_symlog`)."""
        require_positive_int("points", points)
        t, width = self._threshold(threshold), SYMLOG_BANDWIDTH if bandwidth is None else bandwidth
        low, high = to_symlog(self.eigenvalue_range, t)
        return from_symlog(np.linspace(low - 4 * width, high + 4 * width, points), t)

    # --- moments ------------------------------------------------------------------------------------------------------

    def moment(self, k: int) -> float:
        """tr(A^k) / P, unbiased.

        Raises:
            InputError: k is negative, or more than 2 steps - 1, beyond which the quadrature is not exact.
        """
        return float(self._moments(k).mean())

    def moment_stderr(self, k: int) -> float:
        """Standard error of `moment`; 0 if exact, nan with a single probe.

        It is itself an estimate from the probes: with fewer than ten it is too small for high moments, which single
        directions dominate (by half for the third moment and four probes, in a network's Hessian).
        """
        return float(standard_error(self._moments(k), self.exact))

    # --- outliers -----------------------------------------------------------------------------------------------------

    def outliers(self, gap: float = 0.2, share: float = 0.05) -> Outliers:
        """Eigenvalues that a gap separates from the bulk, at both ends.

        Criterion: let m be the median eigenvalue and s the distance from it within which all but a `share` of the
        eigenvalues lie. At either end, the outliers are the eigenvalues beyond the innermost gap that lies farther than
        s from m, at least outwards, and is wider than `gap` times its outer end's distance from m. The nodes of all
        probes together stand for the eigenvalues: where none of them has a node there is no eigenvalue, up to nodes
        of less than 0.02 eigenvalues (weight times P), which are left out. An isolated eigenvalue is a node of every
        probe, at the same place; so their number is the median of the probes' numbers of nodes outside. Papyan (2018)
        and Ghorbani et al. (2019) count by eye.

        Args:
            gap: in (0, 1), relative; share: in (0, 1), of eigenvalues that may be outliers.

        Raises:
            InputError: a value that does not fit.
        """
        merged_nodes = merged(self.nodes, self.weights, self._rounding)
        return find_outliers(merged_nodes, self.dimension, self._rounding, self.exact, gap, share)

    # --- storage ------------------------------------------------------------------------------------------------------

    def to_xarray(self) -> xr.Dataset:
        """Labelled data set with dimensions probe and step; `from_xarray` reads it back."""
        import xarray as xr

        attributes = {"dimension": self.dimension, "exact": int(self.exact), "products": self.products}
        return xr.Dataset(
            {"node": (("probe", "step"), self.nodes), "weight": (("probe", "step"), self.weights)},
            attrs={
                "record": "SpectralDensity",
                **attributes,
                "message": self.message,
                **self.provenance.attributes(),
            },
        )

    @classmethod
    def from_xarray(cls, dataset: xr.Dataset) -> SpectralDensity:
        """Inverse of `to_xarray`."""
        require_xarray_kind(dataset, "SpectralDensity")
        return cls(
            nodes=dataset["node"].to_numpy(),
            weights=dataset["weight"].to_numpy(),
            dimension=int(dataset.attrs["dimension"]),
            exact=bool(dataset.attrs["exact"]),
            products=int(dataset.attrs["products"]),
            provenance=Provenance.from_attributes(dataset.attrs),
            message=str(dataset.attrs["message"]),
        )

    # --- within -------------------------------------------------------------------------------------------------------

    @property
    def _eps(self) -> float:
        return float(np.finfo(self.provenance.dtype).eps)

    @property
    def _rounding(self) -> float:
        """Distance within which eigenvalues are one."""
        return ROUNDINGS * self._eps * max(abs(end) for end in self.eigenvalue_range)

    def _resolved(self) -> list[Quadrature]:
        """Nodes, each once and ascending, and weights of every probe; of exact eigenvalues few quantiles."""
        resolved = used(self.nodes, self.weights)
        return [few_quantiles(resolved[0][0], self._rounding)] if self.exact else resolved

    def _moments(self, k: int) -> Array:
        """q.A^k q of every probe, [probes]."""
        if k != 0:
            require_positive_int("k", k)
        if not self.exact and k > 2 * self.nodes.shape[1] - 1:
            raise InputError(
                f"k must be at most 2 * steps - 1 = {2 * self.nodes.shape[1] - 1}, up to which the quadrature is "
                f"exact, got {k}"
            )
        result: Array = (self.weights * self.nodes**k).sum(axis=1)
        return result

    def _bandwidth(self, bandwidth: float | None) -> float:
        """The given or the default one, which must be positive."""
        width = self.default_bandwidth if bandwidth is None else bandwidth
        if bandwidth is None and width == 0:
            raise InputError("all eigenvalues are zero, so that there is no default bandwidth: give one")
        if not (np.isfinite(width) and width > 0):
            raise InputError(f"bandwidth must be positive, got {width}")
        return float(width)

    def _threshold(self, threshold: float | None) -> float:
        t = self.default_bandwidth if threshold is None else threshold
        if threshold is None and t == 0:
            raise InputError("all eigenvalues are zero, so that there is no default threshold: give one")
        if not (np.isfinite(t) and t > 0):
            raise InputError(f"threshold must be positive, got {t}")
        return float(t)

    def _per_probe(self, x: npt.ArrayLike, bandwidth: float | None, quantity: str) -> Array:
        """Smoothed density or distribution function of every probe, [probes, ...] at places [...]."""
        places = np.asarray(x, dtype=np.float64)
        if not np.isfinite(places).all():
            raise InputError("x must be finite numbers")
        cumulative = quantity == "cumulative"
        step = cumulative and bandwidth is not None and bandwidth == 0
        return smoothed(self.nodes, self.weights, places, 0.0 if step else self._bandwidth(bandwidth), cumulative)
