"""Dynamic force: known exponents and their intervals, known static parts, thresholds, and a network that is trained."""

import dataclasses

import numpy as np
import pytest
import torch

import hesscope as hs
from hesscope.core.records import Provenance
from hesscope.dynamics.dynamic_force import DynamicForce, dynamic_force
from hesscope.dynamics.exponents import fit_power_law
from hesscope.dynamics.force_parts import force_parts
from hesscope.dynamics.passing import passing
from hesscope.dynamics.snapshot import Snapshot
from hesscope.dynamics.trajectory import Trajectory
from hesscope.estimate.column_samples import ColumnSamples
from hesscope.estimate.energies import BlockEnergies, SplitEnergies
from hesscope.estimate.split import split_energies
from tests.helpers import F64, check_stderr, randn

PROVENANCE = Provenance(engine="made up", dtype="float64", device="cpu", data_fingerprint="abc", seed=3)
LAYERS = ("a", "a", "b", "b")


def energies_of(values, labels="wxyz", size=5):
    values = np.asarray(values, dtype=float)
    return BlockEnergies.exact(tuple(labels), (size,) * len(values), values, PROVENANCE)


def snapshot(step, parts, value=1.0, residual=1.0, layers=LAYERS, provenance=PROVENANCE):
    """A snapshot of these energies, and nothing else."""
    given = {"step": step, "value": value, "mean_squared_residual": residual, "layers": layers}
    given |= {"energies": SplitEnergies(parts), "provenance": provenance, "seconds": {}, "training_seconds": 1.0}
    given |= dict.fromkeys(("gradient_norm", "accuracy", "learning_rate", "stability_limit"), float("nan"))
    names = [field.name for field in dataclasses.fields(Snapshot)]
    return Snapshot(**{name: given.get(name) for name in names})


def power_law_run(G_exponent, R_exponent, scale=1.0, seed=0, scatter=0.0, points=20):
    """20 snapshots whose gap and residual fall, with G over the gap and R over the residual as told."""
    rng = np.random.default_rng(seed)
    time = np.linspace(0, 1, points)
    gap, residual = np.exp(-6 * time**2), 3 * np.exp(-4 * time)
    base = np.array([[4.0, 1, 0, 0], [1, 3, 0, 0], [0, 0, 5, 2], [0, 0, 2, 6]])
    cross = np.kron([[0, 1], [1, 0]], np.ones((2, 2)))
    noise = np.exp(scatter * rng.standard_normal(points))
    snapshots = []
    for step, (g, r, n) in enumerate(zip(gap, residual, noise, strict=True)):
        G, R = g**G_exponent * cross * n, 7 * r**R_exponent * cross * n
        parts = {"H": base + G + R, "G": base + G, "R": R}
        energies = {part: energies_of(scale * values) for part, values in parts.items()}
        snapshots.append(snapshot(step, energies, value=scale * (0.25 + g), residual=scale * r))
    return Trajectory(tuple(snapshots), {})


# --- exponents --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kx", "ky"), [(1, 3), (1e-14, 1e14), (1e14, 1e-14)])
def test_a_power_law_is_found_exactly(kx, ky):
    x = np.geomspace(1, 1e-5, 12)
    fit = fit_power_law([kx * x], [ky * x**1.7])
    assert (fit.exponent, fit.low, fit.high) == pytest.approx((1.7, 1.7, 1.7), rel=1e-12)
    assert (fit.used, fit.left_out) == (12, 0)


def test_every_run_has_a_constant_of_its_own():
    x = [np.geomspace(1, 0.1, 5), np.geomspace(50, 2, 7), np.geomspace(1, 1e-3, 6)]
    fit = fit_power_law(x, [k * each**-0.6 for k, each in zip((1, 1e3, 1e-5), x, strict=True)])
    assert (fit.exponent, fit.low, fit.high) == pytest.approx((-0.6, -0.6, -0.6), rel=1e-12)


