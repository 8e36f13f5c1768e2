"""Top eigenspaces of layers that several networks share: results of `hesscope layers`, set beside each other.

A result of a step is a record SharedEigenspaces of `hesscope.layerwise`, one file for each layer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from hesscope._version import __version__
from hesscope.core.checks import nearest, require_positive_int
from hesscope.core.errors import InputError
from hesscope.core.result_files import open_result
from hesscope.layerwise.eigenstructure import Eigenstructure
from hesscope.layerwise.shared_eigenspaces import shared_eigenspaces
from hesscope.objective.batches import fingerprint
from hesscope.study.config import read_config
from hesscope.study.layers import EIGENPAIRS, step_name
from hesscope.study.layers import RESULT as LAYERS_RESULT
from hesscope.study.steps import Progress, Reporter, Step, run_steps
from hesscope.study.store import Store

if TYPE_CHECKING:
    import xarray as xr

RESULT = "shared"


@dataclass(frozen=True)
class LayersRun:
    """A finished run of `hesscope layers`: its label, its folder, and its table of layers."""

    label: str
    folder: Path
    table: xr.Dataset

    @property
    def names(self) -> list[str]:
        """Its layers, in the order of the network."""
        return [str(name) for name in self.table["layer"].to_numpy()]

    @property
    def store(self) -> Store:
        """Its results."""
        return Store(self.folder, str(self.table.attrs["settings"]))

    def number(self, layer: str, variable: str) -> int:
        """An entry of the table."""
        return int(self.table[variable].sel(layer=layer))

    def shape(self, layer: str) -> tuple[int, int]:
        """(outputs, inputs) of a layer."""
        return self.number(layer, "outputs"), self.number(layer, "inputs")

    def structure(self, layer: str) -> Eigenstructure:
        """A layer's eigenpairs.

        Raises:
            InputError: they are not those of the table: a later run has not finished.
        """
        result = self.store.load(step_name(self.names.index(layer), EIGENPAIRS))
        if result is None:
            raise InputError(
                f"{self.folder} has no eigenpairs of layer {layer!r} that belong to its table: run `hesscope layers` "
                "on its STUDY.toml to the end"
            )
        return Eigenstructure.from_xarray(result)


@dataclass(frozen=True)
class CompareStudy:
    """What `compare` needs, loaded and checked.

    Attributes:
        runs: at least two; layers: that all have, to be compared; left_out: layer -> why it is not compared.
        k: largest dimension, or all that there are; note: what to know beside the numbers, or nothing.
    """

    folder: Path
    runs: tuple[LayersRun, ...]
    layers: tuple[str, ...]
    left_out: Mapping[str, str]
    k: int | None
    note: str

    @cached_property
    def store(self) -> Store:
        """Where the results go, under a fingerprint of all that they depend on."""
        runs = [(run.label, run.store.settings) for run in self.runs]
        return Store(self.folder, fingerprint((RESULT, __version__, runs, self.layers, self.k)))


def prepare_compare(
    runs: Sequence[Path], folder: Path, layers: Sequence[str] = (), k: int | None = None
) -> CompareStudy:
    """Find the results of the runs and the layers that can be compared.

    Args:
        runs: output folders of finished runs of `hesscope layers`, or their STUDY.toml.
        folder: where the results go.
        layers: names; all that all runs have in one shape, unless told. k: largest dimension; all unless told.

    Raises:
        InputError: fewer than two runs, one twice, one without results, runs of different curvature, no layer to be
            compared or one that cannot be, or a k beyond the eigenpairs of one.
    """
    if len(runs) < 2:
        raise InputError(f"compare needs at least two runs of `hesscope layers`, got {len(runs)}")
    found = _opened(runs)
    first = found[0]
    for run in found[1:]:
        one, other = (str(each.table.attrs["curvature"]) for each in (first, run))
        if one != other:
            raise InputError(
                f"only runs of one curvature can be compared: {first.label!r} has layers.matrix = {one!r}, "
                f"{run.label!r} {other!r}"
            )
    names, reasons = _common(found)
    for name in layers:
        if name in reasons:
            raise InputError(f"layer {name!r} cannot be compared: it {reasons[name]}")
        if name not in names:
            raise InputError(
                f"no run has a layer {name!r}; all have {', '.join(names) or 'none'}{nearest(name, names)}"
            )
    if not names:
        why = "; ".join(f"{name!r} {reason}" for name, reason in reasons.items())
        raise InputError(f"the runs have no layer of one name and one shape in common: {why}")
    if layers:
        names, reasons = [name for name in names if name in layers], {}
    if k is not None:
        _require_pairs(found, names, k)
    return CompareStudy(folder, found, tuple(names), reasons, k, _note(found))


def describe_compare(study: CompareStudy) -> list[tuple[str, str]]:
    """What is about to be done: (what, how much) lines."""
    return [
        *(("run", f"{run.label}: {run.table.attrs['model']}, {run.table.attrs['data']}") for run in study.runs),
        ("layers", ", ".join(study.layers)),
        *(("left out", f"{name} {reason}") for name, reason in study.left_out.items()),
        *([("note", study.note)] if study.note else []),
        ("results", str(study.folder)),
    ]


def run_compare(study: CompareStudy, report: Reporter) -> int:
    """Compare; returns how many layers were found done from an earlier run on the same results."""
    steps = [
        Step(shared_name(number), f"comparing {name}", 1.0, _compared(study, name))
        for number, name in enumerate(study.layers)
    ]
    return run_steps(steps, study.store, report)


def compare_results(study: CompareStudy) -> list[xr.Dataset]:
    """What was found, layer by layer."""
    return [study.store.require(shared_name(number)) for number in range(len(study.layers))]


def shared_name(number: int) -> str:
    """Name of the step that compares the layer of this number."""
    return f"{RESULT}-{number:03d}"


def _compared(study: CompareStudy, layer: str) -> Callable[[Progress], xr.Dataset]:
    def compute(progress: Progress) -> xr.Dataset:
        structures = []
        for done, run in enumerate(study.runs, start=1):
            structures.append(run.structure(layer))
            progress(done / (len(study.runs) + 1))
        found = shared_eigenspaces(structures, [run.label for run in study.runs], study.k)
        return found.to_xarray().assign_attrs(
            layer=layer,
            curvature=str(study.runs[0].table.attrs["curvature"]),
            note=study.note,
            left_out=json.dumps(dict(study.left_out)),
            models=[str(run.table.attrs["model"]) for run in study.runs],
            data=[str(run.table.attrs["data"]) for run in study.runs],
        )

    return compute


def _opened(runs: Sequence[Path]) -> tuple[LayersRun, ...]:
    """The tables of the runs, and a different label for each: the end of its folder's path."""
    folders: list[Path] = []
    tables = []
    for path in runs:
        is_study = path.is_file()
        folder = (path.parent / read_config(path).output if is_study else path).resolve()
        what_to_run = (
            f"`hesscope layers {path}`" if is_study else "`hesscope layers` on the STUDY.toml with this output"
        )
        if folder in folders:
            raise InputError(f"{path} is the same run as {runs[folders.index(folder)]}")
        file = Store(folder, "").path(LAYERS_RESULT)
        if not is_study and not path.is_dir():
            raise InputError(f"there is no folder or STUDY.toml {path}")
        if not file.exists():
            raise InputError(f"{path} has no results of `hesscope layers`: run {what_to_run} first")
        folders.append(folder)
        tables.append(open_result(file))
    parts = next(n for n in count(1) if len({folder.parts[-n:] for folder in folders}) == len(folders))
    return tuple(
        LayersRun("/".join(folder.parts[-parts:]), folder, table) for folder, table in zip(folders, tables, strict=True)
    )


