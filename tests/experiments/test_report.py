"""The sweep report: what its HTML says, and how it behaves in a browser."""

import io
import json
import logging
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from experiments.records import (
    Block,
    BlockError,
    Data,
    Failure,
    Layer,
    Metrics,
    Outcome,
    Record,
    Result,
    Stage,
    Windows,
)
from experiments.store import DamagedRecord, ResultStore
from experiments.views.report import render_report
from experiments.views.report_plots import styles_of
from experiments.views.scales import log_scale, metric_scale, number
from experiments.views.selection import telling
from experiments.views.summary import show_table, summarize, tabulate, to_markdown
from wush.intervals import Sums, of_runs
from wush.version import METHOD_VERSION

BLOCKS = 30
START = datetime(2025, 11, 22, 15, 0, tzinfo=UTC)
CONFIG: dict[str, Any] = {"model": {"_target_": "wush.models.load_packaged_gguf", "dtype": "float32"}, "seed": 0}
REASON = "ValueError: <script>document.title = 'changed'</script> & more"


def blocks(level: float) -> list[Block]:
    """Errors over three decades, with one block that stands out."""
    found = []
    for i in range(BLOCKS):
        relative = level * 10 ** (3 * i / BLOCKS - 3) * (6 if i == 1 else 1 + 0.3 * math.sin(3 * i))
        layer = Layer(name="mlp.up_proj", shared_input=["mlp.gate_proj"], bits_per_weight=4.25, weights=884736)
        name = f"model.layers.{i}"
        held_out, calibration = (BlockError(mse=x * 1e4, relative=x) for x in (relative, relative * 0.8))
        found.append(Block(index=i, name=name, calibration=calibration, held_out=held_out, seconds=1.3, layers=[layer]))
    return found


def record(trial_id: str, choices: dict[str, str], metrics: Metrics, level: float | None) -> Record:
    """A finished trial; an unquantized one when there is no `level` of errors."""
    return Record(
        trial_id=trial_id,
        choices=choices,
        config=CONFIG,
        metrics=metrics,
        blocks=[] if level is None else blocks(level),
        skipped={"model.layers.0.self_attn.q_proj": "excluded by '*.q_proj'"},
        stages={
            "load": Stage(seconds=2.4, peak_memory_bytes=900 * 2**20, peak_gpu_memory_bytes=None),
            "quantize": Stage(seconds=95.0, peak_memory_bytes=3 * 2**30, peak_gpu_memory_bytes=None),
        },
        data={
            "calibration": Data(text_sha256="a" * 64, ids_sha256="b" * 64, tokens=8192),
            "evaluation": Data(text_sha256="c" * 64, ids_sha256="d" * 64, tokens=8192),
        },
        seed=0,
        warnings=["CUDA kernels are not used on this device"],
        versions={"python": "3.11.7", "torch": "2.9.0"},
        git_commit="70db0c0d",
        method_version=METHOD_VERSION,
        model_revision=None,
        environment={"host": "node-7", "device": "cpu: AMD EPYC 9554"},
        started_at=START,
        finished_at=START + timedelta(seconds=97),
    )


def measured(perplexity: float, kl: float, top1: float, bits: float) -> Metrics:
    return Metrics(
        perplexity=perplexity, perplexity_original=14.05, kl=kl, top1=top1, bits_per_weight=bits, predictions=8176
    )


def quantized(fmt: str, transform: str, perplexity: float, kl: float, level: float, **more: str) -> Outcome:
    choices = {"model": "smollm2_135m", "format": fmt, "transform": transform, "algorithm": "rtn"}
    choices |= {key: value for key, value in more.items() if key in ("model", "algorithm")}
    bits = {"mxfp4": 4.25, "nvfp4": 4.5}.get(fmt, 4.25)
    metrics = measured(perplexity, kl, 0.9 - kl / 2, bits)
    name = " ".join([fmt, transform, *more.values()])
    trial_id = f"{sum(ord(c) * 257**i for i, c in enumerate(name)) % 16**16:016x}"
    labels = {**choices, **more}
    return Outcome(trial_id, name, labels, Result.of(record(trial_id, choices, metrics, level)), config=CONFIG)


def failed() -> Outcome:
    labels = {"model": "smollm2_135m", "format": "int4", "transform": "wush", "algorithm": "rtn"}
    environment = {"host": "node-8", "processor": "Failing CPU 9"}
    failure = Failure(
        trial_id="f" * 16, reason=REASON, kind="ValueError", host="node-8", environment=environment, failed_at=START
    )
    config = {"format": {"_target_": "wush.Int4", "scale_rule": "absmax"}}
    return Outcome("f" * 16, "int4 wush", labels, failure=failure, config=config)


def baseline() -> Outcome:
    choices = {"model": "smollm2_135m", "format": "original"}
    metrics = measured(14.05, 0.0, 1.0, 16.0)
    result = Result.of(record("0" * 16, choices, metrics, None))
    return Outcome("0" * 16, "original", choices, result, earlier=True, config=CONFIG)


