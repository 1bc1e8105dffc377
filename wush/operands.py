"""A quantized weight as the operands of fast matmuls, and the products themselves, one function a matmul.

Nothing is chosen here (`wush.backends`) and nothing is rounded but sums: every operand is an exact copy of codes and
scales. Shape legend: `O` output features, `I` input features, `N` groups, `M` tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from wush.formats import Format
from wush.transforms import apply_blocks

if TYPE_CHECKING:
    from wush_kernels.encode import RowBases, RowExponents


@dataclass(frozen=True)
class Weight:
    """A layer's packed codes `(O, I * bits / 8)`, scales `(O, N)`, the transform of its inputs and its bias `(O,)`.

    `global_scale` is the weight's, `input_scale` that of its inputs.
    """

    format: Format
    packed: Tensor
    scales: Tensor
    global_scale: float
    input_scale: float
    transform: Tensor | None
    bias: Tensor | None

    @property
    def alpha(self) -> float:
        """The product of both sides' global scales."""
        return self.input_scale * self.global_scale

    def values(self) -> Tensor:
        """The dequantized weight `(O, I)` float32, in transformed coordinates."""
        elements = F.embedding(self.packed.int(), _byte_values(self.format, self.packed.device)).flatten(-2)
        return self.format.expand(self.format.groups(elements), self.scales, self.global_scale).flatten(-2)


def _byte_values(fmt: Format, device: torch.device) -> Tensor:
    return fmt.byte_values(device) if torch.compiler.is_compiling() else _kept_byte_values(fmt, device)


@cache
def _kept_byte_values(fmt: Format, device: torch.device) -> Tensor:
    require_no_capture()
    return fmt.byte_values(device)


@dataclass(frozen=True)
class How:
    """What quantizes the input (`torch`, `triton`), whether copies of the weight are kept, and whether FP8 sums may be
    accumulated fast.
    """

    quantizer: str
    keep: bool = True
    fast: bool = False


class Operands:
    """What fast matmuls need of a weight beside its codes, each made when it is first needed."""

    def __init__(self) -> None:
        self._kept: dict[str, Any] = {}
        self.choices: dict[Any, Any] = {}  # what `wush.backends` chose for this weight

    def get(self, name: str, make: Callable[[], Any], keep: bool = True) -> Any:
        """The operand of this name, made by `make` unless it was kept; without `keep` made anew, and forgotten."""
        if not keep:
            self._kept.pop(name, None)
            return make()
        if name not in self._kept:
            require_no_capture()
            self._kept[name] = make()
        return self._kept[name]

    def exponents(self, weight: Weight) -> "RowExponents":
        """Exponents within the decode kernel's window of each row."""
        from wush_kernels.encode import DECODE_WINDOW, exponents

        return self.get("exponents", lambda: exponents(weight.packed, weight.scales, *DECODE_WINDOW))

    def row_bases(self, weight: Weight) -> "RowBases":
        """Each row's base exponent as E4M3."""
        from wush_kernels.encode import fp8_row_bases

        return self.get("row bases", lambda: fp8_row_bases(weight.packed, weight.scales))

    def misses(self, weight: Weight) -> tuple[int, int]:
        """How many groups of an MXFP4 weight no exponent of the decode kernel's window holds, and no E4M3 number.

        The first call waits for the device.
        """

        def count() -> tuple[int, int]:
            return int(self.exponents(weight).outside.item()), int(self.row_bases(weight).outside.item())

        return self.get("misses", count)


def bits_of(scales: Tensor) -> Tensor:
    """Scales as integers of their size, which every operation on tensors knows."""
    return scales.view(torch.uint8 if scales.itemsize == 1 else torch.int16)


def require_no_capture() -> None:
    """Raise `RuntimeError` while a CUDA graph is captured, which records kernels and does not run them."""
    if torch.compiler.is_dynamo_compiling():  # tracing captures nothing, and cannot trace the question
        return
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a quantized layer was first run while a CUDA graph was captured; run it once before, with as many tokens"
        )


_operands: "WeakTensorKeyDictionary" = WeakTensorKeyDictionary()


