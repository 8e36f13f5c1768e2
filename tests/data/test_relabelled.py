"""Two classes made of many; labels that mean nothing."""

import numpy as np
import pytest
import torch
from scipy import stats

from hesscope.core.errors import InputError
from hesscope.data import LabelledData, PatchPopulation, binary, digits, gaussian, randomly_labelled
from tests.helpers import F64

MARGIN = 1e-4  # chi-square tests with fixed seeds: this or less would be seen once in ten thousand


def labelled(labels, classes):
    return LabelledData("d", torch.zeros(len(labels), 1), torch.tensor(labels), classes)


def independent(first, second):
    table = stats.contingency.crosstab(np.asarray(first), np.asarray(second)).count
    return stats.chi2_contingency(table).pvalue > MARGIN


# --- binary -----------------------------------------------------------------------------------------------------------


def test_digits_0_to_4_against_5_to_9():
    data, found = digits(), binary(digits())
    assert found.labels.tolist() == [0 if label in (0, 1, 2, 3, 4) else 1 for label in data.labels.tolist()]
    assert found.labels.dtype == torch.int64
    assert torch.equal(found.inputs, data.inputs)
    assert found.classes == 2
    assert found.name == "scikit-learn digits, 0-4 against 5-9"


@pytest.mark.parametrize(
    ("classes", "truth", "name"),
    [
        (2, [0, 1], "d, 0 against 1"),
        (3, [0, 1, 1], "d, 0 against 1-2"),
        (4, [0, 0, 1, 1], "d, 0-1 against 2-3"),
        (5, [0, 0, 1, 1, 1], "d, 0-1 against 2-4"),
    ],
)
def test_the_first_half_of_the_classes_against_the_others(classes, truth, name):
    found = binary(labelled(list(range(classes)), classes))
    assert found.labels.tolist() == truth
    assert found.name == name


def test_the_classes_are_halved_not_the_labels_that_occur():
    assert binary(labelled([0, 1, 4], 10)).labels.tolist() == [0, 0, 0]


# --- random labels ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("C", [2, 3, 10])
def test_random_labels_are_uniform_and_independent(C):
    data = gaussian(100000, 2, C, seed=0, dtype=F64)
    found = randomly_labelled(data, seed=0)
    labels = found.labels.numpy()
    assert stats.chisquare(np.bincount(labels, minlength=C)).pvalue > MARGIN
    assert independent(labels, data.labels)
    assert independent(labels[:-1], labels[1:])
    assert independent(labels, np.digitize(data.inputs[:, 0].numpy(), [-1, 0, 1]))
    assert torch.equal(found.inputs, data.inputs)
    assert found.classes == C and found.labels.dtype == torch.int64
    assert found.name == f"Gaussian inputs, {C} classes, random labels"


def test_every_classifier_is_right_by_chance_only():
    N, C = 100000, 4
    data = gaussian(N, 3, C, seed=1, dtype=F64)
    found = randomly_labelled(data, seed=2)
    linear = (data.inputs @ torch.randn(3, C, dtype=F64, generator=torch.Generator().manual_seed(0))).argmax(dim=1)
    for predicted in (linear, data.labels, torch.zeros(N, dtype=torch.int64)):
        risk = float((predicted != found.labels).double().mean())
        assert abs(risk - (1 - 1 / C)) < 4 * (1 / C * (1 - 1 / C) / N) ** 0.5


def test_random_labels_are_new_ones_not_the_old_ones_shuffled():
    data = gaussian(1000, 2, 2)
    zeros = LabelledData("zeros", torch.zeros_like(data.inputs), torch.zeros_like(data.labels), 2)
    assert torch.equal(randomly_labelled(zeros, 0).labels, randomly_labelled(data, 0).labels)


def test_labels_belong_to_draws_even_with_the_seed_of_the_draw():
    """Eight patches drawn five thousand times each have labels of their own every time."""
    pictures = torch.arange(18, dtype=F64).view(2, 1, 3, 3)
    drawn = PatchPopulation("tiny", pictures, 2, flat=True).draw(40000, seed=0)
    found = randomly_labelled(drawn, seed=0)
    assert independent(found.labels, drawn.inputs[:, 0])
    assert independent(found.labels, drawn.labels)


def test_seeds():
    data = gaussian(1000, 2, 2)
    a, again, b = (randomly_labelled(data, seed).labels for seed in (0, 0, 1))
    assert torch.equal(a, again)
    assert abs(int((a == b).sum()) - 500) < 4 * 250**0.5
    before = torch.get_rng_state()
    randomly_labelled(data, 0)
    assert torch.equal(torch.get_rng_state(), before)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("relabel", [binary, lambda data: randomly_labelled(data, seed=0)])
def test_bad_input(relabel):
    with pytest.raises(InputError, match=r"^data must have at least 2 classes, got 1$"):
        relabel(labelled([0, 0], 1))
    population = PatchPopulation("tiny", torch.zeros(2, 1, 3, 3), 2, flat=True)
    with pytest.raises(
        InputError, match=r"^data must be LabelledData \(of a population: a draw\), got PatchPopulation$"
    ):
        relabel(population)
