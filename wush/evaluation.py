"""Quality of a model: perplexity, KL divergence and top-1 agreement with the original (method: what is measured).

The original model is gone once it has been quantized, and its logits are too large to keep. Its last hidden
states are small: they are kept, and share each later pass through the LM head, which is never quantized.
Shape legend: `W` windows, `M` tokens a window, `D` hidden size, `V` vocabulary.
"""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wush.backends import flushed_groups
from wush.errors import NumericError, UnsupportedModelError
from wush.formats import Format
from wush.progress import Progress, Silent
from wush.transforms import apply_blocks

log = logging.getLogger(__name__)

# Nats a token; beyond them the perplexity is no float64.
LARGEST_NLL = 700.0


@dataclass(frozen=True)
class Evaluation:
    """`perplexity`; against the original: its perplexity, mean `KL(original || model)` in nats, top-1 share."""

    perplexity: float
    perplexity_original: float
    kl: float
    top1: float
    predictions: int


@torch.no_grad()
def original_states(
    model: nn.Module, windows: Tensor, *, batch_size: int = 4, progress: Progress | None = None
) -> Tensor:
    """What the LM head is fed for each of the windows `(W, M)`: `(W, M, D)` on the CPU, in the model's dtype."""
    head = _lm_head(model)
    states: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        states.append(args[0].cpu())

    handle = head.register_forward_pre_hook(keep)
    try:
        for batch in _batches(windows, batch_size, "original model", progress or Silent()):
            model(input_ids=batch.to(_device(model)), use_cache=False)
    finally:
        handle.remove()
    found = torch.cat(states)
    if not found.isfinite().all():
        raise NumericError("the original model's last hidden states are not finite; its weights are damaged")
    return found


@torch.no_grad()
def evaluate(
    model: nn.Module,
    windows: Tensor,
    original: Tensor,
    *,
    batch_size: int = 4,
    progress: Progress | None = None,
) -> Evaluation:
    """Compare `model` on windows of token ids `(W, M)` with the original's states from `original_states`.

    Sums run in float64 window by window, so that the batch size changes no sum. Raises `NumericError` for
    logits that are not finite, which names the first module whose output is not. Warns of activations that lost bits
    as FP8.
    """
    flushed = flushed_groups(_device(model))
    nll = nll_original = kl = 0.0
    agree = count = 0
    batches = zip(windows.split(batch_size), original.split(batch_size), strict=True)
    total = math.ceil(len(windows) / batch_size)
    for ids, states in (progress or Silent()).track(batches, "evaluation windows", total):
        ids = ids.to(_device(model))
        with _joined_at_head(model, states):
            logits = model(input_ids=ids, use_cache=False).logits
        for window, ours, theirs in zip(ids, *logits.chunk(2), strict=True):
            log_p, log_q = F.log_softmax(theirs[:-1].float(), -1), F.log_softmax(ours[:-1].float(), -1)
            targets = window[1:, None]
            nll -= log_q.gather(1, targets).double().sum().item()
            nll_original -= log_p.gather(1, targets).double().sum().item()
            kl += F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).double().sum().item()
            agree += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
            count += targets.numel()
        if not math.isfinite(nll + kl):
            raise NumericError(_what_is_not_finite(model, ids))
    if not max(nll, nll_original) / count < LARGEST_NLL:
        raise NumericError("the quantized model gives the text no probability: more than 700 nats a token")
    lost = flushed_groups(_device(model)) - flushed
    if lost:
        log.warning(
            "%d groups of activations were under 2^-28 of their row and lost bits; kernels=torch keeps them", lost
        )
    return Evaluation(math.exp(nll / count), math.exp(nll_original / count), kl / count, agree / count, count)


def _what_is_not_finite(model: nn.Module, ids: Tensor) -> str:
    """Where in a model NaN or infinity first appears for a batch of token ids `(B, M)`, in one sentence."""
    first: list[str] = []

    def look(name: str, output: object) -> None:
        output = output[0] if isinstance(output, tuple) and output else output
        if not first and isinstance(output, Tensor) and output.is_floating_point() and not output.isfinite().all():
            first.append(name)

    handles = [
        module.register_forward_hook(lambda _, args, output, name=name: look(name, output))
        for name, module in model.named_modules()
        if name
    ]
    try:
        model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    if not first:
        return "the quantized model's logits are not finite, or give the text no probability"
    return (
        f"the quantized model's logits are not finite: NaN or infinity first comes out of {first[0]}; leave it out "
        "with quantize.exclude=[...], or use a transform or dtype with more room"
    )


def layer_loss(x: Tensor, weight_oi: Tensor, quantized_weight: Tensor, transform: Tensor, fmt: Format) -> float:
    """Relative squared error `||Q(x) Q(W)^T - x W^T||^2 / ||x W^T||^2` of one layer on tokens `(M, I)`.

    `quantized_weight`: `Q(W)`, dequantized, in the coordinates of `transform`.
    """
    exact = x.double() @ weight_oi.double().T
    rounded = fmt.round_trip(apply_blocks(x.float(), transform.float())).double() @ quantized_weight.double().T
    return ((rounded - exact).square().sum() / exact.square().sum()).item()


def _device(model: nn.Module) -> torch.device:
    return next(_lm_head(model).parameters()).device


def _lm_head(model: nn.Module) -> nn.Module:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None:
        raise UnsupportedModelError(f"{type(model).__name__} has no LM head; load it with AutoModelForCausalLM")
    return head


def _batches(windows: Tensor, size: int, what: str, progress: Progress) -> Iterator[Tensor]:
    return progress.track(windows.split(size), what, math.ceil(len(windows) / size))


@contextmanager
def _joined_at_head(model: nn.Module, original: Tensor) -> Iterator[None]:
    """While open, the head is fed the model's own states and, behind them in the batch, the original's."""

    def join(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (torch.cat([args[0], original.to(args[0])]),)

    handle = _lm_head(model).register_forward_pre_hook(join)
    try:
        yield
    finally:
        handle.remove()
