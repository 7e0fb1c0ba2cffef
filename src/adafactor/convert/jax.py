"""State trees of the JAX world: ``optax.adafactor``, ``adafactor.optax`` and T5X.

A tree is a live pytree, or nested dictionaries as ``flax.serialization`` and Orbax give them. Either may hold more than
the optimizer's state; with parameters beside it (``params``, or ``target`` in T5X) their shapes are known.

Their words are in ``core/dialects.py``. optax and T5X name a statistic for the axes it keeps: ``v_row`` lacks the
largest axis (T5X: the axes with the role COLUMN) and ``v_col`` the second largest (ROW); of two equal ones the later
counts as larger. What does not exist is an array of shape (1,) there, and ``None`` here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from adafactor.convert import adapt, msgpack
from adafactor.convert.axes import Axes, Reader, Shapes, fitted, rms_of, roles
from adafactor.convert.names import Names, rename
from adafactor.convert.report import Report, some
from adafactor.convert.state import STATISTICS, Array, Parameter, State
from adafactor.convert.trees import Flat, Tree, array, flat, grafted, joined, plain, put
from adafactor.core.dialects import FORMATS, OPTAX, OUR_OPTAX, in_our_words, largest_two
from adafactor.core.errors import Refused, message
from adafactor.core.factoring import Factored, Layout, Shape
from adafactor.core.files import PathLike, replacing
from adafactor.core.untrusted import reading

_READ = {name: dialect for name, dialect in FORMATS.items() if dialect.framework == "jax"}


@dataclass
class _Index:
    """Where a tree keeps what.

    Attributes:
        format: whose tree it is.
        slots: leaves by our name of the slot and the parameter's path.
        paths: where in the whole tree each of them is.
        counts: where the counts are, which are all the same; the first is the state's own.
        params: parameters by path, where the tree has them.
        rates: hyperparameters that are in the tree, with where they are.
    """

    format: str
    slots: dict[str, Flat] = field(default_factory=dict)
    paths: dict[str, dict[str, str]] = field(default_factory=dict)
    counts: list[str] = field(default_factory=list)
    count: Any = None
    params: Flat = field(default_factory=dict)
    rates: dict[str, tuple[str, Any]] = field(default_factory=dict)

    @property
    def has_placeholders(self) -> bool:
        """Whether what does not exist is an array of shape (1,), and not ``None``."""
        return FORMATS[self.format].axes is not None


# -- finding -----------------------------------------------------------------------------------------------------------


def _states(tree: Any, path: str, around: _Index) -> Iterator[_Index]:
    """Every Adafactor state in a plain tree. ``around`` holds the parameters, counts and rates found on the way."""
    if not isinstance(tree, Mapping):
        return
    for word in ("params", "target"):
        if isinstance(tree.get(word), Mapping):
            around = replace(around, params=flat(tree[word]))
    if isinstance(tree.get("hyperparams"), Mapping):
        at = joined(path, "hyperparams")
        rates = {name: (joined(at, name), value) for name, value in tree["hyperparams"].items() if np.ndim(value) == 0}
        counts = [*around.counts, *([joined(path, "count")] if {"count", "inner_state"} <= set(tree) else [])]
        around = replace(around, rates=rates, counts=counts)
    members = {name: value for name, value in tree.items() if isinstance(value, Mapping)}
    for name, value in members.items():
        at = joined(path, name)
        format = next((format for format in _READ if _members(format) <= set(value)), None)
        if format is None:
            yield from _states(value, at, around)
        elif FORMATS[format].each:
            yield _of_parameters(format, value, at, around)
        else:
            yield _of_trees(format, name, members, path, around)


def _members(format: str) -> set[str]:
    """What a state has: its count, and its parameters or a tree for each statistic."""
    dialect = _READ[format]
    return {dialect.count, *([dialect.each] if dialect.each else map(_words(format).__getitem__, STATISTICS))}


def _words(format: str) -> dict[str, str]:
    return {slot: word for word, slot in FORMATS[format].slots.items()}


def _of_trees(format: str, name: str, members: Mapping[str, Any], path: str, around: _Index) -> _Index:
    """The state ``name`` of a chain, each of whose slots is a tree like the parameters'."""
    dialect, value = FORMATS[format], members[name]
    index = replace(around, format=format, slots={}, paths={}, count=value[dialect.count])
    own = [joined(path, name, dialect.count)]
    for other, each in members.items():
        beside = set(each) in dialect.beside
        own += [joined(path, other, "count")] * beside
        for word, slot in dialect.slots.items() if beside or each is value else ():
            if word in each and (slot != "momentum" or each[word] is not None):
                index.slots[slot] = flat(each[word])
                index.paths[slot] = {leaf: joined(path, other, word, leaf) for leaf in index.slots[slot]}
    return replace(index, counts=[own[0], *around.counts, *own[1:]])


