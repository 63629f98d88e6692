"""A few held-out images for the report: where heads look, and outputs that are maps, before and after."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageColor
from torch import Tensor, nn

from gohsp import data, report
from gohsp.core.capture import attention_rows, autocast, evaluating
from gohsp.core.gradients import Gradients, differentiated
from gohsp.core.ranking import HeadRanking
from gohsp.runtime import fast_attention
from gohsp.session import Session
from gohsp.structure import Attention, Kept, Network

ATTENTIONS, HEADS = 3, 3
"""Attentions that are shown, and of each how many heads that went and that stayed."""

QUERIES = 64
"""Tokens over which attention is averaged, at most."""

SIDE = 128
"""Pixels of the longer side of a picture."""

PREFIX = 16
"""Most tokens that stand in front of the patches."""


def samples(
    session: Session, dense: nn.Module, small: nn.Module, network: Network, ranking: HeadRanking, kept: Kept
) -> report.Samples | None:
    """Look at the first held-out images.

    Args:
        session: Its settings say how many.
        dense: The dense model.
        small: The pruned model.
        network: Description of the dense model.
        ranking: Scores of its heads.
        kept: The units that stayed.

    Returns:
        What the report shows; None where it is to show no image.
    """
    count = session.config.data.shown
    images = torch.cat([batch[:count] for batch in session.calibration.holdout])[:count]
    if not len(images):
        return None
    outputs = [session.outputs(model, [images])[0] for model in (dense, small)]
    before, after = _maps(*outputs) if _are_maps(outputs[0], images) else ((), ())
    return report.Samples(
        images=tuple(map(_picture, _pixels(dense, images))),
        heads=_looks(session, dense, network, _chosen(network, ranking, kept), images),
        before=before,
        after=after,
    )


def _pixels(model: nn.Module, images: Tensor) -> list[Image.Image]:
    """Preprocessed images as they were before the normalisation."""
    preprocessing = data.Preprocessing.from_model(model)
    mean, std = (torch.tensor(of).view(-1, 1, 1) for of in (preprocessing.mean, preprocessing.std))
    pixels = ((images.cpu().float() * std + mean).clamp(0, 1) * 255).round().byte().movedim(1, -1).numpy()
    return [Image.fromarray(of.squeeze(-1) if of.shape[-1] == 1 else of).convert("RGB") for of in pixels]


def _picture(image: Image.Image, *, exact: bool = False) -> str:
    """A picture as text; what is large is made smaller."""
    image = image.copy()
    image.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    image.save(file, "webp", quality=80, lossless=exact or max(image.size) < SIDE // 2)
    return base64.b64encode(file.getvalue()).decode()


# Where heads look


def _chosen(network: Network, ranking: HeadRanking, kept: Kept) -> list[tuple[Attention, list[int]]]:
    """Attentions that lost heads, spread over depth: the weakest that went, then the strongest that stayed."""
    stay = {sub.name: kept[sub.name].heads for sub in network.attentions}  # type: ignore[union-attr]
    whole = [sub for sub in network.attentions if sub.order is None and sub.keys == sub.tokens]  # no windows
    lost = [sub for sub in whole if len(stay[sub.name]) < sub.widths.heads]
    spread = sorted({round(at) for at in np.linspace(0, len(lost) - 1, ATTENTIONS)}) if lost else []
    chosen = []
    for sub in (lost[index] for index in spread):
        best = ranking.order(sub.name)
        gone = [head for head in reversed(best) if head not in stay[sub.name]]
        chosen.append((sub, gone[:HEADS] + [head for head in best if head in stay[sub.name]][:HEADS]))
    return chosen


def _looks(
    session: Session, model: nn.Module, network: Network, chosen: Sequence[tuple[Attention, list[int]]], images: Tensor
) -> tuple[report.HeadMaps, ...]:
    """What heads look at in images, as veils; attentions whose tokens are no grid are left out."""
    found: list[report.HeadMaps] = []
    if not chosen:
        return ()
    with torch.no_grad(), evaluating(model), fast_attention(session.precision, model):
        (seen,) = differentiated(model, network, session.objective, [images], draws=0, precision=session.precision)
        for sub, heads in chosen:
            grid = _grid(sub.tokens, images.shape[-2], images.shape[-1])
            if grid is None:
                continue
            looks = _attended(session, model, sub, seen, grid)
            found += [
                report.HeadMaps(attention=sub.name, head=head, maps=tuple(map(_veil, looks[:, head]))) for head in heads
            ]
    return tuple(found)


def _attended(session: Session, model: nn.Module, sub: Attention, seen: Gradients, grid: tuple[int, int]) -> Tensor:
    """Attention to each patch ``[images, heads, rows, columns]``: the first token's, or the mean of some patches'."""
    inputs, prefix = seen.inputs[sub.name], sub.tokens - math.prod(grid)
    queries = torch.arange(1 if prefix else sub.tokens, device=inputs.device)[:: -(-sub.tokens // QUERIES)]
    with autocast(inputs.device, session.precision):
        rows = attention_rows(model, sub, inputs, seen.calls[sub.name], queries)
    return rows.mean(dim=2)[..., prefix:].unflatten(-1, grid).cpu()


def _grid(tokens: int, height: int, width: int) -> tuple[int, int] | None:
    """Rows and columns of square patches behind a few prefix tokens; None where there are no such."""
    side = math.ceil(math.sqrt(height * width / tokens))
    rows, columns = height // side, width // side
    return (rows, columns) if rows * columns <= tokens <= rows * columns + PREFIX else None


def _veil(look: Tensor) -> str:
    """Darkness to lay over an image: none where attention is largest."""
    light = (look / look.max()).sqrt().numpy()
    alpha = Image.fromarray(((1 - light) * 230).round().astype(np.uint8))
    veil = Image.new("RGBA", alpha.size)
    veil.putalpha(alpha)
    return _picture(veil, exact=True)


# Outputs that are maps


def _are_maps(outputs: Tensor, images: Tensor) -> bool:
    """Whether outputs lie over their images: all of it, or channels of a quarter of its side or more."""
    (height, width), size = images.shape[-2:], outputs.shape[-2:]
    if outputs.ndim == 3:
        return size == (height, width)
    return outputs.ndim == 4 and 4 * size[0] >= height and size[0] * width == size[1] * height


def _maps(before: Tensor, after: Tensor) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Outputs of two models in the same colours: grey levels, or of several channels the strongest."""
    pairs = [
        (a.reshape(-1, *a.shape[-2:]).cpu(), b.reshape(-1, *b.shape[-2:]).cpu())
        for a, b in zip(before, after, strict=True)
    ]
    drawn = [_classes(a, b) if len(a) > 1 else _greys(a[0], b[0]) for a, b in pairs]
    return tuple(a for a, _ in drawn), tuple(b for _, b in drawn)


def _greys(before: Tensor, after: Tensor) -> tuple[str, str]:
    low, high = before.min(), before.max()
    levels = [
        ((of - low) / (high - low).clamp_min(1e-12)).clamp(0, 1).mul(255).round().byte().numpy()
        for of in (before, after)
    ]
    return _picture(Image.fromarray(levels[0])), _picture(Image.fromarray(levels[1]))


def _classes(before: Tensor, after: Tensor) -> tuple[str, str]:
    hues = [ImageColor.getrgb(f"hsl({137.5 * index % 360:.0f}, 60%, 55%)") for index in range(len(before))]
    palette = np.array(hues, dtype=np.uint8)
    pictures = [Image.fromarray(palette[of.argmax(0).numpy()]) for of in (before, after)]
    return _picture(pictures[0], exact=True), _picture(pictures[1], exact=True)
