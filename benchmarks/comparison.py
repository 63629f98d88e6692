"""Methods side by side after the same epochs: what ``cifar10.py`` and ``own_data.py`` have in common.

Every method starts from one dense model and gets as many epochs as gohsp's ADMM and fine-tuning together, with the
dense model as teacher:

- ``gohsp``: the recipe as it stands, with ADMM; ``no-ADMM``, method ``finetune``: ADMM's epochs given to fine-tuning;
  ``random`` and ``no-ADMM-random``: the same with heads ranked at random; ``oneshot``: nothing trained;
- ``l2``, ``taylor``, ``hessian``, each ``/uniform`` and ``/isomorphic``: Torch-Pruning as in ``peers.py``, with the
  attention's scale that of the pruned dimension. What may be cut besides hidden units is chosen by the accuracy on
  held-out images right after the cut. Deep cuts leave little accuracy to choose by; a third part that ``peers.py``
  knows, as in ``taylor/uniform/blocks``, sets it, and allows ``isomorphic-raw``;
- ``scratch``: the shape that ``gohsp`` found, trained from new weights, with the dense model's epochs on top;
  ``gohsp-long`` and ``dense-long`` (when asked for) get as many;
- ``dense``: the dense model itself; ``start``: without those epochs.

Everything is in memory (``gohsp.prune``, ``gohsp.finetune``). All choices are made on images held out from the training
split (the recipe's validation split). The test split is read once a method, when it is finished. Finished methods are
not run again; a folder and a results file belong to one setting, and others are refused.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gohsp
import peers
from gohsp import Config, data
from gohsp import config as configs
from gohsp.data import ResidentImages, ResidentLoader
from gohsp.evaluation import Metrics, evaluate
from gohsp.structure import Widths, parse_budget
from shared import RESULTS, data_name, macs, parameters, parser, read_results, resized, say, versions, write_results

PEERS = tuple(f"{i}/{s}" for i in ("l2", "taylor", "hessian") for s in ("uniform", "isomorphic"))
METHODS = ("start", "dense", "gohsp", "random", "no-ADMM", *PEERS, "scratch")
MORE = ("no-ADMM-random", "oneshot")
LONG = ("gohsp-long", "dense-long")
DENSE = ("start", "dense", "dense-long")
GRADIENT_IMAGES = 1024


@dataclass(frozen=True)
class Bench:
    """What every method shares."""

    config: Config
    device: torch.device
    train: ResidentImages
    held_out: ResidentImages
    test: ResidentImages
    mirror: bool
    folder: Path
    seed: int
    resumable: bool = True

    def extra(self, *, long: bool = False) -> configs.StageSettings:
        """The epochs that every method gets behind the dense model, or these and the dense model's."""
        epochs = self.config.admm.epochs + self.config.finetune.epochs
        return replace(self.config.finetune, epochs=epochs + long * self.config.dense.epochs)

    def batches(self, images: ResidentImages) -> ResidentLoader:
        """Images in their order, for scores."""
        return ResidentLoader(images, batch_size=500, shuffle=False)

    def training(self, seed: int) -> ResidentLoader:
        """Training images, augmented as in a run."""
        settings = self.config.training
        return ResidentLoader(
            self.train,
            batch_size=settings.batch_size,
            shuffle=True,
            augment=settings.augment == "light",
            mirror=self.mirror,
            seed=seed,
            drop_last=True,
        )

    def calibration(self, config: Config) -> ResidentLoader:
        """As many training images as pruning takes, drawn by the seed, as in evaluation."""
        wanted = config.calibration.images + config.calibration.holdout
        order = torch.randperm(len(self.train.labels), generator=torch.Generator().manual_seed(self.seed))
        few = order[:wanted].to(self.train.labels.device)
        drawn = replace(self.train, pixels=self.train.pixels[few], labels=self.train.labels[few])
        return ResidentLoader(drawn, batch_size=64, shuffle=False)

    def score(self, model: nn.Module, images: ResidentImages) -> Metrics:
        """Metrics on resident images."""
        return evaluate(model, self.batches(images))

    def fit(
        self,
        name: str,
        model: nn.Module,
        stage: configs.StageSettings,
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
        stage: configs.StageSettings,
        teacher: nn.Module | None,
        seed: int | None = None,
    ) -> tuple[Any, ...]:
        """Train in place, going on after the last finished epoch where epochs are kept; returns the curve."""
        seed = self.seed if seed is None else seed
        return gohsp.finetune(
            model.to(self.device).requires_grad_(),
            self.training(seed),
            teacher=teacher,
            validation=self.batches(self.held_out),
            config=replace(self.config, seed=seed, finetune=stage),
            checkpoint=self.folder / f"{name.replace('/', '_')}.epochs.pt" if self.resumable else None,
        )


