"""Checkpoints in files, through the command: every kind of file, models of real layers, names and templates."""

import json
import sys
import zipfile

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import orbax.checkpoint
import pytest
import safetensors.numpy
import torch
from flax.training.train_state import TrainState

from adafactor import convert
from adafactor.cli import main
from adafactor.convert import jax as jax_files
from adafactor.convert import keras as keras_files
from adafactor.convert import state
from adafactor.convert import torch as torch_files
from adafactor.core.errors import Refused
from adafactor.keras import Adafactor as OurKeras
from adafactor.optax import adafactor as our_optax
from adafactor.torch import Adafactor as OurTorch

RNG = np.random.default_rng(0)
X = RNG.normal(size=(32, 6)).astype("float32")
Y = RNG.normal(size=(32, 3)).astype("float32")
RATE = 0.05


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up = torch.nn.Linear(6, 5)
        self.norm = torch.nn.LayerNorm(5, eps=1e-3)
        self.down = torch.nn.Linear(5, 3)

    def forward(self, x):
        return self.down(torch.tanh(self.norm(self.up(x))))


class FlaxNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm(epsilon=1e-3, name="norm")(nn.Dense(5, name="up")(x))
        return nn.Dense(3, name="down")(jnp.tanh(x))


def keras_net(optimizer):
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(5, name="up"),
            keras.layers.LayerNormalization(epsilon=1e-3, name="norm"),
            keras.layers.Activation("tanh"),
            keras.layers.Dense(3, name="down"),
        ]
    )
    model.compile(optimizer, "mse")
    model.optimizer.build(model.trainable_variables)
    return model


def weights_of(model):
    """Keras's kernels are PyTorch's weights turned; the order is the same."""
    return [
        torch.from_numpy(np.array(keras.ops.convert_to_numpy(w.value.detach())).T.copy())
        for w in model.trainable_variables
    ]


def torch_steps(model, optimizer, steps=10):
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(torch.from_numpy(X)), torch.from_numpy(Y)).backward()
        optimizer.step()


def keras_steps(model, steps=10):
    model.fit(X, Y, batch_size=32, epochs=steps, shuffle=False, verbose=0)


def assert_same(torch_model, keras_model, tolerance=1e-4):  # two frameworks round gradients differently
    for param, weight in zip(torch_model.parameters(), weights_of(keras_model), strict=True):
        assert ((param.detach() - weight).abs().max() / weight.abs().max()).item() < tolerance


@pytest.mark.parametrize("ending", ["keras", "weights.h5"])
@pytest.mark.parametrize("make", [OurKeras, keras.optimizers.Adafactor], ids=["ours", "theirs"])
def test_a_keras_file_to_pytorch_and_back(make, ending, tmp_path, capsys):
    trained = keras_net(make(RATE))
    keras_steps(trained)
    ours = make is OurKeras
    file, moved_file, back = tmp_path / f"old.{ending}", tmp_path / "moved.pt", tmp_path / f"back.{ending}"
    trained.save(file) if ending == "keras" else trained.save_weights(file)
    model = Net()
    for param, weight in zip(model.parameters(), weights_of(trained), strict=True):
        param.data.copy_(weight)
    optimizer = OurTorch(model.named_parameters(), lr=1.0)
    torch.save(optimizer.state_dict(), tmp_path / "template.pt")
    options = []
    if ending != "keras":  # it has no names
        shapes = {w.path: list(w.shape) for w in trained.trainable_variables}
        (tmp_path / "shapes.json").write_text(json.dumps(shapes))
        options = ["--shapes", str(tmp_path / "shapes.json"), "--set", "relative_step=always"]
    arguments = ["--to", "adafactor.torch", "--names", "layers", "--template", str(tmp_path / "template.pt"), *options]
    assert main(["convert", str(file), "-o", str(moved_file), *arguments]) == 0
    assert "exact" in capsys.readouterr().out
    optimizer.load_state_dict(torch.load(moved_file))
    assert optimizer.param_groups[0]["lr"] == RATE
    keras_steps(trained, 3)  # more, and rounding grows on its own
    torch_steps(model, optimizer, 3)
    assert_same(model, trained)

    # And back: what PyTorch reached, in a copy of the Keras file.
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(saved, tmp_path / "new.pt")
    before = file.read_bytes()
    to = "adafactor.keras" if ours else "keras"
    arguments = ["--to", to, "--names", "layers", "--template", str(file), *options[:2]]
    assert main(["convert", str(tmp_path / "new.pt"), "-o", str(back), *arguments]) == 0
    assert file.read_bytes() == before
    restored = keras_net(make(RATE))
    restored.load_weights(back)  # its weights are the template's
    for variable, weight in zip(restored.trainable_variables, model.parameters(), strict=True):
        variable.assign(weight.detach().numpy().T)
    assert int(restored.optimizer.iterations) == 13
    keras_steps(restored, 3)
    torch_steps(model, optimizer, 3)
    assert_same(model, restored)


