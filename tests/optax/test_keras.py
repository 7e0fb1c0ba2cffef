"""Keras's ModelParallel on eight devices: the same losses, the state split with the weights, one all-reduce."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("keras")

PROGRAM = """
import re
import jax, keras, numpy as np
from adafactor.keras import Adafactor

rng = np.random.default_rng(0)
x, y = rng.standard_normal((64, 16)).astype("float32"), rng.standard_normal((64, 8)).astype("float32")

def trained():
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(32, activation="relu", name=f"up{k}") for k in range(2)]
    model = keras.Sequential([keras.Input((16,)), *layers, keras.layers.Dense(8, name="down")])
    model.compile(optimizer=Adafactor(1e-2, weight_decay=0.1), loss="mse")
    return model, model.fit(x, y, epochs=2, batch_size=64, verbose=0, shuffle=False).history["loss"]

_, expected = trained()
mesh = keras.distribution.DeviceMesh((1, 8), ["batch", "model"], keras.distribution.list_devices())
places = keras.distribution.LayoutMap(mesh)
places[".*up.*kernel"], places[".*up.*bias"], places[".*down.*kernel"] = (None, "model"), ("model",), ("model", None)
keras.distribution.set_distribution(keras.distribution.ModelParallel(layout_map=places, batch_dim_name="batch"))
model, losses = trained()
np.testing.assert_allclose(losses, expected, rtol=1e-6)
column = next(v for v in model.optimizer.variables if v.path.endswith("up1_kernel_column"))
assert column.value.sharding.spec[0] == "model", column.value.sharding
weights = [v.value for v in model.trainable_variables]
state = [v.value for v in model.optimizer.variables]
text = jax.jit(model.optimizer.stateless_apply).lower(state, weights, weights).compile().as_text()
assert len(re.findall(r" all-reduce(?:-start)?[(]", text)) == 1
"""


def test_model_parallel():
    environment = os.environ | {
        "KERAS_BACKEND": "jax",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
