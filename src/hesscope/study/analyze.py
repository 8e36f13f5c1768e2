"""The analysis of a user's own network: block energies of H, G and R in one partition, resumable part by part."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hesscope._version import __version__
from hesscope.core.memory import human_bytes, require_memory
from hesscope.core.rng import normal, stream
from hesscope.estimate.block_energies import (
    EXACT_SIZE,
    Method,
    choose_method,
    energies_of_columns,
    energies_provenance,
    probe_samples,
    with_difference,
)
from hesscope.estimate.energies import BlockEnergies, SplitEnergies
from hesscope.objective import Objective
from hesscope.objective.batches import fingerprint
from hesscope.objective.losses import OutputLoss
from hesscope.operators import GaussNewton, Hessian, Operator
from hesscope.partition import Partition
from hesscope.study import loading
from hesscope.study.config import StudyConfig, stored_config
from hesscope.study.steps import Progress, Reporter, Step, run_steps
from hesscope.study.store import Store

if TYPE_CHECKING:
    import xarray as xr

# A study is cut into about so many parts, each stored when done: a killed run loses at most one of them.
PARTS = 40
RESULT = "energies"


@dataclass(frozen=True)
class Point:
    """What an objective is at its parameters: L, the gradient's norm, and its product with a fixed random vector."""

    value: float
    gradient_norm: float
    gradient_product: float

    @classmethod
    def of(cls, objective: Objective) -> Point:
        """One pass over the data for the value, and one for the gradient."""
        gradient = objective.gradient().double().cpu()
        product = float(gradient @ normal((len(gradient),), stream(0, "gradient summary")))
        return cls(objective.value(), float(gradient.norm()), product)


@dataclass(frozen=True)
class Study:
    """Everything that `analyze` needs, loaded and checked."""

    config: StudyConfig
    folder: Path
    objective: Objective
    partition: Partition
    method: Method

    @cached_property
    def operators(self) -> tuple[Operator, ...]:
        """The Hessian, and the Gauss-Newton matrix where the loss has one."""
        if isinstance(self.objective.loss, OutputLoss):
            return Hessian(self.objective), GaussNewton(self.objective)
        return (Hessian(self.objective),)

    @property
    def part_names(self) -> tuple[str, ...]:
        """Names of the matrices measured."""
        return ("H", "G", "R") if len(self.operators) == 2 else ("H",)

    @property
    def keeps_matrix(self) -> bool:
        """Whether the dense Hessian and its eigenvalues are stored too: exact and small."""
        return self.method.name == "exact" and self.objective.parameters.size <= EXACT_SIZE

    @cached_property
    def store(self) -> Store:
        """Where the results go, under a fingerprint of all that they depend on."""
        settings = (repr(self.method), self.config.seed, self.config.partition, self.config.model)
        return Store(self.folder, settings_fingerprint(self.objective, self.partition, settings, self.point))

    @cached_property
    def point(self) -> Point:
        """The function at the model's parameters."""
        return Point.of(self.objective)


def prepare(config: StudyConfig, base: Path) -> Study:
    """Load and check everything; relative paths are relative to `base`.

    Raises:
        HesscopeError: whatever does not fit, in one line; nothing has been written then.
    """
    objective = load_objective(config, base)
    with loading.importable_from(base):
        partition = loading.load_partition(config.partition, objective.model)
    partition.require_fits(objective.parameters.size)
    method = choose_method(objective.parameters.size, len(partition), config.method, config.probes)
    study = Study(config, base / config.output, objective, partition, method)
    require_memory(
        expected_bytes(study),
        objective.parameters.device,
        f"this study ({len(partition):,} blocks, {method.name})",
        "fewer probes or a coarser partition",
    )
    return study


def load_objective(config: StudyConfig, base: Path) -> Objective:
    """The model on its data, as a STUDY.toml in the folder `base` describes them; half precision becomes float32."""
    with loading.importable_from(base):
        checkpoint = None if config.checkpoint is None else base / config.checkpoint
        model = loading.load_model(config.model, config.model_arguments, checkpoint, base)
        data = loading.load_data(config.data, config.data_arguments, config.loss, base, (config.model, model))
        return Objective(model, loading.load_loss(config.loss), data)


