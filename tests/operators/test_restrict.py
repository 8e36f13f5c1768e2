"""Diagonal blocks: by name, by positions, of every kind of operator, and without paying for the rest."""

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import hesscope as hs
from hesscope.core.errors import InputError
from hesscope.operators import Operator
from hesscope.operators.engines import ENGINES
from tests.helpers import F64, build, inputs_for, randint, randn, randomized, relative_error, sequential_mlp

N = 12
Y = randint(3, N, seed=2)
MATRICES = {"hessian": hs.Hessian, "gauss_newton": hs.GaussNewton, "fisher": hs.EmpiricalFisher}


def attention():
    return hs.Objective(build("attention module"), "cross_entropy", (inputs_for("attention module", N), Y))


def mask(size):
    return torch.arange(size) % 3 == 0


# A block, and its positions; P parameters, the first of which are in_proj_weight [12, 4] and in_proj_bias [12].
BLOCKS = {
    "tensor": lambda P: ("attention.in_proj_bias", range(48, 60)),
    "module": lambda P: ("norm", range(80, 88)),
    "outer module": lambda P: ("attention", range(80)),
    "list": lambda P: ([3, 50, 70], [3, 50, 70]),
    "unordered": lambda P: ([70, 3, 50, 102], [70, 3, 50, 102]),
    "range": lambda P: (range(10, 60, 7), range(10, 60, 7)),
    "slice": lambda P: (slice(40, 90), range(40, 90)),
    "slice from the end": lambda P: (slice(-5, None), range(P - 5, P)),
    "mask": lambda P: (mask(P), range(0, P, 3)),
    "list of truths": lambda P: (mask(P).tolist(), range(0, P, 3)),
    "NumPy mask": lambda P: (mask(P).numpy(), range(0, P, 3)),
    "array": lambda P: (np.array([5, 1, 99], dtype=np.int32), [5, 1, 99]),
    "tensor of positions": lambda P: (torch.tensor([101, 0]), [101, 0]),
    "row": lambda P: (range(4, 8), range(4, 8)),
    "one": lambda P: ([7], [7]),
    "all": lambda P: (slice(None), range(P)),
}


@pytest.fixture(scope="module")
def dense():
    objective = attention()
    return {name: Operator.dense(matrix(objective, "double_backward")) for name, matrix in MATRICES.items()}


def check(block, whole, positions):
    """The block's products and entries are right; some blocks (a key's bias) are zero, hence relative to the whole."""
    truth = whole[positions][:, positions]
    assert block.shape == tuple(truth.shape)
    V = randn(len(truth), 3, seed=4)
    allowed = 1e-10 * float(whole.abs().max())
    assert (block @ V - truth @ V).abs().max() < 10 * allowed
    assert (block @ V[:, 0] - truth @ V[:, 0]).abs().max() < 10 * allowed
    assert (block.dense() - truth).abs().max() < allowed


@pytest.mark.parametrize("case", BLOCKS)
def test_blocks_of_a_matrix(case, dense):
    truth = dense["hessian"]
    block, positions = BLOCKS[case](len(truth))
    positions = list(positions)
    check(hs.Hessian(attention()).restrict(block), truth, positions)


@pytest.mark.parametrize("memory", [None, 0])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("matrix", MATRICES)
def test_every_engine_restricts(engine, matrix, memory, dense):
    truth = dense[matrix]
    positions = [60, 2, 49, 102]
    check(MATRICES[matrix](attention(), engine, memory=memory).restrict(positions), truth, positions)


@pytest.mark.parametrize("matrix", MATRICES)
def test_a_head_of_attention(matrix, dense):
    objective = attention()
    heads = hs.Partition.by_head(objective.model)
    labels = [label for label in heads.labels if "head" in label]
    assert len(labels) >= 2
    for label in labels[:4]:
        positions = torch.as_tensor(heads.indices(label))
        check(MATRICES[matrix](objective).restrict(heads.indices(label)), dense[matrix], positions)


