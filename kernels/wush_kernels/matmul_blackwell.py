"""FP4 matmul on Blackwell's FP4 tensor cores: `(alpha * Q_a Q_w^T + bias)` of packed MXFP4 or NVFP4 operands.

Both operands are packed along K, `(M, I / 2)` and `(O, I / 2)` uint8 in natural order with the lower index in the low
nibble, with scales `(M, N)` and `(O, N)`: float8_e8m0fnu for groups of 32, float8_e4m3fn for groups of 16. The weight
is the left, 128-row operand (`out^T = W a^T`): with fewer rows sm_100 has no FP4 instruction, and Triton falls back to
BF16 or aborts. Global scales belong in `alpha`.

`tl.dot_scaled` is emulated at a third of BF16's speed before capability 10, so the wrapper refuses there. `EMULATE`
is its twin in plain Triton, for tests of everything around it. `swizzle_scales` is for torch's own scaled matmul.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from wush_kernels.dequantize import element_value, reference_dequantize, rounded, scale_value
from wush_kernels.offline import Case
from wush_kernels.spec import FLOATS, FormatSpec
from wush_kernels.support import INTERPRETED, check_tensor, on_device, require_support

OLDEST_CAPABILITY = (10, 0)
FORMATS = {"mxfp4": "e8m0", "nvfp4": "e4m3"}
_WEIGHT_ROWS = 128
_TILE_ROWS, _TILE_COLUMNS = 128, 4  # of a tile of swizzled scales


@triton.jit
def _decoded(codes, scales, G: tl.constexpr, SCALE: tl.constexpr):
    """Float32 even and odd columns, `(ROWS, K / 2)` each, of packed codes with scales `(ROWS, K / G)`."""
    ROWS: tl.constexpr = codes.shape[0]
    HALF: tl.constexpr = codes.shape[1]
    wide = scale_value(scales.to(tl.uint8, bitcast=True).to(tl.int32), SCALE)
    factor = tl.broadcast_to(wide[:, :, None], (ROWS, HALF // (G // 2), G // 2))
    factor = tl.reshape(factor, (ROWS, HALF))
    byte = codes.to(tl.int32)
    return element_value(byte & 15, "e2m1") * factor, element_value(byte >> 4, "e2m1") * factor


@triton.jit
def _emulated_dot_scaled(w, w_scales, a, a_scales, acc, G: tl.constexpr, SCALE: tl.constexpr):
    w_even, w_odd = _decoded(w, w_scales, G, SCALE)
    a_even, a_odd = _decoded(a, a_scales, G, SCALE)
    acc = tl.dot(w_even, tl.trans(a_even), acc, input_precision="ieee")
    return tl.dot(w_odd, tl.trans(a_odd), acc, input_precision="ieee")


@triton.jit
def _dot_scaled_kernel(
    w, w_scales, a, a_scales, bias, out, O, M, I, alpha,
    G: tl.constexpr, SCALE: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr,
    HAS_BIAS: tl.constexpr, EMULATE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """A tile `(BLOCK_O, BLOCK_M)` of `out^T`; neighbouring programs share the weight's rows."""
    BYTES: tl.constexpr = BLOCK_I // 2
    GROUPS: tl.constexpr = BLOCK_I // G
    blocks_m = tl.cdiv(M, BLOCK_M)
    o = (tl.program_id(0) // blocks_m) * BLOCK_O + tl.arange(0, BLOCK_O)
    m = (tl.program_id(0) % blocks_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    byte, group = tl.arange(0, BYTES), tl.arange(0, GROUPS)
    row_bytes, groups = I // 2, I // G
    # Rows past the end repeat the last one: they are not stored.
    o_in, m_in = tl.minimum(o, O - 1).to(tl.int64), tl.minimum(m, M - 1).to(tl.int64)
    w_at = w + o_in[:, None] * row_bytes + byte[None, :]
    a_at = a + m_in[:, None] * row_bytes + byte[None, :]
    w_scales_at = w_scales + o_in[:, None] * groups + group[None, :]
    a_scales_at = a_scales + m_in[:, None] * groups + group[None, :]

    acc = tl.zeros((BLOCK_O, BLOCK_M), tl.float32)
    for step in range(tl.cdiv(I, BLOCK_I)):
        inside = byte[None, :] < row_bytes - step * BYTES
        inside_groups = group[None, :] < groups - step * GROUPS
        w_tile = tl.load(w_at + step * BYTES, mask=inside, other=0)
        a_tile = tl.load(a_at + step * BYTES, mask=inside, other=0)
        w_scale = tl.load(w_scales_at + step * GROUPS, mask=inside_groups, other=0.0)
        a_scale = tl.load(a_scales_at + step * GROUPS, mask=inside_groups, other=0.0)
        if EMULATE:
            acc = _emulated_dot_scaled(w_tile, w_scale, a_tile, a_scale, acc, G, SCALE)
        else:
            acc = tl.dot_scaled(w_tile, w_scale, "e2m1", tl.trans(a_tile), a_scale, "e2m1", acc)

    result = acc * alpha
    if HAS_BIAS:
        result += tl.load(bias + o_in).to(tl.float32)[:, None]
    to = out + m.to(tl.int64)[None, :] * O + o[:, None]
    tl.store(to, rounded(result, out.dtype.element_ty, INTERPRET), mask=(o < O)[:, None] & (m < M)[None, :])


def matmul_dot_scaled(
    a_packed: Tensor,
    a_scales: Tensor,
    w_packed: Tensor,
    w_scales: Tensor,
    fmt: FormatSpec,
    alpha: float,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """`alpha * (Q_a Q_w^T) + bias`, `(M, O)` in `out_dtype`: float32 sums, rounded once.

    Raises `ValueError` or `TypeError` for a tensor that does not fit, `RuntimeError` before Blackwell.
    """
    require_support(a_packed, "matmul_dot_scaled")
    require_fp4_tensor_cores(a_packed.device)
    _check(a_packed, a_scales, w_packed, w_scales, fmt, bias, out_dtype)
    bits = a_scales.view(torch.uint8), w_scales.view(torch.uint8)
    return torch.ops.wush.matmul_dot_scaled(
        a_packed, bits[0], w_packed, bits[1], fmt.name, alpha, bias, out_dtype, INTERPRETED
    )


def reference_matmul_dot_scaled(
    a_packed: Tensor,
    a_scales: Tensor,
    w_packed: Tensor,
    w_scales: Tensor,
    fmt: FormatSpec,
    alpha: float,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """`matmul_dot_scaled` in plain PyTorch, with float64 sums."""
    a = reference_dequantize(a_packed, a_scales, fmt, 1.0).double()
    w = reference_dequantize(w_packed, w_scales, fmt, 1.0).double()
    product = alpha * (a @ w.T)
    return (product if bias is None else product + bias.double()).to(out_dtype)


def require_fp4_tensor_cores(device: torch.device) -> None:
    """Raise `RuntimeError` that names the path to take on a GPU older than Blackwell."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < OLDEST_CAPABILITY:
        major, minor = torch.cuda.get_device_capability(device)
        raise RuntimeError(
            f"matmul_dot_scaled: compute capability {major}.{minor} has no FP4 tensor cores; use the FP8 operands of "
            "wush_kernels.quantize and wush_kernels.matmul_fp8 for mxfp4, wush_kernels.matmul_half for nvfp4"
        )


def swizzle_scales(scales: Tensor) -> Tensor:
    """Scales `(R, N)` of one byte, flat, as `torch.nn.functional.scaled_mm` takes them with `SWIZZLE_32_4_4`.

    Tiles of 128 x 4 in row order, padded with zeros; byte (r, c) of a tile is at `(r % 32) * 16 + (r // 32) * 4 + c`.
    """
    rows, columns = scales.shape
    high, wide = triton.cdiv(rows, _TILE_ROWS), triton.cdiv(columns, _TILE_COLUMNS)
    padded = torch.zeros(high * _TILE_ROWS, wide * _TILE_COLUMNS, dtype=torch.uint8, device=scales.device)
    padded[:rows, :columns] = scales.view(torch.uint8)
    tiles = padded.view(high, 4, 32, wide, _TILE_COLUMNS)
    return tiles.permute(0, 3, 2, 1, 4).reshape(-1).view(scales.dtype)


def unswizzle_scales(swizzled: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of `swizzle_scales`, `(rows, columns)`."""
    high, wide = triton.cdiv(rows, _TILE_ROWS), triton.cdiv(columns, _TILE_COLUMNS)
    tiles = swizzled.view(torch.uint8).view(high, wide, 32, 4, _TILE_COLUMNS)
    padded = tiles.permute(0, 3, 2, 1, 4).reshape(high * _TILE_ROWS, wide * _TILE_COLUMNS)
    return padded[:rows, :columns].contiguous().view(swizzled.dtype)


@torch.library.custom_op("wush::matmul_dot_scaled", mutates_args=())
@on_device
def _matmul_dot_scaled(
    a: Tensor,
    a_scales: Tensor,
    w: Tensor,
    w_scales: Tensor,
    name: str,
    alpha: float,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    emulate: bool,
) -> Tensor:
    out = _product_like(a, a_scales, w, w_scales, name, alpha, bias, out_dtype, emulate)
    if out.numel():
        if name == "nvfp4":
            a_scales, w_scales = a_scales.view(torch.float8_e4m3fn), w_scales.view(torch.float8_e4m3fn)
        tiles, warps, stages = _tiles(len(a), emulate)
        grid = (triton.cdiv(len(w), tiles["BLOCK_O"]) * triton.cdiv(len(a), tiles["BLOCK_M"]),)
        _dot_scaled_kernel[grid](
            w, w_scales, a, a_scales, bias, out, len(w), len(a), 2 * a.shape[1], alpha,
            **_constants(name), **tiles, HAS_BIAS=bias is not None, EMULATE=emulate, INTERPRET=INTERPRETED,
            num_warps=warps, num_stages=stages, enable_fp_fusion=False,
        )  # fmt: skip
    return out


@_matmul_dot_scaled.register_fake
def _product_like(
    a: Tensor,
    a_scales: Tensor,
    w: Tensor,
    w_scales: Tensor,
    name: str,
    alpha: float,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    emulate: bool,
) -> Tensor:
    return a.new_empty(len(a), len(w), dtype=out_dtype)


def _constants(name: str) -> dict[str, object]:
    return {"G": 32 if name == "mxfp4" else 16, "SCALE": FORMATS[name]}


def _tiles(rows: int, emulate: bool) -> tuple[dict[str, int], int, int]:
    """Tile sizes, warps and stages for M rows: under the 99 KB of shared memory of sm_120, too."""
    if emulate:
        return {"BLOCK_O": 32, "BLOCK_M": 16, "BLOCK_I": 64}, 4, 2
    block_m = min(128, max(16, triton.next_power_of_2(rows)))
    block_i = 256 if block_m == 16 else 128  # longer tiles spill on sm_120
    return {"BLOCK_O": _WEIGHT_ROWS, "BLOCK_M": block_m, "BLOCK_I": block_i}, 4 if block_m <= 64 else 8, 3


def _check(
    a_packed: Tensor,
    a_scales: Tensor,
    w_packed: Tensor,
    w_scales: Tensor,
    fmt: FormatSpec,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> None:
    kernel, device = "matmul_dot_scaled", a_packed.device
    if fmt.name not in FORMATS:
        raise ValueError(f"{kernel}: no FP4 tensor core multiplies {fmt.name}; there are {', '.join(FORMATS)}")
    if out_dtype not in FLOATS:
        raise TypeError(f"{kernel}: out_dtype {out_dtype}, where float32, bfloat16 or float16 is needed")
    size = fmt.group_size // 2
    if a_packed.ndim != 2 or a_packed.shape[1] % size:
        raise ValueError(
            f"{kernel}: a_packed {tuple(a_packed.shape)}: not (M, I / 2) with I a multiple of the group size "
            f"{fmt.group_size} of {fmt.name}"
        )
    rows, width = a_packed.shape
    features = w_packed.shape[0]
    check_tensor(a_packed, f"{kernel}: a_packed", (torch.uint8,), (rows, width), device)
    check_tensor(w_packed, f"{kernel}: w_packed", (torch.uint8,), (features, width), device)
    check_tensor(a_scales, f"{kernel}: a_scales", (fmt.scale_dtype,), (rows, width // size), device)
    check_tensor(w_scales, f"{kernel}: w_scales", (fmt.scale_dtype,), (features, width // size), device)
    if bias is not None:
        check_tensor(bias, f"{kernel}: bias", FLOATS, (features,), device)


def offline_cases() -> Iterator[Case]:
    """Both formats for few rows and many where there are FP4 tensor cores, and the twin that tests use elsewhere."""
    instructions = {
        "mxfp4": r"tcgen05\.mma\S*kind::mxf4\.block_scale\.scale_vec::2X",
        "nvfp4": r"tcgen05\.mma\S*kind::mxf4nvf4\.block_scale\.scale_vec::4X",
    }
    warp_level = r"mma\.sync\.aligned\.m16n8k64\S*kind::mxf4nvf4\.block_scale"
    for name, instruction in instructions.items():
        scale = "*u8" if name == "mxfp4" else "*fp8e4nv"
        types = {"w": "*u8", "w_scales": scale, "a": "*u8", "a_scales": scale, "bias": "*bf16", "out": "*bf16"}
        types |= {"O": "i32", "M": "i32", "I": "i32", "alpha": "fp32"}
        for rows in (16, 32, 64, 128, 0):
            tiles, warps, stages = _tiles(rows, rows == 0)
            yield Case(
                f"{name} {rows} columns" if rows else f"{name} emulated",
                _dot_scaled_kernel,
                types,
                _constants(name) | tiles | {"HAS_BIAS": True, "EMULATE": rows == 0, "INTERPRET": False},
                {100: (instruction,), 120: (warp_level,)},
                warps,
                stages,
                odd=("M",),
                capabilities=(100, 120) if rows else (90,),
            )
