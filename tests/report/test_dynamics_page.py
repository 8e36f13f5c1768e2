"""The page of a training run: what it says and draws, beside snapshots made by hand."""

import base64
import io
import re
from dataclasses import replace

import matplotlib as mpl
import numpy as np
import pytest
from PIL import Image

from hesscope.core.errors import InputError
from hesscope.core.records import Provenance
from hesscope.dynamics.dynamic_force import dynamic_force
from hesscope.dynamics.snapshot import EndEigenvalues, HeatMap, Snapshot
from hesscope.dynamics.trajectory import Trajectory
from hesscope.estimate.density import SpectralDensity
from hesscope.estimate.energies import BlockEnergies, SplitEnergies
from hesscope.estimate.estimate import Estimate
from hesscope.report import dynamics_figures, dynamics_page
from hesscope.report.dynamics_page import animation, write_dynamics_page
from hesscope.report.dynamics_words import (
    dynamics_headline,
    dynamics_table,
    exponent_table,
    force_table,
    headline_and_lead,
    measuring_words,
    no_exponents_said,
)
from hesscope.report.page import Picture
from tests.report import test_page
from tests.report.test_layers_page import plain, text_of
from tests.report.test_page import opened

ORIGIN = Provenance(engine="tracker", dtype="float64", device="cpu", seed=0)
LABELS, LAYERS = ("a[0]", "a[1]", "b[0]", "b[1]", "b[2]"), ("a", "a", "b", "b", "b")
NAN = float("nan")


def block_energies(within_a, cross, within_b, off=0.1, labels=LABELS):
    """Blocks of a hold `within_a` each, of b `within_b`, of two layers `cross`; those off the diagonal `off` of it."""
    own = np.where([label.startswith("a") for label in labels], within_a, within_b)
    same = np.array([[one[0] == other[0] for one in labels] for other in labels])
    values = np.where(same, off * own[:, None], cross)
    np.fill_diagonal(values, own)
    return BlockEnergies.exact(labels, (4,) * len(labels), values.astype(float), ORIGIN)


def split(H, G=None, R=None):
    given = {"H": H, "G": G, "R": R}
    return SplitEnergies({part: block_energies(*each) for part, each in given.items() if each is not None})


def snapshot(step, energies=None, layers=LAYERS, value=1.0, **given):
    empty = dict.fromkeys(("eigenvalues", "trace", "density", "heterogeneity", "heatmap"))
    scalars = {"gradient_norm": 1.0, "mean_squared_residual": value, "accuracy": NAN, "learning_rate": NAN}
    scalars |= {"stability_limit": NAN, "seconds": {"first order": 0.5}, "training_seconds": 10.0}
    fields = {**scalars, **empty, **given}
    own = () if energies is None else layers
    return Snapshot(step=step, value=value, layers=own, energies=energies, provenance=ORIGIN, **fields)


def trajectory(*snapshots, left_out=()):
    return Trajectory(snapshots, {"model": "MLP, 20 parameters", "partition": "5 blocks"}, left_out)


def share(cross, within=1.0):
    """Of the energy between layers, of block_energies(within, cross, within): 12 blocks of 25 lie there."""
    return 12 * cross / (12 * cross + 5 * within + 0.1 * within * 8)


def crossing(*pairs, within=1.0, **given):
    """A trajectory with these (step, cross energy)."""
    return trajectory(*(snapshot(step, split((within, cross, within)), **given) for step, cross in pairs))


def ends(top, bottom=-0.1, share_of_gradient=0.3, alignment=0.9):
    largest = np.array([top, 0.5 * top])
    smallest = np.array([bottom])
    return EndEigenvalues(largest, 0 * largest, smallest, 0 * smallest, share_of_gradient, alignment, 0, 10, True)


def percents(text):
    return [float(each) for each in re.findall(r"([\d.]+) %", plain(text))]


# --- words ------------------------------------------------------------------------------------------------------------

VERDICTS = [
    ((100.0, 0.02), "training made it nearly block-diagonal by layer."),
    ((100.0, 0.2), "training moved it towards block-diagonal by layer, not all the way."),
    ((0.2, 100.0), "training made it less block-diagonal by layer."),
    ((0.001, 0.03), "training made it less block-diagonal by layer, though it nearly still is."),
    ((1.0, 1.05), "training hardly changed this."),
    ((0.01, 0.0101), "it was nearly block-diagonal by layer from the start."),
    ((0.02, 0.001), "it was nearly block-diagonal by layer from the start, and training made it more so."),
    ((0.0, 0.0), "it was nearly block-diagonal by layer from the start."),
]


