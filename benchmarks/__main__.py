"""`make bench`: time what users wait for, print a table, and store it with environment, commit and date."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch

import hesscope as hs
from benchmarks.bounds import bounds
from benchmarks.curvature import curvature
from benchmarks.dynamics import dynamics
from benchmarks.layerwise import layerwise
from benchmarks.structure import structure
from benchmarks.timing import REPEATS, Row, alternating, environment, print_table, row

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--only", choices=["curvature", "structure", "layerwise", "dynamics", "bounds", "rest"], help="one of the parts"
    )
    asked = parser.parse_args()
    if asked.only in (None, "curvature"):
        store("curvature", curvature(asked.device), asked.device)
    if asked.only in (None, "structure") and asked.device == "cpu":
        store("structure", structure(), "cpu")
    if asked.only in (None, "layerwise") and asked.device == "cpu":
        store("layerwise", layerwise(), "cpu")
    if asked.only in (None, "dynamics") and asked.device == "cpu":
        store("dynamics", dynamics(), "cpu")
    if asked.only in (None, "bounds") and asked.device == "cpu":
        store("bounds", bounds(), "cpu")
    if asked.only in (None, "rest") and asked.device == "cpu":
        rows = [*start_up(), *products(), *closed_forms(), *output_layers(), *theory(), *commands()]
        print_table(rows)
        store("results", rows, "cpu")


def store(name: str, rows: list[Row], device: str) -> None:
    """Keep a table with environment, commit and date; a GPU's beside the CPU's."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / (f"{name}.json" if device == "cpu" else f"{name}-{device}.json")
    path.write_text(json.dumps({"environment": environment(device), "rows": rows}, indent=2) + "\n")
    print(f"stored in {path}")


def start_up() -> list[Row]:
    """Imports and help, each in a fresh interpreter, alternating."""
    commands = {
        "torch": [sys.executable, "-c", "import torch"],
        "hesscope": [sys.executable, "-c", "import hesscope"],
        "all names": [sys.executable, "-c", "import hesscope as hs; [getattr(hs, name) for name in hs.__all__]"],
        "help": [str(Path(sys.executable).with_name("hesscope")), "--help"],
    }
    seconds = alternating({name: lambda command=command: run(command) for name, command in commands.items()})
    base = statistics.median(seconds["torch"])
    return [
        row("import hesscope / import torch", [s / base for s in seconds["hesscope"]], "<= 1.5"),
        row("import hesscope, all names / import torch", [s / base for s in seconds["all names"]], "<= 1.5"),
        row("hesscope --help (s)", seconds["help"], "<= 1"),
    ]


def products() -> list[Row]:
    """Dense Hessian of the demo's network (P = 1184, N = 1797, float64) beside torch's own, and product costs."""
    data = hs.data.digits(dtype=torch.float64)
    model = hs.models.one_hidden(64, 16, 10, dtype=torch.float64)
    objective = hs.Objective(model, "cross_entropy", (data.inputs, data.labels))
    H, G = hs.Hessian(objective), hs.GaussNewton(objective)
    space = objective.parameters
    theta = space.flatten({name: p.detach() for name, p in model.named_parameters()})

    def loss(vector: torch.Tensor) -> torch.Tensor:
        outputs = torch.func.functional_call(model, space.unflatten(vector), (data.inputs,))
        return torch.nn.functional.cross_entropy(outputs, data.labels)

    dense = alternating(
        {
            "ours": lambda: H.dense(),
            "torch": lambda: torch.autograd.functional.hessian(loss, theta, vectorize=True),
        }
    )
    v = torch.randn(space.size, dtype=torch.float64)
    V = torch.randn(space.size, H.columns_per_pass, dtype=torch.float64)
    single = alternating(
        {"gradient": objective.gradient, "H": lambda: H @ v, "HV": lambda: H @ V, "GV": lambda: G @ V}, repeats=20
    )
    gradient = statistics.median(single["gradient"])
    return [
        row("dense Hessian, P = 1184, N = 1797 (s)", dense["ours"], "-"),
        row(
            "  torch.autograd.functional.hessian / ours",
            [a / b for a, b in zip(dense["torch"], dense["ours"], strict=True)],
            "> 1",
        ),
        row("H @ v / gradient", [s / gradient for s in single["H"]], "-"),
        row(f"H @ V per column / gradient, K = {V.shape[1]}", [s / gradient / V.shape[1] for s in single["HV"]], "-"),
        row(f"G @ V per column / gradient, K = {V.shape[1]}", [s / gradient / V.shape[1] for s in single["GV"]], "-"),
    ]


