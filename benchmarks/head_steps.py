"""DeiT-Tiny without 25, 50 and 75 % of its heads, taken out in the order of a ranking made once or in steps.

    GOHSP_ASSETS=../shared python benchmarks/head_steps.py

Each ranking reads 256 training images of imagenet-1k-mini, without labels. The weakest heads of the whole model go.
``zeroed``: what readouts take of them is 0, and nothing is repaired; ``repaired``: half of the heads are cut and the
others refitted on 500 images (``gohsp.cut``), once or, in one row, after each step of its ranking. A row tells the
distance from the dense model's predictions on 250 other training images, by which settings are chosen, and top-1 on the
validation images of imagenet-1k-mini and imagenet-1k-broad, 2,278 together. A row that stands in the results is not
made again.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import gohsp
from gohsp import Config, Network, structure
from gohsp.config import RankingSettings
from gohsp.structure import Widths
from shared import (
    RESULTS,
    asset,
    drawn,
    machine,
    parser,
    read_results,
    say,
    scores_on_both,
    sets_of_both,
    transform_of,
    versions,
    write_results,
)

SHARES = (0.25, 0.5, 0.75)
REPAIRED_AT = 0.5
STEPS = (1, 12)
REPAIRED_BETWEEN = "gradients, in 12 steps, repaired after each"
REPAIRED_ON, OTHERS = 500, 250
"""Training images; the first 256 rank."""

Head = tuple[str, int]


def rankings() -> dict[str, RankingSettings]:
    """Rankings by name; what is drawn at random is drawn anew with every seed."""
    made = {REPAIRED_BETWEEN: RankingSettings(damping=0.0)}
    for steps in STEPS:
        how = "once" if steps == 1 else f"in {steps} steps"
        for damping in (0.0, 0.1, 0.3, 0.85):
            name = f"graph, d = {damping}" if damping else "gradients"
            made[f"{name}, {how}"] = RankingSettings(steps=steps, damping=damping)
        for edge in ("kl", "similarity", "cosine"):
            made[f"graph, {edge}, {how}"] = RankingSettings(steps=steps, edge=edge)
        made[f"least-squares residual, {how}"] = RankingSettings(steps=steps, damping=0.0, teleport="fisher_residual")
    made["magnitude"] = RankingSettings(damping=0.0, teleport="weight_norm")
    return made | {f"random {seed}": RankingSettings(method="random") for seed in range(5)}


def gone(ranking: gohsp.HeadRanking, share: float) -> set[Head]:
    """The weakest heads of the model."""
    scores = {(name, head): score for name, of in ranking.scores.items() for head, score in enumerate(of)}
    return set(sorted(scores, key=scores.__getitem__)[: round(share * len(scores))])


def zeroed(dense: nn.Module, network: Network, heads: set[Head]) -> nn.Module:
    """A copy whose readouts take nothing of some heads."""
    model = copy.deepcopy(dense)
    for sub in network.attentions:
        columns = model.get_parameter(sub.readout.columns.parameter).data.unflatten(1, (sub.widths.heads, -1))
        columns[:, [head for name, head in heads if name == sub.name]] = 0
    return model


def widths_without(network: Network, heads: set[Head]) -> Widths:
    """Widths of a network without some heads; an attention without any is gone."""
    widths = dict(network.widths)
    for sub in network.attentions:
        left = sub.widths.heads - sum(name == sub.name for name, _ in heads)
        widths[sub.name] = replace(sub.widths, heads=left) if left else structure.absent(sub.widths)
    return widths


def repaired(
    dense: nn.Module, widths: Widths, images: Sequence[Tensor], config: Config, ranking: gohsp.HeadRanking
) -> nn.Module:
    """Those heads cut that the ranking names, and the others refitted."""
    alone = replace(config, repair=replace(config.repair, guidance=1.0))
    made = gohsp.cut(dense, images, widths, ranking=ranking, config=alone)
    return gohsp.compact(made.model, made.kept, images[0][:2]).model


@torch.no_grad()
def predictions(model: nn.Module, images: Sequence[Tensor]) -> Tensor:
    """Log-probabilities."""
    return torch.cat([model.eval()(batch).log_softmax(-1) for batch in images])


@dataclass(frozen=True)
class Case:
    """A model without some of its heads, and what it is measured by.

    Attributes:
        dense: The model.
        images: Training images, of which the first 256 rank and all repair.
        others: Other training images, for the distance from the dense model's predictions.
        top1: Accuracy in percent.
        trained: Trains a repaired model for an epoch, in place; None where there are too few images for one.
    """

    dense: nn.Module
    images: Sequence[Tensor]
    others: Sequence[Tensor]
    top1: Callable[[nn.Module], float]
    trained: Callable[[nn.Module], nn.Module] | None = None


def config_of(settings: RankingSettings, seed: int) -> Config:
    """Ranking by some settings, repair on all images."""
    config, held = Config(ranking=settings, seed=seed), -(-REPAIRED_ON // 20)
    return replace(config, calibration=replace(config.calibration, images=REPAIRED_ON - held, holdout=held))


def row(case: Case, settings: RankingSettings, seed: int) -> dict[str, Any]:
    """Rank once, and take heads out to every share."""
    network, config = gohsp.describe(case.dense), config_of(settings, seed)
    began = time.process_time()
    ranking = gohsp.rank(case.dense, case.images, config=config)
    found: dict[str, Any] = {"processor_seconds": round(time.process_time() - began, 1)}
    expected = predictions(case.dense, case.others)
    without = {share: gone(ranking, share) for share in SHARES}
    for share, heads in without.items():
        found[f"zeroed {share}"] = measured(case, zeroed(case.dense, network, heads), expected)
    small = repaired(case.dense, widths_without(network, without[REPAIRED_AT]), case.images, config, ranking)
    return found | measured_repaired(case, small, expected)


def repaired_between(case: Case, settings: RankingSettings) -> dict[str, Any]:
    """Take a twelfth of the heads out at a time, refit the others, and rank those anew."""
    config, model, expected = config_of(settings, 0), case.dense, predictions(case.dense, case.others)
    steps, total = max(STEPS), sum(sub.widths.heads for sub in gohsp.describe(case.dense).attentions)
    for _ in range(round(REPAIRED_AT * steps)):
        ranking = gohsp.rank(model, case.images, config=config)
        going = gone(ranking, (total // steps) / sum(map(len, ranking.scores.values())))
        model = repaired(model, widths_without(gohsp.describe(model), going), case.images, config, ranking)
    return measured_repaired(case, model, expected)


def measured_repaired(case: Case, model: nn.Module, expected: Tensor) -> dict[str, Any]:
    """A repaired model, as it is and trained."""
    found = {f"repaired {REPAIRED_AT}": measured(case, model, expected)}
    if case.trained:
        found[f"trained {REPAIRED_AT}"] = measured(case, case.trained(model), expected)
    return found


def measured(case: Case, model: nn.Module, expected: Tensor) -> dict[str, float]:
    """Distance from the dense model's predictions, and accuracy."""
    other = predictions(model, case.others)
    distance = functional.kl_div(other, expected, log_target=True, reduction="batchmean")
    return {"distance": round(float(distance), 4), "top1": case.top1(model)}


