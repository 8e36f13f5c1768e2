"""Small networks whose layer-wise Hessians are known by brute force, sample by sample, without the code under test."""

from __future__ import annotations

import torch
from torch import nn

import hesscope as hs
from tests.helpers import F64, randint, randn, randomized


class Tokens(nn.Module):
    """Sequences [N, T, 5] -> a linear layer at every position, attention-like mixing, mean, linear."""

    def __init__(self, activation=torch.relu):
        super().__init__()
        self.a, self.b, self.activation = nn.Linear(5, 6), nn.Linear(6, 3), activation

    def forward(self, x):
        h = self.activation(self.a(x))
        h = h + 0.3 * h.roll(1, dims=1) * h.mean((1, 2), keepdim=True)
        return self.b(h).mean(1)


class Twice(nn.Module):
    """One layer that is called twice."""

    def __init__(self):
        super().__init__()
        self.shared, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.last(torch.relu(self.shared(torch.relu(self.shared(x)))))


def mlp(activation=nn.ReLU):
    return randomized(
        nn.Sequential(nn.Linear(7, 6), activation(), nn.Linear(6, 5, bias=False), activation(), nn.Linear(5, 4)), 1
    )


def convolutional(activation=nn.ReLU):
    """Strides, padding, dilation, with and without bias, in place."""
    return randomized(
        nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1),
            activation(inplace=True) if activation is nn.ReLU else activation(),
            nn.Conv2d(4, 3, (2, 3), stride=2, dilation=(2, 1), padding="valid", bias=False),
            activation(),
            nn.Flatten(),
            nn.Linear(12, 3),
        ),
        2,
        0.4,
    )


def vectors(samples=40):
    return randn(samples, 7, seed=3), randint(4, samples, seed=4)


def images(samples=12):
    return randn(samples, 2, 6, 6, seed=5), randint(3, samples, seed=6)


def sequences(samples=9):
    return randn(samples, 4, 5, seed=7), randint(3, samples, seed=8)


def objective(model, data, loss="cross_entropy"):
    return hs.Objective(model, loss, data)


def curvature_at_outputs(loss, outputs):
    """A of every sample [N, C, C]."""
    if loss == "mse":
        return (2 / outputs.shape[1]) * torch.eye(outputs.shape[1], dtype=F64).expand(len(outputs), -1, -1)
    p = outputs.softmax(1)
    return torch.diag_embed(p) - p[:, :, None] * p[:, None, :]


def brute_force(model, layer, x, loss="cross_entropy"):
    """Per sample x_t [T, inputs] (with the 1 of a bias) and M[t, o, s, u] = (J^T A J) of the layer's output."""
    module = model.get_submodule(layer)
    found = []
    for sample in x:
        seen = []

        def keep(_, args, made, seen=seen):
            seen.append((args[0].detach().clone(), made.detach().clone()))

        handle = module.register_forward_hook(keep)
        with torch.no_grad():
            outputs = model(sample[None])
        handle.remove()
        ((given, made),) = seen

        def rest(z, sample=sample):
            handle = module.register_forward_hook(lambda *_: z.clone())
            try:
                return model(sample[None])[0]
            finally:
                handle.remove()

        J = torch.autograd.functional.jacobian(rest, made)
        if isinstance(module, nn.Conv2d):
            X = patches(module, given)
            J = J[:, 0].flatten(2).mT  # [C, T, out]
        else:
            X, J = given.reshape(-1, given.shape[-1]), J.reshape(len(J), -1, made.shape[-1])
        if module.bias is not None:
            X = torch.cat([X, torch.ones_like(X[:, :1])], 1)
        found.append((X, torch.einsum("cto,cd,dsu->tosu", J, curvature_at_outputs(loss, outputs)[0], J)))
    return found


def patches(module, image):
    """Patches of a convolution, by loops: [T, channels x kernel]."""
    (kh, kw), (sh, sw), (dh, dw) = module.kernel_size, module.stride, module.dilation
    ph, pw = module.padding if module.padding != "valid" else (0, 0)
    padded = nn.functional.pad(image[0], (pw, pw, ph, ph))
    rows = range(0, padded.shape[1] - dh * (kh - 1), sh)
    columns = range(0, padded.shape[2] - dw * (kw - 1), sw)
    return torch.stack(
        [
            padded[:, r : r + dh * (kh - 1) + 1 : dh, c : c + dw * (kw - 1) + 1 : dw].flatten()
            for r in rows
            for c in columns
        ]
    )


def dense(operator, layer):
    """Any operator's matrix over a layer as [outputs, inputs, outputs, inputs]."""
    half = layer.matricized(operator.dense()).reshape(layer.size, -1)
    return layer.matricized(half).reshape(*layer.shape, *layer.shape)
