"""Trackers: where a trial reports itself beside its record. A tracker never fails a trial."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from experiments.records import Block, Record

if TYPE_CHECKING:
    import wandb

log = logging.getLogger(__name__)


class Tracking(Protocol):
    """A tracker of one trial at a time: `start`, then each `block`, then `finish` or `fail`; or `skip` alone."""

    def start(self, trial_id: str, choices: dict[str, str], config: dict[str, Any], sweep: str, root: Path) -> None:
        """A trial begins, or goes on under the same id."""

    def block(self, block: Block) -> None:
        """A decoder block is done."""

    def finish(self, record: Record) -> None:
        """The trial is done."""

    def fail(self, reason: str) -> None:
        """The trial failed."""

    def skip(self, trial_id: str) -> None:
        """The trial was done already."""


class NoTracking:
    """Reports nowhere."""

    def start(self, trial_id: str, choices: dict[str, str], config: dict[str, Any], sweep: str, root: Path) -> None:
        pass

    def block(self, block: Block) -> None:
        pass

    def finish(self, record: Record) -> None:
        pass

    def fail(self, reason: str) -> None:
        pass

    def skip(self, trial_id: str) -> None:
        pass


class WandbTracking:
    """One Weights & Biases run a trial: its id is the trial's, so that a repeated trial continues its run.

    `mode="auto"` is what WANDB_MODE says, else online when the user is logged in, else offline. Every error of the
    client is logged once and ends tracking of that trial, not the trial.
    """

    def __init__(self, project: str, entity: str | None, mode: Literal["auto", "online", "offline"]) -> None:
        self._project, self._entity, self._mode = project, entity, mode
        self._run: wandb.Run | None = None
        self._told = False

    def start(self, trial_id: str, choices: dict[str, str], config: dict[str, Any], sweep: str, root: Path) -> None:
        self._run = None
        self._guard(lambda: self._start(trial_id, choices, config, sweep, root))

    def block(self, block: Block) -> None:
        values = {"block": block.index, "block/mse": block.mse, "block/relative_mse": block.relative_mse}
        self._with_run(lambda run: run.log(values))

    def finish(self, record: Record) -> None:
        def write(run: wandb.Run) -> None:
            run.summary.update(record.metrics.model_dump() | {"status": "done"})
            run.summary.update({f"seconds/{name}": stage.seconds for name, stage in record.stages.items()})
            run.finish()

        self._with_run(write)

    def fail(self, reason: str) -> None:
        def write(run: wandb.Run) -> None:
            run.summary.update({"status": "failed", "reason": reason})
            run.finish(exit_code=1)

        self._with_run(write)

    def skip(self, trial_id: str) -> None:
        log.info("trial %s: already done, not logged again", trial_id)

    def _start(self, trial_id: str, choices: dict[str, str], config: dict[str, Any], sweep: str, root: Path) -> None:
        import wandb

        mode: Any = self._mode
        if mode == "auto":
            mode = os.environ.get("WANDB_MODE") or ("online" if _logged_in() else "offline")
        if mode == "offline" and not self._told:
            self._told = True
            log.info("W&B is offline; to upload the runs later: wandb sync %s", root / "wandb" / "offline-run-*")
        telling = [choices[key] for key in ("model", "format", "transform", "algorithm") if key in choices]
        self._run = wandb.init(
            project=self._project,
            entity=self._entity,
            id=trial_id,
            resume="allow",
            name=" ".join(telling),
            group=sweep,
            job_type=choices.get("algorithm", "baseline"),
            tags=sorted(set(telling)),
            config=config,
            dir=root,
            mode=mode,
            settings=wandb.Settings(silent=True, console="off", init_timeout=30),
        )
        self._run.define_metric("block/*", step_metric="block")

    def _with_run(self, action: Callable[[wandb.Run], None]) -> None:
        run = self._run
        if run is not None:
            self._guard(lambda: action(run))

    def _guard(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # whatever the client raises: a trial outlives its tracker
            self._run = None
            log.warning("W&B: %s: %s; this trial goes on untracked", type(error).__name__, error)


def _logged_in() -> bool:
    import wandb

    return bool(wandb.login(prompt=False, verify=False))
