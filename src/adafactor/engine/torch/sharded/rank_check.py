"""Whether all ranks of a group are about to add up the same things: asked once, before the first sum.

Ranks that disagree would add one tensor's sums to another's, or wait for each other for ever.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import zip_longest

import torch
import torch.distributed as dist

from adafactor.core.errors import message


def check(
    descriptions: Sequence[str], group: dist.ProcessGroup, device: torch.device, what: str = "sharded parameter"
) -> None:
    """Compare a digest of fixed size, and where it differs find out in which parameter.

    Args:
        descriptions: one line per parameter; what follows a tab is told only where the rest is the same.
        what: what errors call them.

    Raises:
        RuntimeError: on every rank of the group, with the first parameter that is not the same everywhere.
    """
    digest = hashlib.sha256("\n".join(descriptions).encode()).digest()
    mine = torch.tensor([int.from_bytes(digest[:7], "big")], device=device)
    everyone = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(everyone, mine, group=group)
    if all(torch.equal(mine, other) for other in everyone):
        return
    listed: list[list[str]] = [[] for _ in everyone]
    dist.all_gather_object(listed, list(descriptions), group=group)
    ranks = dist.get_process_group_ranks(group)
    for number, full in enumerate(zip_longest(*listed, fillvalue="no such parameter")):
        if len(set(full)) > 1:
            short = [line.split("\t")[0] for line in full]
            lines = short if len(set(short)) > 1 else [line.replace("\t", "") for line in full]
            other = next(k for k, line in enumerate(lines) if line != lines[0])
            got = f"{lines[0]} on rank {ranks[0]} and {lines[other]} on rank {ranks[other]}"
            remedy = "Build the model and the optimizer alike on all ranks."
            raise RuntimeError(message(f"{what} {number}", "the same on all ranks", _Plain(got), remedy))


class _Plain(str):
    def __repr__(self) -> str:
        return str(self)
