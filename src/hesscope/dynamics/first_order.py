"""What one forward and one backward pass over the data tell: loss, gradient, residual, accuracy."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hesscope.core.errors import DataError
from hesscope.dynamics.snapshot import UNKNOWN
from hesscope.objective import Objective
from hesscope.objective.losses import OutputLoss, output_gradient


@dataclass(frozen=True, eq=False)
class FirstOrder:
    """The objective at its model's parameters.

    Attributes:
        value: L; gradient: [P].
        mean_squared_residual: (1/N) sum_n ||e_n||^2, e_n = dl_n/do; nan for a loss callable.
        accuracy: share of the class labels (or one-hot targets) that the largest output hits; nan where there are none.
    """

    value: float
    gradient: Tensor = field(repr=False)
    mean_squared_residual: float
    accuracy: float


def first_order(objective: Objective) -> FirstOrder:
    """One pass over the data.

    Raises:
        DataError: the loss or its gradient is not finite: training has diverged.
    """
    loss = objective.loss
    total, squares, hits, labels = 0.0, 0.0, 0.0, 0.0
    with objective.evaluating() as (theta, batches):
        gradient = torch.zeros_like(theta)
        for index, batch in batches:
            if not isinstance(loss, OutputLoss):
                loss_sum = objective.evaluate(theta, batch, index).sum
                total += float(loss_sum.detach())
                gradient += torch.autograd.grad(loss_sum, theta)[0] if loss_sum.requires_grad else 0.0
                continue
            outputs, targets = objective.outputs_and_targets(theta, batch, index)
            leaf, residual = output_gradient(loss, outputs, targets)
            total += float(loss.evaluate(leaf.detach(), targets).sum)
            squares += float(residual.detach().double().square().sum())
            right, counted = _hits(loss, leaf.detach(), targets)
            hits, labels = hits + right, labels + counted
            if outputs.requires_grad:
                gradient += torch.autograd.grad(outputs, theta, residual.detach())[0]
    terms = objective.num_terms
    found = FirstOrder(
        value=total / terms,
        gradient=gradient / terms,
        mean_squared_residual=squares / terms if isinstance(loss, OutputLoss) else UNKNOWN,
        accuracy=hits / labels if labels > 0 else UNKNOWN,
    )
    if not (torch.isfinite(found.gradient).all() and abs(found.value) < float("inf")):
        raise DataError(f"the loss is {found.value} and its gradient not finite: training has diverged")
    return found


def _hits(loss: OutputLoss, outputs: Tensor, targets: Tensor) -> tuple[float, float]:
    """How many class labels the largest output hits, and how many there are."""
    if outputs.ndim < 2:
        return 0.0, 0.0
    if not targets.is_floating_point():
        if not isinstance(loss.module, nn.CrossEntropyLoss | nn.NLLLoss):
            return 0.0, 0.0
        kept = targets != loss.module.ignore_index
        (axis,) = loss.term_axes(outputs, targets)
        return float((outputs.argmax(dim=axis) == targets)[kept].sum()), float(kept.sum())
    one_hot = targets.shape == outputs.shape and targets.ndim == 2 and targets.shape[1] > 1
    one_hot = one_hot and bool(((targets == 0) | (targets == 1)).all()) and bool((targets.sum(dim=1) == 1).all())
    return (
        (float((outputs.argmax(dim=1) == targets.argmax(dim=1)).sum()), float(len(targets))) if one_hot else (0.0, 0.0)
    )
