"""Trackers: where a trial reports itself beside its record.

A tracker never fails a trial, and never holds it up for more than seconds; what it could not send is kept on disk.
"""

from __future__ import annotations

import logging
import netrc
import os
import shlex
import ssl
import threading
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import urlopen

from experiments.records import Block, Record, Task

if TYPE_CHECKING:
    import wandb

log = logging.getLogger(__name__)

PROBE_SECONDS = 3.0  # for a sign of life from the server, once a process
INIT_SECONDS = 6  # for a run to begin
FINISH_SECONDS = 8  # for what is left of a run to be sent


class Tracking(Protocol):
    """A tracker of one trial at a time: `start`, each `block`, `measured`; `finish`, `fail` or `interrupt` at the end.

    Or only `skip`.
    """

    def start(self, trial_id: str, choices: dict[str, str], config: dict[str, Any], sweep: str, root: Path) -> None:
        """A trial begins, or goes on under the same id."""

    def block(self, block: Block) -> None:
        """A decoder block is done, by this attempt: a block that is restored is not told again."""

    def measured(self, blocks: Sequence[Block]) -> None:
        """The blocks' errors on held-out tokens are known, by this attempt."""

    def task(self, task: Task) -> None:
        """A task of the evaluation is done, by this attempt or an earlier one."""

    def finish(self, record: Record) -> None:
        """The trial is done."""

    def fail(self, reason: str) -> None:
        """The trial failed."""

    def interrupt(self, reason: str) -> None:
        """This attempt ends before the trial does; another will go on under the same id."""

    def skip(self, trial_id: str) -> None:
        """The trial was done already."""


class NoTracking:
    """Reports nowhere."""

    def start(self, trial_id: str, choices: dict[str, str], config: dict[str, Any], sweep: str, root: Path) -> None:
        pass

    def block(self, block: Block) -> None:
        pass

    def measured(self, blocks: Sequence[Block]) -> None:
        pass

    def task(self, task: Task) -> None:
        pass

    def finish(self, record: Record) -> None:
        pass

    def fail(self, reason: str) -> None:
        pass

    def interrupt(self, reason: str) -> None:
        pass

    def skip(self, trial_id: str) -> None:
        pass


