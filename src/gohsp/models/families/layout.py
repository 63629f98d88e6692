"""Layouts: where a class of blocks keeps what can be cut, as data; and all that is done with that data.

A layout names parameters by their paths. Everything is found from them: units, costs, and how a block is rebuilt at
other widths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from gohsp.errors import PlanError, UnsupportedModelError
from gohsp.models.attention import (
    AttentionLayout,
    AttentionMaps,
    PrunedAttention,
    attribute_at,
    parameter_at,
    resized_linear,
    sized,
)
from gohsp.models.checks import require_linear
from gohsp.models.modules import Constant, class_name, original_name
from gohsp.structure import (
    Absent,
    Attention,
    AttentionWidths,
    Ffn,
    FfnWidths,
    Kind,
    Readout,
    Rows,
    Sublayer,
    SublayerWidths,
    UnitSlice,
    Widths,
    is_absent,
    unit_count,
    unit_params,
)

SUPPORTED = (
    "timm's VisionTransformer (vit_*, deit_*, deit3_*; Mlp, GluMlp, SwiGLU), Eva, BEiT, relative positions, NaFlexVit, "
    "SAM, Swin and Swin v2; transformers' ViT, DeiT, I-JEPA, MSN, DINOv2, DINOv3, CLIP, MetaCLIP 2, SigLIP, BEiT, SAM, "
    "Swin, Swin v2 and DPT; torchvision's VisionTransformer, Swin and Swin v2; torch.nn.TransformerEncoderLayer; "
    "open_clip; vit_pytorch; DINOv2's and Segment Anything's own code; classes of your own by "
    "gohsp.families.register"
)
"""What can be pruned, in words."""


@dataclass(frozen=True, kw_only=True)
class FfnLayout:
    """What an FFN class holds; all paths are in the FFN.

    Attributes:
        inputs: Linear maps that make hidden units; one named twice holds both halves of a gate, one after the other.
        readout: The second linear map.
        norm: The norm on hidden units, if any.
    """

    inputs: tuple[str, ...]
    readout: str
    norm: str | None = None


@dataclass(frozen=True, kw_only=True)
class Branch:
    """A sub-layer's place in its block.

    Attributes:
        module: Its module; None of an FFN whose maps lie in the block itself.
        norm: The norm that reads the stream for it alone, if any.
        after: The LayerNorm behind it, if any.
        after_sum: Whether that norm is on the stream with the branch added, and not on the branch alone.
        gain: The LayerScale vector behind it, if any.
        layout: What the block holds of it, where ``module`` is None.
        owned: Of an attention, parameters of the block of which each head owns an entry, and the axis along which.
        looked_into: Whether the block reads attributes of the module, so that nothing else can stand in its place.

    Raises:
        UnsupportedModelError: Both a norm and LayerScale behind it.
    """

    module: str | None
    norm: str | None = None
    after: str | None = None
    after_sum: bool = False
    gain: str | None = None
    layout: FfnLayout | None = None
    owned: Mapping[str, int] = field(default_factory=dict)
    looked_into: bool = False

    def __post_init__(self) -> None:
        if self.after is not None and self.gain is not None:
            raise UnsupportedModelError(
                f"a sub-layer with the norm '{self.after}' and LayerScale '{self.gain}' behind it cannot be pruned; "
                "give after= or gain="
            )

    @property
    def removable(self) -> bool:
        """Whether a vector can stand in its place: it is a module, and nothing of it lies in the block itself.

        Behind a norm none can: what is left of the readout there is a vector that the norm blows up to its own size.
        """
        apart = self.module is not None and not self.looked_into and not self.owned and self.after is None
        return apart and (self.gain is None or "." in self.gain)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A class of blocks.

    Attributes:
        attention: Where its attention is.
        ffn: Where its FFN is.
        windowed: Whether its attention reads the stream in another order than it comes: by windows.
        returns_tuple: Whether it returns a tuple, the stream first.
        apart: Whether nothing calls it as a whole: its attention and then its FFN are called with the stream alone, and
            what they return is added to it by their caller.
        required: Attributes that must have these values.
    """

    attention: Branch
    ffn: Branch
    windowed: bool = False
    returns_tuple: bool = False
    apart: bool = False
    required: Mapping[str, object] = field(default_factory=dict)

    @property
    def called(self) -> tuple[str, ...]:
        """Paths of the modules in it that are called in turn: mostly itself alone, the empty path."""
        return (self.attention.module or "", self.ffn.module or "") if self.apart else ("",)