def without(groups, x, y, run):
    """Slopes [1 + groups, R] of y [S, R], of all points and without each group, by fits with indicators of the runs."""
    slopes = []
    for kept in [groups >= 0] + [groups != g for g in range(groups.max() + 1)]:
        design = np.column_stack([x[kept], np.eye(run.max() + 1)[run[kept]]])
        slopes.append(np.linalg.lstsq(design, y[kept], rcond=None)[0][0])
    return np.array(slopes)


@pytest.mark.parametrize("runs", [1, 4])
def test_the_interval_is_the_jackknife_s(runs):
    """Against plain refits; the degrees of freedom against simulated variances, 2 (E v)^2 / Var v."""
    from scipy.stats import t

    rng = np.random.default_rng(1)
    sizes = (23,) if runs == 1 else (6, 9, 7, 12)
    x = [8 / (1 + np.exp(-8 * (np.linspace(0, 1, size) - 0.6))) for size in sizes]
    run = np.repeat(np.arange(runs), sizes)
    groups = np.arange(23) * 5 // 23 if runs == 1 else run
    count = groups.max() + 1

    y = rng.standard_normal((len(run), 20000))
    slopes = without(groups, np.concatenate(x), y, run)
    variances = (count - 1) / count * ((slopes[1:] - slopes[0]) ** 2).sum(axis=0)
    y, exponent, variance = y[:, 0], slopes[0, 0], variances[0]
    degrees = 2 * variances.mean() ** 2 / variances.var()
    fit = fit_power_law([np.exp(each) for each in x], np.split(np.exp(y), np.cumsum(sizes)[:-1]))
    assert fit.exponent == pytest.approx(exponent)
    assert (fit.low + fit.high) / 2 == pytest.approx(exponent)
    reach = t.ppf(0.975, np.array([0.95, 1.05]) * degrees) * np.sqrt(variance)  # wide at two degrees of freedom
    assert reach[1] < fit.high - exponent < reach[0]


def deviations(kind, points, time, rng):
    """Stationary, of unit variance, correlated over `time` points: rough (Ornstein-Uhlenbeck) or smooth."""
    if kind == "rough":
        u = np.empty(points)
        u[0] = rng.standard_normal()
        for n in range(1, points):
            u[n] = np.exp(-1 / time) * u[n - 1] + np.sqrt(1 - np.exp(-2 / time)) * rng.standard_normal()
        return u
    kernel = np.exp(-0.5 * (np.subtract.outer(np.arange(points), np.arange(-9 * time, points + 9 * time)) / time) ** 2)
    return kernel @ rng.standard_normal(kernel.shape[1]) / np.sqrt((kernel[0] ** 2).sum())


def ordinary_interval_covers(x, y):
    """Student's interval of ordinary least squares, for independent points."""
    from scipy.stats import linregress, t

    fit = linregress(x, y)
    return abs(fit.slope - 1.5) < t.ppf(0.975, len(x) - 2) * fit.stderr


@pytest.mark.parametrize("shape", ["even", "sigmoid"])
@pytest.mark.parametrize("kind", ["rough", "smooth"])
def test_intervals_of_one_run_cover_the_truth(kind, shape):
    """Power law plus deviations that go together over a tenth of the run, and grow along it."""
    rng, hits, ordinary = np.random.default_rng(2), 0, 0
    time = np.linspace(0, 1, 30)
    x = -8 * time if shape == "even" else -8 / (1 + np.exp(-8 * (time - 0.6)))
    for _ in range(600):
        y = 1.5 * x + 0.3 * (1 + 2 * time) * deviations(kind, 30, 3, rng)
        hits += fit_power_law([np.exp(x)], [np.exp(y)]).contains(1.5)
        ordinary += ordinary_interval_covers(x, y)
    assert 0.92 * 600 <= hits <= 0.99 * 600
    assert ordinary <= 0.8 * 600  # what the test is there to tell from


