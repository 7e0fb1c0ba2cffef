"""Which state each variable gets, of every rank and under every policy."""

import keras
import numpy as np
import pytest
from keras_support import SHAPES, make_variables, numbers, precise, problem, state_bytes, train

from adafactor.keras import Adafactor


def built(shapes, dtype="float32", **options):
    """An optimizer with the state of variables ``layer/name`` of these shapes."""
    optimizer = Adafactor(**options)
    with keras.name_scope("layer"):
        variables = [keras.Variable(np.zeros(shape), dtype=dtype, name=name) for name, shape in shapes.items()]
    optimizer.build(variables)
    return optimizer


@pytest.mark.parametrize(
    ("factoring", "numbers_kept"), [("last_two", 9216), ("largest_two", 3 * 3 * 1024), ("smallest", 5120)]
)
def test_the_policy_decides_how_much_is_kept(factoring, numbers_kept):
    assert state_bytes(built({"kernel": (3, 3, 512, 512)}, factoring=factoring)) == 4 * numbers_kept


def test_shapes_follow_the_layout():
    optimizer = built(SHAPES)
    assert {v.name: tuple(v.shape) for v in optimizer.variables[2:]} == {
        "layer_scalar_second_moment": (),
        "layer_vector_second_moment": (5,),
        "layer_matrix_row": (3,),
        "layer_matrix_column": (4,),
        "layer_one_row": (1,),
        "layer_one_column": (1,),
        "layer_column_row": (4,),
        "layer_column_column": (1,),
        "layer_row_row": (1,),
        "layer_row_column": (4,),
        "layer_cube_row": (2, 3),
        "layer_cube_column": (2, 4),
        "layer_kernel_row": (3, 1, 4),
        "layer_kernel_column": (3, 1, 5),
        "layer_five_row": (2, 3, 2, 4),
        "layer_five_column": (2, 3, 2, 3),
        "layer_empty_second_moment": (0, 3),
    }


def test_variables_of_one_path_step_on_their_own():
    values, gradients = problem({"a": (2, 3), "b": (2, 3)}, steps=3)
    apart, together = make_variables(values, names=["a", "b"]), make_variables(values, names=["w", "w"])
    train(Adafactor(0.1), apart, gradients)
    train(Adafactor(0.1), together, gradients)
    np.testing.assert_array_equal(numbers(apart), numbers(together))


def test_statistics_of_float64_are_float64():
    with precise("float64"):
        optimizer = built({"kernel": (3, 4), "bias": (4,)}, "float64", beta_1=0.9)
        assert {keras.backend.standardize_dtype(v.dtype) for v in optimizer.variables[2:]} == {"float64"}
