"""Adafactor for Keras 3, on TensorFlow, JAX and PyTorch.

from adafactor.keras import Adafactor

model.compile(optimizer=Adafactor(1e-2), loss=...)
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

import keras
import numpy as np
from keras import ops
from keras.src.backend import in_stateless_scope  # not public, and nothing public tells

from adafactor import factoring as _factoring
from adafactor.factoring import Factoring, Layout, Shape, layout
from adafactor.hyperparameters import Hyperparameters, RelativeStep, in_range, message
from adafactor.kernels import array

if keras.backend.backend() == "jax":
    from adafactor.kernels import xla

    _ops, _barrier = xla.ops, xla.barrier
else:
    _ops, _barrier = ops, array.identity

#: Written beside the variables of every saved optimizer. Its absence marks a file of ``keras.optimizers.Adafactor``.
STATE_VERSION = 1
_VERSION_KEY = "state_version"


@keras.saving.register_keras_serializable(package="adafactor")
class Adafactor(keras.optimizers.Optimizer):
    """Optimizer that implements Adafactor with the memory the paper promises.

    A matrix of n rows and m columns keeps n + m numbers, where Adam keeps 2nm. The arguments up to ``name``
    are those of ``keras.optimizers.Adafactor``, in its order and with its defaults.

    Args:
        learning_rate: a float, a ``keras.optimizers.schedules.LearningRateSchedule``, or a callable that takes
            no arguments and returns the value to use. Multiplied by the parameter's root mean square unless
            ``scale_parameter=False``.
        beta_2_decay: exponent of the second-moment decay, at most 0: beta_2(t) = 1 - t**beta_2_decay.
        epsilon_1: added to every squared gradient.
        epsilon_2: least parameter scale.
        clip_threshold: largest root mean square of an update; ``None`` switches update clipping off. It is part of
            Adafactor and independent of ``clipnorm``, ``clipvalue`` and ``global_clipnorm``.
        relative_step: ``True`` caps a constant learning rate at 1/sqrt(t); a schedule or callable is used as
            given. ``False`` never caps. ``"always"`` caps every learning rate, as
            ``keras.optimizers.Adafactor`` does whatever it is told.
        weight_decay: if set, every variable is multiplied by 1 - weight_decay * learning_rate before its step.
        clipnorm, clipvalue, global_clipnorm: gradient clipping by each gradient's norm, by value, by the norm of
            all gradients. At most one may be set.
        use_ema, ema_momentum, ema_overwrite_frequency: exponential moving average of the weights.
        loss_scale_factor: the loss is multiplied by it, the gradients are divided by it.
        gradient_accumulation_steps: update once every so many steps, with the mean gradient.
        name: the optimizer's name; ``None`` picks one.
        beta_1: momentum of the normalised, clipped update, before the learning rate. It keeps one number per
            weight; ``None`` keeps none.
        beta_2_max: upper bound of beta_2(t).
        scale_parameter: multiply the learning rate by max(epsilon_2, RMS(variable)).
        factoring: which axes become rows and columns: ``"last_two"``, ``"largest_two"``, ``"smallest"`` (the cut of
            the shape in two that keeps the fewest numbers), or a callable
            ``(path, shape) -> adafactor.Factored | None``.
        min_dim_size_to_factor: leave a variable unfactored when either side of its matrix is smaller.

    State, in the order of ``optimizer.variables``: ``iteration``, ``learning_rate`` (if it is a constant), the moving
    averages (``use_ema``), the gradient accumulators, then for each trainable variable ``<path>_row`` and
    ``<path>_column``, or ``<path>_second_moment`` where it is not factored, and ``<path>_momentum``
    (``beta_1``). Statistics and momentum are float32, float64 for a float64 variable, whatever the variable's dtype.
    Files written with ``keras.optimizers.Adafactor`` load: row and column are taken over.

    Reference: Shazeer and Stern, 2018, https://arxiv.org/abs/1804.04235, Algorithms 4 to 6; ``docs/algorithm.md``.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range. A gradient whose shape is not its
            variable's is refused before any variable changes.
    """

    built: bool

    def __init__(
        self,
        learning_rate: Any = 0.001,
        beta_2_decay: float = -0.8,
        epsilon_1: float = 1e-30,
        epsilon_2: float = 1e-3,
        clip_threshold: float | None = 1.0,
        relative_step: RelativeStep = True,
        weight_decay: float | None = None,
        clipnorm: float | None = None,
        clipvalue: float | None = None,
        global_clipnorm: float | None = None,
        use_ema: bool = False,
        ema_momentum: float = 0.99,
        ema_overwrite_frequency: int | None = None,
        loss_scale_factor: float | None = None,
        gradient_accumulation_steps: int | None = None,
        name: str | None = None,
        *,
        beta_1: float | None = None,
        beta_2_max: float | None = None,
        scale_parameter: bool = True,
        factoring: Factoring = "last_two",
        min_dim_size_to_factor: int = 1,
        **kwargs: Any,
    ) -> None:
        hyperparameters = Hyperparameters(
            beta_2_decay=beta_2_decay,
            epsilon_1=epsilon_1,
            epsilon_2=epsilon_2,
            clip_threshold=clip_threshold,
            relative_step=relative_step,
            beta_1=beta_1,
            beta_2_max=beta_2_max,
            scale_parameter=scale_parameter,
        )
        _factoring.validate(factoring, min_dim_size_to_factor)
        if not callable(learning_rate):
            learning_rate = float(_number("learning_rate", learning_rate, "Pass a float, a schedule or a callable."))
        for argument, value in (("clipnorm", clipnorm), ("clipvalue", clipvalue), ("global_clipnorm", global_clipnorm),
                                ("loss_scale_factor", loss_scale_factor)):  # fmt: skip
            if value is not None:
                _number(argument, value, "Pass None to switch it off.", positive=True)
        if weight_decay is not None:
            _number("weight_decay", weight_decay, "Pass None to switch it off.")
        _number("ema_momentum", ema_momentum, "Keras uses 0.99.", high=1.0)
        if ema_overwrite_frequency is not None:
            _count("ema_overwrite_frequency", ema_overwrite_frequency, 1, "Pass None to never overwrite.")
        if gradient_accumulation_steps is not None:
            _count("gradient_accumulation_steps", gradient_accumulation_steps, 2, "Pass None to update every step.")
        super().__init__(
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            clipnorm=clipnorm,
            clipvalue=clipvalue,
            global_clipnorm=global_clipnorm,
            use_ema=use_ema,
            ema_momentum=ema_momentum,
            ema_overwrite_frequency=ema_overwrite_frequency,
            loss_scale_factor=loss_scale_factor,
            gradient_accumulation_steps=gradient_accumulation_steps,
            name=name,
            **kwargs,
        )
        self._hyperparameters = hyperparameters
        self.factoring = factoring
        self.min_dim_size_to_factor = min_dim_size_to_factor
        self._state_names: set[str] = set()
        self._layouts: list[Layout | None] = []
        self._slots: list[Any] = []
        self._momentums: list[Any] = []
        self._waiting: list[np.ndarray] = []
        self._torch_step: Any = None
        if keras.backend.backend() == "torch":
            from adafactor.keras_torch import TorchStep

            self._torch_step = TorchStep(hyperparameters)

    @property
    def hyperparameters(self) -> Hyperparameters:
        """Adafactor's own hyperparameters. They are fixed: a compiled step holds them as constants."""
        return self._hyperparameters

    def __getattr__(self, name: str) -> Any:
        # `optimizer.clip_threshold`, as Keras's own class has it.
        if name in Hyperparameters.__dataclass_fields__ and "_hyperparameters" in self.__dict__:
            return getattr(self._hyperparameters, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    # -- state ---------------------------------------------------------------------------------------------------

    def build(self, variables: Sequence[Any]) -> None:
        """Create the state of ``variables`` (their shapes and dtypes must be known); later calls change nothing."""
        if self.built:
            return
        layouts = [self._layout_of(variable) for variable in variables]
        super().build(variables)
        # One list of each kind, index-aligned with ``variables``; TensorFlow's checkpoints follow these attributes.
        momentum = self._hyperparameters.momentum is not None
        slots: list[dict[str, Any] | None] = []
        momentums: list[Any] = []
        for variable, its_layout in zip(variables, layouts, strict=True):
            if its_layout is None:  # float8 scales and the like are assigned, not trained
                slots.append(None)
                momentums.append(None)
                continue
            names = {name: self._add_statistic(variable, name, its_layout) for name in its_layout.slots}
            slots.append(names)
            momentums.append(self._add_statistic(variable, "momentum", its_layout) if momentum else None)
        self._layouts, self._slots, self._momentums = layouts, slots, momentums
        if self._waiting:
            values, self._waiting = self._waiting, []
            if [value.shape for value in values] == [tuple(variable.shape) for variable in self.variables]:
                self.set_weights(values)
            else:
                warnings.warn(f"The state loaded for {self.name!r} is not that of this model: it starts afresh.",
                              stacklevel=2)  # fmt: skip

    def _layout_of(self, variable: Any) -> Layout | None:
        if self._overwrite_variable_with_gradient(variable):
            return None
        shape = tuple(variable.shape)
        if None in shape:
            rule = "of a fully known shape before the optimizer is built"
            raise ValueError(message(f"variable {_path(variable)}", rule, shape, "Call the model on data first."))
        _statistics_dtype(variable)  # refuses integers before anything is created
        return layout(shape, self.factoring, self.min_dim_size_to_factor, name=_path(variable))

    def _add_statistic(self, variable: Any, name: str, its_layout: Layout) -> Any:
        slots = its_layout.slots | {"momentum": its_layout.shape}
        axes = {"row": its_layout.columns, "column": its_layout.rows}.get(name, ())
        with self._beside(variable):
            return self.add_variable(
                shape=slots[name],
                dtype=_statistics_dtype(variable),
                layout=_reduced_layout(getattr(variable, "_layout", None), len(its_layout.shape), axes),
                name=f"{_path(variable).replace('/', '_')}_{name}",
            )

    def _beside(self, variable: Any) -> contextlib.AbstractContextManager[Any]:
        """TensorFlow's distribution strategies place a variable where its neighbour is."""
        strategy = getattr(self, "_distribution_strategy", None)
        if strategy is None:
            return contextlib.nullcontext()
        native = variable.value if isinstance(variable, keras.Variable) else variable
        beside: contextlib.AbstractContextManager[Any] = strategy.extended.colocate_vars_with(native)
        return beside

    def add_variable(self, *args: Any, name: str | None = None, **kwargs: Any) -> Any:
        """As Keras's, with a name that no other variable of this optimizer has: checkpoints are keyed by it."""
        if name is not None:
            stem, count = name, 1
            while name in self._state_names:
                count += 1
                name = f"{stem}_{count}"
            self._state_names.add(name)
        return super().add_variable(*args, name=name, **kwargs)

    # -- step ----------------------------------------------------------------------------------------------------

    def apply(self, grads: Iterable[Any], trainable_variables: Iterable[Any] | None = None) -> None:
        """Update the variables from their gradients.

        Args:
            grads: gradients, one per variable, of its shape; dense, sparse, or ``None`` to leave a variable alone.
            trainable_variables: the variables; needed at the first call unless the optimizer is built.

        Raises:
            ValueError: the counts or the shapes do not match. Nothing has changed then.
        """
        grads = list(grads)
        if trainable_variables is not None:
            trainable_variables = list(trainable_variables)
        variables = self._trainable_variables if trainable_variables is None else trainable_variables
        self._check(grads, variables)
        # Keras clips, accumulates and unscales the slices of a sparse gradient before they are summed, or cannot.
        around = (self.clipnorm, self.clipvalue, self.global_clipnorm, self.gradient_accumulation_steps)
        if any(around) or self.loss_scale_factor is not None:
            grads = [_dense(g, v) if _is_sparse(g) else g for g, v in zip(grads, variables, strict=False)]
        super().apply(grads, trainable_variables)

    def _check(self, grads: list[Any], variables: list[Any]) -> None:
        if not grads or not variables:
            return  # Keras answers these
        if len(grads) != len(variables):
            remedy = f"There are {len(variables)} variables; pass None for one without a gradient."
            raise ValueError(message("grads", "one gradient per variable", len(grads), remedy))
        for gradient, variable in zip(grads, variables, strict=True):
            if gradient is None:
                continue
            shape, expected = _static_shape(gradient), tuple(variable.shape)
            if shape is None:
                continue  # a graph that does not know it until it runs
            if len(shape) != len(expected) or any(n not in (None, k) for n, k in zip(shape, expected, strict=True)):
                rule = f"of its variable's shape {expected}"
                raise ValueError(
                    message(f"the gradient of {_path(variable)}", rule, shape, "Reshape or sum it before apply().")
                )

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Make one update of ``variable`` (``docs/algorithm.md``, eqs. 1 to 13)."""
        index = self._get_variable_index(variable)
        its_layout, slots, momentum = self._layouts[index], self._slots[index], self._momentums[index]
        if its_layout is None or not its_layout.size:
            return
        hp = self._hyperparameters
        dtype = _statistics_dtype(variable)
        with _no_grad():
            x = ops.convert_to_tensor(variable)
            # A sparse gradient is dense in the statistics and stays sparse in the variable's update.
            sparse = _is_sparse(gradient) and momentum is None
            g = _dense(gradient, variable)
            t = ops.cast(self.iterations + 1, dtype)
            learning_rate = ops.cast(learning_rate, dtype)
            decay, rho = array.schedule(_ops, t, learning_rate, hp, callable(self._learning_rate))
            decays = self.weight_decay is not None and self._use_weight_decay(variable)
            keep = 1 - learning_rate * self.weight_decay if decays else None
            values = {name: ops.convert_to_tensor(slot) for name, slot in slots.items()}
            update = array.measure(_ops, x, g, values, its_layout, hp, decay, rho, keep, _barrier)
            if sparse:
                first, second = update.direction
                if keep is not None:
                    self.assign(variable, ops.cast(ops.cast(x, dtype) * keep, variable.dtype))
                scale = ops.broadcast_to(first * (second * update.alpha), its_layout.shape)
                self.assign_sub(variable, ops.cast(ops.multiply(ops.cast(gradient, dtype), scale), variable.dtype))
            else:
                average = None if momentum is None else ops.convert_to_tensor(momentum)
                x, average = array.apply(_ops, x, g, update, average, hp.momentum, keep, _barrier)
                self.assign(variable, x)
                if momentum is not None:
                    self.assign(momentum, average)
            for name, slot in slots.items():
                self.assign(slot, update.slots[name])

    def _apply_weight_decay(self, variables: list[Any]) -> None:
        """Nothing: ``update_step`` decays a variable while it reads it anyway."""

    def _backend_update_step(self, grads: list[Any], trainable_variables: list[Any], learning_rate: Any) -> None:
        if keras.backend.backend() == "jax" and self._jax_step(grads, trainable_variables, learning_rate):
            return
        if self._torch_step is None or in_stateless_scope():
            super()._backend_update_step(grads, trainable_variables, learning_rate)
            return
        import torch

        from adafactor.keras_torch import Member

        with torch.no_grad():
            members = []
            for gradient, variable in zip(grads, trainable_variables, strict=True):
                index = self._get_variable_index(variable)
                its_layout, slots, momentum = self._layouts[index], self._slots[index], self._momentums[index]
                if its_layout is None or not its_layout.size:
                    continue
                state = {name: slot.value for name, slot in slots.items()}
                if momentum is not None:
                    state["momentum"] = momentum.value
                decay = self.weight_decay if self.weight_decay and self._use_weight_decay(variable) else 0.0
                members.append(Member(index, variable.value, ops.convert_to_tensor(gradient), its_layout, state, decay))
            rate = learning_rate.value if isinstance(learning_rate, keras.Variable) else learning_rate
            self._torch_step(members, rate, ops.convert_to_tensor(self.iterations), callable(self._learning_rate))

    def finalize_variable_values(self, var_list: list[Any]) -> None:
        """Set the variables to their moving averages (``use_ema``), each in memory of its own."""
        super().finalize_variable_values(var_list)
        if self.use_ema and keras.backend.backend() == "jax":
            # Assigning shares the average's buffer here, and the next compiled step cannot donate it twice.
            for variable in var_list:
                variable.assign(ops.copy(variable))

    def _jax_step(self, grads: list[Any], trainable_variables: list[Any], learning_rate: Any) -> bool:
        """One update of all variables at once; False where it has to be made one by one."""
        from adafactor import keras_jax

        members, targets = [], []
        for gradient, variable in zip(grads, trainable_variables, strict=True):
            index = self._get_variable_index(variable)
            its_layout, slots, momentum = self._layouts[index], self._slots[index], self._momentums[index]
            if its_layout is None or not its_layout.size:
                continue
            if _is_sparse(gradient) and momentum is None:
                return False
            decay = self.weight_decay if self.weight_decay and self._use_weight_decay(variable) else 0.0
            targets.append((variable, slots, momentum))
            members.append(
                keras_jax.Member(
                    its_layout,
                    ops.convert_to_tensor(variable),
                    ops.convert_to_tensor(gradient, sparse=False),
                    {name: ops.convert_to_tensor(slot) for name, slot in slots.items()},
                    None if momentum is None else ops.convert_to_tensor(momentum),
                    decay,
                    keras_jax.sharding_of(variable),
                )
            )
        rate = ops.convert_to_tensor(learning_rate)
        iterations = ops.convert_to_tensor(self.iterations)
        moved = keras_jax.step(members, self._hyperparameters, rate, iterations, callable(self._learning_rate))
        if moved is None:
            return False
        for (variable, slots, momentum), new in zip(targets, moved, strict=True):
            self.assign(variable, new.x)
            for name, slot in slots.items():
                self.assign(slot, new.slots[name])
            if momentum is not None:
                self.assign(momentum, new.momentum)
        return True

    # -- configuration and checkpoints -----------------------------------------------------------------------------

    def get_config(self) -> dict[str, Any]:
        """The arguments that make an equal optimizer, as plain data. A callable ``factoring`` is kept by reference."""
        config: dict[str, Any] = super().get_config()
        hyperparameters = dataclasses.asdict(self._hyperparameters)
        factoring = self.factoring
        if callable(factoring):
            factoring = keras.saving.serialize_keras_object(factoring)
        return config | hyperparameters | {
            "factoring": factoring,
            "min_dim_size_to_factor": self.min_dim_size_to_factor,
        }  # fmt: skip

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Mapping[str, Any] | None = None) -> Adafactor:
        """The optimizer that ``get_config`` described, without its state."""
        config = dict(config)
        if isinstance(config.get("factoring"), Mapping):
            config["factoring"] = keras.saving.deserialize_keras_object(config["factoring"], custom_objects)
        optimizer: Adafactor = super().from_config(config, custom_objects)
        return optimizer

    def set_weights(self, weights: Sequence[Any]) -> None:
        """Set every variable, in the order of ``optimizer.variables``.

        Keras's reader of legacy ``.h5`` files first builds the optimizer on no variables at all. The values wait for
        the model's then, and the optimizer counts as not built.
        """
        if self.built and not self._trainable_variables and len(weights) > len(self.variables):
            self._waiting = [np.asarray(value) for value in weights]
            self.built = False
            return
        super().set_weights(weights)

    def save_own_variables(self, store: Any) -> None:
        """Write every variable under its position, and the version of this order."""
        super().save_own_variables(store)
        store[_VERSION_KEY] = np.asarray(STATE_VERSION)

    def load_own_variables(self, store: Any) -> None:
        """Read what ``save_own_variables`` wrote, or what ``keras.optimizers.Adafactor`` did.

        From the latter, row and column are taken over, and the velocity of variables that are not factored; the
        velocity of factored ones holds nothing that row and column do not. Momentum starts at zero.

        Raises:
            ValueError: the file does not fit this optimizer. Nothing has changed then.
        """
        keys = set(store.keys()) - {_VERSION_KEY}
        if _VERSION_KEY in store.keys():  # noqa: SIM118 - Keras's stores have keys() and no `in`
            version = int(np.asarray(store[_VERSION_KEY]))
            if version != STATE_VERSION:
                remedy = "Load it with the release of adafactor that wrote it."
                raise ValueError(message(f"the state version of {self.name!r}", str(STATE_VERSION), version, remedy))
            positions: list[int | None] = list(range(len(self.variables)))
            expected = len(positions)
        else:
            positions, expected = self._keras_positions(len(keys))
        if len(keys) != expected:
            warnings.warn(
                f"Skipping variable loading for optimizer '{self.name}', because it has {len(self.variables)} "
                f"variables and expects {expected} in the file, which has {len(keys)}. Build it on the same variables, "
                "with the same options, before loading.",
                stacklevel=2,
            )
            return
        pairs = [
            (variable, np.zeros(variable.shape) if position is None else np.asarray(store[str(position)]))
            for variable, position in zip(self.variables, positions, strict=True)
        ]
        for variable, value in pairs:
            if value.shape != tuple(variable.shape):
                rule = f"of shape {tuple(variable.shape)}"
                remedy = "Build the optimizer on the same model, with the factoring the file was written with."
                raise ValueError(message(f"the saved {variable.path}", rule, value.shape, remedy))
        for variable, value in pairs:
            variable.assign(value)

    def _keras_positions(self, count: int) -> tuple[list[int | None], int]:
        """Where ``keras.optimizers.Adafactor`` keeps each of our variables (no momentum), and how many it keeps.

        It stores row, column and velocity of every variable. Below rank 2 the first two are placeholders, which are
        missing from a file written inside a ``LossScaleOptimizer``; the ``count`` of variables in the file tells.
        """
        own = sum(len(slots) for slots in self._slots if slots) + sum(m is not None for m in self._momentums)
        start = len(self.variables) - own
        matrices = [len(variable.shape) >= 2 for variable in self._trainable_variables]
        kept = [3 if m else 1 for m, its_layout in zip(matrices, self._layouts, strict=True) if its_layout is not None]
        placeholders = 0 if count == start + sum(kept) else 2
        position = start
        positions: list[int | None] = list(range(start))
        for variable, its_layout, momentum, matrix in zip(
            self._trainable_variables, self._layouts, self._momentums, matrices, strict=True
        ):
            if not matrix:
                position += placeholders
            if its_layout is None:
                continue
            if its_layout.factored and its_layout != layout(its_layout.shape, "last_two"):
                remedy = 'Pass factoring="last_two" to load this file.'
                rule = "the last two axes, as in a file of keras.optimizers.Adafactor"
                roles = (its_layout.rows, its_layout.columns)
                raise ValueError(message(f"the factored axes of {_path(variable)}", rule, roles, remedy))
            if its_layout.factored:
                positions += [position, position + 1]
            else:
                positions += [position + 2 if matrix else position]
            positions += [None] if momentum is not None else []
            position += 3 if matrix else 1
        return positions, position


def _statistics_dtype(variable: Any) -> str:
    dtype = str(keras.backend.standardize_dtype(variable.dtype))
    if not keras.backend.is_float_dtype(dtype):
        remedy = "Mark the variable as not trainable."
        raise ValueError(message(f"the dtype of {_path(variable)}", "a floating-point dtype", dtype, remedy))
    return "float64" if dtype == "float64" else "float32"


def _path(variable: Any) -> str:
    """``layer/kernel``; a ``tf.Variable`` has a name with a suffix instead of a path."""
    return str(getattr(variable, "path", None) or variable.name).split(":")[0]


def _is_sparse(gradient: Any) -> bool:
    """TensorFlow's IndexedSlices and JAX's BCOO; Keras has no public test for them."""
    return keras.backend.backend() != "torch" and hasattr(gradient, "indices")


def _dense(gradient: Any, variable: Any) -> Any:
    """The gradient as a tensor, the slices of one row summed; Keras leaves TensorFlow's IndexedSlices as they are."""
    if _is_sparse(gradient) and keras.backend.backend() == "tensorflow":
        rows = ops.convert_to_tensor(gradient.indices)  # a tuple is legal
        return ops.segment_sum(gradient.values, rows, num_segments=variable.shape[0])
    return ops.convert_to_tensor(gradient, sparse=False)


def _static_shape(gradient: Any) -> tuple[int | None, ...] | None:
    """The shape as far as it is known; ``None`` where not even the rank is."""
    dense_shape = getattr(gradient, "dense_shape", None)
    if isinstance(dense_shape, (tuple, list)):  # legal, but then IndexedSlices.shape fails
        return tuple(dense_shape)
    shape = gradient.shape if hasattr(gradient, "shape") else np.shape(gradient)
    return None if getattr(shape, "rank", 0) is None else tuple(shape)


def _no_grad() -> contextlib.AbstractContextManager[Any]:
    if keras.backend.backend() != "torch":
        return contextlib.nullcontext()
    import torch

    return torch.no_grad()


def _reduced_layout(its_layout: Any, rank: int, removed: Shape) -> Any:
    """The distribution layout of a variable of ``rank`` axes less the axes that a statistic does not have."""
    if its_layout is None or not removed:
        return its_layout
    sharding = not isinstance(its_layout, keras.distribution.TensorLayout)
    axes = tuple(its_layout.spec if sharding else its_layout.axes)
    axes += (None,) * (rank - len(axes))
    axes = tuple(name for axis, name in enumerate(axes) if axis not in removed)
    if sharding:
        return type(its_layout)(its_layout.mesh, type(its_layout.spec)(*axes))
    return keras.distribution.TensorLayout(axes, its_layout.device_mesh)


def _number(argument: str, value: Any, remedy: str, *, positive: bool = False, high: float = math.inf) -> Any:
    ok = in_range(value, 0.0, high)
    if ok is None:
        raise TypeError(message(argument, "a number", value, remedy))
    if not ok or (positive and value == 0):
        bound = "> 0" if positive else ">= 0"
        raise ValueError(
            message(argument, f"{bound} and " + ("finite" if high == math.inf else f"<= {high:g}"), value, remedy)
        )
    return value


def _count(argument: str, value: Any, least: int, remedy: str) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(message(argument, "an integer", value, remedy))
    if value < least:
        raise ValueError(message(argument, f">= {least}", value, remedy))
