"""The launches of a step of the Triton kernels: what each is told, and of how many programs it is."""

from __future__ import annotations

from collections.abc import Callable, Container
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from adafactor.core.factoring import Cut
from adafactor.engine.torch import accelerator
from adafactor.engine.torch.triton import table
from adafactor.engine.torch.triton.table import Launch, Tile
from adafactor.engine.torch.triton.uploads import Uploaded

_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}


@cache
def _kernels() -> Any:
    """Imported with the first step: Triton is no part of importing this package."""
    from adafactor.engine.torch.triton import kernels

    return kernels


class Launches:
    """The launches of one step; `kernels.py` says what each does. They wait in ``queue`` for ``run``."""

    def __init__(self, tables: Uploaded, varying: Tensor, sums: Tensor) -> None:
        self._t, self._varying, self._sums, self._k = tables, varying, sums, _kernels()
        self._numbers = (tables.records, tables.numbers, varying, tables.scalars)
        self.queue: list[Callable[[], object]] = []
        self._lanes, self._shared = accelerator.lanes(tables.device), accelerator.shared_memory(tables.device)
        self._cap = {"maxnreg": table.REGISTERS} if self._lanes == 32 and torch.version.hip is None else {}

    def _launch(self, kernel: Any, programs: int, *args: Any, warps: int = 4, cap: bool = False, **words: Any) -> None:
        # Fused multiply-add is said aloud: a release of Triton that changes its default must not change the bits.
        words |= {
            "num_warps": max(1, warps * 32 // self._lanes),
            "enable_fp_fusion": True,
            **(self._cap if cap else {}),
        }
        self.queue.append(partial(kernel[(programs,)], *args, **words))

    def _read(self, launch: Launch) -> dict[str, Any]:
        """What kernels that read a gradient and a parameter are told."""
        k = self._k
        return {"PARAM": k.dtype(launch.param), "GRAD": k.dtype(launch.grad), "ALIGNED": launch.aligned}

    def _written(self, launch: Launch) -> dict[str, Any]:
        """What those are told besides that write the parameter."""
        momentum = self._k.dtype(launch.momentum) if launch.momentum else None
        rounding = {"STOCHASTIC": launch.stochastic, "COMPENSATED": launch.compensated}
        return {**self._read(launch), "MOMENTUM": momentum, **rounding}

    def run(self) -> None:
        for launch in self.queue:
            launch()
        self.queue.clear()

    def measure(self, known: Container[Launch], again: bool = False) -> None:
        """``known``: of which launches Σx² needs no reading. ``again``: only what lacked its row sums."""
        t, k, count = self._t, self._k, self._t.count
        if not again:
            rates = self._varying[count:].view(torch.float64)
            self._launch(k.begin, -(-count // 128), t.records, t.numbers, rates, t.scalars, count, BLOCK=128)
        for launch, blocks in t.measured.items():
            tile, scale, apart = launch.tile, launch.scale and launch not in known, launch.cut == "both"
            if again and not apart:
                continue
            if tile is None:
                told = {**self._read(launch), "BLOCK": table.FLAT_TILE, "SCALE": scale}
                self._launch(k.measure_flat, len(blocks), *self._numbers, blocks, t.partials, t.squares, **told)
                continue
            if tile.wide and not again:
                self._measure(launch, tile, k.TO_COME, scale and apart)
                told = {"NP": min(tile.NP, 32), "C": 32}
                self._launch(k.row_sums, len(blocks), t.records, self._varying, blocks, self._sums, **told)
            if again or not apart:
                self._measure(launch, tile, k.GIVEN if tile.wide else k.IN_TILE, scale and not again)

    def _measure(self, launch: Launch, tile: Tile, rows: Any, scale: bool) -> None:
        blocks = self._t.measured[launch]
        self._launch(
            self._k.measure, len(blocks), *self._numbers, blocks, self._sums, self._t.squares,
            K=tile.K, NP=tile.NP, M=tile.M, SCALE=scale, ROWS=rows.value, TRANSPOSED=launch.transposed,
            STAGES=tile.stages(self._shared, _SIZES[launch.grad], _SIZES[launch.param] * scale),
            **self._read(launch), warps=tile.warps, cap=tile.M >= 16,
        )  # fmt: skip

    def on_chip(self, known: Container[Launch], skipped: Tensor) -> None:
        for launch, blocks in self._t.on_chip.items():
            tile = launch.tile
            assert tile is not None
            self._launch(
                self._k.on_chip, len(blocks), *self._numbers, blocks, self._t.squares, skipped,
                NP=tile.NP, M=tile.M, FACTORED=not launch.flat, SCALE=launch.scale and launch not in known,
                **self._written(launch), warps=tile.warps, cap=tile.M >= 16,
            )  # fmt: skip

    def columns(
        self, cuts: Container[Cut | None], add: bool = True, finish: bool = True, matrix_sums: bool = False
    ) -> None:
        t = self._t
        for (K, P, C, cut), blocks in t.columns.items():
            if cut in cuts:
                self._launch(
                    self._k.columns, len(blocks), *self._numbers, blocks, self._sums, t.partials, t.roots,
                    K=K, P=P if add else 1, C=C, ADD=add, FINISH=finish, MATRIX_SUMS=matrix_sums,
                )  # fmt: skip

    def slices(self, measured: bool, finished: bool) -> None:
        t = self._t
        self._launch(
            self._k.slices, len(t.slices),
            t.records, self._varying, t.slices, t.partials, t.squares, t.roots, t.slice_sums,
            MEASURED=measured, FINISHED=finished, KB=16, TB=64, BLOCK=1024,
        )  # fmt: skip

    def finish(self, skipped: Tensor, count: bool) -> None:
        t = self._t
        written = t.moves, t.updated, skipped
        self._launch(self._k.finish, t.count, *self._numbers, t.slice_sums, *written, BLOCK=128, COUNT=count)

    def count(self, skipped: Tensor) -> None:
        t = self._t
        self._launch(self._k.count, t.count, t.records, self._varying, t.updated, skipped, warps=1)

    def apply(self) -> None:
        t, k = self._t, self._k
        for launch, blocks in t.applied.items():
            tensors = *self._numbers, blocks, self._sums, t.roots, t.moves, t.updated, t.squares
            words = {"HUGE": launch.huge, "PART": launch.part, "SQUARES": launch.keeps_squares}
            words |= self._written(launch)
            if launch.flat:
                words |= {"FACTORED": launch.tile is not None, "SLICED": launch.sliced}
                warps = 8 if launch.momentum == "int8" else 4
                self._launch(k.apply_flat, len(blocks), *tensors, BLOCK=table.FLAT_TILE, warps=warps, **words)
                continue
            assert launch.tile is not None
            tile = launch.tile
            stored = (launch.param, launch.grad, launch.momentum, "bfloat16" if launch.compensated else "")
            stages = tile.stages(self._shared, *(_SIZES[name] for name in stored if name))
            self._launch(
                k.apply, len(blocks), *tensors, K=tile.K, NP=tile.NP, M=tile.M, STAGES=stages,
                TRANSPOSED=launch.transposed, **words, warps=tile.warps, cap=tile.M >= 16,
            )  # fmt: skip
