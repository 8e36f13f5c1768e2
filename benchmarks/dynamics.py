"""The Hessian along training: a snapshot of the whole structure, with its peak memory and its floor."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import hesscope as hs
from benchmarks.timing import Row, alternating, print_table, ratios, row
from hesscope.dynamics import Tracker, log_spaced
from hesscope.estimate.split import split_energies
from hesscope.study.presets import find_preset

# The network of arXiv:2505.02809: d inputs, m ReLU neurons, C classes, N samples; P = 8000, 508 blocks by neuron.
INPUTS, WIDTH, CLASSES, SAMPLES = 500, 8, 500, 5000
SNAPSHOTS = 5

# Steps of the training on the digits that are measured, and how often it is trained.
TRACKED, TRAININGS = 20, 5
MEASURES = ("energies", "eigenvalues")

MEMORY = """
import re
from benchmarks.dynamics import network, snapshot
objective, partition = network()
snapshot(objective, partition)
print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""


def dynamics() -> list[Row]:
    """All tables, printed as they are made."""
    rows: list[Row] = []
    for part in (tracking, snapshots):
        found = part()
        print_table(found)
        rows += found
    return rows


def tracking() -> list[Row]:
    """Training on the digits with a tracker at log-spaced steps, over the same training without."""
    preset = find_preset("digits")
    options = preset.options(snapshots=TRACKED)
    at = log_spaced(options.steps, options.snapshots)

    def train(tracked: bool, folder: Path | None = None) -> Tracker | None:
        run = preset.make(options)
        tracker = None
        if tracked:
            tracker = Tracker(run.objective, run.partition, at, MEASURES, folder, optimizer=run.optimizer)
        run.model.train()
        for step in range(options.steps + 1):
            if tracker is not None:
                tracker(step)
            if step < options.steps:
                run.optimizer.zero_grad()
                run.loss_at(step).backward()
                run.optimizer.step()
        return tracker

    def into_folder() -> None:
        with tempfile.TemporaryDirectory() as folder:
            train(True, Path(folder))

    jobs = {"without": lambda: train(False), "tracked": lambda: train(True), "stored": into_folder}
    seconds = alternating(jobs, TRAININGS)
    size = preset.make(options).objective.parameters.size
    what = f"training on digits, P = {size:,}, {options.steps:,} steps"
    return [
        row(f"{what} (s)", seconds["without"]),
        row(
            f"  tracked at {len(at)} steps ({', '.join(MEASURES)}) / not",
            ratios(seconds["tracked"], seconds["without"]),
            "<= 2",
        ),
        row("  and written to a folder / not", ratios(seconds["stored"], seconds["without"]), "<= 2"),
    ]


def network() -> tuple[hs.Objective, hs.Partition]:
    """At initialization, on Gaussian data, in float64, by neuron."""
    data = hs.data.gaussian(SAMPLES, INPUTS, CLASSES, dtype=torch.float64)
    model = hs.models.one_hidden(INPUTS, WIDTH, CLASSES, dtype=torch.float64)
    objective = hs.Objective(model, "cross_entropy", (data.inputs, data.labels))
    return objective, hs.Partition.by_row(model)


def snapshot(objective: hs.Objective, partition: hs.Partition) -> object:
    """Exact energies of H, G and R."""
    return split_energies(objective, partition, "closed_form")


def snapshots() -> list[Row]:
    """Energies of H, G and R, beside those of H alone, and beside a product of P^2 N / 2 multiply-adds."""
    objective, partition = network()
    H, P = hs.Hessian(objective), objective.parameters.size
    left, right = torch.randn(INPUTS, SAMPLES).double(), torch.randn(SAMPLES, P // 2).double()
    seconds = alternating(
        {
            "ours": lambda: snapshot(objective, partition),
            "H": lambda: hs.block_energies(H, partition, "closed_form"),
            "product": lambda: left @ right,
        },
        SNAPSHOTS,
    )
    # A product as large as those that a snapshot is made of, scaled to the multiply-adds of all entries and samples.
    floors = [s * P * P / 2 / (INPUTS * P // 2) for s in seconds["product"]]
    what = f"energies of H, G and R, P = {P:,}, {len(partition)} blocks, N = {SAMPLES:,}, float64"
    needed = [a / b for a, b in zip(seconds["ours"], floors, strict=True)]
    beside = [a / b for a, b in zip(seconds["ours"], seconds["H"], strict=True)]
    return [
        row(f"{what} (s)", seconds["ours"], "<= 6"),
        {"what": "  peak memory of a fresh process (GiB)", "measured": f"{peak_gib():.2f}", "target": "<= 2"},
        row("  / energies of H alone", beside, "-"),
        row(f"  / P^2 N / 2 multiply-adds, which take {statistics.median(floors):.2g} s", needed, "-"),
        row(f"  / those that ReLU leaves, {counted(objective):.0%} of them", [r / counted(objective) for r in needed]),
    ]


def counted(objective: hs.Objective) -> float:
    """Share of the multiply-adds that are left where every product leaves out the samples that add nothing to it.

    Of the pairs of neurons i <= j, only samples that reach both count, for the blocks of either layer; of the mixed
    blocks, samples that reach i and j.
    """
    x = hs.data.gaussian(SAMPLES, INPUTS, CLASSES, dtype=torch.float64).inputs
    active = (x @ next(objective.model.parameters()).detach().T > 0).double()
    both = active.T @ active / len(x)
    pairs = float(both.triu().sum())
    same, mixed = (INPUTS**2 + CLASSES**2) / 2 * pairs, INPUTS * CLASSES * float(both.sum())
    return (same + mixed) / ((INPUTS + CLASSES) ** 2 * WIDTH**2 / 2)


def peak_gib() -> float:
    """Largest resident memory of a process that makes one snapshot and nothing else."""
    command = [sys.executable, "-c", MEMORY]
    out = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ}).stdout
    return int(out) / 2**20
