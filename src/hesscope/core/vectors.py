"""ParameterSpace: the correspondence between a model's parameter tensors and one flat vector."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import nn

from hesscope.core.errors import InputError, ModelError


@dataclass(frozen=True)
class ParameterSpace:
    """The trainable parameters of a model in `named_parameters()` order, flattened row-major (MATH.md, section 1).

    Tied parameters count once, under the first of their names; parameters with `requires_grad=False` are left out.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, model: nn.Module) -> ParameterSpace:
        """Space of the trainable parameters of `model`.

        Raises:
            ModelError: no parameter is trainable, or they differ in dtype or device.
        """
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not trainable:
            raise ModelError(
                "the model has no trainable parameter: there is nothing to differentiate with respect to "
                "(set requires_grad=True on the parameters to study)"
            )
        lazy = [name for name, p in trainable.items() if isinstance(p, nn.parameter.UninitializedParameter)]
        if lazy:
            raise ModelError(
                f"the shape of {lazy[0]} is not known yet: call the model once on data before measuring it"
            )
        for what in ("dtype", "device"):
            kinds = sorted({str(getattr(p, what)) for p in trainable.values()})
            if len(kinds) > 1:
                raise ModelError(f"trainable parameters must share one {what}, found {', '.join(kinds)}")
        first = next(iter(trainable.values()))
        if not first.dtype.is_floating_point:
            raise ModelError(f"parameters must be real floating-point numbers, found {first.dtype}")
        if first.device.type == "meta":
            raise ModelError("the parameters are on the meta device and have no values; load or initialize them first")
        return cls(
            names=tuple(trainable),
            shapes=tuple(tuple(p.shape) for p in trainable.values()),
            dtype=first.dtype,
            device=first.device,
        )

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of entries of each tensor."""
        return tuple(prod(shape) for shape in self.shapes)

    @property
    def size(self) -> int:
        """Total number of parameters P."""
        return sum(self.sizes)

    def slice(self, name: str) -> slice:
        """Where the tensor `name` lies in the flat vector."""
        if name not in self.names:
            raise InputError(f"no parameter is named {name!r}; the names are {', '.join(self.names)}")
        index = self.names.index(name)
        start = sum(self.sizes[:index])
        return slice(start, start + self.sizes[index])

    def subspace(self, names: Iterable[str]) -> ParameterSpace:
        """The space of some of the tensors, in the order they have here."""
        chosen = set(names)
        for name in chosen:
            self.slice(name)  # raises for a name that is not here
        if not chosen:
            raise InputError("a subspace needs at least one parameter name")
        kept = [(name, shape) for name, shape in zip(self.names, self.shapes, strict=True) if name in chosen]
        return replace(self, names=tuple(name for name, _ in kept), shapes=tuple(shape for _, shape in kept))

    def flatten(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Dict of tensors with these names and shapes -> vector [P]."""
        missing, unknown = set(self.names) - set(tensors), set(tensors) - set(self.names)
        if missing or unknown:
            raise InputError(
                f"flatten needs exactly the names of this space; missing: {', '.join(sorted(missing)) or 'none'}; "
                f"unknown: {', '.join(sorted(unknown)) or 'none'}"
            )
        for name, shape in zip(self.names, self.shapes, strict=True):
            if tuple(tensors[name].shape) != shape:
                raise InputError(f"{name} has shape {tuple(tensors[name].shape)}, expected {shape}")
        return torch.cat([tensors[name].reshape(-1) for name in self.names])

    def unflatten(self, vector: torch.Tensor) -> dict[str, torch.Tensor]:
        """Vector [P] -> dict of tensors, as views of it (one `split`, so that its derivative is one concatenation)."""
        if vector.shape != (self.size,):
            raise InputError(f"unflatten needs a vector of shape ({self.size},), got {tuple(vector.shape)}")
        pieces = torch.split(vector, list(self.sizes))
        return {name: piece.view(shape) for name, piece, shape in zip(self.names, pieces, self.shapes, strict=True)}
