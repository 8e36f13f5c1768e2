"""The output layer of a trained language model: exact energies over all C^2 blocks of its Hessian, token by token."""

from __future__ import annotations

import hashlib
import time
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hesscope._version import __version__
from hesscope.core.checks import require_choice, require_positive_int
from hesscope.core.errors import InputError, ModelError
from hesscope.core.memory import human_bytes, require_memory
from hesscope.operators.closed_form import OutputLayerEnergies, output_layer_blocks, output_layer_energies
from hesscope.operators.closed_form.output_layer import DEFAULT_MEMORY
from hesscope.study.analyze import human_seconds
from hesscope.study.language_model import (
    LanguageModel,
    load_language_model,
    model_fingerprint,
    read_text,
    require_model_folder,
    transformers_version,
)
from hesscope.study.steps import Progress, Reporter, Step, run_steps
from hesscope.study.store import Store
from hesscope.theory import static_force

if TYPE_CHECKING:
    import xarray as xr

FEATURES, RESULT = "features", "head"
DTYPES = {"float32": torch.float32, "float64": torch.float64}
DEFAULT_CONTEXT = 512
LARGEST_TOP = 100

# Entries of a tile of logits beside the energies (mean probabilities, entropies).
TILE = 2**23
# Sizes of the products on which the time is measured, and tokens of the pass that is timed.
TIMED_SAMPLES, TIMED_CLASSES, TIMED_TOKENS = 512, 2048, 64

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class HeadSettings:
    """What `hesscope head` is asked for.

    Attributes:
        model: folder with a model and its tokenizer; text: file in UTF-8.
        tokens: tokens of the text to use, at most; context: tokens of a window (None: the model's positions, at most
            512).
        top: tokens in the table and the block map, at most C; dtype: "float32" or "float64".

    Raises:
        InputError: a number outside its range, or another dtype.
    """

    model: Path
    text: Path
    tokens: int = 1024
    context: int | None = None
    top: int = 20
    dtype: str = "float32"

    def __post_init__(self) -> None:
        require_positive_int("--tokens", self.tokens)
        if self.tokens < 2:
            raise InputError(f"--tokens must be at least 2, since every sample needs a next token, got {self.tokens}")
        if self.context is not None:
            require_positive_int("--context", self.context)
        require_positive_int("--top", self.top)
        if self.top > LARGEST_TOP:
            raise InputError(f"--top must be at most {LARGEST_TOP}, got {self.top}")
        require_choice("--dtype", self.dtype, DTYPES)


@dataclass(frozen=True, eq=False)
class HeadStudy:
    """Everything that the measurement needs, loaded and checked; N = tokens - 1 samples."""

    settings: HeadSettings
    model: LanguageModel
    tokens: Tensor
    context: int
    text_fingerprint: str

    @property
    def samples(self) -> int:
        """N: positions whose next token is known."""
        return len(self.tokens) - 1

    @cached_property
    def seconds(self) -> tuple[float, float]:
        """Time for the hidden states and for the energies, measured on a few tokens and on a small part of the head."""
        model, N = self.model, self.samples
        few = self.tokens[: min(TIMED_TOKENS, self.context, N)]
        start = time.perf_counter()
        model.hidden_states(few, len(few), lambda done, whole: None)
        reading = (time.perf_counter() - start) * N / len(few)
        rows, classes = min(N, TIMED_SAMPLES), min(model.classes, TIMED_CLASSES)
        features = torch.ones(rows, model.inputs, dtype=model.weight.dtype)
        start = time.perf_counter()
        output_layer_energies(features, weight=torch.zeros_like(model.weight[:classes]))
        multiplying = (time.perf_counter() - start) * (N / rows) ** 2 * model.classes / classes
        return reading, multiplying


