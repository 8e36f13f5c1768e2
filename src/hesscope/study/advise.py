"""Which partition of a network's parameters its Hessian is block-diagonal in, and what to do about it; resumable.

Results of steps are records of `hesscope.estimate`, one file each.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hesscope.core.checks import nearest, require_choice
from hesscope.core.errors import InputError, PartitionError
from hesscope.core.files import atomic_path
from hesscope.core.rng import stream
from hesscope.estimate.advice import TensorChoice, choose_by_tensor, choose_partition
from hesscope.estimate.block_energies import block_energies
from hesscope.estimate.block_spectra import block_spectra
from hesscope.estimate.diagonality import EXACT_SIZE, PartitionComparison, compare_partitions
from hesscope.objective import Objective
from hesscope.objective.batches import fingerprint
from hesscope.objective.losses import OutputLoss
from hesscope.operators import GaussNewton, Hessian
from hesscope.partition import Partition
from hesscope.study import loading
from hesscope.study.analyze import Point, human_seconds, load_objective, settings_fingerprint
from hesscope.study.config import AdviseConfig, StudyConfig, stored_config
from hesscope.study.spectrum import MATRICES
from hesscope.study.steps import Progress, Reporter, Step, run_steps
from hesscope.study.store import Store

if TYPE_CHECKING:
    import xarray as xr

# Names of the steps, and of the partition that cuts every tensor in its own way.
COMPARISON, ENERGIES, SPECTRA, ZOOM = "advice-comparison", "advice-energies", "advice-spectra", "advice-zoom"
MIXED_STEP, MIXED, RESULT = "advice-mixed", "mixed", "advice"
NO_HEADS = (
    "no attention is known in this model (of your own: 'pkg.module:function' in advise.partitions that returns "
    "hesscope.Partition.by_head(model, heads=...))"
)
# Products of the map of energies where nothing is hard, for the plan only.
TYPICAL_ENERGIES = 250
# Schemes that cut within tensors, from which every tensor gets its own.
WITHIN = ("head", "row", "column")
WHOLE = "tensor"
# The map of energies has one block per tensor, or per layer or module where these are more than so many.
MOST_BLOCKS = 120
# The map to zoom into has about so many blocks at most: heads where there are any, else groups of rows.
MOST_ZOOMED = 600
# Spectra are of blocks of the coarsest level that has at least two and at most so many.
MOST_SPECTRA, SPECTRA_PROBES, SPECTRA_STEPS = 24, 2, 16


@dataclass(frozen=True)
class AdviseStudy:
    """Everything that `advise` needs, loaded and checked.

    Attributes:
        partitions: scheme -> partition; left_out: scheme -> why it does not fit the model.
        mapped, of_spectra: schemes of the map of energies and of the spectra.
    """

    config: StudyConfig
    folder: Path
    objective: Objective
    partitions: Mapping[str, Partition]
    left_out: Mapping[str, str]
    mapped: str
    of_spectra: str

    @property
    def settings(self) -> AdviseConfig:
        """The section [advise] of the STUDY.toml."""
        return self.config.advise

    @property
    def zooms(self) -> bool:
        """Whether there is a map to zoom into: of the Gauss-Newton matrix, if the loss has one."""
        return isinstance(self.objective.loss, OutputLoss)

    @property
    def tensors(self) -> dict[str, int]:
        """Parameter tensors and their sizes."""
        space = self.objective.parameters
        return dict(zip(space.names, space.sizes, strict=True))

    @cached_property
    def operator(self) -> Hessian | GaussNewton:
        """The matrix that is to be approximated."""
        return MATRICES[self.settings.matrix](self.objective)

    @cached_property
    def point(self) -> Point:
        """The function at the model's parameters."""
        return Point.of(self.objective)

    @cached_property
    def store(self) -> Store:
        """Where the results go, under a fingerprint of all that they depend on."""
        compared = fingerprint({name: found.assignment for name, found in self.partitions.items()})
        settings = (RESULT, repr(self.settings), self.config.seed, self.config.model, *self.partitions, compared)
        whole = self.partitions[WHOLE]
        return Store(self.folder, settings_fingerprint(self.objective, whole, settings, self.point))


