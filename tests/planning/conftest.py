"""Plans beside the optimizers of every framework. Keras is on PyTorch: the meta device holds models without memory."""

import os

os.environ.setdefault("KERAS_BACKEND", "torch")

from quiet_torch import _quiet_torch  # noqa: F401
