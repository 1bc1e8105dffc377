"""Datasets of the Hugging Face Hub on this machine: tried again where the hub falters, and windows that are kept.

What is downloaded lies in the caches of `datasets` and `huggingface_hub`; windows cut from a stream lie beside them,
under `$HF_HOME/wush/windows`. With neither network nor these, a `ValueError` says how to get the data.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

T = TypeVar("T")

ATTEMPTS = 3  # each with what the clients try again themselves
WAIT = 5.0  # seconds before the second attempt; then twice as long each time
TRANSIENT_STATUS = (408, 429, 500, 502, 503, 504)
FILE_KINDS = ("parquet", "json")  # as `datasets` names what reads them; the latter reads JSON lines, compressed too
# Of a saved tokenizer's config: where it was loaded from, which changes no token.
LOADED_FROM = ("name_or_path", "is_local", "local_files_only")


@functools.cache
def commit(dataset: str, revision: str | None) -> str:
    """The commit that a revision is at; without network, the one this machine saw last. Found once a process.

    Raises `ValueError`, with the remedy, when it cannot be known.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    def find() -> str:
        try:
            path = hf_hub_download(dataset, "README.md", repo_type="dataset", revision=revision)
        except RemoteEntryNotFoundError as no_readme:  # the repository is there, and its answer names the commit
            return no_readme.response.headers["X-Repo-Commit"]
        return Path(path).parent.name

    return retried(dataset, find)


@dataclass(frozen=True)
class Rows:
    """Which rows of a dataset at a revision: those of a configuration's (`name`) split, or of `files` where given."""

    dataset: str
    name: str | None
    revision: str | None
    split: str
    files: Sequence[str] | None


def rows(of: Rows, streamed: bool) -> Any:
    """Rows of a dataset, a `datasets.Dataset` or, streamed, an `IterableDataset`, at the revision's commit.

    Raises `ValueError`, with the remedy, when it is not to be had; what reading a stream raises is for `explained`.
    """
    from datasets import disable_progress_bars

    disable_progress_bars()  # they would break the trial's own
    wanted = commit(of.dataset, of.revision)
    load = _load if of.files is None else _load_files
    return retried(of.dataset, lambda: load(of, wanted, streamed))


def _load_files(of: Rows, wanted: str, streamed: bool) -> Any:
    """Downloaded as files and read from there: `datasets` does not find again without network what it took in part."""
    from datasets import load_dataset
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    assert of.files is not None
    kinds = {next((kind for kind in FILE_KINDS if f".{kind}" in Path(file).name), None) for file in of.files}
    if len(kinds) != 1 or None in kinds:
        raise ValueError(f"dataset {of.dataset}, files={list(of.files)}: give files of one kind, JSON lines or Parquet")
    try:
        paths = [hf_hub_download(of.dataset, file, repo_type="dataset", revision=wanted) for file in of.files]
    except RemoteEntryNotFoundError as error:
        raise ValueError(f"dataset {of.dataset}, files={list(of.files)}: {reason(error)}; check their paths") from error
    return load_dataset(kinds.pop(), data_files=paths, split="train", streaming=streamed)


def _load(of: Rows, wanted: str, streamed: bool) -> Any:
    from datasets import load_dataset_builder
    from datasets.exceptions import DatasetsError

    try:
        builder = load_dataset_builder(of.dataset, of.name, revision=wanted)
    except (ValueError, DatasetsError) as error:  # no such configuration or files, or none that can be seen from here
        if _of_network(error) is not None:
            raise
        kind = ConnectionError if _offline() else ValueError
        raise kind(f"dataset {of.dataset}, name={of.name}: {error}") from error
    if builder.hash != wanted:  # `datasets` takes any version that it has when the hub does not answer
        raise ConnectionError(f"only commit {builder.hash} is on this machine, and {wanted} is asked for")
    try:
        if streamed:
            return builder.as_streaming_dataset(of.split)
        builder.download_and_prepare()
        return builder.as_dataset(of.split)
    except ValueError as error:
        raise ValueError(f"dataset {of.dataset}, split={of.split}: {error}") from error


def retried(dataset: str, action: Callable[[], T]) -> T:
    """What an action gives that asks the hub, tried again while the network or the hub falter.

    Raises `ValueError`, with the remedy, when the dataset is not to be had.
    """
    with explained(dataset):
        return attempted(f"dataset {dataset}", action)


