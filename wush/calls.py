"""A call of a decoder block taken apart, and put together again: its hidden states, other arguments, what it returns.

Models hand hidden states on as a tensor, in a tuple, a list or a mapping, by position or by keyword.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from wush.errors import UnsupportedModelError


@dataclass(frozen=True)
class Arguments:
    """What a block is called with besides its hidden states, which go to a position or keyword, `hidden`."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hidden: int | str = 0

    @classmethod
    def split(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, "Arguments"]:
        """A call's hidden states and its other arguments."""
        named: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        if "hidden_states" in kwargs:
            named = [("hidden_states", kwargs["hidden_states"])]
        for place, value in named:
            if isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1:
                if isinstance(place, int):
                    return value, cls((*args[:place], *args[place + 1 :]), kwargs, place)
                return value, cls(args, {name: other for name, other in kwargs.items() if name != place}, place)
        raise UnsupportedModelError("a decoder block is called without a tensor of hidden states")

    def call(self, block: nn.Module, hidden: Tensor) -> Any:
        """What the block returns for hidden states."""
        if isinstance(self.hidden, str):
            return block(*self.args, **self.kwargs, **{self.hidden: hidden})
        return block(*self.args[: self.hidden], hidden, *self.args[self.hidden :], **self.kwargs)


def input_of(args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> Tensor:
    """What an `nn.Linear` is called with, by position or by its keyword."""
    return args[0] if args else kwargs["input"]


class _Hidden:
    """Stands for the hidden states in what a block returns."""


HIDDEN = _Hidden()


def _members(output: Any) -> list[Any]:
    return list(output.values() if isinstance(output, Mapping) else output)


def hidden_of(output: Any, like: Tensor) -> Tensor:
    """The hidden states in what a block returns: itself, or its first tensor of the shape of those it was given."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, tuple | list | Mapping):
        tensors = [value for value in _members(output) if isinstance(value, Tensor) and value.is_floating_point()]
        same = [tensor for tensor in tensors if tensor.shape == like.shape]
        if same or tensors:
            return (same or tensors)[0]
    raise UnsupportedModelError(f"a decoder block returns no hidden states but {type(output).__name__}")


def exchanged(output: Any, old: object, new: object) -> Any:
    """What a block returns, with another object in the place of one of its members."""
    if output is old:
        return new
    if isinstance(output, Mapping):
        changed: Any = copy.copy(output)
        for name, value in output.items():
            if value is old:
                changed[name] = new
        return changed
    values = [new if value is old else value for value in output]
    return type(output)(*values) if hasattr(output, "_fields") else type(output)(values)


def template(output: Any, hidden: Tensor) -> Any:
    """What `Route` keeps of what a block returns."""
    others = [] if output is hidden else [value for value in _members(output) if value is not hidden]
    return None if any(_holds_tensor(value) for value in others) else exchanged(output, hidden, HIDDEN)


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, tuple | list | Mapping):
        return any(map(_holds_tensor, _members(value)))
    return isinstance(value, Tensor)


def alike(one: Any, other: Any) -> bool:
    """Whether two arguments are the same; objects that are no tensors only if it can be told."""
    if isinstance(one, Tensor):
        return (
            isinstance(other, Tensor)
            and one.shape == other.shape
            and one.dtype == other.dtype
            and bool(((one == other) | ((one != one) & (other != other))).all())
        )
    if isinstance(one, tuple | list | Mapping):
        if type(one) is not type(other) or len(one) != len(other):
            return False
        keys = not isinstance(one, Mapping) or list(one) == list(other)
        return keys and all(map(alike, _members(one), _members(other)))
    if isinstance(one, str | int | float | bool | None):
        return bool(one == other)
    return type(one) is type(other)
