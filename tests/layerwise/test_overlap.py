"""Overlap of subspaces: its two ends, chance, and what must not change it."""

import numpy as np
import pytest
import torch

from hesscope.core.errors import DataError, InputError
from hesscope.layerwise.overlap import overlap, overlap_curve
from tests.helpers import randn

P, K = 60, 7


def basis(seed, size=P, k=K):
    return torch.linalg.qr(randn(size, k, seed=seed)).Q


def test_a_subspace_overlaps_itself_wholly():
    U = basis(0)
    assert abs(overlap(U, U) - 1) < 1e-14
    assert np.allclose(overlap_curve(U, U), 1, atol=1e-14)


def test_orthogonal_subspaces_do_not_overlap():
    Q = torch.linalg.qr(randn(P, 2 * K, seed=1)).Q
    assert overlap(Q[:, :K], Q[:, K:]) < 1e-28


def test_partly_shared_subspaces():
    """Shared columns count one each, and a column at an angle its squared cosine."""
    Q = torch.linalg.qr(randn(P, 8, seed=2)).Q
    tilted = 0.6 * Q[:, 2] + 0.8 * Q[:, 5]
    V = torch.stack([Q[:, 0], Q[:, 1], tilted, Q[:, 6]], dim=1)
    assert abs(overlap(Q[:, :4], V) - (2 + 0.36) / 4) < 1e-14
    assert np.allclose(overlap_curve(Q[:, :4], V), [1, 1, 2.36 / 3, 2.36 / 4], atol=1e-14)


@pytest.mark.parametrize("which", ["first", "second"])
def test_rotating_either_basis_changes_nothing(which):
    U, V, rotation = basis(3), basis(4), torch.linalg.qr(randn(K, K, seed=5)).Q
    turned = (U @ rotation, V) if which == "first" else (U, V @ rotation)
    assert abs(overlap(*turned) - overlap(U, V)) < 1e-14


def test_random_subspaces_overlap_by_chance():
    found = np.array([overlap(basis(2 * seed, k=K), basis(2 * seed + 1, k=K)) for seed in range(800)])
    z = (found.mean() - K / P) / (found.std(ddof=1) / np.sqrt(len(found)))
    assert abs(z) < 4
    assert found.std() / np.sqrt(len(found)) < 0.03 * K / P / 4  # a bias of 3 % would be seen


def test_the_curve_is_the_overlap_of_the_leading_columns():
    U, V = basis(6), basis(7)
    truth = [overlap(U[:, :k], V[:, :k]) for k in range(1, K + 1)]
    assert np.allclose(overlap_curve(U, V), truth, rtol=1e-12)
    assert len(set(np.round(truth, 6))) == K


def test_arrays_and_single_precision():
    U, V = basis(8), basis(9)
    assert overlap(U.numpy(), V.numpy()) == overlap(U, V)
    assert abs(overlap(U.float(), V.float()) - overlap(U, V)) < 1e-6


@pytest.mark.parametrize(
    ("U", "V", "error", "message"),
    [
        (basis(0), basis(0)[:, :3], InputError, r"U and V must have one shape \[P, k\], got \[60, 7\] and \[60, 3\]"),
        (basis(0), basis(0, size=50), InputError, "one shape"),
        (2 * basis(0), basis(0), InputError, "columns of U must be orthonormal, but U.T U .* up to 3 "),
        (basis(0), basis(0)[:, [0, 0]], InputError, "columns of V must be orthonormal, .* up to 1 "),
        (torch.eye(3).double()[:2], torch.eye(3).double()[:2], InputError, "k = 3 columns of P = 2 entries"),
        (basis(0)[:, 0], basis(0), InputError, r"U must be a matrix \[P, k\]"),
        (np.eye(3, dtype=int), np.eye(3), InputError, "real floating-point numbers, got int64"),
        (basis(0) * torch.nan, basis(0), DataError, "U is not finite"),
    ],
)
def test_bad_bases(U, V, error, message):
    with pytest.raises(error, match=message):
        overlap(U, V)
