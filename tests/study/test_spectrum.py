"""`hesscope spectrum` as a study: its numbers against dense matrices and the library, errors, and how it resumes."""

import numpy as np
import pytest
import torch

import hesscope as hs
from hesscope.core.errors import HesscopeError
from hesscope.core.records import Provenance
from hesscope.estimate.density import SpectralDensity
from hesscope.estimate.eigenpairs import Eigenpairs, top_eigenpairs
from hesscope.estimate.estimate import Estimate
from hesscope.estimate.frobenius import frobenius_norm_squared
from hesscope.estimate.spectral_density import spectral_density
from hesscope.estimate.spectrum_distance import jensen_shannon_distance
from hesscope.estimate.trace import trace
from hesscope.study import analyze, spectrum
from hesscope.study.config import SpectrumConfig, StudyConfig
from hesscope.study.spectrum import describe_spectrum, prepare_spectrum, run_spectrum
from tests.helpers import check_stderr, check_unbiased
from tests.study import user_code

HERE = "tests.study.user_code"
# 48 parameters: fewer products than the matrix has columns, so that everything is estimated.
SAMPLED = {"eigenpairs": 3, "probes": 2, "steps": 8, "block_probes": 2, "block_steps": 6}


def study(tmp_path, settings=None, **changes):
    values = {"model": f"{HERE}:network", "data": f"{HERE}:points", "output": "out", **changes}
    return prepare_spectrum(StudyConfig(**values, spectrum=SpectrumConfig(**(settings or {}))), tmp_path)


def measure(tmp_path, settings=None, **changes):
    prepared = study(tmp_path, settings, **changes)
    run_spectrum(prepared, lambda title, share: None)
    return prepared, prepared.store.require("spectrum")


def quantity(result, name):
    at = result.sel(quantity=name)
    return float(at["value"]), float(at["error"])


def dense(matrix="hessian"):
    objective = hs.Objective(user_code.network(), "cross_entropy", user_code.tensors())
    return (hs.Hessian if matrix == "hessian" else hs.GaussNewton)(objective).dense()


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    """The study of most tests below: (study, result)."""
    return measure(tmp_path_factory.mktemp("sampled"), SAMPLED)


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("matrix", ["hessian", "gauss_newton"])
def test_a_small_matrix_is_taken_whole_and_every_number_is_exact(tmp_path, matrix):
    _, result = measure(tmp_path, {"matrix": matrix, "eigenpairs": 5, "residual": 1e-10})
    H = dense(matrix)
    values = torch.linalg.eigvalsh(H).numpy()
    largest = values[-1]
    np.testing.assert_allclose(result["eigenvalue"].sel(end="largest"), values[::-1][:5], rtol=1e-9)
    np.testing.assert_allclose(result["eigenvalue"].sel(end="smallest"), values[:5][::-1], atol=1e-9 * largest)
    assert result["converged"].all()
    np.testing.assert_allclose(result["node"][0], values, atol=1e-12 * largest)
    norm_squared = float((H**2).sum())
    exact = {
        "largest": largest,
        "smallest": values[0],
        "trace": values.sum(),
        "norm_squared": norm_squared,
        "effective_rank": values.sum() ** 2 / norm_squared,
        "negative_mass": -values[values < 0].sum() / np.abs(values).sum(),
    }
    for name, value in exact.items():
        found, error = quantity(result, name)
        assert found == pytest.approx(value, rel=1e-9, abs=1e-11 * largest), name
        assert error == 0 or name in ("largest", "smallest")
    if matrix == "hessian":  # the Gauss-Newton matrix has eigenvalues that are zero
        assert quantity(result, "spread")[0] == pytest.approx(largest / abs(values[0]), rel=1e-9)
    else:
        assert np.isnan(quantity(result, "spread")[0])
    blocks = H[:30, :30], H[30:, 30:]
    np.testing.assert_allclose(result["block_trace"], [block.trace() for block in blocks], rtol=1e-12)
    np.testing.assert_allclose(result["block_share"], [block.trace() / values.sum() for block in blocks], rtol=1e-10)
    inner = [torch.linalg.eigvalsh(block).numpy() for block in blocks]
    np.testing.assert_allclose(result["block_largest"], [each[-1] for each in inner], rtol=1e-9)
    np.testing.assert_allclose(result["block_node"][1, 0, :18], inner[1], atol=1e-12 * largest)
    distance = jensen_shannon_distance(*(SpectralDensity.from_eigenvalues(each) for each in inner))
    np.testing.assert_allclose(result["distance"], [[0, distance], [distance, 0]], rtol=1e-6)
    assert not result["distance_stderr"].any()
    assert not result["noise"].any()


