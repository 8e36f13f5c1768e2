"""The layers of a user's own network: Kronecker factors, eigenpairs and low rank of each, one by one; resumable.

Results of steps are records of `hesscope.layerwise`, one file each; the final one is a table of the layers.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hesscope.core.checks import require_choice
from hesscope.core.errors import InputError
from hesscope.core.memory import human_bytes, require_memory
from hesscope.layerwise.eigenstructure import CURVATURES, Eigenstructure, layer_eigenstructure, usual_pairs
from hesscope.layerwise.factors import GROUPS, SHARINGS, KroneckerFactors, kronecker_factors
from hesscope.layerwise.full_hessian import full_hessian_overlap
from hesscope.layerwise.layer_map import usable_layers
from hesscope.layerwise.layers import Layer, find_layer
from hesscope.layerwise.rank_one import LayerLowRank, layer_low_rank
from hesscope.layerwise.taps import pieces
from hesscope.objective import Objective
from hesscope.objective.objective import require_output_loss
from hesscope.partition import Partition
from hesscope.study.analyze import Point, human_seconds, load_objective, settings_fingerprint, some_names
from hesscope.study.config import LayersConfig, StudyConfig, stored_config
from hesscope.study.spectrum import MATRICES, TYPICAL_END, TYPICAL_PAIR, VECTOR_ENTRIES
from hesscope.study.steps import Progress, Reporter, Step, run_steps
from hesscope.study.store import Store

if TYPE_CHECKING:
    import xarray as xr

# Names of the steps; those of one layer also have its number.
FACTORS, EIGENPAIRS, LOW_RANK, FULL, RESULT = "factors", "eigenpairs", "low-rank", "layers-full", "layers"

# Layers with more outputs or inputs are measured only if they are named: a factor is a dense matrix of that size.
LARGEST_SIDE = 4096

# Entries of the final table: name -> what of a layer's records it is.
Row = Mapping[str, Any]


@dataclass(frozen=True)
class LayersStudy:
    """Everything that `layers` needs, loaded and checked.

    Attributes:
        layers: to be measured, in the order of the network; left_out: module -> why it is none of them.
        full: eigenpairs of the whole matrix, 0 for none; classes: C, None if the outputs are none.
    """

    config: StudyConfig
    folder: Path
    objective: Objective
    layers: tuple[Layer, ...]
    left_out: Mapping[str, str]
    full: int
    classes: int | None

    @property
    def settings(self) -> LayersConfig:
        """The section [layers] of the STUDY.toml."""
        return self.config.layers

    @cached_property
    def point(self) -> Point:
        """The function at the model's parameters."""
        return Point.of(self.objective)

    @cached_property
    def store(self) -> Store:
        """Where the results go, under a fingerprint of all that they depend on."""
        names = tuple(layer.name for layer in self.layers)
        settings = (RESULT, repr(self.settings), self.full, self.config.seed, self.config.model, names)
        whole = Partition.by_tensor(self.objective.model)
        return Store(self.folder, settings_fingerprint(self.objective, whole, settings, self.point))


@dataclass(frozen=True)
class LayersResults:
    """What `layers` measured: its table, and the records of every layer as data sets; full: of the whole matrix."""

    table: xr.Dataset
    factors: list[xr.Dataset]
    structures: list[xr.Dataset]
    low_ranks: list[xr.Dataset]
    full: xr.Dataset | None


def step_name(layer: int, record: str) -> str:
    """Name of the step that makes a record (FACTORS, EIGENPAIRS or LOW_RANK) of the layer of this number."""
    return f"layer-{layer:03d}-{record}"


def prepare_layers(config: StudyConfig, base: Path) -> LayersStudy:
    """Load and check everything; relative paths are relative to `base`.

    Raises:
        HesscopeError: whatever does not fit, in one line; nothing has been written then.
    """
    settings = config.layers
    require_choice("layers.matrix", settings.matrix, CURVATURES)
    if settings.sharing is not None:
        require_choice("layers.sharing", settings.sharing, SHARINGS)
    objective = load_objective(config, base)
    require_output_loss(objective, "the output Hessian of a layer")
    layers, reasons = measurable_layers(objective, settings)
    size = objective.parameters.size
    if settings.full > size and "full" in settings.model_fields_set:
        raise InputError(f"layers.full must be at most the number of parameters, {size:,}, got {settings.full:,}")
    # One piece of the data: what cannot be tapped, or has samples that depend on each other, is refused here.
    classes = next(pieces(objective, layers)).classes()
    study = LayersStudy(config, base / config.output, objective, layers, reasons, min(settings.full, size), classes)
    for layer in layers:
        if settings.eigenpairs is not None and settings.eigenpairs > layer.size:
            raise InputError(
                f"layers.eigenpairs must be at most the number of parameters of every layer, {layer.size:,} of "
                f"{layer.name!r}, got {settings.eigenpairs:,}"
            )
        require_memory(
            _least_bytes(study, layer),
            objective.parameters.device,
            f"layer {layer.name!r} ({layer.outputs:,} x {layer.inputs:,}, {_pairs(study, layer)} eigenpairs)",
            "fewer eigenpairs, or name other layers in layers.layers",
        )
    return study