Blocks = Mapping[str | tuple[str, ...], tuple[Layout, ...]]
"""Layouts of blocks by the full name of their class, or the names of those in a list."""


@dataclass(frozen=True)
class Known:
    """All that is known of classes, by their full names.

    A class that a library has changed over time has several layouts, of which that counts whose parameters are there. A
    block that is an ``nn.ModuleList`` goes by the names of the classes in it.
    """

    blocks: Blocks
    attentions: Mapping[str, tuple[AttentionLayout, ...]]
    ffns: Mapping[str, tuple[FfnLayout, ...]]

    def __or__(self, other: Known) -> Known:
        """Both together."""
        return Known(self.blocks | other.blocks, self.attentions | other.attentions, self.ffns | other.ffns)  # type: ignore[operator]


@dataclass(frozen=True)
class Family:
    """A block's layout, with those of what is in it.

    Attributes:
        layout: Of the block.
        attention: Of its attention; None where it is absent.
        ffn: Of its FFN; None where it is absent.
    """

    layout: Layout
    attention: AttentionLayout | None
    ffn: FfnLayout | None

    def attention_name(self, block: str) -> str:
        """Name of the attention of a block."""
        return f"{block}.{self.layout.attention.module}"

    def ffn_name(self, block: str) -> str:
        """Name of the FFN of a block; where it has no module of its own, that of the block's child with its readout."""
        branch = self.layout.ffn
        own = branch.layout.readout.partition(".")[0] if branch.layout is not None else branch.module
        return f"{block}.{own}"


def family_in(known: Known, name: str, block: nn.Module) -> Family | None:
    """How a block is made; None of a class that is not known.

    Raises:
        UnsupportedModelError: The class is known, but a module in this block is of a class that is not.
    """
    layouts = _layouts_of(known, block)
    if layouts is None:
        return None
    layout = _fitting(name, block, layouts)
    for attribute, found in _unmet(layout, block):
        value = layout.required[attribute]
        raise UnsupportedModelError(f"block '{name}' has {attribute}={found}; it can be pruned with {value} alone")
    assert layout.attention.module is not None
    attention = _layout_of(f"{name}.{layout.attention.module}", block, layout.attention.module, known.attentions)
    ffn = layout.ffn.layout
    if layout.ffn.module is not None:
        ffn = _layout_of(f"{name}.{layout.ffn.module}", block, layout.ffn.module, known.ffns)
    return Family(layout, attention, ffn)


def _layouts_of(known: Known, block: nn.Module) -> tuple[Layout, ...] | None:
    """Those of a block's class; of a list those of the classes that are or were in it."""
    listed = isinstance(block, nn.ModuleList)
    return known.blocks.get(tuple(map(original_name, block)) if listed else class_name(block))


def _fitting(name: str, block: nn.Module, layouts: Sequence[Layout]) -> Layout:
    """The first layout whose modules are there, if any with the attributes that it requires."""
    there = []
    for layout in layouts:
        paths = [path for of in (layout.attention, layout.ffn) for path in (of.module, of.norm, of.after)]
        if all(path is None or _at(block, path) is not None for path in paths):
            there.append(layout)
    if not there:
        raise UnsupportedModelError(
            f"block '{name}' is a {class_name(block)} of another version of its library than the ones that are known"
        )
    return next((layout for layout in there if not _unmet(layout, block)), there[0])


def _unmet(of: Layout | AttentionLayout, module: nn.Module) -> list[tuple[str, object]]:
    """Attributes that are not as required, and what they are."""
    found = ((attribute, getattr(module, attribute, None)) for attribute in of.required)
    return [(attribute, value) for attribute, value in found if value != of.required[attribute]]


