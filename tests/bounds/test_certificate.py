"""The certificate: derived again by hand from its own table, refused where it would not hold, and kept in a file."""

from dataclasses import FrozenInstanceError, replace
from math import inf, log, nan, sqrt

import pytest
import xarray as xr
from scipy.optimize import brentq

from hesscope.bounds import (
    DEFAULT_GRID,
    Certificate,
    GaussianKL,
    VarianceGrid,
    bernoulli_kl,
    catoni_bound,
    require_enough_samples,
)
from hesscope.core.errors import InputError
from hesscope.core.records import Provenance

PROVENANCE = Provenance(engine="by hand", dtype="float64", device="cpu", data_fingerprint="abc", seed=3)
CERTIFICATE = Certificate(
    empirical_risk=0.05,
    draws=200,
    risk_stderr=0.004,
    n=40_000,
    kl_by_group={"fc1": GaussianKL(700.0, 1300.0), "fc2": GaussianKL(60.0, 40.0)},
    prior_variances={"fc1": 0.01, "fc2": 0.1},
    grid_size=121,
    delta=0.05,
    delta_monte_carlo=0.01,
    classes=2,
    provenance=PROVENANCE,
)


def largest_p(q, nats):
    """By bisection of the definition of the kl: an inverse that knows nothing of the one under test."""

    def excess(p):
        return (q * log(q / p) if q else 0.0) + (1 - q) * log((1 - q) / (1 - p)) - nats

    return brentq(excess, q + 1e-12, 1 - 1e-15, xtol=1e-15)


def test_by_hand():
    """Every step of the bound, from the ingredients alone."""
    upper = largest_p(0.05, log(1 / 0.01) / 200)
    cost, kl = 2 * log(121), 2100.0
    confidence = log(2 * sqrt(40_000) / 0.04)
    complexity = (kl + cost + confidence) / 40_000
    assert CERTIFICATE.kl == kl
    assert CERTIFICATE.grid_cost == pytest.approx(cost, rel=1e-14)
    assert CERTIFICATE.delta_pac_bayes == pytest.approx(0.04, rel=1e-14)
    assert CERTIFICATE.risk_upper == pytest.approx(upper, rel=1e-11)
    assert CERTIFICATE.complexity == pytest.approx(complexity, rel=1e-14)
    assert CERTIFICATE.bound == pytest.approx(largest_p(upper, complexity), rel=1e-11)
    assert CERTIFICATE.mcallester == pytest.approx(upper + sqrt(complexity / 2), rel=1e-11)
    assert CERTIFICATE.catoni == pytest.approx(catoni_bound(upper, kl + cost, 40_000, 0.04), rel=1e-11)
    moved = [largest_p(largest_p(risk, log(1 / 0.01) / 200), complexity) for risk in (0.046, 0.054)]
    assert CERTIFICATE.bound_stderr == pytest.approx((moved[1] - moved[0]) / 2, rel=1e-8)
    assert CERTIFICATE.guessing_rate == 0.5


def test_table_derives_the_bound():
    """Nothing but the table's own texts is used, and each of its steps follows from rows above it."""
    value = {row.name: float(row.value) for row in CERTIFICATE.table()}
    assert len(value) == len(CERTIFICATE.table())
    groups = [name.removeprefix("prior variance, ") for name in value if name.startswith("prior variance, ")]
    assert groups == ["fc1", "fc2"]
    near = lambda number: pytest.approx(number, rel=1e-10)  # noqa: E731
    assert value["delta, PAC-Bayes"] == near(value["delta"] - value["delta, Monte Carlo"])
    assert value["risk, upper"] == near(
        largest_p(value["empirical risk"], -log(value["delta, Monte Carlo"]) / value["draws"])
    )
    assert value["KL"] == near(
        sum(value[f"KL of {part}, {group}"] for part in ("means", "variances") for group in groups)
    )
    assert value["grid cost"] == near(len(groups) * log(value["grid size"]))
    assert value["confidence"] == near(log(2 * sqrt(value["n"]) / value["delta, PAC-Bayes"]))
    assert value["complexity"] == near((value["KL"] + value["grid cost"] + value["confidence"]) / value["n"])
    assert value["bound"] == near(largest_p(value["risk, upper"], value["complexity"]))
    assert value["McAllester"] == near(value["risk, upper"] + sqrt(value["complexity"] / 2))
    assert value["bound"] < value["Catoni"] < value["McAllester"]
    assert value["guessing"] == 0.5
    assert value["prior variance, fc2"] == 0.1
    assert value["standard error"] == 0.004 and value["bound, standard error"] == near(CERTIFICATE.bound_stderr)
    assert "guessing" not in {row.name for row in replace(CERTIFICATE, classes=None).table()}


