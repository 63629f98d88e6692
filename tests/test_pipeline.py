"""The whole route on digits with a tiny model: what a run writes, refuses, resumes and counts."""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sysconfig
from collections.abc import Callable
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
from gohsp import Recipe, pipeline, planning, report
from gohsp import recipe as recipes
from gohsp.core import sensitivity
from gohsp.data import DataSource
from gohsp.errors import BudgetError, DataError, GohspError, NonFiniteError, PlanError, RunError
from gohsp.structure import BlockShape, Plan, model_cost

SMALL = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 32, "depth": 2, "num_heads": 4}
ONE_EPOCH = {"epochs": 1, "learning_rate": 3e-3, "warmup": 0.0}
RECIPE = {
    "seed": 3,
    "device": "cpu",
    "model_arguments": SMALL,
    "data": {"calibration_images": 64, "allocation_images": 16, "ranking_images": 32},
    "widths": {"multiple": 2, "min_width": 2},
    "dense": ONE_EPOCH,
    "admm_stage": {**ONE_EPOCH, "schedule": "constant"},
    "finetune": ONE_EPOCH,
    "training": {"batch_size": 128, "precision": "no", "augment": "none"},
    "retrain_dense": False,
}
NO_TRAINING = {"dense": {"epochs": 0}, "admm_stage": {"epochs": 0}, "finetune": {"epochs": 0}}
SHAPES = (BlockShape(heads=3, qk=4, vo=6, ffn=50), BlockShape(heads=4, qk=8, vo=8, ffn=7))


def recipe_with(**changes: Any) -> Recipe:
    return recipes.from_mapping({**RECIPE, **changes})


def tiny(**arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **{**SMALL, "num_classes": 10, **arguments})


