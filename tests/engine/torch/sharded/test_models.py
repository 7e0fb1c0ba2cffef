"""FSDP2, tensor parallelism and both on a small model: what a step sends, and where training arrives."""

import importlib.util
from pathlib import Path

import models
import ranks

CASES = str(Path(__file__).with_name("models.py"))


def cost_model():
    path = Path(__file__).parents[4] / "benchmarks" / "sharding_cost.py"
    spec = importlib.util.spec_from_file_location("sharding_cost", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def computed(cost, kind):
    """The cost model's bytes for the model that the ranks train."""

    def tensor_parallel(name):
        if "blocks" not in name or "norm" in name:
            return cost.WHOLE
        if "up" in name:
            return cost.COLWISE
        return cost.ROWWISE if "weight" in name else cost.REPEATED

    shapes = [(tuple(p.shape), tensor_parallel(name)) for name, p in models.Model().named_parameters()]
    shards, tensor = {"FSDP2": (4, 1), "HSDP": (2, 1), "FSDP x TP": (2, 2)}[kind]
    return cost.ours(shapes, shards, tensor)


def test_fifty_steps_end_as_near_to_one_process_as_adamws():
    kinds = [kind for kind in models.KINDS if kind != "DDP"]
    for result in ranks.run(CASES, "train", 4, kinds=kinds):
        for kind in kinds:
            for ours, adamw in zip(result[f"{kind}: ours"], result[f"{kind}: adamw"], strict=True):
                assert ours <= max(adamw, 1e-6), result


def test_one_all_reduce_per_step():
    cost = cost_model()
    kinds = ["FSDP2", "TP", "HSDP", "FSDP x TP"]
    for result in ranks.run(CASES, "collectives", 4, kinds=kinds):
        # Experts keep their statistics to themselves: two flags for each of three tensors.
        assert result["experts"] == {"bytes": [3 * 2 * 4], "row": (2, 5), "column": (2, 7)}
        for kind in kinds:
            sent = result[kind]
            assert sent["collectives"] == len(sent["bytes"]) == (2 if kind == "FSDP x TP" else 1)
            assert sent["bytes"] == sent["formula"]
            if kind != "TP":
                expected = computed(cost, kind)
                assert (len(sent["bytes"]), sum(sent["bytes"])) == (expected.rounds, expected.sent)
