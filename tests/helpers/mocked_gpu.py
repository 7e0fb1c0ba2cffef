"""A CUDA device for a dry run, on the CPU: python tests/helpers/mocked_gpu.py SCRIPT [ARGUMENT ...]

Every call that names the device gets CPU memory instead, kernels do nothing, streams and graphs are nothing. What runs
to its end here meets no name that is missing and no tensor on the wrong side; what it measures means nothing.
With ``-p mocked_gpu`` pytest runs the tests marked gpu so.
"""

import contextlib
import runpy
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.overrides import TorchFunctionMode
from triton.runtime.jit import JITFunction

launched = []


class OnCpu(TorchFunctionMode):
    """Tensors are made on the CPU, whatever the call says."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.empty and args == (1 << 28,):  # what copying is timed with
            args = (1 << 20,)
        if torch.device(kwargs.get("device") or "cpu").type == "cuda":
            kwargs["device"] = "cpu"
        if function is torch.Tensor.cuda:
            return args[0]
        if function is torch.Tensor.pin_memory:
            return args[0].clone()
        return function(*args, **kwargs)


class Event:
    def __init__(self, **options):
        self.time = 0.0

    def record(self, *stream):
        self.time = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        return max((other.time - self.time) * 1e3, 1e-6)


class Stream:
    def wait_stream(self, other):
        pass


class Generator(torch.Generator):
    def __new__(cls, device="cpu"):
        return super().__new__(cls, "cpu")


class Profile:
    """Records what was launched, and a copy."""

    def __init__(self, **options):
        pass

    def __enter__(self):
        self._first = len(launched)
        return self

    def __exit__(self, *error):
        self._names = [*launched[self._first :], "Memcpy HtoD"]

    def events(self):
        return [SimpleNamespace(name=name, device_type=torch.autograd.DeviceType.CUDA) for name in self._names]


class Graph:
    """Replays nothing: what was captured ran, once, on the CPU."""

    def replay(self):
        pass


@contextlib.contextmanager
def capture(graph, **options):
    from adafactor.engine.torch import accelerator

    before, accelerator.is_capturing = accelerator.is_capturing, lambda: True
    health, torch.optim.Optimizer._accelerator_graph_capture_health_check = (
        torch.optim.Optimizer._accelerator_graph_capture_health_check,
        capturable,
    )
    try:
        yield
    finally:
        accelerator.is_capturing, torch.optim.Optimizer._accelerator_graph_capture_health_check = before, health


def capturable(optimizer):
    """torch's own check, which asks the device."""
    if not optimizer.mocked_capturable:
        raise RuntimeError("Attempting CUDA graph capture of step() but the group's capturable is False.")


def install():
    """Put the device in place."""
    from adafactor.engine.torch import accelerator, choose, cuda
    from adafactor.torch import Adafactor

    accelerator.why_not = choose.why_not = lambda device: None
    choose.kernels_on = lambda device: cuda.Triton
    init = Adafactor.__init__

    def made(optimizer, *args, capturable=False, **options):  # which is refused on a CPU
        init(optimizer, *args, **options)
        optimizer.mocked_capturable = capturable

    Adafactor.__init__ = made
    JITFunction.run = lambda kernel, *args, **kwargs: launched.append(kernel.fn.__name__)
    torch.Generator, torch.profiler.profile = Generator, Profile
    fake = {
        "is_available": lambda: True, "get_device_name": lambda *device: "a mocked device", "Event": Event,
        "Stream": Stream, "stream": lambda stream: contextlib.nullcontext(), "current_stream": Stream,
        "synchronize": lambda *device: None, "_sleep": lambda cycles: None, "empty_cache": lambda: None,
        "set_sync_debug_mode": lambda mode: None, "memory_allocated": lambda *device: 0,
        "max_memory_allocated": lambda *device: 1, "reset_peak_memory_stats": lambda *device: None,
        "CUDAGraph": Graph, "graph": capture,
    }  # fmt: skip
    for name, value in fake.items():
        setattr(torch.cuda, name, value)
    OnCpu().__enter__()


def main():
    from adafactor.cli.bench import shapes

    sys.path.insert(0, str(Path(sys.argv[1]).parent))
    install()
    for name in ("LLAMA_LAYER", "GPT2_SMALL", "LORA"):  # a thousandth of the work, and every kind of tensor
        small = [tuple(-(-n // 64) for n in shape) for shape in getattr(shapes, name)[:20]]
        setattr(shapes, name, small)
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
else:
    install()
