"""A GPT-2 with a real vocabulary, trained for a minute: in which blocks does its curvature lie?

Run with:  python examples/gpt2.py        (a minute; needs transformers; larger models: change the numbers)

Cells are marked with #%% for editors that run them one by one.
"""

# %% A small GPT-2 with a byte-level vocabulary, trained on the source code of Python's standard library
import tempfile
from pathlib import Path

import hesscope as hs

folder = Path(tempfile.mkdtemp()) / "gpt"
trained = hs.models.train_small_gpt(
    folder, layers=2, width=24, heads=2, context=24, vocabulary=400, steps=40, text_bytes=2**18
)
print(f"{trained.parameters:,} parameters, loss {trained.losses[0]:.2f} -> {trained.loss:.2f}")

# %% A folder like this one, or any that save_pretrained has written, becomes an objective in three lines
language_model = hs.models.load_language_model(folder)
batches = language_model.batches(Path(tempfile.__file__).read_text(), contexts=3, length=24)
objective = hs.Objective(language_model.model, "cross_entropy", batches)

# %% Its blocks: units of the network, tensors, attention heads, rows
partitions = {
    "unit": hs.Partition.by_module(language_model.model),
    "tensor": hs.Partition.by_tensor(language_model.model),
    "head": hs.Partition.by_head(language_model.model),
    "row": hs.Partition.by_row(language_model.model),
}
print(partitions["head"].coverage())

# %% What the diagonal blocks keep of the Hessian, beside chance
found = hs.compare_partitions(hs.Hessian(objective), partitions, vector=objective.gradient(), probes=16)
for name, row in found.rows.items():
    print(f"{name:<7}{row.blocks:>6,} blocks: {row.energy} of the energy on the diagonal, chance {row.chance}")
print(hs.choose_partition(found).reason)

# %% All pairs of heads and tensors of the Gauss-Newton matrix, at the price of a few hundred gradients
heads = hs.block_energies(hs.GaussNewton(objective), partitions["head"], method="dual", probes=64)
by_unit = heads.aggregate(partitions["head"].groups("module"))
for label, energy in zip(by_unit.labels, by_unit.values.diagonal() / by_unit.total, strict=True):
    print(f"{label:<24}{energy:6.1%} of the Gauss-Newton matrix's energy")
