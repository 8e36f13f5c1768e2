"""Store: a folder with one netCDF file per finished step, written so that a kill at any moment leaves it readable."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import xarray as xr

from hesscope.core.errors import InputError


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder, renamed to `path` when the body succeeds, removed when it fails."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
        """The step's result in memory; None if it is not there or was made under other settings."""
        path = self.path(name)
        if not path.exists():
            return None
        result = open_result(path)
        return result if result.attrs.get("settings") == self.settings else None

    def require(self, name: str) -> xr.Dataset:
        """The result of an earlier step."""
        result = self.load(name)
        if result is None:
            raise InputError(f"{self.folder} has no result of step {name!r} under these settings")
        return result

    def save(self, name: str, result: xr.Dataset) -> None:
        """Write a result atomically, compressed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        labelled = result.assign_attrs(settings=self.settings, step=name)
        encoding = {
            variable: {"zlib": True, "complevel": 2}
            for variable, data in result.data_vars.items()
            if data.size > 10_000
        }
        with atomic_path(self.path(name)) as temporary:
            labelled.to_netcdf(temporary, engine="h5netcdf", encoding=encoding)

    def remove(self, name: str) -> None:
        """Delete a step's result, if there is one."""
        self.path(name).unlink(missing_ok=True)


def open_result(path: Path) -> xr.Dataset:
    """Read a result file into memory.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        with xr.open_dataset(path, engine="h5netcdf") as dataset:
            return dataset.load()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error}") from error
