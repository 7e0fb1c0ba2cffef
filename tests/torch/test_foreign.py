"""Checkpoints of other people: read where they are Adafactor's, else refused in a sentence that names the writer, and
nothing that fits no parameter gets in."""

import copy
import warnings

import pytest
import torch
from torch_support import parameters, train

from adafactor.convert import torch as conversion
from adafactor.core.errors import Refused
from adafactor.torch import Adafactor, Factored

SHAPES = [(20, 30), (30,)]


class Writer(torch.optim.Optimizer):
    """The fields of another optimizer: its group, and what it keeps of a parameter."""

    def __init__(self, params, group, state):
        self.makes = state
        super().__init__(params, group)

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = self.makes(p, self.state[p])


def zeros(*names):
    return lambda p, state: {"step": torch.tensor(1.0), **{name: torch.zeros_like(p) for name in names}}


def rows(p, **more):
    square = p.grad.square()
    if p.dim() > 1:
        return {"exp_avg_sq_row": square.mean(-1), "exp_avg_sq_col": square.mean(-2), **more}
    return {"exp_avg_sq": square, **more}


def timm(p, state):
    return rows(p, step=state.get("step", 0) + 1, RMS=p.detach().square().mean().sqrt())


def big_vision(p, state):
    square, step = p.grad.square(), torch.tensor(1.0) + state.get("step", 0.0)
    if p.dim() < 2:
        return {"step": step, "exp_avg_sq": square}
    kept = {"exp_avg_sq_r": square.mean(1, keepdim=True), "exp_avg_sq_c": square.mean(0, keepdim=True)}
    return {"step": step, **kept, "exp_avg": torch.full_like(p, 0.5, dtype=torch.bfloat16)}


BETAS = {"lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 0.0}
TIMM = {
    **{"lr": 1e-3, "eps": 1e-30, "eps_scale": 1e-3, "clip_threshold": 1.0, "decay_rate": -0.8, "beta1": None},
    **{"weight_decay": 0.0, "scale_parameter": True, "relative_step": False, "warmup_init": False},
    **{"min_dim_size_to_factor": 16, "caution": False},
}
BIG_VISION = {
    **{"lr": 1e-3, "min_dim_size_to_factor": 16, "decay_rate": 0.8, "decay_offset": 0, "beta2_cap": 0.999},
    **{"momentum": 0.9, "momentum_dtype": torch.bfloat16, "eps": None, "weight_decay": 0.0, "unscaled_wd": False},
    **{"clipping_threshold": None, "caution": False, "corrected_weight_decay": False, "max_lr_snapshot": 1e-3},
}
KOZISTR = {**BETAS, "scale_parameter": True, "relative_step": True, "warmup_init": False, "eps1": 1e-30, "eps2": 1e-3}
CAME = {**BETAS, "eps": (1e-30, 1e-16), "clip_threshold": 1.0}
EIGHT = {"lr": 1e-3, "beta2_decay": -0.8, "eps": (1e-30, 1e-3), "d": 1.0, "m_block_size": 128, "relative_step": True}
OTHERS = {
    "AdamW or Adam": lambda p: torch.optim.AdamW(p),
    "NAdam": lambda p: torch.optim.NAdam(p),
    "Adamax": lambda p: torch.optim.Adamax(p),
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p),
    "Adagrad": lambda p: torch.optim.Adagrad(p),
    "Adadelta": lambda p: torch.optim.Adadelta(p),
    "Rprop": lambda p: torch.optim.Rprop(p),
    "ASGD": lambda p: torch.optim.ASGD(p),
    "Lion": lambda p: Writer(p, BETAS, lambda p, state: {"exp_avg": torch.zeros_like(p)}),
    "bitsandbytes": lambda p: Writer(p, BETAS, lambda p, state: {"step": 1, "state1": p, "state2": p}),
    "CAME": lambda p: Writer(p, CAME, lambda p, state: rows(p, step=1, RMS=0.0, exp_avg=torch.zeros_like(p))),
    "pytorch_optimizer's AdaFactor": lambda p: Writer(p, KOZISTR, lambda p, state: rows(p, RMS=0.0)),
    "adafactor8bit": lambda p: Writer(p, EIGHT, lambda p, state: {"step": 1, "row_var_q": p}),
    "Prodigy": lambda p: Writer(p, {**BETAS, "d": 1e-6}, zeros("s", "p0", "exp_avg", "exp_avg_sq")),
    "an unknown optimizer with average, step, twist": lambda p: Writer(p, {"lr": 1.0}, zeros("average", "twist")),
}


