"""The command line, ``gohsp VERB``: demo, rank, prune, evaluate, bench, export, push, report. A verb is a dataclass."""

from __future__ import annotations

import _thread
import argparse
import dataclasses
import importlib.resources
import json
import logging
import os
import signal
import sys
import time
import tomllib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union

import tyro
from rich.logging import RichHandler
from rich.markup import escape
from rich.table import Column, Table
from torch import Tensor, nn

from gohsp import api, console, data, exporting, files, hub, models, opening, report, runs
from gohsp import config as configs
from gohsp.benchmark import Benchmark, Spread, bench
from gohsp.config import Config, Dtype
from gohsp.core.ranking import RankingSettings
from gohsp.errors import ConfigError, GohspError, PlanError, RunError, StorageError
from gohsp.evaluation import evaluate
from gohsp.report import Report as RunReport
from gohsp.report import comparison
from gohsp.runs import folder as folders
from gohsp.runtime import (
    Device,
    Precision,
    Progress,
    ProgressCallback,
    pick_device,
    require_one_process,
    resolve_precision,
    telling,
)
from gohsp.settings import POSITIVE, SEED, WORKERS, require, whole
from gohsp.structure import SublayerWidths, widths_from_json
from gohsp.trackers import tracking

Positional = tyro.conf.Positional
T = TypeVar("T")
Flat = Annotated[T, tyro.conf.arg(name="")]
"""A nested dataclass whose flags stand without its field's name before them."""
Folder = Annotated[str, tyro.conf.arg(metavar="PATH")]
"""A folder to write to, as it was given: an empty name is not the present folder."""


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Train a small ViT on scikit-learn's digits, prune it by method gohsp, reload it and report."""

    out: Folder = "runs/demo"
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
        with console.progress() as progress:
            result = runs.run(
                "vit_tiny_patch16_224",
                "digits",
                self.budget,
                self.out,
                config=configs.from_mapping(tomllib.loads(text), where="demo.toml"),
                resume=self.resume,
                overwrite=self.overwrite,
                command=command,
                progress=progress,
            )
        show_summary(result.report, result.folder)


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model."""

    weights: Path | None = None
    """A .safetensors, .pth, .pt or .bin file, for a name or in place of a folder's; tensors alone are read of it."""
    pretrained: bool = False
    """Fetch the weights that timm, torchvision or the hub has under the name."""
    revision: str | None = None
    """Branch, tag or hash of a commit, of OWNER/NAME on the hub; by default its main branch."""

    def opened(self, name: str) -> nn.Module:
        """The model of that name, which must have weights."""
        opening.require_weights(name, self.weights, self.pretrained)
        return opening.open_model(name, weights=self.weights, pretrained=self.pretrained, revision=self.revision)


@dataclass(frozen=True, kw_only=True)
class Rank:
    """Rank attention heads on their graph; print the table, write ranking.json and a picture of the graph."""

    model: Positional[str]
    """A folder of gohsp, transformers or timm, a timm name, torchvision:NAME, or OWNER/NAME on the Hugging Face hub."""
    data: str
    """A folder of class folders, hfds/..., wds/... or digits."""
    split: str = "train"
    """The split to draw images from; no label is read."""
    images: int = 256
    """How many."""
    attention: str | None = None
    """The attention whose graph is drawn; by default the first."""
    at: str = ""
    """Name of the module whose heads are ranked, such as vision_model; by default all of the model."""
    out: Folder = "ranking"
    """Folder for ranking.json and graph.png."""
    seed: int = 0
    """Which images are drawn."""
    source: Flat[ModelOptions] = field(default_factory=ModelOptions)
    settings: Flat[RankingSettings] = field(default_factory=RankingSettings)

    def __post_init__(self) -> None:
        require("--images", self.images, whole())
        require("--seed", self.seed, SEED)

    def __call__(self, _command: Sequence[str]) -> None:
        """Rank."""
        model = self.source.opened(self.model)
        names = [sub.name for sub in models.describe(model, at=self.at).attentions]
        if self.attention not in (None, *names):
            raise PlanError(f"--attention must be one of {names}, got '{self.attention}'")
        batches = data.calibration_images(
            data.DataSource(source=self.data),
            self.split,
            self.images,
            transform=data.eval_transform(data.Preprocessing.from_model(model)),
            seed=self.seed,
        )
        out, drawn = _made(self.out), self.attention or names[0]
        with console.notes.status("ranking heads"):
            config = Config(at=self.at, ranking=self.settings, seed=self.seed)
            ranking = report.Ranking.of(api.rank(model.to(pick_device("auto")), batches, config=config))
        text = json.dumps(ranking.model_dump(mode="json"), indent=2) + "\n"
        files.write_atomic(out / "ranking.json", text)
        _draw_graph(ranking, drawn, out / "graph.png")
        table = Table(
            "attention",
            f"heads, best first (score{', last step' * (ranking.steps > 1)})",
            title=f"{escape(self.model)}: {ranking.method}",
        )
        for name, scores in ranking.scores.items():
            order = sorted(range(len(scores)), key=lambda h: -scores[h])
            steps = ranking.last_steps(name)
            told = [f"{h} ({scores[h]:.4f}{f', {steps[h]}' if steps else ''})" for h in order]
            table.add_row(escape(name), "  ".join(told))
        console.results.print(table)
        _say(f"wrote {out / 'ranking.json'} and {out / 'graph.png'}")


