"""Ctrl-C that falls where Python forgets it comes back at the next report of progress."""

import signal

import pytest

from hesscope.cli.interruption import interrupt
from hesscope.cli.progress import progress_bar


class Forgetful:
    """KeyboardInterrupt inside a `__del__` is ignored."""

    def __del__(self):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interruption_inside_a_del_is_not_lost():
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        with progress_bar() as report:
            report("first", 0.1)
            thing = Forgetful()
            del thing
            with pytest.raises(KeyboardInterrupt):
                report("second", 0.2)
            report("third", 0.3)
    finally:
        signal.signal(signal.SIGINT, before)
