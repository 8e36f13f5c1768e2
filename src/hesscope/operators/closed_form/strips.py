"""How a matrix is cut into strips and its samples into tiles, so that everything fits into a stated memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hesscope.core.errors import TooLargeError
from hesscope.core.memory import human_bytes
from hesscope.operators.closed_form.network import Network

# Bytes of one tile of samples beyond which nothing is gained: products are as fast, and caches are missed.
TILE_BYTES = 2**28


@dataclass(frozen=True)
class Strip:
    """Rows of the matrix in own order: some inputs of some neurons of a layer.

    Its columns run from the first input of its first neuron to the end. It holds all inputs of several neurons, or
    some inputs of one.
    """

    layer: int
    neurons: range
    inputs: range

    def rows(self, network: Network) -> slice:
        """The rows, in own order."""
        start = self.column(network) + self.inputs.start
        return slice(start, start + len(self.neurons) * len(self.inputs))

    def column(self, network: Network) -> int:
        """The first column, in own order."""
        return network.starts[self.layer] + self.neurons.start * network.shapes[self.layer][1]

    def width(self, network: Network) -> int:
        """Number of columns."""
        return network.starts[-1] - self.column(network)

    def area(self, network: Network) -> int:
        """Number of entries."""
        return len(self.neurons) * len(self.inputs) * self.width(network)

    def own_columns(self, network: Network) -> int:
        """How many of the first columns are those of the strip's own neurons: no other strip holds their mirror."""
        return len(self.neurons) * network.shapes[self.layer][1]


@dataclass(frozen=True)
class Cut:
    """Strips, samples of a tile, numbers (of the matrix's dtype) in the buffer that products are prepared in.

    `bytes` is what all of it takes: the largest strip, if strips are no views, the tile and the buffer.
    """

    strips: tuple[Strip, ...]
    samples: int
    buffer: int
    bytes: int


def cut_matrix(network: Network, item: int, memory: int) -> Cut:
    """Strips that take at most half of `memory`, tiles and buffer within the other half; `item` bytes a number.

    Raises:
        TooLargeError: not even one row and one sample fit.
    """
    need = 2 * item * max(network.starts[-1], _least_numbers(network))
    _require(need, memory, network, "one row and one sample")
    strips = tuple(_strips(network, memory // 2 // item))
    samples, buffer = _tile(network, item, memory // 2)
    largest = max(strip.area(network) for strip in strips)
    return Cut(strips, samples, buffer, item * (largest + samples * _sample_numbers(network) + buffer))


def cut_samples(network: Network, item: int, memory: int) -> Cut:
    """One strip a layer, each part of a result that is held anyway; tiles and buffer within `memory`.

    Raises:
        TooLargeError: not even one sample fits.
    """
    _require(item * _least_numbers(network), memory, network, "one sample")
    strips = tuple(Strip(layer, range(m), range(d)) for layer, (m, d) in enumerate(network.shapes))
    samples, buffer = _tile(network, item, memory)
    return Cut(strips, samples, buffer, item * (samples * _sample_numbers(network) + buffer))


def samples_of_tile(network: Network, item: int, memory: int) -> int:
    """Samples whose forward and backward quantities fit into `memory`, at least one."""
    return max(1, memory // (item * (_forward_numbers(network) + _backward_numbers(network))))


def _require(need: int, memory: int, network: Network, what: str) -> None:
    if need > memory:
        raise TooLargeError(
            f"memory = {human_bytes(memory)} is too small for the closed form of {network.starts[-1]} parameters: "
            f"{what} take at least {human_bytes(need)}"
        )


def _strips(network: Network, numbers: int) -> Iterator[Strip]:
    """Strips of at most this many numbers each: whole neurons where one fits, else some inputs of one."""
    for layer, (m, d) in enumerate(network.shapes):
        neuron = 0
        while neuron < m:
            rows = numbers // Strip(layer, range(neuron, m), range(d)).width(network)
            if rows >= d:
                several = range(neuron, min(m, neuron + rows // d))
                yield Strip(layer, several, range(d))
                neuron = several.stop
            else:
                for start in range(0, d, rows):
                    yield Strip(layer, range(neuron, neuron + 1), range(start, min(start + rows, d)))
                neuron += 1


def _tile(network: Network, item: int, memory: int) -> tuple[int, int]:
    """Samples of a tile, and size of the buffer, which gets an eighth of `memory`."""
    numbers = max(min(memory, TILE_BYTES) // item, _least_numbers(network))
    buffer = min(max(numbers // 8, _buffer_numbers(network)), numbers - _sample_numbers(network))
    samples = min((numbers - buffer) // _sample_numbers(network), buffer // _buffer_numbers(network))
    return samples, buffer


def _least_numbers(network: Network) -> int:
    """Numbers that a tile of one sample and its buffer take."""
    return _sample_numbers(network) + _buffer_numbers(network)


def _buffer_numbers(network: Network) -> int:
    """Numbers of the buffer for each sample: one neuron's share of the widest right-hand side, and of its product."""
    return 2 * max(d for _, d in network.shapes)


def _sample_numbers(network: Network) -> int:
    """Numbers that one sample takes at most, beside the buffer."""
    return _forward_numbers(network) + _backward_numbers(network) + _picked_numbers(network)


def _picked_numbers(network: Network) -> int:
    """What is picked for a product where samples of weight zero are left out: inputs of two layers, Z and delta."""
    return 3 * max(d for _, d in network.shapes) + 3 * max(m for m, _ in network.shapes)


def _forward_numbers(network: Network) -> int:
    """Inputs, slopes, bends and gradients of all layers, of two tiles in turn, and what autograd keeps of one layer."""
    widths = [m for m, _ in network.shapes]
    return 2 * sum(d for _, d in network.shapes) + 6 * sum(widths) + 6 * max(widths)


def _backward_numbers(network: Network) -> int:
    """The most that is held of derivatives between layers: those of two adjacent ones, or those of the last one."""
    widths = [m for m, _ in network.shapes]
    C, d = network.shapes[-1]
    most = C * (min(C, d) + d + 1)
    for layer in range(network.last):
        own, above = widths[layer], sum(widths[layer + 1 :])
        now = own * (own + 2 * above)  # Z^{pq} for q >= p, dz^q/dz^p for q > p
        before = widths[layer + 1] * (2 * above) if layer + 1 < network.last else own * widths[-1]
        most = max(most, now + before + own * max(widths))
    return most
