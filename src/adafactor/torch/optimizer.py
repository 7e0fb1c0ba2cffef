"""The class ``Adafactor``: a ``torch.optim.Optimizer`` over the kernels.

Equation numbers refer to ``docs/algorithm.md``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from itertools import count
from typing import Any, Protocol, TypeVar, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from adafactor.core.errors import message
from adafactor.core.factoring import Factoring
from adafactor.core.hyperparameters import RelativeStep
from adafactor.torch import checkpoint, compiled, diagnostics
from adafactor.torch.arguments import translate
from adafactor.torch.members import Chosen, Place, Positions
from adafactor.torch.prepare import Preparation, Prepared

T = TypeVar("T")


class InBackward(Protocol):
    """What steps parameters in the backward pass."""

    def _in(self, closure: Callable[[], T]) -> T: ...
    def _close(self) -> None: ...


class OnHost(Protocol):
    """What steps parameters on the host."""

    def take(self, positions: Positions) -> None: ...
    def wait(self) -> None: ...


class Adafactor(Optimizer):
    """Adafactor (Shazeer and Stern, 2018), with row and column statistics in place of Adam's second moment.

    Statistics and arithmetic are float32 whatever the parameter's dtype, and float64 for float64 parameters.

    Args:
        params: parameters, named parameters, or groups of them, as for every ``torch.optim.Optimizer``. Each
            argument below except ``foreach`` and ``diagnostics`` may differ from group to group.
        lr: learning rate, at least 0; a number or a tensor of one element (eq. 8).
        beta2_decay: exponent of the second-moment decay: beta2(t) = 1 - t**beta2_decay (eq. 1).
        eps: two numbers, at least 0. ``eps[0]`` is added to every squared gradient (eq. 2); ``None`` means 1e-30.
            ``eps[1]`` is the least parameter scale (eq. 9).
        d: largest root mean square of an update, above 0; ``None`` switches clipping off (eq. 10).
        weight_decay: the parameter is multiplied by ``1 - lr * weight_decay``, after its root mean square was taken.
        foreach: accepted, and without effect: all tensors of a step are handed to one kernel anyway.
        maximize: follow the gradient instead of descending.
        fused: ``None`` uses the native kernels for CPU tensors and the Triton kernels for CUDA tensors where they
            are installed, ``True`` insists on them, ``False`` uses torch operations, as every other device does.
        relative_step: cap the learning rate at 1/sqrt(t), as ``torch.optim.Adafactor`` always does (eq. 8). A
            scheduler writes into the same place as the user, so here ``True`` and ``"always"`` mean the same.
        scale_parameter: multiply the learning rate by the parameter's root mean square (eq. 9).
        beta1: momentum of the clipped update, in [0, 1) (eq. 12); ``None`` or 0 keeps none.
        momentum_dtype: how momentum is stored: ``torch.float32``, ``bfloat16``, ``float16`` or ``int8``; ``None``
            stores it like the statistics. 256 neighbours of int8 momentum share a float32 scale s, and a number m
            is stored to within s (2 sqrt(abs(m)/s) / 127 + 1/127²), without bias.
        beta2_max: upper bound of beta2(t), in [0, 1] (eq. 1).
        factoring: which axes become rows and columns; see :func:`adafactor.layout`.
        min_dim_size_to_factor: matrices with a smaller side keep the whole second moment.
        stochastic_rounding: round bfloat16 and float16 parameters up or down at random, without bias.
        compensated: keep what rounding cuts off bfloat16 and float16 parameters, as ``residual``, and add it again in
            the next update. Not with ``stochastic_rounding``; without effect on other parameters.
        skip_nonfinite: leave a tensor alone, parameter and state, when its gradient holds an inf or a NaN, or
            when its squares overflow; count it in :attr:`skipped`. ``False`` lets it spread.
        seed: an integer; of the bits behind ``stochastic_rounding`` and int8 momentum. ``None`` draws it from PyTorch's
            generator, so that no two optimizers round alike and ``torch.manual_seed`` repeats a run; in a process group
            it numbers the optimizers that draw bits, because ranks must agree and their generators may not.
        diagnostics: record what :meth:`diagnostics` returns; for all groups.
        capturable: allow a CUDA graph to capture ``step``, as in ``torch.optim``. The state is on the parameters'
            device either way, and no step waits for it. A graph keeps a learning rate that is a number, and
            reads one that is a tensor on the device at every replay.

    State of a parameter: ``step``, int64 of shape (), the updates made; ``row`` and ``column``, or
    ``second_moment``, of the shapes ``adafactor.layout`` gives; ``momentum`` of the parameter's shape, with ``beta1``;
    ``momentum_scale``, float32 of shape (ceil(N / 256),), with int8 momentum; ``residual`` of the parameter's shape,
    bfloat16, with ``compensated``.

    Raises:
        TypeError, ValueError: an argument does not fit. Nothing has been modified.
    """

    _in_backward: InBackward | None = None
    _host: OnHost | None = None

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (1e-30, 1e-3),
        d: float | None = 1.0,
        weight_decay: float = 0.0,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        fused: bool | None = None,
        relative_step: RelativeStep = True,
        scale_parameter: bool = True,
        beta1: float | None = None,
        momentum_dtype: torch.dtype | None = None,
        beta2_max: float | None = None,
        factoring: Factoring = "last_two",
        min_dim_size_to_factor: int = 1,
        stochastic_rounding: bool = False,
        compensated: bool = False,
        skip_nonfinite: bool = True,
        seed: int | None = None,
        diagnostics: bool = False,
        capturable: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "beta2_decay": beta2_decay,
            "eps": eps,
            "d": d,
            "weight_decay": weight_decay,
            "foreach": foreach,
            "maximize": maximize,
            "fused": fused,
            "relative_step": relative_step,
            "scale_parameter": scale_parameter,
            "beta1": beta1,
            "momentum_dtype": momentum_dtype,
            "beta2_max": beta2_max,
            "factoring": factoring,
            "min_dim_size_to_factor": min_dim_size_to_factor,
            "stochastic_rounding": stochastic_rounding,
            "compensated": compensated,
            "skip_nonfinite": skip_nonfinite,
            "seed": seed,
            "capturable": capturable,
        }
        translate(defaults)
        if not isinstance(diagnostics, bool):
            raise TypeError(message("diagnostics", "True or False", diagnostics, "Leave it out for the default."))
        self._diagnostics: dict[Tensor, Tensor] | None = {} if diagnostics else None
        self._lrs: dict[int, float | Tensor] = {}  # of the groups' last updates, for diagnostics
        self._preparation = Preparation()
        self._skipped: dict[torch.device, Tensor] = {}
        self._handle = compiled.register(self)
        super().__init__(params, defaults)

    def _invalidate(self) -> None:
        """Drop what is derived from groups and state, so that the next step derives it anew."""
        self._preparation.clear()
        self._places: dict[int, Place] = {}

    @property
    def skipped(self) -> int:
        """How often a tensor was left alone because its gradient was not finite, since construction.

        Reading it waits for the device; nothing else here does.
        """
        return sum(int(count) for count in self._skipped.values())

    def diagnostics(self) -> dict[str, dict[str, Tensor]]:
        """What the last update of every parameter was like.

        Returns:
            By the parameter's name (its number among all parameters if the optimizer was given none), tensors of
            shape (), or of one number per slice of the batch axes, on the parameter's device: ``update_rms``, the root
            mean square of the normalised update before clipping (eq. 7); ``clip_factor``, what clipping divided it by,
            at least 1 (eq. 10); ``parameter_scale``, what the learning rate was multiplied by (eq. 9);
            ``effective_lr``, their product (eqs. 8 and 9); ``skipped``, how often the parameter was left alone. Zeros
            for one that was never updated.
            Copies: nothing waits for the device until they are read.

        Raises:
            RuntimeError: they are not recorded.
        """
        return diagnostics.diagnostics(self.param_groups, self.state, self._diagnostics, self._lrs)

    def effective_lr(self) -> dict[str, Tensor]:
        """The step size that the next update of every parameter will have (eqs. 8 and 9).

        The learning rate as it stands, capped at 1/sqrt(t) with ``relative_step`` and multiplied by the parameter's
        root mean square with ``scale_parameter``.

        Returns:
            By the parameter's name (its number among all parameters if the optimizer was given none), tensors of
            shape (), or of one number per slice of the batch axes, on the parameter's device: nothing waits for it
            until they are read.

        Raises:
            RuntimeError: a parameter is flat (FSDP1, ZeRO): of its tensors this rank has intervals.
        """
        return diagnostics.effective_lr(self.param_groups, self.state)

    def _name(self, number: int, position: int) -> str:
        """What errors call a parameter."""
        return self._preparation.members(self.param_groups, number).name(position)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; what it does not say is taken from the constructor's arguments.

        Raises:
            TypeError, ValueError: an argument of the group does not fit.
            RuntimeError: parameters are stepped in the backward pass, in which the new ones would not be.
        """
        if self._in_backward is not None:
            remedy = "Call remove() on what step_in_backward returned, and step_in_backward again afterwards."
            raise RuntimeError(message("add_param_group", "called before step_in_backward", "a group after it", remedy))
        if isinstance(param_group, dict):
            translate({**self.defaults, **param_group})
        super().add_param_group(param_group)
        self._seed(self.param_groups[-1])
        self._preparation.given(self.param_groups[-1]["params"])
        _unshare(self.param_groups)
        self._invalidate()

    def _seed(self, group: dict[str, Any]) -> None:
        """Give a group that draws random bits this optimizer's own, if it was given none."""
        if group["seed"] is None and (group["stochastic_rounding"] or group["momentum_dtype"] == torch.int8):
            others = [other["seed"] for other in self.param_groups if other["seed"] is not None]
            group["seed"] = others[0] if others else _new_seed()

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient.

        Args:
            closure: evaluates the model again and returns the loss; called once, with gradients enabled.

        Returns:
            What ``closure`` returned.

        Raises:
            RuntimeError, TypeError, ValueError: a gradient or a group does not fit. No tensor has been modified.
        """
        if not torch.compiler.is_compiling():
            self._check_capture()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure() if self._in_backward is None else self._in_backward._in(closure)
        if torch.compiler.is_compiling():
            compiled.traced_step(self)
            return loss
        if self._in_backward is not None:
            self._in_backward._close()
        else:
            self._update([(number, None) for number in range(len(self.param_groups))])
        if self._host is not None:
            self._host.wait()
        return loss

    def step_param(self, p: Tensor, group: object = None) -> None:
        """Update one parameter, if it has a gradient: what sd-scripts and musubi-tuner call from gradient hooks.

        Args:
            p: the parameter; its gradient stays.
            group: without effect. The group that the parameter is in now counts, also after ``load_state_dict``.

        Raises:
            ValueError: it is no parameter of this optimizer.
            RuntimeError, TypeError: as for :meth:`step`. No tensor has been modified.
        """
        number, position = self._places.get(id(p), (0, -1))
        params = self.param_groups[number]["params"] if number < len(self.param_groups) else ()
        if not 0 <= position < len(params) or params[position] is not p:
            places = enumerate(self.param_groups)
            self._places = {id(q): (n, k) for n, its in places for k, q in enumerate(its["params"])}
            if id(p) not in self._places:
                got = f"one of shape {tuple(p.shape)}"
                raise ValueError(message("p", "a parameter of this optimizer", got, "Add it with add_param_group."))
        self._update_places([self._places[id(p)]])

    def step_parameter(self, parameter: Tensor, group: object = None, i: int = 0) -> None:
        """:meth:`step_param`, as OneTrainer calls it."""
        self.step_param(parameter)

    @property
    def supports_fused_back_pass(self) -> bool:
        """What OneTrainer looks for before it calls :meth:`step_parameter` from gradient hooks."""
        return True

    @torch.no_grad()
    def _update_places(self, places: Iterable[Place]) -> None:
        """Update what has a gradient among these places."""
        by_group: dict[int, list[int]] = {}
        for number, position in places:
            by_group.setdefault(number, []).append(position)
        self._update(list(by_group.items()))
        self._opt_called = True  # what a scheduler looks for before it steps

    def _update(self, positions: Positions) -> None:
        """Update what has a gradient at these positions of groups."""
        if self._host is not None:
            self._host.take(positions)
            return
        self._step_chosen(self._preparation.collect(self.param_groups, positions, absent=True))

    def _step_chosen(self, chosen: Chosen) -> None:
        # Every check comes before the first write: a step happens wholly or not at all.
        if chosen.params:
            prepared = self._prepared(chosen)
            if not (prepared.fresh and self._makes_state_only(chosen.grads)):
                prepared.step(chosen.grads, self.state, self._count_of)
                if self._diagnostics is not None:
                    stepped = zip(chosen.places, chosen.grads, strict=True)
                    for number in {members.number for (members, _), grad in stepped if grad is not None}:
                        lr = self.param_groups[number]["lr"]
                        self._lrs[number] = lr.detach().clone() if isinstance(lr, Tensor) else lr
            prepared.fresh = False

    def _prepared(self, chosen: Chosen) -> Prepared:
        return self._preparation.prepared(self.state, chosen, self._diagnostics)

    def _makes_state_only(self, grads: Sequence[Tensor]) -> bool:
        """Whether this first step is one of torch.distributed.checkpoint, which takes one to have state to look at.

        It sets every learning rate to 0 and every gradient to zeros, and must not count.
        """
        lrs = [group["lr"] for group in self.param_groups]
        if any(isinstance(lr, Tensor) and lr.device.type != "cpu" for lr in lrs) or any(map(float, lrs)):
            return False
        return not any(grad.is_cuda or bool(grad.any()) for grad in grads)

    def _check_capture(self) -> None:
        """torch's own check that a captured step has ``capturable=True``; older releases have another name for it."""
        check = getattr(self, "_accelerator_graph_capture_health_check", None)
        (check or self._cuda_graph_capture_health_check)()

    def _count_of(self, device: torch.device) -> Tensor:
        """The number of tensors left alone on a device."""
        if device not in self._skipped:
            self._skipped[device] = torch.zeros((), dtype=torch.int64, device=device)
        return self._skipped[device]

    def _init_group(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], state: list[Tensor]
    ) -> bool:
        """List the tensors of a group. By this name torch.compile knows to run it once, untraced."""
        compiled.list_tensors(self, group, params, grads, state)
        return False

    def state_dict(self) -> dict[str, Any]:
        """The state and the groups, as every optimizer gives them.

        A callable ``factoring`` is left out, because code does not belong in a checkpoint: the optimizer that
        loads one uses its own. The statistics of flat parameters (FSDP1, ZeRO) are gathered, so that any number of
        ranks can load them: all ranks must call this.
        """
        if self._host is not None:
            self._host.wait()
        packed = super().state_dict()
        flat = self._preparation.flat_params(self.param_groups, self.state)
        if flat:
            checkpoint.gather(packed["state"], flat)
        for group in packed["param_groups"]:
            if callable(group["factoring"]):
                del group["factoring"]
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what this class, ``torch.optim.Adafactor``, transformers' or timm's ``Adafactor`` has written.

        Statistics keep their dtype, whatever the parameters'. Tensors are copied. ``docs/torch.md`` says what of
        another's run cannot carry over; where that matters, a warning says so in one sentence.

        Raises:
            TypeError, ValueError: another optimizer wrote it, or groups, hyperparameters or tensors do not fit; nothing
                has been modified.
        """

        notes: checkpoint.Notes = {}

        def read(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            return checkpoint.read(state_dict, optimizer.param_groups, notes)

        handle = self.register_load_state_dict_pre_hook(read)  # after the hooks that a user has registered
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        for note in notes:
            warnings.warn(note, UserWarning, stacklevel=2)

    def __getstate__(self) -> dict[str, Any]:
        return {
            **super().__getstate__(),
            "_skipped": self._skipped,
            "_diagnostics": None if self._diagnostics is None else {},
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Both unpickling and the base class's load_state_dict come through here.
        super().__setstate__(state)
        self.__dict__.setdefault("_diagnostics", None)
        self.__dict__.setdefault("_lrs", {})
        if "_preparation" not in self.__dict__:
            self._preparation = Preparation()
            for group in self.param_groups:
                self._preparation.given(group["params"])
        if "_handle" not in self.__dict__:
            self._handle = compiled.register(self)
        for values in self.state.values():
            for name, value in values.items() if isinstance(values, dict) else ():
                if isinstance(value, checkpoint.Uncast):
                    values[name] = value.tensor
        for group in self.param_groups:
            for name, default in self.defaults.items():
                if name != "differentiable":
                    group.setdefault(name, default)
        _unshare(self.param_groups)
        self._invalidate()


_made = count()  # of optimizers that draw random bits, in the order in which processes of a program make them


def _new_seed() -> int:
    """A seed of an optimizer's own, alike on all ranks."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if distributed and torch.distributed.get_world_size() > 1:
        return next(_made)
    drawn = torch.randint(1 << 62, (), device="cpu")
    return int(drawn) if type(drawn) is Tensor else next(_made)  # a FakeTensor has no number


def _unshare(groups: list[dict[str, Any]]) -> None:
    """Give every group a learning rate of its own, where groups were given one tensor: schedulers write into it."""
    seen: set[int] = set()
    for group in groups:
        lr = group.get("lr")
        if isinstance(lr, Tensor):
            if id(lr) in seen:
                group["lr"] = lr.clone()
            seen.add(id(group["lr"]))
