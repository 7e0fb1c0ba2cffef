"""Damaged checkpoints: good ones with bytes changed, cut off or moved, by a fixed seed.

    python tests/helpers/conversion_fuzz.py [--inputs N]

prints, per kind of file, how many were refused and read, and the longest time and the largest allocation of any.
"""

import argparse
import os
import tempfile
import time
import tracemalloc
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "torch")

import h5py
import msgpack
import numpy as np
import torch

from adafactor import convert, layout
from adafactor.convert import msgpack as flax_files
from adafactor.convert import state
from adafactor.convert.state import Parameter, State
from adafactor.core.errors import Refused
from adafactor.torch import Adafactor


def examples(folder):
    """One good file of every kind that is parsed here, by its kind."""
    folder = Path(folder)
    found = {kind: folder / f"good{kind}" for kind in (".safetensors", ".pt", ".keras", ".weights.h5", ".msgpack")}
    rng = np.random.default_rng(0)
    slots = {"row": rng.uniform(size=6).astype("f4"), "column": rng.uniform(size=4).astype("f4")}
    parameters = (
        Parameter("dense", layout((6, 4)), slots | {"momentum": rng.normal(size=(6, 4)).astype("f4")}, 3),
        Parameter("bias", layout((5,)), {"second_moment": rng.uniform(size=5).astype("f4")}, 3),
    )
    state.write(State(parameters, ({"learning_rate": 0.1},), "torch", "adafactor.torch"), found[".safetensors"])
    params = [torch.nn.Parameter(torch.randn(6, 4)), torch.nn.Parameter(torch.randn(5))]
    optimizer = Adafactor(params)
    for param in params:
        param.grad = torch.randn(param.shape)
    optimizer.step()
    torch.save(optimizer.state_dict(), found[".pt"])
    tree = {
        "params": {"dense": rng.normal(size=(6, 4)).astype("f4"), "bias": rng.normal(size=5).astype("f4")},
        "opt_state": {
            "0": {
                "count": np.asarray(3, "i4"),
                "v_row": {"dense": slots["column"], "bias": np.zeros(1, "f4")},
                "v_col": {"dense": slots["row"], "bias": np.zeros(1, "f4")},
                "v": {"dense": np.zeros(1, "f4"), "bias": rng.uniform(size=5).astype("f4")},
            },
            "1": {},
        },
    }
    flax_files.write(tree, found[".msgpack"])
    import keras

    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(4, name="dense")])
    model.compile(keras.optimizers.Adafactor(0.1), "mse")
    model.optimizer.build(model.trainable_variables)
    model.save(found[".keras"])
    model.save_weights(found[".weights.h5"])
    return found


def damaged(data, rng):
    """One change: bits, bytes, a length, a cut, a hole, or a piece elsewhere."""
    data = bytearray(data)
    kind, at = rng.integers(7), int(rng.integers(len(data)))
    end = min(len(data), at + int(rng.integers(1, 64)))
    if kind == 0:
        data[at] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        data[at:end] = rng.integers(0, 256, end - at, dtype=np.uint8).tobytes()
    elif kind == 2:
        del data[at:]
    elif kind == 3:
        del data[at:end]
    elif kind == 4:
        data[at:end] = b"\xff" * (end - at)
    elif kind == 5:
        other = int(rng.integers(len(data)))
        data[other:other] = data[at:end]
    else:  # the lengths at the front of most formats
        front = int(rng.integers(min(len(data), 64)))
        data[front : front + 1] = bytes([int(rng.integers(256))])
    return bytes(data)


def read(path):
    """Seconds, bytes at the peak, and what came of it: ``"read"``, or the refusal."""
    tracemalloc.start()
    start = time.perf_counter()
    try:
        convert.read(path)
        outcome = "read"
    except (Refused, FileNotFoundError) as error:
        outcome = str(error)
    seconds = time.perf_counter() - start
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return seconds, peak, outcome


def fuzz(kind, good, inputs, seed=0):
    """What ``read`` says of every damaged file."""
    rng = np.random.default_rng([seed, *kind.encode()])
    data, path = good.read_bytes(), good.with_name(f"bad{kind}")
    found = []
    for _ in range(inputs):
        path.write_bytes(damaged(data, rng))
        found.append(read(path))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=300, help="damaged files of every kind")
    arguments = parser.parse_args()
    print(f"h5py {h5py.__version__}, msgpack {msgpack.version}, torch {torch.__version__}")
    print(
        "| file | bytes | damaged | refused | read | longest, ms | largest allocation, MB |",
        "|---|---|---|---|---|---|---|",
        sep="\n",
    )
    with tempfile.TemporaryDirectory() as folder:
        for kind, good in examples(folder).items():
            read(good)  # what is imported on first use
            found = fuzz(kind, good, arguments.inputs)
            was_read = sum(outcome == "read" for *_, outcome in found)
            times, peaks = max(s for s, *_ in found) * 1e3, max(peak for _, peak, _ in found) / 1e6
            counts = f"{good.stat().st_size:,} | {len(found)} | {len(found) - was_read} | {was_read}"
            print(f"| `{kind}` | {counts} | {times:.0f} | {peaks:.2f} |")


if __name__ == "__main__":
    main()
