"""Adapters: a Tracker in the training loops of Lightning and of Hugging Face, and its scalars in TensorBoard.

The libraries are loaded when a function needs them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import util
from itertools import combinations_with_replacement
from math import isfinite
from pathlib import Path
from typing import Any

from torch import nn

from hesscope.core.errors import InputError
from hesscope.dynamics.snapshot import Snapshot, pair_energy
from hesscope.dynamics.tracker import Tracker

# Energies between every two layers are written for no more layers than these; beyond, nobody can find a curve.
LAYERS_IN_PAIRS = 8


def lightning_callback(tracker: Tracker) -> Any:
    """A lightning.pytorch.Callback that calls a tracker: `Trainer(callbacks=[lightning_callback(tracker)])`.

    The tracker is called before every update, with the trainer's global_step (updates done; with gradient accumulation
    fewer than batches, with several optimizers the updates of all of them), and with the final parameters, which are
    measured whether due or not; then it is finished. Its optimizer is the first one of the trainer's that trains the
    objective's model, so that learning rate and stability limit are known. With `ckpt_path` the steps go on.

    Under DDP the process of rank 0 measures, on the objective's data as it has them; the others do nothing and wait at
    their next exchange of gradients. So a snapshot must take less time than the group's timeout (30 minutes for gloo,
    10 for NCCL, unless told), and what is measured is not divided among the processes.

    Raises:
        InputError: Lightning is not installed. When training starts: the LightningModule does not hold the parameters
            of the objective's model, no optimizer trains them, or they have moved to another device.
    """
    _require_installed("lightning_callback", "lightning", "lightning")
    from lightning.pytorch import Callback

    visit = _visits(tracker)

    class TrackerCallback(Callback):  # type: ignore[misc]
        def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
            _attach(tracker, pl_module, trainer.optimizers)

        def on_train_batch_start(self, trainer: Any, pl_module: nn.Module, batch: Any, batch_idx: int) -> None:
            if trainer.is_global_zero:
                visit(trainer.global_step)

        def on_train_end(self, trainer: Any, pl_module: nn.Module) -> None:
            if trainer.is_global_zero:
                visit(trainer.global_step, last=True)
                tracker.finish()

    return TrackerCallback()


def hugging_face_callback(tracker: Tracker) -> Any:
    """A transformers.TrainerCallback that calls a tracker: `Trainer(callbacks=[hugging_face_callback(tracker)])`.

    As `lightning_callback`, what it says of several processes included; with `resume_from_checkpoint` the steps go on.
    The final parameters are those of the last update, also with load_best_model_at_end.

    Raises:
        InputError: transformers is not installed. When training starts: as `lightning_callback`.
    """
    _require_installed("hugging_face_callback", "transformers", "transformers")
    from transformers import TrainerCallback

    visit = _visits(tracker)

    class HesscopeCallback(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            from accelerate.optimizer import AcceleratedOptimizer  # which the Trainer needs, this function does not

            optimizer = given["optimizer"]
            wrapped = isinstance(optimizer, AcceleratedOptimizer)
            _attach(tracker, given["model"], [optimizer.optimizer if wrapped else optimizer])

        def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            if state.is_world_process_zero:
                visit(state.global_step)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **given: Any) -> None:
            # The summary of the training: before load_best_model_at_end puts other parameters in place.
            if state.is_world_process_zero and "train_runtime" in (logs or ()):
                visit(state.global_step, last=True)

        def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            if state.is_world_process_zero:
                tracker.finish()

    return HesscopeCallback()


def tensorboard(writer: Any) -> Callable[[Snapshot], None]:
    """Writes the scalars of every snapshot: `Tracker(..., on_snapshot=tensorboard("runs/first"))`.

    Tags, each where it was measured: hessian/loss, hessian/gradient_norm, hessian/mean_squared_residual,
    hessian/accuracy, hessian/learning_rate, hessian/sharpness, hessian/sharpness_times_learning_rate,
    hessian/stability_limit, hessian/smallest_eigenvalue, hessian/gradient_share, hessian/alignment, hessian/trace,
    hessian/heterogeneity; of the block energies of H (of G if these alone were measured) hessian/diagonality,
    hessian/cross_layer_share and for every layer hessian/r/LAYER, the off-diagonal ratio; and, for up to 8 layers, the
    energies hessian/energy/H/LAYER-LAYER, as well of G and R. The step is the number of updates done.

    Args:
        writer: a SummaryWriter (or what else has add_scalar and flush), or the folder to write to.

    Raises:
        InputError: neither of these, or TensorBoard is not installed.
    """
    if isinstance(writer, str | Path):
        _require_installed("tensorboard", "tensorboard", "tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(writer))
    if not (hasattr(writer, "add_scalar") and hasattr(writer, "flush")):
        raise InputError(f"writer must be a SummaryWriter or a folder, got {type(writer).__name__}")

    def write(snapshot: Snapshot) -> None:
        for tag, value in _scalars(snapshot).items():
            if isfinite(value):
                writer.add_scalar(f"hessian/{tag}", value, global_step=snapshot.step)
        writer.flush()  # readable while training runs

    return write


def _scalars(snapshot: Snapshot) -> dict[str, float]:
    """Numbers of a snapshot by tag; nan for what is not known."""
    found = {
        "loss": snapshot.value,
        "gradient_norm": snapshot.gradient_norm,
        "mean_squared_residual": snapshot.mean_squared_residual,
        "accuracy": snapshot.accuracy,
        "learning_rate": snapshot.learning_rate,
        "sharpness": snapshot.sharpness,
        "sharpness_times_learning_rate": snapshot.sharpness_times_learning_rate,
        "stability_limit": snapshot.stability_limit,
    }
    if snapshot.eigenvalues is not None:
        found["smallest_eigenvalue"] = float(snapshot.eigenvalues.smallest[-1])
        found["gradient_share"] = snapshot.eigenvalues.gradient_share
        found["alignment"] = snapshot.eigenvalues.alignment
    if snapshot.trace is not None:
        found["trace"] = float(snapshot.trace.value)
    if snapshot.heterogeneity is not None:
        found["heterogeneity"] = float(snapshot.heterogeneity.value)
    if snapshot.parts:
        main = "H" if "H" in snapshot.parts else "G"
        layers = tuple(dict.fromkeys(snapshot.layers))
        found["diagonality"] = snapshot.block_energies(main).diagonality
        found["cross_layer_share"] = snapshot.cross_layer_share(main)
        found |= {f"r/{layer}": snapshot.off_diagonal_ratio(layer, main) for layer in layers}
        for part in snapshot.parts if len(layers) <= LAYERS_IN_PAIRS else ():
            energies = snapshot.layer_energies(part)
            for first, second in combinations_with_replacement(layers, 2):
                found[f"energy/{part}/{first}-{second}"] = pair_energy(energies, first, second)
    return found


def _visits(tracker: Tracker) -> Callable[..., None]:
    """Calls the tracker once for each number of updates, however many batches, or trainings, have that number."""
    before = -1

    def visit(step: int, last: bool = False) -> None:
        nonlocal before
        if step != before:
            before = step
            tracker(step, force=last)

    return visit


def _attach(tracker: Tracker, model: nn.Module, optimizers: Iterable[Any]) -> None:
    """Take the trainer's optimizer, if what it trains is what the tracker measures.

    By identity of the parameters, which wrapping (DDP, compiling) keeps, and so does being a part of a larger model.
    """
    objective = tracker.objective
    named = dict(objective.model.named_parameters())
    own = {name: named[name] for name in objective.parameters.names}
    trained = {id(parameter) for parameter in model.parameters()}
    foreign = next((name for name, parameter in own.items() if id(parameter) not in trained), None)
    if foreign is not None:
        raise InputError(
            f"the trainer's {type(model).__name__} does not hold {foreign} of the objective's "
            f"{type(objective.model).__name__}: the model that is measured is not the one that is being trained"
        )
    device = next(iter(own.values())).device
    if device != objective.parameters.device:
        raise InputError(
            f"the trainer's model is on {device}, but the objective was made while it was on "
            f"{objective.parameters.device}; move the model to {device} before making the objective"
        )
    measured = {id(parameter) for parameter in own.values()}
    for optimizer in optimizers:
        if any(id(parameter) in measured for group in optimizer.param_groups for parameter in group["params"]):
            tracker.optimizer = optimizer
            return
    raise InputError("no optimizer of the trainer has a parameter of the objective's model: it is not being trained")


def _require_installed(what: str, library: str, extra: str) -> None:
    if util.find_spec(library) is None:
        raise InputError(f"{what} needs {library}: pip install 'hesscope[{extra}]'")
