"""Texts and their windows."""

import functools
import hashlib
import itertools
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing

import wush.embedded
from wush.embedded import make
from wush.models import byte_tokenizer
from wush.texts import PAD, SHA256, EmbeddedText, TextFile, _embedded, batches, every_window, sha256_of_ids, windows

FOLDER = Path(wush.embedded.__file__).parent
SIZES: dict[str, Any] = {"windows": 4, "window_length": 16, "batch_size": 2}


PARTS = tuple(SHA256)


def embedded(part: Any) -> str:
    return EmbeddedText(part=part, **SIZES).text()


@functools.cache
def grams(part: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", embedded(part).lower())
    return set(zip(*(words[start:] for start in range(13)), strict=False))


@pytest.mark.parametrize(("first", "second"), list(itertools.combinations(PARTS, 2)))
def test_embedded_texts_share_no_passage(first: str, second: str) -> None:
    ours, theirs = grams(first), grams(second)
    assert min(len(ours), len(theirs)) > 20_000
    assert len(ours & theirs) < 0.01 * min(len(ours), len(theirs))


def test_the_two_halves_of_the_embedded_text_share_no_paragraph() -> None:
    calibration, evaluation = embedded("calibration"), embedded("evaluation")
    assert abs(len(calibration) - len(evaluation)) < 0.3 * len(evaluation)
    first, second = ({" ".join(p.split()) for p in text.split("\n\n")} for text in (calibration, evaluation))
    assert len(first) > 500
    assert not first & second


@pytest.mark.parametrize("part", PARTS)
def test_the_identity_of_an_embedded_text_is_the_hash_of_its_file(part: Any) -> None:
    file = FOLDER / f"{part}.txt"
    assert EmbeddedText(part=part, **SIZES).sha256 == hashlib.sha256(file.read_bytes()).hexdigest() == SHA256[part]


@pytest.mark.parametrize("damage", [lambda whole: whole[:-1], lambda whole: whole.replace(b"\n", b"\r\n"), None])
def test_an_embedded_text_that_is_not_what_was_published_is_an_error(
    damage: Callable[[bytes], bytes] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if damage is not None:
        (tmp_path / "held_out.txt").write_bytes(damage((FOLDER / "held_out.txt").read_bytes()))
    monkeypatch.setattr("wush.texts.resources.files", lambda _: tmp_path)
    _embedded.cache_clear()
    with pytest.raises(ValueError, match="install the package anew") as raised:
        embedded("held_out")
    assert str(tmp_path / "held_out.txt") in str(raised.value)


def test_embedded_texts_and_their_licences_are_part_of_the_package() -> None:
    project = tomllib.loads((FOLDER.parent.parent / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["wush.embedded"]
    packed = {path for pattern in patterns for path in FOLDER.glob(pattern)}
    files = {path for path in FOLDER.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert files == packed
    assert {f"{part}.txt" for part in PARTS} == {path.name for path in packed if path.parent == FOLDER} - {"README.md"}
    told = (FOLDER / "README.md").read_text()
    for path in packed - {FOLDER / "README.md"}:
        assert f"`{path.relative_to(FOLDER).as_posix()}`" in told


@pytest.mark.skipif(make.installed() != make.SOURCES, reason=f"needs {make.SOURCES}")
def test_embedded_texts_are_what_their_sources_make() -> None:
    made = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in make.made().items()}
    assert made == SHA256


def test_windows_do_not_overlap_and_keep_the_texts_order() -> None:
    ids = torch.arange(103)
    every = windows(ids, None, 10, "evaluation")
    assert every.flatten().tolist() == list(range(100))
    assert windows(ids, 5, 10, "evaluation")[:, 0].tolist() == [0, 20, 40, 60, 80]
    chosen = windows(ids, 4, 10, "calibration", seed=1)[:, 0].tolist()
    assert chosen == sorted(set(chosen))


def test_the_seed_alone_decides_which_windows() -> None:
    ids = torch.arange(1000)
    first, again, other = (windows(ids, 8, 10, "calibration", seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("count", [1, 3, None])
def test_a_text_that_is_too_short_is_an_error_with_the_remedy(count: int | None) -> None:
    with pytest.raises(
        ValueError, match=r"calibration text has 9 tokens, 0 windows of 10.*calibration\.window_length="
    ):
        windows(torch.arange(9), count, 10, "calibration")


def test_text_files_are_known_by_their_content(tmp_path: Path) -> None:
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    for path in (first, second):
        path.write_text("ä text " * 100, encoding="utf-8")
    texts = [TextFile(path=str(path), **SIZES) for path in (first, second)]
    assert texts[0].sha256 == texts[1].sha256 == hashlib.sha256(first.read_bytes()).hexdigest()
    cut = texts[0].cut(byte_tokenizer(), "evaluation")
    assert cut.shape == (4, 16)
    assert sha256_of_ids(cut) == hashlib.sha256(cut.numpy().tobytes()).hexdigest()


BOS = 7


@pytest.mark.parametrize("length", [2, 3, 10, 16])
@pytest.mark.parametrize(
    "text", [[], [1, 2], [*range(20, 123)], [BOS, *range(20, 123)], [BOS, 1, 2, BOS, *[3] * 40] * 3]
)
def test_windows_that_each_begin_with_bos_leave_no_token_out(text: list[int], length: int) -> None:
    found = every_window(torch.tensor(text, dtype=torch.long), length, BOS)
    assert found.shape[1] == length
    assert (found[:, 0] == BOS).all()
    left = list(text)
    for window in found.tolist():  # each goes on where the one before ended; a BOS of the text is not doubled
        window = window if left[0] == BOS else window[1:]
        assert window == left[: len(window)]
        left = left[len(window) :]
    assert len(left) < length


@pytest.mark.parametrize("seed", [None, 3])
def test_choosing_among_windows_is_the_same_with_bos(seed: int | None) -> None:
    text = torch.arange(100, 203)
    every = windows(text, None, 10, "evaluation", None, BOS)
    assert every[:, 1:].flatten().tolist() == list(range(100, 199))
    chosen = windows(text, 4, 10, "evaluation", seed, BOS)
    assert [row in every.tolist() for row in chosen.tolist()] == [True] * 4
    assert torch.equal(chosen[:, 1], chosen[:, 1].unique())


def tokenizer_with_bos(adds_it: bool) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    if adds_it:
        single = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
        tokenizer.backend_tokenizer.post_processor = single
    return tokenizer


@pytest.mark.parametrize("adds_it", [True, False])
@pytest.mark.parametrize("part", ["calibration", "evaluation"])
def test_every_window_of_a_text_can_begin_with_bos(part: Any, adds_it: bool) -> None:
    tokenizer = tokenizer_with_bos(adds_it)
    first, every, true = (
        EmbeddedText(part=part, windows=None, window_length=64, batch_size=2, bos=bos).cut(tokenizer, part)
        for bos in ("first", "every", True)
    )
    bos = tokenizer.bos_token_id
    assert (first == bos).sum() == adds_it
    assert (every[:, 0] == bos).all()
    assert (every == bos).sum() == len(every)
    assert torch.equal(every, true)
    texts = (ids[ids != bos].tolist() for ids in (first, every))
    assert all(ours == theirs for ours, theirs in zip(*texts, strict=False))


def test_a_bos_that_cannot_be_is_refused() -> None:
    keys: dict[str, Any] = {"part": "evaluation", **SIZES}
    with pytest.raises(ValueError, match=r"evaluation\.bos=every: .* no token of beginning; use evaluation\.bos=first"):
        EmbeddedText(**keys, bos="every").cut(byte_tokenizer(), "evaluation")
    with pytest.raises(ValueError, match="'always' is neither first nor every"):
        EmbeddedText(**keys, bos="always")
    with pytest.raises(ValueError, match="no room for a token"):
        EmbeddedText(**{**keys, "window_length": 1}, bos="every")


def test_byte_tokens_stand_for_the_texts_bytes() -> None:
    tokenizer = byte_tokenizer()
    text = "naïve text\n\twith 4 bits"
    assert len(tokenizer(text).input_ids) == len(text.encode())
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.parametrize(
    ("content", "message"), [(None, "No such file"), (b"\xff\xfe\x00", "utf-8"), (b" \n", "empty")]
)
def test_a_file_that_is_missing_no_text_or_empty_is_an_error(
    content: bytes | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        TextFile(path=str(path), **SIZES).text()
    assert str(path) in str(raised.value)


def padded(lengths: list[int]) -> torch.Tensor:
    """Windows of these lengths whose tokens are all different."""
    filled = torch.full((len(lengths), max(lengths)), PAD)
    for row, length in enumerate(lengths):
        filled[row, :length] = torch.arange(length) + 100 * row
    return filled


@pytest.mark.parametrize("size", [1, 2, 3, 100])
@pytest.mark.parametrize("lengths", [[5, 5, 5, 5, 5], [3, 7, 3, 1, 7, 7, 3], [1], [9, 8, 7]])
def test_batches_hold_every_token_once_and_no_padding(lengths: list[int], size: int) -> None:
    filled = padded(lengths)
    found = batches(filled, size)
    assert sorted(row for batch in found for row in batch.rows.tolist()) == list(range(len(lengths)))
    for batch in found:
        assert 1 <= len(batch.rows) <= size
        assert batch.ids.dtype == torch.int64
        for row, ids in zip(batch.rows.tolist(), batch.ids, strict=True):
            assert ids.tolist() == filled[row][filled[row] != PAD].tolist()


def test_windows_of_equal_length_are_batched_in_order_and_together() -> None:
    filled = padded([4] * 7)
    assert torch.equal(torch.cat([batch.rows for batch in batches(filled, 3)]), torch.arange(7))
    assert [len(batch.rows) for batch in batches(filled, 3)] == [3, 3, 1]
    mixed = [batch.rows.tolist() for batch in batches(padded([2, 5, 2, 5, 2]), 2)]
    assert mixed == [[1, 3], [0, 2], [4]]


@pytest.mark.parametrize("wrong", [[[1, 2], [PAD, PAD]], [[1, 2, 3], [PAD, 2, 3]], [[1, PAD, 3]]])
def test_padding_anywhere_but_at_the_end_is_refused(wrong: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="at their end alone"):
        batches(torch.tensor(wrong), 2)
