"""A progress bar with the time left; silent when the output is not a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hesscope.cli.interruption import require_uninterrupted


@contextmanager
def progress_bar() -> Iterator[Callable[[str, float], None]]:
    """Gives a function (title, share done in [0, 1]) that moves the bar on standard error, and passes on Ctrl-C."""
    if not sys.stderr.isatty():
        yield lambda title, share: require_uninterrupted()
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("time left"),
        TimeRemainingColumn(),
        TextColumn("elapsed"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), speed_estimate_period=3600) as bar:
        task = bar.add_task("starting", total=1.0)

        def report(title: str, share: float) -> None:
            require_uninterrupted()
            bar.update(task, description=title, completed=share)

        yield report
