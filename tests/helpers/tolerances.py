"""How far an implementation may be from what it is held to: the table of docs/numerics.md, which tests/docs compares.

Differences are relative to the largest element of each parameter.
"""

#: The exact step from the stored parameter, rounded to nearest.
ONE_ROUNDING = "one rounding"

TOLERANCES: dict[str, dict[str, float | str]] = {
    "native": {"float64": 1e-13, "float32": 3e-6, "float16": 6e-4, "bfloat16": 5e-3},
    "torch": {"float64": 1e-13, "float32": 2e-6, "float16": ONE_ROUNDING, "bfloat16": ONE_ROUNDING},
    "triton": {"float32": 4e-6, "float16": ONE_ROUNDING, "bfloat16": ONE_ROUNDING},
    "torch.optim": {"float64": 1e-12, "float32": 2e-6},
    "transformers": {"float64": 1e-12, "float32": 2e-6, "bfloat16": 2**-7},
    "keras": {"float64": 1e-6, "float32": 5e-6, "float16": 4e-3, "bfloat16": 3e-2},
    "keras.optimizers": {"float32": 1e-5},
    "jax": {"float64": 1e-13, "float32": 2e-6, "float16": ONE_ROUNDING, "bfloat16": ONE_ROUNDING},
    "optax": {"float32": 1e-6},
}
