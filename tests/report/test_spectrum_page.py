"""The page of `hesscope spectrum` as a reader sees it, and what it says."""

import re

import numpy as np
import pytest
import xarray as xr
from markupsafe import escape

from hesscope.report import spectrum_page
from hesscope.report.spectrum_page import block_table, spectrum_headline, spectrum_table, write_spectrum_page
from hesscope.study.config import SpectrumConfig, StudyConfig
from hesscope.study.spectrum import prepare_spectrum, run_spectrum
from tests.report.test_page import assert_legible, opened

HERE = "tests.study.user_code"
FAST = {"eigenpairs": 3, "probes": 3, "steps": 8, "block_probes": 2, "block_steps": 6}
# name -> (keys of the study, section [spectrum], pictures)
STUDIES = {
    "sampled": ({"partition": "row"}, FAST, 4),
    "not converged": (
        {"model": f"{HERE}:half_network", "data": f"{HERE}:half_points"},
        {**FAST, "matrix": "gauss_newton", "max_products": 8, "residual": 1e-7},
        4,
    ),
    "exact": ({"partition": f"{HERE}:long_names", "loss": f"{HERE}:sum_loss"}, {}, 4),
    "zero": ({"loss": f"{HERE}:linear_loss", "model": f"{HERE}:huge_network"}, FAST, 0),
}


def result_of(tmp_path, keys, settings):
    values = {"model": f"{HERE}:network", "data": f"{HERE}:tensors", "output": "out", **keys}
    study = prepare_spectrum(StudyConfig(**values, spectrum=SpectrumConfig(**settings)), tmp_path)
    run_spectrum(study, lambda title, share: None)
    return study.folder, study.store.require("spectrum")


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    folder, result = result_of(tmp_path_factory.mktemp("spectrum"), *STUDIES["sampled"][:2])
    return result, write_spectrum_page(folder, result, "hesscope spectrum STUDY.toml")


@pytest.mark.parametrize("name", STUDIES)
def test_pages_of_spectra_in_a_browser(name, tmp_path, sampled):
    keys, settings, pictures = STUDIES[name]
    if name == "sampled":
        _, page = sampled
    else:
        folder, result = result_of(tmp_path, keys, settings)
        page = write_spectrum_page(folder, result, "hesscope spectrum STUDY.toml")
    seen = opened(page, tmp_path)
    sections = [section for section, _ in seen["seen"]]
    drawn = [] if name == "zero" else ["density", "ends"]
    assert sections == [*drawn, "numbers", "blocks", *(["distances"] if drawn else []), "provenance"]
    assert_legible(seen, pictures)
    text = re.sub(r'src="data:[^"]*"', "", page.read_text())
    assert not re.search(r"\b(nan|inf)\b", text)
    assert ("is zero" in seen["title"]) == (name == "zero")
    assert ("about" in seen["title"]) == (name == "not converged")
    assert ("Not to its tolerance: largest eigenvalues" in text) == (name == "not converged")
    assert ("spectrum of the Gauss-Newton matrix" in text) == (name == "not converged")
    assert ("the model is bfloat16, measured in float32" in text) == (name == "not converged")
    assert ("The band covers" in text) == (name in ("sampled", "not converged"))


def test_figures_are_saved_as_png_and_pdf(sampled):
    _, page = sampled
    names = {path.name for path in (page.parent / "figures").iterdir()}
    assert names == {
        f"spectrum-{name}.{ending}" for name in ("density", "ends", "blocks", "distances") for ending in ("png", "pdf")
    }


def test_the_page_is_self_contained_and_names_every_block(sampled):
    result, page = sampled
    text = page.read_text()
    assert not re.search(r'(?:src|href)="(?!data:)', text)
    for label in result["block"].to_numpy():
        assert str(escape(label)) in text


def test_the_page_states_the_numbers_and_how_they_were_made(sampled):
    result, page = sampled
    text = page.read_text()
    for row in spectrum_table(result)[1:]:
        assert row[1] in text
    assert str(escape(result.attrs["explanation"])) in text
    assert f"{int(result['products'].sel(measured='density')):,}" in text
    assert str(result["message"].sel(measured="trace").item()) in text


def test_tables_show_values_with_their_errors(sampled):
    result, _ = sampled
    table = {row[0]: row for row in spectrum_table(result)}
    value, error = (float(result[name].sel(quantity="negative_mass")) for name in ("value", "error"))
    shown = table["negative part of the sum of |λ|"]
    assert float(shown[1]) == pytest.approx(value, rel=0.005)
    assert float(shown[2].removeprefix("± ")) == pytest.approx(error, rel=0.5)
    least = table["smallest eigenvalue λ min"]
    residual = float(result["error"].sel(quantity="smallest"))
    assert float(least[1]) < 0
    assert float(least[2].removeprefix("± ")) == pytest.approx(residual, rel=0.5)
    blocks = block_table(result)
    assert len(blocks) == 1 + result.sizes["block"]
    assert float(blocks[1][2].split(" ± ")[0]) == pytest.approx(float(result["block_trace"][0]), rel=0.005)


def test_long_tables_keep_the_blocks_of_the_largest_traces(sampled, monkeypatch):
    result, _ = sampled
    monkeypatch.setattr(spectrum_page, "BLOCKS_PRINTED", 2)
    largest = np.sort(np.argsort(-result["block_trace"].to_numpy())[:2])
    assert [row[0] for row in block_table(result)[1:]] == [str(result["block"][k].item()) for k in largest]


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (0, "no direction stands out of the bulk."),
        (1, "1 direction stands out of a bulk of 47."),
        (9, "9 directions stand out of a bulk of 39."),
    ],
)
def test_headlines(sampled, count, words):
    result = sampled[0].copy(deep=True)
    result["value"].loc[{"quantity": "outliers"}] = count
    assert spectrum_headline(result).endswith(f"; {words}")


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (12.3456, 0.04, "12.35 ± 0.04"),
        (12.3456, 0.0, "12.3"),
        (12.3456, np.nan, "12.3"),
        (0.833061, 2e-9, "0.83306 ± 2e-09"),
        (3e-9, 4e-8, "3.00e-09 ± 4e-08"),
        (np.nan, np.nan, "—"),
        (0.0, 0.1, "0 ± 0.1"),
    ],
)
def test_values_are_shown_as_far_as_their_errors_reach(value, error, text):
    assert spectrum_page.with_reach(value, error) == text


def test_a_result_survives_its_file(sampled, tmp_path):
    result, _ = sampled
    path = tmp_path / "copy.nc"
    result.to_netcdf(path, engine="h5netcdf")
    again = xr.load_dataset(path, engine="h5netcdf")
    assert spectrum_table(again) == spectrum_table(result)
    assert block_table(again) == block_table(result)
