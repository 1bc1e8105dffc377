"""A comparison of two sets of runs as a W&B report: what `compare` shows, on the dashboard.

It builds the definition with W&B's client, without a network; only `save` talks to a server. The names in it are those
that `experiments.tracking` logs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from experiments.tracking import server_fault

if TYPE_CHECKING:
    from wandb_workspaces.reports.v2 import interface as wr

SUMMARY = {"kl": "KL (nats)", "perplexity": "Perplexity", "bits_per_weight": "Bits per weight"}
CHOICES = ("model", "format", "transform", "algorithm")
COLOURS = ("#2166ac", "#d6604d")  # of the sides; told apart by the colour-blind too
HALF, FULL, HEIGHT = 12, 24, 8  # widths and height of a panel; a grid is 24 wide


class ReportNotSaved(Exception):
    """W&B did not take a report; the message says what to do."""


@dataclass(frozen=True)
class RunFilter:
    """One side of a comparison: the runs of the sweep `group` whose config has the values given.

    `config`: values by dotted key, such as `format.scale_rule` or `choices.transform`. `trials`: ids known to belong to
    this side, whatever the above says, as a trial keeps the group of the sweep that ran it first; only they are
    drawn in the colour of the side, as W&B colours runs by id.
    Raises `ValueError` if nothing is given but the name.
    """

    name: str
    group: str | None = None
    config: Mapping[str, str | float | bool] = field(default_factory=dict)
    trials: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.group is None and not self.config and not self.trials:
            raise ValueError(
                f"{self.name}: this side would be every run of the project; give a group, config or trials"
            )

    @property
    def expression(self) -> str:
        """The filter in W&B's language, which is a part of Python's: literals are written as Python writes them."""
        given = [] if self.group is None else [f'Metric("Group") in [{self.group!r}]']
        given += [f"Config({_stored(key)!r}) in [{value!r}]" for key, value in self.config.items()]
        either = [f"({' and '.join(given)})"] if given else []
        either += [f'Metric("ID") in {list(self.trials)!r}'] if self.trials else []
        return " or ".join(either)


def report(project: str, entity: str, a: RunFilter, b: RunFilter, differences: str = "") -> wr.Report:
    """The report that compares side `a` with side `b`, not saved yet; raises `ValueError` if they have one name.

    `differences`: Markdown that stands first, such as the paired differences with their intervals, which the dashboard
    cannot work out from runs.
    """
    from wandb_workspaces.reports.v2 import interface as wr

    if a.name == b.name:
        raise ValueError(f"both sides are called {a.name!r}: their runs could not be told apart")
    choices = [f"config.{_stored(f'choices.{group}')}" for group in CHOICES]
    sides = zip((a, b), COLOURS, strict=True)
    colours: Any = {trial: colour for side, colour in sides for trial in side.trials}
    return wr.Report(
        project=project,
        entity=entity,
        title=f"{a.name} against {b.name}"[:128],
        width="fluid",
        blocks=[
            *([wr.MarkdownBlock(text=differences)] if differences else []),
            wr.H2("Each trial"),
            wr.PanelGrid(runsets=[_side(a), _side(b)], panels=_of_trials(), custom_run_colors=colours),
            wr.H2("Means by model, format, transform and algorithm"),
            wr.PanelGrid(runsets=[_side(a, choices), _side(b, choices)], panels=_bars()),
        ],
    )


def save(report: wr.Report) -> str:
    """Keep the report on the server; returns its URL. Raises `ReportNotSaved`."""
    try:
        if fault := server_fault():  # else the client takes minutes to find out
            raise ConnectionError(fault)
        return str(report.save().url)
    except Exception as error:  # the client raises bare exceptions too
        raise ReportNotSaved(
            f"the report was not saved in {report.entity}/{report.project}: {' '.join(str(error).split())}; "
            "log in with `wandb login`, check that you may write there, and upload offline runs first"
        ) from error


def to_json(report: wr.Report) -> str:
    """The definition as it would be saved, for who is offline."""
    model = report._to_model()  # type: ignore[no-untyped-call]  # the client has no public way
    return str(model.model_dump_json(by_alias=True, exclude_none=True, indent=2))


def _side(side: RunFilter, groupby: Sequence[str] = ()) -> wr.Runset:
    from wandb_workspaces.reports.v2 import interface as wr

    # Without a project, a run set is of the report's own; naming one would ask the server for it.
    return wr.Runset(name=side.name, filters=side.expression, groupby=list(groupby))


def _of_trials() -> list[wr.PanelTypes]:
    from wandb_workspaces.reports.v2 import interface as wr

    top = HEIGHT * 2
    columns = [wr.ParallelCoordinatesPlotColumn(wr.Config(f"choices.{group}"), display_name=group) for group in CHOICES]
    columns += [
        wr.ParallelCoordinatesPlotColumn(wr.SummaryMetric(key), display_name=title) for key, title in SUMMARY.items()
    ]
    return [
        *_bars(),
        wr.ScatterPlot(
            title="KL against bits",
            x=wr.SummaryMetric("bits_per_weight"),
            y=wr.SummaryMetric("kl"),
            log_y=True,
            layout=wr.Layout(HALF, HEIGHT, HALF, HEIGHT),
        ),
        wr.LinePlot(
            title="Relative error of each decoder block, held out and in calibration",
            x="block",
            y=["block/held_out_relative_mse", "block/relative_mse"],
            log_y=True,
            layout=wr.Layout(0, top, FULL, HEIGHT),
        ),
        wr.ParallelCoordinatesPlot(columns=columns, layout=wr.Layout(0, top + HEIGHT, FULL, HEIGHT)),
    ]


def _bars() -> list[wr.PanelTypes]:
    """A bar for each run or group of runs, in rows of two panels."""
    from wandb_workspaces.reports.v2 import interface as wr

    return [
        wr.BarPlot(title=title, metrics=[key], layout=wr.Layout(place % 2 * HALF, place // 2 * HEIGHT, HALF, HEIGHT))
        for place, (key, title) in enumerate(SUMMARY.items())
    ]


def _stored(key: str) -> str:
    """A dotted config key as W&B stores it: `format.scale_rule` is `format.value.scale_rule`."""
    first, *rest = key.split(".")
    return ".".join([first, "value", *rest])
