"""Layers of a network as the matrices that they are: which modules multiply their inputs by weights, and how."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hesscope.core.checks import nearest
from hesscope.core.errors import InputError
from hesscope.objective import Objective
from hesscope.partition.layouts import output_axis

SUPPORTED = "nn.Linear, nn.Conv2d without groups, nn.Embedding and the Conv1D of Hugging Face"


@dataclass(frozen=True)
class Layer:
    """A module that multiplies inputs by a matrix [outputs, inputs]: z = W x, with the bias as the column of a 1.

    Attributes:
        name: of the module; kind: "linear", "convolution" (x is an unfolded patch) or "embedding" (x is a unit vector).
        outputs: rows of the matrix; inputs: its columns: features, or channels x kernel, or tokens, and the bias.
        bias: whether the last column is one.
        transposed: whether the weight tensor holds the matrix with the inputs first.
        parameters: names of its tensors, in the order of the objective's ParameterSpace: the weight first, but for
            modules whose bias was registered before it.
    """

    name: str
    kind: str
    outputs: int
    inputs: int
    bias: bool
    transposed: bool
    parameters: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)."""
        return self.outputs, self.inputs

    @property
    def size(self) -> int:
        """Number of its parameters P."""
        return self.outputs * self.inputs

    @property
    def _bias_first(self) -> bool:
        return self.bias and self.parameters[0].endswith("bias")

    def matricized(self, vectors: Tensor) -> Tensor:
        """Vectors [P] or [P, K] of its parameters, in their order, as matrices [outputs, inputs] or [K, ., .].

        Raises:
            InputError: vectors of another length.
        """
        if vectors.ndim not in (1, 2) or vectors.shape[0] != self.size:
            raise InputError(
                f"layer {self.name!r} has {self.size} parameters, got vectors of shape {list(vectors.shape)}"
            )
        rows = vectors.unsqueeze(0) if vectors.ndim == 1 else vectors.T
        features = self.inputs - self.bias
        if self._bias_first:
            bias, weight = rows[:, : self.outputs], rows[:, self.outputs :]
        else:
            weight, bias = rows[:, : self.outputs * features], rows[:, self.outputs * features :]
        if self.transposed:
            matrices = weight.reshape(-1, features, self.outputs).mT
        else:
            matrices = weight.reshape(-1, self.outputs, features)
        if self.bias:
            matrices = torch.cat([matrices, bias.unsqueeze(2)], dim=2)
        return matrices[0] if vectors.ndim == 1 else matrices

    def flattened(self, matrices: Tensor) -> Tensor:
        """Inverse of `matricized`: [outputs, inputs] or [K, outputs, inputs] -> [P] or [P, K].

        Raises:
            InputError: matrices of another shape.
        """
        if matrices.ndim not in (2, 3) or tuple(matrices.shape[-2:]) != self.shape:
            raise InputError(
                f"layer {self.name!r} is a matrix of {self.outputs} x {self.inputs}, got shape {list(matrices.shape)}"
            )
        several = matrices.unsqueeze(0) if matrices.ndim == 2 else matrices
        features = self.inputs - self.bias
        weight = several[:, :, :features]
        rows = (weight.mT if self.transposed else weight).reshape(len(several), -1)
        if self.bias:
            bias = several[:, :, features]
            rows = torch.cat([bias, rows] if self._bias_first else [rows, bias], dim=1)
        return rows[0] if matrices.ndim == 2 else rows.T


def find_layer(objective: Objective, name: str) -> Layer:
    """The layer of this name.

    Raises:
        InputError: no such module (the nearest names are told), or one that is no layer: of another kind, without a
            trainable weight, or with a weight that another module uses, too.
    """
    if not isinstance(name, str):
        raise InputError(f"a layer must be given by the name of its module, got {type(name).__name__}")
    modules = dict(objective.model.named_modules())
    if name not in modules:
        known = [layer.name for layer in layers_of(objective)]
        listed = ", ".join(repr(word) for word in known[:8]) + (" ..." if len(known) > 8 else "")
        hint = nearest(str(name), known) if known else ""
        raise InputError(f"there is no layer {name!r}; the layers are {listed}{hint}")
    found = _layer_or_reason(objective, name, modules[name])
    if isinstance(found, str):
        raise InputError(f"{name!r} {found}; layers are {SUPPORTED}")
    return found


def layers_of(objective: Objective) -> list[Layer]:
    """All layers of the network, in the order of its modules."""
    found = (_layer_or_reason(objective, name, module) for name, module in objective.model.named_modules())
    return [layer for layer in found if isinstance(layer, Layer)]


def left_out(objective: Objective) -> dict[str, str]:
    """Modules with trainable parameters of their own that are no layers: name -> why."""
    found = {}
    for name, module in objective.model.named_modules():
        if any(True for _ in _trainable(objective, module)):
            reason = _layer_or_reason(objective, name, module)
            if isinstance(reason, str):
                found[name] = reason
    return found


def _trainable(objective: Objective, module: nn.Module) -> Iterator[nn.Parameter]:
    return (p for p in module.parameters(recurse=False) if p.requires_grad)


def _layer_or_reason(objective: Objective, name: str, module: nn.Module) -> Layer | str:
    """The layer, or why the module is none."""
    kind = _kind(module)
    if hasattr(module, "parametrizations"):
        return "is parametrized (torch.nn.utils.parametrizations): its weight is a function of other parameters"
    if isinstance(module, nn.Conv2d) and module.groups > 1:
        return f"is a convolution with {module.groups} groups, whose matrix is a block-diagonal one"
    if kind is None:
        return f"is no layer but a {type(module).__name__}"
    weight, bias = module.weight, getattr(module, "bias", None)
    if not isinstance(weight, nn.Parameter) or not weight.requires_grad:
        return "has no trainable weight"
    owners = _owners(objective.model)
    for tensor in (weight, bias):
        others = [owner for owner in owners.get(id(tensor), []) if owner != name] if tensor is not None else []
        if others:
            return f"shares its weight with {others[0]!r}: the Hessian of a tied weight is not that of one layer"
    has_bias = isinstance(bias, nn.Parameter) and bias.requires_grad
    transposed = kind == "embedding" or output_axis(module) == 1
    matrix = weight.mT if transposed else weight
    prefix = f"{name}." if name else ""
    own = [f"{prefix}weight", *([f"{prefix}bias"] if has_bias else [])]
    return Layer(
        name=name,
        kind=kind,
        outputs=int(matrix.shape[0]),
        inputs=math.prod(matrix.shape[1:]) + has_bias,
        bias=has_bias,
        transposed=transposed,
        parameters=tuple(entry for entry in objective.parameters.names if entry in own),
    )


def _kind(module: Any) -> str | None:
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.Conv2d):
        return "convolution" if module.groups == 1 else None
    # Hugging Face's Conv1D is a linear layer with the weight the other way round.
    is_linear = isinstance(module, nn.Linear) or (
        type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"
    )
    return "linear" if is_linear else None


def _owners(model: nn.Module) -> dict[int, list[str]]:
    """Names of the modules that hold each parameter, by the parameter's identity; one module counts once."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    return owners
