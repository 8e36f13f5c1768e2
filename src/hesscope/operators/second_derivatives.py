"""Derivatives of derivatives: many vectors at once through one retained graph, and failures told in clear words."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from hesscope.core.errors import NoSecondDerivativeError

# Autograd names the operation it cannot differentiate; both forms are torch's.
NOT_IMPLEMENTED = re.compile(r"derivative for '?([\w:]+)'? is not implemented")
ONCE_ONLY = "once_differentiable"

# Failures of a vectorized backward pass that a plain loop does not have.
VMAP_FAILURE = re.compile(r"vmap|functorch|batching rule|BatchedTensor|is_grads_batched", re.IGNORECASE)


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn autograd's failure to differentiate twice into a NoSecondDerivativeError that names the operation."""
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        text = str(error)
        found = NOT_IMPLEMENTED.search(text)
        if found is None and ONCE_ONLY not in text:
            raise
        operation = found.group(1) if found else "a custom autograd.Function marked once_differentiable"
        raise NoSecondDerivativeError(
            f"{what} needs second derivatives, but {operation} has none; replace that operation by one made of "
            "differentiable PyTorch operations (for attention, e.g. attn_implementation='eager')"
        ) from error


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
