"""Recorded linear maps: replayed, fused, vectorized and laid out anew they stay what they were recorded from."""

import random

import pytest
import torch
from torch import nn
from torch.nn import functional

import hesscope as hs
from hesscope.operators import linearization
from hesscope.operators.linearization import channels_last, record
from tests.helpers import (
    F64,
    call_flat,
    flat_parameters,
    randint,
    randn,
    randomized,
    reference_gauss_newton,
    reference_hessian,
    relative_error,
)
from tests.operators import zoo

SIDE = 4
CONSTANTS = [randn(SIDE, SIDE, seed=seed) for seed in (1, 2, 3)]
FREE = range(40)  # programs that only make new tensors
WRITING = range(100, 140)  # programs that also write to their own
ROUNDING = 1e-12


def program(seed, writing):
    """A random small program [16] -> [16], linear in its argument, that writes neither to it nor to CONSTANTS."""

    def run(v):
        draw = random.Random(seed)
        known = [v.view(SIDE, SIDE)]

        def some():
            return known[draw.randrange(max(0, len(known) - 5), len(known))]

        def own(tensor):
            return tensor.untyped_storage().data_ptr() != v.untyped_storage().data_ptr()

        def constant():
            return draw.choice(CONSTANTS)

        def slices():
            low = draw.randrange(SIDE - 1)
            return torch.cat([some()[low : low + 2], some()[:, low : low + 2].t()])

        def split():
            left, right = torch.unsafe_split(some(), 2)
            return torch.cat([right * constant()[:2], left])

        new = [
            lambda: some() + some(),
            lambda: some() - some(),
            lambda: torch.add(some(), some(), alpha=3),
            lambda: some() * constant(),
            lambda: constant() * some() + some(),
            lambda: some() - constant() * some(),
            lambda: some() @ constant() + some(),
            lambda: some() - constant() @ some(),
            lambda: (some() @ constant()).reshape(2, 8).add(some().reshape(2, 8)).view(SIDE, SIDE),
            lambda: some().reshape(2, 8).add((some() @ constant()).reshape(2, 8)).view(SIDE, SIDE),
            lambda: some() + torch.zeros_like(some()),
            lambda: torch.ops.aten._to_copy.default(some()) * constant(),
            lambda: some().t(),
            lambda: some().clone(),
            lambda: some()[torch.tensor([2, 0, 1, 1])],
            lambda: some() / 3,
            slices,
            split,
        ]

        def written(change):
            target = some()
            if own(target):
                change(target)
            return target * constant()

        def row(target):
            target[1].add_(known[0][2])

        write = [
            lambda: written(lambda target: target.add_(known[0])),
            lambda: written(lambda target: target.mul_(2.0)),
            lambda: written(lambda target: target.copy_(known[0])),
            lambda: written(row),
            lambda: written(lambda target: target[:, 1:3].mul_(constant()[:, 1:3])),
        ]
        for _ in range(14):
            known.append(draw.choice(write if writing and draw.random() < 0.3 else new)())
        return (sum(known[-3:]) + known[0]).reshape(-1)

    return run


