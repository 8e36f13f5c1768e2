"""A small convolutional network on handwritten digits: in which partition is its Hessian most block-diagonal?

Run with:  python examples/convolution.py
"""

import torch
from torch import nn

import hesscope as hs

data = hs.data.digits()
images, labels = data.inputs.view(-1, 1, 8, 8)[:100], data.labels[:100]

torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4 * 3 * 3, 10)
)

objective = hs.Objective(model, "cross_entropy", (images, labels))
H = hs.Hessian(objective).dense()  # 418 parameters: small enough to look at as a whole
print(objective)
for name in ("by_tensor", "by_layer", "by_row", "by_column"):
    partition = getattr(hs.Partition, name)(model)
    energies = hs.block_energies(H, partition)
    print(f"{name:<10} {len(partition):>3} blocks: {energies.diagonality:6.1%} of the energy on the diagonal")

eigenvalues = torch.linalg.eigvalsh(H)
print(f"eigenvalues from {eigenvalues[0]:.3g} to {eigenvalues[-1]:.3g}")
