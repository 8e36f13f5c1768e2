"""Kronecker factors of a layer: output Hessian E[M] and input moments E[x x^T], exact or sampled ([W]; MATH.md, 5).

The decoupling conjecture of [W] is H ~ E[M] (x) E[x x^T]. M = J^T A J is that of the Gauss-Newton matrix, so that the
factors are those of K-FAC with the exact Fisher matrix; where nothing after the layer bends (ReLU), H is the Hessian.

A layer that is applied at T positions of a sample (patches, tokens) has a Hessian with T^2 terms per sample, of which a
Kronecker product needs a convention (Eschenhagen et al., arXiv:2311.00636): "expand" takes positions for samples, and
"reduce" takes the sum of the w_t and the mean of the x_t.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hesscope.core.checks import require_choice, require_positive_int
from hesscope.core.errors import DataError, InputError
from hesscope.core.memory import require_memory
from hesscope.core.records import Provenance, require_xarray_kind
from hesscope.layerwise.decoupling import Decoupling, Seen, decoupling
from hesscope.layerwise.layers import Layer, find_layer, layers_of
from hesscope.layerwise.taps import calls_of, pieces, unusable
from hesscope.objective import Objective
from hesscope.objective.objective import require_output_loss
from hesscope.operators import GaussNewton, Hessian
from hesscope.operators.operator import Operator

if TYPE_CHECKING:
    import xarray as xr

Array = npt.NDArray[np.floating[Any]]
Progress = Callable[[int, int], None]

SHARINGS = ("expand", "reduce")

# A sample with more columns in its root than this is sampled, by so many random combinations of them.
MOST_COLUMNS, DEFAULT_PROBES = 1024, 64

# Squares of several samples are made at once, of so many entries.
BATCHED_ENTRIES = 2**22

# The spread of E[M] is taken between so many groups of random combinations.
GROUPS = 8


@dataclass(frozen=True, eq=False)
class KroneckerFactors:
    """E[M] (x) E[x x^T] of a layer, and how far its Hessian is from that.

    Attributes:
        layer: its name; kind: "linear", "convolution" or "embedding"; bias: whether the last input is its 1.
        sharing: "none" (one position per sample), "expand" or "reduce"; positions: of a sample, at most.
        output: E[M], [outputs, outputs]: mean over loss terms, and sum over positions (of the sum over them: "reduce").
        input: E[x x^T], [inputs, inputs]: mean over samples and positions (of the mean over them: "reduce").
        input_mean: E[x], [inputs].
        output_stderr: standard error of `output`, in units of its Frobenius norm; 0 if exact, nan from one probe.
        samples: number of samples; columns: of the loss's root, of all samples together.
        classes: number of outputs that are classes, None if they are none.
        decoupling: how near the product is to the layer's Hessian; None if it was not asked for.
        provenance: how it was made.
    """

    layer: str
    kind: str
    bias: bool
    sharing: str
    positions: int
    output: Array = field(repr=False)
    input: Array = field(repr=False)
    input_mean: Array = field(repr=False)
    output_stderr: float
    samples: int
    columns: int
    classes: int | None
    decoupling: Decoupling | None
    provenance: Provenance

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)."""
        return self.output.shape[0], self.input.shape[0]

    @property
    def relative_error(self) -> float:
        """|H - E[M] (x) E[x x^T]| / |H| in Frobenius norm, H the layer's true Hessian.

        Raises:
            InputError: made with errors=False.
        """
        return self._known().relative_error

    @property
    def best_relative_error(self) -> float:
        """The same of the best Kronecker product of all; nan where that is out of reach (decoupling.note says why)."""
        return self._known().best_relative_error

    def _known(self) -> Decoupling:
        if self.decoupling is None:
            raise InputError("the decoupling error was not measured: make the factors with errors=True")
        return self.decoupling

    def to_xarray(self) -> xr.Dataset:
        """Both factors, the mean, and the errors; `from_xarray` is the inverse."""
        import xarray as xr

        attributes = {
            "record": "KroneckerFactors",
            **{name: getattr(self, name) for name in ("layer", "kind", "sharing", "positions", "samples", "columns")},
            "bias": int(self.bias),
            "output_stderr": self.output_stderr,
            "classes": -1 if self.classes is None else self.classes,
            **({} if self.decoupling is None else self.decoupling.attributes()),
            **self.provenance.attributes(),
        }
        return xr.Dataset(
            {
                "output_hessian": (("output", "output_too"), self.output),
                "input_moment": (("input", "input_too"), self.input),
                "input_mean": ("input", self.input_mean),
            },
            attrs=attributes,
        )

    @classmethod
    def from_xarray(cls, dataset: xr.Dataset) -> KroneckerFactors:
        """Inverse of `to_xarray`.

        Raises:
            InputError: the data set was not made by `to_xarray`.
        """
        require_xarray_kind(dataset, "KroneckerFactors")
        attributes = dataset.attrs
        return cls(
            layer=str(attributes["layer"]),
            kind=str(attributes["kind"]),
            bias=bool(attributes["bias"]),
            sharing=str(attributes["sharing"]),
            positions=int(attributes["positions"]),
            output=dataset["output_hessian"].values,
            input=dataset["input_moment"].values,
            input_mean=dataset["input_mean"].values,
            output_stderr=float(attributes["output_stderr"]),
            samples=int(attributes["samples"]),
            columns=int(attributes["columns"]),
            classes=int(attributes["classes"]) if attributes["classes"] >= 0 else None,
            decoupling=Decoupling.from_attributes(attributes),
            provenance=Provenance.from_attributes(attributes),
        )


