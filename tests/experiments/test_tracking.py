"""W&B through its real client, offline and against a small server; and that a tracker never fails a trial."""

import json
import logging
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from experiments.logs import logged
from experiments.records import Block, BlockError
from tests.experiments.conftest import ROOT, Cli, environment
from tests.experiments.test_store import record
from tests.experiments.wandb_server import Fault, serving

CHOICES = {"model": "tiny_llama", "format": "mxfp4", "transform": "wush", "algorithm": "rtn"}
KEY = "0123456789" * 4


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def log_records(data: bytes) -> Iterator[bytes]:
    """The records of a W&B file: a header of 7 bytes, then LevelDB's log format in blocks of 32 KiB."""
    position, parts = 7, b""
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a full record, or the last part of one
            yield parts
            parts = b""


def runs(folder: Path) -> list[list[Any]]:
    """Each offline run's messages, as the client wrote them."""
    from wandb.proto import wandb_internal_pb2 as pb

    return [
        [pb.Record.FromString(data) for data in log_records(path.read_bytes())]
        for path in sorted(folder.rglob("run-*.wandb"))
    ]


def field(messages: list[Any], kind: str) -> list[Any]:
    return [getattr(message, kind) for message in messages if message.WhichOneof("record_type") == kind]


def history_of(messages: list[Any]) -> list[dict[str, Any]]:
    return [
        {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in h.item} for h in field(messages, "history")
    ]


def summary_of(messages: list[Any]) -> dict[str, Any]:
    return {
        "/".join(i.nested_key) or i.key: json.loads(i.value_json) for s in field(messages, "summary") for i in s.update
    }


def test_a_trial_is_one_run_with_its_config_series_and_metrics(cli: Cli) -> None:
    done = cli.small("tracking=wandb", "sweep=mine", HOME=str(cli.folder))
    assert done.returncode == 0, done.stderr
    trial_id = next(cli.folder.rglob("result.json")).parent.name
    metrics = json.loads(next(cli.folder.rglob("result.json")).read_text())["metrics"]
    (messages,) = runs(cli.folder)
    run = field(messages, "run")[0]
    assert run.run_id == trial_id
    assert run.run_group == "mine"
    assert set(run.tags) == {"tiny_llama", "mxfp4", "wush", "rtn"}
    assert run.job_type == "rtn"
    logged = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert logged["format"] == {"_target_": "wush.Mxfp4", "scale_rule": "paper"}
    assert {key: logged["choices"][key] for key in CHOICES} == CHOICES
    blocks = history_of(messages)
    assert [row["block"] for row in blocks] == [0, 1, 0, 1]
    assert all(row["block/mse"] > 0 for row in blocks[:2])
    assert all(row["block/held_out_mse"] > 0 for row in blocks[2:])
    summary = summary_of(messages)
    assert (summary["status"], summary["reason"]) == ("done", None)
    assert summary["kl"] == metrics["kl"]
    assert summary["perplexity"] == metrics["perplexity"]
    assert done.stderr.count(f"wandb sync {cli.folder}/results/wandb/offline-run-*") == 1


def test_a_sweep_says_once_how_to_upload_and_does_not_log_a_done_trial_again(cli: Cli) -> None:
    cli.small("tracking=wandb", "format=mxfp4", HOME=str(cli.folder))
    both = cli.small("-m", "tracking=wandb", "format=mxfp4,nvfp4,int4", HOME=str(cli.folder))
    assert both.stderr.count("wandb sync") == 1
    logged = [field(messages, "run")[0].run_id for messages in runs(cli.folder)]
    assert len(logged) == len(set(logged)) == 3


def test_a_baselines_run_names_only_what_it_uses(cli: Cli) -> None:
    cli.small("tracking=wandb", "format=original", HOME=str(cli.folder))
    ((run, *_),) = [field(messages, "run") for messages in runs(cli.folder)]
    assert (run.display_name, set(run.tags)) == ("tiny_llama original", {"tiny_llama", "original"})


def test_a_trackers_warning_is_no_warning_about_the_result(tmp_path: Path) -> None:
    messages: list[str] = []
    with logged(tmp_path / "trial.log", messages):
        for name in ("wush.walk", "experiments.trial", "experiments.tracking", "transformers"):
            logging.getLogger(name).warning(name)
    assert messages == ["wush.walk", "experiments.trial"]


def test_a_failed_trial_marks_its_run_failed_with_the_reason(cli: Cli) -> None:
    failed = cli.small("tracking=wandb", "model.hidden_size=40", "model.heads=4", HOME=str(cli.folder))
    assert failed.returncode == 1
    (messages,) = runs(cli.folder)
    summary = summary_of(messages)
    assert summary["status"] == "failed"
    assert "not a multiple of the group size" in summary["reason"]
    assert field(messages, "exit")[0].exit_code == 1


# --- attempts of one trial, each in a process of its own, as a requeued job has them

