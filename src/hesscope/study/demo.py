"""The demo: one-hidden-layer ReLU networks on scikit-learn's digits, measured at three times of their training."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from hesscope._version import __version__
from hesscope.core.rng import stream
from hesscope.core.vectors import ParameterSpace
from hesscope.data import LabelledData, digits
from hesscope.estimate.block_energies import Method, block_energies, energies_provenance
from hesscope.estimate.energies import SplitEnergies
from hesscope.layerwise import Eigenstructure, kronecker_factors, layer_eigenstructure, layer_low_rank
from hesscope.models import MLP, one_hidden
from hesscope.objective import Objective
from hesscope.operators import GaussNewton, Hessian
from hesscope.partition import Partition
from hesscope.study.layers import layer_row, layers_dataset
from hesscope.study.prediction import PARTS as THEORY_PARTS
from hesscope.study.prediction import TheorySettings, theory_steps
from hesscope.study.steps import Progress, Reporter, Step, run_steps
from hesscope.study.store import Store
from hesscope.study.sweep import PARTS as SWEEP_PARTS
from hesscope.study.sweep import SweepSettings, sweep_steps
from hesscope.study.training import Examples, train
from hesscope.theory import static_force

if TYPE_CHECKING:
    import xarray as xr

LOSSES = {"cross_entropy": nn.CrossEntropyLoss, "mse": nn.MSELoss}
DENSE = Method("closed_form", 0, 0)
TIMES = ("initial", "half", "final")

# Layers are measured one by one in the network trained with cross-entropy, at the end.
LAYERS = ("fc1", "fc2")
TRAINED = "cross_entropy"


@dataclass(frozen=True)
class DemoSettings:
    """What the demo's numbers depend on.

    Attributes:
        seed: root of all random streams.
        width, epochs, samples: hidden width m, training epochs and training samples on the digits.
        theory_classes, sweep_classes: numbers of classes C of the predictions and of the sweep over random networks.
    """

    seed: int = 0
    width: int = 16
    epochs: int = 40
    samples: int = 1437
    theory_classes: tuple[int, ...] = (10, 100, 1000, 10_000, 131_072)
    sweep_classes: tuple[int, ...] = (10, 30, 100, 300)

    @property
    def theory(self) -> TheorySettings:
        """What is predicted without data."""
        return TheorySettings(losses=tuple(LOSSES), classes=self.theory_classes, rtol=0.05, seed=self.seed)

    @property
    def sweep(self) -> SweepSettings:
        """What is measured over the number of classes, on Gaussian inputs."""
        return SweepSettings(classes=self.sweep_classes, inputs=200, samples=400, rtol=0.05, seed=self.seed)

    @property
    def fingerprint(self) -> str:
        """Hash of the settings and of hesscope's version."""
        text = repr((sorted({**asdict(self), "version": __version__}.items()), self.theory, self.sweep))
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def demo_store(folder: Path, settings: DemoSettings) -> Store:
    """Where the demo's results lie."""
    return Store(folder, settings.fingerprint)


def run_demo(folder: Path, settings: DemoSettings, report: Reporter) -> int:
    """Train, measure and predict; returns how many of the steps were found done from an earlier run."""
    store = demo_store(folder, settings)
    steps = []
    for loss in LOSSES:
        steps.append(_training_step(loss, settings))
        steps.extend(_measuring_step(loss, time, settings, store) for time in TIMES)
    steps.extend(_layer_step(layer, settings, store) for layer in LAYERS)
    steps.append(Step("layers", "putting the layers together", 0.5, lambda _: _layers(settings, store)))
    steps.append(Step("prediction", "predicting the off-diagonal ratios", 3.0, lambda _: _predict(settings)))
    found = run_steps(
        [*steps, *theory_steps(store, settings.theory), *sweep_steps(store, settings.sweep)], store, report
    )
    for prefix in (THEORY_PARTS, SWEEP_PARTS):
        store.clear(prefix)
    return found


def demo_results(folder: Path, settings: DemoSettings) -> dict[str, xr.Dataset]:
    """All results of a finished demo, by step name."""
    store = demo_store(folder, settings)
    names = [f"{loss}-{step}" for loss in LOSSES for step in ("training", *TIMES)]
    layers = [f"layer-{layer}" for layer in LAYERS]
    return {name: store.require(name) for name in [*names, *layers, "layers", "prediction", "theory", "sweep"]}


def _training_step(loss: str, settings: DemoSettings) -> Step:
    title = f"training with {loss.replace('_', '-')}"
    return Step(f"{loss}-training", title, 3.0, lambda progress: _train(loss, settings, progress))


def _measuring_step(loss: str, time: str, settings: DemoSettings, store: Store) -> Step:
    title = f"measuring the Hessian, {loss.replace('_', '-')}, {time}"
    return Step(
        f"{loss}-{time}",
        title,
        3.0,
        lambda progress: _measure(store.require(f"{loss}-training"), loss, time, settings, progress),
    )


def _attributes(settings: DemoSettings) -> dict[str, int]:
    """The settings that concern the digits, as attributes of a result."""
    return {name: getattr(settings, name) for name in ("seed", "width", "epochs", "samples")}


