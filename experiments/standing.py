"""How the trials of a sweep stand, read from the store alone: no driver needs to run, and no file is changed."""

from experiments.attempts import Attempt, Attempts
from experiments.records import Outcome, Result
from experiments.sweep import Sweep
from experiments.trial import Trial
from experiments.views.display import duration


class Standing:
    """The outcomes of a sweep's trials, look after look; what is done once is not read again."""

    def __init__(self, sweep: Sweep, mend: bool = False) -> None:
        """`mend`: move damaged records aside, so that their trials count as not run."""
        self._sweep, self._mend = sweep, mend
        self._done: dict[str, Result] = {}
        self._earlier: set[str] | None = None

    def look(self) -> list[Outcome]:
        """Every trial as it stands now, in the sweep's order; those done at the first look count as earlier."""
        missing = [trial.trial_id for trial in self._sweep.trials if trial.trial_id not in self._done]
        self._done |= self._sweep.store.results(missing, mend=self._mend)
        if self._earlier is None:
            self._earlier = set(self._done)
        return [self._outcome(trial) for trial in self._sweep.trials]

    def _outcome(self, trial: Trial) -> Outcome:
        result = self._done.get(trial.trial_id)
        attempt = None if result else Attempts(self._sweep.store, trial.trial_id).running()
        return Outcome(
            trial_id=trial.trial_id,
            name=trial.name,
            labels=trial.labels,
            result=result,
            failure=None if result else self._sweep.store.failure(trial.trial_id),
            earlier=trial.trial_id in (self._earlier or ()),
            config=trial.config,
            running=attempt is not None,
            detail=describe(attempt) if attempt else "",
        )


def describe(attempt: Attempt) -> str:
    """How far a running attempt is: `decoder blocks 3 of 30, 2 min 10 s left`."""
    if not attempt.total:
        return attempt.stage
    left = "" if attempt.left is None else f", {duration(attempt.left)} left"
    return f"{attempt.stage} {attempt.done} of {attempt.total}{left}"
