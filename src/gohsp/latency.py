"""Measured time: whole models side by side, and blocks by width for latency budgets (design, sections 4 and 8)."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from gohsp import models
from gohsp.core.allocation import WidthSettings, allowed_widths, smallest, smallest_block
from gohsp.settings import require_settings, whole
from gohsp.structure import KINDS, BlockShape, BlockStructure, BlockTimes, Kind, LatencyTable, ModelStructure

_GRID = {"head": 4, "qk": 5, "vo": 5, "ffn": 8}
"""Widths of each kind that blocks are timed at, evenly spread; attention is timed at all combinations."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LatencySettings:
    """How time is measured, always on the device that prunes.

    Attributes:
        batch_size: Images a batch.
        dtype: Data type of weights and images.
        rounds: How often each contestant is timed; the median counts.
    """

    batch_size: int = 1
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    rounds: int = 21

    def __post_init__(self) -> None:
        require_settings(self, "latency", batch_size=whole(1, 2**16), rounds=whole(1, 10_000))

    @property
    def torch_dtype(self) -> torch.dtype:
        """The data type itself."""
        return getattr(torch, self.dtype)


def interleaved(contestants: Sequence[Callable[[], object]], device: torch.device, rounds: int) -> list[float]:
    """Median time of each contestant in milliseconds; they take turns, so that drift of the machine hits all alike.

    Args:
        contestants: What to time; each is called twice to warm up.
        device: The device that they work on; it is waited for.
        rounds: Turns.
    """
    times: list[list[float]] = [[] for _ in contestants]
    for turn in range(rounds + 2):
        for mine, call in zip(times, contestants, strict=True):
            _wait(device)
            began = time.perf_counter()
            call()
            _wait(device)
            if turn >= 2:
                mine.append(1e3 * (time.perf_counter() - began))
    return [statistics.median(mine) for mine in times]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


@torch.no_grad()
def compare(networks: Sequence[nn.Module], images: Tensor, settings: LatencySettings) -> list[float]:
    """Median milliseconds that each model takes for a batch, interleaved.

    Args:
        networks: Models on one device; left as they are.
        images: At least one image ``[B, C, H, W]``; repeated to the batch size.
        settings: Batch, data type, rounds.
    """
    device = next(networks[0].parameters()).device
    batch = _batch(images, device, settings)
    timed = [copy.deepcopy(n).eval().to(settings.torch_dtype) for n in networks]
    return interleaved([lambda n=n: n(batch) for n in timed], device, settings.rounds)


