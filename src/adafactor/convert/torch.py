"""State dicts of ``torch.optim.Adafactor``, transformers', timm's (read only) and ``adafactor.torch.Adafactor``.

Here they become a :class:`~adafactor.convert.state.State`, and a State becomes one of them. A live optimizer of ours
loads them without this detour (``adafactor.torch.checkpoint``).
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

import adafactor
from adafactor.convert import adapt
from adafactor.convert.axes import Axes, Chooser, Shapes, fitted, rms_of, roles, rows_first
from adafactor.convert.names import Names, rename
from adafactor.convert.report import Report
from adafactor.convert.state import STATISTICS, Array, Parameter, State
from adafactor.core import factoring
from adafactor.core.dialects import FORMATS, NO_FLOOR, OUR_TORCH, TORCH, TRANSFORMERS, in_our_words, last_two
from adafactor.core.errors import Refused, message
from adafactor.core.factoring import POLICIES, Shape
from adafactor.core.files import PathLike, replacing
from adafactor.core.untrusted import check_zip, reading
from adafactor.torch.writers import recognise

_TRANSFORMERS_GROUP = {
    **{"lr": None, "eps": (1e-30, 1e-3), "clip_threshold": 1.0, "decay_rate": -0.8, "beta1": None},
    **{"weight_decay": 0.0, "scale_parameter": True, "relative_step": True, "warmup_init": False},
}


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
    elif not isinstance(source, Mapping):
        source = load(source)
    source = find(source)
    format = format_of(source)
    reader, parameters, groups = _Reader(format, report, shapes, axes), [], []
    with reading("the state dict", f"one of {format}"):
        for number, group in enumerate(source["param_groups"]):
            groups.append(_read_group(format, group, report))
            names = group.get("param_names") or [str(key) for key in group["params"]]
            known = group if live is None else live[number]
            params = [None] * len(names) if live is None else known["params"]
            for key, name, param in zip(group["params"], names, params, strict=True):
                if source["state"].get(key):
                    policy = {"factoring": known["factoring"]} if "factoring" in known else {}
                    told = {**groups[number], **policy}  # a callable is not among the hyperparameters
                    parameters.append(reader.read(name, source["state"][key], number, told, param))
    module = adafactor if format == OUR_TORCH else torch
    version = module.__version__ if live is not None else ""
    return State(tuple(parameters), tuple(groups), "torch", format, str(version))


def _read_group(format: str, group: Mapping[str, Any], report: Report) -> dict[str, Any]:
    told = in_our_words(format, {name: _plain(value) for name, value in group.items()}, report.note)
    if callable(told.get("factoring")):
        del told["factoring"]
    return told


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


@dataclass(frozen=True, slots=True)
class _Reader:
    """What is the same for all parameters of a state dict; the attributes are those of :func:`read`."""

    format: str
    report: Report
    shapes: Shapes | None
    axes: Axes | None

    def read(
        self, name: str, values: Mapping[str, Any], number: int, group: Mapping[str, Any], param: Tensor | None
    ) -> Parameter:
        """One parameter of group ``number``, from what its writer keeps of it."""
        dialect, plain = FORMATS[self.format], ("step", "RMS")
        for key, value in values.items():
            if not isinstance(value, Tensor) and key not in plain:
                self.report.dropped(key, [name], "it is no tensor")
        slots = {
            dialect.slots.get(key, key): _array(value)
            for key, value in values.items()
            if isinstance(value, Tensor) and key not in plain
        }
        shape = tuple(self.shapes[name]) if self.shapes is not None and name in self.shapes else None
        shape = slots["momentum"].shape if shape is None and "momentum" in slots else shape
        shape = tuple(param.shape) if param is not None else shape
        if dialect.keeps_axes and "row" in slots:
            row, column = slots["row"].shape, slots["column"].shape
            shape = tuple(m if n == 1 else n for n, m in zip(row, column, strict=True))
            assert dialect.axes is not None
            theirs = dialect.axes(shape, 0)
            slots["row"], slots["column"] = slots["row"].squeeze(theirs.columns), slots["column"].squeeze(theirs.rows)
        for slot in STATISTICS:
            if slot in slots and slots[slot].dtype != np.float64:
                slots[slot] = slots[slot].astype(np.float32)
        statistics: dict[str, Shape] = {slot: slots[slot].shape for slot in STATISTICS if slot in slots}
        if not statistics:
            raise ValueError(f"{name} has no statistics")
        layout = roles(name, statistics, self._choosers(name, group), shape=shape, axes=self.axes)
        rms = float(values["RMS"]) if "RMS" in values else None
        dtype = None
        if param is not None:
            dtype = str(param.dtype).removeprefix("torch.")
            whole = param.full_tensor() if hasattr(param, "full_tensor") else param
            rms = rms_of(whole.detach().cpu().double().numpy())
        return rows_first(Parameter(name, layout, slots, _count(values["step"], name), dtype, number, rms))

    def _choosers(self, name: str, group: Mapping[str, Any]) -> list[Chooser]:
        """What may have chosen the axes. That they are factored is known."""
        chosen = FORMATS[self.format].axes
        if chosen is not None:
            sides = {group.get("min_dim_size_to_factor", 0), 0}
            return [lambda shape, least=least: chosen(shape, least) for least in sides]  # type: ignore[misc]
        policy = group.get("factoring")
        if callable(policy):
            return [partial(factoring.layout, factoring=policy, name=name)]
        return [partial(factoring.layout, factoring=policy)] if policy in POLICIES else []


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
        names: see :mod:`adafactor.convert.names`.
        report: receives what changed.

    Raises:
        Refused: the template does not fit.
    """
    report = Report() if report is None else report
    groups = None if template is None else _template(template, format)
    target: dict[str, Shape | None] | None = None
    if groups is not None:
        listed = [name for group in groups for name in group.get("param_names") or map(str, group["params"])]
        target = dict.fromkeys(listed)
    state = rename(state, names, target, "torch", report, partial=True)
    state = adapt.momentum_as(state, format, report)
    if groups is None:
        groups = _own_groups(state, format)
    saved: dict[int, dict[str, Any]] = {}
    known = state.named()
    for group in groups:
        listed = group.get("param_names") or [str(key) for key in group["params"]]
        members = [known[name] for name in listed if name in known]
        sources = {parameter.group for parameter in members}
        if len(sources) > 1:
            report.note(
                f"one group of the target has parameters of {len(sources)} groups of the source: it follows the first"
            )
        if members:
            told = state.groups[members[0].group]
            wanted = _choose(format, group, told, members)
            _write_group(format, group, told, report)
            if format == OUR_TORCH and isinstance(wanted, tuple):
                group["factoring"], group["min_dim_size_to_factor"] = wanted
                if callable(wanted[0]):
                    del group["factoring"]  # code does not belong in a state dict: the optimizer that loads has it
        if group.get("beta1"):
            report.dropped("Momentum", [p.name for p in members if p.momentum is None], adapt.STARTS)
        for key, name in zip(group["params"], listed, strict=True):
            if name in known:
                layout = (
                    last_two(known[name].shape)
                    if format != OUR_TORCH
                    else factoring.layout(known[name].shape, *wanted, name=name)
                )
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
        defaults = _defaults(format)
        keys = list(range(position, position + len(members)))
        position += len(members)
        if not all(name.isdecimal() for name in members):
            defaults["param_names"] = members
        groups.append({**defaults, "params": keys})
        if "param_names" not in defaults and members != [str(key) for key in keys]:
            groups[-1]["param_names"] = members
    return groups