def _common(runs: Sequence[LayersRun]) -> tuple[list[str], dict[str, str]]:
    """Layers that all runs have in one shape, in the order of the first; and of the others why they are none."""
    names, reasons = [], {}
    for name in dict.fromkeys(name for run in runs for name in run.names):
        missing = [run.label for run in runs if name not in run.names]
        shapes = {run.label: run.shape(name) for run in runs if name in run.names}
        if missing:
            reasons[name] = f"was not measured in {', '.join(missing)}"
        elif len(set(shapes.values())) > 1:
            of_runs = ", ".join(f"{outputs} x {inputs} in {label}" for label, (outputs, inputs) in shapes.items())
            reasons[name] = f"has different shapes: {of_runs}"
        else:
            names.append(name)
    return names, reasons


def _require_pairs(runs: Sequence[LayersRun], names: Sequence[str], k: int) -> None:
    require_positive_int("k", k)
    for name in names:
        for run in runs:
            known = run.number(name, "pairs")
            if k > known:
                raise InputError(
                    f"k must be at most {known}, the eigenpairs of layer {name!r} in {run.label!r}, got {k}"
                )


def _note(runs: Sequence[LayersRun]) -> str:
    """A word about runs that differ in more than their networks; empty if they do not."""
    prints = {str(run.table.attrs["data_fingerprint"]) for run in runs}
    return "the runs were measured on different data" if len(prints) > 1 else ""
