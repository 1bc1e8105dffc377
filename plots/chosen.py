"""Which of many trials a figure shows: those of one model that were run alike, and what it says of the others."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from plots import style
from plots.records import Trial
from plots.settings import FORMATS, TRANSFORMS, select_by, shown
from plots.tables.table import particular


@dataclass(frozen=True)
class Chosen:
    """One trial of each method of the model that has most of them, and what is not shown.

    `plots.settings.select` is the rule; of several seeds it is the first.
    """

    model: str
    trials: tuple[Trial, ...]
    others: tuple[str, ...]

    @property
    def formats(self) -> list[str]:
        """Of the trials, in the usual order."""
        return ordered({trial.format for trial in self.trials}, FORMATS)

    @property
    def transforms(self) -> list[str]:
        """Of the trials, in the usual order."""
        return ordered({trial.transform or "" for trial in self.trials}, TRANSFORMS)

    @property
    def source(self) -> str:
        """Whose numbers these are, for a caption."""
        machines = ", ".join(sorted({trial.device for trial in self.trials}))
        also = f"; not shown: {', '.join(self.others)}" if self.others else ""
        notes = "".join(f"; {note}" for note in particular(self.trials))
        return f"measured here: {shown(self.model)}, {len(self.trials)} trials on {machines}{also}{notes}"


def chosen(trials: Iterable[Trial], absent: str) -> Chosen:
    """Raises `plots.style.Absent` with the message `absent` where there is no trial."""
    found = select_by(trials, lambda trial: trial.model)
    if not found:
        raise style.Absent(absent)
    model = max(sorted(found), key=lambda one: len(found[one].settings))
    settings = found[model].settings.values()
    seeds = sum(len(setting.trials) - 1 for setting in settings)
    others = [shown(other) for other in sorted(found) if other != model]
    others += [*found[model].left_out, *([f"{seeds} of other seeds"] if seeds else [])]
    first = (min(setting.trials, key=lambda trial: (trial.seeds, trial.trial_id)) for setting in settings)
    return Chosen(model, tuple(first), tuple(others))


def ordered(names: set[str], known: Sequence[str]) -> list[str]:
    """In the order of `known`, unknown ones last."""
    return [*(one for one in known if one in names), *sorted(names - set(known))]
