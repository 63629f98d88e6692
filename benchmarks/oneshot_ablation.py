"""What each part of the one-shot route is worth: DeiT-Tiny at one budget, each line adding one thing to the one before.

    python benchmarks/oneshot_ablation.py --weights deit_tiny_patch16_224.safetensors --data hfds/imagenet-1k-mini

Images of the training split calibrate, no label is read; top-1 is on the validation split. Measured widths are those
that ``oneshot.py`` found, which has to run first. A line that stands in the results is not run again.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from gohsp import Recipe, data, models, opening
from gohsp.core import allocation, compensation, fisher, ranking, reconstruction, rotation, sensitivity, surgery
from gohsp.core.projection import ProjectionSettings, constrained, on_support, project, select
from gohsp.measure import evaluate
from gohsp.polish import PolishSettings, polish
from gohsp.structure import BlockShape, ModelStructure, Plan, model_cost, parse_budget

MAGNITUDE = ProjectionSettings(metric="euclidean", strength="norm", guidance=0.0)
EVEN = ProjectionSettings(attention_fisher=0.0)
"""All tokens weigh alike."""

HELD_OUT = 50
"""Images behind the calibration images that choose which tuned blocks to keep."""


@dataclass(frozen=True)
class Setting:
    """What every line shares."""

    dense: nn.Module
    structure: ModelStructure
    calibration: list[Tensor]
    holdout: list[Tensor]
    scores: list[list[float]]

    def embedded(self) -> Iterator[Tensor]:
        """The stream that enters the first block, of images and mirror images."""
        stages = models.stages(self.dense)
        with torch.no_grad():
            for batch in self.calibration:
                yield stages.embed(batch)
                yield stages.embed(batch.flip(-1))


@dataclass(frozen=True)
class Start:
    """A copy of the model to cut, with what was measured on it."""

    model: nn.Module
    structure: ModelStructure
    weights: tuple[fisher.TokenWeights, ...]
    moments: tuple[compensation.BlockMoments, ...]


def started(setting: Setting, how: ProjectionSettings, images: int, *, rotated: bool) -> Start:
    """Measure moments, in the basis that pruning uses or in the model's own."""
    model, structure = copy.deepcopy(setting.dense), setting.structure
    if not rotated:
        structure = replace(structure, blocks=tuple(replace(b, rotatable=frozenset()) for b in structure.blocks))
    few = setting.calibration[: -(-images // len(setting.calibration[0]))]
    weights = fisher.token_weights(model, structure, few, attention=how.attention_fisher, ffn=how.ffn_fisher)
    moments = compensation.collect_moments(model, structure, setting.calibration, weights)
    return Start(model, structure, weights, rotation.rotate(model, structure, moments))


def selected(setting: Setting, start: Start, shapes: tuple[BlockShape, ...], how: ProjectionSettings) -> Plan:
    """What a projection of every block alone keeps."""
    plans = []
    for i, block in enumerate(start.structure.blocks):
        values = constrained(start.model, block, how.metric)
        order = torch.tensor(setting.scores[i])
        plans.append(select(block, values, start.moments[i], shapes[i], how, ranking=order))
    return Plan(tuple(plans))


def masked(setting: Setting, start: Start, shapes: tuple[BlockShape, ...], how: ProjectionSettings) -> nn.Module:
    """Units gone, nothing repaired."""
    plan = selected(setting, start, shapes, how)
    surgery.mask(start.model, start.structure, plan)
    return start.model


def refitted(setting: Setting, start: Start, shapes: tuple[BlockShape, ...], how: ProjectionSettings) -> nn.Module:
    """Units gone, the others take over, every block by the dense model's moments."""
    plan = selected(setting, start, shapes, how)
    for block, moments, kept in zip(start.structure.blocks, start.moments, plan.blocks, strict=True):
        values = constrained(start.model, block, how.metric)
        for entry, value in project(on_support(block, values, moments, kept, how), values).items():
            values[entry].copy_(value)
    surgery.mask(start.model, start.structure, plan)
    return start.model


def rebuilt(setting: Setting, start: Start, shapes: tuple[BlockShape, ...], how: ProjectionSettings) -> Plan:
    """Block by block against the dense residual stream, in place; nothing is masked yet."""
    return reconstruction.reconstruct(
        setting.dense,
        start.model,
        start.structure,
        shapes,
        setting.embedded(),
        setting.scores,
        how,
        weights=start.weights,
        store=data.Spool,
    )


def rebuilt_model(
    setting: Setting, start: Start, shapes: tuple[BlockShape, ...], how: ProjectionSettings, *, one_ridge: bool
) -> nn.Module:
    """The compacted result, every readout with a ridge of its own or all with the same."""
    with patch.object(reconstruction, "cross_validated_ridge", fixed_ridge) if one_ridge else nullcontext():
        plan = rebuilt(setting, start, shapes, how)
    return models.compact(start.model, plan, setting.calibration[0][:8]).model


def fixed_ridge(_splits: Any, _fitted: Any, ridge: float) -> float:
    """In the place of cross-validation."""
    return ridge


def polished(setting: Setting, cut: nn.Module, settings: PolishSettings, images: int, seed: int) -> nn.Module:
    """Blocks tuned on the calibration images, as far as held-out ones gain."""
    student, teacher = models.stages(cut), models.stages(setting.dense)
    with torch.no_grad():
        held_out = [teacher.embed(x) for x in setting.holdout]
    expected = sensitivity.predictions(teacher, held_out)
    few = setting.calibration[: -(-images // len(setting.calibration[0]))]
    weights = fisher.token_weights(setting.dense, setting.structure, few, attention=0.0, ffn=settings.fisher, seed=seed)

    polish(
        student,
        teacher,
        setting.embedded(),
        [of_block.ffn for of_block in weights],
        settings,
        divergence=lambda: sensitivity.divergence(expected, sensitivity.predictions(student, held_out)),
        seed=seed,
        store=data.Spool,
    )
    return cut


def lines(
    setting: Setting, recipe: Recipe, budget: str, shapes: tuple[BlockShape, ...]
) -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Every line's name and what makes its model; ``shapes`` are the measured widths."""
    goal, structure, images = parse_budget(budget), setting.structure, recipe.data.ranking_images
    limit = goal.limit(model_cost(structure, structure.shapes, "params"))
    even = allocation.uniform(structure, "params", limit, recipe.widths)
    how = recipe.admm.projection

    @cache
    def measured(settings: ProjectionSettings, rotated: bool) -> Start:
        return started(setting, settings, images, rotated=rotated)

    def fresh(settings: ProjectionSettings, rotated: bool) -> Start:
        start = measured(settings, rotated)
        return replace(start, model=copy.deepcopy(start.model))

    def whole(how: ProjectionSettings, widths: tuple[BlockShape, ...], rotated: bool, one_ridge: bool) -> nn.Module:
        return rebuilt_model(setting, fresh(how, rotated), widths, how, one_ridge=one_ridge)

    yield "magnitude, uniform widths", lambda: masked(setting, fresh(EVEN, False), even, MAGNITUDE)
    yield "+ OBS selection", lambda: masked(setting, fresh(EVEN, False), even, EVEN)
    yield "+ refit", lambda: refitted(setting, fresh(EVEN, False), even, EVEN)
    yield "+ residual target", lambda: whole(EVEN, even, False, True)
    yield "+ rotation", lambda: whole(EVEN, even, True, True)
    yield "+ token weights", lambda: whole(how, even, True, True)
    yield "+ allocation", lambda: whole(how, shapes, True, True)
    yield "+ cross-validated ridge", lambda: whole(how, shapes, True, False)
    length = PolishSettings(epochs=2)
    yield "+ polish", lambda: polished(setting, whole(how, shapes, True, False), length, images, recipe.seed)


def measured_widths(results: Path, budget: str, seed: int) -> tuple[BlockShape, ...]:
    """The widths that ``oneshot.py`` found by measured damage curves."""
    runs = json.loads(results.read_text())["runs"]
    return tuple(BlockShape(**block) for block in runs[f"{budget} seed={seed} images=1000"]["plan"])


def main() -> None:
    """Run all lines, writing the results after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--budget", default="params=4.0M")
    parser.add_argument("--images", type=int, default=950)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--widths", type=Path, default=Path("benchmarks/results/oneshot_deit_tiny.json"))
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/oneshot_ablation_deit_tiny.json"))
    options = parser.parse_args()
    recipe = Recipe(route="oneshot", seed=options.seed)
    dense = opening.open_model(options.model, weights=options.weights).eval()
    source, transform = data.DataSource(source=options.data), data.eval_transform(data.Preprocessing.from_model(dense))
    structure = models.describe(dense)
    images = data.calibration_images(source, "train", options.images, transform=transform, seed=options.seed)
    first = list(images[: -(-recipe.data.ranking_images // len(images[0]))])
    scores = ranking.rank_heads(dense, structure, first, recipe.ranking, seed=options.seed).to_json()["scores"]
    held_out = data.calibration_images(
        source, "train", HELD_OUT, transform=transform, seed=options.seed, skip=options.images
    )
    setting = Setting(dense, structure, list(images), list(held_out), scores)
    scored = data.open_split(source, "validation")
    batches = data.loader(scored, transform=transform, batch_size=50, shuffle=False, num_classes=1000)
    results = json.loads(options.results.read_text()) if options.results.exists() else {"lines": {}}
    about = {"budget": options.budget, "images": options.images, "seed": options.seed}
    if results["lines"] and {key: results[key] for key in about} != about:
        sys.exit(f"{options.results} is of another budget, seed or number of images; give another file with --results")
    results |= {
        "command": f"python benchmarks/oneshot_ablation.py --weights {options.weights.name} "
        f"--data hfds/{Path(options.data).name}",
        **about,
        "torch": torch.__version__,
    }
    widths = measured_widths(options.widths, options.budget, options.seed)
    for name, make in lines(setting, recipe, options.budget, widths):
        if name in results["lines"]:
            continue
        began = time.perf_counter()
        model = make()
        seconds, top1 = time.perf_counter() - began, evaluate(model, batches).top1
        results["lines"][name] = {"top1": top1, "seconds": round(seconds, 1)}
        options.results.write_text(json.dumps(results, indent=1) + "\n")
        sys.stdout.write(f"{name}: {top1:.1f} %, {seconds:.0f} s\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
