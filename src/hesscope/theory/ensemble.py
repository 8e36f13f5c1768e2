"""The families of random networks that the static force is about, and what makes a description of one valid."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from hesscope.core.checks import require_choice, require_positive_int
from hesscope.core.errors import InputError
from hesscope.theory.activations import ACTIVATIONS

MODELS = ("linear", "one_hidden")
LOSSES = ("cross_entropy", "mse")
# Logits of standard deviation 10 are one-hot for any purpose.
MAX_SCALE = 10.0


@dataclass(frozen=True)
class Ensemble:
    """A family of random networks on Gaussian inputs with uniform labels.

    Attributes:
        model: "linear" or "one_hidden"; loss: "cross_entropy" or "mse".
        classes: C; gamma: d/N; width: m, None for the linear model.
        inputs, samples: d and N, both None in the limit.
        activation: of the hidden layer; hidden_scale, output_scale: standard deviations of the entries of W and V times
            the square root of their fan-in.
    """

    model: str
    loss: str
    classes: int
    gamma: float
    width: int | None
    inputs: int | None
    samples: int | None
    activation: str
    hidden_scale: float
    output_scale: float


def describe(
    model: str,
    loss: str,
    classes: int,
    gamma: float | None = None,
    width: int | None = None,
    activation: str = "relu",
    hidden_scale: float = 1.0,
    output_scale: float = 1.0,
    inputs: int | None = None,
    samples: int | None = None,
) -> Ensemble:
    """The family of networks with these properties (see `static_force`).

    Raises:
        InputError: a value outside its range, or something that is missing or given twice.
    """
    require_choice("model", model, MODELS)
    require_choice("loss", loss, LOSSES)
    require_choice("activation", activation, ACTIVATIONS)
    require_positive_int("classes", classes)
    if classes < 2:
        raise InputError(f"classes must be at least 2, got {classes}")
    for name, scale in (("hidden_scale", hidden_scale), ("output_scale", output_scale)):
        if not 0 < scale <= MAX_SCALE:
            raise InputError(f"{name} must be positive and at most {MAX_SCALE:g}, got {scale}")
    gamma = _gamma(gamma, inputs, samples)
    if model == "linear":
        return Ensemble(model, loss, classes, gamma, None, inputs, samples, activation, hidden_scale, output_scale)
    if width is None:
        raise InputError("model 'one_hidden' needs width, the number of hidden neurons")
    require_positive_int("width", width)
    if width < 2:
        raise InputError("width must be at least 2, so that there are off-diagonal blocks, got 1")
    bound = critical_width(activation, hidden_scale, output_scale)
    if loss == "cross_entropy" and width <= bound:
        raise InputError(
            f"cross-entropy with {activation} needs width > {bound:g} at these scales (the moments of the limit C -> "
            f"infinity diverge below, arXiv:2505.02809), got {width}"
        )
    return Ensemble(model, loss, classes, gamma, width, inputs, samples, activation, hidden_scale, output_scale)


def _gamma(gamma: float | None, inputs: int | None, samples: int | None) -> float:
    """d/N, from either of the two ways to give it."""
    if (gamma is None) == (inputs is None and samples is None):
        raise InputError("give either gamma, or inputs and samples")
    if gamma is None:
        if inputs is None or samples is None:
            raise InputError("inputs and samples must be given together")
        require_positive_int("inputs", inputs)
        require_positive_int("samples", samples)
        gamma = inputs / samples
    if not 0 < gamma < inf:
        raise InputError(f"gamma must be positive and finite, got {gamma}")
    return float(gamma)


def critical_width(activation: str, hidden_scale: float, output_scale: float) -> float:
    """Width m above which E e^{2 tau s s'} and E e^{tau s^2} exist: 2 for ReLU and GELU at scale 1, 0 for tanh."""
    return 2 * (ACTIVATIONS[activation].growth * hidden_scale * output_scale) ** 2
