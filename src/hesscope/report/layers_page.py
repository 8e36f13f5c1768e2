"""The page of `hesscope layers`: how well one network's layers decouple, and what follows from it, layer by layer."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hesscope.layerwise.eigenstructure import Eigenstructure
from hesscope.layerwise.factors import KroneckerFactors
from hesscope.layerwise.full_hessian import FullHessianOverlap
from hesscope.layerwise.outlier_counts import EdgeOutliers
from hesscope.layerwise.rank_one import LayerLowRank
from hesscope.report import layer_figures
from hesscope.report.page import Picture, picture, write_page
from hesscope.report.spectrum_page import with_reach
from hesscope.report.style import figure, number, percent, styled

if TYPE_CHECKING:
    import xarray as xr

Array = npt.NDArray[Any]

PAGE = "layers.html"
MATRICES = {"hessian": ("Hessian", "H"), "gauss_newton": ("Gauss-Newton matrix", "G")}
SHARINGS = {
    "none": "one position per sample",
    "expand": "positions counted as samples (expand)",
    "reduce": "positions summed (reduce)",
}
# Below the first error layers are said to decouple well, below the second roughly, beyond that badly.
WELL, ROUGHLY = 0.1, 0.5
# Smaller shares are rounding.
ROUNDING = 1e-9
# Eigenvalues are said to stand out before a gap of at least this ratio.
STANDS_OUT = 1.5
# Matrices with this share of their energy in one singular value are said to be nearly rank one.
NEARLY_RANK_ONE = 0.9
# Overview figures show so many layers, those of the largest eigenvalues; so many have figures of their own.
LAYERS_SHOWN, LAYERS_DRAWN = 48, 6
# Bars of singular values are drawn of this many eigenvectors.
VECTORS_DRAWN = 30
# Neighbouring eigenvalues that differ by less than this share are named as nearly equal.
NEARLY_EQUAL = 0.01
# Eigenvalues below this share of the largest count as rounding.
ROUNDING = 1e-9
UNKNOWN, UNMEASURED = "not known", "not measured"


@dataclass(frozen=True)
class _Measured:
    """What is known of the layer at a position of the network."""

    position: int
    factors: KroneckerFactors
    structure: Eigenstructure
    low_rank: LayerLowRank

    @property
    def is_zero(self) -> bool:
        return not self.structure.values.any()

    @property
    def top(self) -> int:
        """Number of eigenvectors that count as top ones: C - 1, or one where there are no classes."""
        return min(self.structure.expected_outliers or 1, self.structure.k)


def write_layers_page(
    folder: Path,
    summary: xr.Dataset,
    factors: Sequence[xr.Dataset],
    structures: Sequence[xr.Dataset],
    low_ranks: Sequence[xr.Dataset],
    full: xr.Dataset | None,
    command: str,
) -> Path:
    """Write folder/layers.html and the figures.

    Args:
        summary: of all layers, with dimension "layer".
        factors, structures, low_ranks: records of the layers, in the order of the summary.
        full: the whole matrix beside the layers (FullHessianOverlap), or None.
        command: that was run.
    """
    measured = [
        _Measured(
            position,
            KroneckerFactors.from_xarray(each),
            Eigenstructure.from_xarray(structure),
            LayerLowRank.from_xarray(low_rank),
        )
        for position, (each, structure, low_rank) in enumerate(zip(factors, structures, low_ranks, strict=True))
    ]
    whole = None if full is None else FullHessianOverlap.from_xarray(full)
    drawn = _drawn(summary)
    with styled():
        pictures = _overview(folder, summary)
        sections = [_section(folder, measured[position]) for position in drawn]
        if whole is not None:
            pictures |= _full_figures(folder, whole)
    attributes = summary.attrs
    name, symbol = MATRICES[attributes["curvature"]]
    context = {
        "headline": layers_headline(summary),
        "attributes": attributes,
        "matrix": name,
        "symbol": symbol,
        "classes": _classes(summary),
        "top": _top_said(summary),
        "cards": _cards(summary),
        "table": layers_table(summary),
        "methods": _methods(summary),
        "left_out": reasons(attributes.get("left_out", "{}")),
        "pictures": pictures,
        "sections": sections,
        "layer_count": len(measured),
        "stands_out": f"{STANDS_OUT:.1f}",
        "shown": len(_foremost(summary)),
        "full": None if whole is None else _full_facts(whole),
        "command": command,
    }
    return write_page(folder / PAGE, "layers.html", context)


# --- words ------------------------------------------------------------------------------------------------------------


def layers_headline(summary: xr.Dataset) -> str:
    """How well the layers decouple, whether their top eigenvectors are rank one, how many outliers there are."""
    return f"{_decoupling_said(summary)} {_eigenvectors_said(summary)}"


def layers_table(summary: xr.Dataset) -> list[tuple[str, ...]]:
    """A row for every layer, the first row being names of columns."""
    rows: list[tuple[str, ...]] = [
        (
            "layer",
            "shape",
            "error",
            "best product",
            "residual part",
            "largest λ",
            "outliers",
            "beyond edge",
            "overlap",
            "rank one",
            "along E[x]",
            "cos²",
            "λ₁/λ₂",
        )
    ]
    for position, name in enumerate(summary["layer"].to_numpy()):
        at = summary.isel(layer=position)
        measured = bool(np.isfinite(float(at["relative_error"])))
        best = share_with_error(float(at["best_relative_error"]), float(at["best_stderr"]), UNKNOWN)
        edge = _count(at["outliers_edge"])
        rows.append(
            (
                str(name),
                f"{int(at['outputs']):,} × {int(at['inputs']):,}",
                share_with_error(float(at["relative_error"]), float(at["relative_stderr"]), UNMEASURED),
                best if measured else UNMEASURED,
                share_with_error(float(at["residual_share"]), 0.0, UNMEASURED),
                number(float(at["top_eigenvalue"])),
                f"{_count(at['outliers_gap'])} (×{float(at['outliers_ratio']):.2f})",
                "no edge" if edge == "—" else edge,
                percent(float(at["overlap_with_kronecker"])),
                percent(float(at["leading_share"])),
                percent(float(at["right_alignment"])),
                _cosine(float(at["input_alignment"])),
                _ratio(float(at["input_ratio"])),
            )
        )
    return rows


def share_with_error(share: float, stderr: float, missing: str = "—") -> str:
    """'34.0 % ± 0.5' (points, one standard error), the share alone where it is exact, `missing` where it is nan."""
    if not np.isfinite(share):
        return missing
    if not stderr > 0:
        return percent(share if share > ROUNDING else 0.0)
    decimals = max(1, -int(np.floor(np.log10(100 * stderr))))
    return f"{100 * share:.{decimals}f}\N{NO-BREAK SPACE}% ± {100 * stderr:.{decimals}f}"


def spoken_range(values: Array, names: Sequence[str]) -> str:
    """'30.0 % (layer fc1) to 42.4 % (layer fc3)', or the one value that there is."""
    low, high = int(np.argmin(values)), int(np.argmax(values))
    ends = share_with_error(float(values[low]), 0.0), share_with_error(float(values[high]), 0.0)
    return ends[0] if ends[0] == ends[1] else f"{ends[0]} (layer {names[low]}) to {ends[1]} (layer {names[high]})"


def _decoupling_said(summary: xr.Dataset) -> str:
    known = _known(summary)
    if not known.any():
        return "How well the layers decouple was not measured."
    names = [str(name) for name in summary["layer"].to_numpy()[known]]
    errors = _values(summary, "relative_error")[known]
    verdicts = {"well" if error < WELL else "roughly" if error < ROUGHLY else "badly" for error in errors}
    verdict = verdicts.pop() if len(verdicts) == 1 else "unevenly"
    if len(names) == 1:
        missed = share_with_error(float(errors[0]), 0.0)
        return f"Layer {names[0]} decouples {verdict}: E[M] ⊗ E[xxᵀ] misses {missed} of its Hessian."
    return f"The layers decouple {verdict}: E[M] ⊗ E[xxᵀ] misses {spoken_range(errors, names)} of their Hessians."


def _eigenvectors_said(summary: xr.Dataset) -> str:
    """Rank of the top eigenvectors and number of outliers."""
    classes, layers = _classes(summary), summary.sizes["layer"]
    shares = _values(summary, "leading_share")
    known = np.isfinite(shares)
    nearly = int((shares[known] >= NEARLY_RANK_ONE).sum())
    whose = "Their" if layers > 1 else "Its"
    which = "top eigenvector is" if _top_said(summary) == 1 else f"top {_top_said(summary)} eigenvectors are"
    if layers > 1 and _top_said(summary) == 1:
        which = "top eigenvectors are"
    where = "" if nearly in (0, int(known.sum())) else f" in {nearly} of {int(known.sum())} layers"
    ranks = f"{whose} {which} {'nearly' if nearly else 'not'} rank one{where}" if known.any() else ""
    clear = _values(summary, "outliers_ratio") >= STANDS_OUT
    if not clear.any():
        none = "no eigenvalues stand clearly out"
        return f"{ranks}, and {none}." if ranks else f"{none.capitalize()}."
    counts = _values(summary, "outliers_gap").astype(int)[clear]
    low, high = int(counts.min()), int(counts.max())
    one = low == high == 1
    said = f"{low}" if low == high else f"{low} to {high}"
    stand = f"{said} eigenvalue{'' if one else 's'} stand{'s' if one else ''} out"
    every = " of each" if clear.all() else f" in {int(clear.sum())} of {layers} layers"
    stand += (every if layers > 1 else "") + (
        ""
        if classes is None
        else f" (C\N{NO-BREAK SPACE}−\N{NO-BREAK SPACE}1\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}{classes - 1})"
    )
    return f"{ranks}, and {stand}." if ranks else f"{stand}."


def _top_said(summary: xr.Dataset) -> int:
    """Number of eigenvectors that count as top ones: C - 1, or as many as were measured; one without classes."""
    return int(_values(summary, "leading").max())


def _cards(summary: xr.Dataset) -> list[dict[str, str]]:
    """Ranges over the layers."""
    classes = _classes(summary)
    top = _top_said(summary)
    vectors = "top eigenvector as a matrix" if top == 1 else f"top {top} eigenvectors as matrices (median)"
    edges = _values(summary, "outliers_edge")
    seen = edges[np.isfinite(edges) & (edges >= 0)]
    counts = _values(summary, "outliers_gap")
    beyond = f"{_span(seen, _count)} lie beyond a Marchenko-Pastur bulk" if len(seen) else "no bulk has an edge"
    expected = "" if classes is None else f"; C − 1 = {classes - 1}"
    return [
        {
            "title": "decoupling error",
            "value": _span(_values(summary, "relative_error"), percent) or UNMEASURED,
            "what": "‖H − E[M] ⊗ E[xxᵀ]‖ / ‖H‖: what the product misses of a layer’s Hessian",
        },
        {
            "title": "error of the best product",
            "value": _span(_values(summary, "best_relative_error"), percent)
            or (UNKNOWN if _known(summary).any() else UNMEASURED),
            "what": "what the nearest of all Kronecker products misses",
        },
        {
            "title": "outliers",
            "value": _span(counts, _count),
            "what": f"eigenvalues before the largest gap{expected}; {beyond}",
        },
        {
            "title": "rank one",
            "value": _span(_values(summary, "leading_share"), percent) or "—",
            "what": f"share of one singular value in the {vectors}",
        },
        {
            "title": "along the mean input",
            "value": _span(_values(summary, "right_alignment"), percent) or "—",
            "what": "cos² of their leading right singular vectors with E[x]",
        },
        {
            "title": "dominance of the mean input",
            "value": _span(_values(summary, "input_ratio"), _ratio) or "—",
            "what": f"λ₁/λ₂ of E[xxᵀ], whose top eigenvector has cos² = "
            f"{_span(_values(summary, 'input_alignment'), _cosine) or '—'} with E[x]",
        },
    ]


def _span(values: Array, form: Callable[[float], str]) -> str:
    """'29.7 % to 35.7 %' of the values that are known, empty if there are none."""
    known = values[~np.isnan(values)]
    if not len(known):
        return ""
    low, high = form(float(known.min())), form(float(known.max()))
    unit = "\N{NO-BREAK SPACE}%"
    if low == high:
        return low
    return f"{low.removesuffix(unit)} – {high}" if high.endswith(unit) else f"{low} – {high}"


def _values(summary: xr.Dataset, name: str) -> Array:
    return np.asarray(summary[name].to_numpy(), dtype=np.float64)


def _known(summary: xr.Dataset) -> npt.NDArray[np.bool_]:
    return np.isfinite(_values(summary, "relative_error"))


def _classes(summary: xr.Dataset) -> int | None:
    classes = int(summary.attrs["classes"])
    return classes if classes > 0 else None


def _count(value: Any) -> str:
    """A count, a dash where there is none (-1 or nan)."""
    return f"{int(value):,}" if np.isfinite(float(value)) and float(value) >= 0 else "—"


def _cosine(value: float) -> str:
    """A squared cosine with as many decimals as it takes to see how near 1 it is."""
    if not np.isfinite(value):
        return "—"
    rest = 1 - value
    decimals = 3 if not 0 < rest < 1e-3 else min(int(np.ceil(-np.log10(rest))), 6)
    return f"{value:.{decimals}f}"


def _ratio(value: float) -> str:
    return "∞" if np.isinf(value) else "—" if np.isnan(value) else "> 10⁶" if value > 1e6 else number(value)


def reasons(given: str) -> list[tuple[str, str]]:
    """What was left out, as JSON of module -> reason, as pairs of names and their common reason."""
    found: dict[str, list[str]] = {}
    for name, reason in json.loads(given).items():
        found.setdefault(str(reason), []).append(str(name) or "the model itself")
    return [(", ".join(names), reason) for reason, names in found.items()]


def _methods(summary: xr.Dataset) -> dict[str, list[str]]:
    """How errors were measured -> the layers of which they were."""
    found: dict[str, list[str]] = {}
    for name, note in zip(summary["layer"].to_numpy(), summary["decoupling_note"].to_numpy(), strict=True):
        found.setdefault(str(note) or UNMEASURED, []).append(str(name))
    return found


def _foremost(summary: xr.Dataset) -> npt.NDArray[np.intp]:
    """Positions of the layers in overview figures, in the network's order."""
    tops = np.nan_to_num(_values(summary, "top_eigenvalue"))
    return np.sort(np.argsort(-tops, kind="stable")[:LAYERS_SHOWN])


