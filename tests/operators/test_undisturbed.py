"""A product leaves the model and the world as they were: every engine, first and later products, also when it fails."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import hesscope as hs
from hesscope.operators.engines import ENGINES
from tests.helpers import F64, cut, inputs_for, randint, randn, randomized, same, snapshot
from tests.objective.test_isolation import Untidy

N = 12
X, Y = randn(N, 4, seed=1), randint(3, N, seed=2)
MATRICES = [hs.Hessian, hs.EmpiricalFisher]


def kernels():
    """Which attention kernels PyTorch may choose, its fast path, autocast and the number of threads."""
    cuda = torch.backends.cuda
    return (
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
        torch.backends.mha.get_fastpath_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_num_threads(),
        torch.get_default_dtype(),
    )


def hooks(model):
    return {
        name: tuple(tuple(vars(module)[kind]) for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks"))
        for name, module in model.named_modules()
    }


def world(model):
    return {**snapshot(model), "kernels": kernels(), "hooks": hooks(model)}


def untidy():
    model = Untidy().double().train()
    model.norm.eval()
    model.first.weight.grad = torch.ones_like(model.first.weight)
    model.last.register_forward_hook(lambda module, args, out: None)
    return model


@pytest.mark.parametrize("memory", [None, 0], ids=["kept", "streamed"])
@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("engine", ["auto", *ENGINES])
def test_products_leave_no_trace(engine, matrix, memory):
    model = untidy()
    operator = matrix(hs.Objective(model, "cross_entropy", cut(X, Y)), engine, memory=memory)
    V = randn(operator.shape[0], 3, seed=3)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
        before, given = world(model), V.clone()
        for _ in range(2):
            _ = operator @ V
            assert same(before, world(model))
        operator.explain()
        assert same(before, world(model))
        assert torch.equal(V, given)


@pytest.mark.parametrize("memory", [None, 0], ids=["kept", "streamed"])
@pytest.mark.parametrize("engine", ["auto", *ENGINES])
@pytest.mark.parametrize("where", ["in the forward", "in a later batch", "in the product"])
def test_failing_products_leave_no_trace(where, engine, memory, monkeypatch):
    model = untidy()
    operator = hs.Hessian(hs.Objective(model, "cross_entropy", cut(X, Y)), engine, memory=memory)
    V = randn(operator.shape[0], 3, seed=3)
    if where == "in the forward":
        model.failing = True
    elif where == "in a later batch":
        calls = []
        handle = model.first.register_forward_hook(
            lambda module, args, out: fail() if calls.append(1) or len(calls) >= 3 else None
        )
    else:
        _ = operator @ V
        monkeypatch.setattr("hesscope.operators.curvature._Curvature._vectorizes", lambda *given: fail())
    before = world(model)
    with pytest.raises(hs.HesscopeError, match="told to fail"):
        _ = operator @ V
    assert same(before, world(model))
    model.failing = False
    monkeypatch.undo()
    if where == "in a later batch":
        handle.remove()
    fresh = hs.Hessian(hs.Objective(model, "cross_entropy", cut(X, Y)), "double_backward")
    assert torch.allclose(operator @ V, fresh @ V, rtol=1e-10, atol=1e-13)  # nothing half made was kept


def fail():
    random.random(), np.random.rand(), torch.rand(1)
    raise RuntimeError("told to fail")


@pytest.mark.parametrize("engine", ["auto", *ENGINES])
def test_attention_kernels_are_as_before(engine):
    """Fused kernels are switched off for the measurement alone."""
    from tests.helpers import FusedAttentionNet

    model = randomized(FusedAttentionNet()).train()
    operator = hs.Hessian(hs.Objective(model, "cross_entropy", (inputs_for("fused attention", N), Y)), engine)
    before = world(model)
    _ = operator @ torch.ones(operator.shape[0], dtype=F64)
    assert same(before, world(model))
    assert "attention runs in PyTorch's mathematical form" in operator.explain()


def test_the_instruments_see_changes():
    model = nn.Linear(4, 3)
    before = world(model)
    with sdpa_kernel(SDPBackend.MATH):
        assert not same(before, world(model))
    model.register_forward_hook(lambda module, args, out: None)
    assert not same(before, world(model))
