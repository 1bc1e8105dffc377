"""Block transforms `T`: `(N, G, G)`, or `(G, G)` where all blocks share one (method: transforms).

Activations are multiplied by `T` and weights by its inverse, so that the product of a layer does not change.
To add a transform, subclass `Transform` and return `T` in float64 from `fit`.
Shape legend: `O` output features, `I` input features, `N` blocks, `G` block size.
"""

import functools
import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from wush.device import found, has_kernels
from wush.errors import NumericError
from wush.moments import Inputs, damp, damped_cholesky, named, weight_moments

log = logging.getLogger(__name__)

# Entries of a row this close to its largest, relatively, are as large: which of them rounding makes the largest must
# not matter where they are equal by construction, and others are nearly never this close.
TIED = 1e-6


class Transform(ABC):
    """A way to choose `T` from a weight and what is known of its inputs.

    `needs_peaks`: whether it reads `Inputs.peaks_ng`, which is kept only for such a transform.
    `refit`: whether GPTQ fits `T_b` anew on each block as updated so far (it does not matter to RTN).
    `share`: whether linears that are fed by one tensor get one transform, fitted on their joined weights.
    """

    name: ClassVar[str]
    needs_peaks: ClassVar[bool] = False
    refit: bool = False
    share: bool = False

    @abstractmethod
    def fit(self, weight_oi: Tensor, inputs: Inputs, what: str = "layer") -> Tensor:
        """`T` in float64 for a weight `(O, I)` with such inputs; errors and warnings name `what`.

        `what` is the layer's full name (of several that share T: their names, joined). What is drawn at random is
        drawn from a seed, this name and the tile's number, so that no order of fitting matters.
        """

    def fit_each(self, weights: Sequence[Tensor], inputs: Inputs, names: Sequence[str]) -> Tensor:
        """The transforms of several weights with the same inputs, stacked; to overload where they fit in one batch."""
        fitted = [self.fit(weight, inputs, what) for weight, what in zip(weights, names, strict=True)]
        return torch.stack(fitted)


@dataclass(frozen=True)
class Identity(Transform):
    """`T = I`: the format alone."""

    share = True
    name: ClassVar[str] = "i"

    def fit(self, weight_oi: Tensor, inputs: Inputs, what: str = "layer") -> Tensor:
        return _identity_on(inputs.device, inputs.block_size)


@dataclass(frozen=True)
class RandomRotation(Transform):
    """A Haar-random orthogonal matrix: one for every tile of every layer, or with `per_tile` each its own."""

    seed: int = 0
    per_tile: bool = False
    share = True
    name: ClassVar[str] = "r"

    def fit(self, weight_oi: Tensor, inputs: Inputs, what: str = "layer") -> Tensor:
        if not self.per_tile:
            return _rotation_on(inputs.device, inputs.block_size, self.seed)
        size = inputs.block_size
        own = [torch.randn(size, size, dtype=torch.float64, generator=g) for g in _draws(self.seed, what, inputs)]
        return _rotations(torch.stack(own)).to(inputs.device)


@dataclass(frozen=True)
class Hadamard(Transform):
    """`T = Hd`: the data-free baseline."""

    share = True
    name: ClassVar[str] = "h"

    def fit(self, weight_oi: Tensor, inputs: Inputs, what: str = "layer") -> Tensor:
        return _hadamard_on(inputs.device, inputs.block_size)


@dataclass(frozen=True)
class SmoothQuant(Transform):
    """`T = diag(1 / s)`, `s_i = max|x_i|^alpha / max_o|w_oi|^(1 - alpha)` (Xiao et al. 2023, equation 4).

    `alpha`, 0 to 1: how much of the outliers moves to the weight. `s` is 1 for a channel that is all zero on a side,
    whose product is zero with any s.
    """

    alpha: float = 0.5
    refit: bool = True
    share: bool = True
    name: ClassVar[str] = "sq"
    needs_peaks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha}: SmoothQuant needs a number from 0 to 1")

    def fit(self, weight_oi: Tensor, inputs: Inputs, what: str = "layer") -> Tensor:
        if inputs.peaks_ng is None:
            raise ValueError(f"{what}: sq needs the peaks of the inputs; use SecondMoment(..., keep_peaks=True)")
        peaks_ng = inputs.peaks_ng.double()
        weights_ng = weight_oi.double().abs().amax(0).view_as(peaks_ng)
        inverse_ng = weights_ng.pow(1 - self.alpha) / peaks_ng.pow(self.alpha)
        return torch.diag_embed(torch.where((peaks_ng > 0) & (weights_ng > 0), inverse_ng, 1.0))


@dataclass(frozen=True)
class Hu(Transform):
    """`T = Hd U^T L^T` (the paper's equation 15): the rotation `Hd U^T`, of `y = L^T x`.

    Both second moments get a constant diagonal, of the weight 1 and of the inputs mean(S^2): nothing is balanced.
    `signs`: as of `Wush`.
    """

    refit: bool = True
    share: bool = False
    signs: int | None = None
    name: ClassVar[str] = "hu"

    def fit(self, weight_oi: Tensor, inputs: Inputs, what: str = "layer") -> Tensor:
        return self.fit_each([weight_oi], inputs, [what])[0]

    def fit_each(self, weights: Sequence[Tensor], inputs: Inputs, names: Sequence[str]) -> Tensor:
        joint = _Joint.of(weights, inputs, names, self.signs)
        return joint.or_identity(_hadamard_on(inputs.device, inputs.block_size) @ joint.rows)