class WandbTracking:
    """One Weights & Biases run a trial: its id is the trial's, so that a repeated trial continues its run.

    `mode="auto"` is what WANDB_MODE or `wandb offline` says, else online when the user is logged in and the server
    answers, else offline. A server that fails a run is not asked again: the process goes on offline, and says how to
    upload. Every other error of the client is logged once and ends tracking of that trial, not the trial.
    """

    def __init__(self, project: str, entity: str | None, mode: Literal["auto", "online", "offline"]) -> None:
        self._project, self._entity, self._wanted = project, entity, mode
        self._mode: str | None = None  # of this process, known from its first trial on
        self._why_offline, self._level = "as asked", logging.INFO
        self._told = False
        self._run: wandb.Run | None = None
        self._folder = Path()

    def start(self, trial_id: str, choices: dict[str, str], config: dict[str, Any], sweep: str, root: Path) -> None:
        self._run = None
        self._guard(lambda: self._start(trial_id, choices, config, sweep, root))

    def block(self, block: Block) -> None:
        error = block.calibration
        values: dict[str, float] = {"block": block.index}
        if error is not None:
            values |= {"block/mse": error.mse, "block/relative_mse": error.relative}
        run = self._run
        if run is not None:
            # The step is the block: W&B takes each step once, so a block that two attempts computed is one point.
            self._guard(lambda: run.log(values, step=block.index, commit=True))

    def measured(self, blocks: Sequence[Block]) -> None:
        run = self._run
        if run is not None:
            self._guard(lambda: _log_held_out(run, blocks))

    def task(self, task: Task) -> None:
        run, values = self._run, {f"task/{task.name}": task.score}
        if task.spread is not None:
            values[f"task/{task.name}/spread"] = task.spread
        if run is not None:
            self._guard(lambda: run.summary.update(values))

    def finish(self, record: Record) -> None:
        seconds = {f"seconds/{name}": stage.seconds for name, stage in record.stages.items()}
        self._close({"status": "done"} | record.metrics.model_dump() | seconds, 0)

    def fail(self, reason: str) -> None:
        self._close({"status": "failed", "reason": reason}, 1)

    def interrupt(self, reason: str) -> None:
        if self._run is not None:
            self._guard(self._run.mark_preempting)  # with exit code 1, the run's state becomes "preempted"
        self._close({"status": "interrupted", "reason": reason}, 1)

    def skip(self, trial_id: str) -> None:
        log.info("trial %s: already done, not logged again", trial_id)

    def _start(self, trial_id: str, choices: dict[str, str], config: dict[str, Any], sweep: str, root: Path) -> None:
        # The client's reports about itself hold up a process for 10 seconds when their server does not answer.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        telling = [choices[key] for key in ("model", "format", "transform", "algorithm") if key in choices]
        init = partial(
            wandb.init,
            project=self._project,
            entity=self._entity,
            id=trial_id,
            resume="allow",
            name=" ".join(telling),
            group=sweep,
            job_type=choices.get("algorithm", "baseline"),
            tags=sorted(set(telling)),
            config=config | {"choices": choices},
            allow_val_change=True,  # a trial may go on elsewhere, with another `device` or `results`
            dir=root,
            settings=_settings(),
        )
        self._run = run = self._begun(init)
        self._folder = Path(run.dir).parent
        run.define_metric("block/*", step_metric="block")
        run.summary.update({"status": "running", "reason": None})
        if run.offline and not self._told:
            self._told = True
            self._say_how_to_upload()

    def _begun(self, init: Callable[..., wandb.Run]) -> wandb.Run:
        """The run, offline if it cannot be online."""
        self._mode = self._mode or self._choose_mode()
        if self._mode == "online":
            try:
                return init(mode="online")
            except Exception as error:  # whatever the client raises
                self._go_offline(_one_line(error), logging.WARNING)
        return init(mode=self._mode)

    def _choose_mode(self) -> str:
        import wandb

        settings = wandb.setup().settings
        mode = self._wanted if self._wanted != "auto" else os.environ.get("WANDB_MODE") or settings.mode
        if mode != "online":
            return mode
        if not _logged_in(settings.base_url, settings.api_key):
            level = logging.INFO if self._wanted == "auto" else logging.WARNING
            return self._go_offline(f"not logged in to {settings.base_url}; to log in: wandb login", level)
        fault = server_fault()
        return self._go_offline(fault, logging.WARNING) if fault else "online"

    def _go_offline(self, reason: str, level: int) -> str:
        import wandb

        wandb.teardown()  # forgets the runs that did not begin or end, whose ids would count as in use
        self._mode, self._why_offline, self._level = "offline", reason, level
        return self._mode

    def _say_how_to_upload(self) -> None:
        # The client sorts the files of a run by their start, and appends those of later attempts.
        runs = f"{shlex.quote(str(self._folder.parent))}/offline-run-*"
        log.log(self._level, "W&B is offline (%s); to upload the runs later: wandb sync %s", self._why_offline, runs)

    def _close(self, summary: dict[str, Any], exit_code: int) -> None:
        run, self._run = self._run, None
        if run is None:
            return
        try:
            run.summary.update(summary)
            run.finish(exit_code)
        except TimeoutError:
            self._go_offline(f"the server took more than {FINISH_SECONDS} s to end a run", logging.WARNING)
            folder = shlex.quote(str(self._folder))
            log.warning("W&B: %s; to send what is missing: wandb sync --include-online %s", self._why_offline, folder)
        except Exception as error:  # whatever the client raises
            self._give_up(error)

    def _guard(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # whatever the client raises: a trial outlives its tracker
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._run = None
        log.warning("W&B: %s; this trial goes on untracked", _one_line(error))


def _log_held_out(run: wandb.Run, blocks: Sequence[Block]) -> None:
    """In steps after those of the blocks as they were quantized."""
    for block in blocks:
        if block.held_out is not None:
            errors = {"block/held_out_mse": block.held_out.mse, "block/held_out_relative_mse": block.held_out.relative}
            run.log({"block": block.index} | errors, step=blocks[-1].index + 1 + block.index, commit=True)


def _settings() -> wandb.Settings:
    """Quiet, and with limits to every wait, as far as the installed client has them."""
    import wandb

    wanted = {
        "init_timeout": INIT_SECONDS,
        "finish_timeout": FINISH_SECONDS,
        "finish_timeout_raises": True,
        "x_sync_dir_suffix": uuid.uuid4().hex[:6],  # two attempts within a second do not share a folder
    }
    known: dict[str, Any] = {name: value for name, value in wanted.items() if name in wandb.Settings.model_fields}
    return wandb.Settings(silent=True, console="off", **known)


def _logged_in(url: str, key: str | None) -> bool:
    """Whether the client will find credentials, by where it looks; asking the client may ask the server or the user."""
    if key or os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    try:
        known = netrc.netrc(Path(os.environ.get("NETRC") or "~/.netrc").expanduser())
        return known.authenticators(urlsplit(url).netloc) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def server_fault() -> str | None:
    """What is wrong with the user's W&B server, if it gives no sign of life in `PROBE_SECONDS`; else None."""
    import wandb

    url = wandb.setup().settings.base_url
    faults: list[str | None] = [f"{url} does not answer"]

    def ask() -> None:
        faults[0] = _answer_of(f"{url}/healthz")

    # In a thread, as a host's name may take longer to resolve than any timeout of a socket.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(PROBE_SECONDS)
    return faults[0]


def _answer_of(url: str) -> str | None:
    """The error that a GET request ends in, through the user's proxy if there is one; None for an answer."""
    try:
        urlopen(url, timeout=PROBE_SECONDS).close()
    except HTTPError as error:
        return f"{url}: HTTP {error.code}" if error.code >= 500 else None
    except URLError as error:  # a certificate that Python does not trust may be one that the client does
        return None if isinstance(error.reason, ssl.SSLError) else f"{url}: {error.reason}"
    except OSError as error:
        return f"{url}: {error}"
    return None


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
