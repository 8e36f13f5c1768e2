"""The whole Hessian of a small network, made once for all measures of a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from hesscope.core.records import Provenance
from hesscope.estimate.block_energies import Method, block_energies, energies_provenance
from hesscope.estimate.energies import SplitEnergies
from hesscope.objective.losses import OutputLoss
from hesscope.operators import GaussNewton, Hessian, Operator
from hesscope.operators.bridges import Dense
from hesscope.partition import Partition

# Up to this many parameters: in closed form the matrix takes as long as a few dozen products; 128 MiB in float64.
DENSE_SIZE = 4096


@dataclass(frozen=True)
class KnownHessian(Dense):
    """A dense Hessian, with what records say of its making."""

    engine: str
    data_fingerprint: str


@dataclass(frozen=True, eq=False)
class Whole:
    """H as an operator; and H alone, or with G and R if the loss has them, [P, P] each, with how energies were made."""

    hessian: KnownHessian
    matrices: Mapping[str, Tensor]
    provenances: Mapping[str, Provenance]

    def energies(self, partition: Partition) -> SplitEnergies:
        """Energies of all blocks of all matrices."""
        operators = {part: Dense(matrix, symmetric=True) for part, matrix in self.matrices.items()}
        found = {part: block_energies(operator, partition, "exact") for part, operator in operators.items()}
        return SplitEnergies({part: replace(each, provenance=self.provenances[part]) for part, each in found.items()})


def whole(H: Hessian, split: bool) -> Whole:
    """H; with `split` also G and R, if the loss is no callable: in closed form where there is one, else by products."""
    objective = H.objective
    closed = H.has_closed_form
    operators: dict[str, Operator] = {"H": H}
    if split and isinstance(objective.loss, OutputLoss):
        G = GaussNewton(objective)
        operators |= {"G": G, "R": H - G}
    method = Method("closed_form" if closed else "exact", 0, 0)
    provenances = {part: energies_provenance(each, method, seed=0) for part, each in operators.items()}
    matrices = {part: each.dense() for part, each in operators.items() if part != ("H" if closed else "R")}
    if not matrices:
        matrices = {"H": H.dense()}
    elif closed:  # R is cheap then, and known to its own precision
        matrices = {"H": matrices["G"] + matrices["R"], **matrices}
    elif "G" in matrices:
        matrices["R"] = matrices["H"] - matrices["G"]
    return Whole(KnownHessian(matrices["H"], True, H.dense_engine, H.data_fingerprint), matrices, provenances)
