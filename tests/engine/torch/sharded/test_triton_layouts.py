"""Every layout through the Triton kernels on real processes, beside one process's native step."""

from pathlib import Path

import pytest
import ranks

CASES = str(Path(__file__).with_name("triton_layouts.py"))


@pytest.mark.parametrize("world", [2, 4])
def test_every_layout_reaches_the_kernels_and_agrees_with_one_process(world):
    ranks.end(world)  # the interpreter is chosen before Triton is imported
    try:
        for result in ranks.run(CASES, "compare", world):
            assert len(result["differences"]) == (18 if world == 4 else 12)
            assert {case: worst for case, worst in result["differences"].items() if not worst <= 1e-6} == {}
            assert result["left alone"]
            assert result["elsewhere"] == []
    finally:
        ranks.end(world)
