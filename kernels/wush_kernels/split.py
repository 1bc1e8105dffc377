"""Products whose columns are split among programs: how many ways, and the end that adds the partial sums.

Kernels hold sums transposed, `(BLOCK_O, BLOCK_M)`, since weights are their tall side; the result is `(M, O)`.
"""

from functools import cache

import torch
import triton
import triton.language as tl

MOST_SPLITS = 16  # of a tile, whose sums one program adds


def plan_splits(tiles: int, steps: int, device: torch.device, per_processor: int, fewest: int) -> int:
    """How many programs share the steps of a tile, with `per_processor` programs at a time on each multiprocessor.

    As many as the multiprocessors hold, one on each, at least; more where they fill the GPU better and each still has
    `fewest` steps.
    """
    if device.type != "cuda":
        return min(2, steps)
    slots = processors(device) * per_processor
    if tiles >= slots:
        return 1
    least = max(1, min(MOST_SPLITS, steps // 2, processors(device) // tiles))
    most = max(least, min(MOST_SPLITS, steps // fewest))
    # A split more costs what a thirtieth of the GPU would.
    return max(range(least, most + 1), key=lambda splits: _share_of_waves(tiles * splits, slots) - splits / 30)


def _share_of_waves(programs: int, slots: int) -> float:
    """How full the GPU is on average, with `slots` programs at a time."""
    return programs / (triton.cdiv(programs, slots) * slots)


@cache
def processors(device: torch.device) -> int:
    """The GPU's multiprocessors."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 16


@triton.jit
def finish(
    sums, bias, out, partial, counters, o, m, M, O, alpha,
    SPLIT: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_M: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Store `alpha * sums + bias`; with several splits the last program of a tile does, in a fixed order."""
    if not SPLIT:
        _store(sums, bias, out, o, m, M, O, alpha, HAS_BIAS)
    else:
        splits = tl.num_programs(2)
        tile = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        within = tl.arange(0, BLOCK_O)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        own = partial + tile.to(tl.int64) * (splits * (BLOCK_O * BLOCK_M)) + within
        tl.store(own + tl.program_id(2) * (BLOCK_O * BLOCK_M), sums)
        tl.debug_barrier()  # every warp's sums come before the ticket that announces them
        if tl.atomic_add(counters + tile, 1) == splits - 1:
            tl.store(counters + tile, 0)
            total = tl.zeros((BLOCK_O, BLOCK_M), tl.float32)
            for split in range(splits):
                total += tl.load(own + split * (BLOCK_O * BLOCK_M), cache_modifier=".cg")
            _store(total, bias, out, o, m, M, O, alpha, HAS_BIAS)


@triton.jit
def _store(sums, bias, out, o, m, M, O, alpha, HAS_BIAS: tl.constexpr):
    y = sums * alpha
    if HAS_BIAS:
        y = y + tl.load(bias + o, mask=o < O, other=0.0).to(tl.float32)[:, None]
    at = out + m.to(tl.int64)[None, :] * O + o[:, None]
    tl.store(at, y.to(out.dtype.element_ty), mask=(o < O)[:, None] & (m < M)[None, :])
