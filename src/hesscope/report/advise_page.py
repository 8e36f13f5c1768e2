"""The page of `hesscope advise`: the answer first, the partitions side by side, a map to zoom into, every parameter."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hesscope.estimate.diagonality import Diagonality, Figure, PartitionComparison
from hesscope.estimate.energies import BlockEnergies
from hesscope.report.page import Picture, picture, write_page
from hesscope.report.style import MAP, SERIES_COLOURS, figure, number, percent, styled

if TYPE_CHECKING:
    import xarray as xr

# Below this share of the energy, even the best partition is called hardly block-diagonal.
HARDLY = 0.5
# Decades of energy that the maps show below their largest entry.
DECADES = 6.0
MATRIX_NAMES = {"hessian": "Hessian", "gauss_newton": "Gauss-Newton matrix"}
SCHEME_NAMES = {
    "module": "unit of the network",
    "layer": "layer",
    "tensor": "tensor",
    "head": "attention head",
    "row": "row (output neuron, channel or token)",
    "column": "column (input)",
    "mixed": "each tensor in its own way",
}
TABLE_HEADER = ("partition", "blocks", "entries", "energy kept", "chance", "beyond chance", "bits", "curvature kept")


def advise_headline(result: xr.Dataset) -> str:
    """The answer in a sentence or two."""
    rows = PartitionComparison.from_xarray(result).rows
    verdict = json.loads(result.attrs["verdict"])
    matrix = MATRIX_NAMES[result.attrs["matrix"]]
    best = verdict["name"]
    if verdict["runner_up"] is None and best is None:
        return f"The {matrix} is zero: the loss is linear in the parameters."
    if best is None:
        row = rows[verdict["runner_up"]]
        return (
            f"Do not split: no partition holds more of the {matrix}’s energy in its diagonal blocks than chance would. "
            f"By {_scheme(verdict['runner_up'])} it is {_with_error(row.energy)}, where chance gives "
            f"{percent(row.chance.value)}."
        )
    row = rows[best]
    return (
        f"{'Hardly' if row.energy.value < HARDLY else 'Best'} block-diagonal: with one block per {_scheme(best)}, the "
        f"{matrix} has {_with_error(row.energy)} of its energy in the diagonal blocks, where chance gives "
        f"{percent(row.chance.value)}.{_within(result)}"
    )


def _within(result: xr.Dataset) -> str:
    """What the cuts keep of the tensors' own blocks, as the table of cuts has it."""
    choices = json.loads(result.attrs["choices"]).values()
    shares = np.array([max(choice["share"], 0.0) for choice in choices])
    kept = np.array([choice["energy"][0] for choice in choices])
    if shares.sum() == 0 or not any(choice["energy"][0] < 1 for choice in choices):
        return ""
    return (
        f" Within the tensors themselves, the cuts advised below keep {percent(float(shares @ kept / shares.sum()))}."
    )


def advise_table(result: xr.Dataset) -> list[tuple[str, ...]]:
    """The partitions side by side, header first, the one with the most bits on top."""
    rows = PartitionComparison.from_xarray(result).rows
    return [TABLE_HEADER, *(_table_row(name, rows[name]) for name in _ordered(rows))]


def cut_table(result: xr.Dataset) -> list[tuple[str, ...]]:
    """How every parameter is cut, header first; tensors of one kind of cut that hold next to nothing are left out."""
    cuts, choices = json.loads(result.attrs["parameters_cut"]), json.loads(result.attrs["choices"])
    found = []
    for name in sorted(cuts, key=lambda each: -choices[each]["share"]):
        cut, choice = cuts[name], choices[name]
        how = "whole" if cut["scheme"] == "whole" else f"by {cut['scheme']}"
        blocks = f"{cut['blocks']:,}"
        where = "—" if cut["axis"] is None else f"axis {cut['axis']}, {cut['block_size']} each"
        value, stderr = choice["energy"]
        energy = Figure(value, stderr, 1 if stderr else 0)
        kept = "—" if cut["scheme"] == "whole" else _with_error(energy)
        chance = "—" if cut["scheme"] == "whole" else percent(choice["chance"])
        shape = " × ".join(map(str, cut["shape"]))
        found.append((name, shape, percent(max(choice["share"], 0.0)), how, blocks, where, kept, chance))
    header = (
        "parameter",
        "shape",
        "share of energy",
        "cut",
        "blocks",
        "blocks are",
        "energy kept in it",
        "chance",
    )
    return [header, *found]


