"""Blocks of Hugging Face transformers: ViT and its kin, DINOv2, DINOv3, CLIP, SigLIP, BEiT, Swin."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gohsp.models.attention import Attended, AttentionLayout, maps_at, unmasked
from gohsp.models.families.layout import Branch, FfnLayout, Known, Layout
from gohsp.models.families.positions import along_axes, by_window, cosines


def rotary(_attn: Any, q: Tensor, k: Tensor, args: tuple[Any, ...], given: Mapping[str, Any]) -> Attended:
    """Queries and keys turned by their tokens' positions, those of prefix tokens left as they are."""
    cos, sin = given["position_embeddings"]

    def turned(x: Tensor) -> Tensor:
        prefix, patches = x.split((x.shape[-2] - sin.shape[-2], sin.shape[-2]), dim=-2)
        first, second = patches.chunk(2, dim=-1)
        return torch.cat((prefix, patches * cos + torch.cat((-second, first), dim=-1) * sin), dim=-2)

    return Attended(turned(q), turned(k), given.get("attention_mask", args[0] if args else None))


def windows(attn: Any, q: Tensor, k: Tensor, args: tuple[Any, ...], given: Mapping[str, Any]) -> Attended:
    """A learnt number for each head and distance; in shifted windows only neighbours see each other (Swin)."""
    mask = given.get("attention_mask", args[0] if args else None)
    return Attended(q, k, by_window(attn.relative_position_bias(), mask, q.shape[0]))


def _attention(readout: str, scale: str, heads: str, *, native: bool = True, **more: Any) -> AttentionLayout:
    """Maps apart, as all of the library's attentions have them since 2026; ``native`` if it holds any equal widths."""
    return AttentionLayout(
        maps=maps_at([(f"{x}_proj.weight", f"{x}_proj.bias") for x in "qkv"], readout),
        heads=heads,
        scale=scale,
        returns_pair=True,
        native={heads: "heads", "head_dim": "width", scale: "scale"} if native else {},
        **more,
    )


VIT = _attention("o_proj", "scaling", "num_attention_heads", dropout="attention_dropout")
VIT_4 = AttentionLayout(
    maps=maps_at([(f"attention.{x}.weight", f"attention.{x}.bias") for x in ("query", "key", "value")], "output.dense"),
    heads="attention.num_attention_heads",
    scale="attention.scaling",
    position=unmasked,
    dropout="attention.dropout_prob",
    readout_dropout=None,
    native={
        "attention.num_attention_heads": "heads",
        "attention.attention_head_size": "width",
        "attention.all_head_size": "total",
        "attention.scaling": "scale",
    },
)
"""The same of version 4."""

CLIP = _attention("out_proj", "scale", "num_heads", native=False, dropout="dropout")  # version 4 would not
DINOV3 = _attention("o_proj", "scaling", "num_heads", dropout="dropout", position=rotary, held=frozenset({"qk"}))
SWIN = _attention(
    "o_proj",
    "scaling",
    "num_attention_heads",
    dropout="attention_dropout",
    owned={"relative_position_bias.relative_position_bias_table": 1},
    position=windows,
)
SWIN_2 = AttentionLayout(
    maps=maps_at([(f"self.{x}.weight", f"self.{x}.bias") for x in ("query", "key", "value")], "output.dense"),
    heads="self.num_attention_heads",
    scale=None,
    held=frozenset({"qk"}),  # a cosine is of all dimensions
    owned={"self.logit_scale": 0, "self.continuous_position_bias_mlp.2.weight": 0},
    position=partial(cosines, mlp="continuous_position_bias_mlp", inside="self"),
    keeps=(
        "self.relative_coords_table",
        "self.relative_position_index",
        "self.continuous_position_bias_mlp",
    ),
    dropout="self.dropout",
    returns_pair=True,
)
SAM = AttentionLayout(
    maps=maps_at([("qkv.weight", "qkv.bias")] * 3, "proj"),
    heads="num_attention_heads",
    held=frozenset({"qk"}),  # learnt vectors of distances are as wide
    position=along_axes,
    dropout="dropout",
    returns_pair=True,
    native={"num_attention_heads": "heads", "scale": "scale"},
)

MLP = FfnLayout(inputs=("fc1",), readout="fc2")
GATED = FfnLayout(inputs=("gate_proj", "up_proj"), readout="down_proj")
PACKED = FfnLayout(inputs=("weights_in", "weights_in"), readout="weights_out")  # of version 4
LIN = FfnLayout(inputs=("lin1",), readout="lin2")
UP_DOWN = FfnLayout(inputs=("up_proj",), readout="down_proj")

