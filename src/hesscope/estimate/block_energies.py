"""Block energies ||H_ij||_F^2 of any matrix and any partition, exactly or from random probes (MATH.md, section 3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hesscope.core.checks import require_choice, require_positive_int
from hesscope.core.errors import DataError, InputError, TooLargeError
from hesscope.core.memory import available_bytes, require_memory
from hesscope.core.records import Provenance
from hesscope.core.rng import rademacher, stream
from hesscope.estimate.block_probes import Reached, columns_to_tolerance, default_max_products, least_budget
from hesscope.estimate.dual import dual_energies
from hesscope.estimate.energies import BlockEnergies
from hesscope.estimate.products import CountedProducts
from hesscope.estimate.stopping import require_rtol
from hesscope.operators import Operator, as_operator
from hesscope.operators.operator import STRIP_MEMORY, MatrixStrip
from hesscope.partition.partition import Partition

METHODS = ("auto", "exact", "closed_form", "probes")
# Of the Gauss-Newton matrix and the empirical Fisher matrix alone.
DUAL = "dual"
DEFAULT_PROBES = 32

# Up to this many parameters "auto" does not bother to estimate: the exact answer takes seconds.
EXACT_SIZE = 2048

# The closed form takes P^2 N / 2 multiply-adds, a product with one vector about 7 P N (a gradient takes 3 P N, a
# product 2.1 to 2.4 gradients): all of the matrix is as much work as P / 14 products. Up to CLOSED_FORM_SIZE it is a
# matter of a minute for some thousand samples.
COLUMNS_PER_PRODUCT = 14
CLOSED_FORM_SIZE = 2**15

# Entries of a strip that are squared at once, in float64, and columns of them: rows are added up whole, so that each
# addition is a long one.
SQUARED_AT_ONCE, WIDTH_AT_ONCE = 2**20, 2**12

Array = npt.NDArray[np.float64]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Method:
    """A settled method, the number of probes (0 unless it is "probes"), and of the products it takes."""

    name: str
    probes: int
    products: int


def block_energies(
    matrix: Any,
    partition: Partition,
    method: str = "auto",
    probes: int | None = None,
    rtol: float = 0.05,
    max_products: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> BlockEnergies:
    """Squared Frobenius norms of all B x B blocks.

    Args:
        matrix: an operator or dense matrix [P, P] (see as_operator).
        partition: B blocks of the P parameters.
        method: "exact" takes P products and no more memory than a few columns; "closed_form" makes the matrix of a
            fully connected network by formula, strip by strip within 1 GiB; "probes" estimates, with standard errors,
            from products with random signs on one block at a time; "auto" takes the closed form where there is one, up
            to 32768 parameters or where it is less work than probes; "exact" up to 2048 parameters or where it needs
            fewer products than probes; else "probes". "dual", for a Gauss-Newton or empirical Fisher matrix, has all
            energies of however many blocks from Gram matrices of its root's rows (see hesscope.estimate.dual).
        probes: number of independent probes of every block, B products each. Unless told, as many as the tolerance
            takes, spent on the blocks that need them, and with directions of large curvature taken exactly (see
            hesscope.estimate.block_probes); "auto" expects 32 of every block. For "dual", the number of rows: unless
            told, those for all loss terms and outputs where they are little work, else 256.
        rtol: tolerated standard error of the diagonality, relative to it; twice that for every diagonal block that
            holds at least 1 % of the energy. All other blocks have what comes with it, and their own standard errors.
        max_products: budget for the tolerance; 32 for every block unless told, and at least 1000. The record's
            `converged` and `message` say whether it sufficed.
        seed: root of the random streams; equal seeds give equal numbers.
        progress: called with (products done, products in all); for the closed form, with rows of the matrix.

    Raises:
        InputError: an unknown method, fewer than 2 probes, probes given to another method or with max_products, a
            tolerance that is not positive, a budget of fewer than 2 products a block, no closed form.
        PartitionError: the partition does not fit the matrix.
        TooLargeError: the samples of all block pairs would not fit in memory, or a row in closed form not in 1 GiB.
        DataError: a product is not finite.
    """
    operator = as_operator(matrix)
    partition.require_fits(operator.shape[0])
    require_choice("method", method, (*METHODS, DUAL))
    require_tolerance(len(partition), probes, rtol, max_products)
    if method == DUAL:
        return dual_energies(operator, partition, probes, seed, progress)
    settled = settle_method(operator, len(partition), method, probes)
    provenance = energies_provenance(operator, settled, seed)
    if settled.name == "closed_form":
        (total,) = energies_of_strips((operator,), partition, progress)
        return BlockEnergies.exact(partition.labels, partition.sizes, total, provenance)
    if settled.name == "exact":
        total = np.zeros((len(partition), len(partition)))
        for chunk in operator.column_chunks():
            total += energies_of_columns(operator.columns(chunk), partition, chunk)
            if progress is not None:
                progress(chunk.stop, operator.shape[1])
        exact = BlockEnergies.exact(partition.labels, partition.sizes, total, provenance)
        return replace(exact, products=operator.shape[1], message="exact")
    named = (partition.labels, partition.sizes)
    budget = default_max_products(len(partition), DEFAULT_PROBES) if max_products is None else max_products
    if probes is None and budget >= least_budget(len(partition)):
        products = CountedProducts(operator, progress)
        columns = columns_to_tolerance(operator, partition, rtol, budget, seed, products)
        energies = replace(BlockEnergies.from_columns(*named, columns, provenance), products=products.done)
        reached = Reached.of(energies)
        message = reached.message(rtol, energies.products, budget)
        return replace(energies, converged=reached.met(rtol), message=message)
    count = budget // len(partition) if probes is None else probes  # too few products for planning, if not told
    (samples,) = probe_samples((operator,), partition, seed, range(count), progress)
    energies = replace(BlockEnergies.from_samples(*named, samples, provenance), products=count * len(partition))
    if probes is not None:
        return energies
    reached = Reached.of(energies)
    return replace(energies, converged=reached.met(rtol), message=reached.message(rtol, energies.products, budget))


def choose_method(parameters: int, blocks: int, method: str, probes: int | None, closed_form: bool = False) -> Method:
    """Settle "auto" and the number of probes; raises InputError for values that do not fit.

    `closed_form`: whether there is one that fits in memory.
    """
    require_choice("method", method, METHODS)
    if probes is not None:
        require_positive_int("probes", probes)
        if probes < 2:
            raise InputError("probes must be at least 2, so that there is a standard error")
        if method in ("exact", "closed_form"):
            raise InputError(f"method {method!r} takes no probes; leave probes out or use method='probes'")
    count = DEFAULT_PROBES if probes is None else probes
    if method == "auto":
        if closed_form and parameters <= max(CLOSED_FORM_SIZE, COLUMNS_PER_PRODUCT * blocks * count):
            method = "closed_form"
        else:
            method = "exact" if parameters <= max(EXACT_SIZE, blocks * count) else "probes"
    if method == "probes":
        return Method("probes", count, blocks * count)
    return Method(method, 0, parameters if method == "exact" else 0)


def settle_method(operator: Operator, blocks: int, method: str, probes: int | None) -> Method:
    """As `choose_method`, for an operator; raises InputError also if a closed form is asked for and there is none."""
    settled = choose_method(operator.shape[0], blocks, method, probes, _closed_form_fits(operator))
    if settled.name == "closed_form" and not operator.has_closed_form:
        raise InputError(
            f"method 'closed_form' needs a fully connected network with a plain loss, got {operator.engine}"
        )
    return settled


def require_tolerance(blocks: int, probes: int | None, rtol: float, max_products: int | None) -> None:
    """Raise InputError unless the tolerance and the budget fit each other and the number of blocks."""
    require_rtol(rtol)
    if max_products is None:
        return
    require_positive_int("max_products", max_products)
    if probes is not None:
        raise InputError("give probes (a fixed number) or max_products (a budget for rtol), not both")
    if max_products < 2 * blocks:
        raise InputError(f"max_products must be at least {2 * blocks} for {blocks} blocks, got {max_products}")


def energies_provenance(operator: Operator, method: Method, seed: int) -> Provenance:
    """Where block energies made by `method` come from."""
    engine = operator.dense_engine if method.name == "closed_form" else operator.engine
    return Provenance(
        engine=f"block energies: {method.name}; {engine}",
        dtype=str(operator.dtype).removeprefix("torch."),
        device=str(operator.device),
        data_fingerprint=operator.data_fingerprint,
        seed=seed if method.name == "probes" else None,
    )


def _closed_form_fits(operator: Operator) -> bool:
    """Whether there is a closed form whose strips take no more than half of the memory that is left."""
    if not operator.has_closed_form:
        return False
    try:
        return operator.strip_bytes() < available_bytes(operator.device) / 2
    except TooLargeError:
        return False


def energies_of_strips(
    operators: tuple[Operator] | tuple[Operator, Operator], partition: Partition, progress: Progress | None
) -> list[Array]:
    """All energies [B, B] of an operator, or of two and their sum, from strips of closed forms, within STRIP_MEMORY."""
    (first, *_), blocks = operators, len(partition)
    totals = [np.zeros((blocks, blocks)) for _ in range(2 * len(operators) - 1)]
    done, assignment = 0, _assignment(partition, first.device)
    share = () if len(operators) == 1 else (STRIP_MEMORY // 2,)
    for strips in zip(*(operator.strips(*share) for operator in operators), strict=True):
        for strip, total in zip(strips, totals, strict=False):
            total += _energies_of_strip(strip, assignment, blocks)
        if len(strips) == 2:
            strips[0].values.add_(strips[1].values)
            totals[2] += _energies_of_strip(strips[0], assignment, blocks)
        done += len(strips[0].rows)
        if progress is not None:
            progress(done, first.shape[0])
    if not all(np.isfinite(total).all() for total in totals):
        raise DataError("the block energies are not finite: the matrix's entries are too large to be squared")
    return totals


def _energies_of_strip(strip: MatrixStrip, assignment: Tensor, blocks: int) -> Array:
    """Contribution [B, B] of a strip and of its mirror image."""
    present, rows = torch.unique(assignment[strip.rows], return_inverse=True)
    columns = assignment[strip.columns]
    own, others = (torch.zeros(len(present), blocks, dtype=torch.float64, device=columns.device) for _ in range(2))
    for part, energies in ((slice(0, strip.own), own), (slice(strip.own, len(columns)), others)):
        width = max(1, min(WIDTH_AT_ONCE, SQUARED_AT_ONCE // len(present)))
        stripes = zip(torch.split(strip.values[:, part], width, dim=1), torch.split(columns[part], width), strict=True)
        for stripe, its_columns in stripes if part.stop > part.start else ():
            sums = torch.zeros(len(present), stripe.shape[1], dtype=torch.float64, device=columns.device)
            step = max(1, SQUARED_AT_ONCE // stripe.shape[1])
            for tile, its_rows in zip(torch.split(stripe, step), torch.split(rows, step), strict=True):
                sums.index_add_(0, its_rows, tile.double().square())
            energies.index_add_(1, its_columns, sums)
    result: Array = np.zeros((blocks, blocks))
    index = present.cpu().numpy()
    result[index] += (own + others).cpu().numpy()
    result[:, index] += others.T.cpu().numpy()
    return result


def energies_of_columns(columns: Tensor, partition: Partition, chunk: slice) -> Array:
    """Contribution [B, B] to all energies of the matrix's columns `chunk`, given as [P, K]; summed over all, exact."""
    blocks = len(partition)
    assignment = _assignment(partition, columns.device)
    total = torch.zeros(blocks, blocks, dtype=torch.float64, device=columns.device)
    total.index_add_(1, assignment[chunk], _row_sums(columns, assignment, blocks))
    return total.cpu().numpy()