def dense_model(bench: Bench, model: nn.Module) -> nn.Module:
    """The dense model: ``model`` trained, or what an earlier call left."""
    folder = bench.folder / "dense"
    if folder.exists():
        return gohsp.load(folder)
    bench.fit("dense_training", model, bench.config.dense, None, bench.config.seed)
    gohsp.save(model, folder)
    return model


def variant(config: Config, method: str) -> Config:
    """The settings of one of gohsp's methods."""
    name, _, at_random = method.partition("random")
    if at_random:
        config = replace(config, ranking=replace(config.ranking, method="random"))
    if method == "oneshot":
        return replace(config, method="oneshot", dense=replace(config.dense, epochs=0))
    if name.startswith("no-ADMM"):
        epochs = config.admm.epochs + config.finetune.epochs
        return replace(config, method="finetune", finetune=replace(config.finetune, epochs=epochs))
    if method == "gohsp-long":
        epochs = config.finetune.epochs + config.dense.epochs
        return replace(config, finetune=replace(config.finetune, epochs=epochs))
    return config


def gohsp_model(
    bench: Bench, dense: nn.Module, name: str, config: Config, budget: str, widths: Widths | None = None
) -> nn.Module:
    """The dense model pruned by gohsp with ``config``, under ``name``; ``widths`` are given ones."""
    out = bench.folder / f"{budget} seed={bench.seed}" / name
    if out.exists():
        return gohsp.load(out, device=bench.device)
    calibration = replace(config.calibration, mirror=config.calibration.mirror and bench.mirror)
    config = replace(config, seed=bench.seed, dense=replace(config.dense, epochs=0), calibration=calibration)
    pruned = gohsp.prune(
        dense,
        bench.training(bench.seed),
        budget,
        config=config,
        widths=widths,
        validation=bench.batches(bench.held_out),
        calibration=bench.calibration(config),
    )
    gohsp.save(pruned.model, out, kept=pruned.kept)
    return pruned.model


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
    limit = int(parse_budget(budget).limit(parameters(cpu)))
    model, ratio = peers.prune_to(cpu, grads, method, limit, example)
    for attention in peers.attentions(model):
        attention.scale = attention.head_dim**-0.5
    return model, ratio


def gradient_batches(bench: Bench) -> ResidentLoader:
    """The images that gradients are taken on."""
    return ResidentLoader(first_images(bench.train, GRADIENT_IMAGES), batch_size=64, shuffle=False)


def first_images(images: ResidentImages, count: int) -> ResidentImages:
    """The first of them."""
    return replace(images, pixels=images.pixels[:count], labels=images.labels[:count])


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
    if method in ("gohsp", "random", "no-ADMM", "gohsp-long", *MORE):
        return gohsp_model(bench, dense, method, variant(bench.config, method), budget), {}
    if method == "scratch":
        found = gohsp.describe(gohsp_model(bench, dense, "gohsp", bench.config, budget)).widths
        example = next(iter(bench.batches(bench.held_out)))[0][:2]
        shaped: Any = resized(dense, found, example)
        torch.manual_seed(bench.seed)
        shaped.init_weights()
        stage = replace(bench.config.dense, epochs=bench.extra(long=True).epochs)
        return bench.fit(name, shaped, stage, dense), {}
    model, told = peer_model(bench, dense, method, budget)
    return bench.fit(name, model, bench.extra(), dense), told


def record_of(bench: Bench, model: nn.Module) -> dict[str, Any]:
    """A method's row, for which the test split is read."""
    example = torch.zeros(1, 3, *bench.test.pixels.shape[-2:], device=bench.device)
    metrics = bench.score(model.to(bench.device).eval(), bench.test)
    return {
        "top1": metrics.top1,
        "held_out_top1": bench.score(model, bench.held_out).top1,
        "params": parameters(model),
        "macs": macs(model, example),
        "n": metrics.n,
    }


