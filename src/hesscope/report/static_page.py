"""The pages of `hesscope theory` and `hesscope sweep`, which the demo's page contains as sections, too."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from matplotlib.axes import Axes

from hesscope.report import figures
from hesscope.report.page import Picture, picture, write_page
from hesscope.report.style import LOSS_NAMES, SERIES_COLOURS, number, one_part_in, percent, styled

if TYPE_CHECKING:
    import xarray as xr

Array = npt.NDArray[Any]

MODEL_NAMES = {"linear": "linear model", "one_hidden": "one hidden layer"}
# (C, r) of a layer is drawn times this power of C, which theory says makes it level off.
POWERS = {"hidden": 1, "output": 2}
HISTOGRAM_BINS = 50
# Rows of the theory's table are few enough to read; more are in the results file.
TABLE_ROWS = 60


def write_sweep_page(folder: Path, sweep: xr.Dataset, command: str) -> Path:
    """Write folder/report.html and the figures from the result of `hesscope sweep`."""
    section = {"sweep": sweep_section(folder, sweep)}
    return _write(
        folder, "sweep", "measured over the number of classes", sweep_headline(sweep), section, sweep, command
    )


def write_theory_page(folder: Path, theory: xr.Dataset, command: str) -> Path:
    """Write folder/report.html and the figures from the result of `hesscope theory`."""
    section = {"theory": theory_section(folder, theory)}
    return _write(folder, "theory", "predicted", theory_headline(theory), section, theory, command)


def _write(
    folder: Path, part: str, said: str, headline: str, section: Mapping[str, Any], data: xr.Dataset, command: str
) -> Path:
    """A page of its own around one section."""
    context = {"part": part, "said": said, "headline": headline, "command": command, "attributes": data.attrs}
    return write_page(folder / "report.html", "static.html", {**context, **section})


def sweep_section(folder: Path, sweep: xr.Dataset) -> dict[str, Any]:
    """What the sweep's section of a page shows; draws its figures."""
    with styled():
        pictures = {"ratios": _sweep_figure(folder, sweep), "spectra": _spectra_figure(folder, sweep)}
    rows = sweep_rows(sweep)
    inside = sum(row["inside"] for row in rows)
    return {"pictures": pictures, "rows": rows, "inside": inside, "attributes": sweep.attrs}


def theory_section(folder: Path, theory: xr.Dataset) -> dict[str, Any]:
    """What the theory's section of a page shows; draws its figures."""
    with styled():
        pictures = {"ratios": _theory_figure(folder, theory), "laws": _laws_figure(folder, theory)}
    rows = theory_rows(theory)
    return {
        "pictures": pictures,
        "rows": rows[:TABLE_ROWS],
        "row_count": len(rows),
        "linear": theory.attrs["model"] == "linear",
        "attributes": theory.attrs,
    }


def sweep_headline(sweep: xr.Dataset) -> Markup:
    """The fitted exponents in one sentence."""
    rows = sweep_rows(sweep)
    parts = [Markup("C<sup>{}</sup> ({})").format(_signed(row["exponent"][0], 2), row["name"]) for row in rows]
    return Markup("The off-diagonal ratio r falls with the number of classes as {}.").format(Markup(", ").join(parts))


def theory_headline(theory: xr.Dataset) -> str:
    """R at the largest C in words."""
    at = theory.isel(loss=0, gamma=0, width=0, classes=-1)
    layers = [
        f"the {layer} layer to {one_part_in(float(at[f'{layer}_ratio']))}"
        for layer in ("output", "hidden")
        if np.isfinite(at[f"{layer}_ratio"])
    ]
    said = " and ".join(layers).replace("to exact", "exactly")
    loss = LOSS_NAMES[str(at["loss"].item())]
    width = "" if theory.attrs["model"] == "linear" else f", m = {int(at['width'])}"
    return (
        f"With {int(at['classes']):,} classes and {loss}, theory predicts block-diagonality of {said} "
        f"(γ = {float(at['gamma']):g}{width})."
    )


