"""The demo's page: one-hidden-layer networks on the digits, cross-entropy beside squared error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hesscope.estimate.energies import SplitEnergies
from hesscope.layerwise.eigenstructure import Eigenstructure
from hesscope.report import figures, layer_figures
from hesscope.report.layers_page import layers_headline, layers_table
from hesscope.report.page import Picture, picture, write_page
from hesscope.report.static_page import sweep_headline, sweep_section, theory_headline, theory_section
from hesscope.report.style import LOSS_COLOURS, LOSS_NAMES, TIME_NAMES, number, percent, styled

if TYPE_CHECKING:
    import xarray as xr

TIMES = tuple(TIME_NAMES)
LAYERS = ("fc1", "fc2")
GROUPS = ("H_ww", "H_vv", "H_wv")


@dataclass(frozen=True)
class Measured:
    """One network at one time: the data set and what the page says about it."""

    data: xr.Dataset
    energies: SplitEnergies
    hidden: tuple[str, ...]
    output: tuple[str, ...]

    @classmethod
    def of(cls, data: xr.Dataset) -> Measured:
        """Read a measurement; the first `width` blocks are the hidden neurons, the others the outputs."""
        energies = SplitEnergies.from_xarray(data)
        labels, width = energies.hessian.labels, int(data.attrs["width"])
        return cls(data, energies, labels[:width], labels[width:])

    def ratio(self, layer: str) -> float:
        """Off-diagonal ratio r of the layer "hidden" (H_ww) or "output" (H_vv)."""
        labels = self.hidden if layer == "hidden" else self.output
        ratio = self.energies.hessian.off_diagonal_ratio(labels)
        return 0.0 if ratio < figures.ROUNDING else ratio

    def group_energies(self, part: str) -> dict[str, float]:
        """Energies of H_ww, H_vv and H_wv (both triangles) of the part H, G or R."""
        both = self.energies.parts[part].aggregate({"w": self.hidden, "v": self.output}).values
        return {"H_ww": both[0, 0], "H_vv": both[1, 1], "H_wv": both[0, 1] + both[1, 0]}


def write_demo_page(folder: Path, results: Mapping[str, xr.Dataset], command: str) -> Path:
    """Write folder/report.html and the figures from the demo's results (step name -> data set)."""
    losses = tuple(LOSS_NAMES)
    training = {loss: results[f"{loss}-training"] for loss in losses}
    measured = {(loss, time): Measured.of(results[f"{loss}-{time}"]) for loss in losses for time in TIMES}
    prediction = results["prediction"]
    with styled():
        pictures = {
            "training": _training_figure(folder, training),
            "hessian": _hessian_figure(folder, measured),
            "energies": _energy_figure(folder, measured),
            "groups": _group_figure(folder, measured),
            "eigenvalues": _eigenvalue_figure(folder, measured),
            "layers": _layer_figure(folder, results),
        }
    attributes = measured[losses[0], "final"].data.attrs
    context = {
        "theory": theory_section(folder, results["theory"]),
        "sweep": sweep_section(folder, results["sweep"]),
        "sweep_headline": sweep_headline(results["sweep"]),
        "theory_headline": theory_headline(results["theory"]),
        "layers_headline": layers_headline(results["layers"]),
        "layers_table": _short_table(layers_table(results["layers"])),
        "headline": _headline(measured),
        "example": _parts(measured["cross_entropy", "final"].ratio("output")),
        "cards": _cards(training, measured),
        "pictures": pictures,
        "ratios": [_ratio_row(loss, layer, measured, prediction) for loss in losses for layer in ("hidden", "output")],
        "group_rows": [_group_row(loss, time, measured[loss, time]) for loss in losses for time in TIMES],
        "training_rows": [_training_row(loss, training[loss], measured) for loss in losses],
        "gamma": float(prediction.attrs["gamma"]),
        "attributes": attributes,
        "parameters": int(sum(measured[losses[0], "final"].energies.hessian.sizes)),
        "command": command,
    }
    return write_page(folder / "report.html", "demo.html", context)


def _headline(measured: Mapping[tuple[str, str], Measured]) -> str:
    """What was found, in plain words."""
    end = measured["cross_entropy", "final"]
    start = measured["cross_entropy", "initial"]
    return (
        f"Trained with cross-entropy, the output layer is block-diagonal to {_parts(end.ratio('output'))} and the "
        f"hidden layer to {_parts(end.ratio('hidden'))}. The blocks of single neurons hold "
        f"{percent(start.energies.hessian.diagonality)} of the whole Hessian’s energy at initialization and "
        f"{percent(end.energies.hessian.diagonality)} at the end."
    )


def _parts(ratio: float) -> str:
    return "exactness" if ratio == 0 else f"1 part in {number(1 / ratio, 2)}"


