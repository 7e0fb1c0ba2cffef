"""torch.distributed.checkpoint saves on some ranks and loads on others; the run goes on as if nothing had happened."""

from pathlib import Path

import checkpoints
import pytest
import ranks
import torch

CASES = str(Path(__file__).with_name("checkpoints.py"))


def run(world, first, last, load=None, save=None, kind="FSDP2", half=False):
    if world == 1:  # plain tensors, and no process group at all
        return checkpoints.steps(0, 1, kind, first, last, load, save, half)
    return ranks.run(CASES, "steps", world, kind=kind, first=first, last=last, load=load, save=save, half=half)[0]


def distances(ours, theirs):
    weights = {name: float((ours["model"][name] - x).norm() / x.norm()) for name, x in theirs["model"].items()}
    for name, values in theirs["optimizer"]["state"].items():
        for slot, value in values.items():
            other = ours["optimizer"]["state"][name][slot]
            assert other.shape == value.shape
            weights[f"{name}.{slot}"] = float((other.double() - value.double()).norm() / value.double().norm())
    return weights


def test_reshard_from_4_to_2_to_1(tmp_path):
    single = run(1, 1, 15)
    run(4, 1, 5, save=str(tmp_path / "4"))
    run(2, 6, 10, load=str(tmp_path / "4"), save=str(tmp_path / "2"))
    resharded = run(1, 11, 15, load=str(tmp_path / "2"))
    assert {name: d for name, d in distances(resharded, single).items() if not d <= 1e-6} == {}


@pytest.mark.parametrize("kind", ["FSDP x TP", "HSDP"])
def test_from_two_dimensions_to_one(tmp_path, kind):
    single = run(1, 1, 6)
    run(4, 1, 3, save=str(tmp_path / "4"), kind=kind)
    resharded = run(2, 4, 6, load=str(tmp_path / "4"))
    assert {name: d for name, d in distances(resharded, single).items() if not d <= 1e-6} == {}


def test_residuals_of_compensated_bfloat16(tmp_path):
    saved = run(2, 1, 3, save=str(tmp_path / "2"), half=True)
    loaded = run(1, 4, 3, load=str(tmp_path / "2"), half=True)  # no further step
    states = saved["optimizer"]["state"]
    assert all(values["residual"].dtype == torch.bfloat16 for values in states.values())
    assert any(values["residual"].any() for values in states.values())
    for name, values in states.items():
        assert torch.equal(saved["model"][name], loaded["model"][name])
        for slot, value in values.items():
            assert torch.equal(value, loaded["optimizer"]["state"][name][slot]), (name, slot)
