"""Fully connected networks, LeCun-initialized, as in [D] (arXiv:2505.02809; MATH.md, section 4), also with norms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from hesscope.core.checks import require_choice, require_positive_int
from hesscope.core.errors import InputError
from hesscope.core.rng import normal, stream

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "tanh": torch.tanh,
    "gelu": functional.gelu,
}
NORMS: dict[str, type[nn.BatchNorm1d] | type[nn.LayerNorm]] = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm}


class MLP(nn.Module):
    """o = W_L s(... s(W_1 x)): layers fc1 ... fcL with weights of shape (out, in), entries N(0, 1/in).

    Args:
        widths: (d, ..., C): inputs, hidden widths, outputs. Two widths make a linear model.
        activation: "relu", "tanh" or "gelu"; not applied after the last layer.
        bias: whether layers have a bias (initialized to zero).
        seed: root of the initialization's random streams, one per layer; no global randomness is used.
        dtype: of the parameters.
    """

    def __init__(
        self,
        widths: Sequence[int],
        activation: str = "relu",
        bias: bool = False,
        seed: int = 0,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if len(widths) < 2:
            raise InputError(f"widths must name at least the inputs and the outputs, got {list(widths)}")
        for width in widths:
            require_positive_int("each width", width)
        require_choice("activation", activation, ACTIVATIONS)
        self.widths = tuple(widths)
        self.activation = activation
        for number, (fan_in, fan_out) in enumerate(pairwise(widths), start=1):
            layer: nn.Linear = nn.utils.skip_init(nn.Linear, fan_in, fan_out, bias=bias, dtype=dtype)  # type: ignore[no-untyped-call]
            weight = normal((fan_out, fan_in), stream(seed, "MLP", f"fc{number}"))
            with torch.no_grad():
                layer.weight.copy_(weight / fan_in**0.5)
                if bias:
                    layer.bias.zero_()
            self.add_module(f"fc{number}", layer)

    def forward(self, x: Tensor) -> Tensor:
        """Inputs [N, d] -> outputs [N, C]."""
        *hidden, last = self.children()
        for layer in hidden:
            x = ACTIVATIONS[self.activation](layer(x))
        output: Tensor = last(x)
        return output


class NormalizedMLP(MLP):
    """An MLP with a norm fc1_norm ... fcL_norm in front of every layer, the first one included.

    The norm makes what the layer receives centred, so that the mean no longer dominates E[xx^T] ([W], arXiv:2010.04261;
    MATH.md, section 5). It has no parameters of its own: a learned shift would bring the mean back, and a learned scale
    is the layer's own to learn. Initial weights are those of the MLP of the same seed. A class of its own, since closed
    forms are for the plain one.

    Args:
        normalization: "batch" (every feature has mean 0 and variance 1 over the batch; in eval mode by the running
            statistics, which are 0 and 1 until trained, so that samples are independent) or "layer" (every sample has
            that over its features).
        widths, activation, bias, seed, dtype: as of MLP.
    """

    def __init__(
        self,
        widths: Sequence[int],
        normalization: str,
        activation: str = "relu",
        bias: bool = False,
        seed: int = 0,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(widths, activation, bias, seed, dtype)
        require_choice("normalization", normalization, NORMS)
        kind = NORMS[normalization]
        affine = {"affine" if kind is nn.BatchNorm1d else "elementwise_affine": False}
        layers = list(self.named_children())
        for (name, _), width in zip(layers, widths, strict=False):  # every width but the last, that of the outputs
            self.add_module(f"{name}_norm", kind(width, dtype=dtype, **affine))
        self.layers = tuple(name for name, _ in layers)

    def forward(self, x: Tensor) -> Tensor:
        """Inputs [N, d] -> outputs [N, C]."""
        for name in self.layers:
            x = self.get_submodule(name)(self.get_submodule(f"{name}_norm")(x))
            if name != self.layers[-1]:
                x = ACTIVATIONS[self.activation](x)
        return x


def linear(d: int, C: int, seed: int = 0, dtype: torch.dtype | None = None) -> MLP:
    """Linear model o = V x, V of shape (C, d) in the layer fc1."""
    return MLP((d, C), seed=seed, dtype=dtype)


def one_hidden(
    d: int, m: int, C: int, activation: str = "relu", seed: int = 0, dtype: torch.dtype | None = None
) -> MLP:
    """One hidden layer o = V s(W x), W of shape (m, d) in fc1, V of shape (C, m) in fc2."""
    return MLP((d, m, C), activation=activation, seed=seed, dtype=dtype)


def mlp(
    widths: Sequence[int],
    activation: str = "relu",
    seed: int = 0,
    dtype: torch.dtype | None = None,
    normalization: str | None = None,
    bias: bool = False,
) -> MLP:
    """Deep network with the given widths (d, ..., C), with normalization (None, "batch" or "layer") a NormalizedMLP."""
    if normalization is None:
        return MLP(widths, activation, bias, seed, dtype)
    return NormalizedMLP(widths, normalization, activation, bias, seed, dtype)