@pytest.mark.parametrize(("crosses", "verdict"), VERDICTS)
def test_headline_says_what_training_did(crosses, verdict):
    said = plain(dynamics_headline(crossing((0, crosses[0]), (600, crosses[1]), accuracy=0.98)))
    first = said.split(".  ")[0]
    assert first.startswith("At initialization ")
    assert "of the Hessian’s energy lies between layers; after 600 steps, at 98.0 % accuracy, " in said
    assert verdict in said
    shown = percents(said)
    assert shown[0] == pytest.approx(100 * share(crosses[0]), rel=0.06, abs=0.051)
    assert shown[2] == pytest.approx(100 * share(crosses[1]), rel=0.06, abs=0.051)


def test_lead_names_what_was_in_between():
    said, lead = map(plain, headline_and_lead(crossing((0, 10.0), (7, 0.01), (60, 9.0), value=0.25)))
    assert said.endswith(f"at loss 0.250, {100 * share(9.0):.1f} %: training hardly changed this.")
    assert lead.startswith(f"In between that share was lowest at step 7, {100 * share(0.01):.1f} %.")
    said, lead = map(plain, headline_and_lead(crossing((5, 0.01), (7, 4.0), (60, 0.0101))))
    assert said.startswith("At step 5 ")
    assert f"at step 60, at loss 1.00, {100 * share(0.0101):.1f} %: " in said
    assert lead.startswith(f"In between that share was highest at step 7, {100 * share(4.0):.1f} %.")
    lead = plain(headline_and_lead(crossing((0, 1.0), (7, 0.01), (9, 50.0), (60, 1.02)))[1])
    expected = f"lowest at step 7, {100 * share(0.01):.1f} % and highest at step 9, {100 * share(50.0):.1f} %."
    assert lead.startswith(f"In between that share was {expected}")


@pytest.mark.parametrize("crosses", [each for each, _ in VERDICTS])
def test_headline_is_short_and_the_lead_has_the_split(crosses):
    run = crossing((0, crosses[0]), (7, 3.0), (123456, crosses[1]), accuracy=0.98)
    force = dynamic_force(run)
    headline, lead = headline_and_lead(run, force)
    assert len(headline.split(" ")) <= 36
    assert headline.count(". ") == 0
    assert "chance" not in headline
    assert ("Of what the diagonal blocks hold beyond chance" in lead) == bool(np.isfinite(force.static[0, 0]))
    assert dynamics_headline(run, force) == f"{headline} {lead}".strip()


def test_headline_of_one_snapshot_says_nothing_of_training():
    said = plain(dynamics_headline(crossing((0, 1.0))))
    assert said.startswith(f"At initialization, at loss 1.00, {100 * share(1.0):.1f} % of the Hessian’s energy lies ")
    assert said.endswith("no other step was measured.")
    assert "training" not in said


def test_headline_passes_over_what_is_not_known():
    zero = snapshot(900, split((0, 0, 0)))
    known = crossing((0, 10.0), (600, 0.01))
    said = dynamics_headline(trajectory(*known.snapshots, zero, snapshot(1000)))
    assert "after 600 steps" in said
    assert "nan" not in said
    assert dynamics_headline(trajectory(zero)) == "The Hessian is zero at every step."
    broken = snapshot(3, split((NAN, NAN, NAN)), value=NAN)
    assert dynamics_headline(trajectory(broken)) == "The loss is not known."
    assert "No step" in dynamics_headline(trajectory())


def test_headline_of_one_layer_is_of_its_blocks():
    def one(step, cross):
        return snapshot(step, split((1.0, cross, 1.0)), layers=("a",) * 5)

    said = plain(dynamics_headline(trajectory(one(0, 10.0), one(9, 0.01))))
    outside = [(12 * cross + 0.8) / (12 * cross + 5.8) for cross in (10.0, 0.01)]
    assert f"At initialization {100 * outside[0]:.1f} % of the Hessian’s energy lies outside of its 5 diagonal" in said
    assert f"{100 * outside[1]:.1f} %: training moved it towards block-diagonal, not all the way." in said