def operands_of(weight: Weight) -> Operands:
    """The operands made of a weight so far; forgotten with its packed codes, and when they change.

    Scales are changed together with codes, or replaced: in compiled code they are a view with a version of its own.
    """
    made_of = (_version(weight.packed), weight.scales.data_ptr(), weight.global_scale, weight.input_scale)
    found = cast("tuple[Any, Operands] | None", _operands.get(weight.packed))
    if found is None or found[0] != made_of:
        found = (made_of, Operands())
        _operands[weight.packed] = found
    return found[1]


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


# Products: x `(M, I)` to `(M, O)` in x's dtype


def torch_product(x: Tensor, weight: Weight, operands: Operands, how: How) -> Tensor:
    """Float32 product of the dequantized operands: with `quantizer="torch"` the reference of all others."""
    if how.quantizer == "torch":
        values = weight.format.round_trip(
            transformed(x, weight.transform), global_scale=weight.input_scale, checked=False
        )
        matrix = operands.get("values", weight.values, how.keep and not x.is_cuda)
    else:
        from wush_kernels.dequantize import dequantize
        from wush_kernels.quantize import quantize

        packed, scales = quantize(x, weight.format, weight.transform, weight.input_scale)
        values = dequantize(packed, scales, weight.format, weight.input_scale)
        matrix = dequantize(weight.packed, weight.scales, weight.format, weight.global_scale)
    product = F.linear(values, matrix)
    if weight.bias is not None:
        product += weight.bias
    return product.to(x.dtype)


def packed_fp8_product(x: Tensor, weight: Weight, operands: Operands, how: How) -> Tensor:
    """MXFP4 on FP8 tensor cores, the weight decoded in registers."""
    from wush_kernels.fp8_operand import fp8_operand
    from wush_kernels.matmul_fp8 import matmul_fp8

    a, a_scales = fp8_operand(x, weight.format, weight.transform)
    rows = operands.exponents(weight)
    return matmul_fp8(a, a_scales, weight.packed, rows.relative, rows.row_scales, weight.alpha, weight.bias, x.dtype)


def packed_half_product(x: Tensor, weight: Weight, operands: Operands, how: How) -> Tensor:
    """NVFP4 on FP16 tensor cores, the weight decoded in registers."""
    from wush_kernels.encode import words
    from wush_kernels.half_operand import half_operand
    from wush_kernels.matmul_half import matmul_half

    a = half_operand(x, weight.format, weight.transform, torch.float16, weight.input_scale)
    scales = operands.get("scale words", lambda: words(bits_of(weight.scales)))
    return matmul_half(a, weight.packed, scales, weight.alpha, weight.bias, x.dtype)


def fp8_product(x: Tensor, weight: Weight, operands: Operands, how: How) -> Tensor:
    """MXFP4 by torch's row-wise scaled matmul: E5M2 inputs, an E4M3 copy of the weight."""
    from wush_kernels.encode import fp8_weight
    from wush_kernels.fp8_operand import fp8_operand

    rows = operands.row_bases(weight)
    copy = operands.get("fp8", lambda: fp8_weight(weight.packed, weight.scales, rows).bytes, how.keep)
    w_scales = operands.get("fp8 scales", lambda: (rows.row_scales * weight.alpha)[None])
    a, a_scales = fp8_operand(x, weight.format, weight.transform)
    return scaled_mm(a, a_scales[:, None], copy, w_scales, weight.bias, x.dtype, how.fast)


def scaled_mm(
    a: Tensor,
    a_scales: Tensor,
    weight: Tensor,
    w_scales: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    fast: bool = False,
) -> Tensor:
    """`torch._scaled_mm` with a scale a row `(M, 1)` and a column `(1, O)`, and a bias in any dtype."""
    own = bias if bias is not None and bias.dtype == dtype and dtype != torch.float32 else None
    product = torch._scaled_mm(
        a, weight.t(), scale_a=a_scales, scale_b=w_scales, bias=own, out_dtype=dtype, use_fast_accum=fast
    )
    return product if bias is None or own is not None else (product + bias).to(dtype)


