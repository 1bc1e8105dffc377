"""Every backend of `QuantLinear` on a GPU against the reference's codes: products, graphs, compilation, joining."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import wush
from tests.wush.test_backends import exact, layer
from tests.wush.test_joint import Attention, apart, joined
from wush import backends
from wush.algorithms import QuantizedWeight
from wush.backends import Kernels
from wush.formats import Format
from wush.models import load_random
from wush_kernels.matmul_fp8 import SUMS_BOUND

pytestmark = pytest.mark.gpu

FORMATS = [wush.MXFP4, wush.Mxfp4("ocp"), wush.NVFP4, wush.Nvfp4("calibrated"), wush.INT4, wush.MXFP8]
KERNELS = ["auto", "torch", "triton", "scaled_mm"]
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-22}

by_name = pytest.mark.parametrize("fmt", FORMATS, ids=[f"{fmt.name}-{fmt.scale_rule}" for fmt in FORMATS])
by_kernels = pytest.mark.parametrize("kernels", KERNELS)


@pytest.fixture(autouse=True)
def no_reduced_precision() -> Iterator[None]:
    """Sums of partial products in BF16, which cuBLAS may make by default, are not what is tested."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction
    matmul.allow_bf16_reduced_precision_reduction = False
    yield
    matmul.allow_bf16_reduced_precision_reduction = before


def inputs(rows: int, features: int, dtype: torch.dtype, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, features, generator=generator) * torch.exp2(torch.randn(rows, 1, generator=generator) * 2)
    return x.to(dtype).cuda()


def assert_exact(ours: wush.QuantLinear, x: Tensor) -> None:
    expected, magnitude = exact(ours, x)
    error = (ours(x).double() - expected).abs()
    # With a bias the product may be rounded before it is added.
    size = expected.abs() if ours.bias is None else 2 * expected.abs() + ours.bias.abs().double()
    alpha_bound = size * ROUNDING[x.dtype] + magnitude * SUMS_BOUND
    assert (error <= alpha_bound + 1e-6).all(), (error / (alpha_bound + 1e-6)).max()


@by_name
@by_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products_are_those_of_the_same_codes(fmt: Format, kernels: Kernels, dtype: torch.dtype) -> None:
    for out_features, in_features, bias in ((256, 512, True), (48, 96, False), (1008, 2080, True), (100, 1024, True)):
        ours = layer(fmt, dtype, out_features, in_features, "none", bias).cuda()
        for rows in (1, 3, 16, 64, 65, 200):
            for keep in (True, False):
                wush.use_kernels(ours, kernels, keep)
                assert_exact(ours, inputs(rows, in_features, dtype))


@by_name
@by_kernels
@pytest.mark.parametrize("transform", ["block", "shared"])
def test_with_a_transform_few_outputs_differ(fmt: Format, kernels: Kernels, transform: str) -> None:
    ours = layer(fmt, torch.bfloat16, 256, 512, transform).cuda()
    for rows in (16, 200):
        x = inputs(rows, 512, torch.bfloat16)
        reference = wush.use_kernels(ours, "torch")(x).float()
        found = wush.use_kernels(ours, kernels)(x).float()
        # A code that falls to the other side of a tie moves its row's outputs by one step of one element.
        assert ((found - reference).norm() / reference.norm()) < 0.01


def test_only_fast_accumulation_loses_long_sums() -> None:
    weight = wush.MXFP4.quantize(torch.rand(256, 28672) + 0.5)
    ours = wush.QuantLinear(QuantizedWeight(weight, None), wush.MXFP4).cuda()
    x = (torch.rand(300, 28672) + 0.5).bfloat16().cuda()
    expected, _ = exact(ours, x)
    error = {}
    for fast in (False, True):
        y = wush.use_kernels(ours, "scaled_mm", fast_accumulation=fast)(x).double()
        error[fast] = ((y - expected).abs() / expected).max().item()
    assert error[False] <= ROUNDING[torch.bfloat16] + SUMS_BOUND
    assert error[False] < error[True] < 0.5


@by_kernels
@pytest.mark.parametrize("shape", [(0, 512), (2, 0, 512), (512,), (1, 512), (3, 5, 512), (2, 2, 33, 512)])
def test_any_leading_dimensions(kernels: Kernels, shape: tuple[int, ...]) -> None:
    ours = wush.use_kernels(layer(wush.MXFP4, torch.bfloat16, 256, 512, "none").cuda(), kernels)
    x = torch.randn(shape).bfloat16().cuda()
    assert ours(x).shape == (*shape[:-1], 256)
    if x.numel():
        assert_exact(ours, x)


@by_name
@by_kernels
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_input_gives_a_row_of_nan_and_changes_no_other(fmt: Format, kernels: Kernels, bad: float) -> None:
    for rows in (5, 70):
        ours = wush.use_kernels(layer(fmt, torch.bfloat16, 256, 512).cuda(), kernels)
        x = inputs(rows, 512, torch.bfloat16)
        expected = ours(x)
        x[2, 40] = bad
        found, others = ours(x), torch.arange(rows) != 2
        assert found[2].isnan().all()
        assert torch.equal(found[others.cuda()], expected[others.cuda()])


