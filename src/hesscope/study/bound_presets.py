"""Presets of `hesscope bound`: networks as those of [DR] and [W] on samples whose true risk is known, or held out.

Sources: [DR] Dziugaite and Roy, arXiv:1703.11008; [W] Wu et al., arXiv:2010.04261; MATH.md, section 6.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hesscope.core.checks import nearest, require_choice, require_positive_int
from hesscope.core.errors import InputError
from hesscope.core.files import atomic_path
from hesscope.core.rng import permutation, stream
from hesscope.data import LabelledData, PatchPopulation, binary, digits, image_set, patch_population, randomly_labelled
from hesscope.models import MLP, mlp
from hesscope.study.training import Examples, train_epoch

# What labels are: those of the data, or drawn anew.
LABELS = TRUE, RANDOM = ("true", "random")

# Hidden layers at most, as in [DR] and [W].
MOST_LAYERS = 3
# Classes of digits: 0-4 against 5-9 ([DR]), or all.
DIGIT_CLASSES = (2, 10)

# SGD, as in [DR].
LEARNING_RATE, MOMENTUM, BATCH_SIZE = 0.01, 0.9, 100
# Seconds of training that a kill may cost.
SAVED_EVERY = 5.0

# Training images of [DR]; the other 5,000 were for validation.
MNIST_SAMPLES = 55_000
# Patches of the population that go through a network together.
POPULATION_BATCH = 50_000

# Options of the command that every preset takes.
OF_ALL = ("labels", "posteriors", "delta", "steps", "minutes", "out")


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Where the true risk comes from, to be set beside a bound.

    Attributes:
        what: in words.
        data: samples or a whole population, None where the risk of every network is known.
        known: that risk.
        exact: whether this is the whole population, so that a network's risk on it is the true one.
    """

    what: str
    data: Any = None
    known: float | None = None
    exact: bool = False

    def batches(self) -> Any:
        """The data as an Objective takes it."""
        if isinstance(self.data, PatchPopulation):
            return list(self.data.batches(POPULATION_BATCH))
        return self.data.batch("cross_entropy") if isinstance(self.data, LabelledData) else self.data


@dataclass(frozen=True, eq=False)
class Sample:
    """Independent samples to train on and to compute the bound from.

    Attributes:
        data: with its true labels; words: what it is; held_out: where its true risk comes from.
    """

    data: LabelledData
    words: str
    held_out: HeldOut

    def labelled(self, labels: str, seed: int) -> tuple[LabelledData, HeldOut]:
        """The samples with "true" or "random" labels, and where the risk comes from."""
        if labels == TRUE:
            return self.data, self.held_out
        known = 1 - 1 / self.data.classes
        return randomly_labelled(self.data, seed), HeldOut("any classifier on random labels", known=known, exact=True)


@dataclass(frozen=True)
class BoundOptions:
    """What the trained networks depend on beside the preset's name.

    Attributes:
        samples: n; None for as many as there are, but at most MNIST_SAMPLES.
        epochs, random_epochs: passes over the samples with true and with random labels.
        hidden: widths of the hidden layers.
        classes: C; seed: root of all random streams.
        folder: of the user's copy of the data, where the preset needs one.
    """

    samples: int | None
    epochs: int
    random_epochs: int
    hidden: tuple[int, ...] = (600,)
    classes: int = 2
    seed: int = 0
    folder: Path | None = None

    def __post_init__(self) -> None:
        if not 1 <= len(self.hidden) <= MOST_LAYERS:
            raise InputError(f"--hidden must be one to {MOST_LAYERS} widths, got {len(self.hidden)}")
        for width in self.hidden:
            require_positive_int("each width of --hidden", width)
        for name in ("samples", "epochs"):
            if getattr(self, name) is not None:
                require_positive_int(f"--{name}", getattr(self, name))
        if self.classes not in DIGIT_CLASSES:
            raise InputError(f"--classes must be {' or '.join(map(str, DIGIT_CLASSES))}, got {self.classes}")

    @property
    def in_words(self) -> dict[str, str]:
        """Name -> value of all that the numbers depend on; what the folder has is known by its content."""
        values = asdict(self) | {"hidden": ",".join(map(str, self.hidden))}
        return {name: str(value) for name, value in values.items() if name != "folder"}

    def epochs_on(self, labels: str) -> int:
        """Passes over samples with "true" or "random" labels."""
        return self.epochs if labels == TRUE else self.random_epochs


