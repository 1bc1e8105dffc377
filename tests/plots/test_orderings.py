"""Verdicts: which orderings are the paper's, which of them hold in ours, and what that comes to."""

from pathlib import Path

import pytest

from experiments.records import Record
from plots.items import items
from plots.numbers import Number
from plots.orderings import CONTRADICTED, HOLDS, NOT_YET, OPEN, PART, REVERSED, SAME, UNDECIDED, Item, claims, judge
from plots.orderings import best_of_parts as best
from plots.platinum_tasks import PLATINUM
from plots.records import Records, load
from plots.verdicts import document
from tests.plots.conftest import answered, record, store
from wush.intervals import Interval

PUBLISHED = {"a": Number(1.0), "b": Number(2.0), "c": Number(3.0)}


def item(own: dict[str, Number], published: dict[str, dict[str, Number]] | None = None, lower: bool = True) -> Item:
    models = published or {"big": PUBLISHED}
    scores = {model: {"mxfp4": table} for model, table in models.items()}
    return Item("table0", "loss", lower, scores, {"small": {"mxfp4": own}} if own else {})


def numbers(**values: float) -> dict[str, Number]:
    return {name: ours(value, 0) for name, value in values.items()}


def ours(mean: float, margin: float) -> Number:
    return Number(mean, interval=Interval(mean - margin, mean + margin))


@pytest.mark.parametrize(
    ("own", "word", "counts"),
    [
        ({}, NOT_YET, (0, 0, 0, 3)),
        (numbers(a=10, b=20, c=30), SAME, (3, 0, 0, 0)),
        (numbers(a=10, b=30, c=20), PART, (2, 1, 0, 0)),
        (numbers(a=30, b=20, c=10), CONTRADICTED, (0, 3, 0, 0)),
        (numbers(a=20, b=10), CONTRADICTED, (0, 1, 0, 2)),
        (numbers(a=10), NOT_YET, (0, 0, 0, 3)),
        ({"a": ours(10, 4), "b": ours(15, 4)}, NOT_YET, (0, 0, 1, 2)),
        ({"a": ours(10, 3), "b": ours(15, 3)}, SAME, (1, 0, 0, 2)),
        ({"a": Number(10), "b": Number(15)}, NOT_YET, (0, 0, 1, 2)),
        ({"a": Number(10), "b": ours(15, 4)}, NOT_YET, (0, 0, 1, 2)),
    ],
)
def test_a_verdict_is_by_the_orderings_that_are_decided(
    own: dict[str, Number], word: str, counts: tuple[int, ...]
) -> None:
    verdict = judge(item(own))
    assert verdict.word == word
    assert tuple(map(verdict.count, (HOLDS, REVERSED, UNDECIDED, OPEN))) == counts


def test_higher_can_be_better() -> None:
    assert judge(item(numbers(a=10, b=20, c=30), lower=False)).word == SAME
    assert {(one.better, one.worse) for one in claims(item({}, lower=False))} == {("b", "a"), ("c", "a"), ("c", "b")}


def test_a_gap_within_the_stated_spread_is_no_ordering() -> None:
    near = {"a": Number(1.0, 0.9, 5), "b": Number(2.0, 0.9, 5), "c": Number(9.0, 0.9, 5)}
    assert {(one.better, one.worse) for one in claims(item({}, {"big": near}))} == {("a", "c"), ("b", "c")}
    assert claims(item({}, {"big": numbers(a=1, b=1)})) == []


def test_models_that_disagree_show_no_ordering_and_others_are_told_by_the_first() -> None:
    both = {"one": numbers(a=1, b=2, c=3), "two": numbers(a=2, b=1, c=3)}
    found = {(one.better, one.worse): one.published[1].mean for one in claims(item({}, both))}
    assert found == {("a", "c"): 3, ("b", "c"): 3}
    silent = {"one": {"a": Number(1.0, 5.0, 3), "b": Number(2.0, 5.0, 3)}, "two": numbers(a=1, b=4)}
    assert [tuple(one.mean for one in own.published) for own in claims(item({}, silent))] == [(1, 4)]


def test_the_best_of_each_part_is_compared_among_methods_of_both() -> None:
    assert best(item(numbers(b=1, c=2))) == (1, 0, 0)
    assert best(item(numbers(b=2, c=1))) == (0, 1, 0)
    assert best(item(numbers(b=2))) == (0, 0, 0)


def test_the_best_is_the_same_models_or_one_that_all_of_the_papers_models_agree_on() -> None:
    apart = {"one": numbers(a=1, b=2), "two": numbers(a=2, b=1)}
    agreed = {"one": numbers(a=1, b=2), "two": numbers(a=1, b=3)}
    own = numbers(a=2, b=1)
    assert best(item(own, apart)) == (0, 0, 0)
    assert best(item(own, agreed)) == (0, 1, 0)
    second = Item("table0", "loss", True, item({}, apart).published, {"two": {"mxfp4": own}})
    assert best(second) == (1, 0, 0)


