"""One contract, every family: what the description of any model that is accepted must do."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from timm.layers import Attention as TimmAttention
from timm.layers import SwiGLU
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from gohsp.core import surgery
from gohsp.core.capture import open_trunk
from gohsp.core.fisher import TokenWeightFitter, blended
from gohsp.core.gradients import differentiated
from gohsp.core.moments import collect_moments
from gohsp.core.objective import classification
from gohsp.core.projection import RepairSettings
from gohsp.core.reconstruction import reconstruct
from gohsp.core.rotation import rotate
from gohsp.errors import CheckpointError, EqualityError, NonFiniteError, PlanError, UnsupportedModelError
from gohsp.models import (
    EQUALITY_TOLERANCE,
    Compaction,
    build,
    check_finite,
    compact,
    describe,
    families,
    plain_attention,
    relative_difference,
    require_remakeable,
    specification,
)
from gohsp.models.attention import PrunedAttention
from gohsp.models.families import Attended, AttentionLayout, AttentionMaps, Branch, FfnLayout, Layout
from gohsp.models.modules import Constant
from gohsp.structure import (
    FIELDS,
    MACS,
    PARAMS,
    Absent,
    Attention,
    AttentionKept,
    AttentionWidths,
    FfnKept,
    FfnWidths,
    Kept,
    Network,
    SublayerKept,
    SublayerWidths,
    Widths,
    absent,
    cost_of,
    count_macs,
    count_params,
    is_absent,
    keep_everything,
    kept_widths,
)

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
"""What must not be narrowed in a family; everywhere else everything may. Whole sub-layers may go in all of them."""
BOTH = "qk and vo alike"
NARROW = {"head": 3, "qk": 3, "vo": 5, "ffn": 17}
GONE = {
    "no attention": ("blocks.0.attn",),
    "no FFN": ("blocks.0.mlp",),
    "no block": ("blocks.1.attn", "blocks.1.mlp"),
    "nothing": ("blocks.0.attn", "blocks.0.mlp", "blocks.1.attn", "blocks.1.mlp"),
    "all but what is gone": ("blocks.0.mlp", "blocks.1.attn"),
}
CASES = [
    (family, cut)
    for family in FAMILIES
    for cut in (*NARROW, BOTH, "all", *GONE)
    if not (cut in HELD.get(family, ()) or (cut == BOTH and family in HELD))
]


def narrowed(widths: SublayerWidths, cut: str, held: set[str]) -> SublayerWidths:
    """Odd widths for what ``cut`` means, less what is held."""
    if cut == BOTH:
        return replace(widths, qk=6, vo=6) if isinstance(widths, AttentionWidths) else widths
    kinds = {cut} if cut in NARROW else set(NARROW) if cut.startswith("all") else set()
    return replace(widths, **{FIELDS[kind]: NARROW[kind] for kind in widths.kinds if kind in kinds - held})


def random_cut(network: Network, widths: Widths, seed: int) -> dict[str, SublayerKept]:
    generator = torch.Generator().manual_seed(seed)

    def pick(have: int, want: int) -> tuple[int, ...]:
        return tuple(sorted(torch.randperm(have, generator=generator)[:want].tolist()))

    def of(have: Any, want: Any) -> SublayerKept:
        if isinstance(want, FfnWidths):
            return FfnKept(units=pick(have.units, want.units))
        qk, vo = (tuple(pick(h, w) for _ in range(want.heads)) for h, w in ((have.qk, want.qk), (have.vo, want.vo)))
        return AttentionKept(heads=pick(have.heads, want.heads), qk=qk, vo=vo)

    return {name: of(have, widths[name]) for name, have in network.widths.items()}


def masked_by_hand(model: nn.Module, cut: Kept) -> nn.Module:
    """The dense model with removed units zeroed where timm keeps them: independent of structure and surgery."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for i, block in enumerate(model.blocks):
            attn, kept, units = block.attn, cut[f"blocks.{i}.attn"], cut[f"blocks.{i}.mlp"].units
            heads, width = attn.num_heads, attn.head_dim
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
            ffn[list(units)] = True
            block.mlp.fc2.weight *= ffn
    return model


