"""DeepSpeed's ZeRO with its own engine, on gloo. ``make test-zero`` installs it, in an environment of its own."""

from importlib.util import find_spec
from pathlib import Path

import fsdp1
import pytest
import ranks

from adafactor import plan
from adafactor.planning import Adafactor

ZERO = str(Path(__file__).with_name("zero.py"))
pytestmark = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="needs deepspeed, which `make test-zero` installs"
)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_stage_arrives_where_one_process_does(stage, world):
    shapes = {name: tuple(param.shape) for name, param in fsdp1.model().named_parameters()}
    (planned,) = plan(shapes, shards=world, optimizers=[Adafactor(momentum="float32")]).under_zero(stage).usages
    for config in ({}, {"gradient_accumulation_steps": 2, "gradient_clipping": 0.5}):
        everywhere = ranks.run(ZERO, "train", world, stage=stage, **config)
        for result in everywhere:
            assert result["distance"] <= 1e-6, config
            assert result["state"] == ["column", "momentum", "row", "second_moment", "step"]
        most = everywhere[0]["bytes"] if stage == 3 else max(result["bytes"] for result in everywhere)
        assert most == planned.state


def test_sub_groups_offload_and_bf16_optimizer():
    variants = [
        {"stage": 3, "zero_optimization": {"stage": 3, "sub_group_size": 200}},
        {"stage": 2, "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
        {"stage": 3, "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}},
        {"stage": 1, "bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
    ]
    for config in variants:
        for result in ranks.run(ZERO, "train", 2, **config):
            assert result["distance"] <= 1e-6, config


def test_elastic_checkpoints_are_refused():
    config = {"stage": 2, "elastic_checkpoint": True}
    with pytest.raises(AssertionError, match="elastic_checkpoint of DeepSpeed's ZeRO must be false for Adafactor"):
        ranks.run(ZERO, "train", 2, stage=2, zero_optimization=config)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_master_weights_of_half_precision(stage):
    halves = {"bf16": {"bf16": {"enabled": True}}, "fp16": {"fp16": {"enabled": True, "loss_scale": 1.0}}}
    for name, config in halves.items():
        for result in ranks.run(ZERO, "train", 2, stage=stage, **config):
            assert result["distance"] <= 1e-6, name


@pytest.mark.parametrize("stage", [1, 2])
def test_statistics_of_two_ranks_go_on_in_three(stage, tmp_path):
    ranks.run(ZERO, "save_ten", 2, stage=stage, folder=str(tmp_path))
    for distance in ranks.run(ZERO, "resume_elsewhere", 3, stage=stage, folder=str(tmp_path)):
        assert distance <= 1e-6


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_resumes_from_the_last_whole_checkpoint_when_killed_in_the_next(stage, tmp_path):
    # Rank 0 names a checkpoint the latest without waiting for the others, whatever the optimizer.
    with pytest.raises(AssertionError, match="ended with 9"):
        ranks.run(ZERO, "save", 2, stage=stage, folder=str(tmp_path), kill=True, limit=60)
    assert len(list((tmp_path / "eleven").glob("*optim*"))) < len(list((tmp_path / "ten").glob("*optim*")))
    for distance in ranks.run(ZERO, "resume", 2, stage=stage, folder=str(tmp_path)):
        assert distance <= 1e-6
