"""Work in several processes, each a new interpreter: all end when one fails, at Ctrl-C, and when the parent is gone."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from threading import Thread
from typing import Any

from hesscope.core.errors import HesscopeError

# Seconds between two looks at what has been done, and from the request to end to the end.
INTERVAL, PATIENCE = 0.2, 5.0


@dataclass(frozen=True)
class _Worker:
    process: SpawnProcess
    outcome: Connection

    def require_success(self) -> None:
        """Raise what the process raised, once it has ended."""
        try:
            error = self.outcome.recv() if self.outcome.poll() else None
        except EOFError:
            error = None
        if error is not None:
            raise error
        if code := self.process.exitcode:
            how = f"was killed by signal {-code} (for lack of memory?)" if code < 0 else f"failed with exit code {code}"
            raise HesscopeError(f"a process {how}; what it had finished is kept")


def run_in_processes(
    function: Callable[..., None], arguments: Sequence[tuple[Any, ...]], watch: Callable[[], None]
) -> None:
    """Call a function with each of the arguments, all at once, in a process each.

    Args:
        function: of a module; what it raises is raised here.
        arguments: of each call; they are pickled.
        watch: called a few times a second; what it raises ends all processes at once.

    Raises:
        HesscopeError: a call raised it, or a process was killed.
    """
    workers: list[_Worker] = []
    try:
        with _without_interruptions():
            workers += [_started(function, each) for each in arguments]
        running = list(workers)
        while running:
            wait([worker.process.sentinel for worker in running], timeout=INTERVAL)
            watch()
            ended = [worker for worker in running if not worker.process.is_alive()]
            running = [worker for worker in running if worker not in ended]
            for worker in ended:
                worker.require_success()
    finally:
        _end([worker.process for worker in workers])


def _started(function: Callable[..., None], arguments: tuple[Any, ...]) -> _Worker:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(sender, function, arguments))
    process.start()
    sender.close()
    return _Worker(process, receiver)


def _work(sender: Connection, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    """What runs in a process."""
    Thread(target=_end_with_parent, daemon=True).start()
    try:
        function(*arguments)
    except HesscopeError as error:
        sender.send(error)


def _end_with_parent() -> None:
    """A parent that is killed ends nobody; what is done meanwhile would be done twice by the next run."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextmanager
def _without_interruptions() -> Iterator[None]:
    """Ctrl-C, which a terminal sends to all processes, waits until the body is done; those started there ignore it."""
    resource_tracker.ensure_running()  # which would be started with the first process, and let Ctrl-C through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end(processes: Sequence[SpawnProcess]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(PATIENCE)
        if process.is_alive():
            process.kill()
            process.join()
