"""The words and tables of the page of a training run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from hesscope.dynamics.dynamic_force import ALL_BLOCKS, DynamicForce, layer_words, pair_words, with_minus
from hesscope.dynamics.exponents import FEWEST, SEGMENTS
from hesscope.dynamics.snapshot import Snapshot
from hesscope.dynamics.trajectory import Trajectory
from hesscope.report.dynamics_numbers import (
    PAIRS_DRAWN,
    ROUNDING,
    SPECTRA_DRAWN,
    cross_share,
    diagonality,
    drawn_pairs,
    evenly,
    is_layered,
    is_measured,
    limit_times_rate,
    linear_within,
    main_energies,
    matrix_of,
    outside_share,
    ratio_of,
    residual_share,
    residual_shares,
    times_rate,
    total_energy,
    trace_of,
    value_of,
    with_energies,
)
from hesscope.report.layers_page import share_with_error
from hesscope.report.style import number, percent

# So many cards are on the page.
CARDS = 6
# A matrix with at most this share of its energy between layers is said to be nearly block-diagonal.
NEARLY = 0.1
# Shares that differ by this much, or by this factor, are said to have changed.
CHANGED, CHANGED_FACTOR = 0.05, 1.25
# Measuring that took longer than so many times the training is told in such times, not in percent.
TIMES = 2
MATRIX_NAMES = {"H": "Hessian", "G": "Gauss-Newton matrix"}


def dynamics_headline(trajectory: Trajectory, force: DynamicForce | None = None) -> str:
    """Headline and lead in one, as a terminal shows them."""
    return " ".join(filter(None, headline_and_lead(trajectory, force)))


def headline_and_lead(trajectory: Trajectory, force: DynamicForce | None = None) -> tuple[str, str]:
    """What became of the structure of the Hessian, or of what else was measured; and more of it, which may be empty."""
    if not len(trajectory):
        return "No step has been measured yet.", ""
    structure = _structure_said(trajectory)
    if structure:
        more = _between_said(trajectory), _force_said(force) or _diagonality_said(trajectory)
        return structure, " ".join(filter(None, more))
    sharpness = _change_said(trajectory, "sharpness (largest eigenvalue)", lambda s: s.sharpness)
    said = sharpness or _change_said(trajectory, "trace of the Hessian", trace_of)
    if said:
        return f"{said}.", ""
    loss = _change_said(trajectory, "loss", lambda s: s.value)
    measured = any(is_measured(s) for s in trajectory.snapshots)
    rest = "" if measured else "; nothing was measured of the Hessian"
    return f"{loss or 'The loss is not known'}{rest}.", ""


def dynamics_table(trajectory: Trajectory) -> list[tuple[str, ...]]:
    """A row for every step, the first row being names of columns; what was not measured has no column."""
    columns: dict[str, tuple[Callable[[Snapshot], float], Callable[[float], str]]] = {
        "loss": (lambda s: s.value, signed),
        "accuracy": (lambda s: s.accuracy, percent),
    }
    measured = with_energies(trajectory)
    if measured:
        matrix = matrix_of(measured[0])
        of = "" if matrix == "H" else f" of {matrix}"
        if len(set(measured[0].layers)) > 1:
            columns[f"cross-layer share{of}"] = (cross_share, percent)
            columns["residual share"] = (residual_share, percent)
        columns[f"diagonality{of}"] = (diagonality, percent)
        for layer in dict.fromkeys(measured[0].layers):
            columns[f"r of {layer_words(layer)}{of}"] = (lambda s, layer=layer: ratio_of(s, layer), signed)  # type: ignore[misc]
    columns["sharpness"] = (lambda s: s.sharpness, signed)
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
    """Residual share and exponents of every pair of layers, the first row being names of columns.

    Empty if there is no exponent (see `no_exponents_said`).
    """
    if not np.isfinite(force.exponents).any():
        return []
    names, *rows = _rows(force.pair_table())
    return [tuple(name.replace(" - ", " − ") for name in names), *rows]


def no_exponents_said(force: DynamicForce) -> str:
    """Why there is no exponent at all, and what it takes; empty if there is one, or nothing between layers."""
    if np.isfinite(force.exponents).any() or len(force.layers) < 2:
        return ""
    needed = FEWEST * (SEGMENTS if force.runs == 1 else force.runs)
    used = int(force.points_used.max())
    of_each = "" if force.runs == 1 else f", {FEWEST} of each run"
    if used < needed:
        return (
            f"No exponents: a power law is fitted to at least {needed:,} steps{of_each}, at which the loss above its "
            f"optimum (or the squared residual) and the energy are positive; here there are {used:,}."
        )
    few = "" if force.runs == 1 else f", or a run has fewer than {FEWEST} of them"
    return f"No exponents: the loss and the squared residual are the same at all {used:,} usable steps{few}."


def no_ratios_said(measured: Sequence[Snapshot]) -> str:
    """Layers that have several blocks and no ratio r because these differ in size, and what to do."""
    sizes: dict[str, list[int]] = {}
    for layer, size in zip(measured[0].layers, main_energies(measured[0]).sizes, strict=True):
        sizes.setdefault(layer, []).append(size)
    uneven = [layer_words(layer) for layer, own in sizes.items() if len(set(own)) > 1]
    if not uneven:
        return ""
    which = ", ".join(uneven[:PAIRS_DRAWN]) + (f" and {len(uneven) - PAIRS_DRAWN} more" * (len(uneven) > PAIRS_DRAWN))
    return (
        f"No off-diagonal ratio r of {which}: blocks there differ in size (such as the rows of a weight and its bias), "
        "and r compares blocks of one size. For r of those of one size name them: "
        "snapshot.block_energies().off_diagonal_ratio(labels)."
    )


def _rows(table: Sequence[Mapping[str, str]]) -> list[tuple[str, ...]]:
    return [tuple(table[0]), *(tuple(row.values()) for row in table)] if table else [()]


def signed(value: float) -> str:
    """`number` with a minus sign, not a hyphen."""
    return with_minus(number(value))


def counted(count: int, noun: str) -> str:
    """'1 step', '1,200 steps'."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _outside_blocks(trajectory: Trajectory) -> tuple[Callable[[Snapshot], float], list[Snapshot]]:
    """The share of the energy between layers (outside of the diagonal blocks, if there is one layer), where known."""
    measured = with_energies(trajectory)
    find: Callable[[Snapshot], float] = cross_share if is_layered(measured) else outside_share
    return find, [s for s in measured if np.isfinite(find(s))]


