"""Number formats: groups of elements along the last dimension that share a scale (method: number formats).

A value is `element * scale * global_scale`. Shape legend: `I` columns, `N` groups, `G` group size, `N * G = I`.
To add a format, subclass `Format`: name its element and its scale type, and say how a group's scale is found.

The arithmetic is such that a CPU, a GPU and the kernels of `wush_kernels` give the same bits: float32 products in a
fixed order, each rounded, and one division a group.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from wush.elements import E2M1, E2M1_MAX, E4M3, E4M3_MAX, INT4_MIDPOINT, INT4_SYMMETRIC, Element
from wush.errors import NumericError

FLOAT32_MAX = torch.finfo(torch.float32).max
# E4M3 scales are at least 2^-9: up to this 1/g, `1/g / s` is a float32 number.
MOST_INVERSE_G = 2.0**118
# The clip, in standard deviations, that minimizes the 4-bit squared error of a Gaussian.
GAUSSIAN_CLIP_4BIT = 2.513930578568423
# Inputs of the quantized model, and of other texts, go beyond those of calibration. It costs range below, no precision.
INPUT_MARGIN = 1.25


@dataclass(frozen=True)
class Quantized:
    """Codes `(..., I)` uint8, one an element; scales `(..., N)` in the format's scale type; one global scale."""

    codes: Tensor
    scales: Tensor
    global_scale: float