def sweep_rows(sweep: xr.Dataset) -> list[dict[str, Any]]:
    """One row for each series: name, exponents with intervals, r at the largest C."""
    rows = []
    for index, key in enumerate(sweep["series"].to_numpy()):
        at = sweep.isel(series=index)
        exponent, slope = at["exponent"].to_numpy(), at["slope"].to_numpy()
        asymptotic = float(at["asymptotic"])
        measured = _pooled(at)
        rows.append(
            {
                "name": _series_name(str(key)),
                "asymptotic": int(asymptotic),
                "exponent": exponent,
                "texts": {
                    "asymptotic": _signed(asymptotic, 0),
                    "exponent": [_signed(value, 3) for value in exponent],
                    "slope": [_signed(value, 3) for value in slope],
                },
                "inside": bool(exponent[1] <= asymptotic <= exponent[2]),
                "classes": int(at["classes"][-1]),
                "measured": float(measured[-1]),
                "measured_text": _with_error(float(measured[-1]), _pooled_stderr(at)),
                "predicted": _with_error(float(at["predicted"][-1]), float(at["predicted_stderr"][-1])),
            }
        )
    return rows


def theory_rows(theory: xr.Dataset) -> list[dict[str, Any]]:
    """One row for each combination of loss, gamma, width and C."""
    names = ("hidden_ratio", "hidden_stderr", "output_ratio", "output_stderr", "limit_hidden", "limit_output")
    rows = []
    for loss in theory["loss"].to_numpy():
        for gamma in theory["gamma"].to_numpy():
            for width in theory["width"].to_numpy():
                for C in theory["classes"].to_numpy():
                    at = theory.sel(loss=loss, gamma=gamma, width=width, classes=C)
                    values = {name: float(at[name]) for name in names}
                    texts = {
                        layer: _with_error(values[f"{layer}_ratio"], values[f"{layer}_stderr"])
                        for layer in ("hidden", "output")
                    }
                    found = {
                        "loss": LOSS_NAMES[str(loss)],
                        "gamma": f"{gamma:g}",
                        "width": int(width),
                        "classes": int(C),
                    }
                    rows.append({**found, **values, "texts": texts})
    return rows


def sweep_table(sweep: xr.Dataset) -> list[tuple[str, ...]]:
    """The exponents as rows of text for a terminal, headed by the columns' names."""
    table: list[tuple[str, ...]] = [
        ("blocks", "exponent", "95 % interval", "theory", "r at the largest C", "predicted")
    ]
    for row in sweep_rows(sweep):
        value, low, high = row["exponent"]
        table.append(
            (
                row["name"],
                f"{value:.3f}",
                f"{low:.3f} to {high:.3f}",
                str(row["asymptotic"]),
                row["measured_text"],
                row["predicted"],
            )
        )
    return table


def theory_table(theory: xr.Dataset) -> list[tuple[str, ...]]:
    """The predictions as rows of text for a terminal, headed by the columns' names."""
    linear = theory.attrs["model"] == "linear"
    hidden = () if linear else ("m", "hidden r", "C r", "limit")
    table: list[tuple[str, ...]] = [("loss", "gamma", "C", *hidden, "output r", "C^2 r", "limit")]
    for row in theory_rows(theory):
        cells = [row["loss"], row["gamma"], f"{row['classes']:,}"]
        if not linear:
            cells += [str(row["width"]), row["texts"]["hidden"]]
            cells += [number(row["hidden_ratio"] * row["classes"]), number(row["limit_hidden"])]
        cells.append(row["texts"]["output"])
        cells += [number(row["output_ratio"] * row["classes"] ** 2), number(row["limit_output"])]
        table.append(tuple(cells))
    return table


def _signed(value: float, decimals: int) -> str:
    """A number with a minus sign that looks like one."""
    return f"{value:.{decimals}f}".replace("-", "−")


def _with_error(value: float, stderr: float) -> str:
    """A number with its relative standard error, if it has one beyond rounding."""
    return f"{number(value)} ± {percent(stderr / value)}" if stderr > 1e-12 * value else number(value)


