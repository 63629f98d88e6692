"""Measured time: whole models side by side, and sub-layers by width for latency budgets (``docs/oneshot.md``)."""

from __future__ import annotations

import copy
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import product

import numpy as np
import torch
from torch import Tensor, nn

from gohsp import models
from gohsp.config import LatencySettings
from gohsp.core.allocation import WidthSettings, allowed_widths, smallest
from gohsp.core.capture import Trunk, device_of, open_trunk
from gohsp.structure import (
    AttentionTimes,
    AttentionWidths,
    Ffn,
    FfnTimes,
    FfnWidths,
    Latency,
    Network,
    PresentSublayer,
    SublayerTimes,
    SublayerWidths,
    absent,
    width,
)

_GRID = {"head": 4, "qk": 5, "vo": 5, "ffn": 8}
"""Widths of each kind that sub-layers are timed at, evenly spread; attention is timed at all combinations."""


def interleaved(contestants: Sequence[Callable[[], object]], device: torch.device, rounds: int) -> list[float]:
    """Median time of each contestant in milliseconds; see :func:`turns`."""
    return [statistics.median(mine) for mine in turns(contestants, device, rounds)]


def turns(contestants: Sequence[Callable[[], object]], device: torch.device, rounds: int) -> list[list[float]]:
    """Times of each contestant in milliseconds; they take turns, so that drift of the machine hits all alike.

    The order is drawn anew in every round: what ran before leaves its data in the caches, which alone makes a few
    percent.

    Args:
        contestants: What to time; each is called twice to warm up.
        device: The device that they work on; it is waited for.
        rounds: Turns.

    Returns:
        Times ``[contestants][rounds]``.
    """
    times: list[list[float]] = [[] for _ in contestants]
    order = random.Random(0)
    for turn in range(rounds + 2):
        for place in order.sample(range(len(contestants)), len(contestants)):
            _wait(device)
            began = time.perf_counter()
            contestants[place]()
            _wait(device)
            if turn >= 2:
                times[place].append(1e3 * (time.perf_counter() - began))
    return times


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
    batch = batch_of(images, device, settings)
    timed = [copy.deepcopy(n).eval().to(_dtype(settings)) for n in networks]
    return interleaved([lambda n=n: n(batch) for n in timed], device, settings.rounds)


