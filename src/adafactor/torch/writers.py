"""Whose optimizer wrote a PyTorch checkpoint: told by the keys of its state first, and by its groups second."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

from adafactor.core.dialects import FORMATS, OUR_TORCH
from adafactor.core.errors import Refused, message

READ = {name: dialect for name, dialect in FORMATS.items() if dialect.framework == "torch"}
_STATISTICS = {
    name: {key for key, slot in dialect.slots.items() if slot != "momentum"} for name, dialect in READ.items()
}

# Other people's optimizers: keys of a parameter's state and words of a group, all of which it has.
# Told by their groups, whatever their state is called:
_BY_GROUP: tuple[tuple[str, set[str], set[str]], ...] = (
    ("adafactor8bit", set(), {"m_block_size", "beta2_decay"}),
    ("pytorch_optimizer's AdaFactor", set(), {"eps1", "eps2", "scale_parameter"}),
    ("CAME", set(), {"betas", "clip_threshold", "eps"}),
    ("bitsandbytes", {"state1"}, {"betas"}),
    ("Muon", set(), {"ns_steps"}),
    ("LBFGS", set(), {"history_size"}),
)
# Told by their state:
_BY_STATE = (
    *(("bitsandbytes", {"state1"}), ("CAME", {"exp_avg_res_row"}), ("NAdam", {"mu_product"}), ("Prodigy", {"p0"})),
    *(("Adadelta", {"acc_delta"}), ("RMSprop", {"square_avg"}), ("Adagrad", {"sum"}), ("Adamax", {"exp_inf"})),
    *(("ASGD", {"ax"}), ("Rprop", {"prev"}), ("LBFGS", {"old_dirs"}), ("Adan", {"exp_avg_diff"})),
    *(("Sophia", {"hessian"}), ("a schedule-free optimizer", {"z"}), ("Adam-mini", {"vmean"})),
    *(("SGD with momentum", {"momentum_buffer"}), ("AdamW or Adam", {"exp_avg", "exp_avg_sq"}), ("Lion", {"exp_avg"})),
)
# Told by their groups where no parameter has any state:
_BY_GROUP_ALONE = (
    *(("AdamW, Adam or another with betas", {"betas"}), ("SGD", {"momentum", "nesterov"}), ("RMSprop", {"alpha"})),
    *(("Adagrad", {"lr_decay"}), ("Adadelta", {"rho"}), ("Rprop", {"etas"}), ("ASGD", {"lambd"})),
)


def recognise(state: Sequence[Mapping[str, Any]], group: Mapping[str, Any]) -> str:
    """The dialect of one group of a checkpoint, a name in ``FORMATS``.

    Args:
        state: what was kept for the group's parameters; nothing for some, or all.

    Raises:
        Refused: another optimizer wrote it, or several did; the text names them.
    """
    writers = dict.fromkeys(_one(set(values), set(group)) for values in state if values)
    if len(writers) > 1:
        raise _refused(" and ".join(writers))
    name = next(iter(writers)) if writers else _one(set(), set(group))
    lacks = sorted(READ[name].marks - set(group))
    if lacks and name != OUR_TORCH:  # in a group of ours they are what the optimizer was made with
        remedy = "Save the optimizer's state_dict() as it is."
        raise Refused(message(f"a group of a checkpoint of {name}", f"with {', '.join(lacks)}", "none", remedy))
    return name


def _one(keys: AbstractSet[str], words: AbstractSet[str]) -> str:
    if keys & {*_STATISTICS[OUR_TORCH], "statistics"} or ("step" not in keys and READ[OUR_TORCH].marks <= words):
        return OUR_TORCH  # whatever else a wrapper keeps beside it
    for writer, needs, told in _BY_GROUP:
        if needs <= keys and told <= words:
            raise _refused(writer)
    for name, dialect in READ.items():
        own = _STATISTICS[name].difference(*(each for other, each in _STATISTICS.items() if other != name))
        if keys & own or ((keys & _STATISTICS[name] or not keys) and dialect.marks <= words):
            return name
    for writer, needs in _BY_STATE:
        if needs <= keys:
            raise _refused(writer)
    if keys:
        raise _refused(f"an unknown optimizer with {', '.join(sorted(map(str, keys))[:5])}")
    for writer, told in _BY_GROUP_ALONE:
        if told <= words:
            raise _refused(writer)
    return OUR_TORCH


def _refused(writer: str) -> Refused:
    remedy = "Other optimizers keep other averages: load the model's weights, and start this one afresh."
    return Refused(message("the optimizer's checkpoint", f"of {', '.join(READ)}", f"one of {writer}", remedy))