def _draw_graph(ranking: report.Ranking, attention: str, path: Path) -> None:
    from gohsp.report import plots  # matplotlib takes a second to import

    chain, left_at = (ranking.transition[attention], ranking.scores[attention]), ranking.last_steps(attention)
    figure = plots.head_graph(*chain, title=attention, left_at=left_at)
    with files.replacing(path) as picture:
        figure.savefig(picture, format="png", dpi=150)


@dataclass(frozen=True, kw_only=True)
class Prune:
    """Prune a model to a budget.

    --method oneshot ranks heads, allocates, cuts and repairs: a thousand unlabelled images, minutes. --method finetune
    trains the result, with labels. --method gohsp, the paper's, trains with ADMM's pull before the cut, too.
    """

    model: Positional[str]
    """A folder of gohsp, transformers or timm, a timm name, torchvision:NAME, or OWNER/NAME on the Hugging Face hub."""
    data: str
    """A folder of class folders, hfds/..., wds/... or digits."""
    budget: str
    """Such as params=4.0M, params=-40%, macs=0.9G, macs=-30% or latency=-25%; a --plan has to meet it, too."""
    out: Folder
    """Folder of the run."""
    config: Path | None = None
    """A TOML file of settings; the flags below override it."""
    plan: Path | None = None
    """An edited plan.json whose widths are used as they are, where they meet --budget."""
    exclude: tuple[str, ...] = ()
    """What to leave alone: names of sub-layers or blocks, or kinds of unit (head, qk, vo, ffn)."""
    resume: bool = False
    """Go on with the run that the folder holds."""
    overwrite: bool = False
    """Replace the run that the folder holds."""
    tracker: tuple[str, ...] = ()
    """Experiment trackers to log every epoch of training to, such as tensorboard or wandb; they are installed apart."""
    source: Flat[ModelOptions] = field(default_factory=ModelOptions)
    settings: Flat[Config] = field(default_factory=Config)

    def __call__(self, command: Sequence[str]) -> None:
        """Prune."""
        inputs = {"the settings file": self.config, "the plan": self.plan}
        folders.check(self.out, resume=self.resume, overwrite=self.overwrite, inputs=inputs)
        with _followed(self.tracker, Path(self.out) / "logs", self.settings) as progress:
            result = runs.run(
                self.model,
                self.data,
                self.budget,
                self.out,
                config=self.settings,
                weights=self.source.weights,
                pretrained=self.source.pretrained,
                revision=self.source.revision,
                exclude=self.exclude,
                widths=read_plan(self.plan) if self.plan else None,
                resume=self.resume,
                overwrite=self.overwrite,
                command=command,
                progress=progress,
            )
        show_summary(result.report, result.folder)


