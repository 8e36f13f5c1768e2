import numpy as np
import pytest
import xarray as xr

from hesscope.core.errors import InputError
from hesscope.core.files import atomic_path
from hesscope.core.result_files import open_result
from hesscope.study.steps import Step, run_steps
from hesscope.study.store import Store


def numbers(value: float) -> xr.Dataset:
    return xr.Dataset({"x": ("i", np.full(3, value))})


def test_results_are_found_again_only_under_their_settings(tmp_path):
    Store(tmp_path, "one").save("a", numbers(1.0))
    found = Store(tmp_path, "one").load("a")
    assert found is not None
    assert found["x"].to_numpy().tolist() == [1.0, 1.0, 1.0]
    assert not Store(tmp_path, "other").has("a")
    with pytest.raises(InputError, match="no result of step 'a' under these settings"):
        Store(tmp_path, "other").require("a")


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(RuntimeError, match="half-way"), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError("half-way")
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_broken_file_is_named(tmp_path):
    path = tmp_path / "results-a.nc"
    path.write_bytes(b"not netCDF")
    with pytest.raises(InputError, match=r"cannot read .*results-a\.nc"):
        open_result(path)


def test_steps_are_done_once_and_progress_ends_at_one(tmp_path):
    calls, shares = [], []

    def compute(progress):
        calls.append(1)
        progress(0.5)
        return numbers(2.0)

    steps = [Step("a", "first", 1.0, compute), Step("b", "second", 3.0, compute)]
    store = Store(tmp_path, "s")
    assert run_steps(steps, store, lambda title, share: shares.append((title, share))) == 0
    assert shares == [("first", 0.0), ("first", 0.125), ("second", 0.25), ("second", 0.625), ("done", 1.0)]
    assert run_steps(steps, store, lambda title, share: None) == 2
    assert len(calls) == 2


def test_steps_before_an_exception_are_kept(tmp_path):
    def fail(progress):
        raise KeyboardInterrupt

    store = Store(tmp_path, "s")
    with pytest.raises(KeyboardInterrupt):
        run_steps([Step("a", "", 1.0, lambda _: numbers(1.0)), Step("b", "", 1.0, fail)], store, lambda *_: None)
    assert store.has("a")
    assert not store.path("b").exists()
