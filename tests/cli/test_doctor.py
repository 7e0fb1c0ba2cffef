"""``adafactor doctor`` from the outside: what works is said to work, what does not is said to be broken."""

import os
import subprocess
import sys

from adafactor.cli import doctor


def run(**environment):
    command = [sys.executable, "-m", "adafactor.cli", "doctor"]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False)


def test_everything_that_is_installed_works():
    outcome = run()
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    assert "numpy" in outcome.stdout
    assert sum(": works" in line for line in outcome.stdout.splitlines()) == len(doctor.PROBES)


def test_a_missing_library_is_named_and_not_an_error(tmp_path):
    outcome = run(ADAFACTOR_LIBRARY=str(tmp_path / "libadafactor.so"))
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    assert "native kernels: none. The native kernels are not built" in outcome.stdout


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
