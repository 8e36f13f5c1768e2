"""Gauss-Newton products of models with many classes: logits are made a few positions at a time, never all at once.

Where the outputs are o = h W^T + b, h [n, d] what the last layer receives, the Gauss-Newton matrix is J^T B^T A B J: J
is the Jacobian of (h, W, b) as functions of the parameters, which no engine needs logits for, and
B (dh, dW, db) = dh W^T + h dW^T + db. For cross-entropy A = diag(p) - p p^T at every position, times the weight of its
label. B^T A B is one operation here, on a tile of positions after the other: all classes of a position are there at
once, so that p and p . t need no second pass, and however large the vocabulary, one position's logits are small. W may
be tied to other parameters: J adds up what comes back to it.

Source: the product is that of Schraudolph (2002), "Fast curvature matrix-vector products", split at the last layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional

from hesscope.core.rng import coarse, stream
from hesscope.objective.batches import split_batch
from hesscope.objective.losses import OutputLoss
from hesscope.objective.objective import Objective
from hesscope.objective.pieces import cut
from hesscope.operators.engines import Multiply, Sandwich
from hesscope.operators.second_derivatives import agree, stacked

# Logits of a batch that are larger than this are made in tiles of TILE_BYTES, or of LEAST_ROWS positions, since fewer
# make slow matrix products. Three tiles are held at a time, so a tile is a quarter of the logits at most.
TILED_BYTES = 2**25
TILE_BYTES = 2**23
LEAST_ROWS = 64
PARTS = 4

# The last layer is looked for on so small a part of a batch: one sample of up to so many.
SAMPLED = 2**20


@dataclass(frozen=True)
class LastLayer:
    """The nn.Linear whose result is the model's output, untouched.

    Attributes:
        name: of the module, "" if it is the model itself; classes: C; width: d.
    """

    name: str
    classes: int
    width: int

    def logit_bytes(self, batch: Any, index: int, dtype: torch.dtype) -> int:
        """Memory of the logits of a batch; 0 if its targets are no class labels."""
        targets = split_batch(batch, index).targets
        if targets is None or targets.is_floating_point():
            return 0
        return targets.numel() * self.classes * torch.empty(0, dtype=dtype).element_size()

    @contextmanager
    def left_out(self, model: nn.Module) -> Iterator[list[tuple[Tensor, Tensor | None]]]:
        """Let the model give what this layer receives in place of the logits; collects (weight, bias) at every call."""
        layer = model.get_submodule(self.name)
        assert isinstance(layer, nn.Linear)
        seen: list[tuple[Tensor, Tensor | None]] = []

        def passed_on(input: Tensor) -> Tensor:
            seen.append((layer.weight, layer.bias))
            return input

        layer.forward = passed_on  # type: ignore[method-assign]
        try:
            yield seen
        finally:
            del layer.forward  # the class's own is found again


@dataclass(frozen=True)
class _Split:
    """The model on a batch at its last layer: features [n, d] of the n positions that count, weight [C, d], bias [C].

    scale: [n] the factor of diag(p) - p p^T at each position.
    """

    features: Tensor
    weight: Tensor
    bias: Tensor | None
    scale: Tensor

    @property
    def variable(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Features, weight and bias, without those that are constants."""
        parts = (self.features, self.weight, self.bias)
        return tuple(part if part is not None and part.requires_grad else None for part in parts)  # type: ignore[return-value]


