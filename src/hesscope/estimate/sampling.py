"""Sampling of a matrix's quantities, plain or with the largest part of the matrix taken out exactly, to a tolerance.

How the methods compare is measured by tests and told in `hesscope.trace`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil, inf
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hesscope.core.checks import require_choice, require_positive_int
from hesscope.core.errors import InputError, TooLargeError
from hesscope.core.memory import available_bytes, human_bytes
from hesscope.core.records import Provenance
from hesscope.estimate.estimate import Estimate
from hesscope.estimate.products import CountedProducts, Progress, passes, signs
from hesscope.estimate.quantities import Quantity
from hesscope.estimate.sketch import SKETCH_BYTES, VECTORS_PER_COLUMN, Sketch
from hesscope.estimate.stopping import (
    DEFAULT_MAX_PRODUCTS,
    FIRST_PILOT,
    LEAST,
    Draw,
    Moments,
    Sampled,
    entry_excess,
    fixed_sample,
    grown_pilot,
    planned,
    planned_sample,
    require_rtol,
)
from hesscope.operators.operator import Operator

METHODS = ("auto", "exact", "hutchinson", "hutch++")

# Up to this many parameters the exact answer is allowed by default, even if it takes more than the usual products.
EXACT_SIZE = 2048

# Up to this many parameters an estimate would take as many products: two pilots and the least sample.
EXACT_AT_ONCE = 2 * FIRST_PILOT + LEAST


@dataclass(frozen=True)
class Request:
    """What the user asked for, checked.

    Attributes:
        method: its name; probes: the number of random vectors, None to draw as many as the tolerance takes.
        rtol: the tolerance; max_products: budget; seed: root of the random streams.
    """

    method: str
    probes: int | None
    rtol: float
    max_products: int
    seed: int


def checked_request(
    operator: Operator,
    method: str,
    methods: tuple[str, ...],
    probes: int | None,
    rtol: float,
    max_products: int | None,
    seed: int,
) -> Request:
    """Raise InputError for arguments that do not fit, and fill in the budget."""
    size = operator.shape[0]
    require_choice("method", method, methods)
    require_rtol(rtol)
    if probes is not None:
        require_positive_int("probes", probes)
        least = 4 if method in ("hutch++", "xtrace") else 2
        if probes < least:
            raise InputError(f"probes must be at least {least} for method {method!r}, got {probes}")
        if method == "exact":
            raise InputError("method 'exact' takes no probes; leave probes out or choose another method")
        if max_products is not None:
            raise InputError("give probes (a fixed number) or max_products (a budget for rtol), not both")
    if max_products is not None:
        require_positive_int("max_products", max_products)
        least = {"exact": size, "hutch++": 6, "xtrace": 8}.get(method, 2)
        if max_products < least and size > 1:
            raise InputError(f"max_products must be at least {least} for method {method!r}, got {max_products}")
    budget = max(DEFAULT_MAX_PRODUCTS, 2 * size if size <= EXACT_SIZE or method == "exact" else 0)
    return Request(method, probes, float(rtol), budget if max_products is None else max_products, seed)


def estimate(operator: Operator, quantity: Quantity, request: Request, progress: Progress | None) -> Estimate:
    """The quantity of the operator by one of METHODS."""
    products = CountedProducts(operator, progress)
    size, method = operator.shape[0], request.method
    if method == "auto" and request.probes is not None:
        method = "hutch++" if sketch_columns(operator) >= request.probes // 2 and request.probes >= 4 else "hutchinson"
        cost = request.probes + (request.probes // 2 if method == "hutch++" else 0)
        method = "exact" if size <= cost else method
    if size == 1 or (method == "auto" and size <= min(EXACT_AT_ONCE, request.max_products)):
        method = "exact"
    if method == "exact":
        return exact(operator, quantity, products)
    if request.probes is not None:
        return _with_fixed_probes(operator, quantity, replace(request, method=method), products, request.probes)
    return _to_tolerance(operator, quantity, replace(request, method=method), products)


def exact(operator: Operator, quantity: Quantity, products: CountedProducts) -> Estimate:
    """The dense twin of all estimates: from all P columns, chunk by chunk."""
    products.expect(operator.shape[0])
    total: Any = 0
    for chunk in operator.column_chunks():
        identity = torch.zeros(operator.shape[1], chunk.stop - chunk.start, dtype=operator.dtype).to(operator.device)
        identity[chunk].fill_diagonal_(1.0)
        total = total + quantity.terms(identity, products.columns(chunk)).sum(dim=1)
    value = total.cpu().numpy()
    where = provenance(operator, quantity, "exact", None)
    return Estimate.exact(float(value[0]) if quantity.single else value, products.done, where, quantity.labels)


def sketch_columns(operator: Operator) -> int:
    """How many columns of a sketch fit in its share of the memory."""
    bytes_each = VECTORS_PER_COLUMN * operator.shape[0] * torch.finfo(operator.dtype).bits // 8
    return int(min(SKETCH_BYTES, available_bytes(operator.device) / 2)) // bytes_each


def require_sketch(operator: Operator, columns: int) -> None:
    """Raise TooLargeError unless a sketch of that many columns fits in memory."""
    if sketch_columns(operator) < columns:
        size = VECTORS_PER_COLUMN * operator.shape[0] * torch.finfo(operator.dtype).bits // 8 * columns
        raise TooLargeError(
            f"a sketch of {columns} columns needs {human_bytes(size)}, more than half of the free memory or than "
            f"{human_bytes(SKETCH_BYTES)}; use fewer probes or method='hutchinson' instead"
        )


def _with_fixed_probes(
    operator: Operator, quantity: Quantity, request: Request, products: CountedProducts, probes: int
) -> Estimate:
    sketch, width = None, 0
    if request.method == "hutch++":
        width = min(probes // 2, operator.shape[0])
        require_sketch(operator, width)
        products.expect(width + probes)
        W = signs(operator, request.seed, quantity.stream, "pilot", range(width))
        sketch = Sketch.of(W, products(W), products)
    else:
        products.expect(probes)
    draw = draws(operator, quantity, products, request.seed, sketch)
    sampled = fixed_sample(draw, probes - probes // 2 if sketch else probes, quantity.keeps_samples)
    return result(operator, quantity, request, products, sampled, sketch)


def _to_tolerance(operator: Operator, quantity: Quantity, request: Request, products: CountedProducts) -> Estimate:
    excess, budget = quantity.tolerance(request.rtol), request.max_products
    if budget < EXACT_AT_ONCE:
        # Too little for planning: the whole budget is one sample, a third each for sketch, its products and the rest.
        probes = 2 * budget // 3 if request.method == "hutch++" else budget
        method = "hutchinson" if request.method == "auto" else request.method
        return _with_fixed_probes(operator, quantity, replace(request, method=method), products, probes)
    first = min(FIRST_PILOT, operator.shape[0])
    W = signs(operator, request.seed, quantity.stream, "pilot", range(first))
    products.expect(first + LEAST)
    AW = products(W)
    pilot, used, sketch = Moments.of(quantity.terms(W, AW)), first, None
    if request.method == "hutch++":
        require_sketch(operator, first)
    cheap = request.method == "auto" and planned(pilot, excess) <= first + LEAST
    if request.method != "hutchinson" and not cheap and sketch_columns(operator) >= first:
        sketch = _grown_sketch(operator, quantity, request, products, Sketch.of(W, AW, products), pilot)
        deflated, used = Moments.of(sketch.leave_one_out(quantity)), sketch.width
        if request.method == "hutch++" or _spread(deflated) < _spread(pilot):
            pilot = deflated
        else:
            sketch = None
    plan = planned(pilot, excess)
    if request.method == "auto" and operator.shape[0] <= min(plan, budget - products.done):
        return exact(operator, quantity, products)
    draw = draws(operator, quantity, products, request.seed, sketch)
    products.expect(_at_most(plan, budget - products.done))
    pilot = grown_pilot(draw, pilot, used, excess, budget - products.done)
    plan = planned(pilot, excess)
    if request.method == "auto" and operator.shape[0] <= min(plan, budget - products.done):
        return exact(operator, quantity, products)
    products.expect(_at_most(plan, budget - products.done))
    sampled = planned_sample(draw, plan, excess, budget - products.done, quantity.keeps_samples)
    return result(operator, quantity, request, products, sampled, sketch)


def _grown_sketch(
    operator: Operator,
    quantity: Quantity,
    request: Request,
    products: CountedProducts,
    sketch: Sketch,
    plain: Moments,
) -> Sketch:
    """Double the sketch as long as the last doubling paid; any choice is as good as to bias, as new probes follow.

    The idea is that of adaptive Hutch++ (Persson, Cortinovis and Kressner, SIAM Journal on Matrix Analysis and
    Applications 43, 2022): to minimize the products for the sketch and those that remain.
    """
    excess = quantity.tolerance(request.rtol)
    before, now = plain, Moments.of(sketch.leave_one_out(quantity))
    cost = sketch.width
    while True:
        left = request.max_products - products.done
        remaining = min(planned(now, excess), left)
        if request.method == "auto":
            remaining = min(remaining, operator.shape[0])
        # Products that the last growth saved, were all samples still to come drawn without it.
        share = 1 - _spread(now) / _spread(before) if _spread(before) > 0 else 0.0
        saved = remaining * share / (1 - share) if share < 1 else inf
        width = sketch.width
        widest = operator.shape[0] // (8 if request.method == "auto" else 2)  # all columns are "auto"'s other choice
        fits = 2 * width <= min(widest, sketch_columns(operator), request.max_products // 3)
        if saved <= cost or remaining - LEAST <= 2 * width or not fits or 2 * width + LEAST > left:
            return sketch
        W = signs(operator, request.seed, quantity.stream, "pilot", range(width, 2 * width))
        sketch, cost = sketch.grown(W, products), 2 * width
        before, now = now, Moments.of(sketch.leave_one_out(quantity))


def draws(operator: Operator, quantity: Quantity, products: CountedProducts, seed: int, sketch: Sketch | None) -> Draw:
    """Samples [B, K] of the quantity, each from one random sign vector and one product."""
    captured = None if sketch is None else sketch.captured(quantity)[:, None]

    def draw(stage: str, numbers: range) -> Iterator[Tensor]:
        for part in passes(numbers, operator.columns_per_pass):
            V = signs(operator, seed, quantity.stream, stage, part)
            if sketch is None or captured is None:
                yield quantity.terms(V, products(V))
            else:
                U = sketch.project_out(V)
                yield captured + quantity.terms(U if quantity.projects_both else V, products(U))

    return draw


def result(
    operator: Operator,
    quantity: Quantity,
    request: Request,
    products: CountedProducts,
    sampled: Sampled,
    sketch: Sketch | None,
    probes: int | None = None,
) -> Estimate:
    """The record of what was sampled."""
    met = quantity.tolerance(request.rtol)(sampled.mean, sampled.squared_error) <= 1
    value, stderr = (numbers.cpu().numpy() for numbers in (sampled.mean, sampled.squared_error.sqrt()))
    samples = None if sampled.samples is None else sampled.samples.cpu().numpy()
    width = 0 if sketch is None else sketch.width
    name = request.method if request.method != "auto" else "hutchinson" if sketch is None else "hutch++"
    how = f"{name}, sketch of {width} columns" if width else name
    return Estimate(
        value=float(value[0]) if quantity.single else value,
        stderr=float(stderr[0]) if quantity.single else stderr,
        samples=samples[:, 0] if samples is not None and quantity.single else samples,
        labels=quantity.labels,
        degrees=sampled.count - 1,
        probes=sampled.count + width if probes is None else probes,
        products=products.done,
        converged=met,
        message=_message(quantity, request, sampled, met),
        provenance=provenance(operator, quantity, how, request.seed),
    )


def provenance(operator: Operator, quantity: Quantity, how: str, seed: int | None) -> Provenance:
    """Where an estimate comes from."""
    return Provenance(
        engine=f"{quantity.name}: {how}; {operator.engine}",
        dtype=str(operator.dtype).removeprefix("torch."),
        device=str(operator.device),
        data_fingerprint=operator.data_fingerprint,
        seed=seed,
    )


def _message(quantity: Quantity, request: Request, sampled: Sampled, met: bool) -> str:
    """One line: the tolerance was met or not, and if not, why and what to do."""
    if met:
        return f"rtol {request.rtol:g} met"
    why = f"with {request.probes} probes" if request.probes else f"within max_products={request.max_products}"
    advice = "take more probes" if request.probes else "raise max_products or rtol, or give probes"
    if quantity.single:
        value, stderr = float(sampled.mean), float(sampled.squared_error.sqrt())
        if abs(value) < 2 * stderr:
            return f"rtol {request.rtol:g} not met {why}: the value is zero within twice its error"
        return f"rtol {request.rtol:g} not met {why}: {stderr / abs(value):.2g} was reached; {advice}"
    if quantity.labels is not None:
        good = int((entry_excess(sampled.mean, sampled.squared_error, request.rtol) <= 1).sum())
        return f"rtol {request.rtol:g} not met {why}: {good} of {len(quantity.labels)} blocks met it; {advice}"
    reached = float(np.sqrt(float(sampled.squared_error.sum()) / float(sampled.mean.square().sum() or 1)))
    return f"rtol {request.rtol:g} not met {why}: {reached:.2g} of the norm was reached; {advice}"


def _spread(moments: Moments) -> float:
    return float(moments.variance.sum())


def _at_most(plan: float, left: int) -> int:
    return left if plan >= left else ceil(plan)
