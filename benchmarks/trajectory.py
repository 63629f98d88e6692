"""Ways to a deep cut with long training: at once, in steps with training between them, and by ADMM.

    pip install 'gohsp[hf,bench]'
    python benchmarks/trajectory.py --data hfds/cifar10 --weights deit_tiny_patch16_224.safetensors --tune
    python benchmarks/trajectory.py --data hfds/cifar10 --weights deit_tiny_patch16_224.safetensors
    python benchmarks/trajectory.py --data hfds/cifar10 --weights deit_tiny_patch16_224.safetensors --seed 1

Every way ends at the widths that method ``oneshot`` chooses, and gets as many epochs as the recipe's ADMM and
fine-tuning together, with the dense model as teacher:

- ``at once``: cut and repaired, then trained;
- ``in steps``: a fourth of every cut at a time, each with a fourth of the epochs behind it, in which the rate falls;
- ``ADMM``: the recipe, method ``gohsp``;
- ``ADMM, weak heads harder``: the pull on a head's weights depends on its rank in the whole model. On the weakest it is
  four times as strong and grows four times as fast, on the strongest it is as in ``ADMM``.

``--tune`` tries two learning rates for each at the first budget and reads the held-out images alone. Without it, the
rate that they chose trains each to every budget, and the test split is read at the end.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from torch import nn

import gohsp
from comparison import (
    Bench,
    gohsp_model,
    key_of,
    opened,
    opened_results,
    parser_of,
    record_of,
    results_file,
    variant,
)
from gohsp.core import admm
from gohsp.structure import FIELDS, SublayerWidths, Widths
from shared import parameters, say, write_results

RATES = (1e-4, 3e-4)
CUTS = 4
HARDER = 4.0


def with_rate(bench: Bench, rate: float) -> Bench:
    """All stages behind the dense model at one learning rate."""
    stages = {
        "admm": replace(bench.config.admm, learning_rate=rate),
        "finetune": replace(bench.config.finetune, learning_rate=rate),
    }
    return replace(bench, config=replace(bench.config, **stages))


def widths_at(bench: Bench, dense: nn.Module, budget: str) -> Widths:
    """What every way cuts to."""
    return gohsp.describe(gohsp_model(bench, dense, "one-shot", variant(bench.config, "oneshot"), budget)).widths


def at_once(bench: Bench, dense: nn.Module, name: str, budget: str) -> nn.Module:
    """Cut and repaired, then trained."""
    widths = widths_at(bench, dense, budget)
    return gohsp_model(bench, dense, name, variant(bench.config, "no-ADMM"), budget, widths)


def by_admm(bench: Bench, dense: nn.Module, name: str, budget: str) -> nn.Module:
    """Method ``gohsp``."""
    return gohsp_model(bench, dense, name, bench.config, budget, widths_at(bench, dense, budget))


def in_steps(bench: Bench, dense: nn.Module, name: str, budget: str) -> nn.Module:
    """A part of every cut at a time, each followed by its part of the epochs."""
    full, least = gohsp.describe(dense).widths, widths_at(bench, dense, budget)
    stage = replace(bench.config.finetune, epochs=bench.extra().epochs // CUTS)
    model, cut = dense, variant(bench.config, "oneshot")
    for number in range(1, CUTS + 1):
        widths = {of: part_of_the_way(full[of], least[of], number / CUTS) for of in full}
        step = f"{name}, step {number}, {budget}"
        model = gohsp_model(bench, model, step, cut, f"params={parameters(model) - 1}", widths)
        bench.fit(f"{step} seed={bench.seed}", model, stage, dense, bench.seed + number)
    return model


def part_of_the_way(full: SublayerWidths, least: SublayerWidths, part: float) -> SublayerWidths:
    """Widths between two; what is to be absent is so at the end alone."""
    if part == 1:
        return least
    between = {
        field: max(1, round(getattr(full, field) - part * (getattr(full, field) - getattr(least, field))))
        for field in (FIELDS[kind] for kind in full.kinds)
    }
    return replace(full, **between)


def weak_heads_harder(bench: Bench, dense: nn.Module, name: str, budget: str) -> nn.Module:
    """Method ``gohsp`` with a further pull before each of ADMM's on the weights of weak heads."""
    plain = admm.after_step

    def after_step(state: admm.AdmmState, progress: float) -> admm.AdmmState:
        pull_harder(state, progress)
        return plain(state, progress)

    with mock.patch.object(admm, "after_step", after_step):
        return by_admm(bench, dense, name, budget)