def _of_parameters(format: str, value: Mapping[str, Any], path: str, around: _Index) -> _Index:
    """A state that keeps all slots of a parameter beside each other, as T5X does."""
    dialect, words = FORMATS[format], _words(format)
    factored = {words["row"], words["column"]}
    leaves = flat(value[dialect.each], stop=lambda each: factored <= set(each))
    for name, each in leaves.items():
        if not isinstance(each, Mapping) or not set(words.values()) <= set(each):
            rule = f"with {', '.join(words.values())}"
            raise Refused(message(f"the state of {name}", rule, each, "It is not Adafactor's."))
        for word in words.values():
            if not hasattr(each[word], "shape"):
                remedy = "T5X keeps large arrays in files beside; restore the checkpoint with T5X and pass its tree."
                raise Refused(message(f"{word} of {name}", "an array", type(each[word]).__name__, remedy))
    return replace(
        around,
        format=format,
        slots={slot: {name: each[word] for name, each in leaves.items()} for slot, word in words.items()},
        paths={slot: {name: joined(path, dialect.each, name, word) for name in leaves} for slot, word in words.items()},
        counts=[joined(path, dialect.count), *around.counts],
        count=value[dialect.count],
    )


def _find(tree: Any) -> _Index:
    states = list(_states({"": tree}, "", _Index("")))
    if len(states) != 1:
        remedy = "Pass the one optimizer state; parts behind optax.partition one by one."
        raise Refused(message("the tree", "with the state of one Adafactor", f"{len(states)} of them", remedy))
    return states[0]


# -- reading -----------------------------------------------------------------------------------------------------------


def load(path: PathLike) -> Any:
    """The tree in a msgpack file or an Orbax folder.

    Raises:
        Refused: it is damaged, or something else.
    """
    if not Path(path).is_dir():
        return msgpack.read(path)
    with reading(path, "an Orbax checkpoint"):
        import jax
        import orbax.checkpoint

        folder = _pytree(Path(path).absolute())
        with orbax.checkpoint.PyTreeCheckpointer() as reader:
            metadata = reader.metadata(folder)
            told = getattr(getattr(metadata, "item_metadata", metadata), "tree", None)
            claimed = sum(
                int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize
                for leaf in jax.tree.leaves(told)
                if getattr(leaf, "shape", None) is not None and leaf.dtype is not None
            )
            stored = sum(os.path.getsize(Path(base) / name) for base, _, names in os.walk(folder) for name in names)
            if claimed > max(1 << 30, stored << 10):
                raise ValueError(f"its {stored} bytes claim to be {claimed}")
            return reader.restore(folder, args=orbax.checkpoint.args.PyTreeRestore(restore_args=_as_numpy(told)))


def _pytree(folder: Path) -> Path:
    """The one pytree in a folder, which may be a step, or all steps, of ``CheckpointManager``."""
    if (folder / "_METADATA").exists():
        return folder
    there = sorted(path.parent for depth in ("*", "*/*") for path in folder.glob(f"{depth}/_METADATA"))
    if len(there) > 1:
        names = some([str(each.relative_to(folder)) for each in there])
        raise Refused(
            message("the folder", "of one checkpoint", f"{len(there)} of them ({names})", "Pass one of them.")
        )
    return there[0] if there else folder


def _as_numpy(told: Any) -> Any:
    import jax
    import orbax.checkpoint

    return jax.tree.map(lambda _: orbax.checkpoint.RestoreArgs(restore_type=np.ndarray), told)


def read(source: Any, *, report: Report | None = None, shapes: Shapes | None = None, axes: Axes | None = None) -> State:
    """The state in a tree of optax, ours or T5X.

    Args:
        source: a pytree that holds the optimizer's state (and the parameters, as a ``TrainState`` does), or a path of a
            msgpack file or an Orbax folder.
        shapes: shapes by name where the tree has no parameters; parameters themselves will do.
        axes: ``Factored`` by name, where the statistics leave them open.

    Raises:
        Refused: it is none of them, or leaves shapes and axes open.
    """
    report = Report() if report is None else report
    if isinstance(source, str | os.PathLike):
        source = load(source)
    with reading("the tree", "a state of Adafactor"):
        index = _find(plain(source))
        count = int(array(index.count))
        own = {name: np.asarray(value).item() for name, (_, value) in index.rates.items()}
        reader, group = Reader(index.format, shapes, axes), in_our_words(index.format, own)
        parameters = []
        for name in index.slots["second_moment"]:
            slots = {slot: array(leaves[name]) for slot, leaves in index.slots.items() if leaves.get(name) is not None}
            if slots:
                parameters.append(replace(_read_one(index, reader, name, slots, group), count=count))
    return State(tuple(parameters), (group,), "jax", index.format)


