"""What the framework costs by itself: seconds a trial beside the trial's own work, and the share of saving blocks."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from experiments.checkpoints import Checkpoint, tokens_of
from experiments.environment import code_versions
from experiments.records import Record
from experiments.store import ResultStore

# A trial that does nothing: a random model of one tiny decoder block, not quantized, on one window of two tokens.
NOTHING = (
    *("model=tiny_llama", "model.layers=1", "model.hidden_size=32", "model.intermediate_size=32", "format=original"),
    *("evaluation.windows=1", "evaluation.window_length=2", "device=cpu", "progress=none"),
)
FEW, MANY = 5, 45


def seconds_a_trial(run: Callable[..., float], launcher: tuple[str, ...]) -> float:
    """What one more trial that does nothing adds to a sweep; `run` runs `run.py` and returns its seconds.

    Sweeps of two sizes are compared, so that what a sweep costs once, imports above all, is not counted.
    """
    seconds = []
    for trials in (FEW, MANY):
        with tempfile.TemporaryDirectory() as folder:
            seconds.append(run("-m", f"model.seed=range(0,{trials})", *NOTHING, *launcher, f"results={folder}"))
    return (seconds[1] - seconds[0]) / (MANY - FEW)


def saving_share(store: ResultStore, record: Record) -> float:
    """The part of a finished trial's time that saving its decoder blocks takes; its blocks must have been kept."""
    made_by, device = code_versions(), f"{record.environment['device']}, {record.environment['threads']} threads"

    def checkpoint(folder: Path) -> Checkpoint:
        own = Checkpoint(folder, made_by, device, [], lambda: None)
        own.depends_on(**tokens_of(record.data))
        return own

    kept = checkpoint(store.trial(record.trial_id))
    with tempfile.TemporaryDirectory(dir=store.root) as folder:
        again, seconds = checkpoint(Path(folder)), 0.0
        for block in record.blocks:
            found = kept.load(block.index)
            assert found is not None
            started = time.perf_counter()
            again.save(*found)
            seconds += time.perf_counter() - started
    return seconds / sum(stage.seconds for stage in record.stages.values())
