"""The function ``adafactor`` with optax's arguments, checked and translated."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adafactor.core.errors import message
from adafactor.core.factoring import Factoring, Shape
from adafactor.core.hyperparameters import Hyperparameters, RelativeStep, in_range, plain
from adafactor.optax.state import AdafactorState
from adafactor.optax.trees import Tree
from adafactor.optax.update import Roles, Transformation

Numeric = Any  # a number, or a scalar array under optax.inject_hyperparams
ScalarOrSchedule = Any

# Not an int: `optax.inject_hyperparams` traces those, and whether a parameter is factored cannot wait for a value.
_MIN_DIM: int = np.int64(128)  # type: ignore[assignment]

_VOCABULARY = {
    "epsilon_1": "eps",
    "epsilon_2": "min_parameter_scale",
    "clip_threshold": "clipping_threshold",
    "beta_1": "momentum",
    "beta_2_max": "decay_rate_max",
    "scale_parameter": "multiply_by_parameter_scale",
}


class Adafactor(optax.GradientTransformationExtraArgs):
    """An ``optax.GradientTransformationExtraArgs`` with two functions more.

    ``step(params, grads, state) -> (params, state)`` is ``update`` followed by ``optax.apply_updates``. Jitted with
    parameters and state donated, ``jax.jit(optimizer.step, donate_argnums=(0, 2))`` or inside a training step that
    donates them, it updates both in place: it never holds an update. A low-precision parameter is rounded once, not
    twice.

    ``effective_lr(params, state)`` is the step size that the next update of every parameter will have (eqs. 8 and 9), a
    tree like the parameters' of scalars, or of one number per slice of the batch axes.
    """

    __slots__ = ()  # two functions and nothing else, so that it goes through a pytree, a copy and a pickle as they do

    @property
    def step(self) -> Callable[[Tree, Tree, AdafactorState], tuple[Tree, AdafactorState]]:
        return self._own("step").step

    @property
    def effective_lr(self) -> Callable[[Tree, AdafactorState], Tree]:
        return self._own("effective_lr").effective_lr

    def _own(self, name: str) -> Transformation:
        transformation = getattr(self.update, "__self__", None)
        if not isinstance(transformation, Transformation):
            raise AttributeError(f"An Adafactor with another update than its own has no {name}: call update.")
        return transformation


def adafactor(
    learning_rate: ScalarOrSchedule | None = None,
    min_dim_size_to_factor: int = _MIN_DIM,
    decay_rate: Numeric = 0.8,
    decay_offset: Numeric = 0,
    multiply_by_parameter_scale: bool = True,
    clipping_threshold: Numeric | None = 1.0,
    momentum: Numeric | None = None,
    dtype_momentum: Any = "float32",
    weight_decay_rate: ScalarOrSchedule | None = None,
    eps: Numeric = 1e-30,
    factored: bool = True,
    weight_decay_mask: Tree | Callable[[Tree], Tree] | None = None,
    *,
    decay_rate_max: Numeric | None = None,
    relative_step: RelativeStep = False,
    min_parameter_scale: Numeric = 1e-3,
    factoring: Factoring | Tree = "largest_two",
    batch_axes: Shape | Tree = (),
    shardings: Tree | None = None,
    diagnostics: bool = False,
) -> Adafactor:
    """Adafactor with the arguments, the order and the defaults of ``optax.adafactor``.

    Args:
        learning_rate: a number, or a schedule of the number of updates made; ``None`` is 1. Multiplied by the
            parameter's root mean square unless ``multiply_by_parameter_scale=False`` (eq. 9).
        min_dim_size_to_factor: leave a parameter unfactored when either side of its matrix is smaller.
        decay_rate: exponent of the second-moment decay, at least 0: beta(t) = 1 - t**-decay_rate (eq. 1). Not beta.
        decay_offset: t counts from this update on; t is 1 until then.
        multiply_by_parameter_scale: multiply the learning rate by max(min_parameter_scale, RMS(parameter)).
        clipping_threshold: largest root mean square of an update before the learning rate (eq. 10); ``None``
            switches clipping off.
        momentum: average of the updates, learning rate and parameter scale included, as in optax: a new learning
            rate takes effect gradually. It keeps one number per weight.
        dtype_momentum: dtype in which it is kept.
        weight_decay_rate: every update decays the parameter by this fraction of itself; a number or a schedule.
            As in optax it is *not* multiplied by the learning rate. For decay in proportion to the learning rate
            pass a schedule: ``lambda count: 0.1 * learning_rate(count)``.
        eps: added to every squared gradient (eqs. 2, 3, 11).
        factored: ``False`` keeps the whole second moment of every parameter.
        weight_decay_mask: a tree of booleans like the parameters, or a prefix of one, or a callable that makes it
            from the parameters: which of them decay.
        decay_rate_max: upper bound of beta(t), in [0, 1].
        relative_step: ``True`` caps a constant learning rate at 1/sqrt(t), ``"always"`` a schedule too (eq. 8).
        min_parameter_scale: least parameter scale.
        factoring: which axes become rows and columns: ``"largest_two"``, ``"last_two"``, ``"smallest"`` (the cut of
            the shape in two that keeps the fewest numbers), a callable ``(path, shape) -> Factored | None``, or a
            tree of ``adafactor.Factored`` or ``None`` like the parameters, or a prefix of one.
        batch_axes: axes of stacked layers or experts, for all parameters or as a tree of tuples like the parameters,
            or a prefix of one. They are never factored over, and clipping and parameter scale are taken per slice.
        shardings: a tree of ``jax.sharding.NamedSharding`` like the parameters: the step then runs on shards,
            with the sums of the whole model in one all-reduce where every matrix is split along one axis. Parameters
            on a mesh of Explicit axes need no such tree; on Auto axes a step without it is as exact, with
            the all-reduces that XLA puts in.
        diagnostics: keep ``AdafactorState.diagnostics``: three numbers of every update per parameter.

    Updates have the parameter's dtype. Parameters may be of any real floating dtype. Behind
    ``optax.inject_hyperparams``, name what decides shapes in ``static_args``: ``min_dim_size_to_factor``,
    ``batch_axes``, a callable ``factoring``.

    Reference: Shazeer and Stern, 2018, https://arxiv.org/abs/1804.04235, Algorithms 4 to 6; ``docs/algorithm.md``.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range, ``params`` are missing where they are
            needed, or a parameter is not of a real floating dtype.
    """
    hp = _hyperparameters(
        decay_rate,
        epsilon_1=eps,
        epsilon_2=min_parameter_scale,
        clip_threshold=clipping_threshold,
        relative_step=relative_step,
        beta_1=momentum,
        beta_2_max=decay_rate_max,
        scale_parameter=multiply_by_parameter_scale,
    )
    policy = factoring if _flag("factored", factored) else _unfactored
    transformation = Transformation(
        hp,
        Roles(policy, _known(min_dim_size_to_factor), batch_axes),
        _number("learning_rate", learning_rate, "Pass a number, a schedule or None.", low=-math.inf),
        _number("weight_decay_rate", weight_decay_rate, "Pass None to switch it off."),
        weight_decay_mask,
        _number("decay_offset", decay_offset, "It is a number of updates.", low=-math.inf),
        _momentum_dtype(dtype_momentum),
        shardings,
        _flag("diagnostics", diagnostics),
    )
    return Adafactor(transformation.init, transformation.update)


def _unfactored(path: str, shape: Shape) -> None:
    """The factoring that keeps the whole second moment of every parameter."""


def _hyperparameters(decay_rate: Any, **others: Any) -> Hyperparameters:
    decay_rate = _number("decay_rate", decay_rate, "The paper uses 0.8; beta(t) is 1 - t**-decay_rate.")
    if decay_rate is None:
        raise TypeError(message("decay_rate", "a number", decay_rate, "The paper uses 0.8."))
    others = {name: _known(value) for name, value in others.items()}
    return Hyperparameters(beta_2_decay=-decay_rate, **others, vocabulary=_VOCABULARY)


def _known(value: Any) -> Any:
    """A Python number of an array of one whose value is known; what is traced stays so, of shape ()."""
    if not isinstance(value, jax.Array) or value.size != 1:
        return plain(value)
    return value.reshape(()) if isinstance(value, jax.core.Tracer) else value.item()


def _number(argument: str, value: Any, remedy: str, low: float = 0.0) -> Any:
    value = _known(value)
    if value is None or callable(value):
        return value
    ok = in_range(value, low, math.inf)
    if ok is None:
        raise TypeError(message(argument, "a number", value, remedy))
    if not ok:
        rule = "finite" if low == -math.inf else f">= {low:g} and finite"
        raise ValueError(message(argument, rule, value, remedy))
    return value


def _flag(argument: str, value: Any) -> bool:
    value = plain(value)
    if not isinstance(value, bool):
        raise TypeError(message(argument, "True or False", value, "Name it in static_args of inject_hyperparams."))
    return value


def _momentum_dtype(dtype: Any) -> Any:
    if isinstance(dtype, jax.Array):  # inject_hyperparams takes jnp.bfloat16, which can be called, for a schedule
        remedy = 'Write it as a string: dtype_momentum="bfloat16".'
        raise TypeError(message("dtype_momentum", "a dtype", dtype, remedy))
    dtype = jnp.dtype("float32" if dtype is None else dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(message("dtype_momentum", "a floating dtype", dtype.name, 'The default is "float32".'))
    return dtype
