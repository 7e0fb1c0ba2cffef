"""Random runs of ``adafactor.torch``, on the native kernels and on torch operations."""

import copy
import io
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from native_support import need
from properties import OPTIONS, Twin, Values, any_shape, examples, later, options, parameters, values

from adafactor.core import native
from adafactor.torch import Adafactor

NAMES = {
    "learning_rate": "lr",
    "beta_2_decay": "beta2_decay",
    "clip_threshold": "d",
    "beta_1": "beta1",
    "beta_2_max": "beta2_max",
}
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

extras = st.fixed_dictionaries(
    {},
    optional={
        "maximize": st.booleans(),
        "momentum_dtype": st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
        "rounding": st.sampled_from(["stochastic_rounding", "compensated"]),
        "skip_nonfinite": st.booleans(),
        "diagnostics": st.booleans(),
    },
)
gradients = st.lists(values() | values() | values() | st.none(), min_size=1, max_size=3)
calls = st.lists(
    st.one_of(
        st.tuples(st.just("steps"), gradients),
        st.tuples(st.just("steps"), gradients),
        st.tuples(st.just("nan"), gradients),
        st.tuples(st.just("zero_grad"), st.booleans()),
        st.tuples(st.just("reload"), st.sampled_from(["state_dict", "torch.save", "deepcopy", "pickle"])),
        st.tuples(st.just("lr"), st.sampled_from(OPTIONS["learning_rate"])),
        st.tuples(st.just("add"), parameters(any_shape())),
        st.tuples(st.just("refuse"), st.sampled_from(["lr", "eps", "sparse", "group", "groups", "shape"])),
    ),
    min_size=4,
    max_size=10,
)


