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

    The weights are samples (20,000, fewer above 10,000 classes) of those that ReLU does not mask, whose probability is
    exact: the rare ones at the rim can come out as narrow intervals of the support. For the hidden layer the laws hold
    given V, of which one is drawn (`seed`): off-diagonal blocks even change their sign with it.

    Args: as in `static_force`.

    Raises:
        InputError: as `static_force`.

    Source: [D]; MATH.md, sections 2 and 4.
    """
    ensemble = describe(model, loss, classes, gamma, width, activation, hidden_scale, output_scale)
    rng = stream(seed, "block_laws", model, loss, activation, classes)
    if ensemble.width is None:
        own, cross = _linear_weights(ensemble, rng)
        return BlockLaws(SpectralLaw(own, ensemble.gamma), SpectralLaw(cross, ensemble.gamma))
    V = rng.standard_normal((ensemble.classes, ensemble.width)) * (ensemble.output_scale / sqrt(ensemble.width))
    return BlockLaws(*(_hidden_law(ensemble, V, other, rng) for other in (0, 1)))


def _linear_weights(ensemble: Ensemble, rng: np.random.Generator) -> tuple[Array, Array]:
    """A_11 and A_12: p_1 (1 - p_1) and -p_1 p_2, or 2/C and 0 under squared error."""
    C = ensemble.classes
    if ensemble.loss == "mse":
        return np.full(1, 2 / C), np.zeros(1)
    p = np.concatenate([_softmax(ensemble.output_scale * rng.standard_normal((rows, C)))[:, :2] for rows in _tiles(C)])
    return p[:, 0] * (1 - p[:, 0]), -p[:, 0] * p[:, 1]


def _hidden_law(ensemble: Ensemble, V: Array, other: int, rng: np.random.Generator) -> SpectralLaw:
    """Law for the weights (V^T A V)_ij s'_i s'_j + delta_ij (V^T e)_i s''_i of neurons i = 0 and j = `other`."""
    relu = ensemble.activation == "relu"
    v, w = V[:, 0], V[:, other]
    weights = []
    for rows in _tiles(ensemble.classes):
        z = ensemble.hidden_scale * rng.standard_normal((rows, V.shape[1]))
        if relu:  # only inputs that both neurons let pass; the others have weight zero
            z[:, [0, other]] = np.abs(z[:, [0, other]])
        labels = rng.integers(0, ensemble.classes, rows)
        h, slope, bend = ACTIVATIONS[ensemble.activation].derivatives(z)
        outputs = h @ V.T
        if ensemble.loss == "mse":
            scale = 2 / ensemble.classes
            curvature, residual = np.full(rows, scale * (v @ w)), scale * (outputs @ v - v[labels])
        else:
            p = _softmax(outputs)
            curvature, residual = p @ (v * w) - (p @ v) * (p @ w), p @ v - v[labels]
        weights.append(curvature * slope[:, 0] * slope[:, other] + (other == 0) * residual * bend[:, 0])
    drawn = np.concatenate(weights)
    passed = (0.5 if other == 0 else 0.25) if relu else 1.0
    probabilities = np.append(np.full(len(drawn), passed / len(drawn)), 1 - passed)
    return SpectralLaw(np.append(drawn, 0.0), ensemble.gamma, probabilities)


def _tiles(classes: int) -> list[int]:
    """Numbers of weights of the tiles, at most TABLE logits each."""
    count = min(WEIGHTS, max(NUMBERS // classes, 100))
    tile = max(1, TABLE // classes)
    return [min(tile, count - start) for start in range(0, count, tile)]


def _softmax(logits: Array) -> Array:
    p: Array = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    return p
