"""Method oneshot on DeiT-Tiny, by the first edition of gohsp and by this one, in turns on one machine.

    git worktree add ../first c344c94
    GOHSP_ASSETS=../shared python benchmarks/editions.py --first ../first

Each run is the command line's, in a process of its own, with the curves of no other run. Processor time, of all
threads, is what other work on the machine does not change much. Training images of
imagenet-1k-mini without labels calibrate. Top-1 is on the validation images of imagenet-1k-mini and of
imagenet-1k-broad, 2,278 together; the held-out divergence is the run's own, on the same 50 images. A run that stands
in the results is not made again.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import gohsp
from shared import (
    RESULTS,
    asset,
    machine,
    parameters,
    parser,
    read_results,
    say,
    scores_on_both,
    sets_of_both,
    versions,
    write_results,
)

BUDGETS = ("params=4.0M", "params=3.06M")
MAIN = "import sys; from gohsp.cli import main; sys.exit(main())"
METHOD = {"first": ("--route", "oneshot"), "this": ("--method", "oneshot")}


def pruned(source: Path, edition: str, budget: str, seed: int, out: Path) -> tuple[float, float]:
    """Prune with the code in ``source``; returns wall time and processor time in seconds."""
    command = [sys.executable, "-c", MAIN, "prune", "deit_tiny_patch16_224", *METHOD[edition]]
    command += ["--weights", str(asset("models/deit_tiny_patch16_224.safetensors"))]
    command += ["--data", f"hfds/{asset('data/imagenet-1k-mini')}", "--seed", str(seed)]
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory() as cache:
        subprocess.run(
            [*command, "--budget", budget, "--out", str(out)],
            env=os.environ | {"PYTHONPATH": str(source.resolve()), "GOHSP_CACHE": cache},
            stdout=subprocess.DEVNULL,
            check=True,
        )
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def row(source: Path, edition: str, budget: str, seed: int) -> dict[str, Any]:
    """Prune and score once."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        seconds, processor = pruned(source, edition, budget, seed, out)
        report: dict[str, Any] = json.loads((out / "report.json").read_text())
        model = gohsp.load(out)
    fidelity = report["fidelity"]
    return {
        "params": parameters(model),
        "top1": scores_on_both(model, sets_of_both(model)),
        "divergence": fidelity.get("distance", fidelity.get("kl")),
        "seconds": round(seconds, 1),
        "processor_seconds": round(processor, 1),
        "steps": report["timings"],
    }


def main() -> None:
    """Make all runs, both editions of a draw one after the other, writing the results after each."""
    arguments = parser(__doc__)
    arguments.add_argument("--first", type=Path, required=True, help="a checkout of the first edition")
    arguments.add_argument("--budgets", nargs="+", default=BUDGETS)
    arguments.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
    arguments.add_argument("--results", type=Path, default=RESULTS / "editions.json")
    options = arguments.parse_args()
    header = {"machine": machine(), "versions": versions()}
    results = read_results(options.results, {**header, "runs": {}})
    if {name: results[name] for name in header} != header:
        sys.exit(f"{options.results} is of another machine or version; give another file with --results")
    sources = {"first": options.first / "src", "this": Path(gohsp.__file__).parents[1]}
    weights = asset("models/deit_tiny_patch16_224.safetensors")
    if "dense" not in results:
        dense = gohsp.open_model("deit_tiny_patch16_224", weights=weights)
        results["dense"] = scores_on_both(dense, sets_of_both(dense))
    for budget, seed, edition in product(options.budgets, options.seeds, sources):
        key = f"{edition} {budget} seed={seed}"
        if key in results["runs"]:
            continue
        results["runs"][key] = row(sources[edition], edition, budget, seed)
        write_results(options.results, results)
        found = results["runs"][key]
        say(f"{key}: {found['top1']['both']} %, divergence {found['divergence']:.3f}, {found['seconds']:.0f} s")


if __name__ == "__main__":
    main()
