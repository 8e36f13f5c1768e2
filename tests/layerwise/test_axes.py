"""Groups, their Kronecker axes, and the curvature along these, against dense Gauss-Newton matrices and loops."""

import numpy as np
import pytest
import torch
from torch import nn

import hesscope as hs
from hesscope.core.errors import DataError
from hesscope.layerwise import axes as axes_module
from hesscope.layerwise.axes import TENSOR_PROBES, curvature_along, groups_of, kronecker_axes
from hesscope.layerwise.gaussians import Axes
from tests.helpers import F64, cut, randint, randn, randomized, reference_gauss_newton, relative_error
from tests.layerwise import networks, posteriors

N = 12
LABELS = randint(3, N, seed=2)
WEIGHTS = torch.tensor([0.5, 2.0, 1.3], dtype=F64)

# name -> (network, inputs)
CASES = {
    "no bias": (lambda: posteriors.mlp(bias=False), randn(N, 5, seed=1)),
    "bias": (posteriors.mlp, randn(N, 5, seed=1)),
    "bias first": (lambda: randomized(posteriors.BiasFirst()), randn(N, 5, seed=1)),
    "convolutions": (posteriors.convolutional, posteriors.images(N)),
    "tokens": (lambda: randomized(networks.Tokens(torch.tanh)), randn(N, 4, 5, seed=1)),
    "embedding": (lambda: randomized(posteriors.Words()), randint(6, N, 3, seed=3)),
    "weight [inputs, outputs]": (lambda: randomized(posteriors.Turned()), randn(N, 5, seed=1)),
}
LOSSES = {
    "cross-entropy": (nn.CrossEntropyLoss(), LABELS),
    "class weights": (nn.CrossEntropyLoss(weight=WEIGHTS), LABELS),
    "smoothed": (nn.CrossEntropyLoss(label_smoothing=0.2), LABELS),
    "mse": (nn.MSELoss(), randn(N, 3, seed=4)),
}


def random_axes(groups):
    return {
        group.name: Axes(
            posteriors.orthonormal(group.shape[0], number), posteriors.orthonormal(group.shape[1], -number)
        )
        for number, group in enumerate(groups, start=1)
    }


def dense_curvature(model, group, own, G):
    """Diagonal of Q^T G Q, [outputs, inputs], with the columns of Q = U x V in the order of the parameters."""
    where = posteriors.places(model, group).flatten()
    sides = [
        torch.eye(n, dtype=F64) if q is None else q for q, n in zip((own.left, own.right), group.shape, strict=True)
    ]
    Q = torch.zeros(len(G), where.numel(), dtype=F64)
    Q[where] = torch.kron(*sides)
    return (Q.T @ G @ Q).diagonal().view(group.shape)


@pytest.mark.parametrize("turned", [True, False], ids=["random axes", "parameters"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", CASES)
def test_curvature_is_the_gauss_newton_matrixs_own(name, loss, turned):
    (make, x), (criterion, y) = CASES[name], LOSSES[loss]
    model = make()
    objective = hs.Objective(model, criterion, cut(x, y))  # unequal batches
    groups, fallback = groups_of(objective)
    assert not fallback and all(group.layer is not None for group in groups)
    axes = random_axes(groups) if turned else {group.name: Axes() for group in groups}
    found = curvature_along(objective, groups, axes)
    G = reference_gauss_newton(model, criterion, x, y)
    assert list(found) == [group.name for group in groups]
    for group in groups:
        assert found[group.name].dtype == F64
        assert relative_error(found[group.name], dense_curvature(model, group, axes[group.name], G)) < 1e-11


def test_squares_of_gradients_in_parts_are_those_of_all(monkeypatch):
    make, x = CASES["convolutions"]
    objective = posteriors.objective(make(), x, LABELS)
    groups, _ = groups_of(objective)
    axes = random_axes(groups)
    whole = curvature_along(objective, groups, axes)
    monkeypatch.setattr(axes_module, "GRADIENT_ENTRIES", 100)
    for name, values in curvature_along(objective, groups, axes).items():
        assert relative_error(values, whole[name]) < 1e-13


def test_many_columns_are_sampled_without_bias():
    """1100 outputs have more columns than are taken one by one; of the mean square A = 2/C I in closed form."""
    C, samples, replicates = 1100, 6, 40
    model = randomized(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, C, bias=False)), 1, 0.3)
    x, y = randn(samples, 4, seed=2), randn(samples, C, seed=3)
    objective = hs.Objective(model, "mse", [(x[:2], y[:2]), (x[2:], y[2:])])
    groups, _ = groups_of(objective)
    axes = random_axes(groups[:1]) | {groups[1].name: Axes()}
    found = [curvature_along(objective, groups, axes, seed) for seed in range(replicates)]
    h = torch.tanh(model[0](x)).detach()
    ones = torch.cat([x, torch.ones(samples, 1, dtype=F64)], 1)
    J = model[2].weight.detach() * (1 - h[:, None, :] ** 2)  # [samples, C, 3]
    u, v = J @ axes["0"].left, ones @ axes["0"].right
    exact = 2 / C * (u.square().sum(1)[:, :, None] * v.square()[:, None, :]).mean(0)
    several = torch.stack([each["0"] for each in found])
    for sampled, wanted in ((several, exact), (several.sum((1, 2)), exact.sum())):
        mean, error = sampled.mean(0), sampled.std(0) / replicates**0.5
        assert bool(((mean - wanted).abs() < 4 * error).all())
    assert float(error / wanted) < 0.01  # of the trace: else a small factor would be hidden
    # Signs that fall on one output each have squares without noise.
    assert relative_error(found[0]["2"], (2 / C * h.square().mean(0)).expand(C, 3)) < 1e-12
    again = curvature_along(objective, groups, axes, 0)
    assert torch.equal(again["0"], found[0]["0"])
    assert not torch.equal(found[0]["0"], found[1]["0"])


