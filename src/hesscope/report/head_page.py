"""The page of `hesscope head`: the output layer of one language model on one text."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from matplotlib.font_manager import findfont
from matplotlib.ft2font import FT2Font

from hesscope.report import figures
from hesscope.report.page import Picture, picture, write_page
from hesscope.report.style import COLOURS, number, one_part_in, percent, styled

if TYPE_CHECKING:
    import xarray as xr

# Names on the ticks of the block map are legible for this many tokens.
TOKENS_LABELLED = 40
# Tokens named in the command's summary.
TOKENS_NAMED = 5

Array = npt.NDArray[Any]


def write_head_page(folder: Path, result: xr.Dataset, command: str) -> Path:
    """Write folder/report.html and the figures from the result of `hesscope head`."""
    with styled():
        pictures = {"energies": _rank_figure(folder, result), "blocks": _block_figure(folder, result)}
    context = {
        "headline": _headline(result.attrs),
        "cards": _cards(result),
        "ratios": _ratio_rows(result.attrs),
        "tokens": _token_rows(result),
        "pictures": pictures,
        "half": _tokens_for(result, 0.5),
        "entropy": _mean(result, "entropy"),
        "perplexity": float(np.exp(_mean(result, "loss"))),
        "gamma": result.attrs["inputs"] / result.attrs["samples"],
        "attributes": result.attrs,
        "command": command,
    }
    return write_page(folder / "report.html", "head.html", context)


def head_summary(result: xr.Dataset) -> list[tuple[str, str]]:
    """The result in (what, how much) lines for a terminal."""
    attributes = result.attrs
    entropy, classes = _mean(result, "entropy"), int(attributes["classes"])
    named = "  ".join(str(text) for text in result["top_text"].to_numpy()[:TOKENS_NAMED])
    ratio, random = float(attributes["ratio"]), float(attributes["random_ratio"])
    return [
        ("ratio", f"r = {_in_words(ratio)}; C² r = {number(classes**2 * ratio)}"),
        (
            "random head",
            f"r = {_in_words(random)}; C² r = {number(classes**2 * random)} (random weights, white features)",
        ),
        ("diagonal", f"{percent(attributes['diagonality'])} of the energy in {classes:,} of {classes**2:,} blocks"),
        ("entropy", f"{number(entropy)} nats on average, as if spread evenly over {number(np.exp(entropy), 2)} tokens"),
        ("perplexity", number(float(np.exp(_mean(result, "loss"))))),
        ("top tokens", f"{named}  (half of the diagonal energy lies in {_tokens_for(result, 0.5):,})"),
    ]


def _in_words(ratio: float) -> str:
    return f"{number(ratio)}, {one_part_in(ratio)}" if np.isfinite(ratio) else "not defined"


def _headline(attributes: Any) -> str:
    classes = int(attributes["classes"])
    if attributes["diagonal"] == 0:
        return "The output layer’s Hessian is zero: every prediction is certain to the last digit."
    ratio, random = float(attributes["ratio"]), float(attributes["random_ratio"])
    factor = ratio / random
    beside = f"{number(factor, 2)} times that of" if factor >= 1 else f"{number(1 / factor, 2)} times less than"
    return (
        f"Cut by token, the output layer’s Hessian keeps {percent(attributes['diagonality'])} of its energy in "
        f"{classes:,} of its {classes**2:,} blocks: r is {one_part_in(ratio)}, {beside} a random head."
    )


def _cards(result: xr.Dataset) -> list[dict[str, str]]:
    attributes = result.attrs
    classes, entropy = int(attributes["classes"]), _mean(result, "entropy")
    ratio = float(attributes["ratio"])
    half = _tokens_for(result, 0.5)
    return [
        {
            "title": "off-diagonal ratio r",
            "value": one_part_in(ratio) if np.isfinite(ratio) else "—",
            "what": f"mean energy of the blocks of two tokens over that of the blocks of one, {number(ratio)}",
        },
        {
            "title": "diagonal energy",
            "value": f"{half:,} token{'' if half == 1 else 's'}",
            "what": f"hold half of it; the vocabulary has {classes:,}",
        },
        {
            "title": "predictions",
            "value": f"{number(entropy)} nats",
            "what": f"mean entropy, as if spread evenly over {number(np.exp(entropy), 2)} tokens; "
            f"evenly over all would be {number(np.log(classes))}",
        },
    ]


def _ratio_rows(attributes: Any) -> list[dict[str, Any]]:
    classes = int(attributes["classes"])
    heads = {
        f"this head ({attributes['model_class']})": float(attributes["ratio"]),
        "a random linear head with white features, for comparison": float(attributes["random_ratio"]),
    }
    return [{"head": head, "ratio": ratio, "scaled": classes**2 * ratio} for head, ratio in heads.items()]


def _token_rows(result: xr.Dataset) -> list[dict[str, Any]]:
    energy, whole = result["class_energy"].to_numpy(), float(result.attrs["diagonal"])
    probability, count = result["mean_probability"].to_numpy(), result["next_count"].to_numpy()
    return [
        {
            "text": str(text),
            "token": int(token),
            "energy": float(energy[token]),
            "share": float(energy[token] / whole) if whole > 0 else float("nan"),
            "probability": float(probability[token]),
            "count": int(count[token]),
        }
        for text, token in zip(result["top_text"].to_numpy(), result["top_token"].to_numpy(), strict=True)
    ]


def _tokens_for(result: xr.Dataset, share: float) -> int:
    """The smallest number of tokens that hold this share of the diagonal energy."""
    energy = np.sort(result["class_energy"].to_numpy())[::-1]
    return int(np.searchsorted(np.cumsum(energy), share * energy.sum())) + 1


def _rank_figure(folder: Path, result: xr.Dataset) -> Picture:
    """Diagonal energies of all tokens, largest first, on log-log axes."""
    energy = np.sort(result["class_energy"].to_numpy())[::-1]
    shown = energy[energy > 0]
    fig, grid = figures.panels(1, 1, 8.0, 3.9)
    axes = grid[0, 0]
    axes.plot(np.arange(1, len(shown) + 1), shown, color=COLOURS["G"], linewidth=1.5)
    axes.set_xscale("log")
    figures.log_values(axes, shown)
    half = _tokens_for(result, 0.5)
    axes.axvline(half, color="#888888", linewidth=0.8)
    right = half**2 < len(shown)  # more room on this side of the line, on a logarithmic axis
    axes.annotate(
        "half of the diagonal energy lies up to this line",
        (half, 0.06),
        (5 if right else -5, 0),
        ("data", "axes fraction"),
        "offset points",
        ha="left" if right else "right",
        fontsize=9,
    )
    axes.set_xlabel("rank of the token")
    axes.set_ylabel("diagonal energy ‖H_ii‖²")
    axes.xaxis.minorticks_off()
    return picture(folder, "token-energies", fig, "Diagonal energies of all tokens, sorted")


def _block_figure(folder: Path, result: xr.Dataset) -> Picture:
    """Energies of all pairs among the top tokens, with their texts as labels."""
    texts = [_drawable(str(text)) for text in result["top_text"].to_numpy()]
    names = texts if len(texts) <= TOKENS_LABELLED else []
    side = 3.6 + 0.17 * min(len(texts), TOKENS_LABELLED)
    fig, grid = figures.panels(1, 1, side + 1.2, side)
    axes = grid[0, 0]
    image = figures.energy_map(axes, result["block_energy"].to_numpy(), "", "" if names else "rank of the token", names)
    figures.colour_bar(fig, image, axes, "block energy / largest block energy")
    return picture(folder, "token-blocks", fig, "Energy of every pair of blocks among the top tokens")


def _mean(result: xr.Dataset, name: str) -> float:
    return float(result[name].mean())


def _drawable(text: str) -> str:
    """The text with characters that the figures' font lacks as escapes."""
    known = _font_characters()
    return "".join(
        character if ord(character) in known else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


@cache
def _font_characters() -> frozenset[int]:
    return frozenset(FT2Font(findfont("DejaVu Sans")).get_charmap())
