"""The page of `hesscope spectrum`: the eigenvalues of one network's curvature, as a whole and block by block."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes

from hesscope.core.records import Provenance
from hesscope.estimate.density import SpectralDensity
from hesscope.estimate.symlog import SYMLOG_BANDWIDTH, from_symlog, to_symlog
from hesscope.report import figures
from hesscope.report.page import Picture, picture, write_page
from hesscope.report.study_page import KINDS, with_error
from hesscope.report.style import COLOURS, MAP, number, percent, styled

if TYPE_CHECKING:
    import xarray as xr

Array = npt.NDArray[Any]

PAGE = "spectrum.html"
MATRIX_NAMES = {"hessian": "Hessian", "gauss_newton": "Gauss-Newton matrix"}
# Names of what was measured, as rows of the table of steps.
STEP_NAMES = {
    "largest": "largest eigenvalues",
    "smallest": "smallest eigenvalues",
    "density": "spectral density",
    "trace": "trace",
    "norm": "Frobenius norm",
    "traces": "traces of blocks",
    "blocks": "spectra of blocks",
}
# The density's axis is linear below this share of the largest eigenvalue, or a few widths of what the quadrature
# resolves, if that is more: a finer one would show its single nodes.
LINEAR_SHARE, LINEAR_WIDTHS = 1e-5, 4
GRID = 1200
# Densities are drawn down to a fraction of one eigenvalue per decade.
FLOOR = 0.1
# Tables and bars show this many blocks (more are in the results file); maps have names up to so many.
BLOCKS_SHOWN = 64
BLOCKS_LABELLED = 40
BLOCKS_PRINTED = 20
PAIRS_SHOWN = 20
TICKS = 5
# Eigenvalues of an end that span more than this factor are drawn on a logarithmic axis.
LOG_RATIO = 30
# Digits of a value with a tiny error; distances are written into the cells of a map of so few blocks.
DIGITS = 5
BLOCKS_WRITTEN = 12


def write_spectrum_page(folder: Path, result: xr.Dataset, command: str) -> Path:
    """Write folder/spectrum.html and the figures from the result of `hesscope spectrum`."""
    zero = _is_zero(result)
    with styled():
        pictures = {} if zero else {"density": _density_figure(folder, result), "ends": _ends_figure(folder, result)}
        if not zero:
            pictures["blocks"] = _blocks_figure(folder, result)
            if result.sizes["compared"] > 1:
                pictures["distances"] = _distances_figure(folder, result)
    attributes = result.attrs
    context = {
        "headline": spectrum_headline(result),
        "matrix": MATRIX_NAMES[attributes["matrix"]],
        "cards": _cards(result),
        "pictures": pictures,
        "quantities": _quantity_rows(result),
        "pairs": _pair_rows(result),
        "pair_count": result.sizes["pair"],
        "warnings": _warnings(result),
        "outlier_text": _outlier_text(result),
        "blocks": _block_rows(result, BLOCKS_SHOWN),
        "block_count": result.sizes["block"],
        "compared_count": result.sizes["compared"],
        "sum_text": with_reach(float(attributes["block_trace_sum"]), float(attributes["block_trace_sum_stderr"])),
        "distances": _distance_facts(result),
        "steps": _step_rows(result),
        "explanation": attributes["explanation"],
        "kind": KINDS.get(attributes["partition"]),
        "config": {key: value for key, value in json.loads(attributes["config"]).items() if key != "spectrum"},
        "settings": json.loads(attributes["config"])["spectrum"],
        "attributes": attributes,
        "unused": _names(attributes.get("unused")),
        "notes": _names(attributes.get("notes")),
        "command": command,
    }
    return write_page(folder / PAGE, "spectrum.html", context)


def spectrum_table(result: xr.Dataset) -> list[tuple[str, ...]]:
    """Key numbers as rows of text, the first row being names of columns."""
    rows: list[tuple[str, ...]] = [("quantity", "value", "error", "unit")]
    for row in _quantity_rows(result):
        rows.append((row["name"], row["plain"], row["error"], row["unit"]))
    return rows


def block_table(result: xr.Dataset) -> list[tuple[str, ...]]:
    """Blocks of the largest traces as rows of text, the first row being names of columns."""
    rows: list[tuple[str, ...]] = [("block", "parameters", "trace", "share of trace", "largest eigenvalue")]
    for row in _block_rows(result, BLOCKS_PRINTED):
        rows.append((row["label"], f"{row['size']:,}", row["trace"], row["share"], row["largest"]))
    return rows


def spectrum_headline(result: xr.Dataset) -> str:
    """The largest curvature and the outliers in one sentence."""
    name = MATRIX_NAMES[result.attrs["matrix"]]
    if _is_zero(result):
        return f"The {name} is zero: the loss is linear in the parameters."
    largest, _ = _quantity(result, "largest")
    count, size = int(_quantity(result, "outliers")[0]), int(result.attrs["parameters"])
    about = "" if bool(result["converged"][0, 0]) else "about "
    stand = {0: "no direction stands", 1: "1 direction stands"}.get(count, f"{count:,} directions stand")
    bulk = "the bulk" if count == 0 else f"a bulk of {size - count:,}"
    return f"The largest curvature is {about}{number(largest)}; {stand} out of {bulk}."


# --- words and tables -------------------------------------------------------------------------------------------------


def _quantity(result: xr.Dataset, name: str) -> tuple[float, float]:
    at = result.sel(quantity=name)
    return float(at["value"]), float(at["error"])


def _is_zero(result: xr.Dataset) -> bool:
    return not bool(np.any(result["node"].to_numpy()))


def with_reach(value: float, error: float) -> str:
    """'12.3 ± 0.4', as far as the error reaches; the value alone where it has none, a dash where there is no value."""
    if not np.isfinite(value):
        return "—"
    if not (np.isfinite(error) and error > 0) or value == 0:
        return number(value) if not error > 0 else with_error(value, error)
    reach = int(np.floor(np.log10(abs(value)))) - int(np.floor(np.log10(error)))
    return f"{number(value, min(max(reach + 1, 3), DIGITS))} ± {number(error, 1)}"


def _cards(result: xr.Dataset) -> list[dict[str, str]]:
    symbol = "H" if result.attrs["matrix"] == "hessian" else "G"
    size = int(result.attrs["parameters"])
    negative, negative_error = _quantity(result, "negative_mass")
    negative_text = "—" if not np.isfinite(negative) else percent(negative)
    if np.isfinite(negative) and negative_error > 0:
        negative_text = f"({with_error(100 * negative, 100 * negative_error)})\N{NO-BREAK SPACE}%"
    count = int(_quantity(result, "outliers")[0])
    return [
        {
            "title": "sharpness",
            "value": with_reach(*_quantity(result, "largest")),
            "what": "largest eigenvalue: the curvature in the steepest direction",
        },
        {
            "title": "outliers",
            "value": f"{count:,} of {size:,}",
            "what": "directions that a gap separates from the bulk of the spectrum",
        },
        {
            "title": "largest over smallest",
            "value": with_reach(*_quantity(result, "spread")),
            "what": f"λ max / |λ min|, with λ min = {with_reach(*_quantity(result, 'smallest'))}",
        },
        {
            "title": "trace",
            "value": with_reach(*_quantity(result, "trace")),
            "what": "sum of all eigenvalues: the curvature over all directions",
        },
        {
            "title": "effective rank",
            "value": with_reach(*_quantity(result, "effective_rank")),
            "what": f"(tr {symbol})² / ‖{symbol}‖²: as many equal eigenvalues would have this trace and norm",
        },
        {
            "title": "negative part",
            "value": negative_text,
            "what": "of the sum of |λ| lies in negative eigenvalues",
        },
    ]


# name -> (words, unit, meaning)
QUANTITIES = {
    "largest": ("largest eigenvalue λ max", "loss / parameter²", "sharpness; ± residual of its eigenpair"),
    "smallest": ("smallest eigenvalue λ min", "loss / parameter²", "most negative curvature; ± residual"),
    "spread": ("λ max / |λ min|", "", "both residuals added up"),
    "trace": ("trace", "loss / parameter²", "sum of the eigenvalues"),
    "norm_squared": ("squared Frobenius norm", "(loss / parameter²)²", "sum of the squared eigenvalues"),
    "effective_rank": ("effective rank", "directions", "squared trace over squared norm"),
    "negative_mass": ("negative part of the sum of |λ|", "share", "from the density"),
    "outliers": ("outliers", "directions", "places outside the bulk"),
    "outlier_mass": ("eigenvalues outside the bulk", "directions", "copies counted, from the density"),
}


def _quantity_rows(result: xr.Dataset) -> list[dict[str, str]]:
    rows = []
    for key, (name, unit, meaning) in QUANTITIES.items():
        value, error = _quantity(result, key)
        shown = f"{value:,.0f}" if key == "outliers" else with_reach(value, error)
        rows.append(
            {
                "name": name,
                "shown": shown,
                "plain": shown.split(" ± ")[0],
                "error": "" if not error > 0 else f"± {number(error, 1)}",
                "unit": unit,
                "meaning": meaning,
            }
        )
    return rows


def _pair_rows(result: xr.Dataset) -> list[dict[str, Any]]:
    """Both ends side by side, outermost first, with the block that holds most of the eigenvector."""
    labels = result["block"].to_numpy()
    rows = []
    for rank in range(min(result.sizes["pair"], PAIRS_SHOWN)):
        row: dict[str, Any] = {"rank": rank + 1}
        for end in ("largest", "smallest"):
            at = result.sel(end=end).isel(pair=rank if end == "largest" else -1 - rank)
            shares = at["eigenvector_share"].to_numpy()
            top = int(shares.argmax())
            row[end] = {
                "value": number(float(at["eigenvalue"]), 4),
                "residual": number(float(at["residual"]), 1),
                "converged": bool(at["converged"]),
                "block": str(labels[top]),
                "share": percent(float(shares[top])),
            }
        rows.append(row)
    return rows


def _foremost(result: xr.Dataset, most: int) -> npt.NDArray[np.intp]:
    """Numbers of the blocks of the largest traces, in the network's order."""
    return np.sort(np.argsort(-result["block_trace"].to_numpy(), kind="stable")[:most])


