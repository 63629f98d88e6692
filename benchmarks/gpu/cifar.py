"""CIFAR-10, ViT-Small: gohsp and Torch-Pruning's best beside the dense model, with the same epochs for all.

The methods are those of ``benchmarks/comparison.py``. How many epochs there are follows from the time: the dense model
gets its share, and what is left holds as many for every method behind it. Everything is chosen on 5,000 training images
that are held out; the test split is read once a method.
"""

from __future__ import annotations

import copy
import dataclasses
import multiprocessing
import time
from collections.abc import Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import comparison
import gohsp
import peers
from gohsp import Config
from gohsp import config as configs
from gohsp.structure import widths_from_json, widths_to_json
from gpu.part import Part, Rows, cpu_figures, say

RECIPE = Path("recipes/cifar10_vit_small.toml")
MACS = 1_420_000_000
"""Of ViT-Small and one image of 32 px in patches of 4 (``gohsp.count_macs``)."""

DENSE_SHARE = 0.4
"""Share of the part's time that the dense model is trained in."""

ROOM = 0.9
"""Share of what is left that is planned for; the rest is for what takes longer than expected."""

WITH_TEACHER = 4 / 3
"""What an epoch takes with the dense model as teacher, over one without: one pass forward more."""

CURVES_ON, TOKENS = 128, (65, 197)
"""Images that damage curves are measured on; tokens of an image here and of DeiT's."""

SIDE = 32
"""Of an image."""

TRIAL_BATCHES = 16
"""Batches that an epoch's time is told from."""

SHARD = 15 * 2**20
"""Most bytes of one file of weights: what carries them back may take none above 16 MiB."""


@dataclass(frozen=True)
class Size:
    """What the run and the dry run differ in.

    Attributes:
        splits: Images.
        arguments: Of the model; None for the recipe's.
        batch: Images a step. Twice the recipe's on a GPU, which waits for launches at less.
        calibration: Images; a quarter of the recipe's is ample for 65 tokens each.
        budgets: In the order that they are run in.
        candidates: Torch-Pruning's methods to choose from: those that did best in ``benchmarks/results``.
        most: Most epochs of the dense model, and behind it.
        compiles: Whether to try ``torch.compile``.
        workers: Processes that cut by Torch-Pruning while the GPU trains.
    """

    splits: Mapping[str, Rows]
    arguments: Mapping[str, Any] | None
    batch: int
    calibration: int
    budgets: tuple[str, ...]
    candidates: tuple[str, ...]
    most: tuple[int, int]
    compiles: bool
    workers: int

    @property
    def trials(self) -> int:
        """Epochs that Torch-Pruning's candidates are chosen by, one each."""
        return len(self.budgets) * len(self.candidates)

    @property
    def methods(self) -> int:
        """Methods that are trained: the dense model, and three at every budget."""
        return 1 + 3 * len(self.budgets)