def unfused(function, v, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(linearization, "fuse", lambda tape: None)
        return record(function, v)[0]


@pytest.mark.parametrize("seed", [*FREE, *WRITING])
def test_random_programs(seed, monkeypatch):
    """Replayed as recorded, fused or not, in whatever order, and without a trace in the constants or the argument."""
    writing = seed in WRITING
    function, V = program(seed, writing), randn(3, SIDE**2, seed=seed)
    given, constants = V.clone(), [constant.clone() for constant in CONSTANTS]
    truth = torch.stack([function(v) for v in V])
    for found in (record(function, randn(SIDE**2, seed=7))[0], unfused(function, randn(SIDE**2, seed=7), monkeypatch)):
        held = [value.constant.clone() for value in found.tape.constants.values()]
        for _ in range(2):
            assert relative_error(torch.stack([found.replay(v) for v in V]), truth) < ROUNDING
        if not writing:
            assert relative_error(found.replay_rows(V), truth) < ROUNDING
            columns = V.T.contiguous().T  # rows that do not lie one behind the other
            assert relative_error(found.replay_rows(columns), truth) < ROUNDING
        assert torch.equal(V, given)
        for value, before in zip(found.tape.constants.values(), held, strict=True):
            assert torch.equal(value.constant, before)
    assert all(torch.equal(now, before) for now, before in zip(CONSTANTS, constants, strict=True))


def test_the_programs_are_rewritten():
    """The test above would prove little if nothing were fused or written in place."""
    operations = [
        str(value.operation)
        for seed in FREE
        for value in record(program(seed, False), randn(SIDE**2, seed=7))[0].tape.values
    ]
    for name in ("addcmul_", "addmm_", "add_", "sub_", "mul_"):
        assert sum(operation.startswith(f"aten.{name}.") for operation in operations) > 5, name


def test_a_map_that_does_not_depend_on_the_vector_is_refused():
    with pytest.raises(RuntimeError, match="the result does not depend on the vector"):
        record(lambda v: CONSTANTS[0][0] * 2, randn(SIDE, seed=1))


def test_a_map_that_is_zero_needs_no_program():
    assert record(lambda v: torch.zeros_like(CONSTANTS[0][0]), randn(SIDE, seed=1)) is None


def frozen_base(v):
    base = torch.zeros(SIDE, dtype=F64)
    base[:2] = v[:2] * 2  # from here on base depends on v, and only a view of it shows so
    return base * CONSTANTS[0][0] + v


def accumulating(v):
    base = CONSTANTS[0][0].clone()
    base -= CONSTANTS[0][0]
    base[1:].add_(v[1:])
    return base + v


@pytest.mark.parametrize("function", [frozen_base, accumulating], ids=lambda function: function.__name__)
def test_what_is_written_into_a_constant_is_refused_or_right(function):
    """A replay that is right for the vector it was recorded with proves nothing."""
    v, other = randn(SIDE, seed=1), randn(SIDE, seed=2)
    try:
        found, product = record(function, v)
    except RuntimeError as error:
        assert "gives another product" in str(error) or "constant" in str(error)
    else:
        assert relative_error(found.replay(other), function(other)) < ROUNDING
        assert torch.equal(product, function(v))


def recorded(name, matrix):
    found = zoo.specimen(name)
    operator = matrix(hs.Objective(found.model, "cross_entropy", found.batch), engine="linearize")
    _ = operator @ zoo.probes(operator.shape[0], 1)
    (linear,) = operator._kept.maps.values()
    return linear.recorded


@pytest.mark.parametrize("matrix", [hs.Hessian, hs.GaussNewton])
@pytest.mark.parametrize("name", zoo.IMAGES)
def test_channels_last_is_the_same_map(name, matrix):
    plain = recorded(name, matrix)
    V = zoo.probes(plain.tape.input.kind[0][0], 3).T.contiguous()
    truth = torch.stack([plain.replay(v) for v in V])
    before = [value.constant for value in plain.tape.constants.values()]
    other = channels_last(plain)
    assert other.replay is not plain.replay
    assert relative_error(torch.stack([other.replay(v) for v in V]), truth) < ROUNDING
    assert relative_error(other.replay_rows(V), truth) < 1e-11
    assert all(value.constant is old for value, old in zip(plain.tape.constants.values(), before, strict=True))
    assert torch.equal(torch.stack([plain.replay(v) for v in V]), truth)


def test_channels_last_needs_convolutions():
    assert channels_last(recorded("mlp", hs.Hessian)) is None


# --- models whose derivatives are awkward to record -------------------------------------------------------------------

N, WIDTH = 12, 6
X, Y = randn(N, 4, seed=1), randint(3, N, seed=2)


class Bent(nn.Module):
    """Linear, tanh, something special, linear; `scale` [6] is a parameter for the special thing to use."""

    def __init__(self, special):
        super().__init__()
        self.first, self.last = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 3)
        self.scale = nn.Parameter(torch.zeros(WIDTH))
        self.dropout = nn.Dropout(0.5)
        self.special = special

    def forward(self, x):
        return self.last(self.special(self, torch.tanh(self.first(x))))


def slice_write(model, h):
    out = torch.ones_like(h)
    out[:, 1:4] += h[:, 1:4] * model.scale[1:4]
    return torch.tanh(out) * h


def half_write(model, h):
    out = torch.zeros_like(h)
    out[:, :3] = h[:, 3:] * model.scale[:3]
    out[:, 3:] = h[:, :3]
    return torch.tanh(out)


def index_write(model, h):
    h = h * model.scale
    h[h > 0.1] = 0.5
    h[torch.arange(3), 1] = model.scale[:3]
    return torch.tanh(h)


