"""How far sharded training ends from that of one process, beside fused AdamW: the table of docs/sharding.md.

python tests/helpers/agreement.py
python tests/helpers/agreement.py --ranks 2 --steps 50 --kinds FSDP2 TP
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import ranks

SHARDED = Path(__file__).parents[1] / "engine" / "torch" / "sharded"


def main() -> None:
    sys.path.insert(0, str(SHARDED))
    from models import KINDS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, metavar="KIND")
    asked = parser.parse_args()
    arguments = {"kinds": list(asked.kinds), "steps": asked.steps}
    found = ranks.run(str(SHARDED / "models.py"), "train", asked.ranks, limit=600, **arguments)[0]
    print("| layout | Adafactor, all parameters | AdamW | Adafactor, the farthest parameter | AdamW |")
    print("|---|---|---|---|---|")
    for kind in asked.kinds:
        (ours, our_worst), (adamw, adamw_worst) = found[f"{kind}: ours"], found[f"{kind}: adamw"]
        print(f"| {kind} | {ours:.1e} | {adamw:.1e} | {our_worst:.1e} | {adamw_worst:.1e} |")


if __name__ == "__main__":
    main()
