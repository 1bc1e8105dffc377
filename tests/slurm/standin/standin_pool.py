"""In place of the worker pool: a trial's id says what its worker process does; what happened is a line in a file."""

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

WORK = {
    "quick": "",
    "steps": """
import pathlib, time
done = pathlib.Path(FOLDER, "done")
while done.stat().st_size < STEPS if done.exists() else True:
    with done.open("a") as file: file.write("x")
    time.sleep(0.2)
""",
    "hog": "import time\nkept = []\nwhile True: kept.append(b'x' * (20 << 20)); time.sleep(0.05)",
}
_workers: list[subprocess.Popen[bytes]] = []
_folder = Path()


def run_in_job(root: str, sweep_name: str, trial_id: str) -> None:
    global _folder
    _folder = Path(root, "trials", trial_id)
    _folder.mkdir(parents=True, exist_ok=True)
    kind, _, number = trial_id.split(".")[0].partition("-")
    code = WORK[kind].replace("FOLDER", repr(str(_folder))).replace("STEPS", number or "0")
    _workers.append(subprocess.Popen([sys.executable, "-S", "-c", code]))
    _say(f"started with {os.environ['SLURM_CPUS_PER_TASK']} cpus, worker {_workers[-1].pid}")
    while _workers[-1].poll() is None:
        with suppress(subprocess.TimeoutExpired):
            _workers[-1].wait(0.1)
    _say(f"ended {_workers[-1].returncode}")


def interrupt() -> None:
    for worker in _workers:
        worker.kill()
    _say("interrupted")


def give_up(root: str, sweep_name: str, trial_id: str, kind: str, reason: str) -> None:
    _say(f"gave up, {kind}: {reason}")


def _say(line: str) -> None:
    with (_folder / "events").open("a") as file:
        file.write(line + "\n")
