"""Every number is validated once, in a sentence that names the argument, the rule, the value and the remedy."""

import math
import re

import numpy as np
import pytest

from adafactor import Hyperparameters

NOT_NUMBERS = [None, "0.5", True, [0.5]]
NUMBERS = [
    # argument, rule, values out of range, remedy
    ("beta_2_decay", "<= 0 and finite", [0.1, -math.inf, math.nan], "The paper uses -0.8."),
    ("epsilon_1", ">= 0 and finite", [-1e-30, math.inf, math.nan], "The paper uses 1e-30."),
    ("epsilon_2", ">= 0 and finite", [-1e-3, math.inf, math.nan], "The paper uses 1e-3."),
    ("clip_threshold", "> 0 and finite", [0, 0.0, -1.0, math.inf, math.nan], "Pass None to switch clipping off."),
    ("beta_1", ">= 0 and < 1", [-0.1, 1, 1.5, math.nan], "Pass None to keep no momentum."),
    ("beta_2_max", ">= 0 and <= 1", [-0.1, 1.1, math.nan], "Pass None for no upper bound."),
]
OPTIONAL = ("clip_threshold", "beta_1", "beta_2_max")


@pytest.mark.parametrize(
    ("argument", "rule", "value", "remedy"),
    [(argument, rule, value, remedy) for argument, rule, values, remedy in NUMBERS for value in values],
)
def test_a_number_out_of_range_is_refused(argument, rule, value, remedy):
    sentence = f"{argument} must be {rule}, got {value!r}. {remedy}"
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        Hyperparameters(**{argument: value})


@pytest.mark.parametrize(
    ("argument", "value", "remedy"),
    [
        (argument, value, remedy)
        for argument, _, _, remedy in NUMBERS
        for value in NOT_NUMBERS
        if not (value is None and argument in OPTIONAL)
    ],
)
def test_what_is_no_number_is_refused(argument, value, remedy):
    sentence = f"{argument} must be a number, got {value!r}. {remedy}"
    with pytest.raises(TypeError, match=f"^{re.escape(sentence)}$"):
        Hyperparameters(**{argument: value})


@pytest.mark.parametrize("value", [0, 1, None, "yes", np.float32(1)])
def test_scale_parameter_is_a_bool(value):
    with pytest.raises(TypeError, match=r"^scale_parameter must be True or False, got .*\. The paper uses True\.$"):
        Hyperparameters(scale_parameter=value)


@pytest.mark.parametrize("value", [0, 1, None, "never", ""])
def test_relative_step_has_three_values(value):
    with pytest.raises(ValueError, match=r'^relative_step must be True, False or "always", got .*\. True caps'):
        Hyperparameters(relative_step=value)


@pytest.mark.parametrize("argument", ["beta_2_decay", "scale_parameter", "relative_step", "clip_threshold"])
def test_a_refusal_speaks_the_callers_language(argument):
    with pytest.raises((TypeError, ValueError), match=r"^theirs must be "):
        Hyperparameters(**{argument: "wrong"}, vocabulary={argument: "theirs"})


@pytest.mark.parametrize("number", [np.float32(-0.5), np.float64(-0.5), np.int64(-1), -1])
def test_any_real_number_is_a_number(number):
    assert Hyperparameters(beta_2_decay=number).decay(1) == 1


def test_hyperparameters_cannot_be_changed():
    with pytest.raises(AttributeError):
        Hyperparameters().beta_2_decay = -0.5


def test_the_defaults_are_the_papers():
    hp = Hyperparameters()
    assert (hp.beta_2_decay, hp.epsilon_1, hp.epsilon_2, hp.clip_threshold) == (-0.8, 1e-30, 1e-3, 1.0)


@pytest.mark.parametrize(("beta_1", "momentum"), [(None, None), (0, None), (0.0, None), (0.9, 0.9)])
def test_no_momentum_is_kept_for_a_coefficient_of_zero(beta_1, momentum):
    assert Hyperparameters(beta_1=beta_1).momentum == momentum


def test_the_first_update_forgets_the_initial_state():
    assert Hyperparameters(beta_2_max=0.999).decay(1) == 1


def test_decay_is_the_papers_power_of_t():
    assert Hyperparameters(beta_2_decay=-0.8).decay(32) == pytest.approx(32**-0.8)


def test_beta_2_max_bounds_beta():
    assert Hyperparameters(beta_2_max=0.9).decay(10**9) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("relative_step", "scheduled", "rho"),
    [
        (True, False, 0.25),
        (True, True, 2.0),
        (False, False, 2.0),
        (False, True, 2.0),
        ("always", False, 0.25),
        ("always", True, 0.25),
    ],
)
def test_relative_step_decides_what_is_capped(relative_step, scheduled, rho):
    assert Hyperparameters(relative_step=relative_step).rho(2.0, 16, scheduled) == rho


def test_the_cap_leaves_a_smaller_learning_rate_alone():
    assert Hyperparameters().rho(0.01, 16) == 0.01
