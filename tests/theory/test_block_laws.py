"""Laws of whole blocks against MATH.md's moments, exact masks, and the static force, whose energies they contain."""

import sys

import numpy as np
import pytest

from hesscope.theory import block_laws, static_force
from hesscope.theory.static_samples import SampledRatio

# MATH.md, section 4.3: gamma = 0.5, C = 10.
DIAGONAL = (0.0805312606, 0.0115459945, 0.00214944206, 4.57493617e-4)
OFF_DIAGONAL = (-0.00894791785, 1.91621338e-4, -6.20380121e-6, 2.53642566e-7)


def test_linear_moments_of_math_md():
    """20,000 sampled weights: the mean to 1 %, higher moments, with heavier tails, to 5, 10 and 20 %."""
    laws = block_laws("linear", "cross_entropy", 10, 0.5)
    for law, expected in ((laws.diagonal, DIAGONAL), (laws.off_diagonal, OFF_DIAGONAL)):
        for order, (value, tolerance) in enumerate(zip(expected, (0.01, 0.05, 0.1, 0.2), strict=True), start=1):
            assert law.moment(order) == pytest.approx(value, rel=tolerance)


def test_relu_s_masks_are_exact():
    """Under squared error the weight is one number wherever ReLU lets the input pass."""
    laws = block_laws("one_hidden", "mse", 10, 0.25, 8)
    assert laws.diagonal.atom_at_zero == 0
    assert block_laws("one_hidden", "mse", 10, 1.0, 8).diagonal.atom_at_zero == pytest.approx(0.5, abs=1e-9)
    assert block_laws("one_hidden", "cross_entropy", 10, 1.0, 8).off_diagonal.atom_at_zero == pytest.approx(0.75)
    for law, passed in ((laws.diagonal, 1 / 2), (laws.off_diagonal, 1 / 4)):
        assert np.ptp(np.asarray(law.weights)[:-1]) < 1e-15
        assert law.moment(2) == pytest.approx(law.moment(1) ** 2 * (1 + 0.25 / passed), rel=1e-10)


def test_squared_error_of_the_linear_model():
    laws = block_laws("linear", "mse", 8, 0.5)
    assert laws.diagonal.moment(1) == pytest.approx(2 / 8)
    assert laws.off_diagonal.atom_at_zero == 1


@pytest.mark.parametrize(
    ("loss", "activation"), [("cross_entropy", "relu"), ("cross_entropy", "gelu"), ("mse", "gelu")]
)
def test_second_moments_are_the_static_force(monkeypatch, loss, activation):
    """The mean square eigenvalue is the energy over d: averaged over V, its ratio is r."""
    monkeypatch.setattr(sys.modules[block_laws.__module__], "WEIGHTS", 1000)
    energies = []
    for seed in range(700):
        laws = block_laws("one_hidden", loss, 5, 0.7, 4, activation=activation, output_scale=0.8, seed=seed)
        energies.append((laws.off_diagonal.moment(2), laws.diagonal.moment(2)))
    found = SampledRatio.of(np.asarray(energies))
    force = static_force("one_hidden", loss, 5, 0.7, 4, activation=activation, output_scale=0.8)
    assert found.stderr < 0.12 * found.value  # fine enough to see a wrong mask
    assert abs(found.value - force.hidden_ratio) < 3 * np.hypot(found.stderr, force.hidden_stderr)
