"""Data parallelism with gradient release, on two ranks: DDP's step, replicas that are the same, a tensor at a time."""

from pathlib import Path

import pytest
import ranks


@pytest.fixture(scope="module")
def results():
    return ranks.run(str(Path(__file__).with_name("replicated.py")), "everything", 2)


def test_the_step_of_ddp_and_the_same_replicas(results):
    for rank in results:
        for case, its in rank["train"].items():
            print(f"{case}: {its}")
            assert its["difference"] < 1e-6, case
            assert its["identical"], case
            assert its["left"] == [], case
            assert its["updates"] == [4], case
    counts = {case: its["state"] for case, its in results[1]["train"].items()}
    assert counts.pop("unused") == counts["DDP"] - 2
    assert set(counts.values()) == {counts["DDP"]}


def test_gradients_are_freed_one_after_the_other(results):
    for rank in results:
        its = rank["train"]["group"]
        assert its["peak"] <= 9000 * 32 * 4 + (1 << 20) < its["all"]  # one tensor, and what is sent with others


def test_what_cannot_be_is_refused(results):
    for rank in results:
        refused = rank["refusals"]
        assert refused["shapes"].startswith("parameter 2 must be the same on all ranks, got of shape (4, 4)")
        assert refused["both"].startswith("process_group must be None beside DistributedDataParallel")
        assert "use_reentrant" in refused["checkpoint"]


def test_ddp_has_no_buckets_meanwhile_and_has_them_again(results):
    for rank in results:
        its = rank["removed"]
        assert its["same"]
        assert [name == "_NoReducer" for name in its["reducers"]] == [False, False, True, True, False, False]
        assert its["join"].startswith("DistributedDataParallel must be left to step_in_backward, got 'a call of ")
