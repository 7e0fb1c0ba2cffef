"""Every layout against the single process, with the same gradients: real processes, 2, 3 and 4 of them."""

from pathlib import Path

import pytest
import ranks
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from adafactor.core import native
from adafactor.engine.torch.sharded import reducer

CASES = str(Path(__file__).with_name("layouts.py"))


@pytest.mark.parametrize(("world", "steps"), [(2, 50), (3, 12), (4, 12)])
def test_every_layout_agrees_with_one_process(world, steps):
    for result in ranks.run(CASES, "compare", world, steps=steps):
        assert len(result) == (45 if world == 4 else 15)
        assert {case: worst for case, worst in result.items() if not worst <= 1e-6} == {}


def test_float64():
    for result in ranks.run(CASES, "compare", 2, steps=10, dtype=torch.float64):
        assert {case: worst for case, worst in result.items() if not worst <= 1e-14} == {}


def test_gradients_that_are_missing_or_not_finite_on_some_ranks():
    for result in ranks.run(CASES, "ragged", 3):
        assert len(result) == 6
        for case, got in result.items():
            assert got["steps"] == [4, 3, 3, 3], case
            assert got["skipped"] == (2, 2), case
            assert got["distance"] <= 1e-6, case


def test_what_overflows_on_some_ranks_is_left_alone_on_all():
    assert ranks.run(CASES, "overflowing", 4) == [(1, 1)] * 4


def test_what_is_added_up_may_change_between_steps():
    assert max(ranks.run(CASES, "changed", 2)) <= 1e-6


def test_a_shard_of_one_element_without_a_gradient_is_left_alone():
    assert ranks.run(CASES, "left_alone", 2) == [True, True]
    for fused in (None, False):
        assert ranks.run(CASES, "left_alone_later", 2, fused=fused) == [True, True]


def test_deleted_state_starts_afresh():
    assert ranks.run(CASES, "afresh", 2) == [[1, 1, 2, 2, 1, 3, 1, 1]] * 2


def test_several_groups_and_dtypes_in_one_model_and_the_kernel_of_every_layout():
    limits = {"float32": 1e-6, "float64": 1e-14, "bfloat16": 1e-3, "float16": 1e-4}  # of halves a rounding or two
    for result in ranks.run(CASES, "groups_and_kernels", 4):
        assert len(result["groups"]) == 20
        assert {case: d for case, d in result["groups"].items() if not d <= limits[case.rpartition(".")[2]]} == {}
        if native.available():
            assert [case for case, is_native in result["kernels"].items() if not is_native] == []


@pytest.mark.parametrize("world", [2, 4])
def test_stochastic_rounding_draws_the_same_bits(world):
    # The sums differ in their last bit, which moves an element across its random threshold now and then.
    for result in ranks.run(CASES, "rounding", world):
        assert {case: share for case, share in result.items() if not share <= 2e-3} == {}


def test_compensated_bfloat16():
    for result in ranks.run(CASES, "compensated", 2):
        assert {case: worst for case, worst in result.items() if not worst <= 1e-5} == {}


def test_groups_end_with_the_world_that_they_were_made_in():
    """A process may leave its world and enter another; here each has eight ranks, of which only one is there."""
    made = []
    for _ in range(2):
        torch.distributed.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
        mesh = init_device_mesh("cpu", (2, 2, 2))
        made += [reducer.group_of(mesh, (0, 1)) for _ in range(2)]
        torch.distributed.destroy_process_group()
    assert made[0] is made[1]
    assert made[2] is made[3]
    assert made[0] is not made[2]
