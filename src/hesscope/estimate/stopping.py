"""When to stop sampling: two planned stages, so that the estimate stays unbiased and its standard error honest.

To stop as soon as the result looks good enough selects the samples that look good: such estimates are biased, and their
errors too small. Here the sampling is planned before it is done (Stein, Annals of Mathematical Statistics 16, 1945; for
a relative error Cox, Biometrika 39, 1952):

1. A pilot, an eighth of what will be needed and at least 32 samples where more than the least are needed, tells value
   and variance, and from them how many samples meet the tolerance, with a margin for the pilot's own error (95 %
   quantile of the chi-square law of its variance). The pilot's samples are not part of the result.
2. That many new samples are drawn. Their number does not depend on them, so that their mean is unbiased and their
   standard error that of a sample of fixed size.
3. If they miss the tolerance after all, some more are drawn, once. Now the weights of old and new samples depend on the
   old ones, which would bias their mean. So the old ones are cut into halves A and B, and each half decides over the
   other: with a the share of the new samples C that A asks for, and b what B asks for, the result is

       (1 - b) mean(A) / 2 + (1 - a) mean(B) / 2 + (a + b) mean(C) / 2,

   unbiased because a does not depend on B, nor b on A, and C has the right mean however many there are. This is the
   sample splitting known as cross-fitting; its use for a second look at the sample's size is ours.

Simulated for 2 % (3000 replicates): normal samples meet the tolerance in 99 of 100 runs, with 1.9 times the samples
that would suffice if the variance were known where these are 100, and less than 1.5 times where they are 625. The most
skewed ones, squares of one normal number, meet it in 9 of 10; their 95 % intervals cover 90 to 95 %, and the reported
standard error is 3 to 12 % too small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil, inf
from numbers import Real

import torch
from torch import Tensor

from hesscope.core.errors import InputError

DEFAULT_MAX_PRODUCTS = 1000

# Samples of the first pilot, of one that plans more than the least, and the least that count: with fewer, Student's
# intervals of skewed samples (one direction of large curvature over a bulk) cover too rarely.
FIRST_PILOT, SECOND_PILOT, LEAST = 16, 32, 32

# The pilot grows to this share of the plan: a larger one costs more, one made from less is off by more.
PILOT_SHARE = 8

# Certainty of the plan's margin; how much more than it needs a half asks for; margin of the new samples' number; and
# their largest number, in units of the old ones'.
MARGIN_LEVEL, SHARE_MARGIN, MORE_MARGIN, MORE_AT_MOST = 0.95, 1.5, 1.3, 2


@dataclass(frozen=True)
class Moments:
    """Count, mean [B] and sum of squared deviations [B] of samples, float64: what O(B) memory can know of them."""

    count: int
    mean: Tensor
    squares: Tensor

    @classmethod
    def of(cls, samples: Tensor) -> Moments:
        """Moments of samples [B, K]."""
        mean = samples.mean(dim=1)
        return cls(samples.shape[1], mean, (samples - mean[:, None]).square().sum(dim=1))

    def __add__(self, other: Moments) -> Moments:
        """Moments of both together (Chan, Golub and LeVeque, The American Statistician 37, 1983)."""
        count = self.count + other.count
        step = other.mean - self.mean
        squares = self.squares + other.squares + step.square() * (self.count * other.count / count)
        return Moments(count, self.mean + step * (other.count / count), squares)

    @property
    def variance(self) -> Tensor:
        """Unbiased variance of one sample, [B]."""
        return self.squares / (self.count - 1)


# Squared standard error over what is tolerated, from mean [B] and squared standard error [B]: met if at most 1.
Excess = Callable[[Tensor, Tensor], float]
# Samples [B, K] of the stage "pilot" or "samples" with the given numbers, pass by pass.
Draw = Callable[[str, range], Iterator[Tensor]]


@dataclass(frozen=True)
class Sampled:
    """What sampling gave: mean [B], squared standard error [B], count, and the samples [K, B] unless not kept."""

    mean: Tensor
    squared_error: Tensor
    count: int
    samples: Tensor | None


def entry_excess(mean: Tensor, squared_error: Tensor, rtol: float) -> Tensor:
    """Each entry's squared standard error over its square times rtol^2, [B]; 0 / 0 = 0, a zero known without error."""
    return torch.where(squared_error == 0, torch.zeros_like(mean), squared_error / (rtol * mean).square())


def entrywise(rtol: float) -> Excess:
    """Every entry's standard error at most rtol times its magnitude."""
    return lambda mean, squared_error: float(entry_excess(mean, squared_error, rtol).max())


