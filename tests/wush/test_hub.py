"""Texts from the Hugging Face Hub: the real clients, over HTTP, from repositories laid out as the hub's own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from tests.hub import Hub, publish, serving
from wush.downloads import ATTEMPTS, key_of
from wush.hub import hub_text
from wush.models import byte_tokenizer
from wush.texts import PAD

ROOT = Path(__file__).parent.parent.parent
PAPERS = ("fineweb_edu", "c4", "open_platypus")
MOVING = ("someone/moving-stream", "someone/moving")
CONF = sorted(
    path.relative_to(ROOT / "conf").with_suffix("").as_posix()
    for path in (ROOT / "conf").glob("*/*.yaml")
    if "wush.hub." in path.read_text()
)
CHAT = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('no system prompts') }}{% endif %}" + CHAT

# Cuts texts in a process whose clients know one hub: reads a request a line, and answers each in a line. It imports
# no models, which would take longer than all of its work.
WORKER = """
import json, logging, sys, time
answers, sys.stdout = sys.stdout, sys.stderr
from hydra.utils import instantiate
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast
from wush import downloads
sleep = time.sleep
time.sleep = lambda seconds: sleep(min(seconds, 0.01))  # the clients have waits of their own, of many seconds
logged = []
handler = logging.Handler()
handler.emit = lambda record: logged.append(record.getMessage())
logging.getLogger("wush").addHandler(handler)
for line in sys.stdin:
    request = json.loads(line)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(request["tokenizer"])
    tokenizer.chat_template = request["template"]
    if request["bos"]:
        tokenizer.bos_token = "<|end|>"
        starts = TemplateProcessing(single="<|end|> $A", special_tokens=[("<|end|>", 256)])
        tokenizer.backend_tokenizer.post_processor = starts
    logged.clear()
    downloads.commit.cache_clear()
    try:
        text = instantiate(request["node"])
        ids = text.cut(tokenizer, "calibration")
        answer = {"ids": ids.tolist(), "source": text.source(), "sha256": text.sha256, "dtype": str(ids.dtype)}
    except ValueError as error:
        answer = {"error": str(error)}
    print(json.dumps({**answer, "logged": logged}), file=answers, flush=True)
"""


class Worker:
    """A process that cuts texts, with one hub and one folder of caches."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._tokenizer = Path(environment["HF_HOME"], "byte_tokenizer")
        byte_tokenizer().save_pretrained(self._tokenizer)
        self._process = subprocess.Popen(
            [sys.executable, "-c", WORKER],
            env=environment,
            cwd=ROOT,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def cut(self, node: dict[str, Any], template: str | None = None, bos: bool = False) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"node": node, "tokenizer": str(self._tokenizer), "template": template, "bos": bos}
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        assert self._process.wait(30) == 0


def node(config: str, **keys: Any) -> dict[str, Any]:
    """A config's node with a few small windows in the dataset's order, unless keys say otherwise."""
    group = OmegaConf.load(ROOT / "conf" / f"{config}.yaml")
    small = {"windows": 4, "window_length": 16, "seed": None, **keys}
    return OmegaConf.to_container(OmegaConf.merge(group, small), resolve=True)


def stream(**keys: Any) -> dict[str, Any]:
    """C4's pages of training, from all of its files, as they come and one after the other."""
    return node("evaluation/c4", **{"split": "train", **keys})


def text_of(answer: dict[str, Any]) -> str:
    assert "error" not in answer, answer["error"]
    return byte_tokenizer().decode([token for window in answer["ids"] for token in window if token != PAD])


def document(i: int) -> str:
    return f"<{i:03}> what page {i} says.\n"


def configs(*entries: tuple[str, dict[str, str]]) -> str:
    """A dataset card that names the files of each configuration's splits."""
    named = [
        {"config_name": name, "data_files": [{"split": split, "path": path} for split, path in files.items()]}
        for name, files in entries
    ]
    return f"---\n{OmegaConf.to_yaml({'configs': named})}---\n# A dataset\n"


