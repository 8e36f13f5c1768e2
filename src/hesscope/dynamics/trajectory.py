"""Trajectory: the snapshots of one training run, in order of their steps, in memory or in a folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hesscope.core.errors import InputError
from hesscope.core.files import atomic_path
from hesscope.core.result_files import open_tree, save_tree
from hesscope.dynamics.snapshot import SCALARS, Snapshot

if TYPE_CHECKING:
    import xarray as xr

Array = npt.NDArray[np.float64]

IDENTITY = "tracker.json"
DIGITS = 9  # of a step's number in its file's name, so that names sort as steps do


@dataclass(frozen=True, eq=False)
class Trajectory:
    """What was measured of one training run.

    Attributes:
        snapshots: in order of their steps.
        identity: what was measured: model, loss, data, partition, measures; as words.
        left_out: steps that were due and not measured, because a time budget did not allow them.
    """

    snapshots: tuple[Snapshot, ...] = field(repr=False)
    identity: Mapping[str, str]
    left_out: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        steps = [snapshot.step for snapshot in self.snapshots]
        if any(late <= early for early, late in pairwise(steps)):
            raise InputError(f"the steps of a trajectory must increase, got {steps}")

    def __len__(self) -> int:
        return len(self.snapshots)

    @property
    def steps(self) -> npt.NDArray[np.int64]:
        """[S] the steps measured."""
        return np.asarray([snapshot.step for snapshot in self.snapshots], dtype=np.int64)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers, in the order of the parameters; empty without energies."""
        return tuple(dict.fromkeys(self.snapshots[0].layers)) if self.snapshots else ()

    def collect(self, what: Callable[[Snapshot], float]) -> Array:
        """[S] a number of every snapshot."""
        return np.asarray([what(snapshot) for snapshot in self.snapshots], dtype=np.float64)

    def measuring_share(self) -> float:
        """Time spent measuring over the time that training took; inf if that is not known."""
        spent = sum(sum(snapshot.seconds.values()) for snapshot in self.snapshots)
        trained = max((snapshot.training_seconds for snapshot in self.snapshots), default=0.0)
        return spent / trained if trained > 0 else float("inf")

    def to_xarray(self) -> xr.Dataset:
        """Numbers over the dimension step, energies between layers over (step, part, layer, layer_), eigenvalues."""
        import xarray as xr

        variables: dict[str, Any] = {name: ("step", self.collect(attrgetter(name))) for name in SCALARS}
        coordinates: dict[str, Any] = {"step": self.steps}
        if self.snapshots and all(snapshot.energies is not None for snapshot in self.snapshots):
            parts, layers = self.snapshots[0].parts, list(self.layers)
            stack = [[s.layer_energies(part).values for part in parts] for s in self.snapshots]
            ratios = [[[s.off_diagonal_ratio(name, part) for name in layers] for part in parts] for s in self.snapshots]
            variables["layer_energy"] = (("step", "part", "layer", "layer_"), np.asarray(stack))
            variables["off_diagonal_ratio"] = (("step", "part", "layer"), np.asarray(ratios))
            diagonality = [[s.block_energies(part).diagonality for part in parts] for s in self.snapshots]
            variables["diagonality"] = (("step", "part"), np.asarray(diagonality))
            coordinates |= {"part": list(parts), "layer": layers, "layer_": layers}
        if self.snapshots and all(snapshot.eigenvalues is not None for snapshot in self.snapshots):
            ends = [s.eigenvalues for s in self.snapshots if s.eigenvalues is not None]
            variables["largest"] = (("step", "top"), np.stack([end.largest for end in ends]))
            variables["smallest"] = (("step", "bottom"), np.stack([end.smallest for end in ends]))
            variables["gradient_share"] = ("step", np.asarray([end.gradient_share for end in ends]))
            variables["alignment"] = ("step", np.asarray([end.alignment for end in ends]))
        attributes = {"record": "Trajectory", **dict(self.identity), "left_out": list(self.left_out)}
        return xr.Dataset(variables, coords=coordinates, attrs=attributes)


def snapshot_path(folder: Path, step: int) -> Path:
    """File of one step."""
    return folder / f"step-{step:0{DIGITS}d}.nc"


def steps_in(folder: Path) -> list[int]:
    """Steps that have a file, ascending."""
    return sorted(int(path.stem.removeprefix("step-")) for path in folder.glob("step-" + "[0-9]" * DIGITS + ".nc"))


def save_snapshot(folder: Path, snapshot: Snapshot) -> None:
    """Write a step's file; a kill at any moment leaves none or all of it."""
    save_tree(snapshot_path(folder, snapshot.step), snapshot.to_xarray())


def load_snapshot(folder: Path, step: int) -> Snapshot:
    """Read a step's file; raises InputError if it cannot be read."""
    return Snapshot.from_xarray(open_tree(snapshot_path(folder, step)))


def open_trajectory(folder: Path | str) -> Trajectory:
    """All that a tracker has written so far, also while it runs.

    Raises:
        InputError: the folder has no trajectory, or a file of it cannot be read.
    """
    folder = Path(folder)
    identity, left_out = read_identity(folder)
    if identity is None:
        raise InputError(f"{folder} has no trajectory: no {IDENTITY}, which a Tracker writes into its folder")
    return Trajectory(tuple(load_snapshot(folder, step) for step in steps_in(folder)), identity, left_out)


def read_identity(folder: Path) -> tuple[dict[str, str] | None, tuple[int, ...]]:
    """What a folder's trajectory is of (None if there is none), and the steps that were left out."""
    path = folder / IDENTITY
    if not path.exists():
        return None, ()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return dict(content["identity"]), tuple(content["left_out"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"cannot read {path}: {error}") from error


def write_identity(folder: Path, identity: Mapping[str, str], left_out: Sequence[int]) -> None:
    """Say what a folder's trajectory is of."""
    with atomic_path(folder / IDENTITY) as temporary:
        content = {"identity": dict(identity), "left_out": list(left_out)}
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def require_same_identity(folder: Path, own: Mapping[str, str]) -> None:
    """Refuse a folder that holds another trajectory.

    Raises:
        InputError: naming both identities and where they differ.
    """
    found, _ = read_identity(folder)
    if found is None or found == dict(own):
        return
    differ = [key for key in {**found, **own} if found.get(key) != own.get(key)]
    sides = [", ".join(f"{key} = {side.get(key, 'none')}" for key in differ) for side in (found, own)]
    raise InputError(
        f"{folder} holds the trajectory of another study: there {sides[0]}; here {sides[1]}; use another folder"
    )
