"""The page of `hesscope layers` as a reader sees it, and what it says, beside sums over the dense Hessian."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import xarray as xr

import hesscope as hs
from hesscope.layerwise.eigenstructure import Eigenstructure, layer_eigenstructure
from hesscope.layerwise.factors import KroneckerFactors, kronecker_factors, layer_hessian
from hesscope.layerwise.full_hessian import full_hessian_overlap
from hesscope.layerwise.rank_one import LayerLowRank, layer_low_rank
from hesscope.report import layers_page
from hesscope.report.layers_page import layers_headline, layers_table, share_with_error, write_layers_page
from hesscope.report.page import Picture
from hesscope.report.style import number, percent
from hesscope.study.layers import layer_row
from tests.report.test_page import assert_legible, opened

CLASSES, POINTS = 4, 40
FIGURES = ("eigenvalues", "overlap", "output-correspondence", "input-correspondence", "singular-values", "factors")


@pytest.fixture(scope="module")
def network():
    """Two layers with a bias and a bent activation, so that the Hessian is not the Gauss-Newton matrix."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(POINTS, 5, generator=generator, dtype=torch.float64) + 1
    y = torch.randint(CLASSES, (POINTS,), generator=generator)
    model = hs.models.mlp((5, 3, CLASSES), activation="tanh", bias=True, dtype=torch.float64)
    return hs.Objective(model, "cross_entropy", (X, y))


@pytest.fixture(scope="module")
def study(network):
    return study_of(network, ("fc1", "fc2"))


def study_of(objective, layers, errors=True, full=3, **arguments):
    """Data sets of all records, as `hesscope layers` stores them."""
    found = SimpleNamespace(factors=[], structures=[], low_ranks=[], full=None)
    for layer in layers:
        factors = kronecker_factors(objective, layer, errors=errors)
        structure = layer_eigenstructure(objective, layer, factors=factors, **arguments)
        found.factors.append(factors.to_xarray())
        found.structures.append(structure.to_xarray())
        found.low_ranks.append(layer_low_rank(structure, factors).to_xarray())
    if full:
        found.full = full_hessian_overlap(objective, full, layers).to_xarray()
    found.summary = summary_of(found)
    return found


def summary_of(study, **attributes):
    """The summary that `hesscope layers` makes of the records of its layers."""
    records = [
        (KroneckerFactors.from_xarray(each), Eigenstructure.from_xarray(structure), LayerLowRank.from_xarray(low_rank))
        for each, structure, low_rank in zip(study.factors, study.structures, study.low_ranks, strict=True)
    ]
    rows = [layer_row(*record) for record in records]
    first = records[0][0]
    given = {
        "model": "MLP",
        "parameters": sum(row["parameters"] for row in rows),
        "data": "points",
        "loss": "cross_entropy",
        "samples": first.samples,
        "classes": -1 if first.classes is None else first.classes,
        "curvature": records[0][1].curvature,
        "seed": 0,
        "sharing": "",
        "left_out": json.dumps({}),
        "version": "0",
        "versions": "PyTorch",
    }
    names = np.array([factor.layer for factor, *_ in records], dtype=object)
    return xr.Dataset(
        {name: ("layer", np.array([row[name] for row in rows])) for name in rows[0]},
        {"layer": names},
        given | attributes,
    )


def written(folder, study, summary=None):
    summary = study.summary if summary is None else summary
    records = (study.factors, study.structures, study.low_ranks, study.full)
    return write_layers_page(folder, summary, *records, "hesscope layers STUDY.toml")


def text_of(page):
    """What is written on it, with all blanks alike."""
    body = re.sub(r'src="data:[^"]*"|<style>.*?</style>', "", page.read_text(), flags=re.DOTALL)
    return re.sub(r"\s+", " ", body.replace("\N{NO-BREAK SPACE}", " "))


def plain(text):
    return text.replace("\N{NO-BREAK SPACE}", " ")


