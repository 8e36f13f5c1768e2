"""In which precision a model is measured: its own, or more; and what is said about it."""

import copy

import pytest
import torch
from torch import nn

import hesscope as hs
from hesscope.core.errors import InputError
from hesscope.operators import Operator
from tests.helpers import F64, AttentionNet, randint, randn, randomized, relative_error, sequential_mlp
from tests.operators import zoo

N = 6
Y = randint(3, N, seed=3)
WEIGHTS = torch.tensor([0.5, 2.0, 1.25])  # exact in half precision
HALVES = [torch.bfloat16, torch.float16]
MATRICES = [hs.Hessian, hs.GaussNewton, hs.EmpiricalFisher]


def mlp():
    return sequential_mlp((5, 7, 3), nn.Tanh, bias=True), (5,)


def resnet():
    return zoo.ResNet(), (2, 6, 6)


def attention():
    return AttentionNet(), (3, 4)


MODELS = {"mlp": mlp, "resnet": resnet, "attention": attention}


def case(name, dtype):
    """A random model and inputs, exact in `dtype`, in eval mode."""
    model, shape = MODELS[name]()
    return randomized(model, seed=1, scale=0.4).to(dtype).eval(), randn(N, *shape, seed=2).to(dtype)


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("matrix", [hs.Hessian, hs.GaussNewton])
@pytest.mark.parametrize("name", MODELS)
def test_half_precision_is_measured_in_float32(name, matrix, half):
    model, x = case(name, half)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    objective = hs.Objective(model, "cross_entropy", (x, Y))
    copied = hs.Objective(copy.deepcopy(model).float(), "cross_entropy", (x.float(), Y))
    operator, truth = matrix(objective), matrix(copied)
    V = randn(operator.shape[0], 3, seed=4).float()
    assert operator.dtype == torch.float32 and (operator @ V).dtype == torch.float32
    assert relative_error(operator @ V, truth @ V) < 1e-6
    assert objective.value() == copied.value()
    assert torch.equal(objective.gradient(), copied.gradient())
    assert f"the model is {str(half)[6:]}, measured in float32" in objective.notes
    assert f"the model is {str(half)[6:]}, measured in float32" in operator.explain()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert {value.dtype for key, value in model.state_dict().items() if value.is_floating_point()} == {half}


@pytest.mark.parametrize("engine", ["auto", "double_backward"])
@pytest.mark.parametrize("matrix", [hs.Hessian, hs.GaussNewton])
@pytest.mark.parametrize("name", MODELS)
def test_a_float32_model_in_float64(name, matrix, engine):
    model, x = case(name, torch.float32)
    objective = hs.Objective(model, "cross_entropy", (x, Y), dtype=F64)
    double = hs.Objective(copy.deepcopy(model).double(), "cross_entropy", (x.double(), Y))
    operator, truth = matrix(objective, engine), matrix(double, "double_backward")
    V = randn(operator.shape[0], 3, seed=4)
    assert relative_error(operator @ V, truth @ V) < 1e-9
    assert objective.value() == pytest.approx(double.value(), rel=1e-14)
    assert "the model is float32, measured in float64" in objective.notes


@pytest.mark.parametrize("matrix", [hs.Hessian, hs.GaussNewton])
@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_dense_matrices_in_float64(loss, matrix):
    """In closed form and by products."""
    model, x = case("mlp", torch.float32)
    y = Y if loss == "cross_entropy" else randn(N, 3, seed=5).float()
    wanted = y if loss == "cross_entropy" else y.double()
    operator = matrix(hs.Objective(model, loss, (x, y), dtype=F64))
    truth = matrix(hs.Objective(copy.deepcopy(model).double(), loss, (x.double(), wanted)))
    assert operator.has_closed_form and operator.dense().dtype == F64
    for dense in (operator.dense(), Operator.dense(operator)):
        assert relative_error(dense, Operator.dense(truth)) < 1e-9


@pytest.mark.parametrize("own", [torch.float32, *HALVES])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_class_weights_come_along(own, smoothing):
    model, x = case("mlp", own)
    loss = nn.CrossEntropyLoss(weight=WEIGHTS.to(own), label_smoothing=smoothing)
    double = nn.CrossEntropyLoss(weight=WEIGHTS.double(), label_smoothing=smoothing)
    objective = hs.Objective(model, loss, (x, Y), dtype=F64)
    truth = hs.Objective(copy.deepcopy(model).double(), double, (x.double(), Y))
    for matrix in MATRICES:
        assert relative_error(Operator.dense(matrix(objective)), Operator.dense(matrix(truth))) < 1e-9
    assert relative_error(hs.Hessian(objective).dense(), hs.Hessian(truth).dense()) < 1e-9
    assert loss.weight.dtype == own


class Rounding(nn.Module):
    """Rounds inside, as Llama's norms do."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x):
        h = self.first(x)
        return self.last(torch.tanh(h.to(torch.float32)).to(h.dtype))


def test_what_the_model_rounds_inside_is_not_rounded():
    model, x = randomized(Rounding()), randn(N, 5, seed=2)
    objective = hs.Objective(model, "cross_entropy", (x, Y))
    plain = nn.Sequential(model.first, nn.Tanh(), model.last)
    truth = Operator.dense(hs.Hessian(hs.Objective(plain, "cross_entropy", (x, Y))))
    assert relative_error(Operator.dense(hs.Hessian(objective)), truth) < 1e-12
    assert objective.notes == ("what the model rounds to fewer digits inside is kept in float64",)


def test_nothing_is_noted_where_nothing_is_done_differently():
    model, x = case("mlp", F64)
    assert hs.Objective(model, "cross_entropy", (x, Y)).notes == ()
    assert hs.Objective(model, "cross_entropy", (x, Y), dtype=F64).notes == ()


def test_half_precision_on_request():
    """One's own dtype may be insisted on."""
    model, x = case("mlp", torch.bfloat16)
    objective = hs.Objective(model, "cross_entropy", (x, Y), dtype=torch.bfloat16)
    assert objective.parameters.dtype == torch.bfloat16 and objective.notes == ()
    assert objective.gradient().dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, torch.complex64, "float64", float])
def test_refused_dtypes(dtype):
    model, x = case("mlp", torch.float32)
    words = r"dtype must be torch.float32, torch.float64 or the parameters' own torch.float32, got "
    with pytest.raises(InputError, match=words) as caught:
        hs.Objective(model, "cross_entropy", (x, Y), dtype=dtype)
    assert "\n" not in str(caught.value)
