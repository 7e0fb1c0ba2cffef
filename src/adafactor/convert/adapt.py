"""A state as each format can hold it: hyperparameters in its words, one count, momentum of its kind."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import numpy as np

from adafactor.convert.report import Report
from adafactor.convert.state import State
from adafactor.core import factoring
from adafactor.core.dialects import FORMATS, step_size
from adafactor.core.errors import Refused, message
from adafactor.core.hyperparameters import Hyperparameters

# What a source that is silent about it does, so that nobody is told of a difference that there is not.
_USUAL = {
    **{"decay_offset": 0, "maximize": False, "beta_2_max": None, "beta_1": None},
    **{"stochastic_rounding": False, "compensated": False},
}
# Where the answer decides only memory and speed, or is told by the statistics themselves.
_HARMLESS = {
    *("factoring", "min_dim_size_to_factor", "momentum_dtype", "skip_nonfinite", "seed", "momentum_of"),
    *("gradient_accumulation_steps", "use_ema", "warmup_init"),
}


_NUMBERS = {"learning_rate", "weight_decay", "decay_offset", "gradient_accumulation_steps"}

#: Every name that a state's hyperparameters can have.
KNOWN = {name for known in FORMATS.values() for name in (*known.words.values(), *known.always)} | _HARMLESS
STARTS = "the source has none, and the target keeps it: it starts at zero"


def check(told: Mapping[str, Any]) -> None:
    """Refuse hyperparameters that no optimizer has, or takes."""
    for name, value in told.items():
        if name not in KNOWN:
            raise Refused(message("a hyperparameter", f"one of {', '.join(sorted(KNOWN))}", name, "Check its name."))
        if name in _NUMBERS and not isinstance(value, int | float | None):
            raise Refused(message(name, "a number", value, "Leave it out if it is unknown."))
    try:
        Hyperparameters(**{each.name: told[each.name] for each in fields(Hyperparameters) if each.name in told})
        factoring.validate(told.get("factoring", "last_two"), told.get("min_dim_size_to_factor", 1))
    except (TypeError, ValueError) as error:
        raise Refused(str(error)) from None


def in_its_words(format: str, group: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """A group in a format's words, with a note for everything that it cannot be told and does otherwise."""
    known = FORMATS[format]
    own = {word: group[project] for word, project in known.words.items() if project in group}
    for word, project in known.words.items():
        if project == "beta_2_decay" and word in own:
            own[word] = known.decay_sign * own[word]
    for name, value in group.items():
        if (
            name in _HARMLESS
            or name in known.words.values()
            or (name == "weight_decay_of" and not group.get("weight_decay"))
        ):
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
    """``in_its_words``, and where the format's files hold none the advice to construct its optimizer with them."""
    own = in_its_words(format, group, report)
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
    unknown = (
        f"{format} averages {'steps' if wanted == 'step' else 'updates'}, and the step size is unknown (tell "
        "learning_rate, epsilon_2 and scale_parameter with --set, and the parameters' values): it starts at zero"
    )
    parameters, approximate = [], 0
    for parameter in state.parameters:
        group, slots, momentum = state.groups[parameter.group], dict(parameter.slots), parameter.momentum
        if momentum is not None and wanted is None:
            report.dropped("Momentum", [parameter.name], f"{format} has none")
            del slots["momentum"]
        elif momentum is not None and group.get("momentum_of", wanted) != wanted:
            size, constant = step_size(group, parameter.count, parameter.rms)
            if size is None:
                report.dropped("Momentum", [parameter.name], unknown)
                slots["momentum"] = np.zeros_like(momentum)
            else:
                approximate += not constant
                factor = size if wanted == "step" else 1 / size if size else 0.0
                slots["momentum"] = (np.asarray(momentum, np.float64) * factor).astype(momentum.dtype)
        parameters.append(replace(parameter, slots=slots))
    if approximate:
        report.note(
            f"momentum of {approximate} parameters is rescaled by the last step size, which was not constant: it "
            "carries over approximately",
            lossy=True,
        )
    return replace(state, parameters=tuple(parameters))
