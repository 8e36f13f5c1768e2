"""Fewer passes over memory: a recorded linear map with its sums fused into products, and temporaries used again.

A derivative of a derivative is mostly sums of two products, written by PyTorch's formulas as three operations with a
fresh tensor each; on a CPU such passes cost as much as the matrix products between them. The rewritten map is the same
but for rounding.
"""

from __future__ import annotations

import operator
from typing import Any

import torch

from hesscope.operators.tape import Tape, Value

aten = torch.ops.aten

# Elementwise operations and their forms that write to the first argument.
IN_PLACE: dict[Any, Any] = {
    aten.add.Tensor: aten.add_.Tensor,
    aten.sub.Tensor: aten.sub_.Tensor,
    aten.mul.Tensor: aten.mul_.Tensor,
    aten.mul.Scalar: aten.mul_.Scalar,
    aten.div.Tensor: aten.div_.Tensor,
    aten.div.Scalar: aten.div_.Scalar,
    aten.addcmul.default: aten.addcmul_.default,
    aten.addmm.default: aten.addmm_.default,
}
# Without writing, for vmap, which cannot batch writing to what it has not batched, and has no rules for these two.
FUNCTIONAL: dict[Any, Any] = {written: plain for plain, written in IN_PLACE.items()} | {
    aten.addcmul_.default: lambda base, left, right, value=1: base + value * (left * right),
    aten.addmm_.default: lambda base, left, right, alpha=1: base + alpha * (left @ right),
}
FUNCTIONAL |= {
    aten.addcmul.default: FUNCTIONAL[aten.addcmul_.default],
    aten.addmm.default: FUNCTIONAL[aten.addmm_.default],
}
# Views whose schema does not say so.
UNANNOUNCED = {aten.unsafe_split.Tensor, aten.unsafe_split_with_sizes.default}
COMMUTATIVE = {aten.add.Tensor, aten.mul.Tensor}


def fuse(tape: Tape) -> None:
    """Rewrite the program in fewer passes.

    Where the program itself writes to memory, the order of reading and writing counts: such values, and what reads
    them, are left as they are.
    """
    written = _written_memory(tape)
    for rewrite, operations in REWRITES.items():
        for value in [each for each in tape.values if each.operation in operations]:
            near = [value, *value.sources, *(source for each in value.sources for source in each.sources)]
            if (value.users or value is tape.result) and not any(id(each) in written for each in near):
                rewrite(tape, value)
        tape.drop_unused()


def _written_memory(tape: Tape) -> set[int]:
    """Identities of the values that share memory with one that the program writes to."""
    owner: dict[int, int] = {}
    for value in tape.values:
        first = next(iter(value.sources), None) if value.is_view or value.operation in UNANNOUNCED else None
        owner[id(value)] = id(value) if first is None else owner.get(id(first), id(first))
    written = {owner[id(value)] for value in tape.values if value.writes}
    return written | {id(value) for value in tape.values if owner[id(value)] in written}


def _drop_copy(tape: Tape, value: Value) -> None:
    """A conversion to what a tensor already is copies for nothing, unless someone writes to the copy."""
    if _alike(value.args[0], value) and not _is_written(value):
        tape.substitute(value, value.args[0])


def _drop_zeros(tape: Tape, value: Value) -> None:
    """Zeros that are added: piecewise linear activations have a second derivative that is nothing but that."""
    if value.kwargs or _is_written(value):
        return
    for kept, zeros in (value.args, value.args[::-1]):
        made_zero = isinstance(zeros, Value) and zeros.operation is aten.zeros_like.default and not _is_written(zeros)
        if made_zero and _alike(kept, value) and _alike(zeros, value):
            tape.substitute(value, kept)
            return


def _fuse_sum(tape: Tape, value: Value) -> None:
    """One operation for a + b * c, and for A + B @ C."""
    if value.kwargs:
        return
    left, right = value.args
    sign = -1 if value.operation is aten.sub.Tensor else 1
    for base, product in ((left, right), (right, left))[: 2 if sign == 1 else 1]:
        if not (_alike(base, value) and _alike(product, value) and len(product.users) == 1):
            continue
        if product.operation is aten.mul.Tensor and all(isinstance(each, Value) for each in product.args):
            tape.change(value, aten.addcmul.default, (base, *product.args), {"value": sign})
        elif product.operation is aten.mm.default:
            tape.change(value, aten.addmm.default, (base, *product.args), {"alpha": sign})
        elif sign == 1 and _can_add_before_reshaping(tape, base, product):
            # The product's own place in the program becomes that of the sum, which all arguments must precede.
            matrix, inner = product.args[0], base.args[0]
            tape.change(matrix, aten.addmm.default, (inner, *matrix.args), {})
            tape.change(value, aten.reshape.default, (matrix, list(value.kind[0])), {})  # type: ignore[index]
        else:
            continue
        return


def _can_add_before_reshaping(tape: Tape, base: Value, product: Value) -> bool:
    """Whether reshape(A) + reshape(B @ C) is reshape(A + B @ C), with A known when the product is made."""
    if not (base.operation is product.operation is aten.reshape.default and len(base.users) == 1):
        return False
    inner, matrix = base.args[0], product.args[0]
    is_product = matrix.operation is aten.mm.default and len(matrix.users) == 1
    return is_product and _alike(inner, matrix) and tape.precedes(inner, matrix)


def _write_in_place(tape: Tape, value: Value) -> None:
    """An elementwise operation writes to an argument that is its own tensor and that nobody else needs."""
    for place in (0, 1) if value.operation in COMMUTATIVE and not value.kwargs else (0,):
        temporary = value.args[place]
        if _alike(temporary, value) and len(temporary.users) == 1 and _owns(temporary) and temporary is not tape.result:
            others = [argument for index, argument in enumerate(value.args) if index != place]
            tape.change(value, IN_PLACE[value.operation], (temporary, *others), value.kwargs)
            value.in_place = True
            return


def _owns(value: Value) -> bool:
    """Whether the value's tensor is new: neither the input, a constant nor a view."""
    if value.operation is operator.getitem:
        return value.args[0].operation not in UNANNOUNCED and _owns(value.args[0])
    # What we wrote in place, was written to a tensor that was its own.
    return value.operation is not None and (not value.is_view or value.in_place)


def _is_written(value: Value) -> bool:
    """Whether an operation writes to the value's tensor, or to a view of it."""
    return any(user.writes or (user.is_view and _is_written(user)) for user in value.users)


def _alike(value: object, other: Value) -> bool:
    """Whether two values are tensors of one kind."""
    return isinstance(value, Value) and value.kind is not None and value.kind == other.kind


# Each with the operations it is tried on, in this order.
REWRITES = {
    _drop_copy: {aten._to_copy.default},
    _drop_zeros: {aten.add.Tensor},
    _fuse_sum: {aten.add.Tensor, aten.sub.Tensor},
    _write_in_place: set(IN_PLACE),
}
