"""Square roots of what is curved at a model's outputs: S with A = S S^T, for every loss that has a Gauss-Newton matrix.

Cross-entropy has the root of MATH.md, section 1, times the weight of each term. The losses that PyTorch evaluates entry
by entry have a diagonal A. The empirical Fisher matrix has the loss's gradient e in place of A: one column per term.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hesscope.core.errors import DataError, InputError
from hesscope.objective.losses import ELEMENTWISE, OutputLoss, output_gradient
from hesscope.operators.second_derivatives import pull_back

# Logit at which one class has all the probability, in any dtype: exp(-LOUD) is below the rounding of 1.
LOUD = 60.0

# A negative curvature of so many roundings of the largest one is none.
ROUNDINGS = 1000


@dataclass(frozen=True)
class OutputRoot:
    """A root S on the outputs of one batch, not divided by the number of terms.

    Attributes:
        apply: S u, from vectors [K, *root shape] to [K, *output shape]; transpose: S^T v, the other way.
        live: [*root shape], False where a column of S is exactly zero (ignored terms, classes that cannot be).
    """

    apply: Callable[[Tensor], Tensor]
    transpose: Callable[[Tensor], Tensor]
    live: Tensor


def curvature_root(loss: OutputLoss, outputs: Tensor, targets: Tensor) -> OutputRoot:
    """Root of the loss's Hessian A at detached outputs.

    Raises:
        InputError: A is not positive semi-definite (negative class weights), or of a loss without a known root.
        DataError: A is not finite.
    """
    if isinstance(loss.module, nn.CrossEntropyLoss):
        return _softmax_root(loss, outputs, targets)
    if isinstance(loss.module, (nn.NLLLoss, *ELEMENTWISE)):  # of the former, linear in its outputs, A is zero
        leaf, gradient = output_gradient(loss, outputs, targets)
        curvature = pull_back(gradient, leaf, torch.ones_like(outputs).unsqueeze(0), vectorized=False)[0]
        root = _root_of_weights(curvature, loss)
        return OutputRoot(lambda u: root * u, lambda v: root * v, root > 0)
    raise InputError(f"the loss {loss.name} has no known root of its Hessian at the outputs; choose another method")


def gradient_root(loss: OutputLoss, outputs: Tensor, targets: Tensor) -> OutputRoot:
    """Root of the empirical Fisher matrix at detached outputs: the gradient of each term, one column."""
    e = output_gradient(loss, outputs, targets)[1].detach()
    axes = loss.term_axes(outputs, targets)
    shifted = tuple(axis + 1 for axis in axes)  # the first axis counts the vectors

    def transpose(v: Tensor) -> Tensor:
        along = e * v
        return along.sum(shifted, keepdim=True) if shifted else along

    live = e != 0
    return OutputRoot(lambda u: e * u, transpose, live.any(dim=axes, keepdim=True) if axes else live)


def _softmax_root(loss: OutputLoss, outputs: Tensor, targets: Tensor) -> OutputRoot:
    """S = diag(sqrt p) - p sqrt(p)^T, times the root of each term's weight."""
    (axis,) = loss.term_axes(outputs, targets)
    p = outputs.softmax(axis)
    scale = _root_of_weights(_term_weights(loss, outputs, targets, p, axis), loss)
    root = p.sqrt()

    def apply(u: Tensor) -> Tensor:
        along = root * u
        return scale * (along - p * along.sum(axis + 1, keepdim=True))

    def transpose(v: Tensor) -> Tensor:
        return scale * root * (v - (p * v).sum(axis + 1, keepdim=True))

    return OutputRoot(apply, transpose, scale * root > 0)


def _term_weights(loss: OutputLoss, outputs: Tensor, targets: Tensor, p: Tensor, axis: int) -> Tensor:
    """Weight w of every term, the classes' axis having length 1: its loss is w logsumexp(o) - linear(o).

    Class weights, smoothed labels, probabilities as targets and ignored terms all come down to this number, read off
    two gradients w p - linear: at the outputs, and where the least likely class has all the probability.
    """
    other = torch.zeros_like(outputs).scatter_(axis, p.argmin(axis, keepdim=True), LOUD)
    change = [output_gradient(loss, where, targets)[1].detach() for where in (outputs, other)]
    distance = (p - other.softmax(axis)).abs().sum(axis, keepdim=True)
    along = ((change[0] - change[1]) * (p - other.softmax(axis)).sign()).sum(axis, keepdim=True)
    return torch.where(distance > 0, along / distance, 0.0)  # a single class has no curvature


def _root_of_weights(weights: Tensor, loss: OutputLoss) -> Tensor:
    if not bool(weights.isfinite().all()):
        raise DataError(f"the second derivative of {loss.name} at the outputs is not finite")
    largest = float(weights.abs().max()) if weights.numel() else 0.0
    if weights.numel() and float(weights.min()) < -ROUNDINGS * torch.finfo(weights.dtype).eps * largest:
        raise InputError(
            f"the second derivative of {loss.name} at the outputs is negative (smallest {float(weights.min()):.3g}): "
            "without a real root there is no dual form; choose another method"
        )
    return weights.clamp(min=0).sqrt()
