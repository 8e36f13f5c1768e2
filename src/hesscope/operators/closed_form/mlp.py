"""Hessian and Gauss-Newton matrix of fully connected networks as matrix products, without differentiating twice.

With z^p = W_p x^p, x^{p+1} = s(z^p), delta^p = dl/dz^p and Z^{pq} = d^2 l / dz^p dz^q, the block of layers p <= q is

    H_pq = (1/N) sum_n [ Z^{pq}_n (x) x^p_n x^q_n^T + (for p < q) x^p_n times dx^q/dz^p times delta^q_n ]

([D], arXiv:2505.02809; MATH.md, section 2). Dropping the terms with delta (and s'') gives the Gauss-Newton matrix.
Each block is a few matrix products over the samples, those below the diagonal are mirrored: about P^2 N / 2
multiply-adds. Where both the block of two neurons and its own transpose are equal, only one half of it is multiplied.

The matrix is made in strips of rows, and its samples are taken in tiles, so that everything that is held beside the
result stays within a stated memory (see strips).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hesscope.core.errors import DataError
from hesscope.objective.objective import Objective
from hesscope.operators.closed_form.backward import Level, Tile, levels, output_curvature, tiles
from hesscope.operators.closed_form.network import Network
from hesscope.operators.closed_form.strips import Cut, Strip, cut_matrix, cut_samples
from hesscope.operators.operator import STRIP_MEMORY

# Halving a symmetric block pays from this many inputs on: narrower products are slower than the half they save.
HALVED_INPUTS = 128

MIRROR_TILE = 512


@dataclass(frozen=True)
class _Target:
    """A strip and the view of memory it is added to, [rows, width]; `fresh` memory is overwritten."""

    strip: Strip
    values: Tensor
    network: Network
    fresh: bool

    def block(self, q: int) -> Tensor:
        """Columns of the neurons b of layer q, [a, i, b, j]; for the strip's own layer from its first neuron on."""
        m, d = self.network.shapes[q]
        first = self.strip.neurons.start if q == self.strip.layer else 0
        start = self.network.starts[q] + first * d - self.strip.column(self.network)
        columns = self.values[:, start : start + (m - first) * d]
        return columns.view(len(self.strip.neurons), len(self.strip.inputs), m - first, d)


def dense(objective: Objective, network: Network, gauss_newton: bool = False, memory: int = STRIP_MEMORY) -> Tensor:
    """The Hessian (or Gauss-Newton matrix) [P, P], exactly symmetric.

    Args:
        memory: bytes to use beside the result (and, for layers with a bias, beside one more matrix to reorder it).

    Raises:
        TooLargeError: `memory` is too small for one sample.
        DataError: the matrix is not finite.
    """
    space = objective.parameters
    cut = cut_samples(network, torch.empty(0, dtype=space.dtype).element_size(), memory)
    H = _allocated(objective, space.size * space.size).view(space.size, space.size)
    views = [H[strip.rows(network), strip.column(network) :] for strip in cut.strips]
    _sum_over_samples(list(zip(cut.strips, views, strict=True)), objective, network, cut, gauss_newton)
    _mirror_(H)
    _require_finite(H)
    return _to_parameter_order(H, network) if any(network.biased) else H


def strips(
    objective: Objective, network: Network, gauss_newton: bool = False, memory: int = STRIP_MEMORY
) -> Iterator[tuple[Strip, Tensor]]:
    """The matrix strip by strip, in own order; all intermediates within `memory` bytes, the strip included.

    Yields:
        (strip, [rows, width] values), valid until the next one. The columns of the strip's own neurons are complete;
        all others have a mirror image that no other strip holds.

    Raises:
        TooLargeError: `memory` is too small for one row and one sample.
        DataError: the matrix is not finite.
    """
    cut = cut_matrix(network, torch.empty(0, dtype=objective.parameters.dtype).element_size(), memory)
    largest = max(strip.area(network) for strip in cut.strips)
    storage = _allocated(objective, largest)
    for strip in cut.strips:
        values = storage[: strip.area(network)].view(-1, strip.width(network))
        _sum_over_samples([(strip, values)], objective, network, cut, gauss_newton)
        if len(strip.neurons) > 1:
            _mirror_(values[:, : strip.own_columns(network)])
        _require_finite(values)
        yield strip, values


