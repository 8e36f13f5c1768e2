"""Tracker: when it measures, what a kill leaves, what a budget allows, what it refuses."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import hesscope as hs
from hesscope.dynamics import Adaptive, Eigenvalues, Tracker, clock, kept_state, log_spaced, open_trajectory, tracker
from hesscope.dynamics.trajectory import steps_in
from tests.dynamics.runs import Run

MEASURES = ("energies", Eigenvalues(k=3, rtol=1e-6))


class Killed(BaseException):
    """What takes the place of a kill within one process."""


def tracked(steps, at, folder=None, kill=None, measures=MEASURES, **options):
    """Track a run, which is killed when the snapshot of the step `kill` exists; None if it was."""
    run = Run(**options)

    def seen(snapshot):
        if snapshot.step == kill:
            raise Killed

    tracker = Tracker(run.objective, at=at, measures=measures, folder=folder, on_snapshot=seen)
    try:
        run.train(tracker, steps)
    except Killed:
        return None
    return tracker.finish()


def assert_same(first, second):
    """Two trajectories of one training run: energies of closed forms bit for bit, eigenvalues to their tolerance."""
    assert list(first.steps) == list(second.steps)
    for one, other in zip(first.snapshots, second.snapshots, strict=True):
        assert one.value == other.value
        for part in one.parts:
            assert np.array_equal(one.block_energies(part).values, other.block_energies(part).values)
        if one.eigenvalues is not None:
            assert np.allclose(one.eigenvalues.largest, other.eigenvalues.largest, rtol=1e-10)
            assert np.allclose(one.eigenvalues.alignment, other.eigenvalues.alignment, rtol=1e-6, equal_nan=True)
            assert one.eigenvalues.aligned_with == other.eigenvalues.aligned_with


# --- when -------------------------------------------------------------------------------------------------------------


def test_every_so_many_steps():
    assert list(tracked(25, 10, measures=[]).steps) == [0, 10, 20]


def test_adaptive_steps_follow_the_movement():
    run = Run()
    tracker = Tracker(run.objective, at=Adaptive(0.2), measures=[])
    run.train(tracker, 120)
    steps = list(tracker.finish().steps)
    flat = {step: torch.cat([w.reshape(-1) for w in weights]) for step, weights in run.weights.items()}
    expected, place = [0], flat[0]
    for step in range(1, 121):
        if (flat[step] - place).norm() >= 0.2 * place.norm():
            expected.append(step)
            place = flat[step]
    assert steps == expected
    assert 4 < len(steps) < 100


@pytest.mark.parametrize("at", [Adaptive(0.2), 20, [0, 3]])
@pytest.mark.parametrize("budget", [None, 0.01])
def test_the_end_is_measured_on_request(at, budget):
    run = Run()
    tracker = Tracker(run.objective, at=at, measures=[], budget=budget)
    for step in range(50):
        tracker(step)
        run.update()
    trajectory = tracker.finish(50)
    assert trajectory.steps[-1] == 50
    assert trajectory.snapshots[-1].value == run.objective.value()


def test_steps_that_never_came_by_are_named():
    run = Run()
    tracker = Tracker(run.objective, at=[0, 2, 7, 30], measures=[])
    for step in range(0, 12, 2):
        tracker(step)
        run.update()
    assert tracker.finish(12).left_out == (7,)


def test_forced_steps():
    run = Run()
    tracker = Tracker(run.objective, at=[0], measures=[])
    assert tracker(0) is not None and tracker(3) is None and tracker(4, force=True) is not None
    assert list(tracker.trajectory.steps) == [0, 4]


def test_learning_rates():
    run = Run(optimizer="sgd", rate=0.25)
    tracker = Tracker(run.objective, at=1, measures=[], optimizer=run.optimizer)
    read, told = tracker(0), tracker(1, learning_rate=0.125)
    assert (read.learning_rate, read.stability_limit) == (0.25, 8.0)
    assert (told.learning_rate, told.stability_limit) == (0.125, 16.0)
    alone = Tracker(run.objective, at=1, measures=[])(0)
    assert np.isnan(alone.learning_rate) and np.isnan(alone.stability_limit)


# --- kills ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [log_spaced(40, 6), 8, Adaptive(0.15)])
def test_killed_twice_and_resumed_equals_undisturbed(at, tmp_path):
    whole = tracked(40, at)
    kills = [int(whole.steps[1]), int(whole.steps[3])]
    for kill in kills:
        assert tracked(40, at, tmp_path, kill) is None
        assert steps_in(tmp_path)[-1] == kill
        assert open_trajectory(tmp_path).steps[-1] == kill  # readable while it runs
    resumed = tracked(40, at, tmp_path)
    assert_same(resumed, whole)
    assert_same(open_trajectory(tmp_path), whole)
    assert len(list(tmp_path.glob("kept-*"))) == 1


@pytest.mark.parametrize("at", [log_spaced(40, 6), Adaptive(0.15)])
@pytest.mark.parametrize("after", [False, True])
def test_killed_between_two_writes(at, after, tmp_path, monkeypatch):
    """Just before or just after the snapshot's file appears, with what is kept for the next step written before."""
    whole = tracked(40, at)
    save = tracker.save_snapshot

    def killed(folder, snapshot):
        if snapshot.step != whole.steps[2]:
            save(folder, snapshot)
        else:
            if after:
                save(folder, snapshot)
            raise Killed

    monkeypatch.setattr(tracker, "save_snapshot", killed)
    assert tracked(40, at, tmp_path) is None
    monkeypatch.undo()
    assert_same(tracked(40, at, tmp_path), whole)


