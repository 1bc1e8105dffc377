"""README's numbers of the method's own noise: what a choice costs over samples of free signs, and other machines.

Two trials that differ in a choice are paired by their sampled signs; the interval is Student's t of the differences.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean, stdev

from plots.records import Records, Trial, load
from plots.style import Absent
from wush.intervals import Metric, of_metric, of_runs, value

FOLDER = Path(__file__).parent / "asides"
KL: Metric = "kl"
# By folder: the key of the choice, and its values; the second is what a choice changes.
CHOICES = {"share": ("share", False, True), "refit": ("refit", True, False)}


def choices() -> str:
    """What each choice changes in KL, a line a choice and format."""
    trials = {folder: [trial for trial in _records(FOLDER / folder).trials if not trial.old] for folder in CHOICES}
    rows = [row for folder, own in trials.items() for row in _choice(folder, own)]
    head = "| choice | algorithm | format | KL without | KL with | difference | bits |"
    lines = [head, "|---|---|---|---:|---:|---:|---:|", *(f"| {' | '.join(row)} |" for row in rows)]
    every = [trial for own in trials.values() for trial in own]
    where = " and ".join(sorted({trial.device.removeprefix("cpu: ") for trial in every}))
    told = (
        f"{len(every)} trials on {where}. ±: the 95% interval of the mean of differences paired by signs, Student's t."
    )
    return "\n".join([*lines, "", told])


def machines() -> str:
    """KL of the main job's trials on each machine that has run them."""
    found = [_records(folder) for folder in sorted(FOLDER.glob("main*"))]
    trials = {trial.trial_id: trial for records in found for trial in records.trials}
    lines = [f"| format | transform | {' | '.join(map(_name, found))} |", "|---|---|" + "---:|" * len(found)]
    for trial_id, trial in sorted(trials.items(), key=lambda pair: (pair[1].format, str(pair[1].transform))):
        own = [{one.trial_id: one for one in records.trials}.get(trial_id) for records in found]
        cells = ["not run" if one is None else _kl(one) for one in own]
        lines.append(f"| {trial.format} | {trial.transform} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _choice(folder: str, trials: Sequence[Trial]) -> Iterator[tuple[str, ...]]:
    key, without, chosen = CHOICES[folder]
    for fmt in sorted({trial.format for trial in trials}):
        sides = [
            {trial.draw: trial for trial in trials if trial.format == fmt and trial.settings["transform"][key] is which}
            for which in (without, chosen)
        ]
        draws = sorted(sides[0].keys() & sides[1].keys())
        first, second = ([side[draw].metrics.kl for draw in draws] for side in sides)
        if len(draws) < 2:
            raise Absent(f"{FOLDER / folder}: {len(draws)} pairs of {fmt}; make records anew with make records")
        gaps = [b - a for a, b in zip(first, second, strict=True)]
        interval = of_runs(gaps)
        assert interval is not None
        bits = [next(iter(side.values())).metrics.bits_per_weight for side in sides]
        yield (
            f"`transform.{key}={str(chosen).lower()}`",
            str(next(iter(sides[0].values())).algorithm),
            fmt,
            f"{fmean(first):.4f} (sd {stdev(first):.4f})",
            f"{fmean(second):.4f} (sd {stdev(second):.4f})",
            f"{fmean(gaps):+.4f} ± {interval.margin(fmean(gaps)):.4f}",
            f"{bits[0]:.2f} → {bits[1]:.2f}" if bits[0] != bits[1] else f"{bits[0]:.2f}",
        )


def _records(folder: Path) -> Records:
    if not any(folder.glob("*.json")):
        raise Absent(f"{folder}: no records; make them with make records")
    return load([folder])


def _name(records: Records) -> str:
    """The machine of a folder's records: its processor or GPU."""
    first = records.trials[0]
    cores = f", {first.environment['cores']} cores" if first.device.startswith("cpu") else ""
    return f"{first.device.removeprefix('cpu: ')}{cores}"


def _kl(trial: Trial) -> str:
    if trial.windows is None:
        return f"{trial.metrics.kl:.4f}"
    kl, interval = value(trial.windows, KL), of_metric(trial.windows, KL)
    return f"{kl:.4f}" + (f" ± {interval.margin(kl):.4f}" if interval else "")