def _block_rows(result: xr.Dataset, most: int) -> list[dict[str, Any]]:
    """A row for each of the blocks of the largest traces."""
    compared = {str(label) for label in result["compared"].to_numpy()}
    rows = []
    for index in _foremost(result, most):
        at = result.isel(block=int(index))
        label, size = str(at["block"].item()), int(at["block_size"])
        trace, stderr = float(at["block_trace"]), float(at["block_trace_stderr"])
        share, share_stderr = float(at["block_share"]), float(at["block_share_stderr"])
        rows.append(
            {
                "label": label,
                "size": size,
                "trace": with_reach(trace, stderr),
                "share": f"{with_reach(100 * share, 100 * share_stderr)} %" if np.isfinite(share) else "—",
                "mean": number(trace / size),
                "largest": with_reach(float(at["block_largest"]), float(at["block_residual"])),
                "converged": label not in compared or bool(at["block_converged"]),
            }
        )
    return rows


def _distance_facts(result: xr.Dataset) -> dict[str, str]:
    """The most and the least alike of the blocks, and what noise alone would give, in words; empty for one block."""
    if result.sizes["compared"] < 2:
        return {}
    distance, stderr = result["distance"].to_numpy(), result["distance_stderr"].to_numpy()
    labels, estimated = result["compared"].to_numpy(), result["block_exact"].to_numpy() == 0
    noise = float(np.median(result["noise"].to_numpy()[estimated])) if estimated.any() else 0.0
    rows, columns = np.triu_indices(len(distance), k=1)
    pairs = distance[rows, columns]
    facts = {"mean": number(float(pairs.mean()), 2), "noise": number(noise, 2) if noise > 0 else ""}
    for name, at in (("alike", int(pairs.argmin())), ("different", int(pairs.argmax()))):
        i, j = rows[at], columns[at]
        facts[name] = f"{labels[i]} and {labels[j]} ({with_reach(float(distance[i, j]), float(stderr[i, j]))})"
    return facts


