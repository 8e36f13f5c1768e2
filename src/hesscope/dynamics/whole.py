"""The whole Hessian of a small network, made once for all measures of a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from hesscope.core.records import Provenance
from hesscope.estimate.block_energies import Method, block_energies, energies_provenance
from hesscope.estimate.energies import SplitEnergies
from hesscope.objective import Objective
from hesscope.operators import GaussNewton, Hessian
from hesscope.partition import Partition

# Up to this many parameters: the matrix then takes as long as a few dozen products, and 128 MiB in float64.
DENSE_SIZE = 4096

CLOSED_FORM = Method("closed_form", 0, 0)


@dataclass(frozen=True, eq=False)
class Whole:
    """H, G and R, [P, P] each, and how each was made."""

    matrices: Mapping[str, Tensor]
    provenances: Mapping[str, Provenance]

    def energies(self, partition: Partition) -> SplitEnergies:
        """Energies of all blocks of all three."""
        found = {part: block_energies(matrix, partition, "exact") for part, matrix in self.matrices.items()}
        return SplitEnergies(
            {part: replace(each, provenance=self.provenances[part], products=0) for part, each in found.items()}
        )


def whole(objective: Objective) -> Whole | None:
    """The matrices of a network that has a closed form and is small; None for all others."""
    H = Hessian(objective)
    if not H.has_closed_form or objective.parameters.size > DENSE_SIZE:
        return None
    operators = {"H": H, "G": GaussNewton(objective), "R": H - GaussNewton(objective)}
    G, R = operators["G"].dense(), operators["R"].dense()
    provenances = {part: energies_provenance(each, CLOSED_FORM, seed=0) for part, each in operators.items()}
    return Whole({"H": G + R, "G": G, "R": R}, provenances)
