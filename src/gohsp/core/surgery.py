"""Carrying a cut out on tensors: masking in place, and cutting a state dict."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from gohsp.core.capture import readout_gain, units
from gohsp.structure import (
    Attention,
    AttentionKept,
    Kept,
    Network,
    PresentSublayer,
    SublayerKept,
    UnitSlice,
    check_kept,
    is_absent,
    unit_count,
)


def _unit_slices(sub: PresentSublayer, kept: SublayerKept) -> Iterator[tuple[UnitSlice, int, list[int], float]]:
    """Every coupled slice with its unit count, its kept units and the factor that keeps the attention's scale."""
    for kind in sub.widths.unit_kinds:
        for entry in sub.slices(kind):
            factor = 1.0
            if isinstance(sub, Attention) and isinstance(kept, AttentionKept):
                # Every attention scales by width^-1/2; the scale is part of the function, so queries absorb the change.
                absorbs = entry in sub.query.slices and sub.query_norm is None
                factor = sub.scale * kept.widths.qk**0.5 if absorbs else 1.0
            yield entry, unit_count(sub.widths, kind), kept.flat(kind, sub.widths), factor
    if isinstance(sub, Attention) and isinstance(kept, AttentionKept):
        for entry in sub.owned:
            yield entry, sub.widths.heads, list(kept.heads), 1.0


def mask(model: nn.Module, network: Network, kept: Kept) -> None:
    """Zero every unit that ``kept`` leaves out, in place; the shapes stay.

    Raises:
        PlanError: The cut does not fit the network.
    """
    check_kept(network, kept)
    for sub in network.present:
        for entry, count, stays, _ in _unit_slices(sub, kept[sub.name]):
            view = units(model, entry, count)
            gone = torch.ones(count, dtype=torch.bool, device=view.device)
            gone[stays] = False
            view.index_fill_(entry.axis, gone.nonzero().flatten(), 0.0)


def cut_state(model: nn.Module, network: Network, kept: Kept) -> dict[str, Tensor]:
    """State dict of the compacted model: kept units only, everything else as it is.

    Of a sub-layer that goes altogether the vector is left that its readout still writes, ``NAME.bias``.

    Raises:
        PlanError: The cut does not fit the network.
    """
    check_kept(network, kept)
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    pieces: dict[tuple[str, int], list[tuple[int, Tensor]]] = defaultdict(list)
    for sub in network.present:
        if is_absent(kept[sub.name].widths):
            state = _without(state, model, sub)
            continue
        for entry, count, stays, factor in _unit_slices(sub, kept[sub.name]):
            view = state[entry.parameter].narrow(entry.axis, entry.start, count)
            piece = view.index_select(entry.axis, torch.tensor(stays, device=view.device))
            pieces[entry.parameter, entry.axis].append((entry.start, piece if factor == 1.0 else piece * factor))
    for (name, axis), parts in pieces.items():
        state[name] = torch.cat([piece for _, piece in sorted(parts, key=lambda part: part[0])], dim=axis)
    return {name: tensor.clone() for name, tensor in state.items()}


def _without(state: dict[str, Tensor], model: nn.Module, sub: PresentSublayer) -> dict[str, Tensor]:
    """``state`` with a sub-layer, its norm and its LayerScale replaced by one vector."""
    readout = sub.readout
    weight = state[readout.columns.parameter]
    vector = weight.new_zeros(readout.size) if readout.bias is None else state[readout.bias]
    gain = readout_gain(model, readout)
    if gain is not None:
        vector = vector * gain
    gone = tuple(f"{name}." for name in (sub.name, sub.norm) if name)
    left = {name: tensor for name, tensor in state.items() if not name.startswith(gone) and name != readout.gain}
    return left | {f"{sub.name}.bias": vector}
