"""Studies of a causal language model: `model = "hf:DIR"`, `data = "text:FILE"`."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch

import hesscope as hs
from hesscope.cli import main
from hesscope.study.analyze import prepare, run
from hesscope.study.config import StudyConfig
from tests.language_models import folder_of, library_text

TOKENS = {"contexts": 2, "length": 8}


@pytest.fixture
def place(tmp_path_factory, tmp_path):
    """A folder with a model, a text and nothing else."""
    shutil.copytree(folder_of(tmp_path_factory, "gpt2"), tmp_path / "model")
    (tmp_path / "text.txt").write_text(library_text()[:3000])
    return tmp_path


def study(place, **changes):
    values = {
        "model": "hf:model",
        "data": "text:text.txt",
        "data_arguments": TOKENS,
        "partition": "tensor",
        "method": "probes",
        "probes": 2,
        "output": "out",
    }
    return prepare(StudyConfig(**(values | changes)), place)


def test_results_equal_the_librarys(place):
    prepared = study(place, model_arguments={"dtype": "float64"})
    run(prepared, lambda title, share: None)
    found = hs.SplitEnergies.from_xarray(prepared.store.require("energies")).parts
    loaded = hs.models.load_language_model(place / "model", torch.float64)
    text = (place / "text.txt").read_text()
    objective = hs.Objective(loaded.model, "cross_entropy", loaded.batches(text, **TOKENS))
    assert objective.num_terms == 14
    partition = hs.Partition.by_tensor(loaded.model)
    for name, operator in (("H", hs.Hessian(objective)), ("G", hs.GaussNewton(objective))):
        expected = hs.block_energies(operator, partition, "probes", probes=2)
        np.testing.assert_allclose(found[name].values, expected.values, rtol=1e-9)


def test_results_are_found_again_only_for_the_same_model_and_text(place):
    def key(**changes):
        return study(place, **changes).store.settings

    first = key()
    assert key() == first
    found = {first}
    found.add(key(data_arguments=TOKENS | {"contexts": 3}))
    found.add(key(data_arguments=TOKENS | {"length": 7}))
    found.add(key(data_arguments=TOKENS | {"batch_size": 1}))
    found.add(key(model_arguments={"dtype": "float64"}))
    (place / "text.txt").write_text("x" + library_text()[:3000])
    found.add(key())
    config = json.loads((place / "model/config.json").read_text())
    (place / "model/config.json").write_text(json.dumps(config | {"activation_function": "relu"}))
    found.add(key())
    weights = place / "model/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    found.add(key())
    assert len(found) == 8


def hesscope(monkeypatch, capsys, command, place, **changes):
    values = {
        "model": "hf:model",
        "data": "text:text.txt",
        "data_arguments": "{ contexts = 2, length = 8 }",
        "partition": "layer",
        "method": "probes",
        "output": "out",
    }
    rows = {key: value if value.startswith("{") else json.dumps(value) for key, value in (values | changes).items()}
    lines = [f"{key} = {value}" for key, value in rows.items()]
    path = place / "STUDY.toml"
    few = "eigenpairs = 1\nprobes = 2\nsteps = 2\nblock_probes = 2\nblock_steps = 2\nrtol = 0.5\nmax_products = 6"
    path.write_text("\n".join([*lines, "probes = 2", "[spectrum]", 'matrix = "gauss_newton"', few]))
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["hesscope", command, str(path)])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code, *capsys.readouterr()


@pytest.mark.parametrize("command", ["analyze", "spectrum"])
def test_the_commands_run(command, place, monkeypatch, capsys, tmp_path_factory):
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))  # paths are relative to the study
    code, out, err = hesscope(monkeypatch, capsys, command, place)
    assert (code, err) == (0, "")
    assert "GPT2LMHeadModel" in out and "14 loss terms in 1 batches" in out
    assert list((place / "out").glob("*.html"))


def without_config(place):
    (place / "model/config.json").unlink()


def without_tokenizer(place):
    for path in (place / "model").glob("tokenizer*"):
        path.unlink()


def short_text(place):
    (place / "text.txt").write_text("short")


def no_text(place):
    (place / "text.txt").unlink()


def binary_text(place):
    (place / "text.txt").write_bytes(b"\xff\xfe\x00")


def larger_tokenizer(place):
    path = place / "model/tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"] |= {f"more-{number}": 40 + number for number in range(3)}
    path.write_text(json.dumps(content))


def untouched(place):
    pass


BAD = {
    "no config": (without_config, {}, "has no config.json"),
    "no tokenizer": (without_tokenizer, {}, "has no tokenizer"),
    "no folder": (untouched, {"model": "hf:nowhere"}, "nowhere is not a folder"),
    "short text": (short_text, {}, "the text has 5 tokens, less than one context of length = 8"),
    "not enough text": (
        untouched,
        {"data_arguments": "{ contexts = 5000 }"},
        "the text has 3000 tokens, 46 contexts of length = 64, but contexts = 5000 were asked for",
    ),
    "no text": (no_text, {}, "data: cannot read"),
    "binary": (binary_text, {}, "is not text in UTF-8"),
    "larger tokenizer": (larger_tokenizer, {}, "the tokenizer has 43 tokens, but the model's vocabulary 40"),
    "long context": (untouched, {"data_arguments": "{ length = 65 }"}, "length must be at most 64"),
    "unknown": (untouched, {"data_arguments": "{ lenght = 6 }"}, "unknown key 'lenght'"),
    "near": (untouched, {"data_arguments": "{ lenght = 6 }"}, "did you mean 'length'?"),
    "fraction": (untouched, {"data_arguments": "{ length = 6.5 }"}, "length of data_arguments must be a whole number"),
    "dtype": (untouched, {"model_arguments": '{ dtype = "float16" }'}, "must be one of 'float32', 'float64'"),
    "other model": (
        untouched,
        {"model": "hesscope.models:one_hidden", "model_arguments": "{ d = 4, m = 3, C = 3 }"},
        "needs the tokenizer of a language model: model = 'hf:DIR', got 'hesscope.models:one_hidden'",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_told_in_one_line_before_anything_is_written(what, place, monkeypatch, capsys):
    change, changes, words = BAD[what]
    change(place)
    code, out, err = hesscope(monkeypatch, capsys, "analyze", place, **changes)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert words in err
    assert not (place / "out").exists()


def test_without_transformers(place, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    code, out, err = hesscope(monkeypatch, capsys, "analyze", place)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "model = 'hf:model' needs transformers: pip install 'hesscope[transformers]'" in err