WIKITEXT = ["", " = A title = \n", "", " The <unk> of it @-@ all \n", " More . \n"] * 10


def publish_all(root: Path) -> None:
    """The datasets of `conf/`, a few rows of each, in the hub's own layout and columns."""
    card = configs(("en", {"train": "en/c4-train.*.json.gz", "validation": "en/c4-validation.*.json.gz"}))
    pages = [{"text": document(i), "timestamp": "2019-04-25T12:57:54Z", "url": f"https://a.b/{i}"} for i in range(60)]
    publish(
        root,
        "allenai/c4",
        {
            "README.md": card,
            "en/c4-train.00000-of-01024.json.gz": pages[:20],
            "en/c4-train.00001-of-01024.json.gz": pages[20:40],
            "en/c4-validation.00000-of-00008.json.gz": pages[40:],
        },
    )
    known = {"dump": "CC-MAIN-2013-20", "language": "en", "language_score": 0.9, "token_count": 9, "score": 3.1}
    edu = [{"text": document(i), "id": f"<urn:uuid:{i}>", "url": "", "int_score": 3, **known} for i in range(50)]
    publish(
        root,
        "HuggingFaceFW/fineweb-edu",
        {
            "README.md": configs(("default", {"train": "data/*/*"}), ("sample-10BT", {"train": "sample/10BT/*"})),
            "data/CC-MAIN-2013-20/train-00000-of-00014.parquet": edu[:1],
            "sample/10BT/000_00000.parquet": edu[:25],
            "sample/10BT/001_00000.parquet": edu[25:],
        },
    )
    folder = "wikitext-2-raw-v1"
    splits = {split: f"{folder}/{split}-*" for split in ("test", "train", "validation")}
    rows = {"test": WIKITEXT, "train": WIKITEXT[::-1], "validation": WIKITEXT[:5]}
    files = {f"{folder}/{name}-00000-of-00001.parquet": [{"text": row} for row in rows[name]] for name in rows}
    publish(root, "Salesforce/wikitext", {"README.md": configs((folder, splits)), **files})
    publish_chats(root)


def publish_chats(root: Path) -> None:
    data = "data/{}-00000-of-00001.parquet"
    turns = [[("user", f"Q{i}?"), ("assistant", f"A{i}."), ("user", "And?"), ("assistant", "So.")] for i in range(20)]
    messages = [[{"content": content, "role": role} for role, content in chat] for chat in turns]
    platypus = [
        {"input": "", "output": f"A{i}.", "instruction": f"Q{i}?", "data_source": "scibench"} for i in range(1, 20)
    ]
    platypus.insert(0, {"input": "Given this.", "output": "A0.", "instruction": "Q0?", "data_source": "ARB"})
    card = configs(("default", {"train": "data/train-*"}))
    publish(root, "garage-bAInd/Open-Platypus", {"README.md": card, data.format("train"): platypus})
    ultrachat = [{"prompt": f"Q{i}?", "prompt_id": f"{i:064x}", "messages": chat} for i, chat in enumerate(messages)]
    splits = ("train_sft", "test_sft", "train_gen", "test_gen")
    card_of_splits = configs(("default", {split: f"data/{split}-*" for split in splits}))
    files = {data.format(split): ultrachat[::-1] if split == "test_sft" else ultrachat for split in splits}
    publish(root, "HuggingFaceH4/ultrachat_200k", {"README.md": card_of_splits, **files})
    tulu = [{"id": f"id_{i}", "messages": chat, "source": "ai2-adapt-dev/oasst1"} for i, chat in enumerate(messages)]
    publish(root, "allenai/tulu-3-sft-mixture", {"README.md": card, data.format("train"): tulu})
    thoughts = [
        {"system": "Think.", "conversations": [{"from": role, "value": content} for role, content in chat]}
        for chat in turns
    ]
    publish(root, "open-thoughts/OpenThoughts-114k", {"README.md": card, data.format("train"): thoughts})


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    root = tmp_path_factory.mktemp("hub")
    publish_all(root)
    publish(root, "someone/gated", {"README.md": configs(("default", {"train": "train.jsonl"}))})
    publish_documents(root, ("someone/bare", "someone/faltering"), first=0)
    publish(root, "someone/long", {"train.jsonl": [{"body": page} for page in LONG]})
    with serving(root, gated=["someone/gated"]) as running:
        yield running


