"""Block energies on their way through xarray and a netCDF file."""

import numpy as np
import pytest
import xarray as xr

import hesscope as hs
from hesscope.core.errors import InputError
from tests.helpers import build, cut, inputs_for, randint


def energies(method, probes=None):
    obj = hs.Objective(build("tanh"), "cross_entropy", cut(inputs_for("tanh", 12), randint(3, 12, seed=2)))
    return hs.block_energies(hs.Hessian(obj), hs.Partition.by_row(obj.model), method, probes, seed=2**40)


def of_a_plain_matrix(method):
    """No data behind it: an empty fingerprint."""
    partition = hs.Partition.from_blocks({"ä [:, 0]": range(2), "b": [2]})
    return hs.block_energies(np.arange(9.0).reshape(3, 3), partition, method)


def check_equal(a, b):
    assert a.labels == b.labels
    assert a.sizes == b.sizes
    assert np.array_equal(a.values, b.values)
    assert np.array_equal(a.stderr, b.stderr)
    assert (a.samples is None) == (b.samples is None)
    if a.samples is not None:
        assert np.array_equal(a.samples, b.samples)
    assert a.provenance == b.provenance


@pytest.mark.parametrize("method", ["exact", "probes"])
@pytest.mark.parametrize("make", [energies, of_a_plain_matrix])
@pytest.mark.parametrize("through_file", [False, True], ids=["memory", "netCDF"])
def test_round_trip(method, make, through_file, tmp_path):
    E = make(method)
    dataset = E.to_xarray()
    if through_file:
        dataset.to_netcdf(tmp_path / "energies.nc", engine="h5netcdf")
        dataset = xr.load_dataset(tmp_path / "energies.nc", engine="h5netcdf")
    found = hs.BlockEnergies.from_xarray(dataset)
    check_equal(found, E)
    assert found.aggregate({"all": found.labels}).total == pytest.approx(E.total, rel=1e-14)


def test_the_data_set_is_labelled():
    E = energies("probes", probes=32)
    dataset = E.to_xarray()
    assert dict(dataset.sizes) == {"row_block": len(E.labels), "column_block": len(E.labels), "sample": 32}
    cell = dataset["energy"].sel(row_block="0.weight[1]", column_block="4.weight[2]")
    assert float(cell) == E.values[E.labels.index("0.weight[1]"), E.labels.index("4.weight[2]")]
    assert dataset.attrs["seed"] == 2**40
    assert dataset.attrs["version"] == hs.__version__


def test_other_data_sets_are_refused():
    with pytest.raises(InputError, match="expected a data set of record 'BlockEnergies', got None"):
        hs.BlockEnergies.from_xarray(xr.Dataset())
    with pytest.raises(InputError, match="not written by hesscope: it has no attribute 'engine'"):
        dataset = energies("exact").to_xarray()
        del dataset.attrs["engine"]
        hs.BlockEnergies.from_xarray(dataset)


@pytest.mark.parametrize("method", ["exact", "probes"])
@pytest.mark.parametrize("parts", [("H",), ("H", "G", "R")])
@pytest.mark.parametrize("through_file", [False, True], ids=["memory", "netCDF"])
def test_round_trip_of_hessian_and_parts(method, parts, through_file, tmp_path):
    split = hs.SplitEnergies({part: energies(method) for part in parts})
    dataset = split.to_xarray()
    if through_file:
        dataset.to_netcdf(tmp_path / "split.nc", engine="h5netcdf")
        dataset = xr.load_dataset(tmp_path / "split.nc", engine="h5netcdf")
    found = hs.SplitEnergies.from_xarray(dataset)
    assert tuple(found.parts) == parts
    for part in parts:
        check_equal(found.parts[part], split.parts[part])
    check_equal(found.hessian, split.hessian)
