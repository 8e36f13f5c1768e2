"""Causal language models in a local folder: their output layer and what it receives. Nothing is ever downloaded."""

from __future__ import annotations

import hashlib
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hesscope.core.errors import HesscopeError, InputError, ModelError
from hesscope.core.memory import require_memory

MISSING = "hesscope head needs transformers: pip install 'hesscope[transformers]'"

# What a model and its tokenizer are made of. Files up to HASHED bytes count with their content, larger ones (the
# weights) with their size and time of change.
MODEL_FILES = (".json", ".safetensors", ".bin", ".model", ".txt", ".tiktoken")
TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")
HASHED = 2**24

# The checks run on so many tokens, with the head's input scaled so that the largest logit is PROBED: a cap or a scale
# of the logits shows there, however small the model's own logits are.
CHECKED = 8
PROBED = 100.0
TOLERANCE = 1e-4

# Characters tokenized at first for each token wanted; more where that was not enough.
CHARACTERS = 16

# So many blanks in a token are counted rather than shown.
LONG_RUN = 4

# Called with (positions done, positions in all).
Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A causal language model in eval mode, with its tokenizer.

    Attributes:
        model: the transformers model; tokenizer: its tokenizer.
        weight: [C, d] of the output layer; bias: [C] or None.
        tied: whether the weight is that of the input embedding too.
        positions: the largest context, None if the model names no limit.
    """

    model: nn.Module
    tokenizer: Any
    weight: Tensor
    bias: Tensor | None
    tied: bool
    positions: int | None

    @property
    def classes(self) -> int:
        """Vocabulary size C: rows of the output layer."""
        return self.weight.shape[0]

    @property
    def inputs(self) -> int:
        """Width d of what the output layer receives."""
        return self.weight.shape[1]

    @property
    def parameters(self) -> int:
        """Number of parameters, tied ones counted once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def tokens(self, text: str, count: int) -> Tensor:
        """The first `count` tokens of the text (all, if it has fewer), [T] integers, as the tokenizer gives them.

        Raises:
            InputError: the text has fewer than two tokens, or one that the model's vocabulary does not have.
        """
        share = CHARACTERS * count
        with quiet():
            found = self.tokenizer(text[:share])["input_ids"]
            # The last tokens of a cut text may differ from those of the whole.
            while len(found) < count + CHARACTERS and share < len(text):
                share *= 4
                found = self.tokenizer(text[:share])["input_ids"]
        tokens = torch.tensor(found[:count], dtype=torch.long)
        if len(tokens) < 2:
            raise InputError(
                f"the text gives {len(tokens)} token{'' if len(tokens) == 1 else 's'}, at least 2 are needed"
            )
        if int(tokens.max()) >= self.classes:
            raise InputError(
                f"the tokenizer gives token {int(tokens.max())}, but the model's vocabulary has {self.classes}: "
                "they do not belong together"
            )
        return tokens

    def token_text(self, token: int) -> str:
        """What a token stands for, in visible characters; `#number` for a row of the output layer without a token."""
        with quiet():
            piece = self.tokenizer.convert_ids_to_tokens(token) if token < len(self.tokenizer) else None
            if piece is None:
                return f"#{token}"
            text = self.tokenizer.decode([token], clean_up_tokenization_spaces=False)
        if not text or "\N{REPLACEMENT CHARACTER}" in text:  # part of a character: the piece's own name
            text = str(piece)
        elif str(piece).startswith("\N{LOWER ONE EIGHTH BLOCK}") and not text.startswith(" "):
            text = f" {text}"  # SentencePiece marks a leading blank, which decoding a single token drops
        return visible(text)

    def hidden_states(self, tokens: Tensor, context: int, progress: Progress) -> Tensor:
        """What the output layer receives at every position, [T] -> [T, d], in consecutive windows of `context` tokens.

        Raises:
            ModelError: the forward fails or gives values that are not finite.
        """
        parts = []
        for start in range(0, len(tokens), context):
            parts.append(self._head_input(tokens[start : start + context]))
            progress(min(start + context, len(tokens)), len(tokens))
        return torch.cat(parts)

    def require_causal(self, tokens: Tensor) -> None:
        """Raise ModelError if a hidden state depends on a later token."""
        tokens = tokens[:CHECKED]
        if len(tokens) == 1:  # a window of one token has no later one
            return
        changed = tokens.clone()
        changed[-1] = (changed[-1] + 1) % self.classes
        features, others = self._head_input(tokens), self._head_input(changed)
        if float((features - others)[:-1].abs().max()) > TOLERANCE * float(features.abs().max()):
            raise ModelError(
                f"{type(self.model).__name__} sees later tokens, so it is not a causal language model: "
                "its hidden states change when the next token does"
            )

    def require_plain_head(self, tokens: Tensor) -> None:
        """Raise ModelError unless the model's logits are features @ weight.T + bias: others have another Hessian."""
        features = self._head_input(tokens[:CHECKED])
        peak = float((features @ self.weight.T).abs().max())
        scale = PROBED / peak if peak > 0 else 1.0
        expected = (scale * features) @ self.weight.T
        if self.bias is not None:
            expected = expected + self.bias
        found = self._logits(tokens[:CHECKED], scale)
        same_shape = found.shape == expected.shape
        if not same_shape or float((found - expected).abs().max()) > TOLERANCE * float(expected.abs().max()):
            raise ModelError(
                f"the logits of {type(self.model).__name__} are not weight times hidden state plus bias: it caps, "
                "scales or changes them (final_logit_softcapping, logit_scale, ...), which has another Hessian"
            )

    def _head_input(self, tokens: Tensor) -> Tensor:
        """[T] -> [T, d]; the output layer is given one position only, so that no logits of all are made."""
        received: list[Tensor] = []

        def keep(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            received.append(arguments[0])
            return (arguments[0][..., :1, :], *arguments[1:])

        self._forward(tokens, keep)
        if len(received) != 1 or received[0].shape != (1, len(tokens), self.inputs):
            raise ModelError(
                f"{type(self.model).__name__} does not call its output layer once for all positions: "
                "what it receives is not known"
            )
        features = received[0][0].to(self.weight.dtype)
        if not bool(torch.isfinite(features).all()):
            raise ModelError("the model's hidden states hold values that are not finite")
        return features

    def _logits(self, tokens: Tensor, scale: float) -> Tensor:
        """The model's own logits [T, C] with its output layer's input scaled."""
        logits: Tensor = self._forward(tokens, lambda _, arguments: (scale * arguments[0], *arguments[1:])).logits
        return logits[0].to(self.weight.dtype)

    def _forward(self, tokens: Tensor, hook: Callable[[nn.Module, Any], Any]) -> Any:
        """One pass over a window with a hook before the output layer."""
        handle = self.model.get_output_embeddings().register_forward_pre_hook(hook)  # type: ignore[operator]
        try:
            with torch.no_grad(), quiet():
                return self.model(input_ids=tokens[None], attention_mask=torch.ones_like(tokens)[None])
        except HesscopeError:
            raise
        except Exception as error:
            raise ModelError(f"{type(self.model).__name__} fails on the text: {_short(error)}") from error
        finally:
            handle.remove()


def transformers_version() -> str:
    """Version of transformers; it is not imported (seconds).

    Raises:
        InputError: it is not installed.
    """
    if util.find_spec("transformers") is None:
        raise InputError(MISSING)
    return metadata.version("transformers")


def require_model_folder(folder: Path) -> None:
    """Raise InputError unless the folder looks like a saved model with its tokenizer."""
    if not folder.is_dir():
        raise InputError(f"--model = {folder} is not a folder; it must be one that save_pretrained wrote")
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} has no config.json: it holds no model that save_pretrained wrote")
    if not any(True for pattern in TOKENIZER_FILES for _ in folder.glob(pattern)):
        raise InputError(f"{folder} has no tokenizer: save it beside the model (tokenizer.save_pretrained)")


