"""What a user would write: factories that the studies in the tests name by import path."""

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import hesscope as hs
from tests.helpers import OnceSquare


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


def half_points() -> tuple[torch.Tensor, torch.Tensor]:
    x, y = tensors()
    return x.bfloat16(), y


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


class OnceDifferentiable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return OnceSquare.apply(self.inner(x))


def huge_network() -> nn.Module:
    return nn.Linear(5, 3, dtype=torch.float64)


def vector_loss(model: nn.Module, batch: tuple) -> tuple[torch.Tensor, int]:
    x, y = batch
    return nn.functional.cross_entropy(model(x), y, reduction="none"), len(y)


def sum_loss(model: nn.Module, batch: tuple) -> tuple[torch.Tensor, int]:
    x, y = batch
    return nn.functional.cross_entropy(model(x), y, reduction="sum"), len(y)


def linear_loss(model: nn.Module, batch: tuple) -> tuple[torch.Tensor, int]:
    return model(batch[0]).sum(), len(batch[0])


FACTOR = 1.0


def scaled_loss(model: nn.Module, batch: tuple) -> tuple[torch.Tensor, int]:
    total, terms = sum_loss(model, batch)
    return FACTOR * total, terms


class Scaled(nn.Module):
    """A network with everything that a result may depend on beside its trainable tensors."""

    def __init__(self, buffer: float = 1.0, frozen: float = 1.0, activation: str = "tanh") -> None:
        super().__init__()
        self.first = nn.Linear(5, 4, dtype=torch.float64)
        self.last = nn.Linear(4, 3, dtype=torch.float64)
        for k, parameter in enumerate(self.parameters()):
            torch.nn.init.constant_(parameter, 0.1 + 0.1 * k)
        self.temperature = nn.Parameter(torch.tensor(1.3, dtype=torch.float64))  # a parameter without dimensions
        self.frozen = nn.Parameter(torch.full((3,), frozen, dtype=torch.float64), requires_grad=False)
        self.register_buffer("shift", torch.full((5,), buffer, dtype=torch.float64))
        self.activation = getattr(torch, activation)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.temperature * self.frozen * self.last(self.activation(self.first(x * self.shift)))


class Weighted(nn.CrossEntropyLoss):
    pass


def half_network() -> nn.Module:
    return network(dtype="bfloat16")


def infinite_curvature() -> nn.Module:
    class Root(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).abs() ** 1.5

    layer = Root(5, 3, bias=False, dtype=torch.float64)
    nn.init.zeros_(layer.weight)
    return layer


def leave() -> nn.Module:
    raise SystemExit(3)


def long_names(model: nn.Module) -> hs.Partition:
    return hs.Partition.from_blocks({"a_very_long_name_" * 6: "fc1.weight", "$x_1$ <b>": "fc2.weight"}, model)


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


def planted_rows() -> nn.Module:
    """Under squared error its Hessian is exactly block-diagonal by row: one block X^T X / N for every output."""
    return hs.models.linear(5, 3, seed=1, dtype=torch.float64)


def correlated_points() -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs that depend on each other, so that the blocks of `planted_rows` are dense."""
    x, y = points().batch("mse")
    return x + 2 * x.sum(dim=1, keepdim=True), y


def rank_one_loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, int]:
    """(a.theta)^2: a dense Hessian of rank one."""
    theta = torch.cat([p.flatten() for p in model.parameters()])
    a = torch.linspace(1.0, 2.0, theta.numel(), dtype=theta.dtype)
    return (a @ theta) ** 2, 1
