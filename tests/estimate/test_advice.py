"""Advice names the partition that was planted, and does not split what is dense."""

import numpy as np
import pytest
import torch

import hesscope as hs
from hesscope.core.errors import InputError
from hesscope.estimate.advice import choose_by_tensor, choose_partition
from hesscope.estimate.diagonality import compare_partitions
from tests.helpers import randn

ROWS, COLUMNS = 8, 6
# Two weight matrices and a bias, as a network has them.
TENSORS = {"fc1.weight": ROWS * COLUMNS, "fc1.bias": ROWS, "fc2.weight": ROWS * COLUMNS}
SIZE = sum(TENSORS.values())
STARTS = dict(zip(TENSORS, np.cumsum([0, *TENSORS.values()]).tolist(), strict=False))


def partition(cut):
    """`cut`: tensor -> function of a position in it to its block's name."""
    blocks = {}
    for name, size in TENSORS.items():
        for position in range(size):
            label = name + str(cut[name](position) if name in cut else "")
            blocks.setdefault(label, []).append(STARTS[name] + position)
    return hs.Partition.from_blocks(blocks)


def by_row(position):
    return position // COLUMNS


def by_column(position):
    return position % COLUMNS


WEIGHTS = ("fc1.weight", "fc2.weight")
PARTITIONS = {
    "tensor": partition({}),
    "row": partition(dict.fromkeys(WEIGHTS, by_row)),
    "column": partition(dict.fromkeys(WEIGHTS, by_column)),
}


def planted(truth, seed=0, leak=0.03):
    """A random symmetric matrix within the blocks of a partition, with a little everywhere."""
    M = randn(SIZE, SIZE, seed=seed)
    assignment = torch.tensor(truth.assignment.tolist())
    return (M + M.T) * ((assignment[:, None] == assignment) + leak)


def rank_one():
    u = randn(SIZE, seed=3) * torch.linspace(0.1, 3, SIZE)
    return torch.outer(u, u)


@pytest.mark.parametrize("method", ["exact", "probes"])
@pytest.mark.parametrize("name", PARTITIONS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_planted_partition_is_advised(name, method, seed):
    H = planted(PARTITIONS[name], seed)
    verdict = choose_partition(compare_partitions(H, PARTITIONS, method=method, seed=seed))
    assert verdict.name == name
    assert verdict.sureness > 0.99
    assert f"{name} keeps" in verdict.reason


@pytest.mark.parametrize("method", ["exact", "probes"])
@pytest.mark.parametrize(
    "H", [randn(SIZE, SIZE, seed=1) + randn(SIZE, SIZE, seed=1).T, rank_one()], ids=["dense", "rank one"]
)
def test_a_dense_matrix_is_not_split(H, method):
    """Not even one whose energy is mostly in a few rows: a block that holds most of it tells nothing by that."""
    for seed in range(3):
        verdict = choose_partition(compare_partitions(H, PARTITIONS, method=method, seed=seed))
        assert verdict.name is None
        assert verdict.sureness > (0.9 if method == "exact" else 0.5)
        assert "no partition keeps more than chance" in verdict.reason


@pytest.mark.parametrize("method", ["exact", "probes"])
def test_tensors_are_cut_each_in_its_own_way(method):
    mixed = partition({"fc1.weight": by_row, "fc2.weight": by_column})
    found = compare_partitions(planted(mixed), PARTITIONS, tensors=TENSORS, method=method)
    choices = choose_by_tensor(found, "tensor", ("row", "column"))
    assert {name: choice.scheme for name, choice in choices.items()} == {
        "fc1.weight": "row",
        "fc1.bias": "tensor",
        "fc2.weight": "column",
    }
    assert choices["fc1.weight"].energy.value > 0.9
    assert sum(choice.share for choice in choices.values()) == pytest.approx(1)


@pytest.mark.parametrize("method", ["exact", "probes"])
def test_dense_tensors_stay_whole(method):
    found = compare_partitions(planted(PARTITIONS["tensor"]), PARTITIONS, tensors=TENSORS, method=method)
    choices = choose_by_tensor(found, "tensor", ("row", "column"))
    assert {choice.scheme for choice in choices.values()} == {"tensor"}


def test_how_sure_is_how_often():
    """Two partitions that are nearly as good: the better one is named about as often as the sureness says."""
    H = planted(PARTITIONS["row"], leak=0.0) + 0.93 * planted(PARTITIONS["column"], seed=1, leak=0.0)
    truth = choose_partition(compare_partitions(H, PARTITIONS, method="exact"))
    rivals = {name: PARTITIONS[name] for name in ("row", "column")}
    verdicts = [
        choose_partition(compare_partitions(H, rivals, method="probes", probes=16, seed=seed)) for seed in range(100)
    ]
    hits = np.mean([verdict.name == truth.name for verdict in verdicts])
    claimed = np.mean([verdict.sureness for verdict in verdicts])
    assert {truth.name, truth.runner_up} == set(rivals)
    assert 0.5 < claimed < 0.99, "too easy or too hard to tell anything"
    assert abs(hits - claimed) < 0.15, (hits, claimed)


def test_names_that_are_not_there_are_refused():
    found = compare_partitions(planted(PARTITIONS["row"]), PARTITIONS, tensors=TENSORS)
    with pytest.raises(InputError, match="no partition 'head'"):
        choose_by_tensor(found, "tensor", ("head",))
    with pytest.raises(InputError, match="without tensors"):
        choose_by_tensor(compare_partitions(planted(PARTITIONS["row"]), PARTITIONS), "tensor", ("row",))
    with pytest.raises(InputError, match="more than one block"):
        choose_partition(compare_partitions(torch.eye(3), {"all": hs.Partition.from_blocks({"all": [0, 1, 2]})}))
