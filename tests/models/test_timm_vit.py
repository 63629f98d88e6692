from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.layers import Attention as TimmAttention
from timm.models.cait import LayerScaleBlock
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer
from torch import Tensor, nn

from gohsp.errors import UnsupportedModelError
from gohsp.models import build, compact, describe, specification
from gohsp.models.attention import PrunedAttention
from gohsp.models.families.timm import ATTENTIONS
from gohsp.models.modules import Constant
from gohsp.structure import (
    PARAMS,
    Attention,
    AttentionKept,
    AttentionWidths,
    Ffn,
    FfnKept,
    FfnWidths,
    UnitSlice,
    cost_of,
    count_macs,
    count_params,
    keep_none,
    kept_widths,
)


def test_deit_tiny_as_published() -> None:
    """5.717 M parameters; MACs by hand."""
    with torch.device("meta"):
        network = describe(timm.create_model("deit_tiny_patch16_224"))
    expected = {"attn": AttentionWidths(heads=3, qk=64, vo=64), "mlp": FfnWidths(units=768)}
    assert network.widths == {f"blocks.{i}.{part}": of for i in range(12) for part, of in expected.items()}
    assert network.embed_dim == 192
    assert {sub.tokens for sub in network.present} == {sub.keys for sub in network.attentions} == {197}
    assert count_params(network) == 5_717_416
    block = 197 * 12 * 192 * 192 + 2 * 197 * 197 * 192
    assert count_macs(network) == 12 * block + 196 * 768 * 192 + 192 * 1000
    assert network.fixed_macs == 196 * 768 * 192 + 192 * 1000
    norms = 12 * 2 * 2 * 192  # what goes with a sub-layer is no longer fixed: its norm, and its readout's bias
    assert network.fixed_params == 5_717_416 - 12 * (4 * 192 * 192 + 4 * 192 + 8 * 192 * 192 + 5 * 192) - norms
    assert network.attentions[0].scale == 0.125


def test_where_units_sit(make_model: Callable[..., nn.Module]) -> None:
    attention, ffn = describe(make_model("deit3_small_patch16_224", mlp_ratio=2)).blocks["blocks.1"]
    assert isinstance(attention, Attention)
    assert isinstance(ffn, Ffn)
    qkv, weight = "blocks.1.attn.qkv", "blocks.1.attn.qkv.weight"
    parts = (attention.query, attention.key, attention.value)
    assert [s.start for rows in parts for s in rows.slices] == [0, 0, 32, 32, 64, 64]
    assert attention.value.weight == UnitSlice(parameter=weight, axis=0, start=64, size=32)
    assert attention.value.bias == UnitSlice(parameter=f"{qkv}.bias", axis=0, start=64, size=1)
    assert attention.readout.columns == UnitSlice(parameter="blocks.1.attn.proj.weight", axis=1, start=0, size=32)
    assert (attention.readout.gain, ffn.readout.gain) == ("blocks.1.ls1.gamma", "blocks.1.ls2.gamma")
    assert (attention.name, attention.block, attention.norm) == ("blocks.1.attn", "blocks.1", "blocks.1.norm1")
    assert (ffn.name, ffn.norm, ffn.readout.module) == ("blocks.1.mlp", "blocks.1.norm2", "blocks.1.mlp.fc2")
    assert (attention.query_norm, attention.key_norm) == (None, None)
    normed = describe(make_model(qk_norm=True)).attentions[0]
    assert (normed.query_norm, normed.key_norm) == ("blocks.0.attn.q_norm", "blocks.0.attn.k_norm")


def test_packed_gated_units_have_two_rows(make_model: Callable[..., nn.Module]) -> None:
    ffn = describe(make_model("vit_giant_patch14_dinov2", mlp_ratio=3.0)).sublayers[1]
    assert isinstance(ffn, Ffn)
    assert ffn.widths == FfnWidths(units=48)
    assert [(s.parameter.rsplit(".", 1)[1], s.start) for rows in ffn.inputs for s in rows.slices] == [
        ("weight", 0),
        ("bias", 0),
        ("weight", 48),
        ("bias", 48),
    ]


