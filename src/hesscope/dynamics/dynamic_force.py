"""Dynamic force: what of a Hessian's final structure was there at initialization, and what training brought ([D])."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hesscope.core.checks import require_choice
from hesscope.core.errors import InputError
from hesscope.core.records import Provenance, require_xarray_kind
from hesscope.dynamics.exponents import PowerLaw, fit_power_law
from hesscope.dynamics.force_parts import ForceParts, force_parts
from hesscope.dynamics.passing import NEVER, Passing, passing
from hesscope.dynamics.snapshot import Snapshot
from hesscope.dynamics.trajectory import Trajectory
from hesscope.estimate.energies import BlockEnergies

if TYPE_CHECKING:
    import xarray as xr

Array = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

# What exponents are taken over: L minus its optimum, and the mean squared residual.
OVER = ("gap", "residual")
ENDS = ("initialization", "end")
# The cross-layer energy in all, beside the pairs of layers.
ALL_PAIRS = "all"
# Shares and ratios of order 1 whose standard error is smaller are exact but for rounding; it is not shown.
ROUNDING = 1e-12
ALL_BLOCKS, BETWEEN_LAYERS = "all blocks", "between layers"
# In tables, what has no value.
UNKNOWN = "–"


@dataclass(frozen=True, eq=False)
class DynamicForce:
    """How the structure of a Hessian H = G + R changed along training, in each of `runs` training runs.

    Dimensions: quantity [Q] is "all blocks" (the diagonality of the whole Hessian), "within LAYER" (that of a layer's
    own blocks) for each layer, and "between layers" (the share of the energy within layers). end [2] is the first and
    the last snapshot that has energies. pair [K] is every two different layers, "first x second", and last "all" of
    them together. Energies of a pair are those of one of the two blocks, which are each other's transposes.

    Attributes:
        layers, quantities, pairs, matrices: names; the matrices are H, G and R, or those that were measured.
        optimum: subtracted from L; threshold: for `first` and `stays`.
        steps: [runs, 2].
        diagonality: [runs, 2, Q] share of the energy in diagonal blocks, with its standard error.
        chance: [runs, Q] what blocks would keep at the end by the energies of their rows alone (see ForceParts).
        static: [runs, Q] (D0 - chance) / (D1 - chance), D0 and D1 being the diagonality at both ends: the part of what
            is beyond chance that was there at initialization. Negative where blocks kept less then than they would by
            chance at the end, above 1 where training took structure away; nan where the end is not above chance.
        similarity, chance_similarity: [runs, Q] cosine between the energies of all blocks at both ends, and what it
            would be by the energies of their rows alone.
        off_diagonal_ratio: [runs, 2, layers] r of each layer (MATH.md, section 1), with its standard error; nan for one
            block, or blocks of different sizes.
        cross_layer_share: [runs, 2] of the energy of H.
        residual_share: [runs, 2, K] ||R||^2 / (||G||^2 + ||R||^2); nan if these were not measured.
        first, first_after, stays, stays_after: [runs, Q] steps at which the diagonality reaches the threshold; -1 if
            never (see Passing).
        exponents, exponents_low, exponents_high: [matrices, K, 2] of the energy over L - optimum and over the mean
            squared residual, all runs together, with 95 % intervals (see fit_power_law).
        points_used, points_left_out: [matrices, K, 2].
        provenance: how it was made.
    """

    layers: tuple[str, ...]
    quantities: tuple[str, ...]
    pairs: tuple[str, ...]
    matrices: tuple[str, ...]
    optimum: float
    threshold: float
    steps: Integers = field(repr=False)
    diagonality: Array = field(repr=False)
    diagonality_stderr: Array = field(repr=False)
    chance: Array = field(repr=False)
    static: Array = field(repr=False)
    static_stderr: Array = field(repr=False)
    similarity: Array = field(repr=False)
    chance_similarity: Array = field(repr=False)
    off_diagonal_ratio: Array = field(repr=False)
    off_diagonal_ratio_stderr: Array = field(repr=False)
    cross_layer_share: Array = field(repr=False)
    residual_share: Array = field(repr=False)
    first: Integers = field(repr=False)
    first_after: Integers = field(repr=False)
    stays: Integers = field(repr=False)
    stays_after: Integers = field(repr=False)
    exponents: Array = field(repr=False)
    exponents_low: Array = field(repr=False)
    exponents_high: Array = field(repr=False)
    points_used: Integers = field(repr=False)
    points_left_out: Integers = field(repr=False)
    provenance: Provenance

    @property
    def runs(self) -> int:
        """Number of training runs."""
        return len(self.steps)

    @property
    def dynamic(self) -> Array:
        """[runs, Q] (D1 - D0) / (D1 - chance): the part that came with training, 1 - static."""
        return 1 - self.static

    @property
    def dynamic_stderr(self) -> Array:
        """[runs, Q] as of `static`."""
        return self.static_stderr

    def mean(self, name: str) -> Array:
        """Mean over the runs of an attribute with that dimension; nan where it is nan in any."""
        self._require_averaged(name)
        mean: Array = getattr(self, name).mean(axis=0)
        return mean

    def stderr(self, name: str) -> Array:
        """Standard error of `mean`: over the runs; of a single one that of its energies, 0 if exact, nan if unknown."""
        self._require_averaged(name)
        values: Array = getattr(self, name)
        if self.runs > 1:
            spread: Array = values.std(axis=0, ddof=1) / np.sqrt(self.runs)
            return spread
        unknown = np.where(np.any(self.diagonality_stderr > 0), np.nan, np.zeros(values.shape))
        own: Array = getattr(self, f"{name}_stderr", unknown)[0]
        return own

    def exponent(self, matrix: str, over: str, first: str | None = None, second: str | None = None) -> PowerLaw:
        """Exponent of the energy of "G", "R" or "H" in the block of two layers; without these, of all cross-layer ones.

        Args:
            over: "gap" for L - optimum, or "residual" for the mean squared residual.

        Raises:
            InputError: an unknown matrix, pair or `over`.
        """
        require_choice("matrix", matrix, self.matrices)
        require_choice("over", over, OVER)
        names = [pair_name(str(first), str(second)), pair_name(str(second), str(first))]
        pair = ALL_PAIRS if first is None and second is None else next((n for n in names if n in self.pairs), names[0])
        require_choice("the pair of layers", pair, self.pairs)
        entry = self.matrices.index(matrix), self.pairs.index(pair), OVER.index(over)
        return PowerLaw(
            exponent=float(self.exponents[entry]),
            low=float(self.exponents_low[entry]),
            high=float(self.exponents_high[entry]),
            used=int(self.points_used[entry]),
            left_out=int(self.points_left_out[entry]),
        )

    def table(self) -> list[dict[str, str]]:
        """Rows of words: quantity, both ends, static and dynamic part, and the step that passes the threshold.

        What has no value at either end (the off-diagonal ratio of a layer whose blocks differ in size) has no row.
        """
        passes = f"passes {self.threshold:g} at step"
        names = {ALL_BLOCKS: "all blocks", BETWEEN_LAYERS: "between layers"}
        names |= {f"within {layer}": f"within {layer_words(layer)}" for layer in self.layers}
        rows = []
        for number, quantity in enumerate(self.quantities):
            own = self._ends("diagonality", number)
            parts = {part: self._cell(part, number) for part in ("static", "dynamic")}
            name = {ALL_BLOCKS: "diagonality", BETWEEN_LAYERS: "share within layers"}.get(
                quantity, f"diagonality {names[quantity]}"
            )
            rows.append({"quantity": name, **own, **parts, passes: self._passing(number)})
        for number, quantity in enumerate(self.quantities):
            found, chance = (self._cell(name, number) for name in ("similarity", "chance_similarity"))
            similar = UNKNOWN if found == UNKNOWN else f"{found} (chance {chance})"
            rows.append({"quantity": f"cosine with the initial energies, {names[quantity]}", "end": similar})
        for number, layer in enumerate(self.layers):
            ends = self._ends("off_diagonal_ratio", number)
            rows.append({"quantity": f"off-diagonal ratio of {layer_words(layer)}", **ends})
        rows.append({"quantity": "cross-layer share", **self._ends("cross_layer_share")})
        rows.append({"quantity": "residual share of it", **self._ends("residual_share", self.pairs.index(ALL_PAIRS))})
        columns = ("quantity", *ENDS, "static", "dynamic", passes)
        known = [row for row in rows if any(row.get(end, UNKNOWN) != UNKNOWN for end in ENDS)]
        return [{column: row.get(column, "") for column in columns} for row in known]

    def pair_table(self) -> list[dict[str, str]]:
        """Rows of words, one for each pair of layers: the residual's share at both ends, exponents with intervals."""
        rows = []
        words = {pair_name(*pair): pair_words(*pair) for pair in combinations(self.layers, 2)}
        matrices = [matrix for matrix in self.matrices if matrix != "H"] or ["H"]
        for number, pair in enumerate(self.pairs):
            if pair == ALL_PAIRS and len(self.pairs) == 2:
                continue  # of two layers it is the only pair
            row = {"layers": words.get(pair, pair)}
            shares = self._ends("residual_share", number)
            row |= {f"residual share, {end}": shares[end] for end in ENDS}
            for over, what in zip(OVER, ("L - optimum", "squared residual"), strict=True):
                for matrix in matrices:
                    entry = self.matrices.index(matrix), number, OVER.index(over)
                    row[f"{matrix} over {what}"] = _interval(
                        *(array[entry] for array in (self.exponents, self.exponents_low, self.exponents_high))
                    )
            rows.append(row)
        return rows

    def to_xarray(self) -> xr.Dataset:
        """Data set with dimensions run, end, quantity, layer, pair, matrix, over; `from_xarray` reads it back."""
        import xarray as xr

        names = {"quantity": self.quantities, "layer": self.layers, "pair": self.pairs, "matrix": self.matrices}
        names |= {"end": ENDS, "over": OVER}
        return xr.Dataset(
            {name: (dims, getattr(self, name)) for name, dims in DIMENSIONS.items()},
            coords={dim: np.asarray(labels, dtype=object) for dim, labels in names.items()},
            attrs={
                "record": "DynamicForce",
                "optimum": self.optimum,
                "threshold": self.threshold,
                **self.provenance.attributes(),
            },
        )

    @classmethod
    def from_xarray(cls, dataset: xr.Dataset) -> DynamicForce:
        """Inverse of `to_xarray`."""
        require_xarray_kind(dataset, "DynamicForce")
        dims = {"layers": "layer", "quantities": "quantity", "pairs": "pair", "matrices": "matrix"}
        values: dict[str, Any] = {name: dataset[name].to_numpy() for name in DIMENSIONS}
        values |= {name: tuple(str(label) for label in dataset[dim].to_numpy()) for name, dim in dims.items()}
        values |= {name: float(dataset.attrs[name]) for name in ("optimum", "threshold")}
        return cls(**values, provenance=Provenance.from_attributes(dataset.attrs))

    def _require_averaged(self, name: str) -> None:
        require_choice("name", name, AVERAGED)

    def _cell(self, name: str, *entry: int) -> str:
        return _number(float(self.mean(name)[entry]), float(self.stderr(name)[entry]))

    def _ends(self, name: str, *entry: int) -> dict[str, str]:
        return {end: self._cell(name, number, *entry) for number, end in enumerate(ENDS)}

    def _passing(self, quantity: int) -> str:
        """In words: when a quantity's threshold is passed to stay, and when at first."""
        stays, first = self.stays[:, quantity], self.first[:, quantity]
        if self.runs > 1:
            found = stays[stays != NEVER]
            among = f"{len(found)} of {self.runs} runs"
            ends = dict.fromkeys((found.min(), found.max())) if len(found) else ("never",)
            return f"{' to '.join(map(str, ends))} ({among})"
        if stays[0] == NEVER:
            return "never" if first[0] == NEVER else f"not to stay (first {first[0]})"
        before = self.stays_after[0, quantity]
        notes = [f"not yet {before}"] if before != NEVER else ["from the start"]
        notes += [f"first {first[0]}"] if first[0] != stays[0] else []
        return f"{stays[0]} ({', '.join(notes)})"


