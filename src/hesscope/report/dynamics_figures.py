"""Figures of a training run, from plain arrays: frames of heat maps on one colour scale, and lines over steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter
from PIL import Image

from hesscope.estimate.symlog import from_symlog, to_symlog
from hesscope.report.figures import ROUNDING, colour_bar, shortened
from hesscope.report.style import MAP, figure, number, styled

Array = npt.NDArray[Any]

# Rows have names in maps of so few blocks; those of layers (tensors) are written at least this share of the map apart.
BLOCKS_NAMED, NAMES_APART = 24, 0.04
# Borders are thinner in maps of more rows.
ROWS_APART = 100
# Decades of the colour scale below the largest value of the faintest step, and in all at most.
ENERGY_DECADES, ENTRY_DECADES = (6, 12), (4, 8)
# Colours of a frame: those of the map, and greys for its words, so few that white stays white. A palette makes files
# three times smaller.
MAP_COLOURS, GREYS = 240, 16
# Steps whose gaps differ more than this are on a logarithmic axis.
UNEVEN_GAPS = 5
# Lines through no more points than this have marks.
POINTS_MARKED = 40
TICKS = 6
GREY = "#777777"


@dataclass(frozen=True)
class Ruler:
    """Rows (and columns) of a heat map: how many, borders between groups of them, names with their places, and unit."""

    length: float
    borders: tuple[float, ...]
    places: tuple[float, ...]
    names: tuple[str, ...]
    unit: str


def block_ruler(labels: Sequence[str], layers: Sequence[str]) -> Ruler:
    """Blocks, with borders between layers and the names of the blocks if they are few, else of the layers."""
    if len(labels) <= BLOCKS_NAMED:
        sizes = [len(list(run)) for _, run in groupby(layers)]
        places = tuple(index + 0.5 for index in range(len(labels)))
        return Ruler(float(len(labels)), _inner(sizes), places, tuple(labels), "block")
    runs = [(name, float(len(list(run)))) for name, run in groupby(layers)]
    return grouped_ruler([name for name, _ in runs], [size for _, size in runs], "block")


def grouped_ruler(names: Sequence[str], sizes: Sequence[float], unit: str) -> Ruler:
    """Groups of rows of these sizes, each named at its middle where the name before is far enough."""
    length = float(sum(sizes))
    middles = np.cumsum(sizes) - np.asarray(sizes) / 2
    places: list[float] = []
    kept: list[str] = []
    for name, middle in zip(names, middles.tolist(), strict=True):
        if not places or middle - places[-1] >= NAMES_APART * length:
            places.append(middle)
            kept.append(name)
    return Ruler(length, _inner(sizes), tuple(places), tuple(kept), unit)


def common_scale(frames: Sequence[Mapping[str, Array]], decades: tuple[int, int]) -> tuple[float, LogNorm]:
    """The largest value of all maps (name -> map, of every step), and the colours of shares of it, for all alike.

    Args:
        frames: name -> map, of every step.
        decades: below the largest value of the faintest step, and in all at most.
    """
    peaks = np.asarray([max(float(np.nanmax(each, initial=0.0)) for each in maps.values()) for maps in frames])
    peak = float(peaks.max(initial=0.0)) or 1.0
    faintest = float(peaks[peaks > 0].min(initial=peak))
    reach = min(np.ceil(np.log10(peak / faintest)) + decades[0], decades[1])
    return peak, LogNorm(10.0**-reach, 1.0, clip=True)


def map_figure(
    names: Mapping[str, str], ruler: Ruler, norm: LogNorm, label: str, size: tuple[float, float]
) -> tuple[Figure, dict[str, Any]]:
    """An empty heat map for every name -> title, the first one large; and the images, to be given their values."""
    fig = figure(*size)
    if len(names) > 1:
        grid = fig.add_gridspec(len(names) - 1, 2, width_ratios=(2.05, 1))
        places = [grid[:, 0], *(grid[row, 1] for row in range(len(names) - 1))]
    else:
        places = [fig.add_gridspec(1, 1)[0, 0]]
    images: dict[str, Any] = {}
    for place, (name, title) in zip(places, names.items(), strict=True):
        axes = fig.add_subplot(place)
        axes.set_title(title)
        images[name] = heat_map(axes, ruler, norm, has_names=not images)
    colour_bar(fig, images[next(iter(names))], fig.axes, label)
    return fig, images


def heat_map(axes: Axes, ruler: Ruler, norm: LogNorm, has_names: bool) -> Any:
    """An empty map with its borders."""
    extent = (0, ruler.length, ruler.length, 0)
    image = axes.imshow(np.zeros((1, 1)), norm=norm, cmap=MAP, interpolation="nearest", extent=extent)
    width = 0.9 if ruler.length <= ROWS_APART and len(ruler.borders) < 12 else 0.4
    for border in ruler.borders:
        axes.axhline(border, color="white", linewidth=width)
        axes.axvline(border, color="white", linewidth=width)
    if has_names and ruler.names:
        axes.set_yticks(ruler.places, [shortened(name) for name in ruler.names], fontsize=8.5, parse_math=False)
        axes.set_xlabel(ruler.unit)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    else:
        axes.set_xticks([])
        axes.set_yticks([])
    for side in ("top", "right"):
        axes.spines[side].set_visible(True)
    return image


def film(
    frames: Sequence[Mapping[str, Array]],
    scale: tuple[float, LogNorm],
    names: Mapping[str, str],
    ruler: Ruler,
    label: str,
    pixels: tuple[int, int],
    said: Sequence[str] = (),
) -> Iterator[Image.Image]:
    """Frames as pictures of equal layout and colours, in the order given.

    Args:
        frames: name -> map of every frame.
        scale: of `common_scale`, of all steps.
        names: name -> title, the first one is large.
        ruler: of every map; label: of the colour bar.
        pixels: width and height.
        said: written above each frame, if anything.
    """
    dpi = 110
    peak, norm = scale
    palette = _palette()
    with styled():
        fig, images = map_figure(names, ruler, norm, label, (pixels[0] / dpi, pixels[1] / dpi))
        # Words are drawn with the first layout, so that it has their height.
        words = fig.suptitle(said[0], fontsize=12) if said else None
        fig.dpi = dpi
        canvas = FigureCanvasAgg(fig)
        fig.draw_without_rendering()
        fig.set_layout_engine("none")
        for index, maps in enumerate(frames):
            for name, image in images.items():
                image.set_data(maps[name] / peak)
            if words is not None:
                words.set_text(said[index])
            canvas.draw()  # type: ignore[no-untyped-call]
            drawn = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")  # type: ignore[no-untyped-call]
            yield drawn.quantize(palette=palette, dither=Image.Dither.NONE)


def film_strip(
    frames: Sequence[Array], scale: tuple[float, LogNorm], ruler: Ruler, said: Sequence[str], label: str
) -> Figure:
    """One small map a frame, in rows of four."""
    columns = min(4, len(frames))
    rows = -(-len(frames) // columns)
    fig = figure(2.6 * columns + 1.2, 2.9 * rows)
    peak, norm = scale
    image = None
    for index, (values, words) in enumerate(zip(frames, said, strict=True)):
        axes = fig.add_subplot(rows, columns, index + 1)
        image = heat_map(axes, ruler, norm, has_names=False)
        image.set_data(values / peak)
        axes.set_title(words, fontsize=9, linespacing=1.1)
    colour_bar(fig, image, fig.axes, label)
    return fig


def step_axis(axes: Axes, steps: Array) -> None:
    """Steps: logarithmic beyond 1 if they are spaced unevenly (0 has its place), else linear."""
    gaps = np.diff(steps)
    first, last = float(steps[0]), float(steps[-1])
    axes.set_xlabel("step")
    if len(gaps) and gaps.max() > UNEVEN_GAPS * gaps.min():
        axes.set_xscale("symlog", linthresh=1, linscale=0.6)
        powers = range(int(np.floor(np.log10(max(last, 1)))) + 1)
        places = [0.0, *(10.0**power for power in powers)]
        places = [place for place in places if place >= first] or [first]
        places = places[:: max(1, -(-len(places) // TICKS))] if len(places) > TICKS + 2 else places
        axes.set_xticks(places, [f"{place:,.0f}" for place in places])
        axes.set_xlim(-0.25 if first == 0 else first / 1.3, last * 1.35)
    else:
        room = 0.03 * (last - first) or 0.5
        axes.set_xlim(first - room, last + room)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.xaxis.minorticks_off()


def loss_axis(axes: Axes, losses: Array, label: str) -> None:
    """A logarithmic axis on which training goes to the right as the loss falls."""
    axes.set_xlabel(f"{label} (falling to the right)")
    log_axis(axes, "x", losses)
    axes.invert_xaxis()


def log_axis(axes: Axes, which: str, values: Array) -> None:
    """A logarithmic axis over the positive ones of these values, with labels also where they span few decades."""
    above = values[np.isfinite(values) & (values > 0)]
    axis, set_scale, set_limits = _direction(axes, which)
    set_scale("log")
    axis.minorticks_off()
    if not len(above):
        axis.set_ticks([])
        return
    low, high = float(above.min()), float(above.max())
    room = max(1.15, (high / low) ** 0.04) if high > 2.6 * low else 1.65
    low, high = low / room, high * room
    set_limits(low, high)
    powers = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    factors = (1, 2, 5) if high < 200 * low else (1,)
    places = [f * 10.0**power for power in powers for f in factors if low <= f * 10.0**power <= high]
    places = places[:: max(1, -(-len(places) // TICKS))]
    if len(factors) > 1:
        axis.set_ticks(places, [number(place, 1) for place in places])
    else:
        axis.set_ticks(places, [f"$10^{{{round(np.log10(place))}}}$" for place in places])


def lines(axes: Axes, x: Array, series: Mapping[str, tuple[Array, Any, str]], stderrs: Array | None = None) -> None:
    """Label -> (values, colour, line style), with marks where there are few points; nan leaves a gap."""
    mark = "o" if len(x) <= POINTS_MARKED else ""
    for label, (values, colour, style) in series.items():
        if stderrs is not None and np.nanmax(stderrs, initial=0.0) > 0:
            axes.errorbar(x, values, stderrs, fmt="none", ecolor=colour, elinewidth=1, capsize=2)
        axes.plot(x, values, style, color=colour, marker=mark, markersize=3.5, linewidth=1.5, label=label)


def positive(values: Array) -> Array:
    """The values, nan where they are zero or rounding of the largest: what a logarithmic axis can show."""
    largest = float(np.nanmax(np.where(np.isfinite(values), values, np.nan), initial=0.0))
    return np.where(np.isfinite(values) & (values > ROUNDING * largest), values, np.nan)


def eigenvalue_lines(axes: Axes, steps: Array, largest: Array, smallest: Array, limit: Array, limit_name: str) -> None:
    """Eigenvalues [S, k] at both ends on a symmetric-log axis, linear below the smallest sharpness."""
    for index in range(largest.shape[1])[::-1]:
        label = "largest (sharpness)" if index == 0 else "next ones" if index == 1 else None
        style: dict[str, Any] = {"linewidth": 1.8} if index == 0 else {"linewidth": 0.9, "alpha": 0.55}
        axes.plot(steps, largest[:, index], color="#0072B2", label=label, **style)
    for index in range(smallest.shape[1]):
        axes.plot(
            steps, smallest[:, index], color="#D55E00", linewidth=1.5, label="most negative" if index == 0 else None
        )
    if np.isfinite(limit).any():
        axes.plot(steps, limit, color="#222222", linestyle="--", linewidth=1.2, label=limit_name)
        if np.isfinite(limit).sum() == 1:
            axes.axhline(float(limit[np.isfinite(limit)][0]), color="#222222", linestyle="--", linewidth=1.2)
    every = np.concatenate([largest.ravel(), smallest.ravel(), limit])
    every = every[np.isfinite(every)]
    tops = np.abs(largest[:, 0][np.isfinite(largest[:, 0]) & (largest[:, 0] != 0)])
    if len(every) and len(tops):
        threshold = 10.0 ** np.floor(np.log10(float(tops.min())))
        low, high = min(0.0, float(every.min())), max(0.0, float(every.max()))
        symlog_axis(axes, "y", (low, high), threshold)
    axes.axhline(0, color="#bbbbbb", linewidth=0.7, zorder=0)
    if len(steps) == 1:
        for line in axes.lines[:-1]:
            line.set_marker("o")


def symlog_axis(axes: Axes, which: str, limits: tuple[float, float], threshold: float) -> None:
    """A symmetric-log axis (see hesscope.estimate.symlog) over these eigenvalues, with ticks at 0 and powers of ten."""
    functions = (lambda x: to_symlog(x, threshold), lambda u: from_symlog(u, threshold))
    axis, set_scale, set_limits = _direction(axes, which)
    set_scale("function", functions=functions)
    ends = to_symlog(np.asarray(limits), threshold)
    room = 0.04 * float(ends[1] - ends[0]) or 0.1
    low, high = from_symlog(np.asarray([ends[0] - room, ends[1] + room]), threshold).tolist()
    set_limits(low, high)
    places = [0.0]
    for sign, reach in ((-1, -low), (1, high)):
        if reach >= threshold:
            powers = range(int(np.round(np.log10(threshold))), int(np.floor(np.log10(reach))) + 1)
            places += [sign * 10.0**power for power in [*powers][:: -max(1, -(-len(powers) // (TICKS - 2)))]]
    axis.minorticks_off()
    axis.set_ticks(places, [("−" if place < 0 else "") + number(abs(place), 1) for place in places])


def ridges(axes: Axes, u: Array, counts: Array, names: Sequence[str], threshold: float, floor: float) -> None:
    """Spectra [rows, points] one below the other over u of eigenvalues, heights logarithmic from `floor` on."""
    top = float(np.nanmax(counts, initial=floor * 10))
    heights = np.log10(np.maximum(counts, floor) / floor) / np.log10(top / floor)
    colours = mpl.colormaps["viridis"](np.linspace(0.05, 0.85, len(names)))
    for row, (height, colour) in enumerate(zip(heights, colours, strict=True)):
        base = float(len(names) - 1 - row)
        axes.fill_between(u, base, base + 0.95 * height, color=colour, linewidth=0)
    axes.set_yticks([len(names) - 1.0 - row for row in range(len(names))], list(names), fontsize=9)
    axes.set_ylim(-0.08, len(names))
    symlog_axis(axes, "x", (float(u.min()), float(u.max())), threshold)
    axes.axvline(0, color="#bbbbbb", linewidth=0.7)
    axes.set_xlabel("eigenvalue")


def _direction(axes: Axes, which: str) -> tuple[Axis, Callable[..., Any], Callable[..., Any]]:
    """The axis "x" or "y", what sets its scale, and what sets its limits."""
    if which == "x":
        return axes.xaxis, axes.set_xscale, axes.set_xlim
    return axes.yaxis, axes.set_yscale, axes.set_ylim


def _inner(sizes: Sequence[float]) -> tuple[float, ...]:
    return tuple(float(edge) for edge in np.cumsum(sizes)[:-1])


def _palette() -> Image.Image:
    """An image whose palette has the map's colours and greys."""
    colours = mpl.colormaps[MAP](np.linspace(0, 1, MAP_COLOURS))[:, :3]
    greys = np.repeat(np.linspace(0, 1, GREYS)[:, None], 3, axis=1)
    image = Image.new("P", (1, 1))
    image.putpalette(np.rint(255 * np.concatenate([colours, greys])).astype(int).ravel().tolist())
    return image
