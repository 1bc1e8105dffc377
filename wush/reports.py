"""What a walk through a model reports, block by block, and how it keeps finished blocks."""

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from wush.lost import Lost

# Bits of a weight that is not quantized, whatever dtype the model was loaded in.
WHOLE = 16


@dataclass(frozen=True)
class LayerReport:
    """One quantized linear: its name within the block, the linears it shared its input with, and its storage.

    A transform that linears share is counted once, each linear having its part of it by its number of weights.
    `lost`: what the format's window lost of its inputs on the calibration tokens, if anything, and `weight_lost` of
    its weight.
    """

    name: str
    shared_input: tuple[str, ...]
    bits_per_weight: float
    weights: int
    lost: Lost | None = None
    weight_lost: Lost | None = None


@dataclass(frozen=True)
class BlockReport:
    """One decoder block: mean squared output error against the original block, absolute and relative.

    It is that on the calibration tokens; `wush.measure` measures it on others.
    """

    index: int
    name: str
    mse: float
    relative_mse: float
    seconds: float
    layers: tuple[LayerReport, ...]


@dataclass
class QuantizationReport:
    """What `quantize` did, block by block; `skipped` are what was left as it was, with the reason.

    `weights`: how many numbers all weights of the decoder blocks have, two-dimensional ones and stacks of experts.
    """

    blocks: list[BlockReport] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    weights: int = 0

    @property
    def bits_per_weight(self) -> float:
        """Average over the decoder blocks' weights: codes, scales and transforms counted, 16 for one left whole."""
        stored = sum(layer.bits_per_weight * layer.weights for layer in self._layers)
        return (stored + WHOLE * (self.weights - self._quantized)) / self.weights

    @property
    def quantized_share(self) -> float:
        """The share of the decoder blocks' weights that is quantized."""
        return self._quantized / self.weights

    @property
    def _layers(self) -> list[LayerReport]:
        return [layer for block in self.blocks for layer in block.layers]

    @property
    def _quantized(self) -> int:
        return sum(layer.weights for layer in self._layers)

    @property
    def lost(self) -> dict[str, Lost]:
        """Of the layers, by full name, that lost groups of their inputs on the calibration tokens."""
        return {f"{block.name}.{one.name}": one.lost for block in self.blocks for one in block.layers if one.lost}

    @property
    def weight_lost(self) -> dict[str, Lost]:
        """Of the layers, by full name, that lost groups of their weights."""
        return {
            f"{block.name}.{one.name}": one.weight_lost
            for block in self.blocks
            for one in block.layers
            if one.weight_lost
        }


class SavedBlocks(Protocol):
    """Keeps quantized decoder blocks, so that an interrupted walk goes on where it was.

    A block's tensors are the state dicts of its `QuantLinear`s, under their names within the block.
    """

    def load(self, index: int) -> tuple[BlockReport, dict[str, Tensor]] | None:
        """A block as it was saved, tensors on the CPU; None when it was not."""

    def save(self, report: BlockReport, tensors: dict[str, Tensor]) -> None:
        """Keep a block that is done."""