def sweep() -> list[Outcome]:
    """A failed trial, an unquantized one, and two formats with two transforms each."""
    return [
        failed(),
        quantized("mxfp4", "h", 27.0, 0.62, 0.4),
        quantized("mxfp4", "wush", 19.1, 0.31, 0.1),
        baseline(),
        quantized("nvfp4", "h", 20.0, 0.35, 0.2),
        quantized("nvfp4", "wush", 17.5, 0.22, 0.05),
    ]


def at_perplexity(outcome: Outcome, perplexity: float) -> Outcome:
    assert outcome.result is not None
    metrics = outcome.result.metrics.model_copy(update={"perplexity": perplexity})
    return replace(outcome, result=replace(outcome.result, metrics=metrics))


def render(title: str, outcomes: list[Outcome]) -> str:
    """The report, with records made of the outcomes' results."""
    results = {outcome.trial_id: outcome.result for outcome in outcomes if outcome.result}

    def read(trial_id: str) -> Record:
        return record(trial_id, results[trial_id].choices, results[trial_id].metrics, None)

    return render_report(title, outcomes, read)


def rows(html: str) -> list[str]:
    return re.findall(r"<tr data-status.*?</tr>", html, re.S)


def cells(row: str) -> list[str]:
    return [re.sub(r"<[^>]+>", "", cell).strip() for cell in re.findall(r"<td.*?</td>", row, re.S)]


# --- what it says


def test_the_same_outcomes_give_the_same_bytes() -> None:
    assert render("grid", sweep()) == render("grid", sweep())


def test_the_page_names_no_other_place() -> None:
    html = render("grid", sweep())
    assert not re.search(r"https?:|//[a-z]|@import|url\(|<(link|script|img)[^>]+(src|href)=\"(?!data:)", html)


def test_a_reason_cannot_become_markup() -> None:
    html = render("<b>grid</b>", sweep())
    assert html.count("<script>") == 1
    assert "&lt;script&gt;document.title" in html
    assert "<title>&lt;b&gt;grid&lt;/b&gt;</title>" in html


def test_the_summary_counts_trials_and_names_the_best() -> None:
    html = re.sub(r"<a [^>]+>|</a>", "", render("grid", sweep()))
    assert "6 trials: 5 done, 1 failed; best KL 0.2200, nvfp4 wush." in html


def test_a_failed_trial_shows_its_config_and_where_it_ran() -> None:
    html = render("grid", [failed()])
    assert "scale_rule: absmax" in html
    assert "processor: Failing CPU 9" in html


def test_an_unquantized_trial_is_never_the_best() -> None:
    row = next(row for row in rows(render("grid", sweep())) if "original" in row)
    assert "<strong>" not in row
    assert cells(row)[4:9] == ["14.05", "+0.00", "0.0000", "100.0", "16.00"]


def test_the_best_quantized_value_of_each_column_is_bold() -> None:
    html = render("grid", sweep())
    bold = re.findall(r"<strong>(.*?)</strong>", html)
    assert bold == ["17.50", "+3.45", "0.2200", "79.0"], "and bits are not: fewer are no better quality"


def test_bold_compares_within_a_model_only() -> None:
    other = [quantized("mxfp4", t, p, 0.1, 0.1, model="qwen3_8b") for t, p in [("h", 29.0), ("wush", 28.0)]]
    bold = re.findall(r"<strong>(.*?)</strong>", render("grid", sweep() + other))
    assert {"17.50", "28.00"} <= set(bold)
    assert "29.00" not in bold


def test_a_failed_trial_shows_its_reason_over_the_numbers_and_where_its_log_is() -> None:
    html = render("grid", sweep())
    row = next(row for row in rows(html) if 'data-status="failed"' in row)
    assert 'colspan="6"' in row
    assert len(cells(row)) == 4 + 1 + 1
    assert "trials/ffffffffffffffff/trial.log" in html


def test_a_label_that_a_trial_lacks_is_a_dash() -> None:
    row = next(row for row in rows(render("grid", sweep())) if "original" in row)
    assert cells(row)[:4] == ["smollm2_135m", "original", "–", "–"]


def test_details_hold_what_a_trial_was_made_of() -> None:
    html = render("grid", sweep())
    for text in ("b" * 64, "8,192", "1 min 35 s", "3.0 GiB", "torch 2.9.0", "70db0c0d", "node-7", "AMD EPYC 9554"):
        assert text in html, text
    for text in ("2025-11-22 15:01:37 UTC", "load_packaged_gguf", "CUDA kernels are not used", "excluded by"):
        assert text in html, text


def test_a_sweep_without_a_quantized_trial_says_so() -> None:
    html = render("grid", [failed(), baseline(), Outcome("e" * 16, "int4 h", {"format": "int4"})])
    assert "3 trials: 1 done, 1 failed, 1 queued." in html
    assert "<svg" not in html
    assert "The plots appear once" in html
    assert "0 trials: 0 done, 0 failed." in render("grid", [])


