"""Paired comparison: partners differ only as the sides do, seeds are replicates, nothing is dropped silently."""

import csv
import io
import json
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from experiments import plans, sweep
from experiments.compare import GAP, KL, METRICS, Comparison, Difference, Setting, compare
from experiments.records import Metrics, Record, Task, TaskRun, Windows
from experiments.schema import ConfigError
from experiments.sides import find, read, to_run_filter
from experiments.store import ResultStore
from experiments.tracking import NoTracking
from experiments.trial import TrialRunner
from experiments.views.comparison import remarks, show_comparison, to_csv, to_json, to_markdown, to_terminal
from tests.experiments.conftest import composed
from wush import intervals
from wush.intervals import Interval
from wush.progress import Silent
from wush.version import METHOD_VERSION


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Record:
    """A real trial of a tiny model."""
    own = sweep.plan([composed(f"results={tmp_path_factory.mktemp('real')}")], ["s"])
    record = TrialRunner(own.store, own.name, NoTracking(), Silent()).run(own.trials[0])
    assert isinstance(record, Record)
    return record


class Recorded:
    """A store of records made from a real one."""

    def __init__(self, root: Path, real: Record) -> None:
        self.store, self._real, self._root = ResultStore(root), real, root

    def add(
        self, kl: float, *overrides: str, evaluated: str = "", gap: float = 1.0, bits: float = 4.25, **more: Any
    ) -> str:
        """A finished trial; its id. `more`: other values of the record."""
        own = sweep.plan([composed(f"results={self._root}", *overrides)], ["s"]).trials[0]
        metrics = Metrics(
            perplexity=10.0 + gap, perplexity_original=10.0, kl=kl, top1=0.5, bits_per_weight=bits, predictions=62
        )
        update: dict[str, Any] = {"trial_id": own.trial_id, "choices": own.choices, "config": own.config}
        text = self._real.data["evaluation"]
        changed = text.model_copy(update={"ids_sha256": evaluated or text.ids_sha256})
        update |= {"data": self._real.data | {"evaluation": changed}, "metrics": metrics, "windows": None}
        update |= {"method_version": METHOD_VERSION, **more}
        self.store.begin(own.trial_id, "")
        self.store.finish(self._real.model_copy(update=update))
        return own.trial_id

    def plan(self, name: str, *lists: tuple[str, ...]) -> None:
        """A sweep of the trials that lists of overrides make."""
        configs = [composed(f"results={self._root}", f"sweep={name}", *overrides) for overrides in lists]
        plans.save(sweep.plan(configs, []), {})

    def compare(self, a: str, b: str) -> Comparison:
        return compare(self.store, a, b)


@pytest.fixture
def store(tmp_path: Path, real: Record) -> Recorded:
    return Recorded(tmp_path, real)


def of(setting: Setting, key: str) -> Difference:
    return next(one for one in setting.differences if one.metric.key == key)


def test_trials_are_paired_with_those_that_differ_as_the_sides_do(store: Recorded) -> None:
    for fmt, kl in (("mxfp4", 0.3), ("nvfp4", 0.2)):
        store.add(kl, f"format={fmt}", "transform=h")
        store.add(kl - 0.125, f"format={fmt}", "transform=wush", gap=0.5)
    found = store.compare("transform=h", "transform=wush")
    assert found.differing == ("transform",)
    assert [setting.labels["format"] for setting in found.settings] == ["mxfp4", "nvfp4"]
    assert "transform" not in found.settings[0].labels
    assert (of(found.settings[0], "kl").a, of(found.settings[0], "kl").mean) == pytest.approx((0.3, -0.125))
    assert of(found.settings[0], "gap").mean == pytest.approx(-0.5)
    assert of(found.settings[0], "top1").a == pytest.approx(50.0)
    assert of(found.settings[0], "kl").interval is None, "these records do not have their windows"
    assert not any(one.clear for setting in found.settings for one in setting.differences)
    assert found.unpaired == ()


