"""Classifiers trained on the spot: what they reach, what they depend on, and as models of a study."""

import tomllib

import pytest
import torch
from torch import nn
from torch.nn import functional

import hesscope as hs
from hesscope.core.errors import InputError
from hesscope.data import LabelledData, digits, photographs
from hesscope.models import MLP, ConvNet, NormalizedMLP, ResNet
from hesscope.study.classifiers import trained, training_data
from hesscope.study.loading import load_data, load_model
from tests.helpers import F64

SMALL = {"lenet5": {}, "vgg": {"width": 2}, "resnet": {"width": 2, "depth": 8}}


@torch.no_grad()
def accuracy(model, data):
    return float((model(data.inputs).argmax(dim=1) == data.labels).double().mean())


@torch.no_grad()
def loss(model, data):
    return float(functional.cross_entropy(model(data.inputs), data.labels))


@pytest.mark.parametrize("normalization", [None, "batch", "layer"])
def test_an_mlp_learns_the_digits(normalization):
    model = trained(normalization=normalization)
    assert type(model) is (MLP if normalization is None else NormalizedMLP)
    assert model.widths == (64, 32, 32, 10)
    assert not model.training
    assert accuracy(model, digits()) > 0.99


@pytest.mark.parametrize(("network", "kind"), [("lenet5", ConvNet), ("vgg", ConvNet), ("resnet", ResNet)])
@pytest.mark.parametrize("normalization", [None, "batch"])
def test_convolutional_networks_learn_the_digits(network, kind, normalization):
    options = {"lenet5": {}, "vgg": {"width": 8}, "resnet": {"width": 8, "depth": 8}}[network]
    model = trained(network, epochs=3, normalization=normalization, **options)
    assert type(model) is kind
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules()) == (normalization == "batch")
    assert accuracy(model, training_data(network)) > 0.8


def test_an_mlp_tells_the_photographs_apart():
    model = trained(data="photographs", epochs=2)
    assert accuracy(model, training_data(data="photographs")) > 0.85
    regions = {"kind": "region", "regions": [1, 2], "samples": 2000}
    model = trained(data="photographs", epochs=4, data_arguments=regions)
    assert model.widths == (192, 32, 32, 4)
    assert accuracy(model, training_data(data="photographs", data_arguments=regions)) > 0.6  # 0.25 by chance


def test_synthetic_data():
    easy = {"N": 300, "d": 12, "C": 3}
    model = trained(data="clusters", data_arguments=easy, epochs=20, widths=[12, 16, 3], activation="tanh", bias=True)
    assert model.widths == (12, 16, 3) and model.activation == "tanh" and model.fc1.bias is not None
    assert accuracy(model, training_data(data="clusters", data_arguments=easy)) > 0.99
    assert trained(data="gaussian", epochs=1).widths == (32, 32, 32, 10)


def test_more_epochs_lower_the_loss():
    data = digits()
    losses = [loss(trained(epochs=epochs), data) for epochs in (1, 3, 9)]
    assert losses[0] > 2 * losses[1] > 4 * losses[2]


@pytest.mark.parametrize("network", ["mlp", *SMALL])
@pytest.mark.parametrize("normalization", [None, "batch"])
def test_equal_arguments_give_equal_networks_and_seeds_different_ones(network, normalization):
    options = {"samples": 150, "epochs": 2, "normalization": normalization, **SMALL.get(network, {})}
    before = torch.get_rng_state()
    a, again, b = (trained(network, seed=seed, **options) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), again.state_dict().values(), strict=True))
    assert not torch.equal(next(a.parameters()), next(b.parameters()))


def test_the_seed_orders_the_samples_too(monkeypatch):
    """With the same initialization, other seeds see other batches."""
    from hesscope.study import classifiers

    monkeypatch.setitem(classifiers.NETWORKS, "mlp", lambda widths, normalization, seed, dtype: MLP(widths))
    a, b = (trained(seed=seed, epochs=1) for seed in (0, 1))
    assert not torch.equal(a.fc1.weight, b.fc1.weight)


def test_the_data_is_the_same_for_all_seeds_and_in_the_networks_shape():
    assert torch.equal(training_data().inputs, digits().inputs)
    assert torch.equal(training_data("lenet5").inputs, digits(image=True).inputs)
    assert training_data("resnet", "photographs", samples=5).inputs.shape == (5, 3, 8, 8)
    some = training_data("mlp", "photographs", 5, {"kind": "region"})
    assert torch.equal(some.inputs, photographs("region", flat=True).inputs[:5])
    assert some.classes == 16 and len(some.labels) == 5
    assert trained(epochs=1, data_arguments={"dtype": F64}).fc1.weight.dtype == F64


