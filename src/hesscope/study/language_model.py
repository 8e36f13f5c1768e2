"""Causal language models in a local folder: their output layer and what it receives. Nothing is ever downloaded."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hesscope.core.errors import HesscopeError, InputError, ModelError
from hesscope.models import language_model
from hesscope.models.language_model import in_short, quiet

# What a model and its tokenizer are made of. Files up to HASHED bytes count with their content, larger ones (the
# weights) with their size and time of change.
MODEL_FILES = (".json", ".safetensors", ".bin", ".model", ".txt", ".tiktoken")
HASHED = 2**24

# The checks run on so many tokens, with the head's input scaled so that the largest logit is PROBED: a cap or a scale
# of the logits shows there, however small the model's own logits are.
CHECKED = 8
PROBED = 100.0
TOLERANCE = 1e-4

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
        return language_model.first_tokens(self.tokenizer, text, count, self.classes)

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
            raise ModelError(f"{type(self.model).__name__} fails on the text: {in_short(error)}") from error
        finally:
            handle.remove()


def transformers_version() -> str:
    """Version of transformers; it is not imported (seconds).

    Raises:
        InputError: it is not installed.
    """
    return language_model.transformers_version("hesscope head")


def require_model_folder(folder: Path) -> None:
    """Raise InputError unless the folder looks like a saved model with its tokenizer."""
    language_model.require_model_folder(folder, "--model")


def model_fingerprint(folder: Path) -> str:
    """Hash of the files of a model: content of small ones, size and time of change of large ones."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(folder.iterdir()):
        if path.suffix in MODEL_FILES and path.is_file():
            status = path.stat()
            digest.update(f"{path.name} {status.st_size} ".encode())
            digest.update(path.read_bytes() if status.st_size <= HASHED else str(status.st_mtime_ns).encode())
    return digest.hexdigest()


def read_text(path: Path, argument: str = "--text") -> str:
    """A text file in UTF-8; `argument` is what names it, for messages.

    Raises:
        InputError: it cannot be read, is empty, or is no text.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{argument}: cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{argument}: {path} is not text in UTF-8 (byte {error.start})") from error
    if "\0" in text:
        raise InputError(f"{argument}: {path} is not text: it has a zero byte")
    if not text:
        raise InputError(f"{argument}: {path} is empty")
    return text


def load_language_model(folder: Path, dtype: torch.dtype) -> LanguageModel:
    """Load model and tokenizer from a local folder, in `dtype` whatever they were stored in; no code of it is run.

    Raises:
        InputError: transformers is missing, or the folder holds no causal language model that can be loaded.
        ModelError: weights are missing or not finite, or the model has no output layer.
        TooLargeError: not even the files fit into memory.
    """
    transformers_version()
    require_model_folder(folder)
    model: Any = language_model.load_network(folder, dtype)
    model.requires_grad_(False)
    weight = language_model.output_weight(model).detach()
    bias = getattr(model.get_output_embeddings(), "bias", None)
    embedding = getattr(model.get_input_embeddings(), "weight", None)
    return LanguageModel(
        model,
        language_model.load_tokenizer(folder),
        weight,
        None if bias is None else bias.detach(),
        tied=isinstance(embedding, Tensor) and embedding.data_ptr() == weight.data_ptr(),
        positions=language_model.positions_of(model),
    )


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
