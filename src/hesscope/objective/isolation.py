"""Measuring a model without leaving a trace: mode, buffers, gradients and random states are as before afterwards."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

Result = TypeVar("Result")

# Ways to convert a tensor: without an argument, and to what another tensor is.
NARROWING = {Tensor.float: torch.float32, Tensor.half: torch.float16, Tensor.bfloat16: torch.bfloat16}
CONVERSIONS = (Tensor.to, Tensor.type_as)


@contextmanager
def isolated(model: nn.Module) -> Iterator[None]:
    """Run the body in eval mode with autograd on; afterwards, also after an exception, everything is as it was.

    Fused attention kernels have no second derivative, so attention runs through PyTorch's mathematical form here; and
    the parameters' dtype is kept, whatever autocast says outside.
    """
    modes = [(module, module.training, dict(module._buffers)) for module in model.modules()]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        with (
            _random_states_kept(),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
            torch.autocast("cuda", enabled=False) if torch.cuda.is_available() else nullcontext(),
            sdpa_kernel(SDPBackend.MATH),
        ):
            torch.backends.mha.set_fastpath_enabled(False)
            model.eval()
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for module, training, buffers in modes:
            module.training = training
            module._buffers.update(buffers)


@contextmanager
def _random_states_kept() -> Iterator[None]:
    on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    gpus = torch.cuda.get_rng_state_all() if on_gpu else []
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if on_gpu:
            torch.cuda.set_rng_state_all(gpus)


class _Caller(nn.Module):
    """Gives `functional_call` something with a forward, so that any function of the model can be called."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[nn.Module], Any]) -> Any:
        return function(self.model)


def call_with(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    function: Callable[[nn.Module], Result],
    dtype: torch.dtype | None = None,
) -> Result:
    """`function(model)` with these parameters in place of the model's, and with copies of its buffers.

    Parameters that are not given are constants. Tied parameters follow the one given; a forward that writes to its
    buffers writes to the copies. With a `dtype`, constants and buffers that are floating-point are converted to it.
    """

    def converted(tensor: Tensor) -> Tensor:
        return tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)

    fixed = {name: converted(p.detach()) for name, p in model.named_parameters() if name not in parameters}
    buffers = {name: converted(buffer.clone()) for name, buffer in model.named_buffers()}
    swapped = {f"model.{name}": tensor for name, tensor in {**parameters, **fixed, **buffers}.items()}
    result: Result = torch.func.functional_call(_Caller(model), swapped, (function,))
    return result


class ForwardWatch(TorchFunctionMode):
    """Stands behind every call of PyTorch in a forward pass: keeps its precision, and notices attention.

    Some models round inside, whatever their parameters are (Llama's norms to float32): in float64 their curvature would
    have seven digits, and not be symmetric beyond.

    Attributes:
        attends: whether scaled dot-product attention was called; rounded: whether something was kept from rounding.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.attends = False
        self.rounded = False
        self._narrower = {d for d in (torch.float32, torch.float16, torch.bfloat16) if d.itemsize < dtype.itemsize}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The call, without a conversion to a narrower dtype."""
        self.attends |= func is torch.nn.functional.scaled_dot_product_attention
        kwargs = kwargs or {}
        # Constants (Llama's rotary angles) are left as they are: what is measured is the user's function.
        if args and isinstance(args[0], Tensor) and args[0].dtype == self.dtype and args[0].requires_grad:
            if func in NARROWING and NARROWING[func] in self._narrower:
                self.rounded = True
                return args[0]
            args = (args[0], *(self._kept(arg, func) for arg in args[1:]))
            kwargs = {name: self._kept(value, func) for name, value in kwargs.items()}
        return func(*args, **kwargs)

    def _kept(self, argument: Any, func: Any) -> Any:
        """The argument, if it is not a narrower dtype or, of a conversion, a tensor of such."""
        if isinstance(argument, torch.dtype) and argument in self._narrower:
            self.rounded = True
            return self.dtype
        if func in CONVERSIONS and isinstance(argument, Tensor) and argument.dtype in self._narrower:
            self.rounded = True
            return argument.to(self.dtype)
        return argument
