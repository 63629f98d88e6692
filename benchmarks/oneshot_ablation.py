"""What each part of method oneshot is worth: DeiT-Tiny at one budget, each line adding one thing to the one before.

    python benchmarks/oneshot_ablation.py --weights deit_tiny_patch16_224.safetensors --data hfds/imagenet-1k-mini

Parts that no setting leaves out are taken from ``gohsp.core`` and ``gohsp.steps``. Images of the training split
calibrate, no label is read; top-1 is on the validation split. Measured widths are those that ``oneshot.py`` found,
which has to run first. A line that stands in the results is not run again.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

import gohsp
from gohsp import Config, steps
from gohsp.api import open_session
from gohsp.core import reconstruction, surgery
from gohsp.core.moments import Moments, collect_moments
from gohsp.core.projection import Metric, constrained, on_support, project, select_all
from gohsp.session import Session
from gohsp.structure import Kept, Network, Widths
from shared import (
    RESULTS,
    data_name,
    drawn,
    even_widths,
    parser,
    plan_of,
    read_results,
    say,
    scored,
    transform_of,
    write_results,
)

HELD_OUT = 50
"""Images behind the calibration images that choose how far healing goes."""


@dataclass(frozen=True)
class Setting:
    """What every line shares."""

    dense: nn.Module
    network: Network
    session: Session
    analysis: steps.Analysis

    @property
    def unrotated(self) -> Network:
        """The description of a network whose basis stays."""
        subs = tuple(
            replace(sub, rotatable=frozenset()) if hasattr(sub, "rotatable") else sub  # type: ignore[call-arg]
            for sub in self.network.sublayers
        )
        return replace(self.network, sublayers=subs)

    @property
    def evenly(self) -> steps.Analysis:
        """The analysis with all tokens weighing alike."""
        return replace(self.analysis, fisher={})


def chosen(setting: Setting, moments: Moments, widths: Widths, metric: Metric) -> Kept:
    """What a projection of every sub-layer alone keeps, in the model's own basis."""
    values = {sub.name: constrained(setting.dense, sub, metric) for sub in setting.network.present}
    guidance = 0.0 if metric == "norm" else setting.session.config.repair.guidance
    return select_all(
        setting.dense,
        setting.network,
        values,
        moments,
        widths,
        replace(setting.session.config.repair, guidance=guidance),
        metric=metric,
        scores=setting.analysis.ranking.scores,
    )


def masked(setting: Setting, widths: Widths, metric: Metric, *, refitted: bool = False) -> nn.Module:
    """Units gone; nothing repaired, or the others take over by the dense model's moments."""
    work, network = copy.deepcopy(setting.dense), setting.network
    moments = collect_moments(work, network, setting.session.calibration.images)
    kept = chosen(setting, moments, widths, metric)
    for sub in network.present if refitted else ():
        values = constrained(work, sub, metric)
        of = on_support(sub, values, moments[sub.name], kept[sub.name], setting.session.config.repair, metric=metric)
        for entry, value in project(of, values).items():
            values[entry].copy_(value)
    surgery.mask(work, network, kept)
    return work


def rebuilt(
    setting: Setting, widths: Widths, *, rotated: bool = True, weighed: bool = True, one_ridge: bool = True
) -> nn.Module:
    """Sub-layer by sub-layer against the dense residual stream; a ridge for each readout, or the same for all."""
    work = copy.deepcopy(setting.dense)
    network = setting.network if rotated else setting.unrotated
    analysis = setting.analysis if weighed else setting.evenly
    with patch.object(reconstruction, "cross_validated_ridge", fixed_ridge) if one_ridge else nullcontext():
        kept = steps.cut(setting.session, setting.dense, work, network, analysis, widths)
    return steps.compact(setting.session, work, kept).model


def fixed_ridge(_splits: Any, _fitted: Any, ridge: float) -> float:
    """In the place of cross-validation."""
    return ridge


def healed(setting: Setting, cut: nn.Module) -> nn.Module:
    """Blocks tuned on the calibration images, as far as held-out ones gain."""
    config = setting.session.config
    session = replace(setting.session, config=replace(config, heal=replace(config.heal, epochs=2)))
    steps.heal(session, setting.dense, cut, setting.network, setting.analysis)
    return cut


def lines(setting: Setting, budget: str, widths: Widths) -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Every line's name and what makes its model; ``widths`` are the measured ones."""
    even = even_widths(setting.network, budget, setting.session.config.widths)
    yield "magnitude, uniform widths", lambda: masked(setting, even, "norm")
    yield "+ OBS selection", lambda: masked(setting, even, "data")
    yield "+ refit", lambda: masked(setting, even, "data", refitted=True)
    yield "+ residual target", lambda: rebuilt(setting, even, rotated=False, weighed=False)
    yield "+ rotation", lambda: rebuilt(setting, even, weighed=False)
    yield "+ token weights", lambda: rebuilt(setting, even)
    yield "+ allocation", lambda: rebuilt(setting, widths)
    yield "+ cross-validated ridge", lambda: rebuilt(setting, widths, one_ridge=False)
    yield "+ healing", lambda: healed(setting, rebuilt(setting, widths, one_ridge=False))


def main() -> None:
    """Run all lines, writing the results after each."""
    arguments = parser(__doc__)
    arguments.add_argument("--model", default="deit_tiny_patch16_224")
    arguments.add_argument("--weights", type=Path, required=True)
    arguments.add_argument("--data", required=True)
    arguments.add_argument("--budget", default="params=4.0M")
    arguments.add_argument("--images", type=int, default=950)
    arguments.add_argument("--scored", type=int, help="validation images to score on; all, unless given")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--widths", type=Path, default=RESULTS / "oneshot_deit_tiny.json")
    arguments.add_argument("--results", type=Path, default=RESULTS / "oneshot_ablation_deit_tiny.json")
    options = arguments.parse_args()
    config = Config(seed=options.seed, precision="no")
    calibration = replace(config.calibration, images=options.images, holdout=HELD_OUT)
    dense = gohsp.open_model(options.model, weights=options.weights)
    images = drawn(options.data, options.images + HELD_OUT, transform_of(dense), seed=options.seed)
    session = open_session(dense, images, config=replace(config, calibration=calibration))
    network = gohsp.describe(dense)
    setting = Setting(dense, network, session, steps.analyse(session, dense, network))
    results = read_results(options.results, {"lines": {}})
    about = {"budget": options.budget, "images": options.images, "seed": options.seed}
    if results["lines"] and {key: results[key] for key in about} != about:
        sys.exit(f"{options.results} is of another budget, seed or number of images; give another file with --results")
    results |= {
        "command": f"python benchmarks/oneshot_ablation.py --weights {options.weights.name} "
        f"--data {data_name(options.data)}",
        **about,
        "torch": torch.__version__,
    }
    runs = json.loads(options.widths.read_text())["runs"]
    widths = plan_of(runs[f"{options.budget} seed={options.seed} images=1000"]["plan"])
    for name, make in lines(setting, options.budget, widths):
        if name in results["lines"]:
            continue
        began = time.perf_counter()
        model = make()
        seconds, top1 = time.perf_counter() - began, scored(model, options.data, count=options.scored).top1
        results["lines"][name] = {"top1": top1, "seconds": round(seconds, 1)}
        write_results(options.results, results)
        say(f"{name}: {top1:.1f} %, {seconds:.0f} s")


if __name__ == "__main__":
    main()
