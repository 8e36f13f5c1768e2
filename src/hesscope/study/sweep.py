"""A sweep: the off-diagonal ratio r against the number of classes C, measured on random networks and predicted.

Gaussian inputs, uniform labels, LeCun initialization, one linear model and one hidden layer, as in [D]
(arXiv:2505.02809). Every measurement is exact and independent of the others (its own inputs, labels and weights).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from hesscope._version import __version__
from hesscope.core.checks import require_choice, require_positive_int
from hesscope.core.errors import InputError
from hesscope.core.rng import stream
from hesscope.data import gaussian
from hesscope.estimate.exponent import fit_exponent
from hesscope.models import linear, one_hidden
from hesscope.objective import Objective
from hesscope.operators.closed_form import layer_weights, output_layer_energies
from hesscope.study.steps import Progress, Reporter, Step, run_steps
from hesscope.study.store import Store
from hesscope.theory import SpectralLaw, static_force
from hesscope.theory.ensemble import describe
from hesscope.theory.kolmogorov import kolmogorov_distance

if TYPE_CHECKING:
    import xarray as xr

LOSSES = ("cross_entropy", "mse")
RESULT = "sweep"
# Results of steps that the final one puts together begin with this.
PARTS = "part-"
# Points at which the density of a law is drawn.
GRID = 400

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Series:
    """What is followed over C: the blocks of one layer of a model under a loss, and the exponent of r as C grows."""

    model: str
    loss: str
    layer: str
    asymptotic: float

    @property
    def name(self) -> str:
        """Key of the series in results."""
        return f"{self.model} {self.loss} {self.layer}"


# Under squared error the output layer is exactly block-diagonal: there is nothing to follow.
SERIES = (
    Series("linear", "cross_entropy", "output", -2.0),
    Series("one_hidden", "cross_entropy", "output", -2.0),
    Series("one_hidden", "cross_entropy", "hidden", -1.0),
    Series("one_hidden", "mse", "hidden", -1.0),
)


@dataclass(frozen=True)
class SweepSettings:
    """What a sweep's numbers depend on.

    Attributes:
        classes: numbers C to measure at, at least two, ascending.
        networks: independent networks of each kind at every C, at least 2.
        losses: "cross_entropy", "mse" or both.
        inputs, samples, width: d, N, m.
        activation: of the hidden layer.
        rtol: relative standard error of predictions that are sampled.
        seed: root of all random streams.
    """

    classes: tuple[int, ...] = (10, 30, 100, 300, 1000)
    networks: int = 5
    losses: tuple[str, ...] = LOSSES
    inputs: int = 500
    samples: int = 1000
    width: int = 8
    activation: str = "relu"
    rtol: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        for number in self.classes:
            require_positive_int("classes", number)
        if len(self.classes) < 2 or sorted(set(self.classes)) != list(self.classes) or self.classes[0] < 2:
            raise InputError(
                f"classes must be at least two different numbers from 2 on, ascending, got {list(self.classes)}"
            )
        require_positive_int("networks", self.networks)
        if self.networks < 2:
            raise InputError("a sweep needs at least 2 networks of each kind, so that there is a confidence interval")
        if not self.losses or len(set(self.losses)) != len(self.losses):
            raise InputError(f"losses must name each loss once, got {list(self.losses)}")
        for loss in self.losses:
            require_choice("loss", loss, LOSSES)
        for name in ("inputs", "samples"):
            require_positive_int(name, getattr(self, name))
        if self.samples < 2:
            raise InputError("samples must be at least 2")
        if not 0 < self.rtol < 1:
            raise InputError(f"rtol must lie between 0 and 1, got {self.rtol}")
        for series in self.series:  # what the theory refuses is refused before any work
            describe(series.model, series.loss, self.classes[0], **self.theory_arguments)

    @property
    def fingerprint(self) -> str:
        """Hash of the settings and of hesscope's version."""
        text = repr(sorted({**asdict(self), "version": __version__}.items()))
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    @property
    def theory_arguments(self) -> dict[str, Any]:
        """What predictions need to know besides model, loss and C."""
        # For these d and N: at d = 500 the limit is off by one per cent, at d = 60 by ten.
        return {
            "inputs": self.inputs,
            "samples": self.samples,
            "width": self.width,
            "activation": self.activation,
        }

    @property
    def series(self) -> tuple[Series, ...]:
        """What is followed under these losses."""
        return tuple(series for series in SERIES if series.loss in self.losses)

    @property
    def spectrum_classes(self) -> int:
        """The number of classes, in the middle of the list, at which whole spectra are shown."""
        return self.classes[(len(self.classes) - 1) // 2]


def run_sweep(folder: Path, settings: SweepSettings, report: Reporter) -> int:
    """Measure, predict and fit; returns how many of the steps were found done from an earlier run."""
    store = sweep_store(folder, settings)
    found = run_steps(sweep_steps(store, settings), store, report)
    store.clear(PARTS)
    return found


def sweep_store(folder: Path, settings: SweepSettings) -> Store:
    """Where a sweep's results lie."""
    return Store(folder, settings.fingerprint)


def sweep_steps(store: Store, settings: SweepSettings) -> list[Step]:
    """One step for each network's measurement and each prediction, and one that puts them together."""
    names = [_name(C, network) for C in settings.classes for network in range(settings.networks)]
    final = Step(RESULT, "fitting exponents", 1.0, lambda progress: _merge(settings, store, progress))
    if store.has(RESULT):
        return [final]
    measuring = [
        Step(name, f"measuring r at C = {C:,}", 1.0 + C / 300, _measuring(settings, C, network))
        for name, (C, network) in zip(
            names, [(C, network) for C in settings.classes for network in range(settings.networks)], strict=True
        )
    ]
    predicting = [
        Step(f"{PARTS}prediction-{C}", f"predicting r at C = {C:,}", 4.0 + C / 300, _predicting(settings, C))
        for C in settings.classes
    ]
    spectra = Step(f"{PARTS}spectra", "spectra of blocks", 4.0, lambda progress: _spectra(settings, progress))
    return [*measuring, *predicting, spectra, final]


def _name(C: int, network: int) -> str:
    return f"{PARTS}{C}-{network}"


def _measuring(settings: SweepSettings, C: int, network: int) -> Callable[[Progress], xr.Dataset]:
    return lambda progress: _measure(settings, C, network, progress)


def _predicting(settings: SweepSettings, C: int) -> Callable[[Progress], xr.Dataset]:
    return lambda progress: _predict(settings, C, progress)


def _objective(settings: SweepSettings, model: str, loss: str, C: int, network: int) -> Objective:
    """A random network on its own data; both losses share them."""
    seed = int(stream(settings.seed, "sweep", model, C, network).integers(2**62))
    data = gaussian(settings.samples, settings.inputs, C, seed, torch.float64)
    if model == "linear":
        made = linear(settings.inputs, C, seed, torch.float64)
    else:
        made = one_hidden(settings.inputs, settings.width, C, settings.activation, seed, torch.float64)
    return Objective(made, loss, data.batch(loss))


def _measure(settings: SweepSettings, C: int, network: int, progress: Progress) -> xr.Dataset:
    """Mean energies of the off-diagonal and the diagonal blocks of every series, exactly."""
    import xarray as xr

    energies = []
    for number, series in enumerate(settings.series):
        objective = _objective(settings, series.model, series.loss, C, network)
        energies.append(_layer_energies(objective, series))
        progress((number + 1) / len(settings.series))
    return xr.Dataset({"energy": (("series", "kind"), np.asarray(energies))})


def _layer_energies(objective: Objective, series: Series) -> tuple[float, float]:
    """Mean energies (off-diagonal, diagonal) of the layer's blocks."""
    if series.layer == "hidden":
        energies = layer_weights(objective, "fc1").energies()
        m, diagonal = len(energies), float(np.trace(energies))
        return (float(energies.sum()) - diagonal) / (m * (m - 1)), diagonal / m
    layer = "fc1" if series.model == "linear" else "fc2"
    features = layer_weights(objective, layer, neurons=[0]).inputs
    head = output_layer_energies(features, weight=objective.model.get_parameter(f"{layer}.weight"))
    C = head.classes
    return head.off_diagonal / (C * (C - 1)), head.diagonal / C


def _predict(settings: SweepSettings, C: int, progress: Progress) -> xr.Dataset:
    import xarray as xr

    ratios, limits, forces = [], [], {}
    for number, series in enumerate(settings.series):
        kind = series.model, series.loss
        if kind not in forces:  # one prediction for both layers
            forces[kind] = static_force(*kind, C, **settings.theory_arguments, rtol=settings.rtol, seed=settings.seed)
        force = forces[kind]
        ratios.append([getattr(force, f"{series.layer}_{what}") for what in ("ratio", "stderr")])
        limits.append(getattr(force, f"limit_{series.layer}"))
        progress((number + 1) / len(settings.series))
    return xr.Dataset({"prediction": (("series", "what"), ratios), "limit": ("series", limits)})


def _spectra(settings: SweepSettings, progress: Progress) -> xr.Dataset:
    """Eigenvalues of a diagonal and an off-diagonal block of d x d, and their law for the weights that were drawn."""
    import xarray as xr

    C, gamma = settings.spectrum_classes, settings.inputs / settings.samples
    kinds = [series for series in settings.series if (series.model, series.layer) != ("one_hidden", "output")]
    names, eigenvalues, grids, densities, atoms, distances = [], [], [], [], [], []
    for number, series in enumerate(kinds):
        drawn = layer_weights(_objective(settings, series.model, series.loss, C, 0), "fc1", neurons=[0, 1])
        for other, block in ((0, "diagonal"), (1, "off-diagonal")):
            values = np.linalg.eigvalsh(drawn.block(0, other).numpy())
            law = SpectralLaw(drawn.weights[:, 0, other].numpy(), gamma)
            ends = [end for interval in law.support for end in interval] + [values[0], values[-1]]
            margin = 0.04 * (max(ends) - min(ends))
            grid = np.linspace(min(ends) - margin, max(ends) + margin, GRID)
            names.append(f"{series.name} {block}")
            eigenvalues.append(values)
            grids.append(grid)
            densities.append(law.density(grid))
            atoms.append(law.atom_at_zero)
            distances.append(kolmogorov_distance(law, values))
        progress((number + 1) / len(kinds))
    return xr.Dataset(
        {
            "eigenvalue": (("block", "index"), np.asarray(eigenvalues)),
            "grid": (("block", "point"), np.asarray(grids)),
            "density": (("block", "point"), np.asarray(densities)),
            "atom_at_zero": ("block", np.asarray(atoms)),
            "kolmogorov_distance": ("block", np.asarray(distances)),
        },
        coords={"block": np.asarray(names, dtype=object)},
    )


def _merge(settings: SweepSettings, store: Store, progress: Progress) -> xr.Dataset:
    """All parts in one data set, with the exponents fitted to them."""
    import xarray as xr

    parts = [[store.require(_name(C, network)) for network in range(settings.networks)] for C in settings.classes]
    # [C, network, series, kind] -> [series, C, network, kind]
    energies = np.asarray([[part["energy"].to_numpy() for part in row] for row in parts]).transpose(2, 0, 1, 3)
    predictions = [store.require(f"{PARTS}prediction-{C}") for C in settings.classes]
    predicted, stderr = np.asarray([part["prediction"].to_numpy() for part in predictions]).transpose(2, 1, 0)
    progress(0.5)
    fits, plain = [], []
    for series, energy, ratio, error in zip(settings.series, energies, predicted, stderr, strict=True):
        measured = settings.classes, energy[:, :, 0], energy[:, :, 1]
        plain.append(fit_exponent(*measured))
        fits.append(fit_exponent(*measured, ratio, error, series.asymptotic))
    result = xr.Dataset(
        {
            "off_diagonal": (("series", "classes", "network"), energies[..., 0]),
            "diagonal": (("series", "classes", "network"), energies[..., 1]),
            "predicted": (("series", "classes"), predicted),
            "predicted_stderr": (("series", "classes"), stderr),
            "limit": ("series", predictions[0]["limit"].to_numpy()),
            "asymptotic": ("series", [series.asymptotic for series in settings.series]),
            "slope": (("series", "estimate"), [[fit.exponent, fit.low, fit.high] for fit in plain]),
            "exponent": (("series", "estimate"), [[fit.exponent, fit.low, fit.high] for fit in fits]),
        },
        coords={
            "series": np.asarray([series.name for series in settings.series], dtype=object),
            "classes": list(settings.classes),
            "estimate": np.asarray(["value", "low", "high"], dtype=object),
        },
        attrs={
            "record": "Sweep",
            "engine": "exact energies in closed form, float64; predictions: random-matrix theory",
            **{key: list(value) if isinstance(value, tuple) else value for key, value in asdict(settings).items()},
            "spectrum_classes": settings.spectrum_classes,
        },
    )
    return xr.merge([result, store.require(f"{PARTS}spectra")], combine_attrs="drop_conflicts")