def test_the_configuration_of_a_keras_file_follows(tmp_path):
    model = Net()
    optimizer = OurTorch(model.named_parameters(), lr=0.02, d=0.5, weight_decay=0.1, relative_step=False)
    torch_steps(model, optimizer, 2)
    keras_net(OurKeras(RATE)).save(tmp_path / "template.keras")
    torch.save(optimizer.state_dict(), tmp_path / "a.pt")
    convert.convert(
        tmp_path / "a.pt", tmp_path / "b.keras", "adafactor.keras", template=tmp_path / "template.keras", names="layers"
    )
    config = keras.saving.load_model(tmp_path / "b.keras").optimizer.get_config()
    assert config["clip_threshold"] == 0.5
    assert config["weight_decay"] == 0.1
    assert config["relative_step"] is False
    assert config["learning_rate"] == pytest.approx(0.02)
    with zipfile.ZipFile(tmp_path / "b.keras") as archive:
        assert archive.testzip() is None


@pytest.mark.parametrize("kind", ["msgpack", "orbax"])
@pytest.mark.parametrize("make", [our_optax, optax.adafactor], ids=["ours", "theirs"])
def test_a_train_state_to_pytorch_and_back(make, kind, tmp_path):
    net = FlaxNet()
    tx = make(RATE, min_dim_size_to_factor=2, momentum=0.9, multiply_by_parameter_scale=False)
    train = TrainState.create(apply_fn=net.apply, params=net.init(jax.random.key(0), X)["params"], tx=tx)

    @jax.jit
    def step(train):
        grads = jax.grad(lambda p: jnp.mean((net.apply({"params": p}, X) - Y) ** 2))(train.params)
        return train.apply_gradients(grads=grads)

    def steps(train, count=3):
        for _ in range(count):
            train = step(train)
        return train

    train = steps(train, 10)
    file = tmp_path / f"old.{kind}"
    if kind == "msgpack":
        file.write_bytes(flax.serialization.to_bytes(train))
    else:
        content = {"params": train.params, "opt_state": train.opt_state}
        orbax.checkpoint.PyTreeCheckpointer().save(file, content)
    model = Net()
    by_name = {"up.weight": "up/kernel", "up.bias": "up/bias", "norm.weight": "norm/scale", "norm.bias": "norm/bias"}
    by_name |= {"down.weight": "down/kernel", "down.bias": "down/bias"}
    flat = flax.traverse_util.flatten_dict(train.params, sep="/")
    for name, param in model.named_parameters():
        param.data.copy_(torch.from_numpy(np.array(flat[by_name[name]]).T.copy()))
    optimizer = OurTorch(model.named_parameters())
    torch.save(optimizer.state_dict(), tmp_path / "template.pt")
    known = {"learning_rate": RATE, "scale_parameter": False, "beta_1": 0.9, "clip_threshold": 1.0, "epsilon_2": 1e-3}
    report = convert.convert(
        file, tmp_path / "new.pt", "adafactor.torch", template=tmp_path / "template.pt", names="layers",
        hyperparameters=known,
    )  # fmt: skip
    assert report.exact, report.text()
    optimizer.load_state_dict(torch.load(tmp_path / "new.pt"))
    train = steps(train)
    torch_steps(model, optimizer, 3)
    flat = flax.traverse_util.flatten_dict(train.params, sep="/")
    for name, param in model.named_parameters():
        expected = np.asarray(flat[by_name[name]]).T
        assert np.abs(param.detach().numpy() - expected).max() < 1e-4 * np.abs(expected).max()

    torch.save(optimizer.state_dict(), tmp_path / "more.pt")
    to = "adafactor.optax" if make is our_optax else "optax"
    back = tmp_path / f"back.{kind}"
    report = convert.convert(tmp_path / "more.pt", back, to, template=file, names="layers")
    assert report.exact, report.text()
    if kind == "msgpack":
        restored = flax.serialization.from_bytes(train, back.read_bytes()).opt_state
    else:
        reader = orbax.checkpoint.PyTreeCheckpointer()
        restored = reader.restore(back, item={"params": train.params, "opt_state": train.opt_state})["opt_state"]
    assert jax.tree.structure(restored) == jax.tree.structure(train.opt_state)
    for one, other in zip(jax.tree.leaves(restored), jax.tree.leaves(train.opt_state), strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=1e-3, atol=1e-6)


