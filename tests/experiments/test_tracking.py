"""W&B through its real client, offline; and that a tracker never fails a trial."""

import json
import logging
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from experiments.records import Block
from experiments.tracking import WandbTracking
from experiments.trial import _logged
from tests.experiments.conftest import Cli, config
from tests.experiments.test_store import record

CHOICES = {"model": "tiny_llama", "format": "mxfp4", "transform": "wush", "algorithm": "rtn"}


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
    blocks = [
        {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in h.item} for h in field(messages, "history")
    ]
    assert [row["block"] for row in blocks] == [0, 1]
    assert all(row["block/mse"] > 0 for row in blocks)
    summary = {
        "/".join(i.nested_key) or i.key: json.loads(i.value_json) for s in field(messages, "summary") for i in s.update
    }
    assert summary["kl"] == metrics["kl"]
    assert summary["perplexity"] == metrics["perplexity"]
    assert done.stderr.count(f"wandb sync {cli.folder}/results/wandb/offline-run-*") == 1


def test_a_sweep_says_once_how_to_upload_and_which_trials_are_not_logged_again(cli: Cli) -> None:
    cli.small("tracking=wandb", "format=mxfp4", HOME=str(cli.folder))
    done = next(cli.folder.rglob("result.json")).parent.name
    both = cli.small("-m", "tracking=wandb", "format=mxfp4,nvfp4,int4", HOME=str(cli.folder))
    assert both.stderr.count("wandb sync") == 1
    assert re.findall(r"trial (\w+): already done, not logged again", both.stderr) == [done]
    assert len(runs(cli.folder)) == 3


def test_a_baselines_run_names_only_what_it_uses(cli: Cli) -> None:
    cli.small("tracking=wandb", "format=bf16", HOME=str(cli.folder))
    ((run, *_),) = [field(messages, "run") for messages in runs(cli.folder)]
    assert (run.display_name, set(run.tags)) == ("tiny_llama bf16", {"tiny_llama", "bf16"})


def test_a_trackers_warning_is_no_warning_about_the_result(tmp_path: Path) -> None:
    messages: list[str] = []
    with _logged(tmp_path / "trial.log", messages):
        for name in ("wush.walk", "experiments.trial", "experiments.tracking", "transformers"):
            logging.getLogger(name).warning(name)
    assert messages == ["wush.walk", "experiments.trial"]


def test_a_trial_run_again_continues_the_same_run(tmp_path: Path) -> None:
    tracking = WandbTracking("wush", None, "offline")
    for _ in range(2):
        tracking.start("abc123", CHOICES, config(), "sweep", tmp_path)
        tracking.block(Block(index=0, name="b", mse=1.0, relative_mse=0.1, seconds=1.0, layers=[]))
        tracking.finish(record("abc123"))
    assert {field(messages, "run")[0].run_id for messages in runs(tmp_path)} == {"abc123"}


def test_a_failed_trial_marks_its_run_failed_with_the_reason(cli: Cli) -> None:
    failed = cli.small("tracking=wandb", "model.hidden_size=40", "model.heads=4", HOME=str(cli.folder))
    assert failed.returncode == 1
    (messages,) = runs(cli.folder)
    summary = {i.key: json.loads(i.value_json) for s in field(messages, "summary") for i in s.update}
    assert summary["status"] == "failed"
    assert "not a multiple of the group size" in summary["reason"]
    assert field(messages, "exit")[0].exit_code == 1


def test_a_client_that_raises_is_a_warning_and_the_trial_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import wandb

    def down(**_: object) -> None:
        raise wandb.errors.CommError("server down")

    monkeypatch.setattr(wandb, "init", down)
    tracking = WandbTracking("wush", None, "offline")
    tracking.start("abc123", CHOICES, config(), "sweep", tmp_path)
    tracking.block(Block(index=0, name="b", mse=1.0, relative_mse=0.1, seconds=1.0, layers=[]))
    tracking.finish(record("abc123"))
    assert caplog.text.count("this trial goes on untracked") == 1
    assert "server down" in caplog.text
