"""The papers' data sets: shapes, distributions, seeds."""

import pytest
import torch
from torch.nn import functional

from hesscope.core.errors import DataError, InputError
from hesscope.core.rng import stream
from hesscope.data import LabelledData, clusters, digits, gaussian
from tests.helpers import F64


def test_digits():
    data = digits(dtype=F64)
    assert data.inputs.shape == (1797, 64)
    assert data.classes == 10
    assert sorted(set(data.labels.tolist())) == list(range(10))
    assert data.labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_digits_are_standardized_pixel_by_pixel():
    raw, data = digits(standardize=False, dtype=F64).inputs, digits(dtype=F64).inputs
    assert raw.min() == 0
    assert raw.max() == 1
    constant = raw.std(dim=0) == 0
    assert 0 < constant.sum() < 10
    assert torch.all(data[:, constant] == 0)
    assert data.mean(dim=0).abs().max() < 1e-13
    assert (data[:, ~constant].var(dim=0, correction=0) - 1).abs().max() < 1e-12
    # and nothing else was done to them
    pixel = 20
    assert torch.corrcoef(torch.stack([raw[:, pixel], data[:, pixel]]))[0, 1] > 1 - 1e-12


def test_digits_as_images_are_the_same_digits():
    data = digits(image=True)
    assert data.inputs.shape == (1797, 1, 8, 8)
    assert torch.equal(data.inputs.flatten(1), digits().inputs)
    # rows are rows: the outermost columns of the digits are empty nearly always, the outermost rows are not
    grey = digits(standardize=False, image=True).inputs.mean(dim=(0, 1))
    assert grey[:, [0, -1]].max() < 0.05 < grey[[0, -1]].mean(dim=1).min()


@pytest.mark.parametrize("make", [digits, lambda **kw: gaussian(5, 3, 2, **kw), lambda **kw: clusters(5, 3, 2, **kw)])
def test_dtype(make):
    assert make().inputs.dtype == torch.get_default_dtype()
    assert make(dtype=F64).inputs.dtype == F64
    assert make().labels.dtype == torch.int64


def test_gaussian_inputs_are_isotropic_and_labels_uniform_and_independent():
    N, d, C = 20000, 6, 4
    data = gaussian(N, d, C, seed=1, dtype=F64)
    x, y = data.inputs, data.labels
    assert x.shape == (N, d)
    assert x.mean(dim=0).abs().max() < 4 / N**0.5
    off = torch.cov(x.T) - torch.eye(d, dtype=F64)
    assert off.abs().max() < 4 * (2 / N) ** 0.5
    assert abs((x**4).mean() - 3) < 4 * (96 / (N * d)) ** 0.5
    assert (y.bincount() / N - 1 / C).abs().max() < 4 * (0.25 * 0.75 / N) ** 0.5
    means = torch.stack([x[y == c].mean(dim=0) for c in range(C)])
    assert means.abs().max() < 4.5 / (N / C) ** 0.5


def test_cluster_centres_are_on_the_unit_sphere():
    data = clusters(400, 8, 5, noise=0.0, seed=2, dtype=F64)
    assert (data.inputs.norm(dim=1) - 1).abs().max() < 1e-14
    centres = torch.unique(data.inputs, dim=0)
    assert len(centres) == 5
    for c in range(5):
        assert len(torch.unique(data.inputs[data.labels == c], dim=0)) == 1


def test_cluster_noise_is_005_in_every_direction():
    noisy, clean = clusters(5000, 8, 5, seed=2, dtype=F64), clusters(5000, 8, 5, noise=0.0, seed=2, dtype=F64)
    assert torch.equal(noisy.labels, clean.labels)
    noise = (noisy.inputs - clean.inputs) / 0.05
    assert noise.mean(dim=0).abs().max() < 4 / 5000**0.5
    assert (torch.cov(noise.T) - torch.eye(8, dtype=F64)).abs().max() < 4 * (2 / 5000) ** 0.5


@pytest.mark.parametrize("make", [gaussian, clusters])
def test_seeds(make):
    a, again, b = (make(50, 4, 3, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(a.inputs, again.inputs)
    assert torch.equal(a.labels, again.labels)
    assert not torch.any(a.inputs == b.inputs)
    assert not torch.equal(a.labels, b.labels)


@pytest.mark.parametrize("make", [gaussian, clusters])
def test_no_global_randomness_is_used(make):
    before = torch.get_rng_state()
    make(5, 4, 3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("make", [gaussian, clusters])
@pytest.mark.parametrize(("sizes", "name"), [((0, 4, 3), "N"), ((5, -1, 3), "d"), ((5, 4, 2.0), "C")])
def test_bad_sizes(make, sizes, name):
    with pytest.raises(InputError, match=f"^{name} must be a positive integer, got"):
        make(*sizes)


# --- LabelledData -----------------------------------------------------------------------------------------------------


def test_targets_for_either_loss():
    data = gaussian(7, 4, 3)
    x, y = data.batch("cross_entropy")
    assert torch.equal(x, data.inputs) and torch.equal(y, data.labels)
    x, y = data.batch("mse")
    assert torch.equal(y, functional.one_hot(data.labels, 3).to(x.dtype))
    assert y.dtype == x.dtype


def test_one_hot_has_a_column_for_classes_that_do_not_occur():
    data = LabelledData("d", torch.zeros(2, 1), torch.tensor([0, 1]), 4)
    assert data.one_hot.shape == (2, 4)


def test_split_is_disjoint_complete_and_keeps_pairs():
    data = LabelledData("d", torch.arange(10.0)[:, None], torch.arange(10), 10)
    a, b = data.split(3, stream(0, "split"))
    assert (len(a), len(b)) == (3, 7)
    assert sorted([*a.labels.tolist(), *b.labels.tolist()]) == list(range(10))
    assert torch.equal(a.inputs[:, 0].long(), a.labels)
    assert a.labels.tolist() != [0, 1, 2]


@pytest.mark.parametrize(
    ("inputs", "labels", "message"),
    [
        (3, [0, 1], "d: 3 inputs but 2 labels"),
        (2, [0, 2], r"labels must lie in \[0, 2\)"),
        (2, [-1, 0], "labels must lie"),
    ],
)
def test_bad_labelled_data(inputs, labels, message):
    with pytest.raises(DataError, match=message):
        LabelledData("d", torch.zeros(inputs, 1), torch.tensor(labels), 2)
