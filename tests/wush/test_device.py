"""Checks that wait for nothing, and what happens when one finds something."""

import pytest
import torch

import wush
from wush.device import found, has_kernels, without_waiting

GPU = torch.device("cuda")
YES, NO = torch.tensor([False, True]), torch.tensor([False, False])


def nothing() -> None:
    """Nothing was kept."""


def test_a_check_is_made_at_once_outside() -> None:
    assert found(YES)
    assert not found(NO)


def test_work_whose_checks_find_nothing_runs_once() -> None:
    runs = []

    def work() -> int:
        runs.append(found(NO))
        return len(runs)

    assert without_waiting(work, GPU, nothing) == 1
    assert runs == [False]


def test_work_whose_check_finds_something_runs_again_with_the_check_in_its_place() -> None:
    seen = []

    def work() -> str:
        seen.append(found(YES))
        if seen[-1]:
            raise wush.NumericError("q_proj: found")
        return "garbage"

    with pytest.raises(wush.NumericError, match="q_proj: found"):
        without_waiting(work, GPU, nothing)
    assert seen == [False, True]


def test_an_error_of_the_library_after_a_check_let_something_pass_is_not_what_is_told() -> None:
    def work() -> None:
        if found(torch.ones(1, dtype=torch.bool)):
            raise wush.NumericError("q_proj: found")
        torch.linalg.cholesky(-torch.eye(2))

    with pytest.raises(wush.NumericError, match="q_proj: found"):
        without_waiting(work, GPU, nothing)


def test_on_a_cpu_every_check_is_in_its_place() -> None:
    assert without_waiting(lambda: found(YES), torch.device("cpu"), nothing)


def test_checks_after_the_work_are_made_at_once_again() -> None:
    without_waiting(lambda: found(NO), GPU, nothing)
    assert found(YES)


def test_kernels_are_for_gpus() -> None:
    assert not has_kernels(torch.device("cpu"))
