"""Store: a folder with one netCDF file per finished step, written so that a kill at any moment leaves it readable."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import xarray as xr

from hesscope._version import __version__
from hesscope.core.errors import InputError
from hesscope.core.files import TEMPORARY_SUFFIX, atomic_path


@dataclass(frozen=True)
class Store:
    """Results of one study under fixed settings.

    A result is found again only if it was made under the same `settings` (a fingerprint of everything that the numbers
    depend on); files of other settings are overwritten as the study proceeds.
    """

    folder: Path
    settings: str

    def path(self, name: str) -> Path:
        """File of the step `name`."""
        return self.folder / f"results-{name}.nc"

    def has(self, name: str) -> bool:
        """Whether the step is finished under these settings."""
        return self.load(name) is not None

    def load(self, name: str) -> xr.Dataset | None:
        """The step's result in memory; None if it is not there, was made under other settings or cannot be read.

        A file that cannot be read (a full disk, a stray copy) counts as not there: its step is computed again.
        """
        path = self.path(name)
        if not path.exists():
            return None
        try:
            result = open_result(path)
        except InputError:
            return None
        return result if result.attrs.get("settings") == self.settings else None

    def require(self, name: str) -> xr.Dataset:
        """The result of an earlier step."""
        result = self.load(name)
        if result is None:
            raise InputError(f"{self.folder} has no result of step {name!r} under these settings")
        return result

    def save(self, name: str, result: xr.Dataset) -> None:
        """Write a result atomically, compressed, with the versions of what made it."""
        labelled = result.assign_attrs(
            settings=self.settings,
            step=name,
            version=__version__,
            versions=f"PyTorch {torch.__version__}, NumPy {np.__version__}, Python {platform.python_version()}",
        )
        encoding = {
            variable: {"zlib": True, "complevel": 2}
            for variable, data in result.data_vars.items()
            if data.size > 10_000
        }
        with atomic_path(self.path(name)) as temporary:
            labelled.to_netcdf(temporary, engine="h5netcdf", encoding=encoding)

    def clear(self, prefix: str) -> None:
        """Delete the results of all steps whose names begin with `prefix`, and what killed runs left half-written."""
        litter = [*self.folder.glob(f"results-{prefix}*.nc"), *self.folder.glob(f".results-*{TEMPORARY_SUFFIX}")]
        for path in litter:
            path.unlink(missing_ok=True)


def open_result(path: Path) -> xr.Dataset:
    """Read a result file into memory.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        with xr.open_dataset(path, engine="h5netcdf") as dataset:
            return dataset.load()
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
