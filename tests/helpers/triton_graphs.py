"""A CUDA graph re-enacted in Triton's interpreter: what a capture launches and copies is recorded for `replay`."""

from triton.runtime import interpreter

from adafactor.engine.torch import cuda


class Graph:
    """Use as ``with Graph(monkeypatch) as graph: optimizer.step()``, then ``graph.replay()``. Nothing runs before."""

    def __init__(self, monkeypatch):
        self._patch, self.recorded = monkeypatch, []

    def __enter__(self):
        self._context = self._patch.context()
        patch = self._context.__enter__()
        self.launch, self.copy = interpreter.InterpretedFunction.run, cuda.send
        patch.setattr(cuda, "is_capturing", lambda: True)
        patch.setattr(
            interpreter.InterpretedFunction,
            "run",
            lambda kernel, *args, **kwargs: self.recorded.append((self.launch, (kernel, *args), kwargs)),
        )
        patch.setattr(cuda, "send", lambda *args: self.recorded.append((self.copy, args, {})))
        return self

    def __exit__(self, *error):
        return self._context.__exit__(*error)

    def replay(self):
        for call, args, kwargs in self.recorded:
            call(*args, **kwargs)
