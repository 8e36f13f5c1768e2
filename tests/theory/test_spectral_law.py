"""The spectral law against closed forms, its own series, and eigenvalues of simulated blocks."""

import time

import numpy as np
import pytest

from hesscope.core.errors import InputError
from hesscope.core.rng import stream
from hesscope.theory.softmax_moments import pair_moment, variance_moment
from hesscope.theory.spectral_law import SpectralLaw, moments_from_weight_moments

GAMMAS = [0.3, 1.0, 3.0]
MORE_GAMMAS = [1e-3, 0.3, 0.999, 1.0, 1.001, 3.0, 1e3]
NODES, NODE_WEIGHTS = np.polynomial.legendre.leggauss(12)


def at_angles(a, b, left, width):
    """Points x = a + (b - a) sin^2(angle / 2), dense at both ends, on panels of angles, and the weights of dx."""
    angle = left[:, None] + width[:, None] * (NODES + 1) / 2
    from_a, from_b = (b - a) * np.sin(angle / 2) ** 2, (b - a) * np.cos(angle / 2) ** 2
    x = np.where(from_a < from_b, a + from_a, b - from_b)
    return x, width[:, None] / 2 * NODE_WEIGHTS * (b - a) * np.sin(angle) / 2


def continuous_part(law):
    """Ascending points and masses of an adaptive rule of this file's own over the continuous part, cut at 0."""
    points, masses = [], []
    for end in law.support:
        for a, b in [(end[0], 0.0), (0.0, end[1])] if end[0] < 0 < end[1] else [end]:
            left, width = np.asarray([0.0, np.pi / 2]), np.full(2, np.pi / 2)
            x, weights = at_angles(a, b, left, width)
            coarse = (law.density(x) * weights).sum(axis=1)
            for _ in range(30):
                left = np.stack((left, left + width / 2), axis=1).ravel()
                width = np.repeat(width / 2, 2)
                x, weights = at_angles(a, b, left, width)
                fine = law.density(x) * weights
                rough = np.repeat(np.abs(fine.reshape(-1, 2, len(NODES)).sum(axis=(1, 2)) - coarse) > 1e-7, 2)
                points.append(x[~rough].ravel())
                masses.append(fine[~rough].ravel())
                left, width, coarse = left[rough], width[rough], fine[rough].sum(axis=1)
                if not left.size:
                    break
    x, mass = np.concatenate(points), np.concatenate(masses)
    order = np.argsort(x)
    return x[order], mass[order]


def marchenko_pastur(x, gamma):
    a, b = (1 - gamma**0.5) ** 2, (1 + gamma**0.5) ** 2
    return np.sqrt((b - x) * (x - a)) / (2 * np.pi * gamma * x)


def marchenko_pastur_transform(z, gamma):
    """Root in the upper half plane of gamma z s^2 + (z + gamma - 1) s + 1 = 0."""
    root = np.sqrt((z + gamma - 1) ** 2 - 4 * gamma * z)
    both = np.stack([(-(z + gamma - 1) + sign * root) / (2 * gamma * z) for sign in (1, -1)])
    return np.where(both[0].imag * z.imag > 0, both[0], both[1])


# --- Marchenko-Pastur -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", MORE_GAMMAS)
def test_equal_weights_are_marchenko_pastur(gamma):
    law = SpectralLaw(np.ones(5), gamma)
    a, b = (1 - gamma**0.5) ** 2, (1 + gamma**0.5) ** 2
    ((low, high),) = law.support
    assert abs(low - a) < 1e-15 * b
    assert high == pytest.approx(b, rel=1e-14)
    x = at_angles(low, high, np.arange(8) * np.pi / 8, np.full(8, np.pi / 8))[0].ravel()
    truth = marchenko_pastur(x, gamma)
    # Next to a soft edge, rounding of x alone changes the truth by its second term.
    bound = 1e-8 + 1e-15 * x / np.minimum(x - a, b - x)
    assert (np.abs(law.density(x) - truth) <= bound * truth).all()
    np.testing.assert_array_equal(law.density([a - 1e-9 * b, b * (1 + 1e-9), -1.0, 10 * b]), 0.0)
    assert law.atom_at_zero == pytest.approx(max(0.0, 1 - 1 / gamma), abs=1e-15)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_stieltjes_transform_of_marchenko_pastur(gamma):
    z = np.asarray([[1 + 1j, -2 + 0.1j, 0.7 - 1e-6j], [0.01 + 1e-4j, 100 - 3j, 0.9 + 1e-12j]])
    found = SpectralLaw([2.0], gamma).stieltjes(2 * z)
    np.testing.assert_allclose(found, marchenko_pastur_transform(z, gamma) / 2, rtol=1e-10)
    assert SpectralLaw([1.0], gamma).stieltjes(1 + 1j) == pytest.approx(
        complex(marchenko_pastur_transform(np.asarray(1 + 1j), gamma)), rel=1e-12
    )