@contextmanager
def _followed(trackers: Sequence[str], logs: Path, config: Config) -> Iterator[ProgressCallback]:
    """Bars of progress, and the trackers that are asked for."""
    with console.progress() as bars:
        if not trackers:
            yield bars
            return
        with tracking(trackers, logs, config=config) as tracked:

            def tell(news: Progress) -> None:
                bars(news)
                tracked(news)

            yield tell


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Score a model on a labelled split."""

    model: Positional[str]
    """A folder of gohsp, transformers or timm, a timm name, torchvision:NAME, or OWNER/NAME on the Hugging Face hub."""
    data: str
    """A folder of class folders, hfds/..., wds/... or digits."""
    split: str = "validation"
    """The split to score on."""
    batch_size: int = 64
    """Images a batch."""
    workers: int = 0
    """Processes that read images."""
    precision: Precision = "no"
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
        model = self.source.opened(self.model)
        models.require_classifier(model)
        device = pick_device("auto")
        split = data.open_split(data.DataSource(source=self.data), self.split)
        batches = data.loader(
            split,
            transform=data.eval_transform(data.Preprocessing.from_model(model)),
            batch_size=self.batch_size,
            shuffle=False,
            workers=self.workers,
            num_classes=models.num_classes(model),
            class_names=models.class_names(model),
            strict=self.strict,
        )
        precision = resolve_precision(self.precision, device)
        with console.progress(hidden=self.json) as progress, telling(progress, "evaluate", len(batches)) as advance:
            metrics = evaluate(model.to(device), batches, precision=precision, advance=advance)
        if self.json:
            _say(json.dumps(dataclasses.asdict(metrics)))
            return
        if split.unreadable:
            lost = f"{len(split.unreadable)} images could not be read and are not counted"
            console.results.print(lost, style="yellow")
        console.results.print(
            f"top-1 {metrics.top1:.2f} %  top-5 {metrics.top5:.2f} %  loss {metrics.loss:.4f}  n {metrics.n}"
        )


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a model as a file for another runtime, checked against the model, and a JSON that says what it is."""

    model: Positional[str]
    """A folder of gohsp, transformers or timm, a timm name, torchvision:NAME, or OWNER/NAME on the Hugging Face hub."""
    out: Annotated[str, tyro.conf.arg(metavar="FILE")]
    """The file: one that ends in .onnx, .pt2 (torch) or .xml (openvino)."""
    to: exporting.Target = "onnx"
    """ONNX, a program of torch.export, or OpenVINO's intermediate representation."""
    int8: str | None = None
    """Products with weights in int8: images to calibrate on, a folder of class folders, hfds/..., wds/... or digits."""
    split: str = "train"
    """Their split; no label is read."""
    seed: int = 0
    """Which of them are drawn."""
    tolerance: float | None = None
    """Largest difference of the file's output over the output's scale; by default that of the weights' type."""
    overwrite: bool = False
    """Replace an earlier export."""
    source: Flat[ModelOptions] = field(default_factory=ModelOptions)

    def __post_init__(self) -> None:
        if self.tolerance is not None:
            require("--tolerance", self.tolerance, POSITIVE)
        require("--seed", self.seed, SEED)

    def __call__(self, _command: Sequence[str]) -> None:
        """Export."""
        exporting.require_target(self.out, self.to, overwrite=self.overwrite, int8=self.int8 is not None)
        model = self.source.opened(self.model)
        with console.notes.status("exporting"):
            done = exporting.export(
                model,
                self.out,
                self.to,
                int8=None if self.int8 is None else self._images(model, self.int8),
                tolerance=self.tolerance,
                overwrite=self.overwrite,
            )
        for port in (done.input, done.output):
            _say(f"{port.name}: {port.dtype} [{', '.join(map(str, port.shape))}]")
        check = done.check
        _say(f"differs from the model by at most {check.relative:.1e} of the output's scale ({check.runtime})")
        if done.int8 is not None:
            _say(_told(done.int8))
        _say(f"wrote {done.path} and {done.path}.json")

    def _images(self, model: nn.Module, source: str) -> Iterable[Tensor]:
        return data.calibration_images(
            data.DataSource(source=source),
            self.split,
            exporting.INT8_IMAGES,
            transform=data.eval_transform(data.Preprocessing.from_model(model)),
            seed=self.seed,
        )


