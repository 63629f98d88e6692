"""timm's ``VisionTransformer`` family: vit_*, deit_* (distilled too), deit3_*, augreg, registers, qk-norm.

The only module that knows timm's classes. It describes a model as a structure, rebuilds modules at new
widths in place, and records how to make the architecture again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import timm
import torch
from timm.layers import Attention, GluMlp, LayerScale, Mlp, SwiGLU
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from gohsp.core.activations import Stages
from gohsp.errors import CheckpointError, UnsupportedModelError
from gohsp.models.attention import PrunedAttention
from gohsp.models.checks import require_linear, require_plain
from gohsp.structure import BlockShape, BlockStructure, Kind, ModelStructure, Readout, UnitSlice

LIBRARY = "timm"
SUPPORTED = (
    "timm VisionTransformer models made of pre-norm Block with Attention and Mlp, GluMlp or SwiGLU: "
    "vit_*, deit_*, deit3_*, with class token or pooling, register tokens, LayerScale, distilled head, qk-norm"
)

AnyAttention = Attention | PrunedAttention


def accepts(model: nn.Module) -> bool:
    """Whether this adapter is the one for ``model``."""
    return isinstance(model, VisionTransformer)


def describe(model: nn.Module) -> ModelStructure:
    """Describe a timm ViT, dense or already pruned.

    Raises:
        UnsupportedModelError: A module of it is of a class that cannot be cut; the message names it.
    """
    vit = cast(VisionTransformer, model)
    require_plain(vit)
    if not vit.blocks:
        raise UnsupportedModelError("the model has no blocks, so nothing of it can be pruned")
    blocks = tuple(_describe_block(i, b, vit.embed_dim) for i, b in enumerate(_blocks(vit)))
    prunable = sum(
        b.shape.heads * (b.shape.qk * b.unit_params("qk") + b.shape.vo * b.unit_params("vo"))
        + b.shape.ffn * b.unit_params("ffn")
        for b in blocks
    )
    tokens, fixed_macs = _tokens_and_fixed_macs(vit)
    return ModelStructure(
        blocks=blocks,
        embed_dim=vit.embed_dim,
        tokens=tokens,
        fixed_params=sum(p.numel() for p in vit.parameters()) - prunable,
        fixed_macs=fixed_macs,
    )


def _blocks(model: nn.Module) -> list[Any]:
    """The blocks; untyped, since attributes of foreign modules are."""
    return list(cast(VisionTransformer, model).blocks)


def _tokens_and_fixed_macs(vit: VisionTransformer) -> tuple[int, int]:
    """Token count, and MACs outside the blocks, by PyTorch's own counter on a bare copy without blocks."""
    arguments = {**architecture_arguments(vit), "depth": 0}
    bare = cast(VisionTransformer, build({"architecture": architecture_name(vit), "arguments": arguments}))
    bare.requires_grad_(False)  # the counter trips over parameters that enter a module as its input (pooling latents)
    height, width = bare.patch_embed.img_size or (224, 224)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        images = torch.empty(1, bare.in_chans, height, width, device="meta")
        features = bare.forward_features(images)
        bare.forward_head(features)
    return features.shape[1], counter.get_total_flops() // 2


def _describe_block(index: int, block: Any, dim: int) -> BlockStructure:
    name = f"blocks.{index}"
    if type(block) is not Block:
        raise _unsupported(name, block)
    attn: Any = block.attn
    mlp: Any = block.mlp
    if type(attn) not in (Attention, PrunedAttention) or getattr(attn, "gate", None) is not None:
        raise _unsupported(f"{name}.attn", attn)
    if type(mlp) not in (Mlp, GluMlp, SwiGLU):
        raise _unsupported(f"{name}.mlp", mlp)
    for label, module in block.named_modules():
        if label in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc1_g", "mlp.fc1_x", "mlp.fc2"):
            require_linear(f"{name}.{label}", module)
    shape = _shape(attn, mlp)
    qk_normed = not (isinstance(attn.q_norm, nn.Identity) and isinstance(attn.k_norm, nn.Identity))
    prunable: set[Kind] = {"head", "qk", "vo", "ffn"}
    rotatable: set[Kind] = {"qk", "vo"}
    if qk_normed:  # the norm sees a head's whole width: neither its size nor its basis may change
        prunable -= {"qk"}
        rotatable -= {"qk"}
    if not isinstance(attn.norm, nn.Identity):  # likewise over all heads' values
        prunable -= {"head", "vo"}
        rotatable -= {"vo"}
    if not isinstance(mlp.norm, nn.Identity):
        prunable -= {"ffn"}
    rows = [attn.qkv.weight] + ([attn.qkv.bias] if attn.qkv.bias is not None else [])
    starts = (0, shape.heads * shape.qk, 2 * shape.heads * shape.qk)
    query, key, value = (tuple(_rows(f"{name}.attn.qkv", i, start, dim) for i in range(len(rows))) for start in starts)
    return BlockStructure(
        name=name,
        shape=shape,
        prunable=frozenset(prunable),
        rotatable=frozenset(rotatable),
        scale=float(attn.scale),
        attention=f"{name}.attn",
        query=query,
        key=key,
        value=value,
        query_norm=f"{name}.attn.q_norm" if qk_normed else None,
        key_norm=f"{name}.attn.k_norm" if qk_normed else None,
        attention_readout=_readout(f"{name}.attn.proj", attn.proj, f"{name}.ls1", block.ls1, dim),
        ffn_in=_ffn_rows(f"{name}.mlp", mlp, shape.ffn, dim),
        ffn_readout=_readout(f"{name}.mlp.fc2", mlp.fc2, f"{name}.ls2", block.ls2, dim),
    )


