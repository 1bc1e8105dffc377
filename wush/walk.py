"""The walk through a model: each decoder block is calibrated, quantized and left behind (method: a model)."""

import logging
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from wush.algorithms import Algorithm, QuantizedWeight
from wush.backends import DEFAULT, Settings
from wush.decoder import (
    BlockCalls,
    calls_of,
    check_windows,
    follow,
    linear_inputs,
    linears,
    record_calls,
    run_block,
)
from wush.device import without_waiting
from wush.errors import NumericError, UnsupportedModelError
from wush.formats import Format
from wush.linear import QuantLinear
from wush.losses import share
from wush.lost import counting, lost_of_weight, warn
from wush.modes import in_evaluation_mode
from wush.moments import SecondMoment
from wush.operands import transformed
from wush.progress import Progress, Silent
from wush.reports import BlockReport, LayerReport, QuantizationReport, SavedBlocks
from wush.saving import refuse_saving
from wush.survey import survey
from wush.transforms import Transform

log = logging.getLogger(__name__)


@dataclass
class _Group:
    """Linears of a block that are fed by one tensor, and that tensor's second moment."""

    names: list[str]
    moment: SecondMoment


@dataclass(frozen=True)
class _Work:
    """What every block of a walk is quantized with; `calls` of batches hold the hidden states of the next block."""

    format: Format
    transform: Transform
    algorithm: Algorithm
    calls: list[BlockCalls]
    saved: SavedBlocks | None
    progress: Progress
    settings: Settings

    def moment_of(self, x: Tensor, name: str) -> SecondMoment:
        """The empty moment of inputs such as x, with no more kept than is needed."""
        size = None if self.algorithm.needs_whole_moment else self.format.group_size
        return SecondMoment(x.shape[-1], x.device, name, size, keep_peaks=self.transform.needs_peaks)


@in_evaluation_mode
@torch.no_grad()
def quantize(
    model: nn.Module,
    batches: Sequence[Tensor],
    *,
    format: Format,
    transform: Transform,
    algorithm: Algorithm,
    exclude: Sequence[str] = (),
    blocks: Sequence[int] | None = None,
    report: QuantizationReport | None = None,
    progress: Progress | None = None,
    on_block: Callable[[BlockReport], None] | None = None,
    saved: SavedBlocks | None = None,
    settings: Settings = DEFAULT,
) -> nn.Module:
    """Replace the linears of every decoder block by `QuantLinear`s, in place; the same model.

    `batches`: calibration token ids `(B, M)`. `exclude`: patterns of full linear names to leave as they are, such
    as `*.down_proj`. `blocks`: the decoder blocks to quantize, counted from 0, or all. `report` is filled in with each
    block as it is done, and `on_block` called. Blocks that `saved` has are restored, and each new one is given to it:
    the result is the same, bit for bit. `settings`: what quantized layers may run on. The model is in evaluation mode
    meanwhile, and refuses to be saved as another afterwards. Linears that do something else besides stay as they are.
    Raises, before any work, `ValueError` for a layer or an algorithm that does not fit the format, a pattern that
    excludes nothing, a block that is not there, or tokens that the model cannot take; `UnsupportedModelError` for a
    model that is no plain one in memory or whose blocks are no row that each token passes once; `NumericError` that
    names the layer.
    """
    progress = progress or Silent()
    if any(isinstance(module, QuantLinear) for module in model.modules()):
        raise ValueError("the model is quantized already; load the original again")
    algorithm.check(format)
    report = QuantizationReport() if report is None else report
    surveyed = survey(model, format, exclude, blocks, report)
    blocks_name, decoder_blocks, chosen = surveyed.name, surveyed.blocks, surveyed.chosen
    calls = _record_batches(model, decoder_blocks, batches, "calibration", progress)
    work = _Work(format, transform, algorithm, calls, saved, progress, settings)
    walked = list(decoder_blocks)[: max(chosen) + 1]
    refuse_saving(model)
    for index, block in progress.track(enumerate(walked), "decoder blocks", len(walked)):
        if index not in chosen:
            _pass_on(block, index, calls, next(block.parameters()).device)
            continue
        which = f"{blocks_name}.{index}", block, index, chosen[index]
        done = _restore(*which, work) or _quantize_block(*which, work)
        _note_unrun(done, chosen[index], report)
        report.blocks.append(done)
        if on_block:
            on_block(done)
    if not any(block.layers for block in report.blocks):
        raise UnsupportedModelError(f"{type(model).__name__}: its forward runs none of the linears to quantize")
    warn(report.weight_lost, format, None)
    warn(report.lost, format, "calibration")
    return model


def _quantize_block(name: str, block: nn.Module, index: int, names: list[str], work: _Work) -> BlockReport:
    """Calibrate and quantize a block, and feed the next one."""
    started = time.perf_counter()
    device = next(block.parameters()).device
    groups, outputs = _calibrate(name, block, index, names, work, device)
    layers = _quantize_layers(name, block, index, groups, work, device)
    work.progress.detail(f"{name} output error")
    with _all_used(name, block, layers), counting(block) as count:
        mse, relative = _advance(block, work.calls, index, outputs, device)
    lost = count.found()
    layers = [replace(layer, lost=lost.get(layer.name)) for layer in layers]
    if not mse < float("inf"):
        raise NumericError(f"{name}: the quantized block's output is not finite")
    done = BlockReport(index, name, mse, relative, time.perf_counter() - started, tuple(layers))
    if work.saved:
        work.saved.save(done, _tensors(block))
    return done