def parser_of(doc: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """The arguments that comparisons share."""
    arguments = parser(doc)
    arguments.add_argument("--data", required=True)
    arguments.add_argument("--model")
    arguments.add_argument("--weights", type=Path, help="safetensors file to start the dense model from")
    arguments.add_argument("--recipe", type=Path, help="settings in TOML, of method gohsp")
    arguments.add_argument("--test-split")
    arguments.add_argument("--budgets", nargs="+")
    if "methods" in defaults:
        arguments.add_argument("--methods", nargs="+", choices=(*METHODS, *MORE, *LONG, *peers.METHODS))
    arguments.add_argument(
        "--seed", type=int, default=0, help="of everything behind the dense model, which has the recipe's"
    )
    arguments.add_argument("--dense", type=Path, help="folder of a trained dense model, instead of training one")
    arguments.add_argument("--out", type=Path)
    arguments.add_argument("--results", type=Path)
    arguments.set_defaults(**defaults)
    return arguments


def opened(options: argparse.Namespace) -> tuple[Bench, nn.Module]:
    """Everything decoded and on the device, and the dense model, trained if need be."""
    config = configs.read(options.recipe)
    bench, start = started(options, config)
    claim(bench.folder / "settings.json", settings_of(options, config))
    if options.dense and not (bench.folder / "dense").exists():
        gohsp.save(start, bench.folder / "dense")
    return bench, dense_model(bench, start).to(bench.device)


def started(options: argparse.Namespace, config: Config) -> tuple[Bench, nn.Module]:
    """Everything decoded and on the device, and the model that the dense one is trained from."""
    source = data.DataSource(source=options.data, image_key=config.data.image_key, label_key=config.data.label_key)
    device = torch.device("cuda" if config.device == "auto" and torch.cuda.is_available() else "cpu")
    splits = [
        data.open_split(source, split)
        for split in (config.data.train_split, config.data.validation_split, options.test_split)
    ]
    torch.manual_seed(config.seed)
    arguments = {"num_classes": splits[0].num_classes, **config.model_arguments}
    start = (
        gohsp.load(options.dense)
        if options.dense
        else gohsp.open_model(options.model, weights=options.weights, arguments=arguments, new_classifier=True)
    )
    preprocessing = data.Preprocessing.from_model(start)
    train, held_out, test = (data.resident_images(split, preprocessing, device) for split in splits)
    folder = options.out or Path("runs") / options.recipe.stem
    folder.mkdir(parents=True, exist_ok=True)
    return Bench(config, device, train, held_out, test, splits[0].mirrored_alike, folder, options.seed), start


def results_file(options: argparse.Namespace, prefix: str = "") -> Path:
    """Where results are written, named after the recipe."""
    return options.results or RESULTS / f"{prefix}{options.recipe.stem}.json"


def settings_of(options: argparse.Namespace, config: Config) -> dict[str, Any]:
    """What all methods of a folder and of a results file share; only latency budgets and one-shot runs use the rest."""
    return {
        "model": options.model,
        "weights": options.weights.name if options.weights else None,
        "dense": options.dense.name if options.dense else None,
        "data": Path(options.data).name,
        "test_split": options.test_split,
        "recipe": {k: v for k, v in configs.to_mapping(config).items() if k not in ("heal", "latency")},
    }


def claim(file: Path, settings: dict[str, Any]) -> None:
    """Write a folder's settings, or check that they are these."""
    if not file.exists():
        write_results(file, settings)
    elif json.loads(file.read_text()) != json.loads(json.dumps(settings)):
        sys.exit(f"{file.parent} holds runs with other settings, see {file.name}; give another --out")


def opened_results(file: Path, options: argparse.Namespace, bench: Bench, script: str) -> dict[str, Any]:
    """Results so far, with what all their records have in common; other settings are refused."""
    shared = settings_of(options, bench.config)
    weights = f" --weights {shared['weights']}" if shared["weights"] else ""
    header = {
        "command": f"python benchmarks/{script}.py --data {data_name(options.data)} --recipe {options.recipe}{weights}",
        **shared,
        "machine": torch.cuda.get_device_name() if bench.device.type == "cuda" else "cpu",
        "versions": versions("torch-pruning"),
    }
    results = read_results(file, {**header, "runs": {}})
    for name, value in json.loads(json.dumps(header)).items():
        if results[name] != value:
            sys.exit(f"{file} holds runs with another '{name}': {results[name]}, now {value}; give another --results")
    return results


def run(options: argparse.Namespace, script: str) -> None:
    """Run what is not in the results yet, writing them after each method."""
    for budget in options.budgets:
        if parse_budget(budget).kind != "params":
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
            write_results(file, results)
            say(f"{key}: {record['params']:,} parameters, top-1 {record['top1']:.2f} %")
