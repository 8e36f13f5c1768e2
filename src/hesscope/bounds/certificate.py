"""A bound with every ingredient that it was made of, so that it can be derived again by hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isnan, log
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from hesscope.bounds.arguments import require_delta, require_nats, require_risk
from hesscope.bounds.bernoulli import kl_inverse
from hesscope.bounds.forms import catoni_bound, confidence_cost, least_samples, maurer_bound, mcallester_bound
from hesscope.bounds.gaussians import GaussianKL
from hesscope.bounds.grid import VarianceGrid
from hesscope.bounds.monte_carlo import monte_carlo_upper
from hesscope.core.checks import require_positive_int
from hesscope.core.errors import InputError
from hesscope.core.real_numbers import require_positive
from hesscope.core.records import Provenance, require_xarray_kind

if TYPE_CHECKING:
    import xarray as xr

NUMBERS = ("empirical_risk", "draws", "risk_stderr", "n", "grid_size", "delta", "delta_monte_carlo")


class Row(NamedTuple):
    """One ingredient: its name, its value as text of 12 digits, and what it is."""

    name: str
    value: str
    meaning: str


@dataclass(frozen=True)
class Certificate:
    """An upper bound of the Gibbs classifier's risk, which classifies each input by a network drawn from the posterior.

    With probability at least 1 - delta over the n samples and the Monte Carlo draws, the risk is at most `bound`. This
    holds for losses in [0, 1] and independent, identically distributed samples; for a prior that is Gaussian around a
    mean that was fixed without the samples, with one variance for each group of parameters, from a grid that was too;
    and for draws that were made after the posterior was chosen.

    The samples' share of delta covers all posteriors and all variances of the grid at once. The draws' share does not:
    the best of K certificates on one network costs K times delta_monte_carlo, and other groups, grids or prior means
    are other bounds, of which the best costs the sum of their deltas.

    Attributes:
        empirical_risk: the mean over the draws of the drawn networks' mean loss on the samples, in [0, 1].
        draws: number of independent draws; risk_stderr: standard error of empirical_risk, nan from one draw.
        n: number of samples.
        kl_by_group: KL(posterior || prior) of each group of parameters, in nats.
        prior_variances: the grid's variance that was chosen for each group.
        grid_size: number of variances in the grid.
        delta: probability with which the bound may fail; delta_monte_carlo: the part of it for the draws.
        classes: number of classes, None if there are none.
        provenance: how it was made.

    Raises:
        InputError: a value outside its range, or groups that differ.

    Source: MATH.md, section 6; [W], arXiv:2010.04261; [DR], arXiv:1703.11008.
    """

    empirical_risk: float
    draws: int
    risk_stderr: float
    n: int
    kl_by_group: Mapping[str, GaussianKL]
    prior_variances: Mapping[str, float]
    grid_size: int
    delta: float
    delta_monte_carlo: float
    classes: int | None
    provenance: Provenance

    def __post_init__(self) -> None:
        require_risk("empirical_risk", self.empirical_risk)
        for name in ("draws", "n", "grid_size"):
            require_positive_int(name, getattr(self, name))
        if not (self.draws == 1 and isnan(self.risk_stderr)):
            require_nats("risk_stderr", self.risk_stderr)
        require_delta("delta", self.delta)
        require_delta("delta_monte_carlo", self.delta_monte_carlo)
        if not self.delta_monte_carlo < self.delta:
            raise InputError(
                f"delta_monte_carlo must be below delta, of which it is a part, got {self.delta_monte_carlo!r} of "
                f"{self.delta!r}"
            )
        if self.classes is not None:
            require_positive_int("classes", self.classes)
        if not self.kl_by_group or self.kl_by_group.keys() != self.prior_variances.keys():
            raise InputError(
                "kl_by_group and prior_variances must name the same groups, at least one, got "
                f"{list(self.kl_by_group)} and {list(self.prior_variances)}"
            )
        for group, kl in self.kl_by_group.items():
            require_nats(f"kl_by_group[{group!r}].displacement", kl.displacement)
            require_nats(f"kl_by_group[{group!r}].variance", kl.variance)
            require_positive(f"prior_variances[{group!r}]", self.prior_variances[group])
        object.__setattr__(self, "kl_by_group", dict(self.kl_by_group))
        object.__setattr__(self, "prior_variances", {group: self.prior_variances[group] for group in self.kl_by_group})

    @property
    def kl(self) -> float:
        """KL(posterior || prior) of all groups together, in nats: the groups are independent in both."""
        return self._kl_of_means + self._kl_of_variances

    @property
    def grid_cost(self) -> float:
        """Groups times ln(grid_size), in nats: the union bound over the prior variances (see VarianceGrid.cost)."""
        return len(self.prior_variances) * log(self.grid_size)

    @property
    def delta_pac_bayes(self) -> float:
        """The part of delta for the samples."""
        return self.delta - self.delta_monte_carlo

    @property
    def risk_upper(self) -> float:
        """Upper confidence bound of the Gibbs classifier's risk on the samples (see `monte_carlo_upper`)."""
        return monte_carlo_upper(self.empirical_risk, self.draws, self.delta_monte_carlo)

    @property
    def complexity(self) -> float:
        """(kl + grid_cost + ln(2 sqrt(n)/delta_pac_bayes)) / n, in nats per sample."""
        return (self.kl + self.grid_cost + confidence_cost(self.n, self.delta_pac_bayes)) / self.n

    @property
    def bound(self) -> float:
        """Maurer's: kl_inverse(risk_upper, complexity)."""
        return self._maurer(self.risk_upper)

    @property
    def bound_stderr(self) -> float:
        """Half of what the bound moves by when empirical_risk moves from one standard error below to one above it.

        It says how far the bound would be elsewhere with other draws; the bound itself holds without it.
        """
        low, high = (min(1.0, max(0.0, self.empirical_risk + sign * self.risk_stderr)) for sign in (-1, 1))
        if isnan(self.risk_stderr):
            return self.risk_stderr
        low, high = (monte_carlo_upper(mean, self.draws, self.delta_monte_carlo) for mean in (low, high))
        return (self._maurer(high) - self._maurer(low)) / 2

    @property
    def mcallester(self) -> float:
        """McAllester's form from the same ingredients, never below `bound`."""
        return mcallester_bound(self.risk_upper, self.kl + self.grid_cost, self.n, self.delta_pac_bayes)

    @property
    def catoni(self) -> float:
        """Catoni's form from the same ingredients. It holds by itself, as `bound` does, and not the smaller of both."""
        return catoni_bound(self.risk_upper, self.kl + self.grid_cost, self.n, self.delta_pac_bayes)

    @property
    def guessing_rate(self) -> float | None:
        """1 - 1/C, the risk of guessing: a bound that is not below it says nothing. None without classes."""
        return None if self.classes is None else 1 - 1 / self.classes

    def parts(self) -> dict[str, float]:
        """Contributions that add up to `bound`.

        The bound is not a sum. Each part is what the bound grows by when its term is added, in this order, to those
        before it: the Monte Carlo error of the risk, then inside of the inverse of the kl the cost of confidence and
        grid, the divergence of the means, and that of the variances. In another order the parts would be others.
        """
        cost = self.grid_cost + confidence_cost(self.n, self.delta_pac_bayes)
        risk = self.risk_upper
        reached = [self.empirical_risk, risk]
        reached += [kl_inverse(risk, nats / self.n) for nats in (cost, cost + self._kl_of_means)]
        sizes = np.diff([0.0, *reached, self.bound]).tolist()
        names = ("empirical risk", "Monte Carlo", "confidence and grid", "KL of means", "KL of variances")
        return dict(zip(names, sizes, strict=True))

    def table(self) -> list[Row]:
        """Every ingredient and every step, in the order in which the bound can be derived from them by hand."""

        def row(name: str, value: float, meaning: str) -> Row:
            return Row(name, f"{value:.12g}", meaning)

        groups = len(self.prior_variances)
        rows = [
            row(
                "empirical risk",
                self.empirical_risk,
                "mean loss on the samples, over networks drawn from the posterior",
            ),
            row("standard error", self.risk_stderr, "of the empirical risk, between draws"),
            row("draws", self.draws, "number of networks drawn"),
            row("n", self.n, "number of samples"),
            row("delta", self.delta, "probability with which the bound may fail"),
            row("delta, Monte Carlo", self.delta_monte_carlo, "the part of delta for the draws"),
            row("delta, PAC-Bayes", self.delta_pac_bayes, "the rest, for the samples"),
            row("risk, upper", self.risk_upper, "largest p: kl(empirical risk || p) <= ln(1/delta, Monte Carlo)/draws"),
        ]
        for group, kl in self.kl_by_group.items():
            prior = self.prior_variances[group]
            rows += [
                row(f"prior variance, {group}", prior, "chosen from the grid"),
                row(f"KL of means, {group}", kl.displacement, "nats: |distance of means|^2/(2 prior variance)"),
                row(
                    f"KL of variances, {group}",
                    kl.variance,
                    "nats: sum of (x - 1 - ln x)/2, x = variance/prior variance",
                ),
            ]
        rows += [
            row("KL", self.kl, "nats: sum over the groups"),
            row("grid size", self.grid_size, "number of prior variances to choose from"),
            row("grid cost", self.grid_cost, f"nats: ln(grid size) for each of {groups} groups"),
            row("confidence", confidence_cost(self.n, self.delta_pac_bayes), "nats: ln(2 sqrt(n)/(delta, PAC-Bayes))"),
            row("complexity", self.complexity, "nats per sample: (KL + grid cost + confidence)/n"),
            row("bound", self.bound, "largest p: kl(risk, upper || p) <= complexity (Maurer)"),
            row("bound, standard error", self.bound_stderr, "of the bound, from that of the empirical risk"),
            row("McAllester", self.mcallester, "risk, upper + sqrt(complexity/2), at most 1"),
            row("Catoni", self.catoni, "Catoni's form of the same, paid for its own grid of scales"),
        ]
        if self.guessing_rate is not None:
            rows.append(row("guessing", self.guessing_rate, f"risk of guessing among {self.classes} classes"))
        return rows

    def to_xarray(self) -> xr.Dataset:
        """The divergences and prior variances by group, and the numbers; `from_xarray` is the inverse.

        The bound and its standard error are there for readers without hesscope.
        """
        import xarray as xr

        divergences = self.kl_by_group.values()
        return xr.Dataset(
            {
                "kl_of_means": ("group", [kl.displacement for kl in divergences]),
                "kl_of_variances": ("group", [kl.variance for kl in divergences]),
                "prior_variance": ("group", [float(value) for value in self.prior_variances.values()]),
            },
            coords={"group": list(self.kl_by_group)},
            attrs={
                "record": "Certificate",
                **{name: getattr(self, name) for name in NUMBERS},
                "classes": -1 if self.classes is None else self.classes,
                "bound": self.bound,
                "bound_stderr": self.bound_stderr,
                **self.provenance.attributes(),
            },
        )

    @classmethod
    def from_xarray(cls, dataset: xr.Dataset) -> Certificate:
        """Inverse of `to_xarray`.

        Raises:
            InputError: the data set was not made by `to_xarray`.
        """
        require_xarray_kind(dataset, "Certificate")
        attributes = dataset.attrs
        groups = [str(group) for group in dataset["group"].values]
        divergences = zip(dataset["kl_of_means"].values, dataset["kl_of_variances"].values, strict=True)
        return cls(
            empirical_risk=float(attributes["empirical_risk"]),
            draws=int(attributes["draws"]),
            risk_stderr=float(attributes["risk_stderr"]),
            n=int(attributes["n"]),
            kl_by_group={
                group: GaussianKL(float(displacement), float(variance))
                for group, (displacement, variance) in zip(groups, divergences, strict=True)
            },
            prior_variances=dict(zip(groups, map(float, dataset["prior_variance"].values), strict=True)),
            grid_size=int(attributes["grid_size"]),
            delta=float(attributes["delta"]),
            delta_monte_carlo=float(attributes["delta_monte_carlo"]),
            classes=int(attributes["classes"]) if attributes["classes"] >= 0 else None,
            provenance=Provenance.from_attributes(attributes),
        )

    @property
    def _kl_of_means(self) -> float:
        return sum(kl.displacement for kl in self.kl_by_group.values())

    @property
    def _kl_of_variances(self) -> float:
        return sum(kl.variance for kl in self.kl_by_group.values())

    def _maurer(self, risk: float) -> float:
        return maurer_bound(risk, self.kl + self.grid_cost, self.n, self.delta_pac_bayes)


def require_enough_samples(n: int, delta: float, groups: int, grid: VarianceGrid, vacuous: float = 0.5) -> None:
    """Raise if no posterior can give a bound below `vacuous`: not even the prior itself, if it made no errors.

    Args:
        n: number of samples; delta: probability with which the bound may fail; groups: of parameters, each with a
            variance of its own from the grid.
        vacuous: in (0, 1), the guessing rate 1 - 1/C.

    Raises:
        InputError: too few samples (the message says how many are needed), or a value outside its range.
    """
    require_positive_int("n", n)
    require_delta("delta", delta)
    require_delta("vacuous", vacuous)
    cost = grid.cost(groups)
    needed = least_samples(cost, delta, vacuous)
    if n < needed:
        reached = maurer_bound(0.0, cost, n, delta)
        raise InputError(
            f"n = {n} samples are too few for a grid of {len(grid)} variances for each of {groups} groups: with "
            f"delta = {delta:g} even the prior itself without errors has a bound of {reached:.3g}, which must be below "
            f"{vacuous:.3g}; pass at least n = {needed}, fewer groups or a smaller grid"
        )