def test_narayana_moments():
    """Moments of Marchenko-Pastur are Narayana polynomials in gamma."""
    gamma = 0.7
    law = SpectralLaw([1.0], gamma)
    for k, numbers in enumerate([(1,), (1, 1), (1, 3, 1), (1, 6, 6, 1), (1, 10, 20, 10, 1)], start=1):
        assert law.moment(k) == pytest.approx(sum(n * gamma**i for i, n in enumerate(numbers)), rel=1e-13)
    assert law.moment(0) == 1.0
    eighth = sum(n * gamma**i for i, n in enumerate((1, 28, 196, 490, 490, 196, 28, 1)))
    assert law.moment(8) == pytest.approx(eighth, rel=1e-13)


def test_hard_edge():
    law = SpectralLaw([1.0, 0.0], 0.5)
    assert law.support[0][0] == 0.0
    assert law.atom_at_zero == 0.0
    assert law.density(0.0) == np.inf
    assert law.cdf(law.quantile(1e-5)) == pytest.approx(1e-5, rel=1e-9)


def test_hard_edge_of_wide_covariances():
    """P(lambda != 0) = gamma P(t != 0): the support begins at 0 exactly, however small the smallest t is."""
    rng = stream(0, "hard edge")
    for _ in range(60):
        t, masses = np.append(10.0 ** rng.uniform(-9, 0, 4), 1.0), rng.dirichlet(np.ones(5))
        assert SpectralLaw([1.0], 1.0, covariance=(t, masses)).support[0][0] == 0.0


# --- laws in general --------------------------------------------------------------------------------------------------

RNG = np.random.default_rng(7)
COVARIANCES = {
    "identity": None,
    "two": ([1.0, 10.0], [0.7, 0.3]),
    "power, zeros": np.concatenate((1 / np.arange(1, 17), np.zeros(8))),
}
WEIGHTS = {
    "positive": RNG.random(40),
    "mixed signs": RNG.standard_normal(40),
    "zero-inflated": RNG.standard_normal(40) * (np.arange(40) % 4 == 0),
    "negative": -RNG.random(40),
    "orders of magnitude": 10.0 ** RNG.uniform(-6, 0, 40),
    "duplicates": np.repeat([1.0, -2.0, 5.0], 50),
    "outlier": np.concatenate((RNG.random(39), [300.0])),
    "plus or minus one": np.repeat([1.0, -1.0], 10),
}
CASES = [(w, c, g) for w in WEIGHTS for c in COVARIANCES for g in (0.2, 1.0, 2.5)]


def free_moments(gamma, weights, k):
    """m_k for T = I from the free cumulants kappa_j = gamma^{j-1} E[lambda^j], MATH.md section 4.1."""
    c = [gamma ** (j - 1) * np.mean(weights**j) for j in range(1, 5)]
    return [
        c[0],
        c[1] + c[0] ** 2,
        c[2] + 3 * c[0] * c[1] + c[0] ** 3,
        c[3] + 4 * c[0] * c[2] + 2 * c[1] ** 2 + 6 * c[0] ** 2 * c[1] + c[0] ** 4,
    ][k - 1]