def _step_rows(result: xr.Dataset) -> list[dict[str, str]]:
    rows = []
    for key in result["measured"].to_numpy():
        at = result.sel(measured=key)
        rows.append(
            {
                "name": STEP_NAMES[str(key)],
                "method": str(at["engine"].item()).split("; ")[0],
                "products": f"{int(at['products']):,}",
                "seconds": f"{number(float(at['seconds']), 2)} s",
                "message": str(at["message"].item()),
            }
        )
    return rows


def _warnings(result: xr.Dataset) -> list[str]:
    """What did not reach its tolerance, in words."""
    late = result["measured"].to_numpy()[~result["tolerance_met"].to_numpy().astype(bool)]
    return [f"{STEP_NAMES[str(key)]}: {result['message'].sel(measured=key).item()}" for key in late]


def _outlier_text(result: xr.Dataset) -> str:
    attributes = result.attrs
    values = result["outlier"].to_numpy()
    lower, upper = number(float(attributes["bulk_lower"])), number(float(attributes["bulk_upper"]))
    below, above = int((values < attributes["bulk_lower"]).sum()), int((values > attributes["bulk_upper"]).sum())
    return (
        f"The bulk reaches from {lower} to {upper}; outliers below it: {below}, above it: {above}. "
        f"Outliers are eigenvalues {attributes['criterion']}."
    )