def macs(model: nn.Module) -> int:
    """Multiply-accumulates of one image by PyTorch's own counter, on the meta device."""
    model = copy.deepcopy(model).to("meta").requires_grad_(False).eval()
    counter = FlopCounterMode(display=False)
    with plain_attention(model), counter:  # the fused kernel pads; the cost is that of the real widths
        model(torch.empty(1, 3, 16, 16, device="meta"))
    return counter.get_total_flops() // 2


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@dataclass(frozen=True)
class Family:
    name: str
    model: nn.Module
    network: Network
    held: set[str]
    spec: dict[str, Any]


@pytest.fixture(scope="module")
def family_of(make_model: Callable[..., nn.Module]) -> Callable[[str], Family]:
    @cache
    def get(name: str) -> Family:
        architecture, arguments = FAMILIES[name]
        model = make_model(architecture, **{"mlp_ratio": 1.5, **arguments})
        return Family(name, model, describe(model), HELD.get(name, set()), specification(model))

    return get


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, family_of: Callable[[str], Family]) -> Family:
    return family_of(request.param)


@dataclass(frozen=True)
class Case:
    family: Family
    kept: dict[str, SublayerKept]
    compaction: Compaction
    untouched: bool

    @property
    def widths(self) -> dict[str, SublayerWidths]:
        return kept_widths(self.kept)


@pytest.fixture(scope="module")
def case_of(family_of: Callable[[str], Family], images: Tensor) -> Callable[[str, str], Case]:
    @cache
    def get(name: str, cut: str) -> Case:
        family = family_of(name)
        model, network = family.model, family.network
        widths = {name: narrowed(of, cut, family.held) for name, of in network.widths.items()}
        if "ffn" not in family.held:
            widths["blocks.1.mlp"] = FfnWidths(units=16)  # blocks need not be alike
        widths |= {gone: absent(widths[gone]) for gone in GONE.get(cut, ())}
        kept = random_cut(network, widths, seed=7)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        compaction = compact(model, kept, images)
        same = all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        return Case(family, kept, compaction, same)

    return get


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request: pytest.FixtureRequest, case_of: Callable[[str, str], Case]) -> Case:
    return case_of(*request.param)


def test_what_may_be_cut(family: Family) -> None:
    names = [f"blocks.{i}.{part}" for i in range(2) for part in ("attn", "mlp")]
    assert [sub.name for sub in family.network.sublayers] == names
    for sub in family.network.present:
        assert sub.removable
        assert sub.prunable == ({"head", "qk", "vo"} if isinstance(sub, Attention) else {"ffn"}) - family.held
        assert not isinstance(sub, Attention) or sub.rotatable == {"qk", "vo"} - family.held


def test_dense_cost(family: Family) -> None:
    network, model = family.network, family.model
    assert count_params(network) == parameters(model)
    assert count_macs(network) == macs(model)
    seen = []
    hook = model.blocks[0].register_forward_pre_hook(lambda _m, args: seen.append(args[0].shape))
    with torch.no_grad():
        model(torch.zeros(1, 3, 16, 16))
    hook.remove()
    assert {(1, sub.tokens, sub.readout.size) for sub in network.present} == set(seen)
    assert network.embed_dim == 32


def test_blocks_run_alone_are_the_models_own(family: Family, images: Tensor) -> None:
    trunk = open_trunk(family.model, family.network, images[:2])
    assert trunk.blocks == tuple(family.network.blocks)
    left: list[Tensor] = []
    hooks = [b.register_forward_hook(lambda _m, _args, out: left.append(out)) for b in family.model.blocks]
    with torch.no_grad():
        family.model(images)
        expected = list(left)
        x = trunk.enter(images)
        for i in range(len(trunk.blocks)):
            x = trunk.run(i, x)
            assert torch.equal(x, expected[i])
    for hook in hooks:
        hook.remove()


