"""The words and tables of the page of generalization bounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, hypot, isfinite, log10
from typing import TYPE_CHECKING

from hesscope.dynamics.dynamic_force import layer_words
from hesscope.layerwise.bound_record import PacBayesBound
from hesscope.report.style import number

if TYPE_CHECKING:
    import xarray as xr

POSTERIOR_NAMES = {
    "isotropic": "isotropic",
    "diagonal": "diagonal",
    "diagonal_optimized": "diagonal, optimized",
    "kronecker": "Kronecker",
    "kronecker_optimized": "Kronecker, optimized",
    "kronecker_refreshed": "Kronecker, refreshed",
}
# In two sentences each.
POSTERIOR_MEANINGS = {
    "isotropic": "All weights of a layer have one standard deviation. It knows nothing of which directions matter.",
    "diagonal": "Every weight has a standard deviation of its own, in closed form. Weights that the loss hardly "
    "depends on are drawn widely, and those that it depends on sharply stay near their trained values.",
    "diagonal_optimized": "It begins as the diagonal one, every weight with a standard deviation of its own. Then "
    "stochastic gradient steps on the bound itself move means and deviations.",
    "kronecker": "Every direction of a basis has a standard deviation of its own, in closed form; the basis is that of "
    "the eigenvectors u ⊗ v of the layer’s Kronecker factors E[M] and E[xxᵀ]. It can be wide along combinations of "
    "weights that are flat together, although each weight by itself is sharp.",
    "kronecker_optimized": "It begins as the Kronecker one, in the same basis. Then stochastic gradient steps on the "
    "bound itself move means and deviations along the basis.",
    "kronecker_refreshed": "It is optimized as the one before. From time to time the Kronecker factors are measured "
    "anew where the optimization has come to, and their eigenvectors are the new basis.",
}
# Which pair of bounds differs in the basis alone: words, with the basis, without it; what headlines tell first.
PAIRS = (
    ("optimized", "kronecker_optimized", "diagonal_optimized"),
    ("in closed form", "kronecker", "diagonal"),
)
# Differences of so many standard errors and more are told as differences.
CLEAR = 2
# A bound that so many standard errors of the true risk are above has failed.
FAILED = 3
# Decimals of a percentage, at least and at most.
DECIMALS = (1, 4)
# A prior whose network errs less often than this share of guessing may have been trained.
SEEN = 0.5
PERCENT = "\N{NO-BREAK SPACE}%"
UNKNOWN = "—"
COLUMNS = (
    "labels",
    "posterior",
    "bound",
    "± points",
    "risk on the samples",
    "risk held out",
    "KL (nats)",
    "KL / n",
    "optimization",
    "time",
)


@dataclass(frozen=True)
class Shown:
    """A bound with what is known beside it.

    Attributes:
        record: the bound; labels: "true" or "random".
        held_out_risk: of networks drawn from the posterior, nan if not known; held_out_stderr: its standard error.
        held_out_what: on what it was measured, in words; is_exact: whether that is the whole population.
        network_held_out: risk of the trained network itself on the same, nan if not known.
        network, data: in words.
    """

    record: PacBayesBound
    labels: str
    held_out_risk: float
    held_out_stderr: float
    held_out_what: str
    is_exact: bool
    network_held_out: float
    network: str
    data: str

    @property
    def bound(self) -> float:
        """The bound of the risk."""
        return self.record.bound

    @property
    def name(self) -> str:
        """The posterior's, as figures and tables have it."""
        return posterior_name(self.record.posterior)

    @property
    def guessing(self) -> float | None:
        """The risk of guessing, None if there are no classes."""
        return self.record.certificate.guessing_rate

    @property
    def is_vacuous(self) -> bool:
        """Whether the bound says no more than guessing, or than that risks are at most 1."""
        return self.bound >= (1.0 if self.guessing is None else self.guessing)

    @property
    def has_failed(self) -> bool:
        """Whether the true risk, where it is known, is above the bound."""
        error = self.held_out_stderr if isfinite(self.held_out_stderr) else 0.0
        return self.is_exact and self.held_out_risk - FAILED * error > self.bound


