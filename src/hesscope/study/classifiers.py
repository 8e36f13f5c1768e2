"""Classifiers trained on the spot, for a STUDY.toml whose model needs no checkpoint, with the data that they saw.

In both functions `network`, `data`, `samples` and `data_arguments` mean the same, so that a study measures a network on
what it was trained on:

    model = "hesscope.study.classifiers:trained"
    model_arguments = { network = "lenet5", data = "digits", seed = 1 }
    data = "hesscope.study.classifiers:training_data"
    data_arguments = { network = "lenet5", data = "digits" }
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hesscope.core.checks import nearest, require_choice, require_positive_int
from hesscope.core.errors import InputError
from hesscope.core.rng import permutation, stream
from hesscope.data import LabelledData, clusters, digits, gaussian, photographs
from hesscope.models import lenet5, mlp, resnet, vgg
from hesscope.study.training import Examples, train_epoch

NETWORKS: dict[str, Callable[..., nn.Module]] = {"mlp": mlp, "lenet5": lenet5, "vgg": vgg, "resnet": resnet}
DATA: dict[str, Callable[..., LabelledData]] = {
    "digits": digits,
    "photographs": photographs,
    "gaussian": gaussian,
    "clusters": clusters,
}
SYNTHETIC = {"N": 1000, "d": 32, "C": 10}  # sizes unless told
HIDDEN = (32, 32)  # widths of the hidden layers of an MLP, unless told

BATCH_SIZE = 64
LEARNING_RATE = 3e-3


def trained(
    network: str = "mlp",
    data: str = "digits",
    seed: int = 0,
    epochs: int = 30,
    samples: int | None = None,
    normalization: str | None = None,
    data_arguments: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
    **network_arguments: Any,
) -> nn.Module:
    """A network trained with cross-entropy and Adam (batches of about 64, learning rate 0.003), in eval mode.

    Equal arguments give equal parameters on one machine with one number of threads. Statistics of batch norm are those
    of all training samples at the end: on them, in eval mode, the output of every norm is centred exactly.

    Args:
        network: "mlp", "lenet5", "vgg" or "resnet"; the last three take images ("digits" or "photographs").
        data: "digits", "photographs", "gaussian" or "clusters".
        seed: of the initialization and of the order of samples, not of the data.
        epochs: passes over the data.
        samples: train on the first so many samples only.
        normalization: None, "batch", or for an "mlp" also "layer".
        data_arguments: of the data's function in hesscope.data (for example kind="region", or N, d and C).
        progress: called with (epochs done, epochs in all) after every epoch.
        network_arguments: of the network's function in hesscope.models, for example widths (for an "mlp", with d and C;
            two hidden layers of 32 unless told), depth, width or bias.

    Raises:
        InputError: an argument does not fit.
    """
    require_positive_int("epochs", epochs)
    examples = training_data(network, data, samples, data_arguments)
    model = _network(network, examples, {"normalization": normalization, "seed": seed, **network_arguments})
    loss, optimizer = nn.CrossEntropyLoss(), torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    training = Examples(examples.inputs, examples.labels, examples.labels)
    for epoch in range(1, epochs + 1):
        order = permutation(len(examples), stream(seed, "train", epoch))
        # Batches of nearly equal size: batch norm cannot do with one sample left over.
        train_epoch(model, loss, optimizer, training, order.tensor_split(-(-len(order) // BATCH_SIZE)))
        if progress is not None:
            progress(epoch, epochs)
    _settle(model, examples.inputs)
    return model


def training_data(
    network: str = "mlp",
    data: str = "digits",
    samples: int | None = None,
    data_arguments: Mapping[str, Any] | None = None,
) -> LabelledData:
    """What `trained` trains on, in the shape that the network takes: vectors for an "mlp", else images.

    Args:
        network, data, samples, data_arguments: as of `trained`.

    Raises:
        InputError: an argument does not fit.
    """
    require_choice("network", network, NETWORKS)
    require_choice("data", data, DATA)
    given = dict(data_arguments or {})
    _require_known(given, DATA[data], {"image", "flat"}, f"data = {data!r}")
    flat = network == "mlp"
    if data in ("gaussian", "clusters"):
        if not flat:
            raise InputError(f"network = {network!r} takes images, data = 'digits' or 'photographs', got {data!r}")
        given = SYNTHETIC | given
    else:
        given |= {"image": not flat} if data == "digits" else {"flat": flat}
    found = DATA[data](**given)
    if samples is None:
        return found
    require_positive_int("samples", samples)
    if samples > len(found):
        raise InputError(f"samples must be at most {len(found)}, all that {data} has, got {samples}")
    return LabelledData(found.name, found.inputs[:samples], found.labels[:samples], found.classes)


def _network(network: str, examples: LabelledData, given: dict[str, Any]) -> nn.Module:
    """The network for this data, in its dtype, not yet trained."""
    make = NETWORKS[network]
    _require_known(given, make, {"C", "channels", "size", "dtype"}, f"network = {network!r}")
    given["dtype"] = examples.inputs.dtype
    if network != "mlp":
        shape = {"channels": examples.inputs.shape[1], "size": examples.inputs.shape[2]}
        accepted = inspect.signature(make).parameters
        return make(examples.classes, **{name: value for name, value in shape.items() if name in accepted}, **given)
    ends = examples.inputs.shape[1], examples.classes
    widths = given.pop("widths", (ends[0], *HIDDEN, ends[1]))
    if len(widths) < 2 or (widths[0], widths[-1]) != ends:
        raise InputError(f"widths must begin with d = {ends[0]} and end with C = {ends[1]}, got {list(widths)}")
    return make(widths, **given)


def _require_known(given: Mapping[str, Any], function: Callable[..., Any], ours: set[str], owner: str) -> None:
    """Raise InputError for an argument that the function does not have, or that is `ours` to choose."""
    accepted = sorted(set(inspect.signature(function).parameters) - ours)
    for name in given:
        if name not in accepted:
            hint = nearest(name, accepted)
            raise InputError(f"{owner} takes no argument {name!r}; it takes {', '.join(accepted)}{hint}")


@torch.no_grad()
def _settle(model: nn.Module, inputs: Tensor) -> None:
    """Put the model in eval mode, with the mean and variance over all inputs as its batch norms' statistics."""
    model.eval()
    norms = [module for module in model.modules() if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d))]
    # Set before a norm is applied, so that what the next one receives is what it will receive from now on.
    hooks = [norm.register_forward_pre_hook(_take_statistics) for norm in norms]
    model(inputs)
    for hook in hooks:
        hook.remove()


def _take_statistics(norm: nn.Module, arguments: tuple[Tensor, ...]) -> None:
    axes = [axis for axis in range(arguments[0].ndim) if axis != 1]
    variance, mean = torch.var_mean(arguments[0], dim=axes, correction=0)
    norm.get_buffer("running_mean").copy_(mean)
    norm.get_buffer("running_var").copy_(variance)
