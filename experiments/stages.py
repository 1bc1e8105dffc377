"""What an attempt at a trial does, stage by stage, and the record that comes of it.

model + tokenizer -> windows of the texts -> quantized decoder blocks -> their errors against the original -> metrics on
the held-out text -> tasks -> record
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from hydra.utils import instantiate

import wush
from experiments.attempts import Watched
from experiments.checkpoints import Checkpoint, tokens_of
from experiments.environment import measured
from experiments.identity import WINDOWS, hash_of, text_of
from experiments.records import Block, BlockError, Data, LayerLoss, Lost, Metrics, Record, Stage, Task, Windows, now
from experiments.tracking import Tracking
from wush import backends
from wush.lost import warn
from wush.progress import Progress
from wush.texts import PAD, batches, sha256_of_ids
from wush.version import METHOD_VERSION

if TYPE_CHECKING:
    from torch import Tensor

    from experiments.originals import Originals
    from experiments.trial import Findings
    from wush.models import LoadedModel
    from wush.tasks import Harness, TaskSpec

log = logging.getLogger(__name__)

HELD_OUT, MEASURED = "held_out", "measured"


class Stages:
    """The stages of one attempt, in order; what it finds goes into `findings`."""

    def __init__(
        self,
        findings: Findings,
        checkpoint: Checkpoint,
        originals: Originals,
        tracking: Tracking,
        progress: Progress,
    ) -> None:
        self._found, self._checkpoint, self._originals = findings, checkpoint, originals
        self._tracking, self._progress = tracking, progress
        self._config, self._identity = findings.trial.config, findings.trial.identity

    def run(self) -> Record:
        """All of them; raises whatever goes wrong."""
        harness = self._harness()
        loaded = self._load()
        specs = harness.specs(loaded.model.config.model_type) if harness else ()
        if harness:
            harness.prepare(specs, loaded.tokenizer)
        held_out = self._windows(loaded, "evaluation")
        calibration = self._windows(loaded, "calibration") if "calibration" in self._identity else None
        _warn_if_same_text(self._identity)
        self._checkpoint.depends_on(**tokens_of(self._found.data))
        states = self._states(loaded, held_out)
        if calibration is not None:
            self._quantize(loaded, calibration)
            self._measure(loaded, calibration, held_out)
        self._evaluate(loaded, held_out, states)
        for spec in specs:
            assert harness is not None
            self._run_task(harness, spec, loaded)
        return _record(self._found, len(self._checkpoint.restored))

    def _harness(self) -> Harness | None:
        """The tasks to run, checked before the model loads; None where a text is all that is evaluated."""
        node = self._config["evaluation"]
        if "tasks" not in node:
            return None
        harness: Harness = instantiate(node, _convert_="all")
        harness.check()
        return replace(harness, batch_size=1) if self._found.one_window else harness

    def _load(self) -> LoadedModel:
        with measured(self._found.stages, "load", self._found.device):
            loaded = self._originals.load(self._config["model"], self._identity["model"], self._found.device)
        self._found.bits_per_weight = float(loaded.model.dtype.itemsize * 8)
        self._found.note = loaded.note
        self._found.revision = getattr(loaded.model.config, "_commit_hash", None)
        return loaded

    def _windows(self, loaded: LoadedModel, name: str) -> Tensor:
        """The windows of the calibration or evaluation text; a local one as it was when the sweep was planned."""
        planned = text_of(self._identity[name])
        text = instantiate(text_of(self._config[name]))

        def cut() -> Tensor:
            ids = text.cut(loaded.tokenizer, name)
            if text.sha256 != planned.get("sha256"):
                raise ValueError(f"{name}: the text changed since the sweep was planned; start it again")
            return ids

        ids = self._originals.windows(planned, cut)
        self._found.data[name] = Data(
            text_sha256=planned.get("sha256"),
            source=text.source(),
            ids_sha256=sha256_of_ids(ids),
            tokens=int((ids != PAD).sum()),
        )
        return ids

    def _states(self, loaded: LoadedModel, held_out: Tensor) -> Tensor:
        def make() -> Tensor:
            saved = self._checkpoint.states()
            if saved is not None:
                return saved
            size = self._found.batch_size("evaluation")
            states = wush.original_states(loaded.model, held_out, batch_size=size, progress=self._watched())
            self._checkpoint.save_states(states)
            return states

        with measured(self._found.stages, "original", self._found.device):
            return self._originals.states(text_of(self._identity["evaluation"]), make)

    def _quantize(self, loaded: LoadedModel, calibration: Tensor) -> None:
        def on_block(report: wush.BlockReport) -> None:
            found.blocks.append(_block(report))
            watched.note = f"{report.name}: relative error {report.relative_mse:.2e}"
            if report.index not in restored:
                self._tracking.block(found.blocks[-1])

        found, config, report, watched = self._found, self._config, wush.QuantizationReport(), self._watched()
        restored, options = self._checkpoint.restored, config["quantize"]
        with measured(found.stages, "quantize", found.device):
            wush.quantize(
                loaded.model,
                [batch.ids for batch in batches(calibration, found.batch_size("calibration"))],
                format=instantiate(config["format"]),
                transform=instantiate(config["transform"]),
                algorithm=instantiate(config["algorithm"]),
                exclude=options["exclude"],
                blocks=options["blocks"],
                report=report,
                progress=watched,
                on_block=on_block,
                saved=self._checkpoint,
                settings=backends.Settings(config["kernels"], config["keep_operands"]),
            )
        found.bits_per_weight, found.quantized_share = report.bits_per_weight, report.quantized_share
        found.skipped = report.skipped
        found.lost |= {"calibration": _lost(report.lost), "weights": _lost(report.weight_lost)}
        if restored:
            log.info("%d of %d decoder blocks restored from an earlier attempt", len(restored), len(found.blocks))
            seconds = {block.index: block.seconds for block in found.blocks}
            found.stages["quantize"].seconds += sum(seconds[index] for index in restored)

    def _measure(self, loaded: LoadedModel, calibration: Tensor, held_out: Tensor) -> None:
        """Errors of the blocks on held-out tokens, and of layers where asked for; restored from an earlier attempt."""
        found, saved = self._found, self._checkpoint.evaluation(MEASURED)
        first = saved is None
        if saved is None:
            with measured(found.stages, "measure", found.device):
                blocks = [asdict(block) for block in self._measured(loaded, calibration, held_out)]
            saved = {"blocks": blocks, "stage": found.stages["measure"].model_dump()}
            self._checkpoint.save_evaluation(MEASURED, saved)
        found.stages["measure"] = Stage(**saved["stage"])
        measurements = {block["index"]: block for block in saved["blocks"]}
        found.blocks = [_with_measured(block, measurements.get(block.index)) for block in found.blocks]
        if first:
            self._tracking.measured(found.blocks)

    def _measured(self, loaded: LoadedModel, calibration: Tensor, held_out: Tensor) -> list[wush.Measured]:
        wanted, original = self._config["measure"], self._originals.untouched(self._config["model"])

        def errors(windows: Tensor, text: str, layer_losses: bool) -> list[wush.Measured]:
            size, progress = self._found.batch_size(text), self._watched()
            return wush.measure(
                original, loaded.model, windows, layer_losses=layer_losses, batch_size=size, progress=progress
            )

        found = errors(_some(held_out, wanted["windows"]), "evaluation", wanted["layer_loss"] == "held_out")
        if wanted["layer_loss"] != "calibration":
            return found
        losses = errors(calibration, "calibration", layer_losses=True)
        return [replace(block, losses=other.losses) for block, other in zip(found, losses, strict=True)]

    def _evaluate(self, loaded: LoadedModel, held_out: Tensor, states: Tensor) -> None:
        found, saved = self._found, self._checkpoint.evaluation(HELD_OUT)
        if saved is None:
            with measured(found.stages, "evaluate", found.device):
                size = found.batch_size("evaluation")
                evaluation = wush.evaluate(loaded.model, held_out, states, batch_size=size, progress=self._watched())
            values = asdict(evaluation)
            saved = {"windows": values.pop("windows"), "lost": values.pop("lost"), "metrics": values}
            wrong = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
            if wrong:
                raise wush.NumericError(f"{', '.join(wrong)}: no result; look for the first such block in the log")
            saved |= {"stage": found.stages["evaluate"].model_dump(), "kernels": backends.chosen(loaded.model)}
            self._checkpoint.save_evaluation(HELD_OUT, saved)
        else:
            warn({name: wush.Lost(**lost) for name, lost in saved["lost"].items()}, instantiate(self._config["format"]))
        found.stages["evaluate"] = Stage(**saved["stage"])
        found.metrics = Metrics(
            **saved["metrics"], bits_per_weight=found.bits_per_weight, quantized_share=found.quantized_share
        )
        found.windows = Windows(**saved["windows"])
        found.lost["evaluation"] = {name: Lost(**lost) for name, lost in saved["lost"].items()}
        found.kernels = saved["kernels"]

    def _run_task(self, harness: Harness, spec: TaskSpec, loaded: LoadedModel) -> None:
        """One task, unless an earlier attempt has finished it; kept as soon as it is done."""
        found, stage, name = self._found, f"task {spec.task}", _file_name(spec.task)
        saved = self._checkpoint.evaluation(name)
        if saved is None:
            with measured(found.stages, stage, found.device):
                result = harness.run(spec, loaded.model, loaded.tokenizer, self._watched())
            saved = {"task": asdict(result), "stage": found.stages[stage].model_dump()}
            self._checkpoint.save_evaluation(name, saved)
        found.stages[stage] = Stage(**saved["stage"])
        found.tasks[spec.task] = Task.model_validate(saved["task"])
        self._tracking.task(found.tasks[spec.task])
        log.info("%s: %s", spec.task, found.tasks[spec.task].told)

    def _watched(self) -> Watched:
        return Watched(self._progress, self._found.lease)


def _file_name(task: str) -> str:
    """Of a task among the evaluations of a trial; its name may hold what a file's may not."""
    plain = "".join(letter if letter.isalnum() or letter in "_-" else "_" for letter in task)
    return f"task-{plain}" if plain == task else f"task-{plain}-{hash_of(task)}"


