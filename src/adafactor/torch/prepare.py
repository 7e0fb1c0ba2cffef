"""From groups, gradients and state to what backends take: checked, complete, and kept while nothing moves.

A step asks which parameters have a gradient, and looks up what the last step with the same ones has prepared. Only
where something has changed is everything looked at again, and all of it before the first tensor is written.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, repeat
from operator import is_
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from adafactor.core.errors import message
from adafactor.core.factoring import Layout
from adafactor.engine.torch import accelerator, checks, choose
from adafactor.engine.torch.choose import Plan
from adafactor.engine.torch.sharded import check_origin, spans_of
from adafactor.engine.torch.work import Group, Work, is_sharded, local_of, new_diagnostics
from adafactor.torch.arguments import STRUCTURE, check_lr, translate, values_of
from adafactor.torch.members import Chosen, Members, Place, Positions

if TYPE_CHECKING:
    from adafactor.engine.torch.sharded.held import Sharded
    from adafactor.engine.torch.sharded.step import ShardedStep

# Which parameters have a gradient varies little from step to step: what is derived from a list is kept, for lists that
# together are so many times as long as all parameters. One parameter at a time is a list each.
LISTS = 8

T = TypeVar("T")
Recorded = dict[Tensor, Tensor] | None  # the tensors of parameters' diagnostics, if they are asked for
_grad_of: Any = Tensor.grad.__get__  # type: ignore[union-attr]


@dataclass(slots=True, eq=False)
class Prepared:
    """What updates a list of parameters.

    Attributes:
        plan: of the whole tensors, ``at`` these places of the list; None for all of them.
        sharded: of DTensors and of flat parameters, where there are some.
        fresh: whether no tensor had state before.
    """

    plan: Plan | None
    at: list[int] | None
    sharded: ShardedStep | None
    fresh: bool

    def current(self, grads: Sequence[Any], state: Mapping[Tensor, dict[str, Any]], dense: bool) -> bool:
        """Whether nothing has moved since it was prepared; ``dense``: and all gradients are as backends like them."""
        if self.plan is not None:
            if self.plan.witness.moved() or not self.plan.owns(state):
                return False
            if dense and not self.plan.witness.fits(self.grads(grads)):
                return False
        return self.sharded is None or self.sharded.current(grads, state, dense)

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
        if self.sharded is not None:
            self.sharded.check()
            if self.plan is not None:
                self.plan.check()
            self.sharded.step(grads, state, skipped)
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
        self._agreed: _Kept[bool] = _Kept()
        self._stepped: set[int] = set()  # whole tensors that were prepared, by id

    def given(self, params: Iterable[Tensor]) -> None:
        """Note parameters that the user has given."""
        self._given += map(weakref.ref, params)

    def collect(self, groups: list[dict[str, Any]], positions: Positions, absent: bool = False) -> Chosen:
        """What has a gradient; ``absent``: of groups as a whole also what had one before."""
        members = [self.members(groups, number) for number, _ in positions]
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
        chosen = Chosen(params, places, list(map(_grad_of, params)))
        if any(map(is_, chosen.grads, repeat(None))):
            stepped = self._stepped if absent and all(its is None for _, its in positions) else ()
            chosen.keep(
                [
                    k
                    for k, (param, grad) in enumerate(zip(params, chosen.grads, strict=True))
                    if grad is not None or id(param) in stepped or _may_be_elsewhere(param)
                ]
            )
        if any(each.sharded for each in members):
            from adafactor.engine.torch.sharded.dtensor import gradient

            for k, (param, (each, position)) in enumerate(zip(chosen.params, chosen.places, strict=True)):
                if is_sharded(param):
                    chosen.grads[k] = gradient(param, each.name(position))  # type: ignore[arg-type]
        return chosen

    def alone(self, groups: list[dict[str, Any]], place: Place, grad: Tensor) -> Chosen:
        """One parameter and a gradient for it, which may be of another dtype than ``.grad`` can."""
        members = self.members(groups, place[0])
        return Chosen([members.params[place[1]]], [members.places[place[1]]], [grad])

    def prepared(self, state: Any, chosen: Chosen, recorded: Recorded) -> Prepared:
        """What updates a list of parameters: what there is, as long as nothing it knows has moved.

        Args:
            state: the optimizer's.
            chosen: what `collect` gave.
            recorded: of parameters' diagnostics, completed.

        Raises:
            RuntimeError, TypeError, ValueError: a parameter, its gradient or its state does not fit.
        """
        absent = self._absent(chosen, state)
        grads = chosen.grads

        def without() -> Prepared:  # something was edited, maybe what is none of this step's business
            self._stepped.difference_update(id(chosen.params[k]) for k in absent)
            chosen.keep([k for k in range(len(grads)) if k not in absent])
            return self.prepared(state, chosen, recorded)

        key: tuple[object, ...] = tuple(map(id, chosen.params))
        prepared = self._prepared.get(key)
        if prepared is not None and prepared.current(grads, state, dense=True):
            return prepared
        if absent and prepared is not None:
            return without()
        for (members, k), param, grad in zip(chosen.places, chosen.params, grads, strict=True):
            if grad is not None and param.numel():
                checks.check_gradient(local_of(param), grad, members.name(k))
        # Gradients that fit, but not every kernel: another list for each pattern of them.
        pattern = tuple(
            [
                k in absent or (grad is not None and grad.is_contiguous() and checks.has_memory(grad))
                for k, grad in enumerate(grads)
            ]
        )
        if not all(pattern):
            prepared = self._prepared.get((key, pattern))
            if prepared is not None and prepared.current(grads, state, dense=False):
                return prepared
        try:
            made = self._prepare(state, chosen, partial(_diagnostics_of, recorded))
        except (RuntimeError, TypeError, ValueError):
            if not absent:
                raise
            return without()
        self._prepared.keep(key if all(pattern) else (key, pattern), made, len(grads), self._offsets[-1])
        return made

    def _absent(self, chosen: Chosen, state: Mapping[Tensor, Any]) -> set[int]:
        """The places of those that had a gradient before and have none now: one list serves all patterns.

        Those whose state was taken away since are dropped.
        """
        if not any(map(is_, chosen.grads, repeat(None))):
            return set()
        pairs = list(enumerate(zip(chosen.params, chosen.grads, strict=True)))
        absent = {k for k, (param, grad) in pairs if grad is None and id(param) in self._stepped}
        if not all(state.get(chosen.params[k]) for k in absent):
            chosen.keep([k for k, (param, _) in pairs if k not in absent or state.get(param)])
            return self._absent(chosen, state)
        return absent

    def members(self, groups: list[dict[str, Any]], number: int) -> Members:
        """A group as of this step: its words are checked when they change, the learning rate every time."""
        group, known = groups[number], self._members.get(number)
        params, values, lr = group["params"], values_of(group), group["lr"]
        if known is not None and len(params) == len(known.params) and all(map(is_, params, known.params)):
            if values == known.values:
                check_lr(lr)
                known.group.lr, known.words = lr, group
                return known
            if values[: len(STRUCTURE)] == known.values[: len(STRUCTURE)]:
                known.group.settings, known.group.lr = translate(group), lr
                known.words, known.values = group, values
                return known
        settings = translate(group)
        if known is not None or len(self._offsets) != len(groups) + 1:
            self.clear()
            self._offsets = [0, *accumulate(len(each["params"]) for each in groups)]
        self._prepared.clear()  # what was prepared for earlier Members would follow their learning rates
        made = Members(number, self._offsets[number], group, values, Group(settings, lr), list(params))
        made.places = [(made, k) for k in range(len(params))]
        made.sharded = any(map(is_sharded, params))
        self._members[number] = made
        return made

    def _prepare(
        self, state: Any, chosen: Chosen, diagnostics_of: Callable[[Tensor, Layout], Tensor | None]
    ) -> Prepared:
        """Check everything, complete the state, and choose backends."""
        grads = chosen.grads
        drafts: list[Work] = []
        at: list[int] = []
        sharded: list[Sharded] = []
        sharded_at: list[int] = []
        seen: set[int] = set()
        for place, (param, (members, k)) in enumerate(zip(chosen.params, chosen.places, strict=True)):
            spans = spans_of(param)
            if id(param) in seen or not (param.numel() or spans):  # a parameter that is listed twice is updated once
                continue
            seen.add(id(param))
            if not is_sharded(param):
                checks.check_param(param, members.name(k))
            choose.check(members.group.settings.fused, param.device)
            if spans is None and not is_sharded(param):
                check_origin(param, self._given)
                draft = members.draft(k)
                drafts.append(replace(draft, diagnostics=diagnostics_of(param, draft.layout)))
                at.append(place)
                continue
            if spans is not None:
                diagnostics = diagnostics_of(param, Layout((), (), ())) if len(spans.spans) == 1 else None
                its = members.flat(k, spans, state.get(param, {}), diagnostics)
            else:
                from adafactor.engine.torch.sharded import dtensor

                its = dtensor.sharded(param, members.draft(k), state.get(param, {}), diagnostics_of)  # type: ignore[arg-type]
            if grads[place] is not None or its.is_split:
                sharded.append(its)
                sharded_at.append(place)
        changes = [checks.fit(w.param, w.layout, w.settings, state.get(w.param, {}), w.name) for w in drafts]
        if accelerator.is_capturing() and any(changes):
            remedy = "Call step once before the capture, so that no replay makes the state anew."
            raise RuntimeError(message("the state of a captured step", "complete", "none for some parameters", remedy))
        written = [{**state.get(w.param, {}), **changed} for w, changed in zip(drafts, changes, strict=True)]
        checks.check_apart(
            [
                *(
                    (w.param, {slot: held[slot] for slot in w.slots}, w.name)
                    for w, held in zip(drafts, written, strict=True)
                ),
                *((its.param, its.state, its.draft.name) for its in sharded),
            ]
        )
        step = self._sharded_step(sharded, sharded_at, grads, state) if sharded else None
        for w, changed in zip(drafts, changes, strict=True):
            checks.write(state[w.param], changed)
        work = [replace(w, state=state[w.param]) for w in drafts]
        if step is None:
            self._stepped.update(id(w.param) for w in drafts)
        plan = Plan(work, [grads[k] for k in at]) if work else None
        fresh = bool(drafts) and step is None and all("step" in changed for changed in changes)
        return Prepared(plan, at if len(at) < len(grads) else None, step, fresh)

    def _sharded_step(self, params: list[Sharded], at: list[int], grads: list[Any], state: Any) -> ShardedStep:
        """What updates sharded parameters. Ranks compare it all at once, hence not again because something moved."""
        from adafactor.engine.torch.sharded.step import ShardedStep

        made = ShardedStep(params, at, grads, state)
        key = tuple((id(its.draft.param), its.draft.settings.hyperparameters.scale_parameter) for its in params)
        if key not in self._agreed:
            for reducer in made.reducers:
                reducer.agree()
            self._agreed.keep(key, True, len(params), self._offsets[-1])
        return made

    def flat_params(self, groups: list[dict[str, Any]], state: Mapping[Tensor, dict[str, Any]]) -> dict[int, Sharded]:
        """The flat parameters among all, by their numbers."""
        flat: dict[int, Sharded] = {}
        for number, group in enumerate(groups):
            for k, param in enumerate(group["params"]):
                if (spans := spans_of(param)) is not None:
                    members = self.members(groups, number)
                    flat[members.first + k] = members.flat(k, spans, state.get(param, {}))
        return flat


def _may_be_elsewhere(param: Tensor) -> bool:
    """Whether a parameter without a gradient may have one on another rank."""
    return param.requires_grad and ((is_sharded(param) and bool(param.numel())) or spans_of(param) is not None)


def _diagnostics_of(recorded: Recorded, param: Tensor, layout: Layout) -> Tensor | None:
    """The tensor in which a parameter's diagnostics are recorded, if they are."""
    if recorded is None:
        return None
    slices = new_diagnostics(layout, param.device)
    if param not in recorded or recorded[param].shape != slices.shape or recorded[param].device != slices.device:
        recorded[param] = slices
    return recorded[param]