def _layout_of(name: str, block: nn.Module, path: str, known: Mapping[str, tuple[Any, ...]]) -> Any:
    """The layout of a module in a block; None of one that is absent."""
    module = block.get_submodule(path)
    if isinstance(module, Constant):
        return None
    if isinstance(module, PrunedAttention):
        return module.layout
    for layout in known.get(class_name(module), ()):
        if not all(_is_there(module, weight) for weight in _weights(layout)):
            continue
        for attribute, found in _unmet(layout, module) if isinstance(layout, AttentionLayout) else ():
            detail = f" with a {attribute}" if layout.required[attribute] is None else f" with {attribute}={found}"
            raise _unsupported(name, module, detail)
        return layout
    raise _unsupported(name, module)


def _is_there(module: nn.Module, weight: str) -> bool:
    """Whether a weight's module is there, whatever it has become, or the weight itself if it is the module's own."""
    holder = weight.rpartition(".")[0]
    return isinstance(_at(module, holder), nn.Module) if holder else parameter_at(module, weight) is not None


def _weights(layout: AttentionLayout | FfnLayout) -> list[str]:
    """Paths of the weights that a class must have for a layout to be its own."""
    inputs = layout.inputs if isinstance(layout, FfnLayout) else ()
    places = layout.maps.places if isinstance(layout, AttentionLayout) else ()
    readout = layout.maps.readout if isinstance(layout, AttentionLayout) else layout.readout
    return [weight for weight, _ in places] + [f"{path}.weight" for path in (*inputs, readout)]


def _unsupported(name: str, module: nn.Module, detail: str = "") -> UnsupportedModelError:
    return UnsupportedModelError(
        f"module '{name}' is a {class_name(module)}{detail}, which cannot be pruned; supported: {SUPPORTED}"
    )


def _at(module: nn.Module, path: str | None) -> Any:
    """What lies at a path; None where nothing does."""
    return None if path is None else attribute_at(module, path)


# Describing


@dataclass(frozen=True)
class Reading:
    """How a block's attention reads the stream.

    Attributes:
        tokens: Tokens of the stream that the block is given.
        keys: Keys that a query sees.
        order: The token of the stream in each row that the attention reads, -1 of padding; None where the rows are the
            tokens as they come.
    """

    tokens: int
    keys: int
    order: tuple[int, ...] | None = None


def describe(family: Family, name: str, block: nn.Module, reading: Reading) -> tuple[Sublayer, ...]:
    """Describe a block, dense or already pruned.

    Args:
        family: How it is made.
        name: Its name in the model.
        block: The block.
        reading: How its attention reads the stream.

    Raises:
        UnsupportedModelError: A module of it cannot be cut; the message names it.
    """
    return _attention(family, name, block, reading), _ffn(family, name, block, reading.tokens)


def _attention(family: Family, name: str, block: nn.Module, reading: Reading) -> Sublayer:
    branch, layout, path = family.layout.attention, family.attention, family.attention_name(name)
    attn: Any = block.get_submodule(branch.module or "")
    if layout is None:
        return _absent(path, name, AttentionWidths(heads=0, qk=0, vo=0), attn)
    maps = layout.maps
    for part in (*maps.linears, maps.readout):
        require_linear(f"{path}.{part}", attn.get_submodule(part))
    widths, readout = attention_widths(path, layout, attn), attn.get_submodule(maps.readout)
    norms = [_norm_name(path, attn, norm) for norm in (maps.query_norm, maps.key_norm)]
    held: set[Kind] = set(layout.held)
    if any(norms):  # the norm sees a head's whole width: neither its size nor its basis may change
        held.add("qk")
    if _norm_name(path, attn, maps.value_norm):  # likewise over all heads' values
        held.update(("head", "vo"))
    inside = _owned(f"{path}.", attn, layout.owned)
    sub = Attention(
        name=path,
        block=name,
        norm=_named(name, branch.norm),
        widths=widths,
        tokens=reading.tokens if reading.order is None else len(reading.order),
        keys=reading.keys,
        overhead=0,
        prunable=frozenset(kind for kind in widths.kinds if kind not in held),
        removable=branch.removable,
        rotatable=frozenset(kind for kind in widths.unit_kinds if kind not in held),
        scale=_scale(layout, attn, widths),
        query=_map_rows(path, attn, maps, 0, 0),
        key=_map_rows(path, attn, maps, 1, widths.heads * widths.qk),
        value=_map_rows(path, attn, maps, 2, 2 * widths.heads * widths.qk),
        query_norm=norms[0],
        key_norm=norms[1],
        owned=inside + _owned(f"{name}.", block, branch.owned),
        inner_norm=_norm_name(path, attn, layout.norm),
        order=reading.order,
        cuts=layout.windows is not None,
        readout=_readout(f"{path}.{maps.readout}", readout, branch, name, block),
    )
    units = sum(unit_count(widths, kind) * unit_params(sub, kind) for kind in widths.unit_kinds)
    units += sum(entry.size for entry in inside) * widths.heads
    return replace(sub, overhead=_count(attn) + _around(block, branch) - units)


