"""Figures of layer-wise structure, from plain arrays onto Matplotlib axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, NullFormatter

from hesscope.report.figures import log_values, shortened
from hesscope.report.style import COLOURS, MAP, SERIES_COLOURS, number

Array = npt.NDArray[Any]

BLUE, RED, GREEN = SERIES_COLOURS[:3]
GREY = "#777777"
# Heat maps show so many rows and columns, and have numbers in their cells if there are so few of them.
CELLS_DRAWN, COLUMNS_WRITTEN, ROWS_WRITTEN = 40, 12, 24
# What is less than this share looks black.
DARK = 0.05
# Eigenvalues of the factors are drawn down to this share of the largest.
FACTOR_FLOOR = 1e-8


def layer_axis(axes: Axes, names: Sequence[str]) -> None:
    """Layers from top to bottom."""
    axes.set_yticks(range(len(names)), [shortened(name) for name in names], fontsize=9, parse_math=False)
    axes.set_ylim(len(names) - 0.4, -0.6)


def error_bars(axes: Axes, names: Sequence[str], errors: Array, stderrs: Array, best: Array, residual: Array) -> None:
    """Decoupling error of every layer as a bar (%), the best product's as a mark on it, the residual part's share."""
    places = np.arange(len(names))
    known = np.isfinite(errors)
    axes.barh(places[known], 100 * errors[known], height=0.6, color=BLUE, label="E[M] ⊗ E[xxᵀ]")
    uncertain = known & (np.nan_to_num(stderrs) > 0)
    if uncertain.any():
        bars: dict[str, Any] = {"ecolor": COLOURS["H"], "elinewidth": 1.2, "capsize": 3}
        axes.errorbar(100 * errors[uncertain], places[uncertain], xerr=100 * stderrs[uncertain], fmt="none", **bars)
    found = np.isfinite(best)
    if found.any():
        mark: dict[str, Any] = {"color": RED, "markersize": 13, "markeredgewidth": 2.4, "label": "best product"}
        axes.plot(100 * best[found], places[found], "|", **mark)
    has_rest = known & (np.nan_to_num(residual) > 0)
    if has_rest.any():
        axes.plot(100 * residual[has_rest], places[has_rest], "D", color=GREEN, markersize=5, label="residual part")
    axes.axvline(100, color=GREY, linewidth=0.8, linestyle=":")
    axes.set_xlim(0, max(105.0, 1.06 * float(axes.dataLim.xmax)))
    axes.set_xlabel("share of ‖H‖ (%)")
    layer_axis(axes, names)


def share_dots(axes: Axes, names: Sequence[str], series: Mapping[str, Array]) -> None:
    """Shares between 0 and 100 % of every layer: label -> values."""
    places = np.arange(len(names))
    marks = zip(("o", "D", "|"), (BLUE, GREEN, RED), (7, 5, 13), strict=True)
    for (label, values), (mark, colour, size) in zip(series.items(), marks, strict=False):
        known = np.isfinite(values)
        axes.plot(100 * values[known], places[known], mark, color=colour, markersize=size, mew=1.8, label=label)
    axes.hlines(places, 0, 100, color="#dddddd", linewidth=0.7, zorder=0)
    axes.set_xlim(-2, 103)
    axes.set_xlabel("share (%)")
    layer_axis(axes, names)


def eigenvalue_scatter(axes: Axes, values: Array, predicted: Array, matched: Array, outliers: int, symbol: str) -> None:
    """Eigenvalues against those of the Kronecker approximation, rank by rank and matched by eigenvector, both > 0."""
    is_outlier = np.arange(len(values)) < outliers
    drawn = (values > 0) & (predicted > 0)
    both = drawn & (matched > 0)
    axes.plot(values[both], matched[both], "x", color=GREY, markersize=4.5, label="matched")
    for chosen, colour, label in ((is_outlier, RED, "outliers"), (~is_outlier, BLUE, "other")):
        if (chosen & drawn).any():
            axes.plot(values[chosen & drawn], predicted[chosen & drawn], "o", color=colour, markersize=5, label=label)
    ends = np.concatenate([values[drawn], predicted[drawn], matched[both]])
    low, high = float(ends.min()) / 1.5, float(ends.max()) * 1.5
    axes.plot([low, high], [low, high], color=COLOURS["H"], linewidth=0.9, label="equal")
    for axis, set_scale, set_limits in (
        (axes.xaxis, axes.set_xscale, axes.set_xlim),
        (axes.yaxis, axes.set_yscale, axes.set_ylim),
    ):
        set_scale("log")
        set_limits(low, high)
        axis.set_minor_formatter(NullFormatter())
        if high < 100 * low:  # no two powers of ten: label what there is
            decades = [10.0**power for power in range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)]
            places = [f * decade for decade in decades for f in (1, 2, 5) if low <= f * decade <= high]
            axis.set_ticks(places, [number(place, 1) for place in places])
    axes.set_aspect("equal")
    axes.set_xlabel(f"eigenvalue of {symbol}")
    axes.set_ylabel("eigenvalue of E[M] ⊗ E[xxᵀ]")


def overlap_lines(axes: Axes, overlap: Array, chance: Array, marks: Mapping[str, int]) -> None:
    """Overlap of two nested families of subspaces for every dimension, beside chance; dimensions to mark by name."""
    k = np.arange(1, len(overlap) + 1)
    axes.plot(k, overlap, color=BLUE, linewidth=1.6, label="measured")
    axes.plot(k, chance, color=GREY, linewidth=1.2, linestyle="--", label="chance k/P")
    axes.set_ylim(0, 1.03)
    dimension_axis(axes, len(overlap), marks)
    axes.set_ylabel("overlap of the top-k subspaces")


def dimension_axis(axes: Axes, most: int, marks: Mapping[str, int]) -> None:
    """Dimensions 1 ... most, with lines at those that have a name, which are written where they do not collide."""
    axes.set_xlim(0.5 if most > 1 else 0, most + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("dimension k")
    for height, (label, place) in enumerate((label, place) for label, place in marks.items() if 1 <= place <= most):
        axes.axvline(place, color=COLOURS["H"], linewidth=0.8, linestyle=":")
        is_right = place > 0.7 * most
        axes.annotate(
            label,
            (place, 0.02 + 0.075 * height),
            (-4 if is_right else 4, 0),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="right" if is_right else "left",
            fontsize=9,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.0},
        )


def correspondence_map(axes: Axes, shares: Array, predicted: Array, symbol: str, xlabel: str) -> Any:
    """Share of every eigenvector [rows] along the eigenvectors of one factor [columns]; rings where K has its own."""
    rows, columns = cells(shares, predicted)
    image = axes.imshow(shares[:rows, :columns], cmap=MAP, vmin=0, vmax=1, interpolation="nearest", aspect="auto")
    image.set_extent((0.5, columns + 0.5, rows + 0.5, 0.5))
    inside = np.flatnonzero(predicted[:rows] < columns)
    ring: dict[str, Any] = {
        "markerfacecolor": "none",
        "markeredgecolor": SERIES_COLOURS[5],
        "markersize": 4.5,
        "markeredgewidth": 0.9,
    }
    axes.plot(predicted[inside] + 1, inside + 1, "o", **ring)
    axes.set_xlim(0.5, columns + 0.5)
    axes.set_ylim(rows + 0.5, 0.5)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
    axes.set_xlabel(xlabel)
    axes.set_ylabel(f"eigenvector of {symbol}")
    framed(axes)
    return image


def cells(shares: Array, predicted: Array) -> tuple[int, int]:
    """Rows and columns that a correspondence map shows: what comes after them is dark, or too much."""
    rows = min(CELLS_DRAWN, len(shares))
    bright = np.flatnonzero((shares[:rows] > DARK).any(axis=0))
    last = max(int(predicted[:rows].max()), int(bright.max(initial=0)))
    return rows, min(CELLS_DRAWN, shares.shape[1], last + 3)


def singular_bars(axes: Axes, shares: Array, alignment: Array) -> None:
    """Squared singular values of every matricized eigenvector, stacked (%), with dots of cos^2 along E[x]."""
    ranks = np.arange(1, len(shares) + 1)
    parts = [(shares[:, number], f"σ{index}²") for number, index in zip(range(shares.shape[1]), "₁₂₃", strict=False)]
    bottom = np.zeros(len(shares))
    for (part, label), colour in zip(parts, (BLUE, SERIES_COLOURS[5], SERIES_COLOURS[4]), strict=False):
        axes.bar(ranks, 100 * part, 0.8, bottom=100 * bottom, color=colour, label=label)
        bottom = bottom + part
    rest = np.maximum(1 - bottom, 0)
    if rest.max() > 1e-3:
        axes.bar(ranks, 100 * rest, 0.8, bottom=100 * bottom, color="#d5d9de", label="other")
    known = np.isfinite(alignment)
    if known.any():
        dots: dict[str, Any] = {
            "markeredgecolor": "white",
            "markersize": 6,
            "markeredgewidth": 0.8,
            "label": "cos² with E[x]",
        }
        axes.plot(ranks[known], 100 * alignment[known], "o", color=COLOURS["H"], **dots)
    axes.set_ylim(0, 103)
    axes.set_xlim(0.3, len(shares) + 0.7)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel("eigenvector")
    axes.set_ylabel("share (%)")


def factor_spectra(axes: Axes, output: Array, input: Array, expected: int | None) -> None:
    """Eigenvalues of both factors relative to their largest, over their rank; a line after C - 1 of E[M]."""
    everything = [np.ones(1)]
    for values, colour, label in ((output, RED, "E[M]"), (input, BLUE, "E[xxᵀ]")):
        shown = values[:CELLS_DRAWN] / values[0] if values[0] > 0 else np.zeros(0)
        drawn = shown > FACTOR_FLOOR
        ranks = np.arange(1, len(shown) + 1)[drawn]
        axes.plot(ranks, shown[drawn], "o-", color=colour, markersize=4, linewidth=0.8, label=label)
        everything.append(shown[drawn])
    log_values(axes, np.concatenate(everything))
    if expected is not None and 0 < expected < len(output):
        axes.axvline(expected + 0.5, color=COLOURS["H"], linewidth=0.8, linestyle=":", label="after C − 1")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel("rank")
    axes.set_ylabel("eigenvalue / largest")


def share_map(axes: Axes, names: Sequence[str], shares: Array) -> Any:
    """Share of every top eigenvector [columns] in every layer [rows], from 0 to 100 %."""
    image = axes.imshow(100 * shares, cmap=MAP, vmin=0, vmax=100, interpolation="nearest", aspect="auto")
    layer_axis(axes, names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    pairs = shares.shape[1]
    step = -(-pairs // 10)
    axes.set_xticks(range(0, pairs, step), [str(rank + 1) for rank in range(0, pairs, step)])
    axes.set_xlabel("eigenvector of the whole matrix")
    if pairs <= COLUMNS_WRITTEN and len(names) <= ROWS_WRITTEN:
        written(axes, 100 * shares, "{:.0f}", 60)
    framed(axes)
    return image


def full_bars(axes: Axes, names: Sequence[str], overlap: Array, captured: Array, chance: Array) -> None:
    """Overlap and captured share of every layer's restricted top eigenspace (%), with chance as marks."""
    places = np.arange(len(names))
    for values, shift, colour, label in ((overlap, -0.19, BLUE, "overlap"), (captured, 0.19, GREEN, "captured")):
        axes.barh(places + shift, 100 * np.nan_to_num(values), 0.36, color=colour, label=label)
    axes.plot(100 * chance, places, "|", color=RED, markersize=16, markeredgewidth=2.2, label="chance")
    axes.set_xlim(0, 103)
    axes.set_xlabel("share (%)")
    layer_axis(axes, names)


