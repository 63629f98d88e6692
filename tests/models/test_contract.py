"""One contract, every family: what any adapter must do for any model that it accepts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from timm.layers import Attention, SwiGLU
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from gohsp.core import surgery
from gohsp.core.compensation import collect_moments
from gohsp.core.fisher import token_weights
from gohsp.core.projection import ProjectionSettings
from gohsp.core.reconstruction import reconstruct
from gohsp.core.rotation import rotate
from gohsp.errors import CheckpointError, EqualityError, NonFiniteError, PlanError
from gohsp.models import (
    EQUALITY_TOLERANCE,
    Compaction,
    build,
    check_finite,
    compact,
    describe,
    relative_difference,
    set_fused_attention,
    specification,
    stages,
)
from gohsp.models.attention import PrunedAttention
from gohsp.structure import BlockPlan, BlockShape, ModelStructure, Plan, dense_plan, model_cost

VIT = "vit_tiny_patch16_224"
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": (VIT, {}),
    "deit": ("deit_tiny_patch16_224", {}),
    "deit distilled": ("deit_tiny_distilled_patch16_224", {}),
    "deit3": ("deit3_small_patch16_224", {}),
    "augreg": ("vit_small_patch16_224.augreg_in1k", {"pretrained": False}),
    "gap": ("vit_medium_patch16_gap_240", {}),
    "pooled, no class token": (VIT, {"class_token": False, "global_pool": "avg"}),
    "register tokens": ("vit_small_patch14_reg4_dinov2", {}),
    "register tokens, gap": ("vit_medium_patch16_reg4_gap_256", {}),
    "attention pooling": ("vit_base_patch16_siglip_224", {}),
    "pre-norm": ("vit_base_patch16_clip_224", {}),
    "qk-norm": (VIT, {"qk_norm": True}),
    "value and FFN norm": (VIT, {"scale_attn_norm": True, "scale_mlp_norm": True}),
    "no qkv bias": (VIT, {"qkv_bias": False}),
    "no readout bias": (VIT, {"proj_bias": False}),
    "packed SwiGLU": ("vit_giant_patch14_dinov2", {"mlp_ratio": 3.0}),
    "SwiGLU": ("aimv2_large_patch14_224", {"mlp_ratio": 2.0}),
}
HELD: dict[str, set[str]] = {"qk-norm": {"qk"}, "value and FFN norm": {"head", "vo", "ffn"}}
"""What must not be cut in a family; everywhere else everything may."""
BOTH = "qk and vo alike"
CASES = [
    (family, cut)
    for family in FAMILIES
    for cut in ("head", "qk", "vo", "ffn", BOTH, "all")
    if not (cut in HELD.get(family, ()) or (cut == BOTH and family in HELD))
]

NARROW = {"head": {"heads": 3}, "qk": {"qk": 3}, "vo": {"vo": 5}, "ffn": {"ffn": 17}}


def narrowed(shape: BlockShape, cut: str, held: set[str]) -> BlockShape:
    """Odd widths for what ``cut`` means, less what is held."""
    if cut == BOTH:
        return replace(shape, qk=6, vo=6)
    kinds = NARROW if cut == "all" else [cut]
    return replace(shape, **{k: v for kind in kinds if kind not in held for k, v in NARROW[kind].items()})


def random_plan(structure: ModelStructure, shapes: list[BlockShape], seed: int) -> Plan:
    generator = torch.Generator().manual_seed(seed)

    def pick(have: int, want: int) -> tuple[int, ...]:
        return tuple(sorted(torch.randperm(have, generator=generator)[:want].tolist()))

    def block(have: BlockShape, want: BlockShape) -> BlockPlan:
        return BlockPlan(
            heads=pick(have.heads, want.heads),
            qk=tuple(pick(have.qk, want.qk) for _ in range(want.heads)),
            vo=tuple(pick(have.vo, want.vo) for _ in range(want.heads)),
            ffn=pick(have.ffn, want.ffn),
        )

    return Plan(tuple(block(b.shape, s) for b, s in zip(structure.blocks, shapes, strict=True)))


def masked_by_hand(model: nn.Module, plan: Plan) -> nn.Module:
    """The dense model with removed units zeroed where timm keeps them: independent of structure and surgery."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for block, kept in zip(model.blocks, plan.blocks, strict=True):
            attn, heads = block.attn, block.attn.num_heads
            width = attn.head_dim
            qk = torch.zeros(heads, width, dtype=torch.bool)
            vo = torch.zeros(heads, width, dtype=torch.bool)
            for h, dims, values in zip(kept.heads, kept.qk, kept.vo, strict=True):
                qk[h, list(dims)] = True
                vo[h, list(values)] = True
            for tensor in (attn.qkv.weight, attn.qkv.bias):
                if tensor is not None:
                    grid = tensor.view(3, heads, width, -1)
                    grid[:2] *= qk[None, :, :, None]
                    grid[2] *= vo[:, :, None]
            attn.proj.weight *= vo.flatten()
            ffn = torch.zeros(block.mlp.fc2.in_features, dtype=torch.bool)
            ffn[list(kept.ffn)] = True
            block.mlp.fc2.weight *= ffn
    return model


