"""Whole runs on digits with a tiny model: what a run writes, refuses, resumes and counts."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import gohsp
from gohsp import Config, config, report, steps, training
from gohsp.core import admm, curves
from gohsp.data import DataSource
from gohsp.errors import BudgetError, ConfigError, DataError, GohspError, NonFiniteError, PlanError, RunError
from gohsp.structure import (
    MACS,
    PARAMS,
    AttentionWidths,
    Bound,
    FfnWidths,
    Network,
    Widths,
    absent,
    cost_of,
    kept_widths,
    parse_budget,
)
from robustness import child

pytestmark = pytest.mark.usefixtures("no_pictures")

SMALL = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 32, "depth": 2, "num_heads": 4}
ONE_EPOCH = {"epochs": 1, "learning_rate": 3e-3, "warmup": 0.0}
SETTINGS: dict[str, Any] = {
    "method": "gohsp",
    "seed": 3,
    "device": "cpu",
    "precision": "no",
    "model_arguments": SMALL,
    "compare_dense": False,
    "calibration": {"images": 64},
    "widths": {"multiple": 2, "min_width": 2},
    "dense": ONE_EPOCH,
    "admm": ONE_EPOCH,
    "finetune": ONE_EPOCH,
    "training": {"batch_size": 128, "augment": "none"},
}
ONESHOT: dict[str, Any] = {"method": "oneshot", "dense": {"epochs": 0}}
FINETUNE: dict[str, Any] = {"method": "finetune", "dense": {"epochs": 0}}
NO_TRAINING: dict[str, Any] = {**FINETUNE, "finetune": {"epochs": 0}}
WIDTHS: dict[str, AttentionWidths | FfnWidths] = {
    "blocks.0.attn": AttentionWidths(heads=3, qk=4, vo=6),
    "blocks.0.mlp": FfnWidths(units=50),
    "blocks.1.attn": AttentionWidths(heads=4, qk=8, vo=8),
    "blocks.1.mlp": FfnWidths(units=7),
}


def config_with(**changes: Any) -> Config:
    return config.from_mapping({**SETTINGS, **changes})


def tiny(**arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **{**SMALL, "num_classes": 10, **arguments})


def run(out: Path, **options: Any) -> gohsp.RunResult:
    given = {
        "model": "vit_tiny_patch16_224",
        "source": "digits",
        "budget": "params=-40%",
        "config": config_with(),
    }
    return gohsp.run(**{**given, "out": out, **options})


def interrupt(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> gohsp.RunResult:
    """One whole run, every stage one epoch."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    return run(out, config=config_with(compare_dense=True), command=["gohsp", "prune"])


# A finished run


def test_the_folder_holds_what_the_documentation_says(finished: gohsp.RunResult):
    names = sorted(p.name for p in finished.folder.iterdir())
    expected = "config.json dense model.safetensors plan.json ranking.json report.html report.json request.json run.log"
    assert names == [*expected.split(), "settings.toml"]
    assert "finetune" in (finished.folder / "run.log").read_text()
    assert config.read(finished.folder / "settings.toml") == config_with(compare_dense=True)
    content = json.loads((finished.folder / "report.json").read_text())
    assert json.loads((finished.folder / "ranking.json").read_text()) == content["ranking"]
    assert json.loads((finished.folder / "plan.json").read_text()) == content["plan"]["pruned"]


def test_the_report_is_valid_and_complete(finished: gohsp.RunResult):
    content = finished.report
    assert report.read(finished.folder) == content
    lengths = {name: len(curve) for name, curve in content.curves}
    assert lengths == {"dense": 1, "admm": 1, "finetune": 1, "dense_retrained": 2}
    assert content.method == "gohsp"
    assert content.command == ("gohsp", "prune")
    assert content.seed == 3
    assert content.data.model_dump() == {
        "source": "digits",
        "train_split": "train",
        "validation_split": "validation",
        "image_size": 8,
        "classes": 10,
        "class_names": tuple("0123456789"),
        "calibration_images": 64,
        "train_images": 1257,
        "validation_images": 180,
        "unreadable_images": 0,
    }
    assert content.admm is not None
    assert content.admm.trace
    assert {"dense", "rank", "allocate", "repair", "admm", "cut", "finetune", "latency"} <= set(content.timings)
    assert content.curves.finetune[-1].top1 == content.pruned.top1
    assert content.curves.dense[-1].top1 == content.dense.top1
    assert content.dense_retrained is not None
    assert content.dense_retrained.params == content.dense.params
    assert content.config == config.to_mapping(config_with(compare_dense=True))