PARTS = ("chance", "static", "static_stderr", "similarity", "chance_similarity")
_ENTRIES = ("matrix", "pair", "over")
DIMENSIONS: dict[str, tuple[str, ...]] = {
    "steps": ("run", "end"),
    "diagonality": ("run", "end", "quantity"),
    "diagonality_stderr": ("run", "end", "quantity"),
    **dict.fromkeys(PARTS, ("run", "quantity")),
    "off_diagonal_ratio": ("run", "end", "layer"),
    "off_diagonal_ratio_stderr": ("run", "end", "layer"),
    "cross_layer_share": ("run", "end"),
    "residual_share": ("run", "end", "pair"),
    **{each.name: ("run", "quantity") for each in fields(Passing)},
    **dict.fromkeys(("exponents", "exponents_low", "exponents_high", "points_used", "points_left_out"), _ENTRIES),
}
# What has a mean over runs: all that is not a step, an error, or a fit to all of them.
AVERAGED = (
    "diagonality",
    "chance",
    "static",
    "dynamic",
    "similarity",
    "chance_similarity",
    "off_diagonal_ratio",
    "cross_layer_share",
    "residual_share",
)


def dynamic_force(
    trajectories: Trajectory | Sequence[Trajectory], optimum: float = 0.0, threshold: float = 0.9
) -> DynamicForce:
    """What of the final block structure was there at initialization (static force), and what came from training.

    Three questions about the user's own network: how cross-layer energies of the Gauss-Newton part G and of the
    residual part R go with the loss that is left and with the residual; when the Hessian's diagonality, and that of its
    layers, passes a threshold; and how much of the final diagonality beyond chance the first snapshot had already.

    R is linear in the residuals e, so its energy has the exponent 1 over the mean squared residual while all residuals
    shrink alike; more while only fewer samples are wrong (their residuals then enter R as a mean, which is squared,
    but the mean square as they are): up to 2. Over L - optimum that makes 2 under cross-entropy, where the loss of a
    sample that is fitted is linear in its residual, and 1 under squared error, where it is quadratic. G fades under
    cross-entropy, too: its A = diag(p) - p p^T is linear in a small residual. Under squared error it stays.

    Args:
        trajectories: of one run, or of several (other seeds) of one network: their means and standard errors.
        optimum: the smallest value that L can have. 0 is right for cross-entropy and squared error of networks that can
            fit their data; where it is not known, look at the exponents over the residual instead.
        threshold: of the diagonality, in (0, 1].

    Raises:
        InputError: no trajectory, runs or snapshots with different blocks or layers, fewer than two snapshots with
            energies of H, an `optimum` above some L, a threshold out of range.

    Source: [D], arXiv:2505.02809; MATH.md, sections 1 and 2.
    """
    given = (trajectories,) if isinstance(trajectories, Trajectory) else tuple(trajectories)
    for number, trajectory in enumerate(given):
        if not isinstance(trajectory, Trajectory):
            raise InputError(
                f"trajectories must be hesscope.dynamics.Trajectory, got {type(trajectory).__name__} as number {number}"
            )
    if not 0 < threshold <= 1:
        raise InputError(f"threshold must lie in (0, 1], got {threshold!r}")
    runs = _measured(given)
    _require_optimum(runs, optimum)
    layers, matrices = tuple(dict.fromkeys(runs[0][0].layers)), runs[0][0].parts
    pairs = (*(pair_name(*pair) for pair in combinations(layers, 2)), ALL_PAIRS)
    quantities = (ALL_BLOCKS, *(f"within {layer}" for layer in layers), BETWEEN_LAYERS)
    # [S, matrices, K] cross-layer energies of each run.
    cross = [np.asarray([[_pair_energies(s, matrix) for matrix in matrices] for s in run]) for run in runs]
    passed = [
        passing(
            np.asarray([s.step for s in run], dtype=np.int64),
            np.asarray([[each.diagonality for each in _structures(s)] for s in run]),
            threshold,
        )
        for run in runs
    ]
    parts = [
        [force_parts(*pair) for pair in zip(_structures(run[0]), _structures(run[-1]), strict=True)] for run in runs
    ]
    ends = [(run[0], run[-1]) for run in runs]
    arrays: dict[str, Any] = {
        "steps": np.asarray([[s.step for s in end] for end in ends], dtype=np.int64),
        "diagonality": _stacked(parts, "initial", "final"),
        "diagonality_stderr": _stacked(parts, "initial_stderr", "final_stderr"),
        "off_diagonal_ratio": np.asarray([[[s.off_diagonal_ratio(n) for n in layers] for s in end] for end in ends]),
        "off_diagonal_ratio_stderr": np.asarray([[[_ratio_stderr(s, n) for n in layers] for s in end] for end in ends]),
        "cross_layer_share": np.asarray([[s.cross_layer_share() for s in end] for end in ends]),
        "residual_share": np.asarray([_residual_shares(each[[0, -1]], matrices) for each in cross]),
    }
    arrays |= {name: _stacked(parts, name)[:, 0] for name in PARTS}
    arrays |= {each.name: np.stack([getattr(p, each.name) for p in passed]) for each in fields(Passing)}
    return DynamicForce(
        layers=layers,
        quantities=quantities,
        pairs=pairs,
        matrices=matrices,
        optimum=float(optimum),
        threshold=float(threshold),
        **arrays,
        **_exponents(runs, cross, optimum),
        provenance=_provenance(runs),
    )


