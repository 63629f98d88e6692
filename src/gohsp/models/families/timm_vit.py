"""timm's ``VisionTransformer`` blocks: vit_*, deit_* (distilled too), deit3_*, augreg, DINOv2, registers, qk-norm."""

from __future__ import annotations

from typing import Any

from timm.layers import Attention as TimmAttention
from timm.layers import GluMlp, LayerScale, Mlp, SwiGLU
from timm.models.vision_transformer import Block
from torch import nn

from gohsp.errors import PlanError, UnsupportedModelError
from gohsp.models.checks import require_linear
from gohsp.models.modules import Constant, PrunedAttention
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
    UnitSlice,
    Widths,
    is_absent,
)

NAME = "timm VisionTransformer"
SUPPORTED = (
    "timm VisionTransformer models made of pre-norm Block with Attention and Mlp, GluMlp or SwiGLU: "
    "vit_*, deit_*, deit3_*, with class token or pooling, register tokens, LayerScale, distilled head, qk-norm"
)


def accepts(module: nn.Module) -> bool:
    """Whether a module is a block of this family."""
    return type(module) is Block


def describe(name: str, block: nn.Module, tokens: int) -> tuple[Sublayer, ...]:
    """Describe a block, dense or already pruned.

    Args:
        name: Its name in the model.
        block: The block.
        tokens: Tokens that it is given.

    Raises:
        UnsupportedModelError: A module of it is of a class that cannot be cut; the message names it.
    """
    of: Any = block
    return _attention(name, of, tokens), _ffn(name, of, tokens)


def _attention(block: str, of: Any, tokens: int) -> Sublayer:
    attn, name = of.attn, f"{block}.attn"
    if isinstance(attn, Constant):
        return _absent(name, block, AttentionWidths(heads=0, qk=0, vo=0), attn)
    if type(attn) not in (TimmAttention, PrunedAttention) or getattr(attn, "gate", None) is not None:
        raise _unsupported(name, attn)
    for label in ("qkv", "proj"):
        require_linear(f"{name}.{label}", getattr(attn, label))
    widths, dim = _attention_widths(attn), attn.proj.out_features
    qk_normed = not (isinstance(attn.q_norm, nn.Identity) and isinstance(attn.k_norm, nn.Identity))
    prunable: set[Kind] = {"head", "qk", "vo"}
    rotatable: set[Kind] = {"qk", "vo"}
    if qk_normed:  # the norm sees a head's whole width: neither its size nor its basis may change
        prunable -= {"qk"}
        rotatable -= {"qk"}
    if not isinstance(attn.norm, nn.Identity):  # likewise over all heads' values
        prunable -= {"head", "vo"}
        rotatable -= {"vo"}
    starts = (0, widths.heads * widths.qk, 2 * widths.heads * widths.qk)
    query, key, value = (_rows(f"{name}.qkv", attn.qkv, start) for start in starts)
    return Attention(
        name=name,
        block=block,
        norm=f"{block}.norm1",
        widths=widths,
        tokens=tokens,
        keys=tokens,
        overhead=_overhead(of.norm1, attn.proj, of.ls1, attn.q_norm, attn.k_norm, attn.norm),
        prunable=frozenset(prunable),
        removable=True,
        rotatable=frozenset(rotatable),
        scale=float(attn.scale),
        query=query,
        key=key,
        value=value,
        query_norm=f"{name}.q_norm" if qk_normed else None,
        key_norm=f"{name}.k_norm" if qk_normed else None,
        readout=_readout(f"{name}.proj", attn.proj, f"{block}.ls1", of.ls1, dim),
    )


def _ffn(block: str, of: Any, tokens: int) -> Sublayer:
    mlp, name = of.mlp, f"{block}.mlp"
    if isinstance(mlp, Constant):
        return _absent(name, block, FfnWidths(units=0), mlp)
    if type(mlp) not in (Mlp, GluMlp, SwiGLU):
        raise _unsupported(name, mlp)
    for label in (*_in_maps(mlp), "fc2"):
        require_linear(f"{name}.{label}", getattr(mlp, label))
    units, dim = mlp.fc2.in_features, mlp.fc2.out_features
    prunable: set[Kind] = {"ffn"} if isinstance(mlp.norm, nn.Identity) else set()
    starts = (0, units) if isinstance(mlp, GluMlp) else (0,)  # packed: gate and value halves follow each other
    return Ffn(
        name=name,
        block=block,
        norm=f"{block}.norm2",
        widths=FfnWidths(units=units),
        tokens=tokens,
        overhead=_overhead(of.norm2, mlp.fc2, of.ls2, mlp.norm),
        prunable=frozenset(prunable),
        removable=True,
        inputs=tuple(
            _rows(f"{name}.{label}", getattr(mlp, label), start) for label in _in_maps(mlp) for start in starts
        ),
        readout=_readout(f"{name}.fc2", mlp.fc2, f"{block}.ls2", of.ls2, dim),
    )


def _absent(name: str, block: str, widths: AttentionWidths | FfnWidths, left: Constant) -> Absent:
    readout = Readout(module=name, bias=f"{name}.bias", gain=None, size=len(left.bias))
    return Absent(name=name, block=block, widths=widths, readout=readout)


def _attention_widths(attn: Any) -> AttentionWidths:
    qk, vo = (attn.qk_dim, attn.vo_dim) if isinstance(attn, PrunedAttention) else (attn.head_dim, attn.head_dim)
    return AttentionWidths(heads=attn.num_heads, qk=qk, vo=vo)


