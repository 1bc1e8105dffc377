"""Texts and their windows."""

import hashlib
from pathlib import Path

import pytest
import torch

from wush.models import byte_tokenizer
from wush.texts import PAD, EmbeddedText, TextFile, batches, sha256_of_ids, windows

SIZES = {"windows": 4, "window_length": 16, "batch_size": 2}


def test_the_two_halves_of_the_embedded_text_share_no_paragraph() -> None:
    calibration, evaluation = (EmbeddedText(part=part, **SIZES).text() for part in ("calibration", "evaluation"))
    assert abs(len(calibration) - len(evaluation)) < 0.3 * len(evaluation)
    first, second = ({" ".join(p.split()) for p in text.split("\n\n")} for text in (calibration, evaluation))
    assert len(first) > 500
    assert not first & second


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