@pytest.fixture(scope="module")
def worker(hub: Hub, home: Path) -> Iterator[Worker]:
    with Worker(hub.environment(home)) as process:
        yield process


@pytest.fixture(scope="module")
def offline(hub: Hub, home: Path) -> Iterator[Worker]:
    """A process that may not ask the hub, with the caches of the one that may."""
    with Worker({**hub.environment(home), "HF_HUB_OFFLINE": "1"}) as process:
        yield process


@pytest.mark.parametrize("config", CONF)
def test_every_config_gives_windows_and_names_the_commit(config: str, hub: Hub, worker: Worker) -> None:
    given = node(config, seed=0)
    answer = worker.cut(given, CHAT)
    assert torch.tensor(answer["ids"]).shape == (4, 16)
    assert answer["dtype"] == "torch.int64"
    assert answer["source"] == f"{given['dataset']}@{hub.commit(given['dataset'])}"
    assert answer["sha256"] is None


def test_wikitext_is_one_text_of_all_rows_without_overlap(worker: Worker) -> None:
    whole = "\n\n".join(WIKITEXT)
    read = text_of(worker.cut(node("evaluation/wikitext2", windows=None)))
    assert read == whole[: len(whole) // 16 * 16]


def test_documents_are_tokenized_each_with_special_tokens(worker: Worker) -> None:
    length = len(document(0)) + 1
    ids = worker.cut(stream(windows=3, window_length=length), bos=True)["ids"]
    assert ids == [[256, *byte_tokenizer()(document(i)).input_ids] for i in range(3)]


@pytest.mark.parametrize(
    "config", ["evaluation/c4", "calibration/c4", "calibration/ultrachat", "calibration/open_platypus"]
)
def test_the_seed_alone_decides_the_order_of_documents(config: str, worker: Worker) -> None:
    first, again, other = (
        text_of(worker.cut({**node(config, seed=seed, windows=9), "batch_size": size}, CHAT))
        for seed, size in ((1, 4), (1, 2), (2, 4))
    )
    assert first == again
    assert first != other
    assert first != text_of(worker.cut(node(config, windows=9), CHAT))


def test_splits_share_no_document(worker: Worker) -> None:
    seen = [set(documents(worker, f"{group}/c4", 20)) for group in ("calibration", "evaluation")]
    assert len(seen[0]) > 10
    assert not seen[0] & seen[1]


@pytest.mark.parametrize("seeds", [(0, 0), (1, 2)])
def test_parts_of_one_split_share_no_document_whatever_the_seeds(seeds: tuple[int, int], worker: Worker) -> None:
    groups = ("calibration", "evaluation")
    seen = [set(documents(worker, f"{group}/fineweb_edu", 18, seed)) for group, seed in zip(groups, seeds, strict=True)]
    assert all(len(part) > 10 for part in seen)
    assert not seen[0] & seen[1]


def documents(worker: Worker, config: str, count: int, seed: int = 0) -> list[str]:
    """The numbers of the first documents."""
    answer = worker.cut(node(config, windows=1, window_length=count * len(document(0)), seed=seed, cut="packed"))
    return [line[1:4] for line in text_of(answer).splitlines()]


@pytest.mark.parametrize(
    ("config", "chat"),
    [
        ("calibration/ultrachat", "[user]Q0?[assistant]A0.[user]And?[assistant]So."),
        ("evaluation/ultrachat", "[user]Q19?[assistant]A19.[user]And?[assistant]So.[user]Q18?"),
        ("calibration/tulu3", "[user]Q0?[assistant]A0.[user]And?[assistant]So."),
        ("calibration/open_thoughts", "[system]Think.[user]Q0?[assistant]A0.[user]And?[assistant]So."),
        ("calibration/open_platypus", "[user]Q0?[assistant]A0."),
    ],
)
def test_chats_go_through_the_chat_template_and_no_special_tokens_come_twice(
    config: str, chat: str, worker: Worker
) -> None:
    length = len(chat.encode())
    assert text_of(worker.cut(node(config, windows=1, window_length=length), CHAT, bos=True)) == chat


def test_a_tokenizer_without_a_chat_template_is_an_error_before_any_download(hub: Hub, worker: Worker) -> None:
    asked = len(hub.requests)
    error = worker.cut(node("calibration/tulu3"))["error"]
    assert "no chat template" in error
    assert "calibration=c4" in error
    assert len(hub.requests) == asked


def test_a_chat_that_the_template_refuses_names_the_dataset(worker: Worker) -> None:
    error = worker.cut(node("calibration/open_thoughts"), STRICT)["error"]
    assert "OpenThoughts-114k: no system prompts" in error
    assert "['conversations']" in error
    spared = node("calibration/open_thoughts", columns=["conversations"])
    assert text_of(worker.cut(spared, STRICT)).startswith("[user]Q0?")


LONG = [f"<{i:03}>" + "".join(chr(97 + (i * 7 + j * 5) % 26) for j in range(i * 5)) for i in range(40)]


def rows_of(answer: dict[str, Any]) -> list[str]:
    """What each window says, in a hub's answer."""
    assert "error" not in answer, answer["error"]
    return [byte_tokenizer().decode([token for token in row if token != PAD]) for row in answer["ids"]]


def long_documents(cut: str, read: str = "shuffled", **keys: Any) -> dict[str, Any]:
    """Documents of 5 to 200 tokens, `LONG`."""
    dataset = {"dataset": "someone/long", "name": None, "columns": ["body"], "read": read}
    return stream(**{**dataset, "cut": cut, "window_length": 64, "windows": 9, "seed": 1, **keys})


@pytest.mark.parametrize("read", ["shuffled", "streamed"])
def test_a_crop_is_a_random_piece_of_a_document_that_is_long_enough(read: str, worker: Worker) -> None:
    found = rows_of(worker.cut(long_documents("crops", read, windows=20)))
    homes = [[page for page in LONG if crop in page] for crop in found]
    assert all(len(crop) == 64 for crop in found)
    assert all(homes)
    starts = [home[0].find(crop) for home, crop in zip(homes, found, strict=True)]
    assert len(set(starts)) > 5
    assert max(start + 64 - len(home[0]) for home, start in zip(homes, starts, strict=True)) <= 0
    assert rows_of(worker.cut(long_documents("crops", read)))[:9] == found[:9]
    assert rows_of(worker.cut(long_documents("crops", read, windows=20, seed=2))) != found


def test_crops_are_one_a_document_and_of_all_that_are_long_enough(worker: Worker) -> None:
    enough = [page for page in LONG if len(page) >= 64]
    found = rows_of(worker.cut(long_documents("crops", windows=None, seed=None)))
    assert found == [page[:64] for page in enough]
    marked = rows_of(worker.cut(long_documents("crops", windows=None, window_length=190)))
    assert len(marked) == len([page for page in LONG if len(page) >= 190])
    error = worker.cut(long_documents("crops", windows=len(enough) + 1))["error"]
    assert "40 documents of someone/long@" in error
    assert f"too few: {len(enough)} of 64 tokens or more, {len(enough)} windows of 64, but {len(enough) + 1}" in error


def test_each_document_is_a_window_of_its_own_length_cut_at_the_longest(worker: Worker) -> None:
    answer = worker.cut(long_documents("each", windows=None, seed=None))
    assert rows_of(answer) == [page[:64] for page in LONG]
    for row, page in zip(answer["ids"], LONG, strict=True):
        assert row[len(page[:64]) :] == [PAD] * (64 - len(page[:64]))
    assert [len(row) for row in answer["ids"]] == [64] * 40


CUTS = [(name, cut) for name in ("calibration/c4", "calibration/open_platypus") for cut in ("packed", "crops", "each")]


@pytest.mark.parametrize(("config", "cut"), [*CUTS, ("evaluation/wikitext2", "packed")])
def test_every_window_of_a_dataset_can_begin_with_bos(config: str, cut: str, worker: Worker) -> None:
    ids = worker.cut(node(config, bos="every", cut=cut, seed=3), CHAT, bos=True)["ids"]
    assert [row[0] for row in ids] == [256] * 4
    assert all(row[1] not in (256, PAD) for row in ids)


def test_a_tokenizer_without_bos_is_an_error_before_any_download(hub: Hub, worker: Worker) -> None:
    asked = len(hub.requests)
    error = worker.cut(stream(bos="every"))["error"]
    assert "calibration.bos=every" in error
    assert "calibration.bos=first" in error
    assert len(hub.requests) == asked


def test_the_papers_calibration_sets_are_cut_as_its_release_does() -> None:
    edu, c4, platypus = (OmegaConf.load(ROOT / f"conf/calibration/{name}.yaml") for name in PAPERS)
    assert (edu.read, edu.buffer, edu.cut) == ("streamed", 1000, "crops")
    assert (c4.read, c4.files, c4.cut) == ("shuffled", ["en/c4-train.00000-of-01024.json.gz"], "crops")
    assert (platypus["columns"], platypus.cut) == (["instruction", "output"], "each")
    assert {(text.windows, text.window_length) for text in (edu, c4, platypus)} == {(1024, 2048)}


def test_only_the_files_named_are_downloaded(hub: Hub, worker: Worker) -> None:
    asked = len(hub.requests)
    answer = worker.cut(node("calibration/c4", windows=None, window_length=4, seed=None))
    assert [int(row[1:]) for row in rows_of(answer)] == list(range(20))
    assert not [request for request in hub.requests[asked:] if "00001-of-01024" in request or "validation" in request]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["en/none.json.gz"], "check their paths"),
        (["README.md"], "JSON lines or Parquet"),
        (["a.json", "b.parquet"], "of one kind"),
    ],
)
def test_files_that_cannot_be_read_are_refused_by_name(files: list[str], message: str, worker: Worker) -> None:
    error = worker.cut(node("calibration/c4", files=files))["error"]
    assert f"files={files}" in error
    assert message in error