@dataclass(frozen=True)
class BoundPreset:
    """A network and data that only need a name.

    Attributes:
        name, description: for the list of presets.
        defaults: its options unless told; takes: those that may be told, beside OF_ALL.
        sample: options -> the samples.
    """

    name: str
    description: str
    defaults: BoundOptions
    takes: tuple[str, ...]
    sample: Callable[[BoundOptions], Sample] = field(repr=False)

    def options(self, **given: Any) -> BoundOptions:
        """The defaults with what was given; None means not given, and epochs count for random labels as well.

        Raises:
            InputError: an option that this preset does not take or needs, or a value that does not fit.
        """
        given = {name: value for name, value in given.items() if value is not None}
        for name in given:
            if name not in self.takes:
                accepted = ", ".join(f"--{each}" for each in (*self.takes, *OF_ALL))
                raise InputError(f"preset {self.name!r} does not take --{name}; it takes {accepted}")
        if "folder" in self.takes and "folder" not in given:
            raise InputError(f"preset {self.name!r} needs --folder, your own copy of the data: nothing is downloaded")
        if "epochs" in given:
            given["random_epochs"] = given["epochs"]
        return replace(self.defaults, **given)

    def label(self, options: BoundOptions) -> str:
        """Name of the preset and of the choices that it was run with, such as digits-600x600-C10."""
        classes = (f"C{options.classes}",) if "classes" in self.takes else ()
        return "-".join((self.name, "x".join(map(str, options.hidden)), *classes))

    @property
    def taken(self) -> str:
        """The options with their defaults, as they are typed."""
        words = self.defaults.in_words
        words["epochs"] += f" ({self.defaults.random_epochs} on random labels)"
        words |= {"folder": "DIR"} | ({"samples": str(MNIST_SAMPLES)} if self.defaults.samples is None else {})
        return " ".join(f"--{name}={words[name]}" for name in self.takes)


def find_bound_preset(name: str) -> BoundPreset:
    """The preset of this name; raises InputError with the nearest one if there is none."""
    if name not in BOUND_PRESETS:
        raise InputError(
            f"no preset is named {name!r}{nearest(name, BOUND_PRESETS)}; there are {', '.join(BOUND_PRESETS)}, and a "
            "study of your own is a file STUDY.toml"
        )
    return BOUND_PRESETS[name]


def labels_from(words: str) -> tuple[str, ...]:
    """Kinds of labels that "true", "random" or "both" names."""
    require_choice("--labels", words, (*LABELS, "both"))
    return LABELS if words == "both" else (words,)


# --- samples ----------------------------------------------------------------------------------------------------------


def digits_sample(options: BoundOptions) -> Sample:
    """Some of scikit-learn's digits, with grey values in [0, 1]; the others are held out.

    Raises:
        InputError: more samples than there are, or none left to be held out.
    """
    data = digits(standardize=False, dtype=torch.float32)
    assert options.samples is not None
    if options.samples >= len(data):
        raise InputError(
            f"--samples must be below {len(data):,}, all digits there are, of which some are held out, got "
            f"{options.samples:,}"
        )
    if options.classes == 2:
        data = binary(data)
    learned, rest = data.split(options.samples, stream(options.seed, "bound", "split"))
    words = f"{options.samples:,} of scikit-learn's handwritten digits{_which(options)}"
    return Sample(learned, words, HeldOut(f"{len(rest):,} held-out digits", rest))


def patches_sample(options: BoundOptions) -> Sample:
    """Patches of scikit-learn's two photographs, drawn with replacement; the risk over all of them can be computed."""
    assert options.samples is not None
    population = patch_population(dtype=torch.float32)
    words = f"{options.samples:,} independent {population.size} x {population.size} patches of two photographs"
    whole = HeldOut(f"whole population of {len(population):,} patches", population, exact=True)
    return Sample(population.draw(options.samples, options.seed), words, whole)


