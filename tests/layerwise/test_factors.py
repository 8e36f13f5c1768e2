"""Kronecker factors against brute force over samples, and against curvlinops' K-FAC."""

import numpy as np
import pytest
import torch
from torch import nn

import hesscope as hs
from hesscope.layerwise.factors import (
    KroneckerFactors,
    all_kronecker_factors,
    kronecker_factors,
    layer_gauss_newton,
    layer_hessian,
)
from hesscope.layerwise.layers import find_layer, layers_of
from tests.helpers import randint, randn, randomized, relative_error
from tests.layerwise import networks

CASES = {
    "mlp": (networks.mlp, networks.vectors, ("0", "2", "4")),
    "tanh": (lambda: networks.mlp(nn.Tanh), networks.vectors, ("0", "4")),
    "convolutional": (networks.convolutional, networks.images, ("0", "2", "5")),
    "tokens": (lambda: randomized(networks.Tokens(), 3), networks.sequences, ("a", "b")),
}


def brute_factors(model, layer, x, loss, sharing):
    """E[M], E[x x^T], E[x] by loops over samples and positions."""
    found = networks.brute_force(model, layer, x, loss)
    outputs, inputs, means = 0, 0, 0
    for X, M in found:
        if sharing == "reduce":
            mean = X.mean(0)
            outputs, inputs, means = outputs + M.sum((0, 2)), inputs + torch.outer(mean, mean), means + mean
        else:
            outputs = outputs + torch.einsum("totu->ou", M)
            inputs, means = inputs + X.T @ X / len(X), means + X.mean(0)
    return outputs / len(found), inputs / len(found), means / len(found)


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("case", CASES)
def test_factors_are_averages_over_samples(case, sharing, loss):
    make, data, layers = CASES[case]
    model, (x, y) = make(), data()
    C = model(x[:1]).shape[1]
    target = randn(len(x), C, seed=9) if loss == "mse" else y
    cut = len(x) // 3  # unequal batches
    objective = hs.Objective(model, loss, [(x[:cut], target[:cut]), (x[cut:], target[cut:])])
    found = all_kronecker_factors(objective, layers, sharing=sharing)
    for layer in layers:
        output, moment, mean = brute_factors(model, layer, x, loss, sharing)
        factors = found[layer]
        assert relative_error(factors.output, output) < 1e-10
        assert relative_error(factors.input, moment) < 1e-10
        assert relative_error(factors.input_mean, mean) < 1e-10
        assert factors.sharing == ("none" if case in ("mlp", "tanh") or layer == "5" else sharing)
        assert (factors.output_stderr, factors.samples) == (0.0, len(x))
        assert factors.classes == (C if loss == "cross_entropy" else None)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("case", ["mlp", "tanh", "convolutional", "tokens"])
@pytest.mark.filterwarnings("ignore")
def test_factors_are_those_of_curvlinops(case, sharing):
    curvlinops = pytest.importorskip("curvlinops")
    make, data, _ = CASES[case]
    model, batch = make().eval(), data()
    objective = hs.Objective(model, "cross_entropy", batch)
    K = curvlinops.KFACLinearOperator(
        model,
        nn.CrossEntropyLoss(),
        list(model.parameters()),
        [batch],
        fisher_type="type-2",
        kfac_approx=sharing,
        separate_weight_and_bias=False,
        check_deterministic=False,
    )
    theirs = K @ torch.eye(K.shape[1], dtype=torch.float64)
    ours = all_kronecker_factors(objective, sharing=sharing)
    for layer in layers_of(objective):
        where = torch.cat([torch.arange(K.shape[1])[objective.parameters.slice(name)] for name in layer.parameters])
        block = networks.dense(hs.as_operator(theirs[where][:, where]), layer)
        factors = ours[layer.name]
        product = torch.einsum("ab,ij->aibj", torch.as_tensor(factors.output), torch.as_tensor(factors.input))
        assert relative_error(product, block) < 1e-10


def test_class_weights_count_as_in_the_loss():
    model, (x, y) = networks.mlp(), networks.vectors()
    weight = torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=torch.float64)
    factors = kronecker_factors(hs.Objective(model, nn.CrossEntropyLoss(weight=weight), (x, y)), "2")
    found = networks.brute_force(model, "2", x)
    expected = sum(weight[label] * M[0, :, 0] for label, (_, M) in zip(y, found, strict=True)) / weight[y].sum()
    assert relative_error(factors.output, expected) < 1e-10