def _told(int8: exporting.Int8) -> str:
    """How far a file in int8 is from its model."""
    alike = "" if int8.agreement is None else f", {int8.agreement:.1f} % of first predictions are the same"
    return (
        f"in int8 differs by {100 * int8.difference:.1f} % of the output (root mean squares on {int8.held_out} images)"
        f"{alike}; {int8.size / int8.float_size:.2f} of the size"
    )


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Measure models side by side: time, throughput and memory, in turns; the first is what others are compared with.

    Weights of a name are drawn, since time does not depend on them; those of OWNER/NAME are fetched from the hub.
    """

    models: Positional[tuple[str, ...]]
    """Folders of gohsp, transformers or timm, timm names, torchvision:NAME, OWNER/NAME on the hub, or .onnx files."""
    batch_sizes: tuple[int, ...] = (1, 32)
    """Images a batch: 1 for latency, more for throughput."""
    dtype: Dtype = "float32"
    """Data type of weights and images."""
    device: Device = "auto"
    """The accelerator that is there or the CPU, or one of them."""
    compile: bool = False
    """Time what torch.compile makes of the models."""
    rounds: int = 21
    """How often each model is timed; the median counts."""
    json: bool = False
    """Print one line of JSON and nothing else."""

    def __call__(self, _command: Sequence[str]) -> None:
        """Bench."""
        found = bench(
            dict(_opened(self.models)),
            batch_sizes=self.batch_sizes,
            dtype=self.dtype,
            device=self.device,
            compile=self.compile,
            rounds=self.rounds,
        )
        if self.json:
            _say(json.dumps(dataclasses.asdict(found)))
        else:
            show_benchmark(found)


def _opened(names: Sequence[str]) -> Iterator[tuple[str, nn.Module | Path]]:
    """Models to time; one that is given twice, to see the noise, is numbered."""
    for place, name in enumerate(names, 1):
        turn = names[:place].count(name)
        file = name.endswith(exporting.onnx.SUFFIX)
        model = Path(name) if file else opening.open_model(name, pretrained=opening.is_on_hub(name))
        yield f"{name} ({turn})" if turn > 1 else name, model


def show_benchmark(found: Benchmark) -> None:
    """Print what the models cost, and a table with a row for each of them at each batch size."""
    first = found.models[0]
    costs = Table("model", "parameters", "MACs", title=f"images of {' x '.join(map(str, found.image))}")
    times = Table(
        "batch",
        Column("model", overflow="fold"),
        *(Column(name, no_wrap=True) for name in ("ms a batch", "images/s", "times as fast", "memory")),
        title=f"{found.dtype}{', compiled' if found.compiled else ''}, on {found.device}",
        caption=f"median and ± half the interquartile range of {found.rounds} rounds; {found.threads} threads",
    )
    for model in found.models:
        of_first = (None, None) if model is first else (first.params, first.macs)
        costs.add_row(escape(model.name), *map(_counted, (model.params, model.macs), of_first))
    for timings in zip(*(model.timings for model in found.models), strict=True):
        times.add_section()
        for model, timing in zip(found.models, timings, strict=True):
            times.add_row(
                str(timing.batch_size),
                escape(model.name),
                _spread(timing.milliseconds),
                f"{timing.images_per_second:,.1f}",
                "1" if model is first else _spread(timing.speedup),
                "–" if timing.memory is None else f"{timing.memory / 2**20:,.0f} MiB",
            )
    console.results.print(costs)
    console.results.print(times)


def _counted(count: int | None, first: int | None) -> str:
    """A count, and its change from the first model's, where both are known."""
    if count is None:
        return "–"
    return report.quantity(count) + (f" ({report.signed(report.relative(count, first), 1, ' %')})" if first else "")


def _spread(of: Spread) -> str:
    digits = 0 if of.median >= 100 else 1 if of.median >= 10 else 2
    return f"{of.median:.{digits}f} ± {(of.high - of.low) / 2:.{digits}f}"


@dataclass(frozen=True, kw_only=True)
class Push:
    """Upload a model with its card to the Hugging Face hub. Log in once with `hf auth login`, or set HF_TOKEN."""

    folder: Positional[Path]
    """A folder that a run or gohsp.save wrote."""
    repository: Positional[str]
    """OWNER/NAME; it is made if it is not there."""
    license: str | None = None
    """The base model's licence, as the hub calls it, such as apache-2.0."""
    base_model: str | None = None
    """The hub's OWNER/NAME of the model that was pruned."""
    card: Path | None = None
    """A file with a card of your own."""
    private: bool = False
    """Make a private repository; one that is there must be private."""

    def __call__(self, _command: Sequence[str]) -> None:
        """Push."""
        card = None if self.card is None else _read_card(self.card)
        with console.notes.status("uploading"):
            commit = hub.push_to_hub(
                self.folder,
                self.repository,
                license=self.license,
                base_model=self.base_model,
                card=card,
                private=self.private or None,
            )
        _say(f"pushed {self.folder} to https://huggingface.co/{self.repository}, commit {commit}")


