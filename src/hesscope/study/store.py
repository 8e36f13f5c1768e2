"""Store: a folder with one netCDF file per finished step, written so that a kill at any moment leaves it readable."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import xarray as xr

from hesscope.core.errors import InputError
from hesscope.core.files import TEMPORARY_SUFFIX
from hesscope.core.result_files import open_result, save_result


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
        save_result(self.path(name), result.assign_attrs(settings=self.settings, step=name))

    def clear(self, prefix: str) -> None:
        """Delete the results of all steps whose names begin with `prefix`, and what killed runs left half-written."""
        litter = [*self.folder.glob(f"results-{prefix}*.nc"), *self.folder.glob(f".results-*{TEMPORARY_SUFFIX}")]
        for path in litter:
            path.unlink(missing_ok=True)
