"""Image sets from a local copy: every format of it, against the pixels that were put in; nothing from the network."""

import importlib.util
import shutil
import socket

import numpy as np
import pytest
import torch
from PIL import Image

from hesscope.core.errors import InputError
from hesscope.data import image_set
from tests.helpers import F64

datasets = pytest.importorskip("datasets")

# Name -> columns of images and labels as on the hub, and shape of an image there.
HUB = {
    "mnist": ("image", "label", (28, 28)),
    "cifar10": ("img", "label", (32, 32, 3)),
    "cifar100": ("img", "fine_label", (32, 32, 3)),
}
CLASSES = {"mnist": 10, "cifar10": 10, "cifar100": 100}
SIZES = {"train": 12, "test": 5}


def pixels_of(name, split):
    """[N, height, width (, 3)] bytes; the first pixel of an image is its number."""
    found = np.random.default_rng(len(split)).integers(0, 256, (SIZES[split], *HUB[name][2]), dtype=np.uint8)
    found.reshape(len(found), -1)[:, 0] = range(len(found))
    return found


def labels_of(name, split):
    return [(7 * number + len(split)) % CLASSES[name] for number in range(SIZES[split])]


def table(name, split, **renamed):
    image, label, _ = HUB[name]
    image, label = renamed.get("image", image), renamed.get("label", label)
    columns = {image: datasets.Image(), label: datasets.ClassLabel(num_classes=CLASSES[name])}
    rows = {image: [Image.fromarray(p) for p in pixels_of(name, split)], label: labels_of(name, split)}
    if name == "cifar100":
        columns["coarse_label"], rows["coarse_label"] = datasets.ClassLabel(num_classes=20), [0] * SIZES[split]
    return datasets.Dataset.from_dict(rows, features=datasets.Features(columns), split=split)


def as_dict(folder, name):
    datasets.DatasetDict({split: table(name, split) for split in SIZES}).save_to_disk(str(folder))


def as_one_split(folder, name):
    table(name, "train").save_to_disk(str(folder))


def as_parquet(folder, name):
    (folder / "data").mkdir()
    for split in SIZES:
        whole = table(name, split)
        for part in range(2):
            path = folder / "data" / f"{split}-0000{part}-of-00002.parquet"
            whole.shard(2, part, contiguous=True).to_parquet(str(path))


def as_parquet_in_folders(folder, name):
    for split in SIZES:
        (folder / "plain_text" / split).mkdir(parents=True)
        table(name, split).to_parquet(str(folder / "plain_text" / split / "0000.parquet"))


def as_bare_parquet(folder, name):
    """Without datasets' own metadata: images are structs of bytes and path, labels are numbers."""
    from pyarrow import parquet

    for split in SIZES:
        table(name, split).to_parquet(str(folder / f"{name}-{split}.parquet"))
        bare = parquet.read_table(folder / f"{name}-{split}.parquet").replace_schema_metadata(None)
        parquet.write_table(bare, folder / f"{name}-{split}.parquet")


def as_arrow(folder, name):
    """As the cache of datasets has it."""
    for split in SIZES:
        table(name, split).save_to_disk(str(folder / "made"))
        (made,) = (folder / "made").glob("*.arrow")
        shutil.move(made, folder / f"{name}-{split}.arrow")
        shutil.rmtree(folder / "made")


FORMATS = [as_dict, as_one_split, as_parquet, as_parquet_in_folders, as_bare_parquet, as_arrow]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def refuse(*_):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(autouse=True, scope="module")
def silent():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def require_right(data, name, split):
    """Every image is there once with its own label, unchanged."""
    shape = (1, 28, 28) if name == "mnist" else (3, 32, 32)
    assert data.inputs.shape == (SIZES[split], *shape)
    assert data.classes == CLASSES[name]
    bytes_ = (data.inputs * 255).round().to(torch.uint8)
    numbers = bytes_[:, 0, 0, 0].tolist()
    assert sorted(numbers) == list(range(SIZES[split]))
    truth = pixels_of(name, split)
    truth = truth[:, None] if name == "mnist" else truth.transpose(0, 3, 1, 2)
    assert np.array_equal(bytes_.numpy(), truth[numbers])
    assert data.labels.tolist() == [labels_of(name, split)[number] for number in numbers]
    assert numbers != sorted(numbers)


@pytest.mark.parametrize("write", FORMATS, ids=lambda write: write.__name__)
@pytest.mark.parametrize("name", HUB)
def test_every_format(write, name, tmp_path):
    write(tmp_path, name)
    require_right(image_set(name, tmp_path, standardize=False), name, "train")
    if write is not as_one_split:
        require_right(image_set(name, str(tmp_path), split="test", standardize=False), name, "test")