def measurable_layers(objective: Objective, settings: LayersConfig) -> tuple[tuple[Layer, ...], dict[str, str]]:
    """The layers to be measured, in the order of the network, and the other modules with the reasons.

    Raises:
        InputError: a layer was named that does not exist, is named twice or cannot be measured; or there is none.
    """
    named = settings.layers
    for name in named or ():
        find_layer(objective, name)
    usable, reasons = usable_layers(objective, settings.sharing)
    if named is not None:
        if len(set(named)) < len(named):
            raise InputError(f"layers.layers must name each layer once, got {', '.join(named)}")
        for name in named:
            if name in reasons:
                raise InputError(f"layer {name!r} {reasons[name]}")
        return tuple(layer for layer in usable if layer.name in named), {}
    kept = [layer for layer in usable if not _unwanted(layer)]
    reasons |= {layer.name: _unwanted(layer) for layer in usable if layer not in kept}
    if not kept:
        why = "; ".join(f"{name!r} {reason}" for name, reason in reasons.items()) or "it has no layers"
        raise InputError(f"the network has no layer that can be measured: {why}")
    return tuple(kept), reasons


def _unwanted(layer: Layer) -> str:
    """Why a layer is measured only if it is named; empty if it is in any case."""
    if layer.kind == "embedding":
        return "is an embedding, which is measured only if layers.layers names it"
    if max(layer.shape) > LARGEST_SIDE:
        sides = f"{layer.outputs:,} outputs and {layer.inputs:,} inputs"
        return f"has {sides}; more than {LARGEST_SIDE:,} are measured only if layers.layers names it"
    return ""


def describe_layers(study: LayersStudy) -> list[tuple[str, str]]:
    """What is about to be done: (what, how much) lines."""
    objective, settings = study.objective, study.settings
    space = objective.parameters
    shapes = tuple(f"{layer.name} ({layer.kind}, {layer.outputs:,} x {layer.inputs:,})" for layer in study.layers)
    why: dict[str, tuple[str, ...]] = {}
    for name, reason in study.left_out.items():
        why[reason] = (*why.get(reason, ()), name)
    products = [_products(layer.size, _pairs(study, layer)) for layer in study.layers]
    whole = _products(space.size, study.full) if study.full else 0
    planned = sum(products) + whole
    seconds = _time_product(study)
    entries = sum(layer.size * _pairs(study, layer) for layer in study.layers)
    item = torch.empty(0, dtype=space.dtype).element_size()
    lines = [
        ("model", f"{type(objective.model).__name__}, {space.size:,} parameters in {len(space.names)} tensors"),
        (
            "data",
            f"{objective.num_terms:,} loss terms in {objective.num_batches:,} batches, loss {objective.loss.name}",
        ),
        ("layers", f"{len(shapes)}: {some_names(shapes)}"),
        *(("left out", f"{some_names(names)}: {reason}") for reason, names in why.items()),
        ("matrix", f"{settings.matrix}{f', {study.full} eigenpairs of the whole matrix' if study.full else ''}"),
        ("notes", "; ".join(objective.notes)),
        (
            "time",
            f"about {human_seconds(seconds * planned)} for eigenpairs ({planned:,} products of at most "
            f"{1000 * seconds:.3g} ms; layers.eigenpairs makes them fewer); not counted: factors"
            f"{', errors' if settings.errors else ''}, and figures (some ten seconds)",
        ),
        ("disk", f"at most {human_bytes(entries * item)} for eigenvectors"),
        ("results", str(study.folder)),
    ]
    return [line for line in lines if line[1]]


def run_layers(study: LayersStudy, report: Reporter) -> int:
    """Measure; returns how many steps were found done from an earlier run under the same settings."""
    return run_steps(layers_steps(study), study.store, report)


