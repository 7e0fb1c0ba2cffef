"""Random runs of ``adafactor.keras``, on the backend of this run."""

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import OPTIONS, SHAPES, Parameter, Twin, Values, by_slices, examples, later, options, values

from adafactor.keras import Adafactor

BACKEND = keras.backend.backend()
keras.saving.register_keras_serializable("tests")(by_slices)

pytestmark = pytest.mark.filterwarnings("ignore:Gradients do not exist for variables:UserWarning")
# JAX and TensorFlow compile every operation for every shape.
LISTS = [SHAPES[1:4], SHAPES[4:7], (SHAPES[0], SHAPES[7]), SHAPES[8:10]]
DTYPES = ("float32", "float32", "bfloat16")

gradients = st.lists(values() | values() | values() | st.none(), min_size=1, max_size=3)
calls = st.lists(
    st.one_of(
        st.tuples(st.just("steps"), gradients),
        st.tuples(st.just("steps"), gradients),
        st.tuples(st.just("lr"), st.sampled_from(OPTIONS["learning_rate"])),
        st.tuples(st.just("reload"), st.sampled_from(["store", "weights"])),
        st.tuples(st.just("refuse"), st.sampled_from(["shape", "count", "store"])),
    ),
    min_size=3,
    max_size=8,
)


def numpy_of(variable):
    return np.array(keras.ops.convert_to_numpy(keras.ops.cast(variable, "float32")), np.float64)


class Run:
    """An optimizer, its variables and their twins; one method per call that is drawn."""

    def __init__(self, drawn, chosen, accumulation):
        self.decay = chosen["weight_decay"]
        self.accumulation = accumulation
        self.twins = [Twin(p, chosen) for p in drawn]
        self.variables = [
            keras.Variable(np.asarray(t.x, np.float32), dtype=p.dtype, name=f"v{k}")
            for k, (t, p) in enumerate(zip(self.twins, drawn, strict=True))
        ]
        self.lr = float(np.float32(chosen["learning_rate"]))
        self.optimizer = Adafactor(**chosen, gradient_accumulation_steps=accumulation)
        self.optimizer.build(self.variables)
        self.called, self.sums = 0, [None] * len(drawn)

    def bits(self):
        return [numpy_of(v).tobytes() for v in (*self.variables, *self.optimizer.variables)]

    def steps(self, drawn):
        for count in range(3):
            self.step([later(recipe, count) for recipe in drawn])

    def step(self, drawn):
        recipes = [drawn[k % len(drawn)] for k in range(len(self.twins))]
        if self.accumulation:  # Keras leaves what None has accumulated for later
            recipes = [recipe or Values("zero", 0, 0) for recipe in recipes]
        arrays, grads = [], []
        for k, (recipe, twin) in enumerate(zip(recipes, self.twins, strict=True)):
            shape, dtype = twin.parameter.shape, twin.parameter.dtype
            g = None if recipe is None else Values(recipe.kind, recipe.exponent, recipe.seed + k).of(shape, dtype)
            arrays.append(g)
            grads.append(None if g is None else keras.ops.convert_to_tensor(np.asarray(g, np.float32), dtype=dtype))
        before = self.bits()
        if all(g is None for g in arrays):
            with pytest.raises(ValueError, match="No gradients"):
                self.optimizer.apply(grads, self.variables)
            assert self.bits() == before
            return
        self.called += 1
        if self.accumulation:
            total = [g if s is None else np.float32(s) + np.float32(g) for s, g in zip(self.sums, arrays, strict=True)]
            self.sums = [np.asarray(each, np.float64) for each in total]
            if self.called % self.accumulation:
                self.optimizer.apply(grads, self.variables)
                count = len(self.variables)
                assert self.bits()[:count] == before[:count], "a variable moved before all gradients were there"
                return
            arrays, self.sums = [np.asarray(s / self.accumulation) for s in self.sums], [None] * len(self.sums)
        expected = []
        for twin, g in zip(self.twins, arrays, strict=True):
            twin.state.t = self.called // (self.accumulation or 1) - 1  # one count for all
            asked = g is not None and g.size and not twin.lost
            expected.append(twin.expect(g, self.lr, self.lr * self.decay, decay_first=True) if asked else None)
        self.optimizer.apply(grads, self.variables)
        after = self.bits()
        for k, (twin, update) in enumerate(zip(self.twins, expected, strict=True)):
            if update is None:
                assert arrays[k] is not None or after[k] == before[k], "a variable without a gradient was written"
                continue
            held = dict(self.optimizer._slots[k])
            if twin.hp.momentum is not None:
                held["momentum"] = self.optimizer._momentums[k]
            assert all(keras.backend.standardize_dtype(slot.dtype) == "float32" for slot in held.values())
            if update.overflow:
                twin.lost = True
                continue
            held = {name: numpy_of(slot) for name, slot in held.items()}
            twin.judge(update, numpy_of(self.variables[k]), held, ulps=0.5001)
        assert int(self.optimizer.iterations) == self.called // (self.accumulation or 1)

    def lr_(self, value):
        self.optimizer.learning_rate = value
        self.lr = float(np.float32(value))

    def reload(self, how):
        before, store = self.bits(), {}
        fresh = Adafactor.from_config(self.optimizer.get_config())
        fresh.build(self.variables)
        if how == "store":
            self.optimizer.save_own_variables(store)
            fresh.load_own_variables(store)
        else:
            fresh.set_weights([np.array(keras.ops.convert_to_numpy(v)) for v in self.optimizer.variables])
        self.optimizer = fresh
        assert self.bits() == before

    def refuse(self, what):
        before = self.bits()
        grads = [keras.ops.ones(v.shape, v.dtype) for v in self.variables]
        if what == "shape":
            grads[-1] = keras.ops.ones((*self.variables[-1].shape, 2))
            with pytest.raises(ValueError, match="the gradient of"):
                self.optimizer.apply(grads, self.variables)
        elif what == "count":
            with pytest.raises(ValueError, match="grads must be"):
                self.optimizer.apply(grads[:-1], self.variables)
        else:
            store = {}
            self.optimizer.save_own_variables(store)
            last = max((name for name in store if name.isdigit()), key=int)
            store[last] = np.zeros((*store[last].shape, 2))
            with pytest.raises(ValueError, match="the saved"):
                self.optimizer.load_own_variables(store)
        assert self.bits() == before


@examples(120 if BACKEND == "torch" else 15)
@given(
    shapes=st.sampled_from(LISTS),
    starts=st.lists(values(), min_size=3, max_size=3),
    chosen=options(),
    accumulation=st.sampled_from([None, None, None, 2]),
    order=calls,
)
def test_any_run(shapes, starts, chosen, accumulation, order):
    dtypes = ("float32",) * 3 if accumulation else DTYPES
    drawn = [Parameter(*each) for each in zip(shapes, dtypes, starts, strict=False)]
    run = Run(drawn, chosen, accumulation)
    for call, argument in order:
        getattr(run, "lr_" if call == "lr" else call)(argument)
