"""The study `advise`: what is planted is named, what is dense is not split, and the files say so."""

import json

import numpy as np
import pytest
import torch

import hesscope as hs
from hesscope.core.errors import InputError, PartitionError
from hesscope.estimate.advice import TensorChoice
from hesscope.estimate.diagonality import Figure, PartitionComparison
from hesscope.estimate.energies import BlockEnergies
from hesscope.study.advise import (
    ENERGIES,
    RESULT,
    ZOOM,
    advice_json,
    fine_partition,
    mixed_partition,
    prepare_advise,
    run_advise,
    write_advice,
)
from hesscope.study.config import AdviseConfig, StudyConfig
from tests.study import user_code

HERE = "tests.study.user_code"
PLANTED = {"model": f"{HERE}:planted_rows", "data": f"{HERE}:correlated_points", "loss": "mse"}


def prepared(tmp_path, advise=None, **keys):
    values = {"model": f"{HERE}:network", "data": f"{HERE}:points", "output": "out", **keys}
    return prepare_advise(StudyConfig(**values, advise=AdviseConfig(**(advise or {}))), tmp_path)


def run(study):
    found = run_advise(study, lambda title, share: None)
    return found, study.store.require(RESULT)


def test_a_planted_partition_is_named(tmp_path):
    study = prepared(tmp_path, **PLANTED)
    _, result = run(study)
    advice = advice_json(result)
    assert advice["verdict"]["name"] == "row" and advice["verdict"]["sureness"] > 0.99
    (cut,) = advice["parameters"].values()
    assert (cut["scheme"], cut["axis"], cut["block_size"], cut["blocks"]) == ("row", 0, 1, 3)
    (group,) = advice["parameter_groups"]
    assert group["params"] == list(advice["parameters"]) and group["axis"] == 0
    rows = PartitionComparison.from_xarray(result).rows
    assert rows["row"].energy.value == pytest.approx(1) and rows["mixed"].energy.value == pytest.approx(1)
    assert json.loads(write_advice(tmp_path, result).read_text()) == advice


def test_a_dense_hessian_is_not_split(tmp_path):
    _, result = run(prepared(tmp_path, loss=f"{HERE}:rank_one_loss"))
    advice = advice_json(result)
    assert advice["verdict"]["name"] is None
    assert {cut["scheme"] for cut in advice["parameters"].values()} == {"whole"}
    assert all(cut["axis"] is None for cut in advice["parameters"].values())


def test_results_are_those_of_the_library_and_found_again(tmp_path):
    study = prepared(tmp_path, advise={"matrix": "gauss_newton"})
    found, result = run(study)
    assert found == 0
    objective = hs.Objective(user_code.network(), "cross_entropy", user_code.tensors())
    G = hs.GaussNewton(objective).dense()
    for name, partition in study.partitions.items():
        kept = sum(float(G[np.ix_(block, block)].square().sum()) for block in partition.members())
        energy = PartitionComparison.from_xarray(result).rows[name].energy
        assert energy.value == pytest.approx(kept / float(G.square().sum()), rel=1e-10)
    by_tensor = BlockEnergies.from_xarray(study.store.require(ENERGIES))
    assert by_tensor.labels == ("fc1.weight", "fc2.weight")
    assert by_tensor.total == pytest.approx(float(G.square().sum()), rel=1e-10)
    zoom = study.store.require(ZOOM)
    assert float(zoom["energy"].sum()) == pytest.approx(by_tensor.total, rel=1e-9)
    again, same = run(prepared(tmp_path, advise={"matrix": "gauss_newton"}))
    assert again == 6
    assert same.identical(result)
    changed, _ = run(prepared(tmp_path, advise={"matrix": "hessian"}))
    assert changed == 0


def test_a_mixed_partition_cuts_every_tensor_as_chosen(tmp_path):
    study = prepared(tmp_path)
    choices = {
        name: TensorChoice(scheme, Figure(1.0), 0.0, Figure(1.0), 0.5)
        for name, scheme in (("fc1.weight", "column"), ("fc2.weight", "tensor"))
    }
    mixed = mixed_partition(study, choices)
    assert mixed.labels == (*(f"fc1.weight[:, {j}]" for j in range(5)), "fc2.weight")
    assert mixed.sizes == (6, 6, 6, 6, 6, 18)
    np.testing.assert_array_equal(mixed.indices("fc1.weight[:, 1]"), np.arange(6) * 5 + 1)


def test_the_map_to_zoom_into_has_groups_of_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("hesscope.study.advise.MOST_ZOOMED", 6)
    partition, groups = fine_partition(prepared(tmp_path))
    assert partition.labels == (
        *(f"fc1.weight[{start}:{start + 2}]" for start in (0, 2, 4)),
        *(f"fc2.weight[{row}]" for row in range(3)),
    )
    assert groups["tensor"] == ["fc1.weight"] * 3 + ["fc2.weight"] * 3
    assert partition.size == 48


def test_partitions_of_one_s_own_and_those_that_do_not_fit(tmp_path):
    study = prepared(tmp_path)
    assert list(study.partitions) == ["tensor", "row", "column"]
    assert study.left_out["layer"] == "it has the same blocks as tensor"
    assert "attention" in study.left_out["head"]
    study = prepared(tmp_path, advise={"partitions": ["row", f"{HERE}:long_names"]})
    assert list(study.partitions) == ["tensor", "row", f"{HERE}:long_names"]


def test_a_partition_of_one_s_own_that_has_changed_is_measured_anew(tmp_path, monkeypatch):
    asked = {"partitions": ["row", f"{HERE}:long_names"]}
    before = prepared(tmp_path, advise=asked).store.settings
    assert prepared(tmp_path, advise=asked).store.settings == before
    monkeypatch.setattr(user_code, "long_names", hs.Partition.by_column)
    assert prepared(tmp_path, advise=asked).store.settings != before


BAD = {
    "unknown": ({"advise": {"partitions": ["rows"]}}, InputError, r"'rows', which is none of .* did you mean 'row'"),
    "no head": ({"advise": {"partitions": ["head"]}}, PartitionError, "no attention heads"),
    "matrix": ({"advise": {"matrix": "hesian"}}, InputError, "did you mean 'hessian'"),
    "no outputs": (
        {"advise": {"matrix": "gauss_newton"}, "loss": f"{HERE}:rank_one_loss"},
        InputError,
        "needs the loss as a function of the model's outputs",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_anything_is_written(case, tmp_path):
    keys, error, words = BAD[case]
    with pytest.raises(error, match=words):
        prepared(tmp_path, **keys)
    assert not (tmp_path / "out").exists()


def test_without_outputs_there_is_no_map_to_zoom_into(tmp_path):
    study = prepared(tmp_path, loss=f"{HERE}:rank_one_loss")
    assert not study.zooms
    run(study)
    assert study.store.load(ZOOM) is None


def test_probes_are_used_where_the_matrix_is_large(tmp_path, monkeypatch):
    monkeypatch.setattr("hesscope.estimate.diagonality.EXACT_SIZE", 10)
    monkeypatch.setattr("hesscope.study.advise.EXACT_SIZE", 10)
    study = prepared(
        tmp_path, advise={"probes": 32}, model=f"{HERE}:planted_rows", data=f"{HERE}:correlated_points", loss="mse"
    )
    _, result = run(study)
    row = PartitionComparison.from_xarray(result).rows["row"]
    assert row.energy.degrees == 7
    assert abs(row.energy.value - 1) < 4 * row.energy.stderr + 1e-9
    assert advice_json(result)["verdict"]["name"] == "row"
    assert not torch.is_inference_mode_enabled()