def _ffn(family: Family, name: str, block: nn.Module, tokens: int) -> Sublayer:
    branch, layout, path = family.layout.ffn, family.ffn, family.ffn_name(name)
    mlp: Any = block.get_submodule(branch.module or "")
    if layout is None:
        return _absent(path, name, FfnWidths(units=0), mlp)
    prefix = f"{name}." if branch.module is None else f"{path}."
    for part in (*layout.inputs, layout.readout):
        require_linear(f"{prefix}{part}", mlp.get_submodule(part))
    readout = mlp.get_submodule(layout.readout)
    packed, units = len(set(layout.inputs)) < len(layout.inputs), readout.in_features
    starts = [i * units if packed else 0 for i in range(len(layout.inputs))]
    rows = [_rows(f"{prefix}{p}", mlp.get_submodule(p), s) for p, s in zip(layout.inputs, starts, strict=True)]
    normed = layout.norm is not None and not isinstance(_at(mlp, layout.norm), nn.Identity | None)
    sub = Ffn(
        name=path,
        block=name,
        norm=_named(name, branch.norm),
        widths=FfnWidths(units=units),
        tokens=tokens,
        overhead=0,
        prunable=frozenset() if normed else frozenset({"ffn"}),
        removable=branch.removable,
        inputs=tuple(rows),
        readout=_readout(f"{prefix}{layout.readout}", readout, branch, name, block),
    )
    parts = [mlp] if branch.module is not None else [mlp.get_submodule(p) for p in (*layout.inputs, layout.readout)]
    total = sum(map(_count, parts)) + _around(block, branch)
    return replace(sub, overhead=total - units * unit_params(sub, "ffn"))