def _data(settings: DemoSettings) -> tuple[LabelledData, LabelledData]:
    """Training and test part of the digits."""
    return digits(dtype=torch.float64).split(settings.samples, stream(settings.seed, "demo", "split"))


def _model(settings: DemoSettings, data: LabelledData) -> MLP:
    d = data.inputs.shape[1]
    return one_hidden(d, settings.width, data.classes, seed=settings.seed, dtype=torch.float64)


def _train(loss: str, settings: DemoSettings, progress: Progress) -> xr.Dataset:
    import xarray as xr

    training, test = _data(settings)
    model = _model(settings, training)
    examples, held_out = (Examples(*part.batch(loss), part.labels) for part in (training, test))
    kept = (0, settings.epochs // 2, settings.epochs)
    result = train(model, LOSSES[loss](), examples, held_out, settings.epochs, kept, settings.seed, progress)
    return xr.Dataset(
        {
            "train_loss": ("epoch", result.train_loss),
            "test_loss": ("epoch", result.test_loss),
            "train_accuracy": ("epoch", result.train_accuracy),
            "test_accuracy": ("epoch", result.test_accuracy),
            "kept_epoch": ("time", np.asarray(result.kept)),
            "parameters": (("time", "parameter"), result.parameters),
        },
        coords={"epoch": np.arange(settings.epochs + 1), "time": np.asarray(TIMES, dtype=object)},
        attrs={"record": "Trajectory", "loss": loss, **_attributes(settings)},
    )


def _measure(trajectory: xr.Dataset, loss: str, time: str, settings: DemoSettings, progress: Progress) -> xr.Dataset:
    """The dense Hessian, its split into Gauss-Newton and residual part, energies by neuron, eigenvalues."""
    training, _ = _data(settings)
    objective = _objective(trajectory, loss, time, settings)
    hessian, gauss_newton = Hessian(objective), GaussNewton(objective)
    H = hessian.dense()
    progress(0.5)
    G = gauss_newton.dense()
    progress(0.9)
    partition = Partition.by_row(objective.model)
    parts = {"H": (H, hessian), "G": (G, gauss_newton), "R": (H - G, hessian - gauss_newton)}
    energies = {
        part: replace(block_energies(matrix, partition), provenance=energies_provenance(operator, DENSE, settings.seed))
        for part, (matrix, operator) in parts.items()
    }
    result = SplitEnergies(energies).to_xarray()
    result["hessian"] = (("parameter", "parameter_"), H.float().numpy())
    result["eigenvalue"] = ("index", torch.linalg.eigvalsh(H).numpy())
    return result.assign_attrs(
        loss=loss,
        time=time,
        epoch=int(trajectory["kept_epoch"].sel(time=time)),
        value=objective.value(),
        gradient_norm=float(objective.gradient().norm()),
        seed=settings.seed,
        classes=training.classes,
        inputs=training.inputs.shape[1],
        width=settings.width,
        samples=len(training),
    )


def _objective(trajectory: xr.Dataset, loss: str, time: str, settings: DemoSettings) -> Objective:
    """The function that is measured: the network as it was at one time of its training."""
    training, _ = _data(settings)
    model = _model(settings, training)
    vector = torch.from_numpy(trajectory["parameters"].sel(time=time).to_numpy())
    with torch.no_grad():
        for name, tensor in ParameterSpace.of(model).unflatten(vector).items():
            model.get_parameter(name).copy_(tensor)
    return Objective(model, loss, training.batch(loss))


def _layer_step(layer: str, settings: DemoSettings, store: Store) -> Step:
    def measure(progress: Progress) -> xr.Dataset:
        objective = _objective(store.require(f"{TRAINED}-training"), TRAINED, "final", settings)
        return layer_eigenstructure(
            objective, layer, seed=settings.seed, progress=lambda done, planned: progress(done / max(planned, 1))
        ).to_xarray()

    return Step(f"layer-{layer}", f"eigenpairs of layer {layer}", 1.0, measure)


def _layers(settings: DemoSettings, store: Store) -> xr.Dataset:
    """The table of the layers, as `hesscope layers` makes it."""
    objective = _objective(store.require(f"{TRAINED}-training"), TRAINED, "final", settings)
    rows = {}
    for layer in LAYERS:
        structure = Eigenstructure.from_xarray(store.require(f"layer-{layer}"))
        factors = kronecker_factors(objective, layer)
        rows[layer] = layer_row(factors, structure, layer_low_rank(structure, factors))
    return layers_dataset(rows).assign_attrs(curvature="hessian", classes=factors.classes)


def _predict(settings: DemoSettings) -> xr.Dataset:
    """Predicted r at initialization for Gaussian inputs of the same shape (MATH.md, section 4)."""
    import xarray as xr

    training, _ = _data(settings)
    gamma = training.inputs.shape[1] / len(training)
    forces = [
        static_force("one_hidden", loss, training.classes, gamma, settings.width, seed=settings.seed) for loss in LOSSES
    ]
    return xr.Dataset(
        {
            name: ("loss", np.asarray([getattr(force, name) for force in forces]))
            for name in ("hidden_ratio", "hidden_stderr", "output_ratio", "output_stderr")
        },
        coords={"loss": np.asarray(list(LOSSES), dtype=object)},
        attrs={"record": "StaticForce", "gamma": gamma, "classes": training.classes, **_attributes(settings)},
    )
