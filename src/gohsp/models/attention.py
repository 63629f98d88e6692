"""Self-attention of any library at widths that its own class cannot hold, made from a description of that class."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gohsp.models.modules import original_name
from gohsp.structure import AttentionWidths, Kind

Place = tuple[str, str | None]
"""Paths of a linear map's weight and bias; the bias need not be there."""


@dataclass(frozen=True, kw_only=True)
class AttentionMaps:
    """Where an attention class keeps its parameters; all paths are in the attention.

    Maps with one place are packed: rows of all heads' queries, then keys, then values.

    Attributes:
        query: What makes queries.
        key: What makes keys.
        value: What makes values.
        readout: The output projection, a linear module.
        query_norm: The norm on queries, if any.
        key_norm: The norm on keys, if any.
        value_norm: The norm on the concatenated heads, if any.
    """

    query: Place
    key: Place
    value: Place
    readout: str
    query_norm: str | None = None
    key_norm: str | None = None
    value_norm: str | None = None

    @property
    def places(self) -> tuple[Place, Place, Place]:
        """Those of queries, keys and values."""
        return self.query, self.key, self.value

    @property
    def packed(self) -> bool:
        """Whether one map makes all of them."""
        return self.query[0] == self.key[0] == self.value[0]

    @property
    def linears(self) -> tuple[str, ...]:
        """Linear modules that queries, keys and values are made by."""
        return tuple(dict.fromkeys(weight.rpartition(".")[0] for weight, _ in self.places if "." in weight))


def maps_at(
    places: Sequence[Place],
    readout: str,
    *,
    query_norm: str | None = None,
    key_norm: str | None = None,
    value_norm: str | None = None,
) -> AttentionMaps:
    """The same of the places of queries, keys and values."""
    query, key, value = places
    return AttentionMaps(
        query=query,
        key=key,
        value=value,
        readout=readout,
        query_norm=query_norm,
        key_norm=key_norm,
        value_norm=value_norm,
    )


class Attended(NamedTuple):
    """Queries and keys ``[B, heads, tokens, qk]`` as their products are taken, and what is added to these.

    Attributes:
        query: Queries.
        key: Keys.
        bias: Added to the scaled products, or a boolean mask of those that count; None for nothing.
        causal: Whether a query sees no later key.
    """

    query: Tensor
    key: Tensor
    bias: Tensor | None = None
    causal: bool = False


class Windows(NamedTuple):
    """What a class makes of a grid that it cuts into windows itself.

    Attributes:
        rows: The windows of all images ``[windows, tokens, D]``, padded with zeros.
        mask: Added to the products of each window of an image ``[windows, queries, keys]``, or None.
        back: Takes what the windows become to a grid.
    """

    rows: Tensor
    mask: Tensor | None
    back: Callable[[Tensor], Tensor]


Position = Callable[[Any, Tensor, Tensor, tuple[Any, ...], Mapping[str, Any]], Attended]
"""Takes an attention, its queries and keys, and what it was called with besides its input.

Queries and keys are ``[B, heads, tokens, qk]``, or ``[B, heads, height, width, qk]`` where its input is a grid.
"""


def unmasked(_attn: Any, q: Tensor, k: Tensor, _args: tuple[Any, ...], _given: Mapping[str, Any]) -> Attended:
    """Products as they are, whatever the attention is called with besides."""
    return Attended(q, k)


def plain(_attn: Any, q: Tensor, k: Tensor, args: tuple[Any, ...], given: Mapping[str, Any]) -> Attended:
    """Products as they are, with a mask as first argument or by name, if any."""
    mask = args[0] if args else given.get("attn_mask", given.get("attention_mask"))
    return Attended(q, k, mask, bool(given.get("is_causal", False)))