LAYERS = {
    "ViTLayer": "vit",
    "DeiTLayer": "deit",
    "IJepaLayer": "ijepa",
    "ViTMSNLayer": "vit_msn",
    "BeitLayer": "beit",
    "Dinov2Layer": "dinov2",
    "Dinov2WithRegistersLayer": "dinov2_with_registers",
    "DINOv3ViTLayer": "dinov3_vit",
    "CLIPEncoderLayer": "clip",
    "SiglipEncoderLayer": "siglip",
    "Siglip2EncoderLayer": "siglip2",
    "SwinLayer": "swin",
    "MetaClip2EncoderLayer": "metaclip_2",
    "DPTViTLayer": "dpt",
    "Swinv2Layer": "swinv2",
    "SamVisionLayer": "sam",
    "SamHQVisionLayer": "sam_hq",
}
"""Where the library keeps a class of blocks."""


def _tail(layer: str) -> str:
    return "Encoder" if layer.endswith("EncoderLayer") else ""


def _name(layer: str, part: str) -> str:
    """Full name of the class that is a layer's ``part``."""
    folder = LAYERS[layer]
    prefix = layer.removesuffix("Layer").removesuffix("Encoder")
    return f"transformers.models.{folder}.modeling_{folder}.{prefix}{part}"


def _block(
    norms: tuple[str, str],
    gains: tuple[str | None, str | None] = (None, None),
    attention: str = "attention",
    owned: Mapping[str, int] | None = None,
    **more: Any,
) -> Layout:
    return Layout(
        attention=Branch(module=attention, norm=norms[0], gain=gains[0], owned=owned or {}),
        ffn=Branch(module="mlp", norm=norms[1], gain=gains[1]),
        **more,
    )


BEFORE_AFTER, NUMBERED = ("layernorm_before", "layernorm_after"), ("norm1", "norm2")
SCALED = ("layer_scale1.lambda1", "layer_scale2.lambda1")
VIT_BLOCK = _block(BEFORE_AFTER)
DENSE = FfnLayout(inputs=("intermediate.dense",), readout="output.dense")
VIT_4_BLOCK = Layout(
    attention=Branch(module="attention", norm="layernorm_before"),
    ffn=Branch(module=None, norm="layernorm_after", layout=DENSE),
)
SWIN_2_BLOCK = Layout(
    attention=Branch(module="attention", after="layernorm_before"),
    ffn=Branch(module=None, after="layernorm_after", layout=DENSE),
    windowed=True,
    returns_tuple=True,
)
BEIT_BLOCK = _block(
    BEFORE_AFTER, ("lambda_1", "lambda_2"), owned={"relative_position_bias.relative_position_bias_table": 1}
)
DINO_BLOCK = _block(NUMBERED, SCALED)
CLIP_BLOCK = _block(("layer_norm1", "layer_norm2"), attention="self_attn")
SAM_BLOCK = _block(("layer_norm1", "layer_norm2"), attention="attn", windowed=True)
SWIN_BLOCK = _block(BEFORE_AFTER, windowed=True, returns_tuple=True)

KINDS: dict[str, tuple[Layout, AttentionLayout]] = {
    **dict.fromkeys(("ViTLayer", "DeiTLayer", "IJepaLayer", "ViTMSNLayer"), (VIT_BLOCK, VIT)),
    "BeitLayer": (BEIT_BLOCK, VIT),
    **dict.fromkeys(("Dinov2Layer", "Dinov2WithRegistersLayer"), (DINO_BLOCK, VIT)),
    "DINOv3ViTLayer": (DINO_BLOCK, DINOV3),
    **dict.fromkeys(
        ("CLIPEncoderLayer", "MetaClip2EncoderLayer", "SiglipEncoderLayer", "Siglip2EncoderLayer"), (CLIP_BLOCK, CLIP)
    ),
    "DPTViTLayer": (VIT_4_BLOCK, VIT_4),
    "SwinLayer": (SWIN_BLOCK, SWIN),
    "Swinv2Layer": (SWIN_2_BLOCK, SWIN_2),
    **dict.fromkeys(("SamVisionLayer", "SamHQVisionLayer"), (SAM_BLOCK, SAM)),
}

KNOWN = Known(
    blocks={
        _name(layer, f"{_tail(layer)}Layer"): (block, VIT_4_BLOCK) if block is VIT_BLOCK else (block,)
        for layer, (block, _) in KINDS.items()
    },
    attentions={
        _name(layer, "Attention"): (attention, VIT_4) if attention is VIT else (attention,)
        for layer, (_, attention) in KINDS.items()
    }
    | {_name(layer, "SdpaAttention"): (SAM,) for layer in ("SamVisionLayer", "SamHQVisionLayer")},
    ffns={_name(layer, "MLP"): (UP_DOWN if layer == "DINOv3ViTLayer" else MLP,) for layer in KINDS}
    | {_name(layer, "SwiGLUFFN"): (GATED, PACKED) for layer in ("Dinov2Layer", "Dinov2WithRegistersLayer")}
    | {_name("DINOv3ViTLayer", "GatedMLP"): (GATED,)}
    | {_name(layer, "MLPBlock").replace("Vision", ""): (LIN,) for layer in ("SamVisionLayer", "SamHQVisionLayer")},
)
