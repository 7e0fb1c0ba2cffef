"""Say what is installed, which kernels run, and why the others do not.

Exits with 1 when something that is installed does not work.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version

import adafactor
from adafactor.cli.command import python
from adafactor.core import native
from adafactor.core.errors import Refused

SUMMARY = "print versions, the kernels in use, and what does not work"

#: What every probe knows. One update of ones by gradients of ones, with a learning rate of 0.01, leaves 0.99.
PRELUDE = """
import numpy
from adafactor.core import native

def check(x):
    x = numpy.asarray(x, "float32")
    assert x.shape == (4, 4) and abs(x - 0.99).max() < 1e-6, f"an update gave {x.ravel()[0]} in place of 0.99"

def cpu_tensors(threads):
    reason = native.why_not()
    if reason:
        return f"works; torch operations, no native kernels on the CPU: {reason}"
    return f"works; on the CPU native kernels, {native.threads(threads)} threads; elsewhere torch operations"

def compiled(what):
    from adafactor.engine.xla import custom_call
    reason = custom_call.why_not()
    return f"works; compiled by XLA, {f'without native kernels: {reason}' if reason else what}"
"""
KERAS = """
import os
os.environ["KERAS_BACKEND"] = "{backend}"
import keras
from adafactor.keras import Adafactor
v = keras.Variable(numpy.ones((4, 4), "float32"))
Adafactor(0.01).apply([keras.ops.ones((4, 4))], [v])
check(keras.ops.convert_to_numpy(v))
{fast_path}
"""
TENSORFLOW = """
from adafactor.engine.tensorflow import op, xla
reason = op.why_not()
compiled = xla.why_not()
why = "on the CPU native kernels in graphs and eagerly; with jit_compile "
why += "they measure" if compiled is None else f"XLA alone: {compiled}"
print(f"works; {why if reason is None else f'TensorFlow operations, no native kernels: {reason}'}")
"""

#: What each front end needs, and a program that makes one update with it and prints which kernels made it, and why.
PROBES: dict[str, tuple[tuple[str, ...], str]] = {
    "adafactor.torch": (
        ("torch",),
        """
import torch
from adafactor.torch import Adafactor
p = torch.nn.Parameter(torch.ones(4, 4)); p.grad = torch.ones(4, 4)
Adafactor([p], lr=0.01).step()
check(p.detach())
print(cpu_tensors(torch.get_num_threads()))
""",
    ),
    "adafactor.optax": (
        ("jax", "optax"),
        """
import jax, jax.numpy as jnp
from adafactor.optax import adafactor
optimizer = adafactor(0.01)
p = jnp.ones((4, 4)); updates, _ = jax.jit(optimizer.update)(p, optimizer.init(p), p)
check(p + updates)
print(compiled("on the CPU native kernels inside jit"))
""",
    ),
    **{
        f"adafactor.keras on {backend}": (("keras", backend), KERAS.format(backend=backend, fast_path=fast_path))
        for backend, fast_path in {
            "jax": 'print(compiled("on the CPU native kernels measure"))',
            "tensorflow": TENSORFLOW,
            "torch": "import torch; print(cpu_tensors(torch.get_num_threads()))",
        }.items()
    },
}

#: The same for CUDA tensors of PyTorch.
TRITON = """
import torch
from adafactor.engine.torch import accelerator
from adafactor.torch import Adafactor
reason = accelerator.why_not(torch.device("cuda"))
if reason is None:
    p = torch.nn.Parameter(torch.ones(4, 4, device="cuda")); p.grad = torch.ones(4, 4, device="cuda")
    Adafactor([p], lr=0.01, fused=True).step()
    check(p.detach().cpu())
    print(f"for the CUDA tensors of adafactor.torch, on {torch.cuda.get_device_name()}")
else:
    print(f"none. {reason}")
"""

#: Of one program.
SECONDS = 300
VARIABLES = ("ADAFACTOR_LIBRARY", "ADAFACTOR_ISA", "ADAFACTOR_NUM_THREADS", "ADAFACTOR_TENSORFLOW", "KERAS_BACKEND")
PACKAGES = ("numpy", "keras", "tensorflow", "tensorflow-cpu", "jax", "jaxlib", "optax", "torch", "triton")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No options."""


def run(arguments: argparse.Namespace) -> int:
    """Print the report; 0 where all that is installed works."""
    print(f"adafactor {adafactor.__version__}, Python {platform.python_version()}, {platform.platform()}")
    for package in PACKAGES:
        try:
            print(f"  {package} {version(package)}")
        except PackageNotFoundError:
            continue
    for variable in VARIABLES:
        if variable in os.environ:
            print(f"  {variable}={os.environ[variable]}")
    broken, line = _native()
    print(f"native kernels: {line}", flush=True)
    for name, (modules, program) in {"Triton kernels": (("torch",), TRITON), **PROBES}.items():
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        if missing:
            if program != TRITON:
                print(f"{name}: not installed ({', '.join(missing)})")
            continue
        failed, line = _probe(program)
        broken |= failed
        print(f"{name}: {'BROKEN: ' * failed}{line}", flush=True)
    return 1 if broken else 0


def _native() -> tuple[bool, str]:
    """Whether a library is there that does not work; and what there is to say."""
    if native.path() is not None:
        # In a process of its own first: a library that is none can crash whoever loads it.
        crashed, line = _probe("native.why_not(); print()")
        if crashed:
            return True, f"BROKEN: loading {native.path()}: {line}"
    reason = native.why_not()
    if reason is not None:
        return (False, f"none. {reason}") if native.path() is None else (True, f"BROKEN: {reason}")
    try:
        info = native.info()
    except ValueError as error:  # ADAFACTOR_ISA or ADAFACTOR_NUM_THREADS asks for what there is not
        raise Refused(str(error)) from None
    threads = "thread" if info.threads == 1 else "threads"
    missing = [isa for isa in info.built if isa not in info.supported]
    lacking = f"; this processor lacks {', '.join(missing)}" if missing else ""
    return False, f"{info.isa} (built: {', '.join(info.built)}{lacking}), {info.threads} {threads}, {info.path}"


def _probe(program: str) -> tuple[bool, str]:
    """Whether a program fails, and its last words. In a process of its own: a crash must not take the report along."""
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": "0"}
    command = python(PRELUDE + program)
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return True, f"no answer in {SECONDS} seconds"
    if done.returncode == 0:
        return False, _last(done.stdout)
    if done.returncode < 0:
        return True, f"it was ended by signal {-done.returncode}"
    return True, _last(done.stderr)


def _last(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "it ended without a word"
