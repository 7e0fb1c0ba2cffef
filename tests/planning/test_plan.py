"""`adafactor.plan` on plain data: what is counted, what is divided by shards, what is refused."""

import pytest

from adafactor import Factored, plan
from adafactor.planning import Adafactor, Parameter, TorchAdamW, on_host
from adafactor.planning import optimizers as rules
from adafactor.planning.zero import partition

SHAPES = {"layer.0.kernel": (512, 256), "layer.0.bias": (256,), "layer.1.kernel": (256, 512), "scale": ()}
SIZE = 512 * 256 * 2 + 256 + 1


def usage(shapes, rule=None, **options):
    (found,) = plan(shapes, optimizers=[rule or Adafactor()], **options).usages
    return found


def test_the_paper_in_bytes():
    found = usage([(4096, 4096)])
    assert (found.weights, found.gradients, found.state) == (4 * 4096**2, 4 * 4096**2, 4 * 2 * 4096 + 8)
    assert usage([(4096, 4096)], rules.TorchAdamW()).state == 8 * 4096**2 + 4


@pytest.mark.parametrize(
    ("policy", "numbers"), [("last_two", 9 * 512 * 6), ("largest_two", 9 * 512 * 2), ("smallest", 5120)]
)
def test_policies_keep_what_the_layout_says(policy, numbers):
    shape = (3, 3, 512, 512) if policy != "last_two" else (512, 512, 3, 3)
    expected = 512 * 512 * 6 if policy == "last_two" else numbers
    assert usage([shape], Adafactor(factoring=policy)).state == 4 * expected + 8


def test_a_callable_factoring_is_asked_by_name():
    def rule(name, shape):
        return Factored(rows=(1,), columns=(2,), batch=(0,)) if name == "experts" else None

    found = usage({"experts": (8, 16, 4), "rest": (3, 3)}, Adafactor(factoring=rule))
    assert found.state == (4 * 8 * (16 + 4) + 8) + (4 * 9 + 8)


@pytest.mark.parametrize(("dtype", "itemsize"), [("float32", 4), ("bfloat16", 2), ("float16", 2), ("float64", 8)])
def test_dtype_is_that_of_weights_and_gradients(dtype, itemsize):
    found = usage(SHAPES, dtype=dtype)
    assert found.weights == found.gradients == itemsize * SIZE
    statistics = 512 + 256 + 256 + 512 + 256 + 1
    assert found.state == (8 if dtype == "float64" else 4) * statistics + 4 * 8


def test_gradient_release_keeps_the_largest():
    assert usage(SHAPES, Adafactor(release=True)).gradients == 4 * 512 * 256
    # FSDP2 reduces a layer's gradients together.
    assert usage(SHAPES, Adafactor(release=True), shards=4).gradients == 4 * (128 * 256 + 64)


def test_frozen_and_integer_tensors_are_weights_only():
    tensors = [Parameter("a.w", (10, 10)), Parameter("b.w", (5, 5)), Parameter("ids", (7,), "int64")]
    found = plan(tensors, frozen=["a.*"], dtype="bfloat16", optimizers=[Adafactor()])
    assert found.size == 25
    assert found.usages[0].gradients == 50
    assert found.usages[0].weights == 2 * 125 + 8 * 7  # frozen weights take the dtype, integers keep theirs
    assert [p.trained for p in found.parameters] == [False, True, False]


def test_shards_divide_dimension_0_and_replicate_what_does_not_have_it():
    found = usage({"matrix": (10, 7), "vector": (3,), "scalar": ()}, shards=4)
    assert found.weights == 4 * (3 * 7 + 1 + 1)
    assert found.state == 4 * (3 + 7) + 4 * 1 + 4 * 1 + 3 * 8


def test_optimizers_that_cannot_be_sharded_are_left_out():
    labels = {one.optimizer.label for one in plan([(8, 8)], shards=2).usages}
    assert not labels & {"torch.optim.Adafactor", "keras.optimizers.Adafactor", "adafactor, last_two, momentum int8"}
    assert "torch.optim.AdamW(fused=True)" in labels


@pytest.mark.parametrize("framework", ["keras", "jax"])
def test_optimizers_that_all_are_left_out_are_one_sentence(framework):
    with pytest.raises(ValueError, match=r"optimizers must be some that step over FSDP2's parameters, got .*\.$"):
        plan(SHAPES, shards=2, framework=framework)
    with pytest.raises(ValueError, match=r"step over ZeRO's partitions, got .*\.$"):
        plan(SHAPES, framework=framework, optimizers=[rules.KerasAdamW(), rules.OptaxAdamW()]).under_zero(1)


