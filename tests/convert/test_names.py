"""Names of parameters from one framework to another."""

import json

import numpy as np
import pytest

from adafactor import layout as layout_of
from adafactor.convert import adapt
from adafactor.convert import jax as jax_files
from adafactor.convert import torch as torch_files
from adafactor.convert.names import load, rename
from adafactor.convert.report import Report
from adafactor.convert.state import Parameter, State
from adafactor.core.dialects import FORMATS, in_our_words
from adafactor.core.errors import Refused


def made(framework, shapes, groups=({},), **counts):
    parameters = []
    for name, shape in shapes.items():
        layout = layout_of(shape)
        slots = {slot: np.arange(1, 1 + np.prod(size), dtype="f4").reshape(size) for slot, size in layout.slots.items()}
        parameters.append(Parameter(name, layout, slots, counts.get(name, 4)))
    return State(tuple(parameters), groups, framework)


KERAS = {
    "m/a/kernel": (2, 3),
    "m/a/bias": (3,),
    "m/e/embeddings": (7, 3),
    "m/n/gamma": (3,),
    "m/n/beta": (3,),
    "m/c/kernel": (3, 3, 2, 5),
}
FLAX = {
    "params/a/kernel": (2, 3),
    "params/a/bias": (3,),
    "params/e/embedding": (7, 3),
    "params/n/scale": (3,),
    "params/n/bias": (3,),
    "params/c/kernel": (3, 3, 2, 5),
}
TORCH = {
    "a.weight": (3, 2),
    "a.bias": (3,),
    "e.weight": (7, 3),
    "n.weight": (3,),
    "n.bias": (3,),
    "c.weight": (5, 2, 3, 3),
}
SIDES = {"keras": KERAS, "jax": FLAX, "torch": TORCH}


@pytest.mark.parametrize("source", SIDES)
@pytest.mark.parametrize("target", SIDES)
def test_the_usual_layers(source, target):
    wanted = dict(reversed(SIDES[target].items()))
    got = rename(made(source, SIDES[source]), "layers", wanted, target, Report())
    assert {p.name: p.shape for p in got.parameters} == wanted
    assert [p.name for p in got.parameters] == list(wanted)
    turned = "torch" in (source, target) and source != target
    kernel = next(p for p in got.parameters if p.name == next(iter(SIDES[target])))
    np.testing.assert_array_equal(kernel.slots["row"], np.arange(1, 1 + kernel.shape[0]))
    assert kernel.shape == ((2, 3) if source == target != "torch" else kernel.shape)
    assert turned == (SIDES[source][next(iter(SIDES[source]))] != kernel.shape)


def test_names_and_rules_of_a_file(tmp_path):
    content = {
        "names": {"odd": {"to": "even", "permute": [1, 0]}, "m/n/gamma": "n.weight"},
        "rules": [
            {"from": "m/(.*)/kernel", "to": r"\1.weight", "permute": [1, 0]},
            {"from": "m/(.*)/.*", "to": r"\1.other"},
        ],
    }
    (tmp_path / "names.json").write_text(json.dumps(content))
    shapes = {"odd": (2, 3), "m/a/kernel": (4, 5), "m/a/bias": (5,), "m/n/gamma": (5,), "rest": ()}
    got = rename(made("keras", shapes), load(tmp_path / "names.json"), None, "torch", Report())
    expected = {"even": (3, 2), "a.weight": (5, 4), "a.other": (5,), "n.weight": (5,), "rest": ()}
    assert {p.name: p.shape for p in got.parameters} == expected


