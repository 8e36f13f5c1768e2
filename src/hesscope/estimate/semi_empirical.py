"""Semi-empirical laws: a real block's spectrum from its weights and its inputs' covariance, beside the block's own.

A block H_ij = (1/N) sum_n lambda_n x_n x_n^T of a layer is compared with the law of a matrix that has the same weights
and Gaussian inputs of the same covariance, independent of them ([D], arXiv:2505.02809, sets weights free of inputs at
initialization; Paul, Silverstein 2009; MATH.md, section 4.1). How far the two differ says how much the weights of a
trained network on real data know of its inputs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from hesscope.core.memory import require_memory
from hesscope.core.records import Provenance
from hesscope.objective import Objective
from hesscope.operators.closed_form import layer_weights
from hesscope.theory import SpectralLaw, population_spectrum
from hesscope.theory.kolmogorov import kolmogorov_distance

if TYPE_CHECKING:
    import xarray as xr

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class SemiEmpiricalLaw:
    """A block's eigenvalues, and their law for its weights and inputs if these were independent.

    Attributes:
        law: for the weights lambda_n [N] of this block, d/N, and the estimated covariance of the inputs.
        eigenvalues: of the block itself, [d], ascending.
        distance: Kolmogorov distance between the two, 0 to 1.
        provenance: how it was made.
    """

    law: SpectralLaw
    eigenvalues: Array = field(repr=False)
    distance: float
    provenance: Provenance

    def to_xarray(self) -> xr.Dataset:
        """Eigenvalues, weights, and the law's covariance; `SpectralLaw` makes the law of the last two again."""
        import xarray as xr

        covariance = self.law.covariance
        assert isinstance(covariance, tuple)
        return xr.Dataset(
            {
                "eigenvalue": ("index", self.eigenvalues),
                "weight": ("sample", np.asarray(self.law.weights)),
                "covariance_eigenvalue": ("atom", np.asarray(covariance[0])),
                "covariance_probability": ("atom", np.asarray(covariance[1])),
                "kolmogorov_distance": self.distance,
            },
            attrs={"record": "SemiEmpiricalLaw", "gamma": self.law.gamma, **self.provenance.attributes()},
        )


def semi_empirical_law(objective: Objective, layer: str, i: int = 0, j: int | None = None) -> SemiEmpiricalLaw:
    """The law of the block of neurons i and j of a layer, from the network's own weights lambda_n and inputs.

    Args:
        objective: of a fully connected network (see `Hessian.has_closed_form`), trained or not.
        layer: name of a linear layer, such as "fc1"; its inputs count with the constant 1 of a bias.
        i, j: neurons; j = i unless told.

    The covariance is that of the population behind the inputs (`theory.population_spectrum`, uncentred): the sample
    covariance would count the noise of the samples twice. Takes the eigenvalues of two d x d matrices.

    Raises:
        InputError: no closed form for this network, no such layer or neuron; weights that all vanish give the law
            of the zero matrix.
        TooLargeError: a d x d matrix does not fit in memory.

    Source: MATH.md, section 4.1; El Karoui 2008 for the covariance.
    """
    second = i if j is None else j
    drawn = layer_weights(objective, layer, neurons=[i] if second == i else [i, second])
    N, d = drawn.inputs.shape
    require_memory(4 * 8 * d * d, "cpu", f"a {d} x {d} block", "a narrower layer")
    x = drawn.inputs.double()
    weights = drawn.weights[:, 0, -1].double()
    block = x.T @ (weights[:, None] * x) / N
    eigenvalues = torch.linalg.eigvalsh((block + block.T) / 2).cpu().numpy()
    sample = torch.linalg.eigvalsh(x.T @ x / N).clamp_min(0).cpu().numpy()
    if d > N:
        sample[: d - N] = 0.0  # exactly so, but for rounding
    spectrum = population_spectrum(sample, d / N)
    law = SpectralLaw(weights.cpu().numpy(), d / N, covariance=(spectrum.eigenvalues, spectrum.probabilities))
    return SemiEmpiricalLaw(
        law=law,
        eigenvalues=eigenvalues,
        distance=kolmogorov_distance(law, eigenvalues),
        provenance=Provenance(
            engine=f"semi-empirical law of {layer}, neurons {i} and {second}; {drawn.provenance.engine}",
            dtype=drawn.provenance.dtype,
            device=drawn.provenance.device,
            data_fingerprint=drawn.provenance.data_fingerprint,
        ),
    )
