"""How everything here is timed: CUDA graphs over cold copies, contenders in turns, so that clock drift hits them alike.

A graph holds one call on each of several copies of the operands, of at least `Effort.cold_bytes` together, so that
no call finds its operands in the L2 cache. Clocks and settings of the GPU are left alone.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import median
from typing import TypeVar

import torch

from wush_kernels.bench.measurement import Timing

Call = Callable[[], object]
Contenders = Mapping[str, Sequence[Call]]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Effort:
    """How often is measured: rounds of all contenders, the least time of one reading, and of `do_bench` (0: none)."""

    rounds: int = 9
    reading_us: float = 400.0
    do_bench_ms: int = 15
    cold_bytes: int = 256 << 20

    def copies(self, bytes_each: int) -> int:
        """Copies of operands of so many bytes that do not fit the cache together; at least two."""
        return max(2, min(256, math.ceil(self.cold_bytes / max(1, bytes_each))))


QUICK = Effort(rounds=3, reading_us=150.0, do_bench_ms=2)


def time_together(contenders: Contenders, effort: Effort) -> tuple[dict[str, Timing], dict[str, str]]:
    """Times of the contenders, each a list of calls on other copies; and why those that failed did.

    Raises `torch.AcceleratorError` when the GPU is of no more use to this process.
    """
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    failures: dict[str, str] = {}
    for name, calls in contenders.items():
        try:
            graphs[name] = _captured(calls)
        except Exception as error:  # a kernel that fails is a line of the table, not the end of the run
            failures[name] = one_line(error)
            free()
    replays = {name: max(1, math.ceil(effort.reading_us / _reading(graph, 1))) for name, graph in graphs.items()}
    readings: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(effort.rounds):
        for name, graph in graphs.items():
            readings[name].append(_reading(graph, replays[name]) / len(contenders[name]))
    for graph in graphs.values():
        graph.reset()
    free()
    timings = {
        name: Timing(median(own), min(own), max(own), len(contenders[name]), _do_bench(contenders[name][0], effort))
        for name, own in readings.items()
    }
    return timings, failures


def replayed(call: Callable[[], Result]) -> Result:
    """What a call returns once a CUDA graph of it, captured as those that are timed, has been replayed."""
    results: list[Result] = []
    _captured([lambda: results.append(call())])
    return results[-1]


def free() -> None:
    """Wait for the GPU and give its unused memory back; raises when it is of no more use to this process."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def one_line(error: Exception) -> str:
    """An error's type and the first line of its message."""
    message = str(error).strip().splitlines()
    return f"{type(error).__name__}: {message[0] if message else 'no message'}"


@cache
def _stream() -> torch.cuda.Stream:
    """The stream of all warm-ups and captures: scratch that kernels keep for a stream is made before a capture."""
    return torch.cuda.Stream()


def _captured(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    """A graph of the calls, each with an output of its own, after one run of each that compiles and allocates."""
    stream = _stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        for call in calls:
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin()
        try:
            outputs = [call() for call in calls]
        finally:
            graph.capture_end()
    del outputs
    graph.replay()
    torch.cuda.synchronize()
    return graph


def _reading(graph: torch.cuda.CUDAGraph, replays: int) -> float:
    """Microseconds of one replay, the mean of several in a row."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3 / replays


def _do_bench(call: Call, effort: Effort) -> float | None:
    if not effort.do_bench_ms:
        return None
    from triton.testing import do_bench

    with torch.no_grad():
        milliseconds = do_bench(call, warmup=effort.do_bench_ms // 4, rep=effort.do_bench_ms, return_mode="median")
    return milliseconds * 1e3