def test_headline_without_energies():
    def change(**values):
        return dynamics_headline(
            trajectory(*(snapshot(step, **{k: v[i] for k, v in values.items()}) for i, step in enumerate((0, 1))))
        )

    assert change(value=(2.0, 0.5)) == (
        "The loss falls from 2.00 at initialization to 0.500 after 1 step; nothing was measured of the Hessian."
    )
    assert change(eigenvalues=(ends(2.0), ends(3.0))) == (
        "The sharpness (largest eigenvalue) rises from 2.00 at initialization to 3.00 after 1 step."
    )
    traces = [Estimate.exact(value, 0, ORIGIN) for value in (2.0, -3.0)]
    assert change(trace=traces).startswith("The trace of the Hessian falls from 2.00 at initialization to −3.00")
    maps = [HeatMap(np.ones((2, 2), np.float32), 2, ("w",), (2,))] * 2
    assert change(heatmap=maps) == "The loss is 1.00 both at initialization and after 1 step."


def test_headline_of_the_gauss_newton_part_alone():
    parts = [SplitEnergies({"G": block_energies(1.0, cross, 1.0)}) for cross in (10.0, 0.01)]
    two = trajectory(*(snapshot(step, each) for step, each in zip((0, 5), parts, strict=True)))
    assert "of the Gauss-Newton matrix’s energy lies between layers" in dynamics_headline(two)
    table = dynamics_table(two)
    assert table[0] == ("step", "loss", "cross-layer share of G", "diagonality of G", "r of a of G", "r of b of G")


def test_headline_splits_static_and_dynamic():
    def both(start, end):
        run = crossing((0, start), (600, end))
        force = dynamic_force(run)
        return plain(dynamics_headline(run, force)), float(force.static[0, 0])

    said, static = both(0.5, 0.01)
    assert 0 < static < 1
    assert f"{100 * static:.1f} % was there at initialization (static force), {100 - 100 * static:.1f} % came" in said
    said, static = both(100.0, 0.01)
    assert static < 0
    assert "nothing was there at initialization: all of it is dynamic force." in said
    said, static = both(0.001, 0.2)
    assert static > 1
    assert "all was there at initialization, and more: training took some away." in said


def test_table_of_steps():
    H, G, R = (1.0, 2.0, 4.0, 0.25), (1.0, 1.0, 4.0), (0.0, 3.0, 0.0)
    first = snapshot(0, split(H, G, R), accuracy=0.125, value=2.5, eigenvalues=ends(7.5))
    last = snapshot(1200, value=NAN, accuracy=0.5)
    table = [[plain(cell) for cell in row] for row in dynamics_table(trajectory(first, last))]
    assert table[0] == [
        *("step", "loss", "accuracy", "cross-layer share", "residual share", "diagonality", "r of a", "r of b"),
        "sharpness",
    ]
    total = 12 * 2 + 2 + 12 + 0.25 * (2 * 1 + 6 * 4)
    expected = [f"{100 * 24 / total:.1f} %", "75.0 %", f"{100 * 14 / total:.1f} %", "0.250", "0.250"]
    assert table[1] == ["0", "2.50", "12.5 %", *expected, "7.50"]
    assert table[2] == ["1,200", "—", "50.0 %", "—", "—", "—", "—", "—", "—"]
    assert dynamics_table(trajectory(snapshot(3))) == [("step", "loss"), ("3", "1.00")]
    one_block_each = BlockEnergies.exact(("a", "b"), (4, 9), np.ones((2, 2)), ORIGIN)
    unequal = snapshot(0, SplitEnergies({"H": one_block_each}), layers=("a", "b"))
    assert dynamics_table(trajectory(unequal))[0] == ("step", "loss", "cross-layer share", "diagonality")


