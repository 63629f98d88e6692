"""What settings may be: ranges stated in one way, and one kind of error for what is outside them."""

from __future__ import annotations

import math
import sys
import types
import typing
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from gohsp.errors import ConfigError, nearest

_MOST = 2**31 - 1
"""No count is ever greater; what goes beyond the 32 bits of some library ends here."""

_TYPES = {bool: "true or false", str: "a text", dict: "a table"}
"""What values of a type are called where settings are written."""


@dataclass(frozen=True, slots=True)
class Range:
    """Finite numbers that a setting may be.

    Attributes:
        least: The smallest.
        most: The greatest.
        whole: Whether only whole numbers are allowed.
        above: Whether ``least`` itself is not.
        below: Whether ``most`` itself is not.
    """

    least: float
    most: float = math.inf
    whole: bool = False
    above: bool = False
    below: bool = False

    def __contains__(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, int if self.whole else int | float):
            return False
        low = value > self.least if self.above else value >= self.least
        high = value < self.most if self.below else value <= self.most
        return low and high and value <= sys.float_info.max

    def __str__(self) -> str:
        text = f"a {'whole' if self.whole else 'finite'} number {'above' if self.above else 'of at least'} {self.least}"
        if self.most in (math.inf, _MOST):
            return text
        return f"{text} and {'below' if self.below else 'at most'} {self.most}"


SHARE = Range(0, 1)
NOT_NEGATIVE = Range(0)
POSITIVE = Range(0, above=True)


def whole(least: int = 1, most: int = _MOST) -> Range:
    """Whole numbers; by default those that can count something."""
    return Range(least, most, whole=True)


SEED = whole(0, 2**32 - 1)
"""What every generator takes."""

WORKERS = whole(0, 1024)


def require(key: str, value: object, allowed: Range) -> None:
    """Check one setting.

    Args:
        key: Its name, as a user writes it.
        value: What it was set to.
        allowed: What it may be.

    Raises:
        ConfigError: It is something else.
    """
    if value not in allowed:
        raise ConfigError(f"{key} must be {allowed}, got {value!r}")


def require_settings(settings: Any, table: str, **ranges: Range) -> None:
    """Check every field of a dataclass of settings.

    Args:
        settings: The dataclass. Choices, flags, texts and tables are checked by the types of its fields, and None is
            allowed where the type allows it.
        table: Where a user writes them, such as ``training``; empty for those at the top.
        **ranges: What each number may be.

    Raises:
        ConfigError: A value is of another type or out of range; the message names its key.
    """
    for name, hint in _hints(type(settings)).items():
        key, value = f"{table}.{name}" if table else name, getattr(settings, name)
        if isinstance(hint, types.UnionType):  # with None
            if value is None:
                continue
            hint = next(kind for kind in typing.get_args(hint) if kind is not types.NoneType)
        kind = typing.get_origin(hint) or hint
        if name in ranges:
            require(key, value, ranges[name])
        elif kind is Literal:
            if value not in typing.get_args(hint):
                raise ConfigError(f"{key} {value!r} is unknown; {nearest(str(value), typing.get_args(hint))}")
        elif not isinstance(value, kind):
            raise ConfigError(f"{key} must be {_TYPES.get(kind, f'a {kind.__name__}')}, got {value!r}")


@cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)