def prepare_advise(config: StudyConfig, base: Path) -> AdviseStudy:
    """Load and check everything; relative paths are relative to `base`.

    Raises:
        HesscopeError: whatever does not fit, in one line; nothing has been written then.
    """
    settings = config.advise
    require_choice("advise.matrix", settings.matrix, MATRICES)
    for scheme in settings.partitions or ():
        if scheme not in loading.SCHEMES and ":" not in scheme:
            raise InputError(
                f"advise.partitions has {scheme!r}, which is none of {', '.join(map(repr, loading.SCHEMES))} nor "
                f"'pkg.module:function'{nearest(scheme, loading.SCHEMES)}"
            )
    objective = load_objective(config, base)
    partitions: dict[str, Partition] = {}
    left_out: dict[str, str] = {}
    with loading.importable_from(base):
        for scheme in dict.fromkeys([WHOLE, *(settings.partitions or loading.SCHEMES)]):
            try:
                found = loading.load_partition(scheme, objective.model, "advise.partitions")
            except PartitionError as error:
                if settings.partitions:  # asked for by name
                    raise
                left_out[scheme] = NO_HEADS if scheme == "head" else str(error)
                continue
            twin = next((name for name, other in partitions.items() if _same(found, other)), None)
            if twin is None or settings.partitions:
                partitions[scheme] = found
            else:
                left_out[scheme] = f"it has the same blocks as {twin}"
    for partition in partitions.values():
        partition.require_fits(objective.parameters.size)
    if settings.matrix == "gauss_newton":
        GaussNewton(objective)  # refuses a loss that has none
    coarse = [Partition.by_tensor, Partition.by_layer, Partition.by_module]
    sizes = {make.__name__.removeprefix("by_"): len(make(objective.model)) for make in coarse}
    mapped = next((name for name, blocks in sizes.items() if blocks <= MOST_BLOCKS), "module")
    of_spectra = next((name for name in ("module", "layer") if 2 <= sizes[name] <= MOST_SPECTRA), "")
    return AdviseStudy(config, base / config.output, objective, partitions, left_out, mapped, of_spectra)


def _same(one: Partition, other: Partition) -> bool:
    """Whether two partitions have the same blocks, whatever their names and order."""
    if len(one) != len(other):
        return False
    pairs = one.assignment.astype(np.int64) * len(one) + other.assignment
    return len(np.unique(pairs)) == len(one)


def describe_advise(study: AdviseStudy) -> list[tuple[str, str]]:
    """What is about to be done: (what, how much) lines."""
    objective = study.objective
    space = objective.parameters
    products = expected_products(study)
    seconds = time_product(study)
    compared = ", ".join(f"{name} ({len(partition):,} blocks)" for name, partition in study.partitions.items())
    return [
        ("model", f"{type(objective.model).__name__}, {space.size:,} parameters in {len(space.names)} tensors"),
        (
            "data",
            f"{objective.num_terms:,} loss terms in {objective.num_batches:,} batches, loss {objective.loss.name}",
        ),
        ("compared", compared),
        *((f"no {scheme}", reason) for scheme, reason in study.left_out.items()),
        ("time", f"about {human_seconds(seconds * products)} ({products:,} products of {1000 * seconds:.2g} ms)"),
        ("results", str(study.folder)),
    ]


def expected_products(study: AdviseStudy) -> int:
    """Products of all steps where nothing is hard; the map to zoom into counts as much as that of energies."""
    size, probes = study.objective.parameters.size, study.settings.probes
    if size <= EXACT_SIZE:
        return 3 * size
    spectra = 0
    if study.of_spectra:
        blocks = len(loading.SCHEMES[study.of_spectra](study.objective.model))
        spectra = blocks * SPECTRA_PROBES * SPECTRA_STEPS
    return (len(study.partitions) + 3) * (probes + 32) + TYPICAL_ENERGIES * (1 + study.zooms) + spectra


def time_product(study: AdviseStudy) -> float:
    """Seconds that a product takes, after the first."""
    operator = study.operator
    V = torch.zeros(operator.shape[0], min(operator.columns_per_pass, 8), dtype=operator.dtype, device=operator.device)
    elapsed = []
    for _ in range(2):
        start = time.perf_counter()
        _ = (operator @ V).sum().item()
        elapsed.append(time.perf_counter() - start)
    return min(elapsed) / V.shape[1]


def run_advise(study: AdviseStudy, report: Reporter) -> int:
    """Measure; returns how many steps were found done from an earlier run under the same settings."""
    probes = study.settings.probes
    steps = [
        Step(COMPARISON, "comparing partitions", 1.5 * probes * len(study.partitions), lambda p: _compare(study, p)),
        Step(MIXED_STEP, "every tensor in its own way", 1.5 * probes, lambda p: _compare_mixed(study, p)),
        Step(ENERGIES, "measuring energies of all pairs of blocks", 6.0 * probes, lambda p: _energies(study, p)),
    ]
    if study.of_spectra:
        steps.append(Step(SPECTRA, "measuring the blocks' spectra", 4.0 * probes, lambda p: _spectra(study, p)))
    if study.zooms:
        steps.append(Step(ZOOM, "measuring heads and groups of rows", 4.0 * probes, lambda p: _zoomed(study, p)))
    steps.append(Step(RESULT, "putting the results together", 1.0, lambda _: _merged(study)))
    return run_steps(steps, study.store, report)