def test_what_fsdp_gathers_is_the_largest_layer():
    assert plan(SHAPES).gathered == 4 * (512 * 256 + 256)
    assert plan({"embed.weight": (1000, 1000), "h.0.a": (2, 2), "h.1.a": (2, 2)}).gathered == 4_000_000


def test_total_and_order():
    found = plan(SHAPES)
    assert [p.name for p in found.top(2)] == ["layer.0.kernel", "layer.1.kernel"]
    for one in found.usages:
        assert one.total == one.weights + one.gradients + one.state + (one.temporaries or 0)


@pytest.mark.parametrize("framework", rules.FRAMEWORKS)
def test_every_row_has_its_own_label(framework):
    labels = [one.optimizer.label for one in plan(SHAPES, framework=framework).usages]
    assert len(set(labels)) == len(labels) >= 5
    assert not [usage for usage in plan([], framework=framework).usages if usage.total > 8]  # Keras's two scalars


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        ([(4, -1)], {}, "integers >= 0"),
        ([(4, 2.0)], {}, "integers >= 0"),
        ([(True, 2)], {}, "integers >= 0"),
        ([(2**62, 4)], {}, r"fewer than 2\*\*63 bytes"),
        ([(2**61,), (2**61,)], {}, r"fewer than 2\*\*63 bytes"),
        ([(1,) * 65], {}, "rank <= 64"),
        ([5], {}, "a shape or a tensor"),
        (["x"], {}, "a shape or a tensor"),
        (SHAPES, {"dtype": "int8"}, "float32"),
        (SHAPES, {"shards": 0}, ">= 1"),
        (SHAPES, {"shards": 1.5}, "an integer"),
    ],
)
def test_refusals_are_one_sentence(arguments, options, words):
    with pytest.raises((TypeError, ValueError), match=rf"^[^\n]* must be [^\n]*{words}[^\n]*, got [^\n]*\.$"):
        plan(arguments, **options)


@pytest.mark.parametrize("options", [{"momentum": "int4"}, {"framework": "mxnet"}, {"factoring": "first_two"}])
def test_rules_refuse_what_no_optimizer_takes(options):
    with pytest.raises(ValueError, match="must be"):
        Adafactor(**options)


def test_zero_partitions_hold_what_flat_shards_keep():
    # 100 x 30 and a vector of 7, cut at 1504: rows 0 to 50 on one rank, 50 to 99 and the vector on the other.
    found = plan({"matrix": (100, 30), "vector": (7,)}, dtype="bfloat16", shards=2).under_zero(2)
    ours = next(usage for usage in found.usages if usage.optimizer == Adafactor())
    assert partition(found.trained, 2, 2) == 1504
    assert ours.weights == 2 * 3007 + 4 * 1504
    assert ours.gradients == 2 * 1504
    assert ours.state == 4 * (50 + 30 + 7) + 2 * 8
    assert ours.temporaries == 4 * 1504
    adamw = next(usage for usage in found.usages if isinstance(usage.optimizer, TorchAdamW))
    assert adamw.state == 8 * 1504 + 4
    third = next(u for u in plan([(100, 30)], shards=3).under_zero(3).usages if u.optimizer == Adafactor())
    assert third.weights == 8 * 1000
    assert third.state == 4 * (34 + 30) + 8
    with pytest.raises(ValueError, match="stage must be 1, 2 or 3"):
        found.under_zero(4)


def test_the_host_holds_masters_and_the_bus_carries_each_weight_twice():
    masters, own = on_host(plan([(100, 30), (7,)], dtype="bfloat16"), bus=1e6, memory=1e9)
    assert masters.host == 4 * 3007 + 4 * (130 + 7) + 16 + 6000
    assert own.host == 2 * 3007 + 4 * (130 + 7) + 16 + 6000
    assert masters.bus == own.bus == 2 * 3007
    assert masters.device == 2 * 3007 + 2 * 3007
    assert own.seconds == pytest.approx(4 * 3007 / 1e6 + 12 * 3007 / 1e9)
    assert len(on_host(plan([(8, 8)]), 1e9, 1e9)) == 1