def test_files_that_are_not_here_without_network_are_an_error_that_says_how_to_get_them(
    worker: Worker, offline: Worker
) -> None:
    given = node("calibration/c4", seed=13)
    assert "ids" in worker.cut(given)
    assert offline.cut(given)["ids"] == worker.cut(given)["ids"]
    error = offline.cut({**given, "files": ["en/c4-train.00001-of-01024.json.gz"]})["error"]
    assert "dataset allenai/c4: " in error
    assert "run this once where there is network" in error


def test_a_small_buffer_keeps_a_stream_near_its_order(worker: Worker) -> None:
    given = [long_documents("each", "streamed", windows=39, buffer=size) for size in (1, 1000)]
    near, far = ([int(page[1:4]) for page in rows_of(worker.cut(each))] for each in given)
    assert near == sorted(near)
    assert far != sorted(far)


@pytest.mark.parametrize("config", ["calibration/c4", "calibration/open_platypus"])
def test_too_few_documents_is_an_error_with_the_numbers(config: str, worker: Worker) -> None:
    error = worker.cut(node(config, windows=1000), CHAT)["error"]
    assert "20 documents of " in error
    assert "1000 are asked for" in error
    assert "calibration.windows" in error


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"columns": ["body"]}, r"a row with text, timestamp, url does not hold .*\['body'\]"),
        ({"layout": "messages", "columns": ["url"]}, "does not hold layout=messages"),
        ({"name": "fr"}, r"name=fr: .*'en'"),
        ({"split": "test"}, r"split=test: .*train"),
        ({"revision": "v9"}, "check its revision"),
        ({"dataset": "allenai/no-such"}, "dataset allenai/no-such: .*check its name"),
        ({"dataset": "someone/gated"}, "huggingface.co/datasets/someone/gated and log in"),
    ],
)
def test_what_is_not_there_fails_at_once_with_the_remedy(keys: dict[str, Any], message: str, worker: Worker) -> None:
    answer = worker.cut(stream(**keys), CHAT)
    assert re.search(message, answer["error"], re.DOTALL), answer["error"]
    assert not [line for line in answer["logged"] if "tried again" in line]


