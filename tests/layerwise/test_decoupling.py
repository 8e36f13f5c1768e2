"""Decoupling errors without forming H, against the dense matrix and the singular values of its rearrangement."""

import numpy as np
import pytest
import torch
from torch import nn

import hesscope as hs
from hesscope.layerwise import decoupling, kronecker_sums
from hesscope.layerwise.factors import kronecker_factors, layer_gauss_newton, layer_hessian
from hesscope.layerwise.kronecker_sums import DenseMatrix, RowSum, SampleSum, nearest_product
from hesscope.layerwise.layers import find_layer
from tests.helpers import check_stderr, randn, randomized
from tests.layerwise import networks

CASES = {
    "mlp": (networks.mlp, networks.vectors, ("0", "2", "4")),
    "tanh mlp": (lambda: networks.mlp(nn.Tanh), networks.vectors, ("0", "2", "4")),
    "convolutional": (networks.convolutional, networks.images, ("0", "2", "5")),
    "tanh convolutional": (lambda: networks.convolutional(nn.Tanh), networks.images, ("0", "2", "5")),
    "tokens": (lambda: randomized(networks.Tokens(), 3), networks.sequences, ("a", "b")),
    "tanh tokens": (lambda: randomized(networks.Tokens(torch.tanh), 3), networks.sequences, ("a", "b")),
}


def dense_errors(operator, layer, factors):
    """|H - K| / |H| and the best, by singular values of the rearranged dense matrix."""
    H = networks.dense(operator, layer)
    K = torch.einsum("ab,ij->aibj", torch.as_tensor(factors.output), torch.as_tensor(factors.input))
    singular = torch.linalg.svdvals(H.permute(0, 2, 1, 3).reshape(layer.outputs**2, -1))
    best = float(singular[1:].square().sum().sqrt() / H.norm())
    return float((H - K).norm() / H.norm()), best


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("case", CASES)
def test_both_errors_equal_the_dense_computation(case, loss, sharing):
    make, data, layers = CASES[case]
    model, (x, y) = make(), data()
    target = randn(len(x), model(x[:1]).shape[1], seed=9) if loss == "mse" else y
    objective = hs.Objective(model, loss, [(x[:5], target[:5]), (x[5:], target[5:])])
    for name in layers:
        layer = find_layer(objective, name)
        factors = kronecker_factors(objective, name, sharing=sharing)
        found = factors.decoupling
        error, best = dense_errors(layer_hessian(objective, name), layer, factors)
        assert factors.relative_error == pytest.approx(error, abs=1e-9)
        assert factors.best_relative_error == pytest.approx(best, abs=1e-9)
        assert found.norm == pytest.approx(float(layer_hessian(objective, name).dense().norm()), rel=1e-9)
        error, best = dense_errors(layer_gauss_newton(objective, name), layer, factors)
        assert found.gauss_newton_error == pytest.approx(error, abs=1e-9)
        assert found.gauss_newton_best == pytest.approx(best, abs=1e-9)
        assert found.relative_stderr == 0
        bends = ("tanh" in case and name != layers[-1]) or (case == "tokens" and name == "a")
        assert (found.residual_share > 1e-3) == bends


def test_a_linear_network_under_squared_error_decouples_exactly():
    model = randomized(nn.Sequential(nn.Linear(7, 6), nn.Linear(6, 5), nn.Linear(5, 4)), 1)
    objective = hs.Objective(model, "mse", (networks.vectors()[0], randn(40, 4, seed=2)))
    for name in ("0", "1", "2"):
        factors = kronecker_factors(objective, name)
        assert factors.relative_error < 1e-13
        assert factors.best_relative_error < 1e-13