def _read_one(index: _Index, reader: Reader, name: str, slots: dict[str, Array], group: Mapping[str, Any]) -> Parameter:
    param: Any = index.params.get(name)
    values = array(param) if hasattr(param, "shape") else None
    known = None if values is None else values.shape
    momentum = slots.get("momentum")
    if FORMATS[index.format].each and momentum is not None and _placeholder(momentum):
        told = reader.shape(name, {}, known)
        single = told == (1,) or (told is None and all(map(_placeholder, slots.values())))
        if not (single and any(leaf.shape != (1,) for leaf in index.slots["momentum"].values())):
            del slots["momentum"]
    shape = reader.shape(name, slots, known)
    if index.has_placeholders:
        whole = _placeholder(slots["row"]) and _placeholder(slots["column"])
        whole = whole and (shape is None or slots["second_moment"].shape == shape)
        for slot in ("row", "column") if whole else ("second_moment",):
            del slots[slot]
    parameter = reader.read(name, slots, group, shape)
    return parameter if values is None else replace(parameter, dtype=str(values.dtype), rms=rms_of(values))


def _placeholder(value: Array) -> bool:
    return value.shape == (1,)


# -- writing -----------------------------------------------------------------------------------------------------------


def write(
    state: State,
    format: str = OUR_OPTAX,
    *,
    template: Any = None,
    names: Names | None = None,
    report: Report | None = None,
) -> Any:
    """A tree that the optimizer's ``update`` takes, or T5X restores.

    Args:
        format: ``"adafactor.optax"``, ``"optax"`` or ``"t5x"``.
        template: what ``optimizer.init(params)`` gives, a tree that holds it, or a path: the result has its
            structure, and nothing else of it changes. Without one the parameters are nested dictionaries by the ``/``
            in their names, and the optimizer is the one that the hyperparameters describe.

    Raises:
        Refused: the template does not fit, or there is none and the hyperparameters do not say enough.
    """
    report = Report() if report is None else report
    if isinstance(template, str | os.PathLike):
        template = load(template)
    target = None
    if template is not None:
        index = _find(plain(template))
        if index.format != format:
            raise Refused(message("the template", f"of {format}", index.format, "Make it with that optimizer."))
        target = {name: _target_shape(index, name) for name in index.slots["second_moment"] if _exists(index, name)}
    state = adapt.momentum_as(rename(state, names, target, "jax", report), format, report)
    group = adapt.one_group(state, format, report)
    count = adapt.one_count(state, format, report)
    own = adapt.told(format, group, report)
    if count >= 1 << 31:
        raise Refused(message("the count", "below 2**31 in JAX", count, "Start the state afresh."))
    if template is None:
        template = _make(state, format, own)
        index = _find(plain(template))
    known = state.named()
    filled: Flat = dict.fromkeys(index.counts, count)
    filled |= {at: own[name] for name, (at, _) in index.rates.items() if isinstance(own.get(name), int | float)}
    for name in known:
        new = _write_one(known[name], index, group, report)
        for slot, leaves in index.slots.items():
            if leaves.get(name) is None:
                continue
            old = np.asarray(leaves[name])
            value = np.zeros(old.shape, old.dtype) if new.get(slot) is None else np.asarray(new[slot])
            if value.shape != old.shape:
                rule = f"of shape {old.shape} as in the template"
                raise Refused(
                    message(f"{slot} of {name}", rule, value.shape, "Make the template for these parameters.")
                )
            if value.dtype.itemsize > old.dtype.itemsize:
                report.note(f"{format} keeps statistics or momentum in {old.dtype.name}: they are rounded", lossy=True)
            filled[index.paths[slot][name]] = value.astype(old.dtype)
        if "momentum" in new and "momentum" not in index.slots:
            report.dropped("Momentum", [name], "the template has none")
        kept = index.slots.get("momentum", {}).get(name)
        absent = kept is None or (FORMATS[format].each and _placeholder(np.asarray(kept)))
        if "momentum" not in new and not absent:
            report.dropped("Momentum", [name], adapt.STARTS)
    new = grafted(template, filled)
    if int(array(_find(plain(new)).count)) != count:
        raise Refused(
            message(
                "the template", "of tuples and dictionaries", type(template).__name__, "Pass the optimizer's state."
            )
        )
    return new


def _exists(index: _Index, name: str) -> bool:
    return any(leaves.get(name) is not None for leaves in index.slots.values())