def pruned(theirs: nn.Module, **widths: int) -> PrunedAttention:
    """Ours in place of timm's, with new weights."""
    (layout,) = ATTENTIONS["timm.layers.attention.Attention"]
    return PrunedAttention(copy.deepcopy(theirs), layout, AttentionWidths(**widths))


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_pruned_attention_is_a_drop_in_for_timms(fused: bool, qk_norm: bool) -> None:
    theirs = TimmAttention(32, num_heads=4, qkv_bias=True, qk_norm=qk_norm, scale_norm=qk_norm, norm_layer=nn.LayerNorm)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn_like(parameter))
    ours = pruned(theirs, heads=4, qk=8, vo=8)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.fused_attn = ours.fused_attn = fused
    x, mask = torch.randn(2, 6, 32), torch.randn(2, 1, 6, 6)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours(x, attn_mask=mask), theirs(x, attn_mask=mask), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours(x, is_causal=True), theirs(x, is_causal=True), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("qk", "vo"), [(3, 8), (8, 3), (5, 5), (1, 2)])
def test_pruned_attention_by_hand(qk: int, vo: int) -> None:
    attn = pruned(TimmAttention(6, num_heads=2, qkv_bias=True, proj_bias=False), heads=2, qk=qk, vo=vo)
    x = torch.randn(3, 4, 6)
    q, k, v = attn.qkv(x).split([2 * qk, 2 * qk, 2 * vo], dim=-1)
    heads = []
    for h in range(2):
        a, b, c = (t[..., h * w : (h + 1) * w] for t, w in ((q, qk), (k, qk), (v, vo)))
        heads.append((a @ b.transpose(1, 2) / qk**0.5).softmax(-1) @ c)
    expected = torch.cat(heads, dim=-1) @ attn.proj.weight.T
    for fused in (True, False):
        attn.fused_attn = fused
        torch.testing.assert_close(attn(x), expected, rtol=1e-4, atol=1e-5)
    assert attn.proj.bias is None


@pytest.mark.parametrize("fused", [True, False])
def test_attention_dropout_acts_in_training_only(fused: bool) -> None:
    attn = pruned(TimmAttention(6, num_heads=2, qkv_bias=True, attn_drop=0.5), heads=2, qk=2, vo=3)
    attn.fused_attn = fused
    x = torch.randn(1, 4, 6)
    assert not torch.equal(attn.train()(x), attn(x))
    assert torch.equal(attn.eval()(x), attn(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_an_absent_sublayer_leaves_adds_one_vector(dtype: torch.dtype) -> None:
    left = Constant(3)
    with torch.no_grad():
        left.bias.copy_(torch.tensor([1.0, 2.0, 3.0]))
    x = torch.randn(2, 4, 3, dtype=dtype)
    out = left(x, torch.ones(4, 4), is_causal=True)  # as an attention is called
    assert out.dtype == dtype
    assert torch.equal(out, torch.tensor([1.0, 2.0, 3.0], dtype=dtype).expand(2, 4, 3))
    left(x.float()).sum().backward()
    assert torch.equal(left.bias.grad, torch.full((3,), 8.0))


def tiny(**arguments: object) -> nn.Module:
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 5}
    return timm.create_model("vit_tiny_patch16_224", **{**sizes, **arguments})


@pytest.mark.parametrize(
    ("architecture", "named"),
    [
        ("resnet18", r"timm\.models\.resnet\.ResNet has no block that can be pruned"),
        ("hiera_tiny_224", r"timm\.models\.hiera\.Hiera has .* \(12 of its modules are timm.*\.HieraBlock\)"),
        ("cait_xxs24_224", r"timm\.models\.cait\.Cait has .* \(24 of its modules are timm.*\.LayerScaleBlock\)"),
    ],
)
def test_other_models_are_refused_by_class(architecture: str, named: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(architecture)
    with pytest.raises(UnsupportedModelError, match=rf"a .*{named}.*; supported: .*deit_\*"):
        describe(model)


def test_blocks_of_another_class_are_named() -> None:
    with pytest.raises(UnsupportedModelError, match=r"no block .* \(2 of its modules are .*ParallelScalingBlock\)"):
        describe(tiny(block_fn=ParallelScalingBlock))


def gated() -> nn.Module:
    if "gated" not in inspect.signature(TimmAttention).parameters:
        pytest.skip("this timm has no gated attention")
    model = tiny()
    model.blocks[1].attn = TimmAttention(32, num_heads=4, gated=True)
    return model


def with_foreign_mlp() -> nn.Module:
    model = tiny()
    model.blocks[1].mlp = nn.Linear(32, 32)
    return model


def with_one_other_block() -> nn.Module:
    model = tiny()
    model.blocks[1] = LayerScaleBlock(32, 4)
    return model


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (with_one_other_block, r"module 'blocks\.1' is a .*LayerScaleBlock"),
        (gated, r"module 'blocks\.1\.attn' is a .*Attention with a gate"),
        (with_foreign_mlp, r"module 'blocks\.1\.mlp' is a torch\..*Linear"),
    ],
)
def test_foreign_modules_are_named_with_what_is_supported(make: Callable[[], nn.Module], named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=named + r".*, which cannot be pruned; supported: .*SwiGLU"):
        describe(make())


