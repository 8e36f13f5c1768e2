"""Matrices whose eigenvalues are put in, and a network whose layer has an exactly Kronecker-factored Hessian."""

import numpy as np
import torch
from torch import nn

import hesscope as hs
from tests.helpers import randn


def rotation(size, seed):
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((size, size)))[0]


def planted_factor(values, seed):
    """Symmetric matrix with these eigenvalues and random eigenvectors."""
    Q = rotation(len(values), seed)
    A = (Q * values) @ Q.T
    return (A + A.T) / 2


class Mixed(nn.Module):
    """o = V (W x + b) with V frozen: under MSE the layer's Hessian is 2 / C V^T V (x) E[x x^T], x with a last 1."""

    def __init__(self, inputs=4, outputs=3, classes=5, seed=0):
        super().__init__()
        self.fc = nn.Linear(inputs, outputs).double()
        self.V = nn.Parameter(randn(classes, outputs, seed=seed), requires_grad=False)

    def forward(self, x):
        return self.fc(x) @ self.V.T


def mixed_objective(seed=0, inputs=4, outputs=3, classes=5, samples=30):
    """The objective, and its layer's factors by hand."""
    model = Mixed(inputs, outputs, classes, seed)
    x = randn(samples, inputs, seed=seed + 1) * torch.arange(1, inputs + 1) + 1
    objective = hs.Objective(model, "mse", (x, randn(samples, classes, seed=seed + 2)))
    wide = torch.cat([x, torch.ones(samples, 1, dtype=x.dtype)], dim=1)
    return objective, (2 / classes * model.V.T @ model.V).detach().numpy(), (wide.T @ wide / samples).numpy()
