"""Limit laws of whole blocks at random initialization: the spectra behind the static force.

As d, N -> infinity, a block H_ij = (1/N) sum_n lambda_n x_n x_n^T of Gaussian inputs x_n has the law of weights
lambda_n that do not depend on them: [D], arXiv:2505.02809; MATH.md, sections 2 and 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import numpy as np
import numpy.typing as npt

from hesscope.core.rng import stream
from hesscope.theory.activations import ACTIVATIONS
from hesscope.theory.ensemble import Ensemble, describe
from hesscope.theory.spectral_law import SpectralLaw

Array = npt.NDArray[np.float64]

# Weights drawn, and numbers that may be drawn for them.
WEIGHTS, NUMBERS = 20_000, 2 * 10**8
# Entries of a table of logits.
TABLE = 2**22


@dataclass(frozen=True)
class BlockLaws:
    """Laws of the eigenvalues of a diagonal and of an off-diagonal block of the layer that sees the inputs."""

    diagonal: SpectralLaw
    off_diagonal: SpectralLaw


def block_laws(
    model: str,
    loss: str,
    classes: int,
    gamma: float,
    width: int | None = None,
    *,
    activation: str = "relu",
    hidden_scale: float = 1.0,
    output_scale: float = 1.0,
    seed: int = 0,
) -> BlockLaws:
    """Laws of H_11 and H_12 of the linear model's V or of the hidden layer's W, d x d blocks, in the loss's units.

    The weights are samples: 20,000, fewer above 10,000 classes. For the hidden layer they hold given V, of which one is
    drawn (`seed`); its blocks differ from draw to draw by a relative O(1/sqrt(C)).

    Args: as in `static_force`.

    Raises:
        InputError: as `static_force`.

    Source: [D]; MATH.md, sections 2 and 4.
    """
    ensemble = describe(model, loss, classes, gamma, width, activation, hidden_scale, output_scale)
    rng = stream(seed, "block_laws", model, loss, activation, classes)
    own, cross = (
        _linear_weights(ensemble, rng) if ensemble.width is None else _hidden_weights(ensemble, ensemble.width, rng)
    )
    return BlockLaws(SpectralLaw(own, ensemble.gamma), SpectralLaw(cross, ensemble.gamma))


def _linear_weights(ensemble: Ensemble, rng: np.random.Generator) -> tuple[Array, Array]:
    """A_11 and A_12: p_1 (1 - p_1) and -p_1 p_2, or 2/C and 0 under squared error."""
    C = ensemble.classes
    if ensemble.loss == "mse":
        return np.full(1, 2 / C), np.zeros(1)
    p = np.concatenate([_softmax(ensemble.output_scale * rng.standard_normal((rows, C)))[:, :2] for rows in _tiles(C)])
    return p[:, 0] * (1 - p[:, 0]), -p[:, 0] * p[:, 1]


def _hidden_weights(ensemble: Ensemble, m: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """(V^T A V)_ij s'_i s'_j + delta_ij (V^T e)_i s''_i for neurons (1, 1) and (1, 2) and one V."""
    C = ensemble.classes
    V = rng.standard_normal((C, m)) * (ensemble.output_scale / sqrt(m))
    own, cross = [], []
    for rows in _tiles(C):
        z = ensemble.hidden_scale * rng.standard_normal((rows, m))
        labels = rng.integers(0, C, rows)
        h, slope, bend = ACTIVATIONS[ensemble.activation].derivatives(z)
        outputs = h @ V.T
        v, w = V[:, 0], V[:, 1]
        if ensemble.loss == "mse":
            scale, residual = 2 / C, 2 / C * (outputs @ v - v[labels])
            a, b = np.full(rows, scale * (v @ v)), np.full(rows, scale * (v @ w))
        else:
            p = _softmax(outputs)
            mean = p @ v
            residual = mean - v[labels]
            a, b = p @ v**2 - mean**2, p @ (v * w) - mean * (p @ w)
        own.append(a * slope[:, 0] ** 2 + residual * bend[:, 0])
        cross.append(b * slope[:, 0] * slope[:, 1])
    return np.concatenate(own), np.concatenate(cross)


def _tiles(classes: int) -> list[int]:
    """Numbers of weights of the tiles, at most TABLE logits each."""
    count = min(WEIGHTS, max(NUMBERS // classes, 100))
    tile = max(1, TABLE // classes)
    return [min(tile, count - start) for start in range(0, count, tile)]


def _softmax(logits: Array) -> Array:
    p: Array = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    return p
