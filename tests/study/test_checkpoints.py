"""Folders of checkpoints: what is one, in which order, and what is refused."""

import os

import pytest
import torch
from safetensors.torch import save_file

from hesscope.core.errors import InputError
from hesscope.dynamics import log_spaced
from hesscope.study.checkpoints import find_checkpoints, missing_steps


def touched(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"weights")
    return folder


def steps_and_names(folder, **options):
    return [(each.step, str(each.path.relative_to(folder))) for each in find_checkpoints(folder, **options)]


def test_files_are_in_the_order_of_their_numbers(tmp_path):
    touched(
        tmp_path, "step-100.pt", "step-20.pt", "epoch_0.pth", "model.000040.safetensors", "60.bin", "e=1-step=80.pt"
    )
    assert steps_and_names(tmp_path) == [
        (0, "epoch_0.pth"),
        (20, "step-20.pt"),
        (40, "model.000040.safetensors"),
        (60, "60.bin"),
        (80, "e=1-step=80.pt"),
        (100, "step-100.pt"),
    ]


def test_folders_as_a_trainer_writes_them(tmp_path):
    others = ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth", "rng_state_0.pth", "training_args.bin")
    for step, name in ((1500, "model.safetensors"), (500, "pytorch_model.bin"), (1000, "weights.pt")):
        touched(tmp_path, *(f"checkpoint-{step}/{each}" for each in (name, *others, "config.json")))
    touched(tmp_path, "runs/Nov22/events.out", "training_args.bin", "README.md", ".hidden-7.pt", ".trash-9/model.bin")
    assert steps_and_names(tmp_path) == [
        (500, "checkpoint-500/pytorch_model.bin"),
        (1000, "checkpoint-1000/weights.pt"),
        (1500, "checkpoint-1500/model.safetensors"),
    ]
    first = find_checkpoints(tmp_path)[0]
    assert first.optimizer == tmp_path / "checkpoint-500" / "optimizer.pt"
    first.optimizer.unlink()
    assert first.optimizer == first.path
    touched(tmp_path, "file/optimizer.pt", "file/step-1.safetensors")
    (single,) = find_checkpoints(tmp_path / "file")
    assert single.optimizer is None  # that of which step?


def test_fingerprints_are_of_the_content(tmp_path):
    touched(tmp_path, "step-1.pt", "step-2.pt", "step-3.pt")
    (tmp_path / "step-3.pt").write_bytes(b"weighty")
    os.utime(tmp_path / "step-2.pt", (0, 0))
    one, same, other = (each.fingerprint for each in find_checkpoints(tmp_path))
    assert one == same != other


REFUSED = [
    ([], "has no checkpoints: no .pt, .pth, .bin, .safetensors whose name ends with a number"),
    (["notes.txt"], "has no checkpoints"),
    (["step-1.pt", "step-01.bin"], "has two checkpoints of step 1: step-01.bin and step-1.pt"),
    (["step-1.pt", "checkpoint-1/model.bin"], "has two checkpoints of step 1: checkpoint-1/model.bin and step-1.pt"),
    (["step-1.pt", "best.pt"], "best.pt has no step: a checkpoint's name ends with its step, such as step-100.pt"),
    (["step-1.pt", "best/model.bin"], "best has no step"),
    (["model-00001-of-00002.safetensors"], "model-00001-of-00002.safetensors is part of a checkpoint in several files"),
    (["step-7/pytorch_model-00001-of-00002.bin"], "-00001-of-00002.bin is part of a checkpoint in several files"),
    (
        ["step-1.pt", "step-2/config.json"],
        "step-2 must hold one file of weights (.pt, .pth, .bin, .safetensors), got none",
    ),
    (["step-2/model.bin", "step-2/model.safetensors"], "must hold one file of weights"),
    (
        [f"{step}.pt" for step in (0, 10, 20, 40, 50)],
        "has gaps: step 30 is missing; put them there, or set gaps = true",
    ),
    ([f"{step}.pt" for step in (5, 10, 15, 40, 45, 50, 55, 65, 70)], "steps 20, 25, 30, 35, 60 are missing"),
]


@pytest.mark.parametrize(("names", "words"), REFUSED, ids=[words[:30] for _, words in REFUSED])
def test_what_is_refused(tmp_path, names, words):
    touched(tmp_path, *names)
    with pytest.raises(InputError) as caught:
        find_checkpoints(tmp_path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_must_be_there(tmp_path):
    with pytest.raises(InputError, match="there is no folder"):
        find_checkpoints(tmp_path / "nowhere")


def test_gaps_may_be_allowed(tmp_path):
    touched(tmp_path, *(f"{step}.pt" for step in (0, 10, 20, 40)))
    assert [step for step, _ in steps_and_names(tmp_path, gaps=True)] == [0, 10, 20, 40]


def test_what_counts_as_missing():
    assert missing_steps([3]) == missing_steps([1, 7]) == missing_steps([0, 10, 20, 30]) == []
    assert missing_steps([0, 10, 20, 40]) == [30]
    assert missing_steps([10, 20, 30, 60]) == [40, 50]
    assert missing_steps([0, 100, 300]) == []  # which of the two is usual?
    assert missing_steps([0, 10, 20, 25]) == []  # the last step is where training ended
    assert missing_steps([0, 1, 2, 4, 8, 16, 32]) == []
    assert missing_steps(log_spaced(1000, 20)) == missing_steps(log_spaced(100, 12)) == []


def test_safetensors_headers_are_enough(tmp_path):
    """Names and shapes come from the first bytes of a file: what follows is not looked at."""
    from hesscope.study.loading import tensor_shapes

    path = tmp_path / "step-1.safetensors"
    save_file({"a": torch.zeros(1000, 7), "b": torch.zeros(())}, path)
    assert tensor_shapes(path) == {"a": (1000, 7), "b": ()}
    torch.save({"state_dict": {"a": torch.zeros(1000, 7)}, "epoch": 3}, tmp_path / "step-2.pt")
    assert tensor_shapes(tmp_path / "step-2.pt") == {"a": (1000, 7)}
    torch.save({"a": torch.zeros(3)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert tensor_shapes(tmp_path / "old.pt") == {"a": (3,)}
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(InputError, match="cannot be read"):
        tensor_shapes(path)
    # What pickle raises for these bytes is "KeyError: 105", which tells nobody anything.
    (tmp_path / "step-3.pt").write_bytes(b"hi there")
    with pytest.raises(
        InputError, match=r"cannot be read: it must be a file .* that holds tensors only, a state_dict$"
    ):
        tensor_shapes(tmp_path / "step-3.pt")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "step-4.pt")
    with pytest.raises(InputError, match=r"a state_dict: UnpicklingError: Weights only load failed$"):
        tensor_shapes(tmp_path / "step-4.pt")