def test_a_perplexity_that_is_not_finite_is_shown_but_not_drawn() -> None:
    html = render("grid", [*sweep()[1:3], at_perplexity(quantized("int4", "h", 1.0, 0.5, 0.1), math.nan)])
    assert "nan" in cells(rows(html)[2])
    assert "1 without a finite value not drawn" in html
    assert html.count('class="mark') == 2 + 3
    assert "NaN" not in "".join(re.findall(r"<svg.*?</svg>", html, re.S))


def test_a_plot_is_drawn_for_each_model() -> None:
    html = render("grid", [*sweep(), quantized("mxfp4", "h", 9.0, 0.1, 0.1, model="qwen3_8b")])
    assert re.findall(r"<h3>(.*?)</h3>", html) == ["smollm2_135m", "qwen3_8b"] * 2


def test_several_algorithms_are_row_groups_of_their_own() -> None:
    html = render("grid", [*sweep(), quantized("mxfp4", "wush", 16.0, 0.2, 0.1, algorithm="gptq")])
    names = re.findall(r'<text class="name".*?>(.*?)<title>', html)
    assert names == ["mxfp4 · rtn", "nvfp4 · rtn", "mxfp4 · gptq"] * 2


def test_keys_that_differ_make_row_groups_and_transforms_but_seeds_do_not() -> None:
    extra = [
        quantized("mxfp4", "wush", 19.0, 0.3, 0.1, **{"format.scale_rule": "ocp"}),
        quantized("nvfp4", "wush", 17.0, 0.2, 0.1, **{"transform.refit": "false"}),
        quantized("nvfp4", "wush", 17.1, 0.2, 0.1, **{"transform.seed": "3"}),
    ]
    html = render("grid", sweep() + extra)
    assert re.findall(r'<text class="name".*?>(.*?)<title>', html)[:3] == ["mxfp4", "nvfp4", "mxfp4 scale_rule=ocp"]
    legend = re.search(r'<ul class="legend">(.*?)</ul>', html, re.S)
    assert legend
    assert re.findall(r"</svg>(.*?)</li>", legend[1]) == ["h", "wush", "wush refit=false"]


def test_at_most_24_curves_are_drawn_and_the_page_says_so() -> None:
    many = [quantized("mxfp4", "r", 20.0 + i, 0.5 - i / 100, 0.1, windows=str(i)) for i in range(30)]
    html = render("grid", many)
    assert html.count('<path class="curve') == 24
    assert html.count('<path class="thin curve') == 24
    assert "the 24 trials lowest in KL, of 30" in html
    drawn = re.findall(r'<path class="curve.*?data-name="(.*?)"', html)
    assert set(drawn) == {f"mxfp4 r {i}" for i in range(6, 30)}


def test_a_trial_that_runs_or_waits_shows_how_far_it_is() -> None:
    running = replace(failed(), running=True, detail="block 3 of 30, 2 min left")
    queued = Outcome("e" * 16, "int4 h", {"format": "int4"}, detail="job 12 waits for a node")
    html = render("grid", [running, queued, *sweep()[1:]])
    assert "7 trials: 5 done, 0 failed, 1 running, 1 queued" in html
    assert [re.search('data-status="(.*?)"', row)[1] for row in rows(html)[:2]] == ["running", "queued"]  # type: ignore[index]
    assert [cells(row)[4] for row in rows(html)[:2]] == ["block 3 of 30, 2 min left", "job 12 waits for a node"]
    assert REASON not in html


def test_advice_stands_next_to_the_reason_of_a_failure() -> None:
    one = failed()
    assert one.failure
    advised = replace(one, failure=one.failure.model_copy(update={"reason": "out of memory", "advice": "use less"}))
    html = render("grid", [advised])
    assert cells(rows(html)[0])[4] == "out of memory; use less"
    assert "<dt>Advice</dt><dd>use less</dd>" in html
    assert to_markdown("grid", tabulate([advised])).endswith(f"{'f' * 16} failed: out of memory; use less |\n")


def test_a_record_that_cannot_be_read_any_more_is_said_to_be_so() -> None:
    def damaged(_: str) -> Record:
        raise DamagedRecord("its result.json is damaged")

    html = render_report("grid", sweep(), damaged)
    assert html.count("its result.json is damaged") == 5
    assert "no longer there" in render_report("grid", sweep(), lambda _: None)


# --- intervals, seeds, older methods


def with_windows(outcome: Outcome, count: int = 40) -> Outcome:
    """The outcome with sums of windows that scatter about its metrics, KL by a tenth."""
    assert outcome.result is not None
    metrics = outcome.result.metrics
    swing = [0.9 + 0.2 * i / (count - 1) for i in range(count)]
    windows = Windows(
        nll=[100 * (math.log(metrics.perplexity) + x - 1) for x in swing],
        nll_original=[100 * (math.log(14.05) + x - 1) for x in swing],
        kl=[100 * metrics.kl * x for x in swing],
        agree=[round(100 * metrics.top1 * x) for x in swing],
        predictions=[100] * count,
    )
    return replace(outcome, result=replace(outcome.result, windows=Sums(windows)))


