"""The oracle itself: the paper's identities and numbers computed by hand."""

import dataclasses

import numpy as np
import pytest

from adafactor import Factored, Hyperparameters
from adafactor import layout as layout_of
from adafactor.core import reference

SHAPES = [(6, 5), (1, 5), (6, 1), (1, 1), (3, 6, 5), (2, 3, 4, 5)]
PLAIN = Hyperparameters(clip_threshold=None, scale_parameter=False, relative_step=False)


def problem(shape, steps=5, seed=0):
    """A parameter and gradients whose rows and columns differ in scale by orders of magnitude."""
    rng = np.random.default_rng(seed)
    scale = 1.0
    for axis, n in enumerate(shape):
        ones = [1] * len(shape)
        ones[axis] = n
        scale = scale * 10.0 ** rng.uniform(-3, 3, ones)
    return rng.normal(size=shape), [scale * rng.normal(size=shape) for _ in range(steps)]


def run(x, gradients, layout, hp=PLAIN, learning_rate=0.1, **options):
    optimizer = reference.Adafactor(layout, hp, **options)
    for g in gradients:
        x = optimizer.step(x, g, learning_rate)
    return x, optimizer.state


def sums_and_update(shape, policy="last_two"):
    """The sums after a few updates, and the update they belong to, formed element by element."""
    x, gradients = problem(shape)
    layout = layout_of(shape, policy)
    _, state = run(x, gradients[:-1], layout)
    sums = reference.measure(x, gradients[-1], state, layout, PLAIN, state.t + 1)
    moved, after = reference.apply(x, gradients[-1], sums, state, layout, PLAIN, state.t + 1, 1.0)
    return layout, sums, after, x - moved


