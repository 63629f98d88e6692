"""What a network is made of, as plain data: sub-layers, their units, and where these sit in the parameters.

A *unit* is the smallest thing that can be removed. Query/key units and value units lie on a grid ``[heads, width]``;
flat unit ``u = head * width + dimension``. A head goes by all of its units going.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from gohsp.errors import PlanError, nearest
from gohsp.structure.widths import (
    FIELDS,
    KINDS,
    AttentionKept,
    AttentionWidths,
    FfnWidths,
    Kept,
    Kind,
    SublayerKept,
    SublayerWidths,
    UnitKind,
    Widths,
    is_whole,
    keep_all,
    kept_widths,
    width,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitSlice:
    """Where the units of one kind sit in one parameter: unit ``u`` is entry ``start + u`` along ``axis``.

    Attributes:
        parameter: Name in the model's state dict.
        axis: The axis that the units lie along.
        start: Entry of unit 0.
        size: Numbers per unit: the residual width for a weight, 1 for a bias.
    """

    parameter: str
    axis: int
    start: int
    size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """Rows of a linear map, which make units of what the sub-layer reads.

    Attributes:
        weight: The rows.
        bias: Their biases, or None.
    """

    weight: UnitSlice
    bias: UnitSlice | None

    @property
    def slices(self) -> tuple[UnitSlice, ...]:
        """Weight and bias, if any."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)