def _cards(training: Mapping[str, xr.Dataset], measured: Mapping[tuple[str, str], Measured]) -> list[dict[str, str]]:
    cards = []
    for loss in LOSS_NAMES:
        end, curve = measured[loss, "final"], training[loss]
        eigenvalues = end.data["eigenvalue"].to_numpy()
        shares = end.group_energies("R")["H_wv"] / end.group_energies("H")["H_wv"]
        first = measured[loss, "initial"]
        before = first.group_energies("R")["H_wv"] / first.group_energies("H")["H_wv"]
        cards += [
            {
                "loss": LOSS_NAMES[loss],
                "value": percent(end.energies.hessian.diagonality),
                "what": "of the Hessian’s energy lies in the neurons’ own blocks at the end of training",
            },
            {
                "loss": LOSS_NAMES[loss],
                "value": f"{percent(before)} → {percent(shares)}",
                "what": "residual part’s energy relative to the cross-layer block’s, from initialization to the end",
            },
            {
                "loss": LOSS_NAMES[loss],
                "value": number(eigenvalues[-1]),
                "what": f"largest eigenvalue at the end (smallest {number(eigenvalues[0])}); "
                f"held-out accuracy {percent(float(curve['test_accuracy'][-1]))}",
            },
        ]
    return cards


def _ratio_row(
    loss: str, layer: str, measured: Mapping[tuple[str, str], Measured], prediction: xr.Dataset
) -> dict[str, Any]:
    at = prediction.sel(loss=loss)
    return {
        "loss": LOSS_NAMES[loss],
        "layer": "hidden layer, H_ww" if layer == "hidden" else "output layer, H_vv",
        "predicted": float(at[f"{layer}_ratio"]),
        "stderr": float(at[f"{layer}_stderr"]),
        "measured": [measured[loss, time].ratio(layer) for time in TIMES],
    }


def _group_row(loss: str, time: str, at: Measured) -> dict[str, Any]:
    parts = {part: at.group_energies(part) for part in ("H", "G", "R")}
    largest = max(parts["H"].values())
    values = {
        group: [0.0 if parts[part][group] < figures.ROUNDING * largest else parts[part][group] for part in parts]
        for group in GROUPS
    }
    return {
        "loss": LOSS_NAMES[loss],
        "time": TIME_NAMES[time],
        "values": values,
        "diagonality": at.energies.hessian.diagonality,
    }


def _training_row(loss: str, curve: xr.Dataset, measured: Mapping[tuple[str, str], Measured]) -> dict[str, Any]:
    epochs = [int(epoch) for epoch in curve["kept_epoch"]]
    return {
        "loss": LOSS_NAMES[loss],
        "points": [
            {
                "time": TIME_NAMES[time],
                "epoch": epoch,
                "train_loss": float(curve["train_loss"][epoch]),
                "train_accuracy": float(curve["train_accuracy"][epoch]),
                "test_accuracy": float(curve["test_accuracy"][epoch]),
                "gradient_norm": float(measured[loss, time].data.attrs["gradient_norm"]),
            }
            for time, epoch in zip(TIMES, epochs, strict=True)
        ],
    }


def _training_figure(folder: Path, training: Mapping[str, xr.Dataset]) -> Picture:
    fig, ((left, right),) = figures.panels(1, 2, 10, 3.4)
    for loss, curve in training.items():
        epochs, colour, name = curve["epoch"].to_numpy(), LOSS_COLOURS[loss], LOSS_NAMES[loss]
        for which, style in (("train", "-"), ("test", "--")):
            label = f"{name}, {'training' if which == 'train' else 'held-out'}"
            values = curve[f"{which}_loss"].to_numpy()
            figures.curves(left, epochs, {label: (values / values[0], colour, style)}, "loss / loss at initialization")
            accuracy = 100 * curve[f"{which}_accuracy"].to_numpy()
            figures.curves(right, epochs, {label: (accuracy, colour, style)}, "accuracy (%)")
        for axes in (left, right):
            for epoch in curve["kept_epoch"].to_numpy():
                axes.axvline(epoch, color="#bbbbbb", linewidth=0.8, zorder=0)
    left.set_yscale("log")
    right.set_ylim(0, 102)
    right.legend(loc="lower right")
    return picture(
        folder, "training", fig, "Loss and accuracy along training; grey lines mark the times at which H is measured"
    )


def _hessian_figure(folder: Path, measured: Mapping[tuple[str, str], Measured]) -> Picture:
    fig, grid = figures.panels(2, 3, 10.6, 7.4)
    image = None
    for (loss, time), axes in zip(measured, grid.ravel(), strict=True):
        at = measured[loss, time]
        sizes = at.energies.hessian.sizes
        title = f"{LOSS_NAMES[loss]}, {TIME_NAMES[time]}"
        image = figures.hessian_map(axes, at.data["hessian"].to_numpy(), sizes, title)
        _layer_ticks(axes, sizes, len(at.hidden))
    figures.colour_bar(fig, image, grid, "|entry| / largest |entry|")
    return picture(folder, "hessian", fig, "Magnitude of the Hessian's entries at three times, with block borders")


