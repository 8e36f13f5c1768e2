"""The demo's page as a reader sees it: opened in headless Chromium, every section visible, every picture decoded."""

import html
import json
import re
import shutil
import subprocess
from itertools import pairwise

import numpy as np
import pytest

from hesscope.report import figures, style
from hesscope.report.demo_page import write_demo_page
from hesscope.report.static_page import write_sweep_page, write_theory_page
from hesscope.report.study_page import write_study_page
from hesscope.study.analyze import prepare, run
from hesscope.study.config import StudyConfig
from hesscope.study.demo import DemoSettings, demo_results, run_demo
from hesscope.study.prediction import TheorySettings, run_theory, theory_store
from hesscope.study.sweep import SweepSettings, run_sweep, sweep_store

HERE = "tests.study.user_code"
SECTIONS = (
    "training",
    "hessian",
    "energies",
    "ratios",
    "groups",
    "eigenvalues",
    "layers",
    "theory",
    "sweep",
    "provenance",
)
DEMO = DemoSettings(width=4, epochs=4, theory_classes=(3, 10), sweep_classes=(3, 6))
# Appended to a copy of the page: what the browser made of it, as JSON in the document.
PROBE = """<script>
const seen = [...document.querySelectorAll("section")].map(s => [s.id, s.getBoundingClientRect().height]);
const pictures = [...document.images].map(i => [i.complete, i.naturalWidth, i.getBoundingClientRect().width]);
const overflow = document.documentElement.scrollWidth - window.innerWidth;
document.body.innerHTML = "<pre id=probe>" + JSON.stringify({seen, pictures, overflow,
    title: document.querySelector("h1").innerText}) + "</pre>";
</script>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    run_demo(folder, DEMO, lambda title, share: None)
    return write_demo_page(folder, demo_results(folder, DEMO), "hesscope demo")


def opened(page, tmp_path):
    """What Chromium made of the page: heights of its sections, sizes of its pictures, overflow, headline."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("Chromium is not installed (apt-get install chromium)")
    copy = tmp_path / "page.html"
    copy.write_text(page.read_text().replace("</main>", "</main>" + PROBE))
    flags = "--headless --no-sandbox --disable-gpu --disable-background-networking --no-first-run --disable-sync"
    command = [chromium, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1200,900"]
    dom = subprocess.run([*command, "--dump-dom", f"file://{copy}"], capture_output=True, text=True, timeout=60).stdout
    found = re.search(r'<pre id="probe">(.*?)</pre>', dom, re.DOTALL)
    assert found, dom[-500:]
    return json.loads(html.unescape(found.group(1)))


def assert_legible(seen, pictures):
    assert all(height > 100 for _, height in seen["seen"])
    assert len(seen["pictures"]) == pictures
    assert all(complete and natural > 500 and shown > 400 for complete, natural, shown in seen["pictures"])
    assert seen["overflow"] <= 0


def test_the_demo_s_page_in_a_browser(page, tmp_path):
    seen = opened(page, tmp_path)
    assert [name for name, _ in seen["seen"]] == list(SECTIONS)
    assert_legible(seen, pictures=10)
    assert "block-diagonal to 1 part in" in seen["title"]


STUDIES = {
    "exact": {},
    "probes": {"method": "probes", "probes": 4},
    "one block per layer": {"partition": "layer"},
    "zero Hessian": {"loss": f"{HERE}:linear_loss", "model": f"{HERE}:huge_network"},
    "zero residual part": {"model": f"{HERE}:huge_network"},
    "long names": {"partition": f"{HERE}:long_names"},
}


@pytest.mark.parametrize("name", STUDIES)
def test_pages_of_studies_in_a_browser(name, tmp_path):
    values = {"model": f"{HERE}:network", "data": f"{HERE}:tensors", "output": "out", **STUDIES[name]}
    study = prepare(StudyConfig(**values), tmp_path)
    run(study, lambda title, share: None)
    page = write_study_page(study.folder, study.store.require("energies"), "hesscope analyze STUDY.toml")
    seen = opened(page, tmp_path)
    names = [section for section, _ in seen["seen"]]
    assert {"totals", "energies", "blocks", "provenance"} <= set(names)
    assert ("hessian" in names) == (name != "probes")
    assert_legible(seen, pictures=len(study.part_names) + (0 if name == "probes" else 2))
    assert "nan" not in page.read_text().split("<main>")[1].replace("base64", "").split("data:image")[0]
    assert ("The Hessian is zero" in seen["title"]) == (name == "zero Hessian")
    assert ("one standard error" in seen["title"]) == (name == "probes")


STATIC = {
    "sweep of both losses": SweepSettings((3, 6, 12), 2, inputs=40, samples=80, width=4, rtol=0.2),
    "sweep of squared error": SweepSettings(
        (3, 6), 2, ("mse",), inputs=40, samples=30, width=4, activation="tanh", rtol=0.2
    ),
    "theory of both losses": TheorySettings(
        losses=("cross_entropy", "mse"), classes=(3, 10), gammas=(0.5, 2.0), rtol=0.1
    ),
    "theory of linear models": TheorySettings("linear", ("cross_entropy",), (2, 10, 131072)),
    "theory of linear models, squared error": TheorySettings("linear", ("mse",), (10,)),
}


@pytest.mark.parametrize("name", STATIC)
def test_pages_of_the_static_force_in_a_browser(name, tmp_path):
    settings = STATIC[name]
    if isinstance(settings, SweepSettings):
        run_sweep(tmp_path, settings, lambda title, share: None)
        page = write_sweep_page(tmp_path, sweep_store(tmp_path, settings).require("sweep"), "hesscope sweep")
    else:
        run_theory(tmp_path, settings, lambda title, share: None)
        page = write_theory_page(tmp_path, theory_store(tmp_path, settings).require("theory"), "hesscope theory")
    seen = opened(page, tmp_path)
    assert [section for section, _ in seen["seen"]] == [name.split()[0], "provenance"]
    assert_legible(seen, pictures=2)
    assert not re.search(r"\bnan\b", re.sub(r'src="data:[^"]*"', "", page.read_text()))


def test_the_page_is_self_contained(page):
    text = page.read_text()
    assert not re.search(r'(?:src|href)="(?!data:)', text)
    assert "http-equiv" not in text


def test_figures_are_saved_as_png_and_pdf(page):
    names = {path.name for path in (page.parent / "figures").iterdir()}
    assert names == {
        f"{name}.{ending}"
        for name in (
            "training",
            "hessian",
            "energies",
            "groups",
            "eigenvalues",
            "layers",
            "theory",
            "laws",
            "sweep",
            "spectra",
        )
        for ending in ("png", "pdf")
    }


def test_the_page_states_how_the_layers_decouple(page):
    """The error of the first layer, from the dense Hessian that the demo has stored."""
    results = demo_results(page.parent, DEMO)
    rows = results["layers"]
    assert rows["layer"].to_numpy().tolist() == ["fc1", "fc2"]
    hessian = results["cross_entropy-final"]["hessian"].to_numpy().astype(np.float64)
    outputs, inputs = int(rows["outputs"][0]), int(rows["inputs"][0])
    block = hessian[: outputs * inputs, : outputs * inputs]
    R = block.reshape(outputs, inputs, outputs, inputs).transpose(0, 2, 1, 3).reshape(outputs**2, inputs**2)
    singular = np.linalg.svd(R, compute_uv=False)
    best = np.sqrt((singular[1:] ** 2).sum()) / np.linalg.norm(block)
    assert float(rows["best_relative_error"][0]) == pytest.approx(best, rel=1e-5)
    assert f"<td>{100 * best:.1f}\N{NO-BREAK SPACE}%</td>" in page.read_text()
    assert float(rows["top_eigenvalue"][0]) == pytest.approx(np.linalg.eigvalsh(block)[-1], rel=1e-5)


def test_the_page_states_the_numbers_of_the_results(page):
    results = demo_results(page.parent, DEMO)
    hessian = results["cross_entropy-final"]["hessian"].to_numpy().astype(np.float64)
    edges = [0, *np.cumsum(results["cross_entropy-final"]["block_size"].to_numpy())]
    blocks = [hessian[a:b, a:b] for a, b in pairwise(edges)]
    share = sum((block**2).sum() for block in blocks) / (hessian**2).sum()
    assert style.percent(share) in page.read_text()


def test_pooling_keeps_the_energy():
    matrix = np.random.default_rng(0).standard_normal((1300, 1300))
    pooled = figures.pooled(np.abs(matrix))
    assert pooled.shape == (434, 434)
    np.testing.assert_allclose((pooled[:433, :433] ** 2).sum() * 9, (matrix[:1299, :1299] ** 2).sum(), rtol=1e-12)


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.034123, "0.0341"), (1234.5, "1,234"), (3.4e-7, "3.40e-07"), (12, "12.0")]
)
def test_numbers(value, text):
    assert style.number(value) == text


@pytest.mark.parametrize(
    ("share", "text"), [(0.5, "50.0 %"), (1.0, "100.0 %"), (0.99996, "99.9960 %"), (2e-5, "0.002 %"), (0.0, "0.0 %")]
)
def test_percentages(share, text):
    assert style.percent(share).replace("\N{NO-BREAK SPACE}", " ") == text


def test_ratios_in_words():
    assert style.one_part_in(0.0) == "exact"
    assert style.one_part_in(0.04) == "1 part in 25"
    assert style.one_part_in(2.2) == "2.2 times the diagonal"