def test_reconstruction_repairs_a_cut_of_everything(
    family: Family, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A few images of noise say nothing of others, so folds would choose to repair little; here the same images judge.
    monkeypatch.setattr("gohsp.core.reconstruction.cross_validated_ridge", lambda _splits, _fitted, start: start)
    dense, network = family.model, family.network
    widths = {name: narrowed(of, "all", family.held) for name, of in network.widths.items()}
    fitter = TokenWeightFitter()
    for gradients in differentiated(dense, network, classification(), [images]):
        fitter.update(gradients)
    weights = blended(fitter.weights, dict.fromkeys(network.widths, 0.5))
    small, trunk = copy.deepcopy(dense), open_trunk(dense, network, images[:2])
    with torch.no_grad():
        entered, how = trunk.enter(images), RepairSettings(guidance=0.0, ridge=0.1)
        kept = reconstruct(trunk, small, network, widths, [entered], None, how, weights=weights)
        check_finite(small)
        assert kept_widths(kept) == widths
        assert relative_difference(small, masked_by_hand(small, kept), images) <= 1e-6
        assert relative_difference(small, compact(small, kept, images).model, images) <= EQUALITY_TOLERANCE

        # closer to the dense stream than blocks that are masked alone, in the same basis
        apart, goal = copy.deepcopy(dense), entered
        rotate(apart, network, collect_moments(apart, network, [images], weights))
        surgery.mask(apart, network, kept)
        streams = [entered, entered]
        for i in range(2):
            goal = trunk.run(i, goal)
            streams = [trunk.of(m).run(i, x) for m, x in zip((small, apart), streams, strict=True)]
        repaired, masked = ((x - goal).square().mean() for x in streams)
        assert 0 < repaired < 0.7 * masked


def test_compacted_computes_what_the_masked_model_does(case: Case, images: Tensor) -> None:
    small, model = case.compaction.model, case.family.model
    assert case.untouched
    assert case.compaction.max_relative_difference <= EQUALITY_TOLERANCE
    assert case.compaction.images == len(images)
    with torch.no_grad():
        expected, dense, got = masked_by_hand(model, case.kept)(images), model(images), small(images)
    scale = expected.abs().max()
    assert (got - expected).abs().max() <= 1e-5 * scale
    assert (dense - expected).abs().max() > 1e-2 * scale  # the cut was felt: equality is no accident


def test_compacted_has_the_widths_and_the_cost_of_its_cut(case: Case) -> None:
    small, network, widths = case.compaction.model, case.family.network, case.widths
    after = describe(small)
    assert after.widths == widths
    assert cost_of(network, widths, PARAMS) == count_params(after) == parameters(small)
    assert cost_of(network, widths, MACS) == count_macs(after) == macs(small)
    for sub in after.sublayers:
        module, want = small.get_submodule(sub.name), widths[sub.name]
        assert isinstance(sub, Absent) == isinstance(module, Constant) == is_absent(want)
        if isinstance(sub, Absent):
            assert (parameters(module), sub.readout.size) == (32, 32)
        if isinstance(sub, Attention):
            assert type(module) is (TimmAttention if want.qk == want.vo else PrunedAttention)
            assert module.scale == sub.scale == pytest.approx(want.qk**-0.5)
    assert all(sub.scale == pytest.approx(8**-0.5) for sub in network.attentions)


def test_fused_and_plain_attention_agree(case: Case, images: Tensor) -> None:
    small = case.compaction.model
    with torch.no_grad():
        fused = small(images)
        with plain_attention(small):
            assert not any(getattr(block.attn, "fused_attn", False) for block in small.blocks)
            plain = small(images)
    torch.testing.assert_close(plain, fused, rtol=0, atol=1e-5 * float(fused.abs().max()))
    assert all(block.attn.fused_attn for block in small.blocks if not isinstance(block.attn, Constant))


@pytest.mark.parametrize("cut", ["all", "nothing", "all but what is gone"])
@pytest.mark.parametrize("name", FAMILIES)
def test_architecture_can_be_made_again(
    name: str, cut: str, case_of: Callable[[str, str], Case], images: Tensor
) -> None:
    case = case_of(name, cut)
    small = case.compaction.model
    spec = require_remakeable(small)
    if cut != "nothing":  # of what is not there, nothing need be known
        assert spec == case.family.spec
    again = build(spec, case.widths)
    assert all(p.is_meta for p in again.parameters())
    again.load_state_dict(small.state_dict(), strict=True, assign=True)
    assert relative_difference(small, again.eval(), images) <= 1e-6


def test_what_may_not_be_cut_is_refused(family: Family, images: Tensor) -> None:
    for kind in sorted(family.held):
        name = "blocks.1.mlp" if kind == "ffn" else "blocks.1.attn"
        widths = family.network.widths | {name: narrowed(family.network.widths[name], kind, set())}
        kept = random_cut(family.network, widths, seed=0)
        with pytest.raises(PlanError, match=rf"'{name}': '{FIELDS[kind]}' cannot be cut here"):
            compact(family.model, kept, images)


def compose(first: Any, second: Any) -> SublayerKept:
    """Indices of a cut of a cut, in the dense sub-layer."""
    if isinstance(first, FfnKept):
        return FfnKept(units=tuple(first.units[j] for j in second.units))
    return AttentionKept(
        heads=tuple(first.heads[h] for h in second.heads),
        qk=tuple(tuple(first.qk[h][j] for j in dims) for h, dims in zip(second.heads, second.qk, strict=True)),
        vo=tuple(tuple(first.vo[h][j] for j in dims) for h, dims in zip(second.heads, second.vo, strict=True)),
    )


AGAIN = [(name, cut) for name in FAMILIES for cut in ("all", "no attention", "no FFN", "all but what is gone")]


@pytest.mark.parametrize(("name", "cut"), [*AGAIN, ("vit", BOTH), ("deit3", "qk")])
def test_a_compacted_model_can_be_pruned_again(
    name: str, cut: str, case_of: Callable[[str, str], Case], images: Tensor
) -> None:
    case = case_of(name, cut)
    small, held, targets = case.compaction.model, case.family.held, {"head": 2, "qk": 2, "vo": 2, "ffn": 9}
    network = describe(small)

    def less(widths: SublayerWidths) -> SublayerWidths:
        return replace(widths, **{FIELDS[kind]: targets[kind] for kind in widths.kinds if kind not in held})

    widths = {name: of if is_absent(of) else less(of) for name, of in network.widths.items()}
    second = random_cut(network, widths, seed=9)
    smaller = compact(small, second, images).model
    both = {name: compose(first, second[name]) for name, first in case.kept.items()}
    assert describe(smaller).widths == kept_widths(both) == widths
    expected = masked_by_hand(case.family.model, both)
    assert relative_difference(expected, smaller, images) <= 1e-5
    assert specification(smaller) == case.family.spec


@pytest.mark.parametrize("name", ["vit", "deit3", "no readout bias"])
def test_what_one_cut_left_another_may_remove(name: str, case_of: Callable[[str, str], Case], images: Tensor) -> None:
    small = case_of(name, "all").compaction.model
    network = describe(small)
    widths = network.widths | {gone: absent(network.widths[gone]) for gone in GONE["no block"]}
    smaller = compact(small, random_cut(network, widths, seed=1), images).model
    assert describe(smaller).widths == widths
    with pytest.raises(PlanError, match=r"'blocks\.1\.attn' was removed from this model and cannot come back"):
        compact(smaller, random_cut(network, network.widths, seed=1), images)


LESS = {"attn": AttentionWidths(heads=2, qk=3, vo=5), "mlp": FfnWidths(units=30)}


def some_cut(network: Network) -> dict[str, SublayerKept]:
    return random_cut(network, {name: LESS[name.rpartition(".")[2]] for name in network.widths}, seed=3)


@pytest.fixture
def kept(network: Network) -> dict[str, SublayerKept]:
    return some_cut(network)


def test_keeping_everything_changes_nothing(model: nn.Module, network: Network, images: Tensor) -> None:
    small = compact(model, keep_everything(network), images).model
    for name, value in model.state_dict().items():
        assert torch.equal(small.state_dict()[name], value), name


def test_a_specification_does_not_depend_on_widths(
    make_model: Callable[..., nn.Module], kept: Kept, images: Tensor
) -> None:
    model = make_model(mlp_ratio=2)
    assert specification(compact(model, kept, images).model) == specification(model)


@pytest.mark.parametrize("fused", [True, False])
def test_the_choice_of_kernel_survives(fused: bool, model: nn.Module, kept: Kept, images: Tensor) -> None:
    for block in model.blocks:
        block.attn.fused_attn = fused
    assert [b.attn.fused_attn for b in compact(model, kept, images).model.blocks] == [fused, fused]


@pytest.mark.parametrize("training", [True, False])
def test_training_mode_and_rates_survive(training: bool, make_model: Callable[..., nn.Module], images: Tensor) -> None:
    model = make_model(mlp_ratio=2, attn_drop_rate=0.1, proj_drop_rate=0.2, drop_path_rate=0.3).train(training)
    small = compact(model, some_cut(describe(model)), images).model
    assert model.training == small.training == training
    for block in small.blocks:
        assert all(module.training == training for module in block.modules())
        assert (block.attn.attn_drop.p, block.attn.proj_drop.p, block.mlp.drop1.p) == (0.1, 0.2, 0.2)
    assert small.blocks[1].drop_path1.drop_prob == pytest.approx(0.3)


def test_a_wrong_cut_is_caught(model: nn.Module, kept: Kept, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    right = surgery.cut_state

    def wrong(*args: Any) -> dict[str, Tensor]:
        state = right(*args)
        state["blocks.1.attn.proj.weight"] *= 1.001
        return state

    monkeypatch.setattr(surgery, "cut_state", wrong)
    with pytest.raises(EqualityError, match=r"differs from the masked one by .* \(allowed 1e-05\)"):
        compact(model, kept, images)


def test_not_a_number_never_counts_as_equal(model: nn.Module, kept: Kept, images: Tensor) -> None:
    with torch.no_grad():
        model.head.bias[0] = torch.nan
    with pytest.raises(EqualityError):
        compact(model, kept, images)


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


def test_a_foreign_specification_is_refused(model: nn.Module, kept: Kept) -> None:
    spec = specification(model)
    with pytest.raises(CheckpointError, match=r"library 'keras' is unknown; this version reads .*'timm'"):
        build({**spec, "library": "keras"}, kept_widths(kept))
    with pytest.raises(CheckpointError, match="'vit_nano' is none of timm"):
        build({**spec, "architecture": "vit_nano"}, kept_widths(kept))
    with pytest.raises(CheckpointError, match="'wide' is no argument of an architecture"):
        build({**spec, "arguments": {"wide": True}}, kept_widths(kept))


def test_split_swiglu_by_class(make_model: Callable[..., nn.Module], images: Tensor) -> None:
    """timm's split SwiGLU with biases, which no named architecture has."""
    model = make_model(mlp_layer=SwiGLU, mlp_ratio=1.5)
    network = describe(model)
    narrow = {name: FfnWidths(units=11) if isinstance(of, FfnWidths) else of for name, of in network.widths.items()}
    for widths in (narrow, narrow | {"blocks.1.mlp": FfnWidths(units=0)}):
        kept = random_cut(network, widths, seed=1)
        small = compact(model, kept, images).model
        assert relative_difference(masked_by_hand(model, kept), small, images) <= 1e-5
        assert parameters(small) == cost_of(network, widths, PARAMS)


# A family of one's own


class ToyAttention(nn.Module):
    """Queries, keys and values by maps of their own, and a learnt temperature for each head."""

    def __init__(self, dim: int, heads: int, qk: int, vo: int) -> None:
        super().__init__()
        self.heads = heads
        self.ask, self.answer = nn.Linear(dim, heads * qk), nn.Linear(dim, heads * qk, bias=False)
        self.tell, self.write = nn.Linear(dim, heads * vo), nn.Linear(heads * vo, dim)
        self.temperature = nn.Parameter(torch.rand(heads) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (m(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for m in (self.ask, self.answer, self.tell))
        rows = (q @ k.mT * q.shape[-1] ** -0.5 * self.temperature[:, None, None]).softmax(-1)
        return self.write((rows @ v).transpose(1, 2).flatten(2))


class ToyFfn(nn.Module):
    def __init__(self, dim: int, units: int) -> None:
        super().__init__()
        self.hide, self.show = nn.Linear(dim, units), nn.Linear(units, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.show(self.hide(x).relu())


class ToyBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.before_mix, self.mix = nn.LayerNorm(dim), ToyAttention(dim, 3, 4, 4)
        self.before_think, self.think = nn.LayerNorm(dim), ToyFfn(dim, 20)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.before_mix(x))
        return x + self.think(self.before_think(x))


class ToyModel(nn.Module):
    """Returns a mapping, as some libraries' models do."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.trunk = nn.Conv2d(3, 12, 4, 4), nn.Sequential(ToyBlock(12), ToyBlock(12))
        self.head = nn.Linear(12, 5)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.trunk(self.patch(images).flatten(2).mT).mean(1))}


def own_classes() -> families.Known:
    """What makes these classes known."""
    maps = AttentionMaps(
        query=("ask.weight", "ask.bias"),
        key=("answer.weight", "answer.bias"),
        value=("tell.weight", "tell.bias"),
        readout="write",
    )
    block = Layout(attention=Branch(module="mix", norm="before_mix"), ffn=Branch(module="think", norm="before_think"))
    attention = AttentionLayout(
        maps=maps, heads="heads", scale=None, owned={"temperature": 0}, position=warmed, dropout=None
    )
    name = f"{ToyBlock.__module__}.{{}}".format
    return families.Known(
        blocks={name("ToyBlock"): (block,)},
        attentions={name("ToyAttention"): (attention,)},
        ffns={name("ToyFfn"): (FfnLayout(inputs=("hide",), readout="show"),)},
    )


def warmed(attn: Any, q: Tensor, k: Tensor, _args: tuple[Any, ...], _given: Mapping[str, Any]) -> Attended:
    """Each head has a temperature of its own."""
    return Attended(q * attn.temperature[:, None, None], k)


NO_HEADS = AttentionWidths(heads=0, qk=0, vo=0)


def test_a_family_enters_by_being_registered(monkeypatch: pytest.MonkeyPatch, images: Tensor) -> None:
    model = ToyModel().eval()
    with pytest.raises(UnsupportedModelError, match=r"no block that can be pruned \(2 of its modules are .*ToyBlock\)"):
        describe(model, images)
    monkeypatch.setattr(families, "_known", families._known)  # forgotten after this test
    families.register(own_classes())
    network = describe(model, images)
    assert list(network.widths) == [f"trunk.{i}.{part}" for i in range(2) for part in ("mix", "think")]
    assert count_params(network) == parameters(model)
    counter = FlopCounterMode(display=False)
    with counter:
        model(images[:1])
    assert count_macs(network) == counter.get_total_flops() // 2

    trunk = open_trunk(model, network, images[:2])
    widths = {
        "trunk.0.mix": AttentionWidths(heads=2, qk=3, vo=2),
        "trunk.0.think": FfnWidths(units=0),
        "trunk.1.mix": NO_HEADS,
        "trunk.1.think": FfnWidths(units=7),
    }
    repaired = copy.deepcopy(model)
    kept = reconstruct(trunk, repaired, network, widths, [trunk.enter(images)], None, RepairSettings())
    small = compact(repaired, kept, images).model
    after = describe(small, images)
    assert after.widths == widths
    assert count_params(after) == cost_of(network, widths, PARAMS) == parameters(small)
    crude = compact(model, kept, images).model
    assert relative_difference(model, small, images) < relative_difference(model, crude, images)
