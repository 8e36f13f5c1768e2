"""One look for all figures, and number formats for people."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

# Colour-blind safe (Okabe and Ito); H, G and R keep their colours in every figure.
COLOURS = {"H": "#222222", "G": "#0072B2", "R": "#D55E00"}
LOSS_COLOURS = {"cross_entropy": "#0072B2", "mse": "#D55E00"}
SERIES_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
PART_NAMES = {"H": "Hessian H", "G": "Gauss-Newton part G", "R": "residual part R = H − G"}
LOSS_NAMES = {"cross_entropy": "cross-entropy", "mse": "squared error"}
TIME_NAMES = {"initial": "initialization", "half": "half-way", "final": "end of training"}
MAP = "magma"


@contextmanager
def styled() -> Iterator[None]:
    """Matplotlib settings for the body: sans-serif, light grid lines, no frame on top and right."""
    settings: Any = {
        "font.family": "DejaVu Sans",
        "font.size": 10,
        "axes.titlesize": 10.5,
        "axes.labelsize": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": False,
        "legend.frameon": False,
        "figure.facecolor": "white",
        "pdf.fonttype": 42,
        "savefig.facecolor": "white",
    }
    with mpl.rc_context(settings):
        yield


def figure(width: float, height: float) -> Figure:
    """A figure of this size in inches, laid out so that labels do not overlap; no global state."""
    return Figure(figsize=(width, height), layout="constrained")


def number(value: float, digits: int = 3) -> str:
    """A number with `digits` significant digits: 0.0341, 12.3, 1,230, 3.4e-07."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    exponent = math.floor(math.log10(abs(value)))
    if -4 <= exponent < 7:
        return f"{value:,.{max(digits - 1 - exponent, 0)}f}"
    return f"{value:.{digits - 1}e}"


def percent(share: float) -> str:
    """A share as a percentage with one decimal, more where that would round to 0 or 100."""
    if not math.isfinite(share):
        return "—"
    text = f"{100 * share:.1f}"
    if text == "0.0" and share != 0:
        return f"{100 * share:.1g}\N{NO-BREAK SPACE}%"
    if text == "100.0" and share != 1:
        return f"{100 * share:.4f}\N{NO-BREAK SPACE}%"
    return f"{text}\N{NO-BREAK SPACE}%"


def one_part_in(ratio: float) -> str:
    """An off-diagonal ratio r in words: '1 part in 65' (1/r), 'exact' for 0, '2.2 times the diagonal' from 1 on."""
    if ratio == 0:
        return "exact"
    if ratio >= 1:
        return f"{number(ratio, 2)} times the diagonal"
    digits = 2 if ratio > 0.01 else 3
    parts = float(f"{1 / ratio:.{digits - 1}e}")
    return f"1 part in {parts:,.0f}" if 1000 <= parts < 1e12 else f"1 part in {number(parts, digits)}"
