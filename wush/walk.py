"""The walk through a model: each decoder block is calibrated, quantized and left behind (method: a model)."""

import fnmatch
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from wush.algorithms import Algorithm, QuantizedWeight
from wush.backends import DEFAULT, Settings
from wush.decoder import BlockCalls, find_blocks, linear_inputs, linears, record_calls, run_block
from wush.device import without_waiting
from wush.errors import NumericError, UnsupportedModelError
from wush.formats import Format, check_groups
from wush.linear import QuantLinear
from wush.moments import SecondMoment
from wush.progress import Progress, Silent
from wush.transforms import Transform

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerReport:
    """One quantized linear: its name within the block, the linears it shared its input with, and its storage.

    A transform that linears share is counted once, each linear having its part of it by its number of weights.
    """

    name: str
    shared_input: tuple[str, ...]
    bits_per_weight: float
    weights: int


@dataclass(frozen=True)
class BlockReport:
    """One decoder block: mean squared output error against the original block, absolute and relative."""

    index: int
    name: str
    mse: float
    relative_mse: float
    seconds: float
    layers: tuple[LayerReport, ...]


@dataclass
class QuantizationReport:
    """What `quantize` did, block by block; `skipped` are linears left as they were, with the reason."""

    blocks: list[BlockReport] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def bits_per_weight(self) -> float:
        """Average over all quantized weights: codes, scales and transforms counted."""
        layers = [layer for block in self.blocks for layer in block.layers]
        return sum(layer.bits_per_weight * layer.weights for layer in layers) / sum(layer.weights for layer in layers)


class SavedBlocks(Protocol):
    """Keeps quantized decoder blocks, so that an interrupted walk goes on where it was.

    A block's tensors are the state dicts of its `QuantLinear`s, under their names within the block.
    """

    def load(self, index: int) -> tuple[BlockReport, dict[str, Tensor]] | None:
        """A block as it was saved, tensors on the CPU; None when it was not."""

    def save(self, report: BlockReport, tensors: dict[str, Tensor]) -> None:
        """Keep a block that is done."""


@dataclass
class _Group:
    """Linears of a block that are fed by one tensor, and that tensor's second moment."""

    names: list[str]
    moment: SecondMoment


@dataclass(frozen=True)
class _Work:
    """What every block of a walk is quantized with; `calls` hold the hidden states that the next block is fed."""

    format: Format
    transform: Transform
    algorithm: Algorithm
    calls: list[BlockCalls]
    saved: SavedBlocks | None
    progress: Progress
    settings: Settings


@torch.no_grad()
def quantize(
    model: nn.Module,
    batches: Sequence[Tensor],
    *,
    format: Format,
    transform: Transform,
    algorithm: Algorithm,
    exclude: Sequence[str] = (),
    report: QuantizationReport | None = None,
    progress: Progress | None = None,
    on_block: Callable[[BlockReport], None] | None = None,
    saved: SavedBlocks | None = None,
    settings: Settings = DEFAULT,
) -> nn.Module:
    """Replace the linears of every decoder block by `QuantLinear`s, in place; the same model.

    `batches`: calibration token ids `(B, M)`. `exclude`: patterns of full linear names to leave as they are, such
    as `*.down_proj`. `report` is filled in with each block as it is done, and `on_block` called. Blocks that `saved`
    has are restored, and each new one is given to it: the result is the same, bit for bit. `settings`: what quantized
    layers may run on. Raises `ValueError` for a layer that does not fit the format or a pattern that
    excludes nothing, before any work; `UnsupportedModelError`; `NumericError` that names the layer.
    """
    progress = progress or Silent()
    if any(isinstance(module, QuantLinear) for module in model.modules()):
        raise ValueError("the model is quantized already; load the original again")
    blocks_name, blocks = find_blocks(model)
    report = QuantizationReport() if report is None else report
    _check_excludes(exclude, blocks_name, blocks)
    chosen = [_choose(f"{blocks_name}.{i}", block, exclude, report) for i, block in enumerate(blocks)]
    _check_layers(blocks_name, blocks, chosen, format)
    calls = _record_batches(model, blocks, batches, progress)
    work = _Work(format, transform, algorithm, calls, saved, progress, settings)
    for index, block in progress.track(enumerate(blocks), "decoder blocks", len(blocks)):
        name = f"{blocks_name}.{index}"
        done = _restore(name, block, index, chosen[index], work) or _quantize_block(
            name, block, index, chosen[index], work
        )
        done_names = {layer.name for layer in done.layers}
        for missing in (linear for linear in chosen[index] if linear not in done_names):
            report.skipped[f"{name}.{missing}"] = "the block's forward does not run it"
            log.warning("%s.%s: not quantized, the block's forward does not run it", name, missing)
        report.blocks.append(done)
        if on_block:
            on_block(done)
    if not any(block.layers for block in report.blocks):
        raise UnsupportedModelError(f"{type(model).__name__}: its forward runs none of the linears to quantize")
    return model