@pytest.fixture
def drawn(study, tmp_path, monkeypatch):
    """Name -> axes of all figures of the page, which are not rendered; and the page."""
    found = {}

    def kept(folder, name, fig, alt):
        found[name] = fig.axes[0]
        return Picture(name, "", alt)

    monkeypatch.setattr(layers_page, "picture", kept)
    return found, written(tmp_path, study)


def test_the_page_in_a_browser(study, tmp_path):
    """With the figures of one layer, since rendering them takes most of the time."""
    first = SimpleNamespace(
        factors=study.factors[:1], structures=study.structures[:1], low_ranks=study.low_ranks[:1], full=study.full
    )
    summary = summary_of(first)
    page = written(tmp_path, first, summary)
    seen = opened(page, tmp_path)
    assert [section for section, _ in seen["seen"]] == ["layers", "layer-0", "full", "provenance"]
    assert_legible(seen, pictures=2 + len(FIGURES) + 2)
    assert plain(seen["title"]) == plain(layers_headline(summary))
    assert not re.search(r"\b(nan|inf)\b", text_of(page))
    assert not re.search(r'(?:src|href)="(?!data:)', page.read_text())
    names = {"layers-errors", "layers-shares", "layers-full-shares", "layers-full-overlap"}
    names |= {f"layer-000-{figure}" for figure in FIGURES}
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        f"{name}.{end}" for name in names for end in ("png", "pdf")
    }


def test_the_page_states_sums_over_the_dense_hessian(network, study, drawn):
    text = text_of(drawn[1])
    table = [[plain(cell) for cell in row] for row in layers_table(study.summary)]
    errors = []
    for position, layer in enumerate(("fc1", "fc2")):
        H = layer_hessian(network, layer).dense().numpy()
        factors = KroneckerFactors.from_xarray(study.factors[position])
        outputs, inputs = factors.shape
        features = inputs - 1
        # The parameters' order is the weight row by row, then the bias; Kronecker's has the bias in every row.
        order = np.array(
            [[o * features + i for i in range(features)] + [outputs * features + o] for o in range(outputs)]
        )
        H = H[np.ix_(order.ravel(), order.ravel())]
        K = np.kron(factors.output, factors.input)
        errors.append(np.linalg.norm(H - K) / np.linalg.norm(H))
        arranged = H.reshape(outputs, inputs, outputs, inputs).transpose(0, 2, 1, 3).reshape(outputs**2, inputs**2)
        singular = np.linalg.svd(arranged, compute_uv=False)
        best = np.sqrt((singular[1:] ** 2).sum() / (singular**2).sum())
        values, vectors = np.linalg.eigh(H)
        values, vectors = values[::-1], vectors[:, ::-1]
        top = vectors[:, : CLASSES - 1].T.reshape(-1, outputs, inputs)
        _, sigma, right = np.linalg.svd(top)
        leading = np.median(sigma[:, 0] ** 2 / (sigma**2).sum(axis=1))
        mean = factors.input_mean / np.linalg.norm(factors.input_mean)
        along = np.median((right[:, 0] @ mean) ** 2)
        moments, directions = np.linalg.eigh(factors.input)
        own = np.linalg.eigh(K)[1][:, ::-1]
        overlap = ((vectors[:, :outputs].T @ own[:, :outputs]) ** 2).sum() / outputs
        cosine, ratio = float((directions[:, -1] @ mean) ** 2), moments[-1] / moments[-2]
        k = int(study.summary["pairs"][position])
        gap = int(np.argmax(values[: k - 1] / np.maximum(values[1:k], 1e-14 * values[0]))) + 1
        row = dict(zip(table[0], table[1 + position], strict=True))
        assert row["layer"] == layer
        assert row["shape"] == f"{outputs} × {inputs}"
        assert row["error"] == plain(percent(errors[-1]))
        assert row["best product"] == plain(percent(best))
        assert row["largest λ"] == number(values[0])
        assert row["outliers"].split(" ") == [str(gap), f"(×{values[gap - 1] / values[gap]:.2f})"]
        assert row["overlap"] == plain(percent(overlap))
        assert row["rank one"] == plain(percent(leading))
        assert row["along E[x]"] == plain(percent(along))
        decimals = len(row["cos²"]) - 2
        assert float(row["cos²"]) == pytest.approx(cosine, abs=0.5001 * 10**-decimals)
        assert float(row["cos²"]) < 1 or cosine > 1 - 1e-9
        assert row["λ₁/λ₂"] == number(ratio)
        for cell in row.values():
            assert f"<td>{cell}</td>" in text
        section = text.split(f'id="layer-{position}"')[1].split("</section>")[0]
        assert f"misses {row['error']} of ‖H‖, the best product {row['best product']}" in section
        assert f"{gap} before the largest gap of H" in section
        assert f"C − 1 = {CLASSES - 1}" in section
        assert f"{plain(percent(overlap))} at k = {outputs}, where chance gives {plain(percent(1 / inputs))}" in section
        assert f"the largest one has {plain(percent(leading))} in the first {CLASSES - 1} (median)" in section
        shares = ((np.linalg.eigh(factors.output)[1].T @ top) ** 2).sum(axis=2)
        assert f"is {plain(percent(shares.max(axis=1).mean()))} on average" in section
        share = values[:k].sum() / np.trace(H)
        held = f"add up to {number(values[:k].sum())}, all to the trace {number(np.trace(H))}<"
        assert (f"and {plain(percent(share))} of the trace" if share <= 1 else held) in section
        assert f"{plain(percent((values[:k] ** 2).sum() / (values**2).sum()))} of the squared norm" in section
    low, high = sorted((0, 1), key=lambda position: errors[position])
    said = f"{percent(errors[low])} (layer fc{low + 1}) to {percent(errors[high])} (layer fc{high + 1}) of their"
    assert plain(said) in plain(layers_headline(study.summary))
    assert plain(said) in text