def test_intervals_over_runs_cover_the_truth():
    """Four runs whose exponents differ, as those of networks with other seeds do, with slow deviations in each."""
    rng, hits = np.random.default_rng(3), 0
    x = -8 / (1 + np.exp(-8 * (np.linspace(0, 1, 12) - 0.6)))
    for _ in range(1000):
        slopes = 1.5 + 0.1 * rng.standard_normal(4)
        logs = [slope * x + 0.3 * deviations("rough", 12, 3, rng) for slope in slopes]
        hits += fit_power_law([np.exp(x)] * 4, [np.exp(y) for y in logs]).contains(1.5)
    assert 0.93 * 1000 <= hits <= 0.97 * 1000


def test_points_without_a_logarithm_are_left_out_and_counted():
    x, y = np.geomspace(1, 1e-3, 14), np.geomspace(1, 1e-6, 14)
    x[3], y[7], y[9], y[13] = 0.0, -1e-9, np.nan, np.inf
    fit = fit_power_law([x], [y])
    assert (fit.used, fit.left_out) == (10, 4)
    assert fit.exponent == pytest.approx(2)
    y[0] = 0.0
    fewer = fit_power_law([x], [y])
    assert (fewer.used, fewer.left_out) == (9, 5)
    assert np.isnan([fewer.exponent, fewer.low, fewer.high]).all()


@pytest.mark.parametrize(
    "x", [[np.full(20, 0.3)], [np.r_[0.5, np.full(19, 0.3)]], [np.array([1, 0.5, 0.2])] * 2 + [np.array([1.0])], [[]]]
)
def test_no_slope_where_there_is_none(x):
    """All at one x, all but a segment at one x, a run of one point, no point."""
    assert np.isnan(fit_power_law(x, [np.ones(len(each)) for each in x]).exponent)


def test_exponents_of_a_trajectory():
    force = dynamic_force(power_law_run(1.3, 0.8), optimum=0.25)
    assert force.exponent("R", "residual").exponent == pytest.approx(0.8, rel=1e-9)
    assert force.exponent("G", "gap", "b", "a").exponent == pytest.approx(1.3, rel=1e-9)
    assert force.exponent("G", "gap").exponent == pytest.approx(1.3, rel=1e-9)
    R, G = 7 * np.array([3, 3 * np.exp(-4)]) ** 0.8, np.array([1, np.exp(-6)]) ** 1.3
    np.testing.assert_allclose(force.residual_share[0], np.column_stack([R / (G + R)] * 2))
    over_L = dynamic_force(power_law_run(1.3, 0.8)).exponent("G", "gap").exponent
    assert over_L > 2  # L without its optimum says something else


def test_everything_is_invariant_to_scale():
    plain, *scaled = (dynamic_force(power_law_run(1.3, 0.8, scale), 0.25 * scale) for scale in (1, 1e-14, 1e14))
    for force in scaled:
        for field in dataclasses.fields(DynamicForce):
            if isinstance(getattr(plain, field.name), np.ndarray):
                np.testing.assert_allclose(
                    getattr(force, field.name), getattr(plain, field.name), rtol=1e-7, atol=1e-12
                )


# --- static and dynamic part ------------------------------------------------------------------------------------------


def planted(beyond, rows=(0.1, 0.2, 0.3, 0.4)):
    """A share `beyond` of the energy is on the diagonal, the rest is spread as by chance: the rows do not change."""
    rows = np.asarray(rows)
    return beyond * np.diag(rows) + (1 - beyond) * np.outer(rows, rows)


def test_the_static_part_is_what_was_planted():
    first, last = planted(0.2), 1e14 * planted(0.8)
    parts = force_parts(energies_of(first), energies_of(last))
    assert parts.chance == pytest.approx(0.3)
    assert (parts.initial, parts.final) == pytest.approx((0.3 + 0.2 * 0.7, 0.3 + 0.8 * 0.7))
    assert parts.static == pytest.approx(0.25)
    assert parts.chance_similarity == pytest.approx(1)
    assert parts.similarity == pytest.approx((first * last).sum() / np.sqrt((first**2).sum() * (last**2).sum()))
    assert (parts.initial_stderr, parts.final_stderr, parts.static_stderr) == (0, 0, 0)


