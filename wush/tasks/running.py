"""One run of loaded tasks on a model in memory: seeded, quiet, and leaving the process as it was."""

from __future__ import annotations

import copy
import io
import logging
import os
import random
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, redirect_stdout
from types import ModuleType
from typing import TYPE_CHECKING, Any

from wush.progress import Progress
from wush.tasks.specs import TaskSpec

if TYPE_CHECKING:
    import torch
    from lm_eval.models.huggingface import HFLM

# The harness's own default: which examples are drawn does not vary between runs, nor from what others report.
FEWSHOT_SEED = 1234
BOOTSTRAPS = 1000  # of metrics whose standard error has no formula


def prepare(tasks: Mapping[str, Any], spec: TaskSpec, generation: Mapping[str, Any], max_length: int) -> None:
    """Set what the spec asks for in the loaded tasks.

    Raises `ValueError` for more few-shot examples than there are, and longer answers than the model's tokens at most.
    """
    for name, task in tasks.items():
        if task.get_config("output_type") == "generate_until":
            task.set_config("generation_kwargs", copy.deepcopy(dict(generation)), update=True)
            longest = task.get_config("generation_kwargs").get("max_gen_toks", 0)
            if longest >= max_length:
                raise ValueError(
                    f"task {name}: its answers have up to {longest} tokens, and the model takes {max_length} with the "
                    f"question; set generation={{max_gen_toks: {max_length // 2}}}"
                )
        if spec.num_fewshot is not None or task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", spec.num_fewshot or 0)
        asked, examples = task.get_config("num_fewshot"), getattr(getattr(task, "sampler", None), "df", None)
        if examples is not None and asked > len(examples):
            raise ValueError(
                f"task {name}: has {len(examples)} few-shot examples, and num_fewshot is {asked}; use fewer"
            )


def wrapped(model: Any, tokenizer: Any, batch_size: int) -> HFLM:
    """The model as the harness takes it; chat templates that can think do not."""
    from lm_eval.models.huggingface import HFLM

    with logging_at(logging.ERROR):
        # A copy: the harness sets the tokenizer's padding.
        return HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size, enable_thinking=False)


def evaluate(lm: HFLM, loaded: dict[str, Any], spec: TaskSpec, seed: int, progress: Progress) -> dict[str, Any]:
    """The harness's results of one run, as it gives them, with what each document came to."""
    from lm_eval.evaluator import evaluate as evaluated

    for task in loaded["tasks"].values():
        task.set_fewshot_seed(FEWSHOT_SEED)
    seed_generators(seed, lm.device)
    with closing(_Answers(progress, loaded["tasks"])) as answers:
        lm.set_cache_hook(answers)
        results: dict[str, Any] = evaluated(
            lm=lm,
            task_dict=loaded,
            limit=spec.limit,
            cache_requests=False,
            bootstrap_iters=BOOTSTRAPS,
            log_samples=True,
            apply_chat_template=bool(spec.chat_template),
            fewshot_as_multiturn=spec.fewshot_as_multiturn,
            confirm_run_unsafe_code=True,  # refused in `Definition.problems` unless it is allowed
        )
    return results


class _Answers:
    """Counts the answers of a model as steps of progress; the harness hands it each, as it would to a cache."""

    def __init__(self, progress: Progress, tasks: Mapping[str, Any]) -> None:
        self._progress, self._tasks = progress, tasks
        self._steps: Iterator[int] | None = None

    def add_partial(self, *answer: Any) -> None:
        """Count one answer."""
        if self._steps is None:
            total = sum(instance.repeats for task in self._tasks.values() for instance in task.instances)
            self._steps = iter(self._progress.track(range(total), "answers", total))
        next(self._steps, None)

    def close(self) -> None:
        """End the steps, all counted or not."""
        if self._steps is not None:
            self._steps.close()  # type: ignore[attr-defined]


def seed_generators(seed: int, device: torch.device) -> None:
    """Start the generators of Python, NumPy and Torch, on the CPU and the device, from the seed."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


@contextmanager
def kept_generators(device: torch.device) -> Iterator[None]:
    """When it closes, the generators of Python, NumPy and Torch are as they were."""
    import numpy as np
    import torch

    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def quiet(runs_code: bool) -> Iterator[None]:
    """While open, the harness prints nothing and shows no bars; and its code-running metric may run, where it is to."""
    variables = {"DISABLE_MULTIPROC": "1"}  # bootstraps in this process: a fork of one that uses a GPU is not safe
    if runs_code:
        variables["HF_ALLOW_CODE_EVAL"] = "1"
    with ExitStack() as stack:
        stack.enter_context(_environment(variables))
        stack.enter_context(redirect_stdout(io.StringIO()))
        stack.enter_context(_without_bars())
        yield


@contextmanager
def logging_at(level: int) -> Iterator[None]:
    """While open, the harness logs from this level on."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _without_bars() -> Iterator[None]:
    """The harness has no option for the bars of its modules: their `tqdm` is replaced by one that shows none."""
    import lm_eval.models.huggingface  # noqa: F401  # so that all its modules with bars are there
    import tqdm
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    modules = [
        module for name, module in sys.modules.items() if name.startswith("lm_eval.") and hasattr(module, "tqdm")
    ]
    modules.append(tqdm)  # where metrics import it from when they need it
    shown, bars = tqdm.tqdm, not are_progress_bars_disabled()

    def hidden(*args: Any, **options: Any) -> Any:
        return shown(*args, **{**options, "disable": True})

    _set_bars(modules, hidden)
    disable_progress_bars()
    try:
        yield
    finally:
        _set_bars(modules, shown)
        if bars:
            enable_progress_bars()


def _set_bars(modules: Iterable[ModuleType], bar: Any) -> None:
    for module in modules:
        vars(module)["tqdm"] = bar