@pytest.mark.parametrize("at", [log_spaced(40, 8), Adaptive(0.15)])
def test_resumed_from_a_checkpoint_of_the_middle(at, tmp_path):
    """The user's own checkpoint is older than the last snapshot: steps in between are passed over, none is lost."""
    whole = tracked(40, at)
    run = Run()
    tracker = Tracker(run.objective, at=at, measures=MEASURES, folder=tmp_path)
    run.train(tracker, 12)
    checkpoint = {"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()}
    checkpoint = torch.load(saved(checkpoint, tmp_path), weights_only=True)
    for step in range(13, 24):
        run.update()
        tracker(step)
    again = Run()
    again.model.load_state_dict(checkpoint["model"])
    again.optimizer.load_state_dict(checkpoint["optimizer"])
    resumed = Tracker(again.objective, at=at, measures=MEASURES, folder=tmp_path)
    again.train(resumed, 40, first=12)
    assert_same(resumed.finish(), whole)


def saved(checkpoint, folder):
    torch.save(checkpoint, folder / "user.ckpt")
    return folder / "user.ckpt"


SCRIPT = """
import sys, time
from hesscope.dynamics import Eigenvalues, Tracker
from tests.dynamics.runs import Run
run = Run()
tracker = Tracker(run.objective, at=1, measures=["energies", Eigenvalues(k=3, rtol=1e-6)], folder=sys.argv[1])
run.train(tracker, 60)
"""


def test_a_real_kill(tmp_path):
    """SIGKILL in the middle of whatever it was doing; what is there can be read, and the rest follows."""
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[2])
    limit = time.monotonic() + 100
    while len(steps_in(tmp_path)) < 4 and time.monotonic() < limit:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    found = list(open_trajectory(tmp_path).steps)
    assert found == list(range(len(found))) and len(found) >= 4
    assert_same(tracked(12, 1, tmp_path, measures=["energies", Eigenvalues(k=3, rtol=1e-6)]), tracked(12, 1))


# --- budget -----------------------------------------------------------------------------------------------------------


class FakeTime:
    """A clock on which an update takes 1 s and a snapshot 20 s."""

    def __init__(self, monkeypatch, cost=20.0):
        self.now = 0.0
        fake = SimpleNamespace(perf_counter=lambda: self.now, now_plus=self.plus)
        monkeypatch.setattr(clock, "time", fake)
        monkeypatch.setattr(tracker, "time", fake)
        measure = tracker.measure

        def slow(*arguments):
            self.now += cost
            return measure(*arguments)

        monkeypatch.setattr(tracker, "measure", slow)

    def plus(self, seconds):
        self.now += seconds


def budgeted(monkeypatch, steps, at, budget, folder=None, kill=None, **options):
    fake = FakeTime(monkeypatch)
    run = Run()
    tracker = Tracker(run.objective, at=at, measures=["energies"], budget=budget, folder=folder, **options)
    longest = 0.0
    for step in range(steps + 1):
        if step == kill:
            monkeypatch.undo()
            return None
        tracker(step)
        if step > 20 / budget:
            longest = max(longest, tracker.share)
        fake.now += 1.0
        run.update()
    return tracker, longest


