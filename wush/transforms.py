"""Block transforms `T`: `(N, G, G)`, or `(G, G)` where all blocks share one (method: transforms).

Activations are multiplied by `T` and weights by its inverse, so that the product of a layer does not change.
To add a transform, subclass `Transform` and return `T` in float64 from `fit`.
Shape legend: `O` output features, `I` input features, `N` blocks, `G` block size.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from wush.errors import NumericError
from wush.moments import damp, damped_cholesky, weight_moments


class Transform(ABC):
    """A way to choose `T` from a weight and the second moments of its inputs.

    `refit`: whether GPTQ fits `T_b` anew on each block as updated so far (it does not matter to RTN).
    """

    name: ClassVar[str]
    refit: bool = False

    @abstractmethod
    def fit(self, weight_oi: Tensor, moments_ngg: Tensor, what: str = "layer") -> Tensor:
        """`T` in float64 for a weight `(O, I)` and `M_X` `(N, G, G)`; errors and warnings name `what`."""


@dataclass(frozen=True)
class Identity(Transform):
    """`T = I`: the format alone."""

    name: ClassVar[str] = "i"

    def fit(self, weight_oi: Tensor, moments_ngg: Tensor, what: str = "layer") -> Tensor:
        return torch.eye(moments_ngg.shape[-1], dtype=torch.float64, device=moments_ngg.device)


@dataclass(frozen=True)
class RandomRotation(Transform):
    """A Haar-random orthogonal matrix, the same for every block of every layer."""

    seed: int = 0
    name: ClassVar[str] = "r"

    def fit(self, weight_oi: Tensor, moments_ngg: Tensor, what: str = "layer") -> Tensor:
        size = moments_ngg.shape[-1]
        generator = torch.Generator().manual_seed(self.seed)
        q, r = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))
        return (q * r.diagonal().sign()).to(moments_ngg.device)


@dataclass(frozen=True)
class Hadamard(Transform):
    """`T = Hd`: the data-free baseline."""

    name: ClassVar[str] = "h"

    def fit(self, weight_oi: Tensor, moments_ngg: Tensor, what: str = "layer") -> Tensor:
        return hadamard(moments_ngg.shape[-1]).to(moments_ngg.device)


@dataclass(frozen=True)
class Wus(Transform):
    """`T = S^-1/2 U^T L^T`: WUSH without its Hadamard backbone."""

    refit: bool = True
    name: ClassVar[str] = "wus"

    def fit(self, weight_oi: Tensor, moments_ngg: Tensor, what: str = "layer") -> Tensor:
        lower, _ = damped_cholesky(weight_moments(weight_oi, moments_ngg.shape[-1]), f"{what} weight")
        squared, vectors = torch.linalg.eigh(lower.mT @ damp(moments_ngg.double()) @ lower)
        if not (squared > 0).all():
            raise NumericError(
                f"{what} input: second moment is not positive definite (a group of channels may be all zero); "
                "calibrate on more text or leave the layer out with quantize.exclude=[...]"
            )
        # S^2 are the eigenvalues, so S^-1/2 is their power -1/4.
        return squared.pow(-0.25).unsqueeze(-1) * (vectors.mT @ lower.mT)


@dataclass(frozen=True)
class Wush(Transform):
    """`T = Hd S^-1/2 U^T L^T`: both sides get the same second moment, and its diagonal is constant."""

    refit: bool = True
    name: ClassVar[str] = "wush"

    def fit(self, weight_oi: Tensor, moments_ngg: Tensor, what: str = "layer") -> Tensor:
        balanced = Wus().fit(weight_oi, moments_ngg, what)
        return hadamard(balanced.shape[-1]).to(balanced.device) @ balanced


def hadamard(size: int) -> Tensor:
    """The normalized Sylvester-Hadamard matrix `(size, size)`, float64; `size` must be a power of two."""
    if size < 1 or size & (size - 1):
        raise ValueError(f"a Sylvester-Hadamard matrix needs a power of two, not {size}; use another transform")
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / size**0.5


def apply_blocks(x: Tensor, transform: Tensor) -> Tensor:
    """`x_b -> T_b x_b` on each block of the last dimension: `(..., I)` by `(N, G, G)` or `(G, G)`, in x's dtype."""
    blocks = x.unflatten(-1, (-1, transform.shape[-1]))
    if transform.ndim == 2:
        return (blocks @ transform.mT).flatten(-2)
    return torch.einsum("...ng,nhg->...nh", blocks, transform).flatten(-2)


def transform_weight(weight_oi: Tensor, transform: Tensor) -> Tensor:
    """`W_b T_b^-1` on each block, in float64: the inverse is that of the transform as given (rounded)."""
    inverse = torch.linalg.inv(transform.double())
    return apply_blocks(weight_oi.double(), inverse.mT)
