"""How long work reports where it is. The library calls it; what a user sees is up to the implementation."""

from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

T = TypeVar("T")


class Progress(Protocol):
    """Watches loops: `track` wraps one, `detail` names what its current step is doing."""

    def track(self, items: Iterable[T], what: str, total: int) -> Iterator[T]:
        """Yield `items` on, counting them as `total` steps of `what`."""

    def detail(self, text: str) -> None:
        """Name the part of the current step that is being worked on."""


class Silent:
    """The default: reports nothing."""

    def track(self, items: Iterable[T], what: str, total: int) -> Iterator[T]:
        yield from items

    def detail(self, text: str) -> None:
        pass
