"""What a CUDA device reaches: python benchmarks/gpu.py [--json FILE] [--only PART ...]

Measures steps with CUDA events, every optimizer taking turns with ours:

  - one Llama 7B layer, float32 and bfloat16, beside AdamW(fused=True), torch.optim.Adafactor(foreach=True) and
    transformers' Adafactor: ns per parameter, how many times as fast ours is, and for ours the bytes that the design
    moves, per second, over what copying a tensor reaches on this device
  - GPT-2 small and 1,000 LoRA matrices beside AdamW(fused=True), and the host's share of the time
  - launches of one step, that no step waits for the device, replays of a captured step with another learning rate
  - peak temporary memory of a step over the parameters' size

Runs from a checkout on a bare machine; every row is written to FILE, a line of JSON, as soon as it is known. The tests
that need a device are a command of their own:

    PYTHONPATH=src python -m pytest tests/engine/torch/test_gpu.py tests/engine/torch/test_triton.py

Without a CUDA device it says so and exits with 1.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))  # a bare machine has no installed package

import adafactor.torch
from adafactor.cli.bench import pytorch
from adafactor.cli.bench.shapes import GPT2_SMALL, LLAMA_LAYER, LORA, Shapes, parameters
from adafactor.cli.bench.timing import ratio, seconds, take_turns
from adafactor.engine.torch import accelerator

Tensors = list[torch.Tensor]
SLEEP = 2_000_000  # cycles, about a millisecond: the host is ahead of the device when the first kernel starts
OURS, ADAMW = "adafactor.torch.Adafactor", "torch.optim.AdamW(fused=True)"


def ours(params: Tensors, **options: Any) -> torch.optim.Optimizer:
    return adafactor.torch.Adafactor(params, lr=1e-3, fused=True, **options)


OPTIMIZERS: dict[str, Callable[[Tensors], torch.optim.Optimizer]] = {
    OURS: ours,
    f"{OURS}(stochastic_rounding)": lambda params: ours(params, stochastic_rounding=True),
    f"{OURS}(int8 momentum)": lambda params: ours(params, beta1=0.9, momentum_dtype=torch.int8),
    **{name: pytorch.OPTIMIZERS[name] for name in (ADAMW, "torch.optim.Adafactor(foreach=True)")},
    "transformers Adafactor": pytorch.OPTIMIZERS["transformers Adafactor"],
}


def made(name: str, shapes: Shapes, dtype: torch.dtype, gradients: Tensors) -> torch.optim.Optimizer:
    params = [torch.full(shape, 0.02, dtype=dtype, device="cuda").requires_grad_() for shape in shapes]
    for p, g in zip(params, gradients, strict=True):
        p.grad = g
    return OPTIMIZERS[name](params)


def device_seconds(run: Callable[[], object]) -> float:
    """The device's time for one run, which is queued while the device still sleeps."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(SLEEP)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def host_seconds(run: Callable[[], object]) -> float:
    """Until ``run`` returns, with an idle device."""
    torch.cuda.synchronize()
    return seconds(run)


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of copying 1 GB."""
    source = torch.empty(1 << 28, device="cuda")
    target = torch.empty_like(source)
    times = take_turns({"copy": lambda: target.copy_(source)}, 15, device_seconds)
    return 2 * source.numel() * 4 / statistics.median(times["copy"])


def mix(label: str, names: list[str], shapes: Shapes, dtype: torch.dtype, repeats: int, bandwidth: float) -> list[Any]:
    generator = torch.Generator("cuda").manual_seed(0)
    gradients = [torch.randn(s, generator=generator, device="cuda").to(dtype) for s in shapes]
    count = parameters(shapes)
    times = take_turns({name: made(name, shapes, dtype, gradients).step for name in names}, repeats, device_seconds)
    kind = str(dtype).removeprefix("torch.")
    print(f"\n{label}, {kind}, {count / 1e6:.1f} M parameters")
    print(f"{'':<44} {'ms':>9} {'ns/param':>9} {'ratio':>7} {'of copy':>8}")
    rows = []
    for name in names:
        taken, times_ours = statistics.median(times[name]), ratio(times, name, OURS)
        share = 4 * dtype.itemsize * count / taken / bandwidth if name == OURS else None
        shown = "" if share is None else f"{share:8.0%}"
        print(f"{name:<44} {taken * 1e3:9.3f} {taken * 1e9 / count:9.4f} {times_ours:7.2f} {shown}")
        rows.append(
            {"mix": label, "dtype": kind, "name": name, "ms": taken * 1e3, "ratio": times_ours, "of_copy": share}
        )
    return rows


def host_share(names: list[str], shapes: Shapes, dtype: torch.dtype) -> list[Any]:
    """Milliseconds until ``step`` returns, with an idle device."""
    gradients = [torch.ones(s, dtype=dtype, device="cuda") for s in shapes]
    times = take_turns({name: made(name, shapes, dtype, gradients).step for name in names}, 15, host_seconds)
    rows = [
        {"host": name, "tensors": len(shapes), "ms": 1e3 * statistics.median(taken)} for name, taken in times.items()
    ]
    for row in rows:
        print(f"{row['host']:<44} {row['ms']:9.3f} ms on the host for {len(shapes)} tensors", flush=True)
    return rows


def kernels(profile: Any) -> int:
    """Kernels in a profile, without copies and without the runtime's calls."""
    on_device = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not event.name.startswith(("Memcpy", "Memset")) for event in on_device)