def saved(make, steps=3):
    params = parameters(SHAPES)
    optimizer = make(params)
    train(optimizer, steps)
    return optimizer.state_dict()


def ours():
    optimizer = Adafactor(parameters(SHAPES), lr=0.05)
    train(optimizer, 1)
    return optimizer


def refused(content, match):
    """That loading it, and converting it, ends in one sentence, and that the live optimizer stays what it was."""
    optimizer = ours()
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises((TypeError, ValueError), match=match) as caught:
        optimizer.load_state_dict(content)
    assert "\n" not in str(caught.value)
    assert str(optimizer.state_dict()) == str(before)


@pytest.mark.parametrize("writer", OTHERS)
def test_another_optimizers_checkpoint_is_refused_by_name(writer):
    content = saved(OTHERS[writer])
    refused(content, f"must be of .*adafactor.torch, got .one of {writer}")
    with pytest.raises(Refused, match=f"one of {writer}"):
        conversion.read({"model": {}, "optimizer": content})


@pytest.mark.parametrize("writer", ["AdamW or Adam", "RMSprop", "pytorch_optimizer's AdaFactor", "CAME", "SGD"])
def test_without_any_state_the_group_tells(writer):
    name = {"AdamW or Adam": "AdamW, Adam or another with betas"}.get(writer, writer)
    refused(saved(OTHERS[writer], steps=0), f"one of {name}")


def test_a_group_of_another_optimizer_among_ours_is_refused():
    mixed = Adafactor([{"params": [p]} for p in parameters(SHAPES)])
    train(mixed, 1)
    content = mixed.state_dict()
    content["state"][1] = saved(OTHERS["AdamW or Adam"])["state"][1]
    optimizer = Adafactor([{"params": [p]} for p in parameters(SHAPES)])
    for group in (content["param_groups"][1], {**BETAS, "params": [1]}):
        content["param_groups"][1] = group
        with pytest.raises(Refused, match=r"one of AdamW or Adam|unknown optimizer with exp_avg"):
            optimizer.load_state_dict(content)
    assert not optimizer.state


def test_a_parameter_of_another_optimizer_among_ours_is_refused():
    content = ours().state_dict()
    content["state"][1] = {"step": 1, "row_var": torch.ones(30, 1), "col_var": torch.ones(1, 30)}
    refused(content, "one of adafactor.torch and torch.optim")


@pytest.mark.parametrize("least", [16, 25])
def test_timm_goes_on_here(least):
    content = saved(lambda p: Writer(p, {**TIMM, "min_dim_size_to_factor": least}, timm))
    optimizer = ours()
    optimizer.load_state_dict(content)
    group, state = optimizer.param_groups[0], optimizer.state[optimizer.param_groups[0]["params"][0]]
    assert (group["lr"], group["eps"], group["d"]) == (1e-3, (1e-30, 1e-3), 1.0)
    assert not group["scale_parameter"]  # it only scales its own relative step
    assert not {"eps_scale", "caution", "clip_threshold"} & set(group)
    assert torch.equal(state["row"], content["state"][0]["exp_avg_sq_row"])
    train(optimizer, 1)
    assert {int(state["step"]) for state in optimizer.state.values()} == {4}
    held = conversion.read(content)
    assert (held.optimizer, held.count) == ("timm", 3)
    assert held.parameters[0].shape == (20, 30)


