"""The exponent with which an off-diagonal ratio falls with the number of classes, and how sure it is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hesscope.core.errors import InputError

Array = npt.NDArray[np.float64]
CONFIDENCE = 0.95


@dataclass(frozen=True)
class ExponentFit:
    """A fitted exponent b of r = k C^b.

    Attributes:
        exponent: b; low, high: ends of its 95 % confidence interval.
    """

    exponent: float
    low: float
    high: float

    def contains(self, value: float) -> bool:
        """Whether the interval contains `value`."""
        return self.low <= value <= self.high


def fit_exponent(
    classes: npt.ArrayLike,
    off_diagonal: npt.ArrayLike,
    diagonal: npt.ArrayLike,
    predicted: npt.ArrayLike | None = None,
    predicted_stderr: npt.ArrayLike | None = None,
    asymptotic: float | None = None,
) -> ExponentFit:
    """Least-squares slope of log r over log C, where r is the ratio of energies summed over independent networks.

    At finite C the slope is not the exponent of the limit: C^2 r still grows by a fifth from C = 10 to 1000. With
    `predicted`, the slope of r / predicted, which only measures what theory does not explain, is added to the exponent
    `asymptotic` of the prediction.

    The interval is Student's, with the standard error from leaving out one network (of every C) at a time, and that of
    the prediction on top.

    Args:
        classes: C, [K], K >= 2 different values.
        off_diagonal, diagonal: mean energies of off-diagonal and of diagonal blocks, [K, S], of S >= 2 networks each.
        predicted, predicted_stderr: r at these C and its standard error, [K].
        asymptotic: exponent of the prediction as C -> infinity; needed with `predicted`.

    Raises:
        InputError: shapes that do not fit, fewer than two classes or networks, energies that are not positive, a
            prediction without its exponent.
    """
    from scipy.stats import t

    x = np.log(_positive("classes", classes, 1))
    off, on = _positive("off_diagonal", off_diagonal, 2), _positive("diagonal", diagonal, 2)
    K, S = off.shape
    if len(x) != K or on.shape != off.shape:
        raise InputError(
            f"off_diagonal and diagonal must have one row for each of the {len(x)} classes and one column for each "
            f"network, got shapes {off.shape} and {on.shape}"
        )
    if len(np.unique(x)) < 2 or S < 2:
        raise InputError(f"an exponent needs at least 2 numbers of classes and 2 networks of each, got {K} and {S}")
    if (predicted is None) != (asymptotic is None):
        raise InputError("predicted and asymptotic, the exponent it has as C grows, must be given together")
    base = np.ones(K) if predicted is None else _positive("predicted", predicted, 1)
    error = np.zeros(K) if predicted_stderr is None else np.asarray(predicted_stderr, dtype=np.float64)
    if base.shape != x.shape or error.shape != x.shape:
        raise InputError(f"predicted and predicted_stderr must have {K} entries, got {base.shape} and {error.shape}")
    slopes = (x - x.mean()) / ((x - x.mean()) ** 2).sum()  # the slope is this combination of the logarithms

    def slope(kept: npt.NDArray[np.bool_]) -> float:
        return float(slopes @ np.log(off[:, kept].sum(axis=1) / on[:, kept].sum(axis=1) / base))

    everything = np.ones(S, dtype=bool)
    left_out = np.asarray([slope(np.arange(S) != network) for network in range(S)])
    variance = (S - 1) / S * ((left_out - left_out.mean()) ** 2).sum() + ((slopes * error / base) ** 2).sum()
    exponent = slope(everything) + (asymptotic or 0.0)
    reach = float(t.ppf((1 + CONFIDENCE) / 2, S - 1) * np.sqrt(variance))
    return ExponentFit(exponent, exponent - reach, exponent + reach)


def _positive(argument: str, values: npt.ArrayLike, dims: int) -> Array:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != dims or not array.size:
        raise InputError(f"{argument} must be a non-empty array with {dims} dimensions, got shape {array.shape}")
    if not (np.isfinite(array).all() and (array > 0).all()):
        raise InputError(f"{argument} must be positive and finite")
    return array
