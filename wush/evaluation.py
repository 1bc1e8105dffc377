"""Quality of a model: perplexity, KL divergence and top-1 agreement with the original (method: what is measured).

The original model is gone once it has been quantized, and its logits are too large to keep. Its last hidden
states are small: they are kept, and share each later pass through the LM head, which is never quantized.
Shape legend: `W` windows, `B` of them in a batch, `M` tokens a window, `D` hidden size, `V` vocabulary.
"""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wush.backends import flushed_groups
from wush.calls import input_of
from wush.decoder import check_windows
from wush.errors import NumericError, UnsupportedModelError
from wush.formats import Format
from wush.linear import QuantLinear
from wush.lost import Lost, counting, warn
from wush.modes import in_evaluation_mode
from wush.plain import check_plain
from wush.progress import Progress, Silent
from wush.texts import PAD, Batch, batches
from wush.transforms import apply_blocks

log = logging.getLogger(__name__)

# Nats a token; beyond them the perplexity is no float64.
LARGEST_NLL = 700.0


@dataclass(frozen=True)
class WindowSums:
    """Sums over the predictions of each window, in the windows' order; nats, and counts."""

    nll: list[float]
    nll_original: list[float]
    kl: list[float]
    agree: list[int]
    predictions: list[int]


@dataclass(frozen=True)
class Evaluation:
    """`perplexity`; against the original: its perplexity, mean `KL(original || model)` in nats, top-1 share.

    `windows`: what these are means of, window by window. `lost`: the quantized layers, by name, whose format's window
    lost groups of their inputs.
    """

    perplexity: float
    perplexity_original: float
    kl: float
    top1: float
    predictions: int
    windows: WindowSums
    lost: dict[str, Lost]


@in_evaluation_mode
@torch.no_grad()
def original_states(
    model: nn.Module, windows: Tensor, *, batch_size: int = 4, progress: Progress | None = None
) -> Tensor:
    """What the LM head is fed for each of the windows `(W, M)`: `(W, M, D)` on the CPU, in the model's dtype.

    Behind the end of a shorter window, which is filled with `wush.texts.PAD`, the states are zero. Raises, before
    anything runs, `UnsupportedModelError` for a model that others quantized or offloaded, and `ValueError` for windows
    that the model has no tokens or positions for.
    """
    check_plain(model)
    if any(isinstance(module, QuantLinear) for module in model.modules()):
        raise UnsupportedModelError(f"{type(model).__name__} is quantized, and no original; load that again")
    _check_windows(model, windows)
    head, device = _lm_head(model), _device(model)
    seen: list[Tensor] = []
    found: Tensor | None = None
    handle = head.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(input_of(args, kwargs).cpu()), with_kwargs=True
    )
    try:
        for batch in _tracked(windows, batch_size, "original model", progress):
            model(input_ids=batch.ids.to(device), use_cache=False)
            states = _states(model, seen, batch.ids)
            seen.clear()
            if found is None:
                found = states.new_zeros(*windows.shape, states.shape[-1])
            found[batch.rows, : batch.ids.shape[1]] = states
    finally:
        handle.remove()
    assert found is not None
    if not found.isfinite().all():
        raise NumericError("the original model's last hidden states are not finite; its weights are damaged")
    return found


@in_evaluation_mode
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

    Sums run in float64 window by window, so that the batch size changes no sum; shorter windows are filled with
    `wush.texts.PAD`, which enters none. A token that both models rule out, with logits of -inf, counts as 0. Raises
    `NumericError` for other logits that are not finite, which names whose they are and where they come from. Warns of
    activations that a format's window lost, or that lost bits as FP8.
    """
    _check_windows(model, windows)
    if original.shape[:-1] != windows.shape:
        raise ValueError(
            f"states {tuple(original.shape)} are not those of windows {tuple(windows.shape)}: pass what "
            "original_states returned for the same windows"
        )
    flushed = flushed_groups(_device(model))
    sums: list[_Window | None] = [None] * len(windows)
    with counting(model) as count:
        for batch in _tracked(windows, batch_size, "evaluation windows", progress):
            ids = batch.ids.to(_device(model))
            with _joined_at_head(model, original[batch.rows, : ids.shape[1]]):
                logits = model(input_ids=ids, use_cache=False).logits
            for row, window, ours, theirs in zip(batch.rows.tolist(), ids, *logits.chunk(2), strict=True):
                sums[row] = _Window.of(window, ours, theirs)
                if not sums[row].finite:
                    raise NumericError(_what_is_wrong(model, window, ours, theirs))
    _warn_of_flushed(flushed_groups(_device(model)) - flushed)
    lost = count.found()
    if count.format is not None:
        warn(lost, count.format)
    return _means([one for one in sums if one is not None], lost)


@dataclass(frozen=True)
class _Window:
    """Sums over one window's predictions."""

    nll: float
    nll_original: float
    kl: float
    agree: int
    predictions: int

    @classmethod
    def of(cls, ids: Tensor, ours: Tensor, theirs: Tensor) -> "_Window":
        """Of token ids `(M,)` and both models' logits `(M, V)`."""
        log_q, log_p = _log_probabilities(ours), _log_probabilities(theirs)
        targets = ids[1:, None]
        return cls(
            nll=-log_q.gather(1, targets).double().sum().item(),
            nll_original=-log_p.gather(1, targets).double().sum().item(),
            kl=_divergence(log_p, log_q),
            agree=int((log_p.argmax(-1) == log_q.argmax(-1)).sum()),
            predictions=targets.numel(),
        )

    @property
    def finite(self) -> bool:
        """Whether all sums are."""
        return math.isfinite(self.nll + self.nll_original + self.kl)