def _structure_said(trajectory: Trajectory) -> str:
    """That share at both ends."""
    measured = with_energies(trajectory)
    find, known = _outside_blocks(trajectory)
    if not known:
        return "The Hessian is zero at every step." if measured and total_energy(measured) == 0 else ""
    first, last = known[0], known[-1]
    blocks = len(first.layers)
    if not is_layered(measured) and blocks < 2:
        return ""
    where = "between layers" if is_layered(measured) else f"outside of its {blocks:,} diagonal blocks"
    start, end = find(first), find(last)
    whose = f"of the {MATRIX_NAMES[matrix_of(first)]}’s energy lies {where}"
    if first is last:
        return f"{_when(first)}{_at(first)}, {percent(_share(start))} {whose}; no other step was measured."
    by = "block-diagonal by layer" if is_layered(measured) else "block-diagonal"
    return (
        f"{_when(first)} {percent(_share(start))} {whose}; {_after(first, last)}{_at(last)}, "
        f"{percent(_share(end))}: {_verdict(start, end, by)}."
    )


def _between_said(trajectory: Trajectory) -> str:
    """Where that share was lowest and highest, if that was in between."""
    find, known = _outside_blocks(trajectory)
    if not known:
        return ""
    start, end = find(known[0]), find(known[-1])
    middle = [(find(s), s) for s in known[1:-1]]
    found = []
    for extreme, word in ((min, "lowest"), (max, "highest")):
        share, snapshot = extreme(middle, key=lambda pair: pair[0], default=(start, known[0]))
        is_outside = share < min(start, end) if word == "lowest" else share > max(start, end)
        if is_outside and _changed(share, start) and _changed(share, end):
            found.append(f"{word} at step {snapshot.step:,}, {percent(_share(share))}")
    return f"In between that share was {' and '.join(found)}." if found else ""


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
    known = [s for s in with_energies(trajectory) if np.isfinite(diagonality(s))]
    if len(known) < 2 or not 1 < len(set(known[0].layers)) < len(known[0].layers):
        return ""
    ends = [percent(diagonality(s)) for s in (known[0], known[-1])]
    return f"The share in its {_blocks_said(known)} went from {ends[0]} to {ends[1]}."