def batch_of(images: Tensor, device: torch.device, settings: LatencySettings) -> Tensor:
    """Images ``[B, C, H, W]``, at least one, repeated to the batch size, of the data type that is timed."""
    repeats = -(-settings.batch_size // len(images))
    batch = images.repeat(repeats, 1, 1, 1)[: settings.batch_size]
    return batch.to(device, _dtype(settings))


def _dtype(settings: LatencySettings) -> torch.dtype:
    return getattr(torch, settings.dtype)


@torch.no_grad()
def measure_times(
    model: nn.Module,
    network: Network,
    images: Tensor,
    widths: WidthSettings,
    settings: LatencySettings,
    advance: Callable[[], None] = lambda: None,
) -> Latency:
    """Time every distinct sub-layer over a grid of widths, and fit the sum to the whole network's time.

    A sub-layer is timed in its block, the others of which are absent, less the block with all of them absent. What it
    takes inside a network differs from what it takes alone. So three whole networks, the present one, the narrowest
    with all sub-layers and one between them with unequal query/key and value widths, give the scale, what is outside
    the sub-layers, and how much of a saving by equal widths there is left.

    Args:
        model: The model; left as it is.
        network: Its description.
        images: At least one image ``[B, C, H, W]``.
        widths: Allowed widths.
        settings: Batch, data type, rounds.
        advance: Called once per distinct sub-layer (and once for the whole networks), for progress.
    """
    trunk, alike = open_trunk(model, network, images), _alike(network)
    times: dict[str, SublayerTimes] = {}
    for subs in alike:
        of = _times_of(trunk, network, subs, images, widths, settings)
        times |= {sub.name: of for sub in subs}
        advance()
    narrow = smallest(network, replace(widths, depth=False))
    between = {sub.name: _halfway(sub, widths) for sub in network.present}
    networks = [network.widths, narrow, narrow | between]
    whole = compare([model, *(models.resized(model, of) for of in networks[1:])], images, settings)
    saved = [sum(times[name].saved(of) for name, of in net.items() if name in times) for net in networks]  # type: ignore[arg-type]
    summed = [sum(times[name](of) for name, of in net.items() if name in times) for net in networks]  # type: ignore[arg-type]
    outside, scale, left = fitted([a + b for a, b in zip(summed, saved, strict=True)], saved, whole)
    advance()
    return Latency(outside, scale, {name: _with_saving(of, left) for name, of in times.items()})


def _with_saving(times: SublayerTimes, left: float) -> SublayerTimes:
    return replace(times, saving=left * times.saving) if isinstance(times, AttentionTimes) else times


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


def distinct(network: Network) -> int:
    """How many sub-layers :func:`measure_times` times."""
    return len(_alike(network))


def _alike(network: Network) -> list[list[PresentSublayer]]:
    """Sub-layers in groups that take the same time, whatever their weights."""
    groups: dict[object, list[PresentSublayer]] = {}
    for sub in network.present:
        groups.setdefault((sub.widths, sub.tokens, sub.readout.size), []).append(sub)
    return list(groups.values())


def _times_of(
    trunk: Trunk,
    network: Network,
    subs: Sequence[PresentSublayer],
    images: Tensor,
    widths: WidthSettings,
    settings: LatencySettings,
) -> SublayerTimes:
    """Times of sub-layers that are alike, over a grid of widths."""
    sub, widths = subs[0], replace(widths, depth=False)
    allowed = {kind: allowed_widths(sub, kind, widths) for kind in sub.widths.kinds}
    grid = {kind: _grid(of, _GRID[kind]) for kind, of in allowed.items()}
    trials: list[SublayerWidths] = [absent(sub.widths)]
    if isinstance(sub, Ffn):
        trials += [FfnWidths(units=units) for units in grid["ffn"]]
    else:
        widest = AttentionWidths(heads=grid["head"][-1], qk=grid["qk"][-1], vo=grid["vo"][-1])
        trials += [widest] + [
            AttentionWidths(heads=heads, qk=_unequal(allowed["qk"], qk, vo), vo=vo)
            for heads, qk, vo in product(grid["head"], grid["qk"], grid["vo"])
        ]
    nothing, *found = _block_times(trunk, network, subs, trials, images, settings)
    table = np.array(found) - nothing
    if isinstance(sub, Ffn):
        return FfnTimes(units=grid["ffn"], times=tuple(np.maximum.accumulate(table).tolist()))
    own, times = table[0], table[1:].reshape([len(grid[kind]) for kind in ("head", "qk", "vo")])
    for axis in range(3):
        times = np.maximum.accumulate(times, axis)
    return AttentionTimes(
        heads=grid["head"],
        qk=grid["qk"],
        vo=grid["vo"],
        times=tuple(tuple(tuple(row) for row in plane) for plane in times.tolist()),
        saving=max(0.0, float(times[-1, -1, -1]) - float(own)) if grid["qk"][-1] == grid["vo"][-1] else 0.0,
    )


def _block_times(
    trunk: Trunk,
    network: Network,
    subs: Sequence[PresentSublayer],
    trials: Sequence[SublayerWidths],
    images: Tensor,
    settings: LatencySettings,
) -> list[float]:
    """Times of the sub-layers' blocks with nothing in them but one sub-layer of each of these widths."""
    device = device_of(trunk.model)
    batch = batch_of(images, device, replace(settings, dtype="float32"))
    blocks = list(network.blocks)
    contestants = []
    for name, trial in _resized_blocks(trunk, network, subs, trials):
        block, index = trial.to(_dtype(settings)).eval(), blocks.index(name)
        stream = trunk.enter(batch, index).to(_dtype(settings))
        contestants.append(lambda block=block, index=index, x=stream: trunk.sent(index, block, x))
    return interleaved(contestants, device, settings.rounds)


def _unequal(allowed: Sequence[int], qk: int, vo: int) -> int:
    """A query/key width next to ``qk`` that is not ``vo``: equal widths run in the library's own, faster class."""
    return min((w for w in allowed if w != vo), key=lambda w: (abs(w - qk), w), default=qk)


def _halfway(sub: PresentSublayer, settings: WidthSettings) -> SublayerWidths:
    """All heads, with widths in the middle of those allowed; query/key and value widths differ where they may."""
    settings = replace(settings, depth=False)
    if isinstance(sub, Ffn):
        units = allowed_widths(sub, "ffn", settings)
        return FfnWidths(units=units[len(units) // 2])
    qk, vo = (allowed_widths(sub, kind, settings) for kind in ("qk", "vo"))
    middle = vo[len(vo) // 2]
    return AttentionWidths(heads=width(sub.widths, "head"), qk=_unequal(qk, qk[len(qk) // 2], middle), vo=middle)


def _grid(allowed: Sequence[int], points: int) -> tuple[int, ...]:
    last = len(allowed) - 1
    return tuple(allowed[i] for i in sorted({round(last * p / (points - 1)) for p in range(points)}))


def _resized_blocks(
    trunk: Trunk, network: Network, subs: Sequence[PresentSublayer], trials: Sequence[SublayerWidths]
) -> Iterator[tuple[str, nn.Module]]:
    """Copies of the sub-layers' blocks, each with one sub-layer of other widths and no other; by the block's name."""
    for first in range(0, len(trials), len(subs)):
        wanted = dict(zip((sub.name for sub in subs), trials[first:], strict=False))
        alone: dict[str, SublayerWidths] = dict(network.widths)
        chosen = [sub for sub in subs if sub.name in wanted]
        for sub in chosen:
            alone |= {other.name: absent(other.widths) for other in network.blocks[sub.block]} | {
                sub.name: wanted[sub.name]
            }
        small = models.resized(trunk.model, alone)
        yield from ((sub.block, small.get_submodule(sub.block)) for sub in chosen)