def test_seeds_are_replicates_with_a_t_interval_of_their_differences(store: Recorded) -> None:
    differences = [0.10, 0.12, 0.17]
    for seed, difference in enumerate(differences):
        store.add(0.2 + 0.5 * seed, "transform=h", f"seed={seed}")  # the seeds differ more than the transforms
        store.add(0.2 + 0.5 * seed + difference, "transform=wush", f"seed={seed}")
    (setting,) = store.compare("transform=h", "transform=wush").settings
    kl, expected = of(setting, "kl"), intervals.of_runs(differences)
    assert len(setting.pairs) == 3
    assert kl.mean == pytest.approx(0.13)
    assert expected
    assert kl.interval
    assert (kl.interval.low, kl.interval.high) == pytest.approx((expected.low, expected.high))
    assert kl.clear
    assert kl.worse
    assert not kl.better
    assert of(setting, "bits_per_weight").interval is None


def test_three_pairs_that_two_standard_errors_would_call_clear_are_not(store: Recorded) -> None:
    for seed, difference in enumerate((0.10, 0.02, 0.07)):  # 2.7 standard errors from 0; Student's t asks for 4.3
        store.add(0.2, "transform=h", f"seed={seed}")
        store.add(0.2 + difference, "transform=wush", f"seed={seed}")
    (setting,) = store.compare("transform=h", "transform=wush").settings
    assert not of(setting, "kl").clear


def windows(kl: float, count: int = 40) -> Windows:
    """Windows of one text, on which KL differs far more than between trials."""
    hard = [0.5 + i / (count - 1) for i in range(count)]
    return Windows(
        nll=[250 * x + 100 * kl for x in hard],
        nll_original=[230 * x for x in hard],
        kl=[100 * kl * x for x in hard],
        agree=[70 - i % 3 for i in range(count)],
        predictions=[100] * count,
    )


@pytest.mark.parametrize("count", [8, 40])
def test_one_pair_is_compared_window_by_window(store: Recorded, count: int) -> None:
    own = {"h": windows(0.3, count), "wush": windows(0.28, count)}
    for transform, found in own.items():
        store.add(intervals.value(found, "kl"), f"transform={transform}", windows=found)
    (setting,) = store.compare("transform=h", "transform=wush").settings
    kl, expected = of(setting, "kl"), intervals.paired(own["h"], own["wush"], "kl")
    assert kl.interval == expected
    assert kl.clear
    assert kl.better
    for transform in own:
        alone = intervals.of_metric(own[transform], "kl")
        assert alone
        assert kl.interval
        assert alone.high - alone.low > 5 * (kl.interval.high - kl.interval.low), "what the text varies cancels"


def test_seeds_that_change_nothing_are_one_pair_and_not_a_difference_without_noise(store: Recorded) -> None:
    own = {"h": windows(0.3), "i": windows(0.3001)}
    for seed in (0, 1, 2):
        for transform, found in own.items():
            store.add(intervals.value(found, "kl"), f"transform={transform}", f"seed={seed}", windows=found)
    (setting,) = store.compare("transform=h", "transform=i").settings
    assert len(setting.pairs) == 3
    assert of(setting, "kl").interval == intervals.paired(own["h"], own["i"], "kl")


def test_means_over_seeds_of_one_side_have_the_interval_of_that_side(store: Recorded) -> None:
    for seed, kl in enumerate((0.2, 0.22, 0.24)):
        store.add(kl, "transform=r", f"transform.seed={seed}", windows=windows(kl))
    store.add(0.1, "transform=h", windows=windows(0.1))
    (setting,) = store.compare("transform=r", "transform=h").settings
    kl, spread = of(setting, "kl"), intervals.of_runs([0.2, 0.22, 0.24])
    assert kl.interval
    assert spread
    assert (kl.interval.low, kl.interval.high) == pytest.approx(
        (-0.12 - spread.high + 0.22, -0.12 + spread.high - 0.22)
    )