def test_windows_that_cannot_be_are_refused_when_the_text_is_built() -> None:
    keys = {key: value for key, value in stream().items() if key != "_target_"}
    with pytest.raises(ValueError, match="windows=null would read a whole stream"):
        hub_text(**{**keys, "windows": None})
    with pytest.raises(ValueError, match=r"give its size, buffer=1000"):
        hub_text(**{**keys, "buffer": None})
    with pytest.raises(ValueError, match=r"cut=crops is for documents.*read=shuffled, or cut=packed"):
        hub_text(**{**keys, "read": "joined", "cut": "crops"})
    with pytest.raises(ValueError, match="read=joined is for layout=text"):
        hub_text(**{**keys, "read": "joined", "part": "evaluation"})


def test_a_hub_that_falters_is_asked_again(hub: Hub, worker: Worker) -> None:
    hub.fail(7, path="someone/faltering")  # more often than the client tries again itself
    answer = worker.cut(stream(dataset="someone/faltering", name=None, columns=["body"]))
    assert text_of(answer).startswith(document(0))
    assert len([line for line in answer["logged"] if "503" in line and "tried again" in line]) == 1


def test_a_dataset_without_a_card_is_read_too(hub: Hub, worker: Worker) -> None:
    given = stream(dataset="someone/bare", name=None, columns=["body"])
    answer = worker.cut(given)
    assert text_of(answer).startswith(document(0))
    assert answer["source"] == f"someone/bare@{hub.commit('someone/bare')}"