def _some(windows: Tensor, count: int | None) -> Tensor:
    """So many of the windows, evenly spaced; all of them for None."""
    if count is None or count >= len(windows):
        return windows
    return windows[[index * len(windows) // count for index in range(count)]]


def _lost(lost: Mapping[str, wush.Lost]) -> dict[str, Lost]:
    return {name: Lost(**asdict(one)) for name, one in lost.items()}


def _block(report: wush.BlockReport) -> Block:
    values = asdict(report)
    error = BlockError(mse=values.pop("mse"), relative=values.pop("relative_mse"))
    for layer in values["layers"]:
        del layer["lost"], layer["weight_lost"]
    return Block.model_validate(values | {"calibration": error})


def _with_measured(block: Block, found: dict[str, Any] | None) -> Block:
    """A block with what was measured of it; nothing was if none of its linears is quantized."""
    if found is None:
        return block
    losses = {name: LayerLoss(**loss) for name, loss in found["losses"].items()}
    layers = [layer.model_copy(update={"loss": losses.get(layer.name)}) for layer in block.layers]
    return block.model_copy(update={"held_out": BlockError(**found["error"]), "layers": layers})


def _record(found: Findings, restored_blocks: int) -> Record:
    assert found.metrics is not None
    machine = {key: value for key, value in found.environment.items() if key not in ("versions", "git_commit")}
    return Record(
        trial_id=found.trial.trial_id,
        choices=found.trial.choices,
        config=found.trial.config,
        metrics=found.metrics,
        windows=found.windows,
        blocks=found.blocks,
        lost={text: lost for text, lost in found.lost.items() if lost},
        skipped=found.skipped,
        tasks=found.tasks,
        stages=found.stages,
        data=found.data,
        seed=found.trial.config["seed"],
        attempts=found.lease.number,
        restored_blocks=restored_blocks,
        kernels=found.kernels,
        warnings=found.warnings,
        versions=found.environment["versions"],
        git_commit=found.environment["git_commit"],
        model_revision=found.revision,
        model_note=found.note,
        method_version=METHOD_VERSION,
        environment=machine,
        started_at=found.started,
        finished_at=now(),
    )


def _warn_if_same_text(identity: dict[str, Any]) -> None:
    texts = [
        {key: value for key, value in text_of(identity[name]).items() if key not in WINDOWS}
        for name in ("calibration", "evaluation")
        if name in identity
    ]
    if len(texts) == 2 and texts[0] == texts[1]:
        log.warning("calibration and evaluation use the same text: the metrics are not held out")