@pytest.mark.parametrize("network", ["mlp", *SMALL])
def test_batch_norms_are_centred_on_the_training_data_exactly(network):
    options = {"normalization": "batch", "samples": 200, "epochs": 2, "data_arguments": {"dtype": F64}}
    model = trained(network, **options, **SMALL.get(network, {}))
    norms = {n: m for n, m in model.named_modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))}
    assert len(norms) >= 3
    received = {}
    for name, norm in norms.items():
        norm.register_forward_pre_hook(lambda _, arguments, name=name: received.update({name: arguments[0]}))
    model(training_data(network, samples=200, data_arguments={"dtype": F64}).inputs)
    for name, norm in norms.items():
        h = received[name].detach().transpose(0, 1).flatten(1)
        scale = h.square().mean().sqrt()
        assert (h.mean(dim=1) - norm.running_mean).abs().max() < 1e-12 * scale
        assert (h.var(dim=1, correction=0) - norm.running_var).abs().max() < 1e-12 * scale**2


def test_no_hook_is_left_behind():
    model = trained("lenet5", epochs=1, samples=100, normalization="batch")
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_last_batch_of_one_sample_does_not_happen():
    assert trained(samples=65, epochs=1, normalization="batch").widths[0] == 64


def test_the_first_samples_only():
    model = trained(samples=100, epochs=40)
    first = training_data(samples=100)
    assert torch.equal(first.inputs, digits().inputs[:100])
    assert accuracy(model, first) == 1
    assert accuracy(model, digits()) < 0.95


def test_progress():
    seen = []
    trained(samples=50, epochs=3, progress=lambda done, planned: seen.append((done, planned)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


STUDY = """
model = "hesscope.study.classifiers:trained"
model_arguments = { network = "lenet5", data = "photographs", epochs = 1, samples = 200, normalization = "batch" }
data = "hesscope.study.classifiers:training_data"
data_arguments = { network = "lenet5", data = "photographs", samples = 200, data_arguments = { kind = "region" } }
"""


def test_as_model_and_data_of_a_study():
    study = tomllib.loads(STUDY)
    study["model_arguments"]["data_arguments"] = study["data_arguments"]["data_arguments"]
    model = load_model(study["model"], study["model_arguments"], None)
    objective = hs.Objective(model, "cross_entropy", load_data(study["data"], study["data_arguments"], "cross_entropy"))
    assert objective.num_terms == 200
    assert isinstance(model, ConvNet) and model.fc3.out_features == 16
    with pytest.raises(InputError, match=r"^network = 'mlp' takes no argument 'widhts'"):
        load_model(study["model"], {"widhts": [64, 10]}, None)


def test_at_a_trained_network_the_gradient_is_small():
    model, data = trained(), digits()
    start = hs.models.mlp((64, 32, 32, 10))
    ends = [hs.Objective(m, "cross_entropy", data.batch("cross_entropy")).gradient().norm() for m in (model, start)]
    assert ends[0] < 0.05 * ends[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"network": "lenet"}, "network must be one of 'mlp', 'lenet5', .*, got 'lenet', did you mean 'lenet5'"),
        ({"data": "digit"}, "data must be one of 'digits', .*, got 'digit', did you mean 'digits'"),
        ({"epochs": 0}, "epochs must be a positive integer, got 0"),
        ({"samples": 1798}, "samples must be at most 1797, all that digits has, got 1798"),
        ({"samples": -1}, "samples must be a positive integer, got -1"),
        (
            {"network": "vgg", "data": "gaussian"},
            "network = 'vgg' takes images, data = 'digits' or 'photographs', got 'gaussian'",
        ),
        ({"widths": [60, 5, 10]}, r"widths must begin with d = 64 and end with C = 10, got \[60, 5, 10\]"),
        ({"widths": [64]}, r"widths must begin with d = 64 and end with C = 10, got \[64\]"),
        ({"width": 3}, "network = 'mlp' takes no argument 'width'; it takes activation, .*, did you mean 'widths'"),
        ({"network": "resnet", "C": 3}, "network = 'resnet' takes no argument 'C'; it takes depth, "),
        ({"data_arguments": {"N": 3}}, "data = 'digits' takes no argument 'N'; it takes dtype, standardize"),
        ({"data_arguments": {"flat": True}}, "data = 'digits' takes no argument 'flat'"),
        ({"normalization": "bath"}, "normalization must be one of 'batch', 'layer', got 'bath', did you mean 'batch'"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(InputError, match=f"^{message}"):
        trained(**arguments)


def test_training_data_is_labelled_data():
    assert isinstance(training_data(), LabelledData)
