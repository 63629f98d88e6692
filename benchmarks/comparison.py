"""Methods side by side after the same epochs: what ``cifar10.py`` and ``own_data.py`` have in common.

Every method starts from one dense model and gets as many epochs as gohsp's ADMM and fine-tuning together, with the
dense model as teacher:

- ``gohsp``: the recipe as it stands, with ADMM; ``random``: its heads ranked at random; ``no-ADMM``, gohsp's default
  and its name in tables: ADMM's epochs given to fine-tuning;
- ``l2``, ``taylor``, ``hessian``, each ``/uniform`` and ``/isomorphic``: Torch-Pruning as in ``peers.py``, with the
  attention's scale that of the pruned dimension. What may be cut besides hidden units is chosen by the accuracy on
  held-out images right after the cut. Deep cuts leave little accuracy to choose by; a third part that ``peers.py``
  knows, as in ``taylor/uniform/blocks``, sets it, and allows ``isomorphic-raw``;
- ``scratch``: the shape that ``gohsp`` found, trained from new weights, with the dense model's epochs on top;
  ``gohsp-long`` and ``dense-long`` (when asked for) get as many;
- ``dense``: the dense model itself; ``start``: without those epochs.

All choices are made on images held out from the training split (the recipe's validation split). The test split is read
once a method, when it is finished. Finished methods are not run again, interrupted ones go on where gohsp can; a folder
and a results file belong to one setting, and others are refused.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import importlib.metadata
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

import gohsp
import peers
from gohsp import checkpoint, data, models, opening, resident, training
from gohsp import recipe as recipes
from gohsp.measure import Metrics, evaluate
from gohsp.resident import ResidentImages, ResidentLoader

GOHSP = ("gohsp", "random", "no-ADMM")
PEERS = tuple(f"{i}/{s}" for i in ("l2", "taylor", "hessian") for s in ("uniform", "isomorphic"))
METHODS = ("start", "dense", *GOHSP, *PEERS, "scratch")
LONG = ("gohsp-long", "dense-long")
DENSE = ("start", "dense", "dense-long")
GRADIENT_IMAGES = 1024


@dataclass(frozen=True)
class Bench:
    """What every method shares."""

    recipe: gohsp.Recipe
    source: str
    device: torch.device
    train: ResidentImages
    held_out: ResidentImages
    test: ResidentImages
    mirror: bool
    folder: Path
    seed: int
    resumable: bool = True

    @property
    def accelerator(self) -> Accelerator:
        """A new one for every use: gohsp's own runs reset the state that all accelerators of a process share."""
        return training.make_accelerator(self.recipe.training.precision, self.device.type)

    def extra(self, *, long: bool = False) -> training.StageSettings:
        """The epochs that every method gets behind the dense model, or these and the dense model's."""
        epochs = self.recipe.admm_stage.epochs + self.recipe.finetune.epochs
        return dataclasses.replace(self.recipe.finetune, epochs=epochs + long * self.recipe.dense.epochs)

    def score(self, model: nn.Module, images: ResidentImages) -> Metrics:
        """Metrics on resident images."""
        cpu = self.device.type == "cpu"
        precision = training.PRECISIONS[training.resolve_precision(self.recipe.training.precision, cpu=cpu)]
        loader = ResidentLoader(images, batch_size=500, shuffle=False)
        return evaluate(model, loader, device=self.device, precision=precision)

    def fit(
        self,
        name: str,
        model: nn.Module,
        stage: training.StageSettings,
        teacher: nn.Module | None,
        seed: int | None = None,
    ) -> nn.Module:
        """Train in place; returns the model."""
        self.trained(name, model, stage, teacher, seed)
        return model

    def trained(
        self,
        name: str,
        model: nn.Module,
        stage: training.StageSettings,
        teacher: nn.Module | None,
        seed: int | None = None,
    ) -> training.StageResult:
        """Train in place, going on after the last finished epoch where epochs are kept; returns the curve."""
        seed = self.seed if seed is None else seed
        settings = self.recipe.training
        loader = ResidentLoader(
            self.train,
            batch_size=settings.batch_size,
            shuffle=True,
            augment=settings.augment == "light",
            mirror=self.mirror,
            seed=seed,
            drop_last=True,
        )
        return training.train(
            model.to(self.device).requires_grad_(),
            loader,
            stage,
            settings,
            name=name,
            accelerator=self.accelerator,
            seed=seed,
            num_classes=int(model.num_classes),  # type: ignore[arg-type]
            evaluate=partial(self.score, images=self.held_out),
            teacher=teacher,
            checkpoint=self.folder / f"{name.replace('/', '_')}.epochs.pt" if self.resumable else None,
        )


