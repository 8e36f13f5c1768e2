"""The spectrum of a user's own network: both ends, density, trace and norm, as a whole and block by block; resumable.

Results of steps are records of `hesscope.estimate`, one file each; the final one holds what a page needs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from hesscope.core.checks import require_choice
from hesscope.core.errors import InputError
from hesscope.core.memory import human_bytes, require_memory
from hesscope.core.rng import stream
from hesscope.estimate.block_traces import block_traces
from hesscope.estimate.density import SpectralDensity
from hesscope.estimate.eigenpairs import top_eigenpairs
from hesscope.estimate.estimate import Estimate
from hesscope.estimate.frobenius import frobenius_norm_squared
from hesscope.estimate.outliers import Outliers
from hesscope.estimate.sampling import EXACT_SIZE
from hesscope.estimate.spectral_density import spectral_density
from hesscope.estimate.spectrum_distance import jensen_shannon_distance
from hesscope.estimate.stopping import DEFAULT_MAX_PRODUCTS
from hesscope.estimate.trace import trace
from hesscope.objective import Objective
from hesscope.operators import GaussNewton, Hessian
from hesscope.partition import Partition
from hesscope.study import loading
from hesscope.study.analyze import Point, human_seconds, load_objective, settings_fingerprint, some_names
from hesscope.study.config import SpectrumConfig, StudyConfig, stored_config
from hesscope.study.steps import Progress, Reporter, Step, run_steps
from hesscope.study.store import Store

if TYPE_CHECKING:
    import xarray as xr

Array = npt.NDArray[np.float64]
# Called with (products done, products planned).
Counter = Callable[[int, int], None]

RESULT = "spectrum"
# Results of steps that only the final one needs begin with this.
PARTS = "block-"

MATRICES: dict[str, type[Hessian] | type[GaussNewton]] = {"hessian": Hessian, "gauss_newton": GaussNewton}

# A partition of more blocks gives way to layers; of more layers than that, spectra are measured of the largest.
MOST_BLOCKS = 64

# Eigenvectors are stored with the eigenvalues up to this many entries (400 MB in float32).
VECTOR_ENTRIES = 10**8

# Products that one end of the spectrum takes, and one estimate to 2 %, where nothing is hard: for the plan only.
TYPICAL_END, TYPICAL_PAIR, TYPICAL_ESTIMATE, TYPICAL_BLOCK = 60, 10, 200, 40


@dataclass(frozen=True)
class SpectrumStudy:
    """Everything that `spectrum` needs, loaded and checked.

    Attributes:
        scheme: what cuts the blocks; refused: blocks of the partition that was asked for, if they are too many, else 0.
        compared: numbers of the blocks whose spectra are measured.
        pairs: eigenpairs at either end.
    """

    config: StudyConfig
    folder: Path
    objective: Objective
    partition: Partition
    scheme: str
    refused: int
    compared: tuple[int, ...]
    pairs: int

    @property
    def settings(self) -> SpectrumConfig:
        """The section [spectrum] of the STUDY.toml."""
        return self.config.spectrum

    @cached_property
    def operator(self) -> Hessian | GaussNewton:
        """The matrix whose spectrum it is."""
        return MATRICES[self.settings.matrix](self.objective)

    @cached_property
    def store(self) -> Store:
        """Where the results go, under a fingerprint of all that they depend on."""
        settings = (RESULT, repr(self.settings), self.config.seed, self.config.model)
        return Store(self.folder, settings_fingerprint(self.objective, self.partition, settings, self.point))

    @cached_property
    def point(self) -> Point:
        """The function at the model's parameters."""
        return Point.of(self.objective)

    @cached_property
    def members(self) -> list[npt.NDArray[np.int64]]:
        """Positions of every block's parameters."""
        return self.partition.members()


