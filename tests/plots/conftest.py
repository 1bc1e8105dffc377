"""Records as trials leave them, with the few values that a test is about."""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

from experiments.records import (
    Block,
    BlockError,
    Data,
    Layer,
    LayerLoss,
    Metrics,
    Record,
    Stage,
    Task,
    TaskRun,
    Windows,
)  # fmt: skip
from wush.version import METHOD_VERSION

LINEARS = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
BITS = {"original": 16.0, "bf16": 16.0, "mxfp4": 4.25, "nvfp4": 4.5, "int4": 4.5}


def record(
    format_: str = "mxfp4",
    transform: str = "wush",
    algorithm: str = "rtn",
    *,
    model: str = "smollm2_135m",
    calibration: str = "embedded",
    windows: int = 12,
    seed: int = 0,
    kl: float = 0.1,
    kls: Sequence[float] = (),
    version: int = METHOD_VERSION,
    measured_on: str | None = None,
    bits: float | None = None,
    blocks: Sequence[int] | None = None,
    mse: Mapping[int, float] | None = None,
    predicted: float = 4.0,
    tasks: Mapping[str, Sequence[float]] | None = None,
    evaluation: str = "embedded",
    minutes: float = 1.0,
    gpu_bytes: int | None = None,
    device: str = "cpu: made up",
) -> Record:
    """A trial; `mse`: the loss of every linear of each decoder block; `tasks`: shares of each run of a task.

    `kls`: the KL of each evaluated window, of equally many predictions, in place of `kl`; `measured_on`: of the losses.
    """
    quantized = (
        {}
        if format_ in ("original", "bf16")
        else {"transform": transform, "algorithm": algorithm, "calibration": calibration}
    )
    kl = fmean(kls) if kls else kl
    choices = {"model": model, "format": format_, "evaluation": evaluation, **quantized}
    text = {"windows": windows, "window_length": 512, "batch_size": 4, "seed": seed}
    config: dict[str, Any] = {
        "model": {"path": model}, "format": {"_target_": format_}, "transform": {"_target_": transform, "seed": seed},
        "algorithm": {"_target_": algorithm}, "calibration": {"_target_": calibration, **text},
        "evaluation": {"_target_": evaluation, "windows": 12, "window_length": 512, "batch_size": 4, "seed": None},
        "quantize": {"exclude": [], "blocks": None if blocks is None else list(blocks)},
        "measure": {"layer_loss": measured_on or ("held_out" if mse is not None else None), "windows": 4},
    }  # fmt: skip
    told = [
        version,
        measured_on,
        model,
        format_,
        transform,
        algorithm,
        calibration,
        windows,
        seed,
        blocks,
        evaluation,
        sorted(tasks or {}),
    ]
    when = datetime(2026, 1, 2, tzinfo=UTC)
    return Record(
        trial_id=json.dumps(told),
        choices=choices,
        config=config,
        metrics=Metrics(
            perplexity=20 + kl, perplexity_original=20, kl=kl, top1=0.8, predictions=100,
            bits_per_weight=BITS[format_] if bits is None else bits,
        ),
        windows=windows_of(kls) if kls else None,
        blocks=[_block(index, value, predicted) for index, value in (mse or {}).items()],
        skipped={},
        tasks={name: task(name, shares) for name, shares in (tasks or {}).items()},
        stages={
            name: Stage(seconds=30 * minutes, peak_memory_bytes=2_000_000_000, peak_gpu_memory_bytes=gpu_bytes)
            for name in ("load", "quantize", "evaluate")
        },
        data={"evaluation": Data(text_sha256="0" * 64, ids_sha256="1" * 64, tokens=6144)},
        seed=seed,
        method_version=version,
        warnings=[],
        versions={"python": "3.11"},
        git_commit=None,
        model_revision=None,
        environment={"host": "here", "device": device},
        started_at=when,
        finished_at=when,
    )  # fmt: skip


def windows_of(kls: Sequence[float], predictions: int = 10) -> Windows:
    """Windows of so many predictions, with that KL a prediction."""
    count = len(kls)
    sums = [predictions * one for one in kls]
    return Windows(
        nll=[3 * predictions + one for one in sums], nll_original=[3.0 * predictions] * count, kl=sums,
        agree=[predictions - 2] * count, predictions=[predictions] * count,
    )  # fmt: skip


def answered(name: str, outcomes: Sequence[float]) -> Task:
    """A task with a single run, of which each document's outcome is known."""
    made = task(name, [fmean(outcomes)])
    made.runs[0].outcomes = list(outcomes)
    return made


def task(name: str, shares: Sequence[float], stderr: float = 0.01) -> Task:
    """A task with a run for each share."""
    runs = [
        TaskRun(seed=seed, values={"acc,none": share}, stderrs={"acc,none": stderr}, seconds=1.0)
        for seed, share in enumerate(shares)
    ]
    return Task(
        name=name, version="1", harness="0.4.13", num_fewshot=0, chat_template=False, samples=50, metric="acc,none",
        higher_is_better=True, runs=runs,
    )  # fmt: skip


def store(folder: Path, *records: Record) -> Path:
    """A results folder with the records, as trials write them."""
    for number, one in enumerate(records):
        trial = folder / "trials" / f"{number:04}"
        trial.mkdir(parents=True)
        (trial / "result.json").write_text(one.model_dump_json(indent=2) + "\n")
    return folder


def _block(index: int, mse: float, predicted: float) -> Block:
    layers = [
        Layer(
            name=name, shared_input=[name], bits_per_weight=4.5, weights=1000,
            loss=LayerLoss(
                mse=mse * (1 + place / 10), relative=mse * (1 + place / 10) / 10,
                even=predicted * (1 + place / 10), bound=0.9 * predicted * (1 + place / 10) ** 1.1 / 2,
            ),
        )
        for place, name in enumerate(LINEARS)
    ]  # fmt: skip
    return Block(
        index=index,
        name=f"layers.{index}",
        calibration=BlockError(mse=mse, relative=mse / 10),
        seconds=1.0,
        layers=layers,
    )
