"""Gradient release: the steps of the backward pass are those of optimizer.step(), and what cannot be is refused."""

import copy
import gc
import pickle
import warnings
import weakref

import pytest
import torch
from tied import Tied, assert_same, groups, loss_of
from torch import nn
from torch.utils.checkpoint import checkpoint

from adafactor.torch import Adafactor, step_in_backward

KERNELS = pytest.mark.parametrize("fused", [None, False], ids=["native", "aten"])


def train(model, optimizer, steps, released=None, schedule=None):
    for t in steps:
        loss_of(model, t).backward()
        if released is None:
            optimizer.step()
            optimizer.zero_grad()
        assert all(p.grad is None for p in model.parameters())
        if schedule is not None:
            schedule.step()


@KERNELS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["nearest", "stochastic_rounding", "compensated"])
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_the_same_bits_as_the_ordinary_step(fused, dtype, mode, reentrant):
    """Groups, tied weights, a scheduler, checkpointing, two scalars per group that differ: 6 steps."""
    runs = []
    for release in (False, True):
        model = Tied(reentrant).to(dtype)
        optimizer = Adafactor(
            groups(model), lr=1e-2, fused=fused, seed=0, **({} if mode == "nearest" else {mode: True})
        )
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # the scheduler's, that step was never called
            released = step_in_backward(model, optimizer) if release else None
            train(model, optimizer, range(6), released, schedule)
        runs += [optimizer, model]
    assert_same(*runs)
    assert int(runs[0].state[runs[1].words.weight]["step"]) == 6


def test_a_resumed_run_goes_on_with_the_same_bits(tmp_path):
    whole = Tied().bfloat16()
    optimizer = Adafactor(groups(whole), stochastic_rounding=True, seed=0)
    train(whole, optimizer, range(6))

    model = Tied().bfloat16()
    first = Adafactor(groups(model), stochastic_rounding=True, seed=0)
    released = step_in_backward(model, first)
    train(model, first, range(3), released)
    torch.save({"model": model.state_dict(), "optimizer": first.state_dict()}, tmp_path / "checkpoint.pt")

    saved = torch.load(tmp_path / "checkpoint.pt")
    again = Tied().bfloat16()
    again.load_state_dict(saved["model"])
    second = Adafactor(groups(again))
    with step_in_backward(again, second) as released:
        second.load_state_dict(saved["optimizer"])  # hooks stay
        train(again, second, range(3, 5), released)
    train(again, second, range(5, 6))  # and without them it is an ordinary optimizer
    assert_same(optimizer, whole, second, again)


def test_copies_and_pickles_are_ordinary_optimizers():
    model = Tied()
    optimizer = Adafactor(model.parameters())
    step_in_backward(model, optimizer)
    loss_of(model, 0).backward()
    model_b, optimizer_b = pickle.loads(pickle.dumps((model, optimizer)))
    model_c, optimizer_c = copy.deepcopy((model, optimizer))
    loss_of(model, 1).backward()
    for other, its in ((model_b, optimizer_b), (model_c, optimizer_c)):
        loss_of(other, 1).backward()
        assert other.head.weight.grad is not None
        its.step()
        assert_same(optimizer, model, its, other)


def test_gradients_are_gone_before_the_next_ones_come():
    """What the whole is for: at no time are there gradients of more than one of ten layers."""
    model = nn.Sequential(*[nn.Linear(8, 8, bias=False) for _ in range(10)])
    optimizer = Adafactor(model.parameters())
    step_in_backward(model, optimizer)
    alive = []
    for layer in model:
        layer.register_full_backward_hook(lambda *_: alive.append(sum(p.grad is not None for p in model.parameters())))
    model(torch.randn(2, 8, requires_grad=True)).sum().backward()
    assert len(alive) == 10
    assert max(alive) <= 1


def test_nothing_keeps_a_gradient_alive():
    param = nn.Parameter(torch.randn(4, 3))
    holder = nn.ParameterList([param])
    gradients = []
    param.register_post_accumulate_grad_hook(lambda p: gradients.append(weakref.ref(p.grad)))
    optimizer = Adafactor([param])
    step_in_backward(holder, optimizer)
    for _ in range(2):
        (param * torch.randn(4, 3)).sum().backward()
    assert [g() for g in gradients] == [None, None]