def shared_curves(
    axes: Axes, curves: Array, mean: Array, stderr: Array, predicted: Array, chance: Array, width: int
) -> None:
    """Overlap of all pairs of models (thin), mean with standard error, prediction, chance, a line at k = width."""
    k = np.arange(1, len(mean) + 1)
    if len(curves) > 1:
        for number_of, curve in enumerate(curves):
            label = "single pairs" if number_of == 0 else None
            axes.plot(k, curve, color=BLUE, linewidth=0.6, alpha=0.35, label=label)
    if np.isfinite(stderr).all():
        axes.fill_between(
            k, mean - stderr, mean + stderr, color=BLUE, alpha=0.25, linewidth=0, label="± standard error"
        )
    axes.plot(k, mean, color=BLUE, linewidth=2, label="mean" if len(curves) > 1 else "measured")
    axes.plot(k, predicted, color=RED, linewidth=1.5, linestyle="--", label="predicted by decoupling")
    axes.plot(k, chance, color=GREY, linewidth=1.2, linestyle=":", label="chance k/P")
    axes.set_ylim(0, None)
    dimension_axis(axes, len(mean), {"width": width})
    axes.set_ylabel("overlap of the top-k subspaces")


def pair_map(axes: Axes, matrix: Array, labels: Sequence[str], largest: float) -> Any:
    """Overlaps (%) of all pairs of models, the diagonal (100 %) left blank."""
    shown = np.where(np.eye(len(matrix), dtype=bool), np.nan, 100 * matrix)
    image = axes.imshow(shown, cmap=MAP, vmin=0, vmax=100 * largest, interpolation="nearest")
    short = [shortened(label) for label in labels]
    axes.set_xticks(range(len(short)), short, rotation=90, fontsize=9, parse_math=False)
    axes.set_yticks(range(len(short)), short, fontsize=9, parse_math=False)
    if len(labels) <= COLUMNS_WRITTEN:
        written(axes, shown, "{:.1f}", 60 * largest)
    framed(axes)
    return image


def written(axes: Axes, values: Array, form: str, bright: float) -> None:
    """Numbers in the cells of a map, dark where the cell is bright; nothing where there is no number."""
    for row, column in zip(*np.nonzero(np.isfinite(values)), strict=True):
        value = float(values[row, column])
        colour = "black" if value > bright else "white"
        axes.text(column, row, form.format(value), ha="center", va="center", color=colour, fontsize=9)


def framed(axes: Axes) -> None:
    """All four sides, as a map has them."""
    for spine in axes.spines.values():
        spine.set_visible(True)
