"""Adafactor for PyTorch: takes the place of ``torch.optim.Adafactor`` by changing the import.

    from adafactor.torch import Adafactor

    optimizer = Adafactor(model.parameters(), lr=1e-2)

``docs/torch.md`` has the migration tables, ``docs/low-precision.md`` what :func:`step_in_backward` is for.
"""

from adafactor.core.factoring import Factored
from adafactor.torch.backward import StepInBackward, step_in_backward
from adafactor.torch.host import HostStep
from adafactor.torch.lr_range import LRRange, lr_range_test
from adafactor.torch.optimizer import Adafactor

__all__ = ["Adafactor", "Factored", "HostStep", "LRRange", "StepInBackward", "lr_range_test", "step_in_backward"]

Adafactor.__module__ = __name__