def test_chance_is_that_of_the_end():
    parts = force_parts(energies_of(planted(0.5, (0.25,) * 4)), energies_of(planted(0.5)))
    assert parts.chance == pytest.approx(0.3)
    assert parts.static == pytest.approx((0.25 + 0.5 * 0.75 - 0.3) / (0.5 * 0.7))
    assert parts.chance_similarity == pytest.approx(1 / (4 * 0.3))


def test_no_parts_without_structure_at_the_end():
    assert np.isnan(force_parts(energies_of(planted(0.5)), energies_of(planted(-0.1))).static)
    gone = force_parts(energies_of(planted(0.5)), energies_of(np.zeros((4, 4))))
    assert np.isnan([gone.static, gone.static_stderr, gone.similarity, gone.chance_similarity]).all()


def test_chance_is_that_of_compare_partitions():
    matrix = randn(12, 12, seed=0)
    matrix = matrix + matrix.T + torch.diag(torch.arange(12.0, dtype=F64))
    partition = hs.Partition.from_blocks({"p": range(3), "q": range(3, 8), "r": range(8, 12)})
    row = hs.compare_partitions(matrix, {"three": partition}, method="exact").rows["three"]
    energies = hs.block_energies(matrix, partition, method="exact")
    parts = force_parts(energies, energies)
    assert (parts.final, parts.chance) == pytest.approx((row.energy.value, row.chance.value))


def sampled(kind, truth, rng):
    """Energies [4, 4] from 24 noisy matrices, or from noisy columns, unequal numbers of each."""
    if kind == "matrices":
        noise = np.exp(rng.standard_normal((24, 4, 4)) - 0.5)
        samples = truth * (noise + noise.transpose(0, 2, 1)) / 2
        return BlockEnergies.from_samples("wxyz", (5,) * 4, samples, PROVENANCE)
    column = np.repeat(np.arange(4), (16, 20, 24, 28))
    # What is common to a column, as products with one vector have it, and what is each block's own.
    noise = 0.7 * (rng.standard_exponential((88, 1)) - 1) + 0.4 * (rng.standard_exponential((88, 4)) - 1)
    values = truth.T[column] * (1 + noise)
    columns = ColumnSamples(values, 1 / np.bincount(column)[column], column, column, mirrored=False)
    return BlockEnergies.from_columns("wxyz", (5,) * 4, columns, PROVENANCE)


@pytest.mark.parametrize("kind", ["matrices", "columns"])
def test_standard_errors_of_sampled_energies(kind):
    rng = np.random.default_rng(6)
    first, last = planted(0.5), planted(0.9)
    found = [force_parts(sampled(kind, first, rng), sampled(kind, last, rng)) for _ in range(600)]
    for name in ("initial", "final", "static"):
        estimates = np.array([getattr(parts, name) for parts in found])
        check_stderr(estimates, [getattr(parts, f"{name}_stderr") for parts in found])
    # Ratios of means are biased, by their variance.
    assert abs(estimates.mean() - 5 / 9) < 0.25 * estimates.std()


def test_the_static_part_s_error_is_first_order():
    """Small noise at the end: the spread of the static parts of single samples, chance's own included."""
    noise = np.random.default_rng(8).standard_normal((400, 4, 4))
    first, last = energies_of(planted(0.1)), planted(0.6)
    samples = last * (1 + 1e-4 * (noise + noise.transpose(0, 2, 1)))
    each = np.array([force_parts(first, energies_of(sample)).static for sample in samples])
    found = force_parts(first, BlockEnergies.from_samples("wxyz", (5,) * 4, samples, PROVENANCE))
    assert found.static_stderr == pytest.approx(each.std(ddof=1) / 20, rel=1e-2)


