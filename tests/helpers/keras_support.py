"""What several tests of the Keras front end need: variables, gradients, tiny models, and loops that step."""

import contextlib

import keras
import numpy as np

from adafactor.keras import Adafactor

BACKEND = keras.backend.backend()

#: Rank 0 to 5, sides of one, and nothing at all.
SHAPES = {
    "scalar": (),
    "vector": (5,),
    "matrix": (3, 4),
    "one": (1, 1),
    "column": (4, 1),
    "row": (1, 4),
    "cube": (2, 3, 4),
    "kernel": (3, 1, 4, 5),
    "five": (2, 3, 2, 4, 3),
    "empty": (0, 3),
}


def problem(shapes=SHAPES, steps=50, seed=0):
    """Starting values, and ``steps`` lists of gradients of widely different scales."""
    rng = np.random.default_rng(seed)
    values = [rng.normal(size=shape) for shape in shapes.values()]
    gradients = [[10.0 ** rng.uniform(-3, 3) * rng.normal(size=x.shape) for x in values] for _ in range(steps)]
    return values, gradients


def make_variables(values, dtype="float32", names=None):
    names = names or [f"v{i}" for i in range(len(values))]
    return [keras.Variable(x, dtype=dtype, name=name) for x, name in zip(values, names, strict=True)]


def numbers(variables):
    """The variables' values as NumPy arrays, bfloat16 as float32."""
    return [
        np.array(keras.ops.convert_to_numpy(keras.ops.cast(v, "float32") if "bfloat16" in str(v.dtype) else v))
        for v in variables
    ]


def tensors(gradients, dtype="float32"):
    return [None if g is None else keras.ops.convert_to_tensor(np.asarray(g), dtype=dtype) for g in gradients]


def train(optimizer, variables, gradients, compiled=True):
    """Apply lists of gradients one after the other, compiled where that has a meaning outside ``fit``."""
    step = optimizer.apply
    optimizer.build(variables)
    if compiled and BACKEND == "jax":
        step = _jitted(optimizer, variables)
    elif compiled and BACKEND == "tensorflow":
        import tensorflow as tf

        step = tf.function(optimizer.apply)
    for each in gradients:
        step(tensors(each, dtype=variables[0].dtype))


def _jitted(optimizer, variables):
    import jax

    stateless = jax.jit(optimizer.stateless_apply)

    def step(gradients):
        moved, state = stateless([v.value for v in optimizer.variables], gradients, [v.value for v in variables])
        for variable, value in zip([*variables, *optimizer.variables], [*moved, *state], strict=True):
            variable.assign(value)

    return step


def precise(dtype):
    """Where JAX would make float32 of float64."""
    if BACKEND == "jax" and dtype == "float64":
        from adafactor.engine.xla.primitives import enable_x64

        return enable_x64()
    return contextlib.nullcontext()


def state_bytes(optimizer):
    """Bytes of all state but iteration and learning rate."""
    sizes = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8, "int32": 4, "int64": 8}
    return sum(int(np.prod(v.shape)) * sizes[keras.backend.standardize_dtype(v.dtype)] for v in optimizer.variables[2:])


def small_model(seed=0, embedding=False):
    """A few hundred weights: kernels, biases, and an embedding if asked."""
    keras.utils.set_random_seed(seed)
    first = [keras.Input((4,), dtype="int32"), keras.layers.Embedding(11, 6), keras.layers.Flatten()]
    return keras.Sequential(
        [
            *(first if embedding else [keras.Input((8,))]),
            keras.layers.Dense(5, activation="tanh"),
            keras.layers.Dense(3),
        ]
    )


def data(n=16, embedding=False, seed=1):
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 11, (n, 4)) if embedding else rng.normal(size=(n, 8)).astype("float32")
    return x, rng.normal(size=(n, 3)).astype("float32")


def fit(model, epochs=1, batch_size=4, **options):
    x, y = data(embedding=len(model.layers) > 2)
    return model.fit(x, y, epochs=epochs, batch_size=batch_size, shuffle=False, verbose=0, **options)


def fitted(optimizer=None, epochs=1, embedding=False, jit_compile="auto", **options):
    """A small model that trained with ``optimizer`` (ours by default)."""
    model = small_model(embedding=embedding)
    model.compile(optimizer or Adafactor(0.1), "mse", jit_compile=jit_compile)
    fit(model, epochs, **options)
    return model