def _change_said(trajectory: Trajectory, what: str, find: Callable[[Snapshot], float]) -> str:
    """'The loss falls from 2.3 at initialization to 0.1 after 600 steps'; empty if it is not known."""
    known = [s for s in trajectory.snapshots if np.isfinite(find(s))]
    if not known:
        return ""
    first, last = known[0], known[-1]
    start, end = find(first), find(last)
    when = _when(first)[0].lower() + _when(first)[1:]
    if first is last:
        return f"The {what} is {signed(start)} {when}; no other step was measured"
    if end == start:
        return f"The {what} is {signed(start)} both {when} and {_after(first, last)}"
    verb = "falls" if end < start else "rises"
    return f"The {what} {verb} from {signed(start)} {when} to {signed(end)} {_after(first, last)}"


def _when(snapshot: Snapshot) -> str:
    return "At initialization" if snapshot.step == 0 else f"At step {snapshot.step:,}"


def _after(first: Snapshot, last: Snapshot) -> str:
    if first.step > 0:
        return f"at step {last.step:,}"
    return f"after {counted(last.step, 'step')}"


def _at(snapshot: Snapshot) -> str:
    """', at 100 % accuracy', or the loss."""
    if np.isfinite(snapshot.accuracy):
        return f", at {percent(snapshot.accuracy)} accuracy"
    return f", at loss {signed(snapshot.value)}" if np.isfinite(snapshot.value) else ""


def frame_words(snapshot: Snapshot) -> str:
    """'step 12 · loss 0.345 · accuracy 91.0 %'."""
    words = [f"step {snapshot.step:,}"]
    if np.isfinite(snapshot.value):
        words.append(f"loss {signed(snapshot.value)}")
    if np.isfinite(snapshot.accuracy):
        words.append(f"accuracy {percent(snapshot.accuracy)}")
    return " · ".join(words)


def cards(trajectory: Trajectory) -> list[dict[str, str]]:
    """First and last values of what was measured."""
    measured = with_energies(trajectory)
    matrix = matrix_of(measured[0]) if measured else "H"
    rows: list[tuple[str, str, Callable[[Snapshot], float], Callable[[float], str]]] = [
        ("loss", "mean over the data that is measured on", lambda s: s.value, signed),
        ("accuracy", "share of labels hit, on the same data", lambda s: s.accuracy, percent),
        ("cross-layer share", f"of the energy of {matrix} lies between layers", cross_share, percent),
        ("residual share", "of the cross-layer energy, ‖R‖² / (‖G‖² + ‖R‖²)", residual_share, percent),
        ("diagonality", f"of the energy of {matrix} lies in {_blocks_said(measured)}", diagonality, percent),
        ("sharpness", f"largest eigenvalue of H{_limit_said(trajectory)}", lambda s: s.sharpness, signed),
        ("trace", "sum of the eigenvalues of H", trace_of, signed),
    ]
    found = []
    for title, what, find, form in rows:
        values = trajectory.collect(find)
        known = values[np.isfinite(values)]
        if len(known) and (is_layered(measured) or find not in (cross_share, residual_share)):
            ends = list(dict.fromkeys((form(float(known[0])), form(float(known[-1])))))
            found.append({"title": title, "value": " → ".join(ends), "what": what})
    return found[:CARDS]


def _limit_said(trajectory: Trajectory) -> str:
    limit = trajectory.snapshots[-1].stability_limit
    return f"; the optimizer is stable up to {number(limit)} at the end" if np.isfinite(limit) else ""


def _blocks_said(measured: Sequence[Snapshot]) -> str:
    return counted(len(measured[0].layers), "diagonal block") if measured else "diagonal blocks"


def steps_said(trajectory: Trajectory) -> str:
    """'5 steps from 0 to 100', or the one step."""
    first, last = trajectory.steps[0], trajectory.steps[-1]
    return f"step {first:,}" if len(trajectory) == 1 else f"{len(trajectory):,} steps from {first:,} to {last:,}"


