"""Patches of the two photographs: pixels, labels, overlap, the draw."""

from collections import defaultdict
from functools import cache

import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_images

from hesscope.core.errors import InputError
from hesscope.core.rng import stream
from hesscope.data import photographs
from tests.helpers import F64

PICTURES = np.stack(load_sample_images().images)  # [2, 427, 640, 3]
SIZE = 16  # of patches that are looked for


@cache
def positions():
    """First row of pixels of every possible patch -> all (photograph, top, left) where it is."""
    found = defaultdict(list)
    for photograph, picture in enumerate(PICTURES):
        for top in range(427 - SIZE + 1):
            row = picture[top].tobytes()
            for left in range(640 - SIZE + 1):
                found[row[3 * left : 3 * (left + SIZE)]].append((photograph, top, left))
    return found


def places(data):
    """(photograph, top, left) of every patch, found by its pixels in the photographs; None if it is there twice."""
    found = []
    for patch in (data.inputs * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy():
        fits = [
            (photograph, top, left)
            for photograph, top, left in positions()[patch[0].tobytes()]
            if np.array_equal(PICTURES[photograph, top : top + SIZE, left : left + SIZE], patch)
        ]
        found.append(fits[0] if len(fits) == 1 else None)
    return found


def test_all_patches_cover_the_photographs_once():
    data = photographs(size=8, standardize=False, dtype=F64)
    assert data.inputs.shape == (2 * 53 * 80, 3, 8, 8)
    assert data.classes == 2
    assert data.labels.bincount().tolist() == [4240, 4240]
    found = (data.inputs * 255).round().long()
    assert torch.equal(found.to(F64) / 255, data.inputs)
    # every pixel of every colour is there as often as in the photographs (three rows of which are left over)
    for label in (0, 1):
        for colour in range(3):
            counts = found[data.labels == label][:, colour].flatten().bincount(minlength=256)
            truth = np.bincount(PICTURES[label, :424, :, colour].ravel(), minlength=256)
            assert counts.tolist() == truth.tolist()


def test_patches_lie_where_their_labels_say():
    data = photographs("region", size=SIZE, regions=(2, 4), samples=300, seed=3, standardize=False)
    assert data.classes == 16
    found = [place for place in zip(places(data), data.labels.tolist(), strict=True) if place[0] is not None]
    assert len(found) > 200  # the sky is blue in many places
    for (photograph, top, left), label in found:
        assert top % 16 == left % 16 == 0
        row, column = top // 16, left // 16  # of 26 rows and 40 columns
        assert label == photograph * 8 + (row >= 13) * 4 + column // 10


def test_without_a_stride_no_two_patches_share_a_pixel_and_with_one_they_do():
    assert len(photographs(stride=4)) == 2 * 105 * 159 == 33390
    plain = {place for place in places(photographs(size=SIZE, samples=500, standardize=False)) if place}
    assert all(top % 16 == left % 16 == 0 for _, top, left in plain)
    dense = {place for place in places(photographs(size=SIZE, stride=5, samples=500, standardize=False)) if place}
    assert all(top % 5 == left % 5 == 0 for _, top, left in dense)
    assert any(top % 16 for _, top, _ in dense)


def test_regions_are_as_large_as_each_other():
    counts = photographs("region", regions=(3, 7)).labels.bincount()
    assert len(counts) == 42
    rows, columns = {17, 18}, {11, 12}  # 53 / 3 and 80 / 7
    assert set(counts.tolist()) <= {a * b for a in rows for b in columns}
    assert counts.sum() == 8480


def test_standardized_by_colour_over_both_photographs():
    raw, data = (photographs(samples=500, standardize=standardize, dtype=F64) for standardize in (False, True))
    for colour in range(3):
        values = PICTURES[..., colour] / 255
        truth = (raw.inputs[:, colour] - values.mean()) / values.std()
        assert (data.inputs[:, colour] - truth).abs().max() < 1e-12
    everything = photographs(size=1, dtype=F64).inputs  # patches of a pixel leave nothing over
    assert everything.mean(dim=(0, 2, 3)).abs().max() < 1e-12
    assert (everything.var(dim=(0, 2, 3), correction=0) - 1).abs().max() < 1e-12


def test_flat_is_the_same_pixel_by_pixel():
    images, vectors = photographs(samples=50), photographs(samples=50, flat=True)
    assert vectors.inputs.shape == (50, 192)
    assert torch.equal(vectors.inputs.view(50, 3, 8, 8), images.inputs)


def test_the_draw_depends_on_the_seed_only():
    a, again, b = (photographs(samples=400, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(a.inputs, again.inputs) and torch.equal(a.labels, again.labels)
    assert not torch.equal(a.labels, b.labels)
    assert torch.equal(photographs(samples=100).inputs, a.inputs[:100])
    assert a.inputs.dtype == torch.get_default_dtype() and photographs(samples=3, dtype=F64).inputs.dtype == F64
    # balanced on average: 400 of 8480 without repetition
    assert abs(int(a.labels.sum()) - 200) < 4 * 10
    before = torch.get_rng_state()
    photographs(samples=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_random_split_of_plain_patches_shares_no_pixel():
    data = photographs(size=SIZE, standardize=False)
    first, second = data.split(1000, stream(0, "split"))
    a, b = (set(places(part)) - {None} for part in (first, second))
    assert len(a) > 700 and not a & b


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "regions"}, "kind must be one of 'photograph', 'region', got 'regions', did you mean 'region'"),
        ({"size": 0}, "size must be a positive integer, got 0"),
        ({"size": 428}, "size must be at most 427, the height of the photographs, got 428"),
        ({"stride": 0}, "stride must be a positive integer, got 0"),
        ({"samples": 8481}, "samples must be at most 8480, all there are, got 8481"),
        ({"samples": 0}, "samples must be a positive integer, got 0"),
        ({"kind": "region", "regions": (2,)}, r"regions must be \(rows, columns\), got \(2,\)"),
        ({"kind": "region", "regions": (0, 2)}, "rows of regions must be a positive integer, got 0"),
        (
            {"kind": "region", "regions": (2, 81)},
            "columns of regions must be at most 80, those of the patches, got 81",
        ),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(InputError, match=f"^{message}"):
        photographs(**arguments)
