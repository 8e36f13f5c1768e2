"""Presets of training with a Tracker: what [D] says of them, theory beside them, kills in between, bad input."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from hesscope.core.errors import InputError, TooLargeError
from hesscope.data import clusters, gaussian
from hesscope.dynamics import Energies
from hesscope.operators import GaussNewton, Hessian
from hesscope.operators.closed_form import layer_weights, output_layer_energies
from hesscope.study import dynamics, presets
from hesscope.study.dynamics import DynamicsRun, choose_dynamics, dynamics_results, run_dynamics
from hesscope.study.presets import CLUSTERS_RATES, GAUSSIAN_RATES, PRESETS, four_layer_experiment, hidden_experiment
from hesscope.theory import static_force


def quiet(title, share):
    assert 0 <= share <= 1


def small(name, data, rates, inputs):
    """A preset with fewer inputs and nothing but energies."""

    def make(options):
        return replace(hidden_experiment(options, data, rates, inputs), measures=(Energies(),))

    return replace(PRESETS[name], make=make)


SMALL_CLUSTERS = small("clusters", clusters, CLUSTERS_RATES, inputs=60)
SMALL_GAUSSIAN = small("gaussian", gaussian, GAUSSIAN_RATES, inputs=60)


def ends(folder, **options):
    """The first and the last snapshot of a small run on clustered data."""
    given = {"samples": 500, "snapshots": 2, **options}
    run = DynamicsRun(SMALL_CLUSTERS, SMALL_CLUSTERS.options(**given), folder)
    run_dynamics(run, quiet)
    first, last = run.tracker.trajectory.snapshots
    assert (first.step, last.step) == (0, run.options.steps)
    return first, last


# --- what training does -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [10, 50])
@pytest.mark.parametrize("seed", [0, 1])
def test_training_with_cross_entropy_erases_the_cross_layer_residual(tmp_path, classes, seed):
    first, last = ends(tmp_path, classes=classes, seed=seed)
    assert last.accuracy == 1
    assert first.cross_layer_share() > 0.9
    assert first.cross_layer_share() >= 4 * last.cross_layer_share()
    assert first.residual_share("fc1", "fc2") > 0.99
    assert first.residual_share("fc1", "fc2") >= 10 * last.residual_share("fc1", "fc2")


@pytest.mark.parametrize("classes", [10, 50])
def test_under_squared_error_the_gauss_newton_part_stays(tmp_path, classes):
    first, last = ends(tmp_path, classes=classes, loss="mse")
    energy = [s.layer_energies("G").values[0, 1] for s in (first, last)]
    assert energy[1] > 0.5 * energy[0]
    assert last.block_energies("H").off_diagonal_ratio([f"fc2.weight[{c}]" for c in range(classes)]) < 1e-24


# --- initialization ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_gaussian_networks_begin_as_theory_predicts(loss):
    classes, inputs, samples, networks = 10, 60, 120, 40
    energies = []  # of every network: mean off-diagonal, mean diagonal energy, of the hidden and of the output layer
    for seed in range(networks):
        options = PRESETS["gaussian"].options(loss=loss, classes=classes, samples=samples, seed=seed)
        objective = hidden_experiment(options, gaussian, GAUSSIAN_RATES, inputs).objective
        hidden = layer_weights(objective, "fc1").energies()
        m, trace = len(hidden), np.trace(hidden)
        own = [(hidden.sum() - trace) / (m * (m - 1)), trace / m]
        if loss == "cross_entropy":
            features = layer_weights(objective, "fc2", neurons=[0]).inputs
            head = output_layer_energies(features, weight=objective.model.get_parameter("fc2.weight"))
            own += [head.off_diagonal / (classes * (classes - 1)), head.diagonal / classes]
        energies.append(own)
    force = static_force("one_hidden", loss, classes, width=8, inputs=inputs, samples=samples, rtol=0.01)
    predicted = [(force.hidden_ratio, force.hidden_stderr), (force.output_ratio, force.output_stderr)]
    energies = np.asarray(energies)
    for layer in range(energies.shape[1] // 2):
        off, diagonal = energies[:, 2 * layer : 2 * layer + 2].T
        ratio = off.mean() / diagonal.mean()
        error = np.std(off / diagonal.mean() - ratio * diagonal / diagonal.mean(), ddof=1) / networks**0.5
        expected, stderr = predicted[layer]
        assert error < 0.1 * ratio
        assert abs(ratio - expected) < 4 * np.hypot(error, stderr)


def test_four_layers_begin_with_stripes_between_neighbours_and_dense_blocks_between_others():
    """[D]: with ReLU the residual part of two neighbouring layers fills one column per block, and no other entry.

    H has these stripes on top of G; and between layers that are no neighbours R is spread over all columns.
    """
    side = 16
    options = PRESETS["four-layer"].options(samples=300)
    objective = four_layer_experiment(options, GAUSSIAN_RATES, side).objective
    H = Hessian(objective)
    R = (H - GaussNewton(objective)).dense().reshape(4, side, side, 4, side, side)  # layer, row, column, twice
    whole = H.dense().reshape(R.shape)
    for first in range(4):
        for second in range(first + 1, 4):
            # Row i of the first layer is the neuron i, whose weights in the next one are the column i.
            of_R, of_H = (_stripes(matrix[first, :, :, second]) for matrix in (R, whole))
            if second == first + 1:
                assert of_R == pytest.approx(1, abs=1e-12)
                assert of_H > 6 / side
            else:
                assert of_R < 3 / side
    assert R[0, :, :, 0].square().sum() < 1e-24 * whole[0, :, :, 0].square().sum()


def _stripes(block):
    """Share of the energy of a block [row, column, row, column] in columns that are the first layer's row."""
    energy = block.square().sum(dim=(1, 2))  # [row of the first layer, column of the second]
    return float(energy.diagonal().sum() / energy.sum())


