"""Hessian and Gauss-Newton matrix of an Objective (MATH.md, section 1: H = G + R)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Hashable, Iterator
from functools import cached_property

import torch
from torch import Tensor

from hesscope.core.errors import DataError
from hesscope.core.rng import normal, stream
from hesscope.objective.losses import output_gradient
from hesscope.objective.objective import Objective, require_output_loss
from hesscope.operators.closed_form import mlp
from hesscope.operators.closed_form.network import Network, recognize
from hesscope.operators.closed_form.strips import cut_matrix
from hesscope.operators.operator import STRIP_MEMORY, MatrixStrip, Operator
from hesscope.operators.second_derivatives import (
    explained,
    pull_back,
    require_symmetric,
    require_twice_differentiable,
    vectorizes,
)

# From rows [K, P], one by one or vectorized, to their products [K, P].
Multiply = Callable[[Tensor, bool], Tensor]

# Memory that one vectorized pass should take; beyond it columns are done in several passes. On a CPU the passes that
# stay near the caches are the fast ones (a one-hidden-layer network on the digits: 16 columns take 0.8 s for the dense
# Hessian, 200 take 1.5 s); a GPU wants large ones.
PASS_BYTES = {"cpu": 2**26, "cuda": 2**30}
MAX_COLUMNS_PER_PASS = 256


class _Curvature(Operator):
    """What the two matrices share: their objective, and columns per pass within PASS_BYTES."""

    name: str
    symmetric = True

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.shape = (objective.parameters.size, objective.parameters.size)
        self.dtype = objective.parameters.dtype
        self.device = objective.parameters.device
        self.data_fingerprint = objective.data_fingerprint
        self._vectorized: dict[int, bool] = {}
        self._found_symmetric = False

    @cached_property
    def _network(self) -> Network | None:
        return recognize(self.objective)

    @property
    def layout(self) -> Hashable | None:
        """Widths and biases of the fully connected network behind the matrix, if it has a closed form; else None."""
        return None if self._network is None else (self._network.shapes, self._network.biased)

    @property
    def dense_engine(self) -> str:
        """How `dense` is computed."""
        return self.engine.replace("double backward", "closed form") if self.has_closed_form else self.engine

    def dense(self) -> Tensor:
        """The whole matrix [P, P], exactly symmetric; in closed form for fully connected networks, else by products.

        Raises:
            TooLargeError: it would not fit in memory (the message says how much it needs and what to use instead).
        """
        if self._network is None:
            return super().dense()
        self.require_memory_for_dense(extra_columns=self.shape[1])
        return mlp.dense(self.objective, self._network, isinstance(self, GaussNewton))

    def strips(self, memory: int = STRIP_MEMORY) -> Iterator[MatrixStrip]:
        """The matrix strip by strip, by formula; see Operator.strips."""
        if self._network is None:
            yield from super().strips(memory)
            return
        positions = self._network.positions().to(self.device)
        for strip, values in mlp.strips(self.objective, self._network, isinstance(self, GaussNewton), memory):
            yield MatrixStrip(
                rows=positions[strip.rows(self._network)],
                columns=positions[strip.column(self._network) :],
                own=strip.own_columns(self._network),
                values=values,
            )

    def strip_bytes(self, memory: int = STRIP_MEMORY) -> int:
        """Bytes that `strips(memory)` takes; see Operator.strip_bytes."""
        if self._network is None:
            return super().strip_bytes(memory)
        return cut_matrix(self._network, torch.empty(0, dtype=self.dtype).element_size(), memory).bytes

    @property
    def columns_per_pass(self) -> int:
        """As many columns as PASS_BYTES hold: each needs about the activations and two parameter vectors."""
        item = torch.empty(0, dtype=self.dtype).element_size()
        per_column = 2 * self.objective.graph_bytes + 2 * self.shape[0] * item
        budget = PASS_BYTES.get(self.device.type, PASS_BYTES["cuda"])
        return max(1, min(MAX_COLUMNS_PER_PASS, budget // per_column))

    def products(self, V: Tensor) -> Tensor:
        """Products with all columns of V [P, K]: one graph per batch, `columns_per_pass` columns at a time."""
        objective = self.objective
        if V.shape[1] == 0:
            return V.clone()
        with objective.evaluating() as (theta, batches), explained(self.name):
            rows = V.T.clone() if V.is_inference() else V.T
            finite = bool(rows.isfinite().all())
            total = torch.zeros_like(rows)
            for index, batch in batches:
                multiply = self._linearized(theta, batch, index)
                if multiply is None:
                    continue
                vectorized = self._checked(multiply, index, rows.shape[0])
                for part, chunk in zip(*(torch.split(t, self.columns_per_pass) for t in (total, rows)), strict=True):
                    part += multiply(chunk, vectorized)
                if finite and not bool(total.isfinite().all()):
                    raise DataError(f"{self.name} is not finite on batch {index}")
            return (total / objective.num_terms).T

    @abstractmethod
    def _linearized(self, theta: Tensor, batch: object, index: int) -> Multiply | None:
        """Build the batch's graph; gives the function from rows to their products, None if they are all zero."""

    def _checked(self, multiply: Multiply, index: int, columns: int) -> bool:
        """Whether to vectorize, found once per batch against single products; symmetry is checked once per operator."""
        if not self._found_symmetric:
            require_symmetric(multiply, self._example(), self.name)
            self._found_symmetric = True
        if columns == 1:
            return False
        if index not in self._vectorized:
            self._vectorized[index] = vectorizes(multiply, self._example())
        return self._vectorized[index]

    def _example(self) -> Tensor:
        """Two random rows [2, P] to check products with."""
        return normal((2, self.shape[0]), stream(0, "check of products")).to(self.device, self.dtype)


