"""What the estimate of a stochastic classifier's risk by drawing from its posterior costs in confidence."""

from __future__ import annotations

from math import log

from hesscope.bounds.arguments import require_delta, require_risk
from hesscope.bounds.bernoulli import kl_inverse
from hesscope.core.checks import require_positive_int


def monte_carlo_upper(mean: float, draws: int, delta: float) -> float:
    """Upper confidence bound of the mean of independent [0, 1] variables: kl_inverse(mean, ln(1/delta)/draws).

    The Chernoff bound of Hoeffding's theorem 1: a sample mean of q or less has probability at most
    exp(-draws kl(q || p)), where p > q is the mean of the expectations. The variables need not be
    identically distributed. Only one side is needed, and so ln(1/delta) suffices: [DR] pay ln(2/delta).

    Args:
        mean: the sample mean, in [0, 1].
        draws: number of independent variables. One that is the risk of one drawn network on the whole sample counts
            once, however large the sample.
        delta: probability with which the bound may fail.

    Raises:
        InputError: a value outside its range.

    Source: Hoeffding 1963, theorem 1 (2.1); MATH.md, section 6; [DR], arXiv:1703.11008.
    """
    require_risk("mean", mean)
    require_positive_int("draws", draws)
    require_delta("delta", delta)
    return kl_inverse(float(mean), -log(delta) / draws)
