"""DeepSpeed's ZeRO with its own engine, on gloo. ``make test-zero`` installs it, in an environment of its own."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import ranks

ZERO = str(Path(__file__).with_name("zero.py"))
pytestmark = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="needs deepspeed, which `make test-zero` installs"
)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_stage_arrives_where_one_process_does(stage, world):
    for config in ({}, {"gradient_accumulation_steps": 2, "gradient_clipping": 0.5}):
        for found in ranks.run(ZERO, "train", world, stage=stage, **config):
            assert found["distance"] <= 1e-6, config
            assert found["state"] == ["column", "momentum", "row", "second_moment", "step"]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_master_weights_of_half_precision(stage):
    halves = {"bf16": {"bf16": {"enabled": True}}, "fp16": {"fp16": {"enabled": True, "loss_scale": 1.0}}}
    for name, config in halves.items():
        for found in ranks.run(ZERO, "train", 2, stage=stage, **config):
            assert found["distance"] <= 1e-6, name


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_resumes_from_the_last_whole_checkpoint_when_killed_in_the_next(stage, tmp_path):
    # Rank 0 names a checkpoint the latest without waiting for the others, whatever the optimizer.
    with pytest.raises(AssertionError, match="ended with 9"):
        ranks.run(ZERO, "save", 2, stage=stage, folder=str(tmp_path), kill=True, limit=60)
    assert len(list((tmp_path / "eleven").glob("*optim*"))) < len(list((tmp_path / "ten").glob("*optim*")))
    for found in ranks.run(ZERO, "resume", 2, stage=stage, folder=str(tmp_path)):
        assert found <= 1e-6
