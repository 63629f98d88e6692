"""Blocks of facebookresearch's own code: DINOv2, and the image encoder of Segment Anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gohsp.models.attention import Attended, AttentionLayout, maps_at
from gohsp.models.families.layout import Branch, FfnLayout, Known, Layout
from gohsp.models.families.positions import along_axes


def biased(_attn: Any, q: Tensor, k: Tensor, args: tuple[Any, ...], given: Mapping[str, Any]) -> Attended:
    """Products as they are, with a bias as first argument or by name, if any."""
    return Attended(q, k, given.get("attn_bias", args[0] if args else None))


PACKED = maps_at([("qkv.weight", "qkv.bias")] * 3, "proj")
DINOV2 = AttentionLayout(maps=PACKED, position=biased, readout_dropout="proj_drop")
SAM = AttentionLayout(
    maps=PACKED,
    position=along_axes,
    held=frozenset({"qk"}),  # learnt vectors of distances are as wide
    dropout=None,
    native={"num_heads": "heads", "scale": "scale"},
)
GATED = FfnLayout(inputs=("w12", "w12"), readout="w3")

DINOV2_BLOCK = Layout(
    attention=Branch(module="attn", norm="norm1", gain="ls1.gamma"),
    ffn=Branch(module="mlp", norm="norm2", gain="ls2.gamma"),
)
SAM_BLOCK = Layout(attention=Branch(module="attn", norm="norm1"), ffn=Branch(module="mlp", norm="norm2"), windowed=True)

KNOWN = Known(
    blocks={
        **{f"dinov2.layers.block.{name}": (DINOV2_BLOCK,) for name in ("Block", "NestedTensorBlock")},
        "segment_anything.modeling.image_encoder.Block": (SAM_BLOCK,),
    },
    attentions={
        **{f"dinov2.layers.attention.{name}": (DINOV2,) for name in ("Attention", "MemEffAttention")},
        "segment_anything.modeling.image_encoder.Attention": (SAM,),
    },
    ffns={
        "dinov2.layers.mlp.Mlp": (FfnLayout(inputs=("fc1",), readout="fc2"),),
        **{f"dinov2.layers.swiglu_ffn.{name}": (GATED,) for name in ("SwiGLUFFN", "SwiGLUFFNFused")},
        "segment_anything.modeling.common.MLPBlock": (FfnLayout(inputs=("lin1",), readout="lin2"),),
    },
)
