"""RMS(u), the clip factor and the parameter scale of every update: the method and the callback; files hold nothing."""

import keras
import numpy as np
import pytest

from adafactor.core.factoring import Factored
from adafactor.keras import Adafactor, Diagnostics

SHAPES = {"matrix": (13, 14), "vector": (15,), "stack": (3, 13, 12)}


def factoring(path, shape):
    if len(shape) < 2:
        return None
    return Factored(rows=(len(shape) - 2,), columns=(len(shape) - 1,), batch=tuple(range(len(shape) - 2)))


OPTIONS = [
    {},
    {"clip_threshold": 0.5, "weight_decay": 0.1},
    {"clip_threshold": None, "beta_1": 0.9},
    {"scale_parameter": False},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_values(options):
    """What the oracle's formulas give, by every backend's kernel."""
    rng = np.random.default_rng(0)
    variables = [keras.Variable(rng.standard_normal(shape), name=name) for name, shape in SHAPES.items()]
    optimizer = Adafactor(1e-2, relative_step=False, factoring=factoring, diagnostics=True, **options)
    optimizer.build(variables)
    for step in range(3):
        before = [np.asarray(keras.ops.convert_to_numpy(v), np.float64) for v in variables]
        grads = [keras.ops.convert_to_tensor(rng.standard_normal(v.shape) ** 3, "float32") for v in variables]
        optimizer.apply(grads)
        if step == 0:  # beta is 0: u follows from this gradient alone
            first = [np.asarray(keras.ops.convert_to_numpy(g), np.float64) for g in grads], optimizer.diagnostics()
    found = optimizer.diagnostics()
    assert list(found) == [v.path for v in variables]
    d, keep = options.get("clip_threshold", 1.0), 1 - 1e-2 * options.get("weight_decay", 0)
    for (name, values), x in zip(zip(SHAPES, found.values(), strict=True), before, strict=True):
        axes = (1, 2) if name == "stack" else None
        assert values["update_rms"].shape == ((3,) if name == "stack" else ())
        scale = (
            np.maximum(1e-3, keep * np.sqrt(np.mean(x**2, axis=axes))) if options.get("scale_parameter", True) else 1
        )
        np.testing.assert_allclose(values["parameter_scale"], scale, rtol=1e-5)
        np.testing.assert_allclose(
            values["clip_factor"], np.maximum(1, values["update_rms"] / d) if d else 1, rtol=1e-5
        )
    for (name, values), g in zip(zip(SHAPES, first[1].values(), strict=True), first[0], strict=True):
        g2 = g**2
        if name == "vector":
            u2 = np.ones(g.shape)
        else:
            row, column = g2.mean(-1, keepdims=True), g2.mean(-2, keepdims=True)
            u2 = g2 * row.mean(-2, keepdims=True) / (row * column)
        np.testing.assert_allclose(
            values["update_rms"], np.sqrt(u2.mean((1, 2) if name == "stack" else None)), rtol=1e-5
        )


def compiled(**options):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(16, activation="relu"), keras.layers.Dense(1)])
    model.compile(optimizer=Adafactor(1e-2, **options), loss="mse")
    return model


def data():
    rng = np.random.default_rng(0)
    return rng.standard_normal((64, 8)).astype("float32"), rng.standard_normal((64, 1)).astype("float32")


def test_the_callback_fills_the_logs():
    x, y = data()
    seen = []
    watch = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: seen.append(set(logs)))
    model = compiled(diagnostics=True)
    history = model.fit(x, y, epochs=2, batch_size=16, verbose=0, callbacks=[Diagnostics(every=2), watch]).history
    names = [
        f"{name}/{v.path}"
        for v in model.trainable_variables
        for name in ("update_rms", "clip_factor", "parameter_scale", "effective_lr")
    ]
    assert set(names) <= set(history)
    assert all(len(history[name]) == 2 for name in names)
    assert all(0 < history[name][0] < 100 for name in names if not name.startswith("clip"))
    assert [set(names) <= keys for keys in seen] == [False, True] * 4
    last = model.optimizer.diagnostics()[model.trainable_variables[0].path]["parameter_scale"]
    assert np.isclose(history[f"parameter_scale/{model.trainable_variables[0].path}"][-1], last, rtol=0.1)


def test_recording_changes_nothing_else():
    x, y = data()
    models = [compiled(diagnostics=True), compiled()]
    losses = [model.fit(x, y, epochs=3, batch_size=16, verbose=0, shuffle=False).history["loss"] for model in models]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_files_do_not_hold_them(tmp_path):
    """A model saved with diagnostics loads without, and the other way round, and goes on alike."""
    x, y = data()
    for saved, loaded in ((True, False), (False, True)):
        model = compiled(diagnostics=saved)
        model.fit(x, y, batch_size=16, verbose=0)
        model.save(tmp_path / "model.keras")
        model.save_weights(tmp_path / "model.weights.h5")
        again = keras.saving.load_model(tmp_path / "model.keras")
        assert again.optimizer.get_config()["diagnostics"] == saved
        other = compiled(diagnostics=loaded)
        other.optimizer.build(other.trainable_variables)
        other.load_weights(tmp_path / "model.weights.h5")
        losses = [m.fit(x, y, batch_size=16, verbose=0, shuffle=False).history["loss"] for m in (model, again, other)]
        np.testing.assert_allclose(losses, [losses[0]] * 3, rtol=1e-5)


def test_what_does_not_fit_is_refused():
    x, y = data()
    with pytest.raises(TypeError, match="diagnostics must be True or False"):
        Adafactor(diagnostics=1)
    with pytest.raises(ValueError, match="every must be a number of batches >= 1"):
        Diagnostics(every=0)
    with pytest.raises(RuntimeError, match="diagnostics must be True to have any, got False"):
        compiled().fit(x, y, verbose=0, callbacks=[Diagnostics()])
    model = compiled()
    model.compile(optimizer="sgd", loss="mse")
    with pytest.raises(TypeError, match=r"the model's optimizer must be adafactor\.keras\.Adafactor"):
        model.fit(x, y, verbose=0, callbacks=[Diagnostics()])


@pytest.mark.parametrize("relative_step", [True, False, "always"])
@pytest.mark.parametrize("scheduled", [False, True])
def test_the_effective_learning_rate_is_that_of_the_last_update(relative_step, scheduled):
    rate = keras.optimizers.schedules.PiecewiseConstantDecay([1], [0.9, 0.8]) if scheduled else 0.9
    optimizer = Adafactor(rate, relative_step=relative_step, diagnostics=True)
    variable = keras.Variable(np.full((3, 4), 2.0, "float32"))
    for t in range(1, 4):
        scale = np.sqrt(np.mean(np.square(keras.ops.convert_to_numpy(variable))))
        optimizer.apply([keras.ops.ones((3, 4))], [variable])
        lr = (0.9 if t <= 2 else 0.8) if scheduled else 0.9
        rho = min(lr, t**-0.5) if relative_step == "always" or (relative_step and not scheduled) else lr
        (found,) = optimizer.diagnostics().values()
        np.testing.assert_allclose(found["effective_lr"], rho * scale, rtol=1e-5)
