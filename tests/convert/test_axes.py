"""Statistics over other axes, against those of the oracle on the same gradients."""

import numpy as np
import pytest

from adafactor import Factored, Hyperparameters
from adafactor import layout as layout_of
from adafactor.convert.axes import estimate, fitted, permuted, roles
from adafactor.convert.report import Report
from adafactor.convert.state import Parameter
from adafactor.core import reference
from adafactor.core.dialects import largest_two
from adafactor.core.errors import Refused
from adafactor.core.factoring import Layout

SHAPE = (3, 4, 5, 2)


def by(rows, columns, shape=SHAPE, batch=()):
    return layout_of(shape, lambda *_: Factored(rows, columns, batch))


WHOLE = Layout(SHAPE, (), ())
LAST, FIRST = by((2,), (3,)), by((0,), (1,))
SMALLEST, TURNED = by((0, 1), (2, 3)), by((3,), (2,))


def oracle(layout, steps=5, power=1.0):
    rng = np.random.default_rng(0)
    state = reference.init(layout, Hyperparameters())
    for _ in range(steps):
        g = rng.normal(size=layout.shape) ** power
        _, state = reference.step(g, g, state, layout, Hyperparameters(), 0.1)
    return Parameter("w", layout, state.second_moment, state.t)


@pytest.mark.parametrize(
    ("old", "new", "how"),
    [
        *((its, its, "kept") for its in (WHOLE, LAST, SMALLEST)),
        (LAST, TURNED, "kept"),
        *((WHOLE, its, "means") for its in (LAST, FIRST, SMALLEST)),
        (LAST, by((0, 1, 2), (3,)), "means"),
        (SMALLEST, LAST, "rebuilt"),
        (LAST, FIRST, "rebuilt"),
        (LAST, WHOLE, "rebuilt"),
    ],
)
def test_what_is_called_exact_is_what_the_target_would_have_kept(old, new, how):
    report = Report()
    got, own = fitted(oracle(old), new, report), oracle(new)
    (change,) = report.changes
    assert change.how == how
    same = all(np.allclose(got.slots[slot], own.slots[slot], rtol=1e-12) for slot in new.slots)
    assert same == change.exact
    if how == "kept":
        assert change.estimate_change == 0


def test_a_rebuilt_statistic_is_exact_for_a_matrix_of_rank_one():
    rng = np.random.default_rng(0)
    parts = [rng.uniform(0.5, 2, n) for n in SHAPE]
    v = np.einsum("i,j,k,l->ijkl", *parts)
    whole = Parameter("w", WHOLE, {"second_moment": v}, 1)
    report = Report()
    there = fitted(fitted(whole, LAST, report), FIRST, report)
    back = fitted(there, WHOLE, report)
    np.testing.assert_allclose(back.slots["second_moment"], v, rtol=1e-12)
    assert all(change.estimate_change < 1e-12 for change in report.changes)


def test_the_change_of_the_estimate_is_measured():
    report, parameter = Report(), oracle(WHOLE)
    got = fitted(parameter, LAST, report)
    v = parameter.slots["second_moment"]
    row, column = got.slots["row"][..., None], got.slots["column"][..., None, :]
    estimate = row * column / row.mean(axis=-2, keepdims=True)
    assert report.changes[0].estimate_change == pytest.approx(np.linalg.norm(estimate - v) / np.linalg.norm(v))


def test_rows_without_gradient_and_empty_parameters():
    parameter = Parameter("w", layout_of((2, 3)), {"row": np.zeros(2), "column": np.zeros(3)}, 1)
    assert not fitted(parameter, Layout((2, 3), (), ()), Report()).slots["second_moment"].any()
    empty = Parameter("e", Layout((0, 3), (), ()), {"second_moment": np.zeros((0, 3))}, 1)
    got = fitted(empty, Layout((0, 3), (0,), (1,)), Report())
    assert got.slots["row"].shape == (0,)
    np.testing.assert_array_equal(got.slots["column"], np.zeros(3))


