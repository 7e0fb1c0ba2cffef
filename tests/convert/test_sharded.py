"""Shards are gathered into a state, and a state becomes shards."""

from pathlib import Path

import pytest
import ranks
import torch


def test_shards_become_the_state_of_one_process_and_back():
    for alone, gathered, taken in ranks.run(str(Path(__file__).with_name("sharded.py")), "moved", 2):
        assert alone.keys() == gathered.keys() == taken.keys()
        for name, (slots, count, rms, values) in alone.items():
            for other in (gathered[name], taken[name]):
                assert other[0] == slots
                assert other[1] == count == 3
                assert other[2] == pytest.approx(rms)
                for slot, value in values.items():
                    torch.testing.assert_close(other[3][slot], value)
