"""What users do to tensors between two steps ends in a right step or in one sentence, with nothing written."""

import math
import os

import pytest
import torch
import triton_support
from edits import check
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_map_only

from adafactor.engine.torch import checks
from adafactor.torch import Adafactor

triton_support.interpret()


def trained(fused, steps=2, dtype=torch.float32, **options):
    """A matrix, a vector and a stack after some steps, with gradients for the next."""
    generator = torch.Generator().manual_seed(0)
    params = [
        torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((12, 8), (9,), (2, 6, 5))
    ]
    optimizer = Adafactor(params, lr=0.01, fused=fused, **options)
    for step in range(steps + 1):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(dtype)
        if step < steps:
            optimizer.step()
    return optimizer, params


class Wrapped(torch.Tensor):
    """A tensor around another one, without memory of its own."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner):
        self.wrapped = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        inner = tree_map_only(Wrapped, lambda t: t.wrapped, (args, kwargs or {}))
        out = func(*inner[0], **inner[1])
        return return_and_correct_aliasing(func, args, kwargs or {}, tree_map_only(torch.Tensor, Wrapped, out))


def spread(tensor):
    """The same numbers, with others between them."""
    wide = torch.full((*tensor.shape, 2), 1e6, dtype=tensor.dtype)
    wide[..., 0] = tensor
    return wide[..., 0]


def each(change, *slots):
    """An edit of the first parameter's state that replaces these slots."""

    def edit(optimizer, params):
        state = optimizer.state[params[0]]
        for slot in slots:
            state[slot] = change(state[slot])

    return edit


def everywhere(change):
    """An edit that replaces every floating statistic of every parameter."""

    def edit(optimizer, params):
        for param in params:
            state = optimizer.state[param]
            for slot, value in state.items():
                if value.is_floating_point():
                    state[slot] = change(value)

    return edit


def slice_in_place(optimizer, params):
    row = optimizer.state[params[0]]["row"]
    row.data = row.data[:5]


def shrunk(of):
    def edit(optimizer, params):
        of(optimizer, params[0]).untyped_storage().resize_(8)

    return edit


def twice_shrunk(of):
    """The allocator may give back the first place."""

    def edit(optimizer, params):
        storage = of(optimizer, params[0]).untyped_storage()
        size = storage.nbytes()
        storage.resize_(size - 4)
        storage.resize_(size - 8)

    return edit


def freed(of):
    def edit(optimizer, params):
        of(optimizer, params[0]).untyped_storage().resize_(0)

    return edit


def view_freed(optimizer, params):
    """A gradient inside a bucket: its place is not 0 when the bucket is freed."""
    bucket = torch.randn(200)
    params[0].grad = bucket[100:196].view(12, 8)
    bucket.untyped_storage().resize_(0)


def grow(optimizer, params):
    params[0].data = torch.cat([params[0].data, torch.randn(50_000, 8)])
    params[0].grad = torch.randn_like(params[0])


def prune(optimizer, params):
    params[0].data = params[0].data[:5]
    params[0].grad = torch.randn_like(params[0])


def replaced(rows):
    """The old state under a parameter of another length."""

    def edit(optimizer, params):
        new = torch.nn.Parameter(torch.randn(rows, 8))
        new.grad = torch.randn_like(new)
        optimizer.param_groups[0]["params"][0] = new
        optimizer.state[new] = optimizer.state.pop(params[0])

    return edit


def cast(dtype):
    def edit(optimizer, params):
        for param in params:
            param.data, param.grad = param.data.to(dtype), param.grad.to(dtype) if param.grad is not None else None

    return edit


def own(**slots):
    def edit(optimizer, params):
        optimizer.state[params[0]].update(slots)

    return edit


def without(*slots):
    def edit(optimizer, params):
        for slot in slots:
            del optimizer.state[params[0]][slot]

    return edit


def instead(value):
    def edit(optimizer, params):
        optimizer.state[params[0]] = value(optimizer, params)

    return edit


def with_grad(change):
    """An edit that gives the first parameter a gradient which it would not take: the parameter changes underneath."""

    def edit(optimizer, params):
        params[0].data = change(params[0].data)

    return edit


def step_of(value):
    def edit(optimizer, params):
        optimizer.state[params[0]]["step"].fill_(value)

    return edit


def transposed_in_place(optimizer, params):
    params[0].data = params[0].data.t().contiguous().t()


def expanded(optimizer, params):
    params[0].data = params[0].data[:1].expand(12, 8)


