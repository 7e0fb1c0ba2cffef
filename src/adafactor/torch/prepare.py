"""From groups, gradients and state to what backends take: checked, complete, and kept while nothing moves.

A step asks which parameters have a gradient, and looks up what the last step with the same ones has prepared. Only
where something has changed is everything looked at again, and all of it before the first tensor is written.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from operator import is_
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from adafactor.core.errors import message
from adafactor.core.factoring import Layout, Shape, layout
from adafactor.engine.torch import checks, choose, cuda
from adafactor.engine.torch.choose import Plan
from adafactor.engine.torch.sharded import spans_of
from adafactor.engine.torch.work import Group, Work, is_sharded, new_diagnostics
from adafactor.torch.arguments import STRUCTURE, check_lr, translate, values_of

if TYPE_CHECKING:
    from adafactor.engine.torch.sharded.flat import FlatParam, Spans
    from adafactor.engine.torch.sharded.flat_step import FlatStep
    from adafactor.engine.torch.sharded.reducer import Reducer
    from adafactor.engine.torch.sharded.shard import Shard

# Which parameters have a gradient varies little from step to step: what is derived from a list is kept, for lists that
# together are so many times as long as all parameters. One parameter at a time is a list each.
LISTS = 8

Positions = Sequence[tuple[int, Sequence[int] | None]]  # in groups, by number; None is all of a group

T = TypeVar("T")
_grad_of: Any = Tensor.grad.__get__  # type: ignore[union-attr]


@dataclass(slots=True, eq=False)
class Members:
    """A parameter group as it was when it was looked at.

    Attributes:
        number: the group's; ``first``: the place of its first parameter among all.
        params: its parameters; ``places``: of each, this object and its position; ``sharded``: if any is a DTensor.
        values: the group's words.
        group: the same in the engine's words.
    """

    number: int
    first: int
    params: list[Tensor]
    values: tuple[object, ...]
    group: Group
    places: list[tuple[Members, int]] = field(default_factory=list)
    sharded: bool = False


@dataclass(slots=True, eq=False)
class Chosen:
    """Parameters to update: their places in groups, and their gradients, of a shard its local one.

    Sharded parameters without a gradient too, with None: other ranks may have one.
    """

    params: list[Tensor]
    places: list[tuple[Members, int]]
    grads: list[Any]


@dataclass(slots=True, eq=False)
class Prepared:
    """What updates a list of parameters.

    Attributes:
        plan: of the whole tensors, ``at`` these places of the list; None for all of them.
        shards: of DTensors, ``shards_at`` these places, with a plan of their own and the sums they need.
        flat: of flat parameters.
        summed: what their settings said of sums when these were prepared.
        fresh: whether no tensor had state before.
    """

    plan: Plan | None
    at: list[int] | None
    shards: list[Shard]
    shards_at: list[int]
    shard_plan: Plan | None
    reducers: list[Reducer]
    flat: FlatStep | None
    summed: list[tuple[bool, bool]]
    fresh: bool

    def current(self, grads: Sequence[Any], state: Mapping[Tensor, dict[str, Any]], dense: bool) -> bool:
        """Whether nothing has moved since it was prepared; ``dense``: and all gradients are as backends like them."""
        if self.plan is not None:
            here = self.grads(grads)
            if self.plan.witness.moved() or not self.plan.owns(state) or (dense and not self.plan.witness.fits(here)):
                return False
        if self.summed and self.summed != _summed(self.shards, self.flat):
            return False
        if self.flat is not None and not self.flat.current(grads, state, dense):
            return False
        if self.shard_plan is not None:
            if self.shard_plan.witness.moved() or not all(s.current(state.get(s.param, {})) for s in self.shards):
                return False
            here = [grads[k] for k in self.shards_at]
            return not dense or (not any(map(is_, here, [None] * len(here))) and self.shard_plan.witness.fits(here))
        return True

    def grads(self, grads: Sequence[Any]) -> Sequence[Tensor]:
        """The gradients of the whole tensors."""
        return grads if self.at is None else [grads[k] for k in self.at]

    def step(
        self,
        grads: Sequence[Any],
        state: Mapping[Tensor, dict[str, Any]],
        skipped: Callable[[torch.device], Tensor],
    ) -> None:
        """One update of everything."""
        for plan in (self.plan, self.shard_plan):
            if plan is not None:
                plan.check()
        if self.shard_plan is not None:
            from adafactor.engine.torch.sharded import shard, step

            locals_ = [grads[k] for k in self.shards_at]
            present = [grad is not None for grad in locals_]
            params = self.shard_plan.work
            filled = [shard.absent(w.param) if g is None else g for w, g in zip(params, locals_, strict=True)]
            absent = step.step(self.shard_plan, filled, present, self.reducers, skipped)
            for k, its in enumerate(self.shards):
                if k not in absent:
                    state[its.param].update(its.state)
        if self.flat is not None:
            self.flat.step(grads, state, skipped)
        if self.plan is not None:
            self.plan.step(self.grads(grads), skipped)


class _Kept(dict[tuple[object, ...], T]):
    """By list of parameters: a model whose list changes every step must not fill the memory."""

    length = 0

    def keep(self, key: tuple[object, ...], value: T, length: int, all_together: int) -> None:
        self.length += length
        if self.length > LISTS * all_together:
            self.clear()
            self.length = length
        self[key] = value


class Preparation:
    """What steps of one optimizer have prepared."""

    def __init__(self) -> None:
        self._given: list[weakref.ref[Tensor]] = []
        self.clear()

    def clear(self) -> None:
        """Forget everything that was derived."""
        self._members: dict[int, Members] = {}
        self._offsets: list[int] = []
        self._every: tuple[list[Members], list[Tensor], list[tuple[Members, int]]] = ([], [], [])
        self._prepared: _Kept[Prepared] = _Kept()
        self._reducers: _Kept[list[Reducer]] = _Kept()
        self._agreed: set[tuple[object, ...]] = set()

    def given(self, params: Iterable[Tensor]) -> None:
        """Note parameters that the user has given."""
        self._given += map(weakref.ref, params)

    def collect(self, groups: list[dict[str, Any]], positions: Positions) -> Chosen:
        """What has a gradient."""
        members = [self._members_of(groups, number) for number, _ in positions]
        if any(its is not None for _, its in positions):
            places = [
                place
                for each, (_, its) in zip(members, positions, strict=True)
                for place in (each.places if its is None else [each.places[k] for k in its])
            ]
            params = [each.params[k] for each, k in places]
        else:
            before, params, places = self._every
            if len(members) != len(before) or not all(map(is_, members, before)):
                params = [param for each in members for param in each.params]
                places = [place for each in members for place in each.places]
                self._every = members, params, places
        grads = list(map(_grad_of, params))
        if any(map(is_, grads, [None] * len(grads))):
            kept = [k for k, g in enumerate(grads) if g is not None or _may_be_elsewhere(params[k])]
            params, places, grads = ([of[k] for k in kept] for of in (params, places, grads))  # type: ignore[assignment]
        if any(each.sharded for each in members):
            from adafactor.engine.torch.sharded.shard import gradient

            for k, (param, (each, position)) in enumerate(zip(params, places, strict=True)):
                if is_sharded(param):
                    grads[k] = gradient(param, called(groups, each, position))  # type: ignore[arg-type]
        return Chosen(params, places, grads)

    def alone(self, groups: list[dict[str, Any]], place: tuple[int, int], grad: Tensor) -> Chosen:
        """One parameter and a gradient for it, which may be of another dtype than ``.grad`` can."""
        members = self._members_of(groups, place[0])
        return Chosen([members.params[place[1]]], [members.places[place[1]]], [grad])

    def prepared(
        self,
        groups: list[dict[str, Any]],
        state: Any,
        chosen: Chosen,
        recorded: Callable[[Tensor, Layout], Tensor | None],
    ) -> Prepared:
        """What updates a list of parameters: what there is, as long as nothing it knows has moved.

        Args:
            groups, state: the optimizer's.
            chosen: what `collect` gave.
            recorded: gives the tensor for a parameter's diagnostics.

        Raises:
            RuntimeError, TypeError, ValueError: a parameter, its gradient or its state does not fit.
        """
        grads = chosen.grads
        key: tuple[object, ...] = tuple(map(id, chosen.params))
        prepared = self._prepared.get(key)
        if prepared is not None and prepared.current(grads, state, dense=True):
            return prepared
        for (members, k), param, grad in zip(chosen.places, chosen.params, grads, strict=True):
            if grad is not None and param.numel():
                local = param.to_local() if is_sharded(param) else param  # type: ignore[attr-defined]
                checks.check_gradient(local, grad, called(groups, members, k))
        # Gradients that fit, but not every kernel: another list for each pattern of them.
        pattern = tuple([grad is not None and grad.is_contiguous() and checks.has_memory(grad) for grad in grads])
        if not all(pattern):
            prepared = self._prepared.get((key, pattern))
            if prepared is not None and prepared.current(grads, state, dense=False):
                return prepared
        made = self._prepare(groups, state, chosen, recorded)
        self._prepared.keep(key if all(pattern) else (key, pattern), made, len(grads), self._offsets[-1])
        return made

    def _members_of(self, groups: list[dict[str, Any]], number: int) -> Members:
        """A group as of this step: its words are checked when they change, the learning rate every time."""
        group, known = groups[number], self._members.get(number)
        params, values, lr = group["params"], values_of(group), group["lr"]
        if known is not None and len(params) == len(known.params) and all(map(is_, params, known.params)):
            if values == known.values:
                check_lr(lr)
                known.group.lr = lr
                return known
            if values[: len(STRUCTURE)] == known.values[: len(STRUCTURE)]:
                known.group.settings, known.group.lr, known.values = translate(group), lr, values
                return known
        settings = translate(group)
        if known is not None or len(self._offsets) != len(groups) + 1:
            self.clear()
            self._offsets = [0, *accumulate(len(each["params"]) for each in groups)]
        self._prepared.clear()  # what was prepared for earlier Members would follow their learning rates
        made = Members(number, self._offsets[number], list(params), values, Group(settings, lr))
        made.places = [(made, k) for k in range(len(params))]
        made.sharded = any(map(is_sharded, params))
        self._members[number] = made
        return made

    def _prepare(
        self,
        groups: list[dict[str, Any]],
        state: Any,
        chosen: Chosen,
        recorded: Callable[[Tensor, Layout], Tensor | None],
    ) -> Prepared:
        """Check everything, complete the state, and choose backends."""
        grads = chosen.grads
        drafts: list[Work] = []
        at: list[int] = []
        shards: list[Shard] = []
        shards_at: list[int] = []
        flat: list[FlatParam] = []
        flat_at: list[int] = []
        seen: set[int] = set()
        for place, (param, (members, k)) in enumerate(zip(chosen.params, chosen.places, strict=True)):
            spans = spans_of(param)
            if id(param) in seen or not (param.numel() or spans):  # a parameter that is listed twice is updated once
                continue
            seen.add(id(param))
            if spans is not None:
                checks.check_param(param, called(groups, members, k))
                choose.check(members.group.settings.fused, param.device)
                diagnostics = recorded(param, Layout((), (), ())) if len(spans.spans) == 1 else None
                flat.append(flat_of(groups, (members, k), spans, state.get(param, {}), diagnostics))
                flat_at.append(place)
                continue
            draft = draft_of(groups, members, k)
            if is_sharded(param):
                from adafactor.engine.torch.sharded.shard import shard_of

                its = shard_of(param, draft.layout, draft, state.get(param, {}), recorded)  # type: ignore[arg-type]
                if grads[place] is None and not its.placement.dims:
                    continue
                choose.check(draft.settings.fused, its.work.param.device)
                shards.append(its)
                shards_at.append(place)
            else:
                checks.check_param(param, draft.name)
                self._check_origin(param)
                choose.check(draft.settings.fused, param.device)
                drafts.append(replace(draft, diagnostics=recorded(param, draft.layout)))
                at.append(place)
        changes = [checks.fit(w.param, w.layout, w.settings, state.get(w.param, {}), w.name) for w in drafts]
        if cuda.is_capturing() and any(changes):
            remedy = "Call step once before the capture, so that no replay makes the state anew."
            raise RuntimeError(message("the state of a captured step", "complete", "none for some parameters", remedy))
        written = [{**state.get(w.param, {}), **changed} for w, changed in zip(drafts, changes, strict=True)]
        checks.check_apart(
            [
                *(
                    (w.param, {slot: held[slot] for slot in w.slots}, w.name)
                    for w, held in zip(drafts, written, strict=True)
                ),
                *((its.work.param, its.work.state, its.work.name) for its in shards),
                *((its.param, its.state, its.draft.name) for its in flat),
            ]
        )
        reducers = self._reducers_of(shards)
        flat_step = self._flat_step(flat, flat_at, grads) if flat else None
        for w, changed in zip(drafts, changes, strict=True):
            checks.write(state[w.param], changed)
        work = [replace(w, state=state[w.param]) for w in drafts]
        plan = Plan(work, [grads[k] for k in at]) if work else None
        shard_plan = None
        if shards:
            from adafactor.engine.torch.sharded.shard import absent

            local = [
                absent(s.work.param) if grads[k] is None else grads[k] for s, k in zip(shards, shards_at, strict=True)
            ]
            shard_plan = Plan([its.work for its in shards], local)
        fresh = bool(drafts) and not shards and not flat and all("step" in changed for changed in changes)
        some, summed = at if len(at) < len(grads) else None, _summed(shards, flat_step)
        return Prepared(plan, some, shards, shards_at, shard_plan, reducers, flat_step, summed, fresh)

    def _reducers_of(self, shards: list[Shard]) -> list[Reducer]:
        """Who adds up what: asked of all ranks at the same time, hence not again because something moved here."""
        if not shards:
            return []
        scaled = tuple(its.work.settings.hyperparameters.scale_parameter for its in shards)
        key = (tuple(id(its.param) for its in shards), scaled)
        if key not in self._reducers:
            from adafactor.engine.torch.sharded.reducer import reducers

            self._reducers.keep(key, reducers(shards), len(shards), self._offsets[-1])
        return self._reducers[key]

    def _flat_step(self, params: list[FlatParam], at: list[int], grads: list[Any]) -> FlatStep:
        """What updates flat parameters. Ranks compare it at the same time, hence not again because something moved."""
        from adafactor.engine.torch.sharded.flat_step import FlatStep

        made = FlatStep(params, at, grads)
        key = tuple((id(its.param), its.draft.settings.hyperparameters.scale_parameter) for its in params)
        if key not in self._agreed:
            made.agree()
            self._agreed.add(key)
        return made

    def flat_params(self, groups: list[dict[str, Any]], state: Mapping[Tensor, dict[str, Any]]) -> dict[int, FlatParam]:
        """The flat parameters among all, by their numbers."""
        found: dict[int, FlatParam] = {}
        for number, group in enumerate(groups):
            for k, param in enumerate(group["params"]):
                if (spans := spans_of(param)) is not None:
                    members = self._members_of(groups, number)
                    found[members.first + k] = flat_of(groups, (members, k), spans, state.get(param, {}))
        return found

    def _check_origin(self, param: Tensor) -> None:
        """Refuse flat pieces of which nobody records what they hold.

        The parameters themselves tell: ZeRO ties what it partitions to its partition.
        """
        rule = "a tensor with the rows and columns of its layer"
        if checks.is_flat(param) and param.dim() == 1:  # NO_SHARD leaves the others whole
            remedy = "Use fully_shard (FSDP2), or a FullyShardedDataParallel of contiguous parameters that is there."
            got = f"a flat shard of FSDP1 with shape {tuple(param.shape)}"
            raise RuntimeError(message("a parameter", rule, got, remedy))
        if param.dim() != 1 or "deepspeed" not in sys.modules:
            return
        given = [known for ref in self._given if (known := ref()) is not None]
        if any(known is param for known in given):
            return
        if any(hasattr(known, name) for known in given for name in ("_hp_mapping", "ds_id")):
            remedy = "Use ZeRO stage 1, 2 or 3, or fully_shard (FSDP2); docs/sharding.md shows how."
            got = f"a flat partition of DeepSpeed ZeRO with shape {tuple(param.shape)}"
            raise RuntimeError(message("a parameter", rule, got, remedy))


def _summed(shards: Sequence[Shard], flat: FlatStep | None) -> list[tuple[bool, bool]]:
    """Of sharded parameters what decides what ranks add up, and may change from step to step."""
    settings = [its.work.settings for its in shards] + [its.draft.settings for its in (flat.params if flat else ())]
    return [(its.hyperparameters.scale_parameter, its.skip_nonfinite) for its in settings]


def _may_be_elsewhere(param: Tensor) -> bool:
    """Whether a parameter without a gradient may have one on another rank."""
    return param.requires_grad and ((is_sharded(param) and bool(param.numel())) or spans_of(param) is not None)


def called(groups: list[dict[str, Any]], members: Members, position: int) -> str:
    """What errors call a parameter."""
    names = groups[members.number].get("param_names")
    return (
        str(names[position]) if names and len(names) == len(members.params) else f"parameter {members.first + position}"
    )


def draft_of(groups: list[dict[str, Any]], members: Members, k: int) -> Work:
    """All of a parameter's work but its state and diagnostics."""
    param, group = members.params[k], groups[members.number]
    if group["capturable"] and param.device.type == "cpu":
        remedy = "A graph captures what runs on an accelerator; leave it out."
        raise RuntimeError(message("capturable", "False for cpu tensors", True, remedy))
    names = group.get("param_names") if len(group.get("param_names", ())) == len(members.params) else None
    its_layout = layout_of(group, tuple(param.shape), str(names[k]) if names else "")
    return Work(param, {}, its_layout, members.group, members.first + k, None, called(groups, members, k))


def flat_of(
    groups: list[dict[str, Any]],
    place: tuple[Members, int],
    spans: Spans,
    state: Mapping[str, Any],
    diagnostics: Tensor | None = None,
) -> FlatParam:
    """A flat parameter's work."""
    from adafactor.engine.torch.sharded.flat import flat_param

    members, k = place
    name = called(groups, members, k)
    draft = Work(members.params[k], {}, Layout((), (), ()), members.group, members.first + k, diagnostics, name)
    return flat_param(draft, spans, partial(layout_of, groups[members.number]), state)


def layout_of(group: Mapping[str, Any], shape: Shape, name: str) -> Layout:
    """The layout of a tensor of a group."""
    return layout(shape, group["factoring"], group["min_dim_size_to_factor"], name=name)


def diagnostics_of(recorded: dict[Tensor, Tensor] | None, param: Tensor, its_layout: Layout) -> Tensor | None:
    """The tensor in which a parameter's diagnostics are recorded, if they are."""
    if recorded is None:
        return None
    slices = new_diagnostics(its_layout, param.device)
    if param not in recorded or recorded[param].shape != slices.shape or recorded[param].device != slices.device:
        recorded[param] = slices
    return recorded[param]
