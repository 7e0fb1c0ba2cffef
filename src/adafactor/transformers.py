"""transformers' own names for this optimizer: ``TrainingArguments(optim="adafactor")`` builds it after one line.

    import adafactor.transformers

    adafactor.transformers.install()

``docs/loops.md`` says what is the same, and what to do with other loops.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partialmethod
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import transformers

import adafactor.torch
from adafactor.core.dialects import FORMATS, OUR_TORCH, TRANSFORMERS
from adafactor.core.errors import message
from adafactor.engine.torch.work import is_sharded
from adafactor.torch.backward.refusals import unwrapped
from adafactor.torch.diagnostics import logged
from adafactor.torch.members import Positions

_OURS = {plain: ours for ours, plain in FORMATS[OUR_TORCH].words.items()}
#: transformers' words for a group, to ours, and ours for a parameter's state, to its.
_WORDS = {theirs: _OURS[plain] for theirs, plain in FORMATS[TRANSFORMERS].words.items() if "eps" not in theirs}
_SLOTS = {ours: theirs for theirs, ours in FORMATS[TRANSFORMERS].slots.items() if ours != "momentum"}


class Adafactor(adafactor.torch.Adafactor):
    """This project's optimizer with the arguments and the checkpoints of ``transformers.optimization.Adafactor``.

    Args:
        params: as there, or as :class:`adafactor.torch.Adafactor` takes them.
        lr: learning rate; ``None``, and nothing else, with ``relative_step``.
        eps, clip_threshold, decay_rate, beta1, weight_decay, scale_parameter, relative_step, warmup_init: as there.
        more: arguments of :class:`adafactor.torch.Adafactor` that transformers has not, ``stochastic_rounding`` say.

    ``state_dict`` has transformers' names, so that either resumes the other's run. With ``beta1`` or sharded parameters
    it has this project's, and only this project resumes from it: transformers averages after the learning rate.

    Raises:
        TypeError, ValueError: as there; or ``weight_decay`` beside ``scale_parameter`` or ``relative_step``.
    """

    def __init__(  # noqa: PLR0913 - theirs
        self,
        params: Any,
        lr: Any = None,
        eps: tuple[float | None, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        beta1: float | None = None,
        weight_decay: float = 0.0,
        scale_parameter: bool = True,
        relative_step: bool = True,
        warmup_init: bool = False,
        **more: Any,
    ) -> None:
        if (lr is None) != bool(relative_step):
            remedy = "A relative step is min(1e-2, 1/sqrt(t)); pass relative_step=False for a rate of your own."
            raise ValueError(message("lr", "None with relative_step=True, and a number without", lr, remedy))
        if warmup_init and not relative_step:
            raise ValueError(message("warmup_init", "False without relative_step", True, "Use a scheduler instead."))
        super().__init__(
            params,
            lr=1e-2 if lr is None else lr,
            eps=eps,
            d=clip_threshold,
            beta2_decay=decay_rate,
            beta1=beta1,
            weight_decay=weight_decay,
            scale_parameter=scale_parameter,
            relative_step=relative_step,
            **more,
        )
        self.defaults["warmup_init"] = warmup_init
        for group in self.param_groups:
            group.setdefault("warmup_init", warmup_init)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, in transformers' words or ours."""
        group = {_WORDS.get(name, name): value for name, value in param_group.items()}
        told = {**self.defaults, **group}
        if told["weight_decay"] and (told["scale_parameter"] or told["relative_step"]):
            rule = "0 with scale_parameter or relative_step"
            remedy = "transformers multiplies it by the scaled step; adafactor.torch.Adafactor multiplies it by lr."
            raise ValueError(message("weight_decay", rule, told["weight_decay"], remedy))
        super().add_param_group(group)

    def _update(self, chosen: Positions) -> None:
        for number, positions in chosen:
            group = self.param_groups[number]
            if group["warmup_init"] and group["params"]:
                param = group["params"][positions[0] if positions else 0]
                group["lr"] = 1e-6 * (1 + int(self.state.get(param, {}).get("step", 0)))
        super()._update(chosen)

    def state_dict(self) -> dict[str, Any]:
        """The state and the groups in transformers' names; with momentum, or shards, in this project's."""
        packed = super().state_dict()
        exact = {"step", "residual", *_SLOTS}
        sharded = any(is_sharded(param) for group in self.param_groups for param in group["params"])
        if sharded or not all(set(values) <= exact for values in packed["state"].values()):
            return packed
        words = {ours: theirs for theirs, ours in _WORDS.items()}
        groups = [{words.get(name, name): value for name, value in group.items()} for group in packed["param_groups"]]
        for group in groups:
            group["eps"] = (1e-30 if group["eps"][0] is None else group["eps"][0], group["eps"][1])
            group["lr"] = None if group["relative_step"] else group["lr"]
        state = {
            key: {_SLOTS.get(slot, slot): int(value) if slot == "step" else value for slot, value in values.items()}
            for key, values in packed["state"].items()
        }
        return {**packed, "state": state, "param_groups": groups}


