"""What the paper proves of its transforms, held against the ones that are fitted here; numbers are its equations.

Of each tile, with damped moments: A = T M_X T^T and C = T^-T M_W T^-1, a and c their diagonals, S the singular values
of `L_X^T L_W`, d = G. `sum a_k c_k` is the trace of equation 19: the loss, where rounding adds noise of a fixed share.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import wush
from tests.wush.test_algorithms import moment_of
from tests.wush.test_transforms import assert_relatively_close, balanced_moments, damped, layer
from tests.wush.test_walk import quantize, tiny, tokens
from wush.elements import E2M1, E4M3, Element
from wush.formats import Format
from wush.moments import damp
from wush.transforms import Transform, apply_blocks, transform_weight

SIZE = 16
BALANCED = pytest.mark.parametrize("transform", [wush.Wus(), wush.Wush(), wush.Wush(signs=1)], ids=repr)
Problem = tuple[Tensor, Tensor, wush.Inputs]


@pytest.fixture
def problem(generator: torch.Generator) -> Problem:
    """A weight `(O, I)`, tokens `(M, I)` and what is known of them: three tiles of correlated channels."""
    return layer(generator, SIZE, 24)


def noise(problem: Problem, transform: Tensor) -> Tensor:
    """`sum a_k c_k` of each tile, `(N,)`."""
    a, c, _ = diagonals(problem, transform)
    return (a * c).sum(-1)


def diagonals(problem: Problem, transform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """a, c and S, each `(N, G)`."""
    weight, _, inputs = problem
    x_side, w_side, spectra = balanced_moments(weight, inputs.moments_ngg, transform)
    return x_side.diagonal(dim1=1, dim2=2), w_side.diagonal(dim1=1, dim2=2), spectra


def bound(spectra: Tensor) -> Tensor:
    """`(tr S)^2 / d`, `(N,)`: the least loss (equation 20)."""
    return spectra.sum(-1).square() / spectra.shape[-1]


def fitted(problem: Problem, transform: Transform) -> Tensor:
    return transform.fit(problem[0], problem[2])


def factor(problem: Problem) -> Tensor:
    """L of `M_W = L L^T`, `(N, G, G)`: `y = L^T x` is what the paper's T acts on (equation 15)."""
    return torch.linalg.cholesky(damped(torch.stack([w.T @ w / len(w) for w in problem[0].split(SIZE, dim=1)])))


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=0)


# Floating point (section 4.2)


@pytest.mark.parametrize("transform", [wush.Wush(), wush.Wush(signs=1)], ids=repr)
def test_wush_reaches_the_least_loss(transform: Transform, problem: Problem) -> None:
    matrix = fitted(problem, transform)
    assert_close(noise(problem, matrix), bound(diagonals(problem, matrix)[2]))


def test_no_transform_that_is_found_by_descent_goes_below_the_least_loss(
    problem: Problem, generator: torch.Generator
) -> None:
    """From random matrices, to within some percent of it, which shows that the descent was no weak one."""
    least = bound(diagonals(problem, torch.eye(SIZE, dtype=torch.float64).expand(3, SIZE, SIZE))[2])
    matrix = torch.randn(3, SIZE, SIZE, generator=generator, dtype=torch.float64).requires_grad_()
    optimizer = torch.optim.Adam([matrix], lr=0.02)
    for _ in range(400):
        losses = noise(problem, matrix) / least
        assert (losses > 1 - 1e-9).all()
        optimizer.zero_grad()
        losses.log().sum().backward()
        optimizer.step()
    assert (losses < 1.1).all()


def test_rotations_of_y_and_wus_and_whitening_are_worth_nothing_over_each_other(
    problem: Problem, generator: torch.Generator
) -> None:
    """`tr S^2` (equations 21 and 22): with U' = I, with S' = I and with any orthogonal T."""
    lower, wus = factor(problem), fitted(problem, wush.Wus())
    rotation = wush.RandomRotation(3).fit(problem[0], problem[2])
    spectra = diagonals(problem, wus)[2]
    rows = wus * spectra.flip(-1).sqrt().unsqueeze(-1)  # U^T L^T, its S rising
    whitening = rotation @ (rows / spectra.flip(-1).unsqueeze(-1))
    for matrix in (wus, lower.mT, rotation @ lower.mT, fitted(problem, wush.Hu()), whitening):
        assert_close(noise(problem, matrix), spectra.square().sum(-1))