def layers_results(study: LayersStudy) -> LayersResults:
    """The stored results of a finished run."""
    store, numbers = study.store, range(len(study.layers))
    factors, structures, low_ranks = (
        [store.require(step_name(number, record)) for number in numbers] for record in (FACTORS, EIGENPAIRS, LOW_RANK)
    )
    full = store.require(FULL) if study.full else None
    return LayersResults(store.require(RESULT), factors, structures, low_ranks, full)


def layers_steps(study: LayersStudy) -> list[Step]:
    """Three steps for every layer, one for the whole matrix, and the table."""
    steps = []
    for number, layer in enumerate(study.layers):
        name, cost = layer.name, float(_products(layer.size, _pairs(study, layer)))
        steps += [
            Step(step_name(number, FACTORS), f"factors of {name}", cost / 2, _of_layer(study, number, _factors)),
            Step(step_name(number, EIGENPAIRS), f"eigenpairs of {name}", cost, _of_layer(study, number, _eigenpairs)),
            Step(step_name(number, LOW_RANK), f"low rank of {name}", cost / 50, _of_layer(study, number, _low_rank)),
        ]
    if study.full:
        cost = 2.0 * _products(study.objective.parameters.size, study.full)
        steps.append(Step(FULL, "eigenpairs of the whole matrix", cost, lambda progress: _full(study, progress)))
    steps.append(Step(RESULT, "putting the results together", 1.0, lambda _: _merge(study)))
    return steps


# --- steps ------------------------------------------------------------------------------------------------------------


def _of_layer(
    study: LayersStudy, number: int, measure: Callable[[LayersStudy, int, Progress], xr.Dataset]
) -> Callable[[Progress], xr.Dataset]:
    return lambda progress: measure(study, number, progress)


def _factors(study: LayersStudy, number: int, progress: Progress) -> xr.Dataset:
    settings = study.settings
    found = kronecker_factors(
        study.objective,
        study.layers[number].name,
        sharing=settings.sharing,
        errors=settings.errors,
        probes=settings.probes,
        seed=study.config.seed,
        progress=_share(progress),
    )
    return found.to_xarray()


def _eigenpairs(study: LayersStudy, number: int, progress: Progress) -> xr.Dataset:
    layer = study.layers[number]
    found = layer_eigenstructure(
        study.objective,
        layer.name,
        k=_pairs(study, layer),
        curvature=study.settings.matrix,
        factors=KroneckerFactors.from_xarray(study.store.require(step_name(number, FACTORS))),
        seed=study.config.seed,
        progress=_share(progress),
    )
    return found.to_xarray()


def _low_rank(study: LayersStudy, number: int, progress: Progress) -> xr.Dataset:
    structure, factors = (study.store.require(step_name(number, record)) for record in (EIGENPAIRS, FACTORS))
    return layer_low_rank(Eigenstructure.from_xarray(structure), KroneckerFactors.from_xarray(factors)).to_xarray()


def _full(study: LayersStudy, progress: Progress) -> xr.Dataset:
    found = full_hessian_overlap(
        study.objective,
        study.full,
        [layer.name for layer in study.layers],
        curvature=study.settings.matrix,
        seed=study.config.seed,
        progress=_share(progress),
    )
    return found.to_xarray()


def _share(progress: Progress) -> Callable[[int, int], None]:
    return lambda done, planned: progress(done / max(planned, 1))


# --- putting together -------------------------------------------------------------------------------------------------


def _merge(study: LayersStudy) -> xr.Dataset:
    """The table: a row for every layer, from what is stored."""
    rows = {}
    for number, layer in enumerate(study.layers):
        factors, structure, low_rank = (
            study.store.require(step_name(number, record)) for record in (FACTORS, EIGENPAIRS, LOW_RANK)
        )
        rows[layer.name] = layer_row(
            KroneckerFactors.from_xarray(factors),
            Eigenstructure.from_xarray(structure),
            LayerLowRank.from_xarray(low_rank),
        )
    objective, settings, first = study.objective, study.settings, study.store.require(step_name(0, FACTORS)).attrs
    given = ", ".join(f"{name} = {value!r}" for name, value in study.config.data_arguments.items())
    return layers_dataset(rows).assign_attrs(
        {
            "record": "Layers",
            "model": type(objective.model).__name__,
            "model_source": study.config.model,
            "parameters": objective.parameters.size,
            "data": f"{study.config.data}{f' ({given})' if given else ''}",
            "data_fingerprint": objective.data_fingerprint,
            "loss": objective.loss.name,
            "value": study.point.value,
            "gradient_norm": study.point.gradient_norm,
            "samples": int(first["samples"]),
            "classes": int(first["classes"]),
            "curvature": settings.matrix,
            "sharing": settings.sharing or "",
            "full": study.full,
            "seed": study.config.seed,
            "dtype": str(objective.parameters.dtype).removeprefix("torch."),
            "device": str(objective.parameters.device),
            "left_out": json.dumps(dict(study.left_out)),
            "config": stored_config(study.config, "layers"),
        }
    )