def half_product(x: Tensor, weight: Weight, operands: Operands, how: How) -> Tensor:
    """Exact BF16 operands by cuBLAS; any format whose values are BF16 numbers."""
    fmt = weight.format
    if how.quantizer == "torch":
        a = _half(transformed(x, weight.transform), weight)
        copy = operands.get("half, natural order", lambda: _natural_half_weight(weight), how.keep)
    else:
        from wush_kernels.dequantize import half_weight
        from wush_kernels.half_operand import half_operand

        a = half_operand(x, fmt, weight.transform, global_scale=weight.input_scale)
        copy = operands.get("half", lambda: half_weight(weight.packed, weight.scales, fmt), how.keep)
    bias = weight.bias
    if x.dtype == torch.bfloat16 and x.is_cuda and (bias is None or bias.dtype == x.dtype):
        start, beta = (a.new_empty(1), 0) if bias is None else (bias, 1)
        return torch.addmm(start, a, copy.t(), beta=beta, alpha=weight.alpha)
    product = torch.mm(a, copy.t(), out_dtype=torch.float32) if x.is_cuda else a.float() @ copy.float().t()
    product *= weight.alpha
    return (product if bias is None else product + bias).to(x.dtype)


def dot_scaled_product(x: Tensor, weight: Weight, operands: Operands, how: How) -> Tensor:
    """MXFP4 or NVFP4 on Blackwell's FP4 tensor cores, by our kernel."""
    from wush_kernels.matmul_blackwell import matmul_dot_scaled
    from wush_kernels.quantize import quantize

    codes, scales = quantize(x, weight.format, weight.transform, weight.input_scale)
    return matmul_dot_scaled(
        codes, scales, weight.packed, weight.scales, weight.format, weight.alpha, weight.bias, x.dtype
    )


def fp4_product(x: Tensor, weight: Weight, operands: Operands, how: How) -> Tensor:
    """MXFP4 or NVFP4 on Blackwell's FP4 tensor cores, by torch's scaled matmul with float32 output."""
    from wush_kernels.matmul_blackwell import swizzle_scales
    from wush_kernels.quantize import quantize

    codes, scales = quantize(x, weight.format, weight.transform, weight.input_scale)
    w_scales = operands.get("swizzled scales", lambda: swizzle_scales(weight.scales))
    product = scaled_fp4(codes, swizzle_scales(scales), weight.packed, w_scales, weight.format).mul_(weight.alpha)
    return (product if weight.bias is None else product + weight.bias).to(x.dtype)


def scaled_fp4(a: Tensor, a_scales: Tensor, weight: Tensor, w_scales: Tensor, fmt: Format) -> Tensor:
    """`torch.nn.functional.scaled_mm` of packed codes with swizzled scales, without global scales, in float32."""
    recipe = F.ScalingType.BlockWise1x32 if fmt.group_size == 32 else F.ScalingType.BlockWise1x16
    swizzle = F.SwizzleType.SWIZZLE_32_4_4
    return F.scaled_mm(
        a.view(torch.float4_e2m1fn_x2),
        weight.view(torch.float4_e2m1fn_x2).t(),
        a_scales,
        recipe,
        w_scales,
        recipe,
        swizzle_a=swizzle,
        swizzle_b=swizzle,
        output_dtype=torch.float32,
    )


def transformed(x: Tensor, transform: Tensor | None) -> Tensor:
    """`T x` in float32, for x `(..., I)`; None is the identity."""
    return x.float() if transform is None else apply_blocks(x.float(), transform.float())


def _half(x: Tensor, weight: Weight) -> Tensor:
    """`Q(x) / g` in BF16, natural order."""
    fmt, g = weight.format, weight.input_scale
    scales = fmt.find_scales(x, global_scale=g, checked=False)
    return fmt.expand(fmt.snap(fmt.groups(x), scales, g), scales, 1.0).flatten(-2).bfloat16()


def _natural_half_weight(weight: Weight) -> Tensor:
    return replace(weight, global_scale=1.0).values().bfloat16()


PRODUCTS: dict[str, Callable[[Tensor, Weight, Operands, How], Tensor]] = {
    "torch": torch_product,
    "matmul_fp8": packed_fp8_product,
    "matmul_half": packed_half_product,
    "scaled_mm": fp8_product,
    "half": half_product,
    "dot_scaled": dot_scaled_product,
    "scaled_mm_fp4": fp4_product,
}
