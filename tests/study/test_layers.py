"""`hesscope layers` as a study: its table against dense matrices and the library, bad input, and how it resumes."""

import json
import signal
import sys
import tomllib
from dataclasses import replace

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

import hesscope as hs
from hesscope.core.errors import HesscopeError
from hesscope.layerwise import Eigenstructure, FullHessianOverlap, KroneckerFactors, LayerLowRank
from hesscope.layerwise.outlier_counts import EdgeOutliers, GapOutliers
from hesscope.study import layers
from hesscope.study.config import EXAMPLE, LayersConfig, StudyConfig
from hesscope.study.layers import describe_layers, layer_row, layers_results, prepare_layers, run_layers
from tests.study import user_code
from tests.study.test_interruptions import start, wait_for

HERE, USERS = "tests.study.test_layers", "tests.study.user_code"
DIGITS = {"model": f"{HERE}:digits_network", "data": f"{HERE}:some_digits"}


def digits_network(dtype="float64"):
    return hs.models.mlp((64, 16, 16, 10), seed=1, dtype=getattr(torch, dtype))


def smooth_network():
    return hs.models.MLP((5, 6, 3), "tanh", bias=True, seed=1, dtype=torch.float64)


def some_digits(dtype="float64"):
    data = hs.data.digits(standardize=False, dtype=getattr(torch, dtype))
    return data.inputs[:300], data.labels[:300]