def expanded_in_same_place(optimizer, params):
    """From one order in memory to another, at the same address and of the same size."""
    params[0].data = params[0].data.t().contiguous().t()
    optimizer.step()
    params[0].data = params[0].data.as_strided((12, 8), (1, 0))


def same_tensor(optimizer, params):
    other = torch.nn.Parameter(torch.randn(12, 8))
    other.grad = torch.randn_like(other)
    optimizer.param_groups[0]["params"].append(other)
    optimizer.state[other] = dict(optimizer.state[params[0]])


def same_dictionary(optimizer, params):
    same_tensor(optimizer, params)
    optimizer.state[optimizer.param_groups[0]["params"][-1]] = optimizer.state[params[0]]


def swapped(optimizer, params):
    state = optimizer.state[params[0]]
    state["row"], state["column"] = state["column"], state["row"]


def on_meta(optimizer, params):
    """The state must not be lost where a parameter has no numbers."""
    new = torch.nn.Parameter(torch.zeros(12, 8, device="meta"))
    new.grad = torch.zeros_like(new)
    optimizer.param_groups[0]["params"][0] = new
    optimizer.state[new] = optimizer.state.pop(params[0])


def overlapping(optimizer, params):
    arena = torch.rand(30)
    optimizer.state[params[0]]["row"] = arena[:12]
    optimizer.state[params[0]]["column"] = arena[10:18]


def part_of_parameter(optimizer, params):
    optimizer.state[params[1]]["second_moment"] = params[2].data.view(-1)[:9]


def negated(of):
    def edit(optimizer, params):
        if of == "grad":
            params[0].grad = torch._neg_view(params[0].grad)
        elif of == "param":
            params[0].data = torch._neg_view(params[0].data)
        else:
            state = optimizer.state[params[0]]
            state[of] = torch._neg_view(-state[of])

    return edit


def row(optimizer, param):
    return optimizer.state[param]["row"]


def grad_of(optimizer, param):
    return param.grad


def itself(optimizer, param):
    return param


RIGHT = {
    "statistics bfloat16": everywhere(torch.Tensor.bfloat16),
    "statistics half": everywhere(torch.Tensor.half),
    "statistics double": everywhere(torch.Tensor.double),
    "statistics strided": everywhere(spread),
    "statistics with gradients": everywhere(lambda t: t.clone().requires_grad_()),
    "row of another shape": each(lambda t: t.view(3, 4), "row"),
    "row wrapped": each(Wrapped, "row"),
    "all wrapped": each(Wrapped, "row", "column"),
    "row negated": negated("row"),
    "gradient negated": negated("grad"),
    "parameter negated": negated("param"),
    "parameter transposed": transposed_in_place,
    "gradient transposed": lambda o, p: setattr(p[0], "grad", p[0].grad.t().contiguous().t()),
    "gradient expanded": lambda o, p: setattr(p[0], "grad", torch.randn(1, 8).expand(12, 8)),
    "gradient strided": lambda o, p: setattr(p[0], "grad", spread(p[0].grad)),
    "step int": each(int, "step"),
    "step float": each(float, "step"),
    "step float tensor": each(torch.Tensor.float, "step"),
    "step of shape (1,)": each(lambda t: t.view(1).clone(), "step"),
    "state deleted": lambda o, p: o.state.pop(p[0]),
    "state empty": instead(lambda o, p: {}),
    "state copied": instead(lambda o, p: dict(o.state[p[0]])),
    "another's key": own(slow=torch.zeros(3), other="text", none=None),
    "row unsqueezed in place": lambda o, p: o.state[p[0]]["row"].unsqueeze_(0),
    "second moment unsqueezed in place": lambda o, p: o.state[p[1]]["second_moment"].unsqueeze_(0),
    "double parameters": cast(torch.float64),
    "half parameters": cast(torch.float16),
    "bfloat16 parameters": cast(torch.bfloat16),
    "double gradients over single": with_grad(torch.Tensor.double),
}
REFUSED = {
    "grow": grow,
    "prune": prune,
    "longer": replaced(20_000),
    "shorter": replaced(5),
    "parameter of another shape than its gradient": with_grad(lambda x: torch.randn(100_000, 8)),
    "shorter than its gradient": with_grad(lambda x: x[:5]),
    "as large as its gradient": with_grad(lambda x: x.view(8, 12)),
    "complex": with_grad(lambda x: x.to(torch.complex64)),
    "parameter and gradient on meta": on_meta,
    "parameter expanded": expanded,
    "parameter expanded in the same place": expanded_in_same_place,
    "row on meta": each(lambda t: t.to("meta"), "row"),
    "step on meta": each(lambda t: t.to("meta"), "step"),
    "row short": each(lambda t: t[:5].clone(), "row"),
    "row long": each(lambda t: t.repeat(2), "row"),
    "row sliced in place": slice_in_place,
    "row resized": lambda o, p: o.state[p[0]]["row"].resize_(5),
    "row grown": lambda o, p: o.state[p[0]]["row"].resize_(500),
    "row set": lambda o, p: o.state[p[0]]["row"].set_(torch.zeros(3)),
    "row set to another storage": lambda o, p: o.state[p[0]]["row"].set_(torch.zeros(7).untyped_storage(), 0, (7,)),
    "row a list": each(torch.Tensor.tolist, "row"),
    "row a number": own(row=3.0),
    "row None": own(row=None),
    "row complex": each(lambda t: t.to(torch.complex64), "row"),
    "row sparse": each(torch.Tensor.to_sparse, "row"),
    "rows and columns swapped": swapped,
    "no row": without("row"),
    "no step": without("step"),
    "only a step": without("row", "column"),
    "step None": own(step=None),
    "step NaN": own(step=math.nan),
    "step NaN tensor": own(step=torch.tensor(math.nan)),
    "step infinite": own(step=math.inf),
    "step negative": own(step=-3),
    "step huge": own(step=10**30),
    "step a text": own(step="3"),
    "step a vector": own(step=torch.tensor([1, 2])),
    "state of another parameter": instead(lambda o, p: dict(o.state[p[1]])),
    "state of another shape": instead(lambda o, p: dict(o.state[p[2]])),
    "state shared": same_tensor,
    "one dictionary for two": same_dictionary,
    "statistics overlap": overlapping,
    "a statistic in a parameter": part_of_parameter,
    "state None": instead(lambda o, p: None),
    "state a list": instead(lambda o, p: [1, 2]),
    "gradient freed": freed(grad_of),
    "gradient shrunk": shrunk(grad_of),
    "gradient in a freed bucket": view_freed,
    "parameter freed": freed(itself),
    "parameter shrunk": shrunk(itself),
    "parameter shrunk twice": twice_shrunk(itself),
    "row freed": freed(row),
    "row shrunk": shrunk(row),
    "row shrunk twice": twice_shrunk(row),
}  # fmt: skip


