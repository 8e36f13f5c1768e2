"""Causal language models in a local folder, trainable as a whole, with batches of text. Nothing is ever downloaded.

transformers is loaded when a function needs it; `import hesscope.models` does not.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hesscope.core.checks import require_positive_int
from hesscope.core.errors import InputError, ModelError
from hesscope.core.memory import require_memory

TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")

# Characters tokenized at first for each token wanted; more where that was not enough.
CHARACTERS = 16

# Vocabularies are padded to round sizes: a model may have so many more tokens than its tokenizer, or a tenth more.
PADDING = 256


@dataclass(frozen=True, eq=False)
class CausalModel:
    """A causal language model in eval mode, all its parameters trainable, with its tokenizer.

    Attributes:
        model: the transformers model; tokenizer: its tokenizer.

    Raises:
        InputError: the tokenizer has tokens that the model has not, or far fewer than the model.
    """

    model: nn.Module
    tokenizer: Any

    def __post_init__(self) -> None:
        largest = max(self.tokenizer.get_vocab().values(), default=0)
        spare = self.classes - 1 - largest
        if spare < 0 or spare > max(PADDING, self.classes // 10):
            raise InputError(
                f"the tokenizer has {largest + 1} tokens, but the model's vocabulary {self.classes}: "
                "they do not belong together"
            )

    @property
    def classes(self) -> int:
        """Vocabulary size C: rows of the output layer."""
        return int(output_weight(self.model).shape[0])

    @property
    def positions(self) -> int | None:
        """The largest context, None if the model names no limit."""
        return positions_of(self.model)

    def batches(
        self, text: str, contexts: int = 8, length: int = 64, batch_size: int | None = None
    ) -> list[dict[str, Tensor]]:
        """The beginning of a text, cut into windows that follow each other, as data of a hesscope.Objective.

        Every window starts without a past, so that it has length - 1 next tokens to predict.

        Args:
            text: at least contexts * length tokens of it.
            contexts: number of windows; length: tokens of each, at least 2 and at most the model's positions.
            batch_size: windows in a batch; all of them unless told. Smaller batches need less memory.

        Returns:
            Dicts of input_ids and labels, [batch_size, length] integers each; labels are shifted by the objective.

        Raises:
            InputError: the text is too short, or an argument does not fit.
        """
        require_positive_int("contexts", contexts)
        require_positive_int("length", length)
        require_positive_int("batch_size", contexts if batch_size is None else batch_size)
        longest = self.positions
        if length < 2:
            raise InputError(f"length must be at least 2, since every sample needs a next token, got {length}")
        if longest is not None and length > longest:
            raise InputError(f"length must be at most {longest}, the positions of the model, got {length}")
        tokens = first_tokens(self.tokenizer, text, contexts * length, self.classes)
        if len(tokens) < length:
            raise InputError(f"the text has {len(tokens)} tokens, less than one context of length = {length}")
        if len(tokens) < contexts * length:
            raise InputError(
                f"the text has {len(tokens)} tokens, {len(tokens) // length} contexts of length = {length}, "
                f"but contexts = {contexts} were asked for"
            )
        windows = tokens.view(contexts, length)
        return [{"input_ids": part, "labels": part.clone()} for part in torch.split(windows, batch_size or contexts)]


def load_language_model(folder: str | Path, dtype: torch.dtype = torch.float32) -> CausalModel:
    """Load a causal language model and its tokenizer from what `save_pretrained` wrote; no code of it is run.

    Args:
        folder: with config.json, weights and tokenizer.
        dtype: of the parameters, whatever they were stored in: torch.float32 or torch.float64.

    Raises:
        InputError: transformers is missing, or the folder holds no model or tokenizer that can be loaded and belong
            together.
        ModelError: weights are missing or not finite, or the model has no output layer.
        TooLargeError: not even the files fit into memory.
    """
    folder = Path(folder)
    transformers_version("a language model")
    require_model_folder(folder, "folder")
    return CausalModel(load_network(folder, dtype), load_tokenizer(folder))


def load_network(folder: Path, dtype: torch.dtype) -> nn.Module:
    """The model of a folder in eval mode, without a cache of keys and values, all parameters trainable; see above."""
    version = tuple(int(part) for part in transformers_version("a language model").split(".")[:2])
    weights = sum(path.stat().st_size for ending in ("safetensors", "bin") for path in folder.glob(f"*.{ending}"))
    require_memory(weights, "cpu", f"the model in {folder}", "a smaller model")
    with quiet():
        from transformers import AutoModelForCausalLM

        named = {"dtype" if version >= (4, 56) else "torch_dtype": dtype}
        try:
            model, loaded = AutoModelForCausalLM.from_pretrained(
                folder, output_loading_info=True, local_files_only=True, trust_remote_code=False, **named
            )
        except Exception as error:
            raise InputError(f"cannot load a causal language model from {folder}: {in_short(error)}") from error
    missing = sorted(loaded["missing_keys"])
    if missing:
        raise ModelError(
            f"{folder} lacks {len(missing)} of the tensors of {type(model).__name__}, {missing[0]} for one: "
            "they would be random"
        )
    output_weight(model)
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise ModelError(f"{name} of the model holds values that are not finite")
    model.eval().requires_grad_(True)
    model.config.use_cache = False
    found: nn.Module = model
    return found


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder.

    Raises:
        InputError: transformers is missing, or there is none that can be loaded.
    """
    transformers_version("a tokenizer")
    with quiet():
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:
            raise InputError(f"cannot load a tokenizer from {folder}: {in_short(error)}") from error