def seeds_of(transform: str, *kl: float, fmt: str = "mxfp4") -> list[Outcome]:
    """Trials that differ by seed only; their perplexities follow from KL."""
    return [
        quantized(fmt, transform, 15 + 10 * one, one, 0.1 * (1 + seed), **{"calibration.seed": str(seed)})
        for seed, one in enumerate(kl)
    ]


def changed(outcome: Outcome, **changes: Any) -> Outcome:
    assert outcome.result is not None
    return replace(outcome, result=replace(outcome.result, **changes))


def test_a_trial_is_shown_with_intervals_over_its_windows_and_the_page_says_what_they_are() -> None:
    outcomes = [with_windows(one) if one.result else one for one in sweep()]
    html = render("grid", outcomes)
    best = next(cells(row) for row in rows(html) if "17.50" in row)
    assert re.fullmatch(r"\+3\.45 ± 0\.\d\d", best[5])
    kl, margin = map(float, best[6].split(" ± "))
    assert (kl, margin) == (0.22, pytest.approx(0.22 * 0.059 * 2.02 / math.sqrt(40), rel=0.1))
    assert re.fullmatch(r"79\.0 ± \d\.\d", best[7])
    assert "±: 95% interval, bootstrapped over a trial&#39;s windows" in html
    assert f"best KL {best[6]}, " in html
    text = to_markdown("grid", tabulate(outcomes))
    assert re.search(r"\| \+3\.45 ± 0\.\d{2} \| 0\.2200 ± 0\.\d{4} \| 79\.0 ± \d\.\d% \|", text)
    assert "- ±: 95% interval" in text
    original = next(row for row in text.splitlines() if "original |" in row)
    assert " ± " not in original, "it does not differ from itself"
    assert html.count('<path class="interval') == 2 * 4


def test_without_windows_nothing_is_said_to_be_an_interval() -> None:
    assert " ± " not in to_markdown("grid", tabulate(sweep()))
    assert '<path class="interval' not in render("grid", sweep())


def test_trials_that_differ_by_seed_are_one_row_with_mean_interval_and_number() -> None:
    kl = {"h": (0.62, 0.6, 0.64), "wush": (0.3, 0.31, 0.35)}
    outcomes = [baseline(), *seeds_of("h", *kl["h"]), *seeds_of("wush", *kl["wush"])]
    table = tabulate(outcomes)
    assert len(table.rows) == 3
    assert "calibration.seed" not in table.columns
    place = {name: i for i, name in enumerate(table.columns)}
    for row, transform in zip(table.rows[1:], ("h", "wush"), strict=True):
        interval = of_runs(kl[transform])
        assert interval
        mean = sum(kl[transform]) / 3
        assert row[place["transform"]] == transform
        assert row[place["seeds"]] == "3"
        assert row[place["KL"]] == f"{mean:.4f} ± {interval.high - mean:.4f}"
        assert row[place["trial"]].endswith(" +2")
    assert table.rows[0][place["seeds"]] == "-"


def test_seeds_that_change_nothing_have_the_interval_of_one_trial() -> None:
    same = [with_windows(one) for one in seeds_of("h", 0.62, 0.62, 0.62)]
    table = tabulate(same)
    place = table.columns.index("KL")
    assert [row[place] for row in table.rows] == [tabulate(same[:1]).rows[0][place]]
    assert re.fullmatch(r"0\.6200 ± 0\.01\d\d", table.rows[0][place])


@pytest.mark.parametrize("key", ["seed", "calibration.seed", "transform.signs", "evaluation.seeds"])
def test_every_key_that_only_draws_again_is_a_seed(key: str) -> None:
    outcomes = [quantized("mxfp4", "wush", 19.0, 0.3 + i / 100, 0.1, **{key: f"[{i}]"}) for i in range(3)]
    (row,) = tabulate(outcomes).rows
    assert row[0] == "3"
    assert tabulate(outcomes[:1]).rows[0][0] == "seed 0"
    others = [quantized("mxfp4", "wush", 19.0, 0.3, 0.1, **{"quantize.seedless": str(i)}) for i in range(3)]
    assert len(tabulate(others).rows) == 3


def test_what_is_chosen_without_a_seed_is_no_draw_of_the_sampled() -> None:
    signs = ("None", "0", "1", "2")
    outcomes = [quantized("mxfp4", "wush", 19.0, 0.3, 0.1, **{"transform.signs": one}) for one in signs]
    table = tabulate(outcomes)
    assert [row[table.columns.index("seeds")] for row in table.rows] == ["seed None", "3"]


def test_a_seed_that_is_not_done_keeps_its_own_row() -> None:
    first, second, third = seeds_of("h", 0.62, 0.6, 0.64)
    waiting = replace(third, result=None)
    table = tabulate([first, waiting, second])
    seeds = table.columns.index("seeds")
    assert [row[seeds] for row in table.rows] == ["2", "seed 2"]
    assert "queued" in table.rows[1][-1]


