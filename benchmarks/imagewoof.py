"""GOHSP on a user's own data: DeiT-Tiny fine-tuned to imagewoof-160, against the ways it should beat.

    python benchmarks/imagewoof.py --weights deit_tiny_patch16_224.safetensors --data hfds/imagewoof-160

Every arm starts from the same dense model and gets the same epochs:

- ``gohsp``: the recipe as it stands; it also trains the dense model for as many epochs (``dense_retrained``);
- ``random``: the same with the ranking replaced by a random one;
- ``oneshot``: no ADMM stage, all its epochs given to fine-tuning;
- ``magnitude``: uniform widths, weakest weight norms cut, nothing repaired, then all epochs of fine-tuning;
- ``uniform``: the recipe with uniform widths;
- ``plain``: the recipe with uniform widths and ADMM in the Euclidean metric, which repairs nothing.

A finished arm is not run again; an interrupted one goes on after its last epoch. What measured widths and repairs are
worth to the training route at two budgets, from the dense model of a run before (one line):

    python benchmarks/imagewoof.py --weights ... --data ... --recipe recipes/imagewoof_short.toml
        --dense runs/imagewoof/params=-40%/seed0/gohsp/dense --arms gohsp uniform plain --budget params=-60%
        --skip-retraining --out runs/imagewoof_short --results benchmarks/results/imagewoof_short.json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import gohsp
from gohsp import recipe as recipes
from gohsp.report import read

ARMS = ("gohsp", "random", "magnitude", "oneshot", "uniform", "plain")


def arm_recipe(recipe: gohsp.Recipe, arm: str, *, trained: bool) -> gohsp.Recipe:
    """The recipe of an arm, which takes a ``trained`` dense model or trains one."""
    if trained:
        recipe = dataclasses.replace(recipe, dense=dataclasses.replace(recipe.dense, epochs=0), model_arguments={})
    if arm == "gohsp":
        return recipe
    recipe = dataclasses.replace(recipe, retrain_dense=False)
    if arm == "random":
        return dataclasses.replace(recipe, ranking=dataclasses.replace(recipe.ranking, method="random"))
    projection = gohsp.ProjectionSettings(metric="euclidean", strength="norm", guidance=0.0)
    plain = dataclasses.replace(
        recipe, allocation="uniform", admm=dataclasses.replace(recipe.admm, projection=projection)
    )
    if arm in ("uniform", "plain"):
        return plain if arm == "plain" else dataclasses.replace(recipe, allocation="uniform")
    total = recipe.admm_stage.epochs + recipe.finetune.epochs
    return dataclasses.replace(
        plain if arm == "magnitude" else recipe,
        admm_stage=dataclasses.replace(recipe.admm_stage, epochs=0),
        finetune=dataclasses.replace(recipe.finetune, epochs=total),
    )


def run_arm(options: argparse.Namespace, recipe: gohsp.Recipe, arm: str, folder: Path) -> dict[str, Any]:
    """Run an arm, unless its report is there already; returns the report."""
    out = folder / arm
    if (out / "report.json").exists():
        return read(out)
    first = arm == "gohsp" and options.dense is None
    result = gohsp.prune(
        options.model if first else options.dense or folder / "gohsp" / "dense",
        options.data,
        options.budget,
        out,
        recipe=arm_recipe(recipe, arm, trained=not first),
        weights=options.weights if first else None,
        resume=out.exists(),
        command=["benchmarks/imagewoof.py", "--arms", arm, "--seeds", str(recipe.seed)],
    )
    return result.report


def record_of(report: dict[str, Any]) -> dict[str, Any]:
    """What is worth keeping of a report."""
    keep = ("seed", "budget", "dense", "dense_retrained", "pruned", "timings", "machine", "versions", "equality")
    record = {key: report[key] for key in keep if key in report}
    record["plan"] = report["plan"]["pruned"]
    if admm := report.get("admm"):
        record["admm"] = {k: v for k, v in admm.items() if k != "trace"} | {"last": admm["trace"][-1]}
    record["after_cut_top1"] = (report["curves"].get("admm") or [{"top1": None}])[-1]["top1"]
    return record


def command_of(options: argparse.Namespace) -> str:
    """The command line without the folders of one machine."""
    words = ["python", "benchmarks/imagewoof.py", "--weights", options.weights.name]
    words += ["--data", f"hfds/{Path(options.data).name}", "--recipe", str(options.recipe), "--budget", options.budget]
    words += ["--arms", *options.arms]
    words += ["--dense", str(options.dense)] if options.dense else []
    return shlex.join(words + ["--skip-retraining"] * options.skip_retraining)


def main() -> None:
    """Run all arms and seeds, writing the results after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--budget", default="params=-40%")
    parser.add_argument("--recipe", type=Path, default=Path("recipes/imagewoof_deit_tiny.toml"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS[:4])
    parser.add_argument("--dense", type=Path, help="folder of a dense model to start from, instead of training one")
    parser.add_argument("--skip-retraining", action="store_true", help="leave out the dense model trained as long")
    parser.add_argument("--out", type=Path, default=Path("runs/imagewoof"))
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/imagewoof.json"))
    options = parser.parse_args()
    recipe = recipes.read(options.recipe)
    if options.skip_retraining:
        recipe = dataclasses.replace(recipe, retrain_dense=False)
    for seed in options.seeds:
        for arm in options.arms:
            seeded = dataclasses.replace(recipe, seed=seed)
            report = run_arm(options, seeded, arm, options.out / options.budget / f"seed{seed}")
            results = json.loads(options.results.read_text()) if options.results.exists() else {}
            results.setdefault("commands", [])
            if command_of(options) not in results["commands"]:
                results["commands"].append(command_of(options))
            results.setdefault("recipe", recipes.to_mapping(recipe))
            results.setdefault("runs", {}).setdefault(f"{options.budget} seed={seed}", {})[arm] = record_of(report)
            options.results.write_text(json.dumps(results, indent=1) + "\n")
            sys.stdout.write(
                f"seed {seed} {arm}: {report['pruned']['params']:,} parameters, top-1 {report['pruned']['top1']:.2f} % "
                f"(dense {report['dense']['top1']:.2f} %, "
                f"retrained {report.get('dense_retrained', {}).get('top1', float('nan')):.2f} %)\n"
            )


if __name__ == "__main__":
    main()
