"""The class ``Adafactor``: a ``torch.optim.Optimizer`` over the kernels.

Equation numbers refer to ``docs/algorithm.md``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from adafactor.core import native
from adafactor.core.errors import message
from adafactor.core.factoring import Factoring, Layout, layout
from adafactor.core.hyperparameters import RelativeStep
from adafactor.engine.torch import compiled, cpu, cuda, eager, int8
from adafactor.engine.torch.work import Kernel, Settings, Work, is_sharded, math_dtype, new_report
from adafactor.torch import checkpoint
from adafactor.torch.arguments import SETTINGS, check_lr, check_origin, check_tensors, translate

if TYPE_CHECKING:
    from adafactor.engine.torch.sharded.shard import Shard
    from adafactor.engine.torch.sharded.step import Sharded
    from adafactor.torch.backward import StepInBackward

# Which parameters have a gradient varies little from step to step: what is derived from a list is kept for so many.
LISTS = 8

# The columns of ``Work.report``.
DIAGNOSTICS = ("update_rms", "clip_factor", "parameter_scale", "skipped")


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
        seed: an integer; of the bits behind ``stochastic_rounding`` and int8 momentum.
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
        seed: int = 0,
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
        self._reports: dict[Tensor, Tensor] | None = {} if diagnostics else None
        self._in_backward: StepInBackward | None = None
        self._forget()
        self._skipped: dict[torch.device, Tensor] = {}
        self._given: set[int] = set()  # ids of the parameters that came in through a group
        self._handle = compiled.register(self)
        super().__init__(params, defaults)

    def _forget(self) -> None:
        """Drop what is derived from groups and state, so that the next step derives it anew."""
        self._work: dict[Tensor, Work] = {}
        self._shards: dict[Tensor, Shard] = {}
        self._sharded: Sharded | None = None
        self._settings: dict[int, tuple[tuple[object, ...], Settings]] = {}
        # Stepped in the backward pass, every parameter is a list of its own.
        self._lists = LISTS if self._in_backward is None else max(LISTS, self._in_backward.lists)
        self._native = cpu.Step(self._lists) if native.available() else None
        self._triton = cuda.Step(self._lists)

    def _kernel(self, fused: bool | None, device: torch.device) -> Kernel:
        """The kernel for a device; see ``fused``."""
        if fused is False:
            return eager.step
        if device.type == "cpu" and self._native is not None:
            return self._native
        cause = native.why_not() if device.type == "cpu" else cuda.why_not(device)
        if cause is None and device.type != "cpu":
            return self._triton
        if fused:
            rule, remedy = "None or False here", f"{cause} Pass fused=None for the fastest kernel there is."
            raise RuntimeError(message(f"fused for {device.type} tensors", rule, fused, remedy))
        return eager.step

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
            at least 1 (eq. 10); ``parameter_scale``, what the learning rate was multiplied by (eq. 9); ``skipped``, how
            often the parameter was left alone. Zeros for one that was never updated.
            Copies: nothing waits for the device until they are read.

        Raises:
            RuntimeError: they are not recorded.
        """
        if self._reports is None:
            raise RuntimeError(message("diagnostics", "True to have any", False, "Pass it to the constructor."))
        found = {}
        for number, group in enumerate(self.param_groups):
            first = self._first(number)
            names = group.get("param_names") or range(first, first + len(group["params"]))
            for name, param in zip(names, group["params"], strict=True):
                if param in self._reports:
                    report = self._reports[param].clone()
                    values = (report[0] if report.shape[0] == 1 else report).unbind(-1)
                    found[str(name)] = dict(zip(DIAGNOSTICS, values, strict=True))
        return found

    def _first(self, number: int) -> int:
        """The place of a group's first parameter among all the optimizer's parameters."""
        return sum(len(group["params"]) for group in self.param_groups[:number])

    def _name_of(self, number: int, position: int) -> str:
        names = self.param_groups[number].get("param_names")
        return names[position] if names else f"parameter {self._first(number) + position}"

    def _report_of(self, param: Tensor, roles: Layout) -> Tensor | None:
        if self._reports is None:
            return None
        if param not in self._reports:
            self._reports[param] = new_report(roles, param.device)
        return self._reports[param]

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
        self._given.update(map(id, self.param_groups[-1]["params"]))
        self._forget()

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
                loss = closure()
        if torch.compiler.is_compiling():
            self._traced_step()
            return loss
        self._update([(number, None) for number in range(len(self.param_groups))])
        return loss

    def _update(self, chosen: Sequence[tuple[int, Sequence[int] | None]]) -> None:
        """Update what has a gradient among the positions of groups that are ``chosen``; None is all of a group."""
        # Every check comes before the first write: a step happens wholly or not at all.
        work = [w for number, positions in chosen for w in self._collect(number, positions)]
        shards = [shard for number, positions in chosen for shard in self._collect_shards(number, positions)]
        if cuda.is_capturing() and any(not {*w.slots} <= {*self.state.get(w.param, ())} for w in work):
            remedy = "Call step once before the capture, so that no replay makes the state anew."
            raise RuntimeError(message("the state of a captured step", "complete", "none for some parameters", remedy))
        for w in work:
            w.state = self._state_of(w)
        if shards:
            if self._sharded is None:
                from adafactor.engine.torch.sharded.step import Sharded

                self._sharded = Sharded(self._lists)
            self._sharded.step(shards, self._count_of)
        self._run(work)

    def _check_capture(self) -> None:
        """torch's own check that a captured step has ``capturable=True``; older releases have another name for it."""
        check = getattr(self, "_accelerator_graph_capture_health_check", None)
        (check or self._cuda_graph_capture_health_check)()

    def _count_of(self, device: torch.device) -> Tensor:
        """The number of tensors left alone on a device."""
        if device not in self._skipped:
            self._skipped[device] = torch.zeros((), dtype=torch.int64, device=device)
        return self._skipped[device]

    def _run(self, work: Sequence[Work]) -> None:
        lists: dict[tuple[torch.device, Kernel], list[Work]] = {}
        for w in work:
            lists.setdefault((w.param.device, w.kernel), []).append(w)
        try:
            for (device, kernel), members in lists.items():
                kernel(members, self._count_of(device))
        finally:
            _release(work)

    def _collect(self, number: int, positions: Sequence[int] | None = None) -> list[Work]:
        """One item of work per parameter of a group that has a gradient. All checks are here; nothing is written."""
        group = self.param_groups[number]
        settings = self._group_settings(number, group)
        first = self._first(number)
        work: dict[Tensor, Work] = {}  # a parameter that is listed twice is updated once
        for position in range(len(group["params"])) if positions is None else positions:
            param = group["params"][position]
            grad = param.grad
            if grad is None or not param.numel() or is_sharded(param):
                continue
            check_tensors(param, grad)
            check_origin(param, self._given)
            if group["capturable"] and param.device.type == "cpu":
                remedy = "A graph captures what runs on an accelerator; leave it out."
                raise RuntimeError(message("capturable", "False for cpu tensors", True, remedy))
            kernel = self._kernel(group["fused"], param.device)
            w = self._work.get(param)
            if w is None or w.layout.shape != param.shape:
                roles = _layout(group, position, param)
                w = Work(param, grad, {}, roles, settings, group["lr"], first + position, kernel)
                w.report = self._report_of(param, roles)
                self._work[param] = w
            w.grad, w.settings, w.lr, w.kernel = grad, settings, group["lr"], kernel
            work[param] = w
        return list(work.values())

    def _collect_shards(self, number: int, positions: Sequence[int] | None = None) -> list[Shard]:
        """The sharded parameters of a group. Those without a gradient here too: other ranks may have one."""
        group = self.param_groups[number]
        found: dict[Tensor, Shard] = {}
        first = self._first(number)
        for position in range(len(group["params"])) if positions is None else positions:
            param = group["params"][position]
            if not is_sharded(param) or not param.numel() or not (param.requires_grad or param.grad is not None):
                continue
            from adafactor.engine.torch.sharded.shard import gradient, shard_of

            settings, grad = self._group_settings(number, group), gradient(param)
            if settings.momentum_dtype == torch.int8 and settings.hyperparameters.momentum is not None:
                remedy = "Its blocks of 256 elements would cross the shards; torch.bfloat16 is the smallest here."
                raise RuntimeError(message("momentum_dtype of a DTensor", "a float dtype", torch.int8, remedy))
            shard = self._shards.get(param)
            if shard is None or shard.placement.roles.shape != param.shape:
                name = self._name_of(number, position)
                roles = _layout(group, position, param)
                shard = shard_of(param, roles, settings, group["lr"], first + position, name)
                shard.work.report = self._report_of(param, shard.work.layout)
                self._shards[param] = shard
            if grad is None and not shard.placement.dims:
                continue
            check_tensors(param.to_local(), param.to_local() if grad is None else grad.to_local())
            shard.work.settings, shard.work.lr = settings, group["lr"]
            shard.fused = self._kernel(group["fused"], shard.work.param.device) is self._native
            shard.open(grad, self.state)
            found[param] = shard
        return list(found.values())

    def _state_of(self, w: Work) -> dict[str, Tensor]:
        """The parameter's state, made of zeros where there is none (their weight is 0 at t = 1)."""
        state: dict[str, Tensor] = self.state[w.param]
        dtype, device = math_dtype(w.param.dtype), w.param.device
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.int64, device=device)
            for name, shape in w.layout.slots.items():
                state[name] = torch.zeros(shape, dtype=dtype, device=device)
        if w.settings.hyperparameters.momentum is not None and "momentum" not in state:
            stored = w.settings.momentum_dtype or dtype
            memory = torch.contiguous_format if stored == torch.int8 else torch.preserve_format
            state["momentum"] = torch.zeros_like(w.param, dtype=stored, memory_format=memory)
            if stored == torch.int8:
                scales = int8.scales(w.param.numel())
                state["momentum_scale"] = torch.zeros(scales, dtype=torch.float32, device=device)
        if w.compensated and "residual" not in state:
            state["residual"] = torch.zeros_like(w.param, dtype=torch.bfloat16, memory_format=torch.preserve_format)
        return state

    def _traced_step(self) -> None:
        """The step as torch.compile sees it: one operator per group."""
        number = 0
        for group in self.param_groups:
            params: list[Tensor] = []
            grads: list[Tensor] = []
            state: list[Tensor] = []
            self._init_group(group, params, grads, state)
            if params:
                torch.ops.adafactor.step(self._handle, number, params, grads, state)
            number += 1  # noqa: SIM113 - the compiler must see that group comes from param_groups

    def _init_group(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], state: list[Tensor]
    ) -> bool:
        """List the tensors of a group. By this name torch.compile knows to run it once, untraced."""
        number = next(number for number, other in enumerate(self.param_groups) if other is group)
        if any(map(is_sharded, group["params"])):
            remedy = "Compile the model, and call step outside of what is compiled."
            raise RuntimeError(message("a parameter in a compiled step", "an unsharded tensor", "a DTensor", remedy))
        work = self._collect(number)
        for w in work:
            params.append(w.param)
            grads.append(w.grad)
            values = self._state_of(w)
            state.extend(values[name] for name in w.slots)
        _release(work)
        return False

    def _run_group(
        self, number: int, params: Sequence[Tensor], grads: Sequence[Tensor], state: Sequence[Tensor]
    ) -> None:
        """Update the tensors that compiled code passes, which need not be the parameters themselves."""
        rest = iter(state)
        work = self._collect(number)
        passed = [
            replace(w, param=param, grad=grad, state={name: next(rest) for name in w.slots})
            for w, param, grad in zip(work, params, grads, strict=True)
        ]
        _release(work)
        self._run(passed)

    def _group_settings(self, number: int, group: dict[str, Any]) -> Settings:
        """The group's settings: checked when they change, the learning rate every time."""
        values = tuple([group[name] for name in SETTINGS])
        known = self._settings.get(number)
        if known is not None and known[0] == values:
            check_lr(group["lr"])
            return known[1]
        settings = translate(group)
        self._settings[number] = values, settings
        return settings

    def state_dict(self) -> dict[str, Any]:
        """The state and the groups, as every optimizer gives them.

        A callable ``factoring`` is left out, because code does not belong in a checkpoint: the optimizer that
        loads one uses its own.
        """
        packed = super().state_dict()
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
        return {**super().__getstate__(), "_skipped": self._skipped, "_reports": None if self._reports is None else {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Both unpickling and the base class's load_state_dict come through here.
        super().__setstate__(state)
        self.__dict__.setdefault("_in_backward", None)
        self.__dict__.setdefault("_reports", None)
        if "_given" not in self.__dict__:
            self._given = {id(param) for group in self.param_groups for param in group["params"]}
        if "_handle" not in self.__dict__:
            self._handle = compiled.register(self)
        for values in self.state.values():
            for name, value in values.items():
                if isinstance(value, checkpoint.Held):
                    values[name] = value.tensor
        for group in self.param_groups:
            for name, default in self.defaults.items():
                if name != "differentiable":
                    group.setdefault(name, default)
        self._forget()


def _release(work: Sequence[Work]) -> None:
    """Let go of the gradients, so that zero_grad(set_to_none=True) can free them."""
    for w in work:
        del w.grad


def _layout(group: Mapping[str, Any], position: int, param: Tensor) -> Layout:
    """The role of every axis of a parameter, by the group's policy."""
    names = group.get("param_names")
    name = names[position] if names else ""
    return layout(param.shape, group["factoring"], group["min_dim_size_to_factor"], name=name)
