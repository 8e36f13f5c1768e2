"""The plan of block probes: the fewest products for a tolerated variance, and budgets."""

from itertools import product

import numpy as np
import pytest

from hesscope.estimate.block_plan import planned, within_budget


def test_samples_in_proportion_to_deviations():
    """Neyman's allocation: the least total for a variance of the sum."""
    variance = np.array([[1.0], [4.0], [9.0]])
    plan = planned(np.zeros((3, 1)), variance, np.zeros((3, 1)), 0.5)
    assert np.allclose(plan.counts, np.array([1, 2, 3]) * 6 / 0.5)
    assert np.sum(variance[:, 0] / plan.counts) == pytest.approx(0.5)


def test_the_least_numbers_are_kept_and_the_others_do_with_less():
    variance = np.array([[1.0], [1.0]])
    plan = planned(np.zeros((2, 1)), variance, np.array([[100.0], [1.0]]), 0.5)
    assert plan.counts[0] == 100
    assert plan.counts[1] == pytest.approx(1 / (0.5 - 0.01))


def test_enough_is_enough():
    plan = planned(np.zeros((2, 1)), np.ones((2, 1)), np.full((2, 1), 4.0), 1.0)
    assert np.array_equal(plan.counts, [4, 4])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("scale", [1e-60, 1.0, 1e60])
def test_the_choice_of_forms_is_nearly_the_best(seed, scale):
    """Against all 3^4 choices, each with its best numbers of samples: jumps between forms cost little."""
    generator = np.random.default_rng(seed)
    fixed = np.tile([0.0, 4.0, 12.0], (4, 1))
    variance = generator.random((4, 1)) ** 3 * 0.2 ** np.arange(3) * scale
    least, allowed = np.full((4, 3), 2.0), 0.005 * scale
    plan = planned(fixed, variance, least, allowed)
    rows = np.arange(4)
    assert np.sum(variance[rows, plan.choice] / plan.counts) <= allowed * (1 + 1e-9)
    best = np.inf
    for choice in product(range(3), repeat=4):
        own = planned(np.zeros((4, 1)), variance[rows, choice][:, None], least[:, :1], allowed)
        best = min(best, own.counts.sum() + fixed[rows, choice].sum())
    assert best * (1 - 1e-9) <= plan.counts.sum() + fixed[rows, plan.choice].sum() <= 1.1 * best


def test_forms_that_there_are_not_are_not_chosen():
    plan = planned(np.array([[np.inf, 3.0]]), np.array([[0.0, 1.0]]), np.array([[0.0, 2.0]]), 0.1)
    assert plan.choice[0] == 1
    assert plan.counts[0] == pytest.approx(10)


def test_nothing_is_tolerated():
    """Zero variance is; where there is none without, no number suffices."""
    plan = planned(np.zeros((2, 1)), np.array([[0.0], [1.0]]), np.full((2, 1), 2.0), 0.0)
    assert np.array_equal(plan.counts, [2, np.inf])
    exact = planned(np.array([[50.0, 0.0]]), np.array([[0.0, 1.0]]), np.array([[0.0, 2.0]]), 0.0)
    assert exact.choice[0] == 0 or np.isinf(exact.counts[0])


@pytest.mark.parametrize("budget", [12, 40, 75, 1000])
def test_within_a_budget(budget):
    counts, least = np.array([10.2, 0.0, 60.0, np.inf]), np.array([4, 0, 4, 4])
    found = within_budget(counts, least, budget)
    assert found.sum() <= budget
    assert np.all(found >= least)
    assert found[1] == 0
    if budget == 12:
        assert np.array_equal(found, [4, 0, 4, 4])


def test_a_budget_that_suffices_changes_nothing_but_rounds_up():
    assert np.array_equal(within_budget(np.array([1.2, 3.0]), np.array([2, 2]), 100), [2, 3])