def test_the_gain_over_rotations_is_from_1_to_d(generator: torch.Generator) -> None:
    """`d tr(S^2) / (tr S)^2` (equation 17): 1 for equal values, more the further one is from the others, d at most."""
    gains = []
    for outlier in (1.0, 3.0, 30.0):
        scales = torch.ones(SIZE, dtype=torch.float64)
        scales[3] = outlier
        weight = torch.linalg.qr(torch.randn(64, SIZE, generator=generator, dtype=torch.float64)).Q * scales
        problem = weight, weight, wush.Inputs(torch.diag(scales)[None])
        rotated, least = (noise(problem, fitted(problem, t)) for t in (wush.Hu(), wush.Wush()))
        gains.append((rotated / least).item())
    assert gains[0] == pytest.approx(1, abs=1e-9)
    assert all(first < second for first, second in pairwise([*gains, SIZE]))


@BALANCED
def test_the_traces_product_is_least_for_wus_and_wush(transform: Transform, problem: Problem) -> None:
    """`tr A tr C >= (tr S)^2`, of a noise that is spread evenly over a group."""
    a, c, spectra = diagonals(problem, fitted(problem, transform))
    assert_close(a.sum(-1) * c.sum(-1), spectra.sum(-1).square())


def test_the_traces_product_is_larger_for_other_transforms(problem: Problem, generator: torch.Generator) -> None:
    random = torch.randn(3, SIZE, SIZE, generator=generator, dtype=torch.float64)
    others = [fitted(problem, t) for t in (wush.Identity(), wush.Hadamard(), wush.SmoothQuant(), wush.Hu())]
    for matrix in (random, *(other.expand_as(random) for other in others)):
        a, c, spectra = diagonals(problem, matrix)
        assert (a.sum(-1) * c.sum(-1) > 1.01 * spectra.sum(-1).square()).all()


def test_powers_of_s_are_symmetric_about_a_half_which_is_the_best(problem: Problem) -> None:
    losses = {p: noise(problem, fitted(problem, wush.Wush(power=p))) for p in (0.0, 0.2, 0.4, 0.5, 0.6, 0.8, 1.0)}
    for p, loss in losses.items():
        assert_close(loss, losses[min(losses, key=lambda q, p=p: abs(q - (1 - p)))])
    for better, worse in pairwise((0.5, 0.6, 0.8, 1.0)):
        assert (losses[better] < losses[worse]).all()
    assert_close(losses[1.0], noise(problem, fitted(problem, wush.Wus())))


@BALANCED
def test_the_gram_matrix_of_t_takes_the_inputs_moment_to_the_weights(transform: Transform, problem: Problem) -> None:
    """`G M_X G = M_W` for `G = T^T T`: whatever orthogonal matrix stands before it, T balances the two."""
    weight, _, inputs = problem
    matrix = fitted(problem, transform)
    gram = matrix.mT @ matrix
    of_weight = damped(torch.stack([w.T @ w / len(w) for w in weight.split(SIZE, dim=1)]))
    assert_relatively_close(gram @ damped(inputs.moments_ngg) @ gram, of_weight)


@BALANCED
@pytest.mark.parametrize(("of_weight", "of_inputs"), [(4.0, 1.0), (1.0, 9.0), (0.3, 0.02)])
def test_scaling_a_side_scales_the_transform(
    of_weight: float, of_inputs: float, transform: Transform, problem: Problem
) -> None:
    """By the square root of their ratio, so that what is rounded on both sides is scaled alike."""
    weight, _, inputs = problem
    scaled = transform.fit(weight * of_weight, wush.Inputs(inputs.moments_ngg * of_inputs**2))
    expected = transform.fit(weight, inputs) * math.sqrt(of_weight / of_inputs)
    assert_relatively_close(scaled, expected)


@BALANCED
def test_the_order_of_outputs_does_not_matter(
    transform: Transform, problem: Problem, generator: torch.Generator
) -> None:
    weight, _, inputs = problem
    shuffled = weight[torch.randperm(len(weight), generator=generator)]
    assert_relatively_close(transform.fit(shuffled, inputs), transform.fit(weight, inputs))


@BALANCED
def test_moments_of_low_rank_reach_the_least_loss_too(transform: Transform, generator: torch.Generator) -> None:
    """Fewer outputs and tokens than channels: by damping, of the damped moments exactly, of the true ones nearly."""
    weight = torch.randn(5, SIZE, generator=generator, dtype=torch.float64)
    x = torch.randn(7, SIZE, generator=generator, dtype=torch.float64)
    problem = weight, x, moment_of(x[None]).inputs(SIZE)
    matrix = fitted(problem, transform)
    a, c, spectra = diagonals(problem, matrix)
    assert_close(a.sum(-1) * c.sum(-1), spectra.sum(-1).square())
    inverse = torch.linalg.inv(matrix)
    true = matrix @ problem[2].moments_ngg @ matrix.mT, inverse.mT @ (weight.T @ weight / 5) @ inverse
    traces = [side.diagonal(dim1=1, dim2=2).sum().item() for side in true]
    singular = torch.linalg.svdvals(x @ weight.T / math.sqrt(7 * 5))
    least = singular.sum().item() ** 2
    assert least <= traces[0] * traces[1] < 1.05 * least


