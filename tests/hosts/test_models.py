"""Tiny models of transformers, timm, diffusers and peft train, in bfloat16 too, and release gives the same bits."""

import importlib.util
from pathlib import Path

import pytest
import torch

SPEC = importlib.util.spec_from_file_location("models", Path(__file__).parents[2] / "experiments" / "models.py")
models = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(models)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("library", "make"),
    [(library, make) for library, makes in models.MODELS.items() for make in makes],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_model_trains(library, make, dtype):
    try:
        importlib.import_module(library)
    except (ImportError, RuntimeError) as error:  # the latter from a torchvision of another build
        pytest.skip(f"{library}: {error}")
    (ratio, weights), (_, released) = (models.train(make, dtype, release, steps=8) for release in (False, True))
    assert ratio < 0.999
    assert all(map(torch.equal, weights, released))