def _log_probabilities(logits: Tensor) -> Tensor:
    """Of the next token at each position that has one, `(M - 1, V)` float32."""
    return F.log_softmax(logits[:-1].float(), -1)


def _divergence(log_p: Tensor, log_q: Tensor) -> float:
    """`KL(p || q)` summed over positions; a token of probability 0 in p counts as 0, in q alone as infinity."""
    terms = F.kl_div(log_q, log_p, reduction="none", log_target=True)
    total = terms.sum(-1).double().sum().item()
    if not math.isfinite(total):  # 0 * (-inf - -inf) and 0 * inf are NaN; rare, so that only they pay for masks
        terms = terms.masked_fill(_only_in(log_p, log_q), torch.inf).masked_fill(log_p.isneginf(), 0)
        total = terms.sum(-1).double().sum().item()
    return total


def _only_in(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Where p gives a token some probability, however small, and q none."""
    return log_q.isneginf() & ~log_p.isneginf()


def _means(windows: list[_Window], lost: dict[str, Lost]) -> Evaluation:
    sums = WindowSums(*([getattr(one, part.name) for one in windows] for part in fields(_Window)))
    count = sum(sums.predictions)
    # Exact sums, so that the order of windows changes no bit.
    nll, nll_original, kl = (math.fsum(values) / count for values in (sums.nll, sums.nll_original, sums.kl))
    for value, whose in ((nll_original, "original"), (nll, "quantized")):
        if not value < LARGEST_NLL:
            raise NumericError(
                f"the {whose} model gives the text no probability: more than {LARGEST_NLL:.0f} nats a token"
            )
    return Evaluation(math.exp(nll), math.exp(nll_original), kl, sum(sums.agree) / count, count, sums, lost)


def _warn_of_flushed(groups: int) -> None:
    if groups:
        log.warning(
            "%d groups of activations were under 2^-28 of their row and lost bits; kernels=torch keeps them", groups
        )


def _what_is_wrong(model: nn.Module, window: Tensor, ours: Tensor, theirs: Tensor) -> str:
    """Why a window `(M,)` has no finite sums, of whose logits `(M, V)`, and what to do about it, in one sentence."""
    log_q, log_p = _log_probabilities(ours), _log_probabilities(theirs)
    if log_p.isnan().any():
        return "the original model's logits are not finite; its LM head is damaged, or its dtype has too little room"
    if not log_q.isnan().any():
        targets = window[1:, None]
        ruled_out = log_p.gather(1, targets).isneginf().flatten()
        if ruled_out.any():
            token = int(targets[ruled_out][0])
            return (
                f"the original model rules out token {token} of the text, with a logit of -inf: its perplexity there "
                "is infinite; evaluate on a text without it"
            )
        position, token = _only_in(log_p, log_q).nonzero()[0].tolist()
        return (
            f"the quantized model rules out token {token} at position {position + 1} of a window, with a logit of -inf "
            "that the original does not have: KL is infinite; use a dtype with more room, or leave layers of the last "
            "decoder blocks out with quantize.exclude=[...]"
        )
    return _what_is_not_finite(model, window[None])


def _what_is_not_finite(model: nn.Module, ids: Tensor) -> str:
    """Where in a model NaN or infinity first appears for a batch of token ids `(B, M)`, in one sentence."""
    first: list[str] = []
    head = _lm_head(model)

    def look(name: str, module: nn.Module, output: object) -> None:
        output = output[0] if isinstance(output, tuple) and output else output
        if first or not isinstance(output, Tensor) or not output.is_floating_point():
            return
        # A head may rule tokens out with -inf.
        if not (output.isfinite() | (output.isneginf() & (module is head))).all():
            first.append(name)

    handles = [
        module.register_forward_hook(lambda module, args, output, name=name: look(name, module, output))
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


def _states(model: nn.Module, fed: list[Tensor], ids: Tensor) -> Tensor:
    """What the head was fed for token ids `(B, M)`; refused unless it is one state a token, all at once."""
    if len(fed) == 1 and fed[0].shape[:-1] == ids.shape:
        return fed[0]
    shapes = ", ".join(str(tuple(states.shape)) for states in fed) or "nothing"
    raise UnsupportedModelError(
        f"{type(model).__name__}: its forward feeds its LM head {shapes} for token ids {tuple(ids.shape)}; states "
        "(B, M, D), once a forward, are what can be compared"
    )


def _lm_head(model: nn.Module) -> nn.Module:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None:
        raise UnsupportedModelError(f"{type(model).__name__} has no LM head; load it with AutoModelForCausalLM")
    return head


def _check_windows(model: nn.Module, windows: Tensor) -> None:
    if not len(windows):
        raise ValueError("no windows to evaluate on; pass token ids (W, M)")
    if int((windows != PAD).sum(1).max()) < 2:
        raise ValueError("evaluation: windows of one token predict none; set evaluation.window_length=2 or more")
    check_windows(model, [batch.ids for batch in batches(windows, len(windows))], "evaluation")


def _tracked(windows: Tensor, size: int, what: str, progress: Progress | None) -> Iterator[Batch]:
    found = batches(windows, size)
    return (progress or Silent()).track(found, what, len(found))


@contextmanager
def _joined_at_head(model: nn.Module, original: Tensor) -> Iterator[None]:
    """While open, the head is fed the model's own states and, behind them in the batch, the original's."""

    def join(
        _: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]
    ) -> tuple[tuple[Tensor], dict[str, Tensor]]:
        own = input_of(args, kwargs)
        return (torch.cat([own, original.to(own)]),), {}

    handle = _lm_head(model).register_forward_pre_hook(join, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