def test_every_format_through_our_state_file_and_without_templates(tmp_path):
    model = Net()
    optimizer = OurTorch(model.named_parameters(), lr=RATE, beta1=0.9, relative_step=False, scale_parameter=False)
    torch_steps(model, optimizer)
    torch.save(optimizer.state_dict(), tmp_path / "a.pt")
    assert convert.convert(tmp_path / "a.pt", tmp_path / "a.safetensors", "state").exact
    original = torch_files.read(torch.load(tmp_path / "a.pt"))
    known = {"min_dim_size_to_factor": 2}
    for format, ending in (
        ("transformers", "pt"),
        ("optax", "msgpack"),
        ("adafactor.optax", "orbax"),
        ("t5x", "msgpack"),
    ):
        there, back = tmp_path / f"{format}.{ending}", tmp_path / f"{format}-back.safetensors"
        renamed = {"rules": [{"from": r"(.*)\.(.*)", "to": r"\1/\2"}]} if ending != "pt" else None
        options = {"hyperparameters": known if ending != "pt" else None, "names": renamed}
        report = convert.convert(tmp_path / "a.safetensors", there, format, **options)
        assert report.exact, report.text()
        told = dict(original.hyperparameters)
        shapes = {p.name.replace(".", "/") if renamed else p.name: p.shape for p in original.parameters}
        state.write(convert.read(there, format, shapes=shapes, hyperparameters=told | {"momentum_of": "step"}), back)
        assert convert.family_of(there) == ("torch" if ending == "pt" else "jax")
        found, momentum = state.read(back), 1 / RATE
        assert found.count == 10
        for old, new in zip(
            original.parameters, sorted(found.parameters, key=lambda p: list(shapes).index(p.name)), strict=True
        ):
            assert new.layout == old.layout
            for slot, value in old.slots.items():
                factor = momentum if slot == "momentum" else 1
                np.testing.assert_allclose(new.slots[slot] * factor, value, rtol=1e-6)


def test_a_bfloat16_run_of_optax_becomes_float32_here(tmp_path):
    params = {"w": jnp.ones((4, 6), jnp.bfloat16)}
    tx = optax.adafactor(0.1, min_dim_size_to_factor=2)
    held = tx.update({"w": jnp.full((4, 6), 3, jnp.bfloat16)}, tx.init(params), params)[1]
    (tmp_path / "a.msgpack").write_bytes(flax.serialization.to_bytes({"params": params, "opt": held}))
    found = convert.read(tmp_path / "a.msgpack").parameters[0]
    assert found.dtype == "bfloat16"
    np.testing.assert_array_equal(found.slots["row"], np.full(4, 9, np.float32))
    back = convert.write(
        convert.read(tmp_path / "a.msgpack"), tmp_path / "b.msgpack", "optax", template=tmp_path / "a.msgpack"
    )
    assert "rounded" in back.notes[0]
    assert not back.exact


