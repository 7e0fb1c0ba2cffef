"""What the optimizer keeps, and what a step of it needs besides."""

import keras
import numpy as np
import pytest
from keras_support import state_bytes
from native_support import need

from adafactor.keras import Adafactor

SIDE = 4096
FULL = SIDE * SIDE * 4


def built(optimizer, dtype="float32", side=SIDE):
    kernel = keras.Variable(keras.ops.zeros((side, side), dtype), dtype=dtype, name="kernel")
    optimizer.build([kernel])
    return kernel


def test_a_4096_by_4096_kernel_keeps_32_768_bytes():
    optimizer = Adafactor()
    built(optimizer)
    assert [v.name for v in optimizer.variables[:2]] == ["iteration", "learning_rate"]
    assert state_bytes(optimizer) == 32_768


def test_keras_own_adafactor_keeps_a_copy_of_the_kernel():
    optimizer = keras.optimizers.Adafactor()
    built(optimizer)
    assert state_bytes(optimizer) == 32_768 + FULL


def test_momentum_keeps_one_number_per_weight():
    optimizer = Adafactor(beta_1=0.9)
    built(optimizer)
    assert state_bytes(optimizer) == 32_768 + FULL


def test_low_precision_kernels_keep_float32_statistics():
    optimizer = Adafactor()
    built(optimizer, "bfloat16")
    assert state_bytes(optimizer) == 32_768


@pytest.mark.parametrize("shape", [(), (7,), (3, 4), (2, 3, 4), (3, 3, 8, 16)], ids=str)
def test_no_variable_keeps_more_than_its_rows_and_columns(shape):
    optimizer = Adafactor()
    optimizer.build([keras.Variable(keras.ops.zeros(shape))])
    lead = int(np.prod(shape[:-2]))
    numbers = lead * (shape[-2] + shape[-1]) if len(shape) > 1 else int(np.prod(shape))
    assert state_bytes(optimizer) == 4 * numbers


def temporaries(optimizer, dtype):
    """Bytes XLA needs besides the arguments and results of a jitted step that donates its state."""
    import jax

    kernel = built(optimizer, dtype)
    state = [v.value for v in optimizer.variables]

    # Arguments in the order of the results, as in Keras's own train step: JAX pairs donated buffers by it.
    def step(values, state, gradients):
        return optimizer.stateless_apply(state, gradients, values)

    step = jax.jit(step, donate_argnums=(0, 1), keep_unused=True)
    memory = step.lower([kernel.value], state, [kernel.value]).compile().memory_analysis()
    return memory.temp_size_in_bytes / kernel.value.nbytes


@pytest.mark.backend("jax", reason="only XLA tells")
@pytest.mark.parametrize("options", [{}, {"beta_1": 0.9}, {"weight_decay": 0.01}], ids=["plain", "momentum", "decay"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_jitted_step_needs_no_temporary_of_the_kernels_size(dtype, options):
    assert temporaries(Adafactor(**options), dtype) <= 0.1


@pytest.mark.backend("jax", reason="only there")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    ("options", "call"),
    [
        ({}, "step"),
        ({"weight_decay": 0.01, "diagnostics": True}, "step"),
        ({"beta_1": 0.9}, "step"),
        ({"gradient_accumulation_steps": 2}, "measure"),
        ({"gradient_accumulation_steps": 2, "beta_1": 0.9}, "measure"),
    ],
    ids=["plain", "decay", "momentum", "accumulation", "both"],
)
def test_a_jitted_step_is_one_call_of_the_native_kernels(options, call, dtype):
    import jax

    from adafactor.engine.xla import custom_call

    need(custom_call.why_not())
    optimizer = Adafactor(**options)
    kernels = [keras.Variable(keras.ops.ones((8, 9), dtype), dtype=dtype, name=name) for name in "ab"]
    optimizer.build(kernels)
    state, values = [v.value for v in optimizer.variables], [v.value for v in kernels]
    lowered = jax.jit(optimizer.stateless_apply).lower(state, values, values)
    assert lowered.as_text().count(f"@adafactor_xla_{call}") == 1


@pytest.mark.backend("jax", reason="only XLA tells")
@pytest.mark.parametrize("options", [{}, {"beta_1": 0.9}, {"weight_decay": 0.1}], ids=["plain", "momentum", "decay"])
@pytest.mark.parametrize("regularizer", [None, "l2"])
def test_a_jitted_training_step_copies_no_kernel(options, regularizer):
    """Nor where a penalty on the old weights is reported; SGD has a copy of each that the gradients read late."""

    from adafactor.engine.xla import custom_call

    need(custom_call.why_not())
    assert kernel_copies(keras.optimizers.SGD(), None) >= 2
    assert kernel_copies(Adafactor(**options), regularizer) == 0


def kernel_copies(optimizer, regularizer, side=272):
    import re

    import jax

    layers = [keras.layers.Dense(side, "tanh", kernel_regularizer=regularizer) for _ in range(4)]
    model = keras.Sequential([keras.Input((side,)), *layers])
    optimizer.build(model.trainable_variables)

    def loss(values, x):
        outputs, _, penalties = model.stateless_call(values, [], x, return_losses=True)
        return keras.ops.mean(outputs**2) + sum(penalties)

    def step(values, state, x):
        value, gradients = jax.value_and_grad(loss)(values, x)
        return value, *optimizer.stateless_apply(state, gradients, values)

    state = [v.value for v in optimizer.variables]
    values = [v.value for v in model.trainable_variables]
    program = jax.jit(step, donate_argnums=(0, 1)).lower(values, state, np.ones((8, side), "float32"))
    return len(re.findall(rf"= f32\[{side},{side}\]\S* copy\((?!%transpose)", program.compile().as_text()))


@pytest.mark.backend("jax", reason="only XLA tells")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_keras_own_adafactor_needs_one(dtype):
    assert temporaries(keras.optimizers.Adafactor(), dtype) >= 1


@pytest.mark.backend("torch", reason="only here memory is counted per operation")
def test_a_native_step_on_torch_allocates_nothing_of_the_kernels_size():
    import torch

    from adafactor.core import native

    need(native.why_not())
    optimizer, side = Adafactor(), 512
    kernel = built(optimizer, side=side)
    gradient = [torch.ones((side, side))]
    optimizer.apply(gradient)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        optimizer.apply(gradient)
    assert max(event.self_cpu_memory_usage for event in profile.events()) < kernel.value.nbytes / 10
