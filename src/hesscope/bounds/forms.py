"""Three forms of the PAC-Bayes bound of the Gibbs classifier's risk (MATH.md, section 6).

Each holds for losses in [0, 1] and n independent, identically distributed samples, for all posteriors at once, with
probability at least 1 - delta over the sample, if the prior was fixed without it. Each of them holds by itself: the
smaller of Maurer's and Catoni's is no bound at the same delta.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import expm1, log, sqrt

from hesscope.bounds.arguments import require_delta, require_nats, require_risk
from hesscope.bounds.bernoulli import kl_inverse
from hesscope.core.checks import require_positive_int
from hesscope.core.errors import InputError
from hesscope.core.real_numbers import require_positive

# Catoni's scales: 31 from 2^-10 to 2^5 in steps of sqrt(2). The best scale is about the gap over the risk's variance.
# Halfway between two of them the gap is 1.5 % larger than at the best. The best scale is below the first where the gap
# is below about 0.0002, and beyond the last nothing changes: exp(-32) is 1e-14.
SCALES = tuple(2 ** (step / 2) for step in range(-20, 11))


def confidence_cost(n: int, delta: float) -> float:
    """ln(2 sqrt(n) / delta), what Maurer's bound adds to the divergence, in nats.

    Raises:
        InputError: n below 1, delta outside (0, 1).
    """
    require_positive_int("n", n)
    require_delta("delta", delta)
    return log(2) + log(n) / 2 - log(delta)


def maurer_bound(risk: float, kl: float, n: int, delta: float) -> float:
    """The largest p with kl(risk || p) <= (kl + ln(2 sqrt(n)/delta)) / n.

    Maurer proves it for n >= 8, where sum_k C(n, k) (k/n)^k (1 - k/n)^(n-k) <= 2 sqrt(n); the same holds, as can be
    counted, for every n from 1 to 7.

    Args:
        risk: the Gibbs classifier's mean loss on the sample, in [0, 1].
        kl: KL(posterior || prior) in nats, >= 0 (with the costs of whatever was chosen by the sample).
        n: number of samples; delta: probability with which the bound may fail.

    Raises:
        InputError: a value outside its range.

    Source: Maurer, arXiv:cs/0411099, theorem 5; MATH.md, section 6.
    """
    _require(risk, kl)
    return kl_inverse(float(risk), (kl + confidence_cost(n, delta)) / n)


def mcallester_bound(risk: float, kl: float, n: int, delta: float) -> float:
    """Maurer's bound by Pinsker's inequality, never below it: risk + sqrt((kl + ln(2 sqrt(n)/delta))/(2 n)), at most 1.

    Arguments and errors as for `maurer_bound`. Source: McAllester 1999, with Maurer's constant.
    """
    _require(risk, kl)
    return min(1.0, risk + sqrt((kl + confidence_cost(n, delta)) / (2 * n)))


def catoni_bound(risk: float, kl: float, n: int, delta: float, scales: Sequence[float] = SCALES) -> float:
    """The smallest, over K scales s, of (1 - exp(-s risk - (kl + ln(K/delta))/n)) / (1 - exp(-s)); at most 1.

    For one s that is fixed before the sample it holds with ln(1/delta); the choice among K is paid by a union bound.

    Args:
        risk, kl, n, delta: as for `maurer_bound`.
        scales: positive numbers, fixed before the sample.

    Raises:
        InputError: a value outside its range.

    Source: Catoni, arXiv:0712.0248, theorem 1.2.6.
    """
    _require(risk, kl)
    require_positive_int("n", n)
    require_delta("delta", delta)
    if not scales:
        raise InputError("scales must contain at least one number")
    for scale in scales:
        require_positive("scales", scale)
    complexity = (kl + log(len(scales)) - log(delta)) / n
    return min(1.0, *(expm1(-scale * risk - complexity) / expm1(-scale) for scale in scales))


def least_samples(cost: float, delta: float, vacuous: float) -> int:
    """The smallest n at which Maurer's bound, with no errors and a divergence of `cost` nats, is below `vacuous`.

    Args:
        cost: >= 0, finite; delta: as for `maurer_bound`; vacuous: in (0, 1).
    """

    def enough(n: int) -> bool:
        return -expm1(-(cost + confidence_cost(n, delta)) / n) < vacuous

    high = 1
    while not enough(high):  # the complexity falls in n, since cost + ln(2/delta) > 1/2
        high *= 2
    low = high // 2  # not enough, or 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _require(risk: object, kl: object) -> None:
    require_risk("risk", risk)
    require_nats("kl", kl)