def test_shares_of_eigenvectors_are_those_of_the_blocks(tmp_path):
    _, result = measure(tmp_path, {"eigenpairs": 2, "residual": 1e-10})
    vectors = torch.linalg.eigh(dense())[1]
    expected = [[float((vectors[:30, -rank] ** 2).sum()), float((vectors[30:, -rank] ** 2).sum())] for rank in (1, 2)]
    np.testing.assert_allclose(result["eigenvector_share"].sel(end="largest"), expected, rtol=1e-6)


def test_estimates_are_the_library_s_with_the_study_s_seed(tmp_path):
    prepared, result = measure(tmp_path, {**SAMPLED, "rtol": 0.1}, seed=5)
    objective = hs.Objective(user_code.network(), "cross_entropy", user_code.tensors())
    H = hs.Hessian(objective)
    density = spectral_density(H, 2, 8, seed=5)
    np.testing.assert_array_equal(result["node"], density.nodes)
    np.testing.assert_array_equal(result["weight"], density.weights)
    for name, expected in (
        ("trace", trace(H, rtol=0.1, seed=5)),
        ("norm", frobenius_norm_squared(H, rtol=0.1, seed=5)),
    ):
        stored = Estimate.from_xarray(prepared.store.require(name))
        assert (stored.value, stored.stderr, stored.products) == (expected.value, expected.stderr, expected.products)
    pairs = top_eigenpairs(H, 3, "SA", rtol=1e-3, seed=5)
    stored = Eigenpairs.from_xarray(prepared.store.require("smallest"))
    np.testing.assert_array_equal(stored.values, pairs.values)
    np.testing.assert_array_equal(stored.vectors, pairs.vectors)
    assert result["products"].sel(measured="smallest") == pairs.products
    assert not bool(result.attrs["exact"])
    assert not result["block_exact"].any()
    assert (result["distance_stderr"].to_numpy()[0, 1] > 0) and (result["noise"] > 0).all()


def test_blocks_are_those_of_the_whole_with_the_rest_held_fixed(tmp_path):
    _, whole = measure(tmp_path, {"eigenpairs": 1}, partition="row")
    H = dense().numpy()
    for index, label in enumerate(whole["block"].to_numpy()):
        members = hs.Partition.by_row(user_code.network()).indices(label)
        values = np.linalg.eigvalsh(H[np.ix_(members, members)])
        np.testing.assert_allclose(whole["block_node"][index, 0, : len(values)], values, atol=1e-12)
        assert float(whole["block_trace"][index]) == pytest.approx(values.sum(), rel=1e-10)


def cut_points():
    x, y = user_code.tensors()
    return [(x[:5], y[:5]), (x[5:32], y[5:32]), (x[32:], y[32:])]


def test_several_batches_are_one(tmp_path, monkeypatch):
    monkeypatch.setattr(user_code, "cut_points", cut_points, raising=False)
    _, several = measure(tmp_path, {"eigenpairs": 3}, data=f"{HERE}:cut_points")
    assert several.attrs["batches"] == 3
    np.testing.assert_allclose(several["node"][0], torch.linalg.eigvalsh(dense()), rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(several["block_trace"].sum(), dense().trace(), rtol=1e-10)


def test_a_loss_callable_has_a_hessian(tmp_path):
    _, result = measure(tmp_path, {"eigenpairs": 2}, loss=f"{HERE}:sum_loss", data=f"{HERE}:tensors")
    assert quantity(result, "largest")[0] == pytest.approx(float(torch.linalg.eigvalsh(dense())[-1]), rel=1e-6)


@pytest.mark.parametrize("factor", [1e-14, 1e14])
def test_nothing_depends_on_the_scale(tmp_path, monkeypatch, sampled, factor):
    _, one = sampled
    monkeypatch.setattr(user_code, "FACTOR", factor)
    _, other = measure(tmp_path, SAMPLED, loss=f"{HERE}:scaled_loss", data=f"{HERE}:tensors")
    for name in ("largest", "smallest", "trace"):
        assert quantity(other, name)[0] == pytest.approx(factor * quantity(one, name)[0], rel=1e-6)
    for name in ("spread", "effective_rank", "negative_mass", "outliers", "outlier_mass"):
        np.testing.assert_allclose(quantity(other, name), quantity(one, name), rtol=1e-6)
    np.testing.assert_allclose(other["distance"], one["distance"], rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(other["converged"], one["converged"])


def test_a_zero_hessian(tmp_path):
    _, result = measure(
        tmp_path, SAMPLED, model=f"{HERE}:huge_network", loss=f"{HERE}:linear_loss", data=f"{HERE}:tensors"
    )
    assert not result["value"].sel(quantity=["largest", "smallest", "trace", "norm_squared", "outliers"]).any()
    assert np.isnan(result["value"].sel(quantity=["spread", "effective_rank", "negative_mass"])).all()
    assert not result["distance"].any()


# --- errors -----------------------------------------------------------------------------------------------------------

SPECTRUM = torch.cat([torch.linspace(-0.5, 1.5, 50), torch.tensor([4.0, 6.0])]).double()
REPLICATES = 150


def random_matrix(values, seed=0):
    size = len(values)
    Q, _ = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))
    return (Q * values) @ Q.T


