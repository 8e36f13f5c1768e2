"""The networks that products and spectra are timed on: ResNet-20, a GPT of 4 layers, and the demo's MLP."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

import hesscope as hs


@dataclass(frozen=True)
class Workload:
    """A network in eval mode with one batch; outputs [N, C] and labels [N]."""

    name: str
    model: nn.Module
    inputs: Tensor
    labels: Tensor

    def loss(self) -> Tensor:
        return functional.cross_entropy(self.model(self.inputs), self.labels)


class Residual(nn.Module):
    def __init__(self, fan_in: int, fan_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(fan_in, fan_out, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(fan_out)
        self.conv2 = nn.Conv2d(fan_out, fan_out, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(fan_out)
        self.shortcut = nn.Sequential()
        if stride > 1:
            self.shortcut = nn.Sequential(nn.Conv2d(fan_in, fan_out, 1, stride, bias=False), nn.BatchNorm2d(fan_out))

    def forward(self, x: Tensor) -> Tensor:
        h = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(self.norm2(self.conv2(h)) + self.shortcut(x))


class ResNet20(nn.Module):
    """The network of He et al. for CIFAR: 3 stages of 3 blocks, 16, 32 and 64 channels; 0.27 million parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        widths = [16, 16, 16, 16, 32, 32, 32, 64, 64, 64]
        self.blocks = nn.Sequential(*(Residual(a, b, 1 if a == b else 2) for a, b in pairwise(widths)))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class TransformerBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(attended.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Tokens [8, T] -> logits [8 T, vocabulary]; 2.9 million parameters."""

    def __init__(
        self, vocabulary: int = 8192, width: int = 128, layers: int = 4, heads: int = 4, length: int = 64
    ) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        return self.head(self.norm(self.blocks(x))).flatten(0, 1)


def resnet(device: str) -> Workload:
    """Batch of 64 images 3 x 32 x 32."""
    torch.manual_seed(0)
    model = ResNet20().eval().to(device)
    return Workload("ResNet-20", model, torch.randn(64, 3, 32, 32).to(device), torch.randint(10, (64,)).to(device))


def gpt(device: str) -> Workload:
    """Batch of 8 sequences of 64 tokens."""
    torch.manual_seed(0)
    model = GPT().eval().to(device)
    return Workload("GPT", model, torch.randint(8192, (8, 64)).to(device), torch.randint(8192, (8 * 64,)).to(device))


def mlp(device: str) -> Workload:
    """The digits, all 1797 of them (random ones of the same size where scikit-learn is missing)."""
    torch.manual_seed(0)
    try:
        data = hs.data.digits()
        inputs, labels = data.inputs, data.labels
    except ImportError:
        inputs, labels = torch.rand(1797, 64), torch.randint(10, (1797,))
    return Workload("digits MLP", hs.models.one_hidden(64, 16, 10).to(device), inputs.to(device), labels.to(device))


WORKLOADS: dict[str, Callable[[str], Workload]] = {"resnet": resnet, "gpt": gpt, "mlp": mlp}
