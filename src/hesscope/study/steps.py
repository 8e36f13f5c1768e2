"""Steps: named pieces of work whose results are stored one by one, so that a run continues where it stopped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import xarray as xr

from hesscope.study.store import Store

# Called with the share of the step that is done, in [0, 1].
Progress = Callable[[float], None]


@dataclass(frozen=True)
class Step:
    """One piece of work: its file name, what to tell the user, its expected share of the time, and the work itself."""

    name: str
    title: str
    cost: float
    compute: Callable[[Progress], xr.Dataset]


# Called with the title of the current step and the share of the whole run that is done, in [0, 1].
Reporter = Callable[[str, float], None]


def run_steps(steps: Sequence[Step], store: Store, report: Reporter) -> int:
    """Compute every step that the store does not have yet; returns how many were found done.

    Each result is written the moment it exists. An exception, Ctrl-C included, leaves all earlier results in place.
    """
    whole = sum(step.cost for step in steps)
    before = 0.0
    found = 0
    for step in steps:
        start, cost, title = before / whole, step.cost / whole, step.title
        report(title, start)
        if store.has(step.name):
            found += 1
        else:
            store.save(step.name, step.compute(_within(report, title, start, cost)))
        before += step.cost
    report("done", 1.0)
    return found


def _within(report: Reporter, title: str, start: float, cost: float) -> Progress:
    return lambda share: report(title, start + cost * min(max(share, 0.0), 1.0))
