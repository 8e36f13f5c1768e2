"""Figures of generalization bounds, from plain arrays onto Matplotlib axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes

from hesscope.report.dynamics_figures import log_axis
from hesscope.report.style import SERIES_COLOURS

Array = npt.NDArray[np.float64]

# In the order in which they add up: what the samples say, what sampling costs, what the posterior costs.
PART_COLOURS = {
    "empirical risk": "#4d4d4d",
    "Monte Carlo": "#E69F00",
    "confidence and grid": "#c9c9c9",
    "KL of means": "#0072B2",
    "KL of variances": "#8cc8ee",
}
OTHER_COLOUR = "#CC79A7"
POSTERIOR_COLOURS = {
    "isotropic": "#777777",
    "diagonal": "#E69F00",
    "diagonal, optimized": SERIES_COLOURS[1],
    "Kronecker": "#56B4E9",
    "Kronecker, optimized": SERIES_COLOURS[0],
    "Kronecker, refreshed": SERIES_COLOURS[2],
}
# Directions are put together in so many bins of equal width in the logarithm of the curvature.
BINS = 36
# Curvatures this far below the largest of a panel are rounding, and are drawn at the left edge.
ROUNDING = 1e-12
BAND = (0.1, 0.9)
# Triangles are at the left edge over this.
EDGE_GAP = 2.0
GREY = "#666666"


@dataclass(frozen=True)
class Bar:
    """One bound: the posterior's name, contributions that add up to the bound, the bound as text, the risk beside it.

    `risk` is nan if it is not known; `risk_said` is empty where it needs no label.
    """

    name: str
    parts: Mapping[str, float]
    bound_said: str
    risk: float
    risk_said: str


def part_bars(axes: Axes, bars: Sequence[Bar], guessing: float | None, reach: float, risk_name: str) -> None:
    """Stacked horizontal bars (%), the bound at the end of each, a line at the guessing rate, a mark at the true risk.

    Args:
        bars: from top to bottom.
        guessing: 1 - 1/C, None without classes.
        reach: the largest value of all panels that share the axis; risk_name: of the marks, in the legend.
    """
    places = np.arange(len(bars), dtype=float)
    left = np.zeros(len(bars))
    for part in dict.fromkeys(part for bar in bars for part in bar.parts):
        sizes = 100 * np.asarray([bar.parts.get(part, 0.0) for bar in bars])
        axes.barh(places, sizes, 0.5, left, color=PART_COLOURS.get(part, OTHER_COLOUR), label=part)
        left += sizes
    limit = 100 * reach
    if guessing is not None:
        axes.axvline(100 * guessing, color=GREY, linestyle="--", linewidth=1.1, zorder=0.5)
        said = f"guessing {100 * guessing:.3g} %"
        label = axes.text(100 * guessing, -0.62, said, color=GREY, fontsize=9, ha="center", va="bottom")
        label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.8})
    for place, bar, end in zip(places, bars, left, strict=True):
        # A mark at the end of the bar, or beyond it, must not hide the bound.
        is_hidden = 100 * bar.risk > end - 0.01 * limit
        start = max(end, 100 * bar.risk) + 0.012 * limit if is_hidden else end
        label = axes.text(start + 0.008 * limit, place, bar.bound_said, va="center", fontsize=9.5, fontweight="bold")
        label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.85})
        if bar.risk_said:
            axes.text(100 * bar.risk, place - 0.29, bar.risk_said, va="bottom", ha="left", fontsize=8.5)
    risks = 100 * np.asarray([bar.risk for bar in bars])
    if np.isfinite(risks).any():
        mark: dict[str, Any] = {"color": "white", "markeredgecolor": "black", "markeredgewidth": 1.3, "markersize": 7}
        axes.plot(risks, places, "D", linestyle="none", label=risk_name, clip_on=False, zorder=4, **mark)
    axes.set_yticks(places, [bar.name for bar in bars], parse_math=False)
    axes.set_ylim(len(bars) - 0.45, -0.72)
    axes.set_xlim(0, 1.1 * limit)
    axes.tick_params(axis="y", length=0)


@dataclass(frozen=True)
class Line:
    """Standard deviations [k] along directions of curvature [k], and the prior's, of the posterior `name`."""

    name: str
    curvature: Array
    deviation: Array
    prior: float


def left_edge(lines: Sequence[Line]) -> float:
    """The smallest positive curvature of a panel that is not rounding; nan if none is positive."""
    positive = np.concatenate([line.curvature[line.curvature > 0] for line in lines])
    positive = positive[np.isfinite(positive)]
    if not positive.size:
        return float("nan")
    return float(positive[positive >= ROUNDING * positive.max()].min())


def spread_lines(axes: Axes, lines: Sequence[Line]) -> int:
    """Median deviations over curvature with a band that holds 80 % of the directions, both logarithmic.

    Directions of less curvature than the left edge (see `left_edge`) are a triangle before it, at their median.

    Returns:
        how many those are.
    """
    edge = left_edge(lines)
    moved = 0
    for line in lines:
        colour = POSTERIOR_COLOURS.get(line.name, OTHER_COLOUR)
        inside = line.curvature >= edge
        axes.axhline(line.prior, color=colour, linestyle="--", linewidth=0.9, alpha=0.8, zorder=1)
        label: str | None = line.name
        if inside.any():
            places, middle, low, high = _binned(line.curvature[inside], line.deviation[inside])
            axes.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0)
            size = 2.6 if len(places) > 1 else 6
            axes.plot(places, middle, color=colour, marker="o", markersize=size, linewidth=1.5, label=label)
            label = None
        if not inside.all():
            moved += int((~inside).sum())
            place = 1.0 if np.isnan(edge) else edge / EDGE_GAP
            typical = float(np.median(line.deviation[~inside]))
            axes.plot([place], [typical], color=colour, marker="<", markersize=6, linestyle="none", label=label)
    shown = np.concatenate([line.deviation for line in lines])
    log_axis(axes, "y", np.append(shown[shown > 0], [line.prior for line in lines]))
    if np.isnan(edge):
        axes.set_xticks([])
    else:
        curvature = np.concatenate([line.curvature for line in lines])
        log_axis(axes, "x", np.append(curvature[curvature >= edge], [edge / EDGE_GAP] if moved else []))
    return moved


def _binned(curvature: Array, deviation: Array) -> tuple[Array, Array, Array, Array]:
    """Median curvature, median deviation and both ends of the band, in every bin that is not empty."""
    u = np.log(curvature)
    span = float(np.ptp(u))
    index = np.floor((u - u.min()) / span * BINS).clip(0, BINS - 1) if span > 0 else np.zeros(len(u))
    found = []
    for place in np.unique(index):
        inside = deviation[index == place]
        found.append((np.exp(np.median(u[index == place])), np.median(inside), *np.quantile(inside, BAND)))
    places, middle, low, high = np.asarray(found).T
    return places, middle, low, high