@pytest.mark.parametrize(("weights", "covariance", "gamma"), CASES[::2])
def test_density_agrees_with_mass_moments_and_transform(weights, covariance, gamma):
    """Four roads to one law: roots on the real axis, power series at infinity, roots off the axis, counting ranks."""
    lam = WEIGHTS[weights]
    law = SpectralLaw(lam, gamma, covariance=COVARIANCES[covariance])
    rank = {"identity": 1.0, "two": 1.0, "power, zeros": 2 / 3}[covariance]
    assert law.atom_at_zero == pytest.approx(1 - min(rank, np.mean(lam != 0) / gamma), abs=1e-14)
    x, masses = continuous_part(law)
    assert masses.sum() == pytest.approx(1 - law.atom_at_zero, abs=1e-6)
    for k in range(1, 9):
        assert abs(law.moment(k) - masses @ x**k) < 1e-6 * (masses @ np.abs(x) ** k)
    width = law.support[-1][1] - law.support[0][0]
    z = law.support[0][0] + width * np.asarray([0.3 + 0.2j, 0.9 + 0.05j, -0.2 + 0.1j, 3 - 2j])
    truth = (1 / (x - z[:, None])) @ masses - law.atom_at_zero / z
    np.testing.assert_allclose(law.stieltjes(z), truth, rtol=1e-5)
    if covariance == "identity":
        for k in (1, 2, 3, 4):
            assert abs(law.moment(k) - free_moments(gamma, lam, k)) < 1e-12 * (masses @ np.abs(x) ** k)


@pytest.mark.parametrize(("weights", "covariance", "gamma"), CASES[1::5])
def test_distribution_function_and_quantiles(weights, covariance, gamma):
    law = SpectralLaw(WEIGHTS[weights], gamma, covariance=COVARIANCES[covariance])
    q = np.linspace(0, 1, 101)
    x = law.quantile(q)
    assert (np.diff(x) >= 0).all()
    ends = [law.support[0][0], law.support[-1][1]] + [0.0] * (law.atom_at_zero > 0)
    width = max(ends) - min(ends)
    assert x[0] == pytest.approx(min(ends), abs=1e-9 * width)
    assert x[-1] == pytest.approx(max(ends), abs=1e-9 * width)
    # F(x) >= q, with equality where there is no atom; and just below x there is less than q.
    reached = law.cdf(x)
    assert (reached >= q - 1e-9).all()
    np.testing.assert_allclose(reached[x != 0], q[x != 0], atol=1e-9)
    below = law.cdf(x[1:] - 1e-7 * np.abs(x[1:]) - 1e-15 * width)
    assert (below <= q[1:] + 1e-9).all()
    if law.atom_at_zero > 0:
        assert law.cdf(0.0) - law.cdf(-1e-13 * width) == pytest.approx(law.atom_at_zero, abs=1e-9)
    # Against this file's own integral, up to each of its nodes.
    points, masses = continuous_part(law)
    middle = np.cumsum(masses) - masses / 2 + law.atom_at_zero * (points >= 0)
    assert (np.abs(law.cdf(points) - middle) < 1e-6 + 0.6 * masses).all()


def test_quantiles_around_the_atom():
    law = SpectralLaw([-1.0, -1.0, 0.0, 0.0], 2.0)
    np.testing.assert_allclose(law.support, [(-4.5, -0.5)], rtol=1e-14)
    np.testing.assert_allclose(law.cdf([-9.0, -0.4, -1e-300, 0.0, 1.0]), [0, 0.25, 0.25, 1, 1], atol=1e-12)
    np.testing.assert_allclose(law.quantile([0.0, 0.25, 0.3, 1.0]), [-4.5, -0.5, 0.0, 0.0], atol=1e-9)
    law = SpectralLaw([1.0], 4.0)
    np.testing.assert_allclose(law.quantile([0.0, 0.75, 0.750001, 1.0]), [0, 0, 1, 9], atol=1e-2)
    zero = SpectralLaw([0.0, 0.0], 0.5)
    assert (zero.atom_at_zero, zero.support, zero.moment(2)) == (1.0, (), 0.0)
    np.testing.assert_array_equal(zero.quantile([0.0, 0.5, 1.0]), 0.0)
    np.testing.assert_array_equal(zero.cdf([-1.0, 0.0, 1.0]), [0, 1, 1])
    np.testing.assert_array_equal(zero.density([-1.0, 0.0, 1.0]), 0.0)
    assert zero.stieltjes(2j) == 0.5j


def test_symmetric_law_with_a_cusp_at_zero():
    """lambda = +-1, gamma = 1: w^3 = -x (w^2 - 1) for w = 1/s, hence edges +-sqrt(27/4) and |x|^(-1/3) at zero."""
    law = SpectralLaw([1.0, -1.0], 1.0)
    np.testing.assert_allclose(law.support, [(-(6.75**0.5), 6.75**0.5)], rtol=1e-13)
    x = np.asarray([-2.0, -0.3, 1e-9, 1.7])
    roots = [np.roots([1, value, 0, -value]) for value in x]
    truth = [np.max((1 / root[np.abs(root.imag) > 1e-12]).imag) / np.pi for root in roots]
    np.testing.assert_allclose(law.density(x), truth, rtol=1e-9)
    assert law.density(0.0) == np.inf


