"""Random runs of an optimizer, and what must hold after every step of them. Knows NumPy and Hypothesis only.

A `Twin` predicts one update from what is stored, in float64 (``core/reference.py``), and then takes over what the
optimizer under test has stored: every step is judged by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ml_dtypes
import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from adafactor import Factored, Hyperparameters, layout
from adafactor.core import reference

#: How many times the usual number of examples and steps to run: ``pytest tests/robustness --times 20``.
TIMES = 1

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float64": np.float64}
KINDS = ("normal", "constant", "one-hot", "zero", "zero rows", "zero columns", "spread")
EXPONENTS = (0, 1, -3, 3, -8, 8, -16, 16, -20, 18, 19, 20, -30, 30)
#: For frameworks that compile for every shape.
SHAPES = ((), (7,), (0,), (3, 4), (1, 6), (5, 1), (4, 0), (2, 4, 3), (2, 0, 3), (3, 1, 4, 5), (2, 1, 3, 2, 4))

# Per update: float32 arithmetic, relative to the largest number of the tensor. Measured: at most 1.1e-6.
TOLERANCE = {"float64": 1e-12, "float32": 5e-6, "bfloat16": 5e-6, "float16": 5e-6}


def examples(count: int) -> settings:
    """The same ``count`` examples in every run, ``TIMES`` times as many on request."""
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
    return settings(
        max_examples=count * TIMES, derandomize=True, deadline=None, database=None, suppress_health_check=slow
    )


# -- what is drawn -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Values:
    """The recipe of an array; numbers from a seed, because drawing each would take most of the time."""

    kind: str
    exponent: int
    seed: int

    def of(self, shape: Sequence[int], dtype: str) -> np.ndarray:
        """Finite numbers of ``dtype``, as float64."""
        rng = np.random.default_rng(self.seed)
        x = np.asarray(rng.normal(size=tuple(shape)))
        if self.kind in ("zero", "one-hot"):
            x[...] = 0
        if self.kind == "one-hot" and x.size:
            x.flat[rng.integers(x.size)] = 1
        if self.kind == "constant":
            x[...] = 1
        if self.kind == "zero rows" and x.ndim > 1:
            x[..., ::2, :] = 0
        if self.kind == "zero columns" and x.ndim:
            x[..., ::2] = 0
        if self.kind == "spread":
            for axis, n in enumerate(x.shape):
                x = x * np.expand_dims(10 ** rng.uniform(-4, 4, n), [a for a in range(x.ndim) if a != axis])
        return stored(x * 10.0**self.exponent, dtype)


def stored(x: np.ndarray, dtype: str) -> np.ndarray:
    """Rounded to the dtype; what it has no finite number for becomes its largest."""
    largest = float(ml_dtypes.finfo(DTYPES[dtype]).max)
    return np.asarray(np.clip(x, -largest, largest)).astype(DTYPES[dtype]).astype(np.float64)


def later(drawn: Values | None, count: int) -> Values | None:
    """The same recipe with other numbers."""
    return None if drawn is None else replace(drawn, seed=drawn.seed + 1000 * count)


def values() -> st.SearchStrategy[Values]:
    return st.builds(Values, st.sampled_from(KINDS), st.sampled_from(EXPONENTS), st.integers(0, 999))


def any_shape() -> st.SearchStrategy[tuple[int, ...]]:
    return st.lists(st.sampled_from((3, 2, 4, 1, 5, 3, 2, 4, 7, 0)), max_size=5).map(tuple)


@dataclass(frozen=True)
class Parameter:
    shape: tuple[int, ...]
    dtype: str
    start: Values


def parameters(
    shapes: st.SearchStrategy[tuple[int, ...]], dtypes: Sequence[str] = ("float32", *DTYPES)
) -> st.SearchStrategy[Parameter]:
    return st.builds(Parameter, shapes, st.sampled_from(dtypes), values())


def by_slices(name: str, shape: tuple[int, ...]) -> Factored:
    """The first axis is one of experts."""
    if len(shape) > 2:
        return Factored(rows=(1,), columns=(2,), batch=(0,))
    return Factored(batch=(0,) if shape else ())


#: In the words of ``Hyperparameters``, and four more.
OPTIONS = {
    "learning_rate": (0.5, 1e-2, 100.0, 1.0, 1e-8, 0.0),
    "beta_2_decay": (-0.8, -0.5, -1.0, -3.0, 0.0),
    "epsilon_1": (1e-30, 1e-8, 1e-3, 0.0),
    "epsilon_2": (1e-3, 1.0, 0.0, 1e-30),
    "clip_threshold": (1.0, 0.25, 1e-3, 100.0, None),
    "relative_step": (True, False, "always"),
    "beta_1": (None, 0.9, 0.5, 0.0),
    "beta_2_max": (None, 0.5, 0.999, 1.0, 0.0),
    "scale_parameter": (True, False),
    "weight_decay": (0.0, 0.01, 0.5),
    "factoring": ("last_two", "largest_two", "smallest", by_slices),
    "min_dim_size_to_factor": (1, 3),
}


def options() -> st.SearchStrategy[dict[str, Any]]:
    """Mostly defaults, which come first, so that what fails shrinks to few arguments."""
    return st.fixed_dictionaries(
        {}, optional={name: st.sampled_from(choices) for name, choices in OPTIONS.items()}
    ).map(lambda drawn: {name: choices[0] for name, choices in OPTIONS.items()} | drawn)


def hyperparameters(chosen: dict[str, Any]) -> Hyperparameters:
    return Hyperparameters(**{name: v for name, v in chosen.items() if name in Hyperparameters.__dataclass_fields__})


# -- what must hold ----------------------------------------------------------------------------------------------------


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x)))) if x.size else 0.0


def largest(*arrays: Any) -> float:
    return max((float(np.max(np.abs(a))) for a in arrays if np.size(a)), default=0.0)


@dataclass
class Expected:
    """One update as it should be.

    Attributes:
        kept, step: the parameter after weight decay and before its step; what the step takes from it.
        limit: largest root mean square of the step, ``None`` without clipping.
        overflow: a sum that a kernel forms has no finite number in its dtype: of gradients ("gradient"), or of the
            parameter, or the new parameter itself ("parameter").
        underflow: a statistic is too small for its relative precision.
    """

    x: np.ndarray
    kept: np.ndarray
    step: np.ndarray
    state: reference.State
    limit: float | None
    overflow: str
    underflow: bool


@dataclass
class Twin:
    """The oracle of one parameter. ``lost`` says that it overflowed as documented: nothing is known of it any more."""

    parameter: Parameter
    options: dict[str, Any]
    momentum_of_steps: bool = False  # optax: momentum averages what the parameter loses, learning rate included
    momentum_dtype: str | None = None  # how it is stored, if not as the statistics are
    x: np.ndarray = field(init=False)
    state: reference.State = field(init=False)
    lost: bool = False

    def __post_init__(self) -> None:
        self.layout = layout(self.parameter.shape, self.options["factoring"], self.options["min_dim_size_to_factor"])
        self.hp = hyperparameters(self.options)
        self.x = self.parameter.start.of(self.parameter.shape, self.parameter.dtype)
        self.state = reference.init(self.layout, self.hp)

    @property
    def statistics(self) -> str:
        return "float64" if self.parameter.dtype == "float64" else "float32"

    @property
    def _momentum_info(self) -> Any:
        return ml_dtypes.finfo(DTYPES[self.momentum_dtype or self.statistics])

    def expect(self, g: np.ndarray, lr: float, decay: float, decay_first: bool = False) -> Expected:
        """The update that follows; ``decay`` is the fraction of itself that the parameter loses besides."""
        t, hp, kept = self.state.t + 1, self.hp, self.x * (1 - decay)
        x = kept if decay_first else self.x
        sums = reference.measure(x, g, self.state, self.layout, hp, t)
        plain = replace(hp, clip_threshold=None, beta_1=None, scale_parameter=False, vocabulary=None)
        u = reference.apply(np.zeros_like(x), g, sums, self.state, self.layout, plain, t, -1.0)[0]
        of_updates = replace(hp, beta_1=None, vocabulary=None) if self.momentum_of_steps else hp
        rho = hp.rho(lr, t)
        # From zero, because a step far smaller than the parameter would be rounded.
        moved, state = reference.apply(np.zeros_like(x), g, sums, self.state, self.layout, of_updates, t, rho)
        loss = -moved
        if self.momentum_of_steps and hp.momentum is not None:
            state.momentum = loss = hp.momentum * self.state.momentum + (1 - hp.momentum) * loss
        size, smallest = self.layout.slice_size, ml_dtypes.finfo(DTYPES[self.statistics]).tiny
        alpha = rho * (max(hp.epsilon_2, np.sqrt(largest(sums.Q) / size)) if hp.scale_parameter else 1.0)
        limit = None
        if hp.clip_threshold is not None:
            before = 0.0 if self.state.momentum is None else rms(self.state.momentum)
            limit = max(before, alpha * hp.clip_threshold) if self.momentum_of_steps else alpha * max(
                before, hp.clip_threshold
            )  # fmt: skip
        bound = 0.03 * float(ml_dtypes.finfo(DTYPES[self.statistics]).max)
        last = 0.99 * float(ml_dtypes.finfo(DTYPES[self.parameter.dtype]).max)
        overflow = ""
        if not max(np.sum(g * g), np.sum(u * u), largest(sums.W), largest(*state.second_moment.values())) < bound:
            overflow = "gradient"
        elif (
            (hp.scale_parameter and not np.sum(np.square(self.x)) < bound)
            or not largest(kept - loss, loss) < last
            or (state.momentum is not None and largest(state.momentum) > 0.99 * self._momentum_info.max)
        ):
            overflow = "parameter"
        # The terms of eqs. 5 and 7 that float32 has no normal number for before eq. 7 multiplies them by mu.
        unseen = 0.0
        if self.layout.factored:
            column = np.expand_dims(state.second_moment["column"], self.layout.rows)
            term = reference.ratio(
                g * g, np.maximum(sums.rows, column) * np.maximum(1.0, np.minimum(sums.rows, column))
            )
            unseen = float(np.sum(np.square(u), where=term < 100 * smallest))
        statistics = np.concatenate([np.ravel(a) for a in state.second_moment.values()])
        tiny = 100 * float(smallest)
        underflow = bool(np.any((statistics > 0) & (statistics < tiny)))
        if unseen > 1e-7 * np.sum(u * u):
            underflow, limit = True, None
        if alpha < tiny * np.sqrt(largest(*state.second_moment.values())):  # alpha r^(-1/2) has no normal number
            underflow = True
        if hp.scale_parameter and hp.epsilon_2**2 < tiny:
            underflow |= bool(np.any((sums.Q > 0) & (sums.Q / size < tiny)))
        return Expected(kept - loss, kept, loss, state, limit, overflow, underflow)

    def judge(self, expected: Expected, x: np.ndarray, state: dict[str, np.ndarray], *, ulps: float) -> None:
        """Compare what is stored after the update with what should be, and take it over.

        Args:
            state: the statistics by name, and ``momentum``; in float64, their dtypes have been checked.
            ulps: rounding errors of the parameter's dtype that are allowed, where it is not that of the arithmetic.
        """
        step = expected.step
        finite = np.isfinite(x).all() and all(np.isfinite(a).all() for a in state.values())
        if expected.overflow:
            self.lost = not finite
        else:
            assert finite, "finite numbers have become infinite"
            dtype, tolerance = self.parameter.dtype, TOLERANCE[self.parameter.dtype]
            info = ml_dtypes.finfo(DTYPES[dtype])
            room = tolerance * largest(self.x, step) + 2 * float(info.smallest_subnormal)
            if dtype != self.statistics:
                room = room + ulps * float(info.eps) * (np.abs(expected.x) + np.abs(step))
            if expected.limit is not None:
                reached = rms(np.maximum(np.abs(expected.kept - x) - room, 0))
                assert reached <= expected.limit * (1 + 1e-4), f"RMS(update) is {reached}, not {expected.limit}"
            if not expected.underflow:
                error = np.abs(x - expected.x)
                assert (error <= room).all(), (
                    f"the parameter is off by {largest(error)}, {largest(error / room)} of allowed"
                )
                for name, value in expected.state.second_moment.items():
                    np.testing.assert_allclose(state[name], value, rtol=tolerance, atol=1e-42, err_msg=name)
                if expected.state.momentum is not None:
                    value = expected.state.momentum
                    info = self._momentum_info
                    near = (tolerance + float(info.eps)) * largest(value, self.state.momentum)
                    near += 2 * float(info.smallest_subnormal)
                    np.testing.assert_allclose(state["momentum"], value, rtol=0, atol=near, err_msg="momentum")
        self.x = x
        momentum = state.get("momentum")
        second_moment = {name: state[name] for name in self.layout.slots}
        self.state = reference.State(second_moment, momentum, self.state.t + 1)
