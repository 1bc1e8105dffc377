"""Eigenvalues and eigenvectors of many small symmetric positive definite matrices, without waiting for the device.

Layouts: matrices `(B, G, G)` float64, G = 16 or 32; values `(B, G)`, rising; vectors `(B, G, G)`, in columns.
One-sided Jacobi: columns of `A V` are rotated in pairs, `V` with them, until all are orthogonal; then `A V = V D`. A
program has one matrix in registers. A round rotates G/2 disjoint pairs at once: i and j with `i + j = round` modulo
G - 1, and with the last column the i that is its own partner. Convergence is quadratic; what is not positive definite
comes out with some value that is not positive, or NaN.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from wush_kernels.offline import Case
from wush_kernels.support import check_tensor, on_device, require_support

MAX_SWEEPS = 40  # 16 are too few where sizes differ by 10^9 and more
# A sweep whose largest cosine between columns was below this leaves cosines of its square over the relative distance of
# the two values: float64's precision also where these are close.
CONVERGED = 1e-12


@triton.jit
def _kernel(matrices, values, vectors, MAX_SWEEPS: tl.constexpr, CONVERGED: tl.constexpr, G: tl.constexpr):
    base = tl.program_id(0).to(tl.int64) * G * G
    i, k = tl.arange(0, G), tl.arange(0, G)
    # Row i of a tile is column i of `A V`, or of V.
    a = tl.load(matrices + base + i[:, None] * G + k[None, :])
    size = tl.sum(tl.sum(tl.where(i[:, None] == k[None, :], a, 0.0), 1), 0)
    a = a / size
    v = tl.where(i[:, None] == k[None, :], tl.full((G, G), 1.0, tl.float64), 0.0)
    worst = tl.sum(tl.full((G,), 1.0, tl.float64), 0)
    sweep = 0
    while (sweep < MAX_SWEEPS) & (worst > CONVERGED):
        worst = worst * 0.0
        for r in range(G - 1):
            j = (r - i + G - 1) % (G - 1)
            j = tl.where(j == i, G - 1, j)
            j = tl.where(i == G - 1, r * (G // 2) % (G - 1), j)
            partners = tl.broadcast_to(j[:, None], (G, G))
            other_a, other_v = tl.gather(a, partners, 0), tl.gather(v, partners, 0)
            own, other, cross = tl.sum(a * a, 1), tl.sum(other_a * other_a, 1), tl.sum(a * other_a, 1)
            worst = tl.maximum(worst, tl.max(tl.abs(cross) / tl.sqrt(own * other), 0))
            # The tangent of the smaller angle that makes the two orthogonal, as seen from the lower of them.
            first = i < j
            half = tl.where(first, other - own, own - other) * 0.5
            root = tl.abs(half) + tl.sqrt(half * half + cross * cross)
            tangent = tl.where(cross == 0.0, 0.0, tl.where(half < 0, -cross, cross) / root)
            cosine = 1.0 / tl.sqrt(1.0 + tangent * tangent)
            sine = tl.where(first, -tangent, tangent) * cosine
            a = a * cosine[:, None] + other_a * sine[:, None]
            v = v * cosine[:, None] + other_v * sine[:, None]
        sweep += 1

    value = tl.where(worst <= CONVERGED, tl.sum(a * v, 1), float("nan"))
    earlier = (value[None, :] < value[:, None]) | ((value[None, :] == value[:, None]) & (k[None, :] < i[:, None]))
    rank = tl.where(value == value, tl.sum(earlier.to(tl.int32), 1), i)
    tl.store(values + tl.program_id(0) * G + rank, value * size)
    tl.store(vectors + base + k[None, :] * G + rank[:, None], v)


@on_device
def eigen(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Values `(B, G)` and vectors `(B, G, G)` of symmetric positive definite matrices `(B, G, G)` float64.

    Raises `ValueError` or `TypeError` for tensors that do not fit, `RuntimeError` where kernels cannot run.
    """
    require_support(matrices, "eigen")
    matrices = matrices.contiguous()
    size = matrices.shape[-1]
    if size not in (16, 32):
        raise ValueError(f"eigen: matrices of size {size}, where 16 or 32 is needed; use torch.linalg.eigh")
    check_tensor(matrices, "eigen: matrices", (torch.float64,), (None, size, size), matrices.device)
    values, vectors = matrices.new_empty(matrices.shape[:2]), torch.empty_like(matrices)
    if len(matrices):
        _kernel[(len(matrices),)](
            matrices, values, vectors, MAX_SWEEPS=MAX_SWEEPS, CONVERGED=CONVERGED, G=size, enable_fp_fusion=False
        )
    return values, vectors


def reference_eigen(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """The same by LAPACK; signs, and the vectors of equal values, are arbitrary in both."""
    values, vectors = torch.linalg.eigh(matrices)
    return values, vectors


def offline_cases() -> Iterator[Case]:
    """Both sizes."""
    for size in (16, 32):
        yield Case(
            f"size {size}", _kernel, dict.fromkeys(("matrices", "values", "vectors"), "*fp64"),
            {"MAX_SWEEPS": MAX_SWEEPS, "CONVERGED": CONVERGED, "G": size},
            dict.fromkeys((90, 100, 120), ("mul.rn.f64",)),
        )  # fmt: skip
