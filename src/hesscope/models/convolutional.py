"""Convolutional networks: LeNet-5, a small VGG, and the residual networks for small images of He et al.

Choices that serve second derivatives: no operation works in place. Pooling takes averages, which is linear: max pooling
has ties wherever ReLU made a patch constant, and there no second derivative. In eval mode, in which hesscope measures,
batch norm uses its running statistics, so that samples do not depend on each other.

Weights are normal with variance 2 / fan-in (He et al. 2015, arXiv:1502.01852, for ReLU), in the last layer 1 / fan-in,
every layer from a random stream of its own; biases are zero. No global randomness is used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hesscope.core.checks import require_choice, require_positive_int
from hesscope.core.errors import InputError
from hesscope.core.rng import normal, stream

SMALLEST = 8  # side of the images: those of the digits


@dataclass(frozen=True)
class Convolution:
    """One convolution: channels out, side of its kernel, padding, and whether 2 x 2 averages are taken behind it."""

    channels: int
    kernel: int
    padding: int
    pooled: bool


class ConvNet(nn.Module):
    """Convolutions conv1 ... convK, then fully connected layers fc1 ... fcL, all with bias and with ReLU in between.

    With normalization="batch" every layer has a batch norm in front, conv1_norm ... fcL_norm, which makes what the
    layer receives centred, channel by channel; it has no parameters of its own, for the reason told at NormalizedMLP.
    """

    def __init__(
        self,
        name: str,
        C: int,
        channels: int,
        size: int,
        convolutions: Sequence[Convolution],
        hidden: Sequence[int],
        normalization: str | None,
        seed: int,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        _require_normalization(normalization)
        self.convolutions = {f"conv{number}": made for number, made in enumerate(convolutions, start=1)}
        for layer, made in self.convolutions.items():
            if normalization is not None:
                self.add_module(f"{layer}_norm", nn.BatchNorm2d(channels, affine=False, dtype=dtype))
            self.add_module(
                layer, _blank(nn.Conv2d, channels, made.channels, made.kernel, padding=made.padding, dtype=dtype)
            )
            channels, size = made.channels, (size + 2 * made.padding - made.kernel + 1) // (1 + made.pooled)
        features = channels * size**2
        self.connected = tuple(f"fc{number}" for number in range(1, len(hidden) + 2))
        for layer, width in zip(self.connected, (*hidden, C), strict=True):
            if normalization is not None:
                self.add_module(f"{layer}_norm", nn.BatchNorm1d(features, affine=False, dtype=dtype))
            self.add_module(layer, _blank(nn.Linear, features, width, dtype=dtype))
            features = width
        _initialize(self, name, seed)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, channels, size, size] -> outputs [N, C]."""
        for layer, made in self.convolutions.items():
            x = functional.relu(self._layer(layer, x))
            if made.pooled:
                x = functional.avg_pool2d(x, 2)
        x = x.flatten(1)
        for layer in self.connected[:-1]:
            x = functional.relu(self._layer(layer, x))
        return self._layer(self.connected[-1], x)

    def _layer(self, name: str, x: Tensor) -> Tensor:
        norm = self._modules.get(f"{name}_norm")
        output: Tensor = self.get_submodule(name)(x if norm is None else norm(x))
        return output


def lenet5(
    C: int,
    channels: int = 1,
    size: int = 28,
    normalization: str | None = None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> ConvNet:
    """LeNet-5 (LeCun et al. 1998) with ReLU: 5 x 5 kernels, 6 and 16 channels, and layers of 120, 84 and C outputs.

    Images smaller than 32 x 32 are padded by 2 pixels, as LeCun's 28 x 28 digits were; the second convolution is
    padded, too, where else less than 2 x 2 would be left of it. fc1 receives 400 features for size 28 and 32, and 64
    for size 8.

    Args:
        C: classes; channels, size: of the images, at least 8 x 8.
        normalization: None, or "batch" for a batch norm in front of every layer.
        seed: root of the initialization's random streams; dtype: of the parameters.
    """
    _require(C=C, channels=channels, size=size)
    first = 0 if size >= 32 else 2
    pooled = (size + 2 * first - 4) // 2
    second = 0 if pooled >= 6 else 2
    convolutions = (Convolution(6, 5, first, True), Convolution(16, 5, second, True))
    return ConvNet("LeNet5", C, channels, size, convolutions, (120, 84), normalization, seed, dtype)


def vgg(
    C: int,
    channels: int = 3,
    size: int = 32,
    width: int = 16,
    normalization: str | None = None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> ConvNet:
    """A small VGG (Simonyan and Zisserman 2014, arXiv:1409.1556): three pairs of 3 x 3 convolutions, then fc1 and fc2.

    Every pair, of width, 2 * width and 4 * width channels, ends in 2 x 2 averages; fc1 has 8 * width outputs.

    Args:
        C: classes; channels, size: of the images, at least 8 x 8; width: channels of the first pair.
        normalization: None, or "batch" for a batch norm in front of every layer.
        seed: root of the initialization's random streams; dtype: of the parameters.
    """
    _require(C=C, channels=channels, size=size, width=width)
    convolutions = [Convolution(width * factor, 3, 1, pooled) for factor in (1, 2, 4) for pooled in (False, True)]
    return ConvNet("VGG", C, channels, size, convolutions, (8 * width,), normalization, seed, dtype)


class Block(nn.Module):
    """h -> ReLU(shortcut(h) + scale * conv2(ReLU(conv1(h)))), with batch norms bn1, bn2 behind convolutions or none.

    The shortcut has no parameters: every other pixel and channels of zeros where the shape changes (option A of the
    paper).
    """

    def __init__(
        self, channels: int, width: int, stride: int, norm: bool, scale: float, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.stride, self.added, self.scale = stride, width - channels, scale
        self.conv1 = _blank(nn.Conv2d, channels, width, 3, stride, 1, bias=False, dtype=dtype)
        self.bn1 = nn.BatchNorm2d(width, dtype=dtype) if norm else nn.Identity()
        self.conv2 = _blank(nn.Conv2d, width, width, 3, padding=1, bias=False, dtype=dtype)
        self.bn2 = nn.BatchNorm2d(width, dtype=dtype) if norm else nn.Identity()

    def forward(self, h: Tensor) -> Tensor:
        """[N, channels, side, side] -> [N, width, side / stride, side / stride]."""
        branch = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(h)))))
        shortcut = functional.pad(h[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.added))
        return functional.relu(shortcut + self.scale * branch)


