"""The result store: whole files or none, damaged ones moved aside, rows by query."""

import errno
import json
import os
from pathlib import Path

import pytest

from experiments.records import (
    SCHEMA_VERSION,
    Block,
    BlockError,
    Data,
    Failure,
    Layer,
    LayerLoss,
    Metrics,
    Record,
    Result,
    Stage,
    Task,
    TaskRun,
    Windows,
    now,
)
from experiments.schema import ConfigError
from experiments.store import DamagedRecord, ResultStore, write_atomically
from wush.version import METHOD_VERSION


def record(trial_id: str, kl: float = 0.1) -> Record:
    return Record(
        trial_id=trial_id,
        choices={"model": "tiny_llama", "format": "mxfp4"},
        config={"seed": 0, "quantize": {"exclude": []}},
        metrics=Metrics(
            perplexity=20.0, perplexity_original=14.0, kl=kl, top1=0.7, bits_per_weight=4.25, predictions=62
        ),
        blocks=[],
        skipped={},
        stages={
            "load": Stage(seconds=1.5, peak_memory_bytes=1000, peak_gpu_memory_bytes=None),
            "evaluate": Stage(seconds=2.0, peak_memory_bytes=None, peak_gpu_memory_bytes=None),
        },
        data={},
        seed=0,
        warnings=[],
        versions={"python": "3.11"},
        git_commit=None,
        model_revision=None,
        method_version=METHOD_VERSION,
        environment={"host": "here", "device": "cpu: test"},
        started_at=now(),
        finished_at=now(),
    )


def stored(root: Path, *records: Record) -> ResultStore:
    store = ResultStore(root)
    for one in records:
        store.begin(one.trial_id, "seed: 0\n")
        store.finish(one)
    return store


def test_a_record_comes_back_as_it_was(tmp_path: Path) -> None:
    original = record("a1")
    assert stored(tmp_path, original).record("a1") == original
    assert ResultStore(tmp_path).record("b2") is None


def test_a_record_of_another_schema_version_is_not_taken_for_one_and_stays(tmp_path: Path) -> None:
    store = stored(tmp_path, record("a1"))
    path = store.trial("a1") / "result.json"
    other = path.read_text().replace(f'"schema_version": {SCHEMA_VERSION}', '"schema_version": 99')
    path.write_text(other)
    for read in (store.record, store.finished):
        with pytest.raises(ConfigError, match=r"a1/result.json: written by schema version 99.*move the file away"):
            read("a1")
    assert path.read_text() == other


def test_reading_a_damaged_record_changes_nothing(tmp_path: Path) -> None:
    store = stored(tmp_path, record("a1"))
    (store.trial("a1") / "result.json").write_text("{")
    with pytest.raises(DamagedRecord, match="a1"):
        store.record("a1")
    assert (store.trial("a1") / "result.json").read_text() == "{"


def test_a_damaged_record_that_another_process_moved_first_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = stored(tmp_path, record("a1"))
    path = store.trial("a1") / "result.json"
    path.write_text("{")
    read = Path.read_bytes

    def read_and_lose(self: Path) -> bytes:
        content = read(self)
        self.unlink()
        return content

    monkeypatch.setattr(Path, "read_bytes", read_and_lose)
    assert store.finished("a1") is None


def test_records_damaged_again_are_all_kept(tmp_path: Path) -> None:
    store = stored(tmp_path, record("a1"))
    for content in ("one", "two"):
        (store.trial("a1") / "result.json").write_text(content)
        assert store.finished("a1") is None
    aside = store.trial("a1").glob("result.damaged-*.json")
    assert {path.read_text() for path in aside} == {"one", "two"}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_metrics_are_finite(value: float) -> None:
    with pytest.raises(ValueError, match="finite number"):
        record("a1", kl=value)


