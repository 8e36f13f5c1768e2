"""The outermost eigenpairs of a symmetric matrix that is known by its products, with their true residuals.

Products without a start, and with the eigenvectors of the step before as one, mean over the steps. One hidden ReLU
layer, 64-32-10, on digits (P = 2368), cross-entropy, Adam, float64; tolerance 1e-3 and the default, 1e-5:

                                       1e-3           1e-5
    log-spaced (0, 3, 8, 20, 50, 122, 300; learning rate 1e-2)
        k = 5  largest               28 ->  27      31 ->  31
        k = 10 largest               44 ->  43      49 ->  48
        k = 5  smallest             113 -> 110     123 -> 121
        k = 10 smallest             136 -> 139
    one step apart (30, 100 and 299; learning rate 1e-3)
        k = 5  largest               31 ->  26      34 ->  30
        k = 10 largest               49 ->  42      53 ->  48
        k = 5  smallest             100 ->  80
        k = 10 smallest             160 -> 139

A warm start spares little: k products and the search for what may be missing remain, and along log-spaced steps the
eigenvectors turn too far. Beginning with products of all given vectors, a block, took 15 to 70 % more there than no
start.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import ceil, log
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hesscope.core.checks import require_choice, require_positive_int
from hesscope.core.errors import DataError, InputError, TooLargeError
from hesscope.core.memory import available_bytes, human_bytes
from hesscope.core.records import Provenance, require_xarray_kind
from hesscope.core.rng import stream
from hesscope.estimate.krylov import KrylovSpace, mixing_weights, overlooked, unit_rows
from hesscope.estimate.lanczos import power_of_two
from hesscope.estimate.symmetry import require_symmetric
from hesscope.operators import Operator, as_operator

if TYPE_CHECKING:
    import xarray as xr

Array = npt.NDArray[np.float64]
Progress = Callable[[int, int], None]

WHICH = ("LA", "SA", "LM")
DEFAULT_RTOL = {torch.float64: 1e-5, torch.float32: 1e-4}

# Residuals below this many roundings of the largest eigenvalue are rounding.
ROUNDINGS = 20

# Vectors of the basis before a restart: they are cheap compared with the products that a restart costs. At least
# CAPACITY, up to LARGE_CAPACITY where they are short enough for SMALL_BASIS entries in all; never more than fit in
# MEMORY_SHARE of the memory that is left. Half of what lies between k and the capacity survives a restart.
CAPACITY, LARGE_CAPACITY, SMALL_BASIS = 256, 1024, 2**24
MEMORY_SHARE = 0.5

# How the residuals were had: False from a product each, True from one product.
MEASURED = {False: "", True: "; residuals from the recurrence, checked with one product"}

# Up to this size, or for half of all pairs, the whole matrix is less work than its Krylov spaces.
DENSE_SIZE = 32

# The search for further copies ends when they have been overlooked with less than this probability, or after this
# share of the products that the pairs took (but not before some few).
DOUBT, SEARCH_SHARE, SEARCH_LEAST = 1e-3, 0.25, 20

# Accuracy of the estimated residuals that is asked for if the true ones turn out to be too large.
STRICTER = 0.1

# So many times the recurrence's error, as one random combination shows it, must leave the residuals small enough.
SAFETY = 4


@dataclass(frozen=True, eq=False)
class Eigenpairs:
    """Some eigenvalues of a symmetric P x P matrix A, counted with their multiplicity, and orthonormal eigenvectors.

    Attributes:
        values: [k] float64, descending ("LA", "SA"; so the most negative one comes last), for "LM" by magnitude.
        vectors: [P, k] unit columns, in the matrix's dtype and on its device.
        residuals: [k] norms ||A v - lambda v||; some eigenvalue lies that near. Either from a last product with each
            vector; or from the recurrence, plus the error of the recurrence, which one product with a random
            combination of the vectors has measured (see top_eigenpairs). The message says which.
        converged: [k] whether the residual is at most tolerance * |lambda|, or at most what rounding leaves.
        which: "LA" largest, "SA" smallest, "LM" largest in magnitude; tolerance: of the residuals, relative.
        products: of the matrix with a vector, everything included.
        overlooked: bound on the probability that a further copy of an eigenvalue belongs among these.
        provenance: how it was made; message: what happened.
    """

    values: Array
    vectors: Tensor = field(repr=False)
    residuals: Array
    converged: npt.NDArray[np.bool_]
    which: str
    tolerance: float
    products: int
    overlooked: float
    provenance: Provenance
    message: str

    def to_xarray(self) -> xr.Dataset:
        """Labelled data set with dimensions pair and parameter, vectors included; `from_xarray` reads it back."""
        import xarray as xr

        attributes = {"which": self.which, "tolerance": self.tolerance, "products": self.products}
        attributes |= {"overlooked": self.overlooked, "message": self.message}
        return xr.Dataset(
            {
                "eigenvalue": (("pair",), self.values),
                "eigenvector": (("parameter", "pair"), self.vectors.cpu().numpy()),
                "residual": (("pair",), self.residuals),
                "converged": (("pair",), self.converged),
            },
            attrs={"record": "Eigenpairs", **attributes, **self.provenance.attributes()},
        )

    @classmethod
    def from_xarray(cls, dataset: xr.Dataset) -> Eigenpairs:
        """Inverse of `to_xarray`; the vectors come to the CPU."""
        require_xarray_kind(dataset, "Eigenpairs")
        return cls(
            values=dataset["eigenvalue"].to_numpy(),
            vectors=torch.from_numpy(dataset["eigenvector"].to_numpy().copy()),
            residuals=dataset["residual"].to_numpy(),
            converged=dataset["converged"].to_numpy().astype(bool),
            which=str(dataset.attrs["which"]),
            tolerance=float(dataset.attrs["tolerance"]),
            products=int(dataset.attrs["products"]),
            overlooked=float(dataset.attrs["overlooked"]),
            provenance=Provenance.from_attributes(dataset.attrs),
            message=str(dataset.attrs["message"]),
        )


def top_eigenpairs(
    matrix: Any,
    k: int,
    which: str = "LA",
    rtol: float | None = None,
    max_products: int | None = None,
    block: int = 1,
    seed: int = 0,
    basis_device: torch.device | str | None = None,
    progress: Progress | None = None,
    start: Tensor | None = None,
) -> Eigenpairs:
    """The k outermost eigenpairs of a symmetric matrix, with multiplicity.

    Lanczos with two-pass reorthogonalization against the whole basis (so no ghost copies) and thick restarts; it stops
    as soon as all k residuals are small enough.

    Residuals: the recurrence gives those of all Ritz vectors, R = A V - V diag(lambda), up to an error D: rounding, or
    the noise of an operator that does not give the same product twice. One product of A with a random combination V g
    shows D g, whose mean square is ||D||_F^2; where D's columns have nothing to do with each other, as those of
    rounding and noise, it is at least half of the largest one's. ||R|| + ||D g|| is what is recorded, if ||R|| +
    4 ||D g|| is within rtol. Otherwise, and where a pair has not converged, residuals are measured, a product for each.

    Multiplicity: a Krylov space holds one vector of every eigenspace, whatever the number of copies. Where a further
    copy would change the answer, that is where one of the eigenvalues is larger than the k-th, a new random vector is
    therefore followed in the complement of all that is known, until no eigenvalue beyond the k-th can have escaped it
    but with probability 1e-3 (`overlooked`: a bound computed from that very run); what it finds joins, and the search
    starts again. Guaranteed are so, up to that probability, the eigenvalues with their multiplicity, each within its
    residual. The search takes a quarter as many products as the pairs themselves (or 20) at most; where it ends before
    it is sure, as it may where the k-th eigenvalue lies in a dense bulk, `overlooked` and the message say so. What no
    search can do is to tell eigenvalues apart that are nearer to each other than the tolerance: where the k-th is one
    of those, its neighbour may stand in its place.

    Warm starts: with `start` the first vector is not random, but a random combination of the given ones with a tenth of
    a random one, so that it costs no product to take them up. Pairs near the start converge before that tenth has shown
    everything else; the search is therefore for any eigenvalue beyond the k-th, not for copies of those before it
    alone. Whatever the start, the guarantees are those above. See the module's docstring for what it spares: little.

    Args:
        matrix: a symmetric operator or dense matrix [P, P] (see as_operator); if its type does not say that it is
            symmetric, two products ask.
        k: number of pairs, at most P.
        which: "LA" largest, "SA" smallest, "LM" largest in magnitude.
        rtol: largest ||A v - lambda v|| / |lambda|, or 20 roundings of ||A|| if that is more (nothing smaller can be
            had of an eigenvalue near zero); 1e-5 in float64 and 1e-4 in float32 unless told.
        max_products: budget, 100 * (k + 20) unless told; pairs that are not there by then are returned as they are,
            with `converged` false.
        block: starting vectors, and vectors per step: fewer passes over the data where several products at once are
            cheap, more products in all.
        seed: root of the random streams; equal seeds give equal numbers.
        basis_device: where to keep the basis (up to 256 vectors of P numbers, or 4 k; 1024 short ones) and to
            orthogonalize, the matrix's device unless told; "cpu" spares a GPU's memory.
        progress: called with (products done, products expected in all, estimated from the convergence so far).
        start: [P, j] vectors near the wanted ones, such as those of the same network some steps ago; they need not be
            orthonormal, zero columns count for nothing. Ignored for k = 1, which takes fewer products without, and
            where the whole matrix is less work.

    Raises:
        InputError: a value that does not fit, k larger than P, a matrix that is not symmetric, a start of another shape
            or with nan or inf.
        TooLargeError: the smallest basis that works does not fit in half of the memory that is left.
        DataError: a product is not finite.

    Sources: Wu & Simon (2000), thick restart; Stewart (2001), Krylov-Schur; Golub & Underwood (1977), blocks.
    """
    operator = as_operator(matrix)
    size = operator.shape[0]
    _require_fits(k, which, rtol, max_products, block, operator)
    if start is not None:
        _require_start(start, size)
    tolerance = DEFAULT_RTOL[operator.dtype] if rtol is None else float(rtol)
    budget = 100 * (k + 20) if max_products is None else int(max_products)
    asked = require_symmetric(operator)
    engine = f"eigenpairs: Krylov, block {block}; {operator.engine}"
    provenance = Provenance(
        engine=engine,
        dtype=str(operator.dtype).removeprefix("torch."),
        device=str(operator.device),
        data_fingerprint=operator.data_fingerprint,
        seed=seed,
    )
    if (size <= DENSE_SIZE or 2 * k >= size) and size + asked <= budget:
        exact = replace(provenance, engine=f"eigenpairs: dense; {operator.engine}", seed=None)
        return _dense_pairs(operator, k, which, tolerance, asked, exact)
    device = _device(operator, basis_device)
    near = None if start is None else _start_rows(start, k, device, operator.dtype)
    capacity = _capacity(operator, k, block, device, beside=0 if near is None else len(near))
    search = _Search(
        space=KrylovSpace(operator, device, seed, sign=-1.0 if which == "SA" else 1.0),
        k=k,
        by_magnitude=which == "LM",
        block=block,
        capacity=capacity,
        tolerance=tolerance,
        budget=budget - asked - k,
        start=near,
        progress=None if progress is None else lambda done, whole: progress(asked + done, asked + k + whole),
    )
    return _found_pairs(search, operator, which, asked, provenance)


@dataclass(frozen=True, eq=False)
class _Wanted:
    """The k wanted Ritz pairs, best first: values [k], coefficients Y [m, k], estimated residuals, and their bounds.

    `rival` is the residual of the next pair over its distance to the k-th (and bound): above 1, an eigenvalue near the
    next Ritz value may well belong before the k-th.
    """

    values: Array
    Y: Array
    residuals: Array
    bounds: Array
    rival: float
    rival_vector: Array  # [m, 1], or [m, 0] where there is no next pair


@dataclass(frozen=True, eq=False)
class _Search:
    """A Krylov space and what is sought in it, near unit rows `start` [j, P] or anywhere.

    `budget` is of products for the space itself.
    """

    space: KrylovSpace
    k: int
    by_magnitude: bool
    block: int
    capacity: int
    tolerance: float
    budget: int
    start: Tensor | None
    progress: Progress | None

    def order(self, values: Array) -> npt.NDArray[np.intp]:
        """Positions of the values, most wanted first."""
        return np.argsort(-np.abs(values) if self.by_magnitude else -values, kind="stable")

    def size(self, values: Array) -> Array:
        """What the values are ordered by."""
        return np.abs(values) if self.by_magnitude else values

    def bounds(self, values: Array, largest: float) -> Array:
        """Largest residuals [k] of converged pairs, given the largest eigenvalue's magnitude."""
        return np.maximum(self.tolerance * np.abs(values), ROUNDINGS * self.space.eps * largest)

    def wanted(self) -> _Wanted:
        """The k best Ritz pairs of the space."""
        values, Y = self.space.ritz()
        order = self.order(values)
        chosen, rival = order[: self.k], order[self.k : self.k + 1]
        bounds = self.bounds(values[chosen], float(np.abs(values).max(initial=0.0)))
        distance = self.size(values[chosen[-1:]]) + bounds[-1:] - self.size(values[rival])
        closeness = self.space.residuals(Y[:, rival]) / np.where(distance > 0, distance, 1.0)
        return _Wanted(
            values[chosen],
            Y[:, chosen],
            self.space.residuals(Y[:, chosen]),
            bounds,
            float(closeness.max(initial=0.0)),
            Y[:, rival],
        )

    def make_room(self, count: int) -> None:
        """Restart if the basis cannot take `count` vectors more."""
        space = self.space
        if space.length + count <= self.capacity:
            return
        values, Y = space.ritz()
        chosen = self.order(values)[: min(self.k + (self.capacity - self.k) // 2, self.capacity - count)]
        space.restart(values[chosen], Y[:, chosen])

    def left(self) -> int:
        """Products that the budget still allows."""
        return self.budget - self.space.products

    def converge(self, strictness: float) -> bool:
        """Expand the space until the k pairs' estimated residuals are small enough; false if the budget ends first."""
        space, first = self.space, 0.0
        while True:
            if space.length >= self.k:
                wanted = self.wanted()
                ratios = wanted.residuals / np.where(wanted.bounds > 0, wanted.bounds, 1.0) / strictness
                if (np.all(ratios <= 1) and wanted.rival <= 1) or space.length == space.size:
                    return True
                first = max(first, float(ratios.max()))
                if self.progress is not None:
                    self.progress(space.products, self._expected(first, float(ratios.max())))
                space.focus(wanted.Y[:, ratios > 1] if np.any(ratios > 1) else wanted.rival_vector)
            if self.left() <= 0:
                return False
            # The small eigenproblem grows with the basis: large ones are not solved after every step.
            for _ in range(max(1, space.length // 50)):
                step = min(self.block, self.left())
                towards = self.start if space.length == 0 else None
                if step <= 0 or (len(space.frontier) == 0 and space.draw(step, towards) == 0):
                    break
                step = min(step, len(space.frontier))
                self.make_room(step)
                space.expand(step)

    def _expected(self, first: float, now: float) -> int:
        """Products expected in all, had residuals fallen geometrically from `first` (times their bound) to `now`."""
        done = self.space.products
        fallen = log(first / now) / log(first) if first > now else 0.0
        return max(done, min(self.budget, ceil(done / fallen) if fallen > 0 else self.budget))

    def levels(self, wanted: _Wanted) -> tuple[float, list[float]]:
        """Values beyond which nothing may be found, and at which something could hide.

        A copy changes the answer if it is of a value beyond the k-th; the nearest such value is the hardest to tell
        from it. Near a start the pairs converge before the random part of the first vector has shown all others, so
        anything beyond the k-th could hide, copy or not.
        """
        sizes = self.size(wanted.values)
        limit = float(sizes[-1] + wanted.bounds[-1])
        if self.start is not None:
            return limit, [limit, -limit] if self.by_magnitude else [limit]
        beyond = sizes - wanted.bounds > limit
        sides = np.sign(wanted.values) if self.by_magnitude else np.ones(self.k)
        nearest = [np.flatnonzero(beyond & (sides == side))[-1:] for side in (1.0, -1.0)]
        return limit, [float(wanted.values[n] - sides[n] * wanted.bounds[n]) for last in nearest for n in last]

    def search_copies(self, wanted: _Wanted) -> tuple[bool, float]:
        """Follow a new random direction; returns whether it found something, and else what may be overlooked."""
        space = self.space
        limit, levels = self.levels(wanted)
        if not levels or space.length == space.size:
            return False, 0.0
        most = min(max(SEARCH_LEAST, int(SEARCH_SHARE * space.products)), self.left())
        self.make_room(min(most, (self.capacity - self.k) // 2))
        dimension = space.size - space.length - len(space.frontier)
        if most <= 0 or space.draw(1) == 0:
            return False, 0.0 if dimension == 0 else 1.0
        doubt, diagonal, off_diagonal = 1.0, [], []
        for _ in range(min(most, self.capacity - space.length)):
            before = len(space.frontier)
            space.expand(1)
            last = space.length - 1
            led_on = len(space.frontier) == before
            diagonal.append(float(space.T[last, last]))
            off_diagonal.append(float(space.C[last, 0]) if led_on else 0.0)
            own = np.diag(diagonal) + np.diag(off_diagonal[:-1], 1) + np.diag(off_diagonal[:-1], -1)
            if self.size(np.linalg.eigvalsh(own)).max() > limit:
                return True, 1.0
            doubt = min(1.0, sum(overlooked(dimension, diagonal, off_diagonal, level) for level in levels))
            if doubt <= DOUBT or not led_on:
                break
            if self.progress is not None:
                self.progress(space.products, space.products + 1)
        return False, doubt


def _found_pairs(search: _Search, operator: Operator, which: str, asked: int, provenance: Provenance) -> Eigenpairs:
    """Converge, search for copies until there are none, and measure the true residuals."""
    space, k = search.space, search.k
    strictness, doubt, sure = 1.0, 1.0, False
    while True:
        done = search.converge(strictness)
        if done and not sure:
            found, doubt = search.search_copies(search.wanted())
            if found:
                continue
            sure = True
        wanted = search.wanted()
        rows = space.basis.combine(wanted.Y)
        one_product = done and strictness == 1 and k > 1 and search.left() > 0
        if one_product:
            values, residuals, error = _from_recurrence(space, rows, wanted)
            bounds = search.tolerance * np.abs(values)
            if np.all(residuals + (SAFETY - 1) * error <= bounds):
                break
            one_product = False
        values, residuals = _rayleigh(rows, space.multiply(rows))
        bounds = search.bounds(values, float(np.abs(values).max(initial=space.norm)))
        # Rounding makes the true residuals larger than the estimated ones, if by little: once more, and stricter.
        if not done or strictness < 1 or np.all(residuals <= bounds) or search.left() < k:
            break
        strictness = STRICTER
    if search.progress is not None:
        search.progress(space.products, space.products - k)
    order = search.order(values)
    vectors = rows[torch.from_numpy(order).to(rows.device)].T.contiguous().to(operator.device)
    converged = (residuals <= bounds)[order]
    if which == "SA":
        order, vectors, converged = order[::-1], vectors.flip(1), converged[::-1]
    return Eigenpairs(
        values=values[order] * (space.sign * space.scale),
        vectors=vectors,
        residuals=residuals[order] * space.scale,
        converged=converged,
        which=which,
        tolerance=search.tolerance,
        products=asked + space.products,
        overlooked=doubt,
        provenance=provenance,
        message=_message(converged, doubt, search.left() <= 0) + MEASURED[one_product],
    )


def _from_recurrence(space: KrylovSpace, rows: Tensor, wanted: _Wanted) -> tuple[Array, Array, float]:
    """Values [k] and residuals [k] of the Ritz vectors `rows` [k, P], which become unit vectors, and D's size.

    As the recurrence has them, plus the size ||D g|| of its error, from one product; see top_eigenpairs.
    """
    rows.div_(torch.linalg.vector_norm(rows, dim=1, keepdim=True))
    g = mixing_weights(len(rows), stream(space.seed, "top_eigenpairs: residuals")).to(rows.device)
    values = torch.from_numpy(wanted.values).to(rows.device)
    left = torch.from_numpy(space.C.T @ wanted.Y).to(rows.device)
    image = space.multiply((g.to(rows) @ rows).unsqueeze(0))[0]
    image -= (g * values).to(rows) @ rows
    image -= (left @ g).to(rows) @ space.frontier
    error = float(torch.linalg.vector_norm(image, dtype=torch.float64))
    return wanted.values.copy(), wanted.residuals + error, error


def _rayleigh(rows: Tensor, images: Tensor) -> tuple[Array, Array]:
    """Rayleigh quotients [k] of rows [k, P], which become unit vectors, and the norms [k] of their residuals."""
    values, residuals = np.empty(len(rows)), np.empty(len(rows))
    for number, (x, Ax) in enumerate(zip(rows, images, strict=True)):
        length = torch.linalg.vector_norm(x, dtype=torch.float64)
        x.div_(length)
        u, Au = x.double(), Ax.double() / length
        values[number] = float(u @ Au)
        residuals[number] = float(torch.linalg.vector_norm(Au - values[number] * u))
    return values, residuals


def _message(converged: npt.NDArray[np.bool_], doubt: float, spent: bool) -> str:
    """What happened, in words."""
    parts = [f"{int(converged.sum())} of {len(converged)} pairs converged"]
    if not converged.all():
        parts.append(
            "the budget of products ended before the others did: raise max_products or rtol"
            if spent
            else "the others' residuals are rounding of the products, larger than asked for: raise rtol"
        )
    if converged.all() and doubt > DOUBT:
        parts.append(
            "the search for further copies of an eigenvalue ended before it was sure: one is missing with a "
            f"probability of up to {doubt:.1g}; raise max_products or take a smaller k"
        )
    return "; ".join(parts)


def _dense_pairs(
    operator: Operator, k: int, which: str, tolerance: float, asked: int, provenance: Provenance
) -> Eigenpairs:
    """The pairs from the whole matrix, in float64 on the CPU."""
    matrix = operator.dense().cpu().double()
    if not bool(torch.isfinite(matrix).all()):
        raise DataError("a product of the operator is not finite: look for nan or overflow in the loss or the matrix")
    scale = power_of_two(float(matrix.abs().max()))
    matrix /= scale
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    every = values.numpy()
    order = {"LA": -every, "SA": every, "LM": -np.abs(every)}[which].argsort(kind="stable")[:k]
    if which == "SA":
        order = order[::-1]
    rounded = vectors[:, torch.from_numpy(order.copy())].to(operator.dtype)
    values, residuals = _rayleigh(rounded.T.double().clone(), (matrix @ rounded.double()).T)
    floor = ROUNDINGS * torch.finfo(operator.dtype).eps * float(np.abs(every).max())
    converged = residuals <= np.maximum(tolerance * np.abs(values), floor)
    return Eigenpairs(
        values=values * scale,
        vectors=rounded.to(operator.device),
        residuals=residuals * scale,
        converged=converged,
        which=which,
        tolerance=tolerance,
        products=asked + operator.shape[0],
        overlooked=0.0,
        provenance=provenance,
        message=_message(converged, 0.0, spent=False) + "; from the whole matrix",
    )


def _device(operator: Operator, basis_device: torch.device | str | None) -> torch.device:
    """Where the basis is kept; raises InputError for a device that is not there."""
    if basis_device is None:
        return operator.device
    try:
        device = torch.device(basis_device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = " ".join(str(error).split())[:100]
        raise InputError(f"basis_device must be a device that is there, got {basis_device!r}: {reason}") from error
    return device


def _require_fits(
    k: int, which: str, rtol: float | None, max_products: int | None, block: int, operator: Operator
) -> None:
    """Raise InputError for arguments that fit neither the method nor the matrix."""
    size = operator.shape[0]
    if operator.dtype not in DEFAULT_RTOL:
        raise InputError(f"the matrix must be float32 or float64, got {operator.dtype}")
    require_positive_int("k", k)
    if k > size:
        raise InputError(f"k must be at most the matrix's size {size}, got {k}")
    require_choice("which", which, WHICH)
    if rtol is not None and not 0 < rtol < 1:
        raise InputError(f"rtol must lie between 0 and 1, got {rtol!r}")
    require_positive_int("block", block)
    if block > size:
        raise InputError(f"block must be at most the matrix's size {size}, got {block}")
    if max_products is not None:
        require_positive_int("max_products", max_products)
        if max_products < 2 * k + 2:
            raise InputError(
                f"max_products must be at least 2 * k + 2 = {2 * k + 2}, to make k vectors and to measure their "
                f"residuals, got {max_products}"
            )


def _require_start(start: Tensor, size: int) -> None:
    """Raise InputError for a start that is no finite matrix of `size` rows."""
    if not isinstance(start, Tensor):
        raise InputError(f"start must be a torch.Tensor of shape [{size}, j], got {type(start).__name__}")
    if start.ndim != 2 or start.shape[0] != size or start.shape[1] == 0:
        raise InputError(f"start must have shape [{size}, j], a column or more, got {list(start.shape)}")
    if not start.is_floating_point():
        raise InputError(f"start must be floating-point numbers, got {start.dtype}")
    if not bool(torch.isfinite(start).all()):
        raise InputError("start must be finite, got a column with nan or inf")


def _start_rows(start: Tensor, k: int, device: torch.device, dtype: torch.dtype) -> Tensor | None:
    """Unit rows [j, P] of what a start has to offer; None if that is nothing, or if it would not pay."""
    # A single pair needs no search without a start, and one with it, which takes more than the start spares.
    rows = unit_rows(start.detach().T) if k > 1 else start.new_empty(0, len(start))
    return rows.to(device, dtype) if len(rows) > 0 else None


def _capacity(operator: Operator, k: int, block: int, device: torch.device, beside: int) -> int:
    """Vectors that the basis may hold, as many as are useful and fit in MEMORY_SHARE of the memory that is left.

    `beside`: vectors that are kept beside it, in addition to those that every search needs.

    Raises:
        TooLargeError: not even the fewest that work do.
    """
    size = operator.shape[0]
    bytes_each = size * torch.finfo(operator.dtype).bits // 8
    # Beside the basis: the pairs and their products, the frontier and its products and copies.
    beside += 2 * k + 5 * block + 5
    least = min(size, 2 * k + 2 * block + 10)
    available = available_bytes(device)
    affordable = int(MEMORY_SHARE * available / bytes_each) - beside
    if affordable < least:
        raise TooLargeError(
            f"{k} eigenpairs need at least {least + beside} vectors of {human_bytes(bytes_each)}, but "
            f"{MEMORY_SHARE:.0%} of the {human_bytes(available)} available on {device} hold {affordable + beside}; "
            "ask for fewer pairs, or keep the basis in the computer's memory with basis_device='cpu'"
        )
    useful = max(CAPACITY, 4 * k, least, min(LARGE_CAPACITY, SMALL_BASIS // size))
    return min(size, affordable, useful)
