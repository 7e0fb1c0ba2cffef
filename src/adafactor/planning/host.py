"""`adafactor.torch.HostStep`: what lies on the host, what crosses the bus, and how long that must take."""

from __future__ import annotations

from dataclasses import dataclass

from adafactor.planning.optimizers import Adafactor
from adafactor.planning.usage import Plan

WAITING = 8  # gradients that wait on the device, besides the one that is on its way


@dataclass(frozen=True, slots=True)
class Host:
    """One way of stepping on the host, in bytes and seconds.

    Attributes:
        label: what the table calls it.
        device: weights, and as many of the largest gradients as may be there.
        host: weights and state, and room for the largest gradient.
        bus: gradients down and weights up, in one step, each.
        seconds: of one step, from the two bandwidths: copies and step follow one another.
    """

    label: str
    device: int
    host: int
    bus: int
    seconds: float


def on_host(plan: Plan, bus: float, memory: float) -> tuple[Host, ...]:
    """The rows for a bus and a host's memory of so many bytes a second (the bus each way).

    The kernels read a gradient twice, and read and write a weight; a master of another dtype is rounded on the way up.
    """
    each = sorted((p.nbytes for p in plan.trained), reverse=True)
    own, room, state = sum(each), max(each, default=0), Adafactor().state(plan.trained)
    device = sum(p.nbytes for p in plan.parameters) + sum(each[: WAITING + 1])
    masters = {"float32 masters": 4 * plan.size, "the weights' own dtype": own}
    if own == 4 * plan.size:
        del masters["the weights' own dtype"]

    def host(label: str, master: int) -> Host:
        traffic = 3 * own + 3 * master + (2 * own if master != own else 0)
        return Host(f"HostStep, {label}", device, master + state + room, own, own * 2 / bus + traffic / memory)

    return tuple(host(*each) for each in masters.items())
