"""The Keras front end, on one backend per run: ``KERAS_BACKEND=tensorflow|jax|torch pytest tests/keras``."""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# Eight CPU devices for JAX; read when JAX starts.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

import triton_first  # noqa: F401

# isort: split
import keras
import pytest

BACKEND = keras.backend.backend()

if BACKEND == "tensorflow":
    import tensorflow as tf

    # Two CPU devices for tf.distribute; must happen before TensorFlow starts.
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "backend(*names, reason): deselect the test on other Keras backends, which lack what it tests"
    )
    config.addinivalue_line("markers", "once: the backend has no part in it: deselect the test on all but one")


def pytest_report_header():
    return f"keras {keras.__version__} on {BACKEND}"


def pytest_collection_modifyitems(config, items):
    def runs(item):
        on = [mark.args for mark in item.iter_markers("backend")] + [("jax",) for _ in item.iter_markers("once")]
        return all(BACKEND in names for names in on)

    elsewhere = [item for item in items if not runs(item)]
    if elsewhere:
        config.hook.pytest_deselected(items=elsewhere)
        items[:] = [item for item in items if runs(item)]


@pytest.fixture(autouse=True)
def _fresh_keras():
    """The same random numbers for every test, and none of another's global settings."""
    keras.utils.set_random_seed(0)
    yield
    keras.config.set_dtype_policy("float32")
    keras.config.set_floatx("float32")
    keras.distribution.set_distribution(None)
    keras.utils.clear_session(free_memory=False)
