"""Tied, frozen and unused parameters; operations that cannot be differentiated twice, or not in a vectorized way."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

import hesscope as hs
from hesscope.core.errors import InputError, ModelError, NoSecondDerivativeError
from tests.helpers import (
    F64,
    OnceSquare,
    inputs_for,
    randint,
    randn,
    randomized,
    reference_gauss_newton,
    reference_hessian,
    relative_error,
)

N = 12
X, Y = randn(N, 4, seed=1), randint(3, N, seed=2)
CE = nn.CrossEntropyLoss()


class Tied(nn.Module):
    """Tokens -> embedding -> tanh -> the embedding's transpose: one tensor under two names."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(torch.tanh(self.embed(tokens)))


def test_tied_parameters_count_once_and_move_together():
    model, tokens, y = randomized(Tied()), randint(5, N, seed=3), randint(5, N, seed=4)
    obj = hs.Objective(model, "cross_entropy", (tokens, y))
    assert obj.parameters.names == ("embed.weight",)
    assert relative_error(hs.Hessian(obj).dense(), reference_hessian(model, CE, tokens, y)) < 1e-10
    assert relative_error(hs.GaussNewton(obj).dense(), reference_gauss_newton(model, CE, tokens, y)) < 1e-10


class Shared(nn.Module):
    """One layer used twice."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.outer = nn.Linear(4, 3)

    def forward(self, x):
        return self.outer(torch.tanh(self.inner(torch.tanh(self.inner(x)))))


def test_a_layer_used_twice():
    model = randomized(Shared())
    obj = hs.Objective(model, "cross_entropy", (X, Y))
    assert relative_error(hs.Hessian(obj).dense(), reference_hessian(model, CE, X, Y)) < 1e-10


def test_frozen_parameters_are_constants():
    model = randomized(Shared())
    model.inner.weight.requires_grad_(False)
    model.outer.bias.requires_grad_(False)
    obj = hs.Objective(model, "cross_entropy", (X, Y))
    assert obj.parameters.names == ("inner.bias", "outer.weight")
    assert relative_error(hs.Hessian(obj).dense(), reference_hessian(model, CE, X, Y)) < 1e-10
    assert relative_error(hs.GaussNewton(obj).dense(), reference_gauss_newton(model, CE, X, Y)) < 1e-10


class WithSpare(nn.Module):
    """A layer that never runs, between two that do."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 3)
        self.spare = nn.Linear(2, 2)
        self.last = nn.Linear(3, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


def test_unused_parameters_are_named_and_have_exactly_zero_rows():
    obj = hs.Objective(randomized(WithSpare()), "cross_entropy", (X, Y))
    assert obj.unused == ("spare.weight", "spare.bias")
    assert "unused: spare.weight, spare.bias" in repr(obj)
    spare = slice(obj.parameters.slice("spare.weight").start, obj.parameters.slice("spare.bias").stop)
    for operator in (hs.Hessian(obj), hs.GaussNewton(obj)):
        matrix = operator.dense()
        used = torch.ones(obj.parameters.size, dtype=torch.bool)
        used[spare] = False
        assert torch.all(matrix[spare] == 0) and torch.all(matrix[:, spare] == 0)
        assert torch.all(matrix[used].abs().sum(dim=1) > 0)


class TwoExperts(nn.Module):
    """Which layer runs depends on the batch."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 3)
        self.b = nn.Linear(4, 3)

    def forward(self, x):
        return (self.a if len(x) > 6 else self.b)(x)


def test_a_parameter_used_in_one_batch_only_is_used():
    obj = hs.Objective(randomized(TwoExperts()), "cross_entropy", [(X[:8], Y[:8]), (X[8:], Y[8:])])
    assert obj.unused == ()
    H = hs.Hessian(obj).dense()
    assert torch.all(H[:15, 15:] == 0) and H[:15, :15].norm() > 0 and H[15:, 15:].norm() > 0


def test_logits_of_minus_infinity_are_classes_that_cannot_be():
    """A model that masks classes has a finite loss and a Hessian."""

    class Masked(nn.Linear):
        def forward(self, x):
            return torch.cat([super().forward(x), x.new_full((len(x), 1), -torch.inf)], dim=1)

    masked, plain = randomized(Masked(4, 3)), randomized(nn.Linear(4, 3))
    H = hs.Hessian(hs.Objective(masked, "cross_entropy", (X, Y))).dense()
    assert relative_error(H, reference_hessian(plain, CE, X, Y)) < 1e-10


# --- no second derivative ---------------------------------------------------------------------------------------------


class TwiceSquare(torch.autograd.Function):
    """Differentiable twice, but its derivative reads a number out of a tensor, which vmap cannot do."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        assert gradient.sum().item() is not None
        return 2 * x * gradient


class WithFunction(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.first, self.last, self.function = nn.Linear(4, 3), nn.Linear(3, 3), function

    def forward(self, x):
        return self.last(self.function(self.first(x)))


@pytest.mark.parametrize("matrix", [hs.Hessian, hs.GaussNewton])
@pytest.mark.parametrize("columns", [1, 3])
def test_an_operation_without_second_derivative_is_refused(matrix, columns):
    """Never a silent zero: the layers below such an operation would otherwise seem to have no curvature."""
    obj = hs.Objective(randomized(WithFunction(OnceSquare.apply)), "cross_entropy", (X, Y))
    V = torch.ones(obj.parameters.size, columns, dtype=F64)
    with pytest.raises(
        NoSecondDerivativeError, match=r"second derivatives, but OnceSquare .*once_differentiable.* has none"
    ):
        matrix(obj) @ V


@pytest.mark.parametrize("matrix", [hs.Hessian, hs.GaussNewton])
def test_it_is_refused_in_whichever_batch_it_runs(matrix):
    model = randomized(WithFunction(lambda h: OnceSquare.apply(h) if len(h) < 6 else h**2))
    obj = hs.Objective(model, "cross_entropy", [(X[:8], Y[:8]), (X[8:], Y[8:])])
    with pytest.raises(NoSecondDerivativeError, match="OnceSquare"):
        matrix(obj) @ torch.ones(obj.parameters.size, dtype=F64)


def test_an_operation_that_cannot_be_vectorized_is_done_one_by_one():
    obj = hs.Objective(randomized(WithFunction(TwiceSquare.apply)), "cross_entropy", (X, Y))
    plain = randomized(WithFunction(torch.square))
    assert relative_error(hs.Hessian(obj).dense(), reference_hessian(plain, CE, X, Y)) < 1e-10
    assert relative_error(hs.GaussNewton(obj).dense(), reference_gauss_newton(plain, CE, X, Y)) < 1e-10


class FlashOnly(nn.Module):
    """Insists on the fused kernel, whose backward has no derivative."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(4, 12)

    def forward(self, x):
        q, k, v = (part.unsqueeze(1) for part in self.qkv(x).chunk(3, dim=-1))
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return functional.scaled_dot_product_attention(q, k, v).flatten(1)


def test_a_fused_kernel_is_named():
    obj = hs.Objective(
        randomized(FlashOnly()), "cross_entropy", (inputs_for("fused attention", N), randint(12, N, seed=5))
    )
    with pytest.raises(NoSecondDerivativeError, match=r"_scaled_dot_product_flash_attention.*has none; replace"):
        hs.Hessian(obj) @ torch.ones(obj.parameters.size, dtype=F64)


def test_other_failures_keep_their_own_message():
    class Fragile(nn.Linear):
        calls = 0

        def forward(self, x):
            Fragile.calls += 1
            if Fragile.calls > 2:  # the two forward passes of the inspection succeed
                raise RuntimeError("out of luck")
            return super().forward(x)

    obj = hs.Objective(randomized(Fragile(4, 3)), "cross_entropy", (X, Y))
    with pytest.raises(ModelError, match=r"the Hessian failed: RuntimeError: out of luck"):
        hs.Hessian(obj) @ torch.ones(15, dtype=F64)


def test_a_loss_callable_has_a_hessian_but_no_gauss_newton_matrix():
    model = randomized(Shared())

    def summed(model, batch):
        return functional.cross_entropy(model(batch[0]), batch[1], reduction="sum"), len(batch[1])

    obj = hs.Objective(model, summed, [(X[:5], Y[:5]), (X[5:], Y[5:])])
    assert relative_error(hs.Hessian(obj).dense(), reference_hessian(model, CE, X, Y)) < 1e-10
    with pytest.raises(
        InputError, match=r"the Gauss-Newton matrix needs the loss as a function of the model's outputs"
    ):
        hs.GaussNewton(obj)
