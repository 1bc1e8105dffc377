"""What is read of result records, and what is said of those that cannot be used."""

import json
import math
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

import plots.__main__ as command
import wush
from plots import records as reading
from plots.numbers import Number, difference, mean_of
from plots.records import RULES, NoRecords, load
from plots.settings import Setting, by_key, method, select
from plots.tables.table import ours
from tests.plots.conftest import record, store
from wush.intervals import Interval, of_runs
from wush.version import METHOD_VERSION


def test_a_store_and_a_folder_of_records_give_the_same_trials(tmp_path: Path) -> None:
    made = [record("bf16"), record("mxfp4", "h"), record(mse={3: 0.5}, blocks=[3])]
    store(tmp_path / "store", *made)
    (tmp_path / "plain" / "table1").mkdir(parents=True)
    for number, one in enumerate(made):
        (tmp_path / "plain" / "table1" / f"{number}.json").write_text(one.model_dump_json())
    found = load([tmp_path / "store"])
    assert len(found.trials) == 3
    assert [one.trial_id for one in found.trials] == [one.trial_id for one in load([tmp_path / "plain"]).trials]
    by_format = {(one.format, one.transform): one for one in found.trials}
    assert by_format["original", None].baseline
    assert by_format["mxfp4", "wush"].blocks == (3,)
    assert not by_format["mxfp4", "wush"].whole
    assert by_format["mxfp4", "wush"].losses.of("mse")[3, "k_proj"] == pytest.approx(0.55)
    assert not by_format["mxfp4", "h"].losses


def test_a_trial_in_two_folders_counts_once_the_newer(tmp_path: Path) -> None:
    old = record(kl=0.1)
    new = record(kl=0.2).model_copy(update={"finished_at": old.finished_at + timedelta(hours=1)})
    store(tmp_path / "a", new)
    store(tmp_path / "b", old)
    (trial,) = load([tmp_path / "a", tmp_path / "b"]).trials
    assert trial.metrics.kl == 0.2


def test_without_folders_the_committed_records_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "COMMITTED", tmp_path)
    assert load().trials == ()
    (tmp_path / "one.json").write_text(record().model_dump_json())
    assert len(load().trials) == 1


def test_records_of_other_versions_are_counted_and_named_with_the_remedy(tmp_path: Path) -> None:
    store(tmp_path, *(record(seed=seed) for seed in range(6)))
    for number in range(5):
        path = tmp_path / "trials" / f"{number:04}" / "result.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 3}))
    found = load([tmp_path])
    assert len(found.trials) == 1
    (note,) = found.notes
    assert note.startswith("5 records of schema version 3 left out, this program reads 5: ")
    assert note.endswith("and 2 more; run the trials again with this version")
    assert note.count("result.json") == 3


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"kl": 0.1', '"kl": NaN', "metrics.kl"),
        ('"even": 4.0', '"even": NaN', "even of decoder block 3, q_proj is nan"),
        ('"acc,none": 0.25', '"acc,none": Infinity', "acc,none of task one is inf"),
        ('"metric": "acc,none"', '"metric": "other"', "task one: a run lacks its metric other"),
        ('"skipped": {}', '"skipped": []', "skipped: "),
        ('"schema_version": 5', '"schema_version": 5,,', "Invalid JSON"),
    ],
)
def test_a_damaged_record_is_named_with_the_reason(tmp_path: Path, old: str, new: str, said: str) -> None:
    store(tmp_path, record(mse={3: 0.5}, tasks={"one": [0.25]}), record("nvfp4"))
    path = tmp_path / "trials" / "0000" / "result.json"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    found = load([tmp_path])
    assert [trial.format for trial in found.trials] == ["nvfp4"]
    (note,) = found.notes
    assert said in note
    assert f"{path}; remove the file and run the trial again" in note