@dataclass(frozen=True, eq=False)
class HeadStructure:
    """What was found, with C classes (tokens), N samples and the k tokens of largest diagonal energy.

    Attributes:
        energies: of all C^2 blocks.
        probability: [C] mean predicted probability; count: [C] how often the token came next.
        entropy: [N] of the predictions, in nats; loss: [N] minus log probability of the token that came next.
        top: [k] token numbers, largest ||H_ii||^2 first; texts: what they stand for, visibly.
        blocks: [k, k] energies ||H_ij||^2 among them.
        random_ratio: r of a random linear layer with white inputs of the same C and d/N (MATH.md, section 4.3).
    """

    energies: OutputLayerEnergies
    probability: Array
    count: npt.NDArray[np.int64]
    entropy: Array
    loss: Array
    top: npt.NDArray[np.int64]
    texts: tuple[str, ...]
    blocks: Array
    random_ratio: float

    def to_xarray(self) -> xr.Dataset:
        """Data set with dimensions class, sample, rank and rank_; OutputLayerEnergies.from_xarray reads it, too."""
        result = self.energies.to_xarray()
        result["mean_probability"] = ("class", self.probability)
        result["next_count"] = ("class", self.count)
        result["entropy"] = ("sample", self.entropy)
        result["loss"] = ("sample", self.loss)
        result["top_token"] = ("rank", self.top)
        result["top_text"] = ("rank", np.asarray(self.texts, dtype=object))
        result["block_energy"] = (("rank", "rank_"), self.blocks)
        return result.assign_attrs(random_ratio=self.random_ratio)


def head_store(folder: Path, settings: HeadSettings) -> Store:
    """Where the results go, under a fingerprint of all that they depend on; the model is not loaded.

    Raises:
        InputError: transformers is missing, or there is no such model folder or text.
    """
    versions = (__version__, torch.__version__, transformers_version())
    require_model_folder(settings.model)
    asked = {key: value for key, value in asdict(settings).items() if key not in ("model", "text")}
    content = (versions, sorted(asked.items()), model_fingerprint(settings.model), _hash(read_text(settings.text)))
    return Store(folder, _hash(repr(content)))