def _pooled(series: xr.Dataset) -> Array:
    """R at every C: ratio of the energies summed over networks, [K]."""
    ratio: Array = (series["off_diagonal"].sum("network") / series["diagonal"].sum("network")).to_numpy()
    return ratio


def _pooled_stderr(series: xr.Dataset) -> float:
    """Standard error of the pooled r at the largest C (delta method over networks)."""
    off, on = (series[name].isel(classes=-1).to_numpy() for name in ("off_diagonal", "diagonal"))
    residuals = off - off.sum() / on.sum() * on
    return float(residuals.std(ddof=1) / np.sqrt(len(on)) / on.mean())


def _series_name(key: str) -> str:
    model, loss, layer = key.split(" ")[:3]
    kind = "linear model" if model == "linear" else f"{layer} layer"
    return f"{kind}, {LOSS_NAMES[loss]}"


def _sweep_figure(folder: Path, sweep: xr.Dataset) -> Picture:
    """Left: r over C. Right: the same times C or C^2, where theory levels off, with its limit."""
    fig, ((left, right),) = figures.panels(1, 2, 10.6, 4.4)
    C = sweep["classes"].to_numpy()
    for index, key in enumerate(sweep["series"].to_numpy()):
        at, name, colour = sweep.isel(series=index), _series_name(str(key)), SERIES_COLOURS[index]
        power = POWERS[str(key).split(" ")[2]]
        each = (at["off_diagonal"] / at["diagonal"]).to_numpy()
        predicted, stderr = at["predicted"].to_numpy(), at["predicted_stderr"].to_numpy()
        for axes, scale in ((left, np.ones(len(C))), (right, C.astype(float) ** power)):
            axes.plot(C, predicted * scale, color=colour, linewidth=1.4, zorder=2)
            axes.fill_between(
                C, (predicted - 2 * stderr) * scale, (predicted + 2 * stderr) * scale, color=colour, alpha=0.18, lw=0
            )
            axes.plot(
                np.repeat(C, each.shape[1]), (each * scale[:, None]).ravel(), ".", color=colour, alpha=0.35, ms=5, mew=0
            )
        left.plot(C, _pooled(at), "o", color=colour, ms=5, label=name)
        label = f"{'C² r' if power == 2 else 'C r'}, {name}"
        right.plot(C, _pooled(at) * C.astype(float) ** power, "o", color=colour, ms=5, label=label)
        right.axhline(float(at["limit"]), color=colour, linestyle=":", linewidth=1)
    for axes in (left, right):
        figures.class_axis(axes, C.tolist())
    left.set_yscale("log")
    left.yaxis.minorticks_off()
    left.set_ylabel("off-diagonal ratio r")
    left.legend(loc="lower left", fontsize=9)
    right.set_ylabel("r times C or C²")
    right.set_ylim(bottom=0)
    right.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=9)
    return picture(
        folder, "sweep", fig, "Measured and predicted off-diagonal ratios against the number of classes, log-log"
    )


