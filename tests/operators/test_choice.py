"""Which engine multiplies: by the clock where it matters, by what the model can where it must, and as asked."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn

import hesscope as hs
from hesscope.core.errors import InputError, ModelError, NoSecondDerivativeError
from hesscope.operators import choice
from hesscope.operators.engines import ENGINES, LinearMap
from tests.helpers import (
    F64,
    build,
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
TRUTHS = {hs.Hessian: reference_hessian, hs.GaussNewton: reference_gauss_newton}


# --- by the clock -----------------------------------------------------------------------------------------------------


class Clock:
    """Time passes only when an engine works: seconds to set up and for a product, on all of a batch of N samples."""

    def __init__(self, monkeypatch, costs):
        self.now, self.costs, self.built = 0.0, costs, []
        self._build, self._linearized, self._variants = choice.build, choice.linearized, choice.variants
        monkeypatch.setattr(choice, "SMALL_GRAPH", 0)
        monkeypatch.setattr(choice, "build", self.build)
        monkeypatch.setattr(choice, "linearized", self.linearized)
        monkeypatch.setattr(choice, "variants", self.variants)
        monkeypatch.setattr(choice.time, "perf_counter", lambda: self.now)

    def build(self, engine, matrix, theta, example):
        share = self.set_up(engine, matrix, theta)
        return self.slowed(self._build(engine, matrix, theta, example), self.costs[engine][1] * share)

    def linearized(self, matrix, theta, v):
        share = self.set_up("linearize", matrix, theta)
        linear, product = self._linearized(matrix, theta, v)
        return self.slowed(linear, self.costs["linearize"][1] * share), product

    def set_up(self, engine, matrix, theta):
        share = self.share(matrix, theta)
        self.built.append((engine, share))
        self.now += self.costs[engine][0] * share
        return share

    def variants(self, linear):
        others = self._variants(linear)[1:]
        return (linear, *(self.slowed(other, self.costs["channels last"][1]) for other in others))

    def slowed(self, linear, seconds):
        def multiply(rows, vectorized):
            self.now += seconds
            return linear.multiply(rows, vectorized)

        return LinearMap(multiply, linear.storages, linear.recorded)

    @staticmethod
    def share(matrix, theta):
        """Which part of the N samples the matrix is of, by the length of the outputs that the model gives."""
        lengths = []
        handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: lengths.extend(out.shape[:1]))
        try:
            matrix.function(theta)
        finally:
            handle.remove()
        return lengths[-1] / N


def chosen(monkeypatch, costs, name="tanh"):
    clock = Clock(monkeypatch, costs)
    objective = hs.Objective(build(name), "cross_entropy", (inputs_for(name, N), Y))
    operator = hs.Hessian(objective)
    return operator, operator.explain(), clock


# Costs on the whole batch: (set-up, product); thirty products count.
CLOCKED = {
    "the faster product": ({"linearize": (1.0, 1.0), "double_backward": (1.0, 1.2)}, "linearize"),
    "double backward": ({"linearize": (1.0, 1.2), "double_backward": (1.0, 1.0)}, "double_backward"),
    "too long a set-up": ({"linearize": (40.0, 1.0), "double_backward": (1.0, 2.0)}, "double_backward"),
    "a set-up that pays": ({"linearize": (25.0, 1.0), "double_backward": (1.0, 2.0)}, "linearize"),
}


@pytest.mark.parametrize("case", CLOCKED)
def test_the_fastest_over_thirty_products_is_taken(case, monkeypatch):
    costs, expected = CLOCKED[case]
    operator, text, clock = chosen(monkeypatch, costs)
    assert operator.engine == f"hessian: {expected.replace('_', ' ')}"
    assert f"{expected.replace('_', ' ')} (the fastest over 30 products, set-up included)" in text
    for engine in ("linearize", "double_backward"):  # a part of the batch is timed, the whole is told
        setup, product = costs[engine]
        assert f"  {engine}: {1000 * product:.3g} ms a product, {1000 * setup:.3g} ms to set up, " in text
    assert ("linearize", 1.0) in clock.built and ("double_backward", 0.25) in clock.built


@pytest.mark.parametrize(("seconds", "expected"), [(0.5, "linearize, channels last"), (1.5, "linearize")])
def test_images_are_laid_out_as_is_faster(seconds, expected, monkeypatch):
    costs = {"linearize": (1.0, 1.0), "double_backward": (1.0, 9.0), "channels last": (0.0, seconds)}
    operator, text, _ = chosen(monkeypatch, costs, "conv, batch norm")
    assert operator.engine == f"hessian: {expected}"
    assert f"  linearize, channels last: {1000 * seconds:.3g} ms a product" in text


def test_the_choice_is_made_once_and_the_product_is_right(monkeypatch):
    operator, _, clock = chosen(monkeypatch, CLOCKED["double backward"][0])
    dense = reference_hessian(build("tanh"), CE, inputs_for("tanh", N), Y)
    V = randn(len(dense), 3, seed=3)
    count = len(clock.built)
    for _ in range(2):
        assert relative_error(operator @ V, dense @ V) < 1e-10
    assert len(clock.built) == count


def test_a_wrong_variant_is_not_used_however_fast(monkeypatch):
    costs = {"linearize": (1.0, 1.0), "double_backward": (1.0, 9.0), "channels last": (0.0, 0.1)}
    variants = choice.variants

    def broken(linear):
        return tuple(
            LinearMap(lambda rows, vectorized, each=each: each.multiply(rows, vectorized) * 1.01, each.storages)
            if number
            else each
            for number, each in enumerate(variants(linear))
        )

    monkeypatch.setattr(choice, "variants", broken)
    operator, text, _ = chosen(monkeypatch, costs, "conv, batch norm")
    assert operator.engine == "hessian: linearize"
    assert "linearize, channels last: cannot be used (it gives another product)" in text


def test_small_problems_are_not_timed():
    """The last digits would change from run to run."""
    text = hs.Hessian(hs.Objective(build("tanh"), "cross_entropy", (inputs_for("tanh", N), Y))).explain()
    assert "linearize (the problem is too small to be worth timing)" in text


FIRST = """
import torch
import hesscope as hs
from hesscope.operators import choice
choice.SMALL_GRAPH = 0
model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
objective = hs.Objective(model, "cross_entropy", (torch.randn(12, 4), torch.randint(0, 3, (12,))))
found = [hs.Hessian(objective) for _ in range(2)]
for operator in found:
    operator.explain()
