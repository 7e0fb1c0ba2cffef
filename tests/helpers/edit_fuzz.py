"""Random edits of parameters, gradients, state and groups between steps, each step right or refused (`edits.check`).

    python tests/helpers/edit_fuzz.py [--edits N] [--seed S]

prints, per kind of edit, how many steps after it were right and how many were refused, and exits 1 at the first
that was neither. Which library the native kernels come from is ADAFACTOR_LIBRARY's to say, as everywhere.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")
sys.path.insert(0, str(Path(__file__).parent))

import torch
from edits import backed, check

from adafactor.torch import Adafactor

SHAPES = [(12, 8), (9,), (2, 6, 5), (40, 30), (), (300,), (1, 7), (8, 12)]
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
AFTER = 12  # edits of one optimizer


class Play:
    """One optimizer and what is done to it. An edit is a method; its random numbers are the fuzz's own."""

    def __init__(self, draw):
        self.draw = draw
        groups = [{"params": [self.parameter() for _ in range(draw.randint(1, 4))]} for _ in range(draw.randint(1, 2))]
        self.optimizer = Adafactor(groups, lr=0.01, fused=draw.choice([None, None, False]), **self.words())

    def words(self):
        draw = self.draw
        return {
            "beta1": draw.choice([None, None, 0.9]),
            "momentum_dtype": draw.choice([None, torch.int8, torch.bfloat16]),
            "compensated": False,
            "d": draw.choice([1.0, None]),
        }

    def parameter(self):
        dtype = self.draw.choice([torch.float32, *FLOATS])
        return torch.nn.Parameter(self.numbers(self.draw.choice(SHAPES), dtype))

    def numbers(self, shape, dtype=torch.float32):
        generator = torch.Generator().manual_seed(self.draw.randrange(2**31))
        return torch.randn(shape, generator=generator).to(dtype)

    @property
    def group(self):
        return self.draw.choice(self.optimizer.param_groups)

    @property
    def param(self):
        return self.draw.choice(self.group["params"])

    def slot(self):
        """A tensor of somebody's state: the dictionary and its key, or nothing."""
        state = self.optimizer.state.get(self.param)
        if not isinstance(state, dict):
            return None
        names = [name for name, value in state.items() if isinstance(value, torch.Tensor)]
        return (state, self.draw.choice(names)) if names else None

    def gradients(self):
        for group in self.optimizer.param_groups:
            for param in group["params"]:
                absent = self.draw.random() < 0.1 or param.is_meta or not param.is_floating_point()
                param.grad = None if absent else self.numbers(param.shape, param.dtype)

    def layout_of(self, tensor):
        """The same numbers, or some of them, in another place or order."""
        kind = self.draw.randrange(6)
        if kind == 0:
            wide = torch.zeros(*tensor.shape, 2, dtype=tensor.dtype)
            wide[..., 0] = tensor
            return wide[..., 0]
        if kind == 1 and tensor.dim() > 1:
            return tensor.transpose(0, -1).contiguous().transpose(0, -1)
        if kind == 2 and tensor.dim():
            return tensor[: self.draw.randrange(1, tensor.shape[0] + 1)]
        if kind == 3 and tensor.dim():
            return tensor[:1].expand(tensor.shape)
        if kind == 4 and tensor.dim():
            return torch.cat([tensor, tensor])
        return tensor.clone()

    # ---- edits

    def nothing(self):
        pass

    def lr(self):
        self.group["lr"] = self.draw.choice([0.1, 1e-3, torch.tensor(0.01)])

    def group_words(self):
        name, value = self.draw.choice(list(self.words().items()))
        self.group[name] = value

    def group_factoring(self):
        self.group["factoring"] = self.draw.choice(["last_two", None])

    def group_fused(self):
        self.group["fused"] = self.draw.choice([None, True, False])

    def new_parameter(self):
        group = self.group
        group["params"][self.draw.randrange(len(group["params"]))] = self.parameter()

    def new_parameter_old_state(self):
        group = self.group
        k = self.draw.randrange(len(group["params"]))
        old, new = group["params"][k], self.parameter()
        if old in self.optimizer.state:
            self.optimizer.state[new] = self.optimizer.state.pop(old)
        group["params"][k] = new

    def parameter_data(self):
        param = self.param
        if backed(param):
            param.data = self.layout_of(param.data)

    def parameter_dtype(self):
        param = self.param
        if backed(param):
            param.data = param.data.to(self.draw.choice(FLOATS))

    def parameter_shape(self):
        self.param.data = self.numbers(self.draw.choice(SHAPES))

    def parameter_resized(self):
        param = self.param
        if backed(param) and param.untyped_storage().resizable():
            param.data.resize_(self.draw.choice(SHAPES))
            with torch.no_grad():
                param.normal_()

    def parameter_storage(self):
        storage = self.param.untyped_storage()
        if storage.resizable():
            storage.resize_(self.draw.randrange(storage.nbytes() + 1))

    def gradient_layout(self):
        param = self.param
        if param.grad is not None:
            grad = self.layout_of(param.grad)
            param.grad = grad if grad.shape == param.shape else None

    def gradient_storage(self):
        param = self.param
        if param.grad is not None:
            bucket = torch.cat([torch.zeros(7, dtype=param.dtype), param.grad.reshape(-1)])
            param.grad = bucket[7:].view(param.shape)
            bucket.untyped_storage().resize_(self.draw.randrange(bucket.nbytes))

    def gradient_kept(self):
        """The gradient stays while the parameter gets another shape or dtype."""
        param = self.param
        shape = self.draw.choice(SHAPES)
        param.data = self.numbers(shape, self.draw.choice(FLOATS))

    def state_dtype(self):
        if found := self.slot():
            state, name = found
            if backed(state[name]):
                state[name] = state[name].to(self.draw.choice([*FLOATS, torch.int8, torch.int64, torch.complex64]))

    def state_layout(self):
        if found := self.slot():
            state, name = found
            if backed(state[name]):
                state[name] = self.layout_of(state[name])

    def state_data(self):
        if found := self.slot():
            state, name = found
            if backed(state[name]):
                state[name].data = self.layout_of(state[name].data)

    def state_resized(self):
        if found := self.slot():
            state, name = found
            if backed(state[name]):
                state[name] = state[name].detach().clone()
                state[name].resize_(self.draw.randrange(1, 400)).fill_(1)

    def state_storage(self):
        if found := self.slot():
            storage = found[0][found[1]].untyped_storage()
            if found[0][found[1]].device.type == "cpu" and storage.resizable():
                storage.resize_(self.draw.randrange(storage.nbytes() + 1))

    def state_value(self):
        if found := self.slot():
            state, name = found
            state[name] = self.draw.choice([None, 3, -2, 2.0, float("nan"), [1.0], "text", torch.tensor(1.0)])

    def state_device(self):
        if found := self.slot():
            found[0][found[1]] = found[0][found[1]].to("meta")

    def state_deleted(self):
        if found := self.slot():
            del found[0][found[1]]

    def state_shared(self):
        if (one := self.slot()) and (other := self.slot()):
            one[0][one[1]] = other[0][other[1]]

    def state_of_another(self):
        a, b = self.param, self.param
        if isinstance(self.optimizer.state.get(b), dict):
            same = self.draw.random() < 0.3
            self.optimizer.state[a] = self.optimizer.state[b] if same else dict(self.optimizer.state[b])

    def state_gone(self):
        self.optimizer.state.pop(self.param, None)

    def state_no_dictionary(self):
        self.optimizer.state[self.param] = self.draw.choice([None, {}, [], 3])

    def count_overwritten(self):
        state = self.optimizer.state.get(self.param)
        step = state.get("step") if isinstance(state, dict) else None
        if isinstance(step, torch.Tensor) and step.dtype == torch.int64 and backed(step):
            step.data.fill_(self.draw.choice([-1, -5, 0, 7, 2**63 - 1, 2**40]))

    def reloaded(self):
        found = [state for state in self.optimizer.state.values() if isinstance(state, dict)]
        if all(isinstance(v, torch.Tensor) and backed(v) for state in found for v in state.values()):
            with suppress(TypeError, ValueError, KeyError):  # torch's, of a parameter that was replaced
                self.optimizer.load_state_dict(self.optimizer.state_dict())


