"""Checkpoints of PyTorch's world, brought into a live optimizer; ``core/dialects.py`` has what each writer calls what.

What is accepted fits the layout: kernels take the addresses of these tensors. Momentum that other writers average after
the learning rate is divided by the last step size, which is exact while that was constant.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adafactor.core.dialects import FORMATS, OUR_TORCH, in_our_words, step_size
from adafactor.core.errors import Refused, message
from adafactor.core.factoring import POLICIES, Layout, Shape
from adafactor.core.untrusted import reading
from adafactor.engine.torch import int8
from adafactor.engine.torch.checks import recoded, write
from adafactor.engine.torch.sharded import spans_of
from adafactor.engine.torch.work import Group, Settings, Work, is_sharded, slot_dtype, whole_of
from adafactor.torch.arguments import layout_of, translate
from adafactor.torch.writers import recognise

if TYPE_CHECKING:
    from adafactor.engine.torch.sharded.flat import Spans
    from adafactor.engine.torch.sharded.held import Sharded

Words = dict[str, Any]  # a group
State = dict[str, Any]
Notes = dict[str, None]  # sentences, each once, in order


@dataclass(frozen=True, slots=True, eq=False)
class Uncast:
    """A tensor that torch's load_state_dict cannot see, or it would cast it to the parameter's dtype."""

    tensor: Tensor


@dataclass(frozen=True, slots=True)
class _Target:
    """What a parameter's state must fit.

    Attributes:
        param: the parameter.
        name: what errors call it.
        group: its group, in our words, as it will be.
    """

    param: Tensor
    name: str
    group: Words

    @property
    def layout(self) -> Layout:
        return layout_of(self.group, tuple(self.param.shape), self.name)

    def refused(self, slot: str, rule: str, got: object, remedy: str = "Save the checkpoint again.") -> Refused:
        return Refused(message(f"{slot} of {self.name}", rule, got, remedy))


@torch.no_grad()
def gather(state: dict[Any, State], flat: Mapping[int, Sharded]) -> None:
    """Put ``statistics``, the same bytes on all ranks, in the place of what this rank has of flat parameters.

    What FSDP and ZeRO carry from one number of ranks to another are tensors of the parameter's shape, and what is no
    tensor. A collective.
    """
    from adafactor.engine.torch.sharded import flat_state

    for (key, param), wholes in zip(flat.items(), flat_state.gather(list(flat.values())), strict=True):
        if wholes and key in state:
            encoded = io.BytesIO()
            torch.save(wholes, encoded)
            kept = {slot: value for slot, value in state[key].items() if slot not in flat_state.gathered(param)}
            state[key] = {**kept, "statistics": encoded.getvalue()}


@torch.no_grad()
def read(state_dict: Mapping[str, Any], groups: Sequence[Words], notes: Notes) -> dict[str, Any]:
    """A ``state_dict`` in our words, its tensors copied to where the parameters are, and ``Uncast``.

    Args:
        state_dict: of any optimizer that ``core/dialects.py`` knows; not modified.
        groups: the groups of the optimizer that loads it, for parameters and for arguments the file has not.
        notes: receives one sentence for everything that cannot carry over as it was.

    Raises:
        Refused, TypeError, ValueError: another optimizer wrote it, a hyperparameter is out of range, or a tensor is not
            what the parameter's layout asks for.
    """
    known = isinstance(state_dict.get("param_groups"), list) and isinstance(state_dict.get("state"), Mapping)
    if not known or not all(isinstance(group, Mapping) and "params" in group for group in state_dict["param_groups"]):
        remedy = "Pass what optimizer.state_dict() gave; a whole checkpoint holds it under a name of its own."
        got = ", ".join(map(str, list(state_dict)[:5])) or "nothing"
        raise Refused(message("the state dict", "a mapping with state and param_groups", got, remedy))
    saved, state = state_dict["param_groups"], dict(state_dict["state"])
    writers = [recognise([state.get(key) or {} for key in group["params"]], group) for group in saved]
    if [len(group["params"]) for group in saved] != [len(group["params"]) for group in groups]:
        return dict(state_dict)  # torch has a sentence for that
    read_groups = []
    for old, group, writer in zip(saved, groups, writers, strict=True):
        told: Mapping[str, Any] = {}
        if writer != OUR_TORCH:
            with reading("a group of the checkpoint", f"one of {writer}"):
                told = in_our_words(writer, old, lambda note: notes.setdefault(f"{note}."))
        new = {**{name: value for name, value in group.items() if name != "params"}, **_group(writer, old, told)}
        names = new.get("param_names") or [f"parameter {key}" for key in old["params"]]
        if len(names) != len(old["params"]):
            rule = f"{len(old['params'])}, one for each of its params"
            raise Refused(message("param_names of a group", rule, len(names), "Save the checkpoint again."))
        members = [
            (key, _Target(param, str(name), new))
            for key, param, name in zip(old["params"], group["params"], names, strict=True)
            if state.get(key) and param.numel()
        ]
        if writer != OUR_TORCH:
            _note(writer, told, notes)
            _choose(writer, told, [(target, state[key]) for key, target in members], new)
        settings = translate(new)
        for key, target in members:
            state[key] = _state(_renamed(writer, state[key], told, target, notes), target, settings)
        read_groups.append(new)
    return {**state_dict, "state": state, "param_groups": read_groups}


def _group(writer: str, old: Words, told: Mapping[str, Any]) -> Words:
    """A group's arguments in our words; what the file does not know is left out."""
    if writer == OUR_TORCH:
        return {**old, **({"eps": tuple(old["eps"])} if isinstance(old.get("eps"), list) else {})}
    theirs = {word.partition("[")[0] for word in FORMATS[writer].words} | FORMATS[writer].others
    new = {name: value for name, value in old.items() if name not in theirs}
    new |= {word: told[ours] for word, ours in FORMATS[OUR_TORCH].words.items() if ours in told}
    new["eps"] = (new.pop("eps[0]"), new.pop("eps[1]", 1e-3))
    if new["relative_step"] == "always":
        new["relative_step"] = True
    return new


