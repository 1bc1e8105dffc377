"""The survey of a model before its walk: which linears are quantized, and everything that is not, with the reason.

All that can be refused without running the model is refused here.
"""

import fnmatch
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from wush.decoder import find_blocks, linears
from wush.errors import NumericError, UnsupportedModelError
from wush.formats import Format, check_groups
from wush.plain import check_plain, why_no_plain_linear
from wush.reports import QuantizationReport

log = logging.getLogger(__name__)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Survey:
    """A model's decoder blocks, and the names of the linears to quantize of each block that is chosen, by index."""

    name: str
    blocks: nn.ModuleList
    chosen: dict[int, list[str]]


def survey(
    model: nn.Module,
    fmt: Format,
    exclude: Sequence[str],
    blocks: Sequence[int] | None,
    report: QuantizationReport,
) -> Survey:
    """What `wush.quantize` is to do with a model; what stays as it is goes into the report, which counts all weights.

    `exclude` and `blocks` are those of `quantize`, as are the errors.
    """
    check_plain(model)
    name, decoder_blocks = find_blocks(model)
    _check_excludes(exclude, name, decoder_blocks)
    indices = _select(blocks, name, len(decoder_blocks), report)
    chosen = {index: _choose(f"{name}.{index}", decoder_blocks[index], exclude, report) for index in indices}
    _check_shared(model, name, decoder_blocks, chosen)
    _check_layers(name, decoder_blocks, chosen, fmt)
    _note_outside(model, decoder_blocks, report)
    report.weights = sum(parameter.numel() for parameter in decoder_blocks.parameters() if parameter.ndim > 1)
    return Survey(name, decoder_blocks, chosen)


def _choose(name: str, block: nn.Module, exclude: Sequence[str], report: QuantizationReport) -> list[str]:
    """The linears of a block to quantize; what is left as it is, excluded or no plain linear, goes into the report."""
    found = linears(block)
    for parameter_name, parameter in block.named_parameters():
        if parameter.ndim > 1 and not _is_of(parameter_name, found):
            owner = type(block.get_submodule(parameter_name.rpartition(".")[0])).__name__
            _leave(f"{name}.{parameter_name}", f"{owner} is no nn.Linear", report)
    names = []
    for linear, module in found.items():
        pattern = next((p for p in exclude if fnmatch.fnmatchcase(f"{name}.{linear}", p)), None)
        if pattern is not None:
            report.skipped[f"{name}.{linear}"] = f"excluded by {pattern!r}"
        elif reason := why_no_plain_linear(module):
            _leave(f"{name}.{linear}", reason, report)
        else:
            names.append(linear)
    return names


def _is_of(parameter: str, modules: Mapping[str, nn.Linear]) -> bool:
    """Whether a parameter belongs to one of the modules, or to a module inside of it."""
    owner = parameter
    while "." in owner:
        owner = owner.rpartition(".")[0]
        if owner in modules:
            return True
    return False


def _leave(what: str, reason: str, report: QuantizationReport) -> None:
    report.skipped[what] = reason
    log.warning("%s: not quantized, %s", what, reason)


def _select(blocks: Sequence[int] | None, name: str, total: int, report: QuantizationReport) -> list[int]:
    """The decoder blocks to quantize, in order; that the others are not goes into the report."""
    if blocks is None:
        return list(range(total))
    selected = sorted(set(blocks))
    if not selected or not 0 <= selected[0] <= selected[-1] < total:
        raise ValueError(
            f"quantize.blocks={list(blocks)}: choose some of the decoder blocks 0 to {total - 1} of {name}"
        )
    if len(selected) < total:
        report.skipped[name] = f"all but {', '.join(map(str, selected))}, chosen by quantize.blocks"
    return selected


def _note_outside(model: nn.Module, blocks: nn.ModuleList, report: QuantizationReport) -> None:
    """Put linears that belong to no decoder block, the LM head apart, into the report."""
    inside = {id(module) for module in blocks.modules()}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    outside = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module) not in inside and module is not head
    ]
    report.skipped |= dict.fromkeys(outside, "outside of the decoder blocks")
    if outside:
        log.warning("%d linears outside of the decoder blocks stay as they are: %s", len(outside), ", ".join(outside))