def test_timm_factors_convolutions_over_their_first_two_axes():
    def first(p, state):
        square = p.grad.square()
        return {"step": 1, "RMS": 1.0, "exp_avg_sq_row": square.mean(1), "exp_avg_sq_col": square.mean(0)}

    def saved_by(shape):
        writer = Writer(parameters([shape]), TIMM, first)
        train(writer, 1)
        return writer.state_dict()

    content, optimizer = saved_by((24, 20, 3, 3)), Adafactor(parameters([(24, 20, 3, 3)]))
    optimizer.load_state_dict(content)
    (state,) = optimizer.state.values()
    assert torch.equal(state["row"], content["state"][0]["exp_avg_sq_row"])
    odd = saved_by((20, 20, 40))  # no policy takes the first two of these
    with pytest.raises(Refused, match=r"axes of parameter 0 must be \[\(0,\), \(1,\)\], over which timm"):
        Adafactor(parameters([(20, 20, 40)])).load_state_dict(odd)
    told = Adafactor(parameters([(20, 20, 40)]), factoring=lambda name, shape: Factored((0,), (1,)))
    told.load_state_dict(odd)
    (state,) = told.state.values()
    assert torch.equal(state["column"], odd["state"][0]["exp_avg_sq_col"])


def test_big_vision_goes_on_here():
    content = saved(lambda p: Writer(p, BIG_VISION, big_vision))
    optimizer = ours()
    optimizer.load_state_dict(content)
    group, state = optimizer.param_groups[0], optimizer.state[optimizer.param_groups[0]["params"][0]]
    assert (group["beta1"], group["beta2_decay"], group["beta2_max"]) == (0.9, -0.8, 0.999)
    assert (group["d"], group["relative_step"], group["scale_parameter"]) == (None, False, False)
    assert torch.equal(state["row"], content["state"][0]["exp_avg_sq_r"].squeeze(1))
    assert torch.equal(state["column"], content["state"][0]["exp_avg_sq_c"].squeeze(0))
    assert (state["momentum"].dtype, float(state["momentum"][0, 0])) == (torch.bfloat16, 0.5)
    assert conversion.read(content).parameters[0].layout.columns == (1,)


@pytest.mark.parametrize(
    ("group", "text"),
    [
        ({"caution": True}, "caution does not carry over"),
        ({"relative_step": True, "warmup_init": True, "lr": None}, "warmup_init does not carry over"),
        ({"relative_step": True, "lr": None, "weight_decay": 0.1}, "choose weight_decay anew"),
    ],
)
def test_what_of_timm_cannot_carry_over_is_named(group, text):
    content = saved(lambda p: Writer(p, {**TIMM, **group}, timm))
    with pytest.warns(UserWarning, match=text):
        ours().load_state_dict(content)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"d": -1.0}, "d must be > 0"),
        ({"eps": 1e-30}, "eps must be a pair"),
        ({"eps": (1e-30,)}, "eps must be a pair"),
        ({"beta1": 1.5}, "beta1 must be"),
        ({"lr": None}, "lr must be"),
        ({"lr": "fast"}, "lr must be"),
        ({"factoring": "first_two"}, "factoring must be"),
        ({"momentum_dtype": "int8"}, "momentum_dtype must be"),
        ({"param_names": ["only one"]}, "param_names of a group must be 2"),
    ],
)
def test_hyperparameters_are_checked_before_anything_is_modified(changes, text):
    content = ours().state_dict()
    content["param_groups"][0] |= changes
    refused(content, text)


@pytest.mark.parametrize("writer", ["timm", "transformers", "torch.optim"])
def test_hyperparameters_that_are_missing_or_bad_in_a_known_dialect(writer):
    transformers = {name: value for name, value in TIMM.items() if name not in ("eps_scale", "min_dim_size_to_factor")}
    content = {
        "timm": lambda: saved(lambda p: Writer(p, TIMM, timm)),
        "transformers": lambda: saved(lambda p: Writer(p, {**transformers, "eps": (1e-30, 1e-3)}, timm)),
        "torch.optim": lambda: saved(lambda p: torch.optim.Adafactor(p)),
    }[writer]()
    Adafactor(parameters(SHAPES)).load_state_dict(content)
    for name, bad in (("eps", "small"), ("lr", -1.0), ("beta2_decay" if writer == "torch.optim" else "decay_rate", 1)):
        wrong = copy.deepcopy(content)
        wrong["param_groups"][0][name] = bad
        refused(wrong, "eps|lr|beta2_decay")
        del wrong["param_groups"][0][name]
        refused(wrong, f"with {name}, got|unknown optimizer")


