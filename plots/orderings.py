"""Which orderings of methods the paper's numbers show, and whether our own records have them too.

An ordering is that of two methods in one part of an item (a format, say). It is the paper's when the published gap is
larger than the stated spread, and every published model that has such a gap agrees. Ours holds or is reversed where the
95% interval of the difference, in pairs where both were measured alike, excludes 0; else it is undecided.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations

from plots.numbers import Number, difference
from wush.intervals import Interval

Scores = dict[str, dict[str, dict[str, Number]]]  # model -> part -> method -> number
HOLDS, REVERSED, UNDECIDED, OPEN = "holds", "reversed", "undecided", "not run"
SAME, PART, CONTRADICTED, NOT_YET = (
    "reproduced with the same ordering", "reproduced in part", "contradicted", "not yet",
)  # fmt: skip


@dataclass(frozen=True)
class Item:
    """A published table or figure: its numbers and ours. `digits` after the point; `left_out`: trials not compared.

    `exact`: a number without an interval is what it is, such as the loss of given tokens, and any gap counts.
    """

    name: str
    what: str
    lower_is_better: bool
    published: Scores
    ours: Scores
    digits: int = 2
    left_out: tuple[str, ...] = ()
    exact: bool = False


@dataclass(frozen=True)
class Check:
    """One of the paper's orderings against one of our models, or against none; numbers are (better, worse).

    `interval`: of worse less better, None where nothing tells it.
    """

    part: str
    better: str
    worse: str
    published: tuple[Number, Number]
    model: str = ""
    ours: tuple[Number, Number] | None = None
    interval: Interval | None = None
    state: str = OPEN


Sign = Callable[[tuple[Number, Number], Item], int]


@dataclass(frozen=True)
class Verdict:
    """What all checks of an item say together."""

    item: Item
    checks: tuple[Check, ...]

    def count(self, state: str) -> int:
        """How many checks are in a state."""
        return sum(check.state == state for check in self.checks)

    @property
    def word(self) -> str:
        """By majority: nothing decided, nothing reversed, fewer reversed than hold, or else contradicted."""
        holds, reversed_ = self.count(HOLDS), self.count(REVERSED)
        if not holds + reversed_:
            return NOT_YET
        return SAME if not reversed_ else PART if holds > reversed_ else CONTRADICTED


def judge(item: Item) -> Verdict:
    """Every ordering of the paper against each of our models that has both methods."""
    checks = []
    for claim in claims(item):
        own = [check for model, parts in item.ours.items() if (check := _check(item, claim, model, parts))]
        checks += own or [claim]
    return Verdict(item, tuple(checks))


def claims(item: Item) -> list[Check]:
    """The orderings that the published numbers show, with those of the first model that shows them."""
    found = []
    for part in dict.fromkeys(part for parts in item.published.values() for part in parts):
        tables = [parts[part] for parts in item.published.values() if part in parts]
        for a, b in combinations(dict.fromkeys(name for table in tables for name in table), 2):
            both = [(table[a], table[b]) for table in tables if a in table and b in table]
            signs = {sign: pair for pair in reversed(both) if (sign := _published(pair, item))}
            if len(signs) == 1:
                ((sign, (first, second)),) = signs.items()
                found.append(
                    Check(part, *((a, b) if sign > 0 else (b, a)), (first, second) if sign > 0 else (second, first))
                )
    return found


def best_of_parts(item: Item) -> tuple[int, int, int]:
    """In how many parts of our models the paper's best method is ours, is not, and cannot be told.

    The paper's best is that of the same model, or where ours is not in the paper the one that all of its models agree
    on; a part without one, or with fewer than two methods in common, does not count.
    """
    same, other, undecided = 0, 0, 0
    for model, parts in item.ours.items():
        published = [item.published[model]] if model in item.published else list(item.published.values())
        for part, own in parts.items():
            tables = [{name: one[part][name] for name in one.get(part, {}) if name in own} for one in published]
            bests = {_best(item, table, _published) for table in tables if len(table) > 1}
            if len(bests) != 1 or None in bests:
                continue
            best = _best(item, {name: own[name] for table in tables for name in table}, _ours)
            same += best in bests
            undecided += best is None
            other += best not in {None, *bests}
    return same, other, undecided


def _best(item: Item, table: dict[str, Number], sign: Sign) -> str | None:
    """The one that is better than each other; None where there is no such."""

    def beats(name: str) -> bool:
        return all(sign((table[name], table[other]), item) > 0 for other in table if other != name)

    return next((name for name in table if beats(name)), None)


def _check(item: Item, claim: Check, model: str, parts: dict[str, dict[str, Number]]) -> Check | None:
    table = parts.get(claim.part, {})
    if claim.better not in table or claim.worse not in table:
        return None
    pair = table[claim.better], table[claim.worse]
    state = {1: HOLDS, 0: UNDECIDED, -1: REVERSED}[_ours(pair, item)]
    return Check(
        claim.part, claim.better, claim.worse, claim.published, model, pair, difference(*pair, item.exact), state
    )


def _ours(pair: tuple[Number, Number], item: Item) -> int:
    """1 where the first is better by the interval of the difference, -1 where worse, 0 where that is not clear."""
    gap, interval = pair[1].mean - pair[0].mean, difference(*pair, item.exact)
    clear = interval.clear if interval else item.exact
    return _direction(gap, item) if clear else 0


def _published(pair: tuple[Number, Number], item: Item) -> int:
    """The same by the stated deviations of both, without which any gap counts."""
    gap = pair[1].mean - pair[0].mean
    return _direction(gap, item) if abs(gap) > math.hypot(*(one.std or 0.0 for one in pair)) else 0


def _direction(gap: float, item: Item) -> int:
    """1 where the first of a pair is better, of which `gap` is second less first."""
    return 0 if not gap else 1 if (gap > 0) == item.lower_is_better else -1
