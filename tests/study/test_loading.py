import sys

import pytest
import torch
from safetensors.torch import save_file

import hesscope as hs
from hesscope.core.errors import InputError
from hesscope.study import loading
from tests.study import user_code

HERE = "tests.study.user_code"


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("tests.study.user_code", "must have the form 'pkg.module:function'"),
        ("tests.study.nowhere:f", "there is no module 'tests.study.nowhere' to import"),
        ("nowhere.at.all:f", "there is no module 'nowhere' to import"),
        (f"{HERE}:netwrok", "has no 'netwrok', did you mean 'network'?"),
        (f"{HERE}:not_a_model", "must return a torch.nn.Module, got ndarray"),
        (f"{HERE}:failing", "failed: RuntimeError: no such luck"),
    ],
)
def test_import_paths_that_do_not_resolve(path, words):
    with pytest.raises(InputError) as caught:
        loading.load_model(path, {}, None)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_module_whose_own_import_fails_is_told_apart(tmp_path):
    (tmp_path / "needs_nothing_real.py").write_text("import surely_not_installed\n")
    with loading.importable_from(tmp_path), pytest.raises(InputError, match="importing needs_nothing_real failed: No"):
        loading.resolve("model", "needs_nothing_real:f")


def test_modules_are_found_beside_the_study_and_the_path_is_restored(tmp_path):
    (tmp_path / "beside_the_study.py").write_text("value = 7\n")
    before = list(sys.path)
    with loading.importable_from(tmp_path):
        assert loading.resolve("model", "beside_the_study:value") == 7
    assert sys.path == before


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
@pytest.mark.parametrize("nested", [False, True])
def test_checkpoints_are_loaded(tmp_path, ending, nested):
    trained = hs.models.one_hidden(5, 6, 3, seed=9, dtype=torch.float64)
    path = tmp_path / f"weights{ending}"
    if ending == ".safetensors":
        save_file(trained.state_dict(), path)
    else:
        torch.save({"epoch": 3, "state_dict": trained.state_dict()} if nested else trained.state_dict(), path)
    loaded = loading.load_model(f"{HERE}:network", {}, path)
    for name, tensor in trained.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_a_checkpoint_that_does_not_fit_says_which_names_and_shapes(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save({"fc1.weight": torch.zeros(7, 5), "fc3.weight": torch.zeros(1)}, path)
    with pytest.raises(InputError) as caught:
        loading.load_checkpoint(user_code.network(), path)
    text = str(caught.value)
    assert "missing fc2.weight" in text
    assert "not in the model: fc3.weight" in text
    assert "fc1.weight has shape [7, 5] there and [6, 5] in the model" in text


def test_a_tied_tensor_may_be_stored_once(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    path = tmp_path / "weights.safetensors"
    save_file({"0.weight": torch.full((4, 4), 2.0)}, path)
    loading.load_checkpoint(model, path)
    assert bool((model[1].weight == 2).all())


@pytest.mark.parametrize(
    ("content", "words"), [(None, "does not exist"), (b"nonsense", "cannot be read"), ([1, 2], "not a dict of tensors")]
)
def test_unreadable_checkpoints(tmp_path, content, words):
    path = tmp_path / "weights.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(InputError, match=words):
        loading.load_checkpoint(user_code.network(), path)


def test_partitions_by_name_and_by_path():
    model = user_code.network()
    assert loading.load_partition("tensor", model).labels == ("fc1.weight", "fc2.weight")
    assert loading.load_partition(f"{HERE}:layers", model).labels == ("hidden", "output")
    with pytest.raises(InputError, match="did you mean 'row'"):
        loading.load_partition("rows", model)


def test_losses_by_path():
    assert loading.load_loss("mse") == "mse"
    assert isinstance(loading.load_loss("torch.nn:CrossEntropyLoss"), torch.nn.CrossEntropyLoss)
    assert loading.load_loss(f"{HERE}:sum_loss") is user_code.sum_loss
