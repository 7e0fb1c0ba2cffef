"""A pytest plugin for Keras's own tests: puts our class in the place of ``keras.optimizers.Adafactor``.

``pytest -p keras_upstream --outcomes FILE ...`` writes what became of each test, and whether it made our class.
"""

import json
from pathlib import Path

import keras
import pytest
from keras.src import optimizers

from adafactor.keras import Adafactor


@keras.saving.register_keras_serializable(package="upstream")
class AlwaysCapped(Adafactor):
    """Ours, with the cap that Keras's class applies whatever it is told."""

    made = 0

    def __init__(self, learning_rate=0.001, relative_step="always", **kwargs):
        super().__init__(learning_rate, relative_step=relative_step, **kwargs)
        AlwaysCapped.made += 1


outcomes = {}


def pytest_addoption(parser):
    parser.addoption("--outcomes", type=Path, required=True)


def pytest_configure(config):
    config.addinivalue_line("markers", "requires_trainable_backend: Keras's own")
    for module in (optimizers.adafactor, optimizers, keras.optimizers):
        module.Adafactor = AlwaysCapped
    optimizers.ALL_OBJECTS_DICT["adafactor"] = AlwaysCapped


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    before = AlwaysCapped.made
    done = yield
    outcomes[item.nodeid]["ours"] = AlwaysCapped.made > before
    return done


def pytest_runtest_logreport(report):
    outcome = outcomes.setdefault(report.nodeid, {"outcome": "passed", "why": ""})
    if report.outcome != "passed":
        outcome.update(outcome=report.outcome, why=report.longreprtext or str(report.longrepr))


def pytest_sessionfinish(session):
    session.config.getoption("--outcomes").write_text(json.dumps(outcomes, indent=1))