def prepare_spectrum(config: StudyConfig, base: Path) -> SpectrumStudy:
    """Load and check everything; relative paths are relative to `base`.

    Raises:
        HesscopeError: whatever does not fit, in one line; nothing has been written then.
    """
    settings = config.spectrum
    require_choice("spectrum.matrix", settings.matrix, MATRICES)
    objective = load_objective(config, base)
    size = objective.parameters.size
    with loading.importable_from(base):
        partition = loading.load_partition(config.partition, objective.model)
    partition.require_fits(size)
    scheme, refused = config.partition, 0
    if "partition" not in config.model_fields_set or len(partition) > MOST_BLOCKS:
        refused = len(partition) if "partition" in config.model_fields_set else 0
        scheme, partition = "layer", Partition.by_layer(objective.model)
    if settings.eigenpairs > size and "eigenpairs" in settings.model_fields_set:
        raise InputError(
            f"spectrum.eigenpairs must be at most the number of parameters, {size:,}, got {settings.eigenpairs:,}"
        )
    pairs = min(settings.eigenpairs, size)
    if settings.max_products is not None and settings.max_products < 2 * pairs + 2:
        least = f"at least 2 * eigenpairs + 2 = {2 * pairs + 2}"
        raise InputError(f"spectrum.max_products must be {least}, got {settings.max_products}")
    largest_first = np.argsort(-np.asarray(partition.sizes), kind="stable")
    study = SpectrumStudy(
        config=config,
        folder=base / config.output,
        objective=objective,
        partition=partition,
        scheme=scheme,
        refused=refused,
        compared=tuple(sorted(int(number) for number in largest_first[:MOST_BLOCKS])),
        pairs=pairs,
    )
    require_memory(
        _least_bytes(study),
        objective.parameters.device,
        f"the spectrum of {size:,} parameters ({study.pairs} eigenpairs, {_steps(study, size)} steps)",
        "fewer eigenpairs and steps",
    )
    _ = study.operator  # refuses a loss of the user's own for the Gauss-Newton matrix
    return study


def describe_spectrum(study: SpectrumStudy) -> list[tuple[str, str]]:
    """What is about to be done: (what, how much) lines with parameters, blocks, products, time and memory."""
    objective, partition = study.objective, study.partition
    space = objective.parameters
    frozen = sum(p.numel() for p in objective.model.parameters() if not p.requires_grad)
    seconds = _time_products(study)
    typical, most = (sum(planned_products(study, limit)) for limit in (False, True))
    instead = f" ({study.config.partition} has {study.refused:,}, more than {MOST_BLOCKS})" if study.refused else ""
    beyond = f", spectra of the {len(study.compared)} largest" if len(study.compared) < len(partition) else ""
    lines = [
        ("model", f"{type(objective.model).__name__}, {space.size:,} parameters in {len(space.names)} tensors"),
        ("left out", f"{frozen:,} parameters with requires_grad=False" if frozen else ""),
        (
            "data",
            f"{objective.num_terms:,} loss terms in {objective.num_batches:,} batches, loss {objective.loss.name}",
        ),
        (
            "matrix",
            f"{study.operator.engine}, {study.pairs} eigenpairs at either end, {_quadrature(study, space.size)}",
        ),
        ("partition", f"{study.scheme}: {len(partition):,} blocks{instead}{beyond}"),
        ("unused", f"{some_names(objective.unused)} (their rows are exactly zero)" if objective.unused else ""),
        ("notes", "; ".join(objective.notes)),
        ("products", f"about {typical:,}, at most {most:,}"),
        (
            "time",
            f"about {human_seconds(seconds * typical)}, at most {human_seconds(seconds * most)} "
            f"({1000 * seconds:.2g} ms a product)",
        ),
        ("memory", f"at least {human_bytes(_least_bytes(study))} beyond the model and data, more if there is more"),
        ("results", str(study.folder)),
    ]
    return [line for line in lines if line[1]]


def run_spectrum(study: SpectrumStudy, report: Reporter) -> int:
    """Measure; returns how many steps were found done from an earlier run under the same settings."""
    store = study.store
    found = run_steps(spectrum_steps(study), store, report)
    store.clear(PARTS)
    return found


