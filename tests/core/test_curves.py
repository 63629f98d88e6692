from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gohsp.core.activations import Stages
from gohsp.core.allocation import Curves, WidthSettings, allowed_widths
from gohsp.core.compensation import BlockMoments, refit
from gohsp.core.projection import ProjectionSettings, constrained, on_support, project, select
from gohsp.core.sensitivity import count_points, divergence, measure_curves, predictions
from gohsp.structure import KINDS, ModelStructure

WIDTHS = WidthSettings(multiple=2, min_width=2)
DATA = ProjectionSettings(guidance=1.0)
EUCLIDEAN = ProjectionSettings(metric="euclidean", guidance=1.0)


@pytest.fixture
def measure(
    model: nn.Module, stages: Stages, structure: ModelStructure, moments: tuple[BlockMoments, ...], embedded: Tensor
) -> Callable[..., Curves]:
    """``measure(widths, how, scores=None, batches=[embedded], of=stages, **rest)``: curves of ``model``."""

    def curves(
        widths: WidthSettings,
        how: ProjectionSettings,
        scores: list | None = None,
        *,
        batches: Sequence[Tensor] = (embedded,),
        of: Stages = stages,
        within: ModelStructure = structure,
        **rest: Any,
    ) -> Curves:
        return measure_curves(model, of, within, moments, batches, scores, widths, how, **rest)

    return curves


def test_nothing_is_left_changed(model: nn.Module, structure: ModelStructure, measure: Callable[..., Curves]) -> None:
    model.train()
    before = copy.deepcopy(model.state_dict())
    calls = []
    curves = measure(WIDTHS, DATA, advance=lambda: calls.append(1))
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert len(calls) == count_points(structure, WIDTHS)
    for block, curve in zip(structure.blocks, curves, strict=True):
        assert set(curve) == set(KINDS)
        for kind, of in curve.items():
            allowed = allowed_widths(block, kind, WIDTHS)
            assert (of.widths[0], of.widths[-1]) == (allowed[0], allowed[-1])
            assert set(of.widths) <= set(allowed)
            assert list(of.widths) == sorted(set(of.widths))
            assert len(of.widths) == len(of.damage)
            assert of.damage[-1] == 0
            assert min(of.damage) >= 0
            assert of.damage[0] > 1e-4  # the smallest width is felt
            assert of(allowed[-1]) == 0


def test_the_model_is_restored_even_when_a_forward_pass_fails(model: nn.Module, measure: Callable[..., Curves]) -> None:
    model.train()
    before = copy.deepcopy(model.state_dict())
    passes = []

    def fail_later(*_: object) -> None:
        passes.append(1)
        if len(passes) == 3:
            raise RuntimeError("out of memory")

    model.blocks[1].register_forward_pre_hook(fail_later)
    with pytest.raises(RuntimeError, match="out of memory"):
        measure(WIDTHS, DATA)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def damage_without(
    model: nn.Module,
    block: int,
    keep: Tensor,
    moment: Tensor | None,
    images: Tensor,
) -> float:
    """KL by hand when the values ``keep`` alone stay, their readout refitted to ``moment`` where one is given."""
    cut = copy.deepcopy(model)
    proj, qkv = cut.blocks[block].attn.proj, cut.blocks[block].attn.qkv
    with torch.no_grad():
        if moment is None:
            rows = keep.repeat(3)
            qkv.weight *= rows[:, None]
            qkv.bias *= rows
            proj.weight *= keep
        else:
            full = torch.cat([proj.weight, proj.bias[:, None]], dim=1).double()
            fitted = refit(moment, full, torch.cat([keep, torch.ones(1, dtype=torch.bool)]), DATA.ridge).float()
            proj.weight.copy_(fitted[:, :-1])
            proj.bias.copy_(fitted[:, -1])
        p, q = model(images).softmax(-1), cut(images).softmax(-1)
    return float((p * (p / q).log()).sum(-1).mean())


@pytest.mark.parametrize("how", [DATA, EUCLIDEAN], ids=["data", "euclidean"])
@pytest.mark.parametrize("seed", [0, 1])
def test_heads_go_in_the_order_of_their_scores(
    how: ProjectionSettings,
    seed: int,
    model: nn.Module,
    moments: tuple[BlockMoments, ...],
    images: Tensor,
    embedded: Tensor,
    measure: Callable[..., Curves],
) -> None:
    scores = torch.rand(2, 4, generator=torch.Generator().manual_seed(seed))
    curves = measure(WIDTHS, how, scores.tolist(), batches=embedded.split(12))
    for i, curve in enumerate(curves):
        assert curve["head"].widths == (1, 2, 3, 4)
        for count, got in zip((1, 2, 3), curve["head"].damage, strict=False):
            keep = torch.zeros(4, dtype=torch.bool)
            keep[scores[i].topk(count).indices] = True
            moment = moments[i].head_outputs if how is DATA else None
            expected = damage_without(model, i, keep.repeat_interleave(8), moment, images)
            assert got == pytest.approx(expected, rel=1e-2, abs=1e-5)