def find_last_layer(objective: Objective, batch: Any, index: int) -> LastLayer | str:
    """The layer whose result is the model's output, found by running one sample of a batch; or why there is none.

    The tensor that the model returns must be the very one that an nn.Linear has made, not written to since: a model
    that caps, scales or masks its logits returns another. And the layer, given what the model returns without it, must
    give these logits.
    """
    if not isinstance(objective.loss, OutputLoss) or type(objective.loss.module) is not nn.CrossEntropyLoss:
        return "the loss is no cross-entropy"
    model, part = objective.model, cut(batch, SAMPLED)[0]
    made: list[tuple[str, Tensor, int]] = []
    returned: list[Any] = []

    def noted(name: str) -> Any:
        return lambda module, given, result: made.append((name, result, result._version))

    handles = [
        layer.register_forward_hook(noted(name))
        for name, layer in model.named_modules()
        if type(layer) is nn.Linear and not _changed(layer)
    ]
    handles.append(model.register_forward_hook(lambda module, given, result: returned.append(result)))
    theta = _parameters(objective)
    try:
        outputs, targets = objective.outputs_and_targets(theta, part, index)
    except Exception:  # one sample need not be a batch of this model
        return "it does not run on one sample alone"
    finally:
        for handle in handles:
            handle.remove()
    logits = _logits(returned[-1])
    names = [name for name, result, version in made if result is logits and version == result._version]
    if len(names) != 1 or sum(name == names[0] for name, *_ in made) != 1 or len(returned) != 1:
        return "its logits are not what one nn.Linear gives"
    if outputs.shape[:-1] != targets.shape or outputs.dtype != objective.parameters.dtype:
        return "its targets are not one label for each row of logits"
    layer: Any = model.get_submodule(names[0])
    found = LastLayer(names[0], layer.out_features, layer.in_features)
    try:
        with found.left_out(model) as seen:
            features, _ = objective.outputs_and_targets(theta, part, index)
        if agree(functional.linear(features, *seen[0]).detach(), outputs.detach()) and len(seen) == 1:
            return found
    except Exception:  # something after the layer needs logits
        pass
    return "it does not run without its last layer"