def dense_model(bench: Bench, model: nn.Module) -> nn.Module:
    """The dense model: ``model`` trained, or what an earlier call left."""
    folder = bench.folder / "dense"
    if checkpoint.is_model_folder(folder):
        return opening.open_model(folder)
    bench.fit("dense_training", model, bench.recipe.dense, None, bench.recipe.seed)
    checkpoint.save(model, folder)
    return model


def variant(recipe: gohsp.Recipe, method: str) -> gohsp.Recipe:
    """The recipe of one of gohsp's methods."""
    if method == "random":
        return dataclasses.replace(recipe, ranking=dataclasses.replace(recipe.ranking, method="random"))
    if method == "no-ADMM":
        epochs = recipe.admm_stage.epochs + recipe.finetune.epochs
        return dataclasses.replace(
            recipe,
            admm_stage=dataclasses.replace(recipe.admm_stage, epochs=0),
            finetune=dataclasses.replace(recipe.finetune, epochs=epochs),
        )
    if method == "gohsp-long":
        epochs = recipe.finetune.epochs + recipe.dense.epochs
        return dataclasses.replace(recipe, finetune=dataclasses.replace(recipe.finetune, epochs=epochs))
    return recipe


def gohsp_model(
    bench: Bench, name: str, recipe: gohsp.Recipe, budget: str, shapes: Sequence[gohsp.BlockShape] | None = None
) -> nn.Module:
    """The dense model pruned and fine-tuned by gohsp with ``recipe``, under ``name``; ``shapes`` are given widths."""
    recipe = dataclasses.replace(
        recipe,
        seed=bench.seed,
        model_arguments={},
        retrain_dense=False,
        dense=dataclasses.replace(recipe.dense, epochs=0),
    )
    out = bench.folder / f"{budget} seed={bench.seed}" / name
    if (out / "report.json").exists():
        return gohsp.load(out)
    dense = bench.folder / "dense"
    return gohsp.prune(dense, bench.source, budget, out, recipe=recipe, shapes=shapes, resume=out.exists()).model


def peer_model(bench: Bench, dense: nn.Module, method: str, budget: str) -> tuple[nn.Module, dict[str, Any]]:
    """Pruned by Torch-Pruning, not yet fine-tuned; of several widths the one that keeps most held-out accuracy."""
    cpu = unfused(dense).cpu()
    batches = [(x.cpu(), y.cpu()) for x, y in gradient_batches(bench)]
    importance, scope, *given = method.split("/")
    found = peers.gradients(cpu, batches, importance)
    best: tuple[float, nn.Module, dict[str, Any]] | None = None
    for width in given or peers.WIDTHS:
        try:
            model, ratio = peer_cut(cpu, found[0], f"{importance}/{scope}/{width}", budget, batches[0][0][:1])
        except ValueError:
            continue  # this choice cannot reach the budget
        top1 = bench.score(model.to(bench.device), bench.held_out).top1
        if best is None or top1 > best[0]:
            best = top1, model, {"width": width, "ratio": round(ratio, 5), "held_out_top1_after_cut": top1}
    if best is None:
        raise ValueError(f"{method} cannot reach {budget}")
    return best[1], best[2]


def unfused(dense: nn.Module) -> nn.Module:
    """A copy with plain attention, which Torch-Pruning can trace."""
    model = copy.deepcopy(dense).eval()
    for attention in peers.attentions(model):
        attention.fused_attn = False
    return model