@dataclass(frozen=True)
class Format(ABC):
    """A number format: `quantize` and `dequantize` tensors `(..., I)`, `pack` and `unpack` their codes.

    `scale_rule`: how a group's scale is found, where a format has several ways.
    """

    scale_rule: str = ""
    name: ClassVar[str]
    group_size: ClassVar[int]
    scale_dtype: ClassVar[torch.dtype]

    @property
    @abstractmethod
    def element(self) -> Element:
        """The element type."""

    @property
    def global_scale(self) -> float:
        """The factor `g` shared by every group of a tensor."""
        return 1.0

    def weight_global_scale(self, weight: Tensor) -> float:
        """The factor `g` of one weight; the format's own unless the scale rule calibrates it."""
        return self.global_scale

    @property
    def calibrates_inputs(self) -> bool:
        """Whether the factor `g` of a layer's inputs is found in calibration, by `input_global_scale`."""
        return False

    def input_global_scale(self, peak: float) -> float:
        """The factor `g` of inputs whose largest magnitude in calibration is `peak`; the format's own otherwise."""
        return self.global_scale

    def window(self, global_scale: float) -> tuple[float, float] | None:
        """The largest magnitude of a group that becomes zero, and the largest number; None for no window to count.

        It counts where the scales of groups, with one `g` for all, reach less far than activations do.
        """
        return None

    @property
    def window_remedy(self) -> str:
        """What to do about values outside the `window`."""
        return "choose a format with a wider window"

    @abstractmethod
    def group_scales(self, x_ng: Tensor, amax_n: Tensor, global_scale: float) -> Tensor:
        """Scales `(..., N)` in `scale_dtype` of finite float32 groups `(..., N, G)`; `amax_n`: their magnitudes."""

    @property
    def bits_per_weight(self) -> float:
        """Storage of one weight in bits, its share of the group's scale included."""
        return self.element.bits + 8 * self.scale_dtype.itemsize / self.group_size

    def groups(self, x: Tensor, what: str = "tensor") -> Tensor:
        """Cut `(..., I)` into float32 groups `(..., N, G)`; raises `ValueError` unless G divides I."""
        check_groups(x.shape[-1], self, what)
        return x.float().unflatten(-1, (-1, self.group_size))

    def find_scales(
        self, x: Tensor, what: str = "tensor", global_scale: float | None = None, *, checked: bool = True
    ) -> Tensor:
        """Scales `(..., N)` of `(..., I)`; raises `NumericError` that names `what` for NaN or infinity.

        Not `checked`, a group with such a value gets a NaN for its scale, and the device is not waited for.
        """
        x_ng = self.groups(x, what)
        amax_n = x_ng.abs().amax(-1)
        if checked and not amax_n.isfinite().all():
            raise NumericError(f"{what}: NaN or infinity in the values to quantize to {self.name}")
        scales = self.group_scales(x_ng, amax_n, self.global_scale if global_scale is None else global_scale)
        return scales if checked else _nan_where(~amax_n.isfinite(), scales)

    def snap(self, x_ng: Tensor, scales: Tensor, global_scale: float) -> Tensor:
        """Nearest elements, float32, of groups `(..., N, G)` with scales `(..., N)`, by their `units`."""
        return self.element.snap(self.units(x_ng, scales.float().unsqueeze(-1), global_scale))

    def units(self, x_ng: Tensor, scales: Tensor, global_scale: float) -> Tensor:
        """`(x * 1/g) * 1/s` of groups `(..., N, G)` with float32 scales `(..., N, 1)`, each product rounded.

        Where s = 0 it is 0. `1/s` is limited to float32's largest number, and `x / g` past it saturates. What is in
        exact arithmetic between two elements goes to the even one where `1/g` and `1/s` are float32 numbers, as those
        of the MX formats are. Otherwise the rounded product decides: one code of the two is as near as the other.
        """
        inverse_s = (1 / scales).clamp_(max=FLOAT32_MAX).masked_fill_(scales == 0, 0)
        inverse_g = torch.full_like(scales, 1 / global_scale).masked_fill_(scales == 0, 0)  # never inf * 0
        return (x_ng * inverse_g).mul_(inverse_s)

    def expand(self, elements_ng: Tensor, scales: Tensor, global_scale: float) -> Tensor:
        """Values `(..., N, G)` of elements: `element * s * g`, float32."""
        return elements_ng * (scales.float() * global_scale).unsqueeze(-1)

    def quantize(
        self, x: Tensor, what: str = "tensor", global_scale: float | None = None, *, checked: bool = True
    ) -> Quantized:
        """Round `(..., I)` to nearest. Errors (`NumericError`, `ValueError`) name `what`.

        Not `checked`, NaN and infinity are no error: every value of their group comes back as NaN.
        """
        g = self.global_scale if global_scale is None else global_scale
        scales = self.find_scales(x, what, g, checked=checked)
        elements = self.snap(self.groups(x, what), scales, g)
        return Quantized(self.element.to_codes(elements).flatten(-2), scales, g)

    def dequantize(self, quantized: Quantized) -> Tensor:
        """Float32 values `(..., I)`."""
        elements = self.groups(self.element.from_codes(quantized.codes))
        return self.expand(elements, quantized.scales, quantized.global_scale).flatten(-2)

    def round_trip(
        self, x: Tensor, what: str = "tensor", global_scale: float | None = None, *, checked: bool = True
    ) -> Tensor:
        """`dequantize(quantize(x))` in float32, without making the codes; `checked` as of `quantize`."""
        g = self.global_scale if global_scale is None else global_scale
        scales = self.find_scales(x, what, g, checked=checked)
        elements = self.snap(self.groups(x, what), scales, g)
        return self.expand(elements, scales, g).flatten(-2)

    def pack(self, codes: Tensor) -> Tensor:
        """Codes `(..., I)` to bytes; 4-bit codes go two a byte, the lower index in the low nibble."""
        if self.element.bits == 8:
            return codes
        return codes[..., 0::2] | codes[..., 1::2] << 4

    def unpack(self, packed: Tensor) -> Tensor:
        """The inverse of `pack`."""
        if self.element.bits == 8:
            return packed
        return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)

    def byte_values(self, device: torch.device | str = "cpu") -> Tensor:
        """Elements in each byte value, `(256, codes a byte)` float32: packed weights decode by one look-up."""
        every_byte = torch.arange(256, dtype=torch.uint8, device=device)
        return self.element.from_codes(self.unpack(every_byte.unsqueeze(-1)))


def check_groups(in_features: int, fmt: Format, what: str) -> None:
    """Raise `ValueError` unless the format's group size divides `in_features`."""
    if in_features % fmt.group_size:
        raise ValueError(
            f"{what}: in_features {in_features} is not a multiple of the group size {fmt.group_size} of {fmt.name}; "
            "exclude it with quantize.exclude=[...] or choose a format with another group size"
        )