def _sum_over_samples(
    parts: Sequence[tuple[Strip, Tensor]], objective: Objective, network: Network, cut: Cut, gauss_newton: bool
) -> None:
    """Fill the strips: the one routine behind `dense` and `strips`."""
    buffer = _allocated(objective, cut.buffer)
    fresh = True
    with tiles(objective, network, cut.samples) as pieces:
        for tile in pieces:
            _add_tile([_Target(strip, values, network, fresh) for strip, values in parts], tile, gauss_newton, buffer)
            fresh = False


def _add_tile(targets: Sequence[_Target], tile: Tile, gauss_newton: bool, buffer: Tensor) -> None:
    last = len(tile.weights) - 1
    for target in targets:
        if target.strip.layer == last:
            _add_last_layer(target, tile, buffer)
    lowest = min(target.strip.layer for target in targets)
    for level in levels(tile, lowest, bends=not gauss_newton, chains=not gauss_newton):
        for target in targets:
            if target.strip.layer == level.layer:
                _add_same_layer(target, level.Z[level.layer], tile.inputs[level.layer], buffer)
                for q in range(level.layer + 1, last + 1):
                    _add_layers(target, q, level, tile, gauss_newton, buffer)


def _add_same_layer(target: _Target, Z: Tensor, x: Tensor, buffer: Tensor) -> None:
    """Add sum_n Z_n (x) x_n x_n^T, Z [S, m, m], for the strip's neurons a and all b >= a."""
    strip, block = target.strip, target.block(target.strip.layer)
    d, rows = x.shape[1], x[:, strip.inputs.start : strip.inputs.stop]
    halved = len(strip.inputs) == d >= 2 * HALVED_INPUTS and HALVED_INPUTS * (len(x) + d) <= buffer.numel()
    # Inputs j in pieces; of a piece only the rows i before its end are multiplied, the others are their mirror image.
    piece = HALVED_INPUTS if halved else d
    step = max(1, buffer.numel() // (piece * (len(x) + (d if halved else 0))))
    for number, a in enumerate(strip.neurons):
        for first in range(a, Z.shape[2], step):
            z = Z[:, a, first : first + step, None]
            columns = slice(first - strip.neurons.start, first - strip.neurons.start + z.shape[1])
            if not halved:
                U = torch.mul(z, x[:, None, :], out=buffer[: z.numel() * d].view(len(x), -1, d))
                _multiply_into(block[number, :, columns].view(rows.shape[1], -1), rows.T, U.flatten(1), target.fresh)
                continue
            for start in range(0, d, piece):
                part = slice(start, min(start + piece, d))
                width = part.stop - start
                right, rest = _take(buffer, len(x), z.shape[1] * width)
                torch.mul(z, x[:, None, part], out=right.view(len(x), -1, width))
                product, _ = _take(rest, part.stop, z.shape[1] * width)
                torch.mm(x[:, : part.stop].T, right, out=product)
                grid = product.view(part.stop, -1, width)
                _add(block[number, : part.stop, columns, part], grid, target.fresh)
                _add(block[number, part, columns, :start], grid[:start].permute(2, 1, 0), target.fresh)


def _add_layers(target: _Target, q: int, level: Level, tile: Tile, gauss_newton: bool, buffer: Tensor) -> None:
    """Add the block of the strip's layer p with a later layer q, neuron by neuron of p.

    Beside sum_n Z_n (x) x^p_n x^q_n^T, for the Hessian, the residual's term: x^p_i delta_b dx^q_j/dz^p_a.
    """
    strip, Z, x = target.strip, level.Z[q], tile.inputs[q]
    p, d = strip.layer, x.shape[1]
    rows, block = tile.inputs[p][:, strip.inputs.start : strip.inputs.stop], target.block(q)
    # The right-hand side U [S, j, b] is prepared with the longer of its two indices last, which is several times faster
    # than loops over a few numbers. If that is not the order of the matrix, the product is put into order afterwards.
    turned = d < Z.shape[2] and d * (len(x) + rows.shape[1]) <= buffer.numel()
    step = max(1, buffer.numel() // (d * (len(x) + (rows.shape[1] if turned else 0))))
    for number, a in enumerate(strip.neurons):
        moved = None  # dx^q/dz^p_a [S, m_{q-1}]; of the layer next to p only x^q_a moves
        if not gauss_newton and q > p + 1:
            moved = tile.slopes[q - 1] * level.reach[q - 1][:, :, a]
        for first in range(0, Z.shape[2], step):
            columns = slice(first, min(first + step, Z.shape[2]))
            z, delta = Z[:, a, columns], tile.delta[q][:, columns]
            right, rest = _take(buffer, len(x), z.shape[1] * d)
            U = right.view(len(x), d, -1) if turned else right.view(len(x), -1, d).transpose(1, 2)
            torch.mul(z[:, None, :], x[:, :, None], out=U)
            if moved is not None:
                U[:, : moved.shape[1]].addcmul_(delta[:, None, :], moved[:, :, None])
            elif not gauss_newton:
                U[:, a].addcmul_(delta, tile.slopes[p][:, a : a + 1])
            out = block[number, :, columns]
            if turned:
                product, _ = _take(rest, rows.shape[1], right.shape[1])
                torch.mm(rows.T, right, out=product)
                _add(out, product.view(len(product), d, -1).transpose(1, 2), target.fresh)
            else:
                _multiply_into(out.view(rows.shape[1], -1), rows.T, right, target.fresh)


def _add_last_layer(target: _Target, tile: Tile, buffer: Tensor) -> None:
    """Add sum_n A_n (x) x_n x_n^T: A = scale (diag(p) - p p^T), or scale I."""
    x, p, scale = tile.inputs[-1], tile.p, tile.scale
    classes = tile.delta[-1].shape[1]
    if p is not None and classes <= x.shape[1]:
        _add_same_layer(target, output_curvature(tile), x, buffer)
        return
    if p is None:
        if target.fresh:
            target.values.zero_()
        own = scale[:, None].expand(-1, classes)
    else:
        _subtract_outer_products(target, x, p, scale, buffer)
        own = scale[:, None] * p
    _add_own_classes(target, x, own, buffer)


def _subtract_outer_products(target: _Target, x: Tensor, p: Tensor, scale: Tensor, buffer: Tensor) -> None:
    """Subtract sum_n scale_n (p_n p_n^T) (x) (x_n x_n^T), which is symmetric in its classes and in its inputs.

    Of both symmetries one half is left out: classes in pieces, and for each input i only the inputs j >= i.
    """
    strip, block, d = target.strip, target.block(target.strip.layer), x.shape[1]
    start, C, halved = strip.neurons.start, p.shape[1], len(strip.inputs) == d
    piece = _largest_piece(len(x), d, buffer.numel(), C)
    edges = [slice(first, min(first + piece, C)) for first in range(start, C, piece)]
    right = [(x[:, :, None] * p[:, None, part]).flatten(1) for part in edges]  # [S, j, b]
    for number, A in enumerate(edges):
        A = slice(A.start, min(A.stop, strip.neurons.stop))
        if A.start >= A.stop:
            break
        for part, columns in zip(edges[number:], right[number:], strict=True):
            rows = slice(A.start - start, A.stop - start)
            here = block[rows, :, part.start - start : part.stop - start]
            for i in strip.inputs:
                first = i if halved else 0
                left, rest = _take(buffer, len(x), A.stop - A.start)
                torch.mul(p[:, A], (-scale * x[:, i])[:, None], out=left)
                width = part.stop - part.start
                product, _ = _take(rest, left.shape[1], (d - first) * width)
                torch.mm(left.T, columns[:, first * width :], out=product)
                grid = product.view(left.shape[1], d - first, width).transpose(1, 2)  # [a, b, j]
                row = i - strip.inputs.start
                _add(here[:, row, :, first:], grid, target.fresh)
                if halved:
                    _add(here[:, i + 1 :, :, i].transpose(1, 2), grid[:, :, 1:], target.fresh)


def _add_own_classes(target: _Target, x: Tensor, own: Tensor, buffer: Tensor) -> None:
    """Add sum_n own_nc x_n x_n^T to the block of each class c with itself."""
    strip, block = target.strip, target.block(target.strip.layer)
    d, count = x.shape[1], len(strip.neurons)
    mine = own[:, strip.neurons.start : strip.neurons.stop]
    diagonal = block[:, :, :count].diagonal(dim1=0, dim2=2)  # [i, j, c]
    step = max(1, buffer.numel() // 2 // (len(x) * d))
    for start in range(0, len(strip.inputs), step):
        rows = x[:, strip.inputs.start + start : min(strip.inputs.start + start + step, strip.inputs.stop)]
        pairs, rest = _take(buffer, len(x), rows.shape[1] * d)
        torch.mul(rows[:, :, None], x[:, None, :], out=pairs.view(len(x), -1, d))
        several = rest.numel() // pairs.shape[1]
        for first in range(0, count, several):
            some = slice(first, min(first + several, count))
            product, _ = _take(rest, some.stop - first, pairs.shape[1])
            torch.mm(mine[:, some].T, pairs, out=product)
            diagonal[start : start + rows.shape[1], :, some] += product.view(len(product), -1, d).permute(1, 2, 0)


def _largest_piece(samples: int, d: int, numbers: int, classes: int) -> int:
    """Classes in a piece: left-hand side [S, piece] and product [piece, d piece] within the buffer."""
    piece = min(classes, max(64, -(-classes // 4)))
    while piece > 1 and piece * (samples + d * piece) > numbers:
        piece -= -(-piece // 8)
    return piece


def _allocated(objective: Objective, numbers: int) -> Tensor:
    """Uninitialized numbers, to be written to also where the caller is in inference mode."""
    with torch.inference_mode(False):
        return torch.empty(numbers, dtype=objective.parameters.dtype, device=objective.parameters.device)


def _take(buffer: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """A matrix at the start of a buffer, and the rest of the buffer."""
    return buffer[: rows * columns].view(rows, columns), buffer[rows * columns :]


def _multiply_into(out: Tensor, left: Tensor, right: Tensor, fresh: bool) -> None:
    """Add left @ right to `out`, a view with contiguous rows; write it if `out` is fresh."""
    out.addmm_(left, right, beta=0 if fresh else 1)


def _add(out: Tensor, value: Tensor, fresh: bool) -> None:
    if fresh:
        out.copy_(value)
    else:
        out.add_(value)


def _mirror_(H: Tensor) -> None:
    """Copy the upper triangle to the lower one."""
    for start in range(0, H.shape[0], MIRROR_TILE):
        stop = min(start + MIRROR_TILE, H.shape[0])
        corner = H[start:stop, start:stop]
        corner.copy_(corner.triu() + corner.triu(1).T)
        H[stop:, start:stop] = H[start:stop, stop:].T


def _require_finite(values: Tensor) -> None:
    """Raise DataError unless all is finite; the sum tells in one quick pass, unless it overflows itself."""
    if not bool(values.sum().isfinite()) and not bool(values.isfinite().all()):
        raise DataError("the closed form of the Hessian is not finite")


def _to_parameter_order(H: Tensor, network: Network) -> Tensor:
    """From own order to PyTorch's: all weights of a layer, then its biases."""
    index = network.positions().argsort().to(H.device)
    ordered = torch.empty_like(H)
    for rows, out in zip(torch.split(index, MIRROR_TILE), torch.split(ordered, MIRROR_TILE), strict=True):
        out.copy_(H[rows[:, None], index])
    return ordered
