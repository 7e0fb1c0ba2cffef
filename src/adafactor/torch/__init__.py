"""Adafactor for PyTorch: takes the place of ``torch.optim.Adafactor`` by changing the import.

    from adafactor.torch import Adafactor

    optimizer = Adafactor(model.parameters(), lr=1e-2)

``docs/torch.md`` has the migration tables.
"""

from adafactor.factoring import Factored
from adafactor.torch.optimizer import Adafactor

__all__ = ["Adafactor", "Factored"]

Adafactor.__module__ = __name__
