"""Hyperparameters in each format's own words, and what each format always does without a word for it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from adafactor.convert.report import Report
from adafactor.convert.state import Parameter, State

KERAS, OUR_KERAS = "keras", "adafactor.keras"
TORCH, TRANSFORMERS, OUR_TORCH = "torch.optim", "transformers", "adafactor.torch"
OPTAX, OUR_OPTAX, T5X = "optax", "adafactor.optax", "t5x"

_PLAIN = {
    name: name
    for name in (
        *("learning_rate", "beta_2_decay", "epsilon_1", "epsilon_2", "clip_threshold", "relative_step", "beta_1"),
        *("beta_2_max", "scale_parameter", "weight_decay", "factoring", "min_dim_size_to_factor"),
    )
}
_TORCH = {
    **{"lr": "learning_rate", "beta2_decay": "beta_2_decay", "d": "clip_threshold"},
    **{"weight_decay": "weight_decay", "maximize": "maximize"},
}
_OUR_TORCH = {
    **_TORCH,
    **{"relative_step": "relative_step", "scale_parameter": "scale_parameter", "beta1": "beta_1"},
    **{"beta2_max": "beta_2_max", "momentum_dtype": "momentum_dtype", "factoring": "factoring"},
    **{"min_dim_size_to_factor": "min_dim_size_to_factor", "stochastic_rounding": "stochastic_rounding"},
    **{"compensated": "compensated", "skip_nonfinite": "skip_nonfinite", "seed": "seed"},
}
_OPTAX = {
    **{"learning_rate": "learning_rate", "min_dim_size_to_factor": "min_dim_size_to_factor"},
    **{"decay_rate": "beta_2_decay", "decay_offset": "decay_offset", "eps": "epsilon_1"},
    **{"multiply_by_parameter_scale": "scale_parameter", "clipping_threshold": "clip_threshold"},
    **{"momentum": "beta_1", "weight_decay_rate": "weight_decay"},
}


@dataclass(frozen=True, slots=True)
class Format:
    """One optimizer's words.

    Attributes:
        framework: ``keras``, ``torch`` or ``jax``: whose names of parameters it uses.
        words: its names for hyperparameters, to the project's.
        always: what it does without a word for it.
        momentum_of: what its momentum averages, ``"update"`` or ``"step"``; ``None`` if it has none.
        held: whether its files hold hyperparameters.
    """

    framework: str
    words: Mapping[str, str]
    always: Mapping[str, Any] = field(default_factory=dict)
    momentum_of: str | None = "update"
    held: bool = True


_NO_MORE = {"beta_2_max": None, "decay_offset": 0, "maximize": False}
FORMATS: dict[str, Format] = {
    KERAS: Format(
        "keras",
        {k: v for k, v in _PLAIN.items() if k not in ("beta_1", "beta_2_max", "scale_parameter", "relative_step")},
        {**_NO_MORE, "relative_step": "always", "scale_parameter": True, "beta_1": None, "weight_decay_of": "rate"},
        None,
    ),
    OUR_KERAS: Format("keras", _PLAIN, {"decay_offset": 0, "maximize": False, "weight_decay_of": "rate"}),
    TORCH: Format(
        "torch",
        _TORCH,
        {"beta_2_max": None, "decay_offset": 0, "relative_step": "always", "scale_parameter": True, "beta_1": None}
        | {"weight_decay_of": "rate"},
        None,
    ),
    TRANSFORMERS: Format(
        "torch",
        {"lr": "learning_rate", "decay_rate": "beta_2_decay", "clip_threshold": "clip_threshold", "beta1": "beta_1"}
        | {name: name for name in ("weight_decay", "relative_step", "scale_parameter")},
        {**_NO_MORE, "weight_decay_of": "step"},
        "step",
    ),
    OUR_TORCH: Format("torch", _OUR_TORCH, {"decay_offset": 0, "weight_decay_of": "rate"}),
    OPTAX: Format(
        "jax",
        _OPTAX,
        {
            "beta_2_max": None,
            "epsilon_2": 1e-3,
            "relative_step": False,
            "maximize": False,
            "weight_decay_of": "nothing",
        },
        "step",
        held=False,
    ),
    OUR_OPTAX: Format(
        "jax",
        {**_OPTAX, "decay_rate_max": "beta_2_max", "min_parameter_scale": "epsilon_2"}
        | {"relative_step": "relative_step", "factoring": "factoring"},
        {"maximize": False, "weight_decay_of": "nothing"},
        "step",
        held=False,
    ),
    T5X: Format(
        "jax",
        {"learning_rate": "learning_rate", "multiply_by_parameter_scale": "scale_parameter", "beta1": "beta_1"}
        | {"decay_rate": "beta_2_decay", "step_offset": "decay_offset", "clipping_threshold": "clip_threshold"}
        | {"weight_decay_rate": "weight_decay", "min_dim_size_to_factor": "min_dim_size_to_factor"}
        | {"epsilon1": "epsilon_1", "epsilon2": "epsilon_2"},
        {"beta_2_max": None, "relative_step": False, "maximize": False, "weight_decay_of": "nothing"},
        "step",
        held=False,
    ),
}
# What a source that is silent about it does, so that nobody is told of a difference that there is not.
_USUAL = {
    **{"decay_offset": 0, "maximize": False, "beta_2_max": None, "beta_1": None},
    **{"stochastic_rounding": False, "compensated": False},
}
# Where the answer decides only memory and speed, or is told by the statistics themselves.
_HARMLESS = {
    *("factoring", "min_dim_size_to_factor", "momentum_dtype", "skip_nonfinite", "seed", "momentum_of"),
    *("gradient_accumulation_steps", "use_ema"),
}


#: Every name that a state's hyperparameters can have.
KNOWN = {name for known in FORMATS.values() for name in (*known.words.values(), *known.always)} | _HARMLESS
STARTS = "the source has none, and the target keeps it: it starts at zero"


def read(format: str, own: Mapping[str, Any]) -> dict[str, Any]:
    """A format's hyperparameters in the project's names; words of its own that are not Adafactor's are left out."""
    known = FORMATS[format]
    found = {project: own[word] for word, project in known.words.items() if word in own}
    if known.framework == "jax" and "beta_2_decay" in found:
        found["beta_2_decay"] = -found["beta_2_decay"]
    return {**found, **known.always, **({"momentum_of": known.momentum_of} if known.momentum_of else {})}


