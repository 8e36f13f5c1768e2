import numpy as np
import pytest

import hesscope as hs
from hesscope.dynamics import Adaptive, log_spaced
from hesscope.dynamics.schedule import checked_schedule


@pytest.mark.parametrize(("last", "count"), [(1, 2), (5, 20), (10, 4), (100, 20), (1000, 20), (10**6, 50), (7, 8)])
def test_log_spaced_steps_increase_from_the_first_to_the_last(last, count):
    steps = log_spaced(last, count)
    assert steps[0] == 0 and steps[-1] == last
    assert len(steps) == min(count, last + 1)
    assert (np.diff(steps) > 0).all()


def test_log_spaced_steps_are_evenly_spaced_in_the_logarithm():
    late = np.log([step + 1 for step in log_spaced(10**6, 30)[10:]])
    assert np.allclose(np.diff(late), np.log(10**6 + 1) / 29, rtol=0.02)


@pytest.mark.parametrize(
    ("at", "message"),
    [
        ([0, 5, 5], "the steps of at must increase, but 5 comes after 5"),
        ([0, 9, 3], "the steps of at must increase, but 3 comes after 9"),
        ([], "at lists no step"),
        ([-1, 3], "each step of at must be an integer of at least 0.*got -1"),
        ([0, 1.5], "each step of at must be an integer of at least 0.*got 1.5"),
        (0, "at must be a positive integer, got 0"),
        ("0,5", "at must be a list of steps, a number of steps between two, or Adaptive"),
    ],
)
def test_bad_schedules(at, message):
    with pytest.raises(hs.HesscopeError, match=message):
        checked_schedule(at)


@pytest.mark.parametrize("change", [0, -0.1, float("nan")])
def test_bad_change(change):
    with pytest.raises(hs.HesscopeError, match="change must be positive"):
        Adaptive(change)


def test_arrays_and_ranges_are_lists():
    assert checked_schedule(range(0, 10, 3)) == (0, 3, 6, 9)
    assert checked_schedule(np.asarray([0, 3, 9])) == (0, 3, 9)
