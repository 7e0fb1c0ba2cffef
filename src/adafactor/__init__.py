"""Adafactor for Keras, PyTorch and JAX: one algorithm, one state, almost no optimizer memory.

The framework is in the import path, and importing this package imports none of them:

    from adafactor.keras import Adafactor    # Keras 3: TensorFlow, JAX or PyTorch
    from adafactor.torch import Adafactor    # PyTorch
    from adafactor.optax import adafactor    # JAX: Flax, Equinox, anything that takes an optax transformation
"""

import sys
from typing import TYPE_CHECKING

from adafactor.core.factoring import Factored, Layout, layout
from adafactor.core.hyperparameters import Hyperparameters

if TYPE_CHECKING:
    from adafactor.planning import plan

__version__ = "0.1.0"
__all__ = ["Factored", "Hyperparameters", "Layout", "layout", "plan"]

_IMPORTS = {
    "Keras 3": "from adafactor.keras import Adafactor",
    "PyTorch": "from adafactor.torch import Adafactor",
    "JAX": "from adafactor.optax import adafactor",
}


def __getattr__(name: str) -> object:
    if name == "plan":  # no front end needs it
        from adafactor.planning import plan

        return plan
    if name == "Adafactor":
        width = max(map(len, _IMPORTS))
        lines = "\n".join(f"    {framework:<{width}}  {line}" for framework, line in _IMPORTS.items())
        # `from adafactor import Adafactor` shows the text of an ImportError as it stands. Who looks whether there is
        # such an attribute, as command lines that import classes by their path do, expects an AttributeError.
        imported = sys._getframe(1).f_code.co_name == "_handle_fromlist"
        kind = ImportError if imported else AttributeError
        raise kind(f"Adafactor is imported from its framework's module:\n{lines}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
