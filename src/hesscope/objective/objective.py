"""Objective: the function of the parameters that is studied."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hesscope.core.errors import DataError, HesscopeError, InputError, ModelError
from hesscope.core.rng import normal, stream
from hesscope.core.vectors import ParameterSpace
from hesscope.objective.batches import as_batches, cast, cloned, fingerprint, split_batch, tensors_in, to_device
from hesscope.objective.isolation import ForwardWatch, call_with, isolated
from hesscope.objective.losses import BatchLoss, OutputLoss, SumAndTerms, as_loss
from hesscope.objective.pieces import cut

ATTENTION = "attention runs in PyTorch's mathematical form: its fused kernels have no second derivative"


@dataclass(frozen=True)
class Inspection:
    """What one look at all the data found.

    terms: number (or, with class weights, total weight) of the loss terms; unused: parameters no batch depends on;
    graph_bytes: memory that autograd keeps for the largest batch.
    """

    terms: float
    batches: int
    unused: tuple[str, ...]
    data_fingerprint: str
    graph_bytes: int


class Objective:
    """L(theta) = (sum of all loss terms) / (number of all loss terms), at the model's current parameters.

    The model is measured in eval mode and left exactly as it was. Everything is checked here, before any work: the
    data is read once (twice if it is a loader, to see that it repeats itself), with one gradient per batch.

    Args:
        model: any nn.Module; its parameters with requires_grad=True are the variables, tied ones counting once.
        loss: "cross_entropy", "mse", a torch loss module, or callable(model, batch) -> (sum of terms, number of terms).
        data: one batch (x, y), a list of batches or a DataLoader; a batch may be a dict (inputs by name, targets under
            "labels"). Tensors are moved to the parameters' device.
        dtype: in which to measure, torch.float32 or torch.float64 (or the parameters' own, to insist on it); the
            parameters' own unless told, but float32 for models in half precision, where curvature drowns in rounding.

    Raises:
        InputError, DataError, ModelError: see the messages; each names the argument or the batch.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: str | nn.Module | Callable[..., Any],
        data: Any,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise InputError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if isinstance(model, (torch.jit.ScriptModule, nn.DataParallel)) or hasattr(model, "_orig_mod"):
            raise ModelError(
                f"{type(model).__name__} wraps or compiles a model and cannot be differentiated twice reliably; "
                "pass the module inside"
            )
        self.model = model
        self.loss = as_loss(loss)
        own = ParameterSpace.of(model)
        self.parameters = replace(own, dtype=_measured_dtype(own.dtype, dtype))
        self._own_dtype = own.dtype
        self._watch = ForwardWatch(self.parameters.dtype)
        self._data = as_batches(data)
        self._inspection = self._inspect()
        # Names of the matrices whose products have been found symmetric: a second derivative is right or wrong whatever
        # the parameters, and once training has fitted everything, rounding of what is left could pass for a wrong one.
        self.symmetric: set[str] = set()
        # Whether a batch can be cut into so many pieces, by (count, index); found when needed.
        self._independent: dict[tuple[int, int], bool] = {}

    @property
    def num_terms(self) -> float:
        """Number of loss terms: samples, or non-ignored tokens; with class weights the total weight (as in torch)."""
        terms = self._inspection.terms
        return int(terms) if terms == int(terms) else terms

    @property
    def num_batches(self) -> int:
        """Number of batches the data came in."""
        return self._inspection.batches

    @property
    def unused(self) -> tuple[str, ...]:
        """Names of the parameters that the loss does not depend on: their rows of the Hessian are exactly zero."""
        return self._inspection.unused

    @property
    def data_fingerprint(self) -> str:
        """Hash of all batches."""
        return self._inspection.data_fingerprint

    @property
    def graph_bytes(self) -> int:
        """Memory that autograd keeps for one forward pass of the largest batch."""
        return self._inspection.graph_bytes

    @property
    def notes(self) -> tuple[str, ...]:
        """What is done differently from a plain forward pass of the model, a line each."""
        own, measured = _short(self._own_dtype), _short(self.parameters.dtype)
        found = {
            ATTENTION: self._watch.attends,
            f"the model is {own}, measured in {measured}": own != measured,
            f"what the model rounds to fewer digits inside is kept in {measured}": self._watch.rounded,
        }
        return tuple(note for note, applies in found.items() if applies)

    def restricted(self, names: Iterable[str]) -> Objective:
        """The same function of some parameter tensors only; all others are constants, and cost nothing.

        Raises:
            InputError: a name is unknown, or none is given.
        """
        space = self.parameters.subspace(names)
        view = copy.copy(self)
        view.parameters, view._independent, view.symmetric = space, {}, set(self.symmetric)
        view._inspection = replace(self._inspection, unused=tuple(n for n in self.unused if n in space.names))
        return view

    def at(self, parameters: Tensor) -> Objective:
        """The same function at other parameters [P], with a model of its own that has them.

        Raises:
            InputError: a vector of another length.
        """
        tensors = self.parameters.unflatten(parameters)
        view = copy.copy(self)
        view.model, view._independent, view.symmetric = copy.deepcopy(self.model), {}, set(self.symmetric)
        own = dict(view.model.named_parameters())
        with torch.no_grad():
            for name, tensor in tensors.items():
                own[name].copy_(tensor)
        return view

    def __repr__(self) -> str:
        unused = f", unused: {', '.join(self.unused)}" if self.unused else ""
        return (
            f"Objective({type(self.model).__name__}, {self.loss.name}, {self.parameters.size} parameters, "
            f"{self.num_terms} terms in {self.num_batches} batches{unused})"
        )

    def value(self) -> float:
        """L at the model's current parameters."""
        total = 0.0
        with self.evaluating() as (theta, batches), torch.no_grad():
            for index, batch in batches:
                total += float(self.evaluate(theta, batch, index).sum)
        return total / self.num_terms

    def gradient(self) -> Tensor:
        """Gradient of L, shape [P]."""
        with self.evaluating() as (theta, batches):
            total = torch.zeros_like(theta)
            for index, batch in batches:
                loss_sum = self.evaluate(theta, batch, index).sum
                if loss_sum.requires_grad:
                    total += torch.autograd.grad(loss_sum, theta)[0]
        return total / self.num_terms

    @contextmanager
    def evaluating(self) -> Iterator[tuple[Tensor, Iterator[tuple[int, Any]]]]:
        """Context in which the model is isolated: the flat parameter vector [P] (a leaf) and the numbered batches."""
        with isolated(self.model):
            theta = self._current_parameters().requires_grad_()
            yield theta, ((index, self._prepared(batch)) for index, batch in enumerate(self._data))

    def state(self) -> tuple[Tensor, ...]:
        """What the function depends on and may change: the model's own tensors, parameters and buffers."""
        return (*(p.detach() for p in self.model.parameters()), *self.model.buffers())

    def undisturbed(self) -> AbstractContextManager[None]:
        """Context in which the model is isolated, without parameters and batches."""
        return isolated(self.model)

    def evaluate(self, theta: Tensor, batch: Any, index: int) -> SumAndTerms:
        """Loss sum and number of terms of one batch at the flat parameters theta [P]."""
        return self._evaluate(self.parameters.unflatten(theta), batch, index)[0]

    def outputs_and_targets(self, theta: Tensor, batch: Any, index: int) -> tuple[Tensor, Tensor]:
        """Outputs on one batch at the flat parameters theta [P], as the loss takes them, and the targets."""
        return self._outputs_and_targets(self.parameters.unflatten(theta), batch, index)

    def pieces(self, theta: Tensor, batch: Any, index: int, count: int) -> list[Any]:
        """The batch cut into at most `count` batches whose losses add up to its own; itself if that is not so.

        Whether samples are independent of each other is tested once on every batch that is to be cut (one of a single
        sample, or of equal ones, tells nothing about the others): the loss, the outputs and a random combination of
        their gradients must be those of the whole.
        """
        if isinstance(self.loss, BatchLoss):
            return [batch]
        if (count, index) not in self._independent:
            self._independent[count, index] = self._samples_independent(theta, batch, index, count)
        return cut(batch, count) if self._independent[count, index] else [batch]

    def _samples_independent(self, theta: Tensor, batch: Any, index: int, count: int) -> bool:
        assert isinstance(self.loss, OutputLoss)
        outputs, targets = self.outputs_and_targets(theta, batch, index)
        cotangent = normal(tuple(outputs.shape), stream(0, "independent samples")).to(outputs)
        if not outputs.requires_grad:
            return False
        loss_sum = self.loss.evaluate(outputs.detach(), targets).sum
        whole = torch.autograd.grad(outputs, theta, cotangent)[0]
        outputs, done, total = outputs.detach(), 0, torch.zeros_like(theta)
        for piece in cut(batch, count):
            try:
                part, wanted = self.outputs_and_targets(theta, piece, index)
                loss_sum = loss_sum - self.loss.evaluate(part.detach(), wanted).sum
            except Exception:  # the pieces are no batches of this model, whatever it is that they lack
                return False
            here = slice(done, done + len(part)) if part.ndim else slice(0)
            if not _agree(part.detach(), outputs[here]):
                return False
            total += torch.autograd.grad(part, theta, cotangent[here])[0]
            done += len(part)
        scale = self.loss.evaluate(outputs, targets).sum
        return done == len(outputs) and _agree(total, whole) and _agree(scale - loss_sum, scale)

    def _current_parameters(self) -> Tensor:
        own = dict(self.model.named_parameters())
        dtype = self.parameters.dtype
        return self.parameters.flatten({name: own[name].detach().to(dtype) for name in self.parameters.names})

    def _prepared(self, batch: Any) -> Any:
        """The batch where and in what the measurement takes place."""
        moved = to_device(batch, self.parameters.device)
        return (
            moved if self._own_dtype == self.parameters.dtype else cast(moved, self._own_dtype, self.parameters.dtype)
        )

    def _call(self, parameters: Mapping[str, Tensor], function: Callable[[nn.Module], Any]) -> Any:
        """`function(model)` at these parameters, all others being constants."""
        dtype = None if self._own_dtype == self.parameters.dtype else self.parameters.dtype
        with self._watch:
            return call_with(self.model, parameters, function, dtype)

    def _evaluate(self, parameters: Mapping[str, Tensor], batch: Any, index: int) -> tuple[SumAndTerms, Tensor | None]:
        if isinstance(self.loss, BatchLoss):
            evaluate = self.loss.evaluate
            return self._call(parameters, lambda model: evaluate(model, batch)), None
        outputs, targets = self._outputs_and_targets(parameters, batch, index)
        try:
            return self.loss.evaluate(outputs, targets), outputs
        except DataError as error:
            raise DataError(f"batch {index}: {error}") from error

    def _outputs_and_targets(self, parameters: Mapping[str, Tensor], batch: Any, index: int) -> tuple[Tensor, Tensor]:
        split = split_batch(batch, index)
        assert split.targets is not None
        result = self._call(parameters, lambda model: model(*split.arguments, **split.keywords))
        outputs = _logits(result)
        if outputs.ndim == 3 and _predicts_next_token(self.model) and isinstance(batch, Mapping):
            return outputs[:, :-1].flatten(0, 1), split.targets[:, 1:].flatten()
        return outputs, split.targets

    def _inspect(self) -> Inspection:
        prints: list[str] = []
        used: set[str] = set()
        terms, graph_bytes = 0.0, 0
        with isolated(self.model):
            leaves = {
                name: p.detach().to(self.parameters.dtype, copy=True).requires_grad_()
                for name, p in self.model.named_parameters()
                if name in self.parameters.names
            }
            for index, raw in enumerate(self._data):
                batch = self._prepared(raw)
                prints.append(fingerprint(raw))
                saved = _SavedBytes()
                with (
                    _told_in_one_line(index),
                    _nothing_written(leaves, batch) as copy,
                    torch.autograd.graph.saved_tensors_hooks(saved.count, lambda tensor: tensor),
                ):
                    result, outputs = self._evaluate(leaves, copy, index)
                if not bool(torch.isfinite(result.sum)):
                    raise DataError(f"the loss is {result.sum.item()} on batch {index}; it must be finite")
                if index == 0:
                    self._require_repeatable(leaves, batch, result.sum, outputs)
                with _told_in_one_line(index):
                    used |= _used_names(result.sum, leaves)
                terms += result.terms
                graph_bytes = max(graph_bytes, saved.total)
            self._require_same_second_pass(prints)
        self._require_independent_samples(len(prints))
        if not prints:
            raise DataError("data is empty: it gave no batch")
        if terms <= 0:
            raise DataError(f"data has no loss terms: all {len(prints)} batches are empty, ignored or of weight zero")
        if not used:
            raise ModelError("the loss does not depend on any trainable parameter of the model")
        return Inspection(
            terms=terms,
            batches=len(prints),
            unused=tuple(name for name in self.parameters.names if name not in used),
            data_fingerprint=hashlib.blake2b("".join(prints).encode(), digest_size=8).hexdigest(),
            graph_bytes=graph_bytes,
        )

    def _require_repeatable(
        self, leaves: Mapping[str, Tensor], batch: Any, loss_sum: Tensor, outputs: Tensor | None
    ) -> None:
        result, again = self._evaluate(leaves, batch, 0)
        pairs = [(loss_sum, result.sum)] if outputs is None or again is None else [(outputs, again)]
        # Rounding may differ between two runs on a GPU; randomness that matters is far above 1000 roundings.
        for first, second in pairs:
            if not _agree(second, first):
                raise ModelError(
                    "the model is random in eval mode: two forward passes on batch 0 differ; "
                    "a Hessian needs a deterministic function (look for dropout or noise that ignores model.eval())"
                )

    def _require_independent_samples(self, batches: int) -> None:
        for name, module in self.model.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None and batches > 1:
                raise ModelError(
                    f"{name or 'the model'} is a batch norm without running statistics: the loss depends on how the "
                    "data is cut into batches; pass the data as one batch, or give it running statistics"
                )

    def _require_same_second_pass(self, prints: list[str]) -> None:
        if self._data.in_memory:
            return
        count = 0
        for index, batch in enumerate(self._data):
            if index >= len(prints) or fingerprint(batch) != prints[index]:
                raise DataError(
                    f"the loader gave different data on a second pass, first in batch {index}; "
                    "use shuffle=False, no random augmentation and no one-shot iterator, or pass list(loader)"
                )
            count += 1
        if count != len(prints):
            raise DataError(f"the loader gave {len(prints)} batches on the first pass and {count} on the second")


def _agree(first: Tensor, second: Tensor) -> bool:
    """Whether two results are equal up to rounding, entry by entry relative to the largest."""
    if first.shape != second.shape:
        return False
    finite = torch.where(second.isfinite(), second, 0.0)
    allowed = 1000 * torch.finfo(second.dtype).eps * finite.abs().max() if second.numel() else 0.0
    # Equal infinities (logits of classes that cannot be) differ by nan, but agree.
    return bool((torch.where(first == second, 0.0, first - second).abs() <= allowed).all())


def _measured_dtype(own: torch.dtype, asked: torch.dtype | None) -> torch.dtype:
    """The dtype to measure in; raises InputError for one that makes no sense."""
    full = (torch.float32, torch.float64)
    if asked is None:
        return own if own in full else torch.float32
    if asked not in (*full, own):
        raise InputError(f"dtype must be torch.float32, torch.float64 or the parameters' own {own}, got {asked}")
    return asked


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _SavedBytes:
    """Adds up the memory of the tensors autograd saves, each storage once."""

    def __init__(self) -> None:
        self.total = 0
        self._seen: set[int] = set()

    def count(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.total += storage.nbytes()
        return tensor


@contextmanager
def _told_in_one_line(index: int) -> Iterator[None]:
    """The first time that model, loss and data meet: whatever fails is told in one line."""
    try:
        yield
    except HesscopeError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(f"the model or its loss failed on batch {index}: {reason}") from error


@contextmanager
def _nothing_written(leaves: Mapping[str, Tensor], batch: Any) -> Iterator[Any]:
    """Gives a copy of the batch to evaluate; refuses a forward that writes to its parameters or its inputs."""
    copy = cloned(batch)
    before = {id(tensor): tensor._version for tensor in (*leaves.values(), *tensors_in(copy))}
    yield copy
    written = [name for name, leaf in leaves.items() if leaf._version != before[id(leaf)]]
    if written:
        raise ModelError(
            f"the forward writes to the parameter {written[0]}, so its loss is no function of the parameters "
            "(nn.Embedding with max_norm does this; so does clamping in place)"
        )
    if any(tensor._version != before[id(tensor)] for tensor in tensors_in(copy)):
        raise ModelError("the forward writes to its inputs; make it work on a copy of them")


def _used_names(loss_sum: Tensor, leaves: Mapping[str, Tensor]) -> set[str]:
    if not loss_sum.requires_grad:
        return set()
    gradients = torch.autograd.grad(loss_sum, list(leaves.values()), allow_unused=True)
    for name, gradient in zip(leaves, gradients, strict=True):
        if gradient is not None and gradient.layout != torch.strided:
            raise ModelError(
                f"the gradient of {name} is sparse and has no second derivative; build it with sparse=False"
            )
    return {name for name, gradient in zip(leaves, gradients, strict=True) if gradient is not None}


def _logits(result: Any) -> Tensor:
    """The tensor of outputs: the result itself, or its `logits` (Hugging Face)."""
    logits = result.get("logits") if isinstance(result, Mapping) else getattr(result, "logits", result)
    if not isinstance(logits, Tensor):
        raise ModelError(
            f"the model must return a tensor or an object with .logits, got {type(result).__name__}; "
            "for anything else pass a loss callable(model, batch) -> (sum, terms)"
        )
    return logits


def _predicts_next_token(model: nn.Module) -> bool:
    """Whether the labels of this Hugging Face model are its own inputs, to be shifted by one (causal models)."""
    can_generate = getattr(model, "can_generate", None)
    return callable(can_generate) and bool(can_generate()) and not getattr(model.config, "is_encoder_decoder", False)


def require_output_loss(objective: Objective, what: str) -> OutputLoss:
    """The objective's loss, or InputError if it is a callable, for which `what` does not exist."""
    if isinstance(objective.loss, OutputLoss):
        return objective.loss
    raise InputError(
        f"{what} needs the loss as a function of the model's outputs; a loss callable does not give it "
        "(pass 'cross_entropy', 'mse' or a torch loss module)"
    )
