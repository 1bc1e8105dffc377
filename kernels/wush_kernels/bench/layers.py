"""Whole layers, transform + quantize + matmul through `QuantLinear`, against cuBLAS at the same shape.

Every layer has a dense transform for each block, as WUSH fits them; the contender `HADAMARD` is the same layer with
one matrix for all blocks, timed in turns with it, so that their difference is not that of two runs. Linears that share
their input are measured joined and apart. BF16 is `nn.Linear`'s product; FP8 is `torch._scaled_mm` alone, its operands
FP8 beforehand.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property

from torch import Tensor, nn

import wush
from wush.backends import planned, use_kernels
from wush_kernels.bench import operands
from wush_kernels.bench.cases import Baselines, Case, Prepared, each, inputs_for
from wush_kernels.bench.measurement import HADAMARD, OURS, Errors, Rate, Work, worst
from wush_kernels.bench.operands import FORMATS, FourBit
from wush_kernels.bench.products import product_errors
from wush_kernels.bench.shapes import TOKENS, LayerShape, layer_shapes
from wush_kernels.bench.timing import Effort

QUICK_TOKENS = (1, 64, 1024)
LIMIT = 1e-2  # relative error in bfloat16; a code that a tie decides otherwise moves a result by more than rounding
NOT_KEPT = "mxfp4, no copies"  # the memory-saving mode, where products need copies of the weight
NOT_KEPT_FOR, NOT_KEPT_TOKENS = "llama3_1_8b gate+up", (1024, 4096)
RATES: dict[str, Rate] = {"mxfp4": "fp8", "nvfp4": "bf16"}  # the tensor cores that hold its values exactly


def cases(models: Sequence[str], effort: Effort, quick: bool) -> Iterator[Case]:
    """Both formats of every different linear of the models, at every number of tokens; one without kept copies."""
    shapes = layer_shapes(models)
    for shape in shapes[:2] if quick else shapes:
        baselines = Baselines(shape.out_features, shape.in_features, effort)
        for fmt in FORMATS.values():
            layers = Layers(fmt, shape, effort)
            for tokens in QUICK_TOKENS if quick else TOKENS:
                yield _case(layers, tokens, baselines)
        if NOT_KEPT_FOR in shape.used_by and not quick:
            layers = Layers(FORMATS["mxfp4"], shape, effort, keep=False)
            for tokens in NOT_KEPT_TOKENS:
                yield replace(_case(layers, tokens, baselines), variant=NOT_KEPT)


class Layers:
    """Copies of one layer with random weights; `keep`: whether they keep what products need of a whole weight."""

    def __init__(self, fmt: FourBit, shape: LayerShape, effort: Effort, keep: bool = True) -> None:
        self.format, self.shape, self.effort, self.keep = fmt, shape, effort, keep
        self.weight_bytes = operands.packed_bytes(fmt, shape.out_features, shape.in_features)

    @cached_property
    def copies(self) -> list[wush.QuantLinear]:
        """With a transform for each block; enough not to fit the cache, on the kernels chosen for this device."""
        return self._made("block")

    @cached_property
    def hadamard(self) -> list[wush.QuantLinear]:
        """As many, with one Hadamard matrix for all blocks."""
        return self._made("shared")

    def errors(self, tokens: int) -> Errors:
        """The worse of one of each on fresh inputs, against float64 of the reference's codes, at some features."""
        return worst(self._errors(*one, tokens) for one in (("WUSH", self.copies[0]), ("Hadamard", self.hadamard[0])))

    def work(self, tokens: int) -> Work:
        """Packed weights, scales and transforms, the input and the output in bfloat16, each moved once."""
        sizes = self.shape
        transforms = 2 * sizes.in_features * self.format.group_size
        moved = self.weight_bytes + transforms + 2 * tokens * (sizes.in_features + sizes.out_features)
        return Work(moved, 2.0 * tokens * sizes.weights, RATES[self.format.name])

    def _made(self, kind: str) -> list[wush.QuantLinear]:
        count, sizes = self.effort.copies(self.weight_bytes), (self.shape.out_features, self.shape.in_features)
        matrix = operands.transform(self.format, self.shape.in_features, kind)
        layers = nn.ModuleList(operands.layer(self.format, *sizes, matrix) for _ in range(count))
        use_kernels(layers, "auto", self.keep)
        return list(layers)

    def _errors(self, what: str, layer: wush.QuantLinear, tokens: int) -> Errors:
        x = operands.activations(tokens, self.shape.in_features)
        found = product_errors(layer(x), x, layer.packed_weight, layer.scales, self.format, layer.transform, LIMIT)
        return replace(found, what=f"the layer with {what}")


def _case(layers: Layers, tokens: int, baselines: Baselines) -> Case:
    def prepare() -> Prepared:
        inputs = inputs_for(len(layers.copies), tokens, layers.shape.in_features, layers.effort)
        calls = {OURS: each(_forward, inputs, layers.copies), HADAMARD: each(_forward, inputs, layers.hadamard)}
        return Prepared(
            {**calls, **baselines.contenders(inputs)}, lambda: layers.errors(tokens), path(layers.copies[0], tokens)
        )

    shape = layers.shape
    return Case(
        "layer", layers.format.name, tokens, shape.out_features, shape.in_features, layers.work(tokens), prepare,
        shape.used_by,
    )  # fmt: skip


def _forward(x: Tensor, layer: wush.QuantLinear) -> Tensor:
    return layer(x)


def path(layer: wush.QuantLinear, tokens: int) -> str:
    """What the dispatch chooses for so many tokens: how the input is quantized, and the product."""
    choice = planned(layer, tokens)
    return f"{choice.quantize} + {choice.matmul}"
