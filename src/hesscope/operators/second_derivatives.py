"""Derivatives of derivatives: many vectors at once through one retained graph, and failures told in clear words."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hesscope.core.errors import HesscopeError, ModelError, NoSecondDerivativeError, TooLargeError

# Autograd names the operation it cannot differentiate.
NOT_IMPLEMENTED = re.compile(r"derivative for '?([\w:]+)'? is not implemented")

# The same for dual numbers, of PyTorch's operations and of custom functions.
NO_FORWARD_MODE = re.compile(
    r"forward AD with (\S+) that does not support it|implement the jvp function for custom autograd"
)

# Rounding between two orders of summation, and the asymmetry of a symmetric matrix in products, in units of the dtype's
# epsilon and relative to the norms; wrong derivatives are off by per cent.
ROUNDINGS = 1000


@contextmanager
def explained(what: str, held: Callable[[], str] = str) -> Iterator[None]:
    """Tell failures of a derivative in one line.

    A missing second derivative names its operation; exhausted memory says what is `held` and which knob lowers it.
    """
    try:
        yield
    except HesscopeError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in text:
            raise TooLargeError(f"{what} ran out of memory{held()}: {text[:200]}") from error
        found = NOT_IMPLEMENTED.search(text)
        if found is not None:
            raise _no_second_derivative(what, found.group(1)) from error
        found = NO_FORWARD_MODE.search(text)
        if found is not None:
            operation = found.group(1) or "a custom function"
            raise NoSecondDerivativeError(
                f"{what} by this engine needs forward-mode derivatives, which {operation} has not; "
                "use engine='double_backward' (or 'auto')"
            ) from error
        raise ModelError(f"{what} failed: {type(error).__name__}: {text}") from error


def require_twice_differentiable(loss_sum: Tensor, gradient: Tensor, what: str) -> None:
    """Raise NoSecondDerivativeError if a custom function in the loss was marked `once_differentiable`.

    PyTorch hangs the error on a branch that `autograd.grad(gradient, theta)` never visits: without this look at the
    graph the function's second derivative would silently count as zero.
    """
    if any(node.name() == "torch::autograd::Error" for node in _graph(gradient)):
        functions = (getattr(type(node), "_forward_cls", None) for node in _graph(loss_sum))
        names = sorted({f.__name__ for f in functions if f is not None and hasattr(f.backward, "__wrapped__")})
        raise _no_second_derivative(what, f"{', '.join(names) or 'a custom function'} (marked once_differentiable)")


def has_custom_functions(loss_sum: Tensor) -> bool:
    """Whether the user's own functions, with a backward in Python, are in the graph behind a tensor."""
    return any(hasattr(type(node), "_forward_cls") for node in _graph(loss_sum))


def _no_second_derivative(what: str, operation: str) -> NoSecondDerivativeError:
    hint = " (e.g. attn_implementation='eager')" if "attention" in operation else ""
    return NoSecondDerivativeError(
        f"{what} needs second derivatives, but {operation} has none; replace that operation by one made of "
        f"differentiable PyTorch operations{hint}"
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


def saved_storages(tensor: Tensor, theta: Tensor) -> dict[int, int]:
    """Memory that the graph behind a tensor keeps for its derivatives, but theta's: address of a storage -> bytes."""
    found: dict[int, int] = {}
    for node in _graph(tensor):
        for name in dir(node):
            if name.startswith("_saved_"):
                saved = getattr(node, name)
                for entry in saved if isinstance(saved, (tuple, list)) else (saved,):
                    if isinstance(entry, Tensor) and entry.layout == torch.strided:
                        storage = entry.untyped_storage()
                        found[storage.data_ptr()] = storage.nbytes()
    found.pop(theta.untyped_storage().data_ptr(), None)
    return found


def pull_back(output: Tensor, source: Tensor, cotangents: Tensor, vectorized: bool = True) -> Tensor:
    """Vector-Jacobian products: rows d<output, cotangents[k]>/d source, for all k at once or one by one.

    Args:
        output: any shape S, connected to `source`; its graph is kept.
        source: any shape T.
        cotangents: [K, *S].
        vectorized: whether to do all k in one pass through vmap.

    Returns:
        [K, *T]; zeros if `output` does not depend on `source`.
    """
    count = cotangents.shape[0]
    if not output.requires_grad:
        return source.new_zeros((count, *source.shape))
    if count > 1 and vectorized:
        return _one_pass(output, source, cotangents, batched=True)
    return stacked([_one_pass(output, source, cotangent, batched=False) for cotangent in cotangents])


def stacked(rows: list[Tensor]) -> Tensor:
    """Rows as one tensor; a single one is not copied."""
    return rows[0].unsqueeze(0) if len(rows) == 1 else torch.stack(rows)


def _one_pass(output: Tensor, source: Tensor, cotangents: Tensor, batched: bool) -> Tensor:
    result: Tensor | None = torch.autograd.grad(
        output, source, cotangents, retain_graph=True, allow_unused=True, is_grads_batched=batched
    )[0]
    if result is None:
        return source.new_zeros((cotangents.shape[0], *source.shape) if batched else source.shape)
    return result


def vectorizes(multiply: Callable[[Tensor, bool], Tensor], example: Tensor) -> bool:
    """Whether products through vmap work, and equal those one by one, on two columns `example` [2, P].

    Some operations have no batching rule for their second derivative, and at least one of PyTorch's (group norm) has a
    wrong one: only trying tells.
    """
    try:
        together = multiply(example, True)
    except Exception:  # any failure of vmap's; the loop decides whether the model itself fails
        return False
    return agree(together, multiply(example, False))


def agree(first: Tensor, second: Tensor) -> bool:
    """Whether two results are equal up to rounding."""
    eps = torch.finfo(first.dtype).eps
    first, second = first.double(), second.double()  # squares of small numbers vanish in float32
    return float((first - second).norm()) <= ROUNDINGS * eps * max(float(first.norm()), float(second.norm()))


def require_symmetric(pair: Tensor, products: Tensor, what: str) -> None:
    """Raise ModelError unless u.Hv = v.Hu, given u, v [2, P] and their products Hu, Hv [2, P].

    A Hessian is symmetric unless an operation's second derivative is wrong: PyTorch's own of weight_norm, gradients
    scaled by frequency, some custom functions whose backward detaches. Nothing else would show.
    """
    (u, v), (Hu, Hv) = pair.double(), products.double()  # squares of small numbers vanish in float32
    gap = abs(float(u @ Hv) - float(v @ Hu))
    scale = float(u.norm() * Hv.norm() + v.norm() * Hu.norm())
    # A wrong derivative shows in the first digits. Rounding may take many of them where a network fits its data: what
    # is left of probabilities minus labels is known to eps of 1, not of itself.
    if gap > torch.finfo(pair.dtype).eps ** 0.5 * scale:
        relative = gap / scale if scale else 1.0
        raise ModelError(
            f"{what} is not symmetric (relative gap {relative:.1g}): an operation has a wrong second derivative, "
            "like torch's weight_norm, Embedding(scale_grad_by_freq=True or padding_idx) or a custom function whose "
            "backward detaches; or the loss is so small that its curvature is lost in rounding (try torch.float64)"
        )