def normwise(rtol: float) -> Excess:
    """Norm of the standard errors at most rtol times the norm of the values."""

    def excess(mean: Tensor, squared_error: Tensor) -> float:
        noise = float(squared_error.sum())
        signal = float(mean.square().sum()) - noise  # the squared norm of a noisy mean is too large by the noise
        return 0.0 if noise == 0 else noise / (rtol**2 * signal) if signal > 0 else inf

    return excess


def needed(moments: Moments, excess: Excess) -> float:
    """Samples that would meet the tolerance, judged from these."""
    return moments.count * excess(moments.mean, moments.variance / moments.count)


def planned(pilot: Moments, excess: Excess, least: int = LEAST) -> float:
    """Samples to be drawn after this pilot, with the margin for its own error; infinite if none suffice."""
    from scipy.special import chdtri

    freedom = pilot.count - 1
    return max(float(least), freedom / float(chdtri(freedom, MARGIN_LEVEL)) * needed(pilot, excess))


def fixed_sample(draw: Draw, count: int, keep: bool) -> Sampled:
    """A sample of a size that was fixed beforehand."""
    moments, kept = _drawn(draw, "samples", range(count), keep)
    return Sampled(moments.mean, moments.variance / count, count, kept)


def grown_pilot(draw: Draw, pilot: Moments, used: int, excess: Excess, most: int, least: int = LEAST) -> Moments:
    """Stage 1: more pilot samples, from number `used` on, until there are enough for the plan; at most most / 8."""
    limit = max(most // PILOT_SHARE, min(SECOND_PILOT, most - least))
    start = pilot.count
    while True:
        plan = min(planned(pilot, excess, least), most)
        wanted = pilot.count if plan <= least else min(plan, max(SECOND_PILOT, plan / PILOT_SHARE))
        # No more than threefold at once: a small pilot may exaggerate.
        more = min(ceil(wanted) - pilot.count, 3 * pilot.count, limit - (pilot.count - start))
        if more <= 0:
            return pilot
        pilot = pilot + _drawn(draw, "pilot", range(used, used + more), keep=False)[0]
        used += more


def planned_sample(draw: Draw, plan: float, excess: Excess, most: int, keep: bool) -> Sampled:
    """Stages 2 and 3: the planned sample, and more if it misses the tolerance; at most `most` samples, at least 2."""
    half = max(min(ceil(plan / 2), most // 2) if plan < inf else most // 2, 1)
    if plan >= most or half < 2:
        return fixed_sample(draw, most, keep)
    count = 2 * half
    A, kept_a = _drawn(draw, "samples", range(half), keep)
    B, kept_b = _drawn(draw, "samples", range(half, count), keep)
    both, kept = A + B, _joined(kept_a, kept_b)
    a, b = (_share(part, count, excess) for part in (A, B))
    if a == b == 0 or count == most:
        return Sampled(both.mean, both.variance / count, count, kept)
    of_a, of_b, of_c = (1 - b) / 2, (1 - a) / 2, (a + b) / 2
    old = (of_a**2 + of_b**2) / half
    room = 1 / (MORE_MARGIN * max(needed(both, excess), 1)) - old
    # Not so few that their own error dominates, nor more than a multiple.
    more = max(of_c**2 / room if room > 0 else inf, of_c**2 * count, 2)
    more = int(min(ceil(more) if more < inf else inf, MORE_AT_MOST * count, most - count))
    if more < 2:
        return Sampled(both.mean, both.variance / count, count, kept)
    C, kept_c = _drawn(draw, "samples", range(count, count + more), keep)
    mean = of_a * A.mean + of_b * B.mean + of_c * C.mean
    squared_error = (both + C).variance * (old + of_c**2 / more)
    return Sampled(mean, squared_error, count + more, _joined(kept, kept_c))


def _share(half: Moments, count: int, excess: Excess) -> float:
    """Share of new samples that a half asks for, given that there are `count` old ones."""
    wanted = needed(half, excess)
    return 0.0 if wanted <= count else 1 - count / (SHARE_MARGIN * wanted)


def _drawn(draw: Draw, stage: str, numbers: range, keep: bool) -> tuple[Moments, Tensor | None]:
    moments, kept = None, []
    for samples in draw(stage, numbers):
        moments = Moments.of(samples) if moments is None else moments + Moments.of(samples)
        if keep:
            kept.append(samples.T)
    assert moments is not None, "nothing was drawn"
    return moments, torch.cat(kept) if keep else None


def _joined(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    return None if first is None or second is None else torch.cat([first, second])


def require_rtol(value: object) -> None:
    """Raise InputError unless the tolerance is a positive, finite number."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) < inf:
        raise InputError(f"rtol must be a positive number, such as 0.02 for 2 %, got {value!r}")