class Hessian(_Curvature):
    """Hessian of an Objective: [P, P], by double backward through a retained graph.

    Raises:
        NoSecondDerivativeError, ModelError, DataError: at the first product, if an operation has no second derivative
            or a wrong one, or if a product is not finite.
    """

    name = "the Hessian"
    engine = "hessian: double backward"

    def _linearized(self, theta: Tensor, batch: object, index: int) -> Multiply | None:
        loss_sum = self.objective.evaluate(theta, batch, index).sum
        if not loss_sum.requires_grad:
            return None
        (gradient,) = torch.autograd.grad(loss_sum, theta, create_graph=True)
        require_twice_differentiable(loss_sum, gradient, self.name)
        return lambda rows, vectorized: pull_back(gradient, theta, rows, vectorized)


class GaussNewton(_Curvature):
    """Generalized Gauss-Newton matrix (1/N) sum J^T A J: [P, P]; A is the loss's Hessian at the outputs.

    Products push a vector forward through J (as the derivative of J^T u with respect to u), through A, and back.

    Raises:
        InputError: the loss is a callable, so that outputs and targets are not known.
    """

    name = "the Gauss-Newton matrix"
    engine = "gauss-newton: double backward"

    def __init__(self, objective: Objective) -> None:
        self._loss = require_output_loss(objective, "the Gauss-Newton matrix")
        super().__init__(objective)

    def _linearized(self, theta: Tensor, batch: object, index: int) -> Multiply | None:
        outputs, targets = self.objective.outputs_and_targets(theta, batch, index)
        if not outputs.requires_grad:
            return None
        leaf, loss_gradient = output_gradient(self._loss, outputs, targets)
        u = torch.zeros_like(outputs, requires_grad=True)
        (transposed,) = torch.autograd.grad(outputs, theta, u, create_graph=True)
        require_twice_differentiable(outputs, transposed, f"{self.name}'s forward product")

        def multiply(rows: Tensor, vectorized: bool) -> Tensor:
            pushed = pull_back(transposed, u, rows, vectorized)
            curved = pull_back(loss_gradient, leaf, pushed, vectorized)
            return pull_back(outputs, theta, curved, vectorized)

        return multiply
