"""A run that moves from any optimizer to any other ends where the one that stayed ends."""

import conversion_runs as runs
import numpy as np
import pytest

STEPS = 100


@pytest.fixture(scope="module", params=[runs.SETTINGS, runs.MOMENTUM], ids=["plain", "momentum"])
def found(request):
    return request.param, runs.matrix(request.param, STEPS)


def test_every_pair_is_exact(found):
    settings, pairs = found
    count = len(runs.runs(settings))
    assert len(pairs) == count * (count - 1)
    for pair, (report, difference) in pairs.items():
        assert report.exact, (pair, report.text())
        assert len(report.changes) == len(runs.SHAPES)
        assert difference < 1e-5, pair


@pytest.mark.parametrize("lost", ["statistics", "count", "momentum"])
def test_the_comparison_above_can_fail(lost):
    """Without the one or the other, the moved run ends elsewhere."""
    settings = runs.MOMENTUM
    start, gradients = runs.problem(40)
    make = runs.runs(settings)["adafactor.torch"]
    stayed = runs.trained(make, start, gradients[:20])
    moved = make(stayed.values())
    if lost != "statistics":
        moved.take(stayed.state(), runs.Report())
        for held in moved.optimizer.state.values():
            held["step" if lost == "count" else "momentum"].zero_()
    for each in gradients[20:]:
        stayed.step(each)
        moved.step(each)
    assert runs.difference(moved.values(), stayed.values()) > 1e-3


def test_counts_and_statistics_are_those_the_target_would_have():
    """The gradients do not depend on the parameters, so every optimizer reaches the same statistics by itself."""
    start, gradients = runs.problem(7)
    makers = runs.runs(runs.SETTINGS)
    expected = runs.trained(makers["adafactor.torch"], start, gradients).state().named()
    for make in makers.values():
        for parameter in runs.trained(make, start, gradients).state().parameters:
            assert parameter.count == 7
            assert parameter.layout == expected[parameter.name].layout
            for slot, value in parameter.statistics.items():
                np.testing.assert_allclose(value, expected[parameter.name].slots[slot], rtol=1e-5)


@pytest.mark.parametrize(("least", "how"), [(2, "rebuilt"), (128, "means")])
def test_other_axes_are_said(least, how):
    """A convolution's largest axes come first here: optax factors over them, PyTorch over the last two."""
    shapes = {"convolution": (12, 10, 2, 3), "bias": (10,)}
    start, gradients = runs.problem(40, shapes)
    makers = runs.runs(runs.SETTINGS)
    tx = runs.optax.adafactor(1e-2, min_dim_size_to_factor=least)
    stayed = runs.trained(
        lambda values: runs.Jax(tx, runs.jax.jit(runs._updater(tx)), "optax", values), start, gradients
    )
    report = runs.Report()
    template = runs.torch_files.write(stayed.state(), "torch.optim", report=report)
    changes = {change.name: change for change in report.changes}
    assert changes["convolution"].how == how
    assert changes["bias"].how == "kept"
    assert report.exact == (how == "means")
    assert 0 < changes["convolution"].estimate_change < 1
    assert ("NOT" in report.text()) == (how == "rebuilt")
    own = runs.trained(makers["torch.optim"], start, gradients).state().named()["convolution"]
    got = runs.torch_files.read(template).named()["convolution"]
    same = all(np.allclose(got.slots[slot], own.slots[slot], rtol=1e-5) for slot in ("row", "column"))
    assert same == (how == "means")