def attention_widths(name: str, layout: AttentionLayout, attn: Any) -> AttentionWidths:
    """Present widths of an attention.

    Raises:
        UnsupportedModelError: Keys are fewer than queries.
    """
    if isinstance(attn, PrunedAttention):
        return AttentionWidths(heads=attn.num_heads, qk=attn.qk_dim, vo=attn.vo_dim)
    heads, maps = attribute_at(attn, layout.heads), layout.maps
    rows = [len(attn.get_parameter(weight)) for weight, _ in maps.places]
    if maps.packed:
        rows = [count // 3 for count in rows]
    if rows[0] != rows[1] or rows[0] != rows[2]:
        raise _unsupported(name, attn, f" with {rows} rows of queries, keys and values")
    return AttentionWidths(heads=heads, qk=rows[0] // heads, vo=rows[2] // heads)


def _scale(layout: AttentionLayout, attn: Any, widths: AttentionWidths) -> float:
    if isinstance(attn, PrunedAttention):
        return attn.scale
    return widths.qk**-0.5 if layout.scale is None else float(attribute_at(attn, layout.scale))


def _map_rows(name: str, attn: nn.Module, maps: AttentionMaps, part: int, packed_start: int) -> Rows:
    """Rows of queries (0), keys (1) or values (2); ``packed_start`` is where they begin if all are in one map."""
    weight, bias = maps.places[part]

    def start(paths: Sequence[str | None]) -> int:
        return packed_start if len(set(paths)) == 1 else 0

    at = attn.get_parameter(weight)
    slice_ = UnitSlice(parameter=f"{name}.{weight}", axis=0, start=start([w for w, _ in maps.places]), size=at.shape[1])
    if bias is None or parameter_at(attn, bias) is None:
        return Rows(weight=slice_, bias=None)
    begin = start([b for _, b in maps.places])
    return Rows(weight=slice_, bias=UnitSlice(parameter=f"{name}.{bias}", axis=0, start=begin, size=1))


def _rows(name: str, linear: nn.Linear, start: int) -> Rows:
    weight = UnitSlice(parameter=f"{name}.weight", axis=0, start=start, size=linear.in_features)
    bias = UnitSlice(parameter=f"{name}.bias", axis=0, start=start, size=1)
    return Rows(weight=weight, bias=None if linear.bias is None else bias)


def _owned(prefix: str, module: nn.Module, owned: Mapping[str, int]) -> tuple[UnitSlice, ...]:
    found = ((path, axis, parameter_at(module, path)) for path, axis in owned.items())
    return tuple(
        UnitSlice(parameter=f"{prefix}{path}", axis=axis, start=0, size=entry.numel() // entry.shape[axis])
        for path, axis, entry in found
        if entry is not None
    )


def _norm_name(name: str, attn: nn.Module, norm: str | None) -> str | None:
    return None if norm is None or isinstance(_at(attn, norm), nn.Identity | None) else f"{name}.{norm}"


def _readout(name: str, linear: nn.Linear, branch: Branch, block_name: str, block: nn.Module) -> Readout:
    norm, gain = _named(block_name, branch.after), branch.gain
    if branch.after is not None:
        if not isinstance(of := _at(block, branch.after), nn.LayerNorm):
            raise _unsupported(f"{norm}", of, " behind a sub-layer")
        gain = f"{branch.after}.weight"
    return Readout(
        module=name,
        bias=f"{name}.bias" if linear.bias is not None else None,
        gain=_named(block_name, gain) if isinstance(_at(block, gain), nn.Parameter) else None,
        size=linear.out_features,
        norm=norm,
        norm_of_sum=branch.after_sum,
    )


def _named(block: str, path: str | None) -> str | None:
    return None if path is None else f"{block}.{path}"


def _absent(name: str, block: str, widths: SublayerWidths, left: Constant) -> Absent:
    readout = Readout(module=name, bias=f"{name}.bias", gain=None, size=len(left.bias))
    return Absent(name=name, block=block, widths=widths, readout=readout)


def _count(module: nn.Module | None) -> int:
    return 0 if module is None else sum(parameter.numel() for parameter in module.parameters())


def _around(block: nn.Module, branch: Branch) -> int:
    """Parameters of the norms and of LayerScale around a sub-layer."""
    gain = _at(block, branch.gain)
    norms = _count(_at(block, branch.norm)) + _count(_at(block, branch.after))
    return norms + (gain.numel() if isinstance(gain, nn.Parameter) else 0)


# Rebuilding


def resize(family: Family, name: str, block: nn.Module, widths: Widths) -> None:
    """Rebuild a block's sub-layers at new widths, in place; new weights are not initialised.

    An attention stays of its own class where that can hold the widths, and becomes a :class:`PrunedAttention`
    otherwise. Of a sub-layer of width 0 a :class:`Constant` is left, and neither norm nor LayerScale.

    Raises:
        PlanError: Widths of another kind of sub-layer.
    """
    attention, ffn = widths[family.attention_name(name)], widths[family.ffn_name(name)]
    if not isinstance(attention, AttentionWidths) or not isinstance(ffn, FfnWidths):
        raise PlanError(
            f"'{name}' must have an attention's widths for {family.attention_name(name)} and an FFN's for "
            f"{family.ffn_name(name)}, got {attention} and {ffn}"
        )
    if family.attention is not None:
        _resize_attention(family.layout.attention, family.attention, block, attention)
    if family.ffn is not None:
        _resize_ffn(family.layout.ffn, family.ffn, block, ffn)


def _resize_attention(branch: Branch, layout: AttentionLayout, block: nn.Module, widths: AttentionWidths) -> None:
    assert branch.module is not None
    old: Any = block.get_submodule(branch.module)
    if is_absent(widths):
        _remove(branch, block, old.get_submodule(layout.maps.readout), pair=layout.returns_pair)
        return
    for path, axis in branch.owned.items():
        if (entry := parameter_at(block, path)) is not None:
            _set(block, path, sized(entry, axis, widths.heads))
    if widths == attention_widths(branch.module, layout, old) and not layout.opaque:
        return
    if isinstance(old, PrunedAttention) or not layout.native or widths.qk != widths.vo:
        _set(block, branch.module, PrunedAttention(old, layout, widths))
        return
    values = {"heads": widths.heads, "width": widths.qk, "total": widths.heads * widths.qk, "scale": widths.qk**-0.5}
    for attribute, meaning in layout.native.items():
        holder, _, name = attribute.rpartition(".")
        setattr(old.get_submodule(holder), name, values[meaning])
    packed = layout.maps.packed
    for path in layout.maps.linears:
        rows = widths.heads * widths.qk * (3 if packed else 1)
        _set(old, path, resized_linear(old.get_submodule(path), out_features=rows))
    for path, axis in layout.owned.items():
        if (entry := parameter_at(old, path)) is not None:
            _set(old, path, sized(entry, axis, widths.heads))
    readout = layout.maps.readout
    _set(old, readout, resized_linear(old.get_submodule(readout), in_features=widths.heads * widths.qk))


def _resize_ffn(branch: Branch, layout: FfnLayout, block: nn.Module, widths: FfnWidths) -> None:
    mlp = block.get_submodule(branch.module or "")
    readout: Any = mlp.get_submodule(layout.readout)
    if is_absent(widths):
        _remove(branch, block, readout, pair=False)
    elif widths.units != readout.in_features:
        packed = len(layout.inputs) // len(set(layout.inputs))
        for path in set(layout.inputs):
            _set(mlp, path, resized_linear(mlp.get_submodule(path), out_features=widths.units * packed))
        _set(mlp, layout.readout, resized_linear(readout, in_features=widths.units))


def _remove(branch: Branch, block: nn.Module, readout: Any, *, pair: bool) -> None:
    """Leave a vector of a sub-layer; where that may not go for good, what runs is fit to be timed."""
    old = block.get_submodule(branch.module or "")
    left = Constant(
        readout.out_features,
        pair=pair,
        stands_for=original_name(old),
        device=readout.weight.device,
        dtype=readout.weight.dtype,
    )
    left.requires_grad_(readout.weight.requires_grad)
    if branch.module is not None:
        _set(block, branch.module, left)
    elif branch.layout is not None:
        for path in branch.layout.inputs:
            _set(block, path, nn.Identity())
        _set(block, branch.layout.readout, left)
    for norm in (branch.norm, None if branch.after_sum else branch.after):
        if norm is not None:
            _set(block, norm, nn.Identity())
    if branch.gain is not None:
        _set(block, branch.gain.rpartition(".")[0], nn.Identity())


def _set(module: nn.Module, path: str, value: nn.Module | nn.Parameter) -> None:
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, value)


def opened(family: Family, block: nn.Module) -> None:
    """Put our own attention, as wide, in place of one whose readout cannot be watched; weights stay."""
    branch, layout = family.layout.attention, family.attention
    if layout is None or not layout.opaque or branch.module is None:
        return
    old = block.get_submodule(branch.module)
    if isinstance(old, PrunedAttention):
        return
    state = old.state_dict()  # before modules in it become those of the new one
    new = PrunedAttention(old, layout, attention_widths(branch.module, layout, old))
    new.load_state_dict(state, strict=True)
    _set(block, branch.module, new)
