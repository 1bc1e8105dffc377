"""Joined layers give what they give apart, share one product, and never a stale one."""

import copy
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wush
from tests.wush.test_backends import layer
from wush import backends
from wush.joint import Joint, join

NAMES = ["q", "k", "v"]


class Attention(nn.Module):
    """Three layers fed by one tensor; `changed`: it is changed in place after the first."""

    def __init__(self, *layers: wush.QuantLinear) -> None:
        super().__init__()
        self.q, self.k, self.v = layers
        self.changed = False

    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        q = self.q(x)
        if self.changed:
            x.add_(1)
        return torch.cat([q, self.k(x), self.v(x)], -1)


def apart(**options: Any) -> Attention:
    first, *rest = (layer(out_features=o, seed=o, **options) for o in (48, 16, 32))
    for other in rest:
        other.transform = first.transform
    return Attention(first, *rest)


def joined(**options: Any) -> Attention:
    block = apart(**options)
    join(block, NAMES)
    return block


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The number of output features of each product that ran."""
    seen: list[int] = []
    run = backends._run

    def counted(x: Tensor, weight: Any, *rest: Any) -> Tensor:
        seen.append(len(weight.packed))
        return run(x, weight, *rest)

    monkeypatch.setattr(backends, "_run", counted)
    return seen


def test_members_with_settings_of_their_own_run_apart(x: Tensor, products: list[int]) -> None:
    together = joined()
    wush.use_kernels(together.get_submodule(NAMES[1]), "torch", keep_operands=False)
    together(x)
    assert len(products) > 1


@pytest.fixture
def x(generator: torch.Generator) -> Tensor:
    return torch.randn(2, 5, 96, generator=generator)


@pytest.mark.parametrize("fmt", [wush.MXFP4, wush.NVFP4, wush.INT4, wush.MXFP8], ids=lambda f: f.name)
@pytest.mark.parametrize("kernels", ["torch", "triton", "scaled_mm"])
@pytest.mark.parametrize("transform", ["block", "shared", "none"])
def test_one_product_gives_what_the_layers_give_apart(
    fmt: wush.Format, kernels: backends.Kernels, transform: str, x: Tensor, products: list[int]
) -> None:
    expected = wush.use_kernels(apart(fmt=fmt, transform=transform), kernels)(x)
    products.clear()
    found = wush.use_kernels(joined(fmt=fmt, transform=transform), kernels)(x)
    assert products == [96]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def test_biases_that_only_some_have(x: Tensor) -> None:
    blocks = []
    for make in (apart, joined):
        block = apart()
        block.k.bias = None
        if make is joined:
            join(block, NAMES)
        blocks.append(block)
    torch.testing.assert_close(blocks[1](x), blocks[0](x), rtol=1e-5, atol=1e-4)
    assert "k.bias" not in blocks[1].state_dict()


def test_joining_adds_no_memory_and_changes_no_state(x: Tensor) -> None:
    before, after = apart().state_dict(), joined().state_dict()
    assert list(before) == list(after)
    for key, tensor in before.items():
        assert torch.equal(tensor.view(torch.uint8), after[key].view(torch.uint8)), key
    storages = {tensor.untyped_storage().data_ptr() for key, tensor in after.items() if "_extra" not in key}
    assert len(storages) == 4  # codes, scales, biases, one transform


# Nothing stale


def test_an_input_changed_in_place_is_computed_anew(x: Tensor, products: list[int]) -> None:
    expected, block = apart(), joined()
    expected.changed = block.changed = True
    right = expected(x)
    products.clear()
    torch.testing.assert_close(block(x), right, rtol=1e-5, atol=1e-4)
    assert products == [96, 96]


def test_another_tensor_is_computed_anew(x: Tensor) -> None:
    expected, block = apart(), joined()
    block.q(x)
    torch.testing.assert_close(block.k(x + 1), expected.k(x + 1), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(block.k(x), expected.k(x), rtol=1e-5, atol=1e-4)


def test_a_layer_called_twice_computes_twice(x: Tensor, products: list[int]) -> None:
    block = joined()
    first, second = block.q(x), block.q(x)
    assert products == [96, 96]
    assert torch.equal(first, second)
    assert first.data_ptr() != second.data_ptr()


def test_a_product_lives_no_longer_than_its_input(x: Tensor) -> None:
    block = joined()
    joint = block.q.joint
    assert joint is not None
    given = x.clone()
    block.q(given)
    assert joint._last is not None
    del given
    gc.collect()
    assert joint._last is None
    for name in NAMES:
        block.get_submodule(name)(x)
    assert joint._last is None  # all have taken theirs


def test_in_inference_mode_each_computes_on_its_own(x: Tensor, products: list[int]) -> None:
    expected, block = apart(), joined()
    block.changed = expected.changed = True
    right = expected(x)
    products.clear()
    with torch.inference_mode():
        torch.testing.assert_close(block(x), right, rtol=1e-5, atol=1e-4)
    assert products == [48, 16, 32]


def test_a_changed_weight_changes_the_product(x: Tensor) -> None:
    block, other = joined(), apart()
    block(x)
    for name in NAMES:
        getattr(other, name).packed_weight.bitwise_xor_(8)
        getattr(block, name).packed_weight.bitwise_xor_(8)
    torch.testing.assert_close(block(x), other(x), rtol=1e-5, atol=1e-4)


# Moves, copies, state


def test_loading_a_state_changes_the_joint_weight(x: Tensor, products: list[int]) -> None:
    block, other = joined(), apart()
    block(x)
    for name in NAMES:
        getattr(other, name).packed_weight.bitwise_xor_(8)
    block.load_state_dict(other.state_dict())
    expected = other(x)
    products.clear()
    torch.testing.assert_close(block(x), expected, rtol=1e-5, atol=1e-4)
    assert products == [96]


@pytest.mark.parametrize("assign", [False, True])
def test_loading_transforms_that_differ_parts_the_layers(assign: bool, x: Tensor, products: list[int]) -> None:
    block, other = joined(), apart()
    assert other.k.transform is not None
    other.k.transform = other.k.transform.flip(0)
    expected = other(x)
    block.load_state_dict(other.state_dict(), assign=assign)
    products.clear()
    assert torch.equal(block(x), expected)
    assert products == [48, 16, 32]
    assert backends.chosen(block)["not joined: their transform differs"] == NAMES


def test_a_change_of_dtype_keeps_them_joined(x: Tensor, products: list[int]) -> None:
    block = joined()
    expected = apart().half()(x.half())
    products.clear()
    torch.testing.assert_close(block.half()(x.half()), expected, rtol=1e-2, atol=1e-2)
    assert products == [96]
    assert block.q.transform is block.k.transform


def test_a_move_to_another_device_joins_the_moved_tensors() -> None:
    block = joined().to("meta")
    joint = block.q.joint
    assert joint is not None
    assert joint.whole
    assert joint.packed.device.type == "meta"


def test_while_only_one_has_moved_each_is_on_its_own(x: Tensor) -> None:
    block = joined()
    block.q.to("meta")
    torch.testing.assert_close(block.k(x), apart().k(x), rtol=1e-5, atol=1e-4)
    assert "not joined: their device differs" in backends.chosen(block)


def test_a_copy_is_joined_in_itself(x: Tensor, products: list[int]) -> None:
    block = joined()
    block.q(x)
    other = copy.deepcopy(block)
    joint = other.q.joint
    assert joint is not None
    assert joint is not block.q.joint
    assert joint is other.v.joint
    assert joint.members[1] is other.k
    assert other.q.packed_weight.untyped_storage().data_ptr() == joint.packed.untyped_storage().data_ptr()
    products.clear()
    assert torch.equal(other(x), block(x))
    assert products == [96, 96]


# What is not joined


def test_layers_with_transforms_of_their_own_are_not_joined(x: Tensor) -> None:
    block = Attention(*(layer(out_features=o, seed=o) for o in (48, 16, 32)))
    join(block, NAMES)
    assert block.q.joint is None
    block(x)
    assert backends.chosen(block)["not joined: their transform differs"] == NAMES


def test_weights_with_global_scales_of_their_own_are_not_joined() -> None:
    block = apart(fmt=wush.Nvfp4("calibrated"))
    join(block, NAMES)
    assert block.q.joint is None
    assert block.q.not_joined == "their global scale differs"


def test_layers_with_input_scales_of_their_own_are_not_joined(x: Tensor) -> None:
    block = apart()
    block.k.input_scale = 0.02
    join(block, NAMES)
    assert block.q.joint is None
    assert block.q.not_joined == "their input scale differs"


def test_joined_layers_use_their_inputs_global_scale(x: Tensor) -> None:
    block, other = apart(fmt=wush.NVFP4), apart(fmt=wush.NVFP4)
    for one in (block, other):
        for name in NAMES:
            one.get_submodule(name).input_scale = 0.002
    join(block, NAMES)
    assert block.q.joint is not None
    for ours, expected in zip(block(x), other(x), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-4)


def test_what_cannot_be_joined_at_all_is_an_error() -> None:
    block = joined()
    with pytest.raises(ValueError, match="q, k: joined already"):
        join(block, ["q", "k"])
    block.v = nn.Linear(96, 32)  # type: ignore[assignment]
    with pytest.raises(TypeError, match="q, v: only QuantLinear layers can be joined"):
        join(block, ["q", "v"])


def test_one_layer_alone_stays_as_it_is() -> None:
    block = apart()
    join(block, ["q"])
    assert block.q.joint is None
    assert not block.q.not_joined


# Compilation


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("changed", [False, True])
def test_compiled_they_are_one_graph_and_one_product(
    backend: str, changed: bool, x: Tensor, products: list[int]
) -> None:
    torch._dynamo.reset()
    expected, block = apart(), joined()
    expected.changed = block.changed = changed
    right = expected(x)
    compiled = torch.compile(block, backend=backend, fullgraph=True)
    with torch.no_grad():
        compiled(x)
        products.clear()
        torch.testing.assert_close(compiled(x), right, rtol=1e-5, atol=1e-4)
    assert products == [96] * (1 + changed)


def test_compiled_alone_a_member_leaves_nothing_for_another_input(x: Tensor) -> None:
    torch._dynamo.reset()
    expected, block = apart(), joined()
    with torch.no_grad():
        torch.compile(block.q, backend="eager", fullgraph=True)(x)
        found = torch.compile(block.k, backend="eager", fullgraph=True)(x + 1)
    torch.testing.assert_close(found, expected.k(x + 1), rtol=1e-5, atol=1e-4)


def test_the_version_operator_keeps_its_promises(x: Tensor) -> None:
    torch.library.opcheck(torch.ops.wush.version.default, (x,))


def test_a_joint_is_no_child_of_its_layers() -> None:
    block = joined()
    assert not any(isinstance(module, Joint) for module in block.modules())
    assert isinstance(block.q.joint, Joint)
    assert block.q.operand_source.packed.shape[0] == 96


def test_a_layer_of_a_state_dict_can_be_joined_again(x: Tensor) -> None:
    block = joined()
    restored = Attention(*(wush.QuantLinear.from_state(getattr(block, n).state_dict(), wush.MXFP4) for n in NAMES))
    join(restored, NAMES)
    assert torch.equal(restored(x), block(x))
