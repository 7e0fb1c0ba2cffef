"""What every writer of Adafactor's state calls the same things: one row per optimizer, plain data.

Converters, the PyTorch front end and the command line read this table, so a dialect's names, axes and hyperparameters
are here and nowhere else. Statistics, all of them means:

    ours            torch.optim  transformers, timm  timm.bigvision  optax  T5X    shape, of a parameter (..., n, m)
    row             row_var      exp_avg_sq_row      exp_avg_sq_r    v_row  v_row  (..., n)
    column          col_var      exp_avg_sq_col      exp_avg_sq_c    v_col  v_col  (..., m)
    second_moment   variance     exp_avg_sq          exp_avg_sq      v      v      the parameter's
    momentum        -            exp_avg             exp_avg         ema    m      the parameter's

torch.optim and timm.bigvision keep the axes that a statistic lacks, with length 1. Keras has positions for names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from adafactor.core.errors import Refused, message
from adafactor.core.factoring import Layout, Shape

KERAS, OUR_KERAS = "keras", "adafactor.keras"
TORCH, TRANSFORMERS, OUR_TORCH = "torch.optim", "transformers", "adafactor.torch"
TIMM, BIG_VISION = "timm", "timm.bigvision"
OPTAX, OUR_OPTAX, T5X = "optax", "adafactor.optax", "t5x"

Group = Mapping[str, Any]
Note = Callable[[str], None]  # receives a sentence on what does not carry over
#: A floor below this is below every square of a float32 gradient, and so is no floor.
NO_FLOOR = 1e-19


def last_two(shape: Shape, least: int = 0) -> Layout:
    """What torch.optim, transformers and Keras factor over, empty tensors too."""
    rank = len(shape)
    return Layout(shape, (rank - 2,), (rank - 1,)) if rank >= 2 else Layout(shape, (), ())


def largest_two(shape: Shape, least: int = 0) -> Layout:
    """What optax, T5X and timm.bigvision factor over: columns are the largest axis, of equal ones the last."""
    order = sorted(range(len(shape)), key=lambda axis: shape[axis])
    if len(shape) < 2 or shape[order[-2]] < least:
        return Layout(shape, (), ())
    return Layout(shape, (order[-2],), (order[-1],))


def first_or_last_two(shape: Shape, least: int = 0) -> Layout:
    """What timm factors over: a convolution's first two axes, else the last two, if both are at least ``least``."""
    rank = len(shape)
    for rows, enough in ((0, rank > 2), (rank - 2, rank >= 2)):
        if enough and min(shape[rows : rows + 2]) >= least:
            return Layout(shape, (rows,), (rows + 1,))
    return Layout(shape, (), ())


@dataclass(frozen=True, slots=True)
class Dialect:
    """One optimizer's words.

    Attributes:
        framework: ``keras``, ``torch`` or ``jax``: whose names of parameters it uses.
        words: its names for hyperparameters, to the project's. ``eps[0]`` is the first of a pair ``eps``.
        slots: its names for statistics and momentum, to the project's.
        always: what it does without a word for it.
        momentum_of: what its momentum averages, ``"update"`` or ``"step"``; ``None`` if it has none.
        axes: what it factors over, from a shape and the least side that it factors; ``None`` where that is a setting.
        keeps_axes: whether the axes that a statistic lacks stay, with length 1.
        decay_sign: -1 where beta(t) = 1 - t**-beta_2_decay.
        held: whether its files hold hyperparameters.
        written: whether conversions write it, and do not only read it.
        marks: words of a group by which it is known where its state's keys are not its own alone, and without state.
        others: words of a group that nobody else has a use for.
        adjust: corrects the hyperparameters read by ``words`` from a group, and notes what does not carry over.
        told: the same of a group that is written, in its words.
        unclipped: its word for no clipping.
        group: its defaults, where its class cannot be asked.
        count: what its trees call the count, and in PyTorch the dtype of it (``int`` is none).
        each: under what its trees keep all slots of one parameter beside each other; without it a slot is a tree.
        beside: members of a chain's other states that belong to it, which all have a count.
    """

    framework: str
    words: Mapping[str, str]
    slots: Mapping[str, str] = field(default_factory=dict)
    always: Mapping[str, Any] = field(default_factory=dict)
    momentum_of: str | None = "update"
    axes: Callable[[Shape, int], Layout] | None = None
    keeps_axes: bool = False
    decay_sign: int = 1
    held: bool = True
    written: bool = True
    marks: frozenset[str] = frozenset()
    others: frozenset[str] = frozenset()
    adjust: Callable[[Group, dict[str, Any], Note], None] | None = None
    told: Callable[[dict[str, Any], Note], None] | None = None
    unclipped: float | None = None
    group: Mapping[str, Any] | None = None
    count: str = "count"
    each: str = ""
    beside: tuple[frozenset[str], ...] = ()