@by_name
@by_kernels
def test_a_warm_layer_never_waits_for_the_device(fmt: Format, kernels: Kernels) -> None:
    ours = wush.use_kernels(layer(fmt, torch.bfloat16, 256, 512).cuda(), kernels)
    for rows in (16, 200):
        x = inputs(rows, 512, torch.bfloat16)
        ours(x)
        torch.cuda.set_sync_debug_mode("error")
        try:
            ours(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@by_name
@by_kernels
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("rows", [16, 200])
def test_a_captured_graph_replays_the_same_bits(fmt: Format, kernels: Kernels, keep: bool, rows: int) -> None:
    ours = wush.use_kernels(layer(fmt, torch.bfloat16, 256, 512).cuda(), kernels, keep)
    x, other = inputs(rows, 512, torch.bfloat16), inputs(rows, 512, torch.bfloat16, seed=4)
    expected = [ours(x), ours(other)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ours(x)
    graph.replay()
    assert torch.equal(y, expected[0])
    x.copy_(other)
    graph.replay()
    assert torch.equal(y, expected[1])


def test_a_layer_first_run_in_a_capture_is_an_error_with_the_remedy() -> None:
    ours = layer(wush.MXFP4, torch.bfloat16, 256, 512).cuda()
    x = inputs(16, 512, torch.bfloat16)
    with pytest.raises(RuntimeError, match="run it once before"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        ours(x)


@pytest.mark.parametrize("fmt", [wush.MXFP4, wush.NVFP4], ids=lambda f: f.name)
@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_to_one_graph_with_the_same_bits(fmt: Format, kernels: Kernels, mode: str) -> None:
    torch._dynamo.reset()
    ours = wush.use_kernels(layer(fmt, torch.bfloat16, 256, 512).cuda(), kernels)
    compiled = torch.compile(ours, fullgraph=True, mode=mode)
    with torch.no_grad():
        for rows in (1, 16, 200, 16):
            for seed in range(3):
                x = inputs(rows, 512, torch.bfloat16, seed)
                expected = ours(x)  # first, so that what it keeps is not in the memory of a graph
                assert torch.equal(compiled(x).clone(), expected)


# Joint layers


@by_kernels
@pytest.mark.parametrize("fmt", [wush.MXFP4, wush.NVFP4], ids=lambda f: f.name)
def test_joint_layers_give_what_they_give_apart(fmt: Format, kernels: Kernels) -> None:
    alone, together = apart(fmt=fmt, dtype=torch.bfloat16).cuda(), joined(fmt=fmt, dtype=torch.bfloat16).cuda()
    assert together.q.joint is not None
    assert together.q.joint.whole
    for rows in (1, 16, 200):
        x = inputs(rows, 96, torch.bfloat16)
        expected = wush.use_kernels(alone, kernels)(x)
        torch.testing.assert_close(wush.use_kernels(together, kernels)(x), expected, rtol=2e-2, atol=2e-2)


def captured(block: Attention, x: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    block(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = block(x)
    return graph, y


@pytest.mark.parametrize("changed", [False, True])
@pytest.mark.parametrize("rows", [16, 200])
def test_joint_layers_in_a_graph_are_never_stale(changed: bool, rows: int) -> None:
    block = joined(dtype=torch.bfloat16).cuda()
    block.changed = changed
    x, other = inputs(rows, 96, torch.bfloat16), inputs(rows, 96, torch.bfloat16, seed=4)
    expected = [block(x), block(other)]
    graph, y = captured(block, x)
    for given, right in zip((x.clone(), other), expected, strict=True):
        x.copy_(given)
        graph.replay()
        assert torch.equal(y, right)


@pytest.mark.parametrize("changed", [False, True])
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_joint_layers_compile_to_one_graph(changed: bool, mode: str) -> None:
    torch._dynamo.reset()
    block = joined(dtype=torch.bfloat16).cuda()
    block.changed = changed
    compiled = torch.compile(block, fullgraph=True, mode=mode)
    with torch.no_grad():
        for rows in (16, 200):
            for seed in range(4):
                x = inputs(rows, 96, torch.bfloat16, seed)
                expected = block(x)  # first, so that what it keeps is not in the memory of a graph
                assert torch.equal(compiled(x).clone(), expected)


# Whole models


@pytest.mark.parametrize("fmt", [wush.MXFP4, wush.NVFP4], ids=lambda f: f.name)
def test_a_model_is_as_good_on_every_backend(fmt: Format) -> None:
    model = load_random("llama", 256, 512, 3, 4, 2, 0, "bfloat16", "cuda").model
    ids = torch.randint(0, 256, (4, 64), generator=torch.Generator().manual_seed(5))
    states = wush.original_states(model, ids)
    wush.quantize(model, ids.split(2), format=fmt, transform=wush.Wush(), algorithm=wush.Rtn())
    found = {kernels: wush.evaluate(wush.use_kernels(model, kernels), ids, states).kl for kernels in KERNELS}  # type: ignore[arg-type]
    for kernels in KERNELS:
        assert found[kernels] == pytest.approx(found["torch"], rel=0.1)
    assert backends.chosen(model)


def test_a_model_moves_between_devices_with_its_layers() -> None:
    block = joined(dtype=torch.bfloat16).cuda()
    x = inputs(5, 96, torch.bfloat16)
    expected = block(x)
    block(x)
    moved = copy.deepcopy(block).cpu()
    torch.testing.assert_close(moved(x.cpu()), expected.cpu(), rtol=2e-2, atol=2e-2)
    assert torch.equal(moved.cuda()(x), expected)
