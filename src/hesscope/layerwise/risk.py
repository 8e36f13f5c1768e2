"""The risk that a generalization bound is about: a number in [0, 1] for every sample and network."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, log
from typing import Any

import torch
from torch import Tensor, nn

from hesscope.core.errors import DataError, InputError
from hesscope.core.real_numbers import require_positive
from hesscope.layerwise.taps import PIECE_BYTES
from hesscope.objective import Objective
from hesscope.objective.losses import ELEMENTWISE
from hesscope.objective.objective import require_output_loss
from hesscope.objective.pieces import count_samples, cut

NAME = "the risk of a network"

# Samples that go through a network at once.
CHUNK = 8192


@dataclass(frozen=True)
class Risk:
    """What is bounded: the classification error, or, with a bound of the loss, min(loss, bound) / bound.

    Attributes:
        loss_bound: None for the classification error.
    """

    loss_bound: float | None = None

    @property
    def words(self) -> str:
        """What it is."""
        return (
            "classification error"
            if self.loss_bound is None
            else f"mean of min(loss, {self.loss_bound:g}) / {self.loss_bound:g}"
        )

    def of(self, objective: Objective, outputs: Tensor, targets: Tensor) -> Tensor:
        """[n] risks in [0, 1] of samples; an output or a loss that is not finite counts as the worst.

        Raises:
            DataError: outputs and targets are not one for each sample, or labels are ignored.
        """
        _require_counted(objective, targets)
        if self.loss_bound is None:
            _require_labels(objective, outputs, targets)
            risks = (outputs.argmax(1) != targets).to(outputs.dtype)
        else:
            # Some losses go below 0 (Poisson's without its constant): that they count as 0 keeps the bound above them.
            risks = (self._losses(objective, outputs, targets) / self.loss_bound).clamp(0.0, 1.0)
        finite = outputs.isfinite().reshape(len(outputs), -1).all(1) & risks.isfinite()
        return torch.where(finite, risks, torch.ones_like(risks))

    def surrogate(self, objective: Objective, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean of something differentiable that is never below the risk: cross-entropy in bits, or the loss itself."""
        if self.loss_bound is None:
            return nn.functional.cross_entropy(outputs, targets.long()) / log(2)
        return self._losses(objective, outputs, targets).mean() / self.loss_bound

    def _losses(self, objective: Objective, outputs: Tensor, targets: Tensor) -> Tensor:
        """[n] losses of samples."""
        module: Any = copy.copy(require_output_loss(objective, NAME).module)
        module.reduction = "none"
        continuous = isinstance(module, ELEMENTWISE) or targets.is_floating_point()
        losses: Tensor = module(outputs, targets.to(outputs.dtype if continuous else torch.long))
        if losses.shape[:1] != outputs.shape[:1]:
            raise DataError("a bound needs one loss for each sample, and the first axis of outputs to run over samples")
        return losses.flatten(1).mean(1) if losses.ndim > 1 else losses


def require_risk(objective: Objective, loss_bound: float | None) -> Risk:
    """The risk that can be bounded.

    Raises:
        InputError: a loss that is not in [0, 1] without a stated bound, a bound that is none, or a loss callable.
    """
    loss = require_output_loss(objective, NAME)
    if loss_bound is None and not isinstance(loss.module, (nn.CrossEntropyLoss, nn.NLLLoss)):
        raise InputError(
            f"the loss {loss.name!r} is not in [0, 1]: pass loss_bound=B for a bound of min(loss, B) / B; without it "
            "only classifiers (cross-entropy, NLL) have a risk in [0, 1], their classification error"
        )
    if loss_bound is not None:
        require_positive("loss_bound", loss_bound)
        if getattr(loss.module, "weight", None) is not None:
            raise InputError("loss_bound does not go with class weights: the mean is not one over samples")
    return Risk(loss_bound)


def in_chunks(objective: Objective, batches: Iterator[tuple[int, Any]], networks: int = 1) -> Iterator[tuple[int, Any]]:
    """The numbered batches, cut into CHUNK samples or fewer: so few that the activations of all networks fit."""
    budget = PIECE_BYTES.get(objective.parameters.device.type, PIECE_BYTES["cuda"])
    parts = ceil(networks * objective.graph_bytes / budget)
    for index, batch in batches:
        for part in cut(batch, max(parts, ceil(count_samples(batch) / CHUNK))):
            yield index, part


def outputs_of_samples(objective: Objective, theta: Tensor, batch: Any, index: int) -> tuple[Tensor, Tensor]:
    """Outputs of the network theta [P] on a batch, and the targets.

    Raises:
        DataError: several outputs for each sample.
    """
    outputs, targets = objective.outputs_and_targets(theta, batch, index)
    samples = count_samples(batch)
    if len(outputs) > samples:
        raise DataError(
            f"a bound needs one output for each of n independent samples, but batch {index} has {len(outputs)} outputs "
            f"of {samples} samples; tokens of a text are not independent samples"
        )
    return outputs, targets


def risks_of_network(objective: Objective, risk: Risk, vector: Tensor | None = None) -> tuple[float, int]:
    """(mean risk of one network, number of samples); the objective's own network unless a vector [P] is given."""
    total, samples = 0.0, 0
    with objective.evaluating() as (theta, batches), torch.no_grad():
        for index, batch in in_chunks(objective, batches):
            outputs, targets = outputs_of_samples(objective, theta if vector is None else vector, batch, index)
            risks = risk.of(objective, outputs, targets)
            total, samples = total + float(risks.double().sum()), samples + len(risks)
    return total / samples, samples


def network_risk(objective: Objective, loss_bound: float | None = None) -> float:
    """The trained network's mean risk on the objective's data: its classification error, or min(loss, B) / B.

    Raises:
        InputError: as of `hesscope.pac_bayes_bound`.
        DataError: samples without exactly one label each.
    """
    return risks_of_network(objective, require_risk(objective, loss_bound))[0]


def _require_labels(objective: Objective, outputs: Tensor, targets: Tensor) -> None:
    if outputs.ndim != 2 or targets.ndim != 1 or targets.is_floating_point():
        raise DataError(
            "a bound of the classification error needs outputs [n, C] and one integer label for each of n independent "
            f"samples, got outputs of shape {list(outputs.shape)} and targets of shape {list(targets.shape)}"
            f" ({str(targets.dtype).removeprefix('torch.')}); tokens of a text are not independent samples"
        )


def _require_counted(objective: Objective, targets: Tensor) -> None:
    ignored = getattr(require_output_loss(objective, NAME).module, "ignore_index", None)
    if ignored is not None and not targets.is_floating_point() and bool((targets == ignored).any()):
        raise DataError(
            f"a bound counts every sample, but some labels are ignored ({ignored}): leave those samples out"
        )
