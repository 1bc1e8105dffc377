"""Every way to compute a `QuantLinear` against the reference, and which is chosen when."""

import copy
import logging
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import wush
from wush import backends
from wush.algorithms import QuantizedWeight
from wush.backends import DECODE_ROWS, SMALL_TILES, Kernels, Settings, Shape, choose
from wush.formats import Format
from wush.machine import Machine
from wush.operands import PRODUCTS, How, bits_of, operands_of
from wush_kernels.support import INTERPRETED

FORMATS = [
    wush.MXFP4,
    wush.Mxfp4("ocp"),
    wush.NVFP4,
    wush.Nvfp4("calibrated"),
    wush.INT4,
    wush.Int4("midrise"),
    wush.MXFP8,
]
ids = [f"{fmt.name}-{fmt.scale_rule}" for fmt in FORMATS]
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted only where there is no GPU")

H100 = H200 = Machine((9, 0))
ADA = Machine((8, 9))
B200 = Machine((10, 0))
RTX5090 = Machine((12, 0))
A100 = Machine((8, 0), no_triton="A100 has compute capability 8.0; 8.9 or newer is needed")
V100 = Machine((7, 0), no_triton="V100 has compute capability 7.0; 8.9 or newer is needed")
OLD_TRITON = Machine((9, 0), no_triton="Triton 3.2.0 is older than 3.6")
CPU = Machine(None, no_triton="the tensors are on the CPU")
SHAPE = Shape(4096, 4096)


