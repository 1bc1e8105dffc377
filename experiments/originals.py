"""Original models, loaded once for trials that follow one another in a process, and what is made of them alone.

On a CPU the untouched model is kept and each trial gets a copy; on a GPU, where loading is fast and memory dear,
each trial loads its own, and an untouched one is kept on the CPU for those that measure against it. Windows of tokens
and the last hidden states that evaluations compare with are kept in either case. Keys are identities, so that a model
or text that has changed is another one.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from hydra.utils import instantiate
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from experiments.identity import hash_of
from wush.models import LoadedModel


class Originals:
    """The most recent original model with its windows and states; asking for another forgets them."""

    def __init__(self) -> None:
        self._key = ""
        self._model: LoadedModel | None = None
        self._windows: dict[str, Tensor] = {}
        self._states: tuple[str, Tensor] | None = None

    def load(self, node: dict[str, Any], identity: dict[str, Any], device: str) -> LoadedModel:
        """The model of a config node, free for the caller to change; windows and states are of this one from now."""
        transformers_logging.disable_progress_bar()  # its bars would break the trial's own
        key = hash_of([identity, device])
        if key != self._key:
            self._key, self._model, self._windows, self._states = key, None, {}, None
        if device != "cpu":
            return instantiate(node, device=device)
        self._model = self._model or instantiate(node, device=device)
        return replace(self._model, model=copy.deepcopy(self._model.model))

    def untouched(self, node: dict[str, Any]) -> nn.Module:
        """The model of `load` as it is, on the CPU and not to be changed; for a GPU's trial it is loaded once more."""
        self._model = self._model or instantiate(node, device="cpu")
        return self._model.model

    def windows(self, text: dict[str, Any], cut: Callable[[], Tensor]) -> Tensor:
        """The windows of a text's identity, cut the first time."""
        key = hash_of(text)
        if key not in self._windows:
            self._windows[key] = cut()
        return self._windows[key]

    def states(self, text: dict[str, Any], make: Callable[[], Tensor]) -> Tensor:
        """The original's states for the evaluation windows of a text's identity, made the first time."""
        key = hash_of(text)
        if self._states is None or self._states[0] != key:
            self._states = None
            self._states = key, make()
        return self._states[1]