def test_a_best_within_the_spread_is_undecided_in_ours_and_none_in_the_papers() -> None:
    assert best(item({"a": ours(1.0, 2.0), "b": ours(1.5, 2.0)})) == (0, 0, 1)
    assert best(item(numbers(a=1, b=1))) == (0, 0, 1)
    near = {"big": {"a": Number(1.0, 2.0, 3), "b": Number(1.5, 2.0, 3)}}
    assert best(item(numbers(a=1, b=2), near)) == (0, 0, 0)


def test_a_published_model_counts_in_its_own_table_alone_and_others_in_both(tmp_path: Path) -> None:
    four = {name: [0.5] for name in ("mmlu", "gsm8k", "hellaswag", "winogrande")}
    names = ("qwen3_8b", "llama3_1_8b_instruct", "smollm2_135m")
    made = [record("mxfp4", "wush", model=name, tasks=four, evaluation="openllm") for name in names]
    found = {one.name: list(one.ours) for one in items(load([store(tmp_path, *made)]))}
    own = "smollm2_135m on mmlu, gsm8k, hellaswag, winogrande"
    assert found["table2"] == found["table2 by task"] == ["Llama-3.1-8B-Instruct", own]
    assert found["table3"] == found["table3 by task"] == ["Qwen3-8B", own]


NOISE = [0.01 * (place % 5 - 2) for place in range(40)]  # of windows, alike in all trials


def kls(mean: float) -> list[float]:
    return [mean + one for one in NOISE]


def test_verdicts_compare_methods_that_were_run_alike_and_name_the_rest(tmp_path: Path) -> None:
    made = [
        *(record("mxfp4", name, "gptq", kls=kls(kl)) for name, kl in (("h", 0.2), ("wush", 0.1))),
        *(record("mxfp4", "wush", "gptq", calibration="c4", seed=seed, kl=0.9) for seed in range(3)),
    ]
    records = load([store(tmp_path, *made)])
    assert {one.name: judge(one).word for one in items(records)}["table4"] == SAME
    assert "Not compared, run with other settings: smollm2_135m: 3 trials with calibration=c4." in document(records)


def state(folder: Path, *made: Record, item: str = "table4") -> tuple[int, ...]:
    """How many orderings hold, are reversed and are undecided."""
    return state_of(store(folder, *made), item)


def state_of(folder: Path, item: str) -> tuple[int, ...]:
    (found,) = [judge(one) for one in items(load([folder])) if one.name == item]
    return tuple(map(found.count, (HOLDS, REVERSED, UNDECIDED)))


def test_an_ordering_is_decided_by_the_paired_interval_not_by_those_of_each_side(tmp_path: Path) -> None:
    wide = [0.2 + 0.19 * (place % 2) for place in range(40)]  # each side alone is known to a fifth of its size
    better = [one - 0.01 - 0.002 * (place % 3) for place, one in enumerate(wide)]
    h, wush = record("mxfp4", "h", "gptq", kls=wide), record("mxfp4", "wush", "gptq", kls=better)
    assert state(tmp_path / "a", h, wush) == (1, 0, 0)
    apart = [*wide[1:], 0.2]  # as good on average, other windows: the noise of a pair does not cancel
    assert state(tmp_path / "b", h, record("mxfp4", "wush", "gptq", kls=[one - 0.01 for one in apart])) == (0, 0, 1)
    assert state(tmp_path / "c", h, record("mxfp4", "wush", "gptq", kls=[one + 0.01 for one in wide])) == (0, 1, 0)


def test_a_gap_without_an_interval_is_undecided_but_a_layers_loss_is_what_it_is(tmp_path: Path) -> None:
    single = [record("mxfp4", name, "gptq", kl=kl) for name, kl in (("h", 0.2), ("wush", 0.1))]
    assert state(tmp_path / "a", *single) == (0, 0, 1)
    told = document(load([tmp_path / "a"]))
    assert "no ordering decided, 1 undecided (1 of them without an interval)" in told
    losses = [record("mxfp4", name, blocks=[15], mse={15: mse}) for name, mse in (("h", 0.003), ("wush", 0.002))]
    assert state(tmp_path / "b", *losses, item="table1") == (7, 0, 0)


@pytest.mark.parametrize(("gaps", "states"), [((0.05, 0.06, 0.07), (1, 0, 0)), ((-0.01, 0.05, 0.11), (0, 0, 1))])
def test_seeds_are_compared_in_pairs(gaps: tuple[float, ...], states: tuple[int, ...], tmp_path: Path) -> None:
    base = (0.2, 0.4, 0.6)  # differs between seeds by far more than between methods
    made = [record("mxfp4", "h", "gptq", seed=seed, kl=kl) for seed, kl in enumerate(base)]
    made += [
        record("mxfp4", "wush", "gptq", seed=seed, kl=kl - gap)
        for seed, (kl, gap) in enumerate(zip(base, gaps, strict=True))
    ]
    assert state(tmp_path, *made) == states


