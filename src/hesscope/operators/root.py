"""Rows of a root of the Gauss-Newton matrix: G = W^T W, with a row of W for every loss term and output.

W = S^T J / sqrt(N), where A = S S^T (see output_root): W^T u is one backward pass, W v one forward product. W has as
many rows as there are outputs and is never formed; it is cut into parts, each that of some samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from math import sqrt

import torch
from torch import Tensor

from hesscope.core.errors import DataError, InputError
from hesscope.core.rng import coarse, stream
from hesscope.objective.losses import OutputLoss
from hesscope.objective.objective import Objective, require_output_loss
from hesscope.operators.curvature import PASS_BYTES, EmpiricalFisher, GaussNewton
from hesscope.operators.operator import Combination, Operator
from hesscope.operators.output_root import OutputRoot, curvature_root, gradient_root
from hesscope.operators.second_derivatives import explained, pull_back, require_twice_differentiable, vectorizes

MAX_VECTORS_PER_PASS = 64


@dataclass(frozen=True)
class PartRows:
    """What is known of a part without its graph: entries of a root vector, and how many of its rows are not zero."""

    size: int
    live: int


class RootPart:
    """W of some samples: [root size, P]; holds their graph, so it is to be forgotten before the next one is made."""

    def __init__(self, root: Root, outputs: Tensor, targets: Tensor, theta: Tensor, index: int) -> None:
        self._root, self._outputs, self._theta, self._index = root, outputs, theta, index
        self.inner: OutputRoot = root.output_root(outputs.detach(), targets)
        self.rows = PartRows(self.inner.live.numel(), int(self.inner.live.sum()))

    @property
    def live(self) -> Tensor:
        """Numbers of the rows that are not exactly zero, ascending."""
        return self.inner.live.flatten().nonzero().squeeze(1)

    def pull(self, vectors: Tensor) -> Tensor:
        """W^T u for u [K, root size]; [K, P]."""
        rows = torch.zeros(len(vectors), len(self._theta), dtype=self._theta.dtype, device=self._theta.device)
        self.pull_into(rows, vectors)
        return rows

    def pull_into(self, rows: Tensor, vectors: Tensor) -> None:
        """Add W^T u for u [K, root size] to `rows` [K, P]: rows are large, and copies of them take most of the time."""

        def back(some: Tensor, vectorized: bool) -> Tensor:
            cotangents = self.inner.apply(some.view(-1, *self.inner.live.shape)) / self._root.divisor
            return pull_back(self._outputs, self._theta, cotangents, vectorized)

        for chunk, result in self._passes(back, vectors, "pull"):
            # One pass over a sum; entry by entry only if that is not finite.
            if not bool(result.sum().isfinite()) and not bool(result.isfinite().all()):
                raise DataError(f"{self._root.name} is not finite on batch {self._index}")
            rows[chunk] += result

    def push(self, rows: Tensor) -> Tensor:
        """W v for v [K, P]; [K, root size]."""
        if not self._outputs.requires_grad:
            return rows.new_zeros(len(rows), self.rows.size)
        u, transposed = self._transposed

        def forward(some: Tensor, vectorized: bool) -> Tensor:
            return self.inner.transpose(pull_back(transposed, u, some, vectorized)) / self._root.divisor

        return torch.cat([result.flatten(1) for _, result in self._passes(forward, rows, "push")])

    @cached_property
    def _transposed(self) -> tuple[Tensor, Tensor]:
        """J^T u, linear in u: its derivative is the forward product."""
        u = torch.zeros_like(self._outputs, requires_grad=True)
        (transposed,) = torch.autograd.grad(self._outputs, self._theta, u, create_graph=True)
        require_twice_differentiable(self._outputs, transposed, f"{self._root.name}'s forward product")
        return u, transposed

    def _passes(
        self, multiply: Callable[[Tensor, bool], Tensor], vectors: Tensor, way: str
    ) -> Iterator[tuple[slice, Tensor]]:
        """Results for as many vectors at a time as go together, with their places."""
        width = self._root.vectors_per_pass if len(vectors) > 1 else 1
        with explained(self._root.name):
            if width > 1 and not self._root.vectorizes(multiply, vectors, way, self._index):
                width = 1
            for start in range(0, len(vectors), width):
                some = vectors[start : start + width]
                yield slice(start, start + len(some)), multiply(some, width > 1)


@dataclass(frozen=True, eq=False)
class Root:
    """W of a matrix factor * W^T W.

    Attributes:
        operator: the Gauss-Newton or empirical Fisher matrix; factor: what it is multiplied by.
        pieces: how many parts a batch is cut into, at most (one where its samples are not independent).
    """

    operator: GaussNewton | EmpiricalFisher
    factor: float
    pieces: int
    _vectorized: dict[tuple[str, int], bool] = field(default_factory=dict, repr=False)

    @property
    def objective(self) -> Objective:
        """What is curved."""
        return self.operator.objective

    @property
    def name(self) -> str:
        """For messages."""
        return self.operator.name

    @property
    def divisor(self) -> float:
        """Root of the number of terms: G is a mean."""
        return sqrt(self.objective.num_terms)

    def output_root(self, outputs: Tensor, targets: Tensor) -> OutputRoot:
        """S at the outputs of a batch."""
        loss: OutputLoss = require_output_loss(self.objective, self.name)
        make = curvature_root if isinstance(self.operator, GaussNewton) else gradient_root
        return make(loss, outputs, targets)

    def survey(self) -> list[PartRows]:
        """One look at all parts, in order."""
        return [part.rows for _, part in self.parts()]

    def parts(self, wanted: Iterable[int] | None = None) -> Iterator[tuple[int, RootPart]]:
        """The parts (all, or those of these numbers) with their numbers, in order; one graph at a time."""
        chosen = None if wanted is None else set(wanted)
        last = None if not chosen else max(chosen)
        objective, number = self.objective, 0
        with explained(self.name), objective.evaluating() as (theta, batches):
            for index, batch in batches:
                for piece in objective.pieces(theta, batch, index, self.pieces) if self.pieces > 1 else [batch]:
                    if chosen is None or number in chosen:
                        outputs, targets = objective.outputs_and_targets(theta, piece, index)
                        part = RootPart(self, outputs, targets, theta, index)
                        del outputs
                        yield number, part
                        del part
                    if number == last:
                        return
                    number += 1

    @property
    def vectors_per_pass(self) -> int:
        """As many as PASS_BYTES hold: each takes about the activations of its part and two parameter vectors."""
        item = torch.empty(0, dtype=self.operator.dtype).element_size()
        per_vector = 2 * self.objective.graph_bytes // self.pieces + 2 * self.operator.shape[0] * item
        budget = PASS_BYTES.get(self.operator.device.type, PASS_BYTES["cuda"])
        return max(1, min(MAX_VECTORS_PER_PASS, budget // per_vector))

    def vectorizes(self, multiply: Callable[[Tensor, bool], Tensor], vectors: Tensor, way: str, index: int) -> bool:
        """Whether vmap works and is right, found once for each batch and way."""
        if (way, index) not in self._vectorized:
            pair = coarse((2, vectors.shape[1]), stream(0, "check of a root")).to(vectors)
            self._vectorized[way, index] = vectorizes(multiply, pair)
        return self._vectorized[way, index]


def root_of(operator: Operator, pieces: int = 1) -> Root:
    """The root of a Gauss-Newton or empirical Fisher matrix, or of one of these times a number.

    Raises:
        InputError: anything else, of which no root is known.
    """
    factor, inner = 1.0, operator
    if isinstance(operator, Combination) and len(operator.terms) == 1:
        ((factor, inner),) = operator.terms
    if not isinstance(inner, (GaussNewton, EmpiricalFisher)):
        raise InputError(
            f"the dual form needs a root of the matrix, which a hesscope.GaussNewton has, got {operator.engine}; "
            "choose another method"
        )
    return Root(inner, factor, pieces)
