"""Energies of H, G and R side by side: the methods against each other and against dense matrices."""

import numpy as np
import pytest
import torch
from torch import nn

import hesscope as hs
from hesscope.core.errors import InputError, PartitionError
from hesscope.estimate import block_energies
from hesscope.estimate.energies import SplitEnergies
from hesscope.estimate.split import split_energies
from hesscope.operators import Operator
from tests.helpers import F64, build, cut, inputs_for, randint, randn, relative_error
from tests.operators.closed_form.networks import N, objective, sequential


def energies_of(matrix, partition):
    membership = np.eye(len(partition))[partition.assignment]
    return membership.T @ np.square(matrix.numpy()) @ membership


def scattered(size, blocks=5):
    """A partition whose blocks are no intervals, of unequal sizes."""
    assignment = np.random.default_rng(0).integers(0, blocks, size)
    assignment[:blocks] = np.arange(blocks)
    return hs.Partition.from_blocks({f"b{i}": np.flatnonzero(assignment == i) for i in range(blocks)})


def dense_parts(obj):
    H, G = (Operator.dense(matrix(obj)) for matrix in (hs.Hessian, hs.GaussNewton))
    return {"H": H, "G": G, "R": H - G}


@pytest.mark.parametrize("strips", ["few", "many"])
@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("widths", [(5, 6, 4), (5, 6, 3, 9)])
def test_closed_form_and_columns_give_the_energies_of_dense_matrices(monkeypatch, widths, activation, loss, strips):
    """In one strip a layer, and in many."""
    if strips == "many":
        monkeypatch.setattr(block_energies, "STRIP_MEMORY", 12_000 if len(widths) == 3 else 20_000)
    obj = objective(widths, loss, activation)
    dense = dense_parts(obj)
    for partition in (hs.Partition.by_row(obj.model), scattered(len(dense["H"]))):
        expected = {part: energies_of(matrix, partition) for part, matrix in dense.items()}
        for method in ("closed_form", "exact"):
            seen = []
            found = split_energies(obj, partition, method, progress=lambda *state, seen=seen: seen.append(state))
            assert list(found.parts) == ["H", "G", "R"]
            for part, energies in found.parts.items():
                assert energies.labels == partition.labels
                assert relative_error(energies.values, expected[part]) < 1e-12
                assert not energies.stderr.any()
            assert seen == sorted(set(seen))
            assert seen[-1] == (len(dense["H"]),) * 2
            assert method == "exact" or (len(seen) > len(widths) - 1) == (strips == "many")


def test_a_linear_model_has_no_residual_part():
    obj = objective((5, 4))
    found = split_energies(obj, hs.Partition.by_row(obj.model))
    assert not found.parts["R"].values.any()
    assert np.array_equal(found.parts["H"].values, found.parts["G"].values)


def test_energies_of_the_difference_are_those_of_the_part():
    obj = objective((5, 6, 4))
    partition = hs.Partition.by_row(obj.model)
    R = hs.block_energies(hs.Hessian(obj) - hs.GaussNewton(obj), partition)
    assert R.provenance.engine == "block energies: closed_form; residual part: closed form"
    assert np.array_equal(R.values, split_energies(obj, partition).parts["R"].values)


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_a_small_residual_part_keeps_its_digits(activation):
    """Energies of R go with the square of the residuals, here down to 1e-6, whatever those of G are."""
    x, noise, energies = randn(N, 5, seed=1), randn(N, 4, seed=3), []
    model = sequential((5, 6, 4), activation)
    partition, outputs = hs.Partition.by_row(model), model(x).detach()
    for size in (1.0, 1e-6):
        obj = hs.Objective(model, "mse", (x, outputs + size * noise))
        energies.append(split_energies(obj, partition).parts["R"].values / size**2)
    assert relative_error(energies[1], energies[0]) < 1e-9


@pytest.mark.parametrize("factor", [1e-14, 1e14])
def test_no_absolute_scale(factor):
    obj = objective((5, 6, 4), "mse")
    x, y = randn(N, 5, seed=1), randn(N, 4, seed=3)
    scaled = sequential((5, 6, 4))
    with torch.no_grad():
        scaled[2].weight *= factor
        scaled[2].bias *= factor
    partition = hs.Partition.by_layer(obj.model)
    one = split_energies(obj, partition)
    other = split_energies(hs.Objective(scaled, "mse", (x, factor * y)), partition)
    powers = np.array([[4.0, 2.0], [2.0, 0.0]])
    for part in "HGR":
        assert np.allclose(other.parts[part].values / factor**powers, one.parts[part].values, rtol=1e-10, atol=0)


def test_float32_keeps_five_digits():
    energies = []
    for dtype in (F64, torch.float32):
        model = sequential((30, 8, 6)).to(dtype)
        x = randn(100, 30, seed=1).float().to(dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.float())
        obj = hs.Objective(model, "cross_entropy", (x, randint(6, 100, seed=2)))
        energies.append(split_energies(obj, hs.Partition.by_row(model)))
    for part in "HGR":
        double, single = (each.parts[part].values for each in energies)
        assert relative_error(single, double) < 1e-5


# --- probes -----------------------------------------------------------------------------------------------------------


