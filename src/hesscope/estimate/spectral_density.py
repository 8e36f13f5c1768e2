"""Spectral density of a symmetric matrix by stochastic Lanczos quadrature.

With q uniform on the unit sphere, E[q.f(A)q] = tr f(A) / P for every f: the measure that q sees (eigenvalues, weighted
with the squares of q's components) is an unbiased sample of the spectral density. Lanczos from q gives that measure's
Gauss quadrature, exact for polynomials up to degree 2 steps - 1 (Golub & Welsch 1969; Ubaru, Chen & Saad 2017; in deep
learning: Ghorbani, Krishnan & Xiao 2019, Papyan 2018).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hesscope.core.checks import require_positive_int
from hesscope.core.errors import DataError, InputError, TooLargeError
from hesscope.core.memory import available_bytes, human_bytes
from hesscope.core.records import Provenance
from hesscope.core.rng import normal, stream
from hesscope.estimate.density import SpectralDensity
from hesscope.estimate.lanczos import lanczos, power_of_two
from hesscope.estimate.symmetry import require_symmetric
from hesscope.operators import Operator, as_operator

Array = npt.NDArray[np.float64]
Progress = Callable[[int, int], None]

# Bases may take this share of the memory that is left; probes that do not fit together go in groups.
MEMORY_SHARE = 0.5


def spectral_density(
    matrix: Any, probes: int = 8, steps: int = 30, seed: int = 0, progress: Progress | None = None
) -> SpectralDensity:
    """The distribution of a symmetric matrix's eigenvalues, by stochastic Lanczos quadrature.

    All probes go together, one block of columns a step, each with a basis of its own that is orthogonalized twice. A
    matrix of no more than `steps` rows is taken whole: P products, and no error.

    Probes are uniform on the unit sphere, not random signs: signs see nothing of the eigenvector (e_1 + e_2) / sqrt(2)
    half of the time, and their errors depend on the basis; on the sphere every eigenvector's weight times P is nearly
    chi-square with one degree of freedom, which `outliers` and the standard errors build on.

    Args:
        matrix: a symmetric operator or dense matrix [P, P] (see as_operator); if its type does not say that it is
            symmetric, two products ask.
        probes: number of independent random vectors; the standard error falls with its square root, from about
            sqrt(2 / P) relative for one.
        steps: products per probe, which set the resolution: about the width of the spectrum over `steps`.
        seed: root of the random streams; equal seeds give equal numbers, more probes begin with the same ones.
        progress: called with (products done, products in all).

    Raises:
        InputError: a value that does not fit, a matrix that is not symmetric.
        TooLargeError: one probe's basis does not fit in half of the memory that is left.
        DataError: a product is not finite.
    """
    operator = as_operator(matrix)
    require_positive_int("probes", probes)
    require_positive_int("steps", steps)
    if operator.dtype not in (torch.float32, torch.float64):
        raise InputError(f"the matrix must be float32 or float64, got {operator.dtype}")
    asked = require_symmetric(operator)
    if operator.shape[0] <= steps:
        return _exact_density(operator, probes, steps, asked, progress)
    whole, done = asked + probes * steps, asked
    nodes: list[Array] = []
    weights: list[Array] = []
    shortest = steps
    group = _probes_at_once(operator, probes, steps)
    for start in range(0, probes, group):
        starts = _unit_probes(operator, seed, range(start, min(start + group, probes)))
        before = done
        report = None if progress is None else lambda count: progress(before + count, whole)  # noqa: B023
        recurrences = lanczos(operator, starts, steps, report)
        done += recurrences.products
        shortest = min(shortest, int(recurrences.lengths.min()))
        for collected, some in zip((nodes, weights), recurrences.quadratures(), strict=True):
            collected.append(some)
    exhausted = "" if shortest == steps else f"; a Krylov space was exhausted after {shortest} steps"
    return SpectralDensity(
        nodes=np.concatenate(nodes),
        weights=np.concatenate(weights),
        dimension=operator.shape[0],
        exact=False,
        products=done,
        provenance=_provenance(operator, "stochastic Lanczos quadrature", seed),
        message=f"{probes} probes of {steps} steps{exhausted}",
    )


def _exact_density(
    operator: Operator, probes: int, steps: int, asked: int, progress: Progress | None
) -> SpectralDensity:
    """All eigenvalues with equal weights, in every probe's row."""
    size = operator.shape[0]
    matrix = operator.dense().cpu().double()
    if not bool(torch.isfinite(matrix).all()):
        raise DataError("a product of the operator is not finite: look for nan or overflow in the loss or the matrix")
    if progress is not None:
        progress(asked + size, asked + size)
    scale = power_of_two(float(matrix.abs().max()))
    values = torch.linalg.eigvalsh((matrix + matrix.T) / (2 * scale)).numpy() * scale
    nodes, weights = np.zeros((probes, steps)), np.zeros((probes, steps))
    nodes[:, :size], weights[:, :size] = values, 1 / size
    return SpectralDensity(
        nodes=nodes,
        weights=weights,
        dimension=size,
        exact=True,
        products=asked + size,
        provenance=_provenance(operator, "dense", None),
        message=f"all {size} eigenvalues, since there are no more than steps",
    )


def _unit_probes(operator: Operator, seed: int, numbers: range) -> torch.Tensor:
    """Probes [len(numbers), P], uniform on the unit sphere."""
    rows = torch.empty(len(numbers), operator.shape[0], dtype=operator.dtype, device=operator.device)
    for row, number in zip(rows, numbers, strict=True):
        probe = normal((operator.shape[0],), stream(seed, "spectral_density", number))
        row.copy_(probe / probe.norm())
    return rows


def _probes_at_once(operator: Operator, probes: int, steps: int) -> int:
    """How many probes go together: no more than the operator takes in a pass, nor than fit in memory."""
    # Beside the basis: the vector, its image, their copies and what an orthogonalization subtracts.
    bytes_each = (steps + 6) * operator.shape[0] * torch.finfo(operator.dtype).bits // 8
    available = available_bytes(operator.device)
    fitting = int(MEMORY_SHARE * available) // bytes_each
    if fitting < 1:
        raise TooLargeError(
            f"a probe of {steps} steps needs {human_bytes(bytes_each)}, but {MEMORY_SHARE:.0%} of the "
            f"{human_bytes(available)} available on {operator.device} is less; take fewer steps"
        )
    return min(probes, operator.columns_per_pass, fitting)


def _provenance(operator: Operator, method: str, seed: int | None) -> Provenance:
    return Provenance(
        engine=f"spectral density: {method}; {operator.engine}",
        dtype=str(operator.dtype).removeprefix("torch."),
        device=str(operator.device),
        data_fingerprint=operator.data_fingerprint,
        seed=seed,
    )
