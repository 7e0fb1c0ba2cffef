"""What a conversion did to every parameter, and what did not carry over: said, never assumed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Change:
    """What became of one parameter's second moment.

    Attributes:
        name: of the parameter, in the target.
        how: ``"kept"``, the same numbers; ``"means"``, means of the source's numbers, exactly what the target would
            have kept itself; ``"rebuilt"``, taken from row × column / mean, because the source had not kept it.
        estimate_change: how far the estimate of the second moment moved, ‖new - old‖ / ‖old‖ over the parameter.
    """

    name: str
    how: str
    estimate_change: float = 0.0

    @property
    def exact(self) -> bool:
        return self.how != "rebuilt"


@dataclass(slots=True)
class Report:
    """One ``Change`` per parameter; ``notes`` on what was lost or differs, and ``advice`` on what to do. Each once.

    Attributes:
        changes: in the target's order.
        said: sentences on what differs.
        lost: names of parameters, by what of them was lost and why.
        advice: sentences on what is left to do.
        complete: nothing of the state was lost, rounded or approximated.
    """

    changes: list[Change] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    lost: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    advice: list[str] = field(default_factory=list)
    complete: bool = True

    @property
    def exact(self) -> bool:
        """Whether the target has the state that it would have reached itself. Hyperparameters are another matter."""
        return self.complete and all(change.exact for change in self.changes)

    @property
    def notes(self) -> list[str]:
        """Everything that differs or was lost, a sentence each."""
        return [
            *self.said,
            *(f"{what} of {some(names)} did not carry over: {why}" for (what, why), names in self.lost.items()),
        ]

    def note(self, sentence: str, *, lossy: bool = False) -> None:
        """Add a sentence; ``lossy`` where the state itself is not carried over exactly."""
        self.complete = self.complete and not lossy
        if sentence not in self.said:
            self.said.append(sentence)

    def advise(self, sentence: str) -> None:
        """Add a sentence on what is left to do."""
        if sentence not in self.advice:
            self.advice.append(sentence)

    def dropped(self, what: str, names: Iterable[str], why: str) -> None:
        """Say what parameters lost; those that lost the same share a sentence."""
        for name in names:
            self.complete = False
            self.lost.setdefault((what, why), []).append(name)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for ``--report``."""
        return {
            "exact": self.exact,
            "notes": self.notes,
            "advice": self.advice,
            "parameters": [asdict(change) for change in self.changes],
        }

    def text(self) -> str:
        """A few lines for a terminal."""
        lines = []
        for how, words in (
            ("kept", "as they were"),
            ("means", "by means, exactly what the target would have kept"),
            ("rebuilt", "rebuilt from the estimate row * column / mean, NOT what the target would have kept"),
        ):
            changes = [change for change in self.changes if change.how == how]
            if changes:
                lines.append(f"  {len(changes)} parameters: {words}")
            for change in changes:
                if change.how != "kept" and len(lines) < 30:
                    moved = change.estimate_change
                    lines.append(f"    {change.name}: the estimate of the second moment moved by {moved:.2g}")
        return "\n".join(
            [*lines, *(f"  note: {note}." for note in self.notes), *(f"  {advice}." for advice in self.advice)]
        )


def some(names: Sequence[str]) -> str:
    """The first three names, and how many there are besides."""
    shown = ", ".join(names[:3]) or "none"
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
