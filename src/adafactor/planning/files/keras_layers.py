"""What the configuration in a ``.keras`` file says of its layers: which of their variables are trained.

LoRA's adapters are not in the file: Keras merges them into the kernel and writes their rank, for layers that have a
configuration of their own. Quantized layers train their bias alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from adafactor.core.factoring import Shape

#: Variables of a layer, counted from the end, that are not trained whatever it says.
_STATISTICS = {"BatchNormalization": 2, "Normalization": 3}
#: Quantizations whose numbers no gradient reaches, and where they keep the bias.
_FROZEN = {"int8": 1, "int4": 1, "gptq": 0, "awq": 0}


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer.

    Attributes:
        kind: its class.
        trainable: whether any of its variables is trained.
        mode: how it is quantized, by a name in ``_FROZEN``; empty if no gradient is kept from it.
        bias: whether it has one.
        rank: of its adapters, 0 for none.
        whole: the shape of its kernel, where the file packs several numbers into one.
    """

    kind: str = ""
    trainable: bool = True
    mode: str = ""
    bias: bool = False
    rank: int = 0
    whole: Shape | None = None

    def trains(self, position: int, count: int) -> bool:
        """Whether the variable at a position of the layer's ``count`` has a gradient."""
        if self.mode:
            return self.trainable and self.bias and position == _FROZEN[self.mode]
        if self.rank and position == 0:
            return False
        return self.trainable and position < count - _STATISTICS.get(self.kind, 0)

    def adapters(self, kernel: Shape) -> list[Shape]:
        """Shapes of LoRA's two matrices beside a kernel as it is stored."""
        shape = self.whole or kernel
        return [(*shape[:-1], self.rank), (self.rank, *shape[-1:])] if self.rank and len(shape) > 1 else []


def layers(config: Any) -> dict[str, Layer]:
    """Every layer by name; where a name stands for different ones, nothing is known of them."""
    known: dict[str, Layer] = {}
    waiting = [config]
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            waiting += value
        elif isinstance(value, dict):
            waiting += value.values()
            its = value.get("config")
            if not isinstance(value.get("class_name"), str) or not isinstance(its, dict):
                continue
            name = its.get("name", value.get("name"))  # some say it beside
            if isinstance(name, str):
                said = _layer(value["class_name"], its, value.get("build_config"))
                known[name] = said if known.get(name, said) == said else Layer()
    return known


def _layer(kind: str, config: dict[str, Any], built: Any) -> Layer:
    policy, rank = config.get("dtype"), config.get("lora_rank")
    inner = policy.get("config") if isinstance(policy, dict) else None
    told = str(inner.get("mode", "")) if isinstance(inner, dict) else ""
    mode = next((mode for mode in _FROZEN if told.split("/")[0] == mode), "")
    return Layer(
        kind,
        config.get("trainable") is not False,
        mode,
        bool(config.get("use_bias") or config.get("bias_axes")),
        rank if type(rank) is int and rank > 0 else 0,
        _unpacked(config, built) if mode == "int4" else None,
    )


def _unpacked(config: dict[str, Any], built: Any) -> Shape | None:
    """The shape of a kernel of 4 bits, which lies in memory as a matrix of pairs."""
    given = built.get("input_shape") if isinstance(built, dict) else None
    inputs = given if isinstance(given, list) else []
    shape: list[Any]
    if isinstance(config.get("equation"), str):
        operands, _, output = config["equation"].replace("...", "").partition("->")
        first, _, kernel = operands.partition(",")
        made = config.get("output_shape")
        sizes = dict(zip(reversed(output), reversed(made if isinstance(made, list) else [made]), strict=False))
        sizes |= dict(zip(reversed(first), reversed(inputs), strict=False))
        shape = [sizes.get(letter) for letter in kernel]
    elif "units" in config:
        shape = [inputs[-1] if inputs else None, config["units"]]
    else:
        shape = [config.get("input_dim"), config.get("output_dim")]
    return tuple(shape) if all(type(n) is int for n in shape) else None
