"""Models of timm: their names there, and the arguments that tell one from others of its name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.layers import GluMlp, LayerScale, get_act_layer, get_norm_layer
from timm.models import is_model_in_modules, save_for_hf
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from gohsp.errors import CheckpointError, UnsupportedModelError
from gohsp.models.attention import PrunedAttention
from gohsp.models.description import pretrained_cfg
from gohsp.models.labels import num_classes
from gohsp.models.libraries.arguments import check_arguments
from gohsp.models.libraries.shape import Shape
from gohsp.models.modules import Constant

MODULES = (
    "beit",
    "deit",
    "eva",
    "naflexvit",
    "swin_transformer",
    "swin_transformer_v2",
    "vision_transformer",
    "vision_transformer_hybrid",
    "vision_transformer_relpos",
    "vision_transformer_sam",
)
"""timm's modules that make models which can be pruned; nothing else is built by a name that comes from a file."""


def recognises(model: nn.Module) -> bool:
    """Whether a model was made by its name in timm."""
    known = pretrained_cfg(model).get("architecture")
    return type(model).__module__.startswith("timm.models.") and bool(known)


def check(name: str, arguments: Mapping[str, Any], where: str) -> None:
    """Check a name and arguments that come from a file; nothing is made of them.

    Raises:
        CheckpointError: timm has no such model in :data:`MODULES`, or an argument is not allowed.
    """
    if not is_model_in_modules(name, MODULES) or not re.fullmatch(r"\w+", name):
        raise CheckpointError(
            f"{where}: architecture '{name}' is none of timm {timm.__version__}'s Vision Transformers"
        )
    check_arguments(arguments, where)


def architecture_name(model: nn.Module) -> str:
    """The name that ``timm.create_model`` made this model by.

    Raises:
        UnsupportedModelError: The model was not made by ``timm.create_model``.
    """
    name = pretrained_cfg(model).get("architecture")
    if not name:
        raise UnsupportedModelError(
            "this model does not know its architecture's name, so it could not be made again on loading; "
            "make it with timm.create_model(...)"
        )
    return name


def architecture_arguments(model: nn.Module) -> dict[str, Any]:
    """The arguments of :func:`build` that make this model's architecture again, where they differ from the default.

    Those of a ``VisionTransformer`` are read off the model as it is now, so that a new classifier, another input size
    or fewer blocks are seen; of other classes size, channels, classes, pooling, width and depth are. Widths of heads
    and FFNs are no part of it, since a build is resized to them, nor are rates of dropout and stochastic depth, which
    are training settings.
    """
    with torch.device("meta"):
        default = timm.create_model(architecture_name(model))
    read = _arguments if isinstance(model, VisionTransformer) else _few_arguments
    base, mine = read(default), read(model)
    # timm takes None for "not given".
    changed = {key: value for key, value in mine.items() if base.get(key) != value and value is not None}
    if "global_pool" in changed:  # timm infers a norm that is left open from the pooling
        changed["fc_norm"] = mine["fc_norm"]
    if not isinstance(model, VisionTransformer) and "embed_dim" not in mine:
        return changed
    if "num_heads" not in changed and mine["embed_dim"] % cast(Any, default).blocks[0].attn.num_heads:
        changed["num_heads"] = 1  # any that divides the width
    return changed


def _few_arguments(model: nn.Module) -> dict[str, Any]:
    """What timm's other classes have in common."""
    of: Any = model
    blocks, patch = getattr(of, "blocks", None), getattr(of, "patch_embed", None)
    size = getattr(patch, "img_size", None)
    read: dict[str, Any] = {
        "img_size": list(size) if size else None,
        "in_chans": next((m.in_channels for m in of.modules() if isinstance(m, nn.Conv2d)), None),
        "num_classes": num_classes(of),
        "global_pool": getattr(of, "global_pool", None),
    }
    if blocks is None:
        return read
    widths = [attn.qk_dim if isinstance(attn, PrunedAttention) else attn.head_dim for attn in _positioned(of)]
    return read | {
        "patch_size": list(patch.patch_size) if patch is not None and hasattr(patch, "patch_size") else None,
        "embed_dim": of.embed_dim,
        "depth": len(blocks),
        "num_heads": of.embed_dim // widths[0] if widths else None,
    }


def _positioned(model: Any) -> list[Any]:
    """Attentions whose tables of positions are for heads of the dense width: of turns, or of vectors."""
    found = (getattr(block, "attn", None) for block in model.blocks)
    return [attn for attn in found if hasattr(attn, "rotate_half") or hasattr(attn, "rel_pos_h")]


