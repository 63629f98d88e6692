from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, MutableSequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gohsp.core import reconstruction, surgery
from gohsp.core.activations import observe_inputs, queries_keys
from gohsp.core.compensation import collect_moments, cross_validated_ridge
from gohsp.core.fisher import TokenWeights
from gohsp.core.projection import ProjectionSettings, constrained, on_support, project, select
from gohsp.core.reconstruction import reconstruct
from gohsp.core.rotation import rotate
from gohsp.errors import NonFiniteError, PlanError
from gohsp.models import check_finite, compact, describe, relative_difference, stages
from gohsp.structure import BlockPlan, BlockShape, ModelStructure, Plan, dense_block_plan, dense_plan

FULL = BlockShape(heads=4, qk=8, vo=8, ffn=64)
SMALL = BlockShape(heads=3, qk=3, vo=5, ffn=24)
HOW = ProjectionSettings(guidance=0.0, ridge=0.1)


@dataclass(frozen=True)
class Cut:
    dense: nn.Module
    model: nn.Module
    structure: ModelStructure
    plan: Plan


def cut(
    dense: nn.Module,
    images: Tensor,
    *shapes: BlockShape,
    how: ProjectionSettings = HOW,
    model: nn.Module | None = None,
    scores: list | None = None,
    structure: ModelStructure | None = None,
    **rest: Any,
) -> Cut:
    """``model`` (a copy of ``dense``) reconstructed at ``shapes``, on batches of 12 images."""
    model = copy.deepcopy(dense if model is None else model)
    structure = structure or describe(model)
    with torch.no_grad():
        embedded = [stages(dense).embed(batch) for batch in images.split(12)]
    return Cut(dense, model, structure, reconstruct(dense, model, structure, shapes, embedded, scores, how, **rest))


def streams(model: nn.Module, images: Tensor) -> list[Tensor]:
    """The residual stream before every block, between its branches, and behind the last block."""
    seen: list[Tensor] = []
    watch = {f"blocks.{i}.{norm}": seen.append for i in range(len(model.blocks)) for norm in ("norm1", "norm2")}
    with observe_inputs(model, watch), torch.no_grad():
        x = stages(model).embed(images)
        for block in model.blocks:
            x = block(x)
    return [*seen, x]


def read(model: nn.Module, name: str, images: Tensor) -> Tensor:
    """What the module ``name`` reads."""
    seen: list[Tensor] = []
    with observe_inputs(model, {name: seen.append}), torch.no_grad():
        model(images)
    return seen[0]


@pytest.mark.parametrize(
    "arguments", [{}, {"init_values": 0.1}, {"proj_bias": False}, {"qk_norm": True, "scale_mlp_norm": True}]
)
@pytest.mark.parametrize("ridge", [1e-6, 1.0])
def test_keeping_everything_changes_nothing(
    arguments: dict, ridge: float, make_model: Callable[..., nn.Module], images: Tensor
) -> None:
    dense = make_model(mlp_ratio=2, **arguments)
    result = cut(dense, images, FULL, FULL, how=replace(HOW, ridge=ridge))
    assert result.plan == dense_plan(result.structure)
    assert relative_difference(dense, result.model, images) < 1e-4
    for name, value in result.model.state_dict().items():
        if not name.endswith(("proj.weight", "proj.bias", "fc2.weight", "fc2.bias")):
            assert torch.equal(value, dense.state_dict()[name]), name


SUPPORT = BlockPlan(
    heads=(0, 2, 3), qk=((0, 5, 7), (1, 2, 3), (2, 4, 6)), vo=((0, 1, 2, 3, 7),) * 3, ffn=tuple(range(1, 64, 3))
)
WEIGHTS = (
    TokenWeights(torch.tensor([3.0, 0.5, 0.5, 0.4, 0.6]), None),
    TokenWeights(torch.tensor([5.0, 0, 0, 0, 0]), torch.tensor([4.2, 0.2, 0.2, 0.2, 0.2])),
)