def _shape(attn: AnyAttention, mlp: Any) -> BlockShape:
    qk, vo = (attn.qk_dim, attn.vo_dim) if isinstance(attn, PrunedAttention) else (attn.head_dim, attn.head_dim)
    return BlockShape(heads=attn.num_heads, qk=qk, vo=vo, ffn=mlp.fc2.in_features)


def _rows(linear: str, parameter: int, start: int, dim: int) -> UnitSlice:
    name, size = (("weight", dim), ("bias", 1))[parameter]
    return UnitSlice(parameter=f"{linear}.{name}", axis=0, start=start, size=size)


def _ffn_rows(name: str, mlp: Any, units: int, dim: int) -> tuple[UnitSlice, ...]:
    if isinstance(mlp, SwiGLU):
        halves = [("fc1_g", mlp.fc1_g, 0), ("fc1_x", mlp.fc1_x, 0)]
    elif isinstance(mlp, GluMlp):  # one packed linear map: gate and value halves follow each other
        halves = [("fc1", mlp.fc1, 0), ("fc1", mlp.fc1, units)]
    else:
        halves = [("fc1", mlp.fc1, 0)]
    return tuple(
        _rows(f"{name}.{label}", i, start, dim)
        for label, linear, start in halves
        for i in range(1 if linear.bias is None else 2)
    )


def _readout(name: str, linear: nn.Linear, gain_name: str, gain: nn.Module, dim: int) -> Readout:
    return Readout(
        module=name,
        weight=f"{name}.weight",
        bias=f"{name}.bias" if linear.bias is not None else None,
        gain=f"{gain_name}.gamma" if isinstance(gain, LayerScale) else None,
        size=dim,
    )


def _unsupported(name: str, module: nn.Module) -> UnsupportedModelError:
    detail = " with a gate" if getattr(module, "gate", None) is not None else ""
    return UnsupportedModelError(
        f"module '{name}' is a {type(module).__module__}.{type(module).__qualname__}{detail}, which cannot be pruned; "
        f"supported: {SUPPORTED}"
    )


def resize(model: nn.Module, shapes: Sequence[BlockShape]) -> None:
    """Rebuild every block's linear maps at new widths, in place; new weights are not initialised.

    Attention stays timm's own class while ``qk == vo``, and becomes :class:`PrunedAttention` otherwise.
    Either scales ``q k^T`` by ``qk ** -0.5``.
    """
    for block, shape in zip(_blocks(model), shapes, strict=True):
        if _shape(block.attn, block.mlp) == shape:
            continue
        block.attn = _resized_attention(block.attn, shape)
        mlp = block.mlp
        for label in ("fc1_g", "fc1_x") if isinstance(mlp, SwiGLU) else ("fc1",):
            rows = shape.ffn * (2 if isinstance(mlp, GluMlp) else 1)
            setattr(mlp, label, _linear(getattr(mlp, label), out_features=rows))
        mlp.fc2 = _linear(mlp.fc2, in_features=shape.ffn)


def _resized_attention(attn: AnyAttention, shape: BlockShape) -> AnyAttention:
    heads, qk, vo = shape.heads, shape.qk, shape.vo
    if isinstance(attn, Attention) and qk == vo:
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
        in_features or old.in_features,
        out_features or old.out_features,
        bias=old.bias is not None,
        device=old.weight.device,
        dtype=old.weight.dtype,
    )


