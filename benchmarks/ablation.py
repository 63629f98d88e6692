"""What each choice of the methods that train is worth: one thing changed at a time, the same dense model and epochs.

    pip install 'gohsp[hf,bench]'
    python benchmarks/ablation.py --data hfds/cifar10                          # after cifar10.py, one GPU
    python benchmarks/ablation.py --data hfds/cifar10 --fewer-heads 2

``ADMM`` is the recipe as it stands. ``no ADMM``, method ``finetune``, gives its epochs to fine-tuning; every other arm
changes the settings that it is named after. Where the budget takes no whole head, rankings have no say; so
``--fewer-heads`` compares them, with plans that take so many heads of every block and nothing else. Scores on held-out
training images are what a default may be chosen by; the test split is read for the record only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

import gohsp
from comparison import gohsp_model, key_of, opened, opened_results, parser_of, record_of, results_file, variant
from gohsp import Config
from gohsp.structure import SublayerWidths
from shared import changed, params_of, say, write_results

ARMS: dict[str, dict[str, Any]] = {
    "ADMM": {},
    "no ADMM": {},
    "one stage of allocation": {"widths.stages": 1},
    "whole sub-layers may go": {"widths.depth": True},
    "coupled penalty": {"admm.penalty": "coupled"},
    "rho to 0.03": {"admm.rho_end": 0.03},
    "rho to 0.3": {"admm.rho_end": 0.3},
    "interval 2": {"admm.interval": 2},
    "interval 32": {"admm.interval": 32},
    "metric: activation": {"admm.metric": "activation"},
    "metric: norm": {"admm.metric": "norm"},
    "no distillation": {"training.distillation": 0.0},
}
HEAD_ARMS: dict[str, dict[str, Any]] = {
    "ADMM": {},
    "no guidance": {"repair.guidance": 0.0},
    "ranking alone": {"repair.guidance": 1.0},
    "random ranking alone": {"repair.guidance": 1.0, "ranking.method": "random"},
    "edges: KL": {"ranking.edge": "kl"},
    "edges: similarity": {"ranking.edge": "similarity"},
    "edges: cosine": {"ranking.edge": "cosine"},
    "edges: CKA": {"ranking.edge": "cka"},
    "a graph a layer": {"ranking.scope": "layer"},
}


def with_changes(settings: Any, changes: Mapping[str, Any]) -> Any:
    """A frozen dataclass with fields replaced, nested ones by dotted names."""
    for name, value in changes.items():
        field, _, rest = name.partition(".")
        inner = with_changes(getattr(settings, field), {rest: value}) if rest else value
        settings = replace(settings, **{field: inner})
    return settings


def arm_config(config: Config, arm: str) -> Config:
    """The settings of an arm."""
    config = with_changes(config, (ARMS | HEAD_ARMS)[arm])
    return variant(config, "no-ADMM") if arm == "no ADMM" else config


def with_fewer_heads(model: nn.Module, count: int) -> tuple[str, dict[str, SublayerWidths]]:
    """Widths with ``count`` heads of every attention gone, and the budget that they just meet."""
    present = gohsp.describe(model).widths
    widths = changed(present, lambda field, now: now - count if field == "heads" else now)
    return f"params={params_of(model, widths)}", widths


def main() -> None:
    """Run what is not in the results yet, writing them after each arm."""
    parser = parser_of(
        __doc__,
        model="vit_small_patch16_224",
        recipe=Path("recipes/cifar10_vit_small.toml"),
        test_split="test",
        budgets=["params=-60%"],
    )
    parser.add_argument("--fewer-heads", type=int, help="compare rankings: heads that every block loses")
    parser.add_argument("--arms", nargs="+", choices=ARMS | HEAD_ARMS)
    options = parser.parse_args()
    bench, dense = opened(options)
    file = results_file(options, "ablation_")
    results = opened_results(file, options, bench, "ablation")
    if options.fewer_heads is not None:
        budget, widths = with_fewer_heads(dense, options.fewer_heads)
        cuts, arms = [(f"{options.fewer_heads} head(s) a block less", budget, widths)], HEAD_ARMS
    else:
        cuts, arms = [(budget, budget, None) for budget in options.budgets], ARMS
    for label, budget, widths in cuts:
        for arm in options.arms or arms:
            key = key_of(arm, label, options.seed)
            if key in results["runs"]:
                continue
            model = gohsp_model(bench, dense, f"ablation/{arm}", arm_config(bench.config, arm), budget, widths)
            results["runs"][key] = record_of(bench, model) | {"arm": arm, "budget": label}
            write_results(file, results)
            say(f"{key}: held-out top-1 {results['runs'][key]['held_out_top1']:.2f} %")


if __name__ == "__main__":
    main()
