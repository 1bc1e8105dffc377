"""Trials that repeat each other with another draw: which keys are seeds, and which trials differ by nothing else."""

from collections.abc import Sequence
from dataclasses import dataclass

from experiments.records import SEEDS, Outcome, Result, State


def is_seed(key: str) -> bool:
    """Whether a config key only draws again: `seed`, or one such as `transform.seed`."""
    return key.rpartition(".")[2] in SEEDS


@dataclass(frozen=True)
class Replicates:
    """The finished trials that differ by seed only, in the sweep's order; or a single trial, however it stands."""

    members: tuple[Outcome, ...]

    @property
    def first(self) -> Outcome:
        """The member that stands for all where they do not differ."""
        return self.members[0]

    @property
    def results(self) -> list[Result]:
        """Of every member; none of a trial that is not done."""
        return [member.result for member in self.members if member.result]

    @property
    def state(self) -> State:
        """How all of them stand."""
        return self.first.state

    @property
    def kl(self) -> float:
        """The mean KL; not a number unless they are done."""
        return sum(member.kl for member in self.members) / len(self.members)

    @property
    def labels(self) -> dict[str, str]:
        """Labels without seeds."""
        return {key: value for key, value in self.first.labels.items() if not is_seed(key)}

    @property
    def seeds(self) -> str:
        """How many seeds, or which one a single trial has: `3`, `seed 1`, or nothing where no seed tells it apart."""
        if len(self.members) > 1:
            return str(len(self.members))
        own = {key: value.strip("[]") for key, value in self.first.labels.items() if is_seed(key)}
        if len(set(own.values())) == 1:
            return f"seed {next(iter(own.values()))}"
        return " ".join(f"{key}={value}" for key, value in own.items())

    @property
    def name(self) -> str:
        """One line that tells them from the sweep's others."""
        if len(self.members) == 1:
            return self.first.name
        own = [value if "." not in key else f"{key}={value}" for key, value in self.labels.items() if value != "-"]
        return f"{' '.join(own)}, mean of {len(self.members)} seeds"


def replicates(outcomes: Sequence[Outcome]) -> list[Replicates]:
    """The outcomes, those together that differ by seed only: done, by one method, and evaluated on one text."""
    found: dict[object, list[Outcome]] = {}
    for outcome in outcomes:
        key: object = outcome.trial_id
        if outcome.result and any(map(is_seed, outcome.labels)):
            # Without a seed nothing is drawn: canonical signs, evenly spaced windows. That is no draw of one setting.
            labels = tuple(sorted(pair for pair in outcome.labels.items() if not is_seed(pair[0]) or pair[1] == "None"))
            key = labels, outcome.result.evaluated, outcome.result.method_version
        found.setdefault(key, []).append(outcome)
    return [Replicates(tuple(members)) for members in found.values()]
