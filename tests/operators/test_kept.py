"""What is kept between products: never stale, within its budget, read from memory alone, and gone with the operator."""

import copy
import gc
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import hesscope as hs
from hesscope.operators.engines import ENGINES, LinearMap
from tests.helpers import F64, build, inputs_for, randint, randn, reference_gauss_newton, reference_hessian
from tests.helpers import relative_error as error
from tests.operators import zoo

N = 12
X, Y = inputs_for("conv, batch norm", N), randint(3, N, seed=2)
CE = nn.CrossEntropyLoss()
BATCHES = [(X[i : i + 4], Y[i : i + 4]) for i in (0, 4, 8)]
TRUTHS = {hs.Hessian: reference_hessian, hs.GaussNewton: reference_gauss_newton}


def network():
    """Convolution, batch norm, linear; the linear layer's bias is frozen."""
    model = build("conv, batch norm")
    model.fc.bias.requires_grad_(False)
    return model


def stepped(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    CE(model(X), Y).backward()
    optimizer.step()
    optimizer.zero_grad()


def written_through_data(model):
    model.fc.weight.data[0, 0] += 0.5


def loaded(model):
    other = network()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.3)
    model.load_state_dict(other.state_dict())


def replaced(model):
    model.fc.weight = nn.Parameter(model.fc.weight.detach() * 1.5)


def statistics_moved(model):
    model.norm.running_var.mul_(3.0)


def statistics_learned(model):
    model.train()
    model(X)
    model.eval()


def frozen_moved(model):
    model.fc.bias.data.add_(torch.tensor([1.0, -1.0, 0.5]))


CHANGES = [stepped, written_through_data, loaded, replaced, statistics_moved, statistics_learned, frozen_moved]


