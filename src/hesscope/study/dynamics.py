"""Runs of presets: training with a Tracker attached, in a folder in which a run that was killed goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from hesscope.core.errors import InputError
from hesscope.core.files import atomic_path
from hesscope.dynamics import Tracker, Trajectory, log_spaced
from hesscope.dynamics.dynamic_force import DynamicForce, dynamic_force
from hesscope.dynamics.optimizers import learning_rate
from hesscope.models import MLP
from hesscope.study.preset_runs import preset_rows, require_same_run, write_run
from hesscope.study.presets import OF_ALL, PRESETS, Experiment, Options, Preset, find_preset, options_in_words
from hesscope.study.steps import Reporter
from hesscope.theory import static_force

FOLDER = Path("out", "dynamics")
SETTINGS, CHECKPOINT = "dynamics.json", "checkpoint.pt"


@dataclass(frozen=True)
class DynamicsRun:
    """A preset with its options, and the folder of the page, the figures and the results.

    Attributes:
        budget: share of the training's time that measuring may take; no limit if None.
    """

    preset: Preset
    options: Options
    folder: Path
    budget: float | None = None

    @cached_property
    def experiment(self) -> Experiment:
        """The network at initialization, and what is measured; made when first asked for."""
        return self.preset.make(self.options)

    @cached_property
    def tracker(self) -> Tracker:
        """Of the experiment, with what the folder has."""
        own = self.experiment
        return Tracker(
            own.objective,
            own.partition,
            at=self.at,
            measures=own.measures,
            folder=self.folder,
            budget=self.budget,
            optimizer=own.optimizer,
            seed=self.options.seed,
        )

    @property
    def at(self) -> tuple[int, ...]:
        """Steps that are measured."""
        return log_spaced(self.options.steps, self.options.snapshots)

    @property
    def settings(self) -> dict[str, str]:
        """What the numbers depend on, as words: runs of different settings do not share a folder."""
        return {"preset": self.preset.name, **options_in_words(self.options)}

    @property
    def title(self) -> str:
        """What the page is about."""
        return self.preset.description


def preset_table() -> list[tuple[str, ...]]:
    """Every preset, what it is and what it takes; the first row names the columns."""

    def taken(preset: Preset) -> str:
        return " ".join(f"--{name}={value}" for name, value in options_in_words(preset.defaults).items())

    texts = {preset.name: (preset.description, taken(preset)) for preset in PRESETS.values()}
    for_all = " and ".join(f"--{name}" for name in OF_ALL) + " (see --help)"
    return preset_rows("what it trains, and its options with their defaults", texts, for_all)


def choose_dynamics(
    name: str, given: Mapping[str, Any], seed: int = 0, budget: float | None = None, folder: Path | None = None
) -> DynamicsRun:
    """The run of a preset; what cannot be done is refused before any work.

    Args:
        name: of the preset.
        given: options that differ from the preset's defaults; those that are None do not.
        seed: root of all random streams.
        budget: share of the training's time that measuring may take; no limit if None.
        folder: out/dynamics/LABEL unless told, the label being that of the preset with its choices.

    Raises:
        InputError: an unknown preset, an option that it does not take or a value that does not fit, a budget outside
            (0, 1], a folder that holds another run (both are named).
        TooLargeError: it is too much for this machine.
    """
    preset = find_preset(name)
    options = preset.options(**given, seed=seed)
    run = DynamicsRun(preset, options, FOLDER / preset.label(options) if folder is None else folder, budget)
    require_same_run(run.folder / SETTINGS, run.settings)
    if budget is not None and not 0 < budget <= 1:
        raise InputError(f"--budget must be a share of the training's time in (0, 1], got {budget!r}")
    _ = run.experiment
    return run


def describe_dynamics(run: DynamicsRun) -> list[tuple[str, str]]:
    """What is about to be done, in words."""
    objective, partition = run.experiment.objective, run.experiment.partition
    measures = ", ".join(type(asked).__name__.lower() for asked in run.experiment.measures)
    device = objective.parameters.device.type
    return [
        ("preset", f"{run.preset.name}: {run.preset.description}"),
        ("options", ", ".join(f"{name} {value}" for name, value in options_in_words(run.options).items())),
        ("model", f"{type(objective.model).__name__}, {objective.parameters.size:,} parameters, on this {device}"),
        ("data", f"{objective.num_terms:,} loss terms"),
        (
            "training",
            f"{run.options.steps:,} steps of {type(run.experiment.optimizer).__name__}, learning rate "
            f"{learning_rate(run.experiment.optimizer):g}",
        ),
        ("measured", f"{measures} of {len(partition)} blocks, {partition.scheme or 'by hand'}"),
        ("steps", ", ".join(map(str, run.at))),
        ("results", f"{run.folder}"),
    ]


def run_dynamics(run: DynamicsRun, report: Reporter) -> int:
    """Train and measure; returns how many snapshots were found from an earlier run.

    Before every snapshot the weights, the optimizer's state and the step are written down: a run that was killed goes
    on from there, and a tracker with a budget has its own copies of what waits. One that is finished is not repeated.
    """
    tracker, experiment = run.tracker, run.experiment
    run.folder.mkdir(parents=True, exist_ok=True)
    write_run(run.folder / SETTINGS, run.settings)
    found = len(tracker.trajectory)
    done = [*tracker.trajectory.steps.tolist(), *tracker.trajectory.left_out]
    if run.at[-1] in done:
        return found
    first = _take_up(run)
    due, last, cost = set(run.at), run.at[-1], run.preset.snapshot_cost
    planned = last + cost * len(due)
    measured = len([step for step in due if step < first])
    experiment.model.train()
    for step in range(first, last + 1):
        if step in due:
            _save_checkpoint(run, step)
            report(f"measuring at step {step:,}", (step + cost * measured) / planned)
        tracker(step)
        measured += step in due
        report("training", (step + cost * measured) / planned)
        if step < last:
            experiment.optimizer.zero_grad()
            experiment.loss_at(step).backward()  # type: ignore[no-untyped-call]
            experiment.optimizer.step()
    tracker.finish()
    report("done", 1.0)
    return found


def dynamics_results(run: DynamicsRun) -> tuple[Trajectory, DynamicForce | None]:
    """What a run has measured, and its dynamic force if there are two snapshots."""
    trajectory = run.tracker.trajectory
    return trajectory, dynamic_force(trajectory) if len(trajectory) > 1 else None


def static_table(run: DynamicsRun) -> list[tuple[str, ...]]:
    """Off-diagonal ratios at initialization beside what random-matrix theory predicts for this d, N, m and C.

    Empty unless the preset is "gaussian", for whose ensemble there is a prediction. That is of the mean over networks,
    from which a single one differs, by some ten per cent for ten classes.
    """
    options, model, snapshots = run.options, run.experiment.model, run.tracker.trajectory.snapshots
    if run.preset.name != "gaussian" or not snapshots or snapshots[0].step > 0:
        return []
    assert isinstance(model, MLP)
    inputs, width, classes = model.widths
    force = static_force(
        "one_hidden",
        str(options.loss),
        classes,
        width=width,
        inputs=inputs,
        samples=options.samples,
        seed=options.seed,
    )
    rows: list[tuple[str, ...]] = [("layer", "r at initialization", "predicted", "standard error")]
    predicted = {"fc1": (force.hidden_ratio, force.hidden_stderr), "fc2": (force.output_ratio, force.output_stderr)}
    for layer, numbers in predicted.items():
        rows.append((layer, *(f"{number:.3g}" for number in (snapshots[0].off_diagonal_ratio(layer), *numbers))))
    return rows


# --- the folder -------------------------------------------------------------------------------------------------------


def _save_checkpoint(run: DynamicsRun, step: int) -> None:
    own = run.experiment
    content = {"step": step, "model": own.model.state_dict(), "optimizer": own.optimizer.state_dict()}
    with atomic_path(run.folder / CHECKPOINT) as temporary:
        torch.save(content, temporary)


def _take_up(run: DynamicsRun) -> int:
    """Put the training where its checkpoint is; returns the step, 0 if there is none."""
    path, own = run.folder / CHECKPOINT, run.experiment
    if not path.exists():
        return 0
    try:
        content: dict[str, Any] = torch.load(path, map_location=own.objective.parameters.device, weights_only=True)
        own.model.load_state_dict(content["model"])
        own.optimizer.load_state_dict(content["optimizer"])
        return int(content["step"])
    except Exception as error:
        raise InputError(
            f"cannot take up {path} ({type(error).__name__}); delete it to train from the start"
        ) from error
