"""Which engine multiplies: the candidates are tried and timed once, on the first batch, and checked.

What has won wherever we measured, the linearization, is timed on all of the batch, since it will most likely be used;
double backward on a part of it.

Rounding differs between engines, so a choice by the clock could change the last digits from run to run: problems that
take milliseconds are not timed at all, but linearized, if that can be done.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor

from hesscope.core.errors import HesscopeError
from hesscope.core.memory import human_bytes
from hesscope.operators.engines import (
    Curve,
    LinearMap,
    Sandwich,
    build,
    compiled,
    linearized,
    load_forward_mode,
    variants,
)
from hesscope.operators.second_derivatives import agree, require_symmetric

Result = TypeVar("Result")

# Set-up counts as if this many products followed; a few eigenvalues or a spectral density take about as many.
PRODUCTS = 30

# Below this much memory for the activations a product takes milliseconds, however it is made.
SMALL_GRAPH = 2**22

# A product is timed again until so many seconds have passed: once if it is slow, a few times if it is fast.
TIMED_SECONDS, TIMED_AT_MOST = 0.05, 5


@dataclass(frozen=True)
class Candidate:
    """One way of making products on the first batch: seconds to set up and for a product, memory held between them.

    failure: why it cannot be used; empty if it can.
    """

    name: str
    setup: float = float("nan")
    product: float = float("nan")
    bytes: int = 0
    failure: str = ""

    @property
    def cost(self) -> float:
        """Seconds for the set-up and PRODUCTS products."""
        return self.setup + PRODUCTS * self.product

    def __str__(self) -> str:
        if self.failure:
            return f"{self.name}: cannot be used ({self.failure})"
        return (
            f"{self.name}: {_milliseconds(self.product)} a product, {_milliseconds(self.setup)} to set up, "
            f"{human_bytes(self.bytes)} held"
        )


@dataclass(frozen=True)
class Choice:
    """A settled engine.

    Attributes:
        name: engine and how it is varied, as in `Candidate.name`.
        engine: one of ENGINES; variant: which of `variants` of a linearization; compile: whether it is compiled.
        reason: why, in words; candidates: what was timed.
    """

    name: str
    engine: str
    variant: int = 0
    compile: bool = False
    reason: str = "as asked for"
    candidates: tuple[Candidate, ...] = field(default=(), repr=False)

    def build(self, matrix: Curve | Sandwich, theta: Tensor, example: Tensor) -> LinearMap | None:
        """The linear map of another batch by the same engine."""
        linear = build(self.engine, matrix, theta, example)
        if linear is None or self.engine != "linearize":
            return linear
        chosen = variants(linear)[self.variant] if self.variant else linear
        return compiled(chosen) if self.compile else chosen


def settle(
    engine: str,
    compile: bool,
    matrix: Curve | Sandwich,
    theta: Tensor,
    pair: Tensor,
    graph_bytes: int,
    sample: tuple[Curve | Sandwich, float] | None = None,
    symmetric: bool = False,
) -> tuple[Choice, LinearMap] | None:
    """The engine and the linear map of the first batch; None if that is zero.

    Args:
        engine: one of ENGINES or "auto"; compile: whether linearizations are compiled.
        pair: [2, P] random rows to check and to time with; graph_bytes: memory for the activations.
        sample: the matrix on a part of the batch, and how large a part, to time what is not likely to be chosen.
        symmetric: whether it is known to be that, and need not be asked.

    Raises:
        ModelError: products are not symmetric. What the engine raises, if no engine works.
    """
    if engine == "auto" and not compile:
        try:
            if graph_bytes >= SMALL_GRAPH:
                return _fastest(matrix, theta, pair, sample or (matrix, 1.0), symmetric)
            reason = "the problem is too small to be worth timing"
            return _checked("linearize", False, matrix, theta, pair, reason, symmetric)
        except HesscopeError:
            raise
        except Exception as error:  # forward mode lacks some operation
            reason = f"linearize cannot be used: {' '.join(str(error).split())[:120]}"
            return _checked("double_backward", False, matrix, theta, pair, reason, symmetric)
    chosen = "linearize" if engine == "auto" else engine
    return _checked(chosen, compile, matrix, theta, pair, "as asked for", symmetric)


def _checked(
    engine: str, compile: bool, matrix: Curve | Sandwich, theta: Tensor, pair: Tensor, reason: str, symmetric: bool
) -> tuple[Choice, LinearMap] | None:
    choice = Choice(_name(engine, 0, compile), engine, compile=compile, reason=reason)
    linear = choice.build(matrix, theta, pair[0])
    if linear is None:
        return None
    if not symmetric:
        require_symmetric(pair, linear.multiply(pair, False), matrix.what)
    return choice, linear


def _fastest(
    matrix: Curve | Sandwich, theta: Tensor, pair: Tensor, sample: tuple[Curve | Sandwich, float], symmetric: bool
) -> tuple[Choice, LinearMap] | None:
    """Time linearizations, and double backward on a sample of the batch; whatever fails is passed on."""
    load_forward_mode()
    setup, made = _timed(lambda: linearized(matrix, theta, pair[1]))
    if made is None:
        return None
    recorded, second = made
    seconds, first = _time_product(recorded, pair[:1])
    if not symmetric:
        require_symmetric(pair, torch.cat([first, second.unsqueeze(0)]), matrix.what)
    candidates, found = [], {}
    for number, variant in enumerate(variants(recorded)):
        name = _name("linearize", number, False)
        if number:
            _, product = _time_product(variant, pair[:1])  # memory is laid out and kernels are made at the first one
            if agree(product, first):
                seconds, product = _time_product(variant, pair[:1])
            if not agree(product, first):
                candidates.append(Candidate(name, failure="it gives another product"))
                continue
        candidates.append(Candidate(name, setup, seconds, variant.bytes))
        found[name] = (Choice(name, "linearize", number), variant)
    name = "double_backward"
    for part, share in (sample, (matrix, 1.0)):
        try:
            setup, linear = _timed(lambda part=part: build(name, part, theta, pair[0]))  # type: ignore[misc]
            seconds = 0.0 if linear is None else _time_product(linear, pair[:1])[0]
        except Exception:  # a part of a batch need not be a batch; the whole tells whether the model is to blame
            if part is matrix:
                raise
            continue
        if linear is not None:
            candidates.append(Candidate(name, setup / share, seconds / share, int(linear.bytes / share)))
        break
    best = min((candidate for candidate in candidates if not candidate.failure), key=lambda each: each.cost)
    reason = f"the fastest over {PRODUCTS} products, set-up included"
    if best.name == name:
        linear = build(name, matrix, theta, pair[0])
        if linear is None:
            return None
        if not symmetric:
            require_symmetric(pair, torch.cat([first, linear.multiply(pair[1:], False)]), matrix.what)
        return Choice(name, name, reason=reason, candidates=tuple(candidates)), linear
    choice, linear = found[best.name]
    return replace(choice, reason=reason, candidates=tuple(candidates)), linear


def _name(engine: str, variant: int, compile: bool) -> str:
    return engine + (", channels last" if variant else "") + (", compiled" if compile else "")


def _timed(call: Callable[[], Result]) -> tuple[float, Result]:
    """Seconds that a call takes, at its fastest, and its result."""
    fastest, spent, count = float("inf"), 0.0, 0
    while True:
        _synchronize()
        start = time.perf_counter()
        result = call()
        _synchronize()
        elapsed = time.perf_counter() - start
        fastest, spent, count = min(fastest, elapsed), spent + elapsed, count + 1
        if spent >= TIMED_SECONDS or count == TIMED_AT_MOST:
            return fastest, result
        del result


def _time_product(linear: LinearMap, row: Tensor) -> tuple[float, Tensor]:
    return _timed(lambda: linear.multiply(row, False))


def _synchronize() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms"