def macs(model: nn.Module) -> int:
    """Multiply-accumulates of one image by PyTorch's own counter, on the meta device."""
    model = copy.deepcopy(model).to("meta").requires_grad_(False).eval()
    set_fused_attention(model, False)  # the fused kernel pads; the cost is that of the real widths
    counter = FlopCounterMode(display=False)
    with counter:
        model(torch.empty(1, 3, 16, 16, device="meta"))
    return counter.get_total_flops() // 2


@dataclass(frozen=True)
class Family:
    name: str
    model: nn.Module
    structure: ModelStructure
    held: set[str]


@pytest.fixture(scope="module")
def family_of(make_model: Callable[..., nn.Module]) -> Callable[[str], Family]:
    @cache
    def get(name: str) -> Family:
        architecture, arguments = FAMILIES[name]
        model = make_model(architecture, **{"mlp_ratio": 1.5, **arguments})
        structure = describe(model)
        model.gohsp_arguments = specification(model)["arguments"]  # or each compaction would find them out again
        return Family(name, model, structure, HELD.get(name, set()))

    return get


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, family_of: Callable[[str], Family]) -> Family:
    return family_of(request.param)


@dataclass(frozen=True)
class Case:
    family: Family
    plan: Plan
    compaction: Compaction
    untouched: bool


@pytest.fixture(scope="module")
def case_of(family_of: Callable[[str], Family], images: Tensor) -> Callable[[str, str], Case]:
    @cache
    def get(name: str, cut: str) -> Case:
        family = family_of(name)
        model, structure = family.model, family.structure
        shapes = [narrowed(b.shape, cut, family.held) for b in structure.blocks]
        if "ffn" not in family.held:
            shapes[1] = replace(shapes[1], ffn=16)  # blocks need not be alike
        plan = random_plan(structure, shapes, seed=7)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        compaction = compact(model, plan, images)
        same = all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        return Case(family, plan, compaction, same)

    return get


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request: pytest.FixtureRequest, case_of: Callable[[str, str], Case]) -> Case:
    return case_of(*request.param)


def test_what_may_be_cut(family: Family) -> None:
    for block in family.structure.blocks:
        assert block.prunable == {"head", "qk", "vo", "ffn"} - family.held
        assert block.rotatable == {"qk", "vo"} - family.held


def test_dense_cost(family: Family) -> None:
    structure, model = family.structure, family.model
    assert model_cost(structure, structure.shapes, "params") == sum(p.numel() for p in model.parameters())
    assert model_cost(structure, structure.shapes, "macs") == macs(model)
    seen = []
    hook = model.blocks[0].register_forward_pre_hook(lambda _m, args: seen.append(args[0].shape))
    with torch.no_grad():
        model(torch.zeros(1, 3, 16, 16))
    hook.remove()
    assert seen == [(1, structure.tokens, structure.embed_dim)]


