"""`hesscope compare` as a study: its numbers against the library's, which layers it takes, and what it refuses."""

import json
import shutil

import numpy as np
import pytest
import torch

import hesscope as hs
from hesscope.core.errors import HesscopeError
from hesscope.layerwise import SharedEigenspaces
from hesscope.study.compare import compare_results, describe_compare, prepare_compare, run_compare
from hesscope.study.config import LayersConfig, StudyConfig
from hesscope.study.layers import prepare_layers, run_layers

HERE, USERS = "tests.study.test_compare", "tests.study.user_code"
WIDTHS = {"a": (5, 6, 3), "b": (5, 6, 3), "deeper": (5, 6, 6, 3)}
FAST = {"eigenpairs": 4, "full": 0, "errors": False}


def network(name):
    return hs.models.mlp(WIDTHS[name], seed=list(WIDTHS).index(name), dtype=torch.float64)


def other_points():
    return hs.data.gaussian(40, 5, 3, seed=7, dtype=torch.float64)


def measured(folder, name, section=None, data=f"{USERS}:points"):
    """The output folder of `hesscope layers` on the network of this name."""
    values = {"model": f"{HERE}:network", "model_arguments": {"name": name}, "data": data, "output": "out"}
    config = StudyConfig(**values, layers=LayersConfig(**(FAST | (section or {}))))
    run_layers(prepare_layers(config, folder), lambda title, share: None)
    return folder / "out"


def compared(runs, folder, **arguments):
    study = prepare_compare(runs, folder, **arguments)
    found = run_compare(study, lambda title, share: None)
    return study, found, compare_results(study)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Output folders, by name: two seeds, another architecture, the Gauss-Newton matrix, and other data."""
    base = tmp_path_factory.mktemp("runs")
    folders = {name: measured(base / name, name) for name in WIDTHS}
    folders["gauss_newton"] = measured(base / "gauss_newton", "b", {"matrix": "gauss_newton", "layers": ["fc2"]})
    folders["elsewhere"] = measured(base / "elsewhere", "b", {"layers": ["fc2"]}, f"{HERE}:other_points")
    return folders


def eigenvectors(name, layer):
    """Of the layer's dense Hessian, leading first."""
    objective = hs.Objective(network(name), "cross_entropy", points())
    H = hs.Hessian(objective).dense()
    place = objective.parameters.slice(f"{layer}.weight")
    return torch.linalg.eigh(H[place, place])[1].flip(1)


def points():
    return hs.data.gaussian(40, 5, 3, seed=2, dtype=torch.float64).batch("cross_entropy")


def test_overlaps_are_those_of_dense_eigenvectors_and_of_the_library(runs, tmp_path):
    study, found, results = compared([runs["a"], runs["b"]], tmp_path / "out")
    assert (study.layers, study.left_out, found) == (("fc1", "fc2"), {}, 0)
    for result, layer in zip(results, study.layers, strict=True):
        shared = SharedEigenspaces.from_xarray(result)
        dense = hs.layerwise.overlap_curve(*(eigenvectors(name, layer)[:, :4] for name in ("a", "b")))
        np.testing.assert_allclose(shared.curves[0], dense, atol=1e-6)
        objectives = [hs.Objective(network(name), "cross_entropy", points()) for name in ("a", "b")]
        structures = [hs.layerwise.layer_eigenstructure(each, layer, 4) for each in objectives]
        api = hs.layerwise.shared_eigenspaces(structures, ["a/out", "b/out"])
        np.testing.assert_allclose(shared.predicted, api.predicted, atol=1e-9)
        assert (shared.labels, shared.layers, shared.shape) == (api.labels, (layer, layer), api.shape)
        assert (result.attrs["layer"], result.attrs["note"], result.attrs["left_out"]) == (layer, "", "{}")
        assert list(result.attrs["models"]) == ["MLP", "MLP"]
    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == [
        "results-shared-000.nc",
        "results-shared-001.nc",
    ]


def test_layers_of_one_name_and_shape_work_across_architectures(runs, tmp_path):
    study, _, results = compared([runs["a"], runs["b"], runs["deeper"]], tmp_path / "out", k=3)
    assert study.layers == ("fc1",)
    assert study.left_out == {
        "fc2": "has different shapes: 3 x 6 in a/out, 3 x 6 in b/out, 6 x 6 in deeper/out",
        "fc3": "was not measured in a/out, b/out",
    }
    (result,) = results
    assert json.loads(result.attrs["left_out"]) == study.left_out
    shared = SharedEigenspaces.from_xarray(result)
    assert shared.curves.shape == (3, 3)
    dense = hs.layerwise.overlap_curve(*(eigenvectors(name, "fc1")[:, :3] for name in ("b", "deeper")))
    np.testing.assert_allclose(shared.curves[2], dense, atol=1e-6)
    assert ("left out", f"fc3 {study.left_out['fc3']}") in describe_compare(study)