@torch.no_grad()
def pull_harder(state: admm.AdmmState, progress: float) -> None:
    """What the pull on weak heads has over that on all."""
    assert state.scores is not None
    ordered = sorted(score for scores in state.scores.values() for score in scores)
    for sub in state.network.attentions:
        scores = state.scores[sub.name]
        weakness = [1 - ordered.index(score) / (len(ordered) - 1) for score in scores]
        pull = torch.tensor([_pull(state, progress, 1 + (HARDER - 1) * weak) for weak in weakness])
        for entry, weight in state.weights[sub.name].items():
            if entry != sub.readout.bias_slice:
                units = pull.repeat_interleave(weight.shape[entry.axis] // len(scores))
                shape = [-1 if axis == entry.axis else 1 for axis in range(weight.dim())]
                weight.lerp_(state.anchors[sub.name][entry], units.to(weight).reshape(shape))


def _pull(state: admm.AdmmState, progress: float, times: float) -> float:
    """The pull that, with ADMM's own, makes one ``times`` as strong that grows ``times`` as fast, up to 0.9."""
    whole = min(0.9, times * admm.rho_at(state.settings, times * progress))
    return 1 - (1 - whole) / (1 - state.rho) if whole > state.rho else 0.0


Way = Callable[[Bench, nn.Module, str, str], nn.Module]
WAYS: dict[str, Way] = {
    "at once": at_once,
    "in steps": in_steps,
    "ADMM": by_admm,
    "ADMM, weak heads harder": weak_heads_harder,
}


def tune(
    bench: Bench, dense: nn.Module, budget: str, tuned: dict[str, dict[str, float]], save: Callable[[], None]
) -> None:
    """Held-out accuracy of every way at every rate."""
    for way, make in WAYS.items():
        of = tuned.setdefault(way, {})
        for rate in RATES:
            if str(rate) not in of:
                model = make(with_rate(bench, rate), dense, f"{way}, {rate}", budget)
                of[str(rate)] = bench.score(model.to(bench.device), bench.held_out).top1
                save()
                say(f"{way}, rate {rate}: {of[str(rate)]:.2f} % of held-out images")


def main() -> None:
    """Run what is not in the results yet, writing them after each."""
    arguments = parser_of(
        __doc__,
        model="deit_tiny_patch16_224",
        recipe=Path("recipes/cifar10_deep.toml"),
        test_split="test",
        budgets=["params=-75%", "params=-85%"],
    )
    arguments.add_argument("--tune", action="store_true", help="try learning rates, on held-out images")
    options = arguments.parse_args()
    bench, dense = opened(options)
    file = results_file(options)
    results = opened_results(file, options, bench, "trajectory")
    tuned = results.setdefault("held_out_top1_by_rate", {})
    results["runs"].setdefault("start", record_of(bench, dense))
    write_results(file, results)
    if options.tune:
        tune(bench, dense, options.budgets[0], tuned, lambda: write_results(file, results))
        return
    if missing := [way for way in WAYS if len(tuned.get(way, {})) < len(RATES)]:
        sys.exit(f"no learning rates are chosen yet for {', '.join(missing)}; first call with --tune")
    for budget in options.budgets:
        for way, make in WAYS.items():
            key = key_of(way, budget, options.seed)
            if key in results["runs"]:
                continue
            rate = max(RATES, key=lambda rate: tuned[way][str(rate)])
            model = make(with_rate(bench, rate), dense, f"{way}, {rate}", budget)
            results["runs"][key] = record_of(bench, model) | {"learning_rate": rate}
            write_results(file, results)
            say(f"{key}: {results['runs'][key]}")


if __name__ == "__main__":
    main()
