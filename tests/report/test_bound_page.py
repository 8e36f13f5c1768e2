"""The page of generalization bounds: what it says and draws, beside records made by hand."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import xarray as xr

from hesscope.bounds import Certificate, GaussianKL, bernoulli_kl, confidence_cost, kl_inverse, monte_carlo_upper
from hesscope.core.errors import InputError
from hesscope.core.records import Provenance
from hesscope.layerwise.bound_record import PacBayesBound, Spread
from hesscope.report import bound_figures, bound_page, bound_words
from hesscope.report.bound_page import write_bound_page
from hesscope.report.bound_words import (
    bound_headline,
    bound_sentences,
    bound_table,
    duration,
    guaranteed,
    rate,
    rate_with_error,
)
from hesscope.report.page import Picture
from tests.report.test_layers_page import plain, text_of
from tests.report.test_page import assert_legible, opened

NAN = float("nan")
ORIGIN = Provenance(engine="pac_bayes", dtype="float32", device="cpu", seed=0)
# Posterior -> (bound, risk on the samples, risk held out, share of the means in the KL) on true labels.
TRUE = {
    "isotropic": (0.37, 0.11, 0.112, 0.1),
    "diagonal": (0.24, 0.06, 0.061, 0.2),
    "diagonal_optimized": (0.108, 0.021, 0.0215, 0.4),
    "kronecker": (0.165, 0.04, 0.0405, 0.3),
    "kronecker_optimized": (0.085, 0.0155, 0.0162, 0.5),
    "kronecker_refreshed": (0.083, 0.015, 0.0158, 0.5),
}
RANDOM_BOUND, RANDOM_RISK = 0.52, 0.485
SECTIONS = ("bounds", "parts", "posterior", "layers", "posteriors", "assumptions", "ingredients", "provenance")


def certificate(bound, risk, groups, share=0.4, n=40_000, stderr=2e-4, delta=0.05, classes=2, draws=80_000):
    """With the KL, spread unevenly over the groups, of which `share` is of the means, that gives this bound."""
    upper = monte_carlo_upper(risk, draws, delta / 5)
    kl = n * bernoulli_kl(upper, bound) - len(groups) * math.log(121) - confidence_cost(n, delta - delta / 5)
    assert kl > 0
    weights = np.arange(len(groups), 0, -1) / np.arange(len(groups) + 1).sum()
    return Certificate(
        empirical_risk=risk,
        draws=draws,
        risk_stderr=stderr,
        n=n,
        kl_by_group={g: GaussianKL(w * share * kl, w * (1 - share) * kl) for g, w in zip(groups, weights, strict=True)},
        prior_variances={group: 1e-3 * (1 + share) * 2.0**-number for number, group in enumerate(groups)},
        grid_size=121,
        delta=delta,
        delta_monte_carlo=delta / 5,
        classes=classes,
        provenance=ORIGIN,
    )


def spread(group, posterior, prior, count=300):
    """Deviations that fall with the curvature, for Kronecker bases over a wider range of it."""
    generator = np.random.default_rng(list(TRUE).index(posterior))
    decades = 7 if posterior.startswith("kronecker") else 3.5
    curvature = np.sort(10 ** generator.uniform(-2 - decades, -1.5, count))
    curvature[: count // 20] = np.linspace(-1e-4, 0, count // 20)
    scale = 0.0 if posterior == "isotropic" else 4e6
    noise = 10 ** (0.05 * generator.standard_normal(count))
    deviation = noise / np.sqrt(1 / prior + scale * np.maximum(curvature, 0))
    if posterior == "isotropic":
        curvature = np.full(count, curvature.mean())
        deviation = np.full(count, 0.3 * prior**0.5)
    basis = "kronecker" if posterior.startswith("kronecker") else "parameters"
    return Spread(group, basis, curvature, deviation, 115_800, prior**0.5)


def result(posterior="kronecker", labels="true", groups=("fc1", "fc2"), **given):
    """A data set as `hesscope bound` stores it."""
    bound, risk, held_out, share = TRUE[posterior]
    if labels == "random":
        bound, risk, held_out = RANDOM_BOUND + 1e-3 * len(posterior), RANDOM_RISK, 0.5
    bound = given.pop("bound", bound)
    known = {
        "labels": labels,
        "held_out_risk": held_out,
        "held_out_stderr": 0.0 if labels == "random" else 3e-4,
        "held_out_what": "any classifier on random labels" if labels == "random" else "whole population of 531,720",
        "held_out_exact": 1,
        "network_held_out": 0.5 if labels == "random" else 0.007,
        "network": "192-600-2 ReLU network, 116,402 parameters",
        "data": "40,000 independent 8 x 8 patches of two photographs",
    }
    known |= {name: given.pop(name) for name in list(given) if name in known}
    fields = {
        name: given.pop(name) for name in list(given) if name in ("steps", "planned_steps", "seconds", "fallback")
    }
    certified = certificate(bound, given.pop("empirical_risk", risk), groups, share, **given)
    planned = 4000 if posterior.endswith(("optimized", "refreshed")) else 0
    record = PacBayesBound(
        certificate=certified,
        posterior=posterior,
        risk="classification error",
        network_risk=0.006,
        prior_risk=0.52,
        spreads=tuple(spread(group, posterior, prior) for group, prior in certified.prior_variances.items()),
        **({"steps": planned, "planned_steps": planned, "seconds": 205.0, "fallback": {}} | fields),
        provenance=ORIGIN,
    )
    dataset = record.to_xarray()
    dataset.attrs |= known
    return dataset


def everything(**given):
    return [result(posterior, labels, **given) for labels in ("true", "random") for posterior in TRUE]


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bound", "stderr", "said"),
    [
        (0.08531, 3e-4, "8.54 %"),
        (0.085, 3e-4, "8.50 %"),
        (0.0850001, 2e-3, "8.6 %"),
        (0.4999, NAN, "50.0 %"),
        (1.0, 0.0, "100.0 %"),
        (0.00123, 0.0, "0.13 %"),
    ],
)
def test_bounds_are_rounded_up(bound, stderr, said):
    assert plain(guaranteed(bound, stderr)) == said


def test_rates_have_the_digits_that_are_known():
    said = [(0.0162, 3e-4, "1.62 ± 0.03 %"), (0.0162, 4e-3, "1.6 ± 0.4 %"), (0.0071, 0.0, "0.71 %")]
    said += [(0.1234, NAN, "12.3 %"), (0.0, 0.0, "0.0 %"), (NAN, 0.1, "—"), (0.5, 2e-6, "50.0000 ± 0.0002 %")]
    for value, stderr, text in said:
        assert plain(rate_with_error(value, stderr)) == text
    assert plain(rate(0.0162, 3e-4)) == "1.62 %"


def test_durations():
    assert [duration(each) for each in (0.31, 9.96, 59.4, 59.6, 205, 3900)] == [
        *("0.3 s", "10 s", "59 s", "1 min 0 s", "3 min 25 s", "1 h 5 min")
    ]


# --- words ------------------------------------------------------------------------------------------------------------


def said_of(results):
    shown = bound_words.read(results)
    return [plain(each) for each in bound_words.findings(shown)], [plain(each) for each in bound_words.warnings(shown)]


def test_headline_has_guarantee_and_truth():
    said = plain(bound_headline(everything()[:5]))
    assert said == (
        "With 91 % confidence the classification error of the 192-600-2 ReLU network with random weights is at most "
        "8.50 %: the truth is 1.62 ± 0.03 %."
    )
    assert "is at most 8.30 %: the truth is 1.58" in plain(bound_headline(everything()))
    assert bound_headline([]) == "No bound has been computed yet."


def test_which_bound_it_is():
    sentences = [plain(each) for each in bound_sentences(everything()[:5])]
    assert sentences[0] == plain(bound_headline(everything()[:5]))
    assert sentences[1] == (
        "This is the lowest of 5 bounds (posterior “Kronecker, optimized”, from which the weights are drawn for every "
        "input); each by itself has 95 % confidence, and the choice costs the rest."
    )
    assert "lowers the bound by 2.30 ± 0.06 points" in sentences[3]
    alone, _ = said_of([result()])
    assert alone[0] == "The weights are drawn from the posterior “Kronecker” for every input."


def test_headline_of_what_is_held_out():
    held_out = {"held_out_what": "360 held-out digits", "held_out_exact": 0}
    said = plain(bound_headline([result("kronecker", **held_out), result("diagonal", **held_out)]))
    assert said.endswith("is at most 16.50 %: on 360 held-out digits it is 4.05 ± 0.03 %.")
    unknown = {"held_out_risk": NAN, "held_out_stderr": NAN, "held_out_what": "", "network_held_out": NAN}
    assert plain(bound_headline([result(delta=0.01, **unknown)])) == (
        "With 99 % confidence the classification error of the 192-600-2 ReLU network with random weights is at most "
        "16.50 %."
    )


def test_headline_of_random_labels_alone_is_that_of_the_control():
    said = plain(bound_headline(everything()[6:]))
    expected = (
        "On random labels, where every classifier errs on 50.0 % of new samples, no bound is below guessing, as it "
    )
    assert said == f"{expected}should be: the lowest is 52.80 %."
    ten = plain(bound_headline([result("kronecker", "random", bound=0.93, empirical_risk=0.9, classes=10)]))
    assert "errs on 90.0 % of new samples" in ten


def test_vacuous_bounds_are_told():
    worse = {"bound": 0.51, "empirical_risk": 0.3}
    said = plain(bound_headline([result("kronecker", **worse), result("diagonal", **(worse | {"bound": 0.6}))]))
    assert "is at most 51.00 %, which is no better than guessing: the truth" in said
    found, _ = said_of([result("kronecker", **worse), result("diagonal", **(worse | {"bound": 0.6}))])
    assert found[2].endswith("of the diagonal one; neither says more than guessing.")
    assert "no better than guessing" not in plain(bound_headline([result(bound=0.51, empirical_risk=0.3, classes=10)]))


BASIS = [
    (0.24, "In closed form, the Kronecker basis lowers the bound by 7.50 ± 0.05 points: 16.50 % against 24.00 % of"),
    (
        0.1651,
        "In closed form, the Kronecker basis bought nothing that can be told from the errors of the draws: 16.5 %",
    ),
    (0.165, "In closed form, the Kronecker basis bought nothing: both bounds are 16.5 %."),
    (0.16, "In closed form, the Kronecker basis bought nothing: it raises the bound by 0.50 ± 0.05 points, 16.50 % ag"),
]


@pytest.mark.parametrize(("diagonal", "expected"), BASIS)
def test_what_the_basis_bought(diagonal, expected):
    given = {"stderr": 2e-3} if diagonal == 0.1651 else {}
    if diagonal == 0.165:
        given = {"empirical_risk": 0.04}
        pair = [result("kronecker", **given), result("kronecker", **given)]
        pair[1].attrs["posterior"] = "diagonal"
    else:
        pair = [result("kronecker", **given), result("diagonal", bound=diagonal, **given)]
    found, _ = said_of(pair)
    assert found[2].startswith(expected)


def test_the_basis_is_compared_on_true_labels_of_the_same_kind():
    found, _ = said_of([result("kronecker"), result("diagonal_optimized"), result("diagonal", "random")])
    assert not any("Kronecker basis" in each for each in found)
    pair = [result("kronecker_optimized", steps=1200), result("diagonal_optimized")]
    found, _ = said_of(pair)
    assert found[2].endswith("of the diagonal one (Kronecker, optimized is at step 1200 of 4000).")
    assert "(posterior “Kronecker, optimized, step 1200 of 4000”, from which" in found[0]
    everywhere = {"fc1": "its inputs have no second axis", "fc2": "so have these"}
    found, _ = said_of([result("kronecker", fallback=everywhere), result("diagonal")])
    assert "but every layer fell back to the diagonal" in found[2]


def test_bounds_that_failed_are_told():
    assert said_of(everything())[1] == []
    found, told = said_of([result(held_out_risk=0.2), result("diagonal", "random", bound=0.497, empirical_risk=0.45)])
    assert found[1].startswith("The bound is 3.5 points below the true risk of the drawn networks, 20.00 ± 0.03 %")
    assert "“diagonal” (49.70 %) is below guessing: the bound has failed there, which may happen in 5 %" in found[2]
    assert [each[:60] for each in told] == [
        "This bound has failed (true labels, Kronecker): the true ris",
        "This bound has failed (random labels, diagonal): the true ri",
    ]
    assert "the truth is 20.00 ± 0.03 %, and so this bound has failed" in plain(
        bound_headline([result(held_out_risk=0.2)])
    )
    assert len(said_of([result(held_out_risk=0.167)])[1]) == 1
    assert said_of([result(held_out_risk=0.167, held_out_stderr=1e-3)])[1] == []  # may be an error of the truth
    _, told = said_of([result(held_out_risk=0.2, held_out_exact=0)])
    assert told[0].startswith("The risk held out is above the bound (true labels, Kronecker): 20.00 ± 0.03 %")


def test_the_union_is_paid_once_for_the_samples_and_for_every_draw():
    shown = bound_words.read(everything()[:6])
    assert bound_words.failure_together(shown) == pytest.approx(0.04 + 6 * 0.01)
    said = plain(bound_words.union_said(shown))
    assert "hold with probability at least 1 − 6 × 0.05 = 70 %; counted more closely, 90 %, since" in said
    both = bound_words.read(everything())
    assert bound_words.failure_together(both) == pytest.approx(2 * 0.04 + 12 * 0.01)
    other_groups = bound_words.read([result(), result("diagonal", groups=("all",))])
    assert bound_words.failure_together(other_groups) == pytest.approx(0.1)
    assert plain(bound_words.union_said(other_groups)).endswith("1 − 2 × 0.05 = 90 %.")
    assert bound_words.union_said(shown[:1]) == ""


def test_table_of_bounds():
    results = [
        result("kronecker_optimized", steps=1200),
        result("isotropic", seconds=12.4),
        result("diagonal_optimized", "random"),
        result("kronecker", held_out_risk=NAN, held_out_stderr=NAN),
    ]
    rows = [tuple(plain(cell) for cell in row) for row in bound_table(results)]
    assert rows[0] == (
        *("labels", "posterior", "bound", "± points", "risk on the samples", "risk held out", "KL (nats)", "KL / n"),
        *("optimization", "time"),
    )
    kl = PacBayesBound.from_xarray(results[0]).kl
    assert rows[1] == (
        *("true", "Kronecker, optimized", "8.50 %", "0.04", "1.55 %", "1.62 ± 0.03 %", f"{kl:,.0f}"),
        *(f"{kl / 40_000:.4f}", "step 1200 of 4000", "3 min 25 s"),
    )
    assert rows[2][:4] == ("true", "isotropic", "37.00 %", "0.03")
    assert rows[2][-2:] == ("closed form", "12 s")
    assert (*rows[3][:2], *rows[3][-2:-1]) == ("random", "diagonal, optimized", "4000 steps")
    assert rows[3][5] == "50.0 %"
    assert rows[4][5] == "—"
    assert [row[0] for row in bound_table(everything())] == ["labels", *["true"] * 6, *["random"] * 6]


def test_tables_of_layers_and_of_fallback():
    shown = bound_words.read(
        [
            result("isotropic", groups=("0", "fc2")),
            result("kronecker", groups=("0",), fallback={"0": "why not"}),
            result("kronecker_optimized", groups=("0",), fallback={"0": "why not"}),
        ]
    )
    rows = [tuple(plain(cell) for cell in row) for row in bound_words.layer_table(shown)]
    first, second = shown[0].record, shown[1].record
    assert rows[0] == ("layer", "isotropic", "Kronecker", "Kronecker, optimized")
    assert [row[0] for row in rows[1:]] == ["layer 0", "fc2", "all"]
    assert rows[1][1] == f"{first.certificate.kl_by_group['0'].total:,.0f} (67 %)"
    assert rows[1][2] == f"{second.kl:,.0f} (100 %)"
    assert rows[2][2] == "—"
    assert rows[3][1:3] == (f"{first.kl:,.0f}", f"{second.kl:,.0f}")
    assert bound_words.prior_table(shown)[1][1] == f"{math.sqrt(1e-3 * 1.1):.4f}"
    assert bound_words.fallback_table(shown) == [("layer 0", "why not", "Kronecker; Kronecker, optimized")]


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_in_a_browser(tmp_path):
    fallback = {"fc2": "a <bias> alone"}
    results = [*everything()[:11], result("kronecker_refreshed", "random", fallback=fallback, steps=1200)]
    page = write_bound_page(tmp_path, results, "hesscope bound <x>")
    seen = opened(page, tmp_path)
    assert [name for name, _ in seen["seen"]] == list(SECTIONS)
    assert_legible(seen, pictures=2)
    assert plain(seen["title"]) == plain(bound_headline(results))
    text = text_of(page)
    assert "hesscope bound &lt;x&gt;" in text
    assert '<td>fc2</td><td class="wrap">a &lt;bias&gt; alone</td><td class="wrap">Kronecker, refreshed</td>' in text
    assert "1 − 12 × 0.05 = 40 %; counted more closely, 80 %" in text
    assert "<b>step … of …</b>" in text
    assert text.count("<details>") == 12 + 2
    assert all(each in text for each in ("cs/0411099", "1703.11008", "2010.04261"))
    assert not re.search(r"\b(nan|inf)\b", text)
    assert not re.search(r'(?:src|href)="(?!data:)', page.read_text())
    for name in ("parts", "deviations"):
        assert all((tmp_path / "figures" / f"{name}.{ending}").stat().st_size > 5000 for ending in ("png", "pdf"))
    for finding in bound_words.findings(bound_words.read(results)):
        assert plain(finding) in text


def test_every_ingredient_is_on_the_page_and_gives_the_bound(tmp_path, drawn):
    text = text_of(write_bound_page(tmp_path, [result("diagonal"), result("kronecker")], "x"))
    details = re.findall(r"<summary>(true labels, .*?)</summary>(.*?)</details>", text)
    assert [title for title, _ in details] == ["true labels, diagonal: 24.00 %", "true labels, Kronecker: 16.50 %"]
    for (_, body), bound in zip(details, (0.24, 0.165), strict=True):
        rows = {name: float(value) for name, value in re.findall(r"<tr><td>(.*?)</td><td>(.*?)</td>", body)}
        upper = kl_inverse(rows["empirical risk"], -math.log(rows["delta, Monte Carlo"]) / rows["draws"])
        nats = sum(value for name, value in rows.items() if name.startswith("KL of "))
        nats += 2 * math.log(rows["grid size"]) + math.log(2 * math.sqrt(rows["n"]) / rows["delta, PAC-Bayes"])
        assert kl_inverse(upper, nats / rows["n"]) == pytest.approx(bound, rel=1e-9)


@pytest.fixture
def drawn(monkeypatch):
    """Name -> figure, of figures that are not written to files."""
    found = {}

    def kept(folder, name, fig, alt):
        found[name] = fig
        return Picture(name, "", alt)

    monkeypatch.setattr(bound_page, "picture", kept)
    return found


def bars_of(axes):
    """Part -> widths from top to bottom; and where they begin."""
    found = {}
    for container in axes.containers:
        found[container.get_label()] = (
            np.array([bar.get_width() for bar in container]),
            np.array([bar.get_x() for bar in container]),
        )
    return found


def test_bars_show_the_parts_in_their_order(drawn, tmp_path):
    results = [*everything()[:6], result("kronecker", "random"), result("isotropic", "random", held_out_risk=0.4)]
    write_bound_page(tmp_path, results, "x")
    true, random = drawn["parts"].axes
    assert (true.get_title("left"), random.get_title("left")) == ("true labels", "random labels")
    names = [label.get_text() for label in true.get_yticklabels()]
    assert names == list(bound_words.POSTERIOR_NAMES.values())
    low, high = true.get_ylim()
    assert low > high  # the first is on top
    certificates = [Certificate.from_xarray(certified(each)) for each in results]
    for axes, own in ((true, certificates[:6]), (random, certificates[6:])):
        bars = bars_of(axes)
        assert list(bars) == ["empirical risk", "Monte Carlo", "confidence and grid", "KL of means", "KL of variances"]
        reached = np.zeros(len(own))
        for part, (widths, lefts) in bars.items():
            np.testing.assert_allclose(widths, [100 * each.parts()[part] for each in own], atol=1e-12)
            np.testing.assert_allclose(lefts, reached, atol=1e-9)
            reached = reached + widths
        np.testing.assert_allclose(reached, [100 * each.bound for each in own])
    texts = [plain(text.get_text()) for text in true.texts]
    assert texts[:3] == ["guessing 50 %", "37.00 %", "11.20 %"]
    assert [plain(text.get_text()) for text in random.texts][1:] == ["52.90 %", "52.90 %", "40.0 %"]
    marks = {line.get_label(): line for line in true.lines}["true risk"]
    np.testing.assert_allclose(marks.get_xdata(), [100 * held_out for _, _, held_out, _ in TRUE.values()])
    np.testing.assert_allclose(marks.get_ydata(), range(6))
    assert true.lines[0].get_xdata()[0] == 50.0
    assert len({tuple(container[0].get_facecolor()) for container in true.containers}) == 5


def certified(dataset):
    """The data set of the certificate alone."""
    copied = dataset.copy()
    copied.attrs = {
        name.removeprefix("certificate_"): value
        for name, value in dataset.attrs.items()
        if name.startswith("certificate_")
    }
    return copied


def test_marks_are_called_what_they_are(drawn, tmp_path):
    write_bound_page(tmp_path, [result(held_out_exact=0), result("diagonal", held_out_exact=0)], "x")
    assert "risk held out" in [line.get_label() for line in drawn["parts"].axes[0].lines]
    unknown = {"held_out_risk": NAN, "held_out_stderr": NAN, "held_out_what": "", "network_held_out": NAN}
    text = text_of(write_bound_page(tmp_path, [result(steps=0, **unknown)], "x"))
    assert len(drawn["parts"].axes[0].lines) == 1
    assert "nothing was held out" in text
    assert not re.search(r"\b(nan|inf)\b", text)


def test_deviations_are_drawn_over_the_curvature(drawn, tmp_path):
    write_bound_page(tmp_path, [result(posterior) for posterior in TRUE], "x")
    axes = drawn["deviations"].axes[0]
    assert axes.get_title() == "fc1: 115,800 directions"
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    lines = {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}
    assert list(lines) == list(bound_words.POSTERIOR_NAMES.values())
    assert len({line.get_color() for line in lines.values()}) == 6
    prior = 1e-3 * (1 + TRUE["kronecker"][3])
    line = lines["Kronecker"]
    x, y = line.get_xdata(), line.get_ydata()
    assert np.all(np.diff(x) > 0)
    np.testing.assert_allclose(y, 1 / np.sqrt(1 / prior + 4e6 * x), rtol=0.25)
    assert y[0] > 5 * y[-1]
    dashed = [line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == "--"]
    np.testing.assert_allclose(dashed, [math.sqrt(1e-3 * (1 + share)) for *_, share in TRUE.values()])
    triangles = [line for line in axes.lines if line.get_marker() == "<"]
    assert len(triangles) == 5
    assert len(lines["isotropic"].get_xdata()) == 1
    assert {float(line.get_xdata()[0]) for line in triangles} == {
        bound_figures.left_edge(
            [bound_figures.Line("", x_of("fc1", posterior), x, 1.0) for posterior in list(TRUE)[1:]]
        )
        / 2
    }


def x_of(group, posterior):
    return spread(group, posterior, 1e-3).curvature


def test_zero_and_negative_curvature_is_told(drawn, tmp_path):
    text = text_of(write_bound_page(tmp_path, [result(), result("diagonal")], "x"))
    assert "Of the 1,200 directions shown, 60 have zero, negative or negligible curvature" in text
    values = np.array([-1.0, 0.0, 1e-30, 1e-6, 1e-3, 1.0])
    line = bound_figures.Line("diagonal", values, np.ones(6), 1.0)
    assert bound_figures.left_edge([line]) == 1e-6
    assert math.isnan(bound_figures.left_edge([replace(line, curvature=-values.clip(0))]))


@pytest.mark.parametrize("groups", [("fc",), tuple(f"blocks.attention.dense.{number}" for number in range(8))])
def test_one_layer_and_many(groups, drawn, tmp_path):
    text = text_of(write_bound_page(tmp_path, [result(groups=groups), result("diagonal", groups=groups)], "x"))
    titles = [axes.get_title() for axes in drawn["deviations"].axes if axes.get_visible()]
    assert [title.split(":")[0][-12:] for title in titles] == [group[-12:] for group in groups[:4]]  # of the largest KL
    visible = [axes for axes in drawn["deviations"].axes if axes.get_visible()]
    assert len(visible) == min(len(groups), 4)
    assert ("Of 8 layers the 4 of the largest divergence are drawn." in text) == (len(groups) == 8)
    assert all(f"<td>{group}</td>" in text for group in groups)
    assert f"KL of means, {groups[-1]}" in text


ODD = {
    "bounds of 1": lambda: [result(bound=1 - 1e-12, empirical_risk=0.9), result("diagonal", bound=1 - 1e-12)],
    "one draw": lambda: [result(bound=0.995, empirical_risk=0.0, draws=1, stderr=NAN)],
    "no classes": lambda: [result(classes=None), result("diagonal", "random", classes=None)],
    "random labels alone": lambda: [result("diagonal", "random")],
    "flat": lambda: [without_curvature(result())],
    "no spreads": lambda: [without_spreads(result())],
    "posterior of another name": lambda: [renamed(result())],
    "stopped at once": lambda: [result("kronecker_optimized", steps=0), result("diagonal_optimized", steps=0)],
}


def without_curvature(dataset):
    for number in range(2):
        dataset[f"curvature_{number}"] = xr.zeros_like(dataset[f"curvature_{number}"])
    return dataset


def without_spreads(dataset):
    dataset.attrs["spreads"] = "{}"
    return dataset


def renamed(dataset):
    dataset.attrs["posterior"] = "my own"
    return dataset


@pytest.mark.parametrize("name", ODD)
def test_odd_results_have_a_page(name, drawn, tmp_path):
    results = ODD[name]()
    text = text_of(write_bound_page(tmp_path, results, "x"))
    for fig in drawn.values():
        fig.draw_without_rendering()
    assert not re.search(
        r"\b(nan|inf|None)\b",
        text.replace("<td>standard error</td><td>nan", "").replace("<td>bound, standard error</td><td>nan", ""),
    )
    assert ('id="posterior"' in text) == ("deviations" in drawn) == (name != "no spreads")
    assert ("guessing" in text.split('id="ingredients"')[0]) == (name != "no classes")
    assert len(bound_table(results)) == 1 + len(results)


def test_failed_bounds_and_fallback_are_on_the_page(drawn, tmp_path):
    failed = result(held_out_risk=0.2, fallback={"fc2": "why not"})
    text = text_of(write_bound_page(tmp_path, [failed], "x"))
    assert text.count('<p class="warning">This bound has failed (true labels, Kronecker)') == 1
    assert '<td>fc2</td><td class="wrap">why not</td><td class="wrap">Kronecker</td>' in text
    assert 'class="warning"' not in text_of(write_bound_page(tmp_path, [result()], "x"))


def test_no_result_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"^results has no bound yet: there is nothing to show$"):
        write_bound_page(tmp_path, [], "x")


def test_pages_are_the_same_from_files(drawn, tmp_path):
    original = result(fallback={"fc1": "why"})
    original.to_netcdf(tmp_path / "results.nc", engine="h5netcdf")
    with xr.open_dataset(tmp_path / "results.nc", engine="h5netcdf") as stored:
        assert bound_table([stored]) == bound_table([original])
        pages = [
            write_bound_page(tmp_path / str(k), [each], "x").read_text() for k, each in enumerate((stored, original))
        ]
    assert pages[0] == pages[1]


def test_a_prior_that_may_have_seen_the_samples_is_told():
    trained = result()
    trained.attrs["prior_risk"] = 0.1
    _, told = said_of([trained])
    assert told[0].startswith("The network at the prior’s mean errs on only 10.0 % of samples (true labels).")
    assert said_of([result()])[1] == []
