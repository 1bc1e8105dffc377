"""What the benchmark runs: cases become measurements, kernels are called rightly, the model is computed rightly.

Kernels run interpreted at tiny sizes where there is no GPU, so that what a run calls exists and is compared rightly.
"""

import math

import pytest
import torch

from wush_kernels.bench import cases, kernels, layers, model, operands, products, shapes
from wush_kernels.bench.measurement import Ceilings, Errors, Timing, Work
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


@pytest.mark.usefixtures("on_device")
def test_every_kernel_runs_and_is_right_at_tiny_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "SIZES", ((3, 64), (20, 128)))
    monkeypatch.setattr(products, "SHAPES", ((64, 64), (48, 128)))
    monkeypatch.setattr(products, "DECODE_TOKENS", (1, 2, 3))
    monkeypatch.setattr(products, "PREFILL_TOKENS", (4, 5))
    names = set()
    for one in kernels.cases(Effort(cold_bytes=1), quick=True):
        names.add(one.name)
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
    assert names == expected | {"scaled_mm", "second_moment"}


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_a_layer_is_compared_with_float64_of_its_codes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = shapes.LayerShape(48, 64, ("a model's o",))
    own = layers.Layers(operands.FORMATS[name], shape, Effort(cold_bytes=1))
    assert not own.errors(3).wrong()
    assert layers.path(own.copies[0], 3).count("+") == 1
    monkeypatch.setattr(layers, "product_errors", lambda found, *rest: products.product_errors(found * 1.1, *rest))
    assert own.errors(3).wrong()


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
    assert models.errors().relative is not None
    assert math.isfinite(models.errors().relative)


def test_the_work_of_the_model_is_that_of_8_billion_weights() -> None:
    work = model.Models(model.BLOCKS).work(1)
    assert work.flops / 2 == pytest.approx(7.5e9, rel=0.01)
    assert work.bytes == pytest.approx(6.98e9 * 4.25 / 8 + 2 * 0.525e9, rel=0.01)


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
