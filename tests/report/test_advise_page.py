"""The page of `hesscope advise` as a reader sees it, and what it says."""

import re

import pytest

from hesscope.report.advise_page import advise_headline, advise_table, cut_table, write_advise_page
from hesscope.study.advise import ENERGIES, RESULT, SPECTRA, ZOOM, prepare_advise, run_advise
from hesscope.study.config import StudyConfig
from tests.report.test_page import assert_legible, opened

HERE = "tests.study.user_code"
# name -> (keys of the study, sections, pictures, how the headline begins)
STUDIES = {
    "rows": (
        {"model": f"{HERE}:planted_rows", "data": f"{HERE}:correlated_points", "loss": "mse"},
        ["partitions", "cuts", "map", "zoom", "how"],
        2,
        "Best block-diagonal: with one block per row",
    ),
    "dense": (
        {"loss": f"{HERE}:rank_one_loss"},
        ["partitions", "cuts", "map", "heterogeneity", "how"],
        3,
        "Do not split",
    ),
    "network": ({}, ["partitions", "cuts", "map", "zoom", "heterogeneity", "how"], 3, ""),
}


def studied(tmp_path, keys):
    values = {"model": f"{HERE}:network", "data": f"{HERE}:points", "output": "out", **keys}
    study = prepare_advise(StudyConfig(**values), tmp_path)
    run_advise(study, lambda title, share: None)
    store = study.store
    page = write_advise_page(
        study.folder, store.require(RESULT), store.require(ENERGIES), store.load(SPECTRA), store.load(ZOOM), "command"
    )
    return store.require(RESULT), page


@pytest.mark.parametrize("name", STUDIES)
def test_pages_of_advice_in_a_browser(name, tmp_path):
    keys, sections, pictures, headline = STUDIES[name]
    result, page = studied(tmp_path, keys)
    seen = opened(page, tmp_path)
    assert [section for section, _ in seen["seen"]] == sections
    assert_legible(seen, pictures)
    assert seen["title"].startswith(headline)
    assert seen["title"] == advise_headline(result)
    text = re.sub(r'src="data:[^"]*"|<script.*?</script>', "", page.read_text(), flags=re.DOTALL)
    assert not re.search(r"\b(nan|inf)\b", text)
    # What the script wrote: the trail of the map.
    table = advise_table(result)
    bits = [float(row[6].replace(",", "")) for row in table[1:] if row[6] != "—"]
    assert bits == sorted(bits, reverse=True)
    assert len(cut_table(result)) == 1 + len({row[0] for row in cut_table(result)[1:]})


def test_the_map_opens_with_a_click(tmp_path):
    """Chromium clicks the first block on the diagonal, and the trail tells where it is."""
    _, page = studied(tmp_path, {})
    click = """<script>
const map = document.getElementById("zoommap"), box = map.getBoundingClientRect(), r = box.width / map.width;
const trail = () => document.getElementById("trail").textContent;
const before = trail();
map.dispatchEvent(new MouseEvent("click", {clientX: box.left + 260 * r, clientY: box.top + 20 * r}));
document.querySelector("h1").innerText = before + " | " + trail();
</script></main>"""
    page.write_text(page.read_text().replace("</main>", click))
    title = opened(page, tmp_path)["title"]
    assert re.fullmatch(r"whole network — 2 blocks by module \| whole network › fc1 — 6 blocks by block", title), title