def _restore(name: str, block: nn.Module, index: int, names: list[str], work: _Work) -> BlockReport | None:
    """Put a saved block's layers in place and feed the next one; None when it was not saved."""
    found = work.saved.load(index) if work.saved else None
    if found is None:
        return None
    report, tensors = found
    work.progress.detail(f"{name} restored")
    device = next(block.parameters()).device
    if not {layer.name for layer in report.layers} <= set(names):
        raise ValueError(f"{name}: the saved block is of another model or other excludes; remove it")
    for layer in report.layers:
        own = {key.removeprefix(f"{layer.name}."): t for key, t in tensors.items() if key.startswith(f"{layer.name}.")}
        state = {key: tensor if key == "_extra_state" else tensor.to(device) for key, tensor in own.items()}
        block.set_submodule(
            layer.name, QuantLinear.from_state(state, work.format, f"{name}.{layer.name}", work.settings)
        )
    _join(block, {layer.shared_input for layer in report.layers}, work.transform)
    _pass_on(block, index, work.calls, device)
    return report


def _pass_on(block: nn.Module, index: int, calls: list[BlockCalls], device: torch.device) -> None:
    """Replace each batch's hidden states by the block's outputs."""
    for call in calls:
        call.hidden = run_block(block, call.hidden.to(device), call.arguments[index]).cpu()


def _tensors(block: nn.Module) -> dict[str, Tensor]:
    """What `SavedBlocks` keeps of a quantized block: no tensor shares memory with another."""
    return {
        f"{name}.{key}": tensor.clone()
        for name, module in block.named_modules()
        if isinstance(module, QuantLinear)
        for key, tensor in module.state_dict().items()
    }


def _note_unrun(done: BlockReport, names: list[str], report: QuantizationReport) -> None:
    """Put linears that the calibration did not reach into the report."""
    for missing in sorted(set(names) - {layer.name for layer in done.layers}, key=names.index):
        report.skipped[f"{done.name}.{missing}"] = "no calibration token reaches it"
        log.warning("%s.%s: not quantized, no calibration token reaches it", done.name, missing)


def _record_batches(
    model: nn.Module, blocks: nn.ModuleList, batches: Sequence[Tensor], what: str, progress: Progress
) -> list[BlockCalls]:
    """What the blocks are called with for each batch, every one of which is checked before the first runs."""
    if not len(batches):
        raise ValueError(f"no {what} batches; pass at least one tensor of token ids (B, M)")
    check_windows(model, batches, what)
    device = next(blocks.parameters()).device
    route = follow(model, blocks, batches[0].to(device))
    tracked = progress.track(batches, f"{what} batches", len(batches))
    return [record_calls(model, blocks, batch.to(device), route) for batch in tracked]


def _calibrate(
    name: str, block: nn.Module, index: int, names: list[str], work: _Work, device: torch.device
) -> tuple[list[_Group], list[Tensor]]:
    """Run the batches through the original block: second moments of its inputs, and its outputs `(B, M, I)`."""
    groups: dict[str, _Group] = {}
    outputs = []
    for number, call in enumerate(work.calls):
        work.progress.detail(f"{name} second moments, batch {number + 1} of {len(work.calls)}")
        with linear_inputs(block, names) as seen:
            outputs.append(run_block(block, call.hidden.to(device), call.arguments[index]).cpu())
        for together in _by_input(seen):
            for group in _groups_of(name, together, seen, groups, work):
                for x in seen[together[0]]:
                    group.moment.add(x)
    return list({id(group): group for group in groups.values()}.values()), outputs


def _by_input(seen: dict[str, list[Tensor]]) -> list[list[str]]:
    """The linears that tokens reached, those fed by the same tensors together."""
    by_tensors: dict[tuple[int, ...], list[str]] = {}
    for linear, inputs in seen.items():
        if any(x.numel() for x in inputs):  # else an expert to which none went
            by_tensors.setdefault(tuple(id(x) for x in inputs), []).append(linear)
    return list(by_tensors.values())


def _groups_of(
    name: str,
    together: list[str],
    seen: dict[str, list[Tensor]],
    groups: dict[str, _Group],
    work: _Work,
) -> list[_Group]:
    """The groups that linears seen together belong to; those not seen before become one group of their own."""
    new = [linear for linear in together if linear not in groups]
    if new:
        group = _Group(new, work.moment_of(seen[new[0]][0], f"{name}.{new[0]}"))
        groups |= dict.fromkeys(new, group)
    found = list({id(groups[linear]): groups[linear] for linear in together}.values())
    for group in found:
        if not set(group.names) <= set(together):
            raise UnsupportedModelError(
                f"{name}: {', '.join(group.names)} share their input in one calibration batch and not in another"
            )
    return found