def seconds_table(trajectory: Trajectory) -> list[tuple[str, str, str]]:
    """Measure, seconds in all, seconds a step."""
    sums: dict[str, list[float]] = {}
    for snapshot in trajectory.snapshots:
        for name, seconds in snapshot.seconds.items():
            sums.setdefault(name, []).append(seconds)
    return [(name, number(sum(each)), number(sum(each) / len(each), 2)) for name, each in sums.items()]


def measuring_words(trajectory: Trajectory) -> str:
    """What measuring took beside training."""
    share = trajectory.measuring_share()
    trained = max(snapshot.training_seconds for snapshot in trajectory.snapshots)
    if not np.isfinite(share) or not trained > 0:
        return "How long training took beside it is not known."
    words = f"{percent(share)} of" if share <= TIMES else f"{number(share, 2)} times"
    return f"Measuring took {words} the training’s time ({number(trained)} s without it)."


def limit_name(trajectory: Trajectory, unit: str = "/η") -> str:
    """Of the line at the stability limit, whose number is in units of 1 / learning rate; unit "" where the axis is."""
    product = limit_times_rate(trajectory)
    if np.isnan(product):
        return "stability limit of this optimizer"
    if abs(product - 2) <= ROUNDING:
        return f"stability limit 2{unit} (plain gradient descent)"
    return f"stability limit {number(product)}{unit} of this optimizer"


def facts(trajectory: Trajectory, force: DynamicForce | None) -> dict[str, Any]:
    """What the words under the figures depend on."""
    names = ("pairs", "residuals", "ratios", "no_ratios", "spectra", "linear")
    found: dict[str, Any] = dict.fromkeys(names, "")
    found["gap"] = "loss L" if force is None or force.optimum == 0 else "L − optimum"
    for name, find in (
        ("limit", lambda s: s.stability_limit),
        ("rate", times_rate),
        ("trace", trace_of),
        ("heterogeneity", lambda s: value_of(s.heterogeneity)),
        ("residual_share", residual_share),
        ("ratio", lambda s: next((r for layer in s.layers if np.isfinite(r := ratio_of(s, layer))), float("nan"))),
    ):
        found[f"has_{name}"] = bool(np.isfinite(trajectory.collect(find)).any())
    found["top"] = max(
        (len(s.eigenvalues.largest) for s in trajectory.snapshots if s.eigenvalues is not None), default=0
    )
    measured = with_energies(trajectory)
    found["is_layered"], found["has_residuals"] = is_layered(measured), False
    if measured:
        found["no_ratios"] = no_ratios_said(measured)
        shares, none = residual_shares(measured)
        found["has_residuals"] = bool(shares)
        if none:
            found["residuals"] = (
                f" No residual part at any step, and not drawn: {', '.join(block_words(*pair) for pair in none)}."
            )
        drawn, zeros, rest = drawn_pairs(measured)
        if zeros:
            found["pairs"] += f" Zero, and not drawn: {', '.join(_line_name(*each) for each in zeros)}."
        if rest:
            found["pairs"] += f" Drawn are the {len(drawn)} of {len(drawn) + rest} pairs with the largest energy."
        layers = len(set(measured[0].layers))
        found["ratios"] = "" if layers <= PAIRS_DRAWN else f" Lines of {PAIRS_DRAWN} of {layers} layers."
    spectra = [s.density for s in trajectory.snapshots if s.density is not None]
    if spectra:
        found["linear"] = number(linear_within(spectra), 1)
        drawn_count = len(evenly(spectra, SPECTRA_DRAWN))
        all_of = "the one step" if len(spectra) == 1 else f"all {len(spectra)} steps"
        found["spectra"] = all_of if drawn_count == len(spectra) else f"{drawn_count} of {len(spectra)} steps"
    return found


def block_words(first: str, second: str) -> str:
    """'a × b', or 'within a'."""
    return pair_words(first, second) if first != second else f"within {layer_words(first)}"


def _line_name(part: str, pair: tuple[str, str]) -> str:
    return f"{part} {'' if pair[0] == pair[1] else 'of '}{block_words(*pair)}"
