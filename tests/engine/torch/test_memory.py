"""Where tensors are is said alike by PyTorch's C interface and by its methods."""

import pytest
import torch
from native_support import need

from adafactor.core import native
from adafactor.engine.torch import checks, memory
from adafactor.engine.torch.memory import Memory


@pytest.fixture(params=["C interface", "methods"])
def asked(request, monkeypatch):
    """Both ways of asking."""
    if request.param == "methods":
        monkeypatch.setattr(memory, "_interface", lambda: None)
    else:
        need(native.why_not())
        assert memory._interface() is not None


class Named(torch.nn.Parameter):
    """A class with more in its objects."""

    def __init__(self, *args):
        self.called = "mine"


def tensors():
    bucket, freed, short = torch.randn(100), torch.randn(4), torch.randn(9)
    freed.untyped_storage().resize_(0)
    short.untyped_storage().resize_(8)
    expanded, empty = torch.randn(1, 3).expand(5, 3), torch.empty(0, 3)
    views = bucket[10:20], bucket[20:].view(8, 10).t(), bucket.view(torch.int32)
    params = torch.nn.Parameter(bucket), Named(torch.ones(2))
    return [bucket, *views, freed, short, expanded, empty, *params, torch.ones(())]


def test_answers_are_those_of_the_methods(asked):
    given = [None, *tensors(), None]
    looked = Memory(given).look()
    assert looked.shape == (3, len(given))
    assert memory.addresses_of(given).tolist() == looked[0].tolist()
    for tensor, (address, size, offset) in zip(given, looked.T.tolist(), strict=True):
        if tensor is None:
            assert (address, size, offset) == (0, 0, 0)
        else:
            assert address == tensor.data_ptr()
            assert (size, offset) == (tensor.untyped_storage().nbytes(), tensor.storage_offset())
    assert Memory([]).look().shape == (3, 0)


def test_answers_are_as_of_now(asked):
    here, there = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(50))
    looking = Memory([here])
    for change in (
        lambda: torch.utils.swap_tensors(here, there),
        lambda: setattr(here, "data", torch.zeros(7)),
        lambda: here.untyped_storage().resize_(4),
    ):
        before = looking.look().tolist()
        change()
        after = looking.look().tolist()
        assert after != before
        assert after == [[here.data_ptr()], [here.untyped_storage().nbytes()], [0]]


def test_what_is_no_memory_is_an_error_of_pytorch(asked):
    with pytest.raises((RuntimeError, NotImplementedError), match="storage"):
        Memory([torch.eye(3).to_sparse()]).look()


class Written:
    def __init__(self, **state):
        self.param, self.state, self.slots = torch.zeros(6, 4), state, tuple(state)


CHANGES = {
    "replaced": lambda w: w.state.update(row=torch.zeros(6)),
    "swapped": lambda w: torch.utils.swap_tensors(w.state["row"], torch.zeros(6)),
    "elsewhere": lambda w: setattr(w.param, "data", w.param.data.clone()),
    "shrunk": lambda w: w.param.untyped_storage().resize_(8),
    "freed": lambda w: w.state["row"].untyped_storage().resize_(0),
    "another order": lambda w: w.param.t_(),
    "another dtype": lambda w: setattr(w.param, "data", w.param.data.view(torch.int32)),
    "another shape": lambda w: w.state["row"].unsqueeze_(0),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_moved_is_seen(asked, change):
    work = [Written(row=torch.zeros(6)), Written(row=torch.zeros(6))]
    witness = checks.Witness(work)
    assert not witness.moved()
    change(work[1])
    assert witness.moved()


def test_gradients_without_memory_are_seen(asked):
    work = [Written(), Written()]
    witness = checks.Witness(work)
    bucket = torch.zeros(100)
    grads = [torch.zeros(6, 4), bucket[30:54].view(6, 4)]
    assert witness.fits(grads)
    assert witness.fits([grads[0].clone(), grads[1]])
    bucket.untyped_storage().resize_(200)
    assert not witness.fits(grads)
    assert witness.fits([grads[0], None])