def test_trials_of_other_texts_or_methods_are_no_seeds_of_each_other() -> None:
    first, second, third = seeds_of("h", 0.62, 0.6, 0.64)
    others = [changed(second, evaluated="other"), changed(third, method_version=METHOD_VERSION - 1)]
    assert len(tabulate([first, *others]).rows) == 3


def test_the_report_shows_means_first_and_each_trial_on_click() -> None:
    outcomes = [*seeds_of("h", 0.62, 0.6, 0.64), *seeds_of("wush", 0.3, 0.31, 0.35)]
    html = render("grid", outcomes)
    tables = re.findall(r'<table id="(.*?)">(.*?)</table>', html, re.S)
    assert [(name, len(rows(body))) for name, body in tables] == [("means", 2), ("trials", 6)]
    assert html.index("Each of the 6 trials") < html.index('<table id="trials"')
    assert "best KL 0.3200 ± 0.0657, " in html
    assert "mxfp4 wush rtn, mean of 3 seeds" in html
    assert html.count('class="mark') == 2 * 2, "a mark is a mean"
    assert html.count('<path class="interval') == 2 * 2
    assert len(re.findall(r'<path class="curve', html)) == 2


def test_a_perplexity_below_the_originals_is_never_the_best() -> None:
    below = at_perplexity(quantized("nvfp4", "wus", 17.0, 0.9, 0.3), 13.9)
    html = render("grid", [*sweep(), below])
    bold = re.findall(r"<strong>(.*?)</strong>", html)
    assert bold == ["17.50", "+3.45", "0.2200", "79.0"]
    assert "best KL 0.2200" in html


def test_a_trial_of_an_earlier_method_is_marked_and_counts_neither_as_done_nor_as_the_best() -> None:
    outcomes = sweep()
    outcomes[-1] = changed(outcomes[-1], method_version=METHOD_VERSION - 1)
    html = render("grid", outcomes)
    row = next(row for row in rows(html) if "17.50" in row)
    assert 'data-status="old"' in row
    assert "<strong>" not in row
    assert "6 trials: 4 done, 1 failed, 1 old; best KL 0.3100" in html
    assert "nvfp4 wush (old)" in html
    table = tabulate(outcomes)
    assert [row[-1].endswith(" old") for row in table.rows] == [False] * 5 + [True]
    assert any(note.startswith("old: ") for note in table.notes)
    assert not any(note.startswith("old: ") for note in tabulate(sweep()).notes)


def test_the_heading_names_the_originals_perplexity_and_what_its_weights_are() -> None:
    outcomes = [changed(one, model_note="Q4_1, read dequantized") if one.result else one for one in sweep()]
    line = "smollm2_135m (Q4_1, read dequantized): original perplexity 14.050"
    assert line in render("grid", outcomes)
    assert f"- {line}\n" in to_markdown("grid", tabulate(outcomes))
    other = changed(quantized("mxfp4", "h", 9.0, 0.1, 0.1), evaluated="e" * 64)
    assert "original perplexity 14.050 on dddddddd, 14.050 on eeeeeeee" in render("grid", [*sweep(), other])


def test_the_share_that_is_quantized_stands_beside_bits_where_it_is_not_all() -> None:
    assert "(" not in "".join(tabulate(sweep()).rows[1])
    one = sweep()[1]
    assert one.result
    part = one.result.metrics.model_copy(update={"bits_per_weight": 10.5, "quantized_share": 0.51999})
    outcomes = [changed(one, metrics=part)]
    table = tabulate(outcomes)
    assert "10.50 (51.9%)" in table.rows[0]
    assert any("share quantized" in note for note in table.notes)
    assert "10.50 (51.9%)" in render("grid", outcomes)


def test_curves_are_of_held_out_tokens_and_thin_ones_of_the_calibration() -> None:
    html = render("grid", sweep())
    assert "output on held-out tokens, log axis" in html
    assert "thin: on the calibration tokens" in html
    named = re.findall(r'<path class="(thin )?curve.*?data-name="(.*?)"', html)
    assert {bool(thin) for thin, name in named if name.endswith(", calibration tokens")} == {True}
    assert len(named) == 2 * 4
    old = [changed(one, errors={}) if one.result else one for one in sweep()]
    html = render("grid", old)
    assert "output on the calibration tokens, log axis" in html
    assert len(re.findall(r'<path class="thin curve', html)) == 4
    assert html.count('<path class="curve') == 0


def test_of_very_many_rows_single_trials_have_no_intervals() -> None:
    outcomes = [with_windows(one) if one.result else one for one in many(600)]
    assert not any(" ± " in cell for row in tabulate(outcomes).rows for cell in row)
    assert any(" ± " in cell for row in tabulate(outcomes[:450]).rows for cell in row)


