"""The page of a training run: what became of the structure of the Hessian, step by step."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from hesscope.core.errors import InputError
from hesscope.core.files import atomic_path
from hesscope.dynamics.dynamic_force import ALL_BLOCKS, DynamicForce
from hesscope.dynamics.snapshot import Snapshot, pair_energy
from hesscope.dynamics.trajectory import Trajectory
from hesscope.estimate.density import SpectralDensity
from hesscope.estimate.energies import BlockEnergies
from hesscope.estimate.estimate import Estimate
from hesscope.estimate.symlog import SYMLOG_BANDWIDTH, from_symlog, to_symlog
from hesscope.report import dynamics_figures, figures
from hesscope.report.dynamics_figures import Ruler
from hesscope.report.layers_page import share_with_error
from hesscope.report.page import Picture, picture, write_page
from hesscope.report.style import PART_NAMES, SERIES_COLOURS, number, percent, styled

Array = npt.NDArray[np.float64]
T = TypeVar("T")

PAGE = "dynamics.html"
GIF = "heat-map.gif"
# So many cards, and so many frames are on the page, within these bytes for all of them; so many in the animation.
CARDS, FRAMES, FRAME_BYTES = 6, 12, 1_600_000
GIF_FRAMES, GIF_BYTES = 60, 2_800_000
FRAME_PIXELS, GIF_PIXELS = (1120, 640), (760, 680)
# Milliseconds: a whole animation, a frame at least and at most, and the last one.
GIF_TIME, FRAME_TIME, LAST_TIME = 9000, (90, 600), 2000
# Pairs of layers, and layers, with lines of their own; spectra; rows of the table of steps.
PAIRS_DRAWN, SPECTRA_DRAWN, ROWS_SHOWN = 7, 9, 24
# A matrix with at most this share of its energy between layers is said to be nearly block-diagonal.
NEARLY = 0.1
# Shares that differ by this much, or by this factor, are said to have changed; smaller ones are rounding.
CHANGED, CHANGED_FACTOR, ROUNDING = 0.05, 1.25, 1e-12
# The axis of spectra is linear within so many widths of what the quadrature resolves, or below this share of the
# largest eigenvalue; spectra are drawn from this many eigenvalues per decade on.
LINEAR_WIDTHS, LINEAR_SHARE, FLOOR, GRID = 4, 1e-5, 0.1, 800
MATRIX_NAMES = {"H": "Hessian", "G": "Gauss-Newton matrix"}


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
    rows = dynamics_table(trajectory)
    last = trajectory.snapshots[-1]
    context = {
        "headline": dynamics_headline(trajectory, force),
        "title": title or trajectory.identity.get("model", "a training run"),
        "identity": trajectory.identity,
        "cards": _cards(trajectory),
        "films": [each for each in films if each is not None],
        "animation": None if moving is None else moving.relative_to(folder).as_posix(),
        "pictures": pictures,
        "facts": _facts(trajectory, force),
        "table": [rows[0], *_evenly(rows[1:], ROWS_SHOWN)],
        "step_count": len(trajectory),
        "force": None if force is None else force_table(force),
        "exponents": None if force is None else exponent_table(force),
        "runs": 1 if force is None else force.runs,
        "seconds": _seconds(trajectory),
        "share": _measuring_said(trajectory),
        "left_out": trajectory.left_out,
        "steps": f"{len(trajectory):,} steps from {trajectory.steps[0]:,} to {trajectory.steps[-1]:,}",
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
    chosen = _evenly(entries or _with_energies(trajectory), GIF_FRAMES)
    if not chosen:
        raise InputError("trajectory has neither heat maps nor block energies: track with Heatmap or Energies")
    find = _entry_maps if entries else _block_maps
    every = [_first(find(s)) for s in (entries or _with_energies(trajectory))]
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
            [_said(s) for s in chosen],
        )
    )
    content = _gif(pictures)
    if len(content) > GIF_BYTES:
        content = _gif(_evenly(pictures, max(2, len(pictures) * GIF_BYTES // len(content))))
    with atomic_path(folder / "figures" / GIF) as temporary:
        temporary.write_bytes(content)
    return folder / "figures" / GIF


# --- words ------------------------------------------------------------------------------------------------------------


def dynamics_headline(trajectory: Trajectory, force: DynamicForce | None = None) -> str:
    """What became of the structure of the Hessian, or of what else was measured, in one or two sentences."""
    if not len(trajectory):
        return "No step has been measured yet."
    said = _structure_said(trajectory)
    if said:
        return " ".join(filter(None, [said, _force_said(force) or _diagonality_said(trajectory)]))
    sharpness = _change_said(trajectory, "sharpness (largest eigenvalue)", lambda s: s.sharpness)
    said = sharpness or _change_said(trajectory, "trace of the Hessian", _trace)
    if said:
        return f"{said}."
    loss = _change_said(trajectory, "loss", lambda s: s.value)
    measured = any(_measured(s) for s in trajectory.snapshots)
    rest = "" if measured else "; nothing was measured of the Hessian"
    return f"{loss or 'The loss is not known'}{rest}."


def dynamics_table(trajectory: Trajectory) -> list[tuple[str, ...]]:
    """A row for every step, the first row being names of columns; what was not measured has no column."""
    columns: dict[str, tuple[Callable[[Snapshot], float], Callable[[float], str]]] = {
        "loss": (lambda s: s.value, number),
        "accuracy": (lambda s: s.accuracy, percent),
    }
    measured = _with_energies(trajectory)
    if measured:
        matrix = _matrix(measured[0])
        of = "" if matrix == "H" else f" of {matrix}"
        if len(set(measured[0].layers)) > 1:
            columns[f"cross-layer share{of}"] = (_cross_share, percent)
            columns["residual share"] = (_residual_share, percent)
        columns[f"diagonality{of}"] = (_diagonality, percent)
        for layer in dict.fromkeys(measured[0].layers):
            columns[f"r of {layer}{of}"] = (lambda s, layer=layer: _ratio(s, layer), number)  # type: ignore[misc]
    columns["sharpness"] = (lambda s: s.sharpness, number)
    kept = {name: each for name, each in columns.items() if np.isfinite(trajectory.collect(each[0])).any()}
    rows = [("step", *kept)]
    for snapshot in trajectory.snapshots:
        values = [(find(snapshot), form) for find, form in kept.values()]
        cells = [form(value) if np.isfinite(value) else "—" for value, form in values]
        rows.append((f"{snapshot.step:,}", *cells))
    return rows


def force_table(force: DynamicForce) -> list[tuple[str, ...]]:
    """What was there at initialization and what came with training, the first row being names of columns."""
    return _rows(force.table())


def exponent_table(force: DynamicForce) -> list[tuple[str, ...]]:
    """Residual share and exponents of every pair of layers, the first row being names of columns."""
    return _rows(force.pair_table())


def _rows(table: Sequence[Mapping[str, str]]) -> list[tuple[str, ...]]:
    return [tuple(table[0]), *(tuple(row.values()) for row in table)] if table else [()]


def _structure_said(trajectory: Trajectory) -> str:
    """The share of the energy between layers (outside of the diagonal blocks, if there is one layer) at both ends."""
    measured = _with_energies(trajectory)
    is_layered = bool(measured) and len(set(measured[0].layers)) > 1
    find: Callable[[Snapshot], float] = _cross_share if is_layered else _outside
    known = [s for s in measured if np.isfinite(find(s))]
    if not known:
        return "The Hessian is zero at every step." if measured and _total(measured) == 0 else ""
    first, last = known[0], known[-1]
    blocks = len(first.layers)
    if not is_layered and blocks < 2:
        return ""
    where = "between layers" if is_layered else f"outside of its {blocks:,} diagonal blocks"
    start, end = find(first), find(last)
    whose = f"of the {MATRIX_NAMES[_matrix(first)]}’s energy lies {where}"
    if first is last:
        return f"{_when(first)}{_at(first)}, {percent(_share(start))} {whose}; no other step was measured."
    middle = [(find(s), s) for s in known[1:-1]]
    between = ""
    for extreme, word in ((min, "lowest"), (max, "highest")):
        found = extreme(middle, key=lambda pair: pair[0], default=(start, first))
        outside = found[0] < min(start, end) if word == "lowest" else found[0] > max(start, end)
        if outside and _changed(found[0], start) and _changed(found[0], end):
            between += f", {word} {percent(_share(found[0]))} at step {found[1].step:,}"
    by = "block-diagonal by layer" if is_layered else "block-diagonal"
    return (
        f"{_when(first)} {percent(_share(start))} {whose}; {_after(first, last)}{_at(last)}, "
        f"{percent(_share(end))}{f' ({between[2:]})' if between else ''}: {_verdict(start, end, by)}."
    )


def _verdict(start: float, end: float, by: str) -> str:
    """What training did, from the shares outside of the blocks."""
    if not _changed(start, end):
        if end <= NEARLY:
            return f"it was nearly {by} from the start"
        return "training hardly changed this"
    if end < start:
        if start <= NEARLY:
            return f"it was nearly {by} from the start, and training made it more so"
        return f"training made it nearly {by}" if end <= NEARLY else f"training moved it towards {by}, not all the way"
    return f"training made it less {by}" + (", though it nearly still is" if end <= NEARLY else "")


def _changed(one: float, other: float) -> bool:
    low, high = sorted((_share(one), _share(other)))
    return high - low > CHANGED or high > CHANGED_FACTOR * low


def _share(value: float) -> float:
    return value if abs(value) > ROUNDING else 0.0


def _force_said(force: DynamicForce | None) -> str:
    if force is None:
        return ""
    at = force.quantities.index(ALL_BLOCKS)
    static, stderr = float(force.mean("static")[at]), float(force.stderr("static")[at])
    if not np.isfinite(static):
        return ""
    whose = "Of what the diagonal blocks hold beyond chance at the end"
    runs = f" (mean of {force.runs} runs)" if force.runs > 1 else ""
    if static < 0:
        return f"{whose}, nothing was there at initialization: all of it is dynamic force{runs}."
    if static > 1:
        return f"{whose}, all was there at initialization, and more: training took some away{runs}."
    shares = share_with_error(static, stderr), share_with_error(1 - static, stderr)
    return f"{whose}, {shares[0]} was there at initialization (static force), {shares[1]} came with training{runs}."


def _diagonality_said(trajectory: Trajectory) -> str:
    """The share in the diagonal blocks, where they are finer than layers."""
    known = [s for s in _with_energies(trajectory) if np.isfinite(_diagonality(s))]
    if len(known) < 2 or not 1 < len(set(known[0].layers)) < len(known[0].layers):
        return ""
    ends = [percent(_diagonality(s)) for s in (known[0], known[-1])]
    return f"The share in its {len(known[0].layers):,} diagonal blocks went from {ends[0]} to {ends[1]}."


def _change_said(trajectory: Trajectory, what: str, find: Callable[[Snapshot], float]) -> str:
    """'The loss falls from 2.3 at initialization to 0.1 after 600 steps'; empty if it is not known."""
    known = [s for s in trajectory.snapshots if np.isfinite(find(s))]
    if not known:
        return ""
    first, last = known[0], known[-1]
    start, end = find(first), find(last)
    when = _when(first)[0].lower() + _when(first)[1:]
    if first is last:
        return f"The {what} is {number(start)} {when}; no other step was measured"
    if end == start:
        return f"The {what} is {number(start)} both {when} and {_after(first, last)}"
    verb = "falls" if end < start else "rises"
    return f"The {what} {verb} from {number(start)} {when} to {number(end)} {_after(first, last)}"


def _when(snapshot: Snapshot) -> str:
    return "At initialization" if snapshot.step == 0 else f"At step {snapshot.step:,}"


def _after(first: Snapshot, last: Snapshot) -> str:
    if first.step > 0:
        return f"at step {last.step:,}"
    return f"after {last.step:,} step{'' if last.step == 1 else 's'}"


def _at(snapshot: Snapshot) -> str:
    """', at 100 % accuracy', or the loss."""
    if np.isfinite(snapshot.accuracy):
        return f", at {percent(snapshot.accuracy)} accuracy"
    return f", at loss {number(snapshot.value)}" if np.isfinite(snapshot.value) else ""


def _said(snapshot: Snapshot) -> str:
    """'step 12 · loss 0.345 · accuracy 91.0 %'."""
    words = [f"step {snapshot.step:,}"]
    if np.isfinite(snapshot.value):
        words.append(f"loss {number(snapshot.value)}")
    if np.isfinite(snapshot.accuracy):
        words.append(f"accuracy {percent(snapshot.accuracy)}")
    return " · ".join(words)


def _cards(trajectory: Trajectory) -> list[dict[str, str]]:
    """First and last values of what was measured."""
    measured = _with_energies(trajectory)
    is_layered = bool(measured) and len(set(measured[0].layers)) > 1
    matrix = _matrix(measured[0]) if measured else "H"
    cards: list[tuple[str, str, Callable[[Snapshot], float], Callable[[float], str]]] = [
        ("loss", "mean over the data that is measured on", lambda s: s.value, number),
        ("accuracy", "share of labels hit, on the same data", lambda s: s.accuracy, percent),
        ("cross-layer share", f"of the energy of {matrix} lies between layers", _cross_share, percent),
        ("residual share", "of the cross-layer energy, ‖R‖² / (‖G‖² + ‖R‖²)", _residual_share, percent),
        ("diagonality", f"of the energy of {matrix} lies in {_blocks_said(measured)}", _diagonality, percent),
        ("sharpness", f"largest eigenvalue of H{_limit_said(trajectory)}", lambda s: s.sharpness, number),
        ("trace", "sum of the eigenvalues of H", _trace, number),
    ]
    found = []
    for title, what, find, form in cards:
        values = trajectory.collect(find)
        known = values[np.isfinite(values)]
        if len(known) and (is_layered or find not in (_cross_share, _residual_share)):
            ends = list(dict.fromkeys((form(float(known[0])), form(float(known[-1])))))
            found.append({"title": title, "value": " → ".join(ends), "what": what})
    return found[:CARDS]


def _limit_said(trajectory: Trajectory) -> str:
    limit = trajectory.snapshots[-1].stability_limit
    return f"; the optimizer is stable up to {number(limit)} at the end" if np.isfinite(limit) else ""


def _blocks_said(measured: Sequence[Snapshot]) -> str:
    return f"{len(measured[0].layers):,} diagonal blocks" if measured else "diagonal blocks"


def _seconds(trajectory: Trajectory) -> list[tuple[str, str, str]]:
    """Measure, seconds in all, seconds a step."""
    sums: dict[str, list[float]] = {}
    for snapshot in trajectory.snapshots:
        for name, seconds in snapshot.seconds.items():
            sums.setdefault(name, []).append(seconds)
    return [(name, number(sum(each)), number(sum(each) / len(each), 2)) for name, each in sums.items()]


def _measuring_said(trajectory: Trajectory) -> str:
    share = trajectory.measuring_share()
    trained = max(snapshot.training_seconds for snapshot in trajectory.snapshots)
    if not np.isfinite(share) or not trained > 0:
        return "How long training took beside it is not known."
    words = percent(share) if share < 1 else f"{number(share, 2)} times the time"
    return f"Measuring took {words} of training ({number(trained)} s without it)."


# --- numbers of a snapshot --------------------------------------------------------------------------------------------


def _with_energies(trajectory: Trajectory) -> list[Snapshot]:
    return [s for s in trajectory.snapshots if s.energies is not None]


def _measured(snapshot: Snapshot) -> bool:
    records = (snapshot.energies, snapshot.eigenvalues, snapshot.trace, snapshot.density, snapshot.heterogeneity)
    return any(each is not None for each in (*records, snapshot.heatmap))


def _matrix(snapshot: Snapshot) -> str:
    """H, or G where there is nothing else."""
    return "H" if "H" in snapshot.parts else snapshot.parts[0]


def _energies(snapshot: Snapshot) -> BlockEnergies:
    return snapshot.block_energies(_matrix(snapshot))


def _total(measured: Sequence[Snapshot]) -> float:
    return sum(_energies(s).total for s in measured)


def _cross_share(snapshot: Snapshot) -> float:
    return snapshot.cross_layer_share(_matrix(snapshot)) if snapshot.parts else float("nan")


def _diagonality(snapshot: Snapshot) -> float:
    return _energies(snapshot).diagonality if snapshot.parts else float("nan")


def _outside(snapshot: Snapshot) -> float:
    return 1 - _diagonality(snapshot)


def _ratio(snapshot: Snapshot, layer: str) -> float:
    return snapshot.off_diagonal_ratio(layer, _matrix(snapshot)) if snapshot.parts else float("nan")


def _residual_share(snapshot: Snapshot) -> float:
    """||R||^2 / (||G||^2 + ||R||^2) of all that lies between layers; nan if there is nothing, or it is not known."""
    if not {"G", "R"} <= set(snapshot.parts):
        return float("nan")
    G, R = (float(np.triu(snapshot.layer_energies(part).values, k=1).sum()) for part in ("G", "R"))
    return R / (G + R) if G + R > 0 else float("nan")


def _times_rate(snapshot: Snapshot) -> float:
    return snapshot.sharpness_times_learning_rate


def _trace(snapshot: Snapshot) -> float:
    return _value(snapshot.trace)


def _value(estimate: Estimate | None) -> float:
    return float("nan") if estimate is None else float(estimate.value)


def _limit_times_rate(trajectory: Trajectory) -> float:
    """Stability limit in units of 1 / learning rate: 2 for plain gradient descent; nan if unknown or not constant."""
    products = trajectory.collect(lambda s: s.stability_limit * s.learning_rate)
    known = products[np.isfinite(products)]
    return float(known[-1]) if len(known) and np.ptp(known) <= 1e-6 * abs(known[-1]) else float("nan")


def _limit_name(trajectory: Trajectory) -> str:
    product = _limit_times_rate(trajectory)
    if np.isnan(product):
        return "the optimizer’s stability limit"
    if abs(product - 2) < 1e-6:
        return "stability limit 2/η (gradient descent)"
    return f"stability limit {number(product)}/η (momentum, weight decay)"


def _evenly(items: Sequence[T], count: int) -> list[T]:
    """At most `count` of the items, evenly chosen, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    return [items[index] for index in np.unique(np.rint(np.linspace(0, len(items) - 1, count)).astype(int))]


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
    return dynamics_figures.block_ruler(_energies(snapshot).labels, snapshot.layers)


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
    measured = _with_energies(trajectory)
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
    chosen = _evenly(measured, FRAMES)
    said = [_said(s) for s in chosen]
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
    return _Film(name, _evenly(shown, fitting), _evenly(said, fitting))


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
    measured = _with_energies(trajectory)
    found = {}
    if measured:
        found["energies"] = _energy_figure(folder, measured, 0.0 if force is None else force.optimum)
        found["structure"] = _structure_figure(folder, measured)
    if any(s.eigenvalues is not None for s in trajectory.snapshots):
        found["eigenvalues"] = _eigenvalue_figure(folder, trajectory)
        found["edge"] = _edge_figure(folder, trajectory)
    if np.isfinite(trajectory.collect(_trace)).any() or _heterogeneous(trajectory):
        found["trace"] = _trace_figure(folder, trajectory)
    if any(s.density is not None for s in trajectory.snapshots):
        found["density"] = _density_figure(folder, trajectory)
    return found