def model_fingerprint(folder: Path) -> str:
    """Hash of the files of a model: content of small ones, size and time of change of large ones."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(folder.iterdir()):
        if path.suffix in MODEL_FILES and path.is_file():
            status = path.stat()
            digest.update(f"{path.name} {status.st_size} ".encode())
            digest.update(path.read_bytes() if status.st_size <= HASHED else str(status.st_mtime_ns).encode())
    return digest.hexdigest()


def read_text(path: Path) -> str:
    """A text file in UTF-8.

    Raises:
        InputError: it cannot be read, is empty, or is no text.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"--text: cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"--text: {path} is not text in UTF-8 (byte {error.start})") from error
    if "\0" in text:
        raise InputError(f"--text: {path} is not text: it has a zero byte")
    if not text:
        raise InputError(f"--text: {path} is empty")
    return text


def load_language_model(folder: Path, dtype: torch.dtype) -> LanguageModel:
    """Load model and tokenizer from a local folder, in `dtype` whatever they were stored in; no code of it is run.

    Raises:
        InputError: transformers is missing, or the folder holds no causal language model that can be loaded.
        ModelError: weights are missing or not finite, or the model has no output layer.
        TooLargeError: not even the files fit into memory.
    """
    version = tuple(int(part) for part in transformers_version().split(".")[:2])
    require_model_folder(folder)
    weights = sum(path.stat().st_size for ending in ("safetensors", "bin") for path in folder.glob(f"*.{ending}"))
    require_memory(weights, "cpu", f"the model in {folder}", "a smaller model")
    local = {"local_files_only": True, "trust_remote_code": False}
    with quiet():
        from transformers import AutoModelForCausalLM, AutoTokenizer

        named = {"dtype" if version >= (4, 56) else "torch_dtype": dtype}
        try:
            model, loaded = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **local, **named)
        except Exception as error:
            raise InputError(f"cannot load a causal language model from {folder}: {_short(error)}") from error
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, **local)
        except Exception as error:
            raise InputError(f"cannot load a tokenizer from {folder}: {_short(error)}") from error
    missing = sorted(loaded["missing_keys"])
    if missing:
        raise ModelError(
            f"{folder} lacks {len(missing)} of the tensors of {type(model).__name__}, {missing[0]} for one: "
            "they would be random"
        )
    return _checked(model, tokenizer)


