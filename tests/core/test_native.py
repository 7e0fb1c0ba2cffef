"""The native kernels against the oracle, and against themselves on other threads and instruction sets."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from native_support import need
from tolerances import TOLERANCES

from adafactor import Factored, Hyperparameters, Layout, layout
from adafactor.core import native, reference, rounding
from adafactor.core.canonical import Canonical, canonical

need(native.why_not(), allow_module_level=True)

DTYPE = {
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
SUPPORTED = native.info().supported


FLAGS = ("scale_after_decay", "maximize", "skip_nonfinite", "stochastic_rounding")


@dataclass
class Model:
    """A list of NumPy parameters that the kernels train. ``options``: of ``Table.configure``."""

    layouts: list[Layout]
    hp: Hyperparameters = field(default_factory=Hyperparameters)
    dtype: str = "float32"
    grad_dtype: str = ""
    momentum_dtype: str = "float32"
    scale: float = 0.1
    learning_rate: float = 0.05
    options: dict[str, Any] = field(default_factory=dict)
    columns_first: bool = False
    t: int = 0

    def __post_init__(self) -> None:
        rng = np.random.default_rng(0)
        self.grad_dtype = self.grad_dtype or self.dtype
        wide = "float64" if self.dtype == "float64" else "float32"
        forms = [canonical(one) for one in self.layouts]
        assert None not in forms
        transposed = self.columns_first
        self.table = native.Table([form._replace(columns_first=transposed and form.factored) for form in forms if form])
        self.x = [np.array(rng.normal(size=one.shape) * self.scale, DTYPE[self.dtype]) for one in self.layouts]
        self.state = [{name: np.zeros(shape, wide) for name, shape in one.slots.items()} for one in self.layouts]
        self.momentum = [np.zeros(one.shape, DTYPE[self.momentum_dtype]) for one in self.layouts]
        for k, x in enumerate(self.x):
            self.table.bind(
                k,
                param=x.ctypes.data,
                param_dtype=self.dtype,
                second_moment={name: array.ctypes.data for name, array in self.state[k].items()},
                momentum=self.momentum[k].ctypes.data if self.hp.momentum else 0,
                momentum_dtype=self.momentum_dtype,
                grad_dtype=self.grad_dtype,
            )

    def prepare(self, grads: list[np.ndarray], **options: Any) -> None:
        self.t += 1
        if self.grad_dtype == "float16":
            grads = [np.clip(g, -6e4, 6e4) for g in grads]
        self.grads = [np.array(g, DTYPE[self.grad_dtype], order="C") for g in grads]
        self.table.records["grad"] = [g.ctypes.data for g in self.grads]
        said = self.options | options
        flags = sum(getattr(native, name.upper()) for name in FLAGS if said.get(name))
        self.table.configure(self.hp, flags=flags, seed=said.get("seed", 0))
        numbers = {name: said[name] for name in ("decay_factor", "q_known") if name in said}
        rho = self.hp.rho(self.learning_rate, self.t)
        self.table.begin(self.t, self.hp.decay(self.t), rho, **numbers)

    def step(self, grads: list[np.ndarray], threads: int = 2, isa: str | None = None, **options: Any) -> None:
        self.prepare(grads, **options)
        self.table.run("step", threads, isa=isa)

    def stored(self) -> bytes:
        arrays = [*self.x, *self.momentum, *(array for state in self.state for array in state.values())]
        return b"".join(array.tobytes() for array in arrays)

    def everything(self) -> bytes:
        return self.stored() + b"".join(Q.tobytes() for Q in self.table.Q)


def gradients(layouts: list[Layout], seed: int, zero: bool = False) -> list[np.ndarray]:
    """Gradients whose rows and columns differ in scale, some of them nothing but zeros."""
    rng = np.random.default_rng(seed)
    grads = []
    for one in layouts:
        g = rng.normal(size=one.shape)
        for axis, size in enumerate(one.shape):
            factor = 10.0 ** rng.uniform(-2, 2, size)
            factor[rng.random(size) < (0.2 if zero else 0)] = 0
            g *= factor.reshape([-1 if a == axis else 1 for a in range(len(one.shape))])
        grads.append(np.asarray(g))
    return grads


TOLERANCE: dict[str, Any] = TOLERANCES["native"]


def error(x: np.ndarray, expected: np.ndarray) -> float:
    x, expected = np.asarray(x, np.float64), np.asarray(expected, np.float64)
    return float(np.max(np.abs(x - expected), initial=0) / max(np.max(np.abs(expected), initial=0), 1e-30))


def agrees(model: Model, steps: int, tolerance: float, oracle: type = np.float64, **how: Any) -> None:
    """Runs ``model`` beside the oracle. After each step the oracle takes the stored parameter over, so that only
    one rounding to the storage dtype is between them."""
    states = [reference.init(one, model.hp, oracle) for one in model.layouts]
    keep = model.options.get("decay_factor", 1.0)
    sign = -1 if model.options.get("maximize") else 1
    for t in range(1, steps + 1):
        before = [x.astype(oracle) for x in model.x]
        model.step(gradients(model.layouts, t, **how), q_known=t % 2 == 0)
        for k, one in enumerate(model.layouts):
            g = sign * model.grads[k].astype(oracle)
            x = before[k] * keep if model.options.get("scale_after_decay") else before[k]
            if t == 1 or not one.size:
                states[k].t = t - 1
            moved, states[k] = reference.step(x, g, states[k], one, model.hp, model.learning_rate, dtype=oracle)
            if not model.options.get("scale_after_decay"):
                moved = moved - x + keep * x
            assert error(model.x[k], moved) < tolerance, (one, model.dtype, t)
            for name, value in states[k].second_moment.items():
                assert error(model.state[k][name], value) < max(tolerance, 1e-12) * 4, (one, name, t)


SHAPES: list[tuple[tuple[int, ...], dict[str, Any]]] = [
    ((), {}),
    ((1,), {}),
    ((7,), {}),
    ((300_000,), {}),
    ((4, 100), {"batch_axes": (0,)}),
    ((0, 3), {}),
    ((2, 0), {}),
    ((1, 1), {}),
    ((1, 5), {}),
    ((5, 1), {}),
    ((2, 3), {}),
    ((17, 15), {}),
    ((16, 1024), {}),
    ((1024, 16), {}),
    ((9, 1025), {}),
    ((70, 2100), {}),
    ((2100, 300), {}),
    ((300, 2100), {}),
    ((2, 1500, 400), {}),
    ((6, 5, 4), {}),
    ((6, 5, 4), {"batch_axes": (0,)}),
    ((6, 4, 5), {"factoring": "largest_two"}),
    ((40, 3, 3, 50), {"factoring": "largest_two"}),
    ((3, 3, 20, 30), {"factoring": "smallest"}),
    ((8, 4, 3, 3), {}),
    ((3, 2, 5, 1, 6), {"batch_axes": (0,)}),
    ((12, 7), {"factoring": lambda name, shape: Factored(rows=(1,), columns=(0,))}),
    ((3, 12, 2, 7), {"factoring": lambda name, shape: Factored(rows=(3,), columns=(1,), batch=(0,))}),
    ((12, 7), {"factoring": lambda name, shape: None}),
    ((3, 12, 7), {"factoring": lambda name, shape: Factored(batch=(0, 1))}),
]
LAYOUTS = [layout(shape, **rule) for shape, rule in SHAPES]
SMALL = [one for one in LAYOUTS if one.size < 30_000]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("zero", [False, True])
def test_agrees_with_the_oracle(dtype: str, zero: bool) -> None:
    agrees(Model(LAYOUTS, dtype=dtype), 3, TOLERANCE[dtype], zero=zero)


@pytest.mark.parametrize(
    ("hp", "options"),
    [
        ({"scale_parameter": False}, {}),
        ({"clip_threshold": None}, {}),
        ({"clip_threshold": 0.3, "epsilon_2": 10.0}, {}),
        ({"epsilon_1": 0.0}, {}),
        ({"beta_2_max": 0.5, "relative_step": False}, {}),
        ({"beta_1": 0.9}, {}),
        ({}, {"decay_factor": 0.9}),
        ({}, {"decay_factor": 0.9, "scale_after_decay": True}),
        ({"beta_1": 0.9}, {"maximize": True, "decay_factor": 0.99}),
        ({}, {"maximize": True, "skip_nonfinite": True}),
    ],
)
def test_agrees_for_every_option(hp: dict[str, Any], options: dict[str, Any]) -> None:
    for dtype in ("float32", "float64"):
        model = Model(SMALL, Hyperparameters(**hp), dtype, options=options, momentum_dtype=dtype)
        agrees(model, 3, TOLERANCE[dtype], zero="epsilon_1" in hp)


@pytest.mark.parametrize("grad_dtype", list(DTYPE))
@pytest.mark.parametrize("dtype", list(DTYPE))
def test_agrees_for_every_pair_of_dtypes(dtype: str, grad_dtype: str) -> None:
    hp = Hyperparameters(beta_1=0.9)
    model = Model(SMALL, hp, dtype, grad_dtype, momentum_dtype="float64" if dtype == "float64" else "float32")
    agrees(model, 3, TOLERANCE[dtype])


def test_momentum_in_bfloat16() -> None:
    hp = Hyperparameters(beta_1=0.9)
    narrow, full = Model(SMALL, hp, momentum_dtype="bfloat16"), Model(SMALL, hp)
    for t in range(1, 6):
        for model in (narrow, full):
            model.step(gradients(SMALL, t))
    for k in range(len(SMALL)):
        assert error(narrow.momentum[k], full.momentum[k]) < 0.02
        assert error(narrow.x[k], full.x[k]) < 0.01


def test_the_sum_of_squares_is_that_of_the_stored_parameter() -> None:
    for dtype in DTYPE:
        model = Model(SMALL, dtype=dtype, options={"stochastic_rounding": True})
        model.step(gradients(SMALL, 1))
        for x, Q, one in zip(model.x, model.table.Q, SMALL, strict=True):
            whole = tuple(one.whole)
            assert error(Q, np.sum(x.astype(np.float64) ** 2, axis=whole).reshape(-1)) < 1e-6


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_a_known_sum_of_squares_and_one_read_anew_give_the_same_bits(dtype: str) -> None:
    layouts = [*BITS, layout((700, 1100)), layout((3, 40, 700)), layout((700_000,)), layout((30, 5, 7), "largest_two")]
    known, anew = Model(layouts, dtype=dtype), Model(layouts, dtype=dtype)
    for t in range(1, 4):
        known.step(gradients(layouts, t), q_known=t > 1)
        anew.step(gradients(layouts, t), threads=3)
    assert known.everything() == anew.everything()


@pytest.mark.parametrize(
    ("shape", "spec", "form"),
    [
        ((2, 3, 4, 5), Factored((1,), (3,)), Canonical(2, 3, 4, 5, 1, True)),
        ((2, 3, 4, 5), Factored((3,), (1,)), Canonical(2, 3, 4, 5, 1, True, transposed=True)),
        ((2, 3, 4, 5), Factored((2, 3), (0, 1)), Canonical(1, 6, 1, 20, 1, True, transposed=True)),
        ((2, 3, 4, 5), Factored((2,), (3,), (0,)), Canonical(6, 4, 1, 5, 2, True)),
        ((2, 3, 4, 5), Factored((1,), (3,), (0, 2)), None),  # batch inside the matrix
        ((2, 3, 4, 5), Factored((2,), (3,), (1,)), None),  # batch behind a stack
        ((2, 3, 4, 5), Factored((0, 2), (1, 3)), None),  # interleaved
        ((2, 3, 4, 5), Factored((0,), (2,)), None),  # a stack inside the inner side
        ((2, 1, 4, 1), Factored((0,), (2,)), Canonical(1, 2, 1, 4, 1, True)),
        ((3, 4), Factored(batch=(0,)), Canonical(3, 1, 1, 4, 3, False)),
        ((3, 4), Factored(batch=(1,)), None),
        ((), Factored(), Canonical(1, 1, 1, 1, 1, False)),
    ],
)
def test_canonical_forms(shape: tuple[int, ...], spec: Factored, form: Canonical | None) -> None:
    assert canonical(layout(shape, lambda name, shape: spec)) == form


BITS = [layout(s, **r) for s, r in [((2100, 300), {}), ((300_000,), {}), ((700, 1100), {}), ((6, 300, 200), {})]]
BITS += [layout((5, 200, 150), batch_axes=(0,)), *(one for one in SMALL if one.size < 5000)]


@pytest.mark.parametrize("dtype", list(DTYPE))
@pytest.mark.parametrize("stochastic", [False, True])
def test_same_bits_for_any_threads_and_instruction_set(dtype: str, stochastic: bool) -> None:
    def run(threads: int, isa: str) -> bytes:
        hp = Hyperparameters(beta_1=0.9 if stochastic else None)
        model = Model(BITS, hp, dtype, momentum_dtype="bfloat16", options={"stochastic_rounding": stochastic})
        for t in (1, 2):
            model.step(gradients(BITS, t), threads, isa)
        return model.everything()

    expected = run(1, "baseline")
    for threads, isa in [(2, "baseline"), (7, "baseline"), *((n, isa) for isa in SUPPORTED[1:] for n in (1, 7))]:
        assert run(threads, isa) == expected, (threads, isa)


@pytest.mark.parametrize("isa", SUPPORTED)
def test_conversions_of_every_half(isa: str) -> None:
    """Without learning rate a step stores what it read: all 65,536 bit patterns, and floats on their way there."""
    for dtype, quiet in (("float16", 0x0200), ("bfloat16", 0x0040)):
        model = Model([layout((65536,))], Hyperparameters(scale_parameter=False), dtype, learning_rate=0.0)
        patterns = np.arange(65536, dtype=np.uint16)
        model.x[0].view(np.uint16)[...] = patterns
        model.step([np.ones(65536)], isa=isa)
        nan = np.isnan(patterns.view(DTYPE[dtype]).astype(np.float32))
        np.testing.assert_array_equal(model.x[0].view(np.uint16), np.where(nan, patterns | quiet, patterns))

        # x * keep is a float32 product, then rounded to nearest.
        model = Model([layout((65536,))], Hyperparameters(scale_parameter=False), dtype, learning_rate=0.0)
        model.x[0].view(np.uint16)[...] = patterns
        keep = np.float32(1.2345)
        model.step([np.ones(65536)], isa=isa, decay_factor=float(keep))
        with np.errstate(over="ignore", invalid="ignore"):
            expected = (patterns.view(DTYPE[dtype]).astype(np.float32) * keep).astype(DTYPE[dtype])
        np.testing.assert_array_equal(model.x[0].view(np.uint16)[~nan], expected.view(np.uint16)[~nan])
        assert np.isnan(model.x[0].astype(np.float32)[nan]).all()


@pytest.mark.parametrize("isa", SUPPORTED)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_stochastic_rounding_is_the_one_defined(dtype: str, isa: str) -> None:
    model = Model([layout((65536,))], Hyperparameters(scale_parameter=False), dtype, learning_rate=0.0)
    model.x[0].view(np.uint16)[...] = np.arange(65536, dtype=np.uint16)
    wide = model.x[0].astype(np.float32)
    model.table.records["rng_stream"] = 11
    model.table.records["column_offset"] = (1 << 32) - 1000  # the lower half of the index wraps inside
    keep = np.float32(0.98765)
    model.step([np.ones(65536)], isa=isa, decay_factor=float(keep), stochastic_rounding=True, seed=(5 << 32) + 3)
    index = np.arange(65536, dtype=np.uint64) + np.uint64((1 << 32) - 1000)
    bits = rounding.random_bits((5 << 32) + 3, 1, 11, index)
    with np.errstate(invalid="ignore"):  # signalling NaN
        expected = getattr(rounding, dtype)(wide * keep, bits)
    nan = np.isnan(wide)
    np.testing.assert_array_equal(model.x[0].view(np.uint16)[~nan], expected[~nan])
    stored = model.x[0].astype(np.float32)
    assert np.isnan(stored[nan]).all()
    assert np.isfinite(stored[np.isfinite(wide)]).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("value", [1.0 + 1 / 1024 / 3, -0.1, 3e-6, 1.1e-7])
def test_stochastic_rounding_is_right_on_average(dtype: str, value: float) -> None:
    n = 200_000
    x = np.full(n, value, np.float32)
    drawn = getattr(rounding, dtype)(x, rounding.random_bits(1, 1, 0, np.arange(n))).view(DTYPE[dtype])
    drawn = drawn.astype(np.float64)
    values = np.unique(drawn)
    assert len(values) == 2
    assert values[0] <= value <= values[1]
    assert abs(drawn.mean() - np.float32(value)) < 5 * (values[1] - values[0]) * 0.5 / np.sqrt(n) + abs(value) * 1e-4


def test_steps_too_small_for_bfloat16_add_up() -> None:
    rng = np.random.default_rng(0)
    one = layout((256, 256))
    hp = Hyperparameters(scale_parameter=False, relative_step=False)
    moves = {}
    for dtype, stochastic in (("float32", False), ("bfloat16", True), ("bfloat16", False)):
        model = Model([one], hp, dtype, learning_rate=1e-5, options={"stochastic_rounding": stochastic})
        start = (rng.normal(size=one.shape) * 0.02).astype(DTYPE["bfloat16"])
        model.x[0][...] = start.astype(DTYPE[dtype])
        for _ in range(200):
            model.step([np.ones(one.shape)])
        moves[dtype, stochastic] = model.x[0].astype(np.float64) - start.astype(np.float64)
    full = moves["float32", False].mean()
    assert abs(moves["bfloat16", True].mean() / full - 1) < 0.02
    assert (moves["bfloat16", False] == 0).mean() > 0.5


def test_random_numbers_are_uniform_and_differ_by_every_word() -> None:
    index = np.arange(100_000)
    base = rounding.random_bits(0, 1, 0, index)
    counts = np.bincount(base >> 24, minlength=256)
    assert abs(counts - len(index) / 256).max() < 6 * np.sqrt(len(index) / 256)
    others = [(1, 1, 0, 0), (1 << 40, 1, 0, 0), (0, 2, 0, 0), (0, 1, 1, 0), (0, 1, 0, 1 << 32)]
    for seed, step, tensor, offset in others:
        other = rounding.random_bits(seed, step, tensor, index + offset)
        agreeing = np.unpackbits((base ^ other).view(np.uint8)).mean()
        assert abs(agreeing - 0.5) < 0.002


@pytest.mark.parametrize("split", ["rows", "columns"])
def test_shards_round_like_the_whole(split: str) -> None:
    one = layout((40, 2, 60), lambda name, shape: Factored((0,), (2,)))
    hp = Hyperparameters(scale_parameter=False, relative_step=False, clip_threshold=None)
    options = {"stochastic_rounding": True, "seed": 9}
    whole = Model([one], hp, "bfloat16", learning_rate=0.0, options=options)
    x, g = whole.x[0].copy(), gradients([one], 1)[0]
    whole.step([g], decay_factor=0.977)
    for part in range(2):
        cut = (slice(20 * part, 20 * part + 20),) if split == "rows" else (..., slice(30 * part, 30 * part + 30))
        shard = Model([layout(x[cut].shape, lambda name, shape: Factored((0,), (2,)))], hp, "bfloat16")
        shard.learning_rate, shard.options = 0.0, options
        shard.x[0][...] = x[cut]
        record = shard.table.records
        record["global_rows"], record["global_columns"] = 40, 60
        record["row_offset" if split == "rows" else "column_offset"] = part * (20 if split == "rows" else 30)
        shard.step([g[cut]], decay_factor=0.977)
        np.testing.assert_array_equal(shard.x[0].view(np.uint16), whole.x[0][cut].view(np.uint16))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_measure_combine_apply_over_shards_of_rows_is_the_whole(dtype: str) -> None:
    shapes, cuts = [(60, 50), (2, 33, 20), (90,), (3, 40)], (0, 1, 0, 1)
    whole = Model([layout(s, batch_axes=(0,) if s == (3, 40) else ()) for s in shapes], dtype=dtype)
    shards = []
    for part in range(3):
        local = [tuple(n // 3 if a == cut else n for a, n in enumerate(s)) for s, cut in zip(shapes, cuts, strict=True)]
        local[3] = (3, 13 if part < 2 else 14)
        layouts = [layout(s, batch_axes=(0,) if s[0] == 3 else ()) for s in local]
        shard = Model(layouts, dtype=dtype)
        shard.table.allocate_sums()
        record = shard.table.records
        record["global_rows"][:2], record["global_size"] = (60, 33), (3000, 1320, 90, 40)
        shards.append(shard)

    def pieces(array: np.ndarray, k: int) -> list[np.ndarray]:
        return np.split(array, [13, 26], 1) if k == 3 else np.split(array, 3, axis=cuts[k])

    for k, x in enumerate(whole.x):
        for shard, piece in zip(shards, pieces(x, k), strict=True):
            shard.x[k][...] = piece
    for t in (1, 2, 3):
        grads = gradients(whole.layouts, t)
        whole.step(grads)
        for part, shard in enumerate(shards):
            shard.prepare([pieces(g, k)[part] for k, g in enumerate(grads)])
            before = shard.stored()
            shard.table.measure(2)
            assert before == shard.stored()
        for name in (dtype,):
            total = sum(shard.table.sums[name] for shard in shards)
            for shard in shards:
                shard.table.sums[name][...] = total
        Q = sum(shard.table._Q for shard in shards)
        for shard in shards:
            shard.table._Q[...] = Q
            shard.table.finish(2)
            shard.table.apply(2)
        for k, x in enumerate(whole.x):
            for shard, piece in zip(shards, pieces(x, k), strict=True):
                assert error(shard.x[k], piece) < (2e-6 if dtype == "float32" else 1e-13)


def test_measure_and_finish_commit_nothing_and_apply_completes_the_step() -> None:
    one, two = Model(SMALL + BITS), Model(SMALL + BITS)
    two.table.allocate_sums()
    for t in (1, 2):
        grads = gradients(one.layouts, t)
        one.step(grads)
        two.prepare(grads)
        before = two.stored()
        two.table.measure(2)
        two.table.finish(2)
        assert before == two.stored()
        two.table.apply(2)
        assert one.everything() == two.everything()


TURNED = [one for one in LAYOUTS if one.factored and (form := canonical(one)) and form.inner == 1]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("zero", [False, True])
def test_columns_first_agrees_with_the_oracle(dtype: str, zero: bool) -> None:
    model = Model(
        TURNED, Hyperparameters(beta_1=0.9 if zero else None), dtype, momentum_dtype=dtype, columns_first=True
    )
    agrees(model, 3, TOLERANCE[dtype], zero=zero)


@pytest.mark.parametrize("grad_dtype", list(DTYPE))
@pytest.mark.parametrize("dtype", list(DTYPE))
def test_columns_first_for_every_pair_of_dtypes(dtype: str, grad_dtype: str) -> None:
    layouts = [one for one in TURNED if one.size < 30_000]
    agrees(Model(layouts, dtype=dtype, grad_dtype=grad_dtype, columns_first=True), 3, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", list(DTYPE))
def test_columns_first_has_the_same_bits_for_any_threads_and_instruction_set(dtype: str) -> None:
    layouts = [layout((2100, 300)), layout((300, 4200)), *TURNED[:12]]

    def run(threads: int, isa: str, known: bool = False) -> bytes:
        model = Model(layouts, dtype=dtype, columns_first=True, options={"stochastic_rounding": True})
        for t in (1, 2):
            model.step(gradients(layouts, t), threads, isa, q_known=known and t > 1)
        return model.everything()

    expected = run(1, "baseline")
    for threads, isa in [(7, "baseline"), *((3, isa) for isa in SUPPORTED[1:])]:
        assert run(threads, isa) == expected, (threads, isa)
    assert run(1, SUPPORTED[-1], known=True) == expected


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_shards_of_columns_are_the_whole(dtype: str) -> None:
    shapes = [(50, 60), (300, 2400), (2, 20, 33)]
    whole = Model([layout(s) for s in shapes], dtype=dtype)
    shards = []
    for part in range(3):
        shard = Model([layout((*s[:-1], s[-1] // 3)) for s in shapes], dtype=dtype, columns_first=True)
        shard.table.allocate_sums()
        shard.table.records["global_columns"] = [s[-1] for s in shapes]
        shard.table.records["global_size"] = [x.size for x in whole.x]
        for k, x in enumerate(whole.x):
            shard.x[k][...] = np.split(x, 3, -1)[part]
        shards.append(shard)
    for t in (1, 2, 3):
        grads = gradients(whole.layouts, t)
        whole.step(grads)
        for part, shard in enumerate(shards):
            shard.prepare([np.split(g, 3, -1)[part] for g in grads])
            shard.table.measure(2)
        sums = sum(shard.table.sums[dtype] for shard in shards)
        Q = sum(shard.table._Q for shard in shards)
        for shard in shards:
            shard.table.sums[dtype][...], shard.table._Q[...] = sums, Q
            shard.table.finish(2)
            shard.table.apply(2)
    tolerance = 2e-6 if dtype == "float32" else 1e-13
    for k in range(len(shapes)):
        assert error(np.concatenate([shard.x[k] for shard in shards], -1), whole.x[k]) < tolerance
        columns = np.concatenate([shard.state[k]["column"] for shard in shards], -1)
        assert error(columns, whole.state[k]["column"]) < tolerance
        assert all(error(shard.state[k]["row"], whole.state[k]["row"]) < tolerance for shard in shards)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_shards_of_rows_and_columns_are_the_whole(dtype: str) -> None:
    # Cut into 2 x 2: neither rows nor columns are whole, so g is read twice, and finished in two parts.
    shapes = [(50, 60), (600, 2400), (3, 20, 32)]
    whole = Model([layout(s) for s in shapes], dtype=dtype)
    cut = {(i, j): lambda a, i=i, j=j: np.split(np.split(a, 2, -2)[i], 2, -1)[j] for i in (0, 1) for j in (0, 1)}
    shards = {}
    for place, part in cut.items():
        shard = shards[place] = Model([layout(part(x).shape) for x in whole.x], dtype=dtype)
        shard.table.allocate_sums()
        shard.table.records["global_rows"] = [s[-2] for s in shapes]
        shard.table.records["global_columns"] = [s[-1] for s in shapes]
        shard.table.records["global_size"] = [x.size for x in whole.x]
        for k, x in enumerate(whole.x):
            shard.x[k][...] = part(x)
    for t in (1, 2, 3):
        grads = gradients(whole.layouts, t)
        whole.step(grads)
        for place, shard in shards.items():
            shard.prepare([cut[place](g) for g in grads])
            shard.table.flag(native.ROW_SUMS, True)
            shard.table.measure(2)
        rows = {i: sum(shards[i, j].table.finished[dtype] for j in (0, 1)) for i in (0, 1)}
        half = len(shards[0, 0].table.sums[dtype]) // 2  # S, then W
        S = {j: sum(shards[i, j].table.sums[dtype][:half] for i in (0, 1)) for j in (0, 1)}
        Q = sum(shard.table._Q for shard in shards.values())
        for (i, j), shard in shards.items():
            shard.table.finished[dtype][...], shard.table.sums[dtype][:half], shard.table._Q[...] = rows[i], S[j], Q
            shard.table.flag(native.ROW_SUMS, False)
            shard.table.flag(native.ROWS_SUMMED | native.MATRIX_SUMS, True)
            shard.table.measure(2)
            assert shard.table.sums[dtype][:half].tobytes() == S[j].tobytes()
            shard.table.finish(2)
        for k, shape in enumerate(shapes):
            sums = {place: shard.table.totals["matrix_sums"][k].reshape(-1, 2) for place, shard in shards.items()}
            mu = (sums[0, 0] + sums[0, 1])[:, 0] / shape[-1]
            u2 = (mu * sum(part[:, 1] for part in sums.values())).sum()
            for shard in shards.values():
                shard.table.totals["mu"][k][...], shard.table.totals["u2"][k][...] = mu, u2
        for shard in shards.values():
            shard.table.flag(native.MATRIX_SUMS, False)
            shard.table.flag(native.TOTALS, True)
            shard.table.finish(2)
            shard.table.apply(2)
            shard.table.flag(native.TOTALS | native.ROWS_SUMMED, False)
    tolerance = 3e-6 if dtype == "float32" else 1e-13
    for place, shard in shards.items():
        i, j = place
        for k, x in enumerate(whole.x):
            assert error(shard.x[k], cut[place](x)) < tolerance
            assert error(shard.state[k]["row"], np.split(whole.state[k]["row"], 2, -1)[i]) < tolerance
            assert error(shard.state[k]["column"], np.split(whole.state[k]["column"], 2, -1)[j]) < tolerance


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_columns_first_leaves_alone_what_is_not_finite(bad: float) -> None:
    layouts = [layout((40, 30)), layout((300, 2100)), layout((7, 5))]
    model = Model(layouts, columns_first=True, options={"skip_nonfinite": True})
    model.step(gradients(layouts, 1))
    before = [[array.copy() for array in (x, *state.values())] for x, state in zip(model.x, model.state, strict=True)]
    grads = gradients(layouts, 2)
    for g in grads[:2]:
        g[3, 2] = bad
    model.step(grads)
    assert model.table.skipped.tolist() == [True, True, False]
    for k, arrays in enumerate(before):
        after = [model.x[k], *model.state[k].values()]
        assert [np.array_equal(a, b) for a, b in zip(arrays, after, strict=True)] == [k < 2] * 3


@pytest.mark.parametrize("one", [layout((6, 4, 3, 5), lambda name, shape: Factored((1,), (3,))), layout((6,))])
def test_columns_come_first_only_where_rows_lie_together(one: Layout) -> None:
    model = Model([one])
    model.table.records["flags"] |= np.uint64(native.COLUMNS_FIRST)
    model.prepare(gradients([one], 1))
    with pytest.raises(RuntimeError, match=r"native step: columns can come first only in a factored tensor"):
        model.table.step()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gradient_that_is_not_finite_leaves_its_tensor_alone(bad: float, dtype: str) -> None:
    layouts = [one for one in SMALL + BITS if one.size]
    hp = Hyperparameters(beta_1=0.9)
    model = Model(layouts, hp, dtype, options={"skip_nonfinite": True})
    model.step(gradients(layouts, 1))
    kept = [model.x[k].copy() for k in range(len(layouts))]
    states = [{n: a.copy() for n, a in state.items()} for state in model.state]
    momenta = [m.copy() for m in model.momentum]
    Q = [q.copy() for q in model.table.Q]
    grads = gradients(layouts, 2)
    rng = np.random.default_rng(1)
    hit = [k for k in range(len(layouts)) if k % 2]
    for k in hit:
        grads[k].reshape(-1)[rng.integers(layouts[k].size)] = bad
    model.step(grads, q_known=True)
    assert model.table.skipped.tolist() == [k in hit for k in range(len(layouts))]
    for k in range(len(layouts)):
        same = model.x[k].tobytes() == kept[k].tobytes()
        assert same == (k in hit) or layouts[k].size < 50
        if k in hit:
            assert model.momentum[k].tobytes() == momenta[k].tobytes()
            assert model.table.Q[k].tobytes() == Q[k].tobytes()
            assert all(model.state[k][n].tobytes() == a.tobytes() for n, a in states[k].items())
    model.step(gradients(layouts, 3))
    assert not model.table.skipped.any()

    # Told to go on, a NaN goes where the equations send it.
    if np.isnan(bad):
        model = Model(layouts, hp, dtype)
        model.step(gradients(layouts, 1))
        model.step(grads)
        assert not model.table.skipped.any()
        assert all(np.isnan(model.x[k].astype(np.float32)).any() == (k in hit) for k in range(len(layouts)))


def elsewhere(model: Model, grads: list[np.ndarray], over_gradients: bool, **options: Any) -> None:
    """A step of ``model`` whose new values go to other buffers, the gradients' where that is asked for."""
    model.prepare(grads, **options)
    kept = [[a.copy() for a in arrays] for arrays in (model.x, model.momentum, model.grads)]
    moved = model.grads if over_gradients else [np.full_like(x, np.nan) for x in model.x]
    averages = [np.full_like(m, np.nan) for m in model.momentum]
    model.table.records["target"] = [a.ctypes.data for a in moved]
    if model.hp.momentum:
        model.table.records["momentum_target"] = [a.ctypes.data for a in averages]
    model.table.run("step", 3)
    unchanged = [model.x, model.momentum] if over_gradients else [model.x, model.momentum, model.grads]
    for arrays, before in zip(unchanged, kept, strict=False):
        assert all(a.tobytes() == b.tobytes() for a, b in zip(arrays, before, strict=True))
    for k, x in enumerate(model.x):
        x[...] = moved[k]
        if model.hp.momentum:
            model.momentum[k][...] = averages[k]


