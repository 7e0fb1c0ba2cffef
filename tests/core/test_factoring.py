"""Which axes become rows and columns, on plain data."""

import math

import pytest

from adafactor import Factored, Layout, layout

SHAPES = [(), (5,), (3, 4), (1, 1), (4, 1), (1, 4), (2, 3, 4), (3, 3, 5, 7), (2, 3, 4, 5, 6), (8, 1, 1, 8), (0, 3)]
POLICIES = ["last_two", "largest_two", "smallest"]
BATCHES = [(), (0,)]


@pytest.mark.parametrize(
    ("shape", "policy", "rows", "columns"),
    [
        ((), "last_two", (), ()),
        ((7,), "last_two", (), ()),
        ((3, 4), "last_two", (0,), (1,)),
        ((2, 3, 4), "last_two", (1,), (2,)),
        ((9, 3, 4), "largest_two", (0,), (2,)),
        ((4, 4, 4), "largest_two", (1,), (2,)),
        ((9, 2, 9, 3), "largest_two", (0,), (2,)),
        ((3, 3, 512, 512), "smallest", (0, 1, 2), (3,)),
        ((4096, 32, 128), "smallest", (0,), (1, 2)),
        ((5, 6), "smallest", (0,), (1,)),
    ],
)
def test_the_policy_names_the_axes(shape, policy, rows, columns):
    chosen = layout(shape, policy)
    assert (chosen.rows, chosen.columns) == (rows, columns)


@pytest.mark.parametrize(
    ("shape", "policy", "numbers"),
    [
        ((4096, 4096), "last_two", 8192),
        ((3, 3, 512, 512), "last_two", 9216),
        ((3, 3, 512, 512), "smallest", 5120),
        ((4096, 32, 128), "last_two", 655_360),
        ((4096, 32, 128), "smallest", 8192),
        ((5,), "last_two", 5),
        ((), "last_two", 1),
    ],
)
def test_state_size(shape, policy, numbers):
    assert layout(shape, policy).state_size == numbers


@pytest.mark.parametrize("shape", SHAPES)
def test_smallest_keeps_no_more_than_any_other_cut(shape):
    cuts = [math.prod(shape[:k]) + math.prod(shape[k:]) for k in range(1, len(shape))]
    assert layout(shape, "smallest").state_size == min([math.prod(shape), *cuts])


@pytest.mark.parametrize("shape", SHAPES)
def test_smallest_never_keeps_more_than_the_parameter_has(shape):
    assert layout(shape, "smallest").state_size <= math.prod(shape)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape])
def test_no_axis_has_two_roles(shape, policy, batch):
    chosen = layout(shape, policy, batch_axes=batch)
    named = (*chosen.rows, *chosen.columns, *chosen.batch)
    assert len(set(named)) == len(named)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_row_and_column_statistics_cover_the_parameter(shape, policy):
    chosen = layout(shape, policy)
    if chosen.factored:
        stack = math.prod(shape) // (chosen.n * chosen.m)
        assert (math.prod(chosen.row_shape), math.prod(chosen.column_shape)) == (stack * chosen.n, stack * chosen.m)
    else:
        assert chosen.slots == {"second_moment": shape}


@pytest.mark.parametrize("policy", POLICIES)
def test_batch_axes_are_never_factored_over(policy):
    chosen = layout((64, 3, 64), policy, batch_axes=(0,))
    assert (chosen.rows, chosen.columns, chosen.batch) == ((1,), (2,), (0,))


def test_batch_axes_leave_a_stack_of_vectors_unfactored():
    assert layout((8, 64), batch_axes=(0,)).slots == {"second_moment": (8, 64)}


def test_a_clip_factor_stands_for_one_slice_of_the_batch():
    assert layout((8, 3, 4), batch_axes=(0,)).slice_size == 12


def test_a_clip_factor_stands_for_a_whole_stack_without_batch():
    assert layout((8, 3, 4)).slice_size == 96


