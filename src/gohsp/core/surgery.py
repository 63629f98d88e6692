"""Carrying a plan out on tensors: masking in place, and cutting a state dict (design, section 2)."""

from __future__ import annotations

from collections import defaultdict
from typing import Literal

import torch
from torch import Tensor, nn

from gohsp.core.activations import units
from gohsp.structure import ModelStructure, Plan, UnitSlice, check_plan

_UNIT_KINDS: tuple[Literal["qk", "vo", "ffn"], ...] = ("qk", "vo", "ffn")


def _unit_slices(structure: ModelStructure, plan: Plan) -> list[tuple[UnitSlice, int, list[int], float]]:
    """Every coupled slice with its unit count, its kept units and the factor that keeps the attention's scale."""
    entries = []
    for block, kept in zip(structure.blocks, plan.blocks, strict=True):
        shape = block.shape
        counts = {"qk": shape.heads * shape.qk, "vo": shape.heads * shape.vo, "ffn": shape.ffn}
        # Every attention scales by width^-1/2; the scale is part of the function, so queries absorb the change.
        scale = block.scale * kept.shape.qk**0.5
        for kind in _UNIT_KINDS:
            for entry in block.slices(kind):
                factor = scale if entry in block.query and block.query_norm is None else 1.0
                entries.append((entry, counts[kind], kept.units(kind, shape), factor))
    return entries


def mask(model: nn.Module, structure: ModelStructure, plan: Plan) -> None:
    """Zero every unit that ``plan`` removes, in place; the shapes stay.

    Raises:
        PlanError: The plan does not fit the structure.
    """
    check_plan(structure, plan)
    for entry, count, kept, _ in _unit_slices(structure, plan):
        view = units(model, entry, count)
        gone = torch.ones(count, dtype=torch.bool, device=view.device)
        gone[kept] = False
        view.index_fill_(entry.axis, gone.nonzero().flatten(), 0.0)


def cut_state(model: nn.Module, structure: ModelStructure, plan: Plan) -> dict[str, Tensor]:
    """State dict of the compacted model: kept units only, everything else as it is.

    Raises:
        PlanError: The plan does not fit the structure.
    """
    check_plan(structure, plan)
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    pieces: dict[tuple[str, int], list[tuple[int, Tensor]]] = defaultdict(list)
    for entry, count, kept, factor in _unit_slices(structure, plan):
        view = state[entry.parameter].narrow(entry.axis, entry.start, count)
        piece = view.index_select(entry.axis, torch.tensor(kept, device=view.device))
        pieces[entry.parameter, entry.axis].append((entry.start, piece if factor == 1.0 else piece * factor))
    for (name, axis), parts in pieces.items():
        state[name] = torch.cat([piece for _, piece in sorted(parts, key=lambda part: part[0])], dim=axis)
    return {name: tensor.clone() for name, tensor in state.items()}
