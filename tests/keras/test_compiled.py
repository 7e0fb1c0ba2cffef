"""PyTorch's compiler around ``apply``: the native step is opaque to it, and the numbers are the same."""

import numpy as np
import pytest
from keras_support import make_variables, numbers, problem, tensors

from adafactor.keras import Adafactor

VALUES, GRADIENTS = problem({"matrix": (3, 4), "vector": (5,)}, steps=3)


@pytest.mark.backend("torch", reason="torch.compile")
@pytest.mark.filterwarnings("ignore")  # Dynamo's, about Keras
@pytest.mark.parametrize("options", [{}, {"beta_1": 0.5, "weight_decay": 0.1, "clipnorm": 1.0}], ids=["plain", "more"])
def test_apply_may_be_part_of_a_compiled_step(options):
    import torch

    found = []
    for wrap in (torch.compile(backend="eager"), lambda function: function):
        variables, optimizer = make_variables(VALUES), Adafactor(0.1, **options)
        optimizer.build(variables)
        step = wrap(lambda gradients, opt=optimizer, its=variables: opt.apply(gradients, its))
        for gradients in GRADIENTS:
            step(tensors(gradients))
        found.append(numbers([*variables, *optimizer.variables]))
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)