def test_chance_of_samples_is_not_that_of_their_noise():
    """The square of a noisy row would have the noise's square: here a bias of 40 standard errors."""
    rng = np.random.default_rng(4)
    truth = planted(0.5)
    chances = []
    for _ in range(400):
        noise = np.exp(rng.standard_normal((6, 4, 4)) - 0.5)
        energies = BlockEnergies.from_samples(
            "wxyz", (5,) * 4, truth * (noise + noise.transpose(0, 2, 1)) / 2, PROVENANCE
        )
        rows = energies.values.sum(axis=1)
        chances.append((force_parts(energies, energies).chance, (rows**2).sum() / rows.sum() ** 2))
    mean, naive = np.mean(chances, axis=0)
    error = np.std(chances, axis=0)[0] / 20
    assert abs(mean - 0.3) < 4 * error < abs(naive - 0.3)


def test_the_three_structures():
    """Of all blocks, of each layer's, of the layers: energies added up by hand."""
    first = np.array([[4.0, 1, 2, 0], [1, 3, 0, 2], [2, 0, 5, 1], [0, 2, 1, 6]])
    last = np.array([[9.0, 1, 0, 0], [1, 9, 1, 0], [0, 1, 4, 1], [0, 0, 1, 7]])
    run = Trajectory(tuple(snapshot(n, {"H": energies_of(E)}) for n, E in enumerate((first, last))), {})
    force = dynamic_force(run)
    assert force.quantities == ("all blocks", "within a", "within b", "between layers")
    np.testing.assert_allclose(
        force.diagonality[0], [[18 / 30, 7 / 9, 11 / 13, 22 / 30], [29 / 35, 0.9, 11 / 13, 33 / 35]]
    )
    chance = [(10**2 + 11**2 + 6**2 + 8**2) / 35**2, 0.5, (5**2 + 8**2) / 13**2, (21**2 + 14**2) / 35**2]
    np.testing.assert_allclose(force.chance[0], chance)
    D0, D1 = force.diagonality[0]
    np.testing.assert_allclose(force.static[0], (D0 - chance) / (D1 - chance))
    np.testing.assert_allclose(force.dynamic[0], (D1 - D0) / (D1 - chance))
    np.testing.assert_allclose(force.cross_layer_share[0], [8 / 30, 2 / 35])
    np.testing.assert_allclose(force.off_diagonal_ratio[0], [[2 / 7, 2 / 11], [1 / 9, 2 / 11]])
    assert np.isnan(force.residual_share).all()
    assert force.matrices == ("H",)


# --- thresholds -------------------------------------------------------------------------------------------------------


def test_when_thresholds_are_passed():
    steps = np.array([0, 1, 4, 9, 20])
    columns = {  # (first, the step before, to stay, the step before)
        (0.1, 0.2, 0.95, 0.9, 0.9): (4, 1, 4, 1),
        (0.1, 0.95, 0.3, 0.89, 0.92): (1, 0, 20, 9),
        (0.1, 0.95, 0.99, 0.99, 0.8): (1, 0, -1, -1),
        (0.9, 1.0, 0.9, 0.9, 0.9): (0, -1, 0, -1),
        (0.1, 0.2, 0.3, 0.4, 0.5): (-1, -1, -1, -1),
        (0.95, np.nan, 0.95, 0.95, 0.95): (0, -1, 4, 1),
    }
    found = passing(steps, np.array(list(columns)).T, 0.9)
    expected = np.array(list(columns.values())).T
    np.testing.assert_array_equal([found.first, found.first_after, found.stays, found.stays_after], expected)


def test_thresholds_of_a_trajectory():
    beyond = (0.0, 0.5, 0.95, 0.5, 0.95, 0.99)
    snapshots = [snapshot(10 * n, {"H": energies_of(planted(b))}) for n, b in enumerate(beyond)]
    force = dynamic_force(Trajectory(tuple(snapshots), {}), threshold=0.8)
    assert (force.first[0, 0], force.first_after[0, 0]) == (20, 10)
    assert (force.stays[0, 0], force.stays_after[0, 0]) == (40, 30)
    assert force.table()[0]["passes 0.8 at step"] == "40 (not yet 30, first 20)"


# --- several runs -----------------------------------------------------------------------------------------------------


