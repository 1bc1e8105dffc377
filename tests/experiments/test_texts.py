"""A text of the hub through a whole trial, from the config to the record."""

from pathlib import Path

import wush
from tests.experiments.conftest import Cli
from tests.experiments.test_sweep import records
from tests.hub import publish, serving
from wush.models import byte_tokenizer, load_random
from wush.texts import EmbeddedText, batches, filled

PAGES = [f"page {i} says " + "more and " * (2 * i) for i in range(6)]


def test_a_trial_on_windows_of_unequal_length_is_the_library_called_by_hand(cli: Cli, tmp_path: Path) -> None:
    publish(tmp_path / "hub", "someone/pages", {"train.jsonl": [{"body": page} for page in PAGES]})
    dataset = ("dataset=someone/pages", "name=null", "files=null", "columns=[body]", "cut=each", "seed=null")
    with serving(tmp_path / "hub") as hub:
        own = {**hub.environment(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        keys = [f"calibration.{key}" for key in (*dataset, "windows=6", "window_length=64", "batch_size=3")]
        done = cli.small("calibration=c4", *keys, **own)
        assert done.returncode == 0, done.stdout + done.stderr
        source = f"someone/pages@{hub.commit('someone/pages')}"
    (record,) = records(cli)
    rows = [byte_tokenizer()(page).input_ids[:64] for page in PAGES]
    assert len({len(row) for row in rows}) > 3
    assert record.data["calibration"].source == source
    assert record.data["calibration"].tokens == sum(len(row) for row in rows)
    loaded = load_random("llama", 64, 128, 2, 4, 2, 0, "float32", "cpu")
    held_out = EmbeddedText(part="evaluation", windows=2, window_length=32, batch_size=4).cut(loaded.tokenizer, "")
    states = wush.original_states(loaded.model, held_out)
    calibration = [batch.ids for batch in batches(filled(rows, 64), 3)]
    wush.quantize(loaded.model, calibration, format=wush.MXFP4, transform=wush.Wush(), algorithm=wush.Rtn())
    assert record.metrics.kl == wush.evaluate(loaded.model, held_out, states).kl
