"""Hessian, Gauss-Newton and residual part of fully connected networks as matrix products, not differentiating twice.

With z^p = W_p x^p, x^{p+1} = s(z^p), delta^p = dl/dz^p and Z^{pq} = d^2 l / dz^p dz^q, the block of layers p <= q is

    H_pq = (1/N) sum_n [ Z^{pq}_n (x) x^p_n x^q_n^T + (for p < q) x^p_n times dx^q/dz^p times delta^q_n ]

([D], arXiv:2505.02809; MATH.md, section 2). Dropping the terms with delta (and s'') gives the Gauss-Newton matrix G;
these alone are the residual part R = H - G, of which nothing cancels: zero in the last layer, zero within a layer where
s'' is (ReLU), and in the block of a layer with the next one then a single column per pair of neurons.
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
from hesscope.operators.closed_form.backward import Level, Part, Tile, levels, output_curvature, tiles
from hesscope.operators.closed_form.network import Network
from hesscope.operators.closed_form.strips import Cut, Strip, cut_matrix, cut_samples
from hesscope.operators.operator import STRIP_MEMORY

# Halving a symmetric block pays from this many inputs on: narrower products are slower than the half they save.
HALVED_INPUTS = 128

# Samples of weight zero (about half of them for a ReLU neuron, three quarters for two) are left out of products with so
# many entries, if no more than this share is left: otherwise picking them takes longer than multiplying all.
LARGE_PRODUCT, MOST_COUNTING = 2**14, 0.75

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


def dense(objective: Objective, network: Network, part: Part = "hessian", memory: int = STRIP_MEMORY) -> Tensor:
    """The Hessian, or one of its parts, [P, P], exactly symmetric.

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
    _sum_over_samples(list(zip(cut.strips, views, strict=True)), objective, network, cut, part)
    _mirror_(H)
    _require_finite(H)
    return _to_parameter_order(H, network) if any(network.biased) else H


