"""Independent truths and small tools that several tests share; nothing here calls the code under test."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

F64 = torch.float64


def randn(*shape, seed):
    """Standard normal float64 tensor from a seed."""
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def randint(high, *shape, seed):
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


def relative_error(found, truth):
    """Largest deviation, relative to the largest entry of the truth."""
    found, truth = torch.as_tensor(found, dtype=F64), torch.as_tensor(truth, dtype=F64)
    assert found.shape == truth.shape, f"shapes {tuple(found.shape)} and {tuple(truth.shape)}"
    return float((found - truth).abs().max() / truth.abs().max())


# --- models -----------------------------------------------------------------------------------------------------------


def randomized(model, seed=0, scale=0.5):
    """The model in float64 with every parameter (biases and norms, too) random and away from its default."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, dtype=F64, generator=generator))
    return model


class ConvNet(nn.Module):
    """Images [N, 1, 5, 5] -> convolution, batch norm, ReLU, pooling, linear."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.norm = nn.BatchNorm2d(2)
        self.fc = nn.Linear(8, 3)
        self.norm.running_mean.copy_(torch.tensor([0.3, -0.4]))
        self.norm.running_var.copy_(torch.tensor([2.0, 0.5]))

    def forward(self, x):
        h = functional.relu(self.norm(self.conv(x)))
        return self.fc(functional.adaptive_avg_pool2d(h, 2).flatten(1))


class AttentionNet(nn.Module):
    """Sequences [N, T, 4] -> nn.MultiheadAttention, layer norm, mean over tokens, linear."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm = nn.LayerNorm(4)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        attended, _ = self.attention(x, x, x, need_weights=False)
        return self.fc(self.norm(x + attended).mean(dim=1))


class FusedAttentionNet(nn.Module):
    """Sequences [N, T, 4] -> causal scaled_dot_product_attention; PyTorch would choose a fused kernel."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(4, 12, bias=False)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (2, 2)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.fc(attended.transpose(1, 2).flatten(2).mean(dim=1))


def sequential_mlp(widths, activation, bias):
    layers = [nn.Linear(fan_in, fan_out, bias=bias) for fan_in, fan_out in pairwise(widths)]
    parts = [part for layer in layers[:-1] for part in (layer, activation())]
    return nn.Sequential(*parts, layers[-1])


# name -> (constructor, shape of one input); all have 3 outputs.
MODELS = {
    "linear": (lambda: nn.Linear(4, 3, bias=False), (4,)),
    "relu": (lambda: sequential_mlp((4, 5, 3), nn.ReLU, bias=False), (4,)),
    "relu, bias": (lambda: sequential_mlp((4, 5, 4, 3), nn.ReLU, bias=True), (4,)),
    "tanh": (lambda: sequential_mlp((4, 5, 4, 3), nn.Tanh, bias=False), (4,)),
    "gelu, bias": (lambda: sequential_mlp((4, 5, 3), nn.GELU, bias=True), (4,)),
    "conv, batch norm": (ConvNet, (1, 5, 5)),
    "attention module": (AttentionNet, (3, 4)),
    "fused attention": (FusedAttentionNet, (3, 4)),
}


def build(name, seed=0):
    """The named model, random in float64 and in eval mode."""
    return randomized(MODELS[name][0](), seed).eval()


def inputs_for(name, N, seed=1):
    return randn(N, *MODELS[name][1], seed=seed)


# --- data -------------------------------------------------------------------------------------------------------------

CUT = (1, 4, 2, 3, 2)  # 5 unequal batches of 12 samples; the third is the one that some cases ignore
IGNORED = slice(5, 7)


def cut(x, y, sizes=CUT):
    """The samples as a list of unequal batches."""
    return list(zip(torch.split(x, list(sizes)), torch.split(y, list(sizes)), strict=True))


# --- truths -----------------------------------------------------------------------------------------------------------


def flat_parameters(model):
    """The trainable parameters as one vector, in named_parameters() order."""
    return torch.cat([p.detach().reshape(-1) for _, p in model.named_parameters() if p.requires_grad])


def call_flat(model, theta, x):
    """Outputs of the model at the flat parameters theta, through PyTorch's own functional call."""
    swapped, start = {}, 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            swapped[name] = theta[start : start + parameter.numel()].view(parameter.shape)
            start += parameter.numel()
    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.functional_call(model, swapped, (x,))


def reference_hessian(model, criterion, x, y):
    """Hessian of criterion(model(x), y), a loss with PyTorch's own mean over all samples at once."""
    return torch.autograd.functional.hessian(
        lambda theta: criterion(call_flat(model, theta, x), y), flat_parameters(model)
    )


def reference_gauss_newton(model, criterion, x, y):
    """J^T A J from the dense Jacobian of all outputs and the dense Hessian of the mean loss with respect to them."""
    theta = flat_parameters(model)
    outputs = call_flat(model, theta, x).detach()
    jacobian = torch.func.jacrev(lambda t: call_flat(model, t, x))(theta).reshape(outputs.numel(), -1)
    A = torch.autograd.functional.hessian(lambda o: criterion(o.view_as(outputs), y), outputs.reshape(-1))
    return jacobian.T @ A @ jacobian


def softmax(o):
    p = np.exp(o - o.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True)


