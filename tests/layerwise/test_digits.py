"""The facts of [W] on real data: what holds for a trained network of two hidden layers on the digits, and what not.

Inputs are grey values in [0, 1], as in [W]. Where the truth differs from [W], the test states the truth, and
docs/layerwise.md says why.
"""

import numpy as np
import pytest

import hesscope as hs
from hesscope.study.classifiers import trained, training_data

SEEDS = range(3)
WIDTHS = [64, 32, 32, 10]
LAYERS = ("fc1", "fc2", "fc3")
RAW = {"standardize": False}


def measured(normalization):
    """Factors and eigenstructures of every layer, for every seed."""
    data = training_data("mlp", "digits", data_arguments=RAW)
    found = {layer: [] for layer in LAYERS}
    for seed in SEEDS:
        model = trained(
            "mlp", "digits", seed=seed, normalization=normalization, data_arguments=RAW, widths=WIDTHS, bias=True
        )
        objective = hs.Objective(model, "cross_entropy", data.batch("cross_entropy"))
        for layer in LAYERS:
            factors = hs.layerwise.kronecker_factors(objective, layer)
            structure = hs.layerwise.layer_eigenstructure(objective, layer, factors=factors)
            found[layer].append((factors, structure, hs.layerwise.layer_low_rank(structure, factors)))
    return found


@pytest.fixture(scope="module")
def plain():
    return measured(None)


@pytest.fixture(scope="module")
def normalized():
    return measured("batch")


def shared(found, layer):
    return hs.layerwise.shared_eigenspaces([structure for _, structure, _ in found[layer]]).at_width


def test_top_eigenvectors_of_the_first_layer_are_rank_one(plain):
    """Each of the five leading ones; of the next four the least has a share between 0.5 and 0.8."""
    shares = np.array([low_rank.shares[:9, 0] for _, _, low_rank in plain["fc1"]])
    assert shares[:, :5].min() > 0.9
    assert shares[:, 5:].min() < 0.9
    # Their common direction is the mean input.
    assert min(low_rank.right_alignment[:5].min() for _, _, low_rank in plain["fc1"]) > 0.9


def test_the_mean_input_dominates_the_input_moment(plain):
    for layer in LAYERS:
        for _, _, low_rank in plain[layer]:
            assert low_rank.input_alignment > 0.99
            assert low_rank.input_ratio > 4


def test_batch_norm_in_front_of_a_layer_removes_it(normalized):
    """With the bias the constant 1 is all that is left of the mean, one direction among many."""
    for layer in LAYERS:
        for _, _, low_rank in normalized[layer]:
            assert low_rank.input_ratio < 2
            assert np.median(low_rank.right_alignment[:9]) < 0.2


def test_networks_from_different_seeds_share_eigenspaces_but_not_with_batch_norm(plain, normalized):
    assert shared(plain, "fc1").ratio > 5
    assert shared(plain, "fc3").ratio > 5
    assert 2 < shared(plain, "fc2").ratio < 5  # hidden neurons of different networks have nothing to do with each other
    for layer in LAYERS:
        without, with_norm = shared(plain, layer), shared(normalized, layer)
        assert with_norm.mean + 2 * with_norm.stderr < without.mean
    assert shared(normalized, "fc2").ratio < 1.5


def test_decoupling_predicts_what_is_shared(plain):
    for layer in LAYERS:
        found = shared(plain, layer)
        assert 0.6 < found.predicted / found.mean < 1.6


def test_outliers_are_one_less_than_classes_in_the_last_layer_only(plain):
    """The largest gap comes after C - 1 = 9 eigenvalues in the last layer, give or take one, for most seeds."""
    last = np.median([structure.gap.count for _, structure, _ in plain["fc3"]])
    assert 8 <= last <= 10
    first = np.median([structure.gap.count for _, structure, _ in plain["fc1"]])
    assert first < 8
    assert {structure.expected_outliers for _, structure, _ in plain["fc3"]} == {9}


def test_decoupling_holds_where_the_mean_dominates(plain, normalized):
    for layer in LAYERS:
        without = [factors.relative_error for factors, _, _ in plain[layer]]
        with_norm = [factors.relative_error for factors, _, _ in normalized[layer]]
        assert max(without) < 0.6
        assert min(with_norm) > 0.7
        assert all(factors.best_relative_error <= factors.relative_error for factors, _, _ in plain[layer])