@pytest.mark.parametrize("padding", [None, 2])
def test_embeddings_take_unit_vectors(padding):
    embedding = nn.Embedding(6, 4, padding_idx=padding)
    model = randomized(nn.Sequential(embedding, nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)), 4)
    ids = randint(6, 10, 3, seed=1)
    objective = hs.Objective(model, "cross_entropy", (ids, randint(3, 10, seed=2)))
    factors = kronecker_factors(objective, "0", errors=padding is None)
    counts = torch.bincount(ids.flatten(), minlength=6).double() / ids.numel()
    if padding is not None:
        counts[padding] = 0  # has no gradient
    assert factors.shape == (4, 6)
    assert relative_error(factors.input, torch.diag(counts)) < 1e-14
    if padding is None:
        H = networks.dense(layer_hessian(objective, "0"), find_layer(objective, "0"))
        product = torch.einsum("ab,ij->aibj", torch.as_tensor(factors.output), torch.as_tensor(factors.input))
        assert factors.relative_error == pytest.approx(float((H - product).norm() / H.norm()), rel=1e-9)


def test_random_combinations_are_unbiased_and_know_their_error():
    """Over seeds, the mean of the sampled factor is the exact one, and its error the one that is told."""
    model, (x, y) = networks.mlp(), networks.vectors()
    objective = hs.Objective(model, "cross_entropy", (x, y))
    exact = all_kronecker_factors(objective, ["0"])["0"]
    found = [all_kronecker_factors(objective, ["0"], probes=32, seed=seed)["0"] for seed in range(200)]
    off = np.stack([each.output for each in found]) - exact.output
    scale = np.linalg.norm(exact.output)
    rms = np.sqrt((off**2).sum((1, 2)).mean()) / scale
    told = np.sqrt(np.mean([each.output_stderr**2 for each in found]))
    assert told == pytest.approx(rms, rel=0.15)
    z = np.trace(off.mean(0)) / (np.trace(off, axis1=1, axis2=2).std(ddof=1) / np.sqrt(len(found)))
    assert abs(z) < 4
    # Known to a per cent: a bias of 3 % would be seen.
    assert np.trace(off, axis1=1, axis2=2).std() / np.sqrt(len(found)) < 0.0075 * np.trace(exact.output)
    assert np.array_equal(found[3].output, all_kronecker_factors(objective, ["0"], probes=32, seed=3)["0"].output)


def test_tokens_beyond_the_limit_are_sampled():
    model = randomized(nn.Sequential(nn.Embedding(40, 4), nn.ReLU(), nn.Linear(4, 40)), 4)
    ids = randint(40, 6, 30, seed=1)
    factors = all_kronecker_factors(hs.Objective(model, "cross_entropy", (ids, randint(40, 6, 30, seed=2))), ["2"])["2"]
    assert 0 < factors.output_stderr < 0.2
    assert "64 random combinations" in factors.provenance.engine
    x = model[1](model[0](ids)).detach().flatten(0, 1)
    p = model[2](x).detach().softmax(1)
    truth = (torch.diag(p.sum(0)) - p.T @ p) / len(p)
    off = float((torch.as_tensor(factors.output) - truth).norm() / truth.norm())
    assert off < 3 * factors.output_stderr


@pytest.mark.parametrize("order", [1, -1])
def test_batches_on_both_sides_of_the_limit(order):
    """One batch of 20 tokens x 40 classes is exact, another of 30 is sampled: both count as they are."""
    model = randomized(nn.Sequential(nn.Embedding(40, 4), nn.ReLU(), nn.Linear(4, 40)), 4)
    batches = [(randint(40, 6, T, seed=T), randint(40, 6, T, seed=1)) for T in (20, 30)][::order]
    factors = all_kronecker_factors(hs.Objective(model, "cross_entropy", batches), ["2"])["2"]
    x = torch.cat([model[1](model[0](ids)).detach().flatten(0, 1) for ids, _ in batches])
    p = model[2](x).detach().softmax(1)
    truth = (torch.diag(p.sum(0)) - p.T @ p) / len(p)
    off = float((torch.as_tensor(factors.output) - truth).norm() / truth.norm())
    assert 0 < off < 3 * factors.output_stderr
    assert factors.output_stderr < 0.2
    assert factors.columns == 6 * 40 * (20 + 30)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("activation", [torch.relu, torch.tanh])
