"""FSDP2, tensor parallelism and both on a model of twelve layers: what a step sends, and where training arrives."""

from pathlib import Path

import ranks

CASES = str(Path(__file__).with_name("models.py"))


def test_one_all_reduce_per_step_and_training_as_exact_as_adamws():
    kinds = ["FSDP2", "TP", "HSDP", "FSDP x TP"]
    for found in ranks.run(CASES, "train", 4, limit=150, kinds=kinds, steps=20):
        for kind in kinds:
            sent = found[f"{kind}: sent"]
            assert sent["collectives"] == len(sent["bytes"]) == (2 if kind == "FSDP x TP" else 1)
            assert sent["bytes"] == sent["formula"]
            assert found[f"{kind}: ours"] <= max(found[f"{kind}: adamw"], 1e-6), found