def _nan_where(mask: Tensor, scales: Tensor) -> Tensor:
    """Scales with NaN where `mask` is true: of the bytes' own NaNs, 255 in E8M0 and 127 in E4M3, in BF16 0x7FC0."""
    bits, nan = {
        torch.float8_e8m0fnu: (torch.uint8, 255),
        torch.float8_e4m3fn: (torch.uint8, 127),
        torch.bfloat16: (torch.int16, 0x7FC0),
    }[scales.dtype]
    return scales.view(bits).masked_fill(mask, nan).view(scales.dtype)


def _power_of_two(exponent: Tensor) -> Tensor:
    """`2^exponent` as E8M0 for int32 exponents, of which those below -127 become -127."""
    return (exponent.clamp(min=-127) + 127).to(torch.uint8).view(torch.float8_e8m0fnu)


def _bfloat16_above(x: Tensor) -> Tensor:
    """The least BF16 number that is not below x, of non-negative float32."""
    return ((x.view(torch.int32) + 0xFFFF) >> 16).to(torch.int16).view(torch.bfloat16)


def _floor_log2(x: Tensor) -> Tensor:
    """`floor(log2 x)` of non-negative float32, as int32; at most -127 for zero and subnormals."""
    return (x.view(torch.int32) >> 23) - 127


@dataclass(frozen=True)
class Mxfp4(Format):
    """OCP MXFP4. `scale_rule="paper"`: g = 1/3, nothing below 2^127 clips; `"ocp"`: g = 1, values in (6, 8) clip."""

    scale_rule: Literal["paper", "ocp"] = "paper"
    name: ClassVar[str] = "mxfp4"
    group_size: ClassVar[int] = 32
    scale_dtype: ClassVar[torch.dtype] = torch.float8_e8m0fnu

    def __post_init__(self) -> None:
        _check_rule(self, ("paper", "ocp"))

    @property
    def element(self) -> Element:
        return E2M1

    @property
    def global_scale(self) -> float:
        return 1 / 3 if self.scale_rule == "paper" else 1.0

    def group_scales(self, x_ng: Tensor, amax_n: Tensor, global_scale: float) -> Tensor:
        exponent = _floor_log2(amax_n)
        # 2^127 is left to no scale: with it the largest element, 6/3 * 2^127, would be infinite in float32.
        return _power_of_two(exponent.clamp(max=126) if self.scale_rule == "paper" else exponent - 2)


@dataclass(frozen=True)
class Nvfp4(Format):
    """NVIDIA NVFP4. `scale_rule="fixed"`: g = 0.1; `"calibrated"`: g = amax / (6 * 448), of each weight and input.

    Of a layer's inputs, after its transform, amax is `INPUT_MARGIN` times the largest magnitude in calibration.
    """

    scale_rule: Literal["fixed", "calibrated"] = "fixed"
    name: ClassVar[str] = "nvfp4"
    group_size: ClassVar[int] = 16
    scale_dtype: ClassVar[torch.dtype] = torch.float8_e4m3fn

    def __post_init__(self) -> None:
        _check_rule(self, ("fixed", "calibrated"))

    @property
    def element(self) -> Element:
        return E2M1

    @property
    def global_scale(self) -> float:
        return 0.1

    def weight_global_scale(self, weight: Tensor) -> float:
        if self.scale_rule == "fixed":
            return self.global_scale
        return self._holding(weight.abs().max().item())

    @property
    def calibrates_inputs(self) -> bool:
        return self.scale_rule == "calibrated"

    def input_global_scale(self, peak: float) -> float:
        return self._holding(INPUT_MARGIN * peak) if self.calibrates_inputs else self.global_scale

    def _holding(self, amax: float) -> float:
        """The smallest factor with which nothing up to `amax` is cut."""
        return max(amax / (E2M1_MAX * E4M3_MAX), 2.0**-126) if amax else self.global_scale  # 1 / g stays finite

    def window(self, global_scale: float) -> tuple[float, float]:
        # Half the least E4M3 number, 2^-9, is a tie that rounds to zero.
        return E2M1_MAX * 2.0**-10 * global_scale, E2M1_MAX * E4M3_MAX * global_scale

    @property
    def window_remedy(self) -> str:
        if self.calibrates_inputs:
            return "calibrate on more text, or on text that is more like it"
        return "format.scale_rule=calibrated fits the window to each layer"

    def group_scales(self, x_ng: Tensor, amax_n: Tensor, global_scale: float) -> Tensor:
        scales = amax_n * (1 / (E2M1_MAX * global_scale))
        return scales.clamp_(max=E4M3_MAX).to(torch.float8_e4m3fn)

    def units(self, x_ng: Tensor, scales: Tensor, global_scale: float) -> Tensor:
        """`x * (1/g / s)`, the quotient rounded: with g = 0.1 every exact tie goes to the even code.

        By two products, 42 of the 498 pairs of a scale and a tie in BF16 went to the odd one. Where the quotient could
        overflow they are two products still.
        """
        if 1 / global_scale > MOST_INVERSE_G:
            return super().units(x_ng, scales, global_scale)
        return x_ng * (torch.full_like(scales, 1 / global_scale) / scales).masked_fill_(scales == 0, 0)