EDITS = [name for name in list(vars(Play))[list(vars(Play)).index("nothing") :] if not name.startswith("__")]
LATE = ("gradient_layout", "gradient_storage", "gradient_kept")  # after the gradients are there


def fuzz(edits, seed):
    """How often each kind of edit was followed by a right step, and by a refusal."""
    draw, found, play, left = random.Random(seed), Counter(), None, 0
    for number in range(edits):
        if not left:
            play, left = Play(draw), AFTER
            for _ in range(2):
                play.gradients()
                play.optimizer.step()
        left -= 1
        name = draw.choice(EDITS)
        try:
            if name in LATE:
                play.gradients()
            with suppress(RuntimeError):  # torch itself refuses some
                getattr(play, name)()
            if name not in LATE:
                play.gradients()
            told = check(play.optimizer)
        except BaseException:
            print(f"seed {seed}, edit {number}: {name}", file=sys.stderr)
            raise
        found[name, told == "right"] += 1
        if told != "right":
            left = 0 if draw.random() < 0.5 else left  # some go on with what was refused
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    found = fuzz(asked.edits, asked.seed)
    print("| edit | right steps | refused |\n|---|---|---|")
    for name in EDITS:
        print(f"| {name} | {found[name, True]} | {found[name, False]} |")
    right = sum(count for (_, good), count in found.items() if good)
    print(f"edits {asked.edits}, kinds {len(EDITS)}, right {right}, refused {asked.edits - right}")


if __name__ == "__main__":
    main()
