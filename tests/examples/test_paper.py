"""The experiment behind docs/paper.md: its settings say what they are called, and a short run of it ends well."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def paper(monkeypatch):
    spec = importlib.util.spec_from_file_location("paper", ROOT / "experiments/paper.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, value in {"WIDTH": 32, "LAYERS": 1, "CONTEXT": 16, "BATCH": 2}.items():
        monkeypatch.setattr(module, name, value)
    return module


def test_a_short_run(paper, monkeypatch, tmp_path, capsys):
    chosen = [s for s in paper.SETTINGS if s.name in ("factored, decay 0.999", "the same, relative step size")]
    assert len(chosen) == 2
    monkeypatch.setattr(paper, "SETTINGS", tuple(chosen))
    arguments = ["--steps", "10", "--plot", str(tmp_path / "paper.png"), "--json", str(tmp_path / "paper.json")]
    monkeypatch.setattr(sys, "argv", ["paper.py", *arguments])
    paper.main()
    runs = json.loads((tmp_path / "paper.json").read_text())
    assert [(r["name"], r["warm_up"]) for r in runs] == [(s.name, warm) for s in chosen for warm in (True, False)]
    for one in runs:
        assert len(one["losses"]) == len(one["update_rms"]) == 10
        assert math.isfinite(one["held_out"])
        assert one["losses"][0] == pytest.approx(runs[0]["losses"][0], rel=1e-5)  # same weights, same batches
        assert 0 < max(one["update_rms"]) <= max(one["largest_update_rms"]) < 100
    assert (tmp_path / "paper.png").stat().st_size > 10_000
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0][2:] for line in lines[1:]] == [s.name for s in chosen]


def test_a_model_that_sees_the_future_would_show(paper):
    """The loss of a byte does not depend on the bytes after it."""
    params = paper.initial(jax.random.key(0))
    window = np.arange(paper.CONTEXT)[None] % 7
    other = window.copy()
    other[0, -1] = 99
    a, b = paper.logits(params, window), paper.logits(params, other)
    np.testing.assert_array_equal(a[0, :-1], b[0, :-1])
    assert not np.array_equal(a[0, -1], b[0, -1])
