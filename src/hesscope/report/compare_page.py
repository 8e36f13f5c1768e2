"""The page of `hesscope compare`: top eigenspaces that runs share, beside chance and prediction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hesscope.layerwise.shared_eigenspaces import SharedAt, SharedEigenspaces
from hesscope.report import layer_figures
from hesscope.report.layers_page import MATRICES, reasons, share_with_error
from hesscope.report.page import picture, write_page
from hesscope.report.style import figure, number, percent, styled

if TYPE_CHECKING:
    import xarray as xr

PAGE = "compare.html"
# From this many times chance on, an eigenspace is said to be shared.
SHARED = 5.0
# So is one of at least this overlap: in a layer of few inputs chance is large.
HALF = 0.5
# Predictions within this factor of what was measured are said to agree with it.
AGREEING = 1.5
# So many layers have figures of their own, those that are shared most.
LAYERS_DRAWN = 12


@dataclass(frozen=True)
class _Compared:
    """One layer, and what is said of it at k = width, or as many eigenpairs as there are."""

    position: int
    name: str
    found: SharedEigenspaces

    @property
    def at(self) -> SharedAt:
        return self.found.at_width or self.found.at(self.found.curves.shape[1])

    @property
    def factor(self) -> float:
        """How far the prediction is off, as a ratio of at least 1; inf where one of the two is 0."""
        ends = sorted((self.at.mean, self.at.predicted))
        return ends[1] / ends[0] if ends[0] > 0 else float("inf")


def write_compare_page(folder: Path, shared: Sequence[xr.Dataset], command: str) -> Path:
    """Write folder/compare.html and the figures from a SharedEigenspaces of every layer."""
    layers = _layers(shared)
    drawn = sorted(sorted(layers, key=lambda each: -each.at.ratio)[:LAYERS_DRAWN], key=lambda each: each.position)
    with styled():
        sections = [_section(folder, each) for each in drawn]
    attributes = shared[0].attrs
    first = layers[0].found
    matrix, symbol = MATRICES[attributes.get("curvature", "hessian")]
    context = {
        "headline": compare_headline(shared),
        "table": compare_table(shared),
        "runs": _runs(first.labels, attributes),
        "layer_count": len(layers),
        "sections": sections,
        "has_stderr": len(first.labels) > 2,
        "note": str(attributes.get("note", "")),
        "left_out": reasons(str(attributes.get("left_out", "{}"))),
        "matrix": matrix,
        "symbol": symbol,
        "shared": number(SHARED, 1),
        "attributes": attributes,
        "provenance": first.provenance,
        "command": command,
    }
    return write_page(folder / PAGE, "compare.html", context)


def compare_headline(shared: Sequence[xr.Dataset]) -> str:
    """Which layers share their top eigenspace, how many times chance, and whether decoupling predicts it."""
    layers = _layers(shared)
    runs = len(layers[0].found.labels)
    ratios = [each.at.ratio for each in layers]  # those that are shared most stand highest above chance
    most, least = layers[int(np.argmax(ratios))], layers[int(np.argmin(ratios))]
    yes = [each for each in layers if each.at.ratio >= SHARED or each.at.mean >= HALF]
    if len(layers) == 1:
        verb = "share" if yes else "hardly share"
        said = f"The {runs} runs {verb} the top eigenspace of layer {most.name}: the overlap is {_times(most)}"
    else:
        which = (
            "every layer" if len(yes) == len(layers) else f"{len(yes)} of {len(layers)} layers" if yes else "no layer"
        )
        said = f"The {runs} runs share the top eigenspace of {which}: "
        said += (
            f"most above chance in layer {most.name} ({_times(most)}), least in layer {least.name} ({_times(least)})"
        )
    worst = max((each.factor for each in layers), default=1.0)
    agrees = sum(each.factor <= AGREEING for each in layers)
    if agrees == len(layers):
        return f"{said}. Decoupling predicts this to within a factor of {number(worst, 2 if worst < 10 else 1)}."
    if len(layers) == 1:
        off = "is nothing like it" if not np.isfinite(worst) else f"is off by a factor of {number(worst, 2)}"
        return f"{said}. What decoupling predicts {off}."
    where = f"in {agrees} of {len(layers)} layers"
    return f"{said}. Decoupling predicts this to within a factor of {number(AGREEING, 2)} {where}."


def compare_table(shared: Sequence[xr.Dataset]) -> list[tuple[str, ...]]:
    """A row for every layer, the first row being names of columns."""
    rows: list[tuple[str, ...]] = [
        ("layer", "shape", "runs", "k", "overlap", "predicted", "chance", "times chance", "peak k", "overlap at peak")
    ]
    for each in _layers(shared):
        at, found = each.at, each.found
        rows.append(
            (
                each.name,
                f"{found.shape[0]:,} × {found.shape[1]:,}",
                str(len(found.labels)),
                f"{at.k:,}",
                share_with_error(at.mean, at.stderr),
                percent(at.predicted),
                percent(at.chance),
                number(at.ratio),
                f"{found.peak.k:,}",
                share_with_error(found.peak.mean, found.peak.stderr),
            )
        )
    return rows


def _layers(shared: Sequence[xr.Dataset]) -> list[_Compared]:
    found = []
    for position, dataset in enumerate(shared):
        record = SharedEigenspaces.from_xarray(dataset)
        found.append(_Compared(position, " / ".join(dict.fromkeys(record.layers)), record))
    return found


def _times(layer: _Compared) -> str:
    """'17.8 %, 12 times chance at k = 32'."""
    return f"{percent(layer.at.mean)}, {number(layer.at.ratio, 2)} times chance at k = {layer.at.k}"


def _runs(labels: Sequence[str], attributes: Any) -> list[tuple[str, str, str]]:
    """Label, model and data of every run, as far as they are known."""
    models, data = (_words(attributes.get(key), len(labels)) for key in ("models", "data"))
    return list(zip(labels, models, data, strict=True))


def _words(value: Any, count: int) -> list[str]:
    """A netCDF attribute that was written as a list of strings."""
    found = [] if value is None else [value] if isinstance(value, str) else [str(each) for each in np.atleast_1d(value)]
    return found if len(found) == count else [""] * count


def _section(folder: Path, layer: _Compared) -> dict[str, Any]:
    found, at = layer.found, layer.at
    pairs, k = found.curves.shape
    fig = figure(5.4, 4.4)
    layer_figures.shared_curves(
        fig.add_subplot(), found.curves, found.mean, found.stderr, found.predicted_mean, found.chance, found.width
    )
    fig.legend(loc="outside upper center", ncols=3, fontsize=9, columnspacing=1.0)
    curves = picture(folder, f"compare-{layer.position:03d}-overlap", fig, f"{layer.name}: overlap between runs")
    runs = len(found.labels)
    fig = figure(5.4, 4.4 if runs <= layer_figures.COLUMNS_WRITTEN else 5.0)
    axes = fig.add_subplot()
    matrix = found.matrix(at.k)
    largest = float(matrix[found.first, found.second].max()) or 1.0
    image = layer_figures.pair_map(axes, matrix, found.labels, largest)
    fig.colorbar(image, ax=axes, shrink=0.8, pad=0.02).set_label(f"overlap at k = {at.k} (%)")
    pair_map = picture(
        folder, f"compare-{layer.position:03d}-pairs", fig, f"{layer.name}: overlap of every pair of runs"
    )
    values = found.curves[:, at.k - 1]
    where = f"at k = {at.k}, the layer’s width," if found.at_width else f"at k = {at.k}, all that was computed,"
    return {
        "name": layer.name,
        "position": layer.position,
        "curves": curves,
        "pairs": pair_map,
        "curves_caption": f"Overlap of the top-k eigenspaces {where} is {share_with_error(at.mean, at.stderr)}, where "
        f"decoupling predicts {percent(at.predicted)} and chance is {percent(at.chance)}; the largest mean, "
        f"{percent(found.peak.mean)}, is at k = {found.peak.k}{' (the last k compared)' if found.peak.k == k else ''}.",
        "pairs_caption": f"The same at k = {at.k} for {'every pair' if pairs > 1 else 'the pair'} of runs"
        + (f": from {percent(float(values.min()))} to {percent(float(values.max()))}." if pairs > 1 else "."),
    }
