"""Engines: the ways to turn a batch's function into a linear map, so that it can be multiplied by many vectors.

- "double_backward" keeps the graph of the gradient and differentiates it once more for every vector.
- "forward_over_reverse" keeps nothing: dual numbers are carried through the forward and the backward pass.
- "linearize" records what forward-over-reverse does with the vector, and replays that alone (see linearization).

Each takes what is to be multiplied, a `Curve` (the Hessian) or a `Sandwich` (Gauss-Newton, Fisher), at one batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from hesscope.operators.linearization import Linearization, channels_last, record
from hesscope.operators.second_derivatives import (
    NO_FORWARD_MODE,
    has_custom_functions,
    pull_back,
    require_twice_differentiable,
    saved_storages,
    stacked,
)

Result = TypeVar("Result")

ENGINES = ("double_backward", "linearize", "forward_over_reverse")

# From rows [K, P], one by one or vectorized, to their products [K, P].
Multiply = Callable[[Tensor, bool], Tensor]


@dataclass(frozen=True)
class LinearMap:
    """A symmetric matrix on one batch: its products, and the memory it holds between them (storage -> bytes).

    recorded: what it replays, if it is a linearization.
    """

    multiply: Multiply
    storages: Mapping[int, int] = field(repr=False)
    recorded: Linearization | None = field(default=None, repr=False)

    @property
    def bytes(self) -> int:
        """Memory held between products."""
        return sum(self.storages.values())


@dataclass(frozen=True)
class Curve:
    """The Hessian of a function of theta [P] -> scalar; `what` it is called in messages."""

    function: Callable[[Tensor], Tensor]
    what: str


@dataclass(frozen=True)
class Sandwich:
    """J^T M J, where J is the Jacobian of outputs of theta [P], and M a symmetric map at the outputs.

    middle: gives, for detached outputs, the function from pushed vectors (shaped like the outputs, or stacked [K, ...]
    when told so) to M times them.
    """

    outputs: Callable[[Tensor], Tensor]
    middle: Callable[[Tensor], Multiply]
    what: str


def build(engine: str, matrix: Curve | Sandwich, theta: Tensor, example: Tensor) -> LinearMap | None:
    """The linear map of `matrix` at theta, a leaf [P], made by one of ENGINES; None if it is zero.

    `example`: a vector [P] to record the linearization with.

    Raises:
        NoSecondDerivativeError: a custom function is marked to have none. Whatever else fails is passed on.
    """
    if engine == "double_backward":
        return _curve_backward(matrix, theta) if isinstance(matrix, Curve) else _sandwich_backward(matrix, theta)
    if engine == "linearize":
        found = linearized(matrix, theta, example)
        return None if found is None else found[0]
    load_forward_mode()

    def multiplied(row: Tensor) -> Tensor:
        return _light_or_not(lambda light: _dual_product(matrix, theta, light)(row))

    return LinearMap(lambda rows, vectorized: stacked([multiplied(row) for row in rows]), {})


def linearized(matrix: Curve | Sandwich, theta: Tensor, v: Tensor) -> tuple[LinearMap, Tensor] | None:
    """A linearization, as by `build`, recorded with v [P], and the product with v [P]; None if the map is zero."""
    load_forward_mode()
    found = _light_or_not(lambda light: record(_dual_product(matrix, theta, light), v))
    return None if found is None else (_replayed(found[0]), found[1])


def variants(linear: LinearMap) -> tuple[LinearMap, ...]:
    """A linearization as it is, and with its images laid out with their channels last, if it has convolutions."""
    other = channels_last(linear.recorded) if linear.recorded is not None else None
    return (linear,) if other is None else (linear, _replayed(other))


def compiled(linear: LinearMap) -> LinearMap:
    """A linearization through `torch.compile`, one row at a time; the first product takes the time to compile."""
    assert linear.recorded is not None
    replay: Callable[[Tensor], Tensor] = torch.compile(linear.recorded.tape.to_fx(), fullgraph=True, dynamic=False)

    def multiply(rows: Tensor, vectorized: bool) -> Tensor:
        with torch.no_grad():
            return stacked([replay(row) for row in rows])

    return LinearMap(multiply, linear.storages)


def _replayed(recorded: Linearization) -> LinearMap:
    def multiply(rows: Tensor, vectorized: bool) -> Tensor:
        with torch.no_grad():
            if vectorized:
                return recorded.replay_rows(rows)
            return stacked([recorded.replay(row) for row in rows])

    return LinearMap(multiply, recorded.storages(), recorded)


@cache
def load_forward_mode() -> None:
    """Load what PyTorch loads at the first dual number and recording, without the warnings it gives about itself.

    It takes 2 s, which are none of the engines' own.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        import_module("torch._decomp.decompositions_for_jvp")
        record(lambda v: v * 2.0, torch.ones(2))


