"""timm's blocks: VisionTransformer, Eva (EVA-02, DINOv3, rotary ViTs), BEiT, relative positions, NaFlexVit, Swin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from gohsp.models.attention import Attended, AttentionLayout, AttentionMaps, Place, maps_at
from gohsp.models.families.layout import Branch, FfnLayout, Known, Layout
from gohsp.models.families.positions import along_axes, by_window, cosines, looked_up

Places = list[Place]


def rotary(attn: Any, q: Tensor, k: Tensor, args: tuple[Any, ...], given: Mapping[str, Any]) -> Attended:
    """Queries and keys turned by their tokens' positions, those of prefix tokens left as they are."""
    rope, causal = given.get("rope", args[0] if args else None), bool(given.get("is_causal", False))
    if rope is not None:
        from timm.layers import apply_rot_embed_cat  # it is there wherever such an attention is

        first, half = attn.num_prefix_tokens, attn.rotate_half
        q, k = (
            F.pad(x[:, :, :first], (0, 0, 0, x.shape[2] - first))
            + F.pad(apply_rot_embed_cat(x[:, :, first:], rope, half=half), (0, 0, first, 0))
            for x in (q, k)
        )
    return Attended(q, k, given.get("attn_mask"), causal)


def table_of_positions(attn: Any, q: Tensor, k: Tensor, args: tuple[Any, ...], given: Mapping[str, Any]) -> Attended:
    """A learnt number for each head and distance, and what the model shares between blocks (BEiT)."""
    shared = given.get("shared_rel_pos_bias", args[0] if args else None)
    if attn.relative_position_bias_table is None:
        return Attended(q, k, shared)
    own = looked_up(attn.relative_position_bias_table, attn.relative_position_index)
    return Attended(q, k, own if shared is None else own + shared)


def windows(attn: Any, q: Tensor, k: Tensor, _args: tuple[Any, ...], given: Mapping[str, Any]) -> Attended:
    """A learnt number for each head and distance; in shifted windows only neighbours see each other (Swin)."""
    bias = looked_up(attn.relative_position_bias_table, attn.relative_position_index)
    return Attended(q, k, by_window(bias, given.get("mask"), q.shape[0]))


def module_of_positions(attn: Any, q: Tensor, k: Tensor, args: tuple[Any, ...], given: Mapping[str, Any]) -> Attended:
    """What a module makes of distances for each head: a table, or a small network of log-distances."""
    rel = getattr(attn, "rel_pos", None)
    if rel is None:
        return Attended(q, k, given.get("shared_rel_pos", args[0] if args else None))
    if not hasattr(rel, "mlp"):
        side = rel.window_area + rel.prefix_tokens
        return Attended(q, k, looked_up(rel.relative_position_bias_table, rel.relative_position_index.view(side, side)))
    per_distance = rel.mlp(rel.rel_coords_log).flatten(0, 1)
    bias = rel.bias_act(looked_up(per_distance, rel.relative_position_index.view(rel.window_area, rel.window_area)))
    bias = bias if rel.bias_gain is None else rel.bias_gain * bias
    return Attended(q, k, F.pad(bias, [rel.prefix_tokens, 0, rel.prefix_tokens, 0]))


PACKED: Places = [("qkv.weight", "qkv.bias")] * 3
BIASES_APART: Places = [("qkv.weight", f"{x}_bias") for x in "qkv"]
APART: Places = [(f"{x}_proj.weight", f"{x}_proj.bias") for x in "qkv"]

ROTARY: dict[str, Any] = {
    "position": rotary,
    "keeps": ("num_prefix_tokens", "rotate_half"),
    "held": frozenset({"qk"}),  # dimensions that turn together
    "readout_dropout": "proj_drop",
    "required": {"gate": None},
}
NATIVE = {"num_heads": "heads", "head_dim": "width", "attn_dim": "total", "scale": "scale"}


def _maps(places: Places, value_norm: str | None = None) -> AttentionMaps:
    """With norms on queries and keys, where a class has them."""
    return maps_at(places, "proj", query_norm="q_norm", key_norm="k_norm", value_norm=value_norm)


