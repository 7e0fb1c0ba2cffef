"""Compile what steps would launch, without a device, for NVIDIA's and AMD's: python tests/helpers/triton_compile.py

Prints registers, bytes of spilled registers and of shared memory per kernel. Fails where a kernel does not compile,
needs more shared memory than the smallest device gives, or reads a large tensor in narrow words. Needs Triton's
own ptxas and cuobjdump, which its wheels bring.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from adafactor import Factored, layout
from adafactor.core.factoring import Part
from adafactor.engine.torch import accelerator, choose
from adafactor.engine.torch.cuda import Triton
from adafactor.engine.torch.work import Group, Work
from adafactor.torch import Adafactor
from adafactor.torch.arguments import translate

SHARED = 99 * 1024  # what a program may use on compute capability 8.6 and 8.9; others have more
CUOBJDUMP = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
WIDE = re.compile(r"ld\.global[\w.:]*\.v[248]\.|cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], 0x10")
WORDS = {torch.float32: "*fp32", torch.float64: "*fp64", torch.int64: "*i64"}
# m of every width that there is a tile for, wider than any, matrices that share a tile, vectors, and what is on chip.
SHAPES = [(2048, 16), (32, 1024), (8, 4096), (4, 8192), (4, 11008), (2, 28672), (64, 3, 3), (20000,)]
SHAPES += [(1024, 16), (16, 1024), (4096,), (8192,)]


def launched(dtype, steps=1, **options):
    """The kernels that steps launch, with their arguments; nothing runs. The second step knows its sums of x²."""
    params = [torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in SHAPES]
    sliced = torch.nn.Parameter(torch.zeros(4, 4096, dtype=dtype))
    for p in (*params, sliced):
        p.grad = torch.zeros_like(p)
    optimizer = Adafactor(
        [{"params": params}, {"params": [sliced], "factoring": lambda name, shape: Factored(batch=(0,))}], **options
    )

    def every():
        for _ in range(steps):
            optimizer.step()

    return recorded(every)


def launched_for_parts(dtype, **options):
    """The kernels of a step on parts of a matrix: cut along its rows, its columns, both, and of a stack."""
    work, matrix, stack = [], layout((4096, 4096)), layout((4, 2048, 1024))
    for whole, shape, split in (
        *(
            (matrix, shape, split)
            for shape, split in (((2048, 4096), {0}), ((4096, 2048), {1}), ((2048, 2048), {0, 1}))
        ),
        (stack, (2, 2048, 1024), {0}),
    ):
        part = Part(shape, whole.rows, whole.columns, (), whole.shape, (0,) * len(shape), frozenset(split))
        part = part.transposed if split == {1} else part
        param = torch.nn.Parameter(torch.zeros(shape, dtype=dtype))
        optimizer = Adafactor([param], **options)
        group = optimizer.param_groups[0]
        state = {"step": torch.zeros((), dtype=torch.int64)}
        state |= {name: torch.zeros(shape) for name, shape in part.slots.items()}
        work.append(Work(param, state, part, Group(translate(group), group["lr"]), 0))

    def every():
        backend = Triton(work)
        backend.measure([torch.zeros_like(w.param) for w in work])
        backend.measure_again()
        for cut in ("stack", "both"):
            backend.finish_columns([k for k, w in enumerate(work) if w.layout.cut == cut])
        backend.finish()
        backend.apply(torch.zeros((), dtype=torch.int64))

    return recorded(every)


def recorded(function):
    """The launches of a call in which nothing runs."""
    calls = []
    run, kernels_on = JITFunction.run, choose.kernels_on
    choose.kernels_on = lambda device: Triton
    JITFunction.run = lambda kernel, *args, **kwargs: calls.append((kernel, args, kwargs))
    try:
        function()
    finally:
        JITFunction.run, choose.kernels_on = run, kernels_on
    return calls


def compiled(kernel, args, kwargs, target):
    """A kernel for a `GPUTarget`, and what it was compiled with."""
    names = ("num_warps", "enable_fp_fusion", *(["maxnreg"] if target.backend == "cuda" else []))
    options = {name: kwargs[name] for name in names if name in kwargs}
    constants = {name: value for name, value in kwargs.items() if name in kernel.arg_names}
    signature, aligned = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif isinstance(args[place], torch.Tensor):
            signature[name] = WORDS[args[place].dtype]
            aligned[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=aligned)
    return constants, triton.compile(source, target=target, options=options)


def usage(cubin):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, spilled = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
    return int(registers), int(spilled)


def nvidia(wrong):
    seen = set()
    for capability, dtype, options in (
        (90, torch.bfloat16, {"stochastic_rounding": True}),
        (90, torch.bfloat16, {"compensated": True, "diagnostics": True}),
        (90, torch.float32, {"beta1": 0.9, "momentum_dtype": torch.int8}),
    ):
        parts = launched_for_parts(dtype, **options) if options.get("stochastic_rounding") else []
        for kernel, args, kwargs in [*launched(dtype, **options), *parts]:
            name = kernel.fn.__name__
            constants = {key: value for key, value in kwargs.items() if key in kernel.arg_names}
            words = " ".join(f"{key}={value}" for key, value in constants.items())
            if (name, words) in seen:
                continue
            seen.add((name, words))
            _, binary = compiled(kernel, args, kwargs, GPUTarget("cuda", capability, 32))
            registers, spilled = usage(binary.asm["cubin"])
            shared = binary.metadata.shared
            wide = WIDE.search(binary.asm["ptx"])
            print(f"{name} sm_{capability} {words}: {registers} registers, {spilled} spilled, {shared} shared")
            if shared > SHARED:
                wrong.append(f"{name} {words} needs {shared} bytes of shared memory")
            if constants.get("ALIGNED") and not wide:
                wrong.append(f"{name} {words} reads in narrow words")


def amd(wrong):
    for arch, lanes in (("gfx942", 64), ("gfx1100", 32)):
        accelerator.lanes = lambda device, lanes=lanes: lanes
        seen = set()
        for kernel, args, kwargs in [*launched(torch.float32, beta1=0.9), *launched_for_parts(torch.float32)]:
            told = [kwargs.get(key) for key in ("NP", "M", "ALIGNED", "SCALE", "ROWS", "TRANSPOSED")]
            name = f"{kernel.fn.__name__} {told}"
            if name in seen:
                continue
            seen.add(name)
            if kwargs["num_warps"] * lanes > 1024:
                wrong.append(f"{name} has {kwargs['num_warps'] * lanes} threads on {arch}")
            _, binary = compiled(kernel, args, kwargs, GPUTarget("hip", arch, lanes))
            shared = binary.metadata.shared
            print(f"{name} {arch}: {kwargs['num_warps']} warps, {shared} shared")
            if shared > 64 * 1024:
                wrong.append(f"{name} needs {shared} bytes of shared memory on {arch}")


def main():
    wrong = []
    for which in sys.argv[1:] or ("nvidia", "amd"):
        {"nvidia": nvidia, "amd": amd}[which](wrong)
    print("\n".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