def test_what_is_dropped_is_collected():
    def run():
        model = nn.Linear(3, 3)
        optimizer = Adafactor(model.parameters())
        step_in_backward(model, optimizer)
        model(torch.ones(1, 3)).sum().backward()
        return weakref.ref(optimizer)

    reference = run()
    gc.collect()
    assert reference() is None


def test_an_optimizer_that_is_gone_is_in_nobodys_way():
    model = nn.Linear(3, 3)
    for _ in range(3):
        optimizer = Adafactor(model.parameters())
        step_in_backward(model, optimizer)
        model(torch.ones(1, 3)).sum().backward()
        assert int(optimizer.state[model.weight]["step"]) == 1
        del optimizer


def test_an_optimizer_that_is_gone_steps_nothing():
    model = nn.Linear(3, 3)
    optimizer = Adafactor(model.parameters())
    step_in_backward(model, optimizer)
    model(torch.ones(1, 3)).sum().backward()
    before = model.weight.detach().clone()
    del optimizer
    gc.collect()
    model(torch.ones(1, 3)).sum().backward()
    assert torch.equal(model.weight, before)
    assert model.weight.grad is not None
    assert not model.weight._post_accumulate_grad_hooks
    model.zero_grad()
    step_in_backward(model, Adafactor(model.parameters()))
    with pytest.warns(RuntimeWarning, match="its optimizer is gone"):
        gc.collect()


@KERNELS
def test_a_gradient_that_is_not_finite_is_skipped_and_freed(fused):
    runs = []
    for release in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        optimizer = Adafactor(model.parameters(), fused=fused)
        released = step_in_backward(model, optimizer) if release else None
        for x in (torch.ones(2, 3), torch.full((2, 3), float("inf"))):
            model(x).sum().backward()
            if released is None:
                optimizer.step()
                optimizer.zero_grad()
        assert all(p.grad is None for p in model.parameters())
        runs += [optimizer, model]
    assert runs[0].skipped > 0
    assert_same(*runs)


@KERNELS
def test_diagnostics_are_those_of_the_ordinary_step(fused):
    runs = []
    for release in (False, True):
        model = Tied()
        optimizer = Adafactor(model.named_parameters(), diagnostics=True, fused=fused)
        released = step_in_backward(model, optimizer) if release else None
        train(model, optimizer, range(2), released)
        runs.append(optimizer.diagnostics())
    assert runs[0].keys() == runs[1].keys()
    for name, values in runs[0].items():
        assert all(torch.equal(value, runs[1][name][kind]) for kind, value in values.items())


def test_accumulated_micro_batches_are_one_step():
    """The last micro-batch is the one that steps; also what only an earlier one has reached."""
    runs = []
    for release in (False, True):
        torch.manual_seed(0)
        model = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(3, 2), "c": nn.Linear(3, 2)})
        optimizer = Adafactor(model.parameters(), lr=0.1)
        released = step_in_backward(model, optimizer) if release else None

        def micro_batch(*names, model=model):
            sum(model[name](torch.ones(2, 3)).square().sum() for name in names).backward()

        for _ in range(3):
            if released is None:
                micro_batch("a", "b")
                micro_batch("a")
                optimizer.step()
                optimizer.zero_grad()
            else:
                with released.accumulate():
                    micro_batch("a", "b")
                assert model["a"].weight.grad is not None
                micro_batch("a")
                assert all(p.grad is None for p in model.parameters())
        runs += [optimizer, model]
    assert len(runs[0].state) == 4
    assert_same(*runs)


def test_parameters_that_are_frozen_and_unfrozen_later():
    runs = []
    for release in (False, True):
        model = Tied()
        optimizer = Adafactor(model.parameters())
        released = step_in_backward(model, optimizer) if release else None
        assert not model.scale.requires_grad
        train(model, optimizer, range(2), released)
        model.scale.requires_grad_(True)
        train(model, optimizer, range(2, 4), released)
        runs += [optimizer, model]
    assert int(runs[2].state[runs[3].scale]["step"]) == 2
    assert_same(*runs)


def test_parameters_of_others_keep_their_gradients():
    model = Tied()
    ours = [p for name, p in model.named_parameters() if "blocks" in name]
    step_in_backward(model, Adafactor(ours))
    loss_of(model, 0).backward()
    assert all(p.grad is None for p in ours)
    assert model.head.weight.grad is not None