class Run:
    """An optimizer, its parameters and their twins; one method per call that is drawn."""

    def __init__(self, drawn, chosen, extra, fused):
        self.chosen, self.extra, self.fused = chosen, dict(extra), fused
        self.rounding = self.extra.pop("rounding", None)
        self.skips = self.extra.get("skip_nonfinite", True)
        stored = str(extra["momentum_dtype"]).removeprefix("torch.") if "momentum_dtype" in extra else None
        self.twin_of = partial(Twin, options=chosen, momentum_dtype=stored)
        self.groups = [[self._parameter(p) for p in drawn]]
        self.twins = [[self.twin_of(p) for p in drawn]]
        self.lr = chosen["learning_rate"]
        self.optimizer = self._optimizer()

    def _parameter(self, drawn):
        return torch.nn.Parameter(self._tensor(drawn.start.of(drawn.shape, drawn.dtype), drawn.dtype))

    def _tensor(self, value, dtype):
        return torch.from_numpy(np.asarray(value)).to(getattr(torch, dtype))

    def _optimizer(self):
        words = {NAMES.get(name, name): value for name, value in self.chosen.items()}
        words["eps"] = (words.pop("epsilon_1"), words.pop("epsilon_2"))
        if self.rounding:
            words[self.rounding] = True
        groups = [{"params": params} for params in self.groups]
        return Adafactor(groups, **words, **self.extra, fused=self.fused)

    @property
    def pairs(self):
        params = [p for group in self.groups for p in group]
        return list(zip(params, [t for group in self.twins for t in group], strict=True))

    def bits(self):
        """Everything that a step may write, as bytes."""

        def of(tensor):
            size = tensor.element_size()
            return tensor.detach().contiguous().view(BITS.get(size, tensor.dtype)).numpy().tobytes()

        return [(of(p), {k: of(v) for k, v in self.optimizer.state.get(p, {}).items()}) for p, _ in self.pairs]

    def steps(self, drawn):
        for count in range(3):
            self.step([later(recipe, count) for recipe in drawn])

    def step(self, drawn, spoil=None):
        """A step from gradients that are drawn for the first parameters and repeat for the others."""
        expected = []
        for k, (param, twin) in enumerate(self.pairs):
            recipe = drawn[k % len(drawn)]
            if recipe is None:
                param.grad = None
                expected.append(None)
                continue
            g = Values(recipe.kind, recipe.exponent, recipe.seed + k).of(twin.parameter.shape, twin.parameter.dtype)
            param.grad = self._tensor(g, twin.parameter.dtype)
            if k == spoil and g.size:
                param.grad.view(-1)[-1] = float("nan")
            if twin.lost or not g.size:
                expected.append(None)
                continue
            if self.extra.get("maximize"):
                g = -g
            expected.append(twin.expect(g, self.lr, self.lr * self.chosen["weight_decay"]))
        before, skipped, state_only = self.bits(), self.optimizer.skipped, self._makes_state_only()
        self.optimizer.step()
        after = self.bits()
        left_alone = 0
        for k, ((param, twin), update) in enumerate(zip(self.pairs, expected, strict=True)):
            if update is None:
                unwritten = param.grad is None or not param.numel()
                assert not unwritten or after[k] == before[k], "a parameter without a gradient was written"
                continue
            state = self.optimizer.state[param]
            if state_only:
                assert after[k][0] == before[k][0]
                assert int(state["step"]) == 0
                continue
            if k == spoil or (update.overflow == "gradient" and int(state["step"]) == twin.state.t):
                if not self.skips:
                    twin.lost = True
                    continue
                assert after[k][0] == before[k][0], "a parameter that was left alone was written"
                if before[k][1]:
                    assert after[k][1] == before[k][1], "the state of a parameter that was left alone was written"
                left_alone += 1
                continue
            if update.overflow and not self.skips:
                twin.lost = True
                continue
            self._judge(param, twin, update)
        if not any(twin.lost for _, twin in self.pairs):
            assert self.optimizer.skipped - skipped == left_alone

    def _makes_state_only(self):
        """Whether the step is one of torch.distributed.checkpoint, which wants state to look at: it does not count."""
        moved = [param for param, _ in self.pairs if param.grad is not None]
        new = all("step" not in self.optimizer.state.get(param, {}) for param in moved)
        return self.lr == 0 and new and not any(param.grad.any() for param in moved)

    def _judge(self, param, twin, update):
        state = self.optimizer.state[param]
        assert state["step"].dtype == torch.int64
        assert int(state["step"]) == twin.state.t + 1
        for name in twin.layout.slots:
            assert state[name].dtype == getattr(torch, twin.statistics)
            assert tuple(state[name].shape) == twin.layout.slots[name]
        held = {name: v.double().numpy().copy() for name, v in state.items() if name not in ("step", "residual")}
        x = param.detach().double().numpy().copy()
        exact = self.rounding is None
        twin.judge(update, x, held, ulps=0.5001 if exact else 2)

    def nan(self, drawn):
        self.step(drawn, spoil=0)

    def zero_grad(self, set_to_none):
        before = self.bits()
        self.optimizer.zero_grad(set_to_none=set_to_none)
        assert self.bits() == before
        for param, _ in self.pairs:
            assert param.grad is None or (not set_to_none and not param.grad.any())

    def lr_(self, value):
        self.lr = value
        for group in self.optimizer.param_groups:
            group["lr"] = value

    def add(self, drawn):
        self.groups.append([self._parameter(drawn)])
        self.twins.append([self.twin_of(drawn)])
        self.optimizer.add_param_group({"params": self.groups[-1], "lr": self.lr})

    def reload(self, how):
        before = self.bits()
        if how == "deepcopy":
            self.groups, self.optimizer = copy.deepcopy((self.groups, self.optimizer))
        elif how == "pickle":
            self.groups, self.optimizer = pickle.loads(pickle.dumps((self.groups, self.optimizer)))
        else:
            packed = self.optimizer.state_dict()
            if how == "torch.save":
                file = io.BytesIO()
                torch.save(packed, file)
                file.seek(0)
                packed = torch.load(file)
            self.optimizer = self._optimizer()
            self.optimizer.load_state_dict(packed)
        assert self.bits() == before
        assert all(group["lr"] == self.lr for group in self.optimizer.param_groups)

    def refuse(self, what):
        """Where every parameter has a gradient and one thing is wrong, nothing moves."""
        group = self.optimizer.param_groups[-1]
        for param, _ in self.pairs:
            param.grad = torch.ones_like(param)
        before, count = self.bits(), len(self.optimizer.param_groups)
        if what in ("lr", "eps"):
            good, group[what] = group[what], {"lr": float("nan"), "eps": (-1.0, 0.0)}[what]
            with pytest.raises(ValueError, match=f"^{what}"):
                self.optimizer.step()
            group[what] = good
        elif what == "sparse":
            param = group["params"][-1]
            if not param.numel():
                return
            param.grad = param.grad.to_sparse()
            with pytest.raises(RuntimeError, match="dense"):
                self.optimizer.step()
        elif what == "group":
            with pytest.raises(ValueError, match=r"^d must be"):
                self.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "d": -1.0})
        elif what == "groups":
            with pytest.raises(ValueError, match="group"):
                self.optimizer.load_state_dict({"state": {}, "param_groups": []})
        else:
            packed = copy.deepcopy(self.optimizer.state_dict())
            slots = [s for s in packed["state"].values() if "step" in s]
            if not slots:
                return
            name = "row" if "row" in slots[-1] else "second_moment"
            slots[-1][name] = torch.zeros(*slots[-1][name].shape, 2)
            with pytest.raises(ValueError, match=name):
                self.optimizer.load_state_dict(packed)
        for param, _ in self.pairs:
            param.grad = None
        assert self.bits() == before
        assert len(self.optimizer.param_groups) == count


@pytest.mark.parametrize("fused", [None, False], ids=["native", "torch operations"])
@examples(150)
@given(drawn=st.lists(parameters(any_shape()), min_size=2, max_size=4), chosen=options(), extra=extras, order=calls)
def test_any_run(fused, drawn, chosen, extra, order):
    if fused is None:
        need(native.why_not())
    run = Run(drawn, chosen, extra, fused)
    for call, argument in order:
        getattr(run, "lr_" if call == "lr" else call)(argument)
