"""Random normal distributions over small networks, and what they are as dense vectors and matrices.

Where an entry of a group's matrix lies in the flat vector is read off PyTorch's modules themselves.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch
from torch import nn

import hesscope as hs
from hesscope.layerwise.axes import groups_of
from hesscope.layerwise.gaussians import Axes, GroupPosterior, Posterior
from tests.helpers import F64, randn, randomized


class BiasFirst(nn.Module):
    """A linear layer whose bias was registered before its weight."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(5, 4)
        weight = self.inner.weight
        del self.inner.weight
        self.inner.weight = weight
        self.last = nn.Linear(4, 3, bias=False)

    def forward(self, x):
        return self.last(torch.tanh(self.inner(x)))


class Normed(nn.Module):
    """Linear layers about a layer norm, with a parameter of the network's own."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return self.last(self.scale * self.norm(torch.relu(self.first(x))))


class Words(nn.Module):
    """Tokens [N, T] -> embedding, mean, linear."""

    def __init__(self):
        super().__init__()
        self.embedding, self.last = nn.Embedding(6, 4), nn.Linear(4, 3)

    def forward(self, tokens):
        return self.last(torch.tanh(self.embedding(tokens)).mean(1))


class Turned(nn.Module):
    """Hugging Face's Conv1D, whose weight is [inputs, outputs], then a linear layer."""

    def __init__(self):
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.conv, self.last = Conv1D(4, 5), nn.Linear(4, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.conv(x)))


def mlp(bias=True, widths=(5, 7, 3), activation=nn.ReLU):
    parts = [nn.Linear(widths[0], widths[1], bias=bias)]
    for fan_in, fan_out in pairwise(widths[1:]):
        parts += [activation(), nn.Linear(fan_in, fan_out, bias=bias)]
    return randomized(nn.Sequential(*parts), 1)


def convolutional():
    return randomized(
        nn.Sequential(
            nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Conv2d(3, 2, 2, bias=False), nn.Flatten(), nn.Linear(8, 3, bias=False)
        ),
        2,
    )


def images(N, seed=5):
    return randn(N, 2, 4, 4, seed=seed)


def matrix_of(model, group):
    """The matrix of a group as the model's modules hold it now, with a bias as its last column."""
    if group.layer is None:
        return dict(model.named_parameters())[group.name].detach().reshape(1, -1)
    module = model.get_submodule(group.name)
    weight = module.weight.detach()
    if isinstance(module, nn.Embedding) or type(module).__name__ == "Conv1D":
        weight = weight.T
    weight, bias = weight.flatten(1), getattr(module, "bias", None)
    return weight if bias is None else torch.cat([weight, bias.detach()[:, None]], 1)


def loaded(model, vector):
    """The model with this flat vector of parameters."""
    start = 0
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(vector[start : start + parameter.numel()].view(parameter.shape))
                start += parameter.numel()
    assert start == len(vector)
    return model


def places(model, group):
    """Where each entry of a group's matrix lies in the flat vector, [outputs, inputs]."""
    size = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    before = torch.cat([p.detach().reshape(-1) for p in model.parameters() if p.requires_grad])
    found = matrix_of(loaded(model, torch.arange(size, dtype=F64)), group).long().clone()
    loaded(model, before)
    return found


def orthonormal(size, seed):
    return torch.linalg.qr(randn(size, size, seed=seed))[0]


def random_posterior(objective, turned=True, spread=0.3, seed=0):
    """Normal, with random means, variances over two orders of magnitude, and random axes of every layer."""
    groups = []
    for number, group in enumerate(groups_of(objective)[0]):
        own = 10 * number + seed
        axes = Axes()
        if turned and group.layer is not None:
            axes = Axes(orthonormal(group.shape[0], own), orthonormal(group.shape[1], own + 1))
        groups.append(
            GroupPosterior(
                group,
                axes,
                prior_mean=0.4 * randn(*group.shape, seed=own + 2),
                shift=0.5 * randn(*group.shape, seed=own + 3),
                variance=spread**2 * randn(*group.shape, seed=own + 4).exp(),
                prior_variance=0.1 + 0.05 * number,
            )
        )
    return Posterior("random", objective.parameters, tuple(groups))


def in_dtype(posterior, dtype):
    """The same in another dtype."""
    groups = tuple(
        replace(
            each,
            axes=each.axes if each.axes.left is None else Axes(each.axes.left.to(dtype), each.axes.right.to(dtype)),
            **{name: getattr(each, name).to(dtype) for name in ("prior_mean", "shift", "variance")},
        )
        for each in posterior.groups
    )
    return replace(posterior, groups=groups, space=replace(posterior.space, dtype=dtype))


def dense_mean(model, posterior, of="posterior"):
    """Mean of the flat vector [P], by W0 + U shift V^T group by group."""
    found = torch.full((posterior.space.size,), torch.nan, dtype=F64)
    for each in posterior.groups:
        moved = each.prior_mean.double()
        if of == "posterior":
            left, right = sides(each)
            moved = moved + torch.einsum("ok,kl,il->oi", left, each.shift.detach().double(), right)
        found[places(model, each.group)] = moved
    return found


def dense_covariance(model, posterior):
    """Covariance of the flat vector [P, P], by Kronecker products."""
    found = torch.zeros(posterior.space.size, posterior.space.size, dtype=F64)
    for each in posterior.groups:
        where = places(model, each.group).flatten()
        basis = torch.kron(*sides(each))
        found[where[:, None], where] = basis @ torch.diag(each.variance.detach().double().flatten()) @ basis.T
    return found


def sides(each):
    """U and V of a group, as matrices."""
    outputs, inputs = each.group.shape
    if each.axes.left is None:
        return torch.eye(outputs, dtype=F64), torch.eye(inputs, dtype=F64)
    return each.axes.left.double(), each.axes.right.double()


def objective(model, x, y, loss="cross_entropy"):
    return hs.Objective(model, loss, (x, y))