def test_the_budget_is_met_from_above_within_one_percent(finished: gohsp.RunResult):
    budget, params = finished.report.budget, sum(p.numel() for p in finished.model.parameters())
    dense = sum(p.numel() for p in tiny().parameters())
    assert budget.limit == int(0.6 * dense)
    assert 0.99 * budget.limit <= params <= budget.limit
    assert budget.achieved == finished.report.pruned.params == params
    assert finished.report.dense.params == dense


def test_the_cut_model_equals_the_masked_one(finished: gohsp.RunResult):
    equality = finished.report.equality
    assert equality.max_relative_difference <= equality.tolerance <= 1e-5
    assert equality.images == 8


def test_the_saved_model_is_the_returned_one(finished: gohsp.RunResult):
    loaded = gohsp.load(finished.folder)
    images = torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(loaded(images), finished.model(images))
    assert not finished.model.training
    saved = json.loads((finished.folder / "config.json").read_text())
    content = json.loads((finished.folder / "report.json").read_text())
    assert saved["metrics"] == {k: content["pruned"][k] for k in ("top1", "top5", "loss", "n")}
    assert saved["kept"] == content["plan"]["kept"]
    assert gohsp.describe(gohsp.load(finished.folder / "dense")).widths == gohsp.describe(tiny()).widths


def test_the_command_line_scores_the_result_in_a_new_process_as_reported(finished: gohsp.RunResult, tmp_path: Path):
    ended = child.gohsp(["evaluate", str(finished.folder), "--data", "digits", "--json"], child.Home(tmp_path)).wait()
    assert ended.status == 0, ended.output
    scores = json.loads(ended.output)
    assert list(scores) == ["top1", "top5", "loss", "n"]
    reported = finished.report.pruned
    assert (scores["top1"], scores["top5"], scores["n"]) == (reported.top1, reported.top5, 180)
    assert scores["loss"] == pytest.approx(reported.loss, rel=1e-5)


