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
import tempfile
import time
from pathlib import Path

from adafactor.cli.command import Refusal, integer, need
from adafactor.cli.demo import text
from adafactor.cli.demo.settings import BACKENDS, CONTEXT, FILES, SIZES, STEPS, Settings
from adafactor.cli.terminal import transient
from adafactor.core.errors import message

SUMMARY = "train a Transformer with three optimizers and compare memory, loss and speed"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    sizes = ", ".join(f"{name} {size.layers} x {size.width}" for name, size in SIZES.items())
    add = parser.add_argument
    add("--text", metavar="PATH", help="a file or folder to learn (default: the Python standard library's sources)")
    add("--steps", type=integer("--steps", 1), default=STEPS, help="per optimizer (default: %(default)s)")
    add("--size", choices=SIZES, default="small", help=f"layers x width: {sizes} (default: %(default)s)")
    add("--backend", choices=BACKENDS, default="jax", help="what Keras runs on (default: %(default)s)")
    add("--seed", type=integer("--seed", 0, 2**32 - 1), default=0, help="of weights and batches (default: %(default)s)")
    add("--out", metavar="FOLDER", default="demo-output", help="where results go (default: ./%(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Refuse what cannot work, before anything is imported, created or trained; then train and report."""
    began = time.perf_counter()
    extras = "demo" if arguments.backend == "jax" else f"demo,{arguments.backend}"
    need(("keras", arguments.backend, "matplotlib"), "adafactor demo", f'pip install "adafactor[{extras}]"')
    corpus = text.read(arguments.text, least=text.least(CONTEXT))
    settings = Settings(
        size=arguments.size,
        steps=arguments.steps,
        seed=arguments.seed,
        backend=arguments.backend,
        out=_writable(Path(arguments.out)),
    )
    # Keras reads its backend when it is imported, and TensorFlow its verbosity; both happen below this line.
    os.environ["KERAS_BACKEND"] = settings.backend
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if settings.backend != "tensorflow":
        # Keras imports TensorFlow where it is installed, and that prints a page unless oneDNN is off.
        os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    print(f"Text: {corpus.describe()}", flush=True)
    transient(f"Starting Keras on {settings.backend} …")

    from adafactor.cli.demo import session

    return session.run(settings, corpus, began)


def _writable(folder: Path) -> Path:
    """The folder, created and tried out, without the results of an earlier run."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        for name in FILES:
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        rule = f"a folder that can be written ({error.strerror})"
        raise Refusal(message("--out", rule, str(folder), "Pass another folder.")) from None
    return folder