def attempted(what: str, action: Callable[[], T]) -> T:
    """What an action gives, tried again, with a warning, while the network or the hub falter; raises its last error."""
    from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, wait_exponential

    def tell(state: RetryCallState) -> None:
        assert state.outcome is not None
        assert state.next_action is not None
        error = state.outcome.exception()
        assert error is not None
        log.warning("%s: %s; tried again in %.0f s", what, reason(error), state.next_action.sleep)

    attempts = Retrying(
        retry=retry_if_exception(lambda error: _is_transient(error) and not _offline()),
        stop=stop_after_attempt(ATTEMPTS),
        wait=wait_exponential(multiplier=WAIT),
        before_sleep=tell,
        reraise=True,
    )
    return attempts(action)


@contextmanager
def explained(dataset: str) -> Iterator[None]:
    """Raise `ValueError`, with the remedy, where the hub refuses or is out of reach; other errors as they are."""
    try:
        yield
    except ValueError:  # says itself what to do
        raise
    except Exception as error:  # each client raises its own kinds
        advice = remedy(dataset, error)
        if advice is None:
            raise
        if _is_transient(error):
            advice += ", or use a file of yours (calibration=text calibration.path=...)"
        raise ValueError(f"dataset {dataset}: {reason(error)}; {advice}") from error


def _offline() -> bool:
    from datasets import config

    return config.HF_HUB_OFFLINE


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and what led to it: the clients wrap the network's errors in their own."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__ or found.__context__


def _of_network(error: BaseException) -> BaseException | None:
    """What the hub or the network said, of all that led to an error."""
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # the client's own, httpx or httpx2

    kinds = (HfHubHTTPError, httpx.TransportError, ConnectionError, TimeoutError)
    return next((cause for cause in _causes(error) if isinstance(cause, kinds)), None)


def _is_transient(error: BaseException) -> bool:
    from huggingface_hub.errors import HfHubHTTPError

    found = _of_network(error)
    if isinstance(found, HfHubHTTPError):
        return found.response.status_code in TRANSIENT_STATUS
    return found is not None


def reason(error: BaseException) -> str:
    """The first line of what the hub or the network said, else of the error itself."""
    found = _of_network(error) or error
    return next((line.strip() for line in str(found).splitlines() if line.strip()), type(found).__name__)


def remedy(dataset: str, error: BaseException) -> str | None:
    """What to do where the hub refuses or is out of reach; None for any other error."""
    from huggingface_hub import errors

    found = _of_network(error)
    if isinstance(found, errors.GatedRepoError):
        return f"ask for access at https://huggingface.co/datasets/{dataset} and log in: hf auth login"
    if isinstance(found, errors.RevisionNotFoundError):
        return "check its revision"
    if isinstance(found, errors.RepositoryNotFoundError):
        return "check its name; a private dataset needs: hf auth login"
    if _is_transient(error):
        return f"the hub does not answer, and the data is not on this machine: {with_network()}"
    return None


def with_network() -> str:
    """How to get what is not on this machine."""
    from huggingface_hub.constants import HF_HOME

    return f"run this once where there is network, with the same HF_HOME ({HF_HOME})"


def key_of(wanted: dict[str, Any], tokenizer: Any) -> str:
    """What windows are kept under: a hash of what is cut, and of the tokenizer's content."""
    digest = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode())
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            content = path.read_bytes()
            if path.name == "tokenizer_config.json":
                config = {key: value for key, value in json.loads(content).items() if key not in LOADED_FROM}
                content = json.dumps(config, sort_keys=True).encode()
            digest.update(path.name.encode() + hashlib.sha256(content).digest())
    return digest.hexdigest()[:32]


def kept(key: str, shape: tuple[int | None, int]) -> Tensor | None:
    """The windows kept under a key, int64 of a shape; None, with a warning, where the file is damaged."""
    from safetensors import SafetensorError, safe_open

    from wush.texts import sha256_of_ids

    path = _path(key)
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            ids, sha256 = file.get_tensor("ids"), file.metadata()["sha256"]
        if tuple(ids.shape) == shape and sha256_of_ids(ids) == sha256:
            return ids
        reason = "not what was written"
    except (SafetensorError, OSError, KeyError, TypeError) as error:
        reason = str(error)
    log.warning("the kept windows %s are damaged (%s) and cut again", path, reason)
    return None


def keep(key: str, ids: Tensor) -> None:
    """Keep windows under a key: the file is there whole or not at all. Warns where it cannot be written."""
    from safetensors.torch import save

    from wush.texts import sha256_of_ids

    path = _path(key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            whole = Path(folder, path.name)
            with whole.open("wb") as file:
                file.write(save({"ids": ids.contiguous()}, {"sha256": sha256_of_ids(ids)}))
                file.flush()
                os.fsync(file.fileno())
            whole.replace(path)
    except OSError as error:
        log.warning("windows cannot be kept in %s (%s) and are cut again next time", path.parent, error)


def _path(key: str) -> Path:
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME, "wush", "windows", f"{key}.safetensors")