def read(results: Sequence[xr.Dataset]) -> list[Shown]:
    """The data sets that `hesscope bound` stores, in their order."""
    return [
        Shown(
            record=PacBayesBound.from_xarray(each),
            labels=str(each.attrs["labels"]),
            held_out_risk=float(each.attrs["held_out_risk"]),
            held_out_stderr=float(each.attrs["held_out_stderr"]),
            held_out_what=str(each.attrs["held_out_what"]),
            is_exact=bool(each.attrs["held_out_exact"]),
            network_held_out=float(each.attrs["network_held_out"]),
            network=str(each.attrs["network"]),
            data=str(each.attrs["data"]),
        )
        for each in results
    ]


def bound_headline(results: Sequence[xr.Dataset]) -> str:
    """What is guaranteed, and how near it is to the truth: one sentence."""
    return headline(read(results))


def bound_sentences(results: Sequence[xr.Dataset]) -> list[str]:
    """The headline, which bound it is of, how near the truth is, what the Kronecker basis bought, the control."""
    shown = read(results)
    return [headline(shown), *findings(shown)]


def bound_table(results: Sequence[xr.Dataset]) -> list[tuple[str, ...]]:
    """A row for every bound, the first row being names of columns; bounds are rounded up."""
    return table(read(results))


# --- numbers ----------------------------------------------------------------------------------------------------------


def rate(value: float, stderr: float = 0.0) -> str:
    """A share as a percentage to the first digit of its standard error; small ones have two significant digits."""
    return f"{100 * value:.{_decimals(value, stderr)}f}{PERCENT}" if isfinite(value) else UNKNOWN


def rate_with_error(value: float, stderr: float) -> str:
    """'1.62 ± 0.03 %'; the share alone where it has no error, a dash where it is not known."""
    if not (isfinite(value) and isfinite(stderr) and stderr > 0):
        return rate(value)
    return f"{rate(value, stderr).removesuffix(PERCENT)} ± {points(stderr)}{PERCENT}"


def guaranteed(bound: float, stderr: float = 0.0) -> str:
    """A bound as a percentage, rounded up so that what is written holds too."""
    places = _decimals(bound, stderr)
    # Less than a billionth of a percent above a written number is rounding of float64, not the bound.
    return f"{ceil(100 * bound * 10**places - 1e-9) / 10**places:.{places}f}{PERCENT}"


def points(stderr: float) -> str:
    """A standard error in percentage points to one digit, a dash where it is not known."""
    return number(100 * stderr, 1) if isfinite(stderr) else UNKNOWN


def confidence(delta: float) -> str:
    """1 - delta, rounded down to a ten-thousandth of a percent: '95 %'."""
    return f"{floor(1e6 * max(0.0, 1 - delta) + 1e-6) / 1e4:g}{PERCENT}"


def nats(divergence: float, least: float = 5e-3) -> str:
    """A divergence, 0 where it is below `least`: what is left of it is rounding."""
    return number(divergence) if divergence >= least else "0"


def duration(seconds: float) -> str:
    """'0.4 s', '12 s', '3 min 20 s', '1 h 5 min'."""
    if round(seconds) < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _decimals(value: float, stderr: float) -> int:
    """Of a percentage: to the first digit of the standard error if there is one."""
    size = 100 * abs(value)
    low, high = DECIMALS
    if isfinite(stderr) and stderr > 0:
        return min(high, max(low, -floor(log10(100 * stderr))))
    return min(high, max(low, 1 - floor(log10(size)))) if 0 < size < 1 else low


# --- sentences --------------------------------------------------------------------------------------------------------


def posterior_name(posterior: str) -> str:
    """As figures and tables have it; one that is not known keeps its own."""
    return POSTERIOR_NAMES.get(posterior, posterior)


def lowest(shown: Sequence[Shown]) -> Shown:
    """That of the lowest bound."""
    return min(shown, key=lambda each: each.bound)


def of_labels(shown: Sequence[Shown], labels: str) -> list[Shown]:
    """Those of one kind of labels."""
    return [each for each in shown if each.labels == labels]


def optimization(each: Shown) -> str:
    """'closed form', '4000 steps', 'step 1200 of 4000'."""
    record = each.record
    if not record.planned_steps:
        return "closed form"
    return f"{record.steps} steps" if record.finished else f"step {record.steps} of {record.planned_steps}"