def launches(shapes: Shapes) -> int:
    optimizer = made(OURS, shapes, torch.float32, [torch.ones(s, device="cuda") for s in shapes])
    optimizer.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        optimizer.step()
        torch.cuda.synchronize()
    return kernels(profile)


def waits(shapes: Shapes) -> str:
    """ "none", or what the first wait was."""
    optimizer = made(OURS, shapes, torch.float32, [torch.ones(s, device="cuda") for s in shapes])
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    except RuntimeError as error:
        return str(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "none"


def replay(shapes: Shapes) -> tuple[bool, float]:
    """Whether replays with other learning rates give the eager numbers, and milliseconds per replay."""
    ends = []
    used: list[Any] = []  # graphs and the gradients that they read
    taken = 0.0
    for captured in (True, False):
        params = [torch.full(s, 0.02, device="cuda").requires_grad_() for s in shapes]
        for p in params:
            p.grad = torch.ones_like(p)
        lr = torch.tensor(1e-2, device="cuda")
        optimizer = adafactor.torch.Adafactor(params, lr=lr, relative_step=False, fused=True, capturable=True)
        optimizer.step()
        torch.cuda.synchronize()
        run: Callable[[], object] = optimizer.step
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                optimizer.step()
            run = graph.replay
            used += [graph, [p.grad for p in params]]
        for rate in (1e-2, 1e-3, 1e-4):
            lr.fill_(rate)
            ms = 1e3 * device_seconds(run)
            taken = ms if captured else taken
        ends.append(params)
    return all(torch.equal(a, b) for a, b in zip(*ends, strict=True)), taken


def peak(shapes: Shapes, dtype: torch.dtype) -> float:
    """Extra memory of two steps, state and tables included, over the parameters' bytes."""
    optimizer = made(OURS, shapes, dtype, [torch.ones(s, dtype=dtype, device="cuda") for s in shapes])
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        optimizer.step()
    return (torch.cuda.max_memory_allocated() - before) / (parameters(shapes) * dtype.itemsize)


class Rows:
    """Rows of results, written as they come: what a limit on the command cuts off does not take them along."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        if file:
            file.write_text("")

    def add(self, *rows: Any) -> None:
        if self._file:
            with self._file.open("a") as out:
                out.writelines(json.dumps(row) + "\n" for row in rows)


PAIR = [OURS, ADAMW]


def layer(dtype: torch.dtype, repeats: int, rows: Rows, bandwidth: float) -> None:
    names = [name for name in OPTIMIZERS if dtype != torch.float32 or "stochastic" not in name]
    rows.add(*mix("Llama 7B layer", names, LLAMA_LAYER, dtype, repeats, bandwidth))
    gc.collect()
    torch.cuda.empty_cache()


def checks(rows: Rows) -> bool:
    """What must be so; whether it is."""
    good = True
    for name, find, wanted in (
        ("launches, Llama 7B layer", lambda: launches(LLAMA_LAYER), lambda found: found <= 10),
        ("launches, 1,000 LoRA matrices", lambda: launches(LORA), lambda found: found <= 10),
        ("waits for the device", lambda: waits(LORA), lambda found: found == "none"),
        ("peak extra memory over parameters, float32", lambda: peak(LLAMA_LAYER, torch.float32), None),
        ("peak extra memory over parameters, bfloat16", lambda: peak(LLAMA_LAYER, torch.bfloat16), None),
        ("replays equal eager steps, ms per replay", lambda: replay(LORA), lambda found: found[0]),
    ):
        found: Any = find()
        good = good and (wanted is None or bool(wanted(found)))
        print(f"{name}: {found}", flush=True)
        rows.add({"check": name, "found": found})
    return good


PARTS = ("checks", "float32", "bfloat16", "small", "host")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="some of the parts")
    parser.add_argument("--json", type=Path, help="write the rows to this file as well, one line each")
    arguments = parser.parse_args()
    reason = accelerator.why_not(torch.device("cuda"))
    if reason is not None:
        print(f"Nothing was run. {reason}")
        return 1
    device, rows, good = torch.cuda.get_device_name(), Rows(arguments.json), True
    print(f"{device}, PyTorch {torch.__version__}", flush=True)
    bandwidth = copy_bandwidth()
    print(f"copying: {bandwidth / 1e9:.0f} GB/s, read and written", flush=True)
    rows.add({"device": device, "torch": torch.__version__, "copy_bytes_per_second": bandwidth})
    if "checks" in arguments.only:
        good = checks(rows)
    for dtype in (torch.float32, torch.bfloat16):
        if str(dtype).removeprefix("torch.") in arguments.only:
            layer(dtype, arguments.repeats, rows, bandwidth)
    if "small" in arguments.only:
        rows.add(*mix("GPT-2 small", PAIR, GPT2_SMALL, torch.float32, arguments.repeats, bandwidth))
        rows.add(*mix("1,000 LoRA matrices", PAIR, LORA, torch.float32, arguments.repeats, bandwidth))
    if "host" in arguments.only:
        for shapes in (LLAMA_LAYER, GPT2_SMALL, LORA):
            rows.add(*host_share(PAIR, shapes, torch.float32))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