def _spectra_figure(folder: Path, sweep: xr.Dataset) -> Picture:
    """Histograms of two blocks' eigenvalues with their laws; one row for diagonal, one for off-diagonal blocks."""
    names = [str(name) for name in sweep["block"].to_numpy()]
    columns = len(names) // 2
    fig, grid = figures.panels(2, columns, 10.6 if columns > 1 else 5.4, 6.2)
    for number_, name in enumerate(names):
        axes, at = grid[number_ % 2, number_ // 2], sweep.isel(block=number_)
        values = at["eigenvalue"].to_numpy()
        title = f"{_series_name(name)}:\n{name.split(' ')[3]} block"
        law = (at["grid"].to_numpy(), at["density"].to_numpy(), float(at["atom_at_zero"]))
        figures.spectrum_on_law(axes, values, *law, title, HISTOGRAM_BINS)
        axes.set_xlabel(f"eigenvalue\nKolmogorov distance {float(at['kolmogorov_distance']):.3f}")
    for axes in grid[:, 0]:
        axes.set_ylabel("density")
    return picture(folder, "spectra", fig, "Histograms of blocks' eigenvalues with the densities of their limit laws")


def _theory_figure(folder: Path, theory: xr.Dataset) -> Picture:
    """R over C for every loss, gamma and width: one panel for each layer that is not exactly block-diagonal."""
    layers = [layer for layer in ("hidden", "output") if bool((theory[f"{layer}_ratio"] > 0).any())]
    fig, grid = figures.panels(1, max(len(layers), 1), 10.6 if len(layers) > 1 else 6.4, 4.2)
    for axes, layer in zip(grid[0], layers, strict=False):
        _theory_curves(axes, theory, layer)
    if not layers:
        grid[0, 0].text(0.5, 0.5, "r = 0: exactly block-diagonal", ha="center", transform=grid[0, 0].transAxes)
    return picture(folder, "theory", fig, "Predicted off-diagonal ratios against the number of classes")


def _theory_curves(axes: Axes, theory: xr.Dataset, layer: str) -> None:
    C = theory["classes"].to_numpy().astype(float)
    power, index = POWERS[layer], 0
    drawn: set[str] = set()
    for row in _curves(theory):
        at, label = theory.sel(**row), _label(theory, row, layer)
        ratio, stderr = at[f"{layer}_ratio"].to_numpy(), at[f"{layer}_stderr"].to_numpy()
        if not (ratio > 0).any() or label in drawn:
            continue
        drawn.add(label)
        colour = SERIES_COLOURS[index % len(SERIES_COLOURS)]
        axes.errorbar(
            C, ratio, yerr=2 * stderr, color=colour, marker="o", ms=4, lw=1.4, label=_label(theory, row, layer)
        )
        limit = float(at[f"limit_{layer}"][0]) / C**power
        axes.plot(C, limit, color=colour, linestyle=":", linewidth=1)
        index += 1
    ratios = theory[f"{layer}_ratio"].to_numpy()
    figures.log_values(axes, ratios[ratios > 0])
    figures.class_axis(axes, theory["classes"].to_numpy().tolist())
    axes.set_ylabel("off-diagonal ratio r")
    axes.set_title(f"{layer} layer; dotted: limit / {'C²' if power == 2 else 'C'}")
    axes.legend(fontsize=9)


def _curves(theory: xr.Dataset) -> list[dict[str, Any]]:
    names = ("loss", "gamma", "width")
    found: list[dict[str, Any]] = [{}]
    for name in names:
        found = [{**row, name: value} for row in found for value in theory[name].to_numpy()]
    return found


def _label(theory: xr.Dataset, row: Mapping[str, Any], layer: str) -> str:
    """Names what a curve depends on: with one hidden layer, the output layer does not depend on gamma."""
    parts = [LOSS_NAMES[str(row["loss"])]]
    if theory.attrs["model"] == "linear" or layer == "hidden":
        parts.append(f"γ = {row['gamma']:g}")
    if theory.sizes["width"] > 1:
        parts.append(f"m = {row['width']}")
    return ", ".join(parts)


def _laws_figure(folder: Path, theory: xr.Dataset) -> Picture:
    """Densities of a diagonal and an off-diagonal block."""
    fig, grid = figures.panels(theory.sizes["loss"], 2, 10.6, 3.1 * theory.sizes["loss"])
    layer = "linear model" if theory.attrs["model"] == "linear" else "hidden layer"
    for row, loss in enumerate(theory["loss"].to_numpy()):
        for column, block in enumerate(theory["block"].to_numpy()):
            at = theory.isel(loss=row, block=column)
            title = f"{layer}, {LOSS_NAMES[str(loss)]}: {block} block"
            law = (at["grid"].to_numpy(), at["density"].to_numpy(), float(at["atom_at_zero"]))
            figures.spectrum_on_law(grid[row, column], None, *law, title, HISTOGRAM_BINS)
        grid[row, 0].set_ylabel("density")
    return picture(folder, "laws", fig, "Densities of the limit laws of a diagonal and an off-diagonal block")