def task(*outcomes: float, samples: int | None = None) -> dict[str, Task]:
    score = sum(outcomes) / len(outcomes)
    run = TaskRun(seed=0, values={"acc,none": score}, stderrs={}, seconds=1.0, outcomes=list(outcomes))
    return {
        "easy": Task(
            name="easy",
            version="1",
            harness="0",
            num_fewshot=0,
            chat_template=False,
            samples=samples or len(outcomes),
            metric="acc,none",
            higher_is_better=True,
            runs=[run],
        )
    }


def test_tasks_are_compared_document_by_document(store: Recorded) -> None:
    a = [float(i % 2) for i in range(200)]
    b = [1.0 if i < 24 else value for i, value in enumerate(a)]  # right on 12 more, wrong on none
    store.add(0.2, "transform=h", tasks=task(*a))
    store.add(0.2, "transform=wush", tasks=task(*b))
    (setting,) = store.compare("transform=h", "transform=wush").settings
    score, expected = of(setting, "task easy, 0-shot of 200"), intervals.paired_documents(a, b)
    assert score.mean == pytest.approx(6)
    assert expected
    assert score.interval == expected.scaled(100)
    assert score.clear
    assert score.better
    alone = intervals.of_documents(a)
    assert alone
    assert alone.margin(0.5) > 0.06, "by themselves, the two scores are not clearly apart"


def test_a_task_whose_outcomes_are_not_known_has_no_interval(store: Recorded) -> None:
    store.add(0.2, "transform=h", tasks=task(1.0, 0.0, 1.0, samples=4))
    store.add(0.2, "transform=wush", tasks=task(1.0, 0.0, 1.0, 1.0))
    (setting,) = store.compare("transform=h", "transform=wush").settings
    assert of(setting, "task easy, 0-shot of 4").interval is None


def test_trials_of_another_method_are_no_partners_and_are_called_old(store: Recorded) -> None:
    for version in (METHOD_VERSION - 1, METHOD_VERSION):
        for transform in ("h", "wush"):
            lists = (f"transform={transform}", f"calibration.windows={version + 1}")
            store.add(0.2 + version, *lists, method_version=version)
    found = store.compare("transform=h", "transform=wush")
    assert [pair.a[0].old for setting in found.settings for pair in setting.pairs] == [True, False]
    assert "of an earlier version of the method (old): 2 trials" in found.notes
    assert found.settings[0].pairs[0].a[0].name.endswith(" old")
    store.add(0.2, "transform=h", "format=nvfp4", method_version=METHOD_VERSION - 1)
    store.add(0.2, "transform=wush", "format=nvfp4")
    reasons = [one.reason for one in store.compare("transform=h", "transform=wush").unpaired]
    assert reasons, "of one version only"
    assert all("method_version" in reason or "together" in reason for reason in reasons)


def test_what_is_measured_besides_makes_no_other_partner(store: Recorded) -> None:
    store.add(0.3, "transform=h", "measure.windows=1")
    store.add(0.2, "transform=wush")
    found = store.compare("transform=h", "transform=wush")
    assert found.unpaired == ()
    assert found.differing == ("transform",)


def test_the_share_quantized_is_compared_where_it_is_not_all(store: Recorded) -> None:
    part = Metrics(
        perplexity=11, perplexity_original=10, kl=0.2, top1=0.5, bits_per_weight=9, quantized_share=0.5, predictions=62
    )
    store.add(0.3, "transform=h")
    store.add(0.2, "transform=wush", metrics=part)
    (setting,) = store.compare("transform=h", "transform=wush").settings
    share = of(setting, "quantized_share")
    assert (share.a, share.b) == (100, 50)
    assert not share.better
    assert not share.worse


def test_a_random_rotation_needs_no_seed_of_the_other_transform(store: Recorded) -> None:
    for seed in (0, 1):
        store.add(0.3, "transform=r", f"seed={seed}")
        store.add(0.2, "transform=h", f"seed={seed}")
    (setting,) = store.compare("transform=r", "transform=h").settings
    assert [(len(pair.a), len(pair.b)) for pair in setting.pairs] == [(1, 1), (1, 1)]