def test_figures_show_the_records(study, drawn):
    figures, _ = drawn
    summary = study.summary
    bars = [patch.get_width() for patch in figures["layers-errors"].patches]
    np.testing.assert_allclose(bars, 100 * summary["relative_error"])
    marks = {line.get_label(): line for line in figures["layers-errors"].lines}
    np.testing.assert_allclose(marks["best product"].get_xdata(), 100 * summary["best_relative_error"])
    residual = summary["residual_share"].to_numpy()
    assert residual[0] > 0 == residual[1]  # the output layer's Hessian is Gauss-Newton, and has no mark
    np.testing.assert_allclose(marks["residual part"].get_xdata(), 100 * residual[:1])
    dots = {line.get_label(): line.get_xdata() / 100 for line in figures["layers-shares"].lines}
    named = {"rank one": "leading_share", "along E[x]": "right_alignment", "E[xxᵀ] along E[x]": "input_alignment"}
    for label, variable in named.items():
        np.testing.assert_allclose(dots[label], summary[variable])
    for position in range(2):
        structure = Eigenstructure.from_xarray(study.structures[position])
        low_rank = LayerLowRank.from_xarray(study.low_ranks[position])
        P = structure.shape[0] * structure.shape[1]
        lines = {line.get_label(): line.get_xydata() for line in figures[f"layer-{position:03d}-eigenvalues"].lines}
        pairs = np.column_stack([structure.values, structure.pairs.values])
        positive = (pairs > 0).all(axis=1)
        outliers = structure.gap.count
        np.testing.assert_allclose(lines["outliers"], pairs[:outliers])
        np.testing.assert_allclose(lines["other"], pairs[outliers:][positive[outliers:]])
        matched = np.column_stack([structure.values, structure.pairs.values[structure.partner]])
        np.testing.assert_allclose(lines["matched"], matched[positive & (matched > 0).all(axis=1)])
        assert (lines["equal"][:, 0] == lines["equal"][:, 1]).all()
        lines = {line.get_label(): line.get_ydata() for line in figures[f"layer-{position:03d}-overlap"].lines}
        np.testing.assert_allclose(lines["measured"], structure.overlap)
        np.testing.assert_allclose(lines["chance k/P"], np.arange(1, structure.k + 1) / P)
        verticals = [line.get_xdata()[0] for line in figures[f"layer-{position:03d}-overlap"].lines[2:]]
        assert verticals == [CLASSES - 1, structure.shape[0]]
        for side, shares, index in (
            ("output", structure.output_correspondence, structure.pairs.output_index),
            ("input", structure.input_correspondence, structure.pairs.input_index),
        ):
            axes = figures[f"layer-{position:03d}-{side}-correspondence"]
            shown = axes.images[0].get_array()
            np.testing.assert_allclose(shown, shares[:, : shown.shape[1]])
            assert (shares[:, shown.shape[1] :] < 0.05).all()
            ring = axes.lines[0].get_xydata()
            np.testing.assert_allclose(ring, np.column_stack([index + 1, np.arange(1, structure.k + 1)]))
            # The first row is on top, and its cell has its number at its centre.
            assert axes.images[0].get_extent() == [0.5, shown.shape[1] + 0.5, structure.k + 0.5, 0.5]
        axes = figures[f"layer-{position:03d}-singular-values"]
        leading = [patch.get_height() for patch in axes.containers[0]]
        np.testing.assert_allclose(leading, 100 * low_rank.shares[: len(leading), 0])
        np.testing.assert_allclose(axes.lines[0].get_ydata(), 100 * low_rank.right_alignment[: len(leading)])
        lines = {line.get_label(): line.get_ydata() for line in figures[f"layer-{position:03d}-factors"].lines}
        for label, values in (("E[M]", structure.pairs.output_values), ("E[xxᵀ]", structure.pairs.input_values)):
            np.testing.assert_allclose(lines[label], (values / values[0])[: len(lines[label])])
    np.testing.assert_allclose(figures["layers-full-shares"].images[0].get_array(), 100 * study.full["share"])
    bars = [patch.get_width() for patch in figures["layers-full-overlap"].patches]
    np.testing.assert_allclose(bars, 100 * np.concatenate([study.full["overlap"], study.full["captured"]]))
    chance = study.full["dimension"] / study.full["size"]
    np.testing.assert_allclose(figures["layers-full-overlap"].lines[0].get_xdata(), 100 * chance)