def _quantize_block(name: str, block: nn.Module, index: int, names: list[str], work: _Work) -> BlockReport:
    """Calibrate and quantize a block, and feed the next one."""
    started = time.perf_counter()
    device = next(block.parameters()).device
    moment_size = None if work.algorithm.needs_whole_moment else work.format.group_size
    groups, outputs = _calibrate(name, block, work.calls, index, names, moment_size, device, work.progress)
    layers = _quantize_layers(name, block, groups, work, device)
    work.progress.detail(f"{name} output error")
    mse, relative = _advance(block, work.calls, index, outputs, device)
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
    for call in work.calls:
        call.hidden = run_block(block, call.hidden.to(device), call.arguments[index]).cpu()
    return report


def _tensors(block: nn.Module) -> dict[str, Tensor]:
    """What `SavedBlocks` keeps of a quantized block: no tensor shares memory with another."""
    return {
        f"{name}.{key}": tensor.clone()
        for name, module in block.named_modules()
        if isinstance(module, QuantLinear)
        for key, tensor in module.state_dict().items()
    }


def _choose(name: str, block: nn.Module, exclude: Sequence[str], report: QuantizationReport) -> list[str]:
    """The linears of a block to quantize; what is left as it is, excluded or no `nn.Linear`, goes into the report."""
    for parameter_name, parameter in block.named_parameters():
        owner = block.get_submodule(parameter_name.rpartition(".")[0])
        if parameter.ndim > 1 and not isinstance(owner, nn.Linear):
            report.skipped[f"{name}.{parameter_name}"] = f"{type(owner).__name__} is no nn.Linear"
            log.warning("%s.%s: not quantized, %s is no nn.Linear", name, parameter_name, type(owner).__name__)
    names = []
    for linear in linears(block):
        pattern = next((p for p in exclude if fnmatch.fnmatchcase(f"{name}.{linear}", p)), None)
        if pattern is None:
            names.append(linear)
        else:
            report.skipped[f"{name}.{linear}"] = f"excluded by {pattern!r}"
    return names


def _check_layers(blocks_name: str, blocks: nn.ModuleList, chosen: list[list[str]], fmt: Format) -> None:
    """Refuse, with every problem listed, what would fail later: sizes and non-finite weights."""
    problems = []
    for index, block in enumerate(blocks):
        for name in chosen[index]:
            linear, what = linears(block)[name], f"{blocks_name}.{index}.{name}"
            try:
                check_groups(linear.in_features, fmt, what)
            except ValueError as error:
                problems.append(str(error))
            if not linear.weight.isfinite().all():
                raise NumericError(f"{what}: NaN or infinity in the weight; the checkpoint is damaged")
    if problems:
        raise ValueError("\n".join(problems))
    if not any(chosen):
        raise UnsupportedModelError("every linear is excluded: nothing to quantize; use format=bf16 for a baseline")


def _record_batches(
    model: nn.Module, blocks: nn.ModuleList, batches: Sequence[Tensor], progress: Progress
) -> list[BlockCalls]:
    if not len(batches):
        raise ValueError("no calibration batches; pass at least one tensor of token ids (B, M)")
    device = next(blocks.parameters()).device
    tracked = progress.track(batches, "calibration batches", len(batches))
    return [record_calls(model, blocks, batch.to(device)) for batch in tracked]


