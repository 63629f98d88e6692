"""GOHSP on a user's own data: DeiT-Tiny fine-tuned to imagewoof-160, against the ways it should beat.

    python benchmarks/imagewoof.py --weights deit_tiny_patch16_224.safetensors --data hfds/imagewoof-160

Every arm starts from the same dense model and gets the same epochs:

- ``gohsp``: the recipe as it stands; it also trains the dense model for as many epochs (``dense_retrained``);
- ``random``: the same with the ranking replaced by a random one;
- ``oneshot``: method ``finetune``, all of ADMM's epochs given to fine-tuning;
- ``uniform``: the recipe with the same share of every width;
- ``plain``: the same, and ADMM in the metric of weight norms, which repairs nothing.

A finished arm is not run again; an interrupted one goes on after its last epoch. What measured widths and repairs are
worth to method ``gohsp`` at two budgets, from the dense model of a run before (one line):

    python benchmarks/imagewoof.py --weights ... --data ... --recipe recipes/imagewoof_short.toml
        --dense runs/imagewoof/params=-40%/seed0/gohsp/dense --arms gohsp uniform plain --budget params=-60%
        --skip-retraining --out runs/imagewoof_short --results benchmarks/results/imagewoof_short.json
"""

from __future__ import annotations

import argparse
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import gohsp
from gohsp import Config
from gohsp import config as configs
from gohsp.report import Report, read
from gohsp.structure import Widths
from shared import RESULTS, data_name, even_widths, parser, read_results, say, write_results

ARMS = ("gohsp", "random", "oneshot", "uniform", "plain")


def arm_config(config: Config, arm: str, *, trained: bool) -> Config:
    """The settings of an arm, which takes a ``trained`` dense model or trains one."""
    if trained:
        config = replace(config, dense=replace(config.dense, epochs=0), model_arguments={})
    if arm == "gohsp":
        return config
    config = replace(config, compare_dense=False)
    if arm == "random":
        return replace(config, ranking=replace(config.ranking, method="random"))
    if arm == "oneshot":
        total = config.admm.epochs + config.finetune.epochs
        return replace(config, method="finetune", finetune=replace(config.finetune, epochs=total))
    return replace(config, admm=replace(config.admm, metric="norm")) if arm == "plain" else config


def widths_of(options: argparse.Namespace, config: Config, arm: str, model: str | Path) -> Widths | None:
    """Even widths for the arms that do without measured ones."""
    if arm not in ("uniform", "plain"):
        return None
    return even_widths(gohsp.describe(gohsp.open_model(model)), options.budget, config.widths)


def run_arm(options: argparse.Namespace, config: Config, arm: str, folder: Path) -> Report:
    """Run an arm, unless its report is there already; an interrupted one goes on."""
    out = folder / arm
    if (out / "report.json").exists():
        return read(out)
    first = arm == "gohsp" and options.dense is None
    model = options.model if first else options.dense or folder / "gohsp" / "dense"
    return gohsp.run(
        model,
        options.data,
        options.budget,
        out,
        config=arm_config(config, arm, trained=not first),
        weights=options.weights if first else None,
        widths=widths_of(options, config, arm, model),
        resume=out.exists(),
        command=["benchmarks/imagewoof.py", "--arms", arm, "--seeds", str(config.seed)],
    ).report


def record_of(found: Report) -> dict[str, Any]:
    """What is worth keeping of a report."""
    report = found.model_dump(mode="json")
    keep = ("seed", "budget", "dense", "dense_retrained", "pruned", "timings", "machine", "versions", "equality")
    record = {key: report[key] for key in keep}
    record["plan"] = report["plan"]["pruned"]
    if admm := report["admm"]:
        record["admm"] = {k: v for k, v in admm.items() if k != "trace"} | {"last": admm["trace"][-1]}
    record["after_cut_top1"] = (report["curves"]["admm"] or [{"top1": None}])[-1]["top1"]
    return record


def command_of(options: argparse.Namespace) -> str:
    """The command line without the folders of one machine."""
    words = ["python", "benchmarks/imagewoof.py", "--weights", options.weights.name]
    words += ["--data", data_name(options.data), "--recipe", str(options.recipe), "--budget", options.budget]
    words += ["--arms", *options.arms]
    words += ["--dense", str(options.dense)] if options.dense else []
    return shlex.join(words + ["--skip-retraining"] * options.skip_retraining)


def main() -> None:
    """Run all arms and seeds, writing the results after each."""
    arguments = parser(__doc__)
    arguments.add_argument("--model", default="deit_tiny_patch16_224")
    arguments.add_argument("--weights", type=Path, required=True)
    arguments.add_argument("--data", required=True)
    arguments.add_argument("--budget", default="params=-40%")
    arguments.add_argument("--recipe", type=Path, default=Path("recipes/imagewoof_deit_tiny.toml"))
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS[:3])
    arguments.add_argument("--dense", type=Path, help="folder of a dense model to start from, instead of training one")
    arguments.add_argument("--skip-retraining", action="store_true", help="leave out the dense model trained as long")
    arguments.add_argument("--out", type=Path, default=Path("runs/imagewoof"))
    arguments.add_argument("--results", type=Path, default=RESULTS / "imagewoof.json")
    options = arguments.parse_args()
    config = configs.read(options.recipe)
    if options.skip_retraining:
        config = replace(config, compare_dense=False)
    for seed in options.seeds:
        for arm in options.arms:
            seeded = replace(config, seed=seed)
            report = run_arm(options, seeded, arm, options.out / options.budget / f"seed{seed}")
            results = read_results(options.results, {"commands": [], "recipe": configs.to_mapping(config), "runs": {}})
            if command_of(options) not in results["commands"]:
                results["commands"].append(command_of(options))
            results["runs"].setdefault(f"{options.budget} seed={seed}", {})[arm] = record_of(report)
            write_results(options.results, results)
            retrained = f", retrained {report.dense_retrained.top1:.2f} %" if report.dense_retrained else ""
            say(
                f"seed {seed} {arm}: {report.pruned.params:,} parameters, top-1 {report.pruned.top1:.2f} % "
                f"(dense {report.dense.top1:.2f} %{retrained})"
            )


if __name__ == "__main__":
    main()
