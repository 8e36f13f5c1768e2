"""What layers see: their inputs x, and what comes back to their outputs z, sample by sample, from one forward pass.

Per sample the Gauss-Newton matrix of a layer is sum_c g_c g_c^T with g_c = sum_t w_ct x_t^T, where w_ct = J_t^T S e_c
is column c of the loss's root (A = S S^T), pulled back to the layer's output at position t (MATH.md, section 5). One
backward pass gives w_ct of all samples, positions and layers at once; nothing is differentiated by a weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hesscope.core.errors import DataError, InputError, ModelError
from hesscope.core.rng import rademacher, stream
from hesscope.layerwise.layers import Layer
from hesscope.objective import Objective
from hesscope.objective.objective import require_output_loss
from hesscope.objective.pieces import count_samples
from hesscope.operators.output_root import OutputRoot, curvature_root
from hesscope.operators.second_derivatives import explained

# Activations of one piece should take about so much: small pieces stay near the caches, and unfolded patches are
# larger than what they are made of.
PIECE_BYTES = {"cpu": 2**27, "cuda": 2**31}

NAME = "the output Hessian of a layer"


@dataclass(frozen=True)
class Call:
    """One use of a layer in a forward pass: what it was given, and what it made of it, before anything else did."""

    given: Tensor
    made: Tensor


@dataclass(frozen=True, eq=False)
class Piece:
    """Some samples in one forward pass; holds their graph, so it is to be forgotten before the next is made.

    Attributes:
        samples: n; calls: of every layer, by name; number: of the piece, counted over all batches; done: share of the
            data that is behind when it has been.
    """

    objective: Objective
    layers: tuple[Layer, ...]
    samples: int
    number: int
    index: int
    done: float
    outputs: Tensor
    targets: Tensor
    calls: dict[str, list[Call]]

    def inputs(self, layer: Layer) -> Tensor:
        """Inputs x [n, T, inputs] of all positions and calls, without the 1 of a bias; maybe a view of [n, ., T]."""
        module = self.objective.model.get_submodule(layer.name)
        dtype = self.objective.parameters.dtype
        parts = [self._by_sample(layer, _unfolded(layer, module, call.given, dtype)) for call in self.calls[layer.name]]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def classes(self) -> int | None:
        """Number of classes C, or None if the outputs are none."""
        loss = require_output_loss(self.objective, NAME)
        if not isinstance(loss.module, (nn.CrossEntropyLoss, nn.NLLLoss)):
            return None
        (axis,) = loss.term_axes(self.outputs, self.targets)
        return int(self.outputs.shape[axis])

    def columns_per_sample(self) -> int:
        """Number of entries of the root that belong to one sample: classes, or tokens times classes."""
        return self._root.live.numel() // self.samples

    def pulled_columns(self, also_zero: bool = False) -> Iterator[dict[str, Tensor]]:
        """Gradients w [n, T, outputs] of every layer, for one column of the root of each sample after the other.

        also_zero: whether columns that are zero for all samples are among them.
        """
        live = self._root.live.reshape(self.samples, -1)
        for column in range(live.shape[1]):
            if also_zero or bool(live[:, column].any()):
                chosen = torch.zeros(live.shape, dtype=self.outputs.dtype, device=live.device)
                chosen[:, column] = 1.0
                yield self._pulled(chosen)

    def pulled_signs(self, count: int, seed: int, *path: str | int) -> Iterator[dict[str, Tensor]]:
        """The same for random signs in place of columns: their squares are unbiased for the sum over all columns."""
        live = self._root.live
        for probe in range(count):
            generator = stream(seed, *path, self.number, probe)
            yield self._pulled(rademacher(live.numel(), generator).to(live.device, self.outputs.dtype))

    def output_hessians(self, layer: Layer) -> Tensor:
        """d^2 loss sum / dz^2 of every sample, [n, outputs, outputs], of a layer with one position per sample."""
        (call,) = self.calls[layer.name]
        if call.made.numel() != self.samples * layer.outputs:
            raise InputError(f"layer {layer.name!r} has several positions per sample in batch {self.index}")
        loss = require_output_loss(self.objective, NAME)
        total = loss.evaluate(self.outputs, self.targets).sum
        (gradient,) = torch.autograd.grad(total, call.made, create_graph=True)
        entries = gradient.reshape(self.samples, layer.outputs)
        result = torch.zeros(self.samples, layer.outputs, layer.outputs).to(entries)
        if entries.requires_grad:
            for row in range(layer.outputs):
                (second,) = torch.autograd.grad(
                    entries[:, row].sum(), call.made, retain_graph=True, materialize_grads=True
                )
                result[:, row] = second.reshape(self.samples, -1)
        return (result + result.mT) / 2

    @cached_property
    def _root(self) -> OutputRoot:
        return curvature_root(require_output_loss(self.objective, NAME), self.outputs.detach(), self.targets)

    def _pulled(self, u: Tensor) -> dict[str, Tensor]:
        root = self._root
        cotangent = root.apply(u.reshape(1, *root.live.shape))[0]
        made = [call.made for layer in self.layers for call in self.calls[layer.name]]
        gradients = list(
            torch.autograd.grad(self.outputs, made, cotangent, retain_graph=True, materialize_grads=True)
            if self.outputs.requires_grad
            else [torch.zeros_like(tensor) for tensor in made]
        )
        found = {}
        for layer in self.layers:
            parts = []
            for _ in self.calls[layer.name]:
                gradient = gradients.pop(0)
                if layer.kind == "convolution":
                    gradient = gradient.flatten(2).mT
                parts.append(self._by_sample(layer, gradient))
            found[layer.name] = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return found

    def _by_sample(self, layer: Layer, tensor: Tensor) -> Tensor:
        """[samples * positions..., f] as [n, T, f]."""
        if tensor.ndim == 3 and tensor.shape[0] == self.samples:
            return tensor
        if tensor.ndim < 2 or tensor.shape[0] % self.samples:  # in a later batch than `calls_of` has looked at
            raise InputError(f"layer {layer.name!r} {unusable(1, 0, None)}")
        return tensor.reshape(self.samples, -1, tensor.shape[-1])


def pieces(objective: Objective, layers: Sequence[Layer]) -> Iterator[Piece]:
    """All data in pieces, each with one forward pass in which these layers are tapped.

    Raises:
        InputError: inputs of a layer do not belong to samples.
        DataError: samples depend on each other.
    """
    budget = PIECE_BYTES.get(objective.parameters.device.type, PIECE_BYTES["cuda"])
    # Two at least, so that the independence of samples is looked at.
    count = max(2, ceil(objective.graph_bytes / budget))
    number = 0
    with explained(NAME), objective.evaluating() as (theta, batches):
        for index, batch in batches:
            parts = _independent_parts(objective, theta, batch, index, count)
            for place, part in enumerate(parts, start=1):
                done = (index + place / len(parts)) / objective.num_batches
                piece = _tapped(objective, theta, part, (number, index, done), tuple(layers))
                yield piece
                del piece
                number += 1


def calls_of(objective: Objective, layers: Sequence[Layer]) -> dict[str, tuple[int, int]]:
    """(calls in a forward pass, positions of a sample over all calls) of each layer on the first batch of samples.

    A layer that is not called has (0, 0); one whose inputs do not run over the samples in order (calls, 0): what it is
    given for a part of the batch must be the beginning of what it is given for all of it.
    """
    with explained(NAME), objective.evaluating() as (theta, batches), torch.no_grad():
        for index, batch in batches:  # the first that has samples to compare
            samples = count_samples(batch)
            if samples > 1 or index == objective.num_batches - 1:
                break
        with torch.enable_grad():
            beginning, *_ = _independent_parts(objective, theta, batch, index, 2)
        seen = []
        for part in (batch, beginning):
            with _tapping(objective, layers) as calls:
                objective.outputs_and_targets(theta.detach(), part, index)
            seen.append(calls)
    share = count_samples(beginning) / samples
    found = {}
    for layer in layers:
        whole, part = (calls[layer.name] for calls in seen)
        positions = sum(call.made.numel() // (samples * layer.outputs) for call in whole)
        fits = len(whole) == len(part) and all(
            _leads(half.given, call.given, share) and call.made.shape[0] % samples == 0
            for half, call in zip(part, whole, strict=True)
        )
        found[layer.name] = (len(whole), positions if fits else 0)
    return found


def _independent_parts(objective: Objective, theta: Tensor, batch: Any, index: int, count: int) -> list[Any]:
    parts = objective.pieces(theta, batch, index, count)
    if len(parts) == 1 and count_samples(batch) > 1:
        raise DataError(
            f"the samples of batch {index} depend on each other, so a layer's Hessian is no mean over samples"
        )
    return parts


def _leads(part: Tensor, whole: Tensor, share: float) -> bool:
    """Whether `part` is the first `share` of `whole` along its first axis, up to rounding."""
    rows = round(share * len(whole)) if whole.ndim else 0
    if part.shape[:1] != (rows,) or part.shape[1:] != whole.shape[1:]:
        return False
    if not part.is_floating_point():
        return torch.equal(part, whole[:rows])
    allowed = 1e4 * torch.finfo(part.dtype).eps * float(whole.abs().max()) if whole.numel() else 0.0
    return bool(((part - whole[:rows]).abs() <= allowed).all())


def unusable(uses: int, positions: int, sharing: str | None) -> str:
    """Why a layer with so many uses in a forward pass and positions of a sample has no factors; empty if it has."""
    if uses == 0:
        return "is not called in the forward pass (fused into another module, or unused), so its inputs are not seen"
    if positions == 0:
        return (
            "is given inputs whose first axis does not count samples (all samples share them, or another axis comes "
            "first), so that there are no Kronecker factors of samples"
        )
    if uses > 1 and sharing is None:
        return (
            f"is used {uses} times in a forward pass, which needs a convention: sharing='expand' (uses count as "
            "samples) or sharing='reduce' (they are summed)"
        )
    return ""


def _tapped(
    objective: Objective, theta: Tensor, batch: Any, place: tuple[int, int, float], layers: tuple[Layer, ...]
) -> Piece:
    number, index, done = place
    with _tapping(objective, layers) as calls:
        outputs, targets = objective.outputs_and_targets(theta, batch, index)
    samples = count_samples(batch)
    if outputs.numel() % samples:
        raise ModelError(f"the outputs of batch {index}, {list(outputs.shape)}, are not those of {samples} samples")
    return Piece(objective, layers, samples, number, index, done, outputs, targets, calls)


@contextmanager
def _tapping(objective: Objective, layers: Sequence[Layer]) -> Iterator[dict[str, list[Call]]]:
    """Calls of these layers while the body runs the model."""
    calls: dict[str, list[Call]] = {layer.name: [] for layer in layers}

    def tap(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, made: Tensor) -> Tensor:
            given = args[0] if args else next(iter(kwargs.values()))
            if not made.requires_grad:
                made = made.detach().requires_grad_()
            calls[name].append(Call(given.detach(), made))
            return made.clone()  # what follows may write to it

        return hook

    with ExitStack() as stack:
        for layer in layers:
            module = objective.model.get_submodule(layer.name)
            stack.callback(module.register_forward_hook(tap(layer.name), with_kwargs=True, prepend=True).remove)
        yield calls


def _unfolded(layer: Layer, module: Any, given: Tensor, dtype: torch.dtype) -> Tensor:
    """What a layer's matrix is multiplied with, features last; of a convolution [n, T, channels x kernel] patches."""
    if layer.kind == "embedding":
        tokens = functional.one_hot(given, layer.inputs).to(dtype)
        if module.padding_idx is not None:  # looked up, but without a gradient
            tokens[..., module.padding_idx] = 0
        return tokens
    if layer.kind == "linear":
        return given
    x = functional.pad(
        given, module._reversed_padding_repeated_twice, mode=_PADDING.get(module.padding_mode, "constant")
    )
    # A view of all patches, copied once: ten times faster than functional.unfold on a CPU.
    (kh, kw), (sh, sw), (dh, dw) = module.kernel_size, module.stride, module.dilation
    samples, channels, height, width = x.shape
    rows, columns = (height - dh * (kh - 1) - 1) // sh + 1, (width - dw * (kw - 1) - 1) // sw + 1
    n, c, h, w = x.stride()
    patches = x.as_strided((samples, channels, kh, kw, rows, columns), (n, c, dh * h, dw * w, sh * h, sw * w))
    return patches.reshape(samples, channels * kh * kw, rows * columns).mT


_PADDING = {"reflect": "reflect", "replicate": "replicate", "circular": "circular"}
