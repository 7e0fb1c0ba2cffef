"""State dicts of ``torch.optim.Adafactor``, transformers', timm's (read only) and ``adafactor.torch.Adafactor``.

Here they become a :class:`~adafactor.convert.state.State`, and a State becomes one of them. A live optimizer of ours
loads them without this detour (``adafactor.torch.checkpoint``).
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

import adafactor
from adafactor.convert import adapt
from adafactor.convert.axes import Axes, Reader, Shapes, fitted, rms_of
from adafactor.convert.names import Names, rename
from adafactor.convert.report import Report
from adafactor.convert.state import Array, Parameter, State
from adafactor.core import factoring
from adafactor.core.dialects import FORMATS, OUR_TORCH, TRANSFORMERS, in_our_words
from adafactor.core.errors import Refused, message
from adafactor.core.factoring import POLICIES
from adafactor.core.files import PathLike, replacing
from adafactor.core.untrusted import check_zip, reading
from adafactor.torch.writers import recognise


def load(path: PathLike) -> Any:
    """The content of a ``.pt`` file, by PyTorch's own reader of plain data: nothing in the file is executed.

    Raises:
        Refused: the file is damaged, or not plain tensors, numbers and containers.
    """
    with reading(path, "a .pt file of plain data"):
        check_zip(path)
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:  # PyTorch's sentences say how to execute the file
            remedy = "Save optimizer.state_dict() alone, sharded tensors gathered; nothing in the file was executed."
            raise Refused(message(f"{path}", "of tensors, numbers and containers", "other objects", remedy)) from None


def find(content: Any) -> Mapping[str, Any]:
    """The optimizer's state dict in a file that may hold more: a model's, a trainer's.

    Raises:
        Refused: there is none, or more than one.
    """
    states = list(_find(content, 4))
    if len(states) != 1:
        remedy = "Save optimizer.state_dict() by itself."
        raise Refused(message("the file", "with the state dict of one Adafactor", f"{len(states)} of them", remedy))
    return states[0]


def _find(content: Any, depth: int) -> Iterator[Mapping[str, Any]]:
    if isinstance(content, Mapping) and isinstance(content.get("param_groups"), list) and "state" in content:
        if content["param_groups"]:
            yield content
    elif isinstance(content, Mapping | list | tuple) and depth:
        for value in content.values() if isinstance(content, Mapping) else content:
            yield from _find(value, depth - 1)


def format_of(content: Any) -> str:
    """Whose state dict it is: a name in ``FORMATS``.

    Raises:
        Refused: another optimizer's; the text names it.
    """
    state_dict = find(content)
    with reading("the state dict", "one of an optimizer"):
        formats = dict.fromkeys(
            recognise([state_dict["state"].get(key) or {} for key in group["params"]], group)
            for group in state_dict["param_groups"]
        )
        if len(formats) > 1:
            raise ValueError(f"its groups are of {' and '.join(formats)}")
    return next(iter(formats))


def read(source: Any, *, report: Report | None = None, shapes: Shapes | None = None, axes: Axes | None = None) -> State:
    """The state of a live optimizer, or of a state dict, of any of these classes.

    Args:
        source: an optimizer (sharded parameters are gathered, so every process must call), a state dict, or a path.
        shapes: shapes by name, for a state dict whose statistics leave them open.
        axes: ``Factored`` by name, for one whose axes a callable chose.

    Raises:
        Refused: it is none of them, or does not tell its shapes and axes.
    """
    report = Report() if report is None else report
    live: list[dict[str, Any]] | None = None
    if isinstance(source, torch.optim.Optimizer):
        live, source = source.param_groups, source.state_dict()
    source = find(source if isinstance(source, Mapping) else load(source))
    format = format_of(source)
    reader, parameters, groups = Reader(format, shapes, axes), [], []
    with reading("the state dict", f"one of {format}"):
        for number, group in enumerate(source["param_groups"]):
            names = _names(group)
            known = group if live is None else live[number]
            params = [None] * len(names) if live is None else known["params"]
            policy = {"factoring": known["factoring"]} if "factoring" in known else {}  # maybe code, which is not saved
            told = {name: _plain(value) for name, value in (group | policy).items()}
            told = in_our_words(format, told, report.note)
            groups.append({name: value for name, value in told.items() if not callable(value)})
            for key, name, param in zip(group["params"], names, params, strict=True):
                values = source["state"].get(key)
                if values:
                    slots = _slots(name, values, format, report)
                    known_shape = None if param is None else tuple(param.shape)
                    new = reader.read(name, slots, told, reader.shape(name, slots, known_shape))
                    rms = float(values["RMS"]) if "RMS" in values else None
                    new = replace(new, count=_count(values["step"], name), group=number, rms=rms)
                    parameters.append(new if param is None else _of(param, new))
    module = adafactor if format == OUR_TORCH else torch
    version = module.__version__ if live is not None else ""
    return State(tuple(parameters), tuple(groups), "torch", format, str(version))


def _names(group: Mapping[str, Any]) -> list[str]:
    return group.get("param_names") or [str(key) for key in group["params"]]


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


def _slots(name: str, values: Mapping[str, Any], format: str, report: Report) -> dict[str, Array]:
    """What is kept of one parameter, by our names."""
    kept = {key: value for key, value in values.items() if key not in ("step", "RMS")}
    for key, value in kept.items():
        if not isinstance(value, Tensor):
            report.dropped(key, [name], "it is no tensor")
    ours = FORMATS[format].slots
    return {ours.get(key, key): _array(value) for key, value in kept.items() if isinstance(value, Tensor)}


def _of(param: Tensor, parameter: Parameter) -> Parameter:
    """With what a live parameter tells."""
    whole = param.full_tensor() if hasattr(param, "full_tensor") else param
    rms = rms_of(whole.detach().cpu().double().numpy())
    return replace(parameter, dtype=str(param.dtype).removeprefix("torch."), rms=rms)


def _count(step: Any, name: str) -> int:
    value = step.item() if isinstance(step, Tensor) else step
    if not float(value).is_integer():
        raise Refused(message(f"the step of {name}", "a whole number", value, "Save the file again."))
    return int(value)


def _array(value: Tensor) -> Array:
    if hasattr(value, "full_tensor"):
        value = value.full_tensor()
    value = value.detach().cpu()
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise Refused(message("a tensor", "as large as its storage", tuple(value.shape), "It repeats its elements."))
    value = value.contiguous()
    if value.dtype == torch.bfloat16:
        import ml_dtypes

        return np.array(value.view(torch.int16).numpy()).view(ml_dtypes.bfloat16)
    return np.array(value.numpy())


def _tensor(value: Array) -> Tensor:
    if value.dtype.name == "bfloat16":
        return torch.from_numpy(value.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(np.array(value))


def write(
    state: State,
    format: str = OUR_TORCH,
    *,
    template: Any = None,
    names: Names | None = None,
    report: Report | None = None,
) -> dict[str, Any]:
    """A state dict for ``load_state_dict`` of one of the three classes.

    Args:
        format: ``"adafactor.torch"``, ``"torch.optim"`` or ``"transformers"``.
        template: an optimizer of that class, its state dict, or a path: the order, the names and the groups of the
            parameters. Without one they are the state's.

    Raises:
        Refused: the template does not fit.
    """
    report = Report() if report is None else report
    groups = None if template is None else _template(template, format)
    target = None if groups is None else dict.fromkeys(name for group in groups for name in _names(group))
    state = rename(state, names, target, "torch", report, partial=True)
    state = adapt.momentum_as(state, format, report)
    groups = _own_groups(state, format) if groups is None else groups
    saved: dict[int, dict[str, Any]] = {}
    known = state.named()
    for group in groups:
        listed = _names(group)
        members = [known[name] for name in listed if name in known]
        sources = {parameter.group for parameter in members}
        if len(sources) > 1:
            report.note(
                f"one group of the target has parameters of {len(sources)} groups of the source: it follows the first"
            )
        choose = FORMATS[format].axes
        policy: tuple[Any, ...] = (0,)
        if members:
            told = state.groups[members[0].group]
            policy = policy if choose is not None else _policy(group, told, members)
            _write_group(format, group, told, report)
        if callable(group.get("factoring")):
            del group["factoring"]  # code does not belong in a state dict: the optimizer that loads has it
        if group.get("beta1"):
            report.dropped("Momentum", [p.name for p in members if p.momentum is None], adapt.STARTS)
        for key, name in zip(group["params"], listed, strict=True):
            if name in known:
                shape = known[name].shape
                layout = factoring.layout(shape, *policy, name=name) if choose is None else choose(shape, *policy)
                saved[key] = _write_one(fitted(known[name], layout, report), format, report)
    return {"state": saved, "param_groups": groups}


def _template(template: Any, format: str) -> list[dict[str, Any]]:
    callables = []
    if isinstance(template, torch.optim.Optimizer):
        callables = [group.get("factoring") for group in template.param_groups]
        template = template.state_dict()
    elif not isinstance(template, Mapping):
        template = load(template)
    template, written_by = find(template), format_of(template)
    if written_by != format:
        raise Refused(message("the template", f"of {format}", written_by, "Make it with an optimizer of that class."))
    groups = [{**_defaults(format), **group} for group in template["param_groups"]]
    for group, rule in zip(groups, callables, strict=False):
        if callable(rule):
            group["factoring"] = rule
    return groups


def _own_groups(state: State, format: str) -> list[dict[str, Any]]:
    """Groups as the state has them, with the class's defaults for what the state does not know."""
    groups, position = [], 0
    for number in range(len(state.groups)):
        members = [parameter.name for parameter in state.parameters if parameter.group == number]
        keys = list(range(position, position + len(members)))
        position += len(members)
        names = {} if members == [str(key) for key in keys] else {"param_names": members}
        groups.append({**_defaults(format), **names, "params": keys})
    return groups


