"""Causal language models from a folder, and their batches of text."""

import json
import shutil
import socket
import sys

import pytest
import torch
from torch.nn import functional

import hesscope as hs
from hesscope.core import memory
from hesscope.core.errors import InputError, ModelError, TooLargeError
from tests.language_models import folder_of, library_text
from tests.language_models import new_model as new_network


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Name of a model -> its folder, made on first use."""
    return lambda name: folder_of(tmp_path_factory, name)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_three_lines_give_the_objective_of_the_models_own_loss(kind, dtype, folders):
    found = hs.models.load_language_model(folders(kind), dtype)
    text = library_text()[:2000]
    batches = found.batches(text, contexts=5, length=16, batch_size=2)
    objective = hs.Objective(found.model, "cross_entropy", batches)
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(2, 16), (2, 16), (1, 16)]
    tokens = torch.tensor(found.tokenizer(text)["input_ids"])
    assert torch.equal(torch.cat([batch["input_ids"] for batch in batches]).flatten(), tokens[:80])
    assert objective.num_terms == 5 * 15
    assert objective.parameters.dtype == dtype
    assert objective.parameters.size == sum(parameter.numel() for parameter in found.model.parameters())
    assert not found.model.training and not found.model.config.use_cache
    with torch.no_grad():
        logits = found.model(input_ids=tokens[:80].view(5, 16)).logits
    expected = functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:80].view(5, 16)[:, 1:].flatten())
    assert objective.value() == pytest.approx(float(expected), rel=1e-5 if dtype == torch.float32 else 1e-13)


def test_labels_are_the_users_to_change(folders):
    """Ignored tokens are no terms; changing labels does not change inputs."""
    found = hs.models.load_language_model(folders("gpt2"))
    (batch,) = found.batches(library_text(), contexts=2, length=8)
    batch["labels"][0, 3:] = -100
    assert int(batch["input_ids"].min()) >= 0
    assert hs.Objective(found.model, "cross_entropy", batch).num_terms == 2 + 7


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"length": 65}, "length must be at most 64, the positions of the model, got 65"),
        ({"length": 1}, "length must be at least 2"),
        ({"length": 8.5}, "length must be a positive integer, got 8.5"),
        ({"contexts": 0}, "contexts must be a positive integer, got 0"),
        ({"batch_size": -1}, "batch_size must be a positive integer, got -1"),
    ],
)
def test_bad_arguments(arguments, words, folders):
    with pytest.raises(InputError, match=words):
        hs.models.load_language_model(folders("gpt2")).batches(library_text(), **arguments)


@pytest.mark.parametrize(
    ("characters", "words"),
    [
        (50, "the text has 50 tokens, less than one context of length = 64"),
        (130, "the text has 130 tokens, 2 contexts of length = 64, but contexts = 8 were asked for"),
        (1, "the text gives 1 token, at least 2 are needed"),
        (0, "the text gives 0 tokens, at least 2 are needed"),
    ],
)
def test_texts_that_are_too_short(characters, words, folders):
    """The tokens of this tokenizer are characters."""
    with pytest.raises(InputError, match=words):
        hs.models.load_language_model(folders("gpt2")).batches(library_text()[:characters])


def without(name):
    return lambda folder: (folder / name).unlink()


def without_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()


def garbled(name):
    return lambda folder: (folder / name).write_text("{")


def with_a_tensor_less(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["transformer.h.0.ln_1.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def with_nan(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.h.0.ln_1.weight"][0] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


BAD = {
    "no folder": (shutil.rmtree, InputError, "is not a folder; it must be one that save_pretrained wrote"),
    "no config": (without("config.json"), InputError, "has no config.json"),
    "no tokenizer": (without_tokenizer, InputError, "has no tokenizer: save it beside the model"),
    "no weights": (without("model.safetensors"), InputError, "cannot load a causal language model from"),
    "garbled config": (garbled("config.json"), InputError, "cannot load a causal language model from"),
    "garbled tokenizer": (garbled("tokenizer.json"), InputError, "cannot load a tokenizer from"),
    "missing tensor": (with_a_tensor_less, ModelError, "lacks 1 of the tensors of GPT2LMHeadModel"),
    "nan": (with_nan, ModelError, "ln_1.weight of the model holds values that are not finite"),
}


@pytest.mark.parametrize("what", BAD)
def test_folders_that_hold_no_model(what, folders, tmp_path):
    change, error, words = BAD[what]
    folder = shutil.copytree(folders("gpt2"), tmp_path / "model")
    change(folder)
    with pytest.raises(error, match=words) as caught:
        hs.models.load_language_model(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("model", "tokenizer"), [("gpt2", "trained"), ("trained", "gpt2")])
def test_a_tokenizer_of_another_model(model, tokenizer, folders, tmp_path):
    """Too large or far too small for the model: 2000 and 40 tokens."""
    folder = shutil.copytree(folders(model), tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folders(tokenizer) / name, folder / name)
    sizes = {"gpt2": 40, "trained": 2000}
    words = (
        f"the tokenizer has {sizes[tokenizer]} tokens, but the model's vocabulary {sizes[model]}: they do not belong"
    )
    with pytest.raises(InputError, match=words):
        hs.models.load_language_model(folder)


def test_a_padded_vocabulary_is_sound(folders, tmp_path):
    folder = shutil.copytree(folders("gpt2"), tmp_path / "model")
    new_network("gpt2", 64).save_pretrained(folder)
    assert hs.models.load_language_model(folder).classes == 64


def test_no_connection_is_tried(folders, monkeypatch):
    def refuse(*arguments):
        raise AssertionError(f"a connection was tried: {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    hs.models.load_language_model(folders("llama"))


def test_without_transformers(folders, monkeypatch):
    folder = folders("gpt2")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        InputError, match=r"a language model needs transformers: pip install 'hesscope\[transformers\]'"
    ):
        hs.models.load_language_model(folder)


def test_a_model_that_does_not_fit_in_memory(folders, monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda device="cpu": 2**10)
    with pytest.raises(TooLargeError, match="use a smaller model instead"):
        hs.models.load_language_model(folders("gpt2"))


def test_weights_stored_in_half_precision(folders, tmp_path):
    folder = shutil.copytree(folders("gpt2"), tmp_path / "model")
    new_network("gpt2", 40).to(torch.bfloat16).save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert hs.models.load_language_model(folder).model.lm_head.weight.dtype == torch.float32
