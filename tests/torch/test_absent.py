"""Gradients that come and go, as those of experts do: one list serves all patterns, and who has none is left alone."""

import pytest
import torch
import triton_support

from adafactor.engine.torch.checks import Witness
from adafactor.torch import Adafactor
from adafactor.torch.prepare import Preparation

triton_support.interpret()
SHAPES = [(12, 8), (9,), (2, 6, 5), (4, 4), (8, 12), (3, 3)]
OPTIONS = {"lr": 0.1, "relative_step": False, "diagnostics": True}


def pair(fused):
    """The same parameters in one optimizer, and each in one of its own."""
    params, alone = ([torch.nn.Parameter(torch.linspace(1, 2, torch.Size(s).numel()).view(s)) for s in SHAPES]
                     for _ in range(2))  # fmt: skip
    return (
        params,
        Adafactor(params, fused=fused, **OPTIONS),
        alone,
        [Adafactor([p], fused=fused, **OPTIONS) for p in alone],
    )


def gradients(params, pattern, seed):
    generator = torch.Generator().manual_seed(seed)
    for k, p in enumerate(params):
        grad = torch.randn(p.shape, generator=generator)
        p.grad = grad if k in pattern else None


PATTERNS = [(0, 1, 2), (1, 3), (0, 4, 5), (0, 1, 2, 3, 4, 5), (2,), (1, 2, 5), (0, 3), (4,), (0, 1, 2, 3, 4), (3, 5)]


def test_every_pattern_is_a_step_of_its_own(fused, monkeypatch):
    params, optimizer, alone, optimizers = pair(fused)
    prepared = []
    prepare = Preparation._prepare
    monkeypatch.setattr(Preparation, "_prepare", lambda self, *args: [prepared.append(self), prepare(self, *args)][1])
    for step, pattern in enumerate(PATTERNS):
        for both in (params, alone):
            gradients(both, pattern, step)
            if 1 not in pattern:  # what is written to it meanwhile is seen when it has one
                with torch.no_grad():
                    both[1].mul_(1.5)
        if pattern == (1, 2, 5):
            params[2].grad.fill_(torch.nan)
            alone[2].grad.fill_(torch.nan)
        versions = [p._version for p in params]
        before = sum(of is optimizer._preparation for of in prepared)
        optimizer.step()
        if step > 3:
            assert sum(of is optimizer._preparation for of in prepared) == before
        for k, one in enumerate(optimizers):
            one.step()
            assert (params[k]._version > versions[k]) == (k in pattern)
    assert optimizer.skipped == 1 == sum(one.skipped for one in optimizers)
    for k, (p, q, one) in enumerate(zip(params, alone, optimizers, strict=True)):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=0)
        assert optimizer.state[p]["step"] == one.state[q]["step"]
        for name, value in one.diagnostics()["0"].items():
            torch.testing.assert_close(optimizer.diagnostics()[str(k)][name], value, rtol=1e-6, atol=0)


@pytest.mark.parametrize("edit", [
    lambda o, p: p.untyped_storage().resize_(0),
    lambda o, p: setattr(p, "data", p.data.to(torch.complex64)),
    lambda o, p: o.state[p].update(row=torch.zeros(99)),
    lambda o, p: o.state[p].pop("row"),
], ids=["freed", "complex", "a row of another size", "no row"])  # fmt: skip
def test_what_has_no_gradient_may_be_in_any_state(fused, edit):
    params, optimizer, _, _ = pair(fused)
    for pattern in (range(6), (1, 3)):
        gradients(params, pattern, 0)
        optimizer.step()
    edit(optimizer, params[0])
    for step, pattern in enumerate([(1, 3), (2, 4), (5,)]):
        before = [p.detach().clone() for p in params[1:]]
        gradients(params, pattern, step)
        optimizer.step()
        assert [not torch.equal(a, b) for a, b in zip(params[1:], before, strict=True)] == [
            k in pattern for k in range(1, 6)
        ]


def test_state_that_was_taken_away_is_not_made_again_without_a_gradient(fused):
    params, optimizer, _, _ = pair(fused)
    for pattern in (range(6), (1, 3), (2,)):
        gradients(params, pattern, 0)
        optimizer.step()
        optimizer.state.pop(params[0], None)
    assert params[0] not in optimizer.state
    gradients(params, (0, 1), 0)
    optimizer.step()
    assert optimizer.state[params[0]]["step"] == 1


def test_looking_at_parameters_without_gradients_finds_what_was_edited(fused):
    """A user's write to a parameter whose gradient comes back counts: its state is cast as that of any other."""
    params, optimizer, alone, optimizers = pair(fused)
    for step, pattern in enumerate([range(6), (1, 3), (0, 2)]):
        for both in (params, alone):
            gradients(both, pattern, step)
        if step == 1:
            for o, p in ((optimizer, params[0]), (optimizers[0], alone[0])):
                o.state[p]["row"] = o.state[p]["row"].double() * 2
        for one in (optimizer, *optimizers):
            one.step()
    torch.testing.assert_close(params[0], alone[0], rtol=1e-6, atol=0)
    assert optimizer.state[params[0]]["row"].dtype == torch.float32


def test_none_fits_and_another_shape_does_not():
    params, optimizer, _, _ = pair(False)
    gradients(params, range(6), 0)
    optimizer.step()
    (prepared,) = optimizer._preparation._prepared.values()
    witness = prepared.plan.witness
    assert isinstance(witness, Witness)
    assert witness.fits([None, *(p.grad for p in params[1:])])
    assert witness.fits([p.grad for p in params])
    assert not witness.fits([None, params[0].grad, *(p.grad for p in params[2:])])