class ResNet(nn.Module):
    """conv1, block1 ... block3n with two convolutions each, average over pixels, fc1; see `resnet`."""

    def __init__(
        self,
        C: int,
        channels: int,
        depth: int,
        width: int,
        normalization: str | None,
        seed: int,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        norm, blocks = normalization is not None, (depth - 2) // 2
        self.conv1 = _blank(nn.Conv2d, channels, width, 3, padding=1, bias=False, dtype=dtype)
        self.bn1 = nn.BatchNorm2d(width, dtype=dtype) if norm else nn.Identity()
        channels, scale = width, 1.0 if norm else blocks**-0.5
        for number in range(blocks):
            stage, position = divmod(number, blocks // 3)
            stride = 2 if stage > 0 and position == 0 else 1
            block = Block(channels, width * 2**stage, stride, norm, scale, dtype)
            self.add_module(f"block{number + 1}", block)
            channels = width * 2**stage
        self.fc1 = _blank(nn.Linear, channels, C, dtype=dtype)
        _initialize(self, "ResNet", seed)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, channels, size, size] -> outputs [N, C]."""
        x = functional.relu(self.bn1(self.conv1(x)))
        for block in self.children():
            if isinstance(block, Block):
                x = block(x)
        output: Tensor = self.fc1(x.mean(dim=(2, 3)))
        return output


def resnet(
    C: int,
    channels: int = 3,
    depth: int = 20,
    width: int = 16,
    normalization: str | None = "batch",
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> ResNet:
    """The residual networks for small images of He et al. 2016 (arXiv:1512.03385, section 4.2): ResNet-20 and its like.

    Three stages of (depth - 2) / 6 blocks, of width, 2 * width and 4 * width channels; images of any size. Batch norms
    are where they are in the paper, behind convolutions and with scale and shift, so that what layers receive is not
    centred.

    Without normalization the branches of L blocks are multiplied by 1 / sqrt(L) (Hayou et al. 2021, Stable ResNet,
    arXiv:2010.12859): unscaled, every block doubles the variance of what it adds to. It is a constant, no parameter.

    Args:
        C: classes; channels: of the images; depth: 6n + 2; width: channels of the first stage.
        normalization: "batch" or None.
        seed: root of the initialization's random streams; dtype: of the parameters.
    """
    _require(C=C, channels=channels, depth=depth, width=width)
    if depth < 8 or depth % 6 != 2:
        raise InputError(f"depth must be 6n + 2 (8, 14, 20, ...), got {depth}")
    _require_normalization(normalization)
    return ResNet(C, channels, depth, width, normalization, seed, dtype)


def _require(**sizes: int) -> None:
    for name, value in sizes.items():
        require_positive_int(name, value)
    if sizes.get("size", SMALLEST) < SMALLEST:
        raise InputError(f"size must be at least {SMALLEST}, got {sizes['size']}")


def _require_normalization(normalization: str | None) -> None:
    if normalization is not None:
        require_choice("normalization", normalization, ("batch",))


def _blank(kind: type[nn.Module], *arguments: int, **options: Any) -> Any:
    """A layer without initial values, which would take global randomness."""
    return nn.utils.skip_init(kind, *arguments, **options)  # type: ignore[no-untyped-call]


def _initialize(model: nn.Module, network: str, seed: int) -> None:
    """Fill the weights of all layers and set biases to zero; the last layer is not followed by ReLU."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))}
    last = list(layers)[-1]
    with torch.no_grad():
        for name, layer in layers.items():
            gain = 1 if name == last else 2
            shape = tuple(layer.weight.shape)
            layer.weight.copy_(normal(shape, stream(seed, network, name)) * (gain / math.prod(shape[1:])) ** 0.5)
            if layer.bias is not None:
                layer.bias.zero_()
