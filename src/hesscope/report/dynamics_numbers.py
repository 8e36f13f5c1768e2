"""Numbers of a training run that its page tells of and draws: of single snapshots, and of pairs of layers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations_with_replacement
from typing import TypeVar

import numpy as np

from hesscope.dynamics.snapshot import Snapshot, pair_energy
from hesscope.dynamics.trajectory import Trajectory
from hesscope.estimate.density import SpectralDensity
from hesscope.estimate.energies import BlockEnergies
from hesscope.estimate.estimate import Estimate
from hesscope.report import figures

T = TypeVar("T")
Pair = tuple[str, str]

# Pairs of layers, and layers, with lines of their own; spectra.
PAIRS_DRAWN, SPECTRA_DRAWN = 7, 9
# Shares below this are rounding.
ROUNDING = 1e-12
# The axis of spectra is linear within so many widths of what the quadrature resolves, or below this share of the
# largest eigenvalue.
LINEAR_WIDTHS, LINEAR_SHARE = 4, 1e-5


def with_energies(trajectory: Trajectory) -> list[Snapshot]:
    """Snapshots that have energies of blocks."""
    return [s for s in trajectory.snapshots if s.energies is not None]


def is_layered(measured: Sequence[Snapshot]) -> bool:
    """Whether there are energies of several layers."""
    return bool(measured) and len(set(measured[0].layers)) > 1


def is_measured(snapshot: Snapshot) -> bool:
    """Whether anything was measured of H."""
    records = (snapshot.energies, snapshot.eigenvalues, snapshot.trace, snapshot.density, snapshot.heterogeneity)
    return any(each is not None for each in (*records, snapshot.heatmap))


def matrix_of(snapshot: Snapshot) -> str:
    """H, or G where there is nothing else."""
    return "H" if "H" in snapshot.parts else snapshot.parts[0]


def main_energies(snapshot: Snapshot) -> BlockEnergies:
    """Energies of that matrix."""
    return snapshot.block_energies(matrix_of(snapshot))


def total_energy(measured: Sequence[Snapshot]) -> float:
    """Energy of all steps."""
    return sum(main_energies(s).total for s in measured)


def cross_share(snapshot: Snapshot) -> float:
    """Share of its energy between layers; nan if not known."""
    return snapshot.cross_layer_share(matrix_of(snapshot)) if snapshot.parts else float("nan")


def diagonality(snapshot: Snapshot) -> float:
    """Share of its energy in diagonal blocks; nan if not known."""
    return main_energies(snapshot).diagonality if snapshot.parts else float("nan")


def outside_share(snapshot: Snapshot) -> float:
    """Share of its energy outside of the diagonal blocks; nan if not known."""
    return 1 - diagonality(snapshot)


def ratio_of(snapshot: Snapshot, layer: str) -> float:
    """The off-diagonal ratio r of a layer; nan if not known."""
    return snapshot.off_diagonal_ratio(layer, matrix_of(snapshot)) if snapshot.parts else float("nan")


def residual_share(snapshot: Snapshot) -> float:
    """||R||^2 / (||G||^2 + ||R||^2) of all that lies between layers; nan if there is nothing, or it is not known."""
    if not {"G", "R"} <= set(snapshot.parts):
        return float("nan")
    G, R = (float(np.triu(snapshot.layer_energies(part).values, k=1).sum()) for part in ("G", "R"))
    return R / (G + R) if G + R > 0 else float("nan")


def times_rate(snapshot: Snapshot) -> float:
    """Sharpness in units of 1 / learning rate; nan if not known."""
    return snapshot.sharpness_times_learning_rate


def trace_of(snapshot: Snapshot) -> float:
    """Trace of H; nan if not known."""
    return value_of(snapshot.trace)


def value_of(estimate: Estimate | None) -> float:
    """Its value; nan where nothing was estimated."""
    return float("nan") if estimate is None else float(estimate.value)


def limit_times_rate(trajectory: Trajectory) -> float:
    """Stability limit in units of 1 / learning rate: 2 for plain gradient descent; nan if unknown or not constant."""
    products = trajectory.collect(lambda s: s.stability_limit * s.learning_rate)
    known = products[np.isfinite(products)]
    return float(known[-1]) if len(known) and np.ptp(known) <= 1e-6 * abs(known[-1]) else float("nan")


def evenly(items: Sequence[T], count: int) -> list[T]:
    """At most `count` of the items, evenly chosen, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    return [items[index] for index in np.unique(np.rint(np.linspace(0, len(items) - 1, count)).astype(int))]


def shown_parts(measured: Sequence[Snapshot]) -> tuple[str, ...]:
    """G and R apart, or the one matrix that there is."""
    return tuple(part for part in measured[0].parts if part != "H") or measured[0].parts


def drawn_pairs(measured: Sequence[Snapshot]) -> tuple[list[Pair], list[tuple[str, Pair]], int]:
    """Pairs of layers of the largest energy, zero lines (matrix, pair) of them, and how many pairs are not drawn."""
    layers = list(dict.fromkeys(measured[0].layers))
    pairs = list(combinations_with_replacement(layers, 2))
    peaks = dict.fromkeys(pairs, 0.0)
    zeros: list[tuple[str, Pair]] = []
    for part in shown_parts(measured):
        energies = [s.layer_energies(part) for s in measured]
        own = {pair: max(pair_energy(each, *pair) for each in energies) for pair in pairs}
        largest = max(own.values())
        for pair, peak in own.items():
            peaks[pair] = max(peaks[pair], peak)
            if not peak > figures.ROUNDING * largest:
                zeros.append((part, pair))
    drawn = sorted(pairs, key=lambda pair: -peaks[pair])[:PAIRS_DRAWN]
    drawn.sort(key=pairs.index)
    return drawn, [each for each in zeros if each[1] in drawn], len(pairs) - len(drawn)


def residual_shares(measured: Sequence[Snapshot]) -> tuple[dict[Pair, list[float]], list[Pair]]:
    """Residual shares of the drawn pairs of layers, step by step, and the pairs whose are zero throughout.

    Pairs without any energy have neither.
    """
    if not {"G", "R"} <= set(measured[0].parts):
        return {}, []
    shares = {pair: [s.residual_share(*pair) for s in measured] for pair in drawn_pairs(measured)[0]}
    known = {pair: values for pair, values in shares.items() if np.isfinite(values).any()}
    zero = [pair for pair, values in known.items() if np.nanmax(np.abs(values)) <= ROUNDING]
    return {pair: v for pair, v in known.items() if pair not in zero}, zero


def linear_within(densities: Sequence[SpectralDensity]) -> float:
    """Where the common axis of spectra becomes linear: a power of ten."""
    peak = max(abs(end) for density in densities for end in density.eigenvalue_range) or 1.0
    widths = [density.default_bandwidth for density in densities]
    finest = LINEAR_WIDTHS * float(np.median(widths))
    return float(10.0 ** np.floor(np.log10(max(finest, LINEAR_SHARE * peak))))


def is_heterogeneous(trajectory: Trajectory) -> bool:
    """Whether the heterogeneity of blocks is known at any step."""
    return bool(np.isfinite(trajectory.collect(lambda s: value_of(s.heterogeneity))).any())
