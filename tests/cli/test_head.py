"""`hesscope head` as a user types it."""

import json
import re
import shutil
import socket
import sys

import numpy as np
import pytest
import torch
import xarray as xr

from hesscope.cli import main
from tests.language_models import folder_of, library_text
from tests.report.test_page import assert_legible, opened


def hesscope(monkeypatch, capsys, *arguments):
    capsys.readouterr()  # what making a model has printed
    monkeypatch.setattr(sys, "argv", ["hesscope", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


@pytest.fixture
def place(tmp_path_factory, tmp_path, monkeypatch):
    """A function from a model's name to its folder, and the empty folder with a text where the command is run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # the command sets it; restored with the test
    (tmp_path / "text.txt").write_text(library_text()[5000:12000])
    return lambda name: folder_of(tmp_path_factory, name)


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*arguments):
        raise AssertionError(f"a connection was tried: {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_the_command_says_what_it_does_and_what_it_found(place, tmp_path, monkeypatch, capsys, no_network):
    command = ("head", "--model", place("trained"), "--text", "text.txt", "--tokens", 300, "--top", 15)
    code, out, err = hesscope(monkeypatch, capsys, *command)
    assert (code, err) == (0, "")
    said = dict(line.split(":", 1) for line in out.splitlines())
    assert "GPT2LMHeadModel" in said["model"]
    assert "C = 2,000 tokens, width d = 32, tied to the input embedding" in said["head"]
    assert "N = 299 next-token predictions, in windows of 64 tokens" in said["samples"]
    result = xr.load_dataset("out/head/results-head.nc")
    r = result.attrs["ratio"]
    assert float(re.search(r"r = (\S+),", said["ratio"])[1]) == pytest.approx(r, rel=0.01)
    assert float(re.search(r"C² r = (\S+)", said["ratio"])[1].replace(",", "")) == pytest.approx(2000**2 * r, rel=0.01)
    assert "white features" in said["random head"]
    assert result["class_energy"].shape == (2000,)
    assert float(result["class_energy"].sum()) == pytest.approx(result.attrs["diagonal"])
    assert float(result["mean_probability"].sum()) == pytest.approx(1)
    blocks = result["block_energy"].to_numpy()
    assert blocks.shape == (15, 15)
    np.testing.assert_allclose(np.diag(blocks), result["class_energy"][result["top_token"].to_numpy()], rtol=1e-4)
    names = {path.name for path in (tmp_path / "out" / "head").iterdir()}
    assert names == {"report.html", "results-head.nc", "results-features.nc", "figures"}
    assert said["page"].strip() == str(tmp_path / "out/head/report.html")

    page = (tmp_path / "out/head/report.html").read_text()
    assert "for comparison" in page
    assert "␣" in page
    for text in result["top_text"].to_numpy():
        assert f"<bdi>{text.replace('&', '&amp;').replace('<', '&lt;')}</bdi>" in page.replace("&#39;", "'").replace(
            "&#34;", '"'
        )
    text_of_page = re.sub(r'data:image/png;base64,[^"]*', "", page)
    assert not re.search(r"\bnan\b", text_of_page)
    assert "http" not in text_of_page.replace("https://", "http").split("<body>")[1]

    seen = opened(tmp_path / "out/head/report.html", tmp_path)
    assert [name for name, _ in seen["seen"]] == ["ratios", "tokens", "blocks", "provenance"]
    assert_legible(seen, pictures=2)
    assert "of its energy in 2,000 of its 4,000,000 blocks" in seen["title"]

    (tmp_path / "out/head/report.html").unlink()
    monkeypatch.setattr("hesscope.study.head.prepare_head", None)  # the model is not even loaded
    code, out, err = hesscope(monkeypatch, capsys, *command)
    assert (code, err) == (0, "")
    assert out.startswith("measured before under these settings")
    assert (tmp_path / "out/head/report.html").exists()


def test_tokens_that_the_figures_font_lacks(place, monkeypatch, capsys, tmp_path):
    """A vocabulary whose largest tokens are Chinese, signs of mathematics and dollar signs: no warning, no error."""
    model = shutil.copytree(place("gpt2"), tmp_path / "model")
    text = (model / "tokenizer.json").read_text(encoding="utf-8")
    vocabulary = json.loads(text)
    pieces = vocabulary["model"]["vocab"]
    strange = ["中", "$", "\n", "<", "\u202e", "😀"]
    kept = [piece for piece in pieces if piece not in strange][: len(pieces) - len(strange)]
    vocabulary["model"]["vocab"] = {piece: number for number, piece in enumerate([*kept, *strange])}
    (model / "tokenizer.json").write_text(json.dumps(vocabulary))
    (tmp_path / "text.txt").write_text("中$\n<\u202e😀" * 20, encoding="utf-8")
    code, _, err = hesscope(monkeypatch, capsys, "head", "--model", model, "--text", "text.txt", "--top", 40)
    assert (code, err) == (0, "")
    texts = xr.load_dataset("out/head/results-head.nc")["top_text"].to_numpy().tolist()
    assert {"中", "$", "\\n", "<", "\\u202e", "😀"} <= set(texts)


def copied(change):
    """A bad model folder: the sound one, copied and changed."""

    def make(place, tmp_path):
        folder = shutil.copytree(place("gpt2"), tmp_path / "bad")
        change(folder)
        return folder

    return make


def no_config(folder):
    (folder / "config.json").unlink()


def no_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()


def broken_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{")


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def broken_weights(folder):
    (folder / "model.safetensors").write_bytes(b"no weights")


def unknown_type(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "t5"}))


def code_of_its_own(folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "mine.Model", "AutoConfig": "mine.Config"}}
    (folder / "config.json").write_text(json.dumps(config))


def changed_weights(change):
    def apply(folder):
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def not_finite(tensors):
    tensors["transformer.h.1.mlp.c_fc.weight"][0, 0] = torch.nan


def incomplete(tensors):
    del tensors["transformer.h.1.mlp.c_fc.weight"]


MODELS = {
    "missing folder": (lambda place, tmp_path: tmp_path / "nowhere", "is not a folder"),
    "a file": (lambda place, tmp_path: tmp_path / "text.txt", "is not a folder"),
    "no config": (copied(no_config), "has no config.json"),
    "no tokenizer": (copied(no_tokenizer), "has no tokenizer"),
    "broken tokenizer": (copied(broken_tokenizer), "cannot load a tokenizer"),
    "no weights": (copied(no_weights), "cannot load a causal language model"),
    "broken weights": (copied(broken_weights), "cannot load a causal language model"),
    "encoder and decoder": (copied(unknown_type), "Unrecognized configuration class"),
    "code of its own": (copied(code_of_its_own), "cannot load a causal language model"),
    "not finite": (copied(changed_weights(not_finite)), "c_fc.weight of the model holds values that are not finite"),
    "incomplete": (copied(changed_weights(incomplete)), "lacks 1 of the tensors of GPT2LMHeadModel"),
    "capped logits": (lambda place, tmp_path: place("gemma2"), "another Hessian"),
    "not causal": (lambda place, tmp_path: place("bert"), "not a causal language model"),
}


@pytest.mark.parametrize("name", MODELS)
def test_bad_models_get_one_line_and_write_nothing(name, place, tmp_path, monkeypatch, capsys, no_network):
    make, words = MODELS[name]
    refused(monkeypatch, capsys, tmp_path, words, "--model", make(place, tmp_path), "--text", "text.txt")


TEXTS = {
    "missing": (None, "cannot read"),
    "empty": (b"", "is empty"),
    "one token": (b"x", "gives 1 token, at least 2"),
    "binary": (bytes(range(256)), "is not text in UTF-8 (byte 128)"),
    "zero bytes": (b"a\0b", "has a zero byte"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_bad_texts(name, place, tmp_path, monkeypatch, capsys):
    content, words = TEXTS[name]
    path = tmp_path / "bad.txt"
    if content is not None:
        path.write_bytes(content)
    refused(monkeypatch, capsys, tmp_path, words, "--model", place("gpt2"), "--text", path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--tokens", 1), "--tokens must be at least 2"),
        (("--tokens", 0), "--tokens must be a positive integer"),
        (("--tokens", "x"), "--tokens"),
        (("--context", 0), "--context must be a positive integer"),
        (("--context", 65), "--context must be at most 64, the positions of the model, got 65"),
        (("--top", 0), "--top must be a positive integer"),
        (("--top", 101), "--top must be at most 100"),
        (("--dtype", "float16"), "--dtype must be one of 'float32', 'float64', got 'float16'"),
        (("--out", "text.txt"), "is not a folder"),
        (("--out", "text.txt/out"), "is not a folder"),
    ],
)
def test_bad_arguments(arguments, words, place, tmp_path, monkeypatch, capsys):
    common = ("--model", place("gpt2"), "--text", "text.txt")
    refused(monkeypatch, capsys, tmp_path, words, *common, *arguments)


def test_missing_arguments(place, tmp_path, monkeypatch, capsys):
    refused(monkeypatch, capsys, tmp_path, "--model", "--text", "text.txt")
    refused(monkeypatch, capsys, tmp_path, "--text", "--model", place("gpt2"))


def test_without_transformers(place, tmp_path, monkeypatch, capsys):
    folder = place("gpt2")
    monkeypatch.setitem(sys.modules, "transformers", None)
    words = "hesscope head needs transformers: pip install 'hesscope[transformers]'"
    refused(monkeypatch, capsys, tmp_path, words, "--model", folder, "--text", "text.txt")


def refused(monkeypatch, capsys, tmp_path, words, *arguments):
    """One line, exit code 2, and not a file more than before."""
    before = sorted(tmp_path.rglob("*"))
    code, out, err = hesscope(monkeypatch, capsys, "head", *arguments)
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert words in err
    assert sorted(tmp_path.rglob("*")) == before