def _drawn(summary: xr.Dataset) -> list[int]:
    """Positions of the layers with figures: the best and the worst decoupled, then those of the largest eigenvalues."""
    known = np.flatnonzero(_known(summary))
    errors = _values(summary, "relative_error")[known]
    ends = [int(known[errors.argmin()]), int(known[errors.argmax()])] if len(known) else []
    order = np.argsort(-np.nan_to_num(_values(summary, "top_eigenvalue")), kind="stable").tolist()
    return sorted(list(dict.fromkeys([*ends, *order]))[:LAYERS_DRAWN])


# --- overview ---------------------------------------------------------------------------------------------------------


def _overview(folder: Path, summary: xr.Dataset) -> dict[str, Picture]:
    """Errors and shares of all layers side by side."""
    at = summary.isel(layer=_foremost(summary))
    names = [str(name) for name in at["layer"].to_numpy()]
    height = 1.5 + 0.3 * max(len(names), 2)
    pictures = {}
    if _known(at).any():
        fig = figure(5.2, height)
        layer_figures.error_bars(
            fig.add_subplot(),
            names,
            _values(at, "relative_error"),
            _values(at, "relative_stderr"),
            _values(at, "best_relative_error"),
            _values(at, "residual_share"),
        )
        fig.legend(loc="outside upper center", ncols=3, fontsize=9, columnspacing=1.0, handletextpad=0.4)
        pictures["errors"] = picture(folder, "layers-errors", fig, "Decoupling error of every layer")
    fig = figure(5.2, height)
    series = {
        "rank one": _values(at, "leading_share"),
        "along E[x]": _values(at, "right_alignment"),
        "E[xxᵀ] along E[x]": _values(at, "input_alignment"),
    }
    layer_figures.share_dots(fig.add_subplot(), names, series)
    fig.legend(loc="outside upper center", ncols=3, fontsize=9, columnspacing=1.0, handletextpad=0.4)
    pictures["shares"] = picture(folder, "layers-shares", fig, "Rank-one shares and alignments of every layer")
    return pictures