def _names(value: Any) -> list[str]:
    """A netCDF attribute that was written as a list of strings (an empty list and a single string come back bare)."""
    if value is None or isinstance(value, str):
        return [value] if value else []
    return [str(name) for name in np.atleast_1d(value)]


# --- figures ----------------------------------------------------------------------------------------------------------


def _density(result: xr.Dataset) -> SpectralDensity:
    """The quadrature on the page."""
    return SpectralDensity(
        nodes=result["node"].to_numpy(),
        weights=result["weight"].to_numpy(),
        dimension=int(result.attrs["dimension"]),
        exact=bool(result.attrs["exact"]),
        products=0,
        provenance=Provenance.from_attributes(result.attrs),
        message="",
    )


def _density_figure(folder: Path, result: xr.Dataset) -> Picture:
    """Eigenvalues per decade on a symmetric-log axis, with the band, the ends' eigenvalues and the outliers."""
    density = _density(result)
    peak = max(abs(end) for end in density.eigenvalue_range)
    threshold = max(LINEAR_WIDTHS * density.default_bandwidth, LINEAR_SHARE * peak)
    shifted = replace(density, nodes=to_symlog(density.nodes, threshold))
    width = SYMLOG_BANDWIDTH if density.exact else max(SYMLOG_BANDWIDTH, shifted.default_bandwidth)
    u = shifted.grid(GRID, width)
    size = density.dimension
    values = size * shifted.density(u, width)
    band = shifted.confidence_band(u, width)
    fig, grid = figures.panels(1, 1, 8.4, 4.2)
    axes = grid[0, 0]
    top = 4 * float(values.max())
    if not density.exact:
        lower, upper = (np.clip(size * end, FLOOR / 10, 10 * top) for end in (band.lower, band.upper))
        axes.fill_between(u, lower, upper, color=COLOURS["G"], alpha=0.22, linewidth=0, label="95 % band")
    label = "all eigenvalues, smoothed" if density.exact else "estimate"
    axes.plot(u, np.maximum(values, FLOOR / 10), color=COLOURS["G"], linewidth=1.4, label=label)
    ends = np.unique(result["eigenvalue"].to_numpy())
    lower_end, upper_end = _borders(result)
    outside = (ends < lower_end) | (ends > upper_end)
    for chosen, colour, name in ((~outside, "#777777", "in the bulk"), (outside, COLOURS["R"], "outside the bulk")):
        if chosen.any():
            places = to_symlog(ends[chosen], threshold)
            axes.vlines(places, FLOOR, 2.2 * FLOOR, color=colour, linewidth=1.2, label=f"eigenvalues {name}")
    outliers = result["outlier"].to_numpy()
    if len(outliers):
        heights = size * shifted.density(to_symlog(outliers, threshold), width)
        axes.plot(
            to_symlog(outliers, threshold),
            1.7 * heights,
            "v",
            color=COLOURS["R"],
            markersize=4.5,
            label="outliers of the density",
        )
    axes.set_yscale("log")
    axes.set_ylim(FLOOR, top)
    axes.yaxis.minorticks_off()
    _symlog_axis(axes, (float(u[0]), float(u[-1])), threshold)
    scale = f"linear within ±{number(threshold, 2)}, logarithmic beyond; smoothed over {number(width, 1)} decades"
    axes.set_xlabel(f"eigenvalue: {scale}")
    axes.set_ylabel("eigenvalues per decade")
    fig.legend(loc="outside upper center", ncols=3, fontsize=9)
    return picture(folder, "spectrum-density", fig, "Spectral density with its confidence band and the outliers")


