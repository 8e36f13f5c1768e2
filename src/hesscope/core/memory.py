"""How much memory a device has left, and refusal in clear words when a result would not fit."""

import os
from pathlib import Path

import torch

from hesscope.core.errors import TooLargeError


def available_bytes(device: torch.device | str = "cpu") -> int:
    """Bytes that can still be allocated on `device` (for a CPU: free memory, or the control group's limit if lower)."""
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = _free_system_bytes()
    limit, used = _cgroup_number("memory.max"), _cgroup_number("memory.current")
    return free if limit is None or used is None else min(free, max(limit - used, 0))


def human_bytes(count: float) -> str:
    """'3.2 GiB' and the like."""
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")


def require_memory(needed: int, device: torch.device | str, what: str, instead: str) -> None:
    """Raise TooLargeError unless `needed` bytes are available; `instead` says what to use in place of `what`."""
    available = available_bytes(device)
    if needed > available:
        raise TooLargeError(
            f"{what} needs {human_bytes(needed)}, but {human_bytes(available)} are available; use {instead} instead"
        )


def _free_system_bytes() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:  # not Linux: fall through to what POSIX offers
        return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES"))


def _cgroup_number(name: str) -> int | None:
    try:
        text = Path("/sys/fs/cgroup", name).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