def strips(
    objective: Objective, network: Network, part: Part = "hessian", memory: int = STRIP_MEMORY
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
        _sum_over_samples([(strip, values)], objective, network, cut, part)
        if len(strip.neurons) > 1:
            _mirror_(values[:, : strip.own_columns(network)])
        _require_finite(values)
        yield strip, values


def _sum_over_samples(
    parts: Sequence[tuple[Strip, Tensor]], objective: Objective, network: Network, cut: Cut, part: Part
) -> None:
    """Fill the strips: the one routine behind `dense` and `strips`."""
    buffer = _allocated(objective, cut.buffer)
    fresh = True
    with tiles(objective, network, cut.samples) as pieces:
        for tile in pieces:
            _add_tile([_Target(strip, values, network, fresh) for strip, values in parts], tile, part, buffer)
            fresh = False


def _add_tile(targets: Sequence[_Target], tile: Tile, part: Part, buffer: Tensor) -> None:
    last = len(tile.weights) - 1
    for target in targets:
        if part == "residual" and target.fresh:
            target.values.zero_()
        if target.strip.layer == last and part != "residual":
            _add_last_layer(target, tile, buffer)
    lowest = min(target.strip.layer for target in targets)
    for level in levels(tile, lowest, part, chains=part != "gauss_newton"):
        for target in targets:
            if target.strip.layer == level.layer:
                if level.layer in level.Z:
                    _add_same_layer(target, level.Z[level.layer], tile.inputs[level.layer], buffer)
                for q in range(level.layer + 1, last + 1):
                    _add_layers(target, q, level, tile, part, buffer)


def _add_same_layer(target: _Target, Z: Tensor, x: Tensor, buffer: Tensor) -> None:
    """Add sum_n Z_n (x) x_n x_n^T, Z [S, m, m], for the strip's neurons a and all b >= a."""
    strip, block = target.strip, target.block(target.strip.layer)
    d, rows = x.shape[1], x[:, strip.inputs.start : strip.inputs.stop]
    if len(strip.inputs) == d >= 2 * HALVED_INPUTS and HALVED_INPUTS * (len(x) + d) <= buffer.numel():
        for number, a in enumerate(strip.neurons):
            for b in range(a, Z.shape[2]):
                out = block[number, :, b - strip.neurons.start]
                _add_symmetric(out, x, Z[:, a, b], target.fresh, buffer)
        return
    step = max(1, buffer.numel() // (d * len(x)))
    for number, a in enumerate(strip.neurons):
        some = _counting(Z[:, a].any(dim=1), rows.shape[1] * d * (Z.shape[2] - a))
        left, right = rows[some].T, x[some, None, :]
        for first in range(a, Z.shape[2], step):
            z = Z[some, a, first : first + step, None]
            columns = slice(first - strip.neurons.start, first - strip.neurons.start + z.shape[1])
            U = torch.mul(z, right, out=buffer[: z.numel() * d].view(len(z), z.shape[1], d))
            _multiply_into(block[number, :, columns].view(rows.shape[1], -1), left, U.flatten(1), target.fresh)


def _add_symmetric(out: Tensor, x: Tensor, weight: Tensor, fresh: bool, buffer: Tensor) -> None:
    """Add sum_n weight_n x_n x_n^T to `out` [d, d]: pieces of columns, whose rows end where they do."""
    d, some = x.shape[1], _counting(weight, x.shape[1] ** 2)
    x, weight = x[some], weight[some, None]
    for start in range(0, d, HALVED_INPUTS):
        part = slice(start, min(start + HALVED_INPUTS, d))
        width = part.stop - start
        right, rest = _take(buffer, len(x), width)
        torch.mul(weight, x[:, part], out=right)
        product, _ = _take(rest, part.stop, width)
        torch.mm(x[:, : part.stop].T, right, out=product)
        _add(out[: part.stop, part], product, fresh)
        _add(out[part, :start], product[:start].T, fresh)


def _counting(weight: Tensor, entries: int) -> Tensor | slice:
    """The samples whose weight is not zero, where leaving out the others makes a product of so many entries cheaper."""
    if entries < LARGE_PRODUCT:
        return slice(None)
    some = weight.nonzero().squeeze(1)
    return some if len(some) <= MOST_COUNTING * len(weight) else slice(None)


@dataclass(frozen=True)
class _Right:
    """What the inputs of a later layer q have to do with a neuron a of layer p, of S samples.

    Attributes:
        Z: [S, m] Z_a^{pq}, or None for zero; x: [S, d] x^q; delta: [S, m] delta^q.
        moved: [S, d] dx^q/dz_a, zero but for the inputs `moving`; there are none for the Gauss-Newton part.
    """

    Z: Tensor | None
    x: Tensor
    delta: Tensor
    moved: Tensor
    moving: range

    @property
    def inputs(self) -> range:
        """The inputs that anything is to be added for."""
        return self.moving if self.Z is None else range(self.x.shape[1])

    def counts(self, j: int) -> Tensor:
        """Zero [S] for samples that add nothing for input j."""
        if j not in self.moving:
            return self.x[:, j]
        moved = self.moved[:, j] != 0
        return moved if self.Z is None else moved.logical_or_(self.x[:, j] != 0)

    def of_input(self, j: int, some: Tensor | slice, columns: slice, buffer: Tensor) -> Tensor:
        """Z_b x_j + delta_b moved_j [some samples, columns], at the start of the buffer."""
        factors = [] if self.Z is None else [(self.Z, self.x)]
        if j in self.moving:
            factors.append((self.delta, self.moved))
        (wide, thin), *rest = [(wide[some, columns], thin[some, j, None]) for wide, thin in factors]
        out, _ = _take(buffer, *wide.shape)
        torch.mul(wide, thin, out=out)
        for wide, thin in rest:
            out.addcmul_(wide, thin)
        return out


def _add_layers(target: _Target, q: int, level: Level, tile: Tile, part: Part, buffer: Tensor) -> None:
    """Add the block of the strip's layer p with a later layer q, neuron by neuron of p.

    Beside sum_n Z_n (x) x^p_n x^q_n^T, but for Gauss-Newton, the residual's term: x^p_i delta_b dx^q_j/dz^p_a. Both are
    zero where the neuron's slope is.
    """
    strip, block, p = target.strip, target.block(q), level.layer
    Z, rows = level.Z.get(q), tile.inputs[p][:, strip.inputs.start : strip.inputs.stop]
    large = rows.shape[1] * tile.delta[q].shape[1] >= LARGE_PRODUCT
    for number, a in enumerate(strip.neurons):
        inputs = 1 if Z is None and q == p + 1 else tile.inputs[q].shape[1]
        some = _counting(tile.slopes[p][:, a], rows.shape[1] * tile.delta[q].shape[1] * inputs)
        x = tile.inputs[q][some]
        moved, moving = torch.zeros_like(x), range(0)
        if part != "gauss_newton":
            moving = range(a, a + 1) if q == p + 1 else range(tile.weights[q].shape[1])
            reach = 1 if q == p + 1 else level.reach[q - 1][some, :, a]
            moved[:, moving.start : moving.stop] = reach * tile.slopes[q - 1][some, moving.start : moving.stop]
        right = _Right(None if Z is None else Z[some, a], x, tile.delta[q][some], moved, moving)
        add = _add_inputs if large or len(right.inputs) == 1 else _add_all_inputs
        add(block[number], rows[some], right, target.fresh, buffer)


def _add_inputs(out: Tensor, left: Tensor, right: _Right, fresh: bool, buffer: Tensor) -> None:
    """Add sum_n x_ni (Z_nb x_nj + delta_nb moved_nj) to `out` [i, b, j], for one input j after another."""
    (S, i), m = left.shape, out.shape[1]
    width = min(m, max(1, buffer.numel() // (S + i)))
    several = max(1, (buffer.numel() - S * width) // (i * width))
    for columns in (slice(start, min(start + width, m)) for start in range(0, m, width)):
        for start in range(right.inputs.start, right.inputs.stop, several):
            inputs = range(start, min(start + several, right.inputs.stop))
            products, rest = _take(buffer, i, len(inputs) * (columns.stop - columns.start))
            grid = products.view(i, len(inputs), -1)
            for number, j in enumerate(inputs):
                some = _counting(right.counts(j), i * grid.shape[2])
                torch.mm(left[some].T, right.of_input(j, some, columns, rest), out=grid[:, number])
            _add(out[:, columns, inputs.start : inputs.stop], grid.transpose(1, 2), fresh)


def _add_all_inputs(out: Tensor, left: Tensor, right: _Right, fresh: bool, buffer: Tensor) -> None:
    """The same for all inputs at once, which is faster for small products."""
    (S, i), (_, m, d) = left.shape, out.shape
    # The right-hand side U [S, j, b] is prepared with the longer of its two indices last, which is several times faster
    # than loops over a few numbers. If that is not the order of the matrix, the product is put into order afterwards.
    turned = d < m and d * (S + i) <= buffer.numel()
    step = max(1, buffer.numel() // (d * (S + (i if turned else 0))))
    moving = slice(right.moving.start, right.moving.stop)
    for columns in (slice(first, min(first + step, m)) for first in range(0, m, step)):
        delta, here = right.delta[:, columns], out[:, columns]
        flat, rest = _take(buffer, S, delta.shape[1] * d)
        U = flat.view(S, d, -1) if turned else flat.view(S, -1, d).transpose(1, 2)
        if right.Z is None:
            U.zero_()
        else:
            torch.mul(right.Z[:, None, columns], right.x[:, :, None], out=U)
        U[:, moving].addcmul_(delta[:, None, :], right.moved[:, moving, None])
        if turned:
            product, _ = _take(rest, i, flat.shape[1])
            torch.mm(left.T, flat, out=product)
            _add(here, product.view(i, d, -1).transpose(1, 2), fresh)
        else:
            _multiply_into(here.view(i, -1), left.T, flat, fresh)


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
    start, stop, C, halved = strip.neurons.start, strip.neurons.stop, p.shape[1], len(strip.inputs) == d
    piece = _largest_piece(len(x), d, buffer.numel(), C)
    wide = (buffer.numel() - len(x) * piece) // (d * piece)
    for row, i in enumerate(strip.inputs):
        first = i if halved else 0
        weights = [-scale * x[:, i] * x[:, j] for j in range(first, d)]
        counting = [_counting(weight, piece * min(wide, C)) for weight in weights]
        pairs = [(p[some], weight[some, None]) for some, weight in zip(counting, weights, strict=True)]
        for A in (slice(a, min(a + piece, stop)) for a in range(start, stop, piece)):
            for B in (slice(b, min(b + wide, C)) for b in range(A.start, C, wide)):
                product, rest = _take(buffer, A.stop - A.start, len(pairs) * (B.stop - B.start))
                grid = product.view(A.stop - A.start, len(pairs), -1)
                for number, (q, weight) in enumerate(pairs):
                    left, _ = _take(rest, len(q), A.stop - A.start)
                    torch.mul(q[:, A], weight, out=left)
                    torch.mm(left.T, q[:, B], out=grid[:, number])
                here = block[A.start - start : A.stop - start, :, B.start - start : B.stop - start]
                _add(here[:, row, :, first:], grid.transpose(1, 2), target.fresh)  # [a, b, j]
                if halved:
                    _add(here[:, i + 1 :, :, i], grid[:, 1:], target.fresh)  # [a, j, b]


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
