"""Making a dense model again: what a library calls it, and the arguments that tell it from others of that name.

Only saving and loading ask this; describing, cutting and checking a model do not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

import timm
import torch
from timm.layers import GluMlp, LayerScale, get_act_layer, get_norm_layer
from timm.models import is_model_in_modules
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from gohsp.core.capture import evaluating, require_finite
from gohsp.core.objective import tensor_in
from gohsp.errors import CheckpointError, UnsupportedModelError
from gohsp.models.compaction import EQUALITY_TOLERANCE, relative_difference
from gohsp.models.description import describe, example_image, resize
from gohsp.models.labels import num_classes
from gohsp.models.modules import Constant
from gohsp.structure import Widths

LIBRARY = "timm"
FAMILY = "Vision Transformers (vit_*, deit_*, deit3_*)"
MODULES = ("vision_transformer", "deit", "vision_transformer_hybrid")
"""timm's modules that make models of this family; nothing else is built by a name that comes from a file."""


OWN: Mapping[str, Any] = {"library": None, "architecture": None, "arguments": {}}
"""The specification of a module of the user's own."""


def is_library_model(model: nn.Module) -> bool:
    """Whether a model is a library's, made by its name there."""
    return isinstance(model, VisionTransformer) and bool(
        (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    )


def specification(model: nn.Module) -> dict[str, Any]:
    """What is needed to make the dense architecture again: ``library``, ``architecture``, ``arguments``.

    Raises:
        UnsupportedModelError: The model is none of a library's, by a name that the library would make it by.
    """
    if not isinstance(model, VisionTransformer):
        cls = type(model)
        raise UnsupportedModelError(
            f"a {cls.__module__}.{cls.__qualname__} can be pruned, but not made again on loading: that takes a timm "
            "VisionTransformer. Save what is pruned with gohsp.save, and load it into a module of your own by "
            "gohsp.load(folder, into=module)"
        )
    return {
        "library": LIBRARY,
        "architecture": architecture_name(model),
        "arguments": architecture_arguments(model),
    }


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
    gains = (module for block in vit.blocks for module in (block.ls1, block.ls2))
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


def build(spec: Mapping[str, Any], widths: Widths | None = None) -> nn.Module:
    """Make an architecture on the meta device, and resize its blocks.

    Args:
        spec: ``{"architecture": name, "arguments": {...}}``: a plain name that timm has for this family, and arguments
            of its model class or ``norm_eps``.
        widths: Widths of its sub-layers; None for the dense ones.

    Raises:
        CheckpointError: An unknown library; timm has no such model in this family, or refuses an argument.
    """
    if spec.get("library") != LIBRARY:
        raise CheckpointError(f"library {spec.get('library')!r} is unknown; this version reads {[LIBRARY]}")
    name, arguments = spec["architecture"], dict(spec["arguments"])
    if not is_model_in_modules(name, MODULES) or not re.fullmatch(r"\w+", name):
        raise CheckpointError(f"architecture '{name}' is none of timm {timm.__version__}'s {FAMILY}")
    try:
        with torch.device("meta"):
            model = create(name, arguments)
            if widths is not None:
                resize(model, widths)
            return model
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


def require_remakeable(model: nn.Module) -> dict[str, Any]:
    """Check that a model can be made again from what a folder would hold of it, and computes the same.

    It is built anew from its specification and widths, given the same weights, and compared by its outputs on an image
    of noise. This costs two forward passes of one image.

    Returns:
        The model's :func:`specification`.

    Raises:
        UnsupportedModelError: The model cannot be described, or the one made again is another; the message names the
            modules, tensors or outputs that differ.
        NonFiniteError: It computes NaN or infinite values.
    """
    spec, network = specification(model), describe(model)
    try:
        again = build(spec, network.widths)
    except CheckpointError as error:
        raise UnsupportedModelError(f"this model could not be made again on loading: {error}") from error
    state = model.state_dict()
    differences = _type_problems(state) + fit_problems(again.state_dict(), state)
    if not differences:
        again.load_state_dict(state, strict=True, assign=True)
        difference = _difference_in_evaluation(model, again.requires_grad_(False))
        # What is computed in half precision differs by the order of its sums.
        tolerance = EQUALITY_TOLERANCE if _dtype(model) in (torch.float32, torch.float64) else 1e-2
        if not difference <= tolerance:
            differences = [f"its outputs differ by {difference:.1e} of their scale (allowed {tolerance:.0e})"]
            differences += _other_modules(again, model)
    if differences:
        raise UnsupportedModelError(
            f"a '{spec['architecture']}' made again with {spec['arguments']} is another model than this one: "
            f"{listed(differences)}. Only what timm.create_model can make can be saved; make the change by one of its "
            "arguments, or save it as a module of your own: gohsp.save(model, folder, own=True)"
        )
    return spec


def listed(problems: Sequence[str], count: int = 5) -> str:
    """The first few problems in one line, and how many more there are."""
    more = f"; and {len(problems) - count} more" if len(problems) > count else ""
    return "; ".join(problems[:count]) + more


def _type_problems(state: Mapping[str, Tensor]) -> list[str]:
    """What keeps tensors from being numbers of one kind, as a weights file is to hold them."""
    types = {tensor.dtype: name for name, tensor in reversed(list(state.items()))}
    if problems := [f"'{name}' is {dtype}" for dtype, name in types.items() if not dtype.is_floating_point]:
        return problems
    if len(types) > 1:
        return ["its tensors are of several types: " + ", ".join(f"'{n}' is {t}" for t, n in types.items())]
    return []


def fit_problems(expected: Mapping[str, Tensor], given: Mapping[str, Any]) -> list[str]:
    """What keeps tensors from being a model's: the names and shapes that differ, a sentence each.

    Args:
        expected: The model's tensors.
        given: Tensors, or anything with a ``shape``.
    """
    problems = [f"'{k}' is missing" for k in expected if k not in given]
    problems += [f"'{k[:200]}' is not part of the model" for k in given if k not in expected]
    problems += [
        f"'{k}' is {list(given[k].shape)}, the model has {list(expected[k].shape)}"
        for k in expected
        if k in given and list(given[k].shape) != list(expected[k].shape)
    ]
    return problems


def _other_modules(again: nn.Module, model: nn.Module) -> list[str]:
    """Modules that are of another class than in the model made again."""
    ours = dict(again.named_modules())
    return [
        f"'{name}' is a {_class_name(module)}, not a {_class_name(ours[name])}"
        for name, module in model.named_modules()
        if name in ours and type(module) is not type(ours[name])
    ]


def _class_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _dtype(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


def _difference_in_evaluation(model: nn.Module, again: nn.Module) -> float:
    """Relative difference of the outputs on one image of noise."""
    image = example_image(model)
    with torch.no_grad(), evaluating(model):
        require_finite("the model's output", tensor_in(model(image)))
        return relative_difference(model, again.eval(), image)