def test_tables_of_the_force():
    force = dynamic_force(crossing((0, 10.0), (600, 0.01)))
    table, exponents = force_table(force), exponent_table(force)
    assert table[0] == ("quantity", "initialization", "end", "static", "dynamic", "passes 0.9 at step")
    assert [row[0] for row in table[1:3]] == ["diagonality", "diagonality within a"]
    assert {len(row) for row in table} == {6}
    assert exponents == []
    needed = "at least 10 steps, at which the loss above its optimum (or the squared residual) and the energy"
    assert needed in no_exponents_said(force)
    assert no_exponents_said(force).endswith("here there are 2.")
    fading = [(step, 0.5**step) for step in range(10)]
    ten = trajectory(*(snapshot(k, split((1.0, cross, 1.0)), value=2 * cross**-0.5) for k, cross in fading))
    force = dynamic_force(ten)
    assert no_exponents_said(force) == ""
    exponents = exponent_table(force)
    assert exponents[0] == ("layers", *exponents[0][1:3], "H over L − optimum", "H over squared residual")
    assert exponents[1] == ("a × b", "–", "–", "−2.00 (−2.00 to −2.00)", "−2.00 (−2.00 to −2.00)")
    nine = dynamic_force(trajectory(*ten.snapshots[:9]))
    assert (exponent_table(nine), no_exponents_said(nine)[-17:]) == ([], "here there are 9.")
    constant = dynamic_force(crossing(*fading))
    assert no_exponents_said(constant).endswith("the squared residual are the same at all 10 usable steps.")
    single = dynamic_force(
        [trajectory(*ten.snapshots[:2]), trajectory(*ten.snapshots[2:3], snapshot(3, split((0,) * 3)))]
    )
    assert "at least 4 steps, 2 of each run" in no_exponents_said(single)


def test_tables_have_minus_signs():
    falls = [snapshot(k, eigenvalues=ends(value), value=value) for k, value in enumerate((-2.5, -1e-9))]
    assert dynamics_table(trajectory(*falls))[1:] == [("0", "−2.50", "−2.50"), ("1", "−1.00e-09", "−1.00e-09")]
    force = dynamic_force(crossing((0, 100.0), (9, 0.01)))
    static = force_table(force)[1][3]
    assert float(static.replace("−", "-")) == pytest.approx(force.static[0, 0], rel=0.01)
    assert static.startswith("−")


# --- the page ---------------------------------------------------------------------------------------------------------


def falling(count=5, **given):
    """H and R fall a hundredfold a step, G is zero within and between layers."""
    parts = [(0.01**k, 0.01**k, 0.01**k, 1.0) for k in range(count)]
    zero = (0.0, 0.0, 0.0)
    return trajectory(
        *(
            snapshot(10 * k, split(parts[k], zero, parts[k]), value=0.1**k, accuracy=0.1 * k, **given)
            for k in range(count)
        )
    )


def everything():
    generator = np.random.default_rng(0)
    found = []
    for k, step in enumerate((0, 1, 3, 10, 100)):
        fade = 0.1**k
        density = SpectralDensity.from_eigenvalues(fade * generator.standard_normal(40), ORIGIN)
        trace = replace(Estimate.exact(fade, 0, ORIGIN), stderr=0.1 * fade)
        found.append(
            snapshot(
                step,
                split((1.0, fade, 2.0), (1.0, 0.1, 1.9), (0.0, fade, 0.0)),
                value=2.3 * fade,
                accuracy=0.2 * k,
                learning_rate=0.1,
                stability_limit=20.0,
                eigenvalues=ends(10 * fade, -fade, alignment=NAN if k == 0 else 0.9),
                trace=trace,
                density=density,
                heterogeneity=Estimate.exact(0.5, 0, ORIGIN),
                heatmap=HeatMap(fade * np.ones((10, 10), np.float32), 20, ("a.weight", "b.weight"), (8, 12)),
                seconds={"energies": 0.25, "trace": 0.5},
            )
        )
    return trajectory(*found, left_out=(30, 50))


def embedded(page):
    """The pictures of the frames of every film, in order."""
    text = page.read_text()
    films = re.findall(r'<section id="film-(\w+)">(.*?)</section>', text, re.DOTALL)
    return {
        name: [
            (plain(said), np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("L"), dtype=float))
            for said, data in re.findall(
                r'<figcaption>(.*?)</figcaption>\s*<img src="data:image/png;base64,(.*?)"', body
            )
        ]
        for name, body in films
    }


# Pixels inside of the maps of H, G and R on a frame with three of them.
PLACES = {"H": np.s_[100:500, 200:600], "G": np.s_[80:200, 800:950], "R": np.s_[400:500, 800:950]}