def test_batches_of_unequal_length(order, activation):
    """One position per sample in one batch, several in the other."""
    model = randomized(networks.Tokens(activation), 3)
    x, y = networks.sequences()
    batches = [(x[:4, :1], y[:4]), (x[4:], y[4:])][::order]
    factors = kronecker_factors(hs.Objective(model, "cross_entropy", batches), "a")
    H = networks.dense(layer_hessian(hs.Objective(model, "cross_entropy", batches), "a"), LAYER_A)
    product = torch.einsum("ab,ij->aibj", torch.as_tensor(factors.output), torch.as_tensor(factors.input))
    assert factors.relative_error == pytest.approx(float((H - product).norm() / H.norm()), abs=1e-9)
    assert (factors.positions, factors.sharing) == (4, "expand")
    assert relative_error(factors.output, sum_of_squares(model, batches)) < 1e-10


LAYER_A = find_layer(hs.Objective(networks.Tokens().double(), "cross_entropy", networks.sequences()), "a")


def sum_of_squares(model, batches):
    """E[M] of layer a by brute force over unequal batches."""
    found = [each for x, _ in batches for each in networks.brute_force(model, "a", x)]
    return sum(torch.einsum("totu->ou", M) for _, M in found) / len(found)


def test_a_bias_that_comes_first_stays_with_its_matrix():
    """As torch.nn.utils.prune.remove leaves it: the bias is registered before the weight."""
    model = networks.mlp(nn.Tanh)
    weight = model[0].weight
    del model[0].weight
    model[0].register_parameter("weight", weight)
    objective, usual = (
        hs.Objective(each, "cross_entropy", networks.vectors()) for each in (model, networks.mlp(nn.Tanh))
    )
    assert find_layer(objective, "0").parameters == ("0.bias", "0.weight")
    dense = [networks.dense(layer_hessian(each, "0"), find_layer(each, "0")) for each in (objective, usual)]
    assert relative_error(dense[0], dense[1]) < 1e-12
    theta = torch.cat([model[0].bias.detach(), weight.detach().flatten()])
    layer = find_layer(objective, "0")
    assert torch.equal(layer.matricized(theta)[:, :-1], weight.detach())
    assert torch.equal(layer.flattened(layer.matricized(theta)), theta)
    found, expected = (hs.layerwise.layer_eigenstructure(each, "0", k=6) for each in (objective, usual))
    assert np.allclose(found.overlap, expected.overlap, rtol=1e-6)