@pytest.mark.parametrize("over_gradients", [False, True], ids=["elsewhere", "over the gradients"])
@pytest.mark.parametrize("dtype", list(DTYPE))
@pytest.mark.parametrize(
    ("hp", "options", "momentum_dtype"),
    [
        ({}, {}, "float32"),
        ({"beta_1": 0.9}, {"decay_factor": 0.99, "scale_after_decay": True}, "float32"),
        ({"beta_1": 0.9}, {"stochastic_rounding": True, "seed": 3, "maximize": True}, "bfloat16"),
        ({"scale_parameter": False, "clip_threshold": None}, {"stochastic_rounding": True}, "float32"),
    ],
)
def test_a_step_that_leaves_its_result_elsewhere_has_the_bits_of_one_in_place(
    dtype: str, hp: dict[str, Any], options: dict[str, Any], momentum_dtype: str, over_gradients: bool
) -> None:
    layouts = [layout(shape, **how) for shape, how in SHAPES]
    layouts = [one for one in layouts if canonical(one)]
    models = [
        Model(layouts, Hyperparameters(**hp), dtype, momentum_dtype=momentum_dtype, options=options) for _ in range(2)
    ]
    for t in range(1, 4):
        grads = gradients(layouts, t)
        models[0].step(grads, q_known=t == 3)
        elsewhere(models[1], grads, over_gradients, q_known=t == 3)
        assert models[0].everything() == models[1].everything()