def set_fused_attention(model: nn.Module, fused: bool | Sequence[bool]) -> list[bool]:
    """Choose between PyTorch's fused attention kernel and plain matrix products, for all blocks alike or for each.

    Returns:
        What was chosen before, by block.
    """
    blocks = _blocks(model)
    before = [block.attn.fused_attn for block in blocks]
    for block, choice in zip(blocks, [fused] * len(blocks) if isinstance(fused, bool) else fused, strict=True):
        block.attn.fused_attn = choice
    return before


def stages(model: nn.Module) -> Stages:
    """The network as embedding, blocks and head, as ``VisionTransformer.forward`` chains them."""
    vit = cast(VisionTransformer, model)

    def embed(images: Tensor) -> Tensor:
        return vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))

    def head(x: Tensor) -> Tensor:
        return vit.forward_head(vit.norm(x))

    return Stages(embed, tuple(_blocks(vit)), head)


def num_classes(model: nn.Module) -> int:
    """Classes that the classifier tells apart; 0 without one."""
    head = cast(Any, model).head
    return head.out_features if isinstance(head, nn.Linear) else 0


def input_size(model: nn.Module) -> tuple[int, int, int]:
    """Channels, height and width of an image; 224 px where the model takes any size."""
    vit: Any = model
    height, width = vit.patch_embed.img_size or (224, 224)
    return _in_chans(vit), height, width


def _in_chans(vit: VisionTransformer) -> int:
    """Channels that the first convolution takes."""
    return next(m.in_channels for m in vit.patch_embed.modules() if isinstance(m, nn.Conv2d))


def architecture_name(model: nn.Module) -> str:
    """The name that ``timm.create_model`` made this model by.

    Raises:
        UnsupportedModelError: The model was not made by ``timm.create_model``.
    """
    name = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    if not name:
        raise UnsupportedModelError(
            "this model does not know its architecture's name, so it could not be made again on loading; "
            "make it with timm.create_model(...)"
        )
    return name


def architecture_arguments(model: nn.Module) -> dict[str, Any]:
    """The arguments of ``timm.create_model`` that this model was made with, where they differ from the default.

    Rates of dropout and stochastic depth are training settings and not part of it. A pruned model remembers
    the arguments of its dense original in ``gohsp_arguments``.
    """
    remembered = getattr(model, "gohsp_arguments", None)
    if remembered is not None:
        return dict(remembered)
    with torch.device("meta"):
        default = timm.create_model(architecture_name(model))
    base, mine = _arguments(default), _arguments(model)
    changed = {key: value for key, value in mine.items() if base.get(key) != value}
    if "global_pool" in changed:  # timm infers a norm that is left open from the pooling
        changed["fc_norm"] = mine["fc_norm"]
    return changed


def _arguments(model: nn.Module) -> dict[str, Any]:
    vit = cast(VisionTransformer, model)
    block, patch = _blocks(vit)[0], vit.patch_embed
    hidden = block.mlp.fc2.in_features * (2 if isinstance(block.mlp, GluMlp) else 1)
    return {
        "img_size": list(patch.img_size) if patch.img_size else None,
        "patch_size": list(patch.patch_size),
        "in_chans": vit.in_chans,
        "num_classes": vit.num_classes,
        "global_pool": vit.global_pool,
        "embed_dim": vit.embed_dim,
        "depth": len(vit.blocks),
        "num_heads": block.attn.num_heads,
        "mlp_ratio": hidden / vit.embed_dim,
        "qkv_bias": block.attn.qkv.bias is not None,
        "qk_norm": not isinstance(block.attn.q_norm, nn.Identity),
        "scale_attn_norm": not isinstance(block.attn.norm, nn.Identity),
        "scale_mlp_norm": not isinstance(block.mlp.norm, nn.Identity),
        "proj_bias": block.attn.proj.bias is not None,
        "init_values": 1e-5 if isinstance(block.ls1, LayerScale) else None,
        "class_token": vit.cls_token is not None,
        "reg_tokens": vit.num_reg_tokens,
        "no_embed_class": vit.no_embed_class,
        "pre_norm": not isinstance(vit.norm_pre, nn.Identity),
        "fc_norm": not isinstance(vit.fc_norm, nn.Identity),
        "dynamic_img_size": vit.dynamic_img_size,
    }


def build(spec: Mapping[str, Any]) -> nn.Module:
    """Make the dense architecture on the meta device.

    Args:
        spec: ``{"architecture": name, "arguments": {...}}``.

    Raises:
        CheckpointError: timm does not know the name, or refuses an argument.
    """
    try:
        with torch.device("meta"):
            model = timm.create_model(spec["architecture"], **spec["arguments"])
    except (RuntimeError, TypeError, AssertionError) as error:
        raise CheckpointError(
            f"timm {timm.__version__} cannot make '{spec['architecture']}' with {spec['arguments']}: {error}"
        ) from error
    return model
