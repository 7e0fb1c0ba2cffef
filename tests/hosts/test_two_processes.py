"""Trainer, Accelerate and Lightning on two processes: release beside their DistributedDataParallel."""

from pathlib import Path

import ranks


def test_the_hosts_own_ddp():
    found = ranks.run(str(Path(__file__).with_name("two_processes.py")), "everything", 2)
    print(found)
    assert found[0] == found[1]
    assert len(found[0]) == 6
    for case, (difference, identical) in found[0].items():
        assert difference < 1e-6, case
        assert identical, case