def spectrum_steps(study: SpectrumStudy) -> list[Step]:
    """One step for each end, the density, each of the estimates, each block; and those that put them together."""
    final = Step(RESULT, "putting the results together", 1.0, lambda _: _merge(study))
    if study.store.has(RESULT):
        return [final]
    ends, density, number, norm, traces, *blocks = planned_products(study, at_most=False)
    return [
        Step("largest", "largest eigenvalues", ends / 2, _step(lambda count: _end(study, "LA", count))),
        Step("smallest", "smallest eigenvalues", ends / 2, _step(lambda count: _end(study, "SA", count))),
        Step("density", "spectral density", density, _step(lambda count: _density(study, count).to_xarray())),
        Step("trace", "trace", number, _step(lambda count: _estimate(trace, study, count))),
        Step("norm", "Frobenius norm", norm, _step(lambda count: _estimate(frobenius_norm_squared, study, count))),
        Step("traces", "traces of blocks", traces, _step(lambda count: _block_traces(study, count))),
        *(
            Step(_name(block), f"spectrum of {study.partition.labels[block]}", cost, _block_step(study, block))
            for block, cost in zip(study.compared, blocks, strict=True)
        ),
        Step(f"{PARTS}distances", "distances between blocks", 0.05 * sum(blocks), lambda done: _distances(study, done)),
        final,
    ]


# --- steps ------------------------------------------------------------------------------------------------------------


def _name(block: int) -> str:
    return f"{PARTS}{block:04d}"


def _step(measure: Callable[[Counter], xr.Dataset]) -> Callable[[Progress], xr.Dataset]:
    """The step's work, with the seconds it took."""

    def compute(progress: Progress) -> xr.Dataset:
        start = time.perf_counter()
        result = measure(lambda done, planned: progress(done / max(planned, 1)))
        return result.assign_attrs(seconds=time.perf_counter() - start)

    return compute


def _end(study: SpectrumStudy, which: str, count: Counter) -> xr.Dataset:
    settings = study.settings
    found = top_eigenpairs(
        study.operator,
        study.pairs,
        which,
        rtol=settings.residual,
        max_products=settings.max_products,
        seed=study.config.seed,
        progress=count,
    )
    result = found.to_xarray()
    assignment = torch.from_numpy(study.partition.assignment.astype(np.int64)).to(found.vectors.device)
    shares = torch.zeros(len(study.partition), study.pairs, dtype=torch.float64, device=found.vectors.device)
    shares.index_add_(0, assignment, found.vectors.double().square())
    result["block_share"] = (("pair", "block"), shares.T.cpu().numpy())
    result = result.assign_coords(block=np.asarray(study.partition.labels, dtype=object))
    return result if found.vectors.numel() <= VECTOR_ENTRIES else result.drop_vars("eigenvector")


def _density(study: SpectrumStudy, count: Counter) -> SpectralDensity:
    settings, size = study.settings, study.objective.parameters.size
    return spectral_density(
        study.operator, settings.probes, _steps(study, size), seed=study.config.seed, progress=count
    )


def _estimate(measure: Callable[..., Estimate], study: SpectrumStudy, count: Counter) -> xr.Dataset:
    settings = study.settings
    found = measure(
        study.operator,
        rtol=settings.rtol,
        max_products=settings.max_products,
        seed=study.config.seed,
        progress=count,
    )
    return found.to_xarray()


def _block_traces(study: SpectrumStudy, count: Counter) -> xr.Dataset:
    settings = study.settings
    found = block_traces(
        study.operator,
        study.partition,
        rtol=settings.rtol,
        max_products=settings.max_products,
        seed=study.config.seed,
        progress=count,
    )
    return found.to_xarray()


def _block_step(study: SpectrumStudy, block: int) -> Callable[[Progress], xr.Dataset]:
    return _step(lambda count: _block(study, block, count))


