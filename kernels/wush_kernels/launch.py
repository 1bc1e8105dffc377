"""What the quantizing kernels' wrappers share: checks of their arguments, the grid and the constants of a launch."""

import triton
from torch import Tensor

from wush_kernels.groups import BLOCK_COLUMNS
from wush_kernels.spec import FLOATS, FormatSpec, element_of
from wush_kernels.support import INTERPRETED, check_tensor, require_support


def check_input(x: Tensor, fmt: FormatSpec, transform: Tensor | None, kernel: str) -> None:
    """Raise for an input or a transform that does not fit the format; the message names the kernel."""
    require_support(x, kernel)
    element_of(fmt)
    size = fmt.group_size
    if not x.ndim or x.shape[-1] % size:
        raise ValueError(f"{kernel}: x {tuple(x.shape)}: its last dimension is no multiple of the group size {size}")
    if x.dtype not in FLOATS:
        raise TypeError(f"{kernel}: x is {x.dtype}, where float32, bfloat16 or float16 is needed")
    if transform is not None:
        shape = (size, size) if transform.ndim == 2 else (x.shape[-1] // size, size, size)
        check_tensor(transform, f"{kernel}: transform", FLOATS, shape, x.device)


def as_rows(x: Tensor) -> Tensor:
    """`(M, I)` with contiguous rows; a copy only where the leading dimensions do not flatten."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def constants(rows: int, group_size: int, transform: Tensor | None) -> dict[str, object]:
    """The constants that every quantizing kernel takes."""
    return {
        "G": group_size,
        "TRANSFORM": "none" if transform is None else "shared" if transform.ndim == 2 else "block",
        "ROWS": _block_rows(rows),
        "BLOCKS": BLOCK_COLUMNS // group_size,
        "INTERPRET": INTERPRETED,
    }


def grid(rows: int, features: int) -> tuple[int, int]:
    """Blocks of rows, blocks of columns."""
    return triton.cdiv(rows, _block_rows(rows)), triton.cdiv(features, BLOCK_COLUMNS)


def _block_rows(rows: int) -> int:
    """Rows of a program's tile: few where there are few, so that more programs share the work."""
    return 16 if rows <= 64 else 32 if rows <= 256 else 64


def scale_factor(name: str, rule: str, global_scale: float) -> float:
    """What a group's largest magnitude is multiplied by for its scale, where a format takes it from there."""
    if name == "nvfp4":
        return 1 / (6.0 * global_scale)
    return {("int4", "absmax"): 1 / 7, ("int4", "midrise"): 1 / 8}.get((name, rule), 1.0)


def offline_types(**own: str) -> dict[str, str]:
    """The types of a bfloat16 input and transform, and a kernel's own, for compiling it offline."""
    common = {"x": "*bf16", "transform": "*bf16", "M": "i32", "I": "i32", "stride_x": "i32", "inverse_g": "fp32"}
    return common | own


def offline_products(transform: str) -> tuple[str, ...]:
    """Patterns of the tensor core instructions that apply a bfloat16 transform."""
    return () if transform == "none" else (r"mma\.sync\S*m16n8k16\S*bf16\.bf16",)


def offline_constants(name: str, transform: str) -> dict[str, object]:
    """The constants of a large launch."""
    size = 16 if name == "nvfp4" else 32
    absent = {"transform": None} if transform == "none" else {}
    return absent | {
        "G": size,
        "TRANSFORM": transform,
        "ROWS": 64,
        "BLOCKS": BLOCK_COLUMNS // size,
        "INTERPRET": False,
    }