@pytest.mark.parametrize("value", [-1, -7, 2**63 - 1])
@pytest.mark.parametrize("fused", ["native", "torch"], indirect=True)  # a GPU is not asked for its counts
def test_a_count_that_was_overwritten_is_refused(value, fused):
    optimizer, params = trained(fused)
    step_of(value)(optimizer, params)
    assert check(optimizer) != "right"
    assert check(optimizer) != "right"


@pytest.mark.parametrize("edit", RIGHT.values(), ids=RIGHT)
def test_what_fits_is_used(edit, fused):
    optimizer, params = trained(fused)
    edit(optimizer, params)
    assert check(optimizer) == "right"
    assert check(optimizer) == "right"  # and goes on


@pytest.mark.parametrize("edit", REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused(edit, fused):
    optimizer, params = trained(fused)
    edit(optimizer, params)
    assert check(optimizer) != "right"
    assert check(optimizer) != "right"  # and nothing was remembered as checked


@pytest.mark.parametrize("edit", [*RIGHT.values(), *REFUSED.values()], ids=[*RIGHT, *REFUSED])
@pytest.mark.parametrize("fused", ["native"], indirect=True)
def test_edits_where_pytorch_answers_no_question_about_many_tensors(edit, fused, monkeypatch):
    monkeypatch.setattr(checks, "_alike", lambda tensors: checks._never)
    optimizer, params = trained(fused)
    edit(optimizer, params)
    assert (check(optimizer) == "right") == (edit in RIGHT.values())


def test_what_autograd_or_autocast_is_set_to_is_no_edit(fused):
    optimizer, _ = trained(fused)
    known = list(optimizer._preparation._prepared.values())
    for mode in (torch.autocast("cpu"), torch.inference_mode(), torch.enable_grad()):
        with mode:
            assert check(optimizer) == "right"
    assert list(optimizer._preparation._prepared.values()) == known


@pytest.mark.parametrize("first", [torch.int8, None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("then", [torch.int8, None, torch.bfloat16])
@pytest.mark.parametrize("fused", ["native", "torch"], indirect=True)  # minutes in Triton's interpreter
def test_momentum_is_recoded_when_its_storage_is_edited(first, then, fused):
    optimizer, _ = trained(fused, beta1=0.9, momentum_dtype=first)
    for dtype in (then, first, then):
        optimizer.param_groups[0]["momentum_dtype"] = dtype
        assert check(optimizer) == "right"
        assert check(optimizer) == "right"


@pytest.mark.parametrize(
    "edit",
    [
        without("momentum_scale"),
        own(momentum_scale=torch.zeros(7)),
        own(momentum_scale=3.0),
        each(lambda t: t[:5].clone(), "momentum"),
        own(momentum=3),
        lambda o, p: o.state[p[0]]["momentum"].resize_(3, 3),
        freed(lambda o, p: o.state[p]["momentum"]),
    ],
)
def test_momentum_that_does_not_fit_is_refused(edit, fused):
    optimizer, params = trained(fused, beta1=0.9, momentum_dtype=torch.int8)
    edit(optimizer, params)
    assert check(optimizer) != "right"


@pytest.mark.parametrize("words", [{"beta1": 0.9}, {"factoring": None}, {"min_dim_size_to_factor": 64}, {"d": 2.0}])
def test_groups_that_are_edited(words, fused):
    optimizer, _ = trained(fused)
    optimizer.param_groups[0].update(words)
    refused = "factoring" in words or "min_dim_size_to_factor" in words
    assert (check(optimizer) != "right") == refused


def test_a_group_follows_its_rate_after_another_group_was_edited():
    params = [torch.nn.Parameter(torch.randn(4, 3)) for _ in range(2)]
    optimizer = Adafactor([{"params": [param]} for param in params], lr=0.01)
    for edit in ({}, {"beta1": 0.9}, {}):
        for param in params:
            param.grad = torch.randn(4, 3)
        optimizer.param_groups[1].update(edit)
        assert check(optimizer) == "right"
    optimizer.param_groups[0]["lr"] = 0.3
    assert check(optimizer) == "right"


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    if torch.distributed.is_initialized():
        pytest.skip("this process has a group of its own")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = tmp_path_factory.mktemp("store") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


PARTS = {
    "row short": (lambda v, m: distribute_tensor(torch.rand(5), m, [Shard(0)]), "row"),
    "row a number": (lambda v, m: 3.0, "row"),
    "row freed": (lambda v, m: (v.to_local().untyped_storage().resize_(0), v)[1], "row"),
    "row meta": (lambda v, m: v.to("meta"), "row"),
    "step negative": (lambda v, m: torch.tensor(-3), "step"),
    "step overwritten": (lambda v, m: v.fill_(-3), "step"),
    "row gone": (lambda v, m: None, "row"),
}
FIT = {
    "row double": (lambda v, m: v.double(), "row"),
    "row whole": (lambda v, m: v.full_tensor(), "row"),
    "row replicated": (lambda v, m: distribute_tensor(v.full_tensor(), m, [Replicate()]), "row"),
    "step float": (lambda v, m: torch.as_tensor(v.full_tensor() if isinstance(v, DTensor) else v).float(), "step"),
}


def sharded(mesh, fused, **words):
    generator = torch.Generator().manual_seed(0)
    param = torch.nn.Parameter(distribute_tensor(torch.randn(12, 8, generator=generator), mesh, [Shard(0)]))
    optimizer = Adafactor([param], lr=0.01, fused=fused, **words)
    gradients = [torch.randn(12, 8, generator=generator) for _ in range(3)]
    return param, optimizer, gradients


def stepped(param, optimizer, gradient):
    param.grad = distribute_tensor(gradient, param.device_mesh, param.placements)
    optimizer.step()
    return param.detach().full_tensor().clone()


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize(("change", "slot"), PARTS.values(), ids=PARTS)
def test_parts_that_do_not_fit_are_refused(change, slot, fused, mesh):
    param, optimizer, gradients = sharded(mesh, fused)
    before = stepped(param, optimizer, gradients[0])
    state = optimizer.state[param]
    state[slot] = change(state[slot], mesh)
    with pytest.raises((RuntimeError, TypeError, ValueError), match=r" must be .*, got "):
        stepped(param, optimizer, gradients[1])
    assert torch.equal(param.full_tensor(), before)


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize(("change", "slot"), FIT.values(), ids=FIT)
def test_parts_that_fit_are_used(change, slot, fused, mesh):
    ends = []
    for edited in (False, True):
        param, optimizer, gradients = sharded(mesh, fused)
        stepped(param, optimizer, gradients[0])
        if edited:
            state = optimizer.state[param]
            state[slot] = change(state[slot], mesh)
        stepped(param, optimizer, gradients[1])
        ends.append(stepped(param, optimizer, gradients[2]))
    assert torch.equal(*ends)
