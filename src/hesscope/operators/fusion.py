"""Fewer passes over memory: a recorded linear map with its sums fused into products, and temporaries used again.

A derivative of a derivative is mostly sums of two products, written by PyTorch's formulas as three operations with a
fresh tensor each; on a CPU such passes cost as much as the matrix products between them. The rewritten map is the same
but for rounding.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

# fx.Node; its arguments may be anything, as far as types go, which would have to be asserted at every step.
Node = Any

# Elementwise operations and their forms that write to the first argument.
IN_PLACE = {
    aten.add.Tensor: aten.add_.Tensor,
    aten.sub.Tensor: aten.sub_.Tensor,
    aten.mul.Tensor: aten.mul_.Tensor,
    aten.mul.Scalar: aten.mul_.Scalar,
    aten.div.Tensor: aten.div_.Tensor,
    aten.div.Scalar: aten.div_.Scalar,
    aten.addcmul.default: aten.addcmul_.default,
    aten.addmm.default: aten.addmm_.default,
}
COMMUTATIVE = {aten.add.Tensor, aten.mul.Tensor}


def fused(graph: fx.GraphModule) -> fx.GraphModule:
    """The same linear map in fewer passes; `graph` itself is not changed.

    Nodes that are tensors have their `kind` (see linearization) among their meta data.
    """
    copy = fx.Graph()
    copy.output(copy.graph_copy(graph.graph, {}))
    for rewrite in (_drop_copy, _drop_zeros, _fuse_sum, _write_in_place):
        for node in list(copy.nodes):
            if node.op == "call_function" and (node.users or _writes(node)):
                rewrite(copy, node)
        drop_unused(copy)
    return fx.GraphModule(graph, copy)


def drop_unused(graph: fx.Graph) -> None:
    """Take out every operation whose result nobody needs, unless it writes to a tensor."""
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output") or _writes(node))


def _drop_copy(graph: fx.Graph, node: Node) -> None:
    """A conversion to what a tensor already is copies for nothing, unless someone writes to the copy."""
    if node.target is aten._to_copy.default and _alike(node.args[0], node) and not _is_written(node):
        node.replace_all_uses_with(node.args[0])
        graph.erase_node(node)


def _drop_zeros(graph: fx.Graph, node: Node) -> None:
    """Zeros that are added: piecewise linear activations have a second derivative that is nothing but that."""
    if node.target is aten.add.Tensor and not node.kwargs and len(node.args) == 2:
        for kept, zeros in (node.args, node.args[::-1]):
            if getattr(zeros, "target", None) is aten.zeros_like.default and _alike(kept, node) and _alike(zeros, node):
                if not (_is_written(node) or _is_written(zeros)):
                    node.replace_all_uses_with(kept)
                    graph.erase_node(node)
                return


def _fuse_sum(graph: fx.Graph, node: Node) -> None:
    """One operation for a + b * c, and for A + B @ C."""
    if node.target not in (aten.add.Tensor, aten.sub.Tensor) or node.kwargs or len(node.args) != 2:
        return
    left, right = node.args
    sign = -1 if node.target is aten.sub.Tensor else 1
    pairs = [(left, right), (right, left)] if sign == 1 else [(left, right)]
    for base, product in pairs:
        if not (_alike(base, node) and _alike(product, node) and len(product.users) == 1):
            continue
        if product.target is aten.mul.Tensor and all(isinstance(each, fx.Node) for each in product.args):
            _replace(graph, node, aten.addcmul.default, (base, *product.args), {"value": sign})
        elif product.target is aten.mm.default:
            _replace(graph, node, aten.addmm.default, (base, *product.args), {"alpha": sign})
        elif _is_reshaped_product(product) and _is_reshape(base) and len(base.users) == 1 and sign == 1:
            _add_before_reshaping(graph, node, base, product)
        else:
            continue
        return


def _add_before_reshaping(graph: fx.Graph, node: Node, base: Node, product: Node) -> None:
    """reshape(A) + reshape(B @ C) as reshape(A + B @ C), if A has the shape of the product."""
    matrix, inner = product.args[0], base.args[0]
    if not _alike(inner, matrix):
        return
    with graph.inserting_before(node):
        total = graph.call_function(aten.addmm.default, (inner, *matrix.args))
        total.meta.update(matrix.meta)
    _replace(graph, node, aten.reshape.default, (total, list(node.meta["kind"][0])), {})


def _write_in_place(graph: fx.Graph, node: Node) -> None:
    """An elementwise operation writes to an argument that is its own tensor and that nobody else needs."""
    if node.target not in IN_PLACE:
        return
    places = (0, 1) if node.target in COMMUTATIVE and not node.kwargs else (0,)
    for place in places:
        temporary = node.args[place]
        if _alike(temporary, node) and len(temporary.users) == 1 and _owns(temporary):
            if node.args.count(temporary) > 1:
                continue
            others = [argument for index, argument in enumerate(node.args) if index != place]
            node.args = (temporary, *others)
            node.target = IN_PLACE[node.target]
            return


def _owns(node: Node) -> bool:
    """Whether the node's tensor is new: neither an input, a constant nor a view."""
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        return _owns(node.args[0])
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    if node.target in IN_PLACE.values():
        return True  # it wrote to a tensor that was its own
    return all(result.alias_info is None for result in node.target._schema.returns)


def _writes(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and bool(node.target._schema.is_mutable)


def _is_written(node: Node) -> bool:
    """Whether an operation writes to the node's tensor, or to a view of it."""
    return any(
        _writes(user) or user.target is operator.getitem or (_is_view(user) and _is_written(user))
        for user in node.users
    )


def _is_view(node: Node) -> bool:
    overload = isinstance(node.target, torch._ops.OpOverload)
    return overload and any(result.alias_info is not None for result in node.target._schema.returns)


def _is_reshape(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is aten.reshape.default


def _is_reshaped_product(node: Node) -> bool:
    return _is_reshape(node) and node.args[0].target is aten.mm.default and len(node.args[0].users) == 1


def _alike(node: Any, other: Node) -> bool:
    """Whether two nodes are tensors of one kind: shape, dtype, device and layout."""
    return isinstance(node, fx.Node) and "kind" in node.meta and node.meta["kind"] == other.meta.get("kind")


def _replace(
    graph: fx.Graph, node: Node, target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Put another operation in the node's place."""
    with graph.inserting_before(node):
        new = graph.call_function(target, args, kwargs)
        new.meta.update(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
