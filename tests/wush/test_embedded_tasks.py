"""The two small tasks from embedded text: their documents, and their definitions in the harness."""

import hashlib
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from lm_eval.tasks import TaskManager

from wush.tasks.embedded import arithmetic, continuation
from wush.texts import EmbeddedText

TASKS = Path("wush/tasks").resolve()
NAMES = ["embedded_arithmetic", "embedded_continuation"]


@pytest.fixture(scope="module")
def text() -> str:
    return EmbeddedText(part="evaluation", windows=None, window_length=1, batch_size=1).text()


def test_the_true_sentence_follows_the_passage_and_the_others_do_not(text: str) -> None:
    flat = " ".join(text.split())
    for doc in continuation.load()["test"]:
        follows = [f"{doc['passage']} {choice}" in flat for choice in doc["choices"]]
        assert follows == [index == doc["label"] for index in range(4)]


def test_every_place_holds_the_true_sentence_about_as_often() -> None:
    docs = continuation.load()["test"]
    assert len(docs) == continuation.DOCUMENTS == 150
    assert len(set(docs["passage"])) == 150
    assert min(Counter(docs["label"]).values()) > 20
    assert all(len(set(choices)) == 4 for choices in docs["choices"])


def test_nothing_comes_from_the_text_of_calibration() -> None:
    other = EmbeddedText(part="calibration", windows=None, window_length=1, batch_size=1).text()
    paragraphs = {" ".join(paragraph.split()) for paragraph in other.split("\n\n")}
    assert not [doc for doc in continuation.load()["test"] for paragraph in paragraphs if doc["passage"] in paragraph]


def test_a_text_without_enough_paragraphs_is_refused() -> None:
    with pytest.raises(ValueError, match="has 1 paragraphs of several sentences, fewer than 150"):
        continuation.documents(
            "One sentence of six words stands here. Another sentence of the same paragraph follows it."
        )


def test_problems_are_different_and_their_answers_right() -> None:
    docs = arithmetic.problems()
    assert len({doc["platinum_prompt"] for doc in docs}) == len(docs) == arithmetic.DOCUMENTS
    for doc in docs:
        story = doc["platinum_prompt"].partition("Answer: XXX")[2]
        a, b = (int(word) for word in story.split() if word.isdigit())
        adds = "more" in story or "in all" in story
        assert int(doc["platinum_target"][0]) == (a + b if adds else a - b) > 0
        assert doc["platinum_prompt"].count("Answer: XXX") == 1


PINNED = "8db5139c64d3961c35ccfa0f27c50801170cae22f2e5931c2b5ba293cb9f6038"


def test_documents_are_the_same_on_every_machine_and_in_another_process() -> None:
    script = (
        "import hashlib, json\nfrom wush.tasks.embedded import arithmetic, continuation\n"
        "docs = [arithmetic.load()['test'].to_list(), continuation.load()['test'].to_list()]\n"
        "print(hashlib.sha256(json.dumps(docs).encode()).hexdigest())"
    )
    there = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()
    docs = [module.load()["test"].to_list() for module in (arithmetic, continuation)]
    assert hashlib.sha256(json.dumps(docs).encode()).hexdigest() == there == PINNED


def test_the_harness_scores_them(text: str) -> None:
    tasks = TaskManager(include_path=str(TASKS), include_defaults=False).load(NAMES)["tasks"]
    doc = tasks["embedded_arithmetic"].eval_docs[0]
    target = doc["platinum_target"][0]
    assert tasks["embedded_arithmetic"].doc_to_text(doc) == doc["platinum_prompt"]
    assert tasks["embedded_arithmetic"].process_results(doc, [f"It is.\nAnswer: {target}"]) == {"acc": 1.0}
    assert tasks["embedded_arithmetic"].process_results(doc, ["Answer: 99"]) == {"acc": 0.0}
    doc = tasks["embedded_continuation"].eval_docs[0]
    likely = [(-1.0 if index == doc["label"] else -500.0, False) for index in range(4)]
    assert tasks["embedded_continuation"].process_results(doc, likely) == {"acc": 1.0, "acc_norm": 1.0}
    requests = tasks["embedded_continuation"].construct_requests(doc, doc["passage"])
    assert [request.args for request in requests] == [(doc["passage"], f" {choice}") for choice in doc["choices"]]


def test_all_definitions_of_ours_are_listed_in_their_groups() -> None:
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    assert "platinum" in manager.all_groups
    assert {*NAMES, "humaneval_packaged", "humaneval_packaged_instruct"} <= set(manager.all_subtasks)
    assert len([name for name in manager.all_subtasks if name.startswith("platinum_")]) == 13