def test_negative_batch_axes_count_from_the_end():
    assert layout((3, 4, 8), batch_axes=(-1,)).batch == (2,)


def test_negative_axes_of_a_callable_count_from_the_end():
    chosen = layout((2, 3, 4), lambda name, shape: Factored(rows=(-3, -2), columns=(-1,)))
    assert (chosen.rows, chosen.columns) == ((0, 1), (2,))


@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_is_factored_when_a_side_is_too_small(policy):
    assert not layout((7, 8), policy, min_dim_size_to_factor=8).factored


@pytest.mark.parametrize("policy", POLICIES)
def test_a_side_of_the_least_size_is_factored(policy):
    assert layout((8, 8), policy, min_dim_size_to_factor=8).factored


def test_a_side_of_several_axes_counts_as_long_as_their_product():
    assert layout((4, 4, 16), "smallest", min_dim_size_to_factor=16).factored


def test_a_callables_word_is_final():
    matrix = lambda name, shape: Factored((0,), (1,))  # noqa: E731
    assert layout((2, 2), matrix, min_dim_size_to_factor=128).factored


def test_a_callable_is_asked_with_name_and_shape():
    asked = []
    layout((2, 3), lambda name, shape: asked.append((name, shape)), name="layer/kernel")
    assert asked == [("layer/kernel", (2, 3))]


def test_a_callable_may_leave_a_parameter_unfactored():
    assert layout((2, 3), lambda name, shape: None) == Layout((2, 3), (), ())


def test_an_empty_parameter_is_never_factored():
    assert not layout((0, 3), lambda name, shape: Factored((0,), (1,))).factored


@pytest.mark.parametrize("policy", ["last", "", None, 2])
def test_an_unknown_policy_is_refused(policy):
    with pytest.raises(ValueError, match=r'^factoring must be "last_two", "largest_two", "smallest" or a callable .*'):
        layout((2, 3), policy)


@pytest.mark.parametrize(
    ("value", "error", "rule"),
    [
        (0, ValueError, ">= 1"),
        (-1, ValueError, ">= 1"),
        (1.5, TypeError, "an integer"),
        (True, TypeError, "an integer"),
    ],
)
def test_an_impossible_least_size_is_refused(value, error, rule):
    with pytest.raises(error, match=rf"^min_dim_size_to_factor must be {rule}, got {value}\. Pass 1 for all\.$"):
        layout((2, 3), min_dim_size_to_factor=value)


@pytest.mark.parametrize(
    ("spec", "error", "sentence"),
    [
        ((0, 1), TypeError, r"factoring\('w', \(2, 3, 4\)\) must be a Factored or None, got \(0, 1\)"),
        (Factored((0,), (0,)), ValueError, "factoring of 'w' must be one role per axis"),
        (Factored((0,), (-3,)), ValueError, "factoring of 'w' must be one role per axis"),
        (Factored((0,), (1,), (1,)), ValueError, "factoring of 'w' must be one role per axis"),
        (Factored((0,)), ValueError, "factoring of 'w' must be both rows and columns"),
        (Factored((), (1,)), ValueError, "factoring of 'w' must be both rows and columns"),
        (Factored((0,), (3,)), ValueError, "columns of 'w' must be axes of a parameter of rank 3"),
        (Factored((-4,), (1,)), ValueError, "rows of 'w' must be axes of a parameter of rank 3"),
        (Factored((0,), ("1",)), ValueError, "columns of 'w' must be axes of a parameter of rank 3"),
        (Factored((0,), (1,), (5,)), ValueError, "batch of 'w' must be axes of a parameter of rank 3"),
    ],
)
def test_roles_that_do_not_fit_the_shape_are_refused(spec, error, sentence):
    with pytest.raises(error, match=f"^{sentence}"):
        layout((2, 3, 4), lambda name, shape: spec, name="w")


def test_a_layout_is_a_dictionary_key():
    assert len({layout((2, 3)), layout([2, 3]), layout((3, 2))}) == 2