def pair_name(first: str, second: str) -> str:
    """Name of the block of two layers."""
    return f"{first} x {second}"


def layer_words(layer: str) -> str:
    """A layer as tables and figures name it: 'layer 0' for a bare number, as in a Sequential, else its name."""
    return f"layer {layer}" if layer.isdecimal() else layer


def pair_words(first: str, second: str) -> str:
    """The block of two layers as tables and figures name it."""
    return f"{layer_words(first)} × {layer_words(second)}"


def with_minus(written: str) -> str:
    """A number as it was written, with a minus sign in place of the hyphen before it."""
    return written.replace("-", "−", 1) if written.startswith("-") else written


def _measured(trajectories: Sequence[Trajectory]) -> list[list[Snapshot]]:
    """The snapshots that have energies, run by run; raises InputError unless all are of the same blocks."""
    if not trajectories:
        raise InputError("trajectories must hold at least one hesscope.dynamics.Trajectory, got none")
    runs = [[s for s in trajectory.snapshots if s.energies is not None] for trajectory in trajectories]
    for number, run in enumerate(runs):
        if len(run) < 2:
            raise InputError(
                f"a dynamic force needs at least two snapshots with energies, run {number} has {len(run)} of "
                f"{len(trajectories[number])}; track with the measure Energies"
            )
        for snapshot in run:
            _require_alike(number, snapshot, runs[0][0])
    return runs


