"""How long training and measuring have taken, turn by turn."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Seconds spent measuring, and seconds between: the time of the training.

    Args:
        trained, measured: seconds of earlier runs.
    """

    def __init__(self, trained: float = 0.0, measured: float = 0.0) -> None:
        self.trained = trained
        self._measured = measured
        self._started: float | None = None  # of the measuring that goes on
        self._stopped: float | None = None  # of the last one

    @property
    def spent(self) -> float:
        """Seconds of measuring, up to now."""
        return self._measured + (0.0 if self._started is None else time.perf_counter() - self._started)

    @property
    def share(self) -> float:
        """Measuring over training; inf before any training."""
        return self.spent / self.trained if self.trained > 0 else float("inf")

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """What happens within is measuring; what has happened since the last time was training."""
        self._started = time.perf_counter()
        if self._stopped is not None:
            self.trained += self._started - self._stopped
        try:
            yield
        finally:
            self._stopped = time.perf_counter()
            self._measured += self._stopped - self._started
            self._started = None
