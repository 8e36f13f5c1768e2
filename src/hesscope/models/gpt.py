"""A small GPT-2 with a real vocabulary, trained for a minute on text that every Python has, to try things on."""

from __future__ import annotations

import math
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from hesscope.core.checks import require_positive_int
from hesscope.core.errors import InputError
from hesscope.core.rng import normal, stream
from hesscope.models.language_model import quiet, transformers_version

# Of the standard library, in bytes: enough for 32k byte pairs, and read and cut into pairs within seconds.
TEXT_BYTES = 6 * 2**20
SKIPPED = ("site-packages", "dist-packages", "__pycache__")

END = "<|endoftext|>"
# A byte-level tokenizer has all bytes, and the end of a text.
SMALLEST_VOCABULARY, LARGEST_VOCABULARY = 257, 2**15

INITIAL_DEVIATION = 0.02  # of GPT-2
LEARNING_RATE, WARM_UP, LAST_RATE = 3e-3, 0.05, 0.1

# Called with (steps done, steps in all, loss of the last one in nats).
Progress = Callable[[int, int, float], None]


@dataclass(frozen=True, eq=False)
class TrainedGPT:
    """What `train_small_gpt` made.

    Attributes:
        folder: with model and tokenizer, as `save_pretrained` writes them.
        parameters: number of them, tied ones counted once; vocabulary: C.
        losses: [steps done] mean next-token loss of each step's batch, in nats.
        tokens: of the text it was trained on; seconds: taken, tokenizer included.
        converged: whether all steps were done; message: what happened.
    """

    folder: Path
    parameters: int
    vocabulary: int
    losses: npt.NDArray[np.float64]
    tokens: int
    seconds: float
    converged: bool
    message: str

    @property
    def loss(self) -> float:
        """Mean loss over the last tenth of the steps; log(vocabulary) is that of a model that knows nothing."""
        return float(self.losses[-max(1, len(self.losses) // 10) :].mean())


def train_small_gpt(
    folder: str | Path,
    layers: int = 4,
    width: int = 128,
    heads: int = 4,
    context: int = 64,
    vocabulary: int = 8192,
    steps: int = 300,
    batch_size: int = 8,
    seed: int = 0,
    seconds: float | None = None,
    text_bytes: int = TEXT_BYTES,
    progress: Progress = lambda done, steps, loss: None,
) -> TrainedGPT:
    """Build a GPT-2 and a byte-level BPE tokenizer, train both on Python's standard library, and save them.

    The folder can be read by `load_language_model`, by a study's `model = "hf:DIR"` and by transformers. Equal
    arguments give equal files on the same machine with the same number of threads, unless `seconds` cut the training.

    Args:
        folder: where to save; made if it is not there.
        layers, width, heads, context: of the model; heads divide the width; context is its number of positions.
        vocabulary: tokens, from 257 to 32768.
        steps: of Adam, on batch_size windows of the text each.
        seed: root of the random streams of initialization and batches.
        seconds: after which training ends even so; None for no limit.
        text_bytes: how much of the standard library's source to read, in order of the files' names.
        progress: called after every step.

    Raises:
        InputError: transformers is missing, an argument does not fit, or there is too little text for the vocabulary.
    """
    folder = Path(folder)
    sizes = {"layers": layers, "width": width, "heads": heads, "context": context, "vocabulary": vocabulary}
    for name, value in (sizes | {"steps": steps, "batch_size": batch_size, "text_bytes": text_bytes}).items():
        require_positive_int(name, value)
    if width % heads:
        raise InputError(f"heads must divide width = {width}, got {heads}")
    if context < 2:
        raise InputError(f"context must be at least 2, since every sample needs a next token, got {context}")
    if not SMALLEST_VOCABULARY <= vocabulary <= LARGEST_VOCABULARY:
        raise InputError(
            f"vocabulary must lie between {SMALLEST_VOCABULARY} (all bytes, and the end of a text) and "
            f"{LARGEST_VOCABULARY}, got {vocabulary}"
        )
    if seconds is not None and not seconds > 0:
        raise InputError(f"seconds must be positive or None, got {seconds!r}")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"folder = {folder} is not a folder")
    transformers_version("train_small_gpt")
    start = time.perf_counter()
    text = standard_library(text_bytes)
    tokenizer = _byte_pairs(text, vocabulary, context)
    with quiet():
        tokens = torch.tensor(tokenizer(text)["input_ids"])
    if len(tokens) <= context:
        raise InputError(f"the text has {len(tokens)} tokens, it needs more than context = {context}: text_bytes")
    model = new_gpt(layers, width, heads, context, vocabulary, seed)
    losses = []
    for loss in _training(model, tokens, steps, batch_size, context, seed):
        losses.append(loss)
        progress(len(losses), steps, loss)
        if seconds is not None and time.perf_counter() - start > seconds:
            break
    with quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    done = len(losses) == steps
    return TrainedGPT(
        folder=folder,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        vocabulary=vocabulary,
        losses=np.array(losses),
        tokens=len(tokens),
        seconds=time.perf_counter() - start,
        converged=done,
        message=f"all {steps} steps done" if done else f"{len(losses)} of {steps} steps in {seconds:g} s",
    )


def standard_library(size: int = TEXT_BYTES) -> str:
    """The first `size` bytes of the source of Python's standard library, files in the order of their names.

    Raises:
        InputError: this Python has no source beside it.
    """
    root = Path(sysconfig.get_path("stdlib"))
    parts, read = [], 0
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        if read >= size:
            break
        if any(part in SKIPPED for part in path.relative_to(root).parts):
            continue
        try:
            content = path.read_bytes()[: size - read].decode("utf-8", "ignore")
        except OSError:
            continue
        parts.append(content)
        read += len(content.encode())
    if not parts:
        raise InputError(f"there is no source of the standard library in {root}")
    return "".join(parts)


def _byte_pairs(text: str, vocabulary: int, context: int) -> Any:
    """A byte-level BPE tokenizer of GPT-2's kind, trained on the text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[END],
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    found = tokenizer.get_vocab_size()
    if found != vocabulary:
        raise InputError(
            f"vocabulary = {vocabulary} is too large for this text, which has {found} tokens; "
            "ask for fewer, or read more of it (text_bytes)"
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, model_max_length=context)


def new_gpt(layers: int, width: int, heads: int, context: int, vocabulary: int, seed: int) -> Any:
    """GPT-2 without dropout, initialized as in its paper from streams of its own."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=vocabulary,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        n_positions=context,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng(devices=[]), quiet():  # what transformers draws is overwritten
        model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)  # norms and biases
                continue
            # Every layer adds to the residual stream twice.
            share = math.sqrt(2 * layers) if name.endswith("c_proj.weight") else 1.0
            drawn = normal(tuple(parameter.shape), stream(seed, "train_small_gpt", name))
            parameter.copy_(INITIAL_DEVIATION / share * drawn)
    return model


def _training(
    model: nn.Module, tokens: Tensor, steps: int, batch_size: int, context: int, seed: int
) -> Iterator[float]:
    """One step of Adam after the other; gives the loss before each."""
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98))
    offsets = torch.arange(context)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * _rate(step, steps)
        starts = stream(seed, "train_small_gpt", "batch", step).integers(0, len(tokens) - context, batch_size)
        windows = tokens[torch.from_numpy(starts)[:, None] + offsets]
        logits = model(input_ids=windows).logits
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        yield float(loss.detach())
    model.eval()


def _rate(step: int, steps: int) -> float:
    """Warm-up, then half a cosine down to LAST_RATE."""
    warm = max(1.0, WARM_UP * steps)
    if step < warm:
        return (step + 1) / math.ceil(warm)
    return LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * (step - warm) / max(1.0, steps - warm))) / 2
