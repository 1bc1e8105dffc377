"""A causal LM seen as a row of decoder blocks: finding them, their linears, and what each block is called with.

Nothing here knows a model by name: blocks are the `ModuleList` that holds most of the model's linear weights. A walk
runs each block alone, on what the one before returned; `follow` is the proof that the model's own forward does so too.
Shape legend: `B` windows in a batch, `M` tokens, `I` features.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from wush.calls import HIDDEN, Arguments, alike, exchanged, hidden_of, input_of, template
from wush.errors import UnsupportedModelError

log = logging.getLogger(__name__)

# Tokens of each of the two windows that `follow` runs: enough for every part of a block, and cheap.
FOLLOWED = 64
# How far a block run alone may be off, of its output's norm: GPU sums in no fixed order (scattered experts) differ so.
ALIKE = {torch.float32: 1e-4}
ALIKE_IN_HALF = 1e-2


@dataclass
class BlockCalls:
    """One batch on its way through the blocks: hidden states `(B, M, I)` and each block's other arguments."""

    hidden: Tensor
    arguments: list[Arguments]


@dataclass(frozen=True)
class Route:
    """How a model runs its blocks: what each returns, with `HIDDEN` in the place of the hidden states.

    None for a block that returns other tensors as well, which only running it gives.
    """

    returned: list[Any]


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The name and the `ModuleList` of the decoder blocks; raises `UnsupportedModelError` when there is none."""
    candidates = [
        (sum(linear.weight.numel() for block in module for linear in linears(block).values()), name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and all(map(_is_block, module))
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


def check_positions(config: Any, window_length: int, what: str) -> None:
    """Raise `ValueError` for windows of more tokens than a model has positions; only warn where they are rotary.

    `config`: the model's; `what`: the windows' name in the config, such as `calibration`.
    """
    of_text = getattr(config, "get_text_config", lambda **_: config)(decoder=True)
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")
    limits = [value for name in names if isinstance(value := getattr(of_text, name, None), int) and value > 0]
    if not limits or window_length <= limits[0]:
        return
    longer = f"{what}: windows of {window_length} tokens are longer than the {limits[0]} positions of the model"
    remedy = f"set {what}.window_length={limits[0]} or less"
    # Computed for any position, unlike learned tables and such as are made at loading (`rotary_dim` of GPT-J).
    computed = ("rope_parameters", "rope_scaling", "rope_theta", "rotary_emb_base", "alibi")
    if not any(getattr(of_text, name, None) for name in computed):
        raise ValueError(f"{longer}; {remedy}")
    log.warning("%s, which was not trained beyond them; %s", longer, remedy)


def check_windows(model: nn.Module, batches: Sequence[Tensor], what: str) -> None:
    """Raise `ValueError` for token ids, each `(B, M)`, that a model has no embedding or, as `check_positions`, no place
    for; `what`: the windows' name in the config.
    """
    table = getattr(model, "get_input_embeddings", lambda: None)()
    total = getattr(table, "num_embeddings", None)
    for ids in batches:
        if ids.ndim != 2 or ids.is_floating_point() or not ids.numel():
            raise ValueError(f"{what}: expected token ids (B, M), not {tuple(ids.shape)} of {ids.dtype}")
        low, high = (int(value) for value in ids.aminmax())
        if low < 0 or (total is not None and high >= total):
            known = f"are 0 to {total - 1}" if total else "start at 0"
            raise ValueError(
                f"{what}: token ids {low} to {high}, but the model's embeddings {known}; use the model's own tokenizer"
            )
    config = getattr(model, "config", None)
    if config is not None:
        check_positions(config, max(ids.shape[1] for ids in batches), what)


@torch.no_grad()
def follow(model: nn.Module, blocks: nn.ModuleList, input_ids: Tensor) -> Route:
    """How a model runs its blocks, found on two short windows made of `input_ids` `(B, M)`.

    Raises `UnsupportedModelError` unless the forward runs each block once and in order, on what the one before
    returned, with arguments that do not depend on the blocks' work, and each block alone returns the same again.
    """
    first = input_ids[:1, :FOLLOWED]
    second = first.flip(1)
    second[:, ::2] = first[:, :1]  # other tokens, too: else means over tokens were those of the first window
    runs = [_observed(model, blocks, ids) for ids in (first, second)]
    route = Route(runs[0].returned)
    for run, ids in zip(runs, (first, second), strict=True):
        recorded = record_calls(model, blocks, ids, route)
        if not alike(run.hidden.cpu(), recorded.hidden):
            raise _unfollowed(model, "a hook changes what decoder block 0 is fed")
        for index, (own, other) in enumerate(zip(run.arguments, recorded.arguments, strict=True)):
            if own.hidden != other.hidden or not alike((own.args, own.kwargs), (other.args, other.kwargs)):
                raise _unfollowed(model, f"decoder block {index} is called with what other blocks compute")
    # In the walk's order, block by block: what a block keeps for the next one is then of another window.
    for index, block in enumerate(blocks):
        for run in runs:
            hidden = run.outputs[index - 1] if index else run.hidden
            _check_alone(model, index, run_block(block, hidden, run.arguments[index]), run.outputs[index])
    return route


@torch.no_grad()
def known_route(model: nn.Module, blocks: nn.ModuleList, input_ids: Tensor) -> Route:
    """How a model whose original was followed runs its blocks, by one run of a short window; errors as of `follow`."""
    return Route(_observed(model, blocks, input_ids[:1, :FOLLOWED]).returned)


@torch.no_grad()
def record_calls(model: nn.Module, blocks: nn.ModuleList, input_ids: Tensor, route: Route | None = None) -> BlockCalls:
    """What every block is called with for `input_ids` `(B, M)`, at the cost of the embedding.

    Blocks are passed over by handing their input on, so that arguments that differ between blocks (masks, rotary
    tables) are recorded for each, and the model is left at its LM head. `route`: from `follow`, which is asked for it
    when it is missing.
    """
    recorder = _Recorder(model, blocks, route or follow(model, blocks, input_ids))
    with _replaced_forwards(blocks, recorder), _left_at_head(model, recorder), suppress(_AllBlocksSeen):
        model(input_ids=input_ids, use_cache=False)
    if recorder.hidden is None or len(recorder.arguments) != len(blocks):
        raise _not_once(model, len(recorder.arguments), len(blocks))
    return BlockCalls(recorder.hidden.cpu(), recorder.arguments)


def run_block(block: nn.Module, hidden: Tensor, arguments: Arguments) -> Tensor:
    """The hidden states `(B, M, I)` that a block returns; `hidden` stays as it is."""
    return hidden_of(arguments.call(block, hidden.clone()), hidden)


@contextmanager
def linear_inputs(block: nn.Module, names: list[str]) -> Iterator[dict[str, list[Tensor]]]:
    """While open, each run of the named linears appends its input to the yielded lists.

    Raises `UnsupportedModelError` on closing for an input that the block has overwritten since.
    """
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    versions: list[tuple[str, Tensor, int]] = []

    def keep(name: str, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        x = input_of(args, kwargs)
        seen[name].append(x)
        if not x.is_inference():
            versions.append((name, x, x._version))

    handles = [
        block.get_submodule(name).register_forward_pre_hook(
            lambda _, args, kwargs, name=name: keep(name, args, kwargs), with_kwargs=True
        )
        for name in names
    ]
    try:
        yield seen
        for name, x, version in versions:
            if x._version != version:
                raise UnsupportedModelError(f"{name}: its input is overwritten in place before the block is done")
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def calls_of(block: nn.Module, names: list[str]) -> Iterator[set[str]]:
    """While open, the names of the submodules that have run are added to the yielded set."""
    ran: set[str] = set()
    handles = [
        block.get_submodule(name).register_forward_pre_hook(lambda _, __, name=name: ran.add(name)) for name in names
    ]
    try:
        yield ran
    finally:
        for handle in handles:
            handle.remove()


def _is_block(module: nn.Module) -> bool:
    return not isinstance(module, nn.Linear) and bool(linears(module))


@dataclass
class _Run:
    """A model's own forward on one window: the blocks' arguments, and their hidden states as they were then."""

    hidden: Tensor = field(init=False)
    arguments: list[Arguments] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    returned: list[Any] = field(default_factory=list)


def _observed(model: nn.Module, blocks: nn.ModuleList, input_ids: Tensor) -> _Run:
    """The model's own forward for `input_ids` `(1, M)`; refused unless its blocks form a row."""
    run = _Run()

    def before(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        _check_turn(model, index, len(run.arguments), len(blocks))
        hidden, arguments = Arguments.split(args, kwargs)
        if not index:
            run.hidden = hidden.clone()
        elif not alike(hidden, run.outputs[-1]):
            raise _unfollowed(
                model, f"decoder block {index} is not fed what block {index - 1} returns, but something made of it"
            )
        run.arguments.append(arguments)

    def after(index: int, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        hidden = hidden_of(output, Arguments.split(args, kwargs)[0])
        run.returned.append(template(output, hidden))
        run.outputs.append(hidden.clone())

    handles = []
    for index, block in enumerate(blocks):
        handles += [
            block.register_forward_pre_hook(
                lambda _, args, kwargs, index=index: before(index, args, kwargs), prepend=True, with_kwargs=True
            ),
            block.register_forward_hook(
                lambda _, args, kwargs, output, index=index: after(index, args, kwargs, output), with_kwargs=True
            ),
        ]
    try:
        model(input_ids=input_ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    if len(run.arguments) != len(blocks):
        raise _not_once(model, len(run.arguments), len(blocks))
    return run


def _check_turn(model: nn.Module, index: int, done: int, blocks: int) -> None:
    """Refuse a block that runs out of turn."""
    if index < done:
        raise _unfollowed(model, f"decoder block {index} runs again after {done} of {blocks} blocks have run (a loop)")
    if index > done:
        raise _unfollowed(model, f"decoder block {index} runs where block {done} is due")


def _check_alone(model: nn.Module, index: int, alone: Tensor, within: Tensor) -> None:
    exact = within.double()
    # Both NaN where the model is damaged, which is told by name later.
    error = (alone.double() - exact).nan_to_num().norm()
    if alone.shape != within.shape or error > ALIKE.get(within.dtype, ALIKE_IN_HALF) * exact.nan_to_num().norm():
        raise _unfollowed(
            model,
            f"decoder block {index}, run alone, does not return what it returns within the model: it keeps a state, "
            "uses another block's, or is random",
        )


def _unfollowed(model: nn.Module, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{type(model).__name__}: {what}; its blocks cannot be calibrated one by one, which needs each of them to run "
        "once, in order, on what the one before returns"
    )


def _not_once(model: nn.Module, ran: int, blocks: int) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{type(model).__name__}: its forward ran {ran} of its {blocks} decoder blocks, each of which must run once"
    )


class _AllBlocksSeen(Exception):
    """Leaves the model's forward after its last block."""


class _Recorder:
    """Stands in for the blocks' forwards; keeps the first input and every block's other arguments."""

    def __init__(self, model: nn.Module, blocks: nn.ModuleList, route: Route) -> None:
        self.model, self.blocks, self.route = model, len(blocks), route
        self.hidden: Tensor | None = None
        self.arguments: list[Arguments] = []

    def __call__(self, original: Callable[..., Any], index: int, *args: Any, **kwargs: Any) -> Any:
        _check_turn(self.model, index, len(self.arguments), self.blocks)
        hidden, arguments = Arguments.split(args, kwargs)
        if self.hidden is None:
            self.hidden = hidden.clone()
        self.arguments.append(arguments)
        returned = self.route.returned[index]
        if returned is not None:
            return exchanged(returned, HIDDEN, hidden)
        kept = hidden.clone()
        output = original(*args, **kwargs)
        return exchanged(output, hidden_of(output, kept), kept)

    @property
    def done(self) -> bool:
        return len(self.arguments) == self.blocks


@contextmanager
def _left_at_head(model: nn.Module, recorder: _Recorder) -> Iterator[None]:
    """While open, the model's LM head, once every block has had its turn, ends the forward."""
    head = getattr(model, "get_output_embeddings", lambda: None)()

    def leave(*_: Any) -> None:
        if recorder.done:
            raise _AllBlocksSeen

    handle = head.register_forward_pre_hook(leave, prepend=True) if isinstance(head, nn.Module) else None
    try:
        yield
    finally:
        if handle:
            handle.remove()


@contextmanager
def _replaced_forwards(blocks: nn.ModuleList, recorder: _Recorder) -> Iterator[None]:
    own = [block.__dict__.get("forward") for block in blocks]
    for index, block in enumerate(blocks):
        block.forward = partial(recorder, block.forward, index)
    try:
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            if forward is None:
                del block.forward
            else:
                block.forward = forward
