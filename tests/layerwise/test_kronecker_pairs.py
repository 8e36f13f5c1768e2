"""Leading eigenpairs of a Kronecker product, against the product itself."""

import numpy as np
import pytest

from hesscope.core.errors import DataError, InputError
from hesscope.layerwise.kronecker_pairs import kronecker_pairs
from tests.layerwise.planted import planted_factor

MU, NU = np.array([10.0, 3, 1, 0.4]), np.array([7.0, 2.5, 1.1, 0.3, 0.05])
K = 9


def factors(seed=0):
    return planted_factor(MU, seed), planted_factor(NU, seed + 1)


def test_pairs_are_those_of_the_product():
    A, B = factors()
    pairs = kronecker_pairs(A, B, K)
    values, vectors = np.linalg.eigh(np.kron(A, B))
    assert np.allclose(pairs.values, values[::-1][:K], rtol=1e-12)
    inner = vectors[:, ::-1][:, :K].T @ pairs.matrices().reshape(K, -1).T
    assert np.allclose(inner**2, np.eye(K), atol=1e-10)
    assert np.allclose(MU[pairs.output_index] * NU[pairs.input_index], pairs.values, rtol=1e-12)
    assert np.allclose(pairs.rest(), [(values[:-K] ** order).sum() for order in (1, 2, 3)], rtol=1e-10)


def test_squared_products_without_the_vectors():
    """With matrices and with another product's eigenvectors: as from vectors of out * in entries."""
    # Another spectrum, too: the leading pairs are other combinations (a, b).
    pairs = kronecker_pairs(*factors(), K)
    other = kronecker_pairs(planted_factor(MU**0.3, 5), planted_factor(NU**2, 6), K)
    assert not np.array_equal(pairs.input_index[:4], other.input_index[:4])
    own, others = pairs.matrices().reshape(K, -1), other.matrices().reshape(K, -1)
    truth = (own @ others.T) ** 2
    assert np.allclose(pairs.squared_products_with(other, K), truth, atol=1e-14)
    assert np.allclose(pairs.squared_products_with(other, 4), truth[:4, :4], atol=1e-14)
    assert np.allclose(pairs.squared_products(other.matrices()), truth.T, atol=1e-14)


def test_scale_does_not_matter():
    A, B = factors()
    small = kronecker_pairs(A * 1e-14, B * 1e-14, K)
    assert np.array_equal(small.output_index, kronecker_pairs(A, B, K).output_index)


@pytest.mark.parametrize(
    ("output", "input", "k", "error", "message"),
    [
        (np.eye(2), np.eye(3), 7, InputError, r"k must be at most out \* in = 2 \* 3 = 6, got 7"),
        (np.eye(2), np.eye(3), 0, InputError, "k must be a positive integer, got 0"),
        (np.ones((2, 3)), np.eye(3), 1, InputError, r"output must be a square matrix, got shape \[2, 3\]"),
        (np.eye(2), np.triu(np.ones((2, 2))), 1, InputError, "input must be symmetric, but it differs .* by 1"),
        (np.eye(2) * np.nan, np.eye(3), 1, DataError, "factor output is not finite"),
    ],
)
def test_bad_factors(output, input, k, error, message):
    with pytest.raises(error, match=message):
        kronecker_pairs(output, input, k)
