"""Many weights: the law from fewer atoms against the law from all of them."""

import numpy as np
import pytest

from hesscope.core.rng import stream
from hesscope.theory import compression
from hesscope.theory.atoms import distinct_atoms
from hesscope.theory.compression import FEW, MANY, few_atoms
from hesscope.theory.spectral_law import SpectralLaw

N = 8000


def softmax(rng, scale):
    logits = scale * rng.standard_normal((N, 10))
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


def variance(p):
    return p[:, 0] * (1 - p[:, 0])


WEIGHTS = {
    "normal": lambda rng: rng.standard_normal(N),
    "heavy tail": lambda rng: np.exp(2 * rng.standard_normal(N)),
    "p(1-p)": lambda rng: variance(softmax(rng, 1)),
    "p(1-p), confident": lambda rng: variance(softmax(rng, 3)),
    "negative": lambda rng: -np.prod(softmax(rng, 1)[:, :2], axis=1),
    "half zero": lambda rng: np.maximum(rng.standard_normal(2 * N), 0),
}
CASES = [("normal", 0.1), ("heavy tail", 0.1), ("p(1-p)", 0.1), ("p(1-p), confident", 0.1), ("half zero", 0.1)]
CASES += [("normal", 0.5), ("p(1-p), confident", 0.5), ("negative", 0.5)]
CASES += [
    ("p(1-p), confident", 8.0),
    ("heavy tail", 2.0),
    ("p(1-p)", 2.0),
    ("p(1-p), confident", 2.0),
    ("negative", 2.0),
]


def draw(name):
    return WEIGHTS[name](stream(0, "compression", name))


def exact(monkeypatch, *arguments, **options):
    """The law from all atoms."""
    with monkeypatch.context() as context:
        context.setattr(compression, "MANY", 10**9)
        return SpectralLaw(*arguments, **options)


def compared(law, truth, points=60):
    """Errors of the edges, relative to the largest, and of the density, relative to its peak."""
    edges, found = np.asarray(truth.support), np.asarray(law.support)
    assert found.shape == edges.shape
    (a, b), spread = (edges[0, 0], edges[-1, 1]), truth.moment(2) ** 0.5
    x = np.concatenate((np.linspace(a, b, points)[1:-1], truth.moment(1) + spread * np.linspace(-2, 2, points)))
    density = truth.density(x)
    return np.abs(found - edges).max() / np.abs(edges).max(), np.abs(law.density(x) - density).max() / density.max()


@pytest.mark.parametrize(("name", "gamma"), CASES)
def test_the_law_from_fewer_atoms(name, gamma, monkeypatch):
    weights = draw(name)
    law, truth = SpectralLaw(weights, gamma), exact(monkeypatch, weights, gamma)
    assert len(law._equation.weights.values) < 0.7 * len(truth._equation.weights.values)
    edges, density = compared(law, truth)
    assert edges < 1e-6
    assert density < 1e-6
    assert law.atom_at_zero == pytest.approx(truth.atom_at_zero, abs=1e-13)


def test_the_distribution_function_from_fewer_atoms(monkeypatch):
    weights = draw("p(1-p)")
    law, truth = SpectralLaw(weights, 0.5), exact(monkeypatch, weights, 0.5)
    x = np.linspace(truth.support[0][0], truth.support[-1][1], 101)
    np.testing.assert_allclose(law.cdf(x), truth.cdf(x), atol=1e-8)
    np.testing.assert_allclose(law.quantile([0.01, 0.5, 0.99]), truth.quantile([0.01, 0.5, 0.99]), rtol=1e-7)


