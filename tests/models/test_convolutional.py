"""Convolutional networks against what the papers say, written out again with functions of their parameters."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import hesscope as hs
from hesscope.core.errors import InputError
from hesscope.models import lenet5, resnet, vgg
from tests.helpers import F64, randint, randn, relative_error

MAKERS = {"lenet5": lenet5, "vgg": vgg, "resnet": resnet}
EPS = 1e-5  # PyTorch's


def small(name, normalization, **options):
    """A network for images [N, 2, 8, 8] and 3 classes."""
    options = {"vgg": {"width": 2, "size": 8}, "resnet": {"width": 2, "depth": 14}, "lenet5": {"size": 8}}[
        name
    ] | options
    return MAKERS[name](3, channels=2, normalization=normalization, dtype=F64, **options)


def away_from_defaults(model, seed=5):
    """The model in eval mode, with biases, scales, shifts and running statistics that are not 0 or 1."""
    for number, (name, tensor) in enumerate(model.state_dict().items()):
        if name.endswith("num_batches_tracked"):
            continue
        values = randn(*tensor.shape, seed=seed + number)
        if name.endswith("running_var") or ("bn" in name and name.endswith("weight")):
            tensor.copy_(values.abs() + 0.5)
        elif name.endswith(("bias", "running_mean")):
            tensor.copy_(values / 2)
    return model.eval()


def shaped(values):
    return values[None, :, None, None]


def reference(name, state, x):
    """The networks again, from the parameters and buffers alone."""

    def conv(layer, h, padding=1, stride=1):
        return functional.conv2d(h, state[f"{layer}.weight"], state.get(f"{layer}.bias"), stride, padding)

    def batch_norm(norm, h):
        if f"{norm}.running_mean" not in state:
            return h
        mean, variance = state[f"{norm}.running_mean"], state[f"{norm}.running_var"]
        scale, shift = (
            state.get(f"{norm}.{end}", torch.full_like(mean, one)) for end, one in (("weight", 1), ("bias", 0))
        )
        a, b = scale / (variance + EPS).sqrt(), shift - mean * scale / (variance + EPS).sqrt()
        return h * (shaped(a) if h.ndim == 4 else a) + (shaped(b) if h.ndim == 4 else b)

    def linear(layer, h):
        return h @ state[f"{layer}.weight"].T + state[f"{layer}.bias"]

    def averages(h):
        N, c, height, width = h.shape
        h = h[:, :, : height // 2 * 2, : width // 2 * 2]
        return h.reshape(N, c, height // 2, 2, width // 2, 2).mean(dim=(3, 5))

    h = x
    if name == "lenet5":
        paddings = {8: (2, 2), 28: (2, 0), 32: (0, 0)}[x.shape[-1]]
        for layer, padding in zip(("conv1", "conv2"), paddings, strict=True):
            h = averages(conv(layer, batch_norm(f"{layer}_norm", h), padding).clamp(min=0))
        for layer in ("fc1", "fc2"):
            h = linear(layer, batch_norm(f"{layer}_norm", h.flatten(1))).clamp(min=0)
        return linear("fc3", batch_norm("fc3_norm", h))
    if name == "vgg":
        for number in range(1, 7):
            h = conv(f"conv{number}", batch_norm(f"conv{number}_norm", h)).clamp(min=0)
            h = averages(h) if number % 2 == 0 else h
        h = linear("fc1", batch_norm("fc1_norm", h.flatten(1))).clamp(min=0)
        return linear("fc2", batch_norm("fc2_norm", h))

    blocks = len({key.split(".")[0] for key in state if key.startswith("block")})
    scale = 1 if "bn1.weight" in state else blocks**-0.5
    h = batch_norm("bn1", conv("conv1", h)).clamp(min=0)
    for number in range(blocks):
        block, stride = f"block{number + 1}", 2 if number in (blocks // 3, 2 * blocks // 3) else 1
        branch = batch_norm(f"{block}.bn1", conv(f"{block}.conv1", h, stride=stride)).clamp(min=0)
        branch = batch_norm(f"{block}.bn2", conv(f"{block}.conv2", branch))
        shortcut = torch.zeros_like(branch)
        shortcut[:, : h.shape[1]] = h[:, :, ::stride, ::stride]
        h = (shortcut + scale * branch).clamp(min=0)
    return linear("fc1", h.mean(dim=(2, 3)))


@pytest.mark.parametrize("normalization", [None, "batch"])
@pytest.mark.parametrize("name", MAKERS)
def test_forward(name, normalization):
    model, x = away_from_defaults(small(name, normalization, seed=1)), randn(4, 2, 8, 8, seed=2)
    assert relative_error(model(x).detach(), reference(name, model.state_dict(), x)) < 1e-13


@pytest.mark.parametrize("size", [28, 32])
@pytest.mark.parametrize("name", MAKERS)
def test_forward_on_larger_images(name, size):
    options = {} if name == "resnet" else {"size": size}
    model, x = small(name, "batch", **options).eval(), randn(2, 2, size, size, seed=2)
    assert relative_error(model(x).detach(), reference(name, model.state_dict(), x)) < 1e-13


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_sizes_are_those_of_the_papers():
    # LeNet-5 with all maps connected and a linear output layer: 61,706 for 28 x 28 and for 32 x 32 digits.
    assert parameters(lenet5(10)) == parameters(lenet5(10, size=32)) == 61706
    assert [lenet5(10, size=size).fc1.in_features for size in (8, 28, 32)] == [64, 400, 400]
    # He et al. 2016, table 6: 0.27, 0.46, 0.66 and 0.85 million for depths 20, 32, 44, 56.
    assert parameters(resnet(10)) == 269722
    assert [round(parameters(resnet(10, depth=depth)) / 1e6, 2) for depth in (32, 44, 56)] == [0.46, 0.66, 0.85]
    # A layer is what has weights: depth counts them.
    for depth in (8, 20):
        layers = [m for m in resnet(10, depth=depth).modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        assert len(layers) == depth
    assert len([m for m in vgg(10).modules() if isinstance(m, (nn.Conv2d, nn.Linear))]) == 8


def test_names():
    assert [name for name, _ in lenet5(10, normalization="batch").named_parameters() if "weight" in name] == [
        f"{layer}.weight" for layer in ("conv1", "conv2", "fc1", "fc2", "fc3")
    ]
    assert [name for name, _ in vgg(10).named_children()] == [f"conv{i}" for i in range(1, 7)] + ["fc1", "fc2"]
    found = [name for name, _ in resnet(10, depth=8, normalization=None).named_parameters()]
    convolutions = [f"block{block}.conv{number}.weight" for block in (1, 2, 3) for number in (1, 2)]
    assert found == ["conv1.weight", *convolutions, "fc1.weight", "fc1.bias"]


@pytest.mark.parametrize("name", MAKERS)
def test_weights_have_variance_2_over_fan_in_and_the_last_1(name):
    model = MAKERS[name](100, seed=4, dtype=F64)
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    for layer in layers:
        w = layer.weight.detach().flatten() * (layer.weight[0].numel() / (1 if layer is layers[-1] else 2)) ** 0.5
        n = len(w)
        assert abs(w.mean()) < 4 / n**0.5
        assert abs(w.var() - 1) < 4 * (2 / n) ** 0.5
        assert layer.bias is None or torch.all(layer.bias == 0)


@pytest.mark.parametrize("normalization", [None, "batch"])
@pytest.mark.parametrize("name", MAKERS)
def test_seeds_and_layers_have_their_own_numbers(name, normalization):
    before = torch.get_rng_state()
    a, again, b = (small(name, normalization, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), again.state_dict().values(), strict=True))
    layers = [(m, n) for m, n in zip(a.modules(), b.modules(), strict=True) if isinstance(m, (nn.Conv2d, nn.Linear))]
    beginnings = torch.stack([layer.weight.detach().flatten()[:18] for pair in layers for layer in pair])
    assert (torch.corrcoef(beginnings) - torch.eye(len(beginnings))).abs().max() < 0.95


@pytest.mark.parametrize("normalization", [None, "batch"])
@pytest.mark.parametrize("name", MAKERS)
def test_in_eval_mode_samples_are_independent(name, normalization):
    model, x = away_from_defaults(small(name, normalization)), randn(5, 2, 8, 8, seed=2)
    alone = torch.cat([model(image[None]) for image in x])
    assert relative_error(model(x).detach(), alone.detach()) < 1e-13
    model.train()  # in which batch norm makes them depend on each other
    distance = relative_error(model(x)[:2].detach(), model(x[:2]).detach())
    assert distance > 0.01 if normalization else distance < 1e-13


@pytest.mark.parametrize("normalization", [None, "batch"])
@pytest.mark.parametrize("name", MAKERS)
def test_a_few_steps_lower_the_loss(name, normalization):
    options = {} if name == "lenet5" else {"width": 4}
    options |= {"depth": 20} if name == "resnet" else {}
    model, x, y = small(name, normalization, **options), randn(32, 2, 8, 8, seed=2), randint(3, 32, seed=3)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] < 2.5  # log 3 = 1.1 for a network that knows nothing
    assert losses[-1] < 0.7 * losses[0]


def test_without_normalization_outputs_do_not_grow_with_depth():
    """The variance of a block's output is at most (1 + 1/L) times that of its input, so e times in all."""
    x = randn(16, 3, 8, 8, seed=2)
    sizes = []
    for depth in (8, 20, 56):
        models = [resnet(10, depth=depth, normalization=None, seed=seed, dtype=F64) for seed in range(4)]
        with torch.no_grad():
            sizes.append(float(torch.cat([model(x) for model in models]).square().mean()))
    assert max(sizes) < 2 * min(sizes)