def test_two_clusters_and_their_masses():
    """An outlier atom of probability p holds the mass p / gamma, above a gap that is found."""
    law = SpectralLaw([1.0, 50.0], 0.5, probabilities=[0.9, 0.1])
    assert len(law.support) == 2
    (_, b), (c, _) = law.support
    assert law.cdf((b + c) / 2) == pytest.approx(1 - 0.1 / 0.5, abs=1e-9)
    assert law.density((b + c) / 2) == 0.0
    assert law.density(b * (1 - 1e-9)) > 0
    assert law.density(c * (1 + 1e-9)) > 0
    assert law.density([b * (1 + 1e-9), c * (1 - 1e-9)]).max() == 0


@pytest.mark.parametrize("gamma", [0.05, 0.5, 4.0])
def test_covariance_and_weights_change_places(gamma):
    """With lambda = 1, H and its companion (N x N, weights t, ratio 1/gamma) share their non-zero eigenvalues.

    So the separable law, whose support is searched, is one with T = I, whose support is exact.
    """
    t, masses = np.asarray([1.0, 3.0, 10.0]), [0.5, 0.3, 0.2]
    law = SpectralLaw([1.0], gamma, covariance=(t, masses))
    twin = SpectralLaw(t, 1 / gamma, probabilities=masses)
    np.testing.assert_allclose(law.support, gamma * np.asarray(twin.support), rtol=1e-10)
    x = law.quantile(np.linspace(law.atom_at_zero + 0.013, 0.987, 8))
    np.testing.assert_allclose(law.density(x), twin.density(x / gamma) / gamma**2, rtol=1e-8)
    for k in (1, 2, 5, 8):
        assert law.moment(k) == pytest.approx(gamma ** (k - 1) * twin.moment(k), rel=1e-12)


def test_nearly_equal_covariances_are_one():
    """The searched support at T = (1, 1 - 1e-13) is the exact one at T = I, for every kind of gap."""
    for gamma in (0.05, 0.5, 4.0, 40.0):
        lam = np.asarray([1.0, 2.0, -1.5, 40.0, 0.01])
        exact = np.asarray(SpectralLaw(lam, gamma).support)
        found = np.asarray(SpectralLaw(lam, gamma, covariance=[1.0, 1.0 - 1e-13]).support)
        np.testing.assert_allclose(found, exact, rtol=1e-9, atol=1e-11)


def test_many_islands_of_a_wide_covariance():
    """Eigenvalues over six decades at small gamma: each has its island, and none is lost."""
    t = 10.0 ** np.arange(-5, 1)
    law = SpectralLaw(WEIGHTS["positive"], 0.05, covariance=t)
    assert len(law.support) == 6
    for number, (a, b) in enumerate(law.support):
        assert law.cdf(b) - law.cdf(a) == pytest.approx(1 / 6, abs=1e-7)
        assert a < t[number] * 0.5 < b


@pytest.mark.parametrize("scale", [1e-150, 1e-12, -1.0, 1e12])
@pytest.mark.parametrize("covariance", ["identity", "two"])
def test_equivariance(scale, covariance):
    lam, T = WEIGHTS["mixed signs"], COVARIANCES[covariance]
    law, scaled = SpectralLaw(lam, 0.5, covariance=T), SpectralLaw(scale * lam, 0.5, covariance=T)
    x, z, q = np.linspace(-1, 1, 9), np.asarray([0.3 + 0.1j, -2 - 1e-3j]), np.linspace(0.05, 0.95, 4)
    np.testing.assert_allclose(scaled.density(scale * x) * abs(scale), law.density(x), rtol=1e-7)
    np.testing.assert_allclose(scaled.stieltjes(scale * z) * scale, law.stieltjes(z), rtol=1e-10)
    np.testing.assert_allclose(scaled.quantile(q if scale > 0 else 1 - q), scale * law.quantile(q), rtol=1e-7)
    np.testing.assert_allclose(sorted(np.ravel(scaled.support)), sorted(scale * np.ravel(law.support)), rtol=1e-9)
    assert scaled.moment(2) == pytest.approx(scale**2 * law.moment(2), rel=1e-12)


