"""Flat parameters, wherever they are cut, against the single process."""

import gc
import weakref
from pathlib import Path

import flat_cases
import pytest
import ranks
import simulated
import torch

from adafactor.engine.torch.choose import Plan
from adafactor.engine.torch.sharded.flat import Span, Spans
from adafactor.engine.torch.sharded.origins import record
from adafactor.torch import Adafactor

FSDP1 = str(Path(__file__).with_name("fsdp1.py"))


def test_random_cuts_agree_with_the_whole_and_send_what_the_formula_says():
    for seed, case in flat_cases.cases(150):
        result = flat_cases.compared(case, seed)
        assert result["worst"] <= (1e-14 if case.dtype.itemsize == 8 else 1e-6), (seed, case)
        assert result["reduced"] == [flat_cases.formula(case) * result["steps"]] * len(case.pieces), (seed, case)


def test_the_gradients_that_are_measured_live_until_they_are_applied(monkeypatch):
    """Kernels hold addresses; a gradient of zeros where there is none has nobody else who holds it."""
    alive, measure, apply = [], Plan.measure, Plan.apply

    def measured(plan, grads):
        alive.append([weakref.ref(grad) for grad in grads])
        return measure(plan, grads)

    def applied(plan, *arguments):
        gc.collect()
        assert all(grad() is not None for grad in alive[-1])
        apply(plan, *arguments)

    monkeypatch.setattr(Plan, "measure", measured)
    monkeypatch.setattr(Plan, "apply", applied)
    param = torch.nn.Parameter(torch.arange(24.0))
    record(param, Spans((Span("w", (24,), ((0, 24),), 0),), None))
    other = torch.nn.Parameter(torch.ones(1))
    record(other, Spans((Span("b", (1,), ((0, 1),), 0),), None))
    optimizer = Adafactor([param, other])
    param.grad = torch.ones(24)
    optimizer.step()
    gc.collect()
    assert len(alive) == 1
    assert [grad() for grad in alive[0]] == [None, None]


@pytest.mark.parametrize("at_first", [True, False])
def test_what_is_added_up_may_change_between_steps(at_first):
    first, later = {"lr": 0.5, "scale_parameter": at_first}, {"scale_parameter": not at_first, "skip_nonfinite": False}
    case = flat_cases.Case([(9, 5), (7,)], [(0, 11), (11, 48), (48, 52)], first, torch.float64, True, later)
    assert flat_cases.compared(case, 0, faults=False)["worst"] <= 1e-14


def _data(tensor, value):
    tensor.data = value