def test_a_folder_without_records_is_an_error_that_says_what_would_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(NoRecords, match=r"nowhere: is no folder; name a folder of results"):
        load([tmp_path / "nowhere"])
    assert command.main(["table1", "--records", str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith(f"table1: not made: {tmp_path}: holds no record; name a folder")


def test_what_cannot_be_used_is_said_once_and_the_outputs_are_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store(tmp_path, record(), record("nvfp4"))
    (tmp_path / "trials" / "0001" / "result.json").write_text("{")
    arguments = ["table4", "table1", "--records", str(tmp_path), "--output", str(tmp_path / "out")]
    assert command.main(arguments) == 2
    assert capsys.readouterr().err.count("left out as damaged") == 1
    assert "1 record left out as damaged" in (tmp_path / "out" / "table4.md").read_text()


def test_trials_that_differ_by_seed_alone_are_one_setting(tmp_path: Path) -> None:
    store(tmp_path, *(record(transform="r", seed=seed, kl=kl) for seed, kl in enumerate((0.1, 0.2, 0.3))))
    (setting,) = by_key(load([tmp_path]).trials, lambda trial: trial.format)["mxfp4"]
    assert setting.note == ""
    found = setting.metric("kl")
    margin = 4.303 * 0.1 / 3**0.5  # Student's t of two degrees of freedom
    assert (found.mean, found.std, found.runs) == (pytest.approx(0.2), None, 3)
    assert found.ends == [[pytest.approx(margin, rel=1e-3)]] * 2


def test_trials_that_differ_in_more_are_apart_and_say_how(tmp_path: Path) -> None:
    store(tmp_path, record(), record(windows=64), record(windows=64, seed=1), record(calibration="c4"))
    settings = by_key(load([tmp_path]).trials, lambda trial: trial.format)["mxfp4"]
    assert [len(setting.trials) for setting in settings] == [1, 1, 2]
    notes = [setting.note for setting in settings]
    assert len(set(notes)) == 3
    assert notes[0].startswith("calibration=c4")
    assert notes[2] == "calibration=embedded calibration.windows=64"


def test_measuring_layer_losses_or_tasks_beside_makes_no_other_setting(tmp_path: Path) -> None:
    made = [record(), record(mse={0: 1.0}, seed=1), record(tasks={"one": [0.5]}, evaluation="tasks", seed=2)]
    trials = load([store(tmp_path, *made)]).trials
    assert len(by_key(trials, lambda trial: trial.format)["mxfp4"]) == 1
    assert len(by_key(trials, lambda trial: trial.format, by_tasks=True)["mxfp4"]) == 2


def test_what_the_seeds_of_an_evaluation_change_is_its_tasks_alone(tmp_path: Path) -> None:
    made = [record(kls=[0.1, 0.2]), record(kls=[0.1, 0.2], evaluation="sampled", tasks={"one": [0.5]})]
    made[1].config["evaluation"]["seeds"] = [0, 1]
    trials = load([store(tmp_path, *made)]).trials
    (setting,) = by_key(trials, lambda trial: trial.format)["mxfp4"]
    assert len(setting.trials) == 1
    assert len(by_key(trials, lambda trial: trial.format, by_tasks=True)["mxfp4"]) == 2


def test_sampled_signs_are_draws_of_one_setting_which_canonical_ones_are_not(tmp_path: Path) -> None:
    made = [record(kl=0.1 + 0.01 * (signs or 0)) for signs in (None, 1, 2, 3)]
    for signs, one in zip((None, 1, 2, 3), made, strict=True):
        one.config["transform"]["signs"] = signs
        one.trial_id += str(signs)
    settings = by_key(load([store(tmp_path, *made)]).trials, lambda trial: trial.format)["mxfp4"]
    assert sorted(len(setting.trials) for setting in settings) == [1, 3]
    (sampled,) = [setting for setting in settings if len(setting.trials) == 3]
    assert "transform.signs=sampled" in sampled.note
    assert sampled.metric("kl").runs == len(sampled.draws) == 3


def test_the_unquantized_model_has_one_name_whatever_the_record_calls_it(tmp_path: Path) -> None:
    trials = load([store(tmp_path, record("bf16"), record("original", seed=1))]).trials
    assert {trial.format for trial in trials} == {"original"}
    assert all(trial.baseline for trial in trials)


def test_records_of_an_older_method_are_shown_as_such_and_never_beside_newer_ones(tmp_path: Path) -> None:
    old = [record("mxfp4", name, version=1) for name in ("h", "i", "wush")]
    found = load([store(tmp_path / "old", *old)])
    assert all(trial.old for trial in found.trials)
    assert "3 OLD, of version 1 of the method (today's: " in ours(found.trials)
    newer = load([store(tmp_path / "new", *old, record("mxfp4", "wush", kl=0.2))])
    selected = select(newer.trials)
    assert [one[2] for one in selected.settings] == ["wush"]
    assert selected.left_out == ("3 trials with method.version=1",)
    notes = {setting.note for setting in by_key(newer.trials, method)["mxfp4", "rtn", "wush"]}
    assert notes == {"method.version=1", f"method.version={METHOD_VERSION}"}


def test_a_record_of_schema_4_is_read_with_what_it_has(tmp_path: Path) -> None:
    content = json.loads(record(mse={3: 0.5}).model_dump_json())
    for name in ("windows", "lost", "model_note", "method_version"):
        del content[name]
    for block in content["blocks"]:
        error = block.pop("calibration")
        block.pop("held_out")
        block |= {"mse": error["mse"], "relative_mse": error["relative"]}
        for layer in block["layers"]:
            loss = layer["loss"]
            layer["loss"] = {"predicted": loss["even"], **{name: loss[name] for name in ("mse", "relative", "bound")}}
    del content["config"]["measure"]
    (tmp_path / "one.json").write_text(json.dumps(content | {"schema_version": 4}))
    (trial,) = load([tmp_path]).trials
    assert trial.old
    assert trial.windows is None
    assert trial.losses_on == "held_out"
    assert trial.losses.of("even")[3, "q_proj"] == 4.0
    assert np.isnan(trial.losses.of("paper_fp")[3, "q_proj"])


def test_a_number_of_one_run_has_no_interval() -> None:
    assert Number.of([]) is None
    assert Number.of([2.0]) == Number(2.0)
    assert Number(2.0, 0.5, 3, Interval(1, 4)).scaled(10) == Number(20.0, 5.0, 3, Interval(10, 40))


def pair(interval: Interval | None) -> tuple[float, float]:
    assert interval
    return interval.low, interval.high


def test_a_metric_of_one_trial_has_the_interval_of_its_windows(tmp_path: Path) -> None:
    (trial,) = load([store(tmp_path, record(kls=[0.1, 0.2, 0.3, 0.6]))]).trials
    found = Setting((trial,)).metric("kl")
    assert found.mean == pytest.approx(0.3)
    assert pair(found.interval) == pytest.approx(pair(of_runs([0.1, 0.2, 0.3, 0.6])))


def test_numbers_that_have_nothing_in_common_are_independent_in_a_difference() -> None:
    a, b = Number(1.0, interval=Interval(0.7, 1.4)), Number(3.0, interval=Interval(2.6, 3.3))
    assert difference(a, b) == Interval(
        pytest.approx(2 - math.hypot(0.4, 0.4)), pytest.approx(2 + math.hypot(0.3, 0.3))
    )
    assert difference(a, Number(3.0)) is None
    assert pair(difference(a, Number(3.0), exact=True)) == pytest.approx((1.6, 2.3))
    assert difference(Number(1.0), Number(3.0), exact=True) is None


def test_seeds_are_paired_where_both_have_the_same() -> None:
    first, same, other = (Number.of(own) for own in ({0: 1.0, 1: 2.0}, {1: 3.0, 0: 2.0}, {0: 2.0, 2: 3.0}))
    assert first
    assert same
    assert other
    assert pair(difference(first, same)) == pytest.approx((1, 1))
    assert pair(difference(first, other))[1] > 5


def test_the_mean_of_tasks_has_an_interval_where_each_of_them_has() -> None:
    own = [Number(1.0, interval=Interval(0.7, 1.4)), Number(3.0, interval=Interval(2.6, 3.3))]
    assert pair(mean_of(own)) == pytest.approx((2 - 0.25, 2 + 0.25))
    assert mean_of([*own, Number(1.0)]) is None
    assert mean_of([]) is None


@pytest.mark.parametrize(
    ("sets", "chosen"),
    [
        ({"h": ["a_set", "embedded"], "wush": ["a_set", "embedded"]}, "embedded"),
        ({"h": ["embedded", "fineweb_edu"], "wush": ["embedded", "fineweb_edu"]}, "fineweb_edu"),
        ({"h": ["a_set"], "wush": ["a_set", "embedded"]}, "a_set"),
    ],
)
def test_the_settings_of_most_methods_are_selected_and_ties_go_to_the_default(
    sets: dict[str, list[str]], chosen: str, tmp_path: Path
) -> None:
    made = [record(transform=name, calibration=one) for name, own in sets.items() for one in own]
    found = select(load([store(tmp_path, *made, record("bf16"))]).trials)
    assert {setting.first.calibration for setting in found.settings.values()} == {chosen, None}
    assert len(found.settings) == 3
    assert sum(int(text.partition(" ")[0]) for text in found.left_out) == len(made) - 2


def test_trials_left_out_say_in_what_they_differ(tmp_path: Path) -> None:
    made = [record(transform=name) for name in ("h", "wush")]
    found = select(load([store(tmp_path, *made, record(windows=64), record(windows=64, seed=1))]).trials)
    assert found.left_out == ("2 trials with calibration.windows=64",)


def test_a_format_with_another_scale_rule_is_another_format(tmp_path: Path) -> None:
    made = []
    for seed, rule in enumerate(("rms", "midrise", "absmax")):
        one = record("int4", seed=seed)
        one.config["format"]["scale_rule"] = rule
        made.append(one)
    assert {one.format for one in load([store(tmp_path, *made)]).trials} == {"int4", "int4 midrise", "int4 absmax"}


def test_formats_named_alone_have_their_own_scale_rules() -> None:
    assert {one.name: one.scale_rule for one in (wush.MXFP4, wush.NVFP4, wush.INT4, wush.MXFP8)} == RULES
