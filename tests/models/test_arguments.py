"""Arguments of architectures: what a recipe or a model folder may give, and what it may not."""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from gohsp.errors import CheckpointError
from gohsp.models.libraries.arguments import ARGUMENTS, check_arguments
from gohsp.models.libraries.timm import make as create

VALID: dict[str, tuple[Any, ...]] = {
    "img_size": (16, [16, 32], (32, 16)),
    "patch_size": (8, [8, 4]),
    "in_chans": (1, 5),
    "num_classes": (0, 7),
    "global_pool": ("", "avg", "avgmax", "max", "token", "map", "prr"),
    "embed_dim": (64,),
    "depth": (0, 3),
    "num_heads": (2,),
    "mlp_ratio": (2, 1.5),
    "init_values": (1e-5, None),
    "pos_embed": ("", "none", "learn"),
    "reg_tokens": (0, 4),
    "class_token": (True,),
    "fc_norm": (True, False, None),
    "act_layer": ("gelu", "quick_gelu", "relu", None),
    "norm_layer": ("layernorm", "rmsnorm"),
    "norm_eps": (0, 1e-3),
}
SMALL = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 4}
INTEGERS = ("img_size", "patch_size", "in_chans", "num_classes", "embed_dim", "depth", "num_heads", "reg_tokens")
NUMBERS = ("mlp_ratio", "init_values", "drop_rate", "drop_path_rate", "attn_drop_rate")


def valid_values(name: str) -> tuple[Any, ...]:
    return VALID.get(name) or ((0, 0.25) if name.endswith("_rate") else (True, False))


@pytest.mark.parametrize(("name", "value"), [(n, v) for n in ARGUMENTS for v in valid_values(n)])
def test_what_is_allowed_timm_takes(name: str, value: Any):
    arguments = {**SMALL, name: value}
    assert check_arguments(arguments, "here") == arguments
    with torch.device("meta"):
        assert isinstance(create("vit_tiny_patch16_224", arguments), VisionTransformer)


def test_every_argument_is_one_of_the_class():
    assert set(ARGUMENTS) - {"norm_eps"} <= set(inspect.signature(VisionTransformer.__init__).parameters)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *itertools.product(INTEGERS, (-1, 10**7, 10**5000, 4.0, "4", True, None, [1, 2, 3], {}, float("nan"))),
        *itertools.product(NUMBERS, (-0.1, float("nan"), float("inf"), 10**400, "1", True, [1])),
        *itertools.product(("class_token", "qkv_bias", "fc_norm"), (0, 1, "true", [], 0.0)),
        *itertools.product(("global_pool", "act_layer", "pos_embed"), ("nonsense", 1, True, ["avg"])),
        ("img_size", [16, 0]),
        ("img_size", [16.0, 16]),
        ("img_size", 4097),
        ("embed_dim", 16385),
        ("depth", 1_000_000),
        ("drop_rate", 1),
        ("in_chans", 0),
        ("global_pool", None),
    ],
    ids=lambda value: str(value)[:20] if isinstance(value, str) else type(value).__name__,
)
def test_a_wrong_type_or_a_value_out_of_bounds_is_refused_by_name(name: str, value: Any):
    with pytest.raises(CheckpointError, match=rf"here: '{name}' is .*; it must be ") as caught:
        check_arguments({name: value}, "here")
    assert ARGUMENTS[name].says in str(caught.value)
    assert len(str(caught.value)) < 300


OTHERS = ("checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "features_only")
OTHERS += ("scriptable", "exportable", "no_jit", "pruned", "block_fn", "mlp_layer", "device", "dtype", "model_name")


@pytest.mark.parametrize("name", [*OTHERS, 3])
def test_what_is_no_argument_of_an_architecture_is_refused(name: Any):
    with pytest.raises(CheckpointError, match=rf"here: '{name}' is no argument of an architecture"):
        check_arguments({name: None}, "here")


def test_a_misspelt_argument_gets_the_nearest():
    with pytest.raises(CheckpointError, match="did you mean 'img_size'"):
        check_arguments({"imgsize": 8}, "here")


@pytest.mark.parametrize("arguments", [None, [], "img_size", 3])
def test_what_is_no_table_is_refused(arguments: Any):
    with pytest.raises(CheckpointError, match="here: must be a table"):
        check_arguments(arguments, "here")