def _defaults(format: str) -> dict[str, Any]:
    if format == TRANSFORMERS:
        return dict(_TRANSFORMERS_GROUP)
    from adafactor.torch import Adafactor

    make: Any = Adafactor if format == OUR_TORCH else torch.optim.Adafactor
    group = dict(make([torch.zeros(1)]).param_groups[0])
    del group["params"]
    return group


def _choose(format: str, group: Mapping[str, Any], told: Mapping[str, Any], members: list[Parameter]) -> Any:
    """``factoring`` and least side for a group of ours: what keeps the statistics as they are, if anything does."""
    if format != OUR_TORCH:
        return None
    if callable(group["factoring"]):
        return group["factoring"], group["min_dim_size_to_factor"]
    first = (
        told.get("factoring", group["factoring"]),
        told.get("min_dim_size_to_factor", group["min_dim_size_to_factor"]),
    )
    least = {first[1], group["min_dim_size_to_factor"], 1, 2, 128}
    tried = [first, *((policy, side) for policy in POLICIES for side in sorted(least))]
    if "factoring" in told and told.get("factoring") not in POLICIES:
        tried = tried[1:]
    for policy, side in tried:
        if all(factoring.layout(parameter.shape, policy, side) == parameter.layout for parameter in members):
            return policy, side
    return tried[0]


