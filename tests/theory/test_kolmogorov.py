"""Kolmogorov distances against cases that can be done by hand."""

import numpy as np
import pytest

from hesscope.core.errors import InputError
from hesscope.theory import SpectralLaw, kolmogorov_distance


def test_quantiles_are_as_close_as_points_can_be():
    law = SpectralLaw([1.0], 0.5)
    points = law.quantile((np.arange(200) + 0.5) / 200)
    assert kolmogorov_distance(law, points) == pytest.approx(0.5 / 200, rel=1e-6)
    assert kolmogorov_distance(law, points[::-1]) == pytest.approx(0.5 / 200, rel=1e-6)


def test_shifted_points():
    law = SpectralLaw([1.0], 0.5)
    points = law.quantile(np.clip((np.arange(200) + 0.5) / 200 + 0.1, 0, 1))
    assert kolmogorov_distance(law, points) == pytest.approx(0.1 + 0.5 / 200, rel=1e-3)


def test_the_atom_at_zero_counts_rounding_errors_as_zeros():
    law = SpectralLaw([1.0], 2.0)  # half of the eigenvalues vanish
    points = law.quantile((np.arange(200) + 0.5) / 200)
    noise = np.where(points == 0, 1e-16 * (-1.0) ** np.arange(200), points)
    assert kolmogorov_distance(law, noise) == pytest.approx(0.5 / 200, rel=1e-6)
    assert kolmogorov_distance(law, points[points > 0]) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("values", [[], [np.nan, 1.0]])
def test_bad_input(values):
    with pytest.raises(InputError, match="eigenvalues must be"):
        kolmogorov_distance(SpectralLaw([1.0], 0.5), values)