def test_seeds_that_change_nothing_do_not_make_a_difference_clear(tmp_path: Path) -> None:
    noisy = [0.2 + 0.3 * (place % 2) for place in range(40)]
    made = [
        record("mxfp4", name, "gptq", seed=seed, kls=own)
        for name, own in (("h", noisy), ("wush", [one - 0.001 for one in (*noisy[1:], noisy[0])]))
        for seed in range(3)
    ]
    assert state(tmp_path, *made) == (0, 0, 1)


def test_seeds_that_change_no_answer_leave_the_documents_to_decide(tmp_path: Path) -> None:
    made = []
    for transform, right in (("h", 50), ("i", 49)):
        for seed in range(3):
            one = record("mxfp4", transform, evaluation="small", seed=seed)
            one.tasks["one"] = answered("one", [1.0] * right + [0.0] * (100 - right))
            made.append(one)
    assert state(tmp_path, *made, item="table2") == (0, 0, 1)


def test_tasks_are_compared_by_document(tmp_path: Path) -> None:
    h = [float(place % 2) for place in range(200)]
    better = [1.0 if place % 20 == 0 else one for place, one in enumerate(h)]  # 10 more, and nothing lost
    shuffled = [1 - one for one in better[:100]] + better[100:]  # about as many more, on other documents
    for name, own, states in (("a", better, (1, 0, 0)), ("b", shuffled, (0, 0, 1))):
        made = []
        for transform, outcomes in (("h", h), ("wush", own)):
            one = record("mxfp4", transform, evaluation="small")
            one.tasks["one"] = answered("one", outcomes)
            made.append(one)
        assert state(tmp_path / name, *made, item="table2") == states


def test_the_papers_tasks_and_platinum_by_calibration_set_are_compared_too(tmp_path: Path) -> None:
    model = "llama3_1_8b_instruct"
    four = ("mmlu_cot", "gsm8k_llama", "hellaswag", "winogrande")
    made = []
    for transform, right in (("h", 40), ("wush", 60)):
        one = record("mxfp4", transform, model=model, evaluation="openllm")
        one.tasks.update({name: answered(name, [1.0] * right + [0.0] * (100 - right)) for name in four})
        made.append(one)
    platinum = [names[0] for names in PLATINUM.values()]
    for calibration, share in (("c4", 0.5), ("fineweb_edu", 0.6)):
        tasks = {name: [share, share + 0.01, share + 0.02] for name in platinum}
        made.append(record("mxfp4", model="qwen3_8b", calibration=calibration, tasks=tasks, evaluation="platinum"))
    assert state(tmp_path, *made, item="table2 by task") == (4, 0, 0)
    assert state_of(tmp_path, "table5 platinum") == (1, 0, 0)
    told = document(load([tmp_path]))
    assert "| mxfp4 | rtn wush | rtn h | 4 | 0 | 0 | 0 | mmlu: 66.85 against 62.38 |" in told


def test_records_come_to_verdicts_with_their_numbers(tmp_path: Path) -> None:
    made = [
        *(record("mxfp4", name, blocks=[15], mse={15: mse}) for name, mse in (("h", 0.003), ("wush", 0.002))),
        *(record("mxfp4", name, "gptq", kls=kls(kl)) for name, kl in (("h", 0.1), ("wush", 0.2))),
        *(
            record("mxfp4", name, tasks={"one": [share]}, evaluation="small")
            for name, share in (("h", 0.5), ("wush", 0.505), ("i", 0.1))
        ),
        *(
            record("mxfp4", name, tasks={"one": shares}, evaluation="sampled")
            for name, shares in (("h", [0.1, 0.2]), ("wush", [0.41, 0.5]))
        ),
    ]
    words = {verdict.item.name: verdict for verdict in map(judge, items(load([store(tmp_path, *made)])))}
    assert words["table1"].word == SAME
    assert words["table1"].count(HOLDS) == 7
    assert words["table4"].word == CONTRADICTED
    assert (words["table2"].count(HOLDS), words["table2"].count(UNDECIDED)) == (2, 1)  # a standard error of 1 point
    assert words["figure3"].word == SAME
    assert words["table5"].word == words["table6"].word == NOT_YET
    told = document(load([tmp_path]))
    assert "| table1 | reproduced at small scale with the same ordering | 7 of 7 decided orderings hold" in told
    assert "| table4 | contradicted | 0 of 1 decided orderings hold, 2 undecided (2 of them without" in told
    example = "| mxfp4 | gptq wush | gptq h | 0 | 1 | 0 | 0 | 0.0779 against 0.0931 | 0.2000 ± 0.00"
    assert example in told
    assert "difference -0.1000 to -0.1000 (smollm2_135m) |" in told
    assert "| table7 | reproduced by arithmetic | 10 of 10" in told


def test_without_records_nothing_is_decided() -> None:
    assert {judge(one).word for one in items(Records())} == {NOT_YET}
    told = document(Records())
    assert "Ours: no trial yet." in told
    assert "contradicted |" not in told
