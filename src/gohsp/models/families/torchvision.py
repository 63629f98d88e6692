"""torchvision's Swin, whose attention is one function: it pads, shifts and cuts the grid into windows by itself.

Nothing can be watched in that function, so our attention takes its place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import window_partition, window_reverse
from torch import Tensor

from gohsp.models.attention import Attended, AttentionLayout, Windows, maps_at
from gohsp.models.families.layout import Branch, Known, Layout
from gohsp.models.families.positions import by_window, cosines, looked_up

SHUT = -100.0
"""What is added to the products of places that a shift has brought together."""


def shifted(attn: Any, x: Tensor) -> Windows:
    """A grid ``[B, H, W, D]``, padded and shifted in a circle, as windows."""
    window, (height, width) = tuple(attn.window_size), x.shape[1:3]
    x = F.pad(x, (0, 0, 0, -width % window[1], 0, -height % window[0]))
    size = x.shape[1:3]
    shift = [by if side < of else 0 for by, side, of in zip(attn.shift_size, window, size, strict=True)]
    if any(shift):
        x = x.roll([-by for by in shift], (1, 2))

    def back(rows: Tensor) -> Tensor:
        grid = window_reverse(rows.unflatten(1, window), window, *size)
        if any(shift):
            grid = grid.roll(shift, (1, 2))
        return grid[:, :height, :width].contiguous()

    return Windows(window_partition(x, window).flatten(1, 2), _mask(size, window, shift, x), back)


def _mask(size: Sequence[int], window: tuple[int, int], shift: Sequence[int], like: Tensor) -> Tensor | None:
    """What keeps those apart in a window that are no neighbours in the image ``[windows, queries, keys]``."""
    if not any(shift):
        return None
    bands = []
    for length, side, by in zip(size, window, shift, strict=True):
        at = torch.arange(length, device=like.device)
        bands.append(((at >= length - side).int() + (at >= length - by).int()) * bool(by))
    regions = window_partition((3 * bands[0][:, None] + bands[1])[None, :, :, None], window).flatten(1)
    return torch.where(regions[:, None] == regions[:, :, None], 0.0, SHUT).to(like.dtype)


def by_table(attn: Any, q: Tensor, k: Tensor, _args: tuple[Any, ...], given: Mapping[str, Any]) -> Attended:
    """A learnt number for each head and distance."""
    bias = looked_up(attn.relative_position_bias_table, attn.relative_position_index)
    return Attended(q, k, by_window(bias, given["mask"], q.shape[0]))


def by_cosine(attn: Any, q: Tensor, k: Tensor, args: tuple[Any, ...], given: Mapping[str, Any]) -> Attended:
    """As in any Swin v2; the keys' part of the bias is there, and the library leaves it out."""
    if (bias := attn.qkv.bias) is not None:
        heads, width = q.shape[1], q.shape[-1]
        k = k - bias[heads * width : 2 * heads * width].view(heads, 1, width)
    return cosines(attn, q, k, args, given, mlp="cpb_mlp")


KEPT = ("window_size", "shift_size", "relative_position_index")
COMMON: dict[str, Any] = {
    "maps": maps_at([("qkv.weight", "qkv.bias")] * 3, "proj"),
    "scale": None,
    "windows": shifted,
    "dropout": "attention_dropout",
    "opaque": True,
    "required": {"dropout": 0.0},
}
SWIN = AttentionLayout(**COMMON, owned={"relative_position_bias_table": 1}, position=by_table, keeps=KEPT)
SWIN_2 = AttentionLayout(
    **COMMON,
    owned={"logit_scale": 0, "cpb_mlp.2.weight": 0},
    position=by_cosine,
    held=frozenset({"qk"}),  # a cosine is of all dimensions
    keeps=(*KEPT, "relative_coords_table"),
)

BEFORE = Layout(attention=Branch(module="attn", norm="norm1"), ffn=Branch(module="mlp", norm="norm2"), windowed=True)
AFTER = Layout(attention=Branch(module="attn", after="norm1"), ffn=Branch(module="mlp", after="norm2"), windowed=True)

PREFIX = "torchvision.models.swin_transformer."
KNOWN = Known(
    blocks={f"{PREFIX}SwinTransformerBlock": (BEFORE,), f"{PREFIX}SwinTransformerBlockV2": (AFTER,)},
    attentions={f"{PREFIX}ShiftedWindowAttention": (SWIN,), f"{PREFIX}ShiftedWindowAttentionV2": (SWIN_2,)},
    ffns={},  # one of torchvision's FFNs, which stand beside its other blocks
)
