"""Draw the PyTorch step times: python benchmarks/figure.py build/bench/torch.json docs/torch-step.png"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

OURS = "adafactor.torch.Adafactor"
COLOURS = {OURS: "#1f77b4", f"{OURS}(stochastic_rounding)": "#7fb2d9", "the floor: g.sum() + p.add_(g)": "#bbbbbb"}
PEER = "#e08a3c"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="what torch_step.py --json wrote")
    parser.add_argument("target", type=Path, help="the picture to write")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = json.loads(arguments.source.read_text())
    cases = list(dict.fromkeys((row["mix"], row["dtype"]) for row in rows))
    columns = 2
    figure, axes = plt.subplots(
        -(-len(cases) // columns), columns, figsize=(12, 2.5 * -(-len(cases) // columns)), constrained_layout=True
    )
    for axis, (mix, dtype) in zip(axes.flat, cases, strict=True):
        chosen = [row for row in rows if (row["mix"], row["dtype"]) == (mix, dtype)][::-1]
        values = [row["ns_per_parameter"] for row in chosen]
        bars = axis.barh(
            [row["name"] for row in chosen], values, color=[COLOURS.get(row["name"], PEER) for row in chosen]
        )
        axis.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
        axis.set_xscale("log")
        axis.set_xlim(min(values) / 2, max(values) * 2.5)
        axis.set_title(f"{mix}, {dtype}", fontsize=10, loc="left")
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("ns per parameter and step, logarithmic", fontsize=9)
    figure.suptitle(f"One optimizer step on a CPU, {rows[0]['threads']} threads: less is better", fontsize=12)
    figure.savefig(arguments.target, dpi=110)


if __name__ == "__main__":
    main()
