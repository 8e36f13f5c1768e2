"""Normal distributions over a network's parameters that are diagonal in a basis of each layer's own (MATH.md, 6).

A layer's matrix is W = W0 + U (shift + deviation * noise) V^T: the axes u_i v_j^T are those of the Kronecker eigenbasis
of its Hessian, or with U = V = I its parameters themselves. The prior is N(W0, prior_variance I), the same in every
orthonormal basis, so that the divergence is a sum over axes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from hesscope.bounds import GaussianKL, VarianceGrid, diagonal_gaussian_kl
from hesscope.core.vectors import ParameterSpace
from hesscope.layerwise.layers import Layer


@dataclass(frozen=True)
class Group:
    """Parameters with a prior variance of their own: a layer, or a tensor that belongs to none, as a matrix.

    Attributes:
        name: of the layer or the tensor; parameters: names of its tensors; shape: (outputs, inputs), of a tensor
            (1, entries).
        layer: None for a tensor.
    """

    name: str
    parameters: tuple[str, ...]
    shape: tuple[int, int]
    layer: Layer | None = None

    def matrix(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """[outputs, inputs] of a dict of tensors that has its own."""
        entries = torch.cat([tensors[name].reshape(-1) for name in self.parameters])
        return entries.view(self.shape) if self.layer is None else self.layer.matricized(entries)

    def entries(self, matrix: Tensor) -> Tensor:
        """Inverse of `matrix`: [outputs * inputs], in the order of its tensors."""
        return matrix.reshape(-1) if self.layer is None else self.layer.flattened(matrix)


@dataclass(frozen=True, eq=False)
class Axes:
    """Orthonormal axes u_i v_j^T of a group: columns of U [outputs, outputs] and V [inputs, inputs]; None for I."""

    left: Tensor | None = None
    right: Tensor | None = None

    @property
    def name(self) -> str:
        """What the axes are: "kronecker" or "parameters"."""
        return "parameters" if self.left is None else "kronecker"

    def coordinates(self, matrix: Tensor) -> Tensor:
        """U^T W V, [outputs, inputs]."""
        if self.left is None or self.right is None:
            return matrix
        return self.left.to(matrix).T @ matrix @ self.right.to(matrix)

    def matrix(self, coordinates: Tensor) -> Tensor:
        """U X V^T: inverse of `coordinates`; X [..., outputs, inputs]."""
        if self.left is None or self.right is None:
            return coordinates
        return self.left.to(coordinates) @ coordinates @ self.right.to(coordinates).T


@dataclass(frozen=True, eq=False)
class GroupPosterior:
    """The distribution of one group.

    Attributes:
        prior_mean: W0, [outputs, inputs]; prior_variance: of every entry.
        axes: in which it is diagonal; shift: its mean minus W0, [outputs, inputs] in these axes; variance: along them.
    """

    group: Group
    axes: Axes
    prior_mean: Tensor = field(repr=False)
    shift: Tensor = field(repr=False)
    variance: Tensor = field(repr=False)
    prior_variance: float

    @property
    def divergence(self) -> GaussianKL:
        """KL(posterior || prior), nats, in float64."""
        shift, variance = (tensor.detach().double().cpu().numpy() for tensor in (self.shift, self.variance))
        return diagonal_gaussian_kl(shift, variance, self.prior_variance)

    def with_best_prior(self, grid: VarianceGrid) -> GroupPosterior:
        """The same with the grid's variance that makes the divergence least, up to one step of the grid.

        Without a grid the least is at the mean over all axes of shift^2 + variance.
        """
        best = float((self.shift.detach().double().square() + self.variance.detach().double()).mean())
        return replace(self, prior_variance=grid.values[grid.nearest(best)])

    def turned(self, axes: Axes) -> GroupPosterior:
        """The same mean in other axes, with the diagonal of the precision matrix there in place of the precision.

        Directions that were held fast by one of the old axes stay so in the new ones, which the diagonal of the
        covariance would not do.
        """
        precision = 1 / self.variance
        left, right = _squared_turn(self.axes.left, axes.left), _squared_turn(self.axes.right, axes.right)
        if left is not None:
            precision = left @ precision
        if right is not None:
            precision = precision @ right.T
        shift = axes.coordinates(self.axes.matrix(self.shift))
        return replace(self, axes=axes, shift=shift, variance=1 / precision)


@dataclass(frozen=True, eq=False)
class Posterior:
    """Independent normal distributions of all groups.

    Attributes:
        kind: how it was found, such as "kronecker"; space: of the parameters; groups: that cover it.
    """

    kind: str
    space: ParameterSpace
    groups: tuple[GroupPosterior, ...] = field(repr=False)

    def mean(self) -> Tensor:
        """Its mean as a parameter vector [P]."""
        return self._vector(each.prior_mean + each.axes.matrix(each.shift) for each in self.groups)

    def prior_mean(self) -> Tensor:
        """The prior's mean as a parameter vector [P]."""
        return self._vector(each.prior_mean for each in self.groups)

    def draw(self, generator: torch.Generator) -> Tensor:
        """One network's parameter vector [P]; differentiable by shifts and variances."""
        return self._vector(
            each.prior_mean + each.axes.matrix(each.shift + each.variance.sqrt() * noise_like(each.shift, generator))
            for each in self.groups
        )

    def axes(self) -> dict[str, Axes]:
        """Of every group."""
        return {each.group.name: each.axes for each in self.groups}

    def divergences(self) -> dict[str, GaussianKL]:
        """KL(posterior || prior) of every group."""
        return {each.group.name: each.divergence for each in self.groups}

    def with_best_priors(self, grid: VarianceGrid) -> Posterior:
        """The same with each group's best prior variance of the grid."""
        return replace(self, groups=tuple(each.with_best_prior(grid) for each in self.groups))

    def _vector(self, matrices: Iterable[Tensor]) -> Tensor:
        tensors: dict[str, Tensor] = {}
        for each, matrix in zip(self.groups, matrices, strict=True):
            sizes = [self.space.sizes[self.space.names.index(name)] for name in each.group.parameters]
            pieces = torch.split(each.group.entries(matrix), sizes)
            tensors |= dict(zip(each.group.parameters, pieces, strict=True))
        return torch.cat([tensors[name].to(self.space.dtype) for name in self.space.names])


def noise_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Independent standard normal numbers of the tensor's shape, dtype and device."""
    return torch.randn(tensor.shape, dtype=tensor.dtype, device=tensor.device, generator=generator)


def generator_of(numbers: np.random.Generator, device: torch.device) -> torch.Generator:
    """PyTorch's generator, for noise by the million, seeded from a named stream."""
    return torch.Generator(device).manual_seed(int(numbers.integers(2**63)))


def _squared_turn(old: Tensor | None, new: Tensor | None) -> Tensor | None:
    """Squares of the new axes' coordinates in the old ones, [new, old]; None where nothing turns."""
    if old is None and new is None:
        return None
    if new is None:
        assert old is not None
        return old.square()
    return (new.T if old is None else new.T @ old).square()
