"""Products, eigenpairs and quadratures of Hessians, ours beside the peers', in one run."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import torch

import hesscope as hs
from benchmarks.peers import Pairs, Peer, installed, quiet
from benchmarks.timing import Row, alternating, print_table, ratios, row, stopwatch
from benchmarks.workloads import WORKLOADS, Workload
from hesscope.operators.engines import load_forward_mode

PRODUCTS = 30  # set-up is spread over so many
PAIRS, RESIDUAL = 5, 1e-3
PROBES, STEPS = 2, 30
LARGE = ("resnet", "gpt")
LONG_REPEATS = 1  # of what takes a minute by itself; products have warmed everything up


def curvature(device: str) -> list[Row]:
    """All tables, printed as they are made."""
    rows: list[Row] = []
    for name, make in WORKLOADS.items():
        work = make(device)
        with quiet():
            peers = installed(work)
            parts = [lambda work=work, peers=peers, large=name in LARGE: products(work, peers, large)]
            if name in LARGE:
                parts += [
                    lambda work=work, peers=peers: eigenpairs(work, peers),
                    lambda work=work, peers=peers: quadratures(work, peers),
                ]
            for part in parts:
                rows += shown(part())
    if device == "cpu":
        for name in LARGE:
            rows += shown(peak_memory(name))
    return rows


def shown(rows: list[Row]) -> list[Row]:
    print_table(rows)
    return rows


def objective(work: Workload) -> hs.Objective:
    return hs.Objective(work.model, "cross_entropy", (work.inputs, work.labels))


def products(work: Workload, peers: list[Peer], large: bool) -> list[Row]:
    """One product in multiples of a gradient, set-up spread over PRODUCTS; and beside each peer's."""
    found = objective(work)
    v = torch.randn(found.parameters.size, device=work.inputs.device)
    H, G = hs.Hessian(found), hs.GaussNewton(found)
    load_forward_mode()  # once in a process, as is importing torch
    setup = {"H": stopwatch(lambda: H @ v), "G": stopwatch(lambda: G @ v)}
    print(H.explain())
    parameters = list(work.model.parameters())
    jobs: dict[str, Callable[[], object]] = {
        "gradient": lambda: torch.autograd.grad(work.loss(), parameters),
        "H": lambda: H @ v,
        "G": lambda: G @ v,
    }
    truth = H @ v
    for peer in peers:
        product = peer.hessian()
        # The same matrix; some round more (8e-4 by curvlinops on the GPT, where the others have 6e-7).
        gap = float((product(v) - truth).norm() / truth.norm())
        assert gap < 1e-2, f"{peer.name}'s product differs by {gap}"
        jobs[f"H, {peer.name}"] = lambda product=product: product(v)
        if peer.gauss_newton is not None:
            pushed = peer.gauss_newton()
            jobs[f"G, {peer.name}"] = lambda pushed=pushed: pushed(v)
    seconds = alternating(jobs, repeats=7 if large else 30)
    for name in ("H", "G"):
        once = (setup[name] - statistics.median(seconds[name])) / PRODUCTS
        seconds[name] = [s + once for s in seconds[name]]
    rows = [
        row(f"{work.name}: gradient (s)", seconds["gradient"]),
        row("  Hessian product / gradient", ratios(seconds["H"], seconds["gradient"]), "<= 2.3" if large else "-"),
        row("  Gauss-Newton product / gradient", ratios(seconds["G"], seconds["gradient"])),
    ]
    for name in seconds:
        matrix, _, peer = name.partition(", ")
        if peer:
            rows += [
                row(f"  {name} / gradient", ratios(seconds[name], seconds["gradient"])),
                row(
                    f"  {matrix}, ours / {peer}'s",
                    ratios(seconds[matrix], seconds[name]),
                    ("<= 0.70" if matrix == "H" else "<= 0.8") if large else "-",
                ),
            ]
    return rows


