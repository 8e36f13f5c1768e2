"""PacBayesBound: a bound of a trained network's risk, what it was made of, and what its posterior looks like."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from hesscope.bounds import Certificate, Row
from hesscope.core.records import Provenance, require_xarray_kind

if TYPE_CHECKING:
    import xarray as xr

    from hesscope.layerwise.gaussians import Posterior

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Spread:
    """Standard deviations of the posterior along the axes of one group, beside the curvature along them.

    Attributes:
        group: name of the layer, or of the tensor; basis: "kronecker" or "parameters", what the axes are.
        curvature: [k] second derivatives of the loss along the axes, ascending: those that the closed form was made of,
            or with refreshed axes the mean over networks drawn from the posterior; deviation: [k] standard deviations.
            Of groups with more axes than are kept, those at evenly spaced ranks of the curvature.
        axes: how many there are in all; prior_deviation: sqrt of the prior variance, the same along all of them.
    """

    group: str
    basis: str
    curvature: Array = field(repr=False)
    deviation: Array = field(repr=False)
    axes: int
    prior_deviation: float


@dataclass(frozen=True, eq=False)
class PacBayesBound:
    """With probability at least 1 - certificate.delta the risk of networks drawn from the posterior is at most `bound`.

    Attributes:
        certificate: the bound with every ingredient; its groups are the layers, and tensors that belong to none.
        posterior: its kind, such as "kronecker".
        risk: what is bounded, in words, such as "classification error".
        network_risk: that of the trained network itself on the samples: no bound, for comparison.
        prior_risk: that of the network at the prior's mean on the samples. Where it is far below guessing, look whether
            the prior has seen them: that cannot be told from here, and no bound would hold.
        fallback: groups that are diagonal in the parameters though another basis was asked for: name -> why.
        spreads: of every group.
        steps: of optimization done; planned_steps: those that were asked for. Both 0 for closed forms.
        seconds: wall-clock time.
        provenance: how it was made.
        distribution: the posterior itself, to draw networks from; None for a record that was read from a file.
    """

    certificate: Certificate
    posterior: str
    risk: str
    network_risk: float
    prior_risk: float
    fallback: Mapping[str, str]
    spreads: tuple[Spread, ...] = field(repr=False)
    steps: int
    planned_steps: int
    seconds: float
    provenance: Provenance
    distribution: Posterior | None = field(default=None, repr=False)

    @property
    def bound(self) -> float:
        """The bound, of Maurer's form."""
        return self.certificate.bound

    @property
    def empirical_risk(self) -> float:
        """Mean risk on the samples of the networks that were drawn."""
        return self.certificate.empirical_risk

    @property
    def kl(self) -> float:
        """KL(posterior || prior), nats."""
        return self.certificate.kl

    @property
    def finished(self) -> bool:
        """Whether the optimization came to its end; the bound holds either way."""
        return self.steps >= self.planned_steps

    def table(self) -> list[Row]:
        """Every ingredient in the order in which the bound follows from them: (name, value, meaning) rows."""
        return [
            *self.certificate.table(),
            Row("risk, trained network", f"{self.network_risk:.12g}", "on the samples, for comparison"),
            Row(
                "risk, prior's mean", f"{self.prior_risk:.12g}", "on the samples; far below guessing: has it seen them?"
            ),
        ]

    def __str__(self) -> str:
        found = self.certificate
        stopped = "" if self.finished else f", step {self.steps} of {self.planned_steps}"
        return (
            f"{self.bound:.4f} ± {found.bound_stderr:.2g} ({self.posterior}{stopped}) bounds the {self.risk} with "
            f"probability {1 - found.delta:g}; {self.empirical_risk:.4f} on the samples, KL {self.kl:.4g} nats, "
            f"n = {found.n:,}"
        )

    def to_xarray(self) -> xr.Dataset:
        """The certificate, the spreads and the rest, without the distribution; `from_xarray` is the inverse."""
        import xarray as xr

        dataset = self.certificate.to_xarray()
        certified = {f"certificate_{name}": value for name, value in dataset.attrs.items()}
        for number, spread in enumerate(self.spreads):
            axis = f"axis_{number}"
            dataset[f"curvature_{number}"] = xr.DataArray(spread.curvature, dims=axis)
            dataset[f"deviation_{number}"] = xr.DataArray(spread.deviation, dims=axis)
        kept = {each.group: [each.basis, each.axes, each.prior_deviation] for each in self.spreads}
        dataset.attrs = {
            "record": "PacBayesBound",
            **certified,
            **{
                name: getattr(self, name)
                for name in ("posterior", "risk", "network_risk", "prior_risk", "steps", "planned_steps")
            },
            "seconds": self.seconds,
            "fallback": json.dumps(dict(self.fallback)),
            "spreads": json.dumps(kept),
            **self.provenance.attributes(),
        }
        return dataset

    @classmethod
    def from_xarray(cls, dataset: xr.Dataset) -> PacBayesBound:
        """Inverse of `to_xarray`.

        Raises:
            InputError: the data set was not made by `to_xarray`.
        """
        require_xarray_kind(dataset, "PacBayesBound")
        attributes = dataset.attrs
        prefix = "certificate_"
        certified = dataset.copy()
        certified.attrs = {
            name.removeprefix(prefix): attributes[name] for name in attributes if name.startswith(prefix)
        }
        spreads = json.loads(attributes["spreads"])
        return cls(
            certificate=Certificate.from_xarray(certified),
            posterior=str(attributes["posterior"]),
            risk=str(attributes["risk"]),
            network_risk=float(attributes["network_risk"]),
            prior_risk=float(attributes["prior_risk"]),
            fallback=json.loads(attributes["fallback"]),
            spreads=tuple(
                Spread(
                    group,
                    basis,
                    dataset[f"curvature_{number}"].values,
                    dataset[f"deviation_{number}"].values,
                    int(axes),
                    float(prior),
                )
                for number, (group, (basis, axes, prior)) in enumerate(spreads.items())
            ),
            steps=int(attributes["steps"]),
            planned_steps=int(attributes["planned_steps"]),
            seconds=float(attributes["seconds"]),
            provenance=Provenance.from_attributes(attributes),
        )
