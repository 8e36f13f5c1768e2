"""Monte Carlo of the static force: unbiased energies of random networks, without a d x d block (MATH.md, section 4.5).

Each draw is one random initialization that sees n inputs; squares of expectations over inputs are products over
different inputs. With lambda_n the weights of a block H = (1/N) sum_n lambda_n x_n x_n^T,

    E||H||_F^2 = (1 - 1/N) E[lambda lambda' (x . x')^2] + E[lambda^2 |x|^4] / N

needs inner products only. As d, N -> infinity, divided by d, this becomes E[lambda lambda'] + gamma E[lambda^2].
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hesscope.core.rng import normal, stream
from hesscope.theory.activations import ACTIVATIONS
from hesscope.theory.ensemble import Ensemble

Array = npt.NDArray[np.float64]

# Networks drawn before the first and between two looks at the standard errors.
FIRST, ROUND = 64, 32
# Multiply-adds that a prediction may cost: at most about 30 s on two cores.
BUDGET = 5e11
# Inputs that a network sees: between the two ends, and inputs x classes at most this in between. Few at large C, where
# another network tells more than other inputs to the same one.
FEWEST_INPUTS, MOST_INPUTS, TABLE = 32, 256, 2**17
# From this many classes on tables with one entry a class are float32: their rounding is far below the sampling error.
MANY_CLASSES = 4096
# Entries of the table of products v_ci v_cj of a tile of classes.
PRODUCTS = 2**22


@dataclass(frozen=True)
class SampledRatio:
    """Ratio of two means over draws, and its standard error (delta method)."""

    value: float
    stderr: float

    @classmethod
    def of(cls, energies: Array) -> SampledRatio:
        """From energies of the off-diagonal and of the diagonal blocks, [draws, 2]."""
        top, bottom = energies.mean(axis=0)
        residuals = energies[:, 0] - top / bottom * energies[:, 1]
        return cls(float(top / bottom), float(residuals.std(ddof=1) / sqrt(len(energies)) / bottom))


def sample_ratios(ensemble: Ensemble, rtol: float, seed: int) -> dict[str, SampledRatio]:
    """Off-diagonal ratios by layer, "hidden" and "output" as far as there are such.

    Networks are drawn until all standard errors are at most `rtol` times their ratios, or until the budget is spent:
    with heavy tails (few neurons, large scales) the standard errors can end above `rtol`.
    """
    rng = stream(seed, "static_force", ensemble.model, ensemble.loss, ensemble.activation, ensemble.classes)
    draws: list[dict[str, tuple[float, float]]] = []
    affordable = max(FIRST, int(BUDGET / _cost(ensemble)))
    while True:
        draws += [_draw(ensemble, rng) for _ in range(ROUND if draws else FIRST)]
        ratios = {layer: SampledRatio.of(np.asarray([draw[layer] for draw in draws])) for layer in draws[0]}
        relative = max(ratio.stderr / ratio.value for ratio in ratios.values())
        if not relative > rtol or len(draws) >= affordable:  # nan, where energies underflow, will not get better
            return ratios


def _inputs_per_network(classes: int) -> int:
    return min(max(TABLE // classes, FEWEST_INPUTS), MOST_INPUTS)


def _cost(ensemble: Ensemble) -> float:
    """Multiply-adds of one draw, with functions and random numbers counted by their time."""
    C, n = ensemble.classes, _inputs_per_network(ensemble.classes)
    m, d = ensemble.width or 0, ensemble.inputs or 0
    random = (C + n) * (m or d) * 200 + n * C * 100 + 1e7
    return random + n * C * (m * (m + 1) + 4 * n) + n * d * (n + m) + (0 if m else n * C * d)


def _draw(ensemble: Ensemble, rng: np.random.Generator) -> dict[str, tuple[float, float]]:
    """Mean energies (off-diagonal, diagonal) of one random network's layers."""
    C, m, d = ensemble.classes, ensemble.width, ensemble.inputs
    n = _inputs_per_network(C)
    dtype = torch.float32 if C >= MANY_CLASSES else torch.float64
    x = None if d is None else normal((n, d), rng)
    if m is None:
        assert x is not None and d is not None
        V = normal((d, C), rng).to(dtype) * (ensemble.output_scale / sqrt(d))
        p = torch.softmax(x.to(dtype) @ V, dim=1)
        return {"output": _output_energies(p, _pair_factors(x, ensemble))}
    z = normal((n, m), rng) if x is None or d is None else x @ normal((d, m), rng) / sqrt(d)
    values = ACTIVATIONS[ensemble.activation].derivatives(ensemble.hidden_scale * z.numpy())
    h, slope, bend = (torch.from_numpy(value) for value in values)
    V = normal((m, C), rng).to(dtype) * (ensemble.output_scale / sqrt(m))
    factors = torch.full((n, n), 1 / (n * (n - 1)), dtype=torch.float64).fill_diagonal_(ensemble.gamma / n)
    if x is not None:
        factors = _pair_factors(x, ensemble)
    label = V.mean(dim=1).double(), V.square().mean(dim=1).double()
    if ensemble.loss == "mse":
        gram = (V @ V.T).double()
        return {"hidden": _hidden_energies(gram.expand(n, m, m), h @ gram, label, slope, bend, factors)}
    p = torch.softmax(h.to(dtype) @ V, dim=1)
    mean = (p @ V.T).double()
    curvature = _second_moment(p, V) - mean[:, :, None] * mean[:, None, :]
    return {
        "hidden": _hidden_energies(curvature, mean, label, slope, bend, factors),
        "output": _output_energies(p, _pair_factors(h, ensemble)),
    }


