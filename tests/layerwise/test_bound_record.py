"""PacBayesBound: what it says of itself, and the way into a file and back."""

import numpy as np
import pytest
import torch
from torch import nn

import hesscope as hs
from hesscope.bounds import VarianceGrid
from hesscope.core.errors import InputError
from hesscope.core.result_files import open_result, save_result
from hesscope.layerwise import POSTERIORS, PacBayesBound, laplace, pac_bayes
from hesscope.layerwise.bound_record import Spread
from hesscope.layerwise.pac_bayes import AXES_KEPT
from tests.helpers import randint, randn, randomized

GRID = VarianceGrid.geometric(1e-3, 10, 13)


@pytest.fixture(autouse=True)
def little_to_choose(monkeypatch):
    monkeypatch.setattr(pac_bayes, "CHOOSING_DRAWS", {True: 100, False: 2})
    monkeypatch.setattr(laplace, "STRENGTHS", (1.0, 8.0))
    monkeypatch.setattr(laplace, "FINER", ())
    monkeypatch.setattr(laplace, "SOUNDINGS", 1)


def made(posterior, widths=(4, 5, 2), layer_norm=False, **options):
    def net(seed):
        norm = [nn.LayerNorm(widths[1])] if layer_norm else []
        layers = [nn.Linear(widths[0], widths[1]), *norm, nn.ReLU(), nn.Linear(widths[1], widths[2])]
        return randomized(nn.Sequential(*layers), seed)

    objective = hs.Objective(net(0), options.pop("loss", "cross_entropy"), (randn(100, widths[0], seed=1), labels()))
    return hs.pac_bayes_bound(objective, net(1), posterior, grid=GRID, draws=4, steps=10, **options)


def labels():
    return randint(2, 100, seed=2)


def through_a_file(found, folder):
    save_result(folder / "bound.nc", found.to_xarray())
    return PacBayesBound.from_xarray(open_result(folder / "bound.nc"))


@pytest.mark.parametrize(("posterior", "layer_norm"), [*((kind, False) for kind in POSTERIORS), ("kronecker", True)])
def test_round_trip_through_a_file(posterior, layer_norm, tmp_path):
    found = made(posterior, layer_norm=layer_norm)
    again = through_a_file(found, tmp_path)
    assert again.certificate == found.certificate
    assert (again.bound, again.empirical_risk, again.kl) == (found.bound, found.empirical_risk, found.kl)
    assert again.certificate.bound_stderr == found.certificate.bound_stderr
    names = (
        "posterior",
        "risk",
        "network_risk",
        "prior_risk",
        "steps",
        "planned_steps",
        "seconds",
        "provenance",
        "finished",
    )
    for name in names:
        assert getattr(again, name) == getattr(found, name), name
    assert again.fallback == found.fallback
    assert bool(found.fallback) == layer_norm
    assert again.table() == found.table()
    assert found.table()[:-2] == found.certificate.table()
    assert [row.name for row in found.table()[-2:]] == ["risk, trained network", "risk, prior's mean"]
    assert str(found).startswith(f"{found.bound:.4f} ± ") and posterior in str(found)
    assert again.distribution is None
    for one, other in zip(again.spreads, found.spreads, strict=True):
        assert (one.group, one.basis, one.axes) == (other.group, other.basis, other.axes)
        assert one.prior_deviation == other.prior_deviation
        np.testing.assert_array_equal(one.curvature, other.curvature)
        np.testing.assert_array_equal(one.deviation, other.deviation)


def test_without_classes(tmp_path):
    found = made("diagonal", loss=nn.CrossEntropyLoss(), loss_bound=2.0)
    again = through_a_file(found, tmp_path)
    assert again.certificate.classes is None
    assert again.certificate == found.certificate
    assert again.risk == "mean of min(loss, 2) / 2"


def test_one_step_of_many(tmp_path):
    rounds = []
    found = made("diagonal_optimized", on_round=rounds.append)
    assert found.finished
    assert not rounds[0].finished
    again = through_a_file(rounds[0], tmp_path)
    assert (again.steps, again.planned_steps, again.finished) == (1, 10, False)


def test_other_data_sets_are_refused():
    with pytest.raises(InputError, match="expected a data set of record 'PacBayesBound', got 'Certificate'"):
        PacBayesBound.from_xarray(made("isotropic").certificate.to_xarray())


@pytest.mark.parametrize("posterior", ["diagonal", "kronecker", "kronecker_refreshed"])
def test_spreads_are_the_distribution(posterior):
    """Of few axes all are kept, by ascending curvature; in closed form the deviations then fall."""
    found = made(posterior)
    for spread, each in zip(found.spreads, found.distribution.groups, strict=True):
        deviation = each.variance.sqrt().flatten()
        assert (spread.group, spread.axes, len(spread.curvature)) == (each.group.name, deviation.numel(), spread.axes)
        assert spread.prior_deviation == each.prior_variance**0.5
        assert (np.diff(spread.curvature) >= 0).all()
        np.testing.assert_allclose(np.sort(spread.deviation), deviation.sort().values.numpy(), rtol=1e-14)
        if found.planned_steps == 0:
            assert (np.diff(spread.deviation) <= 1e-12 * spread.deviation[0]).all()
            stiffness = 1 / np.square(spread.deviation)
            slope = np.diff(stiffness) / np.maximum(np.diff(spread.curvature), 1e-300)
            rising = np.diff(spread.curvature) > 1e-6 * spread.curvature[-1]
            np.testing.assert_allclose(slope[rising], slope[rising][0], rtol=1e-4)  # precision: prior + a * curvature


def test_spreads_of_many_axes():
    found = made("kronecker", (40, 30, 2))
    first, second = found.spreads
    assert (first.axes, len(first.curvature), len(first.deviation)) == (41 * 30, AXES_KEPT, AXES_KEPT)
    assert (second.axes, len(second.curvature)) == (62, 62)
    everything = found.distribution.groups[0].variance.sqrt().flatten()
    assert first.deviation[0] == pytest.approx(float(everything.max()), rel=1e-14)
    assert first.deviation[-1] == pytest.approx(float(everything.min()), rel=1e-14)


def test_it_is_frozen():
    found = made("isotropic")
    for name in ("posterior", "certificate"):
        with pytest.raises(AttributeError, match="cannot assign"):
            setattr(found, name, None)
    assert isinstance(found.spreads[0], Spread)
    assert torch.is_tensor(found.distribution.mean())


def test_the_risks_set_beside_the_bound():
    found = made("diagonal")
    trained, prior = (float(row.value) for row in found.table()[-2:])
    assert trained == pytest.approx(found.network_risk, rel=1e-11)
    assert prior == pytest.approx(found.prior_risk, rel=1e-11)
    assert found.prior_risk != found.network_risk
