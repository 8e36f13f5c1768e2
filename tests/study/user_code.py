"""What a user would write: factories that the studies in the tests name by import path."""

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import hesscope as hs


def network(width: int = 6, dtype: str = "float64") -> nn.Module:
    return hs.models.one_hidden(5, width, 3, seed=1, dtype=getattr(torch, dtype))


def frozen_network() -> nn.Module:
    return network().requires_grad_(False)


def biased_network() -> nn.Module:
    return hs.models.MLP((5, 6, 3), bias=True, seed=1, dtype=torch.float64)


def points(N: int = 40) -> hs.data.LabelledData:
    return hs.data.gaussian(N, 5, 3, seed=2, dtype=torch.float64)


def tensors() -> tuple[torch.Tensor, torch.Tensor]:
    return points().batch("cross_entropy")


def wrong_targets() -> list[tuple[torch.Tensor, torch.Tensor]]:
    x, y = tensors()
    return [(x[:20], y[:20]), (x[20:], y[20:] + 2)]


def infinite_inputs() -> list[tuple[torch.Tensor, torch.Tensor]]:
    x, y = tensors()
    spoiled = x[20:].clone()
    spoiled[0, 0] = float("nan")
    return [(x[:20], y[:20]), (spoiled, y[20:])]


def empty_loader() -> DataLoader:
    return DataLoader(TensorDataset(torch.empty(0, 5), torch.empty(0, dtype=torch.long)))


def shuffling_loader() -> DataLoader:
    return DataLoader(TensorDataset(*tensors()), batch_size=10, shuffle=True)


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + torch.randn(3, dtype=x.dtype)


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * x * g


class OnceDifferentiable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Once.apply(self.inner(x))


def huge_network() -> nn.Module:
    return nn.Linear(5, 3, dtype=torch.float64)


def vector_loss(model: nn.Module, batch: tuple) -> tuple[torch.Tensor, int]:
    x, y = batch
    return nn.functional.cross_entropy(model(x), y, reduction="none"), len(y)


def sum_loss(model: nn.Module, batch: tuple) -> tuple[torch.Tensor, int]:
    x, y = batch
    return nn.functional.cross_entropy(model(x), y, reduction="sum"), len(y)


def overlapping(model: nn.Module) -> hs.Partition:
    return hs.Partition.from_blocks({"a": "fc1.weight", "b": ["fc2.weight", ("fc1.weight", 0)]}, model)


def incomplete(model: nn.Module) -> hs.Partition:
    return hs.Partition.from_blocks({"a": "fc1.weight"}, model)


def layers(model: nn.Module) -> hs.Partition:
    return hs.Partition.from_blocks({"hidden": "fc1.weight", "output": "fc2.weight"}, model)


def not_a_model() -> np.ndarray:
    return np.zeros(3)


def failing() -> nn.Module:
    raise RuntimeError("no\nsuch luck")
