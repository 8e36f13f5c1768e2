"""`hesscope track` as a study: its numbers against dense matrices, how it resumes, processes, and what it refuses."""

import pickle
import signal
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import xarray as xr
from safetensors.torch import save_file

import hesscope as hs
from hesscope.core.errors import DataError, HesscopeError, InputError
from hesscope.core.result_files import open_tree
from hesscope.study import track
from hesscope.study.config import StudyConfig, TrackConfig
from hesscope.study.track import describe_track, prepare_track, run_track, track_force, track_results
from tests.study import user_code
from tests.study.test_interruptions import start, wait_for

USERS = "tests.study.user_code"
STEPS = (0, 20, 40, 60, 80, 100)  # by name, 100 comes before 20
QUIET = lambda title, share: None  # noqa: E731


def trained(steps=STEPS, optimizer=torch.optim.Adam, decay=1.0, **settings):
    """State of a network and of its optimizer at some steps of full-batch training, by step."""
    model, (x, y) = user_code.network(), user_code.tensors()
    rule = optimizer(model.parameters(), **{"lr": 0.02, **settings})
    states = {}
    for step in range(max(steps) + 1):
        if step in steps:
            optimizer_state = rule.state_dict()
            groups = [dict(group) for group in optimizer_state["param_groups"]]
            state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            states[step] = state, optimizer_state | {"param_groups": groups}
        rule.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        rule.step()
        for group in rule.param_groups:
            group["lr"] *= decay
    return states


STATES = trained()


def write(folder, states=STATES, name="step-{}.pt"):
    folder.mkdir(parents=True, exist_ok=True)
    for step, (state, _) in states.items():
        torch.save(state, folder / name.format(step))
    return folder


def prepared(tmp_path, section=None, **keys):
    values = {"model": f"{USERS}:network", "data": f"{USERS}:tensors", "output": "out", **keys}
    settings = {"checkpoints": "checkpoints", "eigenpairs": 3, **(section or {})}
    return prepare_track(StudyConfig(**values, track=TrackConfig(**settings)), tmp_path)


def run(tmp_path, section=None, **keys):
    """Measure what is not; returns how much was found."""
    return run_track(prepared(tmp_path, section, **keys), QUIET)


def tracked(tmp_path, section=None, **keys):
    study = prepared(tmp_path, section, **keys)
    found = run_track(study, QUIET)
    return track_results(study), found


def objective_at(state, loss="cross_entropy"):
    model = user_code.network()
    model.load_state_dict(state)
    return hs.Objective(model, loss, user_code.tensors())


def trees(folder):
    """All that the steps' files say, but how long it took."""
    found = {path.name: open_tree(path) for path in sorted(folder.glob("step-*.nc"))}
    return {
        name: tree.map_over_datasets(lambda each: each.drop_vars("seconds", errors="ignore"))
        for name, tree in found.items()
    }


def assert_same(one, other):
    assert list(one) == list(other)
    for name in one:
        xr.testing.assert_identical(one[name], other[name])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    write(folder / "checkpoints")
    trajectory, found = tracked(folder)
    assert found == 0
    return folder, trajectory, trees(folder / "out")


def test_numbers_are_those_of_dense_matrices(undisturbed):
    _, trajectory, _ = undisturbed
    assert trajectory.steps.tolist() == list(STEPS)
    before, first, previous, alternatives = None, None, -1, []
    for snapshot, (step, (state, _)) in zip(trajectory.snapshots, STATES.items(), strict=True):
        objective = objective_at(state)
        partition = hs.Partition.by_row(objective.model)
        assert snapshot.value == pytest.approx(objective.value(), rel=1e-12)
        gradient = objective.gradient()
        assert snapshot.gradient_norm == pytest.approx(float(gradient.norm()), rel=1e-10)
        H, G = hs.Hessian(objective).dense(), hs.GaussNewton(objective).dense()
        for part, matrix in {"H": H, "G": G, "R": H - G}.items():
            expected = hs.block_energies(matrix, partition).values
            np.testing.assert_allclose(
                snapshot.block_energies(part).values, expected, rtol=1e-9, atol=1e-13 * expected.max()
            )
        values, vectors = torch.linalg.eigh(H)
        ends, V = snapshot.eigenvalues, vectors[:, -3:]
        np.testing.assert_allclose(ends.largest, values[-3:].flip(0), rtol=1e-5)
        np.testing.assert_allclose(
            ends.smallest, values[:1], atol=1e-3 * float(values[-1] - values[0])
        )  # see Eigenvalues
        share = float((V.T @ gradient).square().sum() / gradient.square().sum())
        assert ends.gradient_share == pytest.approx(share, abs=1e-3)
        assert ends.aligned_with == previous
        if before is None:
            assert np.isnan(ends.alignment)
        else:
            assert ends.alignment == pytest.approx(float((before.T @ V).square().sum() / 3), abs=2e-3)
            alternatives.append(float((first.T @ V).square().sum() / 3) - ends.alignment)
        first = V if before is None else first
        before, previous = V, step
        assert np.isnan(snapshot.learning_rate)
    # Another step's eigenvectors would have been seen.
    assert max(map(abs, alternatives)) > 0.02


