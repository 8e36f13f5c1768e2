"""Fully connected networks with norms in front of their layers: what they compute, and which Hessian they have."""

import pytest
import torch
from torch.nn import functional

import hesscope as hs
from hesscope.core.errors import InputError
from hesscope.models import MLP, NormalizedMLP, mlp
from tests.helpers import F64, randint, randn, relative_error

EPS = 1e-5  # PyTorch's


def settled(model, seed=5):
    """The model with running statistics away from 0 and 1, in eval mode."""
    for number, (name, buffer) in enumerate(sorted(model.named_buffers())):
        if name.endswith(("running_mean", "running_var")):
            buffer.copy_(randn(*buffer.shape, seed=seed + number).abs() + 0.5)
    return model.eval()


def norm_of(model, layer, h):
    norm = model.get_submodule(f"{layer}_norm")
    if model.normalization == "batch":
        return (h - norm.running_mean) / (norm.running_var + EPS).sqrt()
    centred = h - h.mean(dim=1, keepdim=True)
    return centred / (centred.square().mean(dim=1, keepdim=True) + EPS).sqrt()


@pytest.mark.parametrize("normalization", ["batch", "layer"])
@pytest.mark.parametrize("bias", [False, True])
def test_forward(normalization, bias):
    model = settled(mlp((4, 6, 5, 3), "tanh", seed=1, dtype=F64, normalization=normalization, bias=bias))
    model.normalization = normalization
    if bias:
        torch.nn.init.constant_(model.fc2.bias, 0.3)
    x = h = randn(7, 4, seed=2)
    for layer in ("fc1", "fc2", "fc3"):
        module = model.get_submodule(layer)
        h = functional.linear(norm_of(model, layer, h), module.weight, module.bias)
        h = h if layer == "fc3" else torch.tanh(h)
    assert relative_error(model(x).detach(), h.detach()) < 1e-14


def test_in_train_mode_batch_norm_centres_what_every_layer_receives():
    model = mlp((4, 6, 3), normalization="batch", seed=1, dtype=F64)
    received = {}
    for layer in ("fc1", "fc2"):
        model.get_submodule(layer).register_forward_pre_hook(
            lambda _, arguments, layer=layer: received.update({layer: arguments[0]})
        )
    model(randn(50, 4, seed=2) + 3)
    for h in received.values():
        assert h.mean(dim=0).abs().max() < 1e-14
        assert (h.var(dim=0, correction=0) - 1).abs().max() < 1e-3


@pytest.mark.parametrize("normalization", ["batch", "layer"])
def test_norms_add_no_parameters_and_leave_the_initial_weights_alone(normalization):
    plain, normed = mlp((4, 6, 3), seed=3), mlp((4, 6, 3), seed=3, normalization=normalization)
    assert type(plain) is MLP and type(normed) is NormalizedMLP
    weights = dict(normed.named_parameters())
    assert list(weights) == ["fc1.weight", "fc2.weight"]
    assert all(torch.equal(weights[name], parameter) for name, parameter in plain.named_parameters())
    assert [name for name, _ in normed.named_children()] == ["fc1", "fc2", "fc1_norm", "fc2_norm"]
    assert hs.Partition.by_layer(normed).labels == hs.Partition.by_layer(plain).labels
    assert normed.double()(randn(2, 4, seed=0)).shape == (2, 3)


@pytest.mark.parametrize("normalization", ["batch", "layer"])
def test_in_eval_mode_samples_are_independent(normalization):
    model, x = settled(mlp((4, 6, 3), normalization=normalization, dtype=F64)), randn(9, 4, seed=2)
    alone = torch.cat([model(row[None]) for row in x])
    assert relative_error(model(x).detach(), alone.detach()) < 1e-14
    if normalization == "batch":  # which it is not in train mode
        model.train()
        assert relative_error(model(x).detach(), model(x[:5]).detach().repeat(2, 1)[:9]) > 0.01


@pytest.mark.parametrize("normalization", ["batch", "layer"])
@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_the_closed_form_of_plain_networks_is_not_used_and_the_hessian_is_right(normalization, loss):
    model = settled(mlp((4, 5, 3), "tanh", seed=1, dtype=F64, normalization=normalization, bias=True))
    x, labels = randn(20, 4, seed=2) + 1, randint(3, 20, seed=3)
    targets = labels if loss == "cross_entropy" else functional.one_hot(labels, 3).double()
    hessian = hs.Hessian(hs.Objective(model, loss, (x, targets)))
    assert not hessian.has_closed_form
    plain = hs.Objective(mlp((4, 5, 3), "tanh", dtype=F64, bias=True), loss, (x, targets))
    assert hs.Hessian(plain).has_closed_form

    space = hs.ParameterSpace.of(model)
    criterion = {"cross_entropy": functional.cross_entropy, "mse": functional.mse_loss}[loss]

    def value(theta):
        return criterion(torch.func.functional_call(model, space.unflatten(theta), (x,)), targets)

    theta = space.flatten({name: parameter.detach() for name, parameter in model.named_parameters()})
    truth = torch.autograd.functional.hessian(value, theta)
    assert relative_error(hessian.dense(), truth) < 1e-12


@pytest.mark.parametrize("make", [mlp, lambda widths, normalization: NormalizedMLP(widths, normalization)])
def test_bad_input(make):
    with pytest.raises(InputError, match=r"^normalization must be one of 'batch', 'layer', got 'btach', did you mean"):
        make((4, 3), normalization="btach")
    with pytest.raises(InputError, match=r"^widths must name at least the inputs and the outputs"):
        make((4,), normalization="batch")
