"""A linear map recorded as a program: run once on one vector, replayed on any other without what does not depend on it.

`torch.func.linearize` does the same through a general tracer, and takes ten times longer to do so (measured: 5 to 9 s
for a GPT of four layers, of which one product takes 0.15 s). Here the map runs as it always does, and every operation
that touches something that depends on the vector is written down; all else is a constant.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hesscope.operators.fusion import FUNCTIONAL, fuse
from hesscope.operators.second_derivatives import agree
from hesscope.operators.tape import Tape, Value, kind_of

aten = torch.ops.aten

# A view fixes how its input lies in memory; a replay may have it otherwise (vmap, channels last), so it reshapes.
RESHAPED = {aten.view.default: aten.reshape.default, aten._unsafe_view.default: aten.reshape.default}
# Convolutions over images, which oneDNN does faster with the channels last in memory.
IMAGE_AXES = 4
# Where a tensor remembers its value on a tape. An attribute goes with the tensor, and is found ten times faster than in
# a dictionary of weak references.
MARK = "_hesscope_value"
NO_TENSOR = aten._efficientzerotensor.default


@dataclass(frozen=True)
class Linearization:
    """A linear map [P] -> [P] as a tape, and as the function that replays it."""

    tape: Tape
    replay: Callable[[Tensor], Tensor]

    @cached_property
    def replay_rows(self) -> Callable[[Tensor], Tensor]:
        """The same for rows [K, P] at once."""
        return torch.func.vmap(self.tape.program(FUNCTIONAL))

    def storages(self) -> dict[int, int]:
        """Memory of the constants: address of each storage -> its bytes."""
        found = (
            value.constant.untyped_storage() for value in self.tape.constants.values() if value.constant is not None
        )
        return {storage.data_ptr(): storage.nbytes() for storage in found}


def record(linear: Callable[[Tensor], Tensor], v: Tensor) -> tuple[Linearization, Tensor] | None:
    """The linear map as a program, and what it made of `v` meanwhile, [P]; None if it is zero.

    Args:
        linear: the map, [P] -> [P]; that it depends on its argument linearly is not checked.
        v: [P] any vector.

    Raises:
        RuntimeError: the result does not depend on v through operations that can be seen, or is another one when it is
            replayed.
    """
    v = v.clone()  # no tensor of the caller's is marked
    recorder = _Recorder(v)
    with recorder:
        result = linear(v)
    recorder.tape.result = recorder.value(result)
    if recorder.tape.result.operation is None:
        if bool((result == 0).all()):
            return None
        raise RuntimeError("the result does not depend on the vector")
    recorder.tape.drop_unused()
    fuse(recorder.tape)
    found = _finished(recorder.tape)
    with torch.no_grad():
        # Of another vector: what was frozen at v would go unnoticed there. What is not finite is told by the product.
        if bool(result.isfinite().all()) and not agree(found.replay(-v), -result):
            raise RuntimeError("replaying the recorded operations gives another product")
    return found, result


def channels_last(found: Linearization) -> Linearization | None:
    """The same map with all images among its constants laid out with their channels last; None without convolutions."""
    if not any(value.operation is aten.convolution.default for value in found.tape.values):
        return None
    copies: dict[tuple[Any, ...], Tensor] = {}

    def last(constant: Tensor) -> Tensor:
        if constant.ndim != IMAGE_AXES or not constant.is_contiguous():
            return constant
        place = (constant.data_ptr(), constant.shape, constant.dtype)  # one tensor may be several constants
        if place not in copies:
            copies[place] = constant.contiguous(memory_format=torch.channels_last)
        return copies[place]

    return _finished(found.tape.with_constants(last))


def _finished(tape: Tape) -> Linearization:
    tape.forget_users()
    return Linearization(tape, tape.program())


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down every operation on tensors that depend on `v`."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here; PyTorch's guard against it would cost a tenth of the recording

    def __init__(self, v: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tape = Tape()
        self.tape.input.kind = kind_of(v)
        setattr(v, MARK, self.tape.input)
        self._constants: dict[int, Value] = {}
        self._held: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is NO_TENSOR:
            # Zeros without memory stand for tangents that are not there. Operations on them, called from here, have
            # ended the process (PyTorch 2.13, aten.mul.Scalar).
            return torch.zeros(*args, **kwargs)
        result = func(*args, **kwargs)
        if not (_depends(args) or (kwargs and _depends(tuple(kwargs.values())))):
            return result
        inputs = tuple(map(self.value, args))
        keywords = {name: self.value(argument) for name, argument in kwargs.items()}
        made = self.tape.add(None, RESHAPED.get(func, func), inputs, keywords)
        if made.writes:
            for argument, given in zip(func._schema.arguments, args, strict=False):
                if argument.is_write and isinstance(given, Tensor):
                    setattr(given, MARK, made)
        if isinstance(result, Tensor):
            made.kind = kind_of(result)
            setattr(result, MARK, made)
        elif isinstance(result, (tuple, list)):
            for place, part in enumerate(result):
                if isinstance(part, Tensor):
                    setattr(part, MARK, self.tape.add(kind_of(part), operator.getitem, (made, place), {}))
        return result

    def value(self, argument: Any) -> Any:
        """An argument on the tape: tensors by their values; one that does not depend on v is a constant."""
        if isinstance(argument, (list, tuple)):
            return [self.value(each) for each in argument]
        if not isinstance(argument, Tensor):
            return argument
        found = getattr(argument, MARK, None)
        if found is None:
            found = self._constants.get(id(argument))
        if found is None:
            # Held, so that no other tensor gets its identity; the constant itself must not hold a graph.
            self._held.append(argument)
            found = self._constants[id(argument)] = Value(kind_of(argument), constant=argument.detach())
        return found


def _depends(arguments: Any) -> bool:
    """Whether an argument, a tensor or a list of them, depends on v."""
    for argument in arguments:
        if isinstance(argument, Tensor):
            if hasattr(argument, MARK):
                return True
        elif isinstance(argument, (list, tuple)) and _depends(argument):
            return True
    return False