def _read_card(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"card '{path}' cannot be read ({error}); give a text in UTF-8") from error


@dataclass(frozen=True, kw_only=True)
class Report:
    """Write a run's report.html again and print its summary; of several runs, write a page that compares them."""

    runs: Positional[tuple[Path, ...]]
    """Folders of finished runs."""
    out: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """The page that compares several runs; by default comparison.html."""

    def __call__(self, _command: Sequence[str]) -> None:
        """Report."""
        out = self._page()
        reports = {name: _finished(run) for name, run in zip(_names(self.runs), self.runs, strict=True)}
        if out is None:
            (content,), (run,) = reports.values(), self.runs
            report.write(content, run)
            show_summary(content, run)
        else:
            report.compare(reports, out)
            show_comparison(reports)
            _say(f"wrote {out}")

    def _page(self) -> Path | None:
        """Where a comparison goes; None of one run."""
        if not self.runs:
            raise RunError("no run is named; give the folder of one, or of several to compare")
        if len(self.runs) == 1:
            if self.out is not None:
                raise RunError("--out names a page that compares several runs; give more runs, or leave it out")
            return None
        places = [run.resolve() for run in self.runs]
        if twice := [run for run, place in zip(self.runs, places, strict=True) if places.count(place) > 1]:
            raise RunError(f"'{twice[-1]}' is given twice; give each run once")
        out = Path("comparison.html" if self.out is None else self.out)
        if out.suffix != ".html" or out.is_dir():
            raise RunError(f"--out '{out}' must name a file that ends in .html")
        return out


def _finished(run: Path) -> RunReport:
    """The report of a run, which must be finished."""
    if folders.unfinished(run):
        raise RunError(f"'{run}' holds a run that is not finished; go on with it by its command and --resume")
    return report.read(run)


def _names(runs: Sequence[Path]) -> list[str]:
    """What tells runs apart, as short as can be: their paths from the folder that holds them all."""
    places = [run.resolve() for run in runs]
    above = Path(os.path.commonpath([place.parent for place in places]))
    return [str(place.relative_to(above)) for place in places]


def show_summary(content: RunReport, folder: Path) -> None:
    """Print the before/after table."""
    table = Table(*report.headers(content), title=f"{content.model.architecture} at {content.budget.requested}")
    for row in report.summary_table(content):
        table.add_row(*(f"{value} ({change})" if change else value for value, change in row.cells()))
    console.results.print(table)
    _say(f"model and report in {folder} (open {folder / 'report.html'})")


def show_comparison(reports: Mapping[str, RunReport]) -> None:
    """Print the table of several runs, and what keeps them from being compared."""
    measures = comparison.measures_of(reports)
    table = Table("", *comparison.headers_of(measures))
    for row in comparison.rows_of(reports, measures):
        table.add_row(row.mark, escape(row.name), *(f"{value}\n{change}".rstrip() for value, change in row.cells))
    console.results.print(table)
    for caution in comparison.cautions(reports):
        console.results.print(caution, style="yellow")


def _say(text: str) -> None:
    """Print a line as it is: brackets in a path are no markup, and a path is not broken."""
    console.results.print(text, markup=False, highlight=False, soft_wrap=True)


def _made(folder: str) -> Path:
    """A folder to write to, made before the work; an empty name is refused."""
    if not folder:
        raise StorageError("the folder to write to is an empty name; name one, or '.' for this one")
    with files.storing(Path(folder)):
        Path(folder).mkdir(parents=True, exist_ok=True)
    return Path(folder)


def read_plan(path: Path) -> dict[str, SublayerWidths]:
    """Read the widths of an edited ``plan.json``.

    Raises:
        PlanError: No such file, no JSON, or what :func:`gohsp.structure.widths_from_json` refuses.
    """
    try:
        return widths_from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise PlanError(f"plan '{path}' cannot be read ({error}); give a plan.json that gohsp wrote") from error


ABOUT = "Make trained Vision Transformers smaller and faster by structured pruning. More on a verb: gohsp VERB --help"

VERBS: dict[str, Any] = {
    "demo": Demo,
    "rank": Rank,
    "prune": Prune,
    "evaluate": Evaluate,
    "bench": Bench,
    "export": Export,
    "push": Push,
    "report": Report,
}


