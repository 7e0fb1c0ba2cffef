"""The optimizer class: Keras's arguments, state and life cycle over the kernels."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops
from keras.src.backend import in_stateless_scope  # not public, and nothing public tells

from adafactor.core import factoring as _factoring
from adafactor.core.errors import message
from adafactor.core.factoring import Factoring, Layout
from adafactor.core.hyperparameters import Hyperparameters, RelativeStep, plain
from adafactor.keras import arguments, checkpoint
from adafactor.keras.step import Member, update_one
from adafactor.keras.variables import (
    dense,
    distinct,
    is_sparse,
    path_of,
    reduced_layout,
    scalar,
    static_shape,
    statistics_dtype,
)

# What the last axis of a variable of diagnostics holds.
DIAGNOSTICS = ("update_rms", "clip_factor", "parameter_scale")


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
        diagnostics: record what `diagnostics()` returns and the callback ``adafactor.keras.Diagnostics`` logs.

    State, in the order of ``optimizer.variables``: ``iteration``, ``learning_rate`` (if it is a constant), the moving
    averages (``use_ema``), the gradient accumulators, then for each trainable variable ``<path>_row`` and
    ``<path>_column``, or ``<path>_second_moment`` where it is not factored, and ``<path>_momentum`` (``beta_1``);
    last, with ``diagnostics``, ``<path>_diagnostics`` of each, which no file keeps. Statistics and momentum are
    float32, float64 for a float64 variable, whatever the variable's dtype.
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
        diagnostics: bool = False,
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
        min_dim_size_to_factor, diagnostics = plain(min_dim_size_to_factor), plain(diagnostics)
        _factoring.validate(factoring, min_dim_size_to_factor)
        if not isinstance(diagnostics, bool):
            raise TypeError(message("diagnostics", "True or False", diagnostics, "Leave it out for the default."))
        if not callable(learning_rate):
            learning_rate = float(arguments.number("learning_rate", learning_rate, "Pass a float or a schedule."))
        keras_own = arguments.validate(
            weight_decay=weight_decay,
            clipnorm=clipnorm,
            clipvalue=clipvalue,
            global_clipnorm=global_clipnorm,
            ema_momentum=ema_momentum,
            ema_overwrite_frequency=ema_overwrite_frequency,
            loss_scale_factor=loss_scale_factor,
            gradient_accumulation_steps=gradient_accumulation_steps,
        )
        super().__init__(learning_rate=learning_rate, use_ema=use_ema, name=name, **keras_own, **kwargs)
        self._hyperparameters = hyperparameters
        self.factoring = factoring
        self.min_dim_size_to_factor = min_dim_size_to_factor
        self._records_diagnostics = diagnostics
        self._undecayed_names: list[str] = []
        self._has_undecayed_variables = False
        self._state_names: set[str] = set()
        self._layouts: list[Layout | None] = []
        self._slots: list[Any] = []
        self._momentums: list[Any] = []
        self._recorded: list[Any] = []
        self._waiting: list[np.ndarray] = []
        self._torch_step: Any = None
        if keras.backend.backend() == "torch":
            from adafactor.keras.step_torch import TorchStep

            self._torch_step = TorchStep()

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
        for variable, layout in zip(variables, layouts, strict=True):
            if layout is None:  # float8 scales and the like are assigned, not trained
                slots.append(None)
                momentums.append(None)
                continue
            names = {name: self._add_statistic(variable, name, layout) for name in layout.slots}
            slots.append(names)
            momentums.append(self._add_statistic(variable, "momentum", layout) if momentum else None)
        self._layouts, self._slots, self._momentums = layouts, slots, momentums
        recorded = self._records_diagnostics
        self._recorded = [
            self._add_diagnostics(variable, layout) if recorded and layout is not None else None
            for variable, layout in zip(variables, layouts, strict=True)
        ]
        if self._waiting:
            values, self._waiting = self._waiting, []
            if [value.shape for value in values] == [tuple(variable.shape) for variable in self.variables]:
                self.set_weights(values)
            else:
                warnings.warn(f"The state loaded for {self.name!r} is not that of this model: it starts afresh.",
                              stacklevel=2)  # fmt: skip

    def _layout_of(self, variable: Any) -> Layout | None:
        if getattr(variable, "overwrite_with_gradient", False):
            return None
        shape = tuple(variable.shape)
        if None in shape:
            rule = "of a fully known shape before the optimizer is built"
            raise ValueError(message(f"variable {path_of(variable)}", rule, shape, "Call the model on data first."))
        statistics_dtype(variable)  # refuses integers before anything is created
        return _factoring.layout(shape, self.factoring, self.min_dim_size_to_factor, name=path_of(variable))

    def _add_statistic(self, variable: Any, name: str, layout: Layout) -> Any:
        slots = layout.slots | {"momentum": layout.shape}
        with self._beside(variable):
            return self.add_variable(
                shape=slots[name],
                dtype=statistics_dtype(variable),
                layout=reduced_layout(getattr(variable, "_layout", None), len(layout.shape), layout.lacks(name)),
                name=f"{path_of(variable).replace('/', '_')}_{name}",
            )

    def _add_diagnostics(self, variable: Any, layout: Layout) -> Any:
        """RMS(u), clip factor and parameter scale of the last update, per slice of the batch axes."""
        with self._beside(variable):
            return self.add_variable(
                shape=(*(layout.shape[axis] for axis in layout.batch), 3),
                dtype=statistics_dtype(variable),
                name=f"{path_of(variable).replace('/', '_')}_diagnostics",
            )

    def diagnostics(self) -> dict[str, dict[str, np.ndarray]]:
        """What the last update of every variable was like.

        Returns:
            By the variable's path (a second variable of one path has ``_2`` behind it), arrays of shape (), or of one
            number per slice of the batch axes: ``update_rms``, the root mean square of the normalised update before
            clipping (eq. 7); ``clip_factor``, what clipping divided it by, at least 1 (eq. 10); ``parameter_scale``,
            what the learning rate was multiplied by (eq. 9); ``effective_lr``, their product (eqs. 8 and 9). Zeros
            before the first update. Reading them waits for the device.

        Raises:
            RuntimeError: they are not recorded.
        """
        if not self._records_diagnostics:
            raise RuntimeError(message("diagnostics", "True to have any", False, "Pass it to the constructor."))
        rho = self._last_rho()
        named: dict[str, dict[str, np.ndarray]] = {}
        for variable, recorded in zip(self._trainable_variables, self._recorded, strict=True):
            if recorded is not None:
                values = np.moveaxis(np.asarray(ops.convert_to_numpy(recorded)), -1, 0)
                of = dict(zip(DIAGNOSTICS, values, strict=True))
                named[distinct(path_of(variable), named)] = {**of, "effective_lr": rho * of["parameter_scale"]}
        return named

    def _last_rho(self) -> float:
        """The relative step size of the last update (eq. 8)."""
        t = max(1, int(ops.convert_to_numpy(self.iterations)))
        lr = self._learning_rate
        scheduled = isinstance(lr, keras.optimizers.schedules.LearningRateSchedule)
        lr = float(ops.convert_to_numpy(lr(t - 1) if scheduled else self._get_current_learning_rate()))
        return min(lr, t**-0.5) if self._hyperparameters.caps(callable(self._learning_rate)) else lr

    @property
    def saved_variables(self) -> list[Any]:
        """``variables`` less the diagnostics."""
        recorded = {id(variable) for variable in self._recorded}
        return [variable for variable in self.variables if id(variable) not in recorded]

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
            name = distinct(name, self._state_names)
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
            grads = [dense(g, v) if is_sparse(g) else g for g, v in zip(grads, variables, strict=False)]
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
            shape, expected = static_shape(gradient), tuple(variable.shape)
            if shape is None:
                continue  # a graph that does not know it until it runs
            if len(shape) != len(expected) or any(n not in (None, k) for n, k in zip(shape, expected, strict=True)):
                rule = f"of its variable's shape {expected}"
                raise ValueError(
                    message(f"the gradient of {path_of(variable)}", rule, shape, "Reshape or sum it before apply().")
                )

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Make one update of ``variable`` (``docs/algorithm.md``, eqs. 1 to 13).

        A subclass may override it, for a learning rate or a gradient of its own per variable, say; every backend then
        calls it variable by variable, and the variables have decayed by the learning rate of the optimizer before.
        """
        members = self._members([gradient], [variable])
        scheduled = callable(self._learning_rate)
        if keras.backend.backend() == "tensorflow":
            from adafactor.keras import step_tensorflow

            whole = (self._hyperparameters, learning_rate, self.iterations, scheduled)
            members = step_tensorflow.update(self, members, *whole)
        for member in members:
            update_one(self, member, learning_rate, self._hyperparameters, scheduled)

    def _backend_update_step(self, grads: list[Any], trainable_variables: list[Any], learning_rate: Any) -> None:
        """All variables in one call where the backend has kernels for that, else one by one."""
        if self._is_extended():
            super()._backend_update_step(grads, trainable_variables, learning_rate)
            return
        whole = (self._hyperparameters, learning_rate, self.iterations, callable(self._learning_rate))
        if self._torch_step is not None and not in_stateless_scope():
            self._torch_step(self._members(grads, trainable_variables), *whole)
            return
        if keras.backend.backend() == "jax":
            from adafactor.keras import step_jax

            if step_jax.update(self, self._members(grads, trainable_variables), *whole):
                return
        if keras.backend.backend() == "tensorflow":
            from adafactor.keras import step_tensorflow

            if not step_tensorflow.distributed():  # else variable by variable, through update_step
                others = step_tensorflow.update(self, self._members(grads, trainable_variables), *whole)
                if not others:
                    return
                grads, trainable_variables = [m.gradient for m in others], [m.variable for m in others]
        super()._backend_update_step(grads, trainable_variables, learning_rate)

    def _members(self, grads: Iterable[Any], variables: Iterable[Any]) -> list[Member]:
        """What the step needs to know of every variable that has elements and is trained."""
        decays = self.weight_decay and not self._is_extended()
        members = []
        for gradient, variable in zip(grads, variables, strict=True):
            position = self._get_variable_index(variable)
            layout = self._layouts[position]
            if layout is None or not layout.size:
                continue
            decay = self.weight_decay if decays and self._use_weight_decay(variable) else 0.0
            state = self._slots[position], self._momentums[position], self._recorded[position]
            members.append(Member(position, variable, gradient, layout, *state, decay))
        return members

    def _get_current_learning_rate(self) -> Any:
        """As Keras's; a schedule or callable may return an array of one number."""
        return scalar("learning_rate", super()._get_current_learning_rate())

    def _apply_weight_decay(self, variables: list[Any]) -> None:
        """Nothing: the step decays a variable while it reads it anyway, unless the step is somebody else's."""
        if self._is_extended():
            super()._apply_weight_decay(variables)

    def _is_extended(self) -> bool:
        """Whether a subclass or a caller has put something else in place of a method that the kernels do not call."""
        own = vars(self)  # asked of the class and not of bound methods, which PyTorch's compiler makes anew
        return any(name in own or getattr(type(self), name) is not method for name, method in _BYPASSED.items())

    def finalize_variable_values(self, var_list: list[Any]) -> None:
        """Set the variables to their moving averages (``use_ema``), each in memory of its own."""
        super().finalize_variable_values(var_list)
        if self.use_ema and keras.backend.backend() == "jax":
            # Assigning shares the average's buffer here, and the next compiled step cannot donate it twice.
            for variable in var_list:
                variable.assign(ops.copy(variable))

    def exclude_from_weight_decay(
        self, var_list: Iterable[Any] | None = None, var_names: Iterable[str] | None = None
    ) -> None:
        """As Keras's: name what does not decay, before the optimizer is built.

        Args:
            var_list: variables. A file does not know them: they decay when it has been loaded.
            var_names: regular expressions, searched in the variables' names. They are part of the configuration.
        """
        var_list, var_names = list(var_list or ()), list(var_names or ())
        super().exclude_from_weight_decay(var_list, var_names)
        self._undecayed_names, self._has_undecayed_variables = var_names, bool(var_list)

    # -- configuration and checkpoints -----------------------------------------------------------------------------

    def get_config(self) -> dict[str, Any]:
        """The arguments that make an equal optimizer, as plain data. A callable ``factoring`` is kept by reference.

        What ``exclude_from_weight_decay`` was told by name is under its name; variables it was told of cause a warning.
        """
        config: dict[str, Any] = super().get_config()
        hyperparameters = dataclasses.asdict(self._hyperparameters)
        factoring = self.factoring
        if callable(factoring):
            factoring = keras.saving.serialize_keras_object(factoring)
        if self._undecayed_names:
            config["exclude_from_weight_decay"] = list(self._undecayed_names)
        if self._has_undecayed_variables:
            warnings.warn(
                f"The variables that exclude_from_weight_decay(var_list=...) named are no part of the configuration of "
                f"{self.name!r}: they decay in an optimizer made from it. Name them with var_names=... instead.",
                stacklevel=2,
            )
        return config | hyperparameters | {
            "factoring": factoring,
            "min_dim_size_to_factor": self.min_dim_size_to_factor,
            "diagnostics": self._records_diagnostics,
        }  # fmt: skip

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Mapping[str, Any] | None = None) -> Adafactor:
        """The optimizer that ``get_config`` described, without its state."""
        config = dict(config)
        if isinstance(config.get("factoring"), Mapping):
            config["factoring"] = keras.saving.deserialize_keras_object(config["factoring"], custom_objects)
        undecayed = config.pop("exclude_from_weight_decay", None)
        optimizer: Adafactor = super().from_config(config, custom_objects)
        if undecayed:
            optimizer.exclude_from_weight_decay(var_names=undecayed)
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
        for position, variable in enumerate(self.saved_variables):
            store[str(position)] = ops.convert_to_numpy(variable)
        store[checkpoint.VERSION_KEY] = np.asarray(checkpoint.STATE_VERSION)

    def load_own_variables(self, store: Any) -> None:
        """Read what ``save_own_variables`` wrote, or what ``keras.optimizers.Adafactor`` did.

        From the latter, row and column are taken over, and the velocity of variables that are not factored; the
        velocity of factored ones holds nothing that row and column do not. Momentum starts at zero.

        Raises:
            ValueError: the file does not fit this optimizer. Nothing has changed then.
        """
        momentum = self._hyperparameters.momentum is not None
        checkpoint.load(self, store, self._trainable_variables, self._layouts, momentum)


# Methods of one variable: what a kernel of all variables does itself.
_BYPASSED = {name: getattr(Adafactor, name) for name in ("update_step", "assign", "assign_sub", "_apply_weight_decay")}