def layer(
    fmt: Format = wush.MXFP4,
    dtype: torch.dtype = torch.float32,
    out_features: int = 48,
    in_features: int = 96,
    transform: str = "block",
    bias: bool = True,
    seed: int = 0,
) -> wush.QuantLinear:
    generator = torch.Generator().manual_seed(seed)
    size = fmt.group_size
    weight = torch.randn(out_features, in_features, generator=generator)
    shape = {"block": (in_features // size, size, size), "shared": (size, size)}.get(transform)
    matrix = None if shape is None else (torch.randn(shape, generator=generator) / size**0.5).to(dtype)
    own_bias = torch.randn(out_features, generator=generator).to(dtype) if bias else None
    quantized = fmt.quantize(weight, global_scale=fmt.weight_global_scale(weight))
    weight = QuantizedWeight(quantized, matrix, fmt.input_global_scale(7.0))
    return wush.QuantLinear(weight, fmt, own_bias, "mlp.up_proj")


def exact(ours: wush.QuantLinear, x: Tensor) -> tuple[Tensor, Tensor]:
    """The float64 product of the reference's codes of a layer without transform, and that of their magnitudes."""
    values = ours.format.round_trip(x, global_scale=ours.input_scale, checked=False).double()
    weight = ours.weight().double()
    bias = 0 if ours.bias is None else ours.bias.double()
    return values @ weight.T + bias, values.abs() @ weight.abs().T


# The choice

FEW = DECODE_ROWS["mxfp4"]  # 4,096 outputs are 64 tiles for 64 tokens
TABLE: list[tuple[Format, Machine, int, Kernels, str, str]] = [
    (wush.MXFP4, H100, 1, "auto", "triton", "matmul_fp8"),
    (wush.MXFP4, H100, FEW, "auto", "triton", "matmul_fp8"),
    (wush.MXFP4, H100, SMALL_TILES // 64 * 64, "auto", "triton", "matmul_fp8"),
    (wush.MXFP4, H100, SMALL_TILES // 64 * 64 + 1, "auto", "triton", "scaled_mm"),
    (wush.MXFP4, H200, 4096, "auto", "triton", "scaled_mm"),
    (wush.MXFP4, H100, 4096, "triton", "triton", "matmul_fp8"),
    (wush.MXFP4, H100, 1, "scaled_mm", "triton", "scaled_mm"),
    (wush.MXFP4, H100, 1, "torch", "torch", "torch"),
    (wush.NVFP4, H100, 1, "auto", "triton", "matmul_half"),
    (wush.NVFP4, H100, DECODE_ROWS["nvfp4"] + 1, "auto", "triton", "half"),
    (wush.NVFP4, H100, 4096, "triton", "triton", "matmul_half"),
    (wush.NVFP4, H100, 1, "scaled_mm", "triton", "half"),
    (wush.MXFP8, H100, 1, "auto", "triton", "half"),
    (wush.INT4, H100, 1, "auto", "triton", "torch"),
    (wush.MXFP4, ADA, 1, "auto", "triton", "matmul_fp8"),
    (wush.MXFP4, ADA, SMALL_TILES // 64 * 64 + 1, "auto", "triton", "scaled_mm"),
    (wush.MXFP4, B200, 1, "auto", "triton", "scaled_mm_fp4"),
    (wush.NVFP4, B200, 4096, "auto", "triton", "scaled_mm_fp4"),
    (wush.MXFP4, replace(B200, no_scaled_fp4="not built"), 1, "auto", "triton", "dot_scaled"),
    (wush.NVFP4, B200, 1, "triton", "triton", "dot_scaled"),
    (wush.NVFP4, B200, 1, "scaled_mm", "triton", "scaled_mm_fp4"),
    (wush.MXFP4, replace(B200, no_scaled_fp4="not built"), 1, "scaled_mm", "triton", "half"),
    (wush.MXFP8, B200, 1, "auto", "triton", "half"),
    (wush.NVFP4, RTX5090, 1, "auto", "triton", "scaled_mm_fp4"),
    (wush.MXFP4, replace(RTX5090, no_scaled_fp4="not built"), 4096, "auto", "triton", "dot_scaled"),
    (wush.MXFP4, A100, 1, "auto", "torch", "half"),
    (wush.NVFP4, A100, 4096, "scaled_mm", "torch", "half"),
    (wush.INT4, A100, 1, "auto", "torch", "torch"),
    (wush.MXFP4, V100, 1, "auto", "torch", "torch"),
    (wush.MXFP4, OLD_TRITON, 1, "auto", "torch", "half"),
    (wush.MXFP4, CPU, 1, "auto", "torch", "torch"),
    (wush.MXFP4, CPU, 1, "triton", "torch", "half"),
    (wush.MXFP4, replace(CPU, no_triton=None), 1, "triton", "triton", "matmul_fp8"),
]


@pytest.mark.parametrize(("fmt", "machine", "rows", "requested", "quantize", "matmul"), TABLE)
def test_the_choice_by_format_machine_and_tokens(
    fmt: Format, machine: Machine, rows: int, requested: Kernels, quantize: str, matmul: str
) -> None:
    choice = choose(fmt, machine, rows, SHAPE, requested)
    assert (choice.quantize, choice.matmul) == (quantize, matmul)
    assert choice.why
    assert choice.matmul in PRODUCTS


FALLBACKS = [
    (replace(SHAPE, misses=(3, 5)), 1, "half", "3 groups have exponents outside the window"),
    (replace(SHAPE, misses=(0, 5)), 1, "matmul_fp8", ""),
    (replace(SHAPE, misses=(3, 0)), FEW + 1, "scaled_mm", "not matmul_fp8: 3 groups have exponents outside"),
    (replace(SHAPE, out_features=28672), FEW + 1, "scaled_mm", f"M > {FEW}, more than {SMALL_TILES} tiles"),
    (replace(SHAPE, misses=(0, 5)), 4096, "half", "5 groups have exponents outside the FP8 window"),
    (replace(SHAPE, out_features=8200), 4096, "half", "8200 x 4096 are not multiples of 16"),
    (replace(SHAPE, dtype=torch.float32), 1, "torch", "a float32 model"),
]


@pytest.mark.parametrize(("shape", "rows", "matmul", "why"), FALLBACKS)
def test_a_fallback_says_why(shape: Shape, rows: int, matmul: str, why: str) -> None:
    choice = choose(wush.MXFP4, H100, rows, shape)
    assert choice.matmul == matmul
    assert why in choice.why


def test_a_machine_that_cannot_is_named_in_the_reason() -> None:
    assert "Triton 3.2.0 is older than 3.6" in choose(wush.MXFP4, OLD_TRITON, 1, SHAPE).why
    why = choose(wush.MXFP4, replace(H100, no_scaled_mm="torch says no"), 4096, SHAPE).why
    assert "not scaled_mm: torch says no" in why
    assert "of 32" in choose(wush.NVFP4, H100, 1, replace(SHAPE, in_features=4080)).why


def test_a_format_without_kernels_is_computed_by_torch() -> None:
    class Own(wush.Mxfp4):
        name = "own"

    assert choose(Own(), H100, 1, SHAPE).matmul == "torch"
    weight = Own().quantize(torch.randn(8, 64))
    ours = wush.QuantLinear(QuantizedWeight(weight, None), Own())
    compiled = torch.compile(wush.use_kernels(ours, "triton"), backend="eager", fullgraph=True)
    x = torch.randn(3, 64)
    torch.testing.assert_close(compiled(x), exact(ours, x)[0].float())


# The products

BOUND = 2.0**-20  # of the sum of magnitudes; interpreted sums are float32's


@pytest.mark.parametrize("fmt", FORMATS, ids=ids)
@pytest.mark.parametrize("kernels", ["torch", "triton", "scaled_mm"])
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_every_backend_is_the_float64_product_of_the_same_codes(
    fmt: Format, kernels: Kernels, keep: bool, bias: bool, generator: torch.Generator
) -> None:
    ours = wush.use_kernels(layer(fmt, transform="none", bias=bias), kernels, keep)
    x = torch.randn(3, 7, 96, generator=generator)
    expected, magnitude = exact(ours, x)
    assert ((ours(x).double() - expected).abs() <= BOUND * (magnitude + 1)).all()


@pytest.mark.parametrize("kernels", ["torch", "triton", "scaled_mm"])
@pytest.mark.parametrize("scale", [1e-5, 0.02, 3.0, 400.0])
def test_every_backend_uses_the_inputs_own_global_scale(
    scale: float, kernels: Kernels, generator: torch.Generator
) -> None:
    """With the format's own one, 0.1, inputs of 2,000 would be cut and those of 1e-4 be zero."""
    ours = wush.use_kernels(layer(wush.Nvfp4("calibrated"), transform="none", bias=False), kernels)
    x = torch.randn(5, 96, generator=generator) * scale
    ours.input_scale = ours.format.input_global_scale(x.abs().max().item())
    expected, magnitude = exact(ours, x)
    assert ((ours(x).double() - expected).abs() <= BOUND * (magnitude + scale)).all()
    plain = x.double() @ ours.weight().double().T
    assert (ours(x).double() - plain).norm() < 0.2 * plain.norm()


@pytest.mark.parametrize("fmt", FORMATS, ids=ids)
@pytest.mark.parametrize("kernels", ["triton", "scaled_mm"])
@pytest.mark.parametrize("transform", ["block", "shared"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_with_a_transform_few_codes_differ(
    fmt: Format, kernels: Kernels, transform: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """Sums of the transform run in another order: a result at a tie may round to the other side."""
    ours = layer(fmt, dtype, transform=transform)
    x = torch.randn(9, 96, generator=generator).to(dtype)
    reference = wush.use_kernels(ours, "torch")(x).float()
    found = wush.use_kernels(ours, kernels)(x).float()
    far = (found - reference).abs() > 2e-3 * reference.abs().amax(-1, keepdim=True)
    assert far.any(-1).float().mean() <= 0.12  # one row of nine, by one code


@interpreted
@pytest.mark.parametrize("fmt", FORMATS, ids=ids)
def test_codes_and_scales_of_the_kernel_are_those_of_the_format(fmt: Format, generator: torch.Generator) -> None:
    from wush_kernels.quantize import quantize

    x = torch.randn(9, 96, generator=generator) * torch.exp2(torch.randn(9, 1, generator=generator) * 8)
    packed, scales = quantize(x, fmt)
    expected = fmt.quantize(x)
    assert torch.equal(packed, fmt.pack(expected.codes))
    assert torch.equal(scales.float(), expected.scales.float())


@pytest.mark.parametrize("fmt", [wush.MXFP4, wush.NVFP4, wush.MXFP8], ids=lambda f: f.name)
def test_half_operands_of_torch_alone_give_the_same_product(fmt: Format, generator: torch.Generator) -> None:
    ours = layer(fmt, transform="none")
    x = torch.randn(5, 96, generator=generator)
    expected, magnitude = exact(ours, x)
    found = PRODUCTS["half"](x, ours.own, operands_of(ours.own), How("torch"))
    assert ((found.double() - expected).abs() <= BOUND * (magnitude + 1)).all()


@pytest.mark.parametrize("kernels", ["torch", "triton", "scaled_mm"])
@pytest.mark.parametrize("shape", [(0, 96), (2, 0, 96), (96,), (1, 96), (3, 1, 96), (17, 96), (2, 2, 3, 96)])
def test_any_leading_dimensions(kernels: Kernels, shape: tuple[int, ...], generator: torch.Generator) -> None:
    ours = wush.use_kernels(layer(transform="none"), kernels)
    x = torch.randn(shape, generator=generator)
    found = ours(x)
    assert found.shape == (*shape[:-1], 48)
    torch.testing.assert_close(found.double(), exact(ours, x)[0], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kernels", ["torch", "triton", "scaled_mm"])
def test_inputs_that_are_not_contiguous(kernels: Kernels, generator: torch.Generator) -> None:
    ours = wush.use_kernels(layer(), kernels)
    x = torch.randn(96, 6, 4, generator=generator)
    assert torch.equal(ours(x.permute(2, 1, 0)), ours(x.permute(2, 1, 0).contiguous()))
    wide = torch.randn(5, 200, generator=generator)
    assert torch.equal(ours(wide[:, 3:99]), ours(wide[:, 3:99].contiguous()))


@pytest.mark.parametrize("fmt", FORMATS, ids=ids)
@pytest.mark.parametrize("kernels", ["torch", "triton", "scaled_mm"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("transform", ["none", "block"])
def test_a_non_finite_input_gives_a_row_of_nan_and_changes_no_other(
    fmt: Format, kernels: Kernels, bad: float, transform: str, generator: torch.Generator
) -> None:
    ours = wush.use_kernels(layer(fmt, transform=transform), kernels)
    if INTERPRETED and backends.planned(ours, 5, torch.float32).matmul == "matmul_fp8":
        pytest.skip("the interpreter reads E5M2's NaN as a number")
    x = torch.randn(5, 96, generator=generator)
    expected = ours(x)
    x[2, 40] = bad
    found = ours(x)
    assert found[2].isnan().all()
    others = torch.arange(5) != 2
    assert torch.equal(found[others], expected[others])


@interpreted
def test_a_weight_row_of_too_many_binades_takes_exact_bf16_operands_and_says_so(generator: torch.Generator) -> None:
    weight = torch.randn(48, 96, generator=generator)
    weight[7, :32] *= 2.0**-40
    ours = wush.QuantLinear(QuantizedWeight(wush.MXFP4.quantize(weight), None), wush.MXFP4)
    x = torch.randn(5, 96, generator=generator)
    for kernels in ("triton", "scaled_mm"):
        wush.use_kernels(ours, kernels)  # type: ignore[arg-type]
        torch.testing.assert_close(ours(x).double(), exact(ours, x)[0], rtol=1e-5, atol=1e-4)
    told = list(backends.chosen(ours))
    assert len(told) == 2
    assert all("matmul half" in text and "1 groups have exponents outside" in text for text in told)


# What is prepared once, and when it is made anew


def test_operands_are_made_once_and_again_when_the_weight_changes(generator: torch.Generator) -> None:
    ours, other = layer(seed=1), layer(seed=2)
    x = torch.randn(5, 96, generator=generator)
    for one in (ours, other):
        wush.use_kernels(one, "scaled_mm")
    expected = other(x)
    ours(x)
    made = operands_of(ours.own)
    ours(x)
    assert operands_of(ours.own) is made
    ours.load_state_dict(other.state_dict())
    assert operands_of(ours.own) is not made
    assert torch.equal(ours(x), expected)


def test_compiled_code_makes_the_operands_of_a_loaded_layer_once(generator: torch.Generator) -> None:
    ours, x = wush.use_kernels(layer(), "scaled_mm"), torch.randn(5, 96, generator=generator)
    ours.load_state_dict(layer(seed=2).state_dict())
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    compiled(x)
    made = operands_of(ours.own)
    compiled(x)
    assert operands_of(ours.own) is made


def test_without_keeping_no_copy_of_the_weight_stays() -> None:
    sizes = {}
    for keep in (True, False):
        ours = wush.use_kernels(layer(), "scaled_mm", keep)
        ours(torch.randn(5, 96))
        sizes[keep] = sum(t.nbytes for t in vars(operands_of(ours.own))["_kept"].values() if isinstance(t, Tensor))
    assert sizes[True] >= 48 * 96 > sizes[False]


@pytest.mark.parametrize("kernels", ["torch", "triton", "scaled_mm"])
def test_state_dict_and_copies_give_the_same_bits(kernels: Kernels, generator: torch.Generator) -> None:
    ours = wush.use_kernels(layer(wush.Nvfp4("calibrated")), kernels)
    x = torch.randn(5, 96, generator=generator)
    expected = ours(x)
    assert set(ours.state_dict()) == {"packed_weight", "scales", "transform", "bias", "_extra_state"}
    restored = wush.QuantLinear.from_state(ours.state_dict(), ours.format, settings=Settings(kernels))
    assert torch.equal(restored(x), expected)
    assert torch.equal(copy.deepcopy(ours)(x), expected)


@pytest.mark.parametrize("fmt", FORMATS, ids=ids)
def test_a_change_of_dtype_leaves_codes_and_scales_alone(fmt: Format) -> None:
    ours = layer(fmt, torch.float32)
    before = {key: tensor.clone() for key, tensor in ours.state_dict().items()}
    ours.half()
    assert ours.scales.dtype == fmt.scale_dtype
    assert torch.equal(ours.scales.float(), before["scales"].float())
    assert torch.equal(ours.packed_weight, before["packed_weight"])
    assert ours.transform is not None
    assert ours.transform.dtype == torch.float16
    assert ours(torch.ones(2, 96).half()).dtype == torch.float16


# Records, settings, errors


@interpreted
def test_what_was_chosen_is_told_with_merged_names_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList(layer(wush.INT4) for _ in range(3))})
    wush.use_kernels(model, "triton")
    backends._told.clear()
    with caplog.at_level(logging.INFO):
        for one in model["layers"]:
            one(torch.randn(2, 96))
    (text,) = backends.chosen(model)
    assert text.startswith("int4: quantize triton, matmul torch (kernels=triton; ")
    assert backends.chosen(model)[text] == ["layers.0-2"]
    assert sum("matmul torch" in message for message in caplog.messages) == 1
    assert backends.planned(model["layers"][0], 2, torch.float32).matmul == "torch"


def test_names_are_merged_by_their_first_number() -> None:
    names = [f"model.layers.{i}.mlp.up" for i in (0, 1, 2, 5)] + ["model.layers.3.mlp.down", "head"]
    assert backends._merged(names) == [
        "head",
        "model.layers.0-2.mlp.up",
        "model.layers.5.mlp.up",
        "model.layers.3.mlp.down",
    ]


def test_unknown_kernels_name_the_choices() -> None:
    with pytest.raises(ValueError, match="kernels='cuda': choose one of auto, torch, triton, scaled_mm"):
        wush.use_kernels(layer(), "cuda")  # type: ignore[arg-type]


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_inputs_that_do_not_fit_are_errors_that_name_the_layer(kernels: Kernels) -> None:
    ours = wush.use_kernels(layer(), kernels)
    with pytest.raises(ValueError, match=r"mlp\.up_proj: the input has 64 features, the layer 96"):
        ours(torch.ones(2, 64))
    with pytest.raises(TypeError, match=r"mlp\.up_proj: the input is torch\.int64; it should be float32, bfloat16"):
        ours(torch.ones(2, 96, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"mlp\.up_proj: the input is on meta, the weight on cpu"):
        ours(torch.ones(2, 96, device="meta"))


# Compilation


@pytest.mark.parametrize("kernels", ["torch", "triton", "scaled_mm"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_layer_compiles_to_one_graph_with_the_same_bits(
    kernels: Kernels, backend: str, generator: torch.Generator
) -> None:
    torch._dynamo.reset()
    ours = wush.use_kernels(layer(), kernels)
    compiled = torch.compile(ours, backend=backend, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for rows in (2, 3, 70):
            x = torch.randn(rows, 96, generator=generator)
            assert torch.equal(compiled(x), ours(x))


@pytest.mark.parametrize("kernels", ["torch", "triton", "scaled_mm"])
@pytest.mark.parametrize("fmt", [wush.MXFP4, wush.NVFP4, wush.Nvfp4("calibrated")], ids=lambda f: f.scale_rule)
def test_the_operator_keeps_its_promises(kernels: Kernels, fmt: Format, generator: torch.Generator) -> None:
    own = layer(fmt).own
    tensors = (own.packed, bits_of(own.scales), own.transform, own.bias)
    numbers = (fmt.name, fmt.scale_rule, own.global_scale, own.input_scale)
    for shape in ((3, 96), (2, 3, 96), (0, 96)):
        x = torch.randn(shape, generator=generator)
        torch.library.opcheck(torch.ops.wush.linear.default, (x, *tensors, *numbers, kernels, True, False))