@dataclass(frozen=True, kw_only=True)
class AttentionLayout:
    """What an attention class holds, and how it differs from plain self-attention; all paths are in the attention.

    Attributes:
        maps: Its parameters.
        heads: The attribute that tells its number of heads.
        scale: The attribute that tells the factor on ``q k^T``; None where that is always ``qk ** -0.5``.
        norm: The norm inside it that its input passes first, if any.
        windows: How it cuts its input ``[B, height, width, D]`` into windows itself, if it does. ``position`` finds
            their mask under the name ``mask``.
        held: Kinds that must stay, whatever the module at hand.
        owned: Parameters of which each head owns an entry, and the axis along which.
        position: What becomes of queries and keys, and what is added to their products.
        keeps: What ``position``, ``windows`` and ``readout_dropout`` read: attributes, or what lies in modules of which
            maps are taken alone.
        dropout: The attribute that tells the rate of dropout on attention, a number or a module.
        readout_dropout: The module of dropout behind the readout, if any.
        returns_pair: Whether the class returns a pair, the output first.
        native: Attributes that the class itself keeps of its widths: ``heads``, the ``width`` of a head, the ``total``
            of all heads, ``scale``. Empty where it cannot hold other widths than those that it was made with.
        opaque: Whether the class runs its readout in a way that cannot be watched, so that it is always replaced.
        required: Attributes that must have these values.
        sets: Attributes that ours must have, which the library looks at.
    """

    maps: AttentionMaps
    heads: str = "num_heads"
    scale: str | None = "scale"
    norm: str | None = None
    windows: Callable[[Any, Tensor], Windows] | None = None
    held: frozenset[Kind] = frozenset()
    owned: Mapping[str, int] = field(default_factory=dict)
    position: Position = plain
    keeps: tuple[str, ...] = ()
    dropout: str | None = "attn_drop"
    readout_dropout: str | None = None
    returns_pair: bool = False
    native: Mapping[str, str] = field(default_factory=dict)
    opaque: bool = False
    required: Mapping[str, object] = field(default_factory=dict)
    sets: Mapping[str, object] = field(default_factory=dict)


class PrunedAttention(nn.Module):
    """Multi-head self-attention whose query/key width may differ from its value width.

    A drop-in for the class that it is made from: same parameter names, same call, same kind of result. The narrower
    side is padded with zeros inside, since fused kernels want one width (``docs/oneshot.md``).

    Args:
        old: The attention to replace. What is not resized is taken over from it.
        layout: What its class holds.
        widths: Widths to have; weights of resized maps are not initialised.
    """

    def __init__(self, old: nn.Module, layout: AttentionLayout, widths: AttentionWidths) -> None:
        super().__init__()
        self.stands_for = original_name(old)
        self.layout, self.num_heads, self.qk_dim, self.vo_dim = layout, widths.heads, widths.qk, widths.vo
        self.scale = widths.qk**-0.5
        self.dropout_rate = old.dropout_rate if isinstance(old, PrunedAttention) else _rate(old, layout.dropout)
        self.fused_attn = bool(getattr(old, "fused_attn", True))
        self._take_over(old)
        self._resize(old)
        self.train(old.training)

    def _take_over(self, old: nn.Module) -> None:
        """Everything that is neither a map nor owned by heads."""
        maps, resized = self.layout.maps, set(self.layout.owned)
        resized |= {path for place in self.layout.maps.places for path in place if path is not None}
        mapped = {path.partition(".")[0] for path in (*maps.linears, maps.readout)}
        for name, child in old.named_children():
            if name not in mapped:
                setattr(self, name, child)
        for name, parameter in old.named_parameters(recurse=False):
            if name not in resized:
                self.register_parameter(name, parameter)
        for path in self.layout.keeps:
            holder, name = old.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
            if name in holder._buffers:
                persistent = name not in holder._non_persistent_buffers_set
                _holder(self, path).register_buffer(name, getattr(holder, name), persistent=persistent)
            else:
                _put(self, path, getattr(holder, name))
        for name, value in self.layout.sets.items():
            setattr(self, name, value)

    def _resize(self, old: nn.Module) -> None:
        """Maps, and what heads own, at the new widths."""
        h, qk, vo, maps = self.num_heads, self.qk_dim, self.vo_dim, self.layout.maps
        rows: dict[str, int] = {}
        for place, count in zip(maps.places, (h * qk, h * qk, h * vo), strict=True):
            for path in place:
                if path is not None and parameter_at(old, path) is not None:
                    rows[path] = rows.get(path, 0) + count
        for path in maps.linears:
            _put(self, path, resized_linear(old.get_submodule(path), out_features=rows[f"{path}.weight"]))
        for path, count in rows.items():
            if "." not in path:
                _put(self, path, sized(old.get_parameter(path), 0, count))
        _put(self, maps.readout, resized_linear(old.get_submodule(maps.readout), in_features=h * vo))
        for path, axis in self.layout.owned.items():
            if (owned := parameter_at(old, path)) is not None:
                _put(self, path, sized(owned, axis, h))

    def forward(self, *args: Any, **given: Any) -> Any:
        """Attend over tokens.

        The input, first or named ``hidden_states``, and the result are ``[B, tokens, dim]``, or both are
        ``[B, height, width, dim]``.
        """
        layout, (x, *others) = self.layout, args or (given.pop("hidden_states"),)
        x = _normed(self, layout.norm, x)
        cut = None if layout.windows is None else layout.windows(self, x)
        if cut is not None:
            x, given = cut.rows, {"mask": cut.mask}
        q, k, v = self._projected(x)
        q, k = _normed(self, layout.maps.query_norm, q), _normed(self, layout.maps.key_norm, k)
        q, k, bias, causal = layout.position(self, q.movedim(-2, 1), k.movedim(-2, 1), tuple(others), given)
        out = attend(
            q,
            k,
            v.movedim(-2, 1).flatten(2, -2),
            bias,
            causal=causal,
            scale=self.scale,
            dropout=self.dropout_rate if self.training else 0.0,
            fused=self.fused_attn,
        )
        out = _normed(self, layout.maps.value_norm, out.transpose(1, 2).flatten(2))
        out = self.get_submodule(layout.maps.readout)(out)
        if layout.readout_dropout is not None:
            out = self.get_submodule(layout.readout_dropout)(out)
        out = out.unflatten(1, x.shape[1:-1]) if cut is None else cut.back(out)
        return (out, None) if layout.returns_pair else out

    def _projected(self, x: Tensor) -> list[Tensor]:
        """Queries, keys and values ``[B, ..., heads, width]``."""
        h, qk, vo, places = self.num_heads, self.qk_dim, self.vo_dim, self.layout.maps.places
        counts = (h * qk, h * qk, h * vo)
        biases = [None if bias is None else parameter_at(self, bias) for _, bias in places]
        if self.layout.maps.packed:
            if len({bias for _, bias in places}) > 1:  # apart, though the weights are packed
                parts = zip(biases, counts, strict=True)
                bias = torch.cat([x.new_zeros(count) if part is None else part for part, count in parts])
            else:
                bias = biases[0]
            parts = F.linear(x, self.get_parameter(places[0][0]), bias).split(counts, dim=-1)
        else:
            parts = [F.linear(x, self.get_parameter(w), bias) for (w, _), bias in zip(places, biases, strict=True)]
        return [part.unflatten(-1, (h, width)) for part, width in zip(parts, (qk, qk, vo), strict=True)]


def attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *, causal: bool, scale: float, dropout: float, fused: bool
) -> Tensor:
    """Attention of queries and keys ``[B, heads, tokens, qk]`` to values ``[B, heads, tokens, vo]``."""
    if not fused and bias is None and not causal:
        return F.dropout((q * scale @ k.transpose(-2, -1)).softmax(dim=-1), dropout) @ v
    qk, vo = q.shape[-1], v.shape[-1]
    width = max(qk, vo)
    q, k, v = (F.pad(t, (0, width - t.shape[-1])) if t.shape[-1] < width else t for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, is_causal=causal, scale=scale)
    return out[..., :vo]


def _normed(attn: nn.Module, norm: str | None, x: Tensor) -> Tensor:
    module = None if norm is None else getattr(attn, norm, None)
    return x if module is None else module(x)


def attribute_at(module: nn.Module, path: str) -> Any:
    """What lies at a path; None where nothing does."""
    found: Any = module
    for part in path.split("."):
        found = getattr(found, part, None)
    return found


def _rate(old: nn.Module, dropout: str | None) -> float:
    found = 0.0 if dropout is None else attribute_at(old, dropout)
    return float(found.p if isinstance(found, nn.Dropout) else found)


def parameter_at(module: nn.Module, path: str) -> nn.Parameter | None:
    """A parameter by its path; None where there is none."""
    found = attribute_at(module, path)
    return found if isinstance(found, nn.Parameter) else None


def _put(module: nn.Module, path: str, value: object) -> None:
    """Set what is at a path."""
    setattr(_holder(module, path), path.rpartition(".")[2], value)


def _holder(module: nn.Module, path: str) -> nn.Module:
    """The module that holds what is at a path; what is missing on the way to it is an empty module."""
    for parent in path.split(".")[:-1]:
        if getattr(module, parent, None) is None:
            setattr(module, parent, nn.Module())
        module = module.get_submodule(parent)
    return module


def sized(like: Tensor, axis: int, count: int) -> nn.Parameter:
    """A parameter of another size along one axis, of zeros: what memory happens to hold may be NaN."""
    shape = [count if i == axis else size for i, size in enumerate(like.shape)]
    return nn.Parameter(like.new_zeros(shape), requires_grad=like.requires_grad)


def resized_linear(old: Any, *, in_features: int | None = None, out_features: int | None = None) -> nn.Linear:
    """A linear map of another width; its weights are newly drawn, and frozen where they were."""
    new = nn.Linear(
        old.in_features if in_features is None else in_features,
        old.out_features if out_features is None else out_features,
        bias=old.bias is not None,
        device=old.weight.device,
        dtype=old.weight.dtype,
    )
    for name, parameter in new.named_parameters():
        parameter.requires_grad_(old.get_parameter(name).requires_grad)
    return new