def test_parts_add_up_in_their_order():
    parts = CERTIFICATE.parts()
    assert list(parts) == ["empirical risk", "Monte Carlo", "confidence and grid", "KL of means", "KL of variances"]
    assert sum(parts.values()) == pytest.approx(CERTIFICATE.bound, rel=1e-14)
    assert all(part > 0 for part in parts.values())
    # Without the divergences the bound is the sum of the first three; with that of the means alone, of the first four.
    no_kl = {group: GaussianKL(0.0, 0.0) for group in CERTIFICATE.kl_by_group}
    means = {group: GaussianKL(kl.displacement, 0.0) for group, kl in CERTIFICATE.kl_by_group.items()}
    sizes = list(parts.values())
    assert replace(CERTIFICATE, kl_by_group=no_kl).bound == pytest.approx(sum(sizes[:3]), rel=1e-13)
    assert replace(CERTIFICATE, kl_by_group=means).bound == pytest.approx(sum(sizes[:4]), rel=1e-13)
    assert sizes[:2] == pytest.approx([0.05, CERTIFICATE.risk_upper - 0.05], rel=1e-12)


def test_parts_of_a_vacuous_bound_add_up_to_one():
    vacuous = replace(CERTIFICATE, n=20)
    assert vacuous.bound == 1
    assert sum(vacuous.parts().values()) == pytest.approx(1, rel=1e-14)


def test_the_inverse_confirms_itself():
    assert bernoulli_kl(CERTIFICATE.risk_upper, CERTIFICATE.bound) == pytest.approx(CERTIFICATE.complexity, rel=1e-12)


@pytest.mark.parametrize("risk", [0.0, 1.0])
def test_standard_error_at_the_ends_is_clipped(risk):
    certificate = replace(CERTIFICATE, empirical_risk=risk, risk_stderr=0.5)
    ends = [replace(CERTIFICATE, empirical_risk=end).bound for end in ((0.0, 0.5) if risk == 0 else (0.5, 1.0))]
    assert certificate.bound_stderr == pytest.approx((ends[1] - ends[0]) / 2, rel=1e-12)


def test_one_draw_has_no_standard_error():
    certificate = replace(CERTIFICATE, draws=1, risk_stderr=nan)
    assert certificate.bound_stderr != certificate.bound_stderr
    assert certificate.bound < 1


def test_of_an_infinite_divergence():
    certificate = replace(
        CERTIFICATE,
        kl_by_group={"fc1": GaussianKL(inf, 0.0), "fc2": GaussianKL(0.0, inf)},
        prior_variances={"fc1": 1, "fc2": 1},
    )
    assert certificate.bound == certificate.mcallester == certificate.catoni == 1
    assert sum(certificate.parts().values()) == pytest.approx(1)


def test_groups_keep_their_order_and_their_values():
    groups = {"fc1": 0.01, "fc2": 0.1}
    certificate = replace(CERTIFICATE, prior_variances=dict(reversed(groups.items())))
    assert list(certificate.prior_variances.items()) == list(groups.items())
    divergences = dict(CERTIFICATE.kl_by_group)
    kept = replace(CERTIFICATE, kl_by_group=divergences)
    divergences["fc1"] = GaussianKL(0.0, 0.0)
    assert kept == CERTIFICATE
    with pytest.raises(FrozenInstanceError):
        kept.n = 5


@pytest.mark.parametrize(
    "certificate", [CERTIFICATE, replace(CERTIFICATE, classes=None, provenance=replace(PROVENANCE, seed=None))]
)
def test_file_and_back(certificate, tmp_path):
    certificate.to_xarray().to_netcdf(tmp_path / "certificate.nc", engine="h5netcdf")
    with xr.open_dataset(tmp_path / "certificate.nc", engine="h5netcdf") as dataset:
        assert Certificate.from_xarray(dataset) == certificate
        assert dataset.attrs["bound"] == certificate.bound
        assert dataset.attrs["bound_stderr"] == certificate.bound_stderr
        assert dataset["kl_of_variances"].sel(group="fc1") == 1300
        assert dataset["prior_variance"].sel(group="fc2") == 0.1