def _check_layers(blocks_name: str, blocks: nn.ModuleList, chosen: Mapping[int, list[str]], fmt: Format) -> None:
    """Refuse, with every problem listed, what would fail later: sizes, dtypes and non-finite weights."""
    problems = []
    for index, names in chosen.items():
        for name in names:
            linear, what = linears(blocks[index])[name], f"{blocks_name}.{index}.{name}"
            try:
                check_groups(linear.in_features, fmt, what)
            except ValueError as error:
                problems.append(str(error))
            if linear.weight.dtype not in DTYPES:
                problems.append(f"{what}: the weight is {linear.weight.dtype}; load the model in float32 or bfloat16")
            if not linear.weight.isfinite().all():
                raise NumericError(f"{what}: NaN or infinity in the weight; the checkpoint is damaged")
    if problems:
        raise ValueError("\n".join(problems))
    if not any(chosen.values()):
        raise UnsupportedModelError(
            "every linear is excluded or no plain nn.Linear: nothing to quantize; use format=original for a baseline"
        )


def _check_shared(model: nn.Module, name: str, blocks: nn.ModuleList, chosen: Mapping[int, list[str]]) -> None:
    """Refuse linears that are part of the model more than once: one input of several would calibrate them all."""
    holders = _holders(model)
    tied: dict[int, list[str]] = {}
    for path, module in blocks.named_modules():
        if isinstance(module, nn.Linear):
            tied.setdefault(id(module.weight), []).append(f"{name}.{path}")
    for index, names in chosen.items():
        for linear in names:
            what = f"{name}.{index}.{linear}"
            places = _places(blocks, index, linear, holders)
            if len(places) > 1:
                raise UnsupportedModelError(
                    f"{what} is part of the model more than once ({' and '.join(places)}), and can be calibrated for "
                    "one place alone; leave it out of every place with quantize.exclude=[...]"
                )
            same = tied[id(blocks[index].get_submodule(linear).weight)]
            if len(same) > 1:
                raise UnsupportedModelError(
                    f"{' and '.join(same)} have one weight, and quantized layers would have two; leave them out with "
                    "quantize.exclude=[...]"
                )


def _places(blocks: nn.ModuleList, index: int, linear: str, holders: Mapping[int, list[str]]) -> list[str]:
    """Where the outermost module that is shared is held, of a linear and the modules around it in its block."""
    block = blocks[index]
    repeated = [str(number) for number, other in enumerate(blocks) if other is block]
    if len(repeated) > 1:
        return [f"decoder block {number}" for number in repeated]
    parts = linear.split(".")
    paths = (".".join(parts[: depth + 1]) for depth in range(len(parts)))
    held = (holders[id(block.get_submodule(path))] for path in paths)
    return next((places for places in held if len(places) > 1), [])


def _holders(model: nn.Module) -> dict[int, list[str]]:
    """The names under which each module is held by others, by its id; each holder counts once."""
    found: dict[int, list[str]] = {}
    for path, name, child in _children(model):
        found.setdefault(id(child), []).append(f"{path}.{name}" if path else name)
    return found


def _children(model: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    for path, module in model.named_modules():
        yield from ((path, name, child) for name, child in module._modules.items() if child is not None)


def _check_excludes(exclude: Sequence[str], blocks_name: str, blocks: nn.ModuleList) -> None:
    """Raise `ValueError` for patterns that match no linear, with some names that could be meant."""
    names = [f"{blocks_name}.{i}.{linear}" for i, block in enumerate(blocks) for linear in linears(block)]
    useless = [pattern for pattern in exclude if not fnmatch.filter(names, pattern)]
    if useless:
        known = ", ".join(names[: len(linears(blocks[0]))])
        raise ValueError(f"quantize.exclude={useless} matches no linear; the first decoder block has: {known}")
