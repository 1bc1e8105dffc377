"""The walk through a model: each decoder block is calibrated, quantized and left behind (method: a model)."""

import fnmatch
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from wush.algorithms import Algorithm
from wush.decoder import BlockCalls, find_blocks, linear_inputs, linears, record_calls, run_block
from wush.errors import NumericError, UnsupportedModelError
from wush.formats import Format, check_groups
from wush.linear import QuantLinear
from wush.moments import SecondMoment
from wush.progress import Progress, Silent
from wush.transforms import Transform

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerReport:
    """One quantized linear: its name within the block, the linears it shared its input with, and its storage."""

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


@dataclass
class _Group:
    """Linears of a block that are fed by one tensor, and that tensor's second moment."""

    names: list[str]
    moment: SecondMoment


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
) -> nn.Module:
    """Replace the linears of every decoder block by `QuantLinear`s, in place; the same model.

    `batches`: calibration token ids `(B, M)`. `exclude`: patterns of full linear names to leave as they are, such
    as `*.down_proj`. `report` is filled in with each block as it is done, and `on_block` called. Raises
    `ValueError` for a layer that does not fit the format or a pattern that excludes nothing, before any work;
    `UnsupportedModelError`; `NumericError` that names the layer.
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
    for index, block in progress.track(enumerate(blocks), "decoder blocks", len(blocks)):
        started = time.perf_counter()
        name, device = f"{blocks_name}.{index}", next(block.parameters()).device
        moment_size = None if algorithm.needs_whole_moment else format.group_size
        groups, outputs = _calibrate(name, block, calls, index, chosen[index], moment_size, device, progress)
        layers = _quantize_layers(name, block, groups, format, transform, algorithm, progress)
        done_names = {layer.name for layer in layers}
        for missing in (linear for linear in chosen[index] if linear not in done_names):
            report.skipped[f"{name}.{missing}"] = "the block's forward does not run it"
            log.warning("%s.%s: not quantized, the block's forward does not run it", name, missing)
        progress.detail(f"{name} output error")
        mse, relative = _advance(block, calls, index, outputs, device)
        if not mse < float("inf"):
            raise NumericError(f"{name}: the quantized block's output is not finite")
        done = BlockReport(index, name, mse, relative, time.perf_counter() - started, tuple(layers))
        report.blocks.append(done)
        if on_block:
            on_block(done)
    if not any(block.layers for block in report.blocks):
        raise UnsupportedModelError(f"{type(model).__name__}: its forward runs none of the linears to quantize")
    return model


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
    name: str,
    block: nn.Module,
    groups: list[_Group],
    fmt: Format,
    transform: Transform,
    algorithm: Algorithm,
    progress: Progress,
) -> list[LayerReport]:
    layers = []
    for group in groups:
        for linear_name in group.names:
            what = f"{name}.{linear_name}"
            progress.detail(what)
            linear = linears(block)[linear_name]
            weight = algorithm.quantize_weight(linear.weight, group.moment, transform, fmt, what)
            quantized = QuantLinear(weight, fmt, linear.bias, what)
            block.set_submodule(linear_name, quantized)
            size = linear.weight.numel()
            layers.append(LayerReport(linear_name, tuple(group.names), quantized.storage_bits() / size, size))
    return layers


def _advance(
    block: nn.Module, calls: list[BlockCalls], index: int, originals: list[Tensor], device: torch.device
) -> tuple[float, float]:
    """Replace each batch's hidden states by the quantized block's outputs; its mean squared error, and relative."""
    error = power = 0.0
    count = 0
    for call, original in zip(calls, originals, strict=True):
        output = run_block(block, call.hidden.to(device), call.arguments[index]).cpu()
        difference = output.double() - original.double()
        error += difference.square().sum().item()
        power += original.double().square().sum().item()
        count += original.numel()
        call.hidden = output
    return error / count, error / power if power else float(error > 0)