def install(**options: Any) -> None:
    """Let ``TrainingArguments(optim="adafactor")`` build :class:`Adafactor`, in this process from now on.

    Args:
        options: more arguments for it, ``stochastic_rounding=True`` say. ``optim_args`` has no effect on
            transformers' own Adafactor, and none here.

    Raises:
        RuntimeError: this release of transformers keeps the name somewhere else. Nothing has been modified.
    """
    module = _home()
    before = module.Adafactor
    made = type("Adafactor", (Adafactor,), {"__init__": partialmethod(Adafactor.__init__, **options)})
    module.Adafactor = made if options else Adafactor
    if _built() is not module.Adafactor:
        module.Adafactor = before
        raise _moved()


@contextmanager
def installed(**options: Any) -> Iterator[None]:
    """:func:`install` for a ``with`` block; what was there before comes back after it."""
    module = _home()
    before = module.Adafactor
    install(**options)
    try:
        yield
    finally:
        module.Adafactor = before


def _home() -> Any:
    """The module in which Trainer looks up the class, by a global name: which one depends on the release."""
    for name in ("transformers.trainer_optimizer", "transformers.trainer"):
        try:
            module = import_module(name)
        except ModuleNotFoundError:
            continue
        if isinstance(getattr(module, "Adafactor", None), type):
            return module
    raise _moved()


def _built() -> object:
    """The class that Trainer builds for ``optim="adafactor"``."""
    args = SimpleNamespace(
        **{"optim": transformers.training_args.OptimizerNames.ADAFACTOR, "optim_args": None, "learning_rate": 1e-3},
        **{"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8},
    )
    return transformers.Trainer.get_optimizer_cls_and_kwargs(args)[0]  # type: ignore[arg-type]


def _moved() -> RuntimeError:
    remedy = "Pass optimizer_cls_and_kwargs=(adafactor.transformers.Adafactor, {...}) to Trainer, and tell us."
    rule = "a release that looks its Adafactor up by name"
    return RuntimeError(message("transformers", rule, transformers.__version__, remedy))


class ReleaseGradients(transformers.TrainerCallback):
    """Let Trainer's backward passes step :class:`adafactor.torch.Adafactor`; its loop stays what it is.

    Args:
        options: of :func:`adafactor.torch.step_in_backward`, ``max_norm`` with ``clip="tensor"`` say.
    """

    def __init__(self, **options: Any) -> None:
        self._options = options
        self._released: adafactor.torch.StepInBackward | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raises ValueError: Trainer would clip gradients, and find none."""
        if args.max_grad_norm:
            remedy = 'Pass max_norm=... and clip="tensor" to ReleaseGradients, or leave it to the optimizer (d).'
            raise ValueError(message("max_grad_norm", "0 with ReleaseGradients", args.max_grad_norm, remedy))
        self._remove()
        self._released = adafactor.torch.step_in_backward(
            kwargs["model"], kwargs["optimizer"], loop="framework", **self._options
        )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._remove()

    def _remove(self) -> None:
        if self._released is not None:
            self._released.remove()
        self._released = None


def log_effective_lr(trainer: transformers.Trainer, tensors: bool = False) -> None:
    """Add ``effective_lr/min``, ``median`` and ``max`` to what Trainer logs beside its learning rate.

    They go where it goes: history, console, TensorBoard, Weights & Biases. See
    :meth:`adafactor.torch.Adafactor.effective_lr`.

    Args:
        trainer: before ``train()``.
        tensors: ``effective_lr/<name>`` of every tensor instead.
    """
    log = trainer.log

    def log_with_rates(logs: dict[str, float], *arguments: Any, **keywords: Any) -> None:
        optimizer = unwrapped(trainer.optimizer)
        if "learning_rate" in logs and isinstance(optimizer, adafactor.torch.Adafactor):
            logs.update(logged(optimizer.effective_lr(), tensors))
        log(logs, *arguments, **keywords)

    trainer.log = log_with_rates  # type: ignore[method-assign]  # meant to be overridden; callbacks come too late


__all__ = ["Adafactor", "ReleaseGradients", "install", "installed", "log_effective_lr"]
