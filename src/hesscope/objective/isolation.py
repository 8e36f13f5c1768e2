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

Result = TypeVar("Result")


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


def call_with(model: nn.Module, parameters: Mapping[str, Tensor], function: Callable[[nn.Module], Result]) -> Result:
    """`function(model)` with these parameters in place of the model's, and with copies of its buffers.

    Tied parameters follow the one given; a forward that writes to its buffers writes to the copies.
    """
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    swapped = {f"model.{name}": tensor for name, tensor in {**parameters, **buffers}.items()}
    result: Result = torch.func.functional_call(_Caller(model), swapped, (function,))
    return result
