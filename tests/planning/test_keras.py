"""The plan's bytes are those of Keras's variables, and its files are read without Keras."""

import json
import zipfile

import h5py
import keras
import numpy as np
import pytest
from architectures import PUBLIC, SMALL

import adafactor.keras
from adafactor import plan
from adafactor.core.errors import Refused
from adafactor.planning import optimizers as rules
from adafactor.planning.files import read

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "int32": 4, "float64": 8, "int64": 8}

OPTIMIZERS = {
    "AdamW": (keras.optimizers.AdamW, rules.KerasAdamW()),
    "Keras's Adafactor": (keras.optimizers.Adafactor, rules.KerasAdafactor()),
    **{
        f"ours, {policy}, {momentum}": (
            lambda policy=policy, momentum=momentum: adafactor.keras.Adafactor(
                factoring=policy, beta_1=0.9 if momentum else None
            ),
            rules.Adafactor(framework="keras", factoring=policy, momentum=momentum),
        )
        for policy, momentum in (("last_two", None), ("largest_two", "float32"), ("smallest", None))
    },
}


def check(make, rule, shapes, dtype):
    variables = [keras.Variable(keras.ops.zeros(shape, dtype=dtype)) for shape in shapes.values()]
    optimizer = make()
    optimizer.build(variables)
    held = sum(int(np.prod(v.shape, dtype=np.int64)) * BYTES[v.dtype] for v in optimizer.variables)
    (usage,) = plan(shapes, optimizers=[rule], dtype=dtype).usages
    assert held == usage.state