def peer_cut(
    cpu: nn.Module, grads: Mapping[str, Tensor], method: str, budget: str, example: Tensor
) -> tuple[nn.Module, float]:
    """Cut by one of Torch-Pruning's methods, attention scaled for the pruned dimension; the model and its ratio."""
    limit = int(gohsp.parse_budget(budget).limit(peers.parameters(cpu)))
    model, ratio = peers.prune_to(cpu, grads, method, limit, example)
    for attention in peers.attentions(model):
        attention.scale = attention.head_dim**-0.5
    return model, ratio


def gradient_batches(bench: Bench) -> ResidentLoader:
    """The images that gradients are taken on."""
    return ResidentLoader(first_images(bench.train, GRADIENT_IMAGES), batch_size=64, shuffle=False)


def first_images(images: ResidentImages, count: int) -> ResidentImages:
    """The first of them."""
    return dataclasses.replace(images, pixels=images.pixels[:count], labels=images.labels[:count])


def key_of(method: str, budget: str, seed: int) -> str:
    """A method's name in the results; the dense model has no budget."""
    return " ".join(part for part in (method, budget, f"seed={seed}") if part)


def finished_model(bench: Bench, dense: nn.Module, method: str, budget: str) -> tuple[nn.Module, dict[str, Any]]:
    """A method's model with all its epochs, and what there is to tell."""
    name = key_of(method, budget, bench.seed)
    if method == "start":
        return copy.deepcopy(dense), {}
    if method in ("dense", "dense-long"):
        return bench.fit(name, copy.deepcopy(dense), bench.extra(long=method == "dense-long"), dense), {}
    if method in (*GOHSP, "gohsp-long"):
        return gohsp_model(bench, method, variant(bench.recipe, method), budget), {}
    if method == "scratch":
        shaped = models.resized(dense, models.describe(gohsp_model(bench, "gohsp", bench.recipe, budget)).shapes)
        torch.manual_seed(bench.seed)
        shaped.init_weights()  # type: ignore[operator]
        stage = dataclasses.replace(bench.recipe.dense, epochs=bench.extra(long=True).epochs)
        return bench.fit(name, shaped, stage, dense), {}
    model, told = peer_model(bench, dense, method, budget)
    return bench.fit(name, model, bench.extra(), dense), told


def record_of(bench: Bench, model: nn.Module) -> dict[str, Any]:
    """A method's row, for which the test split is read."""
    with torch.no_grad():
        example = torch.zeros(1, 3, *bench.test.pixels.shape[-2:], device=bench.device)
        cost = multiplications(model.to(example.device).eval(), example)
    metrics = bench.score(model, bench.test)
    return {
        "top1": metrics.top1,
        "held_out_top1": bench.score(model, bench.held_out).top1,
        "params": peers.parameters(model),
        "macs": cost,
        "n": metrics.n,
    }


def multiplications(model: nn.Module, example: Tensor) -> int:
    """Multiply-accumulates of one image, attention by plain products so that they are counted."""
    plain = copy.deepcopy(model)
    models.set_fused_attention(plain, False)
    return peers.macs(plain, example)