def test_other_records_are_refused():
    with pytest.raises(InputError, match="expected a data set of record 'Certificate', got 'Estimate'"):
        Certificate.from_xarray(xr.Dataset(attrs={"record": "Estimate"}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"delta": 0.0}, r"delta must be a number in \(0, 1\), got 0.0"),
        ({"delta": 1}, r"delta must be a number in \(0, 1\), got 1"),
        ({"delta": nan}, r"delta must be a number in \(0, 1\), got nan"),
        ({"delta_monte_carlo": 0.0}, r"delta_monte_carlo must be a number in \(0, 1\), got 0.0"),
        (
            {"delta_monte_carlo": 0.05},
            "delta_monte_carlo must be below delta, of which it is a part, got 0.05 of 0.05",
        ),
        ({"n": 0}, "n must be a positive integer, got 0"),
        ({"draws": 0}, "draws must be a positive integer, got 0"),
        ({"grid_size": 0}, "grid_size must be a positive integer, got 0"),
        ({"classes": 0}, "classes must be a positive integer, got 0"),
        ({"empirical_risk": 1.5}, r"empirical_risk must be a number in \[0, 1\], got 1.5"),
        ({"risk_stderr": nan}, "risk_stderr must be a number of at least 0, got nan"),
        ({"kl_by_group": {}, "prior_variances": {}}, "must name the same groups, at least one"),
        (
            {"prior_variances": {"fc1": 1.0}},
            r"must name the same groups, at least one, got \['fc1', 'fc2'\] and \['fc1'\]",
        ),
        (
            {"prior_variances": {"fc1": 1.0, "fc2": 0.0}},
            r"prior_variances\['fc2'\] must be a positive, finite number, got 0",
        ),
        (
            {"kl_by_group": {"fc1": GaussianKL(1.0, 1.0), "fc2": GaussianKL(-1.0, 5.0)}},
            r"kl_by_group\['fc2'\].displacement must be a number of at least 0, got -1.0",
        ),
        (
            {"kl_by_group": {"fc1": GaussianKL(1.0, nan), "fc2": GaussianKL(1.0, 5.0)}},
            r"kl_by_group\['fc1'\].variance must be a number of at least 0, got nan",
        ),
    ],
)
def test_what_would_not_hold_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        replace(CERTIFICATE, **change)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("vacuous", [0.5, 0.9])
def test_enough_samples(groups, vacuous):
    """The number that the message names is enough, and one less is not; a certificate agrees."""
    with pytest.raises(
        InputError, match=f"n = 2 samples are too few for a grid of 2315 .* each of {groups} groups"
    ) as error:
        require_enough_samples(2, 0.05, groups, DEFAULT_GRID, vacuous)
    needed = int(str(error.value).partition("at least n = ")[2].partition(",")[0])
    require_enough_samples(needed, 0.05, groups, DEFAULT_GRID, vacuous)
    with pytest.raises(InputError, match=f"at least n = {needed},"):
        require_enough_samples(needed - 1, 0.05, groups, DEFAULT_GRID, vacuous)
    best = [
        1 - (2 * sqrt(n) / 0.05 * 2315**groups) ** (-1 / n)  # of no errors: (1 - p)^n is what the complexity allows
        for n in (needed - 1, needed)
    ]
    assert best[0] >= vacuous > best[1]


def test_enough_samples_of_a_single_variance():
    require_enough_samples(9, 0.05, 4, VarianceGrid([1.0]))
    with pytest.raises(InputError, match=r"n = 6 samples are too few for a grid of 1 variances .* at least n = 7,"):
        require_enough_samples(6, 0.05, 4, VarianceGrid([1.0]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0.05, 1, DEFAULT_GRID), "n must be a positive integer, got 0"),
        ((9, 1.5, 1, DEFAULT_GRID), r"delta must be a number in \(0, 1\), got 1.5"),
        ((9, 0.05, 0, DEFAULT_GRID), "groups must be a positive integer, got 0"),
        ((9, 0.05, 1, DEFAULT_GRID, 1.0), r"vacuous must be a number in \(0, 1\), got 1.0"),
    ],
)
def test_enough_samples_refuses_bad_input(arguments, message):
    with pytest.raises(InputError, match=message):
        require_enough_samples(*arguments)