ATTENTIONS: dict[str, tuple[AttentionLayout, ...]] = {
    "timm.layers.attention.Attention": (
        AttentionLayout(
            maps=_maps(PACKED, "norm"),
            readout_dropout="proj_drop",
            native=NATIVE,
            required={"gate": None},
        ),
    ),
    "timm.layers.attention.AttentionRope": (
        AttentionLayout(maps=_maps(PACKED, "norm"), **ROTARY),
        AttentionLayout(maps=_maps(APART, "norm"), **ROTARY),
    ),
    "timm.models.eva.EvaAttention": (
        AttentionLayout(maps=_maps(BIASES_APART, "norm"), **ROTARY),
        AttentionLayout(maps=_maps(APART, "norm"), **ROTARY),
    ),
    "timm.models.beit.Attention": (
        AttentionLayout(
            maps=_maps(BIASES_APART),
            owned={"relative_position_bias_table": 1},
            position=table_of_positions,
            keeps=("relative_position_index",),
            readout_dropout="proj_drop",
        ),
    ),
    "timm.models.vision_transformer_relpos.RelPosAttention": (
        AttentionLayout(
            maps=_maps(PACKED),
            owned={"rel_pos.relative_position_bias_table": 1, "rel_pos.mlp.fc2.weight": 0, "rel_pos.mlp.fc2.bias": 0},
            position=module_of_positions,
            readout_dropout="proj_drop",
        ),
    ),
    "timm.models.vision_transformer_sam.Attention": (
        AttentionLayout(
            maps=_maps(PACKED),
            position=along_axes,
            held=frozenset({"qk"}),  # learnt vectors of distances are as wide
            readout_dropout="proj_drop",
            native={"num_heads": "heads", "head_dim": "width", "scale": "scale"},
            required={"rope": None},
        ),
    ),
    "timm.models.swin_transformer.WindowAttention": (
        AttentionLayout(
            maps=_maps(PACKED),
            owned={"relative_position_bias_table": 1},
            position=windows,
            keeps=("relative_position_index",),
            readout_dropout="proj_drop",
        ),
    ),
    "timm.models.swin_transformer_v2.WindowAttention": (
        AttentionLayout(
            maps=_maps(BIASES_APART),
            scale=None,
            owned={"logit_scale": 0, "cpb_mlp.2.weight": 0},
            position=partial(cosines, mlp="cpb_mlp"),
            held=frozenset({"qk"}),  # a cosine is of all dimensions
            keeps=("relative_coords_table", "relative_position_index"),
            readout_dropout="proj_drop",
        ),
    ),
}

MLP = FfnLayout(inputs=("fc1",), readout="fc2", norm="norm")
FFNS: dict[str, tuple[FfnLayout, ...]] = {
    "timm.layers.mlp.Mlp": (MLP,),
    "timm.layers.mlp.GluMlp": (FfnLayout(inputs=("fc1", "fc1"), readout="fc2", norm="norm"),),
    "timm.layers.mlp.SwiGLU": (FfnLayout(inputs=("fc1_g", "fc1_x"), readout="fc2", norm="norm"),),
}


def _block(gain: str | None = None, **more: Any) -> tuple[Layout, ...]:
    first, second = (None, None) if gain is None else (gain.format(1), gain.format(2))
    return (
        Layout(
            attention=Branch(module="attn", norm="norm1", gain=first),
            ffn=Branch(module="mlp", norm="norm2", gain=second),
            **more,
        ),
    )


AFTER = Layout(attention=Branch(module="attn", after="norm1"), ffn=Branch(module="mlp", after="norm2"))

BLOCKS: dict[str, tuple[Layout, ...]] = {
    "timm.models.vision_transformer.Block": _block("ls{}.gamma"),
    "timm.models.naflexvit.NaFlexBlock": _block("ls{}.gamma"),
    "timm.models.vision_transformer.ResPostBlock": (AFTER,),
    "timm.models.eva.EvaBlock": _block("gamma_{}"),
    "timm.models.eva.EvaBlockPostNorm": (AFTER,),
    "timm.models.beit.Block": _block("gamma_{}"),
    "timm.models.vision_transformer_relpos.RelPosBlock": _block("ls{}.gamma"),
    "timm.models.vision_transformer_relpos.ResPostRelPosBlock": (AFTER,),
    "timm.models.vision_transformer_sam.Block": _block("ls{}.gamma", windowed=True),
    "timm.models.swin_transformer.SwinTransformerBlock": _block(windowed=True),
    "timm.models.swin_transformer_v2.SwinTransformerV2Block": (replace(AFTER, windowed=True),),
}

KNOWN = Known(BLOCKS, ATTENTIONS, FFNS)
