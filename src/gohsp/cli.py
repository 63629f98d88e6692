"""The command line: ``gohsp demo | rank | prune | evaluate | report``. Each verb is a dataclass."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.resources
import json
import logging
import sys
import tomllib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union

import tyro
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.table import Table

from gohsp import checkpoint, data, models, pipeline, report, training
from gohsp import recipe as recipes
from gohsp.core import ranking
from gohsp.errors import GohspError, PlanError
from gohsp.measure import evaluate
from gohsp.recipe import Recipe
from gohsp.report import plots
from gohsp.settings import SEED, WORKERS, require, whole
from gohsp.structure import BlockShape, shapes_from_json

console = Console()
Positional = tyro.conf.Positional
T = TypeVar("T")
Flat = Annotated[T, tyro.conf.arg(name="")]
"""A nested dataclass whose flags stand without its field's name before them."""


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Train a small ViT on scikit-learn's digits, prune it by the whole GOHSP route, reload it and report."""

    out: Path = Path("runs/demo")
    """Folder of the run."""
    budget: str = "params=-50%"
    """Upper bound on the pruned model."""
    resume: bool = False
    """Go on with an interrupted demo."""
    overwrite: bool = False
    """Replace an earlier demo."""

    def __call__(self, command: Sequence[str]) -> None:
        """Run the demo."""
        text = importlib.resources.files("gohsp").joinpath("demo.toml").read_text(encoding="utf-8")
        recipe = recipes.from_mapping(tomllib.loads(text), where="demo.toml")
        source = data.DataSource(source="digits")
        result = pipeline.prune(
            "vit_tiny_patch16_224",
            source,
            self.budget,
            self.out,
            recipe=recipe,
            resume=self.resume,
            overwrite=self.overwrite,
            command=command,
        )
        show_summary(result.report, self.out)


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model."""

    weights: Path | None = None
    """A .safetensors file with timm's key names, for a model given by its timm name."""
    pretrained: bool = False
    """Fetch timm's own pretrained weights."""


@dataclass(frozen=True, kw_only=True)
class Rank:
    """Rank attention heads on their graph; print the table, write ranking.json and a picture of the graph."""

    model: Positional[str]
    """A timm name, or a folder that gohsp wrote."""
    data: str
    """A folder of class folders, hfds/..., wds/... or digits."""
    split: str = "train"
    """The split to draw images from; no label is read."""
    images: int = 256
    """How many."""
    block: int = 0
    """The block whose graph is drawn."""
    out: Path = Path("ranking")
    """Folder for ranking.json and graph.png."""
    seed: int = 0
    """Which images are drawn."""
    source: Flat[ModelOptions] = field(default_factory=ModelOptions)
    settings: Flat[ranking.RankingSettings] = field(default_factory=ranking.RankingSettings)

    def __post_init__(self) -> None:
        require("--images", self.images, whole())
        require("--seed", self.seed, SEED)

    def __call__(self, _command: Sequence[str]) -> None:
        """Rank."""
        model = checkpoint.open_model(self.model, weights=self.source.weights, pretrained=self.source.pretrained)
        structure = models.describe(model)
        if not 0 <= self.block < len(structure.blocks):
            raise PlanError(f"--block must be from 0 to {len(structure.blocks) - 1}, got {self.block}")
        preprocessing = data.Preprocessing.from_model(model)
        batches = data.calibration_images(
            data.DataSource(source=self.data),
            self.split,
            self.images,
            transform=data.eval_transform(preprocessing),
            seed=self.seed,
        )
        accelerator = training.make_accelerator("auto")
        with console.status("ranking heads"):
            heads = ranking.rank_heads(
                model.to(accelerator.device),
                structure,
                batches,
                self.settings,
                seed=self.seed,
                precision=training.autocast_dtype(accelerator),
            )
        record = heads.to_json()
        self.out.mkdir(parents=True, exist_ok=True)
        checkpoint.write_atomic(self.out / "ranking.json", json.dumps(record, indent=2) + "\n")
        figure = plots.head_graph(
            record["transition"][self.block], record["scores"][self.block], title=f"block {self.block}"
        )
        figure.savefig(self.out / "graph.png", dpi=150)
        title = f"{escape(self.model)}: {record['method']}, {record['edge']}"
        table = Table("block", "heads, best first (score)", title=title)
        for i, scores in enumerate(record["scores"]):
            order = sorted(range(len(scores)), key=lambda h: -scores[h])
            table.add_row(str(i), "  ".join(f"{h} ({scores[h]:.4f})" for h in order))
        console.print(table)
        _say(f"wrote {self.out / 'ranking.json'} and {self.out / 'graph.png'}")