def _note(writer: str, told: Mapping[str, Any], notes: Notes) -> None:
    varies = told["relative_step"] or told["scale_parameter"]
    by = {"step": varies and "the step size and the parameter's scale", "nothing": "nothing"}
    if told.get("weight_decay") and by.get(told["weight_decay_of"]):
        notes.setdefault(
            f"{writer} multiplied weight_decay by {by[told['weight_decay_of']]}, here lr alone multiplies it: choose "
            "weight_decay anew."
        )
    if told.get("decay_offset"):
        notes.setdefault(f"{writer}'s decay_offset={told['decay_offset']} does not carry over.")


def _choose(writer: str, told: Mapping[str, Any], members: Sequence[tuple[_Target, State]], group: Words) -> None:
    """Set the group's ``factoring`` to what keeps the statistics as they are: its own, or a policy that does."""
    wanted = [(target, _their_layout(writer, told, target, values)) for target, values in members]
    least = (group["min_dim_size_to_factor"], told.get("min_dim_size_to_factor", 1), 1)
    own = (group["factoring"], group["min_dim_size_to_factor"])
    tried = [own, *((policy, side) for side in least for policy in POLICIES if not callable(own[0]))]
    for group["factoring"], group["min_dim_size_to_factor"] in tried:
        if all(_axes(target.layout) == _axes(theirs) for target, theirs in wanted):
            return
    group["factoring"], group["min_dim_size_to_factor"] = own
    target, theirs = next((target, theirs) for target, theirs in wanted if _axes(target.layout) != _axes(theirs))
    rule = f"{_axes(theirs) or 'none'}, over which {writer} factored it"
    remedy = "Pass a factoring that says so, a callable (name, shape) -> Factored, to the constructor."
    raise target.refused("the factored axes", rule, _axes(target.layout) or "none", remedy)


def _axes(layout: Layout) -> list[Shape]:
    """Rows and columns, the earlier first; of an unfactored parameter nothing."""
    return sorted((layout.rows, layout.columns)) if layout.factored else []


def _their_layout(writer: str, told: Mapping[str, Any], target: _Target, values: State) -> Layout:
    """What the writer factored a parameter over; whether it did, its state tells."""
    shape, dialect = tuple(target.param.shape), FORMATS[writer]
    if dialect.axes is None or any(dialect.slots.get(key) == "second_moment" for key in values):
        return Layout(shape, (), ())
    theirs = dialect.axes(shape, told.get("min_dim_size_to_factor", 0))
    return theirs if theirs.factored else dialect.axes(shape, 0)


