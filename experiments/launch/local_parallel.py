"""Trials on worker processes of this machine: one a GPU, or several on the CPU."""

import logging
import os
import shutil
import subprocess
from collections.abc import Sequence
from typing import Any

from experiments.attempts import Attempts, Cancelled
from experiments.launch.driver import Board
from experiments.launch.local import tell_busy, wait_for
from experiments.launch.pool import Worker, run_all
from experiments.launch.settings import LocalParallelSettings
from experiments.schema import ConfigError
from experiments.store import ResultStore
from experiments.sweep import Sweep
from experiments.trial import Trial
from experiments.views.display import showing

log = logging.getLogger(__name__)


class LocalParallelLaunch:
    """A pool of workers; each sees its own GPU only, or its own number of threads."""

    def __init__(self, settings: LocalParallelSettings) -> None:
        self.settings: dict[str, Any] = settings.model_dump(by_alias=True)
        self._own = settings

    def check(self, sweep: Sweep) -> None:
        """Raise `ConfigError` for GPUs that are not there, or a device that leaves workers no choice."""
        environments(self._own, sweep.trials[0].config["device"])

    def __call__(self, pending: Sequence[Trial], board: Board) -> None:
        """Run the trials."""
        sweep, busy = board.sweep, []
        own = environments(self._own, pending[0].config["device"])[: len(pending)]
        log.info("workers: %d, each %s", len(own), _described(own[0]))
        folder = sweep.store.sweep(sweep.name) / "logs"
        workers = [Worker(one, folder / f"worker-{number}.log") for number, one in enumerate(own)]
        with showing(sweep.progress) as progress:
            shown = progress.track(range(len(pending)), "trials", len(pending))
            next(shown)

            def on_end(trial: Trial, state: str) -> None:
                if state == "cancelled":
                    raise Cancelled
                _tell(trial, state, sweep.store)
                if state == "busy":
                    busy.append(trial)
                next(shown, None)
                board.refresh()

            run_all(workers, pending, sweep.store, sweep.name, on_end)
        if self._own.busy == "wait" and busy:
            worker = Worker(own[0], folder / "worker-0.log")
            try:
                wait_for(busy, board, lambda trial: worker.run(sweep.store, sweep.name, trial) != "busy")
            finally:
                worker.close()


def environments(settings: LocalParallelSettings, device: str) -> list[dict[str, str]]:
    """The variables of each worker; raises `ConfigError` for GPUs that are not there, or a device without a choice."""
    visible = _visible_gpus() if device in ("auto", "cuda") else []
    if device.startswith("cuda:"):
        raise ConfigError(
            f"device={device}: workers get a GPU each; set device=cuda and hydra.launcher.gpus=[{device[5:]}]"
        )
    if device == "cpu" and settings.gpus:
        raise ConfigError(f"hydra.launcher.gpus={settings.gpus}: device=cpu uses none; leave one of them out")
    gpus = visible if settings.gpus is None else [str(gpu) for gpu in settings.gpus]
    missing = [gpu for gpu in gpus if gpu not in visible]
    if missing or (device == "cuda" and not gpus):
        raise ConfigError(
            f"hydra.launcher.gpus={settings.gpus}: this machine has {', '.join(visible) or 'no GPU'}; "
            "choose of these, or set device=cpu"
        )
    cores = len(os.sched_getaffinity(0))
    wanted = settings.workers or (len(gpus) if gpus else max(1, cores // 2))
    count = min(wanted, len(gpus)) if gpus else wanted
    threads = str(settings.threads or max(1, cores // count))
    own = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    return [own | {"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus[:count]] if gpus else [own] * count


def _described(environment: dict[str, str]) -> str:
    gpu = environment.get("CUDA_VISIBLE_DEVICES")
    return "on a GPU of its own" if gpu else f"of {environment['OMP_NUM_THREADS']} CPU threads"


def _tell(trial: Trial, state: str, store: ResultStore) -> None:
    if state == "done":
        record = store.record(trial.trial_id)
        assert record is not None
        log.info("trial %s: %s: KL %.4f", trial.trial_id, trial.name, record.metrics.kl)
    elif state == "failed":
        failure = store.failure(trial.trial_id)
        log.error("trial %s: %s: failed: %s", trial.trial_id, trial.name, failure.reason if failure else "no reason")
    elif state == "busy":
        running = Attempts(store, trial.trial_id).running()
        if running:
            tell_busy(trial, running)


def _visible_gpus() -> list[str]:
    """The GPUs of this machine that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is not None:
        return [gpu.strip() for gpu in allowed.split(",") if gpu.strip() not in ("", "-1")]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(
        ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True, timeout=60
    )
    return listed.stdout.split() if listed.returncode == 0 else []