def test_several_runs_are_averaged():
    runs = [power_law_run(1.3, exponent, seed=seed, scatter=0.1) for seed, exponent in enumerate((0.7, 0.8, 0.9, 0.75))]
    together = dynamic_force(runs, optimum=0.25)
    single = [dynamic_force(run, optimum=0.25) for run in runs]
    for name in ("diagonality", "static", "dynamic", "similarity", "off_diagonal_ratio", "residual_share", "chance"):
        each = np.stack([getattr(force, name)[0] for force in single])
        np.testing.assert_allclose(together.mean(name), each.mean(axis=0))
        np.testing.assert_allclose(together.stderr(name), each.std(axis=0, ddof=1) / 2)
    np.testing.assert_array_equal(together.stays, np.concatenate([force.stays for force in single]))
    fit = together.exponent("R", "residual")
    assert fit.low < 0.7875 < fit.high
    assert fit.high - fit.low > 0.1
    assert fit.used == 80


def test_the_record_survives_a_file(tmp_path):
    import xarray as xr

    for force in (dynamic_force(power_law_run(1.3, 0.8), 0.25), dynamic_force([power_law_run(1.3, 0.8)] * 2)):
        force.to_xarray().to_netcdf(tmp_path / "force.nc", engine="h5netcdf")
        with xr.open_dataset(tmp_path / "force.nc", engine="h5netcdf") as dataset:
            again = DynamicForce.from_xarray(dataset)
        for field in dataclasses.fields(DynamicForce):
            old, new = getattr(force, field.name), getattr(again, field.name)
            if isinstance(old, np.ndarray):
                assert old.dtype == new.dtype
            np.testing.assert_array_equal(new, old)
        assert again.table() == force.table()


def test_tables_read_well():
    force = dynamic_force([power_law_run(1.3, 0.8, seed=seed, scatter=0.1) for seed in range(3)], 0.25, threshold=0.5)
    rows = force.table()
    columns = ["quantity", "initialization", "end", "static", "dynamic", "passes 0.5 at step"]
    assert all(list(row) == columns for row in rows)
    assert {"diagonality", "diagonality within a", "share within layers", "cross-layer share"} <= {
        row["quantity"] for row in rows
    }
    assert "of 3 runs" in rows[0]["passes 0.5 at step"]
    assert "±" in rows[0]["static"]
    (pair,) = force.pair_table()
    assert pair["layers"] == "a × b"
    assert pair["R over squared residual"].startswith("0.8")


def test_tables_leave_out_what_has_no_value_and_name_numbered_layers():
    """Layer "0" has a block of another size, so no r; its number is called a layer, in the words alone."""
    labels, sizes = ("w", "x", "y", "z"), (5, 3, 5, 5)
    parts = [{"H": BlockEnergies.exact(labels, sizes, planted(beyond), PROVENANCE)} for beyond in (0.9, 0.1)]
    run = Trajectory(tuple(snapshot(n, part, layers=("0", "0", "b", "b")) for n, part in enumerate(parts)), {})
    force = dynamic_force(run)
    rows = {row["quantity"]: row for row in force.table()}
    ratios = [name for name in rows if name.startswith("off-diagonal ratio")]
    assert ratios == ["off-diagonal ratio of b"]
    assert {"diagonality within layer 0", "cosine with the initial energies, within layer 0"} <= set(rows)
    assert "residual share of it" not in rows
    assert not any(row["initialization"] == row["end"] == "–" for row in rows.values())
    assert force.table()[0]["dynamic"].startswith("−")
    assert [row["layers"] for row in force.pair_table()] == ["layer 0 × b"]
    assert (force.layers, force.pairs[0]) == (("0", "b"), "0 x b")


# --- networks ---------------------------------------------------------------------------------------------------------


