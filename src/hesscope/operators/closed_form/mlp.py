"""Dense Hessian and Gauss-Newton matrix of fully connected networks as matrix products, without differentiating twice.

With z^p = W_p x^p, x^{p+1} = s(z^p), delta^p = dl/dz^p and Z^{pq} = d^2 l / dz^p dz^q, the block of layers p <= q is

    H_pq = (1/N) sum_n [ Z^{pq}_n (x) x^p_n x^q_n^T + (for p < q) x^p_n times dx^q/dz^p times delta^q_n ]

([D], arXiv:2505.02809; MATH.md, section 2). Dropping the terms with delta (and s'') gives the Gauss-Newton matrix.
Blocks p <= q are computed as products over the samples, the others mirrored: about P^2 N / 2 multiply-adds, the floor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from hesscope.core.errors import DataError
from hesscope.models.mlp import ACTIVATIONS, MLP
from hesscope.objective.batches import split_batch
from hesscope.objective.losses import OutputLoss, output_gradient
from hesscope.objective.objective import Objective

Activation = Callable[[Tensor], Tensor]

# Activations of nn.Sequential networks: applied entry by entry, deterministic, without parameters.
ELEMENTWISE = (nn.ReLU, nn.Tanh, nn.GELU, nn.Sigmoid, nn.SiLU, nn.Softplus, nn.ELU, nn.LeakyReLU, nn.Mish)

# Working memory of one tile of samples, beside the result.
TILE_BYTES = 2**26


@dataclass(frozen=True)
class Network:
    """A fully connected network: names of the layers' modules, and the activation after each but the last."""

    layers: tuple[str, ...]
    activations: tuple[Activation, ...]


def recognize(objective: Objective) -> Network | None:
    """The network if the closed form applies to it, else None.

    It applies to hesscope's MLP and to nn.Sequential of nn.Linear and elementwise activations in turn, with all
    parameters trainable, each its own, and nothing hooked in; to cross-entropy of class labels and mean squared error.
    """
    model = objective.model
    loss = objective.loss
    if not isinstance(loss, OutputLoss) or type(loss.module) not in (nn.CrossEntropyLoss, nn.MSELoss):
        return None
    network = _network(model)
    if network is None or any(_is_hooked(module) for module in model.modules()):
        return None
    with objective.evaluating() as (_, batches):
        if not _is_plain(*next(batches)):
            return None
    own = [f"{layer}.{name}" for layer in network.layers for name, _ in model.get_submodule(layer).named_parameters()]
    return network if tuple(own) == objective.parameters.names else None


def dense(objective: Objective, network: Network, gauss_newton: bool = False) -> Tensor | None:
    """The Hessian (or Gauss-Newton matrix) [P, P], exactly symmetric; None if a batch is not made of plain vectors."""
    space = objective.parameters
    sizes = dict(zip(space.names, space.shapes, strict=True))
    has_bias = [f"{name}.bias" in sizes for name in network.layers]
    weights = [sizes[f"{name}.weight"] for name in network.layers]
    shapes = [(rows, columns + bias) for (rows, columns), bias in zip(weights, has_bias, strict=True)]
    starts = [0, *accumulate(rows * columns for rows, columns in shapes)]
    with objective.evaluating() as (theta, batches), torch.no_grad():
        H = torch.zeros(space.size, space.size, dtype=space.dtype, device=space.device)
        tensors = space.unflatten(theta.detach())
        for index, batch in batches:
            if not _is_plain(index, batch):
                return None
            split = split_batch(batch, index)
            assert split.targets is not None
            for x, y in _sample_tiles(split.arguments[0], split.targets, shapes):
                _add_tile(H, objective, network, tensors, starts, x, y, gauss_newton)
            if not bool(H.isfinite().all()):
                raise DataError(f"the closed form of the Hessian is not finite on batch {index}")
        H /= objective.num_terms
        _mirror_(H)
        return _to_parameter_order(H, shapes, has_bias, starts) if any(has_bias) else H


def _network(model: nn.Module) -> Network | None:
    if type(model) is MLP:
        layers = tuple(name for name, _ in model.named_children())
        return Network(layers, (ACTIVATIONS[model.activation],) * (len(layers) - 1))
    if type(model) is not nn.Sequential:
        return None
    names: list[str] = []
    activations: list[Activation] = []
    for name, module in model.named_children():
        if type(module) is nn.Linear and len(names) == len(activations):
            names.append(name)
        elif isinstance(module, ELEMENTWISE) and len(names) == len(activations) + 1:
            activations.append(module)
        else:
            return None
    return Network(tuple(names), tuple(activations)) if len(names) == len(activations) + 1 else None


