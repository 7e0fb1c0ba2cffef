"""Train a byte-level Transformer on real text with three optimizers, and measure what each of them costs.

keras.optimizers.AdamW, keras.optimizers.Adafactor and adafactor.keras.Adafactor start from the same weights and
see the same batches. At the end: a table of measured figures, a sample of generated text, the proof that a saved
run resumes bit for bit, and in the output folder

    demo.json          every figure, every loss
    demo.png           loss curves and memory bars
    <optimizer>.keras  each trained model with its optimizer's state

Ctrl-C stops after the current step; what was trained so far is reported and saved.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import text

from adafactor.cli.command import Parser, exit_code, integer, need
from adafactor.cli.terminal import transient
from adafactor.core.errors import Refused, message

# Width, layers, heads: few and wide, because an n x m matrix's state shrinks by the factor nm / (n + m).
SIZES = {"tiny": (64, 1, 2), "small": (512, 2, 8), "medium": (1024, 4, 16)}
FILES = ("demo.json", "demo.png", "adamw.keras", "keras-adafactor.keras", "adafactor.keras")


def main(argv: Sequence[str] | None = None) -> int:
    return exit_code("demo", lambda: run(argv))


def run(argv: Sequence[str] | None) -> int:
    """Refuse what cannot work, before anything is imported, created or trained; then train and report."""
    began = time.perf_counter()
    arguments = parser().parse_args(argv)
    packages = ("keras", arguments.backend, "matplotlib")
    need(packages, "The demo", f"pip install {' '.join(packages).replace('tensorflow', 'tensorflow-cpu')}")
    corpus = text.read(arguments.text, text.least(arguments.context))
    arguments.out, arguments.shape = writable(Path(arguments.out)), SIZES[arguments.size]
    # Keras reads its backend when it is imported, and TensorFlow its verbosity; both happen below this line.
    os.environ["KERAS_BACKEND"] = arguments.backend
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if arguments.backend != "tensorflow":
        # Keras imports TensorFlow where it is installed, and that prints a page unless oneDNN is off.
        os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    print(f"Text: {corpus.describe()}", flush=True)
    transient(f"Starting Keras on {arguments.backend} …")

    import session

    return session.run(arguments, corpus, began)


def parser() -> Parser:
    made = Parser(prog="demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = ", ".join(f"{name} {layers} x {width}" for name, (width, layers, _) in SIZES.items())
    add = made.add_argument
    add("--text", metavar="PATH", help="a file or folder to learn (default: the Python standard library's sources)")
    add("--steps", type=integer("--steps", 1), default=300, help="per optimizer (default: %(default)s)")
    add("--size", choices=SIZES, default="small", help=f"layers x width: {sizes} (default: %(default)s)")
    add("--backend", choices=("jax", "tensorflow", "torch"), default="jax", help="of Keras (default: %(default)s)")
    add("--seed", type=integer("--seed", 0, 2**32 - 1), default=0, help="of weights and batches (default: %(default)s)")
    add("--out", metavar="FOLDER", default="demo-output", help="where results go (default: ./%(default)s)")
    made.set_defaults(context=128)  # bytes per window
    return made


def writable(folder: Path) -> Path:
    """The folder, created and tried out, without the results of an earlier run."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        for name in FILES:
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        rule = f"a folder that can be written ({error.strerror})"
        raise Refused(message("--out", rule, str(folder), "Pass another folder.")) from None
    return folder


if __name__ == "__main__":
    sys.exit(main())
