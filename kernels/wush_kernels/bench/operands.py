"""Random operands, made on the GPU, and exact answers to compare with. Weights are random codes, nothing is fitted.

Legend: `M` tokens, `O` output features, `I` input features, `N` groups, `G` group size.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

import wush
from wush.algorithms import QuantizedWeight
from wush.formats import Format, Mxfp4, Nvfp4, Quantized
from wush.transforms import apply_blocks, hadamard
from wush_kernels.bench.measurement import Errors

DEVICE = "cuda"
FourBit = Mxfp4 | Nvfp4
FORMATS: dict[str, FourBit] = {"mxfp4": wush.MXFP4, "nvfp4": wush.NVFP4}
OTHER_FORMATS: dict[str, Format] = {"int4": wush.INT4, "mxfp8": wush.MXFP8}
CHECKED_FEATURES = 1024  # output features of a large product that are compared; every token is
# Bits of scales that make weights of about 0.02.
_SCALE_BITS = {"mxfp4": (118, 123), "nvfp4": (20, 28), "int4": (0x3B00, 0x3C00), "mxfp8": (112, 118)}
_E4M3_NAN = 0x7F


def activations(tokens: int, in_features: int) -> Tensor:
    """`(M, I)` bfloat16, Gaussian; each column with a spread of its own."""
    spread = torch.rand(in_features, device=DEVICE) * 1.5 + 0.5
    return (torch.randn(tokens, in_features, device=DEVICE) * spread).bfloat16()


def weight(out_features: int, in_features: int) -> Tensor:
    """`(O, I)` bfloat16, Gaussian."""
    return torch.randn(out_features, in_features, device=DEVICE, dtype=torch.bfloat16).mul_(0.02)


def fp8_weight(out_features: int, in_features: int) -> Tensor:
    """`(O, I)` E4M3, Gaussian."""
    return torch.randn(out_features, in_features, device=DEVICE, dtype=torch.bfloat16).to(torch.float8_e4m3fn)


def transform(fmt: Format, in_features: int, kind: str = "block") -> Tensor | None:
    """A dense matrix for each block `(N, G, G)`, one for all `(G, G)`, or None: `block`, `shared`, `none`. Bfloat16."""
    if kind == "none":
        return None
    size = fmt.group_size
    base = hadamard(size).float().to(DEVICE)
    if kind == "shared":
        return base.bfloat16()
    return (base * (torch.rand(in_features // size, 1, size, device=DEVICE) + 0.5)).bfloat16()


def quantized(fmt: Format, out_features: int, in_features: int) -> Quantized:
    """Random codes and scales of a weight `(O, I)`."""
    codes = torch.randint(0, 2**fmt.element.bits, (out_features, in_features), device=DEVICE, dtype=torch.uint8)
    if fmt.element.bits == 8:
        codes -= ((codes & _E4M3_NAN) == _E4M3_NAN).to(torch.uint8)
    low, high = _SCALE_BITS[fmt.name]
    shape = (out_features, in_features // fmt.group_size)
    bits = torch.uint8 if fmt.scale_dtype.itemsize == 1 else torch.int16
    scales = torch.randint(low, high, shape, device=DEVICE, dtype=bits).view(fmt.scale_dtype)
    return Quantized(codes, scales, fmt.global_scale)


def packed(fmt: Format, out_features: int, in_features: int) -> tuple[Tensor, Tensor]:
    """Random packed codes and scales."""
    made = quantized(fmt, out_features, in_features)
    return fmt.pack(made.codes), made.scales


def layer(fmt: FourBit, out_features: int, in_features: int, matrix: Tensor | None) -> wush.QuantLinear:
    """A layer of random codes."""
    return wush.QuantLinear(QuantizedWeight(quantized(fmt, out_features, in_features), matrix), fmt)


def packed_bytes(fmt: Format, out_features: int, in_features: int) -> int:
    """Bytes of a packed weight and its scales."""
    return math.ceil(out_features * in_features * fmt.bits_per_weight / 8)


def rounded_input(x: Tensor, fmt: Format, matrix: Tensor | None, global_scale: float | None = None) -> Tensor:
    """`Q(T x)` by plain PyTorch, float32; with another `global_scale` in place of the format's own."""
    made = fmt.quantize(x.float() if matrix is None else apply_blocks(x.float(), matrix.float()))
    return fmt.dequantize(made if global_scale is None else replace(made, global_scale=global_scale))


def values(fmt: Format, codes: Tensor, scales: Tensor, global_scale: float) -> Tensor:
    """What packed codes `(O, ...)` stand for, float32 `(O, I)`."""
    return fmt.dequantize(Quantized(fmt.unpack(codes), scales, global_scale))


def some_features(out_features: int) -> Tensor:
    """Indices of the output features that are compared: all of a small layer, else random ones and both edges."""
    if out_features <= CHECKED_FEATURES:
        return torch.arange(out_features, device=DEVICE)
    edge = torch.arange(64, device=DEVICE)
    chosen = torch.randperm(out_features, device=DEVICE)[: CHECKED_FEATURES - 128]
    return torch.cat([edge, chosen, out_features - 1 - edge]).unique()


def compare(out: Tensor, reference: Tensor, limit: float) -> Errors:
    """Of a product against its float64 reference."""
    difference = out.double() - reference.double()
    size = reference.double()
    return Errors(
        relative=(difference.norm() / size.norm()).item(),
        largest=(difference.abs().max() / size.abs().max()).item(),
        limit=limit,
    )


def mismatched(pairs: list[tuple[Tensor, Tensor]], limit: float = 0.0) -> Errors:
    """The share of elements that differ in any of the pairs: bytes of codes, or float32 values (-0 equals 0)."""
    different = sum(int((_comparable(one) != _comparable(other)).sum().item()) for one, other in pairs)
    return Errors(mismatched=different / sum(one.numel() for one, _ in pairs), limit=limit)


def _comparable(x: Tensor) -> Tensor:
    return x.view(torch.uint8) if x.itemsize == 1 else x
