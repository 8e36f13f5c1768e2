"""What is measured at a step: one small record for each kind of measurement, and the function that takes them all."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from hesscope.core.checks import require_choice, require_positive_int
from hesscope.core.errors import InputError
from hesscope.core.records import Provenance
from hesscope.dynamics.first_order import first_order
from hesscope.dynamics.snapshot import UNKNOWN, EndEigenvalues, HeatMap, Snapshot
from hesscope.dynamics.turned import Turned
from hesscope.dynamics.whole import DENSE_SIZE, Whole, whole
from hesscope.estimate.block_energies import DUAL, EXACT_SIZE, METHODS, block_energies
from hesscope.estimate.block_spectra import block_spectra
from hesscope.estimate.eigenpairs import top_eigenpairs
from hesscope.estimate.energies import SplitEnergies
from hesscope.estimate.estimate import Estimate
from hesscope.estimate.spectral_density import spectral_density
from hesscope.estimate.split import split_energies
from hesscope.estimate.trace import trace
from hesscope.objective import Objective
from hesscope.objective.losses import OutputLoss
from hesscope.operators import GaussNewton, Hessian, Operator
from hesscope.partition import Partition

# Spectra of more blocks than this are not compared pair by pair.
BLOCKS_COMPARED = 64


@dataclass(frozen=True)
class Energies:
    """Block energies of H, G and R (see hesscope.estimate.split_energies); with method "dual" those of G alone."""

    method: str = "auto"
    probes: int | None = None
    rtol: float = 0.05
    max_products: int | None = None

    def __post_init__(self) -> None:
        require_choice("method", self.method, (*METHODS, DUAL))


@dataclass(frozen=True)
class Eigenvalues:
    """The k largest eigenvalues of H, to residuals of `rtol` relative to each, and the `smallest` most negative ones.

    Residuals of these are `rtol` relative to their distance from the largest one: negative curvature that is nothing
    beside the largest eigenvalue is not worth the products that its own digits take.
    """

    k: int = 5
    smallest: int = 1
    rtol: float = 1e-3

    def __post_init__(self) -> None:
        require_positive_int("k", self.k)
        require_positive_int("smallest", self.smallest)
        if not 0 < self.rtol < 1:
            raise InputError(f"rtol must lie between 0 and 1, got {self.rtol!r}")


@dataclass(frozen=True)
class Trace:
    """Trace of H, to a standard error of `rtol`."""

    rtol: float = 0.02


@dataclass(frozen=True)
class Density:
    """Spectral density of H by stochastic Lanczos quadrature."""

    probes: int = 4
    steps: int = 40


@dataclass(frozen=True)
class Heterogeneity:
    """Mean Jensen-Shannon distance between the spectra of the diagonal blocks (of tensors, for more than 64 blocks)."""

    probes: int = 4
    steps: int = 30


@dataclass(frozen=True)
class Heatmap:
    """A picture of |H| of at most `pixels` x `pixels`; for up to 4096 parameters, since the whole matrix is made."""

    pixels: int = 400

    def __post_init__(self) -> None:
        require_positive_int("pixels", self.pixels)


Measure: TypeAlias = Energies | Eigenvalues | Trace | Density | Heterogeneity | Heatmap
# Names of the measures, as fields of a Snapshot.
MEASURES: dict[str, Callable[[], Measure]] = {
    "energies": Energies,
    "eigenvalues": Eigenvalues,
    "trace": Trace,
    "density": Density,
    "heterogeneity": Heterogeneity,
    "heatmap": Heatmap,
}


@dataclass(frozen=True)
class Moment:
    """A step of training: what a snapshot says beside what is measured (see Snapshot)."""

    step: int
    learning_rate: float = UNKNOWN
    stability_limit: float = UNKNOWN
    training_seconds: float = 0.0


@dataclass(frozen=True, eq=False)
class Before:
    """The top eigenvectors [P, k] at the step measured before, if there are any: the next search begins there."""

    step: int = -1
    vectors: Tensor | None = None


def checked_measures(measures: Sequence[str | Measure]) -> dict[str, Measure]:
    """Measures by name.

    Raises:
        InputError: an unknown name, something else than a measure, or one twice.
    """
    if isinstance(measures, str):
        raise InputError(f"measures must be a list, such as [{measures!r}], got {measures!r}")
    found: dict[str, Measure] = {}
    for given in measures:
        if isinstance(given, str):
            require_choice("each of measures", given, MEASURES)
        names = [name for name, kind in MEASURES.items() if given == name or type(given) is kind]
        if not names:
            raise InputError(f"each of measures must be a name or a measure of hesscope.dynamics, got {given!r}")
        if names[0] in found:
            raise InputError(f"{names[0]!r} is twice among the measures")
        found[names[0]] = MEASURES[names[0]]() if isinstance(given, str) else given
    return found


def require_measurable(measures: Mapping[str, Measure], objective: Objective) -> None:
    """Raise InputError for a measure that this objective cannot have."""
    size = objective.parameters.size
    if "heatmap" in measures and size > DENSE_SIZE:
        raise InputError(f"a heatmap needs the whole matrix and takes up to {DENSE_SIZE:,} parameters, got {size:,}")
    asked = measures.get("energies")
    if isinstance(asked, Energies) and asked.method == DUAL and not isinstance(objective.loss, OutputLoss):
        raise InputError(
            "energies of method 'dual' are of the Gauss-Newton matrix, which a loss callable does not have"
        )


def measure(
    objective: Objective,
    partition: Partition,
    measures: Mapping[str, Measure],
    moment: Moment,
    before: Before,
    seed: int,
) -> tuple[Snapshot, Tensor | None]:
    """Take all measures at the parameters that the objective's model has now.

    The same seed at every step: what is sampled is sampled with the same random numbers, and differences between steps
    are less noisy than the values.

    Returns:
        The snapshot, and the top eigenvectors [P, k] if they were asked for.

    Raises:
        HesscopeError: whatever the single measures raise; DataError if training has diverged.
    """
    start = time.perf_counter()
    first = first_order(objective)
    seconds = {"first order": time.perf_counter() - start}
    start = time.perf_counter()
    H = Hessian(objective)
    known = _whole(H, measures)
    hessian = H if known is None else known.hessian
    seconds |= {} if known is None else {"matrix": time.perf_counter() - start}
    found: dict[str, Any] = dict.fromkeys(MEASURES)
    vectors = None
    for name, asked in measures.items():
        start = time.perf_counter()
        if isinstance(asked, Energies):
            found[name] = _energies(H, partition, asked, seed, known)
        elif isinstance(asked, Eigenvalues):
            found[name], vectors = _eigenvalues(hessian, asked, first.gradient, before, seed)
        elif isinstance(asked, Trace):
            found[name] = trace(hessian, rtol=asked.rtol, seed=seed)
        elif isinstance(asked, Density):
            found[name] = spectral_density(hessian, asked.probes, asked.steps, seed=seed)
        elif isinstance(asked, Heterogeneity):
            found[name] = _heterogeneity(hessian, partition, asked, seed)
        else:
            found[name] = _heatmap(hessian, objective, asked)
        seconds[name] = time.perf_counter() - start
    space = objective.parameters
    provenance = Provenance(
        engine="tracker",
        dtype=str(space.dtype).removeprefix("torch."),
        device=str(space.device),
        data_fingerprint=objective.data_fingerprint,
        seed=seed,
    )
    snapshot = Snapshot(
        step=moment.step,
        value=first.value,
        gradient_norm=float(torch.linalg.vector_norm(first.gradient, dtype=torch.float64)),
        mean_squared_residual=first.mean_squared_residual,
        accuracy=first.accuracy,
        learning_rate=moment.learning_rate,
        stability_limit=moment.stability_limit,
        layers=layers_of_blocks(partition) if "energies" in measures else (),
        seconds=seconds,
        training_seconds=moment.training_seconds,
        provenance=provenance,
        **found,
    )
    return snapshot, vectors


def layers_of_blocks(partition: Partition) -> tuple[str, ...]:
    """[B] the layer (the module that owns the tensors) each block lies in; its own label where it lies in several."""
    if "layer" not in partition.levels:
        return partition.labels
    layer_of = {label: layer for layer, labels in partition.groups("layer").items() for label in labels}
    return tuple(layer_of[label] for label in partition.labels)


def _whole(H: Hessian, measures: Mapping[str, Measure]) -> Whole | None:
    """The matrix, where that is less work than what the measures would do one by one.

    Energies alone are made strip by strip, without it.
    """
    if set(measures) <= {"energies"} or H.shape[0] > DENSE_SIZE:
        return None
    asked = measures.get("energies")
    exact = isinstance(asked, Energies) and _is_exact(H, asked)
    if exact or "heatmap" in measures or H.has_closed_form:
        return whole(H, split=exact)
    return None


def _is_exact(H: Hessian, asked: Energies) -> bool:
    """Whether energies are those of the whole matrix, or of the closed form that makes it."""
    if asked.probes is not None or asked.method not in ("auto", "exact", "closed_form"):
        return False
    if H.has_closed_form:
        return True
    return asked.method == "exact" or (asked.method == "auto" and H.shape[0] <= EXACT_SIZE)


def _energies(H: Hessian, partition: Partition, asked: Energies, seed: int, known: Whole | None) -> SplitEnergies:
    if known is not None and _is_exact(H, asked):
        return known.energies(partition)
    if asked.method == DUAL:
        return SplitEnergies({"G": block_energies(GaussNewton(H.objective), partition, DUAL, asked.probes, seed=seed)})
    return split_energies(H.objective, partition, asked.method, asked.probes, asked.rtol, asked.max_products, seed=seed)


def _eigenvalues(
    hessian: Operator, asked: Eigenvalues, gradient: Tensor, before: Before, seed: int
) -> tuple[EndEigenvalues, Tensor]:
    """Both ends of the spectrum; the top begins where it was at the step before."""
    k = min(asked.k, hessian.shape[0])
    start = before.vectors
    top = top_eigenpairs(hessian, k, "LA", rtol=asked.rtol, seed=seed, start=start)
    sigma = max(float(top.values[0]), 0.0)
    # One pair more than wanted: beside a dense bulk a search for a single one may settle on its neighbour.
    j = min(asked.smallest, hessian.shape[0])
    bottom = top_eigenpairs(Turned(hessian, sigma), min(j + 1, hessian.shape[0]), "LA", rtol=asked.rtol, seed=seed)
    # In float64, where squares neither overflow nor vanish.
    V, length = top.vectors, float(torch.linalg.vector_norm(gradient, dtype=torch.float64))
    along = float((V.T @ (gradient.double() / length).to(V)).square().sum()) if length > 0 else UNKNOWN
    aligned = UNKNOWN if start is None else float((start.to(V).T @ V).square().sum() / start.shape[1])
    return (
        EndEigenvalues(
            largest=top.values,
            largest_residuals=top.residuals,
            smallest=(sigma - bottom.values[:j])[::-1].copy(),
            smallest_residuals=bottom.residuals[:j][::-1].copy(),
            gradient_share=along,
            alignment=aligned,
            aligned_with=-1 if start is None else before.step,
            products=top.products + bottom.products,
            converged=bool(top.converged.all() and bottom.converged[:j].all()),
            overlooked=max(top.overlooked, bottom.overlooked),
        ),
        V,
    )


def _heterogeneity(hessian: Operator, partition: Partition, asked: Heterogeneity, seed: int) -> Estimate:
    compared = partition.coarsened("tensor") if len(partition) > BLOCKS_COMPARED else partition
    spectra = block_spectra(hessian, compared, probes=asked.probes, steps=asked.steps, seed=seed)
    exact = all(density.exact for density in spectra.densities)
    provenance = Provenance(
        engine=f"heterogeneity of {len(compared)} blocks; {hessian.engine}",
        dtype=str(hessian.dtype).removeprefix("torch."),
        device=str(hessian.device),
        data_fingerprint=hessian.data_fingerprint,
        seed=seed,
    )
    return Estimate(
        value=spectra.heterogeneity,
        stderr=spectra.heterogeneity_stderr,
        samples=None,
        labels=None,
        degrees=0 if exact else asked.probes - 1,
        probes=0 if exact else asked.probes,
        products=0,
        converged=True,
        message="mean Jensen-Shannon distance between spectra of blocks",
        provenance=provenance,
    )


def _heatmap(hessian: Operator, objective: Objective, asked: Heatmap) -> HeatMap:
    """Root mean squares over squares of entries: where entries were skipped, thin stripes would be lost."""
    H = hessian.dense().double()  # squares of small numbers vanish in float32
    size = H.shape[0]
    side = -(-size // asked.pixels)
    pixels = -(-size // side)
    of_pixel = torch.arange(size, device=H.device) // side
    counts = torch.bincount(of_pixel).to(H.dtype)
    sums = torch.zeros(pixels, size, dtype=H.dtype, device=H.device).index_add_(0, of_pixel, H.square())
    sums = torch.zeros(pixels, pixels, dtype=H.dtype, device=H.device).index_add_(1, of_pixel, sums)
    magnitude = (sums / counts[:, None] / counts).sqrt().float().cpu().numpy()
    return HeatMap(magnitude, size, objective.parameters.names, objective.parameters.sizes)
