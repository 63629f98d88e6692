"""PyTorch's own encoder layers, and blocks around ``nn.MultiheadAttention``: torchvision's and open_clip's.

That attention computes with its weights in one packed call, in which nothing can be watched, so ours takes its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gohsp.models.attention import Attended, AttentionLayout, maps_at
from gohsp.models.families.layout import Blocks, Branch, FfnLayout, Known, Layout


def masked(_attn: Any, q: Tensor, k: Tensor, _args: tuple[Any, ...], given: Mapping[str, Any]) -> Attended:
    """Masks in PyTorch's words, where True shuts a key off."""
    bias = None
    for mask, of_images in ((given.get("attn_mask"), False), (given.get("key_padding_mask"), True)):
        if mask is not None:
            mask = torch.where(mask, -torch.inf, 0.0).to(q) if mask.dtype == torch.bool else mask
            mask = mask[:, None, None] if of_images else mask
            bias = mask if bias is None else bias + mask
    return Attended(q, k, bias)


ATTENTIONS = {
    "torch.nn.modules.activation.MultiheadAttention": (
        AttentionLayout(
            maps=maps_at([("in_proj_weight", "in_proj_bias")] * 3, "out_proj"),
            scale=None,
            position=masked,
            dropout="dropout",
            returns_pair=True,
            opaque=True,
            required={"batch_first": True, "bias_k": None, "bias_v": None, "add_zero_attn": False},
            sets={"batch_first": True, "_qkv_same_embed_dim": False},  # so that no fused path passes it by
        ),
    ),
}

FFNS = {
    "torchvision.models.vision_transformer.MLPBlock": (FfnLayout(inputs=("0",), readout="3"),),
    "torchvision.ops.misc.MLP": (FfnLayout(inputs=("0",), readout="3"),),
    "torch.nn.modules.container.Sequential": (FfnLayout(inputs=("c_fc",), readout="c_proj"),),
}

LINEARS = FfnLayout(inputs=("linear1",), readout="linear2")

BLOCKS: Blocks = {
    "torchvision.models.vision_transformer.EncoderBlock": (
        Layout(
            attention=Branch(module="self_attention", norm="ln_1"),
            ffn=Branch(module="mlp", norm="ln_2"),
        ),
    ),
    "torch.nn.modules.transformer.TransformerEncoderLayer": (
        Layout(
            attention=Branch(module="self_attn", norm="norm1", looked_into=True),
            ffn=Branch(module=None, norm="norm2", layout=LINEARS),
            required={"norm_first": True},
        ),
        Layout(
            attention=Branch(module="self_attn", after="norm1", after_sum=True, looked_into=True),
            ffn=Branch(module=None, after="norm2", after_sum=True, layout=LINEARS),
            required={"norm_first": False},
        ),
    ),
    "open_clip.transformer.ResidualAttentionBlock": (
        Layout(
            attention=Branch(module="attn", norm="ln_1", gain="ls_1.gamma"),
            ffn=Branch(module="mlp", norm="ln_2", gain="ls_2.gamma"),
        ),
    ),
}

KNOWN = Known(BLOCKS, ATTENTIONS, FFNS)
