"""What one forward and one backward pass of a fully connected network know of a tile of samples.

With z^p = W_p x^p, x^{p+1} = s(z^p), delta^p = dl/dz^p: the derivatives Z^{pq} = d^2 l / dz^p dz^q follow from the
layer above by the chain rule, Z^{pq} = (dz^{p+1}/dz^p)^T Z^{p+1,q}, and s'' (W^T delta)^p adds to the diagonal of
Z^{pp}; it starts from A, the loss's Hessian at the outputs (arXiv:2505.02809; MATH.md, section 2). All of this is
linear in A and s'': the Gauss-Newton part has A alone, the residual part s'' alone, and starts from zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hesscope.core.errors import DataError
from hesscope.objective.batches import split_batch
from hesscope.objective.losses import OutputLoss, output_gradient
from hesscope.objective.objective import Objective
from hesscope.operators.closed_form.network import Activation, Network

Part = Literal["hessian", "gauss_newton", "residual"]


@dataclass(frozen=True)
class Tile:
    """Quantities of S samples, layer by layer.

    Attributes:
        inputs: x^q [S, d_q], with the constant 1 where there is a bias.
        weights: W_q [m_q, m_{q-1}].
        slopes, bends: s'(z^q), s''(z^q) [S, m_q] of every layer but the last; None for bends that are all zero.
        delta: dl/dz^q [S, m_q].
        scale: [S], and p: [S, C]: A = scale (diag(p) - p p^T), or scale I if p is None.
    """

    inputs: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    slopes: tuple[Tensor, ...]
    bends: tuple[Tensor | None, ...]
    delta: tuple[Tensor, ...]
    scale: Tensor
    p: Tensor | None


@dataclass(frozen=True)
class Level:
    """A layer p: Z^{pq} [S, m_p, m_q] of the layers q >= p where it is not zero, and dz^q/dz^p [S, m_q, m_p], q > p."""

    layer: int
    Z: Mapping[int, Tensor]
    reach: Mapping[int, Tensor]


@contextmanager
def tiles(objective: Objective, network: Network, samples: int) -> Iterator[Iterator[Tile]]:
    """Context with all samples of all batches, at most `samples` at once, each divided by the number of loss terms.

    Raises (in the body):
        DataError: a tile's derivatives are not finite (the message names the batch).
    """
    with objective.evaluating() as (theta, batches), torch.no_grad():
        yield _tiles(objective, network, theta.detach(), batches, samples)


def _tiles(
    objective: Objective, network: Network, theta: Tensor, batches: Iterator[tuple[int, Any]], samples: int
) -> Iterator[Tile]:
    tensors = objective.parameters.unflatten(theta)
    for index, batch in batches:
        split = split_batch(batch, index)
        assert split.targets is not None
        rows = len(split.targets)
        if rows == 0:
            continue
        even = -(-rows // -(-rows // samples))  # as few tiles as there can be, of nearly equal size
        pieces = (torch.split(tensor, even) for tensor in (split.arguments[0], split.targets))
        for x, y in zip(*pieces, strict=True):
            tile = _forward(objective, network, tensors, x, y)
            if not _is_finite(tile):
                raise DataError(f"the closed form of the Hessian is not finite on batch {index}")
            yield tile


def levels(tile: Tile, lowest: int, part: Part, chains: bool) -> Iterator[Level]:
    """Layers from the last but one down to `lowest`, of one part of the Hessian, with or without the chains dz^q/dz^p.

    Of the residual part, Z^{pq} is left out where no layer from q up to the last but one bends.
    """
    last = len(tile.weights) - 1
    Z: dict[int, Tensor] = {}
    reach: dict[int, Tensor] = {}
    for layer in range(last - 1, lowest - 1, -1):
        forth = tile.weights[layer + 1] * tile.slopes[layer][:, None, :]  # dz^{p+1}/dz^p, [S, m_{p+1}, m_p]
        back = forth.transpose(1, 2)
        if layer + 1 < last:
            Z = {q: torch.bmm(back, matrix) for q, matrix in Z.items()}
        elif part != "residual":
            Z = {last: times_curvature(back, tile)}
        if layer + 1 in Z:
            Z[layer] = torch.bmm(Z[layer + 1], forth)
        bend = tile.bends[layer]
        if part != "gauss_newton" and bend is not None:
            if layer not in Z:
                Z[layer] = torch.diag_embed(torch.zeros_like(bend))
            Z[layer].diagonal(dim1=1, dim2=2).add_(bend * (tile.delta[layer + 1] @ tile.weights[layer + 1]))
        if chains:
            reach = {q: torch.bmm(chain, forth) for q, chain in reach.items()}
            reach[layer + 1] = forth
        yield Level(layer, Z, reach)


def output_curvature(tile: Tile, classes: slice | Tensor = slice(None)) -> Tensor:
    """A [S, k, k] of the chosen outputs."""
    if tile.p is None:
        k = tile.delta[-1][:, classes].shape[1]
        return tile.scale[:, None, None] * torch.eye(k, dtype=tile.scale.dtype, device=tile.scale.device)
    p = tile.p[:, classes]
    weighted = p * tile.scale[:, None]
    A = torch.bmm(weighted[:, :, None], -p[:, None, :])
    A.diagonal(dim1=1, dim2=2).add_(weighted)
    return A


def times_curvature(B: Tensor, tile: Tile) -> Tensor:
    """B A for B [S, m, C]."""
    if tile.p is None:
        return B * tile.scale[:, None, None]
    # Contiguous also where B is a transposed view: what comes next reads it class by class.
    weighted = torch.empty(B.shape, dtype=B.dtype, device=B.device)
    torch.mul(B, (tile.scale[:, None] * tile.p)[:, None, :], out=weighted)
    return weighted.addcmul_(weighted.sum(dim=2, keepdim=True), tile.p[:, None, :], value=-1)


def _forward(objective: Objective, network: Network, tensors: dict[str, Tensor], x: Tensor, y: Tensor) -> Tile:
    weights = tuple(tensors[f"{name}.weight"] for name in network.layers)
    inputs, slopes, bends = [], [], []
    for number, name in enumerate(network.layers):
        z = x @ weights[number].T
        if network.biased[number]:
            z += tensors[f"{name}.bias"]
            x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        inputs.append(x)
        if number < network.last:
            x, slope, bend = _activation_derivatives(network.activations[number], z)
            slopes.append(slope)
            bends.append(bend if bool(bend.any()) else None)
    scale, e = _loss_derivatives(objective.loss, z, y)
    delta = [e / objective.num_terms]
    for q in range(network.last, 0, -1):
        delta.insert(0, (delta[0] @ weights[q]) * slopes[q - 1])
    return Tile(
        inputs=tuple(inputs),
        weights=weights,
        slopes=tuple(slopes),
        bends=tuple(bends),
        delta=tuple(delta),
        scale=scale / objective.num_terms,
        p=torch.softmax(z, dim=1) if network.cross_entropy else None,
    )


def _activation_derivatives(activation: Activation, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """s(z), s'(z) and s''(z) of an elementwise function, as PyTorch differentiates it."""
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        value = activation(leaf.clone())  # it may work in place
        (slope,) = torch.autograd.grad(value.sum(), leaf, create_graph=True)
        bend = torch.zeros_like(z)
        if slope.requires_grad:
            found = torch.autograd.grad(slope.sum(), leaf, allow_unused=True)[0]
            bend = bend if found is None else found
    return value.detach(), slope.detach(), bend


