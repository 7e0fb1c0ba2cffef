"""DDP, ZeRO, offload, accumulation, clipping, recomputing, Accelerate: each arrives where one process does."""

from pathlib import Path

import pytest
import ranks

CASES = str(Path(__file__).with_name("loops.py"))


def test_every_loop_arrives_where_one_process_does():
    for result in ranks.run(CASES, "every_loop", 2):
        sharded, single = result.pop("clipped")
        assert sharded == pytest.approx(single, rel=1e-5)
        assert sharded > 0.01
        # Averaging the gradients over ranks alone moves the weights by parts in a million.
        assert {kind: worst for kind, worst in result.items() if not worst <= 1e-5} == {}


def test_accelerate_shards_saves_and_resumes(tmp_path):
    for result in ranks.run(CASES, "accelerated", 2, place=str(tmp_path)):
        assert result["fsdp2"]
        assert all(result["sharded"])
        assert result["stepped"]
        assert result["distance"] <= 1e-5
        assert result["same bits"]
        assert result["steps"] == [10]