def test_folders_of_a_checkpoint_manager(tmp_path):
    tx, params = our_optax(0.1), {"w": jnp.ones((4, 6))}
    content = {"params": params, "opt_state": tx.init(params)}
    with orbax.checkpoint.CheckpointManager(tmp_path / "run") as manager:
        for step in (1, 2):
            manager.save(step, args=orbax.checkpoint.args.StandardSave(content))
            manager.wait_until_finished()
            assert convert.read(tmp_path / "run" / str(step)).named()["w"].shape == (4, 6)
            if step == 1:
                assert convert.read(tmp_path / "run").optimizer == "adafactor.optax"
    with pytest.raises(Refused, match=r"got '2 of them \(1/default, 2/default\)'. Pass one of them\."):
        convert.read(tmp_path / "run")


def test_a_legacy_file_of_keras_is_called_so(tmp_path):
    keras_net(OurKeras(0.1)).save(tmp_path / "a.h5")  # whose own class it cannot save
    with pytest.raises(Refused, match="it is of Keras's legacy format"):
        convert.read(tmp_path / "a.h5")


def test_optax_with_injected_hyperparameters_tells_them():
    tx = optax.inject_hyperparams(optax.adafactor, static_args=("min_dim_size_to_factor", "factored"))(
        learning_rate=0.25, min_dim_size_to_factor=2, decay_rate=0.7
    )
    params = {"w": jnp.ones((4, 6))}
    found = jax_files.read({"params": params, "state": tx.init(params)})
    assert found.hyperparameters["learning_rate"] == 0.25
    assert found.hyperparameters["beta_2_decay"] == pytest.approx(-0.7)


def test_moving_averages_and_accumulators_stay_with_keras(tmp_path):
    options = {"use_ema": True, "gradient_accumulation_steps": 2}
    trained = keras_net(OurKeras(RATE, **options))
    keras_steps(trained, 6)
    found = keras_files.read(trained.optimizer)
    assert found.count == 3
    fresh = keras_net(OurKeras(RATE, **options))
    keras_files.write(found, fresh.optimizer, names="position")
    for one, other in zip(fresh.optimizer.variables, trained.optimizer.variables, strict=True):
        np.testing.assert_array_equal(np.array(one.value.detach()), np.array(other.value.detach()))


def test_nothing_is_replaced_unasked_and_nothing_is_left_over(tmp_path, capsys):
    model = Net()
    optimizer = OurTorch(model.named_parameters())
    torch_steps(model, optimizer, 1)
    file = tmp_path / "a.pt"
    torch.save(optimizer.state_dict(), file)
    before = file.read_bytes()
    assert main(["convert", str(file), "--to", "torch.optim", "-o", str(file)]) == 2
    assert "--force" in capsys.readouterr().err
    assert main(["convert", str(file), "--to", "adafactor.keras", "-o", str(tmp_path / "b.keras")]) == 2
    assert "template must be" in capsys.readouterr().err
    assert main(["convert", str(file), "--from", "optax", "--to", "state", "-o", str(tmp_path / "b")]) == 2
    assert main(["convert", str(tmp_path / "no.pt"), "--to", "state", "-o", str(tmp_path / "b")]) == 2
    assert main(["convert", str(file), "--to", "state", "-o", str(tmp_path / "no" / "b")]) == 2
    assert main(["convert", str(file), "--to", "state", "-o", str(tmp_path / "b"), "--set", "x"]) == 2
    assert main(["convert", str(file), "--to", "state", "-o", str(tmp_path / "b"), "--set", "learning_rte=1"]) == 2
    assert "a hyperparameter must be one of" in capsys.readouterr().err
    with pytest.raises(Refused, match="target must be another file"):
        convert.convert(file, file, "torch.optim")
    assert main(["convert", str(file), "--to", "state", "-o", str(tmp_path / "b"), "--report", str(file)]) == 2
    assert file.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["a.pt"]
    assert main(["convert", str(file), "--to", "torch.optim", "-o", str(file), "--force"]) == 0
    assert convert.read(file, "torch.optim").count == 1