def _require_alike(number: int, snapshot: Snapshot, model: Snapshot) -> None:
    where, blocks, known = f"step {snapshot.step} of run {number}", snapshot.block_energies(), model.block_energies()
    for what, found, expected in (
        ("layers", snapshot.layers, model.layers),
        ("blocks", blocks.labels, known.labels),
        ("sizes of blocks", blocks.sizes, known.sizes),
        ("matrices", snapshot.parts, model.parts),
    ):
        if found != expected:
            own, other = (", ".join(map(str, dict.fromkeys(each))) for each in (found, expected))
            raise InputError(
                f"all runs must have the same {what}: {where} has {_shortened(own)}; "
                f"step {model.step} of run 0 has {_shortened(other)}"
            )


def _shortened(words: str) -> str:
    return words if len(words) <= 80 else f"{words[:80]}..."


def _require_optimum(runs: Sequence[Sequence[Snapshot]], optimum: float) -> None:
    lowest = min((s for run in runs for s in run), key=lambda s: s.value)
    if not np.isfinite(optimum) or lowest.value < optimum:
        raise InputError(
            f"optimum must be a number that no loss is below, got {optimum!r}; L is {lowest.value:.6g} at step "
            f"{lowest.step}"
        )


def _structures(snapshot: Snapshot) -> list[BlockEnergies]:
    """Energies of H between all blocks, between those within each layer, and between layers."""
    energies = snapshot.block_energies()
    own: dict[str, dict[str, list[str]]] = {}
    for label, layer in zip(energies.labels, snapshot.layers, strict=True):
        own.setdefault(layer, {})[label] = [label]
    return [energies, *(energies.aggregate(blocks) for blocks in own.values()), snapshot.layer_energies()]