def rescaled_residuals(x, weights):
    """Squared error of a fixed network with targets that leave the residuals weights * e, one snapshot for each."""
    model = hs.models.one_hidden(6, 4, 3, dtype=F64)
    outputs = model(x).detach()
    e = randn(3, seed=9)
    snapshots = []
    for step, weight in enumerate(weights):
        objective = hs.Objective(model, "mse", (x, outputs - weight[:, None] * e))
        residual = float(((2 / 3 * weight[:, None] * e) ** 2).sum(dim=1).mean())
        parts = split_energies(objective, hs.Partition.by_row(model)).parts
        snapshots.append(snapshot(step, parts, objective.value(), residual, ("fc1",) * 4 + ("fc2",) * 3))
    return dynamic_force(Trajectory(tuple(snapshots), {}))


def test_theory_s_exponents():
    """MATH.md, section 2: R_wv is linear in e. Its energy goes as the mean square of residuals that shrink alike, and
    as the square of that where only their number falls; G is a constant under squared error.
    """
    alike = rescaled_residuals(randn(10, 6, seed=5), torch.logspace(0, -3, 12, dtype=F64)[:, None].expand(-1, 10))
    fewer = rescaled_residuals(
        randn(1, 6, seed=5).expand(32, -1), (torch.arange(32) < torch.arange(12, 33)[:, None]) * 1.0
    )
    for force, exponent in ((alike, 1), (fewer, 2)):
        for over in ("residual", "gap"):
            assert force.exponent("R", over).exponent == pytest.approx(exponent, rel=1e-8)
            assert force.exponent("G", over).exponent == pytest.approx(0, abs=1e-8)


def train(loss, seed):
    """[D]'s network on clustered data, full-batch Adam: 22 log-spaced snapshots."""
    data = hs.data.clusters(200, 20, 10, seed=seed, dtype=F64)
    model = hs.models.one_hidden(20, 8, 10, seed=seed, dtype=F64)
    partition, (x, y) = hs.Partition.by_row(model), data.batch(loss)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    objective = hs.Objective(model, loss, (x, y))
    criterion = {"cross_entropy": torch.nn.functional.cross_entropy, "mse": torch.nn.functional.mse_loss}[loss]
    at, snapshots = set(np.round(np.geomspace(1, 501, 24)).astype(int) - 1), []
    for step in range(501):
        if step in at:
            o = model(x).detach()
            e = o.softmax(dim=1) - data.one_hot if loss == "cross_entropy" else 2 / 10 * (o - y)
            residual = float((e**2).sum(dim=1).mean())
            parts = split_energies(objective, partition).parts
            snapshots.append(snapshot(step, parts, objective.value(), residual, ("fc1",) * 8 + ("fc2",) * 10))
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()
    assert loss == "mse" or (model(x).argmax(dim=1) == data.labels).all()
    return Trajectory(tuple(snapshots), {})


@pytest.fixture(scope="module")
def entropy_runs():
    return [train("cross_entropy", seed) for seed in range(3)]


def test_training_drives_the_hessian_toward_its_blocks(entropy_runs):
    """[D]'s claim for cross-entropy, run by run: the cross-layer part fades, first of all its residual part."""
    force = dynamic_force(entropy_runs)
    assert (force.cross_layer_share[:, 0] > 4 * 0.2).all()
    assert (force.cross_layer_share[:, 0] > 3 * force.cross_layer_share[:, 1]).all()
    assert force.mean("cross_layer_share")[0] > 4 * force.mean("cross_layer_share")[1]
    assert (force.residual_share[:, 0] > 10 * force.residual_share[:, 1]).all()
    # Between layers all that is beyond chance came with training, and more: there was less than by chance.
    assert (force.static[:, 3] < 0).all()
    # Within the layers it was there.
    assert (force.static[:, 1:3] > 0.8).all()
    one = dynamic_force(entropy_runs[0])
    assert one.exponent("R", "residual").contains(1.0)
    assert one.exponent("R", "gap").contains(2.0)
    over_runs = force.exponent("R", "residual")
    assert 0.95 < over_runs.low < over_runs.exponent < 1.15


