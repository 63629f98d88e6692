"""The arguments that make an architecture: which ones a recipe or a model folder may give, and their bounds.

Everything else that ``timm.create_model`` takes stays out: some of it reads files, fetches URLs or runs code, and some
wraps the model in another class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gohsp.errors import CheckpointError, nearest


@dataclass(frozen=True, slots=True)
class Allowed:
    """What an argument may be.

    Attributes:
        says: In words, for a message.
        accepts: Whether a value is one of these.
    """

    says: str
    accepts: Callable[[Any], bool]


def _is_integer(value: Any, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high  # a bool is an int to isinstance


def _integer(low: int, high: int) -> Allowed:
    return Allowed(f"an integer from {low} to {high}", lambda value: _is_integer(value, low, high))


def _size(high: int) -> Allowed:
    def accepts(value: Any) -> bool:
        sides = value if isinstance(value, list | tuple) and len(value) == 2 else [value]
        return all(_is_integer(side, 1, high) for side in sides)

    return Allowed(f"an integer from 1 to {high}, or two of them (height and width)", accepts)


def _number(low: float, high: float) -> Allowed:
    # NaN compares as false, and so is none.
    return Allowed(f"a number from {low} to {high}", lambda value: type(value) in (int, float) and low <= value <= high)


def _one_of(*names: str) -> Allowed:
    listed = ", ".join(f"'{name}'" for name in names)
    return Allowed(f"one of {listed}", lambda value: isinstance(value, str) and value in names)


def _or_none(allowed: Allowed) -> Allowed:
    return Allowed(f"{allowed.says}, or none", lambda value: value is None or allowed.accepts(value))


def _is_activation(value: Any) -> bool:
    from timm.layers import get_act_layer  # asked of models of timm's alone

    try:
        return isinstance(value, str) and get_act_layer(value) is not None
    except KeyError:
        return False


_FLAG = Allowed("true or false", lambda value: isinstance(value, bool))
_RATE = Allowed("a rate of at least 0 and below 1", lambda value: type(value) in (int, float) and 0 <= value < 1)

ARGUMENTS: Mapping[str, Allowed] = {
    "img_size": _size(4096),
    "patch_size": _size(4096),
    "in_chans": _integer(1, 4096),
    "num_classes": _integer(0, 1_000_000),
    "global_pool": _one_of("", "avg", "avgmax", "max", "token", "map", "prr"),
    "embed_dim": _integer(1, 16384),
    "depth": _integer(0, 512),
    "num_heads": _integer(1, 16384),
    "mlp_ratio": _number(1e-3, 64),
    "qkv_bias": _FLAG,
    "qk_norm": _FLAG,
    "scale_attn_norm": _FLAG,
    "scale_mlp_norm": _FLAG,
    "proj_bias": _FLAG,
    "init_values": _or_none(_number(0, 1e3)),
    "class_token": _FLAG,
    "pos_embed": _one_of("", "none", "learn"),
    "no_embed_class": _FLAG,
    "reg_tokens": _integer(0, 1024),
    "pre_norm": _FLAG,
    "final_norm": _FLAG,
    "fc_norm": _or_none(_FLAG),
    "pool_include_prefix": _FLAG,
    "dynamic_img_size": _FLAG,
    "dynamic_img_pad": _FLAG,
    "act_layer": _or_none(Allowed("an activation that timm knows by name, such as 'gelu' or 'relu'", _is_activation)),
    "norm_layer": _one_of("layernorm", "rmsnorm", "layernormfp32", "rmsnormfp32"),
    "norm_eps": _number(0, 1),
    "drop_rate": _RATE,
    "pos_drop_rate": _RATE,
    "patch_drop_rate": _RATE,
    "proj_drop_rate": _RATE,
    "attn_drop_rate": _RATE,
    "drop_path_rate": _RATE,
}
"""What each argument of timm's ``VisionTransformer`` may be, and ``norm_eps``, which sets that of all its norms."""


def check_arguments(arguments: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Check the arguments of an architecture; nothing is made of them.

    Args:
        arguments: Names and plain values, as JSON or TOML holds them.
        where: What holds them, for a message, such as ``model_arguments``.

    Returns:
        The same arguments.

    Raises:
        CheckpointError: No table, a name that is not in :data:`ARGUMENTS`, or a value that it does not allow.
    """
    if not isinstance(arguments, Mapping):
        raise CheckpointError(f"{where}: must be a table of names and values, got {_shown(arguments)}")
    for name, value in arguments.items():
        allowed = ARGUMENTS.get(name)
        if allowed is None:
            raise CheckpointError(
                f"{where}: '{name}' is no argument of an architecture that is taken; {nearest(str(name), ARGUMENTS)}"
            )
        if not allowed.accepts(value):
            raise rejected(where, name, value, allowed)
    return dict(arguments)


def rejected(where: str, name: str, value: Any, allowed: Allowed) -> CheckpointError:
    """What is wrong with an argument's value."""
    return CheckpointError(f"{where}: '{name}' is {_shown(value)}; it must be {allowed.says}")


def count_from(low: int, high: int) -> Allowed:
    """A whole number between bounds."""
    return _integer(low, high)


def epsilon() -> Allowed:
    """What is added to a variance."""
    return _number(0, 1)


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python prints
        return "a huge integer"
    return text if len(text) <= 80 else f"{text[:77]}..."
