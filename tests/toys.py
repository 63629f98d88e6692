"""Networks as plain data, small enough to count by hand: no model stands behind them."""

from __future__ import annotations

from typing import Any

from gohsp.structure import (
    Absent,
    Attention,
    AttentionWidths,
    Ffn,
    FfnWidths,
    Network,
    Readout,
    Rows,
    Sublayer,
    SublayerWidths,
    UnitSlice,
)

TOKENS = 5


def rows(name: str, dim: int, start: int = 0) -> Rows:
    """Rows with biases that read a stream of ``dim`` channels."""
    return Rows(
        weight=UnitSlice(parameter=f"{name}.weight", axis=0, start=start, size=dim),
        bias=UnitSlice(parameter=f"{name}.bias", axis=0, start=start, size=1),
    )


def readout(name: str, dim: int) -> Readout:
    return Readout(module=name, bias=f"{name}.bias", gain=None, size=dim)


def attention(block: str, heads: int, qk: int, vo: int, *, dim: int = 6, **changes: Any) -> Attention:
    name = f"{block}.attn"
    fields: dict[str, Any] = {
        "name": name,
        "block": block,
        "norm": f"{block}.norm1",
        "widths": AttentionWidths(heads=heads, qk=qk, vo=vo),
        "tokens": TOKENS,
        "keys": TOKENS,
        "overhead": 3 * dim,
        "prunable": frozenset({"head", "qk", "vo"}),
        "removable": True,
        "rotatable": frozenset(),
        "scale": qk**-0.5,
        "query": rows(f"{name}.qkv", dim),
        "key": rows(f"{name}.qkv", dim, heads * qk),
        "value": rows(f"{name}.qkv", dim, 2 * heads * qk),
        "readout": readout(f"{name}.proj", dim),
    }
    return Attention(**(fields | changes))


def ffn(block: str, units: int, *, dim: int = 6, **changes: Any) -> Ffn:
    name = f"{block}.mlp"
    fields: dict[str, Any] = {
        "name": name,
        "block": block,
        "norm": f"{block}.norm2",
        "widths": FfnWidths(units=units),
        "tokens": TOKENS,
        "overhead": 3 * dim,
        "prunable": frozenset({"ffn"}),
        "removable": True,
        "inputs": (rows(f"{name}.fc1", dim),),
        "readout": readout(f"{name}.fc2", dim),
    }
    return Ffn(**(fields | changes))


def gone(name: str, widths: SublayerWidths, *, dim: int = 6) -> Absent:
    """What is left of a sub-layer that was removed."""
    left = Readout(module=name, bias=f"{name}.bias", gain=None, size=dim)
    return Absent(name=name, block=name.rpartition(".")[0], widths=widths, readout=left)


def network(*sublayers: Sublayer) -> Network:
    return Network(sublayers=sublayers, fixed_params=7, fixed_macs=11)


def stack(depth: int, *, heads: int, qk: int, vo: int, units: int, dim: int = 6, **changes: Any) -> Network:
    """Blocks ``b0``, ``b1``, ... of equal widths; ``changes`` are those of all sub-layers."""
    blocks = [f"b{i}" for i in range(depth)]
    pairs = [(attention(b, heads, qk, vo, dim=dim, **changes), ffn(b, units, dim=dim, **changes)) for b in blocks]
    return network(*(sub for pair in pairs for sub in pair))
