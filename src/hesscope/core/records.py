"""What every result shares: where it came from, and the way to and from xarray.

Records are frozen dataclasses of NumPy arrays and floats. xarray is imported only when a record is converted, so that
this level runs where only torch, NumPy and SciPy are installed.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from hesscope._version import __version__
from hesscope.core.errors import InputError

if TYPE_CHECKING:
    import xarray as xr


@dataclass(frozen=True)
class Provenance:
    """How a number was made: hesscope's version, seed, dtype, device, method ("engine") and data fingerprint."""

    engine: str
    dtype: str
    device: str
    data_fingerprint: str = ""
    seed: int | None = None
    version: str = __version__

    def attributes(self) -> dict[str, Any]:
        """As attributes of an xarray object; a seed of None (nothing random) is left out."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    @classmethod
    def from_attributes(cls, attributes: Any) -> Provenance:
        """Inverse of `attributes`; other keys are ignored."""
        known = {field.name for field in fields(cls)}
        values = {key: attributes[key] for key in known if key in attributes}
        if "engine" not in values:
            raise InputError("this data set was not written by hesscope: it has no attribute 'engine'")
        if "seed" in values:
            values["seed"] = int(values["seed"])
        return cls(**values)


def require_xarray_kind(dataset: xr.Dataset, kind: str) -> None:
    """Raise InputError unless the data set was made by the record `kind`."""
    found = dataset.attrs.get("record")
    if found != kind:
        raise InputError(f"expected a data set of record {kind!r}, got {found!r}")
