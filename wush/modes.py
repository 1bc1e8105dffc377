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
    """While open, all modules are in evaluation mode; then each has its own mode again, a new one that of the model."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module in model.modules():
            module.training = modes.get(module, modes[model])


def in_evaluation_mode(function: Callable[Concatenate[nn.Module, P], R]) -> Callable[Concatenate[nn.Module, P], R]:
    """A function that runs with the model, its first argument, in `evaluation_mode`."""

    @functools.wraps(function)
    def switched(model: nn.Module, *arguments: P.args, **options: P.kwargs) -> R:
        with evaluation_mode(model):
            return function(model, *arguments, **options)

    return switched  # type: ignore[return-value]  # the model may be given by its name, too