KINDS = {
    "sum": lambda H, G: H + G,
    "residual part": lambda H, G: H - G,
    "scaled": lambda H, G: -2 * H / 3,
    "dense": lambda H, G: hs.as_operator(H.dense()),
    "array": lambda H, G: hs.as_operator(H.dense().numpy()),
    "SciPy": lambda H, G: hs.as_operator(H.to_scipy()),
    "SciPy of a sum": lambda H, G: hs.as_operator((H - G).to_scipy()),
    "mixed": lambda H, G: H - hs.as_operator(G.dense()),
    "block of a block": lambda H, G: H.restrict(slice(None, None, -1)) - G.restrict(slice(None, None, -1)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_other_operators(kind):
    objective = attention()
    operator = KINDS[kind](hs.Hessian(objective), hs.GaussNewton(objective))
    truth = Operator.dense(operator)
    for block in ([70, 3, 50, 102], range(48, 60), slice(80, None)):
        check(operator.restrict(block), truth, torch.arange(len(truth))[block])


def test_names_go_through_sums():
    objective = attention()
    H, G = hs.Hessian(objective), hs.GaussNewton(objective)
    check((H - 3 * G).restrict("norm"), Operator.dense(H) - 3 * Operator.dense(G), range(80, 88))


@pytest.mark.parametrize("matrix", ["gauss_newton", "fisher"])
@pytest.mark.parametrize("engine", ["auto", "double_backward"])
def test_sums_with_engines_through_scipy_and_back(engine, matrix):
    objective = attention()
    H, other = hs.Hessian(objective, engine), MATRICES[matrix](objective, engine)
    truth = Operator.dense(hs.Hessian(objective)) + 0.5 * Operator.dense(MATRICES[matrix](objective))
    total = H + 0.5 * other
    V = randn(len(truth), 3, seed=5)
    assert relative_error(total @ V, truth @ V) < 1e-10
    back = hs.as_operator(total.to_scipy())
    assert relative_error(back @ V, truth @ V) < 1e-10
    top = scipy.sparse.linalg.eigsh(total.to_scipy(), k=2, which="LA", return_eigenvectors=False)
    assert relative_error(np.sort(top), torch.linalg.eigvalsh(truth)[-2:]) < 1e-8
    assert hs.as_operator(total) is total


class Spare(nn.Module):
    """A layer that never runs, and two that run on batches of different sizes."""

    def __init__(self):
        super().__init__()
        self.spare, self.large, self.small = nn.Linear(2, 2), nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        return torch.tanh((self.large if len(x) > 6 else self.small)(x))


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("engine", ["auto", *ENGINES])
def test_layers_that_some_batch_or_none_depends_on(engine, matrix):
    x = randn(N, 4, seed=1)
    objective = hs.Objective(randomized(Spare()), "cross_entropy", [(x[:8], Y[:8]), (x[8:], Y[8:])])
    whole = Operator.dense(MATRICES[matrix](objective, "double_backward"))
    operator = MATRICES[matrix](objective, engine)
    zero = operator.restrict("spare") @ randn(6, 2, seed=3)
    assert zero.shape == (6, 2) and not zero.any()
    check(operator.restrict("large"), whole, range(6, 21))
    check(operator.restrict("small"), whole, range(21, 36))


# --- at the price of the block ----------------------------------------------------------------------------------------


class Counter(TorchDispatchMode):
    """Counts ATen's operations, but for the look at whether the model has changed, which is a look at all of it."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is not torch.ops.aten.equal.default
        return function(*args, **(kwargs or {}))


def operations(operator):
    v = torch.ones(operator.shape[0], dtype=F64)
    _ = operator @ v  # what is made once is not counted
    with Counter() as counter:
        _ = operator @ v
    return counter.count


@pytest.mark.parametrize("matrix", [hs.Hessian, hs.GaussNewton])
@pytest.mark.parametrize("engine", ["double_backward", "linearize"])
def test_the_last_layer_is_cheap(engine, matrix):
    model = randomized(sequential_mlp((4, *[5] * 9, 3), nn.Tanh, bias=True))
    # A loss that takes few operations itself.
    operator = matrix(hs.Objective(model, "mse", (randn(N, 4, seed=1), randn(N, 3, seed=2))), engine)
    last = [name for name in operator.objective.parameters.names if name.startswith("18.")]
    start = operator.objective.parameters.slice(last[0]).start
    whole = operations(operator)
    assert operations(operator.restrict("18")) < whole / 3
    assert operations(operator.restrict(range(start, start + 4))) < whole / 3


def test_a_block_of_whole_tensors_is_no_window_onto_the_rest():
    """Nor are its vectors filled up with zeros."""
    operator = hs.Hessian(attention())
    for block in ("fc", range(88, 103)):
        assert operator.restrict(block).objective.parameters.names == ("fc.weight", "fc.bias")


BAD = {
    "unknown name": ("attention.in_proj_wieght", "no parameter or module is named .*, did you mean 'attention.in_proj"),
    "part of a name": ("att", "no parameter or module is named 'att'"),
    "empty name": ("", "no parameter or module is named ''"),
    "empty list": ([], "block is empty: choose at least one parameter"),
    "empty range": (range(0), "block is empty"),
    "empty mask": (torch.zeros(103, dtype=torch.bool), "block is empty"),
    "short mask": ([True, False], "block must be a list of whole numbers or a mask of 103 entries"),
    "outside": ([0, 103], r"block has positions outside \[0, 103\)"),
    "negative": ([-1], r"block has positions outside \[0, 103\)"),
    "twice": ([1, 2, 1], "block names a parameter twice"),
    "fractions": ([1.0, 2.5], "block must be a list of whole numbers"),
    "two axes": ([[1, 2]], r"block must be a list of whole numbers .*shape \[1, 2\]"),
    "number": (3, r"block must be a list of whole numbers .*shape \[\]"),
    "nothing": (None, "block must be positions in the parameter vector, got None"),
    "list of names": (["fc"], "block must be positions in the parameter vector"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("kind", ["hessian", "sum", "dense"])
def test_bad_blocks(case, kind):
    block, words = BAD[case]
    objective = attention()
    H = hs.Hessian(objective)
    assert H.shape[0] == 103
    operator = {"hessian": H, "sum": H - hs.GaussNewton(objective), "dense": hs.as_operator(torch.eye(103))}[kind]
    if kind == "dense" and isinstance(block, str):
        words = "block must be positions in the parameter vector"  # a matrix has no names
    with pytest.raises(InputError, match=words) as caught:
        operator.restrict(block)
    assert "\n" not in str(caught.value)