def tiled(objective: Objective, last: LastLayer, batch: Any, index: int, what: str) -> Sandwich:
    """The Gauss-Newton matrix of a batch, as J^T M J with (h, W, b), as far as they vary, in place of the outputs."""
    splits: list[_Split] = []

    def outputs(theta: Tensor) -> Tensor:
        split = _split(objective, last, theta, batch, index)
        # Kept without tangents and graphs; the weight is a view of theta, not a copy.
        bias = None if split.bias is None else _plain(split.bias)
        splits[:] = [_Split(_plain(split.features), _plain(split.weight), bias, split.scale)]
        variable = [part.reshape(-1) for part in split.variable if part is not None]
        layout[:] = [part is not None for part in split.variable]
        return torch.cat(variable) if variable else split.features

    layout: list[bool] = []

    def middle(found: Tensor) -> Multiply:
        split, varies = splits[0], tuple(layout)
        parts = (split.features, split.weight, split.bias)
        sizes = [part.numel() for part, kept in zip(parts, varies, strict=True) if kept and part is not None]
        few = TILE_BYTES // (last.classes * split.features.element_size())
        rows = max(1, few, min(LEAST_ROWS, len(split.features) // PARTS))

        def one(pushed: Tensor) -> Tensor:
            pieces = iter(torch.split(pushed, sizes))
            tangents = [
                next(pieces).view(part.shape) if kept and part is not None else None
                for part, kept in zip(parts, varies, strict=True)
            ]
            curved: Tensor = _curved(*tangents, *parts, split.scale, rows)
            return curved

        return lambda pushed, vectorized: stacked([one(row) for row in pushed])

    return Sandwich(outputs, middle, what)


def samples_independent(
    objective: Objective, last: LastLayer, theta: Tensor, batch: Any, index: int, count: int
) -> bool:
    """Whether what the last layer receives from each of `count` pieces of a batch is what it receives from the whole.

    Like Objective.pieces, which looks at logits of the whole batch: features, labels, and a random combination of the
    features' gradients.
    """
    whole = _split(objective, last, theta, batch, index)
    if not whole.features.requires_grad:
        return False
    cotangent = coarse(tuple(whole.features.shape), stream(0, "independent features")).to(whole.features)
    expected = torch.autograd.grad(whole.features, theta, cotangent)[0]
    done, total = 0, torch.zeros_like(theta)
    for piece in cut(batch, count):
        try:
            part = _split(objective, last, theta, piece, index)
        except Exception:  # the pieces are no batches of this model, whatever it is that they lack
            return False
        here = slice(done, done + len(part.features))
        done += len(part.features)
        if done > len(whole.features) or not torch.equal(part.scale, whole.scale[here]):
            return False
        if not agree(part.features.detach(), whole.features[here].detach()):
            return False
        total += torch.autograd.grad(part.features, theta, cotangent[here])[0]
    return done == len(whole.features) and agree(total, expected)


def _split(objective: Objective, last: LastLayer, theta: Tensor, batch: Any, index: int) -> _Split:
    assert isinstance(objective.loss, OutputLoss)
    with last.left_out(objective.model) as seen:
        features, targets = objective.outputs_and_targets(theta, batch, index)
    ((weight, bias),) = seen
    features, labels = features.reshape(-1, last.width), targets.reshape(-1).long()
    loss: Any = objective.loss.module
    counted = labels != loss.ignore_index
    if not bool(counted.all()):
        features, labels = features[counted], labels[counted]
    # Every - log p_c has the same Hessian, so label smoothing changes the weight of a position at most.
    scale = features.new_ones(len(labels))
    if loss.weight is not None:
        weights, smoothing = loss.weight.to(features), loss.label_smoothing
        scale = (1 - smoothing) * weights[labels] + smoothing * weights.mean()
    return _Split(features, weight, bias, (scale / objective.num_terms).detach())


@torch.library.custom_op(
    "hesscope::logit_curvature",
    mutates_args=(),
    schema=("(Tensor? dh, Tensor? dW, Tensor? db, Tensor h, Tensor W, Tensor? b, Tensor scale, SymInt rows) -> Tensor"),
)
def _curved(
    dh: Tensor | None,
    dW: Tensor | None,
    db: Tensor | None,
    h: Tensor,
    W: Tensor,
    b: Tensor | None,
    scale: Tensor,
    rows: int,
) -> Tensor:
    """B^T A B of the tangents dh [n, d], dW [C, d], db [C] (None: a constant), concatenated like them, flat.

    One operation as far as recordings are concerned, which would keep the probabilities of all positions otherwise.
    """
    sizes = [0 if tangent is None else tangent.numel() for tangent in (dh, dW, db)]
    result = h.new_zeros(sum(sizes))
    to_h, to_W, to_b = torch.split(result, sizes)
    to_h, to_W = to_h.view(-1, h.shape[1]), to_W.view(-1, h.shape[1])
    for start in range(0, len(h), rows):
        tile = slice(start, start + rows)
        p = torch.mm(h[tile], W.T) if b is None else torch.addmm(b, h[tile], W.T)
        p = torch.softmax(p, dim=1)
        t = h.new_zeros(p.shape) if dh is None else torch.mm(dh[tile], W.T)
        if dW is not None:
            t.addmm_(h[tile], dW.T)
        if db is not None:
            t.add_(db)
        t.sub_((p * t).sum(dim=1, keepdim=True)).mul_(p).mul_(scale[tile, None])
        if dh is not None:
            torch.mm(t, W, out=to_h[tile])
        if dW is not None:
            to_W.addmm_(t.T, h[tile])
        if db is not None:
            to_b.add_(t.sum(dim=0))
        del p, t  # before the next ones are made
    return result


@_curved.register_fake
def _(
    dh: Tensor | None,
    dW: Tensor | None,
    db: Tensor | None,
    h: Tensor,
    W: Tensor,
    b: Tensor | None,
    scale: Tensor,
    rows: int,
) -> Tensor:
    return h.new_empty(sum(tangent.numel() for tangent in (dh, dW, db) if tangent is not None))


def _parameters(objective: Objective) -> Tensor:
    """The model's current parameters as the objective measures them, [P], a leaf."""
    own, space = dict(objective.model.named_parameters()), objective.parameters
    return space.flatten({name: own[name].detach().to(space.dtype) for name in space.names}).requires_grad_()


def _plain(part: Tensor) -> Tensor:
    """A tensor without tangent and graph; not a copy."""
    primal: Tensor = forward_ad.unpack_dual(part).primal  # type: ignore[no-untyped-call]
    return primal.detach()


def _changed(layer: nn.Linear) -> bool:
    """Whether a layer does something else than its class says."""
    return "forward" in vars(layer) or bool(layer._forward_hooks) or bool(layer._forward_pre_hooks)


def _logits(result: Any) -> Any:
    """What an objective takes as the outputs: the result itself, or its `logits`."""
    return result.get("logits") if isinstance(result, Mapping) else getattr(result, "logits", result)