def _pair_energies(snapshot: Snapshot, matrix: str) -> Array:
    """Energies [K] of the blocks of two layers, and of them all together."""
    values = snapshot.layer_energies(matrix).values
    each = values[np.triu_indices(len(values), k=1)]
    return np.append(each, each.sum())


def _residual_shares(cross: Array, matrices: Sequence[str]) -> Array:
    """[2, K] from energies [2, matrices, K]."""
    shares = np.full((len(cross), cross.shape[2]), np.nan)
    if {"G", "R"} <= set(matrices):
        G, R = (cross[:, matrices.index(matrix)] for matrix in ("G", "R"))
        np.divide(R, G + R, out=shares, where=G + R > 0)
    return shares


def _ratio_stderr(snapshot: Snapshot, layer: str) -> float:
    if np.isnan(snapshot.off_diagonal_ratio(layer)):
        return float("nan")
    return snapshot.block_energies().off_diagonal_ratio_stderr(snapshot.within_layer(layer))


def _stacked(parts: Sequence[Sequence[ForceParts]], *names: str) -> Array:
    """[runs, names, Q] of numbers of each run's parts."""
    return np.asarray([[[getattr(each, name) for each in run] for name in names] for run in parts], dtype=np.float64)


def _exponents(runs: Sequence[Sequence[Snapshot]], cross: Sequence[Array], optimum: float) -> dict[str, Any]:
    """The exponents' arrays [matrices, K, 2] by name."""
    x = {
        "gap": [np.asarray([s.value - optimum for s in run]) for run in runs],
        "residual": [np.asarray([s.mean_squared_residual for s in run]) for run in runs],
    }
    _, matrices, pairs = cross[0].shape
    fits = [
        [[fit_power_law(x[over], [each[:, m, k] for each in cross]) for over in OVER] for k in range(pairs)]
        for m in range(matrices)
    ]
    names = {"exponents": "exponent", "exponents_low": "low", "exponents_high": "high"}
    names |= {"points_used": "used", "points_left_out": "left_out"}
    return {
        name: np.asarray([[[getattr(fit, own) for fit in pair] for pair in matrix] for matrix in fits])
        for name, own in names.items()
    }


def _provenance(runs: Sequence[Sequence[Snapshot]]) -> Provenance:
    each = [run[0].provenance for run in runs]
    fingerprints, seeds = ({getattr(p, name) for p in each} for name in ("data_fingerprint", "seed"))
    return Provenance(
        engine=f"dynamic force of {len(runs)} {'run' if len(runs) == 1 else 'runs'}: {each[0].engine}",
        dtype=each[0].dtype,
        device=each[0].device,
        data_fingerprint=each[0].data_fingerprint if len(fingerprints) == 1 else "",
        seed=each[0].seed if len(seeds) == 1 else None,
    )


def _number(value: float, stderr: float) -> str:
    if not np.isfinite(value):
        return UNKNOWN
    return with_minus(f"{value:.3g}") + (f" ± {stderr:.1g}" if stderr > ROUNDING else "")


def _interval(value: float, low: float, high: float) -> str:
    if not np.isfinite(value):
        return UNKNOWN
    middle, *ends = (with_minus(f"{each:.2f}") for each in (value, low, high))
    return f"{middle} ({' to '.join(ends)})"
