"""The page of `hesscope analyze`: one network, one partition."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hesscope.estimate.energies import BlockEnergies, SplitEnergies
from hesscope.report import figures
from hesscope.report.page import Picture, picture, write_page
from hesscope.report.style import COLOURS, PART_NAMES, number, percent, styled

if TYPE_CHECKING:
    import xarray as xr

# Tables show this many rows; everything is in the result file. Tick labels are legible for this many blocks.
ROWS_SHOWN = 20
BLOCKS_LABELLED = 30
KINDS = {
    "tensor": "tensor",
    "layer": "layer",
    "row": "row (output neuron, channel or token)",
    "column": "column (input)",
    "head": "attention head",
}


@dataclass(frozen=True)
class Group:
    """The blocks that one tensor was cut into: `fc1.weight[0]`, `fc1.weight[1]`, ... belong to `fc1.weight`."""

    name: str
    labels: tuple[str, ...]


def write_study_page(folder: Path, result: xr.Dataset, command: str) -> Path:
    """Write folder/report.html and the figures from the result of a study."""
    energies = SplitEnergies.from_xarray(result)
    groups = _groups(energies.hessian.labels)
    with styled():
        maps = _energy_figures(folder, energies, groups)
        pictures = {}
        if "hessian" in result:
            pictures["hessian"] = _hessian_figure(folder, result)
            pictures["eigenvalues"] = _eigenvalue_figure(folder, result)
    context = {
        "headline": _headline(energies, result.attrs),
        "maps": maps,
        "pictures": pictures,
        "eigenvalues": _extremes(result),
        "config": json.loads(result.attrs["config"]),
        "totals": [_total_row(part, energies.parts[part]) for part in energies.parts],
        "groups": [row for group in groups if (row := _group_row(group, energies.hessian)) is not None],
        "blocks": _block_rows(energies.hessian),
        "pairs": _pair_rows(energies.hessian),
        "block_count": len(energies.hessian.labels),
        "unmatched": _names(result.attrs.get("unmatched")),
        "unused": _names(result.attrs.get("unused")),
        "attributes": result.attrs,
        "command": command,
    }
    return write_page(folder / "report.html", "study.html", context)


def with_error(value: float, stderr: float) -> str:
    """'12.3 ± 0.4', or the value alone if it is exact."""
    return number(value) if stderr == 0 else f"{number(value)} ± {number(stderr, 1)}"


def _headline(energies: SplitEnergies, attributes: Any) -> str:
    hessian = energies.hessian
    share, error = hessian.diagonality, hessian.diagonality_stderr
    if hessian.total == 0:
        return "The Hessian is zero: the loss is linear in the parameters."
    spread = "" if error == 0 else f" (± {number(100 * error, 1)} points, one standard error)"
    scheme = attributes["partition"]
    cut = f"With one block per {KINDS[scheme]}" if scheme in KINDS else f"In the partition {scheme}"
    return (
        f"{cut}, {percent(share)}{spread} of the Hessian’s energy lies in its {len(hessian.labels):,} diagonal blocks."
    )


def _groups(labels: tuple[str, ...]) -> list[Group]:
    members: dict[str, list[str]] = {}
    for label in labels:
        members.setdefault(label.split("[")[0], []).append(label)
    return [Group(name, tuple(inside)) for name, inside in members.items()]


def _total_row(part: str, energies: BlockEnergies) -> dict[str, Any]:
    samples = energies.samples
    error = 0.0 if samples is None else float(samples.sum(axis=(1, 2)).std(ddof=1) / np.sqrt(len(samples)))
    return {
        "part": PART_NAMES[part],
        "total": with_error(energies.total, error),
        "diagonality": with_error(100 * energies.diagonality, 100 * energies.diagonality_stderr) + " %"
        if energies.total > 0
        else "—",
    }


def _group_row(group: Group, energies: BlockEnergies) -> dict[str, Any] | None:
    """Off-diagonal ratio among one tensor's blocks; None if it is a single block or its blocks differ in size."""
    sizes = {energies.sizes[energies.labels.index(label)] for label in group.labels}
    if len(group.labels) < 2 or len(sizes) > 1:
        return None
    ratio = energies.off_diagonal_ratio(group.labels)
    within = energies.aggregate({group.name: group.labels}).total
    return {
        "name": group.name,
        "blocks": len(group.labels),
        "size": sizes.pop(),
        "ratio": with_error(ratio, energies.off_diagonal_ratio_stderr(group.labels)) if np.isfinite(ratio) else "—",
        "inverse": ratio,
        "share": within / energies.total if energies.total > 0 else 0.0,
    }


