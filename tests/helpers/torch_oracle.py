"""The oracle in the PyTorch front end's words, and the options and layouts that every kernel is held to it with."""

import numpy as np

from adafactor import Factored, Hyperparameters, layout
from adafactor.core import reference
from adafactor.torch.arguments import VOCABULARY

OPTIONS = {
    "default": {},
    "constant learning rate": {"relative_step": False, "scale_parameter": False, "lr": 1e-3},
    "always": {"relative_step": "always", "lr": 1.0},
    "momentum": {"beta1": 0.9},
    "weight decay": {"weight_decay": 0.1},
    "no clipping": {"d": None},
    "tight clipping": {"d": 0.25},
    "fixed beta2": {"beta2_max": 0.5},
    "decay and epsilons": {"beta2_decay": -0.5, "eps": (1e-3, 1e-1)},
    "maximize": {"maximize": True, "beta1": 0.5, "weight_decay": 0.01},
}
LAYOUTS = {
    "largest_two": "largest_two",
    "smallest": "smallest",
    "none": lambda name, shape: None,
    "first and last": lambda name, shape: Factored(rows=(0,), columns=(3,)),
    "transposed": lambda name, shape: Factored(rows=(3,), columns=(0,)),
    "interleaved": lambda name, shape: Factored(rows=(1, 3), columns=(0, 2)),
    "batch": lambda name, shape: Factored(rows=(2,), columns=(3,), batch=(0,)),
    "batch and stack": lambda name, shape: Factored(rows=(3,), columns=(2,), batch=(1,)),
    "batch, unfactored": lambda name, shape: Factored(batch=(0, 2)),
    "all batch": lambda name, shape: Factored(batch=(0, 1, 2, 3)),
}


def oracle(shape: tuple[int, ...], options: dict) -> tuple[reference.Adafactor, dict]:
    """The reference for a class's arguments, and what is left to the caller."""
    options = {"lr": 1e-2, "eps": (1e-30, 1e-3), "weight_decay": 0.0, "maximize": False, **options}
    roles = layout(shape, options.get("factoring", "last_two"), options.get("min_dim_size_to_factor", 1))
    words = {word: name for name, word in VOCABULARY.items()}
    numbers = {
        words.get(name, name): value
        for name, value in options.items()
        if name in ("beta2_decay", "d", "relative_step", "scale_parameter", "beta1", "beta2_max")
    }
    hp = Hyperparameters(epsilon_1=options["eps"][0], epsilon_2=options["eps"][1], **numbers)
    return reference.Adafactor(roles, hp), options


def reference_step(oracle: reference.Adafactor, options: dict, x: np.ndarray, g: np.ndarray) -> np.ndarray:
    """RMS(x) is taken before weight decay, which the raw learning rate multiplies, as in torch."""
    moved = oracle.step(x, -g if options["maximize"] else g, options["lr"])
    return moved - options["lr"] * options["weight_decay"] * x
