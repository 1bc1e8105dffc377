"""What GPTQ's sweep needs of each block: of transforms `T` and lower triangular factors `C`, in one launch,

    inverse = T^-1;   lower = R^T of a QR factorization of C^T T^-1, its columns divided by their diagonal;
    spread = T C^-T

Layouts: transforms `(P, N, G, G)` in any float type; factors `(N, G, G)` float64; results `(P, N, G, G)` float64.
A program has one transform's matrices in registers. The inverse is found by Gauss-Jordan elimination with the largest
pivot of each column, rows staying where they are; R by modified Gram-Schmidt. A transform that has no inverse gives
values that are not finite.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from wush_kernels.offline import Case
from wush_kernels.spec import FLOATS
from wush_kernels.support import check_tensor, on_device, require_support


@triton.jit
def _row(x, at):
    """The row `(G,)` of a tile where `at` `(G,)` holds."""
    return tl.sum(tl.where(at[:, None], x, 0.0), 0)


@triton.jit
def _column(x, at):
    """The column `(G,)` of a tile where `at` `(G,)` holds."""
    return tl.sum(tl.where(at[None, :], x, 0.0), 1)


@triton.jit
def _inverse(t, i, j, G: tl.constexpr):
    """The rows of the inverse of a tile, and the place `(G,)` of each."""
    inverse = tl.where(i[:, None] == j[None, :], tl.full((G, G), 1.0, tl.float64), 0.0)
    place = tl.full((G,), -1, tl.int32)
    for k in range(G):
        column = _column(t, j == k)
        pivot = tl.argmax(tl.where(place < 0, tl.abs(column), -1.0), 0)
        scale = 1.0 / tl.sum(tl.where(i == pivot, column, 0.0), 0)
        own, own_inverse = _row(t, i == pivot) * scale, _row(inverse, i == pivot) * scale
        at = (i == pivot)[:, None]
        t = tl.where(at, own[None, :], t - column[:, None] * own[None, :])
        inverse = tl.where(at, own_inverse[None, :], inverse - column[:, None] * own_inverse[None, :])
        place = tl.where(i == pivot, k, place)
    return inverse, place


@triton.jit
def _kernel(transforms, factors, inverses, lowers, spreads, N, G: tl.constexpr):
    own = tl.program_id(0).to(tl.int64) * G * G
    factor = factors + (tl.program_id(0) % N).to(tl.int64) * G * G
    i, j = tl.arange(0, G), tl.arange(0, G)
    at = own + i[:, None] * G + j[None, :]
    t = tl.load(transforms + at).to(tl.float64)

    inverse, place = _inverse(t, i, j, G)
    # Where there is no inverse a row may have no place.
    tl.store(inverses + own + place[:, None] * G + j[None, :], inverse, mask=(place >= 0)[:, None])

    product = tl.zeros((G, G), tl.float64)
    for k in range(G):
        product += tl.load(factor + k * G + i)[:, None] * _row(inverse, place == k)[None, :]
    lower = tl.zeros((G, G), tl.float64)
    for k in range(G):
        column = _column(product, j == k)
        ratio = tl.sum(column[:, None] * product, 0) / tl.sum(column * column, 0)
        ratio = tl.where(j > k, ratio, 0.0)
        product -= column[:, None] * ratio[None, :]
        lower = tl.where((i == k)[:, None], tl.where(j == k, 1.0, ratio)[None, :], lower)
    tl.store(lowers + own + j[None, :] * G + i[:, None], lower)

    spread = tl.zeros((G, G), tl.float64)
    for k in range(G):
        column = _column(t, j == k) / tl.load(factor + k * G + k)
        later = tl.load(factor + j * G + k, mask=j > k, other=0.0)
        t -= column[:, None] * later[None, :]
        spread = tl.where((j == k)[None, :], column[:, None], spread)
    tl.store(spreads + at, spread)


@on_device
def coordinates(transforms: Tensor, factors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`inverse`, `lower` and `spread` `(P, N, G, G)` of transforms `(P, N, G, G)` and factors `(N, G, G)`.

    Raises `ValueError` or `TypeError` for tensors that do not fit, `RuntimeError` where kernels cannot run.
    """
    require_support(transforms, "coordinates")
    size = transforms.shape[-1]
    if size not in (16, 32):
        raise ValueError(f"coordinates: blocks of size {size}, where 16 or 32 is needed")
    transforms, factors = transforms.contiguous(), factors.contiguous()
    blocks = transforms.shape[1]
    check_tensor(
        transforms, "coordinates: transforms", (torch.float64, *FLOATS), (None, blocks, size, size), transforms.device
    )
    check_tensor(factors, "coordinates: factors", (torch.float64,), (blocks, size, size), transforms.device)
    inverse, lower, spread = (torch.empty_like(transforms, dtype=torch.float64) for _ in range(3))
    programs = transforms.shape[0] * blocks
    if programs:
        _kernel[(programs,)](transforms, factors, inverse, lower, spread, blocks, G=size, enable_fp_fusion=False)
    return inverse, lower, spread


def reference_coordinates(transforms: Tensor, factors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same by LAPACK."""
    transforms = transforms.double()
    inverse = torch.linalg.inv(transforms)
    lower = torch.linalg.qr(factors.mT @ inverse, mode="r").R.mT
    lower = lower / lower.diagonal(dim1=-2, dim2=-1).unsqueeze(-2)
    return inverse, lower, torch.linalg.solve_triangular(factors, transforms.mT, upper=False).mT


def offline_cases() -> Iterator[Case]:
    """Both sizes, of bfloat16 transforms."""
    for size in (16, 32):
        types = dict.fromkeys(("factors", "inverses", "lowers", "spreads"), "*fp64")
        yield Case(
            f"size {size}", _kernel, types | {"transforms": "*bf16", "N": "i32"}, {"G": size},
            dict.fromkeys((90, 100, 120), ("mul.rn.f64",)), odd=("N",),
        )  # fmt: skip
