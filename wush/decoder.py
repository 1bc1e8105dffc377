"""A causal LM seen as a row of decoder blocks: finding them, their linears, and what each block is called with.

Nothing here knows a model by name: blocks are the `ModuleList` that holds most of the model's linear weights.
Shape legend: `B` windows in a batch, `M` tokens, `I` features.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from wush.errors import UnsupportedModelError

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class BlockCalls:
    """One batch on its way through the blocks: hidden states `(B, M, I)` and each block's other arguments."""

    hidden: Tensor
    arguments: list[Arguments]


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The name and the `ModuleList` of the decoder blocks; raises `UnsupportedModelError` when there is none."""
    candidates = [
        (sum(linear.weight.numel() for block in module for linear in linears(block).values()), name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and all(linears(block) for block in module)
    ]
    if not candidates:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no decoder blocks (no ModuleList of modules with nn.Linear layers); "
            "load it as a causal LM of an architecture with separate linear layers"
        )
    _, name, blocks = max(candidates, key=lambda candidate: candidate[0])
    return name, blocks


def linears(block: nn.Module) -> dict[str, nn.Linear]:
    """Every `nn.Linear` inside a block by its name there, in the module's order."""
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


@torch.no_grad()
def record_calls(model: nn.Module, blocks: nn.ModuleList, input_ids: Tensor) -> BlockCalls:
    """What every block is called with for `input_ids` `(B, M)`, at the cost of the embedding and one block.

    Blocks are passed over by handing their input on, so that arguments that differ between blocks (masks, rotary
    tables) are recorded for each, and the model is left after the last one.
    """
    recorder = _Recorder(len(blocks))
    with _replaced_forwards(blocks, recorder), suppress(_AllBlocksSeen):
        model(input_ids=input_ids, use_cache=False)
    if recorder.hidden is None or len(recorder.arguments) != len(blocks):
        raise UnsupportedModelError(
            f"{type(model).__name__}: its forward ran {len(recorder.arguments)} of its {len(blocks)} decoder blocks, "
            "each of which must run once"
        )
    return BlockCalls(recorder.hidden.cpu(), recorder.arguments)


def run_block(block: nn.Module, hidden: Tensor, arguments: Arguments) -> Tensor:
    """The hidden states `(B, M, I)` that a block returns."""
    args, kwargs = arguments
    output = block(hidden, *args, **kwargs)
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def linear_inputs(block: nn.Module, names: list[str]) -> Iterator[dict[str, list[Tensor]]]:
    """While open, each run of the named linears appends its input to the yielded lists."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = [
        block.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0]))
        for name in names
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


class _AllBlocksSeen(Exception):
    """Leaves the model's forward after its last block."""


class _Recorder:
    """Stands in for the blocks' forwards; keeps the first input and every block's other arguments."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self.hidden: Tensor | None = None
        self.arguments: list[Arguments] = []
        self._returns_tuple = False

    def __call__(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if args:
            hidden, args = args[0], args[1:]
        else:
            hidden = kwargs.pop("hidden_states")
        if self.hidden is None:
            self.hidden = hidden
            self._returns_tuple = isinstance(original(hidden, *args, **kwargs), tuple)
        self.arguments.append((args, kwargs))
        if len(self.arguments) == self.blocks:
            raise _AllBlocksSeen
        return (hidden,) if self._returns_tuple else hidden


@contextmanager
def _replaced_forwards(blocks: nn.ModuleList, recorder: _Recorder) -> Iterator[None]:
    own = [block.__dict__.get("forward") for block in blocks]
    for block in blocks:
        block.forward = partial(recorder, block.forward)
    try:
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            if forward is None:
                del block.forward
            else:
                block.forward = forward
