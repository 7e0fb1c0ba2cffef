"""`make demo` from the outside: a process, its exit code, what it prints and what it leaves behind."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from adafactor import layout

DEMO = Path(__file__).parents[2] / "examples" / "demo"
KEYS = ["adamw", "keras-adafactor", "adafactor"]
SOURCE = "def add(a, b):\n    return a + b\n\n\n"
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUNBUFFERED": "1"}


def command(*arguments: object) -> list[str]:
    return [sys.executable, str(DEMO), *map(str, arguments)]


def run(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, encoding="utf-8", timeout=300
    )


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The program, called in this process: for what ends before it trains."""
    monkeypatch.syspath_prepend(DEMO)
    return runpy.run_path(str(DEMO / "__main__.py"))["main"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place to run in, with a small text beside binary files, a hidden one and an empty one."""
    folder = tmp_path_factory.mktemp("demo")
    corpus = folder / "corpus"
    corpus.mkdir()
    for i in range(12):
        (corpus / f"{i:02}.txt").write_text(f"# file {i}\n" + SOURCE * 40)
    (corpus / "picture.bin").write_bytes(b"\x89PNG\0" * 100)
    (corpus / "empty").touch()
    (corpus / ".hidden").write_text("hidden")
    return folder


@pytest.fixture(scope="module")
def finished(folder: Path) -> tuple[subprocess.CompletedProcess[str], Path]:
    done = run("--size=tiny", "--steps=8", "--seed=3", "--text=corpus", "--out=results/deep", cwd=folder)
    assert done.returncode == 0, done.stderr
    return done, folder / "results" / "deep"


@pytest.fixture(scope="module")
def figures(finished: tuple[Any, Path]) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((finished[1] / "demo.json").read_text())
    return data


def test_all_three_ran_to_the_end(figures: dict[str, Any]) -> None:
    assert list(figures["runs"]) == KEYS
    assert not figures["interrupted"]
    for one in figures["runs"].values():
        assert one["steps"] == len(one["losses"]) == len(one["step_seconds"]) == 8
        assert all(map(math.isfinite, [*one["losses"], one["validation_loss"]]))
        assert one["losses"][-1] < one["losses"][0]
        assert one["median_milliseconds_per_step"] > 0


def test_all_three_started_from_the_same_weights_and_batch(figures: dict[str, Any]) -> None:
    first = [one["losses"][0] for one in figures["runs"].values()]
    assert first == [first[0]] * 3
    assert first[0] == pytest.approx(math.log(256), rel=0.1)  # it knows nothing yet


def test_the_two_adafactors_agree(figures: dict[str, Any]) -> None:
    ours, theirs = (figures["runs"][key] for key in ("adafactor", "keras-adafactor"))
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-3)
    assert ours["validation_loss"] == pytest.approx(theirs["validation_loss"], rel=1e-2)


def test_state_bytes_are_what_the_shapes_say(figures: dict[str, Any]) -> None:
    shapes = [tuple(shape) for shape in figures["shapes"].values()]
    sizes = sum(map(math.prod, shapes))
    assert figures["parameters"] == sizes
    matrices = [shape for shape in shapes if len(shape) == 2]
    assert len(matrices) > 4
    assert all(len(shape) < 3 for shape in shapes)
    sums = sum(n + m for n, m in matrices)
    elements = sum(n * m for n, m in matrices)
    runs, iteration = figures["runs"], 4

    assert runs["adafactor"]["state_bytes"] == 4 * sum(layout(shape).state_size for shape in shapes) + iteration
    assert runs["adafactor"]["state_bytes_of_matrices"] == 4 * sums
    assert runs["adafactor"]["state_bytes_of_a_4096x4096_kernel"] == 32_768
    assert runs["keras-adafactor"]["state_bytes_of_matrices"] == 4 * (elements + sums)
    assert runs["keras-adafactor"]["state_bytes_of_a_4096x4096_kernel"] == 4 * 4096**2 + 32_768
    assert runs["adamw"]["state_bytes"] == 8 * sizes + iteration
    assert runs["adamw"]["state_bytes_of_matrices"] == 8 * elements


def test_a_saved_run_resumes_bit_for_bit(figures: dict[str, Any]) -> None:
    assert figures["resume"]["bit_equal"] is True
    assert figures["resume"]["differing"] == []
    assert figures["resume"]["variables"] > 2 * len(figures["shapes"])  # weights and statistics


LOADING = """
import os
os.environ["KERAS_BACKEND"] = "jax"
import adafactor.keras, keras, numpy as np, sys
model = keras.saving.load_model("adafactor.keras")
assert model.optimizer.iterations == 8

from pathlib import Path
sys.path.insert(0, DEMO)
import session, text
data = np.arange(1000, dtype=np.uint8)
batches = [text.training_batch(text.Text("", 1, data, data), 0, 0, 4, 128)]
changed = model.optimizer.variables[1]
changed.assign(changed * 2)
assert changed.path in session.resume(model, Path("adafactor.keras"), batches)["differing"]
"""


def test_a_saved_model_needs_nothing_of_the_demo_and_a_difference_is_found(finished: tuple[Any, Path]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOADING.replace("DEMO", repr(str(DEMO)))],
        cwd=finished[1], env=ENVIRONMENT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_text_is_what_the_folder_holds(figures: dict[str, Any]) -> None:
    documents = [len(f"# file {i}\n" + SOURCE * 40) for i in range(12)]
    assert figures["text"]["files"] == 12
    assert figures["text"]["validation_bytes"] == documents[9]  # the tenth
    assert figures["text"]["training_bytes"] == sum(documents) - documents[9] + 10  # joined by newlines


def test_the_terminal_shows_the_figures_of_the_file(finished: tuple[Any, Path], figures: dict[str, Any]) -> None:
    done, _ = finished
    assert "\r" not in done.stdout  # no terminal: plain lines
    for one in figures["runs"].values():
        assert f"{one['state_bytes']:,}" in done.stdout
        assert f"{one['validation_loss']:.4f}" in done.stdout
    assert "bit for bit" in done.stdout
    assert "Traceback" not in done.stderr


def test_the_folder_holds_pictures_and_models(finished: tuple[Any, Path], figures: dict[str, Any]) -> None:
    _, out = finished
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ["demo.json", "demo.png", *(f"{k}.keras" for k in KEYS)]
    )
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")
    for one in figures["runs"].values():
        assert (out / one["file"]).stat().st_size == one["file_bytes"]


def test_ctrl_c_reports_and_saves_what_was_trained(folder: Path) -> None:
    out = folder / "interrupted"
    process = subprocess.Popen(
        command("--size=tiny", "--steps=20000", "--text=corpus", "--out", out),
        cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8",
    )  # fmt: skip
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("Keras AdamW"):
                break
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert "Interrupted" in stdout
    data = json.loads((out / "demo.json").read_text())
    assert data["interrupted"]
    assert list(data["runs"]) == ["adamw"]
    assert 1 <= data["runs"]["adamw"]["steps"] < 20000
    assert sorted(path.name for path in out.iterdir()) == ["adamw.keras", "demo.json", "demo.png"]


REFUSALS = {
    "missing text": (["--text=nowhere"], "--text must be a file or folder that exists, got 'nowhere'."),
    "empty text": (["--text=corpus/empty"], "--text must hold at least 2,580 bytes of text, got 0 in corpus/empty."),
    "small text": (["--text=corpus/00.txt"], "--text must hold at least 2,580 bytes of text, got 1,369"),
    "binary text": (["--text=corpus/picture.bin"], "--text must hold at least 2,580 bytes of text, got 0"),
    "no steps": (["--steps=0"], "--steps must be an integer >= 1, got '0'."),
    "steps that are no number": (["--steps=many"], "--steps must be an integer >= 1, got 'many'."),
    "negative seed": (["--seed=-1"], "--seed must be an integer from 0 to 4294967295, got '-1'."),
    "unknown size": (["--size=huge"], "argument --size: invalid choice: 'huge'"),
    "unknown backend": (["--backend=mxnet"], "argument --backend: invalid choice: 'mxnet'"),
    "unknown option": (["--stpes=3"], "unrecognized arguments: --stpes=3"),
}


@pytest.mark.parametrize(("arguments", "sentence"), REFUSALS.values(), ids=REFUSALS)
def test_refusals_are_one_sentence_and_create_nothing(
    arguments: list[str],
    sentence: str,
    folder: Path,
    main: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    assert main(["--out=refused", *arguments]) == 2
    stdout, stderr = capsys.readouterr()
    assert stdout == ""
    assert stderr.count("\n") == 1
    assert stderr.startswith(f"demo: {sentence}")
    assert not (folder / "refused").exists()


def test_an_output_folder_that_cannot_be_is_refused(
    folder: Path, main: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    file = folder / "corpus" / "00.txt"
    before = file.read_bytes()
    for out in (file, file / "below"):
        assert main([f"--text={folder / 'corpus'}", f"--out={out}"]) == 2
        stderr = capsys.readouterr().err
        assert stderr.startswith("demo: --out must be a folder that can be written (")
        assert stderr.count("\n") == 1
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("backend", "missing", "remedy"),
    [
        ("jax", "matplotlib", "pip install keras jax matplotlib"),
        ("jax", "jax", "pip install keras jax matplotlib"),
        ("torch", "torch", "pip install keras torch matplotlib"),
        ("tensorflow", "tensorflow", "pip install keras tensorflow-cpu matplotlib"),
    ],
)
def test_a_missing_package_is_named_with_the_command_that_brings_it(
    backend: str, missing: str, remedy: str, folder: Path, main: Any, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else found(name))
    assert main([f"--backend={backend}", f"--out={folder / 'refused'}"]) == 2
    assert capsys.readouterr().err == f"demo: The demo needs {missing}. Install with: {remedy}\n"
    assert not (folder / "refused").exists()


def test_help_needs_no_framework(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", DEMO, "--help"],
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "--steps" in done.stdout
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "numpy" in imported
    assert not {"keras", "jax", "torch", "tensorflow", "matplotlib"} & imported