def write(format: str, group: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """A group in a format's words, with a note for everything that it cannot be told and does otherwise."""
    known = FORMATS[format]
    own = {word: group[project] for word, project in known.words.items() if project in group}
    if known.framework == "jax" and "decay_rate" in own:
        own["decay_rate"] = -own["decay_rate"]
    words = {*known.words.values(), *(("epsilon_1", "epsilon_2") if known.framework == "torch" else ())}  # eps
    for name, value in group.items():
        if name in _HARMLESS or name in words or (name == "weight_decay_of" and not group.get("weight_decay")):
            continue
        always = known.always.get(name, _USUAL.get(name))
        if not _same(name, value, always):
            report.note(f"{format} has no word for {name}={value!r}: it does as with {name}={always!r}")
    return own


def _same(name: str, value: Any, always: Any) -> bool:
    if value == always or (name == "relative_step" and value is True and always == "always"):
        return True
    numbers = isinstance(value, float) and isinstance(always, float)
    return numbers and math.isclose(value, always, rel_tol=1e-6)


def told(format: str, group: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """``write``, and where the format's files hold no hyperparameters the arguments to construct its optimizer with."""
    own = write(format, group, report)
    if not FORMATS[format].held and own:
        arguments = ", ".join(f"{word}={value!r}" for word, value in own.items())
        report.advise(f"The file holds no hyperparameters: construct {format}'s optimizer with {arguments}")
    return own


def one_group(state: State, format: str, report: Report) -> Mapping[str, Any]:
    """The hyperparameters for a format without groups."""
    if any(dict(group) != dict(state.groups[0]) for group in state.groups[1:]):
        report.note(
            f"{format} has one set of hyperparameters; those of the first of {len(state.groups)} groups are used"
        )
    return state.groups[0]


def one_count(state: State, format: str, report: Report) -> int:
    """The count for a format that has one for all parameters."""
    counts = {parameter.count for parameter in state.parameters}
    if len(counts) > 1:
        report.note(
            f"{format} counts updates once for all parameters, the source had counts from {min(counts)} to "
            f"{max(counts)}: the largest is used",
            lossy=True,
        )
    return state.count


def known_to(state: State, format: str, report: Report) -> State:
    """The state without the slots that only its own writer knows, where that is another optimizer.

    Keras's two classes know each other's. Momentum of integers means nothing without the scales beside it.
    """
    here, there = FORMATS.get(state.optimizer), FORMATS[format]
    if state.optimizer == format or (here is not None and here.framework == there.framework == "keras"):
        return state
    parameters = []
    for parameter in state.parameters:
        gone = list(parameter.extra)
        if parameter.momentum is not None and parameter.momentum.dtype.kind in "iub":
            gone.append("momentum")
        for slot in gone:
            report.dropped(slot, [parameter.name], f"{format} has no such state")
        slots = {slot: value for slot, value in parameter.slots.items() if slot not in gone}
        parameters.append(replace(parameter, slots=slots))
    return replace(state, parameters=tuple(parameters))


def momentum_as(state: State, format: str, report: Report) -> State:
    """The state with momentum as a format averages it: before the learning rate, or after it.

    Divided or multiplied by the last step size, which is exact while the step size was constant.
    """
    state = known_to(state, format, report)
    wanted = FORMATS[format].momentum_of
    parameters, lost, unknown, approximate = [], [], [], []
    for parameter in state.parameters:
        group = state.groups[parameter.group]
        slots = dict(parameter.slots)
        momentum = slots.get("momentum")
        if momentum is not None and wanted is None:
            lost.append(parameter.name)
            del slots["momentum"]
        elif momentum is not None and group.get("momentum_of", wanted) != wanted:
            size, constant = _step_size(parameter, group)
            if size is None:
                unknown.append(parameter.name)
                slots["momentum"] = np.zeros_like(momentum)
            else:
                if not constant:
                    approximate.append(parameter.name)
                factor = size if wanted == "step" else 1 / size if size else 0.0
                slots["momentum"] = (np.asarray(momentum, np.float64) * factor).astype(momentum.dtype)
        parameters.append(replace(parameter, slots=slots))
    report.dropped("Momentum", lost, f"{format} has none")
    report.dropped(
        "Momentum",
        unknown,
        f"{format} averages {'steps' if wanted == 'step' else 'updates'}, and the step size is unknown (tell "
        "learning_rate, epsilon_2 and scale_parameter with --set, and the parameters' values): it starts at zero",
    )
    if approximate:
        report.note(
            f"momentum of {len(approximate)} parameters is rescaled by the last step size, which was not constant: it "
            "carries over approximately",
            lossy=True,
        )
    return replace(state, parameters=tuple(parameters))


def _step_size(parameter: Parameter, group: Mapping[str, Any]) -> tuple[float | None, bool]:
    """alpha of the last update (eqs. 8 and 9), ``None`` if unknown, and whether it was the same at all updates."""
    rate, scaled = group.get("learning_rate"), group.get("scale_parameter")
    if not isinstance(rate, int | float) or scaled is None:
        return None, False
    capped = bool(group.get("relative_step", False))
    rho = min(rate, 1 / math.sqrt(max(parameter.count, 1))) if capped else float(rate)
    if not scaled:
        return rho, not capped or rho == rate
    if parameter.rms is None or "epsilon_2" not in group:
        return None, False
    return rho * max(group["epsilon_2"], parameter.rms), False