def closed_forms() -> list[Row]:
    """Dense Hessian of the network of arXiv:2505.02809 (d = 500, m = 8, C = 500, N = 5000, P = 8000, float32)."""
    data = hs.data.gaussian(5000, 500, 500)
    model = hs.models.one_hidden(500, 8, 500)
    H = hs.Hessian(hs.Objective(model, "cross_entropy", data.batch("cross_entropy")))
    P, N, rows = H.shape[0], 5000, 40
    left, right = torch.randn(P // 2, N), torch.randn(N, P // 2)

    def row_by_row() -> None:
        """The common way: differentiate each entry of one retained gradient graph."""
        outputs = model(data.inputs)
        loss = torch.nn.functional.cross_entropy(outputs, data.labels)
        parameters = list(model.parameters())
        gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, parameters, create_graph=True)])
        for index in range(rows):
            torch.autograd.grad(gradient[index], parameters, retain_graph=True)

    seconds = alternating({"ours": H.dense, "rows": row_by_row, "product": lambda: left @ right}, repeats=3)
    # The floor of MATH.md section 2: P^2 N / 2 multiply-adds; the product above has P^2 N / 4.
    floors = [2 * s for s in seconds["product"]]
    return [
        row("closed form, P = 8000, N = 5000, float32 (s)", seconds["ours"], "-"),
        row(
            "  row by row (40 rows, scaled) / ours",
            [s * P / rows / ours for s, ours in zip(seconds["rows"], seconds["ours"], strict=True)],
            ">= 100",
        ),
        row("  ours / floor", [ours / f for ours, f in zip(seconds["ours"], floors, strict=True)], "<= 1.6"),
        *cost_and_accuracy(),
    ]


def cost_and_accuracy() -> list[Row]:
    """Peak memory of that dense Hessian over its own size, in a fresh interpreter, and its error against float64."""
    code = """
import re, torch, hesscope as hs
def peak(): return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
def hessian(dtype):
    data = hs.data.gaussian(5000, 500, 500, dtype=torch.float64)
    model = hs.models.one_hidden(500, 8, 500, dtype=torch.float64).to(dtype)
    return hs.Hessian(hs.Objective(model, "cross_entropy", (data.inputs.to(dtype), data.labels)))
H = hessian(torch.float32)
H.objective.gradient()
before = peak()
dense = H.dense()
print((peak() - before) / (4 * dense.numel()))
exact = hessian(torch.float64).dense()
print(((dense.double() - exact).norm() / exact.norm()).item())
"""
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    return [
        {"what": "  peak memory / result", "measured": f"{float(out[0]):.2f}", "target": "<= 3"},
        {"what": "  relative error against float64", "measured": f"{float(out[1]):.1e}", "target": "<= 1e-5"},
    ]


def output_layers() -> list[Row]:
    """All class blocks of an output layer at C = 131,072 (N = 1024, d = 256), beside its three products alone."""
    N, d, C, tile = 1024, 256, 131_072, 8192
    features, weight = torch.randn(N, d), torch.randn(C, d) / d**0.5
    p, gram = torch.rand(N, tile), torch.rand(N, N)

    def three_products() -> None:
        for _ in range(C // tile):
            _ = (p @ p.T, p @ p.T, gram @ p)

    seconds = alternating(
        {"ours": lambda: hs.output_layer_energies(features, weight=weight), "products": three_products}, repeats=3
    )
    ratios = [a / b for a, b in zip(seconds["ours"], seconds["products"], strict=True)]
    return [
        row("output_layer_energies, C = 131,072, N = 1024, d = 256 (s)", seconds["ours"], "<= 15"),
        row("  ours / its three products alone", ratios, "<= 2.5"),
    ]


def theory() -> list[Row]:
    """Predictions: a spectral law's density, a softmax moment, the slowest kind of static force."""
    weights = torch.randn(2000, dtype=torch.float64).numpy()
    many = torch.randn(60_000, dtype=torch.float64).numpy()
    grid = torch.linspace(-4, 6, 500, dtype=torch.float64).numpy()

    def force(classes: int) -> object:
        return hs.theory.static_force("one_hidden", "cross_entropy", classes, 1.0, 8)

    return [
        timed(
            "softmax moment E p1^2 p2^2, C = 131,072 (s)",
            lambda: hs.theory.softmax_moment((2, 2), 131_072),
            "<= 0.05",
            REPEATS,
        ),
        timed(
            "spectral law, density at 500 points, 2000 weights (s)",
            lambda: hs.theory.SpectralLaw(weights, 0.5).density(grid),
            "<= 2",
            REPEATS,
        ),
        timed("  the same from 60,000 weights (s)", lambda: hs.theory.SpectralLaw(many, 0.5).density(grid), "-", 3),
        timed("static_force, cross-entropy, C = 1000, to 2 % (s)", lambda: force(1000), "<= 30", 3),
        timed("static_force, cross-entropy, C = 131,072, to 2 % (s)", lambda: force(131_072), "<= 30", 1),
    ]


def commands() -> list[Row]:
    """Whole commands in fresh folders, with their peak memory."""
    return [
        command("hesscope demo (s, peak GiB)", ["demo"], "<= 90 s, <= 2 GiB"),
        command("hesscope sweep, 5 C x 5 networks x 2 losses (s, peak GiB)", ["sweep"], "<= 300 s"),
    ]


def command(what: str, arguments: list[str], target: str) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        whole = [str(Path(sys.executable).with_name("hesscope")), *arguments, "--out", folder]
        code = (
            "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL);"
            "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
        )
        start = time.perf_counter()
        out = subprocess.run([sys.executable, "-c", code, *whole], check=True, capture_output=True, text=True).stdout
        seconds = time.perf_counter() - start
    return {"what": what, "measured": f"{seconds:.1f} s, {int(out) / 2**20:.2f} GiB", "target": target}


def timed(what: str, job: Callable[[], object], target: str, repeats: int) -> Row:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        job()
        seconds.append(time.perf_counter() - start)
    return row(what, seconds, target)


def run(command: list[str]) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