def test_seeds_of_one_side_only_count_by_their_mean_and_that_is_said(store: Recorded) -> None:
    for seed, kl in ((0, 0.2), (1, 0.4)):
        store.add(kl, "transform=r", f"transform.seed={seed}")
    store.add(0.1, "transform=h")
    found = store.compare("transform=r", "transform=h")
    (setting,) = found.settings
    assert of(setting, "kl").a == pytest.approx(0.3)
    assert found.notes == ("the mean of trials that differ by a seed that the other side has not: 1 pair",)


def test_a_trial_that_matches_several_is_an_error_that_says_what_to_choose(store: Recorded) -> None:
    store.add(0.2, "transform=h", "algorithm=gptq")
    for refit in ("true", "false"):
        store.add(0.1, "transform=wush", "algorithm=gptq", f"transform.refit={refit}")
    with pytest.raises(ConfigError, match=r"transform.refit \(false, true\).*transform=wush,transform.refit=false"):
        store.compare("transform=h", "transform=wush")
    found = store.compare("transform=h", "transform=wush,transform.refit=false")
    assert len(found.settings) == 1


def test_trials_without_a_partner_are_kept_with_the_reason(store: Recorded) -> None:
    for transform in ("h", "wush"):
        store.add(0.2, f"transform={transform}")
    alone = store.add(0.2, "transform=wush", "format=int4")
    other_text = store.add(0.2, "transform=h", "calibration.windows=4", evaluated="other")
    store.add(0.2, "transform=wush", "calibration.windows=4")
    found = store.compare("transform=h", "transform=wush")
    reasons = {one.trial.trial_id: (one.side, one.reason) for one in found.unpaired}
    assert reasons[alone] == ("B", "the other side has no format=wush.Int4")
    assert reasons[other_text] == ("A", "evaluated on a different text")
    assert len(reasons) == 3
    assert any(alone in line for line in remarks(found))
    assert any("1 of A: evaluated on a different text" in line for line in remarks(found))


def test_settings_that_differ_by_another_key_are_told_apart_by_it(store: Recorded) -> None:
    for rule in ("paper", "ocp"):
        for transform in ("h", "wush"):
            store.add(0.2, f"transform={transform}", f"format.scale_rule={rule}")
    settings = store.compare("transform=h", "transform=wush").settings
    assert [setting.labels["format.scale_rule"] for setting in settings] == ["ocp", "paper"]
    assert set(settings[0].labels) == {"model", "format", "algorithm", "format.scale_rule"}


def test_config_keys_seeds_and_several_keys_are_filters(store: Recorded) -> None:
    for seed in (0, 1):
        for transform in ("h", "r"):
            store.add(0.2 + 0.125 * seed, f"transform={transform}", f"seed={seed}")
    assert store.compare("calibration.seed=0,transform=h", "calibration.seed=1,transform=h").settings
    found = store.compare("seed=0", "seed=1")
    assert [len(setting.pairs) for setting in found.settings] == [1, 1]
    assert of(found.settings[0], "kl").mean == pytest.approx(0.125)


def test_baselines_are_on_no_side_by_a_transform(store: Recorded) -> None:
    store.add(0.0, "format=original", "transform=h")
    store.add(0.2, "transform=h")
    finished, _ = read(store.store)
    assert len(find(store.store, finished, "transform=h").trials) == 1


def test_sweeps_are_compared_by_what_differs_between_them(store: Recorded) -> None:
    for name, transform in (("first", "h"), ("second", "wush")):
        lists = [(f"transform={transform}", f"seed={seed}") for seed in range(3)]
        for own in lists[: 2 if name == "second" else 3]:
            store.add(0.2, *own)
        store.plan(name, *lists, ("format=original",))
    store.add(0.0, "format=original")
    found = store.compare("first", "second")
    assert found.differing == ("transform",)
    assert len(found.settings[0].pairs) == 2
    assert "not finished yet: 1 trial of second" in found.notes
    assert "on both sides, and compared with none: 1 trial" in found.notes
    assert [one.reason for one in found.unpaired] == ["the other side has no calibration.seed=2 (but 0, 1)"]
    assert store.compare("sweep=first", "sweep=second,calibration.seed=0").settings