def test_the_static_and_the_dynamic_part(undisturbed):
    folder, trajectory, _ = undisturbed
    force = track_force(prepared(folder, {"threshold": 0.5}), trajectory)
    assert force.threshold == 0.5
    assert force.steps.tolist() == [[0, 100]]
    assert force.diagonality[0, :, 0] == pytest.approx(
        [trajectory.snapshots[k].block_energies().diagonality for k in (0, -1)]
    )
    only_ends = replace(trajectory, snapshots=trajectory.snapshots[:1])
    assert track_force(prepared(folder), only_ends) is None


def test_formats_may_be_mixed_and_give_the_same_numbers(tmp_path, undisturbed):
    folder = write(tmp_path / "checkpoints", {20: STATES[20]}, "epoch_{}.pth")
    write(folder, {40: STATES[40]}, "{}.bin")
    save_file(STATES[60][0], folder / "model.000060.safetensors")
    for step, key in ((0, "optimizer"), (100, "optimizer_state_dict")):
        state, optimizer = STATES[step]
        torch.save({"epoch": step, "model_state_dict": state, key: optimizer}, folder / f"{step}.pt")
    own = folder / "checkpoint-80"
    own.mkdir()
    save_file(STATES[80][0], own / "model.safetensors")
    torch.save(STATES[80][1], own / "optimizer.pt")
    torch.save(object(), own / "training_args.bin")  # not to be read: it may hold anything
    trajectory, _ = tracked(tmp_path)
    rates = trajectory.collect(lambda snapshot: snapshot.learning_rate)
    np.testing.assert_array_equal(rates, [0.02, np.nan, np.nan, np.nan, 0.02, 0.02])
    assert np.isnan(trajectory.collect(lambda snapshot: snapshot.stability_limit)).all()  # Adam
    for own, other in zip(trajectory.snapshots, undisturbed[1].snapshots, strict=True):
        assert (own.step, own.value) == (other.step, other.value)
        np.testing.assert_array_equal(own.block_energies().values, other.block_energies().values)
        np.testing.assert_array_equal(own.eigenvalues.largest, other.eigenvalues.largest)


def test_learning_rates_and_the_stability_limit(tmp_path):
    settings = {"optimizer": torch.optim.SGD, "lr": 0.1, "decay": 0.9, "momentum": 0.5, "weight_decay": 0.01}
    states = trained((0, 1, 2), **settings)
    (tmp_path / "checkpoints").mkdir()
    for step, (state, optimizer) in states.items():
        torch.save({"model": state, "optimizer": optimizer}, tmp_path / "checkpoints" / f"{step}.pt")
    section = {"measures": ["trace"]}
    trajectory, _ = tracked(tmp_path, section)
    for step, snapshot in zip((0, 1, 2), trajectory.snapshots, strict=True):
        assert snapshot.learning_rate == pytest.approx(0.1 * 0.9**step, rel=1e-12)
        assert snapshot.stability_limit == pytest.approx(2 * 1.5 / (0.1 * 0.9**step) - 0.01, rel=1e-12)
    # What is told counts, and is written into what has been measured.
    before = [path.stat().st_mtime_ns for path in sorted((tmp_path / "out").glob("step-*.nc"))]
    trajectory, found = tracked(tmp_path, section | {"learning_rate": 0.25})
    assert found == 3
    assert [(each.learning_rate, each.stability_limit) for each in trajectory.snapshots] == [(0.25, 8.0)] * 3
    after = [path.stat().st_mtime_ns for path in sorted((tmp_path / "out").glob("step-*.nc"))]
    assert min(after) > max(before)
    assert run(tmp_path, section | {"learning_rate": 0.25}) == 3
    assert [path.stat().st_mtime_ns for path in sorted((tmp_path / "out").glob("step-*.nc"))] == after
    # Groups that differ have no learning rate, and another optimizer's limit is not known.
    for step, (state, optimizer) in states.items():
        group, *_ = optimizer["param_groups"]
        groups = {0: [group, group | {"lr": 1.0}], 1: [group, group], 2: [group | {"betas": (0.9, 0.99)}]}[step]
        torch.save(
            {"model": state, "optimizer": {"state": {}, "param_groups": groups}},
            tmp_path / "checkpoints" / f"{step}.pt",
        )
    first, second, third = tracked(tmp_path, section)[0].snapshots
    assert np.isnan([first.learning_rate, first.stability_limit, third.stability_limit]).all()
    assert (second.learning_rate, second.stability_limit) == pytest.approx((0.09, 3 / 0.09 - 0.01))
    assert third.learning_rate == pytest.approx(0.081)


