"""What is read from an optimizer: its learning rate, and the sharpness up to which it is stable."""

from __future__ import annotations

from typing import Any

import torch

from hesscope.dynamics.snapshot import UNKNOWN


def learning_rate(optimizer: Any) -> float:
    """The learning rate of all parameters; nan if groups differ, or if the optimizer finds its own (Adafactor)."""
    told = [group.get("lr") for group in optimizer.param_groups]
    rates = {UNKNOWN if rate is None else float(rate) for rate in told}
    return rates.pop() if len(rates) == 1 else UNKNOWN


def stability_limit(optimizer: Any, rate: float) -> float:
    """Largest curvature lambda of a quadratic on which full-batch steps of this optimizer do not diverge.

    SGD: 2 / eta; with momentum beta 2 (1 + beta) / eta, Nesterov's 2 (1 + beta) / ((1 + 2 beta) eta) (Cohen et al.,
    arXiv:2103.00065, appendix B); weight decay counts as curvature. nan for everything else: what bounds Adam is the
    sharpness in its preconditioned coordinates, not that of H.
    """
    if not isinstance(optimizer, torch.optim.SGD) or not rate > 0:
        return UNKNOWN
    kinds = {
        tuple(float(group[key]) for key in ("momentum", "nesterov", "dampening", "weight_decay", "maximize"))
        for group in optimizer.param_groups
    }
    if len(kinds) > 1:
        return UNKNOWN
    momentum, nesterov, dampening, decay, maximize = kinds.pop()
    if maximize or dampening:
        return UNKNOWN
    limit = 2 * (1 + momentum) / rate
    return (limit / (1 + 2 * momentum) if nesterov else limit) - decay