def _facts(trajectory: Trajectory, force: DynamicForce | None) -> dict[str, Any]:
    """What the words under the figures depend on."""
    facts: dict[str, Any] = {"pairs": "", "ratios": "", "spectra": "", "linear": ""}
    facts["gap"] = "loss L" if force is None or force.optimum == 0 else "L − optimum"
    for name, find in (
        ("limit", lambda s: s.stability_limit),
        ("rate", _times_rate),
        ("trace", _trace),
        ("heterogeneity", lambda s: _value(s.heterogeneity)),
        ("residual", _residual_share),
        ("ratio", lambda s: max((_ratio(s, layer) for layer in set(s.layers)), default=float("nan"))),
    ):
        facts[f"has_{name}"] = bool(np.isfinite(trajectory.collect(find)).any())
    facts["top"] = max(
        (len(s.eigenvalues.largest) for s in trajectory.snapshots if s.eigenvalues is not None), default=0
    )
    measured = _with_energies(trajectory)
    if measured:
        drawn, zeros, rest = _pairs(measured)
        if zeros:
            facts["pairs"] += f" Zero, and not drawn: {', '.join(zeros)}."
        if rest:
            facts["pairs"] += f" Drawn are the {len(drawn)} of {len(drawn) + rest} pairs with the largest energy."
        layers = len(set(measured[0].layers))
        facts["ratios"] = "" if layers <= PAIRS_DRAWN else f" Lines of {PAIRS_DRAWN} of {layers} layers."
    spectra = [s.density for s in trajectory.snapshots if s.density is not None]
    if spectra:
        facts["linear"] = number(_linear_within(spectra), 1)
        facts["spectra"] = f"{len(_evenly(spectra, SPECTRA_DRAWN))} of {len(spectra)} steps"
    return facts


