"""A plan as text for people and as JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from adafactor import __version__
from adafactor.cli.terminal import table
from adafactor.planning import Plan, Usage, on_host
from adafactor.planning.optimizers import Adafactor


def size(count: float) -> str:
    """Bytes in decimal units with three digits: ``13.5 GB``."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 999.5 or unit == "TB":
            break
        count /= 1000
    if unit == "B":
        return f"{count:.0f} B"
    return f"{count:,.{0 if abs(count) >= 99.95 else 1 if abs(count) >= 9.995 else 2}f} {unit}"


def text(name: str, plan: Plan, card: int | None, top: int, host: Sequence[int] | None = None) -> str:
    """What stands on the terminal."""
    return "\n\n".join([title(name, plan), _usages(plan, card), *_hosts(plan, host), *_top(plan, top), _notes(plan)])


def json_text(name: str, plan: Plan, card: int | None, top: int, host: Sequence[int] | None = None) -> str:
    """The same figures, in bytes and seconds."""
    data = {
        "adafactor": __version__,
        "model": name,
        "parameters": plan.size,
        "tensors": len(plan.parameters),
        "trained_tensors": len(plan.trained),
        "dtypes": _dtypes(plan),
        "shards": plan.shards,
        "zero": plan.zero,
        "gpu_memory": card,
        "activations": "not included",
        "host": [asdict(each) for each in on_host(plan, *host)] if host else [],
        "optimizers": [_usage(plan, usage, card) for usage in plan.usages],
        "largest": [
            {"name": p.name, "shape": p.shape, "dtype": p.dtype, "bytes": p.nbytes, "trained": p.trained}
            for p in plan.top(top)
        ],
    }
    return json.dumps(data, indent=1)


def _usage(plan: Plan, usage: Usage, card: int | None) -> dict[str, Any]:
    return {
        "name": usage.optimizer.label,
        "weights": usage.weights,
        "gradients": usage.gradients,
        "state": usage.state,
        "temporaries": usage.temporaries,
        "total": usage.total,
        "state_bytes_per_parameter": plan.shards * usage.state / plan.size if plan.size else 0.0,
        "fits": None if card is None else usage.total <= card,
    }


def _hosts(plan: Plan, speeds: Sequence[int] | None) -> list[str]:
    """What a step on the host takes; the card has all of the model."""
    if not speeds:
        return []
    bus, memory = speeds
    step = f"step at {size(bus)}/s, {size(memory)}/s"
    header = ["on the host", "device memory", "host memory", "bus, each way", step]
    rows = [
        [each.label, size(each.device), size(each.host), size(each.bus), f"{each.seconds:.3g} s"]
        for each in on_host(plan, bus, memory)
    ]
    return [table(header, rows)]


def _dtypes(plan: Plan) -> list[str]:
    return sorted({p.dtype for p in plan.parameters})


def title(name: str, plan: Plan) -> str:
    """What is planned, in a line."""
    shared = "" if plan.shards == 1 else f", FSDP2 over {plan.shards} ranks: the first rank's part"
    if plan.zero:
        shared = f", ZeRO stage {plan.zero} over {plan.shards} ranks: the part of the one that keeps most"
    dtypes = " and ".join(_dtypes(plan))
    return f"{name}: {plan.size:,} parameters in {len(plan.trained):,} tensors, {dtypes}{shared}"


def _usages(plan: Plan, card: int | None) -> str:
    header = ["", "weights", "gradients", "state", "temporaries", "total"]
    if card is not None:
        header.append(f"of {size(card)}")
    rows = []
    for usage in plan.usages:
        temporaries = "not known" if usage.temporaries is None else size(usage.temporaries)
        cells = [size(usage.weights), size(usage.gradients), size(usage.state), temporaries, size(usage.total)]
        if card is not None:
            left = card - usage.total
            cells.append(f"{size(left)} left" if left >= 0 else f"{size(-left)} too much")
        rows.append([usage.optimizer.label, *cells])
    return table(header, rows)


def _top(plan: Plan, count: int) -> list[str]:
    largest = plan.top(count)
    if not largest:
        return []
    optimizers = [usage.optimizer for usage in plan.usages]
    ours = next(one for one in optimizers if isinstance(one, Adafactor))
    chosen = [optimizers[0], ours]
    shards = 1 if plan.zero else plan.shards  # a partition of ZeRO's has any part of it
    rows = []
    for p in largest:
        shape = " x ".join(map(str, p.shape)) or "scalar"
        kept = [size(sum(one.slots(p, shards).values())) if p.trained else "not trained" for one in chosen]
        rows.append([p.name, shape, p.dtype, size(p.local(shards).nbytes), *kept])
    states = [f"state, {one.label}" for one in chosen]
    return [table(["the largest tensors", "shape", "dtype", "weights", *states], rows)]


def _notes(plan: Plan) -> str:
    lines = ["Activations are not included: they depend on batch, sequence length and checkpointing."]
    still = [p for p in plan.parameters if not p.trained]
    if still:
        held = size(sum(p.local(plan.shards).nbytes for p in still))
        lines.append(f"{len(still):,} tensors of {held} are not trained: no gradient, no state.")
    if plan.zero:
        lines.append("Nor are ZeRO's buckets. Weights are the model's and the float32 partition of a rank.")
    elif plan.shards > 1:
        gathered = size(plan.gathered)
        lines.append(f"Nor is what FSDP2 gathers while a layer computes: {gathered} of weights, as much of gradients.")
    return "\n".join(lines)
