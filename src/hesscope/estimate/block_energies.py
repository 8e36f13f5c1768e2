"""Block energies ||H_ij||_F^2 of any matrix and any partition, exactly or from random probes (MATH.md, section 3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hesscope.core.checks import require_choice, require_positive_int
from hesscope.core.errors import InputError
from hesscope.core.memory import require_memory
from hesscope.core.records import Provenance
from hesscope.core.rng import rademacher, stream
from hesscope.estimate.energies import BlockEnergies
from hesscope.operators import Operator, as_operator
from hesscope.partition.partition import Partition

METHODS = ("auto", "exact", "probes")
DEFAULT_PROBES = 32

# Up to this many parameters "auto" does not bother to estimate: the exact answer takes seconds.
EXACT_SIZE = 2048

Array = npt.NDArray[np.float64]
Progress = Callable[[int, int], None]


def block_energies(
    matrix: Any,
    partition: Partition,
    method: str = "auto",
    probes: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> BlockEnergies:
    """Squared Frobenius norms of all B x B blocks.

    Args:
        matrix: an operator or dense matrix [P, P] (see as_operator).
        partition: B blocks of the P parameters.
        method: "exact" takes P products and no more memory than a few columns; "probes" takes B products a probe and
            gives standard errors; "auto" takes whichever needs fewer products (see choose_method).
        probes: number of independent probes, 32 unless told; each sees every block once.
        seed: root of the random streams; equal seeds give equal numbers.
        progress: called with (products done, products in all).

    Raises:
        InputError: an unknown method, fewer than 2 probes, probes given to "exact".
        PartitionError: the partition does not fit the matrix.
        TooLargeError: the samples of all block pairs would not fit in memory.
    """
    operator = as_operator(matrix)
    partition.require_fits(operator.shape[0])
    method, count = choose_method(operator.shape[0], len(partition), method, probes)
    provenance = energies_provenance(operator, method, seed)
    if method == "exact":
        total = np.zeros((len(partition), len(partition)))
        for chunk in operator.column_chunks():
            total += column_energies(operator, partition, chunk)
            if progress is not None:
                progress(chunk.stop, operator.shape[1])
        return BlockEnergies.exact(partition.labels, partition.sizes, total, provenance)
    samples = probe_samples(operator, partition, seed, range(count), progress)
    return BlockEnergies.from_samples(partition.labels, partition.sizes, samples, provenance)


def choose_method(parameters: int, blocks: int, method: str, probes: int | None) -> tuple[str, int]:
    """Settle "auto" and the number of probes (0 for "exact"); raises InputError for values that do not fit."""
    require_choice("method", method, METHODS)
    if probes is not None:
        require_positive_int("probes", probes)
        if probes < 2:
            raise InputError("probes must be at least 2, so that there is a standard error")
        if method == "exact":
            raise InputError("method 'exact' takes no probes; leave probes out or use method='probes'")
    count = DEFAULT_PROBES if probes is None else probes
    if method == "auto":
        method = "exact" if parameters <= max(EXACT_SIZE, blocks * count) else "probes"
    return method, 0 if method == "exact" else count


def energies_provenance(operator: Operator, method: str, seed: int) -> Provenance:
    """Where block energies made by `method` come from."""
    return Provenance(
        engine=f"block energies: {method}; {operator.engine}",
        dtype=str(operator.dtype).removeprefix("torch."),
        device=str(operator.device),
        data_fingerprint=operator.data_fingerprint,
        seed=None if method == "exact" else seed,
    )


def column_energies(operator: Operator, partition: Partition, chunk: slice) -> Array:
    """Contribution [B, B] of the columns `chunk` to all energies; summed over all columns it is exact."""
    assignment = _assignment(partition, operator.device)
    energies = _row_sums(operator.columns(chunk), assignment, len(partition))
    total = torch.zeros(len(partition), len(partition), dtype=torch.float64, device=operator.device)
    total.index_add_(1, assignment[chunk], energies)
    return total.cpu().numpy()


def probe_samples(
    operator: Operator, partition: Partition, seed: int, probes: range, progress: Progress | None = None
) -> Array:
    """Samples [len(probes), B, B], each unbiased for all energies at once.

    With v random signs on block j and zero elsewhere, E||P_i H v||^2 = ||H_ij||_F^2. Probe k draws its signs from the
    stream (seed, "block_energies", k), so that a run can be cut anywhere. For a symmetric operator the samples of
    (i, j) and (j, i) are averaged: same mean, less variance.
    """
    blocks, size = len(partition), operator.shape[0]
    needed = 2 * len(probes) * blocks * blocks * 8
    require_memory(needed, "cpu", f"{len(probes)} samples of {blocks} x {blocks} blocks", "a coarser partition")
    samples = np.empty((len(probes), blocks, blocks))
    assignment = _assignment(partition, operator.device)
    members = [torch.from_numpy(partition.indices(label)).to(operator.device) for label in partition.labels]
    pairs = [(row, block) for row in range(len(probes)) for block in range(blocks)]
    step = operator.columns_per_pass
    signs: dict[int, Tensor] = {}
    for start in range(0, len(pairs), step):
        chunk = pairs[start : start + step]
        V = torch.zeros(size, len(chunk), dtype=operator.dtype, device=operator.device)
        for column, (row, block) in enumerate(chunk):
            if row not in signs:
                generator = stream(seed, "block_energies", probes[row])
                signs = {row: rademacher(size, generator).to(operator.device, operator.dtype)}
            V[members[block], column] = signs[row][members[block]]
        energies = _row_sums(operator @ V, assignment, blocks).cpu().numpy()
        for column, (row, block) in enumerate(chunk):
            samples[row, :, block] = energies[:, column]
        if progress is not None:
            progress(start + len(chunk), len(pairs))
    return (samples + samples.transpose(0, 2, 1)) / 2 if operator.symmetric else samples


def _assignment(partition: Partition, device: torch.device) -> Tensor:
    return torch.from_numpy(partition.assignment.astype(np.int64)).to(device)


def _row_sums(columns: Tensor, assignment: Tensor, blocks: int) -> Tensor:
    """Sums of squares [B, K] of the columns [P, K] over each block of rows, in float64."""
    sums = torch.zeros(blocks, columns.shape[1], dtype=torch.float64, device=columns.device)
    return sums.index_add_(0, assignment, columns.double().square())
