"""Parameter groups as they were when they were looked at, and what they say of each of their parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from adafactor.core.errors import message
from adafactor.core.factoring import Layout
from adafactor.engine.torch.work import Group, Work
from adafactor.torch.arguments import layout_of

if TYPE_CHECKING:
    from adafactor.engine.torch.sharded.flat import Spans
    from adafactor.engine.torch.sharded.held import Sharded

Place = tuple[int, int]  # group, and position in the group
Positions = Sequence[tuple[int, Sequence[int] | None]]  # in groups, by number; None is all of a group


@dataclass(slots=True, eq=False)
class Members:
    """A parameter group as it was when it was looked at.

    Attributes:
        number: the group's; ``first``: the place of its first parameter among all.
        words: the group as its user gives it, and its ``values``, to see whether they have changed.
        group: the same in the engine's words.
        params: its parameters; ``places``: of each, this object and its position; ``sharded``: if any is a DTensor.
    """

    number: int
    first: int
    words: Mapping[str, Any]
    values: tuple[object, ...]
    group: Group
    params: list[Tensor]
    places: list[tuple[Members, int]] = field(default_factory=list)
    sharded: bool = False

    def given_name(self, position: int) -> str:
        """The name that the user gave a parameter, if any."""
        names = self.words.get("param_names") or ()
        return str(names[position]) if len(names) == len(self.params) else ""

    def name(self, position: int) -> str:
        """What errors call a parameter."""
        return self.given_name(position) or f"parameter {self.first + position}"

    def draft(self, position: int) -> Work:
        """All of a parameter's work but its state and diagnostics."""
        param = self.params[position]
        if self.words["capturable"] and param.device.type == "cpu":
            remedy = "A graph captures what runs on an accelerator; leave it out."
            raise RuntimeError(message("capturable", "False for cpu tensors", True, remedy))
        return self._work(position, layout_of(self.words, tuple(param.shape), self.given_name(position)))

    def flat(self, position: int, spans: Spans, state: Mapping[str, Any], diagnostics: Tensor | None = None) -> Sharded:
        """A flat parameter's work."""
        from adafactor.engine.torch.sharded import flat

        draft = self._work(position, Layout((), (), ()), diagnostics)
        return flat.sharded(draft, spans, partial(layout_of, self.words), state)

    def _work(self, position: int, layout: Layout, diagnostics: Tensor | None = None) -> Work:
        stream, name = self.first + position, self.name(position)
        return Work(self.params[position], {}, layout, self.group, stream, diagnostics, name)


@dataclass(slots=True, eq=False)
class Chosen:
    """Parameters to update: their places in groups, and their gradients, of a shard its local one.

    With None those that have no gradient: sharded ones, for other ranks may have one, and those that had one before.
    """

    params: list[Tensor]
    places: list[tuple[Members, int]]
    grads: list[Any]

    def keep(self, places: Sequence[int]) -> None:
        """Drop all but these."""
        self.params = [self.params[k] for k in places]
        self.places = [self.places[k] for k in places]
        self.grads = [self.grads[k] for k in places]
