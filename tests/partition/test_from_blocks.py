"""Blocks chosen by hand: every form of input, and every mistake."""

import re

import numpy as np
import pytest
import torch
from torch import nn

import hesscope as hs
from hesscope.core.errors import InputError, PartitionError
from hesscope.partition.partition import select_labels


def model():
    """0.weight: 0-5 (3 x 2), 0.bias: 6-8, 1.weight: 9-14 (2 x 3)."""
    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2, bias=False))


P = 15
MASK = np.arange(P) % 2 == 0
EVEN, ODD = np.arange(0, P, 2), np.arange(1, P, 2)

# name -> (blocks, whether they need the model, the positions of the first block)
FORMS = {
    "ranges": ({"a": range(4), "b": range(4, P)}, False, np.arange(4)),
    "lists": ({"a": [3, 1, 0, 2], "b": list(range(4, P))}, False, np.arange(4)),
    "arrays": ({"a": EVEN, "b": ODD}, False, EVEN),
    "unsigned arrays": ({"a": EVEN.astype(np.uint8), "b": ODD}, False, EVEN),
    "tensors": ({"a": torch.from_numpy(EVEN), "b": torch.from_numpy(ODD)}, False, EVEN),
    "masks": ({"a": MASK, "b": ~MASK}, False, EVEN),
    "tensor masks": ({"a": torch.from_numpy(MASK), "b": torch.from_numpy(~MASK)}, False, EVEN),
    "lists of booleans": ({"a": MASK.tolist(), "b": (~MASK).tolist()}, False, EVEN),
    "a name": ({"a": "0.weight", "b": ["0.bias", "1.weight"]}, True, np.arange(6)),
    "a tuple of names": ({"a": ("0.weight", "0.bias"), "b": "1.weight"}, True, np.arange(9)),
    "name and row": ({"a": ("0.weight", 1), "b": [("0.weight", [0, 2]), "0.bias", "1.weight"]}, True, [2, 3]),
    "name and slices": (
        {"a": ("1.weight", (slice(None), 0)), "b": ["0.weight", "0.bias", ("1.weight", np.s_[:, 1:])]},
        True,
        [9, 12],
    ),
    "name and mask": (
        {"a": ("0.bias", torch.tensor([True, False, True])), "b": ["0.weight", ("0.bias", 1), "1.weight"]},
        True,
        [6, 8],
    ),
    "mixed": (
        {"a": [("0.weight", 0), range(6, 9), np.array([14])], "b": [range(2, 6), range(9, 14)]},
        True,
        [0, 1, 6, 7, 8, 14],
    ),
    "positions, with a model": ({"a": range(4), "b": range(4, P)}, True, np.arange(4)),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms(name):
    blocks, needs_model, first = FORMS[name]
    p = hs.Partition.from_blocks(blocks, model=model() if needs_model else None)
    assert p.labels == ("a", "b")
    assert p.size == P
    assert p.unmatched == ()
    assert np.array_equal(p.indices("a"), first)
    assert np.array_equal(p.indices("b"), np.setdiff1d(np.arange(P), first))
    assert p.sizes == (len(first), P - len(first))


def test_labels_of_another_type_become_text():
    assert hs.Partition.from_blocks({0: [0], 1: [1]}).labels == ("0", "1")


MISTAKES = {
    "overlap": (
        {"a": range(4), "b": range(3, P)},
        False,
        PartitionError,
        "blocks overlap: parameter 3 is in 'a' and in 'b'",
    ),
    "overlap of names": (
        {"a": ["0.weight", "0.bias"], "b": [("0.bias", slice(1, 3)), "1.weight"]},
        True,
        PartitionError,
        "parameter 0.bias[1] (flat) is in 'a' and in 'b'",
    ),
    "twice in one block": ({"a": [0, 1, 1]}, False, PartitionError, "block 'a' names a parameter twice"),
    "name twice in one block": (
        {"a": ["0.weight", "0.weight"], "b": ["0.bias", "1.weight"]},
        True,
        PartitionError,
        "'a' names a",
    ),
    "gap": ({"a": [0, 1], "b": [4]}, False, PartitionError, "the blocks miss 2 of 5 parameters, the first being 2"),
    "missing names": (
        {"a": "0.weight", "b": ("1.weight", 0)},
        True,
        PartitionError,
        "the blocks miss 6 of 15 parameters, the first being 0.bias[0] (flat)",
    ),
    "empty block": ({"a": range(P), "b": []}, True, PartitionError, "block 'b' is empty"),
    "empty selection": ({"a": ("0.bias", slice(3, 5)), "b": range(P)}, True, PartitionError, "block 'a' is empty"),
    "empty mask": ({"a": np.zeros(P, dtype=bool), "b": range(P)}, False, PartitionError, "block 'a' is empty"),
    "all empty": ({"a": []}, False, PartitionError, "block 'a' is empty"),
    "no blocks": ({}, False, InputError, "needs a non-empty dict"),
    "no dict": ([[0], [1]], False, InputError, "needs a non-empty dict"),
    "negative": ({"a": [0, -1]}, False, PartitionError, "block 'a' has positions outside [0,"),
    "beyond the model": ({"a": range(P + 1)}, True, PartitionError, "block 'a' has positions outside [0, 15)"),
    "floats": (
        {"a": [0.0, 1.0]},
        False,
        InputError,
        "block 'a' must be positions in the flat vector, a parameter name",
    ),
    "matrix of positions": ({"a": np.zeros((2, 2), dtype=int)}, False, InputError, "block 'a' must be positions"),
    "a number": ({"a": 3}, False, InputError, "block 'a' must be positions in the flat vector"),
    "none": ({"a": None}, False, InputError, "got NoneType"),
    "name without a model": (
        {"a": "0.weight"},
        False,
        InputError,
        "block 'a' names the parameter '0.weight': pass model=",
    ),
    "unknown name": (
        {"a": "0.weigth"},
        True,
        InputError,
        "no trainable parameter is named '0.weigth', did you mean '0.weight'?",
    ),
    "index out of range": ({"a": ("0.bias", 3)}, True, InputError, "in 0.bias of shape (3,)"),
    "too many indices": ({"a": ("0.bias", (0, 0))}, True, InputError, "in 0.bias of shape (3,)"),
    "mask of wrong length": ({"a": np.ones(4, dtype=bool), "b": range(4, P)}, True, InputError, "mask"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name):
    blocks, needs_model, error, message = MISTAKES[name]
    with pytest.raises(error, match=re.escape(message)):
        hs.Partition.from_blocks(blocks, model=model() if needs_model else None)


def test_the_model_fixes_the_number_of_parameters():
    with pytest.raises(PartitionError, match=r"miss 1 of 15 parameters, the first being 1.weight"):
        hs.Partition.from_blocks({"a": range(P - 1)}, model=model())


def test_a_partition_cannot_be_changed():
    p = hs.Partition.by_tensor(model())
    with pytest.raises(ValueError, match=r"read-only"):
        p.assignment[0] = 1
    with pytest.raises(AttributeError):
        p.labels = ()


WRONG_PARTITIONS = {
    "a block without parameters": (("a", "b"), [0, 0, 0], "uses each of the 2 blocks' numbers"),
    "a block that is not there": (("a", "b"), [0, 1, 2], "uses each of the 2 blocks' numbers"),
    "no block": (("a", "b"), [0, -1, 1], "uses each of the 2 blocks' numbers"),
    "a matrix": (("a", "b"), [[0, 1]], "assignment must be a vector"),
    "nothing": ((), [], "assignment must be a vector"),
    "one label twice": (("a", "a"), [0, 1], "labels must differ from each other"),
}


@pytest.mark.parametrize("name", WRONG_PARTITIONS)
def test_wrong_partitions(name):
    labels, assignment, message = WRONG_PARTITIONS[name]
    with pytest.raises(PartitionError, match=message):
        hs.Partition(labels, np.array(assignment))


def test_unknown_block_with_the_nearest_that_exists():
    p = hs.Partition.by_tensor(model())
    with pytest.raises(InputError, match=re.escape("no block is named '0.wieght', did you mean '0.weight'?")):
        p.indices("0.wieght")


def test_a_partition_must_fit_the_matrix():
    p = hs.Partition.by_tensor(model())
    p.require_fits(P)
    with pytest.raises(PartitionError, match=r"the partition covers 15 parameters, but the operator has 16"):
        p.require_fits(P + 1)


LABELS = ("fc1", "fc2", "out")


def test_choosing_labels():
    assert select_labels(LABELS, None) == [0, 1, 2]
    assert select_labels(LABELS, ["out", "fc1"]) == [2, 0]
    assert select_labels(LABELS, (label for label in LABELS[1:])) == [1, 2]


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (["fc1", "fc3"], "no block is named 'fc3', did you mean 'fc"),
        ([], "labels is empty: choose at least one block"),
        ("fc1", "labels must be a list of block labels"),
    ],
)
def test_bad_choices(chosen, message):
    with pytest.raises(InputError, match=message):
        select_labels(LABELS, chosen)
