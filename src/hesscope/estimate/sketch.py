"""Sketch: a subspace that holds most of a matrix's action, found from products with random vectors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hesscope.estimate.products import CountedProducts
from hesscope.estimate.quantities import Quantity

# Bytes that a sketch may take unless told: vectors are as long as the model has parameters.
SKETCH_BYTES = 2**33

# Vectors per column of a sketch: W, Q, Z, and as much again while it is used.
VECTORS_PER_COLUMN = 6


@dataclass(frozen=True)
class Sketch:
    """Random vectors W [P, k] of a matrix A, an orthonormal basis Q of the span of A W, and products with it.

    Attributes:
        W, Q: [P, k]; Z = A Q: [P, k]; R = Q^T A W: [k, k], upper triangular, float64 on the CPU.
    """

    W: Tensor
    Q: Tensor
    Z: Tensor
    R: Tensor

    @property
    def width(self) -> int:
        """Number of columns k."""
        return self.Q.shape[1]

    @classmethod
    def of(cls, W: Tensor, AW: Tensor, products: CountedProducts) -> Sketch:
        """From random vectors and the products with them; takes k products more. k <= P."""
        Q = torch.linalg.qr(AW)[0]
        return cls(W, Q, products(Q), _small(Q.T @ AW))

    def grown(self, W: Tensor, products: CountedProducts) -> Sketch:
        """With more random vectors W [P, m]; takes 2 m products. k + m <= P."""
        AW = products(W)
        # Factorizing old and new columns together keeps the basis orthonormal where the new ones add next to nothing.
        new = torch.linalg.qr(torch.cat([self.Q, AW], dim=1))[0][:, self.width :]
        upper, corner = _small(self.Q.T @ AW), _small(new.T @ AW)
        R = torch.cat([torch.cat([self.R, upper], 1), torch.cat([torch.zeros_like(upper.T), corner], 1)])
        Q, Z = torch.cat([self.Q, new], 1), torch.cat([self.Z, products(new)], 1)
        return Sketch(torch.cat([self.W, W], 1), Q, Z, R)

    def captured(self, quantity: Quantity) -> Tensor:
        """The part of the quantity in the subspace, exactly; [B]."""
        return quantity.terms(self.Q, self.Z).sum(dim=1)

    def project_out(self, V: Tensor) -> Tensor:
        """Remove from each column of V [P, K] its part in the subspace."""
        return V - self.Q @ (self.Q.T @ V)

    def leave_one_out(self, quantity: Quantity, normalized: bool = False) -> Tensor:
        """For each random vector an unbiased estimate [B, k]: it is the probe, all others make the subspace.

        The subspace without vector i is that of Q, less one direction s_i, the i-th column of R^-T, normalized
        (Epperly, Tropp and Webber, SIAM Journal on Matrix Analysis and Applications 45, 2024, section 2). No further
        products are needed. Estimates of one sketch depend on each other, so that the deviation of their mean is
        larger than they suggest: by up to 1.5 times, measured.

        Args:
            normalized: rescale probes to the length that projected ones have on average; unbiased for vectors of
                rotationally invariant distribution, and of less variance (the same, section 2.3).
        """
        S = _normalized_inverse_transpose(self.R, torch.finfo(self.Q.dtype).eps).to(self.Q)
        C = self.Q.T @ self.W
        C = C - S * (S * C).sum(dim=0)
        U = self.W - self.Q @ C
        AU = self.Q @ self.R.to(self.Q) - self.Z @ C
        own = quantity.terms(self.Q @ S, self.Z @ S)
        rest = quantity.terms(U if quantity.projects_both else self.W, AU)
        if normalized:
            rest = rest * ((len(self.Q) - self.width + 1) / U.double().square().sum(dim=0))
        return self.captured(quantity)[:, None] - own + rest


def _normalized_inverse_transpose(R: Tensor, eps: float) -> Tensor:
    """Columns of R^-T at unit length; where R is singular up to rounding, some vector of its kernel instead.

    If the matrix's rank is less than the sketch's width, leaving one vector out takes away a direction in which the
    matrix does nothing.
    """
    U, values, Vt = torch.linalg.svd(R)
    if values[0] == 0:
        return torch.eye(len(R), dtype=R.dtype)
    inverse: Tensor = U @ (Vt / values.clamp(min=float(values[0]) * eps * len(R))[:, None])
    lengths: Tensor = torch.linalg.vector_norm(inverse, dim=0)
    return inverse / lengths


def _small(matrix: Tensor) -> Tensor:
    return matrix.double().cpu()