def _full_figures(folder: Path, full: FullHessianOverlap) -> dict[str, Picture]:
    chosen = np.sort(np.argsort(-full.own_values[:, 0], kind="stable")[:LAYERS_SHOWN])
    names = [full.layers[place] for place in chosen]
    height = 1.5 + 0.32 * max(len(names), 3)
    fig = figure(5.2, height)
    axes = fig.add_subplot()
    image = layer_figures.share_map(axes, names, full.shares[chosen])
    fig.colorbar(image, ax=axes, shrink=0.9, pad=0.02).set_label("share (%)")
    found = {"full_shares": picture(folder, "layers-full-shares", fig, "Where the whole matrix's eigenvectors lie")}
    fig = figure(5.2, height)
    layer_figures.full_bars(fig.add_subplot(), names, full.overlap[chosen], full.captured[chosen], full.chance[chosen])
    fig.legend(loc="outside upper center", ncols=3, fontsize=9)
    found["full_overlap"] = picture(folder, "layers-full-overlap", fig, "Overlap of the whole matrix with the layers")
    return found


def _full_facts(full: FullHessianOverlap) -> dict[str, Any]:
    rows = [
        (
            name,
            f"{size:,}",
            str(dimension),
            percent(overlap),
            percent(captured),
            percent(chance),
            f"{number(overlap / chance, 2)} ×" if np.isfinite(overlap) and chance > 0 else "—",
        )
        for name, size, dimension, overlap, captured, chance in zip(
            full.layers, full.sizes, full.dimensions, full.overlap, full.captured, full.chance, strict=True
        )
    ]
    rest = 1 - full.shares.sum(axis=0)
    return {
        "k": len(full.values),
        "rows": rows,
        "largest": number(float(full.values[0])),
        "smallest": number(float(full.values[-1])),
        "rest": percent(float(rest.max())) if rest.max() > 1e-3 else "",
        "converged": full.converged,
    }