@dataclass(frozen=True, kw_only=True)
class Prune:
    """Prune a model to a budget.

    The training route ranks heads, allocates, cuts, repairs in closed form, fine-tunes and reports; with
    --admm-stage.epochs it trains with ADMM's pull before the cut. --route oneshot ends with the repair, and needs
    neither labels nor training.
    """

    model: Positional[str]
    """A timm name, or a folder that gohsp wrote."""
    data: str
    """A folder of class folders, hfds/..., wds/... or digits."""
    budget: str
    """Such as params=4.0M, params=-40%, macs=0.9G, macs=-30% or latency=-25%."""
    out: Path
    """Folder of the run."""
    recipe: Path | None = None
    """A TOML recipe; the flags below override it."""
    plan: Path | None = None
    """An edited plan.json whose widths to use."""
    calibration_size: int | None = None
    """Unlabelled training images for statistics and repairs; short for --data.calibration-images."""
    resume: bool = False
    """Go on with the run that the folder holds."""
    overwrite: bool = False
    """Replace the run that the folder holds."""
    source: Flat[ModelOptions] = field(default_factory=ModelOptions)
    settings: Flat[Recipe] = field(default_factory=Recipe)

    def __call__(self, command: Sequence[str]) -> None:
        """Prune."""
        recipe = self.settings
        if self.calibration_size is not None:
            require("--calibration-size", self.calibration_size, whole())
            settings = dataclasses.replace(recipe.data, calibration_images=self.calibration_size)
            recipe = dataclasses.replace(recipe, data=settings)
        result = pipeline.prune(
            self.model,
            data.DataSource(source=self.data),
            self.budget,
            self.out,
            recipe=recipe,
            weights=self.source.weights,
            pretrained=self.source.pretrained,
            shapes=_read_plan(self.plan) if self.plan else None,
            resume=self.resume,
            overwrite=self.overwrite,
            command=command,
        )
        show_summary(result.report, self.out)


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Score a model on a labelled split."""

    model: Positional[str]
    """A timm name, or a folder that gohsp wrote."""
    data: str
    """A folder of class folders, hfds/..., wds/... or digits."""
    split: str = "validation"
    """The split to score on."""
    batch_size: int = 64
    """Images a batch."""
    workers: int = 0
    """Processes that read images."""
    precision: training.Precision = "no"
    """Mixed precision of the forward pass."""
    strict: bool = False
    """End at the first unreadable image."""
    json: bool = False
    """Print one line of JSON and nothing else."""
    source: Flat[ModelOptions] = field(default_factory=ModelOptions)

    def __post_init__(self) -> None:
        require("--batch-size", self.batch_size, whole())
        require("--workers", self.workers, WORKERS)

    def __call__(self, _command: Sequence[str]) -> None:
        """Evaluate."""
        model = checkpoint.open_model(self.model, weights=self.source.weights, pretrained=self.source.pretrained)
        accelerator = training.make_accelerator(self.precision)
        split = data.open_split(data.DataSource(source=self.data), self.split)
        batches = data.loader(
            split,
            transform=data.eval_transform(data.Preprocessing.from_model(model)),
            batch_size=self.batch_size,
            shuffle=False,
            workers=self.workers,
            num_classes=int(model.num_classes),  # type: ignore[arg-type]
            strict=self.strict,
        )
        with training.progress_bar(disable=self.json) as bar:
            task = bar.add_task(f"evaluate {self.split}", total=len(batches), rate="")
            metrics = evaluate(
                model.to(accelerator.device),
                batches,
                device=accelerator.device,
                precision=training.autocast_dtype(accelerator),
                advance=lambda: bar.advance(task),
            )
        if self.json:
            sys.stdout.write(json.dumps(metrics.to_json()) + "\n")
            return
        if split.unreadable:
            console.print(f"[yellow]{len(split.unreadable)} images could not be read and are not counted[/yellow]")
        console.print(f"top-1 {metrics.top1:.2f} %  top-5 {metrics.top5:.2f} %  loss {metrics.loss:.4f}  n {metrics.n}")


@dataclass(frozen=True, kw_only=True)
class Report:
    """Write a run's report.html again from its report.json, and print the summary."""

    run: Positional[Path]
    """Folder of a finished run."""

    def __call__(self, _command: Sequence[str]) -> None:
        """Report."""
        content = report.read(self.run)
        report.write(content, self.run)
        show_summary(content, self.run)


def show_summary(content: dict[str, Any], folder: Path) -> None:
    """Print the before/after table."""
    table = Table(*report.HEADERS, title=f"{content['model']['architecture']} at {content['budget']['requested']}")
    for row in report.summary_table(content):
        table.add_row(*(f"{value} ({change})" if change else value for value, change in row.cells()))
    console.print(table)
    _say(f"model and report in {folder} (open {folder / 'report.html'})")


def _say(text: str) -> None:
    """Print a line as it is: brackets in a path are no markup, and a path is not broken."""
    console.print(text, markup=False, soft_wrap=True)


def _read_plan(path: Path) -> tuple[BlockShape, ...]:
    try:
        return shapes_from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise PlanError(f"plan '{path}' cannot be read ({error}); give a plan.json that gohsp wrote") from error


VERBS: dict[str, Any] = {"demo": Demo, "rank": Rank, "prune": Prune, "evaluate": Evaluate, "report": Report}


def _verbs(recipe: Recipe) -> Any:
    """The union of verbs, ``prune`` with the recipe's values as its flags' defaults."""
    m: Any = tyro.MISSING
    prune = Prune(model=m, data=m, budget=m, out=m, settings=recipe)
    marks: dict[str, Any] = {name: tyro.conf.subcommand(name) for name in VERBS}
    marks["prune"] = tyro.conf.subcommand("prune", default=prune)
    # Made at run time, where a type checker cannot follow.
    verbs = [Annotated[verb, marks[name]] for name, verb in VERBS.items()]
    return Union[tuple(verbs)]  # noqa: UP007 # pyrefly: ignore


def _recipe_of(arguments: Sequence[str]) -> Recipe:
    """The recipe that ``--recipe`` names, read before the flags that override it."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--recipe", type=Path)
    path = early.parse_known_args(list(arguments))[0].recipe
    return recipes.read(path) if path else Recipe()


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 0 done, 1 refused or failed, 2 misused, 130 interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(
        level=logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(level=logging.WARNING, console=Console(stderr=True), show_path=False)],
    )
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        verb = tyro.cli(_verbs(_recipe_of(arguments)), prog="gohsp", description=__doc__, args=arguments)
        verb(["gohsp", *arguments])
    except GohspError as error:
        message = f"[bold red]error:[/bold red] {escape(str(error))}"
        Console(stderr=True).print(message, highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted; what is finished is kept: go on with --resume")
        return 130
    return 0