def _batch(images: Tensor, device: torch.device, settings: LatencySettings) -> Tensor:
    repeats = -(-settings.batch_size // len(images))
    batch = images.repeat(repeats, 1, 1, 1)[: settings.batch_size]
    return batch.to(device, settings.torch_dtype)


@torch.no_grad()
def measure_table(
    model: nn.Module,
    structure: ModelStructure,
    images: Tensor,
    widths: WidthSettings,
    settings: LatencySettings,
    advance: Callable[[], None] = lambda: None,
) -> LatencyTable:
    """Time every distinct block over a grid of widths, and fit the sum to the whole network's time.

    A block is timed with one half at its smallest and the other over the grid. What a block takes inside a network
    differs from what it takes alone. So three whole networks, the present one, the smallest possible and one between
    them with unequal query/key and value widths, give the scale, what is outside the blocks, and how much of a saving
    by equal widths there is left.

    Args:
        model: The model; left as it is.
        structure: Its structure.
        images: At least one image ``[B, C, H, W]``.
        widths: Allowed widths.
        settings: Batch, data type, rounds.
        advance: Called once per distinct block (and once for the whole networks), for progress.
    """
    blocks = {}
    for block in {b.shape: b for b in structure.blocks}.values():
        blocks[block.shape] = _block_times(model, structure, block, images, widths, settings)
        advance()
    halfway = [_halfway(block, widths) for block in structure.blocks]
    networks = [structure.shapes, smallest(structure, widths), halfway]
    times = compare([model, *(models.resized(model, shapes) for shapes in networks[1:])], images, settings)
    saved = [sum(blocks[b.shape].saved(s) for b, s in zip(structure.blocks, of, strict=True)) for of in networks]
    gross = [
        sum(blocks[b.shape](s) for b, s in zip(structure.blocks, of, strict=True)) + less
        for of, less in zip(networks, saved, strict=True)
    ]
    fixed, scale, left = fitted(gross, saved, times)
    advance()
    return LatencyTable(fixed, scale, {of: replace(block, saving=left * block.saving) for of, block in blocks.items()})


def fitted(gross: Sequence[float], saved: Sequence[float], times: Sequence[float]) -> tuple[float, float, float]:
    """Fit ``times = fixed + scale (gross - left saved)`` by least squares.

    Args:
        gross: Summed times of each network's blocks, timed alone, without savings.
        saved: What its blocks save.
        times: What each network takes.

    Returns:
        ``(fixed, scale, left)``, the latter two at least 0; ``left`` is 1 where the networks do not tell it.
    """
    ones, gross_, saved_ = np.ones(len(times)), np.array(gross), np.array(saved)
    (fixed, scale, less), _, rank, _ = np.linalg.lstsq(np.stack([ones, gross_, -saved_], axis=1), times)
    if rank == 3 and scale > 0 and less >= 0:
        return float(fixed), float(scale), float(less / scale)
    fixed, scale = np.linalg.lstsq(np.stack([ones, gross_ - saved_], axis=1), times)[0]
    return (float(fixed), float(scale), 1.0) if scale >= 0 else (float(np.mean(times)), 0.0, 1.0)


def distinct_blocks(structure: ModelStructure) -> int:
    """How many blocks :func:`measure_table` times."""
    return len(set(structure.shapes))


def _block_times(
    model: nn.Module,
    structure: ModelStructure,
    block: BlockStructure,
    images: Tensor,
    widths: WidthSettings,
    settings: LatencySettings,
) -> BlockTimes:
    device, least = next(model.parameters()).device, smallest_block(block, widths)
    allowed: dict[Kind, tuple[int, ...]] = {kind: allowed_widths(block, kind, widths) for kind in KINDS}
    grid = {kind: _grid(allowed[kind], _GRID[kind]) for kind in KINDS}

    attention = [
        replace(least, heads=h, qk=_unequal(allowed["qk"], q, v), vo=v)
        for h, q, v in product(grid["head"], grid["qk"], grid["vo"])
    ]
    widest = replace(least, heads=grid["head"][-1], qk=grid["qk"][-1], vo=grid["vo"][-1])
    shapes = [least, widest, *attention, *(replace(least, ffn=n) for n in grid["ffn"])]
    stream = models.stages(model).embed(_batch(images, device, replace(settings, dtype="float32")))
    stream = stream.to(settings.torch_dtype)
    trials = [b.to(settings.torch_dtype) for b in _resized_blocks(model, structure, block.shape, shapes)]
    both, own, *times = interleaved([lambda b=b: b(stream) for b in trials], device, settings.rounds)
    shape = tuple(len(grid[kind]) for kind in ("head", "qk", "vo"))
    table = np.array(times[: len(attention)]).reshape(shape) - both / 2
    hidden = np.array(times[len(attention) :]) - both / 2
    for axis in range(3):
        table = np.maximum.accumulate(table, axis)
    return BlockTimes(
        heads=grid["head"],
        qk=grid["qk"],
        vo=grid["vo"],
        attention=tuple(tuple(tuple(row) for row in plane) for plane in table.tolist()),
        saving=max(0.0, float(table[-1, -1, -1]) + both / 2 - own) if widest.qk == widest.vo else 0.0,
        ffn=grid["ffn"],
        hidden=tuple(np.maximum.accumulate(hidden).tolist()),
    )


def _unequal(allowed: Sequence[int], qk: int, vo: int) -> int:
    """A query/key width next to ``qk`` that is not ``vo``: equal widths run in the library's own, faster class."""
    return min((w for w in allowed if w != vo), key=lambda w: (abs(w - qk), w), default=qk)


def _halfway(block: BlockStructure, widths: WidthSettings) -> BlockShape:
    """All heads, with widths in the middle of those allowed; query/key and value widths differ where they may."""
    qk, vo, ffn = (allowed_widths(block, kind, widths) for kind in ("qk", "vo", "ffn"))
    middle = vo[len(vo) // 2]
    return BlockShape(
        heads=block.shape.heads, qk=_unequal(qk, qk[len(qk) // 2], middle), vo=middle, ffn=ffn[len(ffn) // 2]
    )


def _grid(allowed: Sequence[int], points: int) -> tuple[int, ...]:
    last = len(allowed) - 1
    return tuple(allowed[i] for i in sorted({round(last * p / (points - 1)) for p in range(points)}))


def _resized_blocks(
    model: nn.Module, structure: ModelStructure, have: BlockShape, shapes: Sequence[BlockShape]
) -> Iterator[nn.Module]:
    """Copies of a block of shape ``have`` with other widths; its time does not depend on what its weights are."""
    alike = [i for i, b in enumerate(structure.blocks) if b.shape == have]
    for first in range(0, len(shapes), len(alike)):
        trial, wanted = list(structure.shapes), dict(zip(alike, shapes[first:], strict=False))
        for i, shape in wanted.items():
            trial[i] = shape
        blocks = models.stages(models.resized(model, trial)).blocks
        yield from (blocks[i].eval() for i in wanted)
