"""PAC-Bayes bounds: how long each posterior of a 64-600-10 network takes, and what it reaches."""

from __future__ import annotations

import copy

import torch

import hesscope as hs
from benchmarks.peers import quiet
from benchmarks.timing import REPEATS, Row, alternating, print_table, row
from hesscope.layerwise.pac_bayes import OPTIMIZED, POSTERIORS

WIDTHS, SAMPLES, EPOCHS = (64, 600, 10), 1437, 30

# Seconds that the issue of these bounds allows.
TARGETS = {"kronecker": "<= 30", **dict.fromkeys(OPTIMIZED, "<= 600")}


def bounds() -> list[Row]:
    """The table, printed as it is made."""
    with quiet():
        objective, prior = _digits()
        rows = []
        for kind in POSTERIORS:
            reached: list[float] = []

            def make(kind: str = kind, reached: list[float] = reached) -> None:
                reached.append(hs.pac_bayes_bound(objective, prior, kind).bound)

            repeats = 1 if kind in OPTIMIZED else REPEATS
            seconds = alternating({kind: make}, repeats, warm_up=False)[kind]
            what = f"PAC-Bayes, {kind}, 64-600-10, {SAMPLES:,} digits: bound {reached[-1]:.3f} (s)"
            rows.append(row(what, seconds, TARGETS.get(kind, "-")))
            print_table(rows[-1:])
    return rows


def _digits() -> tuple[hs.Objective, torch.nn.Module]:
    """A trained network with its samples, and the network that training began with."""
    data = hs.data.digits(standardize=False, dtype=torch.float32)
    x, y = data.inputs[:SAMPLES], data.labels[:SAMPLES]
    model = hs.models.mlp(WIDTHS, bias=True, dtype=torch.float32)
    prior = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    for _ in range(EPOCHS):
        for chosen in torch.randperm(SAMPLES, generator=generator).split(64):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x[chosen]), y[chosen]).backward()
            optimizer.step()
    return hs.Objective(model, "cross_entropy", (x, y)), prior