# --- single layers ----------------------------------------------------------------------------------------------------


def _section(folder: Path, layer: _Measured) -> dict[str, Any]:
    structure = layer.structure
    return {
        "name": structure.layer,
        "position": layer.position,
        "facts": _facts(layer),
        "pictures": [] if layer.is_zero else _layer_figures(folder, layer),
    }


def _facts(layer: _Measured) -> list[tuple[str, str]]:
    """What the figures do not say, as pairs of a name and words."""
    factors, structure, low_rank = layer.factors, layer.structure, layer.low_rank
    matrix, symbol = MATRICES[structure.curvature]
    outputs, inputs = structure.shape
    with_bias = ", the bias among the inputs" if structure.bias else ""
    facts = [
        ("layer", f"{structure.kind}, {outputs:,} outputs × {inputs:,} inputs{with_bias}; {SHARINGS[factors.sharing]}")
    ]
    if factors.output_stderr > 0:
        facts.append(("E[M]", f"sampled, with a standard error of {percent(factors.output_stderr)} of its norm"))
    facts.append(("decoupling", _decoupling_fact(factors)))
    if layer.is_zero:
        return [*facts, ("eigenvalues", f"the {matrix} of this layer is zero: nothing to draw")]
    late = int((~structure.converged).sum())
    facts.append(("eigenvalues", f"{_held(structure)}{f'; {late} of them not converged' if late else ''}"))
    gap, predicted, expected = structure.gap, structure.predicted_gap, structure.expected_outliers
    said = f"{gap.count} before the largest gap of {symbol} ({_gap(structure)}), {predicted.count} of the Kronecker "
    said += "approximation"
    facts.append(("outliers", said if expected is None else f"{said}; C − 1 = {expected}"))
    facts.append(("beyond the bulk’s edge", f"{_edge(structure.edge)}; Kronecker: {_edge(structure.predicted_edge)}"))
    pairs = _nearly_equal(structure.values[: max(2 * layer.top, 2)])
    if pairs:
        facts.append(
            (
                "nearly equal eigenvalues",
                f"{', '.join(pairs)}, to {percent(NEARLY_EQUAL)}: their eigenvectors mean little one by one",
            )
        )
    aligned = "E[x] = 0" if np.isnan(low_rank.input_alignment) else f"cos² = {_cosine(low_rank.input_alignment)}"
    facts.append(
        (
            "E[xxᵀ]",
            f"top eigenvector with E[x]: {aligned}; λ₁/λ₂ = {_ratio(low_rank.input_ratio)}; centering the input would "
            f"remove {percent(low_rank.mean_share)} of the trace",
        )
    )
    return facts