def test_loading_writes_nothing(tmp_path):
    as_parquet(tmp_path, "mnist")
    before = sorted(tmp_path.rglob("*"))
    image_set("mnist", tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def test_standardized_by_the_training_images_whatever_is_drawn(tmp_path):
    as_dict(tmp_path, "cifar10")
    for split, samples in (("train", None), ("train", 4), ("test", 3)):
        raw, data = (
            image_set("cifar10", tmp_path, split, samples, standardize=standardize, dtype=F64)
            for standardize in (False, True)
        )
        mean = torch.tensor([0.4914, 0.4822, 0.4465], dtype=F64)[:, None, None]
        deviation = torch.tensor([0.2470, 0.2435, 0.2616], dtype=F64)[:, None, None]
        assert torch.allclose(data.inputs * deviation + mean, raw.inputs, rtol=1e-12, atol=0)
        assert torch.equal(data.labels, raw.labels)


def test_samples_flat_seed_and_dtype(tmp_path):
    as_dict(tmp_path, "mnist")
    few, same, other = (image_set("mnist", tmp_path, samples=6, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(few.inputs, same.inputs) and torch.equal(few.labels, same.labels)
    assert not torch.equal(few.inputs, other.inputs)
    assert torch.equal(image_set("mnist", tmp_path).inputs[:6], few.inputs)
    flat = image_set("mnist", tmp_path, samples=6, flat=True, dtype=F64)
    assert flat.inputs.shape == (6, 784) and flat.inputs.dtype == F64
    assert torch.allclose(flat.inputs.view(6, 1, 28, 28).float(), few.inputs, rtol=1e-6)


def test_either_name_of_a_column(tmp_path):
    table("cifar100", "train", image="image", label="label").to_parquet(str(tmp_path / "train.parquet"))
    require_right(image_set("cifar100", tmp_path, standardize=False), "cifar100", "train")


# --- bad input --------------------------------------------------------------------------------------------------------


def test_datasets_is_missing(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "datasets" else find(name))
    with pytest.raises(InputError, match=r"^image_set needs datasets: pip install 'hesscope\[datasets\]'$"):
        image_set("mnist", tmp_path)


def test_no_such_name_split_or_folder(tmp_path):
    with pytest.raises(InputError, match=r"^name must be one of 'mnist', .*, got 'cifar', did you mean 'cifar10"):
        image_set("cifar", tmp_path)
    with pytest.raises(InputError, match=r"^split must be one of 'train', 'test', got 'tests', did you mean 'test'"):
        image_set("mnist", tmp_path, split="tests")
    with pytest.raises(InputError, match=r"^folder = .*absent is not a folder; it must hold a local copy of mnist$"):
        image_set("mnist", tmp_path / "absent")


def test_a_folder_without_the_split(tmp_path):
    with pytest.raises(InputError, match="holds neither what save_to_disk of datasets wrote, nor parquet or arrow"):
        image_set("mnist", tmp_path)
    as_one_split(tmp_path, "mnist")
    with pytest.raises(InputError, match=r"has no split 'test', but 'train'$"):
        image_set("mnist", tmp_path, split="test")


def test_columns_are_missing(tmp_path):
    table("mnist", "train", label="digit").to_parquet(str(tmp_path / "train.parquet"))
    with pytest.raises(InputError, match=r"has no column 'label', but 'image', 'digit'$"):
        image_set("mnist", tmp_path)
    table("mnist", "train", image="picture").to_parquet(str(tmp_path / "train.parquet"))
    with pytest.raises(InputError, match=r"has no column 'image' or 'img', but 'picture', 'label'$"):
        image_set("mnist", tmp_path)


def test_another_data_set(tmp_path):
    as_dict(tmp_path, "cifar10")
    with pytest.raises(InputError, match=r"have shape \[3, 32, 32\], those of mnist \[1, 28, 28\]$"):
        image_set("mnist", tmp_path)
    as_parquet(tmp_path, "cifar100")
    shutil.rmtree(tmp_path / "train")
    (tmp_path / "dataset_dict.json").unlink()
    with pytest.raises(InputError, match=r"has no column 'label', but 'img', 'fine_label', 'coarse_label'$"):
        image_set("cifar10", tmp_path)


def test_too_many_samples(tmp_path):
    as_dict(tmp_path, "mnist")
    with pytest.raises(InputError, match=r"^samples must be at most 12, all there are, got 13$"):
        image_set("mnist", tmp_path, samples=13)


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"nothing of the kind")
    with pytest.raises(InputError, match=r"^cannot read .*: ArrowInvalid: "):
        image_set("mnist", tmp_path)
    columns = datasets.Features({"image": datasets.Value("string"), "label": datasets.Value("int64")})
    words = datasets.Dataset.from_dict({"image": ["no", "image"], "label": [0, 1]}, features=columns)
    words.to_parquet(str(tmp_path / "train.parquet"))
    with pytest.raises(InputError, match=r"^cannot decode the images in .*: FileNotFoundError: "):
        image_set("mnist", tmp_path)
