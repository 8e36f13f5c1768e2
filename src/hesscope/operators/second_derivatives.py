"""Derivatives of derivatives: many vectors at once through one retained graph, and failures told in clear words."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hesscope.core.errors import NoSecondDerivativeError

# Autograd names the operation it cannot differentiate.
NOT_IMPLEMENTED = re.compile(r"derivative for '?([\w:]+)'? is not implemented")

# Failures of a vectorized backward pass that a plain loop does not have.
VMAP_FAILURE = re.compile(r"vmap|functorch|batching rule|BatchedTensor|is_grads_batched", re.IGNORECASE)


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn autograd's failure to differentiate twice into a NoSecondDerivativeError that names the operation."""
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        found = NOT_IMPLEMENTED.search(str(error))
        if found is None:
            raise
        raise _no_second_derivative(what, found.group(1)) from error


def require_twice_differentiable(loss_sum: Tensor, gradient: Tensor, what: str) -> None:
    """Raise NoSecondDerivativeError if a custom function in the loss was marked `once_differentiable`.

    PyTorch hangs the error on a branch that `autograd.grad(gradient, theta)` never visits: without this look at the
    graph the function's second derivative would silently count as zero.
    """
    if any(node.name() == "torch::autograd::Error" for node in _graph(gradient)):
        functions = (getattr(type(node), "_forward_cls", None) for node in _graph(loss_sum))
        names = sorted({f.__name__ for f in functions if f is not None and hasattr(f.backward, "__wrapped__")})
        raise _no_second_derivative(what, f"{', '.join(names) or 'a custom function'} (marked once_differentiable)")


def _no_second_derivative(what: str, operation: str) -> NoSecondDerivativeError:
    return NoSecondDerivativeError(
        f"{what} needs second derivatives, but {operation} has none; replace that operation by one made of "
        "differentiable PyTorch operations (for attention, e.g. attn_implementation='eager')"
    )


def _graph(tensor: Tensor) -> Iterator[Any]:
    """Every node of the autograd graph behind a tensor, once."""
    waiting, seen = [tensor.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting.extend(following for following, _ in node.next_functions)
            yield node


def pull_back(output: Tensor, source: Tensor, cotangents: Tensor) -> Tensor:
    """Vector-Jacobian products: rows d<output, cotangents[k]>/d source, for all k at once where vmap allows it.

    Args:
        output: any shape S, connected to `source`; its graph is kept.
        source: any shape T.
        cotangents: [K, *S].

    Returns:
        [K, *T]; zeros if `output` does not depend on `source`.
    """
    count = cotangents.shape[0]
    if not output.requires_grad:
        return source.new_zeros((count, *source.shape))
    if count > 1:
        try:
            return _one_pass(output, source, cotangents, batched=True)
        except RuntimeError as error:
            if not VMAP_FAILURE.search(str(error)):
                raise
    return torch.stack([_one_pass(output, source, cotangent, batched=False) for cotangent in cotangents])


def _one_pass(output: Tensor, source: Tensor, cotangents: Tensor, batched: bool) -> Tensor:
    result: Tensor | None = torch.autograd.grad(
        output, source, cotangents, retain_graph=True, allow_unused=True, is_grads_batched=batched
    )[0]
    if result is None:
        return source.new_zeros((cotangents.shape[0], *source.shape) if batched else source.shape)
    return result