def _defaults(format: str) -> dict[str, Any]:
    """A group of the class, which its module tells: a format is called like it."""
    known = FORMATS[format].group
    group = dict(import_module(format).Adafactor([torch.zeros(1)]).param_groups[0] if known is None else known)
    group.pop("params", None)
    return group


def _policy(group: dict[str, Any], told: Mapping[str, Any], members: list[Parameter]) -> tuple[Any, int]:
    """``factoring`` and least side for a group of ours: what keeps the statistics as they are, if anything does."""
    own = group["factoring"], group["min_dim_size_to_factor"]
    if callable(own[0]):
        return own
    first = told.get("factoring", own[0]), told.get("min_dim_size_to_factor", own[1])
    tried = [first, *((policy, side) for policy in POLICIES for side in sorted({first[1], own[1], 1, 2, 128}))]
    tried = tried if first[0] in POLICIES else tried[1:]

    def fits(policy: Any, side: int) -> bool:
        return all(factoring.layout(parameter.shape, policy, side) == parameter.layout for parameter in members)

    chosen = next((each for each in tried if fits(*each)), tried[0])
    group["factoring"], group["min_dim_size_to_factor"] = chosen
    return chosen


def _write_group(format: str, group: dict[str, Any], told: Mapping[str, Any], report: Report) -> None:
    """Set a group's hyperparameters as far as the state knows them; what it does not know stays."""
    dialect = FORMATS[format]
    own = {"eps[0]": group["eps"][0], "eps[1]": group["eps"][1], **adapt.in_its_words(format, told, report)}
    for word in ("factoring", "min_dim_size_to_factor"):
        own.pop(word, None)  # as the statistics are
    if own.get("relative_step") == "always":
        own["relative_step"] = True
    if isinstance(own.get("momentum_dtype"), str):
        own["momentum_dtype"] = getattr(torch, own["momentum_dtype"], own["momentum_dtype"])
    if not isinstance(own.get("lr", 0.0), int | float):
        report.note(f"the learning rate {own.pop('lr')!r} is no number: set one")
    if own.get("weight_decay", 0) is None:
        own["weight_decay"] = 0.0
    clip = next(word for word, ours in dialect.words.items() if ours == "clip_threshold")
    if own.get(clip, 1.0) is None:
        own[clip] = dialect.unclipped
    if dialect.told is not None:
        dialect.told(own, report.note)
    own["eps"] = own.pop("eps[0]"), own.pop("eps[1]")
    group.update(own)


