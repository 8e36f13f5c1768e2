"""Outputs of layers drawn in place of their weights, sample by sample (Kingma, Salimans, Welling, arXiv:1506.02557).

For W normal and diagonal in the axes u_i v_j^T, and one x, the coordinates of W x along the u_i are independent and
normal, with variances sum_j variance_ij (v_j . x)^2. Drawing them anew for every sample is drawing a network for every
sample. It needs every random parameter to sit in a linear layer that meets each sample exactly once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hesscope.core.errors import DataError
from hesscope.core.rng import stream
from hesscope.layerwise.gaussians import GroupPosterior, Posterior, generator_of, noise_like
from hesscope.layerwise.risk import in_chunks
from hesscope.layerwise.taps import calls_of
from hesscope.objective import Objective

# Outputs of one network in two ways agree to this share of what the draw changed, and so many roundings.
SAME_CHANGE, ROUNDINGS = 1e-3, 100


@dataclass
class Drawn:
    """A layer's output in one forward pass.

    Attributes:
        made: what the network goes on with, [n, outputs]; base: what the prior's mean makes of the layer's input.
        shift, variance: mean of made - base and its variance, [n, outputs] along the left axes, which are `left`.
    """

    made: Tensor
    base: Tensor
    shift: Tensor
    variance: Tensor
    left: Tensor | None

    @property
    def mean(self) -> Tensor:
        """Of made, given the layer's input, [n, outputs]."""
        return self.base + (self.shift if self.left is None else self.shift @ self.left.T)


@contextmanager
def reparametrized(
    objective: Objective, groups: Sequence[GroupPosterior], generator: torch.Generator | None
) -> Iterator[list[Drawn]]:
    """Context in which the network, called at the prior's mean, is one of its own for every sample.

    Without a generator it is the network at the posterior's mean. Yields what the layers made, in their order.
    """
    drawn: list[Drawn] = []
    with ExitStack() as stack:
        for each in groups:
            module = objective.model.get_submodule(each.group.name)
            stack.callback(module.register_forward_hook(_hook(each, generator, drawn), with_kwargs=True).remove)
        yield drawn


def is_local(objective: Objective, posterior: Posterior) -> bool:
    """Whether the posterior's networks can be drawn sample by sample.

    The structure says so, and one network that is drawn is the same by its parameters and by its layers' outputs on all
    data (it would not be if a weight were used beside its layer). The network at the mean would not do: where the loss
    is flat, it is the prior's.
    """
    layers = [each.group.layer for each in posterior.groups]
    if any(layer is None or layer.kind != "linear" for layer in layers):
        return False
    if any(calls != (1, 1) for calls in calls_of(objective, [layer for layer in layers if layer]).values()):
        return False
    generator = generator_of(stream(0, "local"), objective.parameters.device)
    groups = tuple(
        replace(each, shift=each.shift + each.variance.sqrt() * noise_like(each.shift, generator))
        for each in posterior.groups
    )
    prior, network = posterior.prior_mean(), replace(posterior, groups=groups).mean()
    with objective.evaluating() as (_, batches), torch.no_grad():
        for index, batch in in_chunks(objective, batches):
            wanted, _ = objective.outputs_and_targets(network, batch, index)
            start, _ = objective.outputs_and_targets(prior, batch, index)
            with reparametrized(objective, groups, None) as drawn:
                found, _ = objective.outputs_and_targets(prior, batch, index)
            if not is_one_each(drawn, len(groups), len(wanted)) or not _same_change(found, wanted, start):
                return False
    return True


def is_one_each(drawn: Sequence[Drawn], layers: int, samples: int) -> bool:
    """Whether each layer was called once, with one input for each sample."""
    return len(drawn) == layers and all(each.base.ndim == 2 and len(each.base) == samples for each in drawn)


def require_one_each(drawn: Sequence[Drawn], layers: int, samples: int, index: int) -> None:
    """Raise DataError unless each layer was called once for each sample of a batch."""
    if not is_one_each(drawn, layers, samples):
        raise DataError(f"the layers of the network are called otherwise in batch {index} than in those before it")


def _same_change(found: Tensor, wanted: Tensor, start: Tensor) -> bool:
    """Whether two networks have equal outputs, output by output beside what a draw changes, up to rounding."""
    rounding = ROUNDINGS * torch.finfo(wanted.dtype).eps * wanted.abs().amax(0)
    allowed = SAME_CHANGE * (wanted - start).abs().amax(0) + rounding
    return bool(((found - wanted).abs() <= allowed).all())


def error_probability(drawn: Drawn, labels: Tensor) -> Tensor:
    """Mean over samples of sum_c P(output c > output of the label), the last layer's draws integrated out.

    It is the classification error for two classes, and never below it: a differentiable bound without a temperature.

    Args:
        drawn: of the layer whose output is the network's; labels: [n].
    """
    rows = labels.long().unsqueeze(1)
    left, variance = drawn.left, drawn.variance
    if left is None:
        spread = variance + variance.gather(1, rows)
    else:
        squares = variance @ left.square().T
        spread = squares + squares.gather(1, rows) - 2 * ((left[rows[:, 0]] * variance) @ left.T)
    margins = drawn.mean.gather(1, rows) - drawn.mean
    limits = torch.finfo(spread.dtype)
    tiny = limits.eps * variance.detach().mean() + limits.tiny  # differences may be rounded below 0
    wrong: Tensor = torch.special.ndtr(-margins / (spread.clamp(min=0.0) + tiny).sqrt())
    return wrong.scatter(1, rows, 0.0).sum(1).mean()


def _hook(each: GroupPosterior, generator: torch.Generator | None, drawn: list[Drawn]) -> Any:
    layer, left, right = each.group.layer, each.axes.left, each.axes.right
    assert layer is not None

    def hook(module: nn.Module, args: Any, kwargs: Any, made: Tensor) -> Tensor:
        x = args[0] if args else next(iter(kwargs.values()))
        if layer.bias:
            x = torch.cat([x, torch.ones_like(x[..., :1])], dim=-1)
        turned = x if right is None else x @ right
        shift = functional.linear(turned, each.shift)
        variance = functional.linear(turned.square(), each.variance)
        moved = shift
        if generator is not None:
            # The least number keeps the root's derivative finite where nothing is random.
            deviation = (variance + torch.finfo(variance.dtype).tiny).sqrt()
            moved = shift + deviation * noise_like(variance, generator)
        result = made + (moved if left is None else moved @ left.T)
        drawn.append(Drawn(result, made, shift, variance, left))
        return result

    return hook
