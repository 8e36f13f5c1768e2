"""Losses as sums over terms: what is added up, and how many terms were added.

Every loss here reports (sum of the terms, number of terms), so that L = total sum / total number of terms does not
depend on how the data is cut into batches (MATH.md, section 1). The mean over everything is what
`torch.nn.CrossEntropyLoss` and `torch.nn.MSELoss` mean by `reduction="mean"`; a module with `reduction="sum"` is
studied through the same mean.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hesscope.core.checks import require_choice
from hesscope.core.errors import DataError, InputError

# Losses that torch evaluates entry by entry; a term is one sample, its value the mean over the sample's entries.
ELEMENTWISE = (
    nn.MSELoss,
    nn.L1Loss,
    nn.SmoothL1Loss,
    nn.HuberLoss,
    nn.BCELoss,
    nn.BCEWithLogitsLoss,
    nn.PoissonNLLLoss,
    nn.SoftMarginLoss,
)
NAMED: dict[str, type[nn.Module]] = {"cross_entropy": nn.CrossEntropyLoss, "mse": nn.MSELoss}


@dataclass(frozen=True)
class SumAndTerms:
    """Sum of a batch's loss terms (a scalar tensor) and the number, or total weight, of those terms."""

    sum: Tensor
    terms: float


@dataclass(frozen=True)
class OutputLoss:
    """A loss of the model's outputs and the targets: it has a Gauss-Newton matrix. `module` is torch's form of it."""

    name: str
    module: nn.Module
    evaluate: Callable[[Tensor, Tensor], SumAndTerms]

    def term_axes(self, outputs: Tensor, targets: Tensor) -> tuple[int, ...]:
        """The axes of the outputs that run over the entries of one loss term: classes, or all of a sample's entries."""
        if isinstance(self.module, ELEMENTWISE):
            return tuple(range(1, outputs.ndim))
        tokens = outputs.ndim == 3 and targets.shape == outputs.shape[:2]
        return (2,) if tokens else (min(1, outputs.ndim - 1),)


@dataclass(frozen=True)
class BatchLoss:
    """A user's callable(model, batch) -> (sum, terms): anything with a Hessian, but no Gauss-Newton matrix."""

    name: str
    evaluate: Callable[[nn.Module, Any], SumAndTerms]


def as_loss(loss: str | nn.Module | Callable[..., Any]) -> OutputLoss | BatchLoss:
    """Interpret the `loss` argument of Objective.

    Raises:
        InputError: an unknown name, a torch loss that is not a mean or sum over samples, or something not callable.
    """
    if isinstance(loss, str):
        require_choice("loss", loss, NAMED)
        return replace(_from_module(NAMED[loss]()), name=loss)
    if isinstance(loss, nn.Module):
        return _from_module(loss)
    if callable(loss):
        function = loss
        return BatchLoss(getattr(function, "__name__", "callable"), lambda m, batch: _checked(function(m, batch)))
    raise InputError(
        f"loss must be 'cross_entropy', 'mse', a torch loss module or a callable(model, batch) -> (sum, terms), "
        f"got {type(loss).__name__}"
    )


def _from_module(module: nn.Module) -> OutputLoss:
    name = type(module).__name__
    if type(module) not in (nn.CrossEntropyLoss, nn.NLLLoss, *ELEMENTWISE):
        raise InputError(
            f"the loss module {name} is not known to be a mean over samples; "
            "pass a callable(model, batch) -> (sum of the loss terms, number of terms) instead"
        )
    if module.reduction not in ("mean", "sum"):
        raise InputError(f"{name} must have reduction 'mean' or 'sum', got {module.reduction!r}")
    summing: Any = copy.copy(module)  # shares the class weights; only the attribute below differs
    summing.reduction = "sum"
    summing.__dict__.update(size_average=None, reduce=None)
    if isinstance(module, ELEMENTWISE):
        return OutputLoss(name, module, lambda outputs, targets: _elementwise(summing, outputs, targets))
    return OutputLoss(name, module, lambda outputs, targets: _classification(summing, outputs, targets))


