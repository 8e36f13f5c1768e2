"""ParameterSpace: the correspondence between tensors and one flat vector."""

import pytest
import torch
from torch import nn

from hesscope.core.errors import InputError, ModelError
from hesscope.core.vectors import ParameterSpace
from tests.helpers import F64, flat_parameters, randn


def model():
    return nn.Sequential(nn.Conv2d(2, 3, 2), nn.Linear(4, 2, bias=False)).double()


def tensors(model):
    return {name: p.detach() for name, p in model.named_parameters()}


def test_order_shapes_and_sizes_are_those_of_named_parameters():
    space = ParameterSpace.of(model())
    assert space.names == ("0.weight", "0.bias", "1.weight")
    assert space.shapes == ((3, 2, 2, 2), (3,), (2, 4))
    assert space.sizes == (24, 3, 8)
    assert space.size == 35
    assert (space.dtype, space.device) == (F64, torch.device("cpu"))
    assert [space.slice(name) for name in space.names] == [slice(0, 24), slice(24, 27), slice(27, 35)]


def test_round_trip():
    net = model()
    space = ParameterSpace.of(net)
    vector = space.flatten(tensors(net))
    assert torch.equal(vector, flat_parameters(net))
    back = space.unflatten(vector)
    assert list(back) == list(space.names)
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors(net).items())
    assert torch.equal(space.flatten(dict(reversed(back.items()))), vector)  # the dict's order does not matter


def test_flattening_is_row_major_whatever_the_memory_layout():
    net = nn.Linear(3, 2, bias=False).double()
    matrix = randn(3, 2, seed=0).T
    assert not matrix.is_contiguous()
    vector = ParameterSpace.of(net).flatten({"weight": matrix})
    assert torch.equal(vector[3:], matrix[1])


def test_unflatten_keeps_the_derivative():
    space = ParameterSpace.of(model())
    vector = torch.ones(35, dtype=F64, requires_grad=True)
    space.unflatten(vector)["0.bias"].sum().backward()
    assert torch.equal(vector.grad[24:27], torch.ones(3, dtype=F64))
    assert vector.grad.sum() == 3


def test_frozen_parameters_are_left_out_and_tied_ones_count_once():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    net[0].bias.requires_grad_(False)
    assert ParameterSpace.of(net).names == ("0.weight", "1.bias")


def test_scalars_are_parameters_too():
    net = nn.Module()
    net.register_parameter("s", nn.Parameter(torch.tensor(2.0)))
    space = ParameterSpace.of(net)
    assert (space.size, space.shapes) == (1, ((),))
    assert space.unflatten(torch.tensor([3.0]))["s"] == 3.0


def two_dtypes():
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double())


def two_devices():
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (nn.ReLU, "has no trainable parameter.*requires_grad=True"),
        (lambda: nn.Linear(2, 2).requires_grad_(False), "has no trainable parameter"),
        (two_dtypes, "must share one dtype, found torch.float32, torch.float64"),
        (two_devices, "must share one device, found cpu, meta"),
        (lambda: nn.Linear(2, 2, dtype=torch.complex64), "must be real floating-point numbers, found torch.complex64"),
    ],
)
def test_models_without_a_parameter_space(make, message):
    with pytest.raises(ModelError, match=message):
        ParameterSpace.of(make())


def test_a_layer_whose_shape_is_not_known_yet():
    with pytest.raises(ModelError, match=r"weight"):
        ParameterSpace.of(nn.LazyLinear(2))


BAD_TENSORS = {
    "missing": (lambda t: {k: v for k, v in t.items() if k != "0.bias"}, "missing: 0.bias; unknown: none"),
    "unknown": (lambda t: {**t, "z": t["0.bias"]}, "missing: none; unknown: z"),
    "shape": (lambda t: {**t, "0.bias": t["0.bias"][:2]}, r"0.bias has shape \(2,\), expected \(3,\)"),
    "transposed": (lambda t: {**t, "1.weight": t["1.weight"].T}, r"1.weight has shape \(4, 2\), expected \(2, 4\)"),
}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_flatten_refuses(name):
    change, message = BAD_TENSORS[name]
    net = model()
    with pytest.raises(InputError, match=message):
        ParameterSpace.of(net).flatten(change(tensors(net)))


@pytest.mark.parametrize("shape", [(34,), (36,), (35, 1), ()])
def test_unflatten_refuses(shape):
    with pytest.raises(InputError, match=r"needs a vector of shape \(35,\), got"):
        ParameterSpace.of(model()).unflatten(torch.zeros(shape))


def test_slice_refuses_unknown_names():
    with pytest.raises(InputError, match=r"no parameter is named 'z'; the names are 0.weight, 0.bias, 1.weight"):
        ParameterSpace.of(model()).slice("z")