def _borders(result: xr.Dataset) -> tuple[float, float]:
    """Half-way between the bulk and the next outlier on either side; infinite where there is none."""
    outliers = result["outlier"].to_numpy()
    lower, upper = float(result.attrs["bulk_lower"]), float(result.attrs["bulk_upper"])
    below, above = outliers[outliers < lower], outliers[outliers > upper]
    return (
        (lower + float(below.max())) / 2 if len(below) else -np.inf,
        (upper + float(above.min())) / 2 if len(above) else np.inf,
    )


def _symlog_axis(axes: Axes, limits: tuple[float, float], threshold: float) -> None:
    """Ticks at 0 and at some powers of ten on either side."""
    places, labels = [0.0], ["0"]
    reaches = [float(from_symlog(end, threshold)) for end in limits]
    # Powers of ten from the linear part on; 2 and 5 times them, too, where there are few.
    factors = (1, 2, 5) if max(abs(reach) for reach in reaches) < 100 * threshold else (1,)
    for sign, reach in zip((-1, 1), (-reaches[0], reaches[1]), strict=True):
        if reach <= threshold:
            continue
        powers = range(int(np.floor(np.log10(threshold))), int(np.floor(np.log10(reach))) + 1)
        values = [factor * 10.0**power for power in powers for factor in factors]
        values = [value for value in values if threshold <= value <= reach]
        for value in values[::-1][:: max(1, -(-len(values) // TICKS))]:
            places.append(sign * value)
            labels.append(("−" if sign < 0 else "") + number(value, 1))
    axes.set_xticks(to_symlog(places, threshold).tolist(), labels)
    axes.axvline(0, color="#888888", linewidth=0.6)
    axes.set_xlim(limits)


def _ends_figure(folder: Path, result: xr.Dataset) -> Picture:
    """Eigenvalues of both ends over their rank, with residuals; hollow where they did not converge."""
    fig, grid = figures.panels(1, 2, 8.4, 3.5)
    for axes, end, title in zip(grid[0], ("largest", "smallest"), ("largest", "smallest"), strict=True):
        at = result.sel(end=end)
        order = slice(None) if end == "largest" else slice(None, None, -1)
        values, errors = at["eigenvalue"].to_numpy()[order], at["residual"].to_numpy()[order]
        converged = at["converged"].to_numpy().astype(bool)[order]
        ranks = np.arange(1, len(values) + 1)
        for chosen, face, name in ((converged, COLOURS["G"], "converged"), (~converged, "white", "not converged")):
            if chosen.any():
                axes.errorbar(
                    ranks[chosen],
                    values[chosen],
                    yerr=errors[chosen],
                    fmt="o",
                    markersize=5,
                    color=COLOURS["G"],
                    markerfacecolor=face,
                    capsize=2.5,
                    elinewidth=1,
                    label=name,
                )
        bulk = _borders(result)[1 if end == "largest" else 0]
        if values.min() <= bulk <= values.max():
            axes.axhline(bulk, color="#888888", linewidth=0.8, linestyle="--")
            axes.annotate(
                "outliers beyond this line",
                (1.0, bulk),
                (-2, 3),
                ("axes fraction", "data"),
                "offset points",
                ha="right",
                fontsize=9,
            )
        if values.min() > 0 and values.max() > LOG_RATIO * values.min():
            figures.log_values(axes, values)
        axes.margins(y=0.12)
        axes.set_title(f"{title} {len(values)} eigenvalues")
        axes.set_xlabel("rank from the " + ("top" if end == "largest" else "bottom"))
        axes.xaxis.get_major_locator().set_params(integer=True)
        if not converged.all():
            axes.legend(fontsize=9)
    grid[0, 0].set_ylabel("eigenvalue")
    return picture(folder, "spectrum-ends", fig, "The largest and the smallest eigenvalues with their residuals")


def _blocks_figure(folder: Path, result: xr.Dataset) -> Picture:
    """Trace and largest eigenvalue of every block, with errors."""
    at = result.isel(block=_foremost(result, BLOCKS_SHOWN))
    names = [figures.shortened(str(label)) for label in at["block"].to_numpy()]
    fig, grid = figures.panels(1, 2, 8.4, 1.5 + 0.21 * max(len(names), 4))
    columns = (
        ("trace", "block_trace", "block_trace_stderr", COLOURS["G"]),
        ("largest eigenvalue", "block_largest", "block_residual", COLOURS["R"]),
    )
    places = np.arange(len(names))
    for axes, (title, value, error, colour) in zip(grid[0], columns, strict=True):
        values, errors = at[value].to_numpy(), np.nan_to_num(at[error].to_numpy())
        axes.barh(places, values, xerr=errors, color=colour, height=0.68, error_kw={"elinewidth": 1, "capsize": 2})
        axes.axvline(0, color="#888888", linewidth=0.6)
        axes.set_title(title)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_yticks(places, names if axes is grid[0, 0] else [""] * len(names), fontsize=9, parse_math=False)
        axes.locator_params(axis="x", nbins=5)
        axes.set_xlabel("loss / parameter²")
    return picture(folder, "spectrum-blocks", fig, "Trace and largest eigenvalue of every block")


def _distances_figure(folder: Path, result: xr.Dataset) -> Picture:
    """Jensen-Shannon distances between the spectra of all pairs of blocks."""
    labels = [str(label) for label in result["compared"].to_numpy()]
    named = len(labels) <= BLOCKS_LABELLED
    side = 3.4 + 0.17 * min(len(labels), BLOCKS_LABELLED)
    fig, grid = figures.panels(1, 1, max(side + 1.3, 8.0), side)
    axes = grid[0, 0]
    distance = result["distance"].to_numpy()
    image = axes.imshow(distance, cmap=MAP, vmin=0.0, vmax=1.0, interpolation="nearest")
    if named:
        short = [figures.shortened(label) for label in labels]
        axes.set_xticks(range(len(short)), short, rotation=90, fontsize=9, parse_math=False)
        axes.set_yticks(range(len(short)), short, fontsize=9, parse_math=False)
    else:
        axes.set_xlabel("block")
    if len(labels) <= BLOCKS_WRITTEN:
        for i, j in zip(*np.nonzero(~np.eye(len(labels), dtype=bool)), strict=True):
            colour = "black" if distance[i, j] > 0.6 else "white"
            axes.text(j, i, f"{distance[i, j]:.2f}", ha="center", va="center", color=colour, fontsize=9)
    for spine in axes.spines.values():
        spine.set_visible(True)
    bar = fig.colorbar(image, ax=axes, shrink=0.8, pad=0.02)
    bar.set_label("Jensen-Shannon distance")
    return picture(folder, "spectrum-distances", fig, "Jensen-Shannon distances between the spectra of the blocks")