first, second = ([c.setup for c in operator._settled.candidates if c.name == "linearize"] for operator in found)
assert first[0] < 20 * second[0], (first, second)
"""


def test_what_pytorch_loads_at_its_first_recording_is_not_timed():
    """It takes a second or two: the first operator of a process would never be linearized."""
    run = subprocess.run([sys.executable, "-c", FIRST], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr


# --- by what the model can --------------------------------------------------------------------------------------------


class Cube(torch.autograd.Function):
    """Differentiable twice by the way back; there is no way forward."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * gradient


class With(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.first, self.last, self.function = nn.Linear(4, 3), nn.Linear(3, 3), function

    def forward(self, x):
        return self.last(self.function(self.first(x)))


def cubed(x):
    return x**3


@pytest.mark.parametrize("timed", [True, False])
@pytest.mark.parametrize("matrix", TRUTHS)
@pytest.mark.parametrize("batches", [1, 2])
def test_without_forward_mode_graphs_are_kept(matrix, batches, timed, monkeypatch):
    """In the first batch, or, where the choice is made already, in a later one; and it is told."""
    if timed:
        monkeypatch.setattr(choice, "SMALL_GRAPH", 0)
    if batches == 1:
        model, data = randomized(With(Cube.apply)), (X, Y)
    else:
        model, data = (
            randomized(With(lambda h: Cube.apply(h) if len(h) < 6 else h**3)),
            [(X[:8], Y[:8]), (X[8:], Y[8:])],
        )
    dense = TRUTHS[matrix](randomized(With(cubed)), CE, X, Y)
    operator = matrix(hs.Objective(model, "cross_entropy", data))
    if timed and batches == 2:
        monkeypatch.setattr(choice.Candidate, "cost", property(lambda candidate: candidate.name != "linearize"))
    V = randn(len(dense), 3, seed=3)
    for _ in range(2):
        assert relative_error(operator @ V, dense @ V) < 1e-10
    text = operator.explain()
    assert ("double backward (linearize cannot be used" if batches == 1 else "  batch 1: double_backward") in text
    assert f"{batches} of {batches} batches kept" in text


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("engine", ["linearize", "forward_over_reverse"])
def test_what_was_asked_for_is_not_replaced(engine, compile):
    if compile and engine != "linearize":
        return
    operator = hs.Hessian(hs.Objective(With(Cube.apply).double(), "cross_entropy", (X, Y)), engine, compile=compile)
    words = r"needs forward-mode derivatives, which .* has not; use engine='double_backward' \(or 'auto'\)"
    with pytest.raises(NoSecondDerivativeError, match=words) as caught:
        _ = operator @ torch.ones(operator.shape[0], dtype=F64)
    assert "\n" not in str(caught.value)


class Once(torch.autograd.Function):
    """x -> x^2, marked to have no second derivative, though it has a way forward."""

    @staticmethod
    def forward(x):
        return x**2

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return 2 * ctx.saved_tensors[0] * gradient

    @staticmethod
    def jvp(ctx, tangent):
        return 2 * ctx.saved_tensors[0] * tangent


class OnceAtTheEnd(nn.Linear):
    def forward(self, x):
        return Once.apply(super().forward(x))


@pytest.mark.parametrize("engine", ["auto", *ENGINES])
def test_a_missing_second_derivative_is_never_a_silent_zero(engine):
    """At the outputs what is missing is symmetric: no check of products would see it."""
    operator = hs.Hessian(hs.Objective(randomized(OnceAtTheEnd(4, 3)), "cross_entropy", (X, Y)), engine)
    with pytest.raises(NoSecondDerivativeError, match="Once"):
        _ = operator @ torch.ones(15, dtype=F64)


class Detached(torch.autograd.Function):
    """x -> x^2 whose backward forgets that it depends on x; with a way forward that is right."""

    @staticmethod
    def forward(x):
        return x**2

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        return 2.2 * ctx.saved_tensors[0] * gradient

    @staticmethod
    def jvp(ctx, tangent):
        return 2 * ctx.saved_tensors[0] * tangent


@pytest.mark.parametrize("memory", [None, 0])
@pytest.mark.parametrize("matrix", [hs.Hessian, hs.GaussNewton])
@pytest.mark.parametrize("engine", ["linearize", "forward_over_reverse", "auto"])
def test_asymmetric_matrices_are_refused(engine, matrix, memory):
    """Forward and backward derivatives that contradict each other."""
    objective = hs.Objective(randomized(With(Detached.apply)), "cross_entropy", (X, Y))
    operator = matrix(objective, engine, memory=memory)
    if engine == "auto" and memory == 0:
        return  # double backward, which never takes the way forward
    with pytest.raises(ModelError, match=r"is not symmetric \(relative gap"):
        _ = operator @ torch.ones(operator.shape[0], dtype=F64)


@pytest.mark.parametrize("engine", ["auto", *ENGINES])
def test_torch_s_own_wrong_second_derivative_is_refused_by_every_engine(engine):
    torch.manual_seed(0)
    model = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 3, dtype=F64)), nn.Tanh())
    operator = hs.Hessian(hs.Objective(model, "cross_entropy", (X, Y)), engine)
    with pytest.raises(hs.HesscopeError, match=r"is not symmetric|needs forward-mode derivatives"):
        _ = operator @ torch.ones(operator.shape[0], dtype=F64)