def test_columns_in_place_of_output_hessians_give_the_same():
    """A wide layer with few classes holds columns; both forms of the sum agree, and with the dense one."""
    model = randomized(nn.Sequential(nn.Linear(3, 20), nn.ReLU(), nn.Linear(20, 4)), 1)
    x, y = randn(15, 3, seed=3), networks.vectors(15)[1]
    objective = hs.Objective(model, "cross_entropy", (x, y))
    layer = find_layer(objective, "0")
    columns = decoupling._sample_sum(objective, layer, decoupling.Seen(15, 1, 60, True), False, None)
    assert columns.columns
    M = SampleSum(columns.M @ columns.M.mT, columns.x, columns.terms, False)
    dense = DenseMatrix(networks.dense(layer_gauss_newton(objective, "0"), layer))
    rows = RowSum((columns.M.mT[:, :, :, None] * columns.x[:, None, None, :]).flatten(0, 1), columns.terms)
    A, B = randn(20, 20, seed=1), randn(4, 4, seed=2)
    A, B = A + A.T, B + B.T
    for form in (columns, M, rows):
        assert form.norm_squared() == pytest.approx(dense.norm_squared(), rel=1e-12)
        assert torch.allclose(form.left(B), dense.left(B), rtol=1e-11, atol=1e-14)
        assert torch.allclose(form.right(A), dense.right(A), rtol=1e-11, atol=1e-14)
        assert form.distance_squared(A, B) == pytest.approx(dense.distance_squared(A, B), rel=1e-12)
    inner = rows.inner(A, B)
    assert float(inner.sum()) / columns.terms == pytest.approx(float((A * dense.left(B)).sum()), rel=1e-11)


@pytest.mark.parametrize("entries", [1, 300, 10**9])
def test_tiles_of_pairs_do_not_change_sums(entries, monkeypatch):
    rows, x, M = randn(30, 4, 3, seed=1), randn(30, 3, seed=2), randn(30, 4, 2, seed=3)
    expected = [RowSum(rows, 7.0).pair_sums(5), SampleSum(M, x, 7.0, True).norm_squared()]
    monkeypatch.setattr(kronecker_sums, "TILE_ENTRIES", entries)
    assert torch.allclose(RowSum(rows, 7.0).pair_sums(5), expected[0], rtol=1e-12)
    assert SampleSum(M, x, 7.0, True).norm_squared() == pytest.approx(expected[1], rel=1e-12)
    grouped = rows.view(5, 6, 12)
    each = torch.einsum("gri,grj->gij", grouped, grouped) / 7
    assert torch.allclose(expected[0], torch.einsum("gij,hij->gh", each, each), rtol=1e-12)


def test_the_nearest_product_is_the_leading_singular_pair():
    """Also where the second singular value is close, where the start knows nothing, and at any scale."""
    out, inputs = 5, 4
    pairs = [(randn(out, out, seed=n), randn(inputs, inputs, seed=10 + n)) for n in range(3)]
    basis_A = torch.linalg.qr(torch.stack([(A + A.T).flatten() for A, _ in pairs], 1)).Q
    basis_B = torch.linalg.qr(torch.stack([(B + B.T).flatten() for _, B in pairs], 1)).Q
    weights = torch.tensor([1.0, 0.99, 0.5], dtype=torch.float64)
    for scale in (1.0, 1e-14, 1e14):
        R = scale * (basis_A * weights) @ basis_B.T
        H = DenseMatrix(R.view(out, out, inputs, inputs).permute(0, 2, 1, 3))
        start = (basis_B @ torch.tensor([0.1, 1.0, 1.0], dtype=torch.float64)).view(inputs, inputs)
        found = nearest_product(H, start)
        assert found.scale == pytest.approx(scale, rel=1e-12)
        assert abs(float((found.A.flatten() * basis_A[:, 0]).sum())) == pytest.approx(1, abs=1e-9)
        assert abs(float((found.B.flatten() * basis_B[:, 0]).sum())) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("layer", ["0", "2"])
