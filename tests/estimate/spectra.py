"""Matrices with the spectra that Hessians have, small enough for a dense truth, and replicates of estimates of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

SIZE = 300


def _rotated(eigenvalues, seed=0):
    Q = np.linalg.qr(np.random.default_rng(seed).standard_normal((SIZE, SIZE)))[0]
    A = (Q * eigenvalues) @ Q.T
    return (A + A.T) / 2


def _bulk():
    return np.random.default_rng(1).standard_normal(SIZE)


def outliers():
    """Ten large eigenvalues over a positive bulk that holds a quarter of the trace."""
    eigenvalues = 0.05 * _bulk() ** 2
    eigenvalues[:10] = np.linspace(1, 8, 10)
    return _rotated(eigenvalues)


def indefinite():
    """Outliers of both signs and a bulk around zero."""
    eigenvalues = 0.05 * _bulk()
    eigenvalues[:8], eigenvalues[8:12] = np.linspace(1, 8, 8), -1
    return _rotated(eigenvalues)


def flat():
    return _rotated(1 + 0.1 * _bulk())


def power_law():
    return _rotated(1 / np.arange(1, SIZE + 1))


def low_rank():
    eigenvalues = np.zeros(SIZE)
    eigenvalues[:20] = np.linspace(1, 2, 20)
    return _rotated(eigenvalues)


def traceless():
    """Trace zero up to rounding, next to a norm of 17."""
    bulk = _bulk()
    return _rotated(bulk - bulk.mean())


def not_symmetric():
    return flat() + np.random.default_rng(2).standard_normal((SIZE, SIZE)) / 60


MATRICES = {f.__name__: f for f in (outliers, indefinite, flat, power_law, low_rank, traceless, not_symmetric)}

_CACHE = {}


def matrix(name):
    if name not in _CACHE:
        _CACHE[name] = MATRICES[name]()
    return _CACHE[name]


@dataclass(frozen=True)
class Replicates:
    """Estimates from seeds 0, 1, 2, ..."""

    estimates: list

    def of(self, attribute):
        return np.array([getattr(e, attribute) for e in self.estimates])

    def coverage(self, truth):
        """Share of the 95 % intervals that hold the truth, computed here from value, error and degrees of freedom."""
        quantile = stdtrit(self.of("degrees"), 0.975)
        distance = np.abs(self.of("value") - truth)
        return np.mean(distance <= (quantile * self.of("stderr").T).T, axis=0)


_REPLICATES = {}


def replicates(function, name, count, **options):
    key = (function.__name__, name, count, tuple(sorted(options.items())))
    if key not in _REPLICATES:
        _REPLICATES[key] = Replicates([function(matrix(name), seed=seed, **options) for seed in range(count)])
    return _REPLICATES[key]
