"""Kill a training process with SIGKILL at random moments, and resume it from its last whole checkpoint every time.

    python tests/helpers/kill_single.py --framework torch --times 50

The run that was killed over and over must end with the parameters, the optimizer's state and the losses of the run that
nobody disturbed, to the last bit. Where a run ends before all kills are spent, another one is begun.

A process is forked after its framework has been imported and before it has computed anything: importing would take
most of the time. Checkpoints are written beside the last one and take its place by a rename.
"""

from __future__ import annotations

import argparse
import importlib
import json
import mmap
import os
import random
import signal
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

STEPS, EVERY = 40, 2
SHAPES = {"embedding": (11, 6), "kernel": (6, 5), "bias": (5,), "scale": ()}

Save = Callable[[Path], None]


def starts() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: np.asarray(rng.normal(size=shape), np.float32) for name, shape in SHAPES.items()}


def batch(step: int) -> tuple[np.ndarray, np.ndarray]:
    """The data of a step are a function of its number: a resumed run sees what it would have seen."""
    rng = np.random.default_rng([1, step])
    return rng.integers(0, 11, 16), rng.normal(size=(16, 5)).astype(np.float32)


def learning_rate(step: int) -> float:
    return 0.5 / (1 + step % 7)


# -- the frameworks: each trains from ``step`` on, and yields the number of steps made, the loss and how to save -------