def _floor(group: Group, told: dict[str, Any], note: Note) -> None:
    if told.get("epsilon_1", 0.0) > NO_FLOOR:
        note(
            f"torch.optim.Adafactor used eps[0]={told['epsilon_1']} as a floor under the second moment; elsewhere it "
            "is added to g², which differs wherever g² is not much larger"
        )


def _is_a_floor(own: dict[str, Any], note: Note) -> None:
    first = own["eps[0]"]
    if first is not None and first > NO_FLOOR:
        note(f"torch.optim takes epsilon_1={first} for a floor under the second moment instead of adding it to g²")


def _relative(group: Group, told: dict[str, Any], note: Note) -> None:
    """fairseq and its descendants: without a learning rate it is 1e-2, or grows to that."""
    if group.get("relative_step"):
        told["learning_rate"] = 1e-2
        if group.get("warmup_init"):
            told["warmup_init"] = True
            note("warmup_init does not carry over: add the scheduler of docs/torch.md, or the learning rate is 1e-2")


def _relative_or_not(own: dict[str, Any], note: Note) -> None:
    if own.get("relative_step"):
        if own.get("lr") == 1e-2:
            own["lr"] = None
        else:
            note(f"transformers caps a learning rate of 0.01 only, not {own.get('lr')}: it is not capped")
            own["relative_step"] = False


def _timm(group: Group, told: dict[str, Any], note: Note) -> None:
    _relative(group, told, note)
    told["scale_parameter"] = bool(group["scale_parameter"] and group["relative_step"])
    told["min_dim_size_to_factor"] = group.get("min_dim_size_to_factor", 16) + 1  # it asks for more than that
    _cautious(group, told, note)


def _big_vision(group: Group, told: dict[str, Any], note: Note) -> None:
    _cautious(group, told, note)
    if group.get("corrected_weight_decay"):
        note("timm's corrected_weight_decay does not carry over: choose weight_decay anew")
    if group.get("unscaled_wd"):
        told["weight_decay_of"] = "nothing"


def _cautious(group: Group, told: dict[str, Any], note: Note) -> None:
    if group.get("caution"):
        note("timm's caution does not carry over: steps against the gradient are made here")


_PLAIN = {
    name: name
    for name in (
        *("learning_rate", "beta_2_decay", "epsilon_1", "epsilon_2", "clip_threshold", "relative_step", "beta_1"),
        *("beta_2_max", "scale_parameter", "weight_decay", "factoring", "min_dim_size_to_factor"),
    )
}
_PAIR = {"eps[0]": "epsilon_1", "eps[1]": "epsilon_2"}
_TORCH = {
    **{"lr": "learning_rate", "beta2_decay": "beta_2_decay", "d": "clip_threshold"},
    **{"weight_decay": "weight_decay", "maximize": "maximize", **_PAIR},
}
_OUR_TORCH = {
    **_TORCH,
    **{"relative_step": "relative_step", "scale_parameter": "scale_parameter", "beta1": "beta_1"},
    **{"beta2_max": "beta_2_max", "momentum_dtype": "momentum_dtype", "factoring": "factoring"},
    **{"min_dim_size_to_factor": "min_dim_size_to_factor", "stochastic_rounding": "stochastic_rounding"},
    **{"compensated": "compensated", "skip_nonfinite": "skip_nonfinite", "seed": "seed"},
}
_FAIRSEQ = {
    **{"lr": "learning_rate", "decay_rate": "beta_2_decay", "clip_threshold": "clip_threshold", "beta1": "beta_1"},
    **{name: name for name in ("weight_decay", "relative_step", "scale_parameter")},
}
_FAIRSEQ_SLOTS = {
    **{"exp_avg_sq_row": "row", "exp_avg_sq_col": "column"},
    **{"exp_avg_sq": "second_moment", "exp_avg": "momentum"},
}
_OPTAX = {
    **{"learning_rate": "learning_rate", "min_dim_size_to_factor": "min_dim_size_to_factor"},
    **{"decay_rate": "beta_2_decay", "decay_offset": "decay_offset", "eps": "epsilon_1"},
    **{"multiply_by_parameter_scale": "scale_parameter", "clipping_threshold": "clip_threshold"},
    **{"momentum": "beta_1", "weight_decay_rate": "weight_decay"},
}
_OURS = {name: name for name in ("row", "column", "second_moment", "momentum")}
_NO_MORE = {"beta_2_max": None, "decay_offset": 0, "maximize": False}
_NO_WORD = {"relative_step": "always", "scale_parameter": True, "beta_1": None, "weight_decay_of": "rate"}

