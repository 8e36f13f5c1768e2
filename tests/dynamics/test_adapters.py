"""Trackers in the loops of Lightning and Hugging Face: which steps, whose parameters, resumed runs; TensorBoard."""

import importlib.util
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import hesscope as hs
from hesscope.core.errors import InputError
from hesscope.dynamics import Eigenvalues, Tracker
from hesscope.dynamics.adapters import LAYERS_IN_PAIRS, hugging_face_callback, lightning_callback, tensorboard
from tests.dynamics.trainers import (
    TOKENS,
    batches_of,
    hugging_face_trainer,
    lightning_trainer,
    lightning_warns,
    tiny_gpt2,
    wrapped_in_lightning,
)
from tests.helpers import randint, randn, same, sequential_mlp

X, Y = randn(16, 4, seed=1).float(), randint(3, 16, seed=2)
MEASURES = (Eigenvalues(k=1, rtol=0.1),)
RATE = 0.05


def network():
    torch.manual_seed(0)
    return sequential_mlp((4, 3, 3), nn.Tanh, bias=False)


def tracker_of(model, **options):
    return Tracker(hs.Objective(model, "cross_entropy", (X, Y)), **{"at": 2, "measures": MEASURES, **options})


def copies(model):
    return [p.detach().clone() for p in model.parameters()]


def measured_of(trajectory):
    return {s.step: (s.value, s.gradient_norm, s.learning_rate, s.sharpness) for s in trajectory.snapshots}


# --- Lightning --------------------------------------------------------------------------------------------------------