@pytest.mark.parametrize("gamma", [0.2, 1.0, 3.0])
def test_many_eigenvalues_of_the_covariance(gamma, monkeypatch):
    """With lambda = 1 the covariance's eigenvalues are the weights of the companion, at 1 / gamma: the same atoms."""
    t = draw("p(1-p)")
    law = SpectralLaw([1.0], gamma, covariance=t)
    assert len(law._equation.spectrum.values) < N / 2
    twin = exact(monkeypatch, t, 1 / gamma)
    np.testing.assert_allclose(law.support, gamma * np.asarray(twin.support), rtol=1e-6)
    x = np.linspace(law.support[0][0], law.support[-1][1], 60)[1:-1]
    truth = twin.density(x / gamma) / gamma**2
    assert np.abs(law.density(x) - truth).max() < 1e-6 * truth.max()


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("level", [0.1, 1.0, 10.0])
def test_mass_and_moments_stay(name, level):
    atoms = distinct_atoms(draw(name), None, "weights", "probabilities")
    few = few_atoms(atoms, level)
    assert FEW <= len(few.values) < len(atoms.values)
    assert (np.diff(few.values) > 0).all()
    assert (few.masses > 0).all()
    for k in range(4):
        scale = atoms.masses @ np.abs(atoms.values) ** k
        assert few.masses @ few.values**k == pytest.approx(atoms.masses @ atoms.values**k, abs=1e-13 * scale)
    assert (few.values[[0, -1]] == atoms.values[[0, -1]]).all()
    negative = atoms.masses[atoms.values < 0].sum()
    assert few.masses[few.values < 0].sum() == pytest.approx(negative, abs=1e-13)


def test_few_atoms_stay_as_they_are():
    atoms = distinct_atoms(np.arange(1.0, MANY + 1), None, "weights", "probabilities")
    assert few_atoms(atoms, 0.5) is atoms


def test_orders_of_magnitude():
    """Clusters 100 decades apart: nothing under- or overflows, and each keeps its own mass and mean."""
    cluster = stream(0, "compression", "cluster").uniform(0.5, 1, MANY)
    scales = np.asarray([1e-200, 1e-100, 1.0])
    atoms = distinct_atoms(np.outer(scales, cluster / cluster.max()).ravel(), None, "weights", "probabilities")
    few = few_atoms(atoms, 0.5)
    assert FEW <= len(few.values) < len(atoms.values) / 2
    for scale in (1e-200, 1e-100, 1.0):
        inside = (few.values > scale / 10) & (few.values < scale * 10)
        assert few.masses[inside].sum() == pytest.approx(1 / 3, rel=1e-12)
        mean = cluster.mean() / cluster.max()
        assert few.masses[inside] @ (few.values[inside] / scale) == pytest.approx(mean / 3, rel=1e-12)


@pytest.mark.parametrize("sign", [1, -1])
def test_small_weights_beside_large_ones_of_the_other_sign(sign, monkeypatch):
    """Most weights 1e-9 of the others: their part of the law, at its peak, is as accurate as if they were alone."""
    small = stream(0, "compression", "small").lognormal(0.0, 1.0, 6000)
    weights = sign * np.concatenate((1e-9 * small, [-1.0, -2.0]))
    law, truth = SpectralLaw(weights, 2.0), exact(monkeypatch, weights, 2.0)
    assert len(law._equation.weights.values) < 5000
    x = sign * np.geomspace(1e-10, 1e-7, 60)
    np.testing.assert_allclose(law.density(x), truth.density(x), rtol=1e-6)


def test_the_record_keeps_what_was_given(monkeypatch):
    """`weights` and the moments are those of the argument, however coarse its replacement."""
    monkeypatch.setattr(compression, "FEW", 8)
    monkeypatch.setattr(compression, "TOLERANCE", 1e3)
    weights = draw("p(1-p)")
    law, truth = SpectralLaw(weights, 0.5, covariance=weights), exact(monkeypatch, weights, 0.5, covariance=weights)
    assert len(law._equation.weights.values) < 100
    np.testing.assert_array_equal(law.weights, weights)
    for k in (1, 2, 4, 8):
        assert law.moment(k) / truth.moment(k) == pytest.approx(1.0, rel=1e-13)