def prepare_head(settings: HeadSettings) -> HeadStudy:
    """Load the model and the text, and check that the formula holds for them.

    Raises:
        HesscopeError: whatever does not fit, in one line; nothing has been written then.
    """
    text = read_text(settings.text)
    model = load_language_model(settings.model, DTYPES[settings.dtype])
    longest = model.positions
    if settings.context is not None and longest is not None and settings.context > longest:
        raise InputError(f"--context must be at most {longest}, the positions of the model, got {settings.context}")
    context = settings.context or min(longest or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
    tokens = model.tokens(text, settings.tokens)
    model.require_causal(tokens[:context])
    model.require_plain_head(tokens[:context])
    study = HeadStudy(settings, model, tokens, context, _hash(text))
    require_memory(expected_bytes(study), "cpu", f"this study ({study.samples:,} samples)", "fewer --tokens")
    return study


def describe_head(study: HeadStudy, folder: Path) -> list[tuple[str, str]]:
    """What is about to be done: (what, how much) lines."""
    model = study.model
    extras = [" with bias"] * (model.bias is not None) + [", tied to the input embedding"] * model.tied
    return [
        ("model", f"{type(model.model).__name__}, {model.parameters:,} parameters, in {study.settings.dtype}"),
        ("head", f"C = {model.classes:,} tokens, width d = {model.inputs:,}{''.join(extras)}"),
        ("samples", f"N = {study.samples:,} next-token predictions, in windows of {study.context} tokens"),
        ("blocks", f"all {model.classes**2:,} blocks of {model.inputs:,} × {model.inputs:,}, exactly"),
        ("time", f"about {human_seconds(sum(study.seconds))}"),
        ("memory", f"at most {human_bytes(expected_bytes(study))} beyond the model"),
        ("results", str(folder)),
    ]


def expected_bytes(study: HeadStudy) -> int:
    """Memory of the hidden states, of the tiles, and of the N x N matrices of the block map, beyond the model."""
    N, k = study.samples, min(study.settings.top, study.model.classes)
    return 8 * N * (3 * study.model.inputs + 3 * N + 4 * k) + DEFAULT_MEMORY + 4 * 8 * TILE


def run_head(study: HeadStudy, store: Store, report: Reporter) -> int:
    """Measure; returns how many steps were found done from an earlier run under the same settings."""
    reading, multiplying = study.seconds
    steps = [
        Step(FEATURES, "reading hidden states", reading, lambda progress: _features(study, progress)),
        Step(RESULT, "energies", multiplying, lambda progress: _energies(study, store.require(FEATURES), progress)),
    ]
    return run_steps(steps, store, report)


def _features(study: HeadStudy, progress: Progress) -> xr.Dataset:
    """What the output layer receives at every position whose next token is known, with that token."""
    import xarray as xr

    features = study.model.hidden_states(study.tokens[:-1], study.context, lambda done, all_: progress(done / all_))
    return xr.Dataset(
        {
            "feature": (("sample", "dimension"), features.numpy()),
            "token": ("sample", study.tokens[:-1].numpy()),
            "next_token": ("sample", study.tokens[1:].numpy()),
        },
        attrs={"context": study.context},
    )


def _energies(study: HeadStudy, hidden: xr.Dataset, progress: Progress) -> xr.Dataset:
    model = study.model
    features = torch.from_numpy(hidden["feature"].to_numpy())
    following = torch.from_numpy(hidden["next_token"].to_numpy())
    weight, bias = model.weight, model.bias
    probability, entropy, loss = _predictions(model, features, following)
    energies = output_layer_energies(
        features, weight=weight, bias=bias, progress=lambda done, whole: progress(0.98 * done / whole)
    )
    provenance = replace(energies.provenance, data_fingerprint=study.text_fingerprint)
    energies = replace(energies, provenance=provenance)
    if not np.isfinite(energies.diagonal + energies.off_diagonal):
        raise ModelError(f"the energies overflow {study.settings.dtype}: the hidden states are too large")
    top = np.argsort(-energies.per_class, kind="stable")[: study.settings.top]
    structure = HeadStructure(
        energies=energies,
        probability=probability,
        count=np.bincount(following.numpy(), minlength=model.classes),
        entropy=entropy,
        loss=loss,
        top=top,
        texts=tuple(model.token_text(int(token)) for token in top),
        blocks=output_layer_blocks(features, top.tolist(), weight=weight, bias=bias),
        random_ratio=static_force("linear", "cross_entropy", model.classes, model.inputs / study.samples).output_ratio,
    )
    return structure.to_xarray().assign_attrs(
        model=study.settings.model.resolve().name,
        model_class=type(model.model).__name__,
        parameters=model.parameters,
        inputs=model.inputs,
        bias=int(model.bias is not None),
        tied=int(model.tied),
        text=study.settings.text.name,
        context=study.context,
        transformers=transformers_version(),
    )


def _predictions(model: LanguageModel, features: Tensor, following: Tensor) -> tuple[Array, Array, Array]:
    """Mean probability [C], entropy [N] and loss [N] of the predictions, in float64, a few rows of logits at a time."""
    total = torch.zeros(model.classes, dtype=torch.float64)
    entropies, losses = [], []
    rows = max(1, TILE // model.classes)
    for start in range(0, len(features), rows):
        logits = (features[start : start + rows] @ model.weight.T).double()
        if model.bias is not None:
            logits += model.bias
        logp = torch.log_softmax(logits, dim=1)
        p = logp.exp()
        total += p.sum(dim=0)
        entropies.append(-torch.special.xlogy(p, p).sum(dim=1))
        losses.append(-logp.gather(1, following[start : start + rows, None])[:, 0])
    return (total / len(features)).numpy(), torch.cat(entropies).numpy(), torch.cat(losses).numpy()


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