@pytest.mark.parametrize("layout", [WHOLE, LAST, FIRST, SMALLEST, by((0,), (2, 3), batch=(1,))], ids=str)
@pytest.mark.parametrize("permutation", [(3, 2, 0, 1), (1, 0, 2, 3), (0, 1, 2, 3), (2, 3, 1, 0)])
def test_permuted_axes_are_those_of_the_permuted_problem(layout, permutation):
    momentum = np.random.default_rng(0).normal(size=SHAPE)
    old = Parameter("w", layout, {**oracle(layout).slots, "momentum": momentum}, 1)
    new = permuted(old, permutation, Report())
    np.testing.assert_allclose(estimate(new), estimate(old).transpose(permutation), rtol=1e-12)
    np.testing.assert_array_equal(new.momentum, momentum.transpose(permutation))
    assert not new.layout.rows or min(new.layout.rows) < min(new.layout.columns)
    inverse = np.argsort(permutation)
    back = permuted(new, inverse, Report())
    assert back.layout == old.layout
    for slot, array in old.slots.items():
        np.testing.assert_array_equal(back.slots[slot], array)


def test_extra_slots_that_cannot_be_permuted_are_named():
    slots = {"row": np.ones(2), "column": np.ones(3), "momentum": np.ones((2, 3)), "momentum_scale": np.ones(1)}
    report = Report()
    new = permuted(Parameter("w", layout_of((2, 3)), slots, 1), (1, 0), report)
    assert set(new.slots) == {"row", "column"}
    assert "momentum_scale and momentum of w" in report.notes[0]
    assert not report.exact


def test_a_permutation_must_be_one():
    with pytest.raises(Refused, match=r"^permute must be every axis from 0 to 3 once, got \[0, 1\]\. The shape of w"):
        permuted(oracle(LAST), (0, 1), Report())


def test_another_shape_is_refused():
    with pytest.raises(Refused, match=r"shape of w must be \(4, 3\) as in the target, got \(3, 4\)"):
        fitted(oracle(layout_of((3, 4))), layout_of((4, 3)), Report())


def rule(policy):
    return lambda shape: layout_of(shape, policy)


@pytest.mark.parametrize("shape", [(3, 4), (4, 4), (2, 3, 4), (3, 3, 3), (3, 4, 5, 2)])
@pytest.mark.parametrize("policy", ["last_two", "largest_two", "smallest"])
def test_a_policy_and_the_statistics_tell_axes_and_shape(shape, policy):
    layout = layout_of(shape, policy)
    assert roles("w", layout.slots, [rule(policy)], shape=shape) == layout
    if policy == "last_two":
        assert roles("w", layout.slots, [rule(policy)]) == layout


def test_what_they_leave_open_is_asked_for():
    slots = {"row": (3,), "column": (4,)}
    with pytest.raises(Refused, match=r"shape of w .*Pass shapes \(--shapes\)"):  # (3, 4) or (4, 3)
        roles("w", slots, [largest_two])
    assert roles("w", slots, [largest_two], shape=(4, 3)) == Layout((4, 3), (1,), (0,))
    with pytest.raises(Refused, match=r"axes of w .*got '2 possible choices'. Pass its axes"):
        roles("w", {"row": (3,), "column": (3,)}, [], shape=(3, 3))
    told = {"w": Factored((0,), (1,))}
    assert roles("w", {"row": (3,), "column": (3,)}, [], shape=(3, 3), axes=told) == layout_of((3, 3))
    with pytest.raises(Refused, match="axes of w must be those of row"):
        roles("w", {"row": (3,), "column": (4,)}, [], shape=(3, 4), axes={"w": Factored((1,), (0,))})
    with pytest.raises(Refused, match="got '0 possible choices'"):
        roles("w", slots, [rule("last_two")], shape=(5, 6))