def test_lists_of_a_file_become_pairs():
    content = ours().state_dict()
    content["param_groups"][0]["eps"] = [1e-20, 1e-2]
    optimizer = ours()
    optimizer.load_state_dict(content)
    assert optimizer.param_groups[0]["eps"] == (1e-20, 1e-2)


def test_what_the_file_does_not_know_stays():
    content = ours().state_dict()
    content["param_groups"] = [{"params": content["param_groups"][0]["params"], "lr": 0.5, "initial_lr": 0.7}]
    optimizer = Adafactor(parameters(SHAPES), beta1=0.5, seed=3)
    optimizer.load_state_dict(content)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["initial_lr"], group["beta1"], group["seed"]) == (0.5, 0.7, 0.5, 3)


EDITS = {
    "missing column": (lambda s: s.pop("column"), "needs the statistics row .* and column"),
    "no statistics": (lambda s: [s.pop("row"), s.pop("column")], "needs the statistics|unknown optimizer"),
    "missing step": (lambda s: s.pop("step"), "step of parameter 0 must be a whole number"),
    "half a step": (lambda s: s.update(step=torch.tensor(1.5)), "step of parameter 0 must be a whole number"),
    "a negative step": (lambda s: s.update(step=-1), "step of parameter 0 must be a whole number >= 0"),
    "no number": (lambda s: s.update(step=float("nan")), "step of parameter 0 must be a whole number"),
    "many steps": (lambda s: s.update(step=torch.ones(2)), r"whole number .* shape \(2,\)"),
    "a step without data": (lambda s: s.update(step=torch.ones((), device="meta")), "on meta"),
    "turned": (lambda s: s.update(row=s["column"], column=s["row"]), r"row of parameter 0 must be of shape \(20,\)"),
    "another shape": (lambda s: s.update(row=torch.ones(4, 5)), r"must be of shape \(20,\), got \(4, 5\)"),
    "a number": (lambda s: s.update(row=1.0), "row of parameter 0 must be a tensor"),
    "integers": (lambda s: s.update(row=torch.ones(20, dtype=torch.int64)), "of floating point numbers"),
    "complex": (lambda s: s.update(row=torch.ones(20, dtype=torch.complex64)), "of floating point numbers"),
    "bool": (lambda s: s.update(row=torch.ones(20, dtype=torch.bool)), "of floating point numbers"),
    "sparse": (lambda s: s.update(row=torch.ones(20).to_sparse()), "a dense tensor"),
    "without data": (lambda s: s.update(row=torch.ones(20, device="meta")), "a tensor with data.*map_location='cpu'"),
    "flat momentum": (lambda s: s.update(momentum=torch.ones(600)), r"momentum of parameter 0 must be of shape"),
    "scales alone": (lambda s: s.update(momentum_scale=torch.ones(3)), "momentum of parameter 0 must be there"),
    "few scales": (
        lambda s: s.update(momentum=torch.ones(20, 30, dtype=torch.int8), momentum_scale=torch.ones(2)),
        r"momentum_scale of parameter 0 must be of shape \(3,\)",
    ),
    "a residual of a row": (lambda s: s.update(residual=torch.ones(20)), "residual of parameter 0 must be of shape"),
    "both": (lambda s: s.update(second_moment=torch.ones(20, 30)), "needs the statistics"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_state_that_does_not_fit_is_refused_whole(edit):
    content = copy.deepcopy(ours().state_dict())
    change, text = EDITS[edit]
    change(content["state"][0])
    refused(content, text)


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize(
    "change",
    [
        lambda row: row.double(),
        lambda row: row.bfloat16(),
        lambda row: torch.stack([row, row], 1)[:, 0],
        lambda row: row[:1].expand(20),
        lambda row: row.flip(0).requires_grad_(),
        lambda row: torch.nn.Parameter(row),
    ],
)
def test_what_is_accepted_is_what_kernels_need(change, fused):
    source = ours()
    content = copy.deepcopy(source.state_dict())
    content["state"][0]["row"] = change(content["state"][0]["row"])
    optimizer = Adafactor(parameters(SHAPES), fused=fused)
    optimizer.load_state_dict(content)
    row = optimizer.state[optimizer.param_groups[0]["params"][0]]["row"]
    assert (row.dtype, row.shape, row.is_contiguous(), row.requires_grad) == (torch.float32, (20,), True, False)
    assert type(row) is torch.Tensor
    train(optimizer, 1)


def test_what_wrappers_keep_beside_comes_back():
    optimizer = ours()
    params = optimizer.param_groups[0]["params"]
    for param, extra in ((params[0], {"slow": params[0].detach().clone(), "sum": 0.25}), (params[1], {"z": [1, 2]})):
        optimizer.state[param] |= extra
    content = optimizer.state_dict()
    content["state"]["mine"] = {"anything": 1}  # of no parameter
    again = ours()
    again.load_state_dict(content)
    first, second = (again.state[param] for param in again.param_groups[0]["params"])
    assert torch.equal(first["slow"], params[0])
    assert (first["sum"], second["z"], again.state["mine"]) == (0.25, [1, 2], {"anything": 1})
    only = {"state": {0: {"slow": torch.ones(20, 30)}}, "param_groups": content["param_groups"]}
    again.load_state_dict(only)  # a parameter that had no gradient yet
    train(again, 1)
    assert again.state[again.param_groups[0]["params"][0]].keys() >= {"slow", "row", "column", "step"}


def test_wrappers_keep_beside_the_peers_state_too():
    theirs = torch.optim.Adafactor(parameters(SHAPES))
    train(theirs, 1)
    theirs.state[theirs.param_groups[0]["params"][0]]["slow"] = torch.ones(20, 30)
    again = ours()
    again.load_state_dict(theirs.state_dict())
    assert torch.equal(again.state[again.param_groups[0]["params"][0]]["slow"], torch.ones(20, 30))


def test_parameters_in_another_order_are_taken_by_position():
    params = parameters([(3, 4), (4, 3)])
    optimizer = Adafactor(params)
    train(optimizer, 1)
    content = optimizer.state_dict()
    content["param_groups"][0]["params"] = [1, 0]
    again = Adafactor(parameters([(4, 3), (3, 4)]))
    again.load_state_dict(content)
    first = again.param_groups[0]["params"][0]
    assert torch.equal(again.state[first]["row"], optimizer.state[params[1]]["row"])
    with pytest.raises(Refused, match=r"row of parameter 1 must be of shape \(3,\)"):
        Adafactor(parameters([(3, 4), (4, 3)])).load_state_dict(content)


@pytest.mark.parametrize("content", [{}, {"model": {}, "optimizer": {}}, {"state": {}, "param_groups": {}}])
def test_what_is_no_state_dict(content):
    refused(content, "the state dict must be a mapping with state and param_groups")


def test_more_or_fewer_groups_are_pytorchs_sentence():
    content = ours().state_dict()
    content["param_groups"].append({**content["param_groups"][0], "params": []})
    refused(content, "different number of parameter groups")


@pytest.mark.parametrize("setting", ["meta", "float64", "bfloat16"])
def test_default_device_and_dtype_are_nobodys_business(setting):
    contents = [ours().state_dict(), saved(lambda p: torch.optim.Adafactor(p))]
    contents += [saved(lambda p: Writer(p, {**TIMM, "beta1": 0.9}, lambda p, s: {**timm(p, s), "exp_avg": p.detach()}))]
    optimizers = [Adafactor(parameters(SHAPES), fused=fused) for fused in (None, False) for _ in contents]
    try:
        if setting == "meta":
            torch.set_default_device("meta")
        else:
            torch.set_default_dtype(getattr(torch, setting))
        for optimizer, content in zip(optimizers, contents * 2, strict=True):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                optimizer.load_state_dict(content)
            for param in optimizer.param_groups[0]["params"]:
                param.grad = torch.ones(param.shape, device="cpu", dtype=param.dtype)
            optimizer.step()
            for state in optimizer.state.values():
                assert {value.device.type for value in state.values()} == {"cpu"}
                assert {value.dtype for value in state.values()} == {torch.float32, torch.int64}
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