def test_stages_chained_are_the_model(family: Family, images: Tensor) -> None:
    model, network = family.model, stages(family.model)
    assert len(network.blocks) == len(family.structure.blocks)
    with torch.no_grad():
        expected = model(images)
        x = network.embed(images)
        assert x.shape == (len(images), family.structure.tokens, family.structure.embed_dim)
        assert torch.equal(network.logits(x), expected)
        for i, block in enumerate(network.blocks):
            assert torch.equal(network.logits(x, first=i), expected)
            x = block(x)
        assert torch.equal(network.head(x), expected)


def test_reconstruction_repairs_a_cut_of_everything(
    family: Family, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A few images of noise say nothing of others, so folds would choose to repair little; here the same images judge.
    monkeypatch.setattr("gohsp.core.reconstruction.cross_validated_ridge", lambda _splits, _fitted, start: start)
    dense, structure = family.model, family.structure
    small = copy.deepcopy(dense)
    shapes = [narrowed(b.shape, "all", family.held) for b in structure.blocks]
    weights = token_weights(dense, structure, [images], attention=0.5, ffn=0.5)
    network, how = stages(dense), ProjectionSettings(guidance=0.0, ridge=0.1)
    with torch.no_grad():
        embedded = network.embed(images)
        plan = reconstruct(dense, small, structure, shapes, [embedded], None, how, weights=weights)
        check_finite(small)
        assert plan.shapes == tuple(shapes)
        assert relative_difference(small, masked_by_hand(small, plan), images) <= 1e-6
        assert relative_difference(small, compact(small, plan, images).model, images) <= EQUALITY_TOLERANCE

        # closer to the dense stream than blocks that are masked alone, in the same basis
        apart, goal = copy.deepcopy(dense), embedded
        rotate(apart, structure, collect_moments(apart, structure, [images], weights))
        surgery.mask(apart, structure, plan)
        streams = [embedded, embedded]
        for i, block in enumerate(network.blocks):
            goal = block(goal)
            streams = [m.blocks[i](x) for m, x in zip((small, apart), streams, strict=True)]
        repaired, masked = ((x - goal).square().mean() for x in streams)
        assert 0 < repaired < 0.7 * masked


def test_compacted_computes_what_the_masked_model_does(case: Case, images: Tensor) -> None:
    small, model = case.compaction.model, case.family.model
    assert case.untouched
    assert case.compaction.max_relative_difference <= EQUALITY_TOLERANCE
    assert case.compaction.images == len(images)
    with torch.no_grad():
        expected, dense, got = masked_by_hand(model, case.plan)(images), model(images), small(images)
    scale = expected.abs().max()
    assert (got - expected).abs().max() <= 1e-5 * scale
    assert (dense - expected).abs().max() > 1e-2 * scale  # the cut was felt: equality is no accident


def test_compacted_has_the_widths_and_the_cost_of_its_plan(case: Case) -> None:
    small, structure, shapes = case.compaction.model, case.family.structure, case.plan.shapes
    after = describe(small)
    assert after.shapes == shapes
    assert model_cost(structure, shapes, "params") == sum(p.numel() for p in small.parameters())
    assert model_cost(after, shapes, "params") == sum(p.numel() for p in small.parameters())
    assert model_cost(structure, shapes, "macs") == model_cost(after, shapes, "macs") == macs(small)
    for block, shape, kept in zip(small.blocks, shapes, structure.blocks, strict=True):
        assert type(block.attn) is (Attention if shape.qk == shape.vo else PrunedAttention)
        assert block.attn.scale == pytest.approx(shape.qk**-0.5)
        assert kept.scale == pytest.approx(8**-0.5)


def test_fused_and_plain_attention_agree(case: Case, images: Tensor) -> None:
    small = copy.deepcopy(case.compaction.model)
    assert relative_difference(case.compaction.model, small, images) == 0
    set_fused_attention(small, False)
    assert not any(block.attn.fused_attn for block in small.blocks)
    assert 0 <= relative_difference(case.compaction.model, small, images) <= 1e-5
    set_fused_attention(small, True)
    assert all(block.attn.fused_attn for block in small.blocks)


@pytest.mark.parametrize("name", FAMILIES)
def test_architecture_can_be_made_again(name: str, case_of: Callable[[str, str], Case], images: Tensor) -> None:
    case = case_of(name, "all")
    small = case.compaction.model
    spec = specification(small)
    assert spec == specification(case.family.model)
    again = build(spec, case.plan.shapes)
    assert all(p.is_meta for p in again.parameters())
    again.load_state_dict(small.state_dict(), strict=True, assign=True)
    assert relative_difference(small, again.eval(), images) <= 1e-6
    assert specification(again) == spec


def test_what_may_not_be_cut_is_refused(family: Family, images: Tensor) -> None:
    for kind in sorted(family.held):
        field = "heads" if kind == "head" else kind
        shapes = [b.shape for b in family.structure.blocks]
        shapes[1] = narrowed(shapes[1], kind, set())
        plan = random_plan(family.structure, shapes, seed=0)
        with pytest.raises(PlanError, match=rf"block 1: '{field}' cannot be cut in this model"):
            compact(family.model, plan, images)


def compose(first: BlockPlan, second: BlockPlan) -> BlockPlan:
    """Indices of a cut of a cut, in the dense block."""
    return BlockPlan(
        heads=tuple(first.heads[h] for h in second.heads),
        qk=tuple(tuple(first.qk[h][j] for j in dims) for h, dims in zip(second.heads, second.qk, strict=True)),
        vo=tuple(tuple(first.vo[h][j] for j in dims) for h, dims in zip(second.heads, second.vo, strict=True)),
        ffn=tuple(first.ffn[j] for j in second.ffn),
    )


@pytest.mark.parametrize(("name", "cut"), [*((name, "all") for name in FAMILIES), ("vit", BOTH), ("deit3", "qk")])
def test_a_compacted_model_can_be_pruned_again(
    name: str, cut: str, case_of: Callable[[str, str], Case], images: Tensor
) -> None:
    case = case_of(name, cut)
    small, held = case.compaction.model, case.family.held
    structure = describe(small)
    less = {"heads": {"head"}, "qk": {"qk"}, "vo": {"vo"}, "ffn": {"ffn"}}
    targets = {"heads": 2, "qk": 2, "vo": 2, "ffn": 9}
    change = {field: targets[field] for field, kind in less.items() if not kind & held}
    second = random_plan(structure, [replace(b.shape, **change) for b in structure.blocks], seed=9)
    smaller = compact(small, second, images).model
    both = Plan(tuple(compose(a, b) for a, b in zip(case.plan.blocks, second.blocks, strict=True)))
    assert describe(smaller).shapes == both.shapes
    with torch.no_grad():
        assert torch.equal(stages(smaller).logits(stages(smaller).embed(images)), smaller(images))
    expected = masked_by_hand(case.family.model, both)
    assert relative_difference(expected, smaller, images) <= 1e-5
    assert specification(smaller) == specification(case.family.model)


@pytest.fixture
def plan(structure: ModelStructure) -> Plan:
    return random_plan(structure, [BlockShape(heads=2, qk=3, vo=5, ffn=30)] * 2, seed=3)


def test_keeping_everything_changes_nothing(model: nn.Module, structure: ModelStructure, images: Tensor) -> None:
    small = compact(model, dense_plan(structure), images).model
    for name, value in model.state_dict().items():
        assert torch.equal(small.state_dict()[name], value), name


def test_a_specification_does_not_depend_on_widths(
    make_model: Callable[..., nn.Module], plan: Plan, images: Tensor
) -> None:
    model = make_model(mlp_ratio=2)
    assert specification(compact(model, plan, images).model) == specification(model)


@pytest.mark.parametrize("fused", [True, False])
def test_the_choice_of_kernel_survives(fused: bool, model: nn.Module, plan: Plan, images: Tensor) -> None:
    set_fused_attention(model, fused)
    assert [b.attn.fused_attn for b in compact(model, plan, images).model.blocks] == [fused, fused]


@pytest.mark.parametrize("training", [True, False])
def test_training_mode_and_rates_survive(training: bool, make_model: Callable[..., nn.Module], images: Tensor) -> None:
    model = make_model(mlp_ratio=2, attn_drop_rate=0.1, proj_drop_rate=0.2, drop_path_rate=0.3).train(training)
    structure = describe(model)
    plan = random_plan(structure, [BlockShape(heads=2, qk=3, vo=5, ffn=30)] * 2, seed=3)
    small = compact(model, plan, images).model
    assert model.training == small.training == training
    for block in small.blocks:
        assert all(module.training == training for module in block.modules())
        assert (block.attn.attn_drop.p, block.attn.proj_drop.p, block.mlp.drop1.p) == (0.1, 0.2, 0.2)
    assert small.blocks[1].drop_path1.drop_prob == pytest.approx(0.3)


def test_a_wrong_cut_is_caught(model: nn.Module, plan: Plan, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    right = surgery.cut_state

    def wrong(*args: Any) -> dict[str, Tensor]:
        state = right(*args)
        state["blocks.1.attn.proj.weight"] *= 1.001
        return state

    monkeypatch.setattr(surgery, "cut_state", wrong)
    with pytest.raises(EqualityError, match=r"differs from the masked one by .* \(allowed 1e-05\)"):
        compact(model, plan, images)


def test_not_a_number_never_counts_as_equal(model: nn.Module, plan: Plan, images: Tensor) -> None:
    with torch.no_grad():
        model.head.bias[0] = torch.nan
    with pytest.raises(EqualityError):
        compact(model, plan, images)


def test_finite_weights_are_checked_by_name(model: nn.Module) -> None:
    check_finite(model)
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight[0, :2] = torch.inf
    with pytest.raises(NonFiniteError, match=r"'blocks\.0\.mlp\.fc1\.weight' holds 2 NaN or infinite values of 2048"):
        check_finite(model)


def test_relative_difference_is_relative(images: Tensor) -> None:
    class Times(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.tensor(factor))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.factor

    assert relative_difference(Times(1.0), Times(1.5), images) == pytest.approx(0.5, rel=1e-4)
    assert relative_difference(Times(100.0), Times(101.0), images) == pytest.approx(0.01, rel=1e-4)


def test_a_foreign_specification_is_refused(model: nn.Module, plan: Plan) -> None:
    spec = specification(model)
    with pytest.raises(CheckpointError, match=r"library 'keras' is unknown; this version reads \['timm'\]"):
        build({**spec, "library": "keras"}, plan.shapes)
    with pytest.raises(CheckpointError, match="'vit_nano' is none of timm"):
        build({**spec, "architecture": "vit_nano"}, plan.shapes)
    with pytest.raises(CheckpointError, match=r"cannot make .*wide"):
        build({**spec, "arguments": {"wide": True}}, plan.shapes)


def test_split_swiglu_by_class(make_model: Callable[..., nn.Module], images: Tensor) -> None:
    """timm's split SwiGLU with biases, which no named architecture has."""
    model = make_model(mlp_layer=SwiGLU, mlp_ratio=1.5)
    structure = describe(model)
    plan = random_plan(structure, [replace(b.shape, ffn=11) for b in structure.blocks], seed=1)
    small = compact(model, plan, images).model
    assert relative_difference(masked_by_hand(model, plan), small, images) <= 1e-5
    assert sum(p.numel() for p in small.parameters()) == model_cost(structure, plan.shapes, "params")