def kronecker_factors(
    objective: Objective,
    layer: str,
    sharing: str | None = None,
    errors: bool = True,
    probes: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> KroneckerFactors:
    """Kronecker factors of one layer, and the decoupling error of [W] beside the best that any product can do.

    Args:
        objective: the function of the parameters, with a loss of outputs and targets.
        layer: name of a module: nn.Linear, nn.Conv2d, nn.Embedding, Conv1D of Hugging Face.
        sharing: "expand" or "reduce", where a sample has several positions; expand unless told. A layer that is called
            several times in a forward pass needs to be told.
        errors: whether to measure the decoupling error (several more passes, and memory for the samples).
        probes: random combinations of each sample's classes (and tokens) in place of all of them, and so with
            standard errors; all up to 1024 columns a sample, else 64, unless told.
        seed: of these.
        progress: called with (done, planned) in thousandths.

    Raises:
        InputError: no such layer, a convention that is needed or does not exist, or a loss without outputs.
        DataError: samples depend on each other, or something is not finite.
        TooLargeError: the factors, or what the errors need, do not fit in memory.
    """
    found = find_layer(objective, layer)
    share = progress if not errors or progress is None else lambda done, planned: progress(done // 2, planned)
    factors = all_kronecker_factors(objective, [layer], sharing, probes, seed, share)[layer]
    if not errors:
        return factors
    rest = None if progress is None else lambda done, planned: progress((planned + done) // 2, planned)
    return with_errors(objective, found, factors, seed, rest)


def with_errors(
    objective: Objective, layer: Layer, factors: KroneckerFactors, seed: int = 0, progress: Progress | None = None
) -> KroneckerFactors:
    """The same factors with their decoupling errors; arguments and errors as for `kronecker_factors`."""
    module = objective.model.get_submodule(layer.name)
    if getattr(module, "padding_idx", None) is not None:
        raise InputError(
            f"layer {layer.name!r} has a padding_idx, of which PyTorch's second derivative is wrong, so that the error "
            "of its factors is not known: pass errors=False"
        )
    space = objective.parameters
    K = tuple(torch.from_numpy(factor).to(space.device, space.dtype) for factor in (factors.output, factors.input))
    seen = Seen(factors.samples, factors.positions, factors.columns, exact=factors.output_stderr == 0)
    return replace(factors, decoupling=decoupling(objective, layer, (K[0], K[1]), seen, seed, progress))


def all_kronecker_factors(
    objective: Objective,
    layers: Sequence[str] | None = None,
    sharing: str | None = None,
    probes: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, KroneckerFactors]:
    """Kronecker factors of several layers (all unless told) from one pass over the data, without errors.

    Arguments and errors as for `kronecker_factors`.
    """
    require_output_loss(objective, "the output Hessian of a layer")
    if sharing is not None:
        require_choice("sharing", sharing, SHARINGS)
    if probes is not None:
        require_positive_int("probes", probes)
    chosen = layers_of(objective) if layers is None else [find_layer(objective, name) for name in layers]
    if not chosen:
        raise InputError("the network has no layers: no nn.Linear, nn.Conv2d or nn.Embedding with trainable weights")
    for name, calls in calls_of(objective, chosen).items():
        reason = unusable(*calls, sharing)
        if reason:
            raise InputError(f"layer {name!r} {reason}")
    item = torch.finfo(objective.parameters.dtype).bits // 8
    needed = item * sum(GROUPS * layer.outputs**2 + 2 * layer.inputs**2 for layer in chosen)
    require_memory(needed, objective.parameters.device, f"Kronecker factors of {len(chosen)} layers", "fewer layers")
    sums = {layer.name: _Sums(layer, sharing, objective) for layer in chosen}
    samples, columns, drawn, classes = 0, 0, 0, None
    for piece in pieces(objective, chosen):
        samples += piece.samples
        columns += piece.samples * piece.columns_per_sample()
        classes = piece.classes()
        sampled = (DEFAULT_PROBES if piece.columns_per_sample() > MOST_COLUMNS else 0) if probes is None else probes
        drawn = max(drawn, sampled)
        for layer in chosen:
            sums[layer.name].add_inputs(piece.inputs(layer), len(piece.calls[layer.name]))
        pulled = piece.pulled_signs(sampled, seed, "kronecker factors") if sampled else piece.pulled_columns()
        for number, w in enumerate(pulled):
            for layer in chosen:
                sums[layer.name].add_outputs(w[layer.name], number if sampled else None)
        if progress is not None:
            progress(round(1000 * piece.done), 1000)
    how = f"{drawn} random combinations" if drawn else f"all {columns // samples} columns"
    made = Provenance(
        engine=f"kronecker factors: {how} a sample",
        dtype=str(objective.parameters.dtype).removeprefix("torch."),
        device=str(objective.parameters.device),
        data_fingerprint=objective.data_fingerprint,
        seed=seed if drawn else None,
    )
    return {layer.name: sums[layer.name].factors(samples, columns, drawn, classes, made) for layer in chosen}


def layer_hessian(objective: Objective, layer: str, **arguments: Any) -> Operator:
    """The true Hessian of one layer's parameters, [P, P]; those of other layers are constants.

    The order is that of the parameters: the weight row by row, then the bias (see Layer.matricized).
    Its products do not pay for derivatives that only other layers need. `arguments` are those of hesscope.Hessian.

    Raises:
        InputError: no such layer.
    """
    return Hessian(objective.restricted(find_layer(objective, layer).parameters), **arguments)


def layer_gauss_newton(objective: Objective, layer: str, **arguments: Any) -> Operator:
    """The Gauss-Newton matrix of one layer's parameters; as `layer_hessian`.

    Raises:
        InputError: no such layer, or a loss callable.
    """
    return GaussNewton(objective.restricted(find_layer(objective, layer).parameters), **arguments)


class _Sums:
    """Running sums of one layer's factors: output Hessians of all columns, and of groups of random combinations."""

    def __init__(self, layer: Layer, sharing: str | None, objective: Objective) -> None:
        self.layer, self.sharing, self.terms = layer, sharing, objective.num_terms
        features, space = layer.inputs - layer.bias, objective.parameters
        self.whole = torch.zeros(layer.outputs, layer.outputs, dtype=space.dtype, device=space.device)
        self.groups: dict[int, Tensor] = {}
        self.inputs = torch.zeros(features, features, dtype=space.dtype, device=space.device)
        self.total = torch.zeros(features, dtype=space.dtype, device=space.device)
        self.count, self.positions = 0, 0

    def add_inputs(self, x: Tensor, uses: int) -> None:
        """Add inputs x [n, T, features] of so many calls."""
        self.positions = max(self.positions, x.shape[1])
        if uses > 1 and self.sharing is None:  # in a later batch than the one that was looked at
            raise InputError(f"layer {self.layer.name!r} {unusable(uses, self.positions, None)}")
        x = x.mean(1, keepdim=True) if self.sharing == "reduce" else x
        self.inputs = _add_squares(self.inputs, x)
        self.total += x.sum((0, 1))
        self.count += x.shape[0] * x.shape[1]

    def add_outputs(self, w: Tensor, probe: int | None) -> None:
        """Add w [n, T, outputs] of one column, or of one random combination of all columns."""
        w = w.sum(1, keepdim=True) if self.sharing == "reduce" else w
        if probe is None:
            self.whole = _add_squares(self.whole, w)
        else:
            group = probe % GROUPS
            self.groups[group] = _add_squares(self.groups.get(group, torch.zeros_like(self.whole)), w)

    def factors(
        self, samples: int, columns: int, probes: int, classes: int | None, provenance: Provenance
    ) -> KroneckerFactors:
        """The record; `probes`: number of random combinations of those samples that have not all columns."""
        moment, mean = self.inputs / self.count, self.total / self.count
        if self.layer.bias:
            one = torch.ones(1, dtype=mean.dtype, device=mean.device)
            moment = torch.cat([torch.cat([moment, mean[:, None]], 1), torch.cat([mean, one])[None]])
            mean = torch.cat([mean, one])
        output = sum((group / probes for group in self.groups.values()), self.whole) / self.terms
        for what, matrix in (("output Hessian", output), ("input moment", moment)):
            if not bool(matrix.isfinite().all()):
                raise DataError(f"the {what} of layer {self.layer.name!r} is not finite")
        norm = float(output.norm()) * self.terms * probes
        return KroneckerFactors(
            layer=self.layer.name,
            kind=self.layer.kind,
            bias=self.layer.bias,
            sharing="none" if self.positions == 1 else self.sharing or "expand",
            positions=self.positions,
            output=_symmetric(output),
            input=_symmetric(moment),
            input_mean=mean.cpu().numpy(),
            output_stderr=_spread(self.groups, probes, norm) if self.groups else 0.0,
            samples=samples,
            columns=columns,
            classes=classes,
            decoupling=None,
            provenance=provenance,
        )


def _add_squares(total: Tensor, v: Tensor) -> Tensor:
    """Total + sum of v v^T over samples and positions, v [n, T, f]."""
    if v.shape[1] > 1 and v.mT.is_contiguous():  # features first, as convolutions have them: each sample by itself
        for some in torch.split(v, max(1, BATCHED_ENTRIES // v.shape[2] ** 2)):
            total = total + (some.mT @ some).sum(0)
        return total
    flat = v.flatten(0, 1)
    return torch.addmm(total, flat.T, flat)


def _spread(groups: dict[int, Tensor], probes: int, norm: float) -> float:
    """Standard error, relative to `norm`, of a sum over probes from the spread of groups: probe p is in p % GROUPS."""
    if len(groups) < 2 or norm == 0:
        return float("nan")
    mean = sum(list(groups.values())[1:], groups[0]) / probes
    sizes = {group: len(range(group, probes, GROUPS)) for group in groups}
    squares = sum(float((total - sizes[group] * mean).square().sum()) / sizes[group] for group, total in groups.items())
    return float((probes * squares / (len(groups) - 1)) ** 0.5 / norm)


def _symmetric(matrix: Tensor) -> Array:
    return ((matrix + matrix.T) / 2).cpu().numpy()
