"""Timing side by side: jobs run in turn, so that a slow moment of the machine hits all alike."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

import hesscope as hs

REPEATS = 5

Row = dict[str, str]


def alternating(
    jobs: dict[str, Callable[[], object]], repeats: int = REPEATS, warm_up: bool = True
) -> dict[str, list[float]]:
    """Seconds of every job, run in turn after one warm-up each."""
    for job in jobs.values() if warm_up else ():
        job()
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(repeats):
        for name, job in jobs.items():
            seconds[name].append(stopwatch(job))
    return seconds


def stopwatch(job: Callable[[], object]) -> float:
    """Seconds that a job takes, work on a GPU included."""
    _synchronize()
    start = time.perf_counter()
    job()
    _synchronize()
    return time.perf_counter() - start


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def row(what: str, values: list[float], target: str = "-") -> Row:
    """A line of the table: median, minimum and maximum."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return {"what": what, "measured": f"{middle:.3g} (min {low:.3g}, max {high:.3g})", "target": target}


def ratios(numerators: list[float], denominators: list[float]) -> list[float]:
    """Ratios of jobs that ran beside each other."""
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


def print_table(rows: list[Row]) -> None:
    width = max(len(each["what"]) for each in rows)
    for each in rows:
        print(f"{each['what']:<{width}}  {each['measured']:<34}  target {each['target']}", flush=True)


def environment(device: str = "cpu") -> dict[str, str | int | None]:
    """Where, when and with what the numbers were made."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    cpu = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit,
        "hesscope": hs.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": cpu[0] if cpu else platform.processor(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
