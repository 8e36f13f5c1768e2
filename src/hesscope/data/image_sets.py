"""MNIST, CIFAR-10 and CIFAR-100 from a copy on the user's disk, in the formats of Hugging Face's datasets."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hesscope.core.checks import require_choice
from hesscope.core.errors import HesscopeError, InputError
from hesscope.core.rng import stream
from hesscope.data.labelled import LabelledData, draw

SPLITS = ("train", "test")


@dataclass(frozen=True)
class Format:
    """What a data set looks like.

    Attributes:
        images, labels: names that the columns have, in order of preference.
        classes: C; shape: (channels, height, width).
        mean, deviation: of every channel over the training images, in [0, 1].
    """

    images: tuple[str, ...]
    labels: tuple[str, ...]
    classes: int
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    deviation: tuple[float, ...]


IMAGES = ("image", "img")
COLOUR = (3, 32, 32)
FORMATS = {
    "mnist": Format(IMAGES, ("label",), 10, (1, 28, 28), (0.1306,), (0.3081,)),
    "cifar10": Format(IMAGES, ("label",), 10, COLOUR, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": Format(
        IMAGES, ("fine_label", "label"), 100, COLOUR, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
    ),
}


def image_set(
    name: str,
    folder: str | Path,
    split: str = "train",
    samples: int | None = None,
    seed: int = 0,
    standardize: bool = True,
    flat: bool = False,
    dtype: torch.dtype | None = None,
) -> LabelledData:
    """Images [N, channels, height, width] with labels, from a local copy; nothing is ever downloaded.

    Args:
        name: "mnist" ([N, 1, 28, 28], C = 10), "cifar10" ([N, 3, 32, 32], C = 10) or "cifar100" (C = 100 fine labels).
        folder: what `save_to_disk` of datasets wrote, or a folder with the parquet or arrow files of the hub, in which
            the split is part of the path (train-00000-of-00001.parquet, plain_text/train/0000.parquet, ...).
        split: "train" or "test".
        samples: how many images, drawn at random without repetition (only those are decoded); all unless told.
        seed: of the draw; also all images come in random order.
        standardize: subtract every channel's mean and divide by its standard deviation, both over the training images
            (to four digits) whatever the split and the samples; otherwise values in [0, 1].
        flat: as vectors [N, channels * height * width].
        dtype: of the inputs.

    Raises:
        InputError: datasets is missing, an argument does not fit, or the folder does not hold such images.
    """
    require_choice("name", name, FORMATS)
    require_choice("split", split, SPLITS)
    if util.find_spec("datasets") is None:
        raise InputError("image_set needs datasets: pip install 'hesscope[datasets]'")
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"folder = {folder} is not a folder; it must hold a local copy of {name}")
    form = FORMATS[name]
    table = _open(folder, split)
    image, label = (_column(table, names, folder) for names in (form.images, form.labels))
    order = draw(len(table), samples, stream(seed, "image_set", "order"))
    pixels, labels = _decoded(table, image, label, order.tolist(), folder)
    if pixels.shape[1:] != form.shape:
        raise InputError(f"the images in {folder} have shape {list(pixels.shape[1:])}, those of {name} {[*form.shape]}")
    inputs = torch.from_numpy(pixels).to(dtype or torch.get_default_dtype()) / 255
    if standardize:
        mean, deviation = (inputs.new_tensor(values).view(-1, 1, 1) for values in (form.mean, form.deviation))
        inputs = (inputs - mean) / deviation
    return LabelledData(
        f"{name}, {split}", inputs.flatten(1) if flat else inputs, torch.from_numpy(labels), form.classes
    )


def _open(folder: Path, split: str) -> Any:
    """The datasets.Dataset of a split."""
    import datasets

    try:
        if any((folder / marker).is_file() for marker in ("dataset_dict.json", "state.json")):
            return _split_of(datasets.load_from_disk(str(folder)), split, folder)
        return datasets.concatenate_datasets([_read(path) for path in _files(folder, split)])
    except HesscopeError:
        raise
    except Exception as error:
        raise InputError(f"cannot read {folder}: {_in_short(error)}") from error


def _split_of(saved: Any, split: str, folder: Path) -> Any:
    """A split of what `save_to_disk` wrote: several splits, or one (which may not say which)."""
    found = saved if isinstance(saved, dict) else {str(saved.split or split): saved}
    if split not in found:
        raise InputError(f"{folder} has no split {split!r}, but {', '.join(repr(name) for name in sorted(found))}")
    return found[split]


def _files(folder: Path, split: str) -> list[Path]:
    """The parquet files, or else the arrow files, with the split as a word in their path below the folder."""
    for ending in ("parquet", "arrow"):
        files = sorted(folder.rglob(f"*.{ending}"))
        found = [path for path in files if split in re.split(r"[^A-Za-z0-9]+", str(path.relative_to(folder)))]
        if found:
            return found
    raise InputError(
        f"{folder} holds neither what save_to_disk of datasets wrote, nor parquet or arrow files whose path names "
        f"the split {split!r}"
    )


def _read(path: Path) -> Any:
    """One file as a table; not through `load_dataset`, which would make a copy elsewhere on the disk."""
    import datasets
    from pyarrow import parquet

    return (
        datasets.Dataset.from_file(str(path)) if path.suffix == ".arrow" else datasets.Dataset(parquet.read_table(path))
    )


def _column(table: Any, names: tuple[str, ...], folder: Path) -> str:
    for name in names:
        if name in table.column_names:
            return name
    wanted = " or ".join(repr(name) for name in names)
    raise InputError(f"{folder} has no column {wanted}, but {', '.join(repr(name) for name in table.column_names)}")


def _decoded(table: Any, image: str, label: str, rows: list[int], folder: Path) -> tuple[Any, Any]:
    """Bytes [N, channels, height, width] and labels [N] int64 of some rows."""
    import datasets

    try:
        # Files that do not say that a column holds images are told so.
        chosen = table.cast_column(image, datasets.Image()).select(rows)
        pixels = np.stack([np.asarray(picture) for picture in chosen[image]])
        labels = np.asarray(chosen[label], dtype=np.int64)
    except Exception as error:
        raise InputError(f"cannot decode the images in {folder}: {_in_short(error)}") from error
    return (pixels[:, None] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2)).copy(), labels


def _in_short(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"
