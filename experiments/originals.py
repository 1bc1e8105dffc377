"""Original models, loaded once for trials that follow one another in a process.

On a CPU the untouched model is kept and each trial gets a copy; on a GPU, where loading is fast and memory dear,
each trial loads its own. The last hidden states that evaluations compare with are kept in either case.
"""

import copy
import json
from typing import Any

from hydra.utils import instantiate
from torch import Tensor
from transformers.utils import logging as transformers_logging

import wush
from wush.models import LoadedModel
from wush.progress import Progress


class Originals:
    """The most recent original model and its states; asking for another forgets them."""

    def __init__(self) -> None:
        self._model: tuple[str, LoadedModel] | None = None
        self._states: tuple[str, Tensor] | None = None

    def load(self, model: dict[str, Any], device: str) -> LoadedModel:
        """The model of a config node, free for the caller to change."""
        transformers_logging.disable_progress_bar()  # its bars would break the trial's own
        if device != "cpu":
            return instantiate(model, device=device)
        key = json.dumps(model, sort_keys=True)
        if self._model is None or self._model[0] != key:
            self._model = None
            self._model = key, instantiate(model, device=device)
        kept = self._model[1]
        return LoadedModel(copy.deepcopy(kept.model), kept.tokenizer)

    def states(
        self, loaded: LoadedModel, windows: Tensor, key: dict[str, Any], batch_size: int, progress: Progress
    ) -> Tensor:
        """The original's states for evaluation windows; `key` is the model and evaluation they belong to."""
        text = json.dumps(key, sort_keys=True)
        if self._states is None or self._states[0] != text:
            self._states = None
            found = wush.original_states(loaded.model, windows, batch_size=batch_size, progress=progress)
            self._states = text, found
        return self._states[1]
