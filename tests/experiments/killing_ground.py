"""Runs one small trial in forked processes, kills them at seeded points, and lets the next one go on.

A process of its own, as it must fork before torch starts threads: `python -m tests.experiments.killing_ground FOLDER`.
Half of the points are moments in time, half are file operations: before or after a rename, a link or an fsync.
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from experiments import sweep
from experiments.records import Record
from experiments.sweep import Sweep
from experiments.tracking import NoTracking
from experiments.trial import TrialRunner
from tests.experiments.conftest import composed
from wush.progress import Silent

POINTS = 24
LAYERS = 4
OPERATIONS = ("replace", "link", "fsync")


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    run(planned(folder / "whole"))  # here, so that the forks find everything imported
    started = time.monotonic()
    assert child(planned(folder / "timed"), lambda: None) == 0
    seconds = time.monotonic() - started
    operations = count_operations(planned(folder / "counted"), folder / "operations")
    for seed in range(POINTS):
        chance = random.Random(seed)
        own = planned(folder / str(seed))
        kills = [
            kill_once(own, chance, seconds, operations, timed=seed % 2 == 0) for _ in range(chance.choice((1, 1, 2)))
        ]
        saved = len(list(blocks(own)))
        assert child(own, lambda: None) == 0
        print(json.dumps({"seed": seed, "kills": kills, "saved": saved}), flush=True)


def planned(folder: Path) -> Sweep:
    own = (f"results={folder}", "keep_blocks=true", "algorithm=gptq", f"model.layers={LAYERS}")
    return sweep.plan([composed(*own)], [])


def blocks(own: Sweep) -> list[Path]:
    return sorted((own.store.trial(own.trials[0].trial_id) / "blocks").glob("[0-9]*.safetensors"))


def kill_once(own: Sweep, chance: random.Random, seconds: float, operations: int, timed: bool) -> str:
    if timed:
        moment = chance.uniform(0, seconds)
        killed = child(own, lambda: None, moment)
        return f"after {moment:.2f} s" if killed else "finished before"
    number, before = chance.randrange(1, operations + 1), chance.random() < 0.5
    killed = child(own, lambda: kill_at(number, before))
    return f"{'before' if before else 'after'} operation {number}" if killed else "finished before"


def run(own: Sweep) -> None:
    assert isinstance(TrialRunner(own.store, own.name, NoTracking(), Silent()).run(own.trials[0]), Record)


def child(own: Sweep, prepare: Callable[[], None], kill_after: float | None = None) -> int:
    """Run the trial in a fork; its exit status, not 0 when it was killed."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            prepare()
            run(own)
            status = 0
        finally:
            os._exit(status)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    assert status in (0, signal.SIGKILL), f"the trial ended with {status}"
    return status


def kill_at(number: int, before: bool) -> None:
    """Have this process kill itself around its `number`-th file operation."""
    left = [number]

    def watched(operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] == 0 and before:
                os.kill(os.getpid(), signal.SIGKILL)
            found = operation(*arguments, **options)
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return found

        return call

    for name in OPERATIONS:
        setattr(os, name, watched(getattr(os, name)))


def count_operations(own: Sweep, file: Path) -> int:
    """How many file operations an uninterrupted trial makes."""

    def count() -> None:
        def watched(operation: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **options: Any) -> Any:
                with file.open("a") as counted:
                    counted.write(".")
                return operation(*arguments, **options)

            return call

        for name in OPERATIONS:
            setattr(os, name, watched(getattr(os, name)))

    assert child(own, count) == 0
    return len(file.read_text())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