@pytest.mark.parametrize("content", ["", "{", '{"trial_id": "a1"}', "\x00\x00"])
def test_a_damaged_record_is_moved_aside_and_reported(
    content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = stored(tmp_path, record("a1"))
    (store.trial("a1") / "result.json").write_text(content)
    assert store.finished("a1") is None
    assert "a1" in caplog.text
    assert "damaged" in caplog.text
    aside = list(store.trial("a1").glob("result.damaged-*.json"))
    assert [path.read_text() for path in aside] == [content]


def test_beginning_again_forgets_the_earlier_failure(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    store.begin("a1", "")
    failure = Failure(
        trial_id="a1", reason="out of memory", kind="OutOfMemoryError", host="here", environment={}, failed_at=now()
    )
    store.fail(failure)
    assert store.failure("a1") == failure
    store.begin("a1", "")
    assert store.failure("a1") is None


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "result.json"
    write_atomically(path, "old")

    def full_disk(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match=r"No space left on device: '.*/result.json'"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_a_folder_that_cannot_be_written_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"results=.*cannot be written.*set results="):
        ResultStore(tmp_path / "file" / "results").check_writable()


def test_rows_come_in_the_order_asked_for_and_only_for_finished_trials(tmp_path: Path) -> None:
    store = stored(tmp_path, record("a1", 0.1), record("b2", 0.2), record("c3", 0.3))
    (store.trial("c3") / "result.json").unlink()
    rows = store.table(["b2", "c3", "a1"])
    assert [(row["trial_id"], row["metrics.kl"], row["choices.format"], row["seconds"]) for row in rows] == [
        ("b2", 0.2, "mxfp4", 3.5),
        ("a1", 0.1, "mxfp4", 3.5),
    ]
    assert store.table([]) == []


def test_records_are_plain_json(tmp_path: Path) -> None:
    store = stored(tmp_path, record("a1"))
    assert json.loads((store.trial("a1") / "result.json").read_text())["metrics"]["kl"] == 0.1


def whole(trial_id: str) -> Record:
    """A record with everything that a result takes from it."""
    layers = [Layer(name="mlp.up_proj", shared_input=["mlp.up_proj"], bits_per_weight=4.25, weights=10)]
    blocks = [
        Block(
            index=i,
            name=f"model.layers.{i}",
            seconds=1.0,
            calibration=BlockError(mse=0.5, relative=0.1 / (i + 1)),
            held_out=BlockError(mse=0.5, relative=0.2 / (i + 1)) if i else None,
            layers=layers,
        )
        for i in range(3)
    ]
    data = {"evaluation": Data(text_sha256="a" * 64, ids_sha256="b" * 64, tokens=64)}
    update = {"blocks": blocks, "data": data, "attempts": 3, "restored_blocks": 2, "model_note": "read dequantized"}
    windows = Windows(nll=[9.5, 8], nll_original=[9, 7.5], kl=[0.25, 0.5], agree=[3, 4], predictions=[4, 5])
    runs = [
        TaskRun(seed=seed, values={"acc,none": 0.5}, stderrs={}, seconds=1.0, outcomes=[seed, 1 - seed, 1.0, 0.0])
        for seed in (0, 1)
    ]
    about = {"version": "1", "harness": "0", "num_fewshot": 0, "chat_template": False, "samples": 4}
    known = Task(name="easy", metric="acc,none", higher_is_better=True, runs=runs, **about)  # type: ignore[arg-type]
    unknown = known.model_copy(update={"runs": [runs[0].model_copy(update={"outcomes": []})]})
    update |= {"windows": windows, "tasks": {"easy": known, "late": unknown}, "method_version": 1}
    return record(trial_id).model_copy(update=update)


def test_results_read_in_bulk_are_those_of_the_records_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [f"{i:016x}" for i in range(7)]
    records = [whole(trial_id) if i % 2 else record(trial_id, i / 10) for i, trial_id in enumerate(ids)]
    store = stored(tmp_path, *records)
    monkeypatch.setattr("experiments.query.FILES_AT_ONCE", 3)
    monkeypatch.setattr(ResultStore, "record", None)  # every one is read by the query
    asked = [*reversed(ids), "0" * 15 + "f"]
    found = store.results(asked)
    assert list(found.values()) == [Result.of(one) for one in reversed(records)]
    assert {one.method_version for one in found.values()} == {1, METHOD_VERSION}, "of a record that does not say, 1"
    light = found[ids[1]]
    assert light.outcomes == {"easy": [0.5, 0.5, 1.0, 0.0]}
    assert light.windows is not None
    assert light.model_note == "read dequantized"
    assert store.results([]) == {}


def test_a_record_of_before_attempts_were_counted_has_one(tmp_path: Path) -> None:
    store = stored(tmp_path, record("a1"))
    path = store.trial("a1") / "result.json"
    content = json.loads(path.read_text())
    del content["attempts"], content["restored_blocks"]
    path.write_text(json.dumps(content))
    assert (store.results(["a1"])["a1"].attempts, store.results(["a1"])["a1"].restored_blocks) == (1, 0)
    assert store.results(["a1"])["a1"] == Result.of(store.record("a1") or record(""))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"schema_version": 4}',
        b'{"schema_version": 5}',
        b"KEEP\x00",
        b"WITHOUT metrics",
    ],
)
@pytest.mark.parametrize("mend", [True, False])
def test_a_damaged_record_among_many_costs_no_other_its_result(
    content: bytes, mend: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = stored(tmp_path, record("a1"), record("b2"), record("c3"))
    path = store.trial("b2") / "result.json"
    if content == b"WITHOUT metrics":
        content = path.read_bytes().replace(b'"kl": 0.1', b'"kl": null')
    elif content == b"KEEP\x00":
        content = path.read_bytes()[:-40]
    path.write_bytes(content)
    assert list(store.results(["a1", "b2", "c3"], mend=mend)) == ["a1", "c3"]
    assert "trial b2: its result.json is damaged" in caplog.text
    aside = list(path.parent.glob("result.damaged-*.json"))
    assert [one.read_bytes() for one in (aside if mend else [path])] == [content]
    assert path.exists() is not mend


def test_records_of_another_schema_version_are_all_named(tmp_path: Path) -> None:
    store = stored(tmp_path, record("a1"), record("b2"), record("c3"))
    for trial_id in ("a1", "c3"):
        path = store.trial(trial_id) / "result.json"
        path.write_text(path.read_text().replace(f'"schema_version": {SCHEMA_VERSION}', '"schema_version": 2'))
    with pytest.raises(ConfigError) as raised:
        store.results(["a1", "b2", "c3"], mend=True)
    assert [line.partition(": ")[0][-14:] for line in str(raised.value).splitlines()] == [
        "a1/result.json",
        "c3/result.json",
    ]
    assert len(list(tmp_path.rglob("result.json"))) == 3


def of_version_4(record: Record) -> str:
    """A record's file as schema version 4 had it."""
    content = json.loads(record.model_dump_json())
    for block in content["blocks"]:
        del block["held_out"]
        error = block.pop("calibration")
        block |= {"mse": error["mse"], "relative_mse": error["relative"]}
        for layer in block["layers"]:
            if layer["loss"]:
                for new in ("paper_fp", "paper_int"):
                    del layer["loss"][new]
                layer["loss"]["predicted"] = layer["loss"].pop("even")
    for new in ("windows", "lost", "method_version", "model_note"):
        del content[new]
    del content["metrics"]["quantized_share"]
    return json.dumps(content | {"schema_version": 4})


def test_records_of_schema_version_4_are_read_one_by_one_and_in_bulk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = whole("a1")
    loss = LayerLoss(mse=0.5, relative=0.1, even=3.0, bound=2.0)
    new.blocks[0].layers[0].loss = loss
    store = stored(tmp_path, new)
    (store.trial("a1") / "result.json").write_text(of_version_4(new))
    read = store.record("a1")
    assert read is not None
    assert [block.calibration for block in read.blocks] == [block.calibration for block in new.blocks]
    assert all(block.held_out is None for block in read.blocks)
    assert read.blocks[0].layers[0].loss == loss
    assert (read.schema_version, read.windows, read.lost, read.method_version) == (SCHEMA_VERSION, None, {}, 1)
    assert read.metrics == new.metrics
    monkeypatch.setattr(ResultStore, "record", None)
    assert store.results(["a1"])["a1"] == Result.of(read)


def test_a_damaged_record_of_schema_version_4_is_a_damaged_record(tmp_path: Path) -> None:
    store = stored(tmp_path, whole("a1"))
    path = store.trial("a1") / "result.json"
    content = json.loads(of_version_4(whole("a1")))
    del content["blocks"][1]["relative_mse"]
    path.write_text(json.dumps(content))
    with pytest.raises(DamagedRecord, match="relative_mse"):
        store.record("a1")


def test_lists_of_windows_are_of_one_length() -> None:
    values = {"nll": [1.0, 2.0], "nll_original": [1.0, 2.0], "kl": [0.1, 0.2], "agree": [3, 4], "predictions": [7, 7]}
    assert Windows.model_validate(values).agree == [3, 4]
    with pytest.raises(ValueError, match="equal length"):
        Windows.model_validate(values | {"kl": [0.1]})


def test_a_record_of_another_version_of_the_method_is_shown_and_never_counts_as_done(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = stored(tmp_path, record("a1").model_copy(update={"method_version": METHOD_VERSION - 1}))
    shown = store.record("a1")
    assert shown is not None
    assert shown.method_version == METHOD_VERSION - 1
    assert store.finished("a1") is None
    assert f"made by version {METHOD_VERSION - 1} of the method, and this is {METHOD_VERSION}" in caplog.text
    (aside,) = store.trial("a1").glob("result.old-*.json")
    assert Record.model_validate_json(aside.read_bytes()) == shown


def test_the_original_model_of_old_records_has_its_present_name_one_by_one_and_in_bulk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = record("a1").model_copy(update={"choices": {"model": "tiny_llama", "format": "bf16"}})
    store = stored(tmp_path, old)
    (store.trial("a1") / "result.json").write_text(of_version_4(old))
    read = store.record("a1")
    assert read is not None
    assert read.choices == {"model": "tiny_llama", "format": "original"}
    monkeypatch.setattr(ResultStore, "record", None)
    assert store.results(["a1"])["a1"].choices == read.choices


@pytest.mark.parametrize(("prefix", "count"), [("", 2), ("a", 1), ("/tmp", 0), ("*", 0), ("../", 0)])
def test_the_beginning_of_an_id_is_no_pattern_and_no_path(prefix: str, count: int, tmp_path: Path) -> None:
    assert len(stored(tmp_path, record("aa"), record("bb")).ids(prefix)) == count