def _shown_parts(measured: Sequence[Snapshot]) -> tuple[str, ...]:
    """G and R apart, or the one matrix that there is."""
    return tuple(part for part in measured[0].parts if part != "H") or measured[0].parts


def _pairs(measured: Sequence[Snapshot]) -> tuple[list[tuple[str, str]], list[str], int]:
    """Pairs of layers of the largest energy, zero lines in words, and how many pairs are not drawn."""
    layers = list(dict.fromkeys(measured[0].layers))
    pairs = list(combinations_with_replacement(layers, 2))
    peaks, zeros = dict.fromkeys(pairs, 0.0), []
    for part in _shown_parts(measured):
        energies = [s.layer_energies(part) for s in measured]
        own = {pair: max(pair_energy(each, *pair) for each in energies) for pair in pairs}
        largest = max(own.values())
        for pair, peak in own.items():
            peaks[pair] = max(peaks[pair], peak)
            if not peak > figures.ROUNDING * largest:
                zeros.append(_line_name(part, pair))
    drawn = sorted(pairs, key=lambda pair: -peaks[pair])[:PAIRS_DRAWN]
    drawn.sort(key=pairs.index)
    known = {_line_name(part, pair) for part in _shown_parts(measured) for pair in drawn}
    return drawn, [name for name in zeros if name in known], len(pairs) - len(drawn)


