"""The recipes of docs/recipes.md are what their sources say, written out."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pages
import pytest
import torch
from optax_support import assert_close


@pytest.fixture(scope="module")
def page(ran):
    """Everything the page's blocks define."""
    return ran(pages.ROOT / "docs/recipes.md")


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def rms(a):
    return np.sqrt(np.mean(np.square(a)))


def normalised(history, beta, factored):
    """g / sqrt(v) of the last gradient, from the definitions alone."""
    v = 0
    for t, g in enumerate(history, start=1):
        v = beta(t) * v + (1 - beta(t)) * (g**2 + 1e-30)
    if factored:
        v = np.outer(v.sum(1), v.sum(0)) / v.sum()
    return history[-1] / np.sqrt(v)


def power(t):
    return 1 - t**-0.8


def trajectory(tx, x, gradients):
    state = tx.init(x)
    for g in gradients:
        updates, state = jax.jit(tx.update)(jnp.asarray(g, jnp.float32), state, x)
        x = optax.apply_updates(x, updates)
    return x


def trajectory_of(optimizer, x, gradients):
    """The same with the options of a PyTorch recipe."""
    parameter = torch.nn.Parameter(torch.tensor(x, dtype=torch.float32))
    again = type(optimizer)([parameter], **{name: optimizer.defaults[name] for name in optimizer.defaults})
    for g in gradients:
        parameter.grad = torch.tensor(g, dtype=torch.float32)
        again.step()
    return parameter.detach().numpy()


@pytest.fixture
def problem(rng):
    return rng.standard_normal((140, 130)), [rng.standard_normal((140, 130)) for _ in range(4)]


def test_t5(page, problem):
    start, gradients = problem
    for name, rate in (("t5_pretraining", 1e-2), ("t5_finetuning", 1e-3), ("paper", 1e-2)):
        x = start
        for t in range(1, 5):
            u = normalised(gradients[:t], power, factored=True)
            x = x - rate * max(1e-3, rms(x)) * u / max(1, rms(u))
        assert_close(trajectory(page[name], jnp.asarray(start, jnp.float32), gradients), x)


def test_t5_decays_from_step_10000(page):
    x = jnp.ones(8)
    for name, expected in (("t5_pretraining", 1 / np.sqrt(40_000)), ("paper", 1 / np.sqrt(40_001))):
        state = page[name].init(x)
        late = state._replace(count=jnp.int32(40_000), second_moment=jnp.ones(8))
        updates, _ = page[name].update(x, late, x)
        np.testing.assert_allclose(updates, -expected, rtol=1e-5)


def test_scaling_vit(page, problem):
    start, gradients = problem
    schedule = lambda count: 1 / (1 + count)  # noqa: E731
    x, m = start, 0
    for t in range(1, 5):
        m = 0.9 * m + 0.1 * normalised(gradients[:t], lambda t: min(0.999, power(t)), factored=True)
        x = x - schedule(t - 1) * (3e-3 * m + 1e-2 * x)
        m = np.asarray(jnp.asarray(m, jnp.bfloat16), np.float64)
    tx = page["scaling_vit"](3e-3, schedule, 1e-2)
    assert_close(trajectory(tx, jnp.asarray(start, jnp.float32), gradients), x, 1e-5)
    assert tx.init(jnp.ones(3))[0].momentum.dtype == jnp.bfloat16


def test_scaling_vit_bounds_beta(page):
    """At t = 10,001 the schedule alone would give 0.99937."""
    tx, x = page["scaling_vit"](1.0, lambda count: 1.0, 0.0), jnp.ones(3)
    state = tx.init(x)
    late = (state[0]._replace(count=jnp.int32(10_000), second_moment=jnp.ones(3)), *state[1:])
    _, late = tx.update(2 * x, late, x)
    np.testing.assert_allclose(late[0].second_moment, 1.003, rtol=1e-6)


def test_palm(page, problem):
    start, gradients = problem
    clipped = [g / max(1, np.linalg.norm(g)) for g in gradients]
    x, m = start, 0
    for t in range(1, 5):
        rate = min(1e-2, 1 / np.sqrt(t))
        m = 0.9 * m + 0.1 * rate * max(1e-3, rms(x)) * normalised(clipped[:t], power, factored=False)
        x = x - m - rate**2 * x
    assert_close(trajectory(page["palm"], jnp.asarray(start, jnp.float32), gradients), x)


def test_t5_on_torch_is_t5_on_jax(page, problem):
    start, gradients = problem
    expected = trajectory(page["t5_finetuning"], jnp.asarray(start, jnp.float32), gradients)
    assert_close(trajectory_of(page["t5x"], start, gradients), expected, 2e-6)


def test_t5_of_hugging_face(page, problem):
    start, gradients = problem
    x = start
    for t in range(1, 5):
        u = normalised(gradients[:t], power, factored=True)
        x = x - 1e-3 * u / max(1, rms(u))
    assert_close(trajectory_of(page["huggingface"], start, gradients), x)


def test_vit_on_torch_is_vit_on_jax_at_a_constant_learning_rate(page, problem):
    start, gradients = problem
    jax_form = page["scaling_vit"](8e-4, lambda count: 1.0, 0.03 * 8e-4)
    expected = trajectory(jax_form, jnp.asarray(start, jnp.float32), gradients)
    assert_close(trajectory_of(page["vit_on_torch"], start, gradients), expected, 1e-5)


def test_schedules(page):
    t5 = page["InverseSquareRoot"]()
    assert [float(t5(step)) for step in (0, 10_000, 40_000)] == pytest.approx([0.01, 0.01, 0.005])
    assert [float(page["rsqrt"](step)) for step in (0, 5_000, 10_000, 40_000)] == pytest.approx([0, 0.5, 1, 0.5])