def _renamed(writer: str, saved: State, told: Mapping[str, Any], target: _Target, notes: Notes) -> State:
    """One parameter's state by our names, with our momentum, and statistics without axes of length 1."""
    if writer == OUR_TORCH:
        return dict(saved)
    dialect, roles, shape = FORMATS[writer], target.layout, tuple(target.param.shape)
    theirs = _their_layout(writer, told, target, saved)
    turned = {"row": "column", "column": "row"} if theirs.rows > theirs.columns else {}
    values = {dialect.slots.get(key, key): value for key, value in saved.items() if key != "RMS"}
    values = {turned.get(slot, slot): value for slot, value in values.items()}
    if dialect.keeps_axes:
        for slot, gone in (("row", roles.columns), ("column", roles.rows)):
            value = values.get(slot)
            kept = tuple(1 if axis in gone else n for axis, n in enumerate(shape))
            if isinstance(value, Tensor) and slot in roles.slots:
                if tuple(value.shape) != kept:
                    raise target.refused(slot, f"of shape {kept}", tuple(value.shape))
                values[slot] = value.reshape(roles.slots[slot])
    if dialect.momentum_of == "step" and isinstance(values.get("momentum"), Tensor):
        values["momentum"] = _momentum(writer, saved, told, target, notes)
    return values


def _momentum(writer: str, saved: State, told: Mapping[str, Any], target: _Target, notes: Notes) -> Tensor:
    """An average of steps, divided by the last step size."""
    rate = told["learning_rate"]
    number = {**told, "learning_rate": rate.item() if isinstance(rate, Tensor) else rate}
    rms = saved.get("RMS")
    if isinstance(rms, Tensor) and (rms.is_meta or rms.numel() != 1):
        raise target.refused("RMS", "a number", f"a tensor of shape {tuple(rms.shape)} on {rms.device}")
    alpha, constant = step_size(number, _count(saved.get("step"), target), None if rms is None else float(rms))
    if alpha is None:
        notes.setdefault(
            f"The momentum of {writer} holds step sizes that the checkpoint does not tell: it starts at zero."
        )
    elif not constant:
        notes.setdefault(
            f"The momentum of {writer} holds past step sizes, which were not constant: divided by the last one, it "
            "carries over approximately."
        )
    average: Tensor = saved["exp_avg"].to(torch.float32)
    return average / alpha if alpha else torch.zeros_like(average)


def _state(values: State, target: _Target, settings: Settings) -> State:
    """One parameter's state as the kernels need it. Other keys stay, for torch to treat as it does."""
    param = target.param
    if (spans := spans_of(param)) is not None:
        return _flat(values, target, spans, settings)
    roles, shape = target.layout, tuple(param.shape)
    if "statistics" in values:
        values = {**values, **_statistics(values, target, 1)[0]}
        del values["statistics"]
    if not set(values) & {"step", *roles.slots, "row", "column", "second_moment"}:
        return values  # of a wrapper alone
    if {"row", "column", "second_moment"} & set(values) != set(roles.slots):
        needs = " and ".join(f"{slot} {shape}" for slot, shape in roles.slots.items())
        had = ", ".join(f"{slot} {_shape(value)}" for slot, value in values.items() if slot != "step")
        raise Refused(
            f"{target.name} of shape {shape} needs the statistics {needs}, got {had or 'none'}. "
            "Construct the optimizer with the checkpoint's factoring."
        )
    coded = settings.momentum_dtype == torch.int8 and not is_sharded(param)
    shapes = {**roles.slots, "momentum": shape, "residual": shape}
    if coded:
        shapes["momentum_scale"] = (int8.scales(param.numel()),)
    if "momentum_scale" in values and "momentum" not in values:
        raise target.refused("momentum", "there beside momentum_scale", "none")
    if "momentum" in values:
        for slot, of in (("momentum", shape), ("momentum_scale", (int8.scales(param.numel()),))):
            if slot in values:
                values[slot] = _checked(values[slot], of, slot, target)
        if values["momentum"].dtype == torch.int8 and "momentum_scale" not in values:
            raise target.refused("momentum_scale", "there beside 8-bit momentum", "none")
        write(values, recoded(values, roles, coded, target.name))
    wanted = {s: (of, slot_dtype(s, settings, param.dtype)) for s, of in shapes.items() if s in values}
    if "master" in values:  # of HostStep
        wanted["master"] = (shape, _checked(values["master"], shape, "master", target).dtype)
    read: State = {**values, "step": Uncast(_step(values.get("step"), target))}
    for slot, (of, stored) in wanted.items():
        value = _checked(values[slot], of, slot, target)
        if is_sharded(param):
            from adafactor.engine.torch.sharded.dtensor import adopt

            read[slot] = Uncast(adopt(value, param, roles, slot, stored))  # type: ignore[arg-type]
        elif of == shape and slot not in roles.slots and stored != torch.int8:
            read[slot] = Uncast(torch.empty_like(param, dtype=stored, memory_format=torch.preserve_format).copy_(value))
        else:
            read[slot] = Uncast(torch.empty(of, dtype=stored, device=param.device).copy_(value))
    return read


