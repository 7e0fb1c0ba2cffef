"""The plan's bytes are those that the optimizers allocate: over public models on the meta device, which takes none."""

import importlib.util
import math
import zipfile

import pytest
import torch
from architectures import PUBLIC, SMALL
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.profiler import ProfilerActivity, profile

import adafactor.torch
from adafactor import layout, plan
from adafactor.cli.bench.shapes import GPT2_SMALL, LLAMA_LAYER, LORA, transformer
from adafactor.core.canonical import canonical
from adafactor.core.errors import Refused
from adafactor.engine.torch.sharded import dtensor
from adafactor.planning import optimizers as rules
from adafactor.planning.files import read
from adafactor.torch.arguments import MOMENTUM_DTYPES

POLICIES = ["last_two", "largest_two", "smallest"]
MODELS = [pytest.param(shapes, id=name) for name, (shapes, _) in PUBLIC.items()]


def on_meta(shapes, dtype):
    params = [torch.nn.Parameter(torch.empty(shape, dtype=dtype, device="meta")) for shape in shapes.values()]
    for p in params:
        p.grad = torch.empty_like(p)
    return params


def state_bytes(optimizer):
    tensors = [t for values in optimizer.state.values() for t in values.values() if torch.is_tensor(t)]
    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    return sum(t.numel() * t.element_size() for t in local)


def planned(shapes, rule, dtype="float32", **options):
    (usage,) = plan(shapes, optimizers=[rule], dtype=dtype, **options).usages
    return usage


@pytest.mark.parametrize(("shapes", "count"), PUBLIC.values(), ids=PUBLIC)
def test_the_shapes_are_those_of_the_public_model(shapes, count):
    assert sum(map(math.prod, shapes.values())) == count
    assert plan(shapes).size == count


