"""Predictions of the static force for lists of C, gamma and m: tables and curves without any network."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hesscope._version import __version__
from hesscope.core.checks import require_choice
from hesscope.core.errors import InputError
from hesscope.study.steps import Progress, Reporter, Step, run_steps
from hesscope.study.store import Store
from hesscope.theory import block_laws, static_force
from hesscope.theory.ensemble import LOSSES, MODELS, describe

if TYPE_CHECKING:
    import xarray as xr

RESULT = "theory"
# Results of steps that the final one puts together begin with this.
PARTS = "point-"
# Points at which the density of a law is drawn.
GRID = 400


@dataclass(frozen=True)
class TheorySettings:
    """What to predict: every combination of the lists.

    Attributes:
        model: "linear" or "one_hidden"; losses: "cross_entropy", "mse" or both.
        classes, gammas, widths: lists of C, d/N and m; widths are not used by the linear model.
        activation, hidden_scale, output_scale, rtol, seed: see `theory.static_force`.
    """

    model: str = "one_hidden"
    losses: tuple[str, ...] = ("cross_entropy",)
    classes: tuple[int, ...] = (10, 100, 1000, 10_000, 131_072)
    gammas: tuple[float, ...] = (0.5,)
    widths: tuple[int, ...] = (8,)
    activation: str = "relu"
    hidden_scale: float = 1.0
    output_scale: float = 1.0
    rtol: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        require_choice("model", self.model, MODELS)
        for name in ("losses", "classes", "gammas", "widths"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise InputError(f"{name} must name at least one value, and each once, got {list(values)}")
        for loss in self.losses:
            require_choice("loss", loss, LOSSES)
        if not 0 < self.rtol < 1:
            raise InputError(f"rtol must lie between 0 and 1, got {self.rtol}")
        for loss, C, gamma, width in self.combinations:
            describe(self.model, loss, C, **self.arguments(gamma, width))

    @property
    def combinations(self) -> list[tuple[str, int, float, int]]:
        """(loss, C, gamma, width) in the order of the table."""
        widths = self.widths if self.model == "one_hidden" else self.widths[:1]
        found = product(self.losses, self.gammas, widths, self.classes)
        return [(loss, C, gamma, width) for loss, gamma, width, C in found]

    @property
    def fingerprint(self) -> str:
        """Hash of the settings and of hesscope's version."""
        text = repr(sorted({**asdict(self), "version": __version__}.items()))
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def arguments(self, gamma: float, width: int) -> dict[str, Any]:
        """Arguments of the theory besides model, loss and C."""
        return {
            "gamma": gamma,
            "width": width,
            "activation": self.activation,
            "hidden_scale": self.hidden_scale,
            "output_scale": self.output_scale,
        }


def run_theory(folder: Path, settings: TheorySettings, report: Reporter) -> int:
    """Predict every combination; returns how many of the steps were found done from an earlier run."""
    store = theory_store(folder, settings)
    found = run_steps(theory_steps(store, settings), store, report)
    store.clear(PARTS)
    return found


def theory_store(folder: Path, settings: TheorySettings) -> Store:
    """Where the predictions lie."""
    return Store(folder, settings.fingerprint)


def theory_steps(store: Store, settings: TheorySettings) -> list[Step]:
    """One step for each combination, one for the laws of blocks, and one that puts them together."""
    final = Step(RESULT, "putting the results together", 0.1, lambda _: _merge(settings, store))
    if store.has(RESULT):
        return [final]
    points = [
        Step(f"{PARTS}{index}", f"predicting r at C = {C:,}", _cost(settings, loss, C), _predicting(settings, index))
        for index, (loss, C, _, _) in enumerate(settings.combinations)
    ]
    return [*points, Step(f"{PARTS}laws", "laws of blocks", 3.0, lambda _: _laws(settings)), final]


def _cost(settings: TheorySettings, loss: str, C: int) -> float:
    sampled = settings.model == "one_hidden" and loss == "cross_entropy"
    return 2.0 + C / 8000 if sampled else 0.1


def _predicting(settings: TheorySettings, index: int) -> Callable[[Progress], xr.Dataset]:
    return lambda _: _predict(settings, index)


def _predict(settings: TheorySettings, index: int) -> xr.Dataset:
    loss, C, gamma, width = settings.combinations[index]
    force = static_force(
        settings.model, loss, C, **settings.arguments(gamma, width), rtol=settings.rtol, seed=settings.seed
    )
    return force.to_xarray()


def _laws(settings: TheorySettings) -> xr.Dataset:
    """Densities of a diagonal and an off-diagonal block at the first C, gamma and m, for every loss."""
    import xarray as xr

    grids, densities, atoms = [], [], []
    for loss in settings.losses:
        arguments = settings.arguments(settings.gammas[0], settings.widths[0])
        laws = block_laws(settings.model, loss, settings.classes[0], **arguments, seed=settings.seed)
        for law in (laws.diagonal, laws.off_diagonal):
            ends = [end for interval in law.support for end in interval] + [0.0]
            ends += [1.0] * (not law.support)  # the zero matrix: an atom and nothing else
            margin = 0.05 * (max(ends) - min(ends))
            grid = np.linspace(min(ends) - margin, max(ends) + margin, GRID)
            grids.append(grid)
            # The weights are samples: a distance of a grid's step from the axis hides the comb of the rarest ones.
            z = grid + 1j * (grid[1] - grid[0])
            densities.append((law.stieltjes(z) + law.atom_at_zero / z).imag / np.pi)
            atoms.append(law.atom_at_zero)
    shape = (len(settings.losses), 2)
    return xr.Dataset(
        {
            "grid": (("loss", "block", "point"), np.reshape(grids, (*shape, GRID))),
            "density": (("loss", "block", "point"), np.reshape(densities, (*shape, GRID))),
            "atom_at_zero": (("loss", "block"), np.reshape(atoms, shape)),
        },
        coords={
            "loss": np.asarray(settings.losses, dtype=object),
            "block": np.asarray(["diagonal", "off-diagonal"], dtype=object),
        },
    )


def _merge(settings: TheorySettings, store: Store) -> xr.Dataset:
    """All predictions as arrays over (loss, gamma, width, C), nan where there is no such layer."""
    import xarray as xr

    widths = settings.widths if settings.model == "one_hidden" else settings.widths[:1]
    shape = (len(settings.losses), len(settings.gammas), len(widths), len(settings.classes))
    points = [store.require(f"{PARTS}{index}") for index in range(len(settings.combinations))]
    names = ("hidden_ratio", "hidden_stderr", "output_ratio", "output_stderr", "limit_hidden", "limit_output")
    table = {
        name: (
            ("loss", "gamma", "width", "classes"),
            np.reshape([float(point[name]) if name in point else np.nan for point in points], shape),
        )
        for name in names
    }
    coords = {
        "loss": np.asarray(settings.losses, dtype=object),
        "gamma": list(settings.gammas),
        "width": list(widths),
        "classes": list(settings.classes),
    }
    kept = {key: value for key, value in asdict(settings).items() if not isinstance(value, tuple)}
    engines = sorted({str(point.attrs["engine"]) for point in points})
    law = {"law_classes": settings.classes[0], "law_gamma": settings.gammas[0], "law_width": widths[0]}
    result = xr.Dataset(table, coords, {"record": "Theory", "engine": "; ".join(engines), **kept, **law})
    return xr.merge([result, store.require(f"{PARTS}laws")], combine_attrs="drop_conflicts")
