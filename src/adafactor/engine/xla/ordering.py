"""What a call has to wait for before the memory of its parameters may be overwritten, read off the program so far.

XLA decides about copies before it decides about an order of execution. A parameter whose new value shall take its
memory is copied first unless the data alone say that all who read the old value come before: dx = dy Wᵀ reads W, and
nothing that moves W depends on dx. Each such reader is followed to a gradient of another parameter, which is in memory
anyway; handed to the call as one more operand, it makes the call wait, and the copy is gone. Where there is no such
gradient (a penalty that is only reported), what the reader ends in is handed over.

The order changes no number. What is not seen here, because it stands in another function of the program or behind the
step, costs the copy that it has always cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxlib.mlir import ir

Value = Any  # a value of the program


class Writer(NamedTuple):
    """A call to be: it reads ``gradients``, and the new values of ``parameters`` depend on it."""

    parameters: Sequence[Value]
    gradients: Sequence[Value]


def waits(writers: Sequence[Writer]) -> list[list[Value]]:
    """For each call the further operands that make it wait for all other readers of its parameters."""
    program = _Program([gradient for writer in writers for gradient in writer.gradients])
    operands = []
    for writer in writers:
        own = program.mask(writer.gradients)
        tokens: dict[Value, None] = {}
        for parameter in writer.parameters:
            for reader in program.readers(parameter):
                leads_to = program.leads_to.get(reader, 0)
                if leads_to & own:
                    continue
                token = program.gradients[_lowest(leads_to)] if leads_to else program.end(reader)
                if token is not None:
                    tokens[token] = None
        operands.append(list(tokens))
    return operands


class _Program:
    """The operations of the block that is being written, and which gradients each of them leads to.

    Attributes:
        gradients: in the order in which they are computed; gradient k is bit k of a mask.
        leads_to: per operation the mask of the gradients that depend on it.
    """

    def __init__(self, gradients: Sequence[Value]) -> None:
        operations = [operation.operation for operation in ir.InsertionPoint.current.block.operations]
        self._position = {operation: k for k, operation in enumerate(operations)}
        made = {}
        for value in gradients:
            owner = None if isinstance(value.owner, ir.Block) else self._outermost(value.owner)
            if owner is not None:
                made[value] = self._position[owner]
        self.gradients = sorted(made, key=made.__getitem__)
        self._bits = {value: 1 << k for k, value in enumerate(self.gradients)}
        self.leads_to: dict[Any, int] = {}
        for operation in reversed(operations):
            mask = 0
            for result in operation.results:
                mask |= self._bits.get(result, 0)
                for use in result.uses:
                    mask |= self.leads_to.get(self._outermost(use.owner), 0)
            self.leads_to[operation] = mask

    def mask(self, gradients: Sequence[Value]) -> int:
        return sum({self._bits.get(value, 0) for value in gradients})

    def readers(self, value: Value) -> list[Any]:
        outermost = dict.fromkeys(self._outermost(use.owner) for use in value.uses)
        return [operation for operation in outermost if operation is not None]

    def end(self, operation: Any) -> Value | None:
        """A value that depends on the operation and that nothing depends on yet: of the program's results, it seems."""
        while operation is not None:
            results = list(operation.results)
            if not results:
                return None
            uses = list(results[0].uses)
            if not uses:
                return results[0]
            operation = self._outermost(uses[0].owner)
        return None

    def _outermost(self, operation: Any) -> Any | None:
        """The operation of the block itself that the given one is, or is part of; ``None`` for one from elsewhere."""
        operation = operation.operation
        while operation not in self._position:
            if operation.parent is None:
                return None
            operation = operation.parent.operation
        return operation


def _lowest(mask: int) -> int:
    return (mask & -mask).bit_length() - 1