def write_advise_page(
    folder: Path,
    result: xr.Dataset,
    energies: xr.Dataset,
    spectra: xr.Dataset | None,
    zoom: xr.Dataset | None,
    command: str,
) -> Path:
    """Write folder/advise.html and the figures.

    Args:
        result: of the study; energies: of all pairs of blocks; spectra: of the blocks, or None.
        zoom: energies of the Gauss-Newton matrix's finest blocks, with their places in the hierarchy, or None.
    """
    comparison = PartitionComparison.from_xarray(result)
    pairs = BlockEnergies.from_xarray(energies)
    verdict = json.loads(result.attrs["verdict"])
    with styled():
        pictures = {
            "comparison": _comparison_figure(folder, comparison),
            "map": _map_figure(folder, pairs, energies.attrs["scheme"]),
        }
        if spectra is not None:
            pictures["distances"] = _distance_figure(folder, spectra)
    context = {
        "headline": advise_headline(result),
        "verdict": verdict,
        "cards": _cards(comparison, verdict),
        "pictures": pictures,
        "table": advise_table(result),
        "errors": _error_rows(comparison),
        "cuts": cut_table(result),
        "left_out": json.loads(result.attrs["left_out"]),
        "pairs": _pair_rows(pairs),
        "scheme": energies.attrs["scheme"],
        "diagonality": _with_error(
            Figure(pairs.diagonality, pairs.diagonality_stderr, int(pairs.diagonality_stderr > 0))
        ),
        "heterogeneity": None if spectra is None else _heterogeneity(spectra),
        "zoom": None if zoom is None else _zoom(zoom),
        "attributes": result.attrs,
        "matrix": MATRIX_NAMES[result.attrs["matrix"]],
        "config": json.loads(result.attrs["config"]),
        "provenance": comparison.provenance,
        "products": comparison.products,
        "command": command,
    }
    return write_page(folder / "advise.html", "advise.html", context)


def _scheme(name: str) -> str:
    return SCHEME_NAMES.get(name, name)


def _ordered(rows: Any) -> list[str]:
    return sorted(rows, key=lambda name: -np.nan_to_num(rows[name].bits.value, nan=-np.inf))


def _with_error(share: Figure) -> str:
    """'12.3 % ± 0.4'."""
    if not np.isfinite(share.value):
        return "—"
    shown = percent(min(max(share.value, 0.0), 1.0) if abs(share.value - 0.5) > 0.5 and share.stderr else share.value)
    return shown if share.degrees == 0 else f"{shown} ± {number(100 * share.stderr, 1)}"


def _plain(value: Figure) -> str:
    if not np.isfinite(value.value):
        return "—"
    return number(value.value, 2) if value.degrees == 0 else f"{value.value:.2f} ± {number(value.stderr, 1)}"


def _table_row(name: str, row: Diagonality) -> tuple[str, ...]:
    return (
        name,
        f"{row.blocks:,}",
        percent(row.share_of_entries),
        _with_error(row.energy),
        percent(row.chance.value),
        _plain(row.beyond_chance),
        _plain(row.bits),
        _with_error(row.curvature_kept),
    )


def _error_rows(comparison: PartitionComparison) -> list[tuple[str, str, str, str]]:
    return [
        (name, f"{row.freedom:,.0f}", _with_error(row.frobenius_error), _bound(row.spectral_error))
        for name in _ordered(comparison.rows)
        for row in [comparison.rows[name]]
    ]


def _bound(error: Figure) -> str:
    """An estimate is a lower bound."""
    if not np.isfinite(error.value):
        return "—"
    return percent(error.value) if error.degrees == 0 else f"≥ {percent(error.value)}"


def _cards(comparison: PartitionComparison, verdict: Any) -> list[dict[str, str]]:
    rows = comparison.rows
    name = verdict["name"] or verdict["runner_up"]
    if name is None:
        return []
    row = rows[name]
    cards = [
        {
            "title": "advised" if verdict["name"] else "not to be split",
            "value": f"by {name}" if verdict["name"] else "—",
            "what": f"more bits than {verdict['runner_up']} with a probability of {percent(verdict['sureness'])}"
            if verdict["name"] and verdict["runner_up"]
            else verdict["reason"],
        },
        {
            "title": f"energy kept by {name}",
            "value": percent(row.energy.value),
            "what": f"of ‖H‖², in {percent(row.share_of_entries)} of the entries; chance would keep "
            f"{percent(row.chance.value)}",
        },
    ]
    if "mixed" in rows:
        mixed = rows["mixed"]
        cards.append(
            {
                "title": "each tensor in its own way",
                "value": percent(mixed.energy.value),
                "what": f"of the energy in {mixed.blocks:,} blocks, {percent(mixed.share_of_entries)} of the entries "
                f"({_plain(mixed.bits)} bits)",
            }
        )
    return cards


