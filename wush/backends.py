"""Which kernels a `QuantLinear` runs on: chosen by format, GPU and M, for the quantizing and for the matmul.

`choose` is the whole policy, a pure function. What was chosen is logged once and kept with the weight (`chosen`).
Shape legend: `O` output features, `I` input features, `M` tokens.
"""

import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn

from wush.device import no_triton
from wush.formats import INT4, MXFP4, MXFP8, NVFP4, Format, Int4, Mxfp4, Nvfp4
from wush.machine import TENSOR_CORES_FP4, Machine, machine
from wush.operands import (
    PRODUCTS,
    How,
    Operands,
    Weight,
    bits_of,
    operands_of,
    require_no_capture,
    torch_product,
)

if TYPE_CHECKING:
    from wush.linear import QuantLinear

log = logging.getLogger(__name__)

Kernels = Literal["auto", "torch", "triton", "scaled_mm"]
# Up to so many tokens packed weights are decoded in registers, and in MXFP4 products of so few tiles of 64 x 64 that
# torch's matmul leaves most of the GPU idle; beyond, copies of the weight win. Measured with whole layers on an H100.
DECODE_ROWS = {"mxfp4": 64, "nvfp4": 32}
SMALL_TILES = 128
PACKED = {"mxfp4": "matmul_fp8", "nvfp4": "matmul_half"}  # the matmuls that decode packed weights
TENSOR_CORES_BF16 = (8, 0)
# The formats that kernels know; any other is computed by PyTorch.
BUILT_IN: dict[tuple[str, str], Format] = {
    (fmt.name, fmt.scale_rule): fmt
    for fmt in (MXFP4, Mxfp4("ocp"), NVFP4, Nvfp4("calibrated"), INT4, Int4("midrise"), Int4("absmax"), MXFP8)
}
_told: set[str] = set()


@dataclass(frozen=True)
class Shape:
    """What of a layer matters; `misses`: its groups outside the windows of decoded weights and of an FP8 copy."""

    out_features: int
    in_features: int
    dtype: torch.dtype = torch.bfloat16
    misses: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Settings:
    """What a layer may run on.

    `keep_operands`: whether copies of weights that products with many tokens need are kept (1 byte a weight for MXFP4,
    2 for other formats; on a CPU 4, for products of any number); False makes them anew in every forward, in memory
    that all layers share.
    `fast_accumulation`: whether torch's FP8 matmul may leave its sums in the tensor core's accumulator, of about 22
    bits: faster, but long sums lose, up to a quarter of one of 28,672 values of one sign.
    """

    kernels: Kernels = "auto"
    keep_operands: bool = True
    fast_accumulation: bool = False

    def __post_init__(self) -> None:
        if self.kernels not in get_args(Kernels):
            raise ValueError(f"kernels={self.kernels!r}: choose one of {', '.join(get_args(Kernels))}")


DEFAULT = Settings()


@dataclass(frozen=True)
class Choice:
    """How the input is quantized (`torch`, `triton`) and the product computed (a name of `PRODUCTS`), and why so."""

    quantize: str
    matmul: str
    why: str

    def __str__(self) -> str:
        return f"quantize {self.quantize}, matmul {self.matmul} ({self.why})"


def choose(fmt: Format, machine: Machine, rows: int, shape: Shape, requested: Kernels = "auto") -> Choice:
    """The kernels for `rows` tokens: the first matmul that can be used, of those that suit the format, GPU and M."""
    if requested == "torch":
        return Choice("torch", "torch", "kernels=torch")
    if not _known(fmt):
        return Choice("torch", "torch", f"no kernel knows {fmt.name}")
    if requested == "auto" and (machine.capability is None or shape.dtype == torch.float32):
        return Choice("torch", "torch", "no CUDA GPU" if machine.capability is None else "a float32 model")
    band, few = _band(fmt, rows, shape.out_features)
    reasons = [f"kernels={requested}" if requested != "auto" else band]
    if machine.no_triton:
        reasons.append(f"not triton: {machine.no_triton}")
    for matmul in (*_candidates(fmt, machine, few, requested), "torch"):
        obstacle = _obstacle(matmul, fmt, machine, shape)
        if obstacle is None:
            break
        reasons.append(f"not {matmul}: {obstacle}")
    return Choice("torch" if machine.no_triton else "triton", matmul, "; ".join(reasons))


