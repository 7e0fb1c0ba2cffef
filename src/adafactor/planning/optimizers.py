"""What each optimizer keeps for a parameter, in bytes: the rule of every one, checked against what it allocates.

State is everything that ``optimizer.state`` (PyTorch), ``optimizer.variables`` (Keras) or the state (optax) holds. The
tests build each optimizer over the shapes of public models and compare to the byte; where a rule is read from someone
else's source, its docstring says which.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from adafactor.core.canonical import Canonical, canonical
from adafactor.core.dialects import last_two
from adafactor.core.errors import message
from adafactor.core.factoring import POLICIES, Factoring, Layout, Shape, layout, validate
from adafactor.core.untrusted import BITS
from adafactor.planning.parameters import Parameter, local_shape

Framework = Literal["torch", "keras", "jax"]
FRAMEWORKS: tuple[Framework, ...] = ("torch", "keras", "jax")
Slots = dict[str, int]

MOMENTUM = (None, "float32", "bfloat16", "float16", "int8")
#: Elements that share one float32 scale, in int8 momentum as in bitsandbytes' state.
BLOCK = 256
HALF = ("bfloat16", "float16")
#: Bytes that a framework's optimizers keep once: Keras its two scalars, optax a count.
ONCE = {"torch": 0, "keras": 8, "jax": 4}
#: Elements of a block of torch operations on an accelerator (``engine/torch/blocks.py``).
DEVICE_BLOCK = 1 << 22
#: How the Triton kernels cut matrices (``engine/torch/triton/table.py``): most and fewest rows of a part, warps in all.
PART_ROWS, WARPS = (512, 32), 2 * 132 * 16


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """An optimizer as the plan sees it; a rule per class.

    Attributes:
        label: how tables call it.
        sharded: whether it steps over FSDP2's parameters.
        release: whether a gradient is used and freed while the backward pass still runs.
    """

    label: str
    sharded: bool = False
    release: bool = False

    def slots(self, parameter: Parameter, shards: int = 1) -> Slots:
        """Name and bytes of what is kept for one trained parameter; on the first of ``shards`` ranks."""
        raise NotImplementedError

    def shared(self, trained: Sequence[Parameter]) -> int:
        """Bytes kept once, whatever the parameters."""
        return 0

    def temporaries(self, trained: Sequence[Parameter], shards: int = 1) -> int | None:
        """Peak bytes that live during a step only; ``None`` where that is the compiler's decision."""
        return None

    def state(self, trained: Sequence[Parameter], shards: int = 1) -> int:
        """Bytes kept for all trained parameters."""
        return sum(sum(self.slots(p, shards).values()) for p in trained) + self.shared(trained)


@dataclass(frozen=True, kw_only=True)
class TorchAdamW(Optimizer):
    """``torch.optim.AdamW(fused=True)``: two averages like the parameter, and a float32 step. Updates in place."""

    label: str = "torch.optim.AdamW(fused=True)"
    sharded: bool = True

    def slots(self, parameter: Parameter, shards: int = 1) -> Slots:
        size = parameter.local(shards).nbytes
        return {"step": 4, "exp_avg": size, "exp_avg_sq": size}

    def temporaries(self, trained: Sequence[Parameter], shards: int = 1) -> int:
        return 0