@dataclass(frozen=True)
class Int4(Format):
    """4-bit integers. `scale_rule="rms"`: the paper's, clipped for a Gaussian; `"absmax"`: s = amax / 7.

    `"midrise"`: what the paper's theory of integers is about (equations 60 to 64), s = amax / 8 rounded up to BF16, so
    that nothing clips: no value is further than s / 2 from its cell's midpoint.
    """

    scale_rule: Literal["rms", "midrise", "absmax"] = "rms"
    name: ClassVar[str] = "int4"
    group_size: ClassVar[int] = 32
    scale_dtype: ClassVar[torch.dtype] = torch.bfloat16

    def __post_init__(self) -> None:
        _check_rule(self, ("rms", "midrise", "absmax"))

    @property
    def element(self) -> Element:
        return INT4_SYMMETRIC if self.scale_rule == "absmax" else INT4_MIDPOINT

    def group_scales(self, x_ng: Tensor, amax_n: Tensor, global_scale: float) -> Tensor:
        if self.scale_rule == "absmax":
            return (amax_n * (1 / 7)).bfloat16()
        if self.scale_rule == "midrise":
            return _bfloat16_above(amax_n * 0.125)
        rms = x_ng.double().square().mean(-1).sqrt()
        return (2 * GAUSSIAN_CLIP_4BIT / 15 * rms).clamp_(max=4e37).bfloat16()  # 7.5 s stays finite in float32


@dataclass(frozen=True)
class Mxfp8(Format):
    """OCP MXFP8 with E4M3 elements; `scale_rule="ocp"` is its only rule."""

    scale_rule: Literal["ocp"] = "ocp"
    name: ClassVar[str] = "mxfp8"
    group_size: ClassVar[int] = 32
    scale_dtype: ClassVar[torch.dtype] = torch.float8_e8m0fnu

    def __post_init__(self) -> None:
        _check_rule(self, ("ocp",))

    @property
    def element(self) -> Element:
        return E4M3

    def group_scales(self, x_ng: Tensor, amax_n: Tensor, global_scale: float) -> Tensor:
        return _power_of_two(_floor_log2(amax_n) - 8)


def _check_rule(fmt: "Mxfp4 | Nvfp4 | Int4 | Mxfp8", rules: tuple[str, ...]) -> None:
    if fmt.scale_rule not in rules:
        raise ValueError(f"{fmt.name}: unknown scale_rule {fmt.scale_rule!r}; choose one of {', '.join(rules)}")


@dataclass(frozen=True)
class Unquantized:
    """No format: the model stays as it is, the baseline of a comparison."""

    name: ClassVar[str] = "original"


MXFP4, NVFP4, INT4, MXFP8 = Mxfp4(), Nvfp4(), Int4(), Mxfp8()
