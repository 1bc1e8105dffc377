"""The paper's published numbers (arXiv 2512.00956 v3) as typed rows, one reader a file of `plots/reference/`.

Accuracies are percent; an empty cell is None. `plots/reference/README.md` says what each table is of.
"""

import csv
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from plots.records import BASELINE

FOLDER = Path(__file__).parent / "reference"
BENCHMARKS = (
    *("SingleOp", "SingleQ", "MultiArith", "SVAMP", "GSM8K", "MMLU-Math", "BBHDeduction", "BBHCounting"),
    *("BBHNavigate", "HotpotQA", "SQuAD", "DROP", "Winograd-WSC"),
)


class Unreadable(ValueError):
    """A file of published numbers is missing or damaged; the message names the file, the line and the remedy."""


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class _Trial(_Row):
    model: str
    format: str
    algorithm: str | None
    transform: str | None

    @property
    def method(self) -> tuple[str, str | None, str | None]:
        """What the row was quantized with, as records name it: BF16 is the original model."""
        return BASELINE if self.format == "bf16" else self.format, self.algorithm, self.transform


class Speedup(_Row):
    """Figure 2: times as fast as BF16 at `(m, k) @ (k, n)` on an RTX 5090."""

    model: str
    m: int
    n: int
    k: int
    matmul_only: float
    hadamard_quantize_matmul: float
    wush_quantize_matmul: float


class Platinum(_Trial):
    """Figures 3 and 7-10: means over `runs`; the sample standard deviation is of the average, between runs."""

    runs: int
    average: float
    std_between_runs: float | None
    benchmarks: dict[str, float]

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, cells: dict[str, Any]) -> dict[str, Any]:
        missing = [name for name in BENCHMARKS if cells.get(name) is None]
        if missing:
            raise ValueError(f"nothing in {', '.join(missing)}")
        rest = {name: cell for name, cell in cells.items() if name not in BENCHMARKS}
        return {**rest, "benchmarks": {name: cells[name] for name in BENCHMARKS}}


class LayerLoss(_Row):
    """Table 1: mean squared output error x 1e-3 of each linear of Qwen3-8B's decoder block 18."""

    format: str
    transform: str
    q_proj: float
    k_proj: float
    v_proj: float
    o_proj: float
    gate_proj: float
    up_proj: float
    down_proj: float


class LmEval(_Trial):
    """Tables 2 and 3: LM Evaluation Harness."""

    mmlu: float
    gsm8k: float
    hellaswag: float
    winogrande: float
    average: float
    recovery: float


class Kl(_Trial):
    """Table 4: KL divergence from the original model."""

    kl: float


class Calibration(_Trial):
    """Table 5: averages by calibration set."""

    calibration: str
    lm_eval_average: float
    platinum_average: float


class Cost(_Row):
    """Table 6: what quantizing costs, calibration included."""

    model: str
    algorithm: str
    transform: str
    gpu: str
    minutes: float
    gpu_memory_gb: float


class Storage(_Row):
    """Table 7: what the transforms add to the quantized weights, in percent."""

    model: str
    mxfp4_percent: float
    nvfp4_percent: float


FILES: dict[type[_Row], str] = {
    Speedup: "paper_figure2_speedup_rtx5090.csv",
    Platinum: "paper_figure3_7_10_platinum.csv",
    LayerLoss: "paper_table1_layer_loss.csv",
    LmEval: "paper_table2_3_lm_eval.csv",
    Kl: "paper_table4_kl.csv",
    Calibration: "paper_table5_calibration.csv",
    Cost: "paper_table6_cost.csv",
    Storage: "paper_table7_storage.csv",
}
Row = TypeVar("Row", bound=_Row)


def read(kind: type[Row], folder: Path | None = None) -> list[Row]:
    """All rows of a kind, in the file's order; raises `Unreadable`."""
    path = (folder or FOLDER) / FILES[kind]
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise Unreadable(f"{path}: cannot be read: {error}; restore it with git checkout plots/reference") from error
    if not lines:
        raise Unreadable(f"{path}: holds no rows; restore it with git checkout plots/reference")
    return [_row(kind, cells, f"{path}: line {number}") for number, cells in enumerate(lines, 2)]


def _row(kind: type[Row], cells: dict[Any, Any], where: str) -> Row:
    if None in cells:
        raise Unreadable(f"{where}: more cells than columns; restore it with git checkout plots/reference")
    try:
        return kind.model_validate({name: cell or None for name, cell in cells.items()})
    except ValidationError as error:
        wrong = "; ".join(
            f"{'.'.join(map(str, one['loc'])) or 'row'}: {one['msg']} (found {one['input']!r})"
            if one["loc"]
            else one["msg"]
            for one in error.errors()
        )
        raise Unreadable(f"{where}: {wrong}; restore it with git checkout plots/reference") from error
