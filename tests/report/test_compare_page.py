"""The page of `hesscope compare` as a reader sees it, and what it says, beside overlaps of dense eigenvectors."""

import json
import re

import numpy as np
import pytest

from hesscope.layerwise.eigenstructure import eigenstructure
from hesscope.layerwise.shared_eigenspaces import SharedEigenspaces, shared_eigenspaces
from hesscope.report import compare_page
from hesscope.report.compare_page import compare_headline, compare_table, write_compare_page
from hesscope.report.page import Picture
from hesscope.report.style import percent
from tests.report.test_layers_page import plain, text_of
from tests.report.test_page import assert_legible, opened

OUTPUTS, INPUTS, K = 3, 8, 6


def positive(generator, size):
    root = generator.standard_normal((size, size))
    return root @ root.T / size


def planted(seed, mean, noise, name):
    """A Hessian that is nearly E[M] (x) (mean mean^T + small), with its factors."""
    generator = np.random.default_rng(seed)
    output = np.eye(OUTPUTS) + positive(generator, OUTPUTS)
    input = 20 * np.outer(mean, mean) + 0.1 * positive(generator, INPUTS)
    H = np.kron(output, input) + noise * positive(generator, OUTPUTS * INPUTS)
    return H, np.kron(output, input), eigenstructure(H, output, input, K, name=name)


@pytest.fixture(scope="module")
def models():
    """Three models of a layer that shares its mean input, and of one that does not."""
    generator = np.random.default_rng(7)
    mean = generator.standard_normal(INPUTS)
    together = [planted(seed, mean, 5.0, "fc1") for seed in range(3)]
    apart = [planted(seed, generator.standard_normal(INPUTS), 5.0, "fc2") for seed in range(3, 6)]
    return [together, apart]


def datasets(layers, runs=3, **attributes):
    labels = ["a", "b<i>", "$c$"][:runs]
    given = {"curvature": "hessian", "note": "", "left_out": "{}", "versions": "PyTorch", **attributes}
    return [
        shared_eigenspaces([structure for *_, structure in layer[:runs]], labels).to_xarray().assign_attrs(given)
        for layer in layers
    ]


def overlaps(matrices, k):
    """Of every pair, from dense eigenvectors."""
    bases = [np.linalg.eigh(matrix)[1][:, ::-1][:, :k] for matrix in matrices]
    pairs = [(i, j) for i in range(len(bases)) for j in range(i + 1, len(bases))]
    return np.array([((bases[i].T @ bases[j]) ** 2).sum() / k for i, j in pairs])


@pytest.fixture
def drawn(models, tmp_path, monkeypatch):
    found = {}

    def kept(folder, name, fig, alt):
        found[name] = fig.axes[0]
        return Picture(name, "", alt)

    monkeypatch.setattr(compare_page, "picture", kept)
    return found, write_compare_page(tmp_path, datasets(models), "hesscope compare a b c")


def test_the_page_in_a_browser(models, tmp_path):
    shared = datasets(models, models=["MLP", "CNN", "MLP"], data=["digits", "<x>", "digits"])
    page = write_compare_page(tmp_path, shared, "hesscope compare a b c")
    seen = opened(page, tmp_path)
    assert [section for section, _ in seen["seen"]] == ["layers", "layer-0", "layer-1", "provenance"]
    assert_legible(seen, pictures=4)
    assert plain(seen["title"]) == plain(compare_headline(shared))
    text = text_of(page)
    assert "<i>" not in text
    assert '<td>b&lt;i&gt;</td><td class="wrap">CNN</td><td class="wrap">&lt;x&gt;</td>' in text
    assert not re.search(r"\b(nan|inf)\b", text)
    assert not re.search(r'(?:src|href)="(?!data:)', page.read_text())
    names = [
        f"compare-{layer:03d}-{kind}.{end}"
        for layer in range(2)
        for kind in ("overlap", "pairs")
        for end in ("png", "pdf")
    ]
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == sorted(names)