def _decoupling_fact(factors: KroneckerFactors) -> str:
    found = factors.decoupling
    if found is None:
        return UNMEASURED
    best = share_with_error(found.best_relative_error, found.best_stderr, UNKNOWN)
    said = f"E[M] ⊗ E[xxᵀ] misses {share_with_error(found.relative_error, found.relative_stderr)} of ‖H‖, the best "
    said += f"product {best} ({found.note})"
    if found.residual_share > 0:
        said += (
            f"; of the Gauss-Newton matrix {share_with_error(found.gauss_newton_error, found.gauss_newton_stderr)}, "
        )
        said += f"best {share_with_error(found.gauss_newton_best, 0.0, UNKNOWN)}; residual part "
        said += f"{percent(found.residual_share)} of the Hessian"
    return said


def _held(structure: Eigenstructure) -> str:
    """How much of the spectrum the leading eigenvalues are; of an indefinite matrix's trace they are no share."""
    share, squared = structure.trace_share, f"hold {percent(structure.energy_share)} of the squared norm"
    leading = f"the {structure.k} leading ones {squared}"
    if 0 <= share <= 1:
        error = structure.trace_stderr / abs(structure.trace)
        return f"{leading} and {percent(share)} of the trace{f' (which is known to {percent(error)})' if error else ''}"
    return (
        f"{leading} and add up to {number(float(structure.values.sum()))}, all to the trace "
        f"{with_reach(structure.trace, structure.trace_stderr)}"
    )


