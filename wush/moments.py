"""Second moments of weights and activations, their damping and factorizations (method: second moments).

Shape legend: `O` output features, `I` input features, `N` blocks, `G` block size, `M` tokens.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from wush.device import found, has_kernels
from wush.errors import NumericError

log = logging.getLogger(__name__)

DAMPING = 0.01
MAX_DOUBLINGS = 10


@dataclass(frozen=True)
class Inputs:
    """What is known of a linear's inputs: `M_X`, and each channel's largest magnitude where it was kept.

    `first`: of a part of a layer's tiles the number of its first one; None for all of them.
    """

    moments_ngg: Tensor
    peaks_ng: Tensor | None = None
    first: int | None = None

    @property
    def block_size(self) -> int:
        """`G`."""
        return self.moments_ngg.shape[-1]

    @property
    def device(self) -> torch.device:
        """Where the moments are, and a transform is fitted."""
        return self.moments_ngg.device

    def block(self, n: int) -> "Inputs":
        """What is known of block n, N = 1."""
        peaks_ng = None if self.peaks_ng is None else self.peaks_ng[n : n + 1]
        return Inputs(self.moments_ngg[n : n + 1], peaks_ng, (self.first or 0) + n)


class SecondMoment:
    """`H = E[x x^T]` of the inputs of one or more linears, accumulated on the inputs' device.

    Sums are float64, of float32 products of one window each. On a GPU with kernels the sums of a whole moment are
    float32, half the memory: products of 16-bit numbers are exact there, a batch's sum is float32 in the tensor cores,
    and each batch is added with one rounding. With a `block_size` only the diagonal blocks of that size are kept: all
    that RTN needs, at a fraction of the cost. With `keep_peaks` each channel's largest magnitude is kept too.
    """

    def __init__(
        self,
        in_features: int,
        device: torch.device | str = "cpu",
        name: str = "input",
        block_size: int | None = None,
        keep_peaks: bool = False,
    ) -> None:
        self.name = name
        self.tokens = 0
        self._block_size = block_size or in_features
        self._by_kernel = self._block_size == in_features and has_kernels(torch.device(device))
        shape = (in_features // self._block_size, self._block_size, self._block_size)
        dtype = torch.float32 if self._by_kernel else torch.float64
        self._sums_ngg = torch.zeros(shape, dtype=dtype, device=device)
        self._peaks_i = torch.zeros(in_features, dtype=torch.float64, device=device) if keep_peaks else None

    def add(self, x: Tensor) -> None:
        """Accumulate inputs `(..., M, I)`; on a CPU one product a leading index, so that batching changes no bit."""
        if not x.numel():
            return
        x_bmi = x.detach().reshape(-1, *x.shape[-2:])
        if self._by_kernel:
            from wush_kernels.second_moment import second_moment

            second_moment(x_bmi.flatten(0, 1), out=self._sums_ngg[0])
        else:
            windows = x_bmi.flatten(0, 1).unsqueeze(0) if x.is_cuda else x_bmi
            for x_mi in windows.float():
                x_ngm = x_mi.unflatten(1, (-1, self._block_size)).permute(1, 2, 0)
                self._sums_ngg += x_ngm @ x_ngm.mT
        if self._peaks_i is not None:
            self._peaks_i = torch.maximum(self._peaks_i, x_bmi.abs().amax((0, 1)).double())
        self.tokens += x_bmi.shape[0] * x_bmi.shape[1]
        self.forget()

    def forget(self) -> None:
        """Make what is derived from the sums, and checked, anew when it is next asked for."""
        for derived in ("_means_ngg", "inverse_factor"):
            self.__dict__.pop(derived, None)

    @cached_property
    def _means_ngg(self) -> Tensor:
        if not self.tokens:
            raise NumericError(f"{self.name}: no calibration token reached this input")
        if found(~self._sums_ngg.isfinite()):
            raise NumericError(f"{self.name}: NaN or infinity in the calibration activations")
        return self._sums_ngg.double() / self.tokens

    @property
    def matrix(self) -> Tensor:
        """`H`, `(I, I)` float64; raises `NumericError` when no token or a non-finite one was seen."""
        if len(self._sums_ngg) > 1:
            raise ValueError(f"{self.name}: only diagonal blocks of {self._block_size} were kept of this moment")
        return self._means_ngg[0]

    def diagonal_blocks(self, block_size: int) -> Tensor:
        """`M_X`, the `(N, G, G)` diagonal blocks of `H`; errors as `matrix`."""
        if block_size == self._block_size:
            return self._means_ngg
        return diagonal_blocks(self.matrix, block_size)

    def inputs(self, block_size: int) -> Inputs:
        """What transforms of `(G, G)` blocks are fitted to; errors as `matrix`."""
        peaks_ng = None if self._peaks_i is None else self._peaks_i.view(-1, block_size)
        return Inputs(self.diagonal_blocks(block_size), peaks_ng)

    @cached_property
    def inverse_factor(self) -> Tensor:
        """`C`, lower triangular with `C C^T = damp(H)^-1`, `(I, I)` float64; errors as `matrix`."""
        return inverse_factor(self.matrix, self.name)


def diagonal_blocks(matrix: Tensor, block_size: int) -> Tensor:
    """The `(N, G, G)` blocks on the diagonal of an `(I, I)` matrix."""
    tiles = matrix.unflatten(0, (-1, block_size)).unflatten(2, (-1, block_size))
    return tiles.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()


def weight_moments(weight_oi: Tensor, block_size: int) -> Tensor:
    """`M_W,b = W_b^T W_b / O` for each column block, `(N, G, G)` float64."""
    blocks_ngo = weight_oi.double().unflatten(1, (-1, block_size)).permute(1, 2, 0)
    part = math.gcd(len(weight_oi), 256)
    if weight_oi.is_cuda and len(blocks_ngo) == 1 and part >= 32:
        # One small product of a tall block would occupy a corner of the GPU; those of its parts fill it.
        blocks_ngo = blocks_ngo[0].unflatten(1, (-1, part)).transpose(0, 1)
        return (blocks_ngo @ blocks_ngo.mT).sum(0, keepdim=True) / len(weight_oi)
    return blocks_ngo @ blocks_ngo.mT / len(weight_oi)


def damp(matrix: Tensor, rho: float | Tensor = DAMPING) -> Tensor:
    """`M + rho * mean(diag M) * I` for one matrix or a batch `(..., G, G)`; `rho` may differ along the batch."""
    damped = matrix.clone()
    diagonal = damped.diagonal(dim1=-2, dim2=-1)
    diagonal += (diagonal.mean(-1) * rho).unsqueeze(-1)
    return damped


def damped_cholesky(matrix: Tensor, what: str | Sequence[str]) -> tuple[Tensor, Tensor]:
    """Lower Cholesky factors of `damp(M)` and `damp(M)` itself, for one matrix or a batch.

    Where a factorization fails, its `rho` is doubled, with a warning that names `what`; after ten doublings a
    `NumericError` is raised. `what` may be one name for each index of the batch's first dimension.
    """
    rho = torch.full(matrix.shape[:-2], DAMPING, dtype=matrix.dtype, device=matrix.device)
    for _ in range(MAX_DOUBLINGS + 1):
        damped = damp(matrix, rho)
        factor, info = torch.linalg.cholesky_ex(damped)
        failed = info != 0
        if not found(failed):
            return factor, damped
        rho = torch.where(failed, 2 * rho, rho)
        log.warning(
            "%s: second moment not positive definite; damping raised to %.3g", named(what, failed), rho.max().item()
        )
    raise NumericError(
        f"{named(what, failed)}: second moment is not positive definite even with damping {rho.max().item() / 2:.3g} "
        "of its mean diagonal; calibrate on more text or leave the layer out with quantize.exclude=[...]"
    )


def named(what: str | Sequence[str], flags: Tensor) -> str:
    """The names, of one for each index of the first dimension, of those with a flag set; one name is for all."""
    if isinstance(what, str):
        return what
    return ", ".join(name for name, own in zip(what, flags.reshape(len(flags), -1).any(1).tolist(), strict=True) if own)


def inverse_factor(matrix: Tensor, what: str) -> Tensor:
    """Lower `C` with `C C^T = damp(M)^-1`, `(I, I)`; errors as `damped_cholesky`. Of an all-zero M it is the identity.

    The Cholesky factor of the matrix with both orders reversed is, reversed back, an upper `U` with
    `U U^T = damp(M)`; then `C = U^-T`.
    """
    identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    # Where no input has any signal no error matters, and any C will do.
    matrix = torch.where((matrix == 0).all(), identity, matrix)
    reversed_lower, _ = damped_cholesky(matrix.flip(0, 1), what)
    upper = reversed_lower.flip(0, 1)
    return torch.linalg.solve_triangular(upper, identity, upper=True).mT.contiguous()
