"""Presets: the experiments of [D] (arXiv:2505.02809) on the Hessian along training, and two on real data."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hesscope.core.checks import nearest, require_choice, require_positive_int
from hesscope.core.errors import InputError, TooLargeError
from hesscope.core.rng import permutation, stream
from hesscope.data import LabelledData, clusters, digits, gaussian
from hesscope.dynamics import Eigenvalues, Energies, Heatmap
from hesscope.dynamics.measures import Measure
from hesscope.dynamics.whole import DENSE_SIZE
from hesscope.models import mlp, one_hidden
from hesscope.objective import Objective
from hesscope.partition import Partition

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": functional.cross_entropy,
    "mse": functional.mse_loss,
}
OPTIMIZERS = ("adam", "sgd")
MOMENTUM = 0.9  # of SGD
PARTITIONS = ("head", "row", "token")
# Options of the command that are none of the experiment.
OF_ALL = ("budget", "out")

# One hidden layer, as in [D].
INPUTS, WIDTH = 500, 8
# Learning rates by optimizer. Centres of clusters have length 1, Gaussian inputs sqrt(d).
GAUSSIAN_RATES, CLUSTERS_RATES = {"adam": 1e-2, "sgd": 0.1}, {"adam": 1e-2, "sgd": 1.0}
# Four layers, d = m = C: [D]'s own, and one whose 4096 parameters allow pictures of the whole Hessian.
FULL_SIDE, SMALL_SIDE, LAYERS = 500, 32, 4
# Energies of the full one are sampled: a dense Hessian of a million parameters does not fit.
FULL_PROBES = 4
HOURS_AT_MOST = 1.0
# Multiply-adds of a product with H, in units of P N; of a gradient (see estimate.block_energies).
PER_PRODUCT, PER_GRADIENT = 7, 3

DIGITS_WIDTH, DIGITS_BATCH = 32, 64

# The GPT: its tokens are characters, of which ASCII has 128, so that rows of the embedding are few.
GPT_LAYERS, GPT_WIDTH, GPT_HEADS, GPT_CONTEXT, CHARACTERS = 2, 16, 2, 32, 128
GPT_TEXT, GPT_BATCH = 2**20, 32
GPT_PROBES = {"head": 8, "row": 2, "token": 4}


@dataclass(frozen=True)
class Options:
    """What a run's numbers depend on beside its preset; None for what the preset does not take.

    Attributes:
        steps: updates of the parameters; snapshots: how many are measured at most, log-spaced, first and last included.
        samples: N that the Hessian is of, on which also is trained; for the GPT, windows of text, and training has all.
        seed: root of all random streams.
        loss: "cross_entropy" or "mse"; optimizer: "adam" or "sgd"; classes: C; partition: "head", "row" or "token".
    """

    steps: int
    snapshots: int
    samples: int
    seed: int = 0
    loss: str | None = None
    optimizer: str | None = None
    classes: int | None = None
    partition: str | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "snapshots", "samples"):
            require_positive_int(f"--{name}", getattr(self, name))
        if self.snapshots < 2:
            raise InputError(f"--snapshots must be at least 2, the first and the last step, got {self.snapshots}")
        for name, choices in (("loss", LOSSES), ("optimizer", OPTIMIZERS), ("partition", PARTITIONS)):
            if (value := getattr(self, name)) is not None:
                require_choice(f"--{name}", value, choices)
        if self.classes is not None:
            require_positive_int("--classes", self.classes)
            if self.classes < 2:
                raise InputError(f"--classes must be at least 2, got {self.classes}")


@dataclass(frozen=True, eq=False)
class Experiment:
    """A network about to be trained, and what of it is measured.

    Attributes:
        objective: the model with the loss and data that the Hessian is of.
        partition, measures: of the Tracker.
        optimizer: that trains the model.
        loss_at: step -> the loss of that step's batch, with its graph; equal steps have equal batches, so that a run
            can be taken up anywhere.
    """

    objective: Objective
    partition: Partition
    measures: tuple[Measure, ...]
    optimizer: torch.optim.Optimizer
    loss_at: Callable[[int], Tensor]

    @property
    def model(self) -> nn.Module:
        """What is trained."""
        return self.objective.model


@dataclass(frozen=True)
class Preset:
    """An experiment that only needs a name.

    Attributes:
        name, description: for the list of presets.
        defaults: the options it takes, with their values unless told; it does not take those that are None.
        snapshot_cost: of one snapshot in steps of training, for the progress bar.
        make: options -> the experiment at initialization.
    """

    name: str
    description: str
    defaults: Options
    snapshot_cost: float
    make: Callable[[Options], Experiment] = field(repr=False)

    def options(self, **given: Any) -> Options:
        """The defaults with what was given; None means not given.

        Raises:
            InputError: an option that this preset does not take, or a value that does not fit.
        """
        given = {name: value for name, value in given.items() if value is not None}
        taken = [each.name for each in fields(Options) if getattr(self.defaults, each.name) is not None]
        for name in given:
            if name not in taken:
                accepted = ", ".join(f"--{each}" for each in (*taken, *OF_ALL))
                raise InputError(f"preset {self.name!r} does not take --{name}; it takes {accepted}")
        return replace(self.defaults, **given)

    def label(self, options: Options) -> str:
        """Name of the preset and of the choices that it was run with, such as clusters-cross_entropy-adam-C10."""
        classes = None if options.classes is None else f"C{options.classes}"
        parts = (self.name, options.loss, options.optimizer, classes, options.partition)
        return "-".join(part for part in parts if part is not None)


def find_preset(name: str) -> Preset:
    """The preset of this name; raises InputError with the nearest one if there is none."""
    if name not in PRESETS:
        raise InputError(f"no preset is named {name!r}{nearest(name, PRESETS)}; there are {', '.join(PRESETS)}")
    return PRESETS[name]


def options_in_words(options: Options) -> dict[str, str]:
    """Name -> value of every option that the preset takes."""
    return {name: str(value) for name, value in asdict(options).items() if value is not None}


# --- fully connected networks -----------------------------------------------------------------------------------------


def hidden_experiment(
    options: Options,
    data: Callable[..., LabelledData],
    rates: Mapping[str, float],
    inputs: int = INPUTS,
    width: int = WIDTH,
) -> Experiment:
    """[D]'s network with one hidden ReLU layer, in float64, with full-batch steps.

    Args:
        data: `gaussian` or `clusters`.
        rates: learning rates by optimizer.
        inputs, width: d and m.
    """
    assert options.classes is not None
    found = data(options.samples, inputs, options.classes, seed=options.seed, dtype=torch.float64)
    model = one_hidden(inputs, width, options.classes, seed=options.seed, dtype=torch.float64)
    return _classifier(options, model, found, rates)


def four_layer_experiment(options: Options, rates: Mapping[str, float], side: int = SMALL_SIDE) -> Experiment:
    """[D]'s network with four layers, d = m = C = side, on Gaussian inputs with random labels."""
    data = gaussian(options.samples, side, side, seed=options.seed, dtype=torch.float64)
    model = mlp((side,) * (LAYERS + 1), seed=options.seed, dtype=torch.float64)
    # No eigenvalues: the negative ones vanish with the residual, and the smallest takes longer than all the rest.
    return replace(_classifier(options, model, data, rates), measures=(Energies(), Heatmap()))