class Language(nn.Module):
    """What a transformer has: embeddings, positions that all samples share, a norm, tied and repeated layers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.places = nn.Embedding(7, 4), nn.Embedding(5, 4)
        self.norm, self.mixing = nn.LayerNorm(4), nn.Linear(4, 4)
        self.twice = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)
        self.one, self.other = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.other.weight = self.one.weight
        self.head = nn.Linear(4, 7)
        self.double()

    def forward(self, x):
        z = self.norm(self.tokens(x) + self.places(torch.arange(5)))
        z = z + torch.tanh(self.mixing(z))
        z = torch.tanh(self.twice(torch.tanh(self.twice(z))))
        return self.head(self.other(torch.tanh(self.one(z)))).transpose(1, 2)


def sentences():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(7, (6, 5), generator=generator), torch.randint(7, (6, 5), generator=generator)


def prepared(tmp_path, section=None, **keys):
    values = {"model": f"{USERS}:biased_network", "data": f"{USERS}:tensors", "output": "out", **keys}
    return prepare_layers(StudyConfig(**values, layers=LayersConfig(**(section or {}))), tmp_path)


def measure(tmp_path, section=None, **keys):
    study = prepared(tmp_path, section, **keys)
    found = run_layers(study, lambda title, share: None)
    return study, found, layers_results(study)


@pytest.fixture(scope="module")
def of_digits(tmp_path_factory):
    """The study of most tests below, on the network of 64, 16, 16 and 10: (study, steps found, results)."""
    return measure(tmp_path_factory.mktemp("digits"), {"full": 4}, **DIGITS, seed=5)


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_the_table_is_what_the_library_says(of_digits):
    _, found, results = of_digits
    table = results.table
    assert found == 0
    assert list(table["layer"].to_numpy()) == ["fc1", "fc2", "fc3"]
    objective = hs.Objective(digits_network(), "cross_entropy", some_digits())
    for number, name in enumerate(["fc1", "fc2", "fc3"]):
        factors = hs.layerwise.kronecker_factors(objective, name, seed=5)
        structure = hs.layerwise.layer_eigenstructure(objective, name, factors=factors, seed=5)
        low_rank = hs.layerwise.layer_low_rank(structure, factors)
        row, known = table.sel(layer=name), factors.decoupling
        k = {"fc1": 16, "fc2": 16, "fc3": 10}[name]
        expected = {
            "outputs": k,
            "inputs": 64 if name == "fc1" else 16,
            "parameters": 1024 if name == "fc1" else 16 * k,
            "positions": 1,
            "relative_error": known.relative_error,
            "relative_stderr": 0,
            "best_relative_error": known.best_relative_error,
            "best_stderr": 0,
            "gauss_newton_error": known.gauss_newton_error,
            "residual_share": known.residual_share,
            "pairs": {"fc1": 32, "fc2": 32, "fc3": 30}[name],
            "top_eigenvalue": structure.values[0],
            "overlap_with_kronecker": structure.overlap[k - 1],
            "overlap_k": k,
            "leading": 9,
            "leading_share": np.median(low_rank.shares[:9, 0]),
            "right_alignment": np.median(low_rank.right_alignment[:9]),
            "input_alignment": low_rank.input_alignment,
            "input_ratio": low_rank.input_ratio,
            "outliers_gap": structure.gap.count,
            "outliers_edge": np.nan if structure.edge.count is None else structure.edge.count,
            "expected_outliers": 9,
        }
        for key, value in expected.items():
            assert float(row[key]) == pytest.approx(value, rel=1e-9, nan_ok=True), (name, key)
        assert str(row["decoupling_note"].item()) == known.note
        assert (str(row["kind"].item()), str(row["sharing"].item())) == ("linear", "none")
        # What the steps stored are the same records.
        np.testing.assert_array_equal(KroneckerFactors.from_xarray(results.factors[number]).output, factors.output)
        stored = Eigenstructure.from_xarray(results.structures[number])
        np.testing.assert_allclose(stored.values, structure.values)
        assert stored.trace == pytest.approx(structure.trace, rel=1e-9)  # of fc1 from random vectors
        np.testing.assert_allclose(LayerLowRank.from_xarray(results.low_ranks[number]).shares, low_rank.shares)
    whole = FullHessianOverlap.from_xarray(results.full)
    np.testing.assert_allclose(whole.values, hs.layerwise.full_hessian_overlap(objective, 4).values, rtol=1e-9)
    assert whole.layers == ("fc1", "fc2", "fc3")


def test_the_table_says_what_it_is_of(of_digits):
    study, _, results = of_digits
    given = results.table.attrs
    expected = {"model": "MLP", "parameters": 1440, "samples": 300, "classes": 10, "curvature": "hessian", "seed": 5}
    assert {key: given[key] for key in expected} == expected
    assert (given["loss"], given["data"], given["left_out"]) == ("cross_entropy", f"{HERE}:some_digits", "{}")
    assert given["settings"] == study.store.settings
    assert [step.name for step in layers.layers_steps(study)] == [
        *(f"layer-{layer:03d}-{record}" for layer in range(3) for record in ("factors", "eigenpairs", "low-rank")),
        "layers-full",
        "layers",
    ]


@pytest.mark.parametrize("matrix", ["hessian", "gauss_newton"])
def test_numbers_are_those_of_the_dense_matrix(tmp_path, matrix):
    """In the first layer of a tanh network, whose Hessian is not its Gauss-Newton matrix."""
    _, _, results = measure(tmp_path, {"matrix": matrix, "full": 1, "layers": ["fc1"]}, model=f"{HERE}:smooth_network")
    objective = hs.Objective(smooth_network(), "cross_entropy", user_code.tensors())
    # 6 rows of 5 weights and then 6 biases, as 6 rows of 5 weights and a bias.
    order = [place for row in range(6) for place in (*range(5 * row, 5 * row + 5), 30 + row)]
    whole = {
        "hessian": hs.Hessian(objective).dense().numpy(),
        "gauss_newton": hs.GaussNewton(objective).dense().numpy(),
    }
    own = {name: dense[np.ix_(order, order)] for name, dense in whole.items()}
    values, vectors = np.linalg.eigh(own[matrix])
    row = results.table.sel(layer="fc1")
    assert float(row["top_eigenvalue"]) == pytest.approx(values[-1], rel=1e-10)
    leading = [np.linalg.svd(vector.reshape(6, 6))[1][0] ** 2 for vector in vectors.T[:-3:-1]]
    assert float(row["leading_share"]) == pytest.approx(np.median(leading), rel=1e-9)
    factors = KroneckerFactors.from_xarray(results.factors[0])
    K = np.kron(factors.output, factors.input)
    for key, name in (("relative_error", "hessian"), ("gauss_newton_error", "gauss_newton")):
        error = np.linalg.norm(own[name] - K) / np.linalg.norm(own[name])
        assert float(row[key]) == pytest.approx(error, rel=1e-9)  # whatever the eigenpairs are of
    assert float(results.full["eigenvalue"][0]) == pytest.approx(np.linalg.eigvalsh(whole[matrix])[-1], rel=1e-6)


def test_every_number_of_a_row_has_its_place():
    objective = hs.Objective(user_code.network(), "cross_entropy", user_code.tensors())
    factors = hs.layerwise.kronecker_factors(objective, "fc1", errors=False)
    structure = hs.layerwise.layer_eigenstructure(objective, "fc1", 4, factors=factors)
    low_rank = hs.layerwise.layer_low_rank(structure, factors)
    known = hs.layerwise.Decoupling(1, 2, 3, 4, 5, 6, 7, 8, 9, "so")
    structure = replace(structure, gap=GapOutliers(11, 2.0, 3), edge=EdgeOutliers(12, 0.1, 0.2))
    row = layer_row(replace(factors, decoupling=known, output_stderr=0.5), structure, low_rank)
    expected = {"relative_error": 1, "relative_stderr": 2, "best_relative_error": 3, "best_stderr": 4}
    expected |= {"gauss_newton_error": 5, "residual_share": 8, "decoupling_note": "so", "output_stderr": 0.5}
    expected |= {"outliers_gap": 11, "outliers_edge": 12, "expected_outliers": 2, "leading": 2, "pairs": 4}
    assert {key: row[key] for key in expected} == expected
    unseen = layer_row(factors, replace(structure, edge=EdgeOutliers(None, np.nan, np.nan)), low_rank)
    assert np.isnan(unseen["outliers_edge"])


def test_without_classes_only_the_first_eigenvector_counts(tmp_path):
    _, _, results = measure(tmp_path, {"full": 0}, loss="mse", data=f"{USERS}:points")
    table = results.table
    assert table.attrs["classes"] == -1
    assert np.isnan(table["expected_outliers"]).all()
    for number in range(2):
        low_rank = LayerLowRank.from_xarray(results.low_ranks[number])
        assert float(table["leading_share"][number]) == low_rank.shares[0, 0]
        assert float(table["right_alignment"][number]) == low_rank.right_alignment[0]


def test_errors_can_be_left_out_and_fewer_pairs_asked_for(tmp_path):
    _, _, results = measure(tmp_path, {"errors": False, "eigenpairs": 2, "full": 0})
    row = results.table.isel(layer=0)
    assert np.isnan(float(row["relative_error"])) and np.isnan(float(row["residual_share"]))
    assert str(row["decoupling_note"].item()) == "not measured"
    assert (int(row["pairs"]), int(row["overlap_k"])) == (2, 2)  # fewer than the 6 outputs
    assert Eigenstructure.from_xarray(results.structures[0]).k == 2


def test_a_network_in_single_precision(tmp_path):
    single = {"dtype": "float32"}
    _, _, results = measure(
        tmp_path, {"full": 3, "layers": ["fc3"]}, **DIGITS, model_arguments=single, data_arguments=single
    )
    assert results.table.attrs["data"] == f"{HERE}:some_digits (dtype = 'float32')"
    objective = hs.Objective(digits_network(), "cross_entropy", some_digits())
    exact = hs.layerwise.full_hessian_overlap(objective, 3, ["fc3"])
    assert results.full["overlap"].to_numpy() == pytest.approx(exact.overlap, rel=1e-3)


def test_layers_whose_eigenvectors_would_be_too_large_get_fewer(tmp_path, monkeypatch):
    monkeypatch.setattr(layers, "VECTOR_ENTRIES", 100)
    _, _, results = measure(tmp_path, {"full": 0, "errors": False, "layers": ["fc2"]})
    assert results.table["pairs"].to_numpy().tolist() == [100 // 21]
    monkeypatch.setattr(layers, "VECTOR_ENTRIES", 1024 * 256)
    study = prepared(tmp_path, {"full": 0, "errors": False}, **DIGITS)
    assert [layers._pairs(study, layer) for layer in study.layers] == [32, 32, 30]


# --- layers -----------------------------------------------------------------------------------------------------------

LANGUAGE = {"model": f"{HERE}:Language", "data": f"{HERE}:sentences"}


def test_what_cannot_be_measured_is_left_out_with_its_reason(tmp_path, monkeypatch):
    study, _, results = measure(tmp_path, {"full": 2, "errors": False}, **LANGUAGE)
    assert [layer.name for layer in study.layers] == ["mixing", "head"]
    reasons = json.loads(results.table.attrs["left_out"])
    for name, words in {
        "tokens": "is an embedding",
        "places": "all samples share",
        "norm": "no layer but a LayerNorm",
        "twice": "is used 2 times in a forward pass, which needs a convention",
        "unused": "is not called",
        "one": "shares its weight with 'other'",
        "other": "shares its weight with 'one'",
    }.items():
        assert words in reasons.pop(name)
    assert reasons == {}
    lines = describe_layers(study)
    assert ("layers", "2: mixing (linear, 4 x 5), head (linear, 7 x 5)") in lines
    assert sum(what == "left out" for what, _ in lines) == 7
    monkeypatch.setattr(layers, "LARGEST_SIDE", 6)
    study = prepared(tmp_path, **LANGUAGE)
    assert [layer.name for layer in study.layers] == ["mixing"]
    assert study.left_out["head"].startswith("has 7 outputs and 5 inputs; more than 6 are measured only if")
    study = prepared(tmp_path, {"layers": ["head", "tokens", "mixing"]}, **LANGUAGE)
    assert [layer.name for layer in study.layers] == ["tokens", "mixing", "head"]  # in the order of the network
    assert study.left_out == {}


def test_a_convention_makes_repeated_layers_measurable_and_applies_to_all(tmp_path):
    found = {}
    for sharing in ("expand", "reduce"):
        section = {"sharing": sharing, "full": 0, "errors": False, "eigenpairs": 3, "layers": ["mixing", "twice"]}
        study, steps_found, results = measure(tmp_path, section, **LANGUAGE)
        assert [layer.name for layer in study.layers] == ["mixing", "twice"]
        assert steps_found == 0  # another convention is another study
        assert set(results.table["sharing"].to_numpy()) == {sharing}
        found[sharing] = results.table["input_ratio"].to_numpy()
        objective = hs.Objective(Language(), "cross_entropy", sentences())
        factors = hs.layerwise.kronecker_factors(objective, "twice", sharing=sharing, errors=False)
        np.testing.assert_array_equal(KroneckerFactors.from_xarray(results.factors[1]).output, factors.output)
    assert not np.allclose(found["expand"], found["reduce"])


def test_classes_can_be_sampled(tmp_path):
    _, _, results = measure(tmp_path, {"probes": 16, "full": 0, "errors": False, "layers": ["fc2"]}, seed=3)
    objective = hs.Objective(user_code.biased_network(), "cross_entropy", user_code.tensors())
    factors = hs.layerwise.kronecker_factors(objective, "fc2", probes=16, seed=3, errors=False)
    np.testing.assert_array_equal(KroneckerFactors.from_xarray(results.factors[0]).output, factors.output)
    assert float(results.table["output_stderr"][0]) == pytest.approx(factors.output_stderr)


BAD = {
    "unknown layer": ({"layers": ["fc11"]}, {}, "there is no layer 'fc11'; the layers are 'fc1', 'fc2', did you mean"),
    "twice": ({"layers": ["fc1", "fc1"]}, {}, "layers.layers must name each layer once, got fc1, fc1"),
    "sharing": (
        {"sharing": "expnd"},
        {},
        "layers.sharing must be one of 'expand', 'reduce', got 'expnd', did you mean",
    ),
    "matrix": ({"matrix": "hesian"}, {}, "layers.matrix must be one of 'hessian', 'gauss_newton', got 'hesian'"),
    "k": (
        {"eigenpairs": 22},
        {},
        "layers.eigenpairs must be at most the number of parameters of every layer, 21 of 'fc2', got 22",
    ),
    "full": ({"full": 58}, {}, "layers.full must be at most the number of parameters, 57, got 58"),
    "loss": ({}, {"loss": f"{USERS}:sum_loss"}, "the output Hessian of a layer needs the loss as a function"),
    "tied": ({"layers": ["one"]}, LANGUAGE, "'one' shares its weight with 'other'"),
    "positions": ({"layers": ["places"]}, LANGUAGE, "layer 'places' is given "),
    "not called": ({"layers": ["unused"]}, LANGUAGE, "layer 'unused' is not called in the forward pass"),
    "convention": ({"layers": ["twice"]}, LANGUAGE, "layer 'twice' is used 2 times in a forward pass"),
    "no layer": ({"layers": ["norm"]}, LANGUAGE, "'norm' is no layer but a LayerNorm"),
    "none": ({}, {"model": f"{HERE}:Scale"}, "the network has no layer that can be measured: '' is no layer but a"),
    "batch norm": ({}, {"model": f"{HERE}:Centred"}, "the samples of batch 0 depend on each other"),
}


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3, dtype=torch.float64))

    def forward(self, x):
        return x[:, :3] * self.scale


class Centred(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = user_code.network()

    def forward(self, x):
        return self.inner(x - x.mean(0))


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_anything_is_written(case, tmp_path):
    section, keys, words = BAD[case]
    with pytest.raises(HesscopeError) as caught:
        prepared(tmp_path, section, **keys)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_layer_too_large_for_memory_is_refused_before_work(tmp_path, monkeypatch):
    monkeypatch.setattr("hesscope.core.memory.available_bytes", lambda device="cpu": 30_000)
    with pytest.raises(HesscopeError, match=r"layer 'fc1' \(16 x 64, 32 eigenpairs\) needs .* use fewer eigenpairs"):
        prepared(tmp_path, **DIGITS)


def test_a_small_network_has_fewer_eigenpairs_than_asked_for_by_default(tmp_path):
    assert prepared(tmp_path).full == 10
    tiny = {"in_features": 1, "out_features": 3, "bias": False}
    study = prepared(tmp_path, model="torch.nn:Linear", model_arguments=tiny, data=f"{HERE}:one_feature")
    assert (study.full, study.layers[0].name, study.layers[0].size) == (3, "", 3)


def one_feature():
    x, y = user_code.tensors()
    return x[:, :1].float(), y


def test_the_example_names_every_key_and_the_defaults():
    section = EXAMPLE.partition("[layers]")[2]
    for key in LayersConfig.model_fields:
        assert f"\n{key} =" in section or f"\n# {key} =" in section
    assert StudyConfig.model_validate(tomllib.loads(EXAMPLE)).layers == LayersConfig()


# --- interruptions ----------------------------------------------------------------------------------------------------


def test_a_finished_study_is_found_and_a_changed_one_is_not(tmp_path):
    section = {"full": 0, "errors": False, "layers": ["fc2"], "eigenpairs": 3}
    _, _, results = measure(tmp_path, section)
    _, found, again = measure(tmp_path, section)
    assert found == 4
    assert again.table.identical(results.table)
    before = prepared(tmp_path, section).store.settings
    for changed in ({"eigenpairs": 4}, {"layers": ["fc1"]}, {"full": 1}, {"matrix": "gauss_newton"}, {"probes": 8}):
        assert prepared(tmp_path, {**section, **changed}).store.settings != before
    assert prepared(tmp_path, section, seed=1).store.settings != before


STUDY = """
import sys
from pathlib import Path
from hesscope.study.config import LayersConfig, StudyConfig
from hesscope.study.layers import prepare_layers, run_layers
model, data, output = sys.argv[1:]
config = StudyConfig(model=model, data=data, output=output, seed=5, layers=LayersConfig(full=4))
run_layers(prepare_layers(config, Path()), lambda title, share: None)
"""


def test_a_killed_run_continues_to_the_same_numbers(tmp_path, of_digits):
    folder = tmp_path / "out"
    process = start([sys.executable, "-c", STUDY, *DIGITS.values(), str(folder)])
    wait_for(folder / "results-layer-000-eigenpairs.nc", process)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    files = {path.name for path in folder.glob("results-*.nc")}
    assert len(files) >= 2 and "results-layers.nc" not in files
    _, found, results = measure(tmp_path, {"full": 4}, **DIGITS, seed=5)
    assert found == len(files)
    undisturbed = of_digits[2]
    # Another process may have another number of threads, and so other roundings.
    xr.testing.assert_allclose(results.table, undisturbed.table, rtol=1e-6)
    xr.testing.assert_allclose(results.full, undisturbed.full, rtol=1e-6)
    assert results.table.attrs == undisturbed.table.attrs | {"config": results.table.attrs["config"]}
