"""The small GPT: it learns, it is saved whole, and equal arguments give equal files."""

import math

import numpy as np
import pytest
import torch

import hesscope as hs
from hesscope.core.errors import InputError
from hesscope.models import gpt

SMALL = {
    "layers": 1,
    "width": 16,
    "heads": 2,
    "context": 16,
    "vocabulary": 400,
    "steps": 80,
    "text_bytes": 2**16,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return gpt.train_small_gpt(tmp_path_factory.mktemp("gpt"), **SMALL)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_it_learns(trained):
    assert len(trained.losses) == 80
    assert trained.losses[0] == pytest.approx(math.log(400), abs=0.1)
    assert trained.loss < math.log(400) - 0.7
    assert trained.loss == pytest.approx(float(np.mean(trained.losses[-8:])))
    assert trained.converged and trained.message == "all 80 steps done"


def test_the_folder_holds_what_was_trained(trained):
    """The loss on the text of the training, by an objective of the loaded model."""
    found = hs.models.load_language_model(trained.folder)
    assert (found.classes, found.positions) == (400, 16)
    assert trained.parameters == sum(parameter.numel() for parameter in found.model.parameters())
    text = gpt.standard_library(2**16)
    objective = hs.Objective(found.model, "cross_entropy", found.batches(text, contexts=100, length=16))
    assert abs(objective.value() - trained.loss) < 0.4
    assert len(found.tokenizer(text)["input_ids"]) == trained.tokens
    assert found.tokenizer.decode(found.tokenizer("def naïve(x):")["input_ids"]) == "def naïve(x):"


def test_equal_arguments_give_equal_files_and_disturb_nothing(trained, tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    steps = []
    again = gpt.train_small_gpt(tmp_path / "a", **SMALL, progress=lambda *given: steps.append(given))
    assert torch.equal(torch.get_rng_state(), before)
    assert contents(again.folder) == contents(trained.folder)
    assert [(done, whole) for done, whole, _ in steps] == [(n + 1, 80) for n in range(80)]
    other = gpt.train_small_gpt(tmp_path / "b", **(SMALL | {"steps": 2}), seed=1)
    mine, others = (hs.models.load_language_model(run.folder).model for run in (again, other))
    assert contents(other.folder)["tokenizer.json"] == contents(trained.folder)["tokenizer.json"]
    assert not torch.equal(mine.lm_head.weight, others.lm_head.weight)


def test_training_ends_when_its_time_is_over(tmp_path):
    found = gpt.train_small_gpt(tmp_path, **SMALL, seconds=1e-9)
    assert len(found.losses) == 1 and not found.converged
    assert found.message == "1 of 80 steps in 1e-09 s"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"heads": 3}, "heads must divide width = 16, got 3"),
        ({"layers": 0}, "layers must be a positive integer, got 0"),
        ({"vocabulary": 256}, "vocabulary must lie between 257 .* and 32768, got 256"),
        ({"vocabulary": 40000}, "vocabulary must lie between 257 .* and 32768, got 40000"),
        ({"vocabulary": 20000}, "vocabulary = 20000 is too large for this text, which has"),
        ({"context": 1}, "context must be at least 2"),
        ({"seconds": 0}, "seconds must be positive or None, got 0"),
        ({"text_bytes": 20}, "is too large for this text|needs more than context"),
        ({"steps": 1.5}, "steps must be a positive integer, got 1.5"),
    ],
)
def test_bad_arguments(arguments, words, tmp_path):
    with pytest.raises(InputError, match=words):
        gpt.train_small_gpt(tmp_path / "out", **(SMALL | arguments))
    assert not (tmp_path / "out").exists()


def test_a_file_in_place_of_a_folder(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="is not a folder"):
        gpt.train_small_gpt(tmp_path / "file", **SMALL)


def test_the_text_is_the_beginning_of_a_fixed_whole():
    long, short = gpt.standard_library(2**17), gpt.standard_library(1000)
    assert long.startswith(short) and len(short.encode()) == 1000
    assert len(long.encode()) == 2**17