def _band(fmt: Format, rows: int, out_features: int) -> tuple[str, bool]:
    """The band of sizes that a product is in, and whether it has few enough tokens to decode packed weights."""
    if fmt.name not in DECODE_ROWS:
        return "any M", True
    most = DECODE_ROWS[fmt.name]
    if rows <= most:
        return f"M <= {most}", True
    if fmt.name != "mxfp4":
        return f"M > {most}", False
    if -(-out_features // 64) * -(-rows // 64) <= SMALL_TILES:
        return f"M > {most}, {SMALL_TILES} tiles or fewer", True
    return f"M > {most}, more than {SMALL_TILES} tiles", False


def _candidates(fmt: Format, machine: Machine, few: bool, requested: Kernels) -> tuple[str, ...]:
    """The matmuls that suit, or those of them that are requested, best first."""
    packed = PACKED.get(fmt.name, "packed")
    if machine.capability and machine.capability >= TENSOR_CORES_FP4 and fmt.name in PACKED:
        fp4 = {"triton": ("dot_scaled",), "scaled_mm": ("scaled_mm_fp4",)}
        return (*fp4.get(requested, ("scaled_mm_fp4", "dot_scaled")), "half")
    if requested == "triton":
        return packed, "half"
    if requested == "scaled_mm":
        return "scaled_mm", "half"
    copies = ("scaled_mm", "half") if fmt.name == "mxfp4" else ("half",)
    return (packed, *copies) if few else copies


def _obstacle(matmul: str, fmt: Format, machine: Machine, shape: Shape) -> str | None:
    """Why a matmul cannot be used, in one phrase; None when it can."""
    o, i = shape.out_features, shape.in_features
    if matmul == "torch":
        return None
    if matmul == "half":
        if fmt.name == "int4":
            return "int4 values are not BF16 numbers"
        old = machine.capability is not None and machine.capability < TENSOR_CORES_BF16
        return "the GPU has no BF16 tensor cores" if old else None
    if matmul == "packed":
        return f"no kernel decodes {fmt.name} weights"
    if matmul == "scaled_mm" and fmt.name != "mxfp4":
        return f"{fmt.name} values are not FP8 numbers with a scale a row"
    if machine.no_triton:
        return "the input needs a kernel of Triton"
    if matmul == "matmul_fp8" and shape.misses[0]:
        return f"{shape.misses[0]} groups have exponents outside the window of their row"
    if matmul == "scaled_mm" and shape.misses[1]:
        return f"{shape.misses[1]} groups have exponents outside the FP8 window of their row"
    if (matmul == "scaled_mm" and (o % 16 or i % 16)) or (matmul == "scaled_mm_fp4" and (o % 16 or i % 32)):
        return f"{o} x {i} are not multiples of {16 if matmul == 'scaled_mm' else '16 and 32'}"
    if matmul == "matmul_half" and i % 32:
        return f"in_features {i} is not a multiple of 32"
    if matmul == "dot_scaled":
        capable = machine.capability and machine.capability >= TENSOR_CORES_FP4
        return None if capable else "the GPU has no FP4 tensor cores"
    return {"scaled_mm": machine.no_scaled_mm, "scaled_mm_fp4": machine.no_scaled_fp4}.get(matmul)


# Running


def linear(x: Tensor, weight: Weight, settings: Settings = DEFAULT) -> Tensor:
    """`Q(T x) W_q^T + bias`, `(..., O)` in x's dtype, for x `(..., I)`.

    A row of x with NaN or infinity gives a row of NaN, and no error. Under `torch.compile` it is one operator, or for
    a format of the user's own plain PyTorch.
    """
    fmt = weight.format
    if not torch.compiler.is_compiling():
        return _run(x, weight, settings)
    if _known(fmt):
        return torch.ops.wush.linear(
            x, weight.packed, bits_of(weight.scales), weight.transform, weight.bias, fmt.name, fmt.scale_rule,
            weight.global_scale, weight.input_scale, settings.kernels, settings.keep_operands,
            settings.fast_accumulation,
        )  # fmt: skip
    return torch_product(x, weight, Operands(), How("torch"))


def _known(fmt: Format) -> bool:
    return BUILT_IN.get((fmt.name, fmt.scale_rule)) == fmt


@torch.library.custom_op("wush::linear", mutates_args=())
def _linear(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    transform: Tensor | None,
    bias: Tensor | None,
    name: str,
    scale_rule: str,
    global_scale: float,
    input_scale: float,
    kernels: str,
    keep: bool,
    fast: bool,
) -> Tensor:
    fmt = BUILT_IN[name, scale_rule]
    weight = Weight(fmt, packed, scales.view(fmt.scale_dtype), global_scale, input_scale, transform, bias)
    return _run(x, weight, Settings(kernels, keep, fast))  # type: ignore[arg-type]


@_linear.register_fake
def _(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    transform: Tensor | None,
    bias: Tensor | None,
    name: str,
    scale_rule: str,
    global_scale: float,
    input_scale: float,
    kernels: str,
    keep: bool,
    fast: bool,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], packed.shape[0])