def probe_samples(
    operators: Sequence[Operator],
    partition: Partition,
    seed: int,
    probes: range,
    progress: Progress | None = None,
) -> tuple[Array, ...]:
    """Samples [len(probes), B, B] for one operator, or for two and their difference, from the same vectors.

    With v random signs on block j and zero elsewhere, E||P_i H v||^2 = ||H_ij||_F^2: each sample is unbiased for all
    energies at once. Probe k draws its signs from the stream (seed, "block_energies", k), so that a run can be cut
    anywhere. For symmetric operators the samples of (i, j) and (j, i) are averaged: same mean, less variance.

    Raises:
        TooLargeError: the samples would not fit in memory.
    """
    blocks, (first, *_) = len(partition), operators
    results = len(operators) if len(operators) == 1 else 3
    needed = 2 * results * len(probes) * blocks * blocks * 8
    require_memory(needed, "cpu", f"{len(probes)} samples of {blocks} x {blocks} blocks", "a coarser partition")
    samples = np.empty((results, len(probes), blocks, blocks))
    assignment = _assignment(partition, first.device)
    members = [torch.from_numpy(block).to(first.device) for block in partition.members()]
    pairs = [(row, block) for row in range(len(probes)) for block in range(blocks)]
    step = min(operator.columns_per_pass for operator in operators)
    current, signs = -1, torch.empty(0)
    for start in range(0, len(pairs), step):
        chunk = pairs[start : start + step]
        V = torch.zeros(first.shape[0], len(chunk), dtype=first.dtype, device=first.device)
        for column, (row, block) in enumerate(chunk):
            if row != current:
                generator = stream(seed, "block_energies", probes[row])
                current, signs = row, rademacher(first.shape[0], generator).to(first.device, first.dtype)
            V[members[block], column] = signs[members[block]]
        rows, columns = np.asarray(chunk).T
        for number, product in enumerate(with_difference([operator @ V for operator in operators])):
            if not torch.isfinite(product).all():
                raise DataError("a product with the operator is not finite: the matrix has undefined entries")
            samples[number, rows, :, columns] = _row_sums(product, assignment, blocks).T.cpu().numpy()
        if progress is not None:
            progress(start + len(chunk), len(pairs))
    if all(operator.symmetric for operator in operators):
        samples = (samples + samples.transpose(0, 1, 3, 2)) / 2
    return tuple(samples)


def with_difference(results: list[Tensor]) -> list[Tensor]:
    """[H v] as it is; [H v, G v] together with their difference, the residual part's product."""
    return results if len(results) == 1 else [*results, results[0] - results[1]]


def _assignment(partition: Partition, device: torch.device) -> Tensor:
    return torch.from_numpy(partition.assignment.astype(np.int64)).to(device)


def _row_sums(columns: Tensor, assignment: Tensor, blocks: int) -> Tensor:
    """Sums of squares [B, K] of the columns [P, K] over each block of rows, in float64."""
    sums = torch.zeros(blocks, columns.shape[1], dtype=torch.float64, device=columns.device)
    return sums.index_add_(0, assignment, columns.double().square())
