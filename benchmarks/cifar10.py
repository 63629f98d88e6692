"""CIFAR-10: gohsp, Torch-Pruning and training from scratch, side by side with the same epochs.

    pip install 'gohsp[hf,bench]'
    python benchmarks/cifar10.py --data hfds/cifar10                                            # one GPU
    python benchmarks/cifar10.py --data hfds/cifar10 --recipe recipes/cifar10_cpu.toml          # two CPU cores, minutes

Every method starts from one dense model and gets as many epochs as gohsp's ADMM and fine-tuning together, with the
dense model as teacher:

- ``gohsp``: the recipe as it stands; ``random``: its heads ranked at random; ``oneshot``: no ADMM, cut and repaired;
- ``l2``, ``taylor``, ``hessian``, each ``/uniform`` and ``/isomorphic``: Torch-Pruning as in ``peers.py``. What may be
  cut besides hidden units is chosen by the accuracy on held-out images right after the cut;
- ``scratch``: the shape that ``gohsp`` found, trained from new weights, with the dense model's epochs on top;
- ``dense``: the dense model itself.

All choices are made on images held out from the training split (the recipe's validation split). The test split is read
once a method, when it is finished. Finished methods are not run again, interrupted ones go on where gohsp can.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

import gohsp
from gohsp import checkpoint, data, models, training
from gohsp import recipe as recipes
from gohsp.measure import Metrics, evaluate
from gohsp.resident import ResidentImages, ResidentLoader, resident_images
from peers import attentions, gradients, macs, parameters, prune_to  # pyrefly: ignore[missing-import] (it lies beside this file)

GOHSP = ("gohsp", "random", "oneshot")
PEERS = tuple(f"{i}/{s}" for i in ("l2", "taylor", "hessian") for s in ("uniform", "isomorphic"))
METHODS = ("dense", *GOHSP, *PEERS, "scratch")
WIDTHS = ("all", "deit", "blocks", "heads", "ffn")
GRADIENT_IMAGES = 1024


@dataclass(frozen=True)
class Bench:
    """What every method shares."""

    recipe: gohsp.Recipe
    source: str
    device: torch.device
    train: ResidentImages
    held_out: ResidentImages
    folder: Path
    seed: int

    @property
    def accelerator(self) -> Accelerator:
        """A new one for every use: gohsp's own runs reset the state that all accelerators of a process share."""
        return training.make_accelerator(self.recipe.training.precision, self.device.type)

    @property
    def extra(self) -> training.StageSettings:
        """The epochs that every method gets behind the dense model."""
        epochs = self.recipe.admm_stage.epochs + self.recipe.finetune.epochs
        return dataclasses.replace(self.recipe.finetune, epochs=epochs)

    def score(self, model: nn.Module, images: ResidentImages) -> Metrics:
        """Metrics on resident images."""
        cpu = self.device.type == "cpu"
        precision = training.PRECISIONS[training.resolve_precision(self.recipe.training.precision, cpu=cpu)]
        loader = ResidentLoader(images, batch_size=500, shuffle=False)
        return evaluate(model, loader, device=self.device, precision=precision)

    def fit(self, name: str, model: nn.Module, stage: training.StageSettings, teacher: nn.Module | None) -> nn.Module:
        """Train in place, going on after the last finished epoch."""
        settings = self.recipe.training
        loader = ResidentLoader(
            self.train,
            batch_size=settings.batch_size,
            shuffle=True,
            augment=settings.augment == "light",
            seed=self.seed,
            drop_last=True,
        )
        training.train(
            model.to(self.device).requires_grad_(),
            loader,
            stage,
            settings,
            name=name,
            accelerator=self.accelerator,
            seed=self.seed,
            num_classes=int(model.num_classes),  # type: ignore[arg-type]
            evaluate=partial(self.score, images=self.held_out),
            teacher=teacher,
            checkpoint=self.folder / f"{name.replace('/', '_')}.epochs.pt",
        )
        return model


def dense_model(bench: Bench, name: str) -> nn.Module:
    """The dense model, trained or as an earlier call left it."""
    folder = bench.folder / "dense"
    if checkpoint.is_model_folder(folder):
        return checkpoint.open_model(folder)
    torch.manual_seed(bench.seed)
    arguments = {"num_classes": 10, **bench.recipe.model_arguments}
    model = checkpoint.open_model(name, arguments=arguments, new_classifier=True)
    bench.fit("dense_training", model, bench.recipe.dense, None)
    checkpoint.save(model, folder)
    return model


def gohsp_model(bench: Bench, method: str, budget: str) -> nn.Module:
    """Pruned and fine-tuned by gohsp."""
    recipe = dataclasses.replace(
        bench.recipe,
        seed=bench.seed,
        model_arguments={},
        retrain_dense=False,
        dense=dataclasses.replace(bench.recipe.dense, epochs=0),
    )
    if method == "random":
        recipe = dataclasses.replace(recipe, ranking=dataclasses.replace(recipe.ranking, method="random"))
    if method == "oneshot":
        none = dataclasses.replace(recipe.admm_stage, epochs=0)
        recipe = dataclasses.replace(recipe, admm_stage=none, finetune=bench.extra)
    out = bench.folder / f"{budget} seed={bench.seed}" / method
    if (out / "report.json").exists():
        return gohsp.load(out)
    dense = bench.folder / "dense"
    return gohsp.prune(dense, bench.source, budget, out, recipe=recipe, resume=out.exists()).model


