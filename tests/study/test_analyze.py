import numpy as np
import pytest
import torch

import hesscope as hs
from hesscope.study.analyze import describe, human_seconds, prepare, run
from hesscope.study.config import StudyConfig
from tests.study import user_code

HERE = "tests.study.user_code"


def study(tmp_path, **changes):
    values = {"model": f"{HERE}:network", "data": f"{HERE}:points", "output": "out", **changes}
    return prepare(StudyConfig(**values), tmp_path)


def measure(tmp_path, **changes):
    prepared = study(tmp_path, **changes)
    run(prepared, lambda title, share: None)
    return prepared, prepared.store.require("energies")


def test_exact_results_equal_the_library_s(tmp_path):
    _, result = measure(tmp_path)
    model = user_code.network()
    objective = hs.Objective(model, "cross_entropy", user_code.tensors())
    H, G = hs.Hessian(objective), hs.GaussNewton(objective)
    partition = hs.Partition.by_row(model)
    energies = hs.SplitEnergies.from_xarray(result)
    for part, operator in (("H", H), ("G", G), ("R", H - G)):
        expected = hs.block_energies(operator, partition).values
        np.testing.assert_allclose(energies.parts[part].values, expected, rtol=1e-10, atol=1e-18)
    dense = H.dense()
    np.testing.assert_allclose(result["hessian"].to_numpy(), dense.numpy(), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(result["eigenvalue"].to_numpy(), torch.linalg.eigvalsh(dense).numpy(), atol=1e-12)


def test_probe_results_equal_the_library_s_and_are_cut_into_parts(tmp_path):
    prepared, result = measure(tmp_path, method="probes", probes=6, seed=5)
    objective = hs.Objective(user_code.network(), "cross_entropy", user_code.tensors())
    expected = hs.block_energies(hs.Hessian(objective), prepared.partition, "probes", probes=6, seed=5)
    energies = hs.SplitEnergies.from_xarray(result).hessian
    np.testing.assert_allclose(energies.samples, expected.samples, rtol=1e-10, atol=1e-18)
    np.testing.assert_allclose(energies.stderr, expected.stderr, rtol=1e-8, atol=1e-18)
    assert not list(prepared.folder.glob("*part*"))


def test_the_residual_part_of_probes_comes_from_the_same_vectors(tmp_path):
    _, result = measure(tmp_path, method="probes", probes=4, data=f"{HERE}:points", loss="mse")
    parts = hs.SplitEnergies.from_xarray(result).parts
    objective = hs.Objective(user_code.network(), "mse", user_code.points().batch("mse"))
    R = hs.Hessian(objective) - hs.GaussNewton(objective)
    expected = hs.block_energies(R, hs.Partition.by_row(objective.model), "probes", probes=4)
    np.testing.assert_allclose(parts["R"].values, expected.values, rtol=1e-9, atol=1e-16)


def test_a_loss_callable_has_no_gauss_newton_part(tmp_path):
    prepared, result = measure(tmp_path, loss=f"{HERE}:sum_loss", data=f"{HERE}:tensors")
    assert prepared.part_names == ("H",)
    assert list(hs.SplitEnergies.from_xarray(result).parts) == ["H"]


def test_the_plan_names_what_matters(tmp_path):
    lines = dict(describe(study(tmp_path, model=f"{HERE}:biased_network")))
    assert lines["model"].startswith("MLP, 57 parameters in 4 tensors")
    assert lines["partition"] == "row: 11 blocks"
    assert lines["unmatched"] == "fc1.bias, fc2.bias (9 parameters in single blocks)"
    assert lines["method"].startswith("exact: 114 products")
    assert {"time", "memory", "results"} <= set(lines)
    assert "unused" not in lines


def test_results_are_reused_only_for_the_same_parameters_and_settings(tmp_path):
    measure(tmp_path)
    assert run(study(tmp_path), lambda *_: None) == 1
    assert not study(tmp_path, seed=1).store.has("energies")
    assert not study(tmp_path, partition="tensor").store.has("energies")
    changed = user_code.network()
    with torch.no_grad():
        changed.fc1.weight[0, 0] += 1e-6
    torch.save(changed.state_dict(), tmp_path / "changed.pt")
    assert not study(tmp_path, checkpoint="changed.pt").store.has("energies")


SCALED = {"model": f"{HERE}:Scaled", "data": f"{HERE}:tensors"}


@pytest.mark.parametrize(
    "changes",
    [
        {"model_arguments": {"buffer": 3.0}},
        {"model_arguments": {"frozen": 3.0}},
        {"model_arguments": {"activation": "sin"}},
        {"method": "probes"},
    ],
    ids=str,
)
def test_anything_that_results_depend_on_makes_them_new(tmp_path, changes):
    measure(tmp_path, **SCALED)
    assert study(tmp_path, **SCALED).store.has("energies")
    assert not study(tmp_path, **{**SCALED, **changes}).store.has("energies")


def test_an_edited_loss_or_other_class_weights_make_results_new(tmp_path, monkeypatch):
    callable_loss = {**SCALED, "loss": f"{HERE}:scaled_loss"}
    measure(tmp_path, **callable_loss)
    monkeypatch.setattr(user_code, "FACTOR", 1.01)
    assert not study(tmp_path, **callable_loss).store.has("energies")
    for weight in (1.0, 9.0):
        loss = torch.nn.CrossEntropyLoss(weight=torch.tensor([weight, 1.0, 1.0], dtype=torch.float64))
        monkeypatch.setattr(user_code, "instance", loss, raising=False)
        prepared = study(tmp_path, **{**SCALED, "loss": f"{HERE}:instance"})
        assert not prepared.store.has("energies")
        run(prepared, lambda *_: None)


def test_unreadable_parts_are_computed_again_and_litter_is_removed(tmp_path):
    prepared = study(tmp_path, method="probes", probes=4)
    run(prepared, lambda *_: None)
    expected = prepared.store.require("energies")
    prepared.folder.joinpath("results-energies.nc").write_bytes(b"junk")
    prepared.folder.joinpath("results-part-0001.nc").write_bytes(b"")
    prepared.folder.joinpath("results-part-0099.nc").write_bytes(b"of a run with more parts")
    prepared.folder.joinpath(".results-part-0001.nc.123.part").write_bytes(b"killed")
    run(study(tmp_path, method="probes", probes=4), lambda *_: None)
    np.testing.assert_array_equal(prepared.store.require("energies")["energy"], expected["energy"])
    assert [path.name for path in prepared.folder.iterdir()] == ["results-energies.nc"]


def test_each_part_tells_its_own_engine(tmp_path):
    _, result = measure(tmp_path)
    parts = hs.SplitEnergies.from_xarray(result).parts
    assert "hessian" in parts["H"].provenance.engine
    assert "PyTorch" in result.attrs["versions"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "a second"), (12.4, "12 s"), (200, "3 min 20 s"), (7260, "2 h 1 min")]
)
def test_durations_are_readable(seconds, text):
    assert human_seconds(seconds) == text
