"""Evaluation mode: calibration and measurement run without dropout, and leave every module's mode as they found it."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Concatenate, ParamSpec, TypeVar

from torch import nn

P = ParamSpec("P")
R = TypeVar("R")


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """While open, all modules are in evaluation mode; then each has its own mode again, a new one its parent's."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        _put_back(model, modes, modes[model])


def _put_back(module: nn.Module, modes: dict[nn.Module, bool], of_parent: bool) -> None:
    module.training = modes.get(module, of_parent)
    for child in module.children():
        _put_back(child, modes, module.training)


def in_evaluation_mode(function: Callable[Concatenate[nn.Module, P], R]) -> Callable[Concatenate[nn.Module, P], R]:
    """A function that runs with the model, its first argument, in `evaluation_mode`."""

    @functools.wraps(function)
    def switched(model: nn.Module, *arguments: P.args, **options: P.kwargs) -> R:
        with evaluation_mode(model):
            return function(model, *arguments, **options)

    return switched  # type: ignore[return-value]  # the model may be given by its name, too
