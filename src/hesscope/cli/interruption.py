"""Interruptions that cannot be lost.

Python raises KeyboardInterrupt wherever it is, and forgets it inside a `__del__` or a callback from C, as files have:
right after a result was written, Ctrl-C was sometimes without effect. So it is remembered, and raised again at the next
report of progress.
"""

from __future__ import annotations

_asked: list[int] = []


def interrupt(number: int, _: object) -> None:
    """Signal handler: raises KeyboardInterrupt, now and, if that is lost, later."""
    _asked.append(number)
    raise KeyboardInterrupt


def require_uninterrupted() -> None:
    """Raise KeyboardInterrupt if a signal's own was lost."""
    if _asked:
        _asked.clear()
        raise KeyboardInterrupt