@pytest.mark.parametrize("shapes", MODELS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adamw(shapes, dtype):
    params = on_meta(shapes, getattr(torch, dtype))
    optimizer = torch.optim.AdamW(params, foreach=False)
    optimizer.step()
    usage = planned(shapes, rules.TorchAdamW(), dtype)
    assert usage.state == state_bytes(optimizer)
    assert usage.weights == usage.gradients == sum(p.numel() * p.element_size() for p in params)


@pytest.mark.parametrize("shapes", MODELS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_torch_adafactor(shapes, dtype):
    optimizer = torch.optim.Adafactor(on_meta(shapes, getattr(torch, dtype)))
    optimizer._init_group(optimizer.param_groups[0], [], [], [], [], [], [])  # its step reads values, meta has none
    assert planned(shapes, rules.TorchAdafactor(), dtype).state == state_bytes(optimizer)


@pytest.mark.parametrize("shapes", MODELS)
@pytest.mark.parametrize(
    ("policy", "dtype", "momentum"),
    [*((policy, "bfloat16", None) for policy in POLICIES), ("last_two", "float32", "float32")],
)
def test_ours(shapes, policy, dtype, momentum):
    optimizer = ours(on_meta(shapes, getattr(torch, dtype)), policy, momentum)
    optimizer._init_group(optimizer.param_groups[0], [], [], [])  # what a step begins with; the rest takes its time
    rule = rules.Adafactor(factoring=policy, momentum=momentum)
    assert planned(shapes, rule, dtype).state == state_bytes(optimizer)


@pytest.mark.parametrize("shapes", SMALL.values(), ids=SMALL)
@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
@pytest.mark.parametrize("momentum", [name for name in rules.MOMENTUM if name != "int8"])
@pytest.mark.parametrize("least", [1, 16])
def test_ours_after_a_real_step(shapes, dtype, momentum, least):
    params = [torch.nn.Parameter(torch.ones(shape, dtype=getattr(torch, dtype))) for shape in shapes.values()]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = ours(params, "smallest", momentum, least)
    optimizer.step()
    rule = rules.Adafactor(factoring="smallest", momentum=momentum, min_dim_size_to_factor=least)
    assert planned(shapes, rule, dtype).state == state_bytes(optimizer)


def ours(params, policy, momentum, least=1):
    options = {"factoring": policy, "min_dim_size_to_factor": least}
    if momentum is not None:
        # As the plan has it, "float32" is the default: like the statistics.
        stored = None if momentum == "float32" else getattr(torch, momentum)
        options |= {"beta1": 0.9, "momentum_dtype": stored}
    return adafactor.torch.Adafactor(params, **options)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_compensated(dtype):
    params = [torch.nn.Parameter(torch.ones(shape, dtype=getattr(torch, dtype))) for shape in SMALL["T5"].values()]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = adafactor.torch.Adafactor(params, compensated=True)
    optimizer.step()
    assert planned(SMALL["T5"], rules.Adafactor(compensated=True), dtype).state == state_bytes(optimizer)


def test_int8_momentum_has_a_scale_per_256_elements():
    slots = rules.Adafactor(momentum="int8").slots(plan([(3, 257)]).parameters[0])
    assert slots == {"step": 8, "row": 12, "column": 4 * 257, "momentum": 771, "momentum_scale": 16}
    if torch.int8 in MOMENTUM_DTYPES:
        params = [torch.nn.Parameter(torch.ones(shape)) for shape in SMALL["U-Net"].values()]
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer = adafactor.torch.Adafactor(params, beta1=0.9, momentum_dtype=torch.int8)
        optimizer.step()
        assert planned(SMALL["U-Net"], rules.Adafactor(momentum="int8")).state == state_bytes(optimizer)


def test_scalars_vectors_empty_and_frozen_tensors():
    params = [torch.nn.Parameter(torch.ones(shape)) for shape in [(), (5,), (0, 4), (3, 4)]]
    params[3].requires_grad_(False)
    for p in params[:3]:
        p.grad = torch.ones_like(p)
    optimizer = adafactor.torch.Adafactor(params)
    optimizer.step()
    found = plan(params, optimizers=[rules.Adafactor()])
    assert found.usages[0].state == state_bytes(optimizer)
    assert (found.usages[0].weights, found.usages[0].gradients) == (4 * (1 + 5 + 12), 4 * (1 + 5))


def test_bitsandbytes_keeps_what_its_source_says():
    shapes = [(64, 64), (4095,), (4097,), (1000, 1000)]
    (usage,) = plan(shapes, optimizers=[rules.AdamW8bit()]).usages
    # From `Optimizer2State.init_state` of bitsandbytes 0.50.2, called on the same shapes.
    assert usage.state == (2 * 4096 + 8 * 16) + 8 * 4095 + (2 * 4097 + 8 * 17) + (2_000_000 + 8 * 3907) + 2 * 1024
    if importlib.util.find_spec("bitsandbytes"):
        import bitsandbytes

        params = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
        optimizer = bitsandbytes.optim.AdamW8bit(params)
        for number, p in enumerate(params):
            optimizer.init_state(optimizer.param_groups[0], p, 0, number)
        tensors = {id(t): t for values in optimizer.state.values() for t in values.values() if torch.is_tensor(t)}
        assert usage.state == sum(t.numel() * t.element_size() for t in tensors.values())


def test_transformers_models_have_these_shapes():
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForImageClassification,
        GemmaConfig,
        LlamaConfig,
        T5Config,
        T5ForConditionalGeneration,
        ViTConfig,
    )

    gemma = GemmaConfig(
        vocab_size=256000, hidden_size=2048, intermediate_size=16384, num_hidden_layers=18, num_attention_heads=8,
        num_key_value_heads=1, head_dim=256,
    )  # fmt: skip
    with torch.device("meta"):
        models = {
            "Llama 2 7B": AutoModelForCausalLM.from_config(LlamaConfig()),
            "Gemma 2B": AutoModelForCausalLM.from_config(gemma),
            "T5 small": T5ForConditionalGeneration(T5Config()),
            "ViT-B/16": AutoModelForImageClassification.from_config(ViTConfig(num_labels=1000)),
        }
    for name, model in models.items():
        shapes, count = PUBLIC[name]
        named = dict(model.named_parameters())
        assert sorted(tuple(p.shape) for p in named.values()) == sorted(shapes.values()), name
        if not name.startswith("ViT"):
            assert {key: tuple(p.shape) for key, p in named.items()} == shapes
        assert plan(named).size == count


# -- FSDP2 -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def mesh():
    """Four ranks of which only the first is there: its collectives return at once."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    yield init_device_mesh("cpu", (4,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("momentum", [None, "bfloat16"])
def test_a_rank_of_fsdp2_holds_what_the_plan_says(mesh, policy, momentum):
    shapes = SMALL["U-Net"] | {"odd": (7, 9), "few": (3, 40), "stack": (6, 5, 4), "vector": (10,)}
    params = []
    for shape in shapes.values():
        p = torch.nn.Parameter(distribute_tensor(torch.ones(shape), mesh, [Shard(0)], src_data_rank=None))
        p.grad = distribute_tensor(torch.ones(shape), mesh, [Shard(0)], src_data_rank=None)
        params.append(p)
    optimizer = ours(params, policy, momentum)
    preparation, groups = optimizer._preparation, optimizer.param_groups
    for members, k in preparation.collect(groups, [(0, None)]).places:  # a whole step needs ranks that answer
        draft = members.draft(k)
        shard = dtensor.sharded(draft.param, draft, {}, lambda param, layout: None)
        optimizer.state[draft.param].update(shard.kept)
    usage = planned(shapes, rules.Adafactor(factoring=policy, momentum=momentum), shards=4)
    assert usage.state == state_bytes(optimizer)
    assert usage.weights == usage.gradients == sum(4 * p.to_local().numel() for p in params)
    matrix = optimizer.state[params[list(shapes).index("odd")]]
    assert matrix["row"].placements == (Shard(0),)
    assert matrix["column"].placements == (Replicate(),)


def test_the_peers_over_fsdp2(mesh):
    shapes = {"odd": (7, 9), "vector": (10,), "few": (3, 40)}

    def sharded():
        params = [torch.nn.Parameter(distribute_tensor(torch.ones(s), mesh, [Shard(0)])) for s in shapes.values()]
        for p in params:
            p.grad = torch.ones_like(p)
        return params

    optimizer = torch.optim.AdamW(sharded(), fused=True)
    optimizer.step()
    assert planned(shapes, rules.TorchAdamW(), shards=4).state == state_bytes(optimizer)
    with pytest.raises(RuntimeError, match="placement"):  # why the plan leaves it out
        torch.optim.Adafactor(sharded()).step()


# -- gradient release and temporaries ----------------------------------------------------------------------------------


def peak(optimizer):
    """Bytes that a step holds at most above what is there before and after it."""
    return peak_of(optimizer.step)


def peak_of(step):
    step()  # state is made here
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = top = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        top = max(top, held)
    return top


def test_gradient_release_holds_the_largest_gradient():
    layers = [torch.nn.Linear(256, 256, bias=False) for _ in range(6)]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(256, 1024, bias=False))
    optimizer = adafactor.torch.Adafactor(model.named_parameters())
    adafactor.torch.step_in_backward(model, optimizer)
    released, whole = (
        planned(dict(model.named_parameters()), rules.Adafactor(release=release)).gradients for release in (True, False)
    )
    assert (released, whole) == (4 * 256 * 1024, 4 * (256 * 1024 + 6 * 256 * 256))
    x = torch.ones(1, 256)
    measured = peak_of(lambda: model(x).sum().backward())
    assert released <= measured < 1.1 * released + 65536  # activations of one example, and one small gradient's start


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("momentum", [None, "float32", "bfloat16"])
def test_temporaries_of_torch_operations(dtype, momentum, monkeypatch):
    monkeypatch.setattr("adafactor.engine.torch.blocks.CPU_BLOCK", 1 << 18)
    monkeypatch.setattr(rules, "DEVICE_BLOCK", 1 << 18)
    shapes = [(512, 1024), (300, 1024), (1024,), (128, 16, 3, 3)]
    params = [torch.nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in shapes]
    for p in params:
        p.grad = torch.ones_like(p)
    options = {} if momentum is None else {"beta1": 0.9, "momentum_dtype": getattr(torch, momentum)}
    measured = peak(adafactor.torch.Adafactor(params, fused=False, **options))
    (usage,) = plan(params, optimizers=[rules.Adafactor(momentum=momentum, triton=False)]).usages
    assert measured <= usage.temporaries <= 2 * measured


@pytest.mark.parametrize("model", ["Llama layer", "Llama", "GPT-2", "LoRA", "convolutions"])
def test_temporaries_of_the_triton_kernels(model):
    """Against the tables that the kernels get, which no parameter has to exist for."""
    from adafactor.engine.torch.triton import table

    shapes = {
        "Llama layer": LLAMA_LAYER, "Llama": [*LLAMA_LAYER * 32, (32000, 4096), (32000, 4096)], "GPT-2": GPT2_SMALL,
        "LoRA": LORA, "convolutions": [(512, 256, 3, 3), (64, 3, 7, 7), (512,)] * 9,
    }[model]  # fmt: skip
    forms = [canonical(layout(shape)) for shape in shapes]
    launches = [
        table.Launch(
            table.tile_of(form) if form.factored else None, "float32", "float32", "", True, False, False, False,
            True, not form.factored, False, None, False,
        )
        for form in forms
    ]  # fmt: skip
    sizes = table.tables(list(map(table.Tensor, forms, launches))).sizes
    needed = 4 * (sizes["sums"] + 3 * sizes["partials"] + sizes["squares"] + sizes["roots"])
    (usage,) = plan(shapes, optimizers=[rules.Adafactor()]).usages
    assert 0.8 * needed <= usage.temporaries <= 1.2 * needed
    if model == "Llama":
        assert usage.temporaries < 0.006 * usage.weights
    whole = plan(shapes, optimizers=[rules.Adafactor()])
    assert whole.without_triton().usages[0].temporaries != usage.temporaries


def test_torch_operations_need_no_more_than_the_peer():
    """A model of 41 M parameters once needed 269 MB."""
    shapes = transformer(512, 12, 5000)
    ours, peer = plan(shapes, optimizers=[rules.Adafactor(triton=False), rules.TorchAdafactor()]).usages
    assert ours.temporaries <= 4 * 3 * (1 << 22)
    assert ours.temporaries < 50e6 < peer.weights


def test_temporaries_of_the_peers():
    shapes = [(512, 1024), (300, 1024), (1024,)]
    params = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
    for p in params:
        p.grad = torch.ones_like(p)
    found = plan(params, optimizers=[rules.TorchAdamW(), rules.TorchAdafactor()])
    adamw, torch_adafactor = (usage.temporaries for usage in found.usages)
    assert adamw == 0
    assert peak(torch.optim.AdamW(params, fused=True)) < 1000
    assert peak(torch.optim.Adafactor(params)) == pytest.approx(torch_adafactor, rel=0.01)


# -- files that torch.save wrote ---------------------------------------------------------------------------------------


def test_a_state_dict_is_read_with_tied_weights_once(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 8)).bfloat16()
    state = model.state_dict()
    state["tied"] = state["0.weight"]
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "model.pt")
    found = {p.name: p for p in read(tmp_path / "model.pt")}
    assert set(found) == set(model.state_dict())
    assert found["0.weight"].shape == (4, 8)
    assert found["0.weight"].dtype == "bfloat16"
    assert not next(p for p in plan(tmp_path / "model.pt").parameters if p.dtype == "int64").trained


def test_what_torch_cannot_load_safely_is_refused_in_one_sentence(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")  # a pickled class, which could run code
    torch.save([torch.ones(2)], tmp_path / "list.pt")
    torch.save({"w": torch.ones(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    whole = tmp_path / "whole.pt"
    torch.save({"w": torch.ones(1000)}, whole)
    (tmp_path / "cut.pt").write_bytes(whole.read_bytes()[:2000])
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(tmp_path / "hollow.pt", "w") as target:
        for info in source.infolist():
            if not info.filename.endswith("data/0"):  # the weights themselves are gone
                target.writestr(info.filename, source.read(info))
    for name in ("module.pt", "list.pt", "old.pt", "cut.pt", "hollow.pt"):
        with pytest.raises(Refused, match=r"^[^\n]* must be [^\n]*\.$"):
            read(tmp_path / name)