@pytest.fixture
def fixed_ridge(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ridge of the settings everywhere, in place of one chosen by folds."""
    monkeypatch.setattr(reconstruction, "cross_validated_ridge", lambda _splits, _fitted, start: start)


@pytest.mark.usefixtures("fixed_ridge")
@pytest.mark.parametrize("arguments", [{}, {"init_values": 0.1}, {"proj_bias": False}], ids=str)
@pytest.mark.parametrize("chosen", [True, False], ids=["support", "selected"])
@pytest.mark.parametrize("weights", [WEIGHTS, None], ids=["weights", "even"])
@pytest.mark.parametrize("ridge", [1e-3, 0.5])
def test_every_readout_is_the_least_squares_fit_to_the_dense_stream(
    arguments: dict,
    chosen: bool,
    weights: tuple[TokenWeights, ...] | None,
    ridge: float,
    make_model: Callable[..., nn.Module],
    images: Tensor,
) -> None:
    """One explicit system a readout: a row a token, and rows that hold the kept columns to what they were."""
    dense = make_model(mlp_ratio=2, **arguments)
    if chosen:
        plan = Plan((SUPPORT, replace(SUPPORT, ffn=tuple(range(20)))))
        result = cut(dense, images, *plan.shapes, how=replace(HOW, ridge=ridge), weights=weights, support=plan)
        assert result.plan == plan
    else:  # all values of a head stay, or their basis would be another than the dense model's
        shapes = [replace(SMALL, vo=8), replace(SMALL, vo=8, heads=2)]
        result = cut(dense, images, *shapes, how=replace(HOW, ridge=ridge), weights=weights)
        assert result.plan.shapes == tuple(shapes)
    model, goal, own = result.model, streams(dense, images), streams(result.model, images)
    for i, (block, of) in enumerate(zip(model.blocks, dense.blocks, strict=True)):
        for j, (name, kind) in enumerate((("attn.proj", "vo"), ("mlp.fc2", "ffn"))):
            fitted, before = block.get_submodule(name), of.get_submodule(name)
            gain = (block.ls1, block.ls2)[j]
            gain = gain.gamma.detach().double() if hasattr(gain, "gamma") else torch.ones(32).double()
            inputs = read(model, f"blocks.{i}.{name}", images).double()
            target = (goal[2 * i + j + 1] - own[2 * i + j]).double()
            old = before.weight.detach().double()
            columns = result.plan.blocks[i].units(kind, FULL)
            if fitted.bias is not None:
                inputs = torch.cat([inputs, torch.ones(*inputs.shape[:2], 1)], dim=-1)
                old = torch.cat([old, before.bias.detach().double()[:, None]], dim=1)
                columns = [*columns, inputs.shape[-1] - 1]
            weight = None if weights is None else (weights[i].attention, weights[i].ffn)[j]
            weight = torch.ones(5) if weight is None else weight
            root = (weight.double() / (32 * weight.sum())).sqrt()[None, :, None]
            inputs, target = (root * inputs).flatten(0, 1), (root * target).flatten(0, 1)
            hold = (ridge * inputs.square().sum(0).mean()).sqrt()
            design = torch.cat([inputs[:, columns], hold * torch.eye(len(columns))])
            solution = torch.linalg.lstsq(design, torch.cat([target, hold * (old * gain[:, None])[:, columns].T]))
            got = fitted.weight.detach().double()
            gone = [u for u in range(got.shape[1]) if u not in columns]
            assert not got[:, gone].any()
            if fitted.bias is not None:
                got = torch.cat([got, fitted.bias.detach().double()[:, None]], dim=1)
            expected = solution.solution.T / gain[:, None]
            torch.testing.assert_close(got[:, columns], expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_queries_and_keys_keep_the_best_of_the_centred_logits_on_what_really_enters(
    make_model: Callable[..., nn.Module], images: Tensor
) -> None:
    """Against the singular values of the logits that the second block had, the first one being cut already."""
    dense = make_model(mlp_ratio=2)
    result = cut(dense, images, replace(SMALL, heads=1), replace(FULL, qk=3))
    block = result.structure.blocks[1]
    x = read(result.model, "blocks.1.attn", images)

    def centred_logits(model: nn.Module) -> Tensor:
        with torch.no_grad():
            q, k = (t.double() for t in queries_keys(model, block, x))
        q, k = q.transpose(0, 1).flatten(1, 2), (k - k.mean(2, keepdim=True)).transpose(0, 1).flatten(1, 2)
        return q @ k.transpose(1, 2)

    logits = centred_logits(dense)
    error = (logits - centred_logits(result.model)).square().sum((1, 2))
    best = torch.linalg.svdvals(logits)[:, 3:].square().sum(1)
    torch.testing.assert_close(error, best, rtol=1e-3, atol=0)


def independent(dense: nn.Module, images: Tensor, shapes: list[BlockShape]) -> nn.Module:
    """Each block projected by itself, on what the dense model sends it."""
    model = copy.deepcopy(dense)
    structure = describe(model)
    moments = rotate(model, structure, collect_moments(model, structure, [images]))
    for block, of_block, shape in zip(structure.blocks, moments, shapes, strict=True):
        values = constrained(model, block, "data")
        kept = select(block, values, of_block, shape, HOW)
        for entry, value in project(on_support(block, values, of_block, kept, HOW), values).items():
            values[entry].copy_(value)
    return model


@pytest.mark.parametrize("seed", range(3))
def test_errors_of_earlier_blocks_are_repaired(seed: int, make_model: Callable[..., nn.Module]) -> None:
    dense = make_model(mlp_ratio=2, depth=3, seed=seed)
    images, fresh = torch.randn(640, 3, 16, 16).split([512, 128])
    shapes = [SMALL] * 3
    with torch.no_grad():
        apart = independent(dense, images, shapes)
    joint = cut(dense, images, *shapes).model
    for shown in (images, fresh):  # also on images that nothing was fitted to
        goal = streams(dense, shown)[-1]
        errors = [float((streams(m, shown)[-1] - goal).square().mean()) for m in (joint, apart)]
        assert errors[0] < 0.9 * errors[1]


def test_few_sums_of_outputs_tell_the_ridge(
    make_model: Callable[..., nn.Module], images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, chosen = make_model(mlp_ratio=2), []
    outputs: set[int] = set()

    def watched(splits: list, fitted: Callable[..., Tensor], start: float) -> float:
        outputs.add(len(fitted(splits[0][0], start)))
        chosen.append(cross_validated_ridge(splits, fitted, start))
        return chosen[-1]

    monkeypatch.setattr(reconstruction, "cross_validated_ridge", watched)
    cut(dense, images, SMALL, SMALL)
    assert outputs == {32}  # every output of a narrow model
    whole, chosen = chosen, []
    outputs.clear()
    monkeypatch.setattr(reconstruction, "PROBES", 16)
    cut(dense, images, SMALL, SMALL)
    assert outputs == {16}
    for few, all_of_them in zip(chosen, whole, strict=True):
        assert 1 / 3.2 <= few / all_of_them <= 3.2  # at most a neighbour


def test_repair_and_ffn_cut_take_the_ridge_that_folds_choose(
    make_model: Callable[..., nn.Module], images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = make_model(mlp_ratio=2)
    plan = Plan(tuple(replace(dense_block_plan(FULL), ffn=tuple(range(first, 64, 3))) for first in range(2)))
    seen: list[Tensor] = []

    def choose(splits: list, fitted: Callable[..., Tensor], _start: float) -> float:
        assert len(splits) == 4
        seen.append(fitted(splits[0][0], 0.5))
        return 0.5

    monkeypatch.setattr(reconstruction, "cross_validated_ridge", choose)
    chosen = cut(dense, images, *plan.shapes, how=replace(HOW, ridge=1e-3), support=plan)
    monkeypatch.setattr(reconstruction, "cross_validated_ridge", lambda _splits, _fitted, start: start)
    given = cut(dense, images, *plan.shapes, how=replace(HOW, ridge=0.5), support=plan)
    for name, value in chosen.model.state_dict().items():
        torch.testing.assert_close(value, given.model.state_dict()[name], rtol=1e-5, atol=1e-6)
    for candidate, kept in ((seen[1], plan.blocks[0]), (seen[3], plan.blocks[1])):  # FFN candidates are cut already
        assert candidate.abs().sum(0).nonzero().flatten().tolist() == [*kept.ffn, 64]


@pytest.mark.usefixtures("fixed_ridge")
def test_a_block_makes_up_for_the_one_before_it(make_model: Callable[..., nn.Module], images: Tensor) -> None:
    """The first block is cut hard, the second not at all: fitted to the dense stream, it still has work to do."""
    dense = make_model(mlp_ratio=2)
    result = cut(dense, images, SMALL, FULL, how=replace(HOW, ridge=1e-4))
    idle = copy.deepcopy(result.model)
    idle.blocks[1].load_state_dict(dense.blocks[1].state_dict())
    goal = streams(dense, images)[-1]
    errors = [float((streams(m, images)[-1] - goal).square().mean()) for m in (result.model, idle)]
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.parametrize("support", [Plan((SUPPORT, SUPPORT)), None], ids=["support", "selected"])
def test_what_the_plan_removes_has_nothing_left_to_say(support: Plan | None, model: nn.Module, images: Tensor) -> None:
    shapes = support.shapes if support else (SMALL, replace(SMALL, heads=2, ffn=9))
    result = cut(model, images, *shapes, support=support)
    assert result.plan.shapes == shapes
    masked = copy.deepcopy(result.model)
    surgery.mask(masked, result.structure, result.plan)
    assert relative_difference(result.model, masked, images) < 1e-6
    small = compact(result.model, result.plan, images).model
    assert describe(small).shapes == shapes
    assert relative_difference(result.model, small, images) < 1e-5
    assert relative_difference(model, result.model, images) > 1e-2  # the cut was felt


def test_every_head_keeps_its_own_dimensions(model: nn.Module, structure: ModelStructure, images: Tensor) -> None:
    """Where the basis must stay, the strongest queries and keys of a head may be any of them."""
    fixed = replace(structure, blocks=tuple(replace(b, rotatable=frozenset()) for b in structure.blocks))
    scores = [[0.1, 0.4, 0.2, 0.3], [0.1, 0.2, 0.3, 0.4]]  # the first head goes
    result = cut(model, images, SMALL, SMALL, structure=fixed, scores=scores, how=replace(HOW, guidance=1.0))
    masked = copy.deepcopy(result.model)
    surgery.mask(masked, structure, result.plan)
    assert relative_difference(result.model, masked, images) < 1e-6
    assert len({dims for block in result.plan.blocks for dims in block.qk}) > 3
    for block, before, plan in zip(result.model.blocks, model.blocks, result.plan.blocks, strict=True):
        for part in (0, 32):
            for head, dims in zip(plan.heads, plan.qk, strict=True):
                kept = [part + 8 * head + j for j in dims]
                assert torch.equal(block.attn.qkv.weight[kept], before.attn.qkv.weight[kept])
        assert torch.equal(block.attn.qkv.weight[64:], before.attn.qkv.weight[64:])


def test_a_chosen_support_is_kept_in_its_basis(model: nn.Module, images: Tensor) -> None:
    result = cut(model, images, SUPPORT.shape, SUPPORT.shape, support=Plan((SUPPORT, SUPPORT)))
    for block, before in zip(result.model.blocks, model.blocks, strict=True):
        now, then = (b.attn.qkv.weight.unflatten(0, (3, 4, 8)) for b in (block, before))
        for head, dims in zip(SUPPORT.heads, SUPPORT.qk, strict=True):
            gone = [j for j in range(8) if j not in dims]
            assert torch.equal(now[:2, head, dims], then[:2, head, dims])
            assert not now[:2, head, gone].any()
        assert torch.equal(now[2], then[2])


def test_layer_scale_decides_what_is_worth_keeping(make_model: Callable[..., nn.Module], images: Tensor) -> None:
    dense = make_model(mlp_ratio=2, init_values=1.0)
    with torch.no_grad():
        for block in dense.blocks:
            for linear in (block.attn.proj, block.mlp.fc2):
                half = linear.in_features // 2  # the first half of the units writes to the first half of the channels
                linear.weight[:16, half:] = 0
                linear.weight[16:, :half] = 0
                linear.weight[:16] *= 10
            for scale in (block.ls1, block.ls2):
                scale.gamma[:16] = 1e-3
    half = replace(FULL, heads=2, ffn=32)
    for kept in cut(dense, images, half, half).plan.blocks:
        assert kept.heads == (2, 3)
        assert kept.ffn == tuple(range(32, 64))


def test_heads_follow_their_scores(model: nn.Module, images: Tensor) -> None:
    scores = [[0.1, 0.4, 0.2, 0.3], [0.4, 0.1, 0.3, 0.2]]
    half = replace(FULL, heads=2)
    guided = cut(model, images, half, half, scores=scores, how=replace(HOW, guidance=1.0)).plan
    assert [b.heads for b in guided.blocks] == [(1, 3), (0, 2)]
    free = cut(model, images, half, half, scores=scores).plan
    assert free == cut(model, images, half, half).plan


def test_the_metric_is_that_of_the_data_whatever_the_settings_say(model: nn.Module, images: Tensor) -> None:
    expected, got = (cut(model, images, SMALL, SMALL, how=replace(HOW, metric=m)) for m in ("data", "euclidean"))
    assert got.plan == expected.plan
    assert relative_difference(expected.model, got.model, images) == 0


@pytest.mark.parametrize("shapes", [(FULL, FULL), (SMALL, SMALL)], ids=["dense", "cut"])
def test_a_channel_that_layer_scale_shuts_off(
    shapes: tuple[BlockShape, ...], make_model: Callable[..., nn.Module], images: Tensor
) -> None:
    dense = make_model(mlp_ratio=2, init_values=0.1)
    with torch.no_grad():
        for block in dense.blocks:
            block.ls1.gamma[3] = 0
            block.ls2.gamma[[0, 7]] = 0
            block.ls2.gamma[5] = -1e-6
    result = cut(dense, images, *shapes)
    check_finite(result.model)
    assert torch.isfinite(result.model(images)).all()
    for name, parameter in result.model.named_parameters():
        if name.endswith("gamma"):
            assert torch.equal(parameter, dense.get_parameter(name))
    if shapes == (FULL, FULL):
        for block, before in zip(result.model.blocks, dense.blocks, strict=True):
            assert torch.equal(block.attn.proj.weight[3], before.attn.proj.weight[3])
            assert torch.equal(block.mlp.fc2.weight[[0, 7]], before.mlp.fc2.weight[[0, 7]])
            assert torch.equal(block.mlp.fc2.bias[[0, 7]], before.mlp.fc2.bias[[0, 7]])


class Disk(MutableSequence):
    """Tensors in files; every read gives a copy."""

    made = 0

    def __init__(self, folder: Path) -> None:
        Disk.made += 1
        self.folder = folder / f"store {Disk.made}"
        self.folder.mkdir()
        self.size = 0

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < self.size:
            raise IndexError(index)
        return torch.load(self.folder / f"{index}.pt")

    def __setitem__(self, index: int, value: Tensor) -> None:
        assert 0 <= index < self.size
        torch.save(value, self.folder / f"{index}.pt")

    def __delitem__(self, index: int) -> None:
        raise NotImplementedError

    def insert(self, index: int, value: Tensor) -> None:
        assert index == self.size  # appended only
        self.size += 1
        self[index] = value


def test_streams_may_live_on_disk(model: nn.Module, images: Tensor, tmp_path: Path) -> None:
    expected = cut(model, images, SMALL, SMALL)
    got = cut(model, images, SMALL, SMALL, store=lambda: Disk(tmp_path))
    assert got.plan == expected.plan
    assert all(torch.equal(v, expected.model.state_dict()[k]) for k, v in got.model.state_dict().items())
    kept = [sorted(path.name for path in folder.iterdir()) for folder in tmp_path.iterdir()]
    assert kept == [["0.pt", "1.pt", "2.pt"]] * 3


def test_streams_may_come_one_by_one_and_are_left_alone(model: nn.Module, images: Tensor) -> None:
    expected = cut(model, images, SMALL, SMALL)
    with torch.no_grad():
        embedded = [stages(model).embed(batch) for batch in images.split(12)]
    before = [batch.clone() for batch in embedded]
    other = copy.deepcopy(model)
    structure = describe(model)

    def batches() -> Iterator[Tensor]:
        yield from embedded

    plan = reconstruct(model, other, structure, (SMALL, SMALL), batches(), None, HOW)
    assert plan == expected.plan
    assert relative_difference(expected.model, other, images) == 0
    assert all(torch.equal(a, b) for a, b in zip(embedded, before, strict=True))


@pytest.mark.parametrize("original", ["dense", "small"])
def test_a_model_that_is_small_already(original: str, model: nn.Module, images: Tensor) -> None:
    """Its widths are not those of the model that it is fitted to, or both are narrow."""
    first = cut(model, images, SMALL, replace(SMALL, heads=2, ffn=30))
    small = compact(first.model, first.plan, images).model
    reference = model if original == "dense" else small
    shapes = [replace(b.shape, qk=2, vo=4, ffn=20) for b in describe(small).blocks]
    result = cut(reference, images, *shapes, model=small)
    assert result.plan.shapes == tuple(shapes)
    assert describe(compact(result.model, result.plan, images).model).shapes == tuple(shapes)
    # as good as what one cut makes of the dense model, or nearly
    goal = streams(model, images)[-1]
    once = streams(cut(model, images, *shapes).model, images)[-1]
    assert (streams(result.model, images)[-1] - goal).square().mean() < 1.6 * (once - goal).square().mean()


def test_a_small_model_is_drawn_back_to_the_dense_one(model: nn.Module, images: Tensor) -> None:
    """Nothing is cut; readouts that were spoilt are fitted to the dense stream again."""
    first = cut(model, images, SMALL, SMALL)
    small = compact(first.model, first.plan, images).model
    spoilt = copy.deepcopy(small)
    with torch.no_grad():
        for block in spoilt.blocks:
            block.mlp.fc2.weight.add_(0.2 * torch.randn(block.mlp.fc2.weight.shape))
    repaired = cut(model, images, SMALL, SMALL, model=spoilt, how=replace(HOW, ridge=1e-3)).model
    goal = streams(model, images)[-1]
    errors = [float((streams(m, images)[-1] - goal).square().mean()) for m in (repaired, small, spoilt)]
    assert errors[0] < 1.2 * errors[1] < errors[2]


@pytest.mark.parametrize("ridge", [1e-9, 0.1])
@pytest.mark.parametrize("arguments", [{}, {"init_values": 1e-5}], ids=str)
def test_two_images_are_enough_to_stay_finite(
    ridge: float, arguments: dict, make_model: Callable[..., nn.Module], images: Tensor
) -> None:
    dense = make_model(mlp_ratio=2, **arguments)
    result = cut(dense, images[:2], SMALL, SMALL, how=replace(HOW, ridge=ridge))
    check_finite(result.model)
    assert torch.isfinite(result.model(images)).all()
    # ten tokens are matched by the 25 and 16 numbers that a readout has left for each channel
    compact(result.model, result.plan, images)


@pytest.mark.parametrize("training", [True, False])
def test_the_dense_model_and_both_modes_are_left_alone(training: bool, model: nn.Module, images: Tensor) -> None:
    expected = cut(model, images, SMALL, SMALL)
    for block in model.blocks:
        block.mlp.drop1.p = 0.9
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        embedded = [stages(model).embed(batch) for batch in images.split(12)]
    dense = copy.deepcopy(model).train(training)
    calls = []
    arguments = (expected.structure, (SMALL, SMALL), embedded, None, HOW)
    reconstruct(dense, model.train(not training), *arguments, advance=lambda: calls.append(1))
    assert (dense.training, model.training) == (training, not training)
    assert len(calls) == 2
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    assert relative_difference(expected.model, model.eval(), images) == 0  # dropout was off
    assert not any(module._forward_pre_hooks for m in (dense, model) for module in m.modules())


def test_lower_precision_ends_nearby(model: nn.Module, images: Tensor) -> None:
    lowered = []
    for block in model.blocks:
        block.attn.register_forward_pre_hook(lambda *_: lowered.append(torch.is_autocast_enabled("cpu")))
    plan = Plan((SUPPORT, SUPPORT))
    full = cut(model, images, *plan.shapes, support=plan).model
    assert lowered
    assert not any(lowered)
    lowered.clear()
    half = cut(model, images, *plan.shapes, support=plan, precision=torch.bfloat16).model
    assert any(lowered)
    assert 1e-6 < relative_difference(full, half, images) < 0.05
    assert all(p.dtype == torch.float32 for p in half.parameters())


def test_what_cannot_be_done_is_said(model: nn.Module, structure: ModelStructure, images: Tensor) -> None:
    with pytest.raises(PlanError, match=r"block 1: 'ffn' must be from 1 to 64, got 65"):
        cut(model, images, FULL, replace(FULL, ffn=65))
    with pytest.raises(PlanError, match="the plan has 1 blocks, the model has 2"):
        cut(model, images, FULL)


@pytest.mark.parametrize(("rows", "module"), [("attn.qkv", r"attn\.proj"), ("mlp.fc1", r"mlp\.fc2"), ("norm1", "attn")])
def test_non_finite_activations_are_named(
    rows: str,
    module: str,
    model: nn.Module,
    structure: ModelStructure,
    images: Tensor,
    embedded: Tensor,
) -> None:
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.blocks[1].get_submodule(rows).bias[-1] = torch.nan
    with pytest.raises(NonFiniteError, match=rf"input of module 'blocks\.1\.{module}' holds NaN"):
        reconstruct(model, other, structure, (SMALL, SMALL), [embedded], None, HOW)
