"""Every layout against the single process, with the same gradients: real processes, 2, 3 and 4 of them."""

from pathlib import Path

import pytest
import ranks
import torch

CASES = str(Path(__file__).with_name("layouts.py"))


@pytest.mark.parametrize("world", [2, 3, 4])
def test_every_layout_agrees_with_one_process(world):
    for found in ranks.run(CASES, "compare", world, limit=120):
        assert len(found) == (45 if world == 4 else 15)
        assert {case: worst for case, worst in found.items() if not worst <= 1e-6} == {}


def test_float64():
    for found in ranks.run(CASES, "compare", 2, steps=10, dtype=torch.float64):
        assert {case: worst for case, worst in found.items() if not worst <= 1e-14} == {}


def test_gradients_that_are_missing_or_not_finite_on_some_ranks():
    for found in ranks.run(CASES, "ragged", 3):
        for fused in (None, False):
            assert found[f"steps {fused}"] == [4, 3, 3, 3]
            assert found[f"skipped {fused}"] == (2, 2)
            assert found[f"distance {fused}"] <= 1e-6


def test_stochastic_rounding_draws_the_same_bits():
    # The sums differ in their last bit, which moves an element across its random threshold now and then.
    for found in ranks.run(CASES, "rounding", 4):
        assert {case: share for case, share in found.items() if not share <= 2e-3} == {}


def test_compensated_bfloat16():
    for found in ranks.run(CASES, "compensated", 2):
        assert {case: worst for case, worst in found.items() if not worst <= 1e-5} == {}
