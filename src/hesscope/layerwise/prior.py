"""The prior's mean: a network that was fixed before the data, and what would make it depend on them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hesscope.core.errors import InputError
from hesscope.objective import Objective


def prior_vector(objective: Objective, prior: Any) -> Tensor:
    """Vector [P] of the prior's mean.

    Args:
        prior: the network at initialization, its state dict or a dict of its parameters, or a vector [P].

    Raises:
        InputError: it does not fit the network, or depends on the data: it is the trained network itself or shares a
            tensor with it, or buffers (running statistics of a batch norm) have changed since.
    """
    space = objective.parameters
    trained = {name: p.detach() for name, p in objective.model.named_parameters() if name in space.names}
    if isinstance(prior, Tensor):
        if prior.shape != (space.size,):
            raise InputError(f"prior has shape {list(prior.shape)}, the network has {space.size} trainable parameters")
        _require_floating("prior", prior)
        _require_fixed(objective, {})
        given = space.unflatten(prior.detach())
    else:
        tensors = _tensors(prior)
        missing = [name for name in space.names if name not in tensors]
        if missing:
            raise InputError(f"prior lacks the parameter {missing[0]!r}; it has {', '.join(tensors) or 'none'}")
        unknown = tensors.keys() - _tensors(objective.model).keys()
        if unknown:
            raise InputError(f"prior has {min(unknown)!r}, which the network has not: it is of another network")
        given = {name: tensors[name] for name in space.names}
        for name, tensor in given.items():
            if tensor.shape != trained[name].shape:
                raise InputError(
                    f"prior has {name!r} of shape {list(tensor.shape)}, the network of {list(trained[name].shape)}"
                )
            _require_floating(f"prior's {name!r}", tensor)
            if tensor.untyped_storage().data_ptr() == trained[name].untyped_storage().data_ptr():
                raise InputError(
                    f"prior depends on the data: its {name!r} is the trained network's own tensor (state_dict() shares "
                    "memory with the network); pass a copy made before training, copy.deepcopy(model)"
                )
        _require_fixed(objective, tensors)
    # The trained network rounded to fewer digits, or scaled by next to nothing, is no less dependent.
    if all(_nearly_equal(tensor, trained[name]) for name, tensor in given.items()):
        raise InputError(
            "prior depends on the data: it equals the trained network; pass the network as it was before training"
        )
    vector = space.flatten({name: tensor.to(space.device, space.dtype) for name, tensor in given.items()})
    if not bool(vector.isfinite().all()):
        raise InputError("prior has entries that are not finite")
    return vector


def _tensors(prior: Any) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    if isinstance(prior, nn.Module):
        return {
            **{name: p.detach() for name, p in prior.named_parameters(remove_duplicate=False)},
            **dict(prior.named_buffers(remove_duplicate=False)),
        }
    if isinstance(prior, Mapping) and all(isinstance(value, Tensor) for value in prior.values()):
        return {str(name): value.detach() for name, value in prior.items()}
    raise InputError(
        "prior must be the network at initialization, its state dict or a vector of its trainable parameters, got "
        f"{type(prior).__name__}"
    )


def _nearly_equal(prior: Tensor, trained: Tensor) -> bool:
    """Whether every entry is the trained one up to the rounding of bfloat16."""
    prior, trained = prior.to(trained.device).double(), trained.double()
    return bool(((prior - trained).abs() <= torch.finfo(torch.bfloat16).eps * trained.abs()).all())


def _require_floating(what: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise InputError(f"{what} must be of floating-point numbers, got {tensor.dtype}")


def _require_fixed(objective: Objective, prior: Mapping[str, Tensor]) -> None:
    """Raise unless what is not trained by gradients is as it was before the data."""
    model, trained = objective.model, objective.parameters.names
    fixed = {name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()}
    fixed |= {name: p.detach() for name, p in model.named_parameters() if name not in trained}
    for name, tensor in fixed.items():
        if name not in prior:
            raise InputError(
                f"prior does not say what {name!r}, which is not among the trained parameters, was before the data: "
                "pass the network at initialization or its whole state dict"
            )
        if prior[name].shape != tensor.shape or not torch.equal(prior[name].to(tensor), tensor):
            raise InputError(
                f"{name!r} has changed since the prior, but is not among the trained parameters: what was fitted to "
                "the data in another way (running statistics of a batch norm, layers frozen after training) makes the "
                "prior depend on them, and a copy in it would, too; take statistics of other data or a norm without"
            )
