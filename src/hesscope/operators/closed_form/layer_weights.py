"""The Hessian of one layer of a fully connected network as weighted covariances of its inputs, block by block.

The block of neurons i and j of a layer with inputs x_n is H_ij = (1/N) sum_n w_nij x_n x_n^T with
w_n = d^2 l_n / dz dz, z the layer's outputs (MATH.md, section 2): the form that random-matrix laws are about
(arXiv:2505.02809). Energies follow from the weights without a block (MATH.md, section 3).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hesscope.core.checks import nearest
from hesscope.core.errors import InputError
from hesscope.core.memory import require_memory
from hesscope.core.records import Provenance
from hesscope.objective.objective import Objective
from hesscope.operators.closed_form.backward import Tile, levels, output_curvature, tiles
from hesscope.operators.closed_form.network import recognize
from hesscope.operators.closed_form.strips import samples_of_tile

# Working memory of one tile of samples, beside the result.
TILE_BYTES = 2**26

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """One layer's Hessian blocks H_ij = (1/N) sum_n weights[n, i, j] x_n x_n^T between chosen neurons.

    Attributes:
        layer: its name; neurons: the k chosen ones, in the order of `weights`.
        inputs: [N, d] x_n, what the layer receives; with a constant 1 as last entry if it has a bias.
        weights: [N, k, k], symmetric; N is the number of rows, and class weights or ignored labels, for which the
            number of loss terms differs from N, are contained.
        provenance: how it was made.
    """

    layer: str
    neurons: tuple[int, ...]
    inputs: Tensor = field(repr=False)
    weights: Tensor = field(repr=False)
    provenance: Provenance

    def block(self, i: int, j: int) -> Tensor:
        """The block [d, d] of the chosen neurons with numbers i and j in `neurons`, exactly symmetric.

        Raises:
            InputError: there is no such number.
        """
        for number in (i, j):
            if not -len(self.neurons) <= number < len(self.neurons):
                raise InputError(f"block({i}, {j}) needs numbers in [0, {len(self.neurons)}) of the chosen neurons")
        block = self.inputs.T @ (self.weights[:, i, j, None] * self.inputs)
        return (block + block.T) / (2 * len(self.inputs))

    def energies(self) -> Array:
        """Squared Frobenius norms [k, k] of all blocks, exact, summed in float64; no block is formed.

        ||H_ij||_F^2 = (1/N^2) sum_nm w_nij w_mij (x_n . x_m)^2.
        """
        N, k = len(self.inputs), len(self.neurons)
        rows, columns = torch.triu_indices(k, k, device=self.weights.device)
        slabs = max(1, TILE_BYTES // (8 * 3 * N))  # pairs (i, j) that are taken at once: [N, pairs] and its product
        step = max(1, min(N, TILE_BYTES // (8 * 3 * N)))  # samples n of a tile of the Gram matrix, [step, N]
        sums = torch.zeros(len(rows), dtype=torch.float64, device=self.weights.device)
        x = self.inputs.double()
        for pairs in torch.split(torch.arange(len(rows), device=self.weights.device), slabs):
            a = self.weights[:, rows[pairs], columns[pairs]].double()
            for start in range(0, N, step):
                part = slice(start, start + step)
                # The Gram matrix is symmetric: its columns from the tile's own rows on, the others counted twice.
                gram = (x[part] @ x[start:].T).square_()
                gram[:, step:] *= 2
                sums[pairs] += ((gram @ a[start:]) * a[part]).sum(dim=0)
        energies = torch.zeros(k, k, dtype=torch.float64, device=sums.device)
        energies[rows, columns] = energies[columns, rows] = sums / N**2
        result: Array = energies.cpu().numpy()
        return result


def layer_weights(
    objective: Objective, layer: str, neurons: Iterable[int] | None = None, gauss_newton: bool = False
) -> LayerWeights:
    """The Hessian's blocks between neurons of one layer of a fully connected network, as weights of x_n x_n^T.

    Args:
        objective: of a network that the closed form applies to (see `Hessian.has_closed_form`).
        layer: name of a linear layer, such as "fc1".
        neurons: numbers of the layer's outputs to take, each once; all of them unless told.
        gauss_newton: of the Gauss-Newton matrix instead: without the terms with s''.

    Raises:
        InputError: the network or its loss has no closed form; no such layer; a neuron that does not exist.
        TooLargeError: the weights [N, k, k] would not fit in memory.
        DataError: the weights are not finite.

    Source: arXiv:2505.02809; MATH.md, sections 2 and 3.
    """
    if not isinstance(objective, Objective):
        raise InputError(f"objective must be a hesscope.Objective, got {type(objective).__name__}")
    network = recognize(objective)
    if network is None:
        raise InputError(
            "the weights of a layer need a fully connected network (hesscope.models.MLP, or a torch.nn.Sequential of "
            "Linear layers and elementwise activations in turn) with cross-entropy or mean squared error; got "
            f"{type(objective.model).__name__} with {objective.loss.name}"
        )
    if layer not in network.layers:
        known = ", ".join(network.layers)
        raise InputError(f"no layer is named {layer!r}; the layers are {known}{nearest(str(layer), network.layers)}")
    number = network.layers.index(layer)
    chosen = _chosen(neurons, network.shapes[number][0], layer)
    space = objective.parameters
    rows, item = _rows(objective), torch.empty(0, dtype=space.dtype).element_size()
    needed = item * rows * (len(chosen) ** 2 + network.shapes[number][1]) + TILE_BYTES
    what = f"the weights of {rows} x {len(chosen)} x {len(chosen)} numbers"
    require_memory(needed, space.device, what, "fewer neurons")
    inputs = torch.empty(rows, network.shapes[number][1], dtype=space.dtype, device=space.device)
    weights = torch.empty(rows, len(chosen), len(chosen), dtype=space.dtype, device=space.device)
    index = torch.tensor(chosen, device=space.device)
    start = 0
    with tiles(objective, network, samples_of_tile(network, item, TILE_BYTES)) as pieces:
        for tile in pieces:
            stop = start + len(tile.inputs[0])
            inputs[start:stop] = tile.inputs[number]
            weights[start:stop] = _curvature(tile, number, index, gauss_newton)
            start = stop
    # The tiles are divided by the number of loss terms, the blocks by the number of rows.
    weights *= rows
    return LayerWeights(
        layer=layer,
        neurons=tuple(chosen),
        inputs=inputs,
        weights=weights,
        provenance=Provenance(
            engine=f"closed form: {'gauss-newton' if gauss_newton else 'hessian'} weights of {layer}",
            dtype=str(space.dtype).removeprefix("torch."),
            device=str(space.device),
            data_fingerprint=objective.data_fingerprint,
        ),
    )


def _curvature(tile: Tile, number: int, neurons: Tensor, gauss_newton: bool) -> Tensor:
    """d^2 l / dz dz [S, k, k] of the chosen neurons of a layer."""
    if number == len(tile.weights) - 1:
        return output_curvature(tile, neurons)
    *_, level = levels(tile, number, "gauss_newton" if gauss_newton else "hessian", chains=False)
    Z = level.Z[number][:, neurons[:, None], neurons]
    return (Z + Z.transpose(1, 2)) / 2


def _chosen(neurons: Iterable[Any] | None, size: int, layer: str) -> list[int]:
    if neurons is None:
        return list(range(size))
    if not isinstance(neurons, Iterable):
        raise InputError(f"neurons must be a list of whole numbers, got {neurons!r}")
    chosen = list(neurons)
    for neuron in chosen:
        if isinstance(neuron, bool) or not isinstance(neuron, Integral) or not 0 <= int(neuron) < size:
            raise InputError(f"neurons must be whole numbers in [0, {size}), the neurons of {layer}; got {neuron!r}")
    if not chosen or len(set(chosen)) != len(chosen):
        raise InputError("neurons must name at least one neuron, and each only once")
    return [int(neuron) for neuron in chosen]


def _rows(objective: Objective) -> int:
    """Number of rows of all batches, ignored labels included."""
    with objective.evaluating() as (_, batches):
        return sum(len(batch[0]) for _, batch in batches)
