"""Named random streams: reproducible, independent of each other, of neighbouring seeds and of the global state."""

import itertools

import numpy as np
import pytest
import torch

from hesscope.core.rng import coarse, normal, permutation, rademacher, stream

STABLE = ([2103944794540515662, 1816841703634951176], [1802173601775556762, 4594238132762839805])
PATHS = [(), ("a",), ("b",), ("a", "b"), ("b", "a"), ("a", 0), ("a", 1), ("ab",)]


def normals(seed, *path, size=4096):
    return normal((size,), stream(seed, *path))


def test_same_seed_and_path_same_numbers():
    assert torch.equal(normals(0, "a", 1), normals(0, "a", 1))


def test_streams_are_stable_across_versions():
    """Published numbers must stay reproducible: these values must never change."""
    assert stream(0, "block_energies", 0).integers(0, 2**62, 2).tolist() == STABLE[0]
    assert stream(7).integers(0, 2**62, 2).tolist() == STABLE[1]


def test_no_two_streams_are_alike():
    """In particular those of seeds 0 and 1, which share all but one stream with `seed + i`.

    20,000 of PyTorch's CPU generators, which read 32 bits of a seed, would coincide here with some 4 % probability.
    """
    paths = [*((seed, *path) for seed in range(50) for path in PATHS), (0, "a/b")]
    paths += [(seed, "probe", k) for seed in range(4) for k in range(5000)]
    first = [int(stream(*path).integers(0, 2**62)) for path in paths]
    assert len(set(first)) == len(first)


def test_streams_are_uncorrelated():
    """The correlation of 4096 normals has standard deviation 1/64 if they are independent."""
    samples = np.stack([normals(seed, *path).numpy() for seed in (0, 1) for path in PATHS])
    correlation = np.corrcoef(samples)
    worst = max(abs(correlation[i, j]) for i, j in itertools.combinations(range(len(samples)), 2))
    assert worst < 4.5 / 64


def test_the_global_state_is_neither_used_nor_changed():
    torch.manual_seed(1)
    first = normals(0, "a")
    before = torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(normals(0, "a"), first)
    torch.manual_seed(1)
    normals(0, "a")
    assert torch.equal(torch.get_rng_state(), before)


def test_rademacher_draws_fair_signs():
    signs = rademacher(40000, stream(0, "signs"))
    assert signs.dtype == torch.int8
    assert set(signs.tolist()) == {-1, 1}
    assert abs(signs.double().mean()) < 4 / 200
    neighbours = (signs[1:] * signs[:-1]).double().mean()
    assert abs(neighbours) < 4 / 200


def test_coarse_numbers_are_uniform_and_none_is_zero():
    numbers = coarse((2, 200_000), stream(3, "coarse")).double()
    values, counts = numbers.unique(return_counts=True)
    assert torch.equal(values, torch.arange(-255, 256, 2) / 256)
    assert (counts / counts.double().mean() - 1).abs().max() < 4 / 1560**0.5
    assert abs(float((numbers[0] * numbers[1]).mean())) < 4 / 3 / 200_000**0.5
    assert torch.equal(numbers.float(), coarse((2, 200_000), stream(3, "coarse")))


@pytest.mark.parametrize("size", [0, 1, 7])
def test_rademacher_sizes(size):
    assert rademacher(size, stream(0)).shape == (size,)


def test_permutation_is_one():
    order = permutation(50, stream(0, "order"))
    assert sorted(order.tolist()) == list(range(50))
    assert order.tolist() != list(range(50))
