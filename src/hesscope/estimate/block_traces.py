"""Traces of the diagonal blocks of any matrix and any partition, all from one set of products or block by block.

Why "auto" does not confine its probes: in trained tanh networks of three and five layers, a sample read off a full
product deviates 1.7 to 2.2 times as much as a confined one for layers, and 3 to 10 times for rows, but costs one
product instead of one per block. At 400 products the median error of a block was (B blocks; full, confined, hutch++)

    3 layers 1.5 %, 1.3 %, 0.5 %     56 rows 6.1 %, 13 %, 1.6 %
    5 layers 2.3 %, 2.3 %, 0.6 %    106 rows 9.3 %, 31 %, 2.5 %

Confined probes are for a few blocks whose traces are far below the others'.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import ceil
from typing import Any

import torch
from torch import Tensor

from hesscope.core.errors import InputError
from hesscope.estimate.estimate import Estimate
from hesscope.estimate.products import CountedProducts, Progress, passes, signs
from hesscope.estimate.quantities import Quantity, block_trace
from hesscope.estimate.sampling import Request, checked_request, estimate, result
from hesscope.estimate.stopping import (
    FIRST_PILOT,
    LEAST,
    Draw,
    Moments,
    Sampled,
    fixed_sample,
    grown_pilot,
    planned,
    planned_sample,
)
from hesscope.operators import as_operator
from hesscope.operators.operator import Operator
from hesscope.partition.partition import Partition

# "full" is Hutchinson's estimator read block by block.
NAMES = {"full": "hutchinson"}


def block_traces(
    matrix: Any,
    partition: Partition,
    method: str = "auto",
    probes: int | None = None,
    rtol: float = 0.02,
    max_products: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Estimate:
    """Trace of each diagonal block: [B] values with standard errors, labelled.

    Args:
        matrix: an operator or dense matrix [P, P] (see as_operator); it need not be symmetric.
        partition: B blocks of the P parameters.
        method: "exact" takes the P columns. "full" reads v_b.(A v)_b for all blocks off every product with a random
            sign vector v: unbiased, but the rest of the rows adds to the variance. "confined" takes one product per
            block and sample, with signs on that block alone. "hutch++" is "full" with a sketch taken out exactly, as in
            `hesscope.trace`. "auto" chooses among all but "confined".
        probes: random vectors, for a fixed number of them; "confined" takes B products each.
        rtol: standard error of every block relative to its trace; the message says how many blocks met it.
        max_products, seed, progress: as in `hesscope.trace`. With equal seed and probes the values of "full" add up to
            the trace by "hutchinson", and a block's value does not depend on how the others are cut.

    Raises:
        InputError: an unknown method, numbers out of range, probes given with max_products or to "exact".
        PartitionError: the partition does not fit the matrix.
        TooLargeError: a sketch would not fit in memory.
        DataError: a product is not finite.
    """
    operator = as_operator(matrix)
    if not isinstance(partition, Partition):
        raise InputError(f"partition must be a hesscope.Partition, got {type(partition).__name__}")
    partition.require_fits(operator.shape[0])
    methods = ("auto", "exact", "full", "confined", "hutch++")
    request = checked_request(operator, method, methods, probes, rtol, max_products, seed)
    quantity = block_trace(partition, operator.device)
    if method == "confined":
        return _confined(operator, partition, quantity, request, CountedProducts(operator, progress))
    return estimate(operator, quantity, replace(request, method=NAMES.get(method, method)), progress)


def _confined(
    operator: Operator, partition: Partition, quantity: Quantity, request: Request, products: CountedProducts
) -> Estimate:
    blocks, excess, keep = len(partition), quantity.tolerance(request.rtol), quantity.keeps_samples
    draw = _confined_draws(operator, partition, products, request.seed)
    if request.probes is not None:
        products.expect(request.probes * blocks)
        return _confined_result(operator, quantity, request, products, fixed_sample(draw, request.probes, keep))
    most = request.max_products // blocks
    if most < 2:
        raise InputError(
            f"max_products must be at least {2 * blocks} for method 'confined' and {blocks} blocks, "
            f"got {request.max_products}"
        )
    if most < FIRST_PILOT + LEAST:
        products.expect(most * blocks)
        return _confined_result(operator, quantity, request, products, fixed_sample(draw, most, keep))
    products.expect((FIRST_PILOT + LEAST) * blocks)
    first = torch.cat(list(draw("pilot", range(FIRST_PILOT))), dim=1)
    pilot = grown_pilot(draw, Moments.of(first), FIRST_PILOT, excess, most - FIRST_PILOT)
    left, plan = (request.max_products - products.done) // blocks, planned(pilot, excess)
    products.expect(blocks * (left if plan >= left else ceil(plan)))
    return _confined_result(operator, quantity, request, products, planned_sample(draw, plan, excess, left, keep))


def _confined_draws(operator: Operator, partition: Partition, products: CountedProducts, seed: int) -> Draw:
    """Samples [B, K]; the signs of a sample are those of the full one, so that both see the same vectors."""
    assignment = torch.from_numpy(partition.assignment.astype("int64")).to(operator.device)
    blocks = len(partition)

    def draw(stage: str, numbers: range) -> Iterator[Tensor]:
        for part in passes(numbers, max(1, operator.columns_per_pass // blocks)):
            V = signs(operator, seed, "trace", stage, part)
            samples = torch.empty(blocks, len(part), dtype=torch.float64, device=operator.device)
            columns = range(blocks * len(part))
            for chunk in passes(columns, operator.columns_per_pass):
                sample = torch.tensor([column // blocks for column in chunk], device=operator.device)
                block = torch.tensor([column % blocks for column in chunk], device=operator.device)
                W = V[:, sample] * (assignment[:, None] == block)
                samples[block, sample] = (W * products(W)).sum(dim=0, dtype=torch.float64)
            yield samples

    return draw


def _confined_result(
    operator: Operator, quantity: Quantity, request: Request, products: CountedProducts, sampled: Sampled
) -> Estimate:
    return result(operator, quantity, request, products, sampled, None)