def _loss_derivatives(loss: object, outputs: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Scale [S] of the loss's Hessian (times diag(p) - p p^T, or times I) and gradient e [S, C]."""
    assert isinstance(loss, OutputLoss)
    with torch.enable_grad():
        _, e = output_gradient(loss, outputs, y)
    module = loss.module
    if isinstance(module, nn.MSELoss):
        return torch.full_like(outputs[:, 0], 2.0 / outputs.shape[1]), e.detach()
    assert isinstance(module, nn.CrossEntropyLoss)
    weight = torch.ones_like(outputs[0]) if module.weight is None else module.weight.to(outputs)
    smoothing, classes = module.label_smoothing, outputs.shape[1]
    if y.is_floating_point():
        soft = (1 - smoothing) * y.to(outputs) + smoothing / classes
        return (soft * weight).sum(dim=1), e.detach()
    kept = y != module.ignore_index
    label = torch.where(kept, y, 0)
    own = weight[label]
    if smoothing == 0:
        # The entries of e add up to zero: from the others, that of the label is exact also where p - 1 would cancel.
        e = e.detach().scatter(1, label[:, None], 0)
        e.scatter_(1, label[:, None], -e.sum(dim=1, keepdim=True))
    return ((1 - smoothing) * own + smoothing / classes * weight.sum()) * kept, e.detach()


def _is_finite(tile: Tile) -> bool:
    """Whether everything that the products are made of is finite."""
    tensors = (*tile.inputs, *tile.slopes, *tile.bends, *tile.delta, tile.scale, tile.p)
    return all(tensor is None or bool(tensor.isfinite().all()) for tensor in tensors)
