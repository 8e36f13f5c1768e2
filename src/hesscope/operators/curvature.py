"""Hessian, Gauss-Newton and empirical Fisher matrix of an Objective (MATH.md, section 1: H = G + R)."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Hashable, Iterator
from dataclasses import replace
from functools import cached_property
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from hesscope.core.checks import nearest, require_choice
from hesscope.core.errors import DataError, HesscopeError, InputError
from hesscope.core.memory import available_bytes, human_bytes
from hesscope.core.rng import coarse, stream
from hesscope.objective.losses import output_gradient
from hesscope.objective.objective import Objective, require_output_loss
from hesscope.objective.pieces import cut
from hesscope.operators.choice import Choice, settle
from hesscope.operators.closed_form import mlp
from hesscope.operators.closed_form.backward import Part
from hesscope.operators.closed_form.network import Network, recognize
from hesscope.operators.closed_form.strips import cut_matrix
from hesscope.operators.engines import ENGINES, Curve, LinearMap, Multiply, Sandwich, build
from hesscope.operators.kept import Kept
from hesscope.operators.logit_tiles import TILED_BYTES, LastLayer, find_last_layer, samples_independent, tiled
from hesscope.operators.operator import STRIP_MEMORY, Combination, MatrixStrip, Operator, Restricted, as_positions
from hesscope.operators.second_derivatives import explained, pull_back, require_symmetric, vectorizes

# Memory that one vectorized pass should take; beyond it columns are done in several passes. On a CPU the passes that
# stay near the caches are the fast ones (a one-hidden-layer network on the digits: 16 columns take 0.8 s for the dense
# Hessian, 200 take 1.5 s); a GPU wants large ones.
PASS_BYTES = {"cpu": 2**26, "cuda": 2**30}
MAX_COLUMNS_PER_PASS = 256

# What is kept between products may take this share of the memory that is free at the first product, unless told.
KEPT_SHARE = 0.25

# What an engine holds for a batch, in units of the memory that autograd keeps for a plain forward pass: 2.2 to 2.4 were
# measured for double backward (ResNet-20, GPT), 1.5 to 2.5 for a linearization.
GRAPHS_HELD = 2.5

# Samples are cut into at least so many pieces where a batch is not kept, and where nothing may be kept at all: a fresh
# graph of the gradient takes 2.2 to 2.3 times the memory of a gradient, that of half the samples less than twice in
# convolutional networks, and of a quarter in transformers with a large vocabulary.
PIECES, FOR_LITTLE, MOST_PIECES = 2, 4, 32

# What is not likely to be chosen is timed on so small a part of a batch.
SAMPLED = 4


class _Curvature(Operator):
    """What the matrices share: their objective, an engine, and what is kept between products."""

    name: str
    kind: str
    symmetric = True
    has_formula = True  # whether closed_form knows the matrix for fully connected networks

    def __init__(
        self, objective: Objective, engine: str = "auto", compile: bool = False, memory: int | None = None
    ) -> None:
        if not isinstance(objective, Objective):
            raise InputError(
                f"expected a hesscope.Objective, got {type(objective).__name__}: wrap model, loss and data"
            )
        require_choice("engine", engine, ("auto", *ENGINES))
        if compile and engine not in ("auto", "linearize"):
            raise InputError(f"compile=True needs engine 'linearize' or 'auto', PyTorch cannot compile {engine!r}")
        if not isinstance(compile, bool):
            raise InputError(f"compile must be True or False, got {compile!r}")
        _require_bytes(memory)
        self.objective = objective
        self.shape = (objective.parameters.size, objective.parameters.size)
        self.dtype = objective.parameters.dtype
        self.device = objective.parameters.device
        self.data_fingerprint = objective.data_fingerprint
        self._asked, self._compile, self._memory = engine, compile, memory
        self._choice: Choice | None = None  # of the batches that are kept
        self._streaming: Choice | None = None  # of those that are not
        self._kept = Kept()
        self._vectorized: dict[int, bool] = {}
        self._exceptions: dict[int, str] = {}  # batches that the chosen engine could not do, and why

    @property
    def engine(self) -> str:  # type: ignore[override]
        """How products are computed: the engine asked for, or, once it is settled, the one chosen."""
        settled = self._settled
        name = self._asked if settled is None else settled.name
        return f"{self.kind}: {name.replace('_', ' ')}"

    @property
    def _settled(self) -> Choice | None:
        return self._choice or self._streaming

    @cached_property
    def _network(self) -> Network | None:
        return recognize(self.objective) if self.has_formula else None

    @property
    def layout(self) -> Hashable | None:
        """Widths and biases of the fully connected network behind the matrix, if it has a closed form; else None."""
        return None if self._network is None else (self._network.shapes, self._network.biased)

    @property
    def dense_engine(self) -> str:
        """How `dense` is computed."""
        return f"{self.kind}: closed form" if self.has_closed_form else self.engine

    @property
    def _part(self) -> Part:
        return "gauss_newton" if isinstance(self, GaussNewton) else "hessian"

    def dense(self) -> Tensor:
        """The whole matrix [P, P], exactly symmetric; in closed form for fully connected networks, else by products.

        Raises:
            TooLargeError: it would not fit in memory (the message says how much it needs and what to use instead).
        """
        if self._network is None:
            return super().dense()
        self.require_memory_for_dense(extra_columns=self.shape[1])
        return mlp.dense(self.objective, self._network, self._part)

    def strips(self, memory: int = STRIP_MEMORY) -> Iterator[MatrixStrip]:
        """The matrix strip by strip, by formula; see Operator.strips."""
        if self._network is None:
            yield from super().strips(memory)
            return
        yield from _strips(self.objective, self._network, self._part, memory)

    def strip_bytes(self, memory: int = STRIP_MEMORY) -> int:
        """Bytes that `strips(memory)` takes; see Operator.strip_bytes."""
        if self._network is None:
            return super().strip_bytes(memory)
        return cut_matrix(self._network, torch.empty(0, dtype=self.dtype).element_size(), memory).bytes

    @property
    def columns_per_pass(self) -> int:
        """As many columns as PASS_BYTES hold: each needs about the activations and two parameter vectors.

        Where graphs are not kept but made anew for every call, all columns of a call share them: then as many as hold
        in vectors alone.
        """
        per_column = 2 * self.shape[0] * torch.empty(0, dtype=self.dtype).element_size()
        budget = PASS_BYTES.get(self.device.type, PASS_BYTES["cuda"])
        graph = 0 if self._streams else 2 * self.objective.graph_bytes
        return max(1, min(MAX_COLUMNS_PER_PASS, budget // (per_column + graph)))

    def restrict(self, block: Any) -> Operator:
        """The diagonal block of some parameters, as an operator of its own; what it does not need is not computed.

        Derivatives are taken with respect to the tensors that the block touches only, all others being constants.

        Args:
            block: the name of a parameter tensor or of a module that owns some ("fc1", "layers.0"), or positions in the
                flat parameter vector (integers, a range, a slice, an array or tensor, a boolean mask).

        Raises:
            InputError: no such name, or positions that are not there.
        """
        space = self.objective.parameters
        if isinstance(block, str):
            names = [name for name in space.names if name == block or name.startswith(f"{block}.")]
            if not names:
                raise InputError(f"no parameter or module is named {block!r}{nearest(block, space.names)}")
            return self._of(self.objective.restricted(names))
        positions = as_positions(block, space.size)
        ends = torch.tensor(space.sizes).cumsum(0)
        touched = sorted(set(torch.searchsorted(ends, positions, right=True).tolist()))
        inner = self._of(self.objective.restricted([space.names[number] for number in touched]))
        # Positions among the touched tensors: those before each one that is left out move up.
        kept = torch.zeros(space.size, dtype=torch.bool)
        for number in touched:
            kept[space.slice(space.names[number])] = True
        moved = kept.cumsum(0)[positions] - 1
        if torch.equal(moved, torch.arange(inner.shape[0])):
            return inner
        return Restricted(inner, moved.to(self.device))

    def _of(self, objective: Objective) -> _Curvature:
        return type(self)(objective, self._asked, self._compile, self._memory)

    def products(self, V: Tensor) -> Tensor:
        """Products with all columns of V [P, K]; see the class for what is kept between calls."""
        objective = self.objective
        if V.shape[1] == 0:
            return V.clone()
        with explained(self.name, self._held):
            self._kept.renew(objective.state())
            # Recorded operations may look at how their input lies in memory.
            rows = V.T.clone(memory_format=torch.contiguous_format) if V.is_inference() else V.T.contiguous()
            if len(self._kept.maps) == objective.num_batches:
                with objective.undisturbed():  # neither the data is read nor the model run
                    total = self._added(self._kept.items(), rows)
            else:
                with objective.evaluating() as (theta, batches):
                    total = self._added(self._maps(theta, batches), rows)
            return total.T.clone() if 0 in total.stride() else total.T  # zeros may come as one zero

    def _added(self, maps: Iterator[tuple[int, LinearMap]], rows: Tensor) -> Tensor:
        """Sum over batches of the products with all rows [K, P]."""
        total: Tensor | None = None
        for index, linear in maps:
            vectorized = self._vectorizes(linear.multiply, index, rows.shape[0])
            step = self._vectorized_columns if vectorized else rows.shape[0]
            parts = [linear.multiply(chunk, vectorized) for chunk in torch.split(rows, step)]
            product = parts[0] if len(parts) == 1 else torch.cat(parts)
            # A single product may be a view, or share memory with others: nothing is added to it in place.
            total = product if total is None else total + product
            # One pass over a sum; entry by entry only if that is not finite.
            if not bool(total.sum().isfinite()) and bool(rows.isfinite().all()) and not bool(total.isfinite().all()):
                raise DataError(f"{self.name} is not finite on batch {index}")
            del linear, parts, product  # before the next one is made
        return torch.zeros_like(rows) if total is None else total

    def explain(self) -> str:
        """Which engine multiplies and why, what was timed, what is kept in memory, and what is done differently.

        The engine is settled first, if there has been no product yet.
        """
        if self._settled is None:
            self.products(torch.zeros(self.shape[0], 1, dtype=self.dtype, device=self.device))
        settled = self._settled
        lines = [f"{self.name[0].upper()}{self.name[1:]}, {self.shape[0]:,} parameters, {self.engine.split(': ')[1]}"]
        if settled is not None:
            lines[0] += f" ({settled.reason})"
            lines += [f"  {candidate}" for candidate in settled.candidates]
        for index, why in self._exceptions.items():
            lines.append(f"  batch {index}: double_backward, since {why}")
        count, number = len(self._kept.maps), self.objective.num_batches
        kept = f"{count} of {number} batches kept between products"
        lines.append(f"  memory: {kept}, {human_bytes(self._kept.bytes)} of at most {human_bytes(self._budget)}")
        if count < number:
            lines.append(
                "  the others are made anew for every product, half of their samples at a time if they can be cut"
            )
        return "\n".join([*lines, *(f"  {note}" for note in self.objective.notes)])

    @cached_property
    def _budget(self) -> int:
        """Bytes that may be kept between products."""
        return int(KEPT_SHARE * available_bytes(self.device)) if self._memory is None else int(self._memory)

    @property
    def _streams(self) -> bool:
        """Whether some batches are not kept."""
        needed = GRAPHS_HELD * self.objective.graph_bytes * self.objective.num_batches
        return self._asked == "forward_over_reverse" or needed > self._budget

    @property
    def _vectorized_columns(self) -> int:
        """How many columns one vectorized pass takes."""
        item = torch.empty(0, dtype=self.dtype).element_size()
        per_column = 2 * self.objective.graph_bytes + 2 * self.shape[0] * item
        budget = PASS_BYTES.get(self.device.type, PASS_BYTES["cuda"])
        return max(1, min(MAX_COLUMNS_PER_PASS, budget // per_column))

    def _maps(self, theta: Tensor, batches: Iterator[tuple[int, Any]]) -> Iterator[tuple[int, LinearMap]]:
        """The linear maps of all batches: those kept, and others made for the occasion."""
        for index, batch in batches:
            if index in self._kept.maps:
                linear = self._kept.maps[index]
                if linear is not None:
                    yield index, linear
            elif self._has_room():
                linear = self._made(theta, batch, index)
                self._kept.add(index, linear)
                if linear is not None:
                    yield index, linear
            else:
                yield from self._pieces(theta, batch, index)

    def _has_room(self) -> bool:
        """Whether another batch may be kept: as large as the largest, if none has been made yet."""
        held = [linear.bytes for _, linear in self._kept.items()]
        expected = max(held, default=int(GRAPHS_HELD * self.objective.graph_bytes))
        return self._asked != "forward_over_reverse" and self._kept.bytes + expected <= self._budget

    def _made(self, theta: Tensor, batch: object, index: int) -> LinearMap | None:
        matrix = self._on(batch, index)
        if self._choice is not None:
            try:
                return self._choice.build(matrix, theta, self._pair[0])
            except (HesscopeError, MemoryError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # another operation than in the first batch, without forward mode
                if self._asked != "auto" or self._compile:
                    raise
                linear = build("double_backward", matrix, theta, self._pair[0])
                if linear is not None:
                    require_symmetric(self._pair, linear.multiply(self._pair, False), self.name)
                self._exceptions[index] = " ".join(str(error).split())[:120]
                return linear
        part = cut(batch, SAMPLED)[0]
        share = 1.0 if part is batch else 1 / SAMPLED
        settled = settle(
            self._asked,
            self._compile,
            matrix,
            theta,
            self._pair,
            self.objective.graph_bytes,
            (self._on(part, index), share),
            self.name in self.objective.symmetric,
        )
        if settled is None:
            return None
        self.objective.symmetric.add(self.name)
        self._choice, linear = settled
        return linear

    def _pieces(self, theta: Tensor, batch: object, index: int) -> Iterator[tuple[int, LinearMap]]:
        """A batch that cannot be kept, a part of its samples at a time."""
        held = GRAPHS_HELD * self.objective.graph_bytes
        count = min(max(PIECES, math.ceil(held / self._budget)), MOST_PIECES) if self._budget else FOR_LITTLE
        if self._asked == "forward_over_reverse" and held <= self._budget:
            count = 1  # this engine never keeps anything, however much memory there is
        for piece in self._cut(theta, batch, index, count):
            matrix, linear = self._on(piece, index), None
            if self._streaming is not None:
                linear = self._streaming.build(matrix, theta, self._pair[0])
            else:
                engine = "double_backward" if self._asked == "auto" and not self._compile else self._asked
                known = self.name in self.objective.symmetric
                graph = self.objective.graph_bytes
                settled = settle(engine, self._compile, matrix, theta, self._pair, graph, symmetric=known)
                if settled is not None:
                    self.objective.symmetric.add(self.name)
                    choice, linear = settled
                    reason = choice.reason if self._asked == engine else "its graphs are made anew for every product"
                    self._streaming = replace(choice, reason=reason)
            if linear is not None:
                yield index, linear
            del linear

    def _cut(self, theta: Tensor, batch: object, index: int, count: int) -> list[Any]:
        """A batch as at most `count` batches that add up to it; itself if it cannot be cut."""
        return self.objective.pieces(theta, batch, index, count)

    @abstractmethod
    def _on(self, batch: object, index: int) -> Curve | Sandwich:
        """The matrix on one batch, as a function of the parameters."""

    def _vectorizes(self, multiply: Multiply, index: int, columns: int) -> bool:
        """Whether to vectorize, found once per batch against single products."""
        if columns == 1 or self._vectorized_columns == 1:
            return False
        if index not in self._vectorized:
            self._vectorized[index] = vectorizes(multiply, self._pair)
        return self._vectorized[index]

    @cached_property
    def _pair(self) -> Tensor:
        """Two random rows [2, P] to check products with."""
        return coarse((2, self.shape[0]), stream(0, "check of products")).to(self.device, self.dtype)

    def _held(self) -> str:
        """What is in memory between products, and which knob lowers it; for messages."""
        kept = f" while holding {human_bytes(self._kept.bytes)} of {len(self._kept.maps)} batches between products"
        return f"{kept}; pass a smaller memory= (bytes to be held, 0 for none), or smaller batches"


def _require_bytes(memory: Any) -> None:
    if memory is None or (isinstance(memory, Real) and memory is not True and 0 <= float(memory) < math.inf):
        return
    raise InputError(f"memory must be a number of bytes, at least 0, got {memory!r}")


def _strips(objective: Objective, network: Network, part: Part, memory: int) -> Iterator[MatrixStrip]:
    positions = network.positions().to(objective.parameters.device)
    for strip, values in mlp.strips(objective, network, part, memory):
        yield MatrixStrip(
            rows=positions[strip.rows(network)],
            columns=positions[strip.column(network) :],
            own=strip.own_columns(network),
            values=values,
        )


class Hessian(_Curvature):
    """Hessian of an Objective: [P, P].

    Graphs are kept between products as far as `memory` allows; they are made anew when the parameters have changed.

    Args:
        objective: the function of the parameters.
        engine: "double_backward" (through a retained graph of the gradient), "linearize" (recorded once, replayed for
            every vector), "forward_over_reverse" (nothing is kept), or "auto": timed on the first batch; see `explain`.
        compile: whether linearizations go through torch.compile: minutes of set-up, for many products.
        memory: bytes that may be kept between products; a quarter of what is free unless told, 0 to keep nothing.

    Raises:
        InputError: an argument does not fit.
        NoSecondDerivativeError, ModelError, DataError: at the first product, if an operation has no second derivative
            or a wrong one, or if a product is not finite. TooLargeError: memory is exhausted.
    """

    name = "the Hessian"
    kind = "hessian"

    def __sub__(self, other: Operator) -> Combination:
        both = super().__sub__(other)
        if isinstance(other, GaussNewton) and other.objective is self.objective:
            return ResidualPart(both.terms)
        return both

    def _on(self, batch: object, index: int) -> Curve:
        # Divided here, a number, and not in the product, a vector.
        terms = self.objective.num_terms
        return Curve(lambda theta: self.objective.evaluate(theta, batch, index).sum / terms, self.name)


class _OutputCurvature(_Curvature):
    """What is curved at the outputs alone: J^T M J, and needs outputs and targets."""

    def __init__(
        self, objective: Objective, engine: str = "auto", compile: bool = False, memory: int | None = None
    ) -> None:
        if isinstance(objective, Objective):
            self._loss = require_output_loss(objective, self.name)
        super().__init__(objective, engine, compile, memory)

    def _on(self, batch: object, index: int) -> Sandwich:
        targets: list[Tensor] = []

        def outputs(theta: Tensor) -> Tensor:
            found, wanted = self.objective.outputs_and_targets(theta, batch, index)
            targets[:] = [wanted]
            return found

        terms = self.objective.num_terms  # what is kept must not refer to self, which keeps it

        def middle(found: Tensor) -> Multiply:
            multiply = self._middle(found, targets[0])
            return lambda pushed, vectorized: multiply(pushed, vectorized) / terms

        return Sandwich(outputs, middle, self.name)

    @abstractmethod
    def _middle(self, outputs: Tensor, targets: Tensor) -> Multiply:
        """The map at the outputs of a batch, summed over its terms."""


class GaussNewton(_OutputCurvature):
    """Generalized Gauss-Newton matrix (1/N) sum J^T A J: [P, P]; A is the loss's Hessian at the outputs.

    Products push a vector forward through J, through A, and back. Arguments and errors as for Hessian.

    Where the logits of a batch are large (language models), cross-entropy is taken, and the model ends in an nn.Linear,
    they are made a few positions at a time: a product never holds those of a batch (see `logit_tiles`, and `explain`).

    Raises:
        InputError: the loss is a callable, so that outputs and targets are not known.
    """

    name = "the Gauss-Newton matrix"
    kind = "gauss-newton"

    def __init__(
        self, objective: Objective, engine: str = "auto", compile: bool = False, memory: int | None = None
    ) -> None:
        super().__init__(objective, engine, compile, memory)
        self._last: dict[int, LastLayer | str | None] = {}  # what makes the logits of a batch in tiles, or why nothing
        self._independent: dict[tuple[int, int], bool] = {}  # as in Objective

    @property
    def engine(self) -> str:  # type: ignore[override]
        """How products are computed, and whether logits are made in tiles."""
        tiles = any(isinstance(last, LastLayer) for last in self._last.values())
        return super().engine + (", logits in tiles" if tiles else "")

    def explain(self) -> str:
        """As for the Hessian; and whether logits are made in tiles, and why not."""
        lines = [super().explain()]
        for last in dict.fromkeys(self._last.values()):
            if isinstance(last, LastLayer):
                layer = f"{last.name or 'the model'} ({last.classes:,} classes)"
                lines.append(f"  logits, which {layer} makes, are made a few positions at a time, not held whole")
            elif last is not None:
                lines.append(f"  logits are held whole: {last}")
        return "\n".join(lines)

    def _on(self, batch: object, index: int) -> Sandwich:
        last = self._in_tiles(batch, index)
        if last is None:
            return super()._on(batch, index)
        return tiled(self.objective, last, batch, index, self.name)

    def _in_tiles(self, batch: object, index: int) -> LastLayer | None:
        """The layer whose logits on a batch, or on a part of it, are made in tiles; None if they are not."""
        if index not in self._last:
            found: LastLayer | str | None = None
            if self.objective.graph_bytes > TILED_BYTES:  # otherwise no logits can be as large as that
                found = find_last_layer(self.objective, batch, index)
            if isinstance(found, LastLayer) and found.logit_bytes(batch, index, self.dtype) <= TILED_BYTES:
                found = None
            self._last[index] = found
        last = self._last[index]
        return last if isinstance(last, LastLayer) else None

    def _cut(self, theta: Tensor, batch: object, index: int, count: int) -> list[Any]:
        last = self._in_tiles(batch, index)
        if last is None:
            return super()._cut(theta, batch, index, count)
        if (count, index) not in self._independent:
            self._independent[count, index] = samples_independent(self.objective, last, theta, batch, index, count)
        return cut(batch, count) if self._independent[count, index] else [batch]

    def _vectorizes(self, multiply: Multiply, index: int, columns: int) -> bool:
        # A product that goes through tiles has no use for several vectors at once: each fills the caches by itself.
        return not isinstance(self._last.get(index), LastLayer) and super()._vectorizes(multiply, index, columns)

    def _middle(self, outputs: Tensor, targets: Tensor) -> Multiply:
        leaf, gradient = output_gradient(self._loss, outputs, targets)
        return lambda pushed, vectorized: pull_back(gradient, leaf, pushed, vectorized)


class ResidualPart(Combination):
    """R = H - G of one objective, what `Hessian(objective) - GaussNewton(objective)` gives: [P, P].

    Products are differences of those of the two; in closed form it has its own formula, in which nothing cancels.
    """

    @property
    def dense_engine(self) -> str:
        """How `dense` is computed."""
        return "residual part: closed form" if self.has_closed_form else self.engine

    def dense(self) -> Tensor:
        """The whole matrix [P, P], exactly symmetric; see Hessian.dense."""
        hessian, network = self._source
        if network is None:
            return super().dense()
        self.require_memory_for_dense(extra_columns=self.shape[1])
        return mlp.dense(hessian.objective, network, "residual")

    def strips(self, memory: int = STRIP_MEMORY) -> Iterator[MatrixStrip]:
        """The matrix strip by strip, by formula; see Operator.strips."""
        hessian, network = self._source
        if network is None:
            return super().strips(memory)
        return _strips(hessian.objective, network, "residual", memory)

    def strip_bytes(self, memory: int = STRIP_MEMORY) -> int:
        """As of the Hessian."""
        return self._source[0].strip_bytes(memory)

    @property
    def _source(self) -> tuple[Hessian, Network | None]:
        hessian = self.terms[0][1]
        assert isinstance(hessian, Hessian)
        return hessian, hessian._network


class EmpiricalFisher(_OutputCurvature):
    """Empirical Fisher matrix (1/N) sum g g^T over the loss terms (samples, or tokens), g their gradients: [P, P].

    The term of a weighted class has its weight in g. Arguments and errors as for Hessian. What it is not: the Fisher
    information, whose labels are the model's own (for cross-entropy that is the Gauss-Newton matrix); see Kunstner et
    al., arXiv:1905.12558.

    Raises:
        InputError: the loss is a callable, so that its terms are not known.
    """

    name = "the empirical Fisher matrix"
    kind = "empirical Fisher"
    has_formula = False

    def _middle(self, outputs: Tensor, targets: Tensor) -> Multiply:
        _, gradient = output_gradient(self._loss, outputs, targets)
        e = gradient.detach()
        axes = self._loss.term_axes(outputs, targets)

        def multiply(pushed: Tensor, vectorized: bool) -> Tensor:
            along = e * pushed
            shifted = tuple(axis + 1 for axis in axes)  # the first axis of pushed counts the vectors
            return e * (along.sum(shifted, keepdim=True) if shifted else along)

        return multiply
