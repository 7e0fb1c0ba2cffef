"""Gradient release on two ranks: the bits of the ordinary sharded step, one all-reduce per FSDP2 module."""

from pathlib import Path

import ranks

CASES = str(Path(__file__).with_name("released.py"))


def test_the_same_bits_as_the_ordinary_sharded_step():
    for found in ranks.run(CASES, "train", 2, limit=120):
        assert {case: what for case, what in found.items() if "all-reduces" not in case and what} == {}
        for kind in ("FSDP2", "bfloat16", "offload"):
            assert found[f"{kind}: all-reduces False"] == 1
            assert found[f"{kind}: all-reduces True"] == 3  # two blocks and the root


def test_parameters_without_gradients_are_not_waited_for():
    for found in ranks.run(CASES, "unused", 2):
        assert found == {"different": [], "left": [], "state": 6}


def test_what_needs_its_gradients_later_is_refused_before_the_first_write():
    for found in ranks.run(CASES, "refusals", 2):
        assert found.pop("plain") == "no error"
        for case in ("given", "inside", "later"):
            assert found[case].startswith("model must be without DistributedDataParallel for step_in_backward, got")
        for original in (False, True):
            assert found[f"FSDP1 {original}"].startswith("model must be without FSDP1 for Adafactor")
