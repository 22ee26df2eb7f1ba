"""The full-size runs behind the table of generative models: `end_to_end.py TABLE.csv [SECONDS [CASE ...]]`.

Cases come in the order of what they tell; none is begun when the seconds are over.
"""

from __future__ import annotations

import argparse
import gc
import os
import time
import traceback
from typing import Any

import torch

from vicinal.bench.e2e import measure
from vicinal.bench.e2e_result import save
from vicinal.integrations.diffusers import sparsify
from vicinal.integrations.diffusers.zoo import specimen

CASES: tuple[dict[str, Any], ...] = (
    {"name": "flux", "dense_steps": 9, "steps": 28},
    {"name": "hunyuan-video", "dense_steps": 15, "steps": 50},
    {"name": "cosmos-predict2-2b"},
    {"name": "wan-14b"},
    {"name": "cosmos-7b", "dense_steps": 12, "steps": 35},
    {"name": "ltx2-decoder", "grid": (16, 34, 60)},
    {"name": "hunyuan-video", "grid": (33, 45, 80), "window": {"kernel_size": (18, 24, 24)}},
    {"name": "hunyuan-video", "window": {"kernel_size": (18, 24, 24)}},
    {"name": "ltx2-decoder", "grid": (4, 16, 24)},
    {"name": "ltx2-decoder", "grid": (8, 16, 24)},
    {"name": "ltx2-decoder", "grid": (16, 22, 40)},
)


def check() -> None:
    """The backend that is chosen here against the portable one, on two whole blocks in 16 bits."""
    found = specimen("flux")
    model = found.build(device="cuda", dtype=torch.bfloat16, layers=4)
    arguments = found.arguments(model, (37, 50))
    outputs = []
    for backend in ("", "blocked"):
        os.environ["VICINAL_BACKEND"] = backend
        with torch.no_grad(), sparsify(model, (12, 15), stride=(4, 1)):
            outputs.append(model(**arguments, return_dict=False)[0].double())
    os.environ.pop("VICINAL_BACKEND")
    with torch.no_grad():
        dense = model(**arguments, return_dict=False)[0].double()
    difference, felt = ((other - outputs[1]).norm() / outputs[1].norm() for other in (outputs[0], dense))
    print(f"flux, 4 blocks: backends differ by {difference:.2e}, dense attention by {felt:.2e}")
    assert difference < felt / 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", help="a CSV to append to")
    parser.add_argument("seconds", nargs="?", type=float, default=1e9, help="no case is begun after that many")
    parser.add_argument("cases", nargs="*", type=int, help=f"only these, by number from 0 to {len(CASES) - 1}")
    asked = parser.parse_args()
    if not set(asked.cases) <= set(range(len(CASES))):
        parser.error(f"cases must be numbers from 0 to {len(CASES) - 1}, got {asked.cases}")
    if not torch.cuda.is_available():
        parser.error("these models need a GPU; vicinal e2e MODEL --tiny runs anywhere")
    begin = time.perf_counter()
    if not asked.cases:
        check()
    for case in [CASES[number] for number in asked.cases] or CASES:
        if time.perf_counter() - begin > asked.seconds:
            print(f"no time for {case}")
            continue
        try:
            result = measure(**case, repeats=1, device="cuda")
        except Exception:
            traceback.print_exc()
            result = None
        if result is not None:
            save(asked.table, [result])
            print(f"{result}\n({time.perf_counter() - begin:.0f} s so far)\n", flush=True)
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
