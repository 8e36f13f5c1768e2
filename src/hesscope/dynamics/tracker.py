"""Tracker: attached to any training loop, it measures the Hessian's structure at chosen steps and changes nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hesscope.core.errors import InputError
from hesscope.dynamics.clock import Clock
from hesscope.dynamics.first_order import first_order
from hesscope.dynamics.kept_state import KeptState
from hesscope.dynamics.measures import Measure, Moment, checked_measures, measure, require_measurable
from hesscope.dynamics.optimizers import learning_rate as rate_of
from hesscope.dynamics.optimizers import stability_limit
from hesscope.dynamics.schedule import Adaptive, Schedule, checked_schedule, require_step
from hesscope.dynamics.snapshot import UNKNOWN, Snapshot
from hesscope.dynamics.trajectory import (
    Trajectory,
    load_snapshot,
    read_identity,
    require_same_identity,
    save_snapshot,
    steps_in,
    write_identity,
)
from hesscope.objective import Objective
from hesscope.objective.batches import fingerprint
from hesscope.partition import Partition

ADAPTIVE = Adaptive()

# Without a partition: rows, if there are no more than these.
ROWS_BY_DEFAULT = 512

# So many snapshots of a model that has never moved are an error, not a learning rate that begins at zero.
UNMOVED = 3

# Steps that may wait at a time: each is a copy of the parameters, which takes time and space as well.
MOST_WAITING = 32

# A resumed run passes through steps that were measured before: their losses must agree so well.
SAME_LOSS = 1e-3


class Tracker:
    """Measures an objective at chosen steps of the training of its model.

        tracker = Tracker(objective, partition, at=log_spaced(1000), folder="out/run")
        for step in range(1000):
            tracker(step)
            ...  # one update
        trajectory = tracker.finish(1000)

    Training is not touched: weights, gradients, buffers, modes and random states are bit for bit as without a tracker.
    With a `folder`, every snapshot is a file there the moment it exists, and a run that was killed goes on where it
    stopped: the same tracker on the same folder passes over all steps up to the last one that is there.

    With a `budget`, a step that is due and not affordable yet waits: its parameters are copied (into the folder, if
    there is one, else on the CPU; of 32 steps at most) and measured as soon as the time spent so far, and once more
    what the last snapshot took for the end, stay within the budget. What cannot be afforded by the end is left out, and
    the trajectory says so. The first snapshot, which tells what one costs, and the last are taken in any case.

    Args:
        objective: the model that is being trained, a loss, and the data to measure on, which need not be that of the
            training.
        partition: B blocks of the parameters; rows if there are no more than 512, else tensors, unless told.
        at: steps, increasing (see log_spaced); a number, for every so many steps; or Adaptive().
        measures: of "energies", "eigenvalues", "trace", "density", "heterogeneity", "heatmap", or records of
            hesscope.dynamics.measures, which say how.
        folder: where snapshots are written, one file each; in memory alone unless told.
        budget: share of the training's time that measuring may take, such as 0.1; no limit unless told.
        optimizer: what trains the model, for learning rate and stability limit.
        on_snapshot: called with every new Snapshot (see hesscope.dynamics.tensorboard).
        seed: root of the random streams; equal seeds give equal numbers.

    Raises:
        InputError: steps that do not increase, an unknown measure, a budget outside (0, 1], an optimizer of another
            model, something that is no optimizer, function or seed, a folder that is a file or holds another
            trajectory (both are named).
        PartitionError: the partition does not fit the objective.
    """

    def __init__(
        self,
        objective: Objective,
        partition: Partition | None = None,
        at: Schedule = ADAPTIVE,
        measures: Sequence[str | Measure] = ("energies", "eigenvalues"),
        folder: Path | str | None = None,
        budget: float | None = None,
        optimizer: Any = None,
        on_snapshot: Callable[[Snapshot], None] | None = None,
        seed: int = 0,
    ) -> None:
        if not isinstance(objective, Objective):
            raise InputError(f"objective must be a hesscope.Objective, got {type(objective).__name__}")
        if budget is not None and not (isinstance(budget, int | float) and 0 < budget <= 1):
            raise InputError(f"budget must be a share of the training's time in (0, 1], got {budget!r}")
        if on_snapshot is not None and not callable(on_snapshot):
            raise InputError(f"on_snapshot must be a function of a Snapshot, got {on_snapshot!r}")
        if type(seed) is not int:
            raise InputError(f"seed must be an integer, got {seed!r}")
        self.objective = objective
        self.partition = _default_partition(objective.model) if partition is None else partition
        self.partition.require_fits(objective.parameters.size)
        self.at = checked_schedule(at)
        self.measures = checked_measures(measures)
        require_measurable(self.measures, objective)
        self.folder = None if folder is None else Path(folder)
        self.budget, self.optimizer, self.seed = budget, optimizer, seed
        if optimizer is not None:
            _require_trains(optimizer, objective.model)
        self._on_snapshot = on_snapshot
        self._snapshots: dict[int, Snapshot] = {}
        self._left_out: list[int] = []
        names = objective.parameters.names
        self._kept = KeptState(self.folder, names if isinstance(self.at, Adaptive) else None)
        self._first_place: str | None = None  # fingerprint of the parameters first measured, until they have moved
        self._called = -1
        self._passed = -1  # the last step that an earlier run has seen to
        self._resumed = False  # whether there are snapshots of an earlier run, not yet compared with this one
        self._clock = Clock()
        self._last_cost = 0.0  # seconds of the last snapshot
        if self.folder is not None:
            self._take_up()

    @property
    def trajectory(self) -> Trajectory:
        """What has been measured so far."""
        snapshots = tuple(self._snapshots[step] for step in sorted(self._snapshots))
        return Trajectory(snapshots, self.identity, tuple(sorted(self._left_out)))

    @cached_property
    def identity(self) -> dict[str, str]:
        """What is measured, as words: trajectories of different identity do not share a folder."""
        space, partition = self.objective.parameters, self.partition
        return {
            "model": f"{type(self.objective.model).__name__}, {space.size:,} parameters",
            "tensors": fingerprint([*space.names, *(list(shape) for shape in space.shapes)]),
            "loss": self.objective.loss.name,
            "data": f"{self.objective.num_terms:,} loss terms, {self.objective.data_fingerprint}",
            "partition": f"{len(partition):,} blocks, {fingerprint([*partition.labels, partition.assignment])}",
            "measures": ", ".join(repr(asked) for asked in self.measures.values()),
            "dtype": str(space.dtype).removeprefix("torch."),
            "seed": str(self.seed),
        }

    @property
    def share(self) -> float:
        """Time spent in the tracker over the time outside of it, since the first call (of all runs in the folder)."""
        return self._clock.share

    def report(self) -> str:
        """One line: how much was measured, how long it took, what was left out."""
        clock, count = self._clock, len(self._snapshots)
        share = f" ({clock.share:.1%} of {clock.trained:.3g} s of training)" if clock.trained > 0 else ""
        notes = [f"{count} snapshot{'' if count == 1 else 's'} in {clock.spent:.3g} s{share}"]
        notes += [f"{len(self._kept.waiting)} waiting"] if self._kept.waiting else []
        notes += [f"{len(self._left_out)} due and left out"] if self._left_out else []
        notes += ["the model has not moved"] if self._first_place is not None and count > 1 else []
        return "; ".join(notes)

    def __call__(self, step: int, learning_rate: float | None = None, force: bool = False) -> Snapshot | None:
        """Measure, if it is time to.

        Args:
            step: number of updates done so far; must increase from call to call.
            learning_rate: of the update to come; read from the optimizer unless told.
            force: measure whether due or not.

        Returns:
            The step's snapshot if it was measured now, else None.

        Raises:
            InputError: steps that do not increase; a model that does not change although it is trained; a resumed run
                that is not the one in the folder.
            HesscopeError: what a measure raises (a loss that is not finite, say).
        """
        with self._clock.measuring():
            require_step("step", step)
            if step <= self._called:
                raise InputError(f"steps must increase from call to call, but {step} comes after {self._called}")
            self._called = int(step)
            return self._visit(self._called, learning_rate, force)

    def finish(self, step: int | None = None, everything: bool = False) -> Trajectory:
        """Measure what still waits, as far as the budget allows, and return the trajectory.

        Of the steps that wait the last one is measured in any case; time for it was held in reserve.

        Args:
            step: number of updates done in all: the final parameters are measured, whether due or not. Without it the
                last snapshot is that of the last step that was due.
            everything: measure all that waits, whatever the budget.

        Raises:
            InputError, HesscopeError: as for a call.
        """
        if step is not None and step != self._called:
            self(step, force=True)
        with self._clock.measuring():
            waiting = sorted(self._kept.waiting)
            for due in waiting:
                if everything or due == waiting[-1] or self._affordable(reserve=1):
                    self._measure_waiting(due)
                else:
                    self._leave_out(due)
                    self._kept.drop(due)
            known = {*self._snapshots, *self._left_out}
            listed = self.at if isinstance(self.at, tuple) else ()
            self._leave_out(*(due for due in listed if due <= self._called and due not in known))  # never came by
        return self.trajectory

    # --- one step -----------------------------------------------------------------------------------------------------

    def _visit(self, step: int, learning_rate: float | None, force: bool) -> Snapshot | None:
        if step <= self._passed:
            self._require_same_run(step)
            return None
        rate = _rate(learning_rate, self.optimizer)
        limit = UNKNOWN if self.optimizer is None else stability_limit(self.optimizer, rate)
        snapshot = None
        if force or self._due(step):
            moment = Moment(step, rate, limit, self._clock.trained)
            if self.budget is None:
                snapshot = self._measure(moment)
            elif len(self._kept.waiting) < MOST_WAITING:
                self._kept.put(moment, self.objective.model)
            elif force:  # the end: in place of the latest one
                latest = max(self._kept.waiting)
                self._leave_out(latest)
                self._kept.drop(latest)
                self._kept.put(moment, self.objective.model)
            else:
                self._left_out.append(step)  # written with the next snapshot: this may happen at every step
        while self._kept.waiting and self._affordable(reserve=1):
            snapshot = self._measure_waiting(min(self._kept.waiting))
        return snapshot if snapshot is not None and snapshot.step == step else None

    def _leave_out(self, *steps: int) -> None:
        """Remember that steps were due, before anything of them is deleted."""
        self._left_out.extend(steps)
        if self.folder is not None:
            write_identity(self.folder, self.identity, sorted(self._left_out))

    def _require_same_run(self, step: int) -> None:
        """Compare the first step that a resumed run has in common with the run before."""
        if step in self._snapshots and self._resumed:
            self._resumed = False
            there, here = self._snapshots[step].value, first_order(self.objective).value
            if abs(there - here) > SAME_LOSS * abs(there):
                raise InputError(
                    f"step {step} was measured in {self.folder} at a loss of {there:.6g}, here it is {here:.6g}: "
                    "this is another run; use another folder"
                )

    def _due(self, step: int) -> bool:
        if isinstance(self.at, Adaptive):
            return self._kept.movement(self.objective.model) >= self.at.change
        return step % self.at == 0 if isinstance(self.at, int) else step in self.at

    def _affordable(self, reserve: int) -> bool:
        """Whether one more snapshot, and `reserve` ones later, would leave the time spent within the budget.

        The first one tells what they cost, and is taken at once.
        """
        if self.budget is None or not self._snapshots:
            return True
        return self._clock.spent + (1 + reserve) * self._last_cost <= self.budget * self._clock.trained

    def _measure_waiting(self, step: int) -> Snapshot:
        moment, state = self._kept.get(step)
        with _at_state(self.objective.model, state):
            snapshot = self._measure(moment, tell=False)
        self._kept.drop(step)
        self._tell(snapshot)
        return snapshot

    def _measure(self, moment: Moment, tell: bool = True) -> Snapshot:
        """Measure the model as it is now, write it down, and tell."""
        if self.objective.parameters.device.type == "cuda":
            torch.cuda.synchronize()  # what training has queued is not ours to pay for
        start = time.perf_counter()
        before = self._kept.before(self.objective.parameters.device)
        with self.objective.undisturbed():  # of autocast, for one: it would round matrix products of the measures
            snapshot, vectors = measure(self.objective, self.partition, self.measures, moment, before, self.seed)
        self._require_moved(snapshot)
        # In this order, so that a kill between any two leaves what a resumed run needs.
        place = None if self.budget is not None else self.objective.model
        self._kept.save(moment.step, vectors, place, self._clock.trained, self._clock.spent)
        if self.folder is not None:
            save_snapshot(self.folder, snapshot)
            if self._left_out:
                write_identity(self.folder, self.identity, sorted(self._left_out))
        self._kept.forget_all_but(moment.step)
        self._snapshots[moment.step] = snapshot
        self._last_cost = time.perf_counter() - start
        if tell:
            self._tell(snapshot)
        return snapshot

    def _tell(self, snapshot: Snapshot) -> None:
        if self._on_snapshot is not None:
            self._on_snapshot(snapshot)

    def _require_moved(self, snapshot: Snapshot) -> None:
        """Refuse a model that is not the one being trained: one that has not changed since it was first measured."""
        if self._snapshots and self._first_place is None:
            return  # it has moved; that it rests now is nothing wrong
        own = dict(self.objective.model.named_parameters())
        now = fingerprint([own[name] for name in self.objective.parameters.names])
        if self._snapshots and now != self._first_place:
            self._first_place = None
            return
        self._first_place = now
        if len(self._snapshots) + 1 >= UNMOVED and snapshot.gradient_norm > 0:
            raise InputError(
                f"the parameters of the objective's model have not changed over {UNMOVED} measured steps, up to step "
                f"{snapshot.step}: it is not the model that is being trained"
            )

    # --- a folder with results ----------------------------------------------------------------------------------------

    def _take_up(self) -> None:
        """Go on from what the folder has."""
        import h5netcdf  # noqa: F401 -- loaded here and not at the first snapshot, whose time is that of the next
        import xarray  # noqa: F401

        assert self.folder is not None
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"folder = {str(self.folder)!r} is a file")
        require_same_identity(self.folder, self.identity)
        _, left_out = read_identity(self.folder)
        self._left_out = list(left_out)
        write_identity(self.folder, self.identity, left_out)
        for step in steps_in(self.folder):
            self._snapshots[step] = load_snapshot(self.folder, step)
        self._resumed = bool(self._snapshots)
        last = max(self._snapshots, default=-1)
        self._clock = Clock(*self._kept.take_up(last))
        self._last_cost = sum(self._snapshots[last].seconds.values()) if self._snapshots else 0.0
        self._passed = max([last, *self._kept.waiting, *self._left_out])


def _default_partition(model: nn.Module) -> Partition:
    rows = Partition.by_row(model)
    return rows if len(rows) <= ROWS_BY_DEFAULT else Partition.by_tensor(model)


def _require_trains(optimizer: Any, model: nn.Module) -> None:
    """Raise InputError unless the optimizer has a parameter of the model."""
    own = {id(p) for p in model.parameters() if p.requires_grad}
    if not hasattr(optimizer, "param_groups"):
        raise InputError(f"optimizer must be a torch optimizer, got {optimizer!r}")
    if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
        raise InputError(
            "the optimizer has no parameter of the objective's model: the model that is measured is not the one that "
            "is being trained"
        )


def _rate(told: float | None, optimizer: Any) -> float:
    if told is not None:
        return float(told)
    return UNKNOWN if optimizer is None else rate_of(optimizer)


@contextmanager
def _at_state(model: nn.Module, state: dict[str, Tensor]) -> Iterator[None]:
    """The model with other parameters and buffers, which afterwards are bit for bit what they were.

    Written through `.data`, which autograd does not see: a graph that the user holds stays valid.
    """
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    other = {name: tensor.to(own[name].device) for name, tensor in state.items()}
    # What is equal is not written: a buffer may be a view that cannot be.
    changed = {name for name, tensor in other.items() if not torch.equal(own[name].detach(), tensor)}
    before = {name: own[name].detach().clone() for name in changed}
    try:
        for name in changed:
            own[name].data.copy_(other[name])
        yield
    finally:
        for name, tensor in before.items():
            own[name].data.copy_(tensor)
