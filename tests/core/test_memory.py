"""Memory: how much is left, and refusal in clear words."""

import pytest

from hesscope.core import memory
from hesscope.core.errors import HesscopeError, TooLargeError


def test_available_memory_is_plausible():
    assert 2**20 < memory.available_bytes() < 2**50
    assert memory.available_bytes("cpu") > 0


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1.0 KiB"),
        (3.2 * 2**30, "3.2 GiB"),
        (5 * 2**40, "5.0 TiB"),
        (2**60, "1048576.0 TiB"),
    ],
)
def test_human_bytes(count, text):
    assert memory.human_bytes(count) == text


@pytest.mark.parametrize(
    ("limit", "used", "expected"),
    [(None, None, 1000), (600, 100, 500), (5000, 100, 1000), (600, 700, 0), (None, 100, 1000)],
)
def test_a_control_group_may_allow_less_than_the_system_has(limit, used, expected, monkeypatch):
    numbers = {"memory.max": limit, "memory.current": used}
    monkeypatch.setattr(memory, "_free_system_bytes", lambda: 1000)
    monkeypatch.setattr(memory, "_cgroup_number", numbers.get)
    assert memory.available_bytes() == expected


def test_require_memory(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda device: 2048)
    memory.require_memory(2048, "cpu", "this", "that")
    with pytest.raises(
        TooLargeError, match=r"^this needs 2.0 KiB, but 2.0 KiB are available; use that instead$"
    ) as caught:
        memory.require_memory(2049, "cpu", "this", "that")
    assert isinstance(caught.value, MemoryError)
    assert isinstance(caught.value, HesscopeError)
