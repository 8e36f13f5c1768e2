"""Semi-empirical laws of blocks: Gaussian inputs of known covariance, where they must hold, and real data."""

import numpy as np
import pytest
import torch

import hesscope as hs
from hesscope.core.rng import normal, stream
from hesscope.theory.kolmogorov import kolmogorov_distance
from tests.helpers import F64

D, N, C = 300, 750, 10


def coloured_objective(loss="cross_entropy", activation="relu"):
    """One hidden layer on Gaussian inputs whose covariance has eigenvalues from 0.2 to 4."""
    spread = torch.linspace(0.2, 2.0, D, dtype=F64)
    rotation = torch.linalg.qr(normal((D, D), stream(0, "rotation")))[0]
    x = normal((N, D), stream(0, "inputs")) * spread @ rotation
    y = torch.from_numpy(stream(0, "labels").integers(0, C, N))
    targets = y if loss == "cross_entropy" else torch.nn.functional.one_hot(y, C).double()
    return hs.Objective(hs.models.one_hidden(D, 8, C, activation, dtype=F64), loss, (x, targets))


@pytest.mark.parametrize(("i", "j"), [(0, None), (0, 3)])
@pytest.mark.parametrize(("loss", "activation"), [("cross_entropy", "relu"), ("mse", "tanh")])
def test_holds_for_gaussian_inputs_of_any_covariance(loss, activation, i, j):
    found = hs.semi_empirical_law(coloured_objective(loss, activation), "fc1", i, j)
    H = hs.operators.closed_form.layer_weights(coloured_objective(loss, activation), "fc1")
    block = H.block(i, i if j is None else j).numpy()
    assert np.allclose(found.eigenvalues, np.linalg.eigvalsh(block), atol=1e-13)
    assert found.distance == kolmogorov_distance(found.law, found.eigenvalues)
    assert found.distance < 0.02
    # The identity, and the sample covariance, in place of the population's are worse.
    x = H.inputs.numpy()
    sample = np.maximum(np.linalg.eigvalsh(x.T @ x / N), 0)
    for covariance in (None, sample):
        other = hs.theory.SpectralLaw(found.law.weights, D / N, covariance=covariance)
        assert kolmogorov_distance(other, found.eigenvalues) > 2 * found.distance


def test_on_digits_it_is_finite_and_stored():
    data = hs.data.digits(dtype=F64)
    objective = hs.Objective(hs.models.one_hidden(64, 16, 10, dtype=F64), "cross_entropy", (data.inputs, data.labels))
    found = hs.semi_empirical_law(objective, "fc1", 1)
    assert found.eigenvalues.shape == (64,)
    assert 0 < found.distance < 0.2
    stored = found.to_xarray()
    again = hs.theory.SpectralLaw(
        stored["weight"],
        stored.attrs["gamma"],
        covariance=(stored["covariance_eigenvalue"], stored["covariance_probability"]),
    )
    assert again.moment(2) == pytest.approx(found.law.moment(2), rel=1e-12)
    assert stored.attrs["data_fingerprint"] == objective.data_fingerprint


def test_more_inputs_than_samples():
    data = hs.data.gaussian(100, 150, 4, dtype=F64)
    objective = hs.Objective(hs.models.one_hidden(150, 4, 4, "tanh", dtype=F64), "mse", data.batch("mse"))
    found = hs.semi_empirical_law(objective, "fc1")
    assert found.law.atom_at_zero == pytest.approx(1 / 3, abs=1e-3)
    assert found.distance < 0.05


def test_bad_input():
    objective = coloured_objective()
    with pytest.raises(hs.HesscopeError, match="no layer is named 'fc9'"):
        hs.semi_empirical_law(objective, "fc9")
    with pytest.raises(hs.HesscopeError, match=r"neurons must be whole numbers in \[0, 8\)"):
        hs.semi_empirical_law(objective, "fc1", 8)