def test_other_data_are_noted_and_a_layer_can_be_named(runs, tmp_path):
    study, _, (result,) = compared([runs["a"], runs["elsewhere"]], tmp_path / "out", layers=["fc2"])
    assert (study.layers, study.left_out) == (("fc2",), {})
    note = "the runs were measured on different data"
    assert result.attrs["note"] == note
    assert ("note", note) in describe_compare(study)
    assert not prepare_compare([runs["a"], runs["b"]], tmp_path).note


def test_results_are_found_again_until_a_run_has_changed(runs, tmp_path):
    for name in ("a", "b"):
        shutil.copytree(runs[name], tmp_path / name)
    pair = [tmp_path / name for name in ("a", "b")]
    _, _, first = compared(pair, tmp_path / "out", layers=["fc1"])
    _, found, again = compared(pair, tmp_path / "out", layers=["fc1"])
    assert found == 1
    assert again[0].identical(first[0])
    shutil.rmtree(pair[1])
    shutil.copytree(runs["deeper"], pair[1])
    _, found, changed = compared(pair, tmp_path / "out", layers=["fc1"])
    assert found == 0
    assert not np.allclose(changed[0]["overlap"], first[0]["overlap"])


def test_runs_are_called_by_the_ends_of_their_paths(runs, tmp_path):
    named = prepare_compare([runs["a"], runs["b"]], tmp_path)
    assert [run.label for run in named.runs] == ["a/out", "b/out"]
    shutil.copytree(runs["a"], tmp_path / "first")
    named = prepare_compare([tmp_path / "first", runs["b"]], tmp_path)
    assert [run.label for run in named.runs] == ["first", "out"]


def test_a_study_stands_for_its_output(runs, tmp_path):
    study = tmp_path / "STUDY.toml"
    study.write_text(f'model = "a:b"\ndata = "c:d"\noutput = "{runs["b"]}"\n')
    assert prepare_compare([runs["a"], study], tmp_path).runs[1].folder == runs["b"].resolve()
    study.write_text('model = "a:b"\ndata = "c:d"\noutput = "later"\n')
    with pytest.raises(
        HesscopeError, match=r"STUDY.toml has no results of `hesscope layers`: run `hesscope layers .*toml"
    ):
        prepare_compare([runs["a"], study], tmp_path)


BAD = {
    "one run": (["a"], {}, "compare needs at least two runs of `hesscope layers`, got 1"),
    "the same": (["a", "b", "a"], {}, "is the same run as"),
    "no folder": (["a", "nowhere"], {}, "there is no folder or STUDY.toml"),
    "no results": (["a", "empty"], {}, "has no results of `hesscope layers`: run `hesscope layers` on the STUDY.toml"),
    "curvature": (["b", "gauss_newton"], {}, "only runs of one curvature can be compared: 'b/out' has layers.matrix"),
    "unknown layer": (["a", "b"], {"layers": ["fc11"]}, "no run has a layer 'fc11'; all have fc1, fc2, did you mean"),
    "shapes": (["a", "deeper"], {"layers": ["fc2"]}, "layer 'fc2' cannot be compared: it has different shapes: 3 x 6"),
    "missing": (["a", "elsewhere"], {"layers": ["fc1"]}, "cannot be compared: it was not measured in elsewhere/out"),
    "nothing shared": (
        ["deeper", "elsewhere"],
        {},
        "the runs have no layer of one name and one shape in common: 'fc1'",
    ),
    "k": (["a", "b"], {"k": 5}, "k must be at most 4, the eigenpairs of layer 'fc1' in 'a/out', got 5"),
    "no k": (["a", "b"], {"k": 0}, "k must be a positive integer, got 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_anything_is_written(case, runs, tmp_path):
    names, arguments, words = BAD[case]
    (tmp_path / "empty").mkdir()
    with pytest.raises(HesscopeError) as caught:
        prepare_compare([runs.get(name, tmp_path / name) for name in names], tmp_path / "out", **arguments)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_eigenpairs_of_a_later_unfinished_run_are_refused(runs, tmp_path):
    mixed = tmp_path / "mixed"
    shutil.copytree(runs["a"], mixed)
    shutil.copy(runs["b"] / "results-layer-000-eigenpairs.nc", mixed)
    with pytest.raises(HesscopeError, match="has no eigenpairs of layer 'fc1' that belong to its table"):
        compared([runs["b"], mixed], tmp_path / "out")