def make_rows(case: Case, names: Sequence[str], file: Path, header: Mapping[str, Any]) -> None:
    """Make the rows that are not in the results yet, writing them after each; other settings are refused.

    Every row names its machine: without bf16 units all is in float32.
    """
    results = read_results(file, {**header, "runs": {}})
    if {name: results[name] for name in header} != header:
        sys.exit(f"{file} is of other settings or another version; give another file with --results")
    results.setdefault("dense", case.top1(case.dense))
    for name in names:
        if name not in results["runs"]:
            settings, seed = rankings()[name], int(name.rpartition(" ")[2]) if name.startswith("random") else 0
            made = repaired_between(case, settings) if name == REPAIRED_BETWEEN else row(case, settings, seed)
            results["runs"][name] = made | {"machine": machine()}
            write_results(file, results)
            say(f"{name}: {results['runs'][name]}")


def main() -> None:
    """Make all rows."""
    arguments = parser(__doc__)
    arguments.add_argument("--rankings", nargs="+", choices=tuple(rankings()), default=tuple(rankings()))
    arguments.add_argument("--results", type=Path, default=RESULTS / "head_steps.json")
    options = arguments.parse_args()
    dense = gohsp.open_model("deit_tiny_patch16_224", weights=asset("models/deit_tiny_patch16_224.safetensors"))
    source, transform = f"hfds/{asset('data/imagenet-1k-mini')}", transform_of(dense)
    sets = {name: list(batches) for name, batches in sets_of_both(dense).items()}
    case = Case(
        dense,
        images=drawn(source, REPAIRED_ON, transform),
        others=drawn(source, OTHERS, transform, skip=REPAIRED_ON),
        top1=lambda model: scores_on_both(model, sets)["both"],
    )
    make_rows(case, options.rankings, options.results, {"versions": versions()})


if __name__ == "__main__":
    main()
