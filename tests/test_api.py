"""The public API in memory: the three lines, its parts alone, and what it refuses before any work."""

from __future__ import annotations

import copy
import importlib.util
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.data import create_transform
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import gohsp
from conftest import TINY, randomise
from gohsp.api import tell_budget
from gohsp.config import Config, from_mapping
from gohsp.core.moments import collect_moments
from gohsp.data import DataSource, open_split
from gohsp.errors import BudgetError, CheckpointError, ConfigError, DataError, PlanError, UnsupportedModelError
from gohsp.structure import AttentionWidths, FfnWidths, parse_budget

COUNT = 96
BUDGET = "params=-30%"
PLAIN = from_mapping({"precision": "no"})
SHORT = from_mapping(
    {
        "precision": "no",
        "finetune": {"epochs": 1},
        "admm": {"epochs": 1, "interval": 2},
        "training": {"augment": "none"},
    }
)


@pytest.fixture(scope="module")
def data() -> Tensor:
    return torch.randn(COUNT, 3, 16, 16, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    """A tiny ViT that no test may change."""
    return randomise(timm.create_model("vit_tiny_patch16_224", **{**TINY, "mlp_ratio": 2}), 0).eval()


@pytest.fixture(scope="module")
def pruned(vit: nn.Module, data: Tensor) -> gohsp.Pruned:
    return gohsp.prune(vit, [data], BUDGET, config=PLAIN)


class Pairs(Dataset[Any]):
    """Images and labels, such as a loader batches."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index >= len(self):
            raise IndexError(index)
        return self.images[index], index % TINY["num_classes"]


def loader(images: Tensor) -> DataLoader[Any]:
    return DataLoader(Pairs(images), batch_size=16)


class Saliency(nn.Module):
    """A ViT inside somebody's own module: images in, maps out."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = timm.create_model("vit_tiny_patch16_224", **{**TINY, "num_classes": 0, "mlp_ratio": 2})
        self.norm = nn.BatchNorm2d(32)
        self.decoder = nn.ConvTranspose2d(32, 1, kernel_size=8, stride=8)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.backbone.forward_features(images)[:, self.backbone.num_prefix_tokens :]
        return self.decoder(self.norm(tokens.transpose(1, 2).unflatten(2, (2, 2)))).sigmoid()


def saliency(seed: int = 0) -> nn.Module:
    return randomise(Saliency(), seed).eval()


def same(one: nn.Module, other: nn.Module) -> bool:
    """Whether two models have the same tensors, to the bit."""
    a, b = one.state_dict(), other.state_dict()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


@torch.no_grad()
def outputs(model: nn.Module, images: Tensor) -> Tensor:
    return copy.deepcopy(model).eval()(images)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Check that a model has the weights, modes, frozen weights and classes of modules that it had."""

    def seen() -> list[object]:
        modules = [(name, type(m), m.training, len(m._forward_hooks)) for name, m in model.named_modules()]
        frozen = [(name, p.requires_grad, p.grad is None) for name, p in model.named_parameters()]
        return [modules, frozen]

    before, state = seen(), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    yield
    assert seen() == before
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


# Three lines


def test_three_lines(vit: nn.Module, data: Tensor, tmp_path: Path):
    result = gohsp.prune(vit, loader(data), BUDGET)
    gohsp.save(result.model, tmp_path / "small")
    model = gohsp.load(tmp_path / "small")
    assert torch.equal(outputs(model, data[:4]), outputs(result.model, data[:4]))
    assert same(model, result.model)
    assert gohsp.describe(model).widths == result.widths


def test_what_comes_out_fits_what_went_in(vit: nn.Module, pruned: gohsp.Pruned):
    dense, network = gohsp.describe(vit), gohsp.describe(pruned.model)
    assert pruned.network == dense
    limit = int(0.7 * gohsp.count_params(dense))
    assert 0.96 * limit <= gohsp.count_params(network) <= limit  # eight hidden units are 3 % here
    assert gohsp.count_params(network) == sum(p.numel() for p in pruned.model.parameters())
    assert gohsp.count_macs(network) < gohsp.count_macs(dense)
    assert network.widths == pruned.widths == {name: kept.widths for name, kept in pruned.kept.items()}
    assert pruned.allocation.predicted is not None
    assert pruned.equality <= 1e-5
    assert pruned.fidelity.distance >= 0
    assert (pruned.heal, pruned.soft, pruned.finetune) == (None, None, ())
    assert not pruned.model.training
    assert set(pruned.seconds) == {"rank", "allocate", "cut"}


@pytest.mark.parametrize("budget", ["macs=-25%", "params=20K"])
def test_budgets_are_bounds_that_are_met(vit: nn.Module, data: Tensor, budget: str):
    fine = from_mapping({"precision": "no", "widths": {"multiple": 1, "min_width": 1}})
    small = gohsp.describe(gohsp.prune(vit, [data], budget, config=fine).model)
    dense = gohsp.describe(vit)
    limit = {
        "macs=-25%": 0.75 * gohsp.count_macs(dense),
        "params=20K": 20_000,
    }[budget]
    cost = (gohsp.count_params if budget.startswith("params") else gohsp.count_macs)(small)
    assert 0.99 * limit <= cost <= limit


WRAPPINGS: dict[str, Callable[[Tensor], Iterable[Any]]] = {
    "loader of pairs": loader,
    "loader of tensors": lambda images: DataLoader(TensorDataset(images), batch_size=10),
    "one tensor": lambda images: images,
    "list of images": list,
    "list of batches": lambda images: list(images.split(7)),
    "generator": lambda images: (image for image in images),
    "pairs": lambda images: [(batch, torch.zeros(len(batch))) for batch in images.split(20)],
    "pairs in lists": lambda images: [[batch, None] for batch in images.split(20)],
    "mappings": lambda images: [{"labels": 3, "pixel_values": batch} for batch in images.split(50)],
    "mappings of single images": lambda images: [{"image": image} for image in images],
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_the_result_is_the_same_whatever_the_wrapping(
    vit: nn.Module, data: Tensor, pruned: gohsp.Pruned, wrapping: str
):
    result = gohsp.prune(vit, WRAPPINGS[wrapping](data), BUDGET, config=PLAIN)
    assert result.kept == pruned.kept
    assert same(result.model, pruned.model)
    assert result.fidelity == pruned.fidelity


class Label:
    """What must not be looked at."""

    def __getattribute__(self, name: str) -> Any:
        raise AssertionError("a label was read")


def test_no_label_is_read(vit: nn.Module, data: Tensor, pruned: gohsp.Pruned):
    pairs = [(batch, Label()) for batch in data.split(16)]
    assert same(gohsp.prune(vit, pairs, BUDGET, config=PLAIN).model, pruned.model)
    mappings = [{"labels": Label(), "images": batch} for batch in data.split(16)]
    assert gohsp.rank(vit, mappings, config=PLAIN) == pruned.ranking


def test_only_the_first_images_are_read(vit: nn.Module, data: Tensor):
    read = []

    def endless() -> Iterator[Tensor]:
        while True:
            read.append(1)
            yield data[:16]

    few = from_mapping({"precision": "no", "calibration": {"images": 40, "holdout": 8}})
    result = gohsp.prune(vit, endless(), BUDGET, config=few)
    assert len(read) == 3
    assert result.fidelity.images <= 8


def test_nothing_is_printed_and_nothing_is_written(
    vit: nn.Module,
    data: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    for variable in ("HOME", "TMPDIR", "GOHSP_CACHE", "XDG_CACHE_HOME"):
        (tmp_path / variable).mkdir()
        monkeypatch.setenv(variable, str(tmp_path / variable))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(tempfile, "tempdir", None)
    gohsp.prune(vit, loader(data), BUDGET, method="finetune", config=SHORT, validation=loader(data[:16]))
    gohsp.heal(gohsp.prune(vit, [data], BUDGET).model, vit, [data])
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert capfd.readouterr() == ("", "")


def test_progress_counts_up_to_its_total(vit: nn.Module, data: Tensor):
    heard: list[gohsp.Progress] = []
    config = from_mapping({"precision": "no", "heal": {"epochs": 1}})
    gohsp.prune(vit, [data], BUDGET, config=config, progress=heard.append)
    gohsp.prune(vit, loader(data), BUDGET, method="gohsp", config=SHORT, progress=heard.append)
    heard = [told for told in heard if not told.metrics]  # epochs, which are told besides
    begins = [i for i, told in enumerate(heard) if told.done == 0]
    for first, after in zip(begins, [*begins[1:], len(heard)], strict=True):
        one = heard[first:after]
        assert [told.done for told in one] == list(range(one[0].total + 1))
        assert len({(told.step, told.total) for told in one}) == 1
    steps = {told.step for told in heard}
    assert steps == {"ranking of heads", "damage curves", "cut and repair", "heal", "admm", "finetune"}


def test_progress_of_an_allocation_in_stages_says_which_one_it_is_in(vit: nn.Module, data: Tensor):
    heard: list[gohsp.Progress] = []
    config = from_mapping({"precision": "no", "widths": {"stages": 2}})
    gohsp.prune(vit, [data], BUDGET, config=config, progress=heard.append)
    begun = [told.step for told in heard if told.done == 0]
    stages = ["damage curves", "cut and repair, stage 1 of 2", "damage curves, stage 2 of 2", "cut and repair"]
    assert begun == ["ranking of heads", *stages]


def test_the_same_seed_gives_the_same_model(vit: nn.Module, data: Tensor, pruned: gohsp.Pruned):
    torch.manual_seed(123)
    assert same(gohsp.prune(vit, [data], BUDGET, config=PLAIN).model, pruned.model)


# What is given stays as it is


@pytest.fixture
def in_training(vit: nn.Module) -> nn.Module:
    """A model amid training: frozen in parts, with modes that differ."""
    model: Any = copy.deepcopy(vit).train()
    model.norm.eval()
    model.patch_embed.requires_grad_(False)
    return model


def test_the_given_model_stays_as_it_is(in_training: nn.Module, data: Tensor, pruned: gohsp.Pruned, tmp_path: Path):
    with untouched(in_training):
        result = gohsp.prune(in_training, [data], BUDGET, config=PLAIN)
        gohsp.prune(in_training, loader(data), BUDGET, method="gohsp", config=SHORT)
        gohsp.save(in_training, tmp_path)
        gohsp.describe(in_training)
    assert same(result.model, pruned.model)
    frozen = {name for name, parameter in result.model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"patch_embed.proj.weight", "patch_embed.proj.bias"}


def test_parts_leave_the_given_model_as_it_is(in_training: nn.Module, data: Tensor):
    with untouched(in_training):
        gohsp.rank(in_training, [data], config=PLAIN)
        curves = gohsp.measure_curves(in_training, [data], config=PLAIN)
        widths = gohsp.allocate(in_training, curves, BUDGET)
        part = gohsp.cut(in_training, [data], widths, config=PLAIN)
        with untouched(part.model):
            small = gohsp.compact(part.model, part.kept, data[:4]).model
        gohsp.heal(small, in_training, [data], config=PLAIN)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_what_is_made_has_the_models_data_type(vit: nn.Module, data: Tensor, dtype: torch.dtype):
    given = copy.deepcopy(vit).to(dtype)
    with untouched(given):
        result = gohsp.prune(given, [data], BUDGET, config=PLAIN)
    assert {parameter.dtype for parameter in result.model.parameters()} == {dtype}
    assert torch.isfinite(outputs(result.model, data[:2].to(dtype))).all()


# Parts


def test_curves_serve_several_budgets(vit: nn.Module, data: Tensor, pruned: gohsp.Pruned):
    curves = gohsp.measure_curves(vit, [data], config=PLAIN)
    assert all(isinstance(curve, gohsp.DamageCurve) for of in curves.values() for curve in of.values())
    assert gohsp.allocate(vit, curves, BUDGET) == pruned.widths
    assert gohsp.allocate(gohsp.describe(vit), curves, BUDGET) == pruned.widths
    gentle = gohsp.allocate(vit, curves, "params=-15%")
    heard: list[gohsp.Progress] = []
    result = gohsp.prune(vit, [data], "params=-15%", curves=curves, config=PLAIN, progress=heard.append)
    assert result.widths == gentle != pruned.widths
    assert "damage curves" not in {told.step for told in heard}
    with pytest.raises(ConfigError, match=r"use gohsp\.prune"):
        gohsp.allocate(vit, curves, "latency=-20%")
    with pytest.raises(BudgetError, match="no plan meets 236 parameters"):
        gohsp.allocate(vit, curves, "params=-99%")


def test_parts_together_are_the_whole(vit: nn.Module, data: Tensor, pruned: gohsp.Pruned):
    assert gohsp.rank(vit, [data], config=PLAIN) == pruned.ranking
    assert isinstance(pruned.ranking, gohsp.HeadRanking)
    assert set(pruned.ranking.scores) == {"blocks.0.attn", "blocks.1.attn"}
    part = gohsp.cut(vit, [data], pruned.widths, config=PLAIN)
    assert isinstance(part, gohsp.CutModel)
    assert gohsp.describe(part.model) == gohsp.describe(vit)
    assert part.kept == pruned.kept
    compaction = gohsp.compact(part.model, part.kept, data[:8])
    assert isinstance(compaction, gohsp.Compaction)
    assert compaction.max_relative_difference <= 1e-5
    assert same(compaction.model, pruned.model)


def test_a_given_ranking_chooses_the_heads(vit: nn.Module, data: Tensor):
    ranking = gohsp.rank(vit, [data], config=PLAIN)
    turned = {name: tuple(reversed(scores)) for name, scores in ranking.scores.items()}
    alone = replace(PLAIN, repair=replace(PLAIN.repair, guidance=1.0))
    widths = dict(gohsp.describe(vit).widths)
    widths["blocks.0.attn"] = replace(widths["blocks.0.attn"], heads=1)  # type: ignore[type-var]
    made = gohsp.cut(vit, [data], widths, config=alone)
    again = gohsp.cut(vit, [data], widths, ranking=ranking, config=alone)
    other = gohsp.cut(vit, [data], widths, ranking=replace(ranking, scores=turned), config=alone)
    assert again.kept == made.kept != other.kept
    assert same(again.model, made.model)


def test_rankings_of_other_models_are_refused(vit: nn.Module, data: Tensor):
    ranking = gohsp.rank(vit, [data], config=PLAIN)
    scores = {**ranking.scores, "blocks.1.attn": (0.5,)}
    with pytest.raises(PlanError, match=r"heads of 'blocks\.1\.attn' in the ranking: 1, in this model: 4"):
        gohsp.cut(vit, Unread(), gohsp.describe(vit).widths, ranking=replace(ranking, scores=scores))  # type: ignore[arg-type]


def test_healing_brings_the_cut_model_closer(vit: nn.Module, data: Tensor, pruned: gohsp.Pruned):
    small = copy.deepcopy(pruned.model)
    healing = gohsp.heal(small, vit, [data], config=from_mapping({"precision": "no", "heal": {"epochs": 2}}))
    distances = [step.distance for step in healing.curve]
    assert distances[0] == pytest.approx(pruned.fidelity.distance, rel=1e-4)
    assert min(distances) <= distances[0]
    assert same(small, pruned.model) == (healing.kept == 0)
    whole = gohsp.prune(vit, [data], BUDGET, config=from_mapping({"precision": "no", "heal": {"epochs": 2}}))
    assert whole.heal == healing
    assert same(whole.model, small)


@pytest.mark.parametrize("penalty", ["decoupled", "coupled"])
@pytest.mark.parametrize("metric", ["data", "activation", "norm"])
def test_admm_in_a_loop_of_ones_own(vit: nn.Module, data: Tensor, pruned: gohsp.Pruned, penalty: Any, metric: Any):
    model, network = copy.deepcopy(vit), gohsp.describe(vit)
    settings = gohsp.AdmmSettings(metric=metric, penalty=penalty, rho_start=0.05, rho_end=0.5, interval=2)
    moments = collect_moments(model, network, [data])
    state = gohsp.admm.start(model, network, pruned.widths, moments, pruned.ranking.scores, settings)
    optimizer, batches = torch.optim.AdamW(model.parameters(), lr=1e-4), list(loader(data)) * 3
    for step, (images, labels) in enumerate(batches):
        F.cross_entropy(model(images), labels).backward()
        gohsp.admm.add_penalty_gradients(state)
        optimizer.step()
        optimizer.zero_grad()
        state = gohsp.admm.after_step(state, progress=(step + 1) / len(batches))
    assert len(state.trace) == len(batches) // 2
    if penalty == "decoupled":
        assert state.trace[-1].primal < state.trace[0].primal
    kept = gohsp.admm.finish(state)
    small = gohsp.compact(model, kept, data[:4])
    assert gohsp.describe(small.model).widths == pruned.widths
    torch.testing.assert_close(outputs(small.model, data[:8]), outputs(model, data[:8]), rtol=1e-4, atol=1e-4)


# What is left alone


@pytest.mark.parametrize("entry", ["blocks.0", "blocks.1", "blocks.0.attn", "blocks.1.mlp"])
def test_an_excluded_module_keeps_its_widths(vit: nn.Module, data: Tensor, entry: str):
    dense = gohsp.describe(vit).widths
    result = gohsp.prune(vit, [data], "params=-15%", exclude=[entry], config=PLAIN)
    left = {name for name in dense if name == entry or name.startswith(f"{entry}.")}
    assert left
    assert {name: result.widths[name] for name in left} == {name: dense[name] for name in left}
    assert result.widths != dense
    small, given = result.model.state_dict(), vit.state_dict()
    inside = [name for name in given if name.startswith(tuple(f"{n}." for n in left))]
    assert all(small[name].shape == given[name].shape for name in inside)


@pytest.mark.parametrize("kind", ["head", "qk", "vo", "ffn"])
def test_an_excluded_kind_keeps_its_widths(vit: nn.Module, data: Tensor, kind: str):
    field = {"head": "heads", "ffn": "units"}.get(kind, kind)
    dense = gohsp.describe(vit).widths
    fine = from_mapping({"precision": "no", "widths": {"multiple": 2, "min_width": 2}})
    widths = gohsp.prune(vit, [data], "params=-15%", exclude=[kind], config=fine).widths
    assert widths != dense
    for name, of in dense.items():
        if hasattr(of, field):
            assert getattr(widths[name], field) == getattr(of, field)


def test_exclusions_add_up_and_bind_parts_too(vit: nn.Module, data: Tensor):
    exclude = ["blocks.0.mlp", "head", "qk", "vo"]
    curves = gohsp.measure_curves(vit, [data], exclude=exclude, config=PLAIN)
    widths = gohsp.allocate(vit, curves, "params=-10%", exclude=exclude)
    dense = gohsp.describe(vit).widths
    assert {name for name in dense if widths[name] != dense[name]} == {"blocks.1.mlp"}
    with pytest.raises(BudgetError):
        gohsp.allocate(vit, curves, "params=-30%", exclude=exclude)


# Methods that train


@pytest.mark.parametrize("method", ["finetune", "gohsp"])
def test_methods_that_train(vit: nn.Module, data: Tensor, method: Any, tmp_path: Path):
    result = gohsp.prune(
        vit, loader(data), BUDGET, method=method, config=SHORT, validation=[(data[:16], torch.arange(16) % 5)]
    )
    assert [epoch.epoch for epoch in result.finetune] == [1]
    assert result.finetune[0].top1 is not None
    limit = 0.7 * gohsp.count_params(gohsp.describe(vit))
    assert gohsp.count_params(gohsp.describe(result.model)) <= limit
    assert (result.soft is None) == (method == "finetune")
    if result.soft is not None:
        assert len(result.soft.curve) == 1
        assert len(result.soft.trace) == 3
        assert result.cut.loss_before is not None
        assert result.cut.loss_after is not None
    gohsp.save(result.model, tmp_path)
    assert torch.equal(outputs(gohsp.load(tmp_path), data[:4]), outputs(result.model, data[:4]))


def test_a_list_of_pairs_trains_and_needs_no_validation(vit: nn.Module, data: Tensor):
    pairs = [(batch, torch.arange(len(batch)) % 5) for batch in data.split(16)]
    result = gohsp.prune(vit, pairs, BUDGET, method="finetune", config=SHORT)
    assert result.finetune[0].top1 is None
    assert result.finetune[0].train_loss > 0


# Objectives


def test_a_classifiers_objective_is_inferred(vit: nn.Module, data: Tensor, pruned: gohsp.Pruned):
    assert pruned.fidelity.objective == "classification"
    assert pruned.fidelity.agreement is not None
    for objective in ("classification", gohsp.classification()):
        result = gohsp.prune(vit, [data], BUDGET, objective=objective, config=PLAIN)
        assert same(result.model, pruned.model)
        assert result.fidelity == pruned.fidelity


def test_features_are_an_objective(vit: nn.Module, data: Tensor, pruned: gohsp.Pruned):
    named = gohsp.prune(vit, [data], BUDGET, objective="features", config=PLAIN)
    assert (named.fidelity.objective, named.fidelity.agreement) == ("features", None)
    function = gohsp.prune(vit, [data], BUDGET, objective=lambda returned: returned, config=PLAIN)
    assert same(function.model, named.model)
    assert function.fidelity == named.fidelity
    assert not same(named.model, pruned.model)
    given = gohsp.prune(vit, [data], BUDGET, objective=gohsp.features(scale=2.0), config=PLAIN)
    assert isinstance(gohsp.features(), gohsp.Objective)
    assert given.fidelity.objective == "features"


class Returning(nn.Module):
    """A model that returns a mapping."""

    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        logits = self.vit(images)
        return {"scores": logits, "first": logits[:, 0]}


def test_a_function_finds_what_counts(vit: nn.Module, data: Tensor):
    model = Returning(copy.deepcopy(vit))
    result = gohsp.prune(model, [data], BUDGET, objective=lambda returned: returned["first"], config=PLAIN)
    assert result.fidelity.objective == "features"
    assert list(gohsp.describe(result.model).widths) == [f"vit.{name}" for name in gohsp.describe(vit).widths]
    taken = gohsp.classification(lambda returned: returned["scores"])
    assert gohsp.prune(model, [data], BUDGET, objective=taken, config=PLAIN).fidelity.objective == "classification"
    with pytest.raises(UnsupportedModelError, match="no tensor is found"):
        gohsp.prune(model, [data], BUDGET, config=PLAIN)


# Models of any kind


def test_a_vit_inside_a_module_of_ones_own(data: Tensor, tmp_path: Path):
    model = saliency()
    result = gohsp.prune(model, [data], "params=-25%", config=PLAIN)
    assert result.fidelity.objective == "features"
    assert all(name.startswith("backbone.blocks.") for name in result.widths)
    gohsp.save(result.model, tmp_path / "small")
    expected = outputs(result.model, data[:4])
    with pytest.raises(CheckpointError, match=r"gohsp\.load\(folder, into=module\)"):
        gohsp.load(tmp_path / "small")
    other = saliency(seed=1)
    with untouched(other):
        applied = gohsp.apply(other, tmp_path / "small")
    assert torch.equal(outputs(applied, data[:4]), expected)
    into = saliency(seed=1).train()
    loaded = gohsp.load(tmp_path / "small", into=into)
    assert loaded is into
    assert not loaded.training
    assert torch.equal(outputs(loaded, data[:4]), expected)
    again = gohsp.prune(loaded, [data], "params=-10%", config=PLAIN)  # what is pruned can be pruned
    assert gohsp.count_params(gohsp.describe(again.model)) < gohsp.count_params(gohsp.describe(loaded))


def test_a_module_that_does_not_fit_the_folder_is_refused(data: Tensor, tmp_path: Path, vit: nn.Module):
    gohsp.save(gohsp.prune(saliency(), [data], "params=-25%", config=PLAIN).model, tmp_path / "small")
    with untouched(vit), pytest.raises(CheckpointError, match=r"backbone\.blocks\.0\.attn"):
        gohsp.apply(vit, tmp_path / "small")


def test_a_vit_made_by_its_class(data: Tensor, tmp_path: Path):
    def make(seed: int) -> nn.Module:
        model = VisionTransformer(img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=5)
        return randomise(model, seed).eval()

    result = gohsp.prune(make(0), [data], BUDGET, config=PLAIN)
    assert result.fidelity.objective == "classification"
    gohsp.save(result.model, tmp_path)
    applied = gohsp.apply(make(1), tmp_path)
    assert torch.equal(outputs(applied, data[:4]), outputs(result.model, data[:4]))


GONE: dict[str, gohsp.AttentionWidths | gohsp.FfnWidths] = {
    "blocks.1.attn": gohsp.AttentionWidths(heads=0, qk=0, vo=0),
    "blocks.0.mlp": gohsp.FfnWidths(units=0),
}


@pytest.mark.parametrize("names", [["blocks.1.attn"], ["blocks.0.mlp"], list(GONE)])
def test_a_sublayer_that_is_gone_stays_gone(vit: nn.Module, data: Tensor, tmp_path: Path, names: list[str]):
    widths = {**gohsp.describe(vit).widths, **{name: GONE[name] for name in names}}
    result = gohsp.prune(vit, [data], "params=-5%", widths=widths, config=PLAIN)
    assert result.widths == gohsp.describe(result.model).widths == widths
    assert result.allocation.predicted is None
    gohsp.save(result.model, tmp_path)
    loaded = gohsp.load(tmp_path)
    assert gohsp.describe(loaded) == gohsp.describe(result.model)
    assert torch.equal(outputs(loaded, data[:4]), outputs(result.model, data[:4]))
    again = gohsp.prune(loaded, [data], "params=-10%", config=PLAIN)
    assert all(again.widths[name] == GONE[name] for name in names)
    with pytest.raises(PlanError, match="was removed from this model and cannot come back"):
        gohsp.prune(loaded, [data], "params=-1%", widths=gohsp.describe(vit).widths)


# Refused before any work


class Unread:
    """Images that are not to be read."""

    def __iter__(self) -> Iterator[Tensor]:
        raise AssertionError("images were read")

    def __len__(self) -> int:
        return COUNT


def refuse(error: type[gohsp.GohspError], message: str, *args: Any, **options: Any) -> None:
    heard: list[gohsp.Progress] = []
    with pytest.raises(error, match=message):
        gohsp.prune(*args, **options, progress=heard.append)
    assert heard == []


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "there are no images"),
        (torch.zeros(0, 3, 16, 16), "there are no images"),
        ("photos", "got a str"),
        (b"photos", "got a bytes"),
        (7, "got a int"),
        (None, "got a NoneType"),
        ({"images": torch.zeros(2, 3, 16, 16)}, "got a dict"),
        (["a.jpg"], "got a str with a str"),
        ([[1.0, 2.0]], "got a list with a float"),
        ([()], "got a tuple with a tuple"),
        ([{"label": 3}], r"one of the keys \['pixel_values'.*got \['label'\]"),
        ([{"image": "a.jpg"}], "got a dict with a str"),
        ([torch.zeros(3, 16, 16, dtype=torch.uint8)], r"got \[3, 16, 16\] of torch\.uint8"),
        ([torch.zeros(16, 16)], r"got \[16, 16\] of torch\.float32"),
        ([torch.zeros(3, 16, 16), torch.zeros(3, 24, 24)], r"\[3, 16, 16\] and \[3, 24, 24\]; resize"),
        ([torch.zeros(1, 3, 16, 16), torch.zeros(1, 1, 16, 16)], "images differ in size"),
    ],
    ids=str,
)
def test_images_that_are_none_are_refused(vit: nn.Module, images: Any, message: str):
    with untouched(vit):
        refuse(DataError, message, vit, images, BUDGET)
        for part in (gohsp.rank, gohsp.measure_curves):
            with pytest.raises(DataError, match=message):
                part(vit, images)


def test_images_that_the_model_does_not_take_are_refused(vit: nn.Module, data: Tensor):
    message = r"cannot compute an image of \[3, 24, 24\].*; give images of the size that it takes, \[3, 16, 16\]$"
    refuse(UnsupportedModelError, message, vit, torch.zeros(4, 3, 24, 24), BUDGET)
    refuse(UnsupportedModelError, r"cannot compute an image of \[1, 16, 16\]", vit, data[:, :1], BUDGET)


@pytest.mark.parametrize(
    ("budget", "error"),
    [
        ("params", BudgetError),
        ("flops=-30%", BudgetError),
        ("params=-100%", BudgetError),
        ("params=4M", BudgetError),
        ("params=-99%", BudgetError),
        ("macs=-99.9%", BudgetError),
        (None, BudgetError),
        (0.3, BudgetError),
    ],
)
def test_budgets_that_cannot_be_met_are_refused(vit: nn.Module, budget: Any, error: type[gohsp.GohspError]):
    refuse(error, "budget", vit, Unread(), budget)


@pytest.mark.parametrize(
    ("budget", "told"),
    [
        (" params=-30% ", "budget params=-30%: at most 16,579 of 23,685 parameters"),
        ("latency=-25%", "budget latency=-25%: at most 75 % of the time that the dense model takes"),
        ("latency=8ms", "budget latency=8ms: at most 8.000 ms a batch"),
    ],
)
def test_what_a_budget_was_understood_to_be_is_logged(
    vit: nn.Module, budget: str, told: str, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO", "gohsp.api")
    tell_budget(gohsp.describe(vit), parse_budget(budget))
    assert told in caplog.text


def test_exclusions_can_make_a_budget_impossible(vit: nn.Module):
    refuse(
        BudgetError, "no plan meets 16,579 parameters", vit, Unread(), BUDGET, exclude=["ffn", "blocks.0"], config=None
    )


@pytest.mark.parametrize(
    ("exclude", "message"),
    [
        (["blocks.7"], r"'blocks\.7', which is no sub-layer .*; there are 'blocks\.0' to 'blocks\.1'$"),
        (["ffns"], "did you mean 'ffn'"),
        ("ffn", r"write \['ffn'\]"),
        ([3], "3, which is no sub-layer"),
    ],
)
def test_exclusions_that_name_nothing_are_refused(vit: nn.Module, exclude: Any, message: str):
    refuse(PlanError, message, vit, Unread(), BUDGET, exclude=exclude)


FULL = {"attn": gohsp.AttentionWidths(heads=4, qk=8, vo=8), "mlp": gohsp.FfnWidths(units=64)}


def widths_with(**changes: Any) -> dict[str, Any]:
    full = {f"blocks.{i}.{part}": of for i in (0, 1) for part, of in FULL.items()}
    return {**full, **{name.replace("_", "."): of for name, of in changes.items()}}


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        (widths_with(blocks_0_mlp=gohsp.FfnWidths(units=65)), "from 1 to 64, got 65"),
        (widths_with(blocks_0_mlp=gohsp.FfnWidths(units=-1)), "from 1 to 64, got -1"),
        (widths_with(blocks_0_mlp=gohsp.FfnWidths(units=2.5)), "whole number, got 2.5"),  # type: ignore[arg-type]
        (widths_with(blocks_0_mlp=FULL["attn"]), "must have FfnWidths"),
        (widths_with(blocks_0_attn=gohsp.AttentionWidths(heads=2, qk=0, vo=8)), "'qk' must be from 1 to 8"),
        (widths_with(blocks_0_mlps=FULL["mlp"]), r"did you mean 'blocks\.0\.mlp'"),
        ({"blocks.0.attn": FULL["attn"]}, r"lacks .*all 4 sub-layers"),
        ({}, "lacks"),
        (widths_with(), "the given plan costs .* the budget allows"),
    ],
)
def test_widths_that_do_not_fit_are_refused(vit: nn.Module, widths: Any, message: str):
    refuse(PlanError, message, vit, Unread(), BUDGET, widths=widths)


def test_widths_that_are_excluded_are_refused(vit: nn.Module):
    widths = widths_with(blocks_0_mlp=gohsp.FfnWidths(units=8), blocks_1_mlp=gohsp.FfnWidths(units=8))
    refuse(PlanError, "cannot be cut here", vit, Unread(), BUDGET, widths=widths, exclude=["blocks.1"])
    with pytest.raises(PlanError, match="from 1 to 64"):
        gohsp.cut(vit, Unread(), widths_with(blocks_0_mlp=gohsp.FfnWidths(units=65)))  # type: ignore[arg-type]


def test_unknown_methods_and_objectives_are_refused(vit: nn.Module):
    refuse(ConfigError, "method .*'two-shot'", vit, Unread(), BUDGET, method="two-shot")
    refuse(
        UnsupportedModelError, "objective 'clasification' is unknown", vit, Unread(), BUDGET, objective="clasification"
    )
    refuse(UnsupportedModelError, "objective 7 is unknown", vit, Unread(), BUDGET, objective=7)


def test_an_unknown_optimizer_is_refused(vit: nn.Module):
    config = from_mapping({"method": "finetune", "training": {"optimizer": "adamww"}})
    message = r"training\.optimizer 'adamww' is unknown; did you mean 'adamw'"
    refuse(ConfigError, message, vit, Unread(), BUDGET, config=config)


@pytest.mark.parametrize("method", ["finetune", "gohsp"])
def test_images_that_cannot_be_trained_on_are_refused(vit: nn.Module, data: Tensor, method: Any):
    read = []

    def pairs() -> Iterator[Any]:
        read.append(1)
        yield data, torch.arange(COUNT) % 5

    refuse(DataError, "a generator that can be read once", vit, pairs(), BUDGET, method=method)
    refuse(DataError, "validation .*generator", vit, Unread(), BUDGET, method=method, validation=pairs())
    assert read == []
    refuse(DataError, "a DataLoader that .* tells no length", vit, DataLoader(Endless()), BUDGET, method=method)


class Endless(IterableDataset[Any]):
    """A stream of pairs."""

    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("images were read")


@pytest.mark.parametrize("where", ["images", "validation"])
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (lambda batch: torch.full((len(batch),), 5), "from 0 to 4, .* got torch.int64 from 5 to 5"),
        (lambda batch: torch.full((len(batch),), -1), "from 0 to 4"),
        (lambda batch: torch.zeros(len(batch)), r"whole numbers .*torch\.float32"),
        (lambda batch: torch.zeros(len(batch), 5), r"labels \[B\], got a tuple of \[\[16, 3, 16, 16\], \[16, 5\]\]"),
        (lambda batch: torch.zeros(3, dtype=torch.int64), r"in pairs of images \[B, C, H, W\] and labels \[B\]"),
        (lambda batch: torch.tensor(3), "in pairs"),
        (lambda batch: 3, "'int'"),
    ],
    ids=["too large", "negative", "floats", "one-hot", "too few", "scalar", "number"],
)
def test_labels_that_are_none_are_refused(
    vit: nn.Module, data: Tensor, where: str, labels: Callable[[Tensor], Any], message: str
):
    spoilt, sound = (
        [(batch, of(batch)) for batch in data.split(16)] for of in (labels, lambda b: torch.arange(len(b)) % 5)
    )
    images, validation = (spoilt, sound) if where == "images" else (sound, spoilt)
    refuse(DataError, f"{where}.*{message}", vit, images, BUDGET, method="finetune", validation=validation)


def test_images_without_labels_are_not_trained_on(vit: nn.Module, data: Tensor):
    for images in (data, list(data), data.split(16), [(image, 3) for image in data], [{"image": data}]):
        refuse(DataError, "needs images in pairs", vit, images, BUDGET, method="finetune")
    empty = [(data[:0], torch.arange(0)), (data, torch.arange(COUNT) % 5)]
    refuse(DataError, r"needs images in pairs .*\[\[0, 3, 16, 16\], \[0\]\]", vit, empty, BUDGET, method="finetune")
    refuse(DataError, "there are no images", vit, [], BUDGET, method="finetune")
    refuse(DataError, "got a int", vit, 7, BUDGET, method="finetune")
    refuse(DataError, "needs validation in pairs", vit, loader(data), BUDGET, method="finetune", validation=[])


@pytest.mark.parametrize("method", ["finetune", "gohsp"])
def test_a_model_without_classes_is_not_trained_with_labels(data: Tensor, method: Any):
    refuse(
        UnsupportedModelError,
        "trains with labels, and this model's output is taken for features",
        saliency(),
        loader(data),
        "params=-25%",
        method=method,
    )


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(2, 2), "no block that can be pruned"),
        ("vit_tiny_patch16_224", "give a torch.nn.Module"),
        (None, "give a torch.nn.Module"),
    ],
)
def test_what_is_no_vit_is_refused(model: Any, message: str):
    refuse(UnsupportedModelError, message, model, Unread(), BUDGET)
    for part in (gohsp.rank, gohsp.measure_curves):
        with pytest.raises(UnsupportedModelError, match=message):
            part(model, Unread())  # type: ignore[arg-type]


def test_few_images_are_told(vit: nn.Module, data: Tensor, caplog: pytest.LogCaptureFixture):
    result = gohsp.prune(vit, data[:8], BUDGET, config=PLAIN)
    assert "7 calibration images are fewer than the model's 32 channels" in caplog.text
    assert torch.isfinite(outputs(result.model, data[:2])).all()


def test_one_image_is_enough(vit: nn.Module, data: Tensor):
    assert gohsp.prune(vit, data[:1], BUDGET, config=Config()).fidelity.images == 1


# A trained model


@pytest.mark.assets
def test_a_trained_saliency_model(assets: Path, tmp_path: Path):
    """A model whose output is a map, not classes; on a handful of images its maps stay recognisable."""
    weights, code = (assets / "models" / name for name in ("saliency_vit_small_patch14.safetensors", "saliency_vit.py"))
    folder = assets / "data" / "imagenet-1k-mini"
    if not (weights.is_file() and code.is_file() and folder.is_dir()):
        pytest.skip(f"no saliency model or images at {assets}")
    spec = importlib.util.spec_from_file_location("saliency_vit", code)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def cut_short(model: Any) -> Any:
        """The first 3 of 12 blocks: a matter of seconds."""
        model.backbone.blocks = model.backbone.blocks[:3]
        return model

    model = cut_short(module.load(weights, size=112))
    images = _photos(folder, count=24, size=112)
    config = from_mapping({"calibration": {"images": 20, "holdout": 4}})
    widths = {  # which spares the curves
        name: FfnWidths(units=768) if isinstance(of, FfnWidths) else AttentionWidths(heads=of.heads, qk=32, vo=32)
        for name, of in gohsp.describe(model).widths.items()
    }
    result = gohsp.prune(model, images, BUDGET, widths=widths, config=config)
    assert result.fidelity.objective == "features"
    assert gohsp.count_params(gohsp.describe(result.model)) <= 0.7 * gohsp.count_params(gohsp.describe(model))
    gohsp.save(result.model, tmp_path)
    expected, fresh = outputs(result.model, images[-4:]), cut_short(module.SaliencyViT(112))
    assert torch.equal(outputs(gohsp.apply(fresh, tmp_path), images[-4:]), expected)
    dense = outputs(model, images[-4:])
    assert (expected - dense).square().mean() < 0.5 * dense.var(dim=0).mean()


def _photos(folder: Path, *, count: int, size: int) -> Tensor:
    split = open_split(DataSource(source=f"hfds/{folder}"), "train")
    transform: Any = create_transform((3, size, size))
    step = len(split) // count
    return torch.stack([transform(split.image(i * step)) for i in range(count)])


def test_curves_of_another_model_or_of_other_widths_are_refused(model: nn.Module, images: Tensor):
    curves = gohsp.measure_curves(model, images)
    other = gohsp.Config(widths=gohsp.config.WidthSettings(multiple=4))
    fewer = {name: of for name, of in curves.items() if name != "blocks.0.mlp"}
    for given, config in ((curves, other), (fewer, None)):
        with pytest.raises(PlanError, match="the damage curves are of another model"):
            gohsp.allocate(model, given, "params=-30%", config=config)
        with pytest.raises(PlanError, match="the damage curves are of another model"):
            gohsp.prune(model, images, "params=-30%", curves=given, config=config)