@dataclass(frozen=True)
class Wus(Transform):
    """`T = S^-1/2 U^T L^T`: WUSH without its Hadamard backbone; `signs` as of `Wush`."""

    refit: bool = True
    share: bool = False
    signs: int | None = None
    name: ClassVar[str] = "wus"

    def fit(self, weight_oi: Tensor, inputs: Inputs, what: str = "layer") -> Tensor:
        return self.fit_each([weight_oi], inputs, [what])[0]

    def fit_each(self, weights: Sequence[Tensor], inputs: Inputs, names: Sequence[str]) -> Tensor:
        joint = _Joint.of(weights, inputs, names, self.signs)
        return joint.or_identity(joint.scaled(0.5))


@dataclass(frozen=True)
class Wush(Transform):
    """`T = Hd S^-1/2 U^T L^T`: both sides get the same second moment, and its diagonal is constant.

    `power` p, 0 to 1: `T_p = Hd S^(p-1) U^T L^T`, with which inputs have the moment `Hd S^2p Hd^T` and the weight
    `Hd S^(2-2p) Hd^T`: 1 is `hu`, 1/2 balances them, 0 is `hu` with the sides exchanged.
    `signs`: None takes the canonical signs of eigenvectors (`_canonical`), a seed random ones, each tile its own: the
    method leaves them free, and results depend on them.
    """

    refit: bool = True
    share: bool = False
    signs: int | None = None
    power: float = 0.5
    name: ClassVar[str] = "wush"

    def __post_init__(self) -> None:
        if not 0 <= self.power <= 1:
            raise ValueError(f"power={self.power}: wush needs a number from 0 to 1")

    def fit(self, weight_oi: Tensor, inputs: Inputs, what: str = "layer") -> Tensor:
        return self.fit_each([weight_oi], inputs, [what])[0]

    def fit_each(self, weights: Sequence[Tensor], inputs: Inputs, names: Sequence[str]) -> Tensor:
        joint = _Joint.of(weights, inputs, names, self.signs)
        return joint.or_identity(_hadamard_on(inputs.device, inputs.block_size) @ joint.scaled(self.power))


@dataclass(frozen=True)
class _Joint:
    """What HU, WUS and WUSH are made of, for each weight P and tile N.

    `squared` `(P, N, G)`: S^2, rising, the eigenvalues of `L^T damp(M_X) L = U S^2 U^T`; `rows` `(P, N, G, G)`:
    `U^T L^T`, with the chosen signs; `dead` `(P, N)`: tiles whose inputs or weights are all zero.
    """

    squared: Tensor
    rows: Tensor
    dead: Tensor

    @classmethod
    def of(cls, weights: Sequence[Tensor], inputs: Inputs, names: Sequence[str], signs: int | None) -> "_Joint":
        """Of weights with the same inputs; raises `NumericError` where a moment is not finite or indefinite."""
        of_weights = torch.stack([weight_moments(weight, inputs.block_size) for weight in weights])
        of_inputs = inputs.moments_ngg.double()
        dead = (_powers(of_weights) == 0) | (_powers(of_inputs) == 0)
        _warn_of_dead(dead, inputs, names)
        # Of a dead tile nothing is wanted, but the others' factorizations must not fail with its own.
        of_weights = _identity_where(dead, of_weights)
        of_inputs = _identity_where(dead, of_inputs.expand_as(of_weights))
        tile = "" if inputs.first is None else f" tile {inputs.first}"
        lower, _ = damped_cholesky(of_weights, [f"{what} weight{tile}" for what in names])
        squared, vectors = symmetric_eigen(lower.mT @ damp(of_inputs) @ lower)
        indefinite = ~(squared > 0)
        if found(indefinite):
            where = named([f"{what} input{tile}" for what in names], indefinite)
            raise NumericError(
                f"{where}: second moment is not positive definite; calibrate on more text or leave the layer out with "
                "quantize.exclude=[...]"
            )
        rows = _canonical(vectors.mT @ lower.mT)
        return cls(squared, rows if signs is None else rows * _random_signs(signs, inputs, names), dead)

    def scaled(self, power: float) -> Tensor:
        """`S^(p-1) U^T L^T`, `(P, N, G, G)`."""
        return self.squared.pow((power - 1) / 2).unsqueeze(-1) * self.rows

    def or_identity(self, transform: Tensor) -> Tensor:
        """Transforms `(P, N, G, G)`, those of dead tiles replaced by the identity: for them any would do."""
        return _identity_where(self.dead, transform)