def test_atoms_with_probabilities_are_repeated_samples():
    samples = SpectralLaw([0.0, 0.0, 1.0, -2.0, -2.0, -2.0, 1.0, 5.0], 0.4, covariance=[1.0, 1.0, 4.0])
    atoms = SpectralLaw(
        [-2.0, 1e200, 0.0, 1.0, 5.0],
        0.4,
        probabilities=[3 / 8, 0, 2 / 8, 2 / 8, 1 / 8],
        covariance=([4.0, 1.0], [1 / 3, 2 / 3]),
    )
    np.testing.assert_allclose(atoms.support, samples.support, rtol=1e-12)
    x = np.linspace(-2, 5, 11)
    np.testing.assert_allclose(atoms.density(x), samples.density(x), rtol=1e-9)
    assert atoms.moment(3) == pytest.approx(samples.moment(3), rel=1e-13)


# --- moments ----------------------------------------------------------------------------------------------------------


def test_softmax_blocks_of_math_md():
    """MATH.md, section 4.3: m1..m4 at gamma = 0.5, C = 10, to all printed digits."""
    on = moments_from_weight_moments(0.5, [variance_moment(k, 10) for k in range(1, 5)])
    off = moments_from_weight_moments(0.5, [(-1) ** k * pair_moment(k, 10) for k in range(1, 5)])
    assert [f"{m:.8e}" for m in on] == [f"{m:.8e}" for m in (0.0805312606, 0.0115459945, 0.00214944206, 4.57493617e-4)]
    printed = (-0.00894791785, 1.91621338e-4, -6.20380121e-6, 2.53642566e-7)
    assert [f"{m:.8e}" for m in off] == [f"{m:.8e}" for m in printed]


def test_first_separable_moments_in_closed_form():
    """E tr H^k / d by Wick's theorem: m1 = L1 T1, m2 = L1^2 T2 + gamma L2 T1^2, m3 below."""
    gamma, L, T = 0.7, (0.3, 1.1, -0.4), (0.9, 1.7, 4.2)
    third = L[0] ** 3 * T[2] + 3 * gamma * L[0] * L[1] * T[0] * T[1] + gamma**2 * L[2] * T[0] ** 3
    truth = [L[0] * T[0], L[0] ** 2 * T[1] + gamma * L[1] * T[0] ** 2, third]
    np.testing.assert_allclose(moments_from_weight_moments(gamma, L, T), truth, rtol=1e-14)


# --- simulated blocks -------------------------------------------------------------------------------------------------

