"""Networks from different seeds share the leading eigenspaces of their layers: what explains it, and what removes it.

Run with:  python examples/shared_eigenspaces.py          (fully connected on digits, a minute)
           python examples/shared_eigenspaces.py lenet5   (or vgg, resnet: minutes)

Without a norm in front of a layer its input is far from zero mean: E[x] dominates E[xx^T], and every network's leading
eigenvectors are (some output direction) x E[x]. Batch norm takes the mean away, and the shared eigenspaces with it.
"""

import sys

import numpy as np

import hesscope as hs
from hesscope.study.classifiers import trained, training_data

SEEDS = range(3)
# Samples that curvature is measured on, and layers, for each network; grey values in [0, 1], not centred.
MEASURED = {
    "mlp": (600, ("fc1", "fc2", "fc3")),
    "lenet5": (300, ("conv1", "conv2", "fc2", "fc3")),
    "vgg": (200, ("conv1", "conv3", "fc1", "fc2")),
    "resnet": (200, ("conv1", "block2.conv1", "fc1")),
}
# The residual network is a shallow and narrow one; the others are as hesscope.models makes them.
ARGUMENTS = {"resnet": {"depth": 8, "width": 8}, "vgg": {"width": 8}}

network = sys.argv[1] if len(sys.argv) > 1 else "mlp"
samples, layers = MEASURED[network]
raw = {"standardize": False}
data = training_data(network, "digits", data_arguments=raw)
norms = (None, "batch", "layer") if network == "mlp" else (None, "batch")

for normalization in norms:
    print(f"{network}, normalization: {normalization or 'none'}")
    objectives = []
    for seed in SEEDS:
        arguments = ARGUMENTS.get(network, {})
        epochs = 20 if network == "mlp" else 5
        model = trained(network, "digits", seed, epochs, normalization=normalization, data_arguments=raw, **arguments)
        batch = data.inputs[:samples], data.labels[:samples]
        objectives.append(hs.Objective(model, "cross_entropy", batch))
    for layer in layers:
        factors = [hs.layerwise.kronecker_factors(objective, layer) for objective in objectives]
        structures = [
            hs.layerwise.layer_eigenstructure(objective, layer, k=2 * found.shape[0], factors=found)
            for objective, found in zip(objectives, factors, strict=True)
        ]
        low_ranks = [hs.layerwise.layer_low_rank(*pair) for pair in zip(structures, factors, strict=True)]
        shared = hs.layerwise.shared_eigenspaces(structures).at_width
        print(
            f"  {layer:<13} error {np.mean([found.relative_error for found in factors]):.2f}"
            f" (best {np.mean([found.best_relative_error for found in factors]):.2f}),"
            f" lambda1/lambda2 of E[xx^T] {np.mean([found.input_ratio for found in low_ranks]):.1f},"
            f" cos^2 with E[x] {np.mean([found.input_alignment for found in low_ranks]):.2f},"
            f" rank one {np.median([found.shares[:9, 0] for found in low_ranks]):.2f},"
            f" overlap at k = width {shared.mean:.3f} +- {shared.stderr:.3f} ="
            f" {shared.ratio:.1f} x chance (predicted {shared.predicted:.3f})"
        )
