"""Texts from datasets of the Hugging Face Hub: which rows are taken, in what order, and how they become tokens.

Such a text is known by its name: nothing is downloaded before windows are cut. `wush.downloads` reaches the hub.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from wush import downloads
from wush.texts import TextWindows, beginning_with, every_window, filled, windows

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

# Of the rule by which rows become windows: another number, and no windows kept under the old rule are used.
READING = 2
# Of a document that is a window of its own: with fewer there is nothing to predict.
FEWEST_TOKENS = 2
# The names of a message's author and content in each layout, and the chat templates' names of other authors.
KEYS = {"messages": ("role", "content"), "turns": ("from", "value")}
ROLES = {"human": "user", "gpt": "assistant"}

Message = Mapping[str, str]
Document = str | list[Message]
Cutting = Literal["packed", "crops", "each"]


@dataclass(frozen=True, kw_only=True)
class HubText(TextWindows):
    """Rows of one split of a dataset; `name` is the dataset's configuration, `revision` None its newest commit.

    `layout` says what the `columns` of a row hold:
    - text: one column of plain text.
    - messages: a list of `{role, content}` in the last column, a system prompt in those before it.
    - turns: the same with `{from, value}`.
    - exchange: an answer in the last column, the question in those before it.
    All but text go through the tokenizer's chat template.

    `read` says how rows are taken:
    - joined: all of them as one text, blank lines between, tokenized once; `seed` chooses among its windows.
    - shuffled: downloaded, and taken in a random order.
    - streamed: taken as they arrive, files in a random order, through a `buffer` of rows drawn from at random.
    Shuffled and streamed rows are tokenized each, special tokens included; `seed` None takes them in the dataset's
    order. `files` takes the rows of these files alone, by their path in the repository, in place of all of the split.

    `cutting` says how these documents become windows (a config's key `cut`; see `hub_text`):
    - packed: one after the other, without gaps, cut into windows.
    - crops: of each document that is long enough one window, from a random place; `seed` None: from its beginning.
    - each: each document is one window, cut at the window's length; shorter ones make shorter windows.

    `part` takes one of two halves of the rows, which share no document: a hash of its content decides.
    """

    dataset: str
    name: str | None
    revision: str | None
    split: str
    files: Sequence[str] | None
    layout: Literal["text", "messages", "turns", "exchange"]
    columns: Sequence[str]
    read: Literal["joined", "shuffled", "streamed"]
    buffer: int | None
    cutting: Cutting
    part: Literal["calibration", "evaluation"] | None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.read == "joined" and (self.layout != "text" or self.part is not None):
            raise ValueError(f"{self.dataset}: read=joined is for layout=text and part=null; use read=shuffled")
        if self.read == "joined" and self.cutting != "packed":
            raise ValueError(
                f"{self.dataset}: cut={self.cutting} is for documents, and read=joined makes one text of them; "
                "use read=shuffled, or cut=packed"
            )
        if self.read == "streamed" and self.buffer is None:
            raise ValueError(f"{self.dataset}: read=streamed draws rows from a buffer; give its size, buffer=1000")
        if self.read == "streamed" and self.windows is None:
            raise ValueError(f"{self.dataset}: windows=null would read a whole stream; give a number of windows")

    def text(self) -> None:
        """None: the content is known only once it is downloaded, and `source` tells it."""

    def source(self) -> str:
        """The dataset and the commit that is read, `owner/name@commit`; the same while the process lives.

        Raises `ValueError`, with the remedy, when the hub does not give it and this machine has not seen it.
        """
        return f"{self.dataset}@{downloads.commit(self.dataset, self.revision)}"

    def cut(self, tokenizer: Any, what: str) -> Tensor:
        """The windows, `(windows, window_length)` int64; those of a stream are kept on this machine.

        With `cutting="each"` shorter ones are filled with `texts.PAD`. Raises `ValueError` for too few rows, rows of
        another layout, a tokenizer without a chat template where it needs one, and a dataset that is not to be had.
        """
        if self.layout != "text" and not tokenizer.chat_template:
            raise ValueError(
                f"{what}: the model's tokenizer has no chat template, which {self.dataset} needs; "
                f"use an instruction-tuned model, or plain text such as {what}=c4"
            )
        self.beginning(tokenizer, what)  # refused before anything is downloaded
        source = self.source()
        if self.read != "streamed":
            return self._read(tokenizer, what, source)
        key = self.key(tokenizer, source)
        ids = downloads.kept(key, (self.windows, self.window_length))
        if ids is None:
            ids = self._read(tokenizer, what, source)
            downloads.keep(key, ids)
        return ids

    def key(self, tokenizer: Any, source: str) -> str:
        """What its windows are kept under: all that decides them, the commit and the rule of reading included."""
        wanted = {key: value for key, value in asdict(self).items() if key not in ("batch_size", "revision")}
        lists = {"columns": list(self.columns), "files": None if self.files is None else list(self.files)}
        rule = {**lists, "source": source, "reading": READING}
        return downloads.key_of({**wanted, **rule}, tokenizer)

    def _read(self, tokenizer: Any, what: str, source: str) -> Tensor:
        log.info("%s: reading %s", what, source)
        cut = {"packed": self._cut_packed, "crops": self._cut_apart, "each": self._cut_apart}[self.cutting]
        bos = self.beginning(tokenizer, what)
        with downloads.explained(self.dataset):
            return self._cut_joined(tokenizer, what, bos) if self.read == "joined" else cut(tokenizer, what, bos)

    def _cut_joined(self, tokenizer: Any, what: str, bos: int | None) -> Tensor:
        text = "\n\n".join(str(self._document(row)) for row in self._rows())
        ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
        return windows(ids, self.windows, self.window_length, what, self.seed, bos)

    def _cut_packed(self, tokenizer: Any, what: str, bos: int | None) -> Tensor:
        import torch

        enough = None if self.windows is None else self.windows * self.window_length
        ids, documents = self._tokens(tokenizer, enough)
        every = every_window(torch.tensor(ids[:enough], dtype=torch.long), self.window_length, bos)[: self.windows]
        if len(every) < (self.windows or 1):
            raise ValueError(self._too_few(documents, f"{len(ids):,} tokens", len(every), what))
        return every

    def _cut_apart(self, tokenizer: Any, what: str, bos: int | None) -> Tensor:
        """A window of each document that is long enough."""
        found: list[list[int]] = []
        documents, places = 0, random.Random(self.seed)
        needed = self.window_length if self.cutting == "crops" else FEWEST_TOKENS
        for document in self._documents():
            ids = self._tokenized(document, tokenizer)
            documents += 1
            if len(ids) >= needed:
                found.append(beginning_with(bos, ids[self._start(len(ids), places) :], self.window_length))
            if len(found) == self.windows:
                break
        if len(found) < (self.windows or 1):
            raise ValueError(self._too_few(documents, f"{len(found)} of {needed} tokens or more", len(found), what))
        return filled(found, self.window_length)

    def _start(self, tokens: int, places: random.Random) -> int:
        """Where the window of a document of so many tokens starts."""
        if self.cutting == "each" or self.seed is None:
            return 0
        return places.randint(0, tokens - self.window_length)

    def _too_few(self, documents: int, held: str, available: int, what: str) -> str:
        return (
            f"{documents} documents of {self.source()} are too few: {held}, {available} windows of "
            f"{self.window_length}, but {self.windows or 1} are asked for; use another dataset, a shorter "
            f"{what}.window_length or fewer {what}.windows"
        )

    def _tokens(self, tokenizer: Any, enough: int | None) -> tuple[list[int], int]:
        """The tokens of the documents until there are enough, and how many documents that took."""
        ids: list[int] = []
        documents = 0
        for document in self._documents():
            if enough is not None and len(ids) >= enough:
                break
            ids += self._tokenized(document, tokenizer)
            documents += 1
        return ids, documents

    def _tokenized(self, document: Document, tokenizer: Any) -> list[int]:
        from jinja2 import TemplateError

        if isinstance(document, str):
            return tokenizer(document, verbose=False).input_ids
        try:
            text = tokenizer.apply_chat_template(document, tokenize=False)
        except TemplateError as error:
            raise ValueError(
                f"the tokenizer's chat template refuses a conversation of {self.dataset}: {error}; "
                f"use another dataset, or columns={[self.columns[-1]]} to leave out its system prompts"
            ) from error
        return tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    def _documents(self) -> Iterator[Document]:
        for row in self._rows():
            document = self._document(row)
            if self.part in (None, _half(document)):
                yield document

    def _rows(self) -> Iterator[Mapping[str, Any]]:
        of = downloads.Rows(self.dataset, self.name, self.revision, self.split, self.files)
        rows = downloads.rows(of, streamed=self.read == "streamed")
        if self.seed is not None and self.read != "joined":
            options: dict[str, Any] = (
                {"buffer_size": self.buffer} if self.read == "streamed" else {"keep_in_memory": True}
            )
            rows = rows.shuffle(seed=self.seed, **options)
        yield from rows

    def _document(self, row: Mapping[str, Any]) -> Document:
        try:
            *before, last = (row[column] for column in self.columns)
            return self._laid_out("\n\n".join(part for part in before if part), last)
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{self.dataset}: a row with {', '.join(row)} does not hold layout={self.layout} in "
                f"columns={list(self.columns)}; name its columns, or another layout"
            ) from error

    def _laid_out(self, lead: str, last: Any) -> Document:
        """What the last column holds, and the text of those before it."""
        if self.layout in KEYS:
            role, content = KEYS[self.layout]
            messages: list[Message] = [
                {"role": ROLES.get(turn[role], turn[role]), "content": turn[content]} for turn in last
            ]
            return [{"role": "system", "content": lead}, *messages] if lead else messages
        if not isinstance(last, str):
            raise TypeError(f"{type(last).__name__} is no text")
        if self.layout == "text":
            return last
        return [{"role": "user", "content": lead}, {"role": "assistant", "content": last}]


def hub_text(*, cut: Cutting, **keys: Any) -> HubText:
    """A text from a config's keys: `cut` there is `HubText.cutting` here, where `cut` is what cuts the windows."""
    return HubText(cutting=cut, **keys)


def _half(document: Document) -> str:
    """The part that a document belongs to, by its content: equal documents are never in both."""
    content = document if isinstance(document, str) else json.dumps(document)
    return ("calibration", "evaluation")[hashlib.sha256(content.encode()).digest()[0] % 2]