def _is_hooked(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or hasattr(module, "parametrizations")


def _is_plain(index: int, batch: object) -> bool:
    """Whether a batch is one matrix of inputs with class labels [N] or targets [N, C]."""
    split = split_batch(batch, index)
    x = split.arguments[0] if len(split.arguments) == 1 and not split.keywords else None
    return isinstance(x, Tensor) and x.ndim == 2 and split.targets is not None and split.targets.ndim in (1, 2)


def _sample_tiles(x: Tensor, y: Tensor, shapes: list[tuple[int, int]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Samples in tiles whose largest intermediate (a layer's parameters, pairs of neurons) stays within TILE_BYTES."""
    pairs = [first * second for i, (first, _) in enumerate(shapes[:-1]) for second, _ in shapes[i:]]
    widest = max(*pairs, 0, *(rows * columns for rows, columns in shapes))
    step = max(1, min(len(x), TILE_BYTES // (widest * x.element_size())))
    yield from zip(torch.split(x, step), torch.split(y, step), strict=True)


def _add_tile(
    H: Tensor,
    objective: Objective,
    network: Network,
    tensors: dict[str, Tensor],
    starts: list[int],
    x: Tensor,
    y: Tensor,
    gauss_newton: bool,
) -> None:
    """Add the sum over these samples to the blocks p <= q of H."""
    last = len(network.layers) - 1
    W = [tensors[f"{name}.weight"] for name in network.layers]
    inputs, slopes, bends, outputs = _forward(network, tensors, x)
    scale, e = _loss_derivatives(objective.loss, outputs, y)
    p = torch.softmax(outputs, dim=1) if _is_cross_entropy(objective.loss) else None
    delta = {last: e}
    for q in range(last - 1, -1, -1):
        delta[q] = (delta[q + 1] @ W[q + 1]) * slopes[q]

    _add_last(H[starts[last] :, starts[last] :], inputs[last], scale, p)
    # Z[q] holds Z^{pq} for the current p, layer by layer towards the input; the last one is never formed.
    Z: dict[int, Tensor] = {}
    reach: dict[int, Tensor] = {}  # dz^q / dz^p, [samples, m_q, m_p]
    for layer in range(last - 1, -1, -1):
        back = slopes[layer][:, :, None] * W[layer + 1].T  # dz^{p+1}/dz^p transposed, [samples, m_p, m_{p+1}]
        diagonal = None if layer + 1 == last else Z[layer + 1]
        if diagonal is None:
            Z = {last: _times_curvature(back, scale, p)}
        else:
            Z = {q: torch.bmm(back, matrix) for q, matrix in Z.items()}
        Z[layer] = torch.bmm(Z[layer + 1], back.transpose(1, 2))
        if not gauss_newton:
            bend = bends[layer] * (delta[layer + 1] @ W[layer + 1])
            Z[layer].diagonal(dim1=1, dim2=2).add_(bend)
        reach = {q: torch.bmm(chain, back.transpose(1, 2)) for q, chain in reach.items()}
        reach[layer + 1] = back.transpose(1, 2)
        for q in range(layer, last + 1):
            steps = None
            if q > layer and not gauss_newton:  # x^q = s(z^{q-1})
                steps = slopes[layer] if q == layer + 1 else slopes[q - 1][:, :, None] * reach[q - 1]
            _add_block(H, starts, layer, q, inputs, Z[q], delta[q], steps)


def _forward(
    network: Network, tensors: dict[str, Tensor], x: Tensor
) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]:
    """Inputs of every layer (with a constant 1 where there is a bias), slopes s', bends s'' and the outputs."""
    inputs, slopes, bends = [], [], []
    for number, name in enumerate(network.layers):
        bias = tensors.get(f"{name}.bias")
        z = x @ tensors[f"{name}.weight"].T
        if bias is not None:
            z = z + bias
            x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        inputs.append(x)
        if number < len(network.activations):
            x, slope, bend = _activation_derivatives(network.activations[number], z)
            slopes.append(slope)
            bends.append(bend)
    return inputs, slopes, bends, z


def _activation_derivatives(activation: Activation, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """s(z), s'(z) and s''(z) of an elementwise function, as PyTorch differentiates it."""
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        value = activation(leaf)
        (slope,) = torch.autograd.grad(value.sum(), leaf, create_graph=True)
        bend = torch.zeros_like(z)
        if slope.requires_grad:
            found = torch.autograd.grad(slope.sum(), leaf, allow_unused=True)[0]
            bend = bend if found is None else found
    return value.detach(), slope.detach(), bend


def _loss_derivatives(loss: object, outputs: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Scale [samples] of the loss's Hessian (times diag(p) - p p^T, or times I) and gradient e [samples, C]."""
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
    own = weight[torch.where(kept, y, 0)]
    return ((1 - smoothing) * own + smoothing / classes * weight.sum()) * kept, e.detach()


def _is_cross_entropy(loss: object) -> bool:
    return isinstance(loss, OutputLoss) and isinstance(loss.module, nn.CrossEntropyLoss)


def _times_curvature(back: Tensor, scale: Tensor, p: Tensor | None) -> Tensor:
    """B A for B [samples, m, C]: A = scale (diag(p) - p p^T), or scale I if p is None."""
    if p is None:
        return back * scale[:, None, None]
    weighted = back * (scale[:, None] * p)[:, None, :]
    return weighted.sub_(torch.bmm(weighted.sum(dim=2, keepdim=True), p[:, None, :]))


def _add_last(H: Tensor, x: Tensor, scale: Tensor, p: Tensor | None) -> None:
    """Add the last layer's block: sum_n scale_n A_n (x) x_n x_n^T, upper triangle of class blocks at least."""
    classes, d = H.shape[0] // x.shape[1], x.shape[1]
    own = scale[:, None].expand(-1, classes) if p is None else scale[:, None] * p
    pairs = (x[:, :, None] * x[:, None, :]).reshape(len(x), d * d)
    diagonal = (own.T @ pairs).reshape(classes, d, d)
    blocks = H.view(classes, d, classes, d)
    for c in range(classes):
        blocks[c, :, c, :] += diagonal[c]
    if p is not None:
        spread = ((scale.sqrt()[:, None] * p)[:, :, None] * x[:, None, :]).reshape(len(x), classes * d)
        strip = max(256, classes * d // 8)
        for start in range(0, classes * d, strip):
            rows = spread[:, start : start + strip]
            H[start : start + strip, start:].addmm_(rows.T, spread[:, start:], alpha=-1)


def _add_block(
    H: Tensor,
    starts: list[int],
    layer: int,
    q: int,
    inputs: list[Tensor],
    Z: Tensor,
    delta: Tensor,
    steps: Tensor | None,
) -> None:
    """Add sum_n Z_n (x) x^p x^q^T and, with `steps` = dx^q/dz^p, the residual's cross term, neuron by neuron."""
    x, other = inputs[layer], inputs[q]
    d, count = x.shape[1], Z.shape[1]
    buffer = torch.empty(len(x), Z.shape[2] * other.shape[1], dtype=H.dtype, device=H.device)
    for a in range(count):
        first = a if q == layer else 0  # the block of a layer with itself is symmetric: from the diagonal on
        U = buffer[:, : (Z.shape[2] - first) * other.shape[1]]
        grid = U.view(len(x), -1, other.shape[1])
        torch.mul(Z[:, a, first:, None], other[:, None, :], out=grid)
        if steps is not None:
            _add_steps(grid, delta, steps, a)
        row = starts[layer] + a * d
        column = starts[q] + first * other.shape[1]
        H[row : row + d, column : starts[q + 1]].addmm_(x.T, U)


def _add_steps(grid: Tensor, delta: Tensor, steps: Tensor, a: int) -> None:
    """Add delta_b dx_j/dz_a to grid [samples, b, j]; steps is dx/dz [samples, j, a], or its diagonal [samples, a].

    The constant input of a bias, the last j, does not move.
    """
    if steps.ndim == 2:
        grid[:, :, a] += delta * steps[:, a : a + 1]
    else:
        grid[:, :, : steps.shape[1]] += delta[:, :, None] * steps[:, None, :, a]


def _mirror_(H: Tensor, tile: int = 1024) -> None:
    """Copy the upper triangle to the lower one."""
    for start in range(0, H.shape[0], tile):
        stop = min(start + tile, H.shape[0])
        corner = H[start:stop, start:stop]
        corner.copy_(corner.triu() + corner.triu(1).T)
        H[stop:, start:stop] = H[start:stop, stop:].T


def _to_parameter_order(H: Tensor, shapes: list[tuple[int, int]], has_bias: list[bool], starts: list[int]) -> Tensor:
    """From (neuron, input, constant) order to PyTorch's: all weights of a layer, then its biases."""
    order = []
    for (rows, columns), bias, start in zip(shapes, has_bias, starts[:-1], strict=True):
        grid = start + torch.arange(rows * columns).view(rows, columns)
        order += [grid[:, :-1].reshape(-1), grid[:, -1]] if bias else [grid.reshape(-1)]
    index = torch.cat(order).to(H.device)
    return H[index][:, index]