MOVES = {
    "a gradient of another shape": lambda p, state: _data(p.grad, torch.zeros(40)),
    "a gradient of integers": lambda p, state: _data(p.grad, torch.zeros(24, dtype=torch.int32)),
    "a gradient without memory": lambda p, state: p.grad.untyped_storage().resize_(0),
    "a parameter without memory": lambda p, state: p.untyped_storage().resize_(0),
    "a statistic without memory": lambda p, state: state["row"].untyped_storage().resize_(0),
    "a statistic of another shape": lambda p, state: _data(state["row"], torch.zeros(1)),
    "a statistic that was cast": lambda p, state: _data(state["row"], state["row"].double()),
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_what_moves_between_steps_is_seen(move):
    param = torch.nn.Parameter(torch.arange(24.0))
    record(param, Spans((Span("w", (4, 6), ((0, 24),), 0),), None))
    optimizer = Adafactor([param])
    param.grad = torch.ones(24)
    optimizer.step()
    state = optimizer.state[param]
    before = {slot: value.clone() for slot, value in state.items()}
    move(param, state)
    if move is MOVES["a statistic that was cast"]:
        optimizer.step()
        assert state["row"].dtype == torch.float32
        assert int(state["step"]) == 2
        return
    with pytest.raises(RuntimeError, match=r"(must be|is) "):
        optimizer.step()
    assert torch.equal(state["column"], before["column"])
    assert int(state["step"]) == 1


def test_a_compiled_step_refuses_them():
    param = torch.nn.Parameter(torch.arange(24.0))
    record(param, Spans((Span("w", (4, 6), ((0, 24),), 0),), None))
    param.grad = torch.ones(24)
    optimizer = Adafactor([param])
    with pytest.raises(Exception, match="a parameter in a compiled step must be an unsharded tensor, got 'a shard'"):
        torch.compile(optimizer.step, backend="eager")()
    assert torch.equal(param, torch.arange(24.0))


@pytest.mark.parametrize(("other", "told"), [({"d": 2.0}, "clip_threshold=2.0"), ({"factoring": "smallest"}, "rows")])
def test_ranks_that_differ_are_all_told(other, told):
    case = flat_cases.Case([(6, 4, 2)], [(0, 20), (20, 48)], {}, torch.float32, True)
    different = flat_cases.Case(case.shapes, case.pieces, other, torch.float32, True)
    values = [torch.ones(6, 4, 2)]

    def sentence(group):
        with pytest.raises(RuntimeError, match="sharded parameter 0 must be the same on all ranks") as caught:
            flat_cases.flat(different if group.rank() else case, group, values, [values])
        return str(caught.value)

    first, second = simulated.run(2, sentence)
    assert first == second
    assert told in first


@pytest.mark.parametrize("kind", ["stochastic_rounding", "compensated"])
@pytest.mark.parametrize("fused", [None, False])
def test_bfloat16_rounds_as_the_whole_does(kind, fused):
    shapes = [(64, 48), (8, 16, 12), (33,)]
    arguments = {"lr": 1e-2, kind: True, "seed": 7, "fused": fused}
    case = flat_cases.Case(shapes, [(0, 1000), (1000, 1777), (1777, 4641)], arguments, torch.bfloat16, True)
    values = [torch.randn(shape).bfloat16() for shape in shapes]
    grads = [[torch.randn(shape).bfloat16() for shape in shapes] for _ in range(5)]
    held = simulated.run(3, lambda group: flat_cases.flat(case, group, values, grads)["values"])
    expected = flat_cases.whole(case, values, grads)
    different = sum(int((a != b).sum()) for a, b in zip(flat_cases.joined(case, held), expected, strict=True))
    assert different <= 2e-3 * 4641  # sums in another order move an element across its threshold now and then


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("orig", [True, False])
def test_fsdp1_arrives_where_one_process_does(world, orig):
    for strategy in ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD"):
        for result in ranks.run(FSDP1, "train", world, orig=orig, strategy=strategy):
            assert result["distance"] <= 1e-6, strategy
            assert result["state"] == ["column", "row", "second_moment", "step"]


def test_fsdp1_in_mixed_precision_and_hybrid():
    for result in ranks.run(FSDP1, "train", 3, orig=True, half=True):
        assert result["distance"] <= 1e-6
    for orig in (True, False):
        for result in ranks.run(FSDP1, "train", 4, orig=orig, strategy="HYBRID_SHARD"):
            assert result["distance"] <= 1e-6


@pytest.mark.parametrize("orig", [True, False])
def test_fsdp1_resumes_on_another_number_of_ranks(orig, tmp_path):
    path, arguments = str(tmp_path / "saved.pt"), {"lr": 0.1, "beta1": 0.9}
    ranks.run(FSDP1, "save", 2, orig=orig, path=path, steps=10, arguments=arguments)
    folder = str(tmp_path / "distributed")
    ranks.run(FSDP1, "save_distributed", 2, orig=orig, path=folder, arguments=arguments)
    for world in (2, 3):
        for distance in ranks.run(FSDP1, "resume", world, orig=orig, path=path, steps=(10, 20), arguments=arguments):
            assert distance <= 1e-6
        for distance in ranks.run(FSDP1, "resume_distributed", world, orig=orig, path=folder, arguments=arguments):
            assert distance <= 1e-6
