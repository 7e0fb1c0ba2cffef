"""`adafactor bench`: how it times, that every framework's steps run, what it prints, writes and refuses."""

import json
import math
import os
import subprocess
import sys
import time

import needed
import pytest

from adafactor.cli import bench, main
from adafactor.cli.bench import timing
from adafactor.cli.bench.timing import Budget, Candidate, Case, Group, Problem, measure, take_turns

ROW = {"name": "adafactor.torch.Adafactor", "ms": 0.5, "ns_per_parameter": 0.5, "ratio": 1.0, "cpu_ratio": 1.0}
CASE = Case("PyTorch, tiny", [ROW, ROW | {"name": "torch.optim.AdamW", "ms": 1.0, "ratio": 2.0, "cpu_ratio": 1.5}])


def test_ratios_are_medians_of_turns(monkeypatch):
    """Every step takes twice its turn's length in "slow": its median is of another turn than the ratio's."""
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(timing.time, "process_time", lambda: 3 * now[0])  # on three threads
    lengths = iter([1, 1, 5, 1, 3])  # warm-up, warm-up, three turns
    current = [0]

    def fast():
        current[0] += 1
        if current[0] % 2:
            fast.length = next(lengths)
        now[0] += fast.length

    def slow():
        now[0] += 2 * fast.length

    group = Group(lambda: {"fast": Candidate(fast), "slow": Candidate(slow, {"accessed": 4.0})})
    case = measure(Problem("title", {"mix": "tiny"}, 10, [group]), repeats=3)
    first, second = case.rows
    assert [(row["ratio"], row["cpu_ratio"]) for row in case.rows] == [(1.0, 1.0), (2.0, 2.0)]
    figures = {"ms": 3e3, "ns_per_parameter": pytest.approx(3e8), "ratio": 1.0, "cpu_ratio": 1.0, "turns": 3}
    assert first == {"mix": "tiny", "name": "fast"} | figures
    assert (second["turns"], second["accessed"]) == (3, 4.0)


def test_a_second_group_takes_fewer_turns_beside_the_same_baseline():
    candidate = Candidate(lambda: None)
    groups = [
        Group(lambda: {"ours": candidate, "a": candidate}),
        Group(lambda: {"ours": candidate, "b": candidate}, 0.5),
    ]
    rows = measure(Problem("title", {}, 1, groups), repeats=6).rows
    assert [(row["name"], row["turns"]) for row in rows] == [("ours", 6), ("a", 6), ("b", 3)]


def test_the_clock_decides_what_a_turn_took():
    took = iter(range(100))
    assert take_turns({"a": lambda: None}, 2, clock=lambda step: next(took)) == {"a": [2, 3]}


def test_no_turn_begins_after_the_end_but_one_is_always_measured():
    calls = []
    times = take_turns({"a": lambda: calls.append(1)}, repeats=100, end=time.time() - 1)
    assert (len(times["a"]), len(calls)) == (1, 6)