def _block_rows(energies: BlockEnergies) -> list[dict[str, Any]]:
    """The diagonal blocks of largest energy."""
    diagonal, columns = np.diag(energies.values), energies.values.sum(axis=0)
    order = np.argsort(-diagonal, kind="stable")[:ROWS_SHOWN]
    return [
        {
            "label": energies.labels[i],
            "size": energies.sizes[i],
            "energy": with_error(float(diagonal[i]), float(energies.stderr[i, i])),
            "own": float(diagonal[i] / columns[i]) if columns[i] > 0 else float("nan"),
        }
        for i in order
    ]


def _pair_rows(energies: BlockEnergies) -> list[dict[str, Any]]:
    """The off-diagonal pairs of largest energy, also relative to ||H_ii|| ||H_jj||."""
    values = (energies.values + energies.values.T) / 2
    scale = np.sqrt(np.outer(np.diag(values), np.diag(values)))
    coupling = np.divide(values, scale, out=np.zeros_like(values), where=scale > 0)
    rows, columns = np.triu_indices(len(values), k=1)
    order = np.argsort(-values[rows, columns], kind="stable")[:ROWS_SHOWN]
    return [
        {
            "first": energies.labels[i],
            "second": energies.labels[j],
            "energy": with_error(float(values[i, j]), float(energies.stderr[i, j])),
            "share": float(2 * values[i, j] / energies.total),
            "coupling": float(coupling[i, j]),
        }
        for i, j in zip(rows[order], columns[order], strict=True)
        if values[i, j] > 0
    ]


def _extremes(result: xr.Dataset) -> dict[str, float]:
    """Largest and smallest eigenvalue, and how many are below zero by more than rounding; empty without eigenvalues."""
    if "eigenvalue" not in result:
        return {}
    values = result["eigenvalue"].to_numpy()
    precision = np.finfo(result.attrs["dtype"]).eps * len(values) * np.abs(values).max()
    return {"largest": values[-1], "smallest": values[0], "negative": int((values < -precision).sum())}


def _names(value: Any) -> list[str]:
    """A netCDF attribute that was written as a list of strings (an empty list and a single string come back bare)."""
    if value is None or isinstance(value, str):
        return [value] if value else []
    return [str(name) for name in np.atleast_1d(value)]


def _energy_figures(folder: Path, energies: SplitEnergies, groups: list[Group]) -> dict[str, Picture]:
    """One map for H, G and R each, relative to its own largest energy; H's has names where they are legible."""
    labels = energies.hessian.labels
    edges = np.cumsum([len(group.labels) for group in groups])[:-1].tolist()
    contiguous = [label for group in groups for label in group.labels] == list(labels)
    pictures = {}
    for part, each in energies.parts.items():
        named = labels if part == "H" and len(labels) <= BLOCKS_LABELLED else ()
        fig, grid = figures.panels(1, 1, 7.6 if part == "H" else 5.4, 6.4 if part == "H" else 4.4)
        axes = grid[0, 0]
        image = figures.energy_map(axes, each.values, PART_NAMES[part], "" if named else "block", named)
        if contiguous and 1 < len(groups) < len(labels):
            figures.group_borders(axes, edges, len(labels))
        figures.colour_bar(fig, image, axes, "block energy / largest block energy")
        pictures[part] = picture(folder, f"energies-{part}", fig, f"Energy of every pair of blocks, {PART_NAMES[part]}")
    return pictures


def _hessian_figure(folder: Path, result: xr.Dataset) -> Picture:
    """|H| with its parameters in the order of the blocks."""
    order = np.argsort(result["block_of_parameter"].to_numpy(), kind="stable")
    fig, grid = figures.panels(1, 1, 7.2, 6.0)
    sizes = [int(size) for size in result["block_size"]]
    borders = sizes if len(sizes) <= 200 else []
    image = figures.hessian_map(grid[0, 0], result["hessian"].to_numpy()[np.ix_(order, order)], borders, "")
    grid[0, 0].set_xlabel("parameter, in the order of the blocks")
    figures.colour_bar(fig, image, grid[0, 0], "|entry| / largest |entry|")
    return picture(folder, "hessian", fig, "Magnitude of the Hessian's entries")


def _eigenvalue_figure(folder: Path, result: xr.Dataset) -> Picture:
    fig, grid = figures.panels(1, 1, 8.0, 3.4)
    figures.eigenvalue_histogram(grid[0, 0], result["eigenvalue"].to_numpy(), "", COLOURS["G"])
    grid[0, 0].set_ylabel("number of eigenvalues")
    return picture(folder, "eigenvalues", fig, "Histogram of the Hessian's eigenvalues")