def full_four_layer_experiment(options: Options, rates: Mapping[str, float]) -> Experiment:
    """The same at [D]'s own size, in float32 on a GPU where there is one.

    Raises:
        TooLargeError: this machine would take more than HOURS_AT_MOST.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parameters, blocks = LAYERS * FULL_SIDE**2, LAYERS * FULL_SIDE
    products = 2 * options.snapshots * FULL_PROBES * blocks  # with H and with G
    work = (products * PER_PRODUCT + options.steps * PER_GRADIENT) * parameters * options.samples
    hours = work / multiply_adds_per_second(device) / 3600
    if hours > HOURS_AT_MOST:
        raise TooLargeError(
            f"'four-layer-full' ({parameters:,} parameters, {options.snapshots} snapshots of {options.samples:,} "
            f"samples) would take about {hours:,.0f} hours on this {device.type}, more than {HOURS_AT_MOST:g}: run it "
            "on a GPU, take fewer --snapshots and --samples, or the preset 'four-layer'"
        )
    data = gaussian(options.samples, FULL_SIDE, FULL_SIDE, seed=options.seed, dtype=torch.float32)
    data = replace(data, inputs=data.inputs.to(device), labels=data.labels.to(device))
    model = mlp((FULL_SIDE,) * (LAYERS + 1), seed=options.seed, dtype=torch.float32).to(device)
    return replace(_classifier(options, model, data, rates), measures=(Energies("probes", probes=FULL_PROBES),))


def digits_experiment(options: Options, rates: Mapping[str, float]) -> Experiment:
    """One hidden layer of 32 on handwritten digits, in mini-batches."""
    data = digits(dtype=torch.float64)
    if options.samples > len(data):
        raise InputError(f"--samples must be at most {len(data)}, all digits there are, got {options.samples}")
    training, _ = data.split(options.samples, stream(options.seed, "dynamics", "split"))
    inputs = training.inputs.shape[1]
    model = one_hidden(inputs, DIGITS_WIDTH, training.classes, seed=options.seed, dtype=torch.float64)
    return _classifier(options, model, training, rates, DIGITS_BATCH)


def multiply_adds_per_second(device: torch.device) -> float:
    """Of a product of two float32 matrices, the faster of two."""
    matrix, times = torch.ones(2048, 2048, device=device), []
    for _ in range(3):  # the first one sets up
        start = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # waits for the device
        times.append(time.perf_counter() - start)
    return float(matrix.shape[0] ** 3 / min(times[1:]))


def _classifier(
    options: Options, model: nn.Module, data: LabelledData, rates: Mapping[str, float], batch_size: int | None = None
) -> Experiment:
    """Blocks are rows. With a batch size, an epoch is a random order of the samples, cut into nearly equal batches."""
    assert options.loss is not None and options.optimizer is not None
    inputs, targets = data.batch(options.loss)
    loss = LOSSES[options.loss]
    batches = 1 if batch_size is None else ceil(len(data) / batch_size)

    def loss_at(step: int) -> Tensor:
        if batches == 1:
            return loss(model(inputs), targets)
        epoch, number = divmod(step, batches)
        order = permutation(len(data), stream(options.seed, "dynamics", "order", epoch))
        chosen = order.tensor_split(batches)[number]
        return loss(model(inputs[chosen]), targets[chosen])

    rate = rates[options.optimizer]
    if options.optimizer == "sgd" and options.loss == "mse":
        rate *= data.classes / 2  # the mean over outputs divides gradients by C / 2; Adam does not mind
    objective = Objective(model, options.loss, (inputs, targets))
    small = objective.parameters.size <= DENSE_SIZE
    measures = (Energies(), Eigenvalues(), Heatmap()) if small else (Energies(), Eigenvalues())
    return Experiment(objective, Partition.by_row(model), measures, _optimizer(options.optimizer, model, rate), loss_at)


def _optimizer(name: str, model: nn.Module, rate: float) -> torch.optim.Optimizer:
    if name == "adam":
        return torch.optim.Adam(model.parameters(), lr=rate)
    return torch.optim.SGD(model.parameters(), lr=rate, momentum=MOMENTUM)


# --- GPT --------------------------------------------------------------------------------------------------------------


def gpt_experiment(options: Options, rate: float) -> Experiment:
    """A GPT-2 of 9,152 parameters that learns the characters of Python's standard library.

    Raises:
        InputError: transformers is missing.
    """
    from hesscope.models.gpt import new_gpt, standard_library
    from hesscope.models.language_model import transformers_version

    assert options.partition is not None
    transformers_version("the preset 'gpt'")
    tokens = torch.tensor(list(standard_library(GPT_TEXT).encode("ascii", "ignore")))
    model: nn.Module = new_gpt(GPT_LAYERS, GPT_WIDTH, GPT_HEADS, GPT_CONTEXT, CHARACTERS, options.seed)
    offsets = torch.arange(GPT_CONTEXT + 1)

    def windows(count: int, *path: str | int) -> tuple[Tensor, Tensor]:
        starts = stream(options.seed, "dynamics", *path).integers(0, len(tokens) - GPT_CONTEXT, count)
        chosen = tokens[torch.from_numpy(starts)[:, None] + offsets]
        return chosen[:, :-1], chosen[:, 1:]

    def loss_at(step: int) -> Tensor:
        inputs, targets = windows(GPT_BATCH, "windows", step)
        return functional.cross_entropy(model(input_ids=inputs).logits.flatten(0, 1), targets.flatten())

    return Experiment(
        Objective(model, "cross_entropy", windows(options.samples, "measured")),
        _gpt_partition(model, options.partition),
        (Energies("probes", probes=GPT_PROBES[options.partition]), Eigenvalues()),
        torch.optim.Adam(model.parameters(), lr=rate),
        loss_at,
    )


def _gpt_partition(model: nn.Module, name: str) -> Partition:
    """By head, by row, or by token: rows of the embedding (which is the output layer as well), tensors elsewhere."""
    if name == "head":
        return Partition.by_head(model)
    if name == "row":
        return Partition.by_row(model)
    embedding = "transformer.wte.weight"
    blocks: dict[str, Any] = {f"{embedding}[{token}]": (embedding, token) for token in range(CHARACTERS)}
    blocks |= {label: label for label in Partition.by_tensor(model).labels if label != embedding}
    return Partition.from_blocks(blocks, model)


def _all() -> dict[str, Preset]:
    hidden = Options(steps=600, snapshots=12, samples=1000, classes=10, loss="cross_entropy", optimizer="adam")
    presets = (
        Preset(
            "gaussian",
            "[D]'s one-hidden-layer ReLU network (d = 500, m = 8) on Gaussian inputs with random labels",
            hidden,
            100.0,
            lambda options: hidden_experiment(options, gaussian, GAUSSIAN_RATES),
        ),
        Preset(
            "clusters",
            "the same network on clustered data, one cluster a class",
            hidden,
            100.0,
            lambda options: hidden_experiment(options, clusters, CLUSTERS_RATES),
        ),
        Preset(
            "four-layer",
            "[D]'s network with four layers at d = m = C = 32, on Gaussian inputs, with pictures of |H|",
            Options(steps=600, snapshots=12, samples=1000, loss="cross_entropy", optimizer="adam"),
            100.0,
            lambda options: four_layer_experiment(options, {"adam": 3e-3, "sgd": 0.1}),
        ),
        Preset(
            "four-layer-full",
            "the same at [D]'s size, d = m = C = 500, for a GPU",
            Options(steps=1000, snapshots=8, samples=5000, loss="cross_entropy", optimizer="adam"),
            100.0,
            lambda options: full_four_layer_experiment(options, {"adam": 1e-3, "sgd": 0.1}),
        ),
        Preset(
            "digits",
            "one hidden layer of 32 on scikit-learn's handwritten digits, in mini-batches of 64",
            Options(steps=1000, snapshots=12, samples=1437, loss="cross_entropy", optimizer="adam"),
            500.0,
            lambda options: digits_experiment(options, {"adam": 3e-3, "sgd": 0.02}),
        ),
        Preset(
            "gpt",
            "a small GPT-2 on the characters of Python's standard library; blocks by head, row or token",
            Options(steps=400, snapshots=6, samples=8, partition="head"),
            200.0,
            lambda options: gpt_experiment(options, 3e-3),
        ),
    )
    return {each.name: each for each in presets}


PRESETS = _all()