def test_two_optimizers_for_one_model():
    model, other = Tied(), Tied()
    halves = [[p for name, p in model.named_parameters() if ("blocks" in name) == b] for b in (True, False)]
    first, second = Adafactor(halves[0]), Adafactor(halves[1], lr=0.1)
    step_in_backward(model, first)
    step_in_backward(model, second)
    train(model, None, range(3), released=True)
    pairs = [[p for name, p in other.named_parameters() if ("blocks" in name) == b] for b in (True, False)]
    ordinary = [Adafactor(pairs[0]), Adafactor(pairs[1], lr=0.1)]
    for t in range(3):
        loss_of(other, t).backward()
        for optimizer in ordinary:
            optimizer.step()
            optimizer.zero_grad()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


class Recurrent(nn.Module):
    """One block in two checkpointed segments."""

    def __init__(self, reentrant: bool, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        if tied:
            self.second.weight = self.first.weight
        self.reentrant, self.tied = reentrant, tied

    def forward(self, x):
        x = checkpoint(self.first, x, use_reentrant=self.reentrant)
        x = checkpoint(self.second if self.tied else self.first, x, use_reentrant=self.reentrant)
        return x if self.tied else self.second(x)


@pytest.mark.parametrize("tied", [True, False])
def test_a_parameter_in_several_segments(tied):
    """Not reentrant: one gradient. Reentrant: one per segment, which is refused; for tied layers before a step."""
    x = torch.randn(3, 6, requires_grad=True)
    models = [Recurrent(False, tied), Recurrent(False, tied)]
    optimizers = [Adafactor(model.parameters()) for model in models]
    step_in_backward(models[0], optimizers[0])
    for model in models:
        model(x).sum().backward()
    optimizers[1].step()
    assert_same(optimizers[0], models[0], optimizers[1], models[1])

    model = Recurrent(True, tied)
    optimizer = Adafactor(model.named_parameters())
    step_in_backward(model, optimizer)
    before = model.first.weight.detach().clone()
    text = r"^first\.(weight|bias) of shape \(6.* must be used in one (layer|segment) only .*Pass use_reentrant=False"
    with pytest.raises(RuntimeError, match=text):
        model(x).sum().backward()
    assert torch.equal(model.first.weight, before) == tied


def test_reentrant_segments_of_separate_passes_are_told_apart():
    """Every parameter is in a segment: no graph task of the outer pass is ever seen."""
    blocks = nn.Sequential(*[nn.Linear(5, 5) for _ in range(3)])
    other = copy.deepcopy(blocks)
    released, ordinary = Adafactor(blocks.parameters()), Adafactor(other.parameters())
    step_in_backward(blocks, released)
    for t in range(4):
        for model in (blocks, other):
            x = torch.randn(2, 5, generator=torch.Generator().manual_seed(t), requires_grad=True)
            for block in model:
                x = checkpoint(block, x, use_reentrant=True)
            x.square().sum().backward()
        ordinary.step()
        ordinary.zero_grad()
    assert_same(released, blocks, ordinary, other)


def test_an_error_in_the_middle_does_not_spoil_the_next_pass():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = Adafactor(model.parameters())
    step_in_backward(model, optimizer)
    x = torch.randn(2, 4, requires_grad=True)
    fails = model[1].register_full_backward_hook(lambda *_: 1 / 0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            model(x).sum().backward()
    fails.remove()
    model(x).sum().backward()
    assert [int(optimizer.state[layer.weight]["step"]) for layer in model][::2] == [1, 3]


class TestRefusals:
    @pytest.fixture
    def model(self):
        return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))

    def released(self, model, **options):
        optimizer = Adafactor(model.named_parameters(), **options)
        return optimizer, step_in_backward(model, optimizer)

    def test_step(self, model):
        optimizer, handle = self.released(model)
        called = []
        with pytest.raises(RuntimeError, match=r"^optimizer\.step must be left out with step_in_backward, got"):
            optimizer.step(lambda: called.append(1))
        assert not called
        handle.remove()
        optimizer.step()

    def test_step_that_a_scheduler_has_wrapped(self, model):
        optimizer, _ = self.released(model)
        torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        with pytest.raises(RuntimeError, match="and clip_grad_norm_ too, which finds no gradients"):
            optimizer.step()

    def test_grad_scaler(self, model):
        optimizer, handle = self.released(model)
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(model(torch.ones(1, 4)).sum()).backward()
        with pytest.raises(RuntimeError, match=r"^GradScaler must be left out with step_in_backward"):
            scaler.step(optimizer)
        handle.remove()
        assert not hasattr(optimizer, "_step_supports_amp_scaling")

    def test_two_handles(self, model):
        optimizer, handle = self.released(model)
        with pytest.raises(RuntimeError, match=r"^step_in_backward must be called once per optimizer"):
            step_in_backward(model, optimizer)
        handle.remove()
        step_in_backward(model, optimizer).remove()

    def test_two_optimizers_of_one_parameter(self, model):
        optimizer, handle = self.released(model)
        with pytest.raises(RuntimeError, match=r"^a parameter must be stepped by one optimizer, got"):
            step_in_backward(model, Adafactor(model[0].parameters()))
        assert optimizer._in_backward is handle
        handle.remove()

    def test_a_gradient_that_is_there(self, model):
        model(torch.ones(1, 4)).sum().backward()
        with pytest.raises(RuntimeError, match=r"^a gradient before step_in_backward must be None"):
            self.released(model)

    def test_a_parameter_of_no_model(self, model):
        with pytest.raises(ValueError, match=r"^a parameter of the optimizer must be a parameter of the model"):
            step_in_backward(model[0], Adafactor(model.parameters()))

    def test_types(self, model):
        with pytest.raises(TypeError, match=r"^model must be a torch\.nn\.Module, got 'list'\."):
            step_in_backward(list(model), Adafactor(model.parameters()))
        with pytest.raises(TypeError, match=r"^optimizer must be an adafactor\.torch\.Adafactor, got 'SGD'\."):
            step_in_backward(model, torch.optim.SGD(model.parameters()))

    def test_a_new_group(self, model):
        optimizer, _ = self.released(model)
        with pytest.raises(RuntimeError, match=r"^add_param_group must be called before step_in_backward"):
            optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
        assert len(optimizer.param_groups) == 1

    def test_groups_that_have_changed(self, model):
        optimizer, _ = self.released(model)
        optimizer.param_groups[0]["params"].reverse()
        with pytest.raises(RuntimeError, match=r"^the optimizer's groups must be the parameters that"):
            model(torch.ones(1, 4)).sum().backward()
        assert not optimizer.state

    def test_gradient_accumulation_of_accelerate(self, model):
        import accelerate

        runner = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        optimizer, _ = self.released(model)
        before = copy.deepcopy(model.state_dict())
        try:
            with (
                runner.accumulate(model),
                pytest.raises(RuntimeError, match=r"^gradient_accumulation_steps of Accelerate must be 1"),
            ):
                runner.backward(model(torch.ones(1, 4)).sum())
            with pytest.raises(RuntimeError, match="a second call"):  # the wrapper is seen through
                step_in_backward(model, accelerate.optimizer.AcceleratedOptimizer(optimizer))
        finally:
            accelerate.state.AcceleratorState._reset_state(True)
            accelerate.state.GradientState._reset_state()
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def test_a_sparse_gradient_before_anything_of_it_is_written(self):
        embedding = nn.Embedding(5, 3, sparse=True)
        optimizer, _ = self.released(embedding)
        before = embedding.weight.detach().clone()
        with pytest.raises(RuntimeError, match="sparse=False"):
            embedding(torch.tensor([1, 2])).sum().backward()
        assert torch.equal(embedding.weight, before)
        assert not optimizer.state


def test_compiled_autograd_does_not_trace_into_the_step():
    from torch._dynamo import compiled_autograd

    runs = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        optimizer = Adafactor(model.parameters(), lr=0.05)
        with step_in_backward(model, optimizer):
            for t in range(2):
                x = torch.randn(5, 6, generator=torch.Generator().manual_seed(t))
                if compiled:
                    with compiled_autograd._enable(torch.compile(backend="eager", fullgraph=False)):
                        model(x).square().mean().backward()
                else:
                    model(x).square().mean().backward()
        runs.append([p.detach() for p in model.parameters()])
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b)
