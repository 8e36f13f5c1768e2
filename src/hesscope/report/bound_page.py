"""The page of `hesscope bound`: what is guaranteed of a network, how near it is to the truth, what structure bought."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hesscope.core.errors import InputError
from hesscope.dynamics.dynamic_force import layer_words
from hesscope.report import bound_figures, bound_words, figures
from hesscope.report.bound_figures import Bar, Line
from hesscope.report.bound_words import Shown, guaranteed, of_labels, rate, rate_with_error
from hesscope.report.page import Picture, picture, write_page
from hesscope.report.style import figure, number, styled

if TYPE_CHECKING:
    import xarray as xr

PAGE = "bound.html"
# Panels of standard deviations: the layers of the largest divergence.
LAYERS_DRAWN = 4
KINDS = ("true", "random")


def write_bound_page(folder: Path, results: Sequence[xr.Dataset], command: str, title: str = "") -> Path:
    """Write folder/bound.html and the figures.

    Args:
        results: of `PacBayesBound.to_xarray` with attributes labels, held_out_risk, held_out_stderr, held_out_what,
            held_out_exact, network_held_out, network and data; in the order in which they are shown.
        command: that was run.
        title: of the page; the network's name unless told.

    Raises:
        InputError: there is no result.
    """
    shown = bound_words.read(results)
    if not shown:
        raise InputError("results has no bound yet: there is nothing to show")
    kinds = {kind: own for kind in KINDS if (own := of_labels(shown, kind))}
    main = next(iter(kinds.values()))
    with styled():
        spread, spread_facts = _spread_figure(folder, main)
        parts = _parts_figure(folder, kinds)
    first = shown[0]
    context = {
        "headline": bound_words.headline(shown),
        "findings": bound_words.findings(shown),
        "warnings": bound_words.warnings(shown),
        "title": title or first.network,
        "networks": list(dict.fromkeys(each.network for each in shown)),
        "data": list(dict.fromkeys(each.data for each in shown)),
        "cards": _cards(shown),
        "table": bound_words.table(shown),
        "parts": parts,
        "spread": spread,
        "spread_facts": spread_facts,
        "kinds": kinds,
        "layer_tables": {
            kind: (bound_words.layer_table(own), bound_words.prior_table(own)) for kind, own in kinds.items()
        },
        "fallback": bound_words.fallback_table(shown),
        "meanings": _meanings(shown),
        "union": bound_words.union_said(shown),
        "details": [_detail(each) for each in shown],
        "risk": first.record.risk,
        "n": sorted({each.record.certificate.n for each in shown}),
        "guessing": None if first.guessing is None else rate(first.guessing),
        "confidence": bound_words.confidence(first.record.certificate.delta),
        "held_out": _held_out(shown),
        "has_open": any(not each.record.finished for each in shown),
        "draws": sorted({each.record.certificate.draws for each in shown}),
        "provenance": first.record.provenance,
        "command": command,
    }
    return write_page(folder / PAGE, "bound.html", context)


# --- figures ----------------------------------------------------------------------------------------------------------


def _parts_figure(folder: Path, kinds: dict[str, list[Shown]]) -> Picture:
    """Contributions to every bound, one panel for each kind of labels, on one axis."""
    counts = [len(own) for own in kinds.values()]
    fig = figure(10.2, 1.1 + sum(0.75 + 0.46 * count for count in counts))
    grid = fig.subplots(len(kinds), 1, squeeze=False, sharex=True, height_ratios=[1.2 + count for count in counts])
    reach = max(_ends(each) for own in kinds.values() for each in own)
    name = "true risk" if all(each.is_exact for own in kinds.values() for each in own) else "risk held out"
    for axes, (kind, own) in zip(grid[:, 0], kinds.items(), strict=True):
        bars = [_bar(each) for each in own]
        bound_figures.part_bars(axes, bars, own[0].guessing, reach, name)
        axes.set_title(f"{kind} labels", loc="left", fontweight="bold")
    grid[-1, 0].set_xlabel("contribution to the bound (%)")
    found = [axes.get_legend_handles_labels() for axes in grid[:, 0]]
    entries = {label: handle for handles, labels in found for handle, label in zip(handles, labels, strict=True)}
    fig.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=len(entries), fontsize=9)
    return picture(folder, "parts", fig, "What every bound is made of, as stacked bars")


def _ends(each: Shown) -> float:
    """How far to the right something is drawn of it."""
    return max(each.bound, each.guessing or 0.0, float(np.nan_to_num(each.held_out_risk)))


def _bar(each: Shown) -> Bar:
    name = each.name if each.record.finished else f"{each.name}\n({bound_words.optimization(each)})"
    certificate = each.record.certificate
    # The line has the label where the risk is that of guessing.
    is_labelled = np.isfinite(each.held_out_risk) and each.held_out_risk != each.guessing
    risk = rate(each.held_out_risk, each.held_out_stderr) if is_labelled else ""
    bound = guaranteed(each.bound, certificate.bound_stderr)
    return Bar(name, certificate.parts(), bound, each.held_out_risk, risk)


def _spread_figure(folder: Path, shown: Sequence[Shown]) -> tuple[Picture | None, dict[str, Any]]:
    """Standard deviations along curvature, one panel for each of the layers of the largest divergence."""
    by_group: dict[str, list[Line]] = {}
    axes_of: dict[str, int] = {}
    for each in shown:
        for spread in each.record.spreads:
            if len(spread.curvature):
                line = Line(each.name, spread.curvature, spread.deviation, spread.prior_deviation)
                by_group.setdefault(spread.group, []).append(line)
                axes_of[spread.group] = spread.axes
    facts: dict[str, Any] = {"drawn": 0, "layers": len(by_group), "moved": 0, "directions": 0, "labels": ""}
    if not by_group:
        return None, facts
    divergences = bound_words.lowest(shown).record.certificate.kl_by_group
    ranked = sorted(by_group, key=lambda group: -divergences[group].total if group in divergences else 0.0)
    drawn = [group for group in by_group if group in ranked[:LAYERS_DRAWN]]
    columns = min(2, len(drawn))
    rows = -(-len(drawn) // columns)
    fig, grid = figures.panels(rows, columns, 10.2 if columns > 1 else 7.6, 0.8 + 3.7 * rows)
    for axes, group in zip(grid.flat, drawn, strict=False):
        facts["moved"] += bound_figures.spread_lines(axes, by_group[group])
        facts["directions"] += sum(len(line.curvature) for line in by_group[group])
        axes.set_title(f"{figures.shortened(layer_words(group))}: {axes_of[group]:,} directions", parse_math=False)
        axes.set_xlabel("curvature: second derivative of the loss")
    for axes in grid.flat[len(drawn) :]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("standard deviation")
    found = [axes.get_legend_handles_labels() for axes in grid.flat[: len(drawn)]]
    entries = {label: handle for handles, labels in found for handle, label in zip(handles, labels, strict=True)}
    fig.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=3, fontsize=9)
    facts |= {"drawn": len(drawn), "labels": shown[0].labels}
    return picture(folder, "deviations", fig, "Standard deviations of the posteriors along the curvature"), facts


# --- words of the page ------------------------------------------------------------------------------------------------


def _cards(shown: Sequence[Shown]) -> list[dict[str, str]]:
    kinds = {kind: of_labels(shown, kind) for kind in KINDS}
    best = bound_words.lowest(kinds["true"] or shown)
    certificate = best.record.certificate
    than = f"; guessing has {rate(best.guessing)}" if best.guessing is not None else ""
    cards = [
        {
            "title": f"lowest bound: {best.name}",
            "value": guaranteed(best.bound, certificate.bound_stderr),
            "what": f"at most this {best.record.risk}, with {bound_words.confidence(certificate.delta)} confidence by "
            f"itself{than}",
        },
        {
            "title": "the truth" if best.is_exact and np.isfinite(best.held_out_risk) else "held out",
            "value": rate_with_error(best.held_out_risk, best.held_out_stderr),
            "what": f"the same networks’ {best.record.risk} ({best.held_out_what})"
            if np.isfinite(best.held_out_risk)
            else "nothing was held out",
        },
        {
            "title": "the trained network itself",
            "value": rate(best.network_held_out if np.isfinite(best.network_held_out) else best.record.network_risk),
            "what": f"held out, and {rate(best.record.network_risk)} on the samples; no bound is about it"
            if np.isfinite(best.network_held_out)
            else "on the samples; no bound is about it",
        },
        {
            "title": "what the posterior costs",
            "value": f"{number(certificate.kl / certificate.n)} nats",
            "what": f"for each sample: a KL of {number(certificate.kl)} nats for {certificate.n:,} samples",
        },
    ]
    basis = bound_words.basis_card(kinds["true"])
    if basis is not None:
        cards.append(basis)
    if kinds["random"] and kinds["true"]:
        control = bound_words.lowest(kinds["random"])
        value = guaranteed(control.bound, control.record.certificate.bound_stderr)
        what = f"the lowest bound of the control{than}"
        cards.append({"title": "random labels", "value": value, "what": what})
    return cards


def _meanings(shown: Sequence[Shown]) -> list[tuple[str, str]]:
    kinds = list(dict.fromkeys(each.record.posterior for each in shown))
    known = [kind for kind in bound_words.POSTERIOR_MEANINGS if kind in kinds]
    return [(bound_words.posterior_name(kind), bound_words.POSTERIOR_MEANINGS[kind]) for kind in known]


def _held_out(shown: Sequence[Shown]) -> list[str]:
    """What was held out, for each kind of labels."""
    known = [each for each in shown if np.isfinite(each.held_out_risk)]
    return list(dict.fromkeys(f"{each.labels} labels, {each.held_out_what}" for each in known))


def _detail(each: Shown) -> dict[str, Any]:
    record = each.record
    return {
        "title": f"{each.labels} labels, {each.name}: {guaranteed(each.bound, record.certificate.bound_stderr)}",
        "optimization": bound_words.optimization(each),
        "delta": record.certificate.delta,
        "rows": [tuple(row) for row in record.table()],
        "network_risk": rate(record.network_risk),
        "seed": record.provenance.seed,
    }
