"""What runs of presets share: the list of presets, and folders that belong to one run each."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from textwrap import wrap

from hesscope.core.errors import InputError
from hesscope.core.files import atomic_path

# Characters in a line of the list of presets.
LINE = 100


def preset_rows(head: str, presets: Mapping[str, Iterable[str]], for_all: str) -> list[tuple[str, ...]]:
    """Name and texts of every preset, in lines of LINE; the first row names the columns, the last is for all."""
    rows: list[tuple[str, ...]] = [("preset", head)]
    width = LINE - len("  ") - max(map(len, presets))
    for name, texts in presets.items():
        lines = [line for text in texts for line in wrap(text, width, break_on_hyphens=False)]
        rows += [(name if number == 0 else "", line) for number, line in enumerate(lines)]
    return [*rows, ("all", for_all)]


def require_same_run(path: Path, settings: Mapping[str, str]) -> None:
    """Refuse a folder whose file of settings says that it holds another run, naming where they differ.

    Raises:
        InputError: it does, or its file cannot be read.
    """
    if not path.exists():
        return
    try:
        found = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    differ = [name for name in {**found, **settings} if found.get(name) != settings.get(name)]
    if differ:
        there, here = (", ".join(f"{name} = {side.get(name, 'none')}" for name in differ) for side in (found, settings))
        raise InputError(f"{path.parent} holds another run: there {there}; here {here}; use another folder (--out)")


def write_run(path: Path, settings: Mapping[str, str]) -> None:
    """Write the file of settings."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(dict(settings), indent=2) + "\n", encoding="utf-8")