def _in_maps(mlp: nn.Module) -> tuple[str, ...]:
    return ("fc1_g", "fc1_x") if isinstance(mlp, SwiGLU) else ("fc1",)


def _rows(name: str, linear: nn.Linear, start: int) -> Rows:
    weight = UnitSlice(parameter=f"{name}.weight", axis=0, start=start, size=linear.in_features)
    bias = UnitSlice(parameter=f"{name}.bias", axis=0, start=start, size=1)
    return Rows(weight=weight, bias=None if linear.bias is None else bias)


def _readout(name: str, linear: nn.Linear, gain_name: str, gain: nn.Module, dim: int) -> Readout:
    return Readout(
        module=name,
        bias=f"{name}.bias" if linear.bias is not None else None,
        gain=f"{gain_name}.gamma" if isinstance(gain, LayerScale) else None,
        size=dim,
    )


def _overhead(norm: nn.Module, readout: nn.Linear, *others: nn.Module) -> int:
    """Parameters of a sub-layer that no unit holds."""
    bias = 0 if readout.bias is None else readout.bias.numel()
    return bias + sum(p.numel() for module in (norm, *others) for p in module.parameters())


def _unsupported(name: str, module: nn.Module) -> UnsupportedModelError:
    detail = " with a gate" if getattr(module, "gate", None) is not None else ""
    return UnsupportedModelError(
        f"module '{name}' is a {type(module).__module__}.{type(module).__qualname__}{detail}, which cannot be pruned; "
        f"supported: {SUPPORTED}"
    )


def resize(name: str, block: nn.Module, widths: Widths) -> None:
    """Rebuild a block's sub-layers at new widths, in place; new weights are not initialised.

    Attention stays timm's own class while ``qk == vo``, and becomes :class:`PrunedAttention` otherwise. Either scales
    ``q k^T`` by ``qk ** -0.5``. Of a sub-layer of width 0 a :class:`Constant` is left, and neither norm nor LayerScale.

    Raises:
        PlanError: Widths of another kind of sub-layer.
    """
    of: Any = block
    attention, ffn = widths[f"{name}.attn"], widths[f"{name}.mlp"]
    if not isinstance(attention, AttentionWidths) or not isinstance(ffn, FfnWidths):
        raise PlanError(
            f"'{name}' must have an attention's widths for its attn and an FFN's for its mlp, got {attention} and {ffn}"
        )
    if is_absent(attention):
        if not isinstance(of.attn, Constant):
            of.attn, of.norm1, of.ls1 = _constant(of.attn.proj), nn.Identity(), nn.Identity()
    elif attention != _attention_widths(of.attn):
        of.attn = _resized_attention(of.attn, attention)
    if is_absent(ffn):
        if not isinstance(of.mlp, Constant):
            of.mlp, of.norm2, of.ls2 = _constant(of.mlp.fc2), nn.Identity(), nn.Identity()
    elif ffn != FfnWidths(units=of.mlp.fc2.in_features):
        _resize_ffn(of.mlp, ffn.units)


def _constant(readout: nn.Linear) -> Constant:
    return Constant(readout.out_features, device=readout.weight.device, dtype=readout.weight.dtype)


def _resize_ffn(mlp: Any, units: int) -> None:
    for label in _in_maps(mlp):
        rows = units * (2 if isinstance(mlp, GluMlp) else 1)
        setattr(mlp, label, _linear(getattr(mlp, label), out_features=rows))
    mlp.fc2 = _linear(mlp.fc2, in_features=units)


def _resized_attention(attn: Any, widths: AttentionWidths) -> nn.Module:
    heads, qk, vo = widths.heads, widths.qk, widths.vo
    if isinstance(attn, TimmAttention) and qk == vo:
        attn.num_heads, attn.head_dim, attn.attn_dim, attn.scale = heads, qk, heads * qk, qk**-0.5
        attn.qkv = _linear(attn.qkv, out_features=3 * heads * qk)
        attn.proj = _linear(attn.proj, in_features=heads * qk)
        return attn
    resized = PrunedAttention(
        attn.proj.out_features,
        heads=heads,
        qk=qk,
        vo=vo,
        qkv_bias=attn.qkv.bias is not None,
        proj_bias=attn.proj.bias is not None,
        q_norm=attn.q_norm,
        k_norm=attn.k_norm,
        norm=attn.norm,
        attn_drop=attn.attn_drop.p,
        proj_drop=attn.proj_drop.p,
        device=attn.proj.weight.device,
        dtype=attn.proj.weight.dtype,
    )
    resized.fused_attn = attn.fused_attn
    return resized.train(attn.training)


def _linear(old: nn.Linear, *, in_features: int | None = None, out_features: int | None = None) -> nn.Linear:
    return nn.Linear(
        old.in_features if in_features is None else in_features,
        old.out_features if out_features is None else out_features,
        bias=old.bias is not None,
        device=old.weight.device,
        dtype=old.weight.dtype,
    )


def set_fused_attention(block: nn.Module, fused: bool) -> bool:
    """Choose between PyTorch's fused attention kernel and plain matrix products; returns what was chosen before."""
    attn: Any = block.attn
    before = getattr(attn, "fused_attn", fused)
    attn.fused_attn = fused
    return before
