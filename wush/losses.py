"""Layer losses: how far a quantized linear's outputs are from the original's, and what theory says of it.

They are measured by `wush.measure` (`wush.measurement`).
Shape legend: `O` output features, `I` input features, `N` blocks, `G` block size, `D` draws.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from wush.moments import weight_moments
from wush.transforms import apply_blocks, inverse

DRAWS = 1024  # a mean of squared maxima is then known to about 1%, by the same draws in every block


@dataclass(frozen=True)
class LayerLoss:
    """What quantizing a linear costs its output, for the inputs that it gets in the original decoder block.

    `mse`: mean of `(Q(T x) Q(W T^-1)^T - x W^T)^2`; `relative`: the sum of these over that of `(x W^T)^2`.
    `even`, `paper_fp`, `paper_int`: what `mse` is proportional to by three models of rounding, see `theory`.
    `bound`: `sum_b tr(S_b)^2 / G`, which for no T the first two are below.
    """

    mse: float
    relative: float
    even: float
    paper_fp: float
    paper_int: float
    bound: float


def theory(weight_oi: Tensor, transform: Tensor | None, moments_ngg: Tensor, what: str = "layer") -> Tensor:
    """`even`, `paper_fp`, `paper_int` and `bound`, `(4,)` float64, of `T` `(N, G, G)`, `(G, G)` or None, the identity.

    With `A = T M_X T^T`, `B = T^-T M_W T^-1` of each block, `mse` is up to a factor of the format, `2 E[eta^2]`:
    `even`, `sum_b tr A tr B / G`: a side's noise is white, with a fixed share of its power (this project's);
    `paper_fp`, `sum_b sum_i A_ii B_ii`: an element's noise is a fixed share of its power (the paper's equation 19);
    `paper_int`: noise is white and goes with the square of a group's largest magnitude (equation 24), the mean of
    `tr B E|T x|_inf^2` (activations rounded) and `tr A E|T^-T w|_inf^2` (weights). Weights are the rows as they are;
    of x moments alone are known: it is `DRAWS` Gaussian vectors with that second moment, the same for every T.
    All are of the moments as given, undamped, and so is `S` of the bound, unlike that of WUSH.
    """
    size = moments_ngg.shape[-1]
    of_inputs, of_weight = moments_ngg.double(), weight_moments(weight_oi, size)
    root = _symmetric_root(of_inputs)
    bound = torch.linalg.eigvalsh(root @ of_weight @ root).clamp_min(0).sqrt().sum(-1).square().sum() / size
    x_ndg = _normals_on(root.device, size) @ root
    if transform is None:
        w_ong = weight_oi.double().unflatten(1, (-1, size))
    else:
        forth, back = transform.double(), inverse(transform, what)
        of_inputs, of_weight = forth @ of_inputs @ forth.mT, back.mT @ of_weight @ back
        x_ndg = x_ndg @ forth.mT
        w_ong = apply_blocks(weight_oi.double(), back.mT).unflatten(1, (-1, size))
    a_ng, b_ng = (moments.diagonal(dim1=-2, dim2=-1) for moments in (of_inputs, of_weight))
    even = (a_ng.sum(-1) * b_ng.sum(-1)).sum() / size
    peaks_x, peaks_w = (torch.linalg.vector_norm(values, torch.inf, -1).square() for values in (x_ndg, w_ong))
    paper_int = (b_ng.sum(-1) * peaks_x.mean(1) + a_ng.sum(-1) * peaks_w.mean(0)).sum() / 2
    return torch.stack([even, (a_ng * b_ng).sum(), paper_int, bound])


def _symmetric_root(matrices: Tensor) -> Tensor:
    """Of positive semidefinite ones: without damping they may be singular, with no Cholesky factor.

    Unlike other roots it does not depend on the signs of eigenvectors, so devices draw the same vectors.
    """
    values, vectors = torch.linalg.eigh(matrices)
    return vectors * values.clamp_min(0).sqrt().unsqueeze(-2) @ vectors.mT


@functools.cache
def _normals_on(device: torch.device, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(DRAWS, size, dtype=torch.float64, generator=generator).to(device)


def share(error: float, power: float) -> float:
    """A sum of squared errors relative to that of the exact values, which may all be zero."""
    return error / power if power else float(error > 0)