ATTEMPT = """
import logging, sys
from pathlib import Path
from experiments.tracking import WandbTracking
from tests.experiments.test_store import record
from tests.experiments.test_tracking import CHOICES, a_block

logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
root, mode, ending, trials, blocks = sys.argv[1:]
tracking = WandbTracking("wush", None, mode)
for trial_id in trials.split(","):
    tracking.start(trial_id, CHOICES, {"seed": 0, "device": blocks}, "my sweep", Path(root))
    for index in blocks.split(","):
        tracking.block(a_block(int(index)))
    print("running", flush=True)
    sys.stdin.readline()
    if ending == "finish":
        tracking.finish(record(trial_id))
    else:
        getattr(tracking, ending)("node went away")
"""


def a_block(index: int) -> Block:
    error = BlockError(mse=1.0, relative=0.1)
    return Block(index=index, name="b", calibration=error, held_out=error, seconds=1.0, layers=[])


def variables(home: Path, url: str, **more: str) -> dict[str, str]:
    own = {name: value for name, value in environment().items() if not name.startswith("WANDB_")}
    bin_ = str(Path(sys.executable).parent)
    return own | {
        "HOME": str(home),
        "NETRC": str(home / "netrc"),
        "PATH": f"{bin_}{os.pathsep}{own['PATH']}",
        "WANDB_BASE_URL": url,
        "WANDB_API_KEY": KEY,
        **more,
    }


def begin(
    root: Path, url: str, blocks: str, ending: str = "finish", mode: str = "auto", trials: str = "abc123", **more: str
) -> subprocess.Popen[str]:
    root.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-c", ATTEMPT, str(root), mode, ending, trials, blocks],
        cwd=ROOT,
        env=variables(root.parent, url, **more),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def attempt(root: Path, url: str, blocks: str, *arguments: str, **more: str) -> tuple[str, float]:
    """What an attempt says, and how many seconds its process took in all."""
    began = time.monotonic()
    process = begin(root, url, blocks, *arguments, **more)
    _, said = process.communicate("\n\n", timeout=60)
    assert process.returncode == 0, said
    return said, time.monotonic() - began


