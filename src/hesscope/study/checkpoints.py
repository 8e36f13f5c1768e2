"""A folder of checkpoints that a training run has left, in the order of their steps."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

from hesscope.core.errors import InputError

ENDINGS = (".pt", ".pth", ".bin", ".safetensors")
# What trainers write beside a model's weights, under endings of weights.
NO_WEIGHTS = re.compile(r"(optimizer|scheduler|scaler|rng_state.*|training_args)")
NUMBER = re.compile(r"(\d+)$")
SHARD = re.compile(r"\d+-of-\d+$")
# The optimizer's state in a folder of one checkpoint, as the Trainer of Hugging Face writes it.
OPTIMIZER = "optimizer.pt"
STEPS_SHOWN = 5
HOW_NAMED = "a checkpoint's name ends with its step, such as step-100.pt or checkpoint-500/model.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """Weights at a step: a file, which lies alone in a folder that is named for the step if it `has_folder`."""

    step: int
    path: Path
    has_folder: bool = False

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the file, which is read once for it."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8)).hexdigest()

    @property
    def optimizer(self) -> Path | None:
        """The file that may hold the state of the optimizer; None if there is none."""
        beside = self.path.parent / OPTIMIZER
        if self.has_folder and beside.is_file():
            return beside
        return None if self.path.suffix == ".safetensors" else self.path


def find_checkpoints(folder: Path, gaps: bool = False) -> tuple[Checkpoint, ...]:
    """The checkpoints of a folder by their steps, ascending.

    The step is the number at the end of a file's name (its ending apart), or of the name of a sub-folder with one file
    of weights.

    Args:
        folder: with files .pt, .pth, .bin or .safetensors, or sub-folders with one each.
        gaps: whether steps may be missing.

    Raises:
        InputError: no folder, no checkpoints, one that is cut into several files, one without a number, two of one
            step, or steps that are missing from evenly spaced ones.
    """
    if not folder.is_dir():
        raise InputError(f"track.checkpoints: there is no folder {folder}")
    found = [each for entry in sorted(folder.iterdir()) if (each := _checkpoint(entry)) is not None]
    if not found:
        raise InputError(f"{folder} has no checkpoints: no {', '.join(ENDINGS)} whose name ends with a number")
    found.sort(key=lambda checkpoint: checkpoint.step)
    for one, other in pairwise(found):
        if one.step == other.step:
            names = " and ".join(str(each.path.relative_to(folder)) for each in (one, other))
            raise InputError(f"{folder} has two checkpoints of step {one.step}: {names}")
    missing = missing_steps([checkpoint.step for checkpoint in found])
    if missing and not gaps:
        more = f" and {len(missing) - STEPS_SHOWN} more" if len(missing) > STEPS_SHOWN else ""
        steps = ", ".join(map(str, missing[:STEPS_SHOWN])) + more
        raise InputError(
            f"{folder} has gaps: step{'s' if len(missing) > 1 else ''} {steps} "
            f"{'are' if len(missing) > 1 else 'is'} missing; put them there, or set gaps = true in the section [track]"
        )
    return tuple(found)


def missing_steps(steps: Sequence[int]) -> list[int]:
    """What is missing from steps [S], ascending, that are otherwise evenly spaced; nothing if they are not.

    Evenly spaced: more than half of the differences are equal, all others are multiples of these, and fewer steps are
    missing than there are (so that steps spaced by their logarithm, which begin 0, 1, 2, 3, are no gaps).
    """
    differences = [late - early for early, late in pairwise(steps)]
    if not differences:
        return []
    usual, count = Counter(differences).most_common(1)[0]
    missing = [step for early, late in pairwise(steps) for step in range(early + usual, late, usual)]
    even = 2 * count > len(differences) and all(difference % usual == 0 for difference in differences)
    return missing if even and len(missing) < len(steps) else []


def _checkpoint(entry: Path) -> Checkpoint | None:
    """What an entry of the folder is; None if it has no weights."""
    if entry.name.startswith("."):
        return None
    if entry.is_dir():
        return _checkpoint_folder(entry)
    return Checkpoint(_step(entry.stem, entry), entry) if _has_weights(entry) else None


def _checkpoint_folder(folder: Path) -> Checkpoint | None:
    files = sorted(entry for entry in folder.iterdir() if _has_weights(entry))
    numbered = NUMBER.search(folder.name)
    if not files and not numbered:
        return None
    step = _step(folder.name, folder)
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "none"
        raise InputError(f"{folder} must hold one file of weights ({', '.join(ENDINGS)}), got {names}")
    return Checkpoint(step, files[0], has_folder=True)


def _has_weights(entry: Path) -> bool:
    """Whether a file's name is that of weights; raises InputError for part of them."""
    if entry.suffix not in ENDINGS or entry.name.startswith(".") or NO_WEIGHTS.fullmatch(entry.stem):
        return False
    if SHARD.search(entry.stem):
        raise InputError(f"{entry} is part of a checkpoint in several files, which cannot be read: save it in one file")
    return entry.is_file()


def _step(name: str, entry: Path) -> int:
    number = NUMBER.search(name)
    if number is None:
        raise InputError(f"{entry} has no step: {HOW_NAMED}; move it elsewhere if it is none")
    return int(number.group())