def test_the_whole_hessian_is_in_a_table(study, drawn):
    text = text_of(drawn[1])
    assert re.findall(r'<section id="([^"]*)">', text) == ["layers", "layer-0", "layer-1", "full", "provenance"]
    section = text.split('id="full"')[1]
    for name in ("overlap", "captured"):
        for value in study.full[name].to_numpy():
            assert f"<td>{plain(percent(float(value)))}</td>" in section
    assert f"(eigenvalues {number(float(study.full['eigenvalue'][0]))} to" in section


def test_a_single_layer_of_a_regression_without_errors(tmp_path):
    """No errors, no classes, no whole Hessian, one layer; and a name that is neither HTML nor mathematics."""
    generator = torch.Generator().manual_seed(1)
    X, Y = (torch.randn(20, size, generator=generator, dtype=torch.float64) for size in (4, 2))
    objective = hs.Objective(hs.models.linear(4, 2, dtype=torch.float64), "mse", (X, Y))
    study = study_of(objective, ["fc1"], errors=False, full=0, k=3)
    name = "<b>&$x_$.fc1.of.a.long.network"
    for each in (*study.factors, *study.structures, *study.low_ranks):
        each.attrs["layer"] = name
    left_out = {"<i>norm": "is no layer but a LayerNorm", "norm2": "is no layer but a LayerNorm"}
    summary = summary_of(study, left_out=json.dumps(left_out), loss="mse")
    page = written(tmp_path, study, summary)
    seen = opened(page, tmp_path)
    assert [section for section, _ in seen["seen"]] == ["layers", "layer-0", "provenance"]
    assert_legible(seen, pictures=1 + len(FIGURES))
    text = text_of(page)
    assert "<h2>Layer &lt;b&gt;&amp;$x_$.fc1.of.a.long.network</h2>" in text
    assert "<b>&amp;" not in text
    assert "<b>&lt;i&gt;norm, norm2</b> is no layer but a LayerNorm." in text
    assert not re.search(r"\b(nan|inf)\b", text)
    assert "C − 1 =" not in text
    assert seen["title"].startswith("How well the layers decouple was not measured. Its top eigenvector is ")
    row = dict(zip(*layers_table(summary), strict=True))
    assert row["error"] == row["best product"] == row["residual part"] == "not measured"