@pytest.mark.parametrize(
    ("names", "target", "text"),
    [
        ("layer", None, "names must be one of layers, position or a mapping, got 'layer'"),
        ({"name": {}}, None, 'names must be a mapping with "names" and "rules"'),
        ({"names": {"a": 3}}, None, "an entry of names must be a name"),
        ({"rules": [{"to": "a"}]}, None, "a rule of names must be"),
        ({"rules": [{"from": "(", "to": "a"}]}, None, "a rule of names must be"),
        ({"rules": [{"from": "(.*)", "to": r"\2"}]}, None, "a rule of names must be"),
        ({"rules": [{"from": "(.*)", "to": r"\g<x>"}]}, None, "a rule of names must be"),
        ({"names": {"a": {"to": "b", "permute": 10}}}, None, "permute must be a list of axes, got 10"),
        ({"names": {"a": {"to": "b", "permute": [0, "x"]}}}, None, "permute must be a list of axes"),
        ({"rules": [{"from": ".*", "to": "a"}]}, None, "name must be used once, got 'a'"),
        ({"names": {"m/a/bias": {"to": "b", "permute": [0, 1]}}}, None, "permute must be every axis from 0 to 0 once"),
        ("position", None, "names must be a names file here"),
        ("layers", None, "names must be a names file here"),
        ("position", {"a": None}, "number of parameters must be 1, as in the target, got 6"),
        (
            None,
            {"m/a/kernel": None, "x": None},
            r"1 without \(x\) and 5 left over \(m/a/bias, m/e/embeddings, m/n/gamma and 2 more\)",
        ),
        ("layers", {"a.weight": None}, "0 without"),
    ],
)
def test_names_that_do_not_fit(names, target, text):
    with pytest.raises(Refused, match=text):
        rename(made("keras", KERAS), names, target, "torch", Report())


def test_a_target_in_pytorch_may_have_parameters_without_state():
    import torch

    from adafactor.torch import Adafactor

    optimizer = Adafactor([("a", torch.zeros(2, 3)), ("frozen", torch.zeros(2))])
    report = Report()
    content = torch_files.write(made("torch", {"a": (2, 3)}), template=optimizer, report=report)
    assert list(content["state"]) == [0]
    assert "The state of frozen did not carry over" in report.notes[0]
    groups = [{"params": [("a", torch.zeros(2, 3))]}, {"params": [("frozen", torch.zeros(2))]}]
    content = torch_files.write(
        made("torch", {"a": (2, 3)}), template=Adafactor(groups, factoring=lambda name, shape: None)
    )
    assert not any(callable(value) for group in content["param_groups"] for value in group.values())


def test_groups_stay_groups():
    state = made("torch", {"a": (2, 3), "b": (4,)}, ({"learning_rate": 0.1}, {"learning_rate": 0.2}))
    parameters = (state.parameters[0], Parameter("b", layout_of((4,)), state.parameters[1].slots, 4, group=1))
    state = State(parameters, state.groups, "torch", "adafactor.torch")
    content = torch_files.write(state, "torch.optim")
    assert [group["lr"] for group in content["param_groups"]] == [0.1, 0.2]
    again = torch_files.read(content)
    assert [p.group for p in again.parameters] == [0, 1]
    report = Report()
    jax_files.write(again.with_hyperparameters({"relative_step": False}), "optax", report=report)
    assert any("those of the first of 2 groups" in note for note in report.notes)


def test_counts_that_differ_are_said():
    report = Report()
    tree = jax_files.write(made("torch", {"a": (2, 3), "b": (4,)}, b=2), "adafactor.optax", report=report)
    assert int(tree.count) == 4
    assert "counts from 2 to 4: the largest is used" in report.notes[0]
    assert not report.exact


@pytest.mark.parametrize("format", [name for name, each in FORMATS.items() if each.written])
def test_every_hyperparameter_returns_or_is_named(format):
    relative = False if format == "transformers" else "always"  # which has its own learning rate then
    group = {
        **{"learning_rate": 0.5, "beta_2_decay": -0.7, "epsilon_1": 1e-20, "epsilon_2": 1e-2, "clip_threshold": 2.0},
        **{"relative_step": relative, "beta_1": 0.5, "beta_2_max": 0.9, "scale_parameter": False, "weight_decay": 0.1},
        **{"weight_decay_of": "odd", "decay_offset": 3, "maximize": True},
    }
    report = Report()
    own = adapt.in_its_words(format, group, report)
    back = in_our_words(format, own)
    for name, value in group.items():
        said = any(f" {name}=" in note for note in report.notes)
        by_eps = FORMATS[format].framework == "torch" and name.startswith("epsilon")  # in the pair eps
        assert by_eps or said != (back.get(name) == value), (name, back.get(name), report.notes)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epsilon_1", "abc"), ("learning_rate", [1]), ("relative_step", "maybe"), ("min_dim_size_to_factor", "x"),
        ("factoring", "first_two"), ("weight_decay", {}), ("learning_rte", 1),
    ],
)  # fmt: skip
def test_hyperparameters_that_nobody_takes(name, value):
    with pytest.raises(Refused, match=name):
        adapt.check({name: value})
    adapt.check({"learning_rate": None, "epsilon_1": 1e-30, "factoring": "smallest", "momentum_of": "step"})