def headline(shown: Sequence[Shown]) -> str:
    """One sentence: the guarantee and the truth; of random labels alone that of the control."""
    if not shown:
        return "No bound has been computed yet."
    true = of_labels(shown, "true")
    if not true:
        return control_said(shown)
    best = lowest(true)
    bound = guaranteed(best.bound, best.record.certificate.bound_stderr)
    sure = confidence(failure_together(true))  # of the lowest of several bounds less than of each
    said = (
        f"With {sure} confidence the {best.record.risk} of the {_short(best.network)} with random weights is at most "
        f"{bound}"
    )
    if best.is_vacuous:
        said += ", which is no better than guessing"
    return f"{said}: {_truth(best)}." if isfinite(best.held_out_risk) else f"{said}."


def findings(shown: Sequence[Shown]) -> list[str]:
    """Sentences below the headline: which bound it is, how near the truth is, what the basis bought, the control."""
    true = of_labels(shown, "true")
    said = []
    if true:
        said += [_picked_said(true), _nearness_said(lowest(true))]
        said += [basis_said(true, *pair) for pair in PAIRS]
        said += [control_said(shown)] if of_labels(shown, "random") else []
    return [each for each in said if each]


def _picked_said(true: Sequence[Shown]) -> str:
    best = lowest(true)
    posterior = best.name if best.record.finished else f"{best.name}, {optimization(best)}"
    if len(true) == 1:
        return f"The weights are drawn from the posterior “{posterior}” for every input."
    alone = confidence(best.record.certificate.delta)
    return (
        f"This is the lowest of {len(true)} bounds (posterior “{posterior}”, from which the weights are drawn for "
        f"every input); each by itself has {alone} confidence, and the choice costs the rest."
    )


def basis_said(shown: Sequence[Shown], words: str, with_basis: str, without: str) -> str:
    """What the Kronecker basis changed, from two bounds that differ in the basis alone; empty if one is missing."""
    pair = _pair(shown, with_basis, without)
    if pair is None:
        return ""
    kronecker, diagonal = pair
    gain, error, is_clear = _gain(*pair)
    values = (
        f"{guaranteed(kronecker.bound, kronecker.record.certificate.bound_stderr)} against "
        f"{guaranteed(diagonal.bound, diagonal.record.certificate.bound_stderr)} of the diagonal one"
    )
    start = f"{words[0].upper()}{words[1:]}"
    if gain == 0:
        said = f"{start}, the Kronecker basis bought nothing: both bounds are {guaranteed(diagonal.bound)}"
    elif not is_clear:
        said = (
            f"{start}, the Kronecker basis bought nothing that can be told from the errors of the draws: {values}, a "
            f"difference of {_points_with_error(gain, error)}"
        )
    elif gain < 0:
        said = f"{start}, the Kronecker basis bought nothing: it raises the bound by {_points_with_error(-gain, error)}"
        said += f", {values}"
    else:
        said = f"{start}, the Kronecker basis lowers the bound by {_points_with_error(gain, error)}: {values}"
    if kronecker.is_vacuous and diagonal.is_vacuous:
        said += "; neither says more than guessing"
    stopped = [f"{each.name} is at {optimization(each)}" for each in pair if not each.record.finished]
    if stopped:
        said += f" ({' and '.join(stopped)})"
    if set(kronecker.record.fallback) >= set(kronecker.record.certificate.kl_by_group):
        said += "; but every layer fell back to the diagonal, so that there is no Kronecker basis in it"
    return f"{said}."


def finished_pair(shown: Sequence[Shown]) -> tuple[str, Shown, Shown] | None:
    """The first of PAIRS that is there and finished: words, with the basis, without it."""
    for words, with_basis, without in PAIRS:
        pair = _pair(shown, with_basis, without)
        if pair is not None and all(each.record.finished for each in pair):
            return words, *pair
    return None


def basis_card(shown: Sequence[Shown]) -> dict[str, str] | None:
    """What the basis bought as title, value and words below; None if no pair of bounds tells."""
    found = finished_pair(shown)
    if found is None:
        return None
    words, kronecker, diagonal = found
    gain, error, is_clear = _gain(kronecker, diagonal)
    what = "lower than with the diagonal" if gain > 0 else "higher than with the diagonal"
    if gain == 0 or not is_clear:
        what = "lower than with the diagonal: nothing that can be told from the errors of the draws"
    shift = _points_with_error(abs(gain) if is_clear else gain, error if isfinite(error) else 0.0)
    return {"title": f"the Kronecker basis, {words}", "value": shift, "what": what}