def _statistics(values: State, target: _Target, tensors: int) -> list[State]:
    """What `gather` has written of so many tensors."""
    with reading("statistics of the checkpoint", target.name):
        states: list[State] = torch.load(io.BytesIO(values["statistics"]), map_location="cpu", weights_only=True)
    if len(states) != tensors:
        remedy = "Wrap the model as it was when it was saved."
        raise target.refused("statistics", f"of {tensors} tensors", len(states), remedy)
    return states


def _flat(values: State, target: _Target, spans: Spans, settings: Settings) -> State:
    """The same of a flat parameter, of whose tensors this rank takes its intervals."""
    from adafactor.engine.torch.sharded import flat, flat_state

    group = Group(settings, target.group["lr"])
    draft = Work(target.param, {}, Layout((), (), ()), group, 0, None, target.name)
    fresh = flat.sharded(draft, spans, partial(layout_of, target.group), {})
    read: State = {slot: value for slot, value in values.items() if slot not in (*fresh.state, "statistics")}
    if "statistics" not in values:
        remedy = "Save with the optimizer's own state_dict(), on all ranks."
        raise target.refused("state", "with the statistics of whole tensors", sorted(values), remedy)
    wholes = _statistics(values, target, len(spans.spans))
    for whole in wholes:
        whole["step"] = _step(values.get("step", whole.get("step")), target)
    try:
        read |= {slot: Uncast(value) for slot, value in flat_state.cut(fresh, wholes).items()}
    except ValueError as error:
        remedy = "Construct the optimizer with the checkpoint's factoring."
        raise target.refused("statistics", str(error), "others", remedy) from None
    for slot in ("momentum", "residual"):
        if slot in values and slot in fresh.state:
            like = fresh.state[slot]
            read[slot] = Uncast(torch.empty_like(like).copy_(_checked(values[slot], tuple(like.shape), slot, target)))
    return read


def _checked(value: Any, shape: Shape, slot: str, target: _Target) -> Tensor:
    """A tensor of a checkpoint, whole unless its parameter is sharded.

    Raises:
        Refused: it is no dense tensor of real numbers and of that shape, or has no data.
    """
    if not isinstance(value, Tensor):
        raise target.refused(slot, "a tensor", type(value).__name__)
    if tuple(value.shape) != shape:
        raise target.refused(slot, f"of shape {shape}", tuple(value.shape))
    real = value.is_floating_point() or (value.dtype == torch.int8 and slot == "momentum")
    if not real or value.layout != torch.strided or value.is_quantized:
        raise target.refused(slot, "a dense tensor of floating point numbers", f"{value.dtype}, {value.layout}")
    if value.is_meta and not target.param.is_meta:
        raise target.refused(slot, "a tensor with data", "one on the meta device", "Load it with map_location='cpu'.")
    checked: Tensor = value if is_sharded(target.param) else whole_of(value)
    return checked


def _step(value: Any, target: _Target) -> Tensor:
    device = target.param.device
    if isinstance(value, Tensor) and value.is_meta and target.param.is_meta:
        return torch.zeros((), dtype=torch.int64, device=device)
    return torch.tensor(_count(value, target), dtype=torch.int64, device=device)


def _count(value: Any, target: _Target) -> int:
    """The updates made.

    Raises:
        Refused: it is no whole number.
    """
    rule, got = "a whole number >= 0 and < 2**63", value
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_meta or value.is_complex():
            raise target.refused("step", rule, f"{value.dtype} of shape {tuple(value.shape)} on {value.device}")
        got = value = whole_of(value).item()
    if isinstance(value, bool) or not isinstance(value, int | float) or not float(value).is_integer():
        raise target.refused("step", rule, got)
    if not 0 <= value < 1 << 63:
        raise target.refused("step", rule, got)
    return int(value)


def _shape(value: Any) -> object:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