def _layer_ticks(axes: Any, sizes: tuple[int, ...], width: int) -> None:
    edges = np.concatenate([[0], np.cumsum(sizes)])
    first, last = edges[width], edges[-1]
    for edge in (axes.axhline, axes.axvline):
        edge(first, color="white", linewidth=1.4)
    names = ["hidden W", "output V"]
    axes.set_xticks([first / 2, (first + last) / 2], names)
    axes.set_yticks([first / 2, (first + last) / 2], names, rotation=90, va="center")
    axes.tick_params(length=0)
    axes.set_xlabel("")


def _energy_figure(folder: Path, measured: Mapping[tuple[str, str], Measured]) -> Picture:
    fig, grid = figures.panels(2, 3, 10.6, 7.4)
    image = None
    for (loss, time), axes in zip(measured, grid.ravel(), strict=True):
        at = measured[loss, time]
        width, blocks = len(at.hidden), len(at.energies.hessian.labels)
        title = f"{LOSS_NAMES[loss]}, {TIME_NAMES[time]}"
        image = figures.energy_map(axes, at.energies.hessian.values, title, "")
        figures.group_borders(axes, [width], blocks)
        names = [f"{width} hidden", f"{blocks - width} output"]
        middles = [(width - 1) / 2, (width + blocks - 1) / 2]
        axes.set_xticks(middles, names)
        axes.set_yticks(middles, names, rotation=90, va="center")
        axes.tick_params(length=0)
    figures.colour_bar(fig, image, grid, "block energy / largest block energy")
    return picture(folder, "energies", fig, "Energy of every pair of neurons' blocks at three times")


def _group_figure(folder: Path, measured: Mapping[tuple[str, str], Measured]) -> Picture:
    fig, grid = figures.panels(2, 3, 10.6, 6.2)
    names = {"H_ww": "H_ww (within hidden)", "H_vv": "H_vv (within output)", "H_wv": "H_wv (across)"}
    everything = [at.group_energies(part)[group] for at in measured.values() for part in "HGR" for group in GROUPS]
    limits = figures.log_limits(everything)
    for row, loss in enumerate(LOSS_NAMES):
        for column, group in enumerate(GROUPS):
            axes = grid[row, column]
            energies = {
                part: [float(measured[loss, time].group_energies(part)[group]) for time in TIMES]
                for part in ("H", "G", "R")
            }
            figures.energy_bars(
                axes, energies, ["initial", "half-way", "end"], f"{LOSS_NAMES[loss]}: {names[group]}", limits
            )
        grid[row, 0].set_ylabel("energy")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=3)
    return picture(
        folder, "groups", fig, "Energies of H_ww, H_vv and H_wv, and of their Gauss-Newton and residual parts"
    )


def _eigenvalue_figure(folder: Path, measured: Mapping[tuple[str, str], Measured]) -> Picture:
    fig, grid = figures.panels(2, 3, 10.6, 5.4)
    for (loss, time), axes in zip(measured, grid.ravel(), strict=True):
        title = f"{LOSS_NAMES[loss]}, {TIME_NAMES[time]}"
        figures.eigenvalue_histogram(
            axes, measured[loss, time].data["eigenvalue"].to_numpy(), title, LOSS_COLOURS[loss]
        )
    for axes in grid[:, 0]:
        axes.set_ylabel("number of eigenvalues")
    return picture(folder, "eigenvalues", fig, "Histogram of the Hessian's eigenvalues at three times")


def _short_table(table: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The table of layers without what a first look does not need."""
    kept = [place for place, name in enumerate(table[0]) if name not in ("residual part", "beyond edge")]
    return [tuple(row[place] for place in kept) for row in table]


def _layer_figure(folder: Path, results: Mapping[str, xr.Dataset]) -> Picture:
    """Eigenvalues of both layers beside their Kronecker approximation's, and the overlap of the leading subspaces."""
    fig, grid = figures.panels(2, 2, 10, 8.6)
    for (top, bottom), name in zip(grid.T, LAYERS, strict=True):
        structure = Eigenstructure.from_xarray(results[f"layer-{name}"])
        predicted = structure.pairs.values
        layer_figures.eigenvalue_scatter(
            top, structure.values, predicted, predicted[structure.partner], structure.gap.count, "H"
        )
        top.set_title(f"{name}, {structure.shape[0]} × {structure.shape[1]}")
        chance = np.arange(1, structure.k + 1) / (structure.shape[0] * structure.shape[1])
        marks = {"C − 1": structure.expected_outliers or 0, "width": structure.shape[0]}
        layer_figures.overlap_lines(bottom, structure.overlap, chance, marks)
    for axes in grid[:, 0]:
        axes.legend(loc="best")
    what = "Eigenvalues of the layers' Hessians beside their Kronecker approximations', and overlap of their subspaces"
    return picture(folder, "layers", fig, what)