def test_sweeps_that_share_a_transform_are_compared_by_the_other_key(store: Recorded) -> None:
    for name, windows in (("few", 2), ("many", 4)):
        lists = [(f"transform={transform}", f"calibration.windows={windows}") for transform in ("h", "wush")]
        for own in lists:
            store.add(0.2, *own)
        store.plan(name, *lists)
    found = store.compare("few", "many")
    assert found.differing == ("calibration.windows",)
    assert [setting.labels["transform"] for setting in found.settings] == ["h", "wush"]


@pytest.mark.parametrize(
    ("a", "message"),
    [
        ("nosuch", "no sweep 'nosuch' in .*; there are: known"),
        ("transform=x", "transform=x: no finished trial has it; transform has: h, wush"),
        ("calibration.seed=7", "calibration.seed has: 0"),
        ("transfrom=h", "no finished trial has the key transfrom; there are transform"),
        ("transform=", "'transform=' should be key=value"),
        ("transform=h,wush", "'wush' should be key=value"),
        ("transform=h,transform=wush", "transform is given twice"),
        ("transform=h,format=int4", "none has all of them"),
        ("transform=wush", "there is no key in which all trials of one differ"),
    ],
)
def test_a_side_that_cannot_be_is_an_error_that_says_what_can(store: Recorded, a: str, message: str) -> None:
    store.add(0.2, "transform=h")
    store.add(0.2, "transform=wush")
    store.add(0.2, "transform=wush", "format=int4")
    store.plan("known", ("transform=h",))
    with pytest.raises(ConfigError, match=message):
        store.compare(a, "transform=wush")


def test_sides_without_any_pair_are_an_error_that_says_why(store: Recorded) -> None:
    store.add(0.2, "transform=h", "format=int4")
    store.add(0.2, "transform=wush", "calibration.windows=4")
    with pytest.raises(ConfigError, match=r"no format=wush.Int4 and no calibration.windows=2 \(but 4\)"):
        store.compare("transform=h", "transform=wush")


def test_no_trials_at_all_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no finished trials in"):
        compare(ResultStore(tmp_path), "transform=h", "transform=wush")


def test_records_that_cannot_be_read_are_counted(store: Recorded) -> None:
    for transform in ("h", "wush"):
        store.add(0.2, f"transform={transform}")
    for name, content in (("damaged", b"{"), ("binary", b"\xff\xfe"), ("foreign", b'{"schema_version": 1}')):
        folder = store.store.trial(name)
        folder.mkdir()
        (folder / "result.json").write_bytes(content)
    found = store.compare("transform=h", "transform=wush")
    assert found.notes == ("3 records left out, damaged or of another version: binary, damaged, foreign",)


@pytest.fixture
def two(store: Recorded) -> Recorded:
    """Two settings, the first with two seeds."""
    for seed in (0, 1):
        store.add(0.3, "transform=h", f"seed={seed}")
        store.add(0.2 + 0.01 * seed, "transform=wush", f"seed={seed}")
    store.add(0.3, "transform=h", "format=nvfp4", bits=4.5)
    store.add(0.25, "transform=wush", "format=nvfp4", bits=4.5)
    store.add(0.2, "transform=wush", "format=int4")
    return store


def test_the_table_fits_a_terminal_and_marks_clear_differences(two: Recorded) -> None:
    console = Console(width=100, file=io.StringIO())
    console.print(to_terminal(two.compare("transform=h", "transform=wush")))
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 100
    assert any(line.split()[-6:] == ["nats", "0.3000", "0.2050", "-0.0950", "±", "0.0635*"] for line in lines)
    assert any(line.split()[-5:] == ["KL,", "nats", "0.3000", "0.2500", "-0.0500"] for line in lines)