def _block(study: SpectrumStudy, block: int, count: Counter) -> xr.Dataset:
    """Density and largest eigenvalue of a diagonal block, from products that leave the other parameters alone."""
    settings, positions = study.settings, study.members[block]
    operator, label = study.operator.restrict(positions), study.partition.labels[block]
    seed = block_seed(study, label)
    probes, steps = settings.block_probes, _steps(study, len(positions), of_block=True)
    density = spectral_density(operator, probes, steps, seed, lambda done, whole: count(done, 2 * whole))
    top = top_eigenpairs(operator, 1, rtol=settings.residual, seed=seed)
    result = density.to_xarray()
    result["largest"], result["residual"] = top.values[0], top.residuals[0]
    result["converged"] = bool(top.converged[0])
    return result.assign_attrs(all_products=density.products + top.products)


def block_seed(study: SpectrumStudy, label: str) -> int:
    """Blocks have probes of their own: equal ones would make the errors of equal blocks cancel in their distance."""
    return int(stream(study.config.seed, "spectrum of a block", label).integers(2**62))


def _distances(study: SpectrumStudy, progress: Progress) -> xr.Dataset:
    """Jensen-Shannon distances between the blocks' spectra, with errors, and what noise alone would give."""
    import xarray as xr

    densities = [SpectralDensity.from_xarray(study.store.require(_name(block))) for block in study.compared]
    count = len(densities)
    distance, stderr = np.zeros((count, count)), np.zeros((count, count))
    couples = list(combinations(range(count), 2))
    for done, (i, j) in enumerate(couples):
        distance[i, j] = distance[j, i] = jensen_shannon_distance(densities[i], densities[j])
        stderr[i, j] = stderr[j, i] = distance_error(densities[i], densities[j])
        progress((done + 1) / len(couples))
    return xr.Dataset(
        {
            "distance": (("one", "other"), distance),
            "distance_stderr": (("one", "other"), stderr),
            "noise": (("one",), np.array([noise_distance(density) for density in densities])),
        }
    )


def distance_error(a: SpectralDensity, b: SpectralDensity) -> float:
    """Standard error of a distance, each probe being left out in turn; 0 between exact spectra."""
    if a.exact and b.exact:
        return 0.0
    probes = np.arange(a.probes)
    width = max(a.default_bandwidth, b.default_bandwidth)
    if width == 0:
        return 0.0
    without = np.array(
        [
            jensen_shannon_distance(_some_probes(a, probes != left), _some_probes(b, probes != left), width)
            for left in probes
        ]
    )
    return float(np.sqrt((len(probes) - 1) * without.var()))


def noise_distance(density: SpectralDensity) -> float:
    """Distance that two estimates of this one spectrum would have: that of its two halves, which have half the probes.

    The divergence is of second order in the error, so that its root falls with the root of the number of probes.
    """
    width = density.default_bandwidth
    if density.exact or width == 0:
        return 0.0
    first = np.arange(density.probes) < density.probes // 2
    halves = _some_probes(density, first), _some_probes(density, ~first)
    return jensen_shannon_distance(*halves, width) / float(np.sqrt(2))


def _some_probes(density: SpectralDensity, chosen: npt.NDArray[np.bool_]) -> SpectralDensity:
    """The estimate of some of the probes; an exact one has no probes to choose from."""
    if density.exact:
        return density
    return replace(density, nodes=density.nodes[chosen], weights=density.weights[chosen])


# --- putting together -------------------------------------------------------------------------------------------------


