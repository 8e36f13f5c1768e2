"""Which models and losses the closed form of fully connected networks applies to, and where their parameters lie."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from hesscope.models.mlp import ACTIVATIONS, MLP
from hesscope.objective.batches import split_batch
from hesscope.objective.losses import OutputLoss
from hesscope.objective.objective import Objective

Activation = Callable[[Tensor], Tensor]

# Activations of nn.Sequential networks: applied entry by entry, deterministic, without parameters.
ELEMENTWISE = (nn.ReLU, nn.Tanh, nn.GELU, nn.Sigmoid, nn.SiLU, nn.Softplus, nn.ELU, nn.LeakyReLU, nn.Mish)


@dataclass(frozen=True)
class Network:
    """A fully connected network.

    Attributes:
        layers: names of the layers' modules; activations: what follows each of them but the last.
        shapes: (neurons m, inputs d) of every layer; a bias counts as one more input, which is always 1.
        biased: whether the layer has a bias; cross_entropy: whether the loss is that, or else mean squared error.

    The order of parameters here, "own order", is (layer, neuron, input); PyTorch puts a layer's biases behind its
    weights.
    """

    layers: tuple[str, ...]
    activations: tuple[Activation, ...]
    shapes: tuple[tuple[int, int], ...]
    biased: tuple[bool, ...]
    cross_entropy: bool

    @property
    def last(self) -> int:
        """Number of the last layer, counted from 0."""
        return len(self.layers) - 1

    @property
    def starts(self) -> tuple[int, ...]:
        """Where every layer starts in own order, and where the last one ends (P)."""
        return tuple(accumulate((rows * columns for rows, columns in self.shapes), initial=0))

    def positions(self) -> Tensor:
        """[P] position in the flat parameter vector of every parameter in own order."""
        own = []
        for (rows, columns), bias, start in zip(self.shapes, self.biased, self.starts[:-1], strict=True):
            grid = torch.empty(rows, columns, dtype=torch.long)
            grid[:, : columns - bias] = start + torch.arange(rows * (columns - bias)).view(rows, -1)
            if bias:
                grid[:, -1] = start + rows * (columns - 1) + torch.arange(rows)
            own.append(grid.reshape(-1))
        return torch.cat(own)


def recognize(objective: Objective) -> Network | None:
    """The network if the closed form applies to the objective, else None.

    It applies to hesscope's MLP and to nn.Sequential of nn.Linear and elementwise activations in turn, with all
    parameters trainable, each its own, and nothing hooked in; to cross-entropy of class labels or probabilities and
    mean squared error; to batches of one matrix of inputs.
    """
    model, loss = objective.model, objective.loss
    if not isinstance(loss, OutputLoss) or type(loss.module) not in (nn.CrossEntropyLoss, nn.MSELoss):
        return None
    found = _layers(model)
    if found is None or any(_is_hooked(module) for module in model.modules()):
        return None
    layers, activations = found
    own = [f"{layer}.{name}" for layer in layers for name, _ in model.get_submodule(layer).named_parameters()]
    if tuple(own) != objective.parameters.names:
        return None
    with objective.evaluating() as (_, batches):
        if not all(_is_plain(index, batch) for index, batch in batches):
            return None
    sizes = dict(zip(objective.parameters.names, objective.parameters.shapes, strict=True))
    biased = tuple(f"{layer}.bias" in sizes for layer in layers)
    shapes = [(*sizes[f"{layer}.weight"], bias) for layer, bias in zip(layers, biased, strict=True)]
    return Network(
        layers=layers,
        activations=activations,
        shapes=tuple((rows, columns + bias) for rows, columns, bias in shapes),
        biased=biased,
        cross_entropy=type(loss.module) is nn.CrossEntropyLoss,
    )


def _layers(model: nn.Module) -> tuple[tuple[str, ...], tuple[Activation, ...]] | None:
    """Names of the linear layers and the activations between them, if the model is made of nothing else."""
    if type(model) is MLP:
        layers = tuple(name for name, _ in model.named_children())
        return layers, (ACTIVATIONS[model.activation],) * (len(layers) - 1)
    if type(model) is not nn.Sequential:
        return None
    names: list[str] = []
    activations: list[Activation] = []
    for name, module in model._modules.items():  # named_children leaves out what occurs twice
        if type(module) is nn.Linear and len(names) == len(activations):
            names.append(name)
        elif type(module) in ELEMENTWISE and len(names) == len(activations) + 1:
            activations.append(module)
        else:
            return None
    distinct = {id(model._modules[name]) for name in names}
    whole = len(names) == len(activations) + 1 and len(distinct) == len(names)
    return (tuple(names), tuple(activations)) if whole else None


def _is_hooked(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or hasattr(module, "parametrizations")


def _is_plain(index: int, batch: object) -> bool:
    """Whether a batch is one matrix of inputs with class labels [N] or targets [N, C]."""
    split = split_batch(batch, index)
    x = split.arguments[0] if len(split.arguments) == 1 and not split.keywords else None
    return isinstance(x, Tensor) and x.ndim == 2 and split.targets is not None and split.targets.ndim in (1, 2)