FORMATS: dict[str, Dialect] = {
    KERAS: Dialect(
        "keras",
        {k: v for k, v in _PLAIN.items() if k not in ("beta_1", "beta_2_max", "scale_parameter", "relative_step")},
        always={**_NO_MORE, **_NO_WORD},
        momentum_of=None,
        axes=last_two,
    ),
    OUR_KERAS: Dialect(
        "keras", _PLAIN, _OURS, always={"decay_offset": 0, "maximize": False, "weight_decay_of": "rate"}
    ),
    TORCH: Dialect(
        "torch",
        _TORCH,
        {"row_var": "row", "col_var": "column", "variance": "second_moment"},
        always={"beta_2_max": None, "decay_offset": 0, **_NO_WORD},
        momentum_of=None,
        axes=last_two,
        keeps_axes=True,
        marks=frozenset({"lr", "beta2_decay", "eps", "d"}),
        adjust=_floor,
        told=_is_a_floor,
        unclipped=math.inf,
        count="float32",
    ),
    TIMM: Dialect(
        "torch",
        {**_FAIRSEQ, "eps": "epsilon_1", "eps_scale": "epsilon_2"},
        _FAIRSEQ_SLOTS,
        always={**_NO_MORE, "weight_decay_of": "step"},
        momentum_of="step",
        axes=first_or_last_two,
        written=False,
        marks=frozenset({"lr", "eps", "eps_scale", "clip_threshold", "decay_rate", "relative_step", "scale_parameter"}),
        others=frozenset({"warmup_init", "caution"}),
        adjust=_timm,
    ),
    TRANSFORMERS: Dialect(
        "torch",
        {**_FAIRSEQ, **_PAIR},
        _FAIRSEQ_SLOTS,
        always={**_NO_MORE, "weight_decay_of": "step"},
        momentum_of="step",
        axes=last_two,
        marks=frozenset({"lr", "eps", "clip_threshold", "decay_rate", "relative_step", "scale_parameter"}),
        others=frozenset({"warmup_init"}),
        adjust=_relative,
        told=_relative_or_not,
        unclipped=math.inf,
        group={
            **{"lr": None, "eps": (1e-30, 1e-3), "clip_threshold": 1.0, "decay_rate": -0.8, "beta1": None},
            **{"weight_decay": 0.0, "scale_parameter": True, "relative_step": True, "warmup_init": False},
        },
        count="int",
    ),
    BIG_VISION: Dialect(
        "torch",
        {
            **{"lr": "learning_rate", "eps": "epsilon_1", "decay_rate": "beta_2_decay", "decay_offset": "decay_offset"},
            **{"clipping_threshold": "clip_threshold", "beta2_cap": "beta_2_max", "momentum": "beta_1"},
            **{name: name for name in ("weight_decay", "momentum_dtype", "min_dim_size_to_factor")},
        },
        {"exp_avg_sq_r": "row", "exp_avg_sq_c": "column", "exp_avg_sq": "second_moment", "exp_avg": "momentum"},
        always={"maximize": False, "relative_step": False, "scale_parameter": False, "weight_decay_of": "rate"},
        axes=largest_two,
        keeps_axes=True,
        decay_sign=-1,
        written=False,
        marks=frozenset({"lr", "eps", "decay_rate", "beta2_cap", "clipping_threshold", "momentum"}),
        others=frozenset({"unscaled_wd", "caution", "corrected_weight_decay", "max_lr_snapshot"}),
        adjust=_big_vision,
    ),
    OUR_TORCH: Dialect(
        "torch",
        _OUR_TORCH,
        _OURS,
        always={"decay_offset": 0, "weight_decay_of": "rate"},
        marks=frozenset({"beta2_decay", "relative_step", "min_dim_size_to_factor"}),
        count="int64",
    ),
    OPTAX: Dialect(
        "jax",
        _OPTAX,
        {"v_row": "row", "v_col": "column", "v": "second_moment", "ema": "momentum"},
        always={
            **{"beta_2_max": None, "epsilon_2": 1e-3, "relative_step": False, "maximize": False},
            **{"weight_decay_of": "nothing"},
        },
        momentum_of="step",
        axes=largest_two,
        decay_sign=-1,
        held=False,
        beside=(frozenset({"count"}), frozenset({"count", "ema"})),
    ),
    OUR_OPTAX: Dialect(
        "jax",
        {**_OPTAX, "decay_rate_max": "beta_2_max", "min_parameter_scale": "epsilon_2"}
        | {"relative_step": "relative_step", "factoring": "factoring"},
        _OURS,
        always={"maximize": False, "weight_decay_of": "nothing"},
        momentum_of="step",
        decay_sign=-1,
        held=False,
    ),
    T5X: Dialect(
        "jax",
        {"learning_rate": "learning_rate", "multiply_by_parameter_scale": "scale_parameter", "beta1": "beta_1"}
        | {"decay_rate": "beta_2_decay", "step_offset": "decay_offset", "clipping_threshold": "clip_threshold"}
        | {"weight_decay_rate": "weight_decay", "min_dim_size_to_factor": "min_dim_size_to_factor"}
        | {"epsilon1": "epsilon_1", "epsilon2": "epsilon_2"},
        {"v_row": "row", "v_col": "column", "v": "second_moment", "m": "momentum"},
        always={"beta_2_max": None, "relative_step": False, "maximize": False, "weight_decay_of": "nothing"},
        momentum_of="step",
        axes=largest_two,
        decay_sign=-1,
        held=False,
        count="step",
        each="param_states",
    ),
}