def mnist_sample(options: BoundOptions) -> Sample:
    """Training images of the user's copy of MNIST, with grey values in [0, 1]; its test images are held out.

    Raises:
        InputError: as of `hesscope.data.image_set`.
    """
    assert options.folder is not None

    def images(split: str, samples: int | None) -> LabelledData:
        found = image_set(
            "mnist",
            options.folder or "",
            split,
            samples,
            options.seed,
            standardize=False,
            flat=True,
            dtype=torch.float32,
        )
        return binary(found) if options.classes == 2 else found

    data = images("train", options.samples)
    if options.samples is None:  # they are in random order
        data = replace(data, inputs=data.inputs[:MNIST_SAMPLES], labels=data.labels[:MNIST_SAMPLES])
    test = images("test", None)
    words = f"{len(data):,} training images of MNIST{_which(options)}"
    return Sample(data, words, HeldOut(f"{len(test):,} test images", test))


def _which(options: BoundOptions) -> str:
    return ", 0-4 against 5-9" if options.classes == 2 else ""


# --- the network ------------------------------------------------------------------------------------------------------


def initial_network(options: BoundOptions, data: LabelledData) -> MLP:
    """The fully connected ReLU network at initialization, which knows nothing of the samples but their size."""
    widths = (int(data.inputs.shape[1]), *options.hidden, data.classes)
    return mlp(widths, seed=options.seed, dtype=torch.float32, bias=True)


def network_in_words(model: MLP) -> str:
    """Such as "64-600-2 ReLU network, 40,202 parameters"."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return f"{'-'.join(map(str, model.widths))} ReLU network, {parameters:,} parameters"


def train_network(
    model: nn.Module,
    data: LabelledData,
    epochs: int,
    seed: int,
    labels: str,
    identity: str,
    state: Path,
    progress: Callable[[float], None],
) -> None:
    """Train in place with cross-entropy and SGD; a run that was killed goes on from `state`, bit for bit.

    Args:
        epochs: passes over the data, each in an order of its own.
        seed, labels: of the stream (seed, "bound", "order", labels, epoch).
        identity: of the training: the state of another one is not taken up.
        state: file of what has been done; it is deleted in the end.
        progress: called with the share that is done.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
    done = _take_up(model, optimizer, state, identity)
    training, saved = Examples(data.inputs, data.labels, data.labels), time.monotonic()
    for epoch in range(done, epochs):
        order = permutation(len(data), stream(seed, "bound", "order", labels, epoch))
        train_epoch(model, nn.CrossEntropyLoss(), optimizer, training, torch.split(order, BATCH_SIZE))
        if time.monotonic() - saved >= SAVED_EVERY:
            content = {"identity": identity, "epochs": epoch + 1, "model": model.state_dict()}
            with atomic_path(state) as temporary:
                torch.save({**content, "optimizer": optimizer.state_dict()}, temporary)
            saved = time.monotonic()
        progress((epoch + 1) / epochs)
    model.eval()
    state.unlink(missing_ok=True)


def _take_up(model: nn.Module, optimizer: torch.optim.Optimizer, state: Path, identity: str) -> int:
    """Put a training where its file says; returns the epochs done, 0 if there is none that can be gone on with."""
    try:
        content: dict[str, Any] = torch.load(state, weights_only=True)
    except Exception:  # whatever is wrong with it, the training can be done again
        return 0
    if content.get("identity") != identity:
        return 0
    model.load_state_dict(content["model"])
    optimizer.load_state_dict(content["optimizer"])
    return int(content["epochs"])


def _all() -> dict[str, BoundPreset]:
    presets = (
        BoundPreset(
            "digits",
            "a ReLU network on scikit-learn's handwritten digits, 0-4 against 5-9 or all ten; the others are held out",
            BoundOptions(samples=1437, epochs=100, random_epochs=600),
            ("hidden", "classes", "samples", "epochs", "seed"),
            digits_sample,
        ),
        BoundPreset(
            "patches",
            "which of two photographs is a patch of 8 x 8 pixels from? drawn independently, and the true risk over all "
            "531,720 patches beside the bound",
            BoundOptions(samples=40_000, epochs=10, random_epochs=40),
            ("hidden", "samples", "epochs", "seed"),
            patches_sample,
        ),
        BoundPreset(
            "mnist",
            "[DR]'s and [W]'s experiment on your own copy of MNIST, 0-4 against 5-9 or all ten; test images are held "
            "out",
            BoundOptions(samples=None, epochs=20, random_epochs=120),
            ("folder", "hidden", "classes", "samples", "epochs", "seed"),
            mnist_sample,
        ),
    )
    return {each.name: each for each in presets}


BOUND_PRESETS = _all()
