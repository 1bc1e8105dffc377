"""Table 6: what quantizing costs: minutes, loading and calibration included, and the GPU's peak memory."""

from plots.numbers import Number
from plots.records import Records, Trial
from plots.reference import Cost, read
from plots.settings import MODELS, Setting, by_key, or_none, order, shown
from plots.tables.table import Cell, Column, Row, Table, block, captions, present

STAGES = ("load", "quantize")  # what the paper's minutes are of, as far as it says
FORMATS = ("mxfp4", "nvfp4")  # the paper does not say which; the first that was run stands beside its numbers
KEYS = ("model", "algorithm", "transform")
EXTRA = ("format", "GPU published", "machine ours")
COLUMNS = (Column("time", 1, unit="minutes"), Column("peak GPU memory", 1, unit="GB"))
OWN_COLUMNS = (*COLUMNS, Column("peak process memory", 1, unit="GB"))
GB = 1e9
Key = tuple[str, str, str, str, str]  # model, algorithm, transform, format, machine


def table6(records: Records) -> Table:
    """The published models, then all other whole models that were quantized."""
    trials = usable(records)
    found = by_key(trials, key)
    published = []
    for one in read(Cost):
        own = _beside(one, found)
        settings = found.pop(own) if own else []
        published += [_published_row(one, own, setting) for setting in or_none(settings)]
    others = sorted(found, key=lambda own: (own[0], order(own[3], own[1], own[2]), own[4]))
    rows = [_own_row(own, setting) for own in others for setting in found[own]]
    blocks = present(
        [
            block(KEYS, COLUMNS, published, extra=EXTRA),
            block(KEYS, OWN_COLUMNS, rows, "not in the paper", published=False, extra=EXTRA),
        ]
    )
    more = (
        f"Ours: the stages {' and '.join(STAGES)} summed, the second with calibration; evaluation is not counted. "
        "GB are 10^9 bytes; of a GPU, of tensors; - where no GPU was used."
    )
    return Table("Table 6: cost of quantizing", blocks, captions(records, trials, more, *_copies(trials)))


def usable(records: Records) -> list[Trial]:
    """Quantized whole models, unless layer losses were measured on the way, which takes time."""
    known = [trial for trial in records.whole if not trial.baseline and not trial.losses]
    return [trial for trial in known if all(stage in trial.stages for stage in STAGES)]


def _copies(trials: list[Trial]) -> list[str]:
    """What the stage `load` is on a CPU, where a process keeps the model that it has read."""
    cpu = any(trial.device.startswith("cpu") for trial in trials)
    told = "On a CPU a process reads a model once: after its first trial the stage load is a copy, not a load."
    return [told] if cpu else []


def key(trial: Trial) -> Key:
    """What a row is of."""
    return trial.model, trial.algorithm or "", trial.transform or "", trial.format, trial.device


def minutes(setting: Setting) -> Number:
    """Of the stages together."""
    return setting.number(lambda trial: sum(trial.stages[stage].seconds for stage in STAGES) / 60)


def _peak(setting: Setting, kind: str) -> Number | None:
    """The largest of the stages in GB, where every trial has it."""
    peaks = [[getattr(trial.stages[stage], kind) for stage in STAGES] for trial in setting.trials]
    known = [max(own) / GB for own in peaks if None not in own]
    return Number.of(known) if len(known) == len(peaks) else None


def _beside(one: Cost, found: dict[Key, list[Setting]]) -> Key | None:
    wanted = (MODELS[one.model], one.algorithm, one.transform)
    there = sorted(
        (own for own in found if own[:3] == wanted and own[3] in FORMATS), key=lambda own: FORMATS.index(own[3])
    )
    return next(iter(there), None)


def _published_row(one: Cost, own: Key | None, setting: Setting | None) -> Row:
    ours = (minutes(setting), _peak(setting, "peak_gpu_memory_bytes")) if setting else (None, None)
    note = setting.note if setting else ""
    extra = (own[3] if own else "", one.gpu, own[4] if own else "")
    cells = (Cell(Number(one.minutes), ours[0]), Cell(Number(one.gpu_memory_gb), ours[1]))
    return Row((one.model, one.algorithm, f"{one.transform} {note}".strip()), cells, extra=extra)


def _own_row(own: Key, setting: Setting) -> Row:
    model, algorithm, transform, format_, machine = own
    values = (minutes(setting), _peak(setting, "peak_gpu_memory_bytes"), _peak(setting, "peak_memory_bytes"))
    cells = tuple(Cell(ours=value) for value in values)
    return Row((shown(model), algorithm, f"{transform} {setting.note}".strip()), cells, extra=(format_, "", machine))
