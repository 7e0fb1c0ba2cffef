"""The launches of a step of the Triton kernels: what each is told, and of how many programs it is."""

from __future__ import annotations

from collections.abc import Callable, Container
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adafactor.core.factoring import Cut
from adafactor.engine.torch import accelerator, triton_table
from adafactor.engine.torch.triton_table import Launch

if TYPE_CHECKING:
    from adafactor.engine.torch.triton_uploads import Uploaded

_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}


@cache
def _kernels() -> Any:
    """Imported with the first step: Triton is no part of importing this package."""
    from adafactor.engine.torch import triton_kernels

    return triton_kernels


class Launches:
    """The launches of one step; `triton_kernels.py` says what each does. They wait in ``queue`` for ``run``."""

    def __init__(self, tables: Uploaded, varying: Tensor, sums: Tensor) -> None:
        self._t, self._varying, self._sums, self._k = tables, varying, sums, _kernels()
        self.queue: list[Callable[[], object]] = []
        self._lanes, self._shared = accelerator.lanes(tables.device), accelerator.shared_memory(tables.device)
        # Fused multiply-add is said aloud: a release of Triton that changes its default must not change the bits.
        self._common = {"enable_fp_fusion": True}
        self._capped = {"maxnreg": triton_table.REGISTERS} if self._lanes == 32 and torch.version.hip is None else {}

    def _warps(self, warps: int) -> dict[str, Any]:
        return {"num_warps": max(1, warps * 32 // self._lanes), **self._common}

    def _launch(self, kernel: Any, programs: int) -> Callable[..., None]:
        return lambda *args, **constants: self.queue.append(partial(kernel[(programs,)], *args, **constants))

    def run(self) -> None:
        for launch in self.queue:
            launch()
        self.queue.clear()

    def measure(self, known: Container[Launch], again: bool = False) -> None:
        """``known``: of which launches Σx² needs no reading. ``again``: only what lacked its row sums."""
        t, k, varying, count = self._t, self._k, self._varying, self._t.count
        if not again:
            rates = varying[count:].view(torch.float64)
            self._launch(k.begin, -(-count // 128))(
                t.records, t.numbers, rates, t.scalars, count, BLOCK=128, **self._warps(4)
            )  # fmt: skip
        for launch, blocks in t.measured.items():
            tile, scale, apart = launch.tile, launch.scale and launch not in known, launch.cut == "both"
            if again and not apart:
                continue
            if tile is None:
                self._launch(k.measure_flat, len(blocks))(
                    t.records, t.numbers, varying, t.scalars, blocks, t.partials, t.squares,
                    BLOCK=triton_table.FLAT_TILE, PARAM=k.dtype(launch.param), GRAD=k.dtype(launch.grad), SCALE=scale,
                    ALIGNED=launch.aligned, **self._warps(4),
                )  # fmt: skip
                continue
            if tile.wide and not again:
                self._measure(launch, k.TO_COME, scale and apart)
                self._launch(k.row_sums, len(blocks))(
                    t.records, varying, blocks, self._sums, NP=min(tile.NP, 32), C=32, **self._warps(4)
                )  # fmt: skip
            if again or not apart:
                self._measure(launch, k.GIVEN if tile.wide else k.IN_TILE, scale and not again)

    def _measure(self, launch: Launch, rows: Any, scale: bool) -> None:
        t, k, tile, blocks = self._t, self._k, launch.tile, self._t.measured[launch]
        assert tile is not None
        self._launch(k.measure, len(blocks))(
            t.records, t.numbers, self._varying, t.scalars, blocks, self._sums, t.squares,
            K=tile.K, NP=tile.NP, M=tile.M, PARAM=k.dtype(launch.param), GRAD=k.dtype(launch.grad),
            SCALE=scale, ROWS=rows.value, TRANSPOSED=launch.transposed, ALIGNED=launch.aligned,
            STAGES=tile.stages(self._shared, _SIZES[launch.grad], _SIZES[launch.param] * scale),
            **self._warps(tile.warps), **(self._capped if tile.M >= 16 else {}),
        )  # fmt: skip

    def on_chip(self, known: Container[Launch], skipped: Tensor) -> None:
        t, k = self._t, self._k
        for launch, blocks in t.held.items():
            tile = launch.tile
            assert tile is not None
            self._launch(k.on_chip, len(blocks))(
                t.records, t.numbers, self._varying, t.scalars, blocks, t.squares, skipped,
                NP=tile.NP, M=tile.M, FACTORED=not launch.flat, PARAM=k.dtype(launch.param), GRAD=k.dtype(launch.grad),
                MOMENTUM=k.dtype(launch.momentum) if launch.momentum else None, STOCHASTIC=launch.stochastic,
                COMPENSATED=launch.compensated, SCALE=launch.scale and launch not in known, ALIGNED=launch.aligned,
                **self._warps(tile.warps), **self._capped,
            )  # fmt: skip

    def totals(self, cuts: Container[Cut | None]) -> None:
        t = self._t
        for (K, P, C, cut), blocks in t.columns.items():
            if cut in cuts:
                self._launch(self._k.totals, len(blocks))(
                    t.records, self._varying, blocks, self._sums, K=K, P=P, C=C, **self._warps(4)
                )  # fmt: skip

    def columns(self, cut: Cut | None, totals: bool, matrix_sums: bool = False) -> None:
        t = self._t
        for (K, P, C, which), blocks in t.columns.items():
            if which == cut:
                self._launch(self._k.columns, len(blocks))(
                    t.records, t.numbers, self._varying, t.scalars, blocks, self._sums, t.partials, t.roots,
                    K=K, P=P, C=C, TOTALS=totals, MATRIX_SUMS=matrix_sums, **self._warps(4),
                )  # fmt: skip

    def slices(self, measured: bool, finished: bool) -> None:
        t = self._t
        self._launch(self._k.slices, len(t.slices))(
            t.records, self._varying, t.slices, t.partials, t.squares, t.roots, t.slice_sums,
            MEASURED=measured, FINISHED=finished, KB=16, TB=64, BLOCK=1024, **self._warps(4),
        )  # fmt: skip

    def finish(self, skipped: Tensor, count: bool) -> None:
        t = self._t
        self._launch(self._k.finish, t.count)(
            t.records, t.numbers, self._varying, t.scalars, t.slice_sums, t.moves, t.updated, skipped,
            BLOCK=128, COUNT=count, **self._warps(4),
        )  # fmt: skip

    def count(self, skipped: Tensor) -> None:
        t = self._t
        self._launch(self._k.count, t.count)(t.records, self._varying, t.updated, skipped, **self._warps(1))

    def apply(self) -> None:
        t, k = self._t, self._k
        tensors = (t.records, t.numbers, self._varying, t.scalars)
        buffers = (self._sums, t.roots, t.moves, t.updated, t.squares)
        for launch, blocks in t.applied.items():
            constants = {
                "PARAM": k.dtype(launch.param),
                "GRAD": k.dtype(launch.grad),
                "MOMENTUM": k.dtype(launch.momentum) if launch.momentum else None,
                "STOCHASTIC": launch.stochastic,
                "COMPENSATED": launch.compensated,
                "HUGE": launch.huge,
                "PART": launch.part,
                **({} if launch.flat else {"TRANSPOSED": launch.transposed}),
                "SQUARES": launch.keeps_squares,
                "ALIGNED": launch.aligned,
            }
            coded = launch.momentum == "int8"
            if launch.flat:
                factored, size = launch.tile is not None, triton_table.FLAT_TILE
                self._launch(k.apply_flat, len(blocks))(
                    *tensors, blocks, *buffers, BLOCK=size, FACTORED=factored, SLICED=launch.sliced, **constants,
                    **self._warps(8 if coded else 4),
                )  # fmt: skip
                continue
            assert launch.tile is not None
            tile = launch.tile
            stored = (launch.param, launch.grad, launch.momentum, "bfloat16" if launch.compensated else "")
            stages = tile.stages(self._shared, *(_SIZES[name] for name in stored if name))
            self._launch(k.apply, len(blocks))(
                *tensors, blocks, *buffers, K=tile.K, NP=tile.NP, M=tile.M, STAGES=stages, **constants,
                **self._warps(tile.warps), **(self._capped if tile.M >= 16 else {}),
            )  # fmt: skip