def prune(out: Path, **options: Any) -> gohsp.Result:
    given = {
        "model": "vit_tiny_patch16_224",
        "source": "digits",
        "budget": "params=-40%",
        "recipe": recipe_with(),
        "quiet": True,
    }
    return gohsp.prune(**{**given, "out": out, **options})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> gohsp.Result:
    """One whole run, every stage one epoch."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    return prune(out, recipe=recipe_with(retrain_dense=True), command=["gohsp", "prune"])


# A finished run


def test_the_folder_holds_what_the_documentation_says(finished: gohsp.Result):
    names = sorted(p.name for p in finished.folder.iterdir())
    expected = "config.json dense model.safetensors plan.json ranking.json recipe.toml report.html report.json "
    assert names == [*expected.split(), "request.json", "run.log"]
    assert "finetune" in (finished.folder / "run.log").read_text()
    assert recipes.read(finished.folder / "recipe.toml") == recipe_with(retrain_dense=True)
    assert json.loads((finished.folder / "ranking.json").read_text()) == finished.report["ranking"]
    assert json.loads((finished.folder / "plan.json").read_text()) == finished.report["plan"]["pruned"]


def test_the_report_is_valid_and_complete(finished: gohsp.Result):
    assert report.read(finished.folder) == json.loads(json.dumps(finished.report))
    content = finished.report
    assert {k: len(v) for k, v in content["curves"].items()} == {
        "dense": 1,
        "admm": 1,
        "finetune": 1,
        "dense_retrained": 2,
    }
    assert content["command"] == ["gohsp", "prune"]
    assert content["seed"] == 3
    assert content["data"] == {
        "source": "digits",
        "train_split": "train",
        "validation_split": "validation",
        "image_size": 8,
        "classes": 10,
        "class_names": list("0123456789"),
        "calibration_images": 64,
        "train_images": 1257,
        "validation_images": 180,
        "unreadable_images": 0,
    }
    assert content["admm"]["trace"]
    assert {"dense", "rank", "weigh", "allocate", "admm", "compact", "finetune"} <= set(content["timings"])
    assert content["curves"]["finetune"][-1]["top1"] == content["pruned"]["top1"]
    assert content["curves"]["dense"][-1]["top1"] == content["dense"]["top1"]
    assert content["dense_retrained"]["params"] == content["dense"]["params"]


def test_the_budget_is_met_from_above_within_one_percent(finished: gohsp.Result):
    budget, params = finished.report["budget"], sum(p.numel() for p in finished.model.parameters())
    dense = sum(p.numel() for p in tiny().parameters())
    assert budget["limit"] == int(0.6 * dense)
    assert 0.99 * budget["limit"] <= params <= budget["limit"]
    assert budget["achieved"] == finished.report["pruned"]["params"] == params
    assert finished.report["dense"]["params"] == dense


def test_the_cut_model_equals_the_masked_one(finished: gohsp.Result):
    equality = finished.report["equality"]
    assert equality["max_relative_difference"] <= equality["tolerance"] <= 1e-5
    assert equality["images"] == 8


def test_the_saved_model_is_the_returned_one(finished: gohsp.Result):
    loaded = gohsp.load(finished.folder)
    images = torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(loaded(images), finished.model(images))
    assert not finished.model.training
    config = json.loads((finished.folder / "config.json").read_text())
    assert config["metrics"] == {k: finished.report["pruned"][k] for k in ("top1", "top5", "loss", "n")}
    assert config["kept"] == finished.report["plan"]["kept"]
    assert gohsp.describe(gohsp.load(finished.folder / "dense")).shapes == gohsp.describe(tiny()).shapes


def test_the_command_line_scores_the_result_in_a_new_process_as_reported(finished: gohsp.Result):
    script = Path(sysconfig.get_path("scripts")) / "gohsp"
    command = [str(script), "evaluate", str(finished.folder), "--data", "digits", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    (line,) = done.stdout.splitlines()
    scores = json.loads(line)
    assert list(scores) == ["top1", "top5", "loss", "n"]
    reported = finished.report["pruned"]
    assert (scores["top1"], scores["top5"], scores["n"]) == (reported["top1"], reported["top5"], 180)
    assert scores["loss"] == pytest.approx(reported["loss"], rel=1e-5)


def test_a_run_interrupted_between_stages_ends_as_the_uninterrupted_one(
    finished: gohsp.Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The same request and seed give the same result, in one attempt or in four."""
    recipe = recipe_with(retrain_dense=True)
    out = tmp_path / "run"
    trained: list[str] = []
    train = gohsp.pipeline.training.train

    def counted(*args: Any, **kwargs: Any) -> Any:
        trained.append(kwargs["name"])
        return train(*args, **kwargs)

    monkeypatch.setattr(pipeline.training, "train", counted)

    def interrupt(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    resume = False
    for module, name in ((pipeline.ranking, "rank_heads"), (pipeline.models, "compact"), (pipeline.report, "write")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, interrupt)
            with pytest.raises(KeyboardInterrupt):
                prune(out, recipe=recipe, resume=resume, command=["gohsp", "prune"])
        assert (out / "state").is_dir()
        resume = True
    with pytest.raises(RunError, match="already holds a run"):
        prune(out, recipe=recipe)
    with pytest.raises(RunError, match=r"recipe\.seed = 3, now it is 4"):
        prune(out, recipe=dataclasses.replace(recipe, seed=4), resume=True)
    result = prune(out, recipe=recipe, resume=True, command=["gohsp", "prune"])
    assert trained == ["dense", "admm", "finetune", "dense_retrained"]  # no stage twice
    assert result.report["timings"].keys() == finished.report["timings"].keys()  # those of earlier attempts stand
    assert not (out / "state").exists()
    whole, again = finished.model.state_dict(), result.model.state_dict()
    for name, tensor in whole.items():
        torch.testing.assert_close(again[name], tensor, rtol=1e-4, atol=1e-6, msg=name)

    def comparable(content: dict[str, Any]) -> dict[str, Any]:
        kept = ("plan", "ranking", "budget", "data", "model", "recipe")
        return {k: content[k] for k in kept} | {k: content[k]["top1"] for k in ("dense", "pruned", "dense_retrained")}

    assert comparable(result.report) == comparable(finished.report)


def test_another_seed_gives_another_model(finished: gohsp.Result, tmp_path: Path):
    recipe = recipe_with(seed=4, admm_stage={"epochs": 0}, finetune={"epochs": 0}, allocation="uniform")
    other = prune(tmp_path / "run", recipe=recipe)
    assert other.report["curves"]["dense"][0]["train_loss"] != finished.report["curves"]["dense"][0]["train_loss"]


def test_a_given_plan_is_used_and_a_given_model_is_left_alone(tmp_path: Path):
    model = tiny()
    before, attributes = copy.deepcopy(model.state_dict()), set(vars(model))
    recipe = recipe_with(**{**NO_TRAINING, "finetune": ONE_EPOCH})
    result = prune(tmp_path / "run", model=model, shapes=SHAPES, recipe=recipe)
    assert gohsp.describe(result.model).shapes == SHAPES
    assert Plan.from_json(result.report["plan"]["kept"]).shapes == SHAPES
    assert json.loads((tmp_path / "run" / "plan.json").read_text())[0] == {"heads": 3, "qk": 4, "vo": 6, "ffn": 50}
    assert "allocate" not in result.report["timings"]
    assert "admm" not in result.report  # no such stage was run
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert set(vars(model)) == attributes
    assert model.training
    assert not (tmp_path / "run" / "dense").exists()


def test_a_macs_budget_and_a_pruned_model_to_start_from(finished: gohsp.Result, tmp_path: Path):
    structure = gohsp.describe(finished.model)
    recipe = recipe_with(**NO_TRAINING, allocation="uniform", model_arguments={})
    result = prune(tmp_path / "run", model=str(finished.folder), budget="macs=-20%", recipe=recipe)
    limit = int(0.8 * model_cost(structure, structure.shapes, "macs"))
    assert result.report["budget"] | {"achieved": None} == {
        "kind": "macs",
        "requested": "macs=-20%",
        "limit": limit,
        "achieved": None,
    }
    assert result.report["pruned"]["macs"] == result.report["budget"]["achieved"] <= limit
    assert result.report["dense"]["top1"] == finished.report["pruned"]["top1"]


# Refused before any work


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"budget": "params=1K"}, BudgetError, r"no plan meets 1,000 parameters: the smallest .* has \d,\d{3}"),
        ({"budget": "params=50M"}, BudgetError, "the model has 26,"),
        ({"budget": "parms=-10%"}, BudgetError, "did you mean 'params'"),
        (
            {"shapes": SHAPES, "budget": "params=10K"},
            PlanError,
            r"given plan costs \d\d,\d{3} parameters, the budget allows",
        ),
        ({"shapes": SHAPES[:1]}, PlanError, "the plan has 1 blocks, the model has 2"),
        ({"source": "no/such/folder"}, DataError, "no such folder"),
        ({"recipe": recipe_with(data={"train_split": "trian"})}, DataError, "did you mean 'train'"),
        ({"recipe": recipe_with(data={"validation_split": "train"})}, DataError, "same, 'digits' split 'train'"),
        ({"model": "vit_tny_patch16_224"}, GohspError, "'vit_tiny_patch16_224'"),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(
    tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
):
    with pytest.raises(error, match=message):
        prune(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_models_that_cannot_be_used_are_refused_before_any_work(tmp_path: Path):
    with pytest.raises(DataError, match=r"label 6, allowed: 0 to 4 \(5 classes\)"):
        prune(tmp_path / "run", model=tiny(num_classes=5))
    broken = tiny()
    with torch.no_grad():
        broken.get_parameter("norm.bias")[0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"'norm\.bias' holds 1 NaN"):
        prune(tmp_path / "run", model=broken)
    with pytest.raises(GohspError, match="ResNet"):
        prune(tmp_path / "run", model=timm.create_model("resnet18"))
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
        prune(tmp_path / "run", source=str(tmp_path / "images"))
    write_images(tmp_path / "split" / "val", 4)
    recipe = recipe_with(data={"train_split": "val"})
    with pytest.raises(DataError, match=r"images are the same, folder '.*val'"):
        prune(tmp_path / "run", source=str(tmp_path / "split"), recipe=recipe)
    assert not (tmp_path / "run").exists()


def test_unreadable_images_are_counted_and_do_not_end_the_run(tmp_path: Path):
    """One would be alone in its batch, in training and in validation."""
    write_images(tmp_path / "images" / "train", 8)
    write_images(tmp_path / "images" / "validation", 4)
    for split in ("train", "validation"):
        Image.new("RGB", (64, 64), (9, 99, 200)).save(tmp_path / "whole.jpg")
        content = (tmp_path / "whole.jpg").read_bytes()
        (tmp_path / "images" / split / "bee" / "z.jpg").write_bytes(content[: len(content) // 2])
    recipe = recipe_with(
        **NO_TRAINING | {"finetune": ONE_EPOCH},
        training={"batch_size": 1, "precision": "no", "augment": "light"},
    )
    source = DataSource(source=str(tmp_path / "images"))
    model = tiny(num_classes=2)
    result = prune(tmp_path / "run", model=model, source=source, recipe=recipe, shapes=SHAPES)
    assert result.report["data"]["unreadable_images"] == 2
    assert result.report["data"]["train_images"] == 17
    assert result.report["pruned"]["n"] == 8
    strict = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, strict=True))
    with pytest.raises(DataError, match=r"z\.jpg"):
        prune(tmp_path / "strict", model=model, source=source, recipe=strict, shapes=SHAPES)


def test_resident_images_train_and_score_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    recipe = recipe_with(**NO_TRAINING | {"finetune": ONE_EPOCH}, training={"precision": "no", "augment": "light"})
    resident = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, resident=True))
    ordinary = prune(tmp_path / "ordinary", model=tiny(), recipe=recipe, shapes=SHAPES).report

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("an ordinary loader was made")

    monkeypatch.setattr("gohsp.data.loader", refuse)
    there = prune(tmp_path / "resident", model=tiny(), recipe=resident, shapes=SHAPES).report
    assert there["dense"] == pytest.approx(ordinary["dense"], rel=1e-4)
    assert there["data"] == ordinary["data"]
    assert there["curves"]["finetune"][0]["train_loss"] == pytest.approx(
        ordinary["curves"]["finetune"][0]["train_loss"], rel=0.1
    )


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
    recipe = recipe_with(**NO_TRAINING | {"finetune": ONE_EPOCH}, training={"precision": "no", "compile": True})
    prune(tmp_path / "run", model=tiny(), recipe=recipe, shapes=SHAPES)
    assert len(calls) == 2  # student and teacher of the one stage
    assert all(count == 1258 // 64 for count in calls.values())


# The one-shot route


def test_oneshot_reads_no_label_and_trains_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("labels were read")

    monkeypatch.setattr("gohsp.data.Split.labels", refuse)
    monkeypatch.setattr("gohsp.training.train", refuse)
    model = tiny()
    before = copy.deepcopy(model.state_dict())
    recipe = recipe_with(route="oneshot", dense={"epochs": 0})
    result = prune(tmp_path / "run", model=model, recipe=recipe)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    content = report.read(tmp_path / "run")
    assert content["pruned"]["params"] == sum(p.numel() for p in result.model.parameters())
    assert content["pruned"]["params"] <= content["budget"]["limit"]
    assert "admm" not in content
    assert content["curves"] == {}
    assert content["fidelity"]["images"] == 63  # a twentieth of the 1,258 training images
    assert content["fidelity"]["predicted_kl"] > 0
    assert {"rank", "weigh", "allocate", "reconstruct", "compact"} <= set(content["timings"])
    again = gohsp.load(tmp_path / "run")
    images = torch.randn(2, 1, 8, 8)
    assert torch.equal(again(images), result.model(images))


def test_curves_are_measured_once_for_all_budgets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    recipe = recipe_with(route="oneshot", dense={"epochs": 0})
    first = prune(tmp_path / "first", model=tiny(), recipe=recipe, budget="params=-20%")

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("measured again")

    monkeypatch.setattr("gohsp.core.sensitivity.measure_curves", refuse)
    again = prune(tmp_path / "again", model=tiny(), recipe=recipe, budget="params=-20%")
    assert again.report["plan"] == first.report["plan"]
    assert again.report["fidelity"] == first.report["fidelity"]
    prune(tmp_path / "other", model=tiny(), recipe=recipe, budget="params=-30%")
    with pytest.raises(AssertionError, match="measured again"):
        prune(tmp_path / "changed", model=tiny(), recipe=dataclasses.replace(recipe, seed=1), budget="params=-20%")


@pytest.mark.parametrize("stages", [2, None])
def test_allocation_in_stages_looks_again_half_way(stages: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[int] = []
    measure = sensitivity.measure_curves

    def spy(model: nn.Module, stages: Any, structure: Any, *arguments: Any, **named: Any) -> Any:
        seen.append(model_cost(structure, structure.shapes, "params"))
        floors = {block.ffn_floor for block in structure.blocks}
        assert floors == ({0} if len(seen) == 1 else {32})  # a quarter of the dense model's units
        return measure(model, stages, structure, *arguments, **named)

    monkeypatch.setattr("gohsp.core.sensitivity.measure_curves", spy)
    monkeypatch.setenv("GOHSP_CACHE", str(tmp_path / "cache"))
    widths = {"multiple": 2, "min_width": 2, "min_ffn": 0.25}
    recipe = recipe_with(route="oneshot", dense={"epochs": 0}, allocation_stages=stages, widths=widths)
    result = prune(tmp_path / "run", model=tiny(), recipe=recipe, budget="params=-50%")
    dense, half = seen
    assert half <= dense * 0.5**0.5 < half * 1.02
    budget = result.report["budget"]
    assert 0.99 * budget["limit"] <= budget["achieved"] <= budget["limit"]
    assert all(block["ffn"] >= 32 for block in result.report["plan"]["pruned"])
    assert result.report["fidelity"]["predicted_kl"] > 0


def count_curves(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[None]:
    """A list that grows by one entry each time damage curves are measured; none are cached."""
    seen: list[None] = []
    measure = sensitivity.measure_curves

    def spy(*arguments: Any, **named: Any) -> Any:
        seen.append(None)
        return measure(*arguments, **named)

    monkeypatch.setattr("gohsp.core.sensitivity.measure_curves", spy)
    monkeypatch.setenv("GOHSP_CACHE", str(folder / "cache"))
    return seen


@pytest.mark.parametrize(("budget", "stages"), [("params=-20%", 1), ("params=-50%", 2), ("macs=-60%", 3)])
def test_deeper_cuts_are_allocated_in_more_stages(
    budget: str, stages: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    measured = count_curves(monkeypatch, tmp_path)
    recipe = recipe_with(route="oneshot", dense={"epochs": 0}, widths={"multiple": 2, "min_width": 2})
    result = prune(tmp_path / "run", model=tiny(), recipe=recipe, budget=budget)
    assert len(measured) == stages
    assert result.report["plan"]["allocation_stages"] == stages


def test_where_nothing_is_repaired_stages_mask_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    measured = count_curves(monkeypatch, tmp_path)
    monkeypatch.setattr("gohsp.core.reconstruction.reconstruct", None)
    recipe = recipe_with(
        route="oneshot", dense={"epochs": 0}, allocation_stages=2, admm={"projection": {"metric": "euclidean"}}
    )
    prune(tmp_path / "run", model=tiny(), recipe=recipe, budget="params=-50%")
    assert len(measured) == 2


@pytest.mark.parametrize("changes", [{"allocation_stages": 0}, {"allocation_stages": 2, "allocation": "uniform"}])
def test_impossible_stages_are_refused(changes: dict[str, Any]):
    with pytest.raises(GohspError, match="allocation_stages"):
        recipe_with(**changes)


def count_multiplications(contestants: list[Callable[[], object]], _device: torch.device, _rounds: int) -> list[float]:
    """A clock that no other process can disturb."""
    times = []
    for call in contestants:
        with FlopCounterMode(display=False) as counter:
            call()
        times.append(counter.get_total_flops() / 1e6)
    return times


@pytest.mark.parametrize(("kind", "stages"), [("measured", 1), ("measured", 2), ("measured", None), ("uniform", None)])
def test_a_latency_budget_is_met_and_nearly_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, stages: int | None
):
    monkeypatch.setattr("gohsp.latency.interleaved", count_multiplications)
    measured = count_curves(monkeypatch, tmp_path)
    widths = {"multiple": 1, "min_width": 1}
    recipe = recipe_with(route="oneshot", dense={"epochs": 0}, allocation=kind, allocation_stages=stages, widths=widths)
    result = prune(tmp_path / "run", model=tiny(), recipe=recipe, budget="latency=-25%")
    budget, speed = result.report["budget"], result.report["speed"]
    assert budget["kind"] == "latency"
    assert budget["limit"] == pytest.approx(0.75 * speed["dense_ms"])
    assert budget["achieved"] == speed["pruned_ms"]
    assert 0.95 * budget["limit"] <= budget["achieved"] <= budget["limit"]
    taken = result.report["plan"]["allocation_stages"]
    assert len(measured) == (taken or 0)
    assert taken == (None if kind == "uniform" else stages or 1)
    assert "times as fast" in (tmp_path / "run" / "report.html").read_text()


def test_a_latency_budget_that_nothing_meets_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("gohsp.latency.interleaved", count_multiplications)
    recipe = recipe_with(route="oneshot", dense={"epochs": 0}, allocation="uniform")
    with pytest.raises(BudgetError, match=r"ms a batch: the smallest|cost at least .* ms a batch"):
        prune(tmp_path / "run", model=tiny(), recipe=recipe, budget="latency=1%")


def latency_search(monkeypatch: pytest.MonkeyPatch, budget: str, milliseconds: Callable[[float], float]) -> Any:
    """Search where a plan is its own bound, at least 10, and the dense model takes 100 ms."""
    monkeypatch.setattr(planning, "_slowest_pair", lambda _b, _s, _g, bound: (100.0, milliseconds(bound)))

    def shapes(bound: float) -> Any:
        assert bound >= 10
        return bound

    choice = planning.Choice(10.0, shapes, lambda _: None, None)
    goal = gohsp.parse_budget(budget)
    return planning._within_latency(None, None, goal, choice, goal.bound(100.0))  # type: ignore[arg-type]


def test_what_the_table_takes_for_too_small_is_tried_at_its_smallest(monkeypatch: pytest.MonkeyPatch):
    assert latency_search(monkeypatch, "latency=50%", lambda bound: 49 if bound < 10.1 else 300) == pytest.approx(10)
    assert latency_search(monkeypatch, "latency=50%", lambda bound: 1.4 * bound) == pytest.approx(50 / 1.4, rel=0.03)
    with pytest.raises(BudgetError, match=r"no plan was measured to meet latency=50%"):
        latency_search(monkeypatch, "latency=50%", lambda bound: 51 if bound < 10.1 else 300)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_given_plan_must_meet_a_latency_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float):
    monkeypatch.setattr("gohsp.latency.interleaved", count_multiplications)
    recipe = recipe_with(route="oneshot", dense={"epochs": 0})
    dense = gohsp.describe(tiny()).shapes
    given = [dataclasses.replace(s, ffn=int(share * s.ffn), vo=int(share * s.vo)) for s in dense]
    if share == 1:
        with pytest.raises(PlanError, match=r"the given plan takes .* ms a batch, the budget allows"):
            prune(tmp_path / "run", model=tiny(), recipe=recipe, budget="latency=-20%", shapes=given)
    else:
        result = prune(tmp_path / "run", model=tiny(), recipe=recipe, budget="latency=-20%", shapes=given)
        assert result.report["budget"]["achieved"] <= result.report["budget"]["limit"]


@pytest.mark.parametrize(("images", "warned"), [(1, True), (10, True), (64, False)])
def test_few_images_give_a_finite_model_and_a_warning(
    tmp_path: Path, images: int, warned: bool, caplog: pytest.LogCaptureFixture
):
    data = {"calibration_images": images, "allocation_images": images, "ranking_images": images}
    recipe = recipe_with(route="oneshot", dense={"epochs": 0}, data=data)
    result = prune(tmp_path / "run", model=tiny(), recipe=recipe)
    assert all(torch.isfinite(v).all() for v in result.model.state_dict().values())
    assert torch.isfinite(torch.tensor(result.report["fidelity"]["kl"]))
    assert (f"{images} calibration images are fewer than the model's 32 channels" in caplog.text) == warned


def test_oneshot_repair_beats_plain_projection(tmp_path: Path):
    recipe = recipe_with(route="oneshot", dense={"epochs": 0})
    plain = dataclasses.replace(
        recipe,
        admm=dataclasses.replace(
            recipe.admm, projection=gohsp.ProjectionSettings(metric="euclidean", strength="norm", guidance=0.0)
        ),
    )
    runs = [
        prune(tmp_path / name, model=tiny(), recipe=r, shapes=SHAPES).report
        for name, r in (("repaired", recipe), ("plain", plain))
    ]
    assert runs[0]["fidelity"]["kl"] < 0.5 * runs[1]["fidelity"]["kl"]


UNREPAIRED = {"projection": {"metric": "euclidean", "strength": "norm", "guidance": 0.0}}
"""Repairs would leave a polish little to do."""


def test_a_polish_is_kept_as_far_as_it_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr("gohsp.data.sources._DigitsSplit.raw_labels")
    settings = {"epochs": 2, "learning_rate": 1e-3}
    recipe = recipe_with(route="oneshot", dense={"epochs": 0}, admm=UNREPAIRED, polish=settings)
    result = prune(tmp_path / "run", model=tiny(), recipe=recipe, shapes=SHAPES)
    polish = result.report["polish"]
    assert [step["blocks"] for step in polish["curve"]] == list(range(len(SHAPES) + 1))
    assert polish["kept"] > 0
    assert result.report["fidelity"]["kl"] == pytest.approx(polish["curve"][polish["kept"]]["kl"], rel=1e-4)
    assert result.report["fidelity"]["kl"] < polish["curve"][0]["kl"]
    assert "windows of blocks, where these images gained most" in (tmp_path / "run" / "report.html").read_text()
    images = torch.randn(2, 1, 8, 8)
    assert torch.equal(gohsp.load(tmp_path / "run")(images), result.model(images))
    wild = recipe_with(route="oneshot", dense={"epochs": 0}, admm=UNREPAIRED, polish=settings | {"learning_rate": 1e3})
    worse = prune(tmp_path / "wild", model=tiny(), recipe=wild, shapes=SHAPES)
    assert worse.report["polish"]["kept"] == 0
    assert worse.report["fidelity"]["kl"] == pytest.approx(polish["curve"][0]["kl"], rel=1e-4)
    assert "No window of the polish helped" in (tmp_path / "wild" / "report.html").read_text()


def test_a_polish_is_taken_up_where_a_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    recipe = recipe_with(route="oneshot", dense={"epochs": 0}, admm=UNREPAIRED, polish={"epochs": 2})
    arguments = {"model": tiny(), "recipe": recipe, "shapes": SHAPES}
    whole = prune(tmp_path / "whole", **arguments)
    assert whole.report["polish"]["kept"] > 0

    def interrupt(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.report, "write", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prune(tmp_path / "run", **arguments)
    monkeypatch.setattr(pipeline.polish, "polish", interrupt)  # which is not called again
    resumed = prune(tmp_path / "run", resume=True, **arguments)
    assert resumed.report["polish"] == whole.report["polish"]
    images = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(resumed.model(images), whole.model(images))


def test_a_module_in_training_mode_half_precision_or_frozen_is_pruned_alike(tmp_path: Path):
    recipe = recipe_with(route="oneshot", dense={"epochs": 0}, polish={"epochs": 1})
    model = tiny(drop_rate=0.3, drop_path_rate=0.5).bfloat16()
    plain = prune(tmp_path / "plain", model=copy.deepcopy(model).float().eval(), recipe=recipe, shapes=SHAPES)
    model.train().requires_grad_(False)
    odd = prune(tmp_path / "odd", model=model, recipe=recipe, shapes=SHAPES)
    assert odd.report["fidelity"] == plain.report["fidelity"]
    assert odd.report["polish"] == plain.report["polish"]
    assert model.training
    assert next(model.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize("route", ["oneshot", "train"])
def test_passes_in_bf16_on_a_cpu_leave_the_slow_fused_kernel_alone(
    route: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    mixed: list[bool] = []
    fused = F.scaled_dot_product_attention

    def watched(*given: Any, **options: Any) -> torch.Tensor:
        mixed.append(torch.is_autocast_enabled("cpu"))
        return fused(*given, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    half = {**RECIPE["training"], "precision": "bf16", "ema": 0.5}
    polish = {"epochs": int(route == "oneshot")}
    recipe = recipe_with(route=route, dense={"epochs": 0}, polish=polish, training=half, retrain_dense=True)
    result = prune(tmp_path / "run", model=tiny(), recipe=recipe)
    assert mixed  # by the clock, in float32
    assert not any(mixed)
    mixed.clear()
    result.model(torch.randn(2, 1, 8, 8))
    assert mixed == [False] * 2  # its blocks use the fused kernel again


def test_curves_of_another_architecture_are_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    keys: list[str] = []
    monkeypatch.setattr("gohsp.cache.load", lambda _kind, key: keys.append(key))
    recipe = recipe_with(route="oneshot", dense={"epochs": 0})
    for name, heads in (("four", 4), ("eight", 8)):
        model = tiny(num_heads=heads, embed_dim=32)
        prune(tmp_path / name, model=model, recipe=recipe, budget="params=-20%")
    assert len(set(keys)) == 2


def test_held_out_images_are_none_that_were_measured_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_images(tmp_path / "images" / "train", 20)
    for name in ("c.png", "d.png"):
        (tmp_path / "images" / "train" / "bee" / name).write_bytes(b"no image")
    sides: list[torch.Tensor] = []
    compared = pipeline._compared

    def spy(bench: Any, *networks: nn.Module) -> Any:
        sides.extend(torch.cat(list(side)).flatten(1) for side in (bench.calibration, bench.holdout))
        return compared(bench, *networks)

    monkeypatch.setattr(pipeline, "_compared", spy)
    recipe = recipe_with(route="oneshot", dense={"epochs": 0}, data={"calibration_images": 1024})
    source = DataSource(source=str(tmp_path / "images"))
    prune(tmp_path / "run", model=tiny(num_classes=2), source=source, recipe=recipe, shapes=SHAPES)
    calibration, holdout = sides
    assert len(holdout) == 3  # a twentieth of 42
    assert len(calibration) == 37
    assert (calibration[:, None] - holdout[None]).abs().amax(-1).min() > 0
    strict = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, strict=True))
    with pytest.raises(DataError, match=r"[cd]\.png"):
        prune(tmp_path / "strict", model=tiny(num_classes=2), source=source, recipe=strict, shapes=SHAPES)


def test_a_polish_on_the_training_route_is_refused():
    with pytest.raises(GohspError, match=r"polish\.epochs"):
        recipe_with(polish={"epochs": 1})


def test_oneshot_with_training_of_the_dense_model_is_refused():
    with pytest.raises(GohspError, match=r"dense\.epochs"):
        recipe_with(route="oneshot")


def test_a_run_goes_on_with_the_weights_it_began_with_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A module has no name to tell it from another, and a file can be overwritten."""

    def interrupt(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    model, recipe = tiny(), recipe_with(**NO_TRAINING)
    with monkeypatch.context() as patch:
        patch.setattr(pipeline.ranking, "rank_heads", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prune(tmp_path / "run", model=model, shapes=SHAPES, recipe=recipe)
    other = copy.deepcopy(model)
    with torch.no_grad():
        next(other.parameters()).add_(1e-3)
    with pytest.raises(RunError, match="weights_hash"):
        prune(tmp_path / "run", model=other, shapes=SHAPES, recipe=recipe, resume=True)
    assert prune(tmp_path / "run", model=model, shapes=SHAPES, recipe=recipe, resume=True).folder == tmp_path / "run"


@pytest.mark.parametrize("given", ["image_key", "label_key"])
def test_a_recipe_that_names_one_column_leaves_the_other_as_the_source_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str
):
    opened: list[DataSource] = []
    keys = {"image_key": "a", "label_key": "b"}

    def spy(source: DataSource, split: str) -> Any:
        opened.append(source)
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline.data, "open_split", spy)
    source = DataSource(source="digits", **keys)
    with pytest.raises(KeyboardInterrupt):
        pipeline.prune(tiny(), source, "params=-40%", tmp_path / "run", recipe=recipe_with(data={given: "c"}))
    assert opened == [DataSource(source="digits", **keys | {given: "c"})]


@pytest.mark.parametrize(("epochs", "warned"), [(0, True), (1, False)])
def test_settings_of_a_stage_that_is_not_run_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, epochs: int, warned: bool
):
    stage = {"epochs": epochs, "schedule": "constant"}
    settings = {"interval": 3, "rho_end": 0.2, "projection": {"guidance": 0.1}}
    prune(
        tmp_path / "run",
        model=tiny(),
        shapes=SHAPES,
        recipe=recipe_with(**NO_TRAINING | {"admm_stage": stage, "admm": settings}),
    )
    assert ("admm.rho_end, admm.interval has no effect without an ADMM stage" in caplog.text) == warned


@pytest.mark.parametrize("metric", ["data", "euclidean"])
def test_admm_begins_with_the_repaired_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metric: str):
    """And with the dense one in the Euclidean metric, where a masked unit would have no gradient to come back by."""
    began: list[tuple[torch.Tensor, Plan | None]] = []
    start = pipeline.admm.start

    def spy(model: nn.Module, structure: gohsp.ModelStructure, *args: Any, support: Plan | None) -> Any:
        weight = model.get_parameter(structure.blocks[1].ffn_readout.weight)
        began.append((weight.detach().abs().sum(0) > 0, support))
        return start(model, structure, *args, support=support)

    monkeypatch.setattr(pipeline.admm, "start", spy)
    recipe = recipe_with(dense={"epochs": 0}, finetune={"epochs": 0}, admm={"projection": {"metric": metric}})
    report = prune(tmp_path / "run", model=tiny(), recipe=recipe, shapes=SHAPES).report
    [(alive, support)] = began
    if metric == "data":
        assert support is not None
        assert alive.nonzero().flatten().tolist() == list(support.blocks[1].ffn)
        assert report["admm"]["trace"][0]["primal"] < 0.1
    else:
        assert support is None
        assert alive.all()


def test_the_euclidean_metric_cuts_what_admm_settled_on(tmp_path: Path):
    recipe = recipe_with(dense={"epochs": 0}, finetune={"epochs": 0})
    projection = gohsp.ProjectionSettings(metric="euclidean", strength="norm", guidance=0.0)
    recipe = dataclasses.replace(recipe, admm=dataclasses.replace(recipe.admm, projection=projection))
    content = prune(tmp_path / "run", model=tiny(), recipe=recipe, shapes=SHAPES).report
    assert content["admm"]["metric"] == "euclidean"
    assert content["admm"]["trace"]
    assert [BlockShape(**block) for block in content["plan"]["pruned"]] == list(SHAPES)