@pytest.mark.parametrize(("name", "dtype"), [("ViT", "float32"), ("T5", "bfloat16")])
@pytest.mark.parametrize(("make", "rule"), OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_state(make, rule, name, dtype):
    check(make, rule, SMALL[name], dtype)


@pytest.mark.parametrize(("make", "rule"), OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_state_at_public_sizes(make, rule):
    assert keras.backend.backend() == "torch"  # no other has variables without memory
    with keras.device("meta"):
        for shapes, _ in PUBLIC.values():
            check(make, rule, shapes, "float32")


@pytest.fixture
def model():
    layers = keras.layers
    tower = keras.Sequential([layers.Dense(6), layers.Dense(3)], name="tower")
    tower.trainable = False
    model = keras.Sequential([
        layers.Input((8, 8, 3)), layers.Conv2D(4, 3), layers.BatchNormalization(), layers.Dropout(0.1),
        layers.Flatten(), tower, layers.Dense(5, dtype="bfloat16", name="head"),
    ])  # fmt: skip
    model.compile("adam", "mse")
    model.fit(np.zeros((2, 8, 8, 3)), np.zeros((2, 5)), verbose=0)  # Adam's state goes into the file as well
    return model


def described(parameters, trained):
    return sorted((p.shape, p.dtype) for p in parameters if p.trained == trained)


def of(variables):
    return sorted((tuple(v.shape), v.dtype) for v in variables)


def test_a_keras_file_says_what_is_trained(model, tmp_path):
    model.save(tmp_path / "model.keras")
    found = plan(tmp_path / "model.keras", framework="keras").parameters
    assert described(found, True) == of(model.trainable_variables)
    still = [v for v in model.non_trainable_variables if v.dtype in BYTES and "int" not in v.dtype]
    assert described(found, False) == of(still)  # the seed of dropout is not in the file
    assert plan(tmp_path / "model.keras").usages[0].gradients == plan(model.trainable_variables).usages[0].gradients


def adapted(rank, mode):
    layers = keras.layers
    model = keras.Sequential([
        layers.Input((7,), dtype="int32"), layers.Embedding(50, 12),
        layers.EinsumDense("abc,cde->abde", (7, 3, 5), bias_axes="de"), layers.Conv2D(6, (1, 3)), layers.Flatten(),
        layers.Dense(9), layers.LayerNormalization(), layers.Dense(5), layers.Dense(4, use_bias=False),
    ])  # fmt: skip
    if mode is not None:
        model.quantize(mode)
    if rank:
        for layer in model.layers:
            if hasattr(layer, "enable_lora"):
                layer.enable_lora(rank)
    model.layers[-2].trainable = False
    return model


@pytest.mark.filterwarnings("ignore:Layer .* does not have a .quantize. method")
@pytest.mark.parametrize("mode", [None, "int8", "int4", "float8"])
@pytest.mark.parametrize("rank", [0, 1, 4])
def test_adapters_and_quantized_layers(rank, mode, tmp_path):
    if mode == "float8" and rank:
        pytest.skip("Keras does not save these")
    model = adapted(rank, mode)
    model.save(tmp_path / "model.keras")
    found = plan(tmp_path / "model.keras", framework="keras")
    assert described(found.parameters, True) == of(model.trainable_variables)
    assert found.usages[0].state == plan(model.trainable_variables, framework="keras").usages[0].state


@keras.saving.register_keras_serializable("adafactor-tests")
class Block(keras.layers.Layer):
    """A layer of one's own, whose configuration does not tell what is in it."""

    def __init__(self, **options):
        super().__init__(**options)
        self.inner = keras.layers.Dense(4, name="inner")

    def build(self, shape):
        self.inner.build(shape)

    def call(self, x):
        return self.inner(x)


def test_what_a_frozen_layer_contains_is_frozen(tmp_path):
    x = keras.Input((3,))
    model = keras.Model(x, Block(name="second")(Block(name="first", trainable=False)(x)))
    model.save(tmp_path / "model.keras")
    found = read(tmp_path / "model.keras")
    assert described(found, True) == of(model.layers[2].trainable_variables)
    assert len(described(found, False)) == 2


@pytest.fixture(scope="module")
def with_adapters(tmp_path_factory):
    path = tmp_path_factory.mktemp("adapted") / "good.keras"
    adapted(2, "int4").save(path)
    return path


@pytest.mark.parametrize("rank", [-1, 2.0, True, "4", None, [4], 2**62])
def test_a_rank_that_is_none(rank, with_adapters, tmp_path):
    with zipfile.ZipFile(with_adapters) as good, zipfile.ZipFile(tmp_path / "bad.keras", "w") as bad:
        for name in good.namelist():
            content = good.read(name)
            if name == "config.json":
                content = content.replace(b'"lora_rank": 2', b'"lora_rank": ' + json.dumps(rank).encode())
                content = content.replace(b'"equation": "abc,cde->abde"', b'"equation": "abc,,->->"')
            bad.writestr(name, content)
    if rank == 2**62:
        with pytest.raises(Refused, match="of fewer than"):
            read(tmp_path / "bad.keras")
    else:
        assert not [p for p in read(tmp_path / "bad.keras") if "lora" in p.name]


def test_weights_alone(model, tmp_path):
    model.save_weights(tmp_path / "model.weights.h5")
    found = read(tmp_path / "model.weights.h5")
    floats = [v for v in model.variables if v.dtype in ("float32", "bfloat16")]
    assert sorted((p.shape, p.dtype) for p in found if p.dtype in ("float32", "bfloat16")) == of(floats)


def test_damaged_and_hostile_files_end_in_one_sentence(model, tmp_path):
    whole = tmp_path / "whole.keras"
    model.save(whole)
    with zipfile.ZipFile(whole) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    weights, config = members["model.weights.h5"], members["config.json"]

    def archive(name, *parts, **options):
        with zipfile.ZipFile(tmp_path / name, "w", **options) as made:
            for member, content in parts:
                made.writestr(member, content)

    archive("compressed.keras", ("config.json", config), ("model.weights.h5", weights), compression=8)
    archive("elsewhere.keras", ("config.json", config), ("../model.weights.h5", weights))
    archive("not-json.keras", ("config.json", b"\xff\xfe{"), ("model.weights.h5", weights))
    archive("deep.keras", ("config.json", b"[" * 100_000), ("model.weights.h5", weights))
    archive("not-hdf5.keras", ("config.json", config), ("model.weights.h5", b"\x89HDF\r\n\x1a\n" + bytes(5000)))
    archive("bomb.keras", ("config.json", bytes(200_000_000)), ("model.weights.h5", weights), compression=8)
    with pytest.warns(UserWarning, match="Duplicate name"):
        archive("twice.keras", ("config.json", config), *[("model.weights.h5", weights)] * 2)
    (tmp_path / "cut.keras").write_bytes(whole.read_bytes()[:-3000])
    (tmp_path / "cut.weights.h5").write_bytes(weights[: len(weights) // 2])
    (tmp_path / "empty.weights.h5").touch()
    with h5py.File(tmp_path / "odd.weights.h5", "w") as file:
        file.create_dataset("layers/a/vars/0", shape=(2,), dtype=np.dtype([("x", "f4")]))
    with h5py.File(tmp_path / "loop.weights.h5", "w") as file:  # a group inside itself, and links that leave the file
        file.create_group("layers")["layers"] = file["/"]
        file["layers/out"] = h5py.ExternalLink("/etc/passwd", "/")
        file["layers/soft"] = h5py.SoftLink("/layers")
    files = sorted([*tmp_path.glob("*.keras"), *tmp_path.glob("*.h5")])
    files.remove(whole)
    assert len(files) == 12
    for path in files:
        with pytest.raises(Refused, match=r"^[^\n]* must be [^\n]*\.$"):
            read(path)


def test_a_shape_of_2_to_the_60_is_only_a_number(tmp_path):
    with h5py.File(tmp_path / "huge.weights.h5", "w") as file:
        file.create_dataset("layers/a/vars/0", shape=(2**30, 2**29), dtype="f4", chunks=(1, 1))
    (parameter,) = read(tmp_path / "huge.weights.h5")
    assert parameter.nbytes == 2**61
    assert json.dumps(parameter.shape)