FULL = Size(
    splits={
        "train": Rows("cifar10/train", 0, 45_000),
        "validation": Rows("cifar10/train", 45_000, 5_000),
        "test": Rows("cifar10/test", 0, 10_000),
    },
    arguments=None,
    batch=512,
    calibration=1024,
    budgets=("params=-40%", "params=-60%"),
    candidates=(
        "hessian/isomorphic/heads",
        "hessian/isomorphic/ffn",
        "hessian/isomorphic/blocks",
    ),
    most=(200, 30),
    compiles=True,
    workers=8,
)
DRY = Size(
    splits={
        "train": Rows("cifar10/train", 0, 96),
        "validation": Rows("cifar10/train", 45_000, 32),
        "test": Rows("cifar10/test", 0, 32),
    },
    arguments={"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
    batch=32,
    calibration=64,
    budgets=("params=-40%",),
    candidates=("taylor/isomorphic/ffn", "l2/uniform/ffn"),
    most=(1, 2),
    compiles=False,
    workers=1,
)


def size_of(part: Part) -> Size:
    """The run's or the dry run's."""
    return DRY if part.dry else FULL


def expected(part: Part) -> dict[str, float]:
    """Seconds of each step: the part takes what it may, and epochs fill it."""
    size = size_of(part)
    if part.dry:
        return {"all": 15.0}
    epoch = 3 * size.splits["train"].count * MACS / part.pace.macs  # forward once, backward twice
    steps = {"images": 25.0, "trial": 20.0, "gradients": 15.0, "cuts": 2 * len(size.budgets) * cut_seconds(part)}
    dense = DENSE_SHARE * part.left
    behind = epochs_in(part.left - sum(steps.values()) - dense, epoch * WITH_TEACHER, size)
    return steps | {
        f"{dense / epoch:.0f} dense epochs": dense,
        f"{behind} epochs behind": (size.trials + size.methods * behind) * epoch * WITH_TEACHER,
    }


def cut_seconds(part: Part) -> float:
    """Seconds of a cut by gohsp in two stages, from what DeiT-Small's parts took the CPU at three times the tokens."""
    if part.dry:
        return 1.0
    figures = cpu_figures("deit_small_patch16_224")
    curves = figures["curves"]["seconds"] * CURVES_ON / figures["curves"]["images"]
    views = 2 * size_of(part).calibration * figures["solves"]["an_image"]  # with mirror images
    passes = (curves + views) * TOKENS[0] / TOKENS[1]
    return 5 + 2 * (passes / part.pace.passes + figures["solves"]["seconds"] / part.pace.solves)


def epochs_in(seconds: float, epoch: float, size: Size) -> int:
    """Epochs that every method gets behind the dense model, in so many seconds for all of them."""
    return min(max(int((seconds / epoch - size.trials) / size.methods), 2), size.most[1])


def measure(part: Part) -> None:
    """Train the dense model and run every method that has not been run."""
    size = size_of(part)
    bench, model = opened(part, size)
    dense = dense_model(part, size, bench, model)
    fork = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(size.workers, fork, initializer=torch.set_num_threads, initargs=(1,))
    runs = part.results.setdefault("runs", {})
    methods = Methods(part, size, bench, dense, pool)
    with part.attempt("gradients"):
        methods.begin_cuts()
    for method, budget in methods.order:
        key = methods.key(method, budget)
        if key in runs:
            continue
        part.need(methods.seconds(method), key)
        with part.attempt(key):
            began = time.perf_counter()
            finished, told = methods.run(method, budget)
            told["seconds"] = round(time.perf_counter() - began, 1)
            runs[key] = comparison.record_of(methods.bench, finished) | told


def opened(part: Part, size: Size) -> tuple[comparison.Bench, nn.Module]:
    """Everything decoded and on the device, and the dense model, not yet trained."""
    folder = part.images("cifar10", size.splits, SIDE)
    options = comparison.parser_of(__doc__, model="vit_small_patch16_224", test_split="test", out=part.work / "cifar")
    bench, model = comparison.started(options.parse_args(["--data", str(folder)]), config_of(part, size))
    return dataclasses.replace(bench, resumable=False), model


def config_of(part: Part, size: Size) -> Config:
    """The recipe at this run's size, with as many epochs as are settled so far; kept in the results."""
    recipe, epochs = configs.read(RECIPE), part.results.get("epochs", {})
    dense, behind = epochs.get("dense", 1), epochs.get("behind", 2)
    whole = recipe.admm.epochs + recipe.finetune.epochs
    admm = max(1, round(behind * recipe.admm.epochs / whole))
    warmup = recipe.dense.warmup / recipe.dense.epochs
    config = dataclasses.replace(
        recipe,
        device="cpu" if part.dry else "auto",
        model_arguments=dict(size.arguments or recipe.model_arguments),
        data=dataclasses.replace(
            recipe.data, train_split="train", validation_split="validation", image_key=None, label_key=None
        ),
        calibration=dataclasses.replace(recipe.calibration, images=size.calibration),
        dense=dataclasses.replace(recipe.dense, epochs=dense, warmup=warmup * dense),
        admm=dataclasses.replace(recipe.admm, epochs=admm),
        finetune=dataclasses.replace(recipe.finetune, epochs=behind - admm),
        training=dataclasses.replace(recipe.training, batch_size=size.batch, compile=False),
    )
    part.results["recipe"] = configs.to_mapping(config)
    return config


def dense_model(part: Part, size: Size, bench: comparison.Bench, model: nn.Module) -> nn.Module:
    """The dense model trained, or as an earlier call left it; in both cases rounded to half precision."""
    results = part.results
    if "dense" not in results.get("epochs", {}):
        began, share = time.monotonic(), DENSE_SHARE * part.left
        with part.attempt("trial"):
            results["epoch_seconds"] = {"eager": epoch_seconds(bench, copy.deepcopy(model), size)}
        if size.compiles:
            with part.attempt("trial, compiled"):
                compiled = compile_blocks(copy.deepcopy(model))
                results["epoch_seconds"]["compiled"] = epoch_seconds(bench, compiled, size)
        fastest = min(results["epoch_seconds"], key=results["epoch_seconds"].__getitem__)
        results["compiled"] = fastest == "compiled"
        left = share - (time.monotonic() - began)
        fitting = int(ROOM * left / results["epoch_seconds"][fastest])
        results["epochs"] = {"dense": min(max(fitting, 1), size.most[0])}
        bench = dataclasses.replace(bench, config=config_of(part, size))
        trained = compile_blocks(model) if results["compiled"] else model
        bench.fit("dense_training", trained, bench.config.dense, None, bench.config.seed)
        leave(part, model)
        part.save("begun")
    state = {name: t for shard in shards(part) for name, t in load_file(shard).items()}
    model.load_state_dict({name: t.float() for name, t in state.items()})
    gohsp.save(model, bench.folder / "dense")
    model.to(bench.device)
    return compile_blocks(model) if results["compiled"] else model


def epoch_seconds(bench: comparison.Bench, model: nn.Module, size: Size) -> float:
    """Seconds of a training epoch, by the second pass over a few batches."""
    few = comparison.first_images(bench.train, TRIAL_BATCHES * size.batch)
    stage = dataclasses.replace(bench.config.dense, epochs=3)  # the last is scored, too
    curve = dataclasses.replace(bench, train=few).trained("trial", model, stage, None)
    return curve[1].seconds * len(bench.train.labels) / len(few.labels)


def compile_blocks(model: nn.Module) -> nn.Module:
    """Compile the blocks in place: twelve alike take the time of one, where a whole network takes a minute."""
    blocks: Any = model.blocks
    for block in blocks:
        block.compile(dynamic=False)
    return model


def shards(part: Part) -> list[Path]:
    """The files that hold the dense model's weights."""
    return sorted(part.out.glob("cifar_dense-*.safetensors"))


def leave(part: Part, model: nn.Module) -> None:
    """Write the weights in half precision, in files that are small enough to be carried."""
    for old in shards(part):
        old.unlink()
    files: list[dict[str, torch.Tensor]] = [{}]
    for name, tensor in model.state_dict().items():
        if sum(t.nbytes for t in files[-1].values()) + tensor.numel() * 2 > SHARD:
            files.append({})
        files[-1][name] = tensor.half().cpu().contiguous()
    for index, tensors in enumerate(files):
        save_file(tensors, part.out / f"cifar_dense-{index}.safetensors")


@dataclass
class Methods:
    """What is done with the dense model, in the order of what is most wanted.

    Attributes:
        part: Time and results.
        size: Budgets and candidates.
        bench: Images and, once they are settled, epochs.
        dense: The dense model.
        pool: Processes for what the CPU does meanwhile.
        cuts: Torch-Pruning's, by budget and candidate: the ratio, and where the model is.
    """

    part: Part
    size: Size
    bench: comparison.Bench
    dense: nn.Module
    pool: ProcessPoolExecutor
    cuts: dict[tuple[str, str], tuple[Future[float], Path]] = field(default_factory=dict)

    @property
    def order(self) -> list[tuple[str, str]]:
        """Methods and budgets; the dense model has no budget."""
        first, *others = self.size.budgets
        order = [("start", ""), ("oneshot", first), ("dense", "")]
        order += [(method, first) for method in ("no-ADMM", "peer", "gohsp")]
        return order + [(m, budget) for budget in others for m in ("oneshot", "no-ADMM", "peer", "gohsp")]

    def key(self, method: str, budget: str) -> str:
        """A method's name in the results."""
        return comparison.key_of(method, budget, self.bench.seed)

    @property
    def epoch(self) -> float:
        """Seconds of an epoch with the dense model as teacher."""
        return WITH_TEACHER * self.part.results["epoch_seconds"]["eager"]

    @property
    def cut(self) -> float:
        """Seconds of a cut by gohsp."""
        first = self.part.results["runs"].get(self.key("oneshot", self.size.budgets[0]), {})
        return first.get("seconds", cut_seconds(self.part))

    def seconds(self, method: str) -> float:
        """What a method is expected to take."""
        epochs = self.part.results["epochs"].get("behind", 2)
        trials = len(self.size.candidates) if method == "peer" else 0
        cuts = self.cut if method in ("oneshot", "gohsp") else 0.0
        return cuts + (trials + epochs) * self.epoch * (method not in ("start", "oneshot"))

    def run(self, method: str, budget: str) -> tuple[nn.Module, dict[str, Any]]:
        """A method's model with all its epochs, and what there is to tell."""
        if method == "start":
            return self.dense, {}
        if method == "oneshot":
            return self.oneshot(budget), {}
        self.settle_epochs()
        name = self.key(method, budget)
        if method == "dense":
            again = copy.deepcopy(self.dense)
            again = compile_blocks(again) if self.part.results["compiled"] else again
            return self.bench.fit(name, again, self.bench.extra(), self.dense), {}
        if method == "no-ADMM":
            return self.bench.fit(name, self.oneshot(budget), self.bench.extra(), self.dense), {}
        if method == "peer":
            model, told = self.best_peer(budget)
            return self.bench.fit(name, model, self.bench.extra(), self.dense), told
        widths = gohsp.describe(self.oneshot(budget)).widths
        return comparison.gohsp_model(self.bench, self.dense, method, self.bench.config, budget, widths), {}

    def oneshot(self, budget: str) -> nn.Module:
        """The dense model cut and repaired; widths that an earlier call found are taken as they are."""
        plans = self.part.results.setdefault("plans", {})
        dense = dataclasses.replace(self.bench.config.dense, epochs=0)
        config = dataclasses.replace(self.bench.config, method="oneshot", dense=dense)
        widths = widths_from_json(plans[budget]) if budget in plans else None
        model = comparison.gohsp_model(self.bench, self.dense, "oneshot", config, budget, widths)
        plans[budget] = widths_to_json(gohsp.describe(model).widths)
        return model.to(self.bench.device)

    def settle_epochs(self) -> None:
        """Choose how many epochs every method gets, once for all of them."""
        epochs = self.part.results["epochs"]
        if "behind" not in epochs:
            cuts = (2 * len(self.size.budgets) - 1) * self.cut
            epochs["behind"] = epochs_in(ROOM * self.part.left - cuts, self.epoch, self.size)
        self.bench = dataclasses.replace(self.bench, config=config_of(self.part, self.size))

    def begin_cuts(self) -> None:
        """Have the CPU cut by Torch-Pruning, where that is still wanted, while the GPU goes on."""
        wanted = [b for b in self.size.budgets if self.key("peer", b) not in self.part.results["runs"]]
        if not wanted:
            return
        folder = self.bench.folder
        model = comparison.unfused(self.dense)
        batches = list(comparison.gradient_batches(self.bench))
        for importance in {candidate.split("/")[0] for candidate in self.size.candidates}:
            grads, _ = peers.gradients(model, batches, importance)
            save_file({name: g.cpu().contiguous() for name, g in grads.items()}, folder / f"{importance}.safetensors")
        for budget in wanted:
            for candidate in self.size.candidates:
                file = folder / f"{candidate.replace('/', '_')} {budget}.pt"
                future = self.pool.submit(cut_into, file, folder, candidate, budget)
                self.cuts[budget, candidate] = future, file

    def best_peer(self, budget: str) -> tuple[nn.Module, dict[str, Any]]:
        """Of Torch-Pruning's candidates the one that scores best on held-out images after an epoch of fine-tuning."""
        one = dataclasses.replace(self.bench.config.finetune, epochs=1)
        models, tried = {}, {}
        for candidate in self.size.candidates:
            future, file = self.cuts[budget, candidate]
            try:
                ratio = future.result()
            except ValueError:
                tried[candidate] = None  # it cannot reach the budget
                continue
            models[candidate] = torch.load(file, weights_only=False)  # a module of ours, written a moment ago
            trial = self.bench.fit(candidate, copy.deepcopy(models[candidate]), one, self.dense)
            tried[candidate] = self.bench.score(trial, self.bench.held_out).top1
            say(f"cifar: {candidate} at {budget}, ratio {ratio:.3f}: {tried[candidate]:.2f} % held-out after an epoch")
        best = max(models, key=lambda candidate: tried[candidate])
        return models[best], {"variant": best, "tried": tried}


def cut_into(file: Path, folder: Path, candidate: str, budget: str) -> float:
    """Cut the dense model in ``folder`` by one of Torch-Pruning's methods into ``file``; returns the ratio."""
    model = comparison.unfused(gohsp.load(folder / "dense"))
    grads = load_file(folder / f"{candidate.split('/')[0]}.safetensors")
    pruned, ratio = comparison.peer_cut(model, grads, candidate, budget, torch.zeros(1, 3, SIDE, SIDE))
    torch.save(pruned, file)
    return ratio
