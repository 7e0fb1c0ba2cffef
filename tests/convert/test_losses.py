"""What a target has no place for, or the source nothing of, is said."""

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
import torch

from adafactor import Factored
from adafactor import layout as layout_of
from adafactor.convert import jax as jax_files
from adafactor.convert import keras as keras_files
from adafactor.convert import state
from adafactor.convert import torch as torch_files
from adafactor.convert.keras_order import order_of
from adafactor.convert.report import Report
from adafactor.convert.state import Parameter, State
from adafactor.core.errors import Refused
from adafactor.keras import Adafactor as OurKeras
from adafactor.optax import adafactor as our_optax
from adafactor.torch import Adafactor as OurTorch


def made(optimizer="adafactor.torch", groups=({},), **slots):
    statistics = {"row": np.ones(2, "f4"), "column": np.ones(3, "f4")}
    return State((Parameter("w", layout_of((2, 3)), statistics | slots, 5, rms=0.5),), groups, "torch", optimizer)


def built(make, **options):
    optimizer = make(0.1, **options)
    optimizer.build([keras.Variable(np.ones((2, 3), "f4"), name="w")])
    return optimizer


WRITERS = {
    "torch.optim": lambda s, r: torch_files.write(s, "torch.optim", report=r),
    "transformers": lambda s, r: torch_files.write(s, "transformers", report=r),
    "adafactor.optax": lambda s, r: jax_files.write(s, "adafactor.optax", report=r),
    "optax": lambda s, r: jax_files.write(s.with_hyperparameters({"beta_1": 0.9}), "optax", report=r),
    "t5x": lambda s, r: jax_files.write(s, "t5x", report=r),
    "adafactor.keras": lambda s, r: keras_files.write(s, built(OurKeras), report=r),
    "keras": lambda s, r: keras_files.write(s, built(keras.optimizers.Adafactor), report=r),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_slots_of_ours_elsewhere(write):
    """8-bit momentum without its scales would be noise."""
    report = Report()
    slots = {"momentum": np.ones((2, 3), "i1"), "momentum_scale": np.ones(2, "f4"), "residual": np.ones((2, 3), "f4")}
    write(made(**slots), report)
    for slot in slots:
        assert any(note.startswith(f"{slot} of w did not carry over") for note in report.notes), report.notes
    assert not report.exact


def test_slots_of_ours_stay_with_ours_and_in_state_files(tmp_path):
    blocks = {"momentum": np.arange(6, dtype="i1"), "momentum_scale": np.ones(1, "f4")}  # not of the parameter's shape
    state.write(made(**blocks), tmp_path / "a.safetensors")
    report = Report()
    content = torch_files.write(state.read(tmp_path / "a.safetensors"), report=report)
    assert report.exact
    for slot, value in blocks.items():
        np.testing.assert_array_equal(content["state"][0][slot].numpy(), value)
    again = torch_files.read(content, shapes={"w": (2, 3)}).parameters[0]
    assert again.slots.keys() == {"row", "column", *blocks}


def test_residuals_of_compensated_parameters_return():
    param = torch.nn.Parameter(torch.randn(2, 3).bfloat16())
    old, new = (OurTorch([("w", param)], lr=1e-3, compensated=True) for _ in range(2))
    param.grad = torch.randn(2, 3).bfloat16()
    old.step()
    report = Report()
    new.load_state_dict(torch_files.write(torch_files.read(old), template=new, report=report))
    assert report.exact
    assert old.state[param]["residual"].any()
    assert new.param_groups[0]["compensated"]
    for slot, value in old.state[param].items():
        assert new.state[param][slot].dtype == value.dtype
        assert torch.equal(new.state[param][slot], value)


@pytest.mark.parametrize("target", ["adafactor.torch", "adafactor.optax", "optax", "adafactor.keras"])
def test_momentum_that_the_source_has_not(target):
    report, told = Report(), {"beta_1": 0.9, "learning_rate": 0.1}
    if target == "adafactor.torch":
        optimizer = OurTorch([("w", torch.nn.Parameter(torch.ones(2, 3)))], beta1=0.9)
        torch_files.write(made(), template=optimizer, report=report)
    elif target == "adafactor.keras":
        keras_files.write(made(), built(OurKeras, beta_1=0.9), report=report)
    else:
        jax_files.write(made(groups=(told,)), target, report=report)
    assert any("Momentum of w did not carry over: the source has none" in note for note in report.notes)


def test_momentum_is_rescaled_where_the_step_size_is_known():
    momentum = np.full((2, 3), 0.25, "f4")
    group = {"momentum_of": "update", "learning_rate": 0.1, "scale_parameter": True, "epsilon_2": 1e-3}
    report = Report()
    got = jax_files.write(made(groups=(group | {"relative_step": False},), momentum=momentum), "t5x", report=report)
    each = got["state"]["param_states"]["w"]
    np.testing.assert_allclose(each["m"], momentum * 0.1 * 0.5, rtol=1e-6)  # the learning rate, and the parameter's rms
    assert any("carries over approximately" in note for note in report.notes)
    capped = group | {"relative_step": "always", "learning_rate": 1.0}
    each = jax_files.write(made(groups=(capped,), momentum=momentum), "t5x")["state"]["param_states"]["w"]
    np.testing.assert_allclose(each["m"], momentum * 0.5 / np.sqrt(5), rtol=1e-6)


def test_accumulators_do_not_tell_how_many_gradients_make_an_update():
    optimizer = built(OurKeras, gradient_accumulation_steps=4)
    saved = keras_files.load(optimizer)
    saved.config.clear()
    with pytest.raises(Refused, match=r"got '2 of them'. .* tell use_ema, gradient_accumulation_steps and factoring"):
        order_of(saved, None)
    saved.config["use_ema"] = False
    order = order_of(saved, None)
    with pytest.raises(Refused, match="gradient_accumulation_steps must be known, got None"):
        keras_files._accumulated(saved, order)


def test_diagnostics_are_no_state():
    for options in ({}, {"diagnostics": True}):
        optimizer, report = built(OurKeras, **options), Report()
        keras_files.write(made(), optimizer, report=report)
        assert keras_files.read(optimizer).count == 5
        assert report.exact
    params = {"w": jnp.ones((2, 3))}
    fresh = our_optax(0.1, min_dim_size_to_factor=2, diagnostics=True).init(params)
    filled = jax_files.write(made(), "adafactor.optax", template=fresh)
    assert jax.tree.structure(filled) == jax.tree.structure(fresh)
    assert jax_files.read({"params": params, "s": filled}).parameters[0].slots.keys() == {"row", "column"}


def test_moving_averages_that_the_source_has_not():
    optimizer, report = built(OurKeras, use_ema=True), Report()
    before = np.array(optimizer.variables[2].value.detach())
    keras_files.write(made(), optimizer, report=report)
    np.testing.assert_array_equal(np.array(optimizer.variables[2].value.detach()), before)
    assert any("The moving average of w" in note for note in report.notes)


def test_a_long_count_of_torch_optim():
    long = State((Parameter("w", layout_of((2,)), {"second_moment": np.ones(2, "f4")}, (1 << 24) + 1),))
    report = Report()
    torch_files.write(long, "torch.optim", report=report)
    assert any("counts in float32: 16777217 updates become 16777216" in note for note in report.notes)
    assert torch_files.read(torch_files.write(long)).count == (1 << 24) + 1


def test_a_step_between_updates_is_refused():
    content = torch_files.write(made(), "torch.optim")
    content["state"][0]["step"] = torch.tensor(4.5)
    with pytest.raises(Refused, match=r"step of w must be a whole number, got 4\.5"):
        torch_files.read(content)


def test_what_is_no_tensor_is_said():
    content = torch_files.write(made())
    content["state"][0]["extra"] = "text"
    report = Report()
    torch_files.read(content, report=report)
    assert any("extra of w did not carry over: it is no tensor" in note for note in report.notes)


def test_no_floor_of_torch_optim_is_silent():
    for eps, said in (((None, 1e-3), False), ((1e-30, 1e-3), False), ((1e-3, 1e-3), True)):
        content = torch_files.write(made(), "torch.optim")
        content["param_groups"][0]["eps"] = eps
        report = Report()
        found = torch_files.read(content, report=report)
        assert found.hyperparameters["epsilon_1"] == (eps[0] or 1e-30)
        assert any("floor" in note for note in report.notes) == said


def test_batch_axes_that_a_file_does_not_tell():
    layout = layout_of((2, 3, 4), lambda *_: Factored((1,), (2,), batch=(0,)))
    slots = {"row": np.ones((2, 3), "f4"), "column": np.ones((2, 4), "f4")}
    for format in ("torch.optim", "adafactor.torch"):
        report = Report()
        torch_files.write(State((Parameter("w", layout, slots, 1),)), format, report=report)
        assert any("batch axes" in note for note in report.notes)
    report = Report()
    optimizer = OurTorch(
        [("w", torch.nn.Parameter(torch.ones(2, 3, 4)))], factoring=lambda *_: Factored((1,), (2,), (0,))
    )
    torch_files.write(State((Parameter("w", layout, slots, 1),)), template=optimizer, report=report)
    assert report.notes == []


def test_many_losses_are_one_sentence():
    report = Report()
    for number in range(1000):
        report.dropped("Momentum", [f"p{number}"], "there is none")
    assert report.notes == ["Momentum of p0, p1, p2 and 997 more did not carry over: there is none"]
    assert "note: Momentum of p0" in report.text()
