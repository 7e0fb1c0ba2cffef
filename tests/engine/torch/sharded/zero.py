"""What the ranks of test_zero.py run: DeepSpeed's engine beside one process, or beside the very gradients it made."""

from __future__ import annotations

import os
import warnings
from typing import Any

import fsdp1
import torch
from torch import Tensor

from adafactor.torch import Adafactor

warnings.filterwarnings("ignore")
ARGUMENTS: dict[str, Any] = {"lr": 0.1, "beta1": 0.9}


def engine(
    rank: int, world: int, stage: int, net: torch.nn.Module, arguments: dict[str, Any] | None = None, **config: Any
) -> Any:
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29777"}
    import deepspeed

    accumulation = config.get("gradient_accumulation_steps", 1)
    settings = {
        "train_micro_batch_size_per_gpu": 12 // world // accumulation,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0,  # 1 if nobody says so
        **config,
    }
    optimizer = Adafactor(net.parameters(), **(arguments or ARGUMENTS))
    return deepspeed.initialize(model=net, optimizer=optimizer, config=settings, dist_init_required=False)[0]


def backward(made: Any, rank: int, world: int, batch: tuple[Tensor, Tensor], accumulation: int = 1) -> None:
    """Everything up to the update: the rank's part of the batch, in so many pieces."""
    dtype = next(made.module.parameters()).dtype
    pieces = zip(*(t.chunk(world)[rank].chunk(accumulation) for t in batch), strict=True)
    for k, (x, y) in enumerate(pieces):
        made.backward(fsdp1.loss(made, x.to(dtype), y.to(dtype)))
        if k < accumulation - 1:
            made.step()


def whole(made: Any) -> dict[str, Tensor]:
    from deepspeed.utils import safe_get_full_fp32_param

    return {
        name: safe_get_full_fp32_param(param).clone().view(_shape(param))
        for name, param in made.module.named_parameters()
    }


def _shape(param: Any) -> tuple[int, ...]:
    return tuple(getattr(param, "ds_shape", param.shape))


def train(rank: int, world: int, stage: int, steps: int = 20, **config: Any) -> dict[str, Any]:
    """The distance from an optimizer of whole parameters: given the same gradients where they were rounded."""
    from deepspeed.utils import safe_get_full_grad

    made = engine(rank, world, stage, fsdp1.model(), **config)
    reference = fsdp1.model()
    optimizer = Adafactor(reference.parameters(), **ARGUMENTS)
    half = any(kind in config for kind in ("bf16", "fp16"))
    if half:  # what the master weights were made of
        with torch.no_grad():
            for param, value in zip(reference.parameters(), whole(made).values(), strict=True):
                param.copy_(value)
    for batch in fsdp1.batches(steps):
        backward(made, rank, world, batch, config.get("gradient_accumulation_steps", 1))
        optimizer.zero_grad()
        if half:
            for ours, theirs in zip(reference.parameters(), made.module.parameters(), strict=True):
                ours.grad = safe_get_full_grad(theirs).float().clone().view_as(ours)
        else:
            fsdp1.loss(reference, *batch).backward()
            if config.get("gradient_clipping"):
                torch.nn.utils.clip_grad_norm_(reference.parameters(), config["gradient_clipping"])
        optimizer.step()
        made.step()
    expected = {name: param.detach() for name, param in reference.named_parameters()}
    states = made.optimizer.optimizer.state.values()
    slots = sorted({slot for held in states for slot in held})
    held = sum(tensor.nbytes for its in states for tensor in its.values())
    return {"distance": fsdp1.distance(whole(made), expected), "state": slots, "bytes": held}


def save(rank: int, world: int, stage: int, folder: str, kill: bool) -> None:
    """Ten steps and a checkpoint; then one more step, and a checkpoint in which the last rank ends."""
    made = engine(rank, world, stage, fsdp1.model())
    for number, batch in enumerate(fsdp1.batches(11)):
        if number == 10:
            made.save_checkpoint(folder, tag="ten")
        backward(made, rank, world, batch)
        made.step()
    if kill:
        write = torch.save

        def dying(value: Any, file: Any, *rest: Any, **named: Any) -> None:
            if rank == world - 1 and "optim" in str(getattr(file, "name", file)):
                os._exit(9)
            write(value, file, *rest, **named)

        torch.save = dying
        made.save_checkpoint(folder, tag="eleven")


def save_ten(rank: int, world: int, stage: int, folder: str) -> None:
    made = engine(rank, world, stage, fsdp1.model(), {"lr": 0.1})
    for batch in fsdp1.batches(10):
        backward(made, rank, world, batch)
        made.step()
    made.save_checkpoint(folder, tag="ten")


def resume_elsewhere(rank: int, world: int, stage: int, folder: str) -> float:
    """Weights by the engine, statistics from any rank's file: ZeRO itself loads on as many ranks only."""
    made = engine(rank, world, stage, fsdp1.model(), {"lr": 0.1})
    made.load_checkpoint(folder, tag="ten", load_module_only=True)
    file = f"{folder}/ten/zero_pp_rank_0_mp_rank_00_optim_states.pt"
    saved = torch.load(file, weights_only=False)["optimizer_state_dict"]["base_optimizer_state"]
    made.optimizer.optimizer.load_state_dict(saved)
    for batch in fsdp1.batches(20)[10:]:
        backward(made, rank, world, batch)
        made.step()
    return fsdp1.distance(whole(made), fsdp1.alone(20, lr=0.1))


def resume(rank: int, world: int, stage: int, folder: str) -> float:
    made = engine(rank, world, stage, fsdp1.model())
    path, _ = made.load_checkpoint(folder, tag="ten")
    assert path is not None
    for batch in fsdp1.batches(20)[10:]:
        backward(made, rank, world, batch)
        made.step()
    return fsdp1.distance(whole(made), fsdp1.alone(20, **ARGUMENTS))