def test_windows_of_a_stream_are_kept_and_used_without_network(hub: Hub, worker: Worker, offline: Worker) -> None:
    given = node("calibration/fineweb_edu", seed=7)
    first = worker.cut(given)
    asked = len(hub.requests)
    second = worker.cut({**given, "batch_size": 1})
    assert second["ids"] == first["ids"]
    assert not [request for request in hub.requests[asked:] if "parquet" in request]
    asked = len(hub.requests)
    assert offline.cut(given) == {**first, "logged": []}
    assert len(hub.requests) == asked


def test_windows_are_kept_for_one_tokenizer(worker: Worker, offline: Worker) -> None:
    given = stream(seed=8)
    plain, other = worker.cut(given), worker.cut(given, bos=True)
    assert plain["ids"] != other["ids"]
    assert offline.cut(given, bos=True)["ids"] == other["ids"]
    assert "error" in offline.cut(given, CHAT)


def test_downloaded_datasets_serve_every_tokenizer_without_network(worker: Worker, offline: Worker) -> None:
    for config in ("evaluation/wikitext2", "calibration/open_platypus", "calibration/c4"):
        worker.cut(node(config, seed=9), CHAT)
        assert offline.cut(node(config, seed=9, windows=3), CHAT, bos=True)["source"]


def test_kept_windows_that_are_damaged_are_cut_again(worker: Worker, home: Path) -> None:
    before = set(home.glob("wush/windows/*"))
    given = stream(seed=10)
    ids = worker.cut(given)["ids"]
    (kept,) = set(home.glob("wush/windows/*")) - before
    whole = kept.read_bytes()
    for damaged in (whole[:-8], b"", whole[:-1] + bytes([whole[-1] ^ 1])):
        kept.write_bytes(damaged)
        answer = worker.cut(given)
        assert answer["ids"] == ids
        assert any("damaged" in line and str(kept) in line for line in answer["logged"])
        assert kept.read_bytes() == whole
    assert set(home.glob("wush/windows/*")) - before == {kept}


