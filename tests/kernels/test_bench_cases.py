"""What the benchmark runs: cases become measurements, kernels are called rightly, the model is computed rightly.

Kernels run interpreted at tiny sizes where there is no GPU, so that what a run calls exists and is compared rightly.
"""

import importlib
import math
from typing import Any

import pytest
import torch

import wush
from wush_kernels.bench import (
    cases,
    kernels,
    layers,
    model,
    model_check,
    operands,
    products,
    promises,
    quantizer,
    run,
    shapes,
)
from wush_kernels.bench.measurement import HADAMARD, OURS, Ceilings, Errors, Measurement, Timing, Work
from wush_kernels.bench.timing import Effort, time_together

CEILINGS = Ceilings(copy_gbs=2800.0, bf16_tflops=700.0, fp8_tflops=1400.0)


@pytest.fixture
def on_device(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operands, "DEVICE", device.type)


# Cases


def case(prepare: object) -> cases.Case:
    return cases.Case("a kernel", "mxfp4", 1, 2, 3, Work(1e6), prepare)  # type: ignore[arg-type]


def test_a_kernel_that_raises_is_a_line_with_its_error() -> None:
    def prepare() -> cases.Prepared:
        raise RuntimeError("no such instruction\nat line 3")

    found = cases.measure("kernels", case(prepare), Effort(), CEILINGS)
    assert found.failure == "RuntimeError: no such instruction"


def test_a_wrong_result_is_a_failure_though_it_was_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        cases, "time_together", lambda *_: ({"ours": Timing(1.0, 1.0, 1.0, 2)}, {"fp8": "RuntimeError: no"})
    )
    prepared = cases.Prepared({}, lambda: Errors(relative=0.5, limit=1e-2))
    found = cases.measure("kernels", case(lambda: prepared), Effort(), CEILINGS)
    assert "wrong" in found.failure
    assert found.us == 1.0
    assert found.details["failed_baselines"] == {"fp8": "RuntimeError: no"}


def test_a_result_that_was_compared_with_nothing_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "time_together", lambda *_: ({"ours": Timing(1.0, 1.0, 1.0, 2)}, {}))
    for errors, failed in ((Errors(), True), (Errors(mismatched=0.0), False), (Errors(relative=0.0), False)):
        prepared = cases.Prepared({}, lambda errors=errors: errors)
        found = cases.measure("kernels", case(lambda prepared=prepared: prepared), Effort(), CEILINGS)
        assert bool(found.failure) == failed


@pytest.mark.usefixtures("on_device")
def test_every_kernel_runs_and_is_right_at_tiny_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "SIZES", ((3, 64), (20, 128)))
    monkeypatch.setattr(products, "SHAPES", ((64, 64), (48, 128)))
    monkeypatch.setattr(products, "DECODE_TOKENS", (1, 2, 3))
    monkeypatch.setattr(products, "PREFILL_TOKENS", (4, 5))
    monkeypatch.setattr(kernels, "SWEPT_ROWS", (20,))
    names, variants = set(), set()
    for one in kernels.cases(Effort(cold_bytes=1), quick=True):
        names.add(one.name)
        variants.add((one.name, one.variant))
        with torch.no_grad():
            prepared = one.prepare()
            prepared.contenders["ours"][0]()
            errors = prepared.check()
        # Interpreted products of bfloat16 are wrong.
        assert not errors.wrong() or (one.name == "second_moment" and operands.DEVICE == "cpu"), one
    expected = {
        "quantize",
        "fp8_operand",
        "half_operand",
        "block_transform",
        "dequantize",
        "fp8_weight",
        "matmul_fp8",
        "matmul_half",
    }
    assert names == expected | {
        "scaled_mm",
        "second_moment",
        "half_weight",
        "gptq_sweep",
        "eigen",
        "coordinates",
    }
    for fmt in ("int4", "mxfp8"):
        assert {("quantize", f"{fmt} block"), ("quantize", f"{fmt} none"), ("dequantize", f"{fmt} to bf16")} < variants
    for fmt in ("mxfp4", "nvfp4"):
        assert {("half_operand", f"{fmt} block bf16"), ("half_weight", f"{fmt} to bf16")} < variants