def _merge(study: SpectrumStudy) -> xr.Dataset:
    """Everything that was measured, and what follows from it, in one data set."""
    import xarray as xr

    store, partition = study.store, study.partition
    ends = [store.require(name) for name in ("largest", "smallest")]
    density = store.require("density")
    number, norm = (Estimate.from_xarray(store.require(name)) for name in ("trace", "norm"))
    traces = Estimate.from_xarray(store.require("traces"))
    blocks = [store.require(_name(block)) for block in study.compared]
    distances = store.require(f"{PARTS}distances")
    quadrature = SpectralDensity.from_xarray(density)
    outliers = quadrature.outliers()
    share, share_stderr = trace_shares(traces)
    table = quantities(ends, quadrature, number, norm, outliers)
    tops = np.full((3, len(partition)), np.nan)
    for block, result in zip(study.compared, blocks, strict=True):
        tops[:, block] = [float(result[name]) for name in ("largest", "residual", "converged")]
    nodes, weights = _padded(blocks)
    steps = {"largest": ends[0], "smallest": ends[1], "density": density}
    steps |= {name: store.require(name) for name in ("trace", "norm", "traces")}
    met = [bool(end["converged"].all()) for end in ends] + [True]
    met += [bool(store.require(name).attrs["converged"]) for name in ("trace", "norm", "traces")]
    met.append(all(bool(block["converged"]) for block in blocks))
    spent = [int(result.attrs["products"]) for result in steps.values()]
    within = ("end", "pair")
    result = xr.Dataset(
        {
            **{
                name: (within, np.stack([end[name].to_numpy() for end in ends]))
                for name in ("eigenvalue", "residual", "converged")
            },
            "eigenvector_share": ((*within, "block"), np.stack([end["block_share"].to_numpy() for end in ends])),
            "node": (("probe", "step"), quadrature.nodes),
            "weight": (("probe", "step"), quadrature.weights),
            "outlier": (("outlier_number",), outliers.values),
            "value": (("quantity",), np.array([entry[0] for entry in table.values()])),
            "error": (("quantity",), np.array([entry[1] for entry in table.values()])),
            "block_size": (("block",), np.asarray(partition.sizes)),
            "block_trace": (("block",), np.asarray(traces.value)),
            "block_trace_stderr": (("block",), np.asarray(traces.stderr)),
            "block_share": (("block",), share),
            "block_share_stderr": (("block",), share_stderr),
            "block_largest": (("block",), tops[0]),
            "block_residual": (("block",), tops[1]),
            "block_converged": (("block",), tops[2]),
            "block_node": (("compared", "block_probe", "block_step"), nodes),
            "block_weight": (("compared", "block_probe", "block_step"), weights),
            "block_exact": (("compared",), np.array([int(block.attrs["exact"]) for block in blocks])),
            "distance": (("compared", "other"), distances["distance"].to_numpy()),
            "distance_stderr": (("compared", "other"), distances["distance_stderr"].to_numpy()),
            "noise": (("compared",), distances["noise"].to_numpy()),
            "products": (("measured",), np.array([*spent, sum(int(b.attrs["all_products"]) for b in blocks)])),
            "tolerance_met": (("measured",), np.array(met)),
            "seconds": (("measured",), np.array([*_seconds(steps.values()), sum(_seconds(blocks))])),
        },
        coords={
            "end": np.asarray(["largest", "smallest"], dtype=object),
            "block": np.asarray(partition.labels, dtype=object),
            "compared": np.asarray([partition.labels[block] for block in study.compared], dtype=object),
            "quantity": np.asarray(list(table), dtype=object),
            "measured": np.asarray([*steps, "blocks"], dtype=object),
        },
    )
    messages = [*(str(each.attrs["message"]) for each in steps.values()), _blocks_message(blocks)]
    engines = [*(str(each.attrs["engine"]) for each in steps.values()), str(blocks[0].attrs["engine"])]
    result["message"] = ("measured", np.asarray(messages, dtype=object))
    result["engine"] = ("measured", np.asarray(engines, dtype=object))
    origin = ("dimension", "exact", "dtype", "device", "data_fingerprint")
    return result.assign_attrs(
        **{key: density.attrs[key] for key in origin},
        record="Spectrum",
        seed=study.config.seed,
        matrix=study.settings.matrix,
        engine=study.operator.engine,
        explanation=study.operator.explain(),
        notes=list(study.objective.notes),
        block_trace_sum=float(np.sum(traces.value)),
        block_trace_sum_stderr=trace_sum_error(traces),
        bulk_lower=outliers.lower,
        bulk_upper=outliers.upper,
        criterion=outliers.criterion,
        model=study.config.model,
        model_class=type(study.objective.model).__name__,
        config=stored_config(study.config, "spectrum"),
        loss=study.objective.loss.name,
        partition=study.scheme,
        refused=study.refused,
        unused=list(study.objective.unused),
        value=study.point.value,
        gradient_norm=study.point.gradient_norm,
        parameters=study.objective.parameters.size,
        terms=study.objective.num_terms,
        batches=study.objective.num_batches,
    )


