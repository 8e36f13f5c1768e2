"""Provenance and the checks that several rooms share."""

import dataclasses

import numpy as np
import pytest

import hesscope as hs
from hesscope.core.checks import nearest, require_choice, require_positive_int
from hesscope.core.errors import InputError
from hesscope.core.records import Provenance

RECORDS = {
    "random": Provenance(engine="e", dtype="float64", device="cuda:0", data_fingerprint="ab12", seed=2**62),
    "seed 0": Provenance(engine="e", dtype="float64", device="cpu", seed=0),
    "nothing random": Provenance(engine="e", dtype="float32", device="cpu"),
    "other version": Provenance(engine="e", dtype="float32", device="cpu", version="0.0.1"),
}


@pytest.mark.parametrize("name", RECORDS)
def test_round_trip(name):
    record = RECORDS[name]
    attributes = record.attributes()
    assert Provenance.from_attributes({**attributes, "another": 3}) == record
    assert ("seed" in attributes) == (record.seed is not None)


def test_the_seed_read_from_a_file_is_an_integer():
    """netCDF gives NumPy's integers, which JSON does not take."""
    found = Provenance.from_attributes({**RECORDS["random"].attributes(), "seed": np.int64(2**62)})
    assert type(found.seed) is int
    assert found == RECORDS["random"]


def test_records_are_frozen_and_carry_the_version():
    record = RECORDS["random"]
    assert record.version == hs.__version__
    with pytest.raises(dataclasses.FrozenInstanceError):
        record.seed = 1


def test_foreign_attributes():
    with pytest.raises(InputError, match=r"not written by hesscope: it has no attribute 'engine'"):
        Provenance.from_attributes({"dtype": "float64"})


@pytest.mark.parametrize(("word", "hint"), [("exat", ", did you mean 'exact'?"), ("zzz", "")])
def test_nearest(word, hint):
    assert nearest(word, ["exact", "probes"]) == hint


def test_require_choice():
    require_choice("method", "exact", ["exact", "probes"])
    with pytest.raises(
        InputError, match=r"^method must be one of 'exact', 'probes', got 'exat', did you mean 'exact'[?]$"
    ):
        require_choice("method", "exat", ["exact", "probes"])
    with pytest.raises(InputError, match=r"got 3$"):
        require_choice("method", 3, ["exact", "probes"])


@pytest.mark.parametrize("value", [0, -1, 1.0, True, "1", None])
def test_require_positive_int(value):
    require_positive_int("N", 1)
    with pytest.raises(InputError, match=r"^N must be a positive integer, got "):
        require_positive_int("N", value)


@pytest.mark.parametrize("value", [np.int64(3), np.arange(4)[3]])
def test_integers_from_arrays_are_integers(value):
    require_positive_int("N", value)