def test_a_point_measures_the_whole_cut_network(
    model: nn.Module, structure: ModelStructure, moments: tuple[BlockMoments, ...], images: Tensor, measure: Callable
) -> None:
    """Against passes of whole images through whole copies of the model."""
    how = replace(DATA, guidance=0.0)
    curves = measure(WidthSettings(multiple=4, min_width=4), how)
    for i, block in enumerate(structure.blocks):
        for field, kind in (("heads", "head"), ("qk", "qk"), ("vo", "vo"), ("ffn", "ffn")):
            cut = copy.deepcopy(model)
            values = constrained(cut, block, "data")
            kept = select(block, values, moments[i], replace(block.shape, **{field: curves[i][kind].widths[0]}), how)
            for entry, value in project(on_support(block, values, moments[i], kept, how), values).items():
                values[entry].copy_(value)
            with torch.no_grad():
                p, q = model(images).softmax(-1), cut(images).softmax(-1)
            expected = float((p * (p / q).log()).sum(-1).mean())
            assert curves[i][kind].damage[0] == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_dropout_is_off_while_damage_is_measured(model: nn.Module, measure: Callable[..., Curves]) -> None:
    coarse = WidthSettings(multiple=64, min_width=4, min_heads=2)
    expected = measure(coarse, DATA)
    model.train()
    for block in model.blocks:
        block.mlp.drop1.p = 0.9
    assert measure(coarse, DATA) == expected


def test_lower_precision_measures_about_the_same(
    stages: Stages, structure: ModelStructure, embedded: Tensor, measure: Callable[..., Curves]
) -> None:
    how = WidthSettings(multiple=64, min_width=4, min_heads=2)
    full = measure(how, DATA)
    lowered: list[bool] = []

    def head(x: Tensor) -> Tensor:
        lowered.append(torch.is_autocast_enabled("cpu"))
        return stages.head(x)

    half = measure(how, DATA, of=replace(stages, head=head), precision=torch.bfloat16)
    assert lowered == [True] * (1 + count_points(structure, how))
    for a, b in zip(full, half, strict=True):
        assert b["head"].damage == pytest.approx(a["head"].damage, rel=0.2, abs=0.02)
        assert b["head"].damage != a["head"].damage
    assert predictions(stages, [embedded], torch.bfloat16)[0].dtype == torch.float32


def test_compensation_softens_the_damage(measure: Callable[..., Curves]) -> None:
    free = WidthSettings(multiple=4, min_width=4)
    data = measure(free, replace(DATA, guidance=0.0))
    plain = measure(free, replace(EUCLIDEAN, guidance=0.0))
    total = [sum(sum(curve["ffn"].damage) for curve in curves) for curves in (data, plain)]
    assert total[0] < 0.8 * total[1]


def test_a_kind_that_may_not_be_cut_has_no_curve(structure: ModelStructure, measure: Callable[..., Curves]) -> None:
    held = replace(structure, blocks=tuple(replace(b, prunable=frozenset({"ffn"})) for b in structure.blocks))
    curves = measure(WIDTHS, DATA, within=held)
    assert [set(c) for c in curves] == [{"ffn"}, {"ffn"}]
    assert count_points(held, WIDTHS) == sum(len(c["ffn"].widths) - 1 for c in curves)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(1, 4), min_size=1, max_size=3))
def test_divergence_is_that_of_kullback_and_leibler(seed: int, sizes: list[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(sum(sizes), 6, generator=generator).log_softmax(-1) for _ in range(2))
    expected = (a.exp() * (a - b)).sum(-1).mean()
    got = divergence(a.split(sizes), b.split(sizes))  # a mean over images, not over batches
    assert got == pytest.approx(float(expected), rel=1e-4)
    assert got > 0
    assert divergence(a.split(sizes), a.split(sizes)) == 0


@pytest.mark.parametrize("first", [0, 1, 2])
def test_predictions_are_log_probabilities_from_any_block_on(
    first: int, model: nn.Module, stages: Stages, images: Tensor
) -> None:
    with torch.no_grad():
        stream = stages.embed(images)
        for block in model.blocks[:first]:
            stream = block(stream)
        expected = F.log_softmax(model(images), dim=-1)
    got = predictions(stages, stream.split(20), first=first)
    assert [len(p) for p in got] == [20, 12]
    torch.testing.assert_close(torch.cat(got), expected, rtol=1e-4, atol=1e-5)
