"""timm's name for this optimizer: ``create_optimizer_v2(model, "adafactor")`` builds it after ``register()``."""

from __future__ import annotations

from typing import Any

from timm.optim._optim_factory import OptimInfo, default_registry

from adafactor.torch import Adafactor


def register(name: str = "adafactor", **defaults: Any) -> None:
    """Put :class:`adafactor.torch.Adafactor` into timm's registry, in this process from now on.

    Args:
        name: what ``--opt`` and ``create_optimizer_v2`` call it; timm's own of that name gives way.
        defaults: the optimizer's arguments where timm is told none. A learning rate is used as it stands
            (``relative_step=False``, ``scale_parameter=False``, as timm does), and of convolutions the smallest
            statistics are kept (``factoring="smallest"``), unless they say otherwise.
    """
    defaults = {"relative_step": False, "scale_parameter": False, "factoring": "smallest", **defaults}
    text = "Adafactor on native kernels, with float32 statistics"
    default_registry._optimizers.pop(name.lower(), None)  # or timm warns
    default_registry.register(OptimInfo(name, Adafactor, text, has_eps=False, defaults=defaults))


__all__ = ["register"]