@pytest.mark.parametrize("normalization", [None, "batch"])
@pytest.mark.parametrize("name", MAKERS)
def test_the_hessian_can_be_measured(name, normalization):
    """Products against differences of the gradient, which ReLU's kinks permit up to the step."""
    model = away_from_defaults(small(name, normalization))
    x, y = randn(6, 2, 8, 8, seed=2), randint(3, 6, seed=3)
    objective = hs.Objective(model, "cross_entropy", (x, y))
    hessian = hs.Hessian(objective)
    assert not hessian.has_closed_form
    v = randn(objective.parameters.size, seed=7)
    product, step = hessian @ v, 1e-7
    gradients = []
    for sign in (1, -1):
        moved = small(name, normalization)
        moved.load_state_dict(model.state_dict())
        with torch.no_grad():
            for key, change in objective.parameters.unflatten(sign * step * v).items():
                moved.get_parameter(key).add_(change)
        gradients.append(hs.Objective(moved, "cross_entropy", (x, y)).gradient())
    assert relative_error((gradients[0] - gradients[1]) / (2 * step), product) < 1e-5


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (lenet5, {"C": 0}, "C must be a positive integer, got 0"),
        (lenet5, {"C": 10, "channels": 1.5}, "channels must be a positive integer, got 1.5"),
        (lenet5, {"C": 10, "size": 7}, "size must be at least 8, got 7"),
        (lenet5, {"C": 10, "normalization": "layer"}, "normalization must be one of 'batch', got 'layer'"),
        (vgg, {"C": 10, "size": 4}, "size must be at least 8, got 4"),
        (vgg, {"C": 10, "width": 0}, "width must be a positive integer, got 0"),
        (resnet, {"C": 10, "depth": 18}, r"depth must be 6n \+ 2 \(8, 14, 20, ...\), got 18"),
        (resnet, {"C": 10, "depth": 2}, r"depth must be 6n \+ 2 \(8, 14, 20, ...\), got 2"),
        (resnet, {"C": 10, "normalization": "bach"}, "normalization must be one of 'batch', got 'bach', did you mean"),
    ],
)
def test_bad_input(make, arguments, message):
    with pytest.raises(InputError, match=f"^{message}"):
        make(**arguments)