def test_a_layer_without_a_gradient_has_zero_factors():
    class Detached(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(7, 5), nn.Linear(5, 4)

        def forward(self, x):
            with torch.no_grad():
                h = self.a(x)
            return self.b(torch.relu(h))

    factors = all_kronecker_factors(hs.Objective(randomized(Detached(), 1), "cross_entropy", networks.vectors()))
    assert not factors["a"].output.any()
    assert factors["b"].output.any()


def test_operators_are_in_the_order_of_the_parameters():
    objective = networks.objective(networks.mlp(nn.Tanh), networks.vectors())
    where = torch.arange(objective.parameters.size)
    where = torch.cat([where[objective.parameters.slice(name)] for name in ("0.weight", "0.bias")])
    for ours, whole in ((layer_hessian, hs.Hessian), (layer_gauss_newton, hs.GaussNewton)):
        expected = whole(objective).dense()[where][:, where]
        assert relative_error(ours(objective, "0").dense(), expected) < 1e-12


def test_the_record_survives_xarray():
    factors = kronecker_factors(networks.objective(networks.convolutional(), networks.images()), "0")
    again = KroneckerFactors.from_xarray(factors.to_xarray())
    assert np.array_equal(again.output, factors.output)
    assert np.array_equal(again.input_mean, factors.input_mean)
    assert again.decoupling == factors.decoupling
    assert (again.shape, again.sharing, again.classes) == ((4, 19), "expand", 3)
    assert again.provenance == factors.provenance
    without = kronecker_factors(networks.objective(networks.mlp(), networks.vectors()), "0", errors=False)
    assert KroneckerFactors.from_xarray(without.to_xarray()).decoupling is None
    with pytest.raises(hs.HesscopeError, match="errors=True"):
        _ = without.relative_error


def test_the_model_is_left_as_it_was():
    model = networks.convolutional().train()
    objective = networks.objective(model, networks.images())
    kronecker_factors(objective, "0")
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


# --- bad input --------------------------------------------------------------------------------------------------------


def test_a_layer_used_twice_needs_a_convention():
    model = randomized(networks.Twice(), 5)
    objective = hs.Objective(model, "cross_entropy", (randn(8, 4, seed=1), randint(3, 8, seed=2)))
    with pytest.raises(hs.HesscopeError, match=r"'shared' is used 2 times .* sharing='expand'"):
        kronecker_factors(objective, "shared")
    expand = kronecker_factors(objective, "shared", sharing="expand")
    assert expand.positions == 2
    H = networks.dense(layer_hessian(objective, "shared"), find_layer(objective, "shared"))
    product = torch.einsum("ab,ij->aibj", torch.as_tensor(expand.output), torch.as_tensor(expand.input))
    assert expand.decoupling.residual_share > 0.01  # the layer is its own successor: its Hessian is not Gauss-Newton
    assert expand.relative_error == pytest.approx(float((H - product).norm() / H.norm()), rel=1e-9)


class Fused(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.last = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)
        self.place = nn.Embedding(5, 4)

    def forward(self, x):
        x = x + self.place(torch.arange(5)[None])
        return self.last(self.attention(x, x, x, need_weights=False)[0].mean(1))


class TimeFirst(nn.Module):
    """Samples are the second axis inside; with as many steps as samples no shape tells, nor when they are flattened."""

    def __init__(self, flat):
        super().__init__()
        self.a, self.b, self.flat = nn.Linear(5, 4), nn.Linear(4, 3), flat

    def forward(self, x):
        steps = x.transpose(0, 1)
        h = self.a(steps.reshape(-1, 5)).view(*steps.shape[:2], 4) if self.flat else self.a(steps)
        return self.b(torch.relu(h).mean(0))


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("sizes", [(4,), (6,), (8,), (16,), (1, 8), (1, 4, 4)])
def test_another_axis_than_samples_in_front_is_refused(sizes, flat):
    batches = [(randn(size, 8, 5, seed=size), randint(3, size, seed=2)) for size in sizes]
    objective = hs.Objective(randomized(TimeFirst(flat), 6), "cross_entropy", batches)
    with pytest.raises(hs.HesscopeError, match="'a' is given inputs whose first axis does not count samples"):
        kronecker_factors(objective, "a")
    assert kronecker_factors(objective, "b").positions == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layer": "attention.out_proj"}, "'attention.out_proj' is not called in the forward pass"),
        ({"layer": "place"}, "'place' is given inputs whose first axis does not count samples"),
        ({"layer": "lst"}, "there is no layer 'lst'.* did you mean 'last'"),
        ({"layer": "last", "sharing": "mean"}, "sharing must be one of 'expand', 'reduce', got 'mean'"),
        ({"layer": "last", "probes": 0}, "probes must be a positive integer, got 0"),
    ],
)
def test_bad_input_is_one_clear_line(arguments, message):
    model = randomized(Fused(), 6)
    objective = hs.Objective(model, "cross_entropy", (randn(7, 5, 4, seed=1), randint(3, 7, seed=2)))
    with pytest.raises(hs.HesscopeError, match=message) as error:
        kronecker_factors(objective, **arguments)
    assert "\n" not in str(error.value)


def test_a_loss_callable_has_no_factors():
    objective = hs.Objective(networks.mlp(), lambda model, b: (model(b[0]).square().sum(), 40), networks.vectors())
    with pytest.raises(hs.HesscopeError, match="loss callable"):
        kronecker_factors(objective, "0")


def test_samples_that_depend_on_each_other_are_refused():
    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(7, 5), nn.Linear(5, 4)

        def forward(self, x):
            h = self.a(x)
            return self.b(torch.relu(h - h.mean(0)))

    objective = hs.Objective(randomized(Centred(), 7), "cross_entropy", networks.vectors())
    with pytest.raises(hs.HesscopeError, match="samples of batch 0 depend on each other"):
        kronecker_factors(objective, "a")
