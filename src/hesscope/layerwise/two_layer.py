"""The two-layer theorem of [W]: top eigenvectors of a random network's output Hessian lie in the row space of W2.

For o = W2 s(W1 x), p = softmax(o) and z = W1 x, the output Hessian of the hidden layer is M = D W2^T A W2 D with
D = diag(s'(z)) and A = diag(p) - p p^T; see MATH.md, section 5, and arXiv:2010.04261. Measured here without autodiff,
network by network, beside what hesscope.layerwise.two_layer_prediction derives for that network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hesscope.core.checks import require_choice, require_positive_int
from hesscope.core.errors import DataError, InputError
from hesscope.core.records import Provenance, require_xarray_kind
from hesscope.core.rng import normal, stream
from hesscope.estimate.exponent import ExponentFit, fit_exponent
from hesscope.layerwise.outlier_counts import largest_gap
from hesscope.layerwise.two_layer_prediction import predict_output_hessian
from hesscope.theory.activations import ACTIVATIONS

if TYPE_CHECKING:
    import xarray as xr

Array = npt.NDArray[np.float64]
Progress = Callable[[int, int], None]

# Entries of a tile of roots, [samples, C, m].
TILE = 2**22
# Samples per neuron by default: their noise is then a few percent of what 1 - overlap is for ReLU.
SAMPLES_PER_NEURON = 128

MEASURED = ("overlap", "eigenvalues", "dominant")
PREDICTED = ("predicted_overlap", "predicted_eigenvalues", "first_order", "sampling")
QUANTITIES = ("overlap", "predicted_overlap", "ratio", "predicted_ratio", "dominant", "first_order", "sampling")


def two_layer_output_hessian(
    hidden_weight: Tensor, output_weight: Tensor, inputs: Tensor, activation: str = "relu"
) -> Tensor:
    """Mean output Hessian of the hidden layer of o = W2 s(W1 x) under cross-entropy: mean_n D_n W2^T A_n W2 D_n.

    Matrix products over tiles of samples, in float64 on the CPU: A = S S^T with rows sqrt(p_c) (w_c - W2^T p), so that
    a tile adds the product of its C roots a sample, [samples * C, m], with themselves. Cost: N C m^2. It is what
    kronecker_factors gives for the hidden layer; for ReLU it is also the Hessian in z, whose part s'' (W2^T e) is zero.

    Args:
        hidden_weight: W1, [m, d]; output_weight: W2, [C, m]; inputs: x, [N, d].
        activation: s: "relu", "tanh" or "gelu".

    Returns:
        [m, m], float64.

    Raises:
        InputError: shapes that do not fit, an unknown activation. DataError: nan or infinite weights or inputs.
    """
    require_choice("activation", activation, ACTIVATIONS)
    named = {"hidden_weight": hidden_weight, "output_weight": output_weight, "inputs": inputs}
    for name, tensor in named.items():
        if tensor.ndim != 2 or not tensor.numel():
            raise InputError(f"{name} must be a matrix, got shape {tuple(tensor.shape)}")
        if not bool(torch.isfinite(tensor).all()):
            raise DataError(f"{name} must be finite, but has an entry that is nan or infinite")
    W1, W2, x = (tensor.detach().cpu().double() for tensor in named.values())
    (m, d), C = W1.shape, len(W2)
    if W2.shape[1] != m or x.shape[1] != d:
        raise InputError(
            f"a hidden_weight of shape {(m, d)} needs an output_weight with {m} columns and inputs with {d}, got "
            f"{tuple(W2.shape)} and {tuple(x.shape)}"
        )
    total = torch.zeros(m, m, dtype=torch.float64)
    for tile in torch.split(x, max(1, TILE // (C * m))):
        value, slope, _ = ACTIVATIONS[activation].derivatives((tile @ W1.T).numpy())
        p = torch.softmax(torch.from_numpy(value) @ W2.T, dim=1)
        roots = (W2 - (p @ W2)[:, None]).mul_(p.sqrt()[:, :, None]).mul_(torch.from_numpy(slope)[:, None])
        roots = roots.flatten(0, 1)
        total.addmm_(roots.T, roots)
    return total / len(x)


@dataclass(frozen=True, eq=False)
class TwoLayerTheorem:
    """The theorem measured on K widths with S networks each, beside what is predicted for the same networks.

    Attributes:
        widths, inputs, samples: m, d and N, [K].
        classes: C; activation: s.
        overlap: of the top C - 1 eigenvectors U of the measured E[M] with S*, the row space of W2 without the direction
            W2^T 1, ||S*^T U||_F^2 / (C - 1), [K, S].
        eigenvalues: the 2 C largest of E[M], descending, [K, S, 2 C].
        dominant: how many of them dominate: the k <= m / 2 with the largest ratio of eigenvalues k and k + 1, [K, S].
        predicted_overlap, predicted_eigenvalues: of the predicted E[M]; the overlap less `sampling`.
        sampling: predicted part of 1 - overlap that is due to N samples in place of the expectation, [K, S].
        first_order: predicted leading term c / m of 1 - overlap, c constant as m -> infinity at fixed d/m, [K, S].
    """

    widths: npt.NDArray[np.int64]
    inputs: npt.NDArray[np.int64]
    samples: npt.NDArray[np.int64]
    classes: int
    activation: str
    overlap: Array
    eigenvalues: Array
    dominant: npt.NDArray[np.int64]
    predicted_overlap: Array
    predicted_eigenvalues: Array
    sampling: Array
    first_order: Array
    provenance: Provenance

    @property
    def ratio(self) -> Array:
        """Eigenvalue C - 1 over eigenvalue C of the measured E[M], [K, S]."""
        ratio: Array = self.eigenvalues[..., self.classes - 2] / self.eigenvalues[..., self.classes - 1]
        return ratio

    @property
    def predicted_ratio(self) -> Array:
        """The same of the predicted E[M], [K, S]."""
        values = self.predicted_eigenvalues
        ratio: Array = values[..., self.classes - 2] / values[..., self.classes - 1]
        return ratio

    def mean(self, quantity: str) -> Array:
        """Mean over networks, [K], of one of "overlap", "predicted_overlap", "ratio", "predicted_ratio", "dominant",
        "first_order" and "sampling".

        Raises:
            InputError: another name.
        """
        require_choice("quantity", quantity, QUANTITIES)
        mean: Array = np.asarray(getattr(self, quantity), dtype=np.float64).mean(axis=1)
        return mean

    def stderr(self, quantity: str) -> Array:
        """Standard error of `mean`, over networks, [K]."""
        require_choice("quantity", quantity, QUANTITIES)
        values = np.asarray(getattr(self, quantity), dtype=np.float64)
        error: Array = values.std(axis=1, ddof=1) / np.sqrt(values.shape[1])
        return error

    def rate(self, predicted: bool = False) -> ExponentFit:
        """Exponent b of 1 - overlap = k m^b at these widths, measured or predicted; -1 is the limit if d grows as m.

        Raises:
            InputError: a single width.
        """
        lacking = 1 - (self.predicted_overlap if predicted else self.overlap)
        return fit_exponent(self.widths, lacking, np.ones_like(lacking))

    def to_xarray(self) -> xr.Dataset:
        """Data set over width, network and order (1 for the largest eigenvalue); `from_xarray` reads it back.

        With mean and standard error over networks of what a figure shows.
        """
        import xarray as xr

        variables: dict[str, tuple[str | tuple[str, ...], npt.NDArray[np.generic]]] = {
            "inputs": ("width", self.inputs),
            "samples": ("width", self.samples),
        }
        for name in (*MEASURED, *PREDICTED):
            values = getattr(self, name)
            variables[name] = (("width", "network", "order")[: values.ndim], values)
        for name in QUANTITIES:
            variables[f"{name}_mean"] = ("width", self.mean(name))
            variables[f"{name}_stderr"] = ("width", self.stderr(name))
        return xr.Dataset(
            variables,
            coords={"width": self.widths, "order": np.arange(1, self.eigenvalues.shape[2] + 1)},
            attrs={
                "record": "TwoLayerTheorem",
                "classes": self.classes,
                "activation": self.activation,
                **self.provenance.attributes(),
            },
        )

    @classmethod
    def from_xarray(cls, dataset: xr.Dataset) -> TwoLayerTheorem:
        """Inverse of `to_xarray`."""
        require_xarray_kind(dataset, "TwoLayerTheorem")
        names = ("inputs", "samples", *MEASURED, *PREDICTED)
        return cls(
            widths=dataset["width"].to_numpy(),
            classes=int(dataset.attrs["classes"]),
            activation=str(dataset.attrs["activation"]),
            provenance=Provenance.from_attributes(dataset.attrs),
            **{name: dataset[name].to_numpy() for name in names},
        )


def two_layer_theorem(
    widths: Sequence[int],
    classes: int = 10,
    inputs: int | None = None,
    samples: int | None = None,
    networks: int = 5,
    activation: str = "relu",
    seed: int = 0,
    progress: Progress | None = None,
) -> TwoLayerTheorem:
    """Measure the two-layer theorem against width, on random networks o = W2 s(W1 x), beside its prediction.

    W1 ~ N(0, 1/d), W2 ~ N(0, 1/m), x ~ N(0, I_d), cross-entropy. The limit: the overlap tends to 1 as m -> infinity
    and d -> infinity, C fixed. For ReLU 1 - overlap is of size 1/m + 1/d: at fixed d it stops falling. For an odd
    activation (tanh) the term 1/m vanishes, 1/m^2 remains, and 1/d. The ratio of eigenvalues C - 1 and C grows as
    m / log m: the bulk ends at about the largest Var(s') w_i^T E[A] w_i.

    The prediction is first order in the dependence between neurons and outputs, at the finite width of every network
    (derivation: hesscope.layerwise.two_layer_prediction). An average over N samples adds a term of size 1/N to
    1 - overlap; the prediction contains it, and `sampling` says how much it is.

    Cost of a network: N C m^2 multiply-adds and two eigendecompositions of size m.

    Args:
        widths: m, each at least 2 * classes.
        classes: C, at least 2.
        inputs: d; None: d = m for every width.
        samples: N; None: 128 m for every width. At least m.
        networks: S, at least 2.
        activation: s: "relu", "tanh" or "gelu".
        seed: root of the random streams.
        progress: called with the networks done and planned.

    Raises:
        InputError: no widths, an argument out of its range.
    """
    _require_fits(widths, classes, inputs, samples, networks, activation)
    found: dict[str, list[Array]] = {name: [] for name in (*MEASURED, *PREDICTED)}
    for m in widths:
        for network in range(networks):
            N = samples or SAMPLES_PER_NEURON * m
            results = _one_network(m, classes, inputs or m, N, activation, (seed, m, network))
            for name, value in results.items():
                found[name].append(np.asarray(value))
            if progress is not None:
                progress(len(found["overlap"]), len(widths) * networks)
    K = len(widths)
    gathered: dict[str, Any] = {
        name: np.stack(values).reshape(K, networks, *values[0].shape) for name, values in found.items()
    }
    return TwoLayerTheorem(
        widths=np.asarray(widths, dtype=np.int64),
        inputs=np.asarray([inputs or m for m in widths], dtype=np.int64),
        samples=np.asarray([samples or SAMPLES_PER_NEURON * m for m in widths], dtype=np.int64),
        classes=classes,
        activation=activation,
        provenance=Provenance(engine="two_layer_output_hessian", dtype="float64", device="cpu", seed=seed),
        **gathered,
    )


def _one_network(
    m: int, C: int, d: int, N: int, activation: str, root: tuple[int, int, int]
) -> dict[str, Array | float | int]:
    """What is measured and predicted for the network numbered root[2] of its width."""
    seed, *path = root
    W1 = normal((m, d), stream(seed, "two_layer_theorem", "W1", *path)) / d**0.5
    W2 = normal((C, m), stream(seed, "two_layer_theorem", "W2", *path)) / m**0.5
    generator = stream(seed, "two_layer_theorem", "inputs", *path)
    total = torch.zeros(m, m, dtype=torch.float64)
    step = max(1, TILE // max(d, C * m))
    for start in range(0, N, step):
        x = normal((min(step, N - start), d), generator)
        total += len(x) * two_layer_output_hessian(W1, W2, x, activation)
    predicted = predict_output_hessian(W1.numpy(), W2.numpy(), activation, seed)
    values, overlap = _top(total.numpy() / N, W2.numpy())
    predicted_values, predicted_overlap = _top(predicted.matrix, W2.numpy())
    upper = values[: m // 2 + 1]
    return {
        "overlap": overlap,
        "eigenvalues": values[: 2 * C],
        "dominant": largest_gap(upper, rounding=float(np.finfo(np.float64).eps * values[0])).count,
        "predicted_overlap": predicted_overlap - predicted.sampling / N,
        "predicted_eigenvalues": predicted_values[: 2 * C],
        "first_order": predicted.first_order / m,
        "sampling": predicted.sampling / N,
    }


def _top(matrix: Array, output_weight: Array) -> tuple[Array, float]:
    """Eigenvalues [m], descending, and the overlap of the top C - 1 eigenvectors with S*."""
    k = len(output_weight) - 1
    values, vectors = np.linalg.eigh(matrix)
    # W2 with the mean over classes taken out of its columns: rows spanning S*, all but W2^T 1.
    rows = np.linalg.svd(output_weight - output_weight.mean(axis=0), full_matrices=False)[2][:k]
    return values[::-1], float(((rows @ vectors[:, -k:]) ** 2).sum() / k)


def _require_fits(
    widths: Sequence[int], classes: int, inputs: int | None, samples: int | None, networks: int, activation: str
) -> None:
    """Raise InputError for arguments out of their ranges."""
    require_choice("activation", activation, ACTIVATIONS)
    for name, value, least in (("classes", classes, 2), ("networks", networks, 2)):
        require_positive_int(name, value)
        if value < least:
            raise InputError(f"{name} must be at least {least}, got {value}")
    if not len(widths):
        raise InputError("widths must name at least one width, got none")
    for m in widths:
        require_positive_int("each width", m)
        if m < 2 * classes:
            raise InputError(f"each width must be at least 2 * classes = {2 * classes}, got {m}")
        if samples is not None:
            require_positive_int("samples", samples)
            if samples < m:
                raise InputError(f"samples must be at least the width {m}, got {samples}")
    if inputs is not None:
        require_positive_int("inputs", inputs)