def test_the_error_of_the_negative_mass():
    values = -SPECTRUM  # most of it negative: a share whose whole varies with it
    A = random_matrix(values)
    found = [spectrum.negative_mass(spectral_density(A, 8, 25, seed=seed)) for seed in range(REPLICATES)]
    exact = float(-values[values < 0].sum() / values.abs().sum())
    check_unbiased(*zip(*found, strict=True), exact)


def test_the_errors_of_what_follows_from_trace_norm_and_ends():
    density = SpectralDensity.from_eigenvalues(SPECTRUM.numpy())
    t, F, rng = float(SPECTRUM.sum()), float(SPECTRUM.square().sum()), np.random.default_rng(0)
    ends = [top_eigenpairs(torch.diag(SPECTRUM), 2, which, rtol=1e-3).to_xarray() for which in ("LA", "SA")]
    provenance = Provenance(engine="test", dtype="float64", device="cpu")

    def estimate(value, relative):
        sampled = value * (1 + relative * rng.standard_normal())
        return Estimate(sampled, value * relative, None, None, 99, 100, 100, True, "", provenance)

    found = [
        spectrum.quantities(ends, density, estimate(t, 0.02), estimate(F, 0.03), density.outliers())
        for _ in range(1000)
    ]
    check_unbiased(*zip(*(each["effective_rank"] for each in found), strict=True), t**2 / F)
    for end, at in zip(ends, (0, -1), strict=True):
        end["residual"][at] = 0.01
    (spread, error), ((high, _), (low, _)) = (
        spectrum.quantities(ends, density, estimate(t, 0), estimate(F, 0), density.outliers())["spread"],
        (found[0]["largest"], found[0]["smallest"]),
    )
    assert spread == pytest.approx(12, rel=1e-6)
    # The farthest off that two eigenvalues within their residuals put the ratio, to first order.
    assert error == pytest.approx((high + 0.01) / (abs(low) - 0.01) - high / abs(low), rel=0.03)


def test_the_errors_of_shares_and_of_their_sum():
    A, rng = random_matrix(SPECTRUM), np.random.default_rng(0)
    blocks = [A[:30, :30].trace(), A[30:, 30:].trace()]
    exact = np.array(blocks) / float(A.trace())
    provenance = Provenance(engine="test", dtype="float64", device="cpu")
    shares, sums = [], []
    # Samples of two blocks that vary together: an error that takes them for independent is too small for the sum.
    for _ in range(2000):
        common = rng.standard_normal((40, 1))
        samples = np.array(blocks) * (1 + 0.5 * common + 0.2 * rng.standard_normal((40, 2)))
        value, stderr = samples.mean(axis=0), samples.std(axis=0, ddof=1) / np.sqrt(40)
        traces = Estimate(value, stderr, samples, ("a", "b"), 39, 40, 40, True, "", provenance)
        shares.append(spectrum.trace_shares(traces))
        sums.append((value.sum(), spectrum.trace_sum_error(traces)))
    check_unbiased(*zip(*shares, strict=True), exact)
    check_unbiased(*zip(*sums, strict=True), float(A.trace()))


