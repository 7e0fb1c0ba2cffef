"""What a folder's conftest takes for tests on PyTorch: its interpreter for Triton, one thread, a fixed seed.

One thread because the tensors are small. Triton must hear of its interpreter before anything imports it.
"""

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