def test_frames_are_in_order_and_on_one_scale(tmp_path, monkeypatch):
    monkeypatch.setattr(dynamics_page, "picture", lambda folder, name, fig, alt: Picture(name, "", alt))
    monkeypatch.setattr(dynamics_page, "GIF_FRAMES", 2)
    page = write_dynamics_page(tmp_path, falling(), None, "hesscope track x")
    frames = embedded(page)["blocks"]
    assert [said for said, _ in frames] == [
        f"step {10 * k} · loss {loss} · accuracy {10 * k}.0 %"
        for k, loss in enumerate(("1.00", "0.100", "0.0100", "0.00100", "0.000100"))
    ]
    light = {part: [image[place].mean() for _, image in frames] for part, place in PLACES.items()}
    # Twelve decades from the largest energy of all steps down, of which each step takes two.
    expected = [lightness(1 - 2 * k / 12) for k in range(5)]
    np.testing.assert_allclose(light["H"], expected, atol=6)  # borders are white
    np.testing.assert_allclose(light["R"], expected, atol=12)
    np.testing.assert_allclose(light["G"], lightness(0), atol=8)


def lightness(place):
    """Of a colour of the maps, 0 to 255."""
    red, green, blue, _ = mpl.colormaps["magma"](place)
    return 255 * (0.299 * red + 0.587 * green + 0.114 * blue)


def test_animation_has_all_frames_in_order(tmp_path):
    path = animation(tmp_path, falling(5))
    assert path == tmp_path / "figures" / "heat-map.gif"
    with Image.open(path) as film:
        assert film.n_frames == 5
        assert 600 < film.size[0] < 800
        light, times = [], []
        for number in range(5):
            film.seek(number)
            light.append(np.asarray(film.convert("L"), dtype=float)[200:450, 200:450].mean())
            times.append(film.info["duration"])
    assert np.all(np.diff(light) < 0)
    assert times == [600] * 4 + [2000]


