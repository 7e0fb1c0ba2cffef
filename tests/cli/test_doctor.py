"""``adafactor doctor`` from the outside: what works is said to work, what does not is said to be broken."""

import os
import re
import subprocess
import sys

import pytest
from native_support import need

from adafactor.cli import doctor
from adafactor.core import native

NO_TRITON = "print('not looked at')"


@pytest.fixture(autouse=True)
def _no_triton(monkeypatch):
    """In this process; asking for it imports PyTorch."""
    monkeypatch.setattr(doctor, "TRITON", NO_TRITON)


def run(only="", **environment):
    """The command in a process of its own; ``only`` the front ends whose name begins so, and not Triton."""
    code = f"""
import sys
from adafactor.cli import doctor, main
doctor.PROBES = {{name: probe for name, probe in doctor.PROBES.items() if name.startswith({only!r})}}
if {only!r}: doctor.TRITON = {NO_TRITON!r}
sys.exit(main(["doctor"]))
"""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False)


def test_everything_that_is_installed_works():
    outcome = run()
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    assert "numpy" in outcome.stdout
    assert re.search(r"^Triton kernels: (none\. .*\.|for the CUDA tensors of .*)$", outcome.stdout, re.MULTILINE)
    assert sum(": works" in line for line in outcome.stdout.splitlines()) == len(doctor.PROBES)


def test_a_missing_library_is_named_and_not_an_error(tmp_path):
    outcome = run("adafactor.torch", ADAFACTOR_LIBRARY=str(tmp_path / "libadafactor.so"))
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    assert "native kernels: none. The native kernels are not built" in outcome.stdout


def test_why_tensorflow_has_no_native_kernels_is_said():
    need(native.why_not())
    outcome = run("adafactor.keras on tensorflow", ADAFACTOR_TENSORFLOW="ops")
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    assert "  ADAFACTOR_TENSORFLOW=ops" in outcome.stdout.splitlines()
    assert "no native kernels: ADAFACTOR_TENSORFLOW=ops asks for TensorFlow's operations." in outcome.stdout
    outcome = run("adafactor.keras on tensorflow")
    assert "works; on the CPU native kernels in graphs and eagerly" in outcome.stdout


def test_a_front_end_that_fails_is_broken(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "PROBES", {"adafactor.broken": ((), "raise RuntimeError('no luck')")})
    assert doctor.run(None) == 1
    assert "adafactor.broken: BROKEN: RuntimeError: no luck" in capsys.readouterr().out


def test_what_is_not_installed_is_not_broken(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "PROBES", {"adafactor.absent": (("no_such_framework",), "")})
    assert doctor.run(None) == 0
    assert "adafactor.absent: not installed (no_such_framework)" in capsys.readouterr().out


def test_a_wrong_setting_ends_in_one_sentence():
    outcome = run(ADAFACTOR_ISA="avx1024")
    assert outcome.returncode == 2
    rule = "adafactor: ADAFACTOR_ISA must be one of baseline, avx2, avx512, got 'avx1024'. "
    assert outcome.stderr.startswith(rule)
    assert len(outcome.stderr.strip().splitlines()) == 1


def test_a_library_that_cannot_be_loaded_is_broken(tmp_path, monkeypatch, capsys):
    garbage = tmp_path / "libadafactor.so"
    garbage.write_bytes(b"\x7fELF" + bytes(range(256)) * 8)
    outcome = run("adafactor.torch", ADAFACTOR_LIBRARY=str(garbage))
    assert outcome.returncode == 1
    lines = outcome.stdout.splitlines()
    assert f"  ADAFACTOR_LIBRARY={garbage}" in lines
    line = next(line for line in lines if line.startswith("native kernels: "))
    assert line.startswith(f"native kernels: BROKEN: The native kernels at {garbage} cannot be loaded: ")
    # The front ends go on without it, and say so.
    line = next(line for line in lines if line.startswith("adafactor.torch: "))
    assert "works; torch operations, no native kernels on the CPU: The native kernels at" in line


def test_a_library_that_crashes_is_broken(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "PROBES", {})
    monkeypatch.setattr(doctor, "PRELUDE", "import os; os.abort()\n")
    need(doctor.native.why_not())
    assert doctor.run(None) == 1
    assert "BROKEN: loading" in capsys.readouterr().out


def test_a_framework_whose_import_fails_is_broken(tmp_path, monkeypatch, capsys):
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax" / "__init__.py").write_text("raise ImportError('jaxlib is too old')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(doctor, "PROBES", {"adafactor.optax": doctor.PROBES["adafactor.optax"]})
    assert doctor.run(None) == 1
    assert "adafactor.optax: BROKEN: ImportError: jaxlib is too old" in capsys.readouterr().out


def test_a_wrong_update_is_broken(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "PROBES", {"adafactor.wrong": ((), "check(numpy.ones((4, 4)))")})
    assert doctor.run(None) == 1
    assert "adafactor.wrong: BROKEN: AssertionError: an update gave 1.0 in place of 0.99" in capsys.readouterr().out


def test_crashes_and_silence_are_broken(monkeypatch, capsys):
    programs = {"adafactor.crash": ((), "import os; os.abort()"), "adafactor.mute": ((), "import time; time.sleep(60)")}
    monkeypatch.setattr(doctor, "PROBES", programs)
    monkeypatch.setattr(doctor, "SECONDS", 1)
    monkeypatch.setattr(doctor, "_native", lambda: (False, "not looked at"))
    assert doctor.run(None) == 1
    out = capsys.readouterr().out
    assert "adafactor.crash: BROKEN: it was ended by signal 6" in out
    assert "adafactor.mute: BROKEN: no answer in 1 seconds" in out