def test_sampled_errors_are_right_within_theirs(layer, monkeypatch):
    """Over seeds: unbiased within four standard errors of the mean, and told errors within 25 % of the true ones."""
    objective = networks.objective(networks.convolutional(), networks.images(40))
    exact = kronecker_factors(objective, layer)
    monkeypatch.setattr(decoupling, "EXACT_WORK", 10**6)
    K = torch.as_tensor(exact.output), torch.as_tensor(exact.input)
    found = [decoupling._sampled(objective, find_layer(objective, layer), K, seed, None) for seed in range(60)]
    errors, bests = np.array([each.error for each in found]), np.array([each.best for each in found])
    check_stderr(errors, [each.stderr for each in found])
    z = (errors.mean() - exact.relative_error) / (errors.std(ddof=1) / np.sqrt(len(errors)))
    assert abs(z) < 4
    assert 3 * errors.std(ddof=1) / np.sqrt(len(errors)) < 0.03 * exact.relative_error
    # Products found from one half and judged by the other are no better than the best, but for the mean's noise.
    lowest = exact.best_relative_error - 4 * bests.std(ddof=1) / np.sqrt(len(bests))
    assert lowest < bests.mean() < 1.2 * exact.best_relative_error
    squares = np.array([each.norm**2 for each in found])
    z = (squares.mean() - exact.decoupling.norm**2) / (squares.std(ddof=1) / np.sqrt(len(squares)))
    assert abs(z) < 4


def test_work_beyond_the_limit_is_sampled(monkeypatch):
    objective = networks.objective(networks.convolutional(), networks.images(40))
    exact = kronecker_factors(objective, "2")
    monkeypatch.setattr(decoupling, "EXACT_WORK", 10**5)
    sampled = kronecker_factors(objective, "2", seed=1)
    assert "random combinations" in sampled.decoupling.note
    assert 0 < sampled.decoupling.relative_stderr < 0.1
    assert abs(sampled.relative_error - exact.relative_error) < 4 * sampled.decoupling.relative_stderr
    assert np.array_equal(sampled.output, exact.output)  # the factors stay exact
    again = kronecker_factors(objective, "2", seed=1)
    assert again.decoupling == sampled.decoupling


def test_a_large_hessian_that_is_not_gauss_newton_is_probed(monkeypatch):
    objective = networks.objective(networks.convolutional(nn.Tanh), networks.images(40))
    exact = kronecker_factors(objective, "2")
    monkeypatch.setattr(decoupling, "DENSE_SIZE", 10)
    probed = kronecker_factors(objective, "2")
    assert "random vectors" in probed.decoupling.note
    assert abs(probed.relative_error - exact.relative_error) < 4 * probed.decoupling.relative_stderr
    assert probed.decoupling.relative_stderr < 0.1
    assert np.isnan(probed.best_relative_error)
    assert probed.decoupling.gauss_newton_best == pytest.approx(exact.decoupling.gauss_newton_best, abs=1e-9)


def test_the_error_of_probes_is_the_one_told(monkeypatch):
    objective = networks.objective(networks.convolutional(nn.Tanh), networks.images(40))
    exact = kronecker_factors(objective, "2")
    monkeypatch.setattr(decoupling, "DENSE_SIZE", 10)
    K, layer = (torch.as_tensor(exact.output), torch.as_tensor(exact.input)), find_layer(objective, "2")
    seen = decoupling.Seen(40, 4, 120, True)
    found = [decoupling._hessian_errors(objective, layer, K, seen, seed, None) for seed in range(40)]
    errors = np.array([each.error for each in found])
    check_stderr(errors, [each.stderr for each in found])
    assert abs(errors.mean() - exact.relative_error) < 4 * errors.std(ddof=1) / np.sqrt(len(errors))


def test_a_zero_matrix_is_met_exactly():
    model = randomized(nn.Sequential(nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 4)), 1)
    with torch.no_grad():
        model[2].weight.zero_()
    factors = kronecker_factors(hs.Objective(model, "cross_entropy", networks.vectors()), "0")
    assert (factors.relative_error, factors.best_relative_error) == (0.0, 0.0)
    assert "zero" in factors.decoupling.note


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", [networks.mlp, lambda: networks.mlp(nn.Tanh)])
def test_errors_do_not_depend_on_the_scale(make, dtype):
    """Inputs times s and weights over s: the same function of scaled parameters, however small its squares."""
    x, y = networks.vectors()
    found = []
    for scale in (1.0, 2.0**-40, 2.0**30):
        model = nn.Sequential(nn.Linear(7, 6, bias=False), *list(make())[1:]).to(dtype)
        with torch.no_grad():
            model[0].weight.copy_(make()[0].weight / scale)
        objective = hs.Objective(model, "cross_entropy", ((scale * x).to(dtype), y))
        found.append(kronecker_factors(objective, "0"))
    for other in found[1:]:
        rel = 1e-4 if dtype == torch.float32 else 1e-10
        assert other.relative_error == pytest.approx(found[0].relative_error, rel=rel)
        assert other.best_relative_error == pytest.approx(found[0].best_relative_error, rel=rel)
    assert found[0].relative_error > found[0].best_relative_error > 0


