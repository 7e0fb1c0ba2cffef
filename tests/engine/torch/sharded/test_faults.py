"""Ranks that die, ranks that disagree, and tensors that are no shards of anything: a sentence, never a hang."""

from pathlib import Path

import kill
import pytest
import ranks

CASES = str(Path(__file__).with_name("faults.py"))


def test_refusals_come_on_every_rank_and_before_the_first_write():
    for told in ranks.run(CASES, "sentences", 2):
        assert told["shape"].startswith("sharded parameter 1 must be the same on all ranks, got parameter 1 (4, 3) of")
        assert "(4, 3)" in told["shape"]
        assert "rank 1" in told["shape"]
        assert "no such parameter on rank 1" in told["missing"]
        assert told["partial"].startswith("a parameter's placements must be Shard or Replicate, got ")
        assert "torch.chunk" in told["cut"]
        assert "of contiguous parameters" in told["channels last"]
        assert told["FSDP1"].startswith(
            "a parameter must be a tensor with the rows and columns of its layer, got 'a flat"
        )
        assert told["int8"].startswith("momentum_dtype of a flat parameter must be a float dtype, got torch.int8.")
        assert "a parameter in a compiled step must be an unsharded tensor, got 'a shard'. " in told["compiled"]
        assert "Compile the model, and call step outside of what is compiled." in told["compiled"]
        where = told["elsewhere"]
        assert not where or where.startswith("a parameter's device mesh must be a mesh with this rank in it, got ")


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return kill.complete(tmp_path_factory.mktemp("reference") / "checkpoints")


@pytest.mark.parametrize("in_checkpoint", [False, True])
def test_a_killed_rank_ends_the_job_and_the_restart_continues_it(reference, in_checkpoint):
    first = kill.attempt(reference, in_checkpoint, victim=1)
    assert first > 1


def test_the_example_learns_and_resumes_on_other_numbers_of_ranks(tmp_path, reference):
    place = tmp_path / "checkpoints"
    first = kill.complete(place, world=2, steps=3)
    second = kill.complete(place, world=3, steps=6)
    third = kill.complete(place, world=1, steps=9)
    losses = {step: float(loss) for step, loss in {**first, **second, **third}.items()}
    assert losses == pytest.approx({step: float(loss) for step, loss in reference.items()}, rel=1e-5)
    assert losses[9] < 0.85 * losses[1]
