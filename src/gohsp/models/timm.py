"""timm's ``VisionTransformer`` family: vit_*, deit_* (distilled too), deit3_*, augreg, registers, qk-norm.

The only module that knows timm's classes. It describes a model as a structure, rebuilds modules at new
widths in place, and records how to make the architecture again.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

import timm
import torch
from timm.layers import Attention, GluMlp, LayerScale, Mlp, SwiGLU, get_act_layer, get_norm_layer
from timm.models import is_model_in_modules
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

FAMILY = "Vision Transformers (vit_*, deit_*, deit3_*)"
MODULES = ("vision_transformer", "deit", "vision_transformer_hybrid")
"""timm's modules that make models of this family; nothing else is built by a name that comes from a file."""

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
    bare = copy.copy(vit)  # shallow, so that the blocks are not copied with the rest
    bare._modules = {**vit._modules, "blocks": nn.Sequential()}
    bare = copy.deepcopy(bare).to("meta").eval()
    bare.requires_grad_(False)  # the counter trips over parameters that enter a module as its input (pooling latents)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        dtype = next(bare.parameters()).dtype
        features = bare.forward_features(torch.empty(1, *input_size(vit), device="meta", dtype=dtype))
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
    """The arguments of :func:`build` that make this model's architecture again, where they differ from the default.

    All of them are read off the model as it is now, so that a new classifier, another input size or fewer blocks are
    seen. Widths of heads and FFNs are no part of it, since a build is resized to them, nor are rates of dropout and
    stochastic depth, which are training settings.
    """
    with torch.device("meta"):
        default = timm.create_model(architecture_name(model))
    base, mine = _arguments(default), _arguments(model)
    # timm takes None for "not given".
    changed = {key: value for key, value in mine.items() if base.get(key) != value and value is not None}
    if "global_pool" in changed:  # timm infers a norm that is left open from the pooling
        changed["fc_norm"] = mine["fc_norm"]
    if "num_heads" not in changed and mine["embed_dim"] % cast(Any, default).blocks[0].attn.num_heads:
        changed["num_heads"] = 1  # any that divides the width
    return changed


def _arguments(model: nn.Module) -> dict[str, Any]:
    vit: Any = model
    patch = vit.patch_embed
    norms = [m for m in vit.modules() if hasattr(m, "eps") and hasattr(m, "normalized_shape")]
    read: dict[str, Any] = {
        "img_size": list(patch.img_size) if patch.img_size else None,
        "patch_size": list(patch.patch_size),
        "in_chans": _in_chans(vit),
        "num_classes": num_classes(vit),
        "global_pool": vit.global_pool,
        "embed_dim": vit.embed_dim,
        "depth": len(vit.blocks),
        "class_token": vit.cls_token is not None,
        "reg_tokens": vit.num_reg_tokens,
        "pos_embed": "learn" if vit.pos_embed is not None else "none",
        "no_embed_class": vit.no_embed_class,
        "pre_norm": not isinstance(vit.norm_pre, nn.Identity),
        "final_norm": not (isinstance(vit.norm, nn.Identity) and isinstance(vit.fc_norm, nn.Identity)),
        "fc_norm": not isinstance(vit.fc_norm, nn.Identity),
        "pool_include_prefix": vit.pool_include_prefix,
        "dynamic_img_size": vit.dynamic_img_size,
        "dynamic_img_pad": getattr(patch, "dynamic_img_pad", False),
        "norm_layer": NORM_NAMES.get(type(norms[0])) if norms else None,
        "norm_eps": norms[0].eps if norms else None,
    }
    return read | (_block_arguments(vit) if len(vit.blocks) else {})


def _block_arguments(vit: Any) -> dict[str, Any]:
    """What all blocks have in common, off the first."""
    block, dim = vit.blocks[0], vit.embed_dim
    attn, mlp = block.attn, block.mlp
    # Widths that a norm or a pooling's own attention has from the dense blocks.
    heads = ratio = None
    if vit.attn_pool is not None:
        heads = vit.attn_pool.num_heads
    elif not isinstance(attn.q_norm, nn.Identity):
        heads = dim // attn.q_norm.normalized_shape[0]
    if hasattr(vit.attn_pool, "mlp"):
        ratio = vit.attn_pool.mlp.fc2.in_features / dim
    elif not isinstance(mlp.norm, nn.Identity):
        ratio = mlp.fc2.in_features * (2 if isinstance(mlp, GluMlp) else 1) / dim
    return {
        "num_heads": heads,
        "mlp_ratio": ratio,
        "qkv_bias": attn.qkv.bias is not None,
        "qk_norm": not isinstance(attn.q_norm, nn.Identity),
        "scale_attn_norm": not isinstance(attn.norm, nn.Identity),
        "scale_mlp_norm": not isinstance(mlp.norm, nn.Identity),
        "proj_bias": attn.proj.bias is not None,
        "init_values": 1e-5 if isinstance(block.ls1, LayerScale) else None,
        "act_layer": _act_name(mlp.act),
    }


NORM_NAMES = {get_norm_layer(name): name for name in ("layernorm", "rmsnorm", "layernormfp32", "rmsnormfp32")}
NORM_NAMES[nn.LayerNorm] = "layernorm"
"""Names by which an architecture's arguments can ask for a norm; any other class must be its default."""

ACT_NAMES = ("gelu", "gelu_tanh", "quick_gelu", "relu", "silu", "mish", "hard_swish", "leaky_relu", "sigmoid", "tanh")


def _act_name(act: nn.Module) -> str | None:
    """The name of an activation by what it computes, whatever its class; None where timm has no name for it."""
    x = torch.linspace(-4, 4, 33, device="cpu")  # whatever device is being made on
    try:
        y = act(x.clone())
    except (RuntimeError, TypeError, ValueError):
        return None
    named = ((name, get_act_layer(name)()) for name in ACT_NAMES)
    return next((name for name, other in named if torch.allclose(other(x.clone()), y, rtol=0, atol=1e-6)), None)


def build(spec: Mapping[str, Any]) -> nn.Module:
    """Make the dense architecture on the meta device.

    Args:
        spec: ``{"architecture": name, "arguments": {...}}``: a plain name that timm has for this family, and arguments
            of its model class or ``norm_eps``.

    Raises:
        CheckpointError: timm has no such model in this family, or refuses an argument.
    """
    name, arguments = spec["architecture"], dict(spec["arguments"])
    if not is_model_in_modules(name, MODULES) or not re.fullmatch(r"\w+", name):
        raise CheckpointError(f"architecture '{name}' is none of timm {timm.__version__}'s {FAMILY}")
    try:
        with torch.device("meta"):
            return create(name, arguments)
    except (RuntimeError, TypeError, ValueError, ArithmeticError, AssertionError) as error:
        raise CheckpointError(f"timm {timm.__version__} cannot make '{name}' with {arguments}: {error}") from error


def create(name: str, arguments: Mapping[str, Any], *, pretrained: bool = False) -> nn.Module:
    """``timm.create_model``, which also takes ``norm_eps``: the epsilon of all norms."""
    given = dict(arguments)
    eps = given.pop("norm_eps", None)
    model = timm.create_model(name, pretrained=pretrained, **given)
    if eps is not None:
        for module in model.modules():
            if hasattr(module, "eps") and hasattr(module, "normalized_shape"):
                module.eps = eps  # type: ignore[assignment]
    return model