def quantities(
    ends: Sequence[xr.Dataset], density: SpectralDensity, number: Estimate, norm: Estimate, outliers: Outliers
) -> dict[str, tuple[float, float]]:
    """Name -> (value, standard error), of eigenvalues a bound on the error; nan where there is none."""
    (largest, r_largest), (smallest, r_smallest) = (
        (float(end["eigenvalue"][at]), float(end["residual"][at])) for end, at in zip(ends, (0, -1), strict=True)
    )
    t, t_error, F, F_error = (float(entry) for each in (number, norm) for entry in (each.value, each.stderr))
    rank, rank_error = np.nan, np.nan
    if F > 0:
        # Trace and norm come from independent vectors.
        rank = t**2 / F
        rank_error = float(np.hypot(2 * t * t_error / F, rank * F_error / F))
    spread, spread_error = np.nan, np.nan
    # An eigenvalue within the error of zero has no ratio.
    floor = float(np.finfo(density.provenance.dtype).eps) * max(abs(largest), abs(smallest)) * density.dimension
    if abs(smallest) > max(r_smallest, floor):
        spread = largest / abs(smallest)
        spread_error = (r_largest + abs(spread) * r_smallest) / abs(smallest)
    # The copies of an outlier are known only where all eigenvalues are.
    count = round(outliers.mass) if density.exact else outliers.count
    return {
        "largest": (largest, r_largest),
        "smallest": (smallest, r_smallest),
        "spread": (spread, spread_error),
        "trace": (t, t_error),
        "norm_squared": (F, F_error),
        "effective_rank": (rank, rank_error),
        "negative_mass": negative_mass(density),
        "outliers": (float(count), 0.0 if density.exact else np.nan),
        "outlier_mass": (outliers.mass, outliers.mass_stderr),
    }


def negative_mass(density: SpectralDensity) -> tuple[float, float]:
    """Share of the negative eigenvalues in the sum of all eigenvalues' magnitudes, and its standard error.

    Magnitudes rather than numbers: how many of the eigenvalues near zero lie on which side, no quadrature can tell.
    """
    magnitudes = (density.weights * np.abs(density.nodes)).sum(axis=1)
    negative = (density.weights * np.maximum(-density.nodes, 0)).sum(axis=1)
    whole = float(magnitudes.sum())
    if whole == 0:
        return float("nan"), float("nan")
    share = float(negative.sum()) / whole
    if density.exact:
        return share, 0.0
    deviations = (negative - share * magnitudes) / magnitudes.mean()
    return share, float(np.sqrt((deviations**2).sum() / (density.probes * (density.probes - 1))))


def trace_shares(traces: Estimate) -> tuple[Array, Array]:
    """Share of every block in the sum of all traces [B], with standard errors."""
    values = np.asarray(traces.value, dtype=np.float64)
    whole = values.sum()
    if whole == 0:
        return np.full(len(values), np.nan), np.full(len(values), np.nan)
    shares = values / whole
    if traces.samples is None:
        known = traces.degrees == 0
        return shares, np.zeros(len(values)) if known else np.asarray(traces.stderr) / abs(whole)
    deviations = (traces.samples - shares * traces.samples.sum(axis=1, keepdims=True)) / whole
    return shares, deviations.std(axis=0, ddof=1) / np.sqrt(len(deviations))