def test_animation_needs_a_map_and_stays_small(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"neither heat maps nor block energies: track with Heatmap or Energies"):
        animation(tmp_path, trajectory(snapshot(0)))
    monkeypatch.setattr(dynamics_page, "GIF_BYTES", animation(tmp_path, falling(4)).stat().st_size // 2)
    with Image.open(animation(tmp_path, falling(4))) as film:
        assert film.n_frames == 2


# Moves the first slider by a key's event and tells what is seen of both films.
SLIDER = """<script>
const bar = document.querySelector("input[type=range]"), seen = [];
const told = () => [...document.querySelectorAll(".film figure")].filter(f => f.offsetHeight > 0)
    .map(f => f.querySelector("figcaption").textContent);
seen.push(told());
for (const place of [3, 4]) { bar.value = place; bar.dispatchEvent(new Event("input")); seen.push(told()); }
const wide = document.documentElement.scrollWidth - window.innerWidth;
const heights = [...document.querySelectorAll("section")].map(s => [s.id, s.getBoundingClientRect().height]);
const broken = [...document.images].filter(i => !i.complete || i.naturalWidth < 500).length;
const label = bar.getAttribute("aria-valuetext"), title = document.querySelector("h1").innerText;
document.body.innerHTML = "<pre id=probe>" + JSON.stringify({seen, wide, heights, broken, label, title}) + "</pre>";
</script>"""
SECTIONS = ["film-blocks", "film-entries", "energies", "structure", "force", "eigenvalues", "spectrum", "steps"]


def test_the_page_in_a_browser(tmp_path, monkeypatch):
    run = everything()
    force = dynamic_force(run)
    page = write_dynamics_page(tmp_path, run, force, "hesscope track <x>", title="A & B")
    monkeypatch.setattr(test_page, "PROBE", "")
    copied = page.read_text().replace("</script>\n</main>", "</script>" + SLIDER + "</main>")
    page_with_probe = tmp_path / "probe.html"
    page_with_probe.write_text(copied)
    assert SLIDER in copied
    seen = opened(page_with_probe, tmp_path)
    words = [said for said, _ in embedded(page)["blocks"]]
    assert [[plain(each) for each in told] for told in seen["seen"]] == [
        [words[0], words[0]],
        [words[3], words[0]],
        [words[4], words[0]],
    ]
    assert plain(seen["label"]) == words[4]
    assert plain(seen["title"]) == plain(headline_and_lead(run, force)[0])
    assert [name for name, _ in seen["heights"]] == [*SECTIONS, "provenance"]
    assert all(height > 100 for _, height in seen["heights"])
    assert seen["wide"] <= 0
    assert seen["broken"] == 0
    text = text_of(page)
    assert "hesscope track &lt;x&gt;" in text
    assert "A &amp; B" in text
    assert "30, 50 (the time budget did not allow them)" in text
    assert "Measuring took 37.5 % of the training’s time (10.0 s without it)." in text
    assert "A negative static part of the <b>share within layers</b> is usual" in text
    assert "No exponents: a power law is fitted to at least 10 steps, at which" in text
    assert "No residual part at any step, and not drawn: within a, within b." in text
    assert text.count('class="lead"') == 2
    assert "<td>energies</td><td>1.25</td><td>0.25</td>" in text
    assert 'href="figures/heat-map.gif"' in text
    assert "Zero, and not drawn: R within a, R within b." in text
    assert not re.search(r"\b(nan|inf)\b", re.sub(r"<script>.*?</script>", "", text))
    assert not re.search(r'(?:src|href)="(?!data:|figures/)', page.read_text())
    assert page.stat().st_size < 3e6
    for link in re.findall(r'href="(figures/.*?)"', text):
        assert (tmp_path / link).exists()
    table = dynamics_table(run)
    assert len(re.findall("<tr>", text.split('id="steps"')[1].split("</section>")[0])) == len(table) == 6


@pytest.fixture
def drawn(monkeypatch):
    """Name -> figure, of figures that are not written to files."""
    found = {}

    def kept(folder, name, fig, alt):
        fig.draw_without_rendering()
        found[name] = fig
        return Picture(name, "", alt)

    monkeypatch.setattr(dynamics_page, "picture", kept)
    monkeypatch.setattr(dynamics_page, "FRAMES", 2)
    monkeypatch.setattr(dynamics_page, "GIF_FRAMES", 2)
    return found


def lines_of(axes):
    return {line.get_label(): line.get_ydata() for line in axes.lines}


def test_lines_show_the_snapshots(drawn, tmp_path):
    run = everything()
    write_dynamics_page(tmp_path, run, None, "x")
    energies = drawn["energies"].axes
    assert [axes.get_title() for axes in energies[:2]] == ["Gauss-Newton part G", "residual part R = H − G"]
    fade = 0.1 ** np.arange(5)
    G, R = lines_of(energies[0]), lines_of(energies[1])
    np.testing.assert_allclose(G["within a"], [2 * 1.0 + 2 * 0.1] * 5)
    np.testing.assert_allclose(G["within b"], [3 * 1.9 + 6 * 0.19] * 5)
    np.testing.assert_allclose(G["a × b"], [6 * 0.1] * 5)
    np.testing.assert_allclose(R["a × b"], 6 * fade)
    assert np.isnan(R["within a"]).all()
    over_loss = {line.get_label(): line.get_xdata() for line in energies[2].lines}
    np.testing.assert_allclose(over_loss["a × b"], 2.3 * fade)
    assert energies[2].get_xlim()[0] > energies[2].get_xlim()[1]
    shares, residual, ratios = drawn["structure"].axes
    total = 12 * fade + 2 + 6 + 0.1 * (2 + 12)
    np.testing.assert_allclose(lines_of(shares)["between layers"], 100 * 12 * fade / total)
    np.testing.assert_allclose(lines_of(shares)["in the 5 diagonal blocks"], 100 * 8 / total)
    np.testing.assert_allclose(lines_of(residual)["a × b"], 100 * fade / (fade + 0.1))
    assert list(lines_of(residual)) == ["a × b"]  # within the layers there is no residual part
    colours = [{line.get_label(): line.get_color() for line in axes.lines}["a × b"] for axes in (energies[0], residual)]
    assert colours[0] == colours[1]
    np.testing.assert_allclose(lines_of(ratios)["b"], [0.1] * 5)
    both = lines_of(drawn["eigenvalues"].axes[0])
    np.testing.assert_allclose(both["largest (sharpness)"], 10 * fade)
    np.testing.assert_allclose(both["most negative"], -fade)
    np.testing.assert_allclose(both["stability limit 2/η (plain gradient descent)"], [20.0] * 5)
    edge, eigenspace = drawn["edge"].axes
    np.testing.assert_allclose(lines_of(edge)["sharpness × learning rate η"], fade)
    np.testing.assert_allclose(lines_of(eigenspace)["gradient’s share in the top eigenspace"], [30.0] * 5)
    np.testing.assert_allclose(lines_of(eigenspace)["alignment with the top eigenspace before"], [NAN] + [90.0] * 4)
    np.testing.assert_allclose(drawn["trace"].axes[0].lines[-1].get_ydata(), fade)
    assert [tick.get_text() for tick in drawn["density"].axes[0].get_yticklabels()][-1] == "step 100"


def test_the_stability_line_says_what_it_is_of(drawn, tmp_path):
    run = [snapshot(k, eigenvalues=ends(1.0), learning_rate=0.1, stability_limit=38.0) for k in range(2)]
    write_dynamics_page(tmp_path, trajectory(*run), None, "x")
    assert "stability limit 3.80/η of this optimizer" in lines_of(drawn["eigenvalues"].axes[0])
    np.testing.assert_allclose(lines_of(drawn["edge"].axes[0])["stability limit 3.80 of this optimizer"], 3.8)
    plain_descent = [replace(each, stability_limit=2 / 0.1) for each in run]
    write_dynamics_page(tmp_path, trajectory(*plain_descent), None, "x")
    np.testing.assert_allclose(lines_of(drawn["edge"].axes[0])["stability limit 2 (plain gradient descent)"], 2.0)
    decayed = [replace(each, stability_limit=2 / 0.1 - 1e-4) for each in run]
    write_dynamics_page(tmp_path, trajectory(*decayed), None, "x")
    assert "stability limit 2.00 of this optimizer" in lines_of(drawn["edge"].axes[0])
    run = [replace(each, stability_limit=NAN) for each in run]
    text = text_of(write_dynamics_page(tmp_path, trajectory(*run), None, "x"))
    assert set(lines_of(drawn["eigenvalues"].axes[0])) >= {"largest (sharpness)", "most negative"}
    assert not any("limit" in label for label in lines_of(drawn["eigenvalues"].axes[0]))
    assert "No stability line" in text
    assert not drawn.keys() & {"energies", "structure", "trace", "density"}


def numbered(bias=False):
    """Layers "0" and "2" of a Sequential, by row; with a bias each is a block of another size."""
    labels = tuple(f"{layer}.{name}" for layer in "02" for name in ("weight[0]", "weight[1]", "bias"))
    sizes = tuple(2 if bias and label.endswith("bias") else 4 for label in labels)
    values = np.full((6, 6), 0.5) + np.eye(6)
    found = []
    for step in range(2):
        parts = {part: BlockEnergies.exact(labels, sizes, 0.5**step * values, ORIGIN) for part in "HGR"}
        found.append(snapshot(step, SplitEnergies(parts), tuple(label[0] for label in labels), value=0.5**step))
    return trajectory(*found)


def test_bare_numbers_are_called_layers(drawn, tmp_path):
    run = numbered()
    force = dynamic_force(run)
    text = text_of(write_dynamics_page(tmp_path, run, force, "x"))
    assert set(lines_of(drawn["energies"].axes[0])) == {"within layer 0", "within layer 2", "layer 0 × layer 2"}
    assert list(lines_of(drawn["structure"].axes[2])) == ["layer 0", "layer 2"]
    assert dynamics_table(run)[0][-2:] == ("r of layer 0", "r of layer 2")
    quantities = [row[0] for row in force_table(force)]
    assert {"diagonality within layer 0", "off-diagonal ratio of layer 2"} <= set(quantities)
    assert not re.search(r"(within|of|×|>) [02]( |<|,|\.)", text)
    blocks = BlockEnergies.exact(("0", "2"), (4, 4), np.ones((2, 2)), ORIGIN)
    by_layer = snapshot(0, SplitEnergies({"H": blocks}), ("0", "2"))
    assert dynamics_page._block_ruler(by_layer).names == ("layer 0", "layer 2")
    assert dynamics_page._block_ruler(replace(by_layer, layers=("fc", "fc"))).names == ("0", "2")


def test_ratios_that_cannot_be_are_told_once(drawn, tmp_path):
    run = numbered(bias=True)
    text = text_of(write_dynamics_page(tmp_path, run, dynamic_force(run), "x"))
    assert text.count("No off-diagonal ratio r of layer 0, layer 2: blocks there differ in size") == 1
    assert "off-diagonal ratio of" not in text
    run = numbered()
    text = text_of(write_dynamics_page(tmp_path, run, dynamic_force(run), "x"))
    assert "No off-diagonal ratio" not in text
    assert "<td>off-diagonal ratio of layer 0</td>" in text


@pytest.mark.parametrize(("spent", "words"), [(20.0, "200.0 % of"), (5200.0, "520 times"), (71.0, "7.1 times")])
def test_long_measuring_is_told_in_times(spent, words):
    run = trajectory(snapshot(0, seconds={"energies": spent}))
    assert f"Measuring took {words} the training’s time (10.0 s without it)." == plain(measuring_words(run))


def many_layers():
    labels = tuple(f"layer{k}.weight[{row}]" for k in range(12) for row in range(3))
    values = np.random.default_rng(1).random((36, 36))
    energies = SplitEnergies({"H": BlockEnergies.exact(labels, (4,) * 36, values + values.T, ORIGIN)})
    return [snapshot(step, energies, tuple(label.split(".")[0] for label in labels)) for step in range(100, 105)]


ODD = {
    "one snapshot": lambda: trajectory(everything().snapshots[0]),
    "200 snapshots": lambda: trajectory(*(replace(each, step=k) for k, each in enumerate(everything().snapshots * 40))),
    "only the loss": lambda: trajectory(snapshot(0), snapshot(5)),
    "nothing known": lambda: trajectory(snapshot(0, value=NAN, mean_squared_residual=NAN)),
    "zero Hessian": lambda: trajectory(
        *(snapshot(k, split(*((0, 0, 0),) * 3), eigenvalues=ends(0, 0)) for k in (0, 9))
    ),
    "nan": lambda: trajectory(*(snapshot(k, split((NAN, NAN, NAN)), eigenvalues=ends(NAN, NAN)) for k in (0, 9))),
    "negative": lambda: trajectory(*(snapshot(k, split((1, -1e-3, 1)), value=-1.0) for k in (0, 9))),
    "tiny": lambda: crossing((0, 1e-30), (9, 1e-28), within=1e-28),
    "huge": lambda: crossing((0, 1e28), (9, 1e20), within=1e28),
    "many layers": lambda: trajectory(*many_layers()),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_trajectories_have_a_page(name, drawn, tmp_path):
    run = ODD[name]()
    text = text_of(write_dynamics_page(tmp_path, run, None, "x"))
    assert not re.search(r"\b(nan|inf)\b", re.sub(r"<script>.*?</script>", "", text))
    rows = text.split('id="steps"')[1].split("</section>")[0].count("<tr>") - 1
    assert rows == min(len(run), dynamics_page.ROWS_SHOWN)
    assert ('id="film-blocks"' in text) == ("energies" in drawn) == (run.snapshots[0].energies is not None)
    assert not re.search(r"\b1 (steps|snapshots|diagonal blocks)\b", text)
    if name == "many layers":
        assert len(drawn["energies"].axes[0].lines) == 7
        assert "Drawn are the 7 of 78 pairs" in text
        assert "Lines of 7 of 12 layers." in text


def test_a_trajectory_without_snapshots_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"^trajectory has no snapshot yet: there is nothing to show$"):
        write_dynamics_page(tmp_path, trajectory(), None, "x")


def test_maps_name_blocks_if_few_else_layers():
    few = dynamics_figures.block_ruler(LABELS, LAYERS)
    assert (few.borders, few.names, few.places[1]) == ((2.0,), LABELS, 1.5)
    labels = tuple(str(k) for k in range(508))
    many = dynamics_figures.block_ruler(labels, ("fc1",) * 8 + ("fc2",) * 500)
    assert (many.borders, many.names, many.places) == ((8.0,), ("fc1", "fc2"), (4.0, 258.0))
    crowded = dynamics_figures.block_ruler(labels, labels)
    assert len(crowded.names) <= 26
