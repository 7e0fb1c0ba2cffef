"""How much of the step on the host hides behind the backward pass: python benchmarks/host_step.py

One core for the backward pass, one for the native kernels. The device is another set of CPU tensors, and what crosses
the bus is copied in memory. Two answers: the clock's, least of many turns, which needs two idle cores; and what the
threads' CPU times make of it, medians, wherever they had to wait for others: job k ends at max(end of job k - 1, when
its gradient was ready) + its time, and what ends after the backward pass is not hidden.
"""

from __future__ import annotations

import argparse
import time
from statistics import median
from typing import Any

import torch
from torch import nn

from adafactor.torch import Adafactor, HostStep, step_in_backward

KINDS = ("backward alone", "then the step, without a host", "then HostStep", "HostStep in backward")


def timed(host: HostStep) -> tuple[list[float], list[float]]:
    """Has a host note the main thread's CPU time when it takes a gradient, and its own for each."""
    ready: list[float] = []
    spent: list[float] = []
    take, step = host.take, host._step

    def noted_take(positions: Any) -> None:
        ready.append(time.thread_time())
        take(positions)

    def noted_step(*arguments: Any) -> None:
        start = time.thread_time()
        step(*arguments)
        spent.append(time.thread_time() - start)

    host.take, host._step = noted_take, noted_step  # type: ignore[method-assign]
    return ready, spent


def measure(layers: int, width: int, rows: int, turns: int) -> dict[str, float]:
    torch.set_num_threads(1)
    nets, steps, hosts = [], [], []
    for kind in KINDS:
        torch.manual_seed(0)
        net = nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(layers)])
        optimizer = Adafactor(net.parameters(), lr=1e-3)
        host = HostStep(net, optimizer, threads=1) if "HostStep" in kind else None
        handle = step_in_backward(net, optimizer) if kind == KINDS[3] else None
        nets.append(net)
        hosts.append((host, handle))
        steps.append({KINDS[0]: lambda: None, KINDS[3]: host.wait if host else None}.get(kind) or optimizer.step)
    host = hosts[3][0]
    assert host is not None
    ready, spent = timed(host)
    clock: dict[str, list[float]] = {kind: [] for kind in KINDS}
    shares, backwards, jobs = [], [], []
    batch = torch.randn(rows, width)
    for _ in range(turns):
        for kind, net, step in zip(KINDS, nets, steps, strict=True):
            net.zero_grad()
            loss = net(batch).square().mean()
            start, cpu = time.perf_counter(), time.thread_time()
            ready.clear()
            spent.clear()
            loss.backward()
            ended = time.thread_time()
            step()
            clock[kind].append(time.perf_counter() - start)
        end = cpu
        for at, its in zip(ready, spent, strict=True):
            end = max(end, at) + its
        shares.append(1 - max(0.0, end - ended) / sum(spent))
        backwards.append(ended - cpu)
        jobs.append(sum(spent))
    found = {f"{kind}, ms": 1e3 * min(times) for kind, times in clock.items()}
    alone, _, after, inside = (min(times) for times in clock.values())
    found["hidden by the clock, %"] = 100 * (1 - (inside - alone) / (after - alone))
    found["backward, CPU ms"], found["copies and step, CPU ms"] = 1e3 * median(backwards), 1e3 * median(jobs)
    found["hidden by CPU times, %"] = 100 * median(shares)
    held = host.host_bytes
    found["host bytes per parameter"] = (held["weights"] + held["state"]) / (layers * width**2)
    found["room for one gradient, MB"] = held["room"] / 1e6
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("layers", 8), ("width", 1536), ("rows", 128), ("turns", 20)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, value in measure(**vars(parser.parse_args())).items():
        print(f"{name:38}{value:10.3f}")


if __name__ == "__main__":
    main()