@pytest.mark.parametrize("kept", [False, True])
def test_a_budget_is_kept_and_steps_are_measured_where_they_were_due(kept, tmp_path, monkeypatch):
    at = log_spaced(2000, 16)
    before = dict.fromkeys(at)
    run = Run()
    for step in range(2001):
        if step in before:
            before[step] = run.objective.value()
        run.update()
    tracker, longest = budgeted(monkeypatch, 2000, at, 0.1, tmp_path if kept else None)
    if kept:
        assert list(tmp_path.glob("waiting-*"))
    trajectory = tracker.finish()
    assert longest <= 0.1 and tracker.share <= 0.1
    assert len(trajectory) == 10  # 2000 s of training pay for ten snapshots of 20 s
    assert trajectory.steps[0] == 0 and trajectory.steps[-1] == 2000
    assert sorted([*trajectory.steps, *trajectory.left_out]) == sorted(at)
    for snapshot in trajectory.snapshots:
        assert snapshot.value == before[snapshot.step]
        assert snapshot.training_seconds == snapshot.step
    assert tracker.report() == "10 snapshots in 200 s (10.0% of 2e+03 s of training); 6 due and left out"
    if kept:
        assert open_trajectory(tmp_path).left_out == trajectory.left_out
        assert not list(tmp_path.glob("waiting-*"))


def test_copies_of_steps_that_wait_are_few(monkeypatch, tmp_path):
    """All steps are due, copying takes as long as a step: without a limit it would double the training's time."""
    put, most = kept_state.KeptState.put, []

    def counted(self, *arguments):
        put(self, *arguments)
        clock.time.now_plus(1.0)
        most.append(len(list(tmp_path.glob("waiting-*"))))

    monkeypatch.setattr(kept_state.KeptState, "put", counted)
    written, write = [], tracker.write_identity
    monkeypatch.setattr(tracker, "write_identity", lambda *arguments: (written.append(1), write(*arguments)))
    attached, _ = budgeted(monkeypatch, 1500, 1, 0.1, tmp_path)
    assert max(most) == 32 and len(most) < 50
    trajectory = attached.finish()
    assert attached.share < 0.15
    assert len(written) < 100  # not at each of the 1500 steps that are due
    assert sorted([*trajectory.steps, *trajectory.left_out]) == list(range(1501))


def test_the_last_step_is_measured_whatever_the_budget(monkeypatch):
    tracker, _ = budgeted(monkeypatch, 5, [0, 2, 5], 0.1)
    assert list(tracker.finish().steps) == [0, 5]
    assert tracker.share > 1


def test_time_of_earlier_runs_counts(monkeypatch, tmp_path):
    """20 s for each of 10 snapshots: killed and resumed, the same share of the same training."""
    at = log_spaced(2000, 16)
    assert budgeted(monkeypatch, 2000, at, 0.1, tmp_path, kill=900) is None
    tracker = Tracker(Run().objective, at=at, measures=["energies"], folder=tmp_path, budget=0.1)
    measured = len(tracker.trajectory)
    assert measured >= 3
    # Of the time when the last one was measured, not when it was due, which is near the start.
    assert 0.05 < tracker.share <= 0.1


def test_a_kill_at_the_end_forgets_nothing(monkeypatch, tmp_path):
    at = log_spaced(2000, 16)
    tracker, _ = budgeted(monkeypatch, 2000, at, 0.1, tmp_path)
    drop, dropped = kept_state.KeptState.drop, []

    def killed(self, step):
        drop(self, step)
        dropped.append(step)
        if len(dropped) == 3:
            raise Killed

    monkeypatch.setattr(kept_state.KeptState, "drop", killed)
    with pytest.raises(Killed):
        tracker.finish()
    monkeypatch.undo()
    again = Tracker(Run().objective, at=at, measures=["energies"], folder=tmp_path, budget=0.1)
    trajectory = again.finish()
    assert sorted([*trajectory.steps, *trajectory.left_out]) == list(at)