# --- runs -------------------------------------------------------------------------------------------------------------


class KilledError(Exception):
    pass


def test_a_run_that_is_killed_twice_equals_an_undisturbed_one(tmp_path):
    options = SMALL_CLUSTERS.options(classes=3, samples=40, steps=20, snapshots=5)
    whole = DynamicsRun(SMALL_CLUSTERS, options, tmp_path / "whole")
    assert run_dynamics(whole, quiet) == 0
    steps = list(whole.at)
    left = []
    for kill_at in (("measuring", steps[2]), ("training", steps[3] + 2), None):
        run = DynamicsRun(SMALL_CLUSTERS, options, tmp_path / "killed")
        trained = []

        def loss_at(step, own=run.experiment.loss_at, trained=trained, kill_at=kill_at):
            trained.append(step)
            if kill_at == ("training", step):
                raise KilledError
            return own(step)

        def report(title, share, kill_at=kill_at):
            if kill_at is not None and title == f"{kill_at[0]} at step {kill_at[1]}":
                raise KilledError

        run.__dict__["experiment"] = replace(run.experiment, loss_at=loss_at)
        if kill_at is None:
            found = run_dynamics(run, report)
        else:
            with pytest.raises(KilledError):
                run_dynamics(run, report)
        left.append((trained[0] if trained else None, len(run.tracker.trajectory)))
    # Killed before the third snapshot, and after the fourth: from the last checkpoint on, nothing is measured again.
    assert left == [(0, 2), (steps[2], 4), (steps[3], 5)]
    assert found == 4
    for one, other in zip(whole.tracker.trajectory.snapshots, run.tracker.trajectory.snapshots, strict=True):
        assert (one.step, one.value) == (other.step, other.value)
        for part in "HGR":
            np.testing.assert_array_equal(one.block_energies(part).values, other.block_energies(part).values)
    for one, other in zip(whole.experiment.model.parameters(), run.experiment.model.parameters(), strict=True):
        assert torch.equal(one, other)
    again = DynamicsRun(SMALL_CLUSTERS, options, tmp_path / "killed")
    again.__dict__["experiment"] = replace(again.experiment, loss_at=None)  # a finished run is not repeated
    assert run_dynamics(again, quiet) == 5
    trajectory, force = dynamics_results(again)
    assert (trajectory.steps.tolist(), force.steps.tolist()) == (steps, [[0, 20]])


def test_a_checkpoint_that_cannot_be_read_is_named(tmp_path):
    options = SMALL_CLUSTERS.options(classes=3, samples=40, steps=2, snapshots=2)
    run = DynamicsRun(SMALL_CLUSTERS, options, tmp_path)
    (tmp_path / dynamics.CHECKPOINT).write_bytes(b"no checkpoint")
    with pytest.raises(InputError, match=r"cannot take up .*checkpoint.pt .*delete it"):
        run_dynamics(run, quiet)