def residual_and_curvature(loss, outputs, y):
    """e [N, C] and A [N, C, C] of MATH.md section 1, without autodiff; y holds labels (CE) or targets (MSE)."""
    C = outputs.shape[1]
    if loss == "cross_entropy":
        p = softmax(outputs)
        return p - np.eye(C)[y], np.einsum("nc,cd->ncd", p, np.eye(C)) - np.einsum("nc,nd->ncd", p, p)
    return 2 * (outputs - y) / C, np.broadcast_to(2 / C * np.eye(C), (len(y), C, C))


def linear_hessian(V, X, y, loss):
    """MATH.md section 2, linear model: H_ij = (1/N) sum_n A_n[i, j] x_n x_n^T, as a [C d, C d] array."""
    _, A = residual_and_curvature(loss, X @ V.T, y)
    return np.einsum("nij,na,nb->iajb", A, X, X).reshape(V.size, V.size) / len(X)


ACTIVATION_DERIVATIVES = {
    "relu": (lambda z: np.maximum(z, 0), lambda z: (z > 0).astype(float), np.zeros_like),
    "tanh": (np.tanh, lambda z: 1 - np.tanh(z) ** 2, lambda z: -2 * np.tanh(z) * (1 - np.tanh(z) ** 2)),
}


@dataclass(frozen=True)
class OneHiddenBlocks:
    """Blocks of G and R of o = V s(W x), order (w, v): ww [m d, m d], vv [C m, C m], wv [m d, C m]."""

    G_ww: np.ndarray
    G_vv: np.ndarray
    G_wv: np.ndarray
    R_ww: np.ndarray
    R_vv: np.ndarray
    R_wv: np.ndarray


def one_hidden_blocks(W, V, X, y, activation, loss):
    """MATH.md section 2, one hidden layer, term by term with einsum."""
    value, first, second = ACTIVATION_DERIVATIVES[activation]
    (m, d), C, N = W.shape, V.shape[0], len(X)
    z = X @ W.T
    h, s1, s2 = value(z), first(z), second(z)
    e, A = residual_and_curvature(loss, h @ V.T, y)
    VAV, AV, Ve = np.einsum("ci,ncd,dj->nij", V, A, V), np.einsum("nac,ci->nai", A, V), e @ V
    G_ww = np.einsum("nij,ni,nj,nx,ny->ixjy", VAV, s1, s1, X, X)
    R_ww = np.einsum("ij,ni,ni,nx,ny->ixjy", np.eye(m), Ve, s2, X, X)
    G_vv = np.einsum("nab,ni,nj->aibj", A, h, h)
    G_wv = np.einsum("ni,nai,nx,nj->ixaj", s1, AV, X, h)
    R_wv = np.einsum("ni,na,nx,ij->ixaj", s1, e, X, np.eye(m))
    return OneHiddenBlocks(
        G_ww=G_ww.reshape(m * d, m * d) / N,
        G_vv=G_vv.reshape(C * m, C * m) / N,
        G_wv=G_wv.reshape(m * d, C * m) / N,
        R_ww=R_ww.reshape(m * d, m * d) / N,
        R_vv=np.zeros((C * m, C * m)),
        R_wv=R_wv.reshape(m * d, C * m) / N,
    )


# --- statistics -------------------------------------------------------------------------------------------------------

PLANTED_BIAS = 0.03


def check_unbiased(estimates, stderrs, exact):
    """DESIGN.md's rule for an estimator, from R independent replicates.

    |z| < 4 against the exact value; the reported standard error (root mean square) within 25 % of the empirical one;
    and R large enough that a bias of 3 % would have |z| = 7 on average, so that it fails this very test (|z| >= 4) in
    999 of 1000 runs.

    Args:
        estimates, stderrs: [R, ...]; exact: [...], nowhere zero.
    """
    estimates, stderrs, exact = np.asarray(estimates), np.asarray(stderrs), np.asarray(exact)
    empirical = estimates.std(axis=0, ddof=1)
    error_of_mean = empirical / np.sqrt(len(estimates))
    power = np.min(PLANTED_BIAS * np.abs(exact) / error_of_mean)
    assert power > 7, f"too few replicates: a bias of 3 % would only have |z| = {power:.1f}"
    worst = np.max(np.abs(estimates.mean(axis=0) - exact) / error_of_mean)
    assert worst < 4, f"biased: |z| = {worst:.1f}"
    check_stderr(estimates, stderrs)


def check_stderr(estimates, stderrs):
    """The reported standard errors [R, ...] are within 25 % of the standard deviation of the estimates [R, ...]."""
    reported = np.sqrt(np.mean(np.square(stderrs), axis=0))
    ratio = reported / np.asarray(estimates).std(axis=0, ddof=1)
    assert np.all((ratio > 0.75) & (ratio < 1.25)), (
        f"reported / empirical standard error between {ratio.min()} and {ratio.max()}"
    )


# --- side effects -----------------------------------------------------------------------------------------------------


def snapshot(model):
    """Everything a measurement must leave alone: modes, parameters, gradients, buffers, global random states."""
    return {
        "modes": {name: module.training for name, module in model.named_modules()},
        "parameters": {name: (id(p), p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()},
        "gradients": {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
        "buffers": {name: (id(b), b.clone()) for name, b in model.named_buffers()},
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
        "torch": torch.get_rng_state(),
        "grad mode": torch.is_grad_enabled(),
    }


def same(a, b):
    """Deep equality of nested dicts, tuples, tensors, arrays and plain values."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and np.array_equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


class OnceSquare(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 2 * x * gradient
