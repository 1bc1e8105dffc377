"""Layers that share their input and its transform, run as one: one quantization and one matmul for all of them.

The layers stay modules of their own, which a model calls one after the other with the same tensor. The first call
computes the product of all, and each takes its columns of it once.
"""

import logging
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wush.backends import linear
from wush.linear import QuantLinear
from wush.operands import Weight, bits_of

log = logging.getLogger(__name__)


def join(block: nn.Module, names: Sequence[str]) -> None:
    """Run the `QuantLinear`s of these names in a block, all fed by the same tensor, as one from now on.

    Their codes, scales and biases become rows of joint tensors, and of equal transforms one is kept, so that no memory
    is added. Layers of different formats, sizes, devices, transforms or global scales are left as they are;
    `wush.backends.chosen` tells why. Values change by the order of sums only.
    """
    layers = [block.get_submodule(name) for name in names]
    members = [layer for layer in layers if isinstance(layer, QuantLinear)]
    if len(members) != len(layers):
        raise TypeError(f"{', '.join(names)}: only QuantLinear layers can be joined; quantize them first")
    if any(layer.joint is not None for layer in members):
        raise ValueError(f"{', '.join(names)}: joined already")
    reason = _why_not(members)
    for layer in members:
        layer.not_joined = reason
    if reason:
        log.info("%s: not joined: %s", ", ".join(layer.name for layer in members), reason)
    elif len(members) > 1:
        Joint(members)


def _why_not(layers: Sequence[QuantLinear]) -> str:
    """Why layers cannot run as one; empty when they can."""
    first = layers[0]
    for what in ("format", "in_features", "global_scale", "input_scale"):
        if any(getattr(layer, what) != getattr(first, what) for layer in layers):
            return f"their {what.replace('_', ' ')} differs"
    if any(layer.packed_weight.device != first.packed_weight.device for layer in layers):
        return "their device differs"
    return "" if all(_same(layer.transform, first.transform) for layer in layers) else "their transform differs"


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    if a is b or a.is_meta:
        return a is b or (b.is_meta and a.shape == b.shape)
    return a.device == b.device and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


@dataclass
class _Output:
    """The product of all members for one input; `waiting` have not taken theirs."""

    input: "weakref.ref[Tensor]"
    version: int
    run: tuple[int, bool]
    product: Tensor
    waiting: set[int]

    def serves(self, x: Tensor, index: int, run: tuple[int, bool]) -> bool:
        """Whether it is the product for x as it is now, on this stream, and a member has not taken it."""
        return self.input() is x and self.version == x._version and self.run == run and index in self.waiting