def test_an_epoch_of_digits_has_every_sample_once_in_an_order_of_its_own():
    preset = PRESETS["digits"]
    seen = []

    def made():
        experiment = preset.make(preset.options(samples=200))
        experiment.model.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
        return experiment

    experiment = made()
    batches = -(-200 // presets.DIGITS_BATCH)
    for step in range(2 * batches):
        experiment.loss_at(step)
    epochs = [torch.cat(seen[:batches]), torch.cat(seen[batches : 2 * batches])]
    everything = inputs_of(experiment)
    for epoch in epochs:
        assert torch.equal(epoch[_order(epoch)], everything[_order(everything)])
    assert not torch.equal(*epochs)
    # A run can be taken up at any step.
    assert torch.equal(made().loss_at(batches + 1), experiment.loss_at(batches + 1))


def inputs_of(experiment):
    """The inputs that the Hessian is of."""
    with experiment.objective.evaluating() as (_, batches):
        return torch.cat([batch[0] for _, batch in batches])


def _order(rows):
    return np.lexsort(rows.T.numpy())


def test_the_gpt_is_cut_by_head_row_or_token():
    pytest.importorskip("transformers")
    preset = PRESETS["gpt"]
    experiment = preset.make(preset.options(partition="token", samples=2))
    assert experiment.objective.parameters.size == 9152
    sizes = dict(zip(experiment.partition.labels, experiment.partition.sizes, strict=True))
    assert sizes["transformer.wte.weight[127]"] == presets.GPT_WIDTH
    assert sum(label.startswith("transformer.wte") for label in sizes) == presets.CHARACTERS
    assert "layer" in experiment.partition.levels
    heads = presets._gpt_partition(experiment.model, "head")
    assert sum("query, head" in label and "weight" in label for label in heads.labels) == 4
    assert len(presets._gpt_partition(experiment.model, "row")) == 466
    assert experiment.loss_at(3).item() == experiment.loss_at(3).item() != experiment.loss_at(4).item()
    assert 4 < experiment.loss_at(0).item() < 6  # about log(128)


# --- bad input --------------------------------------------------------------------------------------------------------

BAD = [
    ("cluster", {}, "no preset is named 'cluster', did you mean 'clusters'\\?; there are gaussian, clusters, "),
    ("clusters", {"classes": 1}, "--classes must be at least 2, got 1"),
    ("clusters", {"loss": "cross-entropy"}, "--loss must be one of .*did you mean 'cross_entropy'"),
    ("clusters", {"optimizer": "adm"}, "--optimizer must be one of 'adam', 'sgd'"),
    ("clusters", {"partition": "row"}, "preset 'clusters' does not take --partition; it takes --steps, --snapshots, "),
    ("clusters", {"snapshots": 1}, "--snapshots must be at least 2"),
    ("clusters", {"steps": 0}, "--steps must be a positive integer, got 0"),
    ("digits", {"classes": 10}, "preset 'digits' does not take --classes"),
    ("digits", {"samples": 2000}, "--samples must be at most 1797"),
    (
        "gpt",
        {"loss": "mse"},
        "preset 'gpt' does not take --loss; it takes --steps, .*, --seed, --partition, --budget, --out$",
    ),
    ("gpt", {"partition": "rows"}, "--partition must be one of 'head', 'row', 'token', got 'rows', did you mean 'row'"),
]


@pytest.mark.parametrize(("name", "given", "words"), BAD)
def test_what_does_not_fit_is_refused(tmp_path, name, given, words):
    with pytest.raises(InputError, match=words):
        choose_dynamics(name, given, folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_with_another_run_is_refused(tmp_path):
    options = SMALL_CLUSTERS.options(classes=3, samples=40, steps=2, snapshots=2)
    run_dynamics(DynamicsRun(SMALL_CLUSTERS, options, tmp_path), quiet)
    words = "holds another run: there loss = cross_entropy, optimizer = adam; here loss = mse, optimizer = sgd"
    other = {"classes": 3, "samples": 40, "steps": 2, "snapshots": 2, "loss": "mse", "optimizer": "sgd"}
    with pytest.raises(InputError, match=words):
        choose_dynamics("clusters", other, folder=tmp_path)
    with pytest.raises(InputError, match="--budget must be a share"):
        choose_dynamics("clusters", {}, budget=1.5, folder=tmp_path / "new")


def test_the_full_network_is_refused_where_it_takes_hours(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(presets, "multiply_adds_per_second", lambda device: 5e10)
    # 2 x 8 snapshots x 4 probes x 2000 rows = 128,000 products of 7 x 10^6 x 5000 multiply-adds: 4.48e15, and 1.5e13.
    with pytest.raises(TooLargeError, match=r"1,000,000 parameters, 8 snapshots.* about 25 hours on this cpu"):
        choose_dynamics("four-layer-full", {}, folder=tmp_path)
    few = choose_dynamics("four-layer-full", {"samples": 20, "snapshots": 2}, folder=tmp_path)
    assert few.experiment.objective.parameters.size == 10**6
    assert [type(asked) for asked in few.experiment.measures] == [Energies]


def test_runs_are_named_after_their_choices():
    labels = {name: preset.label(preset.defaults) for name, preset in PRESETS.items()}
    assert labels["clusters"] == "clusters-cross_entropy-adam-C10"
    assert labels["four-layer"] == "four-layer-cross_entropy-adam"
    assert labels["gpt"] == "gpt-head"
    assert PRESETS["clusters"].options(classes=None, loss="mse").classes == 10
