"""What a tracker keeps between steps: top eigenvectors, the place that movement is measured from, steps that wait.

With a folder all of it lies there, so that a killed run can go on; else in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hesscope.core.errors import InputError
from hesscope.core.files import atomic_path
from hesscope.dynamics.measures import Before, Moment

KEPT, WAITING = "kept-", "waiting-"


class KeptState:
    """See the module; all writes are atomic.

    Attributes:
        waiting: by step, what is due and has not been measured yet.
    """

    def __init__(self, folder: Path | None, names: Sequence[str] | None) -> None:
        self._folder, self._names = (
            folder,
            names,
        )  # names of the parameters whose movement counts, if steps are adaptive
        self.waiting: dict[int, Moment] = {}
        self._states: dict[int, dict[str, Tensor]] = {}  # of the steps that wait, without a folder
        self._before = Before()
        self._place: Tensor | None = None  # [P] the parameters at the last step that was due, if steps are adaptive

    def take_up(self, last: int) -> tuple[float, float]:
        """Go on from a folder whose last snapshot is that of the step `last`, -1 if there is none.

        Returns:
            Seconds of training and of measuring until then.
        """
        assert self._folder is not None
        seconds = (0.0, 0.0)
        if self._path(KEPT, last).exists():
            content = _load(self._path(KEPT, last))
            self._before, self._place = Before(last, content["vectors"]), content["place"]
            seconds = (content["trained"], content["spent"])
        for path in self._folder.glob(f"{WAITING}*.pt"):
            moment = Moment(**_load(path)["moment"])
            if moment.step <= last:
                path.unlink()  # measured, but killed before this was deleted
            else:
                self.waiting[moment.step] = moment
        if self.waiting and self._names is not None:
            state = _load(self._path(WAITING, max(self.waiting)))["state"]
            self._place = torch.cat([state[name].reshape(-1) for name in self._names])
        return seconds

    # --- between snapshots --------------------------------------------------------------------------------------------

    def before(self, device: torch.device) -> Before:
        """The top eigenvectors of the last snapshot."""
        vectors = self._before.vectors
        return self._before if vectors is None else Before(self._before.step, vectors.to(device))

    def save(self, step: int, vectors: Tensor | None, model: nn.Module | None, trained: float, spent: float) -> None:
        """Keep what the next step needs of this one, beside the file of the one before, whose snapshot is the last one.

        Args:
            vectors: top eigenvectors [P, k].
            model: where movement is measured from now on; None if this step had waited, and movement is beyond it.
            trained, spent: seconds of training and of measuring so far.
        """
        self._before = Before(step, vectors)
        if model is not None:
            self._remember(model)
        if self._folder is not None:
            content = {"vectors": vectors, "place": self._place}
            on_cpu = {name: tensor if tensor is None else tensor.cpu() for name, tensor in content.items()}
            _save(self._path(KEPT, step), {**on_cpu, "trained": trained, "spent": spent})

    def forget_all_but(self, step: int) -> None:
        """Delete what was kept of other steps: this one's snapshot is written."""
        if self._folder is not None:
            for path in self._folder.glob(f"{KEPT}*.pt"):
                if path != self._path(KEPT, step):
                    path.unlink(missing_ok=True)

    def movement(self, model: nn.Module) -> float:
        """Distance of the parameters from where they were last due, over their norm there; inf at first."""
        if self._place is None:
            return float("inf")
        here = self._flat(model)
        place = self._place.to(here.device)
        length, distance = (float(torch.linalg.vector_norm(x, dtype=torch.float64)) for x in (place, here - place))
        return distance / length if length > 0 else (float("inf") if distance > 0 else 0.0)

    # --- steps that wait ----------------------------------------------------------------------------------------------

    def put(self, moment: Moment, model: nn.Module) -> None:
        """Copy the model's parameters and buffers, to be measured later."""
        own = (*model.named_parameters(), *model.named_buffers())
        state = {name: tensor.detach().to("cpu", copy=True) for name, tensor in own}
        self._remember(model)
        if self._folder is None:
            self._states[moment.step] = state
        else:
            _save(self._path(WAITING, moment.step), {"moment": asdict(moment), "state": state})
        self.waiting[moment.step] = moment

    def get(self, step: int) -> tuple[Moment, dict[str, Tensor]]:
        """A step that waits, and the parameters and buffers it had."""
        if self._folder is None:
            return self.waiting[step], self._states[step]
        return self.waiting[step], _load(self._path(WAITING, step))["state"]

    def drop(self, step: int) -> None:
        """It waits no longer."""
        del self.waiting[step]
        if self._folder is None:
            del self._states[step]
        else:
            self._path(WAITING, step).unlink(missing_ok=True)

    def _remember(self, model: nn.Module) -> None:
        """Measure movement from here."""
        if self._names is not None:
            self._place = self._flat(model)

    def _flat(self, model: nn.Module) -> Tensor:
        """A copy of the parameters whose movement counts [P]."""
        assert self._names is not None
        own = dict(model.named_parameters())
        return torch.cat([own[name].detach().reshape(-1) for name in self._names])

    def _path(self, kind: str, step: int) -> Path:
        assert self._folder is not None
        return self._folder / f"{kind}{step}.pt"


def _save(path: Path, content: dict[str, Any]) -> None:
    with atomic_path(path) as temporary:
        torch.save(content, temporary)


def _load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(f"cannot read {path}, which a tracker wrote: {type(error).__name__}") from error