def fit(model, callbacks, updates, checkpoint=None, **options):
    """Full batches; a learning rate that halves after every update."""
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.5)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    steps = {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
    trainer = lightning_trainer(callbacks, updates, **options)
    trainer.fit(wrapped_in_lightning(model, steps), batches_of(X, Y, 8, shuffle=False), ckpt_path=checkpoint)
    return trainer


def plain_values(updates, accumulated=2):
    """Losses before every update and at the end, of a loop without any library, and its learning rates."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.5)
    loss = nn.CrossEntropyLoss()
    values = []
    for step in range(updates + 1):
        optimizer.param_groups[0]["lr"] = RATE * 0.5**step
        values.append(loss(model(X), Y).item())
        optimizer.zero_grad()
        for x, y in zip(X.split(8), Y.split(8), strict=True):
            (loss(model(x), y) / accumulated).backward()
        optimizer.step()
    return values


@lightning_warns
def test_lightning_steps_are_updates():
    """With two batches an update; the tracker sees what a plain loop has before each, and at the end."""
    model = network()
    tracker = tracker_of(model)
    fit(model, [lightning_callback(tracker)], 5, accumulate_grad_batches=2)
    found = tracker.trajectory
    assert list(found.steps) == [0, 2, 4, 5]
    assert found.collect(lambda s: s.value) == pytest.approx([plain_values(5)[step] for step in (0, 2, 4, 5)], rel=1e-5)
    rates = [RATE * 0.5**step for step in (0, 2, 4, 5)]
    assert found.collect(lambda s: s.learning_rate) == pytest.approx(rates, rel=1e-12)
    assert found.collect(lambda s: s.stability_limit) == pytest.approx([3 / rate for rate in rates], rel=1e-12)


@lightning_warns
def test_lightning_goes_on_from_a_checkpoint(tmp_path):
    """Trained to 3, killed, and resumed from the checkpoint of step 2: as if nothing had happened."""
    from lightning.pytorch import Callback

    class Saving(Callback):
        def on_train_batch_end(self, trainer, *given):
            if trainer.global_step == 2 and not (tmp_path / "2.ckpt").exists():  # later is amid the next update
                trainer.save_checkpoint(tmp_path / "2.ckpt")

    def run(updates, *callbacks, checkpoint=None, **options):
        model = network()
        tracker = tracker_of(model, **options)
        fit(model, [lightning_callback(tracker), *callbacks], updates, checkpoint, accumulate_grad_batches=2)
        return measured_of(tracker.trajectory)

    whole = run(5)
    assert list(whole) == [0, 2, 4, 5]
    first = run(3, Saving(), folder=tmp_path / "run")
    found = run(5, checkpoint=tmp_path / "2.ckpt", folder=tmp_path / "run")
    assert list(found) == [0, 2, 3, 4, 5]
    assert found.pop(3) == first[3]
    assert same(found, whole)


@lightning_warns
def test_lightning_in_two_goes():
    """The end of one fit is the beginning of the next."""
    model = network()
    tracker = tracker_of(model)
    callback = lightning_callback(tracker)
    wrapped = wrapped_in_lightning(model, torch.optim.SGD(model.parameters(), lr=RATE))
    trainer = lightning_trainer([callback], 3)
    trainer.fit(wrapped, batches_of(X, Y))
    trainer.fit_loop.epoch_loop.max_steps = 5
    trainer.fit(wrapped, batches_of(X, Y))
    assert list(tracker.trajectory.steps) == [0, 2, 3, 4, 5]


def lightning_world(model, optimizers, **state):
    return SimpleNamespace(optimizers=optimizers, **{"is_global_zero": True, "global_step": 0, **state}), model


def test_other_ranks_do_nothing():
    model = network()
    tracker = tracker_of(model, at=1)
    callback = lightning_callback(tracker)
    for rank, measured in ((False, 0), (True, 1)):
        trainer, module = lightning_world(model, [torch.optim.SGD(model.parameters())], is_global_zero=rank)
        callback.on_train_start(trainer, module)
        callback.on_train_batch_start(trainer, module, None, 0)
        callback.on_train_end(trainer, module)
        assert len(tracker.trajectory) == measured


# --- Hugging Face -----------------------------------------------------------------------------------------------------


def language_tracker(model, **options):
    data = {"input_ids": TOKENS[:4], "labels": TOKENS[:4]}
    objective = hs.Objective(model, "cross_entropy", data)
    return Tracker(objective, hs.Partition.by_layer(model), **{"at": 2, "measures": MEASURES, **options})


def test_hugging_face_steps_are_updates(tmp_path):
    """With the best parameters put in place before the end, which are not those of the last update."""
    model = tiny_gpt2()
    tracker = language_tracker(model)
    after = {}

    class Recorder(recording_callback()):
        def on_step_begin(self, args, state, control, **given):
            after[state.global_step] = tracker.objective.value()

        def on_step_end(self, args, state, control, **given):
            after[state.global_step] = tracker.objective.value()

    trainer = hugging_face_trainer(
        model,
        [hugging_face_callback(tracker), Recorder()],
        5,
        tmp_path,
        torch.optim.SGD(model.parameters(), lr=2.0),
        gradient_accumulation_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # the worst, to be sure that it is not the last
        lr_scheduler_type="linear",
    )
    trainer.train()
    found = tracker.trajectory
    assert list(found.steps) == [0, 2, 4, 5]
    assert found.collect(lambda s: s.value) == pytest.approx([after[step] for step in (0, 2, 4, 5)], rel=1e-6)
    assert abs(tracker.objective.value() / after[5] - 1) > 1e-3
    rates = [2 * (1 - step / 5) for step in (0, 2, 4)]
    assert found.collect(lambda s: s.learning_rate)[:3] == pytest.approx(rates, rel=1e-9)
    assert found.collect(lambda s: s.stability_limit)[:3] == pytest.approx([2 / rate for rate in rates], rel=1e-9)


def recording_callback():
    from transformers import TrainerCallback

    return TrainerCallback


def test_hugging_face_goes_on_from_a_checkpoint(tmp_path):
    """As that of Lightning: 3 is the end of the run that was killed."""
    options = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}

    def run(updates, name, resume=None, **given):
        model = tiny_gpt2()
        tracker = language_tracker(model, **given)
        trainer = hugging_face_trainer(model, [hugging_face_callback(tracker)], updates, tmp_path / name, **options)
        trainer.train(resume_from_checkpoint=resume)
        return measured_of(tracker.trajectory)

    whole = run(4, "whole")
    assert list(whole) == [0, 2, 4]
    first = run(3, "killed", folder=tmp_path / "run")
    found = run(4, "killed", str(tmp_path / "killed" / "checkpoint-2"), folder=tmp_path / "run")
    assert list(found) == [0, 2, 3, 4]
    assert found.pop(3) == first[3]
    assert same(found, whole)


def test_hugging_face_other_ranks_do_nothing():
    model = network()
    tracker = tracker_of(model, at=1)
    callback = hugging_face_callback(tracker)
    for rank, measured in ((False, 0), (True, 1)):
        state = SimpleNamespace(is_world_process_zero=rank, global_step=0)
        callback.on_train_begin(None, state, None, model=model, optimizer=torch.optim.SGD(model.parameters()))
        callback.on_step_begin(None, state, None)
        callback.on_log(None, state, None, logs={"train_runtime": 1.0})
        callback.on_train_end(None, state, None)
        assert len(tracker.trajectory) == measured


# --- which model, which optimizer -------------------------------------------------------------------------------------


def attach(tracker, model, *optimizers):
    callback = lightning_callback(tracker)
    callback.on_train_start(*lightning_world(model, list(optimizers)))


def test_wrapped_models_are_known_by_their_parameters():
    model = network()
    optimizer = torch.optim.SGD(model.parameters())
    wrapped = [model, nn.Sequential(nn.Linear(4, 4), model), torch.compile(model, backend="eager")]
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped.append(nn.parallel.DistributedDataParallel(model))
        for each in wrapped:
            tracker = tracker_of(model)
            attach(tracker, each, optimizer)
            assert tracker.optimizer is optimizer
    finally:
        torch.distributed.destroy_process_group()


def test_the_first_optimizer_that_trains_it():
    model, other = network(), nn.Linear(2, 2)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (other, model)]
    tracker = tracker_of(model)
    attach(tracker, nn.ModuleList([model, other]), *optimizers)
    assert tracker.optimizer is optimizers[1]
    with pytest.raises(InputError, match=r"^no optimizer of the trainer has a parameter of the objective's model: it"):
        attach(tracker, nn.ModuleList([model, other]), optimizers[0])


def test_a_model_that_is_not_the_one_in_training():
    model, copy = network(), network()
    with pytest.raises(InputError, match=r"^the trainer's Sequential does not hold 0\.weight of the objective's Seq.*"):
        attach(tracker_of(copy), model, torch.optim.SGD(model.parameters()))


def test_a_model_that_has_moved():
    model = network()
    tracker = tracker_of(model)
    objective = tracker.objective
    objective.parameters = replace(objective.parameters, device=torch.device("cuda", 0))
    words = "^the trainer's model is on cpu, but the objective was made while it was on cuda:0; move the model to cpu"
    with pytest.raises(InputError, match=words):
        attach(tracker, model, torch.optim.SGD(model.parameters()))


# --- TensorBoard ------------------------------------------------------------------------------------------------------


class Recorder:
    """As a SummaryWriter; {tag: {step: value}}."""

    def __init__(self):
        self.found = {}

    def add_scalar(self, tag, value, global_step):
        self.found.setdefault(tag, {})[global_step] = value

    def flush(self):
        pass


EVERYTHING = ["energies", "eigenvalues", "trace", "heterogeneity"]


def test_tensorboard_reads_what_was_measured(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    recorder = Recorder()
    both = [tensorboard(str(tmp_path)), tensorboard(recorder)]
    tell = {"on_snapshot": lambda snapshot: [write(snapshot) for write in both]}
    tracker = tracker_of(model, measures=EVERYTHING, optimizer=optimizer, **tell)
    for step in (0, 7):
        tracker(step, force=True)
        next(model.parameters()).data.mul_(1.5)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    read = {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
    assert {tag: list(values) for tag, values in read.items()} == {tag: list(v) for tag, v in recorder.found.items()}
    assert all(read[tag] == pytest.approx(values, rel=1e-6) for tag, values in recorder.found.items())

    last = tracker.trajectory.snapshots[-1]
    found = {tag.removeprefix("hessian/"): values[7] for tag, values in recorder.found.items()}
    assert list(recorder.found["hessian/alignment"]) == [7]  # there is nothing to be aligned with at first
    assert found["loss"] == last.value and found["stability_limit"] == 8 and found["learning_rate"] == 0.25
    assert found["sharpness"] == last.sharpness and found["trace"] == last.trace.value
    assert found["smallest_eigenvalue"] == last.eigenvalues.smallest[-1] < 0
    assert found["r/2"] == last.off_diagonal_ratio("2")
    energies = {part: last.layer_energies(part).values for part in ("H", "G", "R")}
    for part, values in energies.items():
        between = [found[f"energy/{part}/{pair}"] for pair in ("0-0", "0-2", "2-2")]
        assert between == [values[0, 0], values[0, 1], values[1, 1]]
    H = energies["H"]
    assert found["cross_layer_share"] == pytest.approx(2 * H[0, 1] / H.sum(), rel=1e-6)
    names = {"gradient_norm", "mean_squared_residual", "accuracy", "sharpness_times_learning_rate", "gradient_share"}
    assert {*names, "heterogeneity", "diagonality", "r/0"} <= set(found)
    assert len(found) == 14 + 3 + 1 + 9 - 1 and all(math.isfinite(value) for value in found.values())


def test_what_was_not_measured_has_no_curve():
    recorder = Recorder()
    tracker_of(network(), at=1, measures=["trace"], on_snapshot=tensorboard(recorder))(0)
    names = {"loss", "gradient_norm", "mean_squared_residual", "accuracy", "trace"}
    assert set(recorder.found) == {f"hessian/{name}" for name in names}


@pytest.mark.parametrize(("layers", "pairs"), [(LAYERS_IN_PAIRS, True), (LAYERS_IN_PAIRS + 1, False)])
def test_many_layers_have_no_curves_of_pairs(layers, pairs):
    recorder = Recorder()
    torch.manual_seed(0)
    model = sequential_mlp((4, *[2] * (layers - 1), 3), nn.Tanh, bias=False)
    tracker_of(model, at=1, measures=["energies"], on_snapshot=tensorboard(recorder))(0)
    assert sum("/energy/H/" in tag for tag in recorder.found) == (layers * (layers + 1) // 2 if pairs else 0)
    assert sum("/r/" in tag for tag in recorder.found) == layers


def test_something_else_than_a_writer():
    with pytest.raises(InputError, match=r"^writer must be a SummaryWriter or a folder, got int$"):
        tensorboard(3)


# --- not installed ----------------------------------------------------------------------------------------------------

ADAPTERS = {
    "lightning": (lightning_callback, "lightning_callback needs lightning: pip install 'hesscope[lightning]'"),
    "transformers": (
        hugging_face_callback,
        "hugging_face_callback needs transformers: pip install 'hesscope[transformers]'",
    ),
    "tensorboard": (tensorboard, "tensorboard needs tensorboard: pip install 'hesscope[tensorboard]'"),
}


@pytest.mark.parametrize("library", ADAPTERS)
def test_the_library_is_missing(library, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == library else find(name))
    adapter, words = ADAPTERS[library]
    with pytest.raises(InputError) as error:
        adapter("runs")
    assert str(error.value) == words