def kernel_case(name: str, variant: str) -> cases.Case:
    found = [
        one for one in kernels.cases(Effort(cold_bytes=1), quick=True) if (one.name, one.variant) == (name, variant)
    ]
    return found[0]


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize(
    ("name", "variant", "module"),
    [
        ("quantize", "int4 none", "quantize"),
        ("quantize", "mxfp8 block", "quantize"),
        ("dequantize", "int4 to bf16", "dequantize"),
        ("dequantize", "mxfp8 to bf16", "dequantize"),
        ("fp8_operand", "mxfp4 none", "fp8_operand"),
        ("half_operand", "mxfp4 none bf16", "half_operand"),
        ("half_weight", "mxfp8 to bf16", "dequantize"),
        ("gptq_sweep", "mxfp4 float64", "gptq_sweep"),
        ("eigen", "32 x 32 float64", "eigen"),
        ("coordinates", "32 x 32 float64", "coordinates"),
    ],
)
def test_a_wrong_kernel_is_found(name: str, variant: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "SIZES", ((3, 64), (20, 128)))
    monkeypatch.setattr(kernels, "SWEPT_ROWS", (20,))
    owner = importlib.import_module(f"wush_kernels.{module}")
    right = getattr(owner, name)

    def wrong(*arguments: Any, **options: Any) -> Any:
        """Every part of the result is made wrong in turn: outputs that are returned, or the last three arguments."""
        made = right(*arguments, **options)
        results = (
            arguments[-3:]
            if made is None
            else made[:1]
            if name == "fp8_operand"
            else made
            if isinstance(made, tuple)
            else (made,)
        )
        spoilt = results[part % len(results)]
        bits = spoilt if spoilt.itemsize == 8 else spoilt.view({1: torch.uint8, 2: torch.int16}[spoilt.itemsize])
        bits[..., :1] += 1
        return made

    for part in range(3):
        assert not kernel_case(name, variant).prepare().check().wrong()
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, wrong)
            assert "wrong" in kernel_case(name, variant).prepare().check().wrong(), part


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize(
    "fmt", [*operands.FORMATS.values(), *operands.OTHER_FORMATS.values()], ids=lambda fmt: fmt.name
)
def test_random_weights_are_finite_and_of_a_weights_size(fmt: wush.Format) -> None:
    codes, scales = operands.packed(fmt, 64, 256)
    values = operands.values(fmt, codes, scales, fmt.global_scale)
    assert values.isfinite().all()
    assert 0.005 < values.std() < 0.08


