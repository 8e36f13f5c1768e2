"""Block energies of the Hessian and of its Gauss-Newton and residual parts, side by side (MATH.md, sections 1 to 3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from hesscope.core.checks import require_choice
from hesscope.core.errors import InputError
from hesscope.estimate.block_energies import (
    METHODS,
    Array,
    Progress,
    block_energies,
    energies_of_columns,
    energies_of_strips,
    energies_provenance,
    probe_samples,
    require_tolerance,
    settle_method,
    with_difference,
)
from hesscope.estimate.energies import BlockEnergies, SplitEnergies
from hesscope.objective import Objective
from hesscope.objective.losses import OutputLoss
from hesscope.operators import GaussNewton, Hessian, Operator
from hesscope.partition.partition import Partition


def split_energies(
    objective: Objective,
    partition: Partition,
    method: str = "auto",
    probes: int | None = None,
    rtol: float = 0.05,
    max_products: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> SplitEnergies:
    """Squared Frobenius norms of all B x B blocks of H, G and R = H - G; of H alone if the loss is a callable.

    In closed form the expensive part is made once: of every strip G, then R by its own formula, then their sum. So R,
    which training erases (arXiv:2505.02809; MATH.md, section 2), is known to its own precision, however small beside G.
    G itself is as precise as p (1 - p) is: it loses digits where predictions are certain to ten of them.

    Args:
        objective: the function of the parameters.
        partition: B blocks of its P parameters.
        method: "closed_form", "exact", "probes" or "auto", as for block_energies. "exact" takes P products with H and
            with G each, and R as the difference. A fixed number of probes multiplies H and G with the same vectors,
            so that their differences are those of R; to a tolerance, every part is sampled on its own.
        probes, rtol, max_products, seed: as for block_energies, for every part.
        progress: called with (products done, products in all): of H and of G at once, or of one part after another if
            sampled to a tolerance; for the closed form, with rows of the matrices.

    Returns:
        Parts "H", "G" and "R", each with the `products` of its own operator. Those of R with H and G are not made again
        for "exact" and for a fixed number of probes.

    Raises:
        InputError: an objective that is none, or what block_energies refuses.
        PartitionError, TooLargeError, DataError: as for block_energies.
    """
    if not isinstance(objective, Objective):
        raise InputError(f"objective must be a hesscope.Objective, got {type(objective).__name__}")
    H = Hessian(objective)
    if not isinstance(objective.loss, OutputLoss):
        return SplitEnergies({"H": block_energies(H, partition, method, probes, rtol, max_products, seed, progress)})
    G = GaussNewton(objective)
    operators = {"H": H, "G": G, "R": H - G}
    partition.require_fits(objective.parameters.size)
    require_choice("method", method, METHODS)
    require_tolerance(len(partition), probes, rtol, max_products)
    settled = settle_method(operators["R"], len(partition), method, probes)
    if settled.name == "probes" and probes is None:
        return _to_tolerance(operators, partition, rtol, max_products, seed, progress)
    provenances = {part: energies_provenance(operator, settled, seed) for part, operator in operators.items()}
    named = (partition.labels, partition.sizes)
    if settled.name == "probes":
        found = dict(
            zip(operators, probe_samples((H, G), partition, seed, range(settled.probes), progress), strict=True)
        )
        sampled = {part: BlockEnergies.from_samples(*named, found[part], provenances[part]) for part in operators}
        return SplitEnergies({part: replace(each, products=settled.products) for part, each in sampled.items()})
    energies_of = _energies_of_closed_forms if settled.name == "closed_form" else _energies_of_columns
    totals = energies_of(operators, partition, progress)
    exact = {part: BlockEnergies.exact(*named, totals[part], provenances[part]) for part in operators}
    message = settled.name.replace("_", " ")
    return SplitEnergies(
        {part: replace(each, products=settled.products, message=message) for part, each in exact.items()}
    )


def _energies_of_closed_forms(
    operators: Mapping[str, Operator], partition: Partition, progress: Progress | None
) -> dict[str, Array]:
    """Energies [B, B] by part, strip by strip: G, R, and G + R."""
    G, R, H = energies_of_strips((operators["G"], operators["R"]), partition, progress)
    return {"H": H, "G": G, "R": R}


def _energies_of_columns(
    operators: Mapping[str, Operator], partition: Partition, progress: Progress | None
) -> dict[str, Array]:
    """Energies [B, B] by part from all columns of H and G, and their differences."""
    H, G = operators["H"], operators["G"]
    totals = {part: np.zeros((len(partition), len(partition))) for part in operators}
    size, step = H.shape[1], min(H.columns_per_pass, G.columns_per_pass)
    for start in range(0, size, step):
        chunk = slice(start, min(start + step, size))
        columns = with_difference([H.columns(chunk), G.columns(chunk)])
        for part, each in zip(totals, columns, strict=True):
            totals[part] += energies_of_columns(each, partition, chunk)
        if progress is not None:
            progress(chunk.stop, size)
    return totals


def _to_tolerance(
    operators: Mapping[str, Operator],
    partition: Partition,
    rtol: float,
    max_products: int | None,
    seed: int,
    progress: Progress | None,
) -> SplitEnergies:
    """Every part on its own; one that is left is expected to take as many products as the one that is measured."""
    parts: dict[str, BlockEnergies] = {}
    for number, (part, operator) in enumerate(operators.items()):
        spent, left = sum(each.products for each in parts.values()), len(operators) - number

        def told(done: int, planned: int, spent: int = spent, left: int = left) -> None:
            if progress is not None:
                progress(spent + done, spent + planned * left)

        parts[part] = block_energies(operator, partition, "probes", None, rtol, max_products, seed, told)
    return SplitEnergies(parts)
