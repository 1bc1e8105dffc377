"""The block transform kernel: float64's products, within the rounding of float32 sums and of the output."""

import pytest
import torch
from torch import Tensor

from wush_kernels.block_transform import GROUP_SIZES, block_transform, reference_block_transform

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def random_blocks(x: Tensor, size: int, shared: bool, generator: torch.Generator) -> Tensor:
    shape = (size, size) if shared else (x.shape[-1] // size, size, size)
    return torch.randn(shape, generator=generator).to(x.dtype)


def assert_within_rounding(ours: Tensor, x: Tensor, transform: Tensor) -> None:
    """Half a unit in the last place of the output and G roundings of float32 sums (tensor cores truncate: twice)."""
    size = transform.shape[-1]
    blocks, wide = x.double().unflatten(-1, (-1, size)), transform.double().expand(x.shape[-1] // size, -1, -1)
    exact = torch.einsum("...ng,nhg->...nh", blocks, wide).flatten(-2)
    magnitude = torch.einsum("...ng,nhg->...nh", blocks.abs(), wide.abs()).flatten(-2)
    info = torch.finfo(x.dtype)
    bound = exact.abs() * (info.eps / 2) + magnitude * (2 * size * 2.0**-24) + info.smallest_normal * info.eps
    assert ours.dtype == x.dtype
    assert ((ours.cpu().double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("shared", [False, True], ids=["per-block", "shared"])
@pytest.mark.parametrize("size", GROUP_SIZES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_it_is_the_product_of_each_block(
    dtype: torch.dtype, size: int, shared: bool, device: torch.device, generator: torch.Generator
) -> None:
    x = torch.randn(70, 3 * size, generator=generator).to(dtype)
    transform = random_blocks(x, size, shared, generator)
    assert_within_rounding(block_transform(x.to(device), transform.to(device)), x, transform)
    assert_within_rounding(reference_block_transform(x, transform), x, transform)


@pytest.mark.parametrize("shared", [False, True], ids=["per-block", "shared"])
@pytest.mark.parametrize("shape", [(96,), (1, 96), (2, 3, 160), (17, 32), (130, 288)], ids=str)
def test_any_leading_dimensions_and_odd_sizes(
    shape: tuple[int, ...], shared: bool, device: torch.device, generator: torch.Generator
) -> None:
    x = torch.randn(shape, generator=generator).bfloat16()
    transform = random_blocks(x, 32, shared, generator)
    ours = block_transform(x.to(device), transform.to(device))
    assert ours.shape == x.shape
    assert_within_rounding(ours, x, transform)


def test_a_permutation_moves_numbers_exactly(device: torch.device, generator: torch.Generator) -> None:
    x = torch.randn(5, 64, generator=generator).bfloat16()
    permutations = torch.stack([torch.eye(32)[torch.randperm(32, generator=generator)] for _ in range(2)]).bfloat16()
    ours = block_transform(x.to(device), permutations.to(device))
    assert torch.equal(ours.cpu(), reference_block_transform(x, permutations))


def test_mixed_dtypes_are_widened_not_narrowed(device: torch.device, generator: torch.Generator) -> None:
    x = torch.randn(9, 64, generator=generator).bfloat16()
    transform = torch.randn(2, 32, 32, generator=generator)
    assert_within_rounding(block_transform(x.to(device), transform.to(device)), x, transform)


def test_nan_stays_in_its_block(device: torch.device) -> None:
    x = torch.ones(4, 96, device=device)
    x[2, 40] = torch.nan
    for transform in (torch.eye(32, device=device), torch.eye(32, device=device).repeat(3, 1, 1)):
        nan = block_transform(x, transform).isnan().view(4, 3, 32)
        assert nan[2, 1].all()
        assert nan.sum() == 32


def test_no_rows_give_no_rows(device: torch.device) -> None:
    x, transform = torch.empty(0, 64, device=device), torch.empty(2, 32, 32, device=device)
    assert block_transform(x, transform).shape == (0, 64)


def test_bad_input_is_refused_with_what_to_do(device: torch.device) -> None:
    x, transform = torch.zeros(4, 64, device=device), torch.zeros(2, 32, 32, device=device)
    with pytest.raises(ValueError, match="no multiple of 32"):
        block_transform(x[:, :40].contiguous(), transform)
    with pytest.raises(ValueError, match="none of 16, 32 wide"):
        block_transform(x, torch.zeros(8, 8, device=device))
    with pytest.raises(ValueError, match=r"transform: shape \(2, 32, 32\), where \(1, 32, 32\)"):
        block_transform(x[:, :32].contiguous(), transform)
    with pytest.raises(ValueError, match=r"call \.contiguous"):
        block_transform(x, transform.mT)
    with pytest.raises(ValueError, match=r"call \.contiguous"):
        block_transform(x[:, ::2], torch.zeros(1, 32, 32, device=device))
    with pytest.raises(TypeError, match="x: dtype float64"):
        block_transform(x.double(), transform)


def test_it_traces_into_a_graph(device: torch.device) -> None:
    arguments = torch.zeros(4, 64, device=device), torch.zeros(2, 32, 32, device=device)
    torch.library.opcheck(torch.ops.wush.block_transform, arguments, test_utils=("test_schema", "test_faketensor"))