@pytest.mark.parametrize("engine", ["auto", *ENGINES])
@pytest.mark.parametrize("matrix", [hs.Hessian, hs.GaussNewton])
def test_products_that_are_not_finite_name_their_batch(engine, matrix):
    model = build("tanh")
    x = inputs_for("tanh", N)
    operator = matrix(hs.Objective(model, "cross_entropy", [(x[:6], Y[:6]), (x[6:], Y[6:])]), engine)
    with torch.no_grad():
        model[0].weight.fill_(float("nan"))
    with pytest.raises(hs.HesscopeError, match="is not finite on batch 0"):
        _ = operator @ torch.ones(operator.shape[0], dtype=F64)


# --- as asked ---------------------------------------------------------------------------------------------------------

BAD = {
    "engine": ({"engine": "linearise"}, r"engine must be one of .*'linearise', did you mean 'linearize'\?"),
    "no engine": ({"engine": None}, "engine must be one of 'auto', .*got None"),
    "negative memory": ({"memory": -1}, "memory must be a number of bytes, at least 0, got -1"),
    "no number": ({"memory": "1 GB"}, "memory must be a number of bytes, at least 0, got '1 GB'"),
    "nan": ({"memory": float("nan")}, "memory must be a number of bytes, at least 0, got nan"),
    "infinite": ({"memory": float("inf")}, "memory must be a number of bytes, at least 0, got inf"),
    "truth": ({"memory": True}, "memory must be a number of bytes, at least 0, got True"),
    "compiled graphs": (
        {"compile": True, "engine": "double_backward"},
        "compile=True needs engine 'linearize' or 'auto', PyTorch cannot compile 'double_backward'",
    ),
    "compile": ({"compile": "max"}, "compile must be True or False, got 'max'"),
}


@pytest.mark.parametrize("matrix", [hs.Hessian, hs.GaussNewton, hs.EmpiricalFisher])
@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case, matrix):
    arguments, words = BAD[case]
    objective = hs.Objective(build("tanh"), "cross_entropy", (inputs_for("tanh", N), Y))
    with pytest.raises(InputError, match=words) as caught:
        matrix(objective, **arguments)
    assert "\n" not in str(caught.value)


compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")


@pytest.mark.skipif(compiler is None, reason="torch.compile needs a C++ compiler, and none is installed")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_products():
    model = build("relu")
    x = inputs_for("relu", N)
    dense = reference_hessian(model, CE, x, Y)
    operator = hs.Hessian(hs.Objective(model, "cross_entropy", (x, Y)), compile=True)
    for columns in (1, 8):
        V = randn(len(dense), columns, seed=3)
        assert relative_error(operator @ V, dense @ V) < 1e-9
    assert "linearize, compiled" in operator.engine