def mixed_partition(study: AdviseStudy, choices: Mapping[str, TensorChoice]) -> Partition:
    """Every tensor cut by the scheme that was chosen for it."""
    labels: list[str] = []
    assignment = np.empty(study.objective.parameters.size, dtype=np.int32)
    for name, choice in choices.items():
        place = study.objective.parameters.slice(name)
        partition = study.partitions[choice.scheme]
        numbers, own = np.unique(partition.assignment[place], return_inverse=True)
        assignment[place] = own + len(labels)
        labels += [partition.labels[number] for number in numbers]
    return Partition(tuple(labels), assignment)


def advice_json(result: xr.Dataset) -> dict[str, Any]:
    """What an optimizer needs, as plain values: verdict, and for every parameter the axis and size of its blocks.

    `parameter_groups` are the same as groups of parameters that are cut alike, in the form that Adam-mini's take: every
    `block_size` consecutive indices along `axis` share one second moment, or all of a tensor, if the scheme is "whole".
    Tensors whose blocks are no equal slices along one axis (columns of grouped convolutions) are `irregular`: their
    blocks are those of the partition of that scheme.
    """
    parameters: dict[str, Any] = json.loads(result.attrs["parameters_cut"])
    groups: dict[tuple[str, Any, Any], list[str]] = {}
    for name, cut in parameters.items():
        groups.setdefault((cut["scheme"], cut["axis"], cut["block_size"]), []).append(name)
    irregular = [group for (scheme, axis, _), group in groups.items() if scheme != "whole" and axis is None]
    return {
        "model": result.attrs["model_class"],
        "matrix": result.attrs["matrix"],
        "verdict": json.loads(result.attrs["verdict"]),
        "parameters": parameters,
        "parameter_groups": [
            {"params": names, "scheme": scheme, "axis": axis, "block_size": size}
            for (scheme, axis, size), names in groups.items()
            if scheme == "whole" or axis is not None
        ],
        "irregular": [name for names in irregular for name in names],
    }


def write_advice(folder: Path, result: xr.Dataset) -> Path:
    """Write folder/advice.json."""
    path = folder / "advice.json"
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(advice_json(result), indent=2) + "\n", encoding="utf-8")
    return path


def _compare(study: AdviseStudy, progress: Progress) -> xr.Dataset:
    found = compare_partitions(
        study.operator,
        study.partitions,
        study.objective.gradient(),
        study.tensors,
        probes=study.settings.probes,
        seed=study.config.seed,
        progress=lambda done, whole: progress(done / whole),
    )
    return found.to_xarray()


def _compare_mixed(study: AdviseStudy, progress: Progress) -> xr.Dataset:
    """The mixed partition, measured by another sample than it was chosen by, in which it would look too good."""
    choices = _choices(study)
    found = compare_partitions(
        study.operator,
        {MIXED: mixed_partition(study, choices)},
        study.objective.gradient(),
        probes=study.settings.probes,
        seed=int(stream(study.config.seed, "advise", MIXED).integers(2**62)),
        progress=lambda done, whole: progress(done / whole),
    )
    return found.to_xarray()


def _choices(study: AdviseStudy) -> dict[str, TensorChoice]:
    comparison = PartitionComparison.from_xarray(study.store.require(COMPARISON))
    schemes = tuple(name for name in WITHIN if name in study.partitions)
    return choose_by_tensor(comparison, WHOLE, schemes)


def _energies(study: AdviseStudy, progress: Progress) -> xr.Dataset:
    partition = loading.SCHEMES[study.mapped](study.objective.model)
    found = block_energies(
        study.operator,
        partition,
        rtol=study.settings.rtol,
        max_products=study.settings.max_products,
        seed=study.config.seed,
        progress=lambda done, whole: progress(done / whole),
    )
    return found.to_xarray().assign_attrs(scheme=study.mapped)


def _spectra(study: AdviseStudy, progress: Progress) -> xr.Dataset:
    partition = loading.SCHEMES[study.of_spectra](study.objective.model)
    probes, steps = (SPECTRA_PROBES, SPECTRA_STEPS) if study.objective.parameters.size > EXACT_SIZE else (None, None)
    found = block_spectra(
        study.operator,
        partition,
        probes=probes,
        steps=steps,
        seed=study.config.seed,
        progress=lambda done, whole: progress(done / whole),
    )
    return found.to_xarray().assign_attrs(scheme=study.of_spectra)