def _run(x: Tensor, weight: Weight, settings: Settings) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    if not len(rows):
        return x.new_empty(*x.shape[:-1], len(weight.packed))
    operands = operands_of(weight)
    choice = _choice(weight, operands, len(rows), x.dtype, settings.kernels)
    product = PRODUCTS[choice.matmul](
        rows, weight, operands, How(choice.quantize, settings.keep_operands, settings.fast_accumulation)
    )
    return product.view(*x.shape[:-1], product.shape[-1])


def _choice(weight: Weight, operands: Operands, rows: int, dtype: torch.dtype, kernels: Kernels) -> Choice:
    """`choose` for a weight, worked out once for each band of sizes."""
    choices, fmt = operands.choices, weight.format
    key = (_band(fmt, rows, len(weight.packed)), dtype, kernels)
    if key not in choices:
        choice = choices[key] = _chosen(weight, operands, rows, dtype, kernels)
        message = f"{fmt.name} layers in {str(dtype).removeprefix('torch.')}: {choice}"
        if message not in _told:
            _told.add(message)
            log.log(logging.WARNING if kernels != "auto" and "; not " in choice.why else logging.INFO, "%s", message)
    return choices[key]


def _chosen(weight: Weight, operands: Operands, rows: int, dtype: torch.dtype, kernels: Kernels) -> Choice:
    fmt = weight.format
    require_no_capture()
    shape = Shape(len(weight.packed), weight.scales.shape[1] * fmt.group_size, dtype)
    offered = machine(weight.packed.device, dtype, fmt) if _known(fmt) else Machine(None)
    choice = choose(fmt, offered, rows, shape, kernels)
    if choice.matmul in ("matmul_fp8", "scaled_mm"):
        shape = replace(shape, misses=operands.misses(weight))
        choice = choose(fmt, offered, rows, shape, kernels)
    return choice


# Settings and records


def use_kernels(
    model: nn.Module, kernels: Kernels = "auto", keep_operands: bool = True, fast_accumulation: bool = False
) -> nn.Module:
    """Set what every `QuantLinear` of a model may run on (`Settings`); the same model."""
    settings = Settings(kernels, keep_operands, fast_accumulation)
    for _, layer in _layers(model):
        layer.settings = settings
    return model


def planned(layer: "QuantLinear", rows: int, dtype: torch.dtype = torch.bfloat16) -> Choice:
    """What a `QuantLinear` is run on for inputs of so many tokens in a dtype."""
    weight = layer.operand_source
    return _choice(weight, operands_of(weight), rows, dtype, layer.settings.kernels)


def chosen(model: nn.Module) -> dict[str, list[str]]:
    """What the layers of a model were run on so far, why, and where not joined why; with the layers' names.

    Names that differ only in a number are merged, such as `model.layers.0-29.mlp.up_proj`.
    """
    found: dict[str, list[str]] = {}
    for name, layer in _layers(model):
        sources = {id(weight.packed): weight for weight in (layer.operand_source, layer.own)}.values()
        choices = [choice for weight in sources for choice in operands_of(weight).choices.values()]
        texts = list(dict.fromkeys(f"{layer.format.name}: {choice}" for choice in choices))
        for text in texts + [f"not joined: {layer.not_joined}"] * bool(layer.not_joined):
            found.setdefault(text, []).append(name)
    return {text: _merged(names) for text, names in found.items()}


def flushed_groups(device: torch.device | str) -> int:
    """How many groups of activations on a device were under their row's FP8 window, and lost bits; waits for it."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if no_triton(device):
        return 0
    from wush_kernels.workspace import flushed_groups

    return int(flushed_groups(device).item())


def _layers(model: nn.Module) -> Iterator[tuple[str, "QuantLinear"]]:
    from wush.linear import QuantLinear

    return ((name, module) for name, module in model.named_modules() if isinstance(module, QuantLinear))


def _merged(names: Iterable[str]) -> list[str]:
    """Names whose first number runs over a range become one."""
    numbers: dict[tuple[str, str], list[int]] = {}
    plain = []
    for name in names:
        match = re.match(r"(.*?)\b(\d+)\b(.*)", name)
        if match:
            numbers.setdefault((match[1], match[3]), []).append(int(match[2]))
        else:
            plain.append(name)
    for (before, after), own in numbers.items():
        plain += [f"{before}{first}{f'-{last}' * (last > first)}{after}" for first, last in _ranges(sorted(own))]
    return plain


def _ranges(numbers: list[int]) -> Iterator[tuple[int, int]]:
    first = last = numbers[0]
    for number in numbers[1:]:
        if number != last + 1:
            yield first, last
            first = number
        last = number
    yield first, last
