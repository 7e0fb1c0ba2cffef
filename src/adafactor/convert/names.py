"""Parameters by the names of another framework: explicit names, patterns, or what the usual layers are called.

A names file is JSON with one or both of

    {"names": {"dense/kernel": {"to": "dense.weight", "permute": [1, 0]}, "dense/bias": "dense.bias"},
     "rules": [{"from": "(.*)/kernel", "to": "\\1.weight", "permute": [1, 0]}]}

Names come first, then the first rule whose pattern matches a whole name; other names stay as they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from adafactor.convert.axes import permuted
from adafactor.convert.report import Report, some
from adafactor.convert.state import Parameter, State
from adafactor.core.errors import Refused, message
from adafactor.core.factoring import Shape
from adafactor.core.files import PathLike
from adafactor.core.untrusted import reading

#: ``names`` of a conversion: a names file's content, or a word (``WORDS``).
Names = Mapping[str, Any] | str
WORDS = ("layers", "position")
Renamed = tuple[str, Sequence[int] | None]

# What the usual layers call theirs, by framework: (kind, rank of the parameter) is the same parameter everywhere.
_KINDS = {
    "kernel": {"keras": "kernel", "jax": "kernel", "torch": "weight"},
    "embedding": {"keras": "embeddings", "jax": "embedding", "torch": "weight"},
    "scale": {"keras": "gamma", "jax": "scale", "torch": "weight"},
    "shift": {"keras": "beta", "jax": "bias", "torch": "bias"},
    "bias": {"keras": "bias", "jax": "bias", "torch": "bias"},
}
# Kernels are (…, in, out) in Keras and Flax and (out, in, …) in PyTorch: numpy.transpose from the former to the latter.
_TO_TORCH = {2: (1, 0), 3: (2, 1, 0), 4: (3, 2, 0, 1), 5: (4, 3, 0, 1, 2)}


def load(path: PathLike) -> Mapping[str, Any]:
    """The content of a names file.

    Raises:
        Refused: it is not what the module says.
    """
    with reading(path, "a names file"), open(path, encoding="utf-8") as file:
        content = json.load(file)
        check(content)
    checked: Mapping[str, Any] = content
    return checked


def check(names: Names) -> None:
    """Refuse names that are neither a word nor the content of a names file."""
    remedy = 'docs/state.md shows one; or pass "layers" or "position".'
    if isinstance(names, str):
        if names not in WORDS:
            raise Refused(message("names", f"one of {', '.join(WORDS)} or a mapping", names, remedy))
        return
    if not isinstance(names, Mapping) or not set(names) <= {"names", "rules"}:
        raise Refused(message("names", 'a mapping with "names" and "rules"', names, remedy))
    for entry in [*dict(names.get("names", {})).values(), *names.get("rules", [])]:
        if not isinstance(entry, str) and not (isinstance(entry, Mapping) and isinstance(entry.get("to"), str)):
            raise Refused(message("an entry of names", 'a name, or a mapping with "to"', entry, remedy))
        order = None if isinstance(entry, str) else entry.get("permute")
        if order is not None and not (isinstance(order, Sequence) and all(type(axis) is int for axis in order)):
            raise Refused(message("permute", "a list of axes", order, remedy))
    for rule in names.get("rules", []):
        try:
            re.compile(rule["from"]).sub(rule["to"], "")
        except (re.error, TypeError, LookupError) as error:
            raise Refused(message("a rule of names", 'a mapping with a pattern as "from"', rule, f"{error}.")) from None


def rename(
    state: State,
    names: Names | None,
    target: Mapping[str, Shape | None] | None,
    framework: str,
    report: Report,
    *,
    partial: bool = False,
) -> State:
    """The state with its parameters named, ordered and turned as the target has them.

    Args:
        names: see the module; ``None`` keeps all names.
        target: names and shapes of the target's parameters in its order, ``None`` where the target takes any.
        framework: the target's.
        partial: whether the target may have parameters without state, which start afresh.

    Raises:
        Refused: a parameter of the target has none in the state, or the other way round.
    """
    if names is not None:
        check(names)
    if names == "position":
        state = _by_position(state, target)
    elif names == "layers":
        state = _by_layer(state, target, framework, report)
    elif isinstance(names, Mapping):
        state = _renamed(state, lambda parameter: _by_file(parameter.name, names), report)
    if target is None:
        return state
    known = state.named()
    missing, left = [name for name in target if name not in known], [name for name in known if name not in target]
    if partial and missing and not left:
        report.dropped("The state", missing, "the source has none, so they start afresh")
        missing = []
    if missing or left:
        got = f"{len(missing)} without ({some(missing)}) and {len(left)} left over ({some(left)})"
        remedy = "Give names (--names): a file, layers or position."
        raise Refused(message("every parameter of the target", "one of the source by name", got, remedy))
    return replace(state, parameters=tuple(known[name] for name in target if name in known))


def _renamed(state: State, rule: Callable[[Parameter], Renamed], report: Report) -> State:
    parameters = []
    for parameter in state.parameters:
        name, permutation = rule(parameter)
        if permutation is not None:
            parameter = permuted(parameter, permutation, report)
        parameters.append(replace(parameter, name=name))
    return replace(state, parameters=tuple(parameters))


def _by_file(name: str, names: Mapping[str, Any]) -> Renamed:
    entry = names.get("names", {}).get(name)
    if entry is not None:
        return (entry, None) if isinstance(entry, str) else (entry["to"], entry.get("permute"))
    for rule in names.get("rules", []):
        match = re.fullmatch(rule["from"], name)
        if match:
            return match.expand(rule["to"]), rule.get("permute")
    return name, None


def _by_position(state: State, target: Mapping[str, Shape | None] | None) -> State:
    if target is None:
        raise Refused(message("names", "a names file here", "position", "Only a target with a template has positions."))
    if len(target) != len(state.parameters):
        rule, got = f"{len(target)}, as in the target", len(state.parameters)
        raise Refused(message("the number of parameters", rule, got, "Name them in a names file."))
    pairs = zip(state.parameters, target, strict=True)
    return replace(state, parameters=tuple(replace(parameter, name=name) for parameter, name in pairs))


def _by_layer(state: State, target: Mapping[str, Shape | None] | None, framework: str, report: Report) -> State:
    """Names and axes of dense, convolution, embedding and normalisation layers, one framework to another.

    Both sides are written as (path of the layer, kind). From PyTorch, whose ``weight`` may be any of them, the target's
    name tells which.
    """
    if target is None:
        raise Refused(
            message("names", "a names file here", "layers", "Pass a template, which tells the target's names.")
        )
    source = {_split(parameter.name, state.framework): parameter for parameter in state.parameters}
    here, there = _family(state.framework), _family(framework)
    renamed = []
    for name in target:
        path, leaf = _split(name, framework)
        kinds = [kind for kind, words in _KINDS.items() if words[there] == leaf and (path, words[here]) in source]
        if not kinds:
            continue  # `rename` says what is missing
        parameter = source.pop((path, _KINDS[kinds[0]][here]))
        turn = (
            _TO_TORCH.get(len(parameter.shape))
            if kinds[0] == "kernel" and "torch" in (here, there) and here != there
            else None
        )
        if turn is not None:
            back = tuple(turn.index(axis) for axis in range(len(turn)))
            parameter = permuted(parameter, turn if there == "torch" else back, report)
        renamed.append(replace(parameter, name=name))
    return replace(state, parameters=(*renamed, *source.values()))


def _family(framework: str) -> str:
    return framework if framework in ("keras", "torch") else "jax"


def _split(name: str, framework: str) -> tuple[tuple[str, ...], str]:
    """The layer's path, without what a framework puts before all of them, and the parameter's own name."""
    parts = name.split("." if _family(framework) == "torch" else "/")
    if framework == "keras" and len(parts) > 2:
        parts = parts[1:]  # the model's name
    elif _family(framework) == "jax" and parts[0] == "params":
        parts = parts[1:]
    return tuple(parts[:-1]), parts[-1]
