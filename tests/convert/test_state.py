"""The state and its file."""

import os

import ml_dtypes
import numpy as np
import pytest

from adafactor import Factored
from adafactor import layout as layout_of
from adafactor.convert import state
from adafactor.convert.state import Parameter, State
from adafactor.core.errors import Refused
from adafactor.core.files import replacing

RNG = np.random.default_rng(0)


def parameter(name, shape, count=3, dtype="f4", layout=None, **extra):
    layout = layout_of(shape) if layout is None else layout
    slots = {slot: RNG.uniform(size=size).astype(dtype) for slot, size in layout.slots.items()}
    return Parameter(name, layout, slots | extra, count)


def example():
    conv = layout_of((3, 2, 4, 5), lambda *_: Factored((2,), (0, 3), batch=(1,)))
    return State(
        (
            parameter("layers/0 é/kernel", (3, 2, 4, 5), layout=conv, momentum=RNG.normal(size=(3, 2, 4, 5))),
            parameter("wide", (4, 5), dtype="f8", momentum=np.ones((4, 5), ml_dtypes.bfloat16)),
            parameter("eight", (4, 5), momentum=np.ones((4, 5), "i1"), momentum_scale=np.ones(1, "f2")),
            parameter("bias", (), count=0),
            parameter("empty", (0, 3), count=2**62),
            parameter("noted", (2,), anything=np.array([True, False]), residual=np.ones(2, "u8")),
        ),
        ({"learning_rate": 0.1, "clip_threshold": None}, {"factoring": "last_two", "relative_step": "always"}),
        "torch",
        "adafactor.torch",
        "1.0",
    )


def test_everything_returns(tmp_path):
    old = example()
    state.write(old, tmp_path / "a.safetensors")
    new = state.read(tmp_path / "a.safetensors")
    assert (new.groups, new.framework, new.optimizer, new.version) == (old.groups, "torch", "adafactor.torch", "1.0")
    for one, other in zip(new.parameters, old.parameters, strict=True):
        assert (one.name, one.layout, one.count) == (other.name, other.layout, other.count)
        assert list(one.slots) == list(other.slots)
        for slot, value in other.slots.items():
            assert one.slots[slot].dtype == value.dtype
            np.testing.assert_array_equal(one.slots[slot], value)
    assert new.parameters[-1].extra.keys() == {"anything", "residual"}
    assert state.is_state(tmp_path / "a.safetensors")


def test_the_same_state_is_the_same_file(tmp_path):
    for name in ("a", "b"):
        RNG.bit_generator.state = np.random.default_rng(1).bit_generator.state
        state.write(example(), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def statistics(**values):
    return Parameter("w", layout_of((2, 3)), {"row": np.ones(2, "f4"), "column": np.ones(3, "f4")} | values, 1)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: State((parameter("a", (2,)), parameter("a", (2,)))), "name must be used once, got 'a'"),
        (lambda: State((statistics(row=np.ones(3, "f4")),)), r"row of w must be of shape \(2,\), got \(3,\)"),
        (lambda: State((statistics(row=np.ones(2, "f2")),)), "dtype of row of w must be float32 or float64"),
        (lambda: State((statistics(row=np.array([1, -2], "f4")),)), "row of w must be finite and >= 0, got -2.0"),
        (lambda: State((statistics(row=np.array([1, np.nan], "f4")),)), "row of w must be finite and >= 0, got nan"),
        (lambda: State((statistics(second_moment=np.ones((2, 3), "f4")),)), "statistics of w must be row and column"),
        (lambda: State((statistics(momentum=np.ones(2)),)), r"momentum of w must be of shape \(2, 3\)"),
        (lambda: State((parameter("a", (2,), count=-1),)), "count of a must be an integer >= 0"),
        (lambda: State((parameter("a", (2,), count=1.5),)), "count of a must be an integer >= 0"),
        (lambda: State((parameter("a", (2,)),), ()), "group of a must be an index into 0 groups"),
        (lambda: state.write(State((statistics(x=np.array(["a"])),)), "x"), "dtype of x:w must be one of safetensors'"),
    ],
)
def test_what_is_no_state_is_refused(make, text):
    with pytest.raises(Refused, match=text):
        make()


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="must be in a folder that exists"):
        state.write(example(), tmp_path / "no" / "a")


@pytest.mark.parametrize("exists", [False, True])
def test_a_file_is_replaced_whole_or_not_at_all(exists, tmp_path):
    path = tmp_path / "a"
    if exists:
        path.write_text("old")

    def interrupted():
        with replacing(path) as new:
            new.write_text("half")
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        interrupted()
    assert [each.name for each in tmp_path.iterdir()] == (["a"] if exists else [])
    with replacing(path) as new:
        new.write_text("new")
        assert not exists or path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["a"]


def test_a_folder_is_replaced_too(tmp_path):
    path = tmp_path / "a"
    for word in ("old", "new"):
        with replacing(path) as new:
            new.mkdir()
            (new / word).write_text(word)
    assert os.listdir(path) == ["new"]
    assert os.listdir(tmp_path) == ["a"]


def test_a_file_does_not_replace_a_folder(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(IsADirectoryError, match="target must be a file's name"):
        state.write(example(), tmp_path / "a")
    assert os.listdir(tmp_path) == ["a"]


def test_a_state_has_the_rights_of_any_new_file(tmp_path):
    (tmp_path / "usual").touch()
    for name in ("a", "new"):
        state.write(example(), tmp_path / name)
        assert (tmp_path / name).stat().st_mode == (tmp_path / "usual").stat().st_mode