@dataclass(frozen=True, kw_only=True)
class AdamW8bit(TorchAdamW):
    """``bitsandbytes.optim.AdamW8bit`` of bitsandbytes 0.50.2, ``Optimizer2State.init_state``.

    Fewer than 4,096 elements keep two float32 averages. Others keep two bytes per element, two float32 maxima per
    256 elements, and all of them together two code books of 256 float32 numbers. Steps are Python integers.
    """

    label: str = "bitsandbytes AdamW8bit"

    def slots(self, parameter: Parameter, shards: int = 1) -> Slots:
        size = parameter.local(shards).size
        if size < 4096:
            return {"state1": 4 * size, "state2": 4 * size}
        maxima = 4 * -(-size // BLOCK)
        return {"state1": size, "state2": size, "absmax1": maxima, "absmax2": maxima}

    def shared(self, trained: Sequence[Parameter]) -> int:
        return 2 * 4 * 256 if any(p.size >= 4096 for p in trained) else 0


def _last_two(parameter: Parameter) -> Slots:
    """Row and column over the last two axes, or a vector's second moment, in the parameter's dtype."""
    kept = last_two(parameter.shape).slots
    return {slot: math.prod(shape) * parameter.itemsize for slot, shape in kept.items()}


@dataclass(frozen=True, kw_only=True)
class TorchAdafactor(Optimizer):
    """``torch.optim.Adafactor``: row and column over the last two axes, in the gradient's dtype, and a float32 step.

    It does not step over DTensors (PyTorch 2.13). Its update is of the parameter's size, and the previous parameter's
    lives until the next one replaces it.
    """

    label: str = "torch.optim.Adafactor"

    def slots(self, parameter: Parameter, shards: int = 1) -> Slots:
        return {"step": 4, **_last_two(parameter)}

    def temporaries(self, trained: Sequence[Parameter], shards: int = 1) -> int:
        sizes = [0, *(p.nbytes for p in trained)]
        return max((a + b for a, b in pairwise(sizes)), default=0)


@dataclass(frozen=True, kw_only=True)
class KerasAdamW(Optimizer):
    """``keras.optimizers.AdamW``: two averages like the variable.

    Keras keeps an int32 iteration (int64 on TensorFlow, 4 bytes more) and a float32 learning rate.
    """

    label: str = "keras.optimizers.AdamW"

    def slots(self, parameter: Parameter, shards: int = 1) -> Slots:
        return {"momentum": parameter.nbytes, "velocity": parameter.nbytes}

    def shared(self, trained: Sequence[Parameter]) -> int:
        return ONCE["keras"]


@dataclass(frozen=True, kw_only=True)
class KerasAdafactor(KerasAdamW):
    """``keras.optimizers.Adafactor``: row and column in the variable's dtype, and a velocity of the variable's size.

    The row and column of a vector are two int32 scalars that nothing reads.
    """

    label: str = "keras.optimizers.Adafactor"

    def slots(self, parameter: Parameter, shards: int = 1) -> Slots:
        kept = _last_two(parameter) if len(parameter.shape) >= 2 else {"row": 4, "column": 4}
        return {**kept, "velocity": parameter.nbytes}


@dataclass(frozen=True, kw_only=True)
class OptaxAdamW(Optimizer):
    """``optax.adamw``: two averages like the parameter, and one int32 count."""

    label: str = "optax.adamw"

    def slots(self, parameter: Parameter, shards: int = 1) -> Slots:
        return {"mu": parameter.nbytes, "nu": parameter.nbytes}

    def shared(self, trained: Sequence[Parameter]) -> int:
        return ONCE["jax"]


@dataclass(frozen=True, kw_only=True)
class Adafactor(Optimizer):
    """This package's: float32 statistics (float64 of a float64 parameter) in the shapes of ``adafactor.layout``.

    PyTorch keeps an int64 step per parameter, Keras its two scalars, optax one int32 count.

    Args:
        framework: whose front end.
        factoring, min_dim_size_to_factor: as in :func:`adafactor.layout`.
        momentum: dtype of the momentum, ``None`` for none. int8 has a float32 scale per 256 elements, and does not go
            together with FSDP2's parameters.
        compensated: PyTorch only: a bfloat16 residual for every bfloat16 or float16 weight.
        release: PyTorch only, ``step_in_backward``: gradients are used and freed in the backward pass.
        triton: PyTorch only: the Triton kernels run, as on a GPU with a CUDA build; False is for torch operations.
    """

    label: str = ""
    framework: Framework = "torch"
    factoring: Factoring = "last_two"
    min_dim_size_to_factor: int = 1
    momentum: str | None = None
    compensated: bool = False
    triton: bool = True

    def __post_init__(self) -> None:
        validate(self.factoring, self.min_dim_size_to_factor)
        if self.framework not in FRAMEWORKS:
            raise ValueError(message("framework", f"one of {', '.join(FRAMEWORKS)}", self.framework, 'Try "torch".'))
        if self.momentum not in MOMENTUM:
            names = ", ".join(map(str, MOMENTUM[1:]))
            raise ValueError(message("momentum", f"{names} or None", self.momentum, "None keeps no momentum."))
        object.__setattr__(self, "sharded", self.framework == "torch" and self.momentum != "int8")
        if not self.label:
            policy = self.factoring if isinstance(self.factoring, str) else "callable factoring"
            kept = f", momentum {self.momentum}" if self.momentum else ", compensated" if self.compensated else ""
            released = ", gradient release" if self.release else ""
            object.__setattr__(self, "label", f"adafactor, {policy}{kept}{released}")

    def layout(self, parameter: Parameter) -> Layout:
        return layout(parameter.shape, self.factoring, self.min_dim_size_to_factor, name=parameter.name)

    def slots(self, parameter: Parameter, shards: int = 1) -> Slots:
        if self.framework == "torch" and not parameter.size:
            return {}  # it leaves empty tensors alone
        roles, itemsize = self.layout(parameter), 8 if parameter.dtype == "float64" else 4
        slots = {"step": 8} if self.framework == "torch" else {}
        for name, shape in roles.slots.items():
            # Dimension 0 is split where the statistic keeps it; a statistic that does not is replicated.
            local: Shape = shape if 0 in roles.lacks(name) else local_shape(shape, shards)
            slots[name] = itemsize * math.prod(local)
        if self.momentum is not None:
            size = parameter.local(shards).size
            # "float32" is the default of PyTorch and Keras, which is: like the statistics.
            like = self.momentum == "float32" and self.framework != "jax"
            slots["momentum"] = size * (itemsize if like else BITS[self.momentum] // 8)
            if self.momentum == "int8":
                slots["momentum_scale"] = 4 * -(-size // BLOCK)
        if self.compensated and parameter.dtype in HALF:
            slots["residual"] = 2 * parameter.local(shards).size
        return slots

    def shared(self, trained: Sequence[Parameter]) -> int:
        return ONCE[self.framework]

    def temporaries(self, trained: Sequence[Parameter], shards: int = 1) -> int | None:
        """PyTorch on a GPU: what stands between the Triton kernels, or blocks of torch operations without them.

        The latter are two blocks, one more with momentum, four for half-precision parameters, and a few row and column
        sums. Parameters of float64 know no other way. The native kernels of the CPU need next to nothing.
        """
        if self.framework != "torch" or not trained:
            return None if trained else 0
        kernels: list[Layout] = []
        rest: list[tuple[Parameter, Layout]] = []
        for p in trained:
            roles = self.layout(p)
            if self.triton and p.dtype != "float64" and canonical(roles) is not None:
                kernels.append(roles)
            else:
                rest.append((p, roles))
        # A step's sums lie where the last one's lay.
        lists = [[roles] for roles in kernels] if self.release else [kernels]
        buffers = max(map(kernel_buffers, lists), default=0) // shards
        if not rest:
            return buffers
        half, wide = (any(p.dtype in dtypes for p, _ in rest) for dtypes in (HALF, ("float64",)))
        block = max(min(p.local(shards).size, DEVICE_BLOCK) for p, _ in rest)
        sums = max((roles.state_size for _, roles in rest if roles.factored), default=0)
        return buffers + (8 if wide else 4) * (block * (4 if half else 3 if self.momentum else 2) + 4 * sums)


def kernel_buffers(layouts: Iterable[Layout]) -> int:
    """Bytes of the sums that the Triton kernels leave for each other: S and W of every part, and the finished rows."""
    widths: dict[int, list[Canonical]] = {}
    total = 0
    for roles in layouts:
        form = canonical(roles)
        assert form is not None
        if not form.factored:
            total += 16 * -(-form.size // 16384)
        elif form.size:
            power = (form.columns - 1).bit_length()
            width = 1 << (max(2, power + power % 2) if form.columns <= 1024 else min(power, 15))
            widths.setdefault(width, []).append(form)
    for width, forms in widths.items():
        warps = 16 if 4096 < width <= 16384 else 8
        rows, fewest = PART_ROWS[0], max(PART_ROWS[1], 4 * 4096 // min(width, 4096))

        def parts(form: Canonical, rows: int) -> int:
            return form.outer * form.inner * -(-form.rows // rows)

        while rows > fewest and warps * sum(parts(form, rows) for form in forms) < WARPS:
            rows //= 2
        for form in forms:
            runs = form.outer * form.inner * form.rows
            chunks = -(-form.columns // 4096) if width > 16384 else 0
            total += 8 * parts(form, rows) * form.columns + 4 * runs * (1 + chunks)
    return total


def defaults(framework: Framework = "torch", half: bool = False) -> tuple[Optimizer, ...]:
    """The rows of the table; ``half`` says whether weights are of 16 bits."""
    ours = tuple(Adafactor(framework=framework, factoring=policy) for policy in POLICIES)
    momentum = Adafactor(framework=framework, momentum="float32")
    if framework == "keras":
        return (KerasAdamW(), KerasAdafactor(), *ours, momentum)
    if framework == "jax":
        return (OptaxAdamW(), *ours, momentum, Adafactor(framework=framework, momentum="bfloat16"))
    return (
        TorchAdamW(), AdamW8bit(), KerasAdafactor(), TorchAdafactor(), *ours, momentum,
        Adafactor(momentum="bfloat16"), Adafactor(momentum="int8"),
        *[Adafactor(compensated=True)] * half, Adafactor(release=True),
    )  # fmt: skip
