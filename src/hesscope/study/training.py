"""A plain training loop, seeded throughout, that keeps the parameters at chosen steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from hesscope.core.rng import permutation, stream
from hesscope.core.vectors import ParameterSpace

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Trajectory:
    """What training did: the mean loss and accuracy after every epoch (epoch 0 is initialization), and parameters.

    Attributes:
        train_loss, test_loss, train_accuracy, test_accuracy: [epochs + 1].
        parameters: [len(kept), P] at the epochs `kept`.
    """

    train_loss: Array
    test_loss: Array
    train_accuracy: Array
    test_accuracy: Array
    kept: tuple[int, ...]
    parameters: Array


@dataclass(frozen=True, eq=False)
class Examples:
    """Inputs [N, d] or images, targets as the loss wants them, and class labels [N]."""

    inputs: Tensor
    targets: Tensor
    labels: Tensor


def train(
    model: nn.Module,
    loss: nn.Module,
    training: Examples,
    test: Examples,
    epochs: int,
    keep: tuple[int, ...],
    seed: int,
    progress: Callable[[float], None],
    batch_size: int = 64,
    learning_rate: float = 3e-3,
) -> Trajectory:
    """Train `model` in place with Adam; the order of the samples comes from the stream (seed, "train", epoch).

    Curves are measured in eval mode, in which the model is left.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    space = ParameterSpace.of(model)
    curves: list[tuple[float, ...]] = []
    snapshots: list[Array] = []
    for epoch in range(epochs + 1):
        if epoch > 0:
            order = permutation(len(training.inputs), stream(seed, "train", epoch))
            train_epoch(model, loss, optimizer, training, torch.split(order, batch_size))
        model.eval()
        curves.append((*_evaluate(model, loss, training), *_evaluate(model, loss, test)))
        if epoch in keep:
            own = dict(model.named_parameters())
            snapshots.append(space.flatten({name: own[name].detach() for name in space.names}).double().numpy().copy())
        progress(epoch / epochs)
    train_loss, train_accuracy, test_loss, test_accuracy = np.asarray(curves).T
    return Trajectory(train_loss, test_loss, train_accuracy, test_accuracy, keep, np.stack(snapshots))


def train_epoch(
    model: nn.Module,
    loss: nn.Module,
    optimizer: torch.optim.Optimizer,
    training: Examples,
    batches: Iterable[Tensor],
) -> None:
    """One step for each batch, [batch size] numbers of samples; the model is left in train mode."""
    model.train()
    for chosen in batches:
        optimizer.zero_grad()
        loss(model(training.inputs[chosen]), training.targets[chosen]).backward()
        optimizer.step()


@torch.no_grad()
def _evaluate(model: nn.Module, loss: nn.Module, examples: Examples) -> tuple[float, float]:
    outputs = model(examples.inputs)
    accuracy = (outputs.argmax(dim=1) == examples.labels).double().mean()
    return float(loss(outputs, examples.targets)), float(accuracy)