def keras_order(name: str, layout: Layout, momentum: bool = False) -> list[str]:
    """What Keras's files hold of one variable, in order: slots, and what is none.

    ``keras`` keeps a velocity of every matrix (the product of row and column, which nobody reads), and two placeholders
    before the second moment of every vector.
    """
    if name == OUR_KERAS:
        return [*layout.slots, *(["momentum"] if momentum else [])]
    return ["row", "column", "velocity"] if len(layout.shape) >= 2 else ["", "", "second_moment"]


def in_our_words(name: str, group: Group, note: Note = lambda sentence: None) -> dict[str, Any]:
    """A group of a dialect in the project's names; words of its own that are not Adafactor's are left out.

    Raises:
        KeyError, TypeError, Refused: a word is missing, or its value is of another kind.
    """
    dialect = FORMATS[name]
    told = dict(group)
    if "eps[0]" in dialect.words and "eps" in group:
        if not (isinstance(group["eps"], tuple | list) and len(group["eps"]) == 2):
            remedy = "(1e-30, 1e-3) is usual."
            raise Refused(message("eps", "a pair (added to g², least parameter scale)", group["eps"], remedy))
        told["eps[0]"], told["eps[1]"] = group["eps"]
    own = {ours: told[word] for word, ours in dialect.words.items() if word in told}
    if "beta_2_decay" in own:
        own["beta_2_decay"] = dialect.decay_sign * own["beta_2_decay"]
    if own.get("epsilon_1", 0.0) is None:
        own["epsilon_1"] = 1e-30
    clip = own.get("clip_threshold")
    if isinstance(clip, float) and math.isinf(clip):
        own["clip_threshold"] = None
    if dialect.framework == "torch" and own.get("relative_step") is True:
        own["relative_step"] = "always"  # a scheduler writes where the user does, so PyTorch's cap is on everything
    own |= dialect.always
    if dialect.momentum_of:
        own["momentum_of"] = dialect.momentum_of
    if dialect.adjust is not None:
        dialect.adjust(group, own, note)
    return own


def step_size(group: Group, count: int, rms: float | None) -> tuple[float | None, bool]:
    """alpha of update ``count`` (eqs. 8 and 9), ``None`` if unknown, and whether it was the same at all updates.

    Args:
        group: hyperparameters in the project's names.
        rms: root mean square of the parameter at that update.
    """
    rate, scaled = group.get("learning_rate"), group.get("scale_parameter")
    if not isinstance(rate, int | float) or scaled is None:
        return None, False
    t = max(count, 1)
    capped, rho = bool(group.get("relative_step", False)), float(rate)
    if capped:
        rho = min(1e-6 * t if group.get("warmup_init") else rho, 1 / math.sqrt(t))
    if not scaled:
        return rho, not capped or rho == rate
    if rms is None or "epsilon_2" not in group:
        return None, False
    return rho * max(group["epsilon_2"], rms), False