def _elementwise(module: nn.Module, outputs: Tensor, targets: Tensor) -> SumAndTerms:
    if outputs.shape != targets.shape:
        raise DataError(
            f"{type(module).__name__} compares entry by entry, but the outputs have shape {tuple(outputs.shape)} and "
            f"the targets {tuple(targets.shape)}" + _one_hot_hint(outputs, targets)
        )
    samples = outputs.shape[0] if outputs.ndim else 1
    entries_per_sample = max(outputs.numel() // max(samples, 1), 1)
    return SumAndTerms(module(outputs, targets.to(outputs.dtype)) / entries_per_sample, samples)


def _one_hot_hint(outputs: Tensor, targets: Tensor) -> str:
    is_labels = not targets.is_floating_point() and targets.shape == outputs.shape[:1]
    return "; class labels must be one-hot encoded for this loss" if is_labels else ""


def _classification(module: nn.Module, outputs: Tensor, targets: Tensor) -> SumAndTerms:
    """Cross-entropy or NLL: logits [N, C], [C] or [N, C, ...], targets class indices or (cross-entropy) probabilities.

    Token logits [N, T, C] with targets [N, T] are also taken, with the classes moved to where torch wants them.
    """
    if outputs.ndim == 3 and targets.shape == outputs.shape[:2]:
        if outputs.shape[1] == outputs.shape[2]:
            raise DataError(
                f"logits of shape {tuple(outputs.shape)} with labels of shape {tuple(targets.shape)} may mean "
                "[N, T, C] or [N, C, T]; flatten them to [N * T, C] and [N * T], or pass a loss callable"
            )
        outputs = outputs.transpose(1, 2)
    if isinstance(module.weight, Tensor) and module.weight.dtype != outputs.dtype:
        module = copy.copy(module)  # measured in another precision than the weights were given in
        module.__dict__["_buffers"] = {**module._buffers, "weight": module.weight.to(outputs.dtype)}
    class_axis = 1 if outputs.ndim > 1 else 0
    classes = outputs.shape[class_axis]
    if targets.is_floating_point():
        if targets.shape != outputs.shape or not isinstance(module, nn.CrossEntropyLoss):
            raise DataError(
                f"targets must be integer class labels of shape {_label_shape(outputs, class_axis)} or probabilities "
                f"of shape {tuple(outputs.shape)}, got {targets.dtype} of shape {tuple(targets.shape)}"
            )
        return SumAndTerms(module(outputs, targets.to(outputs.dtype)), outputs.numel() / classes)
    if tuple(targets.shape) != _label_shape(outputs, class_axis):
        raise DataError(
            f"class labels must have shape {_label_shape(outputs, class_axis)} to fit logits of shape "
            f"{tuple(outputs.shape)}, got {tuple(targets.shape)}"
        )
    labels = targets.long()
    kept = labels[labels != module.ignore_index]
    wrong = kept[(kept < 0) | (kept >= classes)]
    if wrong.numel():
        raise DataError(f"targets must lie in [0, {classes}), found {int(wrong[0])}")
    weight = module.weight
    terms = float(weight[kept].sum()) if isinstance(weight, Tensor) else float(kept.numel())
    return SumAndTerms(module(outputs, labels), terms)


def _label_shape(outputs: Tensor, class_axis: int) -> tuple[int, ...]:
    return tuple(size for axis, size in enumerate(outputs.shape) if axis != class_axis)


def _checked(result: Any) -> SumAndTerms:
    """What a user's callable returned, checked."""
    if not (isinstance(result, (tuple, list)) and len(result) == 2):
        raise InputError(
            "a loss callable must return (sum of the loss terms, number of terms), "
            f"got {type(result).__name__}" + (f" of length {len(result)}" if isinstance(result, (tuple, list)) else "")
        )
    total, terms = result
    if not isinstance(total, Tensor):
        raise InputError(f"the loss sum must be a tensor, so that it can be differentiated; got {type(total).__name__}")
    if total.numel() != 1:
        raise DataError(
            f"the loss must be a scalar, the sum of the batch's loss terms; got a tensor of shape {tuple(total.shape)}"
        )
    number = float(terms.detach() if isinstance(terms, Tensor) else terms)
    if not 0 <= number < float("inf"):
        raise InputError(f"the number of loss terms must be finite and not negative, got {number}")
    return SumAndTerms(total.reshape(()), number)


def output_gradient(loss: OutputLoss, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Leaf copy of the outputs, and the gradient of the loss sum with respect to it, differentiable once more."""
    leaf = outputs.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss.evaluate(leaf, targets).sum, leaf, create_graph=True)
    return leaf, gradient