def test_the_memory_saving_mode_is_measured_at_one_shape_and_many_tokens() -> None:
    own = [one for one in layers.cases(["llama3_1_8b"], Effort(), quick=False) if one.variant == layers.NOT_KEPT]
    assert [(one.tokens, one.out_features, one.in_features) for one in own] == [(m, 28672, 4096) for m in (1024, 4096)]
    for name, quick in (("llama3_1_70b", False), ("llama3_1_8b", True)):
        assert {one.variant for one in layers.cases([name], Effort(), quick)} == {"mxfp4", "nvfp4"}


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("keep", [True, False])
def test_layers_keep_copies_or_not_as_they_are_told(keep: bool) -> None:
    shape = shapes.LayerShape(48, 64, ())
    own = layers.Layers(operands.FORMATS["mxfp4"], shape, Effort(cold_bytes=1), keep)
    assert {layer.settings.keep_operands for layer in own.copies} == {keep}
    assert not own.errors(3).wrong()


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_a_layer_is_compared_with_float64_of_its_codes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = shapes.LayerShape(48, 64, ("a model's o",))
    own = layers.Layers(operands.FORMATS[name], shape, Effort(cold_bytes=1))
    assert not own.errors(3).wrong()
    assert layers.path(own.copies[0], 3).count("+") == 1
    monkeypatch.setattr(layers, "product_errors", lambda found, *rest: products.product_errors(found * 1.1, *rest))
    assert own.errors(3).wrong()


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_a_layer_is_timed_beside_itself_with_one_hadamard_matrix_which_is_checked_too(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "layer_shapes", lambda models: [shapes.LayerShape(48, 64, ("a model's o",))])
    one = next(own for own in layers.cases([], Effort(cold_bytes=1), quick=True) if own.variant == name)
    prepared = one.prepare()
    calls = {kind: prepared.contenders[kind][0] for kind in (OURS, HADAMARD)}
    size = operands.FORMATS[name].group_size
    shapes_of = {kind: tuple(call.args[1].transform.shape) for kind, call in calls.items()}  # type: ignore[attr-defined]
    assert shapes_of == {OURS: (64 // size, size, size), HADAMARD: (size, size)}
    with torch.no_grad():
        assert {kind: call().shape for kind, call in calls.items()} == dict.fromkeys(calls, (1, 48))  # type: ignore[attr-defined]
        assert not prepared.check().wrong()
    own = layers.Layers(operands.FORMATS[name], shapes.LayerShape(48, 64, ()), Effort(cold_bytes=1))
    right = products.product_errors
    monkeypatch.setattr(
        layers, "product_errors",
        lambda found, *rest: right(found * (1.1 if rest[4].dim() == 2 else 1), *rest),
    )  # fmt: skip
    assert "of the layer with Hadamard" in own.errors(3).wrong()


# The model

TINY = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
TINY |= {"head_dim": 16, "vocab_size": 97, "max_position_embeddings": 128}


@pytest.fixture
def models(device: torch.device, on_device: None) -> model.Models:
    return model.Models(12, TINY, device.type)


@torch.no_grad()
def test_our_decoder_block_computes_what_transformers_does(models: model.Models) -> None:
    whole = models.bf16.float()
    ids = torch.randint(0, 97, (2, 9), device=whole.device)
    expected = whole(input_ids=ids, use_cache=False, logits_to_keep=1).logits
    found = model.last_logits(whole, model.run_decoder_block, ids, torch.arange(9, device=whole.device)[None])
    torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_a_decode_step_can_be_repeated_and_is_the_same_both_ways(models: model.Models) -> None:
    whole = models.bf16.float()
    cache, counts = model.full_static_cache(whole, 8)
    own = model.DecodeCache.random(whole, 8)
    for index, states in enumerate(cache.layers):
        own.keys[index].copy_(states.keys)
        own.values[index].copy_(states.values)
    ids = torch.tensor([[5]], device=whole.device)
    first = model.transformers_step(whole, ids, cache, counts)
    torch.testing.assert_close(model.transformers_step(whole, ids, cache, counts), first, rtol=0, atol=0)
    found = model.last_logits(whole, model.run_decoder_block, ids, own.slot[None], own)
    torch.testing.assert_close(found, first)


@torch.no_grad()
def test_one_compiled_block_serves_all_and_inputs_are_shared(models: model.Models) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    run_block = torch.compile(model.run_decoder_block, fullgraph=True, dynamic=False, backend="eager")
    ids = torch.randint(0, 97, (1, 5), device=models.device)
    positions = torch.arange(5, device=models.device)[None]
    found = model.last_logits(models.mxfp4, run_block, ids, positions)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch.testing.assert_close(found, models.mxfp4(input_ids=ids, use_cache=False, logits_to_keep=1).logits)
    block = models.mxfp4.model.layers[0]
    assert block.self_attn.q_proj.joint is block.self_attn.v_proj.joint is not None


@pytest.fixture
def small_inputs(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short windows; without a GPU a call stands for its graph."""
    for name, size in (("WINDOWS", 2), ("WINDOW", 9), ("CONTEXT", 16)):
        monkeypatch.setattr(model, name, size)
    if device.type == "cpu":
        monkeypatch.setattr(model_check, "replayed", lambda call: call())


def checked(models: model.Models, name: str, run_block: model.BlockForward | None) -> Errors:
    with torch.no_grad():
        return model_check.errors(models.mxfp4, model.CALLS[name], run_block)


@pytest.mark.usefixtures("small_inputs")
@pytest.mark.parametrize("name", ["decode", "prefill"])
@pytest.mark.parametrize("how", ["as is", "compiled"])
def test_the_model_is_right_in_each_way_of_running(name: str, how: str, models: model.Models) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(model.run_decoder_block, fullgraph=True, dynamic=False, backend="eager")
    found = checked(models, name, None if how == "as is" else compiled)
    assert not found.wrong()
    assert found.relative is not None
    assert found.relative > 1e-4  # bfloat16 was rounded to, so something was compared
    assert models.mxfp4.config.num_hidden_layers == 12


@pytest.mark.usefixtures("small_inputs")
def test_wrong_products_of_the_graph_are_found(models: model.Models, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = model_check.replayed

    def spoilt(product: Any, x: torch.Tensor, weight: Any, *rest: Any) -> torch.Tensor:
        return product(x, weight, *rest) * (1.05 if len(weight.packed) == 64 else 1)

    def wrong(call: Any) -> Any:
        with model_check._products(spoilt):
            return stand_in(call)

    monkeypatch.setattr(model_check, "replayed", wrong)
    assert "in the graph" in checked(models, "prefill", None).wrong()


@pytest.mark.usefixtures("small_inputs")
def test_columns_given_to_the_wrong_layer_are_found(models: model.Models) -> None:
    joint = models.mxfp4.model.layers[0].self_attn.q_proj.joint
    joint.rows[1], joint.rows[2] = joint.rows[2], joint.rows[1]
    assert "_proj" in checked(models, "decode", None).wrong()


@pytest.mark.usefixtures("small_inputs")
def test_what_is_wrong_between_products_is_found(models: model.Models) -> None:
    def without_residual(block: Any, hidden: Any, *rest: Any) -> torch.Tensor:
        return model.run_decoder_block(block, hidden, *rest) - hidden

    assert "relative error of the " in checked(models, "prefill", without_residual).wrong()


@pytest.mark.usefixtures("small_inputs")
def test_wrong_logits_are_found(models: model.Models, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = model_check.replayed

    def wrong(call: Any) -> Any:
        logits, recorded = stand_in(call)
        return 1.05 * logits, recorded

    monkeypatch.setattr(model_check, "replayed", wrong)
    assert "the logits" in checked(models, "decode", model.run_decoder_block).wrong()


@pytest.mark.usefixtures("small_inputs")
@pytest.mark.parametrize("times", [0, 2])
def test_a_graph_with_other_products_is_an_error(times: int, models: model.Models) -> None:
    def other(block: Any, hidden: Any, *rest: Any) -> torch.Tensor:
        for _ in range(times):
            hidden = model.run_decoder_block(block, hidden, *rest)
        return hidden

    with pytest.raises(RuntimeError, match="products"):
        checked(models, "prefill", other)


@pytest.mark.usefixtures("small_inputs")
def test_a_model_is_measured_with_that_check(models: model.Models, monkeypatch: pytest.MonkeyPatch) -> None:
    joint = models.mxfp4.model.layers[0].self_attn.q_proj.joint
    joint.rows[1], joint.rows[2] = joint.rows[2], joint.rows[1]
    monkeypatch.setattr(cases, "time_together", lambda *_: ({"ours": Timing(1.0, 1.0, 1.0, 2)}, {}))
    made = case(lambda: models.prepare("decode", "as is"))
    assert cases.measure("model", made, Effort(), CEILINGS).failure.startswith("wrong: relative error of self_attn.")


def test_the_work_of_the_model_is_that_of_8_billion_weights() -> None:
    work = model.Models(model.BLOCKS).work(1)
    assert work.flops / 2 == pytest.approx(7.5e9, rel=0.01)
    assert work.bytes == pytest.approx(6.98e9 * 4.25 / 8 + 2 * 0.525e9, rel=0.01)


# The quantizer's lines


def block_found(**changed: float) -> dict[str, object]:
    stages = ("seconds", "seconds_refit", "seconds_rtn", "moments_seconds", "moments_seconds_addmm")
    found: dict[str, object] = {"tokens": 8192, "runs": {stage: [0.1, 0.3, 0.2] for stage in stages}}
    return found | dict.fromkeys(stages, 0.2) | {"loss": 0.005, "loss_refit": 0.006, "loss_rtn": 0.013} | changed


def quantizer_lines() -> dict[str, Measurement]:
    return {one.variant: one for one in run.MEASURERS["quantizer"](run.Options(), CEILINGS)}


def test_a_stage_is_its_median_and_wrong_if_it_loses_more_than_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantizer, "measure_block", lambda shape: block_found())
    found = quantizer_lines()
    assert set(found) == {promises.GPTQ_WUSH, promises.REFIT, "rtn", "second moments"}
    assert not any(one.failure for one in found.values())
    assert found[promises.REFIT].timings["ours"] == Timing(0.2e6, 0.1e6, 0.3e6, 1)
    for changed, variant in (({"loss_refit": 0.014}, promises.REFIT), ({"loss": math.nan}, promises.GPTQ_WUSH)):
        monkeypatch.setattr(quantizer, "measure_block", lambda shape, changed=changed: block_found(**changed))
        assert [name for name, one in quantizer_lines().items() if one.failure] == [variant]
    monkeypatch.setattr(quantizer, "measure_block", lambda shape: block_found(loss_rtn=0.4))
    assert [name for name, one in quantizer_lines().items() if one.failure] == ["rtn"]


def test_a_quantizer_that_breaks_fails_both_promises(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(shape: object) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(quantizer, "measure_block", broken)
    found = quantizer_lines()
    assert {name: one.failure for name, one in found.items()} == dict.fromkeys(
        (promises.GPTQ_WUSH, promises.REFIT), "RuntimeError: no"
    )


def test_the_time_of_a_stage_is_the_median_of_runs_after_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 9.0, 10.0, 10.5, 20.0, 20.1, 30.0, 30.3])
    monkeypatch.setattr(quantizer.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    found: dict[str, object] = {"runs": {}}
    assert quantizer._timed(found, "seconds", lambda: "made") == "made"
    assert found["seconds"] == pytest.approx(0.3)
    assert found["runs"] == {"seconds": pytest.approx([0.5, 0.1, 0.3])}


# On a GPU


@pytest.mark.gpu
def test_a_copy_is_timed_at_a_plausible_rate_and_a_failure_spoils_no_other() -> None:
    source, target = (torch.ones(1 << 28, dtype=torch.uint8, device="cuda") for _ in range(2))

    def broken() -> None:
        raise RuntimeError("no")

    found, failures = time_together({"copy": [lambda: target.copy_(source)], "bad": [broken]}, Effort(do_bench_ms=2))
    assert failures == {"bad": "RuntimeError: no"}
    assert 2e2 < 2 * (1 << 28) / found["copy"].us / 1e3 < 2e4
    assert found["copy"].fastest <= found["copy"].us <= found["copy"].slowest