def test_a_target_is_not_called_what_it_is_not(tmp_path):
    held = torch_files.read(OurTorch(Net().named_parameters()))
    for name, format in (("a.pt", "optax"), ("a.safetensors", "torch.optim"), ("a.pt", "state"), ("a.h5", "t5x")):
        with pytest.raises(Refused, match=rf"target's name must be with \..* for {format}, got .*{name}"):
            convert.write(held, tmp_path / name, format)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a.pt", "b.safetensors", "no/report.json"])
def test_the_report_replaces_nothing_else_and_is_possible_before_anything_is_written(name, tmp_path, capsys):
    optimizer = OurTorch(Net().named_parameters())
    torch.save(optimizer.state_dict(), tmp_path / "a.pt")
    before = (tmp_path / "a.pt").read_bytes()
    arguments = ["--to", "state", "-o", str(tmp_path / "b.safetensors"), "--report", str(tmp_path / name), "--force"]
    assert main(["convert", str(tmp_path / "a.pt"), *arguments]) == 2
    assert "--report must be a file" in capsys.readouterr().err
    assert (tmp_path / "a.pt").read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["a.pt"]


@pytest.mark.parametrize("option", ["--shapes", "--axes", "--names"])
@pytest.mark.parametrize("output", ["-o", "--report"])
def test_no_output_replaces_what_an_option_reads(option, output, tmp_path, capsys):
    optimizer = OurTorch(Net().named_parameters())
    torch.save(optimizer.state_dict(), tmp_path / "a.pt")
    (tmp_path / "told").write_text("{}")
    arguments = ["-o", str(tmp_path / "b"), option, str(tmp_path / "told"), output, str(tmp_path / "told")]
    assert main(["convert", str(tmp_path / "a.pt"), "--to", "state", "--force", *arguments]) == 2
    assert "must be a file of its own" in capsys.readouterr().err
    assert (tmp_path / "told").read_text() == "{}"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.pt", "told"]


def test_the_report_is_written(tmp_path):
    model = Net()
    optimizer = OurTorch(model.named_parameters(), factoring="smallest", min_dim_size_to_factor=100)
    torch_steps(model, optimizer, 1)
    torch.save(optimizer.state_dict(), tmp_path / "a.pt")
    report = tmp_path / "report.json"
    arguments = ["--to", "torch.optim", "-o", str(tmp_path / "b.pt"), "--report", str(report)]
    assert main(["convert", str(tmp_path / "a.pt"), *arguments]) == 0
    found = json.loads(report.read_text())
    assert found["exact"]
    assert {each["how"] for each in found["parameters"]} == {"means", "kept"}


def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch, capsys):
    model = Net()
    optimizer = OurTorch(model.named_parameters())
    torch_steps(model, optimizer, 1)
    torch.save(optimizer.state_dict(), tmp_path / "a.pt")
    convert.convert(tmp_path / "a.pt", tmp_path / "a.safetensors", "state")
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    with pytest.raises(ImportError, match=r"cannot be read without safetensors.* pip install 'adafactor\[convert\]'"):
        state.read(tmp_path / "a.safetensors")
    assert main(["convert", str(tmp_path / "a.pt"), "--to", "state", "-o", str(tmp_path / "b")]) == 2
    assert "safetensors" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_shapes_of_a_model_file_tell_what_optax_leaves_open(tmp_path, capsys):
    params = {"w": jnp.ones((4, 3)), "v": jnp.ones((3, 4))}
    held = optax.adafactor(0.1, min_dim_size_to_factor=2).init(params)
    (tmp_path / "a.msgpack").write_bytes(flax.serialization.to_bytes(held))
    arguments = ["convert", str(tmp_path / "a.msgpack"), "--to", "state", "-o", str(tmp_path / "b.safetensors")]
    assert main(arguments) == 2
    assert "--shapes" in capsys.readouterr().err
    safetensors.numpy.save_file({k: np.asarray(v) for k, v in params.items()}, tmp_path / "model.safetensors")
    assert main([*arguments, "--shapes", str(tmp_path / "model.safetensors")]) == 0
    assert {p.name: p.shape for p in state.read(tmp_path / "b.safetensors").parameters} == {"w": (4, 3), "v": (3, 4)}
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    assert main([*arguments, "--force", "--shapes", str(tmp_path / "model.safetensors")]) == 2
