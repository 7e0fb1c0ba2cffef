"""What the Triton kernels will be on a device, without one: python benchmarks/gpu_static.py [--json FILE]

Compiles what steps launch and prints for every kernel the registers of a thread, the bytes it spills, the shared
memory, the programs that fit one multiprocessor, the bytes that it moves per element of what is as large as the
parameters, and the machine instructions per element in its innermost loop.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))

import triton_compile as compiling

CAPABILITIES = (90, 80)
SHARED = {90: 227 * 1024, 80: 163 * 1024}  # of a multiprocessor; a program takes 1 KB more than it asks for
OPTIONS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "bfloat16": (torch.bfloat16, {}),
    "bfloat16, stochastic": (torch.bfloat16, {"stochastic_rounding": True}),
    "bfloat16, compensated": (torch.bfloat16, {"compensated": True}),
    "float32, int8 momentum": (torch.float32, {"beta1": 0.9, "momentum_dtype": torch.int8}),
}
DISASSEMBLER = compiling.CUOBJDUMP.with_name("nvdisasm")
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?);")
BRANCH = re.compile(r"\bBRA\b.*?`\((\.L_x_\d+)\)|\bBRA\b.*?0x([0-9a-f]+)")


def resident(capability: int, registers: int, shared: int, warps: int) -> int:
    """How many programs of a kernel a multiprocessor holds at a time."""
    by_registers = 65536 // (-(-registers // 8) * 8 * 32 * warps)
    by_shared = SHARED[capability] // (shared + 1024)
    return min(64 // warps, by_registers, by_shared, 32)


def loop(cubin: bytes, whole: bool) -> int:
    """Instructions of the longest loop without a loop in it that reads or writes memory; 0 where there is none.

    ``whole``: or of all code, where there is no loop at all.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([DISASSEMBLER, "-c", file.name], capture_output=True, text=True, check=True).stdout
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        label = re.match(r"\s*(\.L_x_\d+):", line)
        if label:
            labels[label[1]] = len(code)
        elif found := INSTRUCTION.search(line):
            code.append(found[2])
    loops = []
    for place, words in enumerate(code):
        branch = BRANCH.search(words)
        if branch and branch[1] and labels.get(branch[1], place) < place:
            loops.append((labels[branch[1]], place))
    inner = [(a, b) for a, b in loops if not any(c >= a and d <= b and (c, d) != (a, b) for c, d in loops)]
    sizes = [b - a + 1 for a, b in inner if any(re.search(r"\b(LDG|STG|LDGSTS)\b", words) for words in code[a : b + 1])]
    return max(sizes, default=0 if loops or not whole else len(code))


def elements(name: str, constants: dict[str, Any]) -> int:
    """Elements that one turn of a kernel's loop is over."""
    if "BLOCK" in constants:
        return int(constants["BLOCK"])
    return int(constants.get("K", 1) * constants.get("NP", 1) * constants["M"]) if "M" in constants else 0


def moved(name: str, constants: dict[str, Any]) -> int:
    """Bytes per element that a kernel reads and writes of all that is as large as the parameters."""
    grad, param, momentum = (
        constants[key].primitive_bitwidth // 8 if constants.get(key) else 0 for key in ("GRAD", "PARAM", "MOMENTUM")
    )
    factored = constants.get("FACTORED", "flat" not in name)
    if name in ("measure", "measure_flat"):
        return grad + param * constants["SCALE"] + 4 * (not factored)
    if not grad:
        return 0
    both = 2 * (momentum + 2 * constants["COMPENSATED"] + 4 * (not factored))
    return grad + 2 * param + both + (param if name == "on_chip" and constants["SCALE"] else 0)


def row(capability: int, kernel: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """What a launch is on a device of this compute capability."""
    name = kernel.fn.__name__
    constants, binary = compiling.compiled(kernel, args, kwargs, compiling.GPUTarget("cuda", capability, 32))
    registers, spilled = compiling.usage(binary.asm["cubin"])
    warps, shared, turn = binary.metadata.num_warps, binary.metadata.shared, elements(name, constants)
    count, sides = loop(binary.asm["cubin"], name == "on_chip"), ("K", "NP", "M", "BLOCK", "P", "C")
    return {
        "kernel": name, "tile": " ".join(str(constants[key]) for key in sides if key in constants),
        "constants": " ".join(f"{key}={value}" for key, value in constants.items()), "warps": warps,
        "bytes": moved(name, constants),
        "registers": registers, "spilled": spilled, "shared": shared,
        "resident": resident(capability, registers, shared, warps),
        "instructions": round(count * warps * 32 / turn, 1) if turn and count else None,
    }  # fmt: skip


def rows(capability: int) -> list[dict[str, Any]]:
    made: dict[str, dict[str, Any]] = {}
    compiling.accelerator.shared_memory = lambda device: SHARED[capability]
    for label, (dtype, options) in OPTIONS.items():
        for kernel, args, kwargs in compiling.launched(dtype, steps=2, **options):
            key = f"{kernel.fn.__name__} {[kwargs[word] for word in kernel.arg_names if word in kwargs]}"
            if key not in made:
                made[key] = {"of": label, **row(capability, kernel, args, kwargs)}
    return list(made.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows to this file as well")
    parser.add_argument("--capability", type=int, nargs="*", default=list(CAPABILITIES))
    arguments = parser.parse_args()
    found = {}
    for capability in arguments.capability:
        print(f"\nsm_{capability}, Triton {compiling.triton.__version__}: registers and bytes spilled per thread,")
        print("programs per multiprocessor, bytes moved per element, instructions per element of the innermost loop")
        print(f"{'kernel':<13} {'first in':<23} {'tile':<13} {'warps':>5} {'regs':>5} {'spill':>5} {'shared':>7} "
              f"{'programs':>8} {'bytes':>5} {'instr':>6}")  # fmt: skip
        found[capability] = rows(capability)
        for r in found[capability]:
            print(f"{r['kernel']:<13} {r['of']:<23} {r['tile']:<13} {r['warps']:5} {r['registers']:5} {r['spilled']:5} "
                  f"{r['shared']:7} {r['resident']:8} {r['bytes'] or '':>5} {r['instructions'] or '':>6}",
                  flush=True)  # fmt: skip
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