def test_the_error_and_the_noise_of_distances():
    values = torch.cat([torch.linspace(0, 2, 80) ** 2, torch.tensor([10.0, 15.0])]).double()
    A, B = random_matrix(values, 1), random_matrix(values / 6, 2)
    different, errors, same, noise = [], [], [], []
    for seed in range(60):
        a, b, again = (spectral_density(X, 6, 20, seed=3 * seed + k) for k, X in enumerate((A, B, A)))
        different.append(jensen_shannon_distance(a, b))
        errors.append(spectrum.distance_error(a, b))
        same.append(jensen_shannon_distance(a, again))
        noise.append(spectrum.noise_distance(a))
    check_stderr(different, errors)
    assert np.mean(noise) == pytest.approx(np.mean(same), rel=0.1)


def test_blocks_do_not_share_probes(sampled):
    """Equal probes would make the errors of equal blocks cancel, and their distance smaller than noise."""
    prepared, result = sampled
    objective = hs.Objective(user_code.network(), "cross_entropy", user_code.tensors())
    for index, label in enumerate(("fc1", "fc2")):
        own = spectral_density(hs.Hessian(objective).restrict(label), 2, 6, spectrum.block_seed(prepared, label))
        np.testing.assert_array_equal(result["block_weight"][index], own.weights)
    assert len({spectrum.block_seed(prepared, label) for label in ("fc1", "fc2", "fc3")}) == 3


# --- the study --------------------------------------------------------------------------------------------------------


def test_blocks_are_layers_unless_told(tmp_path):
    assert study(tmp_path).partition.labels == ("fc1", "fc2")
    rows = study(tmp_path, partition="row")
    assert (len(rows.partition), rows.scheme, rows.refused) == (9, "row", 0)


def test_a_partition_of_too_many_blocks_gives_way_to_layers(tmp_path, monkeypatch):
    monkeypatch.setattr(spectrum, "MOST_BLOCKS", 8)
    prepared = study(tmp_path, partition="row")
    assert (prepared.partition.labels, prepared.scheme, prepared.refused) == (("fc1", "fc2"), "layer", 9)
    assert dict(describe_spectrum(prepared))["partition"] == "layer: 2 blocks (row has 9, more than 8)"


def test_spectra_of_too_many_layers_are_those_of_the_largest(tmp_path, monkeypatch):
    monkeypatch.setattr(spectrum, "MOST_BLOCKS", 1)
    prepared, result = measure(tmp_path)
    assert dict(describe_spectrum(prepared))["partition"] == "layer: 2 blocks, spectra of the 1 largest"
    assert result["compared"].to_numpy().tolist() == ["fc1"]
    np.testing.assert_array_equal(np.isnan(result["block_largest"]), [False, True])
    assert np.isfinite(result["block_trace"]).all()


def test_the_plan_names_what_matters(tmp_path):
    lines = dict(describe_spectrum(study(tmp_path, SAMPLED, model=f"{HERE}:half_network", data=f"{HERE}:half_points")))
    assert lines["model"].startswith("MLP, 48 parameters in 2 tensors")
    assert "3 eigenpairs at either end, density from 2 probes of 8 steps" in lines["matrix"]
    assert lines["notes"].startswith("the model is bfloat16, measured in float32")
    assert {"data", "partition", "products", "time", "memory", "results"} <= set(lines)
    assert "all eigenvalues" in dict(describe_spectrum(study(tmp_path)))["matrix"]


def test_products_stay_within_the_plan(sampled):
    prepared, result = sampled
    most = spectrum.planned_products(prepared, at_most=True)
    spent = result["products"].to_numpy()
    assert spent[0] + spent[1] <= most[0]
    assert (spent[2:6] <= most[1:5]).all()
    assert spent[6] <= sum(most[5:])


def test_half_precision_is_measured_in_float32(tmp_path):
    half = {"model": f"{HERE}:half_network", "data": f"{HERE}:half_points"}
    _, result = measure(tmp_path, {"eigenpairs": 2}, **half)
    assert result.attrs["dtype"] == "float32"
    x, y = user_code.half_points()
    model = user_code.half_network().float()
    objective = hs.Objective(model, "cross_entropy", [(x.float(), y)])
    truth = hs.Hessian(objective).dense()
    assert quantity(result, "norm_squared")[0] == pytest.approx(float((truth**2).sum()), rel=1e-5)


def test_analyze_takes_half_precision_and_the_same_file_and_folder(tmp_path):
    half = {"model": f"{HERE}:half_network", "data": f"{HERE}:half_points", "output": "out"}
    config = StudyConfig(**half, method="probes", probes=2, spectrum=SpectrumConfig(**SAMPLED))
    first, second = analyze.prepare(config, tmp_path), prepare_spectrum(config, tmp_path)
    assert first.operators[0].dtype == torch.float32
    run_spectrum(second, lambda title, share: None)
    analyze.run(first, lambda title, share: None)
    assert first.store.has("energies")
    assert second.store.has("spectrum")