def _check_excludes(exclude: Sequence[str], blocks_name: str, blocks: nn.ModuleList) -> None:
    """Raise `ValueError` for patterns that match no linear, with some names that could be meant."""
    names = [f"{blocks_name}.{i}.{linear}" for i, block in enumerate(blocks) for linear in linears(block)]
    useless = [pattern for pattern in exclude if not fnmatch.filter(names, pattern)]
    if useless:
        known = ", ".join(names[: len(linears(blocks[0]))])
        raise ValueError(f"quantize.exclude={useless} matches no linear; the first decoder block has: {known}")


def _calibrate(
    name: str,
    block: nn.Module,
    calls: list[BlockCalls],
    index: int,
    names: list[str],
    moment_size: int | None,
    device: torch.device,
    progress: Progress,
) -> tuple[list[_Group], list[Tensor]]:
    """Run the batches through the original block: second moments of its inputs, and its outputs `(B, M, I)`."""
    groups: dict[str, _Group] = {}
    outputs = []
    for number, call in enumerate(calls):
        progress.detail(f"{name} second moments, batch {number + 1} of {len(calls)}")
        with linear_inputs(block, names) as seen:
            outputs.append(run_block(block, call.hidden.to(device), call.arguments[index]).cpu())
        for together in _by_input(seen):
            for group in _groups_of(name, together, seen, groups, moment_size):
                for x in seen[together[0]]:
                    group.moment.add(x)
    return list({id(group): group for group in groups.values()}.values()), outputs


def _by_input(seen: dict[str, list[Tensor]]) -> list[list[str]]:
    """The linears that ran, those fed by the same tensors together."""
    by_tensors: dict[tuple[int, ...], list[str]] = {}
    for linear, inputs in seen.items():
        if inputs:
            by_tensors.setdefault(tuple(id(x) for x in inputs), []).append(linear)
    return list(by_tensors.values())


def _groups_of(
    name: str,
    together: list[str],
    seen: dict[str, list[Tensor]],
    groups: dict[str, _Group],
    moment_size: int | None,
) -> list[_Group]:
    """The groups that linears seen together belong to; those not seen before become one group of their own."""
    new = [linear for linear in together if linear not in groups]
    if new:
        x = seen[new[0]][0]
        size = moment_size if moment_size and x.shape[-1] % moment_size == 0 else None
        group = _Group(new, SecondMoment(x.shape[-1], x.device, f"{name}.{new[0]}", size))
        groups |= dict.fromkeys(new, group)
    found = list({id(groups[linear]): groups[linear] for linear in together}.values())
    for group in found:
        if not set(group.names) <= set(together):
            raise UnsupportedModelError(
                f"{name}: {', '.join(group.names)} share their input in one calibration batch and not in another"
            )
    return found


def _quantize_layers(
    name: str, block: nn.Module, groups: list[_Group], work: _Work, device: torch.device
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
    layers = []
    for group, weights in zip(groups, results, strict=True):
        together = sum(originals[linear].weight.numel() for linear in group.names)
        for linear, weight in zip(group.names, weights, strict=True):
            layer = QuantLinear(weight, work.format, originals[linear].bias, f"{name}.{linear}", work.settings)
            block.set_submodule(linear, layer)
            size = originals[linear].weight.numel()
            bits = _bits_per_weight(layer, size, together if work.transform.share else size)
            layers.append(LayerReport(linear, tuple(group.names), bits, size))
    _join(block, {tuple(group.names) for group in groups}, work.transform)
    return layers


def _bits_per_weight(layer: QuantLinear, own: int, sharing: int) -> float:
    """Bits for each of a layer's `own` weights, whose transform is also that of the other `sharing` weights."""
    stored = layer.transform
    transform = 0 if stored is None or stored.ndim == 2 else 8 * stored.numel() * stored.itemsize
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
    return error / sum(len(original.flatten()) for original in originals), error / power if power else float(error > 0)