def test_a_run_interrupted_between_steps_ends_as_the_uninterrupted_one(
    finished: gohsp.RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The same request and seed give the same result, in one attempt or in four."""
    settings = config_with(compare_dense=True)
    out = tmp_path / "run"
    trained: list[str] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        trained.append(kwargs["name"])
        return training.train(*args, **kwargs)

    monkeypatch.setattr("gohsp.api.train", counted)
    resume = False
    for place in ("gohsp.steps.analyse", "gohsp.models.compact", "gohsp.report.write"):
        with monkeypatch.context() as patch:
            patch.setattr(place, interrupt)
            with pytest.raises(KeyboardInterrupt):
                run(out, config=settings, resume=resume, command=["gohsp", "prune"])
        assert (out / "state").is_dir()
        resume = True
    with pytest.raises(RunError, match="already holds a run"):
        run(out, config=settings)
    with pytest.raises(RunError, match=r"config\.seed = 3, now it is 4"):
        run(out, config=dataclasses.replace(settings, seed=4), resume=True)
    result = run(out, config=settings, resume=True, command=["gohsp", "prune"])
    assert trained == ["dense", "admm", "finetune", "dense_retrained"]  # no stage twice
    assert result.report.timings.keys() == finished.report.timings.keys()  # those of earlier attempts stand
    assert not (out / "state").exists()
    whole, again = finished.model.state_dict(), result.model.state_dict()
    for name, tensor in whole.items():
        torch.testing.assert_close(again[name], tensor, rtol=1e-4, atol=1e-6, msg=name)

    def comparable(content: report.Report) -> list[Any]:
        kept = ("plan", "ranking", "budget", "data", "model", "config")
        scored = ("dense", "pruned", "dense_retrained")
        return [getattr(content, key) for key in kept] + [getattr(content, key).top1 for key in scored]

    assert comparable(result.report) == comparable(finished.report)


def test_another_seed_gives_another_model(finished: gohsp.RunResult, tmp_path: Path):
    changes = {"method": "finetune", "finetune": {"epochs": 0}}
    other = run(tmp_path / "run", config=config_with(seed=4, **changes))
    assert other.report.curves.dense[0].train_loss != finished.report.curves.dense[0].train_loss


def test_a_given_plan_is_used_and_a_given_model_is_left_alone(tmp_path: Path):
    model = tiny()
    before, attributes = copy.deepcopy(model.state_dict()), set(vars(model))
    result = run(tmp_path / "run", model=model, widths=WIDTHS, config=config_with(**FINETUNE))
    assert gohsp.describe(result.model).widths == WIDTHS
    assert kept_widths(result.report.plan.kept) == WIDTHS
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert plan["blocks.0.attn"] == {"heads": 3, "qk": 4, "vo": 6}
    assert plan["blocks.0.mlp"] == {"units": 50}
    assert result.report.plan.stages is None  # no curve was measured
    assert result.report.fidelity is not None
    assert result.report.fidelity.predicted_distance is None
    assert result.report.admm is None  # no such stage was run
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert set(vars(model)) == attributes
    assert model.training
    assert not (tmp_path / "run" / "dense").exists()


def test_a_plan_may_leave_whole_sublayers_out(tmp_path: Path):
    widths = {**WIDTHS, "blocks.0.attn": absent(WIDTHS["blocks.0.attn"]), "blocks.1.mlp": FfnWidths(units=0)}
    result = run(tmp_path / "run", model=tiny(), widths=widths, config=config_with(**ONESHOT))
    assert result.report.plan.pruned == widths
    assert gohsp.describe(result.model).widths == widths
    images = torch.randn(2, 1, 8, 8)
    assert torch.equal(gohsp.load(tmp_path / "run")(images), result.model(images))


def test_what_is_excluded_stays_whole(tmp_path: Path):
    result = run(tmp_path / "run", model=tiny(), exclude=["blocks.0", "qk"], config=config_with(**ONESHOT))
    plan = result.report.plan
    assert [plan.pruned[name] == plan.dense[name] for name in ("blocks.0.attn", "blocks.0.mlp")] == [True, True]
    assert plan.pruned["blocks.1.attn"].qk in (0, plan.dense["blocks.1.attn"].qk)  # type: ignore[union-attr]
    with pytest.raises(RunError, match="exclude"):
        run(tmp_path / "run", model=tiny(), exclude=["blocks.1"], config=config_with(**ONESHOT), resume=True)


def test_a_macs_budget_and_a_pruned_model_to_start_from(finished: gohsp.RunResult, tmp_path: Path):
    network = gohsp.describe(finished.model)
    settings = config_with(**NO_TRAINING, model_arguments={})
    result = run(tmp_path / "run", model=str(finished.folder), budget="macs=-20%", config=settings)
    limit = int(0.8 * cost_of(network, network.widths, MACS))
    budget = result.report.budget
    assert (budget.kind, budget.requested, budget.limit) == ("macs", "macs=-20%", limit)
    assert result.report.pruned.macs == budget.achieved <= limit
    assert result.report.dense.top1 == finished.report.pruned.top1


class Wrapped(nn.Module):
    """A model of the user's own with a ViT inside."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = tiny(num_classes=0)
        self.head = nn.Linear(32, 10)
        self.pretrained_cfg = {"mean": (0.5,), "std": (0.5,), "crop_pct": 1.0}

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(images))


@pytest.mark.parametrize("method", [ONESHOT, NO_TRAINING], ids=["oneshot", "finetune"])
def test_a_module_of_the_users_own_is_pruned_saved_and_resumed(tmp_path: Path, method: dict[str, Any]):
    torch.manual_seed(0)
    model = Wrapped().eval()
    result = run(tmp_path / "run", model=model, config=config_with(**method))
    assert result.report.model.library is None
    assert result.report.model.architecture.endswith("Wrapped")
    assert result.report.budget.achieved <= result.report.budget.limit
    images = torch.randn(2, 1, 8, 8)
    assert torch.equal(gohsp.load(tmp_path / "run", into=Wrapped())(images), result.model(images))
    again = run(tmp_path / "run", model=model, config=config_with(**method), resume=True)
    assert torch.equal(again.model(images), result.model(images))
    del model.pretrained_cfg
    with pytest.raises(DataError, match=r"Wrapped does not say.*gohsp\.prune"):
        run(tmp_path / "other", model=model, config=config_with(**method))
    assert not (tmp_path / "other").exists()


