"""The block transform alone: `x_b -> T_b x_b` on each block of G columns, where nothing is quantized after it.

No layer runs it: they transform and quantize in one kernel. It is for what is done with transformed values themselves.

x `(..., I)`; the transform `(N, G, G)`, one a block, or `(G, G)`, shared by all. Sums are float32 sums of exact
products, rounded once to x's dtype: in other words than PyTorch's by at most the rounding of G additions. Operands of
the same 16-bit dtype go to the tensor cores as they are; otherwise both are widened to float32.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from wush_kernels.dequantize import rounded
from wush_kernels.offline import Case
from wush_kernels.spec import FLOATS
from wush_kernels.support import INTERPRETED, check_tensor, on_device, require_support

GROUP_SIZES = (16, 32)
_COLUMNS = 128  # of a tile with a transform per block


@triton.jit
def _per_block_kernel(
    x, transform, out, M, I,
    G: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr, WIDE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """One batched product of a tile `(ROWS, BLOCKS * G)`."""
    row, block = tl.program_id(0) * ROWS, tl.program_id(1) * BLOCKS
    rows, columns = row + tl.arange(0, ROWS), block * G + tl.arange(0, BLOCKS * G)
    inside = (rows < M)[:, None] & (columns < I)[None, :]
    offsets = rows.to(tl.int64)[:, None] * I + columns[None, :]
    tile = tl.load(x + offsets, mask=inside, other=0.0)
    x_brg = tl.permute(tl.reshape(tile, (ROWS, BLOCKS, G)), (1, 0, 2))

    blocks, g = block + tl.arange(0, BLOCKS), tl.arange(0, G)
    at = blocks[:, None, None] * (G * G) + g[None, :, None] * G + g[None, None, :]
    t_bhg = tl.load(transform + at, mask=(blocks * G < I)[:, None, None], other=0.0)
    if WIDE or INTERPRET:  # interpreted bfloat16 products are wrong; in float32 they are exact
        x_brg, t_bhg = x_brg.to(tl.float32), t_bhg.to(tl.float32)
    y_brh = tl.dot(x_brg, tl.permute(t_bhg, (0, 2, 1)), input_precision="ieee")
    y = tl.reshape(tl.permute(y_brh, (1, 0, 2)), (ROWS, BLOCKS * G))
    tl.store(out + offsets, rounded(y, out.dtype.element_ty, INTERPRET), mask=inside)


@triton.jit
def _shared_kernel(
    x, transform, out, blocks,
    G: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """One product of `ROWS` of all `blocks = M * N` blocks, each a row of x as `(M * N, G)`."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    rows, g = tl.arange(0, ROWS), tl.arange(0, G)
    inside = (rows < blocks - first)[:, None]
    offsets = first * G + (rows[:, None] * G + g[None, :])
    x_rg = tl.load(x + offsets, mask=inside, other=0.0)
    t_gh = tl.load(transform + g[None, :] * G + g[:, None])
    if WIDE or INTERPRET:
        x_rg, t_gh = x_rg.to(tl.float32), t_gh.to(tl.float32)
    y_rh = tl.dot(x_rg, t_gh, input_precision="ieee")
    tl.store(out + offsets, rounded(y_rh, out.dtype.element_ty, INTERPRET), mask=inside)


def block_transform(x: Tensor, transform: Tensor) -> Tensor:
    """`T_b x_b` of each block, `(..., I)` in x's dtype.

    Raises `ValueError` or `TypeError` for a tensor that does not fit, `RuntimeError` where kernels cannot run.
    """
    require_support(x, "block_transform")
    size = transform.shape[-1] if transform.ndim else 0
    if size not in GROUP_SIZES:
        sizes = ", ".join(map(str, GROUP_SIZES))
        raise ValueError(f"block_transform: transform {tuple(transform.shape)}: its blocks are none of {sizes} wide")
    if not x.ndim or x.shape[-1] % size:
        raise ValueError(f"block_transform: x {tuple(x.shape)}: its last dimension is no multiple of {size}")
    check_tensor(x, "block_transform: x", FLOATS, tuple(x.shape), x.device)
    shape = (size, size) if transform.ndim == 2 else (x.shape[-1] // size, size, size)
    check_tensor(transform, "block_transform: transform", FLOATS, shape, x.device)
    return torch.ops.wush.block_transform(x, transform)


def reference_block_transform(x: Tensor, transform: Tensor) -> Tensor:
    """`block_transform` in plain PyTorch."""
    blocks = x.float().unflatten(-1, (-1, transform.shape[-1]))
    if transform.ndim == 2:
        transform = transform.expand(blocks.shape[-2], -1, -1)
    return torch.einsum("...ng,nhg->...nh", blocks, transform.float()).flatten(-2).to(x.dtype)


@torch.library.custom_op("wush::block_transform", mutates_args=())
@on_device
def _block_transform(x: Tensor, transform: Tensor) -> Tensor:
    out = torch.empty_like(x)
    if not x.numel():
        return out
    size, features = transform.shape[-1], x.shape[-1]
    rows = x.numel() // features
    wide = x.dtype != transform.dtype or x.dtype == torch.float32
    if transform.ndim == 2:
        tile = _shared_rows(size, wide)
        _shared_kernel[(triton.cdiv(rows * features // size, tile),)](
            x, transform, out, rows * features // size,
            G=size, ROWS=tile, WIDE=wide, INTERPRET=INTERPRETED, enable_fp_fusion=False,
        )  # fmt: skip
    else:
        tile = 16 if wide or rows <= 16 else 64
        _per_block_kernel[(triton.cdiv(rows, tile), triton.cdiv(features, _COLUMNS))](
            x, transform, out, rows, features,
            G=size, ROWS=tile, BLOCKS=_COLUMNS // size, WIDE=wide, INTERPRET=INTERPRETED, enable_fp_fusion=False,
        )  # fmt: skip
    return out


@_block_transform.register_fake
def _(x: Tensor, transform: Tensor) -> Tensor:
    return torch.empty_like(x)


def _shared_rows(size: int, wide: bool) -> int:
    """Rows of a tile of about 8,192 numbers, or 2,048 where both operands are float32."""
    return (2048 if wide else 8192) // size


def offline_cases() -> Iterator[Case]:
    """MXFP4's and NVFP4's blocks, per block and shared, in bfloat16, and float32's exact products."""
    in_registers = (r"mma\.sync\S*m16n8k16\S*bf16\.bf16",)
    one_product = {90: (r"wgmma\.mma_async\S*bf16",), 100: (r"tcgen05\.mma\S*kind::f16",), 120: in_registers}
    for size, dtype in ((32, "bf16"), (16, "bf16"), (32, "fp32")):
        wide = dtype == "fp32"
        types = {"x": f"*{dtype}", "transform": f"*{dtype}", "out": f"*{dtype}"}
        constants = {"G": size, "WIDE": wide, "INTERPRET": False}
        exact = dict.fromkeys((90, 100, 120), ("fma.rn.f32",))
        yield Case(
            f"per block {size} {dtype}",
            _per_block_kernel,
            types | {"M": "i32", "I": "i32"},
            constants | {"ROWS": 16 if wide else 64, "BLOCKS": _COLUMNS // size},
            exact if wide else dict.fromkeys((90, 100, 120), in_registers),
        )
        yield Case(
            f"shared {size} {dtype}",
            _shared_kernel,
            types | {"blocks": "i32"},
            constants | {"ROWS": _shared_rows(size, wide)},
            exact if wide else one_product,
        )