def _pair_name(first: str, second: str) -> str:
    return f"{first} × {second}" if first != second else f"within {first}"


def _line_name(part: str, pair: tuple[str, str]) -> str:
    return f"{part} within {pair[0]}" if pair[0] == pair[1] else f"{part} of {_pair_name(*pair)}"


def _energy_figure(folder: Path, measured: Sequence[Snapshot], optimum: float) -> Picture:
    """Energies of pairs of layers, G and R side by side, over steps and over the loss."""
    parts = _shown_parts(measured)
    pairs, _, _ = _pairs(measured)
    steps = np.asarray([s.step for s in measured])
    gap = _positive([s.value - optimum for s in measured])
    rows = 2 if np.isfinite(gap).any() else 1
    fig, grid = figures.panels(rows, len(parts), 10.4 if len(parts) > 1 else 6.4, 0.5 + 3.0 * rows)
    series = {
        part: {
            _pair_name(*pair): (_positive([pair_energy(e, *pair) for e in energies]), SERIES_COLOURS[index], "-")
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
    blocks = len(measured[0].layers)
    shares = {f"in the {blocks:,} diagonal blocks": ([_diagonality(s) for s in measured], SERIES_COLOURS[2], "-")}
    if len(layers) > 1:
        shares["between layers"] = ([_cross_share(s) for s in measured], SERIES_COLOURS[6], "-")
    panels = [("share of the energy (%)", f"Energy of {_matrix(measured[0])}", _percentages(shares), False)]
    if {"G", "R"} <= set(measured[0].parts):
        pairs, _, _ = _pairs(measured)
        residual = {
            _pair_name(*pair): ([s.residual_share(*pair) for s in measured], SERIES_COLOURS[index], "-")
            for index, pair in enumerate(pairs)
        }
        panels.append(("‖R‖² / (‖G‖² + ‖R‖²) (%)", "Residual part’s share", _percentages(residual), False))
    ratios = {
        layer: (_positive([_ratio(s, layer) for s in measured]), SERIES_COLOURS[index], "-")
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
    dynamics_figures.eigenvalue_lines(grid[0, 0], steps, largest, smallest, limit, _limit_name(trajectory))
    dynamics_figures.step_axis(grid[0, 0], steps)
    grid[0, 0].set_ylabel("eigenvalue of H")
    _legend(fig, *grid[0, 0].get_legend_handles_labels())
    return picture(folder, "eigenvalues", fig, "Eigenvalues at both ends of the spectrum over steps")


def _edge_figure(folder: Path, trajectory: Trajectory) -> Picture:
    """Sharpness times learning rate, and how gradient and eigenspace go together."""
    measured = [s for s in trajectory.snapshots if s.eigenvalues is not None]
    steps = np.asarray([s.step for s in measured])
    products = _positive([_times_rate(s) for s in measured])
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
        limit = _limit_times_rate(trajectory)
        if np.isfinite(limit):
            axes.axhline(limit, color="#222222", linestyle="--", linewidth=1.2, label=_limit_name(trajectory))
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
    if _heterogeneous(trajectory):
        panels.append(("heterogeneity of the blocks (0 to 1)", lambda s: s.heterogeneity))
    fig, grid = figures.panels(1, len(panels), 10.0 if len(panels) > 1 else 6.0, 3.4)
    for axes, (label, find) in zip(grid[0], panels, strict=True):
        known = [(s.step, each) for s in trajectory.snapshots if (each := find(s)) is not None]
        steps = np.asarray([step for step, _ in known])
        values = np.asarray([_value(each) for _, each in known])
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
    chosen = _evenly(known, SPECTRA_DRAWN)
    threshold = _linear_within([density for _, density in known])
    shifted = [replace(density, nodes=to_symlog(density.nodes, threshold)) for _, density in chosen]
    widths = [SYMLOG_BANDWIDTH if each.exact else max(SYMLOG_BANDWIDTH, each.default_bandwidth) for each in shifted]
    ends = np.asarray([each.eigenvalue_range for each in shifted]).T + 4 * np.outer((-1, 1), widths)
    u = np.linspace(ends.min(), ends.max(), GRID)
    counts = np.stack([each.dimension * each.density(u, width) for each, width in zip(shifted, widths, strict=True)])
    fig, grid = figures.panels(1, 1, 9.0, 1.3 + 0.62 * len(chosen))
    names = [f"step {step:,}" for step, _ in chosen]
    dynamics_figures.ridges(grid[0, 0], from_symlog(u, threshold), counts, names, threshold, FLOOR)
    return picture(folder, "density", fig, "Spectral density of the Hessian at some steps")


def _linear_within(densities: Sequence[SpectralDensity]) -> float:
    """Where the common axis of spectra becomes linear: a power of ten."""
    peak = max(abs(end) for density in densities for end in density.eigenvalue_range) or 1.0
    widths = [density.default_bandwidth for density in densities]
    finest = LINEAR_WIDTHS * float(np.median(widths))
    return float(10.0 ** np.floor(np.log10(max(finest, LINEAR_SHARE * peak))))


def _heterogeneous(trajectory: Trajectory) -> bool:
    return bool(np.isfinite(trajectory.collect(lambda s: _value(s.heterogeneity))).any())


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