@pytest.mark.parametrize("over_gradients", [False, True], ids=["elsewhere", "over the gradients"])
def test_what_is_left_alone_is_found_elsewhere_too(over_gradients: bool) -> None:
    layouts = [layout((70, 50)), layout((33,)), layout((300, 500)), layout((8, 8))]
    model = Model(layouts, Hyperparameters(beta_1=0.9), options={"skip_nonfinite": True})
    model.step(gradients(layouts, 1))
    before, grads = model.everything(), gradients(layouts, 2)
    for g in grads:
        g.flat[3] = np.nan
    elsewhere(model, grads, over_gradients)
    assert model.table.skipped.all()
    assert model.everything() == before


@pytest.mark.parametrize("grad_dtype", ["bfloat16", "float64"])
def test_a_target_over_a_gradient_of_another_dtype_is_refused(grad_dtype: str) -> None:
    layouts = [layout((5, 7))]
    model = Model(layouts, grad_dtype=grad_dtype)
    model.prepare(gradients(layouts, 1))
    model.table.records["target"] = model.table.records["grad"]
    with pytest.raises(RuntimeError, match="a target that is the gradient has the gradient's dtype"):
        model.table.step()


def test_a_zero_row_and_a_zero_gradient_take_no_step() -> None:
    for epsilon in (1e-30, 0.0):
        model = Model(SMALL, Hyperparameters(epsilon_1=epsilon))
        before = [x.copy() for x in model.x]
        model.step([np.zeros(one.shape) for one in SMALL])
        assert all((a == b).all() for a, b in zip(model.x, before, strict=True))


