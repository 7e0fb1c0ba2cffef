"""The step on the host: master weights and statistics in host memory, gradients down the bus, weights up again.

One thread takes the gradients in the order in which they come: copies one, steps it with the native kernels, and copies
the weights back, while the backward pass makes the next ones (`step_in_backward`). The optimizer stays what it is to
its user: groups, schedulers, ``state_dict``.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from queue import Queue
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from adafactor.core.errors import message
from adafactor.engine.torch.sharded import spans_of
from adafactor.engine.torch.work import DTYPES, is_sharded
from adafactor.torch.members import Place, Positions
from adafactor.torch.optimizer import Adafactor

Words = dict[str, Any]  # a group, without its parameters
Job = Callable[[], None]


class HostStep:
    """Steps the parameters of a model on the host, until it is removed.

    ``optimizer.step()`` returns when the weights are back. With ``step_in_backward(model, optimizer)`` each parameter
    is stepped while the backward pass goes on, and the next forward pass of ``model`` waits for the rest, as do
    ``state_dict()`` of both and :meth:`wait`. Accumulation and clipping are those of ``step_in_backward``.

    Attributes:
        moved: bytes of gradients copied to the host so far, and of weights copied back.

    Args:
        model: whose forward pass must find the new weights.
        optimizer: its optimizer; what it has of state moves to the host, where it stays on any device.
        master: the dtype of the weights that are stepped; ``None`` for the parameters' own. Where it is another, the
            state of a parameter has them as ``master``.
        threads: of the native kernels; ``None`` for as many as torch uses.
        waiting: how many gradients may wait on the device; the backward pass waits where there would be more.

    Raises:
        TypeError, ValueError, RuntimeError: an argument does not fit, or a parameter is sharded.
    """

    def __init__(
        self,
        model: Module,
        optimizer: Adafactor,
        *,
        master: torch.dtype | None = torch.float32,
        threads: int | None = None,
        waiting: int = 8,
    ) -> None:
        if not isinstance(optimizer, Adafactor):
            got, remedy = type(optimizer).__name__, "Other optimizers keep more than the host has room for."
            raise TypeError(message("optimizer", "an adafactor.torch.Adafactor", got, remedy))
        if optimizer._host is not None:
            raise RuntimeError(message("optimizer", "stepped in one place", "a second HostStep", "Call its remove()."))
        if master is not None and master not in DTYPES:
            raise ValueError(message("master", "a float dtype or None", master, "torch.float32 is exact."))
        if isinstance(waiting, bool) or not isinstance(waiting, int) or waiting < 1:
            raise ValueError(message("waiting", "an integer >= 1", waiting, "Leave it out for the default."))
        for number, group in enumerate(optimizer.param_groups):
            for k, param in enumerate(group["params"]):
                if is_sharded(param) or spans_of(param) is not None:
                    name, remedy = optimizer._name(number, k), "CPUOffloadPolicy of fully_shard steps shards there."
                    raise RuntimeError(message(name, "a whole tensor for HostStep", "a shard", remedy))
        self.moved = [0, 0]
        self._device_optimizer, self._threads = optimizer, threads
        self._twins = [[_twin(param, master) for param in group["params"]] for group in optimizer.param_groups]
        self._host = Adafactor(
            [{"params": twins} for twins in self._twins], diagnostics=optimizer._diagnostics is not None
        )
        self._host._skipped, self._host._lrs = optimizer._skipped, optimizer._lrs
        self._versions = {param: param._version for group in optimizer.param_groups for param in group["params"]}
        self._room = torch.empty(0, dtype=torch.uint8)
        self._streams: dict[torch.device, Any] = {}
        self._error: BaseException | None = None
        self._queue: Queue[Job | None] = Queue(waiting)
        self._end = weakref.finalize(self, self._queue.put, None)
        threading.Thread(target=_serve, args=(self._queue,), daemon=True, name="adafactor-host").start()
        self._hooks = [
            model.register_forward_pre_hook(lambda *_: self.wait()),
            model.register_state_dict_pre_hook(lambda *_: self.wait()),  # type: ignore[no-untyped-call]
        ]
        optimizer._host = self

    @property
    def host_bytes(self) -> dict[str, int]:
        """Bytes of host memory: of weights, of the optimizer's state, and of the room through which gradients pass."""
        self.wait()
        weights = sum(twin.nbytes for twins in self._twins for twin in twins)
        held = [t for its in self._host.state.values() for slot, t in its.items() if slot != "master"]
        return {"weights": weights, "state": sum(t.nbytes for t in held), "room": self._room.nbytes}

    def wait(self) -> None:
        """Return when every gradient that was handed over has been stepped and its weights are on their way back.

        Raises:
            RuntimeError, TypeError, ValueError: what a step raised.
        """
        self._queue.join()
        for device, stream in self._streams.items():
            _streams_of(device).current_stream(device).wait_stream(stream)
        error, self._error = self._error, None
        if error is not None:
            raise error

    def remove(self) -> None:
        """Let the optimizer step on the device again, with the state that the host has; the weights are there."""
        self.wait()
        optimizer = self._device_optimizer
        for twins, group in zip(self._twins, optimizer.param_groups, strict=True):
            for twin, param in zip(twins, group["params"], strict=True):
                if twin in self._host.state:
                    state = {slot: t.to(param.device) for slot, t in self._host.state[twin].items() if slot != "master"}
                    optimizer.state[param] = state
        for hook in self._hooks:
            hook.remove()
        self._end()
        optimizer._host = None
        optimizer._invalidate()

    def take(self, positions: Positions) -> None:
        """Hand over the gradients at these positions of groups, for the update that the groups say now."""
        words = [_words(group) for group in self._device_optimizer.param_groups]
        for number, its in positions:
            group = self._device_optimizer.param_groups[number]
            if len(group["params"]) != len(self._twins[number]):
                remedy = "Call remove() before the groups change, and construct it again."
                raise RuntimeError(message("the optimizer's groups", "those HostStep has seen", "others", remedy))
            for position in range(len(group["params"])) if its is None else its:
                param = group["params"][position]
                if param.grad is None:
                    continue
                self._refresh(param, self._twins[number][position])
                streams = _streams_of(param.device)
                ready = None if streams is None else streams.current_stream(param.device).record_event()
                self._queue.put(partial(self._guarded, (number, position), param.grad, ready, words))

    def _refresh(self, param: Tensor, twin: Tensor) -> None:
        """Follow what somebody else has done to a parameter or to the optimizer's state of it, as loading does."""
        state = self._device_optimizer.state
        theirs, ours = state.get(param), self._host.state.get(twin)
        if theirs is ours and param._version == self._versions[param]:
            return
        self.wait()
        if param._version != self._versions[param]:  # it may have been us, just now
            twin.copy_(param)
            self._versions[param] = param._version
        if theirs is None:
            self._host.state.pop(twin, None)
        elif theirs is not ours:
            held = {slot: value.cpu() if isinstance(value, Tensor) else value for slot, value in theirs.items()}
            if "master" in held:
                twin.copy_(held["master"])
            self._host.state[twin] = held
        self._share(param, twin)

    def _share(self, param: Tensor, twin: Tensor) -> None:
        """The same dictionary is the state of both, with the weights where the parameter has only rounded ones."""
        recorded = self._host._diagnostics
        if recorded and twin in recorded and self._device_optimizer._diagnostics is not None:
            self._device_optimizer._diagnostics[param] = recorded[twin]
        if twin in self._host.state:
            state = self._device_optimizer.state[param] = self._host.state[twin]
            if twin.dtype != param.dtype:
                state["master"] = twin.detach()

    def _guarded(self, place: Place, grad: Tensor, ready: Any, words: list[Words]) -> None:
        """`_step` in the thread; after an error nothing more is stepped until somebody was told."""
        if self._error is None:
            try:
                self._step(place, grad, ready, words)
            except BaseException as error:  # for `wait`, which raises it
                self._error = error

    @torch.no_grad()
    def _step(self, place: Place, grad: Tensor, ready: Any, words: list[Words]) -> None:
        """Copy a gradient to the host, step, and copy the weights back."""
        number, position = place
        param = self._device_optimizer.param_groups[number]["params"][position]
        twin = self._twins[number][position]
        if self._threads is not None and torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)  # of this thread
        with self._beside(param.device, ready) as synchronize:
            here = self._through(grad).copy_(grad, non_blocking=True)
            synchronize()
            for group, new in zip(self._host.param_groups, words, strict=True):
                group.update(new)
            self._host._step_chosen(self._host._preparation.alone(self._host.param_groups, place, here))
            # A version more, so that autograd refuses to go on where somebody still needs the old weights.
            param.copy_(twin if twin.dtype == param.dtype else self._through(param).copy_(twin), non_blocking=True)
            synchronize()  # the room is needed again
        self._versions[param] = param._version
        self.moved[0] += grad.nbytes
        self.moved[1] += param.nbytes
        self._share(param, twin)

    def _through(self, like: Tensor) -> Tensor:
        """Host memory of a tensor's shape and dtype: the one room, pinned where a device copies to it."""
        if self._room.nbytes < like.nbytes:
            self._room = torch.empty(like.nbytes, dtype=torch.uint8, pin_memory=like.device.type != "cpu")
        return self._room[: like.nbytes].view(like.dtype).view(like.shape)

    @contextmanager
    def _beside(self, device: torch.device, ready: Any) -> Iterator[Callable[[], None]]:
        """A block whose copies run beside the device's own work, after ``ready``; gives what waits for them."""
        if ready is None:
            yield lambda: None
            return
        module = _streams_of(device)
        stream = self._streams.setdefault(device, module.Stream(device))
        stream.wait_event(ready)
        with module.stream(stream):
            yield stream.synchronize


def _twin(param: Tensor, master: torch.dtype | None) -> Parameter:
    """A parameter's weights on the host."""
    dtype = param.dtype if master is None or param.dtype == torch.float64 else master
    memory = torch.empty(param.shape, dtype=dtype, pin_memory=param.device.type not in ("cpu", "meta"))
    return Parameter(memory.copy_(param.detach()), requires_grad=False)


def _streams_of(device: torch.device) -> Any:
    """The module with a device's streams; ``None`` where there are none, and a copy is made when it is asked for."""
    return None if device.type == "cpu" else torch.get_device_module(device)


def _words(group: Words) -> Words:
    """A group as of now: a scheduler may move on before the thread gets there."""
    words = {name: value for name, value in group.items() if name != "params"}
    lr = words["lr"].clone() if isinstance(words["lr"], Tensor) else words["lr"]
    return {**words, "lr": lr, "capturable": False}


def _serve(queue: Queue[Job | None]) -> None:
    """The thread: it knows nothing but its queue, or what it works for could never end."""
    while (job := queue.get()) is not None:
        job()
        del job
        queue.task_done()