@dataclass(frozen=True, kw_only=True, slots=True)
class Readout:
    """The linear map that takes units back to the residual stream; unit ``u`` is column ``u`` of its weight.

    Attributes:
        module: Name of the linear module; its input holds the units' activations.
        bias: Name of its bias, or None.
        gain: Name of the vector that scales the channels behind it, or None: LayerScale, or the weight of ``norm``.
        size: Residual width.
        norm: Name of the LayerNorm behind it, or None.
        norm_of_sum: Whether that norm is on the stream with the branch added, and not on the branch alone.
    """

    module: str
    bias: str | None
    gain: str | None
    size: int
    norm: str | None = None
    norm_of_sum: bool = False

    @property
    def columns(self) -> UnitSlice:
        """The units' columns of the weight."""
        return UnitSlice(parameter=f"{self.module}.weight", axis=1, start=0, size=self.size)

    @property
    def bias_slice(self) -> UnitSlice | None:
        """The bias as a slice of ``size`` entries, or None."""
        return None if self.bias is None else UnitSlice(parameter=self.bias, axis=0, start=0, size=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Attention:
    """A self-attention that reads a normed residual stream and adds to it.

    Attributes:
        name: Its module's name; the module's input is what queries, keys and values are read from.
        block: Name of the block that holds it, whose input and output are the residual stream.
        norm: Name of the norm that reads the stream for this sub-layer alone, or None.
        widths: Present widths.
        tokens: Rows per image that it reads: tokens, prefix tokens too, or those of all windows with their padding.
        keys: Keys that a query sees: all tokens, or those of a window.
        overhead: Parameters that are there as long as any unit is: norms, the readout's bias, LayerScale.
        prunable: Kinds that may be cut here.
        removable: Whether the whole sub-layer may go.
        rotatable: Of ``qk`` and ``vo``, those whose units may be mixed by an invertible matrix.
        scale: Factor on ``q k^T`` before the softmax.
        query: What makes queries.
        key: What makes keys.
        value: What makes values.
        query_norm: Name of the norm on queries, or None.
        key_norm: Name of the norm on keys, or None.
        owned: Slices of which head ``h`` owns entry ``h`` as a whole, such as columns of a position-bias table.
        inner_norm: Name of the norm inside it that its input passes first, or None.
        order: The token of the stream in each row that it reads, window after window, -1 of padding; None where the
            rows are the tokens as they come.
        cuts: Whether it is given the stream's own tokens and puts them into that order itself.
        readout: The output projection.
    """

    name: str
    block: str
    norm: str | None
    widths: AttentionWidths
    tokens: int
    keys: int
    overhead: int
    prunable: frozenset[Kind]
    removable: bool
    rotatable: frozenset[Kind]
    scale: float
    query: Rows
    key: Rows
    value: Rows
    query_norm: str | None = None
    key_norm: str | None = None
    owned: tuple[UnitSlice, ...] = ()
    inner_norm: str | None = None
    order: tuple[int, ...] | None = None
    cuts: bool = False
    readout: Readout

    def slices(self, kind: Kind) -> tuple[UnitSlice, ...]:
        """Every parameter slice that a unit of ``kind`` couples; a head couples those of qk and vo."""
        qk = self.query.slices + self.key.slices
        vo = (*self.value.slices, self.readout.columns)
        return {"qk": qk, "vo": vo, "head": qk + vo}[kind]


@dataclass(frozen=True, kw_only=True, slots=True)
class Ffn:
    """A feed-forward network that reads a normed residual stream and adds to it.

    Attributes:
        name: Its module's name.
        block: Name of the block that holds it.
        norm: Name of the norm that reads the stream for this sub-layer alone, or None.
        widths: Present width.
        tokens: Tokens per image.
        overhead: Parameters that are there as long as any unit is.
        prunable: Kinds that may be cut here.
        removable: Whether the whole sub-layer may go.
        inputs: What makes hidden units: one map, or both halves of a gated FFN.
        readout: The second linear map.
        floor: Fewest hidden units that an allocation may leave, whatever share its settings allow.
        step: What an allocation leaves is a multiple of this, whatever its settings allow.
    """

    name: str
    block: str
    norm: str | None
    widths: FfnWidths
    tokens: int
    overhead: int
    prunable: frozenset[Kind]
    removable: bool
    inputs: tuple[Rows, ...]
    readout: Readout
    floor: int = 0
    step: int = 1

    def slices(self, _kind: Kind = "ffn") -> tuple[UnitSlice, ...]:
        """Every parameter slice that a hidden unit couples."""
        return (*(s for rows in self.inputs for s in rows.slices), self.readout.columns)


@dataclass(frozen=True, kw_only=True, slots=True)
class Absent:
    """What is left of a sub-layer that was removed: a vector that is added to every token.

    Attributes:
        name: Name of the module that holds the vector.
        block: Name of the block that holds it.
        widths: All 0; their type tells what the sub-layer was.
        readout: Where the vector is: its bias. It has no weight.
    """

    name: str
    block: str
    widths: SublayerWidths
    readout: Readout


PresentSublayer = Attention | Ffn
Sublayer = Attention | Ffn | Absent


@dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """A whole model.

    Attributes:
        sublayers: Its sub-layers in forward order, absent ones (width 0) too.
        fixed_params: Parameters outside the sub-layers, which no cut can remove.
        fixed_macs: Multiply-accumulates per image outside the sub-layers.
        apart: Blocks that nothing calls as a whole: their sub-layers are called one after the other, with the stream
            alone, and what each returns is added to the stream by its caller.
    """

    sublayers: tuple[Sublayer, ...]
    fixed_params: int
    fixed_macs: int
    apart: frozenset[str] = frozenset()

    @property
    def widths(self) -> dict[str, SublayerWidths]:
        """Present widths of every sub-layer."""
        return {sub.name: sub.widths for sub in self.sublayers}

    @property
    def present(self) -> tuple[PresentSublayer, ...]:
        """Sub-layers of which something is there."""
        return tuple(sub for sub in self.sublayers if not isinstance(sub, Absent))

    @property
    def attentions(self) -> tuple[Attention, ...]:
        """Attentions of which something is there."""
        return tuple(sub for sub in self.present if isinstance(sub, Attention))

    @property
    def blocks(self) -> dict[str, tuple[Sublayer, ...]]:
        """Sub-layers by the name of their block, in forward order."""
        names = dict.fromkeys(sub.block for sub in self.sublayers)
        return {name: tuple(sub for sub in self.sublayers if sub.block == name) for name in names}

    @property
    def embed_dim(self) -> int:
        """Width of the widest residual stream."""
        return max(sub.readout.size for sub in self.sublayers)


def unit_params(sub: PresentSublayer, kind: UnitKind) -> int:
    """Parameters that one unit holds."""
    return sum(s.size for s in sub.slices(kind))


def unit_macs(sub: PresentSublayer, kind: UnitKind) -> int:
    """Multiply-accumulates per token of one unit's linear maps (biases are free)."""
    return sum(s.size for s in sub.slices(kind) if s.size > 1)


def keep_everything(network: Network) -> dict[str, SublayerKept]:
    """The cut that keeps everything."""
    return {name: keep_all(of) for name, of in network.widths.items()}


def excluding(network: Network, exclude: Iterable[str]) -> Network:
    """The network with some of it left alone.

    Args:
        network: The network.
        exclude: Names of sub-layers, of modules that hold some (``blocks.0`` is both of its sub-layers), or kinds of
            unit (``head``, ``qk``, ``vo``, ``ffn``).

    Raises:
        PlanError: A text instead of a list of texts, or an entry that names nothing in this network.
    """
    if isinstance(exclude, str):
        raise PlanError(f"exclude must be a list of names, got the text {exclude!r}; write [{exclude!r}]")
    names, kinds = [], set()
    known = [*KINDS, *network.blocks, *network.widths]
    for entry in exclude:
        if entry in KINDS:
            kinds.add(entry)
        elif entry and any(is_in(sub.name, entry) for sub in network.sublayers):
            names.append(entry)
        else:
            raise PlanError(
                f"exclude names {entry!r}, which is no sub-layer and no kind here; {_there_are(str(entry), known)}"
            )

    def left(sub: Sublayer) -> Sublayer:
        if isinstance(sub, Absent):
            return sub
        whole = any(is_in(sub.name, name) for name in names)
        prunable = frozenset() if whole else sub.prunable - kinds
        return replace(
            sub, prunable=prunable, removable=sub.removable and not whole and not kinds & set(sub.widths.kinds)
        )

    return replace(network, sublayers=tuple(left(sub) for sub in network.sublayers))


def _there_are(name: str, known: Iterable[str]) -> str:
    """A hint at names that are there: those that differ by their numbers alone, or else the nearest."""
    pattern = re.sub(r"\d+", r"\\d+", re.escape(name))
    alike = [other for other in known if re.fullmatch(pattern, other)]
    return f"there are '{alike[0]}' to '{alike[-1]}'" if len(alike) > 1 else nearest(name, known)


def is_in(name: str, module: str) -> bool:
    """Whether a name is that of a module, or of something in it; ``""`` is the whole model."""
    return not module or name == module or name.startswith(f"{module}.")


def check_widths(network: Network, widths: Widths) -> None:
    """Check that a network can be cut down to ``widths``.

    Raises:
        PlanError: A sub-layer that is missing or unknown, a width that is no whole number from 1 to the present one (or
            0 for all of them), or a kind or sub-layer that may not be cut.
    """
    _require_names(network, widths)
    for sub in network.sublayers:
        want, have = widths[sub.name], sub.widths
        if type(want) is not type(have):
            raise PlanError(f"'{sub.name}' of the plan must have {type(have).__name__}, got {want!r}")
        if isinstance(sub, Absent):
            if want != have:
                raise PlanError(f"'{sub.name}' was removed from this model and cannot come back; give it {have}")
            continue
        if all(getattr(want, FIELDS[kind]) == 0 for kind in have.kinds):
            if not sub.removable:
                raise PlanError(f"'{sub.name}' cannot be removed in this model; keep some of it, such as {have}")
            continue
        for kind in have.kinds:
            _check_width(sub, kind, width(want, kind))


def _check_width(sub: PresentSublayer, kind: Kind, want: int) -> None:
    field, have = FIELDS[kind], width(sub.widths, kind)
    if not is_whole(want):
        raise PlanError(f"'{sub.name}': '{field}' must be a whole number, got {want!r}")
    if not 1 <= want <= have:
        raise PlanError(f"'{sub.name}': '{field}' must be from 1 to {have}, got {want}")
    if want < have and kind not in sub.prunable:
        raise PlanError(
            f"'{sub.name}': '{field}' cannot be cut here (allowed: {sorted(sub.prunable) or 'nothing'}); "
            f"keep it at {have}"
        )


def _require_names(network: Network, given: Widths | Kept) -> None:
    names = network.widths.keys()
    for name in given:
        if name not in names:
            raise PlanError(f"the plan has a sub-layer '{name}', the model has none; {_there_are(str(name), names)}")
    if missing := [name for name in names if name not in given]:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise PlanError(f"the plan lacks {missing[:3]}{more}; give the widths of all {len(names)} sub-layers")


def check_kept(network: Network, kept: Kept) -> None:
    """Check that a cut can be carried out on a network.

    Raises:
        PlanError: What :func:`check_widths` refuses; indices out of range, repeated or unordered; heads of unequal
            width.
    """
    _require_names(network, kept)
    check_widths(network, kept_widths(kept))
    for sub in network.sublayers:
        check_indices(sub.name, kept[sub.name], sub.widths)


def check_indices(name: str, kept: SublayerKept, present: SublayerWidths) -> None:
    """Check what stays of one sub-layer against its present widths, which are of the same type.

    Raises:
        PlanError: Indices out of range, repeated or unordered; heads of unequal width.
    """
    if isinstance(kept, AttentionKept) and isinstance(present, AttentionWidths):
        groups = [("heads", kept.heads, present.heads)]
        for kind, per_head, most in (("qk", kept.qk, present.qk), ("vo", kept.vo, present.vo)):
            if len(per_head) != len(kept.heads) or len({len(dims) for dims in per_head}) > 1:
                raise PlanError(
                    f"'{name}': '{kind}' must list equally many dimensions for each of the {len(kept.heads)} "
                    f"kept heads, got lists of {[len(dims) for dims in per_head]}"
                )
            groups += [(kind, dims, most) for dims in per_head]
    else:
        groups = [("units", kept.units, present.units)]  # type: ignore[union-attr]
    for label, indices, most in groups:
        if list(indices) != sorted(set(indices)) or (indices and (indices[0] < 0 or indices[-1] >= most)):
            raise PlanError(
                f"'{name}': '{label}' must be ascending distinct indices from 0 to {most - 1}, got {indices}"
            )