def test_tensors_without_factors_have_the_diagonal_of_their_own():
    """Few entries in all: exact."""
    model = randomized(posteriors.Normed())
    x = randn(N, 5, seed=1)
    objective = posteriors.objective(model, x, LABELS)
    groups, fallback = groups_of(objective)
    rest = [group.name for group in groups if group.layer is None]
    assert rest == ["scale", "norm.weight", "norm.bias"] == list(fallback)
    axes = random_axes(groups[:2]) | {name: Axes() for name in rest}
    found = curvature_along(objective, groups, axes)
    G = reference_gauss_newton(model, nn.CrossEntropyLoss(), x, LABELS)
    for group in groups:
        assert relative_error(found[group.name], dense_curvature(model, group, axes[group.name], G)) < 1e-11


def test_layers_without_factors_have_the_diagonal_of_their_own():
    """Called twice: the weight's and the bias's 20 entries, exactly."""
    model, x = randomized(networks.Twice(), scale=0.3), randn(N, 4, seed=1)
    objective = posteriors.objective(model, x, LABELS)
    groups, fallback = groups_of(objective)
    found = curvature_along(objective, groups, {group.name: Axes() for group in groups})
    G = reference_gauss_newton(model, nn.CrossEntropyLoss(), x, LABELS)
    assert list(fallback) == ["shared.weight", "shared.bias"]
    for group in groups:
        assert relative_error(found[group.name], dense_curvature(model, group, Axes(), G)) < 1e-11


def test_many_entries_without_factors_are_sampled():
    replicates, x = 40, randn(N, TENSOR_PROBES, seed=1)
    model = randomized(nn.Sequential(nn.LayerNorm(TENSOR_PROBES), nn.Linear(TENSOR_PROBES, 3)))
    objective = posteriors.objective(model, x, LABELS)
    groups, fallback = groups_of(objective)
    axes = {group.name: Axes() for group in groups}
    found = [curvature_along(objective, groups, axes, seed) for seed in range(replicates)]
    assert list(fallback) == ["0.weight", "0.bias"]
    G = reference_gauss_newton(model, nn.CrossEntropyLoss(), x, LABELS)
    for group in groups[1:]:
        several = torch.stack([each[group.name] for each in found])
        assert bool((several >= 0).all()) and not torch.equal(several[0], several[1])
        exact = dense_curvature(model, group, Axes(), G)
        # Cutting off below 0 moves small entries up: the largest ones tell.
        large = exact > 0.5 * exact.max()
        error = several.std(0) / replicates**0.5
        assert bool(((several.mean(0) - exact).abs() < 4 * error)[large].all())
        assert bool((error < 0.1 * exact)[large].all())


def test_curvature_that_is_not_finite_is_refused():
    model = posteriors.mlp()
    objective = posteriors.objective(model, randn(N, 5, seed=1), LABELS)
    groups, _ = groups_of(objective)
    axes = {group.name: Axes() for group in groups}
    axes["0"] = Axes(torch.full((7, 7), torch.nan, dtype=F64), torch.eye(6, dtype=F64))
    with pytest.raises(DataError, match=r"the curvature of '0' is not finite"):
        curvature_along(objective, groups, axes)


