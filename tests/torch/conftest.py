"""Shared by the PyTorch tests: one thread (the tensors are small), a fixed seed, and gradients by the list."""

from collections.abc import Iterator

import pytest
import torch
from triton_support import interpret

interpret()


@pytest.fixture(autouse=True)
def _quiet_torch() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