def test_groups_with_their_own_numbers() -> None:
    layouts = [layout((20, 30)), layout((5,)), layout((30, 20))]
    model = Model(layouts)
    model.prepare(gradients(layouts, 1))
    counts = np.array([2, 0, 6])
    model.table.records["count"] = counts.ctypes.data + 8 * np.arange(3)
    t = model.table.number()
    hp = Hyperparameters(scale_parameter=False)
    model.table.configure(hp, np.array([0, 2]))
    model.table.begin(t, [hp.decay(each) for each in t.tolist()], 0.1, q_known=np.array([False, False, True]))
    record = model.table.records
    assert record["step"].tolist() == [3, 1, 7]
    np.testing.assert_allclose(record["ema_weight"], [3**-0.8, 1, 7**-0.8])
    assert (record["flags"] & native.SCALE_PARAMETER > 0).tolist() == [False, True, False]
    assert (record["flags"] & native.Q_KNOWN > 0).tolist() == [False, False, True]
    assert (record["flags"] & native.FACTORED > 0).tolist() == [True, False, True]
    model.table.step()
    assert counts.tolist() == [3, 1, 7]


def test_two_python_threads_step_at_the_same_time() -> None:
    def train(results: list[bytes], at: int) -> None:
        model = Model(BITS)
        for t in range(1, 9):
            model.step(gradients(BITS, t), threads=3)
        results[at] = model.everything()

    results = [b""] * 4
    workers = [threading.Thread(target=train, args=(results, at)) for at in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(set(results)) == 1


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(p for p in (os.path.dirname(__file__), *sys.path) if p)
    environment = {**os.environ, "PYTHONPATH": path, **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_fork_in_the_middle_of_training() -> None:
    code = """
import os, sys, test_native as T
model = T.Model(T.BITS)
for t in (1, 2): model.step(T.gradients(T.BITS, t), 3)
child = os.fork()
for t in (3, 4): model.step(T.gradients(T.BITS, t), 3)
if child == 0:
    sys.stdout.write(f"child {hash(model.everything())}\\n"); sys.stdout.flush(); os._exit(0)
assert os.waitpid(child, 0)[1] == 0
sys.stdout.write(f"parent {hash(model.everything())}\\n")  # whole lines, since both may write at once
"""
    done = python(code, PYTHONHASHSEED="0")
    assert done.returncode == 0, done.stderr
    words = dict(line.split() for line in done.stdout.splitlines())
    assert words["child"] == words["parent"]
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("variable", "value", "sentence"),
    [
        ("ADAFACTOR_ISA", "sse9", "ADAFACTOR_ISA must be one of baseline, avx2, avx512, got 'sse9'."),
        ("ADAFACTOR_NUM_THREADS", "0", "ADAFACTOR_NUM_THREADS must be a whole number from 1 to 1024, got '0'."),
        ("ADAFACTOR_NUM_THREADS", "many", "ADAFACTOR_NUM_THREADS must be a whole number from 1 to 1024, got 'many'."),
    ],
)
def test_a_wrong_environment_ends_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, sentence: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        native.info()


def test_the_environment_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAFACTOR_ISA", "baseline")
    monkeypatch.setenv("ADAFACTOR_NUM_THREADS", "3")
    assert (native.info().isa, native.info().threads, native.threads(5)) == ("baseline", 3, 3)
    monkeypatch.delenv("ADAFACTOR_NUM_THREADS")
    assert native.threads(5) == 5


def test_a_missing_library_is_said_and_harmless() -> None:
    code = "from adafactor.core import native; print(native.available(), native.why_not())"
    done = python(code, ADAFACTOR_LIBRARY="/nowhere/libadafactor.so")
    assert done.stdout.startswith("False The native kernels are not built: there is no /nowhere/libadafactor.so.")


def test_import_loads_neither_library_nor_framework() -> None:
    code = """
import sys
import adafactor.core.native as native
assert native._load.cache_info().currsize == 0
assert not {"torch", "jax", "keras"} & set(sys.modules)
"""
    done = python(code)
    assert done.returncode == 0, done.stderr


def test_missing_buffers_are_refused() -> None:
    model = Model([layout((4, 5)), layout((6,)), layout((2,))])
    model.prepare(gradients(model.layouts, 1))
    with pytest.raises(RuntimeError, match=r"native measure: .* buffer is missing"):
        model.table.measure()


def test_a_residual_where_none_belongs_is_refused() -> None:
    for dtype, options in (("float32", {}), ("bfloat16", {"stochastic_rounding": True})):
        model = Model([layout((4, 5))], dtype=dtype, options=options)
        rest = np.zeros(20, np.uint16)
        model.table.records["residual"] = rest.ctypes.data
        before = model.x[0].tobytes()
        with pytest.raises(RuntimeError, match=r"native step: a residual belongs to a bfloat16 or float16 parameter"):
            model.step(gradients(model.layouts, 1))
        assert model.x[0].tobytes() == before
