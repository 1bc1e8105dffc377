"""Whether the model that is timed computes what its layers and transformers' operations say.

Two runs of a quantized model cannot be compared as they are: a last bit of bfloat16 decides codes, and the error grows
by every layer to that of the format. So each product is compared on the very input that it gets, and what lies
between products by an eager run that takes the products of the graph that is timed.
Shape legend: `B` windows in a batch, `M` tokens, `O` output features, `I` input features.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import wush
from wush.operands import PRODUCTS, Weight
from wush_kernels.bench import operands
from wush_kernels.bench.measurement import Errors, worst
from wush_kernels.bench.model import BlockForward, CallOf, run_decoder_block
from wush_kernels.bench.products import product_errors
from wush_kernels.bench.timing import Call, replayed

CHECKED_BLOCKS = 2
# Relative error of a product, as of the layers by themselves; and of what lies between two, a norm, rotary embedding,
# attention or gate, which is a few roundings to bfloat16 of 2e-3 each.
LIMIT = 1e-2

Product = Callable[..., Tensor]


@dataclass(frozen=True)
class Recorded:
    """A product `(M, O)` of an input `(M, I)` and a weight, perhaps of several layers that are joined."""

    x: Tensor
    weight: Weight
    result: Tensor


def errors(model: Any, make: Callable[[Any], CallOf], run_block: BlockForward | None) -> Errors:
    """The worst of all comparisons in the first blocks of a model: of layers, of the graph's products, between them.

    `make`: what is timed, with inputs of its own; `run_block`: how, None for transformers' own forward.
    """
    with first_blocks(model, CHECKED_BLOCKS):
        calls = make(model)
        timed = calls(run_block)
        eager = timed if run_block is None else calls(run_decoder_block)
        return worst([*_of_layers(model, eager), *_of_graph(timed, eager)])


@contextmanager
def first_blocks(model: Any, count: int) -> Iterator[None]:
    """The model as if it had just so many decoder blocks."""
    whole = model.config.num_hidden_layers
    model.config.num_hidden_layers = count
    try:
        yield
    finally:
        model.config.num_hidden_layers = whole


def _of_layers(model: Any, call: Call) -> list[Errors]:
    """Each layer of the first block in one eager run: its result against float64 of its codes on the same input."""
    found: list[Errors] = []
    block = model.model.layers[0]
    named = [(name, one) for name, one in block.named_modules() if isinstance(one, wush.QuantLinear)]

    def inspect(name: str, layer: wush.QuantLinear, inputs: tuple[Tensor], output: Tensor) -> None:
        found.append(_product_errors(name, inputs[0], layer.own, output))

    handles = [layer.register_forward_hook(partial(inspect, name)) for name, layer in named]
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    if len(found) != len(named):
        raise RuntimeError(f"{len(found)} of the {len(named)} quantized layers of a decoder block were run")
    return found


def _of_graph(timed: Call, eager: Call) -> list[Errors]:
    """The graph's products on the inputs that they get in it; and the eager run that takes them."""
    logits, recorded = replayed(partial(_recording, timed))
    products = [
        _product_errors(f"product {n} in the graph", one.x, one.weight, one.result) for n, one in enumerate(recorded)
    ]
    expected, inputs = _given(recorded, eager)
    return [*products, *inputs, _between("the logits", logits, expected)]


def _recording(call: Call) -> tuple[Tensor, list[Recorded]]:
    """A call's logits, and copies of its products and their inputs, which compiled code may overwrite."""
    recorded = []

    def record(product: Product, x: Tensor, weight: Weight, *rest: Any) -> Tensor:
        result = product(x, weight, *rest)
        recorded.append(Recorded(x.clone(), weight, result.clone()))
        return result

    with _products(record):
        logits = call()
    assert isinstance(logits, torch.Tensor)
    return logits, recorded


def _given(recorded: list[Recorded], call: Call) -> tuple[Tensor, list[Errors]]:
    """A call's logits where products are those recorded, and how far its inputs are from the recorded ones."""
    left, found = deque(recorded), list[Errors]()

    def give(product: Product, x: Tensor, weight: Weight, *rest: Any) -> Tensor:
        if not left:
            raise RuntimeError(f"more than the {len(recorded)} products of the graph are computed without one")
        own = left.popleft()
        found.append(_between(f"the input of product {len(found)}", own.x, x))
        return own.result

    with _products(give):
        logits = call()
    if left:
        raise RuntimeError(f"{len(found)} products are computed without a graph, and {len(recorded)} in it")
    assert isinstance(logits, torch.Tensor)
    return logits, found


@contextmanager
def _products(instead: Callable[..., Tensor]) -> Iterator[None]:
    """`instead(product, x, weight, ...)` for every product of `wush`."""
    with patch.dict(PRODUCTS, {name: partial(instead, product) for name, product in PRODUCTS.items()}):
        yield


def _product_errors(what: str, x: Tensor, weight: Weight, found: Tensor) -> Errors:
    rows, result = x.reshape(-1, x.shape[-1]), found.reshape(-1, found.shape[-1])
    made = product_errors(result, rows, weight.packed, weight.scales, weight.format, weight.transform, LIMIT)
    return replace(made, what=what)


def _between(what: str, found: Tensor, expected: Tensor) -> Errors:
    return replace(operands.compare(found, expected, LIMIT), what=what)
