"""The same quantities by other libraries: PyHessian, curvlinops, hessian-eigenthings; whichever are installed.

Each as its documentation says, on one batch. PyHessian keeps the graph of the gradient between products; the others
build it anew. Fused attention has no second derivative: all run under PyTorch's mathematical attention.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.workloads import Workload

Product = Callable[[Tensor], Tensor]
Pairs = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Peer:
    """One library on one workload; makers, so that set-up is timed with use. None where it has no such thing.

    hessian, gauss_newton: give v [P] -> product [P].
    eigenpairs: k and an effort -> values [k], vectors [P, k]; efforts: from the least to the most, so that each peer
    can be given the least with which it reaches the accuracy asked for.
    quadrature: probes and steps -> nodes and weights.
    """

    name: str
    hessian: Callable[[], Product]
    gauss_newton: Callable[[], Product] | None = None
    eigenpairs: Callable[[int, float], Pairs] | None = None
    efforts: tuple[float, ...] = ()
    quadrature: Callable[[int, int], object] | None = None


@contextmanager
def quiet() -> Iterator[None]:
    """Mathematical attention, and no warnings about the peers' own business."""
    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
        warnings.simplefilter("ignore")
        yield


def installed(work: Workload) -> list[Peer]:
    """The peers that can be imported."""
    found = []
    for make in (_curvlinops, _eigenthings, _pyhessian):
        try:
            with quiet():
                found.append(make(work))
        except ImportError as error:
            print(f"left out: {error}")
    return found


def _curvlinops(work: Workload) -> Peer:
    from curvlinops import GGNLinearOperator, HessianLinearOperator
    from curvlinops.papyan2020traces.spectrum import fast_lanczos
    from scipy.sparse.linalg import eigsh

    data = [(work.inputs, work.labels)]
    parameters = dict(work.model.named_parameters())

    def operator(kind: Any) -> Any:
        try:
            return kind(work.model, nn.CrossEntropyLoss(), parameters, data, check_deterministic=False)
        except (TypeError, AttributeError, ValueError):  # before version 3: a list
            return kind(work.model, nn.CrossEntropyLoss(), list(parameters.values()), data, check_deterministic=False)

    def product(kind: Any) -> Product:
        matrix = operator(kind)
        return lambda v: matrix @ v

    def eigenpairs(k: int, tolerance: float) -> Pairs:
        values, vectors = eigsh(operator(HessianLinearOperator).to_scipy(), k=k, which="LA", tol=tolerance)
        return values, vectors

    def quadrature(probes: int, steps: int) -> object:
        matrix = operator(HessianLinearOperator)
        return [fast_lanczos(matrix, steps) for _ in range(probes)]

    return Peer(
        "curvlinops",
        lambda: product(HessianLinearOperator),
        lambda: product(GGNLinearOperator),
        eigenpairs,
        (1e-2, 1e-3, 1e-4),
        quadrature,
    )


def _eigenthings(work: Workload) -> Peer:
    import hessian_eigenthings as he

    data = [(work.inputs, work.labels)]
    criterion = nn.CrossEntropyLoss()

    def hessian() -> Any:
        return he.HessianOperator(work.model, data, he.supervised_loss(criterion))

    def gauss_newton() -> Product:
        forward, loss = he.supervised_forward, he.supervised_loss_of_output(criterion)
        return he.GGNOperator(work.model, data, forward, loss).matvec  # type: ignore[no-any-return]

    def eigenpairs(k: int, steps: float) -> Pairs:
        found = he.lanczos(hessian(), k=k, which="LA", max_iter=int(steps), reorthogonalize=True, seed=0)
        return found.eigenvalues.cpu().numpy(), found.eigenvectors.cpu().numpy().T

    def quadrature(probes: int, steps: int) -> object:
        return he.spectral_density(hessian(), num_runs=probes, lanczos_steps=steps, seed=0)

    steps = (35, 50, 70, 100, 150)
    return Peer("hessian-eigenthings", lambda: hessian().matvec, gauss_newton, eigenpairs, steps, quadrature)


def _pyhessian(work: Workload) -> Peer:
    """Products alone: its power iteration stops on the eigenvalue, far from a residual of 1e-3 (2 % on ResNet-20), and
    its density needs torch.eig, which PyTorch has no longer.
    """
    import pyhessian
    from pyhessian.utils import hessian_vector_product

    def operator() -> Any:
        work.model.zero_grad(set_to_none=True)
        cuda = work.inputs.device.type == "cuda"
        return pyhessian.hessian(work.model, nn.CrossEntropyLoss(), data=(work.inputs, work.labels), cuda=cuda)

    def hessian() -> Product:
        matrix = operator()
        sizes = [p.numel() for p in matrix.params]

        def product(v: Tensor) -> Tensor:
            parts = [part.view_as(p) for part, p in zip(torch.split(v, sizes), matrix.params, strict=True)]
            return torch.cat([p.reshape(-1) for p in hessian_vector_product(matrix.gradsH, matrix.params, parts)])

        return product

    return Peer("PyHessian", hessian)