class Joint(nn.Module):
    """The joint tensors of some layers, and their last product. It is no module's child, and in no state dict.

    No result is stale: a product is used for the very tensor that it was made of, unchanged since, and once by each
    layer. Where a change cannot be seen, in inference mode, every layer computes on its own. What compiled code cannot
    see is a change of the input in place between members' calls that a graph break parts.
    """

    packed: Tensor
    scales: Tensor
    transform: Tensor | None
    bias: Tensor | None
    _last: _Output | None
    _traced_input: Tensor | None  # what `_last` is, while `torch.compile` traces, which follows no weak references
    _traced_version: int
    _traced_product: Tensor | None
    _traced_waiting: tuple[int, ...]

    def __init__(self, members: Sequence[QuantLinear]) -> None:
        super().__init__()
        self.members = tuple(members)
        sizes = [layer.out_features for layer in members]
        stops = [sum(sizes[: n + 1]) for n in range(len(sizes))]
        self.rows = [(stop - size, stop) for size, stop in zip(sizes, stops, strict=True)]
        for name in ("packed", "scales", "transform", "bias"):
            self.register_buffer(name, None, persistent=False)
        for index, layer in enumerate(members):
            object.__setattr__(layer, "joint", self)  # and not as the layer's child
            layer.joint_index = index
        self.whole = False
        self._forget()
        self.mend()

    @property
    def weight(self) -> Weight:
        """The weight of all members, one below the other."""
        first = self.members[0]
        return Weight(
            first.format, self.packed, self.scales, first.global_scale, first.input_scale, self.transform, self.bias
        )

    def mend(self) -> None:
        """Join the members' tensors anew if they were replaced, as by a move to another device.

        While the members do not agree, since only some of them have been replaced, each computes on its own.
        """
        self._forget()
        reason = _why_not(self.members)
        for layer in self.members:
            layer.not_joined = reason
        if reason:
            self.packed = self.scales = self.transform = self.bias = None  # type: ignore[assignment]
        elif not self.whole or not all(self._holds(layer) for layer in self.members):
            self._join()
        self.whole = not reason

    def _join(self) -> None:
        layers, kind = self.members, self.members[0].scales.dtype
        self.packed = torch.cat([layer.packed_weight for layer in layers])
        self.scales = torch.cat([bits_of(layer.scales) for layer in layers]).view(kind)
        self.transform, self.bias = layers[0].transform, _joint_bias(layers)
        for layer, (start, stop) in zip(layers, self.rows, strict=True):
            layer.packed_weight, layer.scales = self.packed[start:stop], self.scales[start:stop]
            layer.transform = self.transform
            if layer.bias is not None and self.bias is not None:
                layer.bias = self.bias[start:stop]

    def _holds(self, layer: QuantLinear) -> bool:
        """Whether a member's tensors are views of the joint ones."""
        pairs = ((layer.packed_weight, self.packed), (layer.scales, self.scales), (layer.bias, self.bias))
        return layer.transform is self.transform and all(own is None or _share(own, joint) for own, joint in pairs)

    def output(self, x: Tensor, layer: QuantLinear) -> Tensor:
        """A member's result `(..., O)` for x `(..., I)`: columns of the joint product, a view of it."""
        compiling = torch.compiler.is_compiling()
        apart = not self.whole or layer.settings != self.members[0].settings
        if apart or (not compiling and x.is_inference()):
            return linear(x, layer.own, layer.settings)
        product = self._traced(x, layer.joint_index) if compiling else self._computed(x, layer.joint_index)
        start, stop = self.rows[layer.joint_index]
        return product[..., start:stop]

    def _product(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.members[0].settings)

    def _computed(self, x: Tensor, index: int) -> Tensor:
        """The joint product; kept for members that have not taken theirs, as long as x lives."""
        last, run = self._last, _run(x)
        if last is None or not last.serves(x, index, run):
            product, waiting = self._product(x), set(range(len(self.members)))
            last = self._last = _Output(weakref.ref(x, self._forget), x._version, run, product, waiting)
        last.waiting.discard(index)
        if not last.waiting:
            self._last = None
        return last.product

    def _traced(self, x: Tensor, index: int) -> Tensor:
        """`_computed` in a form that `torch.compile` traces: when it has, one operator is left for all members."""
        version = torch.ops.wush.version(x).shape[0]
        if self._traced_input is not x or self._traced_version != version or index not in self._traced_waiting:
            self._traced_input, self._traced_version = x, version
            self._traced_product, self._traced_waiting = self._product(x), tuple(range(len(self.members)))
        product = self._traced_product
        assert product is not None
        self._traced_waiting = tuple(other for other in self._traced_waiting if other != index)
        if not self._traced_waiting:
            self._traced_input = self._traced_product = None
        return product

    def _forget(self, input: "weakref.ref[Tensor] | None" = None) -> None:
        """Drop the last product, or just that of an input that is gone."""
        if input is not None and (self._last is None or self._last.input is not input):
            return
        self._last = None
        if input is None:
            self._traced_input = None
            self._traced_product = None
            self._traced_version, self._traced_waiting = 0, ()

    def __getstate__(self) -> dict[str, Any]:
        kept = {"_last": None, "_traced_input": None, "_traced_product": None, "_traced_waiting": ()}
        return self.__dict__ | kept


def _run(x: Tensor) -> tuple[int, bool]:
    """The stream that products of x run on, and whether it is captured."""
    if not x.is_cuda:
        return 0, False
    return torch.cuda.current_stream(x.device).cuda_stream, torch.cuda.is_current_stream_capturing()


def _share(a: Tensor, b: Tensor | None) -> bool:
    return b is not None and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _joint_bias(layers: Sequence[QuantLinear]) -> Tensor | None:
    """The biases one behind the other, zeros where a layer has none; None when no layer has."""
    own = [layer.bias for layer in layers if layer.bias is not None]
    if not own:
        return None
    return torch.cat([own[0].new_zeros(layer.out_features) if layer.bias is None else layer.bias for layer in layers])


@torch.library.custom_op("wush::version", mutates_args=())
def _version(x: Tensor) -> Tensor:
    """Traced, a tensor with as many elements as x has been changed in place: what `torch.compile` can branch on.

    Only its shape while tracing means something; run, it is empty.
    """
    return x.new_empty(0)


@_version.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(0 if x.is_inference() else x._version)
