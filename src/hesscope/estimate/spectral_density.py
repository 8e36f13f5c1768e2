"""Spectral density of a symmetric matrix by stochastic Lanczos quadrature, and what can be read from it.

With q uniform on the unit sphere, E[q.f(A)q] = tr f(A) / P for every f: the measure that q sees (eigenvalues, weighted
with the squares of q's components) is an unbiased sample of the spectral density. Lanczos from q gives that measure's
Gauss quadrature, exact for polynomials up to degree 2 steps - 1 (Golub & Welsch 1969; Ubaru, Chen & Saad 2017; in deep
learning: Ghorbani, Krishnan & Xiao 2019, Papyan 2018).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from hesscope.core.checks import require_choice, require_positive_int
from hesscope.core.errors import DataError, InputError, TooLargeError
from hesscope.core.memory import available_bytes, human_bytes
from hesscope.core.records import Provenance, require_xarray_kind
from hesscope.core.rng import normal, stream
from hesscope.estimate.energies import Interval
from hesscope.estimate.lanczos import lanczos, power_of_two
from hesscope.estimate.symmetry import require_symmetric
from hesscope.operators import Operator, as_operator

if TYPE_CHECKING:
    import xarray as xr

Array = npt.NDArray[np.float64]
Progress = Callable[[int, int], None]

# Bases may take this share of the memory that is left; probes that do not fit together go in groups.
MEMORY_SHARE = 0.5

# Default smoothing, in units of the typical distance between neighbouring nodes: below 0.5 single nodes show.
SMOOTHING = 0.6

# A Gaussian is zero beyond this many widths (its tail there is 1e-15), and has this many grid points per width.
REACH, POINTS_PER_WIDTH = 8.0, 8

# Nodes of fewer eigenvalues than NEGLIGIBLE do not fill a gap, of fewer than STRAY count as none; distances of
# ROUNDINGS of the largest eigenvalue are none.
NEGLIGIBLE, STRAY, ROUNDINGS = 0.02, 1e-4, 1000

# Exact eigenvalues are smoothed like a quadrature of so many nodes.
EXACT_NODES = 30

# Width of the Gaussians on the symmetric-log axis, in decades.
SYMLOG_BANDWIDTH = 0.05

# Positions evaluated at once against all nodes.
PAIRS_AT_ONCE = 2**22

QUANTITIES = ("density", "cumulative")


@dataclass(frozen=True, eq=False)
class Outliers:
    """Eigenvalues outside the bulk of a spectrum, at either end; see SpectralDensity.outliers.

    Attributes:
        count: number of distinct values found outside, len(values); copies of one eigenvalue count once.
        values: their places, ascending.
        lower, upper: ends of the bulk: the outermost values that are no outliers.
        mass: estimated number of eigenvalues outside, copies counted; mass_stderr: its standard error.
        criterion: in words.
    """

    count: int
    values: Array
    lower: float
    upper: float
    mass: float
    mass_stderr: float
    criterion: str


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
        typical = _weighted_quantile(np.concatenate(distances), np.concatenate(shares), 0.5)
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
        What is covered is the density at the same bandwidth; the error of the quadrature itself is not in it, which is
        negligible where `bandwidth` is not below the default. With two or three probes an upper end may be infinite.

        Raises:
            InputError: a value that does not fit, or fewer than two probes.
        """
        require_choice("quantity", quantity, QUANTITIES)
        if not 0 < level < 1:
            raise InputError(f"level must lie between 0 and 1, got {level}")
        samples = self._per_probe(x, bandwidth, quantity)
        mean, stderr = samples.mean(axis=0), self._stderr(samples)
        if self.exact:
            return Interval(mean, mean)
        if self.probes < 2:
            raise InputError("a confidence band needs at least two probes, this density has one")
        from scipy.special import stdtrit

        quantile = float(stdtrit(self.probes - 1, (1 + level) / 2))
        if quantity == "density":
            return _interval(mean, np.divide(stderr, mean, out=np.zeros_like(mean), where=mean > 0), quantile)
        # The odds of the rarer side: near either end it is few eigenvalues that count.
        rarer = np.clip(np.minimum(mean, 1 - mean), 0.0, None)
        known = rarer * (1 - rarer)
        relative = np.divide(stderr, known, out=np.zeros_like(mean), where=known > 0)
        odds = _interval(rarer / (1 - rarer), relative, quantile)
        lower, upper = (1 - 1 / (1 + end) for end in (odds.lower, odds.upper))
        return Interval(np.where(mean <= 0.5, lower, 1 - upper), np.where(mean <= 0.5, upper, 1 - lower))

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
        """`points` places [points], evenly spaced over the range of eigenvalues and four bandwidths more."""
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
        """Standard error of `moment`; 0 if exact, nan with a single probe."""
        return float(self._stderr(self._moments(k)))

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
        for name, value in (("gap", gap), ("share", share)):
            if not 0 < value < 1:
                raise InputError(f"{name} must lie between 0 and 1, got {value}")
        merged = self._merged()
        places, weights = (np.concatenate(parts) for parts in zip(*merged, strict=True))
        counted = weights * self.dimension >= NEGLIGIBLE
        places, weights = places[counted], weights[counted]
        middle = _weighted_quantile(places, weights, 0.5)
        radius = _weighted_quantile(np.abs(places - middle), weights, 1 - share)
        rounding = self._rounding
        above, below = (_bulk_end(side * (places - middle), radius, gap, rounding) for side in (1.0, -1.0))
        upper, lower = float(places[places - middle <= above].max()), float(places[middle - places <= below].min())
        ends = [
            [(nodes[nodes < lower - rounding], shares[nodes < lower - rounding]) for nodes, shares in merged],
            [(nodes[nodes > upper + rounding], shares[nodes > upper + rounding]) for nodes, shares in merged],
        ]
        values = np.concatenate([_distinct(end, STRAY / self.dimension) for end in ends])
        mass = self.dimension * np.array([sum(end[probe][1].sum() for end in ends) for probe in range(self.probes)])
        return Outliers(
            count=len(values),
            values=values,
            lower=lower,
            upper=upper,
            mass=float(mass.mean()),
            mass_stderr=float(self._stderr(mass)),
            criterion=(
                f"beyond the innermost gap of more than {gap:g} of the distance from the median, farther from it than "
                f"{1 - share:.0%} of the eigenvalues"
            ),
        )

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

    def _merged(self) -> list[tuple[Array, Array]]:
        """Nodes, ascending, and weights of every probe, with nodes that differ by rounding put together."""
        result = []
        for nodes, weights in zip(self.nodes, self.weights, strict=True):
            seen = np.argsort(nodes)[(weights > 0)[np.argsort(nodes)]]
            new = np.diff(nodes[seen], prepend=-np.inf) > self._rounding
            starts = np.flatnonzero(new)
            together = np.add.reduceat(weights[seen], starts)
            result.append((np.add.reduceat(nodes[seen] * weights[seen], starts) / together, together))
        return result

    def _resolved(self) -> list[tuple[Array, Array]]:
        """Nodes, each once and ascending, and weights of every probe; of exact eigenvalues EXACT_NODES quantiles."""
        if not self.exact:
            return [
                (nodes[weights > 0], weights[weights > 0])
                for nodes, weights in zip(self.nodes, self.weights, strict=True)
            ]
        values = self.nodes[0, self.weights[0] > 0]
        count = min(EXACT_NODES, len(values))
        ranks = ((np.arange(count) + 0.5) / count * len(values)).astype(np.int64)
        nodes, multiples = np.unique(np.sort(values)[ranks], return_counts=True)
        return [(nodes, multiples / count)]

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

    def _stderr(self, samples: Array) -> Array:
        """Standard error [...] of the mean of samples [probes, ...]; 0 if exact, nan of a single probe."""
        if self.exact:
            return np.zeros(samples.shape[1:])
        if self.probes < 2:
            return np.full(samples.shape[1:], np.nan)
        result: Array = samples.std(axis=0, ddof=1) / np.sqrt(self.probes)
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
        from scipy.special import ndtr

        places = np.asarray(x, dtype=np.float64)
        if not np.isfinite(places).all():
            raise InputError("x must be finite numbers")
        step = quantity == "cumulative" and bandwidth is not None and bandwidth == 0
        width = 0.0 if step else self._bandwidth(bandwidth)
        flat = places.ravel()
        result = np.empty((self.probes, flat.size))
        stride = max(1, PAIRS_AT_ONCE // self.nodes.shape[1])
        for start in range(0, flat.size, stride):
            some = flat[start : start + stride, None]
            for probe, (nodes, weights) in enumerate(zip(self.nodes, self.weights, strict=True)):
                if step:
                    shares = np.heaviside(some - nodes, 0.5)
                elif quantity == "cumulative":
                    shares = ndtr((some - nodes) / width)
                else:
                    shares = np.exp(-0.5 * ((some - nodes) / width) ** 2) / (width * np.sqrt(2 * np.pi))
                result[probe, start : start + stride] = shares @ weights
        return result.reshape(self.probes, *places.shape)


def spectral_density(
    matrix: Any, probes: int = 8, steps: int = 30, seed: int = 0, progress: Progress | None = None
) -> SpectralDensity:
    """The distribution of a symmetric matrix's eigenvalues, by stochastic Lanczos quadrature.

    All probes go together, one block of columns a step, each with a basis of its own that is orthogonalized twice. A
    matrix of no more than `steps` rows is taken whole: P products, and no error.

    Probes are uniform on the unit sphere, not random signs: signs see nothing of the eigenvector (e_1 + e_2) / sqrt(2)
    half of the time, and their errors depend on the basis; on the sphere every eigenvector's weight times P is nearly
    chi-square with one degree of freedom, which `outliers` and the standard errors build on.

    Args:
        matrix: a symmetric operator or dense matrix [P, P] (see as_operator); if its type does not say that it is
            symmetric, two products ask.
        probes: number of independent random vectors; the standard error falls with its square root, from about
            sqrt(2 / P) relative for one.
        steps: products per probe, which set the resolution: about the width of the spectrum over `steps`.
        seed: root of the random streams; equal seeds give equal numbers, more probes begin with the same ones.
        progress: called with (products done, products in all).

    Raises:
        InputError: a value that does not fit, a matrix that is not symmetric.
        TooLargeError: one probe's basis does not fit in half of the memory that is left.
        DataError: a product is not finite.
    """
    operator = as_operator(matrix)
    require_positive_int("probes", probes)
    require_positive_int("steps", steps)
    if operator.dtype not in (torch.float32, torch.float64):
        raise InputError(f"the matrix must be float32 or float64, got {operator.dtype}")
    asked = require_symmetric(operator)
    if operator.shape[0] <= steps:
        return _exact_density(operator, probes, steps, asked, progress)
    whole, done = asked + probes * steps, asked
    nodes: list[Array] = []
    weights: list[Array] = []
    shortest = steps
    group = _probes_at_once(operator, probes, steps)
    for start in range(0, probes, group):
        starts = _unit_probes(operator, seed, range(start, min(start + group, probes)))
        before = done
        report = None if progress is None else lambda count: progress(before + count, whole)  # noqa: B023
        recurrences = lanczos(operator, starts, steps, report)
        done += recurrences.products
        shortest = min(shortest, int(recurrences.lengths.min()))
        for collected, some in zip((nodes, weights), recurrences.quadratures(), strict=True):
            collected.append(some)
    exhausted = "" if shortest == steps else f"; a Krylov space was exhausted after {shortest} steps"
    return SpectralDensity(
        nodes=np.concatenate(nodes),
        weights=np.concatenate(weights),
        dimension=operator.shape[0],
        exact=False,
        products=done,
        provenance=_provenance(operator, "stochastic Lanczos quadrature", seed),
        message=f"{probes} probes of {steps} steps{exhausted}",
    )


def jensen_shannon_distance(a: SpectralDensity, b: SpectralDensity, bandwidth: float | None = None) -> float:
    """Distance between two spectra, from 0 (equal) to 1 (nowhere in common): how heterogeneous two blocks are.

    The square root of the Jensen-Shannon divergence in bits, sqrt(KL(p || m) / 2 + KL(q || m) / 2) with
    m = (p + q) / 2, of the two densities smoothed with one bandwidth; a metric (Endres & Schindelin 2003). Zhang et al.
    (arXiv:2402.16788) compare the blocks of a Hessian so. Scales are compared, too: a block and its double differ.

    Args:
        a, b: spectra, of matrices of any sizes, exact or estimated.
        bandwidth: standard deviation of the Gaussians, in the matrices' units; the larger of the two defaults unless
            told, with which neither spectrum shows single nodes.

    Raises:
        InputError: a bandwidth that is not positive, or lost in the rounding of the largest eigenvalue.
    """
    largest = max(abs(end) for density in (a, b) for end in density.eigenvalue_range)
    width = max(a.default_bandwidth, b.default_bandwidth) if bandwidth is None else float(bandwidth)
    if bandwidth is None and width == 0:
        return 0.0  # two zero matrices
    if not (np.isfinite(width) and width > np.finfo(np.float64).eps * largest):
        raise InputError(f"bandwidth must be positive and more than rounding of the eigenvalues, got {width}")
    (places, p), (others, q) = _on_grid(a, width), _on_grid(b, width)
    common = np.union1d(places, others)
    P, Q = np.zeros(len(common)), np.zeros(len(common))
    P[np.searchsorted(common, places)], Q[np.searchsorted(common, others)] = p, q
    M = (P + Q) / 2
    divergence = sum(float((X[X > 0] * np.log2(X[X > 0] / M[X > 0])).sum()) / 2 for X in (P, Q))
    return float(np.sqrt(min(max(divergence, 0.0), 1.0)))


def to_symlog(x: npt.ArrayLike, threshold: float) -> Array:
    """Coordinate u = sign(x) log10(1 + |x| / threshold) of eigenvalues x [...]."""
    values = np.asarray(x, dtype=np.float64)
    result: Array = np.sign(values) * np.log1p(np.abs(values) / threshold) / np.log(10)
    return result


def from_symlog(u: npt.ArrayLike, threshold: float) -> Array:
    """Eigenvalues [...] at the coordinates u [...]; inverse of `to_symlog`."""
    coordinates = np.asarray(u, dtype=np.float64)
    result: Array = np.sign(coordinates) * threshold * np.expm1(np.abs(coordinates) * np.log(10))
    return result


def _on_grid(density: SpectralDensity, width: float) -> tuple[npt.NDArray[np.int64], Array]:
    """Numbers of the grid points (multiples of width / POINTS_PER_WIDTH) with any mass, and the mass there.

    Only the neighbourhoods of nodes are held: outliers may be a million widths away. A node between two grid points is
    shared out between them.
    """
    seen = density.weights > 0
    positions = density.nodes[seen] / width * POINTS_PER_WIDTH
    shares = density.weights[seen] / density.probes
    floor = np.floor(positions)
    fraction = positions - floor
    numbers, index = np.unique(np.concatenate([floor, floor + 1]).astype(np.int64), return_inverse=True)
    masses = np.bincount(index, np.concatenate([shares * (1 - fraction), shares * fraction]))
    reach = int(REACH * POINTS_PER_WIDTH)
    offsets = np.arange(-reach, reach + 1)
    kernel = np.exp(-0.5 * (offsets / POINTS_PER_WIDTH) ** 2)
    grid = np.unique((numbers[:, None] + offsets).ravel())
    result = np.zeros(len(grid))
    for offset, height in zip(offsets, kernel / kernel.sum(), strict=True):
        result[np.searchsorted(grid, numbers + offset)] += height * masses
    return grid, result / result.sum()


def _exact_density(
    operator: Operator, probes: int, steps: int, asked: int, progress: Progress | None
) -> SpectralDensity:
    """All eigenvalues with equal weights, in every probe's row."""
    size = operator.shape[0]
    matrix = operator.dense().cpu().double()
    if not bool(torch.isfinite(matrix).all()):
        raise DataError("a product of the operator is not finite: look for nan or overflow in the loss or the matrix")
    if progress is not None:
        progress(asked + size, asked + size)
    scale = power_of_two(float(matrix.abs().max()))
    values = torch.linalg.eigvalsh((matrix + matrix.T) / (2 * scale)).numpy() * scale
    nodes, weights = np.zeros((probes, steps)), np.zeros((probes, steps))
    nodes[:, :size], weights[:, :size] = values, 1 / size
    return SpectralDensity(
        nodes=nodes,
        weights=weights,
        dimension=size,
        exact=True,
        products=asked + size,
        provenance=_provenance(operator, "dense", None),
        message=f"all {size} eigenvalues, since there are no more than steps",
    )


def _unit_probes(operator: Operator, seed: int, numbers: range) -> torch.Tensor:
    """Probes [len(numbers), P], uniform on the unit sphere."""
    rows = torch.empty(len(numbers), operator.shape[0], dtype=operator.dtype, device=operator.device)
    for row, number in zip(rows, numbers, strict=True):
        probe = normal((operator.shape[0],), stream(seed, "spectral_density", number))
        row.copy_(probe / probe.norm())
    return rows


def _probes_at_once(operator: Operator, probes: int, steps: int) -> int:
    """How many probes go together: no more than the operator takes in a pass, nor than fit in memory."""
    # Beside the basis: the vector, its image, their copies and what an orthogonalization subtracts.
    bytes_each = (steps + 6) * operator.shape[0] * torch.finfo(operator.dtype).bits // 8
    available = available_bytes(operator.device)
    fitting = int(MEMORY_SHARE * available) // bytes_each
    if fitting < 1:
        raise TooLargeError(
            f"a probe of {steps} steps needs {human_bytes(bytes_each)}, but {MEMORY_SHARE:.0%} of the "
            f"{human_bytes(available)} available on {operator.device} is less; take fewer steps"
        )
    return min(probes, operator.columns_per_pass, fitting)


def _provenance(operator: Operator, method: str, seed: int | None) -> Provenance:
    return Provenance(
        engine=f"spectral density: {method}; {operator.engine}",
        dtype=str(operator.dtype).removeprefix("torch."),
        device=str(operator.device),
        data_fingerprint=operator.data_fingerprint,
        seed=seed,
    )


def _interval(mean: Array, relative: Array, quantile: float) -> Interval:
    """Student interval of the inverse cube root of positive numbers with `relative` standard errors."""
    shift = quantile * relative / 3
    growth = np.full_like(mean, np.inf)
    np.power(1 - shift, -3.0, out=growth, where=shift < 1)
    upper = np.multiply(mean, growth, out=np.zeros_like(mean), where=mean > 0)
    return Interval(mean * (1 + shift) ** -3.0, upper)


def _weighted_quantile(values: Array, weights: Array, level: float) -> float:
    """The smallest value with at least `level` of the weight at or below it."""
    order = np.argsort(values)
    # Sums of many equal weights fall short of round levels by rounding.
    below = np.cumsum(weights[order]) * (1 + 1e-12)
    return float(values[order][min(int(np.searchsorted(below, level * weights.sum())), len(values) - 1)])


def _distinct(end: list[tuple[Array, Array]], stray: float) -> Array:
    """Places of the eigenvalues at one end, given every probe's nodes there, and weights.

    The probes whose number of nodes (of more than `stray` weight) is the median number give the places: a probe may
    miss an eigenvalue that it is nearly orthogonal to, or have a node on the way to where it belongs.
    """
    solid = [(nodes[weights > stray], weights[weights > stray]) for nodes, weights in end]
    numbers = [len(nodes) for nodes, _ in solid]
    number = sorted(numbers)[len(numbers) // 2]
    places = np.array([nodes for nodes, _ in solid if len(nodes) == number])
    weights = np.array([weights for nodes, weights in solid if len(nodes) == number])
    result: Array = (places * weights).sum(axis=0) / weights.sum(axis=0)
    return result


def _bulk_end(distances: Array, radius: float, gap: float, rounding: float) -> float:
    """Distance of the bulk's end from the median, towards positive `distances`; infinite if nothing is beyond."""
    outward = np.sort(distances[distances > 0])
    inner = np.concatenate([[0.0], outward[:-1]])
    wide = (outward > radius) & (outward - inner > gap * outward) & (outward - inner > rounding)
    return float(inner[np.argmax(wide)]) if wide.any() else float("inf")