# -- the paper's identities ------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["last_two", "largest_two", "smallest"])
@pytest.mark.parametrize("shape", SHAPES)
def test_weighted_column_sums_give_the_sum_of_squared_updates(shape, policy):
    layout, sums, after, u = sums_and_update(shape, policy)
    if not layout.factored:
        assert np.sum(sums.W) == pytest.approx(np.sum(u * u), rel=1e-9)
        return
    column = np.expand_dims(after.second_moment["column"], layout.rows)
    mu = np.mean(column, axis=layout.columns, keepdims=True)
    assert np.sum(mu * sums.W / column) == pytest.approx(np.sum(u * u), rel=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_and_columns_have_the_same_mean(shape):
    _, _, after, _ = sums_and_update(shape)
    row, column = after.second_moment["row"], after.second_moment["column"]
    np.testing.assert_allclose(row.mean(axis=-1), column.mean(axis=-1), rtol=1e-12)


def test_the_estimate_keeps_row_and_column_sums_of_the_averaged_squares():
    x, gradients = problem((6, 5))
    hp = dataclasses.replace(PLAIN, epsilon_1=0.0)
    _, state = run(x, gradients, layout_of((6, 5)), hp)
    average = np.zeros((6, 5))
    for t, g in enumerate(gradients, start=1):
        average += hp.decay(t) * (g * g - average)
    row, column = state.second_moment["row"], state.second_moment["column"]
    v = np.outer(row, column) / row.mean()
    np.testing.assert_allclose(v.sum(axis=1), average.sum(axis=1), rtol=1e-10)
    np.testing.assert_allclose(v.sum(axis=0), average.sum(axis=0), rtol=1e-10)


def test_factoring_is_exact_for_a_gradient_of_rank_one():
    g = np.outer([1.0, -2.0, 30.0], [5.0, 0.1])
    factored, _ = run(np.ones((3, 2)), [g], layout_of((3, 2)))
    unfactored, _ = run(np.ones((3, 2)), [g], layout_of((3, 2), min_dim_size_to_factor=4))
    np.testing.assert_allclose(factored, unfactored, rtol=1e-12)


@pytest.mark.parametrize("d", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("shape", [(), (7,), *SHAPES])
def test_no_update_is_larger_than_the_clip_threshold(shape, d):
    x, gradients = problem(shape)
    hp = dataclasses.replace(PLAIN, clip_threshold=d)
    optimizer = reference.Adafactor(layout_of(shape), hp)
    for g in gradients:
        after = optimizer.step(x, g, 1.0)
        assert np.sqrt(np.mean((after - x) ** 2)) <= d * (1 + 1e-9)
        x = after


def test_clipping_leaves_a_small_update_alone():
    x, gradients = problem((6, 5))
    wide = dataclasses.replace(PLAIN, clip_threshold=1e6)
    np.testing.assert_array_equal(
        run(x, gradients, layout_of((6, 5)), wide)[0], run(x, gradients, layout_of((6, 5)))[0]
    )


def test_transposing_the_problem_transposes_the_step():
    x, gradients = problem((6, 5))
    hp = Hyperparameters(relative_step=False)
    moved, _ = run(x, gradients, layout_of((6, 5)), hp)
    transposed, _ = run(x.T, [g.T for g in gradients], layout_of((5, 6)), hp)
    np.testing.assert_allclose(transposed, moved.T, rtol=1e-10)


def test_a_step_does_not_depend_on_the_scale_of_the_gradient():
    x, gradients = problem((6, 5))
    hp = dataclasses.replace(PLAIN, epsilon_1=0.0)
    moved, _ = run(x, gradients, layout_of((6, 5)), hp)
    scaled, _ = run(x, [1e6 * g for g in gradients], layout_of((6, 5)), hp)
    np.testing.assert_allclose(scaled, moved, rtol=1e-10)


def test_a_step_scales_with_the_parameter():
    x, gradients = problem((6, 5))
    hp = Hyperparameters(relative_step=False, epsilon_2=0.0)
    moved, _ = run(x, gradients, layout_of((6, 5)), hp)
    scaled, _ = run(1000 * x, gradients, layout_of((6, 5)), hp)
    np.testing.assert_allclose(scaled, 1000 * moved, rtol=1e-10)


def test_permuting_rows_permutes_the_step():
    x, gradients = problem((6, 5))
    order = np.array([3, 1, 5, 0, 2, 4])
    moved, _ = run(x, gradients, layout_of((6, 5)))
    permuted, _ = run(x[order], [g[order] for g in gradients], layout_of((6, 5)))
    np.testing.assert_allclose(permuted, moved[order], rtol=1e-10)


# -- zeros and what is not finite --------------------------------------------------------------------------------


@pytest.mark.parametrize("large", [1.0, 1e4, 1e8, 1e15])
@pytest.mark.parametrize("epsilon_1", [0.0, 1e-30])
def test_a_zero_row_stays_beside_large_gradients(large, epsilon_1):
    x, _ = problem((4, 3))
    g = np.full((4, 3), large)
    g[1] = 0
    hp = dataclasses.replace(PLAIN, epsilon_1=epsilon_1)
    moved, _ = run(x, [g] * 3, layout_of((4, 3)), hp, dtype=np.float32)
    np.testing.assert_array_equal(moved[1], x[1].astype(np.float32))
    assert np.isfinite(moved).all()


@pytest.mark.parametrize("shape", [(), (3,), (3, 4), (2, 3, 4)])
@pytest.mark.parametrize("epsilon_1", [0.0, 1e-30])
def test_no_gradient_is_no_step(shape, epsilon_1):
    x, _ = problem(shape)
    hp = Hyperparameters(epsilon_1=epsilon_1)
    moved, _ = run(x, [np.zeros(shape)] * 3, layout_of(shape), hp)
    np.testing.assert_array_equal(moved, x)


def test_a_nan_stays_in_its_slice_of_the_batch():
    x, (g, *_) = problem((3, 4, 5))
    g[1, 2, 3] = np.nan
    hp = Hyperparameters(relative_step=False)
    moved, _ = run(x, [g], layout_of((3, 4, 5), batch_axes=(0,)), hp)
    assert np.isfinite(moved[[0, 2]]).all()
    assert not np.isfinite(moved[1]).any()


def test_a_nan_shows_in_the_whole_parameter_without_batch():
    x, (g, *_) = problem((3, 4))
    g[0, 0] = np.nan
    moved, _ = run(x, [g], layout_of((3, 4)), Hyperparameters())
    assert np.isnan(moved).all()


def test_an_empty_parameter_counts_its_updates():
    moved, state = run(np.zeros((0, 3)), [np.zeros((0, 3))] * 2, layout_of((0, 3)), Hyperparameters())
    assert moved.shape == (0, 3)
    assert state.t == 2


# -- measure, combine, apply -------------------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [1, 2, 3])
@pytest.mark.parametrize(
    "hp", [Hyperparameters(relative_step=False), Hyperparameters(beta_1=0.9)], ids=["plain", "momentum"]
)
def test_shards_of_rows_move_like_the_whole(pieces, hp):
    shape = (6, 5)
    x, gradients = problem(shape)
    whole, _ = run(x, gradients, layout_of(shape), hp)

    # Each shard holds its rows and their statistic; the column statistic is on all of them.
    xs = np.split(x, pieces)
    layouts = [layout_of(part.shape) for part in xs]
    # n, N and the parameter scale are the whole parameter's, so a shard is applied with the whole's sums.
    rows = [np.zeros(part.shape[0]) for part in xs]
    momenta = [np.zeros(part.shape) for part in xs] if hp.momentum else [None] * pieces
    column = np.zeros(shape[1])
    for t, g in enumerate(gradients, start=1):
        gs = np.split(g, pieces)
        states = [
            reference.State({"row": row, "column": column}, momentum, t - 1)
            for row, momentum in zip(rows, momenta, strict=True)
        ]
        sums = [reference.measure(*each, hp, t) for each in zip(xs, gs, states, layouts, strict=True)]
        S, W, Q = (sum(getattr(part, name) for part in sums) for name in "SWQ")  # combine: one addition
        rho = hp.rho(0.1, t)
        moved = [
            reference.apply(part, part_g, reference.Sums(found.rows, S, W, Q), state, Whole(its, shape), hp, t, rho)
            for part, part_g, found, state, its in zip(xs, gs, sums, states, layouts, strict=True)
        ]
        xs = [part for part, _ in moved]
        rows = [state.second_moment["row"] for _, state in moved]
        momenta = [state.momentum for _, state in moved]
        column = moved[0][1].second_moment["column"]
    np.testing.assert_allclose(np.concatenate(xs), whole, rtol=1e-12)


class Whole:
    """A shard's layout, with the counts of the parameter it was cut from."""

    def __init__(self, shard, shape):
        self.shard, self.n, self.slice_size = shard, shape[0], int(np.prod(shape))

    def __getattr__(self, name):
        return getattr(self.shard, name)


# -- numbers computed by hand --------------------------------------------------------------------------------------

KERAS = Hyperparameters(relative_step="always")


def test_one_step_of_a_vector():
    # x - 0.5 sqrt(7.5): the update is all ones, RMS(x) = sqrt(7.5).
    moved, _ = run([1, 2, 3, 4], [[1, 6, 7, 2]], layout_of((4,)), KERAS, 0.5)
    np.testing.assert_allclose(moved, [-0.3693, 0.6307, 1.6307, 2.6307], atol=1e-4)


def test_one_step_of_a_matrix():
    # row = [18.5, 26.5], column = [25, 20], RMS(u) = 1.00894, alpha = 1.36931.
    moved, state = run([[1, 2], [3, 4]], [[[1, 6], [7, 2]]], layout_of((2, 2)), KERAS, 0.5)
    np.testing.assert_allclose(state.second_moment["row"], [18.5, 26.5])
    np.testing.assert_allclose(state.second_moment["column"], [25, 20])
    np.testing.assert_allclose(moved, [[0.7007, -0.0081], [1.2492, 3.4407]], atol=1e-4)


def test_five_steps_of_ones():
    first = np.full(10, 0.01)
    rest = np.arange(0.1, 1.05, 0.1)
    hp = Hyperparameters(
        beta_2_decay=-0.65, epsilon_1=1e-15, epsilon_2=1e-4, clip_threshold=0.9, relative_step="always"
    )
    optimizer = reference.Adafactor(layout_of((10,)), hp)
    x, ends = np.ones(10), []
    for g in (first, rest, rest, rest, rest):
        x = optimizer.step(x, g, 0.5)
        ends.append((x[0], x[-1]))
    golden = [(0.55, 0.55), (0.3031, 0.3024), (0.1671, 0.1663), (0.0923, 0.0914), (0.0554, 0.0545)]
    np.testing.assert_allclose(ends, golden, atol=5e-4)


def test_momentum_is_not_corrected_for_its_start():
    hp = dataclasses.replace(PLAIN, beta_1=0.9)
    moved, _ = run(np.zeros(3), [np.ones(3)], layout_of((3,)), hp, 1.0)
    np.testing.assert_allclose(moved, -0.1)


def test_a_shape_that_is_not_the_layouts_is_refused():
    with pytest.raises(ValueError, match=r"must have shape \(2, 3\), got \(2, 3\) and \(3, 2\)"):
        run(np.zeros((2, 3)), [np.zeros((3, 2))], layout_of((2, 3)))


def test_the_state_before_a_step_is_left_as_it_was():
    layout = layout_of((2, 3))
    state = reference.init(layout, PLAIN)
    reference.step(np.ones((2, 3)), np.ones((2, 3)), state, layout, PLAIN, 0.1)
    assert state.t == 0
    assert not state.second_moment["row"].any()


def test_slices_of_a_batch_move_as_if_they_were_alone():
    x, gradients = problem((3, 6, 5))
    stacked, _ = run(x, gradients, layout_of((3, 6, 5), batch_axes=(0,)), KERAS)
    alone = [run(x[i], [g[i] for g in gradients], layout_of((6, 5)), KERAS)[0] for i in range(3)]
    np.testing.assert_allclose(stacked, alone, rtol=1e-12)


def test_several_row_axes_act_as_one():
    x, gradients = problem((2, 3, 5))
    spec = layout_of((2, 3, 5), lambda name, shape: Factored((0, 1), (2,)))
    moved, _ = run(x, gradients, spec, KERAS)
    flat, _ = run(x.reshape(6, 5), [g.reshape(6, 5) for g in gradients], layout_of((6, 5)), KERAS)
    np.testing.assert_allclose(moved, flat.reshape(2, 3, 5), rtol=1e-12)