def test_files_hold_the_same_numbers(two: Recorded) -> None:
    found = two.compare("transform=h", "transform=wush")
    assert r"| mxfp4 | 2 | KL, nats | 0.3000 | 0.2050 | -0.0950 ± 0.0635\* |" in to_markdown(found)
    rows = list(csv.DictReader(io.StringIO(to_csv(found))))
    assert len(rows) == 2 * 4
    assert [float(row["difference"]) for row in rows if row["metric"] == "kl"] == pytest.approx([-0.095, -0.05])
    ends = [(row["low"], row["high"]) for row in rows if row["metric"] == "kl"]
    assert [float(end) for end in ends[0]] == pytest.approx([-0.1585, -0.0315], abs=1e-4)
    assert ends[1] == ("", "")
    assert {float(row["a"]) for row in rows if row["metric"] == "top1"} == {0.5}
    content = json.loads(to_json(found))
    assert content["settings"][0]["metrics"]["kl"]["difference"] == pytest.approx(-0.095)
    assert [len(setting["pairs"]) for setting in content["settings"]] == [2, 1]
    assert [one["side"] for one in content["unpaired"]] == ["B"]


@pytest.mark.parametrize("suffix", [".md", ".csv", ".json"])
def test_a_comparison_is_shown_and_written(
    two: Recorded, suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"found{suffix}"
    assert show_comparison(two.store, "transform=h", "transform=wush", path) == 0
    assert path.stat().st_size > 100
    shown = capsys.readouterr().out
    assert "1 trial without a partner" in shown
    assert str(path) in shown


@pytest.mark.parametrize(
    ("a", "output"), [("nosuch", None), ("transform=h", Path("x.txt")), ("transform=h", Path("/no/x.md"))]
)
def test_an_error_is_told_and_the_exit_code_says_so(
    two: Recorded, a: str, output: Path | None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert show_comparison(two.store, a, "transform=wush", output) == 2
    assert capsys.readouterr().err


def test_a_side_is_a_filter_of_runs(two: Recorded) -> None:
    two.plan("s1", ("transform=h",))
    finished, _ = read(two.store)
    side = find(two.store, finished, "sweep=s1,transform=h,calibration.seed=0")
    own = to_run_filter(side)
    assert own.group == "s1"
    assert own.config == {"choices.transform": "h", "calibration.seed": 0}
    assert own.trials == tuple(trial.trial_id for trial in side.trials)
    assert to_run_filter(find(two.store, finished, "evaluation.seed=null")).config == {}


def test_thousands_of_trials_are_compared_at_once(real: Record, tmp_path: Path) -> None:
    text = real.model_dump_json(indent=2)
    config = sweep.plan([composed(f"results={tmp_path}", "transform=h")], ["s"]).trials[0]
    own = json.loads(text)
    for number in range(4_000):
        own |= {"trial_id": f"{number:016x}"}
        if number % 2:
            own |= {"choices": config.choices, "config": config.config}
        else:
            own |= {"choices": real.choices, "config": real.config}
        calibration = own["config"]["calibration"] | {"seed": number // 2}
        folder = tmp_path / "trials" / own["trial_id"]
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps(own | {"config": own["config"] | {"calibration": calibration}}))
    started = time.process_time()
    (setting,) = compare(ResultStore(tmp_path), "transform=h", "transform=wush").settings
    assert time.process_time() - started < 4.0
    assert len(setting.pairs) == 2_000


@pytest.mark.parametrize(
    ("interval", "clear"), [(None, False), (Interval(-0.1, 0.2), False), (Interval(0.1, 0.2), True)]
)
def test_a_difference_is_clear_when_its_interval_excludes_zero(interval: Interval | None, clear: bool) -> None:
    assert Difference(KL, 0.0, 0.15, 0.15, interval, 1).clear == clear


def test_a_perplexity_below_the_originals_is_not_better_and_fewer_bits_are_not() -> None:
    assert Difference(GAP, 1.0, 0.5, -0.5, None, 1).better
    below = Difference(GAP, 1.0, -0.1, -1.1, None, 1)
    assert not below.better
    assert not below.worse
    (bits,) = (metric for metric in METRICS if metric.key == "bits_per_weight")
    fewer = Difference(bits, 5.0, 4.0, -1.0, None, 1)
    assert not fewer.better
    assert not fewer.worse