# --- resuming ---------------------------------------------------------------------------------------------------------


class KilledError(Exception):
    pass


@pytest.mark.parametrize("moment", ["_keep_vectors", "save"])  # after a checkpoint: the next test
def test_a_run_that_is_stopped_twice_equals_an_undisturbed_one(tmp_path, undisturbed, monkeypatch, moment):
    write(tmp_path / "checkpoints", {step: STATES[step] for step in STEPS[:3]})
    for after in (1, 1):
        left = [after]

        def stopping(function, left=left):
            def call(*arguments):
                left[0] -= 1
                if left[0] < 0:
                    raise KilledError
                return function(*arguments)

            return call

        owner = track.TrackStudy if moment == "save" else track
        with monkeypatch.context() as patch, pytest.raises(KilledError):
            patch.setattr(owner, moment, stopping(getattr(owner, moment)))
            run(tmp_path)
    study = prepared(tmp_path)
    assert [each.step for each in study.waiting] == [40]
    assert run_track(study, QUIET) == 2
    assert_same(trees(tmp_path / "out"), dict(list(undisturbed[2].items())[:3]))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {f"step-{step:09d}.nc" for step in STEPS[:3]} | {"tracker.json", "eigenvectors-40.pt"}


SLOW = """
import sys, time
from pathlib import Path
from tests.study.test_track import prepared
from hesscope.study.track import run_track
run_track(prepared(Path(sys.argv[1])), lambda title, share: time.sleep(0.2))
"""


def test_a_killed_run_continues_to_the_same_numbers(tmp_path, undisturbed):
    write(tmp_path / "checkpoints", {step: STATES[step] for step in STEPS[:3]})
    process = start([sys.executable, "-c", SLOW, str(tmp_path)])
    wait_for(tmp_path / "out" / "step-000000020.nc", process)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert run(tmp_path) == 2
    assert_same(trees(tmp_path / "out"), dict(list(undisturbed[2].items())[:3]))


def test_checkpoints_that_come_later_or_change_are_measured(tmp_path, undisturbed):
    folder = write(tmp_path / "checkpoints", {step: STATES[step] for step in STEPS[:2]})
    section = {"gaps": True}
    assert run(tmp_path, section) == 0
    write(tmp_path / "checkpoints", {step: STATES[step] for step in STEPS[2:4]})
    study = prepared(tmp_path, section)
    assert [each.step for each in study.waiting] == [40, 60]
    run_track(study, QUIET)
    assert_same(trees(tmp_path / "out"), dict(list(undisturbed[2].items())[:4]))
    # One that changes is measured again, and so is the one that begins with its eigenvectors.
    other = {name: 1.1 * tensor for name, tensor in STATES[40][0].items()}
    torch.save(other, folder / "step-40.pt")
    study = prepared(tmp_path, section)
    assert [each.step for each in study.waiting] == [40, 60]
    run_track(study, QUIET)
    changed = track_results(study).snapshots
    assert changed[2].value == pytest.approx(objective_at(other).value(), rel=1e-12)
    here, before = (
        torch.linalg.eigh(hs.Hessian(objective_at(state)).dense()).eigenvectors[:, -3:]
        for state in (STATES[60][0], other)
    )
    assert changed[3].eigenvalues.alignment == pytest.approx(float((before.T @ here).square().sum() / 3), abs=2e-3)
    # A file that cannot be read is measured again, and without eigenvalues no step depends on another.
    (tmp_path / "out" / "step-000000000.nc").write_bytes(b"nonsense")
    assert [each.step for each in prepared(tmp_path, section).waiting] == [0]
    alone = {"measures": ["energies"]}
    assert run(tmp_path, alone, output="energies") == 0
    write(folder, {40: STATES[40]})
    assert [each.step for each in prepared(tmp_path, alone, output="energies").waiting] == [40]
    # Its eigenvectors are those of another, wherever the next one would begin.
    assert (tmp_path / "out" / "eigenvectors-60.pt").exists()
    torch.save(other, folder / "step-60.pt")
    track._take_up(prepared(tmp_path, section))
    assert not (tmp_path / "out" / "eigenvectors-60.pt").exists()
    # One that has gone would leave numbers of nothing.
    (folder / "step-20.pt").unlink()
    with pytest.raises(InputError, match=r"has step 20, whose checkpoint is not in .*: put it back there, or use"):
        prepared(tmp_path, section)