def _gap(structure: Eigenstructure) -> str:
    """The gap before the bulk in words: its ratio is arbitrary where the next eigenvalue is no more than rounding."""
    count, values = structure.gap.count, structure.values
    if count < structure.k and values[count] <= ROUNDING * values[0]:
        return "the next one is negative or zero"
    return f"a ratio of {number(structure.gap.ratio)}"


def _edge(edge: EdgeOutliers) -> str:
    if edge.count is None:
        return "no edge among those computed"
    return f"{edge.count} (edge {number(edge.edge)})"


def _nearly_equal(values: Array) -> list[str]:
    """Ranks of neighbours that hardly differ: '3 and 4'."""
    close = values[:-1] - values[1:] < NEARLY_EQUAL * np.abs(values[:-1])
    return [f"{place + 1} and {place + 2}" for place in np.flatnonzero(close)]


def _layer_figures(folder: Path, layer: _Measured) -> list[dict[str, Any]]:
    """The figures of one layer with their captions, in pairs."""
    structure, low_rank = layer.structure, layer.low_rank
    symbol = MATRICES[structure.curvature][1]
    outputs, inputs = structure.shape
    name = f"layer-{layer.position:03d}"
    found = []

    def add(kind: str, fig: Any, alt: str, caption: str) -> None:
        found.append(
            {"html": picture(folder, f"{name}-{kind}", fig, f"{structure.layer}: {alt}").html, "caption": caption}
        )

    pairs = structure.pairs
    positive = (structure.values > 0) & (pairs.values > 0)
    if positive.any():
        fig = figure(5.0, 4.6)
        layer_figures.eigenvalue_scatter(
            fig.add_subplot(),
            structure.values,
            pairs.values,
            pairs.values[structure.partner],
            structure.gap.count,
            symbol,
        )
        fig.legend(loc="outside upper center", ncols=2, fontsize=9)
        hidden = int((~positive).sum())
        add(
            "eigenvalues",
            fig,
            "eigenvalues against those of the Kronecker approximation",
            f"The {structure.k} leading eigenvalues of {symbol} against those of the Kronecker approximation, rank by "
            f"rank (dots) and matched by their eigenvectors (crosses): on the line they agree"
            f"{f'; {hidden} that are not positive are not drawn' if hidden else ''}.",
        )
    fig = figure(5.0, 4.6)
    chance = np.arange(1, structure.k + 1) / (outputs * inputs)
    marks = {"C − 1": structure.expected_outliers} if structure.expected_outliers else {}
    layer_figures.overlap_lines(fig.add_subplot(), structure.overlap, chance, {**marks, "width": outputs})
    fig.legend(loc="outside upper center", ncols=2, fontsize=9)
    at, overlap = min(outputs, structure.k), structure.overlap
    add(
        "overlap",
        fig,
        "overlap with the Kronecker approximation's eigenspaces",
        f"Overlap of the top eigenspaces of {symbol} and of the Kronecker approximation: "
        f"{percent(float(overlap[layer.top - 1]))} at k = {layer.top} and {percent(float(overlap[at - 1]))} at "
        f"k = {at}, where chance gives {percent(float(chance[at - 1]))}.",
    )
    sides = (
        ("output", structure.output_correspondence, pairs.output_index, "E[M]"),
        ("input", structure.input_correspondence, pairs.input_index, "E[xxᵀ]"),
    )
    for side, shares, index, factor in sides:
        fig = figure(5.0, 4.4)
        axes = fig.add_subplot()
        image = layer_figures.correspondence_map(axes, shares, index, symbol, f"eigenvector of {factor}")
        bar = fig.colorbar(image, ax=axes, shrink=0.8, pad=0.02)
        bar.set_label("squared inner product")
        top = float(shares[: layer.top].max(axis=1).mean())
        rows, mean = ("the first row is", "") if layer.top == 1 else (f"the first {layer.top} rows is", " on average")
        cut = _cut(shares, layer_figures.cells(shares, index))
        add(
            f"{side}-correspondence",
            fig,
            f"correspondence with the eigenvectors of {factor}",
            f"Which eigenvector of {factor} each eigenvector of {symbol} is made of{cut}: the brightest cell of "
            f"{rows} {percent(top)}{mean}; rings are where the Kronecker approximation has its own.",
        )
    drawn = min(low_rank.shares.shape[0], max(2 * layer.top, 10), VECTORS_DRAWN)
    fig = figure(5.0, 4.0)
    layer_figures.singular_bars(fig.add_subplot(), low_rank.shares[:drawn], low_rank.right_alignment[:drawn])
    fig.legend(loc="outside upper center", ncols=5, fontsize=9, columnspacing=0.9, handlelength=1.1, handletextpad=0.4)
    median = float(np.median(low_rank.shares[: layer.top, 0]))
    add(
        "singular-values",
        fig,
        "singular values of the matricized eigenvectors",
        f"Squared singular values of each eigenvector as a {outputs} × {inputs} matrix: the largest one has "
        f"{percent(median)} in the first{f' {layer.top} (median)' if layer.top > 1 else ''}, and dots are its right "
        "singular vector’s cos² with E[x].",
    )
    fig = figure(5.0, 4.0)
    layer_figures.factor_spectra(
        fig.add_subplot(), pairs.output_values, pairs.input_values, structure.expected_outliers
    )
    fig.legend(loc="outside upper center", ncols=3, fontsize=9)
    add(
        "factors",
        fig,
        "eigenvalues of both factors",
        f"Eigenvalues of both factors, relative to their largest: that of E[xxᵀ] is {_ratio(low_rank.input_ratio)} "
        "times the next one, and where it dominates, its products with those of E[M] stand out.",
    )
    return found


def _cut(shares: Array, shown: tuple[int, int]) -> str:
    """In words, if the map shows a part only."""
    parts = [
        f"{drawn} of {whole} {side}"
        for drawn, whole, side in zip(shown, shares.shape, ("rows", "columns"), strict=True)
        if drawn < whole
    ]
    return f" ({' and '.join(parts)} shown)" if parts else ""