def _write_group(format: str, group: dict[str, Any], told: Mapping[str, Any], report: Report) -> None:
    """Set a group's hyperparameters as far as the state knows them; what it does not know stays."""
    own = adapt.in_its_words(format, told, report)
    if own.get("relative_step") == "always":
        own["relative_step"] = True
    if "momentum_dtype" in own:
        own["momentum_dtype"] = _dtype(own["momentum_dtype"])
    for word in ("factoring", "min_dim_size_to_factor"):
        own.pop(word, None)  # as the statistics are
    if not isinstance(own.get("lr", 0.0), int | float):
        report.note(f"the learning rate {own.pop('lr')!r} is no number: set one")
    if own.get("weight_decay", 0) is None:
        own["weight_decay"] = 0.0
    if format == TORCH and own.get("d", 1.0) is None:
        own["d"] = math.inf
    if format == TRANSFORMERS:
        if own.get("clip_threshold", 1.0) is None:
            own["clip_threshold"] = math.inf
        if own.get("relative_step"):
            if own.get("lr") == 1e-2:
                own["lr"] = None
            else:
                report.note(f"transformers caps a learning rate of 0.01 only, not {own.get('lr')}: it is not capped")
                own["relative_step"] = False
    first, second = own.pop("eps[0]", group["eps"][0]), own.pop("eps[1]", group["eps"][1])
    if format == TORCH and first is not None and first > NO_FLOOR:
        report.note(
            f"torch.optim takes epsilon_1={first} for a floor under the second moment instead of adding it to g²"
        )
    group.update(own)
    group["eps"] = (first, second)


def _dtype(name: Any) -> Any:
    """A dtype by its name; what is no dtype's name stays."""
    return getattr(torch, name, name) if isinstance(name, str) else name


def _write_one(parameter: Parameter, format: str, report: Report) -> dict[str, Any]:
    values = dict(parameter.slots)
    if FORMATS[format].keeps_axes and "row" in values:
        values["row"], values["column"] = values["row"][..., None], values["column"][..., None, :]
    if format == TRANSFORMERS and "momentum" in values:
        values["momentum"] = values["momentum"].astype(np.float32)
    if format == TORCH:
        if parameter.count > 1 << 24:
            report.note(
                f"torch.optim counts in float32: {parameter.count} updates become {int(np.float32(parameter.count))}",
                lossy=True,
            )
        step: Any = torch.tensor(float(parameter.count), dtype=torch.float32)
    else:
        step = parameter.count if format == TRANSFORMERS else torch.tensor(parameter.count, dtype=torch.int64)
    theirs = {slot: word for word, slot in FORMATS[format].slots.items()}
    named = {theirs.get(name, name): _tensor(value) for name, value in values.items()}
    # transformers takes RMS anew before it uses it.
    return {"step": step, **named, **({"RMS": parameter.rms or 0} if format == TRANSFORMERS else {})}


def save(content: Mapping[str, Any], path: PathLike) -> None:
    """A ``.pt`` file, there whole or not at all."""
    with replacing(path) as new:
        torch.save(content, new)


__all__ = ["FORMATS", "find", "format_of", "load", "read", "save", "write"]