@pytest.mark.parametrize("engine", ["auto", "double_backward"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_products_follow_the_model(change, engine):
    model = network()
    objective = hs.Objective(model, "cross_entropy", BATCHES)
    for matrix, reference in TRUTHS.items():
        operator, before = matrix(objective, engine=engine), reference(model, CE, X, Y)
        V = randn(len(before), 3, seed=3)
        assert error(operator @ V, before @ V) < 1e-10
        saved = copy.deepcopy(model.state_dict())
        change(model)
        after = reference(model, CE, X, Y)
        assert error(after, before) > 1e-3  # the change matters
        assert error(operator @ V, after @ V) < 1e-10
        model.load_state_dict(saved)
        assert error(operator @ V, before @ V) < 1e-10


@pytest.mark.parametrize("matrix", TRUTHS)
@pytest.mark.parametrize("engine", ["auto", "linearize"])
def test_without_memory_nothing_is_kept(matrix, engine):
    model = network()
    objective = hs.Objective(model, "cross_entropy", BATCHES)
    operator, dense = matrix(objective, engine=engine, memory=0), TRUTHS[matrix](model, CE, X, Y)
    V = randn(len(dense), 3, seed=3)
    for _ in range(2):
        assert error(operator @ V, dense @ V) < 1e-10
    assert operator._kept.maps == {} and operator._kept.bytes == 0
    assert "memory: 0 of 3 batches kept between products, 0 bytes of at most 0 bytes" in operator.explain()
    assert "the others are made anew for every product" in operator.explain()


@pytest.mark.parametrize("engine", ["double_backward", "linearize"])
def test_a_budget_for_one_of_three_batches_keeps_just_one(engine):
    model = network()
    objective = hs.Objective(model, "cross_entropy", BATCHES)
    dense = reference_hessian(model, CE, X, Y)
    V = randn(len(dense), 3, seed=3)
    whole = hs.Hessian(objective, engine=engine)
    _ = whole @ V
    assert len(whole._kept.maps) == 3
    each = max(linear.bytes for linear in whole._kept.maps.values())
    first_guess = int(2.5 * objective.graph_bytes)
    budget = max(first_guess, int(1.4 * each))
    assert budget < 2 * each, "this network's estimate is too large for the test to mean anything"
    operator = hs.Hessian(objective, engine=engine, memory=budget)
    for _ in range(2):
        assert error(operator @ V, dense @ V) < 1e-10
        assert list(operator._kept.maps) == [0]
        assert 0 < operator._kept.bytes <= budget
    assert "memory: 1 of 3 batches kept" in operator.explain()
    assert "memory: 3 of 3 batches kept" in whole.explain()


class CountingLoader(DataLoader):
    reads = 0

    def __iter__(self):
        self.reads += 1
        return super().__iter__()


@pytest.mark.parametrize(
    ("memory", "engine", "again"),
    [(None, "auto", 0), (None, "double_backward", 0), (0, "auto", 3), (None, "forward_over_reverse", 3)],
)
def test_a_loader_is_read_again_only_where_something_is_not_kept(memory, engine, again):
    """Nor is the model run, where everything is kept."""
    model = network()
    loader = CountingLoader(TensorDataset(X, Y), batch_size=4)
    operator = hs.Hessian(hs.Objective(model, "cross_entropy", loader), engine=engine, memory=memory)
    v = randn(operator.shape[0], seed=3)
    expected = operator @ v
    calls, before = [], loader.reads
    handle = model.fc.register_forward_hook(lambda *given: calls.append(1))
    for _ in range(3):
        assert error(operator @ v, expected) < 1e-13
    handle.remove()
    assert loader.reads - before == again
    assert (len(calls) > 0) == (again > 0)


def test_batches_share_what_they_hold_once():
    """The bytes are those of storages, each once: parameters that every batch's constants refer to count once."""
    objective = hs.Objective(network(), "cross_entropy", BATCHES)
    operator = hs.Hessian(objective, engine="double_backward")
    _ = operator @ randn(operator.shape[0], seed=3)
    maps = operator._kept.maps.values()
    storages = {key: size for linear in maps for key, size in linear.storages.items()}
    assert operator._kept.bytes == sum(storages.values()) > 0


# --- nothing leaks ----------------------------------------------------------------------------------------------------


def resident():
    """Bytes of memory that this process occupies; tracemalloc does not see those of tensors."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("resident memory is read from /proc, which this system has not")
    (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmRSS:")]
    return int(line.split()[1]) * 1024


def large():
    """An objective with 2 MiB for the activations, and few operations."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 3))
    x, y = torch.randn(8192, 8), torch.randint(0, 3, (8192,))
    return hs.Objective(model, "cross_entropy", (x, y))


@pytest.mark.parametrize(
    ("engine", "memory"), [*((engine, 0) for engine in ENGINES), ("double_backward", None), ("linearize", None)]
)
def test_fifty_products_do_not_grow(engine, memory):
    objective = large()
    operator = hs.Hessian(objective, engine=engine, memory=memory)
    v = torch.randn(operator.shape[0])
    for _ in range(3):
        _ = operator @ v
    before = resident()
    for _ in range(50):
        _ = operator @ v
    # One graph that stayed behind every tenth product would be noticed.
    assert objective.graph_bytes > 2**20
    assert resident() - before < 5 * objective.graph_bytes


@pytest.mark.parametrize("engine", ["auto", "double_backward", "linearize"])
def test_new_parameters_do_not_add_to_what_is_held(engine):
    objective = large()
    operator = hs.Hessian(objective, engine=engine)
    v = torch.randn(operator.shape[0])
    sizes = []
    for step in range(12):
        with torch.no_grad():
            objective.model[0].weight.add_(1e-3)
        _ = operator @ v
        sizes.append(operator._kept.bytes)
        if step == 3:
            before = resident()
    assert max(sizes) < 1.01 * min(sizes)
    assert resident() - before < 5 * objective.graph_bytes


def held_by(linear):
    """A tensor that lives as long as the linear map."""
    if linear.recorded is not None:
        return next(value.constant for value in linear.recorded.tape.constants.values())
    cells = dict(zip(linear.multiply.__code__.co_freevars, linear.multiply.__closure__, strict=True))
    return cells["gradient" if "gradient" in cells else "outputs"].cell_contents


@pytest.mark.parametrize("matrix", [hs.Hessian, hs.GaussNewton, hs.EmpiricalFisher])
@pytest.mark.parametrize("engine", ["double_backward", "linearize"])
def test_graphs_go_with_the_operator_and_with_the_parameters(engine, matrix):
    model = network()
    objective = hs.Objective(model, "cross_entropy", BATCHES)
    operator, v = matrix(objective, engine=engine), randn(objective.parameters.size, 3, seed=3)
    _ = matrix(objective, engine=engine) @ v  # what PyTorch loads at its first recording is not at issue
    _ = operator @ v

    def references(operator):
        assert all(isinstance(linear, LinearMap) for linear in operator._kept.maps.values())
        return [weakref.ref(held_by(linear)) for linear in operator._kept.maps.values()]

    gc.collect()
    gc.disable()  # at once, not when the garbage collector comes by: it counts objects, not their memory
    try:
        first = references(operator)
        assert len(first) == 3 and all(reference() is not None for reference in first)
        stepped(model)
        _ = operator @ v
        assert all(reference() is None for reference in first)
        second = references(operator)
        del operator
        assert all(reference() is None for reference in second)
    finally:
        gc.enable()


def reachable_bytes(linear):
    """Memory of all tensors that a linearization's tape and its program refer to, each storage once."""
    found = [value.constant for value in linear.recorded.tape.constants.values()]
    found += [entry for entry in linear.recorded.replay.__globals__.values() if isinstance(entry, torch.Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found}.values())


@pytest.mark.parametrize("variant", [0, 1], ids=["plain", "channels last"])
@pytest.mark.parametrize("name", ["mlp", "resnet"])
def test_all_that_is_held_is_counted(name, variant, monkeypatch):
    if name != "resnet" and variant:
        return
    found = zoo.specimen(name)
    objective = hs.Objective(found.model, "cross_entropy", found.batch)
    operator = hs.Hessian(objective, engine="auto" if variant else "linearize")
    if variant:
        prefer(monkeypatch, "channels last")
    _ = operator @ zoo.probes(operator.shape[0], 1)
    assert ("channels last" in operator.engine) == bool(variant)
    (linear,) = operator._kept.maps.values()
    assert reachable_bytes(linear) <= 1.05 * operator._kept.bytes


def prefer(monkeypatch, word):
    """Let the candidate whose name has the word be the fastest."""
    from hesscope.operators import choice

    monkeypatch.setattr(choice, "SMALL_GRAPH", 0)
    monkeypatch.setattr(choice.Candidate, "cost", property(lambda candidate: word not in candidate.name))


def test_float64_budgets_and_odd_numbers():
    """A number of bytes may be a float, as a fraction of something is."""
    objective = hs.Objective(network(), "cross_entropy", BATCHES)
    operator = hs.Hessian(objective, memory=1e9 / 3)
    assert operator.dense().dtype == F64
    assert "at most 317.9 MiB" in operator.explain()