def eigenpairs(work: Workload, peers: list[Peer]) -> list[Row]:
    """Top PAIRS eigenpairs to a verified relative residual, from nothing; each peer with the least effort that does."""
    H = hs.Hessian(objective(work))

    def ours() -> Pairs:
        pairs = hs.top_eigenpairs(hs.Hessian(objective(work)), PAIRS, rtol=RESIDUAL)
        return pairs.values, pairs.vectors.cpu().numpy()

    jobs: dict[str, Callable[[], object]] = {"ours": ours}
    found = {"ours": ours()}
    for peer in peers:
        if peer.eigenpairs is None:
            continue
        for effort in peer.efforts:
            pairs = peer.eigenpairs(PAIRS, effort)
            if worst(H, pairs) <= RESIDUAL:
                found[f"{peer.name} ({effort:g})"] = pairs
                run = peer.eigenpairs
                jobs[f"{peer.name} ({effort:g})"] = lambda run=run, effort=effort: run(PAIRS, effort)
                break
    seconds = alternating(jobs, repeats=LONG_REPEATS, warm_up=False)
    rows = []
    for name in jobs:
        what = f"{work.name}: top {PAIRS} eigenpairs, {name}, residual {worst(H, found[name]):.1e} (s)"
        rows.append(row(what, seconds[name]))
        if name != "ours":
            rows.append(row(f"  ours / {name}", ratios(seconds["ours"], seconds[name]), "<= 0.75"))
    return rows


def worst(H: hs.Hessian, pairs: Pairs) -> float:
    """The largest relative residual of some eigenpairs."""
    values, vectors = pairs
    V = torch.from_numpy(np.ascontiguousarray(vectors)).to(H.dtype).to(H.device)
    V = V / V.norm(dim=0)
    scaled = V * torch.from_numpy(np.ascontiguousarray(values)).to(V)
    return float(((H @ V - scaled).norm(dim=0) / scaled.norm(dim=0)).max())


def quadratures(work: Workload, peers: list[Peer]) -> list[Row]:
    """PROBES x STEPS stochastic Lanczos quadrature, from nothing."""
    jobs: dict[str, Callable[[], object]] = {
        "ours": lambda: hs.spectral_density(hs.Hessian(objective(work)), PROBES, STEPS)
    }
    for peer in peers:
        if peer.quadrature is not None:
            jobs[peer.name] = lambda run=peer.quadrature: run(PROBES, STEPS)
    seconds = alternating(jobs, repeats=LONG_REPEATS, warm_up=False)
    rows = [row(f"{work.name}: quadrature {PROBES} x {STEPS}, ours (s)", seconds["ours"])]
    for name in seconds:
        if name != "ours":
            rows.append(row(f"  ours / {name}'s", ratios(seconds["ours"], seconds[name]), "<= 0.6"))
    return rows


PEAK = """
import re, sys, torch, hesscope as hs
from benchmarks.workloads import WORKLOADS
def status(key): return int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
work = WORKLOADS[sys.argv[1]]("cpu")
H = hs.Hessian(hs.Objective(work.model, "cross_entropy", (work.inputs, work.labels)), memory=0)
v = torch.randn(H.shape[0])
parameters = list(work.model.parameters())
def peak(job):
    job()
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    job()
    return status("VmHWM") - before
print(peak(lambda: H @ v) / peak(lambda: torch.autograd.grad(work.loss(), parameters)))
"""


def peak_memory(name: str) -> list[Row]:
    """Peak memory of a product that keeps nothing over that of a gradient, in a fresh interpreter."""
    import os

    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # freed memory goes back at once
    out = subprocess.run(
        [sys.executable, "-c", PEAK, name], check=True, capture_output=True, text=True, env=environment
    ).stdout
    return [
        {
            "what": f"{name}: peak memory of a streamed product / of a gradient",
            "measured": f"{float(out):.2f}",
            "target": "<= 2",
        }
    ]