CASES = {
    "best unknown": (
        {"best_relative_error": [np.nan, 0.3], "decoupling_note": ["from 32 products; unknown", "exact"]},
        {},
        ("<td>not known</td>", "How the errors were measured (layer fc1): from 32 products; unknown."),
    ),
    "sampled": (
        {"relative_error": [0.0612, 0.081], "relative_stderr": [0.0031, 0.0], "best_stderr": [0.00046, 0.0]},
        {},
        (
            "<td>6.1 % ± 0.3</td>",
            "The layers decouple well: E[M] ⊗ E[xxᵀ] misses 6.1 % (layer fc1) to 8.1 % (layer fc2)",
        ),
    ),
    "badly": ({"relative_error": [1.2, 0.7]}, {}, ("decouple badly", "70.0 % (layer fc2) to 120.0 % (layer fc1)")),
    "roughly": ({"relative_error": [0.11, 0.49]}, {}, ("The layers decouple roughly:",)),
    "unevenly": ({"relative_error": [0.2, 0.7]}, {}, ("The layers decouple unevenly:",)),
    "one known": ({"relative_error": [np.nan, 0.2]}, {}, ("Layer fc2 decouples roughly: E[M] ⊗ E[xxᵀ] misses 20.0 %",)),
    "no edge": ({"outliers_edge": [np.nan, 5.0]}, {}, ("<td>no edge</td>", "; 5 lie beyond a Marchenko-Pastur bulk")),
    "rank one": (
        {"leading_share": [0.91, 0.95], "outliers_gap": [2, 11]},
        {},
        ("Their top 3 eigenvectors are nearly rank one, and 2 to 11 eigenvalues stand out of each (C − 1 = 3).",),
    ),
    "no outliers": ({"outliers_ratio": [1.2, 1.49]}, {}, (", and no eigenvalues stand clearly out.",)),
    "outliers of one layer": (
        {"outliers_ratio": [1.2, 1.6], "outliers_gap": [9, 2]},
        {},
        ("and 2 eigenvalues stand out in 1 of 2 layers (C − 1 = 3).", "<td>9 (×1.20)</td>"),
    ),
    "partly rank one": ({"leading_share": [0.89, 0.95]}, {}, ("are nearly rank one in 1 of 2 layers",)),
    "not rank one": ({"leading_share": [0.89, 0.6]}, {}, ("are not rank one, and",)),
    "no classes": (
        {"leading_share": [0.5, 0.5], "outliers_gap": [1, 1], "leading": [1, 1]},
        {"classes": -1},
        ("Their top eigenvectors are not rank one, and 1 eigenvalue stands out of each.",),
    ),
    "more classes than eigenpairs": (
        {"leading_share": [0.5, 0.5], "leading": [32, 20]},
        {"classes": 500},
        ("Their top 32 eigenvectors are not rank one",),
    ),
    "mean input": (
        {"input_alignment": [0.99996, 0.4], "input_ratio": [np.inf, 3.0], "right_alignment": [np.nan, 0.25]},
        {},
        ("<td>0.99996</td>", "<td>0.400</td>", "<td>∞</td>", "<td>—</td>", "<td>25.0 %</td>"),
    ),
    "Gauss-Newton": ({}, {"curvature": "gauss_newton"}, ("those of the Gauss-Newton matrix G;",)),
}


@pytest.mark.parametrize("name", CASES)
def test_words_follow_the_numbers(name, study, tmp_path, monkeypatch):
    monkeypatch.setattr(layers_page, "picture", lambda folder, name, fig, alt: Picture(name, "", alt))
    changes, attributes, said = CASES[name]
    variables = {key: ("layer", np.array(values)) for key, values in changes.items()}
    summary = study.summary.assign(variables).assign_attrs(attributes)
    text = text_of(written(tmp_path, study, summary))
    for words in said:
        assert words in text


