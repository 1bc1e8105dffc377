"""How far a quantized model is from its original, block by block and linear by linear, on windows of any text.

A measurement is a function of the two models and the windows: it changes neither and is no part of what makes one.
Shape legend: `W` windows, `B` windows in a batch, `M` tokens, `I` input features.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from wush.calls import input_of
from wush.decoder import BlockCalls, find_blocks, known_route, record_calls, run_block
from wush.errors import NumericError
from wush.linear import QuantLinear
from wush.losses import LayerLoss, share, theory
from wush.modes import evaluation_mode
from wush.moments import SecondMoment
from wush.progress import Progress, Silent
from wush.texts import batches


@dataclass(frozen=True)
class BlockError:
    """Mean squared output error of a decoder block against the original block, and relative to its output power."""

    mse: float
    relative: float


@dataclass(frozen=True)
class Measured:
    """A decoder block with quantized linears: its error, and by name the losses of its linears where asked for."""

    index: int
    name: str
    error: BlockError
    losses: dict[str, LayerLoss]


@torch.no_grad()
def measure(
    original: nn.Module,
    quantized: nn.Module,
    windows: Tensor,
    *,
    layer_losses: bool = False,
    batch_size: int = 4,
    progress: Progress | None = None,
) -> list[Measured]:
    """The errors of the decoder blocks that have quantized linears, on token ids `(W, M)` filled with `wush.texts.PAD`.

    Both blocks of a pair get the quantized model's hidden states. `layer_losses`: also what each quantized linear costs
    for the inputs that it has in the original block; a linear that no token reaches has none, and theory is by the
    moments of these tokens. The original may be on another device: one block at a time comes over. The windows do not
    go beyond the last quantized block. Raises `ValueError` for two models that are no such pair, `NumericError` for an
    error that is not finite.
    """
    progress = progress or Silent()
    if any(isinstance(module, QuantLinear) for module in original.modules()):
        raise ValueError("measure: the original is quantized; load it again")
    name, blocks = find_blocks(original)
    others = quantized.get_submodule(name) if name in dict(quantized.named_modules()) else nn.ModuleList()
    assert isinstance(others, nn.ModuleList)
    chosen = _quantized_blocks(blocks, others)
    if not len(windows):
        raise ValueError("no windows to measure on; pass token ids (W, M)")
    with evaluation_mode(original), evaluation_mode(quantized):
        device = _device(others)
        ids = [batch.ids.to(device) for batch in batches(windows, batch_size)]
        route = known_route(quantized, others, ids[0])
        calls = [record_calls(quantized, others, batch, route) for batch in ids]
        found = []
        for index in progress.track(range(chosen[-1] + 1), "measured decoder blocks", chosen[-1] + 1):
            if index in chosen:
                pair = _Pair(f"{name}.{index}", index, blocks[index], others[index])
                found.append(pair.measured(calls, layer_losses))
            else:
                for call in calls:
                    call.hidden = run_block(others[index], call.hidden.to(device), call.arguments[index]).cpu()
    return found


def _quantized_blocks(blocks: nn.ModuleList, others: nn.ModuleList) -> list[int]:
    """The blocks of the quantized model that have quantized linears; raises `ValueError` for no such pair."""
    chosen = [i for i, block in enumerate(others) if any(isinstance(module, QuantLinear) for module in block.modules())]
    if len(others) != len(blocks) or not chosen:
        raise ValueError(
            "measure: the second model is not the quantized first one; quantize a copy of it with wush.quantize"
        )
    return chosen


@dataclass(frozen=True)
class _Pair:
    """A decoder block of the original, and the quantized one in its place."""

    name: str
    index: int
    original: nn.Module
    quantized: nn.Module

    def measured(self, calls: list[BlockCalls], layer_losses: bool) -> Measured:
        """The pair's errors on all calls, whose hidden states become the quantized block's outputs."""
        device = _device(self.quantized)
        squares = torch.zeros(2, dtype=torch.float64, device=device)
        outputs = 0
        with _lent(self.original, device), self._compared(layer_losses) as compared:
            for call in calls:
                hidden, arguments = call.hidden.to(device), call.arguments[self.index]
                exact = run_block(self.original, hidden, arguments).double()
                output = run_block(self.quantized, hidden, arguments)
                squares += torch.stack([(output.double() - exact).square().sum(), exact.square().sum()])
                outputs += exact.numel()
                call.hidden = output.cpu()
        error, power = squares.tolist()
        _check_finite(error, self.name)
        losses = {name: layer.loss() for name, layer in compared.items() if layer.outputs}
        return Measured(self.index, self.name, BlockError(error / outputs, share(error, power)), losses)

    @contextmanager
    def _compared(self, wanted: bool) -> Iterator[dict[str, "_Compared"]]:
        """While open, each quantized linear gets what its original gets, and is compared with it, if `wanted`."""
        layers = {name: layer for name, layer in self.quantized.named_modules() if isinstance(layer, QuantLinear)}
        compared = {
            name: _Compared(f"{self.name}.{name}", self.original.get_submodule(name), layer)
            for name, layer in layers.items()
            if wanted
        }
        handles = [
            one.original.register_forward_hook(
                lambda _, args, kwargs, output, one=one: one.add(input_of(args, kwargs), output), with_kwargs=True
            )
            for one in compared.values()
        ]
        try:
            yield compared
        finally:
            for handle in handles:
                handle.remove()


@dataclass
class _Compared:
    """A linear and its quantized one: their squared differences, the squared exact outputs, the inputs' moment."""

    name: str
    original: nn.Module
    layer: QuantLinear
    outputs: int = 0
    squares: Tensor = field(init=False)
    moment: SecondMoment = field(init=False)

    def __post_init__(self) -> None:
        device, size = self.layer.packed_weight.device, self.layer.format.group_size
        self.squares = torch.zeros(2, dtype=torch.float64, device=device)
        self.moment = SecondMoment(self.layer.in_features, device, self.name, size)

    def add(self, x: Tensor, exact: Tensor) -> None:
        if not x.numel():
            return  # an expert that no token of the batch goes to
        bias = self.layer.bias
        product = exact.float() if bias is None else exact.float() - bias.float()  # W x alone, whose power counts
        pair = (self.layer(x).float() - exact.float(), product)
        self.squares += torch.stack([values.square().sum(dtype=torch.float64) for values in pair])
        self.outputs += exact.numel()
        self.moment.add(x)

    def loss(self) -> LayerLoss:
        weight, transform = self.original.weight, self.layer.transform
        assert isinstance(weight, Tensor)
        moments = self.moment.diagonal_blocks(self.layer.format.group_size)
        expected = theory(weight.to(moments.device), transform, moments, self.name)
        error, power, *predicted = torch.cat([self.squares, expected]).tolist()
        _check_finite(error, self.name)
        return LayerLoss(error / self.outputs, share(error, power), *predicted)


def _check_finite(error: float, name: str) -> None:
    if not error < float("inf"):
        raise NumericError(f"{name}: its output on the measured tokens is not finite")


def _device(module: nn.Module) -> torch.device:
    return next(itertools.chain(module.parameters(), module.buffers())).device


@contextmanager
def _lent(block: nn.Module, device: torch.device) -> Iterator[None]:
    """While open, a block is on the device."""
    home = _device(block)
    block.to(device)
    try:
        yield
    finally:
        block.to(home)
