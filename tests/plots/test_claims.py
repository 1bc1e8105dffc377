"""What the paper claims in words: its numbers, ours, and how each is judged."""

import json
from pathlib import Path

import pytest

from plots import claims
from plots.claims import Claim, document, overhead
from plots.records import Records, load
from plots.reference import Unreadable
from tests.plots.conftest import answered, record, store

FOUR = ("mmlu_cot", "gsm8k_llama", "hellaswag", "winogrande")


def found(folder: Path, *made: object) -> dict[str, Claim]:
    return {one.text: one for one in claims.claims(load([store(folder, *made)]))}  # type: ignore[arg-type]


def openllm(transform: str, right: int, model: str, algorithm: str = "rtn", fmt: str = "mxfp4") -> object:
    made = record(fmt, transform, algorithm, model=model, evaluation="openllm")
    made.tasks.update({name: answered(name, [1.0] * right + [0.0] * (200 - right)) for name in FOUR})
    return made


def test_each_number_of_the_text_is_that_of_the_papers_tables() -> None:
    stated = {one.text: (one.published, one.ours, one.verdict) for one in claims.accuracies(Records())}
    numbers = [published.partition("by the table ")[2].rstrip(")") for published, _, _ in stated.values()]
    assert [round(float(one), 1) for one in numbers[:4]] == [2.8, 0.7, 1.2, 0.7]  # 1.25 is rounded up in the text
    assert numbers[4:] == ["0.36", "98.30"]
    assert {rest for _, *rest in stated.values() for rest in rest} == {"not run"}


def test_without_records_only_what_is_measured_on_kernels_is_known() -> None:
    told = document(Records())
    assert "by the figure 5.76, RTX 5090" in told
    assert "1.3% (by the figure 1.31%)" in told
    lines = [line for line in told.splitlines() if line.startswith("| ") and "| not run | not run |" in line]
    measured = [line for line in told.splitlines() if "fastest layer" in line or "adds to the time" in line]
    assert len(measured) == 2
    assert not set(measured) & set(lines)


@pytest.mark.parametrize(("right", "verdict"), [(150, "holds"), (50, "does not hold"), (101, "undecided")])
def test_a_gain_is_judged_by_its_paired_interval_on_the_papers_model(right: int, verdict: str, tmp_path: Path) -> None:
    model = "llama3_1_8b_instruct"
    own = found(tmp_path, openllm("h", 100, model), openllm("wush", right, model), openllm("h", 0, "smollm2_135m"))
    claim = own["WUSH over Hadamard in MXFP4, RTN, Llama-3.1-8B-Instruct"]
    assert claim.verdict == verdict
    assert claim.ours.startswith(f"{(right - 100) / 2:.2f} ± ")
    assert claim.ours.endswith("(Llama-3.1-8B-Instruct)")


def test_a_small_model_stands_in_and_is_said_to(tmp_path: Path) -> None:
    own = found(tmp_path, openllm("h", 100, "smollm2_135m"), openllm("wush", 150, "smollm2_135m"))
    claim = own["WUSH over Hadamard in MXFP4, RTN, Llama-3.1-8B-Instruct"]
    assert claim.verdict == "holds at small scale"
    assert "smollm2_135m" in claim.ours


def test_plain_gptq_is_not_mr_gptq(tmp_path: Path) -> None:
    model, text = "llama3_1_8b_instruct", "WUSH over Hadamard in MXFP4, GPTQ (MR-GPTQ), Llama-3.1-8B-Instruct"
    wush = openllm("wush", 150, model, "gptq")
    assert found(tmp_path / "a", wush, openllm("h", 100, model, "gptq"))[text].verdict == "not run"
    assert found(tmp_path / "b", wush, openllm("h", 100, model, "mr_gptq"))[text].verdict == "holds"


@pytest.mark.parametrize(("nvfp4", "verdict"), [(140, "holds"), (150, "undecided"), (180, "does not hold")])
def test_the_gap_between_formats_is_to_be_at_most_as_large(nvfp4: int, verdict: str, tmp_path: Path) -> None:
    model = "qwen3_14b"
    own = found(tmp_path, openllm("wush", nvfp4, model, fmt="nvfp4"), openllm("wush", 150, model))
    assert own["NVFP4 over MXFP4, both WUSH with RTN, Qwen3-14B"].verdict == verdict


@pytest.mark.parametrize(("right", "verdict"), [(200, "holds"), (192, "undecided"), (150, "does not hold")])
def test_recovery_is_of_the_original_on_the_same_documents(right: int, verdict: str, tmp_path: Path) -> None:
    model = "qwen3_14b"
    original = openllm("wush", 196, model, fmt="original")
    own = found(tmp_path, original, openllm("wush", right, model))
    claim = own["recovery in MXFP4, WUSH with RTN, percent, Qwen3-14B"]
    assert claim.verdict == verdict
    assert claim.ours.startswith(f"{100 * right / 196:.2f} ± ")


def test_layer_losses_are_counted_over_blocks_and_over_calibration_sets(tmp_path: Path) -> None:
    made = [
        record("mxfp4", name, mse={0: loss, 1: other}, calibration=calibration)
        for calibration in ("embedded", "c4")
        for name, loss, other in (("h", 0.2, 0.2), ("wush", 0.1, 0.3 if calibration == "c4" else 0.1))
    ]
    own = found(tmp_path, *made)
    blocks, datasets = (own[f"Table 1 is consistent across {name}: {claims.LOWEST}"] for name in ("blocks", "datasets"))
    assert blocks.ours == "MXFP4 14 of 14 linears in 2 blocks (smollm2_135m)"
    assert blocks.verdict == "holds at small scale"
    assert "MXFP4 7 of 14 linears in 2 blocks (smollm2_135m, c4)" in datasets.ours
    assert datasets.verdict == "holds in part at small scale"


def costs(path: Path, **seconds: dict[str, float]) -> Path:
    own = [{"algorithm": "gptq", "transform": name, "seconds": one} for name, one in seconds.items()]
    path.write_text(json.dumps({"device": "a GPU", "quantizing": own}))
    return path


def test_what_wush_adds_to_gptq_is_extended_to_the_papers_calibration(tmp_path: Path) -> None:
    many = {str(2048 * 16): 1.0, str(2048 * 64): 4.0}  # 1/16 s a window: 64 s of 1,024
    path = costs(tmp_path / "one.json", h=many, wush={key: value + 3.2 for key, value in many.items()})
    assert overhead(path) == "5.0% to 5.0% at 1,024 windows (a GPU, blocks of Llama-3.1-8B's shape)"
    with pytest.raises(Unreadable, match=r"one\.json: no record of what a decoder block costs.*restore or remove it"):
        overhead(costs(tmp_path / "one.json", h=many))