# --- several processes ------------------------------------------------------------------------------------------------


def test_processes_agree_with_one(tmp_path, undisturbed, monkeypatch):
    """The shares, each as a process would do it; tests of processes themselves, and of the command, start some."""
    write(tmp_path / "checkpoints")
    told, shares, threads = [], [], []

    def one_after_another(function, arguments, watch):
        for each in reversed(arguments):  # the second share is begun when nothing of the first is there
            config, base, steps, number = pickle.loads(pickle.dumps(each))
            shares.append(steps)
            threads.append(number)
            function(config, base, steps, torch.get_num_threads())
            watch()

    monkeypatch.setattr(track, "run_in_processes", one_after_another)
    study = prepared(tmp_path, {"processes": 2})
    assert run_track(study, lambda title, share: told.append((title, share))) == 0
    assert shares == [[60, 80, 100], [0, 20, 40]]
    assert threads == [max(1, torch.get_num_threads() // 2)] * 2
    assert told == [("0 of 6 checkpoints", 0), ("3 of 6 checkpoints", 0.5), ("6 of 6 checkpoints", 1), ("done", 1)]
    trajectory = track_results(study)
    assert trajectory.steps.tolist() == list(STEPS)
    for own, other in zip(trajectory.snapshots, undisturbed[1].snapshots, strict=True):
        assert own.value == other.value
        np.testing.assert_array_equal(own.block_energies().values, other.block_energies().values)
        np.testing.assert_allclose(own.eigenvalues.largest, other.eigenvalues.largest, rtol=1e-5)
        assert own.eigenvalues.aligned_with == other.eigenvalues.aligned_with
        assert own.eigenvalues.alignment == pytest.approx(other.eigenvalues.alignment, abs=2e-3, nan_ok=True)
    assert sorted(path.name for path in (tmp_path / "out").glob("eigen*")) == ["eigenvectors-100.pt"]
    assert prepared(tmp_path).waiting == ()


def test_what_goes_wrong_names_the_checkpoint(tmp_path):
    folder = write(tmp_path / "checkpoints")
    torch.save({name: tensor * np.nan for name, tensor in STATES[80][0].items()}, folder / "step-80.pt")
    config = prepared(tmp_path, {"measures": ["energies"]}).config
    with pytest.raises(DataError, match=r"step 80 \(.*step-80.pt\): the loss is nan") as caught:
        track._measure_in_process(config, tmp_path, [60, 80, 100], torch.get_num_threads())
    assert "\n" not in str(caught.value)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["step-000000060.nc"]


# --- what is refused --------------------------------------------------------------------------------------------------


def refused(tmp_path, words, section=None, **keys):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(HesscopeError) as caught:
        prepared(tmp_path, section, **keys)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


SETTINGS = [
    ({"checkpoints": None}, 'track needs a folder of checkpoints: checkpoints = "DIR" in the section [track]'),
    ({"checkpoints": "nowhere"}, "there is no folder"),
    ({"measures": ["energy"]}, "track.measures: each of measures must be one of 'energies', 'eigenvalues', 'trace'"),
    ({"measures": ["trace", "trace"]}, "track.measures: 'trace' is twice among the measures"),
    ({"eigenpairs": 49}, "track.eigenpairs must be at most the number of parameters, 48, got 49"),
]


@pytest.mark.parametrize(("section", "words"), SETTINGS)
def test_settings_that_do_not_fit(tmp_path, section, words):
    write(tmp_path / "checkpoints")
    refused(tmp_path, words, section)


def test_methods_that_do_not_fit(tmp_path):
    write(tmp_path / "checkpoints")
    refused(tmp_path, "method must be one of", method="exakt")
    refused(tmp_path, "probes must be at least 2", probes=1)
    refused(tmp_path, "method 'exact' takes no probes", probes=4, method="exact")
    refused(tmp_path, "which a loss callable does not have", method="dual", loss=f"{USERS}:sum_loss")


def test_all_checkpoints_must_fit_the_model(tmp_path, monkeypatch):
    folder = write(tmp_path / "checkpoints")
    monkeypatch.setattr(track.loading, "load_data", None)  # before the data is looked at
    wider = user_code.network(width=7).state_dict()
    torch.save(wider, folder / "step-80.pt")
    refused(tmp_path, "step-80.pt does not fit the model: fc1.weight has shape [7, 5] there and [6, 5] in the model")
    save_file({"fc1.weight": STATES[40][0]["fc1.weight"]}, folder / "step-40.safetensors")
    (folder / "step-40.pt").unlink()
    refused(tmp_path, "step-40.safetensors does not fit the model: missing fc2.weight")
    (folder / "step-20.pt").write_bytes((folder / "step-60.pt").read_bytes()[:300])
    refused(tmp_path, "step-20.pt cannot be read")


def test_a_folder_of_another_study(tmp_path):
    write(tmp_path / "checkpoints", {step: STATES[step] for step in (0, 20)})
    quick = {"measures": ["energies"]}
    run(tmp_path, quick)
    there = f"{tmp_path / 'out'} holds the trajectory of another study: there"
    arguments = {"model_arguments": {"width": 6}}
    refused(
        tmp_path,
        f"{there} model = {USERS}:network, 48 parameters; here model = {USERS}:network (width = 6), 48",
        quick,
        **arguments,
    )
    refused(
        tmp_path, f"{there} data = {USERS}:tensors, 40 loss terms", quick, data_arguments={}, data=f"{USERS}:points"
    )
    refused(tmp_path, f"{there} seed = 0; here seed = 1; use another folder", quick, seed=1)
    refused(tmp_path, f"{there} partition = row, 9 blocks, ", quick, partition="tensor")
    refused(tmp_path, f"{there} measures = Energies(", {"measures": ["energies", "trace"]})
    refused(tmp_path, "here measures = Energies(method='exact'", quick, method="exact")
    refused(tmp_path, f"{there} loss = cross_entropy, ", quick, loss="torch.nn:CrossEntropyLoss")
    write(tmp_path / "others", {step: STATES[step] for step in (0, 20)})
    refused(
        tmp_path, f"{there} checkpoints = checkpoints; here checkpoints = others", quick | {"checkpoints": "others"}
    )
    # What the numbers do not depend on may change.
    assert prepared(tmp_path, quick | {"processes": 2, "threshold": 0.5, "optimum": -1.0, "gaps": True}).waiting == ()


def test_code_that_has_changed_is_seen_by_the_loss(tmp_path, monkeypatch):
    write(tmp_path / "checkpoints", {step: STATES[step] for step in (0, 20)})
    asked = {"measures": ["energies"]}
    loss = f"{USERS}:scaled_loss"
    trajectory, _ = tracked(tmp_path, asked, loss=loss)
    assert trajectory.snapshots[0].parts == ("H",)  # a callable has no Gauss-Newton matrix
    assert run(tmp_path, asked, loss=loss) == 2
    monkeypatch.setattr(user_code, "FACTOR", 2.0)
    study = prepared(tmp_path, asked, loss=loss)
    with pytest.raises(
        InputError, match=r"step 0 was measured in .* at a loss of .*: the model's or the loss's code has"
    ):
        run_track(study, QUIET)


ENERGIES = {"measures": ["energies"]}
LOSSES = [objective_at(state).value() for state, _ in STATES.values()]


def test_an_optimum_above_a_loss_is_refused_before_any_work(tmp_path, monkeypatch):
    write(tmp_path / "checkpoints", {step: STATES[step] for step in STEPS[:2]})
    high = ENERGIES | {"optimum": (LOSSES[0] + LOSSES[1]) / 2}
    told = []
    words = f"track.optimum must be a number that no loss is below, got .*; the loss at step 20 is {LOSSES[1]:.6g}"
    with pytest.raises(InputError, match=f"{words}$"):
        run_track(prepared(tmp_path, high), lambda title, share: told.append(title))
    assert told == ["loss of checkpoint 1 of 2", "loss of checkpoint 2 of 2"]
    assert not (tmp_path / "out").exists()
    # Nothing is lost where the snapshots are there; one that is new is looked at before it is measured.
    assert run(tmp_path, ENERGIES | {"optimum": 0.999 * LOSSES[1]}) == 0
    with pytest.raises(InputError, match=f"{words}; what was measured before is kept in {tmp_path / 'out'}$"):
        run(tmp_path, high)
    write(tmp_path / "checkpoints", {40: STATES[40]})
    with pytest.raises(InputError, match=r"the loss at step 40 is .*; what was measured before is kept"):
        run(tmp_path, ENERGIES | {"optimum": 0.999 * LOSSES[1]})
    assert sorted(path.name for path in (tmp_path / "out").glob("*.nc")) == [f"step-{step:09d}.nc" for step in (0, 20)]
    # Without energies there is no use for it, and cross-entropy is never negative, but a loss of one's own may be.
    assert run(tmp_path, {"measures": ["trace"], "optimum": 9.0}, output="traces") == 0
    monkeypatch.setattr(user_code, "FACTOR", -1.0)
    with pytest.raises(InputError, match=r"got 0; the loss at step 0 is -"):
        run(tmp_path, ENERGIES, output="negative", loss=f"{USERS}:scaled_loss")
    assert not (tmp_path / "negative").exists()


# --- the plan ---------------------------------------------------------------------------------------------------------


def test_the_plan_in_words(tmp_path, undisturbed, monkeypatch):
    lines = dict(describe_track(prepared(undisturbed[0], {"learning_rate": 0.1, "processes": 2})))
    assert lines["steps"] == f"0 to 100, 6 checkpoints in {undisturbed[0] / 'checkpoints'}"
    assert lines["time"] == "everything is measured; only the page is written again"
    assert "processes" not in lines
    assert lines["partition"] == "row: 9 blocks"
    assert lines["measures"] == "energies, eigenvalues"
    assert lines["rate"] == "learning rate 0.1"
    write(tmp_path / "checkpoints")
    section = {"processes": 2, "measures": ["trace", "density"]}
    lines = dict(describe_track(prepared(tmp_path, section)))
    assert lines["steps"] == f"0 to 100, 6 checkpoints in {tmp_path / 'checkpoints'}"
    words = "about a second to measure 6 checkpoints in 2 processes, start-up and page apart (the Hessian made once for"
    assert lines["time"].startswith(words)
    assert lines["processes"] == "more than 1 may not pay: each takes seconds to load PyTorch and the study"
    assert "partition" not in lines
    lines = dict(describe_track(prepared(tmp_path, section, loss=f"{USERS}:sum_loss")))
    assert "(360 products of " in lines["time"]  # 200 for the trace, 4 x 40 for the density
    monkeypatch.setattr(track, "_cost", lambda study: (11.0, "slow"))
    assert "processes" not in dict(describe_track(prepared(tmp_path, section)))
    # One checkpoint, and one that is left of two.
    write(tmp_path / "one", {20: STATES[20]})
    study = prepared(tmp_path, ENERGIES | {"checkpoints": "one"}, output="single")
    lines, told = dict(describe_track(study)), []
    assert lines["steps"] == f"20, 1 checkpoint in {tmp_path / 'one'}"
    assert lines["time"] == "about 11 s to measure 1 checkpoint, start-up and page apart (slow)"
    run_track(study, lambda title, share: told.append(title))
    assert told == ["0 of 1 checkpoint", "1 of 1 checkpoint", "done"]
    write(tmp_path / "one", {40: STATES[40]})
    lines = dict(describe_track(prepared(tmp_path, ENERGIES | {"checkpoints": "one"}, output="single")))
    assert lines["steps"] == f"20 to 40, 2 checkpoints in {tmp_path / 'one'}; 1 of them to be measured"
