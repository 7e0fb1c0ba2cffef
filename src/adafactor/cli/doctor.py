"""Say what is installed, which kernels run, and why the others do not.

Exits with 1 when something that is installed does not work.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

import adafactor
from adafactor.cli.command import Refusal
from adafactor.kernels import native

SUMMARY = "print versions, the kernels in use, and what does not work"

#: What each front end needs, and a program that makes one update with it and prints which kernels made it.
PROBES: dict[str, tuple[tuple[str, ...], str]] = {
    "adafactor.torch": (
        ("torch",),
        """
import torch
from adafactor.torch import Adafactor
p = torch.nn.Parameter(torch.ones(4, 4)); p.grad = torch.ones(4, 4)
optimizer = Adafactor([p]); optimizer.step()
assert p.isfinite().all() and (p != 1).all()
print(CPU_TENSORS, "on other devices torch operations")
""",
    ),
    "adafactor.optax": (
        ("jax", "optax"),
        """
import jax, jax.numpy as jnp
from adafactor.kernels import xla_native
from adafactor.optax import adafactor
optimizer = adafactor(0.01)
p = jnp.ones((4, 4)); updates, _ = jax.jit(optimizer.update)(p, optimizer.init(p), p)
assert jnp.isfinite(updates).all() and (updates != 0).all()
print(f"works; {xla_native.why_not() or 'on the CPU native kernels inside jit'}")
""",
    ),
    **{
        f"adafactor.keras on {backend}": (
            ("keras", module),
            f"""
import os
os.environ["KERAS_BACKEND"] = "{backend}"
import keras, numpy
from adafactor.keras import Adafactor
v = keras.Variable(numpy.ones((4, 4), "float32"))
optimizer = Adafactor(0.01)
optimizer.apply([keras.ops.ones((4, 4))], [v])
x = keras.ops.convert_to_numpy(v)
assert numpy.isfinite(x).all() and (x != 1).all()
print({kernels})
""",
        )
        for backend, module, kernels in (
            ("jax", "jax", '"works; compiled by XLA"'),
            ("tensorflow", "tensorflow", '"works; TensorFlow operations, compiled by XLA with jit_compile"'),
            ("torch", "torch", 'CPU_TENSORS, "on other devices torch operations"'),
        )
    },
}

#: What every probe knows: which kernels CPU tensors of PyTorch go to.
PRELUDE = """
from adafactor.kernels import native
CPU_TENSORS = f"works; on the CPU {'native kernels' if native.available() else 'torch operations (no native kernels)'},"
"""

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
    print(f"native kernels: {_native()}")
    broken = 0
    for name, (modules, program) in PROBES.items():
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        if missing:
            print(f"{name}: not installed ({', '.join(missing)})")
            continue
        outcome = _probe(program)
        broken += outcome.returncode != 0
        print(f"{name}: {_last(outcome.stdout) if outcome.returncode == 0 else 'BROKEN: ' + _last(outcome.stderr)}")
    return 1 if broken else 0


def _native() -> str:
    reason = native.why_not()
    if reason is not None:
        return f"none. {reason}"
    try:
        found = native.info()
    except ValueError as error:  # ADAFACTOR_ISA or ADAFACTOR_NUM_THREADS asks for what there is not
        raise Refusal(str(error)) from None
    threads = "thread" if found.threads == 1 else "threads"
    return f"{found.isa} (built: {', '.join(found.built)}), {found.threads} {threads}, {found.path}"


def _probe(program: str) -> subprocess.CompletedProcess[str]:
    """One update in a process of its own: a framework that crashes must not take the report along."""
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": "0"}
    return subprocess.run(
        [sys.executable, "-c", PRELUDE + program],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        check=False,
    )


def _last(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "it ended without a word"