def _arguments(model: nn.Module) -> dict[str, Any]:
    vit: Any = model
    patch = vit.patch_embed
    norms = [m for m in vit.modules() if hasattr(m, "eps") and hasattr(m, "normalized_shape")]
    read: dict[str, Any] = {
        "img_size": list(patch.img_size) if patch.img_size else None,
        "patch_size": list(patch.patch_size),
        "in_chans": next(m.in_channels for m in patch.modules() if isinstance(m, nn.Conv2d)),
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
    """What all blocks have in common, off the first ones of which attention and FFN are there."""
    attn = next((block.attn for block in vit.blocks if not isinstance(block.attn, Constant)), None)
    mlp = next((block.mlp for block in vit.blocks if not isinstance(block.mlp, Constant)), None)
    gains = (getattr(block, name, None) for block in vit.blocks for name in ("ls1", "ls2"))
    read: dict[str, Any] = {"init_values": 1e-5 if any(isinstance(gain, LayerScale) for gain in gains) else None}
    if attn is not None:
        read |= {
            "qkv_bias": attn.qkv.bias is not None,
            "qk_norm": not isinstance(attn.q_norm, nn.Identity),
            "scale_attn_norm": not isinstance(attn.norm, nn.Identity),
            "proj_bias": attn.proj.bias is not None,
        }
    if mlp is not None:
        read |= {"scale_mlp_norm": not isinstance(mlp.norm, nn.Identity), "act_layer": _act_name(mlp.act)}
    return read | _dense_widths(vit, attn, mlp)


def _dense_widths(vit: Any, attn: Any, mlp: Any) -> dict[str, Any]:
    """Widths that a norm, or a pooling's own attention, has from the dense blocks."""
    dim, heads, ratio = vit.embed_dim, None, None
    if vit.attn_pool is not None:
        heads = vit.attn_pool.num_heads
    elif attn is not None and not isinstance(attn.q_norm, nn.Identity):
        heads = dim // attn.q_norm.normalized_shape[0]
    if hasattr(vit.attn_pool, "mlp"):
        ratio = vit.attn_pool.mlp.fc2.in_features / dim
    elif mlp is not None and not isinstance(mlp.norm, nn.Identity):
        ratio = mlp.fc2.in_features * (2 if isinstance(mlp, GluMlp) else 1) / dim
    return {"num_heads": heads, "mlp_ratio": ratio}


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


def make(name: str, arguments: Mapping[str, Any], *, pretrained: bool = False) -> nn.Module:
    """``timm.create_model``, which also takes ``norm_eps``: the epsilon of all norms."""
    given = dict(arguments)
    eps = given.pop("norm_eps", None)
    model = timm.create_model(name, pretrained=pretrained, **given)
    if eps is not None:
        for module in model.modules():
            if hasattr(module, "eps") and hasattr(module, "normalized_shape"):
                module.eps = eps  # type: ignore[assignment]
    return model


# Without gohsp


def units_step(_model: nn.Module) -> int:
    """Hidden units that settings can say are multiples of this."""
    return 1


def plain_settings(model: nn.Module, shape: Shape) -> dict[str, Any]:
    """Arguments of ``timm.create_model`` for a model like this one, with blocks of a shape.

    No architecture of timm's takes a width of heads: it is the stream's over the number of heads.

    Raises:
        ValueError: No argument says an epsilon.
    """
    settings = architecture_arguments(model)
    if "norm_eps" in settings:
        raise ValueError(f"no argument of timm's says the norms' eps of {settings['norm_eps']}")
    gated = any(isinstance(module, GluMlp) for module in model.modules())
    twice = gated and not isinstance(model, Eva)  # which doubles the hidden units itself
    said = {"mlp_ratio": shape.mlp_ratio(Fraction(2 if twice else 1))}
    if hasattr(model, "blocks"):  # elsewhere each stage has a number of its own
        said["num_heads"] = shape.heads
    return settings | {name: value for name, value in said.items() if value is not None}


def make_plain(model: nn.Module, settings: Mapping[str, Any]) -> nn.Module:
    """A model like this one, by its name and arguments, with new weights."""
    made = timm.create_model(architecture_name(model), **settings)
    made.pretrained_cfg = made.default_cfg = model.pretrained_cfg  # type: ignore[assignment]
    return made


def save_plain(made: nn.Module, settings: Mapping[str, Any], folder: Path) -> None:
    """Write a model for ``timm.create_model("local-dir:FOLDER", pretrained=True)``."""
    native = {"pretrained_cfg": {"custom_load": False}}  # whatever the dense weights came as
    save_for_hf(made, str(folder), model_config=native, model_args=dict(settings), safe_serialization=True)
