"""Bytes that kernels load and store, counted where Triton's interpreter carries them out, and their launches."""

from triton.runtime import interpreter


class Traffic:
    """Use as ``with Traffic(monkeypatch) as traffic: optimizer.step()``; then ``traffic.bytes`` and ``.launches``."""

    def __init__(self, monkeypatch):
        self._context, self.bytes, self.launches = monkeypatch.context(), 0, 0

    def __enter__(self):
        patch = self._context.__enter__()
        builder, function = interpreter.InterpreterBuilder, interpreter.InterpretedFunction
        load, store, run = builder.create_masked_load, builder.create_masked_store, function.run

        def counted_load(this, ptrs, mask, *args):
            loaded = load(this, ptrs, mask, *args)
            self.bytes += int(mask.data.sum()) * loaded.data.itemsize
            return loaded

        def counted_store(this, ptrs, value, mask, *args):
            self.bytes += int(mask.data.sum()) * value.data.itemsize
            return store(this, ptrs, value, mask, *args)

        def counted_run(this, *args, **kwargs):
            self.launches += 1
            return run(this, *args, **kwargs)

        patch.setattr(builder, "create_masked_load", counted_load)
        patch.setattr(builder, "create_masked_store", counted_store)
        patch.setattr(function, "run", counted_run)
        return self

    def __exit__(self, *error):
        return self._context.__exit__(*error)
