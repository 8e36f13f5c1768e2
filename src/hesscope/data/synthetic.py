"""The two synthetic data sets of [D] (arXiv:2505.02809): Gaussian inputs with uniform labels, and clustered data."""

from __future__ import annotations

import torch

from hesscope.core.checks import require_positive_int
from hesscope.core.rng import normal, stream
from hesscope.data.labelled import LabelledData


def gaussian(N: int, d: int, C: int, seed: int = 0, dtype: torch.dtype | None = None) -> LabelledData:
    """Inputs x ~ N(0, I_d), labels uniform on the C classes and independent of x."""
    _require_sizes(N, d, C)
    inputs = normal((N, d), stream(seed, "gaussian", "inputs"))
    labels = torch.from_numpy(stream(seed, "gaussian", "labels").integers(0, C, N))
    return LabelledData(f"Gaussian inputs, {C} classes", inputs.to(dtype or torch.get_default_dtype()), labels, C)


def clusters(
    N: int, d: int, C: int, noise: float = 0.05, seed: int = 0, dtype: torch.dtype | None = None
) -> LabelledData:
    """Inputs x = class centre + noise * N(0, I_d); the C centres are uniform on the unit sphere, labels uniform."""
    _require_sizes(N, d, C)
    centres = normal((C, d), stream(seed, "clusters", "centres"))
    centres /= centres.norm(dim=1, keepdim=True)
    labels = torch.from_numpy(stream(seed, "clusters", "labels").integers(0, C, N))
    spread = normal((N, d), stream(seed, "clusters", "noise"))
    inputs = centres[labels] + noise * spread
    return LabelledData(f"clustered data, {C} classes", inputs.to(dtype or torch.get_default_dtype()), labels, C)


def _require_sizes(N: int, d: int, C: int) -> None:
    for name, value in (("N", N), ("d", d), ("C", C)):
        require_positive_int(name, value)
