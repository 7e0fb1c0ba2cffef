"""What PyTorch users expect of every optimizer."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch_support import model, parameter, step

from adafactor.torch import Adafactor


def test_groups_have_their_own_hyperparameters():
    a, b, c = parameter(4, 3), parameter(4, 3), parameter(4, 3)
    with torch.no_grad():
        b.copy_(a)
        c.copy_(a)
    together = Adafactor([{"params": [a], "beta1": 0.9, "d": 0.5}, {"params": [b], "factoring": "smallest"}], lr=0.1)
    together.add_param_group({"params": [c], "lr": 0.0, "weight_decay": 0.5})
    alone = parameter(4, 3)
    with torch.no_grad():
        alone.copy_(a)
    by_itself = Adafactor([alone], lr=0.1, beta1=0.9, d=0.5)
    start = c.detach().clone()
    gradient = torch.randn(4, 3)
    for param in (a, b, c, alone):
        param.grad = gradient.clone()
    together.step()
    by_itself.step()
    assert torch.equal(a, alone)
    assert not torch.equal(a, b)
    assert torch.equal(c, start)
    assert "momentum" in together.state[a]
    assert "momentum" not in together.state[b]


def test_a_group_is_checked_when_it_is_added_and_when_it_has_changed():
    optimizer = Adafactor([parameter(3, 2)])
    with pytest.raises(ValueError, match=r"^beta2_decay must be <= 0"):
        optimizer.add_param_group({"params": [parameter(2)], "beta2_decay": 0.8})
    assert len(optimizer.param_groups) == 1
    optimizer.param_groups[0]["d"] = 0
    with pytest.raises(ValueError, match=r"^d must be > 0 and finite, got 0\. Pass None"):
        step(optimizer)
    optimizer.param_groups[0]["d"] = 1.0
    optimizer.param_groups[0]["lr"] = float("nan")
    with pytest.raises(ValueError, match=r"^lr must be a number >= 0 and finite, got nan"):
        step(optimizer)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"lr": -1.0}, ValueError, "lr must be a number >= 0 and finite, got -1.0."),
        ({"lr": None}, ValueError, "lr must be a number >= 0 and finite, got None. 1e-2 is the default."),
        ({"lr": torch.ones(2)}, ValueError, "lr must be a number or a tensor of one element, got (2,)."),
        ({"eps": 1e-30}, ValueError, "eps must be a pair"),
        ({"eps": (-1, 1e-3)}, ValueError, "eps[0] must be >= 0 and finite, got -1."),
        ({"eps": (None, None)}, TypeError, "eps[1] must be a number, got None."),
        ({"weight_decay": -0.1}, ValueError, "weight_decay must be >= 0 and finite, got -0.1. Pass 0 for none."),
        ({"beta1": 1.0}, ValueError, "beta1 must be >= 0 and < 1, got 1.0. Pass None to keep no momentum."),
        ({"beta2_max": 2}, ValueError, "beta2_max must be >= 0 and <= 1, got 2."),
        ({"relative_step": "never"}, ValueError, "relative_step must be True, False or \"always\", got 'never'."),
        ({"momentum_dtype": torch.int16}, ValueError, "momentum_dtype must be torch.float32, torch.bfloat16, "),
        ({"maximize": 1}, TypeError, "maximize must be True or False, got 1."),
        ({"seed": -1}, ValueError, "seed must be an integer >= 0 and < 2**64, got -1."),
        ({"factoring": "all"}, ValueError, 'factoring must be "last_two", '),
        ({"min_dim_size_to_factor": 0}, ValueError, "min_dim_size_to_factor must be >= 1, got 0."),
    ],
)
def test_refusals_in_the_users_words(arguments, error, text):
    with pytest.raises(error) as caught:
        Adafactor([parameter(2, 2)], **arguments)
    assert str(caught.value).startswith(text)


def test_nothing_is_modified_when_a_step_is_refused():
    good, bad = parameter(3, 2), torch.nn.Parameter(torch.randn(3, 2, dtype=torch.complex64))
    embedding = torch.nn.Embedding(4, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    bad.grad, good.grad = torch.ones_like(bad), torch.ones_like(good)
    for refused, text in ((bad, "torch.view_as_real"), (embedding.weight, "sparse=False")):
        optimizer = Adafactor([{"params": [good]}, {"params": [refused]}])
        start = good.detach().clone()
        with pytest.raises(RuntimeError, match=text):
            optimizer.step()
        assert torch.equal(good, start)
        assert not optimizer.state
    expanded = torch.nn.Parameter(torch.zeros(3, 1).expand(3, 2), requires_grad=True)
    expanded.grad = torch.ones(3, 2)
    with pytest.raises(RuntimeError, match="share one place in memory"):
        Adafactor([expanded]).step()


def test_parameters_of_every_kind_in_one_group():
    shared = parameter(3, 3)
    kinds = {
        "float32": parameter(4, 3),
        "float64": parameter(4, 3, dtype=torch.float64),
        "bfloat16": parameter(4, 3, dtype=torch.bfloat16),
        "float16": parameter(4, 3, dtype=torch.float16),
        "empty": torch.nn.Parameter(torch.empty(0, 3)),
        "scalar": torch.nn.Parameter(torch.tensor(2.0)),
        "frozen": torch.nn.Parameter(torch.randn(2, 2), requires_grad=False),
        "integer": torch.nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False),
        "transposed": torch.nn.Parameter(torch.randn(3, 4).t()),
        "shared": shared,
    }
    start = {name: param.detach().clone() for name, param in kinds.items()}
    optimizer = Adafactor(kinds.values(), lr=0.1)
    assert optimizer.step() is None  # no gradients at all
    assert not optimizer.state
    (shared.sum() + (2 * shared).sum()).backward()
    assert torch.equal(shared.grad, torch.full((3, 3), 3.0))
    step(optimizer)
    still = {name for name, param in kinds.items() if torch.equal(param, start[name])}
    assert still == {"empty", "frozen", "integer"}
    assert {optimizer.state[kinds[name]]["step"].item() for name in kinds.keys() - still} == {1}
    assert optimizer.skipped == 0


def test_parameters_without_gradient_keep_their_own_count():
    a, b = parameter(3, 2), parameter(3, 2)
    optimizer = Adafactor([a, b])
    for t in range(4):
        a.grad = torch.randn(3, 2)
        b.grad = torch.randn(3, 2) if t == 3 else None
        optimizer.step()
    assert (int(optimizer.state[a]["step"]), int(optimizer.state[b]["step"])) == (4, 1)


def test_a_parameter_listed_twice_is_updated_once():
    a, b = parameter(3, 2), parameter(3, 2)
    with torch.no_grad():
        b.copy_(a)
    with pytest.warns(UserWarning, match="duplicate"):
        twice = Adafactor([a, a])
    step(twice)
    b.grad = a.grad
    Adafactor([b]).step()
    assert torch.equal(a, b)


def test_closure_runs_once_with_gradients_enabled():
    net = model()
    optimizer = Adafactor(net.parameters())
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = net(torch.ones(3, 4)).square().mean()
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert calls == [True]
    assert closure() < loss


def test_step_hooks():
    seen = []
    optimizer = Adafactor([parameter(3, 2)])
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda o, *_: seen.append(len(o.state)))
    step(optimizer)
    assert seen == ["before", 1]


@pytest.mark.parametrize("compiled", [False, True])
def test_zero_grad_frees_the_gradient(compiled):
    param = parameter(3, 2)
    optimizer = Adafactor([param])
    param.grad = torch.randn(3, 2)
    torch.compile(lambda: optimizer.step(), backend="eager")() if compiled else optimizer.step()
    gradient = weakref.ref(param.grad)
    optimizer.zero_grad(set_to_none=False)
    assert param.grad is not None
    assert not param.grad.any()
    optimizer.zero_grad()
    gc.collect()
    assert param.grad is None
    assert gradient() is None


def test_the_version_counter_moves():
    param = parameter(3, 2)
    optimizer = Adafactor([param])
    loss = (param * param).sum()  # keeps param for the backward pass
    version = param._version
    step(optimizer)
    assert param._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_momentum_storage(dtype):
    a, b = parameter(16, 8), parameter(16, 8)
    with torch.no_grad():
        b.copy_(a)
    stored, exact = Adafactor([a], beta1=0.9, momentum_dtype=dtype), Adafactor([b], beta1=0.9)
    for t in range(10):
        step(stored, t)
        step(exact, t)
    assert stored.state[a]["momentum"].dtype == dtype
    torch.testing.assert_close(a, b, rtol=0, atol=0 if dtype == torch.float32 else 2e-4)


def test_momentum_may_begin_later():
    param = parameter(4, 3)
    optimizer = Adafactor([param])
    step(optimizer)
    optimizer.param_groups[0]["beta1"] = 0.9
    step(optimizer)
    assert optimizer.state[param]["momentum"].shape == (4, 3)


def test_deepcopy_and_pickle():
    net = model()
    optimizer = Adafactor(net.parameters(), beta1=0.9)
    net(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    for twin_net, twin in (copy.deepcopy((net, optimizer)), pickle.loads(pickle.dumps((net, optimizer)))):
        net_, optimizer_ = copy.deepcopy((net, optimizer))
        for one, o in ((net_, optimizer_), (twin_net, twin)):
            o.zero_grad()
            one(torch.ones(2, 4)).square().sum().backward()
            o.step()
        assert all(torch.equal(a, b) for a, b in zip(net_.parameters(), twin_net.parameters(), strict=True))
        assert twin.skipped == 0
        assert repr(twin) == repr(optimizer)


def test_a_callable_rule_is_asked_by_name():
    net = model()
    seen = []
    optimizer = Adafactor(net.named_parameters(), factoring=lambda name, shape: seen.append((name, shape)))
    step(optimizer)
    assert seen == [("0.weight", (8, 4)), ("0.bias", (8,)), ("2.weight", (2, 8)), ("2.bias", (2,))]
    assert set(optimizer.state[net[0].weight]) == {"step", "second_moment"}


def test_fused_true_where_there_is_no_such_kernel():
    meta = torch.nn.Parameter(torch.empty(2, 2, device="meta"))
    meta.grad = torch.empty(2, 2, device="meta")
    with pytest.raises(RuntimeError, match=r"^fused for meta tensors must be None or False"):
        Adafactor([meta], fused=True).step()


def test_no_step_reads_from_the_device():
    """On the meta device there is nothing to read, and every attempt raises."""
    params = [torch.nn.Parameter(torch.empty(s, device="meta")) for s in [(3, 4), (5,), (2, 3, 4), ()]]
    for p in params:
        p.grad = torch.empty_like(p)
    optimizer = Adafactor(params, beta1=0.9, weight_decay=0.1, stochastic_rounding=True)
    optimizer.step()
    optimizer.step()
    half = torch.nn.Parameter(torch.empty(3, 4, device="meta", dtype=torch.bfloat16))
    half.grad = torch.empty_like(half)
    Adafactor([half], stochastic_rounding=True, lr=torch.empty((), device="meta")).step()


def test_compiled_without_graph_breaks():
    def params():
        generator = torch.Generator().manual_seed(1)
        shapes = [(6, 4), (7,), (), (2, 3, 4)]
        return [torch.nn.Parameter(torch.randn(s, generator=generator).bfloat16()) for s in shapes]

    options = {"beta1": 0.9, "stochastic_rounding": True, "weight_decay": 0.1, "seed": 0}
    eager, compiled = params(), params()
    a, b = Adafactor(eager, **options), Adafactor(compiled, **options)
    step_b = torch.compile(lambda: b.step(), fullgraph=True, backend="aot_eager")
    for t in range(3):
        generator = torch.Generator().manual_seed(t)
        for p, q in zip(eager, compiled, strict=True):
            p.grad = torch.randn(p.shape, generator=generator).bfloat16()
            q.grad = p.grad.clone()
        a.step()
        step_b()
    assert all(torch.equal(p, q) for p, q in zip(eager, compiled, strict=True))
    assert int(b.state[compiled[0]]["step"]) == 3


def test_compiled_with_a_scheduler():
    """It moves a learning rate that is a tensor without compiling again, and one that is a number correctly."""
    from torch._dynamo.utils import counters

    for lr, graphs in ((torch.tensor(1e-2), 1), (1e-2, 2)):
        torch._dynamo.reset()
        counters.clear()
        a, b = parameter(5, 4), parameter(5, 4)
        with torch.no_grad():
            b.copy_(a)
        b.grad = a.grad = torch.randn(5, 4)
        eager, compiled = (Adafactor([p], lr=copy.deepcopy(lr), relative_step=False) for p in (a, b))
        schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (eager, compiled)]
        compiled_step = torch.compile(lambda optimizer=compiled: optimizer.step(), backend="aot_eager")
        for _ in range(4):
            eager.step()
            compiled_step()
            for scheduler in schedulers:
                scheduler.step()
        assert torch.equal(a, b)
        assert counters["stats"]["unique_graphs"] <= graphs


def test_flat_partitions_of_zero_are_refused(monkeypatch):
    import sys

    given = parameter(3, 3)
    optimizer = Adafactor([given])
    flat = parameter(9)
    flat.grad = torch.ones(9)
    optimizer.param_groups[0]["params"] = [flat]
    optimizer.step()  # no DeepSpeed here: somebody knows what they do
    monkeypatch.setitem(sys.modules, "deepspeed", sys)
    optimizer.step()  # nor does it matter that it was imported
    given._hp_mapping = None  # as ZeRO ties a parameter to its partition
    optimizer.param_groups[0]["params"] = [other := parameter(9)]
    other.grad = torch.ones(9)
    with pytest.raises(RuntimeError, match="a flat partition of DeepSpeed ZeRO with shape"):
        optimizer.step()


def test_optimizers_of_equal_layers_do_not_round_alike():
    """One optimizer per parameter, as in optimizer-in-backward loops: the same bits would add up over layers."""
    params = [torch.nn.Parameter(torch.full((64, 64), 0.02).bfloat16()) for _ in range(3)]
    options = {"lr": 3e-5, "relative_step": False, "scale_parameter": False, "stochastic_rounding": True}
    for p in params:
        p.grad = torch.ones_like(p)
        Adafactor([p], **options).step()
    alike = [(params[0] == other).float().mean().item() for other in params[1:]]
    assert max(alike) < 0.8, alike
    assert Adafactor(params).param_groups[0]["seed"] is None


def test_seeds_follow_torch_manual_seed_and_in_a_process_group_the_order_of_construction(monkeypatch):
    def seeds():
        params = [torch.nn.Parameter(torch.ones(3).bfloat16()) for _ in range(3)]
        return [Adafactor([p], stochastic_rounding=True).param_groups[0]["seed"] for p in params]

    torch.manual_seed(0)
    first = seeds()
    assert len(set(first)) == 3
    assert seeds() != first
    torch.manual_seed(0)
    assert seeds() == first
    with torch.device("meta"):
        assert isinstance(seeds()[0], int)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    numbered = seeds()  # whatever the generators of other ranks
    assert numbered == list(range(numbered[0], numbered[0] + 3))