def _canonical(rows: Tensor) -> Tensor:
    """Rows `(..., G, G)` of `U^T L^T`, each with the sign that makes its entry of largest magnitude positive.

    An eigenvector's sign is free and a factorization's is decided by rounding; WUSH mixes rows, so that it decides
    what is rounded where. Of entries that tie, to `TIED`, the first one counts. No rule is continuous: a row flips
    where a change of the moments makes another entry, of the other sign, the largest. Measured, with every weight and
    every entry of M_X changed by 1e-7, 1e-5 and 1e-3: no row, at most 0.01%, and 0.4 to 0.6% of the rows of 1,000
    random tiles; at 1e-3 0.2 to 1% in a middle block of SmolLM2-135M, none at 1e-5.
    Equal eigenvalues leave their vectors free beyond the sign, and those stay as the factorization finds them.
    """
    magnitudes = rows.abs()
    largest = magnitudes >= (1 - TIED) * magnitudes.amax(-1, keepdim=True)
    places = _places_on(rows.device, rows.shape[-1])
    # NaN has no largest entry; what is not finite is found later, or was.
    first = torch.where(largest, places, rows.shape[-1] - 1).amin(-1, keepdim=True)
    return torch.where(rows.gather(-1, first) < 0, -rows, rows)


def _random_signs(seed: int, inputs: Inputs, names: Sequence[str]) -> Tensor:
    """Signs `(P, N, G, 1)` float64 of the rows of each layer's tiles."""
    drawn = [
        torch.stack([torch.randint(0, 2, (inputs.block_size, 1), generator=g) for g in _draws(seed, what, inputs)])
        for what in names
    ]
    return (2.0 * torch.stack(drawn).double() - 1).to(inputs.device, non_blocking=True)


def _draws(seed: int, what: str, inputs: Inputs) -> Iterator[torch.Generator]:
    """A generator for each tile, seeded by the seed, the layer's name and the tile's number in the layer."""
    for tile in range(inputs.first or 0, (inputs.first or 0) + len(inputs.moments_ngg)):
        digest = hashlib.sha256(f"{seed} {what} {tile}".encode()).digest()
        yield torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)


def _powers(moments: Tensor) -> Tensor:
    """The largest diagonal entry of moments `(..., G, G)`: zero only where the whole moment is."""
    return moments.diagonal(dim1=-2, dim2=-1).amax(-1)


def _identity_where(flags: Tensor, matrices: Tensor) -> Tensor:
    """Matrices `(..., G, G)` float64, those with a flag `(...)` replaced by the identity."""
    return torch.where(flags[..., None, None], _identity_on(matrices.device, matrices.shape[-1]), matrices)


def _warn_of_dead(dead: Tensor, inputs: Inputs, names: Sequence[str]) -> None:
    """Say which layers have dead tiles, and how many, when a layer is fitted as a whole."""
    if inputs.first is not None or not found(dead):
        return
    for what, count in zip(names, dead.sum(1).tolist(), strict=True):
        if count:
            log.warning(
                "%s: %d of its %d tiles of %d channels have only zeros for inputs or weights; they take the identity",
                what, count, dead.shape[1], inputs.block_size,
            )  # fmt: skip


def symmetric_eigen(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues `(..., G)`, rising, and eigenvectors `(..., G, G)`, in columns, of positive definite matrices."""
    size = matrices.shape[-1]
    if has_kernels(matrices.device) and size in (16, 32):
        from wush_kernels.eigen import eigen

        values, vectors = eigen(matrices.reshape(-1, size, size))
        return values.view(matrices.shape[:-1]), vectors.view(matrices.shape)
    return torch.linalg.eigh(matrices)  # on a GPU it waits for the device: torch offers no unchecked variant


# Kept on each device: a copy to a GPU waits for it, and GPTQ fits tile by tile.
@functools.cache
def _rotation_on(device: torch.device, size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return _rotations(torch.randn(size, size, dtype=torch.float64, generator=generator)).to(device)


def _rotations(gaussian: Tensor) -> Tensor:
    """Haar-random rotations of Gaussian matrices `(..., G, G)`; the signs of R's diagonal would else bias them."""
    q, r = torch.linalg.qr(gaussian)
    return q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)


@functools.cache
def _identity_on(device: torch.device, size: int) -> Tensor:
    return torch.eye(size, dtype=torch.float64, device=device)


@functools.cache
def _places_on(device: torch.device, size: int) -> Tensor:
    return torch.arange(size, device=device)


@functools.cache
def _hadamard_on(device: torch.device, size: int) -> Tensor:
    return hadamard(size).to(device)


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


def transform_weight(weight_oi: Tensor, transform: Tensor, what: str = "layer") -> Tensor:
    """`W_b T_b^-1` on each block, in float64: the inverse is that of the transform as given (rounded)."""
    return apply_blocks(weight_oi.double(), inverse(transform, what).mT)


def inverse(transform: Tensor, what: str | Sequence[str] = "layer") -> Tensor:
    """The inverses, float64, of transforms `(..., G, G)`; a `NumericError` names `what` where there is none.

    `what` may be one name for each index of the first dimension.
    """
    inverse, info = torch.linalg.inv_ex(transform.double())
    if found(info != 0):
        raise NumericError(
            f"{named(what, info != 0)}: its transform has no inverse in {str(transform.dtype).removeprefix('torch.')}"
        )
    return inverse
