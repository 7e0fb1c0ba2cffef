"""Flat parameters on the Triton kernels: random cuts over simulated ranks, beside one process's native step."""

import threading

import flat_cases
import torch
import triton_support

from adafactor.core.factoring import Part
from adafactor.engine.torch import choose, cuda
from adafactor.engine.torch.triton import forms


def test_random_cuts_agree_with_the_whole(monkeypatch):
    native = choose.kernels_for
    triton_support.use(monkeypatch)
    if triton_support.DEVICE.type == "cpu":
        from triton.runtime.interpreter import GridExecutor

        # The interpreter runs one program of a process at a time.
        lock, launch = threading.Lock(), GridExecutor.__call__

        def alone(*args, **kwargs):
            with lock:
                return launch(*args, **kwargs)

        monkeypatch.setattr(GridExecutor, "__call__", alone)
    reached = []

    def kernels_for(w, grad):
        if not isinstance(w.layout, Part) or w.settings.fused is False or not grad.is_contiguous():
            return native(w, grad)
        reached.append(forms.form_of(w) is not None)
        return cuda.Triton if reached[-1] else None

    monkeypatch.setattr(choose, "kernels_for", kernels_for)
    monkeypatch.setattr(choose, "kernels_on", lambda device: choose.cpu.Native)
    for seed, case in flat_cases.cases(24):
        if case.dtype == torch.float32 and len(case.pieces) < 5:
            assert flat_cases.compared(case, seed)["worst"] <= 1e-6, (seed, case)
    assert reached.count(True) > 2 * reached.count(False)
