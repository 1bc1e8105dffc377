"""Which sentence comes next in Python's topic documentation: the true one, or one of three from elsewhere in it.

Only the half of the documentation that models are evaluated on is used, never that of calibration.
"""

from __future__ import annotations

import random
import re
from typing import TYPE_CHECKING, Any

from wush.texts import EmbeddedText

if TYPE_CHECKING:
    from datasets import Dataset

DOCUMENTS, CHOICES, SEED = 150, 4, 0
WORDS = range(6, 41)  # of a sentence to choose
PASSAGE_WORDS = range(6, 81)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")


def load(**_: Any) -> dict[str, Dataset]:
    """The documents: passage, choices (four sentences), label (the index of the true one)."""
    from datasets import Dataset

    return {"test": Dataset.from_list(documents(_evaluation_text()))}


def documents(text: str) -> list[dict[str, Any]]:
    """At most one document of each paragraph of `text`, `DOCUMENTS` in all, in the order of the text."""
    chooser = random.Random(SEED)
    paragraphs = list({split[0]: split for split in map(_sentences, text.split("\n\n")) if _cuts(split)}.values())
    if len(paragraphs) < DOCUMENTS:
        raise ValueError(f"the text has {len(paragraphs)} paragraphs of several sentences, fewer than {DOCUMENTS}")
    everywhere = {sentences[cut] for sentences in paragraphs for cut in _cuts(sentences)}
    chosen = sorted(chooser.sample(range(len(paragraphs)), DOCUMENTS))
    return [_document(paragraphs[index], sorted(everywhere - set(paragraphs[index])), chooser) for index in chosen]


def _document(sentences: list[str], elsewhere: list[str], chooser: random.Random) -> dict[str, Any]:
    cut = chooser.choice(_cuts(sentences))
    choices = chooser.sample(elsewhere, CHOICES - 1)
    label = chooser.randrange(CHOICES)
    choices.insert(label, sentences[cut])
    return {"passage": " ".join(sentences[:cut]), "choices": choices, "label": label}


def _cuts(sentences: list[str]) -> list[int]:
    """Where a passage can end: the indices of the sentences that can be asked for."""
    lengths = [len(sentence.split()) for sentence in sentences]
    starts = range(1, len(sentences))
    return [index for index in starts if lengths[index] in WORDS and sum(lengths[:index]) in PASSAGE_WORDS]


def _sentences(paragraph: str) -> list[str]:
    """The sentences of a paragraph of prose; none for lists, code and headings."""
    words = " ".join(paragraph.split())
    return _SENTENCE_END.split(words) if re.match(r"[A-Z\"]", words) and words.endswith(".") else []


def _evaluation_text() -> str:
    return EmbeddedText(part="evaluation", windows=None, window_length=1, batch_size=1).text()
