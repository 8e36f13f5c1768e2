"""Block structure of the GPT workload: energies of all pairs of tensors, of 500 blocks and more, and advice."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import hesscope as hs
from benchmarks.curvature import objective
from benchmarks.peers import installed, quiet
from benchmarks.timing import Row, print_table, stopwatch
from benchmarks.workloads import WORKLOADS, TransformerBlock
from hesscope.estimate.block_energies import probe_samples

# Blocks that hold at least this share of the energy have a tolerance of their own, in units of that of the whole.
RELEVANT, OF_BLOCKS = 0.01, 2.0
RTOL = 0.05
# Plain probes of every block that the comparison's variances are had from.
PLAIN = 6
# A network that has learnt has blocks of low rank, one at its random initialization has not.
TRAINED = 150
HEADS = {
    TransformerBlock: {
        "qkv": hs.Heads(4, ("query", "key", "value")),
        "project": hs.Heads(4, "output", axis=1),
    }
}


def structure() -> list[Row]:
    """All tables, printed as they are made."""
    rows: list[Row] = []
    with quiet():
        for part in (hessian_energies, lambda: hessian_energies(TRAINED), dual, advice):
            found = part()
            print_table(found)
            rows += found
    return rows


def hessian_energies(steps: int = 0) -> list[Row]:
    """All pairs of tensors of the Hessian to the tolerance, and what plain probes by a peer's products would take.

    steps: of Adam on the workload's own batch, beforehand.
    """
    work = WORKLOADS["gpt"]("cpu")
    optimizer = torch.optim.Adam(work.model.parameters(), lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        work.loss().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    optimizer.zero_grad()
    name = f"GPT after {steps} steps" if steps else "GPT"
    found = objective(work)
    H, tensors = hs.Hessian(found), hs.Partition.by_tensor(work.model)
    energies, seconds = timed(lambda: hs.block_energies(H, tensors, method="probes", rtol=RTOL))
    share = np.diag(energies.values) / energies.total
    relevant = share >= RELEVANT
    with np.errstate(invalid="ignore"):
        block_error = float(np.max((np.diag(energies.stderr) / np.diag(energies.values))[relevant], initial=0.0))
    error = energies.diagonality_stderr / energies.diagonality
    rows = [
        line(f"{name}: energies of all pairs of 53 tensors (s)", f"{seconds:.0f}", "<= 180"),
        line("  products", f"{energies.products}"),
        line("  relative error of the diagonality", f"{error:.3f}", "<= 0.05"),
        line(f"  of the worst of {int(relevant.sum())} blocks with 1 % of the energy", f"{block_error:.3f}", "<= 0.10"),
    ]
    # Errors of one plain probe of every block, and so the probes that would reach what was reached.
    (samples,) = probe_samples((H,), tensors, 1, range(PLAIN))
    whole = samples.sum(axis=(1, 2))
    kept = np.trace(samples, axis1=1, axis2=2)
    residual = kept - kept.mean() / whole.mean() * whole
    plain = residual.std(ddof=1) / kept.mean()
    diagonal = samples[:, range(len(tensors)), range(len(tensors))]
    of_blocks = (diagonal.std(axis=0, ddof=1) / diagonal.mean(axis=0))[relevant]
    needed = max((plain / error) ** 2, float(np.max((of_blocks / max(block_error, 1e-9)) ** 2, initial=0.0)))
    v = torch.randn(H.shape[0])
    for peer in installed(work):
        if peer.name == "curvlinops":
            product = peer.hessian()
            product(v)
            each = min(stopwatch(lambda product=product: product(v)) for _ in range(5))
            ratio = needed * len(tensors) * each / seconds
            text = f"{ratio:.1f} ({needed:.0f} probes of {each:.2f} s for each of the blocks)"
            rows.append(line("  plain probes with curvlinops' products, at equal error / ours", text, ">= 3"))
    return rows


def dual() -> list[Row]:
    """The Gauss-Newton matrix by heads and groups of rows."""
    work = WORKLOADS["gpt"]("cpu")
    partition = fine_partition(work.model)
    G = hs.GaussNewton(objective(work))
    energies, seconds = timed(lambda: hs.block_energies(G, partition, method="dual"))
    error = energies.diagonality_stderr / energies.diagonality
    return [
        line(f"GPT: dual form, {len(partition)} blocks (s)", f"{seconds:.0f}", "<= 120"),
        line("  relative error of the diagonality", f"{error:.3f}"),
    ]


def fine_partition(model: torch.nn.Module) -> hs.Partition:
    """Heads, and rows elsewhere in 40 groups a tensor."""
    heads, rows = hs.Partition.by_head(model, heads=HEADS), hs.Partition.by_row(model)
    space = hs.ParameterSpace.of(model)
    assignment, labels = np.empty(space.size, dtype=np.int32), []
    for name in space.names:
        place = space.slice(name)
        split = len(np.unique(heads.assignment[place])) > 1
        numbers, own = np.unique((heads if split else rows).assignment[place], return_inverse=True)
        step = 1 if split else -(-len(numbers) // 40)
        own = own // step
        assignment[place] = own + len(labels)
        labels += [f"{name}({k})" for k in range(int(own.max()) + 1)]
    return hs.Partition(tuple(labels), assignment)


STUDY = """
model = "benchmarks.structure:model"
data = "benchmarks.structure:data"
partition = "tensor"
output = "out"
"""


def model() -> torch.nn.Module:
    """The workload's network, for the study."""
    return WORKLOADS["gpt"]("cpu").model


def data() -> tuple[torch.Tensor, torch.Tensor]:
    """The workload's tokens, for the study."""
    work = WORKLOADS["gpt"]("cpu")
    return work.inputs, work.labels


def advice() -> list[Row]:
    """The command, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "STUDY.toml").write_text(STUDY)
        command = [str(Path(sys.executable).with_name("hesscope")), "advise", f"{folder}/STUDY.toml"]
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
        verdict = json.loads((Path(folder) / "out/advice.json").read_text())["verdict"]
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    return [
        line("GPT: hesscope advise (s)", f"{seconds:.0f}", "<= 300"),
        line("  peak memory (GiB)", f"{peak:.1f}", "<= 6"),
        line("  advice", str(verdict["name"])),
    ]


def timed(job: Callable[[], hs.BlockEnergies]) -> tuple[hs.BlockEnergies, float]:
    """What it gives, and the seconds it takes."""
    start = time.perf_counter()
    result = job()
    return result, time.perf_counter() - start


def line(what: str, measured: str, target: str = "-") -> Row:
    """A line of the table."""
    return {"what": what, "measured": measured, "target": target}