def train_torch(checkpoint: Path) -> Any:
    import torch

    from adafactor.torch import Adafactor

    params = {name: torch.nn.Parameter(torch.from_numpy(x).bfloat16()) for name, x in starts().items()}
    groups = [
        {"params": [(name, params[name]) for name in names]} for names in (("embedding", "bias"), ("kernel", "scale"))
    ]
    optimizer = Adafactor(groups, lr=0.5, beta1=0.9, stochastic_rounding=True, weight_decay=0.01)
    step = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        step = saved["step"]
        optimizer.load_state_dict(saved["optimizer"])
        with torch.no_grad():
            for name, value in saved["params"].items():
                params[name].copy_(value)

    def save(path: Path) -> None:
        held = {name: p.detach() for name, p in params.items()}
        torch.save({"step": step, "params": held, "optimizer": optimizer.state_dict()}, path)

    while step < STEPS:
        tokens, target = batch(step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        out = torch.tanh(params["embedding"][torch.from_numpy(tokens)] @ params["kernel"] + params["bias"])
        loss = (out * params["scale"] - torch.from_numpy(target).bfloat16()).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        yield step, float(loss.detach()), save


def train_jax(checkpoint: Path) -> Any:
    import jax
    import jax.numpy as jnp
    import optax
    from flax import serialization

    from adafactor.optax import adafactor

    optimizer = adafactor(lambda count: 0.5 / (1 + count % 7), 1, momentum=0.9, weight_decay_rate=1e-3)
    params = {name: jnp.asarray(x, jnp.bfloat16 if name == "kernel" else None) for name, x in starts().items()}
    held = {"step": 0, "params": params, "state": optimizer.init(params)}
    if checkpoint.exists():
        held = serialization.from_bytes(held, checkpoint.read_bytes())

    def loss_of(params: Any, tokens: Any, target: Any) -> Any:
        out = jnp.tanh(params["embedding"][tokens] @ params["kernel"].astype(jnp.float32) + params["bias"])
        return jnp.mean((out * params["scale"] - target) ** 2)

    @jax.jit
    def update(params: Any, state: Any, tokens: Any, target: Any) -> Any:
        loss, grads = jax.value_and_grad(loss_of)(params, tokens, target)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    def save(path: Path) -> None:
        path.write_bytes(serialization.to_bytes(held))

    while held["step"] < STEPS:
        params, state, loss = update(held["params"], held["state"], *batch(held["step"]))
        held = {"step": held["step"] + 1, "params": params, "state": state}
        yield held["step"], float(loss), save


def train_keras(checkpoint: Path) -> Any:
    import keras

    from adafactor.keras import Adafactor

    if checkpoint.exists():
        model = keras.saving.load_model(checkpoint)
    else:
        keras.utils.set_random_seed(0)
        layers = [keras.Input((), dtype="int32"), keras.layers.Embedding(11, 6)]
        model = keras.Sequential([*layers, keras.layers.Dense(5, "tanh"), keras.layers.Dense(5)])
        schedule = keras.optimizers.schedules.CosineDecay(0.5, STEPS)
        optimizer = Adafactor(schedule, beta_1=0.9, weight_decay=0.01, gradient_accumulation_steps=3)
        model.compile(optimizer, "mse")

    while True:
        step = int(model.optimizer._iterations)  # as often as it was called, where `iterations` counts updates
        if step >= STEPS:
            return
        loss = model.train_on_batch(*batch(step))
        yield step + 1, float(loss), model.save


FRAMEWORKS = {"torch": train_torch, "jax": train_jax, "keras": train_keras, "tensorflow": train_keras}
#: Keras on one of its backends: on ``KERAS_BACKEND``, PyTorch if it says nothing, and on TensorFlow in graphs.
KERAS = ("keras", "tensorflow")


def load(framework: str) -> None:
    """Import what the framework's processes need, and compute nothing."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("KERAS_BACKEND", "torch")
    if framework == "tensorflow":
        os.environ["KERAS_BACKEND"] = framework
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    modules = {"torch": ["adafactor.torch"], "jax": ["adafactor.optax", "flax"]}
    for name in modules.get(framework, ["adafactor.keras"]):
        importlib.import_module(name)


# -- one process -------------------------------------------------------------------------------------------------------


class Progress:
    """What the process tells the one that kills it: steps made, and whether a checkpoint is being written."""

    def __init__(self) -> None:
        self._shared = mmap.mmap(-1, 16)  # anonymous and shared: what a fork writes, both see

    def tell(self, step: int, saving: bool) -> None:
        self._shared[:16] = struct.pack("qq", step, saving)

    def read(self) -> tuple[int, bool]:
        step, saving = struct.unpack("qq", self._shared[:16])
        return step, bool(saving)


def train(framework: str, place: Path, progress: Progress) -> None:
    """Train from the last checkpoint to the end, one line of the log per step and a checkpoint every few."""
    checkpoint = place / ("last.keras" if framework in KERAS else "last")
    partial = checkpoint.with_stem("partial")
    step = 0
    with (place / "log").open("a") as log:
        for step, loss, save in FRAMEWORKS[framework](checkpoint):
            print(json.dumps([step, loss.hex()]), file=log, flush=True)
            if step % EVERY == 0:
                progress.tell(step, True)
                save(partial)
                os.replace(partial, checkpoint)
            progress.tell(step, False)
    assert step in (0, STEPS)  # 0: killed after its last checkpoint


def begin(framework: str, place: Path, progress: Progress) -> int:
    """Fork a training process; its id."""
    progress.tell(0, False)
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        train(framework, place, progress)
        status = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(status)


def complete(framework: str, place: Path) -> None:
    _, status = os.waitpid(begin(framework, place, Progress()), 0)
    assert status == 0, f"the training process ended with status {status}"


def kill_one(framework: str, place: Path, moment: random.Random) -> tuple[bool, bool]:
    """Start, let it make some steps, kill: whether it was killed (and had not ended), whether in a checkpoint."""
    progress = Progress()
    pid = begin(framework, place, progress)
    first, wanted, began = 0, moment.randint(0, 8), time.monotonic()
    pause = -1.0  # until it is known how long a step takes
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            assert status == 0, f"the training process ended by itself with status {status}"
            return False, False
        step, _ = progress.read()
        if step and not first:
            first, began = step, time.monotonic()
        if first and step - first >= wanted:
            if pause < 0:
                pause = moment.random() * (time.monotonic() - began) / max(1, step - first)
            time.sleep(pause)
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            return os.WIFSIGNALED(status), progress.read()[1]
        time.sleep(0.0002)


# -- what is left ------------------------------------------------------------------------------------------------------


def arrays(framework: str, place: Path) -> dict[str, bytes]:
    """Everything in the last checkpoint, as bytes by name. Read in a process of its own: a fork must follow."""
    reader, writer = os.pipe()
    if not os.fork():
        os.close(reader)
        with os.fdopen(writer, "w") as out:
            json.dump({name: value.hex() for name, value in _arrays(framework, place).items()}, out)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as source:
        found = {name: bytes.fromhex(value) for name, value in json.load(source).items()}
    os.wait()
    return found


def _arrays(framework: str, place: Path) -> dict[str, bytes]:
    if framework in KERAS:
        import keras

        model = keras.saving.load_model(place / "last.keras")
        tensors = [*model.variables, *model.optimizer.variables]
        return {f"{k} {v.path}": np.asarray(keras.ops.convert_to_numpy(v)).tobytes() for k, v in enumerate(tensors)}
    if framework == "jax":
        import jax
        from flax import serialization

        leaves = jax.tree_util.tree_leaves_with_path(serialization.msgpack_restore((place / "last").read_bytes()))
        return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}
    import torch

    saved = torch.load(place / "last")
    found = dict(saved["params"])
    for number, slots in saved["optimizer"]["state"].items():
        found |= {f"{number} {name}": value for name, value in slots.items()}
    return {name: value.double().numpy().tobytes() for name, value in found.items()}


def losses(place: Path) -> dict[int, set[str]]:
    """Every loss that was ever written for a step: one, if resuming makes no difference. A torn line is not counted."""
    found: dict[int, set[str]] = {}
    for line in (place / "log").read_text().splitlines():
        step, loss = json.loads(line)
        found.setdefault(step, set()).add(loss)
    return found


def differences(framework: str, place: Path, expected: dict[str, bytes], undisturbed: Path) -> list[str]:
    found = arrays(framework, place)
    names = [name for name in sorted({*found, *expected}) if found.get(name) != expected.get(name)]
    seen, wanted = losses(place), losses(undisturbed)
    return names + [f"loss of step {step}" for step in wanted if seen.get(step) != wanted[step]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--framework", choices=FRAMEWORKS, required=True)
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    load(options.framework)
    moment = random.Random(options.seed)
    killed = in_checkpoint = runs = lost = 0
    different: list[str] = []
    with TemporaryDirectory() as name:
        undisturbed = Path(name) / "undisturbed"
        undisturbed.mkdir()
        complete(options.framework, undisturbed)
        expected = arrays(options.framework, undisturbed)
        while killed < options.times:
            place = Path(name) / str(runs)
            place.mkdir()
            runs += 1
            try:
                ended = False
                while killed < options.times and not ended:
                    hit, saving = kill_one(options.framework, place, moment)
                    ended = not hit
                    killed += hit
                    in_checkpoint += saving
                if not ended:
                    complete(options.framework, place)
            except AssertionError as error:
                lost += 1
                print(error, flush=True)
                if lost > 3:
                    break
                continue
            different += differences(options.framework, place, expected, undisturbed)
    print(
        f"{options.framework}: {killed} kills, {in_checkpoint} in a checkpoint, in {runs} runs of {STEPS} steps: "
        f"{lost} runs lost, {len(different)} differences {different[:5] or ''}".rstrip()
    )
    sys.exit(bool(lost or different))


if __name__ == "__main__":
    main()
