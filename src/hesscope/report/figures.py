"""Figures as functions from plain arrays to Matplotlib figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatterSciNotation, LogLocator

from hesscope.report.style import COLOURS, MAP, PART_NAMES, figure

Array = npt.NDArray[Any]

# Heat maps show magnitudes over this many decades below the largest one; anything smaller has the darkest colour.
ENTRY_DECADES = 5
ENERGY_DECADES = 6
PIXELS = 600
NAME_LENGTH = 24
CLASSES_LABELLED = 6

# Energies this far below the largest are rounding of float64 (its square), and are drawn as zero.
ROUNDING = 1e-28


def hessian_map(axes: Axes, matrix: Array, sizes: Sequence[int], title: str) -> Any:
    """|H| relative to its largest entry on a logarithmic scale, with the borders of the blocks of these sizes."""
    magnitude = pooled(np.abs(matrix))
    peak = magnitude.max() or 1.0
    norm = LogNorm(10.0**-ENTRY_DECADES, 1.0, clip=True)
    extent = (0, matrix.shape[1], matrix.shape[0], 0)
    image = axes.imshow(magnitude / peak, norm=norm, cmap=MAP, interpolation="nearest", extent=extent)
    for edge in np.cumsum(sizes)[:-1]:
        axes.axhline(edge, color="white", linewidth=0.35, alpha=0.6)
        axes.axvline(edge, color="white", linewidth=0.35, alpha=0.6)
    axes.set_title(title)
    axes.set_xlabel("parameter")
    _frame(axes)
    return image


def energy_map(axes: Axes, energies: Array, title: str, xlabel: str = "block", names: Sequence[str] = ()) -> Any:
    """Block energies relative to the largest on a logarithmic scale; `names` label the ticks if there are any."""
    peak = energies.max() or 1.0
    norm = LogNorm(10.0**-ENERGY_DECADES, 1.0, clip=True)
    image = axes.imshow(energies / peak, norm=norm, cmap=MAP, interpolation="nearest")
    axes.set_title(title)
    axes.set_xlabel(xlabel)
    if names:
        short = [shortened(name) for name in names]
        axes.set_xticks(range(len(names)), short, rotation=90, fontsize=9, parse_math=False)
        axes.set_yticks(range(len(names)), short, fontsize=9, parse_math=False)
    _frame(axes)
    return image


def group_borders(axes: Axes, edges: Sequence[int], blocks: int) -> None:
    """Mark the borders between groups of blocks (layers) in an energy map, thinner than its cells."""
    width = min(1.0, 30 / blocks)
    for edge in edges:
        axes.axhline(edge - 0.5, color="white", linewidth=width)
        axes.axvline(edge - 0.5, color="white", linewidth=width)


def colour_bar(fig: Figure, image: Any, axes: Any, label: str) -> None:
    """One colour bar for all maps in `axes`."""
    bar = fig.colorbar(image, ax=axes, shrink=0.8, pad=0.015, extend="min")
    bar.set_label(label)
    bar.ax.minorticks_off()  # between decades: hundreds of ticks to lay out, for nobody


def energy_bars(
    axes: Axes, energies: Mapping[str, Sequence[float]], groups: Sequence[str], title: str, limits: tuple[float, float]
) -> None:
    """Bars of H, G and R for every group on a logarithmic scale; zero (or rounding) is written as 0."""
    largest = max(max(values) for values in energies.values())
    floor = limits[0]
    width = 0.8 / len(energies)
    for index, (part, values) in enumerate(energies.items()):
        for group, value in enumerate(values):
            x = group + (index - (len(energies) - 1) / 2) * width
            label = PART_NAMES[part] if group == 0 else None
            if value > ROUNDING * largest:
                axes.bar(x, value - floor, width, bottom=floor, color=COLOURS[part], label=label)
            else:
                axes.bar(x, 0, width, bottom=floor, color=COLOURS[part], label=label)
                axes.text(x, floor * 1.15, "0", ha="center", va="bottom", color=COLOURS[part], fontsize=9)
    axes.set_yscale("log")
    axes.minorticks_off()
    axes.set_ylim(limits)
    axes.set_xticks(range(len(groups)), groups)
    axes.set_title(title)


def log_limits(values: Sequence[float]) -> tuple[float, float]:
    """Whole decades around the values that are not zero or rounding."""
    largest = max(values)
    smallest = min(value for value in values if value > ROUNDING * largest)
    return 10.0 ** np.floor(np.log10(smallest) - 0.3), 10.0 ** np.ceil(np.log10(largest) + 0.1)


def eigenvalue_histogram(axes: Axes, eigenvalues: Array, title: str, colour: str) -> None:
    """Histogram on a symmetric logarithmic axis: negative values left of zero, a linear stretch around it."""
    peak = float(np.abs(eigenvalues).max()) or 1.0
    threshold = 1e-5 * peak
    decades = np.geomspace(threshold, 1.6 * peak, 41)
    edges = np.concatenate([-decades[::-1], np.linspace(-threshold, threshold, 6)[1:-1], decades])
    axes.hist(eigenvalues, bins=edges.tolist(), color=colour)
    axes.set_xscale("symlog", linthresh=threshold, linscale=0.8)
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.7)
    axes.set_xlim(edges[0], edges[-1])
    lowest, highest = int(np.ceil(np.log10(threshold))) + 1, int(np.floor(np.log10(peak)))
    powers = [10.0**k for k in range(lowest, highest + 1, 2)]
    axes.set_xticks([-p for p in powers[::-1]] + [0.0] + powers)
    axes.minorticks_off()
    axes.axvline(0, color="#888888", linewidth=0.6)
    axes.set_title(title)
    axes.set_xlabel("eigenvalue")


def spectrum_on_law(
    axes: Axes,
    eigenvalues: Array | None,
    grid: Array,
    density: Array,
    atom: float,
    title: str,
    bins: int,
) -> None:
    """Histogram of the eigenvalues that are not zero, if there are any, under the density of their law.

    The histogram is scaled like the continuous part of the law, whose mass is 1 - atom. A density that diverges at 0 is
    cut where it leaves the rest.
    """
    top = float(np.quantile(density[np.isfinite(density) & (density > 0)], 0.97)) if (density > 0).any() else 1.0
    if eigenvalues is not None:
        largest = float(np.abs(eigenvalues).max()) or 1.0
        values = eigenvalues[np.abs(eigenvalues) > 1e-10 * largest]
        if values.size:
            counts, edges = np.histogram(values, bins)
            heights = counts / (len(eigenvalues) * np.diff(edges))
            axes.stairs(heights, edges, fill=True, color="#b8c4d0", label="eigenvalues")
            top = max(top, float(np.quantile(heights, 0.97)))
    axes.plot(grid, np.where(np.isfinite(density), density, np.nan), color=COLOURS["R"], linewidth=1.4, label="law")
    axes.set_ylim(0, 1.25 * top)
    axes.set_title(title if atom == 0 else f"{title} ({100 * atom:.3g} % zeros)")
    axes.set_xlabel("eigenvalue")
    axes.locator_params(axis="x", nbins=5)
    axes.ticklabel_format(axis="both", style="sci", scilimits=(-2, 4), useMathText=True)


def class_axis(axes: Axes, classes: Sequence[int]) -> None:
    """A logarithmic axis of numbers of classes, labelled at those that there are if they are few."""
    axes.set_xscale("log")
    axes.set_xlabel("number of classes C")
    if len(classes) <= CLASSES_LABELLED:
        axes.set_xticks(list(classes), [f"{C:,}" for C in classes])
        axes.tick_params(axis="x", labelsize=9)
    axes.xaxis.minorticks_off()


def log_values(axes: Axes, values: Array) -> None:
    """A logarithmic vertical axis with labels also where these positive values span less than two decades."""
    axes.set_yscale("log")
    if float(values.max()) < 100 * float(values.min()):
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(LogFormatterSciNotation(labelOnlyBase=False, minor_thresholds=(np.inf, np.inf)))
        low, high = float(values.min()), float(values.max())
        axes.set_ylim(low / 1.6, high * 1.6)
    axes.yaxis.minorticks_off()


def curves(axes: Axes, x: Array, lines: Mapping[str, tuple[Array, str, str]], ylabel: str) -> None:
    """Lines over epochs: label -> (values, colour, line style)."""
    for label, (values, colour, style) in lines.items():
        axes.plot(x, values, color=colour, linestyle=style, label=label)
    axes.set_xlabel("epoch")
    axes.set_ylabel(ylabel)


def pooled(magnitude: Array) -> Array:
    """The matrix as root mean squares over squares of entries, at most PIXELS wide.

    Mean squares keep the energy of every region, where skipping entries would lose thin lines.
    """
    size = magnitude.shape[0]
    step = -(-size // PIXELS)
    if step == 1:
        return magnitude
    edges = np.arange(0, size, step)
    counts = np.diff(np.append(edges, size))
    sums = np.add.reduceat(np.add.reduceat(magnitude.astype(np.float64) ** 2, edges, axis=0), edges, axis=1)
    return np.sqrt(sums / counts[:, None] / counts[None, :])


def panels(rows: int, columns: int, width: float, height: float) -> tuple[Figure, Array]:
    """A figure with a grid of axes, [rows, columns]."""
    fig = figure(width, height)
    return fig, fig.subplots(rows, columns, squeeze=False)


def shortened(name: str) -> str:
    """At most NAME_LENGTH characters, with both ends: names differ at either."""
    half = NAME_LENGTH // 2
    return name if len(name) <= NAME_LENGTH else f"{name[: half - 1]}…{name[-half:]}"


def _frame(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(True)