def test_buffers_that_are_views_and_a_callback_that_fails():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2))
    model.register_buffer("view", torch.arange(3.0).expand(2, 3))
    model.register_buffer("count", torch.zeros(()))
    objective = hs.Objective(model, "cross_entropy", (torch.randn(8, 3), torch.zeros(8, dtype=torch.long)))
    seen = []

    def fail(snapshot):
        seen.append(snapshot.step)
        if snapshot.step == 1:
            raise ValueError("no disk")

    tracker = Tracker(objective, at=1, measures=[], budget=1e-9, on_snapshot=fail)
    for step in range(3):
        tracker(step)
        with torch.no_grad():
            model[0].weight.mul_(1.1), model.count.add_(1)
    with pytest.raises(ValueError, match="no disk"):
        tracker.finish(everything=True)
    assert model.count == 3
    tracker.finish(everything=True)
    assert seen == [0, 1, 2]


def test_everything_is_measured_on_request(monkeypatch):
    tracker, _ = budgeted(monkeypatch, 300, log_spaced(300, 8), 0.1)
    assert list(tracker.finish(everything=True).steps) == list(log_spaced(300, 8))
    assert tracker.share > 0.1


def test_steps_that_wait_survive_a_kill(tmp_path, monkeypatch):
    at = log_spaced(2000, 16)
    assert budgeted(monkeypatch, 2000, at, 0.1, tmp_path, kill=700) is None
    waiting = {int(path.stem.removeprefix("waiting-")) for path in tmp_path.glob("waiting-*")}
    done = set(steps_in(tmp_path))
    assert waiting and done | waiting == {step for step in at if step < 700}
    tracker, _ = budgeted(monkeypatch, 2000, at, 0.1, tmp_path)
    trajectory = tracker.finish(everything=True)
    assert list(trajectory.steps) == list(at)
    whole = tracked(2000, at, measures=["energies"])
    assert_same(trajectory, whole)


def test_adaptive_steps_with_a_budget_are_those_without(monkeypatch, tmp_path):
    whole = tracked(60, Adaptive(0.15), measures=["energies"])
    assert budgeted(monkeypatch, 60, Adaptive(0.15), 0.1, tmp_path, kill=9) is None
    tracker, _ = budgeted(monkeypatch, 60, Adaptive(0.15), 0.1, tmp_path)
    assert_same(tracker.finish(everything=True), whole)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_steps_must_increase():
    tracker = Tracker(Run().objective, at=[0, 5], measures=[])
    tracker(4)
    for step in (4, 3):
        with pytest.raises(hs.HesscopeError, match=f"steps must increase from call to call, but {step} comes after 4"):
            tracker(step)
    with pytest.raises(hs.HesscopeError, match=r"step must be an integer of at least 0.*got 5\.0"):
        tracker(5.0)


def test_a_model_that_is_not_being_trained():
    run, other = Run(), Run()
    with pytest.raises(hs.HesscopeError, match="the optimizer has no parameter of the objective's model"):
        Tracker(run.objective, at=1, optimizer=other.optimizer)
    tracker = Tracker(run.objective, at=1, measures=[])
    tracker(0)
    tracker(1)  # a learning rate may start at zero
    with pytest.raises(hs.HesscopeError, match="not changed over 3 measured steps, up to step 2: it is not"):
        tracker(2)


def test_a_model_that_rests_at_its_minimum_is_no_error():
    model = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    tracker = Tracker(hs.Objective(model, "mse", (torch.ones(3, 2), torch.zeros(3, 1))), at=1, measures=["energies"])
    for step in range(5):
        assert tracker(step).gradient_norm == 0


def test_training_that_has_come_to_rest_is_no_error():
    """Rates that decay, or float32 that is exhausted: the parameters stay, though the gradient is not zero."""
    run = Run()
    tracker = Tracker(run.objective, at=1, measures=[])
    tracker(0)
    run.update()
    for step in range(1, 8):
        assert tracker(step).gradient_norm > 0
    assert "not moved" not in tracker.report()


