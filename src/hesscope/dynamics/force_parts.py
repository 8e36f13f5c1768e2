"""What of a matrix's final block structure was there at the start, from its block energies at both ends of training."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hesscope.estimate.energies import BlockEnergies

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ForceParts:
    """Static and dynamic part of the share D of the energy that diagonal blocks keep.

    Attributes:
        initial, final: D at both ends; initial_stderr, final_stderr: their standard errors, 0 where exact.
        chance: what the blocks would keep at the end of a matrix without block structure, whose energy is spread over
            rows and columns as H's is: sum_i r_i^2 / (sum_i r_i)^2, r_i the energy in the rows of block i. As in
            hesscope.compare_partitions.
        static: (initial - chance) / (final - chance), the dynamic part being 1 - static; nan if `final` is not above
            `chance`. static_stderr: its standard error (delta method), which the dynamic part shares.
        similarity: cosine of the angle between the energies [B, B] at both ends; chance_similarity: between the
            matrices r r^T of the rows' energies alone, that is (r . r')^2 / (|r| |r'|)^2.
    """

    initial: float
    initial_stderr: float
    final: float
    final_stderr: float
    chance: float
    static: float
    static_stderr: float
    similarity: float
    chance_similarity: float


def force_parts(first: BlockEnergies, last: BlockEnergies) -> ForceParts:
    """Compare the energies of one partition's blocks at both ends of training.

    Energies that were sampled at both ends are taken as independent.
    """
    initial, final, chance = first.diagonality, last.diagonality, _chance(last)
    excess = final - chance
    static = (initial - chance) / excess if excess > 0 else float("nan")
    return ForceParts(
        initial=initial,
        initial_stderr=first.diagonality_stderr,
        final=final,
        final_stderr=last.diagonality_stderr,
        chance=chance,
        static=static,
        static_stderr=_static_stderr(first, last, static, chance),
        similarity=_cosine(first.values, last.values),
        chance_similarity=_cosine(first.values.sum(axis=1), last.values.sum(axis=1)) ** 2,
    )


def _chance(energies: BlockEnergies) -> float:
    """Sum of squared shares of the rows; of samples, from products of different ones, since a square has its noise."""
    rows = energies.values.sum(axis=1)
    squares, square = float((rows**2).sum()), float(rows.sum() ** 2)
    if energies.samples is not None:
        each = energies.samples.sum(axis=2)
        count = len(each)
        squares = (count * squares - float((each**2).sum()) / count) / (count - 1)
        square = (count * square - float((each.sum(axis=1) ** 2).sum()) / count) / (count - 1)
    return squares / square if square > 0 else float("nan")


def _static_stderr(first: BlockEnergies, last: BlockEnergies, static: float, chance: float) -> float:
    """Delta method: the static part as a sum of small changes of the energies at both ends."""
    if not np.isfinite(static):
        return float("nan")
    excess, total = last.diagonality - chance, last.total
    kept = (np.eye(len(last.labels)) - last.diagonality) / total
    by_chance = 2 * (last.values.sum(axis=1, keepdims=True) / total - chance) / total
    coefficients = (-static * kept + (static - 1) * by_chance) / excess
    return float(np.hypot(first.diagonality_stderr / excess, _stderr_of_sum(last, coefficients)))


def _stderr_of_sum(energies: BlockEnergies, coefficients: Array) -> float:
    """Standard error of sum_ij coefficients_ij E_ij; 0 if exact."""
    if energies.samples is not None:
        sums = np.einsum("kij,ij->k", energies.samples, np.broadcast_to(coefficients, energies.values.shape))
        return float(sums.std(ddof=1) / np.sqrt(len(sums)))
    if energies.columns is not None:
        return float(np.sqrt(energies.columns.spread_of_sum(coefficients).variance))
    return 0.0


def _cosine(a: Array, b: Array) -> float:
    """Of the angle between two arrays of one shape; nan if one is zero."""
    lengths = float(np.linalg.norm(a)), float(np.linalg.norm(b))
    if not min(lengths) > 0:
        return float("nan")
    return float(((a / lengths[0]) * (b / lengths[1])).sum())