def first_tokens(tokenizer: Any, text: str, count: int, classes: int) -> Tensor:
    """The first `count` tokens of a text (all, if it has fewer), [T] integers, as the tokenizer gives them.

    Raises:
        InputError: the text has fewer than two tokens, or one that a vocabulary of `classes` does not have.
    """
    share = CHARACTERS * count
    with quiet():
        found = tokenizer(text[:share])["input_ids"]
        # The last tokens of a cut text may differ from those of the whole.
        while len(found) < count + CHARACTERS and share < len(text):
            share *= 4
            found = tokenizer(text[:share])["input_ids"]
    tokens = torch.tensor(found[:count], dtype=torch.long)
    if len(tokens) < 2:
        raise InputError(f"the text gives {len(tokens)} token{'' if len(tokens) == 1 else 's'}, at least 2 are needed")
    if int(tokens.max()) >= classes:
        raise InputError(
            f"the tokenizer gives token {int(tokens.max())}, but the model's vocabulary has {classes}: "
            "they do not belong together"
        )
    return tokens


def transformers_version(what: str) -> str:
    """Version of transformers, which `what` needs; it is not imported (seconds).

    Raises:
        InputError: it is not installed.
    """
    if util.find_spec("transformers") is None:
        raise InputError(f"{what} needs transformers: pip install 'hesscope[transformers]'")
    return metadata.version("transformers")


def require_model_folder(folder: Path, argument: str) -> None:
    """Raise InputError, naming the argument, unless the folder looks like a saved model with its tokenizer."""
    if not folder.is_dir():
        raise InputError(f"{argument} = {folder} is not a folder; it must be one that save_pretrained wrote")
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} has no config.json: it holds no model that save_pretrained wrote")
    if not any(True for pattern in TOKENIZER_FILES for _ in folder.glob(pattern)):
        raise InputError(f"{folder} has no tokenizer: save it beside the model (tokenizer.save_pretrained)")


def output_weight(model: Any) -> Tensor:
    """The weight [C, d] of a model's output layer.

    Raises:
        ModelError: it has none.
    """
    weight = getattr(model.get_output_embeddings(), "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        raise ModelError(f"{type(model).__name__} has no output layer with a weight of shape [vocabulary, width]")
    return weight


def positions_of(model: Any) -> int | None:
    """The largest context of a model, None if it names no limit."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what transformers logs, warns and draws while the body runs: it is meant for its own users."""
    from transformers.utils import logging as chatter

    level, bars = chatter.get_verbosity(), chatter.is_progress_bar_enabled()
    chatter.set_verbosity(logging.CRITICAL)
    chatter.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        chatter.set_verbosity(level)
        if bars:
            chatter.enable_progress_bar()


def in_short(error: Exception) -> str:
    """Class and first line of an error of somebody else's."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"