def test_a_model_of_unknown_origin_is_described_but_cannot_be_made_again() -> None:
    model = VisionTransformer(img_size=16, patch_size=8, embed_dim=32, depth=1, num_heads=4)
    assert [sub.tokens for sub in describe(model).present] == [5, 5]
    with pytest.raises(UnsupportedModelError, match="takes a model that timm made by its name"):
        specification(model)


def test_specification_holds_what_differs_from_the_default_alone() -> None:
    with torch.device("meta"):
        assert specification(timm.create_model("deit_tiny_patch16_224"))["arguments"] == {}
        changed = timm.create_model("deit_tiny_patch16_224", num_classes=10, img_size=96, drop_path_rate=0.2)
    assert specification(changed) == {
        "library": "timm",
        "architecture": "deit_tiny_patch16_224",
        "arguments": {"num_classes": 10, "img_size": [96, 96]},
    }


@pytest.mark.parametrize(
    "arguments",
    [
        {"in_chans": 1},
        {"mlp_ratio": 3.3},
        {"num_classes": 0},
        {"reg_tokens": 2},
        {"reg_tokens": 2, "no_embed_class": True},
        {"class_token": False, "global_pool": "avg"},
        {"class_token": False, "global_pool": "avg", "fc_norm": False},
        {"global_pool": "map"},
        {"pre_norm": True},
        {"fc_norm": True},
        {"init_values": 1e-4},
        {"qkv_bias": False},
        {"proj_bias": False},
        {"qk_norm": True},
        {"scale_attn_norm": True},
        {"scale_mlp_norm": True},
        {"dynamic_img_size": True},
    ],
    ids=lambda arguments: " ".join(arguments),
)
def test_every_argument_is_remembered(arguments: dict, make_model: Callable[..., nn.Module]) -> None:
    model = make_model(**arguments)
    again = build(specification(model), describe(model).widths)
    again.load_state_dict(model.state_dict(), strict=True, assign=True)
    size = 24 if "dynamic_img_size" in arguments else 16
    images = torch.randn(2, arguments.get("in_chans", 3), size, size)
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(images), model(images))


@pytest.mark.assets
def test_a_real_checkpoint_compacts_exactly(assets: Path) -> None:
    model = timm.create_model("deit_tiny_patch16_224").eval()
    model.load_state_dict(load_file(assets / "models" / "deit_tiny_patch16_224.safetensors"), strict=True)
    generator = torch.Generator().manual_seed(0)

    def pick(have: int, want: int) -> tuple[int, ...]:
        return tuple(sorted(torch.randperm(have, generator=generator)[:want].tolist()))

    kept = {}
    for i in range(12):
        heads, units = keep_none(AttentionWidths(heads=3, qk=64, vo=64)), FfnKept(units=pick(768, 512))
        if i != 5:
            heads = AttentionKept(heads=pick(3, 2), qk=(pick(64, 40), pick(64, 40)), vo=(pick(64, 48), pick(64, 48)))
        kept |= {f"blocks.{i}.attn": heads, f"blocks.{i}.mlp": keep_none(units.widths) if i == 9 else units}
    probe: Tensor = torch.randn(2, 3, 224, 224, generator=generator)
    result = compact(model, kept, probe)
    assert result.max_relative_difference <= 1e-5
    assert sum(p.numel() for p in result.model.parameters()) == cost_of(describe(model), kept_widths(kept), PARAMS)
