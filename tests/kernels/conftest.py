"""Kernels run on the GPU where there is one, and interpreted on the CPU elsewhere."""

import pytest
import torch


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
