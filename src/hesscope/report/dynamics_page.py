"""The page of a training run: what became of the structure of the Hessian, step by step."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from hesscope.core.errors import InputError
from hesscope.core.files import atomic_path
from hesscope.dynamics.dynamic_force import DynamicForce, layer_words
from hesscope.dynamics.snapshot import Snapshot, pair_energy
from hesscope.dynamics.trajectory import Trajectory
from hesscope.estimate.estimate import Estimate
from hesscope.estimate.symlog import SYMLOG_BANDWIDTH, from_symlog, to_symlog
from hesscope.report import dynamics_figures, dynamics_words, figures
from hesscope.report.dynamics_figures import Ruler
from hesscope.report.dynamics_numbers import (
    PAIRS_DRAWN,
    SPECTRA_DRAWN,
    cross_share,
    diagonality,
    drawn_pairs,
    evenly,
    is_heterogeneous,
    is_layered,
    limit_times_rate,
    linear_within,
    main_energies,
    matrix_of,
    ratio_of,
    residual_shares,
    shown_parts,
    times_rate,
    trace_of,
    value_of,
    with_energies,
)
from hesscope.report.dynamics_words import block_words, frame_words, limit_name
from hesscope.report.page import Picture, picture, write_page
from hesscope.report.style import PART_NAMES, SERIES_COLOURS, styled

Array = npt.NDArray[np.float64]

PAGE = "dynamics.html"
GIF = "heat-map.gif"
# So many frames are on the page, within these bytes for all of them; so many in the animation.
FRAMES, FRAME_BYTES = 12, 1_600_000
GIF_FRAMES, GIF_BYTES = 60, 2_800_000
FRAME_PIXELS, GIF_PIXELS = (1120, 640), (760, 680)
# Milliseconds: a whole animation, a frame at least and at most, and the last one.
GIF_TIME, FRAME_TIME, LAST_TIME = 9000, (90, 600), 2000
# Rows of the table of steps.
ROWS_SHOWN = 24
# Spectra are drawn from this many eigenvalues per decade on, at so many points.
FLOOR, GRID = 0.1, 800


@dataclass(frozen=True)
class _Film:
    """Frames of a heat map on the page: picture and words of each."""

    name: str
    frames: list[Picture]
    said: list[str]


def write_dynamics_page(
    folder: Path, trajectory: Trajectory, force: DynamicForce | None, command: str, title: str = ""
) -> Path:
    """Write folder/dynamics.html, the figures and the animation.

    Args:
        trajectory: what was measured of a run.
        force: of it (and of others, if there were several runs); None if it is not known.
        command: that was run.
        title: of the run; the model's name unless told.

    Raises:
        InputError: the trajectory has no snapshot.
    """
    if not len(trajectory):
        raise InputError("trajectory has no snapshot yet: there is nothing to show")
    with styled():
        films = [_block_film(folder, trajectory), _entry_film(folder, trajectory)]
        pictures = _line_figures(folder, trajectory, force)
    moving = animation(folder, trajectory) if any(films) else None
    rows = dynamics_words.dynamics_table(trajectory)
    headline, lead = dynamics_words.headline_and_lead(trajectory, force)
    last = trajectory.snapshots[-1]
    context = {
        "headline": headline,
        "lead": lead,
        "title": title or trajectory.identity.get("model", "a training run"),
        "identity": trajectory.identity,
        "cards": dynamics_words.cards(trajectory),
        "films": [each for each in films if each is not None],
        "animation": None if moving is None else moving.relative_to(folder).as_posix(),
        "pictures": pictures,
        "facts": dynamics_words.facts(trajectory, force),
        "table": [rows[0], *evenly(rows[1:], ROWS_SHOWN)],
        "step_count": len(trajectory),
        "force": None if force is None else dynamics_words.force_table(force),
        "exponents": None if force is None else dynamics_words.exponent_table(force),
        "no_exponents": "" if force is None else dynamics_words.no_exponents_said(force),
        "runs": 1 if force is None else force.runs,
        "seconds": dynamics_words.seconds_table(trajectory),
        "share": dynamics_words.measuring_words(trajectory),
        "left_out": trajectory.left_out,
        "steps": dynamics_words.steps_said(trajectory),
        "provenance": last.provenance,
        "command": command,
    }
    return write_page(folder / PAGE, "dynamics.html", context)


def animation(folder: Path, trajectory: Trajectory) -> Path:
    """Write folder/figures/heat-map.gif: |H| entry by entry, or the block energies where that was not measured.

    Of long runs as many steps, evenly chosen, as a file of 3 MB holds.

    Raises:
        InputError: neither was measured.
    """
    entries = [s for s in trajectory.snapshots if s.heatmap is not None]
    chosen = evenly(entries or with_energies(trajectory), GIF_FRAMES)
    if not chosen:
        raise InputError("trajectory has neither heat maps nor block energies: track with Heatmap or Energies")
    find = _entry_maps if entries else _block_maps
    every = [_first(find(s)) for s in (entries or with_energies(trajectory))]
    decades = dynamics_figures.ENTRY_DECADES if entries else dynamics_figures.ENERGY_DECADES
    name = next(iter(every[0]))
    title = f"|{name}|, entry by entry" if entries else f"Block energies of the {PART_NAMES[name]}"
    pictures = list(
        dynamics_figures.film(
            [_first(find(s)) for s in chosen],
            dynamics_figures.common_scale(every, decades),
            {name: title},
            _entry_ruler(chosen[0]) if entries else _block_ruler(chosen[0]),
            _bar_label(bool(entries)),
            GIF_PIXELS,
            [frame_words(s) for s in chosen],
        )
    )
    content = _gif(pictures)
    if len(content) > GIF_BYTES:
        content = _gif(evenly(pictures, max(2, len(pictures) * GIF_BYTES // len(content))))
    with atomic_path(folder / "figures" / GIF) as temporary:
        temporary.write_bytes(content)
    return folder / "figures" / GIF


# --- heat maps --------------------------------------------------------------------------------------------------------


def _block_maps(snapshot: Snapshot) -> dict[str, Array]:
    return {part: snapshot.block_energies(part).values for part in snapshot.parts}


def _entry_maps(snapshot: Snapshot) -> dict[str, Array]:
    assert snapshot.heatmap is not None
    return {"H": snapshot.heatmap.values.astype(np.float64)}


def _first(maps: Mapping[str, Array]) -> dict[str, Array]:
    name = next(iter(maps))
    return {name: maps[name]}


def _block_ruler(snapshot: Snapshot) -> Ruler:
    named = zip(main_energies(snapshot).labels, snapshot.layers, strict=True)
    labels = [layer_words(label) if label == layer else label for label, layer in named]
    return dynamics_figures.block_ruler(labels, [layer_words(layer) for layer in snapshot.layers])


def _entry_ruler(snapshot: Snapshot) -> Ruler:
    """Parameters; the last pixel may cover fewer than the others."""
    assert snapshot.heatmap is not None
    heatmap = snapshot.heatmap
    ruler = dynamics_figures.grouped_ruler(heatmap.tensors, heatmap.sizes, "parameter")
    pixels = len(heatmap.values)
    return replace(ruler, length=float(pixels * -(-heatmap.parameters // pixels)))


def _bar_label(is_entries: bool) -> str:
    return "|entry| / largest of all steps" if is_entries else "block energy / largest of all steps"


def _block_film(folder: Path, trajectory: Trajectory) -> _Film | None:
    measured = with_energies(trajectory)
    if not measured:
        return None
    names = {part: PART_NAMES[part] for part in measured[0].parts}
    scale = dynamics_figures.common_scale([_block_maps(s) for s in measured], dynamics_figures.ENERGY_DECADES)
    return _film(folder, "blocks", measured, _block_maps, scale, names, _block_ruler(measured[0]), _bar_label(False))


def _entry_film(folder: Path, trajectory: Trajectory) -> _Film | None:
    measured = [s for s in trajectory.snapshots if s.heatmap is not None]
    if not measured:
        return None
    scale = dynamics_figures.common_scale([_entry_maps(s) for s in measured], dynamics_figures.ENTRY_DECADES)
    names = {"H": "|H|, entry by entry"}
    return _film(folder, "entries", measured, _entry_maps, scale, names, _entry_ruler(measured[0]), _bar_label(True))


def _film(
    folder: Path,
    name: str,
    measured: Sequence[Snapshot],
    find: Callable[[Snapshot], dict[str, Array]],
    scale: tuple[float, Any],
    names: Mapping[str, str],
    ruler: Ruler,
    label: str,
) -> _Film:
    """Frames for the page, as many as fit, and one film strip of the first map as a figure."""
    chosen = evenly(measured, FRAMES)
    said = [frame_words(s) for s in chosen]
    strip = dynamics_figures.film_strip(
        [next(iter(find(s).values())) for s in chosen],
        scale,
        ruler,
        [each.replace(" · ", "\n", 1) for each in said],
        label,
    )
    picture(folder, f"film-strip-{name}", strip, "")
    size = FRAME_PIXELS if len(names) > 1 else GIF_PIXELS
    drawn = dynamics_figures.film([find(s) for s in chosen], scale, names, ruler, label, size)
    shown = [
        Picture(f"{name}-{s.step}", base64.b64encode(_png(image)).decode(), f"{names[next(iter(names))]}, {words}")
        for s, image, words in zip(chosen, drawn, said, strict=True)
    ]
    total = sum(len(each.data) for each in shown)
    fitting = max(2, len(shown) * FRAME_BYTES // total) if total > FRAME_BYTES else len(shown)
    return _Film(name, evenly(shown, fitting), evenly(said, fitting))


def _png(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "PNG", optimize=True)
    return content.getvalue()


def _gif(pictures: Sequence[Image.Image]) -> bytes:
    time = int(np.clip(GIF_TIME / len(pictures), *FRAME_TIME))
    durations = [time] * (len(pictures) - 1) + [LAST_TIME]
    content = io.BytesIO()
    pictures[0].save(content, "GIF", save_all=True, append_images=list(pictures[1:]), duration=durations, loop=0)
    return content.getvalue()


# --- lines ------------------------------------------------------------------------------------------------------------


def _line_figures(folder: Path, trajectory: Trajectory, force: DynamicForce | None) -> dict[str, Picture]:
    measured = with_energies(trajectory)
    found = {}
    if measured:
        found["energies"] = _energy_figure(folder, measured, 0.0 if force is None else force.optimum)
        found["structure"] = _structure_figure(folder, measured)
    if any(s.eigenvalues is not None for s in trajectory.snapshots):
        found["eigenvalues"] = _eigenvalue_figure(folder, trajectory)
        found["edge"] = _edge_figure(folder, trajectory)
    if np.isfinite(trajectory.collect(trace_of)).any() or is_heterogeneous(trajectory):
        found["trace"] = _trace_figure(folder, trajectory)
    if any(s.density is not None for s in trajectory.snapshots):
        found["density"] = _density_figure(folder, trajectory)
    return found


def _energy_figure(folder: Path, measured: Sequence[Snapshot], optimum: float) -> Picture:
    """Energies of pairs of layers, G and R side by side, over steps and over the loss."""
    parts = shown_parts(measured)
    pairs, _, _ = drawn_pairs(measured)
    steps = np.asarray([s.step for s in measured])
    gap = _positive([s.value - optimum for s in measured])
    rows = 2 if np.isfinite(gap).any() else 1
    fig, grid = figures.panels(rows, len(parts), 10.4 if len(parts) > 1 else 6.4, 0.5 + 3.0 * rows)
    series = {
        part: {
            block_words(*pair): (_positive([pair_energy(e, *pair) for e in energies]), SERIES_COLOURS[index], "-")
            for index, pair in enumerate(pairs)
        }
        for part in parts
        for energies in [[s.layer_energies(part) for s in measured]]
    }
    every = np.concatenate([values for own in series.values() for values, _, _ in own.values()])
    for column, part in enumerate(parts):
        for row in range(rows):
            axes = grid[row, column]
            dynamics_figures.lines(axes, steps if row == 0 else gap, series[part])
            dynamics_figures.log_axis(axes, "y", every)
            if row == 0:
                axes.set_title(PART_NAMES[part])
                dynamics_figures.step_axis(axes, steps)
            else:
                dynamics_figures.loss_axis(axes, gap, "loss L" if optimum == 0 else "L − optimum")
            if column == 0:
                axes.set_ylabel("energy (sum of squared entries)")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    _legend(fig, handles, labels)
    return picture(folder, "energies", fig, "Energies of pairs of layers over steps and over the loss")


def _structure_figure(folder: Path, measured: Sequence[Snapshot]) -> Picture:
    """Shares of the energy, residual shares of pairs of layers, and off-diagonal ratios within layers."""
    layers = list(dict.fromkeys(measured[0].layers))
    steps = np.asarray([s.step for s in measured])
    blocks = "block" if len(measured[0].layers) == 1 else f"{len(measured[0].layers):,} diagonal blocks"
    shares = {f"in the {blocks}": ([diagonality(s) for s in measured], SERIES_COLOURS[2], "-")}
    if is_layered(measured):
        shares["between layers"] = ([cross_share(s) for s in measured], SERIES_COLOURS[6], "-")
    panels = [("share of the energy (%)", f"Energy of {matrix_of(measured[0])}", _percentages(shares), False)]
    # A pair of layers has its colour of the figure of energies.
    pairs = drawn_pairs(measured)[0]
    residual = {
        block_words(*pair): (values, SERIES_COLOURS[pairs.index(pair)], "-")
        for pair, values in residual_shares(measured)[0].items()
    }
    if residual:
        panels.append(("‖R‖² / (‖G‖² + ‖R‖²) (%)", "Residual part’s share", _percentages(residual), False))
    ratios = {
        layer_words(layer): (_positive([ratio_of(s, layer) for s in measured]), SERIES_COLOURS[index], "-")
        for index, layer in enumerate(layers[:PAIRS_DRAWN])
    }
    ratios = {layer: each for layer, each in ratios.items() if np.isfinite(each[0]).any()}
    if ratios:
        panels.append(("off-diagonal ratio r", "Ratio r within a layer", ratios, True))
    fig, grid = figures.panels(1, len(panels), 3.6 * len(panels), 4.1)
    for axes, (label, title, series, is_log) in zip(grid[0], panels, strict=True):
        dynamics_figures.lines(axes, steps, series)
        dynamics_figures.step_axis(axes, steps)
        axes.set_title(title)
        axes.set_ylabel(label)
        if is_log:
            dynamics_figures.log_axis(axes, "y", np.concatenate([values for values, _, _ in series.values()]))
        else:
            axes.set_ylim(-3, 103)
        axes.legend(fontsize=8.5, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2 if len(series) > 3 else 1)
    return picture(folder, "structure", fig, "Shares of the energy, residual shares and off-diagonal ratios over steps")


def _eigenvalue_figure(folder: Path, trajectory: Trajectory) -> Picture:
    """Both ends of the spectrum, and the stability limit where the optimizer has one."""
    known = [(s.step, s.stability_limit, s.eigenvalues) for s in trajectory.snapshots if s.eigenvalues is not None]
    steps, limit = np.asarray([step for step, _, _ in known]), np.asarray([limit for _, limit, _ in known])
    largest, smallest = _stacked([e.largest for _, _, e in known]), _stacked([e.smallest for _, _, e in known])
    fig, grid = figures.panels(1, 1, 9.0, 4.2)
    dynamics_figures.eigenvalue_lines(grid[0, 0], steps, largest, smallest, limit, limit_name(trajectory))
    dynamics_figures.step_axis(grid[0, 0], steps)
    grid[0, 0].set_ylabel("eigenvalue of H")
    _legend(fig, *grid[0, 0].get_legend_handles_labels())
    return picture(folder, "eigenvalues", fig, "Eigenvalues at both ends of the spectrum over steps")


def _edge_figure(folder: Path, trajectory: Trajectory) -> Picture:
    """Sharpness times learning rate, and how gradient and eigenspace go together."""
    measured = [s for s in trajectory.snapshots if s.eigenvalues is not None]
    steps = np.asarray([s.step for s in measured])
    products = _positive([times_rate(s) for s in measured])
    shares = {
        "gradient’s share in the top eigenspace": [s.eigenvalues.gradient_share for s in measured if s.eigenvalues],
        "alignment with the top eigenspace before": [s.eigenvalues.alignment for s in measured if s.eigenvalues],
    }
    has_products = bool(np.isfinite(products).any())
    fig, grid = figures.panels(1, 2 if has_products else 1, 10.0 if has_products else 6.0, 3.7)
    axes = grid[0, -1]
    colours = zip(shares.items(), (SERIES_COLOURS[0], SERIES_COLOURS[2]), strict=True)
    series = {label: (np.asarray(values), colour, "-") for (label, values), colour in colours}
    series = {label: each for label, each in series.items() if np.isfinite(each[0]).any()}
    dynamics_figures.lines(axes, steps, _percentages(series))
    dynamics_figures.step_axis(axes, steps)
    axes.set_ylim(-3, 103)
    axes.set_ylabel("share (%)")
    if has_products:
        axes = grid[0, 0]
        dynamics_figures.lines(axes, steps, {"sharpness × learning rate η": (products, SERIES_COLOURS[0], "-")})
        dynamics_figures.step_axis(axes, steps)
        limit = limit_times_rate(trajectory)
        if np.isfinite(limit):
            axes.axhline(limit, color="#222222", linestyle="--", linewidth=1.2, label=limit_name(trajectory, ""))
        dynamics_figures.log_axis(axes, "y", np.append(products, limit))
        axes.set_ylabel("sharpness × learning rate")
    for axes in grid[0]:
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=9, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return picture(folder, "edge", fig, "Sharpness times learning rate, gradient’s share and alignment over steps")


def _trace_figure(folder: Path, trajectory: Trajectory) -> Picture:
    """Trace and heterogeneity, those that were measured."""
    panels: list[tuple[str, Callable[[Snapshot], Estimate | None]]] = []
    if any(s.trace is not None for s in trajectory.snapshots):
        panels.append(("trace of H (sum of eigenvalues)", lambda s: s.trace))
    if is_heterogeneous(trajectory):
        panels.append(("heterogeneity of the blocks (0 to 1)", lambda s: s.heterogeneity))
    fig, grid = figures.panels(1, len(panels), 10.0 if len(panels) > 1 else 6.0, 3.4)
    for axes, (label, find) in zip(grid[0], panels, strict=True):
        known = [(s.step, each) for s in trajectory.snapshots if (each := find(s)) is not None]
        steps = np.asarray([step for step, _ in known])
        values = np.asarray([value_of(each) for _, each in known])
        stderrs = np.asarray([float(each.stderr) for _, each in known])
        is_trace = label.startswith("trace")
        is_log = is_trace and bool((values[np.isfinite(values)] > 0).all())
        if is_log:  # an error as large as the value has no place on a logarithmic axis
            stderrs = np.minimum(stderrs, 0.9 * values)
        dynamics_figures.lines(axes, steps, {label: (values, SERIES_COLOURS[0 if is_trace else 2], "-")}, stderrs)
        dynamics_figures.step_axis(axes, steps)
        if is_log:
            dynamics_figures.log_axis(axes, "y", values)
        elif not is_trace:
            axes.set_ylim(0, 1)
        axes.set_ylabel(label)
    return picture(folder, "trace", fig, "Trace and heterogeneity over steps")


def _density_figure(folder: Path, trajectory: Trajectory) -> Picture:
    """Spectra of some steps, one below the other, on one axis."""
    known = [(s.step, s.density) for s in trajectory.snapshots if s.density is not None]
    chosen = evenly(known, SPECTRA_DRAWN)
    threshold = linear_within([density for _, density in known])
    shifted = [replace(density, nodes=to_symlog(density.nodes, threshold)) for _, density in chosen]
    widths = [SYMLOG_BANDWIDTH if each.exact else max(SYMLOG_BANDWIDTH, each.default_bandwidth) for each in shifted]
    ends = np.asarray([each.eigenvalue_range for each in shifted]).T + 4 * np.outer((-1, 1), widths)
    u = np.linspace(ends.min(), ends.max(), GRID)
    counts = np.stack([each.dimension * each.density(u, width) for each, width in zip(shifted, widths, strict=True)])
    fig, grid = figures.panels(1, 1, 9.0, 1.3 + 0.62 * len(chosen))
    names = [f"step {step:,}" for step, _ in chosen]
    dynamics_figures.ridges(grid[0, 0], from_symlog(u, threshold), counts, names, threshold, FLOOR)
    return picture(folder, "density", fig, "Spectral density of the Hessian at some steps")


def _percentages(series: Mapping[str, tuple[Any, str, str]]) -> dict[str, tuple[Array, Any, str]]:
    return {label: (100 * np.asarray(values), colour, style) for label, (values, colour, style) in series.items()}


def _positive(values: Sequence[float]) -> Array:
    return dynamics_figures.positive(np.asarray(values, dtype=np.float64))


def _stacked(rows: Sequence[Array]) -> Array:
    """Rows of unequal length as an array, nan at the ends of the shorter ones."""
    width = max(len(row) for row in rows)
    return np.stack([np.pad(row.astype(np.float64), (0, width - len(row)), constant_values=np.nan) for row in rows])


def _legend(fig: Any, handles: Any, labels: Any) -> None:
    if handles:
        fig.legend(handles, labels, loc="outside upper center", ncols=min(4, len(labels)), fontsize=9)