@pytest.mark.parametrize("width", [100, 120, 160])
def test_a_narrow_terminal_cuts_no_number_and_no_label(width: int) -> None:
    outcomes = [with_windows(one) for one in sweep() if one.result]
    if width > 100:
        outcomes += [*seeds_of("wus", 0.6, 0.61), quantized("mxfp4", "h", 20.0, 0.3, 0.1, algorithm="gptq")]
    console = Console(width=width, file=io.StringIO())
    show_table(console, "grid", outcomes, Path("results"))
    assert isinstance(console.file, io.StringIO)
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]
    table = tabulate(outcomes)
    header = next(line for line in lines if line.startswith(" format "))
    kept = [i for i, column in enumerate(table.columns[:-1]) if column in header]
    for row in table.rows:
        trial, _, more = row[-1].partition(" ")
        expected = " ".join([*(row[i] for i in kept), trial[:8], more]).split()
        assert expected in [line.split() for line in lines]
    assert {"vs original", "KL", "top-1", "bits"} <= {table.columns[i] for i in kept}


# --- many trials


def many(count: int) -> list[Outcome]:
    """Trials of four lanes, of which every fiftieth failed."""
    found = []
    for i in range(count):
        kl = i * 7 % 1000 / 200
        one = quantized(("mxfp4", "nvfp4")[i % 2], ("h", "wush")[i // 2 % 2], 15 + 10 * kl, kl, 0.1)
        labels = {**one.labels, "calibration.windows": str(i // 4)}
        trial_id = f"{i:016x}"
        if i % 50 == 49:
            failure = Failure(
                trial_id=trial_id, reason="no memory", kind="E", host="h", environment={}, failed_at=START
            )
            found.append(Outcome(trial_id, f"trial {i}", labels, failure=failure, config=CONFIG))
        else:
            assert one.result
            result = replace(one.result, trial_id=trial_id)
            found.append(Outcome(trial_id, f"trial {i}", labels, result, config=CONFIG))
    return found


def test_of_many_trials_every_one_has_a_row_and_some_have_details_and_marks() -> None:
    outcomes = many(1500)
    read = []
    html = render_report("grid", outcomes, lambda trial_id: read.append(trial_id))  # type: ignore[func-returns-value]
    assert len(rows(html)) == 1500
    assert html.count("<details ") == 100
    assert len(read) == 100 - 30  # only the records of trials whose details are shown
    assert "100 of 1,500 trials have their details here" in html
    assert html.count('class="mark') == 2 * 500
    assert "500 of 1,470 trials: the least, the greatest" in html
    linked = set(re.findall(r'href="#(trial-\w+)"', html))
    assert linked <= set(re.findall(r'<details id="(trial-\w+)"', html))
    assert len(html) < 1500 * 600 + 1_000_000


def test_details_are_of_the_failed_and_then_of_the_best() -> None:
    html = render("grid", many(1500))
    shown = re.findall(r'<span class="state \w+">(\w+)</span></summary>', html)
    assert shown == ["failed"] * 30 + ["done"] * 70
    kl = {f"trial {i}": i * 7 % 1000 / 200 for i in range(1500)}
    names = re.findall(r'<span class="name">(.*?)</span>', html)[30:]
    assert [kl[name] for name in names] == sorted(kl[f"trial {i}"] for i in range(1500) if i % 50 != 49)[:70]


def test_failed_trials_leave_half_of_the_places_to_others() -> None:
    outcomes = many(60)
    failures = [replace(one, result=None, failure=outcomes[49].failure) for one in outcomes[:30]]
    states = [one.state for one in telling([*failures, *outcomes[30:49]], 20)]
    assert states == ["failed"] * 10 + ["done"] * 10
    assert [one.state for one in telling([*failures, *outcomes[30:33]], 20)] == ["failed"] * 17 + ["done"] * 3
    running = replace(failures[0], running=True)
    assert telling([*outcomes[:40], running], 20)[0] is running
    assert telling(outcomes, 60) is outcomes


def test_of_a_lane_with_many_trials_the_extreme_ones_are_drawn() -> None:
    html = render("grid", many(1500))
    _, plot = re.findall(r'<svg class="plot dots".*?</svg>', html, re.S)
    for extreme in (min, max):
        perplexity = extreme(15 + i * 7 % 1000 / 20 for i in range(1500) if i % 50 != 49)
        assert f": {perplexity:.2f}</title>" in plot


def test_panels_are_bounded_and_the_page_says_so() -> None:
    others = [quantized("mxfp4", "h", 9.0, 0.1, 0.1, model=f"model{i}") for i in range(12)]
    html = render("grid", others)
    assert len(re.findall(r"<h3>", html)) == 2 * 8
    assert "The first 8 of 12 pairs of model and evaluation text are plotted" in html


def test_a_long_table_is_shown_in_part_on_a_terminal_and_whole_in_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = ResultStore(tmp_path)
    store.sweep("grid").mkdir(parents=True)
    summarize("grid", many(100), store)
    shown = capsys.readouterr().out
    assert len(re.findall(r"^ (?:mxfp4|nvfp4) .*$", shown, re.M)) == 40
    assert re.search(r"40 of 100 trials: the failed, then the running.*all are in .*table.md", shown)
    assert "98 of 100 trials done, 2 failed" in shown
    assert (store.sweep("grid") / "table.md").read_text().count("\n| ") == 101


def test_importing_the_report_does_not_import_torch() -> None:
    code = "import sys, experiments.views.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# --- scales


def test_values_far_apart_take_a_log_axis() -> None:
    assert metric_scale([1.0, 21.0], 0, 100).log
    assert not metric_scale([1.0, 20.0], 0, 100).log
    assert not metric_scale([0.0, 100.0], 0, 100).log


@pytest.mark.parametrize("values", [[17.5, 27.0], [3.0], [0.0], [1e-7, 1.5e-7], [14.05, 1e6], [99.9, 100.1]])
def test_an_axis_holds_its_values_and_ends_on_its_ticks(values: list[float]) -> None:
    scale = metric_scale(values, 10, 110)
    assert all(10 <= scale.at(value) <= 110 for value in values)
    assert [scale.at(scale.ticks[0]), scale.at(scale.low), scale.at(scale.high)] == [10, 10, 110]
    texts = [tick.text for tick in scale.labelled()]
    assert 2 <= len(texts) <= 12
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0.012, 0.4, (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)), (3e-4, 0.4, (1e-3, 1e-2, 1e-1)), (0.2, 0.2, (0.2, 0.5))],
)
def test_log_ticks_are_round(low: float, high: float, ticks: tuple[float, ...]) -> None:
    assert log_scale(low, high, 0, 100).ticks == ticks


def test_numbers_have_three_digits() -> None:
    assert [number(x) for x in (0.012345, 25.0, 1.234e-5, 1e-4, 2e6)] == ["0.0123", "25", "1.23×10⁻⁵", "10⁻⁴", "2×10⁶"]


def test_transforms_differ_in_colour_and_in_shape() -> None:
    styles = styles_of(["wush", "h", "i", "r", "wus", "mine", "yours"]).values()
    assert len({style.colour for style in styles}) == len({style.shape for style in styles}) == 7
    assert styles_of(["wush"])["wush"] == styles_of(["h", "wush"])["wush"]


# --- how it behaves

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
OPTIONS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1280,1000",
)


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Any]:
    """The sweep's report, open in headless Chromium."""
    if not (BROWSER and DRIVER):
        pytest.skip("chromium and chromedriver are not both installed")
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for option in (*OPTIONS, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    logging.getLogger("selenium").setLevel(logging.WARNING)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        file = tmp_path / "report.html"
        file.write_text(render("grid", sweep()), encoding="utf-8")
        driver.get(file.as_uri())
        yield driver
    finally:
        driver.quit()


def requests(page: Any) -> list[str]:
    messages = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    sent = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    # Chromium's own first tab loads parts of its own.
    return [m["request"]["url"] for m in sent if m["documentURL"].startswith("file:")]


def column(page: Any, title: str) -> list[str]:
    """Texts of the column's cells, from top to bottom; of a failed trial, its status."""
    script = """
        const headers = [...document.querySelectorAll('#trials th')];
        const index = headers.findIndex(header => header.textContent === arguments[0]);
        const failed = row => row.dataset.status === 'failed';
        return [...document.querySelectorAll('#trials tbody tr')].map(
            row => failed(row) ? 'failed' : row.cells[index].textContent);
    """
    return [str(text) for text in page.execute_script(script, title)]


def header(page: Any, title: str) -> Any:
    return page.find_element("xpath", f"//table[@id='trials']//th[button[text()='{title}']]")


@pytest.mark.browser
def test_the_page_makes_no_request_and_logs_no_error(page: Any) -> None:
    header(page, "Perplexity").find_element("tag name", "button").click()
    page.find_element("css selector", "#trials a").click()
    assert [url for url in requests(page) if not url.startswith("data:")] == [page.current_url.partition("#")[0]]
    assert [entry for entry in page.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
    assert page.title == "grid"


@pytest.mark.browser
def test_a_header_sorts_by_number_and_then_in_reverse_with_the_failed_trial_last(page: Any) -> None:
    assert column(page, "Perplexity")[0] == "failed"
    button = header(page, "Perplexity").find_element("tag name", "button")
    button.click()
    assert column(page, "Perplexity") == ["14.05", "17.50", "19.10", "20.00", "27.00", "failed"]
    assert header(page, "Perplexity").get_attribute("aria-sort") == "ascending"
    button.click()
    assert column(page, "Perplexity") == ["27.00", "20.00", "19.10", "17.50", "14.05", "failed"]
    assert header(page, "Perplexity").get_attribute("aria-sort") == "descending"


@pytest.mark.browser
def test_of_a_long_table_the_first_rows_of_any_order_are_shown_until_all_are_asked_for(
    page: Any, tmp_path: Path
) -> None:
    file = tmp_path / "many.html"
    file.write_text(render("grid", many(1500)), encoding="utf-8")
    page.get(file.as_uri())
    visible = "return [...document.querySelectorAll('#trials tbody tr')].filter(row => row.checkVisibility()).length"
    assert page.execute_script(visible) == 500
    header(page, "Perplexity").find_element("tag name", "button").click()
    assert page.execute_script(visible) == 500
    values = [float(text) for text in column(page, "Perplexity") if text != "failed"]
    assert values == sorted(values)
    assert len(values) == 1470
    assert column(page, "Perplexity")[1470:] == ["failed"] * 30
    button = page.find_element("css selector", ".more button")
    assert button.text == "Show all 1,500"
    button.click()
    assert page.execute_script(visible) == 1500
    assert not button.is_displayed()


@pytest.mark.browser
def test_numbers_sort_by_size_and_not_by_spelling(page: Any) -> None:
    header(page, "Top-1 (%)").find_element("tag name", "button").click()
    assert column(page, "Top-1 (%)") == ["59.0", "72.5", "74.5", "79.0", "100.0", "failed"]


@pytest.mark.browser
def test_the_keyboard_sorts_and_labels_that_lack_a_value_come_last(page: Any) -> None:
    button = header(page, "transform").find_element("tag name", "button")
    for direction, expected in (("ascending", ["h", "h", "wush", "wush"]), ("descending", ["wush", "wush", "h", "h"])):
        button.send_keys("\ue007")  # Enter
        assert column(page, "transform") == [*expected, "–", "failed"]
        assert header(page, "transform").get_attribute("aria-sort") == direction


@pytest.mark.browser
def test_the_plots_show_every_quantized_trial(page: Any) -> None:
    dots = page.find_elements("css selector", "svg.dots")
    assert [len(plot.find_elements("css selector", ".mark")) for plot in dots] == [4, 4]
    assert [len(plot.find_elements("css selector", ".reference")) for plot in dots] == [0, 1]
    shapes = {mark.get_attribute("data-shape") for mark in dots[0].find_elements("css selector", ".mark")}
    fills = {mark.value_of_css_property("fill") for mark in dots[0].find_elements("css selector", ".mark")}
    assert len(shapes) == len(fills) == 2
    curves = page.find_elements("css selector", "path.curve:not(.thin)")
    assert [len(curve.get_attribute("data-points").split(";")) for curve in curves] == [BLOCKS] * 4
    assert len(page.find_elements("css selector", "path.thin.curve")) == 4
    assert len({curve.value_of_css_property("stroke-dasharray") for curve in curves}) == 2


@pytest.mark.browser
def test_marks_lie_to_the_right_of_the_original_in_order_of_perplexity(page: Any) -> None:
    _, plot = page.find_elements("css selector", "svg.dots")
    places = {m.find_element("tag name", "title").get_attribute("textContent"): m.rect["x"] + m.rect["width"] / 2
              for m in plot.find_elements("css selector", ".mark")}  # fmt: skip
    assert sorted(places, key=lambda title: places[title]) == [
        "nvfp4 wush: 17.50", "mxfp4 wush: 19.10", "nvfp4 h: 20.00", "mxfp4 h: 27.00"
    ]  # fmt: skip
    assert plot.find_element("css selector", ".reference").rect["x"] < min(places.values())


@pytest.mark.browser
def test_pointing_at_a_curve_names_its_trial_and_block(page: Any) -> None:
    script = """
        const curve = document.querySelector('.curve:not(.thin)'), svg = curve.ownerSVGElement;
        svg.scrollIntoView({block: 'center'});
        const [x, y] = curve.dataset.points.split(';')[12].split(' ');
        const box = svg.getBoundingClientRect(), scale = box.width / svg.viewBox.baseVal.width;
        const clientX = box.left + x * scale, clientY = box.top + y * scale;
        svg.dispatchEvent(new PointerEvent('pointermove', {clientX, clientY}));
        return [curve.dataset.name, document.querySelector('.tip').textContent];
    """
    name, tip = page.execute_script(script)
    assert re.fullmatch(rf"{name}, block 12: 0\.0\d+", tip)


@pytest.mark.browser
def test_a_trials_link_opens_its_details(page: Any) -> None:
    details = page.find_element("id", "trial-" + "f" * 16)
    assert page.find_elements("css selector", "details[open]") == []
    page.find_element("css selector", "#trials tr[data-status=failed] a").click()
    assert page.find_elements("css selector", "details[open]") == [details]
    assert REASON in details.text
    assert page.find_elements("css selector", "main script") == []


@pytest.mark.browser
def test_the_page_is_no_wider_than_a_narrow_window(page: Any) -> None:
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 420, "height": 900, "deviceScaleFactor": 1, "mobile": True}
    )
    assert page.execute_script("return document.documentElement.scrollWidth") == 420
    assert page.execute_script("const b = document.querySelector('.compare'); return b.scrollWidth > b.clientWidth")