def test_a_layer_without_curvature(network, study, tmp_path, monkeypatch):
    """The Hessian of a layer behind dead units is zero: nothing is drawn of it, and it is said."""
    monkeypatch.setattr(layers_page, "picture", lambda folder, name, fig, alt: Picture(name, "", alt))
    X, y = torch.ones(6, 3, dtype=torch.float64), torch.zeros(6, dtype=torch.long)
    model = hs.models.mlp((3, 2, 2), dtype=torch.float64)
    with torch.no_grad():
        model.fc1.weight.fill_(-1.0)
    study = study_of(hs.Objective(model, "cross_entropy", (X, y)), ["fc1"], full=0, k=2)
    text = text_of(written(tmp_path, study))
    assert "the Hessian of this layer is zero: nothing to draw" in text
    assert "<img" not in text.split('id="layer-0"')[1]
    assert not re.search(r"\b(nan|inf)\b", text)


def test_an_indefinite_layer(study, tmp_path, monkeypatch):
    """Eigenvalues below zero: the largest gap is at zero, and the leading ones are no share of the trace."""
    monkeypatch.setattr(layers_page, "picture", lambda folder, name, fig, alt: Picture(name, "", alt))
    first = study.structures[0]
    values = np.linspace(4, -3, first.sizes["pair"])  # as many above zero as below
    changed = first.assign(eigenvalue=("pair", values)).assign_attrs(
        gap_count=int((values > 0).sum()), trace=-20.0, trace_stderr=0.5, energy=2 * float((values**2).sum())
    )
    planted = SimpleNamespace(factors=study.factors[:1], structures=[changed], low_ranks=study.low_ranks[:1], full=None)
    section = text_of(written(tmp_path, planted, summary_of(planted))).split('id="layer-0"')[1]
    assert (
        f"hold 50.0 % of the squared norm and add up to {number(values.sum())}, all to the trace -20.0 ± 0.5" in section
    )
    assert f"{(values > 0).sum()} before the largest gap of H (the next one is negative or zero)" in section
    shown = (values > 0) & (changed["kronecker_eigenvalue"].to_numpy() > 0)
    assert f"; {(~shown).sum()} that are not positive are not drawn." in section


def test_many_layers_have_no_more_figures_than_a_page_holds(study, tmp_path, monkeypatch):
    monkeypatch.setattr(layers_page, "picture", lambda folder, name, fig, alt: Picture(name, "", alt))
    monkeypatch.setattr(layers_page, "LAYERS_DRAWN", 3)
    monkeypatch.setattr(layers_page, "LAYERS_SHOWN", 4)
    many = SimpleNamespace(
        factors=3 * study.factors, structures=3 * study.structures, low_ranks=3 * study.low_ranks, full=None
    )
    errors, tops = [0.5, 0.2, 0.3, 0.4, 0.9, 0.6], [6.0, 1.0, 5.0, 4.0, 2.0, 3.0]
    summary = summary_of(many).assign(relative_error=("layer", errors), top_eigenvalue=("layer", tops))
    text = text_of(written(tmp_path, many, summary))
    # The best and the worst decoupled, and the one with the largest eigenvalue.
    assert re.findall(r'<section id="layer-(\d)">', text) == ["0", "1", "4"]
    assert "Figures are of 3 of the 6 layers" in text
    assert "the 4 layers of 6 with the largest eigenvalues" in text


@pytest.mark.parametrize(
    ("share", "stderr", "text"),
    [(0.3404, 0.0, "34.0 %"), (0.178, 0.0144, "17.8 % ± 1.4"), (0.0299, 0.0009, "2.99 % ± 0.09"), (np.nan, 0, "none")],
)
def test_shares_with_errors(share, stderr, text):
    assert plain(share_with_error(share, stderr, "none")) == text