@pytest.mark.parametrize("name", ["no bias", "bias", "bias first", "convolutions", "tokens"])
def test_kronecker_axes_are_the_factors_eigenvectors(name):
    make, x = CASES[name]
    model = make()
    objective = hs.Objective(model, "cross_entropy", cut(x, LABELS))
    groups, _ = groups_of(objective)
    axes = kronecker_axes(objective, groups)
    for group in groups:
        own = axes[group.name]
        assert own.name == "kronecker"
        output, moment = 0, 0
        for X, M in networks.brute_force(model, group.name, x):
            output, moment = output + torch.einsum("totu->ou", M) / N, moment + X.T @ X / len(X) / N
        for basis, factor in ((own.left, output), (own.right, moment)):
            assert relative_error(basis.T @ basis, torch.eye(len(factor), dtype=F64)) < 1e-13
            turned = basis.T @ factor @ basis
            assert float((turned - torch.diag(turned.diagonal())).abs().max()) < 1e-12 * float(turned.abs().max())


def test_other_tensors_keep_their_parameters_as_axes():
    objective = posteriors.objective(randomized(posteriors.Normed()), randn(N, 5, seed=1), LABELS)
    groups, fallback = groups_of(objective)
    axes = kronecker_axes(objective, groups)
    assert {name: own.name for name, own in axes.items()} == {
        "first": "kronecker",
        "last": "kronecker",
        **dict.fromkeys(fallback, "parameters"),
    }


class Grouped(nn.Module):
    """A convolution with groups, a layer that is not called through its module, and one whose inputs are shared."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 2, groups=2)
        self.hidden, self.last = nn.Linear(18, 4), nn.Linear(4, 3)
        self.table = nn.Linear(2, 4)

    def forward(self, x):
        h = nn.functional.linear(self.conv(x).flatten(1), self.hidden.weight, self.hidden.bias)
        return self.last(torch.tanh(h + self.table(torch.eye(2).to(x)).sum(0)))


class Tied(nn.Module):
    """Two modules with one weight."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.last(torch.relu(self.second(torch.relu(self.first(x)))))


# network, inputs -> layers with factors, and by tensor a word of the reason of others
REASONS = {
    "mlp": (posteriors.mlp, randn(N, 5, seed=1), ["0", "2"], {}),
    "layer norm": (
        posteriors.Normed,
        randn(N, 5, seed=1),
        ["first", "last"],
        {
            "scale": "its module is no layer but a Normed",
            "norm.weight": "its module is no layer but a LayerNorm",
            "norm.bias": "LayerNorm",
        },
    ),
    "called twice": (
        networks.Twice,
        randn(N, 4, seed=1),
        ["last"],
        {"shared.weight": "is used 2 times", "shared.bias": "is used 2 times"},
    ),
    "tied": (
        Tied,
        randn(N, 5, seed=1),
        ["last"],
        {
            "first.weight": "shares its weight with 'second'",
            "first.bias": "shares its weight",
            "second.bias": "shares its weight with 'first'",
        },
    ),
    "grouped": (
        Grouped,
        randn(N, 2, 4, 4, seed=1),
        ["last"],
        {
            "conv.weight": "2 groups",
            "conv.bias": "2 groups",
            "hidden.weight": "is not called",
            "hidden.bias": "is not called",
            "table.weight": "does not count samples",
            "table.bias": "does not count samples",
        },
    ),
    "one layer alone": (lambda: nn.Linear(5, 3), randn(N, 5, seed=1), [""], {}),
}


@pytest.mark.parametrize("name", REASONS)
def test_groups_cover_every_parameter_once_and_say_why(name):
    make, x, layers, reasons = REASONS[name]
    objective = posteriors.objective(randomized(make()), x, LABELS)
    groups, fallback = groups_of(objective)
    assert [group.name for group in groups if group.layer is not None] == layers
    assert sorted(key for group in groups for key in group.parameters) == sorted(objective.parameters.names)
    assert len({group.name for group in groups}) == len(groups)
    sizes = dict(zip(objective.parameters.names, objective.parameters.sizes, strict=True))
    for group in groups:
        assert np.prod(group.shape) == sum(sizes[key] for key in group.parameters)
    assert fallback.keys() == reasons.keys()
    for key, words in reasons.items():
        assert words in fallback[key], fallback[key]


def test_frozen_parameters_are_in_no_group():
    model = posteriors.mlp()
    model[0].bias.requires_grad_(False)
    model[2].weight.requires_grad_(False)
    groups, fallback = groups_of(posteriors.objective(model, randn(N, 5, seed=1), LABELS))
    assert [group.parameters for group in groups] == [("0.weight",), ("2.bias",)]
    assert groups[0].shape == (7, 5)
    assert "has no trainable weight" in fallback["2.bias"]


def test_sides_beyond_the_limit_are_not_decomposed(monkeypatch):
    monkeypatch.setattr(axes_module, "MOST_SIDE", 7)
    objective = posteriors.objective(posteriors.mlp(), randn(N, 5, seed=1), LABELS)
    groups, fallback = groups_of(objective)
    assert [group.name for group in groups] == ["0", "2.weight", "2.bias"]  # 7 x 6, and 3 x 8
    assert fallback["2.weight"] == "its module has a side of 8, and factors beyond 7 are not decomposed"
