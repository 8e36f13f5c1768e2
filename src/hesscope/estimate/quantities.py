"""What can be read off vectors X and products A X: trace, squared norm, diagonal, traces of blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hesscope.estimate.stopping import Excess, entrywise, normwise
from hesscope.partition.partition import Partition

# Samples of block traces are kept up to this many blocks: a thousand of them take half a GiB.
KEPT_BLOCKS = 2**16


@dataclass(frozen=True)
class Quantity:
    """B numbers that a matrix A has, each a sum over any orthonormal basis X of terms that depend on (X, A X).

    With signs V for X, E[V V^T] = I, the terms are unbiased samples. With the projector Q Q^T on a subspace,
    A = A Q Q^T + A (I - Q Q^T): the first part is summed exactly over the basis Q, the second is sampled with the
    projected signs U = V - Q Q^T V. Where `projects_both`, U takes the place of V on the left, too (for the trace and
    the norm nothing is lost by it, as their terms between the two subspaces vanish).

    Attributes:
        name: for messages; stream: name of its random streams.
        terms: [P, K] vectors X and their products A X -> [B, K] float64.
        tolerance: rtol -> how much an estimate exceeds it.
        single: whether B = 1 and the value is a float; keeps_samples: whether [K, B] numbers are kept.
        labels: of the entries, or None.
    """

    name: str
    stream: str
    terms: Callable[[Tensor, Tensor], Tensor]
    tolerance: Callable[[float], Excess]
    projects_both: bool
    single: bool
    keeps_samples: bool
    labels: tuple[str, ...] | None = None


def _trace_terms(X: Tensor, AX: Tensor) -> Tensor:
    return (X * AX).sum(dim=0, dtype=torch.float64)[None]


def _norm_terms(_: Tensor, AX: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(AX, dim=0, dtype=torch.float64)
    return norms.square()[None]


def _diagonal_terms(X: Tensor, AX: Tensor) -> Tensor:
    return X.double() * AX


TRACE = Quantity("trace", "trace", _trace_terms, entrywise, projects_both=True, single=True, keeps_samples=True)
NORM_SQUARED = Quantity(
    "squared Frobenius norm", "frobenius", _norm_terms, entrywise, projects_both=True, single=True, keeps_samples=True
)
# n samples of P entries would be as large as n vectors, so that only running sums are kept.
DIAGONAL = Quantity(
    "diagonal", "diagonal", _diagonal_terms, normwise, projects_both=False, single=False, keeps_samples=False
)


def block_trace(partition: Partition, device: torch.device) -> Quantity:
    """Traces of the B diagonal blocks; with the random streams of the trace, so that equal probes add up to it."""
    assignment = torch.from_numpy(partition.assignment.astype(np.int64)).to(device)

    def terms(X: Tensor, AX: Tensor) -> Tensor:
        sums = torch.zeros(len(partition), X.shape[1], dtype=torch.float64, device=device)
        return sums.index_add_(0, assignment, X.double() * AX)

    return Quantity(
        "block traces",
        "trace",
        terms,
        entrywise,
        projects_both=False,
        single=False,
        keeps_samples=len(partition) <= KEPT_BLOCKS,
        labels=partition.labels,
    )