def parser_of(doc: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """The arguments that comparisons share."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model")
    parser.add_argument("--weights", type=Path, help="safetensors file to start the dense model from")
    parser.add_argument("--recipe", type=Path)
    parser.add_argument("--test-split")
    parser.add_argument("--budgets", nargs="+")
    if "methods" in defaults:
        parser.add_argument("--methods", nargs="+", choices=(*METHODS, *LONG, *peers.METHODS))
    parser.add_argument(
        "--seed", type=int, default=0, help="of everything behind the dense model, which has the recipe's"
    )
    parser.add_argument("--dense", type=Path, help="folder of a trained dense model, instead of training one")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--results", type=Path)
    parser.set_defaults(**defaults)
    return parser


def opened(options: argparse.Namespace) -> tuple[Bench, nn.Module]:
    """Everything decoded and on the device, and the dense model, trained if need be."""
    recipe = recipes.read(options.recipe)
    bench, start = started(options, recipe)
    claim(bench.folder / "settings.json", settings_of(options, recipe))
    if options.dense and not checkpoint.is_model_folder(bench.folder / "dense"):
        checkpoint.save(start, bench.folder / "dense")
    return bench, dense_model(bench, start).to(bench.device)


def started(options: argparse.Namespace, recipe: gohsp.Recipe) -> tuple[Bench, nn.Module]:
    """Everything decoded and on the device, and the model that the dense one is trained from."""
    source = data.DataSource(source=options.data, image_key=recipe.data.image_key, label_key=recipe.data.label_key)
    device = training.make_accelerator("no", "cpu" if recipe.device == "cpu" else None).device
    splits = [
        data.open_split(source, split)
        for split in (recipe.data.train_split, recipe.data.validation_split, options.test_split)
    ]
    torch.manual_seed(recipe.seed)
    arguments = {"num_classes": splits[0].num_classes, **recipe.model_arguments}
    start = (
        opening.open_model(options.dense)
        if options.dense
        else opening.open_model(options.model, weights=options.weights, arguments=arguments, new_classifier=True)
    )
    preprocessing = data.Preprocessing.from_model(start)
    train, held_out, test = (resident.resident_images(split, preprocessing, device) for split in splits)
    folder = options.out or Path("runs") / options.recipe.stem
    folder.mkdir(parents=True, exist_ok=True)
    mirror = splits[0].mirrored_alike
    return Bench(recipe, options.data, device, train, held_out, test, mirror, folder, options.seed), start


def results_file(options: argparse.Namespace, prefix: str = "") -> Path:
    """Where results are written, named after the recipe."""
    return options.results or Path("benchmarks/results") / f"{prefix}{options.recipe.stem}.json"


def settings_of(options: argparse.Namespace, recipe: gohsp.Recipe) -> dict[str, Any]:
    """What all methods of a folder and of a results file share; only latency budgets and one-shot runs use the rest."""
    return {
        "model": options.model,
        "weights": options.weights.name if options.weights else None,
        "dense": options.dense.name if options.dense else None,
        "data": Path(options.data).name,
        "test_split": options.test_split,
        "recipe": {k: v for k, v in recipes.to_mapping(recipe).items() if k not in ("polish", "latency")},
    }


def claim(file: Path, settings: dict[str, Any]) -> None:
    """Write a folder's settings, or check that they are these."""
    if not file.exists():
        file.write_text(json.dumps(settings, indent=1) + "\n")
    elif json.loads(file.read_text()) != json.loads(json.dumps(settings)):
        sys.exit(f"{file.parent} holds runs with other settings, see {file.name}; give another --out")


def opened_results(file: Path, options: argparse.Namespace, bench: Bench, script: str) -> dict[str, Any]:
    """Results so far, with what all their records have in common; other settings are refused."""
    shared = settings_of(options, bench.recipe)
    data_name = f"hfds/{shared['data']}"
    weights = f" --weights {shared['weights']}" if shared["weights"] else ""
    packages = ("gohsp", "torch", "timm", "torch-pruning")
    header = {
        "command": f"python benchmarks/{script}.py --data {data_name} --recipe {options.recipe}{weights}",
        **shared,
        "machine": torch.cuda.get_device_name() if bench.device.type == "cuda" else "cpu",
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }
    results = json.loads(file.read_text()) if file.exists() else {**header, "runs": {}}
    for name, value in json.loads(json.dumps(header)).items():
        if results[name] != value:
            sys.exit(f"{file} holds runs with another '{name}': {results[name]}, now {value}; give another --results")
    return results


def run(options: argparse.Namespace, script: str) -> None:
    """Run what is not in the results yet, writing them after each method."""
    for budget in options.budgets:
        if gohsp.parse_budget(budget).kind != "params":
            sys.exit(f"Torch-Pruning is cut to a number of parameters; give budgets such as params=-40%, not {budget}")
    bench, dense = opened(options)
    file = results_file(options)
    results = opened_results(file, options, bench, script)
    for budget in options.budgets:
        for method in options.methods:
            budget_of = "" if method in DENSE else budget
            key = key_of(method, budget_of, options.seed)
            if key in results["runs"]:
                continue
            model, told = finished_model(bench, dense, method, budget_of)
            record = record_of(bench, model) | told
            results["runs"][key] = record
            file.write_text(json.dumps(results, indent=1) + "\n")
            sys.stdout.write(f"{key}: {record['params']:,} parameters, top-1 {record['top1']:.2f} %\n")
            sys.stdout.flush()