def pasted(said: str, home: Path, url: str) -> None:
    """Runs the upload command that was said, in a shell."""
    (command,) = re.findall(r"wandb sync .*", said)
    done = subprocess.run(
        command, shell=True, cwd="/", env=variables(home, url), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_attempts_offline_upload_as_one_run_with_one_series_by_the_command_that_was_said(tmp_path: Path) -> None:
    root = tmp_path / "it's a folder"
    first, _ = attempt(root, "http://127.0.0.1:1", "0,1", "interrupt", "offline")
    time.sleep(1)  # W&B orders attempts by the second they began in
    attempt(root, "http://127.0.0.1:1", "2,3", "finish", "offline")
    with serving() as server:
        pasted(first, tmp_path, server.url)
        assert [row["block"] for row in server.history] == [0, 1, 2, 3]
        assert [row["_step"] for row in server.history] == [0, 1, 2, 3]
        assert (server.run["name"], server.run["groupName"], server.run["jobType"]) == ("abc123", "my sweep", "rtn")
        assert (server.summary["status"], server.summary.get("reason")) == ("done", None)


def test_attempts_online_are_one_run_and_a_block_computed_twice_is_one_point(tmp_path: Path) -> None:
    with serving() as server:
        attempt(tmp_path / "r", server.url, "0,1", "interrupt")
        assert server.summary["status"] == "interrupted"
        assert server.summary["reason"] == "node went away"
        assert any(end.get("preempting") for end in server.ends)
        assert server.ends[-1]["exitcode"] == 1
        attempt(tmp_path / "r", server.url, "1,2")
        assert [row["block"] for row in server.history] == [0, 1, 2]
        assert (server.summary["status"], server.summary.get("reason")) == ("done", None)
        assert server.summary["kl"] == record("abc123").metrics.kl
        assert server.ends[-1]["exitcode"] == 0


def test_an_interrupted_attempt_is_preempted_in_its_offline_file_too(tmp_path: Path) -> None:
    attempt(tmp_path / "r", "http://127.0.0.1:1", "0", "interrupt", "offline")
    (messages,) = runs(tmp_path / "r")
    assert len(field(messages, "preempting")) == 1
    assert field(messages, "exit")[0].exit_code == 1
    assert summary_of(messages)["status"] == "interrupted"


# --- a server that is ill


@pytest.mark.parametrize(
    ("mode", "fault", "healthy", "said", "bound"),
    [
        ("auto", "closed", False, "Connection refused", 5),
        ("online", "closed", False, "Connection refused", 5),
        ("auto", "silent", False, "does not answer", 8),
        ("auto", 500, False, "HTTP 500", 5),
        ("auto", 401, False, "error 401", 6),
        ("auto", "silent", True, "deadline exceeded", 15),
        ("online", 500, True, "HTTP 500", 15),
    ],
)
def test_a_server_that_does_not_serve_costs_seconds_and_no_data(
    mode: str, fault: Fault, healthy: bool, said: str, bound: float, tmp_path: Path
) -> None:
    with serving(None if fault == "closed" else fault, healthy) as server:
        url = f"http://127.0.0.1:{closed_port()}" if fault == "closed" else server.url
        text, seconds = attempt(tmp_path / "r", url, "0,1", "finish", mode, "abc123,def456")
    assert seconds < bound
    assert text.count("WARNING") == 1
    assert re.search(rf"WARNING W&B is offline \(.*{said}.*\); to upload the runs later: wandb sync", text)
    for messages in runs_offline(tmp_path / "r"):
        assert [row["block"] for row in history_of(messages)] == [0, 1]
        assert summary_of(messages)["status"] == "done"
    assert {field(messages, "run")[0].run_id for messages in runs_offline(tmp_path / "r")} == {"abc123", "def456"}


@pytest.mark.parametrize("fault", ["silent", 500])
def test_a_server_that_dies_during_a_trial_costs_seconds_and_what_is_missing_can_be_sent_later(
    fault: Fault, tmp_path: Path
) -> None:
    with serving() as server:
        process = begin(tmp_path / "r", server.url, "0,1")
        assert process.stdout is not None
        process.stdout.readline()
        server.fault = fault
        began = time.monotonic()
        _, said = process.communicate("\n", timeout=60)
        assert time.monotonic() - began < 15
    assert said.count("WARNING W&B: the server took more than") == 1
    with serving() as server:
        pasted(said, tmp_path, server.url)
        assert [row["block"] for row in server.history] == [0, 1]
        assert server.summary["status"] == "done"


@pytest.mark.parametrize("next_trial", ["def456", "abc123"])
def test_a_trial_after_one_whose_server_died_is_offline_at_once(next_trial: str, tmp_path: Path) -> None:
    with serving() as server:
        process = begin(tmp_path / "r", server.url, "0", trials=f"abc123,{next_trial}")
        assert process.stdout is not None
        process.stdout.readline()
        server.fault = "silent"
        began = time.monotonic()
        _, said = process.communicate("\n\n", timeout=60)
    assert time.monotonic() - began < 15
    assert [field(messages, "run")[0].run_id for messages in runs_offline(tmp_path / "r")] == [next_trial]
    assert "W&B is offline (the server took more than" in said


def runs_offline(root: Path) -> list[list[Any]]:
    return [messages for folder in sorted(root.glob("wandb/offline-run-*")) for messages in runs(folder)]


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


def test_a_folder_that_cannot_be_written_leaves_the_trial_untracked(tmp_path: Path) -> None:
    root = tmp_path / "r"
    root.mkdir()
    (root / "wandb").write_text("a file where the client wants its folder")
    said, seconds = attempt(root, "http://127.0.0.1:1", "0,1", "finish", "offline")
    assert seconds < 5
    assert len(re.findall(r"WARNING W&B: .*; this trial goes on untracked", said)) == 1


@pytest.mark.parametrize("ending", ["finish", "fail", "interrupt"])
def test_a_client_that_dies_during_a_trial_does_not_take_the_trial_with_it(ending: str, tmp_path: Path) -> None:
    process = begin(tmp_path / "r", "http://127.0.0.1:1", "0", ending, "offline")
    assert process.stdout is not None
    process.stdout.readline()
    (client,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(client), signal.SIGKILL)
    _, said = process.communicate("\n", timeout=60)
    assert process.returncode == 0, said
    assert said.count("this trial goes on untracked") == 1


# --- which mode


@pytest.mark.parametrize("login", ["none", "variable", "netrc"])
def test_auto_is_online_for_who_is_logged_in(login: str, tmp_path: Path) -> None:
    with serving() as server:
        if login == "netrc":
            netloc = server.url.removeprefix("http://")
            (tmp_path / "netrc").write_text(f"machine {netloc} login user password {KEY}\n")
        said, _ = attempt(tmp_path / "r", server.url, "0", WANDB_API_KEY=KEY if login == "variable" else "")
        assert bool(server.history) == (login != "none")
    assert ("INFO W&B is offline (not logged in" in said) == (login == "none")


def test_auto_heeds_what_the_environment_says(tmp_path: Path) -> None:
    with serving() as server:
        said, _ = attempt(tmp_path / "r", server.url, "0", WANDB_MODE="offline")
        assert server.requests == 0
    assert "INFO W&B is offline" in said


def test_a_key_that_is_none_keeps_the_run_offline(tmp_path: Path) -> None:
    with serving() as server:
        said, _ = attempt(tmp_path / "r", server.url, "0", WANDB_API_KEY="short")
    assert re.search(r"WARNING W&B is offline \(.*API key", said)
    assert len(runs_offline(tmp_path / "r")) == 1


def test_without_a_tracker_the_client_is_not_imported(cli: Cli) -> None:
    done = cli.small("tracking=none", "format=mxfp4", PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0, done.stderr
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "experiments" in imported
    assert not imported & {"wandb", "wandb_workspaces"}