# Refused before any work


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"budget": "params=1K"}, BudgetError, r"no plan meets 1,000 parameters: the smallest .* has \d,\d{3}"),
        ({"budget": "params=50M"}, BudgetError, "the model has 26,"),
        ({"budget": "parms=-10%"}, BudgetError, "did you mean 'params'"),
        (
            {"widths": WIDTHS, "budget": "params=10K"},
            PlanError,
            r"given plan costs \d\d,\d{3} parameters, the budget allows",
        ),
        ({"widths": dict(list(WIDTHS.items())[:2])}, PlanError, r"the plan lacks \['blocks\.1\.attn'"),
        ({"exclude": ["blocks.9"]}, PlanError, r"there are 'blocks\.0' to 'blocks\.1'"),
        ({"source": "no/such/folder"}, DataError, "no such folder"),
        ({"config": config_with(data={"train_split": "trian"})}, DataError, "did you mean 'train'"),
        ({"config": config_with(data={"validation_split": "train"})}, DataError, "same, 'digits' split 'train'"),
        ({"model": "vit_tny_patch16_224"}, GohspError, "'vit_tiny_patch16_224'"),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(
    tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
):
    with pytest.raises(error, match=message):
        run(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_models_that_cannot_be_used_are_refused_before_any_work(tmp_path: Path):
    with pytest.raises(DataError, match=r"label 6, allowed: 0 to 4 \(5 classes\)"):
        run(tmp_path / "run", model=tiny(num_classes=5))
    broken = tiny()
    with torch.no_grad():
        broken.get_parameter("norm.bias")[0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"'norm\.bias' holds 1 NaN"):
        run(tmp_path / "run", model=broken)
    with pytest.raises(GohspError, match="ResNet"):
        run(tmp_path / "run", model=timm.create_model("resnet18"))
    assert not (tmp_path / "run").exists()


# Image folders


def write_images(root: Path, count: int) -> None:
    generator = np.random.default_rng(0)
    for label, name in enumerate(("ant", "bee")):
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = generator.integers(0, 120, (8, 8)) + 120 * label
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{i}.png")


def test_a_folder_without_splits_is_refused(tmp_path: Path):
    write_images(tmp_path / "images", 4)
    with pytest.raises(DataError, match=r"images are the same.*sub-folder for each.*train\[:90%\]"):
        run(tmp_path / "run", source=str(tmp_path / "images"))
    write_images(tmp_path / "split" / "val", 4)
    settings = config_with(data={"train_split": "val"})
    with pytest.raises(DataError, match=r"images are the same, folder '.*val'"):
        run(tmp_path / "run", source=str(tmp_path / "split"), config=settings)
    assert not (tmp_path / "run").exists()


def test_that_a_folder_has_no_splits_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    write_images(tmp_path / "images", 4)
    monkeypatch.setattr("gohsp.steps.analyse", interrupt)  # by then calibration images are drawn
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", model=tiny(), source=str(tmp_path / "images"), config=config_with(**ONESHOT))
    assert caplog.text.count("has no split folders") == 1


def test_unreadable_images_are_counted_and_do_not_end_the_run(tmp_path: Path):
    """One would be alone in its batch, in training and in validation."""
    write_images(tmp_path / "images" / "train", 8)
    write_images(tmp_path / "images" / "validation", 4)
    for split in ("train", "validation"):
        Image.new("RGB", (64, 64), (9, 99, 200)).save(tmp_path / "whole.jpg")
        content = (tmp_path / "whole.jpg").read_bytes()
        (tmp_path / "images" / split / "bee" / "z.jpg").write_bytes(content[: len(content) // 2])
    settings = config_with(**FINETUNE, training={"batch_size": 1, "augment": "light"})
    source = DataSource(source=str(tmp_path / "images"))
    model = tiny(num_classes=2)
    result = run(tmp_path / "run", model=model, source=source, config=settings, widths=WIDTHS)
    assert result.report.data.unreadable_images == 2
    assert result.report.data.train_images == 17
    assert result.report.pruned.n == 8
    strict = dataclasses.replace(settings, data=dataclasses.replace(settings.data, strict=True))
    with pytest.raises(DataError, match=r"z\.jpg"):
        run(tmp_path / "strict", model=model, source=source, config=strict, widths=WIDTHS)


def test_resident_images_train_and_score_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    settings = config_with(**FINETUNE, training={"augment": "light"})
    resident = dataclasses.replace(settings, data=dataclasses.replace(settings.data, resident=True))
    ordinary = run(tmp_path / "ordinary", model=tiny(), config=settings, widths=WIDTHS).report

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("an ordinary loader was made")

    monkeypatch.setattr("gohsp.data.loader", refuse)
    there = run(tmp_path / "resident", model=tiny(), config=resident, widths=WIDTHS).report
    assert there.dense.model_dump() == pytest.approx(ordinary.dense.model_dump(), rel=1e-4)
    assert there.data == ordinary.data
    losses = [content.curves.finetune[0].train_loss for content in (there, ordinary)]
    assert losses[0] == pytest.approx(losses[1], rel=0.1)


def test_compiled_training_runs_through_the_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls: dict[int, int] = {}

    def compile_(model: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
        number = len(calls)
        calls[number] = 0

        def compiled(images: torch.Tensor) -> torch.Tensor:
            calls[number] += 1
            return model(images)

        return compiled

    monkeypatch.setattr("torch.compile", compile_)
    run(
        tmp_path / "run",
        model=tiny(),
        config=config_with(**FINETUNE, training={"compile": True}),
        widths=WIDTHS,
    )
    assert len(calls) == 2  # student and teacher of the one stage
    assert all(count == 1258 // 64 for count in calls.values())


# One-shot


def test_oneshot_reads_no_label_and_trains_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("labels were read")

    monkeypatch.setattr("gohsp.data.Split.labels", refuse)
    monkeypatch.setattr("gohsp.api.train", refuse)
    model = tiny()
    before = copy.deepcopy(model.state_dict())
    result = run(tmp_path / "run", model=model, config=config_with(**ONESHOT))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    content = report.read(tmp_path / "run")
    assert content.method == "oneshot"
    assert content.pruned.params == sum(p.numel() for p in result.model.parameters())
    assert content.pruned.params <= content.budget.limit
    assert content.pruned.top1 is None
    assert content.admm is None
    assert not any(curve for _, curve in content.curves)
    fidelity = content.fidelity
    assert fidelity is not None
    assert fidelity.images == 128  # of 1,258 training images enough are left
    assert fidelity.predicted_distance is not None
    assert fidelity.predicted_distance > 0
    assert {"rank", "allocate", "cut", "latency"} == set(content.timings)
    again = gohsp.load(tmp_path / "run")
    images = torch.randn(2, 1, 8, 8)
    assert torch.equal(again(images), result.model(images))


def spy_on_curves(monkeypatch: pytest.MonkeyPatch) -> list[Network]:
    """The networks that damage curves are measured of, one after the other."""
    seen: list[Network] = []
    measure = curves.measure_curves

    def spy(model: nn.Module, network: Network, *arguments: Any, **named: Any) -> Any:
        seen.append(network)
        return measure(model, network, *arguments, **named)

    monkeypatch.setattr(curves, "measure_curves", spy)
    return seen


@pytest.mark.parametrize("stages", [2, None])
def test_allocation_in_stages_looks_again_half_way(stages: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen = spy_on_curves(monkeypatch)
    widths = {"multiple": 2, "min_width": 2, "min_ffn": 0.25, "depth": False}
    settings = config_with(**ONESHOT, widths=widths | ({"stages": stages} if stages else {}))
    result = run(tmp_path / "run", model=tiny(), config=settings, budget="params=-50%")
    dense, half = (cost_of(network, network.widths, PARAMS) for network in seen)
    assert half <= dense * 0.5**0.5 < half * 1.02
    floors = [{getattr(sub, "floor", 0) for sub in network.present} for network in seen]
    assert floors == [{0}, {0, 32}]  # a quarter of the dense model's units
    budget = result.report.budget
    assert 0.99 * budget.limit <= budget.achieved <= budget.limit
    assert all(of.units >= 32 for of in result.report.plan.pruned.values() if isinstance(of, FfnWidths))
    assert result.report.fidelity is not None
    assert result.report.fidelity.predicted_distance is not None
    assert result.report.fidelity.predicted_distance > 0


@pytest.mark.parametrize(("budget", "stages"), [("params=-20%", 1), ("params=-50%", 2), ("macs=-60%", 3)])
def test_deeper_cuts_are_allocated_in_more_stages(
    budget: str, stages: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    measured = spy_on_curves(monkeypatch)
    result = run(tmp_path / "run", model=tiny(), config=config_with(**ONESHOT), budget=budget)
    assert len(measured) == stages
    assert result.report.plan.stages == stages


def test_impossible_stages_are_refused():
    with pytest.raises(ConfigError, match=r"widths\.stages"):
        config_with(widths={"stages": 0})


def count_multiplications(contestants: list[Callable[[], object]], _device: torch.device, _rounds: int) -> list[float]:
    """A clock that no other process can disturb."""
    times = []
    for call in contestants:
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            call()
        times.append(counter.get_total_flops() / 1e6)
    return times


@pytest.mark.parametrize(("uniform", "stages"), [(False, 1), (False, 2), (False, None), (True, None)])
def test_a_latency_budget_is_met_and_nearly_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uniform: bool, stages: int | None
):
    monkeypatch.setattr("gohsp.latency.interleaved", count_multiplications)
    measured = spy_on_curves(monkeypatch)
    widths = {"multiple": 1, "min_width": 1} | ({"stages": stages} if stages else {})
    settings = config_with(**ONESHOT, uniform=uniform, widths=widths)
    result = run(tmp_path / "run", model=tiny(), config=settings, budget="latency=-25%")
    budget, speed = result.report.budget, result.report.speed
    assert budget.kind == "latency"
    assert speed is not None
    assert budget.limit == pytest.approx(0.75 * speed.dense_ms)
    assert budget.achieved == speed.pruned_ms
    assert 0.95 * budget.limit <= budget.achieved <= budget.limit
    taken = result.report.plan.stages
    assert taken == len(measured) == (stages or 1)
    assert "times as fast" in (tmp_path / "run" / "report.html").read_text()


def test_a_latency_budget_that_nothing_meets_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("gohsp.latency.interleaved", count_multiplications)
    with pytest.raises(BudgetError, match=r"ms a batch: the smallest"):
        run(tmp_path / "run", model=tiny(), config=config_with(**ONESHOT), budget="latency=-99%")


def latency_search(monkeypatch: pytest.MonkeyPatch, budget: str, milliseconds: Callable[[float], float]) -> float:
    """Search where a plan is its own bound, at least 10, and the dense model takes 100 ms."""
    monkeypatch.setattr(steps, "_slowest_pair", lambda _s, _d, _b, limit: (100.0, milliseconds(limit)))

    def widths(bound: Bound) -> Any:
        assert bound.limit >= 10
        return bound.limit

    choice = steps._Choice(10.0, widths, lambda _: None, None)
    goal = parse_budget(budget)
    start = Bound(PARAMS, goal.bound(100.0))
    return steps._within_latency(None, None, goal, choice, start)  # type: ignore[arg-type, return-value]


def test_what_the_table_takes_for_too_small_is_tried_at_its_smallest(monkeypatch: pytest.MonkeyPatch):
    assert latency_search(monkeypatch, "latency=-50%", lambda bound: 49 if bound < 10.1 else 300) == pytest.approx(10)
    assert latency_search(monkeypatch, "latency=-50%", lambda bound: 1.4 * bound) == pytest.approx(50 / 1.4, rel=0.03)
    with pytest.raises(BudgetError, match=r"no plan was measured to meet latency=-50%"):
        latency_search(monkeypatch, "latency=-50%", lambda bound: 51 if bound < 10.1 else 300)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_given_plan_must_meet_a_latency_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float):
    monkeypatch.setattr("gohsp.latency.interleaved", count_multiplications)
    given = {
        name: dataclasses.replace(of, **{key: int(share * getattr(of, key))})
        for name, of in gohsp.describe(tiny()).widths.items()
        for key in ["vo" if isinstance(of, AttentionWidths) else "units"]
    }
    options = {"model": tiny(), "config": config_with(**ONESHOT), "budget": "latency=-20%", "widths": given}
    if share == 1:
        with pytest.raises(PlanError, match=r"the given plan takes .* ms a batch, the budget allows"):
            run(tmp_path / "run", **options)
    else:
        result = run(tmp_path / "run", **options)
        assert result.report.budget.achieved <= result.report.budget.limit


@pytest.mark.parametrize(("images", "warned"), [(1, True), (10, True), (64, False)])
def test_few_images_give_a_finite_model_and_a_warning(
    tmp_path: Path, images: int, warned: bool, caplog: pytest.LogCaptureFixture
):
    settings = config_with(**ONESHOT, calibration={"images": images})
    result = run(tmp_path / "run", model=tiny(), config=settings)
    assert all(torch.isfinite(v).all() for v in result.model.state_dict().values())
    assert result.report.fidelity is not None
    assert np.isfinite(result.report.fidelity.distance)
    assert (f"{images} calibration images are fewer than the model's 32 channels" in caplog.text) == warned


def without_repair(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let cuts mask what goes, and nothing else; then there is much left to tune."""

    def masked(session: Any, dense: nn.Module, work: nn.Module, *of: Any) -> Any:
        return steps.masked(session, work, *of, "norm")

    monkeypatch.setattr(steps, "cut", masked)


def test_oneshot_repair_beats_plain_projection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    options = {"model": tiny(), "config": config_with(**ONESHOT), "widths": WIDTHS}
    repaired = run(tmp_path / "repaired", **options).report.fidelity
    without_repair(monkeypatch)
    plain = run(tmp_path / "plain", **options).report.fidelity
    assert repaired is not None
    assert plain is not None
    assert repaired.distance < 0.5 * plain.distance


def healed(result: gohsp.RunResult) -> tuple[report.Heal, float]:
    """How healing went, and the distance that is left."""
    assert result.report.heal is not None
    assert result.report.fidelity is not None
    return result.report.heal, result.report.fidelity.distance


def test_healing_is_kept_as_far_as_it_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr("gohsp.data.sources._DigitsSplit.raw_labels")
    without_repair(monkeypatch)
    settings = {"epochs": 2, "learning_rate": 1e-3}
    result = run(tmp_path / "run", model=tiny(), config=config_with(**ONESHOT, heal=settings), widths=WIDTHS)
    heal, distance = healed(result)
    assert [step.blocks for step in heal.curve] == [0, 1, 2]
    assert heal.kept > 0
    assert distance == pytest.approx(heal.curve[heal.kept].distance, rel=1e-4)
    assert distance < heal.curve[0].distance
    assert "windows of blocks, where these images gained most" in (tmp_path / "run" / "report.html").read_text()
    images = torch.randn(2, 1, 8, 8)
    assert torch.equal(gohsp.load(tmp_path / "run")(images), result.model(images))
    wild = config_with(**ONESHOT, heal=settings | {"learning_rate": 1e3})
    worse, left = healed(run(tmp_path / "wild", model=tiny(), config=wild, widths=WIDTHS))
    assert worse.kept == 0
    assert left == pytest.approx(heal.curve[0].distance, rel=1e-4)
    assert "No window" in (tmp_path / "wild" / "report.html").read_text()


def test_healing_is_taken_up_where_a_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    without_repair(monkeypatch)
    options = {"model": tiny(), "config": config_with(**ONESHOT, heal={"epochs": 2}), "widths": WIDTHS}
    whole = run(tmp_path / "whole", **options)
    assert healed(whole)[0].kept > 0
    with monkeypatch.context() as patch:
        patch.setattr("gohsp.report.write", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "run", **options)
    monkeypatch.setattr("gohsp.core.healing.heal", interrupt)  # which is not called again
    resumed = run(tmp_path / "run", resume=True, **options)
    assert resumed.report.heal == whole.report.heal
    images = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(resumed.model(images), whole.model(images))


def test_a_module_in_training_mode_half_precision_or_frozen_is_pruned_alike(tmp_path: Path):
    settings = config_with(**ONESHOT, heal={"epochs": 1})
    model = tiny(drop_rate=0.3, drop_path_rate=0.5).bfloat16()
    plain = run(tmp_path / "plain", model=copy.deepcopy(model).float().eval(), config=settings, widths=WIDTHS)
    model.train().requires_grad_(False)
    odd = run(tmp_path / "odd", model=model, config=settings, widths=WIDTHS)
    assert odd.report.fidelity == plain.report.fidelity
    assert odd.report.heal == plain.report.heal
    assert model.training
    assert next(model.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize("method", ["oneshot", "gohsp"])
def test_passes_in_bf16_on_a_cpu_leave_the_slow_fused_kernel_alone(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    mixed: list[bool] = []
    fused = F.scaled_dot_product_attention

    def watched(*given: Any, **options: Any) -> torch.Tensor:
        mixed.append(torch.is_autocast_enabled("cpu"))
        return fused(*given, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    heal = {"epochs": int(method == "oneshot")}
    settings = config_with(method=method, dense={"epochs": 0}, heal=heal, precision="bf16", compare_dense=True)
    result = run(tmp_path / "run", model=tiny(), config=settings, widths=None)
    assert mixed  # by the clock, in float32
    assert not any(mixed)
    mixed.clear()
    result.model(torch.randn(2, 1, 8, 8))
    present = [of for of in result.report.plan.pruned.values() if isinstance(of, AttentionWidths) and of.heads]
    assert mixed == [False] * len(present)  # its blocks use the fused kernel again


def test_held_out_images_are_none_that_were_measured_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_images(tmp_path / "images" / "train", 20)
    for name in ("c.png", "d.png"):
        (tmp_path / "images" / "train" / "bee" / name).write_bytes(b"no image")
    sides: list[torch.Tensor] = []
    compared = steps.compare

    def spy(session: Any, *networks: nn.Module) -> Any:
        images = session.calibration
        sides.extend(torch.cat(list(side)).flatten(1) for side in (images.images, images.holdout))
        return compared(session, *networks)

    monkeypatch.setattr(steps, "compare", spy)
    settings = config_with(**ONESHOT, calibration={"images": 1024})
    options = {"model": tiny(num_classes=2), "source": str(tmp_path / "images"), "widths": WIDTHS}
    run(tmp_path / "run", config=settings, **options)
    calibration, holdout = sides
    assert len(holdout) == 3  # a twentieth of 42
    assert len(calibration) == 37
    assert (calibration[:, None] - holdout[None]).abs().amax(-1).min() > 0
    strict = dataclasses.replace(settings, data=dataclasses.replace(settings.data, strict=True))
    with pytest.raises(DataError, match=r"[cd]\.png"):
        run(tmp_path / "strict", config=strict, **options)


def test_healing_where_fine_tuning_follows_is_refused():
    with pytest.raises(ConfigError, match=r"heal\.epochs"):
        config_with(heal={"epochs": 1})


def test_oneshot_with_training_of_the_dense_model_is_refused():
    with pytest.raises(ConfigError, match=r"dense\.epochs"):
        config_with(method="oneshot")


def test_a_run_goes_on_with_the_weights_it_began_with_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A module has no name to tell it from another, and a file can be overwritten."""
    model, options = tiny(), {"widths": WIDTHS, "config": config_with(**NO_TRAINING)}
    with monkeypatch.context() as patch:
        patch.setattr("gohsp.steps.analyse", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "run", model=model, **options)
    other = copy.deepcopy(model)
    with torch.no_grad():
        next(other.parameters()).add_(1e-3)
    with pytest.raises(RunError, match="weights_hash"):
        run(tmp_path / "run", model=other, resume=True, **options)
    assert run(tmp_path / "run", model=model, resume=True, **options).folder == tmp_path / "run"


@pytest.mark.parametrize("given", ["image_key", "label_key"])
def test_settings_that_name_one_column_leave_the_other_as_the_source_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str
):
    opened: list[DataSource] = []
    keys = {"image_key": "a", "label_key": "b"}

    def spy(source: DataSource, split: str) -> Any:
        opened.append(source)
        raise KeyboardInterrupt

    monkeypatch.setattr("gohsp.data.open_split", spy)
    with pytest.raises(KeyboardInterrupt):
        run(
            tmp_path / "run",
            model=tiny(),
            source=DataSource(source="digits", **keys),
            config=config_with(data={given: "c"}),
        )
    assert opened == [DataSource(source="digits", **keys | {given: "c"})]


# ADMM


@pytest.mark.parametrize("metric", ["data", "norm"])
def test_admm_begins_with_the_repaired_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metric: str):
    """And with the dense one in a metric of weights, where a masked unit would have no gradient to come back by."""
    began: list[tuple[torch.Tensor, Mapping[str, Any] | None]] = []
    start = admm.start

    def spy(model: nn.Module, network: Network, widths: Widths, *args: Any, support: Any, **named: Any) -> Any:
        weight = model.get_parameter("blocks.1.mlp.fc2.weight")
        began.append((weight.detach().abs().sum(0) > 0, support))
        return start(model, network, widths, *args, support=support, **named)

    monkeypatch.setattr(admm, "start", spy)
    settings = config_with(dense={"epochs": 0}, finetune={"epochs": 0}, admm={**ONE_EPOCH, "metric": metric})
    content = run(tmp_path / "run", model=tiny(), config=settings, widths=WIDTHS).report
    [(alive, support)] = began
    if metric == "data":
        assert support is not None
        assert alive.nonzero().flatten().tolist() == list(support["blocks.1.mlp"].units)
        assert content.admm is not None
        assert content.admm.trace[0].primal < 0.1
    else:
        assert support is None
        assert alive.all()


@pytest.mark.parametrize("metric", ["activation", "norm"])
def test_a_metric_of_weights_cuts_what_admm_settled_on(tmp_path: Path, metric: str):
    settings = config_with(dense={"epochs": 0}, finetune={"epochs": 0}, admm={**ONE_EPOCH, "metric": metric})
    content = run(tmp_path / "run", model=tiny(), config=settings, widths=WIDTHS).report
    assert content.admm is not None
    assert content.admm.metric == metric
    assert content.admm.trace
    assert content.plan.pruned == WIDTHS