def settings_fingerprint(objective: Objective, partition: Partition, settings: tuple[Any, ...], point: Point) -> str:
    """Hash of all that a measurement depends on.

    Values and gradients stand for what has no content to hash: the code of the model and of a loss callable.
    """
    loss = objective.loss
    options = vars(loss.module) if isinstance(loss, OutputLoss) else {}
    content = {
        "versions": (__version__, torch.__version__),
        "settings": settings,
        "model": {**dict(objective.model.named_parameters()), **dict(objective.model.named_buffers())},
        "loss": (loss.name, {name: repr(value) for name, value in options.items() if name[0] != "_"}),
        "loss_weights": dict(loss.module.named_buffers()) if isinstance(loss, OutputLoss) else {},
        "data": objective.data_fingerprint,
        "partition": (*partition.labels, partition.assignment),
        "function": (f"{point.value:.5e}", [f"{point.gradient_norm:.3e}", f"{point.gradient_product:.3e}"]),
    }
    return fingerprint(content)


def describe(study: Study) -> list[tuple[str, str]]:
    """What is about to be done: (what, how much) lines with parameters, blocks, products, time and memory."""
    objective, partition, method = study.objective, study.partition, study.method
    space = objective.parameters
    frozen = sum(p.numel() for p in objective.model.parameters() if not p.requires_grad)
    unmatched = sum(partition.sizes[partition.labels.index(label)] for label in partition.unmatched)
    seconds, products = time_products(study), method.products * len(study.operators)
    how = "one per parameter" if method.name == "exact" else f"{method.probes} probes of each block"
    lines = [
        ("model", f"{type(objective.model).__name__}, {space.size:,} parameters in {len(space.names)} tensors"),
        (
            "data",
            f"{objective.num_terms:,} loss terms in {objective.num_batches:,} batches, loss {objective.loss.name}",
        ),
        ("partition", f"{study.config.partition}: {len(partition):,} blocks"),
        ("unmatched", f"{some_names(partition.unmatched)} ({unmatched:,} parameters in single blocks)"),
        ("unused", some_names(objective.unused) + (" (their rows are exactly zero)" if objective.unused else "")),
        ("method", f"{method.name}: {products:,} products ({how}; {' and '.join(study.part_names[:2])})"),
        ("time", f"about {human_seconds(seconds * products)} ({1000 * seconds:.2g} ms a product)"),
        ("memory", f"about {human_bytes(expected_bytes(study))} beyond the model and data"),
        ("results", str(study.folder)),
    ]
    if frozen:
        lines.insert(1, ("left out", f"{frozen:,} parameters with requires_grad=False"))
    return [line for line in lines if line[1] != "none" and not line[1].startswith("none (")]


def time_products(study: Study) -> float:
    """Seconds a product takes, measured on one pass of each operator."""
    size = study.objective.parameters.size
    elapsed = []
    for operator in study.operators:
        columns = min(operator.columns_per_pass, study.method.products)
        V = torch.zeros(size, columns, dtype=operator.dtype, device=operator.device)
        start = time.perf_counter()
        _ = (operator @ V).sum().item()
        elapsed.append((time.perf_counter() - start) / columns)
    return sum(elapsed) / len(elapsed)


def expected_bytes(study: Study) -> int:
    """Memory of one pass of products, of the energies and, if it is kept, of the matrix."""
    size, blocks = study.objective.parameters.size, len(study.partition)
    item = torch.empty(0, dtype=study.objective.parameters.dtype).element_size()
    columns = min(operator.columns_per_pass for operator in study.operators)
    one_pass = columns * (2 * study.objective.graph_bytes + 6 * size * item)
    energies = 2 * len(study.part_names) * max(study.method.probes, 1) * blocks * blocks * 8
    matrix = 3 * size * size * item if study.keeps_matrix else 0
    return one_pass + energies + matrix


def run(study: Study, report: Reporter) -> int:
    """Measure; returns how many steps were found done from an earlier run under the same settings."""
    store = study.store
    ranges = _ranges(study)
    names = [f"part-{number:04d}" for number in range(len(ranges))]
    steps = [
        Step(name, "measuring block energies", float(len(covered)), _part(study, covered))
        for name, covered in zip(names, ranges, strict=True)
    ]
    if store.has(RESULT):
        steps = []
    final = Step(RESULT, "putting the results together", 0.02 * study.method.products, lambda _: _merge(study, names))
    found = run_steps([*steps, final], store, report)
    store.clear("part-")
    return found


