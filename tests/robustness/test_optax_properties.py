"""Random runs of ``adafactor.optax``, on the native kernels and on ``jax.numpy``."""

import pickle
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization
from hypothesis import given
from hypothesis import strategies as st
from native_support import need
from properties import SHAPES, Parameter, Twin, Values, by_slices, examples, largest, later, options, values

from adafactor.engine.xla import custom_call
from adafactor.optax import adafactor

# What is compiled. Everything else is an argument of the compiled function, under jit as inject_hyperparams has it.
PROGRAMS = [
    {"shapes": SHAPES[:4], "form": "update", "clip": True, "scale": True, "momentum": False, "relative_step": False},
    {"shapes": SHAPES[3:7], "form": "step", "clip": True, "scale": True, "momentum": False, "relative_step": True},
    {"shapes": SHAPES[7:9], "form": "update", "clip": False, "scale": False, "momentum": True, "relative_step": False,
     "factoring": by_slices},
    {"shapes": SHAPES[9:], "form": "step", "clip": True, "scale": True, "momentum": True, "relative_step": "always",
     "factoring": "smallest"},
    {"shapes": (SHAPES[3], SHAPES[7]), "form": "step", "clip": False, "scale": False, "momentum": False,
     "relative_step": False, "factoring": "largest_two", "min_dim_size_to_factor": 3},
]  # fmt: skip
DTYPES = ("float32", "bfloat16", "float32", "float16")
gradients = st.lists(values(), min_size=1, max_size=3)
calls = st.lists(
    st.one_of(
        st.tuples(st.just("steps"), gradients),
        st.tuples(st.just("steps"), gradients),
        st.tuples(st.just("reload"), st.sampled_from(["msgpack", "pickle", "numpy"])),
        st.tuples(st.just("refuse"), st.sampled_from(["shape", "params", "structure"])),
    ),
    min_size=3,
    max_size=6,
)


@pytest.fixture(params=["native", "jnp"])
def kernels(request, monkeypatch):
    if request.param == "native":
        need(custom_call.why_not())
    else:
        monkeypatch.setattr(custom_call, "why_not", lambda: "switched off by a test")
    jax.clear_caches()
    compiled.cache_clear()
    yield request.param
    jax.clear_caches()
    compiled.cache_clear()


@cache
def compiled(number, kernels):
    """init, and a step that takes the hyperparameters' numbers as an argument. Once per program and kernels."""
    program = PROGRAMS[number]

    def make(numbers):
        return adafactor(
            min_dim_size_to_factor=np.int64(program.get("min_dim_size_to_factor", 1)),
            multiply_by_parameter_scale=program["scale"],
            relative_step=program["relative_step"],
            factoring=program.get("factoring", "last_two"),
            **numbers,
        )

    @jax.jit
    def step(numbers, params, grads, state):
        optimizer = make(numbers)
        if program["form"] == "step":
            return optimizer.step(params, grads, state)
        updates, state = optimizer.update(grads, state, params)
        assert all(u is None or u.dtype == params[name].dtype for name, u in updates.items())
        return optax.apply_updates(params, updates), state

    return make, step


