"""Say what training a model will need, before training: weights, gradients, optimizer state, temporaries.

MODEL is a .safetensors file, a Hugging Face folder, a .keras or .weights.h5 file, a PyTorch state dict (.pt, .pth,
.bin), a .txt or .json of shapes, or shapes: adafactor plan 4096x4096*32 4096. Of a file no weight is read. Activations
are not included.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from adafactor.cli.command import check_outputs, integer, write_outputs
from adafactor.cli.plan import report
from adafactor.core.errors import Refused, message
from adafactor.planning import Plan, plan
from adafactor.planning.files import opened_with, shapes
from adafactor.planning.optimizers import FRAMEWORKS, Framework
from adafactor.planning.parameters import TRAINED, Parameter

SUMMARY = "say what training a model will need, optimizer by optimizer"

_UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


def memory(text: str) -> int:
    """An argparse type: ``24GB`` or ``80GiB`` in bytes."""
    match = re.fullmatch(rf"(\d{{1,6}}(?:\.\d{{1,3}})?)({'|'.join(_UNITS)})", text.replace(" ", ""))
    if match is None or not float(match[1]):
        rule = f"a number and {', '.join(_UNITS)}"
        raise argparse.ArgumentTypeError(message("--gpu-memory", rule, text, "For example 24GB."))
    return int(float(match[1]) * _UNITS[match[2]])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", nargs="+", metavar="MODEL", help="a file, a folder, or shapes")
    add("--dtype", choices=TRAINED, help="of weights and gradients (default: as stored; float32 for shapes)")
    add("--shards", type=integer("--shards", 1, 1 << 20), default=1, metavar="N", help="FSDP2 ranks (default: 1)")
    add("--zero", type=int, choices=(1, 2, 3), default=0, metavar="STAGE", help="the ranks are DeepSpeed ZeRO's")
    add(
        "--host", nargs=2, type=memory, metavar=("BUS", "MEMORY"),
        help="HostStep, where a bus moves so many bytes a second each way, and the host's memory: 25GB 80GB",
    )  # fmt: skip
    add("--gpu-memory", type=memory, metavar="SIZE", help="say what fits: 24GB, 80GiB")
    add("--frozen", action="append", default=[], metavar="PATTERN", help="names that are not trained: 'encoder.*'")
    add("--framework", choices=FRAMEWORKS, help="whose optimizers (default: keras for its files, else torch)")
    add("--no-triton", action="store_true", help="PyTorch on a GPU without Triton: torch operations, block by block")
    add("--top", type=integer("--top", 0), default=5, metavar="N", help="list the N largest tensors (default: 5)")
    add("--json", metavar="FILE", help="write every figure to FILE; - prints them instead of the table")
    add("--plot", metavar="FILE", help="draw to FILE.png, .svg or .pdf")


def run(arguments: argparse.Namespace) -> int:
    """Plan, then print, write and draw."""
    models = [Path(model) for model in arguments.model]
    check_outputs("plan", arguments, [*models, *(file for model in models for file in opened_with(model))])
    name, planned = _plan(arguments)
    told = (name, planned, arguments.gpu_memory, arguments.top, arguments.host)
    if arguments.json == "-":
        print(report.json_text(*told))
        arguments.json = None
    else:
        print(report.text(*told))

    def draw(file: Path) -> None:
        from adafactor.cli.picture import draw_plan

        draw_plan(name, planned, arguments.gpu_memory, file)

    write_outputs(arguments, report.json_text(*told), draw)
    return 0


def _plan(arguments: argparse.Namespace) -> tuple[str, Plan]:
    """The model's name and its plan."""
    words = arguments.model
    is_keras = words[0].endswith((".keras", ".h5"))
    framework: Framework = arguments.framework or ("keras" if is_keras else "torch")
    model: Path | list[Parameter]
    try:
        if all(map(shapes.is_shape, words)):
            name, model = " ".join(words), shapes.parse_words(words)
        elif len(words) == 1:
            name, model = Path(words[0]).name or words[0], Path(words[0])
        else:
            remedy = "Separate shapes by spaces, and give one file at a time."
            raise Refused(message("MODEL", "one file, one folder or shapes only", " ".join(words), remedy))
        planned = plan(
            model, dtype=arguments.dtype, shards=arguments.shards, frozen=arguments.frozen, framework=framework
        )
        planned = planned.under_zero(arguments.zero) if arguments.zero else planned
        return name, planned.without_triton() if arguments.no_triton else planned
    except ValueError as error:
        raise Refused(str(error)) from None