def control_said(shown: Sequence[Shown]) -> str:
    """That no bound on random labels is below guessing, or which ones are."""
    random = of_labels(shown, "random")
    below = [each for each in random if each.guessing is not None and not each.is_vacuous]
    best = lowest(random)
    value = guaranteed(best.bound, best.record.certificate.bound_stderr)
    if best.guessing is None:
        return f"On random labels the lowest bound is {value}."
    rest = f"where every classifier errs on {rate(best.guessing)} of new samples"
    if below:
        names = " and ".join(
            f"“{each.name}” ({guaranteed(each.bound, each.record.certificate.bound_stderr)})" for each in below
        )
        return (
            f"On random labels, {rest}, {names} {'are' if len(below) > 1 else 'is'} below guessing: the bound has "
            f"failed there, which may happen in {_delta(best)} of samples and no more."
        )
    return f"On random labels, {rest}, no bound is below guessing, as it should be: the lowest is {value}."


def warnings(shown: Sequence[Shown]) -> list[str]:
    """Priors that may have seen the samples, and bounds that the truth, or what is held out, is above."""
    said = []
    for labels in dict.fromkeys(each.labels for each in shown):
        best = of_labels(shown, labels)[0].record
        guessing = best.certificate.guessing_rate
        if guessing is not None and best.prior_risk < SEEN * guessing:
            said.append(
                f"The network at the prior’s mean errs on only {rate(best.prior_risk)} of samples ({labels} labels). "
                "An initialization guesses: if it was trained on these samples, no bound here holds."
            )
    for each in shown:
        risk = rate_with_error(each.held_out_risk, each.held_out_stderr)
        bound = guaranteed(each.bound, each.record.certificate.bound_stderr)
        where = f"{each.labels} labels, {each.name}"
        if each.has_failed:
            said.append(
                f"This bound has failed ({where}): the true risk is {risk} ({each.held_out_what}), above the bound of "
                f"{bound}. That may happen in {_delta(each)} of samples; if it "
                "happens more often, an assumption below does not hold."
            )
        elif not each.is_exact and each.held_out_risk > each.bound:
            said.append(
                f"The risk held out is above the bound ({where}): {risk} ({each.held_out_what}) against {bound}. "
                "Held-out samples have an error of their own; if there are many of them, their distribution may differ."
            )
    return said


def union_said(shown: Sequence[Shown]) -> str:
    """With what confidence all bounds on the page hold at once."""
    count = len(shown)
    if count == 1:
        return ""
    deltas = [each.record.certificate.delta for each in shown]
    said = (
        f"Each bound holds with its own confidence by itself. All {count} on this page at once, and with them the best "
        f"of them if it is picked afterwards, hold with probability at least 1 − {_sum_words(deltas)} = "
        f"{confidence(sum(deltas))}"
    )
    together = failure_together(shown)
    if together < sum(deltas) * (1 - 1e-9):
        said += (
            f"; counted more closely, {confidence(together)}, since posteriors of one network with the same prior, "
            "layers and grid share the samples’ part of it, and only the draws’ part adds up"
        )
    return f"{said}."


def failure_together(shown: Sequence[Shown]) -> float:
    """Probability, at most, that any of the bounds fails: Maurer's inequality holds for all posteriors at once.

    It is paid once for each network and prior (with its groups and grid); every bound's draws are paid by themselves.
    """
    families: dict[tuple[object, ...], float] = {}
    for each in shown:
        certificate = each.record.certificate
        family = (each.labels, each.network, certificate.n, certificate.grid_size, frozenset(certificate.kl_by_group))
        families[family] = max(families.get(family, 0.0), certificate.delta_pac_bayes)
    return sum(families.values()) + sum(each.record.certificate.delta_monte_carlo for each in shown)


def _sum_words(deltas: Sequence[float]) -> str:
    if len(set(deltas)) == 1:
        return f"{len(deltas)} × {deltas[0]:g}"
    return f"({' + '.join(f'{delta:g}' for delta in deltas)})"


def _delta(each: Shown) -> str:
    return f"{100 * each.record.certificate.delta:g}{PERCENT}"


def _short(network: str) -> str:
    """Its name without the number of parameters."""
    return network.split(", ")[0]


def _truth(each: Shown) -> str:
    risk = rate_with_error(each.held_out_risk, each.held_out_stderr)
    if each.has_failed:
        return f"the truth is {risk}, and so this bound has failed"
    if each.is_exact:
        return f"the truth is {risk}"
    return f"on {each.held_out_what} it is {risk}" if each.held_out_what else f"held out it is {risk}"


