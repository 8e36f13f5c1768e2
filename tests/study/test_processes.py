"""Processes of their own: their errors, and who ends whom. They load no PyTorch, which would take most of the time."""

import os
import signal
import sys
import time

import pytest

from hesscope.core.errors import DataError, HesscopeError
from hesscope.study.processes import run_in_processes
from tests.study.test_interruptions import start, wait_for
from tests.study.work import end_by, fail, note_and_sleep


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_processes_end_at_once(tmp_path):
    """Ctrl-C comes, and one is killed: nobody is left, and nobody waits."""
    place = tmp_path / "one"
    begun = []

    def interrupt_when_running():
        if place.exists():
            begun.append(time.monotonic())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_in_processes(note_and_sleep, [(place,)], interrupt_when_running)
    assert time.monotonic() - begun[0] < 2
    assert not alive(int(place.read_text().split()[0]))
    with pytest.raises(HesscopeError, match=r"a process was killed by signal 9 \(for lack of memory\?\)"):
        run_in_processes(end_by, [(signal.SIGKILL,)], lambda: None)


def test_what_a_process_raises_is_raised_here():
    with pytest.raises(DataError, match=r"^step 80: the loss is nan$"):
        run_in_processes(fail, [("step 80: the loss is nan",)], lambda: None)


PARENT = """
import sys
from pathlib import Path
from hesscope.study.processes import run_in_processes
from tests.study.work import note_and_sleep
run_in_processes(note_and_sleep, [(Path(sys.argv[1]),)], lambda: None)
"""


def test_processes_leave_ctrl_c_to_their_parent_and_end_with_it(tmp_path):
    place = tmp_path / "one"
    process = start([sys.executable, "-c", PARENT, str(place)])
    wait_for(place, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    pid, ignores = place.read_text().split()
    assert ignores == "True"  # Ctrl-C, which a terminal sends to all: the parent ends them, without a word of theirs
    deadline = time.monotonic() + 5
    while alive(int(pid)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