def _verbs(config: Config) -> Any:
    """The union of verbs, ``prune`` with the file's settings as its flags' defaults."""
    m: Any = tyro.MISSING
    prune = Prune(model=m, data=m, budget=m, out=m, settings=config)
    marks: dict[str, Any] = {name: tyro.conf.subcommand(name) for name in VERBS}
    marks["prune"] = tyro.conf.subcommand("prune", default=prune)
    # Made at run time, where a type checker cannot follow.
    verbs = [Annotated[verb, marks[name]] for name, verb in VERBS.items()]
    return Union[tuple(verbs)]  # noqa: UP007 # pyrefly: ignore


def _config_of(arguments: Sequence[str]) -> Config:
    """The settings that ``--config`` names, read before the flags that override them."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config", type=Path)
    path = early.parse_known_args(list(arguments))[0].config
    return configs.read(path) if path else Config()


class _Terminated(KeyboardInterrupt):
    """SIGTERM: it ends a command as Ctrl-C does."""


@contextmanager
def _interruptible() -> Iterator[None]:
    """While it is open SIGTERM interrupts as Ctrl-C does, and an interruption reaches the command wherever it strikes.

    Python drops what is raised in a finalizer, where it cannot be passed on, and prints its traceback. An interruption
    that strikes there is repeated a moment later, and nothing is printed.
    """

    def interrupt(*_: Any) -> None:
        raise _Terminated

    def repeat(dropped: Any) -> None:
        if not isinstance(dropped.exc_value, KeyboardInterrupt):
            report_dropped(dropped)
            return
        number = signal.SIGTERM if isinstance(dropped.exc_value, _Terminated) else signal.SIGINT
        _thread.start_new_thread(again, (number,))  # threading's locks may be held where a finalizer runs

    def again(number: signal.Signals) -> None:
        time.sleep(0.01)
        if open_:
            _thread.interrupt_main(number)

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # called outside the main thread, which alone gets signals
        yield
        return
    open_, report_dropped, sys.unraisablehook = True, sys.unraisablehook, repeat
    try:
        yield
    finally:
        open_, sys.unraisablehook = False, report_dropped
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


class _Plain(logging.Handler):
    """Warnings where no terminal shows them: a line each, however long."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print level and message."""
        console.say(f"{record.levelname} {record.getMessage()}")


class _Said(logging.Handler):
    """What the log tells of a pruning before its steps, such as the budget, as plain lines on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a message that is no warning, which is shown anyway."""
        if record.levelno == logging.INFO:
            console.say(record.getMessage())


@contextmanager
def _saying() -> Iterator[None]:
    """The command line says such things; a library call does not, in the same process either."""
    said = _Said()
    api.logger.addHandler(said)
    try:
        yield
    finally:
        api.logger.removeHandler(said)


def _set_up() -> None:
    """Warnings and messages go to standard error, in any encoding."""
    console.tolerate_any_character()
    terminal = console.notes.is_terminal
    shown = RichHandler(console=console.notes, show_path=False) if terminal else _Plain()
    shown.setLevel(logging.WARNING)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[shown])
    warnings.filterwarnings("ignore", category=FutureWarning)


def _ended(message: str, verb: Any = None) -> None:
    """Say on standard error why a command ended, and how to go on where it can."""
    if hasattr(verb, "resume") and folders.unfinished(Path(verb.out)):
        message += "; what is finished is kept: go on with --resume"
    console.notes.print(message, highlight=False, soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status.

    0: done, 1: refused or failed, 2: misused, 130: interrupted, 143: terminated.
    """
    verb = None
    try:
        arguments = list(sys.argv[1:] if arguments is None else arguments)
        _set_up()
        with _interruptible(), _saying():
            try:
                require_one_process()
                verb = tyro.cli(_verbs(_config_of(arguments)), prog="gohsp", description=ABOUT, args=arguments)
                verb(["gohsp", *arguments])
                console.deliver()
            except (GohspError, OSError) as error:
                further = verb if isinstance(error, OSError) else None
                _ended(f"[bold red]error:[/bold red] {escape(str(error))}", further)
                with suppress(OSError):  # which is said
                    console.deliver()
                return 1
    except KeyboardInterrupt as interruption:
        terminated = isinstance(interruption, _Terminated)
        with suppress(KeyboardInterrupt):  # from an impatient user
            _ended("terminated" if terminated else "interrupted", verb)
        return 143 if terminated else 130
    return 0