def _nearness_said(best: Shown) -> str:
    if not isfinite(best.held_out_risk):
        return "The true risk is not known, and nothing was held out to compare the bound with."
    risk, gap = rate_with_error(best.held_out_risk, best.held_out_stderr), best.bound - best.held_out_risk
    of = "the true risk of the drawn networks" if best.is_exact else "their risk held out"
    times = best.bound / best.held_out_risk if best.held_out_risk > 0 else 0.0
    if gap < 0:
        return f"The bound is {number(-100 * gap, 2)} points below {of}, {risk} ({best.held_out_what})."
    ratio = f", {number(times, 2)} times as high" if times else ""
    return f"The bound is {number(100 * gap, 2)} points above {of}, {risk} ({best.held_out_what}){ratio}."


def _pair(shown: Sequence[Shown], with_basis: str, without: str) -> tuple[Shown, Shown] | None:
    found = {each.record.posterior: each for each in shown}
    return (found[with_basis], found[without]) if with_basis in found and without in found else None


def _gain(kronecker: Shown, diagonal: Shown) -> tuple[float, float, bool]:
    """By how much the basis lowers the bound, the standard error of that, and whether it is more than that."""
    gain = diagonal.bound - kronecker.bound
    error = hypot(kronecker.record.certificate.bound_stderr, diagonal.record.certificate.bound_stderr)
    return gain, error, not isfinite(error) or abs(gain) >= CLEAR * error


def _points_with_error(difference: float, error: float) -> str:
    """'2.3 ± 0.1 points'."""
    value = rate(difference, error).removesuffix(PERCENT).replace("-", "−")
    if not isfinite(error):
        return f"{value} points (error not known)"
    return f"{value} ± {points(error)} points" if error > 0 else f"{value} points"


# --- tables -----------------------------------------------------------------------------------------------------------


def table(shown: Sequence[Shown]) -> list[tuple[str, ...]]:
    """See `bound_table`."""
    rows: list[tuple[str, ...]] = [COLUMNS]
    for each in shown:
        record, certificate = each.record, each.record.certificate
        rows.append(
            (
                each.labels,
                each.name,
                guaranteed(each.bound, certificate.bound_stderr),
                points(certificate.bound_stderr),
                rate(certificate.empirical_risk, certificate.risk_stderr),
                rate_with_error(each.held_out_risk, each.held_out_stderr),
                nats(certificate.kl),
                nats(certificate.kl / certificate.n, 1e-6),
                optimization(each),
                duration(record.seconds),
            )
        )
    return rows


def layer_table(shown: Sequence[Shown]) -> list[tuple[str, ...]]:
    """KL of every layer for every posterior, in nats and as a share of all; the first row being names of columns."""
    groups = list(dict.fromkeys(group for each in shown for group in each.record.certificate.kl_by_group))
    rows = [("layer", *(each.name for each in shown))]
    for group in groups:
        cells = []
        for each in shown:
            kl = each.record.certificate.kl_by_group.get(group)
            whole = each.record.kl
            share = f" ({100 * kl.total / whole:.0f}{PERCENT})" if kl is not None and 0 < whole < float("inf") else ""
            cells.append(UNKNOWN if kl is None else f"{nats(kl.total)}{share}")
        rows.append((layer_words(group), *cells))
    return [*rows, ("all", *(nats(each.record.kl) for each in shown))]


def prior_table(shown: Sequence[Shown]) -> list[tuple[str, ...]]:
    """Standard deviation of the prior in every layer for every posterior, the first row being names of columns."""
    groups = list(dict.fromkeys(group for each in shown for group in each.record.certificate.prior_variances))
    rows = [("layer", *(each.name for each in shown))]
    for group in groups:
        variances = [each.record.certificate.prior_variances.get(group) for each in shown]
        cells = (UNKNOWN if variance is None else number(variance**0.5) for variance in variances)
        rows.append((layer_words(group), *cells))
    return rows


def fallback_table(shown: Sequence[Shown]) -> list[tuple[str, str, str]]:
    """Layers that are diagonal though another basis was asked for: layer, why, of which posteriors."""
    found: dict[tuple[str, str], list[str]] = {}
    for each in shown:
        for group, why in each.record.fallback.items():
            names = found.setdefault((layer_words(group), why), [])
            names += [] if each.name in names else [each.name]
    return [(group, why, "; ".join(names)) for (group, why), names in found.items()]