def visible(text: str) -> str:
    """The text with a blank as ␣, eight as ␣×8, and everything else that cannot be seen as Python's escapes."""
    blank = "\N{OPEN BOX}"
    escaped = "".join(
        character
        if character == " " or (character.isprintable() and character != "\\")
        else character.encode("unicode_escape").decode("ascii")
        for character in text
    )
    runs = re.sub(f" {{{LONG_RUN},}}", lambda run: f"{blank}\N{MULTIPLICATION SIGN}{len(run[0])}", escaped)
    return runs.replace(" ", blank)


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


def _checked(model: Any, tokenizer: Any) -> LanguageModel:
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        raise ModelError(f"{type(model).__name__} has no output layer with a weight of shape [vocabulary, width]")
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise ModelError(f"{name} of the model holds values that are not finite")
    model.eval().requires_grad_(False)
    model.config.use_cache = False
    bias = getattr(head, "bias", None)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    embedding = getattr(model.get_input_embeddings(), "weight", None)
    return LanguageModel(
        model,
        tokenizer,
        weight.detach(),
        None if bias is None else bias.detach(),
        tied=isinstance(embedding, Tensor) and embedding.data_ptr() == weight.data_ptr(),
        positions=positions if isinstance(positions, int) and positions > 0 else None,
    )


def _short(error: Exception) -> str:
    """Class and first line of an error of somebody else's."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"