SAME = ("products", "node", "eigenvalue", "value", "error", "block_trace", "block_node", "distance", "distance_stderr")


@pytest.mark.parametrize("where", ["smallest", "spectrum of fc2", "distances"])
def test_an_interrupted_run_continues_to_the_same_numbers(tmp_path, sampled, where):
    def interrupt(title, share):
        if where in title:
            raise KeyboardInterrupt

    _, expected = sampled
    with pytest.raises(KeyboardInterrupt):
        run_spectrum(study(tmp_path, SAMPLED), interrupt)
    finished = len(list((tmp_path / "out").glob("results-*.nc")))
    assert finished > 0
    resumed = study(tmp_path, SAMPLED)
    assert run_spectrum(resumed, lambda title, share: None) == finished
    result = resumed.store.require("spectrum")
    for name in SAME:
        np.testing.assert_array_equal(result[name], expected[name], err_msg=name)
    assert {path.name for path in resumed.folder.iterdir()} == {
        f"results-{name}.nc" for name in ("spectrum", "largest", "smallest", "density", "trace", "norm", "traces")
    }


def test_results_are_reused_only_for_the_same_settings(sampled):
    base = sampled[0].folder.parent
    assert run_spectrum(study(base, SAMPLED), lambda *_: None) == 1
    assert not study(base, SAMPLED, seed=1).store.has("spectrum")
    assert not study(base, SAMPLED, partition="row").store.has("spectrum")
    for name, value in (("steps", 9), ("matrix", "gauss_newton"), ("rtol", 0.03), ("residual", 1e-4)):
        assert not study(base, {**SAMPLED, name: value}).store.has("spectrum")


def test_large_eigenvectors_are_not_stored(tmp_path, monkeypatch):
    monkeypatch.setattr(spectrum, "VECTOR_ENTRIES", 48 * 3 - 1)
    prepared, result = measure(tmp_path, SAMPLED)
    assert "eigenvector" not in prepared.store.require("largest")
    assert "eigenvector_share" in result


def test_what_does_not_reach_its_tolerance_is_said(tmp_path):
    _, result = measure(tmp_path, {**SAMPLED, "max_products": 8, "rtol": 0.001, "residual": 1e-8})
    met = result["tolerance_met"].to_series()
    assert not met[["largest", "smallest", "trace", "norm"]].any()
    assert not result["converged"].all()
    assert "budget" in str(result["message"].sel(measured="largest").item())


@pytest.mark.parametrize(
    ("settings", "changes", "words"),
    [
        ({"eigenpairs": 49}, {}, "spectrum.eigenpairs must be at most the number of parameters, 48, got 49"),
        ({"max_products": 20}, {}, "spectrum.max_products must be at least 2 * eigenpairs + 2 = 22, got 20"),
        ({"matrix": "gauss-newton"}, {}, "did you mean 'gauss_newton'?"),
        ({"matrix": "gauss_newton"}, {"loss": f"{HERE}:sum_loss", "data": f"{HERE}:tensors"}, "Gauss-Newton"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_refused(tmp_path, settings, changes, words):
    with pytest.raises(HesscopeError) as refusal:
        study(tmp_path, settings, **changes)
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)


def two_weights():
    layer = torch.nn.Linear(1, 2, bias=False, dtype=torch.float64)
    torch.nn.init.zeros_(layer.weight)
    return layer


def equal_points():
    return torch.ones(3, 1, dtype=torch.float64), torch.tensor([0, 1, 1])


def test_a_matrix_of_two_parameters(tmp_path, monkeypatch):
    """The default number of pairs is no more than there are; p = 1/2 gives [[1, -1], [-1, 1]] / 4."""
    for made in (two_weights, equal_points):
        monkeypatch.setattr(user_code, made.__name__, made, raising=False)
    _, result = measure(tmp_path, model=f"{HERE}:two_weights", data=f"{HERE}:equal_points")
    assert result.sizes["pair"] == 2
    np.testing.assert_allclose(result["eigenvalue"], [[0.5, 0.0], [0.5, 0.0]], atol=1e-15)
    assert quantity(result, "trace") == (0.5, 0.0)
