"""A CUDA graph re-enacted in Triton's interpreter: what a capture launches and copies is recorded for `replay`."""

from triton.runtime import interpreter

from adafactor.engine.torch import accelerator


class Graph:
    """Use as ``with Graph(monkeypatch) as graph: optimizer.step()``, then ``graph.replay()``. Nothing runs before."""

    def __init__(self, monkeypatch):
        self._patch, self.recorded = monkeypatch, []

    def __enter__(self):
        self._context = self._patch.context()
        patch = self._context.__enter__()
        self.launch, self.copy = interpreter.InterpretedFunction.run, accelerator.send
        patch.setattr(accelerator, "is_capturing", lambda: True)
        patch.setattr(
            interpreter.InterpretedFunction,
            "run",
            lambda kernel, *args, **kwargs: self.recorded.append((self.launch, (kernel, *args), kwargs)),
        )
        patch.setattr(accelerator, "send", lambda *args: self.recorded.append((self.copy, args, {})))
        return self

    def __exit__(self, *error):
        return self._context.__exit__(*error)

    def replay(self):
        for call, args, kwargs in self.recorded:
            call(*args, **kwargs)
