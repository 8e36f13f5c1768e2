"""The static force: off-diagonal ratios r that the architecture alone dictates at random initialization.

Inputs x ~ N(0, I_d), labels uniform and independent of them, weights N(0, (scale)^2 / fan-in): [D], arXiv:2505.02809;
MATH.md, sections 4.3 to 4.5. Deterministic for the linear model and for squared error as d, N -> infinity, else Monte
Carlo over random networks with a standard error.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import exp, inf
from typing import TYPE_CHECKING

from hesscope.core.errors import InputError
from hesscope.core.records import Provenance
from hesscope.theory.ensemble import Ensemble, describe
from hesscope.theory.softmax_moments import pair_moment, variance_moment
from hesscope.theory.static_limits import limit_hidden, limit_output, squared_error_hidden
from hesscope.theory.static_samples import sample_ratios

if TYPE_CHECKING:
    import xarray as xr


@dataclass(frozen=True)
class StaticForce:
    """Predicted off-diagonal ratios r of the layers' Hessians at initialization (pure numbers).

    Attributes:
        hidden_ratio, output_ratio: r at this number of classes C; None where there is no such layer, 0.0 where the
            Hessian is exactly block-diagonal.
        hidden_stderr, output_stderr: Monte Carlo standard errors; 0.0 where r is deterministic.
        limit_hidden, limit_output: limits of C r and of C^2 r as d, N and then C grow.
        provenance: how it was made; `seed` is None if nothing was drawn.
    """

    hidden_ratio: float | None
    output_ratio: float
    hidden_stderr: float | None
    output_stderr: float
    limit_hidden: float | None
    limit_output: float
    provenance: Provenance

    def to_xarray(self) -> xr.Dataset:
        """Scalars by name, with the provenance as attributes; what does not exist is left out."""
        import xarray as xr

        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "provenance"}
        numbers = {name: value for name, value in values.items() if value is not None}
        return xr.Dataset(numbers, attrs={"record": "StaticForce", **self.provenance.attributes()})


def static_force(
    model: str,
    loss: str,
    classes: int,
    gamma: float | None = None,
    width: int | None = None,
    *,
    activation: str = "relu",
    hidden_scale: float = 1.0,
    output_scale: float = 1.0,
    inputs: int | None = None,
    samples: int | None = None,
    rtol: float = 0.02,
    seed: int = 0,
) -> StaticForce:
    """Predict r of the linear model o = V x or of one hidden layer o = V s(W x), without bias.

    Args:
        model: "linear" or "one_hidden".
        loss: "cross_entropy" or "mse".
        classes: C >= 2.
        gamma: d/N > 0 in the limit of large d and N; or instead
        inputs, samples: d and N >= 1, for their finite values (Monte Carlo, also where the limit is deterministic).
        width: m >= 2 of the hidden layer; under cross-entropy also so large that the limits exist, which for ReLU and
            GELU is m > 2 hidden_scale^2 output_scale^2: m >= 3 at scale 1.
        activation: "relu", "tanh" or "gelu".
        hidden_scale, output_scale: standard deviations of the entries of W and V in units of 1 / sqrt(fan-in), that is
            of LeCun's initialization.
            The linear model has the output layer only: its width, activation and hidden_scale are not used.
        rtol: relative standard error at which a Monte Carlo stops. It also stops after about half a minute; heavy tails
            (m close to its bound) can leave a larger standard error, which the record states.
        seed: root of the Monte Carlo streams.

    Raises:
        InputError: a value outside these ranges, or that is missing or given twice.

    Source: [D]; MATH.md, sections 4.3 to 4.5; other activations, scales and finite d and N by the same argument.
    """
    ensemble = describe(model, loss, classes, gamma, width, activation, hidden_scale, output_scale, inputs, samples)
    if not 0 < rtol < 1:
        raise InputError(f"rtol must lie between 0 and 1, got {rtol}")
    if ensemble.width is None:
        return _linear(ensemble, rtol, seed)
    return _one_hidden(ensemble, ensemble.width, rtol, seed)


def _linear(ensemble: Ensemble, rtol: float, seed: int) -> StaticForce:
    C, gamma, scale = ensemble.classes, ensemble.gamma, ensemble.output_scale
    if ensemble.loss == "mse":
        return StaticForce(None, 0.0, None, 0.0, None, 0.0, _provenance("exact"))
    limit = (1 + gamma * exp(2 * scale**2)) / (1 + gamma * exp(scale**2))
    if ensemble.inputs is not None:
        sampled = sample_ratios(ensemble, rtol, seed)["output"]
        return StaticForce(None, sampled.value, None, sampled.stderr, None, limit, _provenance("Monte Carlo", seed))
    off = pair_moment(1, C, scale) ** 2 + gamma * pair_moment(2, C, scale)
    diagonal = variance_moment(1, C, scale) ** 2 + gamma * variance_moment(2, C, scale)
    return StaticForce(None, off / diagonal, None, 0.0, None, limit, _provenance("quadrature of softmax moments"))


def _one_hidden(ensemble: Ensemble, m: int, rtol: float, seed: int) -> StaticForce:
    gamma, loss = ensemble.gamma, ensemble.loss
    family = (m, ensemble.activation, ensemble.hidden_scale, ensemble.output_scale)
    if loss == "mse":
        limit = squared_error_hidden(inf, gamma, *family)
        if ensemble.inputs is None:
            ratio = squared_error_hidden(ensemble.classes, gamma, *family) / ensemble.classes
            return StaticForce(ratio, 0.0, 0.0, 0.0, limit, 0.0, _provenance("closed form"))
        hidden = sample_ratios(ensemble, rtol, seed)["hidden"]
        return StaticForce(hidden.value, 0.0, hidden.stderr, 0.0, limit, 0.0, _provenance("Monte Carlo", seed))
    limits = limit_hidden(gamma, *family), limit_output(*family)
    ratios = sample_ratios(ensemble, rtol, seed)
    hidden, output = ratios["hidden"], ratios["output"]
    return StaticForce(
        hidden.value, output.value, hidden.stderr, output.stderr, *limits, _provenance("Monte Carlo", seed)
    )


def _provenance(engine: str, seed: int | None = None) -> Provenance:
    return Provenance(engine=f"static force: {engine}", dtype="float64", device="cpu", seed=seed)
