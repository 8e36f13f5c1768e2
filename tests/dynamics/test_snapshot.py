"""Snapshots: energies by MATH.md, section 2, at every step; what is read from them; to a file and back."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace

import numpy as np
import pytest
import torch

import hesscope as hs
from hesscope.dynamics import Eigenvalues, Energies, Heatmap, Tracker, log_spaced, open_trajectory
from hesscope.dynamics.trajectory import load_snapshot, save_snapshot
from tests.dynamics.runs import Run

EVERYTHING = (
    "energies",
    Eigenvalues(k=3, smallest=2, rtol=1e-8),
    "trace",
    "density",
    "heterogeneity",
    Heatmap(pixels=15),
)


def by_hand(W, V, x, y, loss, activation):
    """G and R of one hidden layer as dense matrices in the order (W, V), sample by sample (MATH.md, section 2)."""
    (m, d), C, N = W.shape, V.shape[0], len(x)
    G, R = np.zeros((2, m * d + C * m, m * d + C * m))
    for n in range(N):
        z = W @ x[n]
        if activation == "relu":
            h, slope, bend = np.maximum(z, 0), (z > 0).astype(float), np.zeros(m)
        else:
            h = np.tanh(z)
            slope, bend = 1 - h**2, -2 * h * (1 - h**2)
        o = V @ h
        if loss == "cross_entropy":
            p = np.exp(o - o.max())
            p /= p.sum()
            A, e = np.diag(p) - np.outer(p, p), p - np.eye(C)[y[n]]
        else:
            A, e = 2 / C * np.eye(C), 2 / C * (o - y[n])
        xx, hh = np.outer(x[n], x[n]), np.outer(h, h)
        for i in range(m):
            rows = slice(i * d, (i + 1) * d)
            for j in range(m):
                G[rows, j * d : (j + 1) * d] += (V.T @ A @ V)[i, j] * slope[i] * slope[j] * xx
            R[rows, rows] += (V.T @ e)[i] * bend[i] * xx
            for a in range(C):
                columns = slice(m * d + a * m, m * d + (a + 1) * m)
                G[rows, columns] += slope[i] * (A @ V)[a, i] * np.outer(x[n], h)
                R[rows, columns] += slope[i] * e[a] * np.outer(x[n], np.eye(m)[i])
        for a in range(C):
            for b in range(C):
                G[m * d + a * m : m * d + (a + 1) * m, m * d + b * m : m * d + (b + 1) * m] += A[a, b] * hh
    hidden = slice(0, m * d)
    for matrix in (G, R):
        matrix[m * d :, hidden] = matrix[hidden, m * d :].T
    return G / N, R / N


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_energies_are_those_of_the_formulas_at_every_step(loss, activation):
    run = Run(loss, activation)
    tracker = Tracker(run.objective, at=log_spaced(60, 7), measures=["energies"])
    run.train(tracker, 60)
    trajectory = tracker.finish()
    assert list(trajectory.steps) == list(log_spaced(60, 7))
    x, y = (tensor.numpy() for tensor in run.batch)
    rows = [6] * 4 + [4] * 5
    edges = np.concatenate([[0], np.cumsum(rows)[:-1]])
    for snapshot in trajectory.snapshots:
        G, R = by_hand(*(weight.numpy() for weight in run.weights[snapshot.step]), x, y, loss, activation)
        for part, matrix in {"H": G + R, "G": G, "R": R}.items():
            expected = np.add.reduceat(np.add.reduceat(matrix**2, edges, axis=0), edges, axis=1)
            found = snapshot.block_energies(part).values
            # Relative to the energy of a whole layer pair, so that none hides behind a larger one.
            for first in (slice(0, 4), slice(4, 9)):
                for second in (slice(0, 4), slice(4, 9)):
                    size = expected[first, second].sum()
                    assert np.abs(found[first, second] - expected[first, second]).max() <= 1e-9 * size
            layers = snapshot.layer_energies(part)
            assert layers.labels == ("fc1", "fc2")
            assert np.allclose(layers.values[0, 1], (matrix[:24, 24:] ** 2).sum(), rtol=1e-9)
        whole = G + R
        off = 2 * (whole[:24, 24:] ** 2).sum()
        assert np.isclose(snapshot.cross_layer_share(), off / (whole**2).sum(), rtol=1e-9)
        shares = (G[:24, 24:] ** 2).sum(), (R[:24, 24:] ** 2).sum()
        assert np.isclose(snapshot.residual_share("fc1", "fc2"), shares[1] / sum(shares), rtol=1e-9)
        blocks = [[(whole[6 * i : 6 * i + 6, 6 * j : 6 * j + 6] ** 2).sum() for j in range(4)] for i in range(4)]
        on = np.trace(blocks)
        assert np.isclose(snapshot.off_diagonal_ratio("fc1"), (np.sum(blocks) - on) / 12 / (on / 4), rtol=1e-9)
        assert np.isclose(snapshot.layer_diagonality("fc1"), on / np.sum(blocks), rtol=1e-9)


def test_all_other_measures_against_the_dense_matrix():
    run = Run(N=60)
    seen = {}

    def look(step):
        if tracker(step) is not None:
            seen[step] = hs.Hessian(run.objective).dense(), run.objective.gradient(), run.objective.value()

    tracker = Tracker(run.objective, at=[0, 3, 20, 60], measures=EVERYTHING, optimizer=run.optimizer)
    run.train(look, 60)
    before = None
    for snapshot in tracker.finish().snapshots:
        H, gradient, value = seen[snapshot.step]
        values, vectors = torch.linalg.eigh(H)
        values, V = values.numpy(), vectors[:, -3:]
        ends = snapshot.eigenvalues
        assert np.allclose(ends.largest, values[::-1][:3], rtol=1e-7)
        assert np.allclose(ends.smallest, values[1::-1], rtol=1e-7, atol=1e-9 * values[-1])
        assert ends.converged and (ends.largest_residuals <= 1e-6 * values[-1]).all()
        share = float((V.T @ gradient).square().sum() / gradient.square().sum())
        assert np.isclose(ends.gradient_share, share, rtol=1e-6)
        if before is None:
            assert np.isnan(ends.alignment) and ends.aligned_with == -1
        else:
            assert np.isclose(ends.alignment, float((before[1].T @ V).square().sum() / 3), rtol=1e-6)
            assert ends.aligned_with == before[0]
        before = snapshot.step, V
        assert snapshot.value == pytest.approx(value, rel=1e-12)
        assert snapshot.gradient_norm == pytest.approx(float(gradient.norm()), rel=1e-10)
        assert snapshot.sharpness == ends.largest[0]
        assert snapshot.sharpness_times_learning_rate == pytest.approx(0.05 * ends.largest[0])
        trace = snapshot.trace
        assert abs(trace.value - float(H.trace())) <= 4 * trace.stderr + 1e-9 * abs(trace.value)
        for record in (trace, snapshot.density, snapshot.heterogeneity):
            assert record.provenance.data_fingerprint == run.objective.data_fingerprint
        density = snapshot.density  # four probes of 40 steps: eigenvalues themselves are exact, weights are not
        assert density.eigenvalue_range == pytest.approx((values[0], values[-1]), rel=1e-6)
        spectra = hs.block_spectra(H, hs.Partition.by_row(run.model))
        assert snapshot.heterogeneity.value == pytest.approx(spectra.heterogeneity, rel=1e-6)
        picture = snapshot.heatmap
        assert picture.values.shape == (15, 15) and picture.parameters == 44
        assert picture.values[0, 14] == pytest.approx(float(H[:3, 42:].square().mean().sqrt()), rel=1e-5)
        assert picture.values[3, 2] == pytest.approx(float(H[9:12, 6:9].square().mean().sqrt()), rel=1e-5)
        assert (picture.tensors, picture.sizes) == (("fc1.weight", "fc2.weight"), (24, 20))


def test_residual_and_accuracy():
    run = Run(N=60)
    tracker = Tracker(run.objective, at=[0, 40], measures=[])
    run.train(tracker, 40)
    for snapshot in tracker.finish().snapshots:
        W, V = run.weights[snapshot.step]
        o = torch.relu(run.batch[0] @ W.T) @ V.T
        e = torch.softmax(o, 1) - torch.nn.functional.one_hot(run.batch[1], 5)
        assert snapshot.mean_squared_residual == pytest.approx(float(e.square().sum(dim=1).mean()), rel=1e-12)
        assert snapshot.accuracy == pytest.approx(float((o.argmax(1) == run.batch[1]).double().mean()), rel=1e-12)
        assert snapshot.energies is None and np.isnan(snapshot.sharpness)


def test_accuracy_of_tokens_one_hot_targets_and_what_has_none():
    x, y = (
        torch.randn(4, 7, 3, generator=torch.Generator().manual_seed(0)),
        torch.tensor([[0, 1, 2, 3, -100, 1, 1]] * 4),
    )
    model = torch.nn.Linear(3, 5)
    right = (model(x).argmax(2) == y) & (y != -100)

    def accuracy(loss, data):
        return Tracker(hs.Objective(model, loss, data), at=[0], measures=[])(0).accuracy

    # In two batches of unequal numbers of tokens that count: the mean is over tokens, not over batches.
    batches = [(x[:1], y[:1]), (x[1:], y[1:])]
    assert accuracy("cross_entropy", batches) == pytest.approx(float(right.sum() / 24))
    flat, labels = x.flatten(0, 1), y.flatten().clamp(min=0)
    one_hot = torch.nn.functional.one_hot(labels, 5).float()
    expected = float((model(flat).argmax(1) == labels).double().mean())
    assert accuracy("mse", (flat, one_hot)) == pytest.approx(expected)
    assert np.isnan(accuracy("mse", (flat, one_hot * 0.9)))
    assert np.isnan(accuracy(lambda m, batch: (m(batch[0]).square().sum(), 28), [(flat,)]))


def test_energies_of_a_loss_callable_and_of_the_dual_form():
    run = Run()
    callable_loss = hs.Objective(
        run.model,
        lambda model, batch: (torch.nn.functional.cross_entropy(model(batch[0]), batch[1]) * 40, 40),
        [run.batch],
    )
    alone = Tracker(callable_loss, hs.Partition.by_row(run.model), at=[0], measures=["energies"])(0)
    whole = Tracker(run.objective, hs.Partition.by_row(run.model), at=[0], measures=["energies"])(0)
    assert alone.parts == ("H",)
    assert np.allclose(alone.block_energies().values, whole.block_energies().values, rtol=1e-8, atol=1e-14)
    with pytest.raises(hs.HesscopeError, match="step 0 has no energies of 'G'; it has H"):
        alone.residual_share("fc1", "fc2")
    dual = Tracker(run.objective, hs.Partition.by_row(run.model), at=[0], measures=[Energies(method="dual")])(0)
    assert dual.parts == ("G",)
    assert np.allclose(dual.block_energies("G").values, whole.block_energies("G").values, rtol=1e-9)
    with pytest.raises(hs.HesscopeError, match="method 'dual' are of the Gauss-Newton matrix, which a loss callable"):
        Tracker(callable_loss, at=[0], measures=[Energies(method="dual")])


def same(first, second):
    """Whether two records hold the same numbers, field by field."""
    if is_dataclass(first):
        return type(first) is type(second) and all(
            same(getattr(first, field.name), getattr(second, field.name)) for field in fields(first)
        )
    if isinstance(first, dict):
        return list(first) == list(second) and all(same(first[key], second[key]) for key in first)
    if isinstance(first, np.ndarray):
        return first.dtype == second.dtype and np.array_equal(first, second, equal_nan=first.dtype.kind == "f")
    return first == second or (first != first and second != second)


def test_a_file_holds_everything(tmp_path):
    run = Run()
    tracker = Tracker(run.objective, at=[0, 8], measures=EVERYTHING, optimizer=run.optimizer)
    run.train(tracker, 8)
    for snapshot in tracker.trajectory.snapshots:
        save_snapshot(tmp_path, snapshot)
        again = load_snapshot(tmp_path, snapshot.step)
        assert same(again, snapshot)
        assert not same(replace(again, accuracy=0.123), snapshot)
    sampled = Tracker(run.objective, at=[0], measures=[Energies(method="probes", probes=5)])(0)
    save_snapshot(tmp_path, sampled)
    assert same(load_snapshot(tmp_path, 0), sampled)


def test_the_table_over_steps(tmp_path):
    run = Run()
    tracker = Tracker(run.objective, at=[0, 5, 30], folder=tmp_path)
    run.train(tracker, 30)
    trajectory = open_trajectory(tmp_path)
    table = trajectory.to_xarray()
    last = trajectory.snapshots[-1]
    assert list(table["step"]) == [0, 5, 30]
    energy = table["layer_energy"].sel(step=30, part="R", layer="fc1", layer_="fc2")
    assert float(energy) == last.layer_energies("R").values[0, 1] > 0
    assert float(table["off_diagonal_ratio"].sel(step=30, part="G", layer="fc2")) == last.off_diagonal_ratio("fc2", "G")
    assert float(table["largest"].sel(step=30)[0]) == last.sharpness
    assert list(table["value"]) == [snapshot.value for snapshot in trajectory.snapshots]


@pytest.mark.parametrize("scale", [1e14, 1.0, 1e-14])
def test_measures_have_no_scale_of_their_own(scale):
    """In float32, whose squares overflow and vanish; a linear model under squared error, scaled by its inputs."""
    x, y = torch.randn(20, 4, generator=torch.Generator().manual_seed(0)), torch.zeros(20, 2)

    def measured(factor):
        model = torch.nn.Linear(4, 2, bias=False)
        with torch.no_grad():
            model.weight.copy_(torch.arange(8.0).view(2, 4))
        objective = hs.Objective(model, "mse", (x * factor, y))
        return Tracker(objective, at=[0], measures=["energies", Eigenvalues(k=4), "heatmap"])(0)

    one, scaled = measured(1.0), measured(scale)
    assert scaled.gradient_norm == pytest.approx(one.gradient_norm * scale**2, rel=1e-4)
    assert scaled.eigenvalues.gradient_share == pytest.approx(one.eigenvalues.gradient_share, rel=1e-3)
    assert scaled.sharpness == pytest.approx(one.sharpness * scale**2, rel=1e-4)
    assert np.allclose(scaled.heatmap.values, one.heatmap.values * scale**2, rtol=1e-4, atol=0)


def test_one_matrix_for_all_measures_is_the_matrix_of_each():
    """Networks without a closed form: alone, energies come from columns; with others, from the whole matrix."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(20, 5, generator=generator).double(), torch.arange(20) % 3
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 3)).double()
    for loss, parts in (("cross_entropy", ("H", "G", "R")), (summed_cross_entropy, ("H",))):
        objective = hs.Objective(model, loss, [(x, y)])
        rows = hs.Partition.by_row(model)
        alone = Tracker(objective, rows, at=[0], measures=["energies"])(0)
        together = Tracker(objective, rows, at=[0], measures=["energies", "heatmap", "trace"])(0)
        assert alone.parts == together.parts == parts
        for part in parts:
            ours, expected = together.block_energies(part).values, alone.block_energies(part).values
            assert np.allclose(ours, expected, rtol=1e-8, atol=1e-14 * expected.max())
        assert together.trace.value == pytest.approx(float(hs.Hessian(objective).dense().trace()), rel=1e-8)


def summed_cross_entropy(model, batch):
    return torch.nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="sum"), len(batch[1])


def test_unknown_layers_are_named():
    snapshot = Tracker(Run().objective, at=[0], measures=["energies"])(0)
    assert snapshot.diagonality() == snapshot.block_energies().diagonality
    with pytest.raises(hs.HesscopeError, match="no layer is named 'fc3'; the layers are fc1, fc2"):
        snapshot.residual_share("fc1", "fc3")
    with pytest.raises(hs.HesscopeError, match="no layer is named 'fc3'; the layers are fc1, fc2"):
        snapshot.off_diagonal_ratio("fc3")