def test_a_fixed_number_of_probes_uses_the_same_vectors_for_all_parts():
    obj = objective((5, 6, 4))
    partition = hs.Partition.by_layer(obj.model)
    found = split_energies(obj, partition, "probes", probes=200, seed=3)
    truth = split_energies(obj, partition)
    operators = {"H": hs.Hessian(obj), "G": hs.GaussNewton(obj)}
    operators["R"] = operators["H"] - operators["G"]
    for part, operator in operators.items():
        alone = hs.block_energies(operator, partition, "probes", probes=200, seed=3)
        assert relative_error(found.parts[part].samples, alone.samples) < 1e-12
        z = (found.parts[part].values - truth.parts[part].values)[truth.parts[part].values > 0]
        assert np.all(np.abs(z) < 4 * found.parts[part].stderr[truth.parts[part].values > 0])
        assert found.parts[part].products == alone.products == 400


def test_to_a_tolerance_each_part_is_measured_on_its_own():
    obj, seen = objective((5, 6, 4)), []
    partition = hs.Partition.by_layer(obj.model)
    told = lambda done, planned: seen.append((done, planned))  # noqa: E731
    found = split_energies(obj, partition, "probes", rtol=0.2, max_products=3000, seed=3, progress=told)
    H = hs.block_energies(hs.Hessian(obj), partition, "probes", rtol=0.2, max_products=3000, seed=3)
    assert np.array_equal(found.parts["H"].values, H.values)
    for energies in found.parts.values():
        assert energies.products > 0
        assert energies.converged
        assert "rtol 0.2 met" in energies.message
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == sum(energies.products for energies in found.parts.values())


# --- what comes with it -----------------------------------------------------------------------------------------------


def test_what_happened_is_told():
    obj = objective((5, 6, 4))
    partition = hs.Partition.by_row(obj.model)
    closed, exact = (split_energies(obj, partition, method) for method in ("closed_form", "exact"))
    engines = {
        "H": "block energies: closed_form; hessian: closed form",
        "G": "block energies: closed_form; gauss-newton: closed form",
        "R": "block energies: closed_form; residual part: closed form",
    }
    for part, engine in engines.items():
        assert closed.parts[part].provenance.engine == engine
        assert closed.parts[part].provenance.data_fingerprint == obj.data_fingerprint
        assert (closed.parts[part].products, closed.parts[part].message) == (0, "closed form")
        assert (exact.parts[part].products, exact.parts[part].message) == (obj.parameters.size, "exact")
        assert closed.parts[part].converged
    assert split_energies(obj, partition).parts["R"].message == "closed form"


def test_records_survive_a_round_trip():
    obj = objective((5, 6, 4))
    found = split_energies(obj, hs.Partition.by_row(obj.model))
    again = SplitEnergies.from_xarray(found.to_xarray())
    assert all(np.array_equal(again.parts[part].values, found.parts[part].values) for part in "HGR")


def test_other_networks_go_by_columns():
    model = build("conv, batch norm")
    obj = hs.Objective(model, "cross_entropy", cut(inputs_for("conv, batch norm", 12), randint(3, 12, seed=2)))
    partition, dense = hs.Partition.by_layer(model), dense_parts(obj)
    found = split_energies(obj, partition)
    for part, matrix in dense.items():
        assert relative_error(found.parts[part].values, energies_of(matrix, partition)) < 1e-12
        assert found.parts[part].message == "exact"


def test_a_loss_callable_has_the_hessian_alone():
    model, x = sequential((5, 6, 4)), randn(N, 5, seed=1)
    obj = hs.Objective(model, lambda m, batch: ((m(batch[0]) ** 4).sum(), len(batch[0])), (x, x))
    partition = hs.Partition.by_layer(model)
    found = split_energies(obj, partition)
    assert list(found.parts) == ["H"]
    assert relative_error(found.hessian.values, energies_of(Operator.dense(hs.Hessian(obj)), partition)) < 1e-12


BAD = {
    "dual": ({"method": "dual"}, "method must be one of 'auto', 'exact', 'closed_form', 'probes', got 'dual'"),
    "probes of exact": ({"method": "exact", "probes": 8}, "method 'exact' takes no probes"),
    "budget and probes": ({"method": "probes", "probes": 8, "max_products": 99}, "not both"),
    "small budget": ({"max_products": 1}, "max_products must be at least 4 for 2 blocks, got 1"),
    "rtol": ({"rtol": -1.0}, "rtol must be"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    arguments, message = BAD[name]
    obj = objective((5, 6, 4))
    with pytest.raises(InputError, match=message):
        split_energies(obj, hs.Partition.by_layer(obj.model), **arguments)


def test_other_bad_input():
    obj = objective((5, 6, 4))
    with pytest.raises(InputError, match=r"objective must be a hesscope.Objective, got Sequential"):
        split_energies(obj.model, hs.Partition.by_layer(obj.model))
    with pytest.raises(PartitionError, match="the partition covers 9 parameters, but the operator has 64"):
        split_energies(obj, scattered(9))
    model = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 4)).double()
    other = hs.Objective(model, "mse", (randn(N, 5, seed=1), randn(N, 4, seed=3)))
    with pytest.raises(InputError, match="method 'closed_form' needs a fully connected network"):
        split_energies(other, hs.Partition.by_layer(model), "closed_form")