def _target_shape(index: _Index, name: str) -> Shape | None:
    param: Any = index.params.get(name)
    return tuple(param.shape) if hasattr(param, "shape") else None


def _write_one(parameter: Parameter, index: _Index, group: Mapping[str, Any], report: Report) -> dict[str, Array]:
    """The slots of one parameter as the template's shapes ask for them."""
    shape, name, own = parameter.shape, parameter.name, parameter.layout
    leaves = {slot: np.shape(index.slots[slot][name]) for slot in STATISTICS if index.slots[slot].get(name) is not None}
    if index.has_placeholders:
        whole = leaves["second_moment"] == shape and (len(shape) < 2 or leaves["row"] == leaves["column"] == (1,))
        leaves = {slot: size for slot, size in leaves.items() if (slot == "second_moment") == whole}
    if "second_moment" in leaves:
        return dict(fitted(parameter, Layout(shape, (), (), own.batch), report).slots)
    liked: list[Layout] = [own, replace(own, rows=own.columns, columns=own.rows)]
    reader = Reader(index.format)
    if index.has_placeholders or group.get("factoring"):
        liked[:0] = [chooser(shape) for chooser in reader.choosers(name, group)]
    told = (each for each in liked if each.factored)
    at_once = next((each for each in told if each.slots == leaves), None)
    wanted = roles(name, leaves, reader.choosers(name, {}), shape=shape) if at_once is None else at_once
    return dict(fitted(parameter, wanted, report).slots)


def _make(state: State, format: str, own: Mapping[str, Any]) -> Any:
    """The state of a fresh optimizer for the state's parameters."""
    momentum = any("momentum" in parameter.slots for parameter in state.parameters)
    dialect = FORMATS[format]
    if dialect.each:
        states: dict[str, Any] = {}
        for parameter in state.parameters:
            put(states, parameter.name, _zeros(parameter, format, int(own.get("min_dim_size_to_factor", 128))))
        return {"state": {dialect.count: np.zeros((), np.int32), dialect.each: states}}
    import jax
    import optax

    from adafactor.engine.xla.primitives import enable_x64
    from adafactor.optax import adafactor

    params: dict[str, Any] = {}
    for parameter in state.parameters:
        wide = any(value.dtype == np.float64 for value in parameter.statistics.values())
        dtype = np.float64 if wide else np.float32
        put(params, parameter.name, jax.ShapeDtypeStruct(parameter.shape, dtype))
    arguments = {name: value for name, value in own.items() if name != "factoring" and value is not None}
    for word in ("clipping_threshold", "learning_rate"):  # whose None means something
        if word in own:
            arguments[word] = own[word]
    if format == OPTAX:
        tx: Any = optax.adafactor(**arguments)
        if momentum and "momentum" not in arguments:
            remedy = "Tell it with --set beta_1=0.9, or pass a template."
            raise Refused(message("beta_1", "known where there is momentum", None, remedy))
    else:
        by_name = {parameter.name: parameter.layout for parameter in state.parameters}

        def as_they_are(path: str, shape: Shape) -> Factored:
            return Factored(by_name[path].rows, by_name[path].columns, by_name[path].batch)

        arguments.setdefault("momentum", 0.9 if momentum else None)
        tx = adafactor(**{**arguments, "factoring": as_they_are})
    with enable_x64():  # or float64 statistics would be made float32
        shapes = jax.eval_shape(tx.init, params)
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, _narrow(leaf.dtype)), shapes)


def _narrow(dtype: Any) -> Any:
    return np.dtype(np.int32) if dtype == np.int64 else dtype


def _zeros(parameter: Parameter, format: str, least: int) -> dict[str, Array]:
    """T5X's own shapes: the largest two axes of a matrix that is large enough; of more axes what the state has."""
    own, shape, momentum = parameter.layout, parameter.shape, parameter.momentum
    if len(shape) == 2:
        own = largest_two(shape) if min(shape) >= least else Layout(shape, (), ())
    there = {slot: np.zeros(size, np.float32) for slot, size in own.slots.items()}
    if momentum is not None:
        there["momentum"] = np.zeros(shape, momentum.dtype)
    return {word: there.get(slot, np.zeros((1,), np.float32)) for slot, word in _words(format).items()}


def save(tree: Tree, path: PathLike) -> None:
    """A msgpack file (``*.msgpack``), or else an Orbax folder; there whole or not at all."""
    if Path(path).suffix == ".msgpack":
        msgpack.write(plain(tree), path)
        return
    import orbax.checkpoint

    with replacing(path) as new, orbax.checkpoint.PyTreeCheckpointer() as writer:
        writer.save(new.absolute(), tree)


__all__ = ["FORMATS", "load", "plain", "read", "save", "write"]
