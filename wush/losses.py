"""Layer losses: how far each quantized linear's outputs are from the original's, on held-out tokens and in theory.

Shape legend: `O` output features, `I` input features, `N` blocks, `G` block size, `M` tokens, `D` draws.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from wush.decoder import BlockCalls, run_block
from wush.errors import NumericError
from wush.linear import QuantLinear
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


def layer_losses(
    block: nn.Module,
    index: int,
    originals: Mapping[str, nn.Linear],
    moments: Mapping[str, Tensor],
    calls: Sequence[BlockCalls],
    device: torch.device,
) -> dict[str, LayerLoss]:
    """The losses of the `QuantLinear`s of a decoder block, by name; none for one that no token of `calls` reaches.

    `originals`: the linears they replace; `moments`: `M_X` `(N, G, G)` of each. Raises `NumericError` that names a
    layer whose output is not finite.
    """
    with _compared(block, originals, device) as measured:
        for call in calls:
            run_block(block, call.hidden.to(device), call.arguments[index])
    losses = {}
    for name, sums in measured.items():
        if not sums.outputs:
            continue
        layer = block.get_submodule(name)
        assert isinstance(layer, QuantLinear)
        expected = theory(originals[name].weight, layer.transform, moments[name], layer.name)
        error, power, *predicted = torch.cat([sums.squares, expected]).tolist()
        if not error < float("inf"):
            raise NumericError(f"{layer.name}: its output on held-out tokens is not finite")
        losses[name] = LayerLoss(error / sums.outputs, share(error, power), *predicted)
    return losses


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
    peaks_x, peaks_w = (values.abs().amax(-1).square() for values in (x_ndg, w_ong))
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


@dataclass
class _Sums:
    """Of one linear: its squared errors and its squared exact outputs without bias, `(2,)`, and how many there were."""

    device: torch.device
    outputs: int = 0
    squares: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.squares = torch.zeros(2, dtype=torch.float64, device=self.device)

    def add(self, output: Tensor, exact: Tensor, bias: Tensor | None) -> None:
        product = exact.float() if bias is None else exact.float() - bias.float()
        pair = (output.float() - exact.float(), product)
        self.squares += torch.stack([values.square().sum(dtype=torch.float64) for values in pair])
        self.outputs += exact.numel()


@contextmanager
def _compared(block: nn.Module, originals: Mapping[str, nn.Linear], device: torch.device) -> Iterator[dict[str, _Sums]]:
    """While open, each quantized linear is compared with its original, and hands on the original's output."""
    measured = {name: _Sums(device) for name in originals}

    def compare(name: str, x: Tensor, output: Tensor) -> Tensor:
        exact = originals[name](x)
        measured[name].add(output, exact, originals[name].bias)
        return exact

    handles = [
        block.get_submodule(name).register_forward_hook(
            lambda _, args, output, name=name: compare(name, args[0], output)
        )
        for name in originals
    ]
    try:
        yield measured
    finally:
        for handle in handles:
            handle.remove()