def trace_sum_error(traces: Estimate) -> float:
    """Standard error of the sum of all traces; nan where the samples were not kept."""
    if traces.samples is None:
        return 0.0 if traces.degrees == 0 else float("nan")
    sums = traces.samples.sum(axis=1)
    return float(sums.std(ddof=1) / np.sqrt(len(sums)))


def _padded(blocks: Sequence[xr.Dataset]) -> tuple[Array, Array]:
    """Nodes and weights [blocks, probes, steps] of spectra with different numbers of steps: zero weights at the end."""
    longest = max(block.sizes["step"] for block in blocks)
    found = []
    for name in ("node", "weight"):
        arrays = [block[name].to_numpy() for block in blocks]
        found.append(np.stack([np.pad(array, ((0, 0), (0, longest - array.shape[1]))) for array in arrays]))
    return found[0], found[1]


def _seconds(results: Any) -> list[float]:
    return [float(result.attrs["seconds"]) for result in results]


def _blocks_message(blocks: Sequence[xr.Dataset]) -> str:
    exact = sum(int(block.attrs["exact"]) for block in blocks)
    converged = sum(bool(block["converged"]) for block in blocks)
    return f"{len(blocks)} spectra, {exact} of them exact; {converged} of {len(blocks)} largest eigenvalues converged"


# --- the plan ---------------------------------------------------------------------------------------------------------


def _steps(study: SpectrumStudy, size: int, of_block: bool = False) -> int:
    """Steps of the quadrature, or all the rows of a matrix that is so small that taking it whole costs no more."""
    settings = study.settings
    probes, steps = settings.probes, settings.steps
    if of_block:
        probes, steps = settings.block_probes, settings.block_steps
    return size if size <= min(probes * steps, EXACT_SIZE) else steps


def _quadrature(study: SpectrumStudy, size: int) -> str:
    steps = _steps(study, size)
    return "all eigenvalues" if steps >= size else f"density from {study.settings.probes} probes of {steps} steps"


def planned_products(study: SpectrumStudy, at_most: bool) -> list[int]:
    """Products of both ends, density, trace, norm, traces of blocks, and each block: about, or at most."""
    settings, size, k = study.settings, study.objective.parameters.size, study.pairs
    budget = settings.max_products or max(DEFAULT_MAX_PRODUCTS, 2 * size if size <= EXACT_SIZE else 0)
    end, estimate = settings.max_products or 100 * (k + 20), budget
    if not at_most:
        end, estimate = min(size, TYPICAL_END + TYPICAL_PAIR * k), min(size, budget, TYPICAL_ESTIMATE)
    blocks = []
    for block in study.compared:
        length = study.partition.sizes[block]
        steps = _steps(study, length, of_block=True)
        top = 100 * 21 if at_most else TYPICAL_BLOCK
        blocks.append((length if steps >= length else settings.block_probes * steps) + min(length, top))
    steps = _steps(study, size)
    return [2 * end, size if steps >= size else settings.probes * steps, estimate, estimate, estimate, *blocks]


def _time_products(study: SpectrumStudy) -> float:
    """Seconds a product takes, measured on one pass after the engine was settled."""
    operator = study.operator
    columns = min(operator.columns_per_pass, study.settings.probes)
    V = torch.zeros(operator.shape[0], columns, dtype=operator.dtype, device=operator.device)
    _ = operator @ V
    start = time.perf_counter()
    _ = (operator @ V).sum().item()
    return (time.perf_counter() - start) / columns


def _least_bytes(study: SpectrumStudy) -> int:
    """Memory of one pass of products and of the smallest bases that work."""
    objective = study.objective
    size = objective.parameters.size
    item = torch.empty(0, dtype=objective.parameters.dtype).element_size()
    steps = min(_steps(study, size), size)
    vectors = max(steps + 6, min(size, 2 * study.pairs + 12) + 2 * study.pairs + 10)
    matrix = 3 * size * size * 8 if steps >= size else 0
    return 3 * objective.graph_bytes + (vectors + 6) * size * item + matrix