def _pair_factors(features: Tensor, ensemble: Ensemble) -> Tensor:
    """Factors F [n, n] with E sum_nm F_nm lambda_n lambda_m = E||H||_F^2 for a block with these features [n, k]."""
    n = len(features)
    rest = 0.0 if ensemble.samples is None else 1 / ensemble.samples
    factors = (features @ features.T).square_()
    own = factors.diagonal().clone()
    return factors.mul_((1 - rest) / (n * (n - 1))).fill_diagonal_(0).diagonal_scatter(own * (rest / n))


def _hidden_energies(
    curvature: Tensor, mean: Tensor, label: tuple[Tensor, Tensor], slope: Tensor, bend: Tensor, factors: Tensor
) -> tuple[float, float]:
    """Energies of the hidden layer's blocks: weights (V^T A V)_ij s'_i s'_j + delta_ij (V^T e)_i s''_i.

    V^T e = `mean` - v_y. The label y is averaged over, in the mean and in the mean square of a weight: `label` holds
    the means over classes of v_y and of its square, [m] each.
    """
    m = len(label[0])
    weights = curvature * slope[:, :, None] * slope[:, None, :]
    own = weights.diagonal(dim1=1, dim2=2) + mean * bend
    squared = own.square() - 2 * own * label[0] * bend + bend.square() * label[1]
    squares = weights.square().diagonal_scatter(squared, dim1=1, dim2=2).flatten(1)
    weights = weights.diagonal_scatter(own - label[0] * bend, dim1=1, dim2=2).flatten(1)
    pairs = factors.clone().fill_diagonal_(0)
    energy = ((pairs @ weights) * weights).sum(dim=0) + factors.diagonal() @ squares
    diagonal = energy.view(m, m).diagonal().sum()
    return float((energy.sum() - diagonal) / (m * (m - 1))), float(diagonal / m)


def _output_energies(p: Tensor, factors: Tensor) -> tuple[float, float]:
    """Energies of the output layer's blocks: weights p_i (delta_ij - p_j)."""
    C = p.shape[1]
    squares = p.square()
    off = (factors * ((p @ p.T).square() - squares @ squares.T)).sum()
    q = p - squares
    return float(off / (C * (C - 1))), float((factors * (q @ q.T)).sum() / C)


def _second_moment(p: Tensor, V: Tensor) -> Tensor:
    """Sum_c p_nc v_ic v_jc, [n, m, m] in float64, from the pairs i <= j in tiles of classes; p [n, C], V [m, C]."""
    m = len(V)
    i, j = torch.triu_indices(m, m)
    total = torch.zeros(len(i), len(p), dtype=torch.float64)
    tile = max(1, PRODUCTS // len(i))
    for part, columns in zip(torch.split(p, tile, dim=1), torch.split(V, tile, dim=1), strict=True):
        total += torch.cat([columns[row:] * columns[row] for row in range(m)]) @ part.T
    moment = torch.empty(len(p), m, m, dtype=torch.float64)
    moment[:, i, j], moment[:, j, i] = total.T, total.T
    return moment