def test_a_distance_does_not_depend_on_how_a_product_is_split():
    """A factor of 1e6 from one side to the other: what is no distance stays none."""
    x, M = randn(30, 3, seed=2), randn(4, 4, seed=3)
    M = (M + M.T).expand(30, 4, 4)
    H = SampleSum(M, x, 30.0, False)
    product = float(H.norm_squared())
    for factor in (1.0, 1e6, 1e-6):
        assert H.distance_squared(M[0] * factor, x.T @ x / 30 / factor) < 1e-28 * product


def test_a_single_sample_is_a_product():
    x, y = networks.vectors(1)
    objective = hs.Objective(networks.mlp(), "cross_entropy", (x, y))
    factors = kronecker_factors(objective, "0")
    assert factors.relative_error < 1e-13
    assert factors.best_relative_error < 1e-13


def test_work_is_bounded_with_one_position_too(monkeypatch):
    """Both kinds of Hessian: pairs of samples are not counted beyond the limit."""
    monkeypatch.setattr(decoupling, "EXACT_WORK", 10**5)
    for activation, words in ((nn.ReLU, "random combinations"), (nn.Tanh, "dense matrix")):
        objective = networks.objective(networks.mlp(activation), networks.vectors(200))
        found = kronecker_factors(objective, "0").decoupling
        assert words in found.note
        assert found.gauss_newton_stderr > 0
        monkeypatch.setattr(decoupling, "EXACT_WORK", 10**12)
        exact = kronecker_factors(objective, "0").decoupling
        monkeypatch.setattr(decoupling, "EXACT_WORK", 10**5)
        assert abs(found.gauss_newton_error - exact.gauss_newton_error) < 4 * found.gauss_newton_stderr
        assert abs(found.relative_error - exact.relative_error) < 4 * found.gauss_newton_stderr


def test_combinations_over_several_samples(monkeypatch):
    """Sums over samples with random signs are as unbiased; more samples than rows make them necessary."""
    objective = networks.objective(networks.convolutional(), networks.images(40))
    exact = kronecker_factors(objective, "2")
    K, layer = (torch.as_tensor(exact.output), torch.as_tensor(exact.input)), find_layer(objective, "2")
    monkeypatch.setattr(decoupling, "MOST_ROWS", 64)
    found = [decoupling._sampled(objective, layer, K, seed, None) for seed in range(60)]
    assert "from 128 random" in found[0].note or "from 1" in found[0].note
    squares = np.array([each.norm**2 for each in found])
    z = (squares.mean() - exact.decoupling.norm**2) / (squares.std(ddof=1) / np.sqrt(len(squares)))
    assert abs(z) < 4
    errors = np.array([each.error for each in found])
    check_stderr(errors, [each.stderr for each in found])


def test_sampled_factors_are_judged_with_their_noise():
    """Against the dense Hessian: the error is that of the very product that was made."""
    objective = networks.objective(networks.mlp(nn.Tanh), networks.vectors())
    factors = kronecker_factors(objective, "0", probes=2, seed=3)
    error, best = dense_errors(layer_hessian(objective, "0"), find_layer(objective, "0"), factors)
    assert factors.relative_error == pytest.approx(error, abs=1e-9)
    assert factors.best_relative_error == pytest.approx(best, abs=1e-9)
    assert "noise included" in factors.decoupling.note


def test_progress_never_goes_back():
    objective = networks.objective(networks.mlp(nn.Tanh), networks.vectors())
    seen = []
    kronecker_factors(objective, "0", progress=lambda done, planned: seen.append(done / planned))
    assert seen == sorted(seen)
    assert seen[-1] == 1
