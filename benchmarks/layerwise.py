"""Layer-wise structure: factors of a ResNet-20, the decoupling error of a large layer, eigenpairs of layers."""

from __future__ import annotations

import statistics

import torch
from torch import nn

import hesscope as hs
from benchmarks.peers import quiet
from benchmarks.timing import Row, alternating, print_table, ratios, row
from benchmarks.workloads import WORKLOADS, ResNet20

# Samples and batch of the factors; curvlinops is given the same batches.
SAMPLES, BATCH = 1000, 50
REPEATS = 3

# Layers of the ResNet-20 whose eigenpairs are timed: near the outputs, in the middle, and nearest the inputs.
LAYERS = ("head", "blocks.4.conv1", "stem.0")
EIGENPAIRS = 20


def layerwise() -> list[Row]:
    """All tables, printed as they are made."""
    rows: list[Row] = []
    with quiet():
        for part in (errors, eigenpairs, factors):
            found = part()
            print_table(found)
            rows += found
    return rows


def factors() -> list[Row]:
    """Factors of every layer of ResNet-20, beside curvlinops' K-FAC with the exact Fisher matrix."""
    torch.manual_seed(0)
    model = ResNet20().eval()
    x, y = torch.randn(SAMPLES, 3, 32, 32), torch.randint(10, (SAMPLES,))
    batches = list(zip(x.split(BATCH), y.split(BATCH), strict=True))
    objective = hs.Objective(model, "cross_entropy", batches)
    names = [name for layer in hs.layerwise.layers_of(objective) for name in layer.parameters]

    def ours() -> object:
        return hs.layerwise.all_kronecker_factors(objective)

    jobs = {"ours": ours}
    try:
        from curvlinops import KFACLinearOperator
    except ImportError as error:
        print(f"left out: {error}")
    else:

        def theirs() -> object:
            parameters = dict(model.named_parameters())
            made = KFACLinearOperator(
                model,
                nn.CrossEntropyLoss(),
                [parameters[name] for name in names],
                batches,
                fisher_type="type-2",
                kfac_approx="expand",
                separate_weight_and_bias=False,
                check_deterministic=False,
                num_data=SAMPLES,
                num_per_example_loss_terms=1,
            )
            return made @ torch.zeros(made.shape[1])  # the factors are made at the first product

        jobs["curvlinops"] = theirs
    seconds = alternating(jobs, REPEATS, warm_up=False)
    what = f"Kronecker factors, ResNet-20, {SAMPLES:,} samples"
    rows = [row(f"{what} (s)", seconds["ours"])]
    if "curvlinops" in seconds:
        rows.append(row(f"{what} / curvlinops", ratios(seconds["ours"], seconds["curvlinops"]), "<= 1"))
    return rows


def errors() -> list[Row]:
    """Both decoupling errors of a layer with 10^5 parameters, 1,000 samples and 10 classes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(316, 316), nn.ReLU(), nn.Linear(316, 64), nn.ReLU(), nn.Linear(64, 10))
    objective = hs.Objective(model, "cross_entropy", (torch.randn(1000, 316), torch.randint(10, (1000,))))
    seconds = alternating({"errors": lambda: hs.layerwise.kronecker_factors(objective, "0")}, REPEATS)["errors"]
    return [row("factors and both errors, P = 100,172, N = 1000, C = 10 (s)", seconds, "<= 20")]


def eigenpairs() -> list[Row]:
    """Top 20 eigenvectors of a layer, by its own products and by those of the whole Hessian."""
    work = WORKLOADS["resnet"]("cpu")
    objective = hs.Objective(work.model, "cross_entropy", (work.inputs, work.labels))
    whole = hs.Hessian(objective)
    rows = []
    for name in LAYERS:
        layer = next(each for each in hs.layerwise.layers_of(objective) if each.name == name)
        where = torch.cat([torch.arange(whole.shape[0])[objective.parameters.slice(part)] for part in layer.parameters])
        own, v = hs.layerwise.layer_hessian(objective, name), torch.randn(layer.size)
        wide = torch.zeros(whole.shape[0])
        wide[where] = v
        seconds = alternating({"own": lambda own=own, v=v: own @ v, "whole": lambda wide=wide: whole @ wide})
        rows.append(row(f"product of layer {name} / of the whole Hessian", ratios(seconds["own"], seconds["whole"])))
        taken = alternating({"top": lambda own=own: hs.top_eigenpairs(own, EIGENPAIRS)}, 1, warm_up=False)["top"]
        share = statistics.median(seconds["own"])
        rows.append(row(f"top {EIGENPAIRS} of {name}, P = {layer.size:,} (s; a product takes {share:.2g})", taken))
    return rows