def in_place_relu(model, h):
    return functional.relu_(h * model.scale) + functional.leaky_relu_(h * 2.0, 0.1)


def residual_in_place(model, h):
    r = h * model.scale
    h = h.clone()
    h += r
    h.mul_(2.0)
    return torch.tanh(h) + r


def dropped(model, h):
    return functional.dropout(model.dropout(h * model.scale), 0.5, model.training)


def used_twice(model, h):
    again = torch.tanh(model.first(h[:, :4] * model.scale[:4]))
    return again * h


def tied(model, h):
    return torch.tanh(h @ model.first.weight) @ model.first.weight.T


def complex_rotation(model, h):
    z = torch.view_as_complex((h * model.scale).reshape(len(h), 3, 2))
    return torch.view_as_real(z * z).reshape(len(h), WIDTH)


def masked(model, h):
    mask = h.detach() > 0
    return torch.tanh(h * mask + model.scale * (~mask) * h)


def gathered(model, h):
    columns = torch.tensor([0, 0, 1, 2, 3, 5])
    return torch.tanh(torch.zeros_like(h).index_add(1, columns, h * model.scale))


def unsafe_chunks(model, h):
    left, right = torch.unsafe_chunk(h * model.scale, 2, 1)
    return torch.cat([torch.tanh(left * 2), torch.sigmoid(right.mul_(3.0))], dim=1)


SPECIAL = [
    slice_write,
    half_write,
    index_write,
    in_place_relu,
    residual_in_place,
    dropped,
    used_twice,
    tied,
    complex_rotation,
    masked,
    gathered,
    unsafe_chunks,
]
LOSSES = {"cross_entropy": (nn.CrossEntropyLoss(), Y), "mse": (nn.MSELoss(), randn(N, 3, seed=3))}
TRUTHS = {hs.Hessian: reference_hessian, hs.GaussNewton: reference_gauss_newton}


@pytest.mark.parametrize(
    ("special", "loss"),
    [(special, "cross_entropy") for special in SPECIAL] + [(slice_write, "mse"), (in_place_relu, "mse")],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_awkward_models(special, loss):
    """One column or eight, lying as columns do: the recording was made with a vector that lies otherwise."""
    model = randomized(Bent(special)).eval()
    criterion, targets = LOSSES[loss]
    objective = hs.Objective(model, loss, (X, targets))
    for matrix, reference in TRUTHS.items():
        dense = reference(model, criterion, X, targets)
        operator, V = matrix(objective), randn(len(dense), 8, seed=4)
        for columns in (V[:, :1], V, V[:, 0], V[:, ::2]):
            assert relative_error(operator @ columns, dense @ columns) < 1e-10, matrix
        assert "linearize" in operator.engine


def test_the_zero_block_of_an_activation_is_zero_not_missing():
    """Piecewise linear networks and MSE: second derivatives of the model are zeros without memory."""
    model = randomized(nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True), nn.Linear(3, 3)))
    y = randn(N, 3, seed=5)
    theta = flat_parameters(model)
    truth = torch.autograd.functional.hessian(lambda t: functional.mse_loss(call_flat(model, t, X), y), theta)
    operator = hs.Hessian(hs.Objective(model, "mse", (X, y)), engine="linearize")
    V = randn(len(theta), 5, seed=6)
    assert relative_error(operator @ V, truth @ V) < 1e-12


def linear_loss(model, batch):
    return model(batch[0]).sum(), len(batch[0])


@pytest.mark.parametrize("engine", ["auto", "double_backward", "linearize", "forward_over_reverse"])
@pytest.mark.parametrize("loss", ["L1", "callable"])
def test_a_matrix_that_is_zero(engine, loss):
    """Nothing is curved, and no column of the product is the caller's."""
    data = (X, randn(N, 3, seed=5))
    objective = hs.Objective(randomized(nn.Linear(4, 3)), nn.L1Loss() if loss == "L1" else linear_loss, data)
    V = randn(15, 3, seed=6)
    for matrix in (hs.Hessian, hs.GaussNewton) if loss == "L1" else (hs.Hessian,):
        for right in (V, V[:, 0]):
            before = right.clone()
            product = matrix(objective, engine=engine) @ right
            assert product.shape == right.shape and not product.any()
            product += 1.0  # memory of its own
            assert torch.equal(right, before)
