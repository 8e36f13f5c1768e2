"""Results in files: one netCDF file each, written so that a kill at any moment leaves the old file or the new one."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from hesscope._version import __version__
from hesscope.core.errors import InputError
from hesscope.core.files import atomic_path

if TYPE_CHECKING:
    import xarray as xr

# Compressing smaller variables, or numbers without a pattern, takes time and saves nothing.
COMPRESSED_FROM = 10_000
# What cannot be read: a full disk, a stray copy, another format.
UNREADABLE = (OSError, ValueError, RuntimeError, KeyError)


def versions() -> dict[str, str]:
    """Versions of what makes a result, as attributes of its file."""
    made_by = f"PyTorch {torch.__version__}, NumPy {np.__version__}, Python {platform.python_version()}"
    return {"version": __version__, "versions": made_by}


def save_result(path: Path, result: xr.Dataset) -> None:
    """Write a data set atomically and compressed, with the versions of what made it."""
    encoding = {
        variable: {"zlib": True, "complevel": 2}
        for variable, data in result.data_vars.items()
        if data.size > COMPRESSED_FROM
    }
    with atomic_path(path) as temporary:
        result.assign_attrs(versions()).to_netcdf(temporary, engine="h5netcdf", encoding=encoding)


def open_result(path: Path) -> xr.Dataset:
    """Read a result file into memory.

    Raises:
        InputError: the file cannot be read.
    """
    import xarray as xr

    try:
        with xr.open_dataset(path, engine="h5netcdf") as dataset:
            return dataset.load()
    except UNREADABLE as error:
        raise InputError(f"cannot read {path}: {error}") from error


def save_tree(path: Path, result: xr.DataTree) -> None:
    """Write a tree of data sets atomically, with the versions of what made it; what is all zeros is compressed."""
    encoding = {
        node.path: {
            str(name): {"zlib": True, "complevel": 1}
            for name, data in node.data_vars.items()
            if data.size > COMPRESSED_FROM and not data.to_numpy().any()
        }
        for node in result.subtree
    }
    result = result.copy()
    result.attrs.update(versions())
    with atomic_path(path) as temporary:
        result.to_netcdf(temporary, engine="h5netcdf", encoding={key: own for key, own in encoding.items() if own})


def open_tree(path: Path) -> xr.DataTree:
    """Read a tree of data sets into memory.

    Raises:
        InputError: the file cannot be read.
    """
    import xarray as xr

    try:
        with xr.open_datatree(path, engine="h5netcdf") as tree:
            return tree.load()
    except UNREADABLE as error:
        raise InputError(f"cannot read {path}: {error}") from error
