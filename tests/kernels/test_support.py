"""Where kernels run, and what a tensor that does not fit is told."""

from collections.abc import Iterator

import pytest
import torch

import wush
import wush_kernels.support
from wush_kernels.quantize import quantize
from wush_kernels.support import check_tensor, on_device, require_support, why_not

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _nothing_is_remembered() -> Iterator[None]:
    why_not.cache_clear()
    yield
    why_not.cache_clear()


def test_on_the_cpu_kernels_only_run_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wush_kernels.support, "INTERPRETED", True)
    assert why_not(CPU) is None
    why_not.cache_clear()
    monkeypatch.setattr(wush_kernels.support, "INTERPRETED", False)
    assert "TRITON_INTERPRET=1" in (why_not(CPU) or "")
    with pytest.raises(RuntimeError, match=r"^quantize: the tensors are on the CPU .*; use kernels=torch$"):
        require_support(torch.zeros(1), "quantize")


def test_an_old_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triton.__version__", "3.5.1")
    assert why_not(CPU) == "Triton 3.5.1 is older than 3.6"


def test_other_devices_have_no_kernels() -> None:
    assert why_not(torch.device("meta")) == "no kernels for meta devices"


@pytest.mark.gpu
def test_this_gpu_is_new_enough(device: torch.device) -> None:
    assert why_not(device) is None


def test_an_old_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    assert why_not(torch.device("cuda")) == "A100 has compute capability 8.0; 8.9 or newer is needed"


def test_the_first_tensor_is_found_among_all_arguments() -> None:
    guarded = on_device(lambda size, x: x[:size])
    assert len(guarded(2, torch.zeros(3))) == len(guarded(size=2, x=torch.zeros(3))) == 2


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_kernels_run_on_the_device_of_their_tensors(generator: torch.Generator) -> None:
    x = torch.randn(3, 64, generator=generator)
    codes, scales = quantize(x.to("cuda:1"), wush.MXFP4)
    expected = wush.MXFP4.quantize(x)
    assert torch.equal(codes.cpu(), wush.MXFP4.pack(expected.codes))
    assert torch.equal(scales.cpu().view(torch.uint8), expected.scales.view(torch.uint8))
    assert torch.cuda.current_device() == 0


def check(tensor: torch.Tensor, shape: tuple[int | None, ...], **others: object) -> None:
    arguments = {"dtypes": (torch.float32, torch.bfloat16), "device": CPU} | others
    check_tensor(tensor, "layer: x", shape=shape, **arguments)  # type: ignore[arg-type]


def test_a_tensor_that_fits_passes() -> None:
    check(torch.zeros(3, 4), (3, 4))
    check(torch.zeros(3, 4), (None, 4))
    check(torch.zeros(0, 4), (None, 4))
    check(torch.zeros(3, 8)[:, :4], (3, 4), contiguous=False)


def test_what_does_not_fit_is_said_with_what_is_needed() -> None:
    with pytest.raises(TypeError, match=r"^layer: x: dtype float64, where float32 or bfloat16 is needed$"):
        check(torch.zeros(3, 4).double(), (3, 4))
    with pytest.raises(ValueError, match=r"^layer: x: shape \(3, 4\), where \('any', 5\) is needed$"):
        check(torch.zeros(3, 4), (None, 5))
    with pytest.raises(ValueError, match=r"shape \(3, 4\), where \(12,\)"):
        check(torch.zeros(3, 4), (12,))
    with pytest.raises(ValueError, match=r"^layer: x: on meta, the other operands on cpu; move it there$"):
        check(torch.zeros(3, 4, device="meta"), (3, 4))


def test_strides_that_do_not_fit_are_said_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"not contiguous \(strides \(8, 1\)\); call .contiguous\(\) on it"):
        check(torch.zeros(3, 8)[:, :4], (3, 4))
    with pytest.raises(ValueError, match=r"last dimension has stride 2; call .contiguous\(\) on it"):
        check(torch.zeros(3, 8)[:, ::2], (3, 4), contiguous=False)