def test_the_page_states_overlaps_of_dense_eigenvectors(models, drawn):
    text = text_of(drawn[1])
    table = [[plain(cell) for cell in row] for row in compare_table(datasets(models))]
    chance, overlaps_of, ratios = 1 / INPUTS, [], []
    for position, layer in enumerate(models):
        curve = np.array([overlaps([H for H, *_ in layer], k) for k in range(1, K + 1)])
        at = curve[OUTPUTS - 1]
        predicted = overlaps([product for _, product, _ in layer], OUTPUTS).mean()
        without = at[::-1]  # one pair is left when a model is left out: (b, c), (a, c), (a, b)
        stderr = np.sqrt(2 / 3 * ((without - without.mean()) ** 2).sum())
        overlaps_of.append(at.mean())
        ratios.append(at.mean() / chance)
        peak = int(curve.mean(axis=1).argmax()) + 1
        row = dict(zip(table[0], table[1 + position], strict=True))
        assert (row["layer"], row["runs"], row["k"]) == (f"fc{position + 1}", "3", str(OUTPUTS))
        shown, error = row["overlap"].split(" % ± ")
        half_a_digit = 0.5001 * 10.0 ** -len(error.split(".")[1])
        assert float(shown) == pytest.approx(100 * at.mean(), abs=half_a_digit)
        assert float(error) == pytest.approx(100 * stderr, abs=half_a_digit)
        assert row["predicted"] == plain(percent(predicted))
        assert row["chance"] == plain(percent(chance))
        assert float(row["times chance"]) == pytest.approx(ratios[-1], rel=6e-3)
        assert row["peak k"] == str(peak)
        for cell in row.values():
            assert f"<td>{cell}</td>" in text
        section = text.split(f'id="layer-{position}"')[1].split("</section>")[0]
        assert f"decoupling predicts {row['predicted']} and chance is {row['chance']}" in section
        assert f"from {plain(percent(at.min()))} to {plain(percent(at.max()))}" in section
    assert ratios[0] > 5 > ratios[1]  # as planted
    headline = plain(compare_headline(datasets(models)))
    assert headline.startswith("The 3 runs share the top eigenspace of 1 of 2 layers: most above chance in layer fc1 (")
    assert (
        f"{plain(percent(overlaps_of[0]))}, {ratios[0]:.1f} times chance at k = {OUTPUTS}), least in layer fc2"
        in headline
    )


def test_figures_show_the_records(models, drawn):
    figures, _ = drawn
    for position, dataset in enumerate(datasets(models)):
        found = SharedEigenspaces.from_xarray(dataset)
        axes = figures[f"compare-{position:03d}-overlap"]
        single = [line.get_ydata() for line in axes.lines[:3]]
        np.testing.assert_allclose(single, found.curves)
        lines = {line.get_label(): line.get_ydata() for line in axes.lines}
        np.testing.assert_allclose(lines["mean"], found.curves.mean(axis=0))
        np.testing.assert_allclose(lines["predicted by decoupling"], found.predicted.mean(axis=0))
        np.testing.assert_allclose(lines["chance k/P"], np.arange(1, K + 1) / (OUTPUTS * INPUTS))
        assert axes.lines[-1].get_xdata()[0] == OUTPUTS
        band = axes.collections[0].get_paths()[0].vertices
        assert band[:, 1].max() == pytest.approx(float((found.mean + found.stderr).max()))
        shown = figures[f"compare-{position:03d}-pairs"].images[0].get_array()
        np.testing.assert_allclose(shown[found.first, found.second], 100 * found.curves[:, OUTPUTS - 1])


def test_two_runs_have_no_standard_error(models, tmp_path, monkeypatch):
    monkeypatch.setattr(compare_page, "picture", lambda folder, name, fig, alt: Picture(name, "", alt))
    shared = datasets(
        models[:1],
        runs=2,
        note="the runs were measured on different data",
        left_out=json.dumps({"<u>fc3": "has different shapes: 2 x 3 in a, 3 x 3 in b"}),
    )
    text = text_of(write_compare_page(tmp_path, shared, "hesscope compare a b"))
    assert "with fewer than three runs it has no standard error" in text
    assert "Note: the runs were measured on different data." in text
    assert "<b>&lt;u&gt;fc3</b> has different shapes: 2 x 3 in a, 3 x 3 in b." in text
    assert "±" not in compare_table(shared)[1][4]
    assert compare_headline(shared).startswith("The 2 runs share the top eigenspace of layer fc1: the overlap is ")


def test_fewer_eigenpairs_than_the_width(models, tmp_path, monkeypatch):
    monkeypatch.setattr(compare_page, "picture", lambda folder, name, fig, alt: Picture(name, "", alt))
    cut = [dataset.isel(dimension=slice(0, 2)) for dataset in datasets(models)]
    text = text_of(write_compare_page(tmp_path, cut, "hesscope compare a b c"))
    assert "at k = 2, all that was computed, is" in text
    assert [row[3] for row in compare_table(cut)[1:]] == ["2", "2"]


@pytest.mark.parametrize(
    ("factors", "said"),
    [
        ((1.0, 1.0), "Decoupling predicts this to within a factor of 1.0."),
        ((1.2, 0.8), "Decoupling predicts this to within a factor of 1.2."),
        ((3.0, 1.0), "Decoupling predicts this to within a factor of 1.5 in 1 of 2 layers."),
        ((3.0,), "What decoupling predicts is off by a factor of 3.0."),
        ((0.0,), "What decoupling predicts is nothing like it."),
    ],
)
def test_what_decoupling_predicts(factors, said, models):
    shared = datasets(models)[: len(factors)]
    changed = [data.assign(predicted=factor * data["overlap"]) for data, factor in zip(shared, factors, strict=True)]
    assert compare_headline(changed).endswith(said)
