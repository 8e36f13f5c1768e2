"""Small training runs that tests track."""

from __future__ import annotations

import torch

import hesscope as hs

DTYPE = torch.float64


class Run:
    """Full-batch training of a one-hidden-layer network; `weights[step]` is what it had before the update of a step."""

    def __init__(self, loss="cross_entropy", activation="relu", d=6, m=4, C=5, N=40, rate=0.05, optimizer="adam"):
        self.data = hs.data.clusters(N, d, C, noise=0.3, dtype=DTYPE)
        self.model = hs.models.one_hidden(d, m, C, activation, dtype=DTYPE)
        self.name, self.batch = loss, self.data.batch(loss)
        self.loss = torch.nn.CrossEntropyLoss() if loss == "cross_entropy" else torch.nn.MSELoss()
        kinds = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}
        self.optimizer = kinds[optimizer](self.model.parameters(), lr=rate)
        self.objective = hs.Objective(self.model, loss, self.batch)
        self.weights = {}

    def train(self, tracker, steps, first=0):
        """The loop of a user, with `tracker` called before every update and after the last one."""
        for step in range(first, steps + 1):
            self.weights[step] = [p.detach().clone() for p in self.model.parameters()]
            tracker(step)
            if step < steps:
                self.update()

    def update(self):
        self.optimizer.zero_grad()
        self.loss(self.model(self.batch[0]), self.batch[1]).backward()
        self.optimizer.step()