# Integers (section 4.3)


def gaussian(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def laplacian(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Of which every linear map has Laplacian coordinates: a Gaussian times the root of an exponential number."""
    size = -torch.rand(shape[0], 1, generator=generator, dtype=torch.float64).log()
    return size.sqrt() * gaussian(shape, generator)


LARGEST = {
    gaussian: lambda d: min(d, 2 * math.log(2 * d) + 2),  # equation 54
    laplacian: lambda d: math.log(d) ** 2 / 2 + math.log(d) + 1,  # equation 55
}
DRAWN = pytest.mark.parametrize("draw", LARGEST, ids=lambda draw: draw.__name__)
Draw = Callable[[tuple[int, ...], torch.Generator], Tensor]


def drawn(draw: Draw, problem: Problem, generator: torch.Generator, tokens: int = 20_000) -> Tensor:
    """Tokens `(M, N, G)` with the damped moments."""
    root = torch.linalg.cholesky(damped(problem[2].moments_ngg))
    return torch.einsum("ngh,mnh->mng", root, draw((tokens, 3 * SIZE), generator).view(tokens, 3, SIZE))


@DRAWN
@pytest.mark.parametrize(
    "transform", [wush.Identity(), wush.Hadamard(), wush.Hu(), wush.Wus(), wush.Wush()], ids=lambda t: t.name
)
def test_the_largest_of_a_group_is_within_the_lemmas_bounds(
    transform: Transform, draw: Draw, problem: Problem, generator: torch.Generator
) -> None:
    """Lemma A.2: `E max x_k^2` over `max E x_k^2`, however the coordinates depend on each other; and 1 at least."""
    values = apply_blocks(drawn(draw, problem, generator).flatten(1), fitted(problem, transform))
    squares = values.unflatten(1, (3, SIZE)).square()
    ratios = squares.amax(-1).mean(0) / squares.mean(0).amax(-1)
    assert (ratios >= 1).all()
    assert (ratios <= LARGEST[draw](SIZE)).all()


@DRAWN
def test_wush_is_within_the_bounds_of_integers_and_a_rotation_within_its_own(
    draw: Draw, problem: Problem, generator: torch.Generator
) -> None:
    """`|T^-1|_F^2 E|T y|_inf^2`, from 1 to the lemma's bound times `(tr S)^2 / d` (30), or `tr S^2` for rotations (32).

    What Hadamard's matrix is for: the diagonal of `T M_X T^T` is constant, and the lemma's maximum the least.
    """
    x = drawn(draw, problem, generator)
    found = {}
    for transform in (wush.Wush(), wush.Hu(), wush.Wus()):
        matrix = fitted(problem, transform)
        a, c, spectra = diagonals(problem, matrix)
        largest = torch.einsum("ngh,mnh->mng", matrix, x).abs().amax(-1).square().mean(0)
        found[transform.name] = c.sum(-1) * largest
        if transform.name != "wus":
            assert_close(a, a.mean(-1, keepdim=True).expand_as(a))
    for name, least in (("wush", bound(spectra)), ("hu", spectra.square().sum(-1))):
        assert (found[name] > 0.98 * least).all()
        assert (found[name] < LARGEST[draw](SIZE) * least).all()
    assert (found["wush"] < found["wus"]).all()


# Casting (appendix A.5)


def relative_errors(element: Element, lowest: float, binades: int, generator: torch.Generator) -> Tensor:
    """Of numbers whose logarithms are uniform over so many binades from `lowest` on."""
    x = (lowest * torch.exp2(binades * torch.rand(100_000, generator=generator, dtype=torch.float64))).float()
    return ((element.snap(x.clone()) - x) / x).double()


@pytest.mark.parametrize(("element", "mantissa_bits", "smallest", "binades"), [(E2M1, 1, 1.0, 2), (E4M3, 3, 2**-6, 14)])
def test_casting_noise_is_a_fixed_share_of_a_normal_number_and_more_of_a_subnormal_one(
    element: Element, mantissa_bits: int, smallest: float, binades: int, generator: torch.Generator
) -> None:
    """Equation 72: variance `(ln 2)^2 2^-2b / 12` of x^2, `(ln 2)^2 / 48` for E2M1.

    It smooths the grid to even steps of the logarithm. The grid itself has 7% more (E4M3 12%), and a mean of -1%.
    """
    smoothed = math.log(2) ** 2 * 4.0**-mantissa_bits / 12
    errors = relative_errors(element, smallest, binades, generator)
    assert smoothed < errors.square().mean() < 1.15 * smoothed
    assert errors.mean().abs() < 0.15 * smoothed**0.5
    for below, least in ((1, 3.5), (2, 15), (3, 50)):
        assert relative_errors(element, smallest * 2.0**-below, 1, generator).square().mean() > least * smoothed


# Layers and algorithms


@pytest.mark.parametrize("transform", [wush.Identity(), wush.Hadamard(), wush.Wush()], ids=lambda t: t.name)
@pytest.mark.parametrize("fmt", [wush.MXFP4, wush.NVFP4, wush.INT4, wush.Int4("midrise")], ids=repr)
def test_the_losses_of_tiles_add_up_to_the_layers(
    fmt: Format, transform: Transform, generator: torch.Generator
) -> None:
    """`l = sum_b l_b` to 0.97 to 1.05: what tiles' errors have in common is nothing (after equation 4)."""
    size = fmt.group_size
    weight, x, inputs = layer(generator, size, 96, 6)
    matrix = transform.fit(weight, inputs)
    rounded_w = fmt.round_trip(transform_weight(weight, matrix).float()).double()
    rounded_x = fmt.round_trip(apply_blocks(x, matrix).float()).double()
    pieces = [tensor.split(size, dim=1) for tensor in (rounded_x, rounded_w, x, weight)]
    errors = torch.stack([q @ p.T - y @ w.T for q, p, y, w in zip(*pieces, strict=True)])
    assert 0.97 < errors.sum(0).square().sum() / errors.square().sum() < 1.05


def babai(points: Tensor, hessian: Tensor, scales: Tensor, fmt: Format) -> Tensor:
    """Codes of rows `(O, G)` by the nearest plane of the lattice with Gram matrix `hessian`, its order reversed.

    The factor R of `J H J = R^T R` is upper triangular: the last coordinate is chosen first, then the one before with
    the first's error known, and so on.
    """
    upper = torch.linalg.cholesky(hessian.flip(0, 1)).mT
    targets, chosen, codes = points.flip(1) @ upper.T, torch.zeros_like(points), []
    for i in reversed(range(len(hessian))):
        rest = chosen[:, i + 1 :] @ upper[i, i + 1 :]
        elements = fmt.snap(((targets[:, i] - rest) / upper[i, i]).float()[:, None, None], scales, fmt.global_scale)
        chosen[:, i] = fmt.expand(elements, scales, fmt.global_scale).flatten().double()
        codes.append(fmt.element.to_codes(elements).flatten())
    return torch.stack(codes, 1)


@pytest.mark.parametrize("transform", [wush.Identity(), wush.Hadamard(), wush.Wush()], ids=lambda t: t.name)
@pytest.mark.parametrize("fmt", [wush.MXFP4, wush.NVFP4, wush.INT4], ids=lambda f: f.name)
def test_gptq_of_one_tile_is_babais_nearest_plane(
    fmt: Format, transform: Transform, generator: torch.Generator
) -> None:
    weight, x, _ = layer(generator, fmt.group_size, 40, 1)
    weight, moment = weight.float(), moment_of(x[None])
    found = wush.Gptq().quantize_weight(weight, moment, transform, fmt)
    matrix = torch.eye(fmt.group_size) if found.transform is None else found.transform
    matrix = matrix.double().reshape(fmt.group_size, fmt.group_size)
    points = weight.double() @ torch.linalg.inv(matrix)
    hessian = matrix @ damp(moment.matrix) @ matrix.T
    codes = babai(points, hessian, fmt.find_scales(points), fmt)
    assert torch.equal(found.quantized.codes, codes)
    rounded = fmt.quantize(points.float()).codes
    assert not torch.equal(codes, rounded)


@pytest.mark.parametrize("fmt", [wush.MXFP4, wush.NVFP4], ids=lambda f: f.name)
def test_a_transform_takes_4_d_over_d_out_of_a_layers_codes(fmt: Format, generator: torch.Generator) -> None:
    """16 bits an entry and 4 a weight, after equation 9; nothing where all tiles have one fixed transform."""
    for transform in (wush.Wush(), wush.Hadamard()):
        model = tiny("llama").bfloat16()
        report = quantize(model, tokens(generator), fmt, transform=transform, blocks=[0])
        for own in report.blocks[0].layers:
            outputs = model.model.layers[0].get_submodule(own.name).out_features
            expected = 4 * fmt.group_size / outputs if transform.name == "wush" else 0
            assert (own.bits_per_weight - fmt.bits_per_weight) / 4 == pytest.approx(expected)