def _zoomed(study: AdviseStudy, progress: Progress) -> xr.Dataset:
    """Energies of all pairs of the finest blocks, with their places in the hierarchy."""
    partition, groups = fine_partition(study)
    found = block_energies(
        GaussNewton(study.objective),
        partition,
        method="dual",
        seed=study.config.seed,
        progress=lambda done, whole: progress(done / whole),
    )
    # The samples of the errors are many times as large as the map, which shows none.
    dataset = found.to_xarray()
    dataset = dataset[["energy", "energy_stderr", "block_size"]].assign_coords(level=list(groups))
    for level, labels in groups.items():
        dataset[f"group_{level}"] = ("row_block", np.asarray(labels, dtype=object))
    return dataset


def fine_partition(study: AdviseStudy) -> tuple[Partition, dict[str, list[str]]]:
    """Heads where there are any, groups of rows elsewhere, about MOST_ZOOMED in all; and for every level of the
    hierarchy the group of each block.
    """
    model, space = study.objective.model, study.objective.parameters
    rows, modules = Partition.by_row(model), Partition.by_module(model)
    heads = study.partitions.get("head")
    each = max(1, MOST_ZOOMED // len(space.names))
    labels: list[str] = []
    groups: dict[str, list[str]] = {"module": [], "layer": [], "tensor": []}
    assignment = np.empty(space.size, dtype=np.int32)
    for name in space.names:
        place = space.slice(name)
        by_head = heads is not None and len(np.unique(heads.assignment[place])) > 1
        partition = heads if by_head and heads is not None else rows
        numbers, own = np.unique(partition.assignment[place], return_inverse=True)
        own = own.astype(np.int32)
        count = len(numbers)
        new = [partition.labels[number] for number in numbers]
        if count > each and not by_head:
            step = -(-count // each)
            own //= step
            new = [f"{name}[{start}:{min(start + step, count)}]" for start in range(0, count, step)]
        assignment[place] = own + len(labels)
        labels += new
        groups["module"] += [modules.labels[modules.assignment[place.start]]] * len(new)
        groups["layer"] += [name.rpartition(".")[0] or name] * len(new)
        groups["tensor"] += [name] * len(new)
    return Partition(tuple(labels), assignment), groups


def _merged(study: AdviseStudy) -> xr.Dataset:
    """The comparison with the mixed partition in it, the verdict, and how to cut every parameter."""
    comparison = PartitionComparison.from_xarray(study.store.require(COMPARISON))
    mixed = PartitionComparison.from_xarray(study.store.require(MIXED_STEP))
    choices, verdict = _choices(study), choose_partition(comparison)
    unknown = np.full(len(comparison.tensors), np.nan)
    without = np.full((len(mixed.rows[MIXED].replicates[0]), len(comparison.tensors)), np.nan)
    row = replace(
        mixed.rows[MIXED],
        tensor_energy=unknown,
        tensor_chance=unknown,
        tensor_entries=unknown,
        replicates=(mixed.rows[MIXED].replicates[0], without),
    )
    rows = {**comparison.rows, MIXED: row}
    together = PartitionComparison(
        rows, comparison.tensors, comparison.products + mixed.products, comparison.provenance
    )
    return together.to_xarray().assign_attrs(
        verdict=json.dumps(asdict(verdict)),
        parameters_cut=json.dumps(_cuts(study, choices)),
        choices=json.dumps({name: _plain(choice) for name, choice in choices.items()}),
        left_out=json.dumps(dict(study.left_out)),
        config=stored_config(study.config, "advise"),
        model=study.config.model,
        model_class=type(study.objective.model).__name__,
        matrix=study.settings.matrix,
        loss=study.objective.loss.name,
        value=study.point.value,
        gradient_norm=study.point.gradient_norm,
        parameters=study.objective.parameters.size,
        terms=study.objective.num_terms,
    )


def _cuts(study: AdviseStudy, choices: Mapping[str, TensorChoice]) -> dict[str, Any]:
    """Parameter -> scheme, axis, block size along it and number of blocks; axis is null where the tensor is whole, and
    where its blocks are no equal slices along one axis.
    """
    space = study.objective.parameters
    cuts: dict[str, Any] = {}
    for name, shape in zip(space.names, space.shapes, strict=True):
        choice = choices[name]
        cut = study.partitions[choice.scheme].cuts()[name]
        blocks = len(np.unique(study.partitions[choice.scheme].assignment[space.slice(name)]))
        whole = choice.scheme == WHOLE or blocks == 1
        cuts[name] = {
            "shape": list(shape),
            "scheme": "whole" if whole else choice.scheme,
            "axis": None if whole or cut is None else cut.axis,
            "block_size": None if whole or cut is None else cut.block_size,
            "blocks": blocks,
        }
    return cuts


def _plain(choice: TensorChoice) -> dict[str, Any]:
    return {
        "scheme": choice.scheme,
        "energy": [choice.energy.value, choice.energy.stderr],
        "chance": choice.chance,
        "bits": [choice.bits.value, choice.bits.stderr],
        "share": choice.share,
    }
