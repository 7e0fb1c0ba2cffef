"""Gradient release on two ranks: the bits of the ordinary sharded step, one all-reduce per FSDP2 module."""

from pathlib import Path

import pytest
import ranks


@pytest.fixture(scope="module")
def results():
    return ranks.run(str(Path(__file__).with_name("released.py")), "everything", 2)


def test_the_same_bits_as_the_ordinary_sharded_step(results):
    for trained in (rank["train"] for rank in results):
        assert {case: what for case, what in trained.items() if "all-reduces" not in case and what} == {}
        for kind in ("FSDP2", "bfloat16", "offload"):
            assert trained[f"{kind}: all-reduces False"] == 1
            assert trained[f"{kind}: all-reduces True"] == 3  # two blocks and the root


def test_the_norm_of_all_shards(results):
    for rank in results:
        print(rank["clipped"])
        for kind, (distance, norms) in rank["clipped"].items():
            assert distance < 1e-6, kind
            assert norms[1] == pytest.approx(norms[0], rel=1e-6), kind
            assert norms[1] > 0.1, kind


def test_parameters_without_gradients_are_not_waited_for(results):
    for rank in results:
        assert rank["unused"] == {"different": [], "left": [], "state": 6}


def test_what_needs_its_gradients_later_is_refused_before_the_first_write(results):
    for refused in (rank["refusals"] for rank in results):
        assert refused["plain"] == "no error"
        assert refused["static"].startswith(
            "DistributedDataParallel must be without ways of its own, got 'static_graph'"
        )
        assert refused["part"].startswith("a parameter of the optimizer must be in DistributedDataParallel, got")
        assert refused["later"].startswith("model must be wrapped in DistributedDataParallel before step_in_backward")
        for original in (False, True):
            assert refused[f"FSDP1 {original}"].startswith("model must be without FSDP1 for Adafactor")