D, N = 1000, 2000
SIMULATED = {
    "positive": lambda rng: rng.random(N),
    "mixed signs": lambda rng: rng.standard_normal(N) + 0.3,
    "zero-inflated": lambda rng: np.abs(rng.standard_normal(N)) * (rng.random(N) < 0.25),
}
SPECTRA = {
    "identity": None,
    "power": 10 * np.arange(1, D + 1) ** -0.3,
    "two and zeros": np.concatenate((np.full(400, 8.0), np.full(400, 1.0), np.zeros(200))),
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("weights", SIMULATED)
def test_eigenvalues_of_a_simulated_block(weights, spectrum):
    """Kolmogorov distance at d = 1000, N = 2000: eigenvalues are rigid, so it is far below 1/sqrt(d); and moments."""
    rng = np.random.default_rng(11)
    lam, T = SIMULATED[weights](rng), SPECTRA[spectrum]
    X = rng.standard_normal((N, D)) * (1 if T is None else np.sqrt(T))
    H = (X.T * lam) @ X / N
    eigenvalues = np.linalg.eigvalsh(H)
    eigenvalues[np.abs(eigenvalues) < 1e-10 * np.abs(eigenvalues).max()] = 0.0
    law = SpectralLaw(lam, D / N, covariance=T)
    F, F_below = law.cdf(eigenvalues), law.cdf(np.nextafter(eigenvalues, -np.inf))
    empirical = np.searchsorted(eigenvalues, eigenvalues, side="right") / D
    empirical_below = np.searchsorted(eigenvalues, eigenvalues, side="left") / D
    assert max(np.abs(F - empirical).max(), np.abs(F_below - empirical_below).max()) < 0.006
    for k in (1, 2, 3, 4):
        assert abs(np.mean(eigenvalues**k) - law.moment(k)) < 0.02 * k * np.mean(np.abs(eigenvalues) ** k)
    inside_support = np.zeros(D, dtype=bool)
    reach = 0.02 * np.abs(eigenvalues).max()
    for a, b in law.support:
        inside_support |= (a - reach < eigenvalues) & (eigenvalues < b + reach)
    assert inside_support[eigenvalues != 0].all()


# --- speed and refusals -----------------------------------------------------------------------------------------------


def test_it_takes_seconds():
    """Targets 2 s for 500 points and 2000 atoms (0.3 s alone on a core); the limit allows for a busy machine."""
    law = SpectralLaw(np.random.default_rng(0).standard_normal(2000), 0.5)
    (a, b) = law.support[0][0], law.support[-1][1]
    begin = time.perf_counter()
    law.density(np.linspace(a, b, 500))
    assert time.perf_counter() - begin < 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": [1.0, np.nan]}, "weights must not contain nan"),
        ({"weights": [1.0, np.inf]}, "weights must be finite, got inf"),
        ({"weights": []}, "weights must be a non-empty one-dimensional array, got shape (0,)"),
        ({"weights": [[1.0]]}, "weights must be a non-empty one-dimensional array, got shape (1, 1)"),
        ({"weights": "abc"}, "weights must be real numbers, got str"),
        ({"weights": np.asarray([1j])}, "weights must be real numbers, got ndarray"),
        ({"gamma": 0.0}, "gamma must be a positive, finite number, got 0.0"),
        ({"gamma": -1}, "gamma must be a positive, finite number, got -1"),
        ({"gamma": float("nan")}, "gamma must be a positive, finite number, got nan"),
        ({"gamma": float("inf")}, "gamma must be a positive, finite number, got inf"),
        ({"probabilities": [1.0]}, "probabilities must be one for each of the 2 weights, got 1"),
        ({"probabilities": [0.5, 0.6]}, "probabilities must be non-negative and sum to 1, got sum 1.1"),
        ({"probabilities": [1.5, -0.5]}, "probabilities must be non-negative and sum to 1, got sum 1.0"),
        ({"probabilities": [1.0, np.nan]}, "probabilities must not contain nan"),
        ({"covariance": [1.0, np.nan]}, "covariance must not contain nan"),
        ({"covariance": np.eye(2)}, "covariance must be a non-empty one-dimensional array, got shape (2, 2)"),
        (
            {"covariance": [1.0, -0.1]},
            "covariance must be the eigenvalues of T, none negative, got -0.1 "
            "(clip rounding errors with numpy.maximum)",
        ),
        (
            {"covariance": ([1.0, 2.0], [0.5, 0.4])},
            "covariance probabilities must be non-negative and sum to 1, got sum 0.9",
        ),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(InputError) as caught:
        SpectralLaw(**{"weights": [1.0, 2.0], "gamma": 0.5, **arguments})
    assert str(caught.value) == message


def test_what_the_methods_refuse():
    law = SpectralLaw([1.0, 2.0], 0.5)
    for z in (1.0, np.asarray([1j, 2.0]), complex(np.nan, 1)):
        with pytest.raises(InputError, match="z must be finite and off the real axis"):
            law.stieltjes(z)
    for q in (-0.1, 1.1):
        with pytest.raises(InputError, match=f"q must lie between 0 and 1, got {q}"):
            law.quantile(q)
    for method in (law.density, law.cdf, law.quantile):
        with pytest.raises(InputError, match="must not contain nan"):
            method([0.5, np.nan])
    for k in (-1, 1.5):
        with pytest.raises(InputError, match="k must be"):
            law.moment(k)
    with pytest.raises(InputError, match=r"covariance_moments must be as many as weight_moments \(2\), got 1"):
        moments_from_weight_moments(0.5, [1.0, 1.0], [1.0])
    with pytest.raises(InputError, match="gamma must be a positive"):
        moments_from_weight_moments(0, [1.0])


def test_the_law_cannot_be_changed():
    weights = np.asarray([1.0, 2.0])
    law = SpectralLaw(weights, 0.5)
    weights[0] = 100.0
    assert law.moment(1) == 1.5
    with pytest.raises(AttributeError):
        law.gamma = 1.0
    with pytest.raises(ValueError, match="read-only"):
        law.weights[0] = 1.0