class Run:
    """A tree of parameters under one transformation, and its twins; one method per call that is drawn."""

    def __init__(self, number, starts, chosen, kernels):
        program = PROGRAMS[number]
        self.form = program["form"]
        chosen |= {name: program[name] for name in program if name in chosen} | {"scale_parameter": program["scale"]}
        chosen["clip_threshold"] = (chosen["clip_threshold"] or 1.0) if program["clip"] else None
        chosen["beta_1"] = (chosen["beta_1"] or 0.9) if program["momentum"] else None
        chosen["beta_2_max"] = 1.0 if chosen["beta_2_max"] is None else chosen["beta_2_max"]  # is no bound either
        chosen["min_dim_size_to_factor"] = program.get("min_dim_size_to_factor", 1)
        chosen["factoring"] = program.get("factoring", "last_two")
        drawn = [Parameter(*each) for each in zip(program["shapes"], DTYPES, starts, strict=False)]
        self.twins = [Twin(p, chosen, momentum_of_steps=True) for p in drawn]
        self.params = {f"p{k}": self._array(t.x, t.parameter.dtype) for k, t in enumerate(self.twins)}
        self.lr, self.decay = chosen["learning_rate"], chosen["weight_decay"]  # not multiplied, as in optax
        numbers = {
            "learning_rate": self.lr,
            "decay_rate": -chosen["beta_2_decay"],
            "clipping_threshold": chosen["clip_threshold"],
            "momentum": chosen["beta_1"],
            "weight_decay_rate": self.decay,
            "eps": chosen["epsilon_1"],
            "decay_rate_max": chosen["beta_2_max"],
            "min_parameter_scale": chosen["epsilon_2"],
        }
        make, step = compiled(number, kernels)
        self.optimizer, self.call = make(numbers), partial(step, numbers)
        self.state = self.optimizer.init(self.params)
        self.count = 0

    def _array(self, value, dtype):
        return jnp.asarray(np.asarray(value, np.float32), dtype)

    def bits(self):
        return [
            (np.asarray(leaf).dtype, np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves((self.params, self.state))
        ]

    def steps(self, drawn):
        for count in range(2):
            self.step([later(recipe, count) for recipe in drawn])

    def step(self, drawn):
        grads, expected = {}, []
        for k, twin in enumerate(self.twins):
            recipe, dtype = drawn[k % len(drawn)], twin.parameter.dtype
            g = Values(recipe.kind, recipe.exponent, recipe.seed + k).of(twin.parameter.shape, dtype)
            grads[f"p{k}"] = self._array(g, dtype)
            expected.append(None if twin.lost or not g.size else twin.expect(g, self.lr, self.decay))
        self.params, self.state = self.call(self.params, grads, self.state)
        for k, (twin, update) in enumerate(zip(self.twins, expected, strict=True)):
            name = f"p{k}"
            assert self.params[name].dtype == twin.parameter.dtype
            if update is None:
                continue
            held = {}
            for slot in (*twin.layout.slots, *([] if twin.hp.momentum is None else ["momentum"])):
                value = getattr(self.state, slot)[name]
                assert value.dtype == jnp.float32
                held[slot] = np.asarray(value, np.float64)
            if update.overflow or self._update_overflows(twin, update):
                twin.lost = True
                continue
            # update() rounds what apply_updates() adds and rounds again
            twin.judge(update, np.asarray(self.params[name], np.float64), held, ulps=1.01)
        self.count += 1
        assert int(self.state.count) == self.count

    def _update_overflows(self, twin, update):
        """Whether the update by itself, which optax's form hands over, has no number in the parameter's dtype."""
        most = 0.99 * float(jnp.finfo(twin.parameter.dtype).max)
        return self.form == "update" and largest(twin.x - update.x) > most

    def reload(self, how):
        before = self.bits()
        if how == "msgpack":
            empty = self.optimizer.init(self.params)
            self.state = serialization.from_bytes(empty, serialization.to_bytes(self.state))
        elif how == "pickle":
            self.params, self.state = pickle.loads(pickle.dumps((self.params, self.state)))
        else:
            leaves, treedef = jax.tree.flatten(self.state)
            self.state = treedef.unflatten([jnp.asarray(np.array(leaf)) for leaf in leaves])
        assert self.bits() == before

    def refuse(self, what):
        before = self.bits()
        grads = {name: jnp.ones_like(value) for name, value in self.params.items()}
        last = f"p{len(self.twins) - 1}"
        if what == "shape":
            grads[last] = jnp.ones((*grads[last].shape, 2))
            with pytest.raises(ValueError, match="a gradient must be"):
                self.call(self.params, grads, self.state)
        elif what == "params":
            with pytest.raises(ValueError, match="params must be"):
                self.optimizer.update(grads, self.state)
        elif what == "structure":
            del grads[last]
            with pytest.raises(ValueError, match="p"):
                self.call(self.params, grads, self.state)
        assert self.bits() == before


@examples(100)
@given(
    number=st.sampled_from(range(len(PROGRAMS))),
    starts=st.lists(values(), min_size=4, max_size=4),
    chosen=options(),
    order=calls,
)
def test_any_run(kernels, number, starts, chosen, order):
    run = Run(number, starts, chosen, kernels)
    for call, argument in order:
        getattr(run, call)(argument)
