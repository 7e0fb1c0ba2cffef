"""From shapes to bytes: what training will need, part by part and optimizer by optimizer."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from adafactor.core.errors import message
from adafactor.planning.optimizers import HALF, Adafactor, Framework, Optimizer, defaults
from adafactor.planning.parameters import Parameter, parameters
from adafactor.planning.zero import STAGES, sizes, takes


@dataclass(frozen=True, slots=True)
class Usage:
    """Bytes that one optimizer needs on one device, activations left out.

    Attributes:
        optimizer: its rule.
        weights: all tensors of the model, trained or not.
        gradients: of all trained tensors; with gradient release of the largest one, or of the largest layer where
            FSDP2 reduces a layer's gradients together.
        state: what the optimizer keeps from step to step.
        temporaries: what lives during a step only; ``None`` where the compiler decides.
    """

    optimizer: Optimizer
    weights: int
    gradients: int
    state: int
    temporaries: int | None

    @property
    def total(self) -> int:
        """The sum; unknown temporaries count as none."""
        return self.weights + self.gradients + self.state + (self.temporaries or 0)


@dataclass(frozen=True, slots=True)
class Plan:
    """What training a model needs.

    Attributes:
        parameters: the model's tensors, whole.
        shards: ranks that share them.
        zero: by which stage of DeepSpeed's ZeRO, 0 for FSDP2.
        usages: one per optimizer.
    """

    parameters: tuple[Parameter, ...]
    shards: int
    usages: tuple[Usage, ...]
    zero: int = 0

    @property
    def trained(self) -> list[Parameter]:
        return [p for p in self.parameters if p.trained]

    @property
    def size(self) -> int:
        """Numbers in trained tensors."""
        return sum(p.size for p in self.trained)

    @property
    def gathered(self) -> int:
        """Bytes of the largest layer's weights: what FSDP2 makes whole while that layer computes."""
        return _largest_layer(self.parameters, 1)

    def without_triton(self) -> Plan:
        """The same on a GPU without Triton, where torch operations run."""
        usages = []
        for usage in self.usages:
            one = usage.optimizer
            if isinstance(one, Adafactor) and not self.zero:
                one = replace(one, triton=False)
                usage = replace(usage, optimizer=one, temporaries=one.temporaries(self.trained, self.shards))
            usages.append(usage)
        return replace(self, usages=tuple(usages))

    def under_zero(self, stage: int) -> Plan:
        """The same where DeepSpeed's ZeRO of a stage shares the model among as many ranks.

        Figures are those of the rank that keeps most (of stage 3 the first), with the float32 partition among the
        weights; of the optimizers that step flat partitions as they step whole tensors.

        Raises:
            ValueError: there is no such stage, or no such optimizer.
        """
        if isinstance(stage, bool) or stage not in STAGES:
            raise ValueError(message("stage", "1, 2 or 3", stage, "It is one of DeepSpeed's ZeRO."))
        rules = tuple(usage.optimizer for usage in self.usages if takes(usage.optimizer))
        rules = _some(rules, "ZeRO's partitions", "these")
        usages = tuple(Usage(one, *sizes(one, self.parameters, stage, self.shards)) for one in rules)
        return replace(self, usages=usages, zero=stage)

    def top(self, count: int) -> list[Parameter]:
        """The ``count`` tensors of the most bytes, the largest first."""
        return sorted(self.parameters, key=lambda p: -p.nbytes)[:count]


def _largest_layer(tensors: Iterable[Parameter], shards: int) -> int:
    """Bytes that one rank holds of the layer of which it holds most."""
    layers: dict[str, int] = {}
    for p in tensors:
        layer = layer_of(p.name)
        layers[layer] = layers.get(layer, 0) + p.local(shards).nbytes
    return max(layers.values(), default=0)


def layer_of(name: str) -> str:
    """``model.layers.3`` of ``model.layers.3.mlp.up_proj.weight``; the module of a tensor outside numbered layers."""
    parts = name.replace("/", ".").split(".")
    number = next((at for at, part in enumerate(parts) if part.isdigit()), len(parts) - 2)
    return ".".join(parts[: number + 1]) or name


def plan(
    model: str | os.PathLike[str] | Mapping[str, Any] | Iterable[Any],
    *,
    dtype: str | None = None,
    shards: int = 1,
    frozen: Sequence[str] = (),
    framework: Framework = "torch",
    optimizers: Iterable[Optimizer] | None = None,
) -> Plan:
    """Say what training a model needs, before training: weights, gradients, optimizer state, temporaries.

    Activations are not included: they depend on batch, sequence length and checkpointing.

    Args:
        model: a model file or folder (:func:`adafactor.planning.files.read`), of which no weight is read; or a mapping
            from name to shape or tensor, such as ``dict(model.named_parameters())``; or an iterable of shapes,
            tensors or ``Parameter``.
        dtype: ``"float32"``, ``"bfloat16"``, ``"float16"`` or ``"float64"`` for weights and gradients; ``None`` keeps
            what is stored (float32 for shapes).
        shards: FSDP2 ranks. Figures are the first rank's, which holds the most: dimension 0 of a tensor is divided,
            rounded up. Optimizers that cannot step over FSDP2's parameters are left out.
        frozen: patterns (``*``, ``?``) of names that are not trained.
        framework: ``"torch"``, ``"keras"`` or ``"jax"``: which optimizers are compared by default.
        optimizers: which to compare; rules of ``adafactor.planning.optimizers``.

    Raises:
        TypeError, ValueError: an argument or a file does not fit.
    """
    if isinstance(shards, bool) or not isinstance(shards, int):
        raise TypeError(message("shards", "an integer", shards, "Pass 1 for one device."))
    if shards < 1:
        raise ValueError(message("shards", ">= 1", shards, "Pass 1 for one device."))
    if isinstance(model, str | os.PathLike):
        from adafactor.planning import files

        model = files.read(model)
    tensors = parameters(model, dtype, frozen)
    half = any(p.trained and p.dtype in HALF for p in tensors)
    chosen = tuple(defaults(framework, half) if optimizers is None else optimizers)
    if shards > 1:
        chosen = _some(tuple(one for one in chosen if one.sharded), "FSDP2's parameters", framework)
    whole = [p for p in tensors if p.trained]
    weights = sum(p.local(shards).nbytes for p in tensors)
    each = [p.local(shards).nbytes for p in whole]
    released = max(each, default=0) if shards == 1 else _largest_layer(whole, shards)

    def usage(one: Optimizer) -> Usage:
        gradients = released if one.release else sum(each)
        return Usage(one, weights, gradients, one.state(whole, shards), one.temporaries(whole, shards))

    return Plan(tuple(tensors), shards, tuple(map(usage, chosen)))


def _some(chosen: tuple[Optimizer, ...], over: str, framework: str) -> tuple[Optimizer, ...]:
    """Those that step over what several devices share, of which there must be one."""
    if not chosen:
        rule = f"some that step over {over}"
        raise ValueError(message("the optimizers", rule, f"none of {framework}'s", 'Pass framework="torch".'))
    return chosen