def human_seconds(seconds: float) -> str:
    """'3 min 20 s' and the like."""
    if seconds < 1:
        return "a second"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def _ranges(study: Study) -> list[range]:
    """Columns (exact) or probes of each part; fixed by the study alone, so that a resumed run gives the same bits."""
    whole = study.method.products if study.method.name == "exact" else study.method.probes
    grain = min(op.columns_per_pass for op in study.operators) if study.method.name == "exact" else 1
    step = grain * max(1, -(-whole // (PARTS * grain)))
    return [range(start, min(start + step, whole)) for start in range(0, whole, step)]


def _part(study: Study, covered: range) -> Callable[[Progress], xr.Dataset]:
    compute = _exact_part if study.method.name == "exact" else _probes_part
    return lambda progress: compute(study, covered, progress)


def _exact_part(study: Study, covered: range, progress: Progress) -> xr.Dataset:
    import xarray as xr

    operators, partition = study.operators, study.partition
    step = min(operator.columns_per_pass for operator in operators)
    energies = np.zeros((len(study.part_names), len(partition), len(partition)))
    kept = []
    for start in range(covered.start, covered.stop, step):
        chunk = slice(start, min(start + step, covered.stop))
        columns = with_difference([operator.columns(chunk) for operator in operators])
        energies += np.stack([energies_of_columns(part, partition, chunk) for part in columns])
        if study.keeps_matrix:
            kept.append(columns[0].double().cpu().numpy())
        progress((chunk.stop - covered.start) / len(covered))
    result = xr.Dataset({"energy": (("part", "row_block", "column_block"), energies)})
    if kept:
        result["hessian_columns"] = (("parameter", "column"), np.concatenate(kept, axis=1))
    return result


def _probes_part(study: Study, covered: range, progress: Progress) -> xr.Dataset:
    import xarray as xr

    samples = probe_samples(
        study.operators, study.partition, study.config.seed, covered, lambda done, whole: progress(done / whole)
    )
    return xr.Dataset({"energy_samples": (("part", "sample", "row_block", "column_block"), np.stack(samples))})


def _merge(study: Study, names: list[str]) -> xr.Dataset:
    partition, hessian = study.partition, study.operators[0]
    whole = (*study.operators, hessian - study.operators[1]) if len(study.operators) == 2 else study.operators
    provenances = [energies_provenance(operator, study.method, study.config.seed) for operator in whole]
    named = (partition.labels, partition.sizes)
    if study.method.name == "exact":
        total = np.zeros((len(study.part_names), len(partition), len(partition)))
        for name in names:  # one by one: a part is as large as the result
            total += study.store.require(name)["energy"].to_numpy()
        merged = [BlockEnergies.exact(*named, *each) for each in zip(total, provenances, strict=True)]
    else:
        samples = np.concatenate([study.store.require(name)["energy_samples"].to_numpy() for name in names], axis=1)
        merged = [BlockEnergies.from_samples(*named, *each) for each in zip(samples, provenances, strict=True)]
    result = SplitEnergies(dict(zip(study.part_names, merged, strict=True))).to_xarray()
    if study.keeps_matrix:
        columns = [study.store.require(name)["hessian_columns"].to_numpy() for name in names]
        matrix = np.concatenate(columns, axis=1)
        matrix = (matrix + matrix.T) / 2
        result["hessian"] = (("parameter", "parameter_"), matrix.astype(np.float32))
        result["eigenvalue"] = ("index", torch.linalg.eigvalsh(torch.from_numpy(matrix)).numpy())
        result["block_of_parameter"] = ("parameter", partition.assignment)
    return result.assign_attrs(
        model=study.config.model,
        config=stored_config(study.config, "analyze"),
        model_class=type(study.objective.model).__name__,
        loss=study.objective.loss.name,
        partition=study.config.partition,
        unmatched=list(partition.unmatched),
        unused=list(study.objective.unused),
        value=study.point.value,
        gradient_norm=study.point.gradient_norm,
        parameters=study.objective.parameters.size,
        terms=study.objective.num_terms,
        method=study.method.name,
        probes=study.method.probes,
    )


def some_names(names: tuple[str, ...]) -> str:
    """The first few of them, and how many more."""
    if not names:
        return "none"
    more = f" and {len(names) - loading.NAMES_SHOWN} more" if len(names) > loading.NAMES_SHOWN else ""
    return ", ".join(names[: loading.NAMES_SHOWN]) + more