def test_a_network_that_fits_everything_is_still_measured():
    """Probabilities minus labels are all but rounding then, and so is the Hessian's symmetry (no closed form here)."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(30, 6, generator=generator), torch.arange(30) % 3
    model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.LayerNorm(16), torch.nn.Tanh(), torch.nn.Linear(16, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    objective = hs.Objective(model, "cross_entropy", (x, y))
    tracker = Tracker(objective, at=[0, 300], measures=["energies", "eigenvalues"])
    for step in range(300):
        tracker(step)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    with torch.no_grad():
        model[-1].weight.mul_(2.5), model[-1].bias.mul_(2.5)
    last = tracker.finish(300).snapshots[-1]
    assert last.step == 300 and last.accuracy == 1 and 0 < last.value < 1e-5
    assert np.isfinite(last.cross_layer_share()) and last.sharpness > 0


def test_layers_may_be_frozen_on_the_way():
    run = Run()
    tracker = Tracker(run.objective, at=Adaptive(0.05), measures=["energies"])
    for step in range(30):
        tracker(step)
        run.model.fc1.weight.requires_grad_(step < 10)
        run.update()
    assert len(tracker.finish()) > 2


def test_the_folder_of_another_study(tmp_path):
    assert tracked(3, 1, tmp_path, measures=["energies"]) is not None
    with pytest.raises(hs.HesscopeError) as refused:
        tracked(3, 1, tmp_path, measures=["energies"], m=5)
    message = str(refused.value)
    assert "\n" not in message
    assert "there model = MLP, 44 parameters" in message and "here model = MLP, 55 parameters" in message
    with pytest.raises(hs.HesscopeError, match=r"there measures = Energies.*here measures = Energies.*Trace"):
        tracked(3, 1, tmp_path, measures=["energies", "trace"])
    with pytest.raises(hs.HesscopeError, match=r"there loss = cross_entropy, data = .*; here loss = mse"):
        tracked(3, 1, tmp_path, measures=["energies"], loss="mse")
    assert len(steps_in(tmp_path)) == 4


def test_another_run_of_the_same_study(tmp_path):
    assert tracked(5, 1, tmp_path, measures=["energies"]) is not None
    with pytest.raises(hs.HesscopeError, match=r"step 1 was measured in .* at a loss of .*: this is another run"):
        run = Run(rate=0.3)
        tracker = Tracker(run.objective, at=1, measures=["energies"], folder=tmp_path)
        run.update()
        run.train(tracker, 5, first=1)


def test_diverged_training():
    run = Run()
    tracker = Tracker(run.objective, at=1, measures=["energies"])
    tracker(0)
    with torch.no_grad():
        run.model.fc1.weight.fill_(float("inf"))
    with pytest.raises(hs.HesscopeError, match="training has diverged"):
        tracker(1)


def test_other_bad_arguments():
    run = Run()
    for options, message in {
        (("budget", 0),): "budget must be a share of the training's time",
        (("budget", 1.5),): "budget must be a share of the training's time",
        (("budget", "0.1"),): "budget must be a share of the training's time.*got '0.1'",
        (("optimizer", "sgd"),): "optimizer must be a torch optimizer, got 'sgd'",
        (("on_snapshot", "x"),): "on_snapshot must be a function of a Snapshot, got 'x'",
        (("seed", "a"),): "seed must be an integer, got 'a'",
        (("folder", __file__),): "folder = .*test_tracker.py' is a file",
        (("measures", ("energy",)),): "each of measures must be one of .*did you mean 'energies'",
        (("measures", "energies"),): r"measures must be a list, such as \['energies'\]",
        (("measures", ("trace", "trace")),): "'trace' is twice among the measures",
        (("measures", (3,)),): "each of measures must be a name or a measure of hesscope.dynamics, got 3",
        (("partition", hs.Partition.by_row(hs.models.one_hidden(7, 4, 5))),): "48 parameters.*44",
    }.items():
        with pytest.raises(hs.HesscopeError, match=message):
            Tracker(run.objective, **dict(options))
    with pytest.raises(hs.HesscopeError, match=r"objective must be a hesscope\.Objective, got MLP"):
        Tracker(run.model)
    large = hs.models.one_hidden(600, 8, 10)
    objective = hs.Objective(large, "cross_entropy", (torch.zeros(2, 600), torch.zeros(2, dtype=torch.long)))
    with pytest.raises(hs.HesscopeError, match="a heatmap needs the whole matrix and takes up to 4,096 parameters"):
        Tracker(objective, measures=["heatmap"])


def test_folders_that_cannot_be_read(tmp_path):
    with pytest.raises(hs.HesscopeError, match=r"has no trajectory: no tracker\.json"):
        open_trajectory(tmp_path)
    assert tracked(2, 1, tmp_path, measures=[]) is not None
    (tmp_path / "step-000000001.nc").write_bytes(b"no")
    with pytest.raises(hs.HesscopeError, match=r"cannot read .*step-000000001\.nc"):
        open_trajectory(tmp_path)
    (tmp_path / "tracker.json").write_text(json.dumps({"identity": {}}))
    with pytest.raises(hs.HesscopeError, match=r"cannot read .*tracker\.json"):
        open_trajectory(tmp_path)
