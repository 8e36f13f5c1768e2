"""A linear map recorded as a graph: run once on one vector, replayed on any other without what does not depend on it.

`torch.func.linearize` does the same through a general tracer, and takes ten times longer to do so (measured: 5 to 9 s
for a GPT of four layers, of which one product takes 0.15 s). Here the map runs as it always does, and every operation
that touches something that depends on the vector is written down; all else is a constant of the graph. The replay is a
straight Python function of these operations, whose results are freed as soon as they are not needed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary, WeakTensorKeyDictionary

from hesscope.operators.fusion import drop_unused, fused
from hesscope.operators.second_derivatives import agree

aten = torch.ops.aten

# A view fixes how its input lies in memory; a replay may have it otherwise (vmap, channels last), so it reshapes.
RESHAPED = {aten.view.default: aten.reshape.default, aten._unsafe_view.default: aten.reshape.default}
# Convolutions over images, which oneDNN does faster with the channels last in memory.
IMAGE_AXES = 4


def record(linear: Callable[[Tensor], Tensor], v: Tensor) -> fx.GraphModule:
    """The linear map as a graph of its own: [P] -> [P].

    Args:
        linear: the map; operations inside must not depend on v other than linearly, which is not checked here.
        v: [P] any vector.

    Raises:
        RuntimeError: the map's result does not depend on v through operations that can be seen, or is another one when
            it is replayed.
    """
    recorder = _Recorder(v)
    with recorder:
        result = linear(v)
    if result not in recorder.nodes:
        raise RuntimeError("the result does not depend on the vector")
    recorder.graph.output(recorder.nodes[result])
    drop_unused(recorder.graph)
    graph = fused(fx.GraphModule(recorder.constants, recorder.graph))
    with torch.no_grad():
        if not agree(graph(v), result):
            raise RuntimeError("replaying the recorded operations gives another product")
    return graph


def channels_last(graph: fx.GraphModule) -> fx.GraphModule | None:
    """The same map with all images among its constants laid out with their channels last; None without convolutions."""
    if not any(node.target is aten.convolution.default for node in graph.graph.nodes):
        return None
    constants = nn.Module()
    for name, constant in graph.named_buffers():
        last = constant.ndim == IMAGE_AXES and constant.is_contiguous()
        constants.register_buffer(name, constant.contiguous(memory_format=torch.channels_last) if last else constant)
    return fx.GraphModule(constants, graph.graph)


def constant_storages(graph: fx.GraphModule) -> dict[int, int]:
    """Memory of the graph's constants: address of each storage -> its bytes."""
    storages = [constant.untyped_storage() for constant in graph.buffers()]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down every operation on tensors that depend on `v`.

    Tensors are held weakly, so that recording takes no more memory than running.
    """

    def __init__(self, v: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph = fx.Graph()
        self.constants = nn.Module()
        self.nodes: WeakIdKeyDictionary = WeakTensorKeyDictionary()
        self.nodes[v] = self.graph.placeholder("v")
        self._fetched: WeakIdKeyDictionary = WeakTensorKeyDictionary()
        self._count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not (any(map(self._depends, args)) or any(map(self._depends, kwargs.values()))):
            return result
        inputs = tuple(map(self._node, args))
        node_kwargs = {name: self._node(value) for name, value in kwargs.items()}
        node = self.graph.call_function(RESHAPED.get(func, func), inputs, node_kwargs)
        for argument, given in zip(func._schema.arguments, args, strict=False):
            if argument.is_write and isinstance(given, Tensor):
                self.nodes[given] = node
        if isinstance(result, Tensor):
            self._follow(result, node)
        elif isinstance(result, (tuple, list)):
            for place, part in enumerate(result):
                if isinstance(part, Tensor):
                    self._follow(part, self.graph.call_function(operator.getitem, (node, place)))
        return result

    def _follow(self, tensor: Tensor, node: fx.Node) -> None:
        self.nodes[tensor] = node
        node.meta["kind"] = _kind(tensor)

    def _depends(self, value: Any) -> bool:
        """Whether an argument, a tensor or a list of them, depends on v."""
        if isinstance(value, Tensor):
            return value in self.nodes
        return isinstance(value, (list, tuple)) and any(map(self._depends, value))

    def _node(self, value: Any) -> Any:
        """An argument in the graph: a tensor's node, which fetches a constant if it does not depend on v."""
        if isinstance(value, (list, tuple)):
            return [self._node(entry) for entry in value]
        if not isinstance(value, Tensor):
            return value
        if value in self.nodes:
            return self.nodes[value]
        if value not in self._fetched:
            name = f"constant_{self._count}"
            self._count += 1
            self.constants.register_buffer(name, value.detach())
            self._fetched[value] = self.graph.get_attr(name)
            self._fetched[value].meta["kind"] = _kind(value)
        return self._fetched[value]


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.dtype, tensor.device, tensor.layout
