"""The population of patches: which pixels, independent and uniform draws, every patch once."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.datasets import load_sample_images

from hesscope.core.errors import InputError
from hesscope.data import PatchPopulation, patch_population
from tests.helpers import F64

PICTURES = np.stack(load_sample_images().images)  # [2, 427, 640, 3]

# Moments of the colours from sums of whole numbers, which are exact.
WHOLE = PICTURES.astype(np.int64)
PIXELS, SUMS, SQUARES = 2 * 427 * 640, WHOLE.sum(axis=(0, 1, 2)), (WHOLE**2).sum(axis=(0, 1, 2))
SCALED = (PIXELS * WHOLE - SUMS) / np.sqrt(PIXELS * SQUARES - SUMS**2)

MARGIN = 1e-4  # chi-square tests with fixed seeds: this or less would be seen once in ten thousand


def numbered(height=427, width=640, size=8):
    """A population whose pixels are their own numbers: a patch says where it is from by its first pixel."""
    pixels = torch.arange(2 * height * width, dtype=F64).view(2, 1, height, width)
    return PatchPopulation("numbered", pixels, size, flat=True)


def places(inputs):
    """(picture, top, left), [n] each, of patches of the numbered population."""
    return np.unravel_index(inputs[:, 0].long().numpy(), (2, 427, 640))


def tiny():
    """2 pictures of 2 x 2 positions: 8 patches, which begin with the pixels 0, 1, 3, 4 and 9, 10, 12, 13."""
    return numbered(height=3, width=3, size=2)


def numbers(inputs):
    """Numbers in 0 ... 7 of patches of the tiny population."""
    return np.searchsorted([0, 1, 3, 4, 9, 10, 12, 13], inputs[:, 0].numpy())


def memory(tensor):
    """Bytes that the tensor keeps alive (a number of its own: a failing test would print a storage byte by byte)."""
    return tensor.untyped_storage().nbytes()


def uniform(counts):
    return stats.chisquare(np.ravel(counts)).pvalue > MARGIN


# --- which pixels -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "patches"), [(1, 2 * 427 * 640), (8, 531720), (427, 2 * 214)])
def test_there_is_a_patch_at_every_position(size, patches):
    population = patch_population(size)
    assert len(population) == patches
    assert population.classes == 2
    assert population.name == f"{size} x {size} patches of scikit-learn's photographs, at every position"


@pytest.mark.parametrize("size", [8, 11])
def test_patches_are_the_pixels_at_their_position(size):
    rows, columns = 427 - size + 1, 640 - size + 1
    population = patch_population(size, dtype=F64, flat=False)
    corners = [(p, top, left) for p in (0, 1) for top in (0, rows - 1) for left in (0, columns - 1)]
    inside = [(0, 17, 401), (1, 230, 5), (1, 101, 599), (0, 233, 234)]
    found = population.take([(p * rows + top) * columns + left for p, top, left in corners + inside])
    assert found.inputs.shape == (12, 3, size, size) and found.inputs.dtype == F64
    assert found.name == population.name and found.classes == 2
    for (p, top, left), patch, label in zip(corners + inside, found.inputs.numpy(), found.labels.tolist(), strict=True):
        truth = SCALED[p, top : top + size, left : left + size].transpose(2, 0, 1)
        assert np.abs(patch - truth).max() < 1e-12
        assert label == p


def test_flat_is_the_same_pixel_by_pixel():
    indices = [3, 3, 531719, 0]
    vectors, images = patch_population().take(indices), patch_population(flat=False).take(indices)
    assert vectors.inputs.shape == (4, 192)
    assert torch.equal(vectors.inputs.view(4, 3, 8, 8), images.inputs)
    assert torch.equal(vectors.inputs[0], vectors.inputs[1]) and not torch.equal(vectors.inputs[0], vectors.inputs[2])


def test_scaling_is_the_populations_whatever_is_taken():
    population = patch_population()
    sky = population.take([0, 1, 2])
    assert torch.equal(population.take([1]).inputs[0], sky.inputs[1])
    assert sky.inputs.std(dim=0).max() < 0.5  # neighbours are alike: had they been scaled by themselves, this were 1
    everything = patch_population(size=1, dtype=F64)
    pixels = torch.cat([inputs for inputs, _ in everything.batches(100000)])
    assert pixels.mean(dim=0).abs().max() < 1e-12
    assert (pixels.var(dim=0, correction=0) - 1).abs().max() < 1e-12


def test_dtype():
    assert patch_population().take([0]).inputs.dtype == torch.get_default_dtype() == torch.float32
    assert patch_population(dtype=F64).draw(2, seed=0).inputs.dtype == F64
    inputs, labels = next(patch_population(dtype=F64).batches(2))
    assert inputs.dtype == F64 and labels.dtype == torch.int64
    try:
        torch.set_default_dtype(F64)
        assert patch_population().take([0]).inputs.dtype == F64
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "kind", [list, np.array, torch.tensor, lambda indices: torch.tensor(indices, dtype=torch.int32)]
)
def test_indices_of_any_kind(kind):
    found = tiny().take(kind([7, 0, 7]))
    assert numbers(found.inputs).tolist() == [7, 0, 7]
    assert found.labels.tolist() == [1, 0, 1]


# --- draws ------------------------------------------------------------------------------------------------------------


def test_draws_are_uniform_over_pictures_and_positions():
    data = numbered().draw(100000, seed=0)
    picture, top, left = places(data.inputs)
    assert data.labels.tolist() == picture.tolist()
    assert top.max() < 420 and left.max() < 633
    # 420 = 12 * 35 rows and 633 = 3 * 211 columns make 72 cells of one size, of 1389 draws each on average
    cells = np.ravel_multi_index((picture, top // 35, left // 211), (2, 12, 3))
    assert uniform(np.bincount(cells, minlength=72))
    # within a cell, too
    assert uniform(np.bincount(top % 35, minlength=35)) and uniform(np.bincount(left % 211, minlength=211))


def test_draws_are_with_replacement_and_independent_of_each_other():
    population = tiny()
    assert len(population) == 8
    drawn = numbers(population.draw(40000, seed=0).inputs)  # more than there are
    assert uniform(np.bincount(drawn, minlength=8))
    for lag in (1, 2, 3):
        pairs = np.bincount(8 * drawn[:-lag] + drawn[lag:], minlength=64)
        assert uniform(pairs)


def test_repetitions_are_as_frequent_as_birthdays():
    population, n = numbered(), 40000
    N = len(population)
    distinct = N * (1 - (1 - 1 / N) ** n)  # of n independent ones, on average: 1467 fewer than n
    found = [len(torch.unique(population.draw(n, seed).inputs[:, 0])) for seed in range(4)]
    deviation = (n**2 / (2 * N)) ** 0.5  # the number of repetitions is nearly Poisson
    assert abs(np.mean(found) - distinct) < 4 * deviation / len(found) ** 0.5


def test_seeds():
    population = patch_population(dtype=F64)
    a, again, b = (population.draw(2000, seed) for seed in (0, 0, 1))
    assert torch.equal(a.inputs, again.inputs) and torch.equal(a.labels, again.labels)
    assert (a.inputs == b.inputs).all(dim=1).sum() < 5
    assert abs(int((a.labels == b.labels).sum()) - 1000) < 4 * 500**0.5
    before = torch.get_rng_state()
    population.draw(3, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


# --- all of them ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 4, 8, 100])
def test_batches_have_every_patch_once_in_order(batch_size):
    batches = list(tiny().batches(batch_size))
    assert [len(inputs) for inputs, _ in batches[:-1]] == [batch_size] * (len(batches) - 1)
    inputs, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert numbers(inputs).tolist() == list(range(8))
    assert labels.tolist() == [0] * 4 + [1] * 4
    assert torch.equal(inputs, tiny().take(range(8)).inputs)


def test_the_exact_risk_of_a_classifier():
    """Of one that goes by a single pixel, against all positions of that pixel at once."""
    population = patch_population(dtype=F64)
    seen = wrong = 0
    for inputs, labels in population.batches(50000):
        # a batch holds its own patches, and is no part of something larger
        assert memory(inputs) == inputs.nbytes <= 50000 * 192 * 8
        wrong += int(((inputs[:, 64 + 3 * 8 + 2] > 0.3) != labels.bool()).sum())  # green, row 3, column 2
        seen += len(labels)
    green = SCALED[:, 3 : 3 + 420, 2 : 2 + 633, 1]
    assert seen == green.size == 531720
    assert wrong == (green[0] > 0.3).sum() + (green[1] <= 0.3).sum()
    assert 0.1 < wrong / seen < 0.9


def test_nothing_but_the_pictures_is_kept():
    population = patch_population()
    assert population.pictures.shape == (2, 3, 427, 640)
    assert memory(population.pictures) == population.pictures.nbytes
    assert isinstance(population.batches(10), Iterator)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "size must be a positive integer, got 0"),
        ({"size": 8.0}, "size must be a positive integer, got 8.0"),
        ({"size": 428}, "size must be at most 427, the height of the photographs, got 428"),
        ({"dtype": torch.int64}, "dtype must be floating-point, got torch.int64"),
    ],
)
def test_bad_populations(arguments, message):
    with pytest.raises(InputError, match=f"^{message}$"):
        patch_population(**arguments)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([0, 8], r"indices must lie in \[0, 8\), got 8"),
        ([0, -1], r"indices must lie in \[0, 8\), got -1"),
        ([[0, 1]], r"indices must be a list of integers, got torch.int64 of shape \[1, 2\]"),
        (3, r"indices must be a list of integers, got torch.int64 of shape \[\]"),
        ([0.0], r"indices must be a list of integers, got torch.float32 of shape \[1\]"),
        ([True], r"indices must be a list of integers, got torch.bool of shape \[1\]"),
        ("all", "indices must be a list of integers, got 'all'"),
        (None, "indices must be a list of integers, got None"),
    ],
)
def test_bad_indices(indices, message):
    with pytest.raises(InputError, match=f"^{message}$"):
        tiny().take(indices)


@pytest.mark.parametrize("number", [0, -3, 2.5, True])
def test_bad_numbers(number):
    with pytest.raises(InputError, match=f"^n must be a positive integer, got {number}$"):
        tiny().draw(number, seed=0)
    with pytest.raises(InputError, match=f"^batch_size must be a positive integer, got {number}$"):
        tiny().batches(number)