def _quantize_layers(
    name: str, block: nn.Module, index: int, groups: list[_Group], work: _Work, device: torch.device
) -> list[LayerReport]:
    """Put quantized layers in the place of a block's linears, those fed by one tensor together."""
    originals = linears(block)

    def quantized(group: _Group) -> list[QuantizedWeight]:
        names = [f"{name}.{linear}" for linear in group.names]
        work.progress.detail(names[0] if len(names) == 1 else f"{name}: {', '.join(group.names)}")
        weights = [originals[linear].weight for linear in group.names]
        return work.algorithm.quantize_group(weights, group.moment, work.transform, work.format, names)

    def forget() -> None:
        for group in groups:
            group.moment.forget()

    results = without_waiting(lambda: [quantized(group) for group in groups], device, forget)
    if work.format.calibrates_inputs:
        work.progress.detail(f"{name} ranges of inputs")
        results = _with_input_scales(block, index, groups, results, work, device)
    layers = []
    for group, weights in zip(groups, results, strict=True):
        together = sum(originals[linear].weight.numel() for linear in group.names)
        for linear, weight in zip(group.names, weights, strict=True):
            layer = QuantLinear(weight, work.format, originals[linear].bias, f"{name}.{linear}", work.settings)
            block.set_submodule(linear, layer)
            size = originals[linear].weight.numel()
            bits = _bits_per_weight(layer, size, together if work.transform.share else size)
            lost = lost_of_weight(originals[linear].weight, layer)
            layers.append(LayerReport(linear, tuple(group.names), bits, size, weight_lost=lost))
    _join(block, {tuple(group.names) for group in groups}, work.transform)
    return layers


def _with_input_scales(
    block: nn.Module,
    index: int,
    groups: list[_Group],
    results: list[list[QuantizedWeight]],
    work: _Work,
    device: torch.device,
) -> list[list[QuantizedWeight]]:
    """The weights with the global scales of their inputs, from the peaks of `T x` in the block as it still is.

    It takes a pass of its own: what the inputs are is known before any `T`, and their peaks only after it.
    """
    names = [group.names[0] for group in groups]
    peaks: dict[tuple[int, int], Tensor] = {}
    for call in work.calls:
        with linear_inputs(block, names) as seen:
            run_block(block, call.hidden.to(device), call.arguments[index])
        for n, (linear, weights) in enumerate(zip(names, results, strict=True)):
            for x in filter(Tensor.numel, seen[linear]):
                for transform in {id(weight.transform): weight.transform for weight in weights}.values():
                    key, peak = (n, id(transform)), transformed(x, transform).abs().amax()
                    peaks[key] = torch.maximum(peaks[key], peak) if key in peaks else peak
    scales = {key: work.format.input_global_scale(peak.item()) for key, peak in peaks.items()}
    return [
        [replace(weight, input_scale=scales[n, id(weight.transform)]) for weight in weights]
        for n, weights in enumerate(results)
    ]


@contextmanager
def _all_used(name: str, block: nn.Module, layers: Sequence[LayerReport]) -> Iterator[None]:
    """Refuse a block that does more with its linears than call them where they are registered."""
    with calls_of(block, [layer.name for layer in layers]) as ran:
        try:
            yield
        except (AttributeError, TypeError) as error:
            if _raised_in(error).startswith("wush."):
                raise  # by a quantized layer, in words
            raise UnsupportedModelError(
                f"{name}: its forward needs an nn.Linear for more than to call it ({error}); leave that layer out with "
                "quantize.exclude=[...]"
            ) from error
    unused = [layer.name for layer in layers if layer.name not in ran]
    if unused:
        raise UnsupportedModelError(
            f"{name}: its forward goes on with the original {', '.join(unused)}, which it holds in another place (a "
            "list, a closure); leave it out with quantize.exclude=[...]"
        )


def _raised_in(error: Exception) -> str:
    """The name of the module whose code raised an error."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__", ""))


def _bits_per_weight(layer: QuantLinear, own: int, sharing: int) -> float:
    """Bits for each of a layer's `own` weights, whose transform is also that of the other `sharing` weights."""
    transform = layer.transform_bits()
    return (layer.storage_bits() - transform) / own + transform / sharing


def _join(block: nn.Module, groups: Iterable[tuple[str, ...]], transform: Transform) -> None:
    """Run linears that are fed by one tensor as one, where they have one transform."""
    from wush.joint import join

    for names in groups:
        if transform.share and len(names) > 1:
            join(block, names)


def _advance(
    block: nn.Module, calls: list[BlockCalls], index: int, originals: list[Tensor], device: torch.device
) -> tuple[float, float]:
    """Replace each batch's hidden states by the quantized block's outputs; its mean squared error, and relative.

    The sums stay on the device until the last batch is done.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for call, original in zip(calls, originals, strict=True):
        output = run_block(block, call.hidden.to(device), call.arguments[index])
        exact = original.to(device).double()
        sums += torch.stack([(output.double() - exact).square().sum(), exact.square().sum()])
        call.hidden = output.cpu()
    error, power = sums.tolist()
    return error / sum(original.numel() for original in originals), share(error, power)
