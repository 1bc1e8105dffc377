"""How long quantizing one decoder block takes: second moments, and RTN and GPTQ of its seven linears with WUSH.

Weights and inputs are random, in bfloat16: inputs with a few strong directions and channels of unequal size. The host
waits for the GPU once before and after each timing, as the walk through a model does for each block.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

import wush
from wush.algorithms import Algorithm, QuantizedWeight
from wush.device import without_waiting
from wush.moments import damp
from wush.transforms import apply_blocks
from wush_kernels.bench.shapes import MODELS, ModelShape

WINDOWS, WINDOW_LENGTH = 4, 2048
REPEATS = 3


@dataclass(frozen=True)
class Group:
    """Linears that share their input `(B, M, I)`: their weights by name, and the input's second moment."""

    weights: dict[str, Tensor]
    inputs: Tensor
    moment: wush.SecondMoment

    @classmethod
    def random(cls, shapes: dict[str, tuple[int, int]], device: torch.device) -> "Group":
        """Random weights of these shapes `(O, I)`."""
        features = next(iter(shapes.values()))[1]
        weights = {
            name: (0.02 * torch.randn(shape, device=device)).bfloat16().contiguous() for name, shape in shapes.items()
        }
        x = torch.randn(WINDOWS * WINDOW_LENGTH, 256, device=device) @ torch.randn(256, features, device=device) / 16
        x = (x + 0.5 * torch.randn_like(x)) * torch.logspace(-0.5, 0.5, features, device=device)
        moment = wush.SecondMoment(features, device, next(iter(shapes)))
        return cls(weights, x.bfloat16().view(WINDOWS, WINDOW_LENGTH, features), moment)

    def quantize(self, algorithm: Algorithm, transform: wush.Transform) -> list[QuantizedWeight]:
        """The linears in MXFP4, nothing of the moment's factors left from before."""
        for derived in ("_means_ngg", "inverse_factor"):
            self.moment.__dict__.pop(derived, None)
        names = list(self.weights)
        return algorithm.quantize_group(list(self.weights.values()), self.moment, transform, wush.MXFP4, names)

    def loss(self, result: QuantizedWeight, name: str) -> float:
        """`tr(D H D^T) / tr(W H W^T)`, D the error of a quantized weight in the original coordinates."""
        assert result.transform is not None
        weight = self.weights[name].double()
        error = apply_blocks(wush.MXFP4.dequantize(result.quantized).double(), result.transform.double().mT) - weight
        moment = damp(self.moment.matrix)
        return (((error @ moment) * error).sum() / ((weight @ moment) * weight).sum()).item()


def groups_of(model: ModelShape, device: torch.device) -> list[Group]:
    """The four inputs of a decoder block and the linears they feed."""
    hidden, q, kv = model.hidden, model.heads * model.head_dim, model.kv_heads * model.head_dim
    shapes: list[dict[str, tuple[int, int]]] = [
        {"q_proj": (q, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden)},
        {"o_proj": (hidden, q)},
        {"gate_proj": (model.intermediate, hidden), "up_proj": (model.intermediate, hidden)},
        {"down_proj": (hidden, model.intermediate)},
    ]
    return [Group.random(own, device) for own in shapes]


@torch.no_grad()
def measure_block(shape: str | ModelShape = "llama3_1_8b") -> dict[str, Any]:
    """Median seconds of each stage for one decoder block, its `runs`, and what shows that its results are right.

    `seconds`: GPTQ with WUSH fitted once, factors of the second moments included; `seconds_refit`: fitted on each
    updated block; `seconds_shared`: once, one transform for each input; `seconds_rtn`. `moments_seconds` and
    `moments_seconds_addmm`: 8,192 tokens of every input, and the same by `torch.addmm` in bfloat16. `loss_*`:
    relative errors of the first linear's outputs on the calibration tokens.
    """
    torch.manual_seed(0)
    device = torch.device("cuda", torch.cuda.current_device())
    groups = groups_of(MODELS[shape] if isinstance(shape, str) else shape, device)
    found: dict[str, Any] = {"tokens": WINDOWS * WINDOW_LENGTH, "runs": {}}
    _timed(found, "moments_seconds", partial(_observe, groups))
    flat = [group.inputs.flatten(0, 1) for group in groups]
    rounded = [x.new_zeros(x.shape[1], x.shape[1]) for x in flat]
    pairs = list(zip(rounded, flat, strict=True))
    _timed(found, "moments_seconds_addmm", lambda: [torch.addmm(own, x.T, x, out=own) for own, x in pairs])
    rounded.clear()
    pairs.clear()
    torch.cuda.reset_peak_memory_stats(device)
    stages: dict[str, tuple[Algorithm, wush.Transform]] = {
        "seconds": (wush.Gptq(), wush.Wush(refit=False)),
        "seconds_shared": (wush.Gptq(), wush.Wush(refit=False, share=True)),
        "seconds_refit": (wush.Gptq(), wush.Wush(refit=True)),
        "seconds_hadamard": (wush.Gptq(), wush.Hadamard()),
        "seconds_rtn": (wush.Rtn(), wush.Wush()),
    }
    first = groups[0]
    for stage, (algorithm, transform) in stages.items():
        results = _timed(found, stage, partial(_quantize, groups, algorithm, transform, device))
        found[stage.replace("seconds", "loss")] = first.loss(results[0][0], next(iter(first.weights)))
        del results
    _timed(found, "factors_seconds", lambda: [_factor(group) for group in groups])
    found["peak_gigabytes"] = torch.cuda.max_memory_allocated(device) / 1e9
    return found


def _observe(groups: list[Group]) -> None:
    for group in groups:
        group.moment.add(group.inputs)


def _quantize(
    groups: list[Group], algorithm: Algorithm, transform: wush.Transform, device: torch.device
) -> list[list[QuantizedWeight]]:
    def forget() -> None:
        for group in groups:
            group.moment.forget()

    return without_waiting(lambda: [group.quantize(algorithm, transform) for group in groups], device, forget)


def _factor(group: Group) -> Tensor:
    group.moment.forget()
    return group.moment.inverse_factor


def _timed(found: dict[str, Any], stage: str, work: Callable[[], Any]) -> Any:
    """The last result of a few runs after one that compiles; their seconds are put into `found`."""
    seconds = []
    result = None
    for _ in range(1 + REPEATS):
        result = None
        torch.cuda.synchronize()
        started = time.perf_counter()
        result = work()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    found["runs"][stage] = seconds[1:]
    found[stage] = median(seconds[1:])
    return result


if __name__ == "__main__":
    for key, value in measure_block().items():
        print(f"{key:24} {value}")