def layers_dataset(rows: Mapping[str, Row]) -> xr.Dataset:
    """The table of layers, by name, from their rows."""
    import xarray as xr

    entries = next(iter(rows.values()))
    return xr.Dataset(
        {name: ("layer", _column([row[name] for row in rows.values()])) for name in entries},
        coords={"layer": np.asarray(list(rows), dtype=object)},
    )


def layer_row(factors: KroneckerFactors, structure: Eigenstructure, low_rank: LayerLowRank) -> Row:
    """What the table says of a layer.

    Overlap with the eigenspace of the Kronecker approximation is at k = `overlap_k`: the layer's width, or as many
    eigenpairs as there are. Shares and alignments are medians over the first `leading` eigenvectors: C - 1, which are
    to be outliers ([W]), or all if there are fewer; one where the outputs are no classes. Outliers beyond the edge are
    nan where no edge was seen, expected ones where there are no classes; what was not measured is nan, too.
    """
    known, k = factors.decoupling, min(structure.shape[0], structure.k)
    leading = slice(min(structure.expected_outliers or 1, structure.k))
    edge, expected = structure.edge.count, structure.expected_outliers
    return {
        "kind": factors.kind,
        "outputs": factors.shape[0],
        "inputs": factors.shape[1],
        "positions": factors.positions,
        "sharing": factors.sharing,
        "parameters": factors.shape[0] * factors.shape[1],
        "relative_error": known.relative_error if known else np.nan,
        "relative_stderr": known.relative_stderr if known else np.nan,
        "best_relative_error": known.best_relative_error if known else np.nan,
        "best_stderr": known.best_stderr if known else np.nan,
        "gauss_newton_error": known.gauss_newton_error if known else np.nan,
        "residual_share": known.residual_share if known else np.nan,
        "decoupling_note": known.note if known else "not measured",
        "output_stderr": factors.output_stderr,
        "pairs": structure.k,
        "converged": bool(structure.converged.all()),
        "top_eigenvalue": float(structure.values[0]),
        "overlap_with_kronecker": float(structure.overlap[k - 1]),
        "overlap_k": k,
        "leading": leading.stop,
        "leading_share": float(np.median(low_rank.shares[leading, 0])),
        "right_alignment": float(np.median(low_rank.right_alignment[leading])),
        "input_alignment": low_rank.input_alignment,
        "input_ratio": low_rank.input_ratio,
        "outliers_gap": structure.gap.count,
        "outliers_ratio": structure.gap.ratio,
        "outliers_edge": np.nan if edge is None else float(edge),
        "expected_outliers": np.nan if expected is None else float(expected),
    }


def _column(values: Sequence[Any]) -> np.ndarray[Any, Any]:
    return np.asarray(values, dtype=object if isinstance(values[0], str) else None)


# --- the plan ---------------------------------------------------------------------------------------------------------


def _pairs(study: LayersStudy, layer: Layer) -> int:
    """Eigenpairs of a layer: those asked for, or the usual number, if these eigenvectors are not too large to store."""
    return study.settings.eigenpairs or min(usual_pairs(layer, study.classes), max(1, VECTOR_ENTRIES // layer.size))


def _products(size: int, pairs: int) -> int:
    """Products that eigenpairs take where nothing is hard."""
    return min(size, TYPICAL_END + TYPICAL_PAIR * pairs)


def _time_product(study: LayersStudy) -> float:
    """Seconds a product with the whole matrix takes, after the first; those with a layer's take less."""
    operator = MATRICES[study.settings.matrix](study.objective)
    V = torch.zeros(operator.shape[0], min(operator.columns_per_pass, 8), dtype=operator.dtype, device=operator.device)
    _ = operator @ V
    start = time.perf_counter()
    _ = (operator @ V).sum().item()
    return (time.perf_counter() - start) / V.shape[1]


def _least_bytes(study: LayersStudy, layer: Layer) -> int:
    """Memory of a layer's factors, of the smallest basis that gives its eigenpairs, and of one pass of products."""
    item = torch.empty(0, dtype=study.objective.parameters.dtype).element_size()
    factors = GROUPS * layer.outputs**2 + 2 * layer.inputs**2
    pairs = min(layer.size, 2 * _pairs(study, layer) + 12)
    return 3 * study.objective.graph_bytes + item * (factors + 2 * pairs * layer.size)
