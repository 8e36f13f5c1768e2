"""Risk of the Gibbs classifier, which draws a network from the posterior for every input anew (MATH.md, section 6).

Where the layers' outputs can be drawn in place of their weights (see `reparametrized`), each sample has a network of
its own, so that a pass over n samples is n independent draws. Elsewhere whole networks are drawn, and each counts once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, sqrt
from typing import Any

import torch
from torch import Tensor

from hesscope.core.checks import require_positive_int
from hesscope.core.errors import InputError
from hesscope.core.records import Provenance
from hesscope.core.rng import stream
from hesscope.estimate.estimate import Estimate
from hesscope.layerwise.gaussians import Posterior, generator_of
from hesscope.layerwise.reparametrized import is_local, reparametrized, require_one_each
from hesscope.layerwise.risk import CHUNK, Risk, in_chunks, outputs_of_samples, require_risk
from hesscope.objective import Objective
from hesscope.objective.pieces import chosen, count_samples

# Draws unless told: of samples with a network of their own, and of whole networks.
LOCAL_DRAWS, NETWORK_DRAWS = 100_000, 300

# Whole networks that are drawn at once.
TOGETHER = 8


@dataclass(frozen=True)
class DrawnRisk:
    """Mean of so many independent draws in [0, 1], and its standard error (nan from one draw)."""

    mean: float
    draws: int
    stderr: float


def draw_risk(
    objective: Objective,
    posterior: Posterior,
    risk: Risk,
    draws: int,
    local: bool,
    seed: int,
    *path: str | int,
    share: float = 1.0,
) -> DrawnRisk:
    """Mean risk on the data of networks drawn from the posterior.

    Args:
        draws: how many at least; a multiple of the number of samples if local.
        local: whether samples have networks of their own (`is_local`).
        seed, path: of the random stream.
        share: of the samples, drawn at random, that are looked at; for choosing among posteriors only.
    """
    generator = generator_of(stream(seed, "gibbs", *path), objective.parameters.device)
    if local:
        return _by_samples(objective, posterior, risk, draws, generator, share)
    return _by_networks(objective, posterior, risk, draws, generator, share)


def stochastic_risk(
    objective: Objective,
    distribution: Posterior,
    draws: int | None = None,
    seed: int = 0,
    loss_bound: float | None = None,
) -> Estimate:
    """Mean risk, on the objective's data, of networks drawn from a posterior; the data may be held out.

    The standard error is that of the draws. Of m held-out samples the data has an error of its own, sqrt(r (1 - r) / m)
    at most.

    Args:
        objective: of the same network with any data.
        distribution: of a PacBayesBound.
        draws: 100,000 of samples' own networks, or 300 whole networks, unless told.
        seed: of the draws.
        loss_bound: as of `hesscope.pac_bayes_bound`.

    Raises:
        InputError: as of `hesscope.pac_bayes_bound`; a distribution that is none, or of another network's parameters.
        DataError: samples without exactly one label each.
    """
    risk = require_risk(objective, loss_bound)
    if not isinstance(distribution, Posterior):
        raise InputError(
            "distribution must be that of a PacBayesBound (bound.distribution; files do not hold it), got "
            f"{type(distribution).__name__}"
        )
    own, other = objective.parameters, distribution.space
    if (own.names, own.shapes, own.dtype) != (other.names, other.shapes, other.dtype):
        raise InputError(
            f"distribution is of {other.size} parameters ({str(other.dtype).removeprefix('torch.')}) with other names, "
            f"shapes or dtype than the objective's {own.size} ({str(own.dtype).removeprefix('torch.')})"
        )
    local = is_local(objective, distribution)
    if draws is not None:
        require_positive_int("draws", draws)
    found = draw_risk(objective, distribution, risk, draws or default_draws(local), local, seed, "stochastic risk")
    space = objective.parameters
    made = Provenance(
        engine=engine(local),
        dtype=str(space.dtype).removeprefix("torch."),
        device=str(space.device),
        data_fingerprint=objective.data_fingerprint,
        seed=seed,
    )
    return Estimate(
        found.mean, found.stderr, None, None, found.draws - 1, found.draws, 0, True, f"{found.draws:,} draws", made
    )


def default_draws(local: bool) -> int:
    """Draws unless told."""
    return LOCAL_DRAWS if local else NETWORK_DRAWS


def engine(local: bool) -> str:
    """How networks are drawn, in words."""
    return "a network for every sample (local reparametrization)" if local else "whole networks"


def _by_samples(
    objective: Objective, posterior: Posterior, risk: Risk, draws: int, generator: torch.Generator, share: float
) -> DrawnRisk:
    prior = posterior.prior_mean()
    total, squares, done, samples = 0.0, 0.0, 0, 0
    while done < draws:  # whole passes: every sample counts equally
        # After the first pass samples that are few go through several times at once.
        times = min(CHUNK // samples, ceil((draws - done) / samples)) if 0 < samples < CHUNK else 1
        with objective.evaluating() as (_, batches), torch.no_grad():
            for index, batch in _some(in_chunks(objective, batches), share, generator):
                batch = chosen(batch, torch.arange(count_samples(batch)).repeat(times)) if times > 1 else batch
                with reparametrized(objective, posterior.groups, generator) as drawn:
                    outputs, targets = outputs_of_samples(objective, prior, batch, index)
                require_one_each(drawn, len(posterior.groups), len(outputs), index)
                risks = risk.of(objective, outputs, targets).double()
                total, squares = total + float(risks.sum()), squares + float(risks.square().sum())
                done += len(risks)
        samples = samples or done
    mean = min(total / done, 1.0)
    # Draws at different samples have different means: this is not below the standard error.
    return DrawnRisk(mean, done, sqrt(max(squares / done - mean**2, 0.0) / done) if done > 1 else float("nan"))


def _by_networks(
    objective: Objective, posterior: Posterior, risk: Risk, draws: int, generator: torch.Generator, share: float
) -> DrawnRisk:
    risks: list[float] = []
    while len(risks) < draws:
        thetas = torch.stack([posterior.draw(generator) for _ in range(min(TOGETHER, draws - len(risks)))])
        totals, samples = torch.zeros(len(thetas), dtype=torch.float64), 0
        with objective.evaluating() as (_, batches), torch.no_grad():
            for index, batch in _some(in_chunks(objective, batches, len(thetas)), share, generator):
                outputs, targets = _outputs_of_several(objective, thetas, batch, index)
                totals += torch.stack([risk.of(objective, each, targets).double().sum().cpu() for each in outputs])
                samples += len(outputs[0])
        risks += (totals / samples).clamp(max=1.0).tolist()
    found = torch.tensor(risks, dtype=torch.float64)
    return DrawnRisk(float(found.mean()), draws, float(found.std() / sqrt(draws)) if draws > 1 else float("nan"))


def _some(batches: Iterator[tuple[int, Any]], share: float, generator: torch.Generator) -> Iterator[tuple[int, Any]]:
    """A share of the samples of every batch, at least one of each."""
    for index, batch in batches:
        if share < 1:
            count = count_samples(batch)
            order = torch.randperm(count, generator=generator, device=generator.device)
            batch = chosen(batch, order[: max(1, round(share * count))])
        yield index, batch


def _outputs_of_several(objective: Objective, thetas: Tensor, batch: Any, index: int) -> tuple[Tensor, Tensor]:
    """Outputs [K, ...] of networks [K, P] on one batch, and the targets."""
    found: list[Tensor] = []

    def outputs(theta: Tensor) -> Tensor:
        made, targets = outputs_of_samples(objective, theta, batch, index)
        found.append(targets)
        return made

    try:
        return torch.func.vmap(outputs)(thetas), found[-1]
    except Exception:  # control flow that depends on values, in-place writes, ...: what vmap cannot do, a loop can
        return torch.stack([outputs(theta) for theta in thetas]), found[-1]