def _write_one(parameter: Parameter, format: str, report: Report) -> dict[str, Any]:
    values, dialect = dict(parameter.slots), FORMATS[format]
    if dialect.keeps_axes and "row" in values:
        values["row"], values["column"] = values["row"][..., None], values["column"][..., None, :]
    if format == TRANSFORMERS and "momentum" in values:
        values["momentum"] = values["momentum"].astype(np.float32)
    if dialect.count == "float32" and parameter.count > 1 << 24:
        report.note(
            f"{format} counts in float32: {parameter.count} updates become {int(np.float32(parameter.count))}",
            lossy=True,
        )
    step = (
        parameter.count
        if dialect.count == "int"
        else torch.tensor(parameter.count, dtype=getattr(torch, dialect.count))
    )
    theirs = {slot: word for word, slot in dialect.slots.items()}
    named = {theirs.get(name, name): _tensor(value) for name, value in values.items()}
    # transformers takes RMS anew before it uses it.
    return {"step": step, **named, **({"RMS": parameter.rms or 0} if format == TRANSFORMERS else {})}


def save(content: Mapping[str, Any], path: PathLike) -> None:
    """A ``.pt`` file, there whole or not at all."""
    with replacing(path) as new:
        torch.save(content, new)


__all__ = ["FORMATS", "find", "format_of", "load", "read", "save", "write"]