def _curve_backward(matrix: Curve, theta: Tensor) -> LinearMap | None:
    value = matrix.function(theta)
    if not value.requires_grad:
        return None
    (gradient,) = torch.autograd.grad(value, theta, create_graph=True)
    require_twice_differentiable(value, gradient, matrix.what)
    return LinearMap(
        lambda rows, vectorized: pull_back(gradient, theta, rows, vectorized), saved_storages(gradient, theta)
    )


def _light_or_not(run: Callable[[bool], Result]) -> Result:
    """`run(True)`, or `run(False)` where an operation's backward (SiLU's) has forward mode in the other form only."""
    try:
        return run(True)
    except RuntimeError as error:
        if NO_FORWARD_MODE.search(str(error)) is None:
            raise
    return run(False)


def _dual_product(matrix: Curve | Sandwich, theta: Tensor, light: bool) -> Callable[[Tensor], Tensor]:
    return _dual_curve(matrix, theta, light) if isinstance(matrix, Curve) else _dual_sandwich(matrix, theta)


def _dual_curve(matrix: Curve, theta: Tensor, light: bool) -> Callable[[Tensor], Tensor]:
    """The gradient's tangent; its own graph, which takes as long again, is for checks and for some operations only."""

    def product(v: Tensor) -> Tensor:
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(theta, v)  # type: ignore[no-untyped-call]
            value = matrix.function(dual)
            if not value.requires_grad:
                return torch.zeros_like(v)
            with_graph = not light or has_custom_functions(value)
            (gradient,) = torch.autograd.grad(value, dual, create_graph=with_graph)
            if with_graph:
                require_twice_differentiable(value, gradient, matrix.what)
            tangent = forward_ad.unpack_dual(gradient).tangent  # type: ignore[no-untyped-call]
            return torch.zeros_like(v) if tangent is None else tangent.detach()

    return product


def _sandwich_backward(matrix: Sandwich, theta: Tensor) -> LinearMap | None:
    """Vectors are pushed forward as the derivative of J^T u with respect to u."""
    outputs = matrix.outputs(theta)
    if not outputs.requires_grad:
        return None
    middle = matrix.middle(outputs.detach())
    u = torch.zeros_like(outputs, requires_grad=True)
    (transposed,) = torch.autograd.grad(outputs, theta, u, create_graph=True)
    require_twice_differentiable(outputs, transposed, f"{matrix.what}'s forward product")

    def multiply(rows: Tensor, vectorized: bool) -> Tensor:
        pushed = pull_back(transposed, u, rows, vectorized)
        return pull_back(outputs, theta, middle(pushed, vectorized), vectorized)

    return LinearMap(multiply, {**saved_storages(outputs, theta), **saved_storages(transposed, theta)})


def _dual_sandwich(matrix: Sandwich, theta: Tensor) -> Callable[[Tensor], Tensor]:
    """Vectors are pushed forward as dual numbers, and pulled back through the graph of that very pass."""

    def product(v: Tensor) -> Tensor:
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(theta, v)  # type: ignore[no-untyped-call]
            outputs, pushed = forward_ad.unpack_dual(matrix.outputs(dual))  # type: ignore[no-untyped-call]
        # Tangents end with the level: the way back is that of plain numbers.
        if pushed is None or not outputs.requires_grad:
            return torch.zeros_like(v)
        curved = matrix.middle(outputs.detach())(pushed.detach().unsqueeze(0), False)[0]
        return torch.autograd.grad(outputs, theta, curved)[0]

    return product