def test_without_network_and_data_the_error_says_how_to_get_it(offline: Worker, home: Path) -> None:
    for config in ("calibration/c4", "calibration/tulu3"):
        given = node(config, seed=11, dataset="someone/unseen")
        answer = offline.cut(given, CHAT)
        assert "dataset someone/unseen: " in answer["error"]
        for part in ("run this once where there is network", f"HF_HOME ({home})", "calibration=text"):
            assert part in answer["error"]
        assert not answer["logged"]


def test_a_hub_that_is_gone_is_no_loss_where_the_data_is_here(hub: Hub, home: Path, worker: Worker) -> None:
    given = [stream(seed=12), node("calibration/ultrachat", seed=12)]
    found = [worker.cut(each, CHAT)["ids"] for each in given]
    with serving(hub.root) as running, Worker(running.environment(home)) as process:
        running.stop()
        assert [process.cut(each, CHAT)["ids"] for each in given] == found
        answer = process.cut(stream(dataset="someone/unseen"))
    assert "run this once where there is network" in answer["error"]
    assert len([line for line in answer["logged"] if "tried again" in line]) == ATTEMPTS - 1


def test_what_is_read_is_of_the_newest_commit_or_of_the_one_asked_for(
    hub: Hub, worker: Worker, offline: Worker
) -> None:
    streamed = stream(dataset="someone/moving-stream", name=None, columns=["body"])
    downloaded = {**streamed, "dataset": "someone/moving", "read": "shuffled"}
    given = [streamed, downloaded]
    for repo in MOVING:
        publish(hub.root, repo, {"README.md": "# A dataset\n"})
    publish_documents(hub.root, MOVING, first=0)
    before = [worker.cut(each) for each in given]
    publish_documents(hub.root, MOVING, first=5)
    after = [worker.cut(each) for each in given]
    old_stream, old_rows = (
        offline.cut({**each, "revision": answer["source"].partition("@")[2]})
        for each, answer in zip(given, before, strict=True)
    )
    assert all(new["source"] != old["source"] for old, new in zip(before, after, strict=True))
    assert all(new["ids"] != old["ids"] for old, new in zip(before, after, strict=True))
    assert old_stream["ids"] == before[0]["ids"]
    assert "only commit" in old_rows["error"]


def publish_documents(root: Path, repos: Sequence[str], first: int) -> None:
    """Datasets of one file: nine documents, from a number on."""
    for repo in repos:
        publish(root, repo, {"train.jsonl": [{"body": document(i)} for i in range(first, first + 9)]})


def test_windows_are_kept_for_one_rule_of_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    text = hub_text(**{key: value for key, value in stream().items() if key != "_target_"})
    key = text.key(byte_tokenizer(), "a@1")
    assert replace(text, batch_size=1).key(byte_tokenizer(), "a@1") == key
    assert text.key(byte_tokenizer(), "a@2") != key
    assert replace(text, buffer=5).key(byte_tokenizer(), "a@1") != key
    assert replace(text, bos="every").key(byte_tokenizer(), "a@1") != key
    monkeypatch.setattr("wush.hub.READING", 0)
    assert text.key(byte_tokenizer(), "a@1") != key


def test_the_same_tokenizer_has_one_key_wherever_it_was_loaded_from(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    key = key_of({"dataset": "a"}, tokenizer)
    assert key_of({"dataset": "a"}, AutoTokenizer.from_pretrained(tmp_path)) == key
    assert key_of({"dataset": "b"}, tokenizer) != key
    tokenizer.chat_template = CHAT
    assert key_of({"dataset": "a"}, tokenizer) != key