def test_a_budget_is_shared_by_the_cases_that_are_left(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(timing.time, "time", lambda: now[0])
    budget = Budget(deadline=130.0, cases=3)
    assert budget.next() == 110.0
    now[0] = 120.0
    assert budget.next() == 125.0
    now[0] = 131.0
    assert budget.next() is None
    assert Budget(deadline=0.0, cases=3).next() == 131.0  # the first case is measured in any case
    assert Budget(math.inf, 3).next() == math.inf


def test_every_optimizer_of_pytorch_steps():
    torch = pytest.importorskip("torch")
    from adafactor.cli.bench import pytorch

    for dtype in (torch.float32, torch.bfloat16):
        case = measure(pytorch.problem("tiny", [(8, 4), (4,)], dtype), 4)
        expected = [name for name in pytorch.OPTIMIZERS if name != pytorch.ROUNDED or dtype == torch.bfloat16]
        assert [row["name"] for row in case.rows] == expected
        assert all(row["ns_per_parameter"] > 0 for row in case.rows)
        assert (case.rows[0]["turns"], case.rows[-1]["turns"]) == (4, 1)
        assert {"mix", "dtype", "threads", "name", "ratio"} <= set(case.rows[0])
    assert len(pytorch.problems(full=True)) > len(pytorch.problems(full=False)) > 0


def test_every_optimizer_of_optax_steps():
    pytest.importorskip("optax")
    from adafactor.cli.bench import jax

    case = measure(jax.problem("tiny", [(8, 4), (4,)]), 1)
    assert case.rows[0]["name"] == jax.FASTEST
    assert {row["name"] for row in case.rows} == set(jax.STEPS)
    assert {"mix", "name", "ratio", "accessed", "temporary"} <= set(case.rows[0])
    assert len(jax.problems(full=False)) == len(jax.MIXES)


WHOLE = """
import sys
from adafactor.cli.bench import whole
from adafactor.cli.bench.timing import measure
whole.VOCABULARY, whole.WIDTH, whole.LAYERS, whole.HEADS = 32, 8, 1, 2
for suite in sys.argv[1:]:
    trained = {}
    for name, make in whole.STEPS[suite]().items():
        trained[name] = step = make(4)
        losses = [float(step()) for _ in range(30)]
        assert losses[-1] < losses[0], (name, losses)
    whole.STEPS[suite] = lambda: {name: lambda tokens, step=step: step for name, step in trained.items()}
    print(suite, [row["name"] for row in measure(whole.problem(suite, 4), 1).rows])
"""
BACKENDS = {
    backend: [suite for suite, (*_, theirs) in bench.WHOLE.items() if theirs == backend]
    for _, _, backend in bench.WHOLE.values()
}


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_optimizer_trains_by_whole_steps(backend):
    needed.packages(*(module for suite in BACKENDS[backend] for module in bench.WHOLE[suite][1]))
    environment = os.environ | {"KERAS_BACKEND": backend or "jax", "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, "-c", WHOLE, *BACKENDS[backend]]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    ours = {"torch": "adafactor.torch.Adafactor", "jax": "adafactor.optax, update"}
    said = dict(line.split(" ", 1) for line in done.stdout.splitlines()[-len(BACKENDS[backend]) :])
    for suite in BACKENDS[backend]:
        assert ours.get(suite, "adafactor.keras.Adafactor") in said[suite]


def test_whole_steps_are_of_a_model_of_the_size_that_is_said():
    needed.packages("keras")
    code = "from adafactor.cli.bench import whole as w; print(w.keras_model(4).count_params() == w.PARAMETERS)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.strip() == "True"


def test_a_framework_in_a_process_of_its_own(tmp_path):
    needed.packages("keras")
    file = tmp_path / "bench.json"
    arguments = ["bench", "--only", "keras-jax", "--repeats", "1", "--seconds", "1", "--json", str(file)]
    command = [sys.executable, "-m", "adafactor.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ, timeout=300)
    assert "on jax, 4096x4096, float32, 16.8 M parameters" in done.stdout
    assert "1 cases were left out for lack of time" in done.stdout
    (case,) = json.loads(file.read_text())["cases"]
    assert [row["ratio"] for row in case["rows"] if row["name"] == "adafactor.keras.Adafactor"] == [1.0]


def fake(suite, repeats, deadline, extent):
    if suite == "jax":
        raise RuntimeError("ImportError: jaxlib is too old")
    yield CASE
    yield 0


def test_table_json_and_picture_and_a_framework_that_fails(monkeypatch, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(bench, "_measure", fake)
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: name)
    data, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    code = main(["bench", "--only", "jax", "--only", "torch", "--json", str(data), "--plot", str(picture)])
    out = capsys.readouterr().out
    assert code == 1
    assert "jax failed: ImportError: jaxlib is too old" in out
    assert [line.split()[-3:] for line in out.splitlines() if line.startswith("torch.optim")] == [
        ["0.50", "2.00", "1.50"]
    ]
    assert json.loads(data.read_text())["cases"] == [{"suite": "torch", "title": CASE.title, "rows": CASE.rows}]
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_a_worker_that_crashes_is_told_in_one_line(monkeypatch):
    monkeypatch.setitem(bench.SUITES, "torch", ("pytorch", ("torch",), "no-such-backend"))
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="exit code 1"):
        list(bench._measure("torch", 1, 0.0, "quick"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--only", "mxnet"], "--only"),
        (["--repeats", "0"], "--repeats"),
        (["--json", "no/such/folder/b.json"], "a folder that can be written"),
        (["--plot", "b.gif2"], "ends in"),
        (["--only", "jax"], "must be installed"),
    ],
)
def test_refusals_are_one_sentence(monkeypatch, capsys, arguments, words):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: name if name == "matplotlib" else None)
    assert main(["bench", *arguments]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert len(err.strip().splitlines()) == 1
