"""Which partition to use: the one whose blocks tell most about where a matrix's energy is, if any tells anything."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hesscope.core.errors import InputError
from hesscope.estimate.diagonality import Diagonality, Figure, PartitionComparison, jackknife_stderr, relative_bits

# Agreement beyond chance from which a partition counts as structure, and standard errors by which it must exceed it.
STRUCTURE, STANDARD_ERRORS = 0.1, 2.0
# A tensor with less than this share of the energy is left whole: nothing is known about it but noise.
LEAST_SHARE = 1e-3


@dataclass(frozen=True)
class Verdict:
    """The advised partition.

    Attributes:
        name: of the partition; None if none is more block-diagonal than chance: then the matrix is not to be split.
        runner_up: the next best, None if there is no other.
        sureness: probability, if errors are normal, that the advised one is better than the runner-up (that it has
            structure at all, if there is none); 1 where exact.
        reason: one line.
    """

    name: str | None
    runner_up: str | None
    sureness: float
    reason: str


@dataclass(frozen=True)
class TensorChoice:
    """How one tensor is cut: the scheme's name ("tensor": left whole), and within the tensor its energy kept, what
    chance would keep, and bits (see Diagonality); share: of the energy of all tensors' own blocks.
    """

    scheme: str
    energy: Figure
    chance: float
    bits: Figure
    share: float


def choose_partition(comparison: PartitionComparison) -> Verdict:
    """The partition with the most bits among those with structure; see Diagonality for both."""
    rows = {name: row for name, row in comparison.rows.items() if row.blocks > 1}
    if not rows:
        raise InputError("there is no partition of more than one block to choose from")
    if not any(np.isfinite(row.energy.value) for row in rows.values()):
        return Verdict(None, None, 1.0, "the matrix is zero")
    structured = [name for name, row in rows.items() if _exceeds(row)]
    if not structured:
        best = max(rows, key=lambda name: _number(rows[name].beyond_chance.value))
        found = rows[best].beyond_chance
        doubt = _normal((STRUCTURE - found.value) / found.stderr) if found.stderr > 0 else 1.0
        return Verdict(
            None,
            best,
            doubt,
            f"no partition keeps more than chance would, by {STRUCTURE:.0%} of the rest and beyond doubt: the best of "
            f"them, {best}, keeps {rows[best].energy.value:.1%} of the energy, where chance keeps "
            f"{rows[best].chance.value:.1%}",
        )
    order = sorted(structured, key=lambda name: -rows[name].bits.value)
    best, second = order[0], order[1] if len(order) > 1 else None
    row = rows[best]
    reason = (
        f"{best} keeps {row.energy.value:.1%} of the energy in {row.share_of_entries:.2g} of the entries "
        f"({row.bits.value:.2f} bits)"
    )
    if second is None:
        return Verdict(best, None, _sure_of_structure(row), f"{reason}; no other exceeds chance")
    other = rows[second]
    gap = row.bits.value - other.bits.value
    error = _gap_stderr(row, other)
    reason += (
        f"; next is {second} with {other.energy.value:.1%} in {other.share_of_entries:.2g} ({other.bits.value:.2f})"
    )
    return Verdict(best, second, _normal(gap / error) if error > 0 else 1.0, reason)


def choose_by_tensor(comparison: PartitionComparison, whole: str, schemes: tuple[str, ...]) -> dict[str, TensorChoice]:
    """For every tensor the scheme with the most bits within it, or the whole tensor.

    Args:
        whole: name of the partition by tensor; schemes: of those that cut tensors; others of the comparison are left
            out, and a scheme that leaves a tensor whole is the same as `whole` there.

    Raises:
        InputError: an unknown name, or a comparison without tensors.
    """
    for name in (whole, *schemes):
        if name not in comparison.rows:
            raise InputError(f"the comparison has no partition {name!r}, but {', '.join(map(repr, comparison.rows))}")
    if not comparison.tensors:
        raise InputError("the comparison was made without tensors=")
    blocks = comparison.rows[whole]
    total = float(np.nansum(blocks.tensor_energy))
    choices = {}
    for number, tensor in enumerate(comparison.tensors):
        share = float(blocks.tensor_energy[number]) / total if total > 0 else 0.0
        best = TensorChoice(whole, Figure(1.0), 1.0, Figure(0.0), share)
        if share >= LEAST_SHARE:
            for name in schemes:
                found = _within(comparison.rows[name], blocks, name, number, share)
                if found is not None and found.bits.value > best.bits.value:
                    best = found
        choices[tensor] = best
    return choices


def _within(row: Diagonality, whole: Diagonality, name: str, number: int, share: float) -> TensorChoice | None:
    """A scheme within one tensor, None if it has no structure there or does not cut it."""
    kept, energy = float(row.tensor_energy[number]), float(whole.tensor_energy[number])
    chance, entries = float(row.tensor_chance[number]), float(row.tensor_entries[number])
    if not (np.isfinite(kept) and energy > 0) or entries >= 1:
        return None
    D = kept / energy
    if len(row.replicates[1]):
        without = row.replicates[1][:, number] / whole.replicates[1][:, number]
        error = float(jackknife_stderr(without))
        bits_error = float(jackknife_stderr(np.array([relative_bits(each, entries) for each in without])))
        degrees = len(without) - 1
    else:
        error, bits_error, degrees = 0.0, 0.0, 0
    if D - STANDARD_ERRORS * error < chance + STRUCTURE * (1 - chance):
        return None
    bits = relative_bits(D, entries)
    return TensorChoice(name, Figure(D, error, degrees), chance, Figure(bits, bits_error, degrees), share)


def _exceeds(row: Diagonality) -> bool:
    """Whether the partition has structure, but for two standard errors."""
    found = row.beyond_chance
    return bool(found.value - STANDARD_ERRORS * found.stderr >= STRUCTURE)


def _sure_of_structure(row: Diagonality) -> float:
    found = row.beyond_chance
    return _normal((found.value - STRUCTURE) / found.stderr) if found.stderr > 0 else 1.0


def _gap_stderr(row: Diagonality, other: Diagonality) -> float:
    """Standard error of the difference of bits: the same vectors were used for both, so it is less than the sum."""
    if not len(row.replicates[0]):
        return 0.0
    return float(jackknife_stderr(row.replicates[0] - other.replicates[0]))


def _normal(z: float) -> float:
    from scipy.special import ndtr

    return float(ndtr(z))


def _number(value: float) -> float:
    return value if np.isfinite(value) else -np.inf
