"""Texts for calibration and evaluation, and their windows of tokens.

A text on this machine is known by its content: its SHA-256 goes into a trial's identity and record. Torch is
imported only to cut windows, so that texts can be read and checked before any heavy work.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    from torch import Tensor

# Fills a window that is shorter than others up to their length; no token of any vocabulary.
PAD = -1


@dataclass(frozen=True)
class Batch:
    """Windows of equal length that are run together: `rows` `(B,)` tells which they are, `ids` `(B, m)` their tokens.

    No token is padding.
    """

    rows: Tensor
    ids: Tensor


def batches(windows: Tensor, size: int) -> list[Batch]:
    """Windows `(W, M)`, shorter ones filled with `PAD` at their end, as batches of up to `size` without any padding.

    Windows of equal length are together and in order, the longest first: what does not fit in memory fails at once.
    Raises `ValueError` for a window that is padding alone, or has padding before a token.
    """
    import torch

    real = windows != PAD
    lengths = real.sum(1)
    if not lengths.all() or not torch.equal(real, torch.arange(windows.shape[1]) < lengths[:, None]):
        raise ValueError("windows are filled with PAD at their end alone, and each has a token")
    found = []
    for length in lengths.unique().flip(0).tolist():
        for rows in (lengths == length).nonzero().flatten().split(size):
            found.append(Batch(rows, windows[rows, :length]))
    return found


@dataclass(frozen=True, kw_only=True)
class TextWindows(ABC):
    """A text and how windows of tokens are cut from it, `batch_size` of which are run at a time.

    `windows` None takes all that the text holds; `seed` None spaces them evenly, else they are a random choice.
    """

    windows: int | None
    window_length: int
    batch_size: int
    seed: int | None = None

    @abstractmethod
    def text(self) -> str | None:
        """The text itself; None of one that is downloaded when its windows are cut."""

    @property
    def sha256(self) -> str | None:
        """SHA-256 of the text's UTF-8 bytes; None of one that is downloaded when its windows are cut."""
        text = self.text()
        return None if text is None else hashlib.sha256(text.encode()).hexdigest()

    def source(self) -> str | None:
        """Where a downloaded text comes from, such as `owner/dataset@commit`; None of one on this machine."""
        return None

    def cut(self, tokenizer: Any, what: str) -> Tensor:
        """The windows, `(W, M)` int64; raises `ValueError` naming `what` for too short a text.

        Windows shorter than `M` are filled with `PAD` at their end; `batches` takes it off again.
        """
        ids = tokenizer(self.text(), return_tensors="pt", verbose=False).input_ids[0]
        return windows(ids, self.windows, self.window_length, what, self.seed)


@dataclass(frozen=True, kw_only=True)
class EmbeddedText(TextWindows):
    """One of two disjoint halves of Python's own topic documentation: its topics by name, alternating.

    Topics quote each other, so a paragraph is kept only where it comes first. About 45,000 tokens of English
    technical prose each; the text differs between Python versions.
    """

    part: Literal["calibration", "evaluation"]

    def text(self) -> str:
        from pydoc_data.topics import topics

        kept: dict[str, list[str]] = {"calibration": [], "evaluation": []}
        seen: set[str] = set()
        for name, part in zip(sorted(topics), itertools.cycle(kept)):
            for paragraph in topics[name].split("\n\n"):
                words = " ".join(paragraph.split())
                if words not in seen:
                    seen.add(words)
                    kept[part].append(paragraph)
        return "\n\n".join(kept[self.part])


@dataclass(frozen=True, kw_only=True)
class EmbeddedCode(TextWindows):
    """Source code of Python's standard library: some of its large modules, one after the other.

    About 150,000 tokens, far from the prose of `EmbeddedText`; it differs between Python versions.
    """

    MODULES: ClassVar[Sequence[str]] = ("argparse", "ast", "dataclasses", "inspect", "subprocess", "tarfile", "typing")

    def text(self) -> str:
        specs = [importlib.util.find_spec(name) for name in self.MODULES]
        return "\n\n".join(Path(str(spec.origin)).read_text(encoding="utf-8") for spec in specs if spec)


@dataclass(frozen=True, kw_only=True)
class TextFile(TextWindows):
    """A UTF-8 text file."""

    path: str

    def text(self) -> str:
        """The file's content; raises `ValueError` when it is missing, is no text or is empty."""
        try:
            content = Path(self.path).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"text file {self.path!r}: {error}; give the path of a UTF-8 text file") from error
        if not content.strip():
            raise ValueError(f"text file {self.path!r} is empty; give the path of a UTF-8 text file")
        return content


def windows(ids: Tensor, count: int | None, length: int, what: str, seed: int | None = None) -> Tensor:
    """`count` of the non-overlapping windows of `length` tokens in `ids`, `(count, length)` in text order.

    None takes them all; with a seed the choice is random, else evenly spaced. Raises `ValueError`, with the
    remedy, when the text has too few.
    """
    import torch

    available = len(ids) // length
    count = available if count is None else count
    if available < max(count, 1):
        raise ValueError(
            f"the {what} text has {len(ids):,} tokens, {available} windows of {length}, but {max(count, 1)} are asked "
            f"for; use a longer text, {what}.window_length={max(len(ids) // max(count, 1), 1)} or fewer {what}.windows"
        )
    every = ids[: available * length].view(available, length)
    if seed is None:
        return every[torch.arange(count) * available // count]
    return every[torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:count].sort().values]


def sha256_of_ids(ids: Tensor) -> str:
    """SHA-256 of the token ids as little-endian int64."""
    return hashlib.sha256(ids.numpy().astype("<i8").tobytes()).hexdigest()