def test_late_exponents_under_cross_entropy(entropy_runs):
    """Once all is fitted the loss is linear in the residuals: R's energy goes as (L - 0)^2."""
    late = [Trajectory(tuple(s for s in run.snapshots if s.value < 0.05), {}) for run in entropy_runs]
    assert min(map(len, late)) >= 3
    force = dynamic_force(late)
    assert force.exponent("R", "gap").exponent == pytest.approx(2, abs=0.15)
    assert force.exponent("R", "residual").exponent == pytest.approx(1, abs=0.12)
    assert force.exponent("G", "gap").exponent > 1  # fades, too


def test_under_squared_error_the_gauss_newton_part_stays():
    run = train("mse", 0)
    force = dynamic_force(run)
    G = run.collect(lambda s: s.layer_energies("G").values[0, 1])
    R = run.collect(lambda s: s.layer_energies("R").values[0, 1])
    assert G[-1] > 0.5 * G[0]
    assert R[-1] < 0.05 * R[0]
    assert force.residual_share[0, 0, 0] > 10 * force.residual_share[0, 1, 0]
    # L is proportional to the mean squared residual.
    np.testing.assert_allclose(force.exponents[..., 0], force.exponents[..., 1], rtol=1e-8)
    np.testing.assert_allclose(force.diagonality[0, :, 2], 1)  # of the output layer: exactly block-diagonal


# --- bad input --------------------------------------------------------------------------------------------------------

RUN = power_law_run(1.0, 1.0, points=3)


def changed(run, **changes):
    return Trajectory(tuple(dataclasses.replace(each, **changes) for each in run.snapshots), {})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([],), "at least one"),
        (([RUN, "x"],), "got str as number 1"),
        ((RUN, 0.5), r"optimum must be a number that no loss is below, got 0.5; L is 0.25\d+ at step 2"),
        ((RUN, float("nan")), "optimum must be"),
        ((RUN, 0.0, 1.5), r"threshold must lie in \(0, 1\], got 1.5"),
        ((RUN, 0.0, 0), r"threshold must lie in \(0, 1\], got 0"),
        ((Trajectory(RUN.snapshots[:1], {}),), "at least two snapshots with energies, run 0 has 1 of 1"),
        ((changed(RUN, energies=None),), "run 0 has 0 of 3"),
        (([RUN, changed(RUN, layers=("a", "a", "a", "b"))],), None),
        (([RUN, changed(RUN, layers=("a", "a", "c", "c"))],), "the same layers: step 0 of run 1 has a, c; .* has a, b"),
        (
            ([RUN, changed(RUN, energies=SplitEnergies({"H": energies_of(np.eye(4), "wxyv")}))],),
            "the same blocks: step 0 of run 1 has w, x, y, v; step 0 of run 0 has w, x, y, z",
        ),
        (([RUN, changed(RUN, energies=SplitEnergies({"H": energies_of(np.eye(4), size=6)}))],), "the same sizes"),
        (([RUN, changed(RUN, energies=SplitEnergies({"H": energies_of(np.eye(4))}))],), "the same matrices: .* has H;"),
        ((changed(RUN, energies=SplitEnergies({"G": energies_of(np.eye(4))})),), "has no energies of 'H'; it has G"),
    ],
)
def test_bad_input(arguments, words):
    with pytest.raises(hs.HesscopeError, match=words):
        dynamic_force(*arguments)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda force: force.exponent("S", "gap"), "matrix must be one of 'H', 'G', 'R', got 'S'"),
        (lambda force: force.exponent("R", "loss"), "over must be one of 'gap', 'residual', got 'loss'"),
        (lambda force: force.exponent("R", "gap", "a", "c"), "the pair of layers must be one of 'a x b', 'all'"),
        (lambda force: force.mean("steps"), "name must be one of 'diagonality'"),
        (lambda force: DynamicForce.from_xarray(RUN.to_xarray()), "expected a data set of record 'DynamicForce'"),
        (lambda force: fit_power_law([], []), "one array for each run, got 0 and 0"),
        (lambda force: fit_power_law([np.ones(3)], [np.ones(4)]), r"run 0 must be of one shape \[S\]"),
    ],
)
def test_bad_requests(call, words):
    with pytest.raises(hs.HesscopeError, match=words):
        call(dynamic_force(RUN))