def _comparison_figure(folder: Path, comparison: PartitionComparison) -> Picture:
    """Energy kept and chance, for every partition."""
    names = _ordered(comparison.rows)[::-1]
    fig = figure(9.2, 0.9 + 0.42 * len(names))
    axes = fig.add_subplot()
    places = np.arange(len(names))
    rows = [comparison.rows[name] for name in names]
    kept = np.array([100 * row.energy.value for row in rows])
    half = np.array([100 * (float(row.energy.interval().upper) - row.energy.value) for row in rows])
    axes.barh(places, kept, height=0.55, color=SERIES_COLOURS[0], label="energy kept, with 95 % interval")
    axes.errorbar(kept, places, xerr=half, fmt="none", ecolor="#222222", elinewidth=1.2, capsize=3)
    chance = [100 * row.chance.value for row in rows]
    axes.plot(chance, places, "|", color=SERIES_COLOURS[1], markersize=16, markeredgewidth=2.2, label="chance")
    axes.set_yticks(places, [f"{name} ({row.blocks:,})" for name, row in zip(names, rows, strict=True)])
    axes.set_xlabel("share of the energy in the diagonal blocks (%)")
    axes.set_xlim(
        min(0.0, float((kept - half).min()) * 1.05), max(1.0, 1.06 * float(max((kept + half).max(), *chance)))
    )
    fig.legend(loc="outside upper right", ncols=2)
    return picture(folder, "partitions", fig, "Energy in the diagonal blocks of each partition, beside chance")


def _map_figure(folder: Path, energies: BlockEnergies, scheme: str) -> Picture:
    """Energies of all pairs of blocks on a logarithmic scale."""
    blocks = len(energies.labels)
    labelled = blocks <= 60
    side = min(10.0, max(6.0, 3.2 + 0.16 * blocks)) if labelled else 8.0
    fig = figure(side + 2.4, side)
    axes = fig.add_subplot()
    values = np.maximum(energies.values, 0.0)
    top = float(values.max()) or 1.0
    with np.errstate(divide="ignore"):
        shown = np.maximum(np.log10(values / top), -DECADES)
    image = axes.imshow(shown, cmap=MAP, vmin=-DECADES, vmax=0)
    if labelled:
        axes.set_xticks(range(blocks), energies.labels, rotation=90, fontsize=7)
        axes.set_yticks(range(blocks), energies.labels, fontsize=7)
    else:
        axes.set_xlabel(f"block by {scheme}")
        axes.set_ylabel(f"block by {scheme}")
    for side_name in ("top", "right", "bottom", "left"):
        axes.spines[side_name].set_visible(False)
    bar = fig.colorbar(image, ax=axes, shrink=0.8, pad=0.02)
    bar.set_label("energy: powers of ten below the largest")
    return picture(folder, "map", fig, f"Energies of all pairs of blocks by {scheme}")


def _distance_figure(folder: Path, spectra: xr.Dataset) -> Picture:
    labels = [str(label) for label in spectra["block"].to_numpy()]
    distances = spectra["distance"].to_numpy()
    size = min(9.0, max(5.0, 3.4 + 0.22 * len(labels)))
    fig = figure(size + 2.4, size)
    axes = fig.add_subplot()
    image = axes.imshow(distances, cmap="viridis", vmin=0, vmax=1)
    axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=8)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    bar = fig.colorbar(image, ax=axes, shrink=0.8, pad=0.02)
    bar.set_label("Jensen-Shannon distance (0 equal, 1 disjoint)")
    return picture(folder, "heterogeneity", fig, "Distances between the spectra of the blocks")


def _heterogeneity(spectra: xr.Dataset) -> dict[str, str]:
    value, error = float(spectra.attrs["heterogeneity"]), float(spectra.attrs["heterogeneity_stderr"])
    text = number(value) if error == 0 else f"{value:.3f} ± {number(error, 1)}"
    return {"text": text, "scheme": _scheme(str(spectra.attrs["scheme"]))}


def _pair_rows(energies: BlockEnergies) -> list[tuple[str, str, str, str]]:
    """The pairs that hold most, each once."""
    share = energies.values / energies.total if energies.total > 0 else energies.values
    error = energies.stderr / energies.total if energies.total > 0 else energies.stderr
    rows, columns = np.triu_indices(len(energies.labels))
    double = np.where(rows == columns, 1.0, 2.0)
    order = np.argsort(-double * share[rows, columns])[:12]
    return [
        (
            energies.labels[rows[n]],
            "itself" if rows[n] == columns[n] else energies.labels[columns[n]],
            percent(double[n] * share[rows[n], columns[n]]),
            percent(double[n] * error[rows[n], columns[n]]) if error[rows[n], columns[n]] else "exact",
        )
        for n in order
    ]


def _zoom(zoom: xr.Dataset) -> str:
    """Data of the interactive map: levels with the groups' labels, and the finest energies in a byte each."""
    values = np.maximum(zoom["energy"].to_numpy(), 0.0)
    sizes = zoom["block_size"].to_numpy()
    levels = [str(name) for name in zoom["level"].to_numpy()]
    groups = {name: [str(label) for label in zoom[f"group_{name}"].to_numpy()] for name in levels}
    return json.dumps(
        {
            "labels": [str(label) for label in zoom["row_block"].to_numpy()],
            "sizes": [int(size) for size in sizes],
            "levels": levels,
            "groups": groups,
            "energies": _packed(values),
        }
    ).replace("</", "<\\/")


def _packed(values: npt.NDArray[np.float64]) -> str:
    """Energies as float32 in base64, row by row, relative to their sum."""
    total = float(values.sum()) or 1.0
    return base64.b64encode((values / total).astype("<f4").tobytes()).decode()