def peer_model(bench: Bench, dense: nn.Module, method: str, budget: str) -> tuple[nn.Module, dict[str, Any]]:
    """Pruned by Torch-Pruning, not yet fine-tuned; what may be cut is what keeps most accuracy on held-out images."""
    cpu = copy.deepcopy(dense).cpu().eval()
    for attention in attentions(cpu):
        attention.fused_attn = False
    batches = [(x.cpu(), y.cpu()) for x, y in ResidentLoader(first_images(bench.train), batch_size=64, shuffle=False)]
    importance, scope = method.split("/")
    found = gradients(cpu, batches, importance)
    limit = int(gohsp.parse_budget(budget).limit(parameters(cpu)))
    best: tuple[float, nn.Module, dict[str, Any]] | None = None
    for width in WIDTHS:
        try:
            model, ratio = prune_to(cpu, found[0], f"{importance}/{scope}/{width}", limit, batches[0][0][:1])
        except ValueError:
            continue  # this choice cannot reach the budget
        for attention in attentions(model):
            attention.scale = attention.head_dim**-0.5
        top1 = bench.score(model.to(bench.device), bench.held_out).top1
        if best is None or top1 > best[0]:
            best = top1, model, {"width": width, "ratio": round(ratio, 5), "held_out_top1_after_cut": top1}
    if best is None:
        raise ValueError(f"{method} cannot reach {budget}")
    return best[1], best[2]


def first_images(images: ResidentImages) -> ResidentImages:
    """The images that gradients are taken on."""
    return dataclasses.replace(images, pixels=images.pixels[:GRADIENT_IMAGES], labels=images.labels[:GRADIENT_IMAGES])


def key_of(method: str, budget: str, seed: int) -> str:
    """A method's name in the results; the dense model has no budget."""
    return " ".join(part for part in (method, budget, f"seed={seed}") if part)


def finished_model(bench: Bench, dense: nn.Module, method: str, budget: str) -> tuple[nn.Module, dict[str, Any]]:
    """A method's model with all its epochs, and what there is to tell."""
    name = key_of(method, budget, bench.seed)
    if method == "dense":
        return bench.fit(name, copy.deepcopy(dense), bench.extra, dense), {}
    if method in GOHSP:
        return gohsp_model(bench, method, budget), {}
    if method == "scratch":
        shaped = models.resized(dense, models.describe(gohsp_model(bench, "gohsp", budget)).shapes)
        torch.manual_seed(bench.seed)
        shaped.init_weights()  # type: ignore[operator]
        longer = dataclasses.replace(bench.recipe.dense, epochs=bench.recipe.dense.epochs + bench.extra.epochs)
        return bench.fit(name, shaped, longer, None), {}
    model, told = peer_model(bench, dense, method, budget)
    return bench.fit(name, model, bench.extra, dense), told


def record_of(bench: Bench, model: nn.Module, test: ResidentImages, seconds: float) -> dict[str, Any]:
    """A method's row."""
    with torch.no_grad():
        example = torch.zeros(1, 3, *test.pixels.shape[-2:], device=bench.device)
        cost = multiplications(model.to(example.device).eval(), example)
    metrics = bench.score(model, test)
    return {"top1": metrics.top1, "params": parameters(model), "macs": cost, "n": metrics.n, "seconds": round(seconds)}


def multiplications(model: nn.Module, example: Tensor) -> int:
    """Multiply-accumulates of one image, attention by plain products so that they are counted."""
    plain = copy.deepcopy(model)
    models.set_fused_attention(plain, False)
    return macs(plain, example)


def main() -> None:
    """Run what is not in the results yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--recipe", type=Path, default=Path("recipes/cifar10_vit_small.toml"))
    parser.add_argument("--test-split", default="test")
    parser.add_argument("--budgets", nargs="+", default=["params=-40%", "params=-60%", "params=-75%"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--seed", type=int, default=0, help="of everything behind the dense model")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    stem = options.recipe.stem
    folder = options.out or Path("runs") / stem
    file = options.results or Path("benchmarks/results") / f"{stem}.json"
    recipe = recipes.read(options.recipe)
    source = data.DataSource(source=options.data, image_key=recipe.data.image_key, label_key=recipe.data.label_key)
    device = training.make_accelerator("no", "cpu" if recipe.device == "cpu" else None).device
    arguments = {"num_classes": 10, **recipe.model_arguments}
    blank = checkpoint.open_model(options.model, arguments=arguments, new_classifier=True)
    preprocessing = data.Preprocessing.from_model(blank)
    splits = (recipe.data.train_split, recipe.data.validation_split, options.test_split)
    train, held_out, test = (resident_images(data.open_split(source, split), preprocessing, device) for split in splits)
    folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(recipe, options.data, device, train, held_out, folder, options.seed)
    results = json.loads(file.read_text()) if file.exists() else {"runs": {}}
    results |= {
        "command": f"python benchmarks/cifar10.py --data hfds/{Path(options.data).name} --recipe {options.recipe}",
        "recipe": recipes.to_mapping(recipe),
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
    }
    dense = dense_model(bench, options.model).to(device)
    for budget in options.budgets:
        for method in options.methods:
            budget_of = "" if method == "dense" else budget
            key = key_of(method, budget_of, options.seed)
            if key in results["runs"]:
                continue
            began = time.perf_counter()
            model, told = finished_model(bench, dense, method, budget_of)
            record = record_of(bench, model, test, time.perf_counter() - began) | told
            results["runs"][key] = record
            file.write_text(json.dumps(results, indent=1) + "\n")
            sys.stdout.write(f"{key}: {record['params']:,} parameters, top-1 {record['top1']:.2f} %\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
