"""torchvision's Swin, whose attention is one function: it pads, shifts and cuts the grid into windows by itself.

Nothing can be watched in that function, so our attention takes its place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gohsp.models.attention import Attended, AttentionLayout, Windows, maps_at
from gohsp.models.families.layout import Branch, Known, Layout
from gohsp.models.families.positions import by_window, cosines, looked_up

SHUT = -100.0
"""What is added to the products of places that a shift has brought together."""


def shifted(attn: Any, x: Tensor) -> Windows:
    """A grid ``[B, H, W, D]``, padded and shifted in a circle, as windows."""
    window, (height, width) = (attn.window_size[0], attn.window_size[1]), x.shape[1:3]
    x = F.pad(x, (0, 0, 0, -width % window[1], 0, -height % window[0]))
    size = x.shape[1:3]
    shift = [by if side < of else 0 for by, side, of in zip(attn.shift_size, window, size, strict=True)]
    if any(shift):
        x = x.roll([-by for by in shift], (1, 2))

    def back(rows: Tensor) -> Tensor:
        places = rows.unflatten(0, (-1, size[0] // window[0], size[1] // window[1])).unflatten(3, window)
        grid = places.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        if any(shift):
            grid = grid.roll(shift, (1, 2))
        return grid[:, :height, :width].contiguous()

    return Windows(_cut(x, window), _mask(size, window, shift, x), back)


def _cut(x: Tensor, window: tuple[int, int]) -> Tensor:
    """The windows of a grid ``[B, H, W, D]``, of each image row by row ``[windows, places, D]``."""
    rows = x.unflatten(2, (-1, window[1])).unflatten(1, (-1, window[0]))
    return rows.transpose(2, 3).flatten(0, 2).flatten(1, 2)


def _mask(size: Sequence[int], window: tuple[int, int], shift: Sequence[int], like: Tensor) -> Tensor | None:
    """What keeps those apart in a window that are no neighbours in the image ``[windows, queries, keys]``."""
    if not any(shift):
        return None
    bands = []
    for length, side, by in zip(size, window, shift, strict=True):
        at = torch.arange(length, device=like.device)
        bands.append(((at >= length - side).int() + (at >= length - by).int()) * bool(by))
    regions = _cut((3 * bands[0][:, None] + bands[1])[None, :, :, None], window).flatten(1)
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
